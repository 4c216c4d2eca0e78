"""Finding a base model: a local directory, a GGUF file, or a hub repository."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path

from finetune_dataflow.engine.files import content_fingerprint, fingerprint, user_path, write_json
from finetune_dataflow.engine.user_cache import user_cache_directory
from finetune_dataflow.errors import UserError

logger = logging.getLogger(__name__)

# Code (.py) and pickles (.bin, .pt) are never fetched.
MODEL_FILES = ("*.json", "*.jinja", "*.txt", "tokenizer.model", "*.safetensors")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def model_directory(model_id: str) -> Path:
    """The directory of the model that `model_id` names; a GGUF file is converted once, a repository fetched once."""
    path = user_path(model_id)
    if path.is_dir():
        directory = path.resolve()
    elif path.is_file():
        directory = _converted(path.resolve())
    elif path.is_absolute() or model_id.startswith((".", "~")) or not _REPOSITORY.fullmatch(model_id):
        raise UserError(
            f"model_id={model_id!r}: no such directory or file. Expected a local model directory, a .gguf file, a hub "
            "repository (owner/name), or smollm2-135m-instruct."
        )
    else:
        directory = _fetched(model_id)
    check_model_directory(directory)
    return directory


def check_model_directory(directory: Path) -> None:
    """Raise UserError unless `directory` holds a decoder-only language model in safetensors."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"The model directory {directory} has no config.json. Expected a Hugging Face or MLX model.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{directory / 'config.json'} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{directory / 'config.json'} holds no settings: expected an object.")
    if config.get("is_encoder_decoder") or config.get("model_type") in {
        "t5",
        "mt5",
        "umt5",
        "bart",
        "mbart",
        "pegasus",
    }:
        raise UserError(
            f"The model in {directory} is an encoder-decoder model ({config.get('model_type')}), which is not supported. "
            "Use a decoder-only instruction-tuned model, such as smollm2-135m-instruct, and name it in model_id."
        )
    if not any(directory.glob("model*.safetensors")):
        others = sorted(each.name for each in directory.iterdir() if each.suffix in {".bin", ".pt", ".pth", ".npz", ".gguf"})
        hint = f" It has {', '.join(others[:3])}, which is not read." if others else ""
        raise UserError(f"The model directory {directory} has no weights: expected model*.safetensors.{hint}")


def model_fingerprint(directory: Path) -> str:
    """SHA-256 over the contents of the model's files; kept in the user's cache while names, sizes and times stay the same."""
    files = sorted({path for pattern in MODEL_FILES for path in directory.glob(pattern)})
    state = fingerprint([(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files])
    known = user_cache_directory() / "fingerprints" / f"{state}.json"
    if known.is_file():
        return json.loads(known.read_text(encoding="utf-8"))
    value = content_fingerprint(files)
    write_json(known, value)
    return value


def _converted(gguf: Path) -> Path:
    from finetune_dataflow.engine.gguf import CONVERTER_VERSION, convert_gguf, is_whole

    if gguf.suffix.lower() != ".gguf":
        raise UserError(f"model_id={str(gguf)!r} is a file, but not a .gguf file. Expected a model directory or a .gguf file.")
    with gguf.open("rb") as handle:
        content = hashlib.file_digest(handle, "sha256").hexdigest()
    directory = user_cache_directory() / "models" / f"{gguf.stem}-{content[:12]}-{CONVERTER_VERSION}"
    if not is_whole(directory):
        shutil.rmtree(directory, ignore_errors=True)
        logger.info("Converting %s to %s.", gguf, directory)
        convert_gguf(gguf, directory)
    return directory


def _fetched(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    offline = os.environ.get("HF_HUB_OFFLINE", "") not in {"", "0"}
    try:
        return Path(snapshot_download(repository, allow_patterns=list(MODEL_FILES), local_files_only=offline))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"model_id={repository!r}: there is no such directory here, and the hub did not give a repository of that "
            f"name ({str(error).splitlines()[0]}). Check the name and the network, or name a local model directory."
        ) from error
