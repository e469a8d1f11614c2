"""The judge: predictions without Kedge against Kedge's gradients, ends that are reached, verdicts that can fail."""

from __future__ import annotations

import io
import itertools
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from kedge import certify
from kedge.certify import Verdict, print_verdicts, verdicts
from kedge.certify.judge import learner as learning
from kedge.certify.judge import predictions as theory
from kedge.certify.judge.bandit import bandit_claims
from kedge.certify.judge.groups import all_groups, drawn_groups
from kedge.certify.judge.learner import Learner, follow_sampled
from kedge.certify.judge.objectives import AT_OPTIMUM, OBJECTIVES, SIZE, Objective
from kedge.certify.judge.task import Task, tree
from kedge.certify.judge.verdicts import BETA, NEAR, NEAR_SAMPLED
from kedge.cli import main

CPU, DOUBLE = torch.device("cpu"), torch.float64
SMALL = tree(4, longest=2)
NAMED = {objective.name: objective for objective in OBJECTIVES}
FIRST = OBJECTIVES[0]


def table_of(task: Task, likely: Tensor) -> Tensor:
    """Logits of the policy whose responses are as likely as that."""
    mass = torch.zeros_like(task.reference)
    for response, states, chance in zip(task.responses, task.states, likely, strict=True):
        for state, token in zip(states, response, strict=True):
            mass[state, token] += chance
    return mass.log() - mass.sum(-1, keepdim=True).log()


def gradient_at(task: Task, objective: Objective, table: Tensor) -> Tensor:
    """Kedge's expected gradient of one update, with a critic that knows the values."""
    learner = Learner(task, objective, 1.0)
    groups = all_groups(task, learner.size, CPU, DOUBLE)
    learner.table = table
    likely = groups.likely(table)
    for _ in range(3 if objective.advantage == "critic" else 0):
        learner._teach(groups, likely, learner._advantages(groups, likely)[1], 1e-9)
    return learner._gradient(groups, likely, learner._advantages(groups, likely)[0], table)


def test_the_task_is_a_tree_whose_responses_are_all_there() -> None:
    task = tree(1)
    assert sorted(task.responses) == sorted(
        {
            cut
            for each in itertools.product(range(3), repeat=3)
            for cut in [each[: each.index(0) + 1] if 0 in each else each]
        }
    )
    assert task.log_likely(task.reference).exp().sum().item() == pytest.approx(1)
    visits = task.visits(task.reference)
    assert visits[0].item() == pytest.approx(1)
    assert visits[1].item() == pytest.approx(task.reference[0].softmax(-1)[1].item())


def test_the_optimum_has_the_highest_value() -> None:
    """β·log Z is the value at the optimum, and no neighbour's is higher."""
    best, log_rho = theory.optimum(SMALL, 0.7), SMALL.log_likely(SMALL.reference)

    def value(p: Tensor) -> float:
        return float((p * (SMALL.rewards - 0.7 * (p.log() - log_rho))).sum())

    assert value(best) == pytest.approx(0.7 * float((log_rho + SMALL.rewards / 0.7).logsumexp(0)))
    for seed in range(20):
        nudge = 0.1 * torch.randn(len(best), generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
        assert value((best.log() + nudge).softmax(0)) < value(best)


def test_the_forward_rule_is_the_optimum_of_reward_minus_forward_kl() -> None:
    bandit = tree(2, vocabulary=5, longest=1)
    rho = bandit.reference[0].softmax(-1)
    found = theory.forward(bandit, bandit.rewards, 0.5)
    logits = found.log().requires_grad_()
    pi = logits.softmax(-1)
    (slope,) = torch.autograd.grad((pi * bandit.rewards).sum() + 0.5 * (rho * pi.log()).sum(), logits)
    assert found.sum().item() == pytest.approx(1)
    assert slope.abs().max() < 1e-12


SETTLED = [each for each in OBJECTIVES if each.predicted is not None and not each.whitened]


@pytest.mark.parametrize("objective", SETTLED, ids=lambda each: each.name)
def test_kedges_gradient_vanishes_where_theory_says(objective: Objective) -> None:
    assert objective.predicted is not None
    table = table_of(SMALL, objective.predicted(SMALL, 1.0))
    assert gradient_at(SMALL, objective, table).abs().max() < 1e-8
    away = table + 0.1 * torch.linspace(-1, 1, table.numel(), dtype=DOUBLE).sin().reshape(table.shape)
    assert gradient_at(SMALL, objective, away).abs().max() > 1e-3


def test_only_what_is_right_ends_at_the_optimum() -> None:
    best = theory.optimum(SMALL, 1.0)
    for objective in SETTLED:
        assert objective.predicted is not None
        apart = 0.5 * float((objective.predicted(SMALL, 1.0) - best).abs().sum())
        assert (apart < 1e-12) == (objective.ends == AT_OPTIMUM)
        assert apart < 1e-12 or apart > 0.01


@pytest.mark.parametrize(
    "name",
    [
        "leave-one-out, clip + penalty + mask, 3 epochs",
        "group mean, exact sequence KL",
        "leave-one-out, k3 in reward",
    ],
)
def test_followed_to_the_end(name: str) -> None:
    (verdict,) = verdicts(task=tree(6, longest=2), objectives=[NAMED[name]], steps=40)
    assert verdict.passed
    assert (verdict.expected < 1e-3) == (NAMED[name].ends == AT_OPTIMUM)


def test_whitening_can_leave_no_rest() -> None:
    """As the policy sharpens, σ falls, and with it the anchor beside the whitened surrogate."""
    predicted = NAMED["critic, whitened, exact sequence KL"].predicted
    assert predicted is not None
    with pytest.raises(ArithmeticError, match="does not settle"):
        predicted(tree(1, longest=2), 0.5)


def test_a_mean_that_contains_the_response_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = learning.group_advantages
    monkeypatch.setattr(
        learning, "group_advantages", lambda rewards, group, kind: right(rewards, group, "mean")
    )
    (verdict,) = verdicts(task=SMALL, objectives=[FIRST], steps=30)
    assert not verdict.passed
    assert verdict.expected > 0.01


def test_an_anchor_without_its_to_go_is_caught() -> None:
    blind = replace(FIRST, anchor=NAMED["leave-one-out, exact token KL"].anchor)
    (verdict,) = verdicts(task=SMALL, objectives=[blind], steps=30)
    assert verdict.expected > 0.01
    assert not verdict.passed


def test_groups_are_as_likely_as_they_are_drawn() -> None:
    groups = all_groups(SMALL, SIZE, CPU, DOUBLE)
    likely, pi = groups.likely(SMALL.reference), SMALL.log_likely(SMALL.reference).exp()
    assert likely.sum().item() == pytest.approx(1)
    each = torch.zeros_like(pi).index_add(0, groups.drawn, likely)
    assert each.tolist() == pytest.approx(pi.tolist())
    generator = torch.Generator().manual_seed(0)
    drawn = drawn_groups(SMALL, SMALL.reference, 5000, SIZE, generator, CPU, DOUBLE)
    shares = drawn.drawn.bincount(minlength=len(pi)) / len(drawn.drawn)
    assert shares.tolist() == pytest.approx(pi.tolist(), abs=0.02)


def test_drawn_responses_lead_where_expected_gradients_do() -> None:
    learner = Learner(SMALL, NAMED["critic, k1 in each token's reward"], 1.0)
    found = follow_sampled(learner, 3, steps=40)
    assert 0.5 * float((found - theory.optimum(SMALL, 1.0)).abs().sum()) < 0.03


def test_the_bandits_optimum_is_reached() -> None:
    """The issue asks for 1e-3; expected gradients arrive within rounding."""
    claims = list(bandit_claims(CPU, DOUBLE, [3]))
    assert len(claims) == 3
    assert all(claim.passed and claim.error < 1e-10 for claim in claims)


def test_the_table_shows_every_verdict() -> None:
    text = io.StringIO()
    ran = Verdict(NAMED["leave-one-out, k3 in reward"], None, 0.75, None, None, None, 1e-20)
    missed = Verdict(FIRST, 0.0, 0.1, 0.1, 0.11, 0.11, 0.01)
    assert ran.passed
    assert not replace(ran, least=0.1).passed
    assert not missed.passed
    assert not replace(missed, expected_error=0.0).passed
    print_verdicts([ran, missed], Console(file=text, width=160))
    for words in ("leave-one-out, k3 in reward", "0.750", "FAILS", "1 of 2 end where theory says"):
        assert words in text.getvalue()


def test_the_tolerances_tell_any_two_ends_apart() -> None:
    """On the judge's own task: what ends where another objective should cannot pass, with drawn responses either."""
    task = tree(0)
    ends = [objective.predicted(task, BETA) for objective in OBJECTIVES if objective.predicted is not None]
    apart = [0.5 * float((p - q).abs().sum()) for p, q in itertools.combinations(ends, 2)]
    different = [each for each in apart if each > 1e-9]
    assert len(different) > 100
    assert min(different) > 2 * max(NEAR, NEAR_SAMPLED)


@pytest.mark.acceptance
def test_every_objective_ends_where_theory_says() -> None:
    found = list(verdicts(sampled=True))
    assert {each.objective.name for each in found if not each.passed} == set()
    for each in found:
        at_optimum = each.objective.ends == AT_OPTIMUM
        assert (each.expected < 1e-3) == at_optimum, each.objective.name
        assert each.sampled is not None
        assert (each.sampled < NEAR_SAMPLED) == at_optimum, each.objective.name
    assert not any(math.isnan(each.expected) for each in found)


def test_the_page_says_what_theory_says() -> None:
    """Every objective stands in docs/closed-form.md, with its end and its distance from the optimum."""
    page = (Path(__file__).parents[2] / "docs" / "closed-form.md").read_text(encoding="utf-8")
    lines = [line.strip("| \n").split(" | ") for line in page.splitlines() if line.startswith("| ")][1:]
    task = tree(0)
    best = theory.optimum(task, 1.0)
    expected = []
    for objective in OBJECTIVES:
        predicted = None if objective.predicted is None else objective.predicted(task, 1.0)
        shown = "" if predicted is None else f"{0.5 * float((predicted - best).abs().sum()):.3f}"
        expected.append([objective.name, objective.ends, shown])
    assert [[each.strip() for each in line[:3]] for line in lines] == expected


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(
        certify, "verdicts", partial(verdicts, task=SMALL, objectives=OBJECTIVES[:1], steps=40)
    )  # the rest is as the command gives it
    assert main(["certify", "--judge"]) == 0
    shown = capsys.readouterr().out
    assert "1 of 1 end where theory says" in shown
    assert "E[r] − β KL(π‖ρ)" in shown
    assert main(["certify", "--judge", "--dtype", "bfloat16"]) == 2
    assert main(["certify", "--sampled"]) == 2
    assert main(["certify", "--head", "--judge"]) == 2
    refused = capsys.readouterr().err
    assert "give --dtype float64 or float32" in refused
    assert "give --judge, or leave it out" in refused
    assert "one of them at a time" in refused
