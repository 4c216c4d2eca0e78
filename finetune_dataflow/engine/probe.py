"""What a fit will need, found out before it runs: updates, time, peak memory, and what to change where that is too much.

Nothing is run that is not predicted to fit. First weights, gradients and optimiser state are counted. Then updates of one
and two short made-up rows are measured, and from them a model of the memory is made: so many bytes for a padded token, for a
learned token, and for a pair of positions in a row (attention). The real batch that this model calls the heaviest is run only
where the prediction stays well below what is available; otherwise the prediction is the answer.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map

from finetune_dataflow.engine import memory
from finetune_dataflow.engine.batch_layout import part_count
from finetune_dataflow.engine.batches import CAPACITY_STEP, STEP, Batch, batch, epoch_order, in_order, in_parts, widths
from finetune_dataflow.engine.crew import Crew, crew_size, gradient_of_parts, weighted_sum
from finetune_dataflow.engine.exponentials import as_powers
from finetune_dataflow.engine.fit_plan import FitPlan, chosen_rows, fit_plan
from finetune_dataflow.engine.fit_settings import FitSettings, LoopSettings
from finetune_dataflow.engine.losses import PLAIN, LossPath
from finetune_dataflow.engine.methods import make_trainable, trainable
from finetune_dataflow.engine.models import load_model
from finetune_dataflow.engine.optimizers import clipped, fit_optimizer, global_norm
from finetune_dataflow.engine.peft_layout import weights_in_mlx_layout
from finetune_dataflow.engine.proof import Sample, proven_path
from finetune_dataflow.engine.randomness import seeded
from finetune_dataflow.engine.recompute import recomputing
from finetune_dataflow.engine.starting_weights import start_from
from finetune_dataflow.engine.tokens import IGNORED, TokenColumns
from finetune_dataflow.errors import UserError

SAFE, ADVISED = 0.8, 0.7  # of the available memory: what is predicted to need more is not tried, not advised
NARROW, GROWTH = 64, 4  # the width in tokens that made-up rows may have at first, and how much wider the next ones are
MOST_BATCHES = 100_000  # that are looked at, where they are several epochs
STATES = {"adam": 2, "adamw": 2, "muon": 1, "lion": 1}  # float32 values that the optimiser keeps for a trained one, at least
QUANTIZED = 0.5 + 2 * 4 / 64  # bytes of a weight in 4 bits, with a float32 scale and bias for 64 of them
HALF = (mx.float16, mx.bfloat16)
CGROUPS, MEMBERSHIP, MEMORY_INFO = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"), Path("/proc/meminfo")


@dataclass(frozen=True)
class Probe:
    """What a fit is expected to take.

    updates, batches: of the whole fit, as if nothing stopped it early.
    seconds: the whole fit with its validations; step_seconds: one update on the heaviest batches. None where not measured.
    Replies that a ROUGE best_metric generates are counted neither in seconds nor in bytes.
    peak_memory_bytes: what the fit will give as its own peak: the resident peak on a CPU, MLX's count elsewhere.
    proof_memory_bytes: the same for the proof of the loss before the first update, which must fit, too, and may need more.
    array_memory_bytes: the fit's peak in MLX's own count, on every device.
    rows, width: the shape of the heaviest batch, padding included.
    tried: whether any step was run; where none was, the bytes are a lower bound.
    measured: whether the heaviest batch was run; where it was not, the bytes are a prediction.
    fits: whether the fit was measured to need no more than is available. advice: what to change where it does not.
    """

    updates: int
    batches: int
    seconds: float | None
    step_seconds: float | None
    peak_memory_bytes: int
    proof_memory_bytes: int
    array_memory_bytes: int
    available_memory_bytes: int
    rows: int
    width: int
    tried: bool
    measured: bool
    fits: bool
    advice: str


def probe(
    base_model_path: Path,
    train: TokenColumns,
    validation: TokenColumns,
    settings: FitSettings,
    start: Path | None = None,
    available: int | None = None,
) -> Probe:
    """Try out the fit that `training.fit` would make of the same arguments; nothing is written, no random number used up.

    start: weights to start from. available: bytes that this process may hold; without it, `available_memory`.
    Raises UserError as the fit does: for a set without rows, settings that the model does not allow, unreadable weights.
    """
    for name, columns in (("training", train), ("validation", validation)):
        if len(columns) == 0:
            raise UserError(f"The {name} set has no rows. Expected at least one.")
    room = available_memory() if available is None else available
    probing = _Probing(base_model_path, train, validation, settings, start, room)
    try:
        with seeded(settings.random_state):  # a model's layers draw their first weights when they are made
            return probing.run()
    finally:
        mx.clear_cache()


def lines(found: Probe, settings: FitSettings) -> list[str]:
    """A probe for people."""
    duration = "" if found.seconds is None else f" in about {_duration(found.seconds)}"
    shape = f"{found.rows} x {found.width} tokens"
    about, how = "about", f"measured on the heaviest batch, {shape}"
    if not found.measured:
        how = f"predicted from small batches; the heaviest, {shape}, is not tried above {100 * SAFE:.0f} %"
    if not found.tried:
        about, how = "at least", f"weights, gradients and optimiser state; nothing is tried above {100 * SAFE:.0f} %"
    said = [
        f"Probe: {found.updates} updates{duration}; peak memory {about} {_size(found.peak_memory_bytes)} of "
        f"{_size(found.available_memory_bytes)} available ({how})."
    ]
    if found.proof_memory_bytes > found.peak_memory_bytes:
        said.append(f"  Before the first update, to prove the loss: {about} {_size(found.proof_memory_bytes)}.")
    if settings.loop.best_metric != "loss":
        said.append(f"  The replies generated for best_metric={settings.loop.best_metric} are not counted.")
    return said if found.fits else [*said, f"  {found.advice}"]


def available_memory() -> int:
    """The bytes that this process may hold without others having to give any up.

    On a CPU: what the system calls available and what the process holds already, at most a control group's limit; the whole
    memory where the system says no more. On a GPU: what MLX calls its working set or memory, less what others hold of it.
    """
    device = mx.default_device()
    if device != mx.Device(mx.cpu):
        return _device_memory({name: value for name, value in mx.device_info(device).items() if isinstance(value, int)})
    found = re.search(r"^MemAvailable:\s*(\d+) kB", MEMORY_INFO.read_text(), re.MULTILINE) if MEMORY_INFO.exists() else None
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = int(found.group(1)) * 1024 + _resident() if found else whole
    membership = MEMBERSHIP.read_text() if MEMBERSHIP.exists() else ""
    return min([free, *cgroup_limits(membership, CGROUPS)])


def cgroup_limits(membership: str, root: Path) -> list[int]:
    """The memory limits, in bytes, of the control groups in `membership` (as /proc/self/cgroup) and of those around them."""
    limits = []
    for line in membership.splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top, name = (root / "memory", "memory.limit_in_bytes") if controllers else (root, "memory.max")
        path = top / group.strip("/")
        for directory in (path, *path.parents[: len(path.parts) - len(top.parts)]):
            limit = directory / name
            text = limit.read_text().strip() if limit.is_file() else ""
            limits += [int(text)] if text.isdecimal() else []  # "max" where there is none
    return limits


def _device_memory(info: dict[str, int]) -> int:
    named = ("max_recommended_working_set_size", "memory_size", "total_memory")
    limits = [info[name] for name in named if name in info] or [mx.get_memory_limit()]
    if "free_memory" in info:
        limits.append(info["free_memory"] + mx.get_active_memory() + mx.get_cache_memory())
    return min(limits)


def _resident() -> int:
    """The bytes of this process in memory; 0 where the system does not say, and where they are not what counts."""
    if mx.default_device() != mx.Device(mx.cpu) or not memory.STATUS.exists():
        return 0
    found = re.search(r"^VmRSS:\s*(\d+) kB", memory.STATUS.read_text(), re.MULTILINE)
    return int(found.group(1)) * 1024 if found else 0


@dataclass(frozen=True)
class _Shape:
    """A batch as the memory sees it: lines, width in tokens, learned tokens."""

    rows: int
    width: int
    targets: int

    @property
    def tokens(self) -> int:
        return self.rows * self.width

    @property
    def squares(self) -> int:
        """Pairs of positions within the rows: what attention scores are made for."""
        return self.rows * self.width * self.width


@dataclass(frozen=True)
class _Work:
    """The batches of a fit: `shapes` with how often they occur and the rows of one example each.

    `validated` is how many tokens a validation pads its batches to; `validation` is the heaviest of these batches.
    """

    plan: FitPlan
    shapes: dict[_Shape, tuple[int, list[int]]]
    first: tuple[_Shape, list[int]]
    validation: _Shape
    validation_batch: Batch
    validated: int

    @classmethod
    def of(cls, train: TokenColumns, validation: TokenColumns, settings: FitSettings) -> _Work:
        plan = fit_plan(settings, len(train), len(validation))
        rows = min(settings.loop.batch_size, len(train))
        shapes: dict[_Shape, tuple[int, list[int]]] = {}
        first: tuple[_Shape, list[int]] | None = None
        for width, learned, indices in _batches(train, settings, plan):
            shape = _Shape(rows, width, _capacity(learned))
            shapes[shape] = (shapes[shape][0] + 1 if shape in shapes else 1, indices)
            first = first or (shape, indices)
        validated, heaviest = 0, None
        for current in in_order(chosen_rows(validation, plan.validation_rows, settings.random_state), rows):
            validated += current.inputs.size
            heaviest = current if heaviest is None else max(heaviest, current, key=_weight)
        assert first is not None and heaviest is not None, "a fit has a batch"
        lines, width = heaviest.inputs.shape
        return cls(plan, shapes, first, _Shape(lines, width, len(heaviest.positions)), heaviest, validated)

    @property
    def accumulates(self) -> bool:
        return self.plan.accumulation > 1

    @property
    def validations(self) -> int:
        """How often the fit validates: before the first update, at its intervals, and at the end."""
        whole, rest = divmod(self.plan.updates, self.plan.steps_per_eval)
        return 1 + whole + (rest > 0)

    def clipped(self, length: int) -> _Work:
        """The same with rows of at most `length` tokens."""

        def shortened(shape: _Shape) -> _Shape:
            width = min(shape.width, -(-(length - 1) // STEP) * STEP)
            return _Shape(shape.rows, width, min(shape.targets, _capacity(shape.rows * width)))

        shapes = {shortened(shape): example for shape, example in self.shapes.items()}
        first = (shortened(self.first[0]), self.first[1])
        return replace(self, shapes=shapes, first=first, validation=shortened(self.validation))


def _batches(train: TokenColumns, settings: FitSettings, plan: FitPlan) -> Iterator[tuple[int, int, list[int]]]:
    """The batches of the fit: width, learned tokens, rows. Of a very long fit those of the first epochs."""
    ladder = np.array(widths(train.lengths))
    left = min(plan.batches, max(MOST_BATCHES, plan.batches_per_epoch))
    for epoch in range(math.ceil(left / plan.batches_per_epoch)):
        order = epoch_order(train, settings.loop.batch_size, settings.random_state, epoch)
        order = order[: left - epoch * plan.batches_per_epoch]
        rows = np.concatenate(order)
        starts = np.cumsum([0, *map(len, order[:-1])])
        longest = np.maximum.reduceat(train.lengths[rows], starts) - 1
        learned = np.add.reduceat(train.row_supervised[rows], starts)
        yield from zip(ladder[np.searchsorted(ladder, longest)].tolist(), learned.tolist(), order, strict=True)


def _weight(current: Batch) -> tuple[int, int]:
    """What a validation's batches are compared by: the width, then the learned tokens."""
    return current.inputs.shape[1], len(current.positions)


def _capacity(learned: int) -> int:
    return max(-(-learned // CAPACITY_STEP), 1) * CAPACITY_STEP


@dataclass(frozen=True)
class _Line:
    """Bytes as a linear function of a batch's shape, never falling."""

    fixed: float = 0.0
    token: float = 0.0
    target: float = 0.0
    square: float = 0.0

    def at(self, shape: _Shape) -> float:
        return self.fixed + self.token * shape.tokens + self.target * shape.targets + self.square * shape.squares

    def towards(self, other: _Line, share: float) -> _Line:
        """A share of the way from this line to another."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return _Line(*(one + max(two - one, 0) * share for one, two in pairs))


@dataclass(frozen=True)
class _Footprint:
    """The memory of a fit by the shapes of its batches, in bytes.

    process: what the process holds besides arrays. weights: the base model's. trained: what is trained, of which `added` is
    none of the base model's. state: the optimiser's. largest: the largest gradient. flat: the most that a step of the
    smallest shape takes above what stays (its gradients and its update). threads: how many work at a batch. forward: the
    most that the loss takes above what stays, with a backward pass to follow; backward: that and the backward pass;
    validation: the loss alone. head: for a token, where the output head runs on every one.
    """

    process: int
    weights: int
    trained: int = 0
    added: int = 0
    state: int = 0
    largest: int = 0
    flat: int = 0
    threads: int = 1
    forward: _Line = _Line()
    backward: _Line = _Line()
    validation: _Line = _Line()
    head: float = 0.0

    def arrays(self, work: _Work) -> int:
        """MLX's peak from the first validation to the last update."""
        # Gradients added up stay from one batch to the next, and for a moment there are the new sum and its summand, too.
        kept = self.trained if work.accumulates else 0
        step = max(self.batch(self.at_once(self.heaviest(work))), self.flat, 2 * kept, self.validation.at(work.validation))
        return self.weights + self.added + self.state + kept + int(step)

    def proof(self, work: _Work) -> int:
        """The peak while the loss is proven on the first batch: over every position, then over gathered ones."""
        shape = work.first[0]
        plain = self.batch(replace(shape, targets=0)) + self.head * shape.tokens
        gathered = self.batch(shape) + self.trained
        return self.process + self.weights + self.added + int(max(plain, gathered, 2 * self.trained))

    def fit(self, work: _Work) -> int:
        """The peak that the fit will say of itself."""
        return self.process + self.arrays(work)

    def needed(self, work: _Work) -> int:
        """The most at any time."""
        return max(self.fit(work), self.proof(work))

    def batch(self, shape: _Shape) -> float:
        """The most that loss and gradient take above what stays.

        The gradients of many weights may outweigh the activations of a small batch, and hide them in `backward`; then
        `forward` and the first gradient tell more of a large one.
        """
        return max(self.forward.at(shape) + self.largest, self.backward.at(shape))

    def at_once(self, shape: _Shape) -> _Shape:
        """What of a batch is computed at the same time: a part by each thread."""
        parts = part_count(shape.tokens, shape.rows, self.threads, self.trained)
        share = min(self.threads, parts) / parts
        return _Shape(math.ceil(shape.rows * share), shape.width, math.ceil(shape.targets * share))

    def heaviest(self, work: _Work) -> _Shape:
        return max(work.shapes, key=lambda each: (self.batch(self.at_once(each)), each.tokens, each.targets))

    def training(self, trained: int, added: int, share: float) -> _Footprint:
        """The same with other trained parameters, in `share` of the blocks that are trained here."""
        ratio = trained / self.trained if self.trained else 1.0
        return replace(
            self,
            trained=trained,
            added=added,
            state=int(self.state * ratio),
            largest=min(self.largest, trained),
            flat=int(self.flat * ratio),
            forward=self.validation.towards(self.forward, share),
            backward=self.validation.towards(self.backward, share),
        )


@dataclass(frozen=True)
class _Weights:
    """The base model's weights in bytes, as they are loaded and in 4 bits (None where they are quantised already).

    adapter: what LoRA of rank 1 on all of them would add.
    """

    loaded: int
    in_4_bits: int | None
    adapter: int

    @classmethod
    def of(cls, base_model_path: Path) -> _Weights:
        """Counted without reading them; nothing where they cannot be read, which loading them will explain."""
        try:
            files = [cast(dict[str, mx.array], mx.load(str(path))) for path in base_model_path.glob("model*.safetensors")]
        except (RuntimeError, ValueError):
            files = []
        arrays = [each for weights in files for each in weights.values()]
        on_cpu = mx.default_device() == mx.Device(mx.cpu)
        loaded = [each.size * 4 if on_cpu and each.dtype in HALF else each.nbytes for each in arrays]
        in_4_bits = [
            int(each.size * QUANTIZED) if each.ndim > 1 else size for each, size in zip(arrays, loaded, strict=True)
        ]  # fmt: skip
        quantized = any(each.dtype == mx.uint32 for each in arrays)
        adapter = 4 * sum(each.shape[0] + each.shape[-1] for each in arrays if each.ndim > 1)
        return cls(sum(loaded), None if quantized else sum(in_4_bits), adapter)


class _Trial:
    """Updates as the fit makes them, on a model that is prepared as the fit prepares it. The learning rate is zero."""

    def __init__(self, model: nn.Module, settings: FitSettings, path: LossPath) -> None:
        self.model, self.settings, self.path = model, settings, path
        self.optimizer = fit_optimizer(settings.optimizer)
        self.accumulation = settings.loop.grad_accumulation_steps
        self.accumulated: dict[str, Any] = {}
        self.loss_and_gradient = nn.value_and_grad(model, path.mean_loss)

    def validate(self, current: Batch) -> float:
        """Seconds of a validation's batch."""
        started = time.perf_counter()
        self.model.eval()
        with as_powers(self.path.exponentials):
            float(self.path.mean_loss(self.model, current))
        self.model.train()
        return time.perf_counter() - started

    def accumulate(self, current: Batch) -> float:
        """Seconds of a batch: loss and gradient, added to those before; by as many threads as the fit has."""

        def computed(model: nn.Module, part: Batch) -> tuple[float, dict[str, Any]]:
            loss, gradient = nn.value_and_grad(model, self.path.mean_loss)(model, part)
            mx.eval(loss, gradient)
            return float(loss), gradient

        lines = len(current.inputs)
        with Crew(self.model, crew_size(self.model, lines)) as crew, as_powers(self.path.exponentials):
            started = time.perf_counter()
            parts = part_count(current.inputs.size, lines, crew.size, _bytes(self.model.trainable_parameters()))
            with seeded(self.settings.random_state):
                found = crew.in_turn(
                    lambda model, share: gradient_of_parts(share, partial(computed, model), current.supervised),
                    in_parts(current, parts) if parts > 1 else [current],
                )
            gradients = [each for _, each in found if each]
            gradient = weighted_sum([1.0] * len(gradients), gradients) if len(gradients) > 1 else gradients[0]
        if self.accumulation > 1:
            weighted = tree_map(lambda each: each * current.supervised, gradient)
            gradient = tree_map(mx.add, self.accumulated, weighted) if self.accumulated else weighted
            mx.eval(gradient)
        self.accumulated = gradient
        return time.perf_counter() - started

    def update(self) -> float:
        """Seconds of an update by the gradients added up since the last."""
        started = time.perf_counter()
        gradient = self.accumulated
        if self.accumulation > 1:
            gradient = tree_map(lambda each: each / self.accumulation, gradient)
        norm = global_norm(gradient)
        float(norm)
        self.optimizer.update(self.model, clipped(gradient, norm, self.settings.optimizer.max_grad_norm), 0.0)
        mx.eval(self.model.trainable_parameters(), self.optimizer.arrays())
        self.accumulated = {}
        return time.perf_counter() - started

    def updates(self, current: Batch) -> tuple[float, float]:
        """Two updates, each on `current` as often as needed to have gradients added up: seconds of a batch, of an update."""
        batches, updates = [], []
        for _ in range(2):
            batches += [self.accumulate(current) for _ in range(min(self.accumulation, 2))]
            updates.append(self.update())
        return min(batches), min(updates)  # the first is slowed by warming up

    def passes(self, current: Batch) -> tuple[int, int]:
        """The most bytes of arrays above what stays, in the forward pass and in both; the gradient is kept for an update."""
        stays = mx.get_active_memory()
        self.model.train()
        memory.reset_peak()
        with seeded(self.settings.random_state), as_powers(self.path.exponentials):
            loss, gradient = self.loss_and_gradient(self.model, current)
            mx.eval(loss)
            forward = mx.get_peak_memory() - stays
            mx.eval(gradient)
        self.accumulated = gradient
        return forward, mx.get_peak_memory() - stays


class _Probing:
    """One probe: the arguments of `probe`, and what is found out of them."""

    def __init__(
        self,
        base_model_path: Path,
        train: TokenColumns,
        validation: TokenColumns,
        settings: FitSettings,
        start: Path | None,
        room: int,
    ) -> None:
        self.base_model_path, self.train, self.validation = base_model_path, train, validation
        self.settings, self.start, self.room = settings, start, room
        self.work = _Work.of(train, validation, settings)
        self.weights = _Weights.of(base_model_path)

    def run(self) -> Probe:
        footprint = _Footprint(_resident(), self.weights.loaded)
        if not self._safe(footprint):
            return self._predicted(footprint, None)
        started = time.perf_counter()
        model = load_model(self.base_model_path)
        make_trainable(model, self.settings.method)
        if self.start is not None:
            start_from(model, weights_in_mlx_layout(self.start, self.base_model_path), self.settings.method)
        seconds = time.perf_counter() - started
        footprint = self._least(model, footprint.process)
        if not self._safe(footprint):
            return self._predicted(footprint, model)
        with _checkpointing(model, self.settings.loop.grad_checkpoint):
            footprint, path = self._sampled(model, footprint)
            found = self._measured(model, footprint, path, seconds) if self._safe(footprint) else None
        if found is not None and found.fits:
            return found
        predicted = self._predicted(footprint, model, tried=True)
        return predicted if found is None else replace(found, advice=predicted.advice)

    def _safe(self, footprint: _Footprint) -> bool:
        return footprint.needed(self.work) <= SAFE * self.room

    def _least(self, model: nn.Module, process: int) -> _Footprint:
        """What any step of the fit needs at least: weights, gradients, the optimiser's state."""
        parameters = list(trainable(model).values())
        trained, elements = sum(each.nbytes for each in parameters), sum(each.size for each in parameters)
        full = self.settings.method.fine_tune_type == "full"
        return _Footprint(
            process,
            weights=_bytes(model.parameters()) - (0 if full else trained),
            threads=crew_size(model, min(self.settings.loop.batch_size, len(self.train))),
            trained=trained,
            added=0 if full else trained,
            state=4 * elements * STATES.get(self.settings.optimizer.optimizer, 0),
            largest=max(each.nbytes for each in parameters),
            flat=trained,
        )

    def _sampled(self, model: nn.Module, least: _Footprint) -> tuple[_Footprint, LossPath]:
        """The footprint from small steps, and the loss's path that they took: ever wider ones, as far as they are safe."""
        model.eval()
        halves = [max(shape.width for shape in self.work.shapes) / 2]  # the longer of the rows are then as wide as real ones
        while halves[0] > NARROW:
            halves.insert(0, halves[0] / GROWTH)
        first, *wider = (math.ceil(each / STEP) * STEP for each in halves)
        smallest = self._made_up(1, first, first // 2)
        path = proven_path(model, [Sample(smallest)])
        trial = _Trial(model, self.settings, path)
        trial.passes(smallest)
        trial.update()  # the optimiser's state is there from now on
        footprint = self._sample(trial, least, first)
        for width in wider:
            longest = _Shape(1, 2 * width, 2 * width)
            if footprint.needed(replace(self.work, shapes={longest: (1, [])}, first=(longest, []))) > SAFE * self.room:
                break
            footprint = self._sample(trial, least, width)
        return footprint, path

    def _sample(self, trial: _Trial, least: _Footprint, width: int) -> _Footprint:
        """The footprint from steps on one and two rows of a width."""
        one, two = _Shape(1, width, width // 2), _Shape(2, width, width)
        longer, learned = _Shape(1, 2 * width, width), _Shape(2, width, 2 * width)
        flat = process = 0
        forward, backward, validation = {}, {}, {}
        for shape in (one, two, longer, learned):
            current = self._made_up(shape.rows, shape.width, shape.targets)
            stays = mx.get_active_memory()
            memory.reset_peak()
            trial.validate(current)
            validation[shape] = mx.get_peak_memory() - stays
            forward[shape], backward[shape] = trial.passes(current)
            process = memory.peak_bytes() - mx.get_peak_memory()
            trial.update()
            flat = flat or mx.get_peak_memory() - stays
        line = _line(forward, one, two, longer, learned)
        head = 0.0
        if trial.path.gathered:
            plain = _Trial(trial.model, self.settings, PLAIN)
            everywhere, _ = plain.passes(self._made_up(two.rows, two.width, two.targets))
            head = max(everywhere - line.at(replace(two, targets=0)), 0) / two.tokens
        return replace(
            least,
            process=max(process, 0),
            state=_bytes(trial.optimizer.arrays()),
            flat=flat,
            forward=line,
            backward=_line(backward, one, two, longer, learned),
            validation=_line(validation, one, two, longer, learned),
            head=head,
        )

    def _made_up(self, rows: int, width: int, targets: int) -> Batch:
        """A batch of any shape, of tokens that occur in the training rows; the first `targets` places are learned."""
        inputs = np.resize(self.train.input_ids[: rows * width], (rows, width)).astype(np.int32)
        labels = inputs.reshape(-1)[:targets].copy()
        learned = np.full(rows * width, IGNORED, np.int32)
        learned[:targets] = labels
        places = tuple((line, 0) for line in range(rows))
        targeted = np.arange(targets, dtype=np.int32)
        return Batch(tuple(range(rows)), inputs, learned.reshape(rows, width), targeted, labels, places)

    def _real(self, indices: list[int]) -> Batch:
        rows = min(self.settings.loop.batch_size, len(self.train))
        return batch(self.train, indices, rows, widths(self.train.lengths))

    def _measured(self, model: nn.Module, footprint: _Footprint, path: LossPath, seconds: float) -> Probe:
        """The probe from real batches: proof, validation, the narrowest and the heaviest batch, as the fit runs them."""
        work, plan = self.work, self.work.plan
        heaviest, narrowest = footprint.heaviest(work), min(work.shapes, key=lambda each: each.tokens)
        model.eval()
        memory.reset_peak()
        started = time.perf_counter()
        if path.gathered:
            path = proven_path(model, [Sample(self._real(work.first[1]))])
        seconds += time.perf_counter() - started
        proof = memory.peak_bytes()
        trial = _Trial(model, self.settings, path)
        memory.reset_peak()
        validated = min(trial.validate(work.validation_batch) for _ in range(2)) / work.validation.tokens
        narrow, _ = trial.updates(self._real(work.shapes[narrowest][1]))
        wide, update = trial.updates(self._real(work.shapes[heaviest][1]))
        fixed, token = _through((narrowest.tokens, narrow), (heaviest.tokens, wide))
        batches = sum(count * (fixed + token * shape.tokens) for shape, (count, _) in work.shapes.items())
        seconds += batches * plan.batches / sum(count for count, _ in work.shapes.values())
        seconds += plan.updates * update + work.validations * work.validated * validated
        peak = memory.peak_bytes()
        return Probe(
            updates=plan.updates,
            batches=plan.batches,
            seconds=seconds,
            step_seconds=plan.accumulation * wide + update,
            peak_memory_bytes=peak,
            proof_memory_bytes=proof,
            array_memory_bytes=mx.get_peak_memory(),
            available_memory_bytes=self.room,
            rows=heaviest.rows,
            width=heaviest.width,
            tried=True,
            measured=True,
            fits=max(peak, proof) <= self.room,
            advice="",
        )

    def _predicted(self, footprint: _Footprint, model: nn.Module | None, *, tried: bool = False) -> Probe:
        """The probe where the heaviest batch is not run."""
        heaviest = footprint.heaviest(self.work)
        return Probe(
            updates=self.work.plan.updates,
            batches=self.work.plan.batches,
            seconds=None,
            step_seconds=None,
            peak_memory_bytes=footprint.fit(self.work),
            proof_memory_bytes=footprint.proof(self.work),
            array_memory_bytes=footprint.arrays(self.work),
            available_memory_bytes=self.room,
            rows=heaviest.rows,
            width=heaviest.width,
            tried=tried,
            measured=False,
            fits=False,
            advice=self._advice(footprint, model, tried),
        )

    def _advice(self, footprint: _Footprint, model: nn.Module | None, tried: bool) -> str:
        """The first change that is predicted to fit, or how far the best of them falls short."""
        about, said = ("about", "Predicted to fit") if tried else ("at least", "What may fit")
        least: tuple[int, str] | None = None
        for changes, needed in self._candidates(footprint, model, tried):
            if needed <= ADVISED * self.room:
                return f"{said}: {changes} ({about} {_size(needed)})."
            least = min(least, (needed, changes)) if least else (needed, changes)
        even = f" With {least[1]} it would still be {about} {_size(least[0])}." if least else ""
        return f"No change of the settings is predicted to fit.{even} Use a smaller model, or a machine with more memory."

    def _candidates(self, footprint: _Footprint, model: nn.Module | None, tried: bool) -> Iterator[tuple[str, int]]:
        """Changes in words, the cheapest first, and what the fit is predicted to need with each.

        From a lower max_seq_length on, each comes on top of single rows with checkpointing, which take nothing but time.
        Where nothing was tried, what a batch takes is not known, and its changes are left out.
        """
        method, said, work = self.settings.method, cast(list[str], []), self.work
        if tried and model is not None:
            smaller = [(changes, self._work(each)) for changes, each in _smaller_batches(self.settings.loop)]
            yield from ((_text(changes), footprint.needed(each)) for changes, each in smaller)
            works = [(said, work), *smaller]
            if not self.settings.loop.grad_checkpoint:
                with recomputing(model):
                    footprint, _ = self._sampled(model, footprint)
                works = [([*changes, "grad_checkpoint=true"], each) for changes, each in works]
                yield from ((_text(changes), footprint.needed(each)) for changes, each in works)
            said, work = works[-1]
            yield from self._shorter(footprint, work, said)
        yield from self._fewer_layers(footprint, work, said, model)
        if method.fine_tune_type == "full":
            said = [*said, "fine_tune_type=lora"]
            adapter = self.weights.adapter * method.lora_rank
            footprint = footprint.training(adapter, adapter, 1.0)
            yield _text(said), footprint.needed(work)
        if self.weights.in_4_bits is not None:
            footprint = replace(footprint, weights=self.weights.in_4_bits)
            yield _text([*said, "quantize_bits=4"]), footprint.needed(work)

    def _work(self, loop: LoopSettings) -> _Work:
        return _Work.of(self.train, self.validation, replace(self.settings, loop=loop))

    def _shorter(self, footprint: _Footprint, work: _Work, said: list[str]) -> Iterator[tuple[str, int]]:
        """Lower max_seq_length, down to what the longest reply needs."""
        sets = (self.train, self.validation)
        lengths = np.concatenate([each.lengths for each in sets])
        replies = np.concatenate([each.lengths - each.prompt_lengths for each in sets])
        # A row's last token is no input: a row of 65 is padded to 64.
        for length in range((int(lengths.max()) - 2) // STEP * STEP + 1, int(replies.max()) + STEP, -STEP):
            changes = _text([*said, f"max_seq_length={length}"])
            shortened = int((lengths > length).sum())
            yield f"{changes}, which shortens {shortened} of {len(lengths)} rows", footprint.needed(work.clipped(length))

    def _fewer_layers(
        self, footprint: _Footprint, work: _Work, said: list[str], model: nn.Module | None
    ) -> Iterator[tuple[str, int]]:
        """Lower num_layers."""
        if model is None:
            return
        layers = self.settings.method.num_layers
        layers = len(model.layers) if layers == -1 else layers
        block = _bytes(model.layers[-1].trainable_parameters())
        for fewer in range(layers - 1, 0, -1):
            trained = fewer * block
            less = footprint.training(trained, trained if footprint.added else 0, fewer / layers)
            yield _text([*said, f"num_layers={fewer}"]), less.needed(work)


def _checkpointing(model: nn.Module, wanted: bool) -> AbstractContextManager[None]:
    return recomputing(model) if wanted else nullcontext()


def _smaller_batches(loop: LoopSettings) -> Iterator[tuple[list[str], LoopSettings]]:
    """Smaller batches, and more of them in an update so that it has as many rows; the largest first."""
    for size in range(loop.batch_size // 2, 0, -1):
        times, rest = divmod(loop.batch_size, size)
        if rest:
            continue
        counted = {name: getattr(loop, name) for name in ("iters", "val_batches")}  # these count batches
        values = {
            "batch_size": size,
            "grad_accumulation_steps": loop.grad_accumulation_steps * times,
            **{name: count * times for name, count in counted.items() if count is not None and count > 0},
        }
        yield [f"{name}={value}" for name, value in values.items()], replace(loop, **values)


def _line(bytes_at: dict[_Shape, int], one: _Shape, two: _Shape, longer: _Shape, learned: _Shape) -> _Line:
    """The line through four samples, in which two, longer and learned have as many tokens; nothing falls with a shape."""
    square = max(bytes_at[longer] - bytes_at[two], 0) / (longer.squares - two.squares)
    target = max(bytes_at[learned] - bytes_at[two], 0) / (learned.targets - two.targets)
    rest = _Line(0.0, 0.0, target, square)
    token = max(bytes_at[two] - bytes_at[one] - rest.at(two) + rest.at(one), 0) / (two.tokens - one.tokens)
    fixed = max(bytes_at[one] - replace(rest, token=token).at(one), 0)
    return _Line(fixed, token, target, square)


def _through(narrow: tuple[int, float], wide: tuple[int, float]) -> tuple[float, float]:
    """Seconds of a batch, and for each of its tokens, by two measurements; neither is negative."""
    tokens = wide[0] - narrow[0]
    each = (wide[1] - narrow[1]) / tokens if tokens else wide[1] / wide[0]
    each = min(max(each, 0.0), wide[1] / wide[0])
    return wide[1] - each * wide[0], each


def _bytes(tree: dict[str, Any]) -> int:
    return sum(each.nbytes for _, each in cast(list[tuple[str, mx.array]], tree_flatten(tree)))


def _text(changes: list[str]) -> str:
    return changes[0] if len(changes) == 1 else f"{', '.join(changes[:-1])} and {changes[-1]}"


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _duration(seconds: float) -> str:
    """Two units at most: 2 h 5 min, 4 min 10 s, 9 s."""
    whole = max(round(seconds), 1)
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"
