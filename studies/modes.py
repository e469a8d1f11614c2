"""Mode covering and mode seeking: one bell fitted to a distribution with two peaks, by either KL.

The target ρ stands on 121 tokens at places x between −6 and 6: two bells of width 0.7, one with 60 % of the
mass at −2, one with 40 % at 2.4. The family cannot follow it: π ∝ exp(a·x − b·x²), one bell.

* In closed form. KL(ρ‖π) has one minimum: π has the mean and the variance of ρ. KL(π‖ρ) has two: π is either
  peak, at about −log of the peak's mass.
* By training. A small Llama whose head has the features (x, −x²) is trained by ``kedge.head`` against either
  exact KL, and by cross-entropy on samples of ρ, which is SFT.

    make study-modes
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kedge.divergence import entropy, forward_kl, reverse_kl
from kedge.head import Head, score
from kedge.models import build_model, hidden_states
from studies.figures import FORWARD, REVERSE, TARGET, figure

HERE = Path(__file__).parent
PLACES = torch.linspace(-6, 6, 121, dtype=torch.float64)
PEAKS = ((0.6, -2.0), (0.4, 2.4))
WIDTH = 0.7
FEATURES = torch.stack([PLACES, -PLACES.square()], dim=1)
STEPS, SAMPLES = 1500, 256


@dataclass(frozen=True)
class Fit:
    """Where a fit has ended."""

    how: str
    mean: float
    deviation: float
    forward: float
    reverse: float
    mass: tuple[float, float]
    """Left of and right of the valley between the peaks."""


def target() -> Tensor:
    """Give the logits of ρ, [V]."""
    bells = [math.log(mass) - 0.5 * ((PLACES - place) / WIDTH).square() for mass, place in PEAKS]
    return torch.logsumexp(torch.stack(bells), dim=0)


def fitted(how: str, logits: Tensor) -> Fit:
    """Describe a bell, given by its logits [V]."""
    p = logits.double().softmax(0)
    mean = float((p * PLACES).sum())
    left = float(p[PLACES < 0.2].sum())
    return Fit(
        how,
        mean,
        math.sqrt(float((p * (PLACES - mean).square()).sum())),
        float(forward_kl(logits.double(), target())),
        float(reverse_kl(logits.double(), target())),
        (left, 1 - left),
    )


def same_moments() -> Tensor:
    """Solve E_π[(x, −x²)] = E_ρ[(x, −x²)], where KL(ρ‖π) is least, by Newton's method: logits [V]."""
    wanted = target().softmax(0) @ FEATURES
    bell = torch.tensor([0.0, 0.1], dtype=torch.float64)
    for _ in range(50):
        p = (FEATURES @ bell).softmax(0)
        found = p @ FEATURES
        spread = (FEATURES - found).T @ (p[:, None] * (FEATURES - found))
        bell = bell + torch.linalg.solve(spread, wanted - found)
    return FEATURES @ bell


def least_reverse(place: float) -> Tensor:
    """Minimise KL(π‖ρ) from a bell at a place: logits [V]."""
    precision = 1 / (2 * WIDTH**2)
    bell = torch.tensor([2 * place * precision, precision], dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([bell], max_iter=500, tolerance_grad=1e-13, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        search.zero_grad()
        loss = reverse_kl(FEATURES @ bell, target())
        loss.backward()
        return loss

    search.step(closure)
    return (FEATURES @ bell).detach()


class Student:
    """A small Llama that says the two numbers of a bell after one fixed token, which its head turns into logits."""

    def __init__(self, place: float, width: float) -> None:
        self.model = build_model(8, hidden_size=32, layers=2, heads=2, context=4, seed=0)
        self.reading = torch.nn.Linear(32, 2)
        with torch.no_grad():  # it begins near a bell of this place and width
            self.reading.weight.mul_(0.1)
            self.reading.bias.copy_(torch.tensor([place, 0.5]) / width**2)
        self.head = Head(FEATURES.float())
        self.parameters = [*self.model.get_decoder().parameters(), *self.reading.parameters()]

    def bell(self) -> Tensor:
        """Give the head's input, [1, 2]."""
        hidden = hidden_states(self.model, torch.tensor([1]), torch.tensor([1]))
        out: Tensor = self.reading(hidden)
        return out

    def train(self, want: str) -> Tensor:
        """Minimise an output of the head, or cross-entropy on samples of ρ (``log_prob``); give the logits [V]."""
        optimizer = torch.optim.Adam(self.parameters, lr=3e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        reference = (torch.ones(1, 1), Head(target().float()[:, None]))
        draws = torch.Generator().manual_seed(0)
        for _ in range(STEPS):
            rows = SAMPLES if want == "log_prob" else 1
            tokens = torch.multinomial(target().softmax(0), rows, replacement=True, generator=draws)
            anchors = {"reference": (reference[0].expand(rows, 1), reference[1])}
            scores = score(self.bell().expand(rows, 2), self.head, tokens, anchors=anchors, want=[want])
            loss = (-1 if want == "log_prob" else 1) * scores[want].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return (self.bell()[0] @ self.head.weight.T).detach()


def fits() -> dict[str, Tensor]:
    """Give the logits of every fit, by how it was had."""
    found = {"forward, closed form": same_moments()}
    for (_, place), name in zip(PEAKS, ("left", "right"), strict=True):
        found[f"reverse, {name} minimum"] = least_reverse(place)
    found["forward, trained"] = Student(0.0, 2.0).train("reference.forward_kl")
    found["SFT on samples of ρ"] = Student(0.0, 2.0).train("log_prob")
    for place, side in ((-2.0, "left"), (2.0, "right")):
        found[f"reverse, trained from the {side}"] = Student(place, 1.0).train("reference.reverse_kl")
    return found


def draw(found: dict[str, Tensor], path: Path) -> None:
    """Draw target and fits."""
    with figure(path, width=7.6, height=3.5) as plot:
        plot.fill_between(PLACES, target().softmax(0) * 10, color=TARGET, lw=0, label="ρ, the target")
        styles = {
            "forward, closed form": (FORWARD, "-", "least KL(ρ‖π): covers both"),
            "SFT on samples of ρ": (FORWARD, ":", "trained by SFT"),
            "reverse, left minimum": (REVERSE, "-", "least KL(π‖ρ): takes one"),
            "reverse, right minimum": (REVERSE, "--", "its other minimum"),
        }
        for how, (colour, line, label) in styles.items():
            plot.plot(PLACES, found[how].double().softmax(0) * 10, color=colour, ls=line, label=label)
        plot.set(xlabel="place of the token", ylabel="density", xlim=(-6, 6), ylim=(0, None))
        plot.figure.legend(frameon=False, loc="outside upper center", ncols=3)


def show(rows: list[Fit]) -> None:
    table = Table(box=None, title="one bell for two peaks", title_justify="left")
    for column in ("fit", "mean", "std", "KL(ρ‖π)", "KL(π‖ρ)", "mass left | right"):
        table.add_column(column, justify="left" if column == "fit" else "right")
    for row in rows:
        mass = " | ".join(f"{each:.2f}" for each in row.mass)
        table.add_row(
            row.how,
            f"{row.mean:.3f}",
            f"{row.deviation:.3f}",
            f"{row.forward:.4f}",
            f"{row.reverse:.4f}",
            mass,
        )
    Console().print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--figure", type=Path, default=HERE.parent / "docs" / "images" / "modes.svg")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "modes.json")
    given = parser.parse_args()
    found = fits()
    rows = [fitted(how, logits) for how, logits in found.items()]
    show(rows)
    entropies: dict[str, Any] = {"entropy of ρ": float(entropy(target()))}
    given.out.parent.mkdir(exist_ok=True)
    given.out.write_text(
        json.dumps({**entropies, "fits": [asdict(row) for row in rows]}, indent=1, ensure_ascii=False) + "\n",
        encoding="utf-8",
    )
    draw(found, given.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
