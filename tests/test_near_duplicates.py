from __future__ import annotations

import random
import string

import pytest

from finetune_dataflow.engine.near_duplicates import Near, grams, leaking_rows, near_rows, rows_per_band
from finetune_dataflow.engine.tokens import DroppedRow

# 24 letters have 20 grams; with one more at the end, all 20 of 21 are shared: 0.952. With two more, 20 of 22: 0.909.
ALPHABET = "abcdefghijklmnopqrstuvwx"


def random_text(draw: random.Random, length: int) -> str:
    return "".join(draw.choices(string.ascii_lowercase + string.digits, k=length))


def test_grams_are_the_distinct_pieces_of_five_characters() -> None:
    assert grams("aaaaaab") == {"aaaaa", "aaaab"}


@pytest.mark.parametrize("text", ["", "a", "abcd", "abcde"])
def test_a_text_of_up_to_five_characters_is_its_one_gram(text: str) -> None:
    assert grams(text) == {text}


def test_similarity_is_the_exact_jaccard_index_of_the_grams() -> None:
    assert near_rows([ALPHABET + "y"], [ALPHABET]) == [Near(0, 0, 20 / 21)]


def test_a_pair_at_exactly_the_threshold_is_near() -> None:
    # 18 grams and two more: 18 / 20.
    assert near_rows([ALPHABET[:22] + "yz"], [ALPHABET[:22]]) == [Near(0, 0, 0.9)]


def test_a_pair_just_below_the_threshold_is_not_near() -> None:
    # 17 of 19 grams: 0.895.
    assert near_rows([ALPHABET[:21] + "yz"], [ALPHABET[:21]]) == []


def test_equal_normalised_texts_are_at_one() -> None:
    assert near_rows(["  How DO I\treset my \uff50assword"], ["how do i reset my password"]) == [Near(0, 0, 1.0)]


def test_short_texts_are_near_only_when_equal() -> None:
    assert near_rows(["yes", "yess", ""], ["no", "YES"]) == [Near(0, 1, 1.0)]


def test_the_nearest_of_several_is_named() -> None:
    assert near_rows([ALPHABET], [ALPHABET + "yz", ALPHABET + "y", ALPHABET + "yzz"]) == [Near(0, 1, 20 / 21)]


def test_of_equally_near_texts_the_first_is_named() -> None:
    assert near_rows([ALPHABET], ["other text", ALPHABET + "1", ALPHABET + "2"]) == [Near(0, 1, 20 / 21)]


def test_a_repeated_text_is_reported_at_each_of_its_places_against_the_first_of_its_like() -> None:
    assert near_rows(["x", "same text", "Same  text"], ["same text", "same text"]) == [Near(1, 0, 1.0), Near(2, 0, 1.0)]


def test_nothing_is_near_to_nothing() -> None:
    assert near_rows([], ["a"]) == near_rows(["a"], []) == []


def test_half_of_a_surrogate_pair_is_compared_like_any_character() -> None:
    assert near_rows([ALPHABET + "\ud800", "\ud800"], [ALPHABET]) == [Near(0, 0, 20 / 21)]


def test_the_bands_for_nine_tenths_have_twelve_slots() -> None:
    assert rows_per_band(0.9) == 12
    assert (1 - 0.9**12) ** (288 // 12) < 4e-4


def test_a_lower_threshold_gets_shorter_bands() -> None:
    assert (rows_per_band(0.8), rows_per_band(0.5)) == (6, 3)


@pytest.mark.parametrize("threshold", [0.0, -0.5, 1.1])
def test_a_threshold_outside_its_range_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        near_rows(["a"], ["a"], threshold)


def test_of_5000_random_pairs_at_exactly_nine_tenths_at_most_five_are_missed() -> None:
    draw = random.Random(20)
    against = [random_text(draw, 99) for _ in range(5000)]
    # 95 grams; a changed letter inside changes five: 90 / 100.
    texts = [text[:50] + "-" + text[51:] for text in against]
    found = near_rows(texts, against)
    assert {each.similarity for each in found} == {0.9}
    assert all(each.index == each.against for each in found)
    assert len(found) >= 4995


def test_of_2000_random_pairs_of_short_texts_at_nine_tenths_at_most_two_are_missed() -> None:
    draw = random.Random(21)
    against = [random_text(draw, 22) for _ in range(2000)]
    assert len(near_rows([text + "-+" for text in against], against)) >= 1998


def test_what_the_search_finds_is_what_comparing_all_pairs_finds() -> None:
    draw = random.Random(22)
    words = [random_text(draw, 5) for _ in range(12)]
    texts = [" ".join(draw.choices(words, k=3)) + " the same long ending of every one of these rows" for _ in range(150)]
    against = texts[:10] + [text + draw.choice("xyz") for text in texts[100:]]

    def jaccard(left: str, right: str) -> float:
        return len(grams(left) & grams(right)) / len(grams(left) | grams(right))

    nearest = {index: max(jaccard(text, other) for other in against) for index, text in enumerate(texts)}
    expected = {index: similarity for index, similarity in nearest.items() if similarity >= 0.9}
    assert {each.index: each.similarity for each in near_rows(texts, against)} == expected
    assert 0 < len(expected) < 150


def test_a_training_row_near_a_hold_out_row_is_dropped() -> None:
    assert leaking_rows([(4, ALPHABET + "y"), (5, "another question")], [], [(9, ALPHABET)]) == (DroppedRow(4, "near_hold_out"),)


def test_a_validation_row_near_a_hold_out_row_is_dropped() -> None:
    assert leaking_rows([], [(4, ALPHABET + "y")], [(9, ALPHABET)]) == (DroppedRow(4, "near_hold_out"),)


def test_a_training_row_near_a_validation_row_is_dropped() -> None:
    assert leaking_rows([(4, ALPHABET + "y")], [(9, ALPHABET)], [(2, "another question")]) == (DroppedRow(4, "near_validation"),)


def test_a_row_near_both_sets_is_dropped_once_for_the_hold_out() -> None:
    # 16 grams: one more at either end makes 16 / 17; the two ends differ, 16 / 18.
    train, validation, hold_out = ALPHABET[:20], "1" + ALPHABET[:20], ALPHABET[:20] + "2"
    assert near_rows([validation], [hold_out]) == []
    dropped = leaking_rows([(1, train)], [(2, validation)], [(3, hold_out)])
    assert dropped == (DroppedRow(1, "near_hold_out"),)


def test_a_dropped_validation_row_makes_no_training_row_near_validation() -> None:
    train, validation, hold_out = "1" + ALPHABET[:20], ALPHABET[:20], ALPHABET[:20] + "2"
    assert len(near_rows([train], [validation])) == 1
    assert leaking_rows([(1, train)], [(2, validation)], [(3, hold_out)]) == (DroppedRow(2, "near_hold_out"),)


def test_dropped_rows_are_in_the_order_of_their_numbers() -> None:
    train, validation = [(7, "alpha beta"), (3, "gamma delta")], [(5, "GAMMA delta"), (1, "x alpha")]
    dropped = leaking_rows(train, validation, [(2, "X  alpha"), (6, "alpha beta")])
    assert [(each.row, each.reason) for each in dropped] == [(1, "near_hold_out"), (3, "near_validation"), (7, "near_hold_out")]


def test_near_rows_of_one_set_are_left_alone() -> None:
    assert leaking_rows([(1, ALPHABET), (2, ALPHABET)], [(3, "b"), (4, "b")], [(5, "c"), (6, "c")]) == ()


@pytest.mark.parametrize(("tail", "near"), [(20, 60), (60, 0)])
def test_rows_with_a_long_text_in_common_are_near_by_what_sets_them_apart(tail: int, near: int) -> None:
    draw = random.Random(23)
    common = random_text(draw, 404)
    texts = [common + random_text(draw, tail) for _ in range(120)]
    # 400 grams are shared: 400 / 440 with a tail of 20, and 400 / 520 with one of 60.
    found = near_rows(texts[:60], texts[60:])
    assert len(found) == near
    # A few tails begin alike, which adds a gram or two.
    assert all(400 / 440 <= each.similarity <= 403 / 437 for each in found)


def test_two_rows_beneath_a_common_template_are_still_found() -> None:
    draw = random.Random(24)
    common = random_text(draw, 404)
    texts = [common + random_text(draw, 60) for _ in range(100)]
    assert near_rows([texts[70][:-1] + "-"], texts) == [Near(0, 70, 459 / 461)]
