"""The fit: LoRA layers trained with token-weighted loss, every row once an epoch, the best adapter kept.

mlx-lm gives the layers and the file layout; the loop is our own (docs/training.md says which of its trainer's habits differ).
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers

from finetune_dataflow.engine import adapters, memory
from finetune_dataflow.engine.batches import Batch, batch, epoch_order, widths
from finetune_dataflow.engine.losses import mean_loss, proven_path
from finetune_dataflow.engine.models import load_model
from finetune_dataflow.engine.progress import Bar
from finetune_dataflow.engine.randomness import seeded
from finetune_dataflow.engine.settings import FitSettings
from finetune_dataflow.engine.tokens import TokenColumns
from finetune_dataflow.errors import UserError

logger = logging.getLogger(__name__)

HISTORY = "metrics.jsonl"


@dataclass(frozen=True)
class FitSummary:
    """What a finished fit has to say of itself.

    Losses are in nats per supervised token; `train_loss` is the mean over the last epoch's updates. `best_step` counts
    updates; 0 means that no update improved the validation loss. Tokens are counted over all epochs, padding never.
    """

    steps: int
    best_step: int
    best_validation_loss: float
    first_validation_loss: float
    train_loss: float
    trained_tokens: int
    supervised_tokens: int
    tokens_per_second: float
    peak_memory_bytes: int
    device: str
    shapes: int
    loss_path: str


def total_steps(rows: int, settings: FitSettings) -> int:
    """The updates of the whole fit: `epochs` times the batches of one epoch, rounded up."""
    return math.ceil(settings.epochs * math.ceil(rows / settings.batch_size))


def learning_rate(step: int, steps: int, settings: FitSettings) -> float:
    """The rate of update `step` (from 0): a linear warm-up that never starts at zero, then a half cosine to zero."""
    warmup = round(settings.warmup_proportion * steps)
    if step < warmup:
        return settings.learning_rate * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(steps - warmup, 1)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def fit(
    base_model_path: Path,
    train: TokenColumns,
    validation: TokenColumns,
    settings: FitSettings,
    run_directory: Path,
    adapter_config: dict[str, object],
    used_inputs: frozenset[str] = frozenset(),
) -> FitSummary:
    """Fit an adapter and keep the one with the best validation loss in `<run_directory>/adapters`.

    Validation runs over the whole validation set before the first update, `evals_per_epoch` times an epoch, and at the end;
    it draws no random numbers. `metrics.jsonl` is written as the fit goes. Raises UserError on a loss that is not
    finite, with the row numbers of the batch; the best adapter so far stays as it is.
    """
    model = load_model(base_model_path)
    adapters.add_lora_layers(model, settings)
    directory = run_directory / "adapters"
    directory.mkdir(parents=True, exist_ok=True)
    parameters = {
        "fine_tune_type": "lora",
        "num_layers": adapters.adapted_layers(settings, len(model.layers)),
        "lora_parameters": adapters.lora_parameters(settings),
    }
    adapters.save_config(directory, {**parameters, **adapter_config})
    adapters.save_used_inputs(directory, used_inputs)
    with (run_directory / HISTORY).open("w", encoding="utf-8") as history:
        summary = _Fit(model, train, validation, settings, directory, history).run()
        _record(history, event="end", **asdict(summary))
    return summary


class _Fit:
    """The state of one fit: model, optimiser, best loss so far, and the record that is streamed."""

    def __init__(
        self,
        model: nn.Module,
        train: TokenColumns,
        validation: TokenColumns,
        settings: FitSettings,
        directory: Path,
        history: TextIO,
    ) -> None:
        self.model, self.settings, self.directory, self.history = model, settings, directory, history
        self.train, self.validation = train, validation
        self.steps = total_steps(len(train), settings)
        self.batch_size = min(settings.batch_size, len(train))  # lines of a batch; more would only pad
        self.per_epoch = math.ceil(len(train) / settings.batch_size)
        self.optimizer = optimizers.AdamW(learning_rate=settings.learning_rate, weight_decay=settings.weight_decay)
        model.eval()  # dropout would make the two paths differ
        self.path = proven_path(model, next(self._batches()))
        self.loss_and_gradient = nn.value_and_grad(model, self.path.mean_loss)
        self.best_loss, self.best_step = math.inf, 0

    def run(self) -> FitSummary:
        """Every update from the first to the last."""
        first_loss = self._validate(0)
        shapes: set[tuple[int, ...]] = set()
        epoch_loss = epoch_supervised = 0.0
        tokens = supervised = 0
        busy = 0.0
        bar = Bar(self.steps, "fit")
        memory.reset_peak()
        self.model.train()
        for step, current in enumerate(self._batches()):
            started = time.perf_counter()
            loss = self._update(step, current)
            busy += time.perf_counter() - started
            tokens += int(self.train.lengths[list(current.indices)].sum())
            supervised += current.supervised
            shapes.add(current.inputs.shape)
            if step % self.per_epoch == 0:
                epoch_loss = epoch_supervised = 0.0
            epoch_loss += loss * current.supervised
            epoch_supervised += current.supervised
            rate = tokens / busy
            bar.advance(loss=f"{loss:.3f}", validation=f"{self.best_loss:.3f}", speed=f"{rate:.0f} tokens/s")
            _record(
                self.history,
                event="train",
                step=step + 1,
                loss=loss,
                tokens_per_second=round(rate, 1),
                learning_rate=learning_rate(step, self.steps, self.settings),
                supervised_tokens=supervised,
            )
            if self._validation_due(step + 1):
                self._validate(step + 1)
        bar.close()
        return FitSummary(
            steps=self.steps,
            best_step=self.best_step,
            best_validation_loss=self.best_loss,
            first_validation_loss=first_loss,
            train_loss=epoch_loss / epoch_supervised,
            trained_tokens=tokens,
            supervised_tokens=supervised,
            tokens_per_second=round(tokens / busy, 1),
            peak_memory_bytes=memory.peak_bytes(),
            device=str(mx.default_device().type).rpartition(".")[2],
            shapes=len(shapes),
            loss_path=self.path.reason,
        )

    def _batches(self) -> Iterator[Batch]:
        settings, ladder = self.settings, widths(self.train.lengths)
        for step in range(self.steps):
            epoch, place = divmod(step, self.per_epoch)
            if place == 0:
                order = epoch_order(self.train, settings.batch_size, settings.random_state, epoch)
            yield batch(self.train, order[place], self.batch_size, ladder)

    def _update(self, step: int, current: Batch) -> float:
        self.optimizer.learning_rate = learning_rate(step, self.steps, self.settings)
        # Seeded by the step, so that dropout does not depend on what was drawn before.
        with seeded(self.settings.random_state * 1_000_003 + step):
            loss, gradient = self.loss_and_gradient(self.model, current)
        value = loss.item()
        if not math.isfinite(value):
            rows = ", ".join(str(self.train.rows[index]) for index in current.indices)
            raise UserError(f"The loss of update {step + 1} is {value}, on rows {rows}. {self._remedy()}")
        self.optimizer.update(self.model, gradient)
        mx.eval(self.model.trainable_parameters(), self.optimizer.state)
        return value

    def _remedy(self) -> str:
        kept = f" The best adapter so far (update {self.best_step}) is in {self.directory}." if self.best_loss < math.inf else ""
        return f"Lower learning_rate or lora_scale, or look at the rows.{kept}"

    def _validation_due(self, done: int) -> bool:
        place, evaluations = done % self.per_epoch or self.per_epoch, min(self.settings.evals_per_epoch, self.per_epoch)
        due = {math.ceil(self.per_epoch * each / evaluations) for each in range(1, evaluations + 1)}
        return place in due or done == self.steps

    def _validate(self, step: int) -> float:
        loss = mean_loss(self.model, self.validation, self.batch_size, self.path)
        if not math.isfinite(loss):
            raise UserError(f"The validation loss before update {step + 1} is {loss}. {self._remedy()}")
        self.model.train()
        if loss < self.best_loss:
            self.best_loss, self.best_step = loss, step
            adapters.save_weights(self.model, self.directory)
        _record(self.history, event="validation", step=step, loss=loss, best_step=self.best_step)
        return loss


def _record(history: TextIO, **values: object) -> None:
    history.write(json.dumps(values) + "\n")
    history.flush()
