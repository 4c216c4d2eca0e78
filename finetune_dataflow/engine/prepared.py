"""Prepared data for another trainer: mlx-lm's directory, a Hugging Face dataset on disk, Parquet files."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from finetune_dataflow.engine.chat import Conversation
from finetune_dataflow.engine.control_strings import Message
from finetune_dataflow.engine.files import flush_tree, user_path, writing
from finetune_dataflow.engine.progress import Bar
from finetune_dataflow.engine.run_directory import RunIdentity, versions
from finetune_dataflow.engine.settings import TokenizationSettings, differences
from finetune_dataflow.engine.tokens import IGNORED, TokenColumns
from finetune_dataflow.errors import UserError

SETS = ("train", "validation", "hold_out")
FILES = {
    "mlx": ("train.jsonl", "valid.jsonl", "test.jsonl"),
    "hf": ("train", "validation", "test"),
    "parquet": ("train.parquet", "validation.parquet", "test.parquet"),
}
KINDS = tuple(FILES)
RECORD = "prepared.json"  # what the directory was made of, and the SHA-256 of every other file in it
SCHEMA = pa.schema(
    {
        "row": pa.int64(),
        "input_ids": pa.list_(pa.int32()),
        "attention_mask": pa.list_(pa.int8()),
        "labels": pa.list_(pa.int32()),
    }
)
BLOCK_ROWS, BLOCK_TOKENS = 50_000, 2**24  # of a row group: 150 MB at most before compression
MLX_BATCH_SIZE, MLX_MAX_SEQ_LENGTH = 4, 2048  # mlx-lm's defaults
READ_TOGETHER, COMPARED = 1024, 16  # rows; so many of the first are read by mlx-lm's own code, too
MARKER = "\ue000"  # stands for a text of the user's while a template runs

_Read = tuple[list[int], int] | str
_REFUSALS = (jinja2.TemplateError, TypeError, KeyError, ValueError)  # of a chat template


@dataclass(frozen=True)
class PreparedSets:
    """The three sets as a fit is given them.

    tokens, conversations: by the names in SETS; the tokens are those of some of the conversations, in their order.
    model: the directory of base model and tokenizer. own_template: whether a prompt_format takes the place of the
    tokenizer's own chat template. identity: what made the tokens.
    """

    tokens: Mapping[str, TokenColumns]
    conversations: Mapping[str, Sequence[Conversation]]
    model: Path
    own_template: bool
    settings: TokenizationSettings
    identity: RunIdentity


def destination(text: str) -> Path:
    """The directory that a user named for prepared data; UserError where it is a file, or holds other files than those."""
    directory = user_path(text).resolve()  # a symbolic link could not be renamed onto
    if directory.exists() and not directory.is_dir():
        raise UserError(f"--out {text!r} is a file. Expected the name of a directory.")
    with writing(directory):
        found = sorted(each.name for each in directory.iterdir()) if directory.is_dir() else []
    if found and RECORD not in found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise UserError(
            f"--out {text!r} is not empty: it holds {', '.join(found[:3])}{more}, and nothing is overwritten. "
            "Expected an empty directory, or a name that is not taken."
        )
    return directory


def is_there(directory: Path, kind: str, data: PreparedSets) -> bool:
    """Whether `directory` holds exactly this, whole; False where it is empty or absent.

    Raises UserError where it holds another preparation, naming what differs, or files that were changed since.
    """
    if not (directory / RECORD).is_file():
        return False
    try:
        there = json.loads((directory / RECORD).read_text(encoding="utf-8"))
        made_of, digests = dict(there["made_of"]), dict(there["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{directory / RECORD} cannot be read. Name another directory in --out, or remove {directory}."
        ) from error
    if made_of != (here := _made_of(kind, data)):
        what = "; ".join(differences(made_of, here))
        raise UserError(f"{directory} holds another preparation: {what}. Name another directory in --out.")
    changed = [name for name, digest in digests.items() if _digest(directory / name) != digest]
    if changed:
        raise UserError(
            f"{directory} held this preparation, but {', '.join(changed[:3])} changed since or cannot be read. "
            "Name another directory in --out, or remove it."
        )
    return True


def write(directory: Path, kind: str, data: PreparedSets) -> list[str]:
    """Write the sets as `kind` (one of KINDS) into `directory`, whole or not at all; what there is to say of it, in lines.

    `directory` is empty or absent. Raises UserError where it cannot be written, and for "mlx" where mlx-lm has no format
    that gives it the same tokens.
    """
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with writing(directory):
            temporary.mkdir(parents=True)
            lines = _WRITERS[kind](temporary, directory, data)
            files = sorted(path for path in temporary.rglob("*") if path.is_file())
            digests = {str(path.relative_to(temporary)): _digest(path) for path in files}
            record = {"made_of": _made_of(kind, data), "from": data.identity.names, "versions": versions(), "files": digests}
            (temporary / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            for each in [*(path for path in temporary.iterdir() if path.is_dir()), temporary]:
                flush_tree(each)
            temporary.rename(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return lines


def record_batches(columns: TokenColumns) -> Iterator[pa.RecordBatch]:
    """The rows as Arrow's buffers, in the columns of SCHEMA; labels are -100 where nothing is learned, and not shifted.

    A batch has at most BLOCK_ROWS rows and, where it has more than one, BLOCK_TOKENS tokens.
    """
    blocks = [*_blocks(columns)]
    attended = np.ones(max((int(columns.offsets[stop] - columns.offsets[start]) for start, stop in blocks), default=0), np.int8)
    for start, stop in blocks:
        first, last = int(columns.offsets[start]), int(columns.offsets[stop])
        offsets = pa.array((columns.offsets[start : stop + 1] - first).astype(np.int32))
        flat = (columns.input_ids[first:last], attended[: last - first], columns.labels[first:last])
        lists = [pa.ListArray.from_arrays(offsets, pa.array(np.asarray(each))) for each in flat]
        yield pa.RecordBatch.from_arrays([pa.array(np.asarray(columns.rows[start:stop])), *lists], schema=SCHEMA)


def _blocks(columns: TokenColumns) -> Iterator[tuple[int, int]]:
    start, total = 0, len(columns)
    while start < total:
        fitting = int(np.searchsorted(columns.offsets, columns.offsets[start] + BLOCK_TOKENS, side="right")) - 1
        stop = min(max(fitting, start + 1), start + BLOCK_ROWS, total)
        yield start, stop
        start = stop


def _made_of(kind: str, data: PreparedSets) -> dict[str, Any]:
    return {"kind": kind, **data.identity.values}


def _digest(path: Path) -> str:
    """SHA-256 (hex) of a file; empty where it cannot be read."""
    try:
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError:
        return ""


def _counted(rows: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({count} row{'' if count == 1 else 's'})" for name, count in rows.items())


def _write_parquet(temporary: Path, directory: Path, data: PreparedSets) -> list[str]:
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    rows = {}
    for name, file in zip(SETS, FILES["parquet"], strict=True):
        with pq.ParquetWriter(temporary / file, SCHEMA, compression="zstd") as writer:
            for batch in record_batches(data.tokens[name]):
                writer.write_batch(batch)
        rows[file] = len(data.tokens[name])
    return [f"Wrote {directory}: {_counted(rows)}, with {', '.join(SCHEMA.names)}."]


def _write_hf(temporary: Path, directory: Path, data: PreparedSets) -> list[str]:
    import datasets
    from datasets.table import InMemoryTable

    sets = {}
    for name, split in zip(SETS, FILES["hf"], strict=True):
        columns = data.tokens[name]
        table = InMemoryTable(pa.Table.from_batches(record_batches(columns), SCHEMA))
        sets[split] = datasets.Dataset(table, fingerprint=columns.fingerprint()[:16])  # else it hashes a copy of the table
    shown = not datasets.utils.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        datasets.DatasetDict(sets).save_to_disk(temporary)
    finally:
        if shown:
            datasets.enable_progress_bars()
    rows = {split: len(each) for split, each in sets.items()}
    return [f"Wrote {directory}: {_counted(rows)}, with {', '.join(SCHEMA.names)}; datasets.load_from_disk reads it."]


def _write_mlx(temporary: Path, directory: Path, data: PreparedSets) -> list[str]:
    rows = _MlxRows(data)
    written, left_out = {}, []
    bar = Bar(sum(map(len, data.tokens.values())), "rows read as mlx-lm reads them")
    for name, file in zip(SETS, FILES["mlx"], strict=True):
        gone = _LeftOut(file)
        with (temporary / file).open("w", encoding="utf-8") as handle:
            for row, line, difference in rows.lines(data.tokens[name], data.conversations[name]):
                if difference:
                    gone.add(row, difference)
                else:
                    handle.write(line)
                bar.advance()
        written[file] = len(data.tokens[name]) - gone.count
        if not written[file]:
            raise UserError(
                f"--to mlx: mlx-lm would read every row of {file} otherwise than it is prepared. {gone.first}. "
                "Expected a chat template that writes a whole conversation as it writes prompt and reply; "
                "--to hf and --to parquet write the tokens themselves."
            )
        left_out += gone.lines()
    bar.close()
    wrote = f"Wrote {directory}: {_counted(written)}, as {'texts' if rows.as_text else 'chat rows'}."
    return [wrote, *left_out, *rows.notes(), "Train on it:", f"  {_mlx_command(directory, data, rows, min(written.values()))}"]


_WRITERS: Mapping[str, Callable[[Path, Path, PreparedSets], list[str]]] = {
    "mlx": _write_mlx,
    "hf": _write_hf,
    "parquet": _write_parquet,
}


def _used(columns: TokenColumns, conversations: Sequence[Conversation]) -> Iterator[tuple[int, Conversation]]:
    """Each row of the columns by its index, with its conversation; conversations of dropped rows are passed over."""
    index = 0
    for conversation in conversations:
        if index < len(columns) and conversation.row == columns.rows[index]:
            yield index, conversation
            index += 1
    assert index == len(columns), "the tokens are not those of the conversations, in their order"


@dataclass
class _LeftOut:
    """The rows that a file of mlx-lm's lacks, because mlx-lm would read them otherwise."""

    file: str
    count: int = 0
    named: list[int] = field(default_factory=list)
    first: str = ""

    def add(self, row: int, difference: str) -> None:
        self.count += 1
        self.named += [row] if self.count <= 10 else []
        self.first = self.first or f"Row {row}: {difference}"

    def lines(self) -> list[str]:
        if not self.count:
            return []
        more = f" and {self.count - 10} more" if self.count > 10 else ""
        rows = f"row{'s' if self.count > 1 else ''} {', '.join(map(str, self.named))}{more}"
        return [f"Left out of {self.file}, because mlx-lm would read them otherwise: {rows}. {self.first}."]


class _MlxReader:
    """mlx-lm's trainer as a reader of rows: a row's tokens and how many of them it masks, or why it refuses the row."""

    def __init__(self, model: Path, masks: bool) -> None:
        """Load the tokenizer as mlx-lm loads it."""
        from mlx_lm.utils import load_tokenizer

        self.tokenizer = load_tokenizer(str(model), {"trust_remote_code": False})
        self._masks = masks
        self._together: bool | None = None

    def read(self, rows: Sequence[Mapping[str, Any]]) -> list[_Read]:
        """The rows read: together, where that gives what mlx-lm's own code gives for the first of them, else by that code."""
        if self._together is None:
            some = rows[:COMPARED]
            self._together = self._many(some) == [self._one(row) for row in some]
        return self._many(rows) if self._together else [self._one(row) for row in rows]

    def _one(self, row: Mapping[str, Any]) -> _Read:
        from mlx_lm.tuner.datasets import create_dataset

        try:
            ids, masked = create_dataset([row], self.tokenizer, SimpleNamespace(mask_prompt=self._masks)).process(row)
        except _REFUSALS as error:
            return f"the chat template refuses it ({error})"
        return [*ids], masked

    def _many(self, rows: Sequence[Mapping[str, Any]]) -> list[_Read]:
        end = [self.tokenizer.eos_token_id]
        if "text" in rows[0]:
            texts = self._encoded([row["text"] for row in rows], add_special_tokens=True)
            return [(ids if ids[-1:] == end else ids + end, 0) for ids in texts]
        written = [self._written(row) for row in rows]
        texts = self._encoded([text for pair in written if not isinstance(pair, str) for text in pair], add_special_tokens=False)
        encoded = iter(texts)
        return [each if isinstance(each, str) else (next(encoded), len(next(encoded))) for each in written]

    def _written(self, row: Mapping[str, Any]) -> tuple[str, str] | str:
        """The whole conversation, and the prompt that is masked, as the chat template writes them; or why it refuses them."""
        messages, tools = row["messages"], row.get("tools")
        try:
            return self.rendered(messages, tools), self.rendered(messages[:-1], tools, True) if self._masks else ""
        except _REFUSALS as error:
            return f"the chat template refuses it ({error})"

    def rendered(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, prompt: bool = False) -> str:
        """The messages as the chat template writes them; as a `prompt`, up to where a reply begins."""
        given = {"tools": tools, "tokenize": False, "add_generation_prompt": prompt}
        return str(self.tokenizer.apply_chat_template([*map(dict, messages)], **given))

    def decoded(self, ids: Sequence[int]) -> str:
        """The text of some tokens, control tokens included."""
        return str(self.tokenizer.decode([*ids], skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _encoded(self, texts: list[str], *, add_special_tokens: bool) -> list[list[int]]:
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        return [each.ids for each in backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)]


class _MlxRows:
    """Rows in mlx-lm's formats, each read back: it must give the row's tokens, masked alike."""

    def __init__(self, data: PreparedSets) -> None:
        """Choose the format. Raises UserError where mlx-lm cannot mask what is masked here."""
        learned = data.settings.learned
        texts = learned.text_alone or not data.conversations["train"][0].prompt
        self.as_text = texts or data.own_template
        self.masks = not self.as_text and not learned.whole_prompt
        if data.own_template and not texts and not learned.whole_prompt:
            raise UserError(
                "--to mlx and prompt_format: mlx-lm writes chat rows with the tokenizer's own chat template alone, and in texts "
                "that are written already it cannot mask the prompt. Expected no prompt_format, or --mask-prompt false; "
                "--to hf and --to parquet write the tokens themselves."
            )
        self.tail: list[int] | None = None
        self.earlier_replies = self.longest = 0
        self._reader = _MlxReader(data.model, self.masks)
        self._added = self._reader.tokenizer.encode("")[:1]

    def lines(self, columns: TokenColumns, conversations: Sequence[Conversation]) -> Iterator[tuple[int, str, str]]:
        """Each row's number, its line, and how mlx-lm would read it otherwise than it is prepared; empty where it would not."""
        used = _used(columns, conversations)
        while some := [*itertools.islice(used, READ_TOGETHER)]:
            rows = [self._row(columns, index, conversation) for index, conversation in some]
            lines = [json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows]
            read = self._reader.read([json.loads(line) for line in lines])
            for (index, conversation), line, found in zip(some, lines, read, strict=True):
                yield conversation.row, line, found if isinstance(found, str) else self._difference(columns, index, *found)

    def notes(self) -> list[str]:
        """What mlx-lm reads, and what it does otherwise than the fit here."""
        notes = ["Every row was read back as mlx-lm reads it, and gives the tokens of this preparation."]
        if self.tail:
            notes.append(f"After each, the chat template writes {self._reader.decoded(self.tail)!r}, which mlx-lm learns, too.")
        notes.append("mlx-lm does otherwise:")
        if self.masks:
            notes.append("  without --mask-prompt it learns the prompt; with it, the last reply of a conversation alone")
        if self.earlier_replies:
            rows = f"{self.earlier_replies} row{'s' if self.earlier_replies > 1 else ''}"
            notes.append(f"  so it learns no earlier reply, which {rows} of these have; the same here is assistant_turns=last")
        return [*notes, "  it learns a padding token (id 0) after each row", "  it leaves out the last rows, which fill no batch"]

    def _row(self, columns: TokenColumns, index: int, conversation: Conversation) -> dict[str, Any]:
        if self.as_text:
            ids = columns.row_ids(index).tolist()
            return {"text": self._reader.decoded(ids[1:] if ids[:1] == self._added else ids)}
        prompt = self._shortened(columns, index, conversation) if columns.truncated[index] else conversation.prompt
        messages = [*map(dict, prompt), {"role": "assistant", "content": conversation.reply}]
        return {"messages": messages, **({"tools": [*conversation.tools]} if conversation.tools else {})}

    def _shortened(self, columns: TokenColumns, index: int, conversation: Conversation) -> tuple[Message, ...]:
        """The messages of a prompt that was cut to fit, found again from its tokens: later turns alone, or a text's end."""
        wanted, messages = self._reader.decoded(columns.prompt(index)), conversation.prompt
        tools = [*conversation.tools] or None
        users = [place for place, message in enumerate(messages) if message["role"] == "user"]
        for first in users[1:]:
            later = (*messages[: users[0]], *messages[first:])
            if self._reader.rendered(later, tools, prompt=True) == wanted:
                return later
        lead, last, after = messages[: users[0]], messages[users[-1]], messages[users[-1] + 1 :]
        marked = self._reader.rendered((*lead, {**last, "content": MARKER}, *after), tools, prompt=True)
        opening, _, ending = marked.partition(MARKER)
        kept = wanted[len(opening) : len(wanted) - len(ending)]
        return (*lead, {**last, "content": kept}, *after)

    def _difference(self, columns: TokenColumns, index: int, theirs: list[int], masked: int) -> str:
        """How a row that mlx-lm has read differs from the prepared one. One that does not counts for what is said of all."""
        ours, prompt = columns.row_ids(index).tolist(), int(columns.prompt_lengths[index])
        tail = theirs[len(ours) :]
        if theirs[: len(ours)] != ours or (tail and self.as_text) or self.tail not in (None, tail):
            same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False)))
            here, there = ([self._reader.decoded([each]) for each in ids[same : same + 5]] for ids in (ours, theirs))
            return f"from token {same + 1} on it is {here} here and {there} in mlx-lm"
        if self.masks and masked != prompt:
            return f"its reply begins after {prompt} tokens here and after {masked} in mlx-lm"
        if not self.masks and (columns.row_labels(index)[1:] == IGNORED).any():
            return "a part of it is masked here, and nothing in mlx-lm"
        self.tail = tail
        self.longest = max(self.longest, len(theirs))
        self.earlier_replies += bool(self.masks and (columns.row_labels(index)[:prompt] != IGNORED).any())
        return ""


def _mlx_command(directory: Path, data: PreparedSets, rows: _MlxRows, fewest: int) -> str:
    """The command that trains on `directory`, with what mlx-lm's defaults would refuse or cut."""
    words = ["python", "-m", "mlx_lm", "lora", "--model", str(data.model), "--train", "--data", str(directory)]
    words += ["--mask-prompt"] if rows.masks else []
    words += ["--batch-size", str(fewest)] if fewest < MLX_BATCH_SIZE else []
    words += ["--max-seq-length", str(rows.longest)] if rows.longest > MLX_MAX_SEQ_LENGTH else []
    return shlex.join(words)
