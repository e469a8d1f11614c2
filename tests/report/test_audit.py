"""What an audit's page is given: charts, tables, the responses that are shown."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from kedge.report.audit import Audit, read_audit
from kedge.report.audit_charts import BINS_PER_DECADE, LOWEST, audit_charts
from kedge.report.audit_responses import audit_responses, choose, read_before
from kedge.report.audit_tables import clusters, facts, moved, needed, overview, quantiles, rows
from tests.report.audits import write_audit


@pytest.fixture(scope="module")
def audit(tmp_path_factory: pytest.TempPathFactory) -> Audit:
    return read_audit(write_audit(tmp_path_factory.mktemp("audit") / "out"))


def question(audit: Audit, name: str = "policy_responses") -> tuple[Mapping[str, Any], Any]:
    return audit.questions[name], audit.tokens[name]


def test_histograms_count_every_token(audit: Audit) -> None:
    summary, tokens = question(audit)
    by_tokens, by_sum, _ = audit_charts(summary, tokens, 0.95)
    values = tokens["reverse_kl"].to_pylist()
    for chart, weights in ((by_tokens, [1.0] * len(values)), (by_sum, values)):
        line = chart["lines"][0]
        assert line["mean"] == pytest.approx(summary["figures"]["reverse_kl"]["value"], rel=1e-3)
        assert math.fsum(line["y"]) == pytest.approx(100, abs=0.1)
        for low, high, share in zip(line["x"], line["x"][1:], line["y"], strict=False):
            inside = [w for v, w in zip(values, weights, strict=True) if 10**low <= v < 10**high]
            assert share == pytest.approx(100 * sum(inside) / sum(weights), rel=1e-3, abs=1e-9)


def test_a_kl_of_zero_has_a_bin(audit: Audit) -> None:
    from pyarrow import array, table

    summary, _ = question(audit)
    tokens = table({"reverse_kl": array([0.0, 1.0, math.inf]), "forward_kl": array([0.0, 0.0, 0.0])})
    by_tokens, by_sum, _ = audit_charts(summary, tokens, 0.95)
    assert by_tokens["lines"][0]["x"][0] == LOWEST
    assert by_tokens["lines"][0]["y"][0] == by_tokens["lines"][0]["y"][-1] == 50
    assert len(by_tokens["lines"][0]["y"]) == -LOWEST * BINS_PER_DECADE + 1
    assert [line["quantity"] for line in by_sum["lines"]] == ["KL(policy ‖ reference)"]


def test_the_band_is_that_of_the_confidence(audit: Audit) -> None:
    summary, tokens = question(audit, "texts")
    chart = audit_charts(summary, tokens, 0.9)[2]
    row, line = summary["by_position"][0], chart["lines"][1]
    assert line["high"][0] - line["y"][0] == pytest.approx(
        1.6449 * row["forward_kl_standard_error"], rel=1e-2
    )


def test_a_page_holds_so_many_tokens(audit: Audit) -> None:
    summary, tokens = question(audit, "texts")
    whole = audit_responses(summary, tokens)
    assert [row["cluster"] for row in whole["rows"]] == list(range(7))
    some = audit_responses(summary, tokens, most=40, longest=10)
    assert sum(len(row["text"]) for row in some["rows"]) == 40
    assert all(len(row["id"]) == 10 < row["count"] for row in some["rows"])
    assert (some["total"], some["total_tokens"]) == (7, tokens.num_rows)
    largest = max(whole["rows"], key=lambda row: row["means"]["reverse_kl"])
    assert largest["cluster"] in [row["cluster"] for row in some["rows"]]
    assert some["rows"][0]["cluster"] == 0


@pytest.mark.parametrize(
    ("lengths", "means", "most", "chosen"),
    [
        ([5, 5], [0.1, 0.2], 100, [0, 1]),
        ([90, 5], [0.1, 0.2], 10, [1]),
        ([90], [0.1], 10, [0]),
        ([1] * 6, [0.0, 0.0, 0.0, 0.0, 0.0, 9.0], 4, [0, 1, 2, 5]),
        ([3, 3, 3], [-math.inf, 0.1, 0.2], 6, [0, 2]),
    ],
)
def test_choosing(lengths: list[int], means: list[float], most: int, chosen: list[int]) -> None:
    found = choose(lengths, means, most)
    assert found == chosen
    assert sum(lengths[place] for place in found) <= max(most, lengths[found[0]])


@pytest.mark.parametrize(
    ("begins", "scored", "before"),
    [
        ("a b c", " b c", "a"),
        ("question: yes", "yes", "question: "),
        ("aaaa", "aaa", "a"),
        ("cut off he", "off here", "cut "),
    ],
)
def test_what_is_only_read(begins: str, scored: str, before: str) -> None:
    assert read_before(begins, scored) == before


def test_what_is_read_before_a_text_is_shown(audit: Audit) -> None:
    summary, tokens = question(audit, "texts")
    found = audit_responses(summary, tokens)
    for row, line in zip(found["rows"], summary["by_cluster"], strict=True):
        whole = found["texts"][row["before"]] + "".join(found["texts"][place] for place in row["text"])
        assert whole.startswith(line["text"])
        assert found["texts"][row["before"]]


def test_tables_say_what_the_summary_says(audit: Audit) -> None:
    first = overview(audit)[0]
    figures = audit.questions["policy_responses"]["figures"]
    assert first["token"].value.value == figures["reverse_kl"]["value"]
    assert first["response"].high.value == figures["reverse_kl_per_response"]["high"]
    assert [line["pair"] for line in overview(audit)] == [
        "KL(policy ‖ reference)",
        "KL(reference ‖ policy)",
        "KL(policy ‖ reference)",
        "KL(reference ‖ policy)",
    ]
    titles = [row.title for row in rows(audit.questions["policy_responses"])]
    assert titles[:3] == ["KL(policy ‖ reference)", "k1, sampled", "k3, sampled"]
    same = next(row for row in rows(audit.questions["policy_responses"]) if row.title.startswith("same"))
    assert same.value.value == pytest.approx(100 * figures["same_top_token"]["value"])
    assert len(quantiles(audit.questions["texts"])[0][1]) == 6
    assert dict(facts(audit))["responses"] == "2 a prompt, up to 12 tokens"


def test_the_worst_come_first(audit: Audit) -> None:
    for name, summary in audit.questions.items():
        key = summary["headline"][0]
        values = [row[key].value for row in clusters(summary)["rows"]]
        assert values == sorted(values, reverse=True), name
        lists = moved(summary)
        assert len(lists) == 4
        assert [place[key].value for place in lists[0]["places"]] == sorted(
            (place[key].value for place in lists[0]["places"]), reverse=True
        )


def test_an_unfinished_folder(tmp_path: Path) -> None:
    from kedge.errors import UserError

    (tmp_path / "measure.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        read_audit(tmp_path)


@pytest.mark.parametrize(
    ("half_width", "clusters", "samples", "said"),
    [
        (0.05, None, 320, "An interval of ± 0.050 nats per response needs 320 responses to this prompt."),
        (0.05, None, None, "A single prompt has no interval: give more."),
        (0.0, None, None, "The KL is 0, so there is no share of it for an interval to be as narrow as."),
        (
            None,
            None,
            None,
            "The KL is not finite, so there is no share of it for an interval to be as narrow as.",
        ),
    ],
)
def test_what_is_needed(
    half_width: float | None, clusters: int | None, samples: int | None, said: str
) -> None:
    wanted = {"half_width": half_width, "clusters": clusters, "samples_per_cluster": samples}
    assert needed({"needed": wanted, "cluster": "prompt"}) == said
