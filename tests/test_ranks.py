from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from finetune_dataflow.cli import main
from finetune_dataflow.engine import cpu_runtime, ranks, ranks_channel, ranks_meeting, ranks_sums, training
from finetune_dataflow.engine.batches import in_order
from finetune_dataflow.engine.ranks_channel import Channel, RankLost
from finetune_dataflow.engine.ranks_meeting import Place, limit_of, place_of
from finetune_dataflow.engine.run_directory import finished_fit
from finetune_dataflow.engine.tokens import EncodedRow, token_columns
from finetune_dataflow.errors import UserError
from tests.fit_values import rows_of, settings_of

HOSTS = [["10.0.0.1:5000", "10.0.0.1:5001"], ["10.0.0.2:5002"], ["10.0.0.1:5003"]]


def written(path: Path, value: object) -> str:
    path.write_text(json.dumps(value))
    return str(path)


def test_a_process_that_no_launcher_started_is_no_rank(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_text("\n")  # as mlx.launch -n 1 leaves it
    assert place_of({}) is None
    assert place_of({"MLX_RANK": "0", "MLX_HOSTFILE": str(empty)}) is None
    assert place_of({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}) is None
    with ranks.joined({}) as team:
        assert team is None and ranks.current() is None


def test_the_place_of_a_rank_is_what_each_launcher_says(tmp_path: Path) -> None:
    ring = place_of({"MLX_RANK": "2", "MLX_HOSTFILE": written(tmp_path / "hosts", HOSTS)})
    assert ring is not None and (ring.rank, ring.size, ring.backend, ring.here) == (2, 3, "ring", 2)
    assert ring.meeting == ("10.0.0.1", 5000) and ring.hosts == ("10.0.0.1", "10.0.0.2", "10.0.0.1")
    assert ring.ring[0] == (("10.0.0.1", 5000), ("10.0.0.1", 5001))
    nccl = place_of({"MLX_RANK": "1", "MLX_WORLD_SIZE": "4", "NCCL_HOST_IP": "10.0.0.9", "NCCL_PORT": "12345"})
    assert nccl == Place(1, 4, "nccl", meeting=("10.0.0.9", 12345))
    devices = written(tmp_path / "devices", [[None, "rdma_en5"], ["rdma_en5", None]])
    jaccl = place_of({"MLX_RANK": "1", "MLX_IBV_DEVICES": devices, "MLX_JACCL_COORDINATOR": "10.0.0.7:32323"})
    assert jaccl == Place(1, 2, "jaccl", meeting=("10.0.0.7", 32323))
    variables = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    assert place_of(variables) == Place(3, 4, "mpi", here=2)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"MLX_RANK": "3"}, "MLX_RANK=3 is out of range. Expected less than 3, the number of ranks."),
        ({"MLX_RANK": "first"}, "MLX_RANK='first' is out of range. Expected a whole number, 0 or more."),
        ({"MLX_RANK": "0", "MLX_HOSTFILE": "nowhere.json"}, "MLX_HOSTFILE=nowhere.json cannot be read: "),
    ],
)
def test_a_launcher_that_says_what_cannot_be_is_refused_by_name(variables: dict[str, str], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        place_of({"MLX_HOSTFILE": written(tmp_path / "hosts", HOSTS), **variables})


@pytest.mark.parametrize("text", ["0", "-1", "soon", "nan", "inf"])
def test_the_seconds_of_silence_are_a_number_above_zero(text: str) -> None:
    assert limit_of({}) == 120.0 and limit_of({"FINETUNE_DATAFLOW_RANK_SECONDS": "2.5"}) == 2.5
    with pytest.raises(UserError, match=f"FINETUNE_DATAFLOW_RANK_SECONDS='{text}' is out of range."):
        limit_of({"FINETUNE_DATAFLOW_RANK_SECONDS": text})


def channels(count: int, limit: float = 30.0) -> list[Channel]:
    """Connected ranks, all in this process."""
    pairs = [socket.socketpair() for _ in range(1, count)]
    first = Channel(0, count, {rank: ours for rank, (ours, _) in enumerate(pairs, 1)}, limit)
    return [first, *(Channel(rank, count, {0: theirs}, limit) for rank, (_, theirs) in enumerate(pairs, 1))]


def at_once(calls: list[Callable[[], Any]]) -> list[Any]:
    """What calls give that wait for each other; of one that raises RankLost or UserError, its message."""

    def told(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(len(calls)) as pool:
        return [each.result(timeout=30) for each in [pool.submit(told, call) for call in calls]]


@pytest.fixture
def three() -> Iterator[list[Channel]]:
    made = channels(3)
    yield made
    for each in made:
        each.leave()


def test_what_each_rank_gives_all_ranks_get_in_order_and_rank_0_is_heard_by_all(three: list[Channel]) -> None:
    values = at_once([lambda each=each: each.exchange("numbers", {"of": each.rank}) for each in three])  # type: ignore[misc]
    assert values == [[{"of": 0}, {"of": 1}, {"of": 2}]] * 3
    told = at_once([lambda each=each: each.announce("word", f"of {each.rank}") for each in three])  # type: ignore[misc]
    assert told == ["of 0"] * 3


def test_a_rank_that_fails_ends_the_wait_of_all_others_with_its_reason(three: list[Channel]) -> None:
    calls: list[Callable[[], Any]] = [lambda: three[0].exchange("a", 1), lambda: three[1].exchange("a", 1)]
    said = at_once([*calls, lambda: three[2].fail("rows.json is not there.")])
    assert said[:2] == ["Rank 2 of 3 cannot go on: rows.json is not there."] * 2


def test_a_rank_whose_connection_closes_is_lost_by_name_on_all_others(three: list[Channel]) -> None:
    three[1]._closed.set()  # it says nothing any more
    three[1]._connections[0].shutdown(socket.SHUT_RDWR)
    said = at_once([lambda: three[0].exchange("a", 1), lambda: three[2].exchange("a", 1)])
    assert said == ["Rank 1 of 3 was lost: its connection closed."] * 2


def test_a_rank_that_is_silent_for_longer_than_the_limit_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    first = Channel(0, 2, {1: ours}, 0.3)
    with pytest.raises(RankLost, match=r"Rank 1 of 2 was lost: nothing was heard of it for 0\.3 s\."):
        first.exchange("a", 1)
    theirs.close()


def test_ranks_that_are_at_different_places_are_told_so(three: list[Channel]) -> None:
    calls: list[Callable[[], Any]] = [lambda: three[0].exchange("update", 1), lambda: three[1].exchange("validation", 1)]
    said = at_once([calls[0], lambda: three[1]._send(0, {"topic": "validation", "value": 1})])
    assert said[0] == "Rank 1 of 3 is at 'validation' where rank 0 is at 'update'."


def test_a_collective_that_breaks_names_the_rank_that_was_lost(three: list[Channel]) -> None:
    def breaking() -> None:
        with three[0].collective():
            three[2].fail("it is out of memory.")
            raise RuntimeError("[ring] connection to a peer was lost")

    with pytest.raises(RankLost, match=r"Rank 2 of 3 cannot go on: it is out of memory\."):
        breaking()


def test_a_process_that_hangs_in_a_collective_saves_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    said, ended = list[str](), threading.Event()

    def ending(code: int) -> None:
        said.append(f"exit {code}")
        ended.set()

    monkeypatch.setattr(ranks_channel.os, "_exit", ending)
    ours, theirs = socket.socketpair()
    first = Channel(0, 2, {1: ours}, 0.2)
    first.rescue = said.append
    with first.collective():  # the other rank never answers
        assert ended.wait(20)
    first.leave()
    theirs.close()
    assert said[:2] == ["Rank 1 of 2 was lost: nothing was heard of it for 0.2 s.", "exit 2"]


def test_only_what_differs_is_named_with_the_ranks_that_differ() -> None:
    every = [{"seed": 7, "rate": 0.1, "rows": 3}, {"seed": 7, "rate": 0.1}, {"seed": 7, "rate": 0.2, "rows": 4}]
    assert ranks.disagreements(every) == [
        "rate is 0.1 on rank 0, and 0.2 on rank 2.",
        "rows is 3 on rank 0, and not set on rank 1, and 4 on rank 2.",
    ]
    assert ranks.disagreements(every[:1] * 3) == []


def free_addresses(count: int) -> tuple[tuple[tuple[str, int], ...], ...]:
    opened = [socket.socket() for _ in range(count)]
    for each in opened:
        each.bind(("127.0.0.1", 0))
    found = tuple((("127.0.0.1", int(each.getsockname()[1])),) for each in opened)
    for each in opened:
        each.close()
    return found


def ring_places(count: int) -> list[Place]:
    ring = free_addresses(count)
    return [Place(rank, count, "ring", ("127.0.0.1",) * count, ring, ring[0][0], count) for rank in range(count)]


def test_ranks_meet_at_rank_0_and_see_that_each_reaches_the_next() -> None:
    places = ring_places(3)

    def meeting(place: Place) -> list[Any]:
        channel = ranks_meeting.met(place, 20.0)
        ranks_meeting.check_ring(place, channel)
        found = channel.exchange("rank", place.rank)
        channel.leave()
        return found

    assert at_once([lambda place=place: meeting(place) for place in places]) == [[0, 1, 2]] * 3  # type: ignore[misc]


def test_an_address_that_no_rank_can_reach_is_named_on_all_ranks() -> None:
    places = ring_places(2)
    wrong = (places[0].ring[0], (("192.0.2.1", 9),))  # an address for documentation, which is no machine's

    def meeting(place: Place) -> str:
        channel = ranks_meeting.met(place, 20.0)
        try:
            ranks_meeting.check_ring(Place(place.rank, 2, "ring", place.hosts, wrong, place.meeting), channel)
        finally:
            channel.leave()
        return "reached"

    said = at_once([lambda place=place: meeting(place) for place in places])  # type: ignore[misc]
    assert said[0] == said[1] and said[0].startswith("Rank 1 of 2 cannot listen at 192.0.2.1:9: ")


def test_whoever_is_no_rank_of_the_job_is_not_let_in() -> None:
    places = ring_places(2)

    def intruding() -> None:
        while True:
            try:
                with socket.create_connection(places[0].ring[0][0], timeout=5) as stranger:
                    stranger.sendall(b'{"rank": 1, "ranks": 9}\n')
                    return
            except ConnectionRefusedError:
                continue

    def meeting(place: Place) -> int:
        if place.rank:
            intruding()
        channel = ranks_meeting.met(place, 20.0)
        channel.leave()
        return place.rank

    assert at_once([lambda place=place: meeting(place) for place in places]) == [0, 1]  # type: ignore[misc]


def test_the_shares_of_validation_rows_are_every_row_once() -> None:
    columns = token_columns([EncodedRow(n, [n], [*[65] * (n % 6), 258]) for n in range(1, 12)])
    for size in (1, 2, 3, 14):
        shares = [[index for each in in_order(columns, 4, rank, size) for index in each.indices] for rank in range(size)]
        assert sorted(index for share in shares for index in share) == [*range(11)]
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_arrays_are_summed_in_runs_of_limited_size_and_a_large_one_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks_sums, "BUFFER", 100)
    assert [*ranks_sums._together({"a": 40, "b": 60, "c": 1, "d": 500, "e": 3})] == [["a", "b"], ["c"], ["d"], ["e"]]
    arrays = ranks_sums._apart(mx.arange(7), {"one": (2, 3), "two": ()})
    assert [(name, each.tolist()) for name, each in arrays] == [("one", [[0, 1, 2], [3, 4, 5]]), ("two", 6)]


def test_a_rank_takes_its_share_of_the_threads_and_gives_them_back(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENBLAS_NUM_THREADS", "OPENBLAS_DEFAULT_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    set_to: list[int] = []
    monkeypatch.setattr(cpu_runtime, "set_blas_threads", set_to.append)
    monkeypatch.setattr(cpu_runtime, "_report", cpu_runtime.BlasReport("ours", "", None, 8))
    with cpu_runtime.sharing_threads(3):
        report = cpu_runtime.blas_report()
        assert report is not None and report.threads == 2
    report = cpu_runtime.blas_report()
    assert set_to == [2, 8] and report is not None and report.threads == 8
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "5")
    with cpu_runtime.sharing_threads(3):
        assert set_to == [2, 8]  # a number that the user chose stays


def test_a_fit_without_ranks_says_one_and_one_from_before_there_were_ranks_is_still_finished(
    tiny_model: Path, tmp_path: Path
) -> None:
    summary = training.fit(tiny_model, rows_of(6, 1), rows_of(2, 50), settings_of(epochs=1.0), tmp_path, {})
    assert summary.ranks == 1 and finished_fit(tmp_path) == summary
    history = tmp_path / "metrics.jsonl"
    *before, last = history.read_text().splitlines()
    end = {name: value for name, value in json.loads(last).items() if name != "ranks"}
    history.write_text("\n".join([*before, json.dumps(end)]) + "\n")
    assert finished_fit(tmp_path) == summary


def test_a_validation_that_a_lost_rank_prevented_is_made_up_for_when_the_fit_goes_on(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As rank 0 leaves it: the update is made and saved, its report and validation are due."""
    train, validation, settings = rows_of(22, 1), rows_of(5, 100), settings_of(evals_per_epoch=6, epochs=1.0)
    training.fit(tiny_model, train, validation, settings, tmp_path / "whole", {})
    between = training._Fit._between_updates

    def lost(fit: training._Fit) -> None:
        if fit.state.updates == 3:
            state = {**asdict(fit.state), "due": True, "history_bytes": fit.history.path.stat().st_size}
            fit._write(state, {})
            raise RankLost("Rank 1 of 2 was lost.")
        between(fit)

    with monkeypatch.context() as patched:
        patched.setattr(training._Fit, "_between_updates", lost)
        with pytest.raises(RankLost):
            training.fit(tiny_model, train, validation, settings, tmp_path / "lost", {})
    training.fit(tiny_model, train, validation, settings, tmp_path / "lost", {})
    events = [
        [(each["event"], each["step"], each["loss"]) for each in map(json.loads, lines) if "loss" in each]
        for lines in ((tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "lost"))
    ]
    assert events[0] == events[1]


def test_a_rank_alone_is_refused_with_the_address_it_waited_at(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ring = free_addresses(2)
    hosts = written(tmp_path / "hosts", [[f"{host}:{port}" for host, port in node] for node in ring])
    variables = {"MLX_HOSTFILE": hosts, "MLX_RANK": "1", "FINETUNE_DATAFLOW_RANK_SECONDS": "0.5"}
    for name, value in variables.items():
        monkeypatch.setitem(os.environ, name, value)
    assert main(["train", "--data", "nowhere.json"]) == 2
    said = capsys.readouterr().err
    assert f"Error: Rank 1 of 2 did not reach rank 0 at 127.0.0.1:{ring[0][0][1]} within 0.5 s: Connection refused." in said
    assert said.rstrip().endswith("(rank 1)") and ranks.current() is None


def test_the_seeds_of_ranks_differ_and_rank_0_has_that_of_a_process_alone() -> None:
    seeds = [ranks.Team(Place(rank, 3, "ring"), channels(1)[0], 1.0).seed for rank in range(3)]
    assert seeds[0] == 0 and len({*seeds}) == 3 and np.all(np.array(seeds) < 2**63)
