"""What runs and audits left behind, shown: self-contained pages, and a table for the terminal.

``kedge.report`` never imports PyTorch.
"""

from kedge.report.audit_page import write_audit_page
from kedge.report.comparison import Column, Comparison, Row, comparison, print_comparison
from kedge.report.numbers import figure
from kedge.report.page import write_report
from kedge.report.reading import Run, read_runs

__all__ = [
    "Column",
    "Comparison",
    "Row",
    "Run",
    "comparison",
    "figure",
    "print_comparison",
    "read_runs",
    "write_audit_page",
    "write_report",
]
