"""Rows encoded together are those encoded one by one, whatever stands in them."""

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from finetune_dataflow.engine import batch_encoding
from finetune_dataflow.engine.batch_encoding import BatchEncoder
from finetune_dataflow.engine.batches import epoch_order, in_order, padded_places
from finetune_dataflow.engine.chat import ChatEncoder, Conversation, encode_conversations, load_encoder
from finetune_dataflow.engine.content import Conversations, conversations
from finetune_dataflow.engine.layouts import Layout, layout
from finetune_dataflow.engine.ledger import row_ledger
from finetune_dataflow.engine.records import each_record, fingerprint
from finetune_dataflow.engine.settings import Learned, PromptSettings
from finetune_dataflow.engine.tokens import DroppedRow, EncodedRow, TokenColumns, joined, token_columns
from finetune_dataflow.errors import UserError
from tests.test_chat import with_bos
from tests.tiny_model import CHATML, write_tiny_model

LEARNED = (Learned(), Learned(every_turn=True), Learned(whole_prompt=True), Learned(text_alone=True))
DEFAULT_SYSTEM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRIMMED = CHATML.replace("message['content']", "(message['content'] | trim)")
THINKING = (
    "{% for m in messages %}{% set text = m['content'] %}{% if '</think>' in text and not loop.last %}"
    "{% set text = text.split('</think>')[-1] %}{% endif %}<|im_start|>{{ m['role'] }}\n{{ text }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
FIRST_DIFFERS = (
    "{% for m in messages %}{{ m['role'] }}: {% if m['content'] == 'a' %}A!{% else %}{{ m['content'] }}{% endif %}"
    "<|im_end|>{% endfor %}"
)
LAST_DIFFERS = "{% for m in messages %}{% if loop.last %}now: {% endif %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
WITHOUT_CONTROLS = "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n{% endfor %}### assistant:\n"
JSON = "{% for m in messages %}{{ m['content'] | tojson }}<|im_end|>{% endfor %}"
MACRO = "{% macro said(m) %}{{ m['content'] }}{% endmacro %}{% for m in messages %}{{ said(m) }}<|im_end|>{% endfor %}"
TEMPLATES = {
    "chatml": CHATML, "a system prompt of its own": DEFAULT_SYSTEM, "trims": TRIMMED, "looks for thinking": THINKING,
    "compares": FIRST_DIFFERS, "the last otherwise": LAST_DIFFERS, "no control strings": WITHOUT_CONTROLS, "as JSON": JSON,
    "a macro": MACRO,
}  # fmt: skip
PIECES = (
    "a", " ", "\n", "word", " two words", "<|im_end|>", "<|im_start|>", "<|im_", "end|>", "<|endoftext|>", "é", "日本",
    "\U0001d54f",
    "\u200b", "\r\n", "\t", "</think>", "{{ x }}", "{", "'", '"', "\\", "\ue000", "\uf8f00\uf8f1", "0", "12345", "İ", "\u2028",
)  # fmt: skip


def text(draw: random.Random) -> str:
    return "".join(draw.choices(PIECES, k=draw.choice((0, 1, 1, 2, 3, 8))))


def hostile_conversations(count: int, seed: int) -> list[Conversation]:
    """Prompts of one to five messages, some without any, every piece of text that has ever done harm in them."""
    draw = random.Random(seed)
    made = []
    for row in range(1, count + 1):
        turns: list[dict[str, Any]] = [{"role": "system", "content": text(draw)}] if draw.random() < 0.3 else []
        for _ in range(draw.choice((0, 0, 0, 1, 2))):
            turns += [{"role": "user", "content": text(draw)}, {"role": "assistant", "content": text(draw)}]
        turns.append({"role": "user", "content": text(draw)})
        if draw.random() < 0.05:
            turns = []
        elif draw.random() < 0.05:
            turns[-1]["name"] = "a key more"
        made.append(Conversation(row, tuple(turns), text(draw)))
    return made


def encoder_of(directory: Path, name: str) -> ChatEncoder:
    return load_encoder(write_tiny_model(directory / "model", template=TEMPLATES[name]))


@pytest.mark.parametrize("learned", LEARNED, ids=repr)
@pytest.mark.parametrize("name", TEMPLATES)
def test_rows_encoded_together_are_those_encoded_one_by_one(
    name: str, learned: Learned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_encoding, "CHUNK", 50)
    encoder, given = encoder_of(tmp_path, name), hostile_conversations(160, seed=len(name))
    assert [*BatchEncoder(encoder, learned).encoded(given)] == [encoder.encode(each, learned) for each in given]


@pytest.mark.parametrize(("name", "proved"), [
    ("chatml", True), ("a system prompt of its own", True), ("trims", True), ("no control strings", True),
    ("the last otherwise", True), ("looks for thinking", False), ("compares", False), ("as JSON", False), ("a macro", False),
])  # fmt: skip
def test_a_template_that_looks_into_texts_has_no_layout(name: str, proved: bool, tmp_path: Path) -> None:
    encoder = encoder_of(tmp_path, name)

    def rendered(contents: Sequence[str]) -> str:
        return encoder.rendered([{"role": "user", "content": contents[0]}])

    found = layout(TEMPLATES[name], ["user"], encoder.tokenizer.special_tokens_map, rendered)
    assert (found is not None) is proved


def test_a_layout_is_what_the_template_writes_around_the_texts(tmp_path: Path) -> None:
    encoder = encoder_of(tmp_path, "trims")

    def rendered(contents: Sequence[str]) -> str:
        return encoder.rendered([{"role": "user", "content": contents[0]}])

    found = layout(TRIMMED, ["user"], {}, rendered)
    assert found == Layout(("<|im_start|>user\n", 0, "<|im_end|>\n<|im_start|>assistant\n"), frozenset({0}))
    assert found.text(["  a "]) == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("template", ["{% for m in messages %}{{ m['content'] }}{% endfor %}", "{{ bos_token }}" + CHATML])
def test_a_beginning_of_sequence_is_the_same_together(template: str, tmp_path: Path) -> None:
    encoder = load_encoder(with_bos(write_tiny_model(tmp_path / "model")), template)
    given = hostile_conversations(120, seed=5)
    for learned in LEARNED:
        assert [*BatchEncoder(encoder, learned).encoded(given)] == [encoder.encode(each, learned) for each in given]


def merging_tokenizer(directory: Path, pre_tokenizer: dict[str, Any] | None, normalizer: dict[str, Any] | None) -> Path:
    """The tiny model's tokenizer with merges over words and borders, and another treatment of text."""
    write_tiny_model(directory)
    path = directory / "tokenizer.json"
    settings = json.loads(path.read_text())
    vocabulary = settings["model"]["vocab"]
    merges: list[list[str]] = []
    for left, right in (("e", "r"), ("Ċ", "a"), ("Ċ", "w"), ("w", "o"), ("wo", "r"), ("s", "e"), ("a", "a")):
        vocabulary[left + right] = 300 + len(merges)
        merges.append([left, right])
    settings["model"]["merges"] = merges
    settings["pre_tokenizer"] = pre_tokenizer or settings["pre_tokenizer"]
    settings["normalizer"] = normalizer
    path.write_text(json.dumps(settings))
    return directory


@pytest.mark.parametrize(("pre_tokenizer", "normalizer"), [
    (None, None),
    ({"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": False}, None),
    ({"type": "Metaspace", "replacement": "Ġ", "prepend_scheme": "first", "split": False}, None),
    (None, {"type": "Lowercase"}),
    (None, {"type": "Prepend", "prepend": "a"}),
])  # fmt: skip
def test_tokens_that_reach_over_words_are_the_same_together(
    pre_tokenizer: dict[str, Any] | None, normalizer: dict[str, Any] | None, tmp_path: Path
) -> None:
    encoder = load_encoder(merging_tokenizer(tmp_path / "model", pre_tokenizer, normalizer))
    given = hostile_conversations(120, seed=9)
    for learned in LEARNED:
        assert [*BatchEncoder(encoder, learned).encoded(given)] == [encoder.encode(each, learned) for each in given]


def test_a_token_over_the_border_of_prompt_and_reply_is_noticed(tmp_path: Path) -> None:
    encoder = load_encoder(merging_tokenizer(tmp_path / "model", {"type": "ByteLevel", "add_prefix_space": False,
                                                                  "trim_offsets": True, "use_regex": False}, None))  # fmt: skip
    given = [Conversation(n, ({"role": "user", "content": "Hi"},), reply) for n, reply in enumerate(("a", "b", "wo", " a"), 1)]
    together = [row.joint_differs for row in BatchEncoder(encoder, Learned()).encoded(given)]
    assert together == [True, False, True, False]


@pytest.mark.parametrize("long_rows", ["truncate_prompt", "drop"])
def test_long_rows_are_cut_or_dropped_as_one_by_one(long_rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, given = encoder_of(tmp_path, "a system prompt of its own"), hostile_conversations(300, seed=3)
    together = encode_conversations(encoder, given, 90, long_rows, Learned(every_turn=True))
    monkeypatch.setattr(
        BatchEncoder, "encoded", lambda self, rows: (encoder.encode(each, Learned(every_turn=True)) for each in rows)
    )
    plain = encode_conversations(encoder, given, 90, long_rows, Learned(every_turn=True))
    assert together.fingerprint() == plain.fingerprint() and len(together) > 100 and len(together.dropped) > 5
    assert together.joint_differs.tolist() == plain.joint_differs.tolist()
    assert together.skipped_turns.tolist() == plain.skipped_turns.tolist()


def test_long_rows_are_all_named_where_they_are_an_error(tmp_path: Path) -> None:
    given = [Conversation(n, ({"role": "user", "content": "x" * n},), "y") for n in range(1, 41)]
    with pytest.raises(UserError, match=r"row 28 \(49\), .* and 3 more"):
        encode_conversations(encoder_of(tmp_path, "chatml"), given, 48, "error")


def table(count: int) -> pd.DataFrame:
    columns = {"row": range(11, count + 11), "input_text": [f"q{n}" for n in range(count)], "output_text": ["r"] * count}
    return pd.DataFrame({**columns, "contexts": [("c",) if n % 3 == 0 else () for n in range(count)]})


def test_conversations_are_made_when_asked_for_and_are_those_of_the_records() -> None:
    settings = PromptSettings(system_prompt="s", input_template="<{input}>")
    lazy, made = Conversations(table(10), settings), conversations(each_record(table(10)), settings)
    assert len(lazy) == 10 and [*lazy] == made and lazy[2:9:3] == made[2:9:3]
    assert (lazy[0], lazy[9], lazy[-1], lazy[-10]) == (made[0], made[9], made[9], made[0])
    assert lazy.row_numbers.tolist() == list(range(11, 21))
    with pytest.raises(IndexError):
        lazy[10]


def test_the_fingerprint_of_conversations_goes_by_rows_and_settings() -> None:
    plain = Conversations(table(10), PromptSettings()).fingerprint()
    assert plain == Conversations(table(10), PromptSettings()).fingerprint()
    changed = table(10)
    changed.loc[9, "output_text"] = "other"
    assert plain != Conversations(changed, PromptSettings()).fingerprint()
    assert plain != Conversations(table(10), PromptSettings(system_prompt="s")).fingerprint()
    assert plain != Conversations(table(9), PromptSettings()).fingerprint()


def test_the_fingerprint_of_records_is_that_of_one_json_list(monkeypatch: pytest.MonkeyPatch) -> None:
    from hashlib import sha256

    monkeypatch.setattr("finetune_dataflow.engine.records.CHUNK", 3)
    monkeypatch.setattr("finetune_dataflow.engine.many_rows.CHUNK", 4)
    rows = table(10)[["input_text", "output_text", "contexts"]].to_numpy().tolist()
    expected = sha256(json.dumps(rows, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
    assert fingerprint(table(10)) == expected


def random_columns(count: int, seed: int = 0) -> TokenColumns:
    lengths = np.random.default_rng(seed).integers(3, 60, count).tolist()
    return token_columns([EncodedRow(n, [1, 2], list(range(3, length + 1))) for n, length in enumerate(lengths, 1)])


def test_parts_joined_are_the_whole() -> None:
    rows = [EncodedRow(n, [n] * n, [5], prompt_labels=[n] * n if n % 2 else None, skipped_turns=n) for n in range(1, 12)]
    parts = [token_columns(rows[:4], [DroppedRow(99, "a")]), token_columns([]), token_columns(rows[4:], [DroppedRow(98, "b")])]
    whole = token_columns(rows, [DroppedRow(99, "a"), DroppedRow(98, "b")])
    assert joined(parts).fingerprint() == whole.fingerprint()
    assert joined(parts).skipped_turns.tolist() == whole.skipped_turns.tolist() == list(range(1, 12))
    assert len(joined([])) == 0


def test_supervised_tokens_are_counted_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune_dataflow.engine.tokens.PART", 3)
    columns = token_columns([EncodedRow(n, [7] * n, [8] * (n % 4)) for n in range(1, 9)])
    assert columns.row_supervised.tolist() == [1, 2, 3, 0, 1, 2, 3, 0] and columns.supervised == 12


def test_rows_are_taken_in_the_order_asked_for() -> None:
    columns = random_columns(9)
    taken = columns.take([7, 0, 7])
    assert [taken.row_ids(n).tolist() for n in range(3)] == [columns.row_ids(n).tolist() for n in (7, 0, 7)]
    assert taken.rows.tolist() == [8, 1, 8] and len(columns.take([])) == 0


def plain_order(lengths: Sequence[int], batch_size: int, random_state: int, epoch: int) -> list[list[int]]:
    """The order as it has been from the first version on; runs that were interrupted go on by it."""
    generator = np.random.default_rng([random_state, epoch])
    shuffled = generator.permutation(len(lengths)).tolist()
    windows = [shuffled[start : start + 16 * batch_size] for start in range(0, len(shuffled), 16 * batch_size)]
    by_length = [index for window in windows for index in sorted(window, key=lambda each: lengths[each])]
    cut = [by_length[start : start + batch_size] for start in range(0, len(by_length), batch_size)]
    return [cut[place] for place in generator.permutation(len(cut))]


@pytest.mark.parametrize("count", [1, 5, 64, 1000])
def test_the_order_of_an_epoch_is_what_it_has_always_been(count: int) -> None:
    columns = random_columns(count)
    for batch_size, epoch in ((1, 0), (4, 0), (4, 3), (33, 1)):
        assert epoch_order(columns, batch_size, 42, epoch) == plain_order(columns.lengths.tolist(), batch_size, 42, epoch)


@pytest.mark.parametrize(("count", "batch_size"), [(1, 4), (7, 4), (8, 4), (500, 3)])
def test_the_padding_is_counted_without_making_the_batches(count: int, batch_size: int) -> None:
    columns = random_columns(count)
    assert padded_places(columns, batch_size) == sum(each.inputs.size for each in in_order(columns, batch_size))


def test_the_ledger_names_each_row_once_with_what_became_of_it() -> None:
    tokens = {
        name: token_columns([EncodedRow(n, [1] * n, [2]) for n in rows]) for name, rows in (("train", (3, 1)), ("hold_out", (5,)))
    }
    tokens["train"] = replace(tokens["train"], dropped=(DroppedRow(4, "too_long"),))
    sets = {"train": (pd.Series([3, 1, 4]), tokens["train"]), "hold_out": (pd.Series([5]), tokens["hold_out"])}
    sides = pd.Series(["train", "validation", "train", "train", "hold_out", "train"])
    ledger = row_ledger(
        pd.Series([1, 2, 3, 4, 5, 6]), sides, [DroppedRow(2, "near"), DroppedRow(9, "empty_row")], {5: ["a", "b"]}, sets
    )
    assert ledger.to_numpy().tolist() == [
        [1, "train", "used", "", False, 1, 1, ""],
        [2, "validation", "dropped", "near", False, 0, 0, ""],
        [3, "train", "used", "", False, 3, 1, ""],
        [4, "train", "dropped", "too_long", False, 0, 0, ""],
        [5, "hold_out", "used", "", False, 5, 1, "a, b"],
        [6, "", "dropped", "in_no_set", False, 0, 0, ""],
        [9, "", "dropped", "empty_row", False, 0, 0, ""],
    ]
    with pytest.raises(AssertionError, match="rows_in=6 but used=4"):
        row_ledger(pd.Series([1, 3, 4, 5, 6, 7]), sides, [], {}, {**sets, "again": sets["hold_out"]})
