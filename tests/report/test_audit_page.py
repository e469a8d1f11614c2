"""The page about an audit, in a browser: drawn, safe, explained under the mouse, at a tap, from the keyboard."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyarrow import parquet

from kedge.cli import main
from kedge.errors import RunError, UserError
from kedge.report import audit_page, document, write_audit_page
from tests.report.audits import HOSTILE, change, write_audit
from tests.report.browser import CHROMIUM, Browser
from tests.report.test_page import Elements, embedded

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
TEXTS = "[data-responses=texts]"
RESPONSES = "[data-responses=policy_responses]"


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hostile audit, in files that are hostile beyond what was measured."""
    folder = write_audit(tmp_path_factory.mktemp("audit") / "<b>out")
    text = "".join(HOSTILE)
    side = {"source": text, "architecture": text, "parameters": 1, "dtype": text, "context": None}
    side |= {"vocabulary_rows": 1, "fingerprint": text}
    change(folder, policy=side, notes=[text], environment={"command": HOSTILE, "started": text})
    return folder


@pytest.fixture(scope="module")
def page(measured: Path) -> Path:
    return write_audit_page(measured)


@pytest.fixture(scope="module")
def wide(page: Path) -> Iterator[Browser]:
    with Browser() as browser:
        browser.open(page)
        yield browser


def test_the_page_loads_nothing_from_outside(page: Path) -> None:
    html = page.read_text(encoding="utf-8")
    found = Elements(html)
    for tag, attributes in found.found:
        assert tag not in {"link", "iframe", "img", "object", "embed", "base"}
        assert not {"src", "srcset", "action", "style"} & attributes.keys()
        assert not any(name.startswith("on") for name in attributes)
        assert tag != "a" or str(attributes["href"]).startswith("#")
    policy = next(str(attributes["content"]) for _, attributes in found.found if "http-equiv" in attributes)
    assert policy.startswith("default-src 'none'; ")
    scripts = [text for text in found.scripts if not text.startswith("{")]
    assert len(scripts) == len(audit_page.SCRIPTS)
    assert all(document.digest(text) in policy for text in scripts)
    for name in audit_page.SCRIPTS:
        code = document.asset(name)
        assert not re.search(r"\bfetch\(|XMLHttpRequest|WebSocket|import\(|\beval\(|innerHTML", code), name


@needs_browser
def test_hostile_text_runs_nothing_and_is_shown(wide: Browser) -> None:
    assert wide.errors() == []
    assert wide.run("document.documentElement.dataset.owned") is None
    assert wide.run("document.scripts.length") == len(audit_page.SCRIPTS) + 1
    assert wide.run("document.querySelectorAll('img, iframe, main svg, .tokens b').length") == 0
    shown = wide.run("document.body.innerText")
    assert "onerror=" in shown
    assert "{{ 7 * 7 }}" in shown
    assert "49" not in re.findall(r"\{\{|\b49\b", wide.run("document.querySelector('h1').innerText"))
    invisible = "[\u0000-\u0008\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]"
    assert not re.search(invisible, wide.run("document.body.innerText"))
    codes = wide.run(f"[...document.querySelectorAll('{TEXTS} em')].map(e => e.textContent)")
    assert {"202E", "0000", "001B", "FEFF"} <= set(codes)


@needs_browser
def test_the_sentinel_of_the_hostile_test_can_fail(tmp_path: Path) -> None:
    (tmp_path / "open.html").write_text(f"<html><body>{HOSTILE[1]}</body></html>")
    with Browser() as browser:
        browser.open(tmp_path / "open.html")
        assert browser.run("document.documentElement.dataset.owned") == "1"


@needs_browser
def test_texts_are_shown_whole(wide: Browser, measured: Path) -> None:
    """Tokens put together are the text but for its first token, an emoji over several tokens included."""
    wide.click(f"{TEXTS} .more")
    rows = wide.run(
        f"[...document.querySelectorAll('{TEXTS} .sample')].map(sample =>"
        " [...sample.querySelectorAll('.tokens > span')].map(span => span.textContent).join(''))"
    )
    assert len(rows) == len(HOSTILE)
    assert HOSTILE[1].endswith(rows[1])
    assert "🐎👩‍🚀" in rows[5]
    assert wide.run(f"document.querySelectorAll('{TEXTS} .tokens > .part').length") > 4
    width = "document.documentElement.scrollWidth <= innerWidth"
    assert wide.run(width)


@needs_browser
def test_hovering_tells_everything_of_a_token(wide: Browser, measured: Path) -> None:
    wide.hover(f"{RESPONSES} .sample:nth-of-type(2) .tokens > span:nth-child(4)")
    found = wide.run("document.querySelector('.tip').innerText").split()
    rows = parquet.read_table(measured / "tokens.parquet").to_pylist()
    (row,) = [
        row
        for row in rows
        if (row["question"], row["response"], row["position"]) == ("policy_responses", 1, 3)
    ]
    assert ["id", f"{row['token']},"] == found[found.index("id") :][:2]
    for name in ("reverse_kl", "forward_kl", "policy_log_prob", "reference_entropy"):
        assert f"{row[name]:.3f}" in found, name
    wide.hover("h1")
    assert wide.run("document.querySelector('.tip')") is None


@needs_browser
def test_the_keyboard_reaches_every_token(wide: Browser) -> None:
    first = f"{RESPONSES} .sample:nth-of-type(3) .tokens > span"
    wide.run(f"document.querySelector('{first}').focus()")
    place = "Number(document.activeElement.dataset.index)"
    for key, code, expected in (("ArrowRight", 39, 1), ("ArrowRight", 39, 2), ("ArrowLeft", 37, 1)):
        wide.press(key, code)
        assert wide.run(place) == expected
        assert f"position {expected}" in wide.run("document.querySelector('.tip').innerText")
    wide.press("End", 35)
    assert wide.run("document.activeElement.nextSibling") is None
    assert wide.run("document.activeElement.getAttribute('aria-describedby')") == "tip"
    stops = wide.run(f"[...document.querySelectorAll('{first}')].filter(e => e.tabIndex === 0).length")
    assert stops == 1
    wide.press("Escape", 27)
    assert wide.run("document.querySelector('.tip')") is None


@needs_browser
def test_bits_colours_and_order(wide: Browser) -> None:
    lead = "document.querySelector('.lead [data-nats]')"
    nats = float(wide.run(f"{lead}.dataset.nats"))
    assert wide.run(f"{lead}.textContent") == f"{nats:.4f}"
    wide.click("#unit [data-value=bits]")
    assert float(wide.run(f"{lead}.textContent")) == pytest.approx(nats / 0.6931472, abs=1e-4)
    wide.click("#unit [data-value=nats]")
    spans = f"[...document.querySelectorAll('{RESPONSES} .tokens > span')]"
    colour = f"{spans}.map(span => span.style.backgroundColor).join(' ')"
    before = wide.run(colour)
    wide.click("#direction [data-value=forward_kl]")
    assert wide.run(colour) != before
    wide.click(f"{RESPONSES} .switch button:nth-child(2)")
    heads = wide.run(
        f"[...document.querySelectorAll('{RESPONSES} .cell-head')].map(e => e.lastChild.textContent)"
    )
    values = [float(head.split()[-1]) for head in heads]
    assert values == sorted(values, reverse=True)


@needs_browser
def test_a_narrow_dark_screen(page: Path) -> None:
    with Browser(420, 800, dark=True) as browser:
        browser.open(page)
        assert browser.run("document.documentElement.scrollWidth") == 420
        assert browser.run("document.querySelectorAll('canvas').length") == 9
        browser.tap(f"{RESPONSES} .tokens > span:nth-child(2)")
        browser.until("document.querySelector('.tip') !== null")
        assert "position 1" in browser.run("document.querySelector('.tip').innerText")
        assert browser.run("document.querySelector('.tip').getBoundingClientRect().right") <= 420
        assert browser.errors() == []


@needs_browser
def test_equal_models_without_intervals(tmp_path: Path) -> None:
    """One text, one model: no KL to draw, no interval; the page stands."""
    folder = write_audit(tmp_path / "out", prompts=None, texts=HOSTILE[:1])
    change(folder, partial=True)
    html = write_audit_page(folder)
    assert "The measurement was interrupted" in html.read_text(encoding="utf-8")
    with Browser() as browser:
        browser.open(html)
        assert browser.errors() == []
        assert "–" in browser.run("document.querySelector('.values').innerText")


def test_what_is_embedded_is_what_was_measured(page: Path, measured: Path) -> None:
    data = embedded(page.read_text(encoding="utf-8"))["questions"]
    rows = parquet.read_table(measured / "tokens.parquet").to_pylist()
    for name, question in data.items():
        shown = question["responses"]
        theirs = [row for row in rows if row["question"] == name]
        assert shown["total_tokens"] == len(theirs)
        ids = [number for row in shown["rows"] for number in row["id"]]
        assert ids == [row["token"] for row in theirs]
        texts = [shown["texts"][place] for row in shown["rows"] for place in row["text"]]
        assert texts == [row["text"] for row in theirs]
        kl = [value for row in shown["rows"] for value in row["forward_kl"]]
        assert kl == pytest.approx([row["forward_kl"] for row in theirs], rel=1e-3)


def test_the_command_writes_it_again(
    measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(measured, folder)
    (folder / "measure.html").unlink(missing_ok=True)
    assert main(["report", str(folder)]) == 0
    assert (folder / "measure.html").stat().st_size > 10_000
    assert main(["report", str(folder), "--out", "x.html"]) == 2
    assert "its page goes into it" in capsys.readouterr().err


def test_what_is_no_audit_is_refused(measured: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        write_audit_page(tmp_path)
    folder = tmp_path / "out"
    shutil.copytree(measured, folder)
    (folder / "tokens.parquet").write_bytes(b"PAR1 is how it begins, and then it is damaged")
    with pytest.raises(UserError, match=r"tokens\.parquet: cannot be read"):
        write_audit_page(folder)
    (folder / "tokens.parquet").unlink()
    with pytest.raises(UserError, match=r"tokens\.parquet: cannot be read"):
        write_audit_page(folder)


def test_a_page_that_cannot_be_written(measured: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(measured, folder)
    (folder / "measure.html").unlink(missing_ok=True)
    (folder / "measure.html").mkdir()
    with pytest.raises(RunError, match="could not be written"):
        write_audit_page(folder)


def test_reading_needs_no_torch(measured: Path) -> None:
    import subprocess
    import sys

    check = "import sys; from pathlib import Path; from kedge.report import write_audit_page;"
    check += "write_audit_page(Path(sys.argv[1])); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check, str(measured)], check=True)
    assert json.loads((measured / "measure.json").read_text(encoding="utf-8"))
