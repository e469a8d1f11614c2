"""The dense definition against logits and sums written out here."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest


def test_definition(make_case: Callable[..., Any]) -> None:
    case = make_case(bias=True, softcap=3.0, scale=0.7, temperature=0.6, padding=2, rows=3, tokens=5)
    scores, _ = case.score(backend="dense")
    for row in range(3):
        distributions = {}
        for name, (hidden, head) in {"policy": (case.hidden, case.head), **case.anchors}.items():
            logits = []
            for token in range(5):
                product = math.fsum((hidden[row] * head.weight[token]).tolist()) + head.bias[token].item()
                logits.append(3.0 * math.tanh(0.7 * product / 3.0) / 0.6)
            total = math.fsum(math.exp(each) for each in logits)
            distributions[name] = [math.exp(each) / total for each in logits]
            if name == "policy":
                assert scores["log_normalizer"][row].item() == pytest.approx(math.log(total), rel=1e-12)
        p, q = distributions["policy"], distributions["reference"]
        both = list(zip(p, q, strict=True))
        target = int(case.targets[row])
        truths = {
            "log_prob": math.log(p[target]),
            "entropy": -math.fsum(a * math.log(a) for a in p),
            "reference.log_prob": math.log(q[target]),
            "reference.entropy": -math.fsum(b * math.log(b) for b in q),
            "reference.reverse_kl": math.fsum(a * math.log(a / b) for a, b in both),
            "reference.forward_kl": math.fsum(b * math.log(b / a) for a, b in both),
            "reference.total_variation": 0.5 * math.fsum(abs(a - b) for a, b in both),
        }
        for name, truth in truths.items():
            assert scores[name][row].item() == pytest.approx(truth, rel=1e-12), name
