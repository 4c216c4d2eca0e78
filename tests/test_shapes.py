import json

import pytest

from finetune_dataflow.engine.object_text import object_text
from finetune_dataflow.engine.shapes import Record, ShapedRows, ShapeSettings, records
from finetune_dataflow.engine.sources import Source, SourceRow
from finetune_dataflow.engine.tokens import DroppedRow
from finetune_dataflow.errors import UserError

USER = {"role": "user", "content": "What is LoRA?"}
ASSISTANT = {"role": "assistant", "content": "A low-rank update."}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]}
TOOL = {"role": "tool", "content": "42"}


def source(*rows: object) -> Source:
    return Source(tuple(SourceRow(n, row, None, f"row {n}") for n, row in enumerate(rows, start=1)), "a list", False, "rows.json")


def shaped(*rows: object, **settings: str) -> ShapedRows:
    return records(source(*rows), ShapeSettings(**settings))


def one(row: object, **settings: str) -> Record:
    (record,) = shaped(row, **settings).records
    return record


def refusal(*rows: object, **settings: str) -> str:
    with pytest.raises(UserError) as caught:
        shaped(*rows, **settings)
    return str(caught.value)


def mapped(row: object, **settings: str) -> Record:
    return one(row, input_text_key="question", output_text_key="reply", **settings)


SHAPE_EXAMPLES: dict[str, tuple[dict[str, object], str, str, tuple[str, ...]]] = {
    "prompt_completion": ({"prompt": "q", "completion": "r"}, "q", "r", ()),
    "messages": ({"messages": [SYSTEM, USER, ASSISTANT]}, "What is LoRA?", "A low-rank update.", ()),
    "text": ({"text": "all of it"}, "", "all of it", ()),
    "input_output": ({"input": "q", "output": "r"}, "q", "r", ()),
    "context_response": ({"input": "q", "context": ["c", "d"], "response": "r"}, "q", "r", ("c", "d")),
    "sharegpt": ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}]}, "q", "r", ()),
    "alpaca": ({"instruction": "Add.", "input": "1 2", "output": "3"}, "Add.\n\n1 2", "3", ()),
}


@pytest.mark.parametrize("shape", SHAPE_EXAMPLES)
def test_a_shape_is_found_by_its_keys_and_gives_its_texts(shape: str) -> None:
    row, input_text, output_text, contexts = SHAPE_EXAMPLES[shape]
    found = shaped(row)
    assert found.shape == shape
    assert (found.records[0].input_text, found.records[0].output_text) == (input_text, output_text)
    assert found.records[0].contexts == contexts


@pytest.mark.parametrize("shape", SHAPE_EXAMPLES)
def test_a_named_shape_is_read_as_the_found_one(shape: str) -> None:
    assert shaped(SHAPE_EXAMPLES[shape][0], row_shape=shape).records == shaped(SHAPE_EXAMPLES[shape][0]).records


@pytest.mark.parametrize("shape", SHAPE_EXAMPLES)
def test_a_named_shape_refuses_rows_that_lack_its_keys(shape: str) -> None:
    told = refusal({"other": "x"}, row_shape=shape)
    assert "is missing in row 1. Row 1 has the keys 'other'." in told


def test_the_shape_is_said_aloud() -> None:
    assert shaped({"prompt": "q", "completion": "r"}).notes == (
        "Row shape: prompt_completion, found from the keys 'prompt', 'completion'.",
    )
    assert shaped({"text": "x"}, row_shape="text").notes == ("Row shape: text, as row_shape says, 'text'.",)


def test_a_record_keeps_the_whole_row_and_its_place() -> None:
    row = {"question": "q", "reply": "r", "id": 7}
    given = Source((SourceRow(9, row, "validation", "valid.jsonl line 2"),), "x", True, "data")
    found = records(given, ShapeSettings(input_text_key="question", output_text_key="reply"))
    assert found.records == (Record(9, "q", "r", (), (), (), row, None, "validation"),)
    assert found.notes[-1] == "Columns that are no part of the texts: 'id'."


def test_named_keys_win_over_a_shape() -> None:
    found = shaped({"text": "x", "question": "q", "reply": "r"}, input_text_key="question", output_text_key="reply")
    assert (found.shape, found.records[0].input_text) == ("key_mapping", "q")


def test_named_keys_that_no_row_has_name_the_shape_the_rows_have() -> None:
    told = refusal({"prompt": "q", "completion": "r"}, input_text_key="question", output_text_key="reply")
    assert "no row has the key 'question' (input_text_key)" in told and "the shape prompt_completion" in told


def test_contexts_of_mapped_rows_come_from_their_key() -> None:
    assert mapped({"question": "q", "reply": "r", "notes": "one"}, context_key="notes").contexts == ("one",)
    assert mapped({"question": "q", "reply": "r", "notes": ["one", " ", "two"]}, context_key="notes").contexts == ("one", "two")
    assert mapped({"question": "q", "reply": "r", "notes": None}, context_key="notes").contexts == ()


def test_a_context_key_that_no_row_has_names_the_nearest() -> None:
    told = refusal({"input": "q", "output": "r", "notes": "x"}, context_key="note")
    assert "no row has the key 'note' (context_key)" in told and "Did you mean 'notes'?" in told


@pytest.mark.parametrize("shape", ["messages", "sharegpt", "text"])
def test_a_context_key_is_refused_where_it_has_no_meaning(shape: str) -> None:
    assert f"context_key='c' has no meaning for rows of the shape {shape}" in refusal(SHAPE_EXAMPLES[shape][0], context_key="c")


def test_contexts_may_be_left_out() -> None:
    found = shaped({"input": "q", "response": "r"}, {"input": "q", "response": "r", "contexts": "c"})
    assert (found.shape, [each.contexts for each in found.records]) == ("context_response", [(), ("c",)])


def test_two_keys_of_contexts_are_refused_and_named() -> None:
    told = refusal({"input": "q", "response": "r", "context": "a", "contexts": ["b"]})
    assert "both 'context' and 'contexts' are given in row 1" in told


@pytest.mark.parametrize("blank", [None, "", "  "])
def test_an_empty_alpaca_input_is_left_out(blank: object) -> None:
    assert one({"instruction": "Add.", "input": blank, "output": "3"}).input_text == "Add."


def test_alpaca_files_may_hold_the_rendered_text_too() -> None:
    assert shaped({"instruction": "a", "input": "", "output": "b", "text": "Below is …"}).shape == "alpaca"


OBJECT = {"description": "A bug", "steps": ["open", "click"], "owner": {"name": "Ada"}, "urgent": True, "note": None}


def test_an_input_that_is_an_object_is_json() -> None:
    found = shaped({"question": OBJECT, "reply": "r"}, input_text_key="question", output_text_key="reply")
    assert json.loads(found.records[0].input_text) == OBJECT
    assert found.notes[1] == "The inputs of 1 row are objects or lists, written as JSON."


def test_an_input_that_is_an_object_may_be_labelled_text() -> None:
    text = mapped({"question": OBJECT, "reply": "r"}, object_format="labelled").input_text
    assert text == "description: A bug\nsteps:\n- open\n- click\nowner:\n  name: Ada\nurgent: true"


def test_labelled_text_shows_what_belongs_together() -> None:
    nested: dict[str, object] = {"rows": [{"a": 1, "b": [2, 3]}, ["x", "y"], "one\ntwo"], "text": "three\nfour"}
    assert object_text(nested, "labelled") == (
        "rows:\n- a: 1\n  b:\n  - 2\n  - 3\n- - x\n  - y\n- one\n  two\ntext:\n  three\n  four"
    )


def test_an_object_as_output_is_refused() -> None:
    assert "'output' must be text; found an object in row 1." in refusal({"input": "q", "output": {"a": 1}})


def test_messages_are_kept_whole_with_their_tools() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    record = one({"messages": [SYSTEM, USER, CALL, TOOL, ASSISTANT], "tools": tools})
    assert [each["role"] for each in record.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert record.messages[2] == {"role": "assistant", "content": "", "tool_calls": CALL["tool_calls"]}
    assert record.tools == tuple(tools)


def test_the_last_user_turn_and_the_last_reply_are_the_texts() -> None:
    record = one({"messages": [USER, ASSISTANT, {"role": "user", "content": "More?"}, {"role": "assistant", "content": "No."}]})
    assert (record.input_text, record.output_text) == ("More?", "No.")


def test_parts_of_text_are_joined() -> None:
    parts = [{"type": "text", "text": "What "}, {"type": "text", "text": "now?"}]
    assert one({"messages": [{"role": "user", "content": parts}, ASSISTANT]}).input_text == "What now?"


def test_fields_that_a_table_fills_with_null_are_left_out() -> None:
    given = [{**USER, "tool_calls": None, "name": None}, {**ASSISTANT, "tool_calls": None, "name": None}]
    assert one({"messages": given, "tools": None}).messages == (USER, ASSISTANT)


def test_tools_may_be_json_text() -> None:
    assert one({"messages": [USER, ASSISTANT], "tools": '[{"name": "f"}]'}).tools == ({"name": "f"},)


def test_turns_of_one_role_in_a_row_are_kept_and_said() -> None:
    found = shaped({"messages": [USER, USER, ASSISTANT]})
    assert len(found.records[0].messages) == 3
    assert found.notes[1].startswith("In 1 row two turns of one role follow each other")


def test_a_reply_that_is_a_tool_call_has_no_text() -> None:
    assert one({"messages": [USER, CALL]}).output_text == ""


def test_sharegpts_speakers_get_their_roles() -> None:
    turns = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "42"},
        {"from": "gpt", "value": "r"},
    ]
    record = one({"conversations": turns, "system": "Be brief.", "tools": "[]"})
    assert record.messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "q"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
        },
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "r"},
    )


def test_conversations_may_use_roles_and_content() -> None:
    assert one({"conversations": [USER, ASSISTANT]}).messages == (USER, ASSISTANT)


@pytest.mark.parametrize("completion", ["A low-rank update.", [ASSISTANT]])
def test_a_prompt_of_messages_makes_a_conversation(completion: object) -> None:
    record = one({"prompt": [SYSTEM, USER], "completion": completion})
    assert record.messages == (SYSTEM, USER, ASSISTANT)


def test_mixed_shapes_are_refused_with_counts_and_examples() -> None:
    pair, chat = {"prompt": "q", "completion": "r"}, {"messages": [USER, ASSISTANT]}
    told = refusal(pair, chat, pair, {"x": "y"})
    assert "2 prompt_completion (row 1), 1 messages (row 2), 1 of no known shape (row 4)" in told


def test_rows_that_fit_two_shapes_are_refused() -> None:
    told = refusal({"messages": [USER, ASSISTANT], "prompt": "q", "completion": "r"})
    assert "the rows fit more than one shape: messages (messages); prompt_completion (prompt, completion)" in told


def test_a_column_of_nulls_makes_no_shape() -> None:
    assert shaped({"messages": None, "prompt": "q", "completion": "r"}).shape == "prompt_completion"


def test_an_unknown_shape_lists_the_keys_found_the_nearest_and_the_shapes() -> None:
    told = refusal({"mesages": [USER, ASSISTANT], "id": 1})
    assert "Keys found: 'mesages', 'id'. Did you mean 'messages' for 'mesages'?" in told
    assert "sharegpt (conversations)" in told


def test_a_row_without_the_shape_of_the_others_is_named() -> None:
    told = refusal({"prompt": "q", "completion": "r"}, {"prompt": "q", "complete": "r"})
    assert "the key 'completion' is missing in row 2. Row 2 has the keys 'complete', 'prompt'. Did you mean 'complete'?" in told


def test_a_row_of_nulls_is_dropped_and_counted() -> None:
    found = shaped({"prompt": "q", "completion": "r"}, {"prompt": None, "completion": None})
    assert (len(found.records), found.dropped) == (1, (DroppedRow(2, "empty_row"),))
    assert found.notes[-1] == "1 row with no value at all left out (empty_row)."


@pytest.mark.parametrize(("value", "group"), [("a", "a"), (7, "7"), (None, None), ("", None)])
def test_a_group_is_text_or_a_number(value: object, group: str | None) -> None:
    assert one({"prompt": "q", "completion": "r", "who": value}, group_key="who").group == group


def test_a_missing_group_is_named_with_the_nearest() -> None:
    told = refusal({"prompt": "q", "completion": "r", "customer": "a"}, group_key="custom")
    assert "the key 'custom' is missing in row 1." in told and "Did you mean 'customer'?" in told


def test_a_group_that_is_an_object_is_refused() -> None:
    assert "'who' (group_key) must be text or a number; found an object in row 1." in refusal(
        {"prompt": "q", "completion": "r", "who": {}}, group_key="who"
    )


def test_faults_of_a_kind_are_told_once_with_their_rows() -> None:
    told = refusal(*[{"prompt": "", "completion": 5}] * 12)
    assert told == (
        "rows.json: 'prompt' is empty in rows 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 2 more.\n"
        "rows.json: 'completion' must be text; found a number in rows 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 2 more."
    )


BAD_SETTINGS: dict[str, tuple[dict[str, str], str]] = {
    "unknown shape": ({"row_shape": "message"}, "row_shape='message' is unknown"),
    "the nearest shape": ({"row_shape": "message"}, "Did you mean 'messages'?"),
    "unknown object format": ({"object_format": "yaml"}, "object_format='yaml' is unknown. Expected one of 'json', 'labelled'"),
    "one key": ({"input_text_key": "q"}, "output_text_key is not given"),
    "the other key": ({"output_text_key": "q"}, "input_text_key is not given"),
    "no keys": ({"row_shape": "key_mapping"}, "input_text_key is not given"),
    "keys twice": ({"input_text_key": "q", "output_text_key": "q"}, "are both 'q'"),
    "keys and a shape": ({"row_shape": "text", "input_text_key": "q", "output_text_key": "r"}, "both say where the texts are"),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_a_bad_setting_is_named(name: str) -> None:
    settings, expected = BAD_SETTINGS[name]
    assert expected in refusal({"text": "x"}, **settings)
