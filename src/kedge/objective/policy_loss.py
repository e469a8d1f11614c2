"""The policy's loss: surrogate, penalty, anchor, entropy bonus, each with its weights, for `kedge.head.reduce`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kedge.objective.aggregate import masked_sum, pad, spread, valid_positions
from kedge.objective.anchor import Anchor, anchor_term, anchor_to_go, anchor_values, undefined
from kedge.objective.divergence_mask import DivergenceMask, divergences, kept_responses, kept_tokens
from kedge.objective.trust_region import TrustRegion, clip_masks, ratio, surrogate


@dataclass(frozen=True)
class TokenInputs:
    """What the loss knows of each response token before the head is run; none of it is differentiated.

    A token of weight 0 is masked: whatever else is said of it never enters.

    Args:
        advantages: Advantage of each token.
        weights: Aggregation weights of surrogate, penalty and entropy (`aggregation_weights`).
        anchor_weights: Aggregation weights of the anchor.
        behaviour_log_probs: log μ of the tokens; None on policy.
        correction: Weights for a sampler that differs from the trainer (`correction_weights`).
        sequence_log_ratio: Mean log ratio of the token's response; made by `PolicyLoss.prepare`.
        kept: Whether the mask of whole responses keeps the token's; made by `PolicyLoss.prepare`.
        prefix_weights: Weight of the anchor's own value; made by `PolicyLoss.prepare`.
        anchor_to_go: What multiplies the token's score in the anchor; made by `PolicyLoss.prepare`.
    """

    advantages: Float[Tensor, " N"]
    weights: Float[Tensor, " N"]
    anchor_weights: Float[Tensor, " N"]
    behaviour_log_probs: Float[Tensor, " N"] | None = None
    correction: Float[Tensor, " N"] | None = None
    sequence_log_ratio: Float[Tensor, " N"] | None = None
    kept: Bool[Tensor, " N"] | None = None
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

        −Σ weights·(correction·kept·surrogate − penalty·KL(old‖policy) + entropy_coefficient·entropy)
        + β Σ anchor_weights·anchor

    What ties the policy to the old one can be put together freely: the trust region's ratio, clipped or not, the
    exact penalty, the mask by measured divergence, all or none of them. The anchor ties it to the reference.

    For each update: ask `statistics`; if it names any outputs of the head, compute them for whole responses
    without gradients; call `prepare`; then give the loss to `kedge.head.reduce` with `want`, on the prepared
    inputs of each chunk's rows.

    Args:
        trust_region: Which surrogate.
        anchor: How the reference holds the policy.
        beta: β ≥ 0, in units of the advantage per nat; at 0 the anchor is not computed.
        entropy_coefficient: Of the exact entropy bonus, in units of the advantage per nat, ≥ 0.
        penalty: Of KL(old‖policy) over the vocabulary, in units of the advantage per nat, ≥ 0; at 0 it is not computed.
        mask: What drops out of the surrogate where the policy has gone too far; None: nothing.

    Raises:
        ValueError: A negative or non-finite coefficient, or an anchor without a formula.

    >>> loss = PolicyLoss(TrustRegion("none"), Anchor("exact"), beta=0.5)
    >>> sorted(loss.want())
    ['log_prob', 'reference.reverse_kl']
    >>> scores = {"log_prob": torch.tensor([-1.0]), "reference.reverse_kl": torch.tensor([0.5])}
    >>> one = torch.ones(1)
    >>> loss(scores, TokenInputs(advantages=3 * one, weights=one, anchor_weights=one)).item()
    -2.75

    Source: Schulman et al. 2017, arXiv 1707.06347, section 4, for the penalty.
    """

    trust_region: TrustRegion
    anchor: Anchor
    beta: float
    entropy_coefficient: float = 0.0
    penalty: float = 0.0
    mask: DivergenceMask | None = None

    def __post_init__(self) -> None:
        for name in ("beta", "entropy_coefficient", "penalty"):
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
        if self.penalty:
            outputs.add("old.forward_kl")
        if (mask := self._mask_of("token")) is not None:
            outputs |= mask.outputs
        if self.beta and self.anchor.placement == "loss":
            outputs |= self.anchor.outputs
        return frozenset(outputs)

    def statistics(self) -> frozenset[str]:
        """Name the outputs that `prepare` needs for whole responses of the present policy; often none."""
        outputs: frozenset[str] = frozenset()
        if self.trust_region.kind == "sequence":
            outputs |= {"log_prob"}
        if (mask := self._mask_of("response")) is not None:
            outputs |= mask.outputs
        if self._anchor_looks_ahead or self._anchor_in_advantage:
            outputs |= {"log_prob"} | self.anchor.outputs
        return outputs

    def _mask_of(self, level: str) -> DivergenceMask | None:
        return self.mask if self.mask is not None and self.mask.level == level else None

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
        """Add what depends on whole responses: sequence ratio, mask, anchor to-go, anchor in the advantage.

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
        drawn = inputs.weights != 0
        if (mask := self._mask_of("response")) is not None:
            far = divergences(mask, statistics, inputs.behaviour_log_probs)
            inputs = replace(inputs, kept=kept_responses(mask, far, drawn, lengths))
        if self.trust_region.kind == "sequence":
            mean = _response_mean(_log_ratio(statistics, inputs), drawn, lengths)
            inputs = replace(inputs, sequence_log_ratio=mean)
        if not (self._anchor_looks_ahead or self._anchor_in_advantage):
            return inputs
        values, log_ratio = anchor_values(self.anchor, statistics).detach(), _log_ratio(statistics, inputs)
        if self._anchor_looks_ahead:
            drawn = inputs.anchor_weights != 0
            weights, to_go = anchor_to_go(self.anchor, values, log_ratio, drawn, lengths, group)
            return replace(inputs, prefix_weights=weights, anchor_to_go=to_go)
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
        kept = used & self._kept(scores, inputs)
        log_prob = torch.where(kept, scores["log_prob"], 0.0)
        gain = surrogate(self.trust_region, self._ratio(log_prob, inputs, kept), log_prob, inputs.advantages)
        if inputs.correction is not None:
            gain = gain * inputs.correction
        if self.mask is not None:
            gain = torch.where(kept, gain, 0.0)
        if self.penalty:
            gain = gain - self.penalty * scores["old.forward_kl"]
        if self.entropy_coefficient:
            gain = gain + self.entropy_coefficient * scores["entropy"]
        loss = -masked_sum(inputs.weights * gain, used)
        if self.beta and self.anchor.placement == "loss":
            term = anchor_term(
                self.anchor, scores, inputs.behaviour_log_probs, inputs.prefix_weights, inputs.anchor_to_go
            )
            loss = loss + self.beta * masked_sum(inputs.anchor_weights * term, inputs.anchor_weights != 0)
        return loss

    def _kept(self, scores: Mapping[str, Tensor], inputs: TokenInputs) -> Bool[Tensor, " N"]:
        """Return which tokens the mask by measured divergence leaves in the surrogate."""
        if (mask := self._mask_of("token")) is not None:
            far = divergences(mask, scores, inputs.behaviour_log_probs)
            return kept_tokens(mask, far, _log_ratio(scores, inputs), inputs.advantages)
        if self.mask is None:
            return torch.ones_like(inputs.weights, dtype=torch.bool)
        if inputs.kept is None:
            raise ValueError("a mask of whole responses needs their statistics: call prepare first")
        return inputs.kept

    def _ratio(self, log_prob: Tensor, inputs: TokenInputs, used: Tensor) -> Tensor:
        """Return the trust region's ratio; 1 for tokens that are not used, whatever is said of them."""
        if self.trust_region.kind == "sequence":
            if inputs.sequence_log_ratio is None:
                raise ValueError(
                    "trust region sequence needs a mean log ratio a response: call prepare first"
                )
            return ratio(log_prob, None, inputs.sequence_log_ratio)
        behaviour = inputs.behaviour_log_probs
        if behaviour is not None:
            behaviour = torch.where(used, behaviour, 0.0)
        return ratio(log_prob, behaviour)

    def metrics(self, scores: Mapping[str, Tensor], inputs: TokenInputs) -> dict[str, Float[Tensor, ""]]:
        """Count the unmasked tokens on which the parts of the trust region act.

        Returns:
            ``trust_region/clip_fraction_low`` and ``…_high`` (see `clip_masks`) and, with a mask by measured
            divergence, ``trust_region/masked_fraction``: as *numerators*. Summed over micro-batches and ranks and
            divided by the number of tokens with a weight, they are the fractions.
        """
        used = inputs.weights != 0
        log_prob = torch.where(used, scores["log_prob"].detach(), 0.0)
        low, high = clip_masks(self.trust_region, self._ratio(log_prob, inputs, used), inputs.advantages)
        acting = {"clip_fraction_low": low, "clip_fraction_high": high}
        if self.mask is not None:
            acting["masked_fraction"] = ~self._kept(scores, inputs)
        return {
            f"trust_region/{name}": (each & used).sum().to(log_prob.dtype) for name, each in acting.items()
        }


def _log_ratio(scores: Mapping[str, Tensor], inputs: TokenInputs) -> Float[Tensor, " N"]:
    """Return log π − log μ of each token, detached; 0 on policy."""
    log_prob = scores["log_prob"].detach()
    behaviour = inputs.behaviour_log_probs
    return torch.zeros_like(log_prob) if behaviour is None else log_prob - behaviour


def _response_mean(values: Tensor, mask: Tensor, lengths: Tensor) -> Tensor:
    """Give every token the mean of its response's unmasked values."""
    valid = valid_positions(lengths, values.numel())
    sums = pad(torch.where(mask, values, 0.0), valid).sum(dim=1)
    counts = valid.masked_scatter(valid, mask).sum(dim=1)
    return spread(sums / counts.clamp(min=1), lengths)
