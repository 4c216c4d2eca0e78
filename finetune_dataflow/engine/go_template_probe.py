"""What a Jinja chat template writes around the messages of a conversation, learned by rendering it.

Chat templates are programs. Reading them as text, or translating their statements one by one, breaks on the next model's
idiom; what they write for a conversation of plain texts is always the same kind of thing: fixed strings around the messages'
texts, some of these trimmed. So the template is rendered on every order of roles that can occur, with a text of its own in
every message, and what stands between these texts is looked up by what came before. Whatever that does not explain is
refused, with the constructs of the template that may be the reason.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from finetune_dataflow.engine.chat_template import ASSISTANT, SYSTEM, USER, ChatTemplate, Refused, Roles, messages_of

END = ""  # in the place of a role: what comes after the last message
FEATURES = ("opening", "last", "led")
MESSAGES = 9  # in the longest conversation that is tried
MOST_MESSAGES = 41  # where the template compares with a number
LONGEST_MIXED = 5  # messages, where system messages stand anywhere
WHITE_SPACE, NEWLINES = "white space", "newlines"

_PADDING = "\n \n"  # what is left of it tells what was trimmed
_KEPT = {_PADDING: "", " \n": NEWLINES, "\n ": NEWLINES, "": WHITE_SPACE}

Key: TypeAlias = tuple[object, ...]  # the role before, the role, and the features that matter


class Unexplained(Exception):
    """What the chat template writes is more than fixed strings around the messages' texts; the text says what."""


class Misplaced(Unexplained):
    """The system text does not stand where its message is."""


@dataclass(frozen=True)
class Slot:
    """A fixed string and the text after it: the message's own, the system text ("system"), or none ("")."""

    before: str
    content: str = "own"
    left: str = ""  # what is trimmed at the text's beginning: WHITE_SPACE, NEWLINES or nothing
    right: str = ""


Step: TypeAlias = tuple[Slot, ...]  # what is written for one message


@dataclass(frozen=True)
class Moment:
    """Where in a conversation a message stands: what may decide how it is written."""

    previous: str  # the role of the message before it
    role: str
    opening: bool  # no reply has come before it
    last: bool
    led: bool  # the conversation began with a system message

    def key(self, features: Sequence[str]) -> Key:
        """What a step is looked up by."""
        return (self.previous, self.role, *(getattr(self, each) for each in features))


@dataclass(frozen=True)
class Wording:
    """What a chat template writes: the step of each kind of message, by its moment's key.

    in_place: the system text stands where its message is; else the system message is no message of its own, and its text is
    part of another's step. features: those of FEATURES that matter besides the two roles.
    """

    in_place: bool
    features: tuple[str, ...]
    steps: dict[Key, Step]
    conversations: tuple[Roles, ...]  # that were tried and are explained
    takes_system: bool
    system_anywhere: bool = False
    replies_first: bool = False


def wording(template: ChatTemplate) -> Wording:
    """What the template writes. Raises Refused for a template that refuses a question, Unexplained for what is beyond this."""
    takes_system, multiple = _accepts(template, (SYSTEM, USER)), _accepts(template, (USER, ASSISTANT, USER))
    template.rendered(messages_of((USER,), ("question",)))
    longest = max([MESSAGES, *(each + 4 for each in template.numbers() if each <= MOST_MESSAGES - 4)]) if multiple else 1
    turns = [_turns(count) for count in range(1, longest + 1, 2)]
    core = [*turns, *((SYSTEM, *each) for each in turns if takes_system)]
    try:
        learned = _learned(template, core, in_place=True)
    except Misplaced:
        learned = _learned(template, core, in_place=False)
    learned = replace(learned, takes_system=takes_system)
    if multiple:
        replies = [(ASSISTANT, *each) for each in turns[:2]]
        more = _with(learned, template, [*replies, *((SYSTEM, *each) for each in replies if takes_system)])
        learned = replace(more, replies_first=True) if more else learned
    if learned.in_place and takes_system and multiple:
        mixed = [each for each in _mixed() if learned.replies_first or (each.index(USER) < (*each, ASSISTANT).index(ASSISTANT))]
        more = _with(learned, template, mixed)
        learned = replace(more, system_anywhere=True) if more else learned
        learned = _with(learned, template, [(SYSTEM,)]) or learned
    return learned


def _accepts(template: ChatTemplate, roles: Roles) -> bool:
    try:
        template.rendered(messages_of(roles, roles))
    except Refused:
        return False
    return True


def _turns(count: int) -> Roles:
    """User and assistant in turn, the user first."""
    return tuple(itertools.islice(itertools.cycle((USER, ASSISTANT)), count))


def _mixed() -> Iterator[Roles]:
    """Every order in which a system message stands in the middle, no role twice in a row, the user last."""
    for count in range(2, LONGEST_MIXED + 1):
        for roles in itertools.product((SYSTEM, USER, ASSISTANT), repeat=count):
            apart = all(one != other for one, other in itertools.pairwise(roles))
            if apart and SYSTEM in roles[1:] and roles[-1] == USER and USER in roles:
                yield roles


def _learned(template: ChatTemplate, conversations: Sequence[Roles], in_place: bool) -> Wording:
    """The wording that explains all of these conversations, by as few features as possible."""
    try:
        seen = [pair for roles in conversations for pair in observed(template, roles, in_place)]
    except Refused as refusal:
        raise Unexplained(f"it refuses some lengths of a conversation and takes others: {refusal}") from refusal
    for count in range(len(FEATURES) + 1):
        for features in itertools.combinations(FEATURES, count):
            steps: dict[Key, Step] = {}
            if all(steps.setdefault(moment.key(features), step) == step for moment, step in seen):
                return Wording(in_place, features, steps, tuple(conversations), True)
    steps = {}
    moment = next(moment for moment, step in seen if steps.setdefault(moment.key(FEATURES), step) != step)
    raise Unexplained(
        f"what it writes between a message of the {moment.previous or 'beginning'} and the {moment.role or 'end'} differs "
        "from one place of a conversation to another"
    )


def _with(learned: Wording, template: ChatTemplate, conversations: Sequence[Roles]) -> Wording | None:
    """The same wording with what explains some more conversations; None where the template refuses one, or it does not fit."""
    steps = dict(learned.steps)
    try:
        for roles in conversations:
            for moment, step in observed(template, roles, learned.in_place):
                if steps.setdefault(moment.key(learned.features), step) != step:
                    return None
    except (Refused, Unexplained):
        return None
    return replace(learned, steps=steps, conversations=(*learned.conversations, *conversations))


def observed(template: ChatTemplate, roles: Roles, in_place: bool) -> list[tuple[Moment, Step]]:
    """The step of every message of a conversation, and of its end. Raises Refused and Unexplained."""
    contents = [f"q{place:02}Zv" for place in range(len(roles))]
    text = template.rendered(messages_of(roles, contents))
    absorbed = 0 if not in_place and roles[0] == SYSTEM else None  # the place of a system message that is no message
    order = _order(text, contents, roles, absorbed)
    bounds = [0]
    fixed: list[str] = []
    for place in order:
        start = text.index(contents[place])
        fixed.append(text[bounds[-1] : start])
        bounds.append(start + len(contents[place]))
    cuts = _cuts(template, roles, contents, [*fixed, text[bounds[-1] :]], order)
    steps: dict[int, Step] = {}
    waiting: Step = ()
    for place, before, (left, right) in zip(order, fixed, cuts, strict=True):
        if place == absorbed:
            waiting = (*waiting, Slot(before, SYSTEM, left, right))
        else:
            steps[place], waiting = (*waiting, Slot(before, "own", left, right)), ()
    if waiting:
        raise Unexplained("it writes the system text after the last message")
    turns = [place for place in range(len(roles)) if place != absorbed]
    moments = _moments([roles[place] for place in turns], roles[0] == SYSTEM)
    return list(zip(moments, [*(steps[place] for place in turns), (Slot(text[bounds[-1] :], ""),)], strict=True))


def _moments(roles: Sequence[str], led: bool) -> list[Moment]:
    found = []
    for place, role in enumerate([*roles, END]):
        opening = ASSISTANT not in roles[:place]
        found.append(Moment(roles[place - 1] if place else "", role, opening, place >= len(roles) - 1, led))
    return found


def _order(text: str, contents: Sequence[str], roles: Roles, absorbed: int | None) -> list[int]:
    """The places of the messages in the order of their texts. Raises Unexplained where one is missing, doubled or moved."""
    for place, content in enumerate(contents):
        count = text.count(content)
        if count != 1 and not (place == absorbed and count == 0):
            kind = Misplaced if roles[place] == SYSTEM and absorbed is None else Unexplained
            times = "changes or leaves out" if count == 0 else "repeats"
            raise kind(f"it {times} the text of message {place + 1} of a conversation of {', '.join(roles)}")
    order = sorted(
        (place for place in range(len(contents)) if contents[place] in text), key=lambda each: text.index(contents[each])
    )
    own = [each for each in order if each != absorbed]
    if own != sorted(own):
        kind = Misplaced if absorbed is None and roles[0] == SYSTEM else Unexplained
        raise kind(f"it writes the messages of a conversation of {', '.join(roles)} in another order")
    return order


def _cuts(
    template: ChatTemplate, roles: Roles, contents: Sequence[str], fixed: Sequence[str], order: Sequence[int]
) -> list[tuple[str, str]]:
    """What is trimmed at the beginning and the end of each text, in the order of the texts."""
    padded = template.rendered(messages_of(roles, [f"{_PADDING}{each}{_PADDING}" for each in contents]))
    pattern = "".join(
        f"{re.escape(before)}(\n \n| \n|){contents[place]}(\n \n|\n |)" for before, place in zip(fixed, order, strict=False)
    )
    found = re.fullmatch(pattern + re.escape(fixed[-1]), padded)
    if not found:
        raise Unexplained("it changes the white space around a message's text in a way that is no trimming")
    kept = [_KEPT[each] for each in found.groups()]
    return list(zip(kept[::2], kept[1::2], strict=True))
