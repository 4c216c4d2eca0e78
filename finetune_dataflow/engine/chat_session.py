"""A prompt or a conversation with a model: kept within its context, answered token by token, written safely to a terminal."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TextIO

import mlx.nn as nn

from finetune_dataflow.engine.chat import ChatEncoder
from finetune_dataflow.engine.colors import colored, plain_text
from finetune_dataflow.engine.content import prompt_content, prompt_messages
from finetune_dataflow.engine.control_strings import Message
from finetune_dataflow.engine.prompting import (
    prepared_content,
)
from finetune_dataflow.engine.replies import StreamedToken
from finetune_dataflow.engine.settings import PromptSettings
from finetune_dataflow.engine.shapes import Record
from finetune_dataflow.engine.streaming import SamplingSettings, stream
from finetune_dataflow.errors import UserError, nearest
from finetune_dataflow.word_loom import LoomSettings, PreparedLoom, load_loom, prepared_loom

# What architectures call the longest text that they were made for.
CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "n_ctx")
LEAST_SHARE = 4  # of the context a quarter is left to the reply, where max_tokens asks for as much

COMMANDS = {
    "/help": "this list",
    "/reset": "forget what was said",
    "/system": "/system TEXT: another system prompt from here on; without a text, none",
}
HELP = "\n".join(
    [
        *(f"  {name:9} {meaning}" for name, meaning in COMMANDS.items()),
        "An empty line or Ctrl-D ends the conversation. Ctrl-C stops a reply.",
        "A text that begins with / is written with a space before it.",
    ]
)


def context_length(base_model_path: Path) -> int | None:
    """The most tokens, prompt and reply together, that a model directory's config.json says; None where it does not say."""
    config = json.loads((base_model_path / "config.json").read_text(encoding="utf-8"))
    inner = config.get("text_config")  # of the language model within one for texts and images
    for values in (config, inner if isinstance(inner, dict) else {}):
        for name in CONTEXT_NAMES:
            if isinstance(values.get(name), int) and values[name] > 0:
                return int(values[name])
    return None


def is_prompt_itself(settings: PromptSettings) -> bool:
    """Whether the word loom's texts make a whole prompt: there is a loom, and nothing in it asks for {input}."""
    return bool(settings.loom_file) and "input" not in _loom(settings).row_markers


def messages_of(text: str, settings: PromptSettings) -> tuple[Message, ...]:
    """The messages of a prompt as training would write them: around `text`, or the word loom's own where `text` is empty.

    Raises UserError where one part has two sources, a marker has no value, or there is neither a text nor a loom.
    """
    if text:
        return prompt_messages(text, settings)
    if not settings.loom_file:
        raise UserError("The prompt is empty. Expected a text, or a word loom that makes one.")
    return prepared_content(prompt_content(settings), _loom(settings)).build(Record(0, "", "", (), (), (), {}, None, None))[0]


def _loom(settings: PromptSettings) -> PreparedLoom:
    tables = load_loom(settings.loom_file).tables
    if not settings.build_prompt and "question" not in tables:
        raise UserError(
            f"loom_file {settings.loom_file} has no table [question]. Name the tables that make the prompt in build_prompt. "
            f"It has: {', '.join(tables)}."
        )
    return prepared_loom(LoomSettings(settings.loom_file, settings.build_prompt, settings.loom_markers, settings.loom_language))


@dataclass
class Answer:
    """The answer to some messages, generated while it is iterated over, once; and what it took.

    room: the most tokens it may have. left_out: how many of the oldest turns had no place in the context. prompt_seconds:
    until the first token was there; later_seconds: from then to the end.
    """

    speaker: Speaker
    messages: tuple[Message, ...]
    prompt_ids: list[int]
    room: int
    left_out: int = 0
    tokens: list[StreamedToken] = field(default_factory=list)
    prompt_seconds: float = 0.0
    later_seconds: float = 0.0

    def __iter__(self) -> Iterator[StreamedToken]:
        """The tokens as they come. Raises UserError as `streaming.stream` does."""
        sampling = replace(self.speaker.sampling, max_tokens=self.room)
        started = time.perf_counter()
        first = None
        for token in stream(self.speaker.model, self.speaker.encoder, self.prompt_ids, sampling):
            first = first or time.perf_counter()
            self.tokens.append(token)
            yield token
        ended = time.perf_counter()
        self.prompt_seconds = (first or ended) - started
        self.later_seconds = ended - (first or ended)

    @property
    def reply(self) -> str:
        """The text so far, control tokens and outer white space left out."""
        return self.speaker.encoder.reply_text([each.token_id for each in self.tokens])

    @property
    def cut(self) -> str:
        """What cut the answer short, in words; empty where it ended by itself."""
        if len(self.tokens) < self.room:
            return ""
        full = self.room < self.speaker.sampling.max_tokens
        return f"(stopped at the model's context of {self.speaker.context} tokens)" if full else "(stopped at max_tokens)"

    @property
    def figures(self) -> str:
        """Tokens and speed in one line: "8 tokens, 31.2 tokens/s; the prompt's 38 tokens took 0.41 s"."""
        count = len(self.tokens)
        later = count - 1 if self.cut else count  # the token that ended it was generated, too
        speed = f", {later / self.later_seconds:.1f} tokens/s" if later > 0 and self.later_seconds > 0 else ""
        said = f"{count} token{'' if count == 1 else 's'}{speed}"
        return f"{said}; the prompt's {len(self.prompt_ids)} tokens took {self.prompt_seconds:.2f} s"


@dataclass(frozen=True)
class Speaker:
    """A loaded model that answers. context: the most tokens of prompt and reply together, None where that is not known."""

    model: nn.Module
    encoder: ChatEncoder
    sampling: SamplingSettings
    context: int | None = None

    def answer(self, opening: Sequence[Message], turns: Sequence[Sequence[Message]] = ()) -> Answer:
        """The answer to the last message of `opening`, with as many of the latest earlier turns before it as fit.

        opening: system message, examples and the question; an earlier turn is a question with its reply. Where no turn is
        left, the reply has what is left of the context. Raises UserError where that is nothing.
        """
        *before, question = opening
        most = self.sampling.max_tokens
        for first in range(len(turns) + 1):
            messages = (*before, *(each for turn in turns[first:] for each in turn), question)
            ids = self.encoder.prompt_ids(messages)
            left = most if self.context is None else self.context - len(ids)
            if left >= min(most, (self.context or most) // LEAST_SHARE):
                break
        if left < 1:
            raise UserError(
                f"The prompt has {len(ids)} tokens, and the model's context of {self.context} has to hold the reply, too. "
                "Shorten the prompt."
            )
        return Answer(self, messages, ids, min(most, left), first)


class ChatSession:
    """A conversation: earlier turns as messages, the oldest left out when they no longer fit the model's context."""

    def __init__(self, speaker: Speaker, settings: PromptSettings) -> None:
        """Begin a conversation whose turns are written as `settings` say. Raises UserError where these contradict."""
        self.speaker = speaker
        self.turns: list[tuple[Message, Message]] = []
        self._settings = settings
        messages_of("?", settings)

    def answer(self, text: str) -> Answer:
        """The answer to what the user says now; it becomes part of the conversation with `keep`.

        Raises UserError where the template refuses the conversation, or the text alone does not fit.
        """
        answer = self.speaker.answer(messages_of(text, self._settings), self.turns)
        del self.turns[: answer.left_out]
        return answer

    def keep(self, answer: Answer) -> None:
        """Take question and reply into the conversation; a reply that was interrupted as far as it came."""
        self.turns.append((answer.messages[-1], {"role": "assistant", "content": answer.reply}))

    def reset(self) -> None:
        """Forget every turn."""
        self.turns.clear()

    def set_system_prompt(self, text: str) -> None:
        """Another system prompt from here on, empty for none. Raises UserError where the word loom has one, too."""
        settings = replace(self._settings, system_prompt=text)
        messages_of("?", settings)
        self._settings = settings


def write_answer(answer: Answer, out: TextIO, in_color: bool = False) -> None:
    """Write an answer token by token, and a line end after it; an interruption ends the line, too.

    What a terminal would obey stands as an escape (`colors.plain_text`), and so does what `out` has no bytes for. Each
    character is made safe by itself, so that it does not matter how a control sequence is cut into tokens.
    """
    encoding = out.encoding or "utf-8"
    begun = False
    try:
        for token in answer:
            begun = True
            text = colored(token.text, token.probability) if in_color else plain_text(token.text)
            out.write(text.encode(encoding, "backslashreplace").decode(encoding))
            out.flush()
    except KeyboardInterrupt:
        if begun:
            print(file=out, flush=True)
        raise
    print(file=out, flush=True)


def converse(session: ChatSession, read: Callable[[], str], out: TextIO, notices: TextIO, in_color: bool = False) -> None:
    """Answer line after line until one is empty. Replies go to `out`, everything else to `notices`.

    read: the next line, empty at the end. A mistake or Ctrl-C ends a turn, not the conversation; what had been said of a
    reply by then stays in it.
    """
    while line := read():
        try:
            if re.match(r"/\w", line):
                print(_obeyed(session, line), file=notices, flush=True)
            elif text := line.strip():
                _turn(session, text, out, notices, in_color)
            else:
                return
        except UserError as error:
            print(f"Error: {error}", file=notices, flush=True)
        except KeyboardInterrupt:
            print("(stopped)", file=notices, flush=True)


def _turn(session: ChatSession, text: str, out: TextIO, notices: TextIO, in_color: bool) -> None:
    answer = session.answer(text)
    if answer.left_out:
        turns = "turn is" if answer.left_out == 1 else f"{answer.left_out} turns are"
        print(f"(the oldest {turns} left out: the model's context is {session.speaker.context} tokens)", file=notices, flush=True)
    try:
        write_answer(answer, out, in_color)
    except KeyboardInterrupt:
        if answer.tokens:
            session.keep(answer)
        raise
    session.keep(answer)
    if answer.cut:
        print(answer.cut, file=notices, flush=True)


def _obeyed(session: ChatSession, line: str) -> str:
    """Do what a command says; what to tell the user."""
    command, _, text = line.strip().partition(" ")
    if command == "/reset":
        session.reset()
        return "(the conversation begins anew)"
    if command == "/system":
        session.set_system_prompt(text.strip())
        return "(the system prompt is set)" if text.strip() else "(no system prompt)"
    if command == "/help":
        return HELP
    raise UserError(
        f"Unknown command {command!r}.{nearest(command, COMMANDS)} The commands are {', '.join(COMMANDS)}; "
        "a text that begins with / is written with a space before it."
    )
