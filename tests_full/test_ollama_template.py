"""The Go templates rendered by Go itself: equal to `transformers`, and to this project's own renderer, errors included."""

import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from transformers.utils import chat_template_utils

from finetune_dataflow.engine.chat import load_encoder
from finetune_dataflow.engine.formats import FORMATS
from finetune_dataflow.engine.go_template import HOSTILE, PADDED, GoTemplate, prove, translate
from finetune_dataflow.engine.go_template_parse import GoTemplateError
from finetune_dataflow.engine.go_template_render import collated, execute, render_go
from finetune_dataflow.engine.ollama import write_ollama
from tests.chat_templates import EXAMPLES, Messages, TheDay, jinja, talk, translated
from tests.modelfile import read_modelfile
from tests.tiny_model import write_tiny_model

REPOSITORY = Path(__file__).parent.parent
Rendered = list[dict[str, str]]
Go = Callable[[str, Sequence[Messages]], Rendered]


@pytest.fixture(autouse=True)
def one_day(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template_utils, "datetime", TheDay)


@pytest.fixture(scope="session")
def by_go(tmp_path_factory: pytest.TempPathFactory) -> Go:
    """Renders conversations with tests_full/go/render.go; skipped where there is no Go."""
    go = shutil.which("go")
    if go is None:
        pytest.skip("no go was found on this machine (Debian: apt install golang-go)")
    directory = tmp_path_factory.mktemp("go")
    offline = {"GOPROXY": "off", "GOTOOLCHAIN": "local", "GO111MODULE": "off", "GOFLAGS": "", "GOCACHE": str(directory / "cache")}
    program = directory / "render"
    subprocess.run(
        [go, "build", "-o", str(program), str(REPOSITORY / "tests_full" / "go" / "render.go")],
        check=True, env={**os.environ, **offline}, cwd=directory,
    )  # fmt: skip

    def rendered(template: str, conversations: Sequence[Messages]) -> Rendered:
        asked = json.dumps({"template": template, "conversations": conversations})
        done = subprocess.run([str(program)], input=asked, capture_output=True, text=True, encoding="utf-8")
        assert done.returncode == 0, done.stderr
        results: Rendered = json.loads(done.stdout)
        assert len(results) == len(conversations)
        return results

    return rendered


def ours(template: GoTemplate, messages: Messages) -> dict[str, str]:
    """What the project's renderer makes of a conversation, an error by the name of the template that is missing."""
    try:
        return {"text": render_go(template.text, messages)}
    except GoTemplateError as error:
        return {"error": str(error).removeprefix("template ").removesuffix(" not defined").strip("'")}


def every_conversation() -> list[Messages]:
    """All orders of three roles and one that is not known, up to four messages, with texts of several kinds."""
    found: list[Messages] = []
    orders: list[list[str]] = [[]]
    for _ in range(4):
        orders = [[*order, role] for order in orders for role in ("system", "user", "assistant")]
        found += [talk(order) for order in orders]
    for texts in ((HOSTILE, PADDED), ("", "x"), ("\n\n", "  y"), (PADDED, "")):
        found += [talk(order, texts) for order in (["user"], ["system", "user"], ["system", "user", "assistant", "user"])]
        found.append(talk(["user", "assistant"] * 4 + ["user"], texts))
    return [*found, talk(["user", "tool", "user"]), talk(["developer", "user"])]


@pytest.mark.parametrize("name", EXAMPLES)
def test_go_and_our_renderer_agree_on_every_order_of_roles(name: str, by_go: Go) -> None:
    template, conversations = translated(name), every_conversation()
    stopped = 0
    for messages, found in zip(conversations, by_go(template.text, conversations), strict=True):
        expected = ours(template, messages)
        if "error" in expected:
            stopped += 1
            assert f'template "{expected["error"]}" not defined' in found["error"], messages
        else:
            assert found == expected, messages
    assert 0 < stopped < len(conversations)


@pytest.mark.parametrize("name", EXAMPLES)
def test_go_renders_what_transformers_does(name: str, by_go: Go) -> None:
    example, template = EXAMPLES[name], translated(name)
    turns = [["user"]] if name == "one question" else [["user", "assistant"] * count + ["user"] for count in range(4)]
    orders = [*turns, *(["system", *each] for each in turns if example.takes_system)]
    conversations = [talk(order, texts) for order in orders for texts in (("Hi!", "Yes."), (HOSTILE,), (f"{PADDED}x", "b\n"))]
    for messages, found in zip(conversations, by_go(template.text, conversations), strict=True):
        assert template.bos + found["text"] == jinja(example, messages)


@pytest.mark.parametrize("name", ["llama3", "newlines", "marked places"])
def test_go_trims_as_python_does(name: str, by_go: Go) -> None:
    generator = random.Random(7)
    characters = [chr(code) for code in range(0x3001) if chr(code).isspace()] + [*"ab\u200b\ufeffé漢😀\x00"]
    texts = ["".join(generator.choices(characters, k=generator.randrange(8))) for _ in range(400)]
    padding = "\n \u3000" * 3000
    conversations = [talk(["user"], [f"{text}x{text[::-1]}"]) for text in texts] + [talk(["user"], [f"{padding}a{padding}"])]
    template = translated(name)
    for messages, found in zip(conversations, by_go(template.text, conversations), strict=True):
        assert template.bos + found["text"] == jinja(EXAMPLES[name], messages)


def test_go_joins_messages_of_one_role_as_ours_does(by_go: Go) -> None:
    writes = "{{ range .Messages }}[{{ .Role }}]{{ .Content }}{{ end }}|{{ .System }}"
    messages = talk(["system", "system", "user", "user", "tool", "tool", "system"], ["a", "b", "c", "d", "e", "f", "g"])
    [found] = by_go(writes, [messages])
    together = "".join(f"[{each['role']}]{each['content']}" for each in collated(messages))
    assert found == {"text": f"{together}|a\n\nb\n\ng"}


@pytest.mark.parametrize(
    "text",
    [
        'a {{- " b" -}}  \n c{{ range .Messages }}{{ end }}',
        '{{ range $i, $m := .Messages }}{{ $i }}{{ $m.Role }}{{ len (slice $.Messages $i) }};{{ end }}',
        '{{ $x := "a" }}{{ range .Messages }}{{ $x = .Role }}{{ $x := "c" }}{{ end }}{{ $x }}',
        '{{ range .Messages }}{{ slice .Content 1 2 }}{{ len .Content }}{{ printf "%.1s" .Content }}{{ not .Content }}{{ end }}',
        '{{ range .Messages }}{{ and "a" "" "b" }}|{{ or "" .Role "d" }}|{{ ne 1 2 }}{{ gt 2 1 }}{{ end }}',
        '{{ range .Messages }}{{ eq .Role "x" "user" }}{{ if eq .Role "a" }}1{{ else if .Role }}2{{ else }}3{{ end }}{{ end }}',
        '{{ range .Messages }}{{ "}}\\"\\\\\\n\\u00e9\\U0001f600" }}{{ end }}',
    ],
)  # fmt: skip
def test_our_renderer_executes_as_go_does(text: str, by_go: Go) -> None:
    messages = talk(["user", "assistant"], ["éxy", "abc"])
    [found] = by_go(text, [messages])
    data = [{"Role": each["role"], "Content": each["content"]} for each in messages]
    assert found == {"text": execute(text, {"Messages": data})}


@pytest.mark.parametrize("prompt_format", [None, *FORMATS])
def test_what_the_modelfile_holds_is_rendered_by_go_as_the_training_did(
    prompt_format: str | None, by_go: Go, tmp_path: Path
) -> None:
    encoder = load_encoder(write_tiny_model(tmp_path / "model"), FORMATS[prompt_format] if prompt_format else "")
    source, tokens = encoder.tokenizer.chat_template, encoder.tokenizer.special_tokens_map
    template = translate(source, tokens, adds_bos=False, control_strings=encoder.control_strings)
    rows = json.loads((REPOSITORY / "example-support-dataset.json").read_text())
    system = {"role": "system", "content": 'You are "kind".\nAnd """brief""".'}
    conversations = [[system, {"role": "user", "content": each["question"]}] for each in rows]
    assert prove(template, encoder.rendered, conversations).equal == len(rows)
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    out = write_ollama(
        tmp_path / "out", gguf=gguf, base_name=None, adapter_gguf=None, template=template, system=system["content"],
        parameters={"temperature": 0}, name="tuned",
    )  # fmt: skip
    held = dict(read_modelfile((out / "Modelfile").read_bytes().decode()))
    asked = [[{"role": "system", "content": held["system"]}, each[1]] for each in conversations]
    for messages, found in zip(conversations, by_go(held["template"], asked), strict=True):
        assert found == {"text": encoder.rendered(messages)}
