"""Named prompt formats as Jinja chat templates, which take the place of a tokenizer's own.

| format | after | system text | BOS | ends a reply |
|---|---|---|---|---|
| mistral | OgbujiPT, `MISTRAL_INSTRUCTION_DELIMITERS` | before the first user text | yes | eos |
| chatml | OgbujiPT, `CHATML_DELIMITERS` | a turn of its own | no | `<|im_end|>` |
| llama2 | Meta's `llama` repository | in `<<SYS>>`, in the first user turn | every exchange | eos |
| llama3 | Meta's model card | a turn of its own | yes | `<|eot_id|>` |
| alpaca | OgbujiPT, `ALPACA_INSTRUCT_INPUT_DELIMITERS` | first, where Alpaca's own preamble stands | no | eos |
| phi | Phi-3's model card | a turn of its own | no | `<|end|>` |
| gemma | Google's documentation of Gemma 2 | before the first user text | yes | `<end_of_turn>` |
| vicuna | OgbujiPT, `VICUNA_DELIMITERS` | first | no | eos |
| user-assistant | OgbujiPT, `VICUNA_NOHASH_DELIMITERS` | first | no | eos |
| redpajama | RedPajama-INCITE-Chat's model card | first | no | eos |
| dolly | Databricks' `dolly` repository | first, where Dolly's own introduction stands | no | `### End` |

BOS and eos are the tokenizer's (`bos_token`, `eos_token`). Nothing is trimmed, and no format adds words of its own: who wants
Alpaca's "Below is an instruction …" gives it as the system prompt. What stands before a reply in a full conversation is what
generation is fed, except the one space that llama2 and redpajama put between the two, which their documented prompts leave out.
`transformers` renders the templates in Jinja's `ImmutableSandboxedEnvironment`, those from a user's file as well.
"""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import jinja2
import jinja2.ext
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment
from ogbujipt import prompting
from ogbujipt.prompting import pdelim

from finetune_dataflow.errors import UserError, nearest

_BOS, _EOS = "{{ bos_token or '' }}", "{{ eos_token or '' }}"
_JINJA_SUFFIXES = (".jinja", ".jinja2", ".j2")
_CHECK_ROLE = (
    "{% if message['role'] not in ['user', 'assistant'] %}"
    "{{ raise_exception('this prompt format knows user, assistant and one system message, the first; not here a message of '"
    " + message['role']) }}"
    "{% endif %}"
)
_CHECK_TURNS = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('this prompt format wants user and assistant in turn, the user first') }}{% endif %}"
)
_SPLIT_SYSTEM = (
    "{% set system = messages[0]['content'] if messages and messages[0]['role'] == 'system' else '' %}"
    "{% set turns = messages[1:] if messages and messages[0]['role'] == 'system' else messages %}"
)


def _text(value: str) -> str:
    """The Jinja expression that writes `value`."""
    return "{{ " + json.dumps(value, ensure_ascii=False) + " }}" if value else ""


def _turns(
    user: tuple[str, str],
    assistant: tuple[str, str],
    *,
    reply_space: str = "",
    between: str = "",
    start: str = "",
    start_exchange: str = "",
    system: tuple[str, str] = ("", ""),
    system_in_user: bool = False,
    in_turn: bool = True,
) -> str:
    """A chat template from what stands around each part.

    The pairs are (before, after) the content, as Jinja. `start` comes first in the text and `start_exchange` before every user
    turn; `between` parts a reply from the next user turn; `reply_space` comes before a reply, but not at the end of a prompt.
    """
    system_part = "{% if system %}" + system[0] + "{{ system }}" + system[1] + "{% endif %}"
    if system_in_user:
        opening, first_user = "", "{% if loop.first %}" + system_part + "{% endif %}"
    else:
        opening, first_user = system_part, ""
    separator = "{% if not loop.first %}" + between + "{% endif %}" if between else ""
    return (
        _SPLIT_SYSTEM + start + opening + "{% for message in turns %}" + _CHECK_ROLE + (_CHECK_TURNS if in_turn else "")
        + "{% if message['role'] == 'user' %}"
        + separator + start_exchange + user[0] + first_user + "{{ message['content'] }}" + user[1]
        + "{% else %}"
        + assistant[0] + reply_space + "{{ message['content'] }}" + assistant[1]
        + "{% endif %}{% endfor %}{% if add_generation_prompt %}" + assistant[0] + "{% endif %}"
    )  # fmt: skip


def _role_turns(headers: Mapping[str, str], end: str, start: str = "") -> str:
    """A chat template in which every role, the system too, has a header of its own and the same end."""
    header = {role: _text(text) for role, text in headers.items()}
    ends = _text(end)
    return _turns(
        (header["user"], ends), (header["assistant"], ends), system=(header["system"], ends), start=start, in_turn=False
    )


def _mistral() -> str:
    delimiters = prompting.MISTRAL_INSTRUCTION_DELIMITERS
    # OgbujiPT spells the BOS out; the tokenizer's own is written once, at the very beginning.
    before = _text(delimiters[pdelim.PRE_ALL_CONTEXT].removeprefix("<s>"))
    after = _text(delimiters[pdelim.POST_ALL_CONTEXT])
    return _turns((before, after), ("", _EOS), system=("", _text("\n\n")), system_in_user=True, start=_BOS)


def _chatml() -> str:
    delimiters = prompting.CHATML_DELIMITERS
    # OgbujiPT's delimiters close the turn before and open the next in one string.
    end, newline, user = delimiters[pdelim.PREQUERY].partition("\n")
    assistant = delimiters[pdelim.POSTQUERY].removeprefix(end + newline) + newline
    return _role_turns({"system": delimiters[pdelim.PRE_PREAMBLE], "user": user, "assistant": assistant}, end + newline)


def _pairs(delimiters: Mapping[pdelim, str], between: str) -> str:
    """OgbujiPT's delimiters around a query; `between` stands after the system text and between exchanges."""
    separator = _text(between)
    before, after = _text(delimiters[pdelim.PREQUERY]), _text(delimiters[pdelim.POSTQUERY])
    return _turns((before, ""), (after, _EOS), system=("", separator), between=separator)


FORMATS: Mapping[str, str] = MappingProxyType(
    {
        "mistral": _mistral(),
        "chatml": _chatml(),
        "llama2": _turns(
            (_text("[INST] "), _text(" [/INST]")),
            ("", _text(" ") + _EOS),
            reply_space=_text(" "),
            system=(_text("<<SYS>>\n"), _text("\n<</SYS>>\n\n")),
            system_in_user=True,
            start_exchange=_BOS,
        ),
        "llama3": _role_turns(
            {role: f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in ("system", "user", "assistant")},
            "<|eot_id|>",
            start=_BOS,
        ),
        "alpaca": _pairs(prompting.ALPACA_INSTRUCT_INPUT_DELIMITERS, "\n\n"),
        "phi": _role_turns({role: f"<|{role}|>\n" for role in ("system", "user", "assistant")}, "<|end|>\n"),
        "gemma": _turns(
            (_text("<start_of_turn>user\n"), _text("<end_of_turn>\n")),
            (_text("<start_of_turn>model\n"), _text("<end_of_turn>\n")),
            system=("", _text("\n\n")),
            system_in_user=True,
            start=_BOS,
        ),
        "vicuna": _pairs(prompting.VICUNA_DELIMITERS, "\n"),
        "user-assistant": _pairs(prompting.VICUNA_NOHASH_DELIMITERS, "\n"),
        "redpajama": _turns(
            (_text("<human>: "), _text("\n")),
            (_text("<bot>:"), _EOS),
            reply_space=_text(" "),
            system=("", _text("\n")),
            between=_text("\n"),
        ),
        "dolly": _turns(
            (_text("### Instruction:\n"), _text("\n\n")),
            (_text("### Response:\n"), _text("\n\n### End")),
            system=("", _text("\n\n")),
            between=_text("\n\n"),
        ),
    }
)

# The strings that have a meaning in a format: in a row's own text they are worth a warning.
CONTROL_STRINGS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "mistral": ("[INST]", "[/INST]"),
        "chatml": ("<|im_start|>", "<|im_end|>"),
        "llama2": ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"),
        "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "alpaca": ("### Instruction:", "### Response:"),
        "phi": ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        "gemma": ("<start_of_turn>", "<end_of_turn>"),
        "vicuna": ("### USER:", "### ASSISTANT:"),
        "user-assistant": ("USER:", "ASSISTANT:"),
        "redpajama": ("<human>:", "<bot>:"),
        "dolly": ("### Instruction:", "### Response:", "### End"),
    }
)


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}`, which `transformers` adds to Jinja; here it only has to parse."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def template(prompt_format: str) -> str:
    """The Jinja chat template of a format's name, or in the file of that path.

    Raises UserError for what is neither, and for a file that is no Jinja template over `messages`.
    """
    if prompt_format in FORMATS:
        return FORMATS[prompt_format]
    path = Path(prompt_format)
    if path.suffix in _JINJA_SUFFIXES or os.path.isfile(path):  # unlike Path.is_file, it bears any text
        return _template_in(path)
    raise UserError(
        f"prompt_format is {reprlib.repr(prompt_format)}, which is neither a format nor a file.{nearest(prompt_format, FORMATS)} "
        f"Expected one of {', '.join(FORMATS)}, or the path of a Jinja chat template (.jinja, .j2)."
    )


def _template_in(path: Path) -> str:
    try:
        text = path.expanduser().read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"prompt_format: the Jinja file {path} is not UTF-8, at byte {error.start}.") from error
    except (OSError, ValueError, RuntimeError) as error:  # a null character; a home directory that is not there
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"prompt_format: the Jinja file {path} cannot be read: {reason}.") from error
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    try:
        environment.compile(text)
        names = jinja2.meta.find_undeclared_variables(environment.parse(text))
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"prompt_format: {path}, line {error.lineno}: not a valid Jinja template: {error.message}") from error
    if "messages" not in names:
        raise UserError(f"prompt_format: {path} never reads `messages`. Expected a chat template, which writes a conversation.")
    return text
