"""The page of a sweep: which trial is best, what made the difference, how each trial went. One HTML file, as a report is."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune_dataflow import __version__
from finetune_dataflow.engine.figure_style import counted, themed_layout
from finetune_dataflow.engine.page import Block, Cell, Chart, Code, Kind, Page, Prose, Section, Table, Value, html
from finetune_dataflow.sweeps import figures, results
from finetune_dataflow.sweeps.results import SweepResult, TrialResult

MOST_ROWS = 1000  # trials in the page's table
MOST_OF_A_NAME, MOST_OF_A_VALUE, MOST_OF_AN_ERROR, MOST_OF_A_VERDICT = 100, 300, 2000, 600  # characters
MOST_WARNINGS = 12
VALIDATION_METRICS = (
    "train_loss", "validation_loss", "validation_perplexity", "rouge1", "rouge2", "rougeL", "rougeLsum",
)  # fmt: skip


def sweep_page(result: SweepResult, logarithmic: frozenset[str] = frozenset(), best_directory: str = "") -> str:
    """The text of the page.

    logarithmic: the parameters that stand on a logarithmic axis. best_directory: where the promoted run is; without it, the
    command that trains the best trial again takes the trial's own config.yaml.
    """
    made = page(result, logarithmic, best_directory)
    return html(made, themed_layout(dark=False), themed_layout(dark=True))


def page(result: SweepResult, logarithmic: frozenset[str] = frozenset(), best_directory: str = "") -> Page:
    """What the page says: `sweep_page` for the arguments."""
    best = next((each for each in result.trials if each.number == result.best), None)
    sections = [
        _best(result, best, best_directory) if best else None,
        _hold_out(result),
        _parameters(result, logarithmic) if results.complete(result) else None,
        _search(result) if any(each.curve or each.value is not None for each in result.trials) else None,
        _trials(result) if result.trials else None,
        _sweep(result),
    ]
    return Page(
        title=f"Sweep {_short(result.name)}",
        headline=_headline(result, best),
        notes=_warnings(result, best),
        facts=_facts(result),
        sections=[each for each in sections if each is not None],
        footer=f"Made by finetune-dataflow {__version__} (Apache-2.0).",
    )


def _short(text: str, most: int = MOST_OF_A_NAME) -> str:
    line = results.one_line(text)
    return line if len(line) <= most else f"{line[: most - 1]}…"


def _headline(result: SweepResult, best: TrialResult | None) -> str:
    metric, values = _short(result.metric), results.complete(result)
    if not result.trials:
        return "The sweep has no trials."
    if best is None:
        return f"No trial is complete: {results.counted_states(result)}."
    shown = results.said_value(best.value)
    if len(values) == 1:
        return f"Trial {best.number} is the only one that is complete: its {metric} is {shown}."
    which = "highest" if result.goal == "maximize" else "lowest"
    equal = sum(value == best.value for value in values.values()) - 1
    if equal == len(values) - 1:
        return f"No trial is better than another: the {metric} of all {len(values):,} that are complete is {shown}."
    also = f", as {equal:,} other{'s have' if equal > 1 else ' has'}" if equal else ""
    return f"Trial {best.number} has the {which} {metric} of {len(values):,} complete trials{also}: {shown}."


def _warnings(result: SweepResult, best: TrialResult | None) -> list[str]:
    """What must not be overlooked: the luck of the best, trials that failed or did not end."""
    found, complete = [], len(results.complete(result))
    if best is not None and complete > 1:
        judged = (
            "The hold-out, on which only this trial's run was scored, tells what it is worth."
            if result.best_metrics is not None
            else "What it is worth is told by the hold-out, on which no run of this sweep has been scored."
        )
        found.append(
            f"Trial {best.number} was chosen as the best of {complete:,} on the validation set, so it looks better there than it "
            f"is: the more trials, the more of its lead is luck. {judged}"
        )
    failed = [each for each in result.trials if each.state == "failed"]
    if failed:
        found.append(f"{counted(len(failed), 'trial')} failed; the table of all trials says why.")
    return [*found, *(_short(each, MOST_OF_A_VERDICT) for each in result.notes[:MOST_WARNINGS])]


def _facts(result: SweepResult) -> list[tuple[str, str]]:
    counts = Counter(each.state for each in result.trials)
    tiles = [("trials", f"{len(result.trials):,}")]
    tiles += [(said, f"{counts[state]:,}") for state, said in results.STATES.items() if counts[state]]
    tiles += [(f"metric, {results.better(result)}", _short(result.metric, 40)), ("method", _short(result.method, 40))]
    return [*tiles, ("time of all trials", said_time(sum(each.seconds for each in result.trials)))]


def said_time(seconds: float) -> str:
    """A duration for people: "4.2 s", "3 min 20 s", "2 h 05 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60:,} h {minutes % 60:02} min"


def _best(result: SweepResult, best: TrialResult, best_directory: str) -> Section:
    config = Path(best_directory or best.directory) / "config.yaml"
    again = f"python run.py train -c {_word(str(config))} --out ANOTHER_DIRECTORY"
    words = " ".join(f"--set {_word(f'{name}={_option(value)}')}" for name, value in best.parameters.items())
    rows = [[_short(name), *_parameter(result, name, best)] for name in best.parameters]
    blocks: list[Block] = [
        Code(again, "The command that trains it again, with every setting as it was."),
        Code(words, "What the sweep chose, as options for another command: another model, other data."),
        Table(("parameter", f"trial {best.number}", "tried"), rows, "What the sweep chose, and what it chose from."),
    ]
    intro = f"Trial {best.number}, by {_short(result.metric)} on the validation set: {results.said_value(best.value)}."
    return Section(f"The best trial: {best.number}", blocks if best.parameters else blocks[:1], intro)


def _word(text: str) -> str:
    """A text as a word of a command line, in one line."""
    return shlex.quote(results.one_line(text))


def _option(value: object) -> str:
    """A parameter's value as an option takes it."""
    return value if isinstance(value, str) else repr(value) if isinstance(value, float) else json.dumps(value, default=str)


def _parameter(result: SweepResult, name: str, best: TrialResult) -> list[Value]:
    """The value of the best trial, and the values of all."""
    values = [each.parameters[name] for each in result.trials if name in each.parameters]
    distinct = list(dict.fromkeys(results.said(each) for each in values))
    if len(distinct) > 6 and all(map(results.is_number, values)):
        tried = f"{len(distinct):,} values from {results.said(min(values))} to {results.said(max(values))}"
    else:
        tried = ", ".join(_short(each, 40) for each in distinct[:6]) + (f", … ({len(distinct):,})" if len(distinct) > 6 else "")
    return [_short(results.said(best.parameters[name]), MOST_OF_A_VALUE), tried]


def _hold_out(result: SweepResult) -> Section | None:
    """The verdict on the run that was promoted, and its scores."""
    found = result.best_metrics
    if found is None or result.best is None:
        return None
    blocks: list[Block] = [Prose(_short(str(found.get("verdict", "Its metrics.json has no verdict.")), MOST_OF_A_VERDICT))]
    if {"base", "finetuned", "difference"} <= found.keys():
        told = f"Scores of trial {result.best} and of the base model on the hold-out, which no choice was made on."
        blocks.append(Table(("score", "base", "tuned", "difference", "95 % interval"), _scores(found), told))
    intro = "The one look at rows that neither a fit nor the choice among the trials has seen. Only the best trial has it."
    return Section("The best trial on the hold-out", blocks, intro)


def _scores(metrics: Mapping[str, Any]) -> list[list[Value]]:
    from finetune_dataflow.engine.comparison import score_lines

    rows: list[list[Value]] = []
    for label, base, tuned, difference in score_lines(dict(metrics)):
        change = tuned - base if difference is None else difference["mean"]
        interval = None if difference is None else f"{difference['low']:+.3f} to {difference['high']:+.3f}"
        rows.append([label, Cell(f"{base:.3f}", base), Cell(f"{tuned:.3f}", tuned), Cell(f"{change:+.3f}", change), interval])
    return rows


def _parameters(result: SweepResult, logarithmic: frozenset[str]) -> Section:
    metric = _short(result.metric)
    blocks: list[Block] = [
        Chart(
            figures.parallel_figure(result, logarithmic),
            f"Each line is a trial: its settings, and on the last axis its {metric}. Where good lines meet, a setting matters.",
            f"Parallel coordinates: a line for each trial over the parameters that vary, to its {metric}.",
        ),
        Chart(
            figures.importance_figure(result),
            results.importance_note(result),
            f"Bars: how much of the trials' order by {metric} each parameter explains by itself.",
        ),
    ]
    if found := results.measured(result):
        rows: list[list[Value]] = [
            [
                _short(name),
                Cell(f"{each.share:.0%}", each.share),
                Cell(f"{each.p_value:.3f}" if each.p_value >= 0.001 else "< 0.001", each.p_value),
                None if each.correlation is None else Cell(f"{each.correlation:+.2f}".replace("-", "\u2212"), each.correlation),
                _direction(result, each),
            ]
            for name, each in found.items()
        ]
        columns = ("parameter", "explains", "p", "rank correlation", "in words")
        kinds: Sequence[Kind] = ("text", "number", "number", "number", "text")
        blocks.append(Table(columns, rows, "The same in figures; p is that of a permutation test.", kinds))
    return Section("Which settings matter", blocks)


def _direction(result: SweepResult, found: results.Importance) -> str:
    """Which values of a parameter went with a better metric."""
    if not found.clear:
        return "no more than chance"
    if found.correlation is None:
        return "some values were better than others"
    if abs(found.correlation) < 0.4:
        return "best neither low nor high, or in no simple order"
    return "higher was better" if (found.correlation > 0) == (result.goal == "maximize") else "lower was better"


def _search(result: SweepResult) -> Section:
    metric = _short(result.metric)
    blocks: list[Block] = [
        Chart(
            figures.progress_figure(result),
            f"The {metric} of each trial in the order in which they were made, and the best so far.",
            f"Marks: the {metric} of each trial by its number. A line: the best so far.",
        ),
        Chart(
            figures.curves_figure(result),
            "The validation loss of each trial by update. A mark at an end: stopped early, or failed there.",
            "Curves: the validation loss of each trial by update.",
        ),
    ]
    return Section("How the search went", blocks)


def _trials(result: SweepResult) -> Section:
    trials, names = results.ordered(result)[:MOST_ROWS], results.varying(result)
    others = [each for each in VALIDATION_METRICS if each != result.metric and any(each in trial.metrics for trial in trials)]
    failed, columns = any(each.error for each in trials), ["trial", "state", _short(result.metric)]
    parents = {str(Path(each.directory).parent) for each in trials}
    elsewhere = len(parents) > 1 or any(Path(each.directory).name != str(each.number) for each in trials)
    kinds: list[Kind] = ["number", "text", "number"]
    rows: list[list[Value]] = [[*_head(result, each)] for each in trials]
    for name in names:
        numeric = all(results.is_number(each.parameters[name]) for each in trials if name in each.parameters)
        columns.append(_short(name))
        kinds.append("number" if numeric else "text")
        for row, trial in zip(rows, trials, strict=True):
            row.append(_setting(trial, name, numeric))
    for name in others:
        columns.append(name)
        kinds.append("number")
        for row, trial in zip(rows, trials, strict=True):
            value = trial.metrics.get(name)
            row.append(None if value is None else Cell(results.said_value(value), value))
    columns += ["updates", "seconds", *(["directory"] if elsewhere else []), *(["error"] if failed else [])]
    kinds += ["number", "number"]
    kinds += ["text"] * (len(columns) - len(kinds))
    for row, trial in zip(rows, trials, strict=True):
        error = [_cut(trial.error, MOST_OF_AN_ERROR) if trial.error else None] if failed else []
        updates = float(trial.curve[-1][0]) if trial.curve else None
        place = [_short(trial.directory, MOST_OF_A_VALUE)] if elsewhere else []
        row += [updates, Cell(f"{trial.seconds:.1f}", trial.seconds), *place, *error]
    told = "The best first. Scores are those on the training and validation sets."
    if len(parents) == 1 and not elsewhere:
        told += f" The run of trial N is in {_short(str(Path(parents.pop()) / 'N'), MOST_OF_A_VALUE)}."
    if len(trials) < len(result.trials):
        told += f" The first {len(trials):,} of {len(result.trials):,}; the trial.json in each trial's directory has all."
    intro = "Parameters that are the same in all trials are in the next section."
    return Section("All trials", [Table(columns, rows, told, kinds, searchable=len(rows) > 10)], intro)


def _head(result: SweepResult, trial: TrialResult) -> list[Value]:
    best = " (best)" if trial.number == result.best else ""
    value = Cell(results.said_value(trial.value), trial.value)
    return [Cell(f"{trial.number}{best}", trial.number), results.STATES[trial.state], value]


def _setting(trial: TrialResult, name: str, numeric: bool) -> Value:
    if name not in trial.parameters:
        return None
    value = trial.parameters[name]
    text = _short(results.said(value), MOST_OF_A_VALUE)
    return Cell(text, float(value)) if numeric else text


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _sweep(result: SweepResult) -> Section:
    varying = {*results.varying(result)}
    fixed = [each for each in results.all_parameters(result) if each not in varying]
    rows = [
        [_short(name), _short(results.said(each.parameters[name]), MOST_OF_A_VALUE)]
        for name in fixed
        for each in result.trials[:1]
        if name in each.parameters
    ]
    facts = [
        ("file", _short(result.file, MOST_OF_A_VALUE)),
        ("method", _short(result.method)),
        ("metric", _short(result.metric)),
        ("goal", _short(result.goal)),
    ]
    blocks: list[Block] = [Table(("the sweep's", "value"), [[name, value] for name, value in facts], sortable=False)]
    if rows:
        blocks.append(Table(("parameter", "value"), rows, "The same in all trials."))
    return Section("The sweep", blocks, collapsed=True)
