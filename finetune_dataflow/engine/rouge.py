"""ROUGE as an `evaluate` metric that works offline.

The same computation as the hub's `rouge` metric, over the same `rouge_score` package (Lin, C.-Y. (2004). ROUGE: A Package
for Automatic Evaluation of Summaries), with one difference: the aggregate is the exact mean of the rows' f-measures, where
the hub's is the median of an unseeded bootstrap around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import datasets
import evaluate
import numpy as np
import pandas as pd
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer

WORDS = 100_000  # whose stems are kept at a time
ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


class Rouge(evaluate.Metric):
    """`evaluate.load("rouge")` without the hub: `Rouge().compute(predictions=…, references=…)`."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        features = [
            datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
            datasets.Features({"predictions": text, "references": text}),
        ]
        return evaluate.MetricInfo(
            description="ROUGE-1, ROUGE-2, ROUGE-L and ROUGE-Lsum f-measures in [0, 1].",
            citation="Lin, C.-Y. (2004). ROUGE: A Package for Automatic Evaluation of Summaries.",
            inputs_description="predictions: list of str. references: list of str, or of lists of str.",
            features=features,
        )

    def _compute(
        self,
        predictions: Sequence[str],
        references: Sequence[str] | Sequence[Sequence[str]],
        rouge_types: Sequence[str] = ROUGE_TYPES,
        use_aggregator: bool = True,
        use_stemmer: bool = False,
    ) -> dict[str, float] | dict[str, list[float]]:
        scorer = RougeScorer(list(rouge_types), tokenizer=_tokenizer(use_stemmer))
        scores = [
            scorer.score(reference, prediction) if isinstance(reference, str) else scorer.score_multi(reference, prediction)
            for reference, prediction in zip(references, predictions, strict=True)
        ]
        rows = {name: [score[name].fmeasure for score in scores] for name in rouge_types}
        return {name: float(np.mean(values)) for name, values in rows.items()} if use_aggregator else rows


def _tokenizer(use_stemmer: bool) -> DefaultTokenizer:
    """The scorer's own tokenizer, which stems each word once: two thirds of the time went into stemming the same ones."""
    tokenizer = DefaultTokenizer(use_stemmer)
    if use_stemmer:
        stemmer = tokenizer._stemmer
        stemmer.stem = lru_cache(WORDS)(stemmer.stem)
    return tokenizer


def rouge_by_row(predictions: Sequence[str], references: Sequence[str]) -> pd.DataFrame:
    """The f-measures of each prediction, in [0, 1], with Porter stemming; columns rouge1, rouge2, rougeL, rougeLsum."""
    metric = Rouge(keep_in_memory=True)
    rows = metric.compute(predictions=list(predictions), references=list(references), use_aggregator=False, use_stemmer=True)
    return pd.DataFrame(rows, columns=list(ROUGE_TYPES))
