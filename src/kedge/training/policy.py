"""Policy optimisation: roll out, score the anchors, rewards, advantages, epochs of micro-batches, β, record."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kedge.divergence import k3
from kedge.errors import UserError
from kedge.head import Head, reduce
from kedge.objective import Controller, PolicyLoss, TokenInputs, aggregation_weights, masked_mean
from kedge.runs.seeds import generator
from kedge.training.checkpoint import Moment
from kedge.training.checks import start_of_run
from kedge.training.collect import Collector, describe
from kedge.training.config import GrpoStage, PpoStage
from kedge.training.critic import CriticWork
from kedge.training.evaluation import PolicyEvaluator
from kedge.training.experience import Experience
from kedge.training.gather import Gatherer
from kedge.training.loop import Evaluation, Metrics, Session
from kedge.training.measures import MEASURED, policy_metrics
from kedge.training.scoring import Scorer, parts

VALUE_LOSS = "critic.loss"
"""What a critic on the policy's backbone adds to the scores of an update."""


_NOTHING = (
    "there is nothing to learn from: every response was cut by rollout.max_new_tokens and is masked "
    "(rollout.truncated), or has no reward"
)


@dataclass
class PolicyWork:
    """The steps of GRPO and PPO and what is carried from one to the next.

    PPO differs in two places: the gatherer asks the critic where GRPO compares a group (`Gatherer._credit`), and
    every update trains the critic too (`_update`, or `accumulate` on a shared backbone).
    """

    session: Session
    stage: GrpoStage | PpoStage
    reference: PreTrainedModel
    scorer: Scorer
    collector: Collector
    controller: Controller
    evaluator: PolicyEvaluator | None
    penalty: Controller | None = None
    """Sets β of KL(old‖policy), where the trust region has such a penalty."""
    critic: CriticWork | None = None
    gatherer: Gatherer = field(init=False)
    experience: Experience | None = None
    metrics: Metrics = field(default_factory=dict)
    updates: list[Metrics] = field(default_factory=list)
    half: Metrics | None = None
    """Of an update whose policy's part is done and whose critic's is to come."""
    old_head: Head | None = None

    def __post_init__(self) -> None:
        self.gatherer = Gatherer(
            self.stage, self.session.model, self.reference, self.scorer, self.collector, self.critic
        )

    def step(self, step: int) -> Metrics:
        """Roll out, update ``epochs × minibatches`` times, let the controller set the next β."""
        if self.experience is None:
            experience, metrics = self.gatherer.gather(step, self.loss())
            if step == 0:
                metrics |= start_of_run(self.session, self.reference, self.scorer, experience.rollout)
            if not bool(experience.learnt.any()):
                self.session.progress.say(f"warning: step {step + 1}: {_NOTHING}")
            self.experience, self.metrics = experience, metrics
        if self.stage.measures_old and self.old_head is None:
            self.old_head = self.scorer.head(self.session.model).snapshot()
        started = time.perf_counter()
        while len(self.updates) < self.stage.updates_per_step:
            self.session.interrupt.check()
            if not self._update(step, self.experience):
                break
        self._adapt_penalty(self.experience)
        return self._finish(self.experience, time.perf_counter() - started)

    def loss(self) -> PolicyLoss:
        """The objective at the present β."""
        return PolicyLoss(
            trust_region=self.stage.trust_region.build(),
            anchor=self.stage.anchor.build(),
            beta=self.controller.beta,
            entropy_coefficient=self.stage.entropy_bonus,
            penalty=self.penalty.beta if self.penalty is not None else 0.0,
            mask=mask.build() if (mask := self.stage.trust_region.mask) is not None else None,
        )

    def _update(self, step: int, experience: Experience) -> bool:
        """Do the next update; False if KL(old‖policy) has passed its limit."""
        batch = experience.select(self._minibatch(step, experience.rollout.group))
        if self.half is None:
            self.half = self._update_policy(step, batch)
            if self.half is None:
                return False
            self.collector.release()  # from here on the responses are those of the policy before
            self.session.settle()
        learnt = self.critic.update(step, batch) if self.critic is not None else {}
        if any(updater.skipped_in_a_row for updater in self.session.updaters):
            collector = self.collector
            rows = describe(
                batch.rollout, batch.rows.tolist(), batch.rewards, collector.prompts, collector.tokenizer
            )
            which = {"step": step + 1, "kind": "skipped", "update": len(self.updates) + 1}
            self.session.run.samples([{**which, **row} for row in rows])
        self.updates.append({**self.half, **learnt})
        self.half = None
        self.session.settle()
        return True

    def _update_policy(self, step: int, batch: Experience) -> Metrics | None:
        """Do the policy's part of an update; None if KL(old‖policy) has passed its limit."""
        found: Metrics = {}

        def accumulate() -> float | None:
            loss, scores, inputs = self.accumulate(batch)
            found.update(self._measure(batch, scores, inputs))
            limit = self.stage.old_kl_limit
            return None if limit is not None and found["kl/old_policy/exact"] > limit else loss

        applied = self.session.updater.update(step, accumulate)
        if applied is None:
            self.metrics["kl/old_policy/exact"] = found["kl/old_policy/exact"]
            return None
        return {**found, **applied}

    def _minibatch(self, step: int, group: Tensor) -> Tensor:
        """Give the responses of the next update, the same whenever asked; each epoch has an order of its own."""
        epoch, index = divmod(len(self.updates), self.stage.minibatches)
        if self.stage.minibatches == 1:
            return torch.arange(len(group), device=group.device)
        draw = generator(self.session.seed, "minibatches", step, epoch)
        order = torch.randperm(self.stage.units_per_step, generator=draw)
        chosen = order.chunk(self.stage.minibatches)[index].to(group.device)
        unit = group if self.stage.whole_groups else torch.arange(len(group), device=group.device)
        return torch.nonzero(torch.isin(unit, chosen)).flatten()

    def accumulate(self, batch: Experience) -> tuple[float, dict[str, Tensor], TokenInputs]:
        """Add up the gradients of one update over its micro-batches; give its loss and scores."""
        loss = self.loss()
        inputs = self._inputs(batch, loss)
        want = loss.want() | self._measured()
        head = self.scorer.head(self.session.model)
        total, found = 0.0, []
        for rows, part in parts(batch.rollout, self.stage.compute.micro_batch):
            here = inputs.rows(rows)

            def per_token(scores: dict[str, Tensor], rows: slice, here: TokenInputs = here) -> Tensor:
                return loss(scores, here.rows(rows))

            hidden = self.scorer.hidden(self.session.model, part)
            value, scores = reduce(
                hidden,
                head,
                part.response_tokens,
                per_token,
                anchors=self._anchors(batch, rows),
                want=want,
                **self.scorer.options,
            )
            if self.critic is not None and self.critic.shared:
                losses = self.critic.losses(hidden, batch, rows)
                value = value + self.critic.coefficient * losses.sum()
                scores = {**scores, VALUE_LOSS: losses.detach()}
            torch.autograd.backward(value)
            total += float(value.detach())
            found.append(scores)
        return total, {name: torch.cat([scores[name] for scores in found]) for name in found[0]}, inputs

    def _measured(self) -> frozenset[str]:
        """Head outputs that are measured whatever the loss is."""
        moved = frozenset({"old.forward_kl"}) if self.stage.measures_old else frozenset[str]()
        return moved if self.gatherer.needs_old_pass(self.loss()) else MEASURED

    def _anchors(self, batch: Experience, rows: slice) -> dict[str, tuple[Tensor, Head]]:
        anchors = {"reference": (batch.reference_hidden[rows], self.scorer.head(self.reference))}
        if batch.old_hidden is not None and self.old_head is not None:
            anchors["old"] = (batch.old_hidden[rows], self.old_head)
        return anchors

    def _inputs(self, batch: Experience, loss: PolicyLoss) -> TokenInputs:
        """What the objective needs to know of each token before the head is run."""
        rollout = batch.rollout
        lengths, mask = rollout.response_lengths, rollout.mask
        mode, constant = self.stage.aggregation.mode, self.stage.constant_length
        weights = partial(aggregation_weights, dtype=batch.advantages.dtype)
        per_token = self.stage.anchor.unit == "nats/token"
        inputs = TokenInputs(
            advantages=batch.advantages,
            weights=weights(lengths, batch.learnt, mode, constant_length=constant),
            anchor_weights=weights(lengths, mask, "token_mean")
            if per_token
            else weights(lengths, mask, "constant", constant_length=constant or 1),
            behaviour_log_probs=batch.old_log_probs,
            correction=batch.correction,
        )
        return loss.prepare(inputs, lengths, rollout.group, self._statistics(batch, loss))

    def _statistics(self, batch: Experience, loss: PolicyLoss) -> Mapping[str, Tensor]:
        """What a token's loss needs to know of its response; of the old policy, its own pass has found it."""
        if not loss.statistics():
            return {}
        if not self.updates and batch.statistics is not None:
            return batch.statistics
        hidden = self.scorer.hidden_in_parts(self.session.model, batch.rollout)
        head = self.scorer.head(self.session.model)
        anchors = self._anchors(batch, slice(None))
        return self.scorer.scores(hidden, head, batch.rollout, anchors, loss.statistics())

    def _measure(self, batch: Experience, scores: Mapping[str, Tensor], inputs: TokenInputs) -> Metrics:
        """Figures of one update, from the policy as it was before it."""
        rollout = batch.rollout
        used = max(1, int((inputs.weights != 0).sum()))
        metrics = {name: float(value) / used for name, value in self.loss().metrics(scores, inputs).items()}
        if scores.keys() >= MEASURED:
            metrics |= policy_metrics(scores, rollout)
        if VALUE_LOSS in scores:
            metrics["critic/loss"] = float(scores[VALUE_LOSS].sum())
        if "old.forward_kl" in scores:
            metrics["kl/old_policy/exact"] = float(masked_mean(scores["old.forward_kl"], batch.learnt))
        if batch.old_log_probs is not None:
            moved = k3(batch.old_log_probs, scores["log_prob"])
            metrics["kl/old_policy/k3"] = float(masked_mean(moved, batch.learnt))
        if not self.updates:
            mismatch = k3(rollout.sampler_log_probs, scores["log_prob"])
            metrics["kl/sampler_policy/k3"] = float(masked_mean(mismatch, rollout.mask))
        return metrics

    @torch.no_grad()
    def _adapt_penalty(self, experience: Experience) -> None:
        """Measure how far the step has carried the policy from the old one, and set the next step's β by it.

        Over the tokens learnt from, as the penalty itself: the others it does not hold.
        """
        if self.penalty is None:
            return
        rollout, model = experience.rollout, self.session.model
        hidden = self.scorer.hidden_in_parts(model, rollout)
        old = {"old": self._anchors(experience, slice(None))["old"]}
        scores = self.scorer.scores(hidden, self.scorer.head(model), rollout, old, {"old.forward_kl"})
        learnt = experience.learnt
        kl = float(masked_mean(scores["old.forward_kl"], learnt)) if bool(learnt.any()) else math.nan
        self.metrics |= {"kl/old_policy/exact_after_step": kl, "trust_region/beta": self.penalty.beta}
        config = self.stage.trust_region.penalty
        if config is not None and config.target is not None:
            self.metrics["trust_region/target"] = config.target
        if math.isfinite(kl):  # else nothing was learnt, or the updates have been refused
            self.penalty.update(kl, responses=len(rollout.group))

    def _finish(self, experience: Experience, seconds: float) -> Metrics:
        """Sum the step up, move β, forget the responses."""
        metrics = {
            **self.metrics,
            "seconds/update": seconds,
            "trust_region/updates": float(len(self.updates)),
        }
        for name in dict.fromkeys(name for update in self.updates for name in update):
            values = [update[name] for update in self.updates if name in update]
            latest = name.startswith("kl/old_policy") or name.endswith("learning_rate")
            metrics.setdefault(name, values[-1] if latest else sum(values) / len(values))
        metrics |= {"anchor/beta": self.controller.beta, **self._budget()}
        kl = metrics[self.stage.anchor.measured]
        if math.isfinite(kl):  # else the updates have been refused, and the loop stops the run
            self.controller.update(kl, responses=len(experience.rollout.group))
        tokens = float(experience.rollout.response_lengths.sum())
        spent = seconds + metrics["seconds/score"] + metrics["seconds/rollout"]
        metrics["tokens_per_second"] = tokens / spent
        self.collector.release()
        self.experience, self.old_head, self.updates, self.metrics = None, None, [], {}
        return metrics

    def _budget(self) -> Metrics:
        goal = self.stage.anchor.controller.goal
        if goal is None:
            return {}
        what = "budget" if self.stage.anchor.direction == "reverse" else "forward_budget"
        return {f"anchor/{what}" + ("" if self.controller.unit == "nats/token" else "_per_response"): goal}

    def evaluation_due(self, step: int) -> bool:
        """Every n steps."""
        return self.stage.evaluation is not None and step % self.stage.evaluation.every == 0

    def evaluate(self, step: int) -> Evaluation | None:
        """Held-out prompts."""
        return self.evaluator.evaluate(step) if self.evaluator is not None else None

    def moment(self, step: int) -> Moment:
        """Inside a step once its responses are in hand."""
        in_hand = self.experience is not None or self.collector.in_hand
        return Moment(step, len(self.updates) if in_hand else -1)

    @property
    def _begun(self) -> bool:
        """Whether an update of the step is done, or its policy's part: until then its responses can be scored again."""
        return bool(self.updates) or self.half is not None

    def state(self) -> dict[str, Any]:
        """Controller, data position, and the responses in hand with the updates done on them."""
        experience = self.experience if self._begun else None  # else what the collector holds is enough
        old_head = self.old_head if self._begun else None
        return {
            "collector": self.collector.state(),
            "controller": {"of": self._controls, "state": self.controller.state_dict()},
            "penalty": {"of": self._penalises, "state": self.penalty.state_dict() if self.penalty else {}},
            "critic": self.critic.state() if self.critic is not None else None,
            "experience": experience.state() if experience is not None else None,
            "placement": self.stage.anchor.placement,
            "metrics": self.metrics if experience is not None else {},
            "updates": self.updates,
            "half": self.half,
            "old_head": {"weight": old_head.weight, "bias": old_head.bias} if old_head else None,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up ``state``."""
        self.collector.restore(state["collector"])
        controller, penalty = state["controller"], state["penalty"]
        if controller["of"] == self._controls:  # one of another kind, or of another KL, begins anew
            self.controller.load_state_dict(controller["state"])
        if self.penalty is not None and penalty["of"] == self._penalises:
            self.penalty.load_state_dict(penalty["state"])
        if self.critic is not None:
            self.critic.restore(state["critic"])
        experience = state["experience"]
        self.experience = Experience.from_state(experience) if experience else None
        self.metrics, self.updates, self.half = state["metrics"], state["updates"], state["half"]
        if state["old_head"] is not None:
            self.old_head = replace(self.scorer.head(self.session.model), **state["old_head"])
        if self.experience is not None:
            self._require_enough(self.experience, state["placement"])

    @property
    def _controls(self) -> list[str]:
        return [type(self.controller).__name__, self.stage.anchor.measured]

    @property
    def _penalises(self) -> str:
        return type(self.penalty).__name__

    def _require_enough(self, experience: Experience, placement: str) -> None:
        """Refuse settings that ask for what a step that is half done was not scored for.

        Raises:
            UserError: naming step and settings.
        """
        stage = self.stage
        old_pass = self.gatherer.needs_old_pass(self.loss())
        lacks = (
            (old_pass and (experience.old_log_probs is None or stage.anchor.measured not in self.metrics))
            or (stage.measures_old and experience.old_hidden is None)
            or (stage.correction.kind != "none" and experience.correction is None)
            or placement != stage.anchor.placement
        )
        if lacks:
            raise UserError(
                f"stage {stage.name!r}: the run was stopped within step {self.session.step + 1}, whose responses were "
                "scored for other settings than these (epochs, minibatches, old_kl_limit, trust_region, correction, "
                "anchor.placement, anchor.direction); go on with the former ones, and change them where a stop finds "
                "the run between two steps or before a step's first update"
            )
