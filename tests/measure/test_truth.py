"""Estimates against enumeration: unbiased, and intervals that cover the truth as often as they say."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from transformers import PreTrainedModel

from kedge.measure import MeasureConfig, TokenTable, compare
from kedge.measure.figures import figures
from kedge.measure.questions import POLICY_RESPONSES, QUESTIONS, REFERENCE_RESPONSES, TEXTS, Question
from kedge.statistics import Estimate
from tests.measure import small
from tests.measure.small import LIMIT, PROMPTS, Enumerated, enumerate_responses, pair, read_text, tokenizer

CLUSTERS, RESPONSES = 32, 2
"""Prompts, or texts, of one measurement, and responses to each prompt."""
ALL = pytest.mark.parametrize(
    "question", [POLICY_RESPONSES, REFERENCE_RESPONSES, TEXTS], ids=lambda each: each.name
)


@dataclass
class World:
    """Both models; for each question, everything that can follow each prompt, or each text."""

    policy: PreTrainedModel
    reference: PreTrainedModel
    found: dict[str, list[Enumerated]]

    def truth(self, question: Question, name: str) -> float:
        """Expected sum along the response to a prompt, or along a text, drawn uniformly."""
        known = self.found[question.name]
        return sum(
            each.expected([float(column[name].sum()) for column in each.columns]) for each in known
        ) / len(known)

    def length(self, question: Question) -> float:
        known = self.found[question.name]
        return sum(each.expected([len(ids) for ids in each.tokens]) for each in known) / len(known)


@pytest.fixture(scope="module")
def world() -> World:
    policy, reference = pair()
    encode = tokenizer()
    prompts, texts = (
        [encode(text, add_special_tokens=False)["input_ids"] for text in texts]
        for texts in (PROMPTS, small.TEXTS)
    )
    found = {
        question.name: [enumerate_responses(policy, reference, prompt, side) for prompt in prompts]
        for question in QUESTIONS.values()
        if (side := question.sampled_from) is not None
    }
    return World(
        policy, reference, found | {TEXTS.name: [read_text(policy, reference, text) for text in texts]}
    )


def drawn(world: World, question: Question, seed: int) -> TokenTable:
    """A table as ``compare`` makes it, of prompts or texts drawn uniformly, and responses drawn from all there are."""
    generator = torch.Generator().manual_seed(seed)
    names = [name for name in TokenTable.empty().columns() if name not in ("cluster", "response", "position")]
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in TokenTable.empty().columns()}
    known = world.found[question.name]
    responses = 1 if question is TEXTS else RESPONSES
    for cluster in range(CLUSTERS):
        one = known[int(torch.randint(len(known), (), generator=generator))]
        chosen = torch.multinomial(one.log_prob.exp(), responses, True, generator=generator).tolist()
        for number, choice in enumerate(chosen, responses * cluster):
            column = one.columns[choice]
            for name in names:
                rows[name].append(column[name])
            length = len(column["token"])
            rows["cluster"].append(torch.full((length,), cluster))
            rows["response"].append(torch.full((length,), number))
            rows["position"].append(torch.arange(length))
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


def check(estimates: list[dict[str, Estimate]], world: World, question: Question) -> dict[str, float]:
    """Coverage by a binomial test at 1 %, bias by a z-test at 1 %, k1 and k3 wider; give the figures."""
    shown: dict[str, float] = {}
    truths = {name: world.truth(question, name) / world.length(question) for name in question.headline}
    first = question.headline[0]
    if question is not TEXTS:
        first = f"{question.headline[0]}_per_response"
        truths[first] = world.truth(question, question.headline[0])
        assert world.truth(question, "k1") == pytest.approx(truths[first], rel=1e-9)
    low, high = most_misses(len(estimates), 0.95, 0.01)
    for name, truth in truths.items():
        hits = sum(each[name].low <= truth <= each[name].high for each in estimates)
        shown[f"{name} coverage"] = hits / len(estimates)
        assert low <= hits <= high, (name, hits, low, high)
    values = torch.tensor([each[first].value for each in estimates], dtype=torch.float64)
    error = float(values.std()) / math.sqrt(len(values))
    shown |= {"truth": truths[first], "mean": float(values.mean()), "error of the mean": error}
    assert abs(float(values.mean()) - truths[first]) < 2.576 * error
    stated = torch.tensor([each[first].standard_error for each in estimates], dtype=torch.float64)
    assert float(stated.mean()) == pytest.approx(float(values.std()), rel=0.1)
    shown["standard error"] = float(stated.mean())
    for name, wider in (("k1", 1.5), ("k3", 1.05)) if question is not TEXTS else ():
        found = torch.tensor([each[f"{name}_per_response"].standard_error for each in estimates])
        shown[f"{name} standard error"] = float(found.double().mean())
        assert shown[f"{name} standard error"] > wider * shown["standard error"]
    return shown


@ALL
def test_figures_are_unbiased_and_intervals_cover(world: World, question: Question) -> None:
    config = MeasureConfig(resamples=1000)
    estimates = [figures(drawn(world, question, seed), question, config).estimates for seed in range(250)]
    print(check(estimates, world, question))


@pytest.mark.acceptance
@pytest.mark.timeout(1800)
def test_two_thousand_measurements(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    """Prompts and texts drawn anew, responses sampled by the engine: a hundred measurements cut out of each pass."""
    estimates: dict[str, list[dict[str, Estimate]]] = {name: [] for name in QUESTIONS}
    config, count = MeasureConfig(), 100 * CLUSTERS
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        prompts, texts = (
            [known[i] for i in torch.randint(len(known), (count,), generator=generator).tolist()]
            for known in (PROMPTS, small.TEXTS)
        )
        found = compare(
            world.policy, world.reference, prompts=prompts, texts=texts, tokenizer=tokenizer(), responses=RESPONSES,
            max_new_tokens=LIMIT, device="cpu", seed=seed, batch=512, most=1,
        )  # fmt: skip
        for name, answer in found.answers.items():
            table = answer.tokens
            for start in range(0, count, CLUSTERS):
                rows = table.rows((table.cluster >= start) & (table.cluster < start + CLUSTERS))
                estimates[name].append(figures(rows, answer.question, config).estimates)
    for name, each in estimates.items():
        assert len(each) == 2000
        with capsys.disabled():
            print(name, check(each, world, QUESTIONS[name]))
