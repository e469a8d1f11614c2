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


@dataclass(frozen=True)
class Signs:
    """The mass of p where it is above q, below it, and level with it, [n, 1] each; for what pulls at TV(p, q)."""

    above: Tensor
    below: Tensor
    level: Tensor

    @classmethod
    def of(cls, compared: Comparison) -> Signs | None:
        """Add them up over the whole vocabulary, if they are needed."""
        if compared.variation is None:
            return None
        p, x = compared.log_p.exp(), compared.log_ratio
        return cls(*((p * chosen).sum(-1, keepdim=True) for chosen in (x < 0, x > 0, x == 0)))

    def less_mean(self, x: Tensor) -> Tensor:
        """Return s − Σ p·s with s = sign(x), x = log p − log q: nothing is subtracted from 1, which p may almost be."""
        up, down = 2 * self.below + self.level, 2 * self.above + self.level
        return up * (x > 0) - down * (x < 0) + (self.below - self.above) * (x == 0)


def logit_gradient(
    log_p: Tensor,
    comparisons: list[Comparison],
    signs: list[Signs | None],
    *,
    at_targets: bool,
    log_prob: Pull | None = None,
    entropy: Pull | None = None,
    log_normalizer: Pull | None = None,
) -> Tensor:
    """Return ∂/∂l of all outputs together for some entries of the vocabulary, [n, V], or [n, 1] for the targets.

    Args:
        log_p: their finite log-probabilities.
        comparisons: with other distributions, of the same entries.
        signs: of these, over the whole vocabulary.
        at_targets: whether the entries are the targets; else none is taken for one.
        log_prob: the pull at log p(a).
        entropy: the pull at H.
        log_normalizer: the pull at Z.
    """
    p, inner = log_p.exp(), _bracket(log_p, comparisons, signs, entropy, log_normalizer)
    if log_prob is None:
        gradient = p * inner
    elif at_targets:
        gradient = p * inner - log_prob.gradient * log_p.expm1()
    else:
        gradient = p * (inner - log_prob.gradient)
    for each in comparisons:
        if each.inward is not None:
            moved = probability_difference(p, each.log_q.exp(), each.log_ratio)
            gradient.addcmul_(each.inward.gradient, moved)
    return gradient


def _bracket(
    log_p: Tensor,
    comparisons: list[Comparison],
    signs: list[Signs | None],
    entropy: Pull | None,
    log_normalizer: Pull | None,
) -> Tensor:
    """The formula's bracket, but for what the log-probability pulls; [n, 1] where nothing depends on the entry."""
    inner = log_p.new_zeros(log_p.shape[0], 1)
    if log_normalizer is not None:
        inner = inner + log_normalizer.gradient
    if entropy is not None:
        inner = inner - entropy.gradient * (log_p + entropy.value)
    for each, sign in zip(comparisons, signs, strict=True):
        if each.outward is not None:
            inner = inner - each.outward.gradient * (each.log_ratio + each.outward.value)
        if each.variation is not None and sign is not None:
            inner = inner + 0.5 * each.variation.gradient * sign.less_mean(-each.log_ratio)
    return inner
