"""The callback on a Hugging Face trainer: equal to ``kedge.measure.compare``, and training goes on as without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from kedge.errors import UserError
from kedge.measure import compare
from kedge.models import build_model, save_model
from kedge.tasks import sums

pytest.importorskip("accelerate", reason="transformers' Trainer needs it")

from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

from kedge.integrations.transformers import DriftCallback

SMALL: dict[str, Any] = {"responses": 2, "max_new_tokens": 4, "batch": 4}
GIVEN: dict[str, Any] = {"prompts": [f"{n}+1=" for n in range(4)], "texts": ["1+2=3", "4+5=9", "2+2=4"]}
PEFT_WARNING = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
"""PEFT still asks transformers by an older name."""


class Sums(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Sums to learn; the loader's order draws random numbers."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = sums.tokenizer()(f"{index % 8}+{index // 8}={index % 8 + index // 8:02d}")["input_ids"]
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)}


def model(seed: int = 0) -> PreTrainedModel:
    """With dropout, so that a step depends on the random state."""
    return build_model(
        len(sums.tokenizer()), architecture="gpt2", hidden_size=16, layers=2, heads=2, context=32, seed=seed
    )


def trainer(
    folder: Path,
    trained: Any,
    *,
    init: Any = None,
    evaluated: bool = False,
    callbacks: Any = (),
    **options: Any,
) -> Trainer:
    arguments: dict[str, Any] = {"max_steps": 5, "save_steps": 2, "logging_steps": 2, **options}
    return Trainer(
        trained,
        TrainingArguments(
            str(folder),
            per_device_train_batch_size=8,
            learning_rate=0.02,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            seed=3,
            **arguments,
        ),
        train_dataset=Sums(),
        eval_dataset=Sums() if evaluated else None,
        model_init=init,
        callbacks=list(callbacks),
        processing_class=sums.tokenizer(),
    )


def drift(history: list[dict[str, float]]) -> dict[int, dict[str, float]]:
    return {int(row["step"]): row for row in history if "drift/seconds" in row}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Path]:
    """An SFT run with checkpoints, measured every two steps."""
    folder = tmp_path_factory.mktemp("sft")
    torch.manual_seed(0)
    made = trainer(folder, model())
    made.add_callback(DriftCallback(made, every=2, sample_from="both", **GIVEN, **SMALL))
    made.train()
    return made, folder


def test_values_are_those_of_compare(run: tuple[Trainer, Path], tmp_path: Path) -> None:
    made, folder = run
    logged = drift(made.state.log_history)
    assert list(logged) == [0, 2, 4, 5]
    save_model(model(), sums.tokenizer(), tmp_path / "start")
    for step in (2, 4, 5):
        found = compare(folder / f"checkpoint-{step}", tmp_path / "start", **GIVEN, **SMALL, device="cpu")
        row = logged[step]
        for name, figure in (
            ("kl/policy_reference/exact", found["policy_responses"].figures.estimates["reverse_kl"]),
            (
                "kl/policy_reference/exact_per_response",
                found["policy_responses"].figures.estimates["reverse_kl_per_response"],
            ),
            ("kl/reference_policy/exact", found["reference_responses"].figures.estimates["forward_kl"]),
            ("texts/kl/policy_reference/exact", found["texts"].figures.estimates["reverse_kl"]),
            ("texts/kl/reference_policy/exact", found["texts"].figures.estimates["forward_kl"]),
        ):
            assert row[name] == figure.value > 1e-4, name
            assert row[f"{name}_se"] == figure.standard_error > 0, name


def test_it_starts_at_nothing_and_moves(run: tuple[Trainer, Path]) -> None:
    logged = drift(run[0].state.log_history)
    assert logged[0]["kl/policy_reference/exact"] == 0
    assert logged[5]["kl/policy_reference/exact"] > logged[2]["kl/policy_reference/exact"] > 0
    assert all(row["drift/seconds"] > 0 for row in logged.values())
    assert all(0 <= row["drift/noise_floor"] < 1e-6 for row in logged.values())


def test_training_is_bit_for_bit_the_same_without_it(run: tuple[Trainer, Path], tmp_path: Path) -> None:
    torch.manual_seed(0)
    bare = trainer(tmp_path, model())
    bare.train()
    for (name, one), other in zip(bare.model.named_parameters(), run[0].model.parameters(), strict=True):
        assert torch.equal(one, other), name
        assert one.requires_grad
    losses = [[row["loss"] for row in each.state.log_history if "loss" in row] for each in (bare, run[0])]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2


def test_a_measurement_leaves_no_trace(tmp_path: Path) -> None:
    made = trainer(tmp_path, model())
    callback = DriftCallback(made, **GIVEN, **SMALL)
    made.model.train()
    made.model.lm_head.eval()
    modes = [module.training for module in made.model.modules()]
    for parameter in made.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state = torch.get_rng_state()
    first, second = callback.measure(), callback.measure()
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in made.model.modules()] == modes
    assert all(torch.equal(each.grad, torch.ones_like(each)) for each in made.model.parameters())
    del first["drift/seconds"], second["drift/seconds"]
    assert first == second


def test_another_reference(tmp_path: Path) -> None:
    save_model(model(1), sums.tokenizer(), tmp_path / "other")
    made = trainer(tmp_path, model())
    by_path = DriftCallback(made, reference=tmp_path / "other", **GIVEN, **SMALL).measure()
    in_memory = DriftCallback(made, reference=model(1), **GIVEN, **SMALL).measure()
    found = compare(
        model(), model(1), tokenizer=sums.tokenizer(), sample_from="policy", **GIVEN, **SMALL, device="cpu"
    )
    expected = found["policy_responses"]["reverse_kl"]
    name = "kl/policy_reference/exact"
    assert by_path[name] == in_memory[name] == expected > 0


def test_a_resumed_run_measures_from_the_start(run: tuple[Trainer, Path], tmp_path: Path) -> None:
    """What the trainer holds when the callback is made is the start, whatever checkpoint comes after."""
    folder = run[1] / "checkpoint-2"
    made = trainer(tmp_path, model())
    made.add_callback(DriftCallback(made, every=2, sample_from="both", **GIVEN, **SMALL))
    made.train(resume_from_checkpoint=str(folder))
    logged, expected = drift(made.state.log_history), drift(run[0].state.log_history)
    name = "kl/policy_reference/exact"
    assert logged[2][name] == expected[2][name]
    assert logged[4][name] == expected[4][name]


def test_a_model_that_the_trainer_makes_anew_is_followed(tmp_path: Path) -> None:
    """With ``model_init`` training begins with another object than the trainer had when the callback was made."""
    made = trainer(tmp_path / "run", None, init=lambda: model())
    held = made.model
    made.add_callback(DriftCallback(made, every=2, **GIVEN, **SMALL))
    made.train()
    assert made.model is not held
    save_model(model(), sums.tokenizer(), tmp_path / "start")
    last = tmp_path / "run" / "checkpoint-5"
    found = compare(last, tmp_path / "start", sample_from="policy", **GIVEN, **SMALL, device="cpu")
    logged = drift(made.state.log_history)
    assert logged[0]["kl/policy_reference/exact"] == 0
    assert logged[5]["kl/policy_reference/exact"] == found["policy_responses"]["reverse_kl"] > 0


@pytest.mark.parametrize("anew", [True, False])
def test_mixed_precision_around_the_model_is_no_obstacle(tmp_path: Path, anew: bool) -> None:
    """Accelerate puts autocast around a model's forward: before training begins, or at an evaluation before that."""
    made = trainer(
        tmp_path,
        None if anew else model(),
        init=(lambda: model()) if anew else None,
        evaluated=True,
        bf16=True,
    )
    if not anew:
        made.evaluate()
    made.add_callback(DriftCallback(made, every=2, **GIVEN, **SMALL))
    made.train()
    logged = drift(made.state.log_history)
    assert logged[0]["kl/policy_reference/exact"] == 0
    assert logged[5]["kl/policy_reference/exact"] > 0


def test_a_split_of_a_dataset(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"prompt": prompt} for prompt in GIVEN["prompts"]])
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(str(tmp_path / "asked"))
    made = trainer(tmp_path / "run", model())
    callback = DriftCallback(made, prompts=str(tmp_path / "asked"), split="test", **SMALL)
    assert callback.measure()["kl/policy_reference/exact"] == 0
    with pytest.raises(UserError, match="acts on datasets alone"):
        DriftCallback(made, prompts=GIVEN["prompts"], split="test", **SMALL)


def test_models_that_cannot_be_passed_over(tmp_path: Path) -> None:
    plain = trainer(tmp_path, torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match="is a Linear, no causal language model of transformers"):
        DriftCallback(plain, **GIVEN, **SMALL)
    flash = trainer(tmp_path, model())
    flash.model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match="float32, in which flash_attention_2 does not work"):
        DriftCallback(flash, **GIVEN, **SMALL)


@pytest.mark.parametrize("best", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_the_step_at_which_training_is_stopped_early_is_the_last(
    tmp_path: Path, best: bool, first: bool
) -> None:
    """An evaluation ends it, after the step; with ``load_best_model_at_end`` other weights come after that."""
    stopping = EarlyStoppingCallback(early_stopping_patience=1)
    made = trainer(
        tmp_path / "run", model(), evaluated=True, callbacks=[] if first else [stopping], max_steps=20, save_steps=1,
        eval_strategy="steps", eval_steps=1, metric_for_best_model="eval_loss", greater_is_better=True,
        load_best_model_at_end=best,
    )  # fmt: skip
    made.add_callback(DriftCallback(made, every=100, **GIVEN, **SMALL))
    if first:
        made.add_callback(stopping)
    made.train()
    last = made.state.global_step
    assert last < 20
    logged = drift(made.state.log_history)
    assert list(logged) == [0, last]
    save_model(model(), sums.tokenizer(), tmp_path / "start")
    found = compare(
        tmp_path / "run" / f"checkpoint-{last}", tmp_path / "start", sample_from="policy", **GIVEN, **SMALL,
        device="cpu",
    )  # fmt: skip
    assert logged[last]["kl/policy_reference/exact"] == found["policy_responses"]["reverse_kl"] > 0


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "nothing to measure on"),
        ({"prompts": ["1+1="], "every": 0}, "every = 0 must be at least 1 step"),
        ({"prompts": ["1+1="], "dtype": "bfloat16"}, "dtype does nothing here"),
        ({"prompts": ["1+1="], "responces": 2}, "responces is no setting"),
        ({"prompts": [""]}, "the prompt is empty"),
        ({"texts": ["1+1=2"], "tokenizer": object()}, "no tokenizer"),
    ],
)
def test_what_cannot_be_used(tmp_path: Path, options: dict[str, Any], match: str) -> None:
    made = trainer(tmp_path, model())
    tokenizer = options.pop("tokenizer", None)
    if tokenizer is not None:
        made.processing_class = tokenizer
    with pytest.raises(UserError, match=match):
        DriftCallback(made, **options)


@PEFT_WARNING
def test_an_adapter_is_switched_off_for_the_reference(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, lora_dropout=0.1, r=4)
    start = model()
    torch.manual_seed(0)
    made = trainer(tmp_path, peft.get_peft_model(model(), config))
    callback = DriftCallback(made, every=2, **GIVEN, **SMALL)
    made.add_callback(callback)
    trained = {name for name, each in made.model.named_parameters() if each.requires_grad}
    made.train()
    assert {name for name, each in made.model.named_parameters() if each.requires_grad} == trained
    logged = drift(made.state.log_history)
    assert logged[0]["kl/policy_reference/exact"] == 0
    merged = made.model.merge_and_unload()
    found = compare(
        merged, start, tokenizer=sums.tokenizer(), sample_from="policy", **GIVEN, **SMALL, device="cpu"
    )
    assert logged[5]["kl/policy_reference/exact"] == pytest.approx(
        found["policy_responses"]["reverse_kl"], rel=1e-4
    )
    assert logged[5]["kl/policy_reference/exact"] > 1e-4


@PEFT_WARNING
def test_an_adapter_that_the_trainer_makes_anew_is_followed(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, r=4)
    made = trainer(tmp_path, None, init=lambda: peft.get_peft_model(model(), config))
    made.add_callback(DriftCallback(made, every=2, **GIVEN, **SMALL))
    made.train()
    logged = drift(made.state.log_history)
    assert logged[0]["kl/policy_reference/exact"] == 0
    merged = made.model.merge_and_unload()
    found = compare(
        merged, model(), tokenizer=sums.tokenizer(), sample_from="policy", **GIVEN, **SMALL, device="cpu"
    )
    assert logged[5]["kl/policy_reference/exact"] == pytest.approx(
        found["policy_responses"]["reverse_kl"], rel=1e-4
    )
    assert logged[5]["kl/policy_reference/exact"] > 1e-4


@PEFT_WARNING
def test_an_adapter_of_the_output_head_is_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["lm_head"], r=2)
    size = {"hidden_size": 16, "layers": 1, "heads": 2, "context": 32}
    untied = build_model(len(sums.tokenizer()), **size, seed=0, tie=False)
    made = trainer(tmp_path, peft.get_peft_model(untied, config))
    with pytest.raises(UserError, match="adapter changes the output head"):
        DriftCallback(made, **GIVEN)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL's settings against newer transformers
def test_grpo_of_trl(tmp_path: Path) -> None:
    """On TRL's GRPO the values are those of compare, and TRL's own metrics stay its own."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    save_model(model(), sums.tokenizer(), tmp_path / "start")
    made = trl.GRPOTrainer(
        model=str(tmp_path / "start"),
        reward_funcs=lambda completions, **_: [float("1" in each) for each in completions],
        args=trl.GRPOConfig(
            str(tmp_path / "run"),
            max_steps=2,
            save_steps=2,
            logging_steps=1,
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=4,
            learning_rate=0.02,
            report_to=[],
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": prompt} for prompt in GIVEN["prompts"]]),
    )
    made.add_callback(DriftCallback(made, every=1, **GIVEN, **SMALL))
    made.train()
    logged = drift(made.state.log_history)
    assert list(logged) == [0, 1, 2]
    assert not any("reward" in name for name in logged[2])
    found = compare(
        tmp_path / "run" / "checkpoint-2",
        tmp_path / "start",
        **GIVEN,
        **SMALL,
        sample_from="policy",
        device="cpu",
    )
    assert logged[2]["kl/policy_reference/exact"] == found["policy_responses"]["reverse_kl"] > 0
