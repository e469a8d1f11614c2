"""How far two models are apart: exact KL on sampled responses, on given texts, with error bars."""

from kedge.measure.compare import compare
from kedge.measure.config import MeasureConfig
from kedge.measure.files import SUMMARY, TOKENS, read_summary
from kedge.measure.result import Answer, Comparison, Floor
from kedge.measure.show import show
from kedge.measure.table import TokenTable

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
