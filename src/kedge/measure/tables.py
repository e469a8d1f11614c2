"""Tables of a question: by prompt, by position, by token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kedge.measure.questions import Question
from kedge.measure.table import TokenTable
from kedge.statistics import clustered_sums, ratio_standard_error

MOST_BINS = 64
"""Most lines of the table by position."""


def by_cluster(table: TokenTable, question: Question, texts: dict[int, str]) -> list[dict[str, Any]]:
    """One line a prompt or text, in the order of the data.

    Args:
        table: tokens of the question.
        question: which one.
        texts: how each prompt or text begins.
    """
    clusters, index = table.cluster.unique(return_inverse=True)
    count = len(clusters)
    tokens = clustered_sums(torch.ones(table.count), index, count)
    pairs = torch.stack([index, table.response]).unique(dim=1)
    responses = torch.bincount(pairs[0], minlength=count)
    same = (table.policy_top == table.reference_top).double()
    sums = {
        "reverse_kl": clustered_sums(table.reverse_kl, index, count),
        "forward_kl": clustered_sums(table.forward_kl, index, count),
        "same_top_token": clustered_sums(same, index, count),
    }
    lines = []
    for place, cluster in enumerate(clusters.tolist()):
        line: dict[str, Any] = {
            "cluster": cluster,
            "text": texts.get(cluster, ""),
            "responses": int(responses[place]),
            "tokens": int(tokens[place]),
        }
        line |= {name: float(values[place] / tokens[place]) for name, values in sums.items()}
        if question.sampled_from is not None:
            name = question.headline[0]
            line[f"{name}_per_response"] = float(sums[name][place] / responses[place])
        lines.append(line)
    return lines


def by_position(table: TokenTable) -> list[dict[str, Any]]:
    """KL by position in the response, one line a position, or a range of them where there are many.

    Standard errors are clustered by prompt or text, NaN where only one reaches a position.
    """
    width = -(-(int(table.position.max()) + 1) // MOST_BINS)
    bins = table.position // width
    lines = []
    for number in bins.unique().tolist():
        rows = table.rows(bins == number)
        clusters, index = rows.cluster.unique(return_inverse=True)
        tokens = clustered_sums(torch.ones(rows.count), index, len(clusters))
        line: dict[str, Any] = {
            "first": number * width,
            "last": number * width + width - 1,
            "tokens": rows.count,
        }
        for name in ("reverse_kl", "forward_kl"):
            sums = clustered_sums(getattr(rows, name), index, len(clusters))
            line[name] = float(sums.sum() / tokens.sum())
            line[f"{name}_standard_error"] = ratio_standard_error(sums, tokens)
        lines.append(line)
    return lines


def by_token(table: TokenTable, most: int) -> dict[str, list[dict[str, Any]]]:
    """Tokens of the vocabulary whose probability moved most where they stand in the data.

    The measure is Σ log π(token) − log ρ(token) over a token's occurrences: what it adds to, or takes from, the
    likelihood of the data under the policy.

    Returns:
        ``raised`` and ``lowered``: at most ``most`` tokens each, the largest change first; none whose change is NaN.
    """
    ids, index = table.token.unique(return_inverse=True)
    change = clustered_sums(table.policy_log_prob.double() - table.reference_log_prob, index, len(ids))
    count = torch.bincount(index, minlength=len(ids))

    def listed(order: Tensor, sign: int) -> list[dict[str, Any]]:
        return [
            {"token": int(ids[i]), "count": int(count[i]), "log_ratio_sum": float(change[i])}
            for i in order[:most].tolist()
            if change[i] * sign > 0
        ]

    order = change.argsort(descending=True, stable=True)
    order = order[~change[order].isnan()]
    return {"raised": listed(order, 1), "lowered": listed(order.flip(0), -1)}
