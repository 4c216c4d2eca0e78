from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may ask a hub

import pytest

import finetune_dataflow  # noqa: F401 -- before MLX, so that the tests run on the fast matrix products
from tests.tiny_model import write_tiny_model

WORDS = ("amber", "birch", "cedar", "delta", "ember", "flint", "grove", "heath",
         "ivory", "jasper", "karst", "larch", "maple", "north", "ocean", "pearl")  # fmt: skip


@pytest.fixture(autouse=True)
def replies_of_no_other_test(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test generates its own replies: those of others, and of this machine's user, are out of reach."""
    from finetune_dataflow import generation

    directory = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(generation, "user_cache_directory", lambda: directory)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a random two-layer llama."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def rows() -> list[dict[str, str]]:
    """Sixty different questions with replies in one style."""
    return [{"question": f"What is {WORDS[n % 16]} {n}?", "reply": f"It is {WORDS[(3 * n + 1) % 16]}."} for n in range(60)]


@pytest.fixture(scope="session")
def data_file(rows: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sixty rows as a JSON list."""
    path = tmp_path_factory.mktemp("data") / "support.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture
def inputs(data_file: Path, tiny_model: Path, tmp_path: Path) -> Iterator[dict[str, object]]:
    """The inputs of a small run on the tiny model."""
    yield {
        "data_path": str(data_file), "input_text_key": "question", "output_text_key": "reply",
        "model_id": str(tiny_model), "output_dir": str(tmp_path / "run"), "num_layers": 2, "max_tokens": 8,
        "epochs": 2.0, "learning_rate": 0.01,
    }  # fmt: skip
