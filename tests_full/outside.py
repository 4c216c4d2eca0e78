"""The Python that has other tools to read exports by; `make test-full` makes it where PyTorch's CPU build can be had."""

from __future__ import annotations

import functools
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYTHON = Path(os.environ.get("FINETUNE_DATAFLOW_PEERS") or ROOT / ".venv-peers" / "bin" / "python")


def python_with(*packages: str) -> Path:
    """That Python, where it has these packages; else the test is skipped."""
    if not _has(packages):
        named = ", ".join(packages)
        pytest.skip(
            f"no {PYTHON} with {named}: FINETUNE_DATAFLOW_PEERS names one that has them, make .venv-peers/readers makes one"
        )
    return PYTHON


@functools.cache
def _has(packages: tuple[str, ...]) -> bool:
    code = "import sys; from importlib.util import find_spec; sys.exit(any(find_spec(name) is None for name in sys.argv[1:]))"
    return PYTHON.is_file() and subprocess.run([PYTHON, "-c", code, *packages], check=False).returncode == 0
