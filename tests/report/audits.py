"""Audits of tiny models, measured on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kedge.measure import compare
from kedge.models import build_model, train_bpe

HOSTILE = [
    "</script><script>document.documentElement.dataset.owned='1'</script>",
    "<img src=x onerror=\"document.documentElement.dataset.owned='1'\">",
    "<svg onload=\"document.documentElement.dataset.owned='1'\"></svg><!--<script>",
    "'\"><b>bold</b> {{ 7 * 7 }} {% raw %}",
    "line\u2028separator\u2029 \u202eright to left\u202c \u0627\u0644\u0633\u0644\u0627\u0645",
    "\x00\x1b[31m\x7f\ufeff\r\n\ttab 🐎👩‍🚀 end",
    "Donau" + "dampfschifffahrts" * 12 + "gesellschaft",
]


def write_audit(folder: Path, **settings: Any) -> Path:
    """Two byte-level models on hostile texts, with tokens that are hostile themselves."""
    tokenizer = train_bpe(HOSTILE * 3, 400)
    options: dict[str, Any] = {"hidden_size": 16, "layers": 1, "heads": 2, "context": 256}
    policy, reference = (
        build_model(
            len(tokenizer), seed=seed, eos_id=1, pad_id=0, options={"initializer_range": 0.4}, **options
        )
        for seed in (0, 1)
    )
    given: dict[str, Any] = {"prompts": HOSTILE[:3], "texts": HOSTILE, **settings}
    if given["prompts"] is not None:
        given |= {"max_new_tokens": 12, "responses": 2}
    compare(
        policy,
        reference,
        tokenizer=tokenizer,
        out=folder,
        device="cpu",
        resamples=100,
        **given,
    )
    return folder


def change(folder: Path, **values: Any) -> None:
    """Write other values into ``measure.json``."""
    file = folder / "measure.json"
    summary = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(summary | values), encoding="utf-8")
