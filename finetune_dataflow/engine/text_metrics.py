"""Metrics of replies against references: numbers of each row whose sums over rows give every score of the corpus.

Each corpus score is a function of sums over rows, vectorised over leading dimensions, so that a paired bootstrap or a
permutation test sums the columns of `scores_by_row` for all its resamples at once. All scores but the length ratio are in
[0, 1]. Halves of surrogate pairs, which no UTF-8 text can hold, count as U+FFFD.

What each metric makes of a script without spaces: ROUGE knows letters a-z and digits only, so that a Chinese reply scores 0;
token F1 takes a run of Chinese as one token, so that it is hardly more than exact match; BLEU's tokenizer `13a` does, too,
and `zh` takes each Chinese character as a token (sacrebleu's recommendation; for Japanese and Korean it recommends MeCab,
which is a package apart: `char` needs none). chrF needs no tokens and suits every script.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from finetune_dataflow.engine.rouge import ROUGE_TYPES, rouge_by_row
from finetune_dataflow.errors import UserError, nearest

BleuTokenizer = Literal["13a", "zh", "intl", "char"]
Floats: TypeAlias = NDArray[np.float64]
Places: TypeAlias = NDArray[np.int64]

_BLEU_ORDERS = range(1, 5)
_CHRF_ORDERS = range(1, 7)
_RECALL_WEIGHT = 4.0  # chrF2: beta squared
_BLEU_COLUMNS = (
    *(f"bleu_matches_{order}" for order in _BLEU_ORDERS),
    *(f"bleu_ngrams_{order}" for order in _BLEU_ORDERS),
    "bleu_reply_tokens",
    "bleu_reference_tokens",
)
_CHRF_COLUMNS = tuple(f"chrf_{what}_{order}" for what in ("reply", "reference", "matches") for order in _CHRF_ORDERS)
_LENGTH_COLUMNS = ("reply_characters", "reference_characters")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Metric:
    """A score of a corpus as a function of sums over its rows.

    name: its key in metrics.json. label: its name for people. columns: the columns of `scores_by_row` that are summed.
    statistic: maps these sums [..., len(columns) + 1], the last of which is the number of rows, to the score of the corpus
    [...]. row_column: the column with the score of one row. higher_is_better: None where neither is, or nobody said.
    """

    name: str
    label: str
    columns: tuple[str, ...]
    statistic: Callable[[Floats], Floats]
    row_column: str
    higher_is_better: bool | None


def _quotient(above: Floats, below: Floats) -> Floats:
    """The quotients, 0 where the divisor is 0."""
    return np.divide(above, below, out=np.zeros(above.shape), where=below != 0)


def _mean(sums: Floats) -> Floats:
    return _quotient(sums[..., 0], sums[..., -1])


def _bleu(sums: Floats) -> Floats:
    """BLEU with exponential smoothing: the k-th order without a match counts as 1 / 2^k of one."""
    matches, ngrams, replies, references = sums[..., :4], sums[..., 4:8], sums[..., 8], sums[..., 9]
    missed = (matches == 0) & (ngrams > 0)
    precisions = _quotient(np.where(missed, 0.5 ** np.cumsum(missed, axis=-1), matches), ngrams)
    logarithms = np.log(precisions, out=np.zeros(precisions.shape), where=precisions > 0)
    penalty = np.exp(np.minimum(0.0, 1.0 - _quotient(references, replies)))
    defined = matches.any(axis=-1) & (ngrams > 0).all(axis=-1)
    return np.where(defined, penalty * np.exp(logarithms.mean(axis=-1)), 0.0)


def _chrf(sums: Floats) -> Floats:
    """chrF2: the F-score of the mean precision and the mean recall over the orders that both sides have n-grams of."""
    replies, references, matches = sums[..., :6], sums[..., 6:12], sums[..., 12:18]
    orders = ((replies > 0) & (references > 0)).sum(axis=-1).astype(np.float64)
    precision = _quotient(_quotient(matches, replies).sum(axis=-1), orders)
    recall = _quotient(_quotient(matches, references).sum(axis=-1), orders)
    return _quotient((1 + _RECALL_WEIGHT) * precision * recall, _RECALL_WEIGHT * precision + recall)


def _length_ratio(sums: Floats) -> Floats:
    replies, references = sums[..., 0], sums[..., 1]
    return np.where((replies == 0) & (references == 0), 1.0, replies / np.maximum(references, 1.0))


def row_mean(name: str, label: str, higher_is_better: bool | None = True) -> Metric:
    """The mean over rows of the column `name`."""
    return Metric(name, label, (name,), _mean, name, higher_is_better)


METRICS: dict[str, Metric] = {
    each.name: each
    for each in (
        row_mean("rouge1", "ROUGE-1"),
        row_mean("rouge2", "ROUGE-2"),
        row_mean("rougeL", "ROUGE-L"),
        row_mean("rougeLsum", "ROUGE-Lsum"),
        row_mean("exact_match", "exact match"),
        row_mean("token_f1", "token F1"),
        Metric("chrf", "chrF", _CHRF_COLUMNS, _chrf, "chrf", True),
        Metric("bleu", "BLEU", _BLEU_COLUMNS, _bleu, "bleu", True),
        Metric("length_ratio", "length ratio", _LENGTH_COLUMNS, _length_ratio, "length_ratio", None),
    )
}
# Names that a user's own column cannot have: they mean something else in metrics.json or beside it.
TAKEN = {"row", "loss", "perplexity", *METRICS, *(column for each in METRICS.values() for column in each.columns)}


def scores_by_row(
    predictions: Sequence[str], references: Sequence[str], bleu_tokenizer: str = "13a", rouge: pd.DataFrame | None = None
) -> pd.DataFrame:
    """The scores of each reply, and the counts that the scores of the corpus are made of; float64, one row a reply.

    The scores of a row: `rouge1`, `rouge2`, `rougeL`, `rougeLsum` (`rouge_by_row`; `rouge` gives them where they are known,
    which spares most of the time). `exact_match` (0 or 1) and `token_f1`, both after `answer_tokens` (Rajpurkar et al. (2016).
    SQuAD: 100,000+ Questions for Machine Comprehension of Text). `chrf` (Popović, M. (2015). chrF: character n-gram F-score
    for automatic MT evaluation). `bleu` (Papineni et al. (2002). BLEU: a Method for Automatic Evaluation of Machine
    Translation), both as sacrebleu has them (Post, M. (2018). A Call for Clarity in Reporting BLEU Scores; `signatures`).
    The BLEU of a row counts the orders that it has n-grams of (effective order); that of the corpus counts all four, so it
    is 0 where no reply has four tokens. `length_ratio`: characters (Unicode code points) of the reply by those of the
    reference, because these are the same for every tokenizer and script, which words are not; an empty reference counts as
    one character, and two empty texts have a ratio of 1. Of an empty and another text every other score is 0; of two empty
    texts exact match and token F1 are 1, the rest is 0.

    Raises UserError where `bleu_tokenizer` is not one of `BleuTokenizer`, ValueError where the lengths differ.
    """
    replies, expected = utf8(predictions), utf8(references)
    pairs = list(zip(replies, expected, strict=True))
    # The library of ROUGE fails on no rows.
    of_rouge = rouge if rouge is not None else rouge_by_row(replies, expected) if pairs else None
    bleu = BLEU(tokenize=_bleu_tokenizer(bleu_tokenizer), effective_order=True)
    columns = {name: np.zeros(0) if of_rouge is None else of_rouge[name].to_numpy(np.float64) for name in ROUGE_TYPES}
    answers = np.array([_answer_scores(*pair) for pair in pairs], np.float64).reshape(-1, 2)
    counted = {
        "chrf": _matrix([_chrf_counts(*pair) for pair in pairs], _CHRF_COLUMNS),
        "bleu": _matrix([_bleu_counts(bleu, *pair) for pair in pairs], ("bleu", *_BLEU_COLUMNS)),
        "length": _matrix([[len(reply), len(reference)] for reply, reference in pairs], _LENGTH_COLUMNS),
    }
    columns |= {"exact_match": answers[:, 0], "token_f1": answers[:, 1]}
    columns |= {"chrf": _chrf(counted["chrf"].to_numpy()), "length_ratio": _length_ratio(counted["length"].to_numpy())}
    return pd.concat([pd.DataFrame(columns), *counted.values()], axis=1)


def summed(rows: pd.DataFrame, metric: Metric) -> Floats:
    """What is summed for a metric, [rows, len(columns) + 1]: its columns, and a last one of ones, which counts the rows."""
    return np.column_stack([rows[list(metric.columns)].to_numpy(np.float64), np.ones(len(rows))])


def corpus_scores(rows: pd.DataFrame, metrics: Iterable[Metric] = tuple(METRICS.values())) -> dict[str, float]:
    """The score of all rows by each metric. Raises ValueError where there is no row, which has no score."""
    if rows.empty:
        raise ValueError("no rows have no score")
    return {metric.name: float(metric.statistic(summed(rows, metric).sum(axis=0))) for metric in metrics}


def signatures(bleu_tokenizer: str = "13a") -> dict[str, str]:
    """How sacrebleu names the settings of the corpus scores, for `bleu` and `chrf`: what a paper should print."""
    scorers = {"bleu": BLEU(tokenize=_bleu_tokenizer(bleu_tokenizer)), "chrf": CHRF()}
    for scorer in scorers.values():
        scorer.corpus_score(["a"], [["a"]])  # the signature holds the number of references, known from the first score on
    return {name: str(scorer.get_signature()) for name, scorer in scorers.items()}


def answer_tokens(text: str) -> list[str]:
    """The tokens of `text` after the normalisation of SQuAD v1.1, which has four steps.

    Lower case; no ASCII punctuation; no articles (a, an, the); split at white space. A text of which nothing would be left
    keeps its articles, or else its punctuation: otherwise "A" would equal "The", "+" would equal "-", and either would equal
    an empty reply. Two texts of which either keeps something score as they do in SQuAD v1.1.
    """
    lowered = text.lower()
    bare = lowered.translate(_NO_PUNCTUATION)
    return _ARTICLES.sub(" ", bare).split() or bare.split() or lowered.split()


def _answer_scores(reply: str, reference: str) -> tuple[float, float]:
    """Exact match and token F1."""
    given, expected = answer_tokens(reply), answer_tokens(reference)
    if given == expected:
        return 1.0, 1.0
    return 0.0, 2 * (Counter(given) & Counter(expected)).total() / (len(given) + len(expected))


def _bleu_counts(bleu: BLEU, reply: str, reference: str) -> list[float]:
    # Row by row, because a whole corpus makes sacrebleu warn of replies that end in " .".
    score = bleu.sentence_score(reply, [reference])
    return [score.score / 100, *score.counts, *score.totals, score.sys_len, score.ref_len]


def _chrf_counts(reply: str, reference: str) -> Floats:
    """N-grams of the reply, of the reference, and of both, by order; those of an order that the reference lacks are none."""
    first, second = _letters(reply), _letters(reference)
    given, expected = np.split(np.unique(np.concatenate([first, second]), return_inverse=True)[1], [len(first)])
    letters = given, expected
    counts = np.zeros((3, len(_CHRF_ORDERS)))
    for order in _CHRF_ORDERS:
        if order > 1:
            given, expected = _longer(given, expected, letters, order)
        kinds = int(max(given.max(initial=-1), expected.max(initial=-1))) + 1
        found = np.bincount(given, minlength=kinds), np.bincount(expected, minlength=kinds)
        counts[:, order - 1] = len(given) if len(expected) else 0, len(expected), np.minimum(*found).sum()
    return counts.ravel()


def _letters(text: str) -> NDArray[np.uint32]:
    """The code points of a text without its white space."""
    return np.frombuffer("".join(text.split()).encode("utf-32-le"), np.uint32)


def _longer(given: Places, expected: Places, letters: tuple[Places, Places], order: int) -> tuple[Places, Places]:
    """The numbers of two texts' n-grams of an order, equal where these are, from those one shorter and the texts' letters."""
    base = int(max(each.max(initial=0) for each in letters)) + 1
    pairs = [each[:-1] * base + last[order - 1 :] for each, last in zip((given, expected), letters, strict=True)]
    numbers = np.unique(np.concatenate(pairs), return_inverse=True)[1]
    return numbers[: len(pairs[0])], numbers[len(pairs[0]) :]


def _matrix(rows: Sequence[Sequence[float] | Floats], columns: Sequence[str]) -> pd.DataFrame:
    return pd.DataFrame(np.array(rows, np.float64).reshape(-1, len(columns)), columns=list(columns))


def utf8(texts: Sequence[str]) -> list[str]:
    """The texts with surrogate pairs joined and lone halves replaced."""
    return [text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace") for text in texts]


def _bleu_tokenizer(name: str) -> str:
    known = get_args(BleuTokenizer)
    if name not in known:
        raise UserError(f"bleu_tokenizer is {name!r}; expected one of {', '.join(known)}.{nearest(name, known)}")
    return name
