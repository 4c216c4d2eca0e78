"""The wheel and the source distribution: made from what git knows of, without the network, and looked into."""

from __future__ import annotations

import email.parser
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

import finetune_dataflow
from finetune_dataflow.errors import UserError

PACKAGE, DISTRIBUTION = "finetune_dataflow", "finetune-dataflow"
ROOT = Path(finetune_dataflow.__file__).parent.parent
SETUPTOOLS = (77,)  # the first that knows a licence by its SPDX expression, which pyproject.toml asks for
COMMAND = "finetune-dataflow = finetune_dataflow.cli:main"
_HOOK = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"
_FENCED = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[[^\]]*\]\(\s*<?([^)\s>]+)|^\s*\[[^\]]+\]:\s*(\S+)|(?:src|href)=[\"']([^\"']+)", re.MULTILINE)


def build(work: Path) -> tuple[Path, Path]:
    """The source distribution, and the wheel made from it, in WORK/dist.

    From a copy of what git knows of, so that nothing which lies about in the checkout gets in; and the wheel from the source
    distribution, so that this is known to be whole. Raises UserError where setuptools is too old or refuses.
    """
    check_setuptools(importlib.metadata.version("setuptools"))
    source, dist = copied(work / "source"), work / "dist"
    dist.mkdir(parents=True)
    sdist = dist / _built("build_sdist", source, dist)
    with tarfile.open(sdist) as archive:
        archive.extractall(work / "unpacked", filter="data")
    unpacked = next((work / "unpacked").iterdir())
    return sdist, dist / _built("build_wheel", unpacked, dist)


def check_setuptools(version: str) -> None:
    """Raise UserError for a setuptools that cannot build this project."""
    if tuple(int(each) for each in re.findall(r"\d+", version)[:1]) < SETUPTOOLS:
        raise UserError(f"setuptools {version} is too old to build the wheel. Expected {SETUPTOOLS[0]} or newer: run make env.")


def copied(target: Path) -> Path:
    """What git knows of, and new files that it is not told to ignore, copied to `target`."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        raise UserError(f"{ROOT} is no git checkout, which a release is made from: {listed.stderr.strip()}")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def _built(hook: str, source: Path, dist: Path) -> str:
    """The name of the file that a hook of setuptools (PEP 517) writes, in a process of its own, as the standard has it."""
    command = [sys.executable, "-c", _HOOK, hook, str(dist)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserError(f"setuptools' {hook} failed:\n{done.stderr}")
    return done.stdout.splitlines()[-1]


def wheel_problems(wheel: Path, package: Path = ROOT / PACKAGE) -> list[str]:
    """What is wrong with a wheel, a line each: a file of the package that is not in it, one that should not be, its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        info = next(each.partition("/")[0] for each in names if ".dist-info/" in each)
        texts = {
            name: archive.read(f"{info}/{name}").decode("utf-8") if f"{info}/{name}" in names else ""
            for name in ("METADATA", "entry_points.txt", "licenses/LICENSE")
        }
    found = [f"{wheel.name}: {each}" for each in _file_problems([each for each in names if not each.startswith(info)], package)]
    if not texts["licenses/LICENSE"]:
        found.append(f"{wheel.name}: the licence is not in it")
    if COMMAND not in texts["entry_points.txt"]:
        found.append(f"{wheel.name}: the console script {COMMAND!r} is not in it")
    return [*found, *(f"{wheel.name}: {each}" for each in metadata_problems(texts["METADATA"]))]


def sdist_problems(sdist: Path, package: Path = ROOT / PACKAGE) -> list[str]:
    """What is wrong with the files of a source distribution, a line each."""
    with tarfile.open(sdist) as archive:
        names = [each.name.partition("/")[2] for each in archive if each.isfile()]
    found = _file_problems([each for each in names if each.startswith(f"{PACKAGE}/")], package)
    found += [f"{each} is not in it" for each in ("LICENSE", "pyproject.toml", "PKG-INFO") if each not in names]
    aside = sorted(each for each in names if each.startswith((".", "build/", "runs/", "tests")))
    return [f"{sdist.name}: {each}" for each in [*found, *(f"{each} should not be in it" for each in aside)]]


def _file_problems(names: Iterable[str], package: Path) -> list[str]:
    """Where the files of a distribution are not those of the package."""
    wanted = {
        f"{PACKAGE}/{each.relative_to(package).as_posix()}"
        for each in package.rglob("*")
        if each.is_file() and "__pycache__" not in each.parts and each.suffix != ".pyc"
    }
    packed = {*names}
    missing = [f"{each} is not in it" for each in sorted(wanted - packed)]
    return [*missing, *(f"{each} should not be in it" for each in sorted(packed - wanted))]


def metadata_problems(metadata: str) -> list[str]:
    """What an index would show wrongly of a package, a line each: its name, its licence, links that lead nowhere from there."""
    parsed = email.parser.Parser().parsestr(metadata)
    description = str(parsed.get_payload())
    wanted = {
        "Name": DISTRIBUTION,
        "Version": finetune_dataflow.__version__,
        "License-Expression": "Apache-2.0",
        "License-File": "LICENSE",
        "Description-Content-Type": "text/markdown",
    }
    found = [f"{key} is {parsed[key]!r}, expected {value!r}" for key, value in wanted.items() if parsed[key] != value]
    if not parsed["Summary"] or not description.strip():
        found.append("the summary or the long description is missing")
    found += [f"the long description leads to {each}, which is not there on an index" for each in relative_links(description)]
    return found


def relative_links(markdown: str) -> list[str]:
    """The links and pictures of a Markdown text that are neither absolute nor within it, code left out."""
    text = re.sub(r"`[^`\n]*`", "", _FENCED.sub("", markdown))
    targets = [next(filter(None, each)) for each in _LINK.findall(text)]
    return [each for each in targets if not re.match(r"(https?:|mailto:|#)", each)]
