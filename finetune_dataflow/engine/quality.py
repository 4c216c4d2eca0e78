"""What is wrong, or odd, in the rows themselves, found before anything is trained on them."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from finetune_dataflow.engine.many_rows import watched
from finetune_dataflow.engine.splitting import normalised
from finetune_dataflow.errors import UserError

Severity = Literal["warning", "notice"]

# Marks of well-known prompt formats; a tokenizer may turn them into control tokens wherever they stand.
WELL_KNOWN_CONTROL_STRINGS = (
    *("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<s>", "</s>", "<bos>", "<eos>", "<pad>", "<unk>"),
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"),
    *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
    *("<start_of_turn>", "<end_of_turn>"),
)
FEWEST_FOR_OUTLIERS = 20  # rows; below, no length is usual
OUTLIER_DEVIATIONS = 5  # robust standard deviations of the log length
OUTLIER_FACTOR = 4  # and at least this many times shorter or longer than the median
ROWS_NAMED = 5  # in a message
LONGEST_EXAMPLE = 60  # characters

_BIDI = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
# UTF-8 read as Windows-1252: each pattern is the lead byte of a sequence with what its next byte became.
_MOJIBAKE = re.compile(
    "Ã[\u0080-\u00bf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013-\u203a\u20ac\u2122]"
    "|Â[\u0080-\u00bf]|â€|â\u0080|â„¢|â\u201a¬|ðŸ|ð\u009f|ï»¿"
)
_REPLACED = re.compile("[\ufffd\ud800-\udfff]")
_PRIVATE = re.compile("[\ue000-\uf8ff\U000f0000-\U000ffffd\U00100000-\U0010fffd]")
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f-\x9f\ufeff]")
_ESCAPE = re.compile("\x1b")
_TAGS = "p|br|hr|div|span|a|b|i|u|em|strong|ul|ol|li|table|tbody|thead|tr|td|th|h[1-6]|img|script|style|font|html|head|body"
_ENTITIES = r"nbsp|amp|lt|gt|quot|apos|mdash|ndash|#\d{1,7}|#x[0-9a-f]{1,6}"
_HTML = re.compile(rf"</?(?:{_TAGS})(?:\s[^<>\n]*)?/?>|&(?:{_ENTITIES});", re.IGNORECASE)

# kind: how serious it is, and what is said of its rows.
_KINDS: Mapping[str, tuple[Severity, str]] = {
    "duplicate": ("warning", "repeat an earlier row, input and output"),
    "conflicting_output": ("warning", "have an input that stands in the data with different outputs"),
    "empty_input": ("warning", "have an empty input"),
    "empty_output": ("warning", "have an empty output"),
    "echo": ("warning", "have an output equal to their input"),
    "control_string": ("warning", "hold a control string of a prompt format"),
    "replacement_character": ("warning", "hold characters that were lost in decoding (U+FFFD or half a surrogate pair)"),
    "mojibake": ("warning", "hold UTF-8 that was read in another encoding"),
    "bidi_control": ("warning", "hold invisible controls of the writing direction"),
    "control_character": ("warning", "hold control characters"),
    "ansi_escape": ("warning", "hold terminal escape sequences"),
    "private_use": ("notice", "hold private-use characters, which mean nothing outside their font"),
    "short_input": ("notice", "have an unusually short input"),
    "long_input": ("notice", "have an unusually long input"),
    "short_output": ("notice", "have an unusually short output"),
    "long_output": ("notice", "have an unusually long output"),
    "white_space": ("notice", "have an output with white space at its start or end"),
    "html": ("notice", "hold remnants of HTML"),
}


@dataclass(frozen=True)
class Finding:
    """One kind of oddity and the numbers of the rows that have it; the message is safe to print."""

    kind: str
    rows: tuple[int, ...]
    message: str
    severity: Severity


@dataclass(frozen=True)
class QualityReport:
    """What was found in `row_count` rows: warnings first, each kind once."""

    row_count: int
    findings: tuple[Finding, ...]

    def lines(self) -> list[str]:
        """Plain lines for a terminal."""
        if not self.findings:
            return [f"data quality: nothing found in {self.row_count:,} rows"]
        counts = Counter(each.severity for each in self.findings)
        head = f"data quality: {_count(counts['warning'], 'warning')}, {_count(counts['notice'], 'notice')} "
        return [f"{head}in {_count(self.row_count, 'row')}", *(f"  {each.severity}: {each.message}" for each in self.findings)]

    def by_row(self) -> dict[int, list[str]]:
        """The kinds of each row that has any, for the ledger."""
        kinds: dict[int, list[str]] = defaultdict(list)
        for finding in self.findings:
            for row in finding.rows:
                kinds[row].append(finding.kind)
        return dict(sorted(kinds.items()))

    def raise_if_strict(self, strict: bool) -> None:
        """Raise UserError with all warnings where `strict` and there are any."""
        warnings = [each.message for each in self.findings if each.severity == "warning"]
        if strict and warnings:
            raise UserError("\n  ".join([f"strict=true, and the data has {_count(len(warnings), 'warning')}:", *warnings]))


def data_quality(rows: pd.DataFrame, control_strings: Collection[str] = ()) -> QualityReport:
    """What is odd in the columns row, input_text and output_text; `control_strings` are the tokenizer's own.

    Lengths are outliers by a robust rule on log(1 + characters): farther from the median than 5 x 1.4826 x the median
    absolute deviation, and at least 4 times shorter or longer than the median; of 20 rows or more; empty texts apart.
    """
    numbers: list[int] = rows["row"].tolist()
    inputs: list[str] = rows["input_text"].tolist()
    outputs: list[str] = rows["output_text"].tolist()
    found: dict[str, list[int]] = defaultdict(list)  # kind -> places in the columns
    strings = Counter[str]()
    control = _ControlStrings(control_strings)
    for place, texts in enumerate(watched(zip(inputs, outputs, strict=True), len(inputs), "data quality")):
        for kind in {kind for text in texts for kind in _odd_characters(text)}:
            found[kind].append(place)
        if held := {match for text in texts for match in control.held_by(text)}:
            found["control_string"].append(place)
            strings.update(held)
    _compare_rows(inputs, outputs, found)
    for side, column in (("input", inputs), ("output", outputs)):
        short, long = _length_outliers(column)
        found[f"short_{side}"], found[f"long_{side}"] = short, long
    named = {"control_string": ", ".join(f"{shown(text, 40)} in {count:,}" for text, count in strings.most_common(5))}
    findings = []
    for kind, (severity, _) in _KINDS.items():
        if places := found[kind]:
            having = tuple(numbers[place] for place in places)
            example = _example(kind, inputs[places[0]], outputs[places[0]])
            findings.append(Finding(kind, having, _message(kind, having, example, named.get(kind)), severity))
    return QualityReport(len(rows), tuple(sorted(findings, key=lambda each: each.severity == "notice")))


def shown(text: str, limit: int) -> str:
    """`text` safe to print, in at most `limit` characters: what a terminal would obey or hide stands as an escape (\\x1b)."""
    # No character is shown in less than one; the cut comes first because a field may be large.
    parts = [char if char.isprintable() else ascii(char)[1:-1] for char in text[: limit + 1]]
    if len(text) <= limit and sum(map(len, parts)) <= limit:
        return "".join(parts)
    kept, length = [], 1
    for part in parts:
        if length + len(part) > limit:
            break
        kept.append(part)
        length += len(part)
    return "".join(kept) + "…"


def _odd_characters(text: str) -> Iterable[str]:
    """The kinds that the characters of a text show. Most texts are plain ASCII and pass by two quick checks."""
    if not text.isprintable():
        if _CONTROL.search(text):
            yield "control_character"
        if _ESCAPE.search(text):
            yield "ansi_escape"
    if not text.isascii():
        if _REPLACED.search(text):
            yield "replacement_character"
        if _MOJIBAKE.search(text):
            yield "mojibake"
        if _BIDI.search(text):
            yield "bidi_control"
        if _PRIVATE.search(text):
            yield "private_use"
    if ("<" in text or "&" in text) and _HTML.search(text):
        yield "html"


class _ControlStrings:
    """A set of strings to find. A tokenizer may have thousands, for which one regular expression would be slow."""

    def __init__(self, strings: Collection[str]) -> None:
        self.strings = {each for each in strings if each.strip()} | set(WELL_KNOWN_CONTROL_STRINGS)
        self.starts = re.compile(f"[{re.escape(''.join(sorted({each[0] for each in self.strings})))}]")
        lengths: dict[str, set[int]] = defaultdict(set)
        for each in self.strings:
            lengths[each[0]].add(len(each))
        # The longest first, so that a string is not taken for its own beginning.
        self.lengths = {start: sorted(each, reverse=True) for start, each in lengths.items()}

    def held_by(self, text: str) -> set[str]:
        """Those of the strings that the text holds."""
        held = set()
        for match in self.starts.finditer(text):
            start = match.start()
            for length in self.lengths[match[0]]:
                if (piece := text[start : start + length]) in self.strings:
                    held.add(piece)
                    break
        return held


def _compare_rows(inputs: Sequence[str], outputs: Sequence[str], found: dict[str, list[int]]) -> None:
    """Add what a row's two texts, or two rows, have in common."""
    groups: dict[bytes, int] = {}  # normalised input -> its number; texts are kept as their hashes
    outputs_of: list[int] = []  # how many different outputs, stripped, each group has
    pairs: set[bytes] = set()
    group_of = np.full(len(inputs), -1, np.int64)
    for place, (question, reply) in enumerate(watched(zip(inputs, outputs, strict=True), len(inputs), "rows compared")):
        key, stripped = normalised(question), reply.strip()
        if not stripped:
            found["empty_output"].append(place)
        elif len(stripped) != len(reply):
            found["white_space"].append(place)
        if not key:
            found["empty_input"].append(place)
            continue
        if stripped and question.strip() == stripped:
            found["echo"].append(place)
        group = groups.setdefault(_digest(key), len(groups))
        group_of[place] = group
        if group == len(outputs_of):
            outputs_of.append(0)
        pair = group.to_bytes(8, "little") + _digest(stripped)
        if pair in pairs:
            found["duplicate"].append(place)
        else:
            pairs.add(pair)
            outputs_of[group] += 1
    conflicting = np.array([*outputs_of, 0])[group_of] > 1  # the last is for rows without an input
    found["conflicting_output"] += np.flatnonzero(conflicting).tolist()


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _length_outliers(texts: Sequence[str]) -> tuple[list[int], list[int]]:
    """The places of the unusually short and the unusually long texts."""
    lengths = np.array([len(text.strip()) for text in texts], np.int64)
    filled = np.flatnonzero(lengths)
    if len(filled) < FEWEST_FOR_OUTLIERS:
        return [], []
    log_length = np.log1p(lengths[filled])
    distance = log_length - np.median(log_length)
    spread = 1.4826 * float(np.median(np.abs(distance)))  # of a normal distribution, its standard deviation
    limit = max(OUTLIER_DEVIATIONS * spread, math.log(OUTLIER_FACTOR))
    return filled[distance < -limit].tolist(), filled[distance > limit].tolist()


def _example(kind: str, question: str, reply: str) -> str:
    """The part of the first row that shows the finding, or nothing where the row has nothing to show."""
    patterns = {"mojibake": _MOJIBAKE, "bidi_control": _BIDI, "control_character": _CONTROL, "ansi_escape": _ESCAPE}
    patterns |= {"private_use": _PRIVATE, "replacement_character": _REPLACED, "html": _HTML}
    if kind not in patterns:
        text = reply if kind in ("short_output", "long_output") else question
        silent = kind.startswith("empty") or kind in ("control_string", "white_space")
        return "" if silent else shown(text, LONGEST_EXAMPLE)
    for text in (question, reply):
        if match := patterns[kind].search(text):
            return shown(text[max(0, match.start() - 15) : match.end() + 25], LONGEST_EXAMPLE)
    return ""


def _message(kind: str, rows: Sequence[int], example: str, named: str | None) -> str:
    said = _KINDS[kind][1]
    if len(rows) == 1:
        first, _, rest = said.partition(" ")
        said = {"have": "has", "hold": "holds", "repeat": "repeats"}[first] + " " + rest
        said = said.replace("their", "its")
    more = f" and {len(rows) - ROWS_NAMED:,} more" if len(rows) > ROWS_NAMED else ""
    listed = ", ".join(str(row) for row in rows[:ROWS_NAMED])
    message = f"{_count(len(rows), 'row')} {said}: {'row' if len(rows) == 1 else 'rows'} {listed}{more}"
    if named:
        return f"{message} ({named})"
    return f"{message}, such as '{example}'" if example else message


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
