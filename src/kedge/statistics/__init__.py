"""Uncertainty of means over clustered samples: standard errors, intervals, how many more are needed."""

from kedge.statistics.clustered import clustered_standard_error, clustered_sums, ratio_standard_error
from kedge.statistics.interval import Estimate, estimate_ratios
from kedge.statistics.needed import Needed, samples_needed
from kedge.statistics.student import student_quantile

__all__ = [
    "Estimate",
    "Needed",
    "clustered_standard_error",
    "clustered_sums",
    "estimate_ratios",
    "ratio_standard_error",
    "samples_needed",
    "student_quantile",
]
