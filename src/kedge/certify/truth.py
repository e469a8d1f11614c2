"""Expected values or gradients in closed form, from the tables alone.

Nothing of Kedge is used here: logits become probabilities through ``log_softmax``, an expectation is a sum over
all responses, and a gradient is autograd's of such a sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from kedge.certify.tabular import Tabular


@dataclass(frozen=True)
class Truth:
    """Sums over every response of a tabular problem, responses being drawn by ``drawn_by``.

    Args:
        problem: The tables.
        off_policy: Whether the behaviour policy draws the responses, or the policy itself.
    """

    problem: Tabular
    off_policy: bool

    @cached_property
    def table(self) -> Float[Tensor, "S V"]:
        """Logits of the policy, the variable of every gradient."""
        return self.problem.policy.clone().requires_grad_()

    @property
    def log_pi(self) -> Float[Tensor, "S V"]:
        """Log π, differentiable in the table."""
        return self.table.log_softmax(-1)

    @cached_property
    def log_rho(self) -> Float[Tensor, "S V"]:
        """Log ρ."""
        return self.problem.reference.log_softmax(-1)

    @cached_property
    def log_mu(self) -> Float[Tensor, "S V"]:
        """Log-probabilities of what draws the responses."""
        source = self.problem.behaviour if self.off_policy else self.problem.policy
        return source.log_softmax(-1)

    def along(self, table: Float[Tensor, "S V"]) -> Float[Tensor, "R T"]:
        """Look a table up at each token of each response."""
        return table[self.problem.states, self.problem.tokens]

    def responses(self, log_table: Float[Tensor, "S V"]) -> Float[Tensor, " R"]:
        """Probability of each response."""
        return self.along(log_table).sum(-1).exp()

    def visits(self, log_table: Float[Tensor, "S V"]) -> Float[Tensor, " S"]:
        """Probability that a response passes through each state."""
        reached = self.responses(log_table)[:, None].expand(self.problem.states.shape).flatten()
        return reached.new_zeros(len(log_table)).index_add(0, self.problem.states.flatten(), reached)

    def gradient(self, value: Tensor) -> Float[Tensor, "S V"]:
        """Differentiate a scalar with respect to the policy's table."""
        if not value.requires_grad:
            return torch.zeros_like(self.table)
        (gradient,) = torch.autograd.grad(value, self.table)
        return gradient

    def estimate(self, measure: str, direction: str, log_pi: Tensor) -> Float[Tensor, "S V"]:
        """Return what a measure says in each state after each token: its definition, differentiable."""
        log_ratio = log_pi - self.log_rho
        if measure == "exact":
            kl = (
                (log_pi.exp() * log_ratio).sum(-1)
                if direction == "reverse"
                else (self.log_rho.exp() * -log_ratio).sum(-1)
            )
            return kl[:, None].expand(log_pi.shape)
        if measure == "k1":
            return log_ratio
        return 0.5 * log_ratio**2 if measure == "k2" else (-log_ratio).exp() - 1 + log_ratio

    def per_state(self, measure: str, direction: str = "reverse") -> Float[Tensor, " S"]:
        """Return E_π[measure] in each state, differentiable."""
        log_pi = self.log_pi
        return (log_pi.exp() * self.estimate(measure, direction, log_pi)).sum(-1)

    def drift(self, measure: str, direction: str) -> Float[Tensor, " S"]:
        """Return a potential whose gradient in each state is E_π[∇measure], as theory has it.

        k1: 0.   k2: KL(π‖ρ).   k3: KL(ρ‖π).   exact: itself.
        """
        if measure == "exact":
            return self.per_state("exact", direction)
        if measure == "k1":
            return torch.zeros_like(self.table[:, 0])
        return self.per_state("exact", "reverse" if measure == "k2" else "forward")

    def policy_gradient(self, rewards: Float[Tensor, " R"]) -> Float[Tensor, "S V"]:
        """∇E_π[r]."""
        return self.gradient((self.responses(self.log_pi) * rewards).sum())

    def values(self, rewards: Float[Tensor, " R"]) -> Float[Tensor, " S"]:
        """E_π[r] of the responses that pass through each state."""
        states = self.problem.states
        likely = self.responses(self.log_pi).detach()
        gained = (likely * rewards)[:, None].expand(states.shape).flatten()
        sums = gained.new_zeros(len(self.problem.policy)).index_add(0, states.flatten(), gained)
        return sums / self.visits(self.log_pi).detach()

    def over_states(self, per_state: Float[Tensor, " S"]) -> Tensor:
        """Σ_s m(s)·value(s), m being how often each state is visited: a constant."""
        return (self.visits(self.log_mu).detach() * per_state).sum()

    def whole(self, measure: str, direction: str) -> Tensor:
        """E_π[Σ_t measure_t], differentiable also in how often each state is visited."""
        log_pi = self.log_pi
        return (self.visits(log_pi) * self.per_state(measure, direction)).sum()

    def sequence_kl(self, direction: str) -> Tensor:
        """KL between the distributions of whole responses, by its definition."""
        pi, rho = self.along(self.log_pi).sum(-1), self.along(self.log_rho).sum(-1)
        return (pi.exp() * (pi - rho)).sum() if direction == "reverse" else (rho.exp() * (rho - pi)).sum()

    def scored(self, coefficient: Float[Tensor, "R T"], *, ratio: bool) -> Tensor:
        """E_μ[Σ_t log π_t·x_t], or E_μ[Σ_t π_t/μ_t·x_t]: a sum whose gradient is a score-function one."""
        log_pi, log_mu = self.along(self.log_pi), self.along(self.log_mu)
        score = (log_pi - log_mu).exp() if ratio else log_pi
        return (self.responses(self.log_mu)[:, None] * score * coefficient.detach()).sum()

    def to_go(self, per_token: Float[Tensor, "R T"], *, inclusive: bool) -> Float[Tensor, "R T"]:
        """Σ_{u≥t} or Σ_{u>t} of a value along each response."""
        columns = range(self.problem.length)
        return torch.stack([per_token[:, t + (not inclusive) :].sum(-1) for t in columns], dim=-1)

    def mean_by_position(self, per_token: Float[Tensor, "R T"]) -> Float[Tensor, "R T"]:
        """E_μ of a per-token value at each position, for every response alike."""
        mean = (self.responses(self.log_mu)[:, None] * per_token).sum(0, keepdim=True)
        return mean.expand(per_token.shape)
