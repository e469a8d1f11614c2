"""The compiled element-wise work against the dense definition.

Compiling does not go through the run-time type checks that other tests have, so that these run in a process
of their own, without them.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from coverage import Coverage

from kedge.head import ANCHOR_OUTPUTS, POLICY_OUTPUTS, Head, reduce, runner, score_logits
from kedge.head.backend import RUNNERS
from kedge.head.compiler import lanes, part_length, rewriting
from kedge.head.exponential import exponential
from kedge.head.room import forget

INSIDE = "KEDGE_TESTS_UNTYPED" in os.environ
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # of the compiler itself
inside = pytest.mark.skipif(not INSIDE, reason="runs inside test_in_a_process_without_type_checks")

ALL = tuple(
    f"{source}.{tensor}" for source in ("policy", "reference") for tensor in ("hidden", "weight", "bias")
)
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"drift": 0.1},
    "everything": {
        "softcap": 3.0,
        "scale": 0.6,
        "temperature": 0.8,
        "bias": True,
        "padding": 3,
        "train": ALL,
        "masked": {"policy": [2], "reference": [2]},
    },
}


@pytest.mark.skipif(INSIDE, reason="is the process without type checks")
@pytest.mark.timeout(900)  # it compiles some dozens of kernels
def test_in_a_process_without_type_checks() -> None:
    root = Path(__file__).parents[2]
    environment = os.environ | {"KEDGE_TESTS_UNTYPED": "1"}
    measured: list[str] = []
    if (coverage := Coverage.current()) is not None:  # what is compiled there counts as well
        sources = ",".join(coverage.config.source or [])
        measured = ["-m", "coverage", "run", "--parallel-mode", "--branch", f"--source={sources}"]
        environment["COVERAGE_FILE"] = str(root / ".coverage")
    command = [sys.executable, *measured, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
    assert "14 passed" in done.stdout


@inside
@pytest.mark.parametrize("variant", VARIANTS)
def test_values_and_gradients(variant: str, make_case: Callable[..., Any]) -> None:
    case = make_case(**VARIANTS[variant])
    truth = case.score(backend="dense")
    for call in (case.score, case.reduce):
        for found, true in zip(call(backend="compiled", chunk_rows=4), truth, strict=True):
            assert found.keys() == true.keys()
            for name, value in true.items():
                torch.testing.assert_close(found[name], value, rtol=1e-11, atol=1e-11, msg=name)
    tokens = ["top_token", *(f"{name}.top_token" for name in case.anchors)]
    truths, _ = case.score(tokens, backend="dense")
    found, _ = case.score(tokens, backend="compiled", chunk_rows=4)
    assert {name: ids.tolist() for name, ids in found.items()} == {
        name: ids.tolist() for name, ids in truths.items()
    }


@inside
def test_float32_is_as_accurate_as_operation_by_operation(make_case: Callable[..., Any]) -> None:
    truth = make_case(drift=0.01, tokens=501, seed=1).score(backend="dense")[0]
    for backend in ("chunked", "compiled"):
        found = make_case(drift=0.01, tokens=501, seed=1, dtype=torch.float32).score(backend=backend)[0]
        for name, value in truth.items():
            limit = 2e-3 if "kl" in name or "variation" in name else 1e-5
            error = ((found[name] - value).abs() / value.abs()).max()
            assert error < limit, (backend, name, error)


@inside
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_logits_in_hand(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setitem(RUNNERS, "compiled", dataclasses.replace(RUNNERS["compiled"], block_logits=40))
    generator = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 7, 20, generator=generator, dtype=dtype)
    policy[:, 3] = -torch.inf
    targets, want = torch.arange(7), ["log_prob", "entropy", "reference.reverse_kl", "reference.forward_kl"]

    def scored(backend: str) -> list[torch.Tensor]:
        logits = policy.clone().requires_grad_()
        scores = score_logits(logits, targets, anchors={"reference": reference}, want=want, backend=backend)
        upstream = {name: torch.linspace(0.5, 1.5 + i, 7).to(dtype) for i, name in enumerate(want)}
        finite = [(values * upstream[name])[values.isfinite()].sum() for name, values in scores.items()]
        return [*scores.values(), torch.autograd.grad(sum(finite), logits)[0]]

    for found, true in zip(scored("compiled"), scored("chunked"), strict=True):
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(found, true, rtol=tolerance, atol=tolerance)


@inside
def test_an_exponential_is_put_in_place() -> None:
    """In float32 alone; the numbers say which one was at work, for the two differ in the last place here and there."""
    x = torch.linspace(-20.0, 0.0, 4096)
    compiled = torch.compile(lambda x: x.exp(), options={"post_grad_custom_pre_pass": rewriting()})
    assert torch.equal(compiled(x), exponential(x))
    assert not torch.equal(x.exp(), exponential(x))
    torch.testing.assert_close(compiled(x.double()), x.double().exp(), rtol=1e-14, atol=0.0)


@inside
@pytest.mark.parametrize("tokens", [50_257, 151_665, 151_936])
def test_sums_of_a_large_vocabulary_keep_their_digits(tokens: int) -> None:
    """Equal terms, as an untrained head makes them, are where compiled sums by themselves are off by 5e-5."""
    assert part_length(tokens, lanes()) < tokens
    x = torch.full((3, tokens), 0.1)
    x[1, -1] = -1.0
    options = {"post_grad_custom_pre_pass": rewriting()}
    compiled = torch.compile(lambda x: (x.sum(-1), x.sum(-1, keepdim=True), x.amin(-1)), options=options)
    total, column, least = compiled(x)
    torch.testing.assert_close(total, x.double().sum(-1).float(), rtol=2e-6, atol=0.0)
    assert torch.equal(column, total[:, None])
    assert torch.equal(least, x.amin(-1))


@inside
def test_other_numbers_of_rows_are_not_compiled_again(make_case: Callable[..., Any]) -> None:
    case = make_case(rows=40)
    for rows in (40, 7):  # from the second size on, any
        case.score(["log_prob"], backend="compiled", chunk_rows=rows)
    before = dict(torch._dynamo.utils.counters["stats"])
    for rows in (6, 14, 22, 40):
        case.score(["log_prob"], backend="compiled", chunk_rows=rows)
    assert dict(torch._dynamo.utils.counters["stats"]) == before


@inside
def test_every_set_of_outputs_that_pull_is_compiled_for_itself(make_case: Callable[..., Any]) -> None:
    """The compiler gives a function up that it has had to compile eight times."""
    case, before = make_case(rows=6, tokens=23), runner._compiled.cache_info().currsize
    upstream, outputs = case.upstream, ["log_prob", "entropy"]
    for pulling in outputs:
        case.upstream = {pulling: upstream[pulling]}
        case.reduce(outputs, backend="compiled", chunk_rows=6)
    assert runner._compiled.cache_info().currsize == before + 3  # scores once, gradients twice


@inside
@pytest.mark.parametrize("variant", ["exact KL", "everything", "an anchor that trains"])
def test_nothing_of_the_size_of_a_chunk_is_allocated_beside_it(variant: str) -> None:
    """The passes are fused: no [rows, V] intermediate. (A kernel is free to realise one; this one must not.)"""
    generator = torch.Generator().manual_seed(0)
    # two chunks, so that the compiler knows that rows vary; vocabularies that are reduced in parts, equal ones or not
    rows, chunk, tokens, width = 64, 48, 20_011 if variant == "exact KL" else 20_000, 8
    hidden, reference = torch.randn(2, rows, width, generator=generator).unbind()
    weight, fixed = torch.randn(2, tokens, width, generator=generator).unbind()
    want = ["log_prob", "entropy", "reference.reverse_kl"]
    options = {}
    if variant == "everything":
        want = [*POLICY_OUTPUTS, *(f"reference.{each}" for each in (*ANCHOR_OUTPUTS, "top_token"))]
        options = {"bias": torch.randn(tokens, generator=generator), "softcap": 3.0}
    both = variant == "an anchor that trains"
    trained = [
        each.requires_grad_() for each in ((hidden, weight, reference, fixed) if both else (hidden, weight))
    ]

    def call() -> None:
        loss, _ = reduce(
            hidden,
            Head(weight, **options),
            torch.zeros(rows, dtype=torch.int64),
            lambda scores, rows: sum(values.sum() for values in scores.values() if values.requires_grad),
            anchors={"reference": (reference, Head(fixed, **options))},
            want=want,
            backend="compiled",
            chunk_rows=chunk,
        )
        torch.autograd.grad(loss, trained)

    call()
    forget()
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    ordered = sorted(changes, key=lambda event: event.start_ns())
    most = max(accumulate(event.nbytes() for event in ordered))
    room = [min(2 * chunk, rows) if source.requires_grad else chunk for source in (weight, fixed)]
    buffers, gradients = sum(room) * tokens * 4, sum(each.numel() * 4 for each in trained)
    assert buffers <= most <= buffers + gradients + 128 * 1024, most
