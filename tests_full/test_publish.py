"""`make publish-check`, from the build to the hub's folder, as it is run before a release."""

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What the check leaves, and what it says."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "publish/check.py", "--out", str(out)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


def test_every_step_passes_and_is_named(published: tuple[Path, str]) -> None:
    lines = published[1].splitlines()
    steps = [line for line in lines if line.startswith("- ")]
    assert len(steps) == 7 and all(" ... ok (" in line for line in steps)
    assert lines[-1] == "Ready to be published."


def test_the_distributions_and_the_folder_are_left(published: tuple[Path, str]) -> None:
    out = published[0]
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    assert wheel.name.endswith("-py3-none-any.whl") and sdist.name.startswith("finetune_dataflow-")
    with tarfile.open(sdist) as archive:
        assert any(each.endswith("/finetune_dataflow/engine/page_assets/page.css") for each in archive.getnames())
    assert (out / "contrib" / "finetune_dataflow" / "fine_tuning_mlx" / "dag.png").is_file()


def test_a_problem_ends_the_check_with_one_and_says_which(tmp_path: Path) -> None:
    """pip is told to ask an index that is not there; the steps before are done."""
    command = [sys.executable, "publish/check.py", "--index-options", f"--no-index --find-links {tmp_path}"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 1
    assert "the wheel is installed in an empty environment ... failed" in done.stdout
    assert "Not ready to be published:" in done.stderr and "pip install" in done.stderr and "ERROR" in done.stderr
