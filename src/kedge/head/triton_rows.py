"""What happens to every logit of a row, as Triton kernels: one program a row, float32 inside, tile after tile.

The formulas are those of ``divergence.log_probs`` and of ``gradients``. A pointer that is None stands for a
term that is not there: each combination is compiled for itself, and pays for nothing else. The start of a row
is counted in 64 bits: 14,134 rows of 151,936 logits are more than 32 bits hold. Columns beyond the vocabulary
count nothing. A logit below −FAR is read as −FAR, which is how a masked one stays finite.
"""

from typing import no_type_check  # also keeps run-time type checkers away from what is not run as Python

import triton
import triton.language as tl

_FAR = tl.constexpr(1e20)
_BELOW_ALL = tl.constexpr(-1e30)  # a maximum to start from: −∞ − (−∞) would be no number
_NEAR = tl.constexpr(0.25)


@triton.jit
@no_type_check
def score_rows(
    logits,
    stride,
    bias,
    targets,
    maximum,
    log_sum,
    log_prob,
    entropy,
    tokens,
    inner,
    outer,
    CAPPED: tl.constexpr,  # logit = outer·tanh(inner·product), else outer·product
    WRITE: tl.constexpr,  # whether product and logit differ
    BLOCK: tl.constexpr,
):
    """Turn a row of products into logits, in place; find both parts of its normaliser, log-prob, entropy."""
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * stride
    if log_prob is not None:
        target = tl.load(targets + row)
        known = (target >= 0) & (target < tokens)  # what is not in the vocabulary has no number
        chosen = _logit(start, bias, target, known, float("nan"), inner, outer, CAPPED, WRITE)
        tl.debug_barrier()  # it is read before any thread writes
    peak = tl.full((), _BELOW_ALL, tl.float32)
    count = tl.full((), 0.0, tl.float32)  # how many logits are at the peak
    others = tl.full((), 0.0, tl.float32)  # Σ e^(l − peak) of those below it
    moment = tl.full((), 0.0, tl.float32)  # Σ (l − peak)·e^(l − peak)
    for first in range(0, tokens, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < tokens
        logit = _logit(start, bias, columns, inside, 0.0, inner, outer, CAPPED, WRITE)
        if WRITE:
            tl.store(start + columns, logit, mask=inside)
        logit = tl.where(inside, logit, _BELOW_ALL)
        higher = tl.maximum(peak, tl.max(logit, 0))
        decay = tl.exp(peak - higher)
        below = logit - higher
        power = tl.exp(below)
        if entropy is not None:
            moment = decay * (moment + (peak - higher) * (count + others)) + tl.sum(below * power, 0)
        risen = higher > peak
        others = decay * (others + tl.where(risen, count, 0.0)) + tl.sum(tl.where(below == 0, 0.0, power), 0)
        count = tl.where(risen, 0.0, count) + tl.sum(tl.where(below == 0, 1.0, 0.0), 0)
        peak = higher
    rest = tl.log(count) + _log1p(others / count)
    tl.store(maximum + row, peak)
    tl.store(log_sum + row, rest)
    if entropy is not None:
        tl.store(entropy + row, rest - moment / (count + others))
    if log_prob is not None:
        value = (chosen - peak) - rest
        tl.store(log_prob + row, tl.where(value < -0.5 * _FAR, float("-inf"), value))


@triton.jit
@no_type_check
def compare_rows(
    p_logits,
    q_logits,
    p_stride,
    q_stride,
    p_maximum,
    p_log_sum,
    q_maximum,
    q_log_sum,
    reverse_kl,
    forward_kl,
    total_variation,
    tokens,
    BLOCK: tl.constexpr,
):
    """Compare a row of two distributions: KL(p‖q), KL(q‖p), TV(p, q)."""
    row = tl.program_id(0).to(tl.int64)
    p_start, q_start = p_logits + row * p_stride, q_logits + row * q_stride
    p_top, p_rest = tl.load(p_maximum + row), tl.load(p_log_sum + row)
    q_top, q_rest = tl.load(q_maximum + row), tl.load(q_log_sum + row)
    outward = tl.full((), 0.0, tl.float32)
    inward = tl.full((), 0.0, tl.float32)
    apart = tl.full((), 0.0, tl.float32)
    lowest = tl.full((), 0.0, tl.float32)
    highest = tl.full((), 0.0, tl.float32)
    for first in range(0, tokens, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < tokens
        p_logit, q_logit = _read(p_start, columns, inside), _read(q_start, columns, inside)
        p = tl.exp((p_logit - p_top) - p_rest)
        q = tl.exp((q_logit - q_top) - q_rest)
        x = tl.where(inside, _log_ratio(p_logit, p_top, p_rest, q_logit, q_top, q_rest), 0.0)
        if reverse_kl is not None:
            outward += tl.sum(_excess_terms(p, q, x), 0)
            lowest = tl.minimum(lowest, tl.min(x, 0))
        if forward_kl is not None:
            inward += tl.sum(_excess_terms(q, p, -x), 0)
            highest = tl.maximum(highest, tl.max(x, 0))
        if total_variation is not None:
            apart += tl.sum(tl.maximum(p, q) * -_expm1(-tl.abs(x)), 0)
    if reverse_kl is not None:
        outward = tl.where(outward < 0, 0.0, outward)
        tl.store(reverse_kl + row, tl.where(lowest < -0.5 * _FAR, float("inf"), outward))
    if forward_kl is not None:
        inward = tl.where(inward < 0, 0.0, inward)
        tl.store(forward_kl + row, tl.where(highest > 0.5 * _FAR, float("inf"), inward))
    if total_variation is not None:
        apart = 0.5 * apart
        tl.store(total_variation + row, tl.where(apart > 1.0, 1.0, apart))


@triton.jit
@no_type_check
def pull_rows(
    p_logits,
    q_logits,
    p_gradient,
    q_gradient,
    p_stride,
    q_stride,
    p_gradient_stride,
    q_gradient_stride,
    p_maximum,
    p_log_sum,
    q_maximum,
    q_log_sum,
    targets,
    p_constant,
    p_entropy,
    p_log_prob,
    q_constant,
    q_entropy,
    q_log_prob,
    reverse_kl,
    forward_kl,
    total_variation,
    tokens,
    p_factor,
    p_outer,
    q_factor,
    q_outer,
    P_CAPPED: tl.constexpr,
    Q_CAPPED: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write a row of the gradient of products; it may overwrite the logits. With x = log q − log p, s = sign(p − q).

    dp = p·[constant − entropy·log p − reverse·x + ½·variation·(s − Σ p·s)] + forward·(p − q) + log_prob·(1[a] − p),
    dq the same with p and q, reverse and forward exchanged; each of these words is a column of upstream numbers.
    ``ADD`` adds dp to what is there.
    """
    row = tl.program_id(0).to(tl.int64)
    p_start = p_logits + row * p_stride
    p_top, p_rest = tl.load(p_maximum + row), tl.load(p_log_sum + row)
    p_sides, q_sides, target = None, None, None  # where nothing asks for them
    if q_logits is not None:
        q_start = q_logits + row * q_stride
        q_top, q_rest = tl.load(q_maximum + row), tl.load(q_log_sum + row)
    if total_variation is not None:
        p_sides, q_sides = _sides(p_start, p_top, p_rest, q_start, q_top, q_rest, tokens, BLOCK)
    if p_log_prob is not None or q_log_prob is not None:
        target = tl.load(targets + row)
    for first in range(0, tokens, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < tokens
        p_logit = _read(p_start, columns, inside)
        log_p = (p_logit - p_top) - p_rest
        if q_logits is not None:
            q_logit = _read(q_start, columns, inside)
            log_q = (q_logit - q_top) - q_rest
            x = _log_ratio(p_logit, p_top, p_rest, q_logit, q_top, q_rest)
            difference = tl.maximum(tl.exp(log_p), tl.exp(log_q)) * _expm1(-tl.abs(x)) * _sign(x)
        else:
            x, difference = None, None
        if p_gradient is not None:
            gradient = _pulled(
                row, columns, target, log_p, x, difference,
                p_constant, p_entropy, p_log_prob, reverse_kl, forward_kl, total_variation, p_sides,
            ) * _slope(p_logit, p_factor, p_outer, P_CAPPED)  # fmt: skip
            place = p_gradient + row * p_gradient_stride + columns
            if ADD:
                gradient += tl.load(place, mask=inside, other=0.0)
            tl.store(place, gradient, mask=inside)
        if q_gradient is not None:
            gradient = _pulled(
                row, columns, target, log_q, -x, -difference,
                q_constant, q_entropy, q_log_prob, forward_kl, reverse_kl, total_variation, q_sides,
            ) * _slope(q_logit, q_factor, q_outer, Q_CAPPED)  # fmt: skip
            tl.store(q_gradient + row * q_gradient_stride + columns, gradient, mask=inside)


@triton.jit
@no_type_check
def _pulled(
    row,
    columns,
    target,
    log_p,
    x,
    difference,
    constant,
    entropy,
    log_prob,
    outward,
    inward,
    total_variation,
    sides,
):
    """Return dp of ``pull_rows``, with ``difference`` = p − q, by the logits; the same serves q, from its side."""
    bracket = tl.zeros_like(log_p)
    if constant is not None:
        bracket += tl.load(constant + row)
    if entropy is not None:
        bracket -= tl.load(entropy + row) * log_p
    if outward is not None:
        bracket -= tl.load(outward + row) * x
    if total_variation is not None:
        bracket += 0.5 * tl.load(total_variation + row) * _less_mean(-x, sides)
    gradient = tl.exp(log_p) * bracket
    if inward is not None:
        gradient += tl.load(inward + row) * difference
    if log_prob is not None:
        gradient += tl.load(log_prob + row) * _below_target(columns == target, log_p)
    return gradient


@triton.jit
@no_type_check
def _sides(p_start, p_top, p_rest, q_start, q_top, q_rest, tokens, BLOCK: tl.constexpr):
    """Return Σ p where p > q, p < q, p = q, and Σ q where q > p, q < p, q = p, of a row."""
    p_above = tl.full((), 0.0, tl.float32)
    p_below = tl.full((), 0.0, tl.float32)
    p_level = tl.full((), 0.0, tl.float32)
    q_above = tl.full((), 0.0, tl.float32)
    q_below = tl.full((), 0.0, tl.float32)
    q_level = tl.full((), 0.0, tl.float32)
    for first in range(0, tokens, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < tokens
        p_logit, q_logit = _read(p_start, columns, inside), _read(q_start, columns, inside)
        x = _log_ratio(p_logit, p_top, p_rest, q_logit, q_top, q_rest)
        p = tl.exp((p_logit - p_top) - p_rest)
        q = tl.exp((q_logit - q_top) - q_rest)
        p_above += tl.sum(tl.where(x < 0, p, 0.0), 0)
        p_below += tl.sum(tl.where(x > 0, p, 0.0), 0)
        p_level += tl.sum(tl.where(x == 0, p, 0.0), 0)
        q_above += tl.sum(tl.where(x > 0, q, 0.0), 0)
        q_below += tl.sum(tl.where(x < 0, q, 0.0), 0)
        q_level += tl.sum(tl.where(x == 0, q, 0.0), 0)
    return (p_above, p_below, p_level), (q_above, q_below, q_level)


@triton.jit
@no_type_check
def _logit(
    start, bias, columns, inside, other, inner, outer, CAPPED: tl.constexpr, WRITE: tl.constexpr
):  # the same for a block of columns and for one
    logit = tl.load(start + columns, mask=inside, other=other).to(tl.float32)
    if WRITE:
        if bias is not None:
            logit += tl.load(bias + columns, mask=inside, other=0.0)
        if CAPPED:
            logit = tl.where(logit == float("-inf"), logit, outer * _tanh(inner * logit))
        else:
            logit *= outer
    return _clamp(logit)


@triton.jit
@no_type_check
def _read(start, columns, inside):
    """Logits, of probability 0 beyond the vocabulary, however low the others are."""
    return _clamp(tl.load(start + columns, mask=inside, other=float("-inf")).to(tl.float32))


@triton.jit
@no_type_check
def _clamp(logit):
    return tl.where(logit < -_FAR, -_FAR, logit)  # a maximum might swallow a NaN


@triton.jit
@no_type_check
def _log_ratio(p_logit, p_top, p_rest, q_logit, q_top, q_rest):
    return ((q_logit - p_logit) - (q_top - p_top)) - (q_rest - p_rest)


@triton.jit
@no_type_check
def _less_mean(x, sides):
    """Return s − Σ p·s with s = sign(x), from Σ p over s = 1, −1, 0, of which none is subtracted from 1."""
    above, below, level = sides
    return tl.where(x > 0, 2.0 * below + level, tl.where(x < 0, -2.0 * above - level, below - above))


@triton.jit
@no_type_check
def _below_target(chosen, log_p):
    """1[a] − p; at the target to the last digits, where p is almost 1."""
    lower = tl.where(log_p > 0, 0.0, log_p)
    return tl.where(chosen, -_expm1(lower), -tl.exp(log_p))


@triton.jit
@no_type_check
def _slope(logit, factor, outer, CAPPED: tl.constexpr):
    """By how much a logit grows with its product."""
    if CAPPED:
        tanh = logit / outer
        tanh = tl.where(tanh < -1.0, -1.0, tanh)
        return factor * (1.0 - tanh * tanh)
    else:  # noqa: RET505  # what is compiled needs one of two branches
        return factor


@triton.jit
@no_type_check
def _sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))


@triton.jit
@no_type_check
def _series(x):
    """φ(x) = eˣ − 1 − x for |x| ≤ ¼: x²·Σ xᵏ/(k + 2)!."""
    total = x * (1 / 5040) + 1 / 720
    total = total * x + 1 / 120
    total = total * x + 1 / 24
    total = total * x + 1 / 6
    total = total * x + 1 / 2
    return total * x * x


@triton.jit
@no_type_check
def _excess_terms(p, q, x):
    """p·φ(x) for x = log q − log p, without overflow where x is large; q where p is 0."""
    near = tl.abs(x) < _NEAR
    return tl.where(near, p * _series(tl.where(near, x, 0.0)), q - p * (1.0 + x))


@triton.jit
@no_type_check
def _expm1(x):
    """eˣ − 1 for x ≤ 0, to the last digits."""
    near = tl.abs(x) < _NEAR
    close = tl.where(near, x, 0.0)
    return tl.where(near, close + _series(close), tl.exp(x) - 1.0)


@triton.jit
@no_type_check
def _log1p(x):
    """log(1 + x) for x ≥ 0, to the last digits: the rounding of 1 + x is taken out again."""
    grown = 1.0 + x
    rounded = tl.where(grown == 1.0, 1.0, grown - 1.0)
    near = tl.where(grown == 1.0, x, tl.log(grown) * (x / rounded))
    return tl.where(grown < 2.0, near, tl.log(grown))


@triton.jit
@no_type_check
def _tanh(x):
    grown = _expm1(-2.0 * tl.abs(x))
    return -_sign(x) * grown / (grown + 2.0)
