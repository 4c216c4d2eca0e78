"""The figures of a sweep: parallel coordinates, importance, metric by trial, curves.

Each tells its kinds of trials apart by width, dash or mark, too, not by colour alone, and says what it leaves out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import plotly.graph_objects as go

from finetune_dataflow.engine import figure_style as style
from finetune_dataflow.engine.figure_style import blank, counted, figure_text, framed, rounded, short_name
from finetune_dataflow.engine.figures import NATS
from finetune_dataflow.sweeps import results
from finetune_dataflow.sweeps.results import SweepResult, TrialResult

MOST_AXES = 6  # parameters in parallel coordinates; more cannot be told apart on a telephone
MOST_BARS = 12
MOST_LINES = 300  # trials drawn in one figure
MOST_CURVE_POINTS = 8000  # of all curves together
TICK_ROOM = 0.085  # of an axis, between two of its labels
TICK_LENGTH = 10  # characters
LINE_HEIGHT, AXIS_HEIGHT = 15, 300  # pixels
FENCES = 3.0  # interquartile ranges beyond the quartile, as Tukey's outer fences

LOOKS: Mapping[str, Mapping[str, Any]] = {
    "failed": {"color": style.OCHRE, "width": 1.2, "dash": "dashdot", "symbol": "x"},
    "stopped": {"color": style.PURPLE, "width": 1.4, "dash": "dot", "symbol": "triangle-down-open"},
    "running": {"color": style.GREEN, "width": 1.2, "dash": "dashdot", "symbol": "circle-open"},
    "other": {"color": style.GREY, "width": 1.2, "dash": "dash", "symbol": "circle"},
    "good": {"color": style.BLUE, "width": 2, "dash": "solid", "symbol": "square"},
    "best": {"color": style.VERMILION, "width": 4.5, "dash": "solid", "symbol": "star"},
}  # drawn in this order, the best on top


@dataclass(frozen=True)
class _Axis:
    """An axis of parallel coordinates: its name, where each trial stands on it (0 to 1), its labels, and each trial's text."""

    name: str
    places: Mapping[int, float]
    ticks: Sequence[tuple[float, str]]
    texts: Mapping[int, str]


def parallel_figure(
    result: SweepResult, logarithmic: frozenset[str] = frozenset(), title: str = "Settings and what they led to"
) -> go.Figure:
    """Which settings do the good trials share? A line for each trial over the parameters that vary, to the metric.

    logarithmic: the parameters that stand on a logarithmic axis. Trials without a value are left out and counted.
    """
    drawn = [each for each in results.ordered(result) if each.state in ("complete", "stopped") and _finite(each.value)]
    names = results.varying(result)
    if not drawn or not names:
        return blank(title, "No trial has a value yet." if not drawn else "No parameter varies between the trials.")
    shown = _most_telling(result, names)
    told = _left_out(result, len(drawn), "have no value") + _too_many(drawn)
    if len(shown) < len(names):
        told.append(f"{len(shown)} of {len(names)} parameters are drawn, those that explain most.")
    drawn = drawn[:MOST_LINES]
    axes = [_parameter_axis(name, drawn, name in logarithmic) for name in shown]
    metric, beyond = _metric_axis(result, drawn)
    told += beyond
    traces = [_lines(name, kind, trials, [*axes, metric]) for kind, (name, trials) in _kinds(result, drawn).items()]
    return _parallel(traces, [*axes, metric], title, [f"{_sentence(results.better(result))} on the last axis.", *told])


def importance_figure(result: SweepResult, title: str = "What each parameter explains") -> go.Figure:
    """Which parameters matter? How much of the trials' order by the metric each explains by itself."""
    found = results.measured(result)
    if not found:
        return blank(title, results.importance_note(result))
    names = list(found)[:MOST_BARS]
    looks = (("more than chance", True, style.BLUE, None), ("no more than chance", False, style.PALE, style.HATCHED))
    traces = []
    for kind, clear, color, pattern in looks:
        of_kind = {name: len(names) - 1 - place for place, name in enumerate(names) if found[name].clear == clear}
        if of_kind:
            trace = _importance_bars({name: found[name] for name in of_kind}, list(of_kind.values()))
            traces.append(trace.update(name=kind, marker={"color": color, "line": {"width": 0}, "pattern": pattern}))
    longest = max(found[name].share for name in names) or 1.0
    height, layout = style.row_panels([("", [short_name(each, 40) for each in names])], 40, [(0, longest)])
    layout["xaxis"] |= {"range": [0, 1.25 * longest], "showticklabels": False, "showgrid": False, "fixedrange": True}
    told = ["Share of the trials' order that a parameter explains by itself."]
    told += [f"The first {MOST_BARS} of {len(found)}."] if len(found) > MOST_BARS else []
    return framed(traces, title, told, height, hovermode="closest", **layout)


def curves_figure(result: SweepResult, title: str = "Validation loss of every trial") -> go.Figure:
    """How did the trials learn? Each one's validation loss by update, with a mark where one ended before its time."""
    with_curve = [each for each in results.ordered(result) if any(math.isfinite(loss) for _, loss in each.curve)]
    if not with_curve:
        return blank(title, "No trial has a validation loss yet.")
    drawn = with_curve[:MOST_LINES]
    limit = max(8, MOST_CURVE_POINTS // len(drawn))
    traces: list[go.Scatter] = []
    for kind, (name, trials) in _kinds(result, drawn).items():
        traces += _curve_traces(name, kind, trials, limit)
    points = [loss for each in drawn for _, loss in each.curve if math.isfinite(loss)]
    firsts = [next(loss for _, loss in each.curve if math.isfinite(loss)) for each in drawn]
    low, high = min(points), max(_fence(points), _fence(firsts))
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    told = _left_out(result, len(with_curve), "have no curve") + _too_many(with_curve)
    if max(points) > high:
        told.append(f"Losses above {high:.3g} are beyond the figure.")
    last = max(step for each in drawn for step, _ in each.curve)
    height, layout = style.shared_panels([(f"validation loss, {NATS}", 300)])
    layout["xaxis"] |= {"title": {"text": "update"}, "range": [-0.02 * last, 1.03 * last], "tickformat": ",d", "nticks": 7}
    layout["yaxis"] |= {"range": rounded([low - room, high + room])}
    return framed(traces, title, told, height, hovermode="closest", legend_traceorder="reversed", **layout)


def progress_figure(result: SweepResult, title: str = "") -> go.Figure:
    """Did the search get better? Each trial's metric by its number, and the best so far."""
    title = title or f"{short_name(result.metric)} by trial"
    drawn = [each for each in results.ordered(result) if each.state in ("complete", "stopped") and _finite(each.value)]
    if not drawn:
        return blank(title, "No trial has a value yet.")
    sign = -1 if result.goal == "maximize" else 1
    edge = sign * _fence([sign * _value(each) for each in drawn])
    kept = drawn[: 4 * MOST_LINES]
    traces = _so_far(result, edge)
    for kind, (name, trials) in _kinds(result, kept, good=False).items():
        traces.append(_marks(name, kind, trials, [sign * min(sign * _value(each), sign * edge) for each in trials]))
    beyond = sum(sign * _value(each) > sign * edge for each in kept)
    told = _left_out(result, len(drawn), "have no value") + _too_many(drawn, len(kept))
    told += [f"At the edge: {counted(beyond, 'trial')} beyond {results.said_value(edge)}."] if beyond else []
    first, last = min(each.number for each in kept), max(each.number for each in kept)
    room = 0.03 * (last - first) or 1.0
    height, layout = style.shared_panels([(f"{figure_text(short_name(result.metric))}, {results.better(result)}", 260)])
    ticks: dict[str, Any] = {"dtick": 1} if last - first <= 8 else {"nticks": 8}
    layout["xaxis"] |= {"title": {"text": "trial"}, "range": [first - room, last + room], "tickformat": ",d", **ticks}
    return framed(traces, title, told, height, hovermode="closest", **layout)


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _value(trial: TrialResult) -> float:
    """The value of a trial that has one."""
    assert trial.value is not None
    return trial.value


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _left_out(result: SweepResult, drawn: int, why: str) -> list[str]:
    missing = len(result.trials) - drawn
    return (
        [f"{counted(missing, 'trial')} left out, which {why if missing > 1 else why.replace('have', 'has')}."] if missing else []
    )


def _too_many(drawn: Sequence[TrialResult], most: int = MOST_LINES) -> list[str]:
    return [f"The best {most:,} of {len(drawn):,} trials are drawn."] if len(drawn) > most else []


def _most_telling(result: SweepResult, names: Sequence[str]) -> list[str]:
    """As many parameters as can be drawn, those that explain most, in the file's order."""
    if len(names) <= MOST_AXES:
        return list(names)
    first = [*(name for name in results.importances(result) if name in names), *names]
    kept = {*list(dict.fromkeys(first))[:MOST_AXES]}
    return [name for name in names if name in kept]


def _kinds(result: SweepResult, drawn: Sequence[TrialResult], good: bool = True) -> dict[str, tuple[str, list[TrialResult]]]:
    """The trials by how they are drawn, each kind with its name in the legend; the best quarter apart where `good`."""
    values = list(results.complete(result))
    quarter = {*values[: math.ceil(len(values) / 4)]} if good else set[int]()
    kinds: dict[str, list[TrialResult]] = {kind: [] for kind in LOOKS}
    for trial in drawn:
        kind = "other" if trial.state == "complete" else trial.state
        kinds["best" if trial.number == result.best else "good" if trial.number in quarter else kind].append(trial)
    names = {"stopped": "stopped early", "good": "best quarter", "other": "others" if good else "complete"}
    return {
        kind: (f"best: trial {trials[0].number}" if kind == "best" else f"{names.get(kind, kind)} ({len(trials)})", trials)
        for kind, trials in kinds.items()
        if trials
    }


def _fence(values: Sequence[float]) -> float:
    """The highest value that is no outlier by far, so that one trial that diverged does not flatten the others."""
    numbers = np.array(values)
    low, high = np.quantile(numbers, [0.25, 0.75])
    inside = numbers[numbers <= high + FENCES * (high - low)]
    return float(inside.max())


def _parameter_axis(name: str, trials: Sequence[TrialResult], log: bool) -> _Axis:
    values = {each.number: each.parameters[name] for each in trials if name in each.parameters}
    texts = {number: figure_text(short_name(results.said(value), 60)) for number, value in values.items()}
    if values and all(map(results.is_number, values.values())):
        places, ticks = _scale({number: float(value) for number, value in values.items()}, log)
        return _Axis(name, places, ticks, texts)
    labels = sorted({results.said(value) for value in values.values()})
    at = {label: (place / (len(labels) - 1) if len(labels) > 1 else 0.5) for place, label in enumerate(labels)}
    places = {number: at[results.said(value)] for number, value in values.items()}
    ticks = _apart([(place, figure_text(short_name(label, TICK_LENGTH))) for label, place in at.items()])
    return _Axis(name, places, ticks, texts)


def _metric_axis(result: SweepResult, trials: Sequence[TrialResult]) -> tuple[_Axis, list[str]]:
    """The last axis, and what to say of values beyond it."""
    sign = -1 if result.goal == "maximize" else 1
    values = {each.number: _value(each) for each in trials}
    edge = sign * _fence([sign * each for each in values.values()])
    inside = {number: sign * min(sign * value, sign * edge) for number, value in values.items()}
    places, ticks = _scale(inside, log=False)
    beyond = sum(inside[number] != value for number, value in values.items())
    told = [f"At the edge: {counted(beyond, 'trial')} beyond {results.said_value(edge)}."] if beyond else []
    texts = {number: results.said_value(value) for number, value in values.items()}
    return _Axis(result.metric, places, ticks, texts), told


def _scale(values: Mapping[int, float], log: bool) -> tuple[dict[int, float], list[tuple[float, str]]]:
    """Where numbers stand between the least (0) and the largest (1), and an axis's labels."""
    low, high = min(values.values()), max(values.values())
    if low == high:
        return dict.fromkeys(values, 0.5), [(0.5, results.said(low))]
    log = log and low > 0

    def place(value: float) -> float:
        return math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)

    distinct = sorted({*values.values()})
    few = len(distinct) <= 7
    wanted = distinct if few else _round_numbers(low, high, log)
    texts = results.said if few else partial(_short, span=None if log else high - low)
    ticks = [(place(each), figure_text(texts(each))) for each in (low, high, *wanted)]
    return {number: round(place(value), 5) for number, value in values.items()}, _apart(ticks)


def _short(value: float, span: float | None) -> str:
    """A label's number: to a hundredth of the axis's span, or (None, logarithmic) to two digits."""
    return results.said(float(f"{value:.2g}") if span is None else round(value, 1 - math.floor(math.log10(span))))


def _round_numbers(low: float, high: float, log: bool) -> list[float]:
    """Numbers between the two that people count by: tens, then halves and fifths of them."""
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [factor * 10.0**power for factor in (1, 3) for power in decades]
    else:
        step = 10.0 ** math.floor(math.log10(high - low))
        step *= next(part for part in (0.2, 0.5, 1, 2) if (high - low) / (part * step) <= 5)
        found = [each * step for each in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return [each for each in found if low < each < high]


def _apart(ticks: Iterable[tuple[float, str]]) -> list[tuple[float, str]]:
    """Labels with room between them; earlier ones keep their places."""
    kept: list[tuple[float, str]] = []
    for place, text in ticks:
        if all(abs(place - other) >= TICK_ROOM for other, _ in kept):
            kept.append((round(place, 5), text))
    return sorted(kept)


def _lines(name: str, kind: str, trials: Sequence[TrialResult], axes: Sequence[_Axis]) -> go.Scatter:
    """Some trials' lines over all axes, as one trace with gaps between them."""
    look, points = LOOKS[kind], list[tuple[int, float | None, str, str]]()
    for trial in trials:
        for place, axis in enumerate(axes):
            text = f"{figure_text(short_name(axis.name, 40))}: {axis.texts.get(trial.number, 'not set')}"
            points.append((place, axis.places.get(trial.number), str(trial.number), text))
        points.append((len(axes) - 1, None, "", ""))
    return go.Scatter(
        x=[each[0] for each in points],
        y=[each[1] for each in points],
        customdata=[[each[2], each[3]] for each in points],
        name=name,
        mode="lines+markers",
        line={"color": look["color"], "width": look["width"], "dash": look["dash"]},
        marker={"color": look["color"], "symbol": look["symbol"], "size": 11 if kind == "best" else 5},
        opacity=0.65 if kind == "other" and len(trials) > 12 else 1,
        hovertemplate="trial %{customdata[0]}<br>%{customdata[1]}<extra></extra>",
        cliponaxis=False,
    )


def _parallel(traces: Sequence[go.Scatter], axes: Sequence[_Axis], title: str, told: Sequence[str]) -> go.Figure:
    """The lines with their axes: names above, in turn on two levels where there are many, and labels beside."""
    last, levels = len(axes) - 1, 2 if len(axes) > 4 else 1
    names = [_name_lines(axis.name, 13 if len(axes) > 3 else 18) for axis in axes]
    block = LINE_HEIGHT * max(map(len, names)) + 4
    above = block * levels + 12
    labels = [
        {
            "x": place,
            "y": 1,
            "yshift": 10 + block * (place % levels),
            "text": "<br>".join(lines),
            "xanchor": "center" if place else "left",
        }
        for place, lines in enumerate(names)
    ]
    ticks = [(place, at, text) for place, axis in enumerate(axes) for at, text in axis.ticks]
    texts = go.Scatter(
        x=[each[0] for each in ticks],
        y=[each[1] for each in ticks],
        text=[f"\u2009\u2009{each[2]}" for each in ticks],
        mode="text",
        textposition="middle right",
        textfont={"size": 11},
        hoverinfo="skip",
        showlegend=False,
        cliponaxis=False,
    )
    lines = [{"type": "line", "x0": place, "x1": place, "y0": 0, "y1": 1, "layer": "below"} for place in range(len(axes))]
    hidden = {"visible": False, "fixedrange": True}
    return framed(
        [*traces, texts],
        title,
        told,
        AXIS_HEIGHT + above,
        hovermode="closest",
        legend_traceorder="reversed",
        xaxis={**hidden, "range": [-0.03 * max(last, 1), last + 0.14 * last + 0.06]},
        yaxis={**hidden, "range": [-0.04, 1 + above / AXIS_HEIGHT]},
        annotations=[
            {**each, "yanchor": "bottom", "align": "left" if not place else "center"} for place, each in enumerate(labels)
        ],
        shapes=lines,
    )


def _name_lines(name: str, width: int) -> list[str]:
    """A name in lines of at most so many characters, broken after _ . and - where that can be; three at most."""
    parts = re.findall(r"[^_.-]*[_.-]+|[^_.-]+", results.one_line(short_name(name, 3 * width)))
    lines = [""]
    for piece in (part[start : start + width] for part in parts for start in range(0, len(part), width)):
        if len(lines[-1]) + len(piece) > width and lines[-1]:
            lines.append("")
        lines[-1] += piece
    return [figure_text(each) for each in (lines if len(lines) <= 3 else [*lines[:2], f"{lines[2][: width - 1]}…"])]


def _importance_bars(found: Mapping[str, results.Importance], places: Sequence[int]) -> go.Bar:
    told = [
        [
            figure_text(short_name(name, 60)),
            f"p = {each.p_value:.3f}" if each.p_value >= 0.001 else "p < 0.001",
            "" if each.correlation is None else f"<br>rank correlation {each.correlation:+.2f}".replace("-", "\u2212"),
        ]
        for name, each in found.items()
    ]
    return go.Bar(
        x=rounded([each.share for each in found.values()]),
        y=list(places),
        orientation="h",
        width=0.6,
        text=[f"{each.share:.0%}" for each in found.values()],
        textposition="outside",
        cliponaxis=False,
        customdata=told,
        hovertemplate="%{customdata[0]}: %{x:.0%}, %{customdata[1]}%{customdata[2]}<extra>%{fullData.name}</extra>",
    )


def _curve_traces(name: str, kind: str, trials: Sequence[TrialResult], limit: int) -> list[go.Scatter]:
    """Some trials' curves as one trace with gaps, and marks: at the least loss of the best, where others ended early."""
    look, steps, losses, told = LOOKS[kind], list[int | None](), list[float | None](), list[str]()
    marked: list[tuple[int, float, str]] = []
    for trial in trials:
        curve = [(step, loss) for step, loss in trial.curve if math.isfinite(loss)]
        kept = style.thinned(np.array([loss for _, loss in curve]), limit).tolist()
        steps += [*(curve[each][0] for each in kept), None]
        losses += [*rounded([curve[each][1] for each in kept]), None]
        told += [str(trial.number)] * (len(kept) + 1)
        if kind in ("best", "stopped", "failed"):
            marked.append((*(min(curve, key=lambda each: each[1]) if kind == "best" else curve[-1]), str(trial.number)))
    hover = "trial %{customdata}, update %{x:,}: %{y:.4f}<extra></extra>"
    line = go.Scatter(
        x=steps,
        y=losses,
        customdata=told,
        name=name,
        mode="lines+markers" if all(len(each.curve) == 1 for each in trials) else "lines",
        opacity=0.65 if kind == "other" and len(trials) > 12 else 1,
        legendgroup=kind,
        line={"color": look["color"], "width": look["width"], "dash": look["dash"]},
        marker={"color": look["color"], "symbol": look["symbol"]},
        hovertemplate=hover,
    )
    if not marked:
        return [line]
    x, y, numbers = zip(*marked, strict=True)
    marks = go.Scatter(
        x=list(x),
        y=rounded(y),
        customdata=list(numbers),
        name=name,
        mode="markers",
        legendgroup=kind,
        showlegend=False,
        marker={"color": look["color"], "symbol": look["symbol"], "size": 15 if kind == "best" else 9},
        hovertemplate=hover,
    )
    return [line, marks]


def _so_far(result: SweepResult, edge: float) -> list[go.Scatter]:
    """The best value so far, by trial, as steps."""
    values = sorted(results.complete(result).items())
    if len(values) < 2:
        return []
    maximize = result.goal == "maximize"
    best = accumulate((value for _, value in values), max if maximize else min)
    drawn = [max(each, edge) if maximize else min(each, edge) for each in best]
    return [
        go.Scatter(
            x=[number for number, _ in values],
            y=rounded(drawn),
            name="best so far",
            mode="lines",
            line={"color": style.BLUE, "width": 2, "shape": "hv"},
            hovertemplate="best so far: %{y:.4f}<extra></extra>",
        )
    ]


def _marks(name: str, kind: str, trials: Sequence[TrialResult], places: Sequence[float]) -> go.Scatter:
    look = LOOKS[kind]
    return go.Scatter(
        x=[each.number for each in trials],
        y=rounded(places),
        customdata=[results.said_value(each.value) for each in trials],
        name=name,
        mode="markers",
        marker={"color": look["color"], "symbol": look["symbol"], "size": 15 if kind == "best" else 8},
        hovertemplate="trial %{x}: %{customdata}<extra>%{fullData.name}</extra>",
        cliponaxis=False,
    )
