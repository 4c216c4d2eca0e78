"""Threads share one arena of glibc's heap, unless the environment says otherwise."""

import os
import re
import subprocess
import sys

import pytest

# malloc_info(3) lists each arena as a <heap>. The threads hold memory at the same time, so none can take another's arena.
PROGRAM = """
import ctypes, sys, threading
if "engine" in sys.argv:
    from finetune_dataflow import engine
library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
library.fopen.restype = ctypes.c_void_p
together = threading.Barrier(9)
def take():
    library.malloc(ctypes.c_size_t(1000))
    together.wait()
    together.wait()
threads = [threading.Thread(target=take) for _ in range(8)]
[thread.start() for thread in threads]
together.wait()
stream = ctypes.c_void_p(library.fopen(b"/dev/stdout", b"w"))
library.malloc_info(0, stream)
library.fclose(stream)
together.wait()
"""


def arenas(*arguments: str, **environment: str) -> int:
    """The arenas of a process in which eight threads hold memory."""
    clean = {name: value for name, value in os.environ.items() if name not in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES")}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=True, env=clean | environment
    )
    return len(re.findall(r"<heap nr=", run.stdout))


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_threads_share_one_arena() -> None:
    assert arenas() > 2
    assert arenas("engine") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_the_environment_decides() -> None:
    assert arenas("engine", MALLOC_ARENA_MAX="4") == 4
