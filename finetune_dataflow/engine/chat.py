"""From conversations to token ids: the tokenizer's own chat template, with text from data kept plain.

A template joins its control strings (`<|im_start|>`, …) and the data's text into one string, which a tokenizer then reads
as a whole: a question that contains `<|im_end|>` would end its own turn. Here every control string inside the data is
replaced by a placeholder before the template runs, and encoded as ordinary characters afterwards. Rows without such
strings, nearly all, go the plain way: render, then `encode`.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from finetune_dataflow.engine.control_strings import Message, PlainText, pieces_are_apart
from finetune_dataflow.engine.many_rows import paused
from finetune_dataflow.engine.progress import Bar
from finetune_dataflow.engine.settings import Learned
from finetune_dataflow.engine.tokens import IGNORED, DroppedRow, EncodedRow, TokenColumns, joined, token_columns
from finetune_dataflow.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BORDER = 64  # characters on either side of the border between prompt and reply that tokens could reach over
ROWS_TOGETHER = 8192  # rows whose tokens become columns together
ROWS_WITH_BAR = 10_000  # below, encoding takes about a second
MOST_BORDERS = 100_000  # looked at and remembered
_FIRST_WORD = re.compile(rf"\s{{0,{BORDER}}}\S{{0,{BORDER}}}\s?")

COMPLETION_ONLY = Learned()


@dataclass(frozen=True)
class Conversation:
    """One row as messages: those that make the prompt (earlier replies included), and the reply that is learned."""

    row: int
    prompt: tuple[Message, ...]
    reply: str
    tools: tuple[Mapping[str, Any], ...] = ()


def load_encoder(tokenizer_directory: Path, template: str = "") -> ChatEncoder:
    """The encoder of the tokenizer in a model directory; one per directory, template and process: loading takes a second.

    It is loaded again where the directory's files have changed. `template` is a Jinja chat template that takes the place of
    the tokenizer's own. Raises UserError where the tokenizer cannot be read, or has no chat template and none is given.
    """
    files = [each for pattern in ("*.json", "*.jinja", "*.model", "*.txt") for each in tokenizer_directory.glob(pattern)]
    states = tuple((each.name, each.stat().st_mtime_ns, each.stat().st_size) for each in sorted(files))
    return _loaded_encoder(tokenizer_directory, template, states)


@functools.lru_cache(maxsize=4)
def _loaded_encoder(tokenizer_directory: Path, template: str, states: tuple[tuple[str, int, int], ...]) -> ChatEncoder:
    logging.getLogger("transformers").setLevel(logging.ERROR)  # it warns that PyTorch is missing, which is meant
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"The tokenizer in {tokenizer_directory} cannot be read: {error}") from error
    if template:
        tokenizer.chat_template = template
    if not tokenizer.chat_template:
        from finetune_dataflow.engine.formats import FORMATS

        raise UserError(
            f"The tokenizer in {tokenizer_directory} has no chat template, which says how a conversation is written. "
            f"Name a prompt_format: {', '.join(FORMATS)}, or a Jinja file."
        )
    return ChatEncoder(tokenizer, lead_in=bool(template))


@dataclass(frozen=True)
class EncodedText:
    """The ids of a rendered text, and where each begins in it."""

    ids: list[int]
    starts: list[int]


class ChatEncoder:
    """Encodes prompts and replies for one tokenizer. Training and generation both go through it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, lead_in: bool = False) -> None:
        """Derive the control strings, a tokenizer that knows none of them, and the tokens that end a turn.

        `lead_in`: a beginning of sequence that the tokenizer adds to texts is put before a prompt that does not write it: so
        with a template that knows nothing of this tokenizer. A tokenizer's own template has the last word.
        """
        from tokenizers import Tokenizer

        self.tokenizer = tokenizer
        backend = tokenizer.backend_tokenizer
        self.control_ids = {added.content: number for number, added in backend.get_added_tokens_decoder().items()}
        longest_first = sorted(self.control_ids, key=len, reverse=True)
        self.control = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        without_controls = json.loads(backend.to_str())
        self.pieces_are_apart = pieces_are_apart(without_controls)
        without_controls["added_tokens"] = []
        without_controls["post_processor"] = None  # it may name added tokens; nothing is added to a plain text
        self._plain_tokenizer = Tokenizer.from_str(json.dumps(without_controls))
        self._lead_in: list[int] = []
        if lead_in:
            self._lead_in = [each for each in tokenizer.encode("", add_special_tokens=True)[:1] if each == tokenizer.bos_token_id]
        self._borders: dict[tuple[str, str], bool] = {}
        self.end_of_turn_ids = self._end_of_turn_ids()

    def fingerprint(self) -> str:
        """SHA-256 (hex) of everything that tokens depend on besides the code: the tokenizer, its template, its special tokens."""
        tokenizer = self.tokenizer
        parts = (tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, tokenizer.special_tokens_map, self._lead_in)
        return hashlib.sha256(repr((*parts, self.start_ids, self.end_of_turn_ids)).encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def control_strings(self) -> frozenset[str]:
        """The strings this tokenizer reads as control tokens where they are not kept plain."""
        return frozenset(self.control_ids)

    @property
    def start_ids(self) -> list[int]:
        """What stands before a text without a prompt: the tokenizer's beginning of sequence, else its end of sequence."""
        added = self.tokenizer.encode("", add_special_tokens=True)
        return added[:1] if added else [self.tokenizer.eos_token_id]

    @property
    def stop_ids(self) -> frozenset[int]:
        """The tokens at which generation stops: the end of turn that training teaches, and the tokenizer's own."""
        return frozenset({self.end_of_turn_ids[-1], self.tokenizer.eos_token_id} - {None})

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of some tokens, control tokens included."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=False))

    def reply_text(self, token_ids: Sequence[int]) -> str:
        """The text of a generated reply, control tokens left out, outer white space removed."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True)).strip()

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """The ids of a prompt, up to where the assistant's reply begins: what training masks and generation is fed."""
        return self._encoded(*self._protected(messages, tools)).ids

    def encode(self, conversation: Conversation, learned: Learned) -> EncodedRow:
        """The tokens and labels of one conversation.

        Earlier replies are learned, too, where `learned.every_turn` says so; each with the token that ends its turn.
        """
        reply = self.reply_ids(conversation.reply)
        if learned.text_alone or not conversation.prompt:
            return EncodedRow(conversation.row, self.start_ids, reply)
        rendered, restore = self._protected(conversation.prompt, conversation.tools)
        encoded = self._encoded(rendered, restore)

        def before(turn: int) -> str:
            return self.rendered(restore.protected[:turn], conversation.tools)

        labels, skipped = self.prompt_labels(conversation.prompt, encoded, rendered, before, learned, restore)
        return EncodedRow(
            conversation.row,
            encoded.ids,
            reply,
            prompt_labels=labels,
            joint_differs=self.differs_at_border(self.tail(restore(rendered)), head(conversation.reply)),
            skipped_turns=skipped,
        )

    def prompt_labels(
        self,
        messages: Sequence[Message],
        encoded: EncodedText,
        rendered: str,
        before: Callable[[int], str],
        learned: Learned,
        restore: Callable[[str], str] = str,
    ) -> tuple[list[int] | None, int]:
        """What is learned of a prompt (None for nothing), and how many of its replies should be and cannot.

        before: the prompt as it is rendered up to a message, where the assistant's reply begins.
        """
        if learned.whole_prompt:
            return [*encoded.ids], 0
        turns = [place for place, message in enumerate(messages) if message["role"] == "assistant"] if learned.every_turn else []
        if not turns:
            return None, 0
        labels, skipped = [IGNORED] * len(encoded.ids), 0
        for turn in turns:
            if turn > 0 and rendered.startswith(start := before(turn)):
                self._learn_turn(encoded, labels, len(restore(start)))
            else:
                skipped += 1  # the template writes an earlier reply otherwise than a last one
        return labels, skipped

    def _learn_turn(self, encoded: EncodedText, labels: list[int], start: int) -> None:
        """Label the tokens from the character `start` on, up to and including the next end of turn."""
        for place in range(bisect.bisect_left(encoded.starts, start), len(encoded.ids)):
            labels[place] = encoded.ids[place]
            if encoded.ids[place] == self.end_of_turn_ids[-1]:
                return

    def tail(self, prompt: str) -> str:
        """The end of a prompt that a token could reach over: what follows its last control string."""
        controls = [match.end() for match in self.control.finditer(prompt)]
        return prompt[controls[-1] if controls else -BORDER :]

    def differs_at_border(self, tail: str, head: str) -> bool:
        """Whether a token would reach over the border of prompt and reply if both were tokenised as one text."""
        if (tail, head) not in self._borders:
            if len(self._borders) >= MOST_BORDERS:
                self._borders.clear()
            joint = self.plain_ids(tail + head)
            self._borders[tail, head] = joint != [*self.plain_ids(tail), *self.plain_ids(head)]
        return self._borders[tail, head]

    def _protected(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> tuple[str, PlainText]:
        """The rendered prompt with placeholders for the data's control strings, and the way back from them."""
        restore = PlainText(self.control, messages)
        return self.rendered(restore.protected, tools), restore

    def _encoded(self, rendered: str, restore: PlainText) -> EncodedText:
        """The ids of a rendered prompt, with one beginning of sequence where the tokenizer wants it."""
        return self.led_in(self._encoded_text(rendered, restore))

    def led_in(self, encoded: EncodedText) -> EncodedText:
        """The same with the beginning of sequence that it lacks, where the tokenizer wants one."""
        if encoded.ids[:1] == self._lead_in or not self._lead_in:
            return encoded
        return EncodedText([*self._lead_in, *encoded.ids], [*(0 for _ in self._lead_in), *encoded.starts])

    def _encoded_text(self, rendered: str, restore: PlainText) -> EncodedText:
        """The ids of a rendered prompt. Without placeholders it is encoded as a whole."""
        if not restore.found:
            whole = self.tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
            return EncodedText([*whole["input_ids"]], [start for start, _ in whole["offset_mapping"]])
        ids: list[int] = []
        starts: list[int] = []
        position = length = 0
        # What matches now is the template's own. The text between two such strings is one piece, as in a joint encode.
        for match in [*self.control.finditer(rendered), None]:
            piece = restore(rendered[position : match.start() if match else None])
            encoded = self._plain(piece)
            ids += encoded.ids
            starts += [length + start for start in encoded.starts]
            length += len(piece)
            if match:
                ids.append(self.control_ids[match.group()])
                starts.append(length)
                length += len(match.group())
                position = match.end()
        return EncodedText(ids, starts)

    def reply_ids(self, reply: str) -> list[int]:
        """The ids of a reply, tokenised apart from its prompt, with the tokens that end the turn."""
        if self.control.search(reply):
            return [*self.plain_ids(reply), *self.end_of_turn_ids]
        return [*self.tokenizer.encode(reply, add_special_tokens=False), *self.end_of_turn_ids]

    def plain_ids(self, text: str) -> list[int]:
        """The ids of `text` read as ordinary characters, whatever control strings it contains."""
        return self._plain(text).ids

    def _plain(self, text: str) -> EncodedText:
        if not text:
            return EncodedText([], [])
        encoded = self._plain_tokenizer.encode(text, add_special_tokens=False)
        if set(self.control_ids.values()).isdisjoint(encoded.ids):
            return EncodedText(encoded.ids, [start for start, _ in encoded.offsets])
        # A vocabulary may hold a control string as an ordinary piece too; one character alone never is one.
        singly = [
            (number, place)
            for place, each in enumerate(text)
            for number in self._plain_tokenizer.encode(each, add_special_tokens=False).ids
        ]
        return EncodedText([number for number, _ in singly], [place for _, place in singly])

    def rendered(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), *, add_generation_prompt: bool = True
    ) -> str:
        """What the template writes, control strings in it taken as they are. Raises UserError where it refuses."""
        try:
            rendered = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=[dict(tool) for tool in tools] or None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            roles = ", ".join(str(message["role"]) for message in messages)
            raise UserError(f"The chat template refuses a conversation of {roles}: {error}") from error
        return str(rendered)

    def _end_of_turn_ids(self) -> list[int]:
        """What the template writes after a reply, up to and including the first end-of-turn token."""
        probe = "\ue000reply\ue000"
        rendered = self.rendered(
            [{"role": "user", "content": "question"}, {"role": "assistant", "content": probe}],
            add_generation_prompt=False,
        )
        after = rendered.partition(probe)[2]
        ids = self.tokenizer.encode(after, add_special_tokens=False)
        if self.tokenizer.eos_token_id in ids:
            return ids[: ids.index(self.tokenizer.eos_token_id) + 1]
        for position, number in enumerate(ids):
            if number in self.control_ids.values():
                return ids[: position + 1]
        if self.tokenizer.eos_token_id is None:
            raise UserError("The tokenizer has no end-of-turn token: neither its chat template nor its settings name one.")
        return [self.tokenizer.eos_token_id]


def head(reply: str) -> str:
    """The beginning of a reply that a token could reach over from its prompt: its first word and what parts it from the next."""
    match = _FIRST_WORD.match(reply)
    return match.group() if match else ""


def encode_conversations(
    encoder: ChatEncoder,
    conversations: Sequence[Conversation],
    max_seq_length: int,
    long_rows: str,
    learned: Learned = COMPLETION_ONLY,
) -> TokenColumns:
    """The token columns of some conversations, in memory.

    A row longer than `max_seq_length` tokens never loses its reply in silence: `truncate_prompt` leaves out its oldest turns
    and then cuts the beginning of its last user message, `drop` leaves the row out, `error` raises UserError naming the
    rows. A row whose reply and scaffold alone are too long is dropped under `truncate_prompt`, too.
    """
    with paused():
        return joined([*encoded_parts(encoder, conversations, max_seq_length, long_rows, learned)])


def encoded_parts(
    encoder: ChatEncoder,
    conversations: Sequence[Conversation],
    max_seq_length: int,
    long_rows: str,
    learned: Learned = COMPLETION_ONLY,
) -> Iterator[TokenColumns]:
    """The same, some thousand rows at a time."""
    from finetune_dataflow.engine.batch_encoding import BatchEncoder

    bar = Bar(len(conversations), "tokens") if len(conversations) >= ROWS_WITH_BAR else None
    rows = BatchEncoder(encoder, learned).encoded(conversations)
    too_long: list[tuple[int, int]] = []
    for start in range(0, len(conversations), ROWS_TOGETHER):
        encoded: list[EncodedRow] = []
        dropped: list[DroppedRow] = []
        for index, row in enumerate(islice(rows, ROWS_TOGETHER), start):
            if row.length <= max_seq_length:
                encoded.append(row)
            elif long_rows == "error":
                too_long.append((row.row, row.length))
            elif long_rows == "drop":
                dropped.append(DroppedRow(row.row, "longer_than_max_seq_length"))
            elif (shorter := _truncated(encoder, conversations[index], learned, max_seq_length)) is None:
                dropped.append(DroppedRow(row.row, "reply_longer_than_max_seq_length"))
            else:
                encoded.append(replace(shorter, truncated=True))
        yield token_columns(encoded, dropped)
        if bar:
            bar.advance(len(encoded) + len(dropped))
    if bar:
        bar.close()
    if too_long:
        named = ", ".join(f"row {row} ({length})" for row, length in too_long[:10])
        more = f" and {len(too_long) - 10} more" if len(too_long) > 10 else ""
        raise UserError(
            f"Rows longer than max_seq_length={max_seq_length} tokens: {named}{more}. "
            "Raise max_seq_length, or set long_rows to 'truncate_prompt' or 'drop'."
        )


def _truncated(encoder: ChatEncoder, conversation: Conversation, learned: Learned, longest: int) -> EncodedRow | None:
    """The row with its oldest turns left out, then with the longest tail of its last user message that fits; or None."""
    users = [place for place, message in enumerate(conversation.prompt) if message["role"] == "user"]
    if learned.text_alone or not users:
        return None
    lead = users[0]
    for first in users[1:]:
        later = replace(conversation, prompt=(*conversation.prompt[:lead], *conversation.prompt[first:]))
        if (row := encoder.encode(later, learned)).length <= longest:
            return row
    messages = (*conversation.prompt[:lead], *conversation.prompt[users[-1] :])
    text = messages[lead]["content"].strip()

    def with_tail(characters: int) -> EncodedRow:
        shorter = {**messages[lead], "content": text[len(text) - characters :].lstrip()}
        return encoder.encode(replace(conversation, prompt=(*messages[:lead], shorter, *messages[lead + 1 :])), learned)

    if with_tail(0).length >= longest:
        return None
    low, high = 0, len(text)  # the tail of `low` characters fits; the whole text does not
    while high - low > 1:
        middle = (low + high) // 2
        if with_tail(middle).length <= longest:
            low = middle
        else:
            high = middle
    return with_tail(low) if low else None
