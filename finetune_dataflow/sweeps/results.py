"""What a sweep ends with: its trials, the table of them, and how much of their order each parameter explains."""

from __future__ import annotations

import json
import math
import textwrap
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from finetune_dataflow.engine.colors import plain_text

STATES = {"complete": "complete", "stopped": "stopped early", "running": "running", "failed": "failed"}  # in a table's order
WIDTH, BETWEEN = 80, 2
MOST_OF_A_VALUE = 24  # columns of a terminal
MOST_OF_A_NAME = 40
FEWEST_TRIALS = 10  # below, chance explains as much of an order as parameters do
FEWEST_GROUPS, MOST_GROUPS = 3, 8
DRAWS = 4000
LEVEL = 0.05  # a p-value below it is called more than chance

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class TrialResult:
    """What came of a trial, on the training and validation sets alone.

    state: complete, stopped (by early termination), failed or running. value: the sweep's metric; of a stopped trial the best
    that it reached. metrics: the others by name. curve: (update, validation loss in nats). seconds: how long it took.
    """

    number: int
    state: str
    parameters: dict[str, Any]
    value: float | None
    metrics: dict[str, float]
    curve: tuple[tuple[int, float], ...]
    seconds: float
    error: str | None
    directory: str


@dataclass(frozen=True)
class SweepResult:
    """What came of a sweep.

    goal: minimize or maximize. parameters: their names in the file's order. best: the number of the best complete trial.
    best_metrics: what metrics.json says of the run that was promoted, hold-out included; None where none was.
    """

    name: str
    file: str
    method: str
    metric: str
    goal: str
    parameters: tuple[str, ...]
    trials: tuple[TrialResult, ...]
    best: int | None
    best_metrics: dict[str, Any] | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Importance:
    """How much of the trials' order by the metric a parameter explains, 0 to 1, and how likely chance explains as much.

    correlation: Spearman's, of the parameter with the metric; None where the parameter is not a number in every trial.
    """

    share: float
    p_value: float
    correlation: float | None

    @property
    def clear(self) -> bool:
        """Whether it is more than chance."""
        return self.p_value < LEVEL


def ordered(result: SweepResult) -> list[TrialResult]:
    """The trials, best first: complete ones, then stopped, running and failed ones; equal ones by their numbers."""
    sign, states = -1 if result.goal == "maximize" else 1, list(STATES)

    def place(trial: TrialResult) -> tuple[int, bool, float, bool, int]:
        bad = trial.value is None or not math.isfinite(trial.value)
        value = 0.0 if trial.value is None or bad else sign * trial.value
        return states.index(trial.state), bad, value, trial.number != result.best, trial.number

    return sorted(result.trials, key=place)


def complete(result: SweepResult) -> dict[int, float]:
    """The values of the complete trials by number, best first; without those that are not finite."""
    found = {each.number: each.value for each in ordered(result) if each.state == "complete"}
    return {number: value for number, value in found.items() if value is not None and math.isfinite(value)}


def all_parameters(result: SweepResult) -> list[str]:
    """The names of all parameters, in the file's order."""
    return list(dict.fromkeys([*result.parameters, *(name for each in result.trials for name in each.parameters)]))


def varying(result: SweepResult) -> list[str]:
    """The names of the parameters that are not the same in all trials."""
    found = {name: {_key(each.parameters, name) for each in result.trials} for name in all_parameters(result)}
    return [name for name, keys in found.items() if len(keys) > 1]


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a parameter's value is a number, which true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def said(value: object) -> str:
    """A parameter's value as people write it, safe to print, in one line; of a float four digits."""
    if isinstance(value, float):
        whole = value.is_integer() and abs(value) < 1e6
        return f"{value:.0f}" if whole else f"{value:.4g}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
    return one_line(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))


def said_value(value: float | None) -> str:
    """A metric's value, a dash for none."""
    return "-" if value is None else f"{value:.4f}" if abs(value) < 1000 else f"{value:.6g}"


def one_line(text: str) -> str:
    r"""`text` safe to print, in one line: a line feed stands as `\n`."""
    return plain_text(text).replace("\n", r"\n").replace("\t", r"\t")


def counted_states(result: SweepResult) -> str:
    """How many trials there are, and what came of them: "3 trials: 2 complete, 1 failed"."""
    counts = Counter(each.state for each in result.trials)
    parts = ", ".join(f"{counts[state]:,} {said}" for state, said in STATES.items() if counts[state])
    return f"{len(result.trials):,} trial{'s' if len(result.trials) != 1 else ''}: {parts}"


def better(result: SweepResult) -> str:
    """Which values of the metric are better: "lower is better"."""
    return "higher is better" if result.goal == "maximize" else "lower is better"


def table(result: SweepResult, width: int = WIDTH) -> list[str]:
    """The trials for a terminal, best first, failed ones last with their errors; what is too wide goes on below."""
    name, metric = (_cut(one_line(each), MOST_OF_A_NAME) for each in (result.name, result.metric))
    if not result.trials:
        return _wrapped(f"The sweep {name} has no trials.", width)
    lines = _wrapped(f"Sweep {name}, {counted_states(result)}. By {metric}, {better(result)}.", width)
    trials, names = ordered(result), varying(result)
    columns = [
        _Column("state", ["best" if each.number == result.best else each.state for each in trials], False),
        _Column(metric, [said_value(each.value) for each in trials], True),
        *(_parameter(trials, each) for each in names),
        _Column("seconds", [f"{each.seconds:.1f}" for each in trials], True),
    ]
    numbers = _Column("trial", [str(each.number) for each in trials], True)
    for block in _blocks(columns, width - numbers.width):
        lines += ["", "  ".join([numbers.heading, *(each.heading for each in block)]).rstrip()]
        for place, trial in enumerate(trials):
            lines.append("  ".join([numbers.cell(place), *(each.cell(place) for each in block)]).rstrip())
            if trial.error and block[0] is columns[0]:
                indent = " " * (numbers.width + BETWEEN)
                lines.append(indent + _start(one_line(trial.error), width - len(indent)))
    if fixed := [each for each in all_parameters(result) if each not in names]:
        same = ", ".join(f"{one_line(each)}={said(trials[0].parameters.get(each))}" for each in fixed)
        lines += ["", *_wrapped(f"The same in all: {_start(same, 10 * width)}", width)]
    return lines + [line for note in result.notes for line in ("", *_wrapped(one_line(note), width))]


def importances(result: SweepResult) -> dict[str, float]:
    """How much of the trials' order by the metric each parameter explains by itself, 0 to 1, the largest first.

    Empty where that cannot be told; `importance_note` says why. See `measured` for the method.
    """
    return {name: each.share for name, each in measured(result).items()}


def measured(result: SweepResult) -> dict[str, Importance]:
    """The importance of each varying parameter, the largest first; empty where `importance_note` says why.

    The share is Kelley's unbiased correlation ratio on the ranks of the complete trials, so that one trial that diverged
    counts as the last and no more: Kelley, T. L. 1935. An unbiased correlation ratio measure. PNAS 21; on ranks, as in
    Kruskal and Wallis 1952. Trials are grouped by the parameter's value; of a number of many values, they are parted in as
    many groups of one size as the square root of their number. The p-value is that of a permutation test with a seed of its
    own. Shares need not add up to 1, so that where nothing matters, nothing seems to: Optuna's PED-ANOVA asks what sets the
    best tenth apart, and shares out 1 whatever there is.
    """
    if _nothing_to_explain(result):
        return {}
    values, trials = complete(result), {each.number: each for each in result.trials}
    ranks = _ranks([values[each] for each in sorted(values)])
    shuffled = np.random.default_rng(0).permuted(np.tile(ranks, (DRAWS, 1)), axis=1)
    told = [trials[each].parameters for each in sorted(values)]
    found = {name: _importance([each.get(name) for each in told], ranks, shuffled) for name in _differing(told)}
    return dict(sorted(found.items(), key=lambda each: -each[1].share))


def importance_note(result: SweepResult) -> str:
    """What the importances are and are not, or why there are none."""
    if why := _nothing_to_explain(result):
        return why
    trials, metric = len(complete(result)), _cut(one_line(result.metric), MOST_OF_A_NAME)
    return (
        f"How much of the order of {trials:,} complete trials by {metric} each parameter explains by itself: 100 % where trials "
        "with like values of it stand together, 0 % where they stand as if shuffled. It is of the values that were tried, not of "
        "others; what two parameters do only together is in neither; and where the search moved towards good values, parameters "
        "that moved together share one effect."
    )


def _nothing_to_explain(result: SweepResult) -> str:
    values, trials = complete(result), {each.number: each for each in result.trials}
    metric = _cut(one_line(result.metric), MOST_OF_A_NAME)
    if len(values) < FEWEST_TRIALS:
        counted = f"{len(values)} complete trial{' is' if len(values) == 1 else 's are'}"
        return f"{counted} too few to tell which parameters matter; at least {FEWEST_TRIALS} are needed."
    if len({*values.values()}) == 1:
        return f"Every complete trial has the same {metric}, so there is nothing to explain."
    if not _differing([trials[each].parameters for each in values]):
        return "No parameter differs between the complete trials."
    return ""


def _differing(told: Sequence[Mapping[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for each in told for name in each)
    return [name for name in names if len({_key(each, name) for each in told}) > 1]


def _key(parameters: Mapping[str, Any], name: str) -> str | float:
    """What is equal for equal values of a parameter; 1 and 1.0 are, 1 and true are not."""
    if name not in parameters:
        return ""
    value = parameters[name]
    return float(value) if is_number(value) else json.dumps(value, sort_keys=True, default=str)


def _ranks(values: Sequence[float]) -> Floats:
    """The ranks of some values from 1; equal ones have the mean of theirs."""
    _, places, counts = np.unique(np.array(values), return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return ((2 * ends - counts + 1) / 2)[places].astype(np.float64)


def _importance(values: Sequence[object], ranks: Floats, shuffled: Floats) -> Importance:
    """Of one parameter, by its values in the trials that have these ranks; shuffled: the ranks, [draws, trials]."""
    groups = _groups(values)
    members = (groups[:, None] == np.unique(groups)).astype(np.float64)
    trials, kinds = members.shape
    numbers = [float(each) for each in values if is_number(each)]
    correlation = float(np.corrcoef(_ranks(numbers), ranks)[0, 1]) if len(numbers) == trials else None
    if not 1 < kinds < trials:
        return Importance(0.0, 1.0, correlation)
    whole = float(((ranks - ranks.mean()) ** 2).sum())
    between = ((shuffled @ members) ** 2 / members.sum(axis=0)).sum(axis=1) - trials * ranks.mean() ** 2
    found = float(((ranks @ members) ** 2 / members.sum(axis=0)).sum() - trials * ranks.mean() ** 2)
    share = 1 - (1 - found / whole) * (trials - 1) / (trials - kinds)
    as_large = int((between >= found - 1e-9 * whole).sum())
    return Importance(max(share, 0.0), (as_large + 1) / (len(shuffled) + 1), correlation)


def _groups(values: Sequence[object]) -> NDArray[np.int64]:
    """A number for the group of each value: one for each value, or for each part of the order of many numbers."""
    numbers = np.array([float(each) if is_number(each) else math.nan for each in values])
    numeric = np.isfinite(numbers)
    parts = min(max(math.isqrt(len(values)), FEWEST_GROUPS), MOST_GROUPS)
    others = [each for each, is_one in zip(values, numeric, strict=True) if not is_one]
    if len(np.unique(numbers[numeric])) > parts + 1 and all(each is None for each in others):
        found = np.full(len(values), -1, np.int64)
        found[numeric] = np.floor(parts * (_ranks(numbers[numeric].tolist()) - 0.5) / numeric.sum())
        return found
    keys = [_key({"": each}, "") for each in values]
    known = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    return np.array([known[key] for key in keys], np.int64)


@dataclass(frozen=True)
class _Column:
    head: str
    cells: list[str]
    right: bool

    @property
    def width(self) -> int:
        return max(map(_width, [self.head, *self.cells]))

    @property
    def heading(self) -> str:
        return self._padded(self.head)

    def cell(self, place: int) -> str:
        return self._padded(self.cells[place])

    def _padded(self, text: str) -> str:
        room = " " * (self.width - _width(text))
        return room + text if self.right else text + room


def _parameter(trials: Sequence[TrialResult], name: str) -> _Column:
    values = [each.parameters.get(name, "-") for each in trials]
    cells = [_cut(said(each), MOST_OF_A_VALUE) for each in values]
    return _Column(_cut(one_line(name), MOST_OF_A_NAME), cells, all(is_number(each) or each == "-" for each in values))


def _blocks(columns: Sequence[_Column], room: int) -> Iterator[list[_Column]]:
    """Neighbouring columns that fit into the room together, one at least."""
    block: list[_Column] = []
    used = 0
    for column in columns:
        if block and used + BETWEEN + column.width > room:
            yield block
            block, used = [], 0
        block.append(column)
        used += BETWEEN + column.width
    yield block


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_on_hyphens=False)


def _width(text: str) -> int:
    """How many columns of a terminal a text takes."""
    return sum(2 if unicodedata.east_asian_width(each) in "WF" else not unicodedata.combining(each) for each in text)


def _start(text: str, width: int) -> str:
    """A text, or as much of its start as is not wider, with a sign that it goes on."""
    if _width(text) <= width:
        return text
    used = place = 0
    while used + _width(text[place]) <= width - 1:
        used += _width(text[place])
        place += 1
    return f"{text[:place]}…"


def _cut(text: str, width: int) -> str:
    """A text without its middle where it is too wide."""
    if _width(text) <= width:
        return text
    return f"{_start(text, width // 2)}{_start(text[::-1], width - width // 2)[-2::-1]}"
