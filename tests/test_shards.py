"""Token columns as files: whole or not there, whatever happens while they are written."""

import errno
import multiprocessing
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from finetune_dataflow.engine import content, shards
from finetune_dataflow.engine.batches import batch, epoch_order, widths
from finetune_dataflow.engine.settings import PromptSettings, TokenizationSettings
from finetune_dataflow.engine.tokens import DroppedRow, EncodedRow, TokenColumns, joined, token_columns
from finetune_dataflow.errors import UserError
from finetune_dataflow.tokenization import set_tokens

FIELDS = ("rows", "offsets", "input_ids", "labels", "prompt_lengths", "truncated", "joint_differs", "skipped_turns", "dropped")


def part(first: int, count: int) -> TokenColumns:
    rows = [EncodedRow(n, [n] * (n % 5 + 1), [n, 7], truncated=n % 3 == 0, skipped_turns=n) for n in range(first, first + count)]
    return token_columns(rows, [DroppedRow(1000 + first, "too_long")])


PARTS = (part(1, 7), part(8, 1), token_columns([]), part(9, 20))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache directory of one test."""
    monkeypatch.setenv("FINETUNE_DATAFLOW_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def assert_same(found: TokenColumns, expected: TokenColumns) -> None:
    for name in FIELDS:
        one, other = getattr(found, name), getattr(expected, name)
        assert list(one) == list(other), name
        assert name == "dropped" or one.dtype == other.dtype
    assert found.fingerprint() == expected.fingerprint() == found.content_hash


def test_columns_written_and_read_are_the_same(tmp_path: Path) -> None:
    found = shards.write(tmp_path / "columns", PARTS)
    assert_same(found, joined(PARTS))
    assert_same(shards.opened(tmp_path / "columns"), joined(PARTS))
    shards.check_contents(tmp_path / "columns")
    assert [path.name for path in tmp_path.iterdir()] == ["columns"]


@pytest.mark.parametrize("parts", [(), (token_columns([]),), (token_columns([], [DroppedRow(3, "x")]),)])
def test_columns_without_rows_can_be_kept_too(parts: tuple[TokenColumns, ...], tmp_path: Path) -> None:
    assert_same(shards.write(tmp_path / "columns", parts), joined(parts))


def test_tokens_are_read_only_memory_maps(tmp_path: Path) -> None:
    found = shards.write(tmp_path / "columns", PARTS)
    assert found.stored is not None and len(found.stored.maps) == 2
    with pytest.raises(ValueError, match="read-only"):
        found.input_ids[0] = 1


def test_batches_from_files_are_those_from_memory_after_memory_was_released(tmp_path: Path) -> None:
    found, expected = shards.write(tmp_path / "columns", PARTS), joined(PARTS)
    ladder = widths(expected.lengths)
    assert epoch_order(found, 4, 1, 0) == epoch_order(expected, 4, 1, 0)
    for indices in epoch_order(expected, 4, 1, 0):
        one, other = batch(found, indices, 4, ladder), batch(expected, indices, 4, ladder)
        found.release()
        assert np.array_equal(one.inputs, other.inputs) and np.array_equal(one.targets, other.targets)


def test_pickled_columns_name_their_files_or_hold_what_is_in_memory(tmp_path: Path) -> None:
    found = shards.write(tmp_path / "columns", PARTS)
    pickled = pickle.dumps(found)
    assert b"columns" in pickled and len(pickled) < 300
    assert_same(pickle.loads(pickled), joined(PARTS))
    assert_same(pickle.loads(pickle.dumps(joined(PARTS))), joined(PARTS))
    shutil.rmtree(tmp_path / "columns")
    with pytest.raises(shards.DamagedError):
        pickle.loads(pickled)


def test_a_second_call_reads_what_the_first_has_made(cache: Path) -> None:
    first = shards.prepared(["rows", 1], lambda: PARTS)
    again = shards.prepared(["rows", 1], lambda: pytest.fail("made again"))
    other = shards.prepared(["rows", 2], lambda: PARTS[:1])
    assert_same(first, joined(PARTS))
    assert_same(again, joined(PARTS))
    assert_same(other, PARTS[0])


def cut(directory: Path) -> None:
    path = directory / "labels.bin"
    path.write_bytes(path.read_bytes()[:-4])


def lengthen(directory: Path) -> None:
    with (directory / "input_ids.bin").open("ab") as handle:
        handle.write(b"\0\0\0\0")


@pytest.mark.parametrize("damage", [
    cut,
    lengthen,
    lambda directory: (directory / "rows.bin").unlink(),
    lambda directory: (directory / "manifest.json").unlink(),
    lambda directory: (directory / "manifest.json").write_text('{"format": 1'),
    lambda directory: (directory / "manifest.json").write_text('{"format": 1}'),
    lambda directory: (directory / "manifest.json").write_text("[]"),
    lambda directory: (directory / "offsets.bin").write_bytes(bytes((directory / "offsets.bin").stat().st_size)),
])  # fmt: skip
def test_damaged_columns_are_made_again_and_that_is_said(damage: Any, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = shards.prepared("rows", lambda: PARTS)
    assert found.stored is not None
    damage(found.stored.directory)
    assert_same(shards.prepared("rows", lambda: PARTS), joined(PARTS))
    assert "are damaged" in caplog.text and "made again" in caplog.text
    assert_same(shards.prepared("rows", lambda: pytest.fail("made again")), joined(PARTS))


def test_a_changed_byte_is_found_where_contents_are_checked(tmp_path: Path) -> None:
    shards.write(tmp_path / "columns", PARTS)
    path = tmp_path / "columns" / "labels.bin"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(shards.DamagedError, match=r"shard 3 of labels\.bin"):
        shards.check_contents(tmp_path / "columns")


def test_a_full_disk_is_told_and_leaves_nothing_behind(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(shards, "_write_shard", full)
        with pytest.raises(UserError, match=r"tokens: No space left on device\. Make room .* FINETUNE_DATAFLOW_CACHE"):
            shards.prepared("rows", lambda: PARTS)
    assert [path.suffix for path in (cache / "tokens").iterdir()] == [".lock"]
    assert_same(shards.prepared("rows", lambda: PARTS), joined(PARTS))


def test_a_mistake_found_while_rows_are_encoded_leaves_nothing_behind(cache: Path) -> None:
    def parts() -> Iterator[TokenColumns]:
        yield PARTS[0]
        raise UserError("row 9 is too long")

    with pytest.raises(UserError, match="row 9 is too long"):
        shards.prepared("rows", parts)
    assert [path.suffix for path in (cache / "tokens").iterdir()] == [".lock"]


def test_what_a_killed_process_left_is_removed(cache: Path) -> None:
    made = shards.prepared("rows", lambda: PARTS)
    assert made.stored is not None
    directory = made.stored.directory
    left = directory.with_name(f".{directory.name}.123")
    directory.rename(left)
    assert_same(shards.prepared("rows", lambda: PARTS), joined(PARTS))
    assert not left.exists()


def prepare_and_tell(answers: Any, ready: Any, cache: str) -> None:
    os.environ["FINETUNE_DATAFLOW_CACHE"] = cache

    def parts() -> Iterator[TokenColumns]:
        answers.put("made")
        yield from PARTS

    ready.wait()
    answers.put(shards.prepared("rows", parts).fingerprint())


def test_two_processes_that_prepare_the_same_rows_make_them_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    answers, ready = context.Queue(), context.Barrier(2)
    processes = [context.Process(target=prepare_and_tell, args=(answers, ready, str(tmp_path))) for _ in range(2)]
    for each in processes:
        each.start()
    said = [answers.get(timeout=60) for _ in range(3)]
    for each in processes:
        each.join()
    assert sorted(said) == sorted(["made", joined(PARTS).fingerprint(), joined(PARTS).fingerprint()])


def test_the_longest_unused_columns_are_removed_where_there_are_too_many(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [shards.prepared(n, lambda: PARTS).stored for n in range(3)]
    directories = [each.directory for each in found if each is not None]
    for age, directory in zip((10, 30, 20), directories, strict=True):
        os.utime(directory, (1e9 - age, 1e9 - age))
    size = sum(each.stat().st_size for each in directories[0].iterdir())
    monkeypatch.setattr(shards, "MOST_BYTES", int(2.5 * size))
    fourth = shards.prepared(4, lambda: PARTS).stored
    assert fourth is not None and fourth.directory.exists()
    assert [each.exists() for each in directories] == [True, False, False]


def test_many_rows_become_files_and_few_stay_in_memory_with_the_same_tokens(
    tiny_model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"question {n}" for n in range(300)]
    rows = pd.DataFrame({"row": range(1, 301), "input_text": texts, "output_text": [f"reply {n}" for n in range(300)]})
    given = content.Conversations(rows, PromptSettings())
    settings = TokenizationSettings(60, "truncate_prompt")
    tokens = set_tokens(given, tiny_model, "", settings)
    assert tokens.stored is None and not cache.exists()
    monkeypatch.setattr(shards, "FEWEST_ROWS", 300)
    stored = set_tokens(given, tiny_model, "", settings)
    assert stored.stored is not None
    assert_same(stored, tokens)
    other = set_tokens(given, tiny_model, "", TokenizationSettings(40, "truncate_prompt"))
    assert other.stored is not None and other.stored.directory != stored.stored.directory
    assert other.truncated.any()
