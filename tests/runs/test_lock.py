"""Two processes and one run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kedge.errors import UserError
from kedge.runs.lock import held

CHILD = """
import sys, time
from pathlib import Path
from kedge.runs.lock import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_folder_is_one_process_s_until_that_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process is at work on this run"), held(tmp_path):
            pass
    finally:
        child.kill()
        child.communicate()
    with held(tmp_path):
        pass
