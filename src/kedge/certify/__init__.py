"""The certificate of an installation: what Kedge computes, against enumeration."""

from kedge.certify.accuracy import DTYPES as HEAD_DTYPES
from kedge.certify.accuracy import Accuracy, head_accuracy
from kedge.certify.accuracy_table import print_accuracy
from kedge.certify.claims import TOLERANCE, Claim, print_table
from kedge.certify.enumeration import run
from kedge.certify.judge import Verdict, print_verdicts, verdicts

__all__ = [
    "HEAD_DTYPES",
    "TOLERANCE",
    "Accuracy",
    "Claim",
    "Verdict",
    "head_accuracy",
    "print_accuracy",
    "print_table",
    "print_verdicts",
    "run",
    "verdicts",
]
