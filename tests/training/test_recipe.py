"""A recipe that cannot be used: one clear error with file, line and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from kedge import recipes
from kedge.cli import main
from kedge.errors import UserError
from kedge.training import load_recipe, parse_recipe, validate_recipe
from kedge.training.config import GrpoStage
from kedge.training.manual import manual

GOOD = """\
name: example
model:
  build: {hidden_size: 32}
  tokenizer: {task: sums}
stages:
  - name: sft
    method: sft
    steps: 10
    data: {task: sums}
  - name: grpo
    method: grpo
    steps: 10
    data: {task: sums}
    rewards:
      functions:
        - function: kedge.tasks.sums:correct
    anchor:
      controller: {kind: fixed, beta: 0.1}
"""


def changed(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new)


BAD = {
    "unknown key": (
        changed(
            "steps: 10\n    data: {task: sums}\n    rewards", "step: 10\n    data: {task: sums}\n    rewards"
        ),
        "r.yaml:12: stages.1.step: unknown key; did you mean `steps`?",
    ),
    "unknown nested key": (changed("hidden_size", "hidden_sise"), "did you mean `hidden_size`?"),
    "wrong type": (
        changed(
            "steps: 10\n    data: {task: sums}\n  - name: grpo",
            "steps: ten\n    data: {task: sums}\n  - name: grpo",
        ),
        "r.yaml:8: stages.0.steps: input should be a valid integer, not 'ten'",
    ),
    "unknown method": (
        changed("method: grpo", "method: gpro"),
        "r.yaml:10: stages.1: method: 'gpro' is none of 'sft', 'reward', 'grpo', 'ppo'",
    ),
    "missing": (
        changed(
            "    steps: 10\n    data: {task: sums}\n  - name: grpo", "    data: {task: sums}\n  - name: grpo"
        ),
        "stages.0.steps: is required and was not given",
    ),
    "beta below 0": (
        changed("beta: 0.1", "beta: -0.1"),
        "r.yaml:18: stages.1.anchor.controller.beta: input should be greater than or equal to 0",
    ),
    "budget 0": (
        changed("{kind: fixed, beta: 0.1}", "{kind: budget, budget: 0}"),
        "budget: input should be greater than 0",
    ),
    "horizon 0": (
        changed("{kind: fixed, beta: 0.1}", "{kind: adaptive, target: 0.1, horizon: 0}"),
        "horizon: input should be greater than 0",
    ),
    "k1 as a published loss": (
        changed("    anchor:\n", "    anchor:\n      measure: k1\n      gradient: published\n"),
        "expected gradient of zero",
    ),
    "exact in the reward": (
        changed("    anchor:\n", "    anchor:\n      placement: reward\n"),
        "use placement loss with gradient sequence",
    ),
    "forward with k3": (
        changed("    anchor:\n", "    anchor:\n      measure: k3\n      direction: forward\n"),
        "use measure exact",
    ),
    "weights outside sequence": (
        changed("    anchor:\n", "    anchor:\n      weights: prefix\n"),
        "act on gradient sequence only",
    ),
    "top_p": (
        changed("    rewards:", "    rollout: {top_p: 0.9}\n    rewards:"),
        "biased by the kept mass; set top_p: 1.0",
    ),
    "one response": (
        changed("    rewards:", "    rollout: {responses_per_prompt: 1}\n    rewards:"),
        "every advantage would be 0",
    ),
    "minibatches": (
        changed("    rewards:", "    minibatches: 3\n    rewards:"),
        "Near values that do: 1, 2, 4",
    ),
    "limit without effect": (
        changed("    rewards:", "    old_kl_limit: 0.1\n    rewards:"),
        "old_kl_limit does nothing with one update a step",
    ),
    "std without effect": (
        changed("    rewards:", "    advantage: {kind: mean, std: sample}\n    rewards:"),
        "std does nothing with kind: mean",
    ),
    "start": (
        changed("method: grpo\n", "method: grpo\n    start: sfft\n"),
        "starts from 'sfft', which is no earlier stage (there are: sft)",
    ),
    "bounds that beta starts outside of": (
        changed("{kind: fixed, beta: 0.1}", "{kind: budget, budget: 0.1, high: 0.5}"),
        "β must start between its bounds 0.01 and 0.5, got 1; give beta, low and high so that they fit",
    ),
    "betas": (
        changed("    rewards:", "    optimizer: {betas: [1.5, 0.9]}\n    rewards:"),
        "stages.1.optimizer.betas.0: input should be less than 1",
    ),
    "infinite": (
        changed("    rewards:", "    optimizer: {learning_rate: .inf}\n    rewards:"),
        "stages.1.optimizer.learning_rate: input should be a finite number",
    ),
    "endless warm-up": (
        changed("    rewards:", "    optimizer: {warmup_steps: 11}\n    rewards:"),
        "optimizer.warmup_steps (11) is more than steps (10)",
    ),
    "dual without clip": (
        changed("    rewards:", "    epochs: 2\n    trust_region: {kind: cispo, dual: 3.0}\n    rewards:"),
        "dual does nothing with kind: cispo",
    ),
    "twice": (
        changed("    method: grpo\n", "    method: grpo\n    steps: 3\n"),
        "r.yaml:13: the key 'steps' is given twice",
    ),
    "not yaml": ("name: [1, 2\nstages: 3", "not valid YAML"),
    "not a mapping": ("- 1\n- 2", "a recipe is a mapping of keys to values, this file holds a list"),
    "nothing": ("", "this file holds nothing"),
}


REWARD = """\
  - name: scores
    method: reward
    steps: 10
    data: {task: prose}
"""
WITH_REWARD = changed("  - name: grpo\n", REWARD + "  - name: grpo\n")
FUNCTION = "        - function: kedge.tasks.sums:correct\n"

BAD |= {
    "start from a reward model": (
        WITH_REWARD.replace("method: grpo\n", "method: grpo\n    start: scores\n"),
        "starts from 'scores', which trains a reward model; start from a stage that trains the policy",
    ),
    "a reward model of no reward stage": (
        changed(FUNCTION, "        - model: sft\n"),
        "rewards.functions: 'sft' is no earlier stage of method: reward",
    ),
    "a reward model of a later stage": (
        changed(FUNCTION, "        - model: scores\n") + REWARD,
        "rewards.functions: 'scores' is no earlier stage of method: reward",
    ),
    "function and model": (
        WITH_REWARD.replace(FUNCTION, FUNCTION + "          model: scores\n"),
        "function and model exclude each other",
    ),
    "micro_batch of a function": (
        changed(FUNCTION, FUNCTION + "          micro_batch: 4\n"),
        "micro_batch does nothing without model",
    ),
    "start and path": (
        WITH_REWARD.replace("method: reward\n", "method: reward\n    start: sft\n    path: some/model\n"),
        "r.yaml:10: stages.1: start and path exclude each other",
    ),
    "half a pair": (
        WITH_REWARD.replace("method: reward\n", "method: reward\n    compute: {micro_batch: 1}\n"),
        "compute.micro_batch counts sequences and a pair has two",
    ),
    "no head to compile": (
        WITH_REWARD.replace("method: reward\n", "method: reward\n    compute: {compile_head: true}\n"),
        "compute.compile_head does nothing here",
    ),
    "known for nothing": (
        WITH_REWARD.replace("method: reward\n", "method: reward\n    true_preference: a:b\n"),
        "true_preference does nothing without evaluation",
    ),
    "completion of a pair": (
        WITH_REWARD.replace("data: {task: prose}", "data: {task: prose, completion: x}"),
        "completion",
    ),
}

CONTROLLER = "      controller: {kind: fixed, beta: 0.1}\n"

BAD |= {
    "a horizon shorter than a step": (
        changed(CONTROLLER, "      controller: {kind: adaptive, target: 0.1, horizon: 25}\n"),
        "anchor.controller.horizon counts responses and must be above 25.6 where a step has 128",
    ),
    "weights of the old policy itself": (
        changed(CONTROLLER, CONTROLLER + "      gradient: sequence\n      weights: prefix\n"),
        "anchor.weights does nothing with one update a step",
    ),
    "a true distribution for nothing": (
        changed("method: sft\n", "method: sft\n    true_log_prob: kedge.tasks.prose:log_prob\n"),
        "true_log_prob does nothing without evaluation",
    ),
    "a time limit of models": (
        WITH_REWARD.replace(FUNCTION, "        - model: scores\n      time_limit: 5.0\n"),
        "time_limit does nothing where every reward is a model",
    ),
    "equal groups beside a batch": (
        changed(
            CONTROLLER, CONTROLLER + "    advantage: {kind: batch}\n    rollout: {resample_equal_groups: 1}\n"
        ),
        "advantage.kind: batch compares them with the others",
    ),
    "a critic that never warms up": (
        changed("method: grpo\n", "method: ppo\n    critic: {optimizer: {warmup_steps: 11}}\n"),
        "critic.optimizer.warmup_steps (11) is more than steps (10)",
    ),
}


@pytest.mark.parametrize(("text", "expected"), BAD.values(), ids=BAD.keys())
def test_bad_recipe(text: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(text, encoding="utf-8")
    assert main(["train", str(file)]) == 2
    shown = capsys.readouterr().err
    assert expected in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "runs").exists()


def test_overrides_may_stand_behind_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(GOOD, encoding="utf-8")
    assert main(["train", str(file), "seed=3", "--dry-run", "stages.grpo.steps=7"]) == 0
    shown = capsys.readouterr().out
    assert "seed: 3" in shown
    assert "steps: 7" in shown
    for wrong in (
        ["train", str(file), "--dry-run", "seed"],
        ["train", str(file), "--drive"],
        ["recipes", "--drive", "a=1"],
    ):
        with pytest.raises(SystemExit) as caught:
            main(wrong)
        assert caught.value.code == 2
    assert "unrecognized arguments: seed" in capsys.readouterr().err


def test_dual_goes_with_ratios_that_are_clipped() -> None:
    """One a token, or one a response."""
    for kind in ("clip", "sequence"):
        stage = parse_recipe(
            GOOD,
            overrides=[
                "stages.grpo.epochs=2",
                f"stages.grpo.trust_region.kind={kind}",
                "stages.grpo.trust_region.dual=3.0",
            ],
        ).stages[1]
        assert stage.trust_region.build().dual == 3.0


def test_good_recipe() -> None:
    recipe = parse_recipe(
        GOOD, overrides=["seed=3", "stages.grpo.steps=7", "stages.1.optimizer.learning_rate=1e-4"]
    )
    assert recipe.seed == 3
    assert recipe.stages[1].steps == 7
    assert recipe.stages[1].optimizer.learning_rate == 1e-4
    assert recipe.directory == "runs/example"


def test_an_override_reaches_the_stage_it_names_alone() -> None:
    """The stages of prose share their sections through an anchor of YAML."""
    plain, changed = (
        load_recipe(recipes.path("prose"), overrides)
        for overrides in ((), ("stages.exact-budget.optimizer.learning_rate=1e-4",))
    )
    before, after = (
        {stage.name: stage.optimizer.learning_rate for stage in given.stages} for given in (plain, changed)
    )
    assert after == {**before, "exact-budget": 1e-4}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed", "write key=value"),
        ("sed=1", "command line: sed: unknown key; did you mean `seed`?"),
        ("stages.rl.steps=1", "'rl' is neither a name nor a position in the list (sft, grpo)"),
        ("stages.grpo.steps=1.5", "command line: stages.1.steps: input should be a valid integer"),
        ("stages.grpo.anchor.controller.kind=budget", "stages.1.anchor.controller.budget: is required"),
    ],
)
def test_bad_override(override: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_recipe(GOOD, source="r.yaml", overrides=[override])
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("mode", "aggregation", "expected"),
    [
        ("token_mean", "token", None),
        ("token_mean", "response", "β counts mean length times"),
        ("sequence_mean", "response", "β counts mean length times"),
        ("constant", "response", None),
        ("constant", "token", "β counts 64/mean length times"),
    ],
)
def test_beta_counts_as_it_says_where_both_are_averaged_alike(
    mode: str, aggregation: str, expected: str | None
) -> None:
    def stage(beta: float) -> GrpoStage:
        anchor = {"aggregation": aggregation, "controller": {"kind": "fixed", "beta": beta}}
        tree = {"name": "a", "method": "grpo", "steps": 1, "data": {"task": "sums"}, "anchor": anchor}
        return GrpoStage.model_validate({**tree, "aggregation": {"mode": mode}})

    found = stage(0.1).averaged_apart
    assert found is None if expected is None else expected in str(found)
    assert stage(0.0).averaged_apart is None  # no anchor, only its KL


def test_where_a_stage_starts() -> None:
    """From the last stage that trains the policy; a reward stage in between leaves it as it is."""
    recipe = parse_recipe(WITH_REWARD)
    sft, scores, grpo = recipe.stages
    assert [recipe.policy_before(stage) for stage in (sft, scores, grpo)] == [None, "sft", "sft"]
    chained = parse_recipe(
        WITH_REWARD + GOOD[GOOD.index("  - name: grpo") :].replace("name: grpo", "name: more")
    )
    assert chained.policy_before(chained.stages[3]) == "grpo"
    first = parse_recipe(
        WITH_REWARD.replace(GOOD[GOOD.index("  - name: sft") : GOOD.index("  - name: grpo")], "")
    )
    assert [first.policy_before(stage) for stage in first.stages] == [None, None]


def test_the_manual_is_up_to_date() -> None:
    """``kedge recipes keys > docs/recipe.md`` after a change of the typed tree."""
    assert (Path(__file__).parents[2] / "docs" / "recipe.md").read_text(encoding="utf-8") == manual()


def test_missing_recipe_names_near_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "prosa"]) == 2
    assert "did you mean 'prose'?" in capsys.readouterr().err


IDLE = [
    "stages.grpo.steps=10",  # one update a step: no ratio, nothing to clip
    "stages.grpo.advantage.kind=mean",
    "stages.grpo.epochs=2 stages.grpo.trust_region.kind=none",
    "stages.grpo.correction.kind=truncate",
    "stages.grpo.rewards.on_error=drop",
]


@pytest.mark.parametrize("name", recipes.names())
def test_a_written_recipe_can_be_read_again(name: str) -> None:
    """With every default written out, and nothing that does nothing."""
    given = load_recipe(recipes.path(name))
    assert validate_recipe(yaml.safe_load(yaml.safe_dump(given.dump()))) == given


@pytest.mark.parametrize("override", IDLE)
def test_settings_that_do_nothing_are_not_written(override: str) -> None:
    given = parse_recipe(GOOD, overrides=override.split())
    assert parse_recipe(yaml.safe_dump(given.dump())) == given


@pytest.mark.parametrize("name", recipes.names())
def test_recipes_that_ship(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", name, "--dry-run"]) == 0
    assert "what this amounts to" in capsys.readouterr().out
    assert load_recipe(recipes.path(name)).name == name


def test_ppo_and_grpo_start_from_the_same_reward_model() -> None:
    """Two recipes, so that each is short; what they share is written twice and must stay the same."""
    ppo, grpo = (load_recipe(recipes.path(name)) for name in ("prose-rlhf", "prose-rlhf-grpo"))
    assert (ppo.model, ppo.stages[:2]) == (grpo.model, grpo.stages[:2])
    assert [stage.method for stage in (*ppo.stages, grpo.stages[2])] == ["sft", "reward", "ppo", "grpo"]
    shared = {"start", "steps", "data", "rewards", "evaluation"}
    assert ppo.stages[2].model_dump(include=shared) == grpo.stages[2].model_dump(include=shared)
