"""The outputs of frozen layers, computed once and read from a file afterwards.

Where a fit trains only a model's last layers, what the first ones give for a row is the same in every epoch. It is computed
in one forward pass over all rows and kept in a file; a batch then starts behind the frozen layers. The classes of these
layers are exchanged, for the time of a block: the last one gives the kept states, the others hand on what they are given.
MLX evaluates only what a result depends on, so that neither they nor the embedding are computed. Nothing of the model is
rewritten, and its parameters keep their names.

A store is a directory of two files: `states.bin`, the raw little-endian states of every input position, rows from short to
long, and `states.json`, which says what they are. It is made under another name and renamed when it is whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import mmap
import os
import shutil
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from io import BufferedReader
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from numpy.typing import NDArray

from finetune_dataflow.engine import exponentials
from finetune_dataflow.engine.batches import Batch, in_order
from finetune_dataflow.engine.crew import Crew, crew_size
from finetune_dataflow.engine.exponentials import as_powers
from finetune_dataflow.engine.files import flush_tree
from finetune_dataflow.engine.progress import Bar
from finetune_dataflow.engine.settings import differences
from finetune_dataflow.engine.tokens import TokenColumns

logger = logging.getLogger(__name__)

STATES, MANIFEST, FORMAT = "states.bin", "states.json", 1
SPARE_BYTES = 10**9  # stay free on the disk, for checkpoints and adapters
BLOCK = 2**20  # bytes that are summed together
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
STORED: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"), "float16": np.dtype("<u2"), "bfloat16": np.dtype("<u2"),  # NumPy has no bfloat16
}  # fmt: skip
CONTAINERS = {"model", "language_model", "transformer", "backbone"}  # modules that only hold others
AFTER_LAYERS = {"norm", "final_norm", "final_layernorm", "norm_f", "ln_f", "lm_head"}  # by their names
DROPOUTS = (nn.Dropout, nn.Dropout2d, nn.Dropout3d)

Call = Callable[..., Any]


class NoPrefix(Exception):
    """The states cannot be kept, or not be used, for this model; the message says why."""


class DamagedStatesError(Exception):
    """A directory does not hold the whole states that are asked for; the message says what is wrong."""


def frozen_layers(model: nn.Module) -> int:
    """How many of the first `model.layers` give the same in every epoch: no trainable parameter in them or before them.

    0 where a trainable parameter outside the layers is none that is known to come after them (final norm, output head), so
    that of an embedding, tied or not, counts as before; 0 where a layer is listed twice, or the model has no list of
    layers. A layer with dropout is not constant either.
    """
    try:
        layers = _layers(model)
    except NoPrefix:
        return 0
    inside = tuple(f"{name}." for name, module in model.named_modules() if any(module is layer for layer in layers))
    outside = [name for name, _ in _flat(model.trainable_parameters()) if not name.startswith(inside)]
    if not all(_comes_after(name) for name in outside):
        return 0
    changing = (number for number, layer in enumerate(layers) if _flat(layer.trainable_parameters()) or _draws(layer))
    return next(changing, len(layers))


def state_kind(model: nn.Module, layers: int) -> tuple[int, mx.Dtype]:
    """The hidden size and the type of what the first `layers` layers give; nothing is computed for it.

    Raises NoPrefix where their output is not all that later layers see, or is not one array [lines, width, hidden].
    """
    states = _outputs(model, layers, mx.zeros((1, 8), mx.int32))
    return int(states.shape[-1]), states.dtype


def bytes_needed(columns: TokenColumns, hidden: int, dtype: mx.Dtype) -> int:
    """The bytes that the states of all rows take on the disk."""
    return int(_counts(columns).sum()) * hidden * dtype.size


def fits(needed: int, layers: int, folder: Path, budget_bytes: float = math.inf) -> str | None:
    """Why `needed` bytes of states are not to be written to `folder`, or None where they may.

    They have to be within the budget and to leave 1 GB of the disk free. Raises OSError where the disk cannot be asked.
    """
    take = f"the states of the {layers} frozen layers would take {_gigabytes(needed)} GB"
    if needed > budget_bytes:
        return f"{take}; frozen_states_gb allows {_gigabytes(budget_bytes)}"
    existing = next(each for each in (folder, *folder.absolute().parents) if each.is_dir())
    free = shutil.disk_usage(existing).free
    if needed + SPARE_BYTES > free:
        return f"{take}; the disk of {folder} has {_gigabytes(free)} GB free, of which 1 GB is left for the fit"
    return None


@dataclass(frozen=True)
class PrefixStates:
    """The states of a set of rows behind the first `layers` layers, in an opened store. While it is open, `prune` keeps it.

    hidden: values of a state. dtype: the type the model computes in: float32, float16 or bfloat16.
    offsets: int64 [rows], the place of each row's first state. counts: int64 [rows], its states: one less than its tokens.
    """

    directory: Path
    layers: int
    hidden: int
    dtype: mx.Dtype
    offsets: NDArray[np.int64] = field(repr=False)
    counts: NDArray[np.int64] = field(repr=False)
    map: mmap.mmap = field(repr=False)

    def gather(self, batch: Batch) -> mx.array:
        """The states of a batch, [lines, width, hidden], each row's where the batch has its inputs; zero where padded.

        The file's pages are given back afterwards, so memory does not grow with the rows that were read.
        """
        stored = STORED[_name(self.dtype)]
        all_states = np.frombuffer(self.map, stored).reshape(-1, self.hidden)
        gathered = np.zeros((*batch.inputs.shape, self.hidden), stored)
        for index, (line, column) in zip(batch.indices, batch.placements, strict=True):
            offset, count = self.offsets[index], self.counts[index]
            gathered[line, column : column + count] = all_states[offset : offset + count]
        self.map.madvise(mmap.MADV_DONTNEED)
        states = mx.array(gathered).view(self.dtype)
        mx.eval(states)
        return states

    def given(self, batch: Batch) -> Batch:
        """The batch with its states."""
        return replace(batch, states=self.gather(batch))

    def close(self) -> None:
        """Let go of the file; `prune` may remove it then."""
        self.map.close()


def prefix_states(
    model: nn.Module,
    columns: TokenColumns,
    layers: int,
    directory: Path,
    identity: Mapping[str, Any],
    *,
    batch_size: int = 8,
    budget_bytes: float = math.inf,
) -> PrefixStates:
    """The states of all rows behind the first `layers` layers: those in `directory`, or computed now and put there.

    identity (JSON-like) names whatever the states depend on besides the rows and `layers`, which are added here: the base
    model's weights, what was put on them, the device and the versions that compute. A store that is damaged, of another
    identity or of another format is computed again, and that is said. A second process that wants the same waits for the
    first. The model computes in evaluation mode and is put back as it was.
    Raises NoPrefix where the model is not fit for it, the states take too much room or cannot be written (a full disk);
    nothing half-written stays.
    """
    if not 0 < layers <= frozen_layers(model):
        raise NoPrefix(f"{frozen_layers(model)} of the first layers are frozen, not {layers}")
    if not _counts(columns).any():
        raise NoPrefix("the rows have no tokens that anything is learned after")
    with _cannot_write(directory.parent), _only_one_process(directory):
        found = _kept(directory, columns, layers, identity)
        if found is None:
            _compute(model, columns, layers, directory, identity, batch_size, budget_bytes)
            found = opened(directory, columns, layers, identity, check=False)
    return found


def opened(
    directory: Path, columns: TokenColumns, layers: int, identity: Mapping[str, Any], *, check: bool = True
) -> PrefixStates:
    """The store that `prefix_states` has made in `directory` from the same arguments, as a read-only memory map.

    check: read the whole file and compare its checksum. Raises DamagedStatesError where it is not what is asked for.
    """
    manifest = _manifest(directory, _whole(identity, columns, layers))
    counts, dtype = _counts(columns), DTYPES[manifest["dtype"]]
    expected = int(counts.sum()) * manifest["hidden"] * dtype.size
    with (directory / STATES).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        size = os.fstat(file.fileno()).st_size
        if size != expected:
            raise DamagedStatesError(f"{STATES} has {size} bytes of {expected}")
        if check and _checksum(file) != manifest["checksum"]:
            raise DamagedStatesError(f"{STATES} is not as it was written")
        # The map keeps the file open, and with it the shared lock.
        states = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return PrefixStates(directory, layers, manifest["hidden"], dtype, _offsets(columns), counts, states)


def prune(folder: Path, budget_bytes: float, keep: Collection[Path] = ()) -> list[Path]:
    """Remove the stores of `folder` that were not used for longest until the others are within the budget; the removed ones.

    Those in `keep` and those that a process has open stay. What a killed process left half-written is always removed.
    """
    kept = {each.resolve() for each in keep}
    found = [each for each in folder.iterdir() if (each / STATES).is_file()] if folder.is_dir() else []
    sizes = {each: _size(each) for each in sorted(found, key=lambda each: (not _is_left(each), _used(each)))}
    total, removed = sum(sizes.values()), list[Path]()
    for store, size in sizes.items():
        if store.resolve() not in kept and (_is_left(store) or total > budget_bytes) and _remove_unused(store):
            logger.info("Removed the states of frozen layers in %s (%s GB).", store, _gigabytes(size))
            removed.append(store)
            total -= size
    return removed


@contextmanager
def starting_after(model: nn.Module, layers: int, states: mx.array) -> Iterator[None]:
    """Within the block the first `layers` layers are not computed: the last of them gives `states` [lines, width, hidden].

    Whatever they would do to a cache they are called with is left out. Blocks of `recomputing` may lie around or within.
    Raises NoPrefix where the model has no such layers.
    """
    chosen = _first(model, layers)
    held = [states]  # taken out at the end: a class is freed late, and its states with it

    def give(layer: nn.Module, *args: Any, **kwargs: Any) -> mx.array:
        given = _input(args, kwargs)
        if given.shape[:2] != held[0].shape[:2]:
            raise ValueError(f"the states are of lines and width {held[0].shape[:2]}, the inputs of {given.shape[:2]}")
        return held[0]

    try:
        with _exchanged(chosen, [*[_hand_on] * (layers - 1), give]):
            yield
    finally:
        held.clear()


def forget(model: nn.Module, layers: int) -> int:
    """Let go of the weights of the first `layers` layers, whose states every later batch brings; how many bytes that were.

    From then on the model computes nothing but such batches: `starting_after` never looks at these weights. What a later layer
    has in common with them stays. Raises NoPrefix where the model has no such layers.
    """
    first = _first(model, layers)
    inside = tuple(f"{name}." for name, module in model.named_modules() if any(module is layer for layer in first))
    after = [module for name, module in model.named_modules() if not f"{name}.".startswith(inside)]
    kept = {id(each) for module in after for each in _own_arrays(module).values()}
    gone: dict[int, int] = {}
    for layer in first:
        for _, module in layer.named_modules():
            for name, array in _own_arrays(module).items():
                if id(array) not in kept:
                    gone[id(array)] = array.nbytes
                    module[name] = mx.zeros((0,), array.dtype)
    return sum(gone.values())


def _own_arrays(module: nn.Module) -> dict[str, mx.array]:
    return {name: each for name, each in module.items() if isinstance(each, mx.array)}


def _hand_on(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A layer's call that does nothing."""
    return _input(args, kwargs)


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> mx.array:
    """The first argument of a layer's call: the output of the one before."""
    return cast(mx.array, next(iter((*args, *kwargs.values()))))


@contextmanager
def _exchanged(layers: Sequence[nn.Module], calls: Sequence[Call]) -> Iterator[None]:
    """Within the block each layer is of a subclass with its own call."""
    originals = [type(layer) for layer in layers]
    subclasses: dict[tuple[type[nn.Module], Call], type[nn.Module]] = {}
    try:
        for layer, original, call in zip(layers, originals, calls, strict=True):
            if (original, call) not in subclasses:
                attributes = {"__call__": call, "__module__": original.__module__}
                subclasses[original, call] = type(original.__name__, (original,), attributes)
            layer.__class__ = subclasses[original, call]
        yield
    finally:
        for layer, original in zip(layers, originals, strict=True):
            layer.__class__ = original


def _layers(model: nn.Module) -> list[nn.Module]:
    """The model's layers. NoPrefix where it has no list of them, or one is listed twice."""
    listed = getattr(model, "layers", None)
    layers = list(listed) if isinstance(listed, list | tuple) else []
    if not layers or not all(isinstance(each, nn.Module) for each in layers):
        raise NoPrefix("the model has no list of layers")
    if len({id(each) for each in layers}) < len(layers):
        raise NoPrefix("the model lists a layer twice")
    return layers


def _first(model: nn.Module, layers: int) -> list[nn.Module]:
    every = _layers(model)
    if not 0 < layers <= len(every):
        raise NoPrefix(f"the model has {len(every)} layers; it cannot start after {layers}")
    return every[:layers]


def _outputs(model: nn.Module, layers: int, inputs: mx.array) -> mx.array:
    """What the first `layers` layers give for the inputs (int32 [lines, width]), not evaluated; NoPrefix where it is not enough.

    The model is called as a whole, but later layers are never evaluated.
    """
    _first(model, layers)
    every = _layers(model)
    record: list[tuple[int, Any]] = []

    def recording(number: int, forward: Call) -> Call:
        def call(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
            output = forward(layer, *args, **kwargs)
            record.append((number, output))
            return output

        return call

    with _exchanged(every, [recording(number, type(each).__call__) for number, each in enumerate(every)]), _evaluating(model):
        model(inputs)
    if [number for number, _ in record] != [*range(len(every))]:
        raise NoPrefix("its layers are not called once each in their order")
    for number, output in record[:layers]:
        if not isinstance(output, mx.array):
            raise NoPrefix(f"its layer {number} gives a {type(output).__name__}, of which later layers may see every part")
        if output.ndim != 3 or output.shape[:2] != inputs.shape or _name(output.dtype) not in STORED:
            kind = f"{_name(output.dtype)} {[*output.shape]} for inputs {[*inputs.shape]}"
            raise NoPrefix(f"its layer {number} gives {kind}, not a state for every position")
    return cast(mx.array, record[layers - 1][1])


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _compute(
    model: nn.Module,
    columns: TokenColumns,
    layers: int,
    directory: Path,
    identity: Mapping[str, Any],
    batch_size: int,
    budget_bytes: float,
) -> None:
    """Write the states of all rows as the new `directory`; whole or not at all."""
    hidden, dtype = state_kind(model, layers)
    reason = fits(bytes_needed(columns, hidden, dtype), layers, directory.parent, budget_bytes)
    if reason is not None:
        raise NoPrefix(reason)
    logger.info("Computing the states of the first %d layers once, for all epochs.", layers)
    for left in directory.parent.iterdir():  # a killed process's
        if left.name.startswith(f".{directory.name}."):
            shutil.rmtree(left, ignore_errors=True)
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}")
    temporary.mkdir()
    try:
        _write_states(temporary / STATES, model, columns, layers, batch_size)
        with (temporary / STATES).open("rb") as file:
            checksum = _checksum(file)
        manifest = {
            "format": FORMAT, "identity": _whole(identity, columns, layers), "hidden": hidden, "dtype": _name(dtype),
            "checksum": checksum,
        }  # fmt: skip
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        flush_tree(temporary)
        temporary.rename(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_states(path: Path, model: nn.Module, columns: TokenColumns, layers: int, batch_size: int) -> None:
    """Write every row's states at its place."""
    offsets, counts = _offsets(columns), _counts(columns)
    with (
        path.open("wb") as file,
        Crew(model, crew_size(model, batch_size)) as crew,
        as_powers(exponentials.usable()),
        _evaluating(model),
    ):
        crew.train(False)
        together = max(1, min(batch_size, len(columns)) // crew.size)
        bar = Bar(math.ceil(len(columns) / together), "frozen layers")

        def computed(view: nn.Module, batch: Batch) -> tuple[Batch, NDArray[Any]]:
            return batch, _numpy(_last_output(view, layers, mx.array(batch.inputs)))

        for batch, states in crew.map(computed, in_order(columns, together)):
            for index, (line, column) in zip(batch.indices, batch.placements, strict=True):
                file.seek(int(offsets[index]) * states[0, 0].nbytes)
                file.write(states[line, column : column + counts[index]].tobytes())
            bar.advance()
    bar.close()


class _Reached(Exception):
    """The last frozen layer has given its output; nothing after it is called."""


def _last_output(model: nn.Module, layers: int, inputs: mx.array) -> mx.array:
    """As `_outputs`, of a model that is known to be fit for it; later layers are not called."""
    found: list[mx.array] = []

    def reaching(forward: Call) -> Call:
        def call(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
            found.append(forward(layer, *args, **kwargs))
            raise _Reached

        return call

    last = _layers(model)[layers - 1]
    with _exchanged([last], [reaching(type(last).__call__)]), contextlib.suppress(_Reached):
        model(inputs)
    return found[0]


def _numpy(states: mx.array) -> NDArray[Any]:
    """The evaluated states as they are stored: two-byte floats as their bits."""
    mx.eval(states)
    stored = STORED[_name(states.dtype)]
    return np.array(states.view(mx.uint16) if stored.itemsize == 2 else states).astype(stored, copy=False)


def _kept(directory: Path, columns: TokenColumns, layers: int, identity: Mapping[str, Any]) -> PrefixStates | None:
    """The store of an earlier fit, where it is whole and the same; what is left of another one is removed."""
    if not directory.exists():
        return None
    try:
        found = opened(directory, columns, layers, identity)
    except (DamagedStatesError, OSError, KeyError, ValueError, TypeError) as error:
        logger.warning("The states of frozen layers in %s cannot be used (%s); they are computed again.", directory, error)
        shutil.rmtree(directory)  # whoever has mapped it keeps its pages
        return None
    logger.info("The states of the first %d layers are read from %s.", layers, directory)
    os.utime(directory)  # the longest unused are removed first
    return found


def _manifest(directory: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedStatesError(f"{MANIFEST} cannot be read ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DamagedStatesError(f"{MANIFEST} is of another format")
    if manifest["identity"] != identity:
        raise DamagedStatesError(", ".join(differences(manifest["identity"], identity)))
    return manifest


def _checksum(file: BufferedReader) -> str:
    """CRC-32 (hex) of the sums of the file's 64-bit words, a sum a mebibyte.

    Every byte counts, so that zeroed pages and flipped bits anywhere are found. A sum costs a small part of what a hash or a
    CRC of all bytes does (half a second for 2 GB beside several), and misses only words that have changed places.
    """
    sums = []
    buffer = np.zeros(BLOCK // 8, np.dtype("<u8"))
    while read := file.readinto(buffer.view(np.uint8).data):
        buffer.view(np.uint8)[read:] = 0
        sums.append(int(buffer.sum()))
    return f"{zlib.crc32(np.array(sums, '<u8').tobytes()):08x}"


def _counts(columns: TokenColumns) -> NDArray[np.int64]:
    """The input positions of each row, int64 [rows]: its last token is none."""
    return np.maximum(columns.lengths - 1, 0)


def _offsets(columns: TokenColumns) -> NDArray[np.int64]:
    """The place of each row's first state, int64 [rows]: rows of like length, which share a batch, lie near each other."""
    counts, by_length = _counts(columns), np.argsort(columns.lengths, kind="stable")
    offsets = np.zeros(len(columns), np.int64)
    offsets[by_length] = np.cumsum(counts[by_length]) - counts[by_length]
    return offsets


@contextmanager
def _cannot_write(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise NoPrefix(f"the states of the frozen layers cannot be written to {folder}: {reason}") from error


@contextmanager
def _only_one_process(directory: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock on a store's name; the kernel frees it when the process ends, however it ends.

    Without `wait`, BlockingIOError where another holds it.
    """
    path = directory.with_name(f"{directory.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with path.open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    raise
                logger.info("Another process is computing the same states; waiting for it.")
                fcntl.flock(handle, fcntl.LOCK_EX)
            if os.fstat(handle.fileno()).st_nlink:  # else it was removed, with its store, while this one waited
                yield
                return


def _remove_unused(store: Path) -> bool:
    """Remove a store unless a process makes, opens or has opened it; whether it was removed."""
    name = store.name[1:].rpartition(".")[0] if _is_left(store) else store.name
    final = store.with_name(name)
    try:
        with _only_one_process(final, wait=False), (store / STATES).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(store)
            if not final.exists():
                final.with_name(f"{name}.lock").unlink()
    except OSError:  # it is in use, or another process was faster
        return False
    return True


def _is_left(store: Path) -> bool:
    """Whether it is a store that was not finished: being written now, or by a process that was killed."""
    return store.name.startswith(".")


def _size(store: Path) -> int:
    """Bytes of a store; 0 where it is gone."""
    try:
        return sum(each.stat().st_size for each in store.iterdir())
    except OSError:
        return 0


def _used(store: Path) -> int:
    """When a store was used last, in nanoseconds; 0 where it is gone."""
    try:
        return store.stat().st_mtime_ns
    except OSError:
        return 0


def _comes_after(name: str) -> bool:
    """Whether a parameter outside the layers is, by its name, used after the last of them only."""
    return next((part in AFTER_LAYERS for part in name.split(".") if part not in CONTAINERS), False)


def _draws(layer: nn.Module) -> bool:
    """Whether a layer has dropout, so that its output is another one in every pass."""
    return any(isinstance(module, DROPOUTS) and module._p_1 < 1 for _, module in layer.named_modules())


def _flat(tree: Any) -> list[tuple[str, mx.array]]:
    return cast(list[tuple[str, mx.array]], tree_flatten(tree))


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).rpartition(".")[2]


def _whole(identity: Mapping[str, Any], columns: TokenColumns, layers: int) -> dict[str, Any]:
    """The identity with the rows and layers, as it is read from a file: tuples are lists there."""
    whole = {**identity, "frozen_layers": layers, "columns": columns.fingerprint()}
    return cast(dict[str, Any], json.loads(json.dumps(whole)))


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.3g}"
