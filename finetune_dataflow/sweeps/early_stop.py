"""Early termination after Hyperband, as Weights & Biases documents it for `early_terminate`.

A trial is looked at when it reaches a bracket: a number of times that its metric was reported. There it must be among the
best 1/eta of all trials that came so far (after Li et al. 2018, arXiv:1603.06560).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from finetune_dataflow.sweeps.sweep_file import EarlyTermination, Goal

MOST_BRACKETS = 100  # of a `min_iter`, as with W&B
MOST_REPORTS = 500  # as far as they are listed where no number of reports is given


def brackets(early: EarlyTermination, reports: int = MOST_REPORTS) -> list[int]:
    """The brackets within so many reports of the metric, in rising order.

    With max_iter and s those are max_iter / eta, max_iter / eta², …, s of them and none below 1; with min_iter they are
    min_iter, min_iter * eta, min_iter * eta², … Fractions are cut off.
    """
    found = set()
    if early.max_iter is not None and early.s is not None:
        place = early.max_iter / early.eta
        for _ in range(early.s):
            if place < 1:
                break
            found.add(int(place))
            place /= early.eta
    elif early.min_iter is not None:
        place = float(early.min_iter)
        for _ in range(MOST_BRACKETS):
            if place > reports:
                break
            found.add(int(place))
            place *= early.eta
    return sorted(each for each in found if each <= reports)


def stop(history: Sequence[float], others: Sequence[Sequence[float]], goal: Goal, early: EarlyTermination) -> str | None:
    """Why a trial is to be stopped; None where it may go on.

    history: the trial's metric in the order it was reported; others: the same of every other trial, ended or not. At the last
    bracket that the trial has reached, the bound is the value at rank n / eta (from 0, cut off) of the n trials that have
    reached it, this one included, so that of few trials the best goes on. The trial's best value so far is held against it,
    or where `strict` its value at the bracket. A value that is not finite is worse than any other.
    """
    reached = brackets(early, len(history))
    if not reached:
        return None
    bracket = reached[-1]
    own = _ranked(history, goal)
    there = sorted([own[bracket - 1], *(_ranked(each, goal)[bracket - 1] for each in others if len(each) >= bracket)])
    bound = there[int(len(there) / early.eta)]
    value = own[bracket - 1] if early.strict else min(own)
    if value <= bound:
        return None
    sign, better = (-1, "more") if goal == "maximize" else (1, "less")
    found = "value" if early.strict else "best value"
    return (
        f"its {found} {sign * value:.4g} is not among the best 1/{early.eta:g} of {len(there)} trials at report {bracket} of "
        f"the metric: those have {sign * bound:.4g} or {better}"
    )


def _ranked(values: Sequence[float], goal: Goal) -> list[float]:
    """Values so that the least is the best."""
    sign = -1 if goal == "maximize" else 1
    return [sign * each if math.isfinite(each) else math.inf for each in values]
