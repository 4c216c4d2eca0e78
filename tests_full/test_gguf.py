"""Fused models and GGUF files read by transformers and by llama.cpp, where they are at hand (`tests_full.outside`)."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from finetune_dataflow.embedded_model import embedded_model_directory
from finetune_dataflow.engine.chat import load_encoder
from finetune_dataflow.engine.fused import fuse
from finetune_dataflow.engine.gguf import convert_gguf
from finetune_dataflow.engine.gguf_tokenizer import load_tokenizer
from finetune_dataflow.engine.gguf_writer import write_gguf, write_lora_gguf
from finetune_dataflow.engine.models import load_model
from finetune_dataflow.engine.settings import GenerationSettings
from tests.architectures import write_architecture
from tests.test_fused import METHODS, write_adapter
from tests.test_gguf_writer import IDS, NAMES, WORDS, logits, read_back, write_model
from tests_full.outside import python_with

ROOT = Path(__file__).resolve().parents[1]
FUSED = (
    "llama", "llama_untied", "mistral", "phi", "phi3", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text",
    "gemma4_text", "cohere", "olmo2", "granite", "stablelm",
)  # fmt: skip
IN_TRANSFORMERS = tuple(name for name in NAMES if name != "gemma")  # its reader knows gemma2 and later ones only
KINDS = ("f16", "q8_0")
MAX_TOKENS = 12
# Without digits: transformers' reader knows no splitting rule called smollm, which parts them.
PROMPTS = [
    "What is the capital of France?", "Why is the sky blue?", "Name three colours.", "How do I reset my password?",
    "Write a haiku about rain.", "My parcel has not arrived.", "What is photosynthesis?", "Tell me a joke.",
    "Translate 'good morning' into German.", "How do I boil an egg?", "Who wrote Hamlet?", "What is a prime number?",
    "Give me a name for a cat.", "How far away is the moon?", "What does HTTP mean?", "I want to cancel my order.",
    "Explain gravity to a child.", "What is the opposite of hot?", "Where do penguins live?", "Thank you for your help!",
]  # fmt: skip

Asking = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]


def asking(python: Path, worker: str, directory: Path, path: str = "") -> Asking:
    """Ask a worker that runs in a process of its own."""

    def ask(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        (directory / "requests.json").write_text(json.dumps(requests, default=str))
        command = [
            str(python),
            str(ROOT / "tests_full" / worker),
            str(directory / "requests.json"),
            str(directory / "answers.json"),
        ]
        environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
        outcome = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert outcome.returncode == 0, outcome.stderr[-3000:]
        answers: list[dict[str, Any]] = json.loads((directory / "answers.json").read_text())
        return answers

    return ask


@pytest.fixture(scope="session")
def transformers_says(tmp_path_factory: pytest.TempPathFactory) -> Asking:
    """Ask transformers. It reads GGUF through the package gguf, which is lent to it from here."""
    python = python_with("torch", "transformers")
    directory = tmp_path_factory.mktemp("transformers")
    lent = directory / "lent"
    lent.mkdir()
    for each in {file.parts[0] for file in importlib.metadata.files("gguf") or [] if file.parts[0].startswith("gguf")}:
        (lent / each).symlink_to(Path(str(importlib.metadata.distribution("gguf").locate_file(each))))
    return asking(python, "transformers_worker.py", directory, str(lent))


@pytest.fixture(scope="session")
def llama_cpp_says(tmp_path_factory: pytest.TempPathFactory) -> Asking:
    """Ask llama.cpp."""
    return asking(python_with("xllamacpp"), "llama_cpp_worker.py", tmp_path_factory.mktemp("llama_cpp"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {name: write_model(root / name, name) for name in NAMES}


@pytest.fixture(scope="module")
def files(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Each tiny model as a file of each kind."""
    root = tmp_path_factory.mktemp("files")
    return {(name, kind): write_gguf(tiny[name], root / f"{name}-{kind}.gguf", kind) for name in NAMES for kind in KINDS}  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model fused with an adapter that changes its replies, and both as GGUF files."""
    root = tmp_path_factory.mktemp("embedded")
    base = embedded_model_directory()
    keys = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")
    adapter = write_adapter(base, root / "adapter", strength=0.1, num_layers=8, lora_keys=keys)
    fuse(base, adapter, root / "fused")
    assert np.abs(logits(root / "fused") - logits(base)).max() > 1  # its replies are its own
    write_gguf(root / "fused", root / "f16.gguf", "f16")
    write_gguf(root / "fused", root / "q8_0.gguf", "q8_0")
    write_gguf(base, root / "base.gguf", "f16")
    write_lora_gguf(adapter, base, root / "lora.gguf")
    return root


def as_stored(model: Path, name: str, path: Path) -> NDArray[Any]:
    """The logits that mlx-lm computes with the weights in a GGUF file, float32 [ids, tokens]."""
    weights = read_back(path, name, json.loads((model / "config.json").read_text()))
    read = load_model(model)
    read.load_weights([(each, mx.array(weight)) for each, weight in weights.items()])
    return np.array(read(mx.array([IDS])))[0]


@functools.cache
def replies(directory: Path) -> list[list[int]]:
    """The greedy replies that our own generation gives, as token ids."""
    from finetune_dataflow.engine.generation import replies as generated

    encoder = load_encoder(directory)
    prompts = [encoder.prompt_ids([{"role": "user", "content": prompt}]) for prompt in PROMPTS]
    found = generated(directory, None, prompts, encoder, GenerationSettings(max_tokens=MAX_TOKENS, generation_batch_size=20))
    return [list(each.token_ids) for each in found]


def without_end(token_ids: list[int], directory: Path) -> list[int]:
    stops = load_encoder(directory).stop_ids
    return token_ids[:-1] if token_ids and token_ids[-1] in stops else token_ids


def test_transformers_reads_every_fused_architecture_whole_with_the_same_logits(
    transformers_says: Asking, tmp_path: Path
) -> None:
    places = {}
    for name in FUSED:
        base = write_architecture(tmp_path / name, name, layers=2)
        for method in ("lora", "full"):
            adapter = write_adapter(base, tmp_path / f"{name}-{method}-adapter", **METHODS[method])
            fuse(base, adapter, tmp_path / f"{name}-{method}")
            places[f"{name} {method}"] = tmp_path / f"{name}-{method}"
    ids = [min(each, 258) for each in IDS]
    answers = transformers_says([{"model": path, "ids": ids} for path in places.values()])
    for (name, path), answer in zip(places.items(), answers, strict=True):
        assert not any(answer["loading"].values()), (name, answer["loading"])
        np.testing.assert_allclose(answer["logits"], np.array(load_model(path)(mx.array([ids])))[0], atol=2e-4, err_msg=name)


def test_transformers_computes_what_mlx_lm_does_with_a_files_weights(
    transformers_says: Asking, tiny: dict[str, Path], files: dict[tuple[str, str], Path]
) -> None:
    asked = [key for key in files if key[0] in IN_TRANSFORMERS]
    answers = transformers_says([{"model": files[key], "ids": IDS, "texts": [WORDS]} for key in asked])
    for (name, kind), answer in zip(asked, answers, strict=True):
        assert not any(answer["loading"].values()), (name, answer["loading"])
        np.testing.assert_allclose(
            answer["logits"], as_stored(tiny[name], name, files[name, kind]), atol=1e-3, err_msg=f"{name} {kind}"
        )
        assert answer["text_ids"] == [load_tokenizer(tiny[name]).encode(WORDS)], name


def test_llama_cpp_computes_what_mlx_lm_does_with_a_files_weights(
    llama_cpp_says: Asking, tiny: dict[str, Path], files: dict[tuple[str, str], Path]
) -> None:
    expected = {name: as_stored(tiny[name], name, files[name, "f16"]) for name in NAMES}  # q8_0 rounds what is multiplied, too
    asked = [{"model": files[name, "f16"], "ids": IDS[: printable(each) + 1]} for name, each in expected.items()]
    for (name, each), answer in zip(expected.items(), llama_cpp_says(asked), strict=True):
        assert_log_probabilities(answer, each[printable(each)], name)


def printable(computed: NDArray[Any]) -> int:
    """The last place after which the most probable token is a printable character: llama.cpp tells of no half character."""
    return max(place for place, each in enumerate(computed) if 32 < each.argmax() < 127)


def assert_log_probabilities(answer: dict[str, Any], expected: NDArray[Any], name: str) -> None:
    found = np.full(len(expected), np.nan)
    for token, value in answer["log_probabilities"]:
        found[token] = value
    np.testing.assert_allclose(found, expected - np.logaddexp.reduce(expected), atol=0.1, err_msg=name)


@pytest.mark.parametrize("name", ["llama_untied", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3"])
def test_llama_cpp_puts_an_adapters_file_on_the_bases(
    llama_cpp_says: Asking, tiny: dict[str, Path], files: dict[tuple[str, str], Path], tmp_path: Path, name: str
) -> None:
    keys = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "model.embed_tokens", "lm_head")
    adapter = write_adapter(tiny[name], tmp_path / "adapter", 0.1, **({"lora_keys": keys} if name == "llama_untied" else {}))
    lora = write_lora_gguf(adapter, tiny[name], tmp_path / "lora.gguf")
    tuned = logits(tiny[name], adapter)
    place = printable(tuned)
    (answer,) = llama_cpp_says([{"model": files[name, "f16"], "lora": lora, "ids": IDS[: place + 1]}])
    assert_log_probabilities(answer, tuned[place], name)
    assert np.abs(tuned - logits(tiny[name])).max() > 0.3


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_and_mlx_give_the_same_twenty_replies_to_one_file(
    transformers_says: Asking, embedded: Path, tmp_path: Path, kind: str
) -> None:
    directory = convert_gguf(embedded / f"{kind}.gguf", tmp_path / "converted")
    (answer,) = transformers_says([{"model": embedded / f"{kind}.gguf", "prompts": PROMPTS, "max_tokens": MAX_TOKENS}])
    encoder = load_encoder(embedded / "fused")
    assert answer["prompt_ids"] == [encoder.prompt_ids([{"role": "user", "content": prompt}]) for prompt in PROMPTS]
    assert [without_end(each, directory) for each in answer["replies"]] == replies(directory)


def test_a_fused_directory_answers_in_transformers_as_in_mlx_lm(transformers_says: Asking, embedded: Path) -> None:
    (answer,) = transformers_says([{"model": embedded / "fused", "prompts": PROMPTS, "max_tokens": MAX_TOKENS}])
    assert [without_end(each, embedded / "fused") for each in answer["replies"]] == replies(embedded / "fused")


@pytest.mark.parametrize(("model", "lora"), [("f16.gguf", ""), ("base.gguf", "lora.gguf")])
def test_llama_cpp_answers_as_mlx_lm_does_but_for_its_rounding(
    llama_cpp_says: Asking, embedded: Path, model: str, lora: str
) -> None:
    request = {"model": embedded / model, "lora": embedded / lora if lora else "", "prompts": PROMPTS, "max_tokens": MAX_TOKENS}
    (answer,) = llama_cpp_says([request])
    encoder = load_encoder(embedded / "fused")
    expected = [encoder.reply_text(each) for each in replies(embedded / "fused")]
    assert sum(ours == theirs.strip() for ours, theirs in zip(expected, answer["replies"], strict=True)) >= 18


def test_the_package_gguf_reads_every_tensor_of_a_file(files: dict[tuple[str, str], Path]) -> None:
    for path in files.values():
        for tensor in gguf.GGUFReader(path).tensors:
            assert np.isfinite(gguf.dequantize(tensor.data, tensor.tensor_type)).all(), (path, tensor.name)
