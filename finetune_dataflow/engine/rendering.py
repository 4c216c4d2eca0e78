"""What makes text into tokens, by fingerprints, and whether an adapter meets the same again."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from finetune_dataflow.engine.chat import load_encoder
from finetune_dataflow.engine.files import content_fingerprint, fingerprint, user_path
from finetune_dataflow.engine.settings import PromptSettings

logger = logging.getLogger(__name__)

# Of a tokenizer what makes ids of text; its chat template stands in some of these files, too, and is told apart.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)
PARTS = {
    "base_model": "the base model",
    "tokenizer": "the tokenizer",
    "chat_template": "the chat template",
    "prompt": "the prompt around a row's texts",
}


def fingerprints(base_model_path: Path, chat_template: str, prompt: PromptSettings) -> dict[str, str]:
    """Fingerprints of the tokenizer, of the chat template in use, and of what stands in a prompt besides a row's own texts."""
    files = [base_model_path / name for name in TOKENIZER_FILES if (base_model_path / name).is_file()]
    template = chat_template or load_encoder(base_model_path, chat_template).tokenizer.chat_template
    texts = [user_path(each) for each in (prompt.few_shot_file, prompt.loom_file) if each]
    settings = {name: value for name, value in asdict(prompt).items() if name != "prompt_format"}
    return {
        "tokenizer": content_fingerprint(files),
        "chat_template": fingerprint(template),
        "prompt": fingerprint([settings, content_fingerprint([each for each in texts if each.is_file()])]),
    }


def warn_of_differences(adapter_config: dict[str, Any], here: dict[str, str]) -> list[str]:
    """Say what an adapter meets here that is not what it was trained with; the names of these parts."""
    there = adapter_config.get("fingerprints") or {}
    other = [name for name in PARTS if name in there and name in here and there[name] != here[name]]
    for name in other:
        logger.warning(
            "This adapter was trained with another one: %s here is not that of its training%s. Its scores may suffer for it.",
            PARTS[name],
            f" ({adapter_config.get('model')})" if name == "base_model" else "",
        )
    return other
