"""The element-wise work on a chunk as launches of Triton's row kernels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from kedge.divergence import Normalizer
from kedge.head import elementwise
from kedge.head.elementwise import Normalizers, Plan, Transform
from kedge.head.gradients import Pull
from kedge.head.request import DIVERGENCES, POLICY, Output
from kedge.head.runner import Runner

MOST_IN_A_TILE = 4096


@cache
def installed() -> bool:
    """Whether there is a Triton to import."""
    return find_spec("triton") is not None


def refusal(device: torch.device) -> str | None:
    """Say why the kernels cannot run on a device, and the remedy; None if they can."""
    if not installed():
        return (
            'the backend "triton" needs Triton: pip install triton; or choose "chunked", which needs nothing'
        )
    import triton

    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        return (
            f'the backend "triton" runs on a GPU, and the tensors are on {device.type}; choose "chunked", '
            "or set TRITON_INTERPRET=1 before Python starts, to run its kernels, slowly, where they are"
        )
    return None


def suits(tensors: Iterable[Tensor]) -> bool:
    """Whether the kernels can take these [n, V]: no float64, which they would round; rows, dense ones."""
    return all(
        each.dtype != torch.float64 and each.shape[0] > 0 and (each.shape[1] == 1 or each.stride(1) == 1)
        for each in tensors
    )


def forward(
    plan: Plan, products: Mapping[str, Tensor], biases: Mapping[str, Tensor | None], targets: Tensor
) -> tuple[Normalizers, dict[Output, Tensor]]:
    """Do what ``elementwise.forward`` does; float64 is left to that."""
    if not suits(products.values()):
        return elementwise.forward(plan, products, biases, targets)
    targets = targets.contiguous()
    normalizers: Normalizers = {}
    scores: dict[Output, Tensor] = {}
    for source, transform in plan.transforms:
        wanted = [output for of, output in plan.wanted if of == source]
        normalizers[source], own = _score(products[source], biases[source], transform, targets, wanted)
        scores |= {(source, output): values for output, values in own.items()}
    for name in dict.fromkeys(of for of, output in plan.wanted if output in DIVERGENCES):
        outputs = {each: _column(targets) for each in DIVERGENCES if (name, each) in plan.wanted}
        p, q = products[POLICY], products[name]
        _launch(
            "compare_rows", p, p, q, p.stride(0), q.stride(0), *normalizers[POLICY], *normalizers[name],
            *map(outputs.get, DIVERGENCES), p.shape[1],
        )  # fmt: skip
        scores |= {(name, output): values for output, values in outputs.items()}
    return normalizers, {output: scores[output] for output in plan.wanted}


def backward(
    plan: Plan,
    logits: Mapping[str, Tensor],
    normalizers: Normalizers,
    targets: Tensor,
    pulls: Mapping[Output, Pull],
    apart: Mapping[str, Tensor],
) -> None:
    """Do what ``elementwise.backward`` does; float64 is left to that."""
    if suits(logits.values()):
        write_gradients(plan, {**logits, **apart}, logits, normalizers, targets, pulls)
    else:
        elementwise.backward(plan, logits, normalizers, targets, pulls, apart)


def write_gradients(
    plan: Plan,
    gradients: Mapping[str, Tensor],
    logits: Mapping[str, Tensor],
    normalizers: Normalizers,
    targets: Tensor,
    pulls: Mapping[Output, Pull],
) -> None:
    """Write the gradient of every source that is moved into a tensor [n, V]; it may be that of the logits.

    One launch takes the policy and one anchor. If several anchors are compared with a policy that is moved, its
    logits are needed until the last one: its gradient is summed beside them, in float32.
    """
    moved = {source: gradients[source] for source in plan.moved}
    compared = list(dict.fromkeys(name for name, output in pulls if output in DIVERGENCES))
    of_policy = moved.pop(POLICY, None)
    total = of_policy
    if of_policy is not None and len(compared) > 1 and not _serves_as_sum(of_policy, logits[POLICY]):
        total = torch.empty_like(of_policy, dtype=torch.float32)
    pulling = _Pulling(dict(plan.transforms), logits, normalizers, targets, pulls)
    for index, name in enumerate(compared):
        pulling.launch(POLICY, total, name, moved.pop(name, None), own=index == 0, add=index > 0)
    if of_policy is not None and not compared:
        pulling.launch(POLICY, of_policy)
    for name, gradient in moved.items():
        pulling.launch(name, gradient)
    if of_policy is not None and total is not None and total is not of_policy:
        of_policy.copy_(total)


def _serves_as_sum(gradient: Tensor, logits: Tensor) -> bool:
    """Whether a gradient can be summed where it goes: in float32, and not on top of the logits it is made from."""
    return gradient.dtype == torch.float32 and gradient.data_ptr() != logits.data_ptr()


class _Pulling:
    """The launches of ``pull_rows`` for one block."""

    def __init__(
        self,
        transforms: Mapping[str, Transform],
        logits: Mapping[str, Tensor],
        normalizers: Normalizers,
        targets: Tensor,
        pulls: Mapping[Output, Pull],
    ) -> None:
        self._transforms, self._logits, self._normalizers = transforms, logits, normalizers
        self._targets, self._pulls = targets.contiguous(), pulls

    def launch(
        self,
        p: str,
        p_gradient: Tensor | None,
        q: str | None = None,
        q_gradient: Tensor | None = None,
        *,
        own: bool = True,
        add: bool = False,
    ) -> None:
        """Pull at a source by its own outputs, if ``own``, and at both by those that compare it with another."""
        if p_gradient is None and q_gradient is None:
            return
        compared = {each: None if q is None else self._pulls.get((q, each)) for each in DIVERGENCES}
        p_own = {each: self._pulls.get((p, each)) if own else None for each in _OWN}
        q_own = {each: None if q is None else self._pulls.get((q, each)) for each in _OWN}
        p_logits, q_logits = self._logits[p], None if q is None else self._logits[q]
        p_factor, p_outer, p_capped = _way_back(self._transforms[p])
        q_factor, q_outer, q_capped = _way_back(self._transforms[p if q is None else q])
        _launch(
            "pull_rows", p_logits, p_logits, q_logits, p_gradient, q_gradient,
            *map(_stride, (p_logits, q_logits, p_gradient, q_gradient)),
            *self._normalizers[p], *((None, None) if q is None else self._normalizers[q]), self._targets,
            _constant(p_own, compared["reverse_kl"]), _gradient(p_own["entropy"]), _gradient(p_own["log_prob"]),
            _constant(q_own, compared["forward_kl"]), _gradient(q_own["entropy"]), _gradient(q_own["log_prob"]),
            *(_gradient(compared[each]) for each in DIVERGENCES),
            p_logits.shape[1], p_factor, p_outer, q_factor, q_outer,
            P_CAPPED=p_capped, Q_CAPPED=q_capped, ADD=add,
        )  # fmt: skip


_OWN = ("log_prob", "entropy", "log_normalizer")


def _score(
    product: Tensor, bias: Tensor | None, transform: Transform, targets: Tensor, wanted: list[str]
) -> tuple[Normalizer, dict[str, Tensor]]:
    bias = None if bias is None else bias.contiguous()
    maximum, log_sum = _column(targets), _column(targets)
    outputs: dict[str, Tensor] = {
        each: _column(targets) for each in ("log_prob", "entropy") if each in wanted
    }
    factor, outer, capped = _way_back(transform)
    _launch(
        "score_rows", product, product, product.stride(0), bias, targets, maximum, log_sum,
        outputs.get("log_prob"), outputs.get("entropy"), product.shape[1], factor / outer, outer,
        CAPPED=capped, WRITE=bias is not None or capped or factor != 1.0,
    )  # fmt: skip
    if "top_token" in wanted:
        outputs["top_token"] = product.argmax(-1)
    if "log_normalizer" in wanted:
        outputs["log_normalizer"] = maximum + log_sum
    return Normalizer(maximum[:, None], log_sum[:, None]), outputs


def _way_back(transform: Transform) -> tuple[float, float, bool]:
    """Return the slope of a logit at 0, the bound of the logits (the slope, if there is none), whether there is one."""
    factor = transform.scale / transform.temperature
    if transform.softcap is None:
        return factor, factor, False
    return factor, transform.softcap / transform.temperature, True


def _constant(own: Mapping[str, Pull | None], outward: Pull | None) -> Tensor | None:
    """Return what the bracket of ``gradients`` has in common for all entries of a row, [n]."""
    terms = [-pull.gradient * pull.value for pull in (own["entropy"], outward) if pull is not None]
    if own["log_normalizer"] is not None:
        terms.append(own["log_normalizer"].gradient)
    return _flat(torch.stack(terms).sum(0)) if terms else None


def _gradient(pull: Pull | None) -> Tensor | None:
    return None if pull is None else _flat(pull.gradient)


def _flat(column: Tensor) -> Tensor:
    return column.to(torch.float32).flatten().contiguous()


def _column(targets: Tensor) -> Tensor:
    return torch.empty(targets.shape, dtype=torch.float32, device=targets.device)


def _stride(rows: Tensor | None) -> int:
    return 0 if rows is None else rows.stride(0)


def _launch(kernel: str, rows: Tensor, *arguments: Any, **constants: Any) -> None:
    """Run a kernel with one program a row."""
    from kedge.head import triton_rows  # only who runs it needs Triton

    block = min(MOST_IN_A_TILE, max(16, 1 << (rows.shape[1] - 1).bit_length()))
    warps = min(8, max(1, block // 512))  # 16 logits a thread
    with torch.cuda.device_of(rows):
        getattr(triton_rows, kernel)[(rows.shape[0],)](*arguments, **constants, BLOCK=block, num_warps=warps)


TRITON = Runner(forward, backward, 2**62)
