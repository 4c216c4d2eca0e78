import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_dataflow.engine import paired
from finetune_dataflow.engine.paired import (
    Floats,
    Interval,
    Outcomes,
    difference_interval,
    interval,
    outcomes,
    permutation_p,
    rows_needed,
    smallest_clear,
    student_quantile,
)


def ratio(sums: Floats) -> Floats:
    return sums[..., 0] / sums[..., 1]


def f_score(sums: Floats) -> Floats:
    return 2 * sums[..., 0] / (sums[..., 1] + sums[..., 2])


def scores(*values: float) -> Floats:
    """The parts of a mean."""
    return np.array([[each, 1.0] for each in values])


def skewed(random: np.random.Generator, rows: int) -> tuple[Floats, Floats]:
    """60 % of the rows are zero under both models, the others gain 0.25 on average: the true difference is 0.1."""
    return scores(*np.zeros(rows)), scores(*(random.beta(1, 3, rows) * (random.random(rows) < 0.4)))


def by_token(random: np.random.Generator, rows: int) -> tuple[Floats, Floats]:
    """Losses of rows of very different lengths; each token's falls by 0.3, and varies by row with heavy tails."""
    tokens = np.maximum(1, np.round(random.lognormal(3.4, 0.6, rows)))
    base, change = random.lognormal(0.5, 0.4, rows), -0.3 + 0.3 * random.standard_t(3, rows)
    return np.stack([base * tokens, tokens], axis=1), np.stack([(base + change) * tokens, tokens], axis=1)


def matches(random: np.random.Generator, rows: int) -> tuple[Floats, Floats]:
    """Matches, tokens of the reply and tokens of the reference."""
    lengths = random.integers(5, 40, (rows, 2))
    rate = random.beta(2, 4, rows)
    found = [random.binomial(lengths.min(axis=1), np.minimum(rate + more, 1)) for more in (0.0, 0.15)]
    return np.column_stack([found[0], lengths]).astype(float), np.column_stack([found[1], lengths]).astype(float)


@pytest.mark.parametrize("rows", [24, 40, 100])
@pytest.mark.parametrize(("population", "true"), [(skewed, 0.1), (by_token, -0.3)])
def test_95_percent_intervals_hold_the_true_difference_in_93_to_97_percent_of_the_samples(
    population: Callable[[np.random.Generator, int], tuple[Floats, Floats]], true: float, rows: int
) -> None:
    random = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        found = difference_interval(*population(random, rows), ratio, resamples=399)
        held += found.low <= true <= found.high
    assert 0.93 <= held / 2000 <= 0.97


def test_the_interval_is_that_of_the_studentised_bootstrap_worked_out_row_by_row() -> None:
    values = [0.0, 0.9, 0.1, 0.0, 0.4, 0.0]
    mean, variance = sum(values) / 6, float(np.var(values, ddof=1)) / 6
    distances = []
    for drawn in np.random.default_rng(7).integers(0, 6, (199, 6)):
        sample = [values[each] for each in drawn]
        mixed = 5 / 6 * float(np.var(sample, ddof=1)) / 6 + variance / 6
        distances.append(abs(sum(sample) / 6 - mean) / math.sqrt(mixed))
    reach = sorted(distances)[189] * math.sqrt(variance)  # the 190th of 199 is the 95th percentile
    found = interval(scores(*values), ratio, resamples=199, random_state=7)
    assert sorted(distances)[189] > 2.5706  # else Student's t would decide
    assert (found.mean, found.low, found.high) == pytest.approx((mean, mean - reach, mean + reach), rel=1e-7)


def test_the_interval_is_never_narrower_than_that_of_students_t() -> None:
    values = [1.0, 2.0, 3.0, 4.0, 6.0]  # mean 3.2, variance 3.7; t with 4 degrees of freedom is 2.776445
    found = interval(scores(*values), ratio, resamples=1, random_state=1)
    reach = 2.776445 * math.sqrt(3.7 / 5)
    assert (found.low, found.high) == pytest.approx((3.2 - reach, 3.2 + reach), rel=1e-6)


def test_the_interval_of_many_rows_is_that_of_the_normal_distribution() -> None:
    random = np.random.default_rng(1)
    base = scores(*random.beta(2, 5, 100_000))
    tuned = base + np.outer(random.normal(0.05, 0.2, 100_000), [1, 0])
    gains = (tuned - base)[:, 0]
    found = difference_interval(base, tuned, ratio, resamples=999)
    reach = 1.96 * gains.std() / math.sqrt(100_000)
    assert found.mean == pytest.approx(gains.mean())
    assert (found.high - found.mean, found.mean - found.low) == pytest.approx((reach, reach), rel=0.06)


def test_rows_in_blocks_have_the_interval_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = skewed(np.random.default_rng(2), 4001)
    by_row = difference_interval(base, tuned, ratio, resamples=1999)
    monkeypatch.setattr(paired, "MOST_ROWS", 500)
    by_block = difference_interval(base, tuned, ratio, resamples=1999)
    assert by_block.mean == by_row.mean
    assert by_block != by_row and by_block.high == pytest.approx(by_row.high, abs=0.06 * (by_row.high - by_row.mean))


def test_neither_the_interval_nor_p_depends_on_how_many_resamples_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = by_token(np.random.default_rng(3), 30)
    whole = difference_interval(base, tuned, ratio, 501), permutation_p(base, tuned, ratio, 501)
    monkeypatch.setattr(paired, "CHUNK", 30 * 4 * 20)
    low_memory = difference_interval(base, tuned, ratio, 501), permutation_p(base, tuned, ratio, 501)
    assert (low_memory[0].low, low_memory[0].high) == pytest.approx((whole[0].low, whole[0].high))
    assert low_memory[1] == whole[1]


def test_the_standard_error_of_a_score_that_is_no_mean_is_that_of_the_jackknife() -> None:
    base, tuned = matches(np.random.default_rng(4), 400)

    def without(row: int) -> float:
        kept = np.arange(400) != row
        return float(f_score(tuned[kept].sum(axis=0)) - f_score(base[kept].sum(axis=0)))

    left_out = np.array([without(row) for row in range(400)])
    error = math.sqrt(399 / 400 * ((left_out - left_out.mean()) ** 2).sum())
    found = smallest_clear(base, tuned, f_score) / (1.965927 + 0.841621)  # t with 399 degrees of freedom, and 80 % power
    assert found == pytest.approx(error, rel=0.005)


def test_exchanged_models_have_the_interval_mirrored() -> None:
    base, tuned = matches(np.random.default_rng(5), 30)
    there, back = difference_interval(base, tuned, f_score, 499), difference_interval(tuned, base, f_score, 499)
    assert (back.mean, back.low, back.high) == pytest.approx((-there.mean, -there.high, -there.low))


def test_the_interval_is_the_same_on_every_call_and_another_for_another_seed() -> None:
    base, tuned = skewed(np.random.default_rng(6), 24)
    assert difference_interval(base, tuned, ratio, 499) == difference_interval(base, tuned, ratio, 499)
    assert difference_interval(base, tuned, ratio, 499) != difference_interval(base, tuned, ratio, 499, random_state=1)


def test_more_confidence_takes_a_wider_interval() -> None:
    parts = by_token(np.random.default_rng(6), 24)[1]
    narrow, usual, wide = (interval(parts, ratio, 999, confidence) for confidence in (0.5, 0.95, 0.99))
    assert wide.low < usual.low < narrow.low < narrow.mean < narrow.high < usual.high < wide.high


def test_the_ends_stay_within_the_limits_of_the_score() -> None:
    found = interval(scores(0, 0, 0, 0, 0.9), ratio, 499, limits=(0, 1))
    assert found.mean == pytest.approx(0.18) and found.low == 0 and 0.18 < found.high <= 1


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.floats(0, 1)), min_size=1, max_size=8), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_an_interval_always_holds_the_difference_and_is_finite(rows: list[tuple[float, float]], seed: int) -> None:
    base, tuned = scores(*(each[0] for each in rows)), scores(*(each[1] for each in rows))
    found = difference_interval(base, tuned, ratio, 99, random_state=seed)
    assert -math.inf < found.low <= found.mean <= found.high < math.inf
    assert 0 < permutation_p(base, tuned, ratio, 99) <= 1


def test_one_row_and_rows_that_differ_alike_have_an_interval_of_no_width() -> None:
    assert interval(scores(0.25), ratio) == Interval(0.25, 0.25, 0.25)
    assert interval(scores(0, 0, 0), ratio) == Interval(0, 0, 0)
    base = np.random.default_rng(0).random(20).round(2)
    found = difference_interval(scores(*base), scores(*(base + 0.1)), ratio)
    assert found.low == found.mean == found.high == pytest.approx(0.1)


def test_two_rows_are_held_to_the_wide_interval_of_one_degree_of_freedom() -> None:
    found = interval(scores(0.4, 0.6), ratio)
    assert (found.low, found.mean, found.high) == pytest.approx((0.5 - 12.7062 * 0.1, 0.5, 0.5 + 12.7062 * 0.1), rel=1e-5)


def test_a_resample_without_a_score_is_left_out() -> None:
    parts = np.array([[1.0, 1.0], [2.0, 2.0], [4.0, 0.0], [3.0, 2.0], [1.0, 0.0]])
    found = interval(parts, ratio, 999)  # one in a hundred draws the last and the third row alone, and divides by zero
    assert found.mean == pytest.approx(2.2) and math.isfinite(found.low) and math.isfinite(found.high)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (scores(0.1, math.nan), "parts has a value that is not finite in row 1"),
        (scores(math.inf, 0.1), "not finite in row 0"),
        (np.zeros((0, 2)), r"shape \(0, 2\); expected \[rows, k\]"),
        (np.zeros(3), r"shape \(3,\); expected \[rows, k\]"),
        (np.zeros((3, 2)), "the score is nan"),
    ],
)
def test_parts_that_have_no_score_are_refused(parts: Floats, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        interval(parts, ratio)


def test_models_on_other_rows_are_refused() -> None:
    for function in (difference_interval, permutation_p, rows_needed, smallest_clear):
        with pytest.raises(ValueError, match=r"base and tuned have the shapes \(2, 2\) and \(3, 2\)"):
            function(scores(1, 2), scores(1, 2, 3), ratio)
    with pytest.raises(ValueError, match="tuned has a value that is not finite in row 0"):
        permutation_p(scores(1), scores(math.nan), ratio)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="confidence is 95"):
        interval(scores(1, 2), ratio, confidence=95)
    with pytest.raises(ValueError, match="resamples 0"):
        interval(scores(1, 2), ratio, resamples=0)
    with pytest.raises(ValueError, match="permutations is 0"):
        permutation_p(scores(1, 2), scores(2, 4), ratio, permutations=0)
    with pytest.raises(ValueError, match="power is 80"):
        rows_needed(scores(1, 2), scores(2, 4), ratio, power=80)


def test_p_of_three_gains_is_two_of_eight_exchanges() -> None:
    assert permutation_p(scores(0, 0, 0), scores(0.1, 0.2, 0.3), ratio) == 2 / 8
    assert permutation_p(scores(0, 0, 0), scores(0.3, 0.2, -0.1), ratio) == 4 / 8  # |0.4|: +++ is 0.6, ++- 0.4, and their mirrors


def test_p_of_few_rows_is_that_of_every_exchange() -> None:
    base, tuned = matches(np.random.default_rng(8), 9)
    both = np.stack([base, tuned])
    found = []
    for choice in itertools.product((0, 1), repeat=9):
        first = sum(both[which, row] for row, which in enumerate(choice))
        second = sum(both[1 - which, row] for row, which in enumerate(choice))
        found.append(2 * second[0] / (second[1] + second[2]) - 2 * first[0] / (first[1] + first[2]))
    expected = sum(abs(each) >= abs(found[0]) - 1e-12 for each in found) / 512
    assert 0 < expected < 1 and permutation_p(base, tuned, f_score) == expected


def test_p_of_many_rows_counts_the_observed_exchange_so_that_it_is_never_zero() -> None:
    gains = scores(*np.linspace(1, 2, 13)), scores(*np.linspace(1, 2, 40))
    assert permutation_p(gains[0] * [0, 1], gains[0], ratio, 99) == 2 / 8192
    assert permutation_p(gains[1] * [0, 1], gains[1], ratio, 99) == 1 / 100


def test_random_exchanges_agree_with_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = skewed(np.random.default_rng(9), 30)
    tuned[:, 0] -= 0.06 * (tuned[:, 0] > 0)
    monkeypatch.setattr(paired, "EXACT_ROWS", 30)
    exact = permutation_p(base, tuned, ratio)
    monkeypatch.setattr(paired, "EXACT_ROWS", 0)
    assert permutation_p(base, tuned, ratio) == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 9999))


def test_rows_without_a_difference_leave_p_as_it_is() -> None:
    base, tuned = by_token(np.random.default_rng(10), 25)
    random = np.random.default_rng(11).random((12, 1))
    for first, second in ((base, tuned), (base[:6], tuned[:6])):
        equal = [random * [3.0, 0.0] + [0.0, 5.0]] * 2
        more = np.vstack([first, equal[0]]), np.vstack([second, equal[1]])
        assert permutation_p(*more, ratio, 999) == permutation_p(first, second, ratio, 999)
    assert permutation_p(base, base, ratio) == 1


def test_the_permutation_test_keeps_its_level_where_there_is_no_difference() -> None:
    random = np.random.default_rng(12)
    found = []
    for _ in range(1000):
        both = random.beta(1, 3, (2, 20)) * (random.random(20) < 0.9)
        found.append(permutation_p(scores(*both[0]), scores(*both[1]), ratio, 199))
    assert 0.03 <= np.mean(np.array(found) <= 0.05) <= 0.07
    assert 0.45 <= np.mean(found) <= 0.55


def test_p_of_a_hundred_thousand_rows_is_that_of_the_normal_distribution() -> None:
    random = np.random.default_rng(13)
    gains = random.normal(0, 1, 100_000)
    gains += 1.0 / math.sqrt(100_000) - gains.mean()  # one standard error above 0: p is 0.317
    zeros = scores(*np.zeros(100_000))
    assert permutation_p(zeros, scores(*gains), ratio, 1999) == pytest.approx(0.317, abs=0.045)


@pytest.mark.parametrize(
    ("freedom", "expected"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (9, 2.2622), (10, 2.2281), (23, 2.0687), (100, 1.9840), (1000, 1.9623)],
)
def test_quantiles_of_students_t_are_those_of_the_tables(freedom: int, expected: float) -> None:
    assert student_quantile(0.975, freedom) == pytest.approx(expected, abs=5e-5)


def test_the_expansion_of_students_t_carries_on_where_the_series_ends() -> None:
    steps = [student_quantile(0.975, freedom) - student_quantile(0.975, freedom + 1) for freedom in (198, 199, 200)]
    assert steps == sorted(steps, reverse=True) and steps[1] == pytest.approx((steps[0] + steps[2]) / 2, rel=1e-3)
    assert student_quantile(0.975, math.inf) == pytest.approx(1.959964, abs=1e-6)


def test_wins_ties_and_losses_are_counted() -> None:
    base, tuned = np.array([0.1, 0.2, 0.3, 0.0, 0.5]), np.array([0.2, 0.2 + 1e-12, 0.1, 0.0, 0.9])
    assert outcomes(base, tuned) == Outcomes(wins=2, ties=2, losses=1)
    assert outcomes(base, tuned, higher_is_better=False) == Outcomes(wins=1, ties=2, losses=2)
    assert outcomes(base, tuned, tolerance=0.15) == Outcomes(wins=1, ties=3, losses=1)
    assert outcomes(np.zeros(0), np.zeros(0)) == Outcomes(0, 0, 0)


def test_outcomes_of_other_rows_or_of_no_number_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shapes \(2,\) and \(3,\)"):
        outcomes(np.zeros(2), np.zeros(3))
    with pytest.raises(ValueError, match="row 1 has a score that is not a number"):
        outcomes(np.zeros(2), np.array([0, math.nan]))


def power(base: Floats, tuned: Floats, rows: int, statistic: paired.Statistic) -> float:
    """The share of samples of so many rows, drawn from these, whose interval shows a difference."""
    random = np.random.default_rng(15)
    shown = 0
    for _ in range(400):
        drawn = random.integers(0, len(base), rows)
        found = difference_interval(base[drawn], tuned[drawn], statistic, resamples=199)
        shown += found.low > 0 or found.high < 0
    return shown / 400


@pytest.mark.parametrize(
    ("population", "statistic"), [(skewed, ratio), (by_token, ratio), (matches, f_score)], ids=["skewed", "loss", "f"]
)
def test_as_many_rows_as_are_needed_show_the_difference_four_times_in_five(
    population: Callable[[np.random.Generator, int], tuple[Floats, Floats]], statistic: paired.Statistic
) -> None:
    base, tuned = population(np.random.default_rng(16), 2000)
    needed = rows_needed(base, tuned, statistic)
    assert needed is not None and 0.7 <= power(base, tuned, needed, statistic) <= 0.9


@pytest.mark.parametrize("rows", [12, 60])
def test_the_smallest_clear_difference_is_shown_four_times_in_five(rows: int) -> None:
    random = np.random.default_rng(17)
    base = scores(*random.beta(2, 5, 5000))
    changes = random.normal(0, 0.1, 5000)
    changes = (changes - changes.mean()) / changes.std()
    spread = math.sqrt((rows - 1) / rows)  # the population's standard deviation is 1; that of these rows, too
    sample = np.resize([spread, -spread], rows)
    clear = smallest_clear(scores(*np.zeros(rows)), scores(*sample), ratio)
    assert 0.7 <= power(base, base + np.outer(changes + clear, [1, 0]), rows, ratio) <= 0.9


def test_the_rows_needed_for_the_smallest_clear_difference_are_those_there_are() -> None:
    base, tuned = by_token(np.random.default_rng(18), 37)
    clear = smallest_clear(base, tuned, ratio, power=0.9)
    moved = tuned.copy()
    moved[:, 0] += tuned[:, 1] * (clear - float(ratio(tuned.sum(axis=0)) - ratio(base.sum(axis=0))))
    assert rows_needed(base, moved, ratio, power=0.9) in (37, 38)


def test_more_power_takes_more_rows() -> None:
    base, tuned = skewed(np.random.default_rng(19), 100)
    some, more = rows_needed(base, tuned, ratio), rows_needed(base, tuned, ratio, power=0.95)
    assert some is not None and more is not None and some < more


def test_rows_needed_where_nothing_varies() -> None:
    assert rows_needed(scores(1, 2, 3), scores(1, 2, 3), ratio) is None
    assert rows_needed(scores(1, 2), scores(2, 1), ratio) is None  # the scores differ on each row, not on the whole
    assert rows_needed(scores(1), scores(2), ratio) is None
    assert rows_needed(scores(1, 2, 3), scores(2, 3, 4), ratio) == 2
    assert smallest_clear(scores(1, 2, 3), scores(2, 3, 4), ratio) == 0
    assert smallest_clear(scores(1), scores(2), ratio) == math.inf
