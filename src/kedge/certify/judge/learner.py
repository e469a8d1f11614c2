"""Kedge's objectives followed to where they come to rest, update by update."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from kedge.certify.judge.groups import Groups, all_groups, drawn_groups
from kedge.certify.judge.objectives import SIZE, Objective
from kedge.certify.judge.task import Task
from kedge.head import Head, reduce, score
from kedge.objective import (
    PolicyLoss,
    TokenInputs,
    anchor_rewards,
    anchor_token_rewards,
    gae,
    group_advantages,
    terminal_rewards,
    value_loss,
    whiten,
)
from kedge.objective.aggregate import spread

CPU = torch.device("cpu")

STEPS = 300
FALLING = 0.975
"""The rate of an update, relative to that of the one before it."""

RARE = 0.01
"""What is drawn more rarely than this is moved as if it were not, so that noise does not throw it about."""
NEVER = 1e-9
"""The same where nothing is drawn and there is no noise."""


@dataclass
class Learner:
    """A tabular policy with its critic, updated by one objective.

    An update divides the gradient of each logit by how often its token is drawn, by the policy or the old one, so
    that the policy nears its rest at about the same speed everywhere; a gradient of zero stays zero.

    Args:
        task: The task; the policy starts from its reference.
        objective: How the loss is put together.
        beta: β, in reward per nat.
        device: Where Kedge's functions run.
        dtype: Of hidden states and heads.
    """

    task: Task
    objective: Objective
    beta: float
    device: torch.device = CPU
    dtype: torch.dtype = torch.float64
    table: Float[Tensor, "S V"] = field(init=False)
    values: Float[Tensor, " S"] = field(init=False)

    def __post_init__(self) -> None:
        self.table = self.task.reference.clone()
        self.values = torch.zeros(len(self.table), dtype=torch.float64)

    @property
    def size(self) -> int:
        """Responses of a group; a critic needs none beside a response."""
        return 1 if self.objective.advantage == "critic" else SIZE

    @property
    def loss(self) -> PolicyLoss:
        """The loss of every update."""
        objective = self.objective
        return PolicyLoss(
            objective.trust_region,
            objective.anchor,
            self.beta,
            penalty=objective.penalty,
            mask=objective.mask,
        )

    def step(
        self, groups: Groups, likely: Float[Tensor, " R"], rate: float, *, rarest: float = NEVER
    ) -> None:
        """Take in a batch drawn by the present policy: every epoch's update, then the critic's.

        Args:
            groups: The batch.
            likely: How much each response counts.
            rate: Of the policy's logits, in nats per unit of reward.
            rarest: States and tokens that are drawn more rarely than this count as if they were not.
        """
        old = self.table
        likely = likely.to(self.device)
        advantages, returns = self._advantages(groups, likely)
        for _ in range(self.objective.epochs):
            gradient = self._gradient(groups, likely, advantages, old)
            often = torch.maximum(self._often(self.table), self._often(old))
            self.table = self.table - rate * gradient / often.clamp(min=rarest)
        if self.objective.advantage == "critic":
            self._teach(groups, likely, returns, rarest)

    def _often(self, table: Float[Tensor, "S V"]) -> Float[Tensor, "S V"]:
        return self.task.visits(table)[:, None] * table.softmax(-1)

    def _scores(self, groups: Groups, table: Tensor, old: Tensor, want: frozenset[str]) -> dict[str, Tensor]:
        with torch.no_grad():
            anchors = self._anchors(groups, old)
            return score(groups.hidden, groups.head(table), groups.tokens, anchors=anchors, want=want)

    def _anchors(self, groups: Groups, old: Tensor) -> dict[str, tuple[Tensor, Head]]:
        tables = {"reference": self.task.reference, "old": old}
        return {name: (groups.hidden, groups.head(table)) for name, table in tables.items()}

    def _advantages(self, groups: Groups, likely: Tensor) -> tuple[Tensor, Tensor]:
        """Return advantages and returns of all tokens."""
        objective, lengths, mask = self.objective, groups.lengths, groups.mask
        rewards = self.task.rewards[groups.drawn].to(likely)
        joins = objective.anchor.placement == "reward" and objective.anchor.gradient == "published"
        want = frozenset({"log_prob"}) | (objective.anchor.outputs if joins else frozenset())
        scores = self._scores(groups, self.table, self.table, want) if joins else {}
        if objective.advantage != "critic":
            if joins:
                rewards = rewards + anchor_rewards(objective.anchor, self.beta, scores, mask, lengths)
            advantages = spread(group_advantages(rewards, groups.group, objective.advantage), lengths)
            return advantages, advantages
        per_token = terminal_rewards(rewards, lengths)
        if joins:
            per_token = per_token + anchor_token_rewards(objective.anchor, self.beta, scores, mask)
        values = self.values.to(likely)[groups.states]
        advantages = gae(per_token, values, lengths, trace=objective.trace)
        returns = advantages + values
        if objective.whitened:
            often = groups.weights("token_mean", likely)
            mean = (often * advantages).sum()
            std = (often * (advantages - mean).square()).sum().sqrt()
            advantages = whiten(advantages, mask, mean=float(mean), std=float(std))
        return advantages, returns

    def _gradient(
        self, groups: Groups, likely: Tensor, advantages: Tensor, old: Tensor
    ) -> Float[Tensor, "S V"]:
        """Differentiate the loss with respect to the table, as a training loop does."""
        objective, loss, lengths = self.objective, self.loss, groups.lengths
        behaviour = None
        if objective.epochs > 1:
            behaviour = self._scores(groups, old, old, frozenset({"log_prob"}))["log_prob"]
        inputs = TokenInputs(
            advantages=advantages,
            weights=groups.weights(objective.aggregation, likely),
            anchor_weights=groups.weights(objective.anchor_aggregation, likely),
            behaviour_log_probs=behaviour,
        )
        statistics = self._scores(groups, self.table, old, loss.statistics()) if loss.statistics() else {}
        prepared = loss.prepare(inputs, lengths, groups.group, statistics)
        head = groups.head(self.table)
        head.weight.requires_grad_()
        value, _ = reduce(
            groups.hidden,
            head,
            groups.tokens,
            lambda scores, rows: loss(scores, prepared.rows(rows)),
            anchors=self._anchors(groups, old),
            want=loss.want(),
        )
        (gradient,) = torch.autograd.grad(value, head.weight)
        return gradient.T.cpu().double()

    def _teach(self, groups: Groups, likely: Tensor, returns: Tensor, rarest: float) -> None:
        """Move the critic to the mean of the returns that it has seen, by the gradient of its loss."""
        values = self.values.to(likely).requires_grad_()
        weights = groups.weights("constant", likely)
        seen = values[groups.states]
        loss = (weights * value_loss(seen, seen, returns, clip=None)).sum()
        (gradient,) = torch.autograd.grad(loss, values)
        often = torch.zeros_like(values).index_add(0, groups.states, weights).detach()
        self.values = self.values - (gradient / often.clamp(min=rarest)).cpu().double()


def follow_expected(learner: Learner, steps: int = STEPS) -> Float[Tensor, " R"]:
    """Follow the expected gradient: every group counts as often as it is likely. Return where it ends.

    The rate falls, because some objectives scale their advantages up to the same size however small they are.
    """
    groups = all_groups(learner.task, learner.size, learner.device, learner.dtype)
    first = 0.7 / (learner.beta * learner.objective.epochs)
    for step in range(steps):
        learner.step(groups, groups.likely(learner.table), first * FALLING**step)
    return learner.task.log_likely(learner.table).exp()


def follow_sampled(
    learner: Learner, seed: int, *, steps: int = 1500, responses: int = 600
) -> Float[Tensor, " R"]:
    """Draw the responses of every update; return the mean of the policies of the last half."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(len(learner.task.responses), dtype=torch.float64)
    first = 0.2 / (learner.beta * learner.objective.epochs)
    for step in range(steps):
        groups = drawn_groups(
            learner.task,
            learner.table,
            responses // learner.size,
            learner.size,
            generator,
            learner.device,
            learner.dtype,
        )
        likely = torch.full((responses,), 1 / responses, dtype=torch.float64)
        learner.step(groups, likely, first / (1 + step / 100), rarest=RARE)
        if 2 * step >= steps:
            total += learner.task.log_likely(learner.table).exp()
    return total / total.sum()
