"""The chat template of the training as a Go template for Ollama, proven equal.

`transformers` renders chat templates with Jinja, Ollama with Go's `text/template`, and neither can read the other's.
`translate` learns what a chat template writes (`engine.go_template_probe`), writes that as a Go template
(`engine.go_template_text`), and renders both on everything it tried; `prove` does so on a run's own conversations. What does
not come out equal, character by character, is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

from finetune_dataflow.engine.chat_template import ASSISTANT, SYSTEM, USER, ChatTemplate, Refused, Roles, messages_of
from finetune_dataflow.engine.go_template_parse import GoTemplateError
from finetune_dataflow.engine.go_template_probe import Unexplained, Wording, wording
from finetune_dataflow.engine.go_template_render import collated, render_go
from finetune_dataflow.engine.go_template_text import go_text
from finetune_dataflow.engine.quality import shown
from finetune_dataflow.errors import UserError

# A text with everything that a template language, a filter or a shell could stumble over.
HOSTILE = (
    '@ "b" \'c\' <d> & {{ .e }} {{- end }} {% f %} {# g #} \\n \\" %s `h` $i\t\u00e9\u6f22\U0001f600\u00a0j\n\nk """ l <|im_end|>'
)
PADDED = " \t\n\u00a0\u2003\u3000@ n\u3000\u2003\u00a0\n\r "
SHOWN = 80  # characters of a difference on either side
MOST_NOTED = 5


@dataclass(frozen=True)
class GoTemplate:
    """A Go template for Ollama.

    stops: the strings that end a reply. notes: what a user should know, a sentence each. bos: the beginning of sequence that
    Ollama puts before the text, because the GGUF says so; "" where the template writes it or there is none. takes_system:
    whether it has a place for a system text.
    """

    text: str
    stops: tuple[str, ...]
    notes: tuple[str, ...]
    bos: str = ""
    takes_system: bool = True


@dataclass(frozen=True)
class Proof:
    """How many conversations a Go template renders as the chat template does, and how many no template could.

    joined: two messages of one role stand in a row, which Ollama makes one before a template sees them. without_prompt:
    texts alone, which no chat template writes.
    """

    equal: int
    joined: int = 0
    without_prompt: int = 0

    @property
    def sentence(self) -> str:
        """What was proven, for a user."""
        said = f"The Go template renders {self.equal:,} conversation{'s' * (self.equal != 1)} exactly as the training did."
        if self.joined:
            said += f" {self.joined:,} more have messages of one role in a row, which Ollama joins: these it renders otherwise."
        return said


def translate(
    chat_template: str,
    special_tokens: Mapping[str, Any],
    *,
    adds_bos: bool,
    control_strings: Iterable[str] = (),
    today: date | None = None,
    default_system: str = "",
) -> GoTemplate:
    """The Go template that writes what the Jinja `chat_template` writes.

    special_tokens: the tokenizer's, as `special_tokens_map` has them. adds_bos: whether Ollama puts a beginning of sequence
    before a prompt, as the GGUF's `tokenizer.ggml.add_bos_token` says; it is not written twice then. control_strings: the
    tokenizer's; the first of them after a reply ends it. today: the day that a template which writes the date is to write.
    default_system: written into the template as the system text of conversations that bring none.

    Raises UserError, naming the construct, for a template that is no Jinja or writes what a Go template cannot.
    """
    chat = ChatTemplate(chat_template, special_tokens, today, default_system)
    if today is None and chat.depends_on_the_day():
        raise UserError(
            "The chat template writes today's date (`strftime_now`), which no Go template can write in that form. "
            "Name a day: it is then part of every prompt."
        )
    try:
        learned = wording(chat)
        empty_is_none = learned.takes_system and _same(chat, [(SYSTEM, ""), (USER, "x")], [(USER, "x")])
        bos = _bos(learned, str(special_tokens.get("bos_token") or "")) if adds_bos else ""
        template = GoTemplate(
            go_text(_without_bos(learned, bos), empty_is_none),
            _stops(chat, control_strings),
            tuple(_notes(chat, learned, adds_bos and not bos)),
            bos,
            learned.takes_system,
        )
        _check(chat, template, learned)
    except Refused as refusal:
        raise UserError(f"The chat template refuses a single question: {shown(str(refusal), 300)}.") from refusal
    except Unexplained as reason:
        raise UserError(
            f"The chat template cannot be expressed as a Go template for Ollama: {reason}.{chat.suspects()} "
            "Export the fused model or the adapter instead, for a runtime that renders Jinja."
        ) from reason
    return replace(template, notes=(*template.notes, *_special_texts(chat, template, learned)))


def prove(
    template: GoTemplate,
    render: Callable[[Sequence[Mapping[str, Any]]], str],
    conversations: Iterable[Sequence[Mapping[str, Any]]],
) -> Proof:
    """Whether the Go template renders each prompt as `render`, the training's own function, does.

    Raises UserError for the first that differs or that a Go template cannot render, and where there is nothing to compare.
    """
    equal = joined = without_prompt = 0
    for number, messages in enumerate(conversations, start=1):
        if not messages:
            without_prompt += 1
            continue
        _check_texts(number, messages)
        try:
            found = template.bos + render_go(template.text, messages)
        except GoTemplateError as error:
            raise UserError(f"Conversation {number} cannot be rendered by the Go template: {error}.") from error
        expected = render(messages)
        if found == expected:
            equal += 1
        elif len(collated(messages)) < len(messages):
            joined += 1
        else:
            raise UserError(
                f"The Go template is not equal to the chat template on conversation {number}: {_differ(expected, found)}"
            )
    if not equal:
        raise UserError(
            "The Go template could not be compared with the chat template: there is no conversation that both render."
        )
    return Proof(equal, joined, without_prompt)


def _check_texts(number: int, messages: Sequence[Mapping[str, Any]]) -> None:
    """Raise UserError for a message that is more than a text."""
    for each in messages:
        if not isinstance(each.get("content"), str):
            raise UserError(
                f"Conversation {number} has a message without text, or with parts that are not text: no Go template for it."
            )
        if each.get("tool_calls") or each["role"] not in (SYSTEM, USER, ASSISTANT):
            raise UserError(
                f"Conversation {number} calls tools or has a message of the role {shown(repr(each['role']), 40)}, which the Go "
                "template does not write: expected texts of system, user and assistant."
            )


def _differ(expected: str, found: str) -> str:
    """Where two texts part, shown."""
    pairs = zip(expected, found, strict=False)
    place = next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(expected), len(found)))
    start = max(place - SHOWN, 0)
    return (
        f"at character {place + 1}, expected {shown(repr(expected[start : place + SHOWN]), 4 * SHOWN)}, "
        f"found {shown(repr(found[start : place + SHOWN]), 4 * SHOWN)}."
    )


def _same(chat: ChatTemplate, one: Sequence[tuple[str, str]], other: Sequence[tuple[str, str]]) -> bool:
    """Whether two conversations are written alike."""
    try:
        return chat.rendered(messages_of(*zip(*one, strict=True))) == chat.rendered(messages_of(*zip(*other, strict=True)))
    except Refused:
        return False


def _bos(learned: Wording, bos: str) -> str:
    """The beginning of sequence, where everything that the chat template writes begins with it."""
    starts = [step[0].before for key, step in learned.steps.items() if key[0] == ""]
    return bos if bos and all(each.startswith(bos) for each in starts) else ""


def _without_bos(learned: Wording, bos: str) -> Wording:
    steps = {
        key: (replace(step[0], before=step[0].before.removeprefix(bos)), *step[1:]) if key[0] == "" else step
        for key, step in learned.steps.items()
    }
    return replace(learned, steps=steps)


def _stops(chat: ChatTemplate, control_strings: Iterable[str]) -> tuple[str, ...]:
    """The control string that follows a reply, and the tokenizer's end of sequence: as training teaches them."""
    eos = chat.special_tokens.get("eos_token")
    values = [each for each in chat.special_tokens.values() if isinstance(each, str)]
    controls = sorted({*control_strings, *values} - {""}, key=len, reverse=True)
    try:
        text = chat.rendered(messages_of((USER, ASSISTANT), ("question", "q01Zv")), generation=False)
        after = text.partition("q01Zv")[2]
    except Refused:
        after = ""
    found = [(after.index(each), place, each) for place, each in enumerate(controls) if each in after]
    return tuple(dict.fromkeys([*(each for _, _, each in sorted(found)[:1]), *([eos] if isinstance(eos, str) and eos else [])]))


def _writes_system(learned: Wording) -> bool:
    return learned.in_place or any(slot.content == SYSTEM for step in learned.steps.values() for slot in step)


def _notes(chat: ChatTemplate, learned: Wording, bos_is_ollamas: bool) -> Iterator[str]:
    others = [f"`{each}`" for each in chat.other_inputs()]
    if others:
        yield (
            f"The chat template also reads {', '.join(others)}: what it writes where these are given (tools, documents, "
            "thinking) is not translated."
        )
    if not learned.takes_system:
        yield "The chat template refuses a system message, so Ollama stops a request that has one."
    elif not learned.system_anywhere:
        yield "The chat template takes a system message at the beginning alone, so Ollama stops a request that has one later."
    if learned.takes_system and not _writes_system(learned):
        yield "The chat template leaves out the text of a system message, and so does the Go template."
    if not learned.replies_first:
        yield (
            "The chat template refuses a conversation that begins with a reply. Where Ollama has dropped the question of a "
            "long conversation, its reply is left out, too."
        )
    if chat.depends_on_the_day():
        yield f"The chat template writes the date. The Go template always writes that of {chat.today:%d %B %Y}."
    if bos_is_ollamas:
        yield (
            "The chat template writes no beginning of sequence, but Ollama puts one before every prompt, because the GGUF says "
            "so: that is right where the training put one there, too."
        )


def _check(chat: ChatTemplate, template: GoTemplate, learned: Wording) -> None:
    """Render every conversation that was tried with three kinds of text. Raises Unexplained where the two differ."""
    for content in ("@", HOSTILE, PADDED):
        for roles in learned.conversations:
            messages = messages_of(roles, [content.replace("@", f"{place}a") for place in range(len(roles))])
            expected = chat.rendered(messages)
            try:
                found = template.bos + render_go(template.text, messages)
            except GoTemplateError as error:
                raise Unexplained(f"its translation stops on a conversation of {', '.join(roles)}: {error}") from error
            if found != expected:
                raise Unexplained(
                    f"it changes the messages' texts, or what it writes depends on them; {_differ(expected, found)[:-1]}"
                )


def _special_texts(chat: ChatTemplate, template: GoTemplate, learned: Wording) -> Iterator[str]:
    """Notes on texts that the chat template treats specially, found by trying every string it could look for."""
    roles = max((each for each in learned.conversations if len(each) <= 4), key=len)
    for role in dict.fromkeys(roles):
        special = [each for each in ["", *chat.constants()] if not _plain(chat, template, roles, roles.index(role), each)]
        # One that holds another is special because of that.
        shortest = [each for each in special if not any(other in each for other in special if other and other != each)]
        if shortest:
            named = [shown(repr(each), SHOWN) if each else "no text" for each in shortest]
            more = f" and {len(named) - MOST_NOTED} more" if len(named) > MOST_NOTED else ""
            yield (
                f"The chat template treats a message of the {role} with {', '.join(named[:MOST_NOTED])}{more} specially. The Go "
                "template writes its text as it is."
            )


def _plain(chat: ChatTemplate, template: GoTemplate, roles: Roles, place: int, constant: str) -> bool:
    """Whether a message with this string in its text is rendered alike."""
    for text in dict.fromkeys((constant, f"{constant}x", f"x{constant}", f"x {constant} x") if constant else ("",)):
        if not _equal(chat, template, messages_of(roles, [text if each == place else "x" for each in range(len(roles))])):
            return False
    return True


def _equal(chat: ChatTemplate, template: GoTemplate, messages: Sequence[Mapping[str, str]]) -> bool:
    try:
        return template.bos + render_go(template.text, messages) == chat.rendered(messages)
    except (GoTemplateError, Refused):
        return False
