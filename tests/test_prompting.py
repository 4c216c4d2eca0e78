from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from finetune_dataflow.engine.prompting import PromptContent, build, check_sources, prepared_content
from finetune_dataflow.errors import UserError
from finetune_dataflow.word_loom import LoomSettings, PreparedLoom, prepared_loom


@dataclass(frozen=True)
class Row:
    input_text: str = ""
    output_text: str = ""
    contexts: tuple[str, ...] = ()
    messages: tuple[dict[str, Any], ...] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)


ROW = Row("Why?", "So.")


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def loom_of(folder: Path, text: str, build_prompt: str = "") -> PreparedLoom:
    (folder / "loom.toml").write_text(text)
    return prepared_loom(LoomSettings(str(folder / "loom.toml"), build_prompt))


def user_text(row: Row, loom: PreparedLoom | None = None, **content: Any) -> str:
    return str(build(row, PromptContent(**content), loom)[0][-1]["content"])


def test_by_default_a_prompt_is_the_input_and_nothing_else() -> None:
    assert build(ROW, PromptContent(), None) == ((message("user", "Why?"),), "So.")


def test_a_system_prompt_comes_first_and_is_taken_as_it_is() -> None:
    prompt, _ = build(ROW, PromptContent(system_prompt='Answer {"a": {x[0]}}'), None)
    assert prompt == (message("system", 'Answer {"a": {x[0]}}'), message("user", "Why?"))


def test_templates_are_filled_with_the_rows_parts_and_columns() -> None:
    row = Row("Why?", "So.", columns={"name": "Ann", "age": 7})
    content = PromptContent(input_template="{name} ({age}): {input}", response_template="{response} Bye, {name}.")
    assert build(row, content, None) == ((message("user", "Ann (7): Why?"),), "So. Bye, Ann.")


def test_input_means_the_input_text_whatever_a_column_of_that_name_holds() -> None:
    assert user_text(Row("Why?", "So.", columns={"input": "no"}), input_template="<{input}>") == "<Why?>"


@pytest.mark.parametrize("hostile", ["{name}", "{{", "{x.__class__}", "{context}", "}"])
def test_braces_in_a_row_stay_what_they_are(hostile: str) -> None:
    row = Row(hostile, hostile, (hostile,), columns={"name": hostile})
    content = PromptContent(input_template="{name}|{context}|{input}", response_template="{response}!")
    expected = f"{hostile}|{hostile}|{hostile}"
    assert build(row, content, None) == ((message("user", expected),), f"{hostile}!")


@pytest.mark.parametrize("template", ["{input.__class__}", "{input[0]}", "{input!r}", "{"])
@pytest.mark.parametrize("option", ["input_template", "context_template", "response_template"])
def test_a_hostile_template_is_an_error_that_names_the_option(option: str, template: str) -> None:
    changed: dict[str, Any] = {option: template}
    with pytest.raises(UserError, match=option):
        build(ROW, replace(PromptContent(), **changed), None)


def test_contexts_stand_before_the_input_parted_by_blank_lines() -> None:
    assert user_text(Row("Why?", "So.", ("One.", "Two."))) == "One.\n\nTwo.\n\nWhy?"


def test_a_context_template_is_put_around_each_context() -> None:
    row = Row("Why?", "So.", ("One.", "Two."), columns={"name": "Ann"})
    assert user_text(row, context_template="{name}: {context}") == "Ann: One.\n\nAnn: Two.\n\nWhy?"


def test_an_input_template_that_names_the_context_says_where_it_goes() -> None:
    row = Row("Why?", "So.", ("One.", "Two."))
    assert user_text(row, input_template="{input}\nNotes: {context}") == "Why?\nNotes: One.\n\nTwo."


def test_a_row_without_contexts_fills_the_context_with_nothing() -> None:
    assert user_text(ROW, input_template="{input}\nNotes: {context}") == "Why?\nNotes: "


def test_a_marker_without_a_column_is_an_error_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"input_template: the marker \{nmae\} has no value. Did you mean 'name'\?"):
        build(Row("Why?", "So.", columns={"name": "Ann"}), PromptContent(input_template="{nmae}{input}"), None)


CHAT = (
    message("system", "Be."),
    message("user", "A?"),
    message("assistant", "A."),
    message("user", "B?"),
    message("assistant", "B."),
)


def test_a_chat_rows_prompt_is_all_before_its_last_reply() -> None:
    assert build(Row(messages=CHAT), PromptContent(), None) == (CHAT[:4], "B.")


def test_a_chat_rows_last_user_turn_is_its_input() -> None:
    content = PromptContent(system_prompt="Sys.", input_template="<{input}>", response_template="<{response}>")
    prompt, reply = build(Row(messages=CHAT[1:], contexts=("C.",)), content, None)
    assert prompt == (message("system", "Sys."), CHAT[1], CHAT[2], message("user", "C.\n\n<B?>"))
    assert reply == "<B.>"


def test_a_chat_rows_turns_keep_their_other_keys() -> None:
    called = {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}
    row = Row(messages=(message("user", "A?"), called, message("tool", "1"), message("assistant", "B.")))
    assert build(row, PromptContent(), None) == ((message("user", "A?"), called, message("tool", "1")), "B.")


def test_an_input_template_has_no_place_after_a_tools_answer() -> None:
    row = Row(messages=(message("user", "A?"), message("tool", "1"), message("assistant", "B.")))
    with pytest.raises(UserError, match="no text of the user"):
        build(row, PromptContent(input_template="<{input}>"), None)


def test_a_chat_rows_own_system_message_and_a_system_prompt_are_two_sources() -> None:
    with pytest.raises(UserError, match="Two sources for the system message: the row's own messages and system_prompt"):
        build(Row(messages=CHAT), PromptContent(system_prompt="Sys."), None)


@pytest.mark.parametrize("last", [message("user", "C?"), {"role": "assistant", "content": None}])
def test_a_chat_row_that_does_not_end_with_a_reply_is_an_error(last: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="Expected the assistant's reply"):
        build(Row(messages=(*CHAT, last)), PromptContent(), None)


LOOM = "[system_prompt]\n_ = 'Sys.'\n[context]\n_ = 'It rains.'\n[question]\n_ = 'Of {topic}: {input}'\n"


def test_a_loom_gives_system_context_and_question(tmp_path: Path) -> None:
    row = Row("Why?", "So.", columns={"topic": "rain"})
    prompt, reply = build(row, PromptContent(), loom_of(tmp_path, LOOM))
    assert prompt == (message("system", "Sys."), message("user", "It rains.\n\nOf rain: Why?"))
    assert reply == "So."


def test_a_loom_without_a_system_table_leaves_the_system_prompt(tmp_path: Path) -> None:
    loom = loom_of(tmp_path, "[question]\n_ = '{input}'\n")
    assert build(ROW, PromptContent(system_prompt="Sys."), loom)[0] == (message("system", "Sys."), message("user", "Why?"))


def test_a_rows_contexts_go_where_a_loom_names_them(tmp_path: Path) -> None:
    loom = loom_of(tmp_path, "[context]\n_ = 'Notes: {context}'\n[question]\n_ = '{input}'\n")
    assert user_text(Row("Why?", "So.", ("One.", "Two.")), loom) == "Notes: One.\n\nTwo.\n\nWhy?"


def test_a_rows_contexts_stand_before_the_question_of_a_loom_without_context(tmp_path: Path) -> None:
    assert user_text(Row("Why?", "So.", ("One.",)), loom_of(tmp_path, "[question]\n_ = '{input}'\n")) == "One.\n\nWhy?"


def test_a_rows_contexts_and_a_looms_context_are_two_sources(tmp_path: Path) -> None:
    row = Row("Why?", "So.", ("One.",), columns={"topic": "rain"})
    with pytest.raises(UserError, match=r"Two sources for the context: the row's own and the word loom .*context"):
        build(row, PromptContent(), loom_of(tmp_path, LOOM))


def test_a_loom_that_would_lose_every_rows_input_is_an_error(tmp_path: Path) -> None:
    loom = loom_of(tmp_path, "[question]\n_ = 'What now?'\n")
    with pytest.raises(UserError, match=r"no text of the word loom names \{input\} or a column"):
        build(ROW, PromptContent(), loom)
    assert user_text(Row(), loom) == "What now?"


def test_a_looms_system_message_and_the_rows_own_are_two_sources(tmp_path: Path) -> None:
    loom = loom_of(tmp_path, "[system_prompt]\n_ = 'Sys.'\n[question]\n_ = '{input}'\n")
    with pytest.raises(UserError, match=r"the row's own messages and the word loom .*system_prompt"):
        build(Row(messages=CHAT), PromptContent(), loom)


def test_all_conflicts_with_a_loom_are_named_at_once(tmp_path: Path) -> None:
    loom = loom_of(tmp_path, LOOM)
    content = PromptContent(system_prompt="S", input_template="<{input}>", context_template="<{context}>")
    with pytest.raises(UserError) as error:
        check_sources(content, loom)
    path = tmp_path / "loom.toml"
    assert str(error.value) == (
        f"Prompt content: two sources for the system message: system_prompt and the word loom ({path}, table [system_prompt]); "
        f"two sources for the context: context_template and the word loom ({path}, table [context]); "
        f"two sources for the user's text: input_template and the word loom ({path}, table [question])."
    )


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (PromptContent(input_template="Hello"), "input_template names no marker"),
        (PromptContent(response_template="Yes"), "response_template names no marker"),
        (PromptContent(context_template="{title}"), "context_template does not name {context}"),
        (PromptContent(input_template="{input} {response}"), "input_template names {response}, which is not known there"),
        (PromptContent(context_template="{context} {response}"), "context_template names {response}"),
        (PromptContent(few_shot_count=-1), "few_shot_count is -1; expected 0"),
        (PromptContent(few_shot_count=2), "few_shot_count is 2, but no few_shot_file is given"),
    ],
)
def test_a_setting_that_cannot_serve_is_an_error(content: PromptContent, found: str) -> None:
    with pytest.raises(UserError) as error:
        check_sources(content, None)
    assert found in str(error.value)


def test_a_loom_may_not_name_the_reply(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"table \[question\] names \{response\}"):
        check_sources(PromptContent(), loom_of(tmp_path, "[question]\n_ = '{response}'\n"))


def examples(folder: Path, text: str) -> str:
    (folder / "shots.json").write_text(text, encoding="utf-8")
    return str(folder / "shots.json")


TWO = [{"input": "A?", "output": "A."}, {"input": "B?", "output": "B."}]
TURNS = (message("user", "A?"), message("assistant", "A."), message("user", "B?"), message("assistant", "B."))


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(TWO),
        "\n".join(json.dumps(each) for each in TWO) + "\n",
        json.dumps([{"messages": TURNS[:2]}, {"messages": TURNS[2:]}]),
        json.dumps({"messages": TURNS}),
        json.dumps(TURNS),
        "\ufeff" + json.dumps(TWO),
    ],
    ids=["list", "lines", "messages", "one", "cot_source", "byte_order_mark"],
)
def test_examples_are_earlier_turns_after_the_system_message(tmp_path: Path, text: str) -> None:
    content = PromptContent(system_prompt="Sys.", few_shot_file=examples(tmp_path, text))
    assert build(ROW, content, None)[0] == (message("system", "Sys."), *TURNS, message("user", "Why?"))


def test_examples_stand_before_a_chat_rows_own_turns(tmp_path: Path) -> None:
    content = PromptContent(few_shot_file=examples(tmp_path, json.dumps(TWO)))
    assert build(Row(messages=CHAT), content, None)[0] == (CHAT[0], *TURNS, *CHAT[1:4])


def test_few_shot_count_takes_the_first(tmp_path: Path) -> None:
    content = PromptContent(few_shot_file=examples(tmp_path, json.dumps(TWO)), few_shot_count=1)
    assert build(ROW, content, None)[0] == (*TURNS[:2], message("user", "Why?"))


def test_an_example_is_written_like_a_row(tmp_path: Path) -> None:
    path = examples(tmp_path, json.dumps([{"input": "A?", "output": "A.", "name": "Ann"}]))
    content = PromptContent(input_template="{name}: {input}", response_template="<{response}>", few_shot_file=path)
    prepared = prepared_content(content, None)
    assert prepared.examples == (message("user", "Ann: A?"), message("assistant", "<A.>"))


def test_an_example_without_the_column_of_a_marker_is_named(tmp_path: Path) -> None:
    content = PromptContent(input_template="{name}: {input}", few_shot_file=examples(tmp_path, json.dumps(TWO)))
    with pytest.raises(UserError, match=r"shots.json, example 1: input_template: the marker \{name\} has no value"):
        prepared_content(content, None)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "has no example"),
        ("[]", "has no example"),
        ('{"input": "a"', "line 1 is not valid JSON"),
        ('{"input": "a", "output": "b"}\nx', "line 2 is not valid JSON"),
        ("[" * 100_000, "is JSON nested too deeply"),
        ("3", "line 1 is 3. Expected {"),
        ('[{"inptu": "a", "output": "b"}]', "example 1 has no 'input'. Did you mean 'inptu'?"),
        ('[{"input": "a", "output": 3}, {"input": "", "output": "b"}]', "example 1: 'output' is 3, expected a text; "),
        ('[{"input": "a", "output": 3}, {"input": "", "output": "b"}]', "example 2: 'input' is \"\", expected a text"),
        ('{"messages": []}', "line 1: expected messages of user and assistant in turn"),
        ('{"messages": "ab"}', "line 1: expected messages of user and assistant in turn"),
        (
            '{"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "a"}]}',
            'message 1 is of "assistant"',
        ),
        ('{"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "a"}]}', "is given by system_prompt"),
        ('{"messages": [1, 2]}', "message 1 is of 1, expected 'user'"),
        ('{"messages": [{"role": "user"}, {"role": "assistant", "content": "a"}]}', "message 1 has no text as its 'content'"),
    ],
)
def test_a_bad_example_file_is_an_error_that_names_the_place(tmp_path: Path, text: str, found: str) -> None:
    path = examples(tmp_path, text)
    with pytest.raises(UserError) as error:
        prepared_content(PromptContent(few_shot_file=path), None)
    assert path in str(error.value)
    assert found in str(error.value)


def test_an_example_file_that_is_missing_or_not_utf8_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.json cannot be read: No such file"):
        prepared_content(PromptContent(few_shot_file=str(tmp_path / "none.json")), None)
    (tmp_path / "bad.json").write_bytes(b"[\xff]")
    with pytest.raises(UserError, match=r"bad\.json is not UTF-8, at byte 1"):
        prepared_content(PromptContent(few_shot_file=str(tmp_path / "bad.json")), None)


def test_more_examples_than_the_file_has_is_an_error(tmp_path: Path) -> None:
    content = PromptContent(few_shot_file=examples(tmp_path, json.dumps(TWO)), few_shot_count=3)
    with pytest.raises(UserError, match=r"few_shot_count is 3, but .*shots.json has 2 examples"):
        prepared_content(content, None)
