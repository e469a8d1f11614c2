"""The Triton kernels against the dense definition: on a GPU if there is one, else through Triton's interpreter."""

from __future__ import annotations

import math
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kedge.head import Anchor, Head, backend, projection, score, triton_runner
from kedge.head.projection import row_width, suits

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
triton_rows = pytest.importorskip("kedge.head.triton_rows")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

ALL = tuple(
    f"{source}.{tensor}" for source in ("policy", "reference") for tensor in ("hidden", "weight", "bias")
)
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything": {
        "softcap": 3.0,
        "scale": 0.6,
        "temperature": 0.8,
        "bias": True,
        "padding": 3,
        "masked": {"policy": [2], "reference": [2]},
        "train": ALL,
    },
    "scale and temperature": {"scale": 0.6, "temperature": 1.7, "train": ALL},
    "soft-cap alone": {"softcap": 2.0},
    "masked in the policy": {"masked": {"policy": [2, 5]}, "train": ALL, "bias": True},
    "masked in the reference": {"masked": {"reference": [2]}, "train": ALL, "softcap": 2.0},
    "masked crosswise": {"masked": {"policy": [1], "reference": [3]}, "train": ALL, "temperature": 3.0},
    "three anchors": {
        "anchors": ("reference", "old", "far"),
        "train": (*ALL, "old.weight", "far.hidden"),
        "softcap": 4.0,
    },
    "trained anchor alone": {"train": ALL[3:], "bias": True},
    "no anchor": {"anchors": ()},
    "one entry": {"tokens": 1, "train": ALL},
}


def moved(case: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The same case in ``dtype``, on the device of the kernels."""
    tensors: dict[int, Tensor] = {}

    def move(tensor: Tensor | None) -> Tensor | None:
        if tensor is not None and id(tensor) not in tensors:
            made = tensor.detach().to(device=DEVICE, dtype=dtype, copy=True)
            tensors[id(tensor)] = made.requires_grad_(tensor.requires_grad)
        return None if tensor is None else tensors[id(tensor)]

    def move_head(head: Head) -> Head:
        return replace(head, weight=move(head.weight), bias=move(head.bias))

    return replace(
        case,
        hidden=move(case.hidden),
        head=move_head(case.head),
        targets=case.targets.to(DEVICE),
        anchors={
            name: Anchor(move(hidden), move_head(head)) for name, (hidden, head) in case.anchors.items()
        },
        trained={name: move(tensor) for name, tensor in case.trained.items()},
        upstream={name: move(tensor) for name, tensor in case.upstream.items()},
    )


def assert_near(
    found: Mapping[str, Tensor | None], truth: Mapping[str, Tensor | None], tolerance: float = 2e-5
) -> None:
    assert found.keys() == truth.keys()
    for name, true in truth.items():
        value = found[name]
        assert (value is None) == (true is None), name
        if value is not None and true is not None:
            finite = true[true.isfinite()].abs()
            scale = finite.max().item() if finite.numel() else 1.0
            torch.testing.assert_close(
                value.cpu().double(),
                true,
                rtol=tolerance,
                atol=tolerance * scale,
                msg=lambda m, n=name: f"{n}: {m}",
            )


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 logits, so that small rows have several and the last one is not full."""
    monkeypatch.setattr(triton_runner, "MOST_IN_A_TILE", 16)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("variant", VARIANTS)
def test_values_and_gradients(variant: str, make_case: Callable[..., Any]) -> None:
    case = make_case(**({"rows": 4, "tokens": 20} | VARIANTS[variant]))
    truth = case.score(backend="dense")
    found = moved(case).score(backend="triton", chunk_rows=3)
    for each, true in zip(found, truth, strict=True):
        assert_near(each, true)


@pytest.mark.usefixtures("tiles")
def test_reduce(make_case: Callable[..., Any]) -> None:
    case = make_case(rows=3, tokens=20, **VARIANTS["everything"])
    for each, true in zip(moved(case).reduce(backend="triton"), case.score(backend="dense"), strict=True):
        assert_near(each, true)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("anchors", [("reference",), ("reference", "old")])
@pytest.mark.parametrize("bias", [False, True])
def test_a_bfloat16_head(
    anchors: tuple[str, ...], bias: bool, make_case: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its gradients are written where they wait, rounded; where a bias trains, from float32 that is summed for it."""
    monkeypatch.setattr(projection, "suits", lambda _, *given: suits("cuda", *given))
    monkeypatch.setattr(projection, "row_width", lambda _, tokens: row_width("cuda", tokens))
    monkeypatch.setattr(projection, "SLAB_ROWS", 9)
    train = ("policy.hidden", "policy.weight", *(["policy.bias"] if bias else []), "reference.hidden")
    given = moved(make_case(rows=22, tokens=20, anchors=anchors, bias=bias, train=train), torch.bfloat16)
    truth = moved(given, torch.float64).score(backend="dense")
    scores, found = given.score(backend="triton", chunk_rows=4)
    assert_near(scores, {name: value.cpu() for name, value in truth[0].items()})
    for name, value in truth[1].items():
        error = (found[name].double() - value).norm() / value.norm()
        assert error < 6e-3, (name, error)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("output", range(8))
def test_each_output_alone(output: int, make_case: Callable[..., Any]) -> None:
    """Every output is compiled for itself; a term of another must not be missed."""
    case = make_case(rows=2, tokens=20, train=ALL)
    want = [case.outputs[output]]
    found = moved(case).score(want, backend="triton")
    for each, true in zip(found, case.score(want, backend="dense"), strict=True):
        assert_near(each, true)


def test_the_tile_that_is_used(make_case: Callable[..., Any]) -> None:
    case = make_case(rows=2, tokens=4500, train=ALL)  # a full tile and a part of one
    found = moved(case).score(backend="triton")
    for each, true in zip(found, case.score(backend="dense"), strict=True):
        assert_near(each, true)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("drift", [1e-1, 1e-3])
def test_as_accurate_as_operation_by_operation(drift: float) -> None:
    """Heads that only hand on their logits, so that what is seen is no rounding of products."""
    generator = torch.Generator().manual_seed(0)
    p = 3 * torch.randn(3, 40, generator=generator)
    q = p + drift * torch.randn(3, 40, generator=generator)
    p[0], q[0] = p[0] + 100, q[0] + 100.5  # far from 0
    p[1, 30], q[1, 30] = 14.0, 14.0 + drift  # peaked
    kinds = [f"reference.{kind}" for kind in ("reverse_kl", "forward_kl", "total_variation")]

    def call(name: str, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
        head = Head(torch.eye(40, dtype=dtype, device=device))
        hidden, anchor = (each.to(device=device, dtype=dtype) for each in (p, q))
        found = score(
            hidden.requires_grad_(),
            head,
            torch.zeros(3, dtype=torch.int64, device=device),
            anchors={"reference": (anchor, head)},
            want=["log_prob", "entropy", *kinds],
            backend=name,
        )
        slopes = {
            f"d {name}": torch.autograd.grad(found[name].sum(), hidden, retain_graph=True)[0]
            for name in found
        }
        return {key: value.detach().cpu().double() for key, value in (found | slopes).items()}

    truth = call("dense", torch.float64, "cpu")
    kernels, plain = call("triton", torch.float32, DEVICE), call("chunked", torch.float32, "cpu")
    for name, true in truth.items():
        error, usual = ((found[name] - true).norm() / true.norm() for found in (kernels, plain))
        digit = 1e-7 / drift if "reference" in name else 3e-7  # the last one of a normaliser, over x
        assert error < 3 * usual + digit, (name, error, usual)


@pytest.mark.usefixtures("tiles")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, which the interpreter is built on
def test_a_nan_stays_a_nan_in_its_row(make_case: Callable[..., Any]) -> None:
    case = make_case(rows=3, tokens=20, train=(), bias=True)
    case.hidden[1] = torch.nan
    scores, _ = moved(case).score(backend="triton")
    apart = ("reference.log_prob", "reference.entropy")  # what does not look at the policy
    for name, value in scores.items():
        assert value.isnan().tolist() == [row == 1 and name not in apart for row in range(3)], name


@pytest.mark.usefixtures("tiles")
def test_strides_do_not_matter(make_case: Callable[..., Any]) -> None:
    case = make_case(rows=3, tokens=20, bias=True)
    truth, _ = case.score(backend="dense")
    case = moved(case)
    case.targets = case.targets.repeat_interleave(3)[::3]
    case.head = replace(case.head, bias=case.head.bias.repeat_interleave(2)[::2])
    assert not case.targets.is_contiguous()
    scores, _ = case.score(backend="triton")
    assert_near(scores, truth)


def test_float64_is_not_rounded(make_case: Callable[..., Any]) -> None:
    case = make_case(rows=3)
    found = moved(case, torch.float64).score(backend="triton")
    for each, true in zip(found, case.score(backend="dense"), strict=True):
        assert_near(each, true, 1e-10)


# --- 64 bits -------------------------------------------------------------------------------------------


@pytest.mark.skipif(DEVICE == "cuda", reason="reads addresses of this process")
def test_rows_start_where_64_bits_say() -> None:
    """Rows 2³⁰ + 4 logits apart, the third 2³¹ + 8 behind the first, in memory whose untouched pages do not exist.

    Its start counted in 32 bits would be 2³¹ − 8 logits before the first row: in the same memory, so that the
    test fails instead of the process.
    """
    apart, tokens, middle = 2**30 + 4, 20, 2**31
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    try:
        memory = mmap.mmap(-1, 4 * (2 * 2**31 + 4096), flags=flags)
    except OSError as error:
        pytest.skip(f"no room in the address space: {error}")
    *places, wrong = (
        torch.frombuffer(memory, dtype=torch.float32, count=tokens, offset=4 * start)
        for start in (*(middle + row * apart for row in range(3)), middle + 2 * apart - 2**32)
    )
    rows = 3 * torch.randn(3, tokens, generator=torch.Generator().manual_seed(0))
    far = places[0]  # where the kernels are told that the rows begin
    targets, maximum, log_sum, log_prob, kl = torch.tensor([3, 4, 5]), *torch.zeros(4, 3).unbind()
    normal = rows.logsumexp(-1), torch.zeros(3)  # what to subtract, in two parts
    one = torch.ones(3)

    def put(values: Tensor) -> None:
        for place, row in zip(places, values, strict=True):
            place.copy_(row)

    def held() -> Tensor:
        assert not wrong.any()
        return torch.stack(places)

    put(rows / 2)
    triton_rows.score_rows[(3,)](
        far, apart, None, targets, maximum, log_sum, log_prob, None, tokens, 1.0, 2.0,
        CAPPED=False, WRITE=True, BLOCK=32,
    )  # fmt: skip
    torch.testing.assert_close(held(), rows, rtol=0, atol=0)
    torch.testing.assert_close(log_prob, rows.log_softmax(-1)[range(3), targets])

    for p, q in ((far, rows), (rows, far)):
        triton_rows.compare_rows[(3,)](
            p, q, *(apart if each is far else tokens for each in (p, q)), *normal, *normal,
            kl.fill_(1.0), None, None, tokens, BLOCK=32,
        )  # fmt: skip
        torch.testing.assert_close(kl, torch.zeros(3), rtol=0, atol=0)

    truth = -rows.softmax(-1)  # 1·p + 2·(1[a] − p)
    truth[range(3), targets] += 2
    near = torch.zeros(3, tokens)
    for p, q, p_to, q_to in (
        (far, rows, near, None),
        (rows, far, None, near),
        (rows, rows, far, None),
        (rows, rows, None, far),
    ):
        put(rows)
        triton_rows.pull_rows[(3,)](
            p, q, p_to, q_to, *(apart if each is far else tokens for each in (p, q, p_to, q_to)),
            *normal, *normal, targets, one, None, 2 * one, one, None, 2 * one, None, None, None,
            tokens, 1.0, 1.0, 1.0, 1.0, P_CAPPED=False, Q_CAPPED=False, ADD=False, BLOCK=32,
        )  # fmt: skip
        torch.testing.assert_close(held() if p_to is far or q_to is far else near, truth)
        near.zero_()


# --- functions -----------------------------------------------------------------------------------------


@triton.jit
def _apply(source, expm1, log1p, tanh, series, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    x = tl.load(source + columns)
    tl.store(expm1 + columns, triton_rows._expm1(-tl.abs(x)))
    tl.store(log1p + columns, triton_rows._log1p(tl.abs(x)))
    tl.store(tanh + columns, triton_rows._tanh(x))
    tl.store(series + columns, triton_rows._series(x / 64))


def test_functions_keep_all_digits() -> None:
    """expm1, log1p and tanh at every size, φ's series where it is used."""
    sizes = torch.logspace(-8, 1.2, 32, dtype=torch.float64)
    x = torch.cat([sizes, -sizes]).float().to(DEVICE)
    made = torch.zeros(4, 64, device=DEVICE)
    _apply[(1,)](x, *made.unbind(), BLOCK=64)
    true = x.double()
    near = (x / 64).double()
    powers = sum(near**k / math.factorial(k) for k in range(2, 12))
    truth = torch.stack([torch.expm1(-true.abs()), torch.log1p(true.abs()), torch.tanh(true), powers])
    torch.testing.assert_close(made.double(), truth, rtol=5e-7, atol=0)
    torch.testing.assert_close(made[3].double(), powers, rtol=2e-7, atol=0)  # no term of the series too few


# --- compiled for a GPU, without one -------------------------------------------------------------------

COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from kedge.head import triton_rows

NUMBERS = {"tokens": "i32", "inner": "fp32", "outer": "fp32", "targets": "*i64", "BLOCK": 4096}

def build(kernel, without=(), **given):
    types, constants = {}, {}
    for place, name in enumerate(kernel.arg_names):
        kind = given.get(name) or NUMBERS.get(name) or (
            name.isupper() and bool(given.get("flags")) if name.isupper() else
            "i32" if name.endswith("stride") else
            "fp32" if name.endswith(("_factor", "_outer")) else "*fp32")
        kind = None if name in without else kind
        types[name] = kind if isinstance(kind, str) else "constexpr"
        if not isinstance(kind, str):
            constants[(place,)] = kind
    target = GPUTarget("cuda", 90, 32)
    made = compile(ASTSource(kernel, types, constants), target=target, options={"num_warps": 8})
    assert made.asm["cubin"]
    print("built", kernel.__name__)

compared = ("reverse_kl", "forward_kl", "total_variation")
build(triton_rows.score_rows, flags=True)
build(triton_rows.score_rows, without=("bias", "entropy", "log_prob"), logits="*bf16")
build(triton_rows.compare_rows)
build(triton_rows.compare_rows, without=compared[1:], q_logits="*bf16")
build(triton_rows.pull_rows, flags=True)
build(triton_rows.pull_rows, p_gradient="*bf16", without=(
    *compared, "q_logits", "q_gradient", "q_maximum", "q_log_sum", "q_constant", "q_log_prob"))
build(triton_rows.pull_rows, p_gradient="*bf16", without=(*compared[1:], "q_gradient"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is built for Linux")
def test_the_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    """To machine code of an H100; what the interpreter accepts, the compiler might not."""
    (tmp_path / "build.py").write_text(COMPILE, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "build.py")], env=environment, capture_output=True, text=True
    )
    assert done.stdout.count("built") == 7, done.stderr[-3000:]


# --- where it runs -------------------------------------------------------------------------------------


def test_importing_the_head_does_not_import_triton() -> None:
    script = "import sys, kedge.head\nprint('triton' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_auto_takes_the_kernels_where_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert backend.chosen_runner("auto", cuda) is triton_runner.TRITON
    assert backend.chosen_runner("auto", cpu) is backend.RUNNERS["chunked"]
    monkeypatch.setattr(backend, "installed", lambda: False)
    assert backend.chosen_runner("auto", cuda) is backend.RUNNERS["chunked"]


def test_refusals_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(
        ValueError, match='the tensors are on cpu; choose "chunked", or set TRITON_INTERPRET=1'
    ):
        backend.chosen_chunks("triton", None, 100, cpu)
    monkeypatch.setattr(triton_runner, "installed", lambda: False)
    with pytest.raises(ValueError, match="pip install triton"):
        backend.chosen_chunks("triton", None, 100, cpu)
