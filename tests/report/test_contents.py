from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from kedge.report import comparison, figure, print_comparison, read_runs
from kedge.report.charts import MAX_POINTS, sections
from kedge.report.samples import MAX_PROMPTS, MAX_TOKENS, sample_table
from kedge.runs import RunDirectory


def printed(runs: list[Path], width: int) -> str:
    stream = io.StringIO()
    print_comparison(runs, Console(file=stream, width=width))
    return stream.getvalue()


def write_run(path: Path, rows: list[dict], samples: list[dict] | None = None, **config: object) -> Path:
    with RunDirectory.create(path, {"method": "grpo", **config}, resume=False) as run:
        for row in rows:
            run.metrics(row)
        run.samples(samples or [])
    return path


def chart(found: list[dict], title: str) -> dict:
    return next(chart for section in found for chart in section["charts"] if chart["title"] == title)


@pytest.mark.parametrize(
    ("value", "decimals", "text"),
    [
        (0.12345, 4, "0.1235"),
        (0.0004, 3, "4.0e-04"),
        (0.0005, 3, "0.001"),
        (-0.5, 1, "-0.5"),
        (999.96, 1, "1000.0"),
        (1000, 1, "1,000"),
        (3e12, 1, "3.00e+12"),
        (-math.inf, 1, "-∞"),
    ],
)
def test_figures(value: float, decimals: int, text: str) -> None:
    assert figure(value, decimals) == text


def test_the_table_of_the_demonstration(demo: Path) -> None:
    table = comparison([demo])
    assert [row.run for row in table.rows] == ["start", "no-anchor", "published-k3", "exact-budget"]
    assert [row.step for row in table.rows] == [0, 120, 120, 120]
    assert [f"{column.title} {column.unit}" for column in table.columns] == [
        "reward proxy",
        "reward gold",
        "reward grammatical",
        "KL nats/token",
        "KL nats/response",
        "entropy nats/token",
        "perplexity under reference",
        "length tokens",
        "cut off %",
    ]
    rows = read_runs([demo / "exact-budget"])[0].metrics
    gold = table.columns[1]
    last = table.rows[3]
    assert last.values["reward/gold"] == rows[-1]["eval/reward/gold"]
    assert last.text(gold) == f"{rows[-1]['eval/reward/gold']:.3f} ± 0.020"
    assert last.text(gold, errors=False) == f"{rows[-1]['eval/reward/gold']:.3f}"


@pytest.mark.parametrize("width", [60, 80, 100, 160, 300])
def test_the_table_fits_the_terminal_uncut(demo: Path, width: int) -> None:
    text = printed([demo], width)
    assert all(len(line) <= width for line in text.splitlines())
    if width >= 80:
        assert "…" not in text
        assert text.count("exact-budget") == 1
        assert "published-k3" in text
    assert ("±" in text) == (width > 80)


def test_runs_with_different_starts_say_so(one_run: Callable[..., Path], tmp_path: Path) -> None:
    other = write_run(
        tmp_path / "other", [{"step": 0, "eval/reward/mean": 9.0}, {"step": 5, "eval/reward/mean": 9.5}]
    )
    names = [row.run for row in comparison([one_run("first"), other]).rows]
    assert names == ["start of first", "start of other", "first", "other"]


def test_missing_values_are_dashes_and_missing_columns_go(tmp_path: Path) -> None:
    full = {"step": 0, "eval/reward/gold": 1.0, "eval/kl/policy_reference/exact": 0.1}
    first = write_run(tmp_path / "a", [full])
    second = write_run(tmp_path / "b", [{"step": 4, "eval/reward/gold": 2.0, "reward/gold": 1.0}])
    third = write_run(tmp_path / "c", [{"step": 7, "reward/gold": 1.0}])
    table = comparison([first, second, third])
    assert [column.metric for column in table.columns] == ["reward/gold", "kl/policy_reference/exact"]
    assert [[row.text(column) for column in table.columns] for row in table.rows] == [
        ["1.000", "0.1000"],
        ["2.000", "–"],
        ["–", "–"],
    ]
    assert [row.step for row in table.rows] == [0, 4, 7]


def test_supervised_runs_have_a_table_of_their_own(demo: Path) -> None:
    table = comparison([demo / "sft"])
    assert [column.title for column in table.columns] == [
        "cross-entropy",
        "H(data)",
        "KL(data‖policy)",
        "perplexity",
    ]
    values = table.rows[0].values
    assert values["cross_entropy/data_policy"] == pytest.approx(
        values["entropy/data"] + values["kl/data_policy"]
    )


def test_a_reward_model_has_charts_and_columns_of_its_own(tmp_path: Path) -> None:
    row = {"step": 0, "eval/preference/accuracy": 0.7, "eval/preference/accuracy_bayes": 0.8}
    row |= {"eval/preference/calibration_error": 0.05, "preference/cross_entropy": 0.6}
    place = write_run(tmp_path / "run", [row], method="reward")
    table = comparison([place])
    assert [column.title for column in table.columns] == ["accuracy", "accuracy", "calibration error"]
    (run,) = read_runs([place])
    (section,) = sections([run])
    assert section["title"] == "Reward model"
    assert [chart["title"] for chart in section["charts"]] == ["Accuracy", "Cross-entropy", "Calibration"]
    assert [line["quantity"] for line in section["charts"][0]["lines"]] == ["", "at best"]


def test_what_only_ppo_records_is_drawn_for_ppo_only(tmp_path: Path) -> None:
    """The critic has a section; the penalty's β and its target a chart each, or a line."""
    row = {"critic/explained_variance": 0.5, "critic/value_mean": 1.0, "critic/return_mean": 1.1}
    row |= {"trust_region/beta": 2.0, "kl/old_policy/exact_after_step": 0.02, "trust_region/target": 0.01}
    plain = {"reward/mean": 1.0, "kl/policy_reference/exact": 0.1}
    ppo = write_run(tmp_path / "ppo", [{"step": step, **plain, **row} for step in range(3)])
    grpo = write_run(tmp_path / "grpo", [{"step": step, **plain} for step in range(3)])
    found = sections(read_runs([ppo]))
    critic = next(section for section in found if section["title"] == "Critic")
    assert [each["title"] for each in critic["charts"]] == ["Explained variance", "Values and returns"]
    assert [line["quantity"] for line in critic["charts"][1]["lines"]] == ["values", "returns"]
    assert chart(found, "β of the penalty")["lines"][0]["y"] == [2.0] * 3
    assert len(chart(found, "KL(old ‖ policy) after the step")["lines"]) == 2
    without = sections(read_runs([grpo]))
    assert "Critic" not in [section["title"] for section in without]
    assert not any("penalty" in each["title"] for section in without for each in section["charts"])


def test_names_with_a_standard_error_are_no_rewards(tmp_path: Path) -> None:
    row = {"step": 0, "eval/reward/mean": 1.0, "eval/reward/mean_se": 0.1, "eval/reward/std": 1.0}
    row |= {"eval/reward/gold": 1.0, "eval/reward/gold_se": 0.1, "eval/reward/house_se": 3.0}
    (run,) = read_runs([write_run(tmp_path / "run", [row])])
    assert list(run.rewards) == ["gold", "house_se"]


def test_the_kl_stands_against_its_budget(demo: Path) -> None:
    found = sections(read_runs([demo]))
    lines = chart(found, "KL(policy ‖ reference)")["lines"]
    budget = [line for line in lines if line["style"] == "dash"]
    assert [line["run"] for line in budget] == [3]
    assert set(budget[0]["y"]) == {0.2}
    held_out = next(line for line in lines if line["run"] == 3 and line["style"] == "points")
    assert held_out["x"] == [0, 20, 40, 60, 80, 100, 120]
    assert chart(found, "β")["log"]


@pytest.mark.parametrize(("kl", "log"), [(0.3, False), (5.0, True)])
def test_a_run_far_above_a_budget_does_not_flatten_it(tmp_path: Path, kl: float, log: bool) -> None:
    name = "kl/policy_reference/exact"
    held = write_run(tmp_path / "a", [{"step": 1, name: 0.2, "anchor/budget": 0.2}])
    free = write_run(tmp_path / "b", [{"step": 1, name: kl}])
    assert chart(sections(read_runs([held, free])), "KL(policy ‖ reference)")["log"] is log


def test_a_reward_that_is_the_sum_is_drawn_once(demo: Path, tmp_path: Path) -> None:
    rewards = next(s for s in sections(read_runs([demo])) if s["title"] == "Reward")
    assert [(c["title"], c["unit"]) for c in rewards["charts"]] == [
        ("Reward: proxy", "trained on"),
        ("Reward: gold", ""),
        ("Reward: grammatical", ""),
    ]
    mixed = write_run(tmp_path / "mixed", [{"step": 1, "reward/mean": 3.0, "reward/a": 1.0, "reward/b": 2.0}])
    rewards = next(s for s in sections(read_runs([mixed])) if s["title"] == "Reward")
    assert [c["title"] for c in rewards["charts"]] == ["Reward", "Reward: a", "Reward: b"]


def test_rewards_against_the_root_of_the_kl(tmp_path: Path) -> None:
    rows = [
        {
            "step": step,
            "eval/reward/gold": step / 10,
            "eval/kl/policy_reference/exact_per_response": float(step**2),
        }
        for step in range(4)
    ]
    found = sections(read_runs([write_run(tmp_path / "run", rows)]))
    (section,) = [section for section in found if section["title"] == "Reward against distance"]
    (line,) = section["charts"][0]["lines"]
    assert line["x"] == [0, 1, 2, 3]
    assert line["y"] == [0, 0.1, 0.2, 0.3]
    assert line["step"] == [0, 1, 2, 3]


def test_long_runs_are_thinned_by_means_and_gaps_stay_gaps(tmp_path: Path) -> None:
    count = 3 * MAX_POINTS
    rows = [{"step": step, "reward/mean": float(step % 3), "loss": 0.0} for step in range(count)]
    rows[0]["reward/mean"] = rows[1]["reward/mean"] = rows[2]["reward/mean"] = math.nan
    path = write_run(tmp_path / "run", [])
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (line,) = chart(sections(read_runs([path])), "Reward")["lines"]
    assert len(line["x"]) == MAX_POINTS
    assert line["x"][-1] == count - 1
    assert line["y"][0] is None
    assert set(line["y"][1:]) == {1.0}


def sample(step: int, prompt: object, text: str, **more: object) -> dict:
    row = {"step": step, "kind": "evaluation", "prompt": prompt, "completion": text}
    return {
        **row,
        "tokens": text.split(),
        "kl": [0.5] * len(text.split()),
        "reward": 1.0,
        "rewards": {},
        **more,
    }


def test_samples_stand_side_by_side_for_the_same_prompts(tmp_path: Path) -> None:
    rows = [{"step": 0, "reward/mean": 0.0}, {"step": 9, "reward/mean": 0.0}]
    start = [sample(0, "p", "a b"), sample(0, "q", "c"), sample(0, "q", "d")]
    first = write_run(
        tmp_path / "a", rows, [*start, sample(9, "q", "e"), sample(9, "p", "f"), sample(9, "q", "g")]
    )
    second = write_run(tmp_path / "b", rows, [*start, sample(4, "p", "skipped"), sample(9, "p", "h")])
    table = sample_table(read_runs([first, second]))
    assert [(column["title"], column["step"]) for column in table["columns"]] == [
        ("start", 0),
        ("a", 9),
        ("b", 9),
    ]
    cells = [[cell and cell["tokens"] for cell in row["cells"]] for row in table["rows"]]
    assert cells == [[["a", "b"], ["f"], ["h"]], [["c"], ["e"], None], [["d"], ["g"], None]]
    assert [row["prompt"][0]["text"] for row in table["rows"]] == ["p", "q", "q"]
    assert table["rows"][0]["cells"][0]["total"] == 1.0


def test_words_that_were_decoded_alone_stand_apart_again(tmp_path: Path) -> None:
    row = sample(0, "p", "")
    words = {
        **row,
        "completion": "the dog runs .\n it ran",
        "tokens": ["the", "dog", "runs", ".", "it", "ran", "<eos>"],
    }
    pieces = {**row, "prompt": "q", "completion": " the dog", "tokens": [" the", " d", "og"]}
    bytes_ = {**row, "prompt": "r", "completion": "é x", "tokens": ["\ufffd", "\ufffd", " x"]}
    rows = sample_table(read_runs([write_run(tmp_path / "a", [{"step": 0}], [words, pieces, bytes_])]))[
        "rows"
    ]
    assert [row["cells"][0]["gaps"] for row in rows] == [
        ["", " ", " ", " ", "\n ", " ", ""],
        ["", "", ""],
        ["", "", ""],
    ]


def test_runs_that_start_apart_keep_their_own_starts(tmp_path: Path) -> None:
    rows = [{"step": 9, "reward/mean": 0.0}]
    first = write_run(tmp_path / "a", rows, [sample(0, "p", "a"), sample(9, "p", "b")])
    second = write_run(tmp_path / "b", rows, [sample(0, "p", "c"), sample(9, "p", "d")])
    columns = sample_table(read_runs([first, second]))["columns"]
    assert [(column["title"], column["step"]) for column in columns] == [
        ("a", 0),
        ("a", 9),
        ("b", 0),
        ("b", 9),
    ]


def test_samples_are_bounded(tmp_path: Path) -> None:
    many = [sample(0, f"p{i}", "x " * (MAX_TOKENS + 7)) for i in range(MAX_PROMPTS + 3)]
    table = sample_table(read_runs([write_run(tmp_path / "a", [{"step": 0}], many)]))
    assert len(table["rows"]) == MAX_PROMPTS
    assert table["left_out"] == 3
    cell = table["rows"][0]["cells"][0]
    assert len(cell["tokens"]) == MAX_TOKENS
    assert cell["more"] == 7
    assert cell["total"] == pytest.approx(0.5 * (MAX_TOKENS + 7))


def test_chat_prompts_keep_their_roles(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
    table = sample_table(read_runs([write_run(tmp_path / "a", [{"step": 0}], [sample(0, messages, "hi")])]))
    assert table["rows"][0]["prompt"] == [
        {"role": "system", "text": "be kind"},
        {"role": "user", "text": "hello"},
    ]
