"""The policy's loss: surrogate, anchor, entropy bonus, each with its weights, for `kedge.head.reduce`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kedge.objective.aggregate import masked_sum, pad, spread, valid_positions
from kedge.objective.anchor import Anchor, anchor_term, anchor_to_go, anchor_values, undefined
from kedge.objective.trust_region import TrustRegion, clip_masks, ratio, surrogate


@dataclass(frozen=True)
class TokenInputs:
    """What the loss knows of each response token before the head is run; none of it is differentiated.

    A token of weight 0 is masked: whatever else is said of it never enters.

    Args:
        advantages: Advantage of each token.
        weights: Aggregation weights of surrogate and entropy (`aggregation_weights`).
        anchor_weights: Aggregation weights of the anchor.
        behaviour_log_probs: log μ of the tokens; None on policy.
        correction: Weights for a sampler that differs from the trainer (`correction_weights`).
        sequence_log_ratio: Mean log ratio of the token's response; made by `PolicyLoss.prepare`.
        prefix_weights: Weight of the anchor's own value; made by `PolicyLoss.prepare`.
        anchor_to_go: What multiplies the token's score in the anchor; made by `PolicyLoss.prepare`.
    """

    advantages: Float[Tensor, " N"]
    weights: Float[Tensor, " N"]
    anchor_weights: Float[Tensor, " N"]
    behaviour_log_probs: Float[Tensor, " N"] | None = None
    correction: Float[Tensor, " N"] | None = None
    sequence_log_ratio: Float[Tensor, " N"] | None = None
    prefix_weights: Float[Tensor, " N"] | None = None
    anchor_to_go: Float[Tensor, " N"] | None = None

    def rows(self, rows: slice) -> TokenInputs:
        """Return the inputs of some of the tokens.

        >>> TokenInputs(*torch.ones(3, 5)).rows(slice(1, 3)).weights.tolist()
        [1.0, 1.0]
        """
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return replace(self, **{name: value[rows] for name, value in values if value is not None})


@dataclass(frozen=True)
class PolicyLoss:
    """The loss of a policy update, to be minimised.

    ::

        −Σ weights·(correction·surrogate + entropy_coefficient·entropy)  +  β Σ anchor_weights·anchor

    For each update: ask `statistics`; if it names any outputs of the head, compute them for whole responses
    without gradients; call `prepare`; then give the loss to `kedge.head.reduce` with `want`, on the prepared
    inputs of each chunk's rows.

    Args:
        trust_region: Which surrogate.
        anchor: How the reference holds the policy.
        beta: β ≥ 0, in reward per nat; at 0 the anchor is not computed.
        entropy_coefficient: Of the exact entropy bonus, in reward per nat, ≥ 0.

    Raises:
        ValueError: A negative or non-finite coefficient, or an anchor without a formula.

    >>> loss = PolicyLoss(TrustRegion("none"), Anchor("exact"), beta=0.5)
    >>> sorted(loss.want())
    ['log_prob', 'reference.reverse_kl']
    >>> scores = {"log_prob": torch.tensor([-1.0]), "reference.reverse_kl": torch.tensor([0.5])}
    >>> one = torch.ones(1)
    >>> loss(scores, TokenInputs(advantages=3 * one, weights=one, anchor_weights=one)).item()
    -2.75
    """

    trust_region: TrustRegion
    anchor: Anchor
    beta: float
    entropy_coefficient: float = 0.0

    def __post_init__(self) -> None:
        for name in ("beta", "entropy_coefficient"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be a finite number of at least 0, got {value}")
        if reason := undefined(self.anchor):
            raise ValueError(reason)

    def want(self) -> frozenset[str]:
        """Name the outputs of the head that the loss itself needs."""
        outputs = {"log_prob"}
        if self.entropy_coefficient:
            outputs.add("entropy")
        if self.beta and self.anchor.placement == "loss":
            outputs |= self.anchor.outputs
        return frozenset(outputs)

    def statistics(self) -> frozenset[str]:
        """Name the outputs that `prepare` needs for whole responses of the present policy; often none."""
        outputs: frozenset[str] = frozenset()
        if self.trust_region.kind == "sequence":
            outputs |= {"log_prob"}
        if self._anchor_looks_ahead or self._anchor_in_advantage:
            outputs |= {"log_prob"} | self.anchor.outputs
        return outputs

    @property
    def _anchor_looks_ahead(self) -> bool:
        return bool(self.beta) and self.anchor.placement == "loss" and self.anchor.gradient == "sequence"

    @property
    def _anchor_in_advantage(self) -> bool:
        return bool(self.beta) and self.anchor.placement == "reward" and self.anchor.gradient != "published"

    def prepare(
        self,
        inputs: TokenInputs,
        lengths: Int[Tensor, " R"],
        group: Int[Tensor, " R"],
        statistics: Mapping[str, Tensor],
    ) -> TokenInputs:
        """Add what depends on whole responses: sequence ratio, anchor to-go, anchor in the advantage.

        Args:
            inputs: Of whole responses, in packed order, all responses of a group together.
            lengths: Tokens of each response.
            group: Prompt of each response.
            statistics: The outputs that `statistics` names, of the policy that is about to be updated.

        Returns:
            The inputs, completed; the same object where nothing is needed.

        Raises:
            ValueError: An output is missing, or the lengths do not sum to N.
        """
        needed = self.statistics()
        if missing := needed - statistics.keys():
            raise ValueError(f"prepare needs the outputs {sorted(missing)} of a pass over whole responses")
        if not needed:
            return inputs
        log_prob = statistics["log_prob"].detach()
        log_ratio = (
            torch.zeros_like(log_prob)
            if inputs.behaviour_log_probs is None
            else log_prob - inputs.behaviour_log_probs
        )
        if self.trust_region.kind == "sequence":
            mean = _response_mean(log_ratio, inputs.weights != 0, lengths)
            inputs = replace(inputs, sequence_log_ratio=mean)
        if not (self._anchor_looks_ahead or self._anchor_in_advantage):
            return inputs
        values = anchor_values(self.anchor, statistics).detach()
        if self._anchor_looks_ahead:
            drawn = inputs.anchor_weights != 0
            weights, to_go = anchor_to_go(self.anchor, values, log_ratio, drawn, lengths, group)
            return replace(inputs, prefix_weights=weights, anchor_to_go=to_go)
        drawn = inputs.weights != 0
        penalty = torch.where(drawn, values, 0.0)
        if self.anchor.gradient == "sequence":
            _, penalty = anchor_to_go(self.anchor, values, log_ratio, drawn, lengths, group)
        return replace(inputs, advantages=inputs.advantages - self.beta * penalty)

    def __call__(self, scores: Mapping[str, Tensor], inputs: TokenInputs) -> Float[Tensor, ""]:
        """Return the summed loss of some tokens.

        Args:
            scores: The outputs that `want` names, of these tokens.
            inputs: Prepared inputs of these tokens.
        """
        used = inputs.weights != 0
        log_prob = torch.where(used, scores["log_prob"], 0.0)
        gain = surrogate(self.trust_region, self._ratio(log_prob, inputs), log_prob, inputs.advantages)
        if inputs.correction is not None:
            gain = gain * inputs.correction
        if self.entropy_coefficient:
            gain = gain + self.entropy_coefficient * scores["entropy"]
        loss = -masked_sum(inputs.weights * gain, used)
        if self.beta and self.anchor.placement == "loss":
            term = anchor_term(
                self.anchor, scores, inputs.behaviour_log_probs, inputs.prefix_weights, inputs.anchor_to_go
            )
            loss = loss + self.beta * masked_sum(inputs.anchor_weights * term, inputs.anchor_weights != 0)
        return loss

    def _ratio(self, log_prob: Tensor, inputs: TokenInputs) -> Tensor:
        if self.trust_region.kind == "sequence":
            if inputs.sequence_log_ratio is None:
                raise ValueError(
                    "trust region sequence needs a mean log ratio a response: call prepare first"
                )
            return ratio(log_prob, None, inputs.sequence_log_ratio)
        behaviour = inputs.behaviour_log_probs
        if behaviour is not None:
            behaviour = torch.where(inputs.weights != 0, behaviour, 0.0)
        return ratio(log_prob, behaviour)

    def metrics(self, scores: Mapping[str, Tensor], inputs: TokenInputs) -> dict[str, Float[Tensor, ""]]:
        """Count the unmasked tokens on which each bound of the trust region acts (see `clip_masks`).

        Returns:
            ``trust_region/clip_fraction_low`` and ``…_high`` as *numerators*: summed over micro-batches and
            ranks and divided by the number of tokens with a weight, they are the fractions.
        """
        used = inputs.weights != 0
        log_prob = torch.where(used, scores["log_prob"].detach(), 0.0)
        low, high = clip_masks(self.trust_region, self._ratio(log_prob, inputs), inputs.advantages)
        return {
            "trust_region/clip_fraction_low": (low & used).sum().to(log_prob.dtype),
            "trust_region/clip_fraction_high": (high & used).sum().to(log_prob.dtype),
        }


def _response_mean(values: Tensor, mask: Tensor, lengths: Tensor) -> Tensor:
    """Give every token the mean of its response's unmasked values."""
    valid = valid_positions(lengths, values.numel())
    sums = pad(torch.where(mask, values, 0.0), valid).sum(dim=1)
    counts = valid.masked_scatter(valid, mask).sum(dim=1)
    return spread(sums / counts.clamp(min=1), lengths)
