"""Peak memory: resident on a CPU, MLX's own count elsewhere."""

from __future__ import annotations

import resource
import sys

import mlx.core as mx


def reset_peak() -> None:
    """Start counting MLX's peak anew. A process's resident peak cannot be reset."""
    mx.reset_peak_memory()


def peak_bytes() -> int:
    """The most memory this process held, in bytes."""
    if mx.default_device() != mx.Device(mx.cpu):
        return mx.get_peak_memory()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
