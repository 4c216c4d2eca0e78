"""Where rows come from: a file, a directory, a dataset saved to disk, a hub dataset, a URL. Given splits are kept."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from finetune_dataflow.engine.files import user_path
from finetune_dataflow.engine.json_rows import json_rows, line_rows, plain_line_rows
from finetune_dataflow.engine.many_rows import lines_fingerprint, paused
from finetune_dataflow.engine.parsing import FORMATS, SHOWN, ParsedFile, ParsedRow, decoded
from finetune_dataflow.engine.remote import client_errors, first_line, opened, reading, scheme_of
from finetune_dataflow.engine.tables import parquet_rows, separated_rows, table_rows
from finetune_dataflow.errors import UserError, nearest

if TYPE_CHECKING:
    import pyarrow as pa  # type: ignore[import-untyped]
    from datasets import Dataset, DatasetDict

# File stems and split names, each with the set that its rows belong to.
SPLIT_NAMES = {
    "train": "train",
    "valid": "validation",
    "validation": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "hold_out",
}
_HUB_NAME = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[\w.-]+)(?::(?P<config>[\w.-]+))?")


@dataclass(slots=True)  # not frozen: millions are made
class SourceRow:
    """One row as it was read.

    number: unique over the whole source, from 1; in JSON lines the line's number. Over several files it goes on.
    side: "train", "validation" or "hold_out" where the source gives a split, else None.
    place: what an error calls the row: "row 7", "valid.jsonl line 3".
    """

    number: int
    value: object
    side: str | None
    place: str


@dataclass(frozen=True)
class Source:
    """All rows of a source, what it was found to be, whether it gives splits, and the name that errors begin with."""

    rows: tuple[SourceRow, ...]
    kind: str
    has_sides: bool
    location: str = "the data"

    def fingerprint(self) -> str:
        """SHA-256 (hex) of everything that was read."""
        lines = ([row.number, row.value, row.side, row.place] for row in self.rows)
        return lines_fingerprint(lines, self.kind, self.has_sides, self.location)


@dataclass(frozen=True)
class _Part:
    """One file or split of a source: its rows' side, and the name that comes before their places."""

    rows: Sequence[ParsedRow]
    side: str | None
    name: str


def read_source(location: str) -> Source:
    """The rows at a location.

    A file: JSON, JSON lines, CSV, TSV or Parquet. A directory: train/valid/test files (mlx-lm's names, or Hugging Face's),
    or a dataset written by `save_to_disk`. `owner/name` or `owner/name:configuration`: a dataset of the Hugging Face hub.
    `scheme://…`: any of these through fsspec. Nothing read is executed: no pickle, no code of a dataset's repository.
    Raises UserError naming the location, and the line or row where there is one.
    """
    if not location.strip() or "\0" in location:
        raise UserError(f"The data {location!r} is no name of a file, a directory, a hub dataset or a URL.")
    if "://" in location:
        return _from_url(location)
    path = user_path(location)
    hub = _HUB_NAME.fullmatch(location)
    if hub and path.suffix.lower() not in FORMATS and not os.path.lexists(path) and not path.parent.exists():
        return _from_hub(hub["name"], hub["config"])
    return _from_path(_existing(path))


def rows_named(rows: Sequence[SourceRow]) -> str:
    """The places of some rows, ten at most: "row 3", "rows 2, 3", "valid.jsonl lines 4, 7 and 12 more"."""
    groups: dict[str, list[str]] = {}
    for row in rows[:SHOWN]:
        before, _, number = row.place.rpartition(" ")
        # The line of JSON lines is the row's number, so the two words say the same; rows are what other messages count.
        groups.setdefault("row" if before == "line" and number == str(row.number) else before, []).append(number)
    named = ", ".join(f"{before}{'s' if len(numbers) > 1 else ''} {', '.join(numbers)}" for before, numbers in groups.items())
    return f"{named} and {len(rows) - SHOWN} more" if len(rows) > SHOWN else named


def _from_path(path: Path) -> Source:
    if os.path.isdir(path):  # where Path.is_dir may raise, this says no, and reading tells why
        return _from_directory(str(path), _listed(path), lambda name: _bytes(path / name))
    return _from_file(str(path), _bytes(path), path.suffix.lower())


def _from_file(location: str, data: bytes, suffix: str) -> Source:
    found = _parsed(location, data, suffix)
    return _source(location, found.kind, [_Part(found.rows, None, "")])


def _from_directory(location: str, names: Sequence[str], read: Callable[[str], bytes]) -> Source:
    if "dataset_dict.json" in names or {"dataset_info.json", "state.json"} <= set(names):
        return _from_saved_dataset(location)
    files = [name for name in sorted(names) if _stem(name) in SPLIT_NAMES and _suffix(name) in FORMATS]
    if not files:
        raise _no_data(location, names)
    sides = _sides({name: _stem(name) for name in files}, location)
    order = sorted(files, key=lambda name: list(SPLIT_NAMES).index(_stem(name)))
    parts = [_Part(_parsed(f"{location}/{name}", read(name), _suffix(name)).rows, sides[name], name) for name in order]
    mlx_lm = all(name in {"train.jsonl", "valid.jsonl", "test.jsonl"} for name in files)
    return _source(location, f"{'mlx-lm directory' if mlx_lm else 'directory'} ({', '.join(order)})", parts)


def _from_saved_dataset(location: str) -> Source:
    import datasets
    import pyarrow as pa

    try:
        loaded = datasets.load_from_disk(location)
        tables = _tables(loaded)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException, *client_errors()) as error:
        raise UserError(
            f"{location}: the Hugging Face dataset cannot be read ({type(error).__name__}: {error}). "
            "Expected what save_to_disk writes, complete."
        ) from error
    return _from_tables(location, "Hugging Face dataset on disk", tables)


def _from_hub(name: str, config: str | None) -> Source:
    import datasets
    import pyarrow as pa

    spoken = f"{name}:{config}" if config else name
    try:
        tables = _tables(datasets.load_dataset(name, config))
    except (ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        raise UserError(
            f"There is no file or directory {spoken}, and the Hugging Face hub gives no dataset of that name "
            f"({first_line(error)}). Check the name and the connection; for a private dataset log in (hf auth login). Offline, "
            "save the dataset where there is a connection (save_to_disk) and name its directory."
        ) from error
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError, pa.ArrowException, *client_errors()) as error:
        raise UserError(
            f"The hub dataset {spoken} cannot be loaded: {str(error).strip()}\n"
            f"A configuration is named after a colon ({name}:configuration). Code in a dataset's repository is never run."
        ) from error
    return _from_tables(spoken, f"Hugging Face hub dataset {spoken}", tables)


def _tables(loaded: Dataset | DatasetDict) -> dict[str, pa.Table]:
    """The Arrow table of each split; of a dataset without splits, one of the name "". Images and audio stay undecoded."""
    splits = loaded if isinstance(loaded, dict) else {"": loaded}
    return {str(name): split.with_format("arrow")[:] for name, split in splits.items()}


def _from_tables(location: str, told: str, tables: dict[str, pa.Table]) -> Source:
    named = {name: table for name, table in tables.items() if name in SPLIT_NAMES}
    if len(tables) == 1 and not named:  # one split of another name is all the data there is
        named = tables
    if not named:
        raise UserError(
            f"{location}: the splits {_quoted(tables)} are none of {', '.join(SPLIT_NAMES)}. "
            "Save the wanted ones under these names."
        )
    sides = _sides({name: name for name in named}, location)
    parts, remarks = [], []
    for name, table in named.items():
        rows, remark = table_rows(f"{location}, split {name}" if name else location, table)
        parts.append(_Part(rows, sides[name], name))
        remarks.append(remark)
    left_out = [name for name in tables if name not in named]
    without = f", without its splits {_quoted(left_out)}" if left_out else ""
    splits = f" ({', '.join(named)})" if any(named) else ""
    return _source(location, f"{told}{splits}{without}{max(remarks, key=len)}", parts)


def _from_url(location: str) -> Source:
    scheme = scheme_of(location)
    with reading(location):
        filesystem, path = opened(location)
    if scheme in {"file", "local"}:
        return _from_path(_existing(Path(path)))
    suffix = _suffix(urlsplit(location).path if scheme in {"http", "https"} else path)  # a query is no part of the name
    with reading(location):
        names = [] if suffix or not filesystem.isdir(path) else filesystem.ls(path, detail=False)
        data = b"" if names else filesystem.cat_file(path)
    if not names:
        found = _from_file(location, data, suffix)
    else:

        def read(name: str) -> bytes:
            with reading(f"{location}/{name}"):
                return bytes(filesystem.cat_file(f"{path.rstrip('/')}/{name}"))

        found = _from_directory(location.rstrip("/"), [PurePosixPath(name).name for name in names], read)
    return replace(found, kind=f"{found.kind} from {scheme}://")


@paused()
def _source(location: str, told: str, parts: Sequence[_Part]) -> Source:
    """The parts' rows one after another; a later part's numbers go on where the earlier one's ended."""
    rows: list[SourceRow] = []
    for part in parts:
        before = rows[-1].number if rows else 0
        prefix = f"{part.name} " if part.name else ""
        rows += [SourceRow(before + row.number, row.value, part.side, f"{prefix}{row.place}") for row in part.rows]
    if not rows:
        raise UserError(f"{location} has no rows.")
    return Source(tuple(rows), told, any(part.side for part in parts), location)


@paused()
def _parsed(name: str, data: bytes, suffix: str) -> ParsedFile:
    """The rows of a file's bytes; the suffix chooses the format, and JSON is expected where it names none."""
    if suffix in {".jsonl", ".ndjson"} and (rows := plain_line_rows(data)) is not None:
        return rows
    if suffix == ".parquet" or data.startswith(b"PAR1"):
        return parquet_rows(name, data)
    text = decoded(name, data)
    if suffix in {".csv", ".tsv"}:
        return separated_rows(name, text, suffix)
    return line_rows(name, text) if suffix in {".jsonl", ".ndjson"} else json_rows(name, text)


def _sides(split_names: dict[str, str], location: str) -> dict[str, str | None]:
    """The side of each file or split, by its split name; UserError where two claim one side or none is for training."""
    sides = {name: SPLIT_NAMES.get(split) for name, split in split_names.items()}
    for side in ("train", "validation", "hold_out"):
        if len(claimed := [name for name in sides if sides[name] == side]) > 1:
            raise UserError(f"{location}: {' and '.join(claimed)} are the same part of the data. Expected one of them.")
    if "train" not in sides.values() and any(sides.values()):
        raise UserError(f"{location}: there is {', '.join(sides)}, but nothing named train. Expected rows to learn from.")
    return sides


def _bytes(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise UserError(f"The data file {path} is a directory. Expected a file.")
        if path.exists() and not path.is_file():
            raise UserError(f"The data file {path} is a pipe, a socket or a device. Expected a regular file: save it as one.")
        return path.read_bytes()
    except PermissionError as error:
        raise UserError(f"The data file {path} cannot be read: permission denied.") from error
    except OSError as error:
        raise UserError(f"The data file {path} cannot be read: {error.strerror}.") from error


def _listed(path: Path) -> list[str]:
    try:
        return [each.name for each in path.iterdir()]
    except OSError as error:
        raise UserError(f"The directory {path} cannot be read: {error.strerror}.") from error


def _existing(path: Path) -> Path:
    try:
        path.lstat()
    except OSError as error:
        if error.errno not in {errno.ENOENT, errno.ENOTDIR}:
            raise UserError(f"The data file {path} cannot be read: {error.strerror}.") from error
        siblings = os.listdir(path.parent) if os.access(path.parent, os.R_OK) and path.parent.is_dir() else []
        raise UserError(f"The data file {path} does not exist.{nearest(path.name, siblings)}") from error
    return path


def _no_data(location: str, names: Sequence[str]) -> UserError:
    files = [name for name in names if _suffix(name) in FORMATS]
    close = [name for name in files if nearest(_stem(name), SPLIT_NAMES)]
    hint = f" Is {close[0]} meant as one?{nearest(_stem(close[0]), SPLIT_NAMES)}" if close else ""
    other = f" To use one file, name it: {location}/{sorted(files)[0]}." if files and not close else ""
    return UserError(
        f"The directory {location} holds no data. Expected train.jsonl (and valid.jsonl, test.jsonl; or .json, .csv, .tsv, "
        f".parquet), or a Hugging Face dataset saved to disk. Found {_quoted(sorted(names)) or 'nothing'}.{hint}{other}"
    )


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _stem(name: str) -> str:
    return PurePosixPath(name).stem.lower()


def _quoted(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return ", ".join(map(repr, listed[:SHOWN])) + more
