import math
from collections import Counter
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.utils import load

from finetune_dataflow.engine import training
from finetune_dataflow.engine.adapters import check_adapter
from finetune_dataflow.engine.batches import Batch
from finetune_dataflow.engine.losses import mean_loss
from finetune_dataflow.engine.models import load_model
from finetune_dataflow.engine.tokens import EncodedRow, TokenColumns, token_columns
from finetune_dataflow.errors import UserError
from tests.fit_values import adapter_digest, history, rows_of, settings_of

SETTINGS = settings_of()


@pytest.fixture(scope="module")
def train() -> TokenColumns:
    return rows_of(22, 1)


@pytest.fixture(scope="module")
def validation() -> TokenColumns:
    return rows_of(5, 100)


def test_the_fit_learns_and_its_adapter_gives_the_best_validation_loss_again(
    tiny_model: Path, train: TokenColumns, validation: TokenColumns, tmp_path: Path
) -> None:
    summary = training.fit(tiny_model, train, validation, SETTINGS, tmp_path, {"model": str(tiny_model)})
    assert summary.best_validation_loss < 0.6 * summary.first_validation_loss
    again = mean_loss(load_model(tiny_model, tmp_path / "adapters"), validation, 4)
    assert again == pytest.approx(summary.best_validation_loss, rel=1e-5)


def test_every_row_is_trained_once_an_epoch(
    tiny_model: Path, train: TokenColumns, validation: TokenColumns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: Counter[int] = Counter()
    accumulate = training._Fit._accumulate

    def counting(fit: training._Fit, current: list[Batch]) -> None:
        used.update(train.rows[[index for part in current for index in part.indices]].tolist())
        accumulate(fit, current)

    monkeypatch.setattr(training._Fit, "_accumulate", counting)
    summary = training.fit(tiny_model, train, validation, SETTINGS, tmp_path, {})
    assert used == dict.fromkeys(range(1, 23), 3)
    assert summary.steps == 18 and summary.trained_tokens == 3 * 22 * 7 and summary.supervised_tokens == 3 * 22 * 4


def test_the_adapter_with_the_best_validation_loss_is_kept_not_the_last(
    tiny_model: Path, train: TokenColumns, tmp_path: Path
) -> None:
    """A validation set that contradicts the training set gets worse with every update: the first adapter stays."""
    contradicting = token_columns([EncodedRow(n, [n % 200, 10, 3], [*b"QQQ", 258]) for n in range(100, 105)])
    summary = training.fit(tiny_model, train, contradicting, SETTINGS, tmp_path, {})
    losses = {int(each["step"]): each["loss"] for each in history(tmp_path, "validation")}
    assert summary.best_step == min(losses, key=lambda step: losses[step]) < 18
    kept = mean_loss(load_model(tiny_model, tmp_path / "adapters"), contradicting, 4)
    assert kept == pytest.approx(min(losses.values()), rel=1e-5) and kept < losses[18]


def test_the_same_seed_gives_the_same_adapter_bytes_twice_and_another_seed_others(
    tiny_model: Path, train: TokenColumns, validation: TokenColumns, tmp_path: Path
) -> None:
    digests = []
    for name, seed in (("one", 7), ("two", 7), ("three", 8)):
        mx.random.uniform()  # what was drawn before must not matter
        directory = tmp_path / name
        training.fit(tiny_model, train, validation, settings_of(lora_dropout=0.2, random_state=seed), directory, {})
        digests.append(adapter_digest(directory))
    assert digests[0] == digests[1] != digests[2]


def test_the_number_of_validations_does_not_change_what_is_learned(
    tiny_model: Path, train: TokenColumns, validation: TokenColumns, tmp_path: Path
) -> None:
    losses = []
    for evaluations in (1, 3):
        settings = settings_of(evals_per_epoch=evaluations)
        training.fit(tiny_model, train, validation, settings, tmp_path / str(evaluations), {})
        losses.append([each["loss"] for each in history(tmp_path / str(evaluations), "train")])
    assert losses[0] == losses[1]


def test_validation_runs_before_the_first_update_at_intervals_and_at_the_end(
    tiny_model: Path, train: TokenColumns, validation: TokenColumns, tmp_path: Path
) -> None:
    training.fit(tiny_model, train, validation, SETTINGS, tmp_path, {})
    assert [each["step"] for each in history(tmp_path, "validation")] == [0, 3, 6, 9, 12, 15, 18]


def test_the_base_model_is_not_changed_by_the_fit(
    tiny_model: Path, train: TokenColumns, validation: TokenColumns, tmp_path: Path
) -> None:
    before = {path.name: path.read_bytes() for path in tiny_model.iterdir()}
    loss = mean_loss(load_model(tiny_model), validation, 4)
    training.fit(tiny_model, train, validation, SETTINGS, tmp_path, {})
    assert {path.name: path.read_bytes() for path in tiny_model.iterdir()} == before
    assert mean_loss(load_model(tiny_model), validation, 4) == loss


def test_mlx_lm_loads_the_adapter_unchanged(
    tiny_model: Path, train: TokenColumns, validation: TokenColumns, tmp_path: Path
) -> None:
    training.fit(tiny_model, train, validation, SETTINGS, tmp_path, {"model": str(tiny_model)})
    theirs = load(str(tiny_model), adapter_path=str(tmp_path / "adapters"))[0]
    ours = load_model(tiny_model, tmp_path / "adapters")
    tokens = mx.array([train.row_ids(0).tolist()])
    assert mx.array_equal(theirs(tokens), ours(tokens))
    config = check_adapter(tmp_path / "adapters")
    assert config["fine_tune_type"] == "lora" and config["model"] == str(tiny_model)
    assert config["lora_parameters"] == {"rank": 4, "scale": 10.0, "dropout": 0.0} and config["num_layers"] == 2


def test_a_loss_that_is_not_finite_stops_with_the_rows_and_keeps_the_best_adapter(
    tiny_model: Path, train: TokenColumns, validation: TokenColumns, tmp_path: Path
) -> None:
    settings = settings_of(learning_rate=1e30, warmup_proportion=0.0)
    with pytest.raises(UserError, match=r"The loss of update \d+ is (nan|inf), on rows [\d, ]+\. Lower learning_rate"):
        training.fit(tiny_model, train, validation, settings, tmp_path, {})
    kept = mean_loss(load_model(tiny_model, tmp_path / "adapters"), validation, 4)
    assert math.isfinite(kept)


def test_more_layers_than_the_model_has_are_refused(
    tiny_model: Path, train: TokenColumns, validation: TokenColumns, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"num_layers=3 is out of range. Expected at most 2"):
        training.fit(tiny_model, train, validation, settings_of(num_layers=3), tmp_path, {})
