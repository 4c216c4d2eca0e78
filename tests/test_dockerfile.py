"""The Dockerfile: what it promises, and that what it copies is there. tests_full/test_dockerfile_steps.py carries it out."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.dockerfile import Ignored, Stage, read_dockerfile

REPOSITORY = Path(__file__).parent.parent
DOCKERFILE = REPOSITORY / "Dockerfile"
GLIBC = {"bookworm": (2, 36), "trixie": (2, 41)}  # of Debian 12 and 13
KEPT_OUT = [
    ".venv/bin/python", ".git/config", "runs/one/report.html", "tests/conftest.py", "docs/report.png", "dist/a.whl", ".ci/run",
    "finetune_dataflow/__pycache__/start.cpython-311.pyc", "finetune_dataflow/engine/__pycache__/chat.cpython-311.pyc",
    "publish/check.py", "README.md", "finetune_dataflow.egg-info/PKG-INFO",
]  # fmt: skip
TAKEN = [
    "pyproject.toml", "constraints.txt", "LICENSE", "example-support-dataset.json", "finetune_dataflow/__init__.py",
    "finetune_dataflow/engine/page_assets/page.css", "publish/README-package.md",
]  # fmt: skip


@pytest.fixture(scope="module")
def stages() -> list[Stage]:
    return read_dockerfile(DOCKERFILE)


@pytest.fixture(scope="module")
def ignored() -> Ignored:
    return Ignored((REPOSITORY / ".dockerignore").read_text(encoding="utf-8"))


def test_hadolint_has_no_complaint() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    assert hadolint.exists(), "hadolint is not installed: run make env"
    done = subprocess.run([str(hadolint), str(DOCKERFILE)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_no_rule_of_the_linter_is_switched_off() -> None:
    assert "hadolint ignore" not in DOCKERFILE.read_text(encoding="utf-8")
    assert not [*REPOSITORY.glob(".hadolint*")]


def test_every_stage_has_the_same_small_base_by_its_tag(stages: list[Stage]) -> None:
    assert {each.base for each in stages} == {"python:3.11-slim-bookworm"}


@pytest.mark.skipif(sys.platform != "linux", reason="wheels for Linux name their glibc")
def test_the_base_has_the_glibc_that_the_wheels_of_mlx_and_of_all_others_need(stages: list[Stage]) -> None:
    debian = stages[-1].base.rpartition("-")[2]
    tags = [
        tag
        for each in importlib.metadata.distributions()
        for tag in re.findall(r"manylinux_(\d+)_(\d+)_", each.read_text("WHEEL") or "")
    ]
    needed = max((int(major), int(minor)) for major, minor in tags)
    assert (2, 35) <= needed <= GLIBC[debian]


def test_the_base_has_the_python_that_the_package_asks_for(stages: list[Stage]) -> None:
    asked = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]["requires-python"]
    found = re.match(r"python:(\d+)\.(\d+)-", stages[-1].base)
    assert asked == ">=3.11" and found is not None and (int(found[1]), int(found[2])) >= (3, 11)


def test_it_does_not_run_as_root(stages: list[Stage]) -> None:
    user = stages[-1].last("USER").text
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    assert stages[-1].instructions.index(stages[-1].last("USER")) > stages[-1].instructions.index(stages[-1].last("RUN"))


def test_the_entrypoint_is_the_console_script_in_exec_form_and_the_default_is_the_main_job(stages: list[Stage]) -> None:
    scripts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert stages[-1].last("ENTRYPOINT").text == '["finetune-dataflow"]' and "finetune-dataflow" in scripts
    assert stages[-1].last("CMD").words == [
        "train", "--data", "/opt/finetune-dataflow/share/example-support-dataset.json",
        "--input-text-key", "question", "--output-text-key", "reply",
    ]  # fmt: skip


def test_runs_go_to_data_and_what_is_kept_to_cache(stages: list[Stage]) -> None:
    assert stages[-1].last("WORKDIR").text == "/data"
    assert stages[-1].environment["HOME"] == stages[-1].environment["XDG_CACHE_HOME"] == "/cache"
    assert "chmod 1777 /cache /data" in stages[-1].last("RUN").text
    assert "HF_HUB_OFFLINE" not in stages[-1].environment


def test_what_is_built_stays_in_the_builder(stages: list[Stage]) -> None:
    builder, final = stages
    assert not any("pip" in each.text or "apt" in each.text for each in final.all("RUN"))
    assert [each.text for each in final.all("COPY") if each.flags == {"from": builder.name}] == [
        "/opt/finetune-dataflow /opt/finetune-dataflow"
    ]
    assert builder.environment["PIP_NO_CACHE_DIR"] == "1" and final.environment["PYTHONDONTWRITEBYTECODE"] == "1"
    downloads = [part for each in builder.all("RUN") for part in each.text.split("&&") if "pip wheel" in part]
    assert len(downloads) == 2 and all("--constraint constraints.txt" in part for part in downloads)


def test_every_file_that_is_copied_is_there_and_in_the_context(stages: list[Stage], ignored: Ignored) -> None:
    sources = [word for stage in stages for each in stage.all("COPY") if not each.flags for word in each.words[:-1]]
    assert len(sources) == 6
    assert all((REPOSITORY / each).exists() for each in sources)
    assert not [each for each in sources if ignored.excludes(each)]


def test_what_pyproject_names_is_copied(stages: list[Stage]) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    sources = [word for each in stages[0].all("COPY") for word in each.words[:-1]]
    assert {project["readme"], *project["license-files"]} <= {*sources}


@pytest.mark.parametrize("path", KEPT_OUT)
def test_what_the_image_is_not_made_of_is_kept_out_of_the_context(path: str, ignored: Ignored) -> None:
    assert ignored.excludes(path)


@pytest.mark.parametrize("path", TAKEN)
def test_what_the_image_is_made_of_is_in_the_context(path: str, ignored: Ignored) -> None:
    assert not ignored.excludes(path)


@pytest.mark.parametrize("name", ["Dockerfile", ".dockerignore"])
def test_no_package_index_is_named(name: str) -> None:
    assert not re.search(r"https?://|--(extra-)?index-url", (REPOSITORY / name).read_text(encoding="utf-8"))


def test_the_reader_joins_lines_and_leaves_comments_out(tmp_path: Path) -> None:
    path = tmp_path / "Dockerfile"
    path.write_text('FROM a:1 AS b\n# no\nRUN one \\\n    # aside\n    && two\nFROM c:2\nCOPY --from=b /x /y\nCMD ["z"]\n')
    first, second = read_dockerfile(path)
    assert (first.base, first.name, first.last("RUN").text) == ("a:1", "b", "one && two")
    assert second.last("COPY").flags == {"from": "b"} and second.last("CMD").words == ["z"]


@pytest.mark.parametrize(
    ("patterns", "path", "out"),
    [
        ("*/temp*", "a/temporary.txt", True), ("*/temp*", "a/b/temp", False), ("temp?", "tempa", True), ("temp?", "temp", False),
        ("**/*.go", "a.go", True), ("**/*.go", "a/b/c.go", True), ("a", "a/b/c", True), ("/a/", "a/b", True),
        ("*.md\n!README*.md\nREADME-secret.md", "README-secret.md", True),
        ("*.md\nREADME-secret.md\n!README*.md", "README-secret.md", False), ("# a\n\nb", "a", False),
    ],
)  # fmt: skip
def test_patterns_of_dockerignore_are_read_as_its_documentation_has_them(patterns: str, path: str, out: bool) -> None:
    assert Ignored(patterns).excludes(path) is out
