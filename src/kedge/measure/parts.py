"""Parts of a question: as many sequences as go through a model at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from kedge.head import Head, score
from kedge.measure.inputs import Window
from kedge.measure.table import TokenTable
from kedge.models import context_length, evaluating, hidden_states
from kedge.rollout import Rollout

WANT = frozenset(
    {"log_prob", "entropy", "top_token", "reference.log_prob", "reference.entropy", "reference.top_token"}
    | {"reference.reverse_kl", "reference.forward_kl"}
)
"""Outputs of the head that a table holds."""
LONGER = 8
"""Tokens put behind a single sequence, which it does not see, to have it in another shape."""


@dataclass(frozen=True)
class Part:
    """Sequences that are scored at once.

    Attributes:
        rollout: contexts and scored tokens; of texts, windows take the place of responses.
        clusters: the prompt or text of each response.
        first: the number of its first response, counted over the question.
    """

    rollout: Rollout
    clusters: Int[Tensor, " R"]
    first: int

    @classmethod
    def of_texts(cls, windows: Sequence[Window], first: int) -> Part:
        """Put windows of texts where prompts and responses would be."""
        scored = torch.tensor([token for window in windows for token in window.scored])
        rollout = Rollout(
            prompt_tokens=torch.tensor([token for window in windows for token in window.context]),
            prompt_lengths=torch.tensor([len(window.context) for window in windows]),
            response_tokens=scored,
            response_lengths=torch.tensor([len(window.scored) for window in windows]),
            group=torch.arange(len(windows)),
            mask=torch.ones_like(scored, dtype=torch.bool),
            sampler_log_probs=torch.zeros(len(scored)),
            finished=torch.zeros(len(windows), dtype=torch.bool),
        )
        return cls(rollout, torch.tensor([window.cluster for window in windows]), first)

    def start(self, tokens: int, sequences: int) -> Part:
        """Take its first responses, as many as have at most so many tokens together; one at least."""
        ends = self.rollout.response_lengths.cumsum(0)
        count = max(1, min(sequences, int((ends <= tokens).sum())))
        chosen = torch.arange(count, device=ends.device)
        return replace(self, rollout=self.rollout.select(chosen), clusters=self.clusters[:count])

    @torch.no_grad()
    def hidden(self, model: PreTrainedModel) -> Float[Tensor, "N H"]:
        """Hidden states that predict the scored tokens, all sequences at once."""
        rollout = self.rollout.to(model.device)
        tokens, lengths = rollout.sequences()
        with evaluating(model):
            return hidden_states(model, tokens, lengths)[rollout.predicting()]

    @torch.no_grad()
    def hidden_in_other_shapes(self, model: PreTrainedModel) -> Float[Tensor, "N H"]:
        """The same with other rounding: a sequence at a time; a single one longer, beside a copy."""
        rollout = self.rollout.to(model.device)
        count = len(rollout.group)
        if count > 1:
            single = [rollout.select(torch.tensor([i], device=model.device)) for i in range(count)]
            return torch.cat([replace(self, rollout=each).hidden(model) for each in single])
        tokens, _ = rollout.sequences()
        context = context_length(model)
        longer = LONGER if context is None else min(LONGER, context - len(tokens))
        tokens = torch.cat([tokens, tokens[:1].expand(longer)]).repeat(2)
        lengths = torch.full((2,), len(tokens) // 2, device=model.device)
        with evaluating(model):
            return hidden_states(model, tokens, lengths)[rollout.predicting()]

    @torch.no_grad()
    def apart(
        self, one: Float[Tensor, "N H"], other: Float[Tensor, "N H"], head: Head, temperature: float
    ) -> Float[Tensor, " N"]:
        """KL of a model to itself, between hidden states that two passes gave; in float64."""
        name = "reference.reverse_kl"
        found = score(
            one,
            head,
            self.rollout.response_tokens.to(one.device),
            anchors={"reference": (other, head)},
            want={name},
            temperature=temperature,
        )
        return found[name].double().cpu()

    @torch.no_grad()
    def scored(
        self,
        policy: tuple[Float[Tensor, "N H"], Head],
        reference: tuple[Float[Tensor, "N K"], Head],
        *,
        temperature: float,
        backend: str,
    ) -> TokenTable:
        """Compare the two distributions of every scored token, over the whole vocabulary."""
        hidden, head = policy
        found = score(
            hidden,
            head,
            self.rollout.response_tokens.to(hidden.device),
            anchors={"reference": reference},
            want=WANT,
            temperature=temperature,
            backend=backend,
        )
        found = {name: values.cpu() for name, values in found.items()}
        lengths = self.rollout.response_lengths.cpu()
        starts = lengths.cumsum(0) - lengths
        row = torch.repeat_interleave(lengths)
        return TokenTable(
            cluster=self.clusters.cpu()[row],
            response=self.first + row,
            position=torch.arange(len(row)) - starts[row],
            token=self.rollout.response_tokens.cpu(),
            policy_log_prob=found["log_prob"],
            reference_log_prob=found["reference.log_prob"],
            reverse_kl=found["reference.reverse_kl"],
            forward_kl=found["reference.forward_kl"],
            policy_entropy=found["entropy"],
            reference_entropy=found["reference.entropy"],
            policy_top=found["top_token"],
            reference_top=found["reference.top_token"],
        )
