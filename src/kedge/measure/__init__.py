"""How far two models are apart: exact KL on sampled responses, on given texts, with error bars."""

from kedge.measure.compare import compare
from kedge.measure.config import MeasureConfig
from kedge.measure.result import Answer, Comparison, Floor
from kedge.measure.show import show
from kedge.measure.table import TokenTable
from kedge.runs.audit import SUMMARY, TOKENS, read_summary

__all__ = [
    "SUMMARY",
    "TOKENS",
    "Answer",
    "Comparison",
    "Floor",
    "MeasureConfig",
    "TokenTable",
    "compare",
    "read_summary",
    "show",
]
