from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rouge_score.rouge_scorer import RougeScorer

from finetune_dataflow.engine.comparison import comparison, deciding_metric, said_p, scored, scores, verdict
from finetune_dataflow.engine.metric_code import of_files, of_functions
from finetune_dataflow.engine.rouge import Rouge, rouge_by_row
from finetune_dataflow.engine.text_metrics import METRICS

PREDICTIONS = ["the cat sat on the mat", "Hello there!", "", "running\nfast"]
REFERENCES = ["a cat was sitting on the mat", "general kenobi", "nothing", "he runs\nvery fast"]


def test_rouge_is_that_of_rouge_score() -> None:
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer=True)
    by_row = rouge_by_row(PREDICTIONS, REFERENCES)
    for row, prediction, reference in zip(by_row.to_dict("records"), PREDICTIONS, REFERENCES, strict=True):
        expected = {name: score.fmeasure for name, score in scorer.score(reference, prediction).items()}
        assert row == expected


def test_rouge_on_words_counted_by_hand() -> None:
    """4 of 6 and 4 of 7 words shared (the cat on the mat less one "the"): f = 2pr / (p + r)."""
    row = rouge_by_row(["the cat sat on the mat"], ["a cat was on the mat here"]).iloc[0]
    assert row["rouge1"] == pytest.approx(2 * (4 / 6) * (4 / 7) / (4 / 6 + 4 / 7))
    assert row["rouge2"] == pytest.approx(2 * (2 / 5) * (2 / 6) / (2 / 5 + 2 / 6))
    assert row["rougeL"] == pytest.approx(2 * (4 / 6) * (4 / 7) / (4 / 6 + 4 / 7))


def test_the_metric_answers_as_the_hubs_documentation_shows() -> None:
    results = Rouge(keep_in_memory=True).compute(
        predictions=["hello there", "general kenobi"], references=["hello there", "general kenobi"]
    )
    assert results == {"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0, "rougeLsum": 1.0}
    results = Rouge(keep_in_memory=True).compute(
        predictions=["hello goodbye", "ankh morpork"], references=["goodbye", "general kenobi"],
        rouge_types=["rouge1"], use_aggregator=False,
    )  # fmt: skip
    assert results == {"rouge1": [pytest.approx(2 / 3), 0.0]}


def test_several_references_count_the_best() -> None:
    results = Rouge(keep_in_memory=True).compute(predictions=["hello there"], references=[["no", "hello there"]])
    assert results["rouge1"] == 1.0


ZEROS = {name: 0.0 for metric in METRICS.values() for name in (*metric.columns, metric.row_column)}


def rows_with(losses: list[float], tokens: list[int], **columns: list[float]) -> pd.DataFrame:
    """Rows with these scores and losses; every other score is 0."""
    return scored(
        pd.DataFrame({"loss": losses, "supervised_tokens": tokens}),
        pd.DataFrame({**ZEROS, "token_limit": 0.0, **columns}, index=range(len(losses))),
    )


def test_loss_is_weighted_by_tokens_and_perplexity_is_its_exponential() -> None:
    found = scores(rows_with([2.0, 30.0], [2, 10], rougeL=[0.2, 0.4], token_limit=[1.0, 0.0]))
    assert found["loss"] == pytest.approx(32 / 12) and found["perplexity"] == pytest.approx(np.exp(32 / 12))
    assert found["rougeL"] == pytest.approx(0.3) and found["token_limit"] == 0.5
    assert [*found] == [*METRICS, "token_limit", "loss", "perplexity"]


def test_differences_are_tuned_minus_base_over_the_same_rows() -> None:
    base = rows_with([4.0, 2.0, 9.0], [2, 2, 3], rougeL=[0.1, 0.5, 0.3])
    tuned = rows_with([2.0, 1.0, 6.0], [2, 2, 3], rougeL=[0.3, 0.4, 0.3])
    found = comparison(base, tuned)
    assert found["difference"]["rougeL"]["mean"] == pytest.approx(0.1 / 3)
    assert found["difference"]["loss"]["mean"] == pytest.approx(9 / 7 - 15 / 7)
    assert found["outcomes"]["rougeL"] == {"wins": 1, "ties": 1, "losses": 1}
    assert found["outcomes"]["loss"] == {"wins": 3, "ties": 0, "losses": 0}
    assert found["intervals"]["rougeL"]["base"]["mean"] == pytest.approx(0.3)
    # All 8 swaps of the signs: the observed sum, 0.2 - 0.1, is reached or passed by all but none that is nearer to 0.
    assert found["difference"]["rougeL"]["p_value"] == pytest.approx(1.0)
    assert found["difference"]["loss"]["p_value"] == pytest.approx(0.25)


def test_scores_of_the_users_own_are_compared_too_and_unknown_directions_count_higher_as_won() -> None:
    base, tuned = (rows_with([1.0, 1.0], [1, 1], politeness=each) for each in ([0.0, 2.0], [3.0, 4.0]))
    found = comparison(base, tuned)
    assert found["finetuned"]["politeness"] == 3.5 and found["difference"]["politeness"]["mean"] == 2.5
    assert found["outcomes"]["politeness"] == {"wins": 2, "ties": 0, "losses": 0}
    assert [*found["difference"]][-2:] == ["politeness", "loss"]


def judged(low: float, high: float, rows: int = 30, seen: int | None = 0, needed: int | None = None, **others: Any) -> str:
    difference = {"mean": (low + high) / 2, "low": low, "high": high, "p_value": 0.25, "rows_needed": needed}
    counts = {"wins": 5, "ties": 20, "losses": 5}
    key = others.get("judge", "rougeL")
    return verdict({key: difference}, {key: counts}, rows, seen, **others)


@pytest.mark.parametrize(
    ("low", "high", "sentence"),
    [(0.01, 0.2, "is better than"), (-0.2, -0.01, "is worse than"), (-0.01, 0.2, "There is no clear difference")],
)
def test_the_verdict_says_better_worse_or_no_clear_difference(low: float, high: float, sentence: str) -> None:
    assert sentence in judged(low, high)


def test_the_verdict_in_full() -> None:
    assert judged(0.1, 0.2) == (
        "The tuned model is better than the base model: its ROUGE-L is 0.150 higher on 30 rows it never saw "
        "(95 % interval +0.100 to +0.200, p = 0.250; better on 5, equal on 20, worse on 5)."
    )


def test_where_it_is_not_clear_the_verdict_says_how_many_rows_would_do() -> None:
    assert judged(-0.1, 0.2, needed=412).endswith(
        ". The hold-out is too small to tell: a difference like this would be clear on about 412 rows."
    )
    assert judged(-0.1, 0.2, needed=10**6).endswith(" would not be clear on 100,000 rows either.")
    assert judged(-0.1, 0.2, needed=None).endswith("worse on 5).") and judged(0.1, 0.2, needed=412).endswith("worse on 5).")


def test_fewer_than_ten_rows_give_no_verdict() -> None:
    assert judged(0.05, 0.2, rows=1) == "No verdict: 1 row it never saw is too few to tell; at least 10 are needed."


def test_texts_without_a_prompt_are_judged_by_their_loss() -> None:
    said = judged(-0.4, -0.2, rows=40, judge="loss")
    assert said.startswith("The tuned model is better than the base model: its loss is 0.300 lower on 40 rows it never saw")


def test_what_rouge_cannot_read_is_judged_by_chrf() -> None:
    assert deciding_metric(True, ["Hello 42!", "Grüße aus Köln"]) == "rougeL"
    assert deciding_metric(True, ["今天天气很好 OK"]) == deciding_metric(True, ["Добрый день"]) == "chrf"
    assert deciding_metric(True, ["...", ""]) == "rougeL" and deciding_metric(False, ["Hello"]) == "loss"
    assert judged(0.1, 0.2, judge="chrf").startswith("The tuned model is better than the base model: its chrF is 0.150 higher")


def one_each(predictions: list[str], references: list[str]) -> list[float]:
    return [1.0 for _ in zip(predictions, references, strict=True)]


def test_another_code_of_a_metric_has_another_fingerprint(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    names = [f"{file}:score", "accuracy"]
    file.write_text("def score(predictions, references): return [1.0 for _ in predictions]")
    first = of_files(names)
    assert first == of_files(names) and first[1] == "" and len(first[0]) == 64
    file.write_text("def score(predictions, references): return [2.0 for _ in predictions]")
    assert of_files(names)[0] != first[0]
    here = of_functions({"one": one_each, "two": partial(one_each)})
    assert len(here["one"]) == 64 and here["two"] == ""


def test_a_p_value_below_a_thousandth_is_not_shown_as_zero() -> None:
    assert (said_p(0.0001), said_p(0.001), said_p(0.0456)) == ("p < 0.001", "p = 0.001", "p = 0.046")
