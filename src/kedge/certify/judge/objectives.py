"""The objectives that are judged: how each is put together, where theory says that it ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from kedge.certify.judge import predictions as theory
from kedge.certify.judge.task import Task
from kedge.objective import Anchor, DivergenceMask, TrustRegion
from kedge.objective.advantages import Kind
from kedge.objective.aggregate import Mode

SIZE = 3
"""G, the responses of a group."""

SEQUENCE = Anchor("exact", gradient="sequence")
IN_REWARD = Anchor("k1", placement="reward", gradient="published")
UNCLIPPED = TrustRegion("none")


@dataclass(frozen=True)
class Objective:
    """One way of training, with its prediction.

    Args:
        name: Advantage, aggregation, anchor, in few words.
        ends: Where it ends, in few words.
        predicted: How likely each response is there, given the task and β; None: it does not come to rest.
        anchor: How the reference holds the policy.
        advantage: Against the group (G responses), or against a learned critic (GAE).
        aggregation: Of the surrogate; ``constant`` with a length of 1, so that a response counts 1.
        anchor_aggregation: The same of the anchor.
        whitened: Whether GAE's advantages are whitened over the batch.
        trace: λ of GAE.
        trust_region: How the ratio is clipped.
        penalty: Coefficient of KL(old‖policy).
        mask: By measured divergence.
        epochs: Updates on each batch.
    """

    name: str
    ends: str
    predicted: Callable[[Task, float], Float[Tensor, " R"]] | None
    anchor: Anchor
    advantage: Kind | Literal["critic"] = "leave_one_out"
    aggregation: Mode = "constant"
    anchor_aggregation: Mode = "constant"
    whitened: bool = False
    trace: float = 1.0
    trust_region: TrustRegion = UNCLIPPED
    penalty: float = 0.0
    mask: DivergenceMask | None = None
    epochs: int = 1


def _rest(
    worth: theory.Worth, pull: theory.Pull, share: theory.Worth | None = None
) -> Callable[[Task, float], Float[Tensor, " R"]]:
    return lambda task, beta: theory.rest(task, beta, worth, pull, share)


AT_OPTIMUM = "the optimum"
OBJECTIVES = (
    Objective("leave-one-out, exact sequence KL", AT_OPTIMUM, theory.optimum, SEQUENCE),
    Objective("leave-one-out, k1 sequence KL", AT_OPTIMUM, theory.optimum, Anchor("k1", gradient="sequence")),
    Objective("leave-one-out, k1 in reward", AT_OPTIMUM, theory.optimum, IN_REWARD),
    Objective(
        "leave-one-out, tokens averaged, exact sequence KL",
        AT_OPTIMUM,
        theory.optimum,
        SEQUENCE,
        aggregation="token_mean",
        anchor_aggregation="token_mean",
    ),
    Objective(
        "leave-one-out, clip + penalty + mask, 3 epochs",
        AT_OPTIMUM,
        theory.optimum,
        SEQUENCE,
        trust_region=TrustRegion("clip"),
        penalty=1.0,
        mask=DivergenceMask("tv", 0.1),
        epochs=3,
    ),
    Objective(
        "critic, k1 in each token's reward",
        AT_OPTIMUM,
        theory.optimum,
        IN_REWARD,
        advantage="critic",
        trace=0.95,
    ),
    Objective(
        "critic, exact sequence KL", AT_OPTIMUM, theory.optimum, SEQUENCE, advantage="critic", trace=0.95
    ),
    Objective(
        "critic, whitened, k1 in each token's reward",
        AT_OPTIMUM,
        theory.optimum,
        IN_REWARD,
        advantage="critic",
        whitened=True,
    ),
    Objective(
        "critic, whitened, exact sequence KL",
        "optimum of β·σ of the advantages",
        _rest(theory.over_token_std, theory.whole_response),
        SEQUENCE,
        advantage="critic",
        whitened=True,
    ),
    Objective(
        "group mean, exact sequence KL",
        "optimum of β·G/(G − 1)",
        _rest(theory.minus_group_mean(SIZE), theory.whole_response),
        SEQUENCE,
        advantage="mean",
    ),
    Objective("group mean, k1 in reward", AT_OPTIMUM, theory.optimum, IN_REWARD, advantage="mean"),
    Objective(
        "group mean and std, exact sequence KL",
        "ρ·exp(h/β), h = E[(r − mean)/std]",
        _rest(theory.over_group_std(SIZE), theory.whole_response),
        SEQUENCE,
        advantage="group",
    ),
    Objective("group mean and std, k1 in reward", AT_OPTIMUM, theory.optimum, IN_REWARD, advantage="group"),
    Objective(
        "leave-one-out over length, exact sequence KL",
        "ρ·exp(h/β), h = (r − E[r])/T",
        _rest(theory.over_length(theory.reward), theory.whole_response),
        SEQUENCE,
        aggregation="sequence_mean",
    ),
    Objective(
        "leave-one-out, exact token KL",
        "Gibbs in each state, no KL to go",
        _rest(theory.reward, theory.each_state),
        Anchor("exact"),
    ),
    Objective(
        "leave-one-out, k2 as published",
        "Gibbs in each state, no KL to go",
        _rest(theory.reward, theory.each_state),
        Anchor("k2", gradient="published"),
    ),
    Objective(
        "leave-one-out, k3 weighted (w·k3)",
        "Gibbs in each state, no KL to go",
        _rest(theory.reward, theory.each_state),
        Anchor("k3", gradient="token"),
    ),
    Objective(
        "leave-one-out, k3 as published",
        "β·ρ/(λ − Q) in each state: forward KL",
        _rest(theory.reward, theory.forward),
        Anchor("k3", gradient="published"),
    ),
    Objective(
        "leave-one-out, exact forward KL",
        "β·ρ/(λ − Q) in each state: forward KL",
        _rest(theory.reward, theory.forward),
        Anchor("exact", "forward"),
    ),
    Objective(
        "GRPO: mean and std, over length, k3 as published",
        "β·ρ/(E[T]·(λ − Q)) of h/T in each state",
        _rest(theory.over_length(theory.over_group_std(SIZE)), theory.forward, theory.per_token),
        Anchor("k3", gradient="published"),
        advantage="group",
        aggregation="sequence_mean",
        anchor_aggregation="token_mean",
    ),
    Objective(
        "leave-one-out, k3 in reward",
        "nowhere: runs away",
        None,
        Anchor("k3", placement="reward", gradient="published"),
    ),
)
