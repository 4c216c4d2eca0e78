"""The probe of a fit: its estimates against real fits, what it does not dare to run, and what it advises."""

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from finetune_dataflow.cli import main
from finetune_dataflow.engine import losses, memory, training
from finetune_dataflow.engine import probe as probing
from finetune_dataflow.engine.batches import Batch, batch, epoch_order, in_order, widths
from finetune_dataflow.engine.probe import Probe, available_memory, cgroup_limits, lines, probe
from finetune_dataflow.engine.tokens import EncodedRow, TokenColumns, token_columns
from finetune_dataflow.errors import UserError
from tests.fit_values import settings_of
from tests.tiny_model import write_tiny_model

MIB = 2**20
PLENTY = 10**12


def rows_between(count: int, first: int, shortest: int, longest: int) -> TokenColumns:
    """Rows of random bytes, the first of the greatest length, a fifth of each row its reply."""
    draw = np.random.default_rng(first)
    lengths = [longest, *draw.integers(shortest, longest, count - 1).tolist()]
    texts = [draw.integers(10, 200, length).tolist() for length in lengths]
    return token_columns(
        [EncodedRow(first + n, text[: -(len(text) // 5)], text[-(len(text) // 5) :]) for n, text in enumerate(texts)]
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight layers, hidden size 256: activations and weights of some megabytes."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "eight", layers=8, hidden_size=256)


@pytest.fixture(scope="module")
def train() -> TokenColumns:
    return rows_between(16, 1, 10, 90)


@pytest.fixture(scope="module")
def validation() -> TokenColumns:
    return rows_between(4, 100, 10, 60)


@pytest.fixture
def counted_by_mlx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory as on a GPU: MLX's own count, without the interpreter, which would outweigh these small models."""
    monkeypatch.setattr(memory, "peak_bytes", mx.get_peak_memory)
    monkeypatch.setattr(probing, "_resident", lambda: 0)


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "lora": {"num_layers": 4, "batch_size": 8},
    "checkpointed": {"num_layers": -1, "batch_size": 8, "grad_checkpoint": True},
    "full, accumulated": {
        "num_layers": 6,
        "fine_tune_type": "full",
        "batch_size": 4,
        "grad_accumulation_steps": 2,
        "epochs": 3.0,
    },
}


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """How much of what two threads need they need at the same time is up to the scheduler; one needs the same every time."""
    for module in (probing, training, losses):
        monkeypatch.setattr(module, "crew_size", lambda *_: 1)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_estimated_and_predicted_memory_are_within_a_fifth_of_the_fit_s(
    name: str, model: Path, train: TokenColumns, validation: TokenColumns, tmp_path: Path, counted_by_mlx: None, one_thread: None
) -> None:
    settings = settings_of(**{"epochs": 1.0, "evals_per_epoch": 1, **CONFIGURATIONS[name]})
    estimate = probe(model, train, validation, settings, available=PLENTY)
    summary = training.fit(model, train, validation, settings, tmp_path, {})
    real = mx.get_peak_memory()
    assert estimate.measured and estimate.fits and estimate.advice == ""
    assert estimate.array_memory_bytes == pytest.approx(real, rel=0.2)
    assert estimate.peak_memory_bytes == pytest.approx(summary.peak_memory_bytes, rel=0.2)
    assert (estimate.updates, estimate.rows, estimate.width) == (summary.steps, settings.loop.batch_size, 96)

    prediction = probe(model, train, validation, settings, available=real)
    assert prediction.tried and not prediction.measured and not prediction.fits
    assert prediction.array_memory_bytes == pytest.approx(real, rel=0.2)
    assert prediction.seconds is None


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_with_several_threads_the_estimate_lies_between_one_that_works_and_all_at_their_peak(
    name: str, model: Path, train: TokenColumns, validation: TokenColumns, counted_by_mlx: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(**{"epochs": 1.0, "evals_per_epoch": 1, **CONFIGURATIONS[name]})
    weights = (model / "model.safetensors").stat().st_size
    several = probe(model, train, validation, settings, available=PLENTY)
    for module in (probing, training, losses):
        monkeypatch.setattr(module, "crew_size", lambda *_: 1)
    alone = probe(model, train, validation, settings, available=PLENTY)
    # A thread holds its share of the rows and gradients of its own: more than half of what one thread holds for all.
    assert weights + 0.4 * (alone.array_memory_bytes - weights) < several.array_memory_bytes
    assert several.array_memory_bytes < weights + 2 * (alone.array_memory_bytes - weights)


def test_on_a_cpu_the_estimate_holds_what_the_process_held_before(
    tiny_model: Path, train: TokenColumns, validation: TokenColumns, one_thread: None
) -> None:
    settings = settings_of(batch_size=2, iters=1, epochs=None)
    alone = probe(tiny_model, train, validation, settings)
    ballast = np.ones(400 * MIB, np.uint8)
    beside = probe(tiny_model, train, validation, settings)
    assert 300 * MIB < beside.peak_memory_bytes - alone.peak_memory_bytes < 500 * MIB
    assert beside.array_memory_bytes == pytest.approx(alone.array_memory_bytes, rel=0.2)
    del ballast


def test_the_heaviest_batch_is_not_run_where_it_is_predicted_not_to_fit(
    model: Path, train: TokenColumns, validation: TokenColumns, monkeypatch: pytest.MonkeyPatch, counted_by_mlx: None
) -> None:
    sizes: list[int] = []
    passes = probing._Trial.passes

    def recording(trial: probing._Trial, current: Batch) -> tuple[int, int]:
        sizes.append(current.inputs.size)
        return passes(trial, current)

    monkeypatch.setattr(probing._Trial, "passes", recording)
    monkeypatch.setattr(probing._Trial, "accumulate", lambda *_: pytest.fail("a real batch was run"))
    found = probe(model, train, validation, settings_of(batch_size=16, num_layers=-1), available=40 * MIB)
    assert found.tried and not found.measured and (found.rows, found.width) == (16, 96)
    assert max(sizes) == 96 < 16 * 96


def test_nothing_is_loaded_where_the_weights_alone_do_not_fit(
    model: Path, train: TokenColumns, validation: TokenColumns, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probing, "load_model", lambda *_: pytest.fail("the model was loaded"))
    found = probe(model, train, validation, settings_of(), available=5 * MIB)
    assert not found.tried and not found.measured and not found.fits
    assert found.peak_memory_bytes > (model / "model.safetensors").stat().st_size * 0.99
    assert "No change of the settings is predicted to fit." in found.advice


def test_the_advised_smaller_batches_make_the_same_number_of_updates_and_do_fit(
    model: Path, train: TokenColumns, validation: TokenColumns, counted_by_mlx: None, one_thread: None
) -> None:
    values: dict[str, Any] = {"batch_size": 16, "num_layers": -1, "epochs": None, "iters": 2}
    first = probe(model, train, validation, settings_of(**values), available=100 * MIB)
    advised = dict(re.findall(r"(\w+)=(\d+)", first.advice))
    values |= {name: int(value) for name, value in advised.items()}
    assert [*advised] == ["batch_size", "grad_accumulation_steps", "iters"]
    assert values["batch_size"] * values["grad_accumulation_steps"] == 16 and values["batch_size"] < 16
    second = probe(model, train, validation, settings_of(**values), available=100 * MIB)
    assert second.fits and second.updates == first.updates == 2


def test_checkpointing_is_advised_where_batches_cannot_be_smaller(
    model: Path, validation: TokenColumns, counted_by_mlx: None
) -> None:
    long, settings = rows_between(3, 1, 190, 200), settings_of(batch_size=1, num_layers=-1)
    found = probe(model, long, validation, settings, available=30 * MIB)
    assert found.advice.startswith("Predicted to fit: grad_checkpoint=true (about ")
    changed = replace(settings, loop=replace(settings.loop, grad_checkpoint=True))
    assert probe(model, long, validation, changed, available=30 * MIB).fits


def footprint(**bytes_of: Any) -> probing._Footprint:
    return probing._Footprint(0, **bytes_of)


@pytest.fixture
def candidates(model: Path, validation: TokenColumns) -> Callable[..., str]:
    """The advice for a footprint made by hand: a megabyte for each token of a batch, and nothing else."""

    def advice(megabytes: float, rows: TokenColumns, **values: Any) -> str:
        prober = probing._Probing(model, rows, validation, settings_of(**values), None, round(megabytes * MIB / 0.7))
        by_token = probing._Line(token=MIB)
        found = footprint(weights=0, forward=by_token, backward=by_token)
        return prober._advice(found, probing.load_model(model), tried=True)

    return advice


def test_a_lower_max_seq_length_comes_next_and_says_how_many_rows_it_shortens(
    candidates: Callable[..., str], train: TokenColumns, validation: TokenColumns, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probing._Probing, "_sampled", lambda self, model, footprint: (footprint, None))
    assert candidates(96, train, batch_size=2).startswith("Predicted to fit: batch_size=1 and grad_accumulation_steps=2 (")
    found = candidates(80.5, train, batch_size=2)
    # 81 tokens are 80 inputs and one to predict.
    expected = "Predicted to fit: batch_size=1, grad_accumulation_steps=2, grad_checkpoint=true and max_seq_length=81, which "
    longer = sum(int(each) > 81 for each in train.lengths)
    assert longer > 0 and found.startswith(f"{expected}shortens {longer} of 20 rows")


@pytest.mark.parametrize(
    ("megabytes", "expected"),
    [
        (30, r"What may fit: num_layers=[1-7] \("),
        (14, r"What may fit: fine_tune_type=lora \("),
        (4, r"What may fit: fine_tune_type=lora and quantize_bits=4 \("),
        (1, r"No change of the settings .* Use a smaller model"),
    ],
)
def test_where_weights_gradients_and_state_do_not_fit_less_is_trained_or_the_weights_are_quantised(
    megabytes: float,
    expected: str,
    model: Path,
    train: TokenColumns,
    validation: TokenColumns,
    counted_by_mlx: None,
) -> None:
    settings = settings_of(fine_tune_type="full", num_layers=-1, batch_size=4)
    found = probe(model, train, validation, settings, available=round(megabytes * MIB))
    assert not found.tried and re.match(expected, found.advice), found.advice


def test_quantised_weights_are_not_quantised_again(tmp_path: Path) -> None:
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {"w": mx.zeros((8, 4), mx.uint32), "s": mx.zeros((8, 1))})
    assert probing._Weights.of(tmp_path).in_4_bits is None
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {"w": mx.zeros((64, 64), mx.bfloat16), "b": mx.zeros((8,))})
    weights = probing._Weights.of(tmp_path)
    # On a CPU bfloat16 becomes float32; in 4 bits each 64 weights take 32 bytes and two float32.
    assert (weights.loaded, weights.in_4_bits) == (64 * 64 * 4 + 32, 64 * (32 + 8) + 32)


def test_a_probe_leaves_no_trace(
    model: Path, train: TokenColumns, validation: TokenColumns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mx.random.seed(5)
    numbers = np.random.default_rng(0).bit_generator.state, np.random.get_state()[1].tolist()  # type: ignore[index]
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in model.iterdir()}
    probe(model, train, validation, settings_of(lora_dropout=0.5, batch_size=2, grad_checkpoint=True))
    drawn = mx.random.uniform(shape=(4,)).tolist()
    mx.random.seed(5)
    assert drawn == mx.random.uniform(shape=(4,)).tolist()
    assert np.random.get_state()[1].tolist() == numbers[1]  # type: ignore[index]
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in model.iterdir()} == before
    assert os.listdir(tmp_path) == []


def test_the_time_is_the_sum_over_the_real_batches_of_every_epoch_updates_and_validations(
    tiny_model: Path, train: TokenColumns, validation: TokenColumns, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probing._Trial, "updates", lambda self, current: (100.0 + 2.0 * current.inputs.size, 50.0))
    monkeypatch.setattr(probing._Trial, "validate", lambda self, current: 3.0 * current.inputs.size)
    settings = settings_of(batch_size=3, grad_accumulation_steps=2, epochs=2.0, evals_per_epoch=3)
    found = probe(tiny_model, train, validation, settings, available=PLENTY)
    ladder = widths(train.lengths)
    batches = [
        batch(train, rows, 3, ladder).inputs.size for epoch in (0, 1) for rows in epoch_order(train, 3, 7, epoch)
    ]  # fmt: skip
    one_validation = 3 * sum(each.inputs.size for each in in_order(validation, 3))
    # 16 rows are 6 batches and 3 updates an epoch; validated at 0, 1, ..., 6.
    expected = sum(100 + 2 * each for each in batches) + 6 * 50 + 7 * one_validation
    assert (found.batches, found.updates) == (12, 6)
    assert found.seconds == pytest.approx(expected, rel=0.01)
    assert found.step_seconds == 2 * (100 + 2 * found.rows * found.width) + 50


def test_settings_that_the_model_does_not_allow_are_refused_as_by_the_fit(
    tiny_model: Path, train: TokenColumns, validation: TokenColumns
) -> None:
    with pytest.raises(UserError, match="num_layers=3 is out of range"):
        probe(tiny_model, train, validation, settings_of(num_layers=3))
    with pytest.raises(UserError, match="The validation set has no rows"):
        probe(tiny_model, train, token_columns([]), settings_of())


def test_limits_of_control_groups_and_those_around_them_are_found_in_both_layouts(tmp_path: Path) -> None:
    for name, text in {
        "memory/box/memory.limit_in_bytes": "5000\n",
        "memory/box/inner/memory.limit_in_bytes": "9223372036854771712\n",
        "box/inner/memory.max": "max\n",
        "box/memory.max": "7000\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cgroup_limits("4:memory:/box/inner\n3:cpuset:/box\n", tmp_path) == [9223372036854771712, 5000]
    assert cgroup_limits("0::/box/inner\n", tmp_path) == [7000]
    assert cgroup_limits("0::/\n4:memory:/elsewhere\n", tmp_path) == []


def test_available_memory_is_what_is_free_and_what_is_held_within_the_group_s_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info, membership = tmp_path / "meminfo", tmp_path / "cgroup"
    info.write_text("MemTotal:  9000000 kB\nMemAvailable:  3000000 kB\n")
    membership.write_text("0::/\n")
    monkeypatch.setattr(probing, "MEMORY_INFO", info)
    monkeypatch.setattr(probing, "MEMBERSHIP", membership)
    monkeypatch.setattr(probing, "CGROUPS", tmp_path)
    monkeypatch.setattr(probing, "_resident", lambda: 1000)
    assert available_memory() == 3000000 * 1024 + 1000
    (tmp_path / "memory.max").write_text("4096")
    assert available_memory() == 4096


FOUND = Probe(
    updates=69,
    batches=69,
    seconds=250.4,
    step_seconds=3.0,
    peak_memory_bytes=round(1.9 * 2**30),
    proof_memory_bytes=2**30,
    array_memory_bytes=2**30,
    available_memory_bytes=round(15.2 * 2**30),
    rows=4,
    width=176,
    tried=True,
    measured=True,
    fits=True,
    advice="",
)


def test_a_probe_is_told_in_a_line_and_what_to_change_in_another() -> None:
    settings = settings_of()
    assert lines(FOUND, settings) == [
        "Probe: 69 updates in about 4 min 10 s; peak memory about 1.9 GiB of 15.2 GiB available "
        "(measured on the heaviest batch, 4 x 176 tokens)."
    ]
    refused = replace(
        FOUND, seconds=None, measured=False, fits=False, available_memory_bytes=2**30, proof_memory_bytes=2**31, advice="Do this."
    )
    assert lines(refused, settings_of(best_metric="rouge1")) == [
        "Probe: 69 updates; peak memory about 1.9 GiB of 1.0 GiB available "
        "(predicted from small batches; the heaviest, 4 x 176 tokens, is not tried above 80 %).",
        "  Before the first update, to prove the loss: about 2.0 GiB.",
        "  The replies generated for best_metric=rouge1 are not counted.",
        "  Do this.",
    ]
    assert lines(replace(refused, tried=False), settings)[0] == (
        "Probe: 69 updates; peak memory at least 1.9 GiB of 1.0 GiB available "
        "(weights, gradients and optimiser state; nothing is tried above 80 %)."
    )


def test_plan_with_probe_prints_the_probe_after_the_plan_and_makes_no_run_directory(
    inputs: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word for name, value in inputs.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert main(["plan", "--probe", *words]) == 0
    printed = capsys.readouterr().out.splitlines()
    plan_line = next(place for place, line in enumerate(printed) if line.startswith("The fit: "))
    updates = re.match(r"The fit: (\d+) updates", printed[plan_line])
    found = [line for line in printed[plan_line:] if line.startswith("Probe: ")]
    assert updates is not None and len(found) == 1
    assert re.fullmatch(rf"Probe: {updates.group(1)} updates in about .* available \(measured on .* tokens\)\.", found[0])
    assert not Path(inputs["output_dir"]).exists()


def test_a_probe_under_start_presaved_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--start", "presaved", "--probe", "--adapter-path", str(tmp_path)]) == 2
    assert "--probe tries out a fit" in capsys.readouterr().err
