"""A comparison as a whole: itself, quantised copies, low memory, other vocabularies, interrupts."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from kedge.divergence import forward_kl, reverse_kl
from kedge.errors import RunError
from kedge.measure import Comparison, compare
from kedge.measure.progress import Silent
from kedge.models import build_model, frozen_copy, save_model
from kedge.tasks import sums

PROMPTS = [
    f"{a}+{b}=" for a, b in ((12, 34), (7, 5), (48, 9), (3, 3), (21, 60), (8, 80), (14, 2), (90, 1), (5, 55))
]
TEXTS = [f"{prompt}{eval(prompt[:-1])}" for prompt in PROMPTS]
BOTH: dict[str, Any] = {"prompts": PROMPTS, "texts": TEXTS, "tokenizer": sums.tokenizer(), "device": "cpu"}
SMALL: dict[str, Any] = {**BOTH, "responses": 2, "max_new_tokens": 6, "resamples": 200}


def model(seed: int = 0, **options: Any) -> PreTrainedModel:
    sizes = {"hidden_size": 32, "layers": 2, "heads": 2, "context": 48, "eos_id": 1, "pad_id": 0} | options
    return build_model(16, seed=seed, options={"initializer_range": 0.3}, **sizes)


def quantised(reference: PreTrainedModel, bits: int) -> PreTrainedModel:
    """Round every matrix to whole steps of its rows' largest entries."""
    copy = frozen_copy(reference)
    for parameter in copy.parameters():
        if parameter.ndim == 2:
            step = parameter.abs().amax(1, keepdim=True).clamp(min=1e-9) / (2 ** (bits - 1) - 1)
            parameter.copy_((parameter / step).round() * step)
    return copy


def same(one: Comparison, other: Comparison) -> None:
    """Equal to the last bit, but for what a clock or a setting says."""
    for name, answer in one.answers.items():
        for column, values in answer.tokens.columns().items():
            assert torch.equal(values, other[name].tokens.columns()[column]), (name, column)
    assert one.summary()["questions"] == other.summary()["questions"]


def test_against_whole_logits() -> None:
    """Every column of every token, from the models' own logits, in float64."""
    policy, reference = model(0).double(), model(1).double()
    found = compare(policy, reference, **SMALL)
    encode = BOTH["tokenizer"]
    for name, answer in found.answers.items():
        table = answer.tokens
        for number in table.response.unique().tolist():
            rows = table.rows(table.response == number)
            text = PROMPTS[int(rows.cluster[0])] if name != "texts" else TEXTS[number][:1]
            read = encode(text)["input_ids"]
            ids = torch.tensor([read + rows.token.tolist()])
            with torch.no_grad():
                p, q = (each(input_ids=ids).logits[0, len(read) - 1 : -1] for each in (policy, reference))
            for column, truth in {
                "reverse_kl": reverse_kl(p, q),
                "forward_kl": forward_kl(p, q),
                "policy_log_prob": p.log_softmax(-1)[range(rows.count), rows.token],
                "reference_log_prob": q.log_softmax(-1)[range(rows.count), rows.token],
                "policy_entropy": torch.distributions.Categorical(logits=p).entropy(),
                "reference_entropy": torch.distributions.Categorical(logits=q).entropy(),
            }.items():
                torch.testing.assert_close(getattr(rows, column), truth, rtol=1e-9, atol=1e-12, msg=column)
            assert rows.policy_top.tolist() == p.argmax(-1).tolist()
            assert rows.reference_top.tolist() == q.argmax(-1).tolist()
            assert rows.position.tolist() == list(range(rows.count))
        assert "".join(answer.texts["text"]) == encode.decode(table.token.tolist())


def test_responses_depend_on_the_seed_and_not_on_the_batch() -> None:
    policy, reference = model(0).double(), model(1).double()
    one, two, other = (
        compare(policy, reference, **SMALL, **each) for each in ({}, {"batch": 5}, {"seed": 1})
    )
    for name in ("policy_responses", "reference_responses"):
        assert torch.equal(one[name].tokens.token, two[name].tokens.token)
        assert not torch.equal(one[name].tokens.token[:50], other[name].tokens.token[:50])
        torch.testing.assert_close(one[name].tokens.reverse_kl, two[name].tokens.reverse_kl)


def test_the_batch_bounds_what_goes_through_a_model_at_once() -> None:
    """Also where there are more responses to a prompt; they are the same ones."""
    policy, reference, largest = model(0).double(), model(1).double(), [0]
    whole = compare(policy, reference, **SMALL | {"responses": 5})
    for each in (policy, reference):
        each.get_decoder().register_forward_pre_hook(
            lambda module, args, given: largest.append(len(given["input_ids"])), with_kwargs=True
        )
    parts = compare(policy, reference, **SMALL | {"responses": 5}, batch=2)
    assert max(largest) == 2
    for name in ("policy_responses", "reference_responses"):
        for column in ("cluster", "response", "position", "token"):
            one, other = (getattr(found[name].tokens, column) for found in (whole, parts))
            assert torch.equal(one, other), column
        torch.testing.assert_close(whole[name].tokens.reverse_kl, parts[name].tokens.reverse_kl)
    assert parts["policy_responses"].counts == whole["policy_responses"].counts


@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-9), ("float32", 1e-9), ("bfloat16", 1e-3)])
def test_a_model_against_itself(dtype: str, bound: float) -> None:
    """KL is 0; the floor, where rounding differs, is a floor indeed: far below what quantising does."""
    reference = model().to(getattr(torch, dtype))
    found = compare(frozen_copy(reference), reference, **SMALL)
    assert found.notes[0] == "policy and reference have the same weights, to the bit"
    for answer in found.answers.values():
        for direction in ("reverse_kl", "forward_kl"):
            assert answer[direction] <= (
                1e-9 if dtype == "float64" else max(f.mean for f in answer.floor.values())
            )
        assert answer["same_top_token"] == 1.0
        for floor in answer.floor.values():
            assert 0 <= floor.mean <= floor.largest <= bound


@pytest.mark.parametrize("settings", [{"texts": TEXTS[:1]}, {"texts": TEXTS, "batch": 1}])
def test_the_floor_of_a_single_sequence_is_had_at_another_shape(settings: dict[str, Any]) -> None:
    """Passes of one shape round alike, so their difference says nothing."""
    policy, reference, shapes = model(0), model(1), []
    reference.get_decoder().register_forward_pre_hook(
        lambda module, args, options: shapes.append(tuple(options["input_ids"].shape)), with_kwargs=True
    )
    found = compare(policy, reference, tokenizer=BOTH["tokenizer"], device="cpu", **settings)["texts"]
    length = len(BOTH["tokenizer"](TEXTS[0])["input_ids"])
    assert {(1, length), (2, length + 8)} <= set(shapes)
    for floor in found.floor.values():
        assert floor.tokens == length - 1
        assert 0 <= floor.largest < 1e-9


def test_the_floor_of_a_sequence_that_fills_the_context() -> None:
    policy, reference = model(0, context=16), model(1, context=16)
    found = compare(policy, reference, tokenizer=BOTH["tokenizer"], device="cpu", texts=["1" * 16])["texts"]
    assert found.floor["policy"].tokens == 15


def test_fewer_bits_move_further() -> None:
    reference = model()
    eight, four = (compare(quantised(reference, bits), reference, **SMALL) for bits in (8, 4))
    for name in ("policy_responses", "reference_responses", "texts"):
        for direction in ("reverse_kl", "forward_kl"):
            small, large = eight[name].figures.estimates[direction], four[name].figures.estimates[direction]
            assert max(floor.mean for floor in eight[name].floor.values()) < 0.01 * small.value
            assert small.high < large.low, (name, direction)
    for name in ("policy_responses", "reference_responses"):  # and the questions agree on how far
        for found in (eight, four):
            assert 0.4 < found[name]["reverse_kl"] / found["texts"]["reverse_kl"] < 2.5


@pytest.fixture
def saved(tmp_path: Path) -> tuple[str, str]:
    for name, seed in (("policy", 0), ("reference", 1)):
        save_model(model(seed), BOTH["tokenizer"], tmp_path / name)
    return str(tmp_path / "policy"), str(tmp_path / "reference")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_low_memory_gives_the_same_bits(saved: tuple[str, str], dtype: str) -> None:
    settings = {**SMALL, "tokenizer": None, "dtype": dtype, "batch": 4}
    together = compare(*saved, **settings)
    apart = compare(*saved, **settings, low_memory=True)
    assert together.settings["low_memory"] is False
    assert apart.settings["low_memory"] is True
    same(together, apart)


def test_low_memory_holds_one_model_at_a_time(
    saved: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import weakref

    from kedge.measure import models

    alive: list[weakref.ref[PreTrainedModel]] = []
    most = 0
    load = models.load_model

    def watched(*args: Any, **options: Any) -> PreTrainedModel:
        nonlocal most
        made = load(*args, **options)
        alive.append(weakref.ref(made))
        most = max(most, sum(each() is not None for each in alive))
        return made

    monkeypatch.setattr(models, "load_model", watched)
    compare(*saved, **{**SMALL, "tokenizer": None}, low_memory=True)
    assert (most, len(alive)) == (1, 4)


def test_the_same_call_gives_the_same_bits(saved: tuple[str, str]) -> None:
    settings = {**SMALL, "tokenizer": None}
    same(compare(*saved, **settings), compare(*saved, **settings))


@pytest.mark.parametrize("padded", ["policy", "reference"])
def test_padded_vocabularies(padded: str) -> None:
    """Rows beyond the tokenizer's ids have no share, in either model, whatever they hold."""
    policy, reference = model(0), model(1)
    truth = compare(policy, reference, **SMALL)
    widened = {"policy": policy, "reference": reference}[padded]
    rows = widened.get_input_embeddings().weight.detach().clone()
    widened.resize_token_embeddings(24, mean_resizing=False)
    with torch.no_grad():
        weight = widened.get_input_embeddings().weight
        weight[:16], weight[16:] = rows, 9.0
    found = compare(policy, reference, **SMALL)
    assert getattr(found, padded)["vocabulary_rows"] == 24
    assert found.vocabulary == 16
    for name, answer in truth.answers.items():
        torch.testing.assert_close(found[name].tokens.reverse_kl, answer.tokens.reverse_kl)


def test_messages_and_completions_are_scored_where_the_answer_is() -> None:
    rows = [{"prompt": "1+2=", "completion": "#3"}, {"prompt": "10+20=", "completion": "#30"}]
    found = compare(model(0), model(1), texts=rows, tokenizer=BOTH["tokenizer"], device="cpu")
    assert found["texts"].texts["text"] == ["#", "3", "<eos>", "#", "3", "0", "<eos>"]


class Stopping(Silent):
    """Presses Ctrl-C after some parts."""

    def __init__(self, parts: int) -> None:
        self.left = parts

    def advance(self, count: int) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupt_keeps_what_was_scored(tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = compare(model(0), model(1), **SMALL, batch=4, progress=Stopping(7), out=out)
    assert found.partial
    assert list(found.answers) == ["policy_responses", "reference_responses"]
    assert [answer.partial for answer in found.answers.values()] == [False, True]
    assert found["reference_responses"].counts["prompts"] == 4
    assert found.notes == [
        "responses sampled from the reference: partial, ended after 8 sequences",
        "given texts: partial, ended after 0 sequences",
    ]
    whole = compare(model(0), model(1), **SMALL, batch=4)["reference_responses"].tokens
    kept = found["reference_responses"].tokens
    assert torch.equal(kept.reverse_kl, whole.reverse_kl[: kept.count])
    assert {each.name for each in out.iterdir()} == {"measure.json", "tokens.parquet"}


def test_an_interrupt_in_the_last_part_finds_everything_scored() -> None:
    whole = compare(model(0), model(1), texts=TEXTS, tokenizer=sums.tokenizer(), device="cpu", batch=64)
    given = {"texts": TEXTS, "tokenizer": sums.tokenizer(), "device": "cpu", "batch": 64}
    found = compare(model(0), model(1), **given, progress=Stopping(1))
    assert not found.partial
    assert found["texts"].counts == whole["texts"].counts


def test_an_interrupt_with_low_memory_scores_what_both_have_seen(saved: tuple[str, str]) -> None:
    settings = {**SMALL, "tokenizer": None, "batch": 4, "low_memory": True}
    found = compare(
        *saved, **settings, progress=Stopping(9 + 5 + 3)
    )  # both passes of the reference, then some
    assert found.partial
    assert found.answers
    for moment in (17, 20, 23):  # a question that is whole, beside one of which nothing was scored
        found = compare(*saved, **settings, progress=Stopping(moment))
        assert found.partial == (
            len(found.answers) < 3 or any(each.partial for each in found.answers.values())
        )
    with pytest.raises(RunError, match="stopped before anything was scored"):
        compare(*saved, **settings, progress=Stopping(1))


def test_an_interrupt_with_low_memory_begins_nothing_more(
    saved: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No part is drawn, no model loaded, no pass announced after the part in hand."""
    from kedge.measure import models, pipeline

    done: list[str] = []
    for room, name in ((pipeline, "generate"), (models, "load_model")):
        monkeypatch.setattr(room, name, recorded(getattr(room, name), name, done))

    class Watching(Stopping):
        def begin(self, title: str, total: int, unit: str) -> None:
            done.append(title)

        def advance(self, count: int) -> None:
            done.append("part")
            super().advance(count)

    settings = {**SMALL, "tokenizer": None, "batch": 4, "low_memory": True}
    with pytest.raises(RunError, match="stopped before anything was scored"):
        compare(*saved, **settings, progress=Watching(2))
    first = "responses sampled from the reference: reference"
    assert done == ["load_model"] * 2 + [first, "generate", "part", "generate", "part"]


def recorded(function: Any, name: str, done: list[str]) -> Any:
    def called(*args: Any, **options: Any) -> Any:
        done.append(name)
        return function(*args, **options)

    return called
