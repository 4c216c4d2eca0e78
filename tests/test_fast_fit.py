"""A fit by its fast paths against the same fit without them, and what becomes of one that was interrupted."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors.numpy import load_file

from finetune_dataflow.engine import prefix_states, training
from finetune_dataflow.engine.fit_settings import FitSettings
from finetune_dataflow.engine.frozen_states import StateStore, store
from finetune_dataflow.engine.losses import PLAIN
from finetune_dataflow.engine.models import load_model
from finetune_dataflow.engine.prefix_states import forget
from finetune_dataflow.engine.proof import Sample
from finetune_dataflow.engine.tokens import EncodedRow, TokenColumns, token_columns
from finetune_dataflow.errors import UserError
from tests.fit_values import adapter_digest, history, settings_of
from tests.test_resume import fail, interrupted_after


def rows_of_many_lengths(count: int, first: int) -> TokenColumns:
    """Short rows and a few long ones, in any order."""
    draw = np.random.default_rng(first)
    longer = [int(draw.integers(30, 60)) if n % 5 == 0 else int(draw.integers(3, 9)) for n in range(count)]
    return token_columns(
        [EncodedRow(first + n, draw.integers(1, 250, size).tolist(), [*b"yes", 258]) for n, size in enumerate(longer)]
    )


TRAIN, VALIDATION = rows_of_many_lengths(26, 1), rows_of_many_lengths(7, 100)
SETTINGS: dict[str, Any] = {"num_layers": 1, "batch_size": 6, "learning_rate": 0.003, "save_every": 2}


def settings() -> FitSettings:
    return settings_of(**SETTINGS)


def states_in(folder: Path) -> StateStore:
    return StateStore(folder, {"base_model": "the tiny one"}, 10**9)


def fitted(model: Path, directory: Path, folder: Path | None) -> training.FitSummary:
    states = None if folder is None else states_in(folder)
    return training.fit(model, TRAIN, VALIDATION, settings(), directory, {}, store=states)


def size_of(module: Any) -> int:
    """The numbers in a module's parameters."""
    return sum(each.size for each in tree_flatten(module.parameters(), destination={}).values())  # type: ignore[union-attr]


def losses(directory: Path) -> list[float]:
    return [event["loss"] for event in (*history(directory, "train"), *history(directory, "validation"))]


def test_the_fast_fit_learns_what_the_plain_one_does(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = fitted(tiny_model, tmp_path / "fast", tmp_path / "states")
    assert "stored states of the frozen layers" in found.loss_path and "several rows to a line" in found.loss_path
    monkeypatch.setattr(training, "proven_path", lambda *_: PLAIN)
    monkeypatch.setattr(training, "crew_size", lambda *_: 1)
    plain = fitted(tiny_model, tmp_path / "plain", None)
    assert plain.loss_path == "the plain path"
    np.testing.assert_allclose(losses(tmp_path / "fast"), losses(tmp_path / "plain"), rtol=1e-4)
    one, other = (load_file(tmp_path / name / "adapters-last" / "adapters.safetensors") for name in ("fast", "plain"))
    apart = sum(float(np.square(one[name] - other[name]).sum()) for name in other) ** 0.5
    assert apart < 1e-2 * sum(float(np.square(each).sum()) for each in other.values()) ** 0.5
    assert (found.trained_tokens, found.supervised_tokens) == (plain.trained_tokens, plain.supervised_tokens)


def test_packing_never_changes_which_rows_an_update_sees(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates: dict[str, list[list[int]]] = {"packed": [], "plain": []}
    accumulate = training._Fit._accumulate
    packed_lines: list[Any] = []

    def noting(fit: training._Fit, current: list[Any]) -> None:
        updates["packed" if fit.path.packing else "plain"].append(sorted(row for part in current for row in part.indices))
        packed_lines.extend(part for part in current if part.segments is not None)
        accumulate(fit, current)

    monkeypatch.setattr(training._Fit, "_accumulate", noting)
    fitted(tiny_model, tmp_path / "fast", None)
    monkeypatch.setattr(training, "proven_path", lambda *_: PLAIN)
    fitted(tiny_model, tmp_path / "plain", None)
    assert updates["packed"] == updates["plain"] and packed_lines


def test_a_fit_on_stored_states_that_was_interrupted_ends_with_the_same_bytes(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fitted(tiny_model, tmp_path / "whole", tmp_path / "states")
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        interrupted_after(7, patch, fail)
        fitted(tiny_model, tmp_path / "fallen", tmp_path / "states")
    shutil.rmtree(tmp_path / "states")  # they are computed again, to the same bytes
    fitted(tiny_model, tmp_path / "fallen", tmp_path / "states")
    assert adapter_digest(tmp_path / "fallen") == adapter_digest(tmp_path / "whole")
    assert losses(tmp_path / "fallen") == losses(tmp_path / "whole")
    assert "are gone" not in caplog.text


def test_a_fit_whose_states_cannot_be_had_again_goes_on_without_them(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fitted(tiny_model, tmp_path / "whole", tmp_path / "states")
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        interrupted_after(7, patch, fail)
        fitted(tiny_model, tmp_path / "fallen", tmp_path / "states")
    fitted(tiny_model, tmp_path / "fallen", None)
    assert "The states of the frozen layers are gone: from here on the fit is equal to rounding only." in caplog.text
    np.testing.assert_allclose(losses(tmp_path / "fallen"), losses(tmp_path / "whole"), rtol=1e-4)


def test_states_are_computed_once_for_all_fits_over_the_same_rows(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted(tiny_model, tmp_path / "one", tmp_path / "states")
    monkeypatch.setattr(prefix_states, "_write_states", lambda *_: pytest.fail("states were computed again"))
    fitted(tiny_model, tmp_path / "two", tmp_path / "states")
    assert adapter_digest(tmp_path / "one") == adapter_digest(tmp_path / "two")


def test_a_fit_of_less_than_an_epoch_computes_no_states(tiny_model: Path, tmp_path: Path) -> None:
    changed = settings_of(**SETTINGS, epochs=None, iters=2)
    summary = training.fit(tiny_model, TRAIN, VALIDATION, changed, tmp_path / "run", {}, store=states_in(tmp_path / "states"))
    assert "stored states" not in summary.loss_path and not (tmp_path / "states").exists()


def test_states_that_take_too_much_room_are_left_out_and_that_is_said(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    little = StateStore(tmp_path / "states", {}, 1000)
    summary = training.fit(tiny_model, TRAIN, VALIDATION, settings(), tmp_path / "run", {}, store=little)
    assert "stored states" not in summary.loss_path
    assert "The first layer is computed in every epoch: the states of the 1 frozen layers would take" in caplog.text


def test_the_room_for_states_is_a_number_of_gigabytes() -> None:
    assert store("abc", 0.5).budget_bytes == 500_000_000
    with pytest.raises(UserError, match=r"frozen_states_gb=-1 is out of range\. Expected a number of gigabytes, 0 or more\."):
        store("abc", -1)


def test_the_rows_that_prove_the_path_are_of_the_first_and_the_last_batch(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Sample] = []
    proven_path = training.proven_path

    def noting(model: Any, samples: list[Sample], states: Any = None) -> Any:
        seen.extend(samples)
        return proven_path(model, samples, states)

    monkeypatch.setattr(training, "proven_path", noting)
    fitted(tiny_model, tmp_path / "run", None)
    assert [len(each.plain.indices) for each in seen] == [4, 4]
    assert not {*seen[0].plain.indices} & {*seen[1].plain.indices}
    for each in seen:
        assert each.packed is not None and each.packed.indices == each.plain.indices
        assert len(each.packed.inputs) >= 2 and each.packed.segments is not None and each.packed.segments.max() >= 2


def test_weights_that_no_batch_needs_are_let_go_and_the_fit_learns_the_same(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    parameters = training._Fit._accumulate

    def noting(fit: training._Fit, current: list[Any]) -> None:
        sizes.append(size_of(fit.model.layers[0]))
        parameters(fit, current)

    monkeypatch.setattr(training._Fit, "_accumulate", noting)
    fitted(tiny_model, tmp_path / "let go", tmp_path / "states")
    assert set(sizes) == {0}
    monkeypatch.setattr(training, "forget", lambda *_: 0)
    fitted(tiny_model, tmp_path / "kept", tmp_path / "states")
    assert sizes[-1] > 0
    assert adapter_digest(tmp_path / "let go") == adapter_digest(tmp_path / "kept")
    assert losses(tmp_path / "let go") == losses(tmp_path / "kept")


def test_a_score_that_generates_replies_finds_the_whole_model(tiny_model: Path, tmp_path: Path) -> None:
    counted: list[int] = []

    def score(model: Any) -> float:
        counted.append(size_of(model.layers[0]))
        return 1.0

    chosen, states = settings_of(**SETTINGS, best_metric="rougeL"), states_in(tmp_path / "states")
    training.fit(tiny_model, TRAIN, VALIDATION, chosen, tmp_path / "run", {}, score=score, store=states)
    assert counted and min(counted) > 0


def test_what_a_later_layer_shares_with_a_frozen_one_stays(tiny_model: Path) -> None:
    model = load_model(tiny_model)
    model.layers[1].mlp = model.layers[0].mlp
    forget(model, 1)
    assert model.layers[0].self_attn.q_proj.weight.size == 0 and model.layers[1].self_attn.q_proj.weight.size > 0
    assert model.layers[1].mlp.up_proj.weight.size > 0
