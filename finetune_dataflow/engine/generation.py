"""Replies to many prompts at once, greedy or drawn with a seed.

Prompts are answered side by side, those of like length together. What all prompts begin with, such as a system prompt or
worked examples, is computed once. A row that has ended leaves the batch, and waiting prompts take the free places, so that
few steps are made for few rows: a step for one row reads the weights just as a step for thirty-two does.

The rows of a batch have caches of one width. A prompt shorter than its neighbours leaves columns of the caches unused; each
token's true position is kept beside the caches, from which the attention masks are made. So no padding is ever attended to,
and a reply is the one that its prompt gets alone, but for the rounding of the arithmetic. A reply that is drawn has a random
generator of its own, for the same reason.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import BatchGenerator, wired_limit
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p
from numpy.typing import NDArray

from finetune_dataflow.engine.chat import ChatEncoder
from finetune_dataflow.engine.models import load_model
from finetune_dataflow.engine.progress import Bar
from finetune_dataflow.engine.reply_store import Reply, ReplyStore, prompt_hash
from finetune_dataflow.engine.settings import GenerationSettings, require
from finetune_dataflow.errors import UserError

SHARED_LEAST = 16  # a beginning that all prompts share is computed once from this many tokens
PREFILL_PLACES = 2048  # the most places of one forward pass over prompts; they bound its memory
GROWTH = 64  # the caches' width is a multiple of this
DEAD_SHARE = 8  # ended rows are taken out of the batch when they are one in so many
ADMITTED_SHARE = 4  # waiting prompts are taken in when one in so many places is free

_NOT_FINITE = -1  # in place of a token whose logits are not numbers
_HIDDEN = np.iinfo(np.int32).max  # the position of a column that holds nothing of its row
_log = logging.getLogger(__name__)


def replies(
    base_model_path: Path,
    adapter_path: Path | None,
    prompts: Sequence[Sequence[int]],
    encoder: ChatEncoder,
    settings: GenerationSettings,
    store: ReplyStore | None = None,
) -> list[Reply]:
    """The reply to each prompt, in the prompts' order; the tuned model's where an adapter is given.

    store: what is taken from it is not generated; the rest is added to it, each reply as soon as it is complete. Its key is
    that of `store_key`. The model is loaded only where a reply is missing. Raises UserError as `replies_of` does.
    """
    description = "tuned replies" if adapter_path else "base replies"
    return _replies(lambda: load_model(base_model_path, adapter_path), prompts, encoder, settings, description, store)


def replies_of(
    model: nn.Module, prompts: Sequence[Sequence[int]], encoder: ChatEncoder, settings: GenerationSettings, description: str
) -> list[Reply]:
    """The reply of a loaded model to each prompt, in the prompts' order.

    Greedy ones are those of decoding one by one; where two logits are equal but for rounding, either token may come. Identical
    prompts are answered once. A drawn reply depends on the model, the settings, its prompt and on how many identical prompts
    come before it, and on nothing else but rounding; so identical prompts get different replies. Models that keep more than
    keys and values of their tokens are left to mlx-lm's batch generator.
    Raises UserError for a prompt without tokens; where replies are drawn, also for a top_k that is not below the number of
    tokens that the model knows, and for logits that are not finite.
    """
    return _replies(lambda: model, prompts, encoder, settings, description, None)


def store_key(base_model: str, adapter: str, encoder: ChatEncoder, settings: GenerationSettings) -> dict[str, object]:
    """What replies depend on besides their prompts, as `ReplyStore.opened` takes it.

    base_model, adapter: the fingerprints of their files; an empty one for no adapter.
    """
    return {
        "base_model": base_model,
        "adapter": adapter,
        "stop_ids": sorted(encoder.stop_ids),
        "decoding": settings.decoding,
        "device": str(mx.default_device()),  # it decides which type the weights have, and how sums are rounded
    }


@dataclass(frozen=True)
class _Request:
    """A reply that is asked for.

    digest: the prompt's hash. occurrence: how many identical prompts come before; 0 in greedy decoding, where they share their
    reply. places: which of the prompts it answers.
    """

    prompt: Sequence[int]
    digest: str
    occurrence: int
    places: list[int]


def _requests(prompts: Sequence[Sequence[int]], greedy: bool) -> list[_Request]:
    """The replies that the prompts ask for, each once. UserError for a prompt without tokens."""
    asked: dict[tuple[str, int], _Request] = {}
    before: Counter[str] = Counter()
    for place, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise UserError(f"Prompt {place + 1} of {len(prompts)} has no tokens. Expected at least one in every prompt.")
        digest = prompt_hash(prompt)
        occurrence = 0 if greedy else before[digest]
        before[digest] += 1
        asked.setdefault((digest, occurrence), _Request(prompt, digest, occurrence, [])).places.append(place)
    return list(asked.values())


def _replies(
    load: Callable[[], nn.Module],
    prompts: Sequence[Sequence[int]],
    encoder: ChatEncoder,
    settings: GenerationSettings,
    description: str,
    store: ReplyStore | None,
) -> list[Reply]:
    """Those that the store has, and those of the model that `load` gives, which is called where one is missing."""
    answers: dict[int, Reply] = {}
    missing = []
    for request in _requests(prompts, settings.greedy):
        known = None if store is None else store.get(request.prompt, request.occurrence)
        if known is None:
            missing.append(request)
        else:
            answers.update(dict.fromkeys(request.places, known))
    if answers:
        _log.info("%s: %d of %d replies taken from an earlier run.", description, len(answers), len(prompts))
    if missing:
        model = load()
        collected = _Replies(missing, encoder.stop_ids, settings.max_tokens, Bar(len(prompts), description, len(answers)), store)
        _generate(model, collected, settings, description)
        for request, reply in zip(missing, collected.closed(), strict=True):
            answers.update(dict.fromkeys(request.places, reply))
    return [answers[place] for place in range(len(prompts))]


def _generate(model: nn.Module, collected: _Replies, settings: GenerationSettings, description: str) -> None:
    """Complete all replies."""
    sampler = None if settings.greedy else _Sampler(settings, collected.requests)
    caches = _empty_caches(model)
    if isinstance(caches, str):
        _log.info("%s: this model's layers keep a %s; its replies come from mlx-lm's batch generator.", description, caches)
        _generate_by_mlx_lm(model, collected, settings, sampler)
    else:
        with wired_limit(model):
            _Decoder(model, caches, collected, settings.generation_batch_size, sampler).run()


class _Replies:
    """The replies so far, each added to the store, where there is one, when it is complete."""

    def __init__(
        self, requests: Sequence[_Request], stop_ids: Iterable[int], most: int, bar: Bar, store: ReplyStore | None
    ) -> None:
        self.requests, self.most = requests, most
        self.stop_ids = frozenset(stop_ids)
        self._tokens: list[list[int]] = [[] for _ in requests]
        self._ended = [False] * len(requests)
        self._bar, self._store = bar, store

    def length(self, index: int) -> int:
        """How many tokens the reply has."""
        return len(self._tokens[index])

    def left(self, index: int) -> int:
        """How many tokens the reply may still get."""
        return self.most - self.length(index)

    def add(self, index: int, token: int) -> bool:
        """Add a token, or note that it ends the reply; whether the reply is complete."""
        if token == _NOT_FINITE:
            raise UserError("The model's logits are not finite. Its weights are damaged, or too large.")
        if token in self.stop_ids:
            self._ended[index] = True
        else:
            self._tokens[index].append(token)
        complete = self._ended[index] or not self.left(index)
        if complete:
            request = self.requests[index]
            if self._store is not None:
                self._store.add(request.prompt, self._reply(index), request.occurrence)
            self._bar.advance(len(request.places))
        return complete

    def closed(self) -> list[Reply]:
        """All replies, when all are complete."""
        self._bar.close()
        return [self._reply(index) for index in range(len(self.requests))]

    def _reply(self, index: int) -> Reply:
        return Reply(tuple(self._tokens[index]), self._ended[index])


class _Sampler:
    """Draws tokens, each with a key of its own, made of random_state, the prompt, its occurrence and the token's number.

    The filters are mlx-lm's, in its order: top_p, min_p, top_k, and the temperature after them.
    """

    def __init__(self, settings: GenerationSettings, requests: Sequence[_Request]) -> None:
        self._settings = settings
        self._seeds = [f"{settings.random_state}:{each.digest}:{each.occurrence}" for each in requests]

    def draw(self, logits: mx.array, rows: Iterable[tuple[int, int]]) -> mx.array:
        """A token of each row of logits [rows, vocabulary], int32 [rows]; _NOT_FINITE where the logits are no numbers.

        rows: the request that each row belongs to, -1 for none, and how many tokens its reply has before.
        """
        scores = logits.astype(mx.float32)
        total = mx.logsumexp(scores, axis=-1, keepdims=True)
        keys = mx.array(np.stack([self._key(*row) for row in rows]))
        drawn = mx.vmap(_drawn)(self._filtered(scores - total) / self._settings.temperature, keys)
        return mx.where(mx.isfinite(total[:, 0]), drawn.astype(mx.int32), _NOT_FINITE)

    def one(self, request: int) -> Callable[[mx.array], mx.array]:
        """What draws one token of a request after another, from logits [1, vocabulary]."""
        numbers = itertools.count()
        return lambda logits: self.draw(logits, [(request, next(numbers))])

    def _key(self, request: int, number: int) -> NDArray[np.uint32]:
        """MLX's random key of a token: the first eight bytes of a SHA-256."""
        if request < 0:
            return np.zeros(2, np.uint32)
        return np.frombuffer(hashlib.sha256(f"{self._seeds[request]}:{number}".encode()).digest()[:8], "<u4").astype(np.uint32)

    def _filtered(self, scores: mx.array) -> mx.array:
        """Log-probabilities [rows, vocabulary], minus infinity where a filter removes the token."""
        chosen, known = self._settings, scores.shape[-1]
        require("top_k", chosen.top_k, chosen.top_k < known, f"a number below the {known} tokens that this model knows, or 0")
        if 0 < chosen.top_p < 1:
            scores = apply_top_p(scores, chosen.top_p)
        if chosen.min_p:
            scores = apply_min_p(scores, chosen.min_p)
        return apply_top_k(scores, chosen.top_k) if chosen.top_k else scores


def _drawn(scores: mx.array, key: mx.array) -> mx.array:
    """A token, from the logits [vocabulary] of one row."""
    return mx.random.categorical(scores, key=key)


class _Columns:
    """Which token of which row each column of a batch's caches holds; one object for the caches of all layers.

    positions: int32 [rows, columns], a token's place in its row's text, or _HIDDEN where the column holds nothing of the row.
    following: int32 [rows], the position that each row's next token will have.
    """

    def __init__(self, positions: NDArray[np.int32], following: NDArray[np.int32]) -> None:
        self.positions, self.following = positions, following
        self.offset: int | mx.array = 0
        self._queries = positions
        self._masks: dict[tuple[int | None, bool], mx.array | str | None] = {}

    @property
    def end(self) -> int:
        """The number of columns."""
        return self.positions.shape[1]

    def append(self, lengths: NDArray[np.int32], width: int) -> None:
        """Make room for the tokens that the model sees next: the first `lengths` [rows] of `width` columns are tokens."""
        places = self.following[:, None] + np.arange(width, dtype=np.int32)
        real = np.arange(width) < lengths[:, None]
        self.positions = np.concatenate([self.positions, np.where(real, places, _HIDDEN)], axis=1)
        # Some rotary embeddings know no array of offsets, which one row never needs.
        same = bool((self.following == self.following[0]).all())
        self.offset = int(self.following[0]) if same else mx.array(self.following)
        self._queries = np.minimum(places, (self.following + np.maximum(lengths - 1, 0))[:, None])
        self.following = self.following + lengths
        self._masks = {}

    def mask(self, window: int | None, as_array: bool) -> mx.array | str | None:
        """What the tokens appended last attend to: bool [rows, 1, width, columns], or mlx-lm's word where all is plain."""
        if (window, as_array) not in self._masks:
            self._masks[window, as_array] = self._mask(window, as_array)
        return self._masks[window, as_array]

    def _mask(self, window: int | None, as_array: bool) -> mx.array | str | None:
        width = self._queries.shape[1]
        plain = (window is None or self.end <= window) and bool((self.positions == np.arange(self.end)).all())
        if plain and (width == 1 or not as_array):
            return None if width == 1 else "causal"
        keys, queries = self.positions[:, None, :], self._queries[:, :, None]
        seen = keys <= queries
        if window is not None:
            seen &= keys > queries - window
        # A place that is no token sees itself: a softmax over nothing could make NaN of it.
        seen[:, np.arange(width), np.arange(self.end - width, self.end)] = True
        return mx.array(seen[:, None])

    def kept(self, rows: NDArray[np.intp], columns: NDArray[np.intp] | None) -> _Columns:
        """Some rows, and some of the columns or all."""
        positions = self.positions[rows]
        return _Columns(positions if columns is None else positions[:, columns], self.following[rows])

    def joined(self, other: _Columns) -> _Columns:
        """These rows, then the other's."""
        end = max(self.end, other.end)
        both = [np.pad(each.positions, ((0, 0), (0, end - each.end)), constant_values=int(_HIDDEN)) for each in (self, other)]
        return _Columns(np.concatenate(both), np.concatenate([self.following, other.following]))


class _Cache:
    """Keys and values of one layer, in the columns of a batch; what a model of mlx-lm asks of its cache.

    keys, values: [rows, heads, capacity, width of a head]; None before the first token. window: how many tokens back a layer
    with a sliding window looks, its own included. Nothing is evicted: such a layer's window is in its mask. grouped: whether
    the model's masks need an axis for the heads that share their keys.
    """

    def __init__(self, columns: _Columns, window: int | None, grouped: bool = False) -> None:
        self.columns, self._window, self._grouped = columns, window, grouped
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    @property
    def offset(self) -> int | mx.array:
        """The position of each row's first new token."""
        return self.columns.offset

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:  # the names that models call it by
        """What the N new tokens attend to."""
        windows = [each for each in (window_size, self._window) if each is not None]
        mask = self.columns.mask(min(windows, default=None), return_array)
        return mask[:, None] if self._grouped and isinstance(mask, mx.array) else mask

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Note the new tokens' keys and values; those of all columns."""
        end = self.columns.end
        self.keys, self.values = (_written(*each, end) for each in ((self.keys, keys), (self.values, values)))
        return self.keys[..., :end, :], self.values[..., :end, :]

    def changed(self, columns: _Columns, change: Callable[[mx.array], mx.array]) -> _Cache:
        """The cache of other columns, its arrays those that `change` gives."""
        made = _Cache(columns, self._window, self._grouped)
        if self.keys is not None and self.values is not None:
            made.keys, made.values = change(self.keys), change(self.values)
        return made

    def joined(self, other: _Cache, columns: _Columns, rows: tuple[int, int]) -> _Cache:
        """These rows, then the other's; so many of each."""
        made = _Cache(columns, self._window, self._grouped)
        made.keys, made.values = (_stacked(*each, rows) for each in ((self.keys, other.keys), (self.values, other.values)))
        return made


def _written(kept: mx.array | None, new: mx.array, end: int) -> mx.array:
    """`new` [rows, heads, width, size] in the columns up to `end`, in an array that is widened where it has to be."""
    there = 0 if kept is None else kept.shape[2]
    if there < end:
        rows, heads, _, size = new.shape
        room = mx.zeros((rows, heads, -(-end // GROWTH) * GROWTH - there, size), new.dtype)
        kept = room if kept is None else mx.concatenate([kept, room], axis=2)
    assert kept is not None
    kept[..., end - new.shape[2] : end, :] = new
    return kept


def _stacked(first: mx.array | None, second: mx.array | None, rows: tuple[int, int]) -> mx.array | None:
    """The rows of both, as wide as the wider one."""
    like = second if first is None else first
    if like is None:
        return None
    capacity = max(each.shape[2] for each in (first, second) if each is not None)
    parts = []
    for each, count in zip((first, second), rows, strict=True):
        part = mx.zeros((count, like.shape[1], 0, like.shape[3]), like.dtype) if each is None else each
        parts.append(mx.pad(part, [(0, 0), (0, 0), (0, capacity - part.shape[2]), (0, 0)]))
    return mx.concatenate(parts)


@dataclass(frozen=True)
class _Batch:
    """Prompts that are being answered.

    columns, caches: what the model knows of them. inputs: int32 [rows], the token that each row's next step begins with.
    indices: the rows' prompts; -1 for a row that has ended. unread: whether the row's input is a token of its reply that
    nobody has looked at yet, not the prompt's last one.
    """

    columns: _Columns
    caches: list[_Cache]
    inputs: mx.array
    indices: NDArray[np.intp]
    unread: NDArray[np.bool_]

    @property
    def live(self) -> int:
        """The rows that have not ended."""
        return int((self.indices >= 0).sum())

    def compact(self) -> _Batch:
        """Without the rows that have ended, and without unused columns where these are many."""
        rows = np.flatnonzero(self.indices >= 0)
        used = np.flatnonzero((self.columns.positions[rows] != _HIDDEN).any(axis=0))
        chosen = used if 4 * len(used) <= 3 * self.columns.end else None
        columns, taken = self.columns.kept(rows, chosen), mx.array(rows)

        def change(array: mx.array) -> mx.array:
            fewer = array[taken]
            return fewer if chosen is None else fewer[:, :, mx.array(chosen)]

        caches = [cache.changed(columns, change) for cache in self.caches]
        return _Batch(columns, caches, self.inputs[taken], self.indices[rows], self.unread[rows])

    def joined(self, other: _Batch) -> _Batch:
        """These rows, then the other's."""
        columns, rows = self.columns.joined(other.columns), (len(self.indices), len(other.indices))
        caches = [mine.joined(its, columns, rows) for mine, its in zip(self.caches, other.caches, strict=True)]
        return _Batch(
            columns,
            caches,
            mx.concatenate([self.inputs, other.inputs]),
            np.concatenate([self.indices, other.indices]),
            np.concatenate([self.unread, other.unread]),
        )


class _Decoder:
    """Answers prompts in one batch that shrinks and is filled up again."""

    def __init__(
        self, model: nn.Module, caches: list[_Cache], replies: _Replies, batch_size: int, sampler: _Sampler | None
    ) -> None:
        self._model, self._replies, self._size, self._sampler = model, replies, batch_size, sampler
        self._prompts = prompts = [request.prompt for request in replies.requests]
        # The longest first: what does not fit into memory fails at the start.
        self._waiting = deque(sorted(range(len(prompts)), key=lambda index: -len(prompts[index])))
        self._columns, self._caches = caches[0].columns, caches
        self._shared = shared_beginning(prompts)

    def run(self) -> None:
        """Answer all prompts."""
        if self._shared:
            beginning = np.array([self._prompts[0][: self._shared]], np.int32)
            self._prefill(self._columns, self._caches, beginning, np.array([self._shared], np.int32))
        batch: _Batch | None = None
        while self._waiting or batch is not None:
            batch = self._admitted(batch)
            batch = self._stepped(batch)

    def _admitted(self, batch: _Batch | None) -> _Batch:
        """The batch with waiting prompts in its free places, where it pays to stop for them."""
        free = self._size - (0 if batch is None else batch.live)
        if self._waiting and free >= min(len(self._waiting), math.ceil(self._size / ADMITTED_SHARE)):
            if batch is not None and batch.live < len(batch.indices):
                batch = batch.compact()
            for indices in self._groups(free):
                started = self._started(indices)
                batch = started if batch is None else batch.joined(started)
            mx.clear_cache()
        assert batch is not None  # all places are free where there is none
        return batch

    def _groups(self, free: int) -> list[list[int]]:
        """The next waiting prompts, `free` of them at most, in groups of so many as one forward pass has room for."""
        groups: list[list[int]] = []
        for index in [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]:
            longest = len(self._prompts[groups[-1][0]]) - self._shared if groups else 0
            if not groups or (len(groups[-1]) + 1) * longest > PREFILL_PLACES:
                groups.append([])
            groups[-1].append(index)
        return groups

    def _started(self, indices: Sequence[int]) -> _Batch:
        """A batch of these prompts, all of whose tokens but the last are in its caches."""
        rows = np.array(indices)
        columns = self._columns.kept(np.zeros(len(rows), np.intp), None)
        caches = [cache.changed(columns, lambda array: mx.repeat(array, len(rows), axis=0)) for cache in self._caches]
        texts = [self._prompts[index][self._shared : -1] for index in indices]
        lengths = np.array([len(text) for text in texts], np.int32)
        tokens = np.zeros((len(rows), int(lengths.max())), np.int32)
        for line, text in zip(tokens, texts, strict=True):
            line[: len(text)] = text
        self._prefill(columns, caches, tokens, lengths)
        last = mx.array([int(self._prompts[index][-1]) for index in indices], mx.int32)
        return _Batch(columns, caches, last, rows, np.zeros(len(rows), np.bool_))

    def _prefill(
        self, columns: _Columns, caches: Sequence[_Cache], tokens: NDArray[np.int32], lengths: NDArray[np.int32]
    ) -> None:
        """Fill the caches from tokens [rows, width], the first `lengths` [rows] of each line. No logits are computed."""
        step = max(PREFILL_PLACES // len(tokens), 1)
        for start in range(0, tokens.shape[1], step):
            piece = tokens[:, start : start + step]
            width = piece.shape[1]
            columns.append(np.clip(lengths - start, 0, width).astype(np.int32), width)
            self._model(mx.array(piece), cache=caches)
            mx.eval([(cache.keys, cache.values) for cache in caches])

    def _stepped(self, batch: _Batch) -> _Batch | None:
        """The batch one token further, and the tokens read that this step began with; None when all rows have ended."""
        live = batch.indices >= 0
        read = [(int(row), int(batch.indices[row])) for row in np.flatnonzero(live & batch.unread)]
        following = batch.inputs
        # Unless every row is about to get the last token that it may have.
        if len(read) < batch.live or any(self._replies.left(index) > 1 for _, index in read):
            batch.columns.append(live.astype(np.int32), 1)
            logits = self._model(batch.inputs[:, None], cache=batch.caches)
            following = self._chosen(logits[:, -1], batch)
            # The step runs while the tokens before it are looked at.
            mx.async_eval(following)
        indices = batch.indices.copy()
        if read:
            tokens = np.array(batch.inputs).tolist()
            for row, index in read:
                if self._replies.add(index, tokens[row]):
                    indices[row] = -1
        after = _Batch(batch.columns, batch.caches, following, indices, live)
        if not after.live:
            return None
        ended = len(indices) - after.live
        return after.compact() if ended * DEAD_SHARE >= len(indices) and ended else after

    def _chosen(self, logits: mx.array, batch: _Batch) -> mx.array:
        """The tokens that follow the batch's inputs, int32 [rows], from logits [rows, vocabulary]."""
        if self._sampler is None:
            return mx.argmax(logits, axis=-1).astype(mx.int32)
        return self._sampler.draw(logits, self._places(batch))

    def _places(self, batch: _Batch) -> Iterator[tuple[int, int]]:
        """Each row's request, and how many tokens its reply has with the one that is unread."""
        for index, unread in zip(batch.indices.tolist(), batch.unread.tolist(), strict=True):
            yield index, self._replies.length(index) + unread if index >= 0 else 0


def shared_beginning(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with, where it pays to compute them once; every prompt has one more at least."""
    if len(prompts) < 2:
        return 0
    first, shared = prompts[0], min(len(prompt) for prompt in prompts) - 1
    for prompt in prompts[1:]:
        shared = next((place for place in range(shared) if prompt[place] != first[place]), shared)
    return shared if shared >= SHARED_LEAST else 0


def _empty_caches(model: nn.Module) -> list[_Cache] | str:
    """Caches of one row without tokens for the model, or the name of a kind of cache that ours do not stand in for."""
    columns = _Columns(np.zeros((1, 0), np.int32), np.zeros(1, np.int32))
    # The one model of mlx-lm that splits the heads into groups before it applies its mask.
    grouped = getattr(model, "model_type", "") == "gemma2" and any(getattr(each, "repeats", 1) > 1 for each in model.modules())
    caches = []
    for kept in make_prompt_cache(model):
        if type(kept) is KVCache:
            caches.append(_Cache(columns, None, grouped))
        elif type(kept) is RotatingKVCache and kept.keep == 0:
            caches.append(_Cache(columns, int(kept.max_size), grouped))
        else:
            return type(kept).__name__
    return caches


def _generate_by_mlx_lm(model: nn.Module, replies: _Replies, settings: GenerationSettings, sampler: _Sampler | None) -> None:
    """Let mlx-lm's batch generator complete the replies."""
    prompts = [request.prompt for request in replies.requests]
    generator = BatchGenerator(
        model,
        max_tokens=settings.max_tokens,
        stop_tokens=[[stop] for stop in sorted(replies.stop_ids)],
        completion_batch_size=settings.generation_batch_size,
        prefill_batch_size=min(8, settings.generation_batch_size),
        stream=mx.default_stream(mx.default_device()),
    )
    # Prompts of like length stand together, so that little is padded.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    # It calls a row's sampler once for each token of the row.
    samplers = None if sampler is None else [sampler.one(index) for index in order]
    numbers = generator.insert([[int(each) for each in prompts[index]] for index in order], samplers=samplers)
    place_of = dict(zip(numbers, order, strict=True))
    while responses := generator.next_generated():
        for response in responses:
            replies.add(place_of[response.uid], response.token)
    generator.close()
