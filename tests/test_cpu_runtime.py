"""The BLAS in front of MLX on a Linux CPU. What a process can do only once is done in a process of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from finetune_dataflow.engine import cpu_runtime
from finetune_dataflow.engine.cpu_runtime import BlasReport, copy_name, core_count, exported_symbols, rename_map

ROOT = Path(__file__).parents[1]
needs_linux_cpu_mlx = pytest.mark.skipif(
    sys.platform != "linux" or cpu_runtime._cuda_build(sys.path) is not None,
    reason="the BLAS in front of MLX concerns MLX's CPU build on Linux",
)

PRODUCT = """
import mlx.core as mx, numpy as np
draw = np.random.default_rng(0)
a, b = (draw.standard_normal(shape).astype(np.float32) for shape in ((300, 576), (576, 200)))
error = float(abs(np.array(mx.matmul(mx.array(a), mx.array(b), stream=mx.cpu)) - a @ b).max())
"""
LOAD = "from finetune_dataflow.engine import cpu_runtime; report = cpu_runtime.load_fast_blas()\n"
# Empty packages in place of the real ones, which import NumPy on their own account.
BARE = f"""
import sys, types
for package in ("finetune_dataflow", "finetune_dataflow.engine"):
    sys.modules[package] = types.ModuleType(package)
    sys.modules[package].__path__ = [{str(ROOT)!r} + "/" + package.replace(".", "/")]
"""
# The switch keeps the package's own import from loading anything before the test has changed what it changes.
LOAD_LATER = """
import os; os.environ["FINETUNE_DATAFLOW_BLAS"] = "off"
from finetune_dataflow.engine import cpu_runtime
del os.environ["FINETUNE_DATAFLOW_BLAS"]; cpu_runtime._report = None
"""
NO_WHEEL = """
from importlib import metadata
def distribution(name): raise metadata.PackageNotFoundError(name)
metadata.distribution = distribution
"""
NO_SYSTEM_LIBRARY = "cpu_runtime._SYSTEM_LIBRARY = 'libnothing-of-this-name.so.0'\n"


def start(code: str, cache: Path, **variables: str) -> subprocess.Popen[str]:
    """A new Python with its own cache directory; `report` and `error`, if the code binds them, are printed as JSON."""
    code += "\nimport json; print(json.dumps([str(globals().get(n)) for n in ('report', 'error')]))"
    ours = ("FINETUNE_DATAFLOW_BLAS", "LD_PRELOAD", *cpu_runtime._THREAD_VARIABLES)
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    environment |= {"FINETUNE_DATAFLOW_CACHE": str(cache), "PYTHONPATH": str(ROOT)} | variables
    command = [sys.executable, "-c", code]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[str, str, str]:
    """The last printed report and error, and everything on stderr, where unhandled warnings go."""
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    report, error = json.loads(output.splitlines()[-1])
    return report, error, errors


def run(code: str, cache: Path, **variables: str) -> tuple[str, str, str]:
    return finish(start(code, cache, **variables))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache directory that holds the copy."""
    cache = tmp_path_factory.mktemp("cache")
    run(LOAD, cache)
    return cache


def only_copy(cache: Path) -> Path:
    """The one file in a cache directory."""
    (copy,) = cache.iterdir()
    return copy


@needs_linux_cpu_mlx
def test_mlx_multiplies_as_numpy_does(prepared: Path) -> None:
    report, error, errors = run(LOAD + PRODUCT, prepared)
    assert str(only_copy(prepared)) in report
    assert float(error) < 1e-4
    assert errors == ""


@needs_linux_cpu_mlx
def test_the_copy_answers_the_global_cblas_sgemm(prepared: Path) -> None:
    code = """
import ctypes
address = ctypes.cast(ctypes.CDLL(None).cblas_sgemm, ctypes.c_void_p).value
for line in open("/proc/self/maps"):
    first, last = (int(edge, 16) for edge in line.split()[0].split("-"))
    if first <= address < last:
        error = line.split()[-1]
"""
    assert run(LOAD + code, prepared)[1] == str(only_copy(prepared))


@needs_linux_cpu_mlx
def test_the_linker_binds_all_of_mlxs_blas_to_the_copy_and_nothing_of_numpys(prepared: Path, tmp_path: Path) -> None:
    run(BARE + LOAD + PRODUCT, prepared, LD_DEBUG="bindings", LD_DEBUG_OUTPUT=str(tmp_path / "linker"))
    copy = only_copy(prepared)
    log = "".join(path.read_text() for path in tmp_path.iterdir())
    bound = re.findall(r"binding file (\S+) \[\d+\] to (\S+) \[\d+\]: \w+ symbol `(\w+)'", log)
    blas = {(name, Path(to).name) for file, to, name in bound if Path(file).name == "libmlx.so"}
    blas = {(name, to) for name, to in blas if re.fullmatch(r"cblas_\w+|[sdcz][a-z]+_", name)}
    assert ("cblas_sgemm", copy.name) in blas
    assert {to for _, to in blas} == {copy.name}
    homes_of_numpys_names = {Path(to) for file, to, _ in bound if "numpy" in file}
    assert any("openblas64" in home.name for home in homes_of_numpys_names)
    assert copy not in homes_of_numpys_names


@needs_linux_cpu_mlx
@pytest.mark.parametrize(
    "residual",
    [
        "(lambda q, r: q @ r - a)(*mx.linalg.qr(a, stream=mx.cpu))",
        "(lambda u, s, v: u @ mx.diag(s) @ v - a)(*mx.linalg.svd(a, stream=mx.cpu))",
        "(lambda l: l @ l.T - p)(mx.linalg.cholesky(p, stream=mx.cpu))",
        "(lambda w, v: p @ v - v * w)(*mx.linalg.eigh(p, stream=mx.cpu))",
        "mx.linalg.inv(p, stream=mx.cpu) @ p - mx.eye(90)",
        "(lambda w, v: a @ v - v * w)(*mx.linalg.eig(a, stream=mx.cpu))",
        "mx.array(np.linalg.inv(np.array(p)) @ np.array(p)) - mx.eye(90)",
    ],
    ids=["qr", "svd", "cholesky", "eigh", "inv", "eig", "numpy's inv beside them"],
)
def test_a_matrix_factorisation_gives_its_matrix_back(residual: str, prepared: Path) -> None:
    code = f"""
import mlx.core as mx, numpy as np
mx.set_default_device(mx.cpu)
a = mx.array(np.random.default_rng(0).standard_normal((90, 90)).astype(np.float32))
p = a @ a.T / 90 + mx.eye(90)
error = float(mx.abs({residual}).max())
"""
    assert float(run(LOAD + code, prepared)[1]) < 2e-4


@needs_linux_cpu_mlx
def test_mlx_imported_first_is_warned_of_once_and_works(tmp_path: Path) -> None:
    report, error, errors = run("import mlx.core\n" + LOAD + LOAD + PRODUCT, tmp_path)
    assert "name=None, reason='mlx.core was imported first'" in report
    assert errors.count("50 times slower") == 1
    assert "Remedy: import finetune_dataflow.engine before mlx.core." in errors
    assert float(error) < 1e-3
    assert list(tmp_path.iterdir()) == []


@needs_linux_cpu_mlx
def test_without_any_blas_one_warning_names_what_is_missing_and_mlx_works(tmp_path: Path) -> None:
    code = LOAD_LATER + NO_WHEEL + NO_SYSTEM_LIBRARY + LOAD + LOAD + PRODUCT
    report, error, errors = run(code, tmp_path)
    assert "name=None, reason=\"the Python package scipy-openblas32 is not installed; the system's libnothing" in report
    assert errors.count("50 times slower") == 1
    assert "Remedy: pip install scipy-openblas32" in errors
    assert float(error) < 1e-3


@needs_linux_cpu_mlx
def test_the_systems_library_stands_in_for_a_missing_wheel(prepared: Path, tmp_path: Path) -> None:
    system = f"cpu_runtime._SYSTEM_LIBRARY = {str(only_copy(prepared))!r}\n"
    report, error, errors = run(LOAD_LATER + NO_WHEEL + system + LOAD + PRODUCT, tmp_path)
    assert "name=\"the system's " in report
    assert "the Python package scipy-openblas32 is not installed; OpenBLAS" in report
    assert float(error) < 1e-4
    assert errors == ""


@needs_linux_cpu_mlx
@pytest.mark.parametrize("damage", ["empty", "truncated", "one byte changed"])
def test_a_damaged_copy_is_made_anew(damage: str, prepared: Path, tmp_path: Path) -> None:
    good = only_copy(prepared).read_bytes()
    middle = len(good) // 2
    changed = good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]
    copy = tmp_path / only_copy(prepared).name
    copy.write_bytes({"empty": b"", "truncated": good[:-1000], "one byte changed": changed}[damage])
    report, _, _ = run(LOAD, tmp_path)
    assert str(copy) in report
    assert only_copy(tmp_path).stat().st_size == len(good)
    assert cpu_runtime._is_whole(copy)


@needs_linux_cpu_mlx
def test_a_second_start_writes_nothing_and_imports_neither_numpy_nor_mlx(prepared: Path) -> None:
    before = only_copy(prepared).stat()
    imports = 'error = sorted({"numpy", "mlx", "mlx.core", "subprocess"} & set(sys.modules))'
    report, imported, _ = run(BARE + LOAD + imports, prepared)
    assert ("name='scipy-openblas32 " in report, imported) == (True, "[]")
    after = only_copy(prepared).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@needs_linux_cpu_mlx
def test_two_first_starts_at_once_leave_one_whole_copy(tmp_path: Path) -> None:
    both = [start(LOAD + PRODUCT, tmp_path) for _ in range(2)]
    for report, error, _ in [finish(process) for process in both]:
        assert "name='scipy-openblas32 " in report
        assert float(error) < 1e-4
    assert cpu_runtime._is_whole(only_copy(tmp_path))


@needs_linux_cpu_mlx
def test_an_unusable_cache_directory_is_the_reason_given(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    report, _, errors = run(LOAD_LATER + NO_SYSTEM_LIBRARY + LOAD, tmp_path / "file")
    assert "can be kept in the user cache directory: The cache directory" in report
    assert errors.count("can be kept in the user cache directory") == 1


@needs_linux_cpu_mlx
@pytest.mark.parametrize(("program", "reason"), [("false", "/false ended with 1"), ("nothing", "No such file or directory: ")])
def test_a_failing_patchelf_is_the_reason_given_and_leaves_no_file(program: str, reason: str, tmp_path: Path) -> None:
    patchelf = f"from pathlib import Path; cpu_runtime._patchelf_program = lambda _: Path('/bin/{program}')\n"
    assert reason in run(LOAD_LATER + NO_SYSTEM_LIBRARY + patchelf + LOAD, tmp_path)[0]
    assert list(tmp_path.iterdir()) == []


@needs_linux_cpu_mlx
def test_patchelf_without_its_program_is_the_reason_given(tmp_path: Path) -> None:
    code = LOAD_LATER + NO_SYSTEM_LIBRARY + "cpu_runtime.os.access = lambda path, mode: False\n" + LOAD
    assert "came without its program" in run(code, tmp_path)[0]


@needs_linux_cpu_mlx
def test_the_users_number_of_threads_holds(prepared: Path) -> None:
    assert run(LOAD, prepared, OPENBLAS_NUM_THREADS="1")[0].endswith("threads=1)")


@needs_linux_cpu_mlx
def test_a_blas_that_was_there_first_is_left_in_place(prepared: Path, tmp_path: Path) -> None:
    report, _, errors = run(LOAD, tmp_path, LD_PRELOAD=str(only_copy(prepared)))
    assert report.startswith("BlasReport(name='preloaded'")
    assert (errors, list(tmp_path.iterdir())) == ("", [])


@needs_linux_cpu_mlx
def test_off_loads_nothing_and_warns_of_nothing(tmp_path: Path) -> None:
    report, error, errors = run(LOAD + PRODUCT, tmp_path, FINETUNE_DATAFLOW_BLAS="off")
    assert report == str(BlasReport(None, "switched off by FINETUNE_DATAFLOW_BLAS=off"))
    assert float(error) < 1e-3
    assert (errors, list(tmp_path.iterdir())) == ("", [])


@needs_linux_cpu_mlx
def test_another_value_of_the_switch_is_reported_and_ignored(prepared: Path) -> None:
    report, _, errors = run(LOAD, prepared, FINETUNE_DATAFLOW_BLAS="of")
    assert "name='scipy-openblas32 " in report
    assert "FINETUNE_DATAFLOW_BLAS=of has no meaning and is ignored" in errors


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """This process as before its first `load_fast_blas`, with an empty cache directory."""
    monkeypatch.setattr(cpu_runtime, "_report", None)
    monkeypatch.delenv("FINETUNE_DATAFLOW_BLAS", raising=False)
    monkeypatch.setenv("FINETUNE_DATAFLOW_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_macos_needs_nothing(fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cpu_runtime.load_fast_blas() == BlasReport(None, "not needed: MLX uses this system's own BLAS (darwin)")
    assert (caplog.records, list(fresh.iterdir())) == ([], [])


def test_a_cuda_build_needs_nothing(fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    (fresh / "site" / "mlx_cuda_13-0.32.4.dist-info").mkdir(parents=True)
    monkeypatch.syspath_prepend(fresh / "site")
    expected = BlasReport(None, "not needed: MLX is a CUDA build (mlx_cuda_13-0.32.4.dist-info)")
    assert cpu_runtime.load_fast_blas() == expected
    assert (caplog.records, [path.name for path in fresh.iterdir()]) == ([], ["site"])


def test_the_report_stays_that_of_the_first_call(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_DATAFLOW_BLAS", "off")
    assert cpu_runtime.blas_report() is None
    first = cpu_runtime.load_fast_blas()
    monkeypatch.setenv("FINETUNE_DATAFLOW_BLAS", "OFF")
    assert cpu_runtime.load_fast_blas() is first
    assert cpu_runtime.blas_report() is first


@needs_linux_cpu_mlx
def test_success_is_logged_with_its_reason(prepared: Path) -> None:
    _, _, errors = run("import logging; logging.basicConfig(level=logging.INFO)\n" + LOAD, prepared)
    assert re.search(r"INFO:.*MLX's matrix products go to scipy-openblas32 \S+ on \d+ threads: OpenBLAS", errors)


def test_mlxs_names_become_plain_and_all_others_private() -> None:
    assert rename_map(["scipy_cblas_sgemm", "scipy_sgesdd_", "scipy_sgemm_", "gotoblas"]) == {
        "scipy_cblas_sgemm": "cblas_sgemm",
        "scipy_sgesdd_": "sgesdd_",
        "scipy_sgemm_": "finetune_dataflow_scipy_sgemm_",
        "gotoblas": "finetune_dataflow_gotoblas",
    }


def test_a_library_without_scipys_prefix_is_refused() -> None:
    with pytest.raises(ValueError, match="exports no scipy_cblas_sgemm"):
        rename_map(["scipy_cblas_sgemm64_"])


def test_a_file_that_is_no_elf_library_is_refused() -> None:
    with pytest.raises(ValueError, match="it starts with b'versio'"):
        exported_symbols(b"version https://git-lfs.github.com/spec/v1")


def test_each_ingredient_changes_the_name_of_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library, elsewhere = tmp_path / "library.so", tmp_path / "elsewhere.so"
    for path in (library, elsewhere):
        path.write_bytes(b"1")
        os.utime(path, ns=(5, 5))
    names = [
        copy_name(library, "0.3.34", "x86_64", "0.19.3"),
        copy_name(library, "0.3.35", "x86_64", "0.19.3"),
        copy_name(library, "0.3.34", "aarch64", "0.19.3"),
        copy_name(library, "0.3.34", "x86_64", "0.19.4"),
        copy_name(elsewhere, "0.3.34", "x86_64", "0.19.3"),
    ]
    os.utime(library, ns=(6, 6))
    names.append(copy_name(library, "0.3.34", "x86_64", "0.19.3"))
    monkeypatch.setattr(cpu_runtime, "PLAIN_NAMES", frozenset({"cblas_sgemm"}))
    names.append(copy_name(library, "0.3.34", "x86_64", "0.19.3"))
    assert len(set(names)) == 7
    assert re.fullmatch(r"libopenblas-0\.3\.34-aarch64-patchelf-0\.19\.3-[0-9a-f]{8}\.so", names[2])


@pytest.mark.parametrize(
    ("cpus", "limit", "cores"),
    [
        ({0, 1, 2, 3}, "max", 2),
        ({0, 2}, "max 100000", 1),
        ({0, 1}, "max", 2),
        ({7, 8}, "max", 2),
        ({0, 1, 7, 8}, "150000 100000", 2),
        ({0, 1, 7, 8}, "20000 100000", 1),
        ({0, 1}, "800000 100000", 2),
    ],
    ids=["two threads a core", "one core's threads", "one of each", "unknown", "quota", "small quota", "large quota"],
)
def test_threads_are_physical_cores_within_affinity_and_quota(cpus: set[int], limit: str, cores: int, tmp_path: Path) -> None:
    for cpu, siblings in enumerate(["0,2", "1,3", "0,2", "1,3"]):
        (tmp_path / f"cpu{cpu}" / "topology").mkdir(parents=True)
        (tmp_path / f"cpu{cpu}" / "topology" / "thread_siblings_list").write_text(siblings + "\n")
    assert core_count(cpus, tmp_path, limit) == cores
