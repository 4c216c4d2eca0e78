"""What a path leads to, as a fingerprint."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from pathlib import Path

from finetune_dataflow.engine.files import fingerprint, user_path, write_json
from finetune_dataflow.engine.user_cache import user_cache_directory
from finetune_dataflow.errors import UserError

LARGE = 50_000_000  # bytes, above which a fingerprint is kept in the user's cache: a model's takes seconds
ELSEWHERE = "read anew "

_known: dict[str, str] = {}


def path_fingerprint(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes, or of the names and bytes of all files below a directory; "nothing" where none is.

    It is not computed again while names, sizes and times stay the same.
    """
    files = sorted(_files(path))
    if not files and not path.exists():
        return "nothing"
    stats = [(str(each.resolve()), each.stat()) for each in files]
    state = fingerprint([(name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in stats])
    if state not in _known:
        _known[state] = _kept(path, files, state) if sum(stat.st_size for _, stat in stats) > LARGE else _digest(path, files)
    return _known[state]


def source_content(data_path: str) -> str:
    """The fingerprint of the file or directory that holds the data; what lies elsewhere gets another one each time."""
    path = user_path(data_path)
    return path_fingerprint(path) if path.exists() else f"{ELSEWHERE}{uuid.uuid4()}"


def check_unchanged(data_path: str, content: str) -> None:
    """Raise UserError where the data is not what it was when `content` was taken."""
    if not content.startswith(ELSEWHERE) and path_fingerprint(user_path(data_path)) != content:
        raise UserError(f"{data_path} changed while it was read. Run the same command again when nobody writes to it.")


def _kept(path: Path, files: list[Path], state: str) -> str:
    known = user_cache_directory() / "fingerprints" / f"path-{state}.json"
    try:
        return str(json.loads(known.read_text(encoding="utf-8")))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        digest = _digest(path, files)
        write_json(known, digest)
        return digest


def _digest(path: Path, files: list[Path]) -> str:
    digest = hashlib.sha256()
    for each in files:
        with each.open("rb") as handle:
            digest.update(f"{each.relative_to(path)}\0{hashlib.file_digest(handle, 'sha256').hexdigest()}\0".encode())
    return digest.hexdigest()


def _files(path: Path) -> list[Path]:
    """The files at or below `path`; those whose names begin with a dot are somebody's workings and do not count."""
    if path.is_file():
        return [path]
    found = []
    for directory, names, files in os.walk(path):
        names[:] = [name for name in names if not name.startswith(".")]
        found += [Path(directory) / name for name in files if not name.startswith(".")]
    return found
