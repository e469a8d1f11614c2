"""Entries of the vocabulary that are padding, or masked by a bias of −∞."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kedge.head import Head, score

BACKENDS = ["chunked", "dense"]
ALL = tuple(
    f"{source}.{tensor}" for source in ("policy", "reference") for tensor in ("hidden", "weight", "bias")
)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_masked_entry_is_as_if_it_were_not_there(
    backend: str, softcap: float | None, make_case: Callable[..., Any]
) -> None:
    gone, kept = [2, 5], [0, 1, 3, 4, 6, 7, 8, 9, 10]
    case = make_case(masked={"policy": gone, "reference": gone}, softcap=softcap, train=ALL)
    case.targets = torch.tensor(kept)
    masked, masked_gradients = case.score(backend=backend)
    small = make_case(masked={"policy": gone, "reference": gone}, softcap=softcap, train=())
    without = {
        name: (hidden, Head(head.weight[kept], head.bias[kept], softcap=softcap))
        for name, (hidden, head) in {"policy": (small.hidden, small.head), **small.anchors}.items()
    }
    scores = score(
        *without["policy"],
        torch.arange(len(kept)),
        anchors={"reference": without["reference"]},
        want=case.outputs,
        backend=backend,
    )
    for name, value in scores.items():
        torch.testing.assert_close(masked[name], value)
    for name, gradient in masked_gradients.items():
        assert gradient.isfinite().all()
        if not name.endswith("hidden"):
            assert not gradient[gone].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_takes_no_part(backend: str, make_case: Callable[..., Any]) -> None:
    """Padding rows of a checkpoint hold anything; here they would take all the mass."""
    case = make_case(padding=4, bias=True, softcap=30.0)
    truth, _ = case.score(backend=backend)
    with torch.no_grad():
        case.head.weight[11:], case.head.bias[11:] = 1e4, 1e4
    scores, gradients = case.score(backend=backend)
    for name, value in truth.items():
        torch.testing.assert_close(scores[name], value, rtol=0, atol=0)
    assert gradients["policy.weight"].shape == (15, 4)
    assert not gradients["policy.weight"][11:].any()
    assert not gradients["policy.bias"][11:].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("masked", "infinite"),
    [
        ({"policy": [3]}, {"reference.forward_kl"}),
        ({"reference": [3]}, {"reference.reverse_kl"}),
        ({"policy": [3], "reference": [4]}, {"reference.forward_kl", "reference.reverse_kl"}),
    ],
)
def test_infinite_divergences_have_no_gradient(
    backend: str, masked: dict[str, list[int]], infinite: set[str], make_case: Callable[..., Any]
) -> None:
    case = make_case(masked=masked, train=ALL)
    case.targets = torch.zeros_like(case.targets)
    for output in case.outputs:
        scores, gradients = case.score([output], backend=backend)
        assert (scores[output] == math.inf).all() == (output in infinite)
        for gradient in gradients.values():
            if gradient is not None:
                assert gradient.isfinite().all()
                assert output not in infinite or not gradient.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_masked_target_has_no_gradient(backend: str, make_case: Callable[..., Any]) -> None:
    case = make_case(masked={"policy": [3]}, anchors=())
    case.targets = torch.full_like(case.targets, 3)
    scores, gradients = case.score(["log_prob"], backend=backend)
    assert (scores["log_prob"] == -math.inf).all()
    assert all(not gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_stays_a_nan_in_its_row(backend: str, make_case: Callable[..., Any]) -> None:
    case = make_case(train=())
    case.hidden[4] = math.nan
    scores, _ = case.score(backend=backend)
    apart = ("reference.log_prob", "reference.entropy")  # what does not look at the policy
    for name, value in scores.items():
        assert value.isnan().tolist() == [row == 4 and name not in apart for row in range(9)], name
