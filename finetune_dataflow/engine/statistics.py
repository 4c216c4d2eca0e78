"""Paired differences with bias-corrected and accelerated (BCa) bootstrap intervals.

Efron, B. (1987). Better Bootstrap Confidence Intervals. Journal of the American Statistical Association 82(397).
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and the ends of its 95 % interval."""

    mean: float
    low: float
    high: float


def weighted_mean_interval(values: NDArray[np.float64], weights: NDArray[np.float64] | None = None, seed: int = 0) -> Interval:
    """The mean of paired differences [n], weighted where weights [n] are given, with its 95 % BCa interval over rows.

    With fewer than two rows, or with all values equal, the interval is the mean itself.
    """
    weights = np.ones(len(values)) if weights is None else weights
    totals = values * weights
    mean = float(totals.sum() / weights.sum())
    if len(values) < 2 or np.ptp(values) == 0:
        return Interval(mean, mean, mean)
    drawn = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    means = totals[drawn].sum(axis=1) / weights[drawn].sum(axis=1)
    normal = NormalDist()
    # Half of the ties count as below, so that a discrete score has no bias of its own; clipped away from 0 and 1.
    below = (np.sum(means < mean) + 0.5 * np.sum(means == mean)) / RESAMPLES
    bias = normal.inv_cdf(float(np.clip(below, 1 / RESAMPLES, 1 - 1 / RESAMPLES)))
    left_out = (totals.sum() - totals) / (weights.sum() - weights)
    deviations = left_out.mean() - left_out
    spread = float((deviations**2).sum() ** 1.5)
    acceleration = float((deviations**3).sum() / (6 * spread)) if spread > 0 else 0.0
    ends = []
    for tail in ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2):
        shifted = bias + normal.inv_cdf(tail)
        ends.append(normal.cdf(bias + shifted / (1 - acceleration * shifted)))
    low, high = np.quantile(means, ends)
    return Interval(mean, float(low), float(high))
