"""What reaches the models: beginnings, chat templates, ends, windows of long texts."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kedge.errors import UserError
from kedge.measure import MeasureConfig, compare
from kedge.measure.inputs import Window, load_prompts, load_texts, window_length
from kedge.models import build_model
from tests.data.test_encode import ANSWER, CHAT, USER, characters
from tests.measure.test_compare import BOTH, PROMPTS, model


def decoded(window: Window, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    context, scored = (
        "".join(tokenizer.convert_ids_to_tokens(ids)) for ids in (window.context, window.scored)
    )
    return context, scored


def chat_model(seed: int) -> PreTrainedModel:
    return build_model(99, hidden_size=16, layers=1, heads=2, context=64, seed=seed, eos_id=2, pad_id=0)


@pytest.mark.parametrize("prompt", ["2+2=", "<s>2+2="])
def test_a_prompt_begins_once(prompt: str) -> None:
    tokenizer = characters(bos=True)
    (window,) = load_prompts([prompt], tokenizer, MeasureConfig(max_new_tokens=4), 64)
    assert decoded(window, tokenizer) == ("<s>2+2=", "")
    (window,) = load_texts([prompt], tokenizer, MeasureConfig(), 64)
    assert decoded(window, tokenizer) == ("<s>", "2+2=")


def test_messages_go_through_the_chat_template() -> None:
    tokenizer = characters(bos=True, chat=CHAT)
    asked = "<s>user\n2+2?</s>\n<s>assistant\n"
    (window,) = load_prompts([{"prompt": [USER]}], tokenizer, MeasureConfig(max_new_tokens=4), 64)
    assert decoded(window, tokenizer) == (asked, "")
    for row in ({"messages": [USER, ANSWER]}, {"prompt": [USER], "completion": [ANSWER]}):
        (window,) = load_texts([row], tokenizer, MeasureConfig(), 64)
        assert decoded(window, tokenizer) == (asked, "4</s>")


def test_messages_as_the_models_read_them() -> None:
    """Scored values are those of whole logits behind what transformers' own template gives."""
    tokenizer, policy, reference = characters(chat=CHAT), chat_model(0).double(), chat_model(1).double()
    found = compare(
        policy, reference, texts=[{"messages": [USER, ANSWER]}], prompts=[{"prompt": [USER]}], responses=1,
        max_new_tokens=4, tokenizer=tokenizer, device="cpu",
    )  # fmt: skip
    read = tokenizer.apply_chat_template([USER], add_generation_prompt=True)["input_ids"]
    for name in ("texts", "policy_responses"):
        table = found[name].tokens
        ids = torch.tensor([read + table.token.tolist()])
        with torch.no_grad():
            log_p, log_q = (
                each(ids).logits[0, len(read) - 1 : -1].log_softmax(-1) for each in (policy, reference)
            )
        torch.testing.assert_close(table.reverse_kl, (log_p.exp() * (log_p - log_q)).sum(-1))
    assert found["texts"].texts["text"] == ["4", "</s>"]
    assert found["policy_responses"].by_cluster[0]["text"] == "<s>user\n2+2?</s>\n<s>assistant\n"


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("length", [2, 5, 8, 64])
def test_every_token_of_a_text_is_scored_once_behind_what_stands_before_it(length: int, bos: bool) -> None:
    tokenizer = characters(bos=bos)
    text = "The quick brown fox jumps over the lazy dog"
    tokens = tokenizer(text)["input_ids"]
    windows = load_texts([text], tokenizer, MeasureConfig(window=length), 64)
    assert [tokens[0], *chain.from_iterable(window.scored for window in windows)] == tokens
    place = 1
    for number, window in enumerate(windows):
        assert window.scored
        assert len(window.context) + len(window.scored) <= length
        own = window.context[1:] if bos else window.context
        assert own == tokens[place - len(own) : place]
        assert not bos or window.context[0] == 1
        assert number == 0 or len(window.context) >= length // 2
        place += len(window.scored)
    assert len(windows) == (1 if len(tokens) <= length else 1 + -(-(len(tokens) - length) // (length // 2)))


def test_a_long_text_as_the_models_read_it() -> None:
    """Of 41 tokens in windows of 16: the first scores 15, each other one 8 or the last ones; against whole logits."""
    policy, reference = model(0, context=16).double(), model(1, context=16).double()
    tokenizer = BOTH["tokenizer"]
    text = "12+34=46" * 5 + "1"
    found = compare(policy, reference, texts=[text, "2+2=4"], tokenizer=tokenizer, device="cpu")
    assert found.settings["window"] == 16
    answer = found["texts"]
    assert answer.counts == {"texts": 2, "responses": 6, "tokens": 40 + 4}
    assert [line["responses"] for line in answer.by_cluster] == [5, 1]
    ids, truth = tokenizer(text)["input_ids"], []
    for start, end in ((1, 16), (16, 24), (24, 32), (32, 40), (40, 41)):
        read = torch.tensor([ids[max(0, end - 16) : end]])
        with torch.no_grad():
            log_p, log_q = (each(read).logits[0].log_softmax(-1) for each in (policy, reference))
        truth.append((log_p.exp() * (log_p - log_q)).sum(-1)[start - end - 1 : -1])
    torch.testing.assert_close(answer.tokens.reverse_kl[:40], torch.cat(truth))
    assert "".join(answer.texts["text"][:40]) == text[1:]


def test_the_window() -> None:
    assert window_length(MeasureConfig(), 1024) == 1024
    assert window_length(MeasureConfig(), 131_072) == window_length(MeasureConfig(), None) == 2048
    assert window_length(MeasureConfig(window=4096), 131_072) == 4096
    with pytest.raises(UserError, match="window = 65 is beyond the models' context of 64: lower it"):
        load_texts(["a b"], characters(), MeasureConfig(window=65), 64)
    with pytest.raises(UserError, match="window = 1 must be at least 2"):
        MeasureConfig(window=1)
    found = compare(model(0), model(1), prompts=PROMPTS[:2], tokenizer=BOTH["tokenizer"], device="cpu",
                    max_new_tokens=2)  # fmt: skip
    assert found.settings["window"] is None


def test_ends_are_recorded_and_their_difference_said() -> None:
    policy, reference = model(0), model(1)
    asked: dict[str, Any] = {"tokenizer": BOTH["tokenizer"], "device": "cpu", "max_new_tokens": 8}
    found = compare(policy, reference, prompts=PROMPTS, **asked)
    assert found.policy["end_tokens"] == found.reference["end_tokens"] == [1]
    assert not any("end at" in note for note in found.notes)
    policy.generation_config.eos_token_id = [1, 5, 6]
    found = compare(policy, reference, prompts=PROMPTS, **asked)
    assert found.policy["end_tokens"] == [1, 5, 6]
    assert (
        "responses of the policy end at the tokens [1, 5, 6], those of the reference at [1]" in found.notes[0]
    )
    for name, ends in (("policy_responses", {1, 5, 6}), ("reference_responses", {1})):
        table = found[name].tokens
        last = table.token[(table.response.diff(append=table.response[-1:] + 1)) > 0]
        assert found[name].counts["finished"] == sum(int(token) in ends for token in last) > 0
    texts = compare(policy, reference, texts=["1+1=2"], tokenizer=BOTH["tokenizer"], device="cpu")
    assert not any("end at" in note for note in texts.notes)
