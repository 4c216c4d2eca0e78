"""What a machine of a cluster sees and has. This module is sent there as it is, so it asks for Python's own library alone."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import socket
import time
from pathlib import Path
from typing import Any

LARGEST = 1_000_000  # bytes of a file that is compared by its content
LIBRARIES = ("finetune-dataflow", "mlx", "mlx-lm", "sf-hamilton", "optuna", "transformers", "numpy", "fsspec")
PATIENCE_SECONDS = 10.0  # for a file that a network file system has yet to show


def seen(directory: str, token: str, paths: list[str], url: str, modules: list[str]) -> dict[str, Any]:
    """What is found here: host, cores, versions, fingerprints of the paths, and whether the directory and the URL are the same.

    The directory is the sweep's where it holds a file of the token's name, and something can be written beside it.
    """
    found: dict[str, Any] = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "versions": versions(),
        "missing": [each for each in modules if importlib.util.find_spec(each) is None],
        "paths": {path: contents(path) for path in paths},
    }
    if directory:
        found["directory"] = _directory(directory, token)
    if url:
        found["url"] = _at_url(url, token)
    return found


def versions() -> dict[str, str]:
    """The version of Python and of each library; "none" for what is not installed."""
    named = {"Python": ".".join(platform.python_version_tuple()[:2])}
    for each in LIBRARIES:
        try:
            named[each] = importlib.metadata.version(each)
        except importlib.metadata.PackageNotFoundError:
            named[each] = "none"
    found = importlib.util.find_spec("finetune_dataflow")
    places = list(found.submodule_search_locations or []) if found is not None else []
    named["the code of finetune_dataflow"] = _code(Path(places[0])) if places else "none"
    return named


def _code(package: Path) -> str:
    """A short fingerprint of a package's code: a checkout has no version that says what is in it."""
    digest = hashlib.sha256()
    for each in sorted(package.rglob("*.py")):
        digest.update(each.relative_to(package).as_posix().encode() + each.read_bytes())
    return digest.hexdigest()[:8]


def contents(path: str) -> str:
    """A fingerprint of names, sizes and small files' contents below a path; empty where there is nothing."""
    place = Path(path)
    try:
        if not place.exists():
            return ""
        digest = hashlib.sha256()
        for each in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if each.is_file() and "__pycache__" not in each.parts:
                size = each.stat().st_size
                name = each.relative_to(place).as_posix()
                digest.update(f"{name}\0{size}\0".encode())
                digest.update(each.read_bytes() if size <= LARGEST else b"")
        return digest.hexdigest()
    except OSError as error:
        return f"it cannot be read ({error.strerror or error})"


def _directory(directory: str, token: str) -> str:
    """Empty where it is the sweep's directory and can be written to; else why not."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not (Path(directory) / token).is_file():
        if time.monotonic() > end or not Path(directory).is_dir():
            return "it is not there" if not Path(directory).is_dir() else "it is another directory of the same name"
        time.sleep(0.2)
    own = Path(directory) / f"{token}-{socket.gethostname()}-{os.getpid()}"
    try:
        own.write_text(token, encoding="utf-8")
        own.unlink()
    except OSError as error:
        return f"it cannot be written to ({error.strerror or error})"
    return ""


def _at_url(url: str, token: str) -> str:
    """Empty where the URL is the same place as where the token was written; else why not."""
    try:
        import fsspec
    except ImportError:
        return "fsspec is not installed"
    try:
        system, path = fsspec.core.url_to_fs(url)
        if system.cat_file(f"{path}/{token}") == token.encode():
            return ""
    except ImportError as error:
        return f"{error.name or error} is not installed"
    except (OSError, ValueError) as error:
        return f"what the sweep wrote is not there ({type(error).__name__})"
    return "what the sweep wrote reads differently"
