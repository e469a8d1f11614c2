"""The page: one HTML file with everything inside, that loads nothing and runs only its own scripts."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

import kedge
from kedge.errors import RunError
from kedge.report import description
from kedge.report.charts import sections
from kedge.report.comparison import comparison
from kedge.report.reading import Run, read_runs
from kedge.report.samples import sample_table

_SCRIPTS = (
    "vendor/uplot/uPlot.iife.min.js",
    "assets/format.js",
    "assets/state.js",
    "assets/charts.js",
    "assets/frontier.js",
    "assets/samples.js",
    "assets/page.js",
)
_STYLES = ("vendor/uplot/uPlot.min.css", "assets/report.css", "assets/charts.css", "assets/samples.css")

_INVISIBLE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)
# What could end a script element, open a comment in it, or end a line of JavaScript
_UNSAFE = re.compile(f"[<>&]|{_INVISIBLE.pattern}")


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Write a page about some runs that opens offline.

    It shows what ran, the comparison of the last evaluations, charts of rewards, KL against its budget, β,
    entropy, clip fractions and lengths, and responses before and after with every token's KL. Runs may still be
    in progress and metrics may be missing: what is there is shown.

    Args:
        runs: Run directories, or folders of run directories.
        out: The file to write, or a folder for ``report.html``.

    Returns:
        The file written.

    Raises:
        UserError: A path is no run directory, or a file in it is damaged.
        RunError: The file could not be written.

    >>> import tempfile
    >>> from kedge.runs import RunDirectory
    >>> run = RunDirectory.create(Path(tempfile.mkdtemp()) / "run", {"method": "grpo"}, resume=False)
    >>> run.metrics({"step": 1, "reward/mean": 0.5})
    >>> write_report([run.path], run.path).name
    'report.html'
    """
    file = out / "report.html" if out.is_dir() else out
    html = render(read_runs(runs))
    partial = file.with_name(f".{file.name}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(html, encoding="utf-8")
        os.replace(partial, file)
    except OSError as error:
        if partial.exists():
            partial.unlink()
        raise RunError(
            f"{file}: the report could not be written ({error.strerror}); "
            "choose another place or free some space, then `kedge report` again."
        ) from error
    return file


def render(runs: Sequence[Run]) -> str:
    """Render the page about runs that were read."""
    table = comparison(runs)
    names = [run.name for run in runs]
    folders = {run.path.parent for run in runs}
    data = {
        "runs": [{"name": name, "kind": run.kind} for name, run in zip(names, runs, strict=True)],
        "sections": sections(runs),
        "samples": sample_table(runs),
    }
    scripts = [_asset(name) for name in _SCRIPTS]
    styles = [_asset(name) for name in _STYLES]
    environment = Environment(
        autoescape=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.from_string(_asset("templates/report.html"))
    return template.render(
        title=folders.pop().name if len(runs) > 1 and len(folders) == 1 else " · ".join(names),
        policy=_policy(scripts, styles),
        scripts=[Markup(script) for script in scripts],
        styles=[Markup(style) for style in styles],
        data=Markup(embedded(data)),
        runs=description.lines(runs),
        facts=description.facts(runs),
        table=table,
        colours=names,
        version=kedge.__version__,
    )


def visible(text: str) -> str:
    r"""Write characters that are invisible, or that would reorder what surrounds them, by their codes.

    >>> visible("a\u202eb")
    'a[202E]b'
    """
    return _INVISIBLE.sub(lambda found: f"[{ord(found[0]):04X}]", text)


def embedded(data: Any) -> str:
    r"""Write JSON that can stand in a script element, whatever text is in it; half characters become U+FFFD.

    >>> embedded({"text": "</script>\u2028"})
    '{"text":"\\u003c/script\\u003e\\u2028"}'
    """
    text = json.dumps(data, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", whole)


def _policy(scripts: Sequence[str], styles: Sequence[str]) -> str:
    """Write a content security policy: the page's own scripts and styles by their hashes, and nothing from outside."""
    script = " ".join(_digest(text) for text in scripts)
    style = " ".join(_digest(text) for text in styles)
    return f"default-src 'none'; script-src {script}; style-src {style}; base-uri 'none'; form-action 'none'"


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _asset(name: str) -> str:
    return resources.files("kedge.report").joinpath(name).read_text(encoding="utf-8")
