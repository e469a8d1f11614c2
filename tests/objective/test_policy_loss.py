"""The loss by hand; splits, order, masks: nothing that should not change it does."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kedge.head import Head, reduce, score
from kedge.objective import Anchor, DivergenceMask, PolicyLoss, TokenInputs, TrustRegion, aggregation_weights

VOCABULARY, HIDDEN = 7, 4
LOSSES = [
    PolicyLoss(TrustRegion("clip"), Anchor("exact"), beta=0.3, entropy_coefficient=0.1),
    PolicyLoss(TrustRegion("clip", dual=2.0), Anchor("k3", gradient="published"), beta=0.3),
    PolicyLoss(TrustRegion("sequence"), Anchor("exact", gradient="sequence", baseline=True), beta=0.3),
    PolicyLoss(
        TrustRegion("cispo"), Anchor("k1", gradient="sequence", weights="prefix", baseline=True), beta=0.3
    ),
    PolicyLoss(
        TrustRegion("none"), Anchor("k1", placement="reward", gradient="sequence", baseline=True), beta=0.3
    ),
    PolicyLoss(TrustRegion("none"), Anchor("k1", placement="reward", gradient="token"), beta=0.3),
    PolicyLoss(TrustRegion("none"), Anchor(), beta=0.0, penalty=0.7),
    PolicyLoss(TrustRegion("clip"), Anchor(), beta=0.3, penalty=0.7, mask=DivergenceMask("tv", 0.4)),
    PolicyLoss(
        TrustRegion("sequence"), Anchor(), beta=0.3, mask=DivergenceMask("kl", 0.01, form="two_outcome")
    ),
    PolicyLoss(
        TrustRegion("clip"), Anchor(gradient="sequence"), beta=0.3, mask=DivergenceMask("kl", 3.0, "response")
    ),
    PolicyLoss(
        TrustRegion("none"),
        Anchor(),
        beta=0.0,
        entropy_coefficient=0.1,
        mask=DivergenceMask("tv", 0.3, "response", "two_outcome"),
    ),
]


class Batch:
    """A random packed batch with its head, in float64."""

    def __init__(self, lengths: list[int], group: list[int]) -> None:
        generator = torch.Generator().manual_seed(3)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.lengths, self.group = torch.tensor(lengths), torch.tensor(group)
        count = sum(lengths)
        self.hidden, self.reference = normal(count, HIDDEN), normal(count, HIDDEN)
        self.old = self.hidden + normal(count, HIDDEN)
        self.targets = torch.randint(VOCABULARY, (count,), generator=generator)
        self.head = Head(normal(VOCABULARY, HIDDEN))
        self.reference_head = Head(normal(VOCABULARY, HIDDEN))
        self.mask = torch.rand(count, generator=generator) > 0.2
        self.advantages, self.behaviour = normal(count), normal(count) * 0.3 - 2
        self.correction = torch.rand(count, generator=generator, dtype=torch.float64)

    def inputs(self, responses: Tensor) -> tuple[TokenInputs, Tensor, Tensor]:
        """Return inputs, token positions and lengths of some responses, weighted by global counts."""
        ends = self.lengths.cumsum(0)
        spans = [torch.arange(int(ends[r] - self.lengths[r]), int(ends[r])) for r in responses]
        at, lengths = torch.cat(spans), self.lengths[responses]
        totals = {"total_tokens": int(self.mask.sum()), "total_responses": len(self.lengths)}
        mask = self.mask[at]
        return (
            TokenInputs(
                advantages=self.advantages[at],
                weights=aggregation_weights(lengths, mask, "sequence_mean", dtype=torch.float64, **totals),
                anchor_weights=aggregation_weights(
                    lengths, mask, "token_mean", dtype=torch.float64, **totals
                ),
                behaviour_log_probs=self.behaviour[at],
                correction=self.correction[at],
            ),
            at,
            lengths,
        )

    def anchors(self, at: Tensor) -> dict[str, tuple[Tensor, Head]]:
        return {
            "reference": (self.reference[at], self.reference_head),
            "old": (self.old[at], self.head.snapshot()),
        }

    def statistics(self, loss: PolicyLoss, at: Tensor) -> dict[str, Tensor]:
        names = loss.statistics()
        if not names:
            return {}
        return score(self.hidden[at], self.head, self.targets[at], anchors=self.anchors(at), want=names)

    def loss(
        self, loss: PolicyLoss, parts: list[list[int]], chunk_rows: int | None = None
    ) -> tuple[float, Tensor]:
        """Return the loss summed over parts of the batch, and its gradient."""
        weight = self.head.weight.clone().requires_grad_()
        total = torch.zeros((), dtype=torch.float64)
        for part in parts:
            responses = torch.tensor(part)
            inputs, at, lengths = self.inputs(responses)
            inputs = loss.prepare(inputs, lengths, self.group[responses], self.statistics(loss, at))
            value, _ = reduce(
                self.hidden[at],
                replace(self.head, weight=weight),
                self.targets[at],
                lambda scores, rows, inputs=inputs: loss(scores, inputs.rows(rows)),
                anchors=self.anchors(at),
                want=loss.want(),
                chunk_rows=chunk_rows,
            )
            total = total + value
        total.backward()
        assert weight.grad is not None
        return float(total.detach()), weight.grad


@pytest.fixture(scope="module")
def batch() -> Batch:
    return Batch([3, 5, 1, 4, 2, 6, 3, 3], [0, 0, 0, 0, 1, 1, 1, 1])


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_micro_batches_order_and_chunks_change_nothing(batch: Batch, loss: PolicyLoss) -> None:
    value, gradient = batch.loss(loss, [list(range(8))])
    assert abs(value) > 1e-3
    for parts, rows in (
        ([[0, 1, 2, 3], [4, 5, 6, 7]], None),
        ([[5, 2, 7, 0, 3, 6, 1, 4]], None),
        ([list(range(8))], 4),
        ([[7, 4, 6, 5], [3, 1, 2, 0]], 5),
    ):
        other, slope = batch.loss(loss, parts, rows)
        assert other == pytest.approx(value, abs=1e-10)
        assert (slope - gradient).abs().max() < 1e-10


@pytest.mark.parametrize("loss", [each for each in LOSSES if not each.anchor.baseline], ids=str)
def test_single_responses_sum_to_the_batch(batch: Batch, loss: PolicyLoss) -> None:
    value, gradient = batch.loss(loss, [list(range(8))])
    other, slope = batch.loss(loss, [[r] for r in range(8)])
    assert other == pytest.approx(value, abs=1e-10)
    assert (slope - gradient).abs().max() < 1e-10


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_masked_tokens_never_contribute(batch: Batch, loss: PolicyLoss) -> None:
    inputs, at, lengths = batch.inputs(torch.arange(8))
    masked = ~batch.mask
    assert masked.any()

    def spoiled(tensor: Tensor, value: float) -> Tensor:
        return torch.where(masked, value, tensor)

    found = []
    for spoil in (False, True):
        names = loss.want() | loss.statistics()
        scores = score(batch.hidden, batch.head, batch.targets, anchors=batch.anchors(at), want=names)
        given = inputs
        if spoil:
            scores = {name: spoiled(each, math.inf) for name, each in scores.items()}
            given = replace(
                inputs,
                advantages=spoiled(inputs.advantages, 1e9),
                behaviour_log_probs=spoiled(inputs.behaviour_log_probs, -math.inf),
                correction=spoiled(inputs.correction, math.nan),
            )
        prepared = loss.prepare(given, lengths, batch.group, scores)
        leaves = {name: each.detach().requires_grad_() for name, each in scores.items()}
        value = loss(leaves, prepared)
        used = [leaves[name] for name in sorted(loss.want())]
        slopes = torch.autograd.grad(value, used, materialize_grads=True)
        found.append((float(value.detach()), torch.stack(slopes), loss.metrics(leaves, prepared)))
    (value, slopes, counts), (other, others, recounts) = found
    assert other == pytest.approx(value, abs=1e-12)
    assert torch.equal(slopes, others)
    assert (others[:, masked] == 0).all()
    assert counts == recounts


def one(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


def test_by_hand() -> None:
    loss = PolicyLoss(
        TrustRegion("clip", low=0.2, high=0.2), Anchor("exact"), beta=2.0, entropy_coefficient=0.5
    )
    inputs = TokenInputs(
        advantages=one(3.0),
        weights=one(0.1),
        anchor_weights=one(0.01),
        behaviour_log_probs=one(-1.0),
        correction=one(0.5),
    )
    scores = {
        "log_prob": one(-1.0 + math.log(1.1)),
        "entropy": one(0.7),
        "reference.reverse_kl": one(0.4),
    }
    expected = -0.1 * (0.5 * 1.1 * 3.0 + 0.5 * 0.7) + 2.0 * 0.01 * 0.4
    assert loss(scores, inputs).item() == pytest.approx(expected)


def named(**values: list[float]) -> dict[str, Tensor]:
    """Scores by the head's names, a dot for each double underscore, as leaves."""
    return {
        name.replace("__", "."): torch.tensor(value, dtype=torch.float64, requires_grad=True)
        for name, value in values.items()
    }


def token_inputs(advantages: list[float], log_behaviour: list[float], **more: object) -> TokenInputs:
    count = len(advantages)
    return TokenInputs(
        advantages=torch.tensor(advantages, dtype=torch.float64),
        weights=torch.full((count,), 0.1, dtype=torch.float64),
        anchor_weights=torch.full((count,), 0.01, dtype=torch.float64),
        behaviour_log_probs=torch.tensor(log_behaviour, dtype=torch.float64),
        **more,  # type: ignore[arg-type]
    )


def test_the_penalty_by_hand() -> None:
    """−Σ weight·(correction·w·A − β_old·KL(old‖π)) + β Σ anchor_weight·KL(π‖ρ), with each gradient."""
    loss = PolicyLoss(TrustRegion("none"), Anchor("exact"), beta=2.0, penalty=5.0)
    scores = named(log_prob=[math.log(0.6)], old__forward_kl=[0.3], reference__reverse_kl=[0.4])
    inputs = token_inputs([3.0], [math.log(0.5)], correction=one(0.5))
    value = loss(scores, inputs)
    assert value.item() == pytest.approx(-0.1 * (0.5 * 1.2 * 3.0 - 5.0 * 0.3) + 2.0 * 0.01 * 0.4)
    slopes = torch.autograd.grad(value, list(scores.values()))
    assert [slope.item() for slope in slopes] == pytest.approx([-0.1 * 0.5 * 1.2 * 3.0, 0.5, 0.02])


CLIP, PENALTY = {"trust_region": TrustRegion("clip")}, {"penalty": 5.0}


@pytest.mark.parametrize(
    ("options", "slopes"),
    [({}, [-0.45, 0.0]), (CLIP, [0.0, 0.0]), (PENALTY, [-0.45, 0.5]), (CLIP | PENALTY, [0.0, 0.5])],
    ids=["none", "clip", "penalty", "both"],
)
def test_clip_and_penalty_are_independent(options: dict[str, object], slopes: list[float]) -> None:
    """A ratio of 1.5 with a positive advantage: the clip takes the surrogate's gradient, not the penalty's."""
    loss = PolicyLoss(**({"trust_region": TrustRegion("none"), "anchor": Anchor(), "beta": 0.0} | options))  # type: ignore[arg-type]
    assert loss.want() == ({"log_prob", "old.forward_kl"} if "penalty" in options else {"log_prob"})
    assert loss.statistics() == set()
    scores = named(log_prob=[math.log(0.75)], old__forward_kl=[0.3])
    value = loss(scores, token_inputs([3.0], [math.log(0.5)]))
    found = torch.autograd.grad(value, list(scores.values()), materialize_grads=True)
    assert [slope.item() for slope in found] == pytest.approx(slopes)


@pytest.mark.parametrize("kind", ["none", "clip", "sequence", "cispo"])
@pytest.mark.parametrize("form", ["exact", "two_outcome"])
@pytest.mark.parametrize("measure", ["tv", "kl"])
def test_a_masked_token_keeps_penalty_anchor_entropy(measure: str, form: str, kind: str) -> None:
    """Of four tokens, each as far away, the first and the last would go on: they lose their surrogate alone."""
    mask = DivergenceMask(measure, 0.05, form=form)  # type: ignore[arg-type]
    loss = PolicyLoss(TrustRegion(kind, 1.0, 9.0), Anchor(), 2.0, 0.5, penalty=5.0, mask=mask)  # type: ignore[arg-type]
    ratios, advantages = [1.5, 1.5, 0.5, 0.5], [3.0, -3.0, 3.0, -3.0]
    scores = named(
        log_prob=[math.log(0.5 * w) for w in ratios],
        entropy=[1.0] * 4,
        old__forward_kl=[0.13] * 4,
        old__total_variation=[0.25] * 4,
        reference__reverse_kl=[0.4] * 4,
    )
    inputs = token_inputs(
        advantages, [math.log(0.5)] * 4, sequence_log_ratio=torch.tensor(ratios).double().log()
    )
    value = loss(scores, inputs)
    slopes = dict(
        zip(scores, torch.autograd.grad(value, list(scores.values()), materialize_grads=True), strict=True)
    )
    surrogates = [0.0, 0.1 * 1.5 * 3.0, -0.1 * 0.5 * 3.0, 0.0]
    if kind != "cispo":
        others = 4 * (0.1 * (5.0 * 0.13 - 0.5) + 0.02 * 0.4)
        assert value.item() == pytest.approx(sum(surrogates) + others)
    assert slopes["log_prob"].tolist() == pytest.approx(surrogates)
    assert slopes["entropy"].tolist() == pytest.approx([-0.05] * 4)
    assert slopes["old.forward_kl"].tolist() == pytest.approx([0.5] * 4)
    assert slopes["old.total_variation"].tolist() == [0.0] * 4
    assert slopes["reference.reverse_kl"].tolist() == pytest.approx([0.02] * 4)
    assert loss.metrics(scores, inputs)["trust_region/masked_fraction"].item() == 2.0
    near = replace(loss, mask=DivergenceMask(measure, 0.3, form=form))  # type: ignore[arg-type]
    (slope,) = torch.autograd.grad(near(scores, inputs), scores["log_prob"])
    whole = [-0.1 * w * a for w, a in zip(ratios, advantages, strict=True)]
    assert slope.tolist() == pytest.approx(whole)
    assert near.metrics(scores, inputs)["trust_region/masked_fraction"].item() == 0.0


@pytest.mark.parametrize("form", ["exact", "two_outcome"])
def test_a_response_is_masked_as_a_whole(form: str) -> None:
    mask = DivergenceMask("tv", 0.2, "response", form)  # type: ignore[arg-type]
    loss = PolicyLoss(TrustRegion("none"), Anchor(), beta=0.0, mask=mask)
    assert loss.statistics() == ({"old.total_variation"} if form == "exact" else {"log_prob"})
    assert loss.want() == {"log_prob"}
    scores = named(
        log_prob=[math.log(p) for p in (0.5, 0.75, 0.6, 0.4)], old__total_variation=[0.0, 0.25, 0.1, 0.1]
    )
    inputs = token_inputs([3.0] * 4, [math.log(0.5)] * 4)
    prepared = loss.prepare(inputs, torch.tensor([2, 2]), torch.tensor([0, 0]), scores)
    assert prepared.kept is not None
    assert prepared.kept.tolist() == [False, False, True, True]
    (slope,) = torch.autograd.grad(loss(scores, prepared), scores["log_prob"])
    assert slope.tolist() == pytest.approx([0.0, 0.0, -0.36, -0.24])
    assert loss.metrics(scores, prepared)["trust_region/masked_fraction"].item() == 2.0
    unseen = replace(inputs, weights=inputs.weights * torch.tensor([1.0, 0.0, 1.0, 1.0]))
    prepared = loss.prepare(unseen, torch.tensor([2, 2]), torch.tensor([0, 0]), scores)
    assert prepared.kept is not None
    assert prepared.kept.all()
    with pytest.raises(ValueError, match="mask of whole responses needs their statistics"):
        loss(scores, inputs)


def test_what_is_masked_may_have_left_the_numbers() -> None:
    """An infinite ratio is no NaN once its token is masked."""
    mask = DivergenceMask("tv", 0.2, form="two_outcome")
    for kind in ("none", "clip", "sequence", "cispo"):
        loss = PolicyLoss(TrustRegion(kind), Anchor(), beta=0.0, mask=mask)  # type: ignore[arg-type]
        scores = named(log_prob=[-0.1, -0.1])
        inputs = token_inputs([3.0, 3.0], [-1e4, -0.1], sequence_log_ratio=torch.tensor([1e4, 0.0]).double())
        value = loss(scores, inputs)
        (slope,) = torch.autograd.grad(value, scores["log_prob"])
        assert value.isfinite()
        assert slope.tolist() == pytest.approx([0.0, -0.3])


def test_an_anchor_in_the_reward_joins_the_advantage_after_normalisation() -> None:
    lengths, group = torch.tensor([2, 1]), torch.tensor([0, 0])
    ones = torch.ones(3, dtype=torch.float64)
    inputs = TokenInputs(advantages=3 * ones, weights=ones / 3, anchor_weights=ones / 3)
    statistics = {
        "log_prob": -ones,
        "reference.log_prob": torch.tensor([-2.0, -4.0, -1.5], dtype=torch.float64),
    }
    token = PolicyLoss(TrustRegion(), Anchor("k1", placement="reward", gradient="token"), beta=0.5)
    assert token.prepare(inputs, lengths, group, statistics).advantages.tolist() == [2.5, 1.5, 2.75]
    sequence = PolicyLoss(TrustRegion(), Anchor("k1", placement="reward", gradient="sequence"), beta=0.5)
    assert sequence.prepare(inputs, lengths, group, statistics).advantages.tolist() == [1.0, 1.5, 2.75]
    assert sequence.want() == {"log_prob"}


def test_the_sequence_ratio_is_the_mean_over_unmasked_tokens() -> None:
    loss = PolicyLoss(TrustRegion("sequence"), Anchor(), beta=0.0)
    inputs = TokenInputs(
        advantages=torch.ones(4),
        weights=torch.tensor([0.5, 0.0, 0.5, 1.0]),
        anchor_weights=torch.ones(4),
        behaviour_log_probs=torch.tensor([-1.0, -9.0, -1.0, -1.0]),
    )
    statistics = {"log_prob": torch.tensor([-1.5, -1.0, -1.3, -2.0])}
    prepared = loss.prepare(inputs, torch.tensor([3, 1]), torch.tensor([0, 0]), statistics)
    assert prepared.sequence_log_ratio is not None
    assert prepared.sequence_log_ratio.tolist() == pytest.approx([-0.4, -0.4, -0.4, -1.0])
    counts = loss.metrics({"log_prob": statistics["log_prob"]}, replace(prepared, advantages=-torch.ones(4)))
    assert counts["trust_region/clip_fraction_low"].item() == 3.0
    assert counts["trust_region/clip_fraction_high"].item() == 0.0


@pytest.mark.parametrize(
    ("region", "anchor", "beta", "want", "statistics"),
    [
        ("clip", Anchor(), 0.1, {"log_prob", "reference.reverse_kl"}, set()),
        ("clip", Anchor("exact", "forward"), 0.1, {"log_prob", "reference.forward_kl"}, set()),
        ("clip", Anchor("k3"), 0.1, {"log_prob", "reference.log_prob"}, set()),
        ("clip", Anchor(), 0.0, {"log_prob"}, set()),
        ("sequence", Anchor(), 0.0, {"log_prob"}, {"log_prob"}),
        (
            "clip",
            Anchor(gradient="sequence"),
            0.1,
            {"log_prob", "reference.reverse_kl"},
            {"log_prob", "reference.reverse_kl"},
        ),
        ("clip", Anchor(gradient="sequence"), 0.0, {"log_prob"}, set()),
        (
            "clip",
            Anchor("k1", placement="reward", gradient="token"),
            0.1,
            {"log_prob"},
            {"log_prob", "reference.log_prob"},
        ),
        ("clip", Anchor("k3", placement="reward", gradient="published"), 0.1, {"log_prob"}, set()),
    ],
)
def test_only_what_is_used_is_asked_of_the_head(
    region: str, anchor: Anchor, beta: float, want: set[str], statistics: set[str]
) -> None:
    loss = PolicyLoss(TrustRegion(region), anchor, beta)  # type: ignore[arg-type]
    assert loss.want() == want
    assert loss.statistics() == statistics
    assert replace(loss, entropy_coefficient=0.1).want() == want | {"entropy"}


def test_nothing_to_prepare_leaves_the_inputs_alone(batch: Batch) -> None:
    inputs, _, lengths = batch.inputs(torch.arange(8))
    assert LOSSES[0].prepare(inputs, lengths, batch.group, {}) is inputs


def test_what_is_missing_is_named(batch: Batch) -> None:
    inputs, _, lengths = batch.inputs(torch.arange(8))
    with pytest.raises(ValueError, match=r"needs the outputs \['log_prob', 'reference.reverse_kl'\]"):
        LOSSES[2].prepare(inputs, lengths, batch.group, {})
    with pytest.raises(ValueError, match="trust region sequence needs"):
        LOSSES[2]({"log_prob": torch.zeros(27, dtype=torch.float64)}, inputs)


@pytest.mark.parametrize("value", [-0.1, math.inf, math.nan])
def test_coefficients_are_finite_and_not_negative(value: float) -> None:
    with pytest.raises(ValueError, match="beta must be a finite number of at least 0"):
        PolicyLoss(TrustRegion(), Anchor(), beta=value)
    with pytest.raises(ValueError, match="entropy_coefficient must be"):
        PolicyLoss(TrustRegion(), Anchor(), beta=0.0, entropy_coefficient=value)
    with pytest.raises(ValueError, match="penalty must be"):
        PolicyLoss(TrustRegion(), Anchor(), beta=0.0, penalty=value)


def test_on_policy_needs_no_behaviour(batch: Batch) -> None:
    inputs, at, lengths = batch.inputs(torch.arange(8))
    loss = PolicyLoss(TrustRegion("clip"), Anchor("exact", gradient="sequence", weights="prefix"), beta=1.0)
    scores = score(batch.hidden, batch.head, batch.targets, anchors=batch.anchors(at), want=loss.want())
    told = replace(inputs, behaviour_log_probs=scores["log_prob"].detach())
    found = [
        float(loss(scores, loss.prepare(given, lengths, batch.group, scores)))
        for given in (told, replace(inputs, behaviour_log_probs=None))
    ]
    assert found[0] == pytest.approx(found[1], abs=1e-12)
