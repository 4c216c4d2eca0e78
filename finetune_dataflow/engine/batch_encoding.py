"""Many conversations encoded together: the same tokens as `ChatEncoder.encode` gives one by one, several times as fast.

Three things cost time where rows go one by one: the template, the calls of the tokenizer, and tokenising the same scaffold
again. Here what the template writes is known beforehand where that can be proved (`engine.layouts`), the scaffold is
tokenised once, and the texts of some thousand rows are tokenised by one call, on all cores, while the next rows are made
ready. Whatever is not proved, and every row that holds a control string, goes the plain way.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from finetune_dataflow.engine.chat import ChatEncoder, Conversation, EncodedText, head
from finetune_dataflow.engine.control_strings import PlainText
from finetune_dataflow.engine.files import content_fingerprint
from finetune_dataflow.engine.layouts import Layout, Part, layout
from finetune_dataflow.engine.settings import Learned
from finetune_dataflow.engine.tokens import EncodedRow

logger = logging.getLogger(__name__)

CHUNK = 2048  # rows that are tokenised by one call
COMPARED = 16  # rows of each sequence of roles that are encoded the plain way, too
MOST_LAYOUTS = 512  # sequences of roles that a layout is looked for; conversations of more go through the template

_KEYS = frozenset({"role", "content"})
_TEXT, _TEMPLATE = ("a text alone",), ("the template",)  # kinds of rows besides the sequences of roles


@dataclass(frozen=True)
class _Scaffold:
    """What stands in every row alike: its ids, where each begins, and its characters."""

    ids: list[int]
    starts: list[int]
    characters: int

    def __add__(self, other: _Scaffold) -> _Scaffold:
        starts = [*self.starts, *(self.characters + start for start in other.starts)]
        return _Scaffold([*self.ids, *other.ids], starts, self.characters + other.characters)


_Element = _Scaffold | tuple[Part, ...]  # the latter is a text to tokenise


@dataclass(frozen=True)
class _Plan:
    """How the rows of one sequence of roles are encoded. `tail` is the end of every prompt, where it is always the same."""

    roles: tuple[str, ...]
    layout: Layout
    elements: tuple[_Element, ...]
    tail: str | None


@dataclass(slots=True)
class _Row:
    """A row made ready: its prompt as scaffold and places in the chunk's texts, and its reply's place there.

    kind: what is proved together. before: the prompt rendered up to a message, where earlier replies are learned.
    """

    conversation: Conversation
    kind: tuple[str, ...]
    elements: list[_Scaffold | int]
    reply: int
    tail: str
    rendered: str = ""
    before: Callable[[int], str] | None = None


@dataclass
class _Chunk:
    """Some rows and the texts to tokenise for them. A row that goes the plain way is its conversation alone."""

    rows: list[_Row | Conversation]
    texts: dict[str, int] = field(default_factory=dict)
    with_starts: bool = False

    def place(self, text: str) -> int:
        return self.texts.setdefault(text, len(self.texts))


class BatchEncoder:
    """Encodes many conversations as one `ChatEncoder` does; what it has proved holds for all it is given."""

    def __init__(self, encoder: ChatEncoder, learned: Learned) -> None:
        """An encoder of its own for each set of conversations: what one has proved or refused does not touch another."""
        self._encoder, self._learned = encoder, learned
        self._backend = encoder.tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._apart = encoder.pieces_are_apart
        self._plans: dict[tuple[str, ...], _Plan | None] = {}
        self._compared: dict[tuple[str, ...], int] = {}
        self._refused: set[tuple[str, ...]] = set()
        self._start = _Scaffold(encoder.start_ids, [], 0)

    def encoded(self, conversations: Sequence[Conversation]) -> Iterator[EncodedRow]:
        """The rows in their order. Raises UserError where the template refuses one."""
        with ThreadPoolExecutor(1) as pool:
            waiting: tuple[_Chunk, Future[list[EncodedText]]] | None = None
            for start in range(0, len(conversations), CHUNK):
                chunk = self._ready(conversations[start : start + CHUNK])
                following = chunk, pool.submit(self._tokenised, [*chunk.texts], chunk.with_starts)
                if waiting:
                    yield from self._rows(waiting[0], waiting[1].result())
                waiting = following
            if waiting:
                yield from self._rows(waiting[0], waiting[1].result())

    def _ready(self, conversations: Sequence[Conversation]) -> _Chunk:
        chunk = _Chunk([])
        for conversation in conversations:
            chunk.rows.append(self._ready_row(conversation, chunk) or conversation)
        return chunk

    def _ready_row(self, conversation: Conversation, chunk: _Chunk) -> _Row | None:
        """The row made ready; None where it must go the plain way."""
        encoder, messages = self._encoder, conversation.prompt
        if encoder.control.search(conversation.reply):
            return None
        if self._learned.text_alone or not messages:
            return _Row(conversation, _TEXT, [self._start], chunk.place(conversation.reply), "")
        turns = self._learned.every_turn and any(message["role"] == "assistant" for message in messages)
        plan = self._plan(conversation)
        if plan is None:
            return self._templated(conversation, chunk, turns)
        contents = [message["content"] for message in messages]
        found = plan.layout
        elements: list[_Scaffold | int] = []
        for element in plan.elements:
            if isinstance(element, _Scaffold):
                elements.append(element)
                continue
            text = "".join([part if isinstance(part, str) else found.content(part, contents) for part in element])
            if encoder.control.search(text):
                return None
            elements.append(chunk.place(text))
        row = _Row(conversation, plan.roles, elements, chunk.place(conversation.reply), plan.tail or "")
        if turns or plan.tail is None:
            row.rendered = found.text(contents)
        if plan.tail is None:
            row.tail = encoder.tail(row.rendered)
        if turns:
            return self._with_turns(row, plan, contents, chunk)
        return row

    def _with_turns(self, row: _Row, plan: _Plan, contents: list[str], chunk: _Chunk) -> _Row | None:
        """The row made ready for learning earlier replies, for which the layouts up to each must be known, too."""
        layouts = {}
        for turn, role in enumerate(plan.roles):
            if role == "assistant" and turn > 0:
                shorter = self._plan_of(plan.roles[:turn])
                if shorter is None:
                    return None
                layouts[turn] = shorter.layout
        row.before = lambda turn: layouts[turn].text(contents[:turn])
        chunk.with_starts = True
        return row

    def _templated(self, conversation: Conversation, chunk: _Chunk, turns: bool) -> _Row | None:
        """The row made ready by the template itself."""
        encoder, messages, tools = self._encoder, conversation.prompt, conversation.tools
        if PlainText(encoder.control, messages).found:
            return None
        rendered = encoder.rendered(messages, tools)
        elements: list[_Scaffold | int] = [chunk.place(rendered)]
        row = _Row(conversation, _TEMPLATE, elements, chunk.place(conversation.reply), encoder.tail(rendered), rendered)
        if turns:
            chunk.with_starts = True
            row.before = lambda turn: encoder.rendered(messages[:turn], tools)
        return row

    def _plan(self, conversation: Conversation) -> _Plan | None:
        if conversation.tools:
            return None
        for message in conversation.prompt:
            content = message.get("content")
            if message.keys() != _KEYS or type(content) is not str or not content or content.isspace():
                return None
        return self._plan_of(tuple([message["role"] for message in conversation.prompt]))

    def _plan_of(self, roles: tuple[str, ...]) -> _Plan | None:
        if roles not in self._plans:
            self._plans[roles] = self._new_plan(roles) if len(self._plans) < MOST_LAYOUTS else None
        return self._plans[roles]

    def _new_plan(self, roles: tuple[str, ...]) -> _Plan | None:
        encoder = self._encoder
        template = encoder.tokenizer.chat_template

        def rendered(contents: Sequence[str]) -> str:
            return encoder.rendered([{"role": role, "content": each} for role, each in zip(roles, contents, strict=True)])

        if not isinstance(template, str):
            return None
        found = layout(template, roles, encoder.tokenizer.special_tokens_map, rendered)
        if found is None:
            logger.debug("The chat template has no provable layout for %s.", ", ".join(roles))
            return None
        elements = self._elements(found) if self._apart else (found.parts,)
        last = found.parts[-1] if found.parts else ""
        tail = encoder.tail(last) if isinstance(last, str) and encoder.control.search(last) else None
        return _Plan(roles, found, elements, tail)

    def _elements(self, found: Layout) -> tuple[_Element, ...]:
        """The parts cut at the control strings; what is the same in every row is tokenised now."""
        elements: list[_Element] = []
        piece: list[Part] = []
        for part in found.parts:
            if isinstance(part, int):
                piece.append(part)
                continue
            position = 0
            for match in self._encoder.control.finditer(part):
                self._end_piece(elements, [*piece, part[position : match.start()]])
                control = self._encoder.control_ids[match.group()]
                _append(elements, _Scaffold([control], [0], len(match.group())))
                piece, position = [], match.end()
            piece.append(part[position:])
        self._end_piece(elements, piece)
        return tuple(elements)

    def _end_piece(self, elements: list[_Element], piece: list[Part]) -> None:
        parts = tuple(part for part in piece if part != "")
        if any(isinstance(part, int) for part in parts):
            elements.append(parts)
        elif parts:
            text = "".join(map(str, parts))
            [encoded] = self._tokenised([text], with_starts=True)
            _append(elements, _Scaffold(encoded.ids, encoded.starts, len(text)))

    def _tokenised(self, texts: list[str], with_starts: bool) -> list[EncodedText]:
        if with_starts:
            encoded = self._backend.encode_batch(texts, add_special_tokens=False)
            return [EncodedText(each.ids, [start for start, _ in each.offsets]) for each in encoded]
        return [EncodedText(each.ids, []) for each in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _rows(self, chunk: _Chunk, encoded: list[EncodedText]) -> Iterator[EncodedRow]:
        texts = [*chunk.texts]
        for row in chunk.rows:
            if isinstance(row, Conversation) or row.kind in self._refused:
                yield self._encoder.encode(row if isinstance(row, Conversation) else row.conversation, self._learned)
                continue
            made = self._assembled(row, encoded, texts)
            if (compared := self._compared.get(row.kind, 0)) < COMPARED:
                self._compared[row.kind] = compared + 1
                plain = self._encoder.encode(row.conversation, self._learned)
                if made != plain:
                    logger.debug("Rows of %s are encoded one by one: together they would differ.", ", ".join(row.kind))
                    self._refused.add(row.kind)
                    made = plain
            yield made

    def _assembled(self, row: _Row, encoded: list[EncodedText], texts: list[str]) -> EncodedRow:
        encoder, conversation = self._encoder, row.conversation
        reply = encoded[row.reply].ids + encoder.end_of_turn_ids
        ids: list[int] = []
        for element in row.elements:
            ids += encoded[element].ids if isinstance(element, int) else element.ids
        if row.kind == _TEXT:
            return EncodedRow(conversation.row, ids, reply)
        starts = [] if row.before is None else _starts(row, encoded, texts)
        prompt = encoder.led_in(EncodedText(ids, starts))
        labels, skipped = None, 0
        if self._learned.whole_prompt:
            labels = [*prompt.ids]
        elif row.before is not None:
            labels, skipped = encoder.prompt_labels(conversation.prompt, prompt, row.rendered, row.before, self._learned)
        differs = encoder.differs_at_border(row.tail, head(conversation.reply))
        return EncodedRow(conversation.row, prompt.ids, reply, False, labels, differs, skipped)


def _append(elements: list[_Element], scaffold: _Scaffold) -> None:
    """Add what is the same in every row, to the element before where that is, too."""
    if elements and isinstance(last := elements[-1], _Scaffold):
        elements[-1] = last + scaffold
    else:
        elements.append(scaffold)


def _starts(row: _Row, encoded: list[EncodedText], texts: list[str]) -> list[int]:
    """Where each token of a prompt begins in its text."""
    starts: list[int] = []
    position = 0
    for element in row.elements:
        own = encoded[element].starts if isinstance(element, int) else element.starts
        starts += [position + start for start in own]
        position += len(texts[element]) if isinstance(element, int) else element.characters
    return starts


@functools.cache
def code_fingerprint() -> str:
    """SHA-256 (hex) of the code that makes tokens of rows, and of the libraries' versions it goes by."""
    names = ("batch_encoding", "chat", "content", "control_strings", "few_shot", "layouts", "markers", "prompting", "tokens")
    code = content_fingerprint([Path(__file__).with_name(f"{name}.py") for name in names])
    return f"{code} {' '.join(importlib.metadata.version(each) for each in ('jinja2', 'tokenizers', 'transformers'))}"
