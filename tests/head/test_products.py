from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kedge.head import products
from kedge.head.products import DEEP, LONG, MOST_ROWS, PART, WORTH, multiply, onednn

SIDE = round(WORTH ** (1 / 3)) + 1
"""Of matrices that are worth the faster library."""

needs_onednn = pytest.mark.skipif(onednn() is None, reason="PyTorch's own choice is taken on this processor")


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def factors(layout: str, rows: int) -> tuple[Tensor, Tensor]:
    left, right = normal(rows, SIDE), normal(SIDE, 2 * SIDE)
    if layout == "left transposed":
        return left.T.contiguous().T, right
    if layout == "right transposed":
        return left, right.T.contiguous().T
    if layout == "slices":
        return normal(rows, 3 * SIDE)[:, SIDE : 2 * SIDE], normal(2 * SIDE, 2 * SIDE)[::2]
    return left, right


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("rows", [2, SIDE])
@pytest.mark.parametrize("layout", ["plain", "left transposed", "right transposed", "slices"])
def test_products_are_right_to_float32(
    layout: str, rows: int, enabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", enabled)
    left, right = factors(layout, rows)
    right = right[: left.shape[1]]
    before = normal(rows, right.shape[1])
    truth = left.double() @ right.double()
    found = multiply(left, right, torch.full_like(before, torch.nan))
    added = multiply(left, right, before.clone(), add=True)
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=1e-4)
    torch.testing.assert_close(added.double(), before.double() + truth, rtol=0, atol=1e-4)


@pytest.mark.parametrize("columns", [LONG - 1, LONG, LONG + 77])
@pytest.mark.parametrize(("rows", "deep"), [(5, DEEP), (5, DEEP - 1), (MOST_ROWS + 1, DEEP)])
def test_few_rows_by_a_whole_vocabulary(
    rows: int, deep: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made a part at a time where MKL would divide it badly, the last one narrower; a transposed weight as it lies."""
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    threads = torch.get_num_threads()
    left, weight, room = normal(rows, deep), normal(columns, deep), torch.full((rows, columns), torch.nan)
    cut = products._better_cut(left, weight.T, room)
    assert cut == (rows <= MOST_ROWS and deep >= DEEP and columns >= max(LONG, 4 * PART * threads))
    found = multiply(left, weight.T, room)
    torch.testing.assert_close(found.double(), left.double() @ weight.double().T, rtol=0, atol=5e-4)
    with pytest.raises(RuntimeError):
        multiply(left, weight.T[1:], room)
    assert not products._better_cut(left, weight.T, room[:, 1:])  # PyTorch says what does not fit


@pytest.mark.parametrize("columns", [256, 257])
def test_small_results_of_long_sums(columns: int) -> None:
    """One is made transposed, the other, whose rows do not begin where vectors do, as it stands."""
    left, right = normal(384, LONG), normal(LONG, columns)
    truth = left.double() @ right.double()
    found = multiply(left, right, torch.full((384, columns), torch.nan))
    added = multiply(left, right, torch.ones(384, columns), add=True)
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=2e-3)
    torch.testing.assert_close(added.double(), truth + 1, rtol=0, atol=2e-3)
    assert torch.equal(multiply(left, right, torch.empty_like(found)), found)


@pytest.mark.parametrize("shape", [(1, 3000, 2000), (2000, 3000, 1), (2000, 1, 3000)])
def test_a_single_row_column_or_factor(shape: tuple[int, int, int]) -> None:
    """Strides of a size of 1 say nothing; torch gives whatever numbers."""
    rows, inner, columns = shape
    left, right = normal(rows, inner), normal(columns, inner).T
    truth = left.double() @ right.double()
    for one in (left, left.as_strided((rows, inner), (7 if rows == 1 else inner, 1))):
        found = multiply(one, right, torch.empty(rows, columns))
        torch.testing.assert_close(found.double(), truth, rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    left, right = normal(SIDE, SIDE, dtype=dtype), normal(SIDE, SIDE, dtype=dtype)
    assert torch.equal(multiply(left, right, torch.empty_like(left)), left @ right)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_nothing(shape: tuple[int, int, int]) -> None:
    rows, inner, columns = shape
    out = torch.ones(rows, columns)
    assert torch.equal(
        multiply(torch.ones(rows, inner), torch.ones(inner, columns), out), torch.zeros_like(out)
    )


def test_numbers_that_are_none_go_through() -> None:
    left, right = normal(SIDE, SIDE), normal(SIDE, SIDE)
    left[1, 2], left[3, 4] = torch.nan, torch.inf
    found = multiply(left, right, torch.empty(SIDE, SIDE))
    assert found[1].isnan().all()
    assert found[3].isinf().all()
    assert found[torch.arange(SIDE) % 2 == 0].isfinite().all()


@needs_onednn
def test_equal_calls_give_equal_bits_and_another_library_others(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = normal(SIDE, 4 * SIDE), normal(4 * SIDE, SIDE)
    first, second = (multiply(left, right, torch.empty(SIDE, SIDE)) for _ in range(2))
    assert torch.equal(first, second)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    other = multiply(left, right, torch.empty(SIDE, SIDE))
    assert torch.equal(other, left @ right)
    assert not torch.equal(first, other)  # or the faster library was never taken


@needs_onednn
def test_a_subclass_is_left_to_pytorch() -> None:
    class Marked(Tensor):
        pass

    left = normal(SIDE, SIDE).as_subclass(Marked)
    found = multiply(left, normal(SIDE, SIDE), torch.empty(SIDE, SIDE))
    assert torch.equal(found, torch.mm(left, normal(SIDE, SIDE)))


def test_shapes_that_do_not_fit_are_told() -> None:
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        multiply(normal(SIDE, SIDE), normal(SIDE + 1, SIDE), torch.empty(SIDE, SIDE))
    with pytest.raises(RuntimeError, match="must be a matrix"):
        multiply(normal(2, SIDE, SIDE), normal(SIDE, SIDE), torch.empty(SIDE, SIDE))


def test_a_view_that_negates() -> None:
    left, right = torch._neg_view(normal(SIDE, SIDE)), normal(SIDE, SIDE)
    assert left.is_neg()
    assert torch.equal(multiply(left, right, torch.empty(SIDE, SIDE)), torch.mm(left, right))


def test_a_result_with_gaps() -> None:
    room = torch.zeros(SIDE, 2 * SIDE)
    left, right = normal(SIDE, SIDE), normal(SIDE, SIDE)
    multiply(left, right, room[:, ::2])
    torch.testing.assert_close(room[:, ::2], left @ right)
    assert not room[:, 1::2].any()


def test_operations_that_are_counted_are_seen() -> None:
    with FlopCounterMode(display=False) as counter:
        multiply(normal(SIDE, SIDE), normal(SIDE, SIDE), torch.empty(SIDE, SIDE))
    assert counter.get_total_flops() == 2 * SIDE**3


UNUSUAL = "import torch; from kedge.head import products; {given}; assert products.onednn() is not None"


@needs_onednn
@pytest.mark.parametrize(
    "given",
    ["torch.set_default_dtype(torch.float64)", "torch.set_default_device('meta')"],
)
def test_the_trial_does_not_depend_on_defaults(given: str) -> None:
    """A process of its own, which a refusal would end."""
    script = UNUSUAL.format(given=given)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(
    products.vendor() in ("GenuineIntel", None) or torch.backends.cpu.get_cpu_capability() != "AVX512",
    reason="PyTorch's own choice is taken on this processor",
)
def test_the_faster_library_is_found_where_it_is_wanted() -> None:
    """Fails when a release of PyTorch no longer has the symbol: products would go slower and nobody would know."""
    assert onednn() is not None


class Chosen:
    """What ``onednn`` finds out about the machine, anew."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.patch = monkeypatch
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
        monkeypatch.setattr(products, "vendor", lambda: "AuthenticAMD")

    def is_taken(self) -> bool:
        return onednn.__wrapped__() is not None


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Chosen:
    return Chosen(monkeypatch)


@pytest.mark.parametrize("maker", ["GenuineIntel", None])
def test_pytorchs_choice_where_it_is_the_best(chosen: Chosen, maker: str | None) -> None:
    chosen.patch.setattr(products, "vendor", lambda: maker)
    assert not chosen.is_taken()


def test_pytorchs_choice_without_wide_registers(chosen: Chosen) -> None:
    chosen.patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not chosen.is_taken()


def test_pytorchs_choice_where_the_symbol_is_another(chosen: Chosen) -> None:
    chosen.patch.setattr(products, "_SYMBOL", "no_such_symbol")
    assert not chosen.is_taken()


def test_pytorchs_choice_where_the_product_is_wrong(chosen: Chosen) -> None:
    def wrong(left: Tensor, right: Tensor, out: Tensor, add: bool) -> None:
        torch.mm(left, right, out=out)  # forgets to add

    chosen.patch.setattr(products, "_by_symbol", lambda: wrong)
    assert not chosen.is_taken()
