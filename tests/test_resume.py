"""A fit that is interrupted and gone on with; what it refuses to go on with; and how it keeps its best and its last."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from finetune_dataflow.engine import training
from finetune_dataflow.engine.fit_plan import chosen_rows, fit_plan
from finetune_dataflow.engine.interrupts import Stopped
from finetune_dataflow.engine.losses import mean_loss
from finetune_dataflow.engine.models import load_model
from finetune_dataflow.engine.starting_weights import convert, read_weights
from finetune_dataflow.engine.tokens import EncodedRow, TokenColumns, token_columns
from finetune_dataflow.errors import UserError
from tests.fit_values import adapter_digest, history, rows_of, settings_of

EVERYTHING = {"lora_dropout": 0.2, "grad_accumulation_steps": 2, "save_every": 1, "epochs": 3.0, "random_state": 11}


@pytest.fixture(scope="module")
def train() -> TokenColumns:
    return rows_of(22, 1)


@pytest.fixture(scope="module")
def validation() -> TokenColumns:
    return rows_of(5, 100)


def interrupted_after(batches: int, monkeypatch: pytest.MonkeyPatch, by: Callable[[], None]) -> None:
    """Do `by` in the middle of the batch that follows so many."""
    accumulate = training._Fit._accumulate

    def interrupting(fit: training._Fit, current: object) -> None:
        if fit.state.batches == batches:
            by()
        accumulate(fit, current)  # type: ignore[arg-type]

    monkeypatch.setattr(training._Fit, "_accumulate", interrupting)


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def fail() -> None:
    raise MemoryError("as if killed")


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("batches", [1, 2, 7, 17])
def test_a_fit_that_was_interrupted_ends_with_the_bytes_of_one_that_was_not(
    tiny_model: Path, train: TokenColumns, validation: TokenColumns, method: str, optimizer: str, batches: int, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Ctrl-C in the middle of an accumulation window, too: the remainder is saved."""
    settings = settings_of(**EVERYTHING, fine_tune_type=method, optimizer=optimizer, max_grad_norm=0.5)
    training.fit(tiny_model, train, validation, settings, tmp_path / "whole", {})
    with monkeypatch.context() as patch:
        interrupted_after(batches, patch, press_ctrl_c)
        if batches < 17:
            with pytest.raises(Stopped, match=rf"Stopped after update .* of 9; .*{tmp_path}.* The same command goes on"):
                training.fit(tiny_model, train, validation, settings, tmp_path / "stopped", {})
        else:  # the last batch: nothing is left to be stopped but what would follow
            with pytest.raises(Stopped, match=r"is finished\. The same command evaluates its adapter\."):
                training.fit(tiny_model, train, validation, settings, tmp_path / "stopped", {})
    training.fit(tiny_model, train, validation, settings, tmp_path / "stopped", {})
    for name in ("adapters", "adapters-last"):
        assert adapter_digest(tmp_path / "whole", name) == adapter_digest(tmp_path / "stopped", name)
    whole, stopped = history(tmp_path / "whole", "train"), history(tmp_path / "stopped", "train")
    assert [each["loss"] for each in whole] == [each["loss"] for each in stopped]


def test_a_fit_that_fell_over_goes_on_from_its_last_checkpoint(
    tiny_model: Path, train: TokenColumns, validation: TokenColumns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(**{**EVERYTHING, "save_every": 2})
    training.fit(tiny_model, train, validation, settings, tmp_path / "whole", {})
    with monkeypatch.context() as patch:
        interrupted_after(11, patch, fail)
        with pytest.raises(MemoryError):
            training.fit(tiny_model, train, validation, settings, tmp_path / "fallen", {})
    training.fit(tiny_model, train, validation, settings, tmp_path / "fallen", {})
    assert [each["step"] for each in history(tmp_path / "fallen", "resume")] == [4]
    assert adapter_digest(tmp_path / "whole") == adapter_digest(tmp_path / "fallen")
    steps = [each["step"] for each in history(tmp_path / "fallen", "train")]
    assert steps == list(range(1, 10))


def test_another_data_set_or_setting_does_not_go_on_and_is_named(
    tiny_model: Path, train: TokenColumns, validation: TokenColumns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(**EVERYTHING)
    with monkeypatch.context() as patch:
        interrupted_after(5, patch, fail)
        with pytest.raises(MemoryError):
            training.fit(tiny_model, train, validation, settings, tmp_path, {})
    with pytest.raises(UserError, match=r"are of another fit: batch_size is 4 there and 8 here; learning_rate is 0.01 there"):
        training.fit(tiny_model, train, validation, settings_of(**EVERYTHING, batch_size=8, learning_rate=0.5), tmp_path, {})
    with pytest.raises(UserError, match=r"are of another fit: train_set is "):
        training.fit(tiny_model, rows_of(22, 2), validation, settings, tmp_path, {})
    more_often = settings_of(**{**EVERYTHING, "save_every": 3, "keep_checkpoints": 5, "steps_per_report": 2})
    training.fit(tiny_model, train, validation, more_often, tmp_path, {})  # these change nothing that is learned


def test_the_last_checkpoints_are_kept_where_they_are_asked_for_and_no_more(
    tiny_model: Path, train: TokenColumns, validation: TokenColumns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training.fit(tiny_model, train, validation, settings_of(save_every=4, keep_checkpoints=3), tmp_path / "asked", {})
    assert len(list((tmp_path / "asked" / "checkpoints").iterdir())) == 3
    with monkeypatch.context() as patch:  # without save_every they serve resuming alone, and go when the fit has ended
        interrupted_after(7, patch, press_ctrl_c)
        with pytest.raises(Stopped):
            training.fit(tiny_model, train, validation, settings_of(), tmp_path / "not asked", {})
    assert len(list((tmp_path / "not asked" / "checkpoints").iterdir())) == 1
    training.fit(tiny_model, train, validation, settings_of(), tmp_path / "not asked", {})
    assert not (tmp_path / "not asked" / "checkpoints").exists()


def test_a_fit_starts_from_the_weights_of_another_in_safetensors_or_npz(
    tiny_model: Path, train: TokenColumns, validation: TokenColumns, tmp_path: Path
) -> None:
    training.fit(tiny_model, train, validation, settings_of(), tmp_path / "first", {})
    weights = tmp_path / "first" / "adapters" / "adapters.safetensors"
    npz = tmp_path / "adapters.npz"
    np.savez(npz, allow_pickle=False, **{name: np.array(each) for name, each in read_weights(weights).items()})
    reached = mean_loss(load_model(tiny_model, tmp_path / "first" / "adapters"), validation, 4)
    for start in (weights, npz):
        out = tmp_path / start.suffix[1:]
        summary = training.fit(tiny_model, train, validation, settings_of(iters=1, epochs=None), out, {}, start=start)
        assert summary.first_validation_loss == pytest.approx(reached, rel=1e-5)
    converted = convert(npz, tmp_path / "converted.safetensors")
    assert all(mx.array_equal(each, read_weights(weights)[name]) for name, each in read_weights(converted).items())


def test_weights_that_do_not_fit_are_refused_before_anything_is_trained(
    tiny_model: Path, train: TokenColumns, validation: TokenColumns, tmp_path: Path
) -> None:
    training.fit(tiny_model, train, validation, settings_of(iters=1, epochs=None), tmp_path / "first", {})
    weights = tmp_path / "first" / "adapters" / "adapters.safetensors"
    cut, foreign = tmp_path / "cut.safetensors", tmp_path / "foreign.safetensors"
    cut.write_bytes(weights.read_bytes()[:-1000])
    mx.save_safetensors(str(foreign), {"encoder.weight": mx.zeros((2, 2))})
    pickle = tmp_path / "adapters.npz"
    pickle.write_bytes(b"\x80\x04K\x01.")
    for start, settings, said in (
        (weights, settings_of(lora_rank=8), r"has the shape \(\d+, 4\), expected \(\d+, 8\)"),
        (weights, settings_of(num_layers=1), "is no parameter that this fit trains"),
        (foreign, settings_of(), "encoder.weight is no parameter that this fit trains"),
        (cut, settings_of(), "cannot be read as weights"),
        (pickle, settings_of(), "cannot be read as weights: not a zip archive"),
    ):
        with pytest.raises(UserError, match=said):
            training.fit(tiny_model, train, validation, settings, tmp_path / "second", {}, start=start)
        assert not (tmp_path / "second" / "adapters" / "adapters.safetensors").exists()


def test_a_gradient_that_is_not_finite_stops_with_the_rows_and_leaves_the_best_adapter(
    tiny_model: Path, train: TokenColumns, validation: TokenColumns, tmp_path: Path
) -> None:
    """At this scale the loss is finite as long as lora_b is zero, and its gradient is not."""
    settings = settings_of(lora_scale=3e38, grad_accumulation_steps=2)
    with pytest.raises(UserError, match=r"The gradient's norm of update 1 is (nan|inf), on rows (\d+, ){7}\d+\. .*update 0"):
        training.fit(tiny_model, train, validation, settings, tmp_path, {})
    assert math.isfinite(mean_loss(load_model(tiny_model, tmp_path / "adapters"), validation, 4))


def test_patience_stops_the_fit_and_both_the_best_and_the_last_are_there(
    tiny_model: Path, train: TokenColumns, tmp_path: Path
) -> None:
    contradicting = token_columns([EncodedRow(n, [n % 200, 10, 3], [*b"QQQ", 258]) for n in range(100, 105)])
    settings = settings_of(early_stopping_patience=2, steps_per_eval=1, evals_per_epoch=None, epochs=20.0)
    summary = training.fit(tiny_model, train, contradicting, settings, tmp_path, {})
    losses = [each["loss"] for each in history(tmp_path, "validation")]
    assert summary.stopped_early and summary.steps == summary.best_step + 2 == len(losses) - 1 < summary.planned_steps
    last = mean_loss(load_model(tiny_model, tmp_path / "adapters-last"), contradicting, 4)
    best = mean_loss(load_model(tiny_model, tmp_path / "adapters"), contradicting, 4)
    assert (best, last) == (pytest.approx(min(losses), rel=1e-5), pytest.approx(losses[-1], rel=1e-5))


def test_the_best_adapter_can_be_chosen_by_a_score(
    tiny_model: Path, train: TokenColumns, validation: TokenColumns, tmp_path: Path
) -> None:
    scores = iter([0.1, 0.4, 0.2, 0.4, 0.3, 0.1, 0.0])
    summary = training.fit(
        tiny_model, train, validation, settings_of(best_metric="rougeL"), tmp_path, {}, score=lambda model: next(scores)
    )
    assert (summary.best_metric, summary.best_score, summary.best_step) == ("rougeL", 0.4, 3)
    assert [each["rougeL"] for each in history(tmp_path, "validation")] == [0.1, 0.4, 0.2, 0.4, 0.3, 0.1, 0.0]


def test_intervals_are_translated_into_updates() -> None:
    def plan(**values: object) -> tuple[int, ...]:
        settings = settings_of(**{"evals_per_epoch": None, "epochs": None, **values})
        made = fit_plan(settings, 22, 10)
        return made.batches, made.updates, made.steps_per_report, made.steps_per_eval, made.save_every or 0, made.validation_rows

    assert plan() == (6, 6, 1, 3, 0, 10)
    assert plan(epochs=2.5, batch_size=5) == (13, 13, 1, 3, 0, 10)
    assert plan(epochs=2.0, grad_accumulation_steps=4) == (12, 4, 1, 1, 0, 10)
    assert plan(iters=9, grad_accumulation_steps=4) == (9, 3, 1, 1, 0, 10)
    assert plan(reporting_interval_proportion=0.5, validation_interval_proportion=1.0) == (6, 6, 3, 6, 0, 10)
    assert plan(adapter_save_interval_proportion=0.01, steps_per_eval=100) == (6, 6, 1, 100, 1, 10)
    assert plan(saves_per_epoch=2, val_batches=2) == (6, 6, 1, 3, 3, 8)
    assert plan(validations_per_train_item=0.5, val_batches=None) == (6, 6, 1, 3, 0, 6)
    assert plan(val_batches=-1) == (6, 6, 1, 3, 0, 10)


def test_the_validation_rows_are_chosen_once_by_the_seed(validation: TokenColumns) -> None:
    one, same, other = (chosen_rows(validation, 3, seed).rows.tolist() for seed in (1, 1, 2))
    assert one == same == sorted(one) and len({*one}) == 3 and other != one
    assert chosen_rows(validation, 9, 1) is validation


def test_reports_are_means_over_the_tokens_of_their_updates(
    tiny_model: Path, train: TokenColumns, validation: TokenColumns, tmp_path: Path
) -> None:
    training.fit(tiny_model, train, validation, settings_of(), tmp_path / "each", {})
    training.fit(tiny_model, train, validation, settings_of(steps_per_report=4), tmp_path / "fourth", {})
    each = [value["loss"] for value in history(tmp_path / "each", "train")]
    fourth = history(tmp_path / "fourth", "train")
    assert [value["step"] for value in fourth] == [4, 8, 12, 16, 18]
    learned = [value["supervised_tokens"] for value in history(tmp_path / "each", "train")]
    weights = np.diff([0, *learned])
    assert fourth[0]["loss"] == pytest.approx(float(np.average(each[:4], weights=weights[:4])))


def test_no_event_is_ever_half_a_line(tiny_model: Path, train: TokenColumns, validation: TokenColumns, tmp_path: Path) -> None:
    training.fit(tiny_model, train, validation, settings_of(), tmp_path, {})
    assert [json.loads(line)["event"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()][-1] == "end"


def test_ctrl_c_at_the_update_that_stops_early_changes_nothing(
    tiny_model: Path, train: TokenColumns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contradicting = token_columns([EncodedRow(n, [n % 200, 10, 3], [*b"QQQ", 258]) for n in range(100, 105)])
    settings = settings_of(early_stopping_patience=2, steps_per_eval=1, evals_per_epoch=None, epochs=20.0)
    whole = training.fit(tiny_model, train, contradicting, settings, tmp_path / "whole", {})
    with monkeypatch.context() as patch:
        interrupted_after(whole.steps - 1, patch, press_ctrl_c)
        with pytest.raises(Stopped):
            training.fit(tiny_model, train, contradicting, settings, tmp_path / "stopped", {})
    assert adapter_digest(tmp_path / "stopped", "adapters-last") == adapter_digest(tmp_path / "whole", "adapters-last")
    assert history(tmp_path / "stopped", "end")[0]["steps"] == whole.steps


@pytest.mark.parametrize("damage", ["no best", "cut best", "cut log", "no log"])
def test_a_half_finished_run_that_was_tampered_with_still_ends(
    tiny_model: Path, train: TokenColumns, validation: TokenColumns, damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(**EVERYTHING)
    whole = training.fit(tiny_model, train, validation, settings, tmp_path / "whole", {})
    with monkeypatch.context() as patch:
        interrupted_after(11, patch, fail)
        with pytest.raises(MemoryError):
            training.fit(tiny_model, train, validation, settings, tmp_path / "run", {})
    best, log = tmp_path / "run" / "adapters" / "adapters.safetensors", tmp_path / "run" / "metrics.jsonl"
    if "best" in damage:
        best.unlink() if damage == "no best" else best.write_bytes(best.read_bytes()[:-1])
    else:
        log.unlink() if damage == "no log" else log.write_bytes(log.read_bytes()[:-5])
    summary = training.fit(tiny_model, train, validation, settings, tmp_path / "run", {})
    assert adapter_digest(tmp_path / "run") == adapter_digest(tmp_path / "whole")
    assert summary.steps == whole.steps and len(history(tmp_path / "run", "end")) == 1


def test_weights_trained_under_another_scale_or_method_are_refused(
    tiny_model: Path, train: TokenColumns, validation: TokenColumns, tmp_path: Path
) -> None:
    training.fit(tiny_model, train, validation, settings_of(iters=1, epochs=None), tmp_path / "first", {})
    weights = tmp_path / "first" / "adapters" / "adapters.safetensors"
    for changed in ({"lora_scale": 2.0}, {"use_rslora": True}, {"fine_tune_type": "dora"}):
        with pytest.raises(UserError, match=r"was trained with fine_tune_type='lora' and a scale of 10.0; this fit has"):
            training.fit(tiny_model, train, validation, settings_of(**changed), tmp_path / "second", {}, start=weights)


def test_a_set_without_rows_is_refused(tiny_model: Path, train: TokenColumns, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="The validation set has no rows"):
        training.fit(tiny_model, train, train.take([]), settings_of(), tmp_path, {})
