"""Replies kept from run to run: a file for each model and way of decoding, one JSON line a reply.

A reply is on the disk as soon as it is complete. So an evaluation that was killed goes on where it was, and the replies of a
base model serve every later run that asks the same of it. Lines are appended by one write each, under a lock that processes
take in turn; the kernel frees it when a process ends, however it ends. What stands after the last end of line is what a
killed process had begun: it is not read, and cut off before the next line is written.

Without its file a store keeps replies for its own time only: a disk that is full ends no evaluation.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import importlib.metadata
import json
import logging
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType

import numpy as np

from finetune_dataflow.engine.files import fingerprint

FORMAT = 1  # of the lines, and of what their replies depend on besides the key
BUDGET_BYTES = 10**9  # what all files of a directory may take

_NAME = re.compile(r"[0-9a-f]{64}\.jsonl")
_HASH = re.compile(r"[0-9a-f]{64}")
_HIGHEST = 2**31  # what a token id or an occurrence is below
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reply:
    """A generated reply: its tokens without the stop token, and whether it ended by itself within max_tokens."""

    token_ids: tuple[int, ...]
    ended: bool

    @property
    def hit_limit(self) -> bool:
        """Whether max_tokens cut it off."""
        return not self.ended


def prompt_hash(prompt: Sequence[int]) -> str:
    """SHA-256 (hex) of a prompt's token ids, each as eight bytes, the lowest first."""
    return hashlib.sha256(np.asarray(prompt, "<i8").tobytes()).hexdigest()


class ReplyStore:
    """The replies of one model and one way of decoding, by prompt.

    A line is {"prompt": its `prompt_hash`, "token_ids": [...], "ended": true or false}. Where replies are drawn, those to the
    second and later ones of identical prompts have "occurrence": 1, 2, …, too. path: the file. It may be appended to by
    several processes, each of which reads what was there when it opened the store.
    """

    def __init__(self, path: Path, file: FileIO | None) -> None:
        """Read the replies of an opened file; None keeps replies for the store's own time. OSError where it cannot be read."""
        self.path = path
        self._file = file
        self._known: dict[tuple[str, int], Reply] = {}
        if file is not None:
            with _alone(file):
                lines = _mended(file)
            self._read(lines)

    @classmethod
    def opened(cls, directory: Path, key_parts: Mapping[str, object], budget_bytes: int = BUDGET_BYTES) -> ReplyStore:
        """The store for whatever `key_parts` (JSON-like) name, in a directory that is made where it is missing.

        key_parts: all that replies depend on besides their prompts; the versions of mlx and mlx-lm are added here. The file's
        name is the SHA-256 of it all. Files that were not used for longest are removed while all of the directory take more
        than `budget_bytes`. Only the user may read what is made here. A link, or a file of another user, is not used; then, and
        where nothing can be written, a warning is logged and no reply is kept.
        """
        versions = {name: importlib.metadata.version(name) for name in ("mlx", "mlx-lm")}
        path = directory / f"{fingerprint({'format': FORMAT, 'key': dict(key_parts), 'versions': versions})}.jsonl"
        file = None
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            file = _own_file(path)
            os.utime(file.fileno())  # the longest unused are removed first
            store = cls(path, file)
        except OSError as error:
            if file is not None:
                file.close()
            _log.warning("%s cannot be used (%s). Replies are not kept for later runs.", path, error.strerror or error)
            return cls(path, None)
        prune(directory, budget_bytes, keep=path)
        return store

    def __enter__(self) -> ReplyStore:
        """The store itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close the file."""
        self.close()

    def __len__(self) -> int:
        """How many replies are known."""
        return len(self._known)

    def get(self, prompt: Sequence[int], occurrence: int = 0) -> Reply | None:
        """The reply to a prompt, or None; occurrence: which of the identical prompts it is, from 0."""
        return self._known.get((prompt_hash(prompt), occurrence))

    def add(self, prompt: Sequence[int], reply: Reply, occurrence: int = 0) -> None:
        """Keep the reply to a prompt, on the disk before this returns. Where that fails a warning is logged, once."""
        key = (prompt_hash(prompt), occurrence)
        self._known[key] = reply
        if self._file is None:
            return
        try:
            with _alone(self._file):
                _append(self._file, _line(key, reply))
        except OSError as error:
            _log.warning("%s cannot be written (%s). Later replies are not kept.", self.path, error.strerror or error)
            self.close()

    def close(self) -> None:
        """Close the file; what is known can still be asked for."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _read(self, lines: bytes) -> None:
        damaged = []
        for number, line in enumerate(lines.split(b"\n")[:-1], 1):
            parsed = _parsed(line)
            if parsed is None:
                damaged.append(number)
            else:
                self._known.setdefault(*parsed)
        if damaged:
            _log.warning(
                "%s: %d of its lines are damaged (the first is line %d); their replies are generated again.",
                self.path,
                len(damaged),
                damaged[0],
            )


def prune(directory: Path, budget_bytes: int, keep: Path | None = None) -> list[Path]:
    """Remove the files that were not used for longest until all take `budget_bytes` at most; the removed ones.

    keep: a file that stays. Files that no store has written are neither counted nor removed. A process that still has a
    removed file open goes on; what it adds is lost.
    """
    found = []
    for path in directory.glob("*.jsonl"):
        with suppress(OSError):
            state = path.lstat()
            if _NAME.fullmatch(path.name) and stat.S_ISREG(state.st_mode):
                found.append((state.st_mtime_ns, state.st_size, path))
    total, removed = sum(size for _, size, _ in found), list[Path]()
    for _, size, path in sorted(found):
        if total > budget_bytes and path != keep:
            with suppress(OSError):
                path.unlink()
                _log.info("Removed the replies in %s (%.3g GB), which were not used for longest.", path, size / 1e9)
                removed.append(path)
                total -= size
    return removed


def _own_file(path: Path) -> FileIO:
    """The file, opened for reading and appending, made where it is missing; OSError for one that is not the user's alone."""
    file = FileIO(path, "a+", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600))
    state = os.fstat(file.fileno())
    if stat.S_ISREG(state.st_mode) and state.st_uid == os.geteuid() and state.st_nlink <= 1:
        return file
    file.close()
    raise PermissionError(errno.EPERM, "it is a link, no file, or another user's")


@contextmanager
def _alone(file: FileIO) -> Iterator[None]:
    """Within the block no other process writes to the file."""
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


def _mended(file: FileIO) -> bytes:
    """The whole lines of a file, which are all that it holds afterwards."""
    file.seek(0)
    content = file.read()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        file.truncate(whole)
    return content[:whole]


def _append(file: FileIO, line: bytes) -> None:
    """Write a line after the last whole one; OSError, and the file as it was, where there is no room for all of it."""
    end = file.seek(0, os.SEEK_END)
    if end and os.pread(file.fileno(), 1, end - 1) != b"\n":
        _mended(file)
        end = file.seek(0, os.SEEK_END)
    if file.write(line) != len(line):
        file.truncate(end)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _line(key: tuple[str, int], reply: Reply) -> bytes:
    prompt, occurrence = key
    which = {"occurrence": occurrence} if occurrence else {}
    values = {"prompt": prompt, **which, "token_ids": list(reply.token_ids), "ended": reply.ended}
    return (json.dumps(values) + "\n").encode()


def _parsed(line: bytes) -> tuple[tuple[str, int], Reply] | None:
    """The key and the reply of a line, None of one that `_line` has not written."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict):
        return None
    prompt, occurrence = values.get("prompt"), values.get("occurrence", 0)
    tokens, ended = values.get("token_ids"), values.get("ended")
    if not isinstance(prompt, str) or not _HASH.fullmatch(prompt) or not isinstance(tokens, list) or not isinstance(ended, bool):
        return None
    if not all(type(each) is int and 0 <= each < _HIGHEST for each in [*tokens, occurrence]):
        return None
    return (prompt, occurrence), Reply(tuple(tokens), ended)
