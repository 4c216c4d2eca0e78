"""How the C library keeps freed memory for reuse.

glibc gives each thread an arena of its own to take memory from, up to eight for each core, and what one arena keeps no other
can use. Training frees and takes arrays of tens of megabytes on MLX's thread, on Python's and on one for each core: with one
arena for all of them the resident peak is an eighth lower, and a fit takes as long to within what its runs differ.
Source: mallopt(3), M_ARENA_MAX; https://sourceware.org/glibc/manual/latest/html_node/Malloc-Tunable-Parameters.html.
"""

from __future__ import annotations

import ctypes
import os
import sys

_ARENA_MAX = -8  # M_ARENA_MAX in malloc.h
_CHOSEN_BY_USER = ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES")


def share_arena() -> bool:
    """Let threads started from now on take memory from one arena; whether that was done.

    Left alone: a C library other than glibc, and a process whose environment says how memory is kept.
    """
    if sys.platform != "linux" or any(os.environ.get(name) for name in _CHOSEN_BY_USER):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    return bool(library.mallopt(_ARENA_MAX, 1))
