"""Rows that are all but equal: MinHash finds the candidates, the exact Jaccard index decides.

The sketches and their index are `rensa`'s (Rust, MIT, no dependencies of its own).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rensa import RMinHash, RMinHashLSH  # type: ignore[import-untyped]  # it ships no type information

from finetune_dataflow.engine.progress import Bar
from finetune_dataflow.engine.splitting import normalised
from finetune_dataflow.engine.tokens import DroppedRow

THRESHOLD = 0.9  # the Jaccard index from which two rows count as near
ROWS_WITHOUT_ASKING = 200_000  # above this many rows the search is off unless asked for
GRAM = 5  # characters
SLOTS = 288  # of a sketch; two rows agree on a slot with a probability equal to their Jaccard index
MISS = 1e-3  # the most that the chance of missing a pair may be
_SEED = 1
_MARGIN = 5  # standard deviations below the threshold at which a sketch's estimate rules a pair out
_SAMPLE = 1000  # texts from which the common grams are learned
_CHUNK_ROWS = 512  # bounds the memory of the candidates
_CHUNK_CHARACTERS = 1_000_000  # bounds the memory of the grams
_ROWS_WITH_BAR = 10_000  # below, the search takes about a second


@dataclass(frozen=True)
class Near:
    """The nearest of the texts that `texts[index]` was compared with: `against[against]`, and their Jaccard index."""

    index: int
    against: int
    similarity: float


def grams(text: str) -> set[str]:
    """The distinct 5-character pieces of a text; a text shorter than that is its own one piece."""
    return {text[start : start + GRAM] for start in range(max(1, len(text) - GRAM + 1))}


def rows_per_band(threshold: float) -> int:
    """The most slots a band may have such that a pair at `threshold` is missed with a probability below 1e-3.

    The 288 slots are cut in b = 288 / r bands of r slots; a pair of Jaccard index s is a candidate where it agrees on all
    slots of a band. It is missed with probability (1 - s^r)^b: at s = 0.9, r = 12 and b = 24 that is
    (1 - 0.2824)^24 = 0.00035. More slots a band mean fewer candidates, so the largest r that will do is taken.
    """
    for slots in (12, 9, 8, 6, 4, 3, 2, 1):
        if (1 - threshold**slots) ** (SLOTS // slots) < MISS:
            return slots
    raise ValueError(f"threshold is {threshold}; the search finds pairs from 0.03 on")


def near_rows(texts: Sequence[str], against: Sequence[str], threshold: float = THRESHOLD) -> list[Near]:
    """For each text that has one, its nearest in `against` with a Jaccard index of at least `threshold`, in order of index.

    The index is that of the sets of character 5-grams of the normalised texts, computed exactly, so nothing is reported that
    is not near; equal normalised texts are at 1.0. Of equally near texts the first is named. A pair at 0.9 is missed with
    a probability below 4e-4: 3.5e-4 that no band of its sketches agrees (`rows_per_band`), and below 1e-5 that the sketches'
    estimate lies five standard deviations (0.088) under the threshold. A nearer pair is missed less often still: at 0.95,
    1e-8. The same texts always give the same result.
    """
    return list(_search(texts, against, threshold, nearest=True))


def leaking_rows(
    train: Sequence[tuple[int, str]], validation: Sequence[tuple[int, str]], hold_out: Sequence[tuple[int, str]]
) -> tuple[DroppedRow, ...]:
    """The rows, in order of row number, that are too near to a set they must not be near to; each is (row number, text).

    `near_hold_out`: a training or validation row near a hold-out row. `near_validation`: a training row near a validation
    row that stays. A row has one reason, the hold-out's first.
    """
    held = [text for _, text in hold_out]
    dropped_validation = {each.index for each in _any_near(validation, held)}
    dropped_train = {each.index for each in _any_near(train, held)}
    kept_validation = [text for index, (_, text) in enumerate(validation) if index not in dropped_validation]
    kept_train = [each for index, each in enumerate(train) if index not in dropped_train]
    dropped = [DroppedRow(validation[index][0], "near_hold_out") for index in dropped_validation]
    dropped += [DroppedRow(train[index][0], "near_hold_out") for index in dropped_train]
    dropped += [DroppedRow(kept_train[each.index][0], "near_validation") for each in _any_near(kept_train, kept_validation)]
    return tuple(sorted(dropped, key=lambda each: each.row))


def _any_near(rows: Sequence[tuple[int, str]], against: Sequence[str]) -> Iterator[Near]:
    return _search([text for _, text in rows], against, THRESHOLD, nearest=False)


def _search(texts: Sequence[str], against: Sequence[str], threshold: float, nearest: bool) -> Iterator[Near]:
    """As `near_rows`; unless `nearest`, any text that is near will do, which is much faster where most rows are alike."""
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold}; it must be above 0 and at most 1")
    index = _Index(against, threshold)
    bar = Bar(len(texts), "near-duplicates") if len(texts) >= _ROWS_WITH_BAR else None
    for start, chunk in _chunks([normalised(text) for text in texts]):
        # Each distinct text is looked up once; many data sets repeat their inputs.
        found = index.nearest(list(dict.fromkeys(chunk)), nearest)
        for offset, text in enumerate(chunk):
            if text in found:
                place, similarity = found[text]
                yield Near(start + offset, place, similarity)
        if bar:
            bar.advance(len(chunk))
    if bar:
        bar.close()


class _Index:
    """The distinct normalised texts that others are compared with, each under its first place."""

    def __init__(self, against: Sequence[str], threshold: float) -> None:
        first: dict[str, int] = {}
        for place, text in enumerate(against):
            first.setdefault(normalised(text), place)
        self.threshold = threshold
        self.first = first
        self.texts = list(first)
        self.counts: list[int] = []
        self.rarest: dict[int, list[str]] = {}  # of the texts that were candidates so far
        step = max(1, len(self.texts) // _SAMPLE)
        sample = Counter(piece for text in self.texts[::step] for piece in grams(text))
        self.common = {piece: count for piece, count in sample.items() if count > 1}
        self.sketches: list[RMinHash] = []
        self.lowest_estimate = threshold - _MARGIN * (threshold * (1 - threshold) / SLOTS) ** 0.5
        self.bands = RMinHashLSH(threshold, SLOTS, SLOTS // rows_per_band(threshold))
        for start, chunk in _chunks(self.texts):
            sets = [grams(text) for text in chunk]
            sketches = _sketches(chunk, sets)
            self.bands.insert_many(sketches, start)
            self.sketches += sketches
            self.counts += map(len, sets)

    def nearest(self, texts: Sequence[str], nearest: bool) -> dict[str, tuple[int, float]]:
        """The place and similarity of the nearest (or of any near) text, of those of some distinct texts that have one."""
        found = {text: (self.first[text], 1.0) for text in texts if text in self.first}
        others = [text for text in texts if text not in found]
        sets = [grams(text) for text in others]
        sketches = _sketches(others, sets)
        candidates = self.bands.query_all(sketches)
        for text, pieces, sketch, keys in zip(others, sets, sketches, candidates, strict=True):
            if keys and (best := self._best(pieces, sketch, sorted(keys), nearest)):
                found[text] = best
        return found

    def _best(self, pieces: set[str], sketch: RMinHash, keys: Sequence[int], nearest: bool) -> tuple[int, float] | None:
        best: tuple[int, float] | None = None
        rarest = self._rarest(pieces)
        for key in keys:
            small, large = sorted((len(pieces), self.counts[key]))
            # small / large is the most that the Jaccard index can be.
            if small / large < self.threshold or (best and small / large <= best[1]):
                continue
            if sketch.jaccard(self.sketches[key]) < self.lowest_estimate:
                continue
            if key not in self.rarest:
                self.rarest[key] = self._rarest(grams(self.texts[key]))
            # The fewest grams that must be shared; rounding must not make it too many.
            needed = math.ceil(self.threshold / (1 + self.threshold) * (small + large) - 1e-6)
            others = self.rarest[key][: self.counts[key] - needed + 1]
            if set(rarest[: len(pieces) - needed + 1]).isdisjoint(others):
                continue
            similarity = _jaccard(pieces, grams(self.texts[key]))
            if similarity >= self.threshold and (best is None or similarity > best[1]):
                best = (self.first[self.texts[key]], similarity)
                if not nearest:
                    break
        return best

    def _rarest(self, pieces: set[str]) -> list[str]:
        """The n - ceil(threshold x n) + 1 rarest of n grams, the rarest first.

        Two texts that share k grams share one of the first n - k + 1 of each at least, under any one order of the grams (the
        prefix filter of Chaudhuri, Ganti and Kaushik, 2006). Rare ones first, it tells apart rows that have a long text in
        common, such as a template, without comparing all their grams.
        """
        # Rounding must not make the list too short.
        count = len(pieces) - math.ceil(self.threshold * len(pieces) - 1e-6) + 1
        rare = pieces - self.common.keys()
        if len(rare) >= count:
            return sorted(rare)[:count]
        others = sorted(pieces & self.common.keys(), key=lambda piece: (self.common[piece], piece))
        return sorted(rare) + others[: count - len(rare)]


def _jaccard(left: set[str], right: set[str]) -> float:
    shared = len(left & right)
    return shared / (len(left) + len(right) - shared)


def _sketches(texts: Sequence[str], sets: Sequence[set[str]]) -> list[RMinHash]:
    # rensa takes no half of a surrogate pair, which a JSON escape can bring in; the exact comparison still sees it.
    encodable = [
        pieces if text.isascii() or _encodable(text) else {piece.encode("utf-8", "replace").decode() for piece in pieces}
        for text, pieces in zip(texts, sets, strict=True)
    ]
    return list(RMinHash.from_token_sets(encodable, SLOTS, _SEED))


def _encodable(text: str) -> bool:
    return text.encode("utf-8", "replace").decode() == text


def _chunks(texts: Sequence[str]) -> Iterator[tuple[int, Sequence[str]]]:
    """Runs of texts with the place of the first, each of a bounded number of texts and characters (or of one long text)."""
    start = characters = 0
    for end, text in enumerate(texts):
        if end > start and (end - start == _CHUNK_ROWS or characters + len(text) > _CHUNK_CHARACTERS):
            yield start, texts[start:end]
            start, characters = end, 0
        characters += len(text)
    if start < len(texts):
        yield start, texts[start:]
