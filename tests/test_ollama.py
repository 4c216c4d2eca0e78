"""The directory for Ollama: a Modelfile that reads back exactly, its files, the two commands, and what is refused."""

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune_dataflow.engine import ollama
from finetune_dataflow.engine.go_template import GoTemplate, translate
from finetune_dataflow.engine.ollama import fits_modelfile, write_ollama
from finetune_dataflow.errors import UserError
from tests.chat_templates import EXAMPLES, IM
from tests.modelfile import read_modelfile
from tests.tiny_model import CHATML

TEMPLATE = translate(CHATML, IM, adds_bos=False)


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "fused model.gguf"
    path.write_bytes(b"GGUF\x03 weights")
    return path


def write(out: Path, **changed: Any) -> Path:
    arguments: dict[str, Any] = {
        "gguf": None, "base_name": None, "adapter_gguf": None, "template": TEMPLATE, "system": "", "parameters": {},
        "name": "my-model",
    }  # fmt: skip
    return write_ollama(out, **{**arguments, **changed})


def refused(out: Path, **changed: Any) -> str:
    with pytest.raises(UserError) as caught:
        write(out, **changed)
    return str(caught.value)


def instructions(directory: Path) -> list[tuple[str, str]]:
    return read_modelfile((directory / "Modelfile").read_bytes().decode())


def test_a_fused_model_is_written_with_everything_that_ollama_needs(gguf: Path, tmp_path: Path) -> None:
    parameters = {"temperature": 0, "num_ctx": 2048, "num_predict": 256, "top_p": 0.95, "stop": ["###"]}
    out = write(tmp_path / "out", gguf=gguf, system="Be brief.", parameters=parameters, license_text="Apache-2.0")
    assert out == tmp_path / "out"
    assert sorted(each.name for each in out.iterdir()) == ["Modelfile", "README.md", "model.gguf"]
    assert (out / "model.gguf").read_bytes() == gguf.read_bytes()
    assert instructions(out) == [
        ("from", "./model.gguf"), ("template", TEMPLATE.text), ("system", "Be brief."), ("stop", "<|im_end|>"), ("stop", "###"),
        ("temperature", "0"), ("num_ctx", "2048"), ("num_predict", "256"), ("top_p", "0.95"), ("license", "Apache-2.0"),
    ]  # fmt: skip


def test_the_modelfile_begins_like_this(gguf: Path, tmp_path: Path) -> None:
    lines = (write(tmp_path / "out", gguf=gguf, system="Be brief.") / "Modelfile").read_text().splitlines()
    assert lines[:3] == [
        "# Written by finetune-dataflow: README.md says how to use it.",
        "FROM ./model.gguf",
        'TEMPLATE """{{- $previous := "" }}',
    ]
    assert lines[-2:] == ['SYSTEM """Be brief."""', 'PARAMETER stop "<|im_end|>"']


def test_an_adapter_stands_on_a_model_that_ollama_knows(gguf: Path, tmp_path: Path) -> None:
    out = write(tmp_path / "out", base_name="someone/smollm2:135m", adapter_gguf=gguf)
    assert instructions(out)[:2] == [("from", "someone/smollm2:135m"), ("adapter", "./adapter.gguf")]
    assert sorted(each.name for each in out.iterdir()) == ["Modelfile", "README.md", "adapter.gguf"]


def test_an_adapter_stands_on_a_gguf_file_of_the_base(gguf: Path, tmp_path: Path) -> None:
    base = tmp_path / "base.gguf"
    base.write_bytes(b"GGUF base")
    out = write(tmp_path / "out", gguf=base, adapter_gguf=gguf)
    assert instructions(out)[:2] == [("from", "./model.gguf"), ("adapter", "./adapter.gguf")]
    assert (out / "model.gguf").read_bytes() == b"GGUF base" and (out / "adapter.gguf").read_bytes() == gguf.read_bytes()


def test_the_readme_has_the_two_commands_and_the_notes(gguf: Path, tmp_path: Path) -> None:
    template = GoTemplate(TEMPLATE.text, (), ("A note of\nthe template.",))
    text = (write(tmp_path / "out", gguf=gguf, template=template, name="me/it:1b", notes=["Proven."]) / "README.md").read_text()
    assert "\n```\nollama create me/it:1b -f Modelfile\nollama run me/it:1b\n```\n" in text
    assert text.endswith("\n* Proven.\n* A note of the template.\n")


def test_a_model_is_linked_and_not_copied_where_that_is_possible(gguf: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.gguf"
    link.symlink_to(gguf)
    for source in (gguf, link):
        made = write(tmp_path / "out", gguf=source) / "model.gguf"
        assert made.samefile(gguf) and not made.is_symlink()


def test_a_model_is_copied_where_it_cannot_be_linked(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_link(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_link)
    made = write(tmp_path / "out", gguf=gguf) / "model.gguf"
    assert made.read_bytes() == gguf.read_bytes() and not made.samefile(gguf)


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_template_reads_back_exactly(name: str, gguf: Path, tmp_path: Path) -> None:
    each = EXAMPLES[name]
    template = translate(each.source, each.tokens, adds_bos=False, control_strings=each.controls, today=each.today)
    found = instructions(write(tmp_path / "out", gguf=gguf, template=template))
    assert ("template", template.text) in found
    assert [value for key, value in found if key == "stop"] == [*each.stops]


HOSTILE = [
    'She said """no""" twice.', '"quoted"', '"', '""', "#", " outer ", "\n\nFROM evil\n\n", "a\\nb", "a\r\nb\tc", "${HOME} `id`",
    'FROM x\nSYSTEM """y', "{{ .System }}", "漢字 é 😀", 'ends with a quote"', 'in one line """ FROM evil',
]  # fmt: skip


@pytest.mark.parametrize("system", HOSTILE)
def test_a_system_text_reads_back_exactly_whatever_it_says(system: str, gguf: Path, tmp_path: Path) -> None:
    assert fits_modelfile(system)
    found = instructions(write(tmp_path / "out", gguf=gguf, system=system))
    assert found == [("from", "./model.gguf"), ("template", TEMPLATE.text), ("system", system), ("stop", "<|im_end|>")]


@pytest.mark.parametrize(
    ("system", "words"),
    [
        ('"""\nFROM evil', "quotes at the end of a line"),
        ('x"\n"""\nFROM evil\n"""\n"y"\n', "quotes at the end of a line"),
        ("a\u00a0b", r"the character '\\xa0', which Ollama drops"),
        ("a\u200db", r"the character '\\u200d'"),
        ("a\x00b", r"the character '\\x00'"),
        ("a\ud800b", r"the character '\\ud800'"),
    ],
)
def test_a_text_that_no_form_can_hold_is_refused(system: str, words: str, gguf: Path, tmp_path: Path) -> None:
    assert not fits_modelfile(system)
    assert words.replace("\\\\", "\\") in refused(tmp_path / "out", gguf=gguf, system=system)
    assert not (tmp_path / "out").exists()


PIECES = st.one_of(
    st.sampled_from(['"', '"""', "\n", " ", "\t", "\r\n", "\\", "#", "SYSTEM ", "FROM x", "a"]), st.text(max_size=5)
)
TEXTS = st.lists(PIECES, max_size=12).map("".join)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(system=TEXTS.filter(bool), stop=TEXTS.filter(bool), license_text=TEXTS.filter(bool))
def test_any_texts_read_back_exactly_or_are_refused(
    system: str, stop: str, license_text: str, gguf: Path, tmp_path: Path
) -> None:
    given_texts = {"system": system, "parameters": {"stop": stop}, "license_text": license_text}
    if all(map(fits_modelfile, (system, stop, license_text))):
        found = instructions(write(tmp_path / "out", gguf=gguf, **given_texts))
        stops = [("stop", each) for each in dict.fromkeys(["<|im_end|>", stop])]
        assert found == [
            ("from", "./model.gguf"),
            ("template", TEMPLATE.text),
            ("system", system),
            *stops,
            ("license", license_text),
        ]
    else:
        assert "cannot be written into a Modelfile" in refused(tmp_path / "out", gguf=gguf, **given_texts)


def test_an_earlier_directory_of_ours_is_replaced(gguf: Path, tmp_path: Path) -> None:
    out = write(tmp_path / "out", base_name="smollm2", adapter_gguf=gguf)
    write(out, gguf=out / "adapter.gguf", system="New.")
    assert sorted(each.name for each in out.iterdir()) == ["Modelfile", "README.md", "model.gguf"]
    assert (out / "model.gguf").read_bytes() == gguf.read_bytes() and ("system", "New.") in instructions(out)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["fused model.gguf", "out"]


def test_an_empty_directory_is_filled(gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert (write(tmp_path / "out", gguf=gguf) / "Modelfile").is_file()


def test_a_directory_with_other_things_is_refused_and_left_alone(gguf: Path, tmp_path: Path) -> None:
    for name, content, words in (
        ("notes.txt", "mine", "holds other things: notes.txt"),
        ("README.md", "mine", "holds other things: README.md"),
        ("Modelfile", "FROM mine", "holds other things: Modelfile"),
    ):
        out = tmp_path / name.lower() / "out"
        out.mkdir(parents=True)
        (out / name).write_text(content)
        assert words in refused(out, gguf=gguf)
        assert [each.name for each in out.iterdir()] == [name] and (out / name).read_text() == content
        assert [each.name for each in out.parent.iterdir()] == ["out"]


def test_a_file_in_the_place_of_the_directory_is_refused(gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    assert "is there and no directory" in refused(tmp_path / "out", gguf=gguf)


def test_what_fails_while_it_is_written_leaves_nothing(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ollama, "_place", full)
    assert "cannot be written: No space left on device" in refused(tmp_path / "out", gguf=gguf)
    assert [each.name for each in tmp_path.iterdir()] == ["fused model.gguf"]


def test_a_directory_that_cannot_be_replaced_stays(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = write(tmp_path / "out", gguf=gguf, system="Old.")
    rename = Path.rename

    def once(path: Path, target: Path) -> Path:
        if target == out and path.name.startswith(".") and not path.name.endswith(".old"):
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", once)
    assert "Input/output error" in refused(out, gguf=gguf, system="New.")
    assert ("system", "Old.") in instructions(out)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["fused model.gguf", "out"]


@pytest.mark.parametrize(
    "name", ["", "a b", "a;rm -rf ~", "$(id)", "a\nb", "-f", "../up", "a/b/c/d", "é", "x" * 81, "a:b:c", ":tag", "`a`", "a'"]
)
def test_a_name_that_is_none_is_refused(name: str, gguf: Path, tmp_path: Path) -> None:
    assert "is no name of a model in Ollama" in refused(tmp_path / "out", gguf=gguf, name=name)
    if name:
        assert "is no name of a model in Ollama" in refused(tmp_path / "out", adapter_gguf=gguf, base_name=name)


@pytest.mark.parametrize("name", ["a", "My-Model_1.5:7b-q4", "me/it", "hub.example.org:5000/me/it:latest"])
def test_a_name_in_ollamas_form_is_taken(name: str, gguf: Path, tmp_path: Path) -> None:
    assert f"ollama run {name}\n" in (write(tmp_path / "out", gguf=gguf, name=name) / "README.md").read_text()


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"temprature": 0}, "Parameter 'temprature' is not known. Did you mean 'temperature'?"),
        ({"temperature": "warm"}, "Parameter temperature='warm': expected a finite number"),
        ({"temperature": float("nan")}, "expected a finite number"),
        ({"num_ctx": 2048.5}, "Parameter num_ctx=2048.5: expected a whole number"),
        ({"seed": True}, "Parameter seed=True: expected a whole number"),
        ({"stop": ""}, "Parameter stop='': expected a string, or a list"),
        ({"stop": [1]}, "Parameter stop=[1]: expected a string, or a list"),
        ({"num_ctx\nFROM": 1}, r"Parameter 'num_ctx\nFROM' is not known"),
    ],
)
def test_a_parameter_that_ollama_does_not_take_is_refused(
    parameters: dict[str, object], words: str, gguf: Path, tmp_path: Path
) -> None:
    assert words in refused(tmp_path / "out", gguf=gguf, parameters=parameters)
    assert not (tmp_path / "out").exists()


def test_what_makes_no_model_is_refused(gguf: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other.gguf"
    other.write_bytes(b"PK\x03\x04")
    assert "one FROM" in refused(out)
    assert "one FROM" in refused(out, gguf=gguf, base_name="smollm2", adapter_gguf=gguf)
    assert "an adapter is needed" in refused(out, base_name="smollm2")
    assert "looks like a file" in refused(out, base_name="model.gguf", adapter_gguf=gguf)
    assert "There is no GGUF file" in refused(out, gguf=tmp_path / "none.gguf")
    assert "is no GGUF file" in refused(out, gguf=other)
    assert "is no GGUF file" in refused(out, gguf=gguf, adapter_gguf=other)
    assert not out.exists()


def test_a_system_text_is_refused_where_the_chat_template_has_no_place_for_one(gguf: Path, tmp_path: Path) -> None:
    each = EXAMPLES["gemma2"]
    template = translate(each.source, each.tokens, adds_bos=True)
    assert "no place for a system text" in refused(tmp_path / "out", gguf=gguf, template=template, system="Be brief.")


def test_a_text_that_no_modelfile_holds_goes_into_the_template(gguf: Path, tmp_path: Path) -> None:
    system = 'Zero\u200dwidth, "\n"""\n\x1b[31m, no-break\u00a0space'
    assert not fits_modelfile(system)
    template = translate(CHATML, IM, adds_bos=False, default_system=system)
    assert ("template", template.text) in instructions(write(tmp_path / "out", gguf=gguf, template=template))
