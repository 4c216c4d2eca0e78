"""From conversations to token ids: the tokenizer's own chat template, with text from data kept plain.

A template joins its control strings (`<|im_start|>`, …) and the data's text into one string, which a tokenizer then reads
as a whole: a question that contains `<|im_end|>` would end its own turn. Here every control string inside the data is
replaced by a placeholder before the template runs, and encoded as ordinary characters afterwards. Rows without such
strings, nearly all, go the plain way: render, then `encode`.
"""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2

from finetune_dataflow.engine.tokens import DroppedRow, EncodedRow, TokenColumns, token_columns
from finetune_dataflow.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]  # {"role": …, "content": …}


@dataclass(frozen=True)
class Conversation:
    """One row as messages: those that make the prompt, and the reply that is learned."""

    row: int
    prompt: tuple[Message, ...]
    reply: str


@functools.lru_cache(maxsize=4)
def load_encoder(tokenizer_directory: Path) -> ChatEncoder:
    """The encoder of the tokenizer in a model directory; one per directory and process, since loading takes a second.

    Raises UserError where the tokenizer cannot be read or has no chat template.
    """
    logging.getLogger("transformers").setLevel(logging.ERROR)  # it warns that PyTorch is missing, which is meant
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"The tokenizer in {tokenizer_directory} cannot be read: {error}") from error
    if not tokenizer.chat_template:
        raise UserError(
            f"The tokenizer in {tokenizer_directory} has no chat template. Expected an instruction-tuned model, "
            "whose tokenizer says how a conversation is written."
        )
    return ChatEncoder(tokenizer)


class ChatEncoder:
    """Encodes prompts and replies for one tokenizer. Training and generation both go through it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Derive the control strings, a tokenizer that knows none of them, and the tokens that end a turn."""
        from tokenizers import Tokenizer

        self._tokenizer = tokenizer
        backend = tokenizer.backend_tokenizer
        self._control_ids = {added.content: number for number, added in backend.get_added_tokens_decoder().items()}
        longest_first = sorted(self._control_ids, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        without_controls = json.loads(backend.to_str())
        without_controls["added_tokens"] = []
        without_controls["post_processor"] = None  # it may name added tokens; nothing is added to a plain text
        self._plain_tokenizer = Tokenizer.from_str(json.dumps(without_controls))
        self.end_of_turn_ids = self._end_of_turn_ids()

    @property
    def stop_ids(self) -> frozenset[int]:
        """The tokens at which generation stops: the end of turn that training teaches, and the tokenizer's own."""
        return frozenset({self.end_of_turn_ids[-1], self._tokenizer.eos_token_id} - {None})

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of some tokens, control tokens included."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=False))

    def reply_text(self, token_ids: Sequence[int]) -> str:
        """The text of a generated reply, control tokens left out, outer white space removed."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True)).strip()

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a prompt, up to where the assistant's reply begins: what training masks and generation is fed."""
        if not any(self._control.search(message["content"]) for message in messages):
            return self._tokenizer.encode(self._rendered(messages, add_generation_prompt=True), add_special_tokens=False)
        marker = _unused_marker("".join(message["content"] for message in messages))
        found: list[str] = []

        def placeholder(match: re.Match[str]) -> str:
            found.append(match.group())
            return f"{marker}{len(found) - 1}{marker}"

        protected = [{**message, "content": self._control.sub(placeholder, message["content"])} for message in messages]
        rendered = self._rendered(protected, add_generation_prompt=True)
        restore = re.compile(f"{marker}([0-9]+){marker}")
        ids: list[int] = []
        position = 0
        # What matches now is the template's own. The text between two such strings is one piece, as in a joint encode.
        for match in [*self._control.finditer(rendered), None]:
            piece = rendered[position : match.start() if match else None]
            ids += self.plain_ids(restore.sub(lambda each: found[int(each.group(1))], piece))
            if match:
                ids.append(self._control_ids[match.group()])
                position = match.end()
        return ids

    def reply_ids(self, reply: str) -> list[int]:
        """The ids of a reply, tokenised apart from its prompt, with the tokens that end the turn."""
        if self._control.search(reply):
            return [*self.plain_ids(reply), *self.end_of_turn_ids]
        return [*self._tokenizer.encode(reply, add_special_tokens=False), *self.end_of_turn_ids]

    def plain_ids(self, text: str) -> list[int]:
        """The ids of `text` read as ordinary characters, whatever control strings it contains."""
        if not text:
            return []
        ids = self._plain_tokenizer.encode(text, add_special_tokens=False).ids
        if not set(self._control_ids.values()).isdisjoint(ids):
            # A vocabulary may hold a control string as an ordinary piece too; one character alone never is one.
            ids = [number for each in text for number in self._plain_tokenizer.encode(each, add_special_tokens=False).ids]
        return ids

    def _rendered(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        try:
            rendered = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except jinja2.TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(f"The tokenizer's chat template refuses a conversation of {roles}: {error}") from error
        return str(rendered)

    def _end_of_turn_ids(self) -> list[int]:
        """What the template writes after a reply, up to and including the first end-of-turn token."""
        probe = "\ue000reply\ue000"
        rendered = self._rendered(
            [{"role": "user", "content": "question"}, {"role": "assistant", "content": probe}],
            add_generation_prompt=False,
        )
        after = rendered.partition(probe)[2]
        ids = self._tokenizer.encode(after, add_special_tokens=False)
        for position, number in enumerate(ids):
            if number in self._control_ids.values():
                return ids[: position + 1]
        if self._tokenizer.eos_token_id is None:
            raise UserError("The tokenizer has no end-of-turn token: neither its chat template nor its settings name one.")
        return [self._tokenizer.eos_token_id]


def encode_conversations(
    encoder: ChatEncoder, conversations: Sequence[Conversation], max_seq_length: int, long_rows: str
) -> TokenColumns:
    """The token columns of some conversations.

    A row longer than `max_seq_length` tokens never loses its reply in silence: `truncate_prompt` cuts the beginning of
    its last user message, `drop` leaves the row out, `error` raises UserError naming the rows. A row whose reply and
    scaffold alone are too long is dropped under `truncate_prompt`, too.
    """
    encoded: list[EncodedRow] = []
    dropped: list[DroppedRow] = []
    too_long: list[tuple[int, int]] = []
    for conversation in conversations:
        prompt, reply = encoder.prompt_ids(conversation.prompt), encoder.reply_ids(conversation.reply)
        length = len(prompt) + len(reply)
        if length <= max_seq_length:
            encoded.append(EncodedRow(conversation.row, prompt, reply))
        elif long_rows == "error":
            too_long.append((conversation.row, length))
        elif long_rows == "drop":
            dropped.append(DroppedRow(conversation.row, "longer_than_max_seq_length"))
        else:
            shorter = _truncated_prompt(encoder, conversation.prompt, max_seq_length - len(reply))
            if shorter is None:
                dropped.append(DroppedRow(conversation.row, "reply_longer_than_max_seq_length"))
            else:
                encoded.append(EncodedRow(conversation.row, shorter, reply, truncated=True))
    if too_long:
        named = ", ".join(f"row {row} ({length})" for row, length in too_long[:10])
        more = f" and {len(too_long) - 10} more" if len(too_long) > 10 else ""
        raise UserError(
            f"Rows longer than max_seq_length={max_seq_length} tokens: {named}{more}. "
            "Raise max_seq_length, or set long_rows to 'truncate_prompt' or 'drop'."
        )
    return token_columns(encoded, dropped)


def _truncated_prompt(encoder: ChatEncoder, messages: Sequence[Message], budget: int) -> list[int] | None:
    """The prompt with the longest tail of its last user message that fits `budget` tokens; None where none fits."""
    last_user = max(index for index, message in enumerate(messages) if message["role"] == "user")
    text = messages[last_user]["content"]

    def prompt_with_tail(characters: int) -> list[int]:
        tail = text[len(text) - characters :].lstrip()
        shorter = [{**message, "content": tail} if i == last_user else message for i, message in enumerate(messages)]
        return encoder.prompt_ids(shorter)

    if len(prompt_with_tail(0)) >= budget:
        return None
    low, high = 0, len(text)  # the tail of `low` characters fits; the whole text does not
    while high - low > 1:
        middle = (low + high) // 2
        if len(prompt_with_tail(middle)) <= budget:
            low = middle
        else:
            high = middle
    return prompt_with_tail(low) if low else None


def _unused_marker(text: str) -> str:
    """A private-use character that does not occur in `text`."""
    return next(chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in text)
