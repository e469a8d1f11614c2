"""What is compiled ahead is what the comparison then uses. In a process without run-time type checks, which break
compiling."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import torch
from kedge.head import Head, score
from kedge.measure.ahead import compiled_ahead
from kedge.measure.parts import WANT

V, width, rows = 300, 8, 70
temperature, dtype = 0.7, torch.bfloat16
hidden, weight = torch.randn(2, rows, width, dtype=dtype), torch.randn(2, V + 4, width, dtype=dtype)
heads = {
    side: Head(weight[i], torch.zeros(V + 4, dtype=dtype), softcap=5.0, vocabulary=V)
    for i, side in enumerate(("policy", "reference"))
}
graphs = lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
with compiled_ahead(heads, temperature, "chunked"):
    pass
assert graphs() == 0
with compiled_ahead(heads, temperature, "compiled"):
    pass
assert graphs() == 1, graphs()
with torch.no_grad():
    for chunk_rows in (64, 40):
        score(
            hidden[0], heads["policy"], torch.zeros(rows, dtype=torch.int64),
            anchors={"reference": (hidden[1], heads["reference"])}, want=WANT, temperature=temperature,
            backend="compiled", chunk_rows=chunk_rows,
        )
assert graphs() == 1, graphs()
"""


def test_nothing_is_compiled_twice() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_an_error_of_the_compiler_is_raised_where_it_is_needed() -> None:
    script = """
import torch
from kedge.head import Head, runner
from kedge.measure.ahead import compiled_ahead

def broken(*given, **options):
    raise RuntimeError("no compiler")

torch.compile = broken
with compiled_ahead(dict.fromkeys(("policy", "reference"), Head(torch.zeros(3, 2))), 1.0, "compiled"):
    print("goes on")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "goes on\n", "")
