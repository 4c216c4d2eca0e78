"""The losses on fixed tokens are those that transformers has with the same labels (benchmarks/record_transformers_losses.py)."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from finetune_dataflow.engine.batches import Batch, batch
from finetune_dataflow.engine.losses import PLAIN, losses_by_row, row_losses, token_losses
from finetune_dataflow.engine.models import load_model
from finetune_dataflow.engine.proof import Sample, proven_path
from finetune_dataflow.engine.tokens import EncodedRow, TokenColumns, token_columns
from tests.recorded_losses import RECORDING, digest, draw_weights, write_model

RECORDED: dict[str, Any] = json.loads(RECORDING.read_text())
WANTED = {"llama", "mistral", "phi3", "qwen2", "qwen3", "gemma2", "olmo2"}
HEADLESS = {"mamba2", "gpt2"}  # their output head need not be found: the plain path is taken
# Another shape of batch moves its float32 losses by up to 0.9e-6, measured with the BLAS kernels of four processors.
LOOSER = {"qwen3_next": 2e-6}
ROWS = range(len(RECORDED["rows"]))
LONGEST = max(len(row["input_ids"]) for row in RECORDED["rows"])


@dataclass(frozen=True)
class Recorded:
    """A recorded model, its directory and as loaded, and the loss of each row in transformers, summed, in nats."""

    name: str
    directory: Path
    model: nn.Module
    losses: list[float]


@pytest.fixture(scope="module", autouse=True)
def cpu() -> Iterator[None]:
    """The recording was made in full float32, which not every accelerator's matrix products have."""
    before = mx.default_device()
    mx.set_default_device(mx.Device(mx.cpu))
    yield
    mx.set_default_device(before)


@pytest.fixture(scope="module", params=RECORDED["models"])
def recorded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    entry = RECORDED["models"][request.param]
    weights = draw_weights(entry["shapes"], entry["seed"])
    if digest(weights) != entry["weights_sha256"]:
        pytest.fail(
            f"NumPy {np.__version__} draws other weights for {request.param} than NumPy {RECORDED['made_with']['numpy']} did "
            f"when the losses were recorded, so they cannot be compared. Record them anew: {RECORDED['made_by']}"
        )
    directory = write_model(tmp_path_factory.mktemp("recorded") / request.param, entry["config"], weights)
    return Recorded(request.param, directory, load_model(directory), entry["losses"])


@pytest.fixture(scope="module")
def columns() -> TokenColumns:
    """The recorded rows as the dataflow has them: the last learned span is the reply, all before it is the prompt."""
    encoded = []
    for number, row in enumerate(RECORDED["rows"], start=1):
        ids, labels = row["input_ids"], row["labels"]
        start = max((place + 1 for place, label in enumerate(labels) if label == -100), default=0)
        encoded.append(EncodedRow(number, ids[:start], ids[start:], prompt_labels=labels[:start]))
    return token_columns(encoded)


def alone(columns: TokenColumns, index: int) -> Batch:
    """One row without padding, as transformers was given it."""
    return batch(columns, [index], 1, (int(columns.lengths[index]) - 1,))


def together(columns: TokenColumns) -> Batch:
    """All rows in one batch, with padding after every one of them and two rows of nothing else."""
    return batch(columns, ROWS, len(ROWS) + 2, (LONGEST + 13,))


def test_the_recording_has_the_rows_and_the_architectures_that_matter(columns: TokenColumns) -> None:
    assert RECORDED["models"].keys() >= WANTED
    assert [columns.row_labels(index).tolist() for index in ROWS] == [row["labels"] for row in RECORDED["rows"]]
    assert RECORDED["supervised_tokens"] == [7, 1, 16, 22, 1, 30]
    spans = [sum(np.diff(columns.row_labels(index) != -100, prepend=False, append=False)) // 2 for index in ROWS]
    assert spans == [1, 1, 3, 1, 1, 1]
    assert len(set(columns.lengths.tolist())) == len(ROWS) == 6


def test_each_row_alone_has_the_loss_of_transformers(recorded: Recorded, columns: TokenColumns) -> None:
    for index in ROWS:
        made = alone(columns, index)
        losses = token_losses(recorded.model, mx.array(made.inputs), mx.array(made.targets))
        assert int((losses != 0).sum()) == RECORDED["supervised_tokens"][index]
        assert losses.sum().item() == pytest.approx(recorded.losses[index], rel=1e-5), f"row {index + 1}"


def test_the_losses_by_row_are_those_of_transformers(recorded: Recorded, columns: TokenColumns) -> None:
    found = losses_by_row(recorded.directory, None, columns, batch_size=4)
    assert found["supervised_tokens"].tolist() == RECORDED["supervised_tokens"]
    np.testing.assert_allclose(found["loss"], recorded.losses, rtol=1e-5)


def test_the_loss_that_the_fit_descends_is_that_of_transformers(recorded: Recorded, columns: TokenColumns) -> None:
    path = proven_path(recorded.model, [Sample(together(columns))])
    assert path.gathered or recorded.name in HEADLESS
    for index in ROWS:
        mean = recorded.losses[index] / RECORDED["supervised_tokens"][index]
        assert path.mean_loss(recorded.model, alone(columns, index)).item() == pytest.approx(mean, rel=1e-5), f"row {index + 1}"
    mean = sum(recorded.losses) / sum(RECORDED["supervised_tokens"])
    for each in (path, PLAIN):
        assert each.mean_loss(recorded.model, together(columns)).item() == pytest.approx(mean, rel=1e-5)


def test_padding_rows_into_one_batch_changes_no_loss(recorded: Recorded, columns: TokenColumns) -> None:
    padded = np.array(row_losses(recorded.model, together(columns)))
    single = [row_losses(recorded.model, alone(columns, index)).item() for index in ROWS]
    np.testing.assert_allclose(padded[: len(ROWS)], single, rtol=LOOSER.get(recorded.name, 1e-6))
    assert padded[len(ROWS) :].tolist() == [0, 0]
