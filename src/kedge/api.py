"""``kedge.train``: a whole recipe from Python, or for the command."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from kedge import recipes
from kedge.errors import RunError, UserError
from kedge.report import write_report
from kedge.runs import RunDirectory, changed_settings, read_metrics, read_samples
from kedge.runs.atomic import write_file
from kedge.training.config import Recipe, RewardStage, Stage
from kedge.training.progress import Progress, progress_for
from kedge.training.recipe import load_recipe, validate_recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kedge.runs.interrupt import Interrupt
    from kedge.training.inputs import Inputs, Materials

RECIPE = "recipe.yaml"


@dataclass(frozen=True)
class StageResult:
    """What a stage left behind."""

    name: str
    path: Path

    @property
    def metrics(self) -> list[dict[str, int | float]]:
        """One row a step."""
        return read_metrics(self.path)

    @property
    def samples(self) -> list[dict[str, Any]]:
        """Responses kept at evaluations, and of updates that were refused."""
        return read_samples(self.path)

    @property
    def model(self) -> Path:
        """Folder of the final model, for ``AutoModelForCausalLM.from_pretrained``.

        That of a reward stage is for ``AutoModelForSequenceClassification``.
        """
        return self.path / "model"


@dataclass(frozen=True)
class RunResult:
    """What a run left behind: its folder, its stages by name, its report."""

    path: Path
    stages: dict[str, StageResult]
    report: Path


def train(
    config: Recipe | Mapping[str, Any] | str | Path,
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    reference: PreTrainedModel | None = None,
    rewards: Sequence[Callable[..., Any]] | Mapping[str, Callable[..., Any]] | None = None,
    progress: Progress | None = None,
) -> RunResult:
    """Train a model by the stages of a recipe.

    Args:
        config: a recipe, the data of one, a recipe's path, or the name of one that ships.
        model: the policy, trained in place; in place of the recipe's ``model``.
        tokenizer: goes with ``model``.
        reference: what GRPO and PPO stages without a ``reference`` of their own are anchored to; a frozen copy of the
            policy as each stage finds it if left out.
        rewards: functions ``(prompts, completions, **columns) -> list[float | None]``, for stages without
            ``rewards`` or by name.
        progress: who is told; a bar on a terminal, plain lines elsewhere.

    Returns:
        What the run directory holds. The policy in memory is that of the last stage that trains one.

    Raises:
        UserError: something given cannot be used.
        RunError: the run failed or was interrupted; it is saved and goes on with ``resume=true``.

    A recipe as a dictionary, objects in memory (see README for a whole example)::

        result = kedge.train(config, model=model, tokenizer=tokenizer, rewards=[reward])
        result.stages["grpo"].metrics[-1]["reward/mean"]
    """
    from kedge.models import device_named
    from kedge.runs.interrupt import Interrupt
    from kedge.runs.lock import held
    from kedge.training.checkpoint import restore_weights
    from kedge.training.inputs import Materials, load_inputs, require_use
    from kedge.training.resources import make_model, prepare_policy

    recipe = _recipe(config)
    if (model is None) != (tokenizer is None):
        raise UserError("model and tokenizer go together: give both or neither")
    device = device_named(recipe.device)
    root = _usable_root(recipe)
    progress = progress or progress_for()
    if model is None or tokenizer is None:
        model, tokenizer = make_model(recipe.model, recipe.seed, device)
    scorers = {
        stage.name: root / stage.name / "model" for stage in recipe.stages if isinstance(stage, RewardStage)
    }
    materials = Materials(model.to(device), tokenizer, device, recipe.seed, rewards, reference, scorers)
    try:
        require_use(recipe.stages, materials)
        prepare_policy(model, tokenizer)
        unfinished = [stage for stage in recipe.stages if not _finished(root / stage.name, stage)]
        for stage in recipe.stages:
            for note in _notes(recipe, stage, root, {each.name for each in unfinished}):
                progress.say(f"note: stage {stage.name!r} {note}")
        inputs = {stage.name: load_inputs(stage, materials) for stage in unfinished}
        _make_root(root)
        with held(root), Interrupt() as interrupt:
            _write_recipe(root, recipe)
            for stage in unfinished:
                if (before := recipe.policy_before(stage)) is not None:
                    restore_weights(model, root / before / "model")
                _run_one(recipe, stage, inputs[stage.name], root, materials, progress, interrupt)
        policies = [stage.name for stage in recipe.stages if stage.name not in scorers]
        if policies and [stage.name for stage in unfinished][-1:] != policies[-1:]:
            restore_weights(model, root / policies[-1] / "model")
    finally:
        progress.close()
    stages = {stage.name: StageResult(stage.name, root / stage.name) for stage in recipe.stages}
    report = write_report([result.path for result in stages.values()], root / "report.html")
    return RunResult(root, stages, report)


def _notes(recipe: Recipe, stage: Stage, root: Path, unfinished: set[str]) -> Iterator[str]:
    """Say where a run that goes on is not what its recipe now says."""
    changed = changed_settings(root / stage.name, _config(recipe, stage))
    if stage.name in unfinished:
        if changed:
            yield f"goes on with other settings: {changed}"
        return
    if changed:
        yield f"is finished and stays as it is, made with other settings: {changed}"
    before = recipe.policy_before(stage)
    if before in unfinished:
        yield f"is finished and stays as it is, made from what stage {before!r} was before it goes on"


def _finished(path: Path, stage: Stage) -> bool:
    if not (path / "model").is_symlink():
        return False
    rows = read_metrics(path)
    return bool(rows) and int(rows[-1]["step"]) >= stage.steps


def _run_one(
    recipe: Recipe,
    stage: Stage,
    inputs: Inputs,
    root: Path,
    materials: Materials,
    progress: Progress,
    interrupt: Interrupt,
) -> None:
    """Run a stage, from its start or from its last checkpoint."""
    from kedge.training.stages import run_stage

    path = root / stage.name
    resume = recipe.resume and path.exists()
    with RunDirectory.create(path, _config(recipe, stage), resume=resume, sinks=recipe.sinks) as run:
        try:
            run_stage(stage, inputs, materials, run, progress, interrupt)
        except Exception as error:
            run.log("".join(traceback.format_exception(error)))
            if isinstance(error, RunError):
                progress.say(
                    f"details in {path / 'log.txt'}; go on from the last checkpoint with resume=true"
                )
            raise


def _config(recipe: Recipe, stage: Stage) -> dict[str, Any]:
    """Give what a stage's folder records."""
    shared = {"recipe": recipe.name, "seed": recipe.seed, "model": recipe.model.model_dump(mode="json")}
    return {**shared, **stage.model_dump(mode="json")}


def _recipe(config: Recipe | Mapping[str, Any] | str | Path) -> Recipe:
    if isinstance(config, Recipe):
        return config
    return validate_recipe(config) if isinstance(config, Mapping) else load_recipe(recipes.find(config))


def _usable_root(recipe: Recipe) -> Path:
    """Give the run's folder; refuse one that is taken."""
    root = Path(recipe.directory)
    try:
        exists = root.exists()
        filled = root.is_dir() and any(not entry.name.startswith(".") for entry in root.iterdir())
    except OSError as error:
        raise UserError(
            f"{root}: cannot be read ({error.strerror}); give another folder with out=…"
        ) from None
    if exists and not recipe.resume:
        raise UserError(
            f"{root}: this run exists already; go on with it by resume=true, or write elsewhere with out=…"
        )
    if filled and not (root / RECIPE).exists():
        raise UserError(f"{root}: is no run of Kedge (it has no {RECIPE}); give another folder with out=…")
    return root


def _make_root(root: Path) -> None:
    """Make the run's folder if there is none."""
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{root}: cannot be made ({error.strerror}); give another folder with out=…"
        ) from None


def _write_recipe(root: Path, recipe: Recipe) -> None:
    plain = json.loads(json.dumps(recipe.dump()))
    write_file(root / RECIPE, yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=110).encode())
