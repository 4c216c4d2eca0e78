"""Metrics of the user's own: `evaluate` metrics by name or path, functions in a file, functions of a node.

Loading a script, or a metric of the hub, runs its code: only because the user named it, so a name must never come from data.
"""

from __future__ import annotations

import hashlib
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from numbers import Real
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, TypeAlias

import evaluate
import numpy as np
import pandas as pd

from finetune_dataflow.engine.files import user_path
from finetune_dataflow.engine.settings import Scoring
from finetune_dataflow.engine.text_metrics import TAKEN, Metric, row_mean, utf8
from finetune_dataflow.errors import UserError, nearest


class _Blaming(AbstractContextManager[None]):
    """Whatever the code of a user raises becomes a UserError: `what`, the line in `file` where known, and the cause."""

    def __init__(self, what: str, file: Path | None = None, advice: str = "") -> None:
        self.what, self.file, self.advice = what, file, advice

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not isinstance(error, Exception):
            return
        lines = [frame.lineno for frame in traceback.extract_tb(trace) if frame.filename == str(self.file)]
        place = f" in line {lines[-1]}" if lines else ""
        cause = str(error).strip().rstrip(".")
        raise UserError(f"{self.what}{place}: {type(error).__name__}{f': {cause}' * bool(cause)}.{self.advice}") from error


def load_metrics(names: Sequence[str]) -> dict[str, Any]:
    """The metrics that a user named, by name: an `evaluate` module or, for `FILE.py:function`, the function.

    A name is that of an `evaluate` metric on the hub (`accuracy`, `someone/metric`), the path of a local script of one
    (`./my_metric.py`, which needs no hub), or `FILE.py:function` with function(predictions: list[str], references: list[str])
    -> list[float], one score a row. Loading a script or a metric of the hub runs its code: only because the user named it,
    so a name must never come from data.

    Raises UserError that names the metric: a file or function that is not there, a script that fails, a hub out of reach.
    """
    return {name: _function(name) if _names_function(name) else _evaluate_module(name) for name in names}


def further_scores(
    names: Sequence[str],
    predictions: Sequence[str],
    references: Sequence[str],
    rows: Sequence[int] | None = None,
    functions: Mapping[str, Scoring] | None = None,
) -> pd.DataFrame:
    """The scores of each reply by the user's own metrics (`load_metrics`), float64, one row a reply.

    A function gives a column of its name; `functions` are some that are at hand, by name. An `evaluate` metric computes each
    row alone, so that rows can be paired: each number in its result is a column `metric_key`, or `metric` where the key is
    the metric's name (the last part of a hub name, the stem of a path); what is not a number is left out. `rows` are the
    numbers by which messages name the rows, counted from 0 by default.

    Raises UserError that names the metric and, where one is at fault, the row: a function that raises, or returns another
    number of scores than rows; a score that is not a finite number; a column that exists already.
    """
    replies, expected = utf8(predictions), utf8(references)
    numbers = list(range(len(replies)) if rows is None else rows)
    table = list(zip(numbers, replies, expected, strict=True))
    columns: dict[str, list[float]] = {}
    for name, metric in {**load_metrics(names), **(functions or {})}.items():
        by_function = _names_function(name) or name in (functions or {})
        found = _by_function(name, metric, table) if by_function else _by_module(name, metric, table)
        clash = next((column for column in found if column in columns or column in TAKEN), None)
        if clash is not None:
            raise UserError(f"The metric {name} makes a column {clash!r}, which exists already. Rename or leave out one of them.")
        columns |= found
    return pd.DataFrame(columns, index=range(len(table)), dtype=np.float64)


def further_metric(name: str) -> Metric:
    """The mean over rows of a column of `further_scores`; whether higher is better is not known."""
    return row_mean(name, name, higher_is_better=None)


Row: TypeAlias = tuple[int, str, str]  # its number, the reply, the reference


def _names_function(name: str) -> bool:
    return name.rpartition(":")[0].endswith(".py")


def _by_function(name: str, function: Callable[..., Any], table: Sequence[Row]) -> dict[str, list[float]]:
    file, function_name = _file_and_function(name)
    try:
        with _Blaming(f"The metric {name} failed", file):
            scores = function([reply for _, reply, _ in table], [reference for _, _, reference in table])
    except UserError:
        for row, reply, reference in table:  # which row was it?
            with _Blaming(f"The metric {name} failed on row {row}", file):
                function([reply], [reference])
        raise
    if not isinstance(scores, Sequence | np.ndarray | pd.Series) or isinstance(scores, str):
        raise UserError(
            f"The metric {name} returned a value of type {type(scores).__name__}; expected a list of one number a row."
        )
    if len(scores) != len(table):
        raise UserError(f"The metric {name} returned {len(scores)} scores for {len(table)} rows; expected one number a row.")
    return {function_name: [_number(name, row, score) for (row, _, _), score in zip(table, scores, strict=True)]}


def _by_module(name: str, module: Any, table: Sequence[Row]) -> dict[str, list[float]]:
    metric = _stem(name)
    columns: dict[str, list[float]] = {}
    for place, (row, reply, reference) in enumerate(table):
        with _Blaming(f"The metric {name}, which computes each row alone, failed on row {row}"):
            result = dict(module.compute(predictions=[reply], references=[reference]))
        found = {metric if key == metric else f"{metric}_{key}": value for key, value in result.items() if _is_number(value)}
        if not found or (place and found.keys() != columns.keys()):
            expected = f"the numbers {', '.join(columns)}" if place else "at least one"
            raise UserError(f"The metric {name} gave row {row} the numbers {', '.join(found) or 'none'}; expected {expected}.")
        for column, value in found.items():
            columns.setdefault(column, []).append(_number(name, row, value))
    return columns


def _is_number(value: object) -> bool:
    return isinstance(value, Real | np.bool_)


def _number(name: str, row: int, value: Any) -> float:
    number = math.nan
    if _is_number(value):
        with suppress(OverflowError):
            number = float(value)
    if not math.isfinite(number):
        raise UserError(f"The metric {name} gave row {row} the score {repr(value)[:80]}; expected a finite number.")
    return number


def _stem(name: str) -> str:
    return Path(name).name.removesuffix(".py")


def _evaluate_module(name: str) -> Any:
    """An `evaluate` metric by its name or by the path of its script."""
    path = user_path(name)
    if name.endswith(".py"):
        if not path.is_file():
            raise UserError(f"The metric {name} cannot be loaded: there is no file {path.absolute()}.")
        advice = " A script must define a subclass of evaluate.Metric; a plain function is named FILE.py:function."
    else:
        advice = (
            " A metric without a local script comes from the Hugging Face hub: check its name and the network, or load it once"
            " with a network, after which it is in the cache, or name a local script (./my_metric.py) or FILE.py:function."
        )
    with _Blaming(f"The metric {name} cannot be loaded", advice=advice):
        return evaluate.load(str(path) if path.exists() else name, keep_in_memory=True)


def _file_and_function(name: str) -> tuple[Path, str]:
    """The two parts of a FILE.py:function; of a function at hand the name alone tells."""
    file, _, function = name.rpartition(":")
    return user_path(file).absolute(), function


def _function(name: str) -> Callable[..., Any]:
    """The function of a FILE.py:function."""
    file, function_name = _file_and_function(name)
    if not file.is_file():
        raise UserError(f"The metric {name} cannot be loaded: there is no file {file}.")
    module = _module(file)
    function = vars(module).get(function_name)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(f"The metric {name}: {file} has no function {function_name!r}.{nearest(function_name, known)}")
    return function


def _module(file: Path) -> ModuleType:
    """The module in `file`, run once for each content of the file; it may import its neighbours."""
    source = file.read_bytes()
    digest = hashlib.sha256(os.fsencode(file) + b"\0" + source).hexdigest()
    name = f"metric_{file.stem}_{digest[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    module = ModuleType(name)
    module.__file__ = str(file)
    with _Blaming(f"The metric file {file} failed while it was loaded", file), _importable(module, file.parent):
        # Not by importlib, which takes a compiled file for current if the source has its size and its second of change.
        exec(compile(source, str(file), "exec"), vars(module))
    return module


@contextmanager
def _importable(module: ModuleType, directory: Path) -> Iterator[None]:
    """Register `module` unless the block fails; in the block `directory` is the last place that imports are sought in."""
    sys.modules[module.__name__] = module  # data classes look their own module up
    sys.path.append(str(directory))
    loaded = False
    try:
        yield
        loaded = True
    finally:
        sys.path.remove(str(directory))
        if not loaded:
            del sys.modules[module.__name__]
