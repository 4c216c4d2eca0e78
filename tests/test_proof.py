"""What is taken on which model: proven equal, or left out for the stated reason."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from finetune_dataflow.engine import losses
from finetune_dataflow.engine.batches import batch, widths
from finetune_dataflow.engine.frozen_states import StateStore
from finetune_dataflow.engine.losses import LossPath
from finetune_dataflow.engine.methods import make_trainable, trainable
from finetune_dataflow.engine.models import load_model
from finetune_dataflow.engine.packing import NotPackable, SegmentCache, packed, segment_caches
from finetune_dataflow.engine.prefix_states import PrefixStates
from finetune_dataflow.engine.proof import Sample, proven_path
from finetune_dataflow.engine.tokens import EncodedRow, TokenColumns, token_columns
from tests.architectures import ARCHITECTURES, write_architecture
from tests.fit_values import settings_of

RECURRENT = "layer 0 keeps a recurrent state, which would leak from row to row"
# Everything is proven equal on these ...
EVERYTHING = (
    "llama", "llama_untied", "mistral", "phi", "phi3", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2",
    "gemma3_text", "cohere", "olmo2", "granite", "stablelm",
)  # fmt: skip
# ... and here one thing or two are left out, for this reason.
LEFT_OUT: dict[str, dict[str, str]] = {
    "ministral3": {"packing": "differs by"},  # its queries are scaled by the position in the line
    "gemma4_text": {"prefix": ""},  # a layer gives a tuple: no states are kept
    "qwen3_next": {"packing": RECURRENT},
    "mamba2": {"packing": RECURRENT, "gathered": "output head was not found"},
    # Its learned positions come in before the first layer: with the states of the frozen layers they are the right ones.
    "gpt2": {"gathered": "output head was not found"},
    "openelm": {"gathered": "output head was not found"},
}


@pytest.fixture(scope="module")
def columns() -> TokenColumns:
    draw = np.random.default_rng(2)
    return token_columns(
        [EncodedRow(n, draw.integers(1, 250, 4 + n).tolist(), draw.integers(1, 250, 3 + 2 * (n % 3)).tolist()) for n in range(8)]
    )


def samples(columns: TokenColumns) -> list[Sample]:
    """Two batches of four rows, two rows to a line."""
    ladder = widths(columns.lengths)
    return [Sample(batch(columns, rows, 4, ladder), packed(columns, rows, 32, lines=2)) for rows in ([0, 3, 5, 6], [1, 2, 4, 7])]


def states_of(model: nn.Module, columns: TokenColumns, folder: Path) -> PrefixStates | None:
    return StateStore(folder, {"base": "here"}, 10**9).states(model, columns, 4)


def model_of(name: str, tmp_path: Path) -> nn.Module:
    model = load_model(write_architecture(tmp_path / name, name))
    make_trainable(model, settings_of(num_layers=1).method)
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_takes_what_is_exact_on_it(
    name: str, columns: TokenColumns, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = model_of(name, tmp_path)
    path = proven_path(model, samples(columns), states_of(model, columns, tmp_path / "states"))
    missing = {part for part in ("gathered", "exponentials", "prefix", "packing") if not getattr(path, part)}
    expected = {} if name in EVERYTHING else LEFT_OUT[name]
    assert missing == {*expected}
    for reason in expected.values():
        assert reason in path.reason and reason in caplog.text
    assert "proven equal on 2 batches" in path.reason


def test_the_table_names_every_architecture_once() -> None:
    assert sorted([*EVERYTHING, *LEFT_OUT]) == sorted(ARCHITECTURES)


@pytest.fixture
def llama(tmp_path: Path) -> nn.Module:
    return model_of("llama", tmp_path)


def test_a_mask_that_lets_rows_see_each_other_is_caught(
    llama: nn.Module, columns: TokenColumns, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def contaminated(self: SegmentCache, N: int, return_array: bool = False, window_size: int | None = None) -> Any:
        return mx.arange(N)[:, None] >= mx.arange(N)[None]

    monkeypatch.setattr(SegmentCache, "make_mask", contaminated)
    path = proven_path(llama, samples(columns))
    assert not path.packing and path.gathered
    assert (
        "The fit goes without several rows to a line: the gradient differs by" in caplog.text or "the loss differs" in caplog.text
    )


def test_wrong_positions_of_the_head_are_caught(llama: nn.Module, columns: TokenColumns, monkeypatch: pytest.MonkeyPatch) -> None:
    """One wrong position in a batch is enough."""
    gathering = losses.gathering
    monkeypatch.setattr(
        losses, "gathering", lambda head, positions: gathering(head, mx.where(positions == positions[0], 0, positions))
    )
    path = proven_path(llama, samples(columns))
    assert not path.gathered and path.packing and "without the output head on supervised positions only: the" in path.reason


def test_states_of_other_weights_are_caught(llama: nn.Module, columns: TokenColumns, tmp_path: Path) -> None:
    states = states_of(llama, columns, tmp_path / "states")
    assert states is not None
    weight = llama.model.layers[0].mlp.up_proj.weight
    llama.model.layers[0].mlp.up_proj.weight = weight + 0.01 * mx.random.normal(weight.shape)
    path = proven_path(llama, samples(columns), states)
    assert not path.prefix and path.packing and path.gathered
    assert "without stored states of the frozen layers: the" in path.reason


def test_wrong_exponentials_are_caught(llama: nn.Module, columns: TokenColumns, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune_dataflow.engine import exponentials

    exp = exponentials._exp
    monkeypatch.setattr(exponentials, "_exp", lambda x: exp(1.01 * x))
    path = proven_path(llama, samples(columns))
    assert not path.exponentials and path.gathered and path.packing


def test_proving_leaves_the_model_as_it_was(llama: nn.Module, columns: TokenColumns, tmp_path: Path) -> None:
    inputs = mx.array(samples(columns)[0].plain.inputs)
    before, kinds = llama(inputs), [type(each) for each in llama.modules()]
    assert proven_path(llama, samples(columns), states_of(llama, columns, tmp_path / "states")).prefix == 2
    assert mx.array_equal(llama(inputs), before) and [type(each) for each in llama.modules()] == kinds


def test_a_model_without_a_known_head_takes_the_plain_head(llama: nn.Module, columns: TokenColumns) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = llama

        def __call__(self, tokens: mx.array) -> mx.array:
            return self.inside(tokens)

    path = proven_path(Wrapped(), [Sample(batch(columns, [0], 1, widths(columns.lengths)))])
    assert not path.gathered and "was not found" in path.reason


def test_learned_positions_are_caught_where_no_states_bring_them(columns: TokenColumns, tmp_path: Path) -> None:
    path = proven_path(model_of("gpt2", tmp_path), samples(columns))
    assert not path.packing and "without several rows to a line: the" in path.reason


def test_a_path_that_packs_refuses_a_recurrent_model(columns: TokenColumns, tmp_path: Path) -> None:
    model = model_of("mamba2", tmp_path)
    with pytest.raises(NotPackable, match=RECURRENT):
        segment_caches(model, mx.zeros((1, 8), mx.int32))
    with pytest.raises(NotPackable, match=RECURRENT):
        LossPath(packing=True).mean_loss(model, packed(columns, [0, 1], 32))


def test_a_model_in_half_precision_is_judged_by_its_own_rounding_whatever_its_adapters_are_kept_in(
    columns: TokenColumns, tmp_path: Path
) -> None:
    model = load_model(write_architecture(tmp_path / "llama", "llama"))
    model.set_dtype(mx.bfloat16)
    make_trainable(model, settings_of(num_layers=1).method)
    kept_in = {each.dtype for each in trainable(model).values()}
    path = proven_path(model, samples(columns))
    assert kept_in == {mx.float32} and losses.model_dtype(model) == mx.bfloat16
    assert path.gathered and path.packing, path.reason
