"""From text and chat messages to tokens, once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kedge.data.rows import Row
from kedge.data.template import Messages, Text, check_messages
from kedge.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_prompt(
    row: Row, tokenizer: PreTrainedTokenizerBase, *, context: int | None = None, place: str = "the row"
) -> list[int]:
    """Turn a row's prompt into the tokens that generation starts from.

    Text gets the tokenizer's own beginning (a bos token where it has one) and never an end; messages go
    through its chat template, up to where the assistant's answer begins. If the last message is the
    assistant's, the answer goes on from it.

    Args:
        row: with ``prompt``, text or messages.
        tokenizer: of the model.
        context: the longest sequence of the model, in tokens; the prompt must leave room for one more.
        place: file and line, for error messages.

    Returns:
        Token ids, at least one.

    Raises:
        UserError: no usable prompt, no chat template, or the prompt fills the context.

    >>> from kedge.data import encode_prompt
    >>> from kedge.tasks import sums
    >>> encode_prompt({"prompt": "12+34="}, sums.tokenizer())
    [3, 4, 12, 5, 6, 13]
    """
    prompt = _column(row, "prompt", place)
    tokens = _text_prompt(prompt, tokenizer, place) if isinstance(prompt, str) else []
    if not isinstance(prompt, str):
        tokens = _tokens(_rendered(prompt, tokenizer, place), tokenizer, place)
    if not tokens:
        raise UserError(f"{place}: the prompt is empty; the model needs at least one token to go on from")
    if context is not None and len(tokens) >= context:
        raise UserError(
            f"{place}: the prompt has {len(tokens)} tokens, which leaves no room for a response in the "
            f"model's context of {context}; shorten or leave out the row, or use a longer context"
        )
    return tokens


def encode_example(
    row: Row,
    tokenizer: PreTrainedTokenizerBase,
    *,
    ends: Sequence[int] = (),
    completion_only: bool = True,
    context: int | None = None,
    place: str = "the row",
) -> tuple[list[int], list[bool]]:
    """Turn a row into a training example: prompt, completion, end of text.

    The prompt is tokenized by itself, as at generation, so that training and sampling meet the same
    tokens at the seam. Where a prompt of messages ends in an answer begun, the completion is the rest of it.

    Args:
        row: with ``prompt`` and ``completion``; both text, or a prompt of messages with a completion
            of messages or the text of one answer.
        tokenizer: of the model.
        ends: ids that end a response, ``kedge.models.special_tokens`` gives them; the tokenizer's end-of-text token
            when left out. An example ends with the end that it has, or with the first of these.
        completion_only: targets are the completion and its end; else the prompt too, but for its
            first token, which nothing predicts.
        context: the longest sequence of the model, in tokens.
        place: file and line, for error messages.

    Returns:
        Token ids and, for each, whether it is a target.

    Raises:
        UserError: a column is missing or does not fit, the example is longer than the context, or nothing ends a text.

    >>> from kedge.data import encode_example
    >>> from kedge.tasks import sums
    >>> encode_example({"prompt": "1+2=", "completion": "#3"}, sums.tokenizer())
    ([3, 12, 4, 13, 15, 5, 1], [False, False, False, False, True, True, True])
    """
    prompt = encode_prompt(row, tokenizer, place=place)
    answer = _tokens(_completion_text(row, tokenizer, place), tokenizer, place)
    if not ends:
        if not isinstance(tokenizer.eos_token_id, int):
            raise UserError(
                f"the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__!r} has no end-of-text token, "
                "so a model could never learn to stop; set its eos_token"
            )
        ends = [tokenizer.eos_token_id]
    tokens = prompt + _ended(answer, ends, tokenizer)
    if context is not None and len(tokens) > context:
        raise UserError(
            f"{place}: prompt and completion have {len(tokens)} tokens, the model's context is {context}; "
            "shorten or leave out the row, or use a longer context"
        )
    first = len(prompt) if completion_only else 1
    return tokens, [position >= first for position in range(len(tokens))]


def _ended(answer: list[int], ends: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Let an answer end with an end: a chat template closes the turn itself, often with a line break behind that."""
    behind = max((place + 1 for place, token in enumerate(answer) if token in ends), default=0)
    if behind == 0 or str(tokenizer.decode(answer[behind:])).strip():
        return [*answer, ends[0]]
    return answer[:behind]


def _column(row: Row, name: str, place: str) -> Text:
    if name not in row:
        raise UserError(f"{place}: no column {name!r}; its columns: {', '.join(row) or 'none'}")
    value = row[name]
    return value if isinstance(value, str) else check_messages(value, f"{place}, column {name!r}")


def _text_prompt(prompt: str, tokenizer: PreTrainedTokenizerBase, place: str) -> list[int]:
    """Tokens with the tokenizer's beginning, once, but without the end that some tokenizers add."""
    bare, tokens = (_tokens(prompt, tokenizer, place, special) for special in (False, True))
    if bare and bare[0] == tokenizer.bos_token_id:  # the text brings it
        return bare
    adds_end = len(tokens) > len(bare) and tokens[-1] == tokenizer.eos_token_id
    begins_with_end = len(bare) > 0 and tokens[-len(bare) :] == bare
    return tokens[:-1] if adds_end and not begins_with_end and bare else tokens if bare else []


def _completion_text(row: Row, tokenizer: PreTrainedTokenizerBase, place: str) -> str:
    prompt, completion = _column(row, "prompt", place), _column(row, "completion", place)
    if isinstance(prompt, str):
        if isinstance(completion, str):
            return completion
        raise UserError(f"{place}: the prompt is text and the completion chat messages; make both the same")
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    before = _rendered(prompt, tokenizer, place)
    whole = _render(_joined(prompt, completion, place), tokenizer, place, add_generation_prompt=False)
    if not whole.startswith(before):
        raise UserError(
            f"{place}: the tokenizer's chat template writes the prompt differently once it is answered, so "
            "prompt and completion cannot be told apart; use text for prompt and completion"
        )
    return whole[len(before) :]


def _joined(prompt: Messages, completion: Messages, place: str) -> Messages:
    """Put an answer behind its prompt; one that the prompt begins is one message with what goes on from it."""
    if prompt[-1]["role"] != "assistant":
        return prompt + completion
    begun, rest = prompt[-1]["content"], completion[0]["content"]
    if len(completion) > 1 or not isinstance(begun, str) or not isinstance(rest, str):
        raise UserError(
            f"{place}: the prompt ends in an answer begun, so that the completion must be its rest: one text, or one "
            "message of the assistant with a text"
        )
    return [*prompt[:-1], {**prompt[-1], "content": begun + rest}]


def _rendered(messages: Messages, tokenizer: PreTrainedTokenizerBase, place: str) -> str:
    going_on = messages[-1]["role"] == "assistant"
    return _render(
        messages, tokenizer, place, add_generation_prompt=not going_on, continue_final_message=going_on
    )


def _render(messages: Messages, tokenizer: PreTrainedTokenizerBase, place: str, **options: Any) -> str:
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{place}: chat messages, but the tokenizer has no chat template; use a chat model's tokenizer, "
            "set tokenizer.chat_template, or give prompts as text"
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except (TemplateError, ValueError, TypeError) as error:  # transformers raises the latter two itself
        raise UserError(f"{place}: the tokenizer's chat template refuses these messages: {error}") from error


def _tokens(
    text: str, tokenizer: PreTrainedTokenizerBase, place: str, add_special_tokens: bool = False
) -> list[int]:
    try:
        return list(tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])
    except Exception as error:
        # The Rust tokenizers raise plain Exception for text outside a vocabulary without an unknown token.
        raise UserError(f"{place}: the tokenizer cannot encode {text!r:.60}: {error}") from error
