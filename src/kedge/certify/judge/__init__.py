"""The closed form as the judge: where each objective ends, beside the optimum that is known."""

from kedge.certify.judge.bandit import bandit_claims
from kedge.certify.judge.verdicts import Verdict, print_verdicts, verdicts

__all__ = ["Verdict", "bandit_claims", "print_verdicts", "verdicts"]
