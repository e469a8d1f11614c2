from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from kedge.data import encode_example, encode_pair, encode_prompt
from kedge.errors import UserError

CHARACTERS = [chr(code) for code in range(32, 127)] + ["\n"]
CHAT = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
USER = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "4"}


def characters(
    *, bos: bool = False, eos_added: bool = False, chat: str | None = None
) -> PreTrainedTokenizerFast:
    """A tokenizer of single characters with <pad>, <s> and </s>."""
    vocabulary = {symbol: i for i, symbol in enumerate(["<pad>", "<s>", "</s>", *CHARACTERS])}
    tokenizer = Tokenizer(WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    if bos or eos_added:
        single = f"{'<s> ' if bos else ''}$A{' </s>' if eos_added else ''}"
        tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=chat
    )


PLAIN = characters()


def shown(tokens: list[int], tokenizer: PreTrainedTokenizerFast = PLAIN) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(tokens))


def targets(example: tuple[list[int], list[bool]]) -> str:
    tokens, mask = example
    assert len(tokens) == len(mask)
    return shown([token for token, learn in zip(tokens, mask, strict=True) if learn])


@pytest.mark.parametrize(("bos", "eos_added"), [(False, False), (True, False), (True, True), (False, True)])
def test_a_prompt_has_the_tokenizers_beginning_and_no_end(bos: bool, eos_added: bool) -> None:
    tokenizer = characters(bos=bos, eos_added=eos_added)
    start = "<s>" if bos else ""
    assert shown(encode_prompt({"prompt": "2+2="}, tokenizer)) == f"{start}2+2="
    example = encode_example({"prompt": "2+2=", "completion": "4"}, tokenizer)
    assert shown(example[0]) == f"{start}2+2=4</s>"
    assert targets(example) == "4</s>"


@pytest.mark.parametrize(("bos", "eos_added"), [(False, False), (True, False), (True, True)])
def test_a_beginning_that_the_prompt_itself_has_is_not_doubled(bos: bool, eos_added: bool) -> None:
    tokenizer = characters(bos=bos, eos_added=eos_added)
    assert shown(encode_prompt({"prompt": "<s>2+2="}, tokenizer)) == "<s>2+2="
    assert shown(encode_prompt({"prompt": "2<s>2"}, tokenizer)) == f"{'<s>' if bos else ''}2<s>2"


def test_an_end_that_the_prompt_itself_has_stays() -> None:
    assert shown(encode_prompt({"prompt": "a</s>"}, PLAIN)) == "a</s>"
    assert shown(encode_prompt({"prompt": "a</s>"}, characters(eos_added=True))) == "a</s>"


def test_targets_are_the_completion_unless_asked_otherwise() -> None:
    row = {"prompt": "ab", "completion": "cd"}
    assert targets(encode_example(row, PLAIN)) == "cd</s>"
    assert targets(encode_example(row, PLAIN, completion_only=False)) == "bcd</s>"


def test_the_seam_is_the_same_in_training_and_sampling() -> None:
    row = {"prompt": "What? ", "completion": " This"}
    tokens, mask = encode_example(row, PLAIN)
    assert tokens[: mask.index(True)] == encode_prompt(row, PLAIN)


def test_an_end_in_the_completion_is_not_doubled() -> None:
    assert targets(encode_example({"prompt": "a", "completion": "b</s>"}, PLAIN)) == "b</s>"


def test_messages_go_through_the_chat_template() -> None:
    tokenizer = characters(bos=True, chat=CHAT)
    assert shown(encode_prompt({"prompt": [USER]}, tokenizer)) == "<s>user\n2+2?</s>\n<s>assistant\n"
    for completion in ([ANSWER], "4"):
        example = encode_example({"prompt": [USER], "completion": completion}, tokenizer)
        assert shown(example[0]) == "<s>user\n2+2?</s>\n<s>assistant\n4</s>"
        assert targets(example) == "4</s>"


def test_an_answer_begun_is_gone_on_from() -> None:
    tokenizer = characters(chat=CHAT)
    assert shown(
        encode_prompt({"prompt": [USER, {"role": "assistant", "content": "It is"}]}, tokenizer)
    ).endswith("<s>assistant\nIt is")


def test_a_template_that_rewrites_an_answer_begun_is_named() -> None:
    tokenizer = characters(chat="{% for m in messages %}{{ m['content'] | upper }}{% endfor %}")
    row = {"prompt": [USER, {"role": "assistant", "content": "It is"}]}
    with pytest.raises(UserError, match="line 3: the tokenizer's chat template refuses these messages"):
        encode_prompt(row, tokenizer, place="line 3")


BEGUN = [USER, {"role": "assistant", "content": "It is"}]


def test_a_completion_goes_on_from_an_answer_begun() -> None:
    """Seen to fail with the completion as a message of its own: the first thing learnt was to end the turn."""
    tokenizer = characters(bos=True, chat=CHAT)
    for completion in (" 4", [{"role": "assistant", "content": " 4"}]):
        example = encode_example({"prompt": BEGUN, "completion": completion}, tokenizer)
        assert shown(example[0]) == "<s>user\n2+2?</s>\n<s>assistant\nIt is 4</s>"
        assert targets(example) == " 4</s>"
    pair = encode_pair({"prompt": BEGUN, "chosen": " 4", "rejected": " 5"}, tokenizer)
    assert shown(pair.rejected).endswith("assistant\nIt is 5</s>")
    for completion in (
        [ANSWER, USER, ANSWER],
        [{"role": "assistant", "content": [{"type": "text", "text": "4"}]}],
    ):
        with pytest.raises(
            UserError, match=r"line 7: .*ends in an answer begun, so that the completion must be its rest"
        ):
            encode_example({"prompt": BEGUN, "completion": completion}, tokenizer, place="data.jsonl, line 7")


def test_a_turn_ends_where_a_response_would() -> None:
    """Chat models end a turn with another token than a text; a response ends at either, and so does an example."""
    turns = CHAT.replace("</s>", "<pad>")
    tokenizer = characters(chat=turns)
    row = {"prompt": [USER], "completion": "4"}
    assert targets(encode_example(row, tokenizer, ends=(2, 0))) == "4<pad>"
    assert targets(encode_example(row, tokenizer, ends=(2,))) == "4<pad>\n</s>"
    assert targets(encode_example({"prompt": "a", "completion": "b"}, tokenizer, ends=(2, 0))) == "b</s>"
    pair = encode_pair({"prompt": [USER], "chosen": "4", "rejected": "5"}, tokenizer, ends=(2, 0))
    assert shown(pair.chosen).endswith("4<pad>")


def test_what_stands_behind_an_end_is_learnt_too() -> None:
    assert targets(encode_example({"prompt": "a", "completion": "b</s>a"}, PLAIN)) == "b</s>a</s>"
    assert targets(encode_example({"prompt": "a", "completion": "b</s> \n"}, PLAIN)) == "b</s>"


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({}, {}, "data.jsonl, line 7: no column 'prompt'; its columns: none"),
        ({"prompt": ""}, {}, "line 7: the prompt is empty"),
        ({"prompt": "abcd"}, {"context": 4}, "the prompt has 4 tokens, .*context of 4"),
        ({"prompt": [USER]}, {}, "no chat template"),
        ({"prompt": 3}, {}, "column 'prompt': 3 is neither text nor"),
        ({"prompt": "naïve"}, {}, "cannot encode 'naïve'"),
    ],
)
def test_prompts_that_cannot_be_used_are_named(
    row: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        encode_prompt(row, PLAIN, place="data.jsonl, line 7", **options)


def test_a_prompt_one_short_of_the_context_is_taken() -> None:
    assert len(encode_prompt({"prompt": "abc"}, PLAIN, context=4)) == 3


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"prompt": "a"}, {}, "line 7: no column 'completion'; its columns: prompt"),
        (
            {"prompt": "ab", "completion": "c"},
            {"context": 3},
            "prompt and completion have 4 tokens, .* context is 3",
        ),
        ({"prompt": "a", "completion": [ANSWER]}, {}, "the prompt is text and the completion chat messages"),
        ({"prompt": "a", "completion": None}, {}, "column 'completion': None is neither text"),
    ],
)
def test_examples_that_cannot_be_used_are_named(
    row: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        encode_example(row, PLAIN, place="data.jsonl, line 7", **options)


def test_an_example_as_long_as_the_context_is_taken() -> None:
    assert len(encode_example({"prompt": "ab", "completion": "c"}, PLAIN, context=4)[0]) == 4


def test_a_tokenizer_without_an_end_is_refused() -> None:
    tokenizer = characters()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end-of-text token"):
        encode_example({"prompt": "a", "completion": "b"}, tokenizer)


def test_templates_that_refuse_or_rewrite_are_named() -> None:
    refusing = characters(chat="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UserError, match="refuses these messages: roles must alternate"):
        encode_prompt({"prompt": [USER]}, refusing)
    rewriting = characters(chat="{{ messages | length }}{% if add_generation_prompt %}<s>{% endif %}")
    with pytest.raises(UserError, match="cannot be told apart"):
        encode_example({"prompt": [USER], "completion": [ANSWER]}, rewriting)
