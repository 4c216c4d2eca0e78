"""Several processes that fit one adapter together: data-parallel, on MLX's own distributed engine.

Each rank reads the same data, computes the gradient of its share of every batch, and takes the sum; so all make the same
update, the one that a single process would make. Rank 0 alone writes the run. The ranks that are current are a context's,
and a fit outside of one knows nothing of them (docs/scaling.md).
"""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from finetune_dataflow.engine import cpu_runtime
from finetune_dataflow.engine.interrupts import Stopped
from finetune_dataflow.engine.ranks_channel import Channel, RankLost
from finetune_dataflow.engine.ranks_meeting import Place, check_ring, limit_of, met, place_of
from finetune_dataflow.errors import UserError

if TYPE_CHECKING:
    import mlx.core as mx

__all__ = ["RankLost", "Team", "current", "joined"]

logger = logging.getLogger(__name__)

SEED_STRIDE = 0x9E3779B1  # between the seeds of ranks, so that each draws dropout of its own

_current: ContextVar[Team | None] = ContextVar("ranks", default=None)


class Team:
    """The ranks of this job, seen from one of them."""

    def __init__(self, place: Place, channel: Channel, limit: float, group: mx.distributed.Group | None = None) -> None:
        """The channel is open; MLX's own connections are made by `connect`, where there is no group yet."""
        self.place, self.channel, self.rank, self.size, self._limit = place, channel, place.rank, place.size, limit
        self._group = group

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which holds the run directory and decides."""
        return self.rank == 0

    def connect(self) -> None:
        """Make MLX's connections, after it is seen that they can be made.

        Raises UserError, on all ranks, with every connection that cannot be made.
        """
        from finetune_dataflow.engine import ranks_sums

        if self._group is None:
            if self.place.backend == "ring":
                check_ring(self.place, self.channel)
            self._group = ranks_sums.connected(self.place.backend, self.rank, self.size, self._limit)

    @property
    def seed(self) -> int:
        """What is added to a seed, so that each rank draws dropout of its own; 0 on rank 0."""
        return self.rank * SEED_STRIDE

    @property
    def group(self) -> mx.distributed.Group:
        """MLX's group of all ranks."""
        assert self._group is not None, "the ranks are not connected"
        return self._group

    def exchange(self, topic: str, value: Any) -> list[Any]:
        """What every rank gives, in the order of the ranks; see `Channel.exchange`."""
        return self.channel.exchange(topic, value)

    def announce(self, topic: str, value: Any = None) -> Any:
        """What rank 0 gives, on every rank; see `Channel.announce`."""
        return self.channel.announce(topic, value)

    def agree(self, values: Mapping[str, Any]) -> None:
        """Raise UserError, the same on all ranks, where one has other values than rank 0; it names them and the ranks."""
        problems = disagreements(self.exchange("values", {name: _plain(each) for name, each in values.items()}))
        if problems:
            raise UserError("The ranks must have the same data and settings, and have not:\n" + "\n".join(problems))

    def threads(self) -> AbstractContextManager[None]:
        """Within the block this rank takes its share of its machine's threads."""
        return cpu_runtime.sharing_threads(self.place.here)

    def total(self, topic: str, values: Sequence[float]) -> list[float]:
        """The sums over all ranks of some numbers, added in the order of the ranks, the same on all of them."""
        return [sum(each) for each in zip(*self.exchange(topic, list(values)), strict=True)]

    def summed(self, gradient: Mapping[str, Any], like: Mapping[str, mx.array]) -> Any:
        """The sum of all ranks' gradients in float32; see `ranks_sums.summed`."""
        from finetune_dataflow.engine import ranks_sums

        return ranks_sums.summed(gradient, like, self.group, self.channel)

    def from_first(self, topic: str, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Rank 0's arrays on every rank, by name, whatever the others have there."""
        from finetune_dataflow.engine import ranks_sums

        kinds = self.announce(topic, ranks_sums.kinds_of(arrays) if self.first else None)
        return ranks_sums.from_first(arrays, kinds, self.group, self.channel) if kinds else {}


def current() -> Team | None:
    """The ranks that this process is one of; None where it works alone."""
    return _current.get()


@contextmanager
def joined(environment: Mapping[str, str] = os.environ) -> Iterator[Team | None]:
    """The ranks that a launcher's environment speaks of, all of them there; None where it speaks of none.

    Within the block they are current, ranks other than 0 print nothing but errors, and each takes its share of its machine's
    threads. How the block ends is told to the others: a rank that fails ends them, too, with its reason. Raises UserError
    where the ranks do not find each other.
    """
    place = place_of(environment)
    if place is None:
        yield None
        return
    with _quiet(place.rank > 0):
        try:
            with _together(place, limit_of(environment)) as team:
                yield team
        except UserError as error:
            if place.rank == 0:
                raise
            raise UserError(f"{error} (rank {place.rank})") from error


@contextmanager
def _together(place: Place, limit: float) -> Iterator[Team]:
    group = None
    if place.meeting is None:
        from finetune_dataflow.engine import ranks_sums

        group = ranks_sums.connected(place.backend, place.rank, place.size, limit)
        place = replace(place, meeting=ranks_sums.meeting_by_mpi(group))
    channel = met(place, limit)
    token = _current.set(Team(place, channel, limit, group))
    try:
        yield _current.get()  # type: ignore[misc]  # it was set above
    except Stopped:  # all have stopped together
        channel.leave()
        raise
    except BaseException as error:
        channel.fail(str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}")
        raise
    else:
        channel.leave()
    finally:
        _current.reset(token)


def disagreements(every: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each value that is not the same on every rank: "learning_rate is 0.01 on rank 0, and 0.02 on rank 1."."""
    first, problems = every[0], []
    for name in sorted({name for each in every for name in each}):
        others = [(rank, each.get(name)) for rank, each in enumerate(every) if each.get(name) != first.get(name)]
        if others:
            told = ", and ".join(f"{_short(value)} on rank {rank}" for rank, value in others)
            problems.append(f"{name} is {_short(first.get(name))} on rank 0, and {told}.")
    return problems


def _plain(value: Any) -> Any:
    """A value as JSON can hold it, so that equal ones are equal after it."""
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if isinstance(value, str | int | float | bool | None) else repr(value)


def _short(value: object) -> str:
    text = "not set" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:20]}…"


class _NoTerminal(io.TextIOWrapper):
    """A stream on which no progress is drawn."""

    def isatty(self) -> bool:
        return False


@contextmanager
def _quiet(silent: bool) -> Iterator[None]:
    """Within the block no bars are drawn, and where `silent` nothing is printed but errors.

    A hang-up is not heard: a launcher that ends sends a termination after it, which a fit takes as a wish to save first.
    """
    ours, out, errors = logging.getLogger("finetune_dataflow"), sys.stdout, sys.stderr
    level = ours.level
    plain = _NoTerminal(os.fdopen(os.dup(2), "wb"), errors="backslashreplace", write_through=True)
    with open(os.devnull, "w", encoding="utf-8") as nowhere, plain:
        sys.stdout, sys.stderr = (nowhere if silent else out), plain
        ours.setLevel(logging.ERROR if silent else level)
        heard = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            yield
        finally:
            signal.signal(signal.SIGHUP, heard)
            sys.stdout, sys.stderr = out, errors
            ours.setLevel(level)
