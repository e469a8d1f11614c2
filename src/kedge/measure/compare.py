"""``kedge.measure.compare``: how far two models are apart."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kedge.errors import RunError, UserError
from kedge.measure.conclusion import conclusion
from kedge.measure.config import SAVED, Given, MeasureConfig, require_acting
from kedge.measure.files import require_parquet, require_replaceable, require_writable
from kedge.measure.models import Models, Source
from kedge.measure.pipeline import Pipeline
from kedge.measure.plan import backend_for, plan
from kedge.measure.progress import Progress, Silent
from kedge.measure.result import Comparison
from kedge.runs.interrupt import Interrupt


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
    independent draws. A Ctrl-C ends the work after the part in hand and keeps what was scored, labelled partial; with
    ``out``, an error keeps it there, too.

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
    if prompts is None and texts is None:
        raise UserError("nothing to compare the models on: give prompts, texts, or both")
    require_acting(settings, prompts=prompts, texts=texts)
    if isinstance(policy, PreTrainedModel) and isinstance(reference, PreTrainedModel):
        if "dtype" in settings:
            raise UserError(
                "dtype does nothing for models that are in memory: cast them with model.to(dtype), or leave it out"
            )
        settings["dtype"] = SAVED
    config = MeasureConfig(**settings)
    folder = None if out is None else Path(out).expanduser().resolve()
    if folder is not None:
        require_parquet()
        require_writable(folder)
        require_replaceable(folder)
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
    conclude = partial(conclusion, works, models, config, started, folder)
    with Interrupt() as interrupt:  # to the end: a Ctrl-C while figures are made loses nothing
        try:
            Pipeline(models, config, backend_for(models, config, works), progress, interrupt).run(works)
        except Exception as error:
            if folder is None or not any(work.tables for work in works):
                raise
            conclude(f"failed before all was scored: {error}")
            raise RunError(f"{error}. What was scored before is in {folder}, labelled partial") from error
        finally:
            progress.close()
        return conclude()


def _device(config: MeasureConfig, *sources: Source) -> str:
    """Take the device of a model in memory where none is named."""
    if config.device == "auto":
        for source in sources:
            if isinstance(source, PreTrainedModel):
                return str(source.device)
    return config.device
