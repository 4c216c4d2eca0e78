import hashlib
from pathlib import Path
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load, load_model

from tests.architectures import ARCHITECTURES, MIXTURES_OF_EXPERTS, PADDED_VOCABULARY, VOCABULARY, WINDOW, write_architecture

ROW = [ord(character) for character in "The quick brown fox jumps"]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_architecture(tmp_path_factory.mktemp("architectures") / request.param, request.param)


def logits(model: nn.Module, *rows: list[int]) -> np.ndarray:
    return np.array(model(mx.array(rows)).astype(mx.float32))


def digest(directory: Path) -> str:
    return hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()


def test_it_loads_with_three_layers_and_gives_finite_logits_for_every_token_of_the_vocabulary(directory: Path) -> None:
    model, config = load_model(directory)
    found = logits(model, ROW, ROW[::-1])
    assert found.shape == (2, len(ROW), config["vocab_size"]) and config["vocab_size"] in (VOCABULARY, PADDED_VOCABULARY)
    assert np.isfinite(found).all() and found.std() > 0.1
    assert len(model.layers) == 3


def test_no_position_sees_the_tokens_after_it(directory: Path) -> None:
    model, _ = load_model(directory)
    one, other = logits(model, ROW)[0], logits(model, [*ROW[:-1], ord("!")])[0]
    assert np.allclose(one[:-1], other[:-1], atol=1e-5)
    assert np.abs(one[-1] - other[-1]).max() > 0.01


def test_an_earlier_token_changes_the_last_logits(directory: Path) -> None:
    model, _ = load_model(directory)
    one, other = logits(model, ROW)[0], logits(model, [*ROW[:-3], ord("!"), *ROW[-2:]])[0]
    assert np.abs(one[-1] - other[-1]).max() > 1e-3


def test_no_parameter_is_zero_or_of_one_value(directory: Path) -> None:
    weights = mx.load(str(directory / "model.safetensors"))
    assert isinstance(weights, dict)
    flat = [name for name, weight in weights.items() if weight.size > 1 and float(mx.std(weight)) == 0]
    assert flat == [] and all(float(mx.abs(weight).sum()) > 0 for weight in weights.values())


@pytest.mark.parametrize("group_size", [32, 64])
def test_every_matrix_can_be_quantised(directory: Path, group_size: int) -> None:
    model, _ = load_model(directory)
    before = logits(model, ROW)
    nn.quantize(model, group_size=group_size, bits=8)
    after = logits(model, ROW)
    # The median, because a mixture may send a token to another expert.
    assert 0 < np.median(np.abs(after - before)) < 0.1 * before.std()


def test_mlx_lm_loads_it_with_a_tokenizer_whose_ids_are_bytes(directory: Path) -> None:
    model, tokenizer = load(str(directory))[:2]
    assert tokenizer.encode("Ab", add_special_tokens=False) == [65, 98]
    assert tokenizer.eos_token_ids == {258}
    assert logits(model, ROW).shape[1] == len(ROW)


@pytest.mark.parametrize("layers", [1, 2, 5])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_number_of_layers_is_free(name: str, layers: int, tmp_path: Path) -> None:
    model, _ = load_model(write_architecture(tmp_path, name, layers=layers))
    assert len(model.layers) == layers and np.isfinite(logits(model, ROW)).all()


@pytest.mark.parametrize("name", ["llama", "qwen3_next"])
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(name: str, tmp_path: Path) -> None:
    digests = []
    for folder, seed in (("one", 3), ("two", 3), ("three", 4)):
        mx.random.uniform()  # what was drawn before must not matter
        digests.append(digest(write_architecture(tmp_path / folder, name, seed=seed)))
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("name", ["mistral", "ministral3", "gemma3_text", "gemma4_text"])
def test_a_sliding_window_hides_what_is_further_back(name: str, tmp_path: Path) -> None:
    directory = write_architecture(tmp_path, name)
    windowed, _ = load_model(directory)
    wide, _ = load_model(directory, model_config={"sliding_window": 512})
    one, other = logits(windowed, ROW)[0], logits(wide, ROW)[0]
    assert np.allclose(one[:WINDOW], other[:WINDOW], atol=1e-5)
    assert np.abs(one[WINDOW:] - other[WINDOW:]).max(axis=1).min() > 1e-4


@pytest.mark.parametrize("name", MIXTURES_OF_EXPERTS)
def test_a_mixture_has_experts_in_every_layer(name: str, tmp_path: Path) -> None:
    model, _ = load_model(write_architecture(tmp_path, name))
    weights = cast(list[tuple[str, mx.array]], tree_flatten(model.parameters()))
    assert [weight.shape[0] for path, weight in weights if "switch_mlp.up_proj" in path] == [4, 4, 4]


def test_the_hidden_size_is_free(tmp_path: Path) -> None:
    for name in ARCHITECTURES:
        model, _ = load_model(write_architecture(tmp_path / name, name, layers=2, hidden_size=128))
        assert np.isfinite(logits(model, ROW)).all(), name


def test_an_unknown_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="lama"):
        write_architecture(tmp_path, "lama")
