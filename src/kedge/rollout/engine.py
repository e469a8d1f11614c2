"""The rollout: what an engine that draws responses hands to the trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kedge.errors import UserError


@dataclass(frozen=True)
class SamplingConfig:
    """How responses are drawn.

    Attributes:
        responses_per_prompt: G.
        max_new_tokens: length limit of a response, its end token included.
        temperature: the policy sampled from is softmax(logits / temperature); 0 takes the most probable
            token, and log-probabilities are then those at temperature 1.
        stop: a response ends as soon as its text contains one of these strings; the tokens that complete the
            string stay in the response.
        min_new_tokens: end tokens cannot be drawn before this many others.

    >>> SamplingConfig(responses_per_prompt=8, max_new_tokens=64).temperature
    1.0
    """

    responses_per_prompt: int
    max_new_tokens: int
    temperature: float = 1.0
    stop: tuple[str, ...] = ()
    min_new_tokens: int = 0

    def __post_init__(self) -> None:
        if self.responses_per_prompt < 1 or self.max_new_tokens < 1:
            raise UserError(
                f"responses_per_prompt = {self.responses_per_prompt} and max_new_tokens = "
                f"{self.max_new_tokens} must be at least 1"
            )
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature = {self.temperature} must be 0 (greedy) or a positive number")
        if not 0 <= self.min_new_tokens < self.max_new_tokens:
            raise UserError(
                f"min_new_tokens = {self.min_new_tokens} must be at least 0 and below "
                f"max_new_tokens = {self.max_new_tokens}"
            )
        if "" in self.stop:
            raise UserError("stop holds an empty string, which every text contains: remove it")


@dataclass(frozen=True)
class Rollout:
    """Prompts and their responses, packed: one sequence after another, no padding.

    Token ids are those the engine read and drew; nothing is ever decoded and tokenised again.

    Attributes:
        prompt_tokens: ids of the B prompts.
        prompt_lengths: tokens in each prompt.
        response_tokens: ids of the R responses, end tokens included.
        response_lengths: tokens in each response.
        group: the prompt that a response answers.
        mask: response tokens that are trained on.
        sampler_log_probs: log-probability of each response token under the distribution it was drawn from, in
            nats.
        finished: the response ended by itself (end token or stop string), not by the length limit.
    """

    prompt_tokens: Int[Tensor, " P"]
    prompt_lengths: Int[Tensor, " B"]
    response_tokens: Int[Tensor, " N"]
    response_lengths: Int[Tensor, " R"]
    group: Int[Tensor, " R"]
    mask: Bool[Tensor, " N"]
    sampler_log_probs: Float[Tensor, " N"]
    finished: Bool[Tensor, " R"]

    def sequences(self) -> tuple[Int[Tensor, " S"], Int[Tensor, " R"]]:
        """Put each response behind its prompt: S packed tokens, and the length of each of the R sequences.

        >>> tokens, lengths = _example().sequences()
        >>> tokens.tolist(), lengths.tolist()
        ([5, 6, 1, 5, 6, 2, 3], [3, 4])
        """
        before = self.prompt_lengths[self.group]
        lengths = before + self.response_lengths
        tokens = self.response_tokens.new_empty(int(lengths.sum()))
        offsets = self.prompt_lengths.cumsum(0) - self.prompt_lengths
        starts = lengths.cumsum(0) - lengths
        tokens[_ranges(starts, before)] = self.prompt_tokens[_ranges(offsets[self.group], before)]
        tokens[_ranges(starts + before, self.response_lengths)] = self.response_tokens
        return tokens, lengths

    def predicting(self) -> Int[Tensor, " N"]:
        """Locate in ``sequences()`` the hidden state that predicts each response token: the one before it.

        >>> _example().predicting().tolist()
        [1, 4, 5]
        """
        before = self.prompt_lengths[self.group]
        lengths = before + self.response_lengths
        starts = lengths.cumsum(0) - lengths
        return _ranges(starts + before - 1, self.response_lengths)

    def select(self, responses: Int[Tensor, " r"]) -> Rollout:
        """Take the named responses, in that order, with the prompts that they need.

        Prompts keep their order and are numbered anew: prompt i of the result was prompt
        ``torch.unique(rollout.group[responses])[i]``.

        >>> _example().select(torch.tensor([1])).response_tokens.tolist()
        [2, 3]
        """
        prompts, group = torch.unique(self.group[responses], return_inverse=True)
        prompt_lengths, response_lengths = self.prompt_lengths[prompts], self.response_lengths[responses]
        offsets = self.prompt_lengths.cumsum(0) - self.prompt_lengths
        chosen = self.rows(responses)
        return Rollout(
            prompt_tokens=self.prompt_tokens[_ranges(offsets[prompts], prompt_lengths)],
            prompt_lengths=prompt_lengths,
            response_tokens=self.response_tokens[chosen],
            response_lengths=response_lengths,
            group=group,
            mask=self.mask[chosen],
            sampler_log_probs=self.sampler_log_probs[chosen],
            finished=self.finished[responses],
        )

    def rows(self, responses: Int[Tensor, " r"]) -> Int[Tensor, " n"]:
        """Locate the tokens of the named responses, in that order, among all response tokens.

        >>> _example().rows(torch.tensor([1, 0])).tolist()
        [1, 2, 0]
        """
        starts = self.response_lengths.cumsum(0) - self.response_lengths
        return _ranges(starts[responses], self.response_lengths[responses])

    def to(self, device: torch.device | str) -> Rollout:
        """Return the same rollout on another device."""
        return replace(self, **{name: value.to(device) for name, value in self.state().items()})

    def responses(self) -> list[list[int]]:
        """List the token ids of each response as a list.

        >>> _example().responses()
        [[1], [2, 3]]
        """
        parts = torch.split(self.response_tokens.cpu(), self.response_lengths.tolist())
        return [part.tolist() for part in parts]

    def state(self) -> dict[str, Tensor]:
        """Return everything as a flat dictionary of tensors, for a checkpoint."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Rollout:
        """Rebuild a rollout from :meth:`state`."""
        return cls(**{field.name: state[field.name] for field in fields(cls)})


def concatenate(rollouts: Sequence[Rollout]) -> Rollout:
    """Join several rollouts into one; prompts are numbered on from one to the next.

    >>> concatenate([_example(), _example()]).group.tolist()
    [0, 0, 1, 1]
    """
    if not rollouts:
        raise ValueError("there is no rollout to concatenate")
    states = [rollout.state() for rollout in rollouts]
    joined = {name: torch.cat([state[name] for state in states]) for name in states[0]}
    prompts = [len(rollout.prompt_lengths) for rollout in rollouts]
    shifts = [sum(prompts[:index]) for index in range(len(rollouts))]
    groups = [rollout.group + shift for rollout, shift in zip(rollouts, shifts, strict=True)]
    return Rollout.from_state({**joined, "group": torch.cat(groups)})


def _ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """start, start + 1, … (length numbers) for each pair, one after another."""
    ends = lengths.cumsum(0)
    shift = torch.repeat_interleave(starts - (ends - lengths), lengths)
    return torch.arange(len(shift), device=starts.device) + shift


def _example() -> Rollout:
    """One prompt of two tokens with two responses, for the examples above."""
    return Rollout(
        prompt_tokens=torch.tensor([5, 6]),
        prompt_lengths=torch.tensor([2]),
        response_tokens=torch.tensor([1, 2, 3]),
        response_lengths=torch.tensor([1, 2]),
        group=torch.tensor([0, 0]),
        mask=torch.ones(3, dtype=torch.bool),
        sampler_log_probs=torch.zeros(3),
        finished=torch.tensor([True, False]),
    )
