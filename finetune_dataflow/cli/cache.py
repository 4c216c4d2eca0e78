"""The cache of the command line: results of earlier runs, kept in the user's cache directory."""

from __future__ import annotations

import logging
import shutil
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hamilton import driver

import finetune_dataflow
from finetune_dataflow.cli.options import Options, build_driver
from finetune_dataflow.engine.files import user_path
from finetune_dataflow.engine.user_cache import user_cache_directory

MOST_BYTES = 50_000_000  # of data: every result is kept, so of more the cache would cost more than it saves

logger = logging.getLogger(__name__)


def cached_driver(options: Options, adapters: Sequence[Any] = ()) -> driver.Driver:
    """The driver of a run, with Hamilton's cache where that can be trusted and is worth it.

    It is left off with a user's own nodes, whose helpers it does not know, and for large data. A cache that cannot be read
    is put aside.
    """
    if not options.cached or options.modules or _size(user_path(options.inputs["data_path"])) > MOST_BYTES:
        return build_driver(options.start, options.modules, adapters)
    directory = user_cache_directory() / "results"
    try:
        return _with_cache(options, directory, adapters)
    except sqlite3.DatabaseError as error:
        logger.warning("The cache in %s cannot be read (%s). A new one is begun.", directory, error)
        shutil.rmtree(directory, ignore_errors=True)
        return _with_cache(options, directory, adapters)


def _with_cache(options: Options, directory: Path, adapters: Sequence[Any]) -> driver.Driver:
    builder = driver.Builder().with_config({"start": options.start}).with_modules(finetune_dataflow)
    builder = builder.with_adapters(*adapters) if adapters else builder
    return builder.with_cache(path=str(directory)).build()


def _size(path: Path) -> int:
    """The bytes of a file, or of the files in a directory; 0 for what lies elsewhere."""
    files = [path] if path.is_file() else path.rglob("*") if path.is_dir() else []
    return sum(each.stat().st_size for each in files if each.is_file())
