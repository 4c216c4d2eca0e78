"""The fit in numbers: how many batches and updates, and how many updates between two reports, validations, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from finetune_dataflow.engine.fit_settings import FitSettings, LoopSettings
from finetune_dataflow.engine.schedules import rate_of_update, schedule_text
from finetune_dataflow.engine.settings import all_of
from finetune_dataflow.engine.tokens import TokenColumns

EVALS_PER_EPOCH = 2  # where nothing else is said
VALIDATION_STREAM = 0x76  # sets the draw of validation rows apart from the other draws of one seed


@dataclass(frozen=True)
class FitPlan:
    """What a fit will do, counted.

    A batch is batch_size rows; an update is grad_accumulation_steps batches, fewer at an epoch's end. save_every is None
    where checkpoints go by the clock. validation_rows: the rows that the validation loss is measured on.
    """

    batches_per_epoch: int
    updates_per_epoch: int
    accumulation: int
    batches: int
    updates: int
    steps_per_report: int
    steps_per_eval: int
    save_every: int | None
    validation_rows: int

    def ends_update(self, batches: int) -> bool:
        """Whether an update is due after so many batches."""
        place = batches % self.batches_per_epoch
        return place % self.accumulation == 0 or batches == self.batches


def fit_plan(settings: FitSettings, train_rows: int, validation_rows: int) -> FitPlan:
    """The plan of a fit over so many rows.

    Raises UserError for a learning-rate schedule that is longer or shorter than the fit, and for what is wrong in
    optimizer_config.
    """
    loop = settings.loop
    per_epoch = math.ceil(train_rows / loop.batch_size)
    updates_per_epoch = math.ceil(per_epoch / loop.grad_accumulation_steps)
    epochs = 1.0 if loop.epochs is None else loop.epochs
    batches = loop.iters if loop.iters is not None else math.ceil(round(epochs * per_epoch, 9))
    whole, rest = divmod(batches, per_epoch)
    steps_per_eval = _interval(
        loop.steps_per_eval, loop.evals_per_epoch, loop.validation_interval_proportion, updates_per_epoch
    ) or math.ceil(updates_per_epoch / EVALS_PER_EPOCH)
    updates = whole * updates_per_epoch + math.ceil(rest / loop.grad_accumulation_steps)
    from finetune_dataflow.engine.optimizers import fit_optimizer  # with MLX, which a wrong option need not load

    all_of(
        lambda: _ignore(rate_of_update(settings.optimizer, updates, updates_per_epoch)),
        lambda: _ignore(fit_optimizer(settings.optimizer)),
    )
    return FitPlan(
        batches_per_epoch=per_epoch,
        updates_per_epoch=updates_per_epoch,
        accumulation=loop.grad_accumulation_steps,
        batches=batches,
        updates=updates,
        steps_per_report=_interval(loop.steps_per_report, None, loop.reporting_interval_proportion, updates_per_epoch) or 1,
        steps_per_eval=steps_per_eval,
        save_every=_interval(loop.save_every, loop.saves_per_epoch, loop.adapter_save_interval_proportion, updates_per_epoch),
        validation_rows=int(min(_validation_rows(loop, steps_per_eval), validation_rows)),
    )


def _ignore(made: object) -> None:
    """What was made to see whether it can be."""


def lines(settings: FitSettings, plan: FitPlan, parameters: Mapping[str, int]) -> list[str]:
    """The plan for people."""
    loop, optimizer = settings.loop, settings.optimizer
    rows = loop.batch_size * plan.accumulation
    saved = f"every {plan.save_every} updates" if plan.save_every else "once a minute"
    rate = schedule_text(optimizer, plan.updates, plan.updates_per_epoch)
    return [
        f"The fit: {plan.updates} updates of up to {rows} rows, {plan.batches / plan.batches_per_epoch:g} epochs.",
        f"  method: {settings.method.fine_tune_type}, {parameters['trained']:,} of {parameters['all']:,} parameters; "
        f"optimiser: {optimizer.optimizer}; learning rate: {rate}",
        f"  reported every {plan.steps_per_report} updates, validated every {plan.steps_per_eval} on {plan.validation_rows} rows,"
        f" saved {saved}",
    ]


def _interval(steps: int | None, per_epoch: int | None, proportion: float | None, updates_per_epoch: int) -> int | None:
    """Updates between two events, from whichever of its spellings is given."""
    if steps is not None:
        return steps
    if per_epoch is not None:
        return math.ceil(updates_per_epoch / per_epoch)
    return None if proportion is None else max(1, round(proportion * updates_per_epoch))


def _validation_rows(loop: LoopSettings, steps_per_eval: int) -> int | float:
    if loop.validations_per_train_item is not None:
        rows_between = steps_per_eval * loop.grad_accumulation_steps * loop.batch_size
        return max(1, round(loop.validations_per_train_item * rows_between))
    return math.inf if loop.val_batches is None or loop.val_batches == -1 else loop.val_batches * loop.batch_size


def chosen_rows(columns: TokenColumns, count: int, random_state: int) -> TokenColumns:
    """`count` rows of `columns` chosen by the seed, in their own order; all of them where there are no more."""
    if count >= len(columns):
        return columns
    generator = np.random.default_rng([random_state, VALIDATION_STREAM])
    return columns.take(sorted(generator.permutation(len(columns))[:count].tolist()))
