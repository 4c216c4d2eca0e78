from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from finetune_dataflow.engine.markers import as_text, parsed
from finetune_dataflow.errors import UserError
from finetune_dataflow.word_loom import LoomParts, LoomSettings, load_loom, loom_parts, marker_values, prepared_loom

LOOM = """\
lang = "en"
[system_prompt]
_ = "You help."
[context]
_ = "It rains."
[question]
_ = "What now?"
[other_system]
_ = "You refuse."
[other_context]
_ = "It snows."
[about]
_ = "What of {topic}?"
_fr = "Et {topic} ?"
_m = ["topic"]
[parler]
_ = "Parle."
lang = "fr"
_en = "Speak."
"""


@pytest.fixture
def loom(tmp_path: Path) -> str:
    return written(tmp_path, LOOM)


def written(folder: Path, text: str) -> str:
    (folder / "loom.toml").write_text(text, encoding="utf-8")
    return str(folder / "loom.toml")


@pytest.mark.parametrize(
    ("build_prompt", "parts"),
    [
        ("", LoomParts("You help.", "It rains.", "What now?")),
        ("parler_en", None),
        ("question", LoomParts("You help.", "It rains.", "What now?")),
        ("other_context", LoomParts("You help.", "It rains.", "It snows.")),
        ("other_system question", LoomParts("You refuse.", "It rains.", "What now?")),
        ("other_system other_context question", LoomParts("You refuse.", "It snows.", "What now?")),
        ("  other_system   question ", LoomParts("You refuse.", "It rains.", "What now?")),
    ],
)
def test_one_two_or_three_names_are_question_system_and_context(loom: str, build_prompt: str, parts: LoomParts | None) -> None:
    if parts is None:
        with pytest.raises(UserError, match=r"has no table \[parler_en\] with a text. Did you mean 'parler'\?"):
            loom_parts(LoomSettings(loom, build_prompt), {})
    else:
        assert loom_parts(LoomSettings(loom, build_prompt), {}) == parts


def test_four_names_are_too_many(loom: str) -> None:
    with pytest.raises(UserError, match=r"4 tables. Expected one \(the question\), two \(system prompt, question\) or three"):
        prepared_loom(LoomSettings(loom, "a b c d"))


def test_default_system_and_context_may_be_missing_but_not_the_question(tmp_path: Path) -> None:
    path = written(tmp_path, 'lang = "en"\n[ask]\n_ = "Why?"\n')
    assert loom_parts(LoomSettings(path, "ask"), {}) == LoomParts(None, None, "Why?")
    with pytest.raises(UserError, match=r"has no table \[question\] with a text. It has: ask."):
        prepared_loom(LoomSettings(path))
    with pytest.raises(UserError, match=r"has no table \[system_prompt\]"):
        prepared_loom(LoomSettings(path, "system_prompt ask"))


def test_an_empty_text_is_no_part(tmp_path: Path) -> None:
    path = written(tmp_path, '[system_prompt]\n_ = ""\n[question]\n_ = "Why?"\n')
    assert loom_parts(LoomSettings(path), {}) == LoomParts(None, None, "Why?")


@pytest.mark.parametrize("key", ["_", "text"])
@pytest.mark.parametrize("markers", ['_m = ["a"]', 'markers = ["a"]', 'markers = {a = "the first"}', ""])
def test_older_keys_are_read_alike_and_in_silence(tmp_path: Path, key: str, markers: str) -> None:
    path = written(tmp_path, f'[question]\n{key} = "{{a}}?"\n{markers}\n')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loom_parts(LoomSettings(path), {"a": "x"}).question == "x?"


def test_a_table_keeps_its_text_where_another_tables_text_is_its_name(tmp_path: Path) -> None:
    path = written(tmp_path, '[question]\n_ = "Why?"\n[other]\n_ = "question"\n')
    assert loom_parts(LoomSettings(path), {}).question == "Why?"


def test_the_text_of_another_language_is_chosen_by_name(loom: str) -> None:
    french = load_loom(loom).template("about", "fr")
    assert french.fill({"topic": "Paris"}) == "Et Paris ?"


def test_a_table_in_another_language_than_the_file_serves_by_its_translation(loom: str) -> None:
    assert loom_parts(LoomSettings(loom, "parler"), {}).question == "Speak."
    assert load_loom(loom).template("parler", "fr").fill({}) == "Parle."


def test_a_language_a_table_does_not_have_names_those_it_has(loom: str) -> None:
    with pytest.raises(UserError, match=r"the table \[about\] has no text in 'de'. It has: en, fr. Set loom_language."):
        load_loom(loom).template("about", "de")


def test_loom_language_chooses_every_part(tmp_path: Path) -> None:
    path = written(tmp_path, '[system_prompt]\n_ = "Help."\n_fr = "Aide."\n[question]\n_ = "Why?"\n_fr = "Quoi ?"\n')
    assert loom_parts(LoomSettings(path, loom_language="fr"), {}) == LoomParts("Aide.", None, "Quoi ?")


def test_a_context_in_brackets_is_the_text_of_a_file_whose_braces_stay(loom: str, tmp_path: Path) -> None:
    notes = tmp_path / "my notes.txt"
    notes.write_text('Snow: {"cm": {depth}}', encoding="utf-8")
    parts = loom_parts(LoomSettings(loom, f"system_prompt [{notes}] question"), {"depth": "9"})
    assert parts.context == 'Snow: {"cm": {depth}}'


def test_a_context_file_must_exist_and_be_utf8(loom: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"build_prompt: .*none\.txt cannot be read: No such file"):
        prepared_loom(LoomSettings(loom, f"system_prompt [{tmp_path}/none.txt] question"))
    (tmp_path / "bad.txt").write_bytes(b"a\xff")
    with pytest.raises(UserError, match=r"build_prompt: .*bad\.txt is not UTF-8, at byte 1"):
        prepared_loom(LoomSettings(loom, f"system_prompt [{tmp_path}/bad.txt] question"))


@pytest.mark.parametrize("build_prompt", ["[a.txt]", "[a.txt] question", "system_prompt [a.txt]"])
def test_only_the_context_can_be_a_file(loom: str, build_prompt: str) -> None:
    with pytest.raises(UserError, match=r"build_prompt: \[a.txt\] is a file, which only the context can be"):
        prepared_loom(LoomSettings(loom, build_prompt))


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("", {}),
        ("a=[some text] b=[other]", {"a": "some text", "b": "other"}),
        ("medical_problems=[Lymphoid aggregate]", {"medical_problems": "Lymphoid aggregate"}),
        (("a=[1]", "b=[2] c=[3]"), {"a": "1", "b": "2", "c": "3"}),
        ("a=[] b=[x]", {"a": "", "b": "x"}),
        ("a=[x[0] = y]", {"a": "x[0] = y"}),
        ("a=[two\nlines]", {"a": "two\nlines"}),
    ],
)
def test_marker_values_are_what_stands_in_the_brackets(text: str | tuple[str, ...], values: dict[str, str]) -> None:
    assert marker_values(text) == values


@pytest.mark.parametrize("text", ["a", "a=b", "a=[b", "=[b]", "a=[b] c", "[b]", "a=[b]c=[d] e"])
def test_a_marker_value_without_its_form_is_an_error(text: str) -> None:
    with pytest.raises(UserError, match=r"Expected name=\[value\]"):
        marker_values(text)


def test_two_values_for_one_marker_are_an_error() -> None:
    with pytest.raises(UserError, match="gives two values for 'a'"):
        marker_values(("a=[1]", "a=[2]"))


def test_a_marker_is_filled_by_its_value(loom: str) -> None:
    assert loom_parts(LoomSettings(loom, "about", "topic=[snow]"), {}).question == "What of snow?"


def test_each_row_fills_a_marker_from_its_own_column(loom: str) -> None:
    prepared = prepared_loom(LoomSettings(loom, "about"))
    assert prepared.row_markers == {"topic"}
    assert [prepared.parts({"topic": topic}).question for topic in ("rain", "sun")] == ["What of rain?", "What of sun?"]


def test_a_value_goes_before_a_column_of_its_name(loom: str) -> None:
    assert loom_parts(LoomSettings(loom, "about", "topic=[snow]"), {"topic": "rain"}).question == "What of snow?"


def test_a_marker_without_a_value_names_table_marker_and_nearest_column(loom: str) -> None:
    with pytest.raises(UserError) as error:
        loom_parts(LoomSettings(loom, "about"), {"topics": "x"})
    assert str(error.value) == (
        f"{loom}, table [about]: no value for {{topic}}. Did you mean 'topics'? Expected loom_markers 'topic=[value]', or a "
        "column of that name. Columns: topics."
    )


def test_a_value_for_an_unknown_marker_is_an_error(loom: str) -> None:
    with pytest.raises(UserError, match=r"gives a value for 'topik', a marker that no text .* has. Did you mean 'topic'\?"):
        prepared_loom(LoomSettings(loom, "about", "topik=[x]"))


def test_a_declared_marker_that_the_text_lacks_is_an_error(tmp_path: Path) -> None:
    path = written(tmp_path, '[question]\n_ = "{topik}?"\n_m = ["topic"]\n')
    with pytest.raises(UserError, match=r"_m declares the marker 'topic', .* Did you mean 'topik'\?"):
        prepared_loom(LoomSettings(path))


@pytest.mark.parametrize("marker", ["{x.__class__}", "{x[0]}", "{x!r}", "{x:>9}", "{}", "{ x }", '{"a": 1}'])
def test_a_marker_that_is_more_than_a_name_is_an_error_that_names_it(tmp_path: Path, marker: str) -> None:
    path = written(tmp_path, f"[question]\n_ = '{marker}'\n")
    with pytest.raises(UserError) as error:
        loom_parts(LoomSettings(path), {"x": "X"})
    assert f"table [question]: {marker!r} is no marker." in str(error.value)


def test_a_column_whose_name_has_dots_is_not_reached() -> None:
    with pytest.raises(UserError, match=r"'\{x.__class__\}' is no marker"):
        parsed("{x.__class__}", "a").fill({"x.__class__": "X"})


def test_a_value_is_never_read_as_a_text_with_markers() -> None:
    assert parsed("{a} {b}", "t").fill({"a": "{b} {{ {x.__class__}", "b": "B"}) == "{b} {{ {x.__class__} B"


@pytest.mark.parametrize(
    ("text", "filled"), [("{{a}}", "{a}"), ("{{{a}}}", "{A}"), ("{{}}", "{}"), ("{{{{", "{{"), ('{{"k": "{a}"}}', '{"k": "A"}')]
)
def test_a_doubled_brace_is_a_brace(text: str, filled: str) -> None:
    assert parsed(text, "t").fill({"a": "A"}) == filled


@pytest.mark.parametrize("text", ["a\n{", "a\n}", "a\n{{a}", "a\n{b{a}"])
def test_a_lone_brace_is_an_error_with_its_line(text: str) -> None:
    with pytest.raises(UserError, match="t, line 2: a lone"):
        parsed(text, "t")


@pytest.mark.parametrize(
    ("value", "text"), [("é", "é"), (3, "3"), (True, "true"), ({"a": ["é"]}, '{"a": ["é"]}'), (None, None), (float("nan"), None)]
)
def test_a_column_of_any_type_has_one_text(value: object, text: str | None) -> None:
    assert as_text(value) == text


def test_an_empty_column_is_an_error_that_names_the_marker(loom: str) -> None:
    with pytest.raises(UserError, match=r"the marker \{topic\} is empty in this row"):
        loom_parts(LoomSettings(loom, "about"), {"topic": None})


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b'lang = "en"\n[question]\n_ = "a', "not valid TOML: Unterminated string (at end of document)"),
        (b"a = 1\n[question\n", "(at line 2, column 10)"),
        (b"[question]\n_ = 'a'\n[question]\n_ = 'b'\n", "not valid TOML"),
        (b"[question]\n_ = 'a\xff'\n", "is not UTF-8, at byte 17"),
        (b"[question]\n_ = 3\n", "[question] _ is 3, expected a text"),
        (b"[question]\n_ = 'a'\n_fr = []\n", "[question] _fr is [], expected a text"),
        (b"[question]\n_ = 'a'\n_m = 'b'\n", "[question] _m is 'b', expected a list of names"),
        (b"lang = 3\n[question]\n_ = 'a'\n", "lang is 3, expected a text"),
        (b"", "has no table with a text"),
        (b"a = " + b"[" * 100_000, "not valid TOML"),
    ],
)
def test_a_file_that_is_no_loom_is_an_error_that_names_it(tmp_path: Path, content: bytes, found: str) -> None:
    path = tmp_path / "loom.toml"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_loom(path)
    assert str(path) in str(error.value)
    assert found in str(error.value)


def test_a_missing_loom_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"loom_file: .*none\.toml cannot be read: No such file or directory"):
        load_loom(tmp_path / "none.toml")


def test_a_loom_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "loom.toml").write_bytes(b"\xef\xbb\xbf[question]\r\n_ = 'a'\r\n")
    assert load_loom(tmp_path / "loom.toml").tables == {"question": {"en": "a"}}
