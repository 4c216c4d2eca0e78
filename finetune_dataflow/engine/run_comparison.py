"""Runs side by side: what their directories tell, where they differ, and which tuned model scores better on the same rows.

Nothing is written. What stands in a run directory may have been written by an older version or by somebody else: what is
not there is left out, what cannot be is refused with the name of its file.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from finetune_dataflow.engine import paired
from finetune_dataflow.engine.comparison import FEWEST_ROWS, MOST_ROWS_NAMED, said_p, tone_of
from finetune_dataflow.engine.files import content_fingerprint
from finetune_dataflow.engine.paired import Floats, Interval, Outcomes
from finetune_dataflow.engine.run_directory import HISTORY, HOLD_OUT_INPUTS, LINEAGE, METRICS
from finetune_dataflow.errors import UserError

PREDICTIONS, CONFIG, ADAPTERS, USED_INPUTS = "predictions.jsonl", "config.yaml", "adapters", "used_inputs.txt"
SETS = ("train_set", "validation_set", "hold_out_set")
DECODING = ("max_tokens", "temperature", "top_p", "top_k", "min_p")
LARGEST = 1e300  # of a number in a file
LEVEL = 0.05  # a corrected p-value below it is called clear
MOST_RUNS_NAMED = 5


@dataclass(frozen=True)
class Score:
    """A score of all hold-out rows, and the ends of its interval where they were recorded."""

    mean: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Result:
    """What metrics.json says: the verdict, the number of hold-out rows, and the scores of `tuned` and `base` by metric."""

    verdict: str
    rows: int | None
    scores: dict[str, dict[str, Score]]


@dataclass(frozen=True)
class Prediction:
    """A hold-out row of predictions.jsonl: its two texts, its number in the data, and the tuned model's ROUGE-L."""

    input: str
    reference: str
    row: int
    rouge_l: float

    @property
    def texts(self) -> tuple[str, str]:
        """What makes a row the same row in another run, whatever its number in another file."""
        return self.input, self.reference


@dataclass(frozen=True)
class Run:
    """A run as its directory tells of it.

    name: the directory's, with as many of its parents as set it apart. settings, fingerprints: by name, as far as they were
    recorded. result: None while the run is unfinished. history: the events of metrics.jsonl. predictions: in the order of
    their texts; None where there are none. seen: how many of the hold-out's inputs the fit used; None where that is unknown.
    """

    name: str
    directory: Path
    settings: dict[str, Any]
    fingerprints: dict[str, str]
    result: Result | None
    history: list[dict[str, Any]]
    predictions: list[Prediction] | None
    seen: int | None
    notes: tuple[str, ...] = ()

    @property
    def evaluates_only(self) -> bool:
        """Whether it evaluated an adapter that was saved before, so that there is no fit of its own."""
        return bool(self.settings.get("start") == "presaved")

    @property
    def progress(self) -> str:
        """How far the fit came: "the fit ended after 50 updates, …"."""
        updates = max((each["step"] for each in self.history if each["event"] in ("train", "validation")), default=None)
        if updates is None:
            return "no fit of its own" if self.evaluates_only else "no update was recorded"
        ended = any(each["event"] == "end" for each in self.history)
        said = f"{'the fit ended after' if ended else 'so far'} {updates:,} update{'s' if updates != 1 else ''}"
        losses = [each for each in self.history if each["event"] == "validation" and each["loss"] is not None]
        if not losses:
            return said
        least = min(losses, key=lambda each: float(each["loss"]))
        before = f"{losses[0]['loss']:.3f} -> " if least is not losses[0] else ""
        return f"{said}, validation loss {before}{least['loss']:.3f} (least, after update {least['step']:,})"


@dataclass(frozen=True)
class Pair:
    """The tuned model of `other` against that of `first` on the same rows, by ROUGE-L.

    difference: other minus first with its 95 % interval. p_value: of a paired permutation test, two-sided; corrected_p: for
    the `comparisons` that were made. rows_needed: how many would make a difference like this clear.
    """

    first: Run
    other: Run
    rows: int
    difference: Interval
    p_value: float
    outcomes: Outcomes
    rows_needed: int | None
    comparisons: int = 1
    corrected_p: float = math.nan

    @property
    def tone(self) -> str:
        """`better`, `worse` or `unclear`; `none` where the rows cannot tell. Of several, the corrected p must be clear, too."""
        if self.rows < FEWEST_ROWS or self.first.seen or self.other.seen:
            return "none"
        clear = self.comparisons == 1 or self.corrected_p < LEVEL
        return tone_of(asdict(self.difference)) if clear else "unclear"

    @property
    def sentence(self) -> str:
        """What the figures say, in one sentence, and a second one where more rows would say more."""
        first, other, of_rows = self.first.name, self.other.name, self.outcomes
        if self.rows < FEWEST_ROWS:
            counted = f"{self.rows} row{'s are' if self.rows != 1 else ' is'}"
            return f"No verdict on {other} against {first}: {counted} too few to tell; at least {FEWEST_ROWS} are needed."
        mean, low, high = self.difference.mean, self.difference.low, self.difference.high
        p = said_p(self.p_value) + (f", corrected {said_p(self.corrected_p)}" if self.comparisons > 1 else "")
        figures = (
            f"its ROUGE-L is {abs(mean):.3f} {'higher' if mean >= 0 else 'lower'} on {self.rows} rows {self._sight()} (95 % "
            f"interval {low:+.3f} to {high:+.3f}, {p}; better on {of_rows.wins}, equal on {of_rows.ties}, worse on "
            f"{of_rows.losses})."
        )
        if self.tone == "none":
            return f"No verdict on unseen rows, {other} against {first}: {figures}"
        if self.tone != "unclear":
            return f"{other} is {self.tone} than {first}: {figures}"
        by_itself = tone_of(asdict(self.difference)) != "unclear"
        once = f" once {self.comparisons} comparisons are allowed for" if by_itself else ""
        return f"There is no clear difference between {other} and {first}{once}: {figures}{'' if by_itself else self._more()}"

    def _sight(self) -> str:
        """Whether the fits saw the rows."""
        used = [each for each in (self.first, self.other) if each.seen]
        unknown = [each.name for each in (self.first, self.other) if each.seen is None]
        if used:
            return "of which " + " and ".join(f"the fit of {each.name} used {each.seen}" for each in used)
        return f"(which rows {' and '.join(unknown)} learned is not known)" if unknown else "that neither saw in its fit"

    def _more(self) -> str:
        if self.rows_needed is None or self.rows_needed <= self.rows:
            return ""
        if self.rows_needed > MOST_ROWS_NAMED:
            return f" A difference as small as this would not be clear on {MOST_ROWS_NAMED:,} rows either."
        return f" The hold-out is too small to tell: a difference like this would be clear on about {self.rows_needed:,} rows."


@dataclass(frozen=True)
class Differing:
    """Values by name, as text, one for each run, that are not the same in all runs; of the others, how many are equal.

    partly: how many are equal where they were recorded, but were not in every run.
    """

    values: dict[str, list[str]]
    equal: int
    partly: int


@dataclass(frozen=True)
class Comparison:
    """Runs side by side. on_rows: sentences on whose scores may be compared; pairs: each run against one, where they may."""

    runs: list[Run]
    settings: Differing
    fingerprints: Differing
    on_rows: list[str]
    pairs: list[Pair]

    @property
    def scores(self) -> list[str]:
        """The names of all metrics, those of the first runs first."""
        results = [each.result for each in self.runs if each.result]
        return list(dict.fromkeys(name for result in results for part in result.scores.values() for name in part))

    @property
    def correction(self) -> str:
        """What was done about several comparisons; nothing where there is one, or none that decides anything."""
        if len(self.pairs) < 2 or self.pairs[0].rows < FEWEST_ROWS:
            return ""
        return (
            f"{len(self.pairs)} comparisons were made, and each may seem clear by chance: their p-values are corrected by "
            f"Holm's method (1979), and a difference counts as clear only where the corrected one is below {LEVEL}, too."
        )


def compared(runs: Sequence[Run]) -> Comparison:
    """Where runs differ, and each tuned model against the first run's, where both were scored on the same rows.

    The first run is the first that is finished.
    """
    groups = _groups(runs)
    pairs = []
    if groups and len(groups[0]) > 1 and not any(_texts_alone(runs[each]) for each in groups[0]):
        first, *others = (runs[each] for each in groups[0])
        pairs = [_pair(first, other) for other in others]
        corrected = holm([each.p_value for each in pairs])
        pairs = [replace(each, comparisons=len(pairs), corrected_p=p) for each, p in zip(pairs, corrected, strict=True)]
    settings, fingerprints = differing([each.settings for each in runs]), differing([each.fingerprints for each in runs])
    shortened = {name: [each[:12] for each in values] for name, values in fingerprints.values.items()}
    return Comparison(list(runs), settings, replace(fingerprints, values=shortened), _on_rows(runs, groups), pairs)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number by Holm, S. 1979. A simple sequentially rejective multiple test procedure.

    Scandinavian Journal of Statistics 6. The least is multiplied by how many there are, the next by one less, and so on;
    none is less than one before it, nor more than 1.
    """
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda each: p_values[each])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = highest
    return corrected


def read_runs(directories: Sequence[Path]) -> list[Run]:
    """The runs in some directories, in their order.

    Raises UserError for fewer than two, for one named twice, for a directory that holds no run, and for a damaged file.
    """
    if len(directories) < 2:
        found = "one" if directories else "none"
        raise UserError(f"compare takes two runs or more, and found {found}. Expected: compare RUN RUN ... [--out FILE.html]")
    places = [each.resolve() for each in directories]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise UserError(f"{directories[number]} is named twice. Name each run once.")
    return [read_run(*each) for each in zip(directories, unique_names(places), strict=True)]


def read_run(directory: Path, name: str) -> Run:
    """The run in a directory. Raises UserError where it holds none, or a file of it is damaged."""
    _check_is_run(directory)
    lineage = _object(directory / LINEAGE)
    for key in ("names", "settings", "fingerprints"):
        _require(isinstance(lineage.get(key), dict), directory / LINEAGE, f"{key!r} is {_short(lineage.get(key))}", "an object")
    result, recorded = _result(directory / METRICS)
    evaluation = recorded or _part(lineage, "evaluation")
    predictions = _predictions(directory / PREDICTIONS) if result else None
    if result and predictions is not None and result.rows not in (None, len(predictions)):
        found = f"{directory / PREDICTIONS} has {len(predictions)} rows, but {METRICS} tells of {result.rows}"
        raise UserError(f"{found}: one of them is damaged. Expected a line for each hold-out row.")
    settings = {
        **{key: value for key, value in evaluation.items() if key not in SETS},
        **{key: value for part in ("names", "settings", "unbinding") for key, value in _part(lineage, part).items()},
        "start": "presaved" if "adapter" in lineage["fingerprints"] else "base",
        **_adapter_path(directory / CONFIG),
    }
    changed = result and lineage.get("scores") not in (None, content_fingerprint([directory / METRICS]))
    return Run(
        name=name,
        directory=directory,
        settings=settings,
        fingerprints=_fingerprints(lineage, evaluation),
        result=result,
        history=_history(directory / HISTORY),
        predictions=predictions,
        seen=_seen(directory, settings),
        notes=(f"{METRICS} was changed after {LINEAGE} was written, or the run was cut short.",) if changed else (),
    )


def unique_names(places: Sequence[Path]) -> list[str]:
    """The last part of each path, with as many parts before it as set it apart from the others. The paths must differ."""
    depths = [1] * len(places)
    while True:
        names = ["/".join(place.parts[-depth:]) for place, depth in zip(places, depths, strict=True)]
        again = [each for each, name in enumerate(names) if names.count(name) > 1 and depths[each] < len(places[each].parts)]
        if not again:
            return names
        for each in again:
            depths[each] += 1


def differing(values: Sequence[Mapping[str, Any]]) -> Differing:
    """Where some mappings differ; one that has nothing under a name does not differ by it."""
    found: dict[str, list[str]] = {}
    equal = partly = 0
    for name in dict.fromkeys(name for each in values for name in each):
        known = [each[name] for each in values if name in each]
        if all(_same(value, known[0]) for value in known):
            equal, partly = (equal + 1, partly) if len(known) == len(values) else (equal, partly + 1)
        else:
            found[name] = _texts([(each[name],) if name in each else () for each in values])
    return Differing(found, equal, partly)


def _same(one: object, other: object) -> bool:
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def _texts(values: Sequence[tuple[Any, ...]]) -> list[str]:
    """Values as people write them, a dash for none; in quotes where different ones would look alike otherwise."""
    known = [each[0] for each in values if each]
    plain = {json.dumps(each): each if isinstance(each, str) and each else _text(each) for each in known}
    alike = len(set(plain.values())) < len(plain)
    return [("-" if not each else json.dumps(each[0]) if alike else plain[json.dumps(each[0])]) for each in values]


def _text(value: object) -> str:
    return "not set" if value is None else json.dumps(value, ensure_ascii=False)


def _groups(runs: Sequence[Run]) -> list[list[int]]:
    """The places of finished runs that were scored on the same rows, as far as their rows are known."""
    groups: dict[tuple[tuple[str, str], ...], list[int]] = {}
    for place, run in enumerate(runs):
        if run.predictions is not None:
            groups.setdefault(tuple(each.texts for each in run.predictions), []).append(place)
    return list(groups.values())


def _texts_alone(run: Run) -> bool:
    """Whether rows have no prompt, so that there are no replies to compare."""
    return bool(run.settings.get("train_type") == "self-supervised")


def _on_rows(runs: Sequence[Run], groups: Sequence[Sequence[int]]) -> list[str]:
    """Sentences on whose scores may be compared, and why not the others'."""
    finished = [each for each, run in enumerate(runs) if run.result]
    if len(finished) < 2:
        one = f"Only {_named(finished)} is finished" if finished else "No run is finished"
        return [f"{one}: there are no scores to compare."]
    said = []
    for group in groups:
        if len(group) > 1:
            rows = runs[group[0]].predictions or []
            said.append(f"{_named(group)} were scored on the same {len(rows):,} hold-out row{'s' if len(rows) != 1 else ''}.")
            said += _within(runs, group)
        if group is not groups[0]:
            said += _apart(runs, groups[0], group)
    unknown = [each for each in finished if runs[each].predictions is None]
    if unknown:
        have = "has" if len(unknown) == 1 else "have"
        said.append(f"{_named(unknown)} {have} no {PREDICTIONS}, so on which rows they were scored is not known.")
    return [f"{each[0].upper()}{each[1:]}" for each in said]


def _apart(runs: Sequence[Run], first: Sequence[int], group: Sequence[int]) -> list[str]:
    """Why some runs must not be compared with the first ones."""
    one, other = (runs[each[0]] for each in (first, group))
    theirs, ours = (Counter(each.texts for each in run.predictions or []) for run in (one, other))
    met, rows = (theirs & ours).total(), ours.total()
    said = [
        f"the scores of {_named(group)} must not be compared with those of {_named(first)}: of {rows:,} hold-out "
        f"row{'s' if rows != 1 else ''}, {met:,} {'is' if met == 1 else 'are'} among the {theirs.total():,} there."
    ]
    if one.fingerprints.get("hold-out set", "") == other.fingerprints.get("hold-out set"):
        said.append(f"By their fingerprints these rows are the same, so {PREDICTIONS} was changed in one of them.")
    return [*said, *([f"to compare {_named(group)}, name one of them first."] if len(group) > 1 else [])]


def _within(runs: Sequence[Run], group: Sequence[int]) -> list[str]:
    """What to know of runs that were scored on the same rows before their scores are compared."""
    said, several = [], [runs[each] for each in group]
    if len({each.fingerprints.get("hold-out set") for each in several}) > 1:
        said.append(
            "As tokens these rows are not the same (by prompt, template or tokenizer): compare the scores of replies, not losses."
        )
    other = [name for name in DECODING if len({_text(each.settings.get(name)) for each in several}) > 1]
    if other:
        said.append(f"Their replies were not generated alike ({', '.join(other)} differ): differences in score include that.")
    if any(map(_texts_alone, several)):
        said.append("Their rows have no prompts, so there are no replies to compare: compare the losses.")
    return said


def _named(places: Sequence[int]) -> str:
    """What a sentence calls some runs: "run 1", "runs 1 and 2", "runs 1, 2 and 4"."""
    numbers = [str(each + 1) for each in places]
    return f"run {numbers[0]}" if len(numbers) == 1 else f"runs {', '.join(numbers[:-1])} and {numbers[-1]}"


def _pair(first: Run, other: Run) -> Pair:
    one, two = _parts(first), _parts(other)
    return Pair(
        first,
        other,
        rows=len(one),
        difference=paired.difference_interval(one, two, _mean),
        p_value=paired.permutation_p(one, two, _mean),
        outcomes=paired.outcomes(one[:, 0], two[:, 0]),
        rows_needed=paired.rows_needed(one, two, _mean),
    )


def _parts(run: Run) -> Floats:
    """What the mean ROUGE-L is made of, [rows, 2]."""
    return np.array([(each.rouge_l, 1.0) for each in run.predictions or []])


def _mean(sums: Floats) -> Floats:
    return sums[..., 0] / sums[..., 1]


def _check_is_run(directory: Path) -> None:
    if not directory.exists():
        raise UserError(f"There is no directory {directory}. Expected the directory of a run.")
    if not directory.is_dir():
        raise UserError(f"{directory} is a file. Expected the directory of a run.")
    if (directory / LINEAGE).is_file():
        return
    runs = [str(each.parent) for each in sorted(directory.glob(f"*/{LINEAGE}"))]
    more = ", …" if len(runs) > MOST_RUNS_NAMED else ""
    hint = f" There are runs in it: {', '.join(runs[:MOST_RUNS_NAMED])}{more}." if runs else ""
    if (directory.resolve().parent / LINEAGE).is_file():
        hint = f" Did you mean {directory.parent}?"
    raise UserError(
        f"{directory} is not the directory of a run: there is no {LINEAGE} in it, which every run begins with. Expected "
        f"{LINEAGE}, and {METRICS} and {PREDICTIONS} of a finished run.{hint}"
    )


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged: byte {error.start} is not UTF-8.") from error


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    try:
        found = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}. Expected the JSON object that the run wrote.") from error
    _require(isinstance(found, dict), path, f"it holds {_short(found)}", "a JSON object")
    return dict(found)


def _lines(path: Path, half_a_line_may_end_it: bool = False) -> list[tuple[int, dict[str, Any]]]:
    """The numbers and objects of a JSONL file's lines, which end at line feeds alone; no file has none."""
    if not path.is_file():
        return []
    found = []
    *lines, last = _read(path).split("\n")
    for number, line in enumerate([*lines, *([] if half_a_line_may_end_it or not last else [last])], 1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is damaged: line {number} is no JSON ({error}).") from error
        _require(isinstance(value, dict), path, f"line {number} holds {_short(value)}", "a JSON object")
        found.append((number, value))
    return found


def _require(holds: bool, path: Path, found: str, expected: str) -> None:
    if not holds:
        raise UserError(f"{path} is damaged: {found}. Expected {expected}.")


def _short(value: object) -> str:
    return "nothing" if value is None else f"{json.dumps(value)[:40]}"


def _part(lineage: Mapping[str, Any], name: str) -> dict[str, Any]:
    """An object in another; an empty one where an older version wrote none."""
    found = lineage.get(name)
    return found if isinstance(found, dict) else {}


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def _result(path: Path) -> tuple[Result | None, dict[str, Any]]:
    """What metrics.json says, and how the evaluation was made; None where the run is unfinished."""
    if not path.is_file():
        return None, {}
    found = _object(path)
    for name in ("base", "finetuned"):
        scores = found.get(name)
        _require(isinstance(scores, dict), path, f"{name!r} is {_short(scores)}", "an object of scores")
        for metric, value in _part(found, name).items():
            _require(_number(value), path, f"{metric!r} of {name!r} is {_short(value)}", "a number")
    _require(isinstance(found.get("verdict"), str), path, f"'verdict' is {_short(found.get('verdict'))}", "a sentence")
    rows = found.get("hold_out_rows")
    whole = isinstance(rows, int) and not isinstance(rows, bool)
    _require(rows is None or whole, path, f"'hold_out_rows' is {_short(rows)}", "a number of rows")
    tuned, base = ({name: _score(found, name, side) for name in found[side]} for side in ("finetuned", "base"))
    return Result(found["verdict"], rows, {"tuned": tuned, "base": base}), _part(found, "evaluation")


def _score(metrics: dict[str, Any], name: str, side: str) -> Score:
    interval = _part(_part(_part(metrics, "intervals"), name), side)
    low, high = interval.get("low"), interval.get("high")
    return Score(float(metrics[side][name]), *((low, high) if _number(low) and _number(high) else ()))


def _predictions(path: Path) -> list[Prediction] | None:
    """The rows of predictions.jsonl, sorted; None where there is no such file."""
    found = []
    for number, each in _lines(path):
        values = [each.get(name) for name in ("input", "reference", "row", "finetuned_rougeL")]
        holds = all(isinstance(text, str) for text in values[:2]) and all(map(_number, values[2:]))
        _require(holds, path, f"line {number} has {_short(each)}", "input, reference, row and finetuned_rougeL")
        found.append(Prediction(*values))  # type: ignore[arg-type]  # checked
    return sorted(found, key=lambda each: (*each.texts, each.row)) if path.is_file() else None


def _history(path: Path) -> list[dict[str, Any]]:
    """The events of metrics.jsonl; a last line that is being written is left out."""
    events = []
    for number, each in _lines(path, half_a_line_may_end_it=True):
        event, step, loss = each.get("event"), each.get("step"), each.get("loss")
        curve = event in ("train", "validation")
        holds = isinstance(event, str) and (not curve or (isinstance(step, int) and _number(step) and _loss(loss)))
        _require(holds, path, f"line {number} has {_short(each)}", "an event, and of a loss the number of updates before it")
        finite = isinstance(loss, int | float) and math.isfinite(loss)
        events.append({"event": event, "step": step, "loss": loss if finite else None})
    return events


def _loss(value: object) -> bool:
    return _number(value) or (isinstance(value, float) and not math.isfinite(value))


def _adapter_path(path: Path) -> dict[str, str]:
    """The adapter that config.yaml names; all else in it stands in lineage.json, too."""
    if not path.is_file():
        return {}
    try:
        found = yaml.safe_load(_read(path))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {str(error)[:200]}.") from error
    named = found.get("adapter_path") if isinstance(found, dict) else None
    return {"adapter_path": named} if isinstance(named, str) else {}


def _fingerprints(lineage: Mapping[str, Any], evaluation: Mapping[str, Any]) -> dict[str, str]:
    """What went into a run, by fingerprints and versions."""
    found = {
        "data": lineage.get("dataset"),
        "split": lineage.get("split"),
        "hold-out set": evaluation.get("hold_out_set"),
        **{name.replace("_", " "): lineage.get(name) for name in ("tokenizer", "chat_template", "prompt", "adapter")},
        **{name.replace("_", " "): value for name, value in lineage["fingerprints"].items()},
        "code": lineage.get("code"),
        **_part(lineage, "versions"),
    }
    return {name: value for name, value in found.items() if isinstance(value, str)}


def _seen(directory: Path, settings: Mapping[str, Any]) -> int | None:
    """How many of the hold-out's inputs the fit used; None where the adapter or the run does not say."""
    adapter = Path(settings["adapter_path"]) if "adapter_path" in settings else directory / ADAPTERS
    files = adapter / USED_INPUTS, directory / HOLD_OUT_INPUTS
    if not all(each.is_file() for each in files):
        return None
    used, held_out = (set(_read(each).split()) for each in files)
    return len(used & held_out)
