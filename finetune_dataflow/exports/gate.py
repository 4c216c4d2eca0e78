"""The gate: an export against the adapter-loaded model on hold-out rows, so that a loss of what was learned is seen here.

At every supervised place both models give a distribution of the next token. KL divergence is that of the export's from the
adapter-loaded model's, sum of p (log p - log q), in nats. The most probable tokens agree where the export's is one that the
adapter-loaded model gives its highest probability. Replies are greedy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from finetune_dataflow.engine.chat import ChatEncoder
from finetune_dataflow.engine.comparison import deciding_metric
from finetune_dataflow.engine.settings import GenerationSettings
from finetune_dataflow.engine.text_metrics import scores_by_row
from finetune_dataflow.errors import UserError
from finetune_dataflow.exports.readers import Floats, Reader
from finetune_dataflow.exports.rows import GateRow
from finetune_dataflow.exports.settings import GateSettings

HEADINGS = ("read by", "rows", "places", "KL mean (nats)", "KL max", "same top-1", "{metric}", "export's", "same replies")
NAMES = {"rougeL": "ROUGE-L", "chrf": "chrF"}


@dataclass(frozen=True)
class Scores:
    """What one reader makes of an export, beside the adapter-loaded model in mlx-lm; None for what it does not tell.

    kl_mean, kl_max: nats. top1: share of places. metric: what replies are scored by, rougeL, or chrf where ROUGE knows few of
    the references' letters. score_adapter, score_export: its means over the greedy replies. same_replies: how many of them are
    the same text.
    """

    reader: str
    rows: int
    places: int | None
    kl_mean: float | None
    kl_max: float | None
    top1: float | None
    score_adapter: float | None
    score_export: float | None
    same_replies: int | None
    metric: str = "rougeL"

    def failures(self, asked: GateSettings) -> list[str]:
        """What of the gate is not reached, a sentence each."""
        found = []
        if self.kl_mean is not None and not self.kl_mean <= asked.max_kl:
            found.append(f"KL divergence {self.kl_mean:.4f} nats in the mean, at most {asked.max_kl} (max_kl)")
        if self.top1 is not None and not self.top1 >= asked.min_top1:
            found.append(
                f"the most probable token agrees at {self.top1:.1%} of the places, at least {asked.min_top1:.1%} (min_top1)"
            )
        lost = 0.0 if self.score_adapter is None or self.score_export is None else self.score_adapter - self.score_export
        if not lost <= asked.max_rouge_loss:
            found.append(f"{NAMES[self.metric]} is {lost:.3f} lower, at most {asked.max_rouge_loss} (max_rouge_loss)")
        return [f"{self.reader}: {each}" for each in found]

    def cells(self) -> tuple[str, ...]:
        """A row of the table."""

        def told(value: float | None, form: str) -> str:
            return "-" if value is None else format(value, form)

        same = "-" if self.same_replies is None else f"{self.same_replies} of {self.rows}"
        return (
            self.reader, str(self.rows), told(self.places, "d"), told(self.kl_mean, ".6f"), told(self.kl_max, ".6f"),
            told(self.top1, ".1%"), told(self.score_adapter, ".3f"), told(self.score_export, ".3f"), same,
        )  # fmt: skip


@dataclass(frozen=True)
class Gate:
    """The scores of an export by each of its readers, what was not reached, and what could not be checked."""

    scores: tuple[Scores, ...]
    failures: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def values(self) -> dict[str, Any]:
        """As it stands in export.json."""
        return asdict(self)

    @property
    def metric(self) -> str:
        """What replies are scored by, as it is shown."""
        return NAMES[self.scores[0].metric]

    @property
    def headings(self) -> tuple[str, ...]:
        """Those of the table."""
        return tuple(each.format(metric=self.metric) for each in HEADINGS)

    def lines(self) -> list[str]:
        """The table, in plain text."""
        rows = [self.headings, *(each.cells() for each in self.scores)]
        widths = [max(len(row[place]) for row in rows) for place in range(len(HEADINGS))]
        return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]

    def markdown(self) -> list[str]:
        """The table, in Markdown."""
        rows = [self.headings, ("---",) * len(HEADINGS), *(each.cells() for each in self.scores)]
        return [f"| {' | '.join(row)} |" for row in rows]


class Reference:
    """The adapter-loaded model on the gate's rows: what every export is held against."""

    def __init__(self, reader: Reader, rows: Sequence[GateRow], encoder: ChatEncoder, settings: GenerationSettings) -> None:
        """Generate its replies; greedy, however the run was evaluated."""
        self.reader, self.rows, self.encoder = reader, rows, encoder
        self.settings = GenerationSettings(settings.max_tokens, settings.generation_batch_size)
        self.prompted = [row for row in rows if row.prompt]
        self.references = [row.reference for row in self.prompted]
        self.metric = deciding_metric(True, self.references) if self.references else "rougeL"
        self.replies = reader.replies(self.prompted, encoder, self.settings) if self.prompted else []

    def scores(self, export: Reader) -> Scores:
        """An export beside it, by one reader."""
        found = export.log_probabilities(self.rows)
        divergences, agreed = (None, None) if found is None else self._compared(found)
        replies = export.replies(self.prompted, self.encoder, self.settings) if self.prompted else []
        own_rouge, its_rouge = (self._score(each) for each in (self.replies, replies))
        return Scores(
            export.name,
            len(self.rows),
            None if divergences is None else len(divergences),
            None if divergences is None else float(divergences.mean()),
            None if divergences is None else float(divergences.max()),
            None if agreed is None else float(agreed.mean()),
            own_rouge,
            its_rouge,
            sum(one == other for one, other in zip(self.replies, replies, strict=True)) if self.prompted else None,
            self.metric,
        )

    def _score(self, replies: Sequence[str]) -> float | None:
        """The mean score of replies to the prompts; None where there are none."""
        return float(scores_by_row(replies, self.references)[self.metric].mean()) if replies else None

    def _compared(self, found: Iterable[Floats]) -> tuple[np.ndarray, np.ndarray]:
        """The divergence at every place (nats), and whether the most probable token agrees."""
        own = self.reader.log_probabilities(self.rows)
        assert own is not None
        divergences, agreed = zip(*(_at_places(*each) for each in _paired(own, found)), strict=True)
        return np.concatenate(divergences), np.concatenate(agreed)


def _paired(own: Iterable[Floats], found: Iterable[Floats]) -> Iterator[tuple[Floats, Floats]]:
    """The distributions of both over the tokens that both have: one may pad its vocabulary."""
    for ours, theirs in zip(own, found, strict=True):
        width = min(ours.shape[1], theirs.shape[1])
        yield ours[:, :width], theirs[:, :width]


def _at_places(ours: Floats, theirs: Floats) -> tuple[np.ndarray, np.ndarray]:
    """KL divergence and agreement at each place of a row. Raises UserError for numbers that are not finite."""
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        raise UserError("A model gives probabilities that are not finite on the hold-out rows, so the export cannot be scored.")
    p, q = ours.astype(np.float64), theirs.astype(np.float64)
    divergence = (np.exp(p) * (p - q)).sum(axis=1)
    chosen = np.take_along_axis(ours, theirs.argmax(axis=1)[:, None], axis=1)[:, 0]
    return np.maximum(divergence, 0.0), chosen >= ours.max(axis=1)
