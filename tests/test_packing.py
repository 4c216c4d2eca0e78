from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import cache
from mlx_lm.tuner.utils import linear_to_lora_layers

from finetune_dataflow.engine.batches import Batch, batch
from finetune_dataflow.engine.losses import PLAIN
from finetune_dataflow.engine.models import load_model
from finetune_dataflow.engine.packing import NotPackable, arranged, forward, packed, segment_caches
from finetune_dataflow.engine.randomness import seeded
from finetune_dataflow.engine.tokens import EncodedRow, TokenColumns, token_columns
from tests.architectures import ARCHITECTURES, WINDOW, write_architecture

TOLERANCE = 1e-4  # of the gradient's norm, in float32
EQUAL = (
    "llama", "llama_untied", "mistral", "phi", "phi3", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2",
    "gemma3_text", "gemma4_text", "cohere", "olmo2", "granite", "stablelm", "openelm",
)  # fmt: skip
# Positions count from the start of a line: gpt2 looks them up in a table, ministral3 scales its queries by them.
DIFFERENT = ("gpt2", "ministral3")
RECURRENT = "layer 0 keeps a recurrent state, which would leak from row to row"
REFUSED = {"qwen3_next": RECURRENT, "mamba2": RECURRENT}
LENGTHS = ((4, 3), (9, 1), (2, 12), (7, 7), (12, 9), (3, 2), (11, 8))  # of prompt and reply; 1 to 3 rows fit a line of 24

Forward = Callable[[nn.Module, mx.array, mx.array], mx.array]


def columns_of(*lengths: tuple[int, int]) -> TokenColumns:
    """Random rows with prompts and replies of these lengths."""
    generator = np.random.default_rng(3)
    texts = [[generator.integers(0, 250, length).tolist() for length in pair] for pair in lengths]
    return token_columns([EncodedRow(row, prompt, reply) for row, (prompt, reply) in enumerate(texts, start=1)])


@pytest.fixture(scope="module")
def columns() -> TokenColumns:
    return columns_of(*LENGTHS)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_architecture(tmp_path_factory.mktemp("packing") / "llama", "llama")


def arrays(made: Batch) -> tuple[mx.array, mx.array]:
    """Inputs and segments of a packed batch."""
    assert made.segments is not None
    return mx.array(made.inputs), mx.array(made.segments)


def packed_loss(model: nn.Module, made: Batch, called: Forward = forward) -> mx.array:
    """The mean loss over the supervised targets of a packed batch."""
    targets = mx.array(made.targets)
    logits = called(model, *arrays(made)).astype(mx.float32)
    losses = nn.losses.cross_entropy(logits, mx.maximum(targets, 0))
    return mx.where(targets == -100, 0, losses).sum() / made.supervised


def flat(tree: Any) -> dict[str, mx.array]:
    return dict(cast(list[tuple[str, mx.array]], tree_flatten(tree)))


def norm(gradient: dict[str, mx.array]) -> float:
    return sum(float(each.astype(mx.float32).square().sum()) for each in gradient.values()) ** 0.5


def errors(model: nn.Module, columns: TokenColumns, called: Forward = forward, lines: int | None = None) -> tuple[float, float]:
    """How far loss and gradient of the packed rows are from those of a row to a line: shares of the loss and of the norm."""
    rows = list(range(len(columns)))
    plain, plain_gradient = nn.value_and_grad(model, PLAIN.mean_loss)(model, batch(columns, rows, len(rows), (24,)))
    loss, gradient = nn.value_and_grad(model, packed_loss)(model, packed(columns, rows, 24, lines), called)
    expected, found = flat(plain_gradient), flat(gradient)
    assert found.keys() == expected.keys() and norm(expected) > 0 and all(bool(mx.isfinite(x).all()) for x in found.values())
    apart = norm({name: each.astype(mx.float32) - found[name].astype(mx.float32) for name, each in expected.items()})
    return abs(float(loss) / float(plain) - 1), apart / norm(expected)


def test_rows_of_4_4_and_6_at_a_width_of_9_make_two_lines_the_first_with_two_rows_and_one_pad() -> None:
    assert arranged([4, 4, 6], 9) == [[0, 1], [2]]
    made = packed(columns_of((2, 3), (1, 4), (4, 3)), [0, 1, 2], 9)
    assert made.segments is not None
    assert made.segments.tolist() == [[1, 1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1, 0, 0, 0]]


def test_a_row_goes_where_it_leaves_the_least_room() -> None:
    assert arranged([15, 12, 6, 2], 20) == [[0], [1, 2, 3]]  # the 2 would fit beside the 15, too


def test_lines_are_in_the_order_of_their_first_rows() -> None:
    assert arranged([1, 9, 2, 8, 3], 10) == [[0, 1], [2, 3], [4]]


def test_every_row_has_exactly_one_line_that_holds_it() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        lengths = generator.integers(0, 65, generator.integers(1, 40)).tolist()
        lines = arranged(lengths, 64)
        assert sorted(row for line in lines for row in line) == list(range(len(lengths)))
        assert all(line == sorted(line) and sum(lengths[row] for row in line) <= 64 for line in lines)
        emptiest = sorted(sum(lengths[row] for row in line) for line in lines)[:2]
        assert len(lines) == 1 or sum(emptiest) > 64  # no two lines could be one


def test_no_rows_need_no_line() -> None:
    assert arranged([], 8) == []


def test_a_row_longer_than_a_line_is_refused() -> None:
    with pytest.raises(ValueError, match="A row of 9 tokens does not fit a line of 8"):
        arranged([3, 9], 8)


def test_a_packed_batch_holds_shifted_rows_their_segments_and_where_they_begin() -> None:
    columns = token_columns(
        [EncodedRow(1, [1, 2], [3, 4]), EncodedRow(2, [5], [6, 7, 8, 9, 10]), EncodedRow(3, [11, 12, 13], [14])]
    )
    made = packed(columns, [1, 2, 0], 8)
    assert made.indices == (1, 2, 0) and made.placements == ((0, 0), (0, 5), (1, 0))
    assert made.inputs.tolist() == [[5, 6, 7, 8, 9, 11, 12, 13], [1, 2, 3, 0, 0, 0, 0, 0]]
    assert made.targets.tolist() == [[6, 7, 8, 9, 10, -100, -100, 14], [-100, 3, 4, -100, -100, -100, -100, -100]]
    assert made.segments is not None and made.segments.dtype == made.inputs.dtype == made.targets.dtype == np.int32
    assert made.segments.tolist() == [[1, 1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 0, 0, 0, 0, 0]]
    assert made.positions[:8].tolist() == [0, 1, 2, 3, 4, 7, 9, 10] and made.labels[:8].tolist() == [6, 7, 8, 9, 10, 14, 3, 4]
    assert made.supervised == 8


def test_lines_are_added_up_to_a_number_and_rows_are_never_left_out_for_it(columns: TokenColumns) -> None:
    rows = list(range(len(columns)))
    needed = len(arranged([sum(each) - 1 for each in LENGTHS], 24))
    for lines, found in ((None, needed), (needed + 3, needed + 3), (1, needed)):
        made = packed(columns, rows, 24, lines)
        assert made.segments is not None and made.inputs.shape == made.targets.shape == made.segments.shape == (found, 24)
        assert made.supervised == 42 and int((made.segments > 0).sum()) == 83  # of 90 tokens, one less for each row
        assert not made.inputs[needed:].any() and not made.segments[needed:].any() and (made.targets[needed:] == -100).all()


def test_a_mask_shows_the_tokens_of_the_own_row_up_to_oneself(llama: Path) -> None:
    entry = segment_caches(load_model(llama), mx.array([[1, 1, 2, 2, 0], [0, 0, 0, 0, 0]]))[0]
    mask = entry.make_mask(5)
    assert mask.shape == (2, 1, 5, 5) and mask.dtype == mx.bool_
    assert np.array(mask[0, 0]).astype(int).tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1],
    ]
    assert np.array(mask[1, 0]).tolist() == np.tri(5, dtype=bool).tolist()


def test_a_window_narrows_the_mask(llama: Path) -> None:
    entry = segment_caches(load_model(llama), mx.array([[1, 1, 1, 2, 2, 2]]))[0]
    assert np.array(entry.make_mask(6, window_size=2)[0, 0]).astype(int).tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1, 1],
    ]


def test_a_mask_is_made_once_for_all_layers_and_every_window(llama: Path) -> None:
    first, second, third = segment_caches(load_model(llama), mx.array([[1, 1, 1, 2, 2, 0]]))
    assert first.make_mask(6) is second.make_mask(6, return_array=True) is third.make_mask(6, window_size=6)
    assert first.make_mask(6, window_size=2) is second.make_mask(6, window_size=2) is not third.make_mask(6, window_size=3)


def test_a_mask_for_another_width_is_refused(llama: Path) -> None:
    entry = segment_caches(load_model(llama), mx.array([[1, 1, 0]]))[0]
    with pytest.raises(ValueError, match="asks for a mask of 4 tokens; the segments have 3"):
        entry.make_mask(4)


def test_every_architecture_is_listed_once() -> None:
    assert sorted([*EQUAL, *DIFFERENT, *REFUSED]) == sorted(ARCHITECTURES)


def test_the_packed_rows_begin_within_lines_and_are_longer_than_the_window(columns: TokenColumns) -> None:
    made = packed(columns, list(range(len(columns))), 24)
    assert made.placements == ((0, 0), (1, 0), (1, 9), (2, 0), (3, 0), (3, 20), (0, 6))
    assert columns.lengths.tolist() == [7, 10, 14, 14, 21, 5, 19] and WINDOW == 8


@pytest.mark.parametrize("name", EQUAL)
def test_loss_and_gradient_of_packed_rows_are_those_of_a_row_to_a_line(name: str, columns: TokenColumns, tmp_path: Path) -> None:
    loss, gradient = errors(load_model(write_architecture(tmp_path, name)), columns)
    assert loss <= TOLERANCE and gradient <= TOLERANCE


@pytest.mark.parametrize("name", DIFFERENT)
def test_where_positions_count_from_the_start_of_a_line_a_comparison_finds_it(
    name: str, columns: TokenColumns, tmp_path: Path
) -> None:
    assert errors(load_model(write_architecture(tmp_path, name)), columns)[1] > 10 * TOLERANCE


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_with_recurrent_layers_is_refused(name: str, columns: TokenColumns, tmp_path: Path) -> None:
    model = load_model(write_architecture(tmp_path, name))
    with pytest.raises(NotPackable) as refusal:
        packed_loss(model, packed(columns, [0, 1, 2], 24))
    assert str(refusal.value) == REFUSED[name]


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (cache.ChunkedKVCache(8), "layer 2 attends in chunks counted from the start of a line, where a row begins anywhere"),
        (cache.CacheList(cache.KVCache(), cache.ArraysCache(2)), RECURRENT.replace("0", "2")),
        (cache.CacheList(cache.KVCache(), cache.KVCache()), "layer 2 keeps a CacheList, of which it is not known whether"),
    ],
)
def test_what_else_a_layer_keeps_is_refused_with_the_reason(
    entry: object, reason: str, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(llama)
    monkeypatch.setattr(type(model), "make_cache", lambda self: [cache.KVCache(), cache.KVCache(), entry])
    with pytest.raises(NotPackable, match=reason):
        segment_caches(model, mx.array([[1, 1]]))


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(NotPackable, match="no list of layers"):
        segment_caches(nn.Linear(2, 2), mx.array([[1, 1]]))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma4_text"])
def test_the_gradient_of_lora_layers_is_that_of_a_row_to_a_line(name: str, columns: TokenColumns, tmp_path: Path) -> None:
    model = load_model(write_architecture(tmp_path, name))
    model.freeze()
    with seeded(1):
        linear_to_lora_layers(model, 3, {"rank": 4, "scale": 10.0, "dropout": 0.0})
        for each in (module for path, module in model.named_modules() if "lora_b" in module):
            each.lora_b = 0.02 * mx.random.normal(each.lora_b.shape)
    loss, gradient = errors(model, columns)
    assert loss <= TOLERANCE and gradient <= TOLERANCE


def test_a_causal_mask_that_ignores_the_rows_gives_another_gradient(llama: Path, columns: TokenColumns) -> None:
    """The comparison that the other tests make would find a contaminated batch."""
    _, gradient = errors(load_model(llama), columns, lambda model, inputs, segments: model(inputs))
    assert gradient > 1000 * TOLERANCE


def test_an_edge_between_rows_that_is_one_token_off_gives_another_gradient(llama: Path, columns: TokenColumns) -> None:
    def moved(model: nn.Module, inputs: mx.array, segments: mx.array) -> mx.array:
        begins = mx.concatenate([segments[:, :1] < 0, (segments[:, 1:] == 2) & (segments[:, :-1] == 1)], axis=1)
        return forward(model, inputs, mx.where(begins, 1, segments))

    assert errors(load_model(llama), columns, moved)[1] > 10 * TOLERANCE


@pytest.mark.parametrize("lines", [4, 5, 8])
def test_gemma2_groups_its_heads_and_still_takes_any_number_of_lines(lines: int, columns: TokenColumns, tmp_path: Path) -> None:
    loss, gradient = errors(load_model(write_architecture(tmp_path, "gemma2")), columns, lines=lines)
    assert loss <= TOLERANCE and gradient <= TOLERANCE


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_text"])
def test_lines_that_only_pad_give_finite_logits_and_change_nothing(name: str, columns: TokenColumns, tmp_path: Path) -> None:
    model = load_model(write_architecture(tmp_path, name))
    made, more = packed(columns, [0, 2, 3], 24), packed(columns, [0, 2, 3], 24, lines=4)
    logits = forward(model, *arrays(more))
    assert logits.shape[:2] == (4, 24) and bool(mx.isfinite(logits).all())
    assert float(packed_loss(model, more)) == pytest.approx(float(packed_loss(model, made)), rel=1e-6)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_text"])
def test_a_row_in_a_line_has_the_logits_it_has_alone(name: str, columns: TokenColumns, tmp_path: Path) -> None:
    model = load_model(write_architecture(tmp_path, name))
    made = packed(columns, list(range(len(columns))), 24)
    logits = forward(model, *arrays(made))
    for index, (line, start) in zip(made.indices, made.placements, strict=True):
        alone = model(mx.array(columns.row_ids(index)[None, :-1]))[0]
        found = logits[line, start : start + len(alone)]
        assert float(mx.abs(found - alone).max()) <= 1e-4 * float(mx.abs(alone).max())


@pytest.mark.parametrize("name", ["llama", "mistral", "openelm"])
def test_the_gradient_is_equal_in_bfloat16_within_its_precision(name: str, columns: TokenColumns, tmp_path: Path) -> None:
    model = load_model(write_architecture(tmp_path, name))
    model.set_dtype(mx.bfloat16)
    made = packed(columns, [0, 1, 2], 24)
    assert forward(model, *arrays(made)).dtype == mx.bfloat16
    loss, gradient = errors(model, columns)
    assert loss <= 2e-2 and gradient <= 2e-2


def test_without_segments_the_model_is_called_plainly(llama: Path, columns: TokenColumns) -> None:
    model, inputs = load_model(llama), mx.array(batch(columns, [0, 1], 2, (24,)).inputs)
    assert mx.array_equal(forward(model, inputs), model(inputs))
