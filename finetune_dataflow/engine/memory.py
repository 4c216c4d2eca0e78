"""Peak memory: resident on a CPU, MLX's own count elsewhere."""

from __future__ import annotations

import contextlib
import ctypes
import re
import resource
import sys
from pathlib import Path

import mlx.core as mx

RESET_PEAK, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def give_back() -> None:
    """Return to the system what the process holds and does not use, where the C library is one that can (glibc)."""
    mx.clear_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def reset_peak() -> None:
    """Start counting the peak anew. Outside Linux a process's resident peak cannot be reset and stays what it was."""
    give_back()
    mx.reset_peak_memory()
    with contextlib.suppress(OSError):
        RESET_PEAK.write_text("5")  # man 5 proc: resets the peak resident set size


def peak_bytes() -> int:
    """The most memory this process held, in bytes."""
    if mx.default_device() != mx.Device(mx.cpu):
        return mx.get_peak_memory()
    found = re.search(r"^VmHWM:\s*(\d+) kB", STATUS.read_text(), re.MULTILINE) if STATUS.exists() else None
    if found is not None:
        return int(found.group(1)) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
