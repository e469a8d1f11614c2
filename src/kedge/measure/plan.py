"""What a comparison will do: the data of every question that is asked, the way of the head."""

from __future__ import annotations

from kedge.errors import UserError
from kedge.head.backend import chosen_runner, fastest_backend
from kedge.measure.config import Given, MeasureConfig
from kedge.measure.inputs import load_prompts, load_texts
from kedge.measure.models import Models
from kedge.measure.pipeline import Work
from kedge.measure.questions import POLICY_RESPONSES, REFERENCE_RESPONSES, TEXTS

COMPILING_PAYS = 10**9
"""Logits from which fusing pays here: every token has all outputs, which take long one by one."""


def plan(models: Models, config: MeasureConfig, prompts: Given | None, texts: Given | None) -> list[Work]:
    """Read the data of every question that is asked."""
    works = []
    if prompts is not None:
        windows = load_prompts(prompts, models.tokenizer, config, models.context)
        if config.sample_from in ("policy", "both"):
            works.append(Work(POLICY_RESPONSES, windows))
        if config.sample_from in ("reference", "both"):
            works.append(Work(REFERENCE_RESPONSES, windows))
    if texts is not None:
        ends = models.facts["reference"]["end_tokens"]
        works.append(Work(TEXTS, load_texts(texts, models.tokenizer, config, models.context, ends)))
    return works


def backend_for(models: Models, config: MeasureConfig, works: list[Work]) -> str:
    """Choose how the head is run, by the logits ahead; the same for both ways of keeping models."""
    if config.backend is not None:
        try:
            chosen_runner(config.backend, models.device)
        except ValueError as error:
            raise UserError(str(error)) from None
        return config.backend
    sampled = config.responses * config.max_new_tokens
    tokens = sum(
        len(work.windows) * sampled
        if work.question.sampled_from
        else sum(len(window.scored) for window in work.windows)
        for work in works
    )
    return fastest_backend(2 * tokens * models.vocabulary, models.device, COMPILING_PAYS)
