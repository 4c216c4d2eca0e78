"""A learned wording as a Go template: one `range` over the messages, every fixed string quoted, no white space between."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from finetune_dataflow.engine.chat_template import ASSISTANT, SYSTEM, USER
from finetune_dataflow.engine.go_template_probe import END, NEWLINES, WHITE_SPACE, Key, Slot, Step, Wording

# What has no place in a chat template stops the request with one of these: Go says that the template of this name is missing.
NO_MIDDLE = "no place for a system message after the first message"
NO_SYSTEM = "no place for a system message"
NO_ROLE = "no place for a message that is not of system, user or assistant"
NO_TURNS = "no place for more than one question"
NO_QUESTION = "no question"

_CHARACTERS = {WHITE_SPACE: [chr(code) for code in range(0x3001) if chr(code).isspace()], NEWLINES: ["\n"]}
_ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
_IF = {"opening": ("$replied", "not $replied"), "last": ("not $last", "$last"), "led": ("not $led", "$led")}

# A question is the last one, too, where nothing but its reply follows, which is to be continued.
_LAST = (
    "  {{- $ahead := len (slice $.Messages $place) }}",
    "  {{- $last := eq $ahead 1 }}",
    '  {{- if eq .Role "user" }}{{- $last = not (gt $ahead 2) }}{{- end }}',
)

Lines: TypeAlias = tuple[str, ...]
Cut: TypeAlias = tuple[str, str]  # what is trimmed at the beginning and at the end


def quoted(text: str) -> str:
    r"""`text` as a string of Go's. What Ollama's reader of Modelfiles would drop is escaped: it keeps printable characters."""
    return '"' + "".join(_ESCAPES.get(each) or (each if each.isprintable() else _escaped(each)) for each in text) + '"'


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def go_text(wording: Wording, empty_system_is_none: bool) -> str:
    """The template that writes what `wording` says, and stops where it says nothing.

    A reply before the first question is left out where the chat template refuses it: Ollama drops the oldest messages of a
    long conversation one by one. A reply at the end is left open, as it is while the model writes it.
    """
    features, in_place = wording.features, wording.in_place
    names = {role: _entries(wording, role) for role in (SYSTEM, USER, ASSISTANT)}
    needs_last = any("last" in columns for _, columns in names.values())
    chain = [(f'eq .Role "{role}"', _branches(*names[role])) for role in names]
    marks = [
        '{{- if eq .Role "user" }}{{- $asked = true }}{{- end }}' * (not wording.replies_first),
        '{{- if eq .Role "assistant" }}{{- $replied = true }}{{- end }}' * ("opening" in features),
        "{{- $previous = .Role }}",
    ]
    led = '{{- if and (eq $previous "") (eq .Role "system") }}{{- $led = true }}{{- end }}' * (in_place and "led" in features)
    body = (led, *_chain(chain, _stop(NO_ROLE)), *marks)
    special: list[tuple[str, Lines]] = []
    if empty_system_is_none:
        special.append(('and (eq .Role "system") (not .Content)', ()))
    if not wording.replies_first:
        special.append(('and (eq .Role "assistant") (not $asked)', ()))
    if not in_place:
        capture = "{{- $system = .Content }}{{- $led = true }}"
        special.append(('and (eq .Role "system") (eq $previous "") (not $led)', (capture,)))
    lines = [
        *itertools.chain.from_iterable(map(_definition, sorted(_cuts(wording.steps.values()), reverse=True))),
        '{{- $previous := "" }}',
        "{{- $asked := false }}" * (not wording.replies_first),
        "{{- $replied := false }}" * ("opening" in features),
        "{{- $led := false }}" * ("led" in features or not in_place),
        '{{- $system := "" }}' * (not in_place),
        "{{- range $place, $message := .Messages }}" if needs_last else "{{- range .Messages }}",
        *(_LAST * needs_last),
        *_indented(_chain(special, body)),
        "{{- end }}",
        *_branches(*_ends(wording)),
    ]
    return "\n".join(filter(None, lines))


def _entries(wording: Wording, role: str) -> tuple[dict[Key, Lines], tuple[str, ...]]:
    """What is written for a message of a role, by what comes before it and the features; and the names of these columns."""
    features = wording.features
    found = {(key[0], *key[2:]): _lines(step) for key, step in wording.steps.items() if key[1] == role}
    for previous, reason in _refused(wording, role).items():
        found |= {(previous, *values): _stop(reason) for values in itertools.product((False, True), repeat=len(features))}
    if role != ASSISTANT:
        return found, ("previous", *features)
    open_replies = {key: _open_reply(wording, key) or lines for key, lines in found.items()}
    if open_replies == found and "last" not in features:
        return found, ("previous", *features)
    place = features.index("last") + 1 if "last" in features else len(features) + 1
    closed = {(*key[:place], False, *key[place + ("last" in features) :]): lines for key, lines in found.items()}
    opened = {(*key[:place], True, *key[place + ("last" in features) :]): lines for key, lines in open_replies.items()}
    return closed | opened, ("previous", *features) if "last" in features else ("previous", *features, "last")


def _open_reply(wording: Wording, key: Key) -> Lines | None:
    """A last reply after a question: what generation is fed, then the reply as it is."""
    values = [True if name == "last" else value for name, value in zip(wording.features, key[1:], strict=True)]
    end = wording.steps.get((key[0], END, *values)) if key[0] == USER else None
    return _lines((Slot(end[0].before),)) if end else None


def _refused(wording: Wording, role: str) -> dict[str, str]:
    """The roles before which a message of a role is refused, and why."""
    if role == SYSTEM and not wording.takes_system:
        return dict.fromkeys(("", SYSTEM, USER, ASSISTANT), NO_SYSTEM)
    if role == SYSTEM and not wording.in_place:
        return dict.fromkeys(("", USER, ASSISTANT), NO_MIDDLE)
    if role == SYSTEM and not wording.system_anywhere:
        return dict.fromkeys((USER, ASSISTANT), NO_MIDDLE)
    single = not any(key[:2] == (USER, ASSISTANT) for key in wording.steps)
    return {{USER: ASSISTANT, ASSISTANT: USER}[role]: NO_TURNS} if single and role != SYSTEM else {}


def _ends(wording: Wording) -> tuple[dict[Key, Lines], tuple[str, ...]]:
    """What is written after the last message, by its role and the features."""
    kept = [place for place, name in enumerate(wording.features, 2) if name != "last"]
    found = {(key[0], *(key[place] for place in kept)): _lines(step) for key, step in wording.steps.items() if key[1] == END}
    for previous, lines in {ASSISTANT: (), "": _stop(NO_QUESTION), SYSTEM: _stop(NO_QUESTION)}.items():
        if not any(key[0] == previous for key in found):
            found |= {(previous, *values): lines for values in itertools.product((False, True), repeat=len(kept))}
    return found, ("previous", *(name for name in wording.features if name != "last"))


def _branches(entries: Mapping[Key, Lines], columns: Sequence[str]) -> Lines:
    """The lines that choose among the entries by as few conditions as it takes."""
    if len({*entries.values()}) <= 1:
        return next(iter(entries.values()), ())
    places = [place for place in range(len(columns)) if len({key[place] for key in entries}) > 1]
    return min((_split(entries, columns, place) for place in places), key=len)


def _split(entries: Mapping[Key, Lines], columns: Sequence[str], place: int) -> Lines:
    """The lines that choose by one column first."""
    rest = [*columns[:place], *columns[place + 1 :]]
    by_lines: dict[Lines, list[object]] = {}
    for value in dict.fromkeys(key[place] for key in entries):
        chosen = {(*key[:place], *key[place + 1 :]): lines for key, lines in entries.items() if key[place] == value}
        by_lines.setdefault(_branches(chosen, rest), []).append(value)
    usual = max(by_lines, key=lambda lines: len(by_lines[lines]))
    return _chain([(_condition(columns[place], by_lines[lines]), lines) for lines in by_lines if lines != usual], usual)


def _condition(column: str, values: Sequence[object]) -> str:
    if column == "previous":
        return " ".join(["eq $previous", *(quoted(str(value)) for value in values)])
    return _IF[column][bool(values[0])]


def _chain(cases: Sequence[tuple[str, Lines]], otherwise: Lines) -> Lines:
    """`if`, `else if` and `else`."""
    if not cases:
        return otherwise
    lines: list[str] = []
    for word, (condition, body) in zip(itertools.chain(["if"], itertools.repeat("else if")), cases, strict=False):
        lines += [f"{{{{- {word} {condition} }}}}", *_indented(body)]
    if otherwise and otherwise[0].startswith("{{- if ") and otherwise.index("{{- end }}") == len(otherwise) - 1:
        return (*lines, f"{{{{- else {otherwise[0][4:]}", *otherwise[1:])
    return (*lines, *(["{{- else }}", *_indented(otherwise)] if otherwise else []), "{{- end }}")


def _indented(lines: Iterable[str]) -> list[str]:
    return [f"  {line}" for line in lines if line]


def _stop(reason: str) -> Lines:
    # With data, because Ollama looks at what a template is given.
    return (f"{{{{- template {quoted(reason)} . }}}}",)


def _lines(step: Step) -> Lines:
    """What writes a step: its fixed strings, and the texts between them."""
    return ("".join(map(_slot, step)),)


def _slot(slot: Slot) -> str:
    before = f"{{{{- {quoted(slot.before)} }}}}" if slot.before else ""
    if not slot.content:
        return before
    value = "$system" if slot.content == SYSTEM else ".Content"
    cut = slot.left, slot.right
    return before + (f"{{{{- template {quoted(_name(cut))} {value} }}}}" if any(cut) else f"{{{{- {value} }}}}")


def _cuts(steps: Iterable[Step]) -> set[Cut]:
    """The kinds of trimming in use, and what these are made of."""
    used = {(slot.left, slot.right) for step in steps for slot in step} - {("", "")}
    return used | {("", right) for left, right in used if left and right}


def _name(cut: Cut) -> str:
    if cut == (WHITE_SPACE, WHITE_SPACE):
        return "trimmed"
    sides = zip(cut, ("beginning", "end"), strict=True)
    return " and ".join(f"without {what} at the {where}" for what, where in sides if what)


def _definition(cut: Cut) -> list[str]:
    """A template that writes its text trimmed. Go has no function for that, so it calls itself with a shorter text."""
    name, (left, right) = quoted(_name(cut)), cut
    if left:
        then = f"template {quoted(_name(('', right)))} ." if right else "."
        return [
            f"{{{{- define {name} }}}}",
            "  {{- if . }}",
            '    {{- $first := printf "%.1s" . }}',
            f"    {{{{- if eq $first {_all(_CHARACTERS[left])} }}}}{{{{- template {name} (slice . (len $first)) }}}}",
            f"    {{{{- else }}}}{{{{- {then} }}}}{{{{- end }}}}",
            "  {{- end }}",
            "{{- end }}",
        ]
    lines = [f"{{{{- define {name} }}}}", "  {{- if . }}"]
    cases: list[tuple[str, Lines]] = []
    for size in (1, 2, 3):  # a character's bytes
        characters = [each for each in _CHARACTERS[right] if len(each.encode()) == size]
        if characters:
            rest = f"(len (slice . {size}))"
            lines += [
                f'    {{{{- $last{size} := "" }}}}'
                f"{{{{- if gt (len .) {size - 1} }}}}{{{{- $last{size} = slice . {rest} }}}}{{{{- end }}}}"
            ]
            cases.append((f"eq $last{size} {_all(characters)}", (f"{{{{- template {name} (slice . 0 {rest}) }}}}",)))
    return [*lines, *(f"    {line}" for line in _chain(cases, ("{{- . }}",))), "  {{- end }}", "{{- end }}"]


def _all(characters: Iterable[str]) -> str:
    return " ".join(map(quoted, characters))
