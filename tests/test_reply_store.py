import errno
import hashlib
import json
import logging
import os
import resource
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from finetune_dataflow.engine import reply_store
from finetune_dataflow.engine.reply_store import Reply, ReplyStore, prompt_hash, prune

REPOSITORY = Path(__file__).parents[1]
KEY = {"base_model": "b", "adapter": "", "stop_ids": [258], "decoding": {"max_tokens": 8}}
ONE_TWO_THREE = "e2e2033ae7e19d680599d4eb0a1359a2b48ec5baac75066c317fbf85159c54ef"  # SHA-256 of 1, 2, 3 in eight bytes each
ENDED, CUT = Reply((7, 0, 319), True), Reply((), False)


def written(directory: Path, count: int = 3) -> Path:
    """The file of a store with the replies (0,), (1,), … to the prompts [0], [1], …"""
    with ReplyStore.opened(directory, KEY) as store:
        for number in range(count):
            store.add([number], Reply((number,), True))
    return store.path


def numbers_known(directory: Path, count: int = 10) -> list[int]:
    """Which of the prompts [0], [1], … have their reply in the store."""
    with ReplyStore.opened(directory, KEY) as store:
        return [number for number in range(count) if store.get([number]) == Reply((number,), True)]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def in_another_process(code: str, *arguments: object) -> subprocess.Popen[bytes]:
    """Python that has opened a store in the directory given first, as `store`."""
    setup = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        "from finetune_dataflow.engine.reply_store import Reply, ReplyStore\n"
        f"store = ReplyStore.opened(Path(sys.argv[1]), {KEY!r})\n"
    )
    command = [sys.executable, "-c", setup + code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def test_a_line_holds_the_hash_of_the_prompt_the_tokens_and_how_the_reply_ended(tmp_path: Path) -> None:
    with ReplyStore.opened(tmp_path, KEY) as store:
        store.add([1, 2, 3], ENDED)
        store.add([1, 2, 3], CUT, occurrence=2)
    assert store.path.read_text() == (
        f'{{"prompt": "{ONE_TWO_THREE}", "token_ids": [7, 0, 319], "ended": true}}\n'
        f'{{"prompt": "{ONE_TWO_THREE}", "occurrence": 2, "token_ids": [], "ended": false}}\n'
    )


def test_a_reply_is_on_the_disk_before_the_store_is_closed(tmp_path: Path) -> None:
    store = ReplyStore.opened(tmp_path, KEY)
    store.add([1, 2, 3], ENDED)
    assert store.path.read_bytes().count(b"\n") == 1
    store.close()


def test_the_hash_is_of_the_tokens_whatever_holds_them() -> None:
    assert hashlib.sha256(struct.pack("<3q", 1, 2, 3)).hexdigest() == ONE_TWO_THREE
    kinds = [[1, 2, 3], (1, 2, 3), np.array([1, 2, 3], np.int32), np.array([1, 2, 3], np.uint32)]
    assert [prompt_hash(each) for each in kinds] == [ONE_TWO_THREE] * 4  # type: ignore[arg-type]
    assert len({prompt_hash(each) for each in ([1, 2], [2, 1], [12], [1, 2, 0], [2**31, 1])}) == 5


def test_a_store_that_is_opened_again_has_its_replies(tmp_path: Path) -> None:
    with ReplyStore.opened(tmp_path / "made" / "here", KEY) as store:
        assert store.get([1, 2, 3]) is None
        store.add([1, 2, 3], ENDED)
        store.add([1, 2, 3], CUT, occurrence=1)
        assert (store.get([1, 2, 3]), store.get([1, 2, 3], 1), len(store)) == (ENDED, CUT, 2)
    with ReplyStore.opened(tmp_path / "made" / "here", KEY) as store:
        assert (store.get([1, 2, 3]), store.get([1, 2, 3], 1), len(store)) == (ENDED, CUT, 2)
        assert (store.get([1, 2, 3], 2), store.get([1, 2])) == (None, None)
    assert [(reply.hit_limit, reply.ended) for reply in (ENDED, CUT)] == [(False, True), (True, False)]


def test_every_part_of_the_key_names_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def name(parts: dict[str, object]) -> str:
        with ReplyStore.opened(tmp_path, parts) as store:
            return store.path.name

    first = name(dict(KEY))
    assert name(dict(reversed(KEY.items()))) == first and len(first) == 64 + len(".jsonl")
    changes: list[dict[str, object]] = [{"adapter": "a"}, {"stop_ids": []}, {"decoding": {"max_tokens": 9}}]
    names = [name({**KEY, **change}) for change in changes]
    monkeypatch.setattr(reply_store.importlib.metadata, "version", lambda package: f"{package} of tomorrow")
    names.append(name(dict(KEY)))
    monkeypatch.setattr(reply_store, "FORMAT", 2)
    names.append(name(dict(KEY)))
    assert len({first, *names}) == 6


@pytest.mark.parametrize("left", [1, 20, 90, -1])
def test_a_last_line_that_was_cut_is_not_read_and_cut_off(tmp_path: Path, left: int, caplog: pytest.LogCaptureFixture) -> None:
    path = written(tmp_path)
    whole = path.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    path.write_bytes(whole[: last + left] if left > 0 else whole[:left])
    assert numbers_known(tmp_path) == [0, 1]
    assert path.read_bytes() == whole[:last]
    written(tmp_path, 4)
    assert numbers_known(tmp_path) == [0, 1, 2, 3]
    assert warnings(caplog) == []


@pytest.mark.parametrize("before", [0, 1])
def test_what_another_process_left_half_written_meanwhile_does_not_spoil_the_next_line(tmp_path: Path, before: int) -> None:
    path = written(tmp_path, before)
    with ReplyStore.opened(tmp_path, KEY) as store:
        with path.open("ab") as file:
            file.write(b'{"prompt": "' + b"0" * 40)
        store.add([7], Reply((7,), True))
    assert numbers_known(tmp_path) == [*range(before), 7]
    assert [json.loads(line)["token_ids"] for line in path.read_text().splitlines()] == [[n] for n in [*range(before), 7]]


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b"\x00\x00\x00",
        b"\xff\xfe{}",
        b"[1]",
        b"[" * 100_000,
        b'{"token_ids": [1], "ended": true}',
        b'{"prompt": "short", "token_ids": [1], "ended": true}',
        *(
            f'{{"prompt": "{prompt_hash([9])}", {rest}}}'.encode()
            for rest in (
                '"token_ids": [1]',
                '"ended": true',
                '"token_ids": [1], "ended": 1',
                '"token_ids": [1.0], "ended": true',
                '"token_ids": [true], "ended": true',
                '"token_ids": [-1], "ended": true',
                '"token_ids": [2147483648], "ended": true',
                '"token_ids": "12", "ended": true',
                '"token_ids": [1], "ended": true, "occurrence": null',
                '"token_ids": [1], "ended": true, "occurrence": -1',
            )
        ),
    ],
)
def test_damaged_lines_are_passed_over_with_a_warning_that_names_the_file(
    tmp_path: Path, damaged: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = written(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + damaged + b"\n" + lines[1] + damaged + b"\n" + lines[2])
    with ReplyStore.opened(tmp_path, KEY) as store:
        assert len(store) == 3 and store.get([2]) == Reply((2,), True)
    assert warnings(caplog) == [f"{path}: 2 of its lines are damaged (the first is line 2); their replies are generated again."]


def test_two_processes_that_append_at_the_same_time_leave_whole_lines(tmp_path: Path) -> None:
    path = written(tmp_path, 0)
    code = (
        "print('ready', flush=True)\nsys.stdin.read()\n"
        "for number in range(int(sys.argv[2]), 400, 2):\n"
        "    store.add([number // 4], Reply(tuple(range(number, number + 3000)), True), number % 4)\n"
    )
    with in_another_process(code, tmp_path, 0) as one, in_another_process(code, tmp_path, 1) as other:
        assert [each.stdout.readline() for each in (one, other) if each.stdout] == [b"ready\n"] * 2
        for each in (one, other):
            if each.stdin:
                each.stdin.close()
        assert [each.wait(60) for each in (one, other)] == [0, 0]
    assert len(path.read_bytes().splitlines()) == 400
    with ReplyStore.opened(tmp_path, KEY) as store:
        found = [store.get([number // 4], number % 4) for number in range(400)]
    assert found == [Reply(tuple(range(number, number + 3000)), True) for number in range(400)]


def test_the_same_reply_from_two_processes_is_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with ReplyStore.opened(tmp_path, KEY) as one, ReplyStore.opened(tmp_path, KEY) as other:
        for store in (one, other):
            store.add([0], Reply((0,), True))
            store.add([1], Reply((1,), True))
    assert one.path.read_bytes().count(b"\n") == 4
    assert numbers_known(tmp_path) == [0, 1] and warnings(caplog) == []


def test_replies_of_a_killed_process_are_there(tmp_path: Path) -> None:
    code = "for number in range(3):\n    store.add([number], Reply((number,), True))\nos.kill(os.getpid(), signal.SIGKILL)\n"
    with in_another_process(code, tmp_path) as process:
        assert process.wait(60) == -9
    assert numbers_known(tmp_path) == [0, 1, 2]


@contextmanager
def room(size: int) -> Iterator[None]:
    """No file may grow beyond so many bytes: as with a full disk, a write may be cut short."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_warning_and_no_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    line = len(written(tmp_path / "measured", 1).read_bytes())
    with ReplyStore.opened(tmp_path, KEY) as store:
        with room(2 * line + line // 2):
            for number in range(5):
                store.add([number], Reply((number,), True))
        assert [store.get([number]) for number in range(5)] == [Reply((number,), True) for number in range(5)]
    assert store.path.stat().st_size == 2 * line
    assert warnings(caplog) == [f"{store.path} cannot be written (No space left on device). Later replies are not kept."]
    assert numbers_known(tmp_path) == [0, 1]


def test_a_failing_write_is_one_warning_and_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(reply_store, "_append", failing)
    with ReplyStore.opened(tmp_path, KEY) as store:
        store.add([1], ENDED)
        store.add([2], CUT)
    assert (store.get([1]), store.get([2])) == (ENDED, CUT)
    assert warnings(caplog) == [f"{store.path} cannot be written (Input/output error). Later replies are not kept."]


def test_a_directory_that_cannot_be_used_is_a_warning_and_no_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("mine")
    with ReplyStore.opened(tmp_path / "file" / "replies", KEY) as store:
        store.add([1], ENDED)
        assert store.get([1]) == ENDED
    assert warnings(caplog) == [f"{store.path} cannot be used (Not a directory). Replies are not kept for later runs."]
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("kind", ["symbolic link", "hard link", "named pipe", "directory", "another user's"])
def test_nothing_is_written_through_a_link_or_to_what_is_no_file_of_the_user(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = written(tmp_path / "replies", 0)
    mine = tmp_path / "mine"
    mine.write_text("untouched")
    path.unlink()
    match kind:
        case "symbolic link":
            path.symlink_to(mine)
        case "hard link":
            path.hardlink_to(mine)
        case "named pipe":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
        case _:
            path.write_bytes(b"")
            monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    with ReplyStore.opened(path.parent, KEY) as store:
        store.add([1], ENDED)
    assert mine.read_text() == "untouched"
    assert len(warnings(caplog)) == 1 and f"{path} cannot be used (" in warnings(caplog)[0]


def test_only_the_user_may_read_what_is_made(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        path = written(tmp_path / "replies")
    finally:
        os.umask(before)
    modes = [stat.S_IMODE(each.stat().st_mode) for each in (path.parent, path)]
    assert modes == [0o700, 0o600]


def stores(directory: Path, sizes: list[int]) -> list[Path]:
    """Files of so many bytes, the one that was not used for longest first."""
    directory.mkdir(exist_ok=True)
    paths = []
    for number, size in enumerate(sizes):
        path = directory / f"{9 - number:064x}.jsonl"
        path.write_bytes(b"\n" * size)
        os.utime(path, (1000 + number, 1000 + number))
        paths.append(path)
    return paths


@pytest.mark.parametrize(("budget", "removed"), [(60, []), (59, [0]), (50, [0]), (49, [0, 1]), (0, [0, 1, 2])])
def test_the_files_unused_for_longest_are_removed_until_the_rest_is_within_the_budget(
    tmp_path: Path, budget: int, removed: list[int]
) -> None:
    paths = stores(tmp_path, [10, 20, 30])
    others = [tmp_path / "notes.jsonl", tmp_path / f"{1:064x}.txt"]
    for other in others:
        other.write_bytes(b"x" * 1000)
        os.utime(other, (1, 1))
    assert prune(tmp_path, budget) == [paths[number] for number in removed]
    assert sorted(tmp_path.iterdir()) == sorted([*others, *(path for path in paths if path not in [paths[n] for n in removed])])


def test_the_file_that_is_kept_stays(tmp_path: Path) -> None:
    paths = stores(tmp_path, [10, 20, 30])
    assert prune(tmp_path, 35, keep=paths[0]) == [paths[1], paths[2]]
    assert paths[0].exists()


def test_opening_a_store_counts_as_use_and_removes_others_beyond_the_budget(tmp_path: Path) -> None:
    path = written(tmp_path)
    os.utime(path, (1, 1))
    old, recent = stores(tmp_path, [1000, 10])
    ReplyStore.opened(tmp_path, KEY, budget_bytes=1000).close()
    assert path.exists() and recent.exists() and not old.exists()
    assert path.stat().st_mtime > 1000
