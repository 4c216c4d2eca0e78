"""Files that are never readable half-written, a directory that one run holds at a time, and fingerprints of contents."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from finetune_dataflow.errors import UserError

_held: set[Path] = set()  # the directories that this process has locked


class Location(type(Path())):  # type: ignore[misc]  # the system's own kind of path
    """A place, whatever is in it: what is known by its content, such as a cached result, takes it by its name alone."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the system's refusal to write `path` (a full disk, a missing right) into a UserError that names it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}.") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; when the block ends well it is flushed to disk and renamed onto `path`."""
    # The suffix stays, because some writers (safetensors) choose the format by it.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink()


def flush_tree(directory: Path) -> None:
    """Flush every file in `directory`, and the directory itself, to the disk."""
    for path in [*directory.iterdir(), directory]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_text(path: Path, text: str) -> Path:
    """Write `text` as UTF-8, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def write_json(path: Path, value: object) -> Path:
    """Write `value` as indented JSON, whole or not at all."""
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json_lines(path: Path) -> list[dict[str, object]]:
    """The objects of a JSONL file this project wrote; a last line cut short by a kill is left out."""
    objects = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            objects.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return objects


def user_path(text: str) -> Path:
    """The path a user wrote, `~` resolved; UserError where it cannot be a path."""
    try:
        path = Path(text).expanduser()
        path.exists()
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(f"{text[:200]!r} is not a path: {error}.") from error
    return path


def write_if_changed(path: Path, text: str, invalidated: Path) -> Path:
    """Write `text` unless the file holds it already; before it changes, `invalidated` is removed."""
    if not path.is_file() or path.read_bytes() != text.encode("utf-8"):
        invalidated.unlink(missing_ok=True)
        write_text(path, text)
    return path


def json_lines(values: Iterable[object]) -> str:
    """One JSON value a line."""
    return "".join(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n" for value in values)


def make_output_directory(directory: Path) -> Path:
    """Create `directory`, or raise a UserError that says why it cannot be written to."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The output directory {directory} cannot be made: {error.strerror}.") from error
    if not os.access(directory, os.W_OK | os.X_OK):
        raise UserError(f"The output directory {directory} cannot be written to: permission denied.")
    return directory


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold `directory` for this process, which may hold it already; the kernel frees the lock when the process ends, however.

    Raises UserError where another process holds it.
    """
    place = directory.resolve()
    if place in _held:
        yield
        return
    with writing(directory / ".lock"):
        handle = (directory / ".lock").open("w")
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{directory} is in use by another run. Wait for it to end, or name another output directory."
            ) from error
        _held.add(place)
        try:
            yield
        finally:
            _held.discard(place)


def fingerprint(value: object) -> str:
    """SHA-256 (hex) of a JSON-like value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode("utf-8")).hexdigest()


def content_fingerprint(paths: Iterable[Path]) -> str:
    """SHA-256 (hex) of the names and bytes of some files, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda each: each.name):
        with path.open("rb") as handle:
            digest.update(f"{path.name}\0{hashlib.file_digest(handle, 'sha256').hexdigest()}\0".encode())
    return digest.hexdigest()
