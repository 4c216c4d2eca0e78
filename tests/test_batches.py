import numpy as np

from finetune_dataflow.engine.batches import batch, epoch_order, in_order, widths
from finetune_dataflow.engine.tokens import EncodedRow, TokenColumns, token_columns


def columns_of(*lengths: int) -> TokenColumns:
    """Rows whose ids count from 1; the prompt is the first two tokens."""
    return token_columns([EncodedRow(n, [1, 2], list(range(3, length + 1))) for n, length in enumerate(lengths, 1)])


def test_inputs_and_targets_are_shifted_by_one_and_padding_is_no_target() -> None:
    made = batch(columns_of(5, 4), [0, 1], 3, (8,))
    assert made.inputs.tolist() == [[1, 2, 3, 4, 0, 0, 0, 0], [1, 2, 3, 0, 0, 0, 0, 0], [0] * 8]
    assert made.targets.tolist() == [
        [-100, 3, 4, 5, -100, -100, -100, -100],
        [-100, 3, 4, -100, -100, -100, -100, -100],
        [-100] * 8,
    ]
    assert made.supervised == 5
    assert made.positions[:6].tolist() == [1, 2, 3, 9, 10, 0] and made.labels[:6].tolist() == [3, 4, 5, 3, 4, -100]


def test_every_row_is_used_exactly_once_an_epoch_the_last_partial_batch_too() -> None:
    columns = columns_of(*range(4, 27))  # 23 rows
    for epoch in range(3):
        order = epoch_order(columns, 4, random_state=1, epoch=epoch)
        assert sorted(index for each in order for index in each) == list(range(23))
        assert sorted(len(each) for each in order) == [3, 4, 4, 4, 4, 4]


def test_epochs_differ_in_their_order_and_the_seed_decides_it() -> None:
    columns = columns_of(*range(4, 27))
    assert epoch_order(columns, 4, 1, 0) == epoch_order(columns, 4, 1, 0)
    assert epoch_order(columns, 4, 1, 0) != epoch_order(columns, 4, 1, 1)
    assert epoch_order(columns, 4, 1, 0) != epoch_order(columns, 4, 2, 0)


def test_the_order_leaves_numpys_global_generator_alone() -> None:
    np.random.seed(5)
    expected = np.random.random()
    np.random.seed(5)
    epoch_order(columns_of(4, 5, 6), 2, 1, 0)
    assert np.random.random() == expected


def test_shapes_are_at_most_six_and_every_row_fits_one() -> None:
    lengths = np.random.default_rng(0).integers(5, 500, 1000)
    ladder = widths(lengths)
    assert len(ladder) <= 6 and ladder[-1] >= lengths.max() - 1
    assert all(width % 8 == 0 for width in ladder)


def test_in_order_gives_every_row_once() -> None:
    columns = columns_of(9, 4, 30, 12, 7)
    assert sorted(index for each in in_order(columns, 2) for index in each.indices) == [0, 1, 2, 3, 4]
