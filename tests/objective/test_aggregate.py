"""Weights by hand, and the laws that hold for any split of a batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kedge.objective import aggregation_weights, masked_mean, masked_sum, per_response_sum
from kedge.objective.aggregate import pad, spread, valid_positions

LENGTHS = torch.tensor([3, 0, 2])
MASK = torch.tensor([True, False, True, True, True])


def weigh(mode: str, lengths: Tensor = LENGTHS, mask: Tensor = MASK, **totals: int) -> list[float]:
    return aggregation_weights(lengths, mask, mode, dtype=torch.float64, **totals).tolist()  # type: ignore[arg-type]


def test_token_mean_divides_by_unmasked_tokens() -> None:
    assert weigh("token_mean") == [0.25, 0.0, 0.25, 0.25, 0.25]


def test_sequence_mean_divides_by_own_unmasked_tokens_and_all_responses() -> None:
    assert weigh("sequence_mean") == pytest.approx([1 / 6, 0.0, 1 / 6, 1 / 6, 1 / 6], abs=1e-15)


def test_constant_divides_by_the_constant_and_all_responses() -> None:
    assert weigh("constant", constant_length=4) == pytest.approx(
        [1 / 12, 0, 1 / 12, 1 / 12, 1 / 12], abs=1e-15
    )


def test_totals_are_those_of_the_global_batch() -> None:
    assert weigh("token_mean", total_tokens=8) == [0.125, 0.0, 0.125, 0.125, 0.125]
    assert weigh("sequence_mean", total_responses=4) == [0.125, 0.0, 0.125, 0.125, 0.125]
    assert weigh("constant", total_responses=10, constant_length=1) == [0.1, 0.0, 0.1, 0.1, 0.1]


@pytest.mark.parametrize("mode", ["token_mean", "sequence_mean"])
def test_an_empty_mask_gives_zeros(mode: str) -> None:
    assert weigh(mode, mask=torch.zeros(5, dtype=torch.bool)) == [0.0] * 5
    empty = torch.zeros(0, dtype=torch.int64)
    assert weigh(mode, lengths=empty, mask=torch.zeros(0, dtype=torch.bool)) == []


def test_weights_have_the_dtype_that_is_asked_for() -> None:
    assert aggregation_weights(LENGTHS, MASK, "token_mean").dtype == torch.float32
    assert aggregation_weights(LENGTHS, MASK, "token_mean", dtype=torch.float64).dtype == torch.float64


@pytest.mark.parametrize(
    ("mode", "extra", "message"),
    [
        ("constant", {}, "constant_length goes with"),
        ("token_mean", {"constant_length": 3}, "constant_length goes with"),
        ("constant", {"constant_length": 0}, "positive number of tokens"),
        (
            "token_mean",
            {"total_tokens": 3},
            "total_tokens counts the global batch: got 3, but this part alone has 4",
        ),
        ("sequence_mean", {"total_responses": 2}, "total_responses counts the global batch"),
    ],
)
def test_what_cannot_be_meant_is_refused(mode: str, extra: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weigh(mode, **extra)


def test_lengths_must_describe_the_tokens() -> None:
    with pytest.raises(ValueError, match="lengths sum to 5 tokens, but the packed tensor holds 4"):
        per_response_sum(torch.ones(4), LENGTHS)
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        valid_positions(torch.tensor([5, -1]), 4)


def test_sums_and_means_never_see_masked_values() -> None:
    values = torch.tensor([1.0, torch.nan, 2.0, 3.0, torch.inf])
    mask = torch.tensor([True, False, True, True, False])
    assert masked_sum(values, mask).item() == 6.0
    assert masked_mean(values, mask).item() == 2.0
    assert masked_mean(values, torch.zeros(5, dtype=torch.bool)).item() == 0.0


def test_a_masked_infinity_has_no_gradient() -> None:
    values = torch.tensor([1.0, torch.inf], requires_grad=True)
    masked_sum(values, torch.tensor([True, False])).backward()
    assert values.grad is not None
    assert values.grad.tolist() == [1.0, 0.0]


def test_per_response_sum_with_empty_responses() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64, requires_grad=True)
    sums = per_response_sum(values, LENGTHS)
    assert sums.tolist() == [6.0, 0.0, 9.0]
    (sums * torch.tensor([1.0, 7.0, -1.0])).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [1.0, 1.0, 1.0, -1.0, -1.0]
    assert per_response_sum(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).tolist() == []


def test_padding_and_spreading_are_inverse_to_packing() -> None:
    values = torch.arange(5.0)
    valid = valid_positions(LENGTHS, 5)
    assert pad(values, valid).tolist() == [[0.0, 1.0, 2.0], [0.0, 0.0, 0.0], [3.0, 4.0, 0.0]]
    assert torch.equal(pad(values, valid)[valid], values)
    assert spread(torch.tensor([7.0, 8.0, 9.0]), LENGTHS).tolist() == [7.0, 7.0, 7.0, 9.0, 9.0]


responses = st.lists(st.lists(st.booleans(), max_size=5), min_size=1, max_size=8)


@given(responses, st.sampled_from(["token_mean", "sequence_mean", "constant"]), st.integers(1, 4))
def test_parts_with_global_counts_weigh_as_the_whole(batch: list[list[bool]], mode: str, size: int) -> None:
    def pack(part: list[list[bool]]) -> tuple[Tensor, Tensor]:
        flat = [bit for response in part for bit in response]
        return torch.tensor([len(r) for r in part]), torch.tensor(flat, dtype=torch.bool)

    constant = {"constant_length": 7} if mode == "constant" else {}
    lengths, mask = pack(batch)
    whole = weigh(mode, lengths, mask, **constant)
    totals = {"total_tokens": int(mask.sum()), "total_responses": len(batch)}
    parts = [
        weigh(mode, *pack(batch[i : i + size]), **constant, **totals) for i in range(0, len(batch), size)
    ]
    assert [weight for part in parts for weight in part] == pytest.approx(whole, abs=1e-15)
    if mode == "token_mean" and mask.any():
        assert sum(whole) == pytest.approx(1.0)
