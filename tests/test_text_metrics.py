from __future__ import annotations

import logging
import math
import random
import re
import string
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import evaluate
import numpy as np
import pandas as pd
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_dataflow.engine.further_metrics import further_metric, further_scores, load_metrics
from finetune_dataflow.engine.text_metrics import (
    METRICS,
    answer_tokens,
    corpus_scores,
    scores_by_row,
    signatures,
    summed,
)
from finetune_dataflow.errors import UserError

# The example in sacrebleu's README; the second set of references is left out, for a row has one here.
REFERENCES = ["The dog bit the man.", "It was not unexpected.", "The man bit him first."]
REPLIES = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
ODD = [
    "",
    " ",
    "\n",
    "A",
    "The",
    "+",
    "-",
    "...",
    "\x00",
    "\ud800",
    "x\udc00y",
    "👍🏽",
    "你好\uff0c世界",
    "你好",
    "hi there .",
    "7",
    "<skipped>",
]
NO_ROUGE = pd.DataFrame({name: [0.0] * 40 for name in ("rouge1", "rouge2", "rougeL", "rougeLsum")})
LETTERS = st.text("aAtThen .,'+-\n\u00e9\u4f60\U0001f44d", max_size=12)


def row(reply: str, reference: str) -> dict[str, float]:
    """The scores of one row."""
    return {str(name): value for name, value in scores_by_row([reply], [reference]).iloc[0].items()}


def random_texts(seed: int, count: int, longest: int, shortest: int = 0) -> list[str]:
    """Texts of words, numbers, punctuation, entities and other scripts."""
    drawn = random.Random(seed)
    words = [
        "the",
        "cat",
        "Cat",
        "sat",
        "on",
        "3.5",
        "1,000",
        "e.g.",
        "&quot;",
        "well-known",
        "1990-91",
        "naïve",
        "你好",
        "🙂",
        "(x)",
    ]
    return [" ".join(drawn.choices(words, k=drawn.randint(shortest, longest))) for _ in range(count)]


def by_squad(text: str) -> str:
    """The normalisation that SQuAD v1.1's evaluation script describes, step by step."""
    lowered = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", lowered).split())


def test_the_metrics_stand_in_the_order_in_which_they_are_shown() -> None:
    assert list(METRICS) == [
        "rouge1", "rouge2", "rougeL", "rougeLsum", "exact_match", "token_f1", "chrf", "bleu", "length_ratio",
    ]  # fmt: skip
    assert [each.higher_is_better for each in METRICS.values()] == [True] * 8 + [None]
    assert METRICS["rougeL"].label == "ROUGE-L"
    assert all(name == each.name for name, each in METRICS.items())


def test_bleu_of_the_counts_in_sacrebleus_readme_is_the_score_it_prints() -> None:
    # BLEU = 48.53 82.4/50.0/45.5/37.5 (BP = 0.943 ratio = 0.944 hyp_len = 17 ref_len = 18)
    counts = np.array([14, 7, 5, 3, 17, 14, 11, 8, 17, 18, 3], dtype=np.float64)
    assert round(100 * float(METRICS["bleu"].statistic(counts)), 2) == 48.53


def test_the_readmes_replies_score_as_sacrebleu_prints_them() -> None:
    scores = corpus_scores(scores_by_row(REPLIES, REFERENCES))
    assert round(100 * scores["bleu"], 2) == float(sacrebleu.corpus_bleu(REPLIES, [REFERENCES]).format(2, score_only=True))
    assert round(100 * scores["chrf"], 2) == float(sacrebleu.corpus_chrf(REPLIES, [REFERENCES]).format(2, score_only=True))
    assert (round(100 * scores["bleu"], 2), round(100 * scores["chrf"], 2)) == (45.07, 50.04)


def test_the_example_in_rouge_scores_readme() -> None:
    scores = row("The quick brown dog jumps on the log.", "The quick brown fox jumps over the lazy dog")
    assert scores["rouge1"] == pytest.approx(12 / 17)  # 6 words of 8 and of 9
    assert scores["rouge2"] == pytest.approx(4 / 15)  # "the quick", "quick brown" of 7 and of 8
    assert scores["rougeL"] == pytest.approx(10 / 17)  # the quick brown jumps the


@pytest.mark.parametrize("longest", [3, 8, 40])
def test_the_corpus_scores_are_sacrebleus(longest: int) -> None:
    replies, references = random_texts(1, 40, longest), random_texts(2, 40, longest)
    scores = corpus_scores(scores_by_row(replies, references, rouge=NO_ROUGE))
    assert scores["bleu"] == pytest.approx(sacrebleu.corpus_bleu(replies, [references]).score / 100, abs=1e-9)
    assert scores["chrf"] == pytest.approx(sacrebleu.corpus_chrf(replies, [references]).score / 100, abs=1e-9)
    assert scores["chrf"] > 0


@pytest.mark.parametrize("tokenizer", ["13a", "zh", "intl", "char"])
def test_bleu_is_sacrebleus_with_each_tokenizer(tokenizer: str) -> None:
    replies, references = random_texts(3, 40, 12, 4), random_texts(4, 40, 12, 4)
    score = corpus_scores(scores_by_row(replies, references, tokenizer, NO_ROUGE))["bleu"]
    assert score == pytest.approx(sacrebleu.corpus_bleu(replies, [references], tokenize=tokenizer).score / 100, abs=1e-9)
    assert score > 0
    assert signatures(tokenizer)["bleu"].startswith(f"nrefs:1|case:mixed|eff:no|tok:{tokenizer}|smooth:exp|version:")


def test_bleu_smooths_each_order_without_a_match_by_half_as_much_again() -> None:
    # One match of six in the first order, none of 5, 4 and 3 in the others.
    counts = np.array([1, 0, 0, 0, 6, 5, 4, 3, 6, 6, 1], dtype=np.float64)
    expected = (1 / 6 * 1 / (2 * 5) * 1 / (4 * 4) * 1 / (8 * 3)) ** 0.25
    assert float(METRICS["bleu"].statistic(counts)) == pytest.approx(expected, abs=1e-15)


def test_bleu_without_any_match_is_zero_and_not_smoothed() -> None:
    counts = np.array([0, 0, 0, 0, 6, 5, 4, 3, 6, 6, 1], dtype=np.float64)
    assert float(METRICS["bleu"].statistic(counts)) == 0


@settings(deadline=None, max_examples=60)
@given(LETTERS, LETTERS)
def test_the_scores_of_a_row_are_sacrebleus_of_a_sentence(reply: str, reference: str) -> None:
    scores = scores_by_row([reply], [reference], rouge=NO_ROUGE[:1]).iloc[0]
    assert scores["bleu"] == pytest.approx(sacrebleu.sentence_bleu(reply, [reference]).score / 100, abs=1e-9)
    assert scores["chrf"] == pytest.approx(sacrebleu.sentence_chrf(reply, [reference]).score / 100, abs=1e-9)


def test_bleu_of_a_corpus_is_zero_where_no_reply_has_four_tokens_and_that_of_its_rows_is_not() -> None:
    rows = scores_by_row(["Two words", "Three more words"], ["Two words", "Three more words"])
    assert rows["bleu"].tolist() == [pytest.approx(1.0), pytest.approx(1.0)]
    assert corpus_scores(rows)["bleu"] == 0


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("The  Cat,\tan\nApple & a dog!", ["cat", "apple", "dog"]),
        ("Theatre in an anthem", ["theatre", "in", "anthem"]),
        ("the-end (U.S.A.)", ["theend", "usa"]),
        ("It\u2019s “fine”", ["it\u2019s", "“fine”"]),
        ("$3.50", ["350"]),
        ("A", ["a"]),
        ("The a.", ["the", "a"]),
        ("+ !", ["+", "!"]),
        (" \n", []),
    ],
)
def test_a_text_is_normalised_as_in_squad(text: str, tokens: list[str]) -> None:
    assert answer_tokens(text) == tokens


@settings(deadline=None, max_examples=200)
@given(LETTERS, LETTERS)
def test_exact_match_and_token_f1_are_squads_where_either_text_keeps_a_token(reply: str, reference: str) -> None:
    given_text, expected = by_squad(reply), by_squad(reference)
    if not given_text and not expected:
        return
    scores = scores_by_row([reply], [reference], rouge=NO_ROUGE[:1]).iloc[0]
    common = sum((Counter(given_text.split()) & Counter(expected.split())).values())
    f1 = 0.0
    if common:
        precision, recall = common / len(given_text.split()), common / len(expected.split())
        f1 = 2 * precision * recall / (precision + recall)
    assert scores["exact_match"] == (given_text == expected)
    assert scores["token_f1"] == pytest.approx(f1, abs=1e-12)


@pytest.mark.parametrize(
    ("reply", "reference", "match", "f1"),
    [
        ("The Eiffel Tower!", "eiffel tower", 1, 1),
        ("in Paris, France", "Paris", 0, 0.5),
        ("cat cat cat", "cat dog", 0, 0.4),
        ("B", "A", 0, 0),
        ("A.", "a", 1, 1),
        ("", "A", 0, 0),
        ("-", "+", 0, 0),
        ("+", "+", 1, 1),
        ("", "", 1, 1),
        ("你好 世界", "你好世界", 0, 0),
        ("你好。", "你好。", 1, 1),
    ],
)
def test_exact_match_and_token_f1_of_a_row(reply: str, reference: str, match: float, f1: float) -> None:
    scores = row(reply, reference)
    assert (scores["exact_match"], scores["token_f1"]) == (match, pytest.approx(f1))


@pytest.mark.parametrize(
    ("reply", "reference", "ratio"), [("ab", "abcd", 0.5), ("👍🏽é", "ab", 1.5), ("", "", 1), ("", "ab", 0), ("abc", "", 3)]
)
def test_the_length_ratio_is_of_code_points(reply: str, reference: str, ratio: float) -> None:
    assert row(reply, reference)["length_ratio"] == ratio


def test_the_length_ratio_of_a_corpus_is_of_all_its_characters() -> None:
    assert corpus_scores(scores_by_row(["abcdef", "a"], ["abc", "abcde"]))["length_ratio"] == 7 / 8


def test_means_are_means_of_rows() -> None:
    rows = scores_by_row(["in Paris", "yes", "no"], ["Paris", "Yes.", "maybe"])
    scores = corpus_scores(rows)
    assert scores["exact_match"] == pytest.approx(1 / 3)
    assert scores["token_f1"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert scores["rougeL"] == pytest.approx(rows["rougeL"].sum() / 3)


def test_odd_texts_have_defined_scores_and_nothing_appears_on_the_screen(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    replies, references = [reply for reply in ODD for _ in ODD], ODD * len(ODD)
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        rows = scores_by_row(replies, references)
        scores = corpus_scores(rows)
    assert len(rows) == len(ODD) ** 2
    assert set(rows.dtypes) == {np.dtype("float64")}
    assert np.isfinite(rows.to_numpy()).all()
    shown = rows[[each.row_column for each in METRICS.values() if each.name != "length_ratio"]]
    assert shown.to_numpy().min() == 0
    assert shown.to_numpy().max() <= 1 + 1e-12
    assert all(0 <= value <= 1 for name, value in scores.items() if name != "length_ratio")
    assert (capfd.readouterr(), caplog.records) == (("", ""), [])


def test_a_hundred_replies_that_end_in_a_detached_full_stop_bring_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        corpus_scores(scores_by_row(["It is so ."] * 120, ["It is so."] * 120))
    assert caplog.records == []


def test_half_a_surrogate_pair_counts_as_one_replacement_character_and_a_whole_one_as_its_character() -> None:
    assert row("x\ud83dy", "x\ufffdy")["exact_match"] == 1
    assert row("ok \ud83d\ude42", "ok 🙂")["exact_match"] == 1
    assert row("ab\ud83d", "abc")["length_ratio"] == 1


def test_a_chinese_reply_scores_by_characters_with_the_tokenizer_for_it_only() -> None:
    pair = ["我们明天早上去北京。"], ["我们明天早上去上海。"]
    assert scores_by_row(*pair)["bleu"].item() == 0
    # 8 of 10 characters; of their pairs, threes and fours 6 of 9, 5 of 8, 4 of 7
    assert scores_by_row(*pair, "zh")["bleu"].item() == pytest.approx((8 / 10 * 6 / 9 * 5 / 8 * 4 / 7) ** 0.25)
    assert scores_by_row(*pair)["chrf"].item() > 0.4
    assert scores_by_row(*pair)["rougeL"].item() == 0


def test_an_unknown_tokenizer_is_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(UserError, match=r"bleu_tokenizer is '13'; expected one of 13a, zh, intl, char. Did you mean '13a'\?"):
        scores_by_row(["a"], ["a"], "13")


def test_no_rows_give_an_empty_table_with_all_columns_and_no_score() -> None:
    rows = scores_by_row([], [])
    assert rows.shape == (0, len(scores_by_row(["a"], ["b"]).columns))
    assert set(rows.dtypes) == {np.dtype("float64")}
    with pytest.raises(ValueError, match="no score"):
        corpus_scores(rows)


def test_replies_and_references_must_be_as_many() -> None:
    with pytest.raises(ValueError, match="shorter"):
        scores_by_row(["a", "b"], ["a"])


def test_known_rouge_scores_are_taken_over() -> None:
    known = pd.DataFrame({"rouge1": [0.1], "rouge2": [0.2], "rougeL": [0.3], "rougeLsum": [0.4]}, index=[17])
    assert scores_by_row(["a"], ["b"], rouge=known).iloc[0, :4].tolist() == [0.1, 0.2, 0.3, 0.4]


@pytest.mark.parametrize("name", METRICS)
def test_a_statistic_over_many_sums_at_once_equals_one_at_a_time(name: str) -> None:
    metric = METRICS[name]
    values = summed(scores_by_row([*random_texts(5, 20, 12), *ODD], [*random_texts(6, 20, 12), *ODD]), metric)
    assert values.shape == (37, len(metric.columns) + 1)
    assert (values[:, -1] == 1).all()
    drawn = np.random.default_rng(0).integers(0, 37, (2, 15, 4))  # of four rows, so that the odd ones fill some resamples
    sums = values[drawn].sum(axis=2)
    together = metric.statistic(sums)
    assert together.shape == (2, 15)
    one_by_one = [[float(metric.statistic(sums[first, second])) for second in range(15)] for first in range(2)]
    assert together.tolist() == pytest.approx(np.array(one_by_one), abs=1e-15)
    assert len(set(together.ravel())) > 1
    assert np.isfinite(metric.statistic(np.zeros(sums.shape))).all()


def test_every_row_score_but_that_of_bleu_is_the_statistic_of_its_row_alone() -> None:
    rows = scores_by_row([*random_texts(7, 20, 9), *ODD], [*random_texts(8, 20, 9), *reversed(ODD)])
    for metric in METRICS.values():
        if metric.name != "bleu":
            np.testing.assert_allclose(rows[metric.row_column], metric.statistic(summed(rows, metric)), atol=1e-15)


def test_the_signatures_are_those_of_sacrebleus_defaults() -> None:
    assert signatures() == {
        "bleu": f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}",
        "chrf": f"nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:{sacrebleu.__version__}",
    }


# ---- the user's own metrics ----

SCRIPT = """
import datasets
import evaluate

class Overlap(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": text})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        if "boom" in predictions:
            raise KeyError("boom")
        result = {"overlap": len(set(predictions[0]) & set(references[0])) / 4, "size": len(predictions[0]),
                  "rows": float(len(predictions)), "parts": [1.0, 2.0], "note": "text", "none": None}
        if predictions == ["nothing"]:
            return {"note": "text"}
        if predictions == ["less"]:
            del result["size"]
        return result
"""


@pytest.fixture(scope="module", autouse=True)
def own_cache_of_scripts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """`evaluate` copies a script to a cache and loads it from there: not from the one of the person who runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", tmp_path_factory.mktemp("modules"))
        patch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
        yield


@pytest.fixture
def script(tmp_path: Path) -> str:
    """A local `evaluate` metric."""
    (tmp_path / "overlap.py").write_text(SCRIPT)
    return str(tmp_path / "overlap.py")


def metric_file(directory: Path, code: str, name: str = "mine.py") -> str:
    (directory / name).write_text(code)
    return str(directory / name)


def test_each_number_of_a_local_evaluate_metric_is_a_column_computed_row_by_row(script: str) -> None:
    scores = further_scores([script], ["abc", "xyz!"], ["abd", "z"])
    assert scores.to_dict("list") == {
        "overlap": [0.5, 0.25],
        "overlap_size": [3.0, 4.0],
        "overlap_rows": [1.0, 1.0],
    }
    assert set(scores.dtypes) == {np.dtype("float64")}


def test_an_evaluate_metric_loads_from_its_directory_and_by_a_relative_path(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "overlap").mkdir()
    (tmp_path / "overlap" / "overlap.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    for name in ("./overlap.py", "overlap.py", "./overlap"):
        assert list(further_scores([name], ["a"], ["a"])) == ["overlap", "overlap_size", "overlap_rows"]


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ("boom", r"overlap\.py, which computes each row alone, failed on row 8: KeyError: 'boom'\."),
        ("nothing", r"overlap\.py gave row 8 the numbers none; expected the numbers overlap, overlap_size, overlap_rows\."),
        ("less", r"overlap\.py gave row 8 the numbers overlap, overlap_rows; expected the numbers overlap, overlap_size"),
    ],
)
def test_a_row_on_which_an_evaluate_metric_fails_is_named(script: str, reply: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        further_scores([script], ["fine", reply], ["a", "b"], rows=[4, 8])


def test_a_metric_of_the_hub_out_of_reach_says_what_to_do() -> None:
    with pytest.raises(
        UserError, match=r"metric no_such_metric cannot be loaded: .*load it once with a network.*FILE.py:function"
    ):
        load_metrics(["no_such_metric"])


def test_a_metric_of_the_hub_is_loaded_by_its_name_and_gives_columns_by_its_last_part(
    script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = evaluate.load(script, keep_in_memory=True)
    asked: list[str] = []

    def load(name: str, **_: object) -> object:
        asked.append(name)
        return local

    monkeypatch.setattr(evaluate, "load", load)
    assert list(further_scores(["someone/overlap", "size"], ["a"], ["a"])) == [
        "overlap", "overlap_size", "overlap_rows", "size_overlap", "size", "size_rows",
    ]  # fmt: skip
    assert asked == ["someone/overlap", "size"]


def test_a_script_without_a_metric_says_how_a_function_is_named(tmp_path: Path) -> None:
    file = metric_file(tmp_path, "def score(predictions, references):\n    return [1.0 for _ in predictions]\n")
    with pytest.raises(UserError, match=r"mine\.py cannot be loaded: .*a plain function is named FILE\.py:function"):
        load_metrics([file])


def test_a_function_gives_a_column_of_its_name(tmp_path: Path) -> None:
    file = metric_file(
        tmp_path,
        "import numpy as np\n"
        "def same(predictions, references):\n"
        "    return [one == other for one, other in zip(predictions, references)]\n"
        "def letters(predictions, references):\n"
        "    predictions.append('mine to change')\n"
        "    return np.array([len(each) for each in predictions[:-1]])\n",
    )
    scores = further_scores([f"{file}:same", f"{file}:letters"], ["ab", "\ud800"], ["ab", "d"])
    assert scores.to_dict("list") == {"same": [1.0, 0.0], "letters": [2.0, 1.0]}
    metric = further_metric("letters")
    assert (metric.name, metric.columns, metric.row_column, metric.higher_is_better) == ("letters", ("letters",), "letters", None)
    assert corpus_scores(scores, [metric, further_metric("same")]) == {"letters": 1.5, "same": 0.5}


def test_a_file_may_import_its_neighbour_and_define_data_classes(tmp_path: Path) -> None:
    metric_file(tmp_path, "SCORE = 0.75\n", "neighbour_of_mine.py")
    file = metric_file(
        tmp_path,
        "from __future__ import annotations\nfrom dataclasses import dataclass\nimport neighbour_of_mine\n"
        "@dataclass\nclass Held:\n    value: float\n"
        "def score(predictions, references):\n    return [Held(neighbour_of_mine.SCORE).value] * len(predictions)\n",
    )
    assert further_scores([f"{file}:score"], ["a"], ["b"])["score"].tolist() == [0.75]


def test_a_file_runs_once_until_it_changes(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\nwith open({log!r}, 'a') as log:\n    log.write('.')\ndef score(p, r):\n    return [{score}]\n"
    )
    log = tmp_path / "log"
    for score in (1, 1, 2):  # files of one size, written within one second
        file = metric_file(tmp_path, code.format(log=str(log), score=score))
        assert further_scores([f"{file}:score"], ["a"], ["b"])["score"].tolist() == [score]
    assert log.read_text() == ".."


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1.0]", r"mine\.py:score returned 1 scores for 2 rows; expected one number a row"),
        ("return 0.5", r"mine\.py:score returned a value of type float; expected a list of one number a row"),
        ("return None", r"mine\.py:score returned a value of type NoneType; expected"),
        ("return 'ab'", r"mine\.py:score returned a value of type str; expected"),
        ("return [0.5, float('nan')]", r"mine\.py:score gave row 7 the score nan; expected a finite number"),
        ("return [0.5, float('inf')]", r"mine\.py:score gave row 7 the score inf; expected a finite number"),
        ("return [0.5, 10 ** 400]", r"mine\.py:score gave row 7 the score 1000000000"),
        ("return ['1', 0.5]", r"mine\.py:score gave row 3 the score '1'; expected a finite number"),
        ("return [0.5, [0.5]]", r"mine\.py:score gave row 7 the score \[0\.5\]; expected a finite number"),
        (
            "return [1 / len(each) for each in p]",
            r"mine\.py:score failed on row 7 in line 2: ZeroDivisionError: division by zero\.",
        ),
        ("return [1, 2] if p[1:] and p.clear() else p[1]", r"mine\.py:score failed on row 3 in line 2: IndexError: list index"),
        ("if len(p) == 2: raise StopIteration\n    return [1]", r"mine\.py:score failed in line 2: StopIteration\."),
    ],
)
def test_what_a_function_does_wrong_is_told_with_its_file_and_row(tmp_path: Path, body: str, message: str) -> None:
    file = metric_file(tmp_path, f"def score(p, r):\n    {body}\n")
    with pytest.raises(UserError, match=message):
        further_scores([f"{file}:score"], ["a", ""], ["b", "c"], rows=[3, 7])


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("x = 1\ny = x / 0\n", r"mine\.py failed while it was loaded in line 2: ZeroDivisionError: division by zero\."),
        ("def score(:\n", r"mine\.py failed while it was loaded: SyntaxError: invalid syntax \(mine\.py, line 1\)\."),
        ("import no_such_package\n", r"mine\.py failed while it was loaded in line 1: ModuleNotFoundError: No module named"),
        ("def scores(p, r):\n    return p\n", r"mine\.py has no function 'score'\. Did you mean 'scores'\?"),
        ("score = 3\n", r"mine\.py has no function 'score'\.$"),
    ],
)
def test_a_file_that_cannot_be_loaded_is_named_with_the_line(tmp_path: Path, code: str, message: str) -> None:
    file = metric_file(tmp_path, code)
    for _ in range(2):  # a module that failed is not taken for loaded the next time
        with pytest.raises(UserError, match=message):
            load_metrics([f"{file}:score"])


@pytest.mark.parametrize("name", ["gone.py:score", "gone.py"])
def test_a_file_that_is_not_there_is_named_in_full(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"The metric {name} cannot be loaded: there is no file {tmp_path}/gone\.py\."):
        load_metrics([name])


def test_a_column_that_exists_already_is_refused(tmp_path: Path) -> None:
    ones = "return [1.0] * len(p)"
    file = metric_file(tmp_path, f"def bleu(p, r):\n    {ones}\ndef mine(p, r):\n    {ones}\n")
    other = metric_file(tmp_path, f"def mine(p, r):\n    {ones}\n", "other.py")
    with pytest.raises(UserError, match=r"mine\.py:bleu makes a column 'bleu', which exists already"):
        further_scores([f"{file}:bleu"], ["a"], ["b"])
    with pytest.raises(UserError, match=r"other\.py:mine makes a column 'mine', which exists already"):
        further_scores([f"{file}:mine", f"{other}:mine"], ["a"], ["b"])


def test_no_further_metrics_give_a_table_without_columns_and_a_line_per_row() -> None:
    assert further_scores([], ["a", "b"], ["c", "d"]).shape == (2, 0)


def test_an_interrupt_in_a_function_is_not_taken_for_its_failure(tmp_path: Path) -> None:
    file = metric_file(tmp_path, "def score(p, r):\n    raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        further_scores([f"{file}:score"], ["a"], ["b"])


def test_scores_of_equal_texts_are_the_best_there_are() -> None:
    scores = corpus_scores(scores_by_row(REFERENCES, REFERENCES))
    assert all(math.isclose(value, 1.0) for value in scores.values())
