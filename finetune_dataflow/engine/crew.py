"""Several batches at once on a CPU: a thread, a stream and a view of the model for each core.

A BLAS that splits every matrix product over its threads leaves all but one core idle in between, and waits at the end of
each product for the slowest. Here each core computes loss and gradient of its own rows, on a BLAS of one thread, and they
meet once a batch. MLX dispatches a thread's work to that thread's stream, so the cores are busy at the same time. The views
share the model's arrays; only what is exchanged for a call (classes of layers, the head) is a view's own.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import Any, Protocol, TypeVar, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from finetune_dataflow.engine import cpu_runtime

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")


class Supervised(Protocol):
    """Something with learned tokens: a batch, or a part of one."""

    @property
    def supervised(self) -> int:
        """How many tokens are learned."""


Part = TypeVar("Part", bound=Supervised)


def crew_size(model: nn.Module, most: int) -> int:
    """How many threads pay for this model: one for each thread of our BLAS, at most `most`.

    1 where MLX computes elsewhere than on a CPU by our BLAS, and where the model draws random numbers (dropout), whose order
    would depend on the threads.
    """
    report = cpu_runtime.blas_report()
    if mx.default_device() != mx.Device(mx.cpu) or report is None or not report.threads:
        return 1
    draws = any(getattr(each, "_p_1", 1.0) < 1.0 for each in model.modules() if isinstance(each, nn.Dropout))
    return 1 if draws else max(1, min(report.threads, most))


class Crew:
    """Some threads that compute with one model. With a size of 1 everything is computed where it is called.

    While a crew of more is open, the BLAS computes each product on one thread. Use it as a context manager.
    """

    def __init__(self, model: nn.Module, size: int) -> None:
        """Views of the model as it is now: what is trainable, and the classes of its modules, must not change meanwhile."""
        self.model, self.size = model, size
        if size > 1:
            mx.eval(_arrays(model, set()))  # an array is computed by the thread that made it, or not at all
        self.views = [model, *(view(model) for _ in range(size - 1))]
        self._threads = [ThreadPoolExecutor(1, f"crew-{number}") for number in range(size if size > 1 else 0)]
        self._streams: dict[int, mx.Stream] = {}
        self._blas_threads = cpu_runtime.set_blas_threads(1) if size > 1 else None

    def __enter__(self) -> Crew:
        """The crew itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """As `close`."""
        self.close()

    def close(self) -> None:
        """End the threads and give the BLAS its own back."""
        for each in self._threads:
            each.shutdown()
        if self._blas_threads is not None:
            cpu_runtime.set_blas_threads(self._blas_threads)
            self._blas_threads = None

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Within the block the BLAS has its own threads, for work that is not the crew's."""
        if self._blas_threads is not None:
            cpu_runtime.set_blas_threads(self._blas_threads)
        try:
            yield
        finally:
            if self._blas_threads is not None:
                cpu_runtime.set_blas_threads(1)

    def renew(self) -> None:
        """Give every view the trainable parameters that the model has now."""
        if self.size > 1:
            current = self.model.trainable_parameters()
            for each in self.views[1:]:
                each.update(current)

    def train(self, mode: bool) -> None:
        """Put every view in training or evaluation mode."""
        for each in self.views:
            each.train(mode)

    def each(self, work: Callable[[nn.Module, Item], Result], items: Sequence[Item]) -> list[Result]:
        """What `work` gives for each item, at most as many as there are threads, all at once. It must evaluate its arrays."""
        if self.size == 1 or len(items) == 1:
            return [work(self.model, item) for item in items]
        assert len(items) <= self.size
        futures = [
            thread.submit(self._on_its_stream, number, work, item)
            for number, (thread, item) in enumerate(zip(self._threads, items, strict=False))
        ]
        return [self._finished(future, work, item) for future, item in zip(futures, items, strict=True)]

    def in_turn(self, work: Callable[[nn.Module, Sequence[Item]], Result], items: Sequence[Item]) -> list[Result]:
        """What `work` gives for each thread's share of the items: every so-many-th, in their order."""
        return self.each(work, [items[start :: self.size] for start in range(min(self.size, len(items)))])

    def map(self, work: Callable[[nn.Module, Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """What `work` gives for each item, in their order, as many at once as there are threads."""
        remaining = iter(items)
        while together := list(islice(remaining, self.size)):
            yield from self.each(work, together)

    def _finished(self, future: Future[Result], work: Callable[[nn.Module, Item], Result], item: Item) -> Result:
        try:
            return future.result()
        except RuntimeError as error:
            if "Stream" not in str(error):
                raise
            # Something in the model is an array of this thread's that was never computed; this thread can.
            logger.debug("A thread of the crew cannot compute with this model: %s.", error)
            return work(self.model, item)

    def _on_its_stream(self, number: int, work: Callable[[nn.Module, Item], Result], item: Item) -> Result:
        if number not in self._streams:
            self._streams[number] = mx.new_stream(mx.cpu)
        with mx.stream(self._streams[number]):
            return work(self.views[number], item)


def view(model: nn.Module) -> nn.Module:
    """A model of modules of its own that share their arrays with those of `model`, frozen and trained as they are."""
    return cast(nn.Module, _view(model, {}))


def _arrays(value: Any, seen: set[int]) -> list[mx.array]:
    """Every array of a model, what is no parameter (frequencies of rotary positions) included."""
    if isinstance(value, mx.array):
        return [value]
    if id(value) in seen or not isinstance(value, dict | list | tuple):
        return []
    seen.add(id(value))
    return [array for each in (value.values() if isinstance(value, dict) else value) for array in _arrays(each, seen)]


def _view(value: Any, seen: dict[int, Any]) -> Any:
    if isinstance(value, nn.Module):
        if id(value) not in seen:
            twin = seen[id(value)] = type(value).__new__(type(value))
            vars(twin).update({name: copy.copy(each) if isinstance(each, set) else each for name, each in vars(value).items()})
            for name, each in value.items():
                dict.__setitem__(twin, name, _view(each, seen))
        return seen[id(value)]
    if isinstance(value, list | tuple):
        return type(value)(_view(each, seen) for each in value)
    if isinstance(value, dict):
        return {name: _view(each, seen) for name, each in value.items()}
    return value


def gradient_of_parts(
    parts: Sequence[Part], computed: Callable[[Part], tuple[float, dict[str, Any]]], supervised: int
) -> tuple[float, dict[str, Any]]:
    """Loss and gradient over `supervised` tokens from the means over each part's, one part after another.

    A part of padding alone has no mean: it counts as nothing, and where all parts are, the gradient is empty.
    """
    loss, total = 0.0, dict[str, Any]()
    for part in parts:
        if not part.supervised:
            continue
        found, gradient = computed(part)
        share = part.supervised / supervised
        loss += found * share
        if share == 1.0:
            return loss, gradient
        total = weighted_sum([1.0, share], [total, gradient]) if total else weighted_sum([share], [gradient])
    return loss, total


def weighted_sum(weights: Sequence[float], trees: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The sum of trees of arrays, each times its weight, evaluated."""
    total = tree_map(lambda each: each * weights[0], trees[0])
    for weight, tree in zip(weights[1:], trees[1:], strict=True):
        total = tree_map(lambda one, other, weight=weight: one + other * weight, total, tree)
    mx.eval([each for _, each in cast(list[tuple[str, mx.array]], tree_flatten(total))])
    return total
