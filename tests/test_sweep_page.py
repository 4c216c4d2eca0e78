"""What a sweep ends with: the table on the terminal, which parameters mattered, the figures, and the page."""

from __future__ import annotations

import json
import math
import re
from itertools import combinations
from typing import Any

import plotly.graph_objects as go
import pytest

from finetune_dataflow.engine.page import Cell, Chart, Code, Page, Prose, Section, Table
from finetune_dataflow.sweeps import figures
from finetune_dataflow.sweeps.page import page, said_time, sweep_page
from finetune_dataflow.sweeps.results import (
    SweepResult,
    TrialResult,
    complete,
    importance_note,
    importances,
    measured,
    ordered,
    said,
    table,
    varying,
)

HOSTILE = (
    '</script><script>window.__hacked = 1</script><img src=x onerror="window.__hacked=1">\x1b[2J\u202e\n$x$ %{y}' + "z" * 5000
)
VERDICT = "The tuned model is better than the base model: its ROUGE-L is 0.200 higher on 12 rows it never saw."
HOLD_OUT = {
    "base": {"rougeL": 0.111, "loss": 2.5},
    "finetuned": {"rougeL": 0.311, "loss": 1.75},
    "difference": {"rougeL": {"mean": 0.2, "low": 0.1, "high": 0.3}},
    "verdict": VERDICT,
}


def trial(number: int, value: float | None, state: str = "complete", **parameters: Any) -> TrialResult:
    """A trial of ten seconds, whose loss falls to its value in forty updates."""
    curve = () if value is None else tuple((step, value + 1 - step / 40) for step in (10, 20, 30, 40))
    error = "ValueError: no finite loss" if state == "failed" else None
    return TrialResult(number, state, parameters, value, {}, curve, 10.0, error, f"sweep/trials/{number}")


def sweep(*trials: TrialResult, goal: str = "minimize", **others: Any) -> SweepResult:
    """A sweep of these trials; of equal ones the first is the best."""
    values = {each.number: each.value for each in trials if each.state == "complete" and each.value is not None}
    best = (max if goal == "maximize" else min)(values, key=lambda number: values[number], default=None)
    told: dict[str, Any] = {"metric": "validation_loss", "best": best, "best_metrics": None, "parameters": (), **others}
    return SweepResult("tuning", "sweep.yaml", "random", goal=goal, trials=trials, **told)


def many(count: int, **others: Any) -> SweepResult:
    """Trials of which a learning rate near 1e-3 makes good ones, and the rank makes no difference; each tenth failed."""
    made = []
    for number in range(count):
        rate = 10 ** (-5 + 4 * ((number * 0.618034) % 1))
        value = None if number % 10 == 9 else 2 + (math.log10(rate) + 3) ** 2 / 4 + 0.01 * ((number * 7) % 5)
        state = "failed" if value is None else "stopped" if number % 10 == 4 else "complete"
        settings: dict[str, Any] = {
            "learning_rate": rate,
            "lora_rank": (8, 16, 64)[number % 3],
            "lr_schedule": ("cosine", "linear")[number % 2],
        }
        made.append(trial(number, value, state, **settings))
    return sweep(*made, parameters=("learning_rate", "lora_rank", "lr_schedule"), **others)


def hostile_sweep(**others: Any) -> SweepResult:
    """A sweep whose every text is out for mischief."""
    texts_and_numbers: list[dict[str, Any]] = [{HOSTILE: f"{HOSTILE} {number % 3}", "x": number} for number in range(12)]
    made = [trial(number, 2.0 + number / 10, **each) for number, each in enumerate(texts_and_numbers)]
    failed = TrialResult(12, "failed", {HOSTILE: HOSTILE, "x": 1}, None, {HOSTILE: 1.0}, (), 1.0, HOSTILE, HOSTILE)
    texts = {"metric": HOSTILE, "best_metrics": {"verdict": HOSTILE}, "notes": (HOSTILE,)}
    whole = sweep(*made, failed, **{**texts, **others})
    return SweepResult(**{**vars(whole), "name": HOSTILE, "file": HOSTILE, "method": HOSTILE})


def section(made: Page, title: str) -> Section:
    return next(each for each in made.sections if each.title.startswith(title))


def block(made: Page, title: str, kind: type) -> Any:
    """The first block of a kind in a section."""
    return next(each for each in section(made, title).blocks if isinstance(each, kind))


def shown(value: Any) -> str:
    return value.text if isinstance(value, Cell) else str(value)


def trace(figure: go.Figure, name: str) -> Any:
    return next(each for each in figure.data if each.name is not None and each.name.startswith(name))


def notes(figure: go.Figure) -> str:
    return " ".join(figure.layout.title.subtitle.text.replace("<br>", " ").split())


def blank_text(figure: go.Figure) -> str:
    assert not figure.data
    return " ".join(" ".join(each.text for each in figure.layout.annotations).replace("<br>", " ").split())


def strict_json(figure: go.Figure) -> Any:
    """The figure's JSON, read by a reader that refuses NaN and Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in JSON")

    return json.loads(figure.to_json(), parse_constant=refuse)


# The table


def four_trials(**others: Any) -> SweepResult:
    error = "learning_rate=0.1: the loss is not finite after update 3. Expected a smaller learning rate than this one."
    return sweep(
        TrialResult(0, "complete", {"learning_rate": 1e-3, "lora_rank": 8, "epochs": 2}, 2.5, {}, (), 60.0, None, "0"),
        TrialResult(1, "complete", {"learning_rate": 3e-5, "lora_rank": 16, "epochs": 2}, 2.01342, {}, (), 61.23, None, "1"),
        TrialResult(2, "failed", {"learning_rate": 0.1, "lora_rank": 8, "epochs": 2}, None, {}, (), 1.0, error, "2"),
        TrialResult(3, "stopped", {"learning_rate": 0.01, "lora_rank": 8, "epochs": 2}, 1.5, {}, (), 12.5, None, "3"),
        parameters=("learning_rate", "lora_rank", "epochs"),
        **others,
    )


def test_a_sweep_prints_this_table() -> None:
    assert "\n".join(table(four_trials(notes=("The grid is done.",)))) == (
        """\
Sweep tuning, 4 trials: 2 complete, 1 stopped early, 1 failed. By
validation_loss, lower is better.

trial  state     validation_loss  learning_rate  lora_rank  seconds
    1  best               2.0134           3e-5         16     61.2
    0  complete           2.5000          0.001          8     60.0
    3  stopped            1.5000           0.01          8     12.5
    2  failed                  -            0.1          8      1.0
       learning_rate=0.1: the loss is not finite after update 3. Expected a sma…

The same in all: epochs=2

The grid is done."""
    )


def test_columns_that_do_not_fit_go_on_below_with_the_numbers_of_their_trials() -> None:
    assert "\n".join(table(four_trials(), width=46)) == (
        """\
Sweep tuning, 4 trials: 2 complete, 1 stopped
early, 1 failed. By validation_loss, lower is
better.

trial  state     validation_loss
    1  best               2.0134
    0  complete           2.5000
    3  stopped            1.5000
    2  failed                  -
       learning_rate=0.1: the loss is not fin…

trial  learning_rate  lora_rank  seconds
    1           3e-5         16     61.2
    0          0.001          8     60.0
    3           0.01          8     12.5
    2            0.1          8      1.0

The same in all: epochs=2"""
    )


def test_an_empty_sweep_says_so() -> None:
    assert table(sweep()) == ["The sweep tuning has no trials."]
    assert page(sweep()).headline == "The sweep has no trials."


def test_where_higher_is_better_the_highest_comes_first() -> None:
    made = sweep(trial(0, 0.2, a=1), trial(1, 0.4, a=2), trial(2, 0.3, a=3), goal="maximize", metric="rougeL")
    assert [each.number for each in ordered(made)] == [1, 2, 0]
    assert page(made).headline == "Trial 1 has the highest rougeL of 3 complete trials: 0.4000."


def test_of_equal_trials_the_first_is_the_best_and_the_page_says_that_none_is_better() -> None:
    made = sweep(*(trial(number, 2.0, a=number) for number in (2, 0, 1)), best=0)
    assert [each.number for each in ordered(made)] == [0, 1, 2]
    assert page(made).headline == "No trial is better than another: the validation_loss of all 3 that are complete is 2.0000."
    some = sweep(trial(0, 2.0, a=1), trial(1, 2.0, a=2), trial(2, 3.0, a=3))
    assert page(some).headline == "Trial 0 has the lowest validation_loss of 3 complete trials, as 1 other has: 2.0000."


def test_a_hostile_table_stays_in_its_width_and_on_its_lines() -> None:
    lines = table(hostile_sweep(), width=80)
    assert all(each.isprintable() for each in lines)
    assert max(map(len, lines)) <= 80
    assert sum("</script>" in each for each in lines) >= 13


def test_a_wide_character_takes_two_columns() -> None:
    made = sweep(trial(0, 2.0, a="日本"), trial(1, 3.0, a="ab"))
    assert table(made)[-2:] == [
        "    0  best               2.0000  日本     10.0",
        "    1  complete           3.0000  ab       10.0",
    ]


def test_values_are_said_as_people_write_them() -> None:
    values = [1e-05, 0.1, 3, True, None, "cosine", [1, "a"], 1e20, 0.00031415926, 1024.0]
    assert [*map(said, values)] == ["1e-5", "0.1", "3", "true", "null", "cosine", '[1, "a"]', "1e20", "0.0003142", "1024"]


def test_one_and_one_point_zero_are_one_value_but_not_true() -> None:
    assert varying(sweep(trial(0, 2.0, a=1), trial(1, 2.0, a=1.0))) == []
    assert varying(sweep(trial(0, 2.0, a=1), trial(1, 2.0, a=True))) == ["a"]
    assert varying(sweep(trial(0, 2.0, a=1), trial(1, 2.0))) == ["a"]


# Importance


def by_rank(parameter: list[Any], values: list[float] | None = None) -> SweepResult:
    """Twelve trials whose metric is their number, each with its value of one parameter."""
    pairs = zip(values or [float(each) for each in range(1, 13)], parameter, strict=True)
    return sweep(*(trial(number, value, a=setting) for number, (value, setting) in enumerate(pairs)))


def test_two_settings_that_part_the_order_explain_what_kelley_s_formula_says() -> None:
    # Between the groups 108 of 143, and 1 - 35 / 143 * 11 / 10 is left for the setting.
    assert importances(by_rank(["x"] * 6 + ["y"] * 6)) == {"a": pytest.approx(19 / 26)}


def test_a_number_of_many_values_is_taken_by_its_thirds_whatever_its_scale() -> None:
    # Between the thirds 128 of 143: 1 - 15 / 143 * 11 / 9.
    assert importances(by_rank(list(range(12)))) == {"a": pytest.approx(34 / 39)}
    assert importances(by_rank([10.0**-number for number in range(12)])) == {"a": pytest.approx(34 / 39)}


def test_a_best_value_in_the_middle_is_found_though_no_correlation_is() -> None:
    [found] = measured(by_rank([6, 5, 7, 4, 8, 3, 9, 2, 10, 1, 11, 0])).values()
    assert found.share > 0.5 and found.clear and abs(found.correlation or 0) < 0.2


def test_the_p_value_is_near_that_of_every_way_to_part_the_trials() -> None:
    [found] = measured(by_rank(["x", "x", "x", "x", "y", "x", "x", "y", "y", "y", "y", "y"])).values()
    sums = [sum(chosen) for chosen in combinations(range(1, 13), 6)]
    exact = sum(abs(each - 39) >= abs(1 + 2 + 3 + 4 + 6 + 7 - 39) for each in sums) / len(sums)
    assert found.p_value == pytest.approx(exact, abs=0.004)


def test_a_setting_that_makes_no_difference_explains_nothing() -> None:
    [found] = measured(by_rank(["x", "y"] * 6)).values()
    assert found.share == 0 and not found.clear


def test_a_trial_that_diverged_counts_as_the_last_and_no_more() -> None:
    values = [float(each) for each in range(1, 12)] + [1e9]
    assert importances(by_rank(["x"] * 6 + ["y"] * 6, values)) == importances(by_rank(["x"] * 6 + ["y"] * 6))


def test_the_parameter_that_matters_comes_first_and_the_others_are_no_more_than_chance() -> None:
    found = measured(many(60))
    assert next(iter(found)) == "learning_rate" and found["learning_rate"].clear
    assert not found["lora_rank"].clear and not found["lr_schedule"].clear


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (
            sweep(*(trial(number, float(number), a=number) for number in range(9))),
            "9 complete trials are too few to tell which parameters matter; at least 10 are needed.",
        ),
        (
            sweep(trial(0, 1.0, a=1)),
            "1 complete trial is too few to tell which parameters matter; at least 10 are needed.",
        ),
        (
            by_rank(list(range(12)), [2.0] * 12),
            "Every complete trial has the same validation_loss, so there is nothing to explain.",
        ),
        (by_rank(["x"] * 12), "No parameter differs between the complete trials."),
    ],
)
def test_without_importances_the_note_says_why(made: SweepResult, why: str) -> None:
    assert importances(made) == {}
    assert importance_note(made) == why
    assert blank_text(figures.importance_figure(made)) == why


def test_failed_and_stopped_trials_are_not_in_the_importances() -> None:
    made = by_rank(["x"] * 6 + ["y"] * 6)
    others = [trial(20, None, "failed", a="z"), trial(21, 0.1, "stopped", a="z"), trial(22, math.nan, a="z")]
    assert importances(SweepResult(**{**vars(made), "trials": (*made.trials, *others)})) == importances(made)
    assert list(complete(made).values()) == [float(each) for each in range(1, 13)]


# The figures


def test_a_logarithmic_parameter_stands_by_its_powers_of_ten() -> None:
    made = sweep(trial(0, 3.0, rate=1e-4), trial(1, 2.0, rate=1e-3), trial(2, 4.0, rate=1e-2))
    assert trace(figures.parallel_figure(made, frozenset({"rate"})), "best").y[0] == pytest.approx(0.5)
    assert trace(figures.parallel_figure(made), "best").y[0] == pytest.approx(0.0909, abs=1e-4)


def test_categories_have_their_labels_and_a_parameter_that_is_not_set_leaves_a_gap() -> None:
    made = sweep(trial(0, 3.0, kind="linear", a=1), trial(1, 2.0, kind="cosine", a=2), trial(2, 2.5, kind="<b>"))
    figure = figures.parallel_figure(made)
    labels = next(each for each in figure.data if each.mode == "text")
    assert {each.strip() for each in labels.text} >= {"cosine", "linear", "&lt;b&gt;", "1", "2", "3"}
    others = trace(figure, "others")
    points = list(zip(others.x, others.y, others.customdata, strict=True))
    assert [y for x, y, (number, _) in points if number == "2" and x == 1] == [None]
    assert ("2", "a: not set") in [tuple(each) for each in others.customdata]


def test_kinds_of_trials_differ_by_more_than_colour_and_the_best_is_thickest() -> None:
    figure = figures.parallel_figure(many(40))
    drawn = [each for each in figure.data if each.mode != "text"]
    assert [re.sub(r"\d+", "N", each.name) for each in drawn] == [
        "stopped early (N)",
        "others (N)",
        "best quarter (N)",
        "best: trial N",
    ]
    assert len({(each.line.width, each.line.dash) for each in drawn}) == len({each.marker.symbol for each in drawn}) == 4
    assert max(drawn, key=lambda each: each.line.width).name.startswith("best: trial")


def test_failed_trials_are_left_out_and_counted() -> None:
    figure = figures.parallel_figure(many(40))
    assert "4 trials left out, which have no value." in notes(figure)
    assert {number for each in figure.data if each.mode != "text" for number, _ in each.customdata} - {""} == {
        str(number) for number in range(40) if number % 10 != 9
    }


def test_one_trial_that_diverged_stands_at_the_edge_and_does_not_flatten_the_others() -> None:
    made = sweep(*(trial(number, 2.0 + number / 10, a=number) for number in range(10)), trial(10, 1e6, a=10))
    figure = figures.parallel_figure(made)
    assert "At the edge: 1 trial beyond 2.9000." in notes(figure)
    assert trace(figure, "best: trial 0").y[1] == 0
    others = trace(figure, "others")
    places = {number: y for x, y, (number, _) in zip(others.x, others.y, others.customdata, strict=True) if x == 1 and number}
    assert places["10"] == places["9"] == 1 and places["5"] == pytest.approx(5 / 9, abs=1e-4)
    assert max(figures.progress_figure(made).data[0].y) <= 3
    assert max(figures.curves_figure(made).layout.yaxis.range) < 10


def test_of_many_parameters_those_are_drawn_that_explain_most() -> None:
    def settings(number: int) -> dict[str, Any]:
        return {**{f"p{place}": (number * (place + 3)) % 7 for place in range(11)}, "last": number}

    made = sweep(*(trial(n, float(n), **settings(n)) for n in range(30)))
    figure = figures.parallel_figure(made)
    names = [each.text.replace("<br>", "") for each in figure.layout.annotations]
    assert len(names) == 7 and names[-2:] == ["last", "validation_loss"]
    assert "6 of 11 parameters are drawn, those that explain most." in notes(figure)


def test_the_best_so_far_never_gets_worse() -> None:
    lower = trace(figures.progress_figure(many(40)), "best so far").y
    assert list(lower) == sorted(lower, reverse=True)
    higher = trace(figures.progress_figure(many(40, goal="maximize")), "best so far").y
    assert list(higher) == sorted(higher)


def test_a_curve_that_was_stopped_ends_in_a_mark_and_the_best_has_a_star_at_its_least_loss() -> None:
    made = sweep(
        TrialResult(0, "complete", {"a": 1}, 2.0, {}, ((10, 3.0), (20, 2.0), (30, 2.2)), 1.0, None, "0"),
        TrialResult(1, "stopped", {"a": 2}, 2.8, {}, ((10, 3.0), (20, 2.8)), 1.0, None, "1"),
        TrialResult(2, "complete", {"a": 3}, 2.5, {}, ((10, math.nan), (20, 2.5)), 1.0, None, "2"),
    )
    figure = figures.curves_figure(made)
    marks = {each.legendgroup: (list(each.x), list(each.y), each.marker.symbol) for each in figure.data if each.mode == "markers"}
    assert marks == {"best": ([20], [2.0], "star"), "stopped": ([20], [2.8], "triangle-down-open")}
    lines = {each.legendgroup: list(each.y) for each in figure.data if each.mode.startswith("lines")}
    assert lines == {"stopped": [3.0, 2.8, None], "other": [2.5, None], "best": [3.0, 2.0, 2.2, None]}
    strict_json(figure)


@pytest.mark.parametrize(
    "draw", [figures.parallel_figure, figures.importance_figure, figures.curves_figure, figures.progress_figure]
)
def test_a_hostile_text_is_shown_to_the_letter_in_every_figure(draw: Any) -> None:
    text = json.dumps(strict_json(draw(hostile_sweep())), ensure_ascii=False)
    assert (
        "<script" not in text
        and "<img" not in text
        and "\x1b" not in text
        and "\u202e" not in text
        and "%{y}" not in text.replace("%{y}</extra>", "").replace("<br>%{y", "")
    )
    assert len(text) < 100_000


# The page


def test_the_page_gives_the_command_that_trains_the_best_trial_again() -> None:
    made = sweep(trial(0, 3.0, learning_rate=1e-3, note="it's"), trial(1, 2.0, learning_rate=3e-5, note="a b"))
    again, chosen = (each.text for each in section(page(made), "The best trial").blocks if isinstance(each, Code))
    assert again == "python run.py train -c sweep/trials/1/config.yaml --out ANOTHER_DIRECTORY"
    assert chosen == "--set learning_rate=3e-05 --set 'note=a b'"
    best = block(page(made, best_directory="my sweep/best"), "The best trial", Code)
    assert best.text == "python run.py train -c 'my sweep/best/config.yaml' --out ANOTHER_DIRECTORY"


def test_every_trial_is_a_row_and_a_failed_one_has_its_error() -> None:
    found: Table = block(page(many(40)), "All trials", Table)
    assert list(found.columns) == [
        "trial", "state", "validation_loss", "learning_rate", "lora_rank", "lr_schedule", "updates", "seconds", "error",
    ]  # fmt: skip
    assert {row[0].value for row in found.rows if isinstance(row[0], Cell)} == {*range(40)} and len(found.rows) == 40
    assert shown(found.rows[0][0]).endswith(" (best)") and found.rows[0][1] == "complete"
    assert [(row[1], row[-1]) for row in found.rows[-4:]] == [("failed", "ValueError: no finite loss")] * 4


def test_facts_and_warnings_tell_how_many_trials_ran_failed_and_were_stopped() -> None:
    made = page(many(40))
    assert list(made.facts)[:4] == [("trials", "40"), ("complete", "32"), ("stopped early", "4"), ("failed", "4")]
    assert "4 trials failed; the table of all trials says why." in made.notes


def test_the_page_warns_that_the_best_of_many_looks_better_than_it_is() -> None:
    [told] = [each for each in page(many(40)).notes if "looks better there than it is" in each]
    assert "as the best of 32 on the validation set" in told and "no run of this sweep has been scored" in told
    [with_hold_out] = [each for each in page(many(40, best_metrics=HOLD_OUT)).notes if "looks better" in each]
    assert "The hold-out, on which only this trial's run was scored, tells what it is worth." in with_hold_out
    assert not any("looks better" in each for each in page(sweep(trial(0, 2.0, a=1))).notes)


def test_the_promoted_run_has_its_verdict_and_no_trial_has_a_score_of_the_hold_out() -> None:
    trials = [
        TrialResult(n, "complete", {"a": n}, 2.0 + n, {"rougeL": 0.25, "hold_out_rougeL": 0.87654}, (), 1.0, None, "x")
        for n in (0, 1)
    ]
    made = page(sweep(*trials, best_metrics=HOLD_OUT))
    assert block(made, "The best trial on the hold-out", Prose).text == VERDICT
    rows = [[shown(each) for each in row] for row in block(made, "The best trial on the hold-out", Table).rows]
    assert rows == [
        ["ROUGE-L", "0.111", "0.311", "+0.200", "+0.100 to +0.300"],
        ["loss (nats)", "2.500", "1.750", "-0.750", "None"],
    ]
    assert "rougeL" in block(made, "All trials", Table).columns
    assert "87654" not in sweep_page(sweep(*trials, best_metrics=HOLD_OUT)) and "hold_out" not in repr(
        block(made, "All trials", Table)
    )


def test_without_a_promoted_run_there_is_no_section_on_the_hold_out() -> None:
    assert not any("hold-out" in each.title for each in page(many(12)).sections)


def test_of_one_trial_there_is_a_page_that_compares_nothing() -> None:
    made = page(sweep(trial(0, 2.0, a=1)))
    assert made.headline == "Trial 0 is the only one that is complete: its validation_loss is 2.0000."
    charts = [each for each in section(made, "Which settings matter").blocks if isinstance(each, Chart)]
    assert blank_text(charts[0].figure) == "No parameter varies between the trials."
    assert "only one that is complete" in sweep_page(sweep(trial(0, 2.0, a=1)))


def test_where_all_failed_the_page_says_so_and_why() -> None:
    made = sweep(*(trial(number, None, "failed", a=number) for number in range(3)))
    assert page(made).headline == "No trial is complete: 3 trials: 3 failed."
    assert [each.title for each in page(made).sections] == ["All trials", "The sweep"]
    assert sweep_page(made).count("ValueError: no finite loss") == 3
    assert table(made)[0] == "Sweep tuning, 3 trials: 3 failed. By validation_loss, lower is better."


def test_one_varying_parameter_is_drawn_beside_the_metric() -> None:
    figure = figures.parallel_figure(sweep(trial(0, 2.0, a=1, b=5), trial(1, 3.0, a=2, b=5)))
    assert [each.text for each in figure.layout.annotations] == ["a", "validation_loss"]


def test_a_page_of_two_hundred_trials_is_little_larger_than_one_of_two() -> None:
    two, hundreds = (len(sweep_page(many(count)).encode()) for count in (2, 200))
    assert hundreds - two < 400_000
    assert hundreds < 4_000_000


def test_a_hostile_sweep_runs_nothing_and_its_page_stays_small() -> None:
    text = sweep_page(hostile_sweep())
    assert "<script>window.__hacked" not in text and "<img" not in text and "\x1b" not in text and "\u202e" not in text
    assert "&lt;script&gt;window.__hacked" in text
    assert "\\x1b[2J" in text
    assert len(text.encode()) - len(sweep_page(many(2)).encode()) < 200_000
    assert len(importance_note(hostile_sweep())) < 600


def test_the_page_is_the_same_each_time_and_fetches_nothing() -> None:
    text = sweep_page(many(30), frozenset({"learning_rate"}))
    assert text == sweep_page(many(30), frozenset({"learning_rate"}))
    assert "default-src 'none'" in text
    outside = re.sub(r"<script type=\"text/plain\".*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r"(?:src|href)=\"https?:", outside)


@pytest.mark.parametrize(("seconds", "text"), [(4.21, "4.2 s"), (200, "3 min 20 s"), (7500, "2 h 05 min"), (59.99, "60.0 s")])
def test_a_duration_is_said_for_people(seconds: float, text: str) -> None:
    assert said_time(seconds) == text
