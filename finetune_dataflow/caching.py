"""What makes Hamilton's cache right for this dataflow: fingerprints by content, and code versions that know their helpers.

`driver.Builder().with_modules(finetune_dataflow).with_cache()` is all that is needed; importing any node does the rest:

* **Values** are fingerprinted by their content. Left alone, Hamilton takes all arrays, models and tokenizers in a container for
  the same value, and forgets the shape of an array and the column names of a table.
* **Paths** are fingerprinted by what they lead to, so a file that changed or is gone makes what was made of it stale.
* **Code**: a node's version covers the functions it uses in its module, every module of this package that these import, and
  the versions of the libraries that compute. Left alone, Hamilton looks at the node's own lines.
* Nodes that read or write the world outside the graph are `computed_anew`: they run each time, which costs little, and what
  depends on them runs only where their result is another one.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import hashlib
import json
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from hamilton.caching import fingerprinting
from hamilton.caching.adapter import HamiltonCacheAdapter
from hamilton.caching.stores.base import ResultRetrievalError
from hamilton.caching.stores.file import FileResultStore
from hamilton.function_modifiers import cache
from hamilton.graph_types import HamiltonNode

from finetune_dataflow import engine
from finetune_dataflow.engine.code_versions import code_version, covers

# For nodes that read files, or write them: their result is looked at each time, and what follows from it only if it changed.
computed_anew = cache(behavior="recompute")


def fingerprint(value: object) -> str:
    """SHA-256 (hex) of a value's type and content, as deep as it goes.

    Raises TypeError for a value that has no content to go by.
    """
    digest = hashlib.sha256()
    for part in _parts(value):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def _parts(value: object) -> Iterator[bytes]:
    """The bytes that stand for a value, each kind beginning with its name."""
    yield f"{type(value).__module__}.{type(value).__qualname__}".encode()
    if value is None or isinstance(value, bool | int | float | str | bytes):
        yield value if isinstance(value, bytes) else repr(value).encode()
    elif isinstance(value, engine.files.Location):
        yield str(value).encode()
    elif isinstance(value, Path):
        yield engine.path_contents.path_fingerprint(value).encode()
    elif hasattr(value, "fingerprint"):  # token columns and the like know how
        yield str(value.fingerprint()).encode()
    elif isinstance(value, np.ndarray):
        yield from _array(value)
    elif isinstance(value, pd.DataFrame | pd.Series | pd.Index):
        yield from _table(value)
    elif _is(value, "mlx.core", "array"):
        yield from _mlx_array(value)
    elif _is(value, "mlx.nn", "Module"):
        yield from _model(value)
    elif _is(value, "plotly.basedatatypes", "BaseFigure"):
        yield value.to_json().encode()  # type: ignore[attr-defined]  # by its name a figure
    elif _is(value, "tokenizers", "Tokenizer"):
        yield value.to_str().encode()  # type: ignore[attr-defined]  # by its name a tokenizer
    elif _is(value, "mlx_lm", "TokenizerWrapper"):
        yield from _parts(value._tokenizer)  # type: ignore[attr-defined]  # mlx-lm's wrapper
    elif _is(value, "transformers", "PreTrainedTokenizerBase"):
        yield from _tokenizer(value)
    elif isinstance(value, Mapping):
        yield from _members(sorted((fingerprint(key), fingerprint(each)) for key, each in value.items()))
    elif isinstance(value, set | frozenset):
        yield from _members(sorted(fingerprint(each) for each in value))
    elif isinstance(value, collections.abc.Sequence):
        yield from _sequence(value)
    elif dataclasses.is_dataclass(value) or getattr(value, "__dict__", None):
        yield from _members((name, fingerprint(each)) for name, each in vars(value).items())
    else:
        raise TypeError(f"{type(value).__name__} has no content to fingerprint")


def _members(values: Any) -> Iterator[bytes]:
    for each in values:
        yield repr(each).encode()


def _sequence(values: collections.abc.Sequence[Any]) -> Iterator[bytes]:
    """Plain JSON at once, which is quick; anything else a member at a time."""
    try:
        yield json.dumps(values, ensure_ascii=False, sort_keys=False, default=_refuse).encode("utf-8", "surrogatepass")
    except (TypeError, ValueError):
        yield from _members(fingerprint(each) for each in values)


def _refuse(value: object) -> None:
    raise TypeError


def _array(array: np.ndarray[Any, Any]) -> Iterator[bytes]:
    yield f"{array.dtype}{array.shape}".encode()
    if array.dtype.hasobject:
        yield from _members(fingerprint(each) for each in array.ravel().tolist())
    else:
        yield hashlib.sha256(np.ascontiguousarray(array).data).digest()


def _table(table: pd.DataFrame | pd.Series[Any] | pd.Index[Any]) -> Iterator[bytes]:
    if isinstance(table, pd.DataFrame):
        yield from _parts(table.index)
        for place, name in enumerate(table.columns):
            yield from _parts(table.iloc[:, place])
            yield repr(name).encode()
        return
    yield repr((table.name, str(table.dtype))).encode()
    if isinstance(table, pd.Series):
        yield from _parts(table.index)
    if isinstance(table, pd.RangeIndex):
        yield repr((table.start, table.stop, table.step)).encode()
    elif table.dtype == object or isinstance(table.dtype, pd.StringDtype):
        yield from _sequence(table.tolist())
    else:
        yield from _array(table.to_numpy())


def _mlx_array(array: Any) -> Iterator[bytes]:
    import mlx.core as mx

    yield f"{array.dtype}{array.shape}".encode()
    flat = mx.contiguous(array).reshape(-1)
    yield hashlib.sha256(np.array(flat.view(mx.uint8) if array.dtype != mx.bool_ else flat).tobytes()).digest()


def _model(model: Any) -> Iterator[bytes]:
    from mlx.utils import tree_flatten

    yield repr(model).encode()  # the layers and their sizes
    yield from _members((name, fingerprint(each)) for name, each in sorted(dict(tree_flatten(model.parameters())).items()))


def _tokenizer(tokenizer: Any) -> Iterator[bytes]:
    yield repr(tokenizer.init_kwargs).encode()
    yield repr((tokenizer.chat_template, tokenizer.special_tokens_map, sorted(tokenizer.get_added_vocab().items()))).encode()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    yield backend.to_str().encode() if backend is not None else repr(sorted(tokenizer.get_vocab().items())).encode()


def _is(value: object, package: str, name: str) -> bool:
    """Whether the value is of that class, told by its name, so that nothing is imported for those who do not use it."""
    return any(
        each.__name__ == name and (each.__module__ == package or each.__module__.startswith(f"{package}."))
        for each in type(value).__mro__
    )


def _data_version(value: object, *args: object, **others: object) -> str:
    """What Hamilton's cache knows a value by; unique, hence never found again, where it has no content to go by."""
    try:
        return fingerprint(value)
    except TypeError:
        return f"unknown-{uuid.uuid4()}"


def _register() -> None:
    """Teach Hamilton's cache the fingerprints, for every value: a container may hold any of them at any depth."""
    plain = (object, str, bytes, int, float, bool)
    for kind in (*plain, collections.abc.Sequence, Mapping, collections.abc.Set, np.ndarray, pd.DataFrame, pd.Series, pd.Index):
        fingerprinting.hash_value.register(kind, _data_version)


def _with_helpers(version: Callable[[HamiltonNode], str | None]) -> Callable[[HamiltonNode], str | None]:
    def versioned(node: HamiltonNode) -> str | None:
        own, functions = version(node), node.originating_functions or ()
        if own is None or not functions or not covers(functions[0]):
            return own
        return hashlib.sha256(f"{own}{code_version(functions[0])}".encode()).hexdigest()

    return versioned


def _version_with_helpers() -> None:
    """Let the version of our nodes, and of others that import from this package, cover their helpers; the rest keep theirs."""
    present = HamiltonNode.__dict__["version"]
    if not getattr(present, "knows_helpers", False):
        extended = functools.cached_property(_with_helpers(present.func))
        extended.__set_name__(HamiltonNode, "version")
        extended.knows_helpers = True  # type: ignore[attr-defined]  # a mark of our own
        HamiltonNode.version = extended


def _survive_damage() -> None:
    """Let a cached result that cannot be read, because a kill cut it short, be computed again; Hamilton would stop there."""
    get = FileResultStore.get
    if not getattr(get, "survives_damage", False):

        @functools.wraps(get)
        def whole(store: FileResultStore, data_version: str) -> Any:
            try:
                return get(store, data_version)
            except Exception as error:  # a pickle that is cut short raises almost anything
                raise ResultRetrievalError(f"{data_version} cannot be read: {error}") from error

        whole.survives_damage = True  # type: ignore[attr-defined]  # a mark of our own
        FileResultStore.get = whole


def _let_interrupts_through() -> None:
    """Let Ctrl-C in a node end the run as Ctrl-C: Hamilton would take the node for done and stumble over its missing result."""
    store = HamiltonCacheAdapter.post_node_execute
    if not getattr(store, "lets_interrupts_through", False):

        @functools.wraps(store)
        def unless_interrupted(adapter: HamiltonCacheAdapter, **others: Any) -> None:
            if not isinstance(sys.exc_info()[1], KeyboardInterrupt | SystemExit):
                store(adapter, **others)

        unless_interrupted.lets_interrupts_through = True  # type: ignore[attr-defined]  # a mark of our own
        HamiltonCacheAdapter.post_node_execute = unless_interrupted


_register()
_survive_damage()
_let_interrupts_through()
_version_with_helpers()
