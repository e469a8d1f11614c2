"""The loop that every method runs in: step, evaluate, record, save; resume where it was."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kedge.errors import RunError, UserError
from kedge.runs import RunDirectory
from kedge.runs.interrupt import Interrupt
from kedge.training.checkpoint import Checkpoints, Moment, link_final_model, restore_weights
from kedge.training.config import PolicyStage, Stage
from kedge.training.optimization import Updater
from kedge.training.progress import Progress

Metrics = dict[str, float]


_MEMORY = (
    "out of memory in step {step}: {error}. Lower compute.micro_batch{others}, or set "
    "compute.activation_checkpointing: true, and go on with resume=true"
)
_OF_ROLLOUTS = ", rollout.prompts_at_once or rollout.max_new_tokens"


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found: metrics, samples worth keeping, and one score by which the best model is chosen."""

    metrics: Metrics
    score: float
    samples: list[dict[str, Any]] = field(default_factory=list)


@runtime_checkable
class Work(Protocol):
    """What a method does; the loop does the rest."""

    def step(self, step: int) -> Metrics:
        """Do step number ``step`` (from 0)."""

    def evaluate(self, step: int) -> Evaluation | None:
        """Evaluate the model after ``step`` steps; None when the recipe asks for no evaluation."""

    def evaluation_due(self, step: int) -> bool:
        """Whether to evaluate after ``step`` steps."""

    def moment(self, step: int) -> Moment:
        """Where inside the step the work stands."""

    def state(self) -> dict[str, Any]:
        """Everything needed to go on to the same numbers, beside model and optimizer."""

    def restore(self, state: dict[str, Any]) -> None:
        """Take up ``state``, whose tensors are on the session's device."""


@dataclass
class Session:
    """What the loop and the work share in one stage."""

    stage: Stage
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    seed: int
    run: RunDirectory
    progress: Progress
    interrupt: Interrupt
    identity: Mapping[str, str] = field(default_factory=dict)
    """Hashes that must be the same on resume, by what they are of."""
    updater: Updater = field(init=False)
    other_updaters: list[Updater] = field(default_factory=list)
    """Of what the work trains beside the policy; saved by the work, watched by the loop."""
    at_the_end: list[Callable[[], None]] = field(default_factory=list)
    """What the work leaves in the stage's folder beside the model."""
    checkpoints: Checkpoints = field(init=False)
    step: int = 0
    best: float = -math.inf
    best_step: int | None = None
    unrecorded: Metrics | None = None
    """Of a step whose updates are done and whose evaluation is not."""

    @property
    def updaters(self) -> list[Updater]:
        """The policy's, then the others."""
        return [self.updater, *self.other_updaters]

    def __post_init__(self) -> None:
        self.updater = Updater(self.model, self.stage.optimizer, self.stage.steps)
        self.checkpoints = Checkpoints(self.run.path / "checkpoints", self.stage.checkpoint.keep)

    def save(self, work: Work) -> None:
        """Write a checkpoint of this moment."""
        state = {
            "step": self.step,
            "best": self.best,
            "best_step": self.best_step,
            "unrecorded": self.unrecorded,
            "identity": dict(self.identity),
            "optimizer": self.updater.state_dict(),
            "work": work.state(),
        }
        updated = Moment(self.step - 1, self.stage.updates_per_step)
        moment = work.moment(self.step) if self.unrecorded is None else updated
        self.checkpoints.save(moment, self.model, self.tokenizer, state)

    @property
    def settled(self) -> bool:
        """Whether no update is half done, which could not be gone on from."""
        return not any(updater.unsettled for updater in self.updaters)

    def settle(self) -> None:
        """Take note that the updates done so far are whole, and counted by the work."""
        for updater in self.updaters:
            updater.unsettled = False

    def mark_best(self) -> None:
        """Let the link ``best`` follow the best step whose checkpoint exists."""
        if self.best_step is not None and Moment(self.best_step) in self.checkpoints.moments():
            self.checkpoints.mark_best(Moment(self.best_step))

    def restore(self, work: Work) -> bool:
        """Take up the last checkpoint; False if there is none."""
        moments = self.checkpoints.moments()
        if not moments:
            self.run.truncate_after(-1)
            return False
        last = moments[-1]
        state = self.checkpoints.load(last)
        for what, value in self.identity.items():
            if state["identity"].get(what) != value:
                raise UserError(
                    f"{self.run.path}: the {what} is not the one this run began with (its hash is {value[:12]}, was "
                    f"{str(state['identity'].get(what))[:12]}); a run keeps its anchor: give back the old {what}, or "
                    "start a new run under another name"
                )
        restore_weights(self.model, self.checkpoints.path(last) / "model")
        self.updater.load_state_dict(state["optimizer"])
        self.step = state["step"]
        self.best = state["best"]
        self.best_step = state["best_step"]
        self.unrecorded = state.get("unrecorded")
        self.mark_best()
        work.restore(tree_map_only(Tensor, lambda saved: saved.to(self.device), state["work"]))
        self.run.truncate_after(last.step, max(last.update, 0))
        self.run.log(f"resumed from {last.name}")
        return True


def run_loop(session: Session, work: Work) -> None:
    """Run a stage to its end, from its start or from its last checkpoint."""
    begun = session.restore(work)
    try:
        if not begun:
            metrics, _ = _evaluate(session, work)
            _record(session, metrics)
            begun = True
        while session.step < session.stage.steps or session.unrecorded is not None:
            session.interrupt.check()
            if session.unrecorded is None:
                session.unrecorded = _step(session, work)
            _conclude(session, work, session.unrecorded)
    except Exception as error:
        if begun and session.settled:
            session.save(work)
        if out_of_memory(error):
            others = _OF_ROLLOUTS if isinstance(session.stage, PolicyStage) else ""
            raise RunError(_MEMORY.format(step=session.step + 1, error=error, others=others)) from error
        raise
    for leave in session.at_the_end:
        leave()
    link_final_model(session.run.path, session.checkpoints.moments()[-1])


def out_of_memory(error: Exception) -> bool:
    """Whether a device or, as PyTorch says it, the processor has no memory left.

    >>> out_of_memory(torch.OutOfMemoryError("CUDA out of memory")), out_of_memory(RuntimeError("shapes differ"))
    (True, False)
    """
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def _step(session: Session, work: Work) -> Metrics:
    started = time.perf_counter()
    metrics = work.step(session.step)
    session.step += 1
    session.settle()
    metrics["skipped_updates"] = float(sum(updater.skipped for updater in session.updaters))
    metrics["memory_peak_bytes"] = float(_peak_memory(session.device))
    metrics["seconds/total"] = time.perf_counter() - started
    return metrics


def _conclude(session: Session, work: Work, metrics: Metrics) -> None:
    """Evaluate and save where that is due, and record the step; what fails in here is done again on resume."""
    last = session.step == session.stage.steps
    improved = False
    if last or work.evaluation_due(session.step):
        found, improved = _evaluate(session, work)
        metrics = metrics | found
    _record(session, metrics)
    session.unrecorded = None
    if last or improved or session.step % session.stage.checkpoint.every == 0:
        session.save(work)
    session.mark_best()
    for updater in session.updaters:
        updater.check(session.step)


def _evaluate(session: Session, work: Work) -> tuple[Metrics, bool]:
    """Evaluate, keep the samples, and tell whether the model is the best so far."""
    started = time.perf_counter()
    found = work.evaluate(session.step)
    if found is None:
        return {}, False
    session.run.samples([{"step": session.step, "kind": "evaluation", **row} for row in found.samples])
    again = session.step == session.best_step  # what failed then is done once more
    improved = session.step > 0 and (found.score > session.best or again)
    if improved:
        session.best, session.best_step = found.score, session.step
    metrics = {f"eval/{name}": value for name, value in found.metrics.items()}
    return {**metrics, "seconds/evaluation": time.perf_counter() - started}, improved


def _record(session: Session, metrics: Metrics) -> None:
    if metrics:
        session.run.metrics({"step": session.step, **metrics})
    session.progress.step(session.step, session.stage.steps, metrics)


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the device where it is CUDA, else of the process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
