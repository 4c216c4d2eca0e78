import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
import pytest

from finetune_dataflow.engine import figure_style, figures
from finetune_dataflow.engine.audit import SetAudit

HOSTILE = '<b>x</b> <a href="javascript:alert(1)">y</a> $a$ %{x} &amp; \u202e\x1b[31m'
SHOWN = '&lt;b&gt;x&lt;/b&gt; &lt;a href="javascript:alert(1)"&gt;y&lt;/a&gt; &#36;a&#36; &#37;{x} &amp;amp; \\u202e\\x1b[31m'

HISTORY: list[dict[str, Any]] = [
    {"event": "validation", "step": 0, "loss": 6.0, "best_step": 0},
    {"event": "train", "step": 2, "loss": 5.0, "learning_rate": 1e-4},
    {"event": "validation", "step": 2, "loss": 4.0, "best_step": 2},
    {"event": "resume", "step": 2},
    {"event": "train", "step": 4, "loss": 3.0, "learning_rate": 2e-4},
    {"event": "validation", "step": 4, "loss": 4.5, "best_step": 2},
    {"event": "end", "steps": 4, "best_step": 2},
]


@dataclass(frozen=True)
class Between:
    mean: float
    low: float
    high: float


def trace(figure: go.Figure, name: str) -> Any:
    return next(each for each in figure.data if each.name == name)


def notes(figure: go.Figure) -> str:
    return " ".join(figure.layout.title.subtitle.text.replace("<br>", " ").replace("\u00a0", " ").split())


def strict_json(figure: go.Figure) -> Any:
    """The figure's JSON, read by a reader that refuses NaN and Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in JSON")

    return json.loads(figure.to_json(), parse_constant=refuse)


def annotation_texts(figure: go.Figure) -> list[str]:
    return [each.text for each in figure.layout.annotations]


def luminance(color: str) -> float:
    """The relative luminance of WCAG 2."""
    parts = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def ledger(used: dict[str, int], dropped: dict[str, int]) -> pd.DataFrame:
    lines = [(name, "used", "") for name, count in used.items() for _ in range(count)]
    lines += [("train", "dropped", reason) for reason, count in dropped.items() for _ in range(count)]
    return pd.DataFrame(lines, columns=["set", "status", "reason"]).assign(truncated=False)


# The style


@pytest.mark.parametrize("color", figure_style.PALETTE)
def test_every_colour_stands_out_from_white_and_from_near_black(color: str) -> None:
    assert contrast(color, "#ffffff") >= 3
    assert contrast(color, "#15181d") >= 3


@pytest.mark.parametrize(("dark", "page", "least"), [(False, "#ffffff", 4.5), (True, "#15181d", 4.5)])
def test_a_themed_text_can_be_read_on_its_page(dark: bool, page: str, least: float) -> None:
    layout = figure_style.template(dark).layout
    assert contrast(layout.font.color, page) >= least
    assert contrast(layout.xaxis.color, page) >= least
    assert contrast(layout.hoverlabel.font.color, layout.hoverlabel.bgcolor) >= least


def test_without_a_theme_a_text_can_be_read_on_white_and_on_near_black() -> None:
    color = figure_style.template().layout.font.color
    assert min(contrast(color, "#ffffff"), contrast(color, "#15181d")) >= 4


def test_the_colours_of_a_theme_are_in_the_template_alone() -> None:
    layout = figures.loss_figure(HISTORY).layout.to_plotly_json()
    template = layout.pop("template")
    assert "#" not in json.dumps(layout).replace("&#", "")
    assert template["layout"]["paper_bgcolor"] == template["layout"]["plot_bgcolor"] == "rgba(0,0,0,0)"
    assert template["layout"]["font"]["family"] == "inherit"


def test_a_theme_changes_a_copy() -> None:
    figure = figures.loss_figure(HISTORY)
    before = figure.to_json()
    dark = figure_style.theme(figure, dark=True)
    assert dark.layout.template.layout.font.color == "#e6e9ed"
    assert figure.to_json() == before
    assert figure_style.themed_layout(True)["template"]["layout"]["font"]["color"] == "#e6e9ed"
    assert json.loads(json.dumps(figure_style.themed_layout(False)))["template"]["layout"]["font"]["color"] == "#24292f"


def test_the_house_template_is_nobodys_default() -> None:
    default, names = pio.templates.default, list(pio.templates)
    figures.loss_figure(HISTORY)
    assert (pio.templates.default, list(pio.templates)) == (default, names)


def test_a_hostile_text_is_shown_to_the_letter() -> None:
    assert figure_style.figure_text(HOSTILE) == SHOWN


def test_half_a_surrogate_pair_is_shown_as_an_escape() -> None:
    assert figure_style.figure_text("a\ud800") == "a\\ud800"


def test_an_excerpt_is_cut_between_characters_and_wrapped() -> None:
    assert figure_style.excerpt("one two\n three", 100) == "one two three"
    assert figure_style.excerpt("<<<<", 9) == "&lt;&lt;…"
    assert figure_style.excerpt("ж" * 50, 60) == "ж" * 10 + "…"
    assert figure_style.excerpt("word " * 20, 100) == "word word word word word word word word word<br>" * 2 + "word word"
    assert figure_style.excerpt("", 100) == "(empty)"


def test_numbers_for_json_are_short_and_finite() -> None:
    assert figure_style.rounded([1 / 3, math.nan, math.inf, 2]) == [0.333333, None, None, 2.0]


def test_thinning_keeps_ends_and_extremes() -> None:
    values = np.sin(np.arange(50_000.0))
    values[12_345], values[23_456] = 9.0, -9.0
    kept = figure_style.thinned(values, 100)
    assert len(kept) <= 100 and {0, 12_345, 23_456, 49_999} <= set(kept.tolist())
    assert (np.diff(kept) > 0).all()


# The losses


def test_the_loss_figure_shows_losses_the_best_and_the_learning_rate() -> None:
    figure = figures.loss_figure(HISTORY)
    assert (list(trace(figure, "train").x), list(trace(figure, "train").y)) == ([2, 4], [5.0, 3.0])
    assert (list(trace(figure, "validation").x), list(trace(figure, "validation").y)) == ([0, 2, 4], [6.0, 4.0, 4.5])
    assert (list(trace(figure, "best").x), list(trace(figure, "best").y)) == ([2], [4.0])
    rate = trace(figure, "learning rate")
    assert (list(rate.y), rate.yaxis) == ([1e-4, 2e-4], "y2")
    assert list(figure.layout.yaxis2.ticktext) == ["0", "2e-4"]
    assert figure.layout.xaxis.title.text == "update"
    assert annotation_texts(figure) == ["loss, nats per supervised token", "learning rate"]
    assert notes(figure) == "Best: update 2, validation loss 4.000. Dotted: resumed after update 2."


def test_a_training_loss_says_which_updates_it_is_the_mean_of() -> None:
    assert list(trace(figures.loss_figure(HISTORY), "train").customdata) == [1, 3]


def test_a_resume_is_a_line_in_every_panel() -> None:
    shapes = figures.loss_figure(HISTORY).layout.shapes
    assert [(each.x0, each.x1, each.yref) for each in shapes] == [(2, 2, "y domain"), (2, 2, "y2 domain")]


def test_a_score_that_chose_the_best_has_a_panel_with_the_mark() -> None:
    history = [
        {"event": "validation", "step": 0, "loss": 6.0, "rougeL": 0.1, "best_step": 0},
        {"event": "validation", "step": 5, "loss": 7.0, "rougeL": 0.3, "best_step": 5},
    ]
    figure = figures.loss_figure(history)
    assert (list(trace(figure, "ROUGE-L").y), trace(figure, "ROUGE-L").yaxis) == ([0.1, 0.3], "y2")
    assert (list(trace(figure, "best").y), trace(figure, "best").yaxis) == ([0.3], "y2")
    assert notes(figure).startswith("Best: update 5, ROUGE-L 0.300, validation loss 7.000.")


def test_a_fit_without_a_validation_says_so() -> None:
    figure = figures.loss_figure([{"event": "train", "step": 1, "loss": 2.0, "learning_rate": 1e-3}])
    assert notes(figure) == "No validation was recorded."
    assert [each.name for each in figure.data] == ["train", "learning rate"]
    assert list(figure.layout.yaxis2.ticktext) == ["0", "0.001"]


def test_a_fit_that_only_validated_says_so() -> None:
    figure = figures.loss_figure(HISTORY[:1])
    assert notes(figure) == "Best: before the first update, validation loss 6.000. No training loss was recorded."


def test_no_history_gives_a_figure_with_a_note() -> None:
    for figure in (figures.loss_figure([]), figures.loss_comparison_figure({}), figures.loss_comparison_figure({"run": []})):
        assert annotation_texts(figure) == ["No loss was recorded."]


def test_losses_that_are_not_finite_are_left_out_and_counted() -> None:
    figure = figures.loss_figure([*HISTORY, {"event": "train", "step": 5, "loss": math.nan, "learning_rate": 1e-4}])
    assert list(trace(figure, "train").x) == [2, 4]
    assert "1 training losses that were not finite are left out." in notes(figure)
    strict_json(figure)


def test_a_long_training_curve_is_means_in_a_band() -> None:
    losses = [float(step % 10) for step in range(1, 4001)]
    history = [{"event": "train", "step": step, "loss": loss} for step, loss in enumerate(losses, start=1)]
    figure = figures.loss_figure(history)
    drawn = trace(figure, "train")
    assert len(drawn.x) == 400 and drawn.x[0] == 10 and drawn.x[-1] == 4000
    assert set(drawn.y) == {4.5} and list(drawn.customdata[:2]) == [1, 11]
    assert set(trace(figure, "lowest").y) == {0.0} and set(trace(figure, "highest").y) == {9.0}
    assert "the mean of every 10 reports" in notes(figure)


def test_runs_are_compared_in_colours_of_their_own_with_train_dotted() -> None:
    other = [{"event": "train", "step": 3, "loss": 1.0}]
    figure = figures.loss_comparison_figure({"one": HISTORY, HOSTILE[:8]: other, "none": []})
    assert [(each.name, each.line.dash, each.showlegend) for each in figure.data] == [
        ("one", "solid", True),
        ("one", "dot", False),
        ("&lt;b&gt;x&lt;/b&gt;", "dot", True),
    ]
    assert figure.data[0].line.color == figure.data[1].line.color != figure.data[2].line.color
    assert "Least validation loss: 4.000 (one). No loss was recorded of: none." in notes(figure)


# The scores


def test_scores_stand_side_by_side_with_their_intervals() -> None:
    base: dict[str, figures.Estimate] = {"rougeL": {"mean": 0.2, "low": 0.1, "high": 0.4}, "loss": 3.0, "only_base": 1.0}
    tuned: dict[str, figures.Estimate] = {"rougeL": Between(0.5, 0.4, 0.7), "loss": 2.0}
    figure = figures.scores_figure(base, tuned)
    assert [(each.name, each.xaxis, list(each.x)) for each in figure.data] == [
        ("base model", "x", [0.2]),
        ("tuned model", "x", [0.5]),
        ("base model", "x2", [3.0]),
        ("tuned model", "x2", [2.0]),
    ]
    assert (figure.data[0].error_x.array, figure.data[0].error_x.arrayminus) == ((0.2,), (0.1,))
    assert figure.data[0].marker.symbol != figure.data[1].marker.symbol
    assert list(figure.layout.yaxis.ticktext) == ["ROUGE-L"]
    assert annotation_texts(figure) == ["ROUGE f-measure", "loss, nats per supervised token"]


def test_scores_without_intervals_are_not_said_to_have_any() -> None:
    assert notes(figures.scores_figure({"rougeL": 0.1}, {"rougeL": 0.2})) == "Marks are means."


DIFFERENCES = {
    "rouge1": {"mean": 0.1, "low": 0.05, "high": 0.2},
    "rouge2": {"mean": -0.1, "low": -0.2, "high": -0.05},
    "rougeL": {"mean": 0.1, "low": -0.1, "high": 0.2},
    "loss": {"mean": -1.0, "low": -1.5, "high": -0.5},
}


def test_a_difference_is_better_worse_or_unclear_by_colour_and_by_symbol() -> None:
    figure = figures.difference_figure(DIFFERENCES)
    assert [(each.name, each.xaxis, list(each.text)) for each in figure.data] == [
        ("clearly better", "x", ["+0.100"]),
        ("clearly worse", "x", ["\u22120.100"]),
        ("no clear difference", "x", ["+0.100"]),
        ("clearly better", "x2", ["\u22121.000"]),
    ]
    assert len({each.marker.symbol for each in figure.data}) == len({each.marker.color for each in figure.data}) == 3
    assert [each.showlegend for each in figure.data] == [True, True, True, False]
    assert figure.layout.xaxis.zeroline and figure.layout.xaxis2.zeroline
    assert figure.layout.xaxis.range[0] < 0 < figure.layout.xaxis.range[1]
    assert annotation_texts(figure) == ["ROUGE f-measure, right is better", "loss, nats per supervised token, left is better"]


def test_labels_stand_beside_their_differences() -> None:
    figure = figures.difference_figure(DIFFERENCES)
    at = dict(zip(figure.layout.yaxis.tickvals, figure.layout.yaxis.ticktext, strict=True))
    assert [at[trace(figure, name).y[0]] for name in ("clearly better", "clearly worse")] == ["ROUGE-1", "ROUGE-2"]


def test_a_given_direction_is_followed() -> None:
    figure = figures.difference_figure({"rouge1": DIFFERENCES["rouge1"]}, higher_is_better={"rouge1": False})
    assert [each.name for each in figure.data] == ["clearly worse"]


def test_a_score_of_which_more_is_neither_better_nor_worse_is_only_other() -> None:
    figure = figures.difference_figure({"length_ratio": DIFFERENCES["rouge1"], "own": DIFFERENCES["rouge1"]})
    assert [each.name for each in figure.data] == ["clearly different", "clearly better"]
    assert annotation_texts(figure) == ["length of replies / references", "own, right is better"]


def test_few_rows_make_no_difference_clear() -> None:
    figure = figures.difference_figure(DIFFERENCES, rows=9)
    assert {each.name for each in figure.data} == {"no clear difference"}
    assert "9 rows cannot tell: at least 10 are needed." in notes(figure)
    assert "clearly better" in {each.name for each in figures.difference_figure(DIFFERENCES, rows=10).data}


def test_a_difference_of_exactly_nothing_is_not_clear() -> None:
    figure = figures.difference_figure({"rouge2": {"mean": 0.0, "low": 0.0, "high": 0.0}})
    assert [each.name for each in figure.data] == ["no clear difference"]


def test_the_distribution_is_the_share_of_rows_that_reach_a_score() -> None:
    figure = figures.score_distribution_figure([0.0, 0.5, 0.5, 1.0], [1.0, 1.0, math.nan, 1.0])
    assert list(trace(figure, "base model").x)[1:-1] == [0.0, 0.5, 1.0]
    assert list(trace(figure, "base model").y) == [1.0, 1.0, 0.75, 0.25, 0.0]
    assert list(trace(figure, "tuned model").y) == [1.0, 1.0, 0.0]
    assert notes(figure) == "4 rows. Median: base 0.500, tuned 1.000. 1 without a score left out."
    assert trace(figure, "base model").line.shape == "vh"


def test_where_lower_is_better_the_share_is_of_rows_at_most_so_bad() -> None:
    figure = figures.score_distribution_figure([1.0, 2.0], [3.0, 3.0], "loss", higher_is_better=False)
    assert list(trace(figure, "base model").y) == [0.0, 0.5, 1.0, 1.0]
    assert trace(figure, "base model").line.shape == "hv"


def test_scores_that_are_all_equal_make_one_step() -> None:
    figure = figures.score_distribution_figure([0.2] * 3, [0.2] * 3)
    low, step, high = trace(figure, "base model").x
    assert low < step == 0.2 < high


# Row by row


def test_rows_are_better_worse_or_equal_by_colour_and_by_symbol() -> None:
    figure = figures.scatter_figure([0.1, 0.5, 0.3], [0.4, 0.2, 0.3], [7, 8, 9], ["a", "b", "c"])
    assert [(each.name, list(each.x), list(each.y)) for each in figure.data] == [
        ("better (1)", [0.1], [0.4]),
        ("worse (1)", [0.5], [0.2]),
        ("equal (1)", [0.3], [0.3]),
    ]
    assert [list(each.customdata[0]) for each in figure.data] == [["row 7", "a"], ["row 8", "b"], ["row 9", "c"]]
    assert len({each.marker.symbol for each in figure.data}) == 3
    line = figure.layout.shapes[0]
    assert line.x0 == line.y0 < 0.1 and line.x1 == line.y1 > 0.5


def test_where_lower_is_better_a_fall_is_better() -> None:
    figure = figures.scatter_figure([3.0], [2.0], [1], ["a"], "loss", higher_is_better=False)
    assert figure.data[0].name == "better (1)" and notes(figure).startswith("Below the line")


def test_rows_on_one_spot_are_one_larger_mark() -> None:
    figure = figures.scatter_figure([0.0] * 5 + [1.0], [0.0] * 5 + [1.0], range(6), list("abcdef"))
    equal = trace(figure, "equal (6)")
    assert [list(each) for each in equal.customdata] == [["5 rows: 0, 1, 2, …", "a"], ["row 5", "f"]]
    assert equal.marker.size[0] > equal.marker.size[1]
    assert "A larger mark is several rows on one spot." in notes(figure)


def test_a_hostile_input_is_text_in_the_hover() -> None:
    figure = figures.scatter_figure([0.1], [0.2], [1], [HOSTILE], label=HOSTILE)
    hover = figure.data[0].customdata[0][1].replace("<br>", " ")
    assert hover == SHOWN
    assert figure.layout.xaxis.title.text == f"base model, {SHOWN}"
    assert "\u202e" not in figure.to_json() and "\\u202e" not in figure.to_json().replace("\\\\u202e", "")


def test_rows_without_a_score_are_counted() -> None:
    figure = figures.scatter_figure([math.nan, 0.1], [0.1, 0.2], [1, 2], ["a", "b"])
    assert notes(figure).endswith("1 row without a score left out.")
    assert annotation_texts(figures.scatter_figure([], [], [], [])) == ["No row has a score of both models."]


def test_columns_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError):
        figures.scatter_figure([0.1, 0.2], [0.1, 0.2], [1, 2], ["a"])


def test_a_figure_of_many_rows_stays_small_and_loses_none() -> None:
    random = np.random.default_rng(0)
    base, tuned = random.random(10_000), random.random(10_000)
    for text in (HOSTILE * 20, "Здравствуйте " * 20, "\x00" * 200):
        figure = figures.scatter_figure(base, tuned, range(10_000), [text] * 10_000)
        assert len(figure.to_json()) < 150_000 and sum(len(each.x) for each in figure.data) <= 1000
        assert sum(int(each.name.split("(")[1][:-1].replace(",", "")) for each in figure.data) == 10_000
        assert "in one of 30 x 30 squares" in notes(figure)
    distribution = figures.score_distribution_figure(base, tuned)
    assert len(distribution.to_json()) < 150_000 and max(len(each.x) for each in distribution.data) <= 1002
    assert "Drawn at 1,000 evenly spaced ranks." in notes(distribution)


def test_a_long_fit_stays_small() -> None:
    history = [{"event": "train", "step": step, "loss": 1 / step, "learning_rate": 1e-5 / step} for step in range(1, 20_001)]
    history += [{"event": "validation", "step": step, "loss": 2 / step, "best_step": 20_000} for step in range(1, 20_001)]
    figure = figures.loss_figure(history)
    assert len(figure.to_json()) < 150_000 and max(len(each.x) for each in figure.data) <= 2000
    compared = figures.loss_comparison_figure({str(number): history for number in range(5)})
    assert len(compared.to_json()) < 150_000


def test_outcomes_are_shares_of_one_bar() -> None:
    figure = figures.outcomes_figure(5, 1, 2)
    assert [(each.name, list(each.x), list(each.customdata)) for each in figure.data] == [
        ("better: 5", [0.625], ["5 rows"]),
        ("equal: 1", [0.125], ["1 row"]),
        ("worse: 2", [0.25], ["2 rows"]),
    ]
    assert annotation_texts(figures.outcomes_figure(0, 0, 0)) == ["No row was compared."]


# The data


def test_token_lengths_are_counted_in_the_same_bins_for_every_set() -> None:
    figure = figures.token_length_figure({"train": np.array([10, 10, 12]), "hold_out": np.array([13])}, limit=12)
    assert [(each.name, list(each.x), list(each.y)) for each in figure.data] == [
        ("train", [10.0, 11.0, 12.0, 13.0], [2, 0, 1, 0]),
        ("hold-out", [10.0, 11.0, 12.0, 13.0], [0, 0, 0, 1]),
    ]
    assert list(figure.data[0].customdata) == ["10", "11", "12", "13"]
    assert annotation_texts(figure) == ["train: 3 rows, median 10, longest 12", "hold-out: 1 row, median 13, longest 13"]
    assert [each.x0 for each in figure.layout.shapes] == [12, 12]
    assert notes(figure) == "Dashed: max_seq_length 12, reached by 2 of 4 rows."


def test_one_very_long_row_makes_the_axis_logarithmic_and_is_not_lost() -> None:
    lengths = np.array([0, *[100] * 50, 30_000])
    figure = figures.token_length_figure({"train": lengths}, limit=32_768)
    assert sum(figure.data[0].y) == 52 and len(figure.data[0].x) <= 40
    assert list(figure.layout.xaxis.ticktext) == ["1", "8", "64", "512", "4,096", "32,768"]
    assert list(figure.layout.xaxis.tickvals) == [0, 3, 6, 9, 12, 15]
    assert figure.layout.shapes[0].x0 == 15.0


def test_a_limit_far_beyond_the_rows_is_told_and_not_drawn() -> None:
    figure = figures.token_length_figure({"train": np.array([12])}, limit=512)
    assert not figure.layout.shapes
    assert notes(figure) == "Beyond the axis: max_seq_length 512, reached by none of 1 row."


def test_the_labels_are_shown_as_the_audit_counts_them() -> None:
    audit = SetAudit(
        rows=2, tokens=200, supervised=0.25, padded=0.1, truncated_rows=0, joint_differs=0, skipped_turns=0, longest=120
    )
    figure = figures.label_figure({"hold_out": audit})
    assert [(each.name, list(each.y), list(each.x), list(each.customdata)) for each in figure.data] == [
        ("learned", ["hold-out"], [0.25], ["50 tokens"]),
        ("masked: prompt and template", ["hold-out"], [0.75], ["150 tokens"]),
    ]
    assert notes(figure) == "Share of tokens. Padding in the batches: hold-out 10.0%."


def test_the_ledger_is_rows_by_set_and_drops_by_reason() -> None:
    figure = figures.ledger_figure(ledger({"hold_out": 2, "train": 5, "validation": 1}, {"empty": 1, "near_hold_out": 3}))
    at = dict(zip(figure.layout.yaxis.tickvals, figure.layout.yaxis.ticktext, strict=True))
    assert [(at[y], x) for y, x in zip(trace(figure, "used").y, trace(figure, "used").x, strict=True)] == [
        ("train", 5),
        ("validation", 1),
        ("hold-out", 2),
    ]
    dropped = trace(figure, "dropped")
    assert [(at[y], x) for y, x in zip(dropped.y, dropped.x, strict=True)] == [("near hold out", 3), ("empty", 1)]
    assert notes(figure) == "12 rows: 8 used, 4 dropped."


def test_many_reasons_are_summed_up_without_losing_a_row() -> None:
    figure = figures.ledger_figure(ledger({"train": 1}, {f"reason_{number}": 20 - number for number in range(15)}))
    dropped = trace(figure, "dropped")
    assert len(dropped.x) == 10 and sum(dropped.x) == sum(20 - number for number in range(15))
    assert dropped.customdata[-1] == "6 other reasons"


def test_nothing_gives_a_figure_with_a_note() -> None:
    blanks = {
        "There are no scores of both models.": figures.scores_figure({}, {}),
        "There are no differences to show.": figures.difference_figure({"loss": {"mean": math.nan}}),
        "No row has a score.": figures.score_distribution_figure([], [math.nan]),
        "There are no rows.": figures.token_length_figure({"train": np.array([], np.int64)}),
        "There are no tokens.": figures.label_figure({}),
    }
    for note, figure in blanks.items():
        assert annotation_texts(figure) == [note]
        strict_json(figure)
    assert annotation_texts(figures.ledger_figure(ledger({}, {}))) == ["There are no rows."]


def test_no_figure_has_a_width_and_all_have_heights_that_fit_their_panels() -> None:
    for figure in (
        figures.loss_figure(HISTORY),
        figures.difference_figure(DIFFERENCES),
        figures.scatter_figure([0.1], [0.2], [1], ["a"]),
        figures.ledger_figure(ledger({"train": 1}, {})),
    ):
        strict_json(figure)
        assert figure.layout.width is None
        assert figure.layout.height - figure.layout.margin.t - figure.layout.margin.b >= 30
        assert figure.layout.xaxis.automargin is None and figure.layout.template.layout.xaxis.automargin is True
