import errno
import fcntl
import gc
import json
import logging
import math
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from finetune_dataflow.engine import exponentials
from finetune_dataflow.engine import prefix_states as module
from finetune_dataflow.engine.batches import Batch, batch, epoch_order, in_order, of_lines, widths
from finetune_dataflow.engine.losses import PLAIN, LossPath
from finetune_dataflow.engine.methods import make_trainable
from finetune_dataflow.engine.prefix_states import (
    DamagedStatesError,
    NoPrefix,
    PrefixStates,
    bytes_needed,
    fits,
    frozen_layers,
    opened,
    prefix_states,
    prune,
    starting_after,
    state_kind,
)
from finetune_dataflow.engine.randomness import seeded
from finetune_dataflow.engine.recompute import recomputing
from finetune_dataflow.engine.tokens import EncodedRow, TokenColumns, token_columns
from tests.architectures import ARCHITECTURES, write_architecture
from tests.fit_values import settings_of

REPOSITORY = Path(__file__).parents[1]
EQUAL = (
    "llama", "llama_untied", "mistral", "ministral3", "phi", "phi3", "mixtral", "qwen2", "qwen3", "qwen3_moe", "qwen3_next",
    "gemma", "gemma2", "gemma3_text", "cohere", "olmo2", "mamba2", "granite", "stablelm", "gpt2", "openelm",
)  # fmt: skip
REFUSED = {"gemma4_text": "its layer 0 gives a tuple, of which later layers may see every part"}
TIED = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "cohere", "mamba2", "granite", "gpt2", "openelm")


def rows_of_lengths(*lengths: int) -> TokenColumns:
    """Rows of so many tokens, the last four of which are learned."""
    rows = [
        EncodedRow(n, [(7 * n + 3 * place) % 250 for place in range(length - 4)], [*b"yes", 258])
        for n, length in enumerate(lengths)
    ]
    return token_columns(rows)


COLUMNS = rows_of_lengths(9, 30, 14, 22, 11, 27, 18)
EVERY_POSITION = 8 + 29 + 13 + 21 + 10 + 26 + 17


def flat(tree: Any) -> dict[str, mx.array]:
    return dict(cast(list[tuple[str, mx.array]], tree_flatten(tree)))


def norm(gradient: dict[str, mx.array]) -> float:
    return math.sqrt(sum(float(each.astype(mx.float32).square().sum()) for each in gradient.values()))


def tuned(directory: Path, **values: Any) -> nn.Module:
    """The model ready for a fit of its last layer, its LoRA layers doing something already."""
    model, _ = load_model(directory)
    make_trainable(model, settings_of(**{"num_layers": 1, **values}).method)
    drawn = {name: each for name, each in flat(model.trainable_parameters()).items() if name.endswith("lora_b")}
    with seeded(1):
        model.load_weights([(name, 0.02 * mx.random.normal(each.shape)) for name, each in drawn.items()], strict=False)
    model.train()
    return model


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """States computed by one thread with MLX's own exponentials: batches and bits are then the same on every machine."""
    monkeypatch.setattr(module, "crew_size", lambda *_: 1)
    monkeypatch.setattr(exponentials, "usable", lambda: False)


def poison(*modules: nn.Module) -> None:
    """Make every parameter NaN: whatever is computed from one is not finite."""
    for each in modules:
        each.update(tree_map(lambda weight: mx.full(weight.shape, math.nan, weight.dtype), each.parameters()))


def loss_and_gradient(
    model: nn.Module, rows: Batch, states: mx.array | None = None, path: LossPath = PLAIN, layers: int = 2
) -> tuple[float, dict[str, mx.array]]:
    """Of a batch: plainly, or behind the first layers."""

    def loss(model: nn.Module, rows: Batch) -> mx.array:
        with nullcontext() if states is None else starting_after(model, layers, states):
            return path.mean_loss(model, rows)

    value, gradient = nn.value_and_grad(model, loss)(model, rows)
    mx.eval(value, gradient)
    return value.item(), flat(gradient)


def shuffled_batches(columns: TokenColumns = COLUMNS) -> list[Batch]:
    """The batches of an epoch: other rows together, and other widths, than those that the states are computed in."""
    return [batch(columns, indices, 3, widths(columns.lengths)) for indices in epoch_order(columns, 3, 5, 0)]


def assert_equal(one: tuple[float, dict[str, mx.array]], other: tuple[float, dict[str, mx.array]], tolerance: float) -> None:
    (value, gradient), (other_value, other_gradient) = one, other
    assert math.isfinite(value) and abs(value - other_value) <= tolerance * abs(value)
    assert list(gradient) == list(other_gradient) and norm(gradient) > 0
    assert norm({name: gradient[name] - other_gradient[name] for name in gradient}) <= tolerance * norm(gradient)


def plain_states(model: nn.Module, columns: TokenColumns, index: int, layers: int = 2) -> mx.array:
    """Of a llama, written out: one row, no padding."""
    hidden = model.model.embed_tokens(mx.array(columns.row_ids(index)[:-1])[None])
    for layer in model.model.layers[:layers]:
        hidden = layer(hidden, "causal")
    return hidden[0]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_architecture(tmp_path_factory.mktemp("prefix") / "llama", "llama")


@pytest.fixture
def model(llama: Path) -> nn.Module:
    return tuned(llama)


@pytest.fixture
def computed(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the inputs that the model is called with."""
    original: Callable[..., mx.array] = type(model).__call__
    shapes: list[tuple[int, ...]] = []

    def counting(self: nn.Module, inputs: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        shapes.append(inputs.shape)
        return original(self, inputs, *args, **kwargs)

    monkeypatch.setattr(type(model), "__call__", counting)
    return shapes


def stored(model: nn.Module, directory: Path, **others: Any) -> PrefixStates:
    return prefix_states(model, COLUMNS, 2, directory, {"model": "tiny", "keys": ("q", "v")}, **others)


def test_the_table_names_every_architecture() -> None:
    assert {*EQUAL, *REFUSED} == {*ARCHITECTURES} and len(EQUAL) + len(REFUSED) == 22


@pytest.mark.parametrize("name", EQUAL)
def test_loss_and_gradient_are_equal_and_no_frozen_layer_is_evaluated(name: str, tmp_path: Path) -> None:
    model = tuned(write_architecture(tmp_path / "model", name))
    assert frozen_layers(model) == 2
    expected = [loss_and_gradient(model, each) for each in shuffled_batches()]
    states = stored(model, tmp_path / "store", batch_size=4)
    frozen = model.layers[:2]
    if name not in TIED:  # a tied embedding is needed for the logits
        frozen += [module for path, module in model.named_modules() if isinstance(module, nn.Embedding)]
        assert len(frozen) == 3
    poison(*frozen)
    found = [loss_and_gradient(model, each, states.gather(each)) for each in shuffled_batches()]
    for one, other in zip(expected, found, strict=True):
        assert_equal(one, other, 1e-5)
    assert not math.isfinite(loss_and_gradient(model, shuffled_batches()[0])[0])


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_whose_layers_give_more_than_one_array_is_refused(name: str, tmp_path: Path) -> None:
    model = tuned(write_architecture(tmp_path / "model", name))
    with pytest.raises(NoPrefix) as refusal:
        stored(model, tmp_path / "store")
    assert str(refusal.value) == REFUSED[name]
    assert not (tmp_path / "store").exists()


def test_on_the_same_shapes_loss_and_gradient_are_equal_bit_by_bit(model: nn.Module, tmp_path: Path) -> None:
    states = stored(model, tmp_path / "store", batch_size=4)
    for each in in_order(COLUMNS, 4):
        value, gradient = loss_and_gradient(model, each)
        again, of_states = loss_and_gradient(model, each, states.gather(each))
        assert value == again
        assert all(mx.array_equal(gradient[name], of_states[name]) for name in gradient)


def test_one_frozen_layer_of_three_and_a_full_fit_of_the_others_are_equal(llama: Path, tmp_path: Path) -> None:
    model = tuned(llama, num_layers=2, fine_tune_type="full", lora_rank=8)
    assert frozen_layers(model) == 1
    states = prefix_states(model, COLUMNS, 1, tmp_path / "store", {})
    for each in shuffled_batches():
        expected = loss_and_gradient(model, each)
        assert_equal(expected, loss_and_gradient(model, each, states.gather(each), layers=1), 1e-5)


def test_gathered_positions_and_stored_states_go_together(model: nn.Module, tmp_path: Path) -> None:
    states, path = stored(model, tmp_path / "store"), LossPath(gathered=True)
    for each in shuffled_batches():
        assert_equal(loss_and_gradient(model, each), loss_and_gradient(model, each, states.gather(each), path), 1e-5)


@pytest.mark.parametrize("outside", [True, False])
def test_checkpointing_around_or_within_the_block_is_equal(model: nn.Module, tmp_path: Path, outside: bool) -> None:
    states = stored(model, tmp_path / "store")
    rows = shuffled_batches()[0]
    expected = loss_and_gradient(model, rows)
    original = type(model.layers[0])
    poison(*model.layers[:2])

    def loss(model: nn.Module) -> mx.array:
        with starting_after(model, 2, states.gather(rows)), nullcontext() if outside else recomputing(model):
            return PLAIN.mean_loss(model, rows)

    with recomputing(model) if outside else nullcontext():
        value, gradient = nn.value_and_grad(model, loss)(model)
        mx.eval(value, gradient)
    assert_equal(expected, (value.item(), flat(gradient)), 1e-5)
    assert all(type(layer) is original for layer in model.layers)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_half_precision_is_kept_in_two_bytes_a_value_as_it_is(llama: Path, tmp_path: Path, dtype: mx.Dtype) -> None:
    model = tuned(llama)
    model.set_dtype(dtype)
    states = stored(model, tmp_path / "store", batch_size=7)
    assert states.dtype == dtype and (tmp_path / "store" / "states.bin").stat().st_size == 2 * 64 * EVERY_POSITION
    for each in in_order(COLUMNS, 7):
        gathered = states.gather(each)
        assert gathered.dtype == dtype
        assert_equal(loss_and_gradient(model, each), loss_and_gradient(model, each, gathered), 1e-5)
    for each in shuffled_batches():
        assert_equal(loss_and_gradient(model, each), loss_and_gradient(model, each, states.gather(each)), 2e-2)


def test_states_lie_where_the_batch_has_the_row_and_zeros_elsewhere(model: nn.Module, tmp_path: Path) -> None:
    states = stored(model, tmp_path / "store", batch_size=3)
    assert (states.layers, states.hidden, states.dtype) == (2, 64, mx.float32)
    inputs = np.zeros((3, 48), np.int32)
    placed = [(0, (0, 0)), (2, (0, 8)), (3, (1, 5)), (5, (0, 21))]
    rows = of_lines([each for each, _ in placed], inputs, np.full((3, 48), -100, np.int32), [place for _, place in placed])
    gathered = np.array(states.gather(rows))
    assert gathered.shape == (3, 48, 64) and np.isfinite(gathered).all()
    expected = np.zeros((3, 48, 64), np.float32)
    for index, (line, column) in placed:
        alone = np.array(plain_states(model, COLUMNS, index))
        expected[line, column : column + len(alone)] = alone
    np.testing.assert_allclose(gathered, expected, rtol=1e-4, atol=1e-5)
    filled = (gathered != 0).any(axis=2)
    assert filled[0].tolist() == [True] * (8 + 13 + 26) + [False]
    assert filled[1].tolist() == [False] * 5 + [True] * 21 + [False] * 22
    assert not filled[2].any()


def test_the_block_gives_back_classes_parameters_and_mode_after_an_exception_too(model: nn.Module, tmp_path: Path) -> None:
    block, names, training = type(model.layers[0]), list(flat(model.parameters())), model.training
    attributes = dict(vars(block))
    states = stored(model, tmp_path / "store")
    assert model.training is training and all(type(layer) is block for layer in model.layers)
    rows = shuffled_batches()[0]
    with starting_after(model, 2, states.gather(rows)):
        assert [type(layer) is block for layer in model.layers] == [False, False, True]
        assert isinstance(model.layers[1], block) and type(model.layers[1]).__name__ == block.__name__
        assert list(flat(model.parameters())) == names
    with pytest.raises(KeyError), starting_after(model, 2, states.gather(rows)):
        raise KeyError
    assert all(type(layer) is block for layer in model.layers) and dict(vars(block)) == attributes
    assert list(flat(model.parameters())) == names


def test_states_are_freed_with_the_block_not_by_the_collector(model: nn.Module) -> None:
    mx.eval(model.parameters())
    gc.disable()
    try:
        before = mx.get_active_memory()
        for _ in range(10):
            with starting_after(model, 2, mx.zeros((64, 64, 64))):
                mx.eval(model(mx.zeros((64, 64), mx.int32)))
        assert mx.get_active_memory() - before < 64**3 * 4
    finally:
        gc.enable()


def test_states_of_another_shape_than_the_inputs_are_not_taken(model: nn.Module) -> None:
    with (
        pytest.raises(ValueError, match=r"the states are of lines and width \(2, 8\), the inputs of \(2, 9\)"),
        starting_after(model, 2, mx.zeros((2, 8, 64))),
    ):
        model(mx.zeros((2, 9), mx.int32))


def test_the_frozen_layers_leave_a_cache_alone(model: nn.Module) -> None:
    cache = make_prompt_cache(model)
    with starting_after(model, 2, mx.zeros((1, 8, 64))):
        mx.eval(model(mx.zeros((1, 8), mx.int32), cache=cache))
    assert [each.offset for each in cache] == [0, 0, 8]


@pytest.mark.parametrize("layers", [0, 4])
def test_a_start_after_layers_that_are_not_there_is_refused(model: nn.Module, layers: int) -> None:
    with (
        pytest.raises(NoPrefix, match=f"has 3 layers; it cannot start after {layers}"),
        starting_after(model, layers, mx.zeros(1)),
    ):
        pass


@pytest.mark.parametrize(
    ("trained", "frozen"),
    [
        ((), 3),
        (("model.layers.2.mlp.up_proj",), 2),
        (("model.layers.1.input_layernorm", "model.layers.2.mlp"), 1),
        (("model.layers.0.self_attn.q_proj",), 0),
        (("model.norm", "lm_head"), 3),
        (("model.norm", "model.layers.1"), 1),
        (("model.embed_tokens",), 0),
        (("model",), 0),
    ],
)
def test_layers_count_as_frozen_up_to_the_first_that_is_trained(tmp_path: Path, trained: tuple[str, ...], frozen: int) -> None:
    model, _ = load_model(write_architecture(tmp_path, "llama_untied"))
    model.freeze()
    modules = dict(model.named_modules())
    for name in trained:
        modules[name].unfreeze()
    assert frozen_layers(model) == frozen


def test_a_tied_embedding_that_is_trained_comes_before_the_layers(llama: Path) -> None:
    assert frozen_layers(tuned(llama, lora_keys=("self_attn.q_proj",))) == 2
    assert frozen_layers(tuned(llama, lora_keys=("self_attn.q_proj", "model.embed_tokens"))) == 0
    model = tuned(llama)
    model.model.embed_tokens.unfreeze()
    assert frozen_layers(model) == 0


def test_dropout_in_a_frozen_layer_ends_what_is_constant_and_a_switched_off_one_does_not(llama: Path) -> None:
    model = tuned(llama, num_layers=2, lora_dropout=0.5)
    model.freeze()
    assert frozen_layers(model) == 1
    model = tuned(llama, num_layers=2, lora_dropout=0.0)
    model.freeze()
    assert frozen_layers(model) == 3


def test_nothing_is_frozen_in_a_model_that_is_not_understood(model: nn.Module) -> None:
    assert frozen_layers(nn.Linear(2, 2)) == 0
    model.tower = nn.Sequential(nn.Linear(2, 2))
    assert frozen_layers(model) == 0
    model.tower.freeze()
    assert frozen_layers(model) == 2
    model.model.layers[1] = model.model.layers[0]
    assert frozen_layers(model) == 0


def test_a_model_that_calls_its_layers_in_another_order_is_refused(model: nn.Module) -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [nn.Linear(4, 4) for _ in range(3)]

        def __call__(self, inputs: mx.array) -> mx.array:
            hidden = mx.zeros((*inputs.shape, 4))
            for layer in self.layers[::-1]:
                hidden = layer(hidden)
            return hidden

    with pytest.raises(NoPrefix, match="not called once each in their order"):
        state_kind(Backwards(), 1)


def test_hidden_size_and_type_are_found_without_computing_anything(llama: Path) -> None:
    model, _ = load_model(llama, lazy=True)
    poison(model)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    assert state_kind(model, 2) == (64, mx.float32)
    assert mx.get_peak_memory() - before < 100_000  # one layer's weights are 160 KB


def test_more_layers_than_are_frozen_are_refused(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(NoPrefix, match="2 of the first layers are frozen, not 3"):
        prefix_states(model, COLUMNS, 3, tmp_path / "store", {})
    with pytest.raises(NoPrefix, match="2 of the first layers are frozen, not 0"):
        prefix_states(model, COLUMNS, 0, tmp_path / "store", {})


def test_rows_without_inputs_are_refused(model: nn.Module, tmp_path: Path) -> None:
    for columns in (token_columns([]), token_columns([EncodedRow(1, [], [5])])):
        with pytest.raises(NoPrefix, match="no tokens"):
            prefix_states(model, columns, 2, tmp_path / "store", {})


def test_bytes_are_counted_for_inputs_which_are_one_less_than_tokens(model: nn.Module, tmp_path: Path) -> None:
    assert bytes_needed(COLUMNS, 64, mx.float32) == 124 * 64 * 4 == 31744
    assert bytes_needed(COLUMNS, 576, mx.bfloat16) == 124 * 576 * 2
    stored(model, tmp_path / "store")
    assert (tmp_path / "store" / "states.bin").stat().st_size == 31744


def test_a_budget_and_a_disk_that_are_too_small_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = 3_000_000_000
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**12, 0, free))
    folder = tmp_path / "not" / "there"
    assert fits(2_000_000_000, 14, folder, 2_000_000_000) is None
    assert fits(2_100_000_000, 14, folder, 1_500_000_000) == (
        "the states of the 14 frozen layers would take 2.1 GB; frozen_states_gb allows 1.5"
    )
    assert fits(2_100_000_000, 14, folder) == (
        f"the states of the 14 frozen layers would take 2.1 GB; the disk of {folder} has 3 GB free, "
        "of which 1 GB is left for the fit"
    )
    assert not folder.exists()


def test_a_store_that_does_not_fit_is_not_begun_but_one_that_is_there_is_used(
    model: nn.Module, tmp_path: Path, computed: list[tuple[int, ...]]
) -> None:
    with pytest.raises(NoPrefix, match=r"would take 3\.17e-05 GB; frozen_states_gb allows 3\.17e-05"):
        stored(model, tmp_path / "store", budget_bytes=31743)
    assert computed == [(1, 8)]  # to find the hidden size
    stored(model, tmp_path / "store", budget_bytes=31744).close()
    computed.clear()
    stored(model, tmp_path / "store", budget_bytes=1)
    assert computed == []


def test_states_are_computed_once_and_read_again(
    model: nn.Module, tmp_path: Path, computed: list[tuple[int, ...]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    first = stored(model, tmp_path / "store", batch_size=4)
    assert computed == [(1, 8), (4, 24), (4, 32)]  # to find the hidden size, then every row
    assert "Computing the states of the first 2 layers once" in caplog.text
    computed.clear()
    again = stored(model, tmp_path / "store", batch_size=2)
    assert computed == [] and f"are read from {tmp_path / 'store'}" in caplog.text
    rows = shuffled_batches()[0]
    assert mx.array_equal(first.gather(rows), again.gather(rows))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store", "store.lock"]
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == ["states.bin", "states.json"]


def shorten(directory: Path) -> None:
    os.truncate(directory / "states.bin", 31740)


def lengthen(directory: Path) -> None:
    with (directory / "states.bin").open("ab") as file:
        file.write(b"\0")


def flip(directory: Path) -> None:
    content = bytearray((directory / "states.bin").read_bytes())
    content[20_001] ^= 1
    (directory / "states.bin").write_bytes(content)


def zero_a_page(directory: Path) -> None:
    with (directory / "states.bin").open("r+b") as file:
        file.seek(8192)
        file.write(bytes(4096))


def change(**values: Any) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        path = directory / "states.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return write


@pytest.mark.parametrize(("damage", "reason"), [
    (shorten, "states.bin has 31740 bytes of 31744"),
    (lengthen, "states.bin has 31745 bytes of 31744"),
    (flip, "states.bin is not as it was written"),
    (zero_a_page, "states.bin is not as it was written"),
    (lambda directory: (directory / "states.bin").unlink(), "No such file"),
    (lambda directory: (directory / "states.json").unlink(), "states.json cannot be read"),
    (lambda directory: (directory / "states.json").write_text('{"format": 1,'), "states.json cannot be read"),
    (lambda directory: (directory / "states.json").write_text("[]"), "states.json is of another format"),
    (lambda directory: (directory / "states.json").write_text('{"format": 1}'), "'identity'"),
    (change(format=0), "states.json is of another format"),
    (change(hidden=32), "states.bin has 31744 bytes of 15872"),
    (change(dtype="int3"), "'int3'"),
])  # fmt: skip
def test_a_damaged_store_is_computed_again_and_that_is_said(
    model: nn.Module, tmp_path: Path, damage: Callable[[Path], None], reason: str,
    computed: list[tuple[int, ...]], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    rows = shuffled_batches()[0]
    expected = stored(model, tmp_path / "store").gather(rows)
    damage(tmp_path / "store")
    computed.clear()
    assert mx.array_equal(stored(model, tmp_path / "store").gather(rows), expected)
    assert len(computed) == 2 and reason in caplog.text and "are computed again" in caplog.text
    computed.clear()
    stored(model, tmp_path / "store")
    assert computed == []


def test_another_identity_other_rows_and_another_number_of_layers_are_not_taken(
    model: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prefix_states(model, COLUMNS, 2, tmp_path / "store", {"model": "abc"})
    prefix_states(model, COLUMNS, 2, tmp_path / "store", {"model": "def"})
    assert "(model is 'abc' there and 'def' here)" in caplog.text
    with pytest.raises(DamagedStatesError, match="frozen_layers is 2 there and 1 here"):
        opened(tmp_path / "store", COLUMNS, 1, {"model": "def"})
    with pytest.raises(DamagedStatesError, match="columns is"):
        opened(tmp_path / "store", COLUMNS.take([1, 0, 2, 3, 4, 5, 6]), 2, {"model": "def"})
    assert opened(tmp_path / "store", COLUMNS, 2, {"model": "def"}).hidden == 64


def test_a_store_that_is_replaced_stays_readable_to_who_has_it_open(model: nn.Module, tmp_path: Path) -> None:
    first = stored(model, tmp_path / "store")
    rows = shuffled_batches()[0]
    expected = first.gather(rows)
    poison(*model.layers[:2])
    other = prefix_states(model, COLUMNS, 2, tmp_path / "store", {"model": "another"})
    assert mx.array_equal(first.gather(rows), expected)
    assert bool(mx.isnan(other.gather(rows)).any())


def assert_nothing_left(folder: Path) -> None:
    assert [path.name for path in folder.iterdir()] == ["store.lock"]


@pytest.mark.parametrize("limit", [20_000, 31_744 - 1])
def test_a_full_disk_leaves_nothing_behind_and_gives_the_reason(model: nn.Module, tmp_path: Path, limit: int) -> None:
    mx.eval(model.parameters())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(NoPrefix) as refusal:
            stored(model, tmp_path / "states" / "store")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    folder = tmp_path / "states"
    assert str(refusal.value) == f"the states of the frozen layers cannot be written to {folder}: File too large"
    assert_nothing_left(folder)
    assert stored(model, folder / "store").hidden == 64


def test_a_disk_that_fills_before_the_last_file_leaves_nothing_behind(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(directory: Path) -> None:
        assert len(list(directory.iterdir())) == 2
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, "flush_tree", full)
    with pytest.raises(NoPrefix, match="No space left on device"):
        stored(model, tmp_path / "store")
    assert_nothing_left(tmp_path)


def test_a_folder_that_cannot_be_made_is_told(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NoPrefix, match=r"cannot be written to .*file: (Not a directory|File exists)"):
        stored(model, tmp_path / "file" / "store")


def test_an_interrupt_leaves_nothing_behind(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(states: mx.array) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_numpy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stored(model, tmp_path / "store")
    assert_nothing_left(tmp_path)
    assert model.training and len({type(layer) for layer in model.layers}) == 1


def test_what_a_killed_process_left_is_removed(model: nn.Module, tmp_path: Path) -> None:
    left, other = tmp_path / ".store.123", tmp_path / ".storehouse.123"
    for each in (left, other):
        each.mkdir()
        (each / "states.bin").write_text("half")
    stored(model, tmp_path / "store")
    assert not left.exists() and other.exists()


CHILD = """
import hashlib, logging, sys
import finetune_dataflow.engine
from pathlib import Path
import numpy as np
from tests.test_prefix_states import shuffled_batches, stored, tuned
logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
model = tuned(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
states = stored(model, Path(sys.argv[2]))
digest = hashlib.sha256(b"".join(np.array(states.gather(each)).tobytes() for each in shuffled_batches()))
print("found", digest.hexdigest())
"""


def child(llama: Path, store: Path) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", CHILD, str(llama), str(store)]
    started = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    assert started.stdout is not None and started.stdout.readline() == "ready\n"
    return started


def test_two_processes_compute_the_same_states_once_and_a_third_reads_them(llama: Path, tmp_path: Path) -> None:
    children = [child(llama, tmp_path / "store") for _ in range(2)]
    for each in children:
        assert each.stdin is not None
        each.stdin.write("\n")
        each.stdin.flush()
    said = "".join(each.communicate(timeout=60)[0] for each in children)
    assert said.count("Computing the states") == 1 and said.count("are read from") == 1
    found = {line for line in said.splitlines() if line.startswith("found")}
    assert len(found) == 1
    states = opened(tmp_path / "store", COLUMNS, 2, {"model": "tiny", "keys": ["q", "v"]})
    model = tuned(llama)
    for rows in shuffled_batches():
        assert_equal(loss_and_gradient(model, rows), loss_and_gradient(model, rows, states.gather(rows)), 1e-5)


def test_who_waits_for_another_process_says_so_and_takes_a_lock_that_was_removed_meanwhile_anew(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    holder = (tmp_path / "store.lock").open("w")
    fcntl.flock(holder, fcntl.LOCK_EX)
    flock = fcntl.flock

    def until_freed(file: Any, operation: int) -> None:
        if operation == fcntl.LOCK_EX:  # waiting
            (tmp_path / "store.lock").unlink()
            holder.close()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", until_freed)
    stored(model, tmp_path / "store")
    assert caplog.text.count("waiting for it") == 1
    assert (tmp_path / "store.lock").exists()


@pytest.fixture
def stores(model: nn.Module, tmp_path: Path) -> Iterator[list[Path]]:
    """Four closed stores; the second was not used for longest, then the fourth, the first and the third."""
    made = [tmp_path / f"store{n}" for n in range(4)]
    for directory in made:
        stored(model, directory).close()
    for age, directory in zip((20, 40, 10, 30), made, strict=True):
        os.utime(directory, (1e9 - age, 1e9 - age))
    yield made


def size_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


def test_the_stores_that_were_not_used_for_longest_are_removed_until_the_budget_holds(stores: list[Path], tmp_path: Path) -> None:
    assert prune(tmp_path, 4 * size_of(stores[0])) == []
    assert prune(tmp_path, 2 * size_of(stores[0])) == [stores[1], stores[3]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store0", "store0.lock", "store2", "store2.lock"]


def test_a_store_that_is_read_again_counts_as_used(stores: list[Path], tmp_path: Path, model: nn.Module) -> None:
    stored(model, stores[1]).close()
    assert prune(tmp_path, 2 * size_of(stores[0])) == [stores[3], stores[0]]


def test_stores_to_keep_and_stores_in_use_stay(stores: list[Path], tmp_path: Path, model: nn.Module) -> None:
    used = stored(model, stores[3])
    assert prune(tmp_path, 0, keep=[stores[1]]) == [stores[0], stores[2]]
    assert stores[3].exists() and stores[1].exists()
    used.close()
    assert prune(tmp_path, 0) == [stores[1], stores[3]]
    assert [*tmp_path.iterdir()] == []


def test_a_store_that_is_being_made_stays_and_one_that_a_killed_process_left_goes_first(
    stores: list[Path], tmp_path: Path
) -> None:
    for name in (".made.5", ".left.5"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "states.bin").write_text("half")
    with (tmp_path / "made.lock").open("w") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        assert prune(tmp_path, 10**9) == [tmp_path / ".left.5"]
    assert (tmp_path / ".made.5").exists() and all(each.exists() for each in stores)


def test_pruning_touches_nothing_that_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "text").write_text("mine")
    assert prune(tmp_path, 0) == [] and (tmp_path / "notes" / "text").exists()
    assert prune(tmp_path / "nowhere", 0) == []


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident pages of files are counted on Linux")
def test_resident_memory_does_not_grow_with_the_rows_that_are_read(tmp_path: Path) -> None:
    """48 MB of states, in a store that is written here by hand."""
    columns = rows_of_lengths(*[257] * 48)
    store = tmp_path / "store"
    store.mkdir()
    row = np.arange(256 * 1024, dtype="<f4").reshape(256, 1024)
    with (store / "states.bin").open("wb") as file:
        for index in range(48):
            file.write((row + index).tobytes())
    identity = {"frozen_layers": 2, "columns": columns.fingerprint()}
    manifest = {"format": 1, "identity": identity, "hidden": 1024, "dtype": "float32", "checksum": ""}
    (store / "states.json").write_text(json.dumps(manifest))
    states = opened(store, columns, 2, {}, check=False)

    def resident() -> int:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["RssFile"].split()[0]) * 1024

    before = resident()
    for each in shuffled_batches(columns):
        gathered = np.array(states.gather(each))
        for line, index in enumerate(each.indices):
            assert np.array_equal(gathered[line], row + index)
    assert resident() - before < 8_000_000
