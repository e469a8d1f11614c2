"""The certificate of an installation: what Kedge computes, against enumeration."""

from kedge.certify.claims import TOLERANCE, Claim, print_table
from kedge.certify.enumeration import run

__all__ = ["TOLERANCE", "Claim", "print_table", "run"]
