from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from kedge.errors import RunError, UserError
from kedge.report import document, page, read_runs, write_report
from kedge.runs import RunDirectory
from tests.report.browser import CHROMIUM, OPTIONS

HOSTILE = [
    "</script><script>document.documentElement.dataset.owned='1'</script>",
    "<img src=x onerror=\"document.documentElement.dataset.owned='1'\">",
    "<svg onload=\"document.documentElement.dataset.owned='1'\"></svg>",
    "<!--<script>",
    "'\"><b>bold</b>",
    "line\u2028separator\u2029",
    "\u202eright to left\u202c \u0627\u0644\u0633\u0644\u0627\u0645",
    "\x00\x1b[31m\x7f\ufeff",
    "🐎👩‍🚀",
    "\ud83d",
    "{{ 7 * 7 }}",
]


class Elements(HTMLParser):
    """Every element's name and attributes, every script's text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.inside_script = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self.inside_script = tag == "script"
        if self.inside_script:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside_script = False

    def handle_data(self, data: str) -> None:
        if self.inside_script:
            self.scripts[-1] += data


def hostile_run(path: Path) -> Path:
    text = "".join(HOSTILE)
    config = {"method": text, "anchor": {"measure": text, "controller": {"kind": "fixed", "beta": 0.1}}}
    with RunDirectory.create(path, config, resume=False) as run:
        run.record_environment({"model": text, "command": HOSTILE, "started": text})
        run.metrics({"step": 0, "reward/<b>": 1.0, "eval/reward/<b>": 1.0, "eval/reward/mean": 1.0})
        prompts = ["", text, [{"role": "<i>user</i>", "content": text}]]
        for prompt in prompts:
            sample = {"prompt": prompt, "completion": text, "tokens": HOSTILE, "kl": [0.1] * len(HOSTILE)}
            more = {"reward": 1.0, "rewards": {"<b>": 1.0}, "finished": True}
            run.samples([{"step": 0, "kind": "evaluation", **sample, **more}])
    return path


def rendered(html: Path) -> str:
    """The document after its scripts have run, as headless Chromium writes it."""
    assert CHROMIUM is not None
    options = [*OPTIONS, "--virtual-time-budget=2000"]
    with tempfile.TemporaryDirectory() as profile:
        arguments = [CHROMIUM, *options, f"--user-data-dir={profile}", "--dump-dom", html.as_uri()]
        done = subprocess.run(arguments, capture_output=True, timeout=120, check=True)
    return done.stdout.decode(errors="replace")


def embedded(html: str) -> dict:
    return json.loads(next(text for text in Elements(html).scripts if text.startswith("{")))


def test_the_page_loads_nothing_from_outside(demo: Path, tmp_path: Path) -> None:
    html = write_report([demo], tmp_path / "out.html").read_text()
    for tag, attributes in Elements(html).found:
        assert tag not in {"link", "iframe", "img", "object", "embed", "base"}
        assert not {"src", "srcset", "action", "style"} & attributes.keys()
        assert not any(name.startswith("on") for name in attributes)
    assert "url(" not in html
    assert "@import" not in html
    policy = next(
        attributes["content"] for _, attributes in Elements(html).found if "http-equiv" in attributes
    )
    assert str(policy).startswith("default-src 'none'; ")
    assert html.count("<script") == len(page.SCRIPTS) + 1


def test_own_scripts_ask_for_nothing() -> None:
    for name in page.SCRIPTS:
        assert not re.search(
            r"\bfetch\(|XMLHttpRequest|WebSocket|import\(|\beval\(|innerHTML", document.asset(name)
        ), name


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_hostile_text_runs_nothing_and_is_shown(tmp_path: Path) -> None:
    html = write_report([hostile_run(tmp_path / "<b>run")], tmp_path / "out.html")
    dom = rendered(html)
    elements = Elements(dom)
    assert "data-owned" not in elements.found[0][1]
    tags = [tag for tag, _ in elements.found]
    assert "img" not in tags
    assert tags.count("script") == len(page.SCRIPTS) + 1
    assert "canvas" in tags
    shown = [attributes["data-token"] for tag, attributes in elements.found if "data-token" in attributes]
    assert shown[: len(HOSTILE)][:5] == HOSTILE[:5]
    assert "\u202e" not in re.sub(r'data-token="[^"]*"', "", dom)
    assert "<em>202E</em>" in dom
    assert "<em>0000</em>" in dom
    assert "49" not in re.findall(r"<dd>([^<]*)</dd>", dom)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_sentinel_of_the_hostile_test_can_fail(tmp_path: Path) -> None:
    html = tmp_path / "open.html"
    html.write_text(f"<html><body>{HOSTILE[1]}</body></html>")
    assert "data-owned" in Elements(rendered(html)).found[0][1]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_every_chart_and_sample_is_drawn(demo: Path, tmp_path: Path) -> None:
    html = write_report([demo], tmp_path / "out.html")
    dom = rendered(html)
    data = embedded(html.read_text())
    charts = sum(len(section["charts"]) for section in data["sections"])
    assert charts == 21
    assert dom.count("<canvas") == charts
    assert dom.count('class="sample"') == 4
    assert "Show all 8 prompts" in dom
    assert dom.count('class="toggle') == 4


def test_the_policy_names_the_scripts_as_they_stand(one_run: Callable[..., Path], tmp_path: Path) -> None:
    html = write_report([one_run()], tmp_path / "out.html").read_text()
    policy = next(a["content"] or "" for tag, a in Elements(html).found if a.get("http-equiv"))
    scripts = [text for text in Elements(html).scripts if not text.startswith("{")]
    assert len(scripts) == len(page.SCRIPTS)
    for text in scripts:
        assert document.digest(text) in policy
    assert "unsafe" not in policy


def test_several_runs_have_names_that_tell_them_apart(demo: Path, one_run: Callable[..., Path]) -> None:
    names = [run.name for run in read_runs([demo, one_run("exact-budget"), demo / "sft"])]
    stages = ["prose/sft", "prose/no-anchor", "prose/published-k3", "prose/exact-budget"]
    assert names == [*stages, f"{demo.parent.name}/exact-budget"]


def test_a_folder_of_runs_without_a_recipe_is_ordered_by_start(tmp_path: Path) -> None:
    for name, started in (("b", "2026-01-01"), ("a", "2026-01-02"), ("c", None)):
        run = RunDirectory.create(tmp_path / "runs" / name, {}, resume=False)
        run.metrics({"step": 0})
        if started:
            run.record_environment({"started": started})
    assert [run.name for run in read_runs([tmp_path / "runs"])] == ["b", "a", "c"]


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run directory"):
        write_report([tmp_path / "nowhere"], tmp_path / "out.html")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no run"):
        write_report([tmp_path / "empty"], tmp_path / "out.html")


def test_a_report_that_cannot_be_written(one_run: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="could not be written"):
        write_report([one_run()], tmp_path / "file" / "report.html")


def test_a_folder_gets_report_html(one_run: Callable[..., Path]) -> None:
    run = one_run(until=3)
    assert write_report([run], run) == run / "report.html"
    assert "3 of 120 · in progress" in (run / "report.html").read_text()


@pytest.mark.parametrize(
    "rows", [[], [{"step": 0}], [{"step": 1, "loss": float("nan")}], [{"step": 1, "reward/mean": 1.0}]]
)
def test_a_run_with_next_to_nothing(tmp_path: Path, rows: list[dict]) -> None:
    with RunDirectory.create(tmp_path / "run", {"method": "grpo", "steps": 5}, resume=False) as run:
        for row in rows:
            run.metrics(row)
    html = write_report([run.path], tmp_path / "out.html").read_text()
    assert "in progress" in html
    charts = [chart for section in embedded(html)["sections"] for chart in section["charts"]]
    assert len(charts) == (1 if rows and "reward/mean" in rows[0] else 0)


def test_reports_need_no_torch() -> None:
    check = "import sys, kedge.report; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)
