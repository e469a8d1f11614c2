"""From what was scored to the answer of a question."""

from __future__ import annotations

from kedge.measure.config import MeasureConfig
from kedge.measure.extremes import most_moved
from kedge.measure.figures import figures
from kedge.measure.inputs import SHOWN
from kedge.measure.pieces import Pieces
from kedge.measure.pipeline import Work
from kedge.measure.result import Answer
from kedge.measure.table import TokenTable
from kedge.measure.tables import by_cluster, by_position, by_token


def answer(work: Work, pieces: Pieces, config: MeasureConfig) -> Answer:
    """Put the answer to a question together from its scored parts, of which there is one at least."""
    table = TokenTable.join(work.tables)
    counts = {
        f"{work.question.cluster}s": len(table.cluster.unique()),
        "responses": len(table.response.unique()),
        "tokens": table.count,
    }
    if work.question.sampled_from is not None:
        counts["finished"] = work.finished
    tokens = by_token(table, config.most)
    for lines in tokens.values():
        for line in lines:
            line["text"] = pieces.alone(line["token"])
    return Answer(
        question=work.question,
        partial=not work.complete,
        counts=counts,
        figures=figures(table, work.question, config),
        floor=work.floor,
        by_cluster=by_cluster(table, work.question, _texts(work, table, pieces)),
        by_position=by_position(table),
        by_token=tokens,
        most_moved=most_moved(table, pieces, config.most, work.context),
        tokens=table,
        texts=_token_texts(table, pieces),
    )


def _texts(work: Work, table: TokenTable, pieces: Pieces) -> dict[int, str]:
    """How each prompt or text that was scored begins, special tokens included."""
    present = set(table.cluster.tolist())
    found: dict[int, str] = {}
    for window in work.windows:
        if window.cluster in present and window.cluster not in found:
            start = (window.context + window.scored)[:SHOWN]  # a token is rarely less than a character
            found[window.cluster] = pieces.whole(start)[:SHOWN]
    return found


def _token_texts(table: TokenTable, pieces: Pieces) -> dict[str, list[str]]:
    """The texts of every row: what its token adds to its response, and both models' most probable tokens."""
    _, lengths = table.response.unique_consecutive(return_counts=True)
    added: list[str] = []
    for tokens in table.token.split(lengths.tolist()):
        added += pieces.of(tokens.tolist())
    return {
        "text": added,
        "policy_top_text": [pieces.alone(token) for token in table.policy_top.tolist()],
        "reference_top_text": [pieces.alone(token) for token in table.reference_top.tolist()],
    }
