import numpy as np
import pandas as pd
import pytest
from rouge_score.rouge_scorer import RougeScorer

from finetune_dataflow.engine.comparison import comparison, scores, verdict
from finetune_dataflow.engine.rouge import Rouge, rouge_by_row
from finetune_dataflow.engine.statistics import Interval, weighted_mean_interval

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


def test_loss_is_weighted_by_tokens_and_perplexity_is_its_exponential() -> None:
    losses = pd.DataFrame({"loss": [2.0, 30.0], "supervised_tokens": [2, 10]})
    rouge = pd.DataFrame({name: [0.2, 0.4] for name in ("rouge1", "rouge2", "rougeL", "rougeLsum")})
    found = scores(losses, rouge)
    assert found["loss"] == pytest.approx(32 / 12) and found["perplexity"] == pytest.approx(np.exp(32 / 12))
    assert found["rougeL"] == pytest.approx(0.3)


def test_differences_are_tuned_minus_base_over_the_same_rows() -> None:
    names = ("rouge1", "rouge2", "rougeL", "rougeLsum")
    base, tuned = (pd.DataFrame({name: [at, at + 0.1, at + 0.2] for name in names}) for at in (0.1, 0.3))
    losses = [pd.DataFrame({"loss": [4.0, 2.0, 9.0], "supervised_tokens": [2, 2, 3]}) for _ in range(2)]
    found = comparison(losses[0], losses[1].assign(loss=[2.0, 1.0, 6.0]), base, tuned)
    assert found["difference"]["rougeL"]["mean"] == pytest.approx(0.2)
    assert found["difference"]["loss"]["mean"] == pytest.approx(9 / 7 - 15 / 7)


def test_the_interval_of_equal_differences_is_the_difference() -> None:
    assert weighted_mean_interval(np.full(10, 0.25)) == Interval(0.25, 0.25, 0.25)


def test_the_interval_is_the_same_on_every_call() -> None:
    values = np.random.default_rng(1).normal(size=30)
    assert weighted_mean_interval(values) == weighted_mean_interval(values)


def test_the_interval_agrees_with_the_normal_one_where_the_scores_are_normal() -> None:
    values = np.random.default_rng(1).normal(0.1, 0.2, size=400)
    half = 1.96 * values.std(ddof=1) / 20
    found = weighted_mean_interval(values)
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_intervals_of_skewed_scores_cover_the_truth_about_as_often_as_they_say() -> None:
    """Exponential scores, n = 40: a percentile interval covers about 92 %, BCa does better."""
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(300):
        found = weighted_mean_interval(generator.exponential(size=40), seed=seed)
        covered += found.low <= 1.0 <= found.high
    assert 0.90 <= covered / 300 <= 0.99


@pytest.mark.parametrize(
    ("low", "high", "sentence"),
    [(0.01, 0.2, "is better than"), (-0.2, -0.01, "is worse than"), (-0.01, 0.2, "There is no clear difference")],
)
def test_the_verdict_says_better_worse_or_no_clear_difference(low: float, high: float, sentence: str) -> None:
    assert sentence in verdict({"rougeL": {"mean": (low + high) / 2, "low": low, "high": high}}, 30, 0)


def test_fewer_than_ten_rows_give_no_verdict() -> None:
    said = verdict({"rougeL": {"mean": 0.1, "low": 0.05, "high": 0.2}}, 1, 0)
    assert said == "No verdict: 1 row it never saw is too few to tell; at least 10 are needed."


def test_texts_without_a_prompt_are_judged_by_their_loss() -> None:
    said = verdict({"loss": {"mean": -0.3, "low": -0.4, "high": -0.2}}, 40, 0, by_loss=True)
    assert said.startswith("The tuned model is better than the base model: its loss is 0.300 lower on 40 rows it never saw")
