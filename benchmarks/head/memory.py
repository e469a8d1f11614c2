"""Peaks of memory: on a CPU of a process of its own, on a GPU of the allocator."""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import TypedDict

import torch

from benchmarks.head.contender import Contender, Step
from benchmarks.head.inputs import Inputs, Size, make_inputs
from benchmarks.head.timing import warm
from kedge.head import room

ROOT = Path(__file__).parents[2]


class Peak(TypedDict):
    """Bytes: the peak above what was there before the call (inputs and libraries), and the peak itself."""

    incremental: int
    absolute: int


def peak_in_a_process(name: str, size: Size, threads: int) -> Peak | None:
    """Run one contender in a fresh process; None, with its complaint shown, if it fails."""
    command = [sys.executable, "-m", "benchmarks.head", "--memory", name, "--sizes", str(size)]
    done = subprocess.run(
        [*command, "--device", "cpu", "--threads", str(threads)], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        print(f"no memory of {name}: {done.stderr[-500:]}", file=sys.stderr)
        return None
    found: Peak = json.loads(done.stdout.splitlines()[-1])
    return found


def peak_of_this_process(contender: Contender, size: Size) -> Peak:
    """Measure here: what ``--memory`` runs."""
    inputs = make_inputs(size, torch.device("cpu"), torch.float32)
    warm(contender, inputs)
    step = contender.build(inputs)
    gc.collect()
    room.forget()  # what the head keeps from warming up
    _give_back_free_memory()
    _forget_peak()
    before = _status("VmRSS")
    step()
    peak = _status("VmHWM")  # that of getrusage may be a parent's
    return {"incremental": peak - before, "absolute": peak}


def peak_on_gpu(step: Step, inputs: Inputs) -> Peak:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    inputs.forget_gradients()
    return {"incremental": peak - before, "absolute": peak}


def _give_back_free_memory() -> None:
    """Let the C library hand back what it holds but nobody uses, or a contender would use it for nothing."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)


def _forget_peak() -> None:
    """Let the kernel's high-water mark begin anew, so that making inputs does not count."""
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"the kernel's /proc/self/status has no {key}")
