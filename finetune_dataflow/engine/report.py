"""report.html: what a person decides by, on the pages of `engine.page` with the figures of `engine.figures`."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from finetune_dataflow.engine import figures as drawn
from finetune_dataflow.engine import files, page
from finetune_dataflow.engine.comparison import FEWEST_ROWS, LABELS, LOSS, METRICS, TOKEN_LIMIT, said_p, tone_of
from finetune_dataflow.engine.figure_style import counted, themed_layout
from finetune_dataflow.engine.page import Cell, Chart, Code, Drawing, Facts, Page, Prose, Row, RowTable, Section, Table
from finetune_dataflow.engine.report_parts import ReportParts
from finetune_dataflow.engine.run_directory import METRICS as METRICS_FILE
from finetune_dataflow.engine.run_directory import REPORT, versions

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from finetune_dataflow.engine.training import FitSummary

MOST_ROWS = 1000  # of the hold-out in the page; predictions.jsonl has all
MOST_BYTES = 3_000_000  # of their texts, so that the page stays under 6 MB
MOST_LEDGER_LINES = 500
DIRECTIONS = {each.name: each.higher_is_better for each in (*METRICS.values(), TOKEN_LIMIT, LOSS)}
TONES = (("The tuned model is better", "better"), ("The tuned model is worse", "worse"), ("There is no clear", "unclear"))


def shown_metric(judge: str) -> str:
    """The metric that rows are shown by: the one that decides, or ROUGE-L where that is the loss, which replies have none of."""
    return "rougeL" if judge == "loss" else judge


def scores_figure(comparison: Mapping[str, Mapping[str, Any]], names: Sequence[str], title: str) -> go.Figure:
    """Some scores of base and tuned model with their intervals."""
    intervals = comparison["intervals"]
    base, tuned = ({name: intervals[name][side] for name in names} for side in ("base", "finetuned"))
    return drawn.scores_figure(base, tuned, LABELS, title=title)


def difference_figure(comparison: Mapping[str, Mapping[str, Any]], rows: int) -> go.Figure:
    """Every difference with its interval."""
    differences = comparison["difference"]
    return drawn.difference_figure(differences, LABELS, {name: DIRECTIONS.get(name) for name in differences}, rows)


def report_page(parts: ReportParts, figures: Mapping[str, go.Figure], fit: FitSummary | None) -> Page:
    """The report of a run; fit: None where none was made."""
    name = Path(parts.identity.names["data_path"]).name
    tone = next((tone for start, tone in TONES if parts.verdict.startswith(start)), "none")
    sections = [_scores(parts, figures), _rows(parts, figures)]
    if fit is not None:
        sections.insert(1, _fit(fit, figures))
    return Page(
        title=f"Fine-tuning on {name}" if fit else f"Evaluation on {name}",
        headline=parts.verdict,
        tone=tone,  # type: ignore[arg-type]  # one of its four
        notes=_warnings(parts),
        facts=_facts(parts, fit),
        sections=[*sections, _data(parts, figures), _graph(parts), _provenance(parts, fit)],
        footer=f"Made by finetune-dataflow {versions()['finetune-dataflow']} (Apache-2.0).",
    )


def write(directory: Path, made: Page) -> Path:
    """Write report.html, light and dark as its reader prefers."""
    text = page.html(made, themed_layout(dark=False), themed_layout(dark=True))
    return files.write_if_changed(directory / REPORT, text, invalidated=directory / METRICS_FILE)


def _warnings(parts: ReportParts) -> list[str]:
    """What must not be overlooked: lost or shortened rows, replies that were cut."""
    ledger, limit = parts.row_ledger, parts.comparison["finetuned"]["token_limit"]
    dropped, cut = int((ledger["status"] == "dropped").sum()), int(ledger["truncated"].sum())
    found = []
    if dropped:
        found.append(f"{counted(dropped, 'row')} of {len(ledger):,} left out; the row ledger below says why.")
    if cut:
        found.append(f"{counted(cut, 'row')} with a shortened prompt.")
    if limit > 0.1:
        found.append(f"{limit:.0%} of the tuned model's replies were cut at max_tokens; with more it may score otherwise.")
    return found


def _facts(parts: ReportParts, fit: FitSummary | None) -> list[tuple[str, str]]:
    used = parts.row_ledger[parts.row_ledger["status"] == "used"]["set"].value_counts()
    facts = [
        ("base model", Path(parts.identity.names["model_id"]).name),
        *((f"{name.replace('_', '-')} rows", f"{int(used.get(name, 0)):,}") for name in ("train", "validation", "hold_out")),
    ]
    if fit is None:
        return facts
    return [
        *facts,
        ("updates", f"{fit.steps:,} (best after {fit.best_step:,})"),
        ("speed", f"{fit.tokens_per_second:,.0f} tokens/s"),
        ("peak memory", f"{fit.peak_memory_bytes / 2**30:.1f} GiB ({fit.device})"),
    ]


def _scores(parts: ReportParts, figures: Mapping[str, go.Figure]) -> Section:
    compared = parts.comparison
    columns = ("score", "base", "tuned", "difference", "95 % interval", "p", "won / equal / lost")
    rows = [_score_row(name, compared, len(parts.predictions) >= FEWEST_ROWS) for name in compared["base"]]
    return Section(
        "Base against tuned",
        [
            Table(columns, rows, "Scores on the hold-out, which no choice was made on."),
            _chart(
                figures, "difference_figure", "Tuned minus base on the same rows. Left or right of zero is clear, across is not."
            ),
            _chart(figures, "scores_figure", "Scores with 95 % intervals (symmetric studentised bootstrap over rows)."),
            _chart(figures, "outcomes_figure", "Rows that the tuned model won, tied and lost."),
        ],
        intro="Both models answered the same prompts. Differences are paired by row; p is that of a paired permutation test.",
    )


def _score_row(name: str, compared: Mapping[str, Mapping[str, Any]], enough: bool) -> list[page.Value]:
    base, tuned, difference = compared["base"][name], compared["finetuned"][name], compared["difference"].get(name)
    both: list[page.Value] = [LABELS.get(name, name), Cell(f"{base:.3f}", base), Cell(f"{tuned:.3f}", tuned)]
    if difference is None:
        return [*both, Cell(f"{tuned - base:+.3f}", tuned - base), None, None, None]
    better, outcomes = DIRECTIONS.get(name), compared["outcomes"][name]
    tone = tone_of(difference, 1 if better else -1) if enough and better is not None else "none"
    return [
        *both,
        Cell(f"{difference['mean']:+.3f}", difference["mean"], tone),  # type: ignore[arg-type]  # one of its four
        f"{difference['low']:+.3f} to {difference['high']:+.3f}",
        Cell(said_p(difference["p_value"]).removeprefix("p = ").removeprefix("p "), difference["p_value"]),
        None if better is None else _won_and_lost(outcomes),
    ]


def _won_and_lost(outcomes: Mapping[str, int]) -> Cell:
    return Cell(" / ".join(f"{outcomes[each]:,}" for each in ("wins", "ties", "losses")), outcomes["wins"] - outcomes["losses"])


def _fit(fit: FitSummary, figures: Mapping[str, go.Figure]) -> Section:
    early = ", stopped early" if fit.stopped_early else ""
    facts = [
        ("updates", f"{fit.steps:,} of {fit.planned_steps:,}{early}"),
        ("best", f"after update {fit.best_step:,}, by {fit.best_metric}"),
        ("validation loss", f"{fit.first_validation_loss:.3f} before, {fit.best_validation_loss:.3f} at its best"),
        ("trained tokens", f"{fit.trained_tokens:,}, of them {fit.supervised_tokens:,} learned"),
        ("speed", f"{fit.tokens_per_second:,.0f} tokens/s"),
        ("how the loss was computed", fit.loss_path),
    ]
    return Section("The fit", [_chart(figures, "loss_figure", "Losses in nats per supervised token, by update."), Facts(facts)])


def _rows(parts: ReportParts, figures: Mapping[str, go.Figure]) -> Section:
    shown, judge = _shown(parts.predictions), shown_metric(parts.judge)
    rows = [
        Row(int(each["row"]), each["input"], each["reference"], each["base"], each["finetuned"], each[f"base_{judge}"],
            each[f"finetuned_{judge}"])
        for each in shown.to_dict("records")
    ]  # fmt: skip
    whole = len(shown) == len(parts.predictions)
    said = "" if whole else f" The first {len(shown):,} of {len(parts.predictions):,}; predictions.jsonl has all."
    return Section(
        "Row by row",
        [
            _chart(
                figures,
                "row_scatter_figure",
                "Each hold-out row by its two scores; above the diagonal the tuned model is better.",
            ),
            _chart(figures, "score_distribution_figure", "The share of rows that reach a score."),
            RowTable(rows, f"Both replies to every row, marked word by word by the reference.{said}", score=LABELS[judge]),
        ],
    )


def _shown(predictions: pd.DataFrame) -> pd.DataFrame:
    """The first rows, as many as the page has room for."""
    texts = predictions[["input", "reference", "base", "finetuned"]]
    sizes = sum(texts[name].map(lambda text: len(text.encode("utf-8", "replace"))) for name in texts)
    return predictions[(pd.Series(sizes).cumsum() <= MOST_BYTES).to_numpy()].head(MOST_ROWS)


def _data(parts: ReportParts, figures: Mapping[str, go.Figure]) -> Section:
    ledger = parts.row_ledger
    told = ledger[(ledger["status"] == "dropped") | ledger["truncated"] | (ledger["remarks"] != "")]
    lines = [
        [float(each["row"]), each["set"].replace("_", "-"), each["status"], each["reason"] or None, each["remarks"] or None,
         float(each["prompt_tokens"]), float(each["reply_tokens"])]
        for each in told.head(MOST_LEDGER_LINES).to_dict("records")
    ]  # fmt: skip
    columns = ("row", "set", "status", "reason", "remarks", "prompt tokens", "reply tokens")
    said = "Rows that were left out, shortened, or are worth a remark."
    if len(told) > len(lines):
        said += f" The first {len(lines):,} of {len(told):,}; row_ledger.jsonl has all."
    examples = parts.label_audit.plain()
    return Section(
        "The data",
        [
            _chart(figures, "row_ledger_figure", "Where every row of the file went."),
            _chart(figures, "token_length_figure", "Tokens per row, prompt and reply together."),
            _chart(figures, "label_figure", "What is learned, and what is masked."),
            Prose("\n\n".join([*parts.label_audit.lines(), *parts.hold_out_audit.lines()])),
            *([Code(examples, "Rows as they are learned, in brackets what is.")] if examples else []),
            *([Prose("\n\n".join(parts.quality))] if parts.quality else []),
            *([Table(columns, lines, said, searchable=True)] if lines else []),
        ],
        intro=f"{counted(len(ledger), 'row')} read; each is used or left out with its reason.",
    )


def _graph(parts: ReportParts) -> Section:
    said = "The dataflow that made this page: every box is a function, every arrow one of its parameters."
    return Section("The graph", [Drawing(parts.drawing, said, "The graph of the dataflow's functions.")], collapsed=True)


def _provenance(parts: ReportParts, fit: FitSummary | None) -> Section:
    settings = shlex.quote(str(parts.directory / "config.yaml"))
    again = f"python run.py {'train' if fit else 'evaluate'} -c {settings} --out ANOTHER_DIRECTORY"
    system = {"system": f"{platform.system()} {platform.machine()}"}
    return Section(
        "Settings, versions, fingerprints",
        [
            Code(again, "The command that repeats this run."),
            Code(parts.settings, "config.yaml: every input, defaults included."),
            Table(("fingerprint of", "SHA-256"), [[name, value] for name, value in parts.identity.fingerprints.items()]),
            Table(("package", "version"), [[name, value] for name, value in {**versions(), **system}.items()]),
        ],
        collapsed=True,
    )


def _chart(figures: Mapping[str, go.Figure], name: str, caption: str) -> Chart:
    return Chart(figures[name], caption, caption)
