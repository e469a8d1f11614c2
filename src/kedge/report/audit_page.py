"""The page about an audit: how far two models are apart, where, in which tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kedge.report import audit_tables as tables
from kedge.report import document
from kedge.report.audit import Audit, number, read_audit
from kedge.report.audit_charts import audit_charts
from kedge.report.audit_responses import audit_responses
from kedge.runs.audit import PAGE

SCRIPTS = (
    "vendor/uplot/uPlot.iife.min.js",
    "assets/format.js",
    "assets/state.js",
    "assets/axes.js",
    "assets/tokens.js",
    "assets/audit-charts.js",
    "assets/audit-responses.js",
    "assets/controls.js",
    "assets/audit.js",
)
STYLES = (
    "vendor/uplot/uPlot.min.css",
    "assets/report.css",
    "assets/charts.css",
    "assets/tokens.css",
    "assets/samples.css",
    "assets/audit.css",
)


def write_audit_page(directory: Path) -> Path:
    """Write ``measure.html`` into the folder of a comparison: one page that opens offline.

    It holds every figure of ``measure.json``. Of single tokens it holds so many that it stays small, and says
    which; all of them are in ``tokens.parquet``.

    Args:
        directory: What ``kedge measure`` or ``kedge.measure.compare(..., out=…)`` wrote.

    Returns:
        The file written.

    Raises:
        UserError: It holds no comparison, or a file in it is damaged.
        RunError: The page could not be written.
    """
    return document.write_page(directory / PAGE, render(read_audit(directory)), f"kedge report {directory}")


def render(audit: Audit) -> str:
    """Render the page about an audit that was read."""
    confidence = float(audit.summary["settings"]["confidence"])
    names = [Path(str(audit.summary[side]["source"])).name for side in ("policy", "reference")]
    data = {
        name: {
            "charts": audit_charts(question, audit.tokens[name], confidence),
            "responses": audit_responses(question, audit.tokens[name]),
        }
        for name, question in audit.questions.items()
    }
    policy, reference = (
        names if len(set(names)) == 2 else [audit.summary[s]["source"] for s in ("policy", "reference")]
    )
    return document.render(
        "audit.html",
        SCRIPTS,
        STYLES,
        {"questions": data},
        title=f"{policy} against {reference}",
        partial=audit.summary["partial"],
        notes=audit.summary["notes"],
        confidence=f"{100 * confidence:g}%",
        overview=tables.overview(audit),
        models=tables.models(audit),
        facts=tables.facts(audit),
        quantile_titles=list(tables.QUANTILES.values()),
        questions=[_question(name, question) for name, question in audit.questions.items()],
    )


def _question(name: str, question: Any) -> dict[str, Any]:
    return {
        "name": name,
        "title": question["title"],
        "cluster": question["cluster"],
        "partial": question["partial"],
        "estimates": question["estimates"],
        "counts": tables.counts(question),
        "rows": tables.rows(question),
        "correlation": tables.Cell(number(question["log_prob_correlation"]), 4, nats=False),
        "quantiles": tables.quantiles(question),
        "changes": tables.changes(question),
        "floors": tables.floors(question),
        "needed": tables.needed(question),
        "moved": tables.moved(question),
        "vocabulary": tables.vocabulary(question),
        "clusters": tables.clusters(question),
    }
