"""This project's fit under the conductor's windows: the real `engine.training.fit`, paused between batches.

`growth` times the fit over more rows, longer rows and more tuned layers instead.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from finetune_dataflow import engine  # isort: skip  # its BLAS must stand before MLX

import mlx.core as mx
import numpy as np
from protocol import Answers, Windows, arguments, json_rows, peak_bytes, versions

from finetune_dataflow.engine.batches import Batch
from finetune_dataflow.engine.chat import Conversation, encode_conversations, load_encoder
from finetune_dataflow.engine.fit_settings import FitSettings, LoopSettings, MethodSettings, OptimizerSettings
from finetune_dataflow.engine.frozen_states import StateStore
from finetune_dataflow.engine.generation import replies_of
from finetune_dataflow.engine.interrupts import Interrupts
from finetune_dataflow.engine.losses import mean_loss
from finetune_dataflow.engine.models import load_model
from finetune_dataflow.engine.settings import GenerationSettings
from finetune_dataflow.engine.tokens import EncodedRow, TokenColumns, token_columns
from finetune_dataflow.engine.training import LAST, FitSummary

sys.path.insert(0, str(Path(__file__).parent.parent))
from arithmetic import Decoder

LONGEST = 2048
STATES_BYTES = 20 * 10**9  # of frozen layers, on the disk
STEPS = 4  # of a fit whose steps are timed; the first does not count
RATE_SECONDS = 0.15  # for each matrix product


def encoded(settings: dict[str, Any], rows: Sequence[dict[str, Any]]) -> TokenColumns:
    """The token columns of rows with prompt and completion."""
    chats = [Conversation(n, ({"role": "user", "content": row["prompt"]},), row["completion"]) for n, row in enumerate(rows)]
    return encode_conversations(load_encoder(Path(settings["model"])), chats, LONGEST, "error")


def columns(settings: dict[str, Any]) -> tuple[TokenColumns, TokenColumns]:
    """Training and validation rows."""
    validation = token_columns(
        [
            EncodedRow(number, row["input_ids"][: row["prompt_length"]], row["input_ids"][row["prompt_length"] :])
            for number, row in enumerate(json_rows(settings["validation"]))
        ]
    )
    return encoded(settings, json_rows(f"{settings['data']}/train.jsonl")), validation


def fit_settings(settings: dict[str, Any], warmup: float = 0.0, **loop: Any) -> FitSettings:
    """The settings that all engines share, under our names."""
    return FitSettings(
        MethodSettings(
            num_layers=settings["layers"],
            lora_rank=settings["rank"],
            lora_scale=settings["scale"],
            random_state=settings["seed"],
        ),
        OptimizerSettings(
            learning_rate=settings["learning_rate"], weight_decay=settings["weight_decay"], warmup_proportion=warmup
        ),
        LoopSettings(batch_size=settings["batch_size"], **loop),
    )


def fitted(
    settings: dict[str, Any], chosen: FitSettings, rows: TokenColumns, validation: TokenColumns, directory: str
) -> FitSummary:
    """A fit from the start in an empty directory, its frozen layers' states beside it."""
    store = StateStore(Path(directory, "states"), {"base": settings["model"]}, STATES_BYTES)
    return engine.training.fit(Path(settings["model"]), rows, validation, chosen, Path(directory, "run"), {}, store=store)


def pausing(before_batch: Callable[[Any, list[Batch]], None], first_epoch: Callable[[], bool]) -> type[engine.training._Fit]:
    """The fit with something done before each batch of its loop.

    In a first epoch every batch's frozen layers are computed anew, here within the step; a fit does the same arithmetic for
    all rows before its first step.
    """

    class Paused(engine.training._Fit):
        def _forget_frozen_layers(self) -> None:
            """A first epoch's windows, and replies, need all layers at any time."""

        looping = False  # the fit looks at its first batch before the loop, too

        def run(self, interrupts: Interrupts) -> FitSummary:
            self.looping = True
            return super().run(interrupts)

        def _batches(self) -> Iterator[list[Batch]]:
            for current in super()._batches():
                if self.looping:
                    before_batch(self, current)
                yield [replace(part, states=None) for part in current] if first_epoch() else current

    return Paused


def windows(answers: Answers, settings: dict[str, Any]) -> None:
    """Train for as long as windows are asked for."""
    rows, validation = columns(settings)
    held: dict[str, Any] = {}
    report = engine.cpu_runtime.load_fast_blas()
    about = {"blas": f"{report.name} on {report.threads} threads", "versions": versions("mlx", "mlx-lm")}
    handlers = {
        "generate": lambda: resting(held["fit"], lambda: generated(settings, held["fit"].model, validation)),
        "rate": lambda: resting(held["fit"], lambda: matrix_rate(settings, held["batch"])),
    }
    found = Windows(answers, about, handlers)

    def before_batch(fit: engine.training._Fit, current: list[Batch]) -> None:
        held.update(fit=fit, batch=current)
        if fit.state.epoch_supervised:
            found.loss = fit.state.epoch_loss / fit.state.epoch_supervised
        indices = [index for part in current for index in part.indices]
        found.step(rows.lengths[indices], rows.row_supervised[indices])

    engine.training._Fit = pausing(before_batch, lambda: found.phase == "first")  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as directory:
        endless = fit_settings(settings, iters=10**7, steps_per_eval=10**7, val_batches=1)
        fitted(settings, endless, rows, validation, directory)


def resting(fit: engine.training._Fit, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` gives while the fit's threads rest."""
    with fit.crew.resting():
        return work()


def generated(settings: dict[str, Any], model: Any, validation: TokenColumns) -> dict[str, Any]:
    """Greedy replies, as an evaluation makes them."""
    prompts = [validation.prompt(index) for index in range(min(settings["prompts"], len(validation)))]
    chosen = GenerationSettings(max_tokens=settings["max_tokens"], generation_batch_size=settings["generation_batch_size"])
    encoder = load_encoder(Path(settings["model"]))
    model.eval()
    started = time.perf_counter()
    made = replies_of(model, prompts, encoder, chosen, "replies")
    seconds = time.perf_counter() - started
    model.train()
    tokens = sum(len(each.token_ids) + each.ended for each in made)  # the token that ends a reply was generated, too
    return {"tokens": tokens, "replies": len(made), "seconds": seconds, "peak_bytes": peak_bytes()}


def matrix_rate(settings: dict[str, Any], current: list[Batch]) -> dict[str, Any]:
    """The float32 rate of the matrix products of a step over a batch like this, in operations a second, each measured alone.

    Each product counts as often as a step needs it: forward in every layer, backward in the tuned ones, the head once.
    """
    model = Decoder.of(settings["config"])
    positions, supervised = sum(part.inputs.size for part in current), sum(len(part.labels) for part in current)
    needed = [(positions, inner, outer, model.layers, settings["layers"]) for inner, outer in model.matrices]
    needed.append((supervised, model.hidden, model.vocabulary, 1, 1))
    operations, seconds, products = 0, 0.0, {}
    for rows, inner, outer, forward, backward in dict.fromkeys(needed):
        again = needed.count((rows, inner, outer, forward, backward))
        weight = mx.random.normal((outer, inner))
        for name, wide, matrix, times in (("", inner, weight.T, forward), (" transposed", outer, weight, backward)):
            one = _seconds(mx.random.normal((rows, wide)), matrix)
            done = 2 * rows * inner * outer
            operations, seconds = operations + again * times * done, seconds + again * times * one
            products[f"{rows}x{inner}x{outer}{name}"] = round(done / one / 1e9, 1)
    return {"operations_per_second": operations / seconds, "gigaflops": products}


def _seconds(left: mx.array, right: mx.array) -> float:
    """The median seconds of a product, over as many as fit into some time; the first does not count."""
    mx.eval(left, right, mx.matmul(left, right))
    found: list[float] = []
    while sum(found) < RATE_SECONDS:
        started = time.perf_counter()
        mx.eval(mx.matmul(left, right))
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def final_loss(answers: Answers, settings: dict[str, Any]) -> None:
    """One epoch over the rows, then the validation loss of its last adapter. The peak is that of the whole process."""
    rows, validation = columns(settings)
    peaks, reset = [], engine.memory.reset_peak

    def noting() -> None:
        peaks.append(peak_bytes())
        reset()

    engine.memory.reset_peak = noting  # the fit begins to count when its loop does; loading and proof count here, too
    with tempfile.TemporaryDirectory() as directory:
        started = time.perf_counter()
        chosen = fit_settings(settings, settings["warmup"], epochs=1.0, steps_per_eval=10**7, val_batches=1)
        summary = fitted(settings, chosen, rows, validation, directory)
        seconds = time.perf_counter() - started
        peaks.append(peak_bytes())
        loss = mean_loss(load_model(Path(settings["model"]), Path(directory, "run", LAST)), validation, settings["batch_size"])
    answers.give(loss=loss, updates=summary.steps, seconds=seconds, peak_bytes=max(peaks), peaks=peaks)


def growth(answers: Answers, settings: dict[str, Any]) -> None:
    """Seconds of an epoch over more and more rows, and of a step over longer rows and with more tuned layers."""
    rows, validation = columns(settings)
    one = validation.take([0])
    for count in settings["growth"]["rows"]:
        repeated = rows.take([number % len(rows) for number in range(count)])
        numbered = replace(repeated, rows=np.arange(count, dtype=np.int64))
        with tempfile.TemporaryDirectory() as directory:
            started = time.perf_counter()
            fitted(settings, fit_settings(settings, epochs=1.0, steps_per_eval=10**7), numbered, one, directory)
            answers.give(table="rows", size=count, seconds=time.perf_counter() - started)
    started_at: list[float] = []
    engine.training._Fit = pausing(lambda fit, current: started_at.append(time.perf_counter()), lambda: True)  # type: ignore[misc]
    usual = settings["growth"]["usual_length"]
    for length in settings["growth"]["sequence_length"]:
        answers.give(table="sequence_length", size=length, seconds=_step_seconds(settings, length, one, started_at))
    for layers in settings["growth"]["tuned_layers"]:
        changed = {**settings, "layers": layers}
        answers.give(table="tuned_layers", size=layers, seconds=_step_seconds(changed, usual, one, started_at))
    answers.give(done=True)


def _step_seconds(settings: dict[str, Any], length: int, validation: TokenColumns, started_at: list[float]) -> float:
    """The median seconds of a step over rows of one length, a third of it learned."""
    draw = np.random.default_rng(0)
    ids = draw.integers(3, settings["config"]["vocab_size"], (STEPS * settings["batch_size"], length)).tolist()
    cut = length - length // 3
    rows = token_columns([EncodedRow(number, each[:cut], each[cut:]) for number, each in enumerate(ids)])
    started_at.clear()
    with tempfile.TemporaryDirectory() as directory:
        fitted(settings, fit_settings(settings, epochs=1.0, steps_per_eval=10**7), rows, validation, directory)
    return float(np.median(np.diff(started_at)[1:]))


def main() -> None:
    """Serve the conductor."""
    chosen, settings = arguments(__doc__ or "")
    modes = {"windows": windows, "loss": final_loss, "growth": growth}
    cast(Callable[..., None], modes[chosen.mode])(Answers(), settings)


if __name__ == "__main__":
    main()
