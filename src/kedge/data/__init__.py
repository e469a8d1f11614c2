"""Data: rows from files and datasets, prompts and examples as tokens, the order of a run."""

from kedge.data.encode import encode_example, encode_prompt
from kedge.data.load import load_rows, names_dataset
from kedge.data.order import Order
from kedge.data.pairs import Pair, encode_pair, format_pairs
from kedge.data.rows import Row, Rows
from kedge.data.template import Messages, Text, check_messages, format_rows

__all__ = [
    "Messages",
    "Order",
    "Pair",
    "Row",
    "Rows",
    "Text",
    "check_messages",
    "encode_example",
    "encode_pair",
    "encode_prompt",
    "format_pairs",
    "format_rows",
    "load_rows",
    "names_dataset",
]
