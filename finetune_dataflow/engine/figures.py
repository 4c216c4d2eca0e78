"""The figures of a fit and its evaluation, for a report page and for notebooks.

Each is a plotly figure without a background or a width of its own (`engine.figure_style`), small enough to stand in a page,
and says in words where there was nothing to draw, or more than can be seen.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import ArrayLike, NDArray

from finetune_dataflow.engine import figure_style as style
from finetune_dataflow.engine.figure_style import blank, counted, excerpt, figure_text, framed, rounded, short_name

if TYPE_CHECKING:
    from finetune_dataflow.engine.audit import SetAudit

History = Sequence[Mapping[str, Any]]  # the events of metrics.jsonl

ROUGE_TYPES = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "rougeLsum": "ROUGE-Lsum"}
TEXT_SCORES = {"exact_match": "exact match", "token_f1": "token F1", "chrf": "chrF", "bleu": "BLEU"}
LABELS = {**ROUGE_TYPES, **TEXT_SCORES, "length_ratio": "length ratio", "token_limit": "hit the token limit"}
NATS = "nats per supervised token"
UNITS = {
    **dict.fromkeys(ROUGE_TYPES, "ROUGE f-measure"),
    **dict.fromkeys(TEXT_SCORES, "score, 0 to 1"),
    "length_ratio": "length of replies / references",
    "token_limit": "share of rows",
    "loss": f"loss, {NATS}",
}
DIRECTIONS = {"loss": False, "perplexity": False, "token_limit": False, "length_ratio": None}  # higher is better, elsewhere
BASE, TUNED = "base model", "tuned model"


MOST_STEPS = style.MOST_POINTS // 2  # of a curve over sorted scores
MOST_MARKS = 1000  # of a scatter plot; beyond, near rows are drawn as one
SQUARES = 30  # along each of its axes, then
TEXT_BYTES = 60_000  # of all excerpts of one figure
MOST_LOSSES = 800  # of a training curve; beyond, stretches are drawn as their means in a band
MOST_LINES = 20  # at resumes
MOST_BINS = 40
SKEWED = 8.0  # where the longest row has so many times the median's tokens, the axis is logarithmic
MOST_REASONS = 10


class Interval(Protocol):
    """A mean and the ends of its interval."""

    @property
    def mean(self) -> float:
        """The mean."""

    @property
    def low(self) -> float:
        """The lower end."""

    @property
    def high(self) -> float:
        """The upper end."""


Estimate = float | Interval | Mapping[str, Any]  # a mean, or one with its interval: mean, low, high


def loss_figure(history: History, title: str = "Loss") -> go.Figure:
    """Did the fit learn, and when was it best? The losses by update, what else chose the best, and the learning rate."""
    train, validation = _Curve.of(history, "train", "loss"), _Curve.of(history, "validation", "loss")
    if not len(train) and not len(validation):
        return blank(title, "No loss was recorded.")
    traces, told = _train_traces(train) if len(train) else ([], ["No training loss was recorded."])
    if len(validation):
        traces.append(validation.thinned().trace("validation", "y", style.BLUE, 2.4))
    panels = [(f"loss, {NATS}", 230)]
    chosen_by = next((name for name in ROUGE_TYPES if any(name in each for each in history)), "loss")
    if chosen_by != "loss":
        panels.append((f"{LABELS[chosen_by]} of replies to validation prompts", 100))
        score = _Curve.of(history, "validation", chosen_by).thinned()
        traces.append(score.trace(LABELS[chosen_by], "y2", style.PURPLE, 2.4).update(showlegend=False))
    mark, of_best = _best(history, chosen_by, f"y{len(panels)}" if len(panels) > 1 else "y")
    rates = _Curve.of(history, "train", "learning_rate").thinned(style.MOST_POINTS // 4)
    if len(rates):
        panels.append(("learning rate", 64))
        trace = rates.trace("learning rate", f"y{len(panels)}", style.GREY, 1.8, "%{y:.2e}")
        traces.append(trace.update(showlegend=False, mode="lines" if len(rates) > 1 else "markers"))
    height, layout = style.shared_panels(panels)
    layout["xaxis"] |= _updates([train, validation])
    if len(rates):
        layout[f"yaxis{len(panels)}"] |= _rate_ticks(float(rates.values.max()))
    resumes = sorted({int(each["step"]) for each in history if each.get("event") == "resume"})
    layout["shapes"] = style.shared_lines(resumes[:MOST_LINES], len(panels))
    if resumes:
        steps = f"{', '.join(f'{step:,}' for step in resumes[:4])}{', …' if len(resumes) > 4 else ''}"
        told.append(f"Dotted: resumed after update {steps}.")
    told = [*of_best, *told, *validation.notes("validation losses")]
    return framed([*traces, *mark], title, told, height, hovermode="x unified", hoversubplots="axis", **layout)


def loss_comparison_figure(histories: Mapping[str, History], title: str = "Losses of several runs") -> go.Figure:
    """Which of some runs learned best? Their validation losses (solid) and training losses (dotted), a colour a run."""
    curves = {
        name: {event: _Curve.of(history, event, "loss") for event in ("validation", "train")}
        for name, history in histories.items()
    }
    drawn = {name: of_run for name, of_run in curves.items() if any(map(len, of_run.values()))}
    if not drawn:
        return blank(title, "No loss was recorded.")
    limit = max(50, 2 * style.MOST_POINTS // len(drawn))
    traces, thin = [], False
    for place, (name, of_run) in enumerate(drawn.items()):
        color, symbol = style.PALETTE[place % len(style.PALETTE)], style.SYMBOLS[place % len(style.SYMBOLS)]
        named = next(event for event, curve in of_run.items() if len(curve))
        for event, dash, width in (("validation", "solid", 2.4), ("train", "dot", 1.4)):
            curve = of_run[event].averaged()[0].thinned(limit)
            thin |= len(curve) < len(of_run[event])
            if len(curve):
                hover = f"update %{{x}}: {event} loss %{{y:.4f}}<extra>%{{fullData.name}}</extra>"
                trace = curve.trace(figure_text(short_name(name)), "y", color, width, hover)
                trace.update(legendgroup=str(place), showlegend=event == named, line_dash=dash, marker_symbol=symbol)
                traces.append(trace)
    told = ["Solid: validation. Dotted: train."]
    least = {name: float(of_run["validation"].values.min()) for name, of_run in drawn.items() if len(of_run["validation"])}
    if least:
        best = min(least, key=lambda name: least[name])
        told.append(f"Least validation loss: {least[best]:.3f} ({short_name(best)}).")
    if len(drawn) < len(curves):
        told.append(f"No loss was recorded of: {', '.join(short_name(name) for name in curves if name not in drawn)}.")
    if thin:
        told.append("Long curves are drawn as means of stretches.")
    height, layout = style.shared_panels([(f"loss, {NATS}", 300)])
    layout["xaxis"] |= _updates([curve for of_run in drawn.values() for curve in of_run.values()])
    return framed(traces, title, told, height, hovermode="closest", **layout)


def scores_figure(
    base: Mapping[str, Estimate],
    tuned: Mapping[str, Estimate],
    labels: Mapping[str, str] = LABELS,
    units: Mapping[str, str] = UNITS,
    title: str = "Scores",
) -> go.Figure:
    """How good are base and tuned model? The mean of each score that both have, with its 95 % interval where it is given.

    Scores of different units stand in panels of their own.
    """
    pairs = {name: (_interval(base[name]), _interval(tuned[name])) for name in base if name in tuned}
    pairs = {name: pair for name, pair in pairs.items() if all(math.isfinite(mean) for mean, _, _ in pair)}
    if not pairs:
        return blank(title, "There are no scores of both models.")
    traces, panels = [], _by_unit(list(pairs), units, labels)
    for number, (_, names) in enumerate(panels, start=1):
        for which, (who, color, symbol, shift) in enumerate(
            ((BASE, style.GREY, "circle-open", 0.2), (TUNED, style.BLUE, "diamond", -0.2))
        ):
            places = [len(names) - 1 - place + shift for place in range(len(names))]
            trace = style.whiskers([pairs[name][which] for name in names], places, number, color, symbol)
            traces.append(trace.update(name=who, legendgroup=who, showlegend=number == 1))
    spans = [_span(each for name in names for each in pairs[name]) for _, names in panels]
    with_intervals = any(low < high for pair in pairs.values() for _, low, high in pair)
    told = ["Marks are means, lines their 95\u00a0% intervals." if with_intervals else "Marks are means."]
    headings = [(unit, [labels.get(name, name) for name in names]) for unit, names in panels]
    height, layout = style.row_panels(headings, 76, spans)
    return framed(traces, title, told, height, hovermode="closest", **layout)


def difference_figure(
    differences: Mapping[str, Estimate],
    labels: Mapping[str, str] = LABELS,
    higher_is_better: Mapping[str, bool | None] = DIRECTIONS,
    rows: int | None = None,
    units: Mapping[str, str] = UNITS,
    title: str = "Tuned minus base",
) -> go.Figure:
    """Is the tuned model better? The paired difference of each score with its 95 % interval, against zero.

    A difference is clear where its interval does not hold zero; with fewer `rows` than a verdict needs, none is. Higher is
    better where `higher_is_better` does not name a score; None there: neither is. Scores of different units have panels of
    their own.
    """
    from finetune_dataflow.engine.comparison import FEWEST_ROWS  # what it imports takes seconds

    intervals = {name: _interval(each) for name, each in differences.items()}
    intervals = {name: each for name, each in intervals.items() if math.isfinite(each[0])}
    if not intervals:
        return blank(title, "There are no differences to show.")
    few = rows is not None and rows < FEWEST_ROWS
    higher = {name: higher_is_better.get(name, True) for name in intervals}
    looks = {
        "clearly better": (style.GREEN, "triangle-up"),
        "clearly worse": (style.VERMILION, "triangle-down"),
        "clearly different": (style.PURPLE, "diamond"),
        "no clear difference": (style.GREY, "circle-open"),
    }
    kinds = {name: _clearness(each, higher[name], few) for name, each in intervals.items()}
    traces, headings, named, panels = [], [], set[str](), _by_unit(list(intervals), units, labels)
    for number, (unit, names) in enumerate(panels, start=1):
        for kind, (color, symbol) in looks.items():
            of_kind = {name: len(names) - 1 - place for place, name in enumerate(names) if kinds[name] == kind}
            if of_kind:
                found = [intervals[name] for name in of_kind]
                trace = style.whiskers(found, list(of_kind.values()), number, color, symbol, "+")
                traces.append(trace.update(name=kind, legendgroup=kind, showlegend=kind not in named))
                named.add(kind)
        sides = {{True: ", right is better", False: ", left is better", None: ""}[higher[name]] for name in names}
        better = sides.pop() if len(sides) == 1 else ""
        headings.append((unit + better, [labels.get(name, name) for name in names]))
    told = ["Marks are means over the same rows, lines their 95\u00a0% intervals."]
    if few and rows is not None:
        told.append(f"{counted(rows, 'row')} cannot tell: at least {FEWEST_ROWS} are needed.")
    spans = [_span([*(intervals[name] for name in names), (0.0, 0.0, 0.0)]) for _, names in panels]
    height, layout = style.row_panels(headings, 52, spans)
    for axis in [each for each in layout if each.startswith("xaxis")]:
        layout[axis]["zeroline"] = True
    return framed(traces, title, told, height, hovermode="closest", **layout)


def score_distribution_figure(
    base: ArrayLike, tuned: ArrayLike, label: str = "ROUGE-L", higher_is_better: bool = True, title: str = ""
) -> go.Figure:
    """How are the scores of single rows spread? The share of rows that reach each score, so that no bins need choosing.

    base, tuned: a score for each row; those that are not finite are left out and counted.
    """
    title = title or f"{label} of all rows"
    given = {BASE: np.asarray(base, np.float64), TUNED: np.asarray(tuned, np.float64)}
    scores = {who: np.sort(each[np.isfinite(each)]) for who, each in given.items()}
    found = np.concatenate(list(scores.values()))
    if not len(found):
        return blank(title, "No row has a score.")
    room = 0.04 * float(np.ptp(found)) or 0.04 * max(abs(float(found[0])), 1.0)
    traces, thin = [], False
    word, shape = ("at least", "vh") if higher_is_better else ("at most", "hv")
    for who, color, dash in ((BASE, style.GREY, "dash"), (TUNED, style.BLUE, "solid")):
        if len(scores[who]):
            values, shares = _reached(scores[who], higher_is_better, found.min() - room, found.max() + room)
            even = np.linspace(1, len(values) - 2, min(len(values) - 2, MOST_STEPS)).astype(int)
            kept = np.unique([0, *even, len(values) - 1])
            thin |= len(kept) < len(values)
            trace = go.Scatter(x=rounded(values[kept]), y=rounded(shares[kept]), name=who, mode="lines")
            hover = f"%{{y:.1%}} of rows: {word} %{{x:.3f}}<extra>%{{fullData.name}}</extra>"
            traces.append(trace.update(line={"color": color, "width": 2.4, "dash": dash, "shape": shape}, hovertemplate=hover))
    medians = ", ".join(f"{who.split()[0]} {np.median(each):.3f}" for who, each in scores.items() if len(each))
    told = [f"{counted(max(map(len, scores.values())), 'row')}. Median: {medians}."]
    missing = sum(map(len, given.values())) - len(found)
    told += [f"{missing:,} without a score left out."] if missing else []
    told += [f"Drawn at {MOST_STEPS:,} evenly spaced ranks."] if thin else []
    height, layout = style.shared_panels([(f"share of rows that score {word} so much", 250)])
    layout["yaxis"] |= {"range": [-0.02, 1.03], "tickformat": ".0%", "dtick": 0.25}
    layout["xaxis"] |= {"title": {"text": figure_text(label)}, "nticks": 7}
    return framed(traces, title, told, height, hovermode="closest", **layout)


def scatter_figure(
    base: ArrayLike,
    tuned: ArrayLike,
    rows: Sequence[int],
    texts: Sequence[str],
    label: str = "ROUGE-L",
    higher_is_better: bool = True,
    title: str = "Row by row",
) -> go.Figure:
    """Which rows did the fit help, and which did it hurt? Each row's two scores, with its number and the start of its text.

    Rows on one spot are one larger mark; where there are more than 1,000 spots, rows in one small square are. Raises
    ValueError where the four are not of one length.
    """
    scores = {"base": np.asarray(base, np.float64), "tuned": np.asarray(tuned, np.float64)}
    table = pd.DataFrame({**scores, "row": list(rows), "text": list(texts)})
    scored = table[np.isfinite(table["base"] + table["tuned"])]
    if scored.empty:
        return blank(title, "No row has a score of both models.")
    both = scored[["base", "tuned"]].to_numpy()
    low, span = float(both.min()), float(np.ptp(both))
    if span == 0:
        span = 0.2 * abs(low) or 0.2
        low -= span / 2
    change = np.sign((scored["tuned"] - scored["base"]).round(9)).astype(int)
    scored = scored.assign(kind=change if higher_is_better else -change)
    marks = _marks(scored, low, span / 500)
    squares = len(marks) > MOST_MARKS
    marks = _marks(scored, low, span * 1.0001 / SQUARES) if squares else marks
    # Areas grow with the rows; of squares, most hold so many that only their proportions can be shown.
    unit, smallest = (14 / math.sqrt(marks["count"].quantile(0.95)), 4) if squares else (9.0, 9)
    marks = marks.assign(size=np.clip(unit * np.sqrt(marks["count"]), smallest, 28))
    limit = min(max(TEXT_BYTES // len(marks), 24), 160)
    above, below = ("triangle-up", "triangle-down") if higher_is_better else ("triangle-down", "triangle-up")
    looks = {"better": (1, style.GREEN, above), "worse": (-1, style.VERMILION, below), "equal": (0, style.GREY, "circle")}
    traces = []
    for name, (kind, color, symbol) in looks.items():
        of_kind = marks[marks["kind"] == kind]
        if len(of_kind):
            trace = _mark_trace(of_kind, limit)
            trace.update(name=f"{name} ({of_kind['count'].sum():,})", marker_color=color, marker_symbol=symbol)
            traces.append(trace)
    told = [f"{'Above' if higher_is_better else 'Below'} the line, the tuned model is better."]
    if len(marks) < len(scored):
        told.append(f"A larger mark is several rows {f'in one of {SQUARES} x {SQUARES} squares' if squares else 'on one spot'}.")
    if len(scored) < len(table):
        told.append(f"{counted(len(table) - len(scored), 'row')} without a score left out.")
    ends = rounded([low - 0.06 * span, low + 1.06 * span])
    axis = {"range": ends, "nticks": 6, "constrain": "domain"}
    line = {"x0": ends[0], "y0": ends[0], "x1": ends[1], "y1": ends[1]}
    return framed(
        traces,
        title,
        told,
        380,
        hovermode="closest",
        legend_itemsizing="constant",
        xaxis={**axis, "title": {"text": f"{BASE}, {figure_text(label)}"}, "constraintoward": "left"},
        yaxis={**axis, "title": {"text": f"{TUNED}, {figure_text(label)}"}, "scaleanchor": "x"},
        shapes=[{"type": "line", **line, "layer": "below", "line": {"dash": "dot"}}],
    )


def outcomes_figure(wins: int, ties: int, losses: int, title: str = "Rows won and lost") -> go.Figure:
    """On how many rows is the tuned model better, equal, worse? One bar of all rows."""
    total = wins + ties + losses
    if not total:
        return blank(title, "No row was compared.")
    looks = (
        ("better", wins, style.GREEN, None),
        ("equal", ties, style.PALE, None),
        ("worse", losses, style.VERMILION, style.HATCHED),
    )
    traces = [
        style.share_bars(f"{name}: {count:,}", [""], [count / total], [f"{counted(count, 'row')}"], color, pattern)
        for name, count, color, pattern in looks
    ]
    return framed(
        traces, title, [f"The tuned model against the base model on {counted(total, 'row')}."], 84, **style.share_axes(1)
    )


def token_length_figure(lengths: Mapping[str, ArrayLike], limit: int | None = None, title: str = "Tokens per row") -> go.Figure:
    """How long are the rows, and how near to max_seq_length (`limit`)? A histogram of each set, in the same bins."""
    sets = {name: np.asarray(each, np.int64) for name, each in lengths.items() if len(np.asarray(each))}
    if not sets:
        return blank(title, "There are no rows.")
    every = np.concatenate(list(sets.values()))
    edges, log = _bins(every)
    shown = limit if limit is not None and limit <= 2 * int(every.max()) else None
    panels = [
        (f"{_set_name(name)}: {counted(len(each), 'row')}, median {np.median(each):,.0f}, longest {each.max():,}", 84)
        for name, each in sets.items()
    ]
    height, layout = style.shared_panels(panels)
    traces = []
    for number, (name, each) in enumerate(sets.items(), start=1):
        axis = "y" if number == 1 else f"y{number}"
        traces.append(_length_bars(each, edges, log).update(name=_set_name(name), yaxis=axis))
        fine: dict[str, Any] = {"dtick": 1, "nticks": None} if max(traces[-1].y) <= 3 else {"nticks": 4}
        layout[axis.replace("y", "yaxis")] |= {"rangemode": "tozero", "tickformat": ",d", **fine}
    layout["xaxis"] |= _length_axis(int(edges[0]), max(int(edges[-1]), shown or 0), log)
    layout["shapes"] = [] if shown is None else style.shared_lines(_placed([shown], log), len(panels), "dash")
    told = [] if limit is None else [_told_of_limit(every, limit, shown is not None)]
    return framed(traces, title, told, height, hovermode="closest", **layout)


def label_figure(audits: Mapping[str, SetAudit], title: str = "What is learned") -> go.Figure:
    """What share of each set's tokens is learned, and what is masked (prompt and template), as the label audit counts it?"""
    sets = {name: each for name, each in audits.items() if each.tokens}
    if not sets:
        return blank(title, "There are no tokens.")
    names = [figure_text(_set_name(name)) for name in sets]
    told = "; ".join(f"{_set_name(name)} {each.padded:.1%}" for name, each in sets.items())
    traces = []
    for name, color, learned in (("learned", style.BLUE, True), ("masked: prompt and template", style.PALE, False)):
        shares = [each.supervised if learned else 1 - each.supervised for each in sets.values()]
        tokens = [counted(round(share * each.tokens), "token") for share, each in zip(shares, sets.values(), strict=True)]
        traces.append(style.share_bars(name, names, shares, tokens, color))
    notes = [f"Share of tokens. Padding in the batches: {told}."]
    return framed(traces, title, notes, 30 + 44 * len(sets), **style.share_axes(len(sets)))


def ledger_figure(ledger: pd.DataFrame, title: str = "Where every row went") -> go.Figure:
    """Which rows were used, in which set, and why were the others dropped? The counts of the row ledger."""
    if ledger.empty:
        return blank(title, "There are no rows.")
    used = ledger[ledger["status"] == "used"]["set"].value_counts(sort=False)
    dropped = ledger[ledger["status"] == "dropped"]["reason"].value_counts()
    told = [f"{counted(len(ledger), 'row')}: {used.sum():,} used, {dropped.sum():,} dropped."]
    if shortened := int(ledger["truncated"].sum()):
        told.append(f"{counted(shortened, 'row')} with a shortened prompt.")
    bars = [(_set_name(name), int(used[name])) for name in sorted(used.index, key=_set_order)]
    reasons = [(str(reason).replace("_", " ") or "no reason given", int(count)) for reason, count in dropped.items()]
    if len(reasons) > MOST_REASONS:
        rest = reasons[MOST_REASONS - 1 :]
        reasons = [*reasons[: MOST_REASONS - 1], (f"{len(rest)} other reasons", sum(count for _, count in rest))]
    traces = [
        style.count_bars(name, found, first, color, pattern)
        for name, found, first, color, pattern in (
            ("used", bars, len(bars) + len(reasons) - 1, style.BLUE, None),
            ("dropped", reasons, len(reasons) - 1, style.VERMILION, style.HATCHED),
        )
        if found
    ]
    labels = [label for label, _ in (*bars, *reasons)]
    longest = max(count for _, count in (*bars, *reasons))
    height, layout = style.row_panels([("", labels)], 34, [(0, longest)])
    layout["xaxis"] |= {"range": [0, 1.22 * longest], "showticklabels": False, "showgrid": False}
    return framed(traces, title, told, height, **layout)


@dataclass(frozen=True)
class _Curve:
    """A value by update, float64 [n]: `values`, of the updates `firsts` to `steps`. `bad` more were not finite."""

    steps: NDArray[np.int64]
    firsts: NDArray[np.int64]
    values: NDArray[np.float64]
    bad: int = 0

    @classmethod
    def of(cls, history: History, event: str, key: str) -> _Curve:
        """The values of `key` in the events of one kind."""
        told = [each for each in history if each.get("event") == event and each.get(key) is not None]
        good = [each for each in told if math.isfinite(each[key])]
        steps = np.array([each["step"] for each in good], np.int64)
        firsts = np.concatenate([[0], steps[:-1]])[: len(steps)] + 1
        return cls(steps, firsts, np.array([each[key] for each in good], np.float64), len(told) - len(good))

    def __len__(self) -> int:
        """The number of values."""
        return len(self.steps)

    def thinned(self, limit: int = style.MOST_POINTS) -> _Curve:
        """The lowest and the highest value of every stretch, where there are more than `limit`."""
        kept = style.thinned(self.values, limit)
        return _Curve(self.steps[kept], self.firsts[kept], self.values[kept], self.bad)

    def averaged(self) -> tuple[_Curve, NDArray[np.float64], NDArray[np.float64]]:
        """The mean of every stretch, where there are more than can be told apart, and its lowest and highest values."""
        if len(self) <= MOST_LOSSES:
            return self, self.values, self.values
        parts = style.stretches(len(self), MOST_LOSSES // 2)
        means, lows, highs = (np.array([found(self.values[part]) for part in parts]) for found in (np.mean, np.min, np.max))
        firsts, steps = (np.array(each) for each in zip(*((self.firsts[p][0], self.steps[p][-1]) for p in parts), strict=True))
        return _Curve(steps, firsts, means, self.bad), lows, highs

    def trace(self, name: str, axis: str, color: str, width: float, hover: str = "%{y:.4f}") -> go.Scatter:
        """The curve, with marks where there are few values."""
        return go.Scatter(
            x=self.steps.tolist(),
            y=rounded(self.values),
            yaxis=axis,
            name=name,
            mode="lines+markers" if len(self) <= 40 else "lines",
            line={"color": color, "width": width},
            marker={"color": color, "size": 5},
            hovertemplate=hover,
        )

    def notes(self, what: str) -> list[str]:
        """What a reader of the curve must know."""
        return [f"{self.bad:,} {what} that were not finite are left out."] if self.bad else []


def _train_traces(train: _Curve) -> tuple[list[go.Scatter], list[str]]:
    """The training loss; of a long fit, its means in a band from the lowest to the highest. And what to say of it."""
    curve, lows, highs = train.averaged()
    trace = curve.trace("train", "y", style.OCHRE, 1.6)
    if (curve.firsts != curve.steps).any():
        trace.update(customdata=curve.firsts.tolist(), hovertemplate="%{y:.4f}, mean of updates %{customdata:,} to %{x}")
    if len(curve) == len(train):
        return [trace], train.notes("training losses")
    line = {"width": 0, "color": style.OCHRE}
    quiet = {"mode": "lines", "line": line, "showlegend": False, "hoverinfo": "skip"}
    below = go.Scatter(x=trace.x, y=rounded(lows), name="lowest", **quiet)
    above = go.Scatter(x=trace.x, y=rounded(highs), name="highest", **quiet, fill="tonexty", fillcolor=style.OCHRE_BAND)
    told = f"Train: the mean of every {round(len(train) / len(curve)):,} reports, in a band from the lowest to the highest."
    return [below, above, trace], [told, *train.notes("training losses")]


def _best(history: History, chosen_by: str, axis: str) -> tuple[list[go.Scatter], list[str]]:
    """A mark at the best validation, where there is one, and what to say of it."""
    validations = [each for each in history if each.get("event") == "validation" and math.isfinite(each.get("loss", math.nan))]
    if not validations:
        return [], ["No validation was recorded."]
    step = validations[-1].get("best_step")
    best = next((each for each in validations if each["step"] == step and chosen_by in each), None)
    if best is None:
        return [], []
    by = "" if chosen_by == "loss" else f"{LABELS[chosen_by]} {best[chosen_by]:.3f}, "
    where = f"Best: update {step:,}" if step else "Best: before the first update"
    marker = {"symbol": "star", "size": 13, "color": style.VERMILION}
    trace = go.Scatter(x=[step], y=rounded([best[chosen_by]]), yaxis=axis, name="best", mode="markers", marker=marker)
    return [trace.update(hoverinfo="skip", cliponaxis=False)], [f"{where}, {by}validation loss {best['loss']:.3f}."]


def _updates(curves: Sequence[_Curve]) -> dict[str, Any]:
    """The x axis of updates, in whole numbers."""
    last = max(1, *(int(curve.steps.max()) for curve in curves if len(curve)))
    ticks: dict[str, Any] = {"dtick": 1} if last <= 8 else {"nticks": 8}
    return {"title": {"text": "update"}, "range": [-0.02 * last, 1.02 * last], "tickformat": ",d", **ticks}


def _rate_ticks(highest: float) -> dict[str, Any]:
    """Nothing and the highest learning rate, as short as people write them."""
    ticks = [0.0, highest] if highest > 0 else [0.0]
    texts = [_short_rate(each) for each in ticks]
    return {"tickvals": rounded(ticks), "ticktext": texts, "range": [-0.08 * highest, 1.12 * highest or 1.0], "fixedrange": True}


def _short_rate(rate: float) -> str:
    return f"{rate:.2g}" if rate == 0 or rate >= 1e-3 else f"{rate:.1e}".replace(".0e", "e").replace("e-0", "e-")


def _interval(value: Estimate | None) -> tuple[float, float, float]:
    """Mean, low and high of an estimate; the ends are the mean where they are not given, and NaN stands for no mean."""
    if value is None or isinstance(value, float | int):
        told: Mapping[str, Any] = {"mean": value}
    else:
        told = value if isinstance(value, Mapping) else {"mean": value.mean, "low": value.low, "high": value.high}
    mean, low, high = (math.nan if told.get(each) is None else float(told[each]) for each in ("mean", "low", "high"))
    low, high = (end if math.isfinite(end) else mean for end in (low, high))
    return mean, low, high


def _by_unit(names: Sequence[str], units: Mapping[str, str], labels: Mapping[str, str]) -> list[tuple[str, list[str]]]:
    """The names of scores by what they are measured in; one of no known unit stands alone."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        found[units.get(name, labels.get(name, name))].append(name)
    return list(found.items())


def _span(intervals: Any) -> tuple[float, float]:
    ends = [end for each in intervals for end in each]
    return min(ends), max(ends)


def _clearness(interval: tuple[float, float, float], higher_is_better: bool | None, few: bool) -> str:
    _, low, high = interval
    if few or low <= 0 <= high:
        return "no clear difference"
    if higher_is_better is None:
        return "clearly different"
    return "clearly better" if (low > 0) == higher_is_better else "clearly worse"


def _reached(
    scores: NDArray[np.float64], higher_is_better: bool, low: float, high: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Each different score and the share of rows with that or a better one (worse, where lower is better), from low to high."""
    values, counts = np.unique(scores, return_counts=True)
    up_to = np.cumsum(counts) / len(scores)
    shares = 1 - np.concatenate([[0.0], up_to[:-1]]) if higher_is_better else up_to
    ends = (1.0, 0.0) if higher_is_better else (0.0, 1.0)
    return np.concatenate([[low], values, [high]]), np.concatenate([[ends[0]], shares, [ends[1]]])


def _marks(scored: pd.DataFrame, low: float, step: float) -> pd.DataFrame:
    """The rows of one kind in one square of a grid as one mark: mean scores, count, the first rows, the first text."""
    squares = np.floor((scored[["base", "tuned"]].to_numpy() - low) / step).astype(np.int64)
    grouped = scored.assign(x=squares[:, 0], y=squares[:, 1]).groupby(["kind", "x", "y"], sort=True)
    return grouped.agg(
        base=("base", "mean"),
        tuned=("tuned", "mean"),
        count=("row", "size"),
        rows=("row", lambda rows: ", ".join(map(str, rows[:3])) + (", …" if len(rows) > 3 else "")),
        text=("text", "first"),
    ).reset_index()


def _mark_trace(marks: pd.DataFrame, limit: int) -> go.Scatter:
    """Marks of their `size`, each with its rows and `limit` bytes of the first one's text."""
    pairs = zip(marks["rows"], marks["count"], strict=True)
    heads = [f"{count:,} rows: {rows}" if count > 1 else f"row {rows}" for rows, count in pairs]
    return go.Scatter(
        x=rounded(marks["base"], 4),
        y=rounded(marks["tuned"], 4),
        mode="markers",
        marker={"size": rounded(marks["size"], 3), "opacity": 0.8, "line": {"width": 0}},
        customdata=[[head, excerpt(text, limit)] for head, text in zip(heads, marks["text"], strict=True)],
        hovertemplate="%{customdata[0]}<br>base %{x:.3f}, tuned %{y:.3f}<br>%{customdata[1]}<extra></extra>",
        cliponaxis=False,
    )


def _bins(lengths: NDArray[np.int64]) -> tuple[NDArray[np.int64], bool]:
    """Whole edges of at most 40 bins that hold all lengths, and whether they stand on a logarithmic axis."""
    low, high = int(lengths.min()), int(lengths.max()) + 1
    if high > SKEWED * max(float(np.median(lengths)), 1.0):
        edges = np.round(np.geomspace(max(low, 1), high, MOST_BINS)).astype(np.int64)
        return np.unique(np.concatenate([[low], edges])), True
    width = max(1, math.ceil((high - low) / MOST_BINS))
    return np.arange(low, high + width, width), False


def _placed(lengths: ArrayLike, log: bool) -> list[float]:
    """Where lengths stand on the axis: as they are, or as their binary logarithms."""
    numbers = np.asarray(lengths, np.float64)
    return [float(each) for each in (np.log2(np.maximum(numbers, 0.5)) if log else numbers)]


def _length_bars(lengths: NDArray[np.int64], edges: NDArray[np.int64], log: bool) -> go.Bar:
    """The histogram of one set. A bar ends half a token below its edges, so that one of a single length stands above it."""
    borders = np.array(_placed(edges - 0.5, log))
    ranges = [f"{low:,}" if low + 1 == high else f"{low:,} to {high - 1:,}" for low, high in pairwise(edges.tolist())]
    return go.Bar(
        x=rounded((borders[:-1] + borders[1:]) / 2),
        y=np.histogram(lengths, edges)[0].tolist(),
        width=rounded(np.diff(borders)),
        marker={"color": style.BLUE, "line": {"width": 0}},
        customdata=ranges,
        hovertemplate="%{customdata} tokens: %{y:,}<extra>%{fullData.name}</extra>",
        showlegend=False,
    )


def _length_axis(low: int, high: int, log: bool) -> dict[str, Any]:
    first, last = _placed([low - 0.5, high], log)
    room = 0.02 * (last - first)
    axis: dict[str, Any] = {"title": {"text": "tokens in a row"}, "range": rounded([first - room, last + room])}
    if log:
        ticks = _powers_of_two(low, high)
        return axis | {"tickvals": rounded(_placed(ticks, log)), "ticktext": [f"{each:,}" for each in ticks]}
    return axis | ({"dtick": 1} if high - low < 7 else {"nticks": 7, "tickformat": ",d"})


def _powers_of_two(low: int, high: int) -> list[int]:
    """At most six of those from about `low` to about `high`."""
    powers = range(max(low, 1).bit_length() - 1, high.bit_length() + 1)
    return [2**power for power in powers[:: math.ceil(len(powers) / 6)]]


def _told_of_limit(lengths: NDArray[np.int64], limit: int, shown: bool) -> str:
    reached, drawn = int((lengths >= limit).sum()), "Dashed" if shown else "Beyond the axis"
    told = f"{reached:,}" if reached else "none"
    return f"{drawn}: max_seq_length {limit:,}, reached by {told} of {counted(len(lengths), 'row')}."


def _set_name(name: str) -> str:
    return name.replace("_", "-") or "no set"


def _set_order(name: str) -> tuple[int, str]:
    known = ("train", "validation", "hold_out")
    return (known.index(name) if name in known else len(known), name)
