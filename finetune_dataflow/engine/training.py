"""The fit: token-weighted loss, every row once an epoch, exact checkpoints, the best adapter kept.

mlx-lm gives the layers and the file layout; the loop is our own (docs/training.md says which of its trainer's habits differ).
Whatever the next update depends on stands in `_State`, the trainable parameters, the optimiser's arrays and the gradients
added up so far; a checkpoint holds these four, so a fit that was killed goes on as if nothing had happened.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from finetune_dataflow.engine import adapters, memory, ranks
from finetune_dataflow.engine.arrays import is_whole
from finetune_dataflow.engine.batch_layout import batch_layout, part_count, shared_out
from finetune_dataflow.engine.batches import Batch, batch, epoch_order
from finetune_dataflow.engine.checkpoints import Checkpoint, latest_checkpoint, save_checkpoint
from finetune_dataflow.engine.crew import Crew, crew_size, gradient_of_parts, weighted_sum
from finetune_dataflow.engine.event_log import EventLog
from finetune_dataflow.engine.exponentials import as_powers
from finetune_dataflow.engine.fit_plan import FitPlan, chosen_rows, fit_plan
from finetune_dataflow.engine.fit_settings import FitSettings
from finetune_dataflow.engine.frozen_states import StateStore
from finetune_dataflow.engine.interrupts import Interrupts, Stopped, held_back
from finetune_dataflow.engine.losses import LossPath, crew_loss, summed_loss
from finetune_dataflow.engine.methods import adapter_config, make_trainable, trainable
from finetune_dataflow.engine.models import load_model
from finetune_dataflow.engine.optimizers import clipped, fit_optimizer, global_norm
from finetune_dataflow.engine.packing import packed
from finetune_dataflow.engine.peft_layout import weights_in_mlx_layout
from finetune_dataflow.engine.prefix_states import PrefixStates, forget
from finetune_dataflow.engine.progress import Bar
from finetune_dataflow.engine.proof import Sample, proven_path
from finetune_dataflow.engine.randomness import seeded
from finetune_dataflow.engine.ranks_channel import RankLost
from finetune_dataflow.engine.recompute import recomputing
from finetune_dataflow.engine.schedules import rate_of_update
from finetune_dataflow.engine.settings import differences
from finetune_dataflow.engine.starting_weights import start_from
from finetune_dataflow.engine.tokens import TokenColumns
from finetune_dataflow.errors import UserError

logger = logging.getLogger(__name__)

HISTORY, CHECKPOINTS, BEST, LAST = "metrics.jsonl", "checkpoints", "adapters", "adapters-last"
PROVEN_ROWS, PROVEN_PACKED_ROWS = (
    2,
    4,
)  # of a batch, and where rows share lines: a fit of few rows at once is to need little memory
PACKING_LOOKED_AT = 200  # batches, to see whether rows are ever to share a line
SECONDS_BETWEEN_SAVES = 60.0  # where save_every is not given
MOST_OF_TIME_SAVING = 0.05  # of the fit's time, then


@dataclass(frozen=True)
class FitSummary:
    """What a finished fit has to say of itself.

    Losses are in nats per supervised token; `train_loss` is the mean over the last epoch's updates. `best_step` counts
    updates; 0 means that no update was better than none. `best_score` is the value of `best_metric` there. `steps` are the
    updates made, `planned_steps` more where the fit stopped early. Tokens are counted over all epochs, padding never.
    `ranks` are the processes that made the last of the updates together.
    """

    steps: int
    planned_steps: int
    stopped_early: bool
    best_step: int
    best_metric: str
    best_score: float
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
    ranks: int = 1


@dataclass
class _State:
    """Everything that the rest of a fit depends on besides arrays. Sums are over supervised tokens.

    due: an update is made, and what follows it (report, validation) is not. With ranks, sums are over all of them after each
    update, and one rank's own within one.
    """

    batches: int = 0
    updates: int = 0
    window_loss: float = 0.0
    window_supervised: int = 0
    window_rows: list[int] = field(default_factory=list)
    report_loss: float = 0.0
    report_supervised: int = 0
    epoch_loss: float = 0.0
    epoch_supervised: int = 0
    trained_tokens: int = 0
    supervised_tokens: int = 0
    busy_seconds: float = 0.0
    first_validation_loss: float = math.inf
    validation_loss: float = math.inf
    best_loss: float = math.inf
    best_score: float = -math.inf
    best_step: int = 0
    validations_since_best: int = 0
    stopped_early: bool = False
    shapes: list[list[int]] = field(default_factory=list)
    path: dict[str, Any] = field(default_factory=dict)
    crew: int = 1
    loss_path: str = ""
    history_bytes: int = 0
    gradient_norm: float = math.nan
    due: bool = False


def fit(
    base_model_path: Path,
    train: TokenColumns,
    validation: TokenColumns,
    settings: FitSettings,
    run_directory: Path,
    adapter_notes: dict[str, object],
    used_inputs: frozenset[str] | None = frozenset(),
    *,
    start: Path | None = None,
    score: Callable[[nn.Module], float] | None = None,
    plan: FitPlan | None = None,
    store: StateStore | None = None,
) -> FitSummary:
    """Fit an adapter, or go on with a fit that was interrupted, and keep the best in `<run_directory>/adapters`.

    start: weights to start from. score: what the best adapter has most of; without it, the least validation loss.
    store: where the states of frozen layers are kept; without it they are computed in every epoch.
    Validation runs before the first update, every steps_per_eval updates and at the end; it draws no random numbers.
    `metrics.jsonl` is written as the fit goes. Raises UserError on a loss or gradient that is not finite, with the row
    numbers; the best adapter so far stays as it is. Raises Stopped on Ctrl-C, after the batch is finished and saved.
    Where ranks are current (`engine.ranks`), all call this, and rank 0 alone keeps anything; raises RankLost where one of them
    is lost, after the last finished update is saved.
    """
    team = ranks.current()
    if team is not None:
        sets = {"training set": train.fingerprint(), "validation set": validation.fingerprint()}
        team.agree({**settings.values, **sets})
        team.connect()
    for name, rows in (("training", train), ("validation", validation)):
        if len(rows) == 0:
            raise UserError(f"The {name} set has no rows. Expected at least one.")
    plan = plan or fit_plan(settings, len(train), len(validation))
    model = load_model(base_model_path)
    make_trainable(model, settings.method)
    if start is not None:
        start_from(model, weights_in_mlx_layout(start, base_model_path), settings.method)
    config = {**adapter_config(settings.method, len(model.layers)), **adapter_notes}
    for directory in (run_directory / BEST, run_directory / LAST):
        adapters.save_config(directory, config)
        adapters.save_used_inputs(directory, used_inputs)
    with (
        nullcontext() if team is None else team.threads(),
        EventLog(run_directory / HISTORY) as history,
        recomputing(model) if settings.loop.grad_checkpoint else nullcontext(),
        _Fit(model, train, validation, settings, plan, run_directory, history, score, store) as running,
        held_back() as interrupts,
    ):
        try:
            summary = running.run(interrupts)
        except RankLost as lost:
            raise RankLost(running.saved_after(str(lost))) from lost
        if running.first:
            adapters.save_weights(model, run_directory / LAST)
        history.write(event="end", **asdict(summary))
        if plan.save_every is None:  # nobody asked for them: they were there to go on from
            shutil.rmtree(run_directory / CHECKPOINTS, ignore_errors=True)
        if interrupts.requested:
            raise Stopped(f"The fit in {run_directory} is finished. The same command evaluates its adapter.")
    return summary


class _Fit:
    """One fit: model, optimiser and `state`, which together are what a checkpoint holds, and the log that is streamed."""

    def __init__(
        self,
        model: nn.Module,
        train: TokenColumns,
        validation: TokenColumns,
        settings: FitSettings,
        plan: FitPlan,
        directory: Path,
        history: EventLog,
        score: Callable[[nn.Module], float] | None,
        store: StateStore | None = None,
    ) -> None:
        self.model, self.settings, self.directory, self.history, self.score = model, settings, directory, history, score
        self.train, self.plan = train, plan
        self.team = ranks.current()
        self.first = self.team is None or self.team.first
        self.validation = chosen_rows(validation, self.plan.validation_rows, settings.random_state)
        self.identity = {
            **settings.values, "train_set": train.fingerprint(), "validation_set": self.validation.fingerprint()
        }  # fmt: skip
        self.rate = rate_of_update(settings.optimizer, self.plan.updates, self.plan.updates_per_epoch)
        self.optimizer = fit_optimizer(settings.optimizer)
        self.batch_size = min(settings.loop.batch_size, len(train))  # lines of a batch; more would only pad
        self.lines = self.batch_size if self.team is None else math.ceil(self.batch_size / self.team.size)
        self.state, self.accumulated = _State(), cast(dict[str, Any], {})
        self.opened: list[PrefixStates] = []
        self.trained_bytes = sum(each.nbytes for each in trainable(model).values())
        model.eval()  # dropout would make two paths of the loss differ
        self._resume(store)
        if self.team is not None:
            self._take_over(self.team)
        self.counted = (self.state.trained_tokens, self.state.supervised_tokens)
        self.kept: dict[str, Any] = {}
        self.stop_asked = False
        self._forget_frozen_layers()
        self.crew = Crew(model, self.state.crew)
        self.loss_and_gradient = {id(each): nn.value_and_grad(each, self.path.mean_loss) for each in self.crew.views}
        self.saved_at, self.save_seconds = time.monotonic(), 0.0

    def __enter__(self) -> _Fit:
        """The fit itself, with exponentials as its path wants them."""
        self.exponentials = as_powers(self.path.exponentials)
        self.exponentials.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        """End the crew's threads, and let go of files."""
        self.exponentials.__exit__(None, None, None)
        self.crew.close()
        for each in self.opened:
            each.close()

    def run(self, interrupts: Interrupts) -> FitSummary:
        """Every batch that is left, to the end of the fit."""
        state, plan, self.interrupts = self.state, self.plan, interrupts
        if self.team is not None:
            self.team.channel.rescue = self._rescue
        memory.reset_peak()
        if state.first_validation_loss == math.inf:
            state.first_validation_loss = self._validate()
        self._keep()
        if state.due:
            self._between_updates()
        bar = Bar(plan.updates, "fit", done=state.updates)
        self.crew.train(True)
        for current in self._batches() if not state.stopped_early else ():
            started = time.perf_counter()
            self._accumulate(current)
            ended = plan.ends_update(state.batches)
            if ended:
                self._update()
            state.busy_seconds += time.perf_counter() - started
            if ended:
                bar.advance(figures=self._figures())
                self._between_updates()
            if state.stopped_early:
                break
            stopping = interrupts.requested if self.team is None else self.stop_asked
            if stopping and state.batches < plan.batches:
                bar.close()
                self._stop()
        bar.close()
        return self._summary()

    def _batches(self) -> Iterator[list[Batch]]:
        """The batches that are left, each in the parts that the crew computes at the same time."""
        settings = self.settings
        order: list[list[int]] = []
        for number in range(self.state.batches, self.plan.batches):
            epoch, place = divmod(number, self.plan.batches_per_epoch)
            if place == 0 or not order:
                order = epoch_order(self.train, settings.loop.batch_size, settings.random_state, epoch)
            yield self._parts(order[place] if self.team is None else self._share(order[place], self.team))

    def _share(self, rows: list[int], team: ranks.Team) -> list[int]:
        """This rank's rows of a batch: about as many tokens as each other's has; none where there are fewer rows than ranks."""
        shares = shared_out(self.train, rows, team.size)
        return shares[team.rank] if team.rank < len(shares) else []

    def _parts(self, rows: list[int]) -> list[Batch]:
        if not rows:
            return []
        threads = self.state.crew
        parts = part_count(int(self.train.lengths[rows].sum()), len(rows), threads, self.trained_bytes)
        lines = self.lines if threads == 1 else math.ceil(len(rows) / parts)
        made = (self.layout.made(self.train, each, lines) for each in shared_out(self.train, rows, parts))
        return [each if self.train_states is None else self.train_states.given(each) for each in made]

    def _accumulate(self, current: list[Batch]) -> None:
        """Add a batch's gradient, weighted by its supervised tokens, to what the next update descends."""
        state, supervised = self.state, sum(part.supervised for part in current)
        indices = [index for part in current for index in part.indices]
        rows = [int(self.train.rows[index]) for index in indices]
        if current:
            state.window_loss += self._add_gradient(current, supervised, rows) * supervised
        if state.batches % self.plan.batches_per_epoch == 0:
            state.epoch_loss, state.epoch_supervised = 0.0, 0
        state.window_rows += rows
        state.window_supervised += supervised
        state.trained_tokens += int(self.train.lengths[indices].sum())
        state.supervised_tokens += supervised
        state.batches += 1
        for part in current:
            if [*part.inputs.shape] not in state.shapes:
                state.shapes.append([*part.inputs.shape])

    def _add_gradient(self, current: list[Batch], supervised: int, rows: list[int]) -> float:
        """Add the gradient of a batch, or of a rank's share of it; its mean loss."""
        # Seeded by the batch's number, so that dropout does not depend on what was drawn before.
        own = 0 if self.team is None else self.team.seed
        with seeded(self.settings.random_state * 1_000_003 + self.state.batches + own):
            value, gradient = self._loss_and_gradient(current)
        if not math.isfinite(value) and self.team is None:
            self._refuse("loss", value, rows)
        if self.plan.accumulation > 1 or self.team is not None:
            # In float32: a sum of many gradients in half precision loses most of them.
            weighted = tree_map(lambda each: each.astype(mx.float32) * supervised, gradient)
            gradient = tree_map(mx.add, self.accumulated, weighted) if self.accumulated else weighted
            mx.eval(gradient)
        self.accumulated = gradient
        return value

    def _loss_and_gradient(self, parts: list[Batch]) -> tuple[float, dict[str, Any]]:
        """The mean loss over the supervised tokens of all parts, and its gradient."""

        def computed(model: nn.Module, part: Batch) -> tuple[float, dict[str, Any]]:
            loss, gradient = self.loss_and_gradient[id(model)](model, part)
            mx.eval(loss, gradient)
            return loss.item(), gradient

        supervised = sum(part.supervised for part in parts)
        found = self.crew.in_turn(
            lambda model, share: gradient_of_parts(share, partial(computed, model), supervised), parts
        )  # fmt: skip
        gradients = [gradient for _, gradient in found]
        total = gradients[0] if len(gradients) == 1 else weighted_sum([1.0] * len(gradients), gradients)
        return sum(loss for loss, _ in found), total

    def _update(self) -> None:
        """One update by the gradients added up since the last."""
        state = self.state
        if self.team is not None:
            self._sum_over_ranks(self.team)
        gradient, supervised = self.accumulated, state.window_supervised
        if self.plan.accumulation > 1 or self.team is not None:
            gradient = tree_map(lambda each: each / supervised, gradient)
        norm = global_norm(gradient)
        state.gradient_norm = float(norm)
        if not math.isfinite(state.gradient_norm):
            self._refuse("gradient's norm", state.gradient_norm, state.window_rows)
        self.optimizer.update(
            self.model, clipped(gradient, norm, self.settings.optimizer.max_grad_norm), self.rate(state.updates)
        )
        mx.eval(self.model.trainable_parameters(), self.optimizer.arrays())
        self.crew.renew()
        state.updates += 1
        state.epoch_loss, state.epoch_supervised = state.epoch_loss + state.window_loss, state.epoch_supervised + supervised
        state.report_loss, state.report_supervised = state.report_loss + state.window_loss, state.report_supervised + supervised
        state.window_loss, state.window_supervised, state.window_rows, self.accumulated = 0.0, 0, [], {}
        if self.team is not None:
            state.due = True
            self._keep()

    def _sum_over_ranks(self, team: ranks.Team) -> None:
        """Make loss, counts and gradient those of all ranks; hear who wants to stop, and whose loss is not finite."""
        state = self.state
        every = team.exchange(
            "update",
            {
                "loss": state.window_loss, "supervised": state.window_supervised, "rows": state.window_rows,
                "trained": state.trained_tokens - self.counted[0], "learned": state.supervised_tokens - self.counted[1],
                "stop": self.interrupts.requested,
            },
        )  # fmt: skip
        for each in every:
            if not math.isfinite(each["loss"]):
                self._refuse("loss", each["loss"], each["rows"])
        state.window_loss, state.window_supervised = (sum(each[name] for each in every) for name in ("loss", "supervised"))
        state.window_rows = [row for each in every for row in each["rows"]]
        self.counted = (
            self.counted[0] + sum(each["trained"] for each in every), self.counted[1] + sum(each["learned"] for each in every)
        )  # fmt: skip
        state.trained_tokens, state.supervised_tokens = self.counted
        self.accumulated = team.summed(self.accumulated, trainable(self.model))
        self.stop_asked = any(each["stop"] for each in every)

    def _between_updates(self) -> None:
        """Report, validate, stop early, save: whatever is due after an update."""
        state, plan, loop = self.state, self.plan, self.settings.loop
        last = state.batches == plan.batches
        if last or state.updates % plan.steps_per_report == 0:
            self._report()
        if last or state.updates % plan.steps_per_eval == 0:
            self._validate()
            patience = loop.early_stopping_patience
            state.stopped_early = not last and patience is not None and state.validations_since_best >= patience
        if loop.clear_cache_threshold is not None and mx.get_cache_memory() > loop.clear_cache_threshold:
            mx.clear_cache()
        state.due = False
        self._keep()
        if self.first and not last and not state.stopped_early and self._save_due():
            self._save()

    def _report(self) -> None:
        state = self.state
        self.history.write(
            event="train",
            step=state.updates,
            loss=state.report_loss / state.report_supervised,
            learning_rate=self.rate(state.updates - 1),
            gradient_norm=state.gradient_norm,
            tokens_per_second=round(state.trained_tokens / state.busy_seconds, 1) if state.busy_seconds else None,
            supervised_tokens=state.supervised_tokens,
            peak_memory_bytes=memory.peak_bytes(),
        )
        state.report_loss, state.report_supervised = 0.0, 0

    def _validate(self) -> float:
        """The validation loss, and with it the choice of the best adapter."""
        state = self.state
        loss = state.validation_loss = self._validation_loss()
        if not math.isfinite(loss):
            raise UserError(f"The validation loss after update {state.updates} is {loss}. {self._remedy()}")
        if self.score is None:
            found = -loss
        else:
            with self.crew.resting():
                found = self.score(self.model) if self.first else 0.0
        if self.team is not None:
            found = self.team.announce("score", found)
        self.crew.train(True)
        if found > state.best_score:
            state.best_score, state.best_loss, state.best_step, state.validations_since_best = found, loss, state.updates, 0
            if self.first:
                adapters.save_weights(self.model, self.directory / BEST)
        else:
            state.validations_since_best += 1
        scored = {} if self.score is None else {self.settings.loop.best_metric: found}
        self.history.write(event="validation", step=state.updates, loss=loss, **scored, best_step=state.best_step)
        return loss

    def _validation_loss(self) -> float:
        rows, states = self.validation, self.validation_states
        if self.team is None:
            return crew_loss(self.crew, rows, self.batch_size, self.path, states)
        # Ranks on unlike machines round unlike; from here on all have what is validated, and kept.
        parameters = self.team.from_first("parameters", trainable(self.model))
        self.model.update(tree_unflatten(list(parameters.items())))
        self.crew.renew()
        mine = summed_loss(self.crew, rows, self.lines, self.path, states, self.team.rank, self.team.size)
        total, supervised = self.team.total("validation", mine)
        return total / supervised

    def _save_due(self) -> bool:
        if self.plan.save_every is not None:
            return self.state.updates % self.plan.save_every == 0
        return time.monotonic() - self.saved_at > max(SECONDS_BETWEEN_SAVES, self.save_seconds / MOST_OF_TIME_SAVING)

    def _save(self) -> None:
        started = time.monotonic()
        self.state.history_bytes = self.history.size()
        self._write(asdict(self.state), self.accumulated)
        self.saved_at = time.monotonic()
        self.save_seconds = self.saved_at - started

    def _write(self, state: dict[str, Any], accumulated: dict[str, Any]) -> None:
        checkpoint = Checkpoint(
            step=state["updates"],
            parameters=trainable(self.model),
            optimizer=self.optimizer.arrays(),
            accumulated=dict(cast(list[tuple[str, mx.array]], tree_flatten(accumulated))) if accumulated else {},
            state={**state, "identity": self.identity},
        )
        save_checkpoint(self.directory / CHECKPOINTS, checkpoint, self.settings.loop.keep_checkpoints)

    def _keep(self) -> None:
        """Remember the state that belongs to the arrays as they are until the next update, for when a rank is lost in between."""
        if self.team is not None and self.first:
            state = {**asdict(self.state), "history_bytes": self.history.path.stat().st_size}
            self.kept = {"state": state, "accumulated": self.accumulated}

    def saved_after(self, reason: str) -> str:
        """Save what the last finished update left, on rank 0; what there is to say after the reason why the fit ended."""
        if not self.first:
            return reason
        if not self.kept:
            return f"{reason} No update was made yet; the same command starts again."
        self.history.size()  # by now it is on the disk
        try:
            self._write(**self.kept)
        except UserError as error:
            return f"{reason} {error}"
        return (
            f"{reason} Everything up to update {self.kept['state']['updates']} of {self.plan.updates} is saved in "
            f"{self.directory / CHECKPOINTS}. The same command goes on from there, on as many ranks as there are then."
        )

    def _rescue(self, reason: str) -> None:
        """From another thread, while this one hangs in a collective: save, and say so."""
        with mx.stream(mx.new_stream(mx.cpu)):
            said = self.saved_after(reason)
        os.write(2, f"Error: {said}\n".encode())

    def _take_over(self, team: ranks.Team) -> None:
        """Go on from what rank 0 has, fresh or resumed. How a rank computes its own rows stays its own."""
        own = {name: getattr(self.state, name) for name in ("path", "crew", "loss_path", "shapes")}
        told = team.announce("state", asdict(self.state))
        if not team.first:
            own |= {"window_loss": 0.0, "window_supervised": 0, "window_rows": []}
            self.state = _State(**{**told, **own})
        self.model.update(tree_unflatten(list(team.from_first("start", trainable(self.model)).items())))
        arrays = team.from_first("optimizer", self.optimizer.arrays())
        if not team.first:
            self.optimizer.restore(self.model, arrays)

    def _resume(self, store: StateStore | None) -> None:
        """Go on from the newest checkpoint, where there is one; else find out how the loss may be computed."""
        checkpoint = latest_checkpoint(self.directory / CHECKPOINTS)
        if checkpoint is not None and not is_whole(self.directory / BEST / adapters.WEIGHTS):
            logger.warning("The best adapter in %s is gone or damaged. The fit starts again.", self.directory / BEST)
            checkpoint = None
        if checkpoint is None:
            self.history.cut(0)
            self._find_path(store)
            return
        saved = dict(checkpoint.state)
        changed = differences(saved.pop("identity", {}), json.loads(json.dumps(self.identity)))
        if changed:
            raise UserError(f"The checkpoints in {self.directory / CHECKPOINTS} are of another fit: {'; '.join(changed)}.")
        self.model.update(tree_unflatten(list(checkpoint.parameters.items())))
        self.optimizer.restore(self.model, checkpoint.optimizer)
        self.accumulated = tree_unflatten(list(checkpoint.accumulated.items())) if checkpoint.accumulated else {}
        self.state = _State(**saved)
        self._take_path(store)
        self.history.cut(self.state.history_bytes)
        self.history.write(event="resume", step=self.state.updates)
        logger.info("The fit in %s goes on after update %d of %d.", self.directory, self.state.updates, self.plan.updates)

    def _find_path(self, store: StateStore | None) -> None:
        """What is exact on this model, proven on rows of the first batches; the states of frozen layers are made for it."""
        state, whole_epoch = self.state, self.plan.batches >= self.plan.batches_per_epoch
        self.train_states = self._states(store, self.train) if whole_epoch else None
        self.layout = batch_layout(self.model, self.train, packing=True)
        state.crew = crew_size(self.model, self.batch_size)
        self.path = proven_path(self.model, self._samples(), self.train_states)
        if not self.path.prefix:
            self.train_states = None
        if not self.path.packing:
            self.layout = replace(self.layout, packed_widths=())
        self.validation_states = self._states(store, self.validation) if self.path.prefix else None
        state.path, state.loss_path = {**asdict(self.path), "reason": ""}, self.path.reason

    def _take_path(self, store: StateStore | None) -> None:
        """The path that the fit took before it was interrupted: it must not change on the way."""
        self.path = LossPath(**{**self.state.path, "reason": self.state.loss_path})
        self.layout = batch_layout(self.model, self.train, packing=self.path.packing)
        self.train_states = self._states(store, self.train) if self.path.prefix else None
        self.validation_states = self._states(store, self.validation) if self.path.prefix else None
        if self.path.prefix and self.train_states is None:
            logger.warning("The states of the frozen layers are gone: from here on the fit is equal to rounding only.")
            self.path = replace(self.path, prefix=0, packing=False)  # packing was proven with the states
            self.layout, self.validation_states = replace(self.layout, packed_widths=()), None

    def _forget_frozen_layers(self) -> None:
        """Free the weights that no batch needs: all have stored states. A score generates replies, by the whole model."""
        if self.path.prefix and self.score is None:
            freed = forget(self.model, self.path.prefix)
            memory.give_back()
            logger.debug("The weights of %d frozen layers are let go: %d bytes.", self.path.prefix, freed)

    def _states(self, store: StateStore | None, columns: TokenColumns) -> PrefixStates | None:
        found = None if store is None else store.states(self.model, columns, self.batch_size)
        if found is not None:
            self.opened.append(found)
        return found

    def _samples(self) -> list[Sample]:
        """Some rows of the first epoch's first and last batch, as the plain path takes them, and packed where that pays."""
        order = epoch_order(self.train, self.settings.loop.batch_size, self.settings.random_state, 0)
        pays = any(self.layout.shared_width(self.train, rows, self.batch_size) for rows in order[:PACKING_LOOKED_AT])
        if not pays:
            self.layout = replace(self.layout, packed_widths=())
        count = PROVEN_PACKED_ROWS if pays else PROVEN_ROWS
        return [self._sample(rows[:count], pays) for rows in (order[0], order[-1])]

    def _sample(self, rows: list[int], pack: bool) -> Sample:
        plain = batch(self.train, rows, len(rows), self.layout.ladder)
        widest = max(int(self.train.lengths[row]) for row in rows) - 1
        return Sample(plain, packed(self.train, rows, 2 * widest, lines=2) if pack else None)

    def _stop(self) -> None:
        if not self.first:
            raise Stopped(f"Stopped after update {self.state.updates} of {self.plan.updates}, with rank 0.")
        self._save()
        raise Stopped(
            f"Stopped after update {self.state.updates} of {self.plan.updates}; everything is saved in "
            f"{self.directory / CHECKPOINTS}. The same command goes on from there."
        )

    def _figures(self) -> str:
        """What the bar shows: losses, learning rate, tokens and learned tokens a second, peak memory."""
        state, seconds = self.state, max(self.state.busy_seconds, 1e-9)
        speeds = f"{state.trained_tokens / seconds:.0f} tok/s, {state.supervised_tokens / seconds:.0f} learned"
        return (
            f"loss {state.report_loss / state.report_supervised:.3f}, val {state.validation_loss:.3f}, "
            f"lr {self.rate(state.updates - 1):.1e}, {speeds}, {memory.peak_bytes() / 2**30:.1f} GiB"
        )

    def _refuse(self, what: str, value: float, rows: list[int]) -> None:
        raise UserError(
            f"The {what} of update {self.state.updates + 1} is {value}, on rows {', '.join(map(str, rows))}. {self._remedy()}"
        )

    def _remedy(self) -> str:
        kept = f" The best adapter so far (update {self.state.best_step}) is in {self.directory / BEST}."
        return f"Lower learning_rate or lora_scale, or look at the rows.{kept if self.state.best_score > -math.inf else ''}"

    def _summary(self) -> FitSummary:
        state, metric = self.state, self.settings.loop.best_metric
        return FitSummary(
            steps=state.updates,
            planned_steps=self.plan.updates,
            stopped_early=state.stopped_early,
            best_step=state.best_step,
            best_metric=metric,
            best_score=abs(state.best_score),
            best_validation_loss=state.best_loss,
            first_validation_loss=state.first_validation_loss,
            train_loss=state.epoch_loss / state.epoch_supervised,
            trained_tokens=state.trained_tokens,
            supervised_tokens=state.supervised_tokens,
            tokens_per_second=round(state.trained_tokens / state.busy_seconds, 1),
            peak_memory_bytes=memory.peak_bytes(),
            device=str(mx.default_device().type).rpartition(".")[2],
            shapes=len(state.shapes),
            loss_path=state.loss_path,
            ranks=1 if self.team is None else self.team.size,
        )
