"""A sweep file of Weights & Biases: read whole, checked whole, and every problem told at once.

Keys and meanings are those of https://docs.wandb.ai/models/sweeps/sweep-config-keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from finetune_dataflow.cli.yaml_config import read_config, shown
from finetune_dataflow.errors import UserError, nearest
from finetune_dataflow.sweeps.distributions import Number, Parameter
from finetune_dataflow.sweeps.parameters import Findings, ParameterReader, listed

Goal = Literal["minimize", "maximize"]

METHODS = ("grid", "random", "bayes")
USUAL_METRIC = "validation_loss"
TEXTS = ("name", "description", "project", "entity")
USED = ("method", "metric", "parameters", "early_terminate", "run_cap", *TEXTS)
UNUSED = ("apiVersion", "command", "controller", "image_uri", "job", "kind", "program", "scheduler")
METRIC_KEYS = ("name", "goal", "target", "impute", "impute_while_running")
EARLY_KEYS = ("type", "min_iter", "max_iter", "s", "eta", "strict")
ELSEWHERE = {
    "metrics": "several metrics need W&B's method custom. Give one, as metric.",
    "seed": "a sweep draws with the seed of its runs. Give --seed on the command line.",
    "sweep_configuration": "what stands below it is a sweep file of its own; the other keys are a file for -c.",
}
# What other tools call our metrics, by the letters of their names.
OTHER_METRICS = {
    **dict.fromkeys(("loss", "valloss", "validloss", "evalloss", "devloss"), "validation_loss"),
    **dict.fromkeys(("trainloss", "trainingloss"), "train_loss"),
    **dict.fromkeys(("perplexity", "ppl", "valperplexity", "valppl", "evalperplexity"), "validation_perplexity"),
    **dict.fromkeys(("rouge", "rougel", "evalrougel"), "rougeL"),
}


@dataclass(frozen=True)
class Metric:
    """What trials are judged by. goal: minimize or maximize; target: a value after which no further trial begins."""

    name: str
    goal: Goal
    target: Number | None = None


@dataclass(frozen=True)
class EarlyTermination:
    """When a trial is stopped: at brackets from min_iter on, or at s brackets down from max_iter. The other is None."""

    type: str
    min_iter: int | None = None
    max_iter: int | None = None
    s: int | None = None
    eta: float = 3.0
    strict: bool = False


@dataclass(frozen=True)
class SweepFile:
    """A sweep as its file describes it. parameters: in W&B's order, by name. notices: what to tell before the first trial."""

    path: Path
    method: str
    metric: Metric
    parameters: tuple[Parameter, ...]
    early_terminate: EarlyTermination | None = None
    run_cap: int | None = None
    name: str | None = None
    description: str | None = None
    project: str | None = None
    entity: str | None = None
    notices: tuple[str, ...] = ()


def read_sweep(path: Path, names: Callable[[str], str | None], known: Sequence[str], metrics: Sequence[str]) -> SweepFile:
    """The sweep in a file. names: the input that a spelling means, None where there is none; known: the spellings there are.

    Raises one UserError with a line for every problem, each naming the file, the key, what was found and what is expected.
    """
    found = read_config(str(path)).values
    told = Findings(str(path))
    told.check_keys(found, "", (*USED, *UNUSED), ELSEWHERE)
    method = _method(found.get("method"), told)
    early = _early_termination(found.get("early_terminate"), told)
    metric = _metric(found.get("metric"), _chooser(found), metrics, told)
    parameters = ParameterReader(names, known, method, told).read(found.get("parameters"))
    run_cap = told.whole(found.get("run_cap"), "run_cap")
    texts = {key: _text(found.get(key), key, told) for key in TEXTS}
    unused = [key for key in UNUSED if key in found]
    if unused:
        told.notice(f"{listed(unused)}: not used, because every trial is a run of this command.")
    if told.problems or method is None or metric is None:
        raise UserError("\n".join(told.problems))
    return SweepFile(path, method, metric, tuple(parameters), early, run_cap, **texts, notices=tuple(told.notices))


def _method(found: Any, told: Findings) -> str | None:
    if isinstance(found, str) and found in METHODS:
        return found
    place = "method is missing" if found is None else f"method={shown(found)}"
    told.problem(f"{place}: expected grid, random or bayes.{nearest(str(found), METHODS)}")
    return None


def _text(found: Any, place: str, told: Findings) -> str | None:
    if found is None or isinstance(found, str):
        return found
    told.problem(f"{place}={shown(found)}: expected a text, in quotes where it looks like something else.")
    return None


def _chooser(found: dict[str, Any]) -> str:
    """What in a file chooses by a metric; nothing where the metric only names the best trial at the end."""
    if found.get("method") == "bayes":
        return "method bayes"
    return "early_terminate" if found.get("early_terminate") is not None else ""


def _metric(found: Any, chooser: str, metrics: Sequence[str], told: Findings) -> Metric | None:
    """The metric; the validation loss where none is given and nothing chooses by it."""
    if found is None and not chooser:
        told.notice(f"metric is not given: trials are judged by {USUAL_METRIC}.")
        return Metric(USUAL_METRIC, "minimize")
    if not isinstance(found, dict):
        place = f"metric is missing, and {chooser} needs it" if found is None else f"metric={shown(found)}"
        told.problem(f"{place}: expected a mapping, as {{name: validation_loss, goal: minimize}}.")
        return None
    before = len(told.problems)
    told.check_keys(found, "metric.", METRIC_KEYS, {})
    name, goal = found.get("name"), found.get("goal")
    if name is None or name not in metrics:
        place = "metric.name is missing" if name is None else f"metric.name={shown(name)}"
        told.problem(f"{place}: expected one of {listed(metrics)}.{_nearest_metric(name, metrics)}")
    if goal is not None and goal not in get_args(Goal):
        told.problem(f"metric.goal={shown(goal)}: expected minimize or maximize.{nearest(str(goal), get_args(Goal))}")
    target = None if found.get("target") is None else told.number(found["target"], "metric.target")
    for key in ("impute", "impute_while_running"):
        if found.get(key) is not None:
            told.notice(f"metric.{key}: not used, because a trial that fails is left out of the search.")
    if len(told.problems) > before:
        return None
    return Metric(str(name), _goal(str(name), goal, told), target)


def _nearest_metric(name: Any, metrics: Sequence[str]) -> str:
    other = OTHER_METRICS.get("".join(each for each in str(name).lower() if each.isalnum()))
    return f" Did you mean {other!r}?" if other in metrics else nearest(str(name), metrics)


def _goal(name: str, goal: Goal | None, told: Findings) -> Goal:
    """The goal. W&B minimizes where none is given; with a ROUGE score that is a problem, because the worst trial would win."""
    better: Goal = "maximize" if name.startswith("rouge") else "minimize"
    if goal is None and better == "maximize":
        told.problem(f"metric.goal is missing: W&B minimizes then, and the worst {name} would win. Expected maximize.")
    elif (goal or "minimize") != better:
        told.notice(f"metric.goal={goal}: the worst {name} wins; the best would with {better}.")
    return goal or "minimize"


def _early_termination(found: Any, told: Findings) -> EarlyTermination | None:
    if found is None:
        return None
    if not isinstance(found, dict):
        told.problem(f"early_terminate={shown(found)}: expected a mapping, as {{type: hyperband, min_iter: 3}}.")
        return None
    before = len(told.problems)
    told.check_keys(found, "early_terminate.", EARLY_KEYS, {})
    kind, strict, eta = found.get("type"), found.get("strict", False), found.get("eta", 3)
    if kind != "hyperband":
        place = "early_terminate.type is missing" if kind is None else f"early_terminate.type={shown(kind)}"
        told.problem(f"{place}: expected hyperband.")
    first, last, count = (told.whole(found.get(key), f"early_terminate.{key}") for key in ("min_iter", "max_iter", "s"))
    factor = told.number(eta, "early_terminate.eta")
    if factor is not None and factor <= 1:
        told.problem(f"early_terminate.eta={shown(eta)}: expected a number above 1.")
    if not isinstance(strict, bool):
        told.problem(f"early_terminate.strict={shown(strict)}: expected true or false.")
    if len(told.problems) > before or factor is None:
        return None
    return _scheduled(EarlyTermination("hyperband", first, last, count, float(factor), bool(strict)), told)


def _scheduled(early: EarlyTermination, told: Findings) -> EarlyTermination | None:
    """The early termination with one of its two schedules. As with W&B, max_iter goes before min_iter."""
    first, last, count, eta = early.min_iter, early.max_iter, early.s, early.eta
    if last is not None and count is not None:
        if last < eta:
            told.problem(f"early_terminate.max_iter={last}: with eta={eta:g} expected {math.ceil(eta)} or more.")
        if first is not None:
            told.notice("early_terminate.min_iter: not used beside max_iter and s.")
        return EarlyTermination(early.type, None, last, count, eta, early.strict)
    if first is not None:
        if last is not None or count is not None:
            told.notice(f"early_terminate.{'max_iter' if count is None else 's'}: not used, because max_iter and s go together.")
        return EarlyTermination(early.type, first, None, None, eta, early.strict)
    told.problem(
        "early_terminate: expected min_iter, or max_iter and s."
        if last is None
        else "early_terminate.s is missing: expected the number of brackets, which max_iter needs."
    )
    return None
