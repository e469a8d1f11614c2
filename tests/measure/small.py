"""Two models over six tokens, small enough for every response to be enumerated."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kedge.measure.questions import Side
from kedge.models import build_model
from kedge.tasks.vocabulary import fixed_tokenizer

LIMIT = 3
"""Tokens in a response at most."""
EOS = 1
PROMPTS = ["".join(pair) for pair in itertools.product("abcd", repeat=2)]
TEXTS = PROMPTS + ["".join(letters) for letters in itertools.product("abcd", repeat=3)]


def tokenizer() -> PreTrainedTokenizerBase:
    return fixed_tokenizer(list("abcd"), unit="character", context=16)


def model(seed: int, scale: float = 0.6) -> PreTrainedModel:
    built = build_model(
        6, hidden_size=16, layers=1, heads=2, context=16, seed=seed, eos_id=1, pad_id=0,
        options={"initializer_range": scale},
    )  # fmt: skip
    return built.double()


def pair(drift: float = 0.05) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A reference and a policy that has drifted from it."""
    policy, reference = model(0), model(0)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += drift * torch.randn(parameter.shape, dtype=torch.float64, generator=noise)
    return policy, reference


@dataclass
class Enumerated:
    """Every response to a prompt: tokens, log-probability under the model that draws, per-token values."""

    tokens: list[list[int]]
    log_prob: Tensor
    columns: list[dict[str, Tensor]]

    def expected(self, values: list[float]) -> float:
        return float(self.log_prob.exp() @ torch.tensor(values, dtype=torch.float64))


def enumerate_responses(
    policy: PreTrainedModel, reference: PreTrainedModel, prompt: list[int], side: Side
) -> Enumerated:
    """Every response that one of the models can give, with what a table of its tokens holds, from whole logits."""
    whole = torch.tensor(list(itertools.product(range(6), repeat=LIMIT)))
    ids = torch.cat([torch.tensor([prompt]).expand(len(whole), -1), whole], dim=1)
    with torch.no_grad():
        both = [model(input_ids=ids).logits[:, len(prompt) - 1 : -1] for model in (policy, reference)]
    known: dict[tuple[int, ...], dict[str, Tensor]] = {}
    for tokens, *logits in zip(whole, *both, strict=True):
        ended = (tokens == EOS).nonzero()
        length = int(ended[0]) + 1 if len(ended) else LIMIT
        log_p, log_q = (each.log_softmax(-1)[:length] for each in logits)
        known.setdefault(tuple(tokens[:length].tolist()), values(tokens[:length], log_p, log_q, side))
    log_prob = torch.stack([column[f"{side}_log_prob"].sum() for column in known.values()])
    return Enumerated([list(tokens) for tokens in known], log_prob, list(known.values()))


def read_text(policy: PreTrainedModel, reference: PreTrainedModel, text: list[int]) -> Enumerated:
    """A text, which is drawn whole, with what a table of its tokens holds, from whole logits."""
    with torch.no_grad():
        log_p, log_q = (
            model(input_ids=torch.tensor([text])).logits[0, :-1].log_softmax(-1)
            for model in (policy, reference)
        )
    column = values(torch.tensor(text[1:]), log_p, log_q, "policy")
    return Enumerated([text[1:]], torch.zeros(1, dtype=torch.float64), [column])


def values(tokens: Tensor, log_p: Tensor, log_q: Tensor, side: Side) -> dict[str, Tensor]:
    """What a table holds of these tokens, and the sampled estimators of the side's KL, by their definitions."""
    p, q, chosen = log_p.exp(), log_q.exp(), tokens[:, None]
    policy, reference = log_p.gather(1, chosen)[:, 0], log_q.gather(1, chosen)[:, 0]
    own, other = (policy, reference) if side == "policy" else (reference, policy)
    return {
        "token": tokens,
        "policy_log_prob": policy,
        "reference_log_prob": reference,
        "reverse_kl": (p * (log_p - log_q)).sum(1),
        "forward_kl": (q * (log_q - log_p)).sum(1),
        "policy_entropy": -(p * log_p).sum(1),
        "reference_entropy": -(q * log_q).sum(1),
        "policy_top": p.argmax(1),
        "reference_top": q.argmax(1),
        "k1": own - other,
        "k3": (other - own).exp() - 1 - (other - own),
    }
