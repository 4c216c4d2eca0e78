"""Chat templates as Go templates: equal to what `transformers` renders, or refused with the reason."""

from datetime import date
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils import chat_template_utils

from finetune_dataflow.engine import go_template_render
from finetune_dataflow.engine.chat import load_encoder
from finetune_dataflow.engine.formats import FORMATS
from finetune_dataflow.engine.go_template import Proof, prove, translate
from finetune_dataflow.engine.go_template_parse import GoTemplateError
from finetune_dataflow.engine.go_template_render import collated, execute, render_go
from finetune_dataflow.errors import UserError
from tests.chat_templates import EXAMPLES, IM, INST, QWEN2, REFUSED, Messages, TheDay, jinja, talk, translated
from tests.tiny_model import CHATML

TALKS = [("user",), ("user", "assistant", "user"), ("user", "assistant", "user", "assistant", "user")]


@pytest.fixture(autouse=True)
def one_day(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template_utils, "datetime", TheDay)


def go(name: str, messages: Messages) -> str:
    template = translated(name)
    return template.bos + render_go(template.text, messages)


def test_chatml_comes_out_as_this() -> None:
    template = translate(CHATML, IM, adds_bos=False)
    assert (template.stops, template.notes, template.bos, template.takes_system) == (("<|im_end|>",), (), "", True)
    assert (
        template.text
        == r"""{{- $previous := "" }}
{{- range .Messages }}
  {{- if eq .Role "system" }}
    {{- if eq $previous "" }}
      {{- "<|im_start|>system\n" }}{{- .Content }}
    {{- else }}
      {{- "<|im_end|>\n<|im_start|>system\n" }}{{- .Content }}
    {{- end }}
  {{- else if eq .Role "user" }}
    {{- if eq $previous "" }}
      {{- "<|im_start|>user\n" }}{{- .Content }}
    {{- else }}
      {{- "<|im_end|>\n<|im_start|>user\n" }}{{- .Content }}
    {{- end }}
  {{- else if eq .Role "assistant" }}
    {{- if eq $previous "" }}
      {{- "<|im_start|>assistant\n" }}{{- .Content }}
    {{- else }}
      {{- "<|im_end|>\n<|im_start|>assistant\n" }}{{- .Content }}
    {{- end }}
  {{- else }}
    {{- template "no place for a message that is not of system, user or assistant" . }}
  {{- end }}
  {{- $previous = .Role }}
{{- end }}
{{- if eq $previous "assistant" }}
{{- else if eq $previous "" }}
  {{- template "no question" . }}
{{- else }}
  {{- "<|im_end|>\n<|im_start|>assistant\n" }}
{{- end }}"""
    )


def test_a_conversation_is_rendered_as_a_person_would_write_it() -> None:
    assert render_go(translate(QWEN2, IM, adds_bos=False).text, talk(["user", "assistant", "user"])) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHi!<|im_end|>\n"
        "<|im_start|>assistant\nYes.<|im_end|>\n<|im_start|>user\nNo?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("name", EXAMPLES)
def test_what_is_known_of_a_chat_template_is_found(name: str) -> None:
    example, found = EXAMPLES[name], translated(name)
    assert (found.stops, found.bos, found.takes_system) == (example.stops, example.bos, example.takes_system)
    for words in example.notes:
        assert any(words in note for note in found.notes), (words, found.notes)


@pytest.mark.parametrize("name", EXAMPLES)
def test_conversations_are_rendered_as_transformers_does(name: str) -> None:
    example, compared = EXAMPLES[name], 0
    for roles in [*TALKS, *(("system", *roles) for roles in TALKS)]:
        if ("system" in roles and not example.takes_system) or (name == "one question" and len(roles) > 2):
            continue
        for texts in (("a", "b", "c"), ('"{{ .x }}"', "  \n{% y %}\u00a0 ", "'<|im_end|>' \u2003"), ("\n\n", " z ", "ö 漢 😀")):
            if name == "llama2" and texts[0] == "\n\n":
                continue  # it trims the system text and an empty question as one: there is a note
            assert go(name, talk(roles, texts)) == jinja(example, talk(roles, texts)), (roles, texts)
            compared += 1
    assert compared >= 3


@pytest.mark.parametrize("name", ["chatml", "qwen2.5", "qwen3", "llama3", "llama3.2", "phi3", "zephyr", "granite", "olmo2"])
def test_a_system_message_in_the_middle_is_rendered_where_the_chat_template_takes_one(name: str) -> None:
    for roles in (("user", "system", "user"), ("system", "user", "assistant", "system", "user"), ("assistant", "system", "user")):
        assert go(name, talk(roles)) == jinja(EXAMPLES[name], talk(roles)), roles


@pytest.mark.parametrize("name", ["llama2", "mistral-v3", "gemma3", "vicuna", "command-r", "deepseek"])
def test_a_system_message_in_the_middle_stops_the_rest(name: str) -> None:
    with pytest.raises(GoTemplateError, match="no place for a system message after the first message"):
        go(name, talk(["user", "assistant", "system", "user"]))


def test_a_system_message_stops_a_template_that_has_no_place_for_one() -> None:
    with pytest.raises(GoTemplateError, match="'no place for a system message' not defined"):
        go("gemma2", talk(["system", "user"]))


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_message_of_another_role_stops_every_template(name: str) -> None:
    with pytest.raises(GoTemplateError, match="not of system, user or assistant"):
        go(name, talk(["user", "tool"]))


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_last_reply_is_left_open_after_what_generation_is_fed(name: str) -> None:
    example = EXAMPLES[name]
    for roles in TALKS[:1] if name == "one question" else TALKS:
        for system in ([], ["system"]) if example.takes_system else ([],):
            messages = talk([*system, *roles])
            begun = [*messages, {"role": "assistant", "content": " It is\n"}]
            assert go(name, begun) == f"{jinja(example, messages)} It is\n"


@pytest.mark.parametrize("name", ["llama2", "mistral-v1", "mistral-v3", "gemma2", "gemma3", "vicuna", "command-r"])
def test_a_reply_whose_question_ollama_has_dropped_is_left_out(name: str) -> None:
    lead = talk(["system"]) if EXAMPLES[name].takes_system else []
    rest = talk(["user", "assistant", "user"])
    assert go(name, [*lead, *talk(["assistant"]), *rest]) == go(name, [*lead, *rest]) == jinja(EXAMPLES[name], [*lead, *rest])


@pytest.mark.parametrize("name", ["chatml", "qwen3", "llama3.2", "phi3", "deepseek", "granite"])
def test_a_reply_at_the_beginning_is_rendered_where_the_chat_template_takes_one(name: str) -> None:
    assert go(name, talk(["assistant", "user"])) == jinja(EXAMPLES[name], talk(["assistant", "user"]))


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
PADS = st.text(st.sampled_from(" \n\t\r\x0b\x1c\u0085\u00a0\u1680\u2003\u2028\u3000\u200b\ufeff"), max_size=6)
CONTENTS = st.builds("{}{}x{}{}".format, PADS, TEXTS, TEXTS, PADS)


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(sorted(EXAMPLES)), texts=st.lists(CONTENTS, min_size=4, max_size=4), system=st.booleans())
def test_any_texts_are_rendered_as_transformers_does(name: str, texts: list[str], system: bool) -> None:
    example = EXAMPLES[name]
    turns = ["user"] if name == "one question" else ["user", "assistant", "user"]
    messages = talk(["system", *turns] if system and example.takes_system else turns, texts)
    assert go(name, messages) == jinja(example, messages)


def test_long_white_space_is_trimmed() -> None:
    padding = "\n \u3000" * 500
    messages = talk(["user"], [f"{padding}a{padding}b{padding}"])
    assert go("llama3", messages) == jinja(EXAMPLES["llama3"], messages)


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_go_template_can_write_is_refused_with_its_construct(name: str) -> None:
    source, words = REFUSED[name]
    with pytest.raises(UserError) as caught:
        translate(source, {"eos_token": "</s>"}, adds_bos=False)
    assert words in str(caught.value)


def test_a_number_in_the_template_makes_the_tried_conversations_longer() -> None:
    late = "{% for m in messages %}{{ ('<late>' if loop.index > 20 else '<q>') + m.content }}{% endfor %}"
    with pytest.raises(UserError, match="differs from one place"):
        translate(late, {}, adds_bos=False)


def test_a_template_that_reaches_for_pythons_internals_is_refused() -> None:
    with pytest.raises(UserError, match="refuses a single question"):
        translate("{{ messages.__class__.__mro__[1].__subclasses__() }}", {}, adds_bos=False)


def test_a_beginning_of_sequence_is_not_written_twice() -> None:
    one, other = (translate(EXAMPLES["gemma2"].source, EXAMPLES["gemma2"].tokens, adds_bos=adds) for adds in (True, False))
    text = "<start_of_turn>user\nHi!<end_of_turn>\n<start_of_turn>model\n"
    assert (one.bos, render_go(one.text, talk(["user"]))) == ("<bos>", text)
    assert (other.bos, render_go(other.text, talk(["user"]))) == ("", f"<bos>{text}")


def test_a_beginning_of_sequence_within_a_conversation_stays() -> None:
    template = translate(EXAMPLES["llama2"].source, INST, adds_bos=True)
    text = render_go(template.text, talk(["user", "assistant", "user"]))
    assert text == "[INST] Hi! [/INST] Yes. </s><s>[INST] No? [/INST]"


def test_a_beginning_of_sequence_that_ollama_alone_writes_is_noted() -> None:
    assert "writes no beginning of sequence" in translate(CHATML, INST, adds_bos=True).notes[0]


def test_the_date_is_that_of_the_day_that_is_named() -> None:
    example = EXAMPLES["llama3.2"]
    template = translate(example.source, example.tokens, adds_bos=True, today=date(2030, 12, 24))
    assert "Today Date: 24 Dec 2030\n" in render_go(template.text, talk(["user"]))
    assert any("always writes that of 24 December 2030" in note for note in template.notes)
    with pytest.raises(UserError, match="`strftime_now`"):
        translate(example.source, example.tokens, adds_bos=True)


@pytest.mark.parametrize("name", ["chatml", "llama2", "mistral-v3"])
@pytest.mark.parametrize("system", ["Be brief.", 'a """\n\\n {{ . }} \u200d\ufeff\x1b b'])
def test_a_system_text_in_the_template_stands_where_a_conversation_brings_none(name: str, system: str) -> None:
    example = EXAMPLES[name]
    template = translate(example.source, example.tokens, adds_bos=False, default_system=system)
    for roles in TALKS:
        led = [{"role": "system", "content": system}, *talk(roles)]
        assert render_go(template.text, talk(roles)) == jinja(example, led)
        assert render_go(template.text, talk(["system", *roles])) == jinja(example, talk(["system", *roles]))


def test_an_empty_system_text_counts_as_none_where_the_chat_template_says_so() -> None:
    empty = [{"role": "system", "content": ""}, *talk(["user"])]
    for template, expected in (
        (FORMATS["llama2"], "<s>[INST] Hi! [/INST]"),
        (CHATML, "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\n"),
    ):
        assert render_go(translate(template, INST, adds_bos=False).text, empty) == expected


def test_a_system_text_that_the_chat_template_leaves_out_is_left_out_and_noted() -> None:
    source = "{% for m in messages %}{% if m.role != 'system' %}{{ m.role + ':' + m.content + ';' }}{% endif %}{% endfor %}"
    template = translate(source, {}, adds_bos=False)
    assert render_go(template.text, talk(["system", "user"], ["a", "b"])) == "user:b;"
    assert any("leaves out the text of a system message" in note for note in template.notes)


def test_the_modelfiles_system_text_stands_before_a_conversation_that_brings_none() -> None:
    text = translate(CHATML, IM, adds_bos=False).text
    start = "<|im_start|>system\nBe.<|im_end|>\n<|im_start|>user\nHi!"
    assert render_go(text, talk(["user"]), "Be.").startswith(start)
    assert "Be." not in render_go(text, talk(["system", "user"]), "Be.")


def test_messages_of_one_role_in_a_row_are_one_as_in_ollama() -> None:
    assert collated(talk(["system", "system", "user", "user", "tool", "tool"], ["a", "b", "c", "d", "e", "f"])) == talk(
        ["system", "user", "tool", "tool"], ["a\n\nb", "c\n\nd", "e", "f"]
    )


@pytest.mark.parametrize("prompt_format", FORMATS)
def test_the_named_formats_are_proven_on_the_training_render(prompt_format: str, tiny_model: Path) -> None:
    encoder = load_encoder(tiny_model, FORMATS[prompt_format])
    template = translate(
        FORMATS[prompt_format], encoder.tokenizer.special_tokens_map, adds_bos=False, control_strings=encoder.control_strings
    )
    conversations = [talk([*lead, *roles]) for roles in TALKS for lead in ([], ["system"])]
    assert prove(template, encoder.rendered, conversations) == Proof(6)
    assert template.stops == ("<|im_end|>",)


def test_a_proof_tells_what_ollama_joins_and_what_has_no_prompt(tiny_model: Path) -> None:
    encoder, template = load_encoder(tiny_model), translate(CHATML, IM, adds_bos=False)
    proof = prove(template, encoder.rendered, [talk(["user"]), [], talk(["user", "user"]), talk(["user", "assistant", "user"])])
    assert proof == Proof(equal=2, joined=1, without_prompt=1)
    assert proof.sentence == (
        "The Go template renders 2 conversations exactly as the training did. 1 more have messages of one role in a row, which "
        "Ollama joins: these it renders otherwise."
    )


def test_a_proof_that_fails_says_where_and_what(tiny_model: Path) -> None:
    template = translate(QWEN2, IM, adds_bos=False)
    with pytest.raises(UserError) as caught:
        prove(template, load_encoder(tiny_model).rendered, [talk(["system", "user"]), talk(["user"])])
    assert "not equal to the chat template on conversation 2: at character 13, expected" in str(caught.value)
    assert "'<|im_start|>user\\nHi!" in str(caught.value)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "parts that are not text"),
        ([{"role": "assistant", "content": None, "tool_calls": [{}]}], "without text"),
        ([{"role": "tool", "content": "12"}], "role 'tool'"),
        ([{"role": "assistant", "content": "x", "tool_calls": [{"function": {}}]}], "calls tools"),
    ],
)
def test_conversations_that_are_more_than_text_are_refused(messages: list[dict[str, object]], words: str) -> None:
    with pytest.raises(UserError, match=words):
        prove(translate(CHATML, IM, adds_bos=False), str, [messages])


def test_nothing_to_compare_proves_nothing() -> None:
    with pytest.raises(UserError, match="could not be compared"):
        prove(translate(CHATML, IM, adds_bos=False), str, [[]])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('a {{- " b" -}}  \n c', "a bc"),
        ('{{ if eq .N 1 2 }}yes{{ else if .T }}no{{ else }}none{{ end }}', "yes"),
        ('{{ $x := "a" }}{{ if .T }}{{ $x = "b" }}{{ $x := "c" }}{{ end }}{{ $x }}', "b"),
        ('{{ range $i, $m := .L }}{{ $i }}{{ $m }}{{ len (slice $.L $i) }};{{ end }}', "0x2;1yé1;"),
        ('{{ len "é" }}{{ slice "abc" 1 2 }}{{ printf "%.1s" "éa" }}{{ not .T }}{{ gt 2 1 }}', "2béfalsetrue"),
        ('{{ "}}\\"\\\\\\n\\u00e9\\U0001f600" }}', '}}"\\\né😀'),
        ('{{ define "d" }}{{ if . }}{{ template "d" (slice . 1) }}{{ . }}{{ end }}{{ end }}{{ template "d" "ab" }}', "bab"),
        ('{{ and "a" "" "b" }}|{{ or "" "c" "d" }}|{{ ne 1 2 }}', "|c|true"),
    ],
)  # fmt: skip
def test_the_part_of_go_that_is_known_is_executed_as_go_does(text: str, expected: str) -> None:
    assert execute(text, {"N": 2, "T": True, "L": ["x", "yé"]}) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{{ .Missing }}", "no field 'Missing'"),
        ("{{ $x }}", "undefined variable"),
        ("{{ $x = 1 }}", "undefined variable"),
        ("{{ if .T }}{{ $x := 1 }}{{ end }}{{ $x }}", "undefined variable"),
        ('{{ template "none" . }}', "template 'none' not defined"),
        ("{{ trim .T }}", "not an operand"),
        ("{{ .T | len }}", "not a token"),
        ("{{ .T", "does not end"),
        ('{{ "a }}', "does not end"),
        ("{{ if .T }}", "without an end"),
        ("{{ end }}", "without a beginning"),
        ('{{ eq "a" 1 }}', "incompatible types"),
        ('{{ slice "ab" 3 }}', "no slice"),
        ('{{ printf "%d" 1 }}', "only the first character"),
        ("{{ range .T }}{{ end }}", "not a list"),
        ('{{ if .T }}{{ define "x" }}{{ end }}{{ end }}', "inside another block"),
        ('{{ "\\q" }}', "escape"),
        ("{{ .T .T }}", "not expected"),
        ("{{ .L }}", "cannot be written"),
    ],
)
def test_what_is_outside_that_part_is_refused(text: str, words: str) -> None:
    with pytest.raises(GoTemplateError, match=words):
        execute(text, {"T": True, "L": ["x"]})


def test_a_template_that_calls_itself_for_ever_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(go_template_render, "DEEPEST", 2000)
    with pytest.raises(GoTemplateError, match="too deep"):
        execute('{{ define "x" }}{{ template "x" . }}{{ end }}{{ template "x" . }}', {})
