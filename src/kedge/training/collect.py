"""Rolling out: prompts in, rewarded responses out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kedge.data import Order
from kedge.rewards import RewardSet
from kedge.rollout import Rollout, SamplingConfig, concatenate, generate
from kedge.runs.seeds import generator
from kedge.training.config import RolloutConfig
from kedge.training.prompts import Prompts
from kedge.training.scoring import arithmetic


@dataclass(frozen=True)
class Batch:
    """Responses, the rows of data that their prompts are (by ``rollout.group``), and their rewards."""

    rollout: Rollout
    rows: list[int]
    rewards: dict[str, Float[Tensor, " R"]] = field(default_factory=dict)

    def state(self) -> dict[str, Any]:
        """Give it as a tree of tensors and numbers."""
        return {"rollout": self.rollout.state(), "rows": self.rows, "rewards": self.rewards}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Batch:
        """Restore ``state``."""
        return cls(Rollout.from_state(state["rollout"]), state["rows"], state["rewards"])

    @property
    def response_rows(self) -> list[int]:
        """The row of data that each response answers."""
        return [self.rows[group] for group in self.rollout.group.tolist()]

    def groups(self, chosen: Sequence[int]) -> Batch:
        """Take the responses of some prompts."""
        responses = torch.cat([torch.nonzero(self.rollout.group == g).flatten() for g in chosen])
        return Batch(
            self.rollout.select(responses),
            [self.rows[g] for g in chosen],
            {name: values[responses] for name, values in self.rewards.items()},
        )

    def by_length(self) -> Batch:
        """Order the responses by the length of their sequences, so that micro-batches hold little padding.

        >>> lengths, ends = torch.tensor([3, 1]), torch.ones(2, dtype=torch.bool)
        >>> tokens, group = torch.arange(4), torch.zeros(2, dtype=torch.long)
        >>> mask, nothing = torch.ones(4, dtype=torch.bool), torch.zeros(4)
        >>> rollout = Rollout(torch.tensor([7]), torch.tensor([1]), tokens, lengths, group, mask, nothing, ends)
        >>> batch = Batch(rollout, [5], {"total": torch.tensor([0.5, 2.0])}).by_length()
        >>> batch.rollout.responses(), batch.rewards["total"].tolist()
        ([[3], [0, 1, 2]], [2.0, 0.5])
        """
        rollout = self.rollout
        order = (rollout.prompt_lengths[rollout.group] + rollout.response_lengths).argsort(stable=True)
        rewards = {name: values[order] for name, values in self.rewards.items()}
        return Batch(rollout.select(order), self.rows, rewards)


def join(batches: Sequence[Batch]) -> Batch:
    """Put batches behind one another."""
    if len(batches) == 1:
        return batches[0]
    return Batch(
        concatenate([batch.rollout for batch in batches]),
        [row for batch in batches for row in batch.rows],
        {name: torch.cat([batch.rewards[name] for batch in batches]) for name in batches[0].rewards},
    )


@dataclass
class Collector:
    """Draws prompts in order, lets the policy answer, has the answers rewarded."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: Prompts
    rewards: RewardSet
    rollout: RolloutConfig
    seed: int
    log: Callable[[str], None]
    """Told of every reward that failed and was dropped."""
    precision: str = "float32"
    order: Order = field(init=False)
    position: int = 0
    kept: list[Batch] = field(default_factory=list)
    """Rewarded groups of the step at hand, until they are released."""
    attempt: int = 0
    unrewarded: Batch | None = None
    """Responses whose rewards are not known yet; if those fail they are saved and rewarded first on resume."""

    def __post_init__(self) -> None:
        self.order = Order(len(self.prompts), self.seed)

    def collect(self, step: int) -> tuple[Batch, dict[str, float]]:
        """Give one step's batch, replacing groups with equal rewards as often as asked, and its metrics."""
        rolling = 0.0
        needed = self.rollout.prompts_per_step
        while (missing := needed - sum(len(batch.rows) for batch in self.kept)) > 0:
            started = time.perf_counter()
            if self.unrewarded is None:
                self.unrewarded = self._roll_out(missing, step)
            rolling += time.perf_counter() - started
            self._keep(reward(self.unrewarded, self.prompts, self.rewards, self.tokenizer, self.log))
            self.unrewarded = None
        metrics = {"seconds/rollout": rolling}
        if self.rollout.resample_equal_groups:
            metrics["rollout/times_resampled"] = float(self.attempt - 1)
        return join(self.kept).by_length(), metrics

    def release(self) -> None:
        """Forget the step's groups, once whoever collected them needs them no more."""
        self.kept, self.attempt = [], 0

    def _keep(self, batch: Batch) -> None:
        """Keep the groups that teach something; all of them once the attempts are used up."""
        self.attempt += 1
        if self.attempt <= self.rollout.resample_equal_groups:
            worth, learn = worth_of(batch, self.rollout), learnt_from(batch, self.rollout)
            teaching = teaching_groups(worth, learn, batch.rollout.group, len(batch.rows))
            chosen = torch.nonzero(teaching).flatten().tolist()
            if not chosen:
                return
            batch = batch.groups(chosen)
        self.kept.append(batch)

    def _roll_out(self, count: int, step: int) -> Batch:
        rows = [self.order[self.position + offset] for offset in range(count)]
        tokens = [self.prompts.tokens[row] for row in rows]
        draw = generator(self.seed, "rollout", step, self.attempt, device=self.model.device)
        with arithmetic(self.model, self.precision):
            rollout = generate(
                self.model,
                self.tokenizer,
                tokens,
                sampling_of(self.rollout),
                draw,
                batch_size=self.rollout.prompts_at_once,
            )
        self.position += count  # only now: a rollout that fails is made again, of the same prompts
        return Batch(rollout, rows)

    @property
    def in_hand(self) -> bool:
        """Whether responses of an unfinished step are held."""
        return self.unrewarded is not None or bool(self.kept)

    def state(self) -> dict[str, Any]:
        """Give the position in the data and the responses in hand."""
        return {
            "position": self.position,
            "attempt": self.attempt,
            "rewards": self.rewards.state_dict(),
            "kept": [batch.state() for batch in self.kept],
            "unrewarded": self.unrewarded.state() if self.unrewarded is not None else None,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up ``state``."""
        self.position, self.attempt = state["position"], state["attempt"]
        self.rewards.load_state_dict(state["rewards"])
        self.kept = [Batch.from_state(item) for item in state["kept"]]
        hand = state["unrewarded"]
        self.unrewarded = Batch.from_state(hand) if hand is not None else None


def reward(
    batch: Batch,
    prompts: Prompts,
    rewards: RewardSet,
    tokenizer: PreTrainedTokenizerBase,
    log: Callable[[str], None],
) -> Batch:
    """Have a batch rewarded, in the precision of its log-probabilities.

    Functions see prompts and completions as text, or as messages where prompts are.
    """
    rows = batch.response_rows
    completions = decode(batch.rollout, tokenizer)
    result = rewards.score(
        [prompts.shown[row] for row in rows],
        [prompts.as_completion(row, text) for row, text in zip(rows, completions, strict=True)],
        {
            **prompts.columns(rows),
            "prompt_ids": [prompts.tokens[row] for row in rows],
            "completion_ids": batch.rollout.responses(),
            "completion_finished": batch.rollout.finished.tolist(),
        },
    )
    for error in result.dropped:
        answered = prompts.shown[rows[error.sample]] if error.sample is not None else None
        log(f"left out as unscorable: {error} (prompt: {answered!r})\n{error.traceback}".rstrip())
    values = {"total": result.total, **result.by_name}
    like = batch.rollout.sampler_log_probs
    return Batch(batch.rollout, batch.rows, {name: like.new_tensor(each) for name, each in values.items()})


def decode(rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Responses as text, without special tokens."""
    return [str(tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in rollout.responses()]


def sampling_of(config: RolloutConfig) -> SamplingConfig:
    """How a stage draws its responses."""
    return SamplingConfig(
        responses_per_prompt=config.responses_per_prompt,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        stop=tuple(config.stop),
    )


def worth_of(batch: Batch, config: RolloutConfig) -> Float[Tensor, " R"]:
    """Reward of each response, less what being cut costs; NaN: unscorable."""
    total = batch.rewards["total"]
    if config.truncation_penalty is None:
        return total
    return total - config.truncation_penalty * (~batch.rollout.finished)


def learnt_from(batch: Batch, config: RolloutConfig) -> Bool[Tensor, " R"]:
    """Responses that take part in the policy loss."""
    scorable = ~batch.rewards["total"].isnan()
    return scorable & batch.rollout.finished if config.truncated == "mask" else scorable


def teaching_groups(
    worth: Float[Tensor, " R"], learn: Bool[Tensor, " R"], group: Tensor, count: int
) -> Bool[Tensor, " B"]:
    """Groups from which a comparison learns: scorable rewards that differ, and a response that is learnt from.

    >>> learn, group = torch.tensor([True, True, True, True, False, False]), torch.tensor([0, 0, 1, 1, 2, 2])
    >>> teaching_groups(torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 1.0]), learn, group, 3).tolist()
    [False, True, False]
    """
    flags = []
    for index in range(count):
        here = group == index
        values = worth[here & ~worth.isnan()]
        flags.append(bool(learn[here].any()) and bool((values != values[0]).any()))
    return torch.tensor(flags)


def describe(
    rollout: Rollout,
    rows: Sequence[int],
    rewards: Mapping[str, Float[Tensor, " R"]],
    prompts: Prompts,
    tokenizer: PreTrainedTokenizerBase,
) -> list[dict[str, Any]]:
    """Responses as rows for samples.jsonl, ``rows`` naming each one's prompt.

    The text of a token alone is for looking at: put together, they are not always the completion's text.
    """
    found = []
    for index, (tokens, text) in enumerate(zip(rollout.responses(), decode(rollout, tokenizer), strict=True)):
        values = {name: _number(value[index]) for name, value in rewards.items()}
        found.append(
            {
                "prompt": prompts.shown[rows[index]],
                "completion": text,
                "tokens": [str(tokenizer.decode([token])) for token in tokens],
                "reward": values.pop("total"),
                "rewards": values,
                "finished": bool(rollout.finished[index]),
            }
        )
    return found


def _number(value: Tensor) -> float | None:
    number = float(value)
    return None if math.isnan(number) else number
