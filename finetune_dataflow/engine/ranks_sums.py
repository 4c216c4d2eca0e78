"""Sums of arrays over ranks, by MLX's collectives: gradients, and what rank 0 hands to the others."""

from __future__ import annotations

import faulthandler
import math
import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from finetune_dataflow.engine.ranks_channel import Channel
from finetune_dataflow.errors import UserError

BUFFER = 2**26  # bytes that are summed at once: many small arrays go together, few large ones need little memory

DTYPES = {str(each).rpartition(".")[2]: each for each in (mx.float32, mx.float16, mx.bfloat16, mx.uint64, mx.uint32, mx.int32)}


def connected(backend: str, rank: int, size: int, limit: float) -> mx.distributed.Group:
    """MLX's group of all ranks. Raises UserError where MLX has no such backend here, or cannot connect them.

    MLX holds Python's lock meanwhile, so a process that waits longer than `limit` seconds ends with a traceback.
    """
    if not mx.distributed.is_available(backend):
        raise UserError(f"This MLX has no {backend} here. {_MISSING.get(backend, '')}".strip())
    faulthandler.dump_traceback_later(limit, exit=True)
    try:
        group = mx.distributed.init(strict=True, backend=backend)
    except RuntimeError as error:
        raise UserError(f"MLX's {backend} did not connect rank {rank} of {size}: {error}.") from error
    finally:
        faulthandler.cancel_dump_traceback_later()
    if (group.rank(), group.size()) != (rank, size):
        raise UserError(
            f"MLX's {backend} says rank {group.rank()} of {group.size()} where the launcher says rank {rank} of {size}."
        )
    return group


_MISSING = {
    "mpi": "It looks for Open MPI's library: install it, or name it in MLX_MPI_LIBNAME.",
    "nccl": "It comes with MLX for CUDA.",
    "jaccl": "It needs Macs joined by Thunderbolt 5, with RDMA switched on.",
}


def meeting_by_mpi(group: mx.distributed.Group) -> tuple[str, int]:
    """An address for rank 0's channel, chosen by rank 0: its host's, and a port that is free there."""
    host, port = "", 0
    if group.rank() == 0:
        host = socket.gethostname()
        with socket.socket() as taken:
            taken.bind(("", 0))
            port = taken.getsockname()[1]
    said = list(f"{host}:{port}".encode()[:255]) if group.rank() == 0 else []
    told = mx.distributed.all_sum(mx.array([*said, *[0] * (256 - len(said))], mx.int32), group=group)
    mx.eval(told)
    text = bytes(cast(list[int], told.tolist())).rstrip(b"\0").decode()
    name, _, number = text.rpartition(":")
    return name, int(number)


def summed(gradient: Mapping[str, Any], like: Mapping[str, mx.array], group: mx.distributed.Group, channel: Channel) -> Any:
    """The sum over all ranks of trees of arrays, in float32, evaluated; of a rank that has none, an empty tree is taken.

    like: what is summed, by flat name, on every rank the same. Every rank gets the same bits from MLX's ring.
    """
    mine = dict(cast(list[tuple[str, mx.array]], tree_flatten(dict(gradient)))) if gradient else None
    found: list[tuple[str, mx.array]] = []
    for names in _together({name: like[name].size * 4 for name in sorted(like)}):
        if mine is None:
            buffer = mx.zeros(sum(like[name].size for name in names))
        else:
            buffer = mx.concatenate([mine.pop(name).astype(mx.float32).reshape(-1) for name in names])
        found += _apart(_all_sum(buffer, group, channel), {name: like[name].shape for name in names})
    return tree_unflatten(found)


def from_first(
    arrays: Mapping[str, mx.array], kinds: Mapping[str, Sequence[Any]], group: mx.distributed.Group, channel: Channel
) -> dict[str, mx.array]:
    """Rank 0's arrays on every rank, by name; what others give is not looked at. kinds: their types and shapes."""
    first, found = group.rank() == 0, dict[str, mx.array]()
    for dtype in sorted({kind[0] for kind in kinds.values()}):
        shapes = {name: tuple(kind[1]) for name, kind in sorted(kinds.items()) if kind[0] == dtype}
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        for names in _together({name: size * DTYPES[dtype].size for name, size in sizes.items()}):
            if first:
                buffer = mx.concatenate([arrays[name].reshape(-1) for name in names])
            else:
                buffer = mx.zeros(sum(sizes[name] for name in names), DTYPES[dtype])
            found |= dict(_apart(_all_sum(buffer, group, channel), {name: shapes[name] for name in names}))
    return found


def kinds_of(arrays: Mapping[str, mx.array]) -> dict[str, list[Any]]:
    """The type and the shape of each array, as JSON can hold them."""
    return {name: [str(each.dtype).rpartition(".")[2], list(each.shape)] for name, each in arrays.items()}


def _all_sum(buffer: mx.array, group: mx.distributed.Group, channel: Channel) -> mx.array:
    mx.eval(buffer)
    with channel.collective():
        total = mx.distributed.all_sum(buffer, group=group)
        mx.eval(total)
    return total


def _together(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """The names in runs of at most BUFFER bytes, or of one that is larger."""
    names, filled = list[str](), 0
    for name, size in sizes.items():
        if names and filled + size > BUFFER:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += size
    if names:
        yield names


def _apart(buffer: mx.array, shapes: Mapping[str, Sequence[int]]) -> list[tuple[str, mx.array]]:
    """The arrays that lie one after another in a buffer; they share its memory."""
    found, place = [], 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        found.append((name, buffer[place : place + size].reshape(shape)))
        place += size
    mx.eval([each for _, each in found])
    return found
