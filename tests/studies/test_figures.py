"""What the studies say of their runs: sums, tables, figures, on a few rows and on ones that are NaN."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from studies import modes, overoptimisation, trust_region
from studies.overoptimisation import FREE, GOLD, KL, PROXY
from studies.runs import mean_and_error, rows, shown


def write(folder: Path, stage: str, lines: list[dict[str, Any]]) -> None:
    """Write a stage's metrics, NaN as null, as a run does."""
    plain = [{key: None if math.isnan(value) else value for key, value in line.items()} for line in lines]
    (folder / stage).mkdir(parents=True)
    (folder / stage / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in plain))


def test_the_budget_is_chosen_on_the_first_seeds_alone() -> None:
    def run(gold: float) -> list[dict[str, float]]:
        return [{GOLD: gold, "step": 80.0}]

    found = {name: [run(0.1)] * 3 for name in overoptimisation.anchors()}
    found["budget 0.2"] = [run(0.5), run(0.5), run(0.3)]
    found["budget 0.4"] = [run(0.4), run(0.4), run(0.9)]
    chosen = overoptimisation.chosen_budget(found)
    assert chosen["chosen on the first seeds"] == "budget 0.2"
    assert chosen["gold on the others"]["budget 0.2"] == "0.300"
    assert chosen["of the peak"] == pytest.approx(0.3 / 0.9)


def test_rows_are_those_with_the_key(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    lines = [{"step": 0, "eval/x": 1.0}, {"step": 1, "y": 2.0}]
    (tmp_path / "a" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert rows(tmp_path, "a", "eval/x") == [{"step": 0.0, "eval/x": 1.0}]


def test_a_mean_with_nan_is_nan() -> None:
    assert mean_and_error([1.0, 3.0]) == (2.0, 1.0)
    assert all(map(math.isnan, mean_and_error([math.nan, 3.0])))
    assert shown([3.0, math.nan]) == "nan"


def evaluation(step: int, proxy: float, gold: float, kl: float) -> dict[str, float]:
    return {"step": step, PROXY: proxy, GOLD: gold, KL: kl, "eval/reward/grammatical": 0.5}


@pytest.mark.parametrize("bad", [False, True], ids=["finite", "nan"])
def test_overoptimisation_from_rows_to_figure(
    bad: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The proxy counts from the start of its seed, and the peak is the largest gold that is a number."""
    folders = [tmp_path / "seed-0", tmp_path / "seed-1"]
    for seed, folder in enumerate(folders):
        middle = math.nan if bad and seed == 1 else 4.0
        for setting in overoptimisation.anchors():
            looks = [evaluation(0, -1.0 - seed, 0.25, 0.0), evaluation(80, 2.0 - seed, 0.75, middle)]
            if setting == FREE:
                looks[1:1] = [
                    evaluation(4, 1.0, math.nan if bad else 0.5, 1.0),
                    evaluation(8, 1.0, 0.875, 1.0),
                ]
            write(folder, overoptimisation.stage_name(setting), [*looks, {"step": 80, "loss": 1.0}])
    found = overoptimisation.collect(folders)
    assert [row[PROXY] for row in found["budget 0.2"][1]] == [0.0, 3.0]
    table = {row["setting"]: row for row in overoptimisation.show(found)}
    assert table["budget 0.2"]["√KL"] == ("nan" if bad else "2.00 ± 0.00")
    assert table["budget 0.2"]["proxy"] == "3.00 ± 0.00"
    assert table["no anchor, at its most gold"]["gold"] == "0.88 ± 0.00"
    assert table["SFT"]["gold"] == "0.25 ± 0.00"
    assert "budget 0.2" in capsys.readouterr().out
    overoptimisation.draw(found, tmp_path / "figure.svg")
    assert "<svg" in (tmp_path / "figure.svg").read_text()


@pytest.mark.parametrize("bad", [False, True], ids=["finite", "nan"])
def test_trust_region_from_rows_to_figure(
    bad: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = [
        {
            trust_region.OLD_KL: 0.1,
            "kl/old_policy/exact_after_step": kl,
            "trust_region/clip_fraction_low": 0.25,
            "trust_region/clip_fraction_high": 0.5,
            "trust_region/beta": 2.0,
            "gradient/norm": kl,
        }
        for kl in (1.0, 2.0, 6.0)
    ]
    for region in trust_region.REGIONS:
        for rate in trust_region.RATES:
            reward = math.nan if bad and rate == trust_region.RATES[0] else 5.0
            looks = [{"step": 0, trust_region.REWARD: 1.0, trust_region.KL: 0.0}]
            lines = [{"step": number, **step} for number, step in enumerate(steps, 1)]
            lines[-1] |= {trust_region.REWARD: reward, trust_region.KL: 10.0}
            write(tmp_path, trust_region.stage_name(region, rate), [*looks, *lines])
    found = {
        region: {rate: [trust_region.summary(tmp_path, region, rate)] for rate in trust_region.RATES}
        for region in trust_region.REGIONS
    }
    last = found["none"][trust_region.RATES[-1]][0]
    assert last == {
        "start": 1.0,
        "reached": pytest.approx(5.0 - trust_region.BETA * 10),
        "KL of a step": 2.0,
        "largest": 6.0,
        "clipped": 0.75,
        "masked": 0.0,
        "β": 2.0,
        "gradient": 2.0,
        "largest gradient": 6.0,
    }
    table = trust_region.show(found)
    assert len(table) == len(trust_region.REGIONS) * len(trust_region.RATES)
    assert table[0]["reached"] == ("nan" if bad else "2.00")
    assert "mask TV 0.1" in capsys.readouterr().out
    trust_region.draw(found, tmp_path / "figure.svg")
    assert "<svg" in (tmp_path / "figure.svg").read_text()


def test_modes_from_fits_to_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forward, left, right = modes.same_moments(), modes.least_reverse(-2.0), modes.least_reverse(2.4)
    found = {
        "forward, closed form": forward,
        "SFT on samples of ρ": forward,
        "reverse, left minimum": left,
        "reverse, right minimum": right,
    }
    modes.show([modes.fitted(how, logits) for how, logits in found.items()])
    assert "0.4949" in capsys.readouterr().out
    modes.draw(found, tmp_path / "figure.svg")
    assert "<svg" in (tmp_path / "figure.svg").read_text()
