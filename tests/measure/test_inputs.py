"""What reaches the models: beginnings, chat templates, ends, windows of long texts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kedge.measure import MeasureConfig, compare
from kedge.measure.inputs import Window, load_prompts, load_texts
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
