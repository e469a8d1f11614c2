"""What Kedge's own functions give in expectation: head and loss, as training calls them, on every response."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kedge.certify.tabular import Tabular
from kedge.head import Head, reduce, score
from kedge.objective import (
    Anchor,
    Correction,
    PolicyLoss,
    TokenInputs,
    TrustRegion,
    anchor_rewards,
    correction_weights,
    group_advantages,
)
from kedge.objective.advantages import Kind
from kedge.objective.aggregate import spread

Outputs = Mapping[str, Tensor]


class Offer(NamedTuple):
    """A value and its gradient with respect to the policy's table, in float64 on the CPU."""

    value: Tensor
    gradient: Tensor


@dataclass(frozen=True)
class Experience:
    """Every group of G responses as one packed batch, each weighted by its probability.

    The hidden state of a token is the one-hot code of its state and the head's weight the transposed table of
    logits, so the gradient with respect to the weight is that with respect to the table.

    Args:
        problem: The tables.
        device: Where Kedge's functions run.
        dtype: Of hidden states and heads.
        old: Logits of the old policy, which drew the responses.
        drawn: Which of the problem's responses each response is.
        likely: Probability of each response's group, divided by G.
        size: G, the responses of a group.
    """

    problem: Tabular
    device: torch.device
    dtype: torch.dtype
    old: Float[Tensor, "S V"]
    drawn: Int[Tensor, " R"]
    likely: Float[Tensor, " R"]
    size: int

    @property
    def chunk_rows(self) -> int:
        """Rows of a chunk of the head: no multiple of a response's tokens, so that chunks cut responses."""
        return 1000 if self.size > 1 else 20

    @property
    def lengths(self) -> Int[Tensor, " R"]:
        """Tokens of each response."""
        return torch.full_like(self.drawn, self.problem.length)

    @property
    def group(self) -> Int[Tensor, " R"]:
        """Group of each response."""
        return torch.arange(self.drawn.numel(), device=self.device) // self.size

    @cached_property
    def targets(self) -> Int[Tensor, " N"]:
        """Tokens of all responses."""
        return self.problem.tokens.to(self.device)[self.drawn].flatten()

    @cached_property
    def hidden(self) -> Float[Tensor, "N S"]:
        """One-hot codes of the states of all tokens."""
        states = self.problem.states.to(self.device)[self.drawn].flatten()
        return torch.nn.functional.one_hot(states, len(self.problem.policy)).to(self.dtype)

    def head(self, table: Float[Tensor, "S V"]) -> Head:
        """Return the head whose logits are the table's rows."""
        return Head(table.T.contiguous().to(self.device, self.dtype))

    @property
    def anchors(self) -> dict[str, tuple[Tensor, Head]]:
        """The policies that the policy is compared with, as the head takes them."""
        tables = {"reference": self.problem.reference, "old": self.old}
        return {name: (self.hidden, self.head(table)) for name, table in tables.items()}

    def scores(self, table: Float[Tensor, "S V"], want: frozenset[str]) -> dict[str, Tensor]:
        """Score every token under a table, without gradients."""
        with torch.no_grad():
            return score(
                self.hidden,
                self.head(table),
                self.targets,
                anchors=self.anchors,
                want=want,
                chunk_rows=self.chunk_rows,
            )

    def offers(self, per_token: Callable[[Outputs, slice], Tensor], want: frozenset[str]) -> dict[str, Offer]:
        """Sum a per-token loss over the batch in each way that Kedge has, and differentiate it."""
        hidden, targets, anchors = self.hidden, self.targets, self.anchors
        found = {}
        for way in ("reduce", "score"):
            head = self.head(self.problem.policy)
            head.weight.requires_grad_()
            if way == "reduce":
                loss, _ = reduce(
                    hidden, head, targets, per_token, anchors=anchors, want=want, chunk_rows=self.chunk_rows
                )
            else:
                outputs = score(hidden, head, targets, anchors=anchors, want=want, backend="dense")
                loss = per_token(outputs, slice(None))
            (gradient,) = torch.autograd.grad(loss, head.weight)
            found[way] = Offer(loss.detach().cpu().double(), gradient.T.cpu().double())
        return found


def enumerate_groups(
    problem: Tabular, device: torch.device, dtype: torch.dtype, *, off_policy: bool, size: int = 2
) -> Experience:
    """Lay out every group of ``size`` responses."""
    responses = torch.arange(problem.tokens.shape[0])
    groups = torch.cartesian_prod(*[responses] * size).reshape(-1, size)
    source = problem.behaviour if off_policy else problem.policy
    log_prob = source.log_softmax(-1)[problem.states, problem.tokens].sum(-1)
    likely = (log_prob[groups].sum(-1).exp() / size).repeat_interleave(size)
    return Experience(problem, device, dtype, source, groups.flatten().to(device), likely.to(device), size)


def offered(
    experience: Experience,
    loss: PolicyLoss,
    *,
    off_policy: bool,
    rewards: Float[Tensor, " R"] | None = None,
    kind: Kind = "leave_one_out",
    correction: Correction | None = None,
) -> dict[str, Offer]:
    """Return the expected loss and gradient of an update, step for step as a training loop makes them.

    Args:
        experience: The groups.
        loss: The loss of the update.
        off_policy: Whether the loss is told of the policy that drew the tokens (it then weighs them), or takes
            them as its own.
        rewards: Reward of each of the problem's responses; none for the anchor alone.
        kind: The advantage.
        correction: For tokens drawn by a sampler that the loss is not told of.
    """
    problem, lengths, group = experience.problem, experience.lengths, experience.group
    drawn_by = problem.behaviour if off_policy else problem.policy
    scored = experience.scores(drawn_by, frozenset({"log_prob"}) | loss.anchor.outputs)
    real = scored["log_prob"].dtype
    given = torch.zeros_like(problem.tokens[:, 0], dtype=torch.float64) if rewards is None else rewards
    total = given.to(experience.device, real)[experience.drawn]
    if loss.anchor.placement == "reward" and loss.anchor.gradient == "published":
        mask = torch.ones_like(experience.targets, dtype=torch.bool)
        total = total + anchor_rewards(loss.anchor, loss.beta, scored, mask, lengths)
    advantages = spread(group_advantages(total, group, kind), lengths)
    return updated(experience, loss, advantages, off_policy=off_policy, correction=correction)


def updated(
    experience: Experience,
    loss: PolicyLoss,
    advantages: Float[Tensor, " N"],
    *,
    off_policy: bool,
    correction: Correction | None = None,
) -> dict[str, Offer]:
    """Return the expected loss and gradient of an update whose advantages are at hand; arguments as above."""
    problem, lengths, group = experience.problem, experience.lengths, experience.group
    scored = experience.scores(experience.old if off_policy else problem.policy, frozenset({"log_prob"}))
    weights = spread(experience.likely.to(scored["log_prob"].dtype), lengths)
    inputs = TokenInputs(
        advantages=advantages,
        weights=weights,
        anchor_weights=weights,
        behaviour_log_probs=scored["log_prob"] if off_policy else None,
        correction=None if correction is None else _correct(experience, scored["log_prob"], correction),
    )
    statistics = experience.scores(problem.policy, loss.statistics()) if loss.statistics() else {}
    prepared = loss.prepare(inputs, lengths, group, statistics)
    return experience.offers(lambda scores, rows: loss(scores, prepared.rows(rows)), loss.want())


def _correct(experience: Experience, log_prob: Tensor, correction: Correction) -> Tensor:
    """Weigh tokens that the behaviour policy drew as a sampler."""
    sampler = experience.scores(experience.problem.behaviour, frozenset({"log_prob"}))["log_prob"]
    return correction_weights(log_prob, sampler, experience.lengths, correction)


def anchored(experience: Experience, anchor: Anchor, *, off_policy: bool) -> dict[str, Offer]:
    """Return the anchor's part of the loss alone, at β = 1 and without a trust region."""
    return offered(experience, PolicyLoss(TrustRegion("none"), anchor, beta=1.0), off_policy=off_policy)
