from __future__ import annotations

import pandas as pd
import pytest

from finetune_dataflow.engine.quality import QualityReport, data_quality, shown
from finetune_dataflow.errors import UserError


def report_of(*pairs: tuple[str, str], control_strings: tuple[str, ...] = ()) -> QualityReport:
    """The report of some (input, output) pairs, which are rows 10, 11, 12, …"""
    rows = [(10 + place, question, reply) for place, (question, reply) in enumerate(pairs)]
    return data_quality(pd.DataFrame(rows, columns=["row", "input_text", "output_text"], dtype=object), control_strings)


def kinds(report: QualityReport) -> dict[str, tuple[int, ...]]:
    return {each.kind: each.rows for each in report.findings}


def test_good_rows_have_no_findings() -> None:
    report = report_of(("How are you?", "Fine — merci, ça va 👍🏽.\n\n\tYou?"), ("x < y && y > z", "a <b c, AT&T, NÃO, Ângela."))
    assert report.findings == ()
    assert report.lines() == ["data quality: nothing found in 2 rows"]


def test_no_rows_have_no_findings() -> None:
    assert report_of().findings == ()


def test_a_duplicate_is_each_later_row_of_the_same_normalised_input_and_output() -> None:
    report = report_of(("Hi  there", "Yes"), ("hi there", "Yes"), ("hi there", "Yes"), ("Bye", "Yes"))
    assert kinds(report) == {"duplicate": (11, 12)}


def test_the_same_input_with_different_outputs_names_all_its_rows() -> None:
    assert kinds(report_of(("Hi", "Yes"), ("Bye", "So"), ("HI", "No"))) == {"conflicting_output": (10, 12)}


def test_empty_is_what_is_empty_after_stripping() -> None:
    assert kinds(report_of((" \n", "Yes"), ("Hi", "\t "), ("", "No"))) == {"empty_input": (10, 12), "empty_output": (11,)}


def test_an_output_equal_to_its_input_is_an_echo() -> None:
    assert kinds(report_of(("Say it.", "Say it."), ("Say it!", "Said."))) == {"echo": (10,)}


@pytest.mark.parametrize("text", ["[INST]", "<s>", "<|im_end|>", "<|eot_id|>", "<start_of_turn>", "</s>"])
def test_a_well_known_control_string_is_found_in_either_text(text: str) -> None:
    assert kinds(report_of((f"a{text}b", "Yes"), ("Hi", f"No{text}"))) == {"control_string": (10, 11)}


def test_the_tokenizers_own_control_strings_are_found_literally() -> None:
    report = report_of(("a.b", "Yes"), ("aXb", "No"), control_strings=("a.b", " "))
    assert kinds(report) == {"control_string": (10,)}
    assert report.findings[0].message == "1 row holds a control string of a prompt format: row 10 (a.b in 1)"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("caf\ufffd", "replacement_character"),
        ("caf\ud83d", "replacement_character"),
        ("cafÃ©", "mojibake"),
        ("donâ€™t", "mojibake"),
        ("20Â°", "mojibake"),
        ("\u00f0\u0178\u02dc\u20ac", "mojibake"),
        ("a\u202eb", "bidi_control"),
        ("a\u2066b", "bidi_control"),
        ("a\x00b", "control_character"),
        ("a\x85b", "control_character"),
        ("\ufeffa", "control_character"),
        ("a\x1b[31mb", "ansi_escape"),
        ("a\ue000b", "private_use"),
        ("line<br/>line", "html"),
        ('<a href="x">y</a>', "html"),
        ("a&nbsp;b", "html"),
        ("it&#39;s", "html"),
    ],
)
def test_suspect_characters_are_found_in_either_text(text: str, kind: str) -> None:
    assert kinds(report_of((text, "Yes"), ("Hi", text), ("Bye", "No"))) == {kind: (10, 11)}


@pytest.mark.parametrize(
    ("text", "encoding"),
    [("é", "cp1252"), ("à la", "cp1252"), ("“so", "cp1252"), ("20 €", "cp1252"), ("“so”", "latin-1")],
)
def test_utf_8_read_in_another_encoding_is_mojibake(text: str, encoding: str) -> None:
    assert "mojibake" in kinds(report_of((text.encode().decode(encoding), "Yes")))


@pytest.mark.parametrize("reply", [" Yes", "Yes\n", "\tYes "])
def test_white_space_around_an_output_is_a_notice(reply: str) -> None:
    report = report_of(("Hi", reply))
    assert [(each.kind, each.rows, each.severity) for each in report.findings] == [("white_space", (10,), "notice")]


def test_white_space_around_an_input_is_not_a_finding() -> None:
    assert report_of((" Hi ", "Yes")).findings == ()


def test_where_lengths_are_alike_an_outlier_is_four_times_longer_or_shorter_than_the_median() -> None:
    usual = [(f"{number:02d}" + "q" * 97, f"{number:02d}" + "r" * 97) for number in range(20)]
    # The rule is on 1 + characters: 100 in the middle; 401 and 24 are beyond a factor of 4, 399 and 26 within.
    found = kinds(report_of(*usual, ("x" * 400, "y" * 398), ("x" * 23, "z" * 25)))
    assert found == {"long_input": (30,), "short_input": (31,)}


def test_lengths_that_vary_widely_have_no_outlier_at_four_times_the_median() -> None:
    usual = [("q" * (2 ** (number % 10)) + str(number), "Yes") for number in range(100)]
    assert kinds(report_of(*usual)) == {}


def test_nineteen_rows_have_no_outliers() -> None:
    assert kinds(report_of(*[("q" * 50 + str(number), "Yes") for number in range(18)], ("x" * 5000, "No"))) == {}


def test_empty_texts_are_not_outliers_too() -> None:
    found = kinds(report_of(*[("q" * 50 + str(number), "Yes") for number in range(30)], ("", "No")))
    assert found == {"empty_input": (40,)}


def test_lines_say_warnings_first_and_name_rows() -> None:
    assert report_of(("Hi", "Yes "), ("HI", "No")).lines() == [
        "data quality: 1 warning, 1 notice in 2 rows",
        "  warning: 2 rows have an input that stands in the data with different outputs: rows 10, 11, such as 'Hi'",
        "  notice: 1 row has an output with white space at its start or end: row 10",
    ]


def test_a_message_names_five_rows_and_counts_the_rest() -> None:
    (finding,) = report_of(*[(f"Question {number}", "") for number in range(8)]).findings
    assert finding.message == "8 rows have an empty output: rows 10, 11, 12, 13, 14 and 3 more"
    assert finding.rows == (10, 11, 12, 13, 14, 15, 16, 17)


def test_lines_hold_nothing_that_a_terminal_obeys() -> None:
    report = report_of(("a\x1b[2Jb\x07\u202e\x9b", "Yes"), ("Hi", "c\x00d<\x1b>"), control_strings=("\x1b[2J",))
    assert all(line.isprintable() for line in report.lines())
    assert any(r"a\x1b[2Jb\x07\u202e\x9b" in line for line in report.lines())


def test_by_row_names_the_kinds_of_each_row() -> None:
    report = report_of(("Hi", "Yes\x00 "), ("ok", "ok then"), ("hi", ""))
    assert report.by_row() == {
        10: ["conflicting_output", "control_character", "white_space"],
        12: ["conflicting_output", "empty_output"],
    }


def test_strict_raises_all_warnings_and_no_notices() -> None:
    report = report_of(("Hi", " Yes"), ("Bye", ""), ("Say it.", "Say it."))
    with pytest.raises(UserError) as raised:
        report.raise_if_strict(True)
    assert str(raised.value) == (
        "strict=true, and the data has 2 warnings:\n"
        "  1 row has an empty output: row 11\n"
        "  1 row has an output equal to its input: row 12, such as 'Say it.'"
    )


def test_without_strict_nothing_is_raised() -> None:
    report_of(("Bye", "")).raise_if_strict(False)


def test_strict_passes_notices() -> None:
    report_of(("Hi", " Yes")).raise_if_strict(True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain ä 漢 👍", "plain ä 漢 👍"),
        ("a\x1b[31m", r"a\x1b[31m"),
        ("a\nb\tc\r", r"a\nb\tc\r"),
        ("\x00\x85\x9b\u202e\u2066", r"\x00\x85\x9b\u202e\u2066"),
        ("\ud800\ue000\u2028\ufeff", r"\ud800\ue000\u2028\ufeff"),
        ("123456789012345678901234567890", "123456789012345678901234567890"),
        ("1234567890123456789012345678901", "12345678901234567890123456789…"),
        ("123456789012345678901234567\u202e", "123456789012345678901234567…"),
    ],
)
def test_shown_escapes_what_a_terminal_obeys_or_hides_and_cuts_at_the_limit(text: str, expected: str) -> None:
    assert shown(text, 30) == expected
