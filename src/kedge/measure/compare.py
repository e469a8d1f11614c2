"""``kedge.measure.compare``: how far two models are apart."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kedge.errors import UserError
from kedge.measure.answer import answer
from kedge.measure.config import MeasureConfig
from kedge.measure.files import require_parquet, require_replaceable, write
from kedge.measure.inputs import Given
from kedge.measure.models import Models, Source
from kedge.measure.pieces import Pieces
from kedge.measure.pipeline import Pipeline, Work
from kedge.measure.plan import backend_for, plan
from kedge.measure.progress import Progress, Silent
from kedge.measure.result import Comparison
from kedge.runs import environment
from kedge.runs.interrupt import Interrupt, Interrupted


def compare(
    policy: Source,
    reference: Source,
    *,
    prompts: Given | None = None,
    texts: Given | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
    trust_remote_code: bool = False,
    **settings: Any,
) -> Comparison:
    """Measure how far two models are apart, by exact KL at every token.

        policy responses      KL(π‖ρ) = E_π[ Σ_t KL(π(·|s_t)‖ρ(·|s_t)) ], along responses sampled from π
        reference responses   KL(ρ‖π), the same with π and ρ exchanged
        texts                 KL(π(·|s_t)‖ρ(·|s_t)) and KL(ρ(·|s_t)‖π(·|s_t)), averaged over the tokens of given texts

    Every KL on the right is exact over the vocabulary. Errors are those of the prompts or texts, which count as the
    independent draws. A Ctrl-C ends the work after the part in hand and keeps what was scored, labelled partial.

    Args:
        policy: a folder, a name on the hub, a folder with a PEFT adapter, or a model in memory.
        reference: the same.
        prompts: a file, a dataset's name, or rows (texts or dictionaries); responses to them are sampled.
        texts: the same, with a column ``text``, or chat messages, or prompt and completion.
        tokenizer: of both models; read from the reference's folder when left out.
        out: a folder for ``measure.json`` and ``tokens.parquet``; none is written when left out. ``kedge report``
            adds the page, ``kedge measure`` does so itself.
        progress: who is told.
        trust_remote_code: let the models' own Python code run.
        settings: those of ``MeasureConfig``.

    Returns:
        The answer to each question asked; ``Comparison.summary()`` is what ``measure.json`` holds.

    Raises:
        UserError: something given cannot be used.
        RunError: damaged files, a full disk; an interrupt before anything was scored.

    Source: Amini, Vieira, Cotterell, "Better Estimation of the KL Divergence Between Language Models", 2025,
    arXiv 2504.10637, for exact KLs along samples.

    >>> from kedge.models import build_model
    >>> from kedge.tasks import sums
    >>> policy, reference = (build_model(16, hidden_size=8, layers=1, heads=2, seed=seed) for seed in (0, 1))
    >>> found = compare(
    ...     policy, reference, texts=["1+2=3", "4+5=9"], prompts=["1+2=", "3+4="], tokenizer=sums.tokenizer(),
    ...     max_new_tokens=4, device="cpu",
    ... )
    >>> sorted(found.answers), found["texts"]["reverse_kl"] > 0
    (['policy_responses', 'reference_responses', 'texts'], True)
    """
    started = time.perf_counter()
    config = MeasureConfig(**settings)
    if prompts is None and texts is None:
        raise UserError("nothing to compare the models on: give prompts, texts, or both")
    if out is not None:
        require_parquet()
        require_replaceable(Path(out))
    models = Models(
        policy,
        reference,
        tokenizer,
        dtype=config.dtype,
        device=_device(config, policy, reference),
        low_memory=config.low_memory,
        trust_remote_code=trust_remote_code,
    )
    works = plan(models, config, prompts, texts)
    progress = progress or Silent()
    with Interrupt() as interrupt:
        try:
            Pipeline(models, config, backend_for(models, config, works), progress, interrupt).run(works)
        finally:
            progress.close()
    scored = [work for work in works if work.tables]
    if not scored:
        raise Interrupted("stopped before anything was scored; there is nothing to keep")
    pieces = Pieces(models.tokenizer)
    facts = models.facts
    comparison = Comparison(
        answers={work.question.name: answer(work, pieces, config) for work in scored},
        policy=facts["policy"],
        reference=facts["reference"],
        settings={**dataclasses.asdict(config), "device": str(models.device)},
        environment=environment(
            device=str(models.device), seed=config.seed, reference=facts["reference"]["fingerprint"]
        ),
        vocabulary=models.vocabulary,
        notes=_notes(works, models),
        seconds=time.perf_counter() - started,
        complete=all(work.complete for work in works),
    )
    if out is not None:
        write(comparison, Path(out))
    return comparison


def _device(config: MeasureConfig, *sources: Source) -> str:
    """Take the device of a model in memory where none is named."""
    if config.device == "auto":
        for source in sources:
            if isinstance(source, PreTrainedModel):
                return str(source.device)
    return config.device


def _notes(works: list[Work], models: Models) -> list[str]:
    """Say what a reader of the figures should know."""
    notes = []
    if models.facts["policy"]["fingerprint"] == models.facts["reference"]["fingerprint"]:
        notes.append("policy and reference have the same weights, to the bit")
    for work in works:
        question = work.question
        if not work.complete:
            done = sum(len(table.response.unique()) for table in work.tables)
            notes.append(f"{question.title}: partial, interrupted after {done} sequences")
        if len({window.cluster for window in work.windows}) == 1:
            kind = "responses to it" if question.sampled_from else "windows"
            notes.append(f"{question.title}: one {question.cluster} alone; errors are those of the {kind}")
    return notes
