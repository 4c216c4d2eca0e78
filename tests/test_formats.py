from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
import pytest
from ogbujipt import prompting
from transformers import PreTrainedTokenizerFast

from finetune_dataflow.engine.chat import ChatEncoder
from finetune_dataflow.engine.formats import CONTROL_STRINGS, FORMATS, template
from finetune_dataflow.errors import UserError
from tests.tiny_model import byte_tokenizer

SYSTEM = {"role": "system", "content": "Be brief."}
FIRST = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "1"}]
SECOND = {"role": "user", "content": "Two?"}
REPLY = {"role": "assistant", "content": "2"}

GOLDEN = {
    "mistral": "<s>[INST]Be brief.\n\nOne?\n[/INST]1</s>[INST]Two?\n[/INST]",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n1<|im_end|>\n"
    "<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n",
    "llama2": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nOne? [/INST] 1 </s><s>[INST] Two? [/INST]",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nOne?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n1<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nTwo?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "alpaca": "Be brief.\n\n### Instruction:\nOne?\n\n### Response:\n1</s>\n\n### Instruction:\nTwo?\n\n### Response:\n",
    "phi": "<|system|>\nBe brief.<|end|>\n<|user|>\nOne?<|end|>\n<|assistant|>\n1<|end|>\n<|user|>\nTwo?<|end|>\n<|assistant|>\n",
    "gemma": "<s><start_of_turn>user\nBe brief.\n\nOne?<end_of_turn>\n<start_of_turn>model\n1<end_of_turn>\n"
    "<start_of_turn>user\nTwo?<end_of_turn>\n<start_of_turn>model\n",
    "vicuna": "Be brief.\n### USER: One?\n### ASSISTANT: 1</s>\n### USER: Two?\n### ASSISTANT: ",
    "user-assistant": "Be brief.\nUSER: One?\n\nASSISTANT:\n1</s>\nUSER: Two?\n\nASSISTANT:\n",
    "redpajama": "Be brief.\n<human>: One?\n<bot>: 1</s>\n<human>: Two?\n<bot>:",
    "dolly": "Be brief.\n\n### Instruction:\nOne?\n\n### Response:\n1\n\n### End\n\n### Instruction:\nTwo?\n\n### Response:\n",
}

# What a full conversation has after its prompt when its reply is "2".
ENDINGS = {
    "mistral": "2</s>",
    "chatml": "2<|im_end|>\n",
    "llama2": " 2 </s>",
    "llama3": "2<|eot_id|>",
    "alpaca": "2</s>",
    "phi": "2<|end|>\n",
    "gemma": "2<end_of_turn>\n",
    "vicuna": "2</s>",
    "user-assistant": "2</s>",
    "redpajama": " 2</s>",
    "dolly": "2\n\n### End",
}
WITH_BOS = ["mistral", "llama2", "llama3", "gemma"]

every_format = pytest.mark.parametrize("name", list(FORMATS))


def tokenizer(**special: str) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), **special)


def rendered(chat_template: str, messages: list[dict[str, str]], *, prompt: bool, **special: str) -> str:
    special = special or {"bos_token": "<s>", "eos_token": "</s>"}
    text = tokenizer(**special).apply_chat_template(
        messages, chat_template=chat_template, tokenize=False, add_generation_prompt=prompt
    )
    return str(text)


def test_the_formats_are_the_eleven_of_the_documentation() -> None:
    assert list(FORMATS) == [
        "mistral", "chatml", "llama2", "llama3", "alpaca", "phi", "gemma", "vicuna", "user-assistant", "redpajama", "dolly",
    ]  # fmt: skip


@every_format
def test_a_prompt_of_two_exchanges_has_the_formats_exact_text(name: str) -> None:
    assert rendered(template(name), [SYSTEM, *FIRST, SECOND], prompt=True) == GOLDEN[name]


@every_format
def test_what_is_trained_is_the_prompt_then_the_reply_then_its_end(name: str) -> None:
    assert rendered(FORMATS[name], [SYSTEM, *FIRST, SECOND, REPLY], prompt=False) == GOLDEN[name] + ENDINGS[name]


@every_format
@pytest.mark.parametrize("turns", [[FIRST[0]], [*FIRST, SECOND], [SYSTEM, FIRST[0]]], ids=["one", "two", "system"])
def test_a_prompt_is_the_beginning_of_its_full_conversation(name: str, turns: list[dict[str, str]]) -> None:
    prompt = rendered(FORMATS[name], turns, prompt=True)
    assert rendered(FORMATS[name], [*turns, REPLY], prompt=False).startswith(prompt)


@every_format
def test_white_space_in_a_row_is_kept(name: str) -> None:
    turns = [{"role": "user", "content": " \n a \n"}, {"role": "assistant", "content": " b\n"}]
    text = rendered(FORMATS[name], turns, prompt=False)
    assert " \n a \n" in text
    assert " b\n" in text


@every_format
def test_without_a_system_message_the_format_adds_no_words_of_its_own(name: str) -> None:
    with_system = rendered(FORMATS[name], [SYSTEM, FIRST[0]], prompt=True)
    without = rendered(FORMATS[name], [FIRST[0]], prompt=True)
    assert "Be brief." in with_system
    assert len(without) < len(with_system)
    for word in ("system", "<<SYS>>", "helpful", "Below"):
        assert word not in without


@every_format
def test_the_beginning_of_sequence_is_written_by_the_formats_that_document_it(name: str) -> None:
    assert rendered(FORMATS[name], [FIRST[0]], prompt=True).count("<s>") == (1 if name in WITH_BOS else 0)


@every_format
def test_a_tokenizer_without_special_tokens_gets_none_and_no_error(name: str) -> None:
    text = rendered(FORMATS[name], [*FIRST, SECOND], prompt=True, pad_token="<pad>")
    assert "None" not in text
    assert "<s>" not in text


@every_format
def test_an_encoder_teaches_every_format_to_stop(name: str) -> None:
    with_template = tokenizer(bos_token="<|im_start|>", eos_token="<|endoftext|>")
    with_template.chat_template = FORMATS[name]
    encoder = ChatEncoder(with_template)
    assert encoder.end_of_turn_ids[-1] in encoder.stop_ids
    assert encoder.end_of_turn_ids[-1] in (256, 258)


@every_format
def test_control_strings_of_a_format_are_those_its_text_has(name: str) -> None:
    assert CONTROL_STRINGS[name]
    for string in CONTROL_STRINGS[name]:
        assert string in GOLDEN[name]


@every_format
def test_an_unknown_role_is_refused(name: str) -> None:
    with pytest.raises(jinja2.TemplateError, match="not here a message of tool"):
        rendered(FORMATS[name], [*FIRST, {"role": "tool", "content": "x"}], prompt=True)


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("chatml", "llama3", "phi")])
def test_two_user_turns_in_a_row_are_refused_where_the_format_has_exchanges(name: str) -> None:
    with pytest.raises(jinja2.TemplateError, match="user and assistant in turn"):
        rendered(FORMATS[name], [SECOND, SECOND], prompt=True)


@pytest.mark.parametrize(
    ("name", "delimiters"),
    [("vicuna", prompting.VICUNA_DELIMITERS), ("user-assistant", prompting.VICUNA_NOHASH_DELIMITERS)],
)
def test_a_prompt_is_what_ogbujipt_itself_formats(name: str, delimiters: dict[Any, str]) -> None:
    expected = prompting.format("One?", preamble="Be brief.", delimiters=delimiters)
    assert rendered(FORMATS[name], [SYSTEM, FIRST[0]], prompt=True) == expected


def test_an_unknown_name_names_the_nearest_and_all() -> None:
    with pytest.raises(UserError) as error:
        template("chatm")
    assert str(error.value) == (
        "prompt_format is 'chatm', which is neither a format nor a file. Did you mean 'chatml'? Expected one of mistral, chatml, "
        "llama2, llama3, alpaca, phi, gemma, vicuna, user-assistant, redpajama, dolly, or the path of a Jinja chat template "
        "(.jinja, .j2)."
    )


@pytest.mark.parametrize("value", ["", "x" * 5000, "a\0b", "{% for message in messages %}"])
def test_a_value_that_is_no_name_is_an_error_of_a_few_lines(value: str) -> None:
    with pytest.raises(UserError) as error:
        template(value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("name", ["mine.jinja", "mine.j2", "mine.txt"])
def test_a_jinja_file_is_taken_as_it_is(tmp_path: Path, name: str) -> None:
    text = "{% for message in messages %}{{ message.content }}|{% endfor %}\n"
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert template(str(tmp_path / name)) == text


@pytest.mark.parametrize(
    "extension", ["{% generation %}{{ m.content }}{% endgeneration %}", "{% break %}", "{{ tools | tojson }}"]
)
def test_what_transformers_adds_to_jinja_is_no_error(tmp_path: Path, extension: str) -> None:
    text = "{% for m in messages %}" + extension + "{% endfor %}"
    (tmp_path / "mine.jinja").write_text(text)
    assert template(str(tmp_path / "mine.jinja")) == text


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("{% for m in messages %}\n{{ m.content }}\n", "line 2: not a valid Jinja template: Unexpected end of template"),
        ("\n\n{{ messages ", "line 3: not a valid Jinja template: unexpected end of template"),
        ("\n{{ messages | nothing }}", "line 2: not a valid Jinja template: No filter named 'nothing'."),
        ("Hello", "never reads `messages`"),
        ("", "never reads `messages`"),
    ],
)
def test_a_file_that_is_no_chat_template_names_file_and_line(tmp_path: Path, text: str, found: str) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        template(str(path))
    assert str(path) in str(error.value)
    assert found in str(error.value)


def test_a_jinja_file_that_is_missing_or_not_utf8_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.jinja cannot be read: No such file or directory"):
        template(str(tmp_path / "none.jinja"))
    (tmp_path / "bad.jinja").write_bytes(b"{{ messages }}\xff")
    with pytest.raises(UserError, match=r"bad\.jinja is not UTF-8, at byte 14"):
        template(str(tmp_path / "bad.jinja"))
    (tmp_path / "folder.jinja").mkdir()
    with pytest.raises(UserError, match=r"folder\.jinja cannot be read: Is a directory"):
        template(str(tmp_path / "folder.jinja"))
    with pytest.raises(UserError, match="null"):
        template("a\0.jinja")


@pytest.mark.parametrize(
    "hostile", ["{{ messages.append(1) }}", "{{ messages.__class__.__mro__ }}", "{{ cycler.__init__.__globals__ }}"]
)
def test_a_file_is_rendered_in_a_sandbox_that_cannot_change_or_reach_anything(tmp_path: Path, hostile: str) -> None:
    (tmp_path / "mine.jinja").write_text("{{ messages }}" + hostile)
    with pytest.raises(jinja2.exceptions.SecurityError):
        rendered(template(str(tmp_path / "mine.jinja")), FIRST, prompt=False)
