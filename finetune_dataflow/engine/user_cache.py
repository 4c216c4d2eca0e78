"""The one directory outside the checkout that this project writes to."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_cache_path

from finetune_dataflow.errors import UserError


def user_cache_directory() -> Path:
    """`$FINETUNE_DATAFLOW_CACHE`, or `finetune_dataflow` in the user's cache directory; created if missing."""
    chosen = os.environ.get("FINETUNE_DATAFLOW_CACHE")
    directory = Path(chosen).expanduser() if chosen else user_cache_path("finetune_dataflow")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"The cache directory {directory} cannot be made: {error.strerror}. Name another in FINETUNE_DATAFLOW_CACHE."
        ) from error
    return directory
