"""What a trial leaves for the rest of the sweep, on a shared path or wherever else fsspec reaches.

An agent puts a trial there when it ends, whole or not at all: its files go into a folder that no reader knows, and then a
manifest with their names, sizes and SHA-256 sums takes the place of the one before. The sweep fetches by the manifest.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from finetune_dataflow.errors import UserError
from finetune_dataflow.sweeps.storage import answered, redacted

LEFT_OUT = ("checkpoints", ".lock", "wandb")  # what no later step reads
SMALL = ("trial.json", "metrics.json", "metrics.jsonl", "config.yaml", "error.txt")  # what the table and the page are made of
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Artifacts:
    """The place of one sweep's trials at a URL. name: of the sweep, so that several may share a URL."""

    url: str
    name: str

    def put(self, number: int, directory: Path) -> None:
        """Put a trial's files there. Raises UserError where they cannot be written."""
        self._done(lambda: self._put(number, directory), f"Trial {number} cannot be put in {redacted(self.url)}")

    def fetch(self, number: int, directory: Path, everything: bool) -> bool:
        """Fetch a trial's files into its directory, all of them or the SMALL ones; whether there is such a trial.

        Raises UserError where a file is not what the manifest says.
        """
        return self._done(
            lambda: self._fetch(number, directory, everything), f"Trial {number} cannot be fetched from {redacted(self.url)}"
        )

    def check(self, token: str) -> None:
        """Raise UserError where a file cannot be written, read again and taken away there; it holds the token until `clear`."""

        def there_and_back() -> None:
            system, root = self._opened()
            system.makedirs(root, exist_ok=True)
            system.pipe_file(f"{root}/{token}", token.encode())
            if system.cat_file(f"{root}/{token}") != token.encode():
                raise OSError("what was written there reads differently")

        answered(there_and_back, f"--artifacts {redacted(self.url)}", self.url)

    def clear(self, token: str) -> None:
        """Take the file of `check` away."""

        def gone() -> None:
            system, root = self._opened()
            if system.exists(f"{root}/{token}"):
                system.rm_file(f"{root}/{token}")
            if system.isdir(root) and not system.ls(root):
                system.rmdir(root)

        answered(gone, f"--artifacts {redacted(self.url)}", self.url)

    def _opened(self) -> tuple[Any, str]:
        from fsspec.core import url_to_fs

        system, path = url_to_fs(self.url)
        return system, f"{path.rstrip('/')}/{self.name}"

    def _done(self, call: Callable[[], Any], failing: str) -> Any:
        from fsspec.exceptions import FSTimeoutError

        try:
            return call()
        except (OSError, ImportError, ValueError, KeyError, FSTimeoutError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{failing}: {redacted(str(error) or type(error).__name__)}.") from error

    def _put(self, number: int, directory: Path) -> None:
        system, root = self._opened()
        place = f"{root}/trials/{number}"
        before = _manifest(system, place)
        folder, sums = uuid.uuid4().hex, {}
        for path in _files(directory):
            name = path.relative_to(directory).as_posix()
            target = f"{place}/{folder}/{name}"
            system.makedirs(str(PurePosixPath(target).parent), exist_ok=True)
            system.put_file(str(path), target)
            sums[name] = {"size": path.stat().st_size, "sha256": _digest(path)}
        text = json.dumps({"folder": folder, "files": sums}, indent=2)
        system.pipe_file(f"{place}/{folder}.json", text.encode())
        system.mv(f"{place}/{folder}.json", f"{place}/{MANIFEST}")
        if before is not None:
            system.rm(f"{place}/{before['folder']}", recursive=True)

    def _fetch(self, number: int, directory: Path, everything: bool) -> bool:
        system, root = self._opened()
        place = f"{root}/trials/{number}"
        manifest = _manifest(system, place)
        if manifest is None:
            return False
        for name, expected in manifest["files"].items():
            target = directory / name
            if not (everything or name in SMALL) or (target.is_file() and _digest(target) == expected["sha256"]):
                continue
            if not target.resolve().is_relative_to(directory.resolve()):
                raise UserError(f"{redacted(self.url)}: the manifest of trial {number} names {name!r}, outside the trial.")
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".{uuid.uuid4().hex}")
            try:
                system.get_file(f"{place}/{manifest['folder']}/{name}", str(temporary))
                if _digest(temporary) != expected["sha256"]:
                    raise UserError(
                        f"{redacted(self.url)}: {name} of trial {number} is damaged: it is not what its manifest says."
                    )
                temporary.replace(target)
            finally:
                temporary.unlink(missing_ok=True)
        return True


def _manifest(system: Any, place: str) -> dict[str, Any] | None:
    system.invalidate_cache()
    try:
        return dict(json.loads(system.cat_file(f"{place}/{MANIFEST}")))
    except FileNotFoundError:
        return None


def _files(directory: Path) -> Iterator[Path]:
    for path in sorted(directory.rglob("*")):
        first = path.relative_to(directory).parts[0]
        if path.is_file() and not first.startswith(LEFT_OUT):
            yield path


def _digest(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
