"""Run-time type checks for every test: jaxtyping annotations are enforced by beartype."""

from __future__ import annotations

import os

from jaxtyping import install_import_hook

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors: a second thread costs more than it gives
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "KEDGE_TESTS_UNTYPED" not in os.environ:  # what is compiled cannot go through them
    install_import_hook("kedge", "beartype.beartype")
