"""The gradient of every output of the head with respect to the logits of a distribution.

Let p be the distribution with the logits l, q another, x = log q − log p, s = sign(p − q), and g the upstream
gradients of log p(a), the entropy H, the log-normaliser Z, F = KL(p‖q), R = KL(q‖p) and T = TV(p, q). Then

    ∂/∂l = p·[ g_Z − g_H·(log p + H) + Σ_q ( −g_F·(x + F) + ½·g_T·(s − Σ p·s) ) ] + Σ_q g_R·(p − q) + g_a·(1[a] − p)

Seen from q the same formula holds with p and q, F and R exchanged: it serves every anchor that trains, too. At the
target itself 1 − p is −expm1(log p), which keeps its digits where p is almost 1; so does s − Σ p·s, summed where
s differs.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kedge.divergence import probability_difference


@dataclass(frozen=True)
class Pull:
    """An upstream gradient beside its output's value, columns [n, 1]; both 0 where the value is infinite."""

    gradient: Tensor
    value: Tensor

    @classmethod
    def of(cls, gradient: Tensor, value: Tensor) -> Pull:
        """Make one of an upstream gradient [n] and a value [n]."""
        infinite = value.isinf()
        return cls(gradient.masked_fill(infinite, 0.0)[:, None], value.masked_fill(infinite, 0.0)[:, None])

    def __getitem__(self, rows: slice) -> Pull:
        return Pull(self.gradient[rows], self.value[rows])


@dataclass(frozen=True)
class Comparison:
    """One distribution beside another in a block of rows, with what pulls at their divergences.

    Args:
        log_p: finite log-probabilities of the distribution whose logits are asked about, [n, V].
        log_q: those of the other.
        log_ratio: x = log q − log p.
        outward: the pull at KL(p‖q).
        inward: the pull at KL(q‖p).
        variation: the pull at TV(p, q).
    """

    log_p: Tensor
    log_q: Tensor
    log_ratio: Tensor
    outward: Pull | None
    inward: Pull | None
    variation: Pull | None

    def reversed(self) -> Comparison:
        """Return the same, seen from the other distribution."""
        return Comparison(self.log_q, self.log_p, -self.log_ratio, self.inward, self.outward, self.variation)


def logit_gradient(
    log_p: Tensor,
    targets: Tensor,
    comparisons: list[Comparison],
    *,
    log_prob: Pull | None = None,
    entropy: Pull | None = None,
    log_normalizer: Pull | None = None,
) -> Tensor:
    """Return ∂/∂l [n, V] of all outputs together, from finite log-probabilities [n, V] and targets [n]."""
    p = log_p.exp()
    inner = log_p.new_zeros(log_p.shape[0], 1)  # the bracket; a column until a term needs more
    if log_normalizer is not None:
        inner = inner + log_normalizer.gradient
    if entropy is not None:
        inner = inner - entropy.gradient * (log_p + entropy.value)
    for each in comparisons:
        if each.outward is not None:
            inner = inner - each.outward.gradient * (each.log_ratio + each.outward.value)
        if each.variation is not None:
            inner = inner + 0.5 * each.variation.gradient * _less_mean(p, -each.log_ratio)
    if log_prob is None:
        gradient = p * inner
    else:
        chosen = log_p.gather(-1, targets[:, None])
        at_target = chosen.exp() * inner.expand_as(log_p).gather(-1, targets[:, None])
        gradient = p * (inner - log_prob.gradient)
        gradient.scatter_(-1, targets[:, None], at_target - log_prob.gradient * chosen.expm1())
    for each in comparisons:
        if each.inward is not None:
            gradient.addcmul_(
                each.inward.gradient, probability_difference(p, each.log_q.exp(), each.log_ratio)
            )
    return gradient


def _less_mean(p: Tensor, x: Tensor) -> Tensor:
    """Return s − Σ p·s with s = sign(x), [n, V]: nothing is subtracted from 1, which p may almost be."""
    above, below, level = ((p * chosen).sum(-1, keepdim=True) for chosen in (x > 0, x < 0, x == 0))
    return (2 * below + level) * (x > 0) - (2 * above + level) * (x < 0) + (below - above) * (x == 0)
