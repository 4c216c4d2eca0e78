"""`run.py compare`: runs side by side, on the terminal and as a page."""

from __future__ import annotations

import hashlib
import shlex
import textwrap
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from finetune_dataflow.engine import files
from finetune_dataflow.engine.colors import plain_text
from finetune_dataflow.errors import UserError, nearest

if TYPE_CHECKING:
    from finetune_dataflow.engine.page import Block, Kind, Page, Section, Value
    from finetune_dataflow.engine.run_comparison import Comparison, Differing, Pair, Result, Run, Score

HELP = """\
Show runs side by side: settings that differ, scores, and each tuned model against the first, where the rows are the same.

usage: run.py compare RUN RUN ... [--out FILE.html]

  RUN            the directory of a run, finished or not; nothing is written into it
  --out FILE     a page with tables and curves, too: one HTML file
  -h, --help     this text
"""
WIDTH = 80
LABEL_WIDTH = 32  # adapter_save_interval_proportion
BETWEEN = 2
MOST_OF_A_VALUE = 2000  # characters of it on the page
MOST_OF_A_VERDICT = 600
CHARTED = ("rougeL", "loss")
SIDES = ("tuned", "base")
TEXT: Kind = "text"
NUMBER: Kind = "number"


def compare(arguments: Sequence[str]) -> int:
    """Print how some runs differ and whether one is better; with --out FILE.html, write a page of it, too.

    Returns 0. Raises UserError for every mistake of the user's, its text safe for a terminal.
    """
    if {"-h", "--help"} & {*arguments}:
        print(HELP, end="")
        return 0
    try:
        directories, out = _parsed(arguments)
        from finetune_dataflow.engine.run_comparison import compared, read_runs

        comparison = compared(read_runs(directories))
        print(*lines(comparison), sep="\n")
        if out is not None:
            _write(out, comparison)
            print(f"\nWrote {one_line(str(out))}.")
    except UserError as error:
        raise UserError(plain_text(str(error))) from error
    return 0


def _parsed(arguments: Sequence[str]) -> tuple[list[Path], Path | None]:
    """The directories and the page that a command line names."""
    runs: list[str] = []
    outs: list[str] = []
    words = iter(arguments)
    for word in words:
        if word == "--":
            runs += words
        elif word == "--out":
            outs.append(next(words, ""))
        elif word.startswith("--out="):
            outs.append(word.removeprefix("--out="))
        elif word.startswith("-"):
            raise UserError(f"Unknown option {word!r}.{nearest(word, ['--out'])} Expected: compare RUN RUN ... [--out FILE.html]")
        else:
            runs.append(word)
    if len(outs) > 1:
        raise UserError(f"--out is given {len(outs)} times. Expected one file.")
    directories = [files.user_path(each) for each in runs]
    return directories, _page_path(outs[0], directories) if outs else None


def _page_path(text: str, directories: Sequence[Path]) -> Path:
    """Where the page goes. Raises UserError for what is no HTML file, and for a place in a run, which stays as it is."""
    path = files.user_path(text)
    if path.is_dir():
        raise UserError(f"--out {text!r} is a directory. Expected the name of an HTML file.")
    if path.suffix.lower() != ".html":
        raise UserError(f"--out {text!r} is no HTML file. Expected a name that ends in .html.")
    for directory in directories:
        if path.resolve().is_relative_to(directory.resolve()):
            raise UserError(f"--out {text!r} is in the run {directory}, which compare leaves as it is. Name a file elsewhere.")
    return path


def _write(path: Path, comparison: Comparison) -> None:
    from finetune_dataflow.engine.figure_style import themed_layout
    from finetune_dataflow.engine.page import html

    text = html(page(comparison, path), themed_layout(dark=False), themed_layout(dark=True))
    files.make_output_directory(path.parent)
    files.write_text(path, text)


def lines(comparison: Comparison) -> list[str]:
    """What is printed: the runs, where they differ, their scores, and what may be said of them. At most 80 columns wide."""
    from finetune_dataflow.engine.comparison import LABELS

    runs = comparison.runs
    printed = ["Runs:"]
    for number, run in enumerate(runs, 1):
        printed += _wrapped(f"{number}  {one_line(run.name)}: {_state(run)}", 2, 5)
        for text in ([run.result.verdict] if run.result else []) + list(run.notes):
            printed += _wrapped(one_line(text)[:MOST_OF_A_VERDICT], 5, 5)
    heads = labels(runs)
    for title, differing in (("Settings", comparison.settings), ("Fingerprints and versions", comparison.fingerprints)):
        rows = [(one_line(name), values) for name, values in differing.values.items()]
        printed += ["", _told(title, differing), *_table(heads, rows)]
    finished = _finished(comparison)
    for title, side in (("Tuned models, on their hold-out rows (95 % interval):", "tuned"), ("Base models:", "base")):
        rows = [
            (one_line(LABELS.get(name, name)), [_score(each.scores[side].get(name)) for each in finished.values()])
            for name in comparison.scores
        ]
        printed += ["", title, *_table([*finished], rows, whole=True)] if rows else []
    printed += ["", "Comparison:"]
    for sentence in comparison.on_rows:
        printed += _wrapped(sentence, 2, 2)
    for text in [*(each.sentence for each in comparison.pairs), *filter(None, [comparison.correction])]:
        printed += ["", *_wrapped(one_line(text), 2, 2)]
    return printed


def labels(runs: Sequence[Run]) -> list[str]:
    """What tables and figures call the runs: "1 first", …"""
    return [f"{number} {one_line(run.name)}" for number, run in enumerate(runs, 1)]


def _finished(comparison: Comparison) -> dict[str, Result]:
    """The results of the finished runs, by label."""
    pairs = zip(labels(comparison.runs), comparison.runs, strict=True)
    return {label: run.result for label, run in pairs if run.result is not None}


def one_line(text: str) -> str:
    r"""`text` safe to print, in one line: a line feed stands as `\n`."""
    return plain_text(text).replace("\n", r"\n").replace("\t", r"\t")


def _state(run: Run) -> str:
    if run.result is None:
        return f"not finished; {run.progress}."
    rows = "" if run.result.rows is None else f"{run.result.rows:,} hold-out row{'s' if run.result.rows != 1 else ''}; "
    return f"{rows}{run.progress}."


def _told(title: str, differing: Differing) -> str:
    others = [f"{differing.equal} are equal"]
    others += [f"{differing.partly} not recorded of every run"] if differing.partly else []
    counted = ", ".join(others)
    return (
        f"{title} that differ ({counted}):"
        if differing.values
        else f"No {title.lower().replace(' and ', ' or ')} differ ({counted})."
    )


def _score(score: Score | None) -> str:
    if score is None:
        return "-"
    interval = "" if score.low is None or score.high is None else f" ({_digits(score.low)} to {_digits(score.high)})"
    return f"{_digits(score.mean)}{interval}"


def _digits(number: float) -> str:
    return f"{number:.3f}" if abs(number) < 1000 else f"{number:.4g}"


def _wrapped(text: str, first: int, others: int) -> list[str]:
    indents = {"initial_indent": " " * first, "subsequent_indent": " " * others}
    return textwrap.wrap(text, WIDTH, **indents, break_long_words=False, break_on_hyphens=False)  # type: ignore[arg-type]


def _table(heads: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], whole: bool = False) -> Iterator[str]:
    """Rows of values under heads, in blocks of as many columns as fit, two at least; `whole` values are never cut."""
    if not rows:
        return
    labels = [_cut(label, LABEL_WIDTH) for label, _ in rows]
    label_width = max(map(_width, labels))
    most = (WIDTH - label_width) // 2 - BETWEEN
    cells = [[_cut(head, most) for head in heads]]
    cells += [list(values) if whole else _fitted([one_line(each) for each in values], most) for _, values in rows]
    widths = [max(map(_width, column)) for column in zip(*cells, strict=True)]
    for block in _blocks(widths, WIDTH - label_width):
        if block.start:
            yield ""
        for label, values in zip(["", *labels], cells, strict=True):
            padded = [_padded(each, width) for each, width in zip(values[block], widths[block], strict=True)]
            yield "".join([_padded(label, label_width), *(" " * BETWEEN + each for each in padded)]).rstrip()


def _blocks(widths: Sequence[int], room: int) -> Iterator[slice]:
    """Neighbouring columns that fit into the room together; a column that does not fit stands alone."""
    start = used = 0
    for place, width in enumerate(widths):
        if place > start and used + BETWEEN + width > room:
            yield slice(start, place)
            start, used = place, 0
        used += BETWEEN + width
    yield slice(start, len(widths))


def _width(text: str) -> int:
    """How many columns of a terminal a text takes."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else not unicodedata.combining(char) for char in text)


def _padded(text: str, width: int) -> str:
    return text + " " * (width - _width(text))


def _cut(text: str, width: int) -> str:
    """A text without its middle where it is too wide."""
    if _width(text) <= width:
        return text
    head = _start(text, width // 2 - 1)
    return f"{head}…{_start(text[::-1], width - 1 - _width(head))[::-1]}"


def _start(text: str, width: int) -> str:
    """As much of a text's start as is not wider."""
    used = 0
    for place, char in enumerate(text):
        used += _width(char)
        if used > width:
            return text[:place]
    return text


def _fitted(values: Sequence[str], width: int) -> list[str]:
    """Values that are not too wide; different ones stay different, by what stands where they first differ or by a digest."""
    pairs = zip(min(values), max(values), strict=False)
    common = next((place for place, (one, other) in enumerate(pairs) if one != other), len(min(values)))
    start = max(common - width // 3, 0)
    digests = [hashlib.sha256(each.encode()).hexdigest()[:8] for each in values]
    for cut in (
        [_cut(each, width) for each in values],
        [_from(each, start, width) for each in values],
    ):
        if len({*cut}) == len({*values}):
            return cut
    return [f"{_cut(each, width - 9)} {digest}" for each, digest in zip(values, digests, strict=True)]


def _from(text: str, start: int, width: int) -> str:
    """A text from one of its characters on."""
    rest = f"…{text[start:]}" if start else text
    return rest if _width(rest) <= width else f"{_start(rest, width - 1)}…"


def page(comparison: Comparison, path: Path) -> Page:
    """The page: what differs, scores, curves, paired differences, commands; `path` is where it will stand."""
    from finetune_dataflow import __version__
    from finetune_dataflow.engine.page import Page

    runs, pairs = comparison.runs, comparison.pairs
    notes = [
        f"{label}: {note}"
        for label, run in zip(labels(runs), runs, strict=True)
        for note in ([] if run.result else [_state(run)]) + list(run.notes)
    ]
    sections = [_runs(runs), _which_is_better(comparison), _differing(comparison), _scores(comparison), _curves(runs)]
    return Page(
        title=f"{len(runs)} runs compared",
        headline=_headline(comparison),
        tone=pairs[0].tone if len(pairs) == 1 else "none",  # type: ignore[arg-type]  # one of its four
        notes=notes,
        sections=[*(each for each in sections if each is not None), _commands(runs, path)],
        footer=f"Made by finetune-dataflow {__version__} (Apache-2.0).",
    )


def _headline(comparison: Comparison) -> str:
    pairs = comparison.pairs
    if not pairs:
        return " ".join(comparison.on_rows)
    if len(pairs) == 1:
        return pairs[0].sentence
    words = {"better": "is better", "worse": "is worse", "unclear": "is not clearly different", "none": "has no verdict"}
    said = ", ".join(f"{one_line(each.other.name)} {words[each.tone]}" for each in pairs)
    return f"Against {one_line(pairs[0].first.name)}, by ROUGE-L on the same rows: {said}."


def _runs(runs: Sequence[Run]) -> Section:
    from finetune_dataflow.engine.page import Prose, Section, Table

    named = list(zip(labels(runs), runs, strict=True))
    rows = [[label, one_line(str(run.directory)), _state(run)] for label, run in named]
    verdicts = [f"{label}: {one_line(run.result.verdict)[:MOST_OF_A_VERDICT]}" for label, run in named if run.result]
    return Section(
        "The runs",
        [
            Table(("run", "directory", "state"), rows),
            *([Prose("Each tuned model against its base:\n\n" + "\n\n".join(verdicts))] if verdicts else []),
        ],
    )


def _which_is_better(comparison: Comparison) -> Section:
    from finetune_dataflow.engine.figures import ROUGE_TYPES, difference_figure
    from finetune_dataflow.engine.page import Chart, Prose, Section, Table

    pairs, intro = comparison.pairs, " ".join(comparison.on_rows)
    if not pairs:
        return Section("Which is better", [], intro)
    names = {run.name: label for run, label in zip(comparison.runs, labels(comparison.runs), strict=True)}
    first = names[pairs[0].first.name]
    told = f"ROUGE-L minus that of {first}, paired by row."
    differences = {names[each.other.name]: each.difference for each in pairs}
    units = dict.fromkeys(differences, f"{ROUGE_TYPES['rougeL']} f-measure")
    as_they_are = dict(zip(differences, differences, strict=True))
    figure = difference_figure(differences, as_they_are, {}, pairs[0].rows, units, f"ROUGE-L against {first}")
    caveat = " Colours go by each interval alone, the table by the corrected p, too." if len(pairs) > 1 else ""
    columns = ("run", "difference", "95 % interval", "p", "p, corrected", "won", "equal", "lost")
    said = [*(each.sentence for each in pairs), *filter(None, [comparison.correction])]
    blocks: list[Block] = [
        Prose("\n\n".join(map(one_line, said))),
        Table(columns, [_pair(names[each.other.name], each) for each in pairs], told),
        Chart(figure, told + caveat, f"The difference in ROUGE-L to {first}, with its 95 % interval, of each run."),
    ]
    return Section("Which is better", blocks, intro)


def _pair(name: str, pair: Pair) -> list[Value]:
    from finetune_dataflow.engine.comparison import said_p
    from finetune_dataflow.engine.page import Cell

    mean, of_rows = pair.difference.mean, pair.outcomes
    return [
        name,
        Cell(f"{mean:+.3f}", mean, pair.tone),  # type: ignore[arg-type]  # one of its four
        f"{pair.difference.low:+.3f} to {pair.difference.high:+.3f}",
        Cell(said_p(pair.p_value), pair.p_value),
        Cell(said_p(pair.corrected_p), pair.corrected_p),
        *(float(count) for count in (of_rows.wins, of_rows.ties, of_rows.losses)),
    ]


def _differing(comparison: Comparison) -> Section:
    from finetune_dataflow.engine.page import Prose, Section, Table

    blocks: list[Block] = []
    for title, found in (("Settings", comparison.settings), ("Fingerprints and versions", comparison.fingerprints)):
        rows = [[name, *(each[:MOST_OF_A_VALUE] for each in values)] for name, values in found.values.items()]
        told = _told(title, found)
        blocks.append(Table(("name", *labels(comparison.runs)), rows, told) if rows else Prose(told))
    return Section("Where they differ", blocks)


def _scores(comparison: Comparison) -> Section | None:
    from finetune_dataflow.engine.comparison import LABELS
    from finetune_dataflow.engine.figures import UNITS, scores_figure
    from finetune_dataflow.engine.page import Cell, Chart, Section, Table

    finished = _finished(comparison)
    if not finished:
        return None
    told = "Scores on the hold-out rows of each run, with 95 % intervals. Those on other rows must not be compared."
    columns = ("score", *(f"{label}, {side}" for side in SIDES for label in finished))
    rows: list[list[Value]] = []
    for name in comparison.scores:
        scores = [each.scores[side].get(name) for side in SIDES for each in finished.values()]
        rows.append([LABELS.get(name, name), *(Cell(_score(each), each.mean if each else None) for each in scores)])
    blocks: list[Block] = [Table(columns, rows, told, kinds=[TEXT, *[NUMBER] * (len(columns) - 1)])]
    as_they_are = dict(zip(finished, finished, strict=True))
    for name in (each for each in CHARTED if each in comparison.scores):
        tuned, base = (
            {label: asdict(each.scores[side][name]) for label, each in finished.items() if name in each.scores[side]}
            for side in SIDES
        )
        units = dict.fromkeys(finished, UNITS[name])
        figure = scores_figure(base, tuned, as_they_are, units, LABELS[name])
        blocks.append(Chart(figure, told, f"The {LABELS[name]} of base and tuned model of each run, with 95 % intervals."))
    return Section("Scores", blocks)


def _curves(runs: Sequence[Run]) -> Section | None:
    from finetune_dataflow.engine.figures import loss_comparison_figure
    from finetune_dataflow.engine.page import Chart, Section

    histories = {label: run.history for label, run in zip(labels(runs), runs, strict=True) if run.history}
    if not histories:
        return None
    told = "Losses by update. Those on other rows, or in other tokens, must not be compared."
    alt = "Validation and training losses of each run, by update."
    return Section("The fits", [Chart(loss_comparison_figure(histories), told, alt)])


def _commands(runs: Sequence[Run], path: Path) -> Section:
    from finetune_dataflow.engine.page import Code, Section

    named = " ".join(shlex.quote(str(run.directory)) for run in runs)
    this = f"python run.py compare {named} --out {shlex.quote(str(path))}"
    blocks: list[Block] = [Code(this, "The command that made this page.")]
    again = [
        f"python run.py {'evaluate' if run.evaluates_only else 'train'} -c {shlex.quote(str(run.directory / 'config.yaml'))} "
        "--out ANOTHER_DIRECTORY"
        for run in runs
        if (run.directory / "config.yaml").is_file()
    ]
    if again:
        blocks.append(Code("\n".join(again), "The commands that repeat the runs."))
    return Section("Commands", blocks)
