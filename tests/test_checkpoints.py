import hashlib
import itertools
import json
import logging
import math
import os
import pickle
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from finetune_dataflow.engine.checkpoints import Checkpoint, has_checkpoint, latest_checkpoint, save_checkpoint
from finetune_dataflow.errors import UserError

REPOSITORY = Path(__file__).parents[1]


def checkpoint(batches: int, mark: float | None = None) -> Checkpoint:
    """A small checkpoint whose every part says its number, or another mark."""
    mark = batches if mark is None else mark
    return Checkpoint(
        step=batches // 2,
        parameters={"layers.0.lora_a": mx.full((5, 3), mark)},
        optimizer={"step": mx.array(batches, mx.uint64), "layers.0.lora_a.m": mx.full((5, 3), mark)},
        accumulated={"layers.0.lora_a": mx.full((5, 3), mark)} if batches % 2 else {},
        state={"batches": batches, "mark": mark},
    )


def mark_of(found: Checkpoint) -> float:
    """The mark that every part of a checkpoint agrees on."""
    marks = {found.state["mark"]}
    for array in (found.parameters["layers.0.lora_a"], found.optimizer["layers.0.lora_a.m"], *found.accumulated.values()):
        marks |= {value for row in array.tolist() for value in row}  # type: ignore[union-attr]  # rows of numbers
    assert len(marks) == 1
    return float(marks.pop())


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def bits(array: mx.array) -> tuple[str, tuple[int, ...], bytes]:
    return str(array.dtype), array.shape, np.array(array.reshape(-1).view(mx.uint8)).tobytes()


def newest(directory: Path) -> Checkpoint:
    found = latest_checkpoint(directory)
    assert found is not None
    return found


def test_arrays_of_every_type_come_back_bit_by_bit_after_their_files_are_overwritten(tmp_path: Path) -> None:
    patterns = mx.arange(65536, dtype=mx.uint32)
    parameters = {
        "bfloat16": patterns.astype(mx.uint16).view(mx.bfloat16),  # every value there is, NaNs and subnormals too
        "float32": (patterns * 65537).view(mx.float32),
        "transposed": mx.arange(12, dtype=mx.float32).reshape(3, 4).T,
    }
    optimizer = {
        "rng": mx.array([2**32 - 1, 0], mx.uint32),
        "step": mx.array(np.array(2**64 - 1, np.uint64)),
        "none": mx.zeros((0, 4)),
    }
    expected = {name: bits(array) for name, array in parameters.items()}
    path = save_checkpoint(tmp_path, Checkpoint(3, parameters, optimizer, {}, {"batches": 12}), keep=1)
    assert path == tmp_path / "batch-00000012"
    assert names(path) == ["optimizer.safetensors", "parameters.safetensors", "state.json"]
    found = newest(tmp_path)
    for file in path.iterdir():
        file.write_bytes(bytes(file.stat().st_size))  # in place: a file still open would be read as zeros
    shutil.rmtree(path)
    assert {name: bits(array) for name, array in found.parameters.items()} == expected
    assert expected["bfloat16"][2] == b"".join(number.to_bytes(2, sys.byteorder) for number in range(65536))
    assert found.optimizer["rng"].tolist() == [4294967295, 0] and found.optimizer["rng"].dtype == mx.uint32
    assert np.array(found.optimizer["step"]).item() == 18446744073709551615 and found.optimizer["step"].shape == ()
    assert found.optimizer["none"].shape == (0, 4)
    assert found.step == 3 and found.accumulated == {} and found.state == {"batches": 12}


def test_an_unfinished_accumulation_window_comes_back_and_an_optimiser_without_state(tmp_path: Path) -> None:
    sums = {"w": mx.array([0.1, -0.0, 3e-40], mx.float32)}
    path = save_checkpoint(tmp_path, Checkpoint(0, {"w": mx.zeros((3,))}, {}, sums, {"batches": 1}), keep=1)
    assert (path / "accumulated.safetensors").is_file()
    found = newest(tmp_path)
    assert bits(found.accumulated["w"]) == bits(sums["w"]) and found.optimizer == {}


def test_state_comes_back_exactly_with_infinity_nan_and_negative_zero(tmp_path: Path) -> None:
    state: dict[str, Any] = {
        "batches": 7, "best_loss": math.inf, "worst": -math.inf, "mean": 0.1 + 0.2, "small": 5e-324, "zero": -0.0,
        "big": 2**64 - 1, "nothing": None, "text": "Größe \ud800", "nested": {"order": [3, 1, 2], "done": True},
    }  # fmt: skip
    save_checkpoint(tmp_path, Checkpoint(7, {"w": mx.zeros((1,))}, {}, {}, {**state, "score": math.nan}), keep=1)
    found = dict(newest(tmp_path).state)
    assert math.isnan(found.pop("score"))
    assert found == state and math.copysign(1, found["zero"]) == -1


def test_state_that_json_changes_is_still_read_as_json_gives_it(tmp_path: Path) -> None:
    state = {"batches": 1, "pair": (1, 2), "by_number": {2: "b", 10: "a"}}
    save_checkpoint(tmp_path, Checkpoint(1, {"w": mx.zeros((1,))}, {}, {}, state), keep=1)
    assert newest(tmp_path).state == {"batches": 1, "pair": [1, 2], "by_number": {"2": "b", "10": "a"}}


def test_state_that_json_cannot_hold_leaves_nothing_behind(tmp_path: Path) -> None:
    wrong = Checkpoint(1, {"w": mx.zeros((1,))}, {}, {}, {"batches": 1, "array": mx.zeros((1,))})
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_checkpoint(tmp_path / "checkpoints", wrong, keep=1)
    assert names(tmp_path) == []


def test_the_newest_are_kept_also_when_the_number_outgrows_its_zeros(tmp_path: Path) -> None:
    for batches in (99_999_998, 99_999_999, 100_000_000):
        save_checkpoint(tmp_path, checkpoint(batches), keep=2)
    assert names(tmp_path) == ["batch-100000000", "batch-99999999"]
    assert newest(tmp_path).state["batches"] == 100_000_000
    save_checkpoint(tmp_path, checkpoint(100_000_001), keep=1)
    assert names(tmp_path) == ["batch-100000001"]


def test_keep_must_be_one_or_more(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"keep_checkpoints=0 is out of range. Expected a whole number, 1 or more"):
        save_checkpoint(tmp_path, checkpoint(1), keep=0)


@pytest.mark.parametrize("batches", [-1, 1.5, "3"])
def test_batches_that_are_no_count_are_refused(batches: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected a whole number, 0 or more"):
        save_checkpoint(tmp_path, Checkpoint(0, {}, {}, {}, {"batches": batches}), keep=1)


def test_a_run_that_arrives_at_the_same_place_replaces_its_checkpoint(tmp_path: Path) -> None:
    for mark in (0.5, 1.5, 2.5):
        assert save_checkpoint(tmp_path, checkpoint(2, mark), keep=3) == tmp_path / "batch-00000002"
        assert mark_of(newest(tmp_path)) == mark
    assert names(tmp_path) == ["batch-00000002"]


def test_there_is_no_checkpoint_before_the_first(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "missing"):
        assert latest_checkpoint(directory) is None and not has_checkpoint(directory)
    save_checkpoint(tmp_path, checkpoint(1), keep=1)
    assert has_checkpoint(tmp_path)


def test_a_checkpoint_cut_short_does_not_count_as_one(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, checkpoint(1), keep=1)
    cut(path / "parameters.safetensors")
    assert not has_checkpoint(tmp_path) and latest_checkpoint(tmp_path) is None


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def substitute(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def make_link(path: Path) -> None:
    elsewhere = path.parents[2] / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def make_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def vouch_for(path: Path) -> None:
    """Write the size and checksum of a changed file into state.json, as its writer would have."""
    document = json.loads((path.parent / "state.json").read_text())
    content = path.read_bytes()
    document["files"][path.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    del document["sha256"]
    document["sha256"] = hashlib.sha256(json.dumps(document).encode()).hexdigest()
    (path.parent / "state.json").write_text(json.dumps(document))


class Trap:
    """Unpickled, it makes a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.directory),)


def put_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Trap(path.parents[2] / "sprung")))
    vouch_for(path)


def cut_and_vouch(path: Path) -> None:
    cut(path)
    vouch_for(path)


DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "cut short": ("parameters.safetensors", cut, "parameters.safetensors has "),
    "empty": ("accumulated.safetensors", lambda path: path.write_bytes(b""), "accumulated.safetensors has 0 bytes instead of"),
    "a flipped bit": ("optimizer.safetensors", flip, "the checksum of optimizer.safetensors is wrong"),
    "a file gone": ("optimizer.safetensors", Path.unlink, "optimizer.safetensors is missing"),
    "arrays cut before they were written": ("parameters.safetensors", cut_and_vouch, "parameters.safetensors cannot be loaded"),
    "a pickle": ("parameters.safetensors", put_pickle, "parameters.safetensors cannot be loaded"),
    "a link": ("parameters.safetensors", make_link, "parameters.safetensors is not a regular file"),
    "a pipe": ("parameters.safetensors", make_pipe, "parameters.safetensors is not a regular file"),
    "a foreign file": ("notes.txt", lambda path: path.write_text("x"), "notes.txt does not belong to it"),
    "no state": ("state.json", Path.unlink, "state.json cannot be read (No such file or directory)"),
    "state cut short": ("state.json", cut, "state.json is not JSON"),
    "state not text": ("state.json", lambda path: path.write_bytes(b"\xff\xfe\x00"), "state.json is not JSON"),
    "state of zeros": ("state.json", lambda path: path.write_bytes(bytes(200)), "state.json is not JSON"),
    "another document": ("state.json", lambda path: path.write_text("[1]"), "state.json does not say its format"),
    "another format": ("state.json", lambda path: substitute(path, '"format": 1', '"format": 2'), "its format is 2, and this"),
    "a changed number": ("state.json", lambda path: substitute(path, '"mark": 3', '"mark": 4'), "the checksum of state.json"),
    "a pipe for the state": ("state.json", make_pipe, "state.json is not a regular file"),
    "a link for the state": ("state.json", make_link, "state.json cannot be read (Too many levels of symbolic links)"),
    "a directory for the state": ("state.json", make_directory, "state.json cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_with_its_name_and_the_reason_and_later_replaced(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "checkpoints"
    for batches in (1, 2, 3):
        path = save_checkpoint(directory, checkpoint(batches), keep=3)
    name, break_it, said = DAMAGES[damage]
    break_it(path / name)
    with caplog.at_level(logging.WARNING):
        assert mark_of(newest(directory)) == 2
    [record] = caplog.records
    assert record.getMessage().startswith(f"The checkpoint {path} is passed over: {said}")
    assert not (tmp_path / "sprung").exists()
    save_checkpoint(directory, checkpoint(3, 3.5), keep=3)
    assert mark_of(newest(directory)) == 3.5
    assert names(directory) == ["batch-00000001", "batch-00000002", "batch-00000003"]


def test_a_renamed_checkpoint_a_link_to_one_and_other_files_are_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "checkpoints"
    shutil.move(save_checkpoint(tmp_path / "other", checkpoint(9), keep=1), tmp_path / "batch-00000009")
    save_checkpoint(directory, checkpoint(2), keep=1)
    shutil.copytree(directory / "batch-00000002", directory / "batch-00000007")
    (directory / "batch-00000009").symlink_to(tmp_path / "batch-00000009")
    (directory / "batch-00000010").write_text("x")
    (directory / "batch-11").mkdir()
    (directory / ".DS_Store").write_text("x")
    with caplog.at_level(logging.WARNING):
        assert mark_of(newest(directory)) == 2
    assert [record.getMessage() for record in caplog.records] == [
        f"{directory / 'batch-00000009'} is not a checkpoint and is passed over.",
        f"{directory / 'batch-00000010'} is not a checkpoint and is passed over.",
        f"{directory / 'batch-11'} is not a checkpoint and is passed over.",
        f"The checkpoint {directory / 'batch-00000007'} is passed over: it was written as batch-00000002.",
    ]


def test_a_link_under_a_checkpoints_name_is_replaced_and_what_it_leads_to_is_left_alone(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    directory.mkdir()
    shutil.move(save_checkpoint(tmp_path / "other", checkpoint(9), keep=1), tmp_path / "batch-00000009")
    (directory / "batch-00000009").symlink_to(tmp_path / "batch-00000009")
    save_checkpoint(directory, checkpoint(9, 0.5), keep=1)
    assert mark_of(newest(directory)) == 0.5 and not (directory / "batch-00000009").is_symlink()
    assert mark_of(newest(tmp_path)) == 9


def test_damaged_and_overtaken_checkpoints_never_push_a_whole_one_out(tmp_path: Path) -> None:
    for batches in (10, 20, 30, 40):
        save_checkpoint(tmp_path, checkpoint(batches), keep=4)
    cut(tmp_path / "batch-00000030" / "parameters.safetensors")
    cut(tmp_path / "batch-00000040" / "parameters.safetensors")
    assert mark_of(newest(tmp_path)) == 20
    save_checkpoint(tmp_path, checkpoint(32), keep=2)
    assert names(tmp_path) == ["batch-00000020", "batch-00000032"]


def test_left_overs_of_earlier_kills_are_removed_and_files_of_others_are_not(tmp_path: Path) -> None:
    for name in (".writing-batch-00000003", ".deleted-batch-00000001", ".theirs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "parameters.safetensors").write_bytes(b"half")
    save_checkpoint(tmp_path, checkpoint(3), keep=1)
    assert names(tmp_path) == [".theirs", "batch-00000003"]


class Killed(BaseException):
    pass


def die_at(fatal: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the call of that number on, nothing that changes or flushes the disk works any more, as after a kill."""
    calls = itertools.count()

    def dying(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if next(calls) >= fatal:
                raise Killed
            return function(*arguments, **options)

        return call

    for name in ("mkdir", "rename", "fsync", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, dying(getattr(os, name)))


@pytest.mark.parametrize("batches", [2, 3])
def test_a_kill_between_any_two_steps_leaves_the_old_or_the_new_checkpoint_whole(batches: int, tmp_path: Path) -> None:
    """Saving 2 replaces the newest of two; saving 3 pushes the oldest out. keep=1 leaves no other to fall back to."""
    seen = []
    for fatal in itertools.count():
        directory = tmp_path / str(fatal)
        save_checkpoint(directory, checkpoint(1), keep=1)
        save_checkpoint(directory, checkpoint(2), keep=2)
        with pytest.MonkeyPatch.context() as patch:
            die_at(fatal, patch)
            try:
                save_checkpoint(directory, checkpoint(batches, 0.5), keep=1)
                completed = True
            except Killed:
                completed = False
        seen.append(mark_of(newest(directory)))
        assert has_checkpoint(directory)
        for path in directory.glob("batch-*"):
            assert {"optimizer.safetensors", "parameters.safetensors", "state.json"} <= set(names(path))
        if completed:
            break
        save_checkpoint(directory, checkpoint(4), keep=2)
        assert mark_of(newest(directory)) == 4
        left = names(directory)
        assert left[-1] == "batch-00000004" and len(left) == 2 and not any(name.startswith(".") for name in left)
        cut(directory / "batch-00000004" / "state.json")
        assert mark_of(newest(directory)) == seen[-1]
    turn = seen.index(0.5)
    assert seen == [2.0] * turn + [0.5] * (len(seen) - turn)
    assert turn > 5 and len(seen) - turn > 5


def test_all_is_on_the_disk_before_it_gets_its_name_and_before_the_old_one_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "checkpoints"
    save_checkpoint(directory, checkpoint(2), keep=1)
    steps: list[str] = []
    fsync, rename = os.fsync, os.rename

    def record_fsync(handle: int) -> None:
        inode = os.fstat(handle).st_ino
        steps.extend(f"flush {path.name}" for path in tmp_path.rglob("*") if path.stat().st_ino == inode)
        fsync(handle)

    def record_rename(old: Path, new: Path) -> None:
        steps.append(f"rename {Path(old).name} to {Path(new).name}")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    save_checkpoint(directory, checkpoint(2), keep=1)
    files = ["flush optimizer.safetensors", "flush parameters.safetensors", "flush state.json"]
    assert sorted(steps[:3]) == files
    assert steps[3:] == [
        "flush .writing-batch-00000002", "rename .writing-batch-00000002 to batch-00000002-again", "flush checkpoints",
        "rename batch-00000002 to .deleted-batch-00000002", "flush checkpoints",
        "rename batch-00000002-again to batch-00000002", "flush checkpoints",
    ]  # fmt: skip
    steps.clear()
    save_checkpoint(directory, checkpoint(4), keep=1)
    assert sorted(steps[:3]) == files
    assert steps[3:] == [
        "flush .writing-batch-00000004", "rename .writing-batch-00000004 to batch-00000004", "flush checkpoints",
        "rename batch-00000002 to .deleted-batch-00000002", "flush checkpoints",
    ]  # fmt: skip


CHILD = """
import sys
from pathlib import Path
from finetune_dataflow.engine.checkpoints import Checkpoint, latest_checkpoint, save_checkpoint
import mlx.core as mx

directory = Path(sys.argv[1])
def checkpoint(number, size=1_000_000):
    arrays = {f"layers.{n}": mx.full((size,), number, mx.float32) for n in range(2)}
    accumulated = {"layers.0": mx.full((10,), number)} if number % 2 else {}
    return Checkpoint(number, arrays, {"m": mx.full((10,), number)}, accumulated, {"batches": number, "double": 2 * number})
"""

ENDLESS = """
found = latest_checkpoint(directory)
number = 0 if found is None else found.state["batches"]
print("ready", flush=True)
while True:
    number += 1
    for _ in range(1 + (number % 3 == 0)):  # every third is saved again, as when a run arrives at the same place
        save_checkpoint(directory, checkpoint(number), keep=2)
    print(number, flush=True)
"""


def child(script: str, directory: Path) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", CHILD + script, str(directory)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_process_killed_at_any_moment_leaves_all_that_it_reported(tmp_path: Path) -> None:
    draw = random.Random(5)
    reported, in_the_middle = 0, 0
    for attempt in range(12):
        process = child(ENDLESS, tmp_path)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        if attempt % 2:
            reported = int(process.stdout.readline())
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=draw.uniform(0.0, 0.25))
        process.kill()
        lines, complaints = process.communicate()
        assert complaints == ""
        reported = max([reported, *map(int, lines.split())])
        in_the_middle += any(name.startswith(".writing-") for name in names(tmp_path))
        found = latest_checkpoint(tmp_path)
        if found is None:
            assert reported == 0
            continue
        number = found.state["batches"]
        assert number in (reported, reported + 1)
        assert (found.step, found.state["double"]) == (number, 2 * number)
        assert set(found.parameters) == {"layers.0", "layers.1"}
        assert set(found.accumulated) == ({"layers.0"} if number % 2 else set())
        for array in (*found.parameters.values(), *found.optimizer.values(), *found.accumulated.values()):
            assert array.size >= 10 and mx.all(array == number).item()
        reported = number
    assert reported >= 6 and in_the_middle >= 1, "the kills came too early or too late to show anything"


FULL_DISK = """
import resource
from finetune_dataflow.errors import UserError

def save_within(limit, number, size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        save_checkpoint(directory, checkpoint(number, size), keep=1)
    except UserError as error:
        print(error)
    else:
        print("no error")

save_within(3_000_000, 1, 1_000_000)
save_within(3_000_000, 2, 10)
save_within(3_000_000, 3, 1_000_000)  # fails in the middle of an array
save_within(100, 3, 10)  # fails when the buffer of a small file is written
save_within(600, 3, 10)  # fails at the last file, state.json
save_within(3_000_000, 2, 1_000_000)  # fails to replace
print(latest_checkpoint(directory).state["batches"])
"""


def test_a_full_disk_is_noticed_names_the_reason_and_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    process = child(FULL_DISK, directory)
    lines, complaints = process.communicate()
    assert complaints == ""
    refused = f"cannot be written to {directory}: File too large."
    intact = "The previous checkpoint, batch-00000002, is intact: when this is mended, the same command goes on from there."
    assert lines.splitlines() == [
        f"The checkpoint batch-00000001 {refused} There is no previous checkpoint.",
        "no error",
        f"The checkpoint batch-00000003 {refused} {intact}",
        f"The checkpoint batch-00000003 {refused} {intact}",
        f"The checkpoint batch-00000003 {refused} {intact}",
        f"The checkpoint batch-00000002 {refused} {intact}",
        "2",
    ]
    assert names(directory) == ["batch-00000002"]
    assert newest(directory).parameters["layers.1"].tolist() == [2.0] * 10


def test_a_damaged_checkpoint_is_not_called_intact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for batches in (1, 2):
        save_checkpoint(tmp_path, checkpoint(batches), keep=2)
    flip(tmp_path / "batch-00000002" / "parameters.safetensors")

    def refuse(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UserError, match=r"No space left on device\. The previous checkpoint, batch-00000001, is intact"):
        save_checkpoint(tmp_path, checkpoint(3), keep=2)
    assert names(tmp_path) == ["batch-00000001", "batch-00000002"]


def test_a_file_in_the_place_of_the_directory_is_named(tmp_path: Path) -> None:
    taken = tmp_path / "checkpoints"
    taken.write_text("x")
    with pytest.raises(UserError, match=r"batch-00000001 cannot be written to .*checkpoints: File exists\. There is no previous"):
        save_checkpoint(taken, checkpoint(1), keep=1)
    with pytest.raises(UserError, match=r"The checkpoints in .*checkpoints cannot be read: Not a directory"):
        latest_checkpoint(taken)
    assert taken.read_text() == "x"
