"""Figures and tables against sums written out here."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from kedge.measure import MeasureConfig, TokenTable
from kedge.measure.extremes import most_moved
from kedge.measure.figures import correlation, describe, figures
from kedge.measure.pieces import Pieces
from kedge.measure.questions import POLICY_RESPONSES, REFERENCE_RESPONSES, TEXTS
from kedge.measure.tables import by_cluster, by_position, by_token
from kedge.statistics import Needed, student_quantile
from kedge.tasks import sums

CONFIG = MeasureConfig(resamples=100)


def table(clusters: int = 10, each: int = 2, seed: int = 0) -> TokenTable:
    """Random values; responses of one to five tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (clusters * each,), generator=generator)
    count = int(lengths.sum())
    row = torch.repeat_interleave(lengths)

    def positive() -> torch.Tensor:
        return torch.rand(count, dtype=torch.float64, generator=generator)

    def ids() -> torch.Tensor:
        return torch.randint(2, 12, (count,), generator=generator)

    return TokenTable(
        cluster=torch.arange(clusters).repeat_interleave(each)[row],
        response=row,
        position=torch.cat([torch.arange(n) for n in lengths.tolist()]),
        token=ids(),
        policy_log_prob=-positive(),
        reference_log_prob=-positive(),
        reverse_kl=positive(),
        forward_kl=positive(),
        policy_entropy=positive(),
        reference_entropy=positive(),
        policy_top=ids(),
        reference_top=ids(),
    )


@pytest.mark.parametrize("question", [POLICY_RESPONSES, REFERENCE_RESPONSES, TEXTS])
def test_values(question: Any) -> None:
    rows = table()
    found = figures(rows, question, CONFIG)
    p, q = rows.policy_log_prob.tolist(), rows.reference_log_prob.tolist()
    count, responses = rows.count, 20
    change = [math.exp(a) - math.exp(b) for a, b in zip(p, q, strict=True)]
    truths = {
        "reverse_kl": sum(rows.reverse_kl.tolist()) / count,
        "forward_kl": sum(rows.forward_kl.tolist()) / count,
        "policy_perplexity": math.exp(-sum(p) / count),
        "reference_perplexity": math.exp(-sum(q) / count),
        "perplexity_ratio": math.exp((sum(q) - sum(p)) / count),
        "cross_entropy_change": (sum(q) - sum(p)) / count,
        "policy_entropy": sum(rows.policy_entropy.tolist()) / count,
        "probability_change": sum(change) / count,
        "probability_change_rms": math.sqrt(sum(x * x for x in change) / count),
        "same_top_token": sum(map(int.__eq__, rows.policy_top.tolist(), rows.reference_top.tolist())) / count,
    }
    if question.sampled_from is not None:
        kl = rows.reverse_kl if question is POLICY_RESPONSES else rows.forward_kl
        own, other = (p, q) if question is POLICY_RESPONSES else (q, p)
        ratios = [a - b for a, b in zip(own, other, strict=True)]
        truths |= {
            f"{question.headline[0]}_per_response": sum(kl.tolist()) / responses,
            "k1": sum(ratios) / count,
            "k1_per_response": sum(ratios) / responses,
            "k3_per_response": sum(math.exp(-x) - 1 + x for x in ratios) / responses,
        }
    for name, truth in truths.items():
        estimate = found.estimates[name]
        assert estimate.value == pytest.approx(truth, rel=1e-9), name
        assert estimate.low <= estimate.value <= estimate.high, name
        assert estimate.standard_error >= 0, name
    assert ("reverse_kl_per_response" in found.estimates) == (question is POLICY_RESPONSES)
    assert ("k1" in found.estimates) == (question is not TEXTS)
    assert found.correlation == pytest.approx(float(torch.corrcoef(torch.tensor([p, q]))[0, 1]), rel=1e-5)
    quantile = torch.quantile(rows.reverse_kl, torch.tensor([0.5, 0.9, 0.999], dtype=torch.float64))
    names = ("median", "p90", "p99.9")
    assert [found.distribution["reverse_kl"][name] for name in names] == pytest.approx(quantile.tolist())
    assert found.distribution["reverse_kl"]["max"] == float(rows.reverse_kl.max())


def test_errors_are_those_of_prompts() -> None:
    """Copies of the responses to each prompt say nothing new: the error stays, where tokens would have it shrink."""
    rows = table()
    copies = [rows, *(shifted(rows, 20 * number) for number in range(1, 4))]
    one, four = (figures(each, POLICY_RESPONSES, CONFIG) for each in (rows, TokenTable.join(copies)))
    for name in ("reverse_kl", "reverse_kl_per_response", "policy_perplexity"):
        assert four.estimates[name].standard_error == pytest.approx(
            one.estimates[name].standard_error, rel=1e-9
        )


def shifted(rows: TokenTable, responses: int) -> TokenTable:
    return TokenTable(**{**rows.columns(), "response": rows.response + responses})


def test_one_prompt_has_the_errors_of_its_responses() -> None:
    rows = table(clusters=1, each=12)
    found = figures(rows, POLICY_RESPONSES, CONFIG).estimates["reverse_kl_per_response"]
    sums = torch.tensor([float(rows.reverse_kl[rows.response == i].sum()) for i in range(12)])
    assert found.standard_error == pytest.approx(float(sums.std()) / math.sqrt(12), rel=1e-5)
    assert found.low < found.value < found.high
    single = figures(table(clusters=1, each=1), TEXTS, CONFIG)
    assert math.isnan(single.estimates["reverse_kl"].low)
    assert single.needed.clusters is None


def test_what_is_needed_of_a_single_prompt_are_responses() -> None:
    """As many of them as the width asks for bring it: independent draws, halving takes four times as many."""
    rows, config = table(clusters=1, each=100), MeasureConfig(resamples=1000)
    found = figures(rows, POLICY_RESPONSES, config)
    estimate, needed = found.estimates["reverse_kl_per_response"], found.needed
    assert needed.clusters is None
    assert needed.samples_per_cluster == math.ceil(100 * (estimate.half_width / (0.1 * estimate.value)) ** 2)
    more = figures(table(clusters=1, each=needed.samples_per_cluster, seed=1), POLICY_RESPONSES, config)
    reached = more.estimates["reverse_kl_per_response"].half_width
    assert reached == pytest.approx(0.1 * estimate.value, rel=0.15)


def test_what_is_needed_of_texts_are_texts() -> None:
    """Windows of a text cannot be made more; of a single text they are the draws."""
    needed = figures(table(), TEXTS, CONFIG).needed
    assert needed.clusters is not None
    assert needed.samples_per_cluster is None
    single = figures(table(clusters=1, each=12), TEXTS, CONFIG).needed
    assert single.clusters is None
    assert single.samples_per_cluster is not None


def test_a_kl_of_nothing_needs_nothing() -> None:
    rows = table()
    rows.reverse_kl[:] = 0
    for question in (POLICY_RESPONSES, TEXTS):
        assert figures(rows, question, CONFIG).needed == Needed(0.0, None, None)


def test_what_is_needed_is_told_by_the_whole_interval() -> None:
    """Not by the one that is cut at 0: with three prompts, one of them far off, it would be half as long."""
    rows = table(clusters=3, each=1)
    rows.reverse_kl[rows.cluster == 0] *= 100
    found = figures(rows, POLICY_RESPONSES, CONFIG)
    estimate = found.estimates["reverse_kl_per_response"]
    assert estimate.low == 0
    half = student_quantile(0.975, 2) * estimate.standard_error
    assert estimate.half_width < 0.9 * half
    assert found.needed.clusters == math.ceil(3 * (half / (0.1 * estimate.value)) ** 2)


def test_what_cannot_be_negative_is_not() -> None:
    rows = table(clusters=2, each=1)
    estimates = figures(rows, POLICY_RESPONSES, CONFIG).estimates
    assert min(estimates[name].low for name in ("reverse_kl", "k3", "policy_entropy", "same_top_token")) >= 0
    assert estimates["same_top_token"].high <= 1
    assert estimates["k1"].low < 0


def test_infinite_kl_is_said() -> None:
    rows = table()
    rows.reverse_kl[3] = math.inf
    found = figures(rows, POLICY_RESPONSES, CONFIG)
    assert found.estimates["reverse_kl"].value == math.inf
    assert math.isnan(found.estimates["reverse_kl"].high)
    assert found.distribution["reverse_kl"]["max"] == math.inf
    assert math.isfinite(found.estimates["forward_kl"].high)


def test_values_that_are_not_numbers_crowd_nothing_out() -> None:
    """Twenty tokens whose values are lost leave the lists of the others as they are."""
    rows, tokenizer = table(), sums.tokenizer()
    lost = torch.arange(rows.count) % 2 == 0
    rows.token[lost] = 13
    kept = rows.rows(~lost)
    for name in ("reverse_kl", "forward_kl", "policy_log_prob"):
        getattr(rows, name)[lost] = math.nan
    assert by_token(rows, 3) == by_token(kept, 3)
    context: Any = lambda cluster, response: [2]  # noqa: E731
    places, expected = (most_moved(each, Pieces(tokenizer), 4, context) for each in (rows, kept))
    for name, values in expected.items():
        for value in ("reverse_kl", "forward_kl", "policy_log_prob", "reference_log_prob"):
            assert [place[value] for place in places[name]] == [place[value] for place in values], name
    rows.reverse_kl[1] = math.inf
    assert most_moved(rows, Pieces(tokenizer), 4, context)["reverse_kl"][0]["reverse_kl"] == math.inf


def test_edges() -> None:
    assert describe(torch.tensor([2.0]), {"p99": 0.99}) == {"min": 2.0, "p99": 2.0, "max": 2.0}
    assert math.isnan(correlation(torch.ones(3), torch.arange(3.0)))


def test_tables() -> None:
    rows = table()
    lines = by_cluster(rows, POLICY_RESPONSES, {0: "first"})
    assert [line["cluster"] for line in lines] == list(range(10))
    assert (lines[0]["text"], lines[0]["responses"]) == ("first", 2)
    chosen = rows.cluster == 3
    assert lines[3]["tokens"] == int(chosen.sum())
    assert lines[3]["reverse_kl"] == pytest.approx(float(rows.reverse_kl[chosen].mean()))
    assert lines[3]["reverse_kl_per_response"] == pytest.approx(float(rows.reverse_kl[chosen].sum()) / 2)
    positions = by_position(rows)
    assert [line["first"] for line in positions] == list(range(5))
    assert positions[2]["tokens"] == int((rows.position == 2).sum())
    assert positions[2]["forward_kl"] == pytest.approx(float(rows.forward_kl[rows.position == 2].mean()))
    far = TokenTable(**{**rows.columns(), "position": rows.position * 50})
    assert [(line["first"], line["last"]) for line in by_position(far)][:2] == [(0, 3), (48, 51)]
    words = by_token(rows, 3)
    change = rows.policy_log_prob - rows.reference_log_prob
    totals = {token: float(change[rows.token == token].sum()) for token in set(rows.token.tolist())}
    ranked = sorted(totals, key=lambda token: -totals[token])
    assert [line["token"] for line in words["raised"]] == [t for t in ranked[:3] if totals[t] > 0]
    assert [line["token"] for line in words["lowered"]] == [t for t in ranked[::-1][:3] if totals[t] < 0]


def test_places_that_moved_most() -> None:
    rows, tokenizer = table(), sums.tokenizer()
    places = most_moved(rows, Pieces(tokenizer), 4, lambda cluster, response: [2 + cluster] * 40)
    assert {name: len(each) for name, each in places.items()} == dict.fromkeys(
        ("reverse_kl", "forward_kl", "raised", "lowered"), 4
    )
    top = int(rows.reverse_kl.argmax())
    place = places["reverse_kl"][0]
    assert (place["response"], place["position"]) == (int(rows.response[top]), int(rows.position[top]))
    assert place["token"] == tokenizer.decode([int(rows.token[top])])
    own = rows.token[rows.response == rows.response[top]].tolist()
    before = [2 + place["cluster"]] * (32 - place["position"]) + own[: place["position"]]
    assert place["before"] == tokenizer.decode(before)
    assert place["after"] == tokenizer.decode(own[place["position"] + 1 :])
    ratios = [each["policy_log_prob"] - each["reference_log_prob"] for each in places["lowered"]]
    assert ratios == sorted(ratios)
    assert ratios[0] < 0
