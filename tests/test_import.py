"""``import kedge`` and ``kedge --help`` are light."""

from __future__ import annotations

import subprocess
import sys
import time


def modules_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint('\\n'.join(sys.modules))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_import_does_not_import_torch() -> None:
    assert "torch" not in modules_after("import kedge")


def test_that_test_can_fail() -> None:
    assert "torch" in modules_after("import kedge; kedge.divergence")


def test_help_does_not_import_torch() -> None:
    code = "import contextlib, io, kedge.cli\nwith contextlib.redirect_stdout(io.StringIO()):\n" + (
        "    try: kedge.cli.main(['--help'])\n    except SystemExit: pass"
    )
    loaded = modules_after(code)
    assert "kedge.cli" in loaded
    assert not {"torch", "transformers", "pydantic"} & loaded


def test_help_answers_at_once() -> None:
    """Half a second of processor time, which a busy machine does not stretch."""
    script = (
        "import resource, subprocess, sys\n"
        "subprocess.run([sys.executable, '-m', 'kedge.cli', '--help'], stdout=subprocess.DEVNULL, check=True)\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "print(used.ru_utime + used.ru_stime)"
    )
    started = time.monotonic()
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 0.5, (
        f"{result.stdout.strip()} s of processor time ({time.monotonic() - started:.2f} s)"
    )
