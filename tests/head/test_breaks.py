"""Deliberate breaks of a copy of the head, each a bug that others had or one a step away: its tests must fail.

That a test can fail is seen by making it fail. ``make acceptance`` does so, for every trap of ``test_traps.py``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]


class Break(NamedTuple):
    """A line of ``kedge.head`` (or of what it is built on) written wrong, and the tests that must see it."""

    what: str
    file: str
    right: str
    wrong: str
    tests: str
    times: int = 1


BREAKS = [
    # --- logits rounded on their way
    Break(
        "a bfloat16 product becomes float32 after it was rounded",
        "head/products.py",
        "multiply(left.to(out.dtype), right.to(out.dtype), out, add=add)",
        "out.copy_(left @ right)",
        "test_projection.py::test_a_whole_call_in_bfloat16",
    ),
    Break(
        "logits of a bfloat16 head are rounded to it",
        "head/projection.py",
        "        self.logits = multiply(hidden, self._weight.T, self._buffer[first : first + len(hidden)])",
        "        self.logits = multiply(hidden, self._weight.T, self._buffer[first : first + len(hidden)])\n"
        "        self.logits.copy_(self.logits.to(self._hidden.dtype))",
        "test_precision.py::test_bfloat16_inputs_have_float32_logits",
    ),
    Break(
        "the definition rounds as well, so that nothing would be seen beside it",
        "head/dense.py",
        "hidden.to(dtype) @ head.weight[: head.tokens].to(dtype).T",
        "(hidden @ head.weight[: head.tokens].T).to(dtype)",
        "test_precision.py::test_bfloat16_inputs_have_float32_logits",
    ),
    Break(
        "autocast reaches the definition's logits",
        "head/dense.py",
        "enabled=False",
        "enabled=torch.is_autocast_enabled(hidden.device.type)",
        "test_contract.py::test_autocast_does_not_reach_logits",
    ),
    Break(
        "a weight's gradient is summed in its own dtype",
        "head/projection.py",
        "            self._begun = True\n",
        "            self._begun = True\n            weight_sum.copy_(weight_sum.to(self._hidden.dtype))\n",
        "test_precision.py::test_weight_gradients_of_many_chunks_are_summed_in_float32",
    ),
    Break(
        "a scaled loss's gradients are cast first",
        "head/chunked.py",
        "workspace.gradients(), [each.dtype for each in tensors]\n        ctx.mark",
        "_cast(workspace.gradients(), [e.dtype for e in tensors]), [each.dtype for each in tensors]\n        ctx.mark",
        "test_contract.py::test_a_scaled_loss_of_float16_keeps_its_gradients",
    ),
    Break(
        "a KL by log-probabilities, not by φ",
        "divergence/log_probs.py",
        "return torch.where(near, p * _excess_series(torch.where(near, x, 0.0)), q - p * (1 + x))",
        "return -p * x",
        "test_precision.py::test_small_kl_against_float64",
    ),
    Break(
        "a KL by log-probabilities, in the kernels",
        "head/triton_rows.py",
        "    return tl.where(near, p * _series(tl.where(near, x, 0.0)), q - p * (1.0 + x))",
        "    return -p * x",
        "test_triton.py::test_as_accurate_as_operation_by_operation",
    ),
    # --- a padded vocabulary
    Break(
        "padding counts as tokens",
        "head/types.py",
        "return self.weight.shape[0] if self.vocabulary is None else self.vocabulary",
        "return self.weight.shape[0]",
        "test_masks.py::test_padding_takes_no_part",
    ),
    Break(
        "soft-capped padding keeps its mass",
        "head/elementwise.py",
        "            product.masked_fill_(masked, -math.inf)\n",
        "",
        "test_traps.py::test_a_vocabulary_cut_and_one_masked_are_the_same",
    ),
    Break(
        "soft-capped padding keeps its mass, in the kernels",
        "head/triton_rows.py",
        'logit = tl.where(logit == float("-inf"), logit, outer * _tanh(inner * logit))',
        "logit = outer * _tanh(inner * logit)",
        "test_triton.py::test_values_and_gradients",
    ),
    Break(
        "columns behind the last tile's end count",
        "head/triton_rows.py",
        'mask=inside, other=float("-inf")).to',
        "mask=inside, other=0.0).to",
        "test_triton.py::test_values_and_gradients",
    ),
    Break(
        "columns behind the last tile's end are in the normaliser",
        "head/triton_rows.py",
        "        logit = tl.where(inside, logit, _BELOW_ALL)\n",
        "",
        "test_triton.py::test_values_and_gradients",
    ),
    Break(
        "padding rows of the gradient hold what was there before",
        "head/projection.py",
        "weight_sum[self._tokens if self._begun else 0 :].zero_()",
        "pass",
        "test_contract.py::test_a_gradient_holds_nothing_of_the_memory_that_it_was_given",
    ),
    # --- 0·(−∞) and −∞ − (−∞)
    Break(
        "a masked logit stays infinite",
        "head/elementwise.py",
        "        if bias is not None:\n            product.clamp_(min=-FAR)\n",
        "",
        "test_traps.py::test_all_but_one_token_masked_in_both_heads",
    ),
    Break(
        "a masked logit stays infinite, in the kernels",
        "head/triton_rows.py",
        "return tl.where(logit < -_FAR, -_FAR, logit)",
        "return logit",
        "test_triton.py::test_values_and_gradients",
    ),
    Break(
        "what pulls at an infinite value is multiplied by it",
        "head/gradients.py",
        "        infinite = value.isinf()\n",
        "        infinite = value.isnan()\n",
        "test_masks.py::test_infinite_divergences_have_no_gradient",
    ),
    # --- offsets of 32 bits
    Break(
        "the start of a row is counted in 32 bits",
        "head/triton_rows.py",
        "row = tl.program_id(0).to(tl.int64)",
        "row = tl.program_id(0)",
        "test_triton.py::test_rows_start_where_64_bits_say",
        times=3,
    ),
    # --- an upstream gradient dropped
    Break(
        "the entropy's upstream gradient is dropped",
        "head/elementwise.py",
        'for each in ("log_prob", "entropy", "log_normalizer")}\n        compared',
        'for each in ("log_prob", "log_normalizer")}\n        compared',
        "test_traps.py::test_the_gradient_of_the_entropy_arrives",
    ),
    Break(
        "the entropy's upstream gradient is dropped, in the kernels",
        "head/triton_rows.py",
        "bracket -= tl.load(entropy + row) * log_p",
        "bracket -= 0.0 * log_p",
        "test_triton.py::test_each_output_alone",
    ),
    Break(
        "the KL's own mean is left out of its gradient",
        "head/gradients.py",
        "(each.log_ratio + each.outward.value)",
        "each.log_ratio",
        "test_agreement.py",
    ),
    Break(
        "the two divergences pull at each other's place, in the kernels",
        "head/triton_rows.py",
        "p_constant, p_entropy, p_log_prob, reverse_kl, forward_kl, total_variation, p_sides,",
        "p_constant, p_entropy, p_log_prob, forward_kl, reverse_kl, total_variation, p_sides,",
        "test_triton.py::test_each_output_alone",
    ),
    # --- scaled too late
    Break(
        "every row is pulled at by the rows' mean",
        "head/workspace.py",
        "Pull.of(gradient, scores[output])",
        "Pull.of(gradient.mean().expand_as(gradient), scores[output])",
        "test_traps.py::test_the_gradient_of_the_entropy_arrives",
    ),
    Break(
        "a factor on the loss does not reach all gradients",
        "head/chunked.py",
        "gradients = [None if each is None else each.mul_(upstream) for each in gradients]",
        "gradients[0].mul_(upstream)",
        "test_traps.py::test_a_loss_that_is_scaled_afterwards",
    ),
    # --- a head untrained, tied, or spread over processes
    Break(
        "a weight is detached on its way in",
        "head/request.py",
        "name: Anchor(rows, gathered(each))",
        "name: Anchor(rows, gathered(each.detach()))",
        "test_traps.py::test_adapters_on_the_head_are_trained",
    ),
    Break(
        "calls share one sum of gradients",
        "head/projection.py",
        "            _room_for_sum(weight, dtype) if needs[1] else None,",
        "            vars(_room_for_sum).setdefault('one', weight.new_zeros(weight.shape)) if needs[1] else None,",
        "test_traps.py::test_gradients_of_several_calls_add_up",
    ),
    Break(
        "gradients of a sharded weight are not added over the processes",
        "head/sharded.py",
        "[Partial()] * mesh.ndim",
        "None",
        "test_sharded.py",
    ),
    Break(
        "gradients of a sharded weight are their sum",
        "head/sharded.py",
        "gradient / mesh.size()",
        "gradient",
        "test_sharded.py",
    ),
    # --- compiled for a shape
    Break(
        "another number of rows compiles again",
        "head/runner.py",
        "            torch._dynamo.maybe_mark_dynamic(leaf, 0)",
        "            torch._dynamo.mark_static(leaf, 0)",
        "test_compiled.py::test_other_numbers_of_rows_are_not_compiled_again",
    ),
    Break(
        "compiled sums drop what is behind the last whole part",
        "head/compiler.py",
        "    if whole < terms.shape[-1]:",
        "    if False:",
        "test_compiled.py::test_sums_of_a_large_vocabulary_keep_their_digits",
    ),
    # --- a gradient that nobody needs
    Break(
        "a frozen head has a gradient",
        "head/projection.py",
        "_room_for_sum(weight, dtype) if needs[1] else None",
        "_room_for_sum(weight, dtype)",
        "test_cost.py",
    ),
    Break(
        "frozen hidden states have a gradient",
        "head/projection.py",
        "hidden.new_zeros(hidden.shape, dtype=dtype) if needs[0] else None",
        "hidden.new_zeros(hidden.shape, dtype=dtype)",
        "test_cost.py",
    ),
    # --- gradients filtered
    Break(
        "small probabilities have no gradient",
        "head/gradients.py",
        "    p, inner = log_p.exp(), _bracket",
        "    p, inner = log_p.exp() * (log_p > -8.3), _bracket",
        "test_traps.py::test_small_probabilities_have_their_gradient",
    ),
    # --- chunks
    Break(
        "a chunk's gradient is written over by the next",
        "head/projection.py",
        "first = self._place(rows).start if self._gradients is self._buffer else 0",
        "first = 0",
        "test_projection.py::test_gradients_are_those_of_the_chunks_that_pull",
    ),
    Break(
        "the weight's gradient is that of the last chunks",
        "head/projection.py",
        "add=self._begun",
        "add=False",
        "test_projection.py::test_gradients_are_those_of_the_chunks_that_pull",
    ),
    Break(
        "what waits is not carried back where a chunk is missing",
        "head/projection.py",
        "if rows.start != self._waiting.stop or rows",
        "if rows",
        "test_projection.py::test_gradients_are_those_of_the_chunks_that_pull",
    ),
    Break(
        "the target's gradient is that of any entry",
        "head/elementwise.py",
        "        logits[source].scatter_(-1, targets[:, None], gradient)",
        "        pass",
        "test_agreement.py",
    ),
]


@pytest.mark.acceptance
@pytest.mark.parametrize("broken", [pytest.param(each, id=each.what) for each in BREAKS])
def test_is_seen(broken: Break, tmp_path: Path) -> None:
    source = copied(tmp_path)
    path = source / "kedge" / broken.file
    text = path.read_text()
    assert text.count(broken.right) == broken.times, f"{broken.file} has changed: say anew what breaks it"
    path.write_text(text.replace(broken.right, broken.wrong))
    status = run_tests(source, broken.tests)
    assert status == 1, f"pytest ended with {status}: 0 means that nothing was seen"


@pytest.mark.acceptance
@pytest.mark.parametrize("compiled", [False, True])
def test_nothing_is_seen_where_nothing_is_broken(compiled: bool, tmp_path: Path) -> None:
    """The same tests in the same surroundings: what fails there by itself would see every break."""
    chosen = [each.tests for each in BREAKS if ("test_compiled.py" in each.tests) == compiled]
    assert run_tests(copied(tmp_path), " ".join(dict.fromkeys(" ".join(chosen).split()))) == 0


def copied(folder: Path) -> Path:
    return Path(shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__")))


def run_tests(source: Path, tests: str) -> int:
    """Run tests of the head on another copy of the sources; give pytest's exit status."""
    environment = os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    if "test_compiled.py" in tests:
        environment["KEDGE_TESTS_UNTYPED"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += [f"tests/head/{each}" for each in tests.split()]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout[-3000:])
    return done.returncode
