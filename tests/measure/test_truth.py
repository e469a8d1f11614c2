"""Estimates against enumeration: unbiased, and intervals that cover the truth as often as they say."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from transformers import PreTrainedModel

from kedge.measure import MeasureConfig, TokenTable, compare
from kedge.measure.figures import figures
from kedge.measure.questions import POLICY_RESPONSES
from kedge.statistics import Estimate
from tests.measure.small import LIMIT, PROMPTS, Enumerated, enumerate_responses, pair, tokenizer


@dataclass
class World:
    """Both models, and everything that the policy can answer to any prompt."""

    policy: PreTrainedModel
    reference: PreTrainedModel
    responses: list[Enumerated]

    def truth(self, name: str) -> float:
        """Expected sum along the response to a prompt drawn uniformly."""
        return sum(
            each.expected([float(column[name].sum()) for column in each.columns]) for each in self.responses
        ) / len(self.responses)

    def length(self) -> float:
        return sum(each.expected([len(ids) for ids in each.tokens]) for each in self.responses) / len(
            self.responses
        )


@pytest.fixture(scope="module")
def world() -> World:
    policy, reference = pair()
    encode = tokenizer()
    prompts = [encode(prompt, add_special_tokens=False)["input_ids"] for prompt in PROMPTS]
    return World(policy, reference, [enumerate_responses(policy, reference, prompt) for prompt in prompts])


def drawn(world: World, clusters: int, responses: int, seed: int) -> TokenTable:
    """A table as ``compare`` makes it, of prompts drawn uniformly and responses drawn from the enumeration."""
    generator = torch.Generator().manual_seed(seed)
    names = [name for name in TokenTable.empty().columns() if name not in ("cluster", "response", "position")]
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in TokenTable.empty().columns()}
    number = 0
    for cluster in range(clusters):
        known = world.responses[int(torch.randint(len(world.responses), (), generator=generator))]
        for choice in torch.multinomial(known.log_prob.exp(), responses, True, generator=generator).tolist():
            column = known.columns[choice]
            for name in names:
                rows[name].append(column[name])
            length = len(column["token"])
            rows["cluster"].append(torch.full((length,), cluster))
            rows["response"].append(torch.full((length,), number))
            rows["position"].append(torch.arange(length))
            number += 1
    return TokenTable(**{name: torch.cat(values) for name, values in rows.items()})


def most_misses(count: int, level: float, significance: float) -> tuple[int, int]:
    """Hits that a two-sided binomial test of ``count`` trials does not reject."""

    def log_term(k: int) -> float:
        choose = math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)
        return choose + k * math.log(level) + (count - k) * math.log1p(-level)

    terms = [math.exp(log_term(k)) for k in range(count + 1)]
    below = [math.fsum(terms[: k + 1]) for k in range(count + 1)]
    above = [math.fsum(terms[k:]) for k in range(count + 1)]
    fine = [k for k in range(count + 1) if min(below[k], above[k]) > significance / 2]
    return fine[0], fine[-1]


def check(estimates: list[dict[str, Estimate]], world: World) -> dict[str, float]:
    """Coverage by a binomial test at 1 %, bias by a z-test at 1 %, k1 and k3 wider; give the figures."""
    shown: dict[str, float] = {}
    reverse, length = world.truth("reverse_kl"), world.length()
    assert world.truth("k1") == pytest.approx(reverse, rel=1e-9)
    truths = {"reverse_kl_per_response": reverse, "reverse_kl": reverse / length}
    low, high = most_misses(len(estimates), 0.95, 0.01)
    for name, truth in truths.items():
        hits = sum(each[name].low <= truth <= each[name].high for each in estimates)
        shown[f"{name} coverage"] = hits / len(estimates)
        assert low <= hits <= high, (name, hits, low, high)
    values = torch.tensor([each["reverse_kl_per_response"].value for each in estimates], dtype=torch.float64)
    error = float(values.std()) / math.sqrt(len(values))
    shown |= {"truth": reverse, "mean": float(values.mean()), "error of the mean": error}
    assert abs(float(values.mean()) - reverse) < 2.576 * error
    stated = torch.tensor([each["reverse_kl_per_response"].standard_error for each in estimates])
    assert float(stated.mean()) == pytest.approx(float(values.std()), rel=0.1)
    for name in ("reverse_kl", "k1", "k3"):
        found = torch.tensor([each[f"{name}_per_response"].standard_error for each in estimates])
        shown[f"{name} standard error"] = float(found.double().mean())
    assert shown["k1 standard error"] > 1.5 * shown["reverse_kl standard error"]
    assert shown["k3 standard error"] > 1.05 * shown["reverse_kl standard error"]
    return shown


def test_figures_are_unbiased_and_intervals_cover(world: World) -> None:
    config = MeasureConfig(resamples=1000)
    estimates = [
        figures(drawn(world, 32, 2, seed), POLICY_RESPONSES, config).estimates for seed in range(250)
    ]
    print(check(estimates, world))


@pytest.mark.acceptance
def test_two_thousand_measurements(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    """Each a whole ``compare``: prompts drawn anew, responses sampled by the engine."""
    encode, estimates = tokenizer(), []
    for seed in range(2000):
        generator = torch.Generator().manual_seed(seed)
        prompts = [PROMPTS[i] for i in torch.randint(len(PROMPTS), (32,), generator=generator).tolist()]
        found = compare(
            world.policy, world.reference, prompts=prompts, tokenizer=encode, sample_from="policy",
            responses=2, max_new_tokens=LIMIT, device="cpu", seed=seed, batch=64, most=1,
        )  # fmt: skip
        estimates.append(found["policy_responses"].figures.estimates)
    with capsys.disabled():
        print(check(estimates, world))
