"""Ranks as processes of their own, on loopback and in network namespaces: what they compute together, and how they end."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.tiny_model import write_tiny_model

REPOSITORY = Path(__file__).parent.parent
WORKER = [sys.executable, "-m", "tests_full.ranks_worker"]
PATIENCE = 120  # seconds for one job; it takes a few


@dataclass(frozen=True)
class Ended:
    """How a rank ended, and what it said."""

    code: int
    out: str
    err: str


def free_ports(count: int) -> list[int]:
    """Ports that nobody uses; below those that the system itself gives away, so that nobody gets them meanwhile."""
    found: list[int] = []
    for port in range(20000 + os.getpid() % 10000, 32000):
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)) and len(found) < count:
                found.append(port)
        if len(found) == count:
            return found
    raise AssertionError("no free port")


def environment(**more: str) -> dict[str, str]:
    """The environment of a rank: this repository, one thread of the BLAS, half a minute to be missed."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLX_", "RANK_", "OMPI_"))}
    base = {"PYTHONPATH": str(REPOSITORY), "OPENBLAS_NUM_THREADS": "1", "FINETUNE_DATAFLOW_RANK_SECONDS": "30"}
    return {**kept, **base, **more}


def in_ranks(
    count: int,
    commands: Sequence[Sequence[str]],
    directory: Path,
    prefixes: Sequence[Sequence[str]] = (),
    hosts: Sequence[str] = (),
    **more: str,
) -> list[Ended]:
    """Start a command a rank, wait for all, and say how they ended. Of one rank, the process is started alone."""
    directory.mkdir(parents=True, exist_ok=True)
    variables: dict[str, str] = {}
    if count > 1:
        ports = free_ports(count)
        names = list(hosts) or ["127.0.0.1"] * count
        hostfile = directory / "hosts.json"
        hostfile.write_text(json.dumps([[f"{name}:{port}"] for name, port in zip(names, ports, strict=True)]))
        variables = {"MLX_HOSTFILE": str(hostfile)}
    started = [
        subprocess.Popen(
            [*(prefixes[rank] if prefixes else ()), *commands[rank % len(commands)]], cwd=directory, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=environment(**variables, **({"MLX_RANK": str(rank)} if count > 1 else {}), **more),
        )
        for rank in range(count)
    ]  # fmt: skip
    try:
        said = [each.communicate(timeout=PATIENCE) for each in started]
    finally:
        for each in started:
            each.kill()
    return [Ended(each.returncode, out, err) for each, (out, err) in zip(started, said, strict=True)]


def fitted(count: int, directory: Path, model: Path, variants: Sequence[str], **more: str) -> list[Ended]:
    return in_ranks(count, [[*WORKER, str(directory), str(model), *variants]], directory, **more)


def events(directory: Path, kind: str) -> list[dict[str, Any]]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [each for each in map(json.loads, lines) if each["event"] == kind]


def apart(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """The distance of two sets of arrays, in norms of the first."""
    assert one.keys() == other.keys()
    norm = np.sqrt(sum(float(np.square(each, dtype=np.float64).sum()) for each in one.values()))
    return float(np.sqrt(sum(float(np.square(one[name] - other[name], dtype=np.float64).sum()) for name in one)) / norm)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("ranks") / "model")


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every fit by one process, which was started as no rank."""
    directory = tmp_path_factory.mktemp("alone")
    assert [each.code for each in fitted(1, directory, model, ["prefix", "accumulated", "whole", "long"])] == [0]
    return directory


@pytest.mark.parametrize("count", [2, 3])
def test_any_number_of_ranks_makes_the_updates_of_one(count: int, alone: Path, model: Path, tmp_path: Path) -> None:
    ended = fitted(count, tmp_path / "run", model, ["prefix", "accumulated", "whole"])
    assert [(each.code, each.out, each.err) for each in ended[1:]] == [(0, "", "")] * (count - 1) and ended[0].code == 0
    for variant in ("prefix", "accumulated", "whole"):
        one, several = alone / variant, tmp_path / "run" / variant
        for kind in ("train", "validation"):
            losses = [each["loss"] for each in events(several, kind)]
            assert losses == pytest.approx([each["loss"] for each in events(one, kind)], rel=1e-5), (variant, kind)
        gradients = [load_file(each / "gradient-0.safetensors") for each in (one, several)]
        assert apart(*gradients) < 1e-5, variant
        adapters = [load_file(each / "adapters-last" / "adapters.safetensors") for each in (one, several)]
        assert apart(*adapters) < 1e-5, variant
        (first,), (last,) = events(one, "end"), events(several, "end")
        same = ("steps", "best_step", "trained_tokens", "supervised_tokens")
        assert [last[name] for name in same] == [first[name] for name in same]
        assert (first["ranks"], last["ranks"]) == (1, count)


def test_a_rank_that_is_killed_ends_the_job_with_its_name_and_a_checkpoint_that_one_process_goes_on_from(
    alone: Path, model: Path, tmp_path: Path
) -> None:
    ended = fitted(3, tmp_path / "run", model, ["long"], RANK_2_LOST_AFTER="5")
    assert [each.code for each in ended] == [2, 2, -9]
    assert "Error: Rank 2 of 3 was lost: its connection" in ended[0].err and "Traceback" not in ended[0].err + ended[1].err
    assert f"Everything up to update 5 of 40 is saved in {tmp_path / 'run' / 'long' / 'checkpoints'}." in ended[0].err
    assert "Rank 2 of 3 was lost" in ended[1].err and "(rank 1)" in ended[1].err
    assert [each.code for each in fitted(1, tmp_path / "run", model, ["long"])] == [0]
    assert [each["step"] for each in events(tmp_path / "run" / "long", "resume")] == [5]
    check_alike(alone / "long", tmp_path / "run" / "long")


def check_alike(whole: Path, resumed: Path) -> None:
    """An uninterrupted fit, and one that was gone on with: the same events, and the same adapter."""
    for kind in ("train", "validation"):
        expected, found = events(whole, kind), events(resumed, kind)
        assert [each["step"] for each in found] == [each["step"] for each in expected]
        assert [each["loss"] for each in found] == pytest.approx([each["loss"] for each in expected], rel=1e-5)
    adapters = [load_file(each / "adapters" / "adapters.safetensors") for each in (whole, resumed)]
    assert apart(*adapters) < 1e-4


def test_one_process_interrupted_within_an_update_is_gone_on_with_by_two_ranks_and_then_by_three(
    alone: Path, model: Path, tmp_path: Path
) -> None:
    (ended,) = fitted(1, tmp_path / "run", model, ["long"], RANK_0_INTERRUPTED_AFTER="6")
    assert ended.code == 130 and "Stopped after update 4 of 40" in ended.err  # after the seventh batch, an epoch's odd end
    ended, other = fitted(2, tmp_path / "run", model, ["long"], RANK_1_INTERRUPTED_AFTER="21")
    assert (ended.code, other.code) == (130, 130)
    assert "Stopped after update 13 of 40; everything is saved" in ended.err
    assert [each.code for each in fitted(3, tmp_path / "run", model, ["long"])] == [0, 0, 0]
    assert [each["step"] for each in events(tmp_path / "run" / "long", "resume")] == [4, 13]
    check_alike(alone / "long", tmp_path / "run" / "long")


def test_ranks_with_other_rows_are_refused_on_all_of_them(model: Path, tmp_path: Path) -> None:
    ended = fitted(2, tmp_path / "run", model, ["long"], OTHER_ROWS="1")
    assert [each.code for each in ended] == [2, 2]
    for each in ended:
        assert "Error: The ranks must have the same data and settings, and have not:\ntraining set is " in each.err
        assert "validation set" not in each.err
    assert not [*(tmp_path / "run").rglob("metrics.jsonl")]


@pytest.mark.parametrize(
    ("rank", "said"),
    [
        ("0", "and rank 1 (127.0.0.1) and rank 2 (127.0.0.1) did not answer."),
        ("2", "Rank 2 of 3 did not reach rank 0 at 127.0.0.1:"),
    ],
)
def test_a_cluster_that_does_not_answer_is_said_to_whoever_waits(rank: str, said: str, model: Path, tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts.json"
    hostfile.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(3)]))
    found = subprocess.run(
        [*WORKER, str(tmp_path), str(model), "long"], capture_output=True, text=True, timeout=PATIENCE, cwd=tmp_path,
        env=environment(MLX_HOSTFILE=str(hostfile), MLX_RANK=rank, FINETUNE_DATAFLOW_RANK_SECONDS="1"),
    )  # fmt: skip
    assert found.returncode == 2 and said in found.stderr and "Traceback" not in found.stderr


@pytest.fixture(scope="module")
def job(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Data of sixty rows, and a command that fits them."""
    directory = tmp_path_factory.mktemp("job")
    rows = [
        {"question": f"What is number {n}?" + " More." * (n % 5), "reply": f"It is {n * 7 % 50}, of course."} for n in range(60)
    ]
    (directory / "rows.json").write_text(json.dumps(rows))
    command = [
        sys.executable, str(REPOSITORY / "run.py"), "train", "--data", str(directory / "rows.json"), "--model", str(model),
        "--input-text-key", "question", "--output-text-key", "reply", "--num-layers", "1", "--epochs", "2",
        "--learning-rate", "0.002", "--batch-size", "5", "--grad-accumulation-steps", "3", "--max-tokens", "4",
    ]  # fmt: skip
    return directory, command


def launched(command: Sequence[str], directory: Path) -> subprocess.CompletedProcess[str]:
    """The command by mlx.launch, as a user types it."""
    launcher = [str(Path(sys.executable).parent / "mlx.launch"), "-n", "2", "--backend", "ring"]
    launcher += ["--starting-port", str(free_ports(2)[0]), "--"]
    return subprocess.run(
        [*launcher, *command], capture_output=True, text=True, timeout=PATIENCE, cwd=directory,
        env=environment(TMPDIR=str(directory)),
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


def test_mlx_launch_trains_on_two_ranks_writes_one_run_and_shows_it_again(job: tuple[Path, list[str]], tmp_path: Path) -> None:
    command = job[1]
    together = launched([*command, "--out", str(tmp_path / "together")], tmp_path)
    assert "2 ranks train together by MLX's ring, on 127.0.0.1." in together.stdout, together.stderr
    assert together.stdout.count("Scores on ") == 1
    fit = json.loads((tmp_path / "together" / "metrics.json").read_text())["fit"]
    assert fit["ranks"] == 2 and fit["best_validation_loss"] < fit["first_validation_loss"]
    assert {"metrics.json", "metrics.jsonl", "predictions.jsonl", "report.html"} <= {*os.listdir(tmp_path / "together")}
    assert not [*tmp_path.glob("finetune-dataflow-rank-*")]  # here are its temporary files
    again = launched([*command, "--out", str(tmp_path / "together")], tmp_path)
    assert f"{tmp_path / 'together'} holds this run, finished. Its result:" in again.stdout


def test_data_and_options_that_differ_are_refused_by_name_before_a_run_directory_is_made(
    job: tuple[Path, list[str]], tmp_path: Path
) -> None:
    directory, command = job
    other = [each.replace("rows.json", "other.json") for each in command]
    rows = json.loads((directory / "rows.json").read_text())
    (directory / "other.json").write_text(json.dumps([{**rows[0], "reply": "Another."}, *rows[1:]]))
    run = ["--out", str(tmp_path / "run")]
    ended = in_ranks(2, [[*command, *run], [*other, *run]], tmp_path)
    assert [each.code for each in ended] == [2, 2]
    assert all("fingerprint of the data is " in each.err and "on rank 1." in each.err for each in ended)
    ended = in_ranks(2, [[*command, *run], [*(each.replace("0.002", "0.003") for each in command), *run]], tmp_path)
    assert [each.code for each in ended] == [2, 2]
    assert all("learning_rate is 0.002 on rank 0, and 0.003 on rank 1." in each.err for each in ended)
    missing = [each.replace("rows.json", "nowhere.json") for each in command]
    ended = in_ranks(2, [[*command, *run], [*missing, *run]], tmp_path)
    assert [each.code for each in ended] == [2, 2]
    assert "Rank 1 of 2 cannot go on: " in ended[0].err and "nowhere.json" in ended[0].err
    assert not (tmp_path / "run").exists()


@pytest.fixture
def namespaces() -> Iterator[list[list[str]]]:
    """Two network namespaces joined by a cable, 10.77.0.1 and 10.77.0.2: the prefix of a command in each."""
    ip, name = shutil.which("ip"), f"ranks{os.getpid()}"
    if ip is None:
        pytest.skip("the program ip is not installed")

    def call(*words: str) -> bool:
        return subprocess.run([str(ip), *words], capture_output=True).returncode == 0

    if not call("netns", "add", f"{name}-0"):
        pytest.skip("this user may not make network namespaces")
    try:
        assert call("netns", "add", f"{name}-1")
        if not call("link", "add", f"v{os.getpid()}a", "netns", f"{name}-0", "type", "veth",
                    "peer", "name", f"v{os.getpid()}b", "netns", f"{name}-1"):  # fmt: skip
            pytest.skip("this system has no veth devices")
        for number, end in enumerate("ab"):
            inside = ("-n", f"{name}-{number}")
            assert call(*inside, "addr", "add", f"10.77.0.{number + 1}/24", "dev", f"v{os.getpid()}{end}")
            assert call(*inside, "link", "set", f"v{os.getpid()}{end}", "up") and call(*inside, "link", "set", "lo", "up")
        yield [[str(ip), "netns", "exec", f"{name}-{number}"] for number in range(2)]
    finally:
        for number in range(2):
            call("netns", "del", f"{name}-{number}")


def test_two_hosts_make_the_updates_of_one(namespaces: list[list[str]], alone: Path, model: Path, tmp_path: Path) -> None:
    command = [*WORKER, str(tmp_path / "run"), str(model), "accumulated"]
    ended = in_ranks(2, [command], tmp_path / "run", prefixes=namespaces, hosts=["10.77.0.1", "10.77.0.2"])
    assert [each.code for each in ended] == [0, 0], ended
    one, several = alone / "accumulated", tmp_path / "run" / "accumulated"
    losses = [each["loss"] for each in events(several, "train")]
    assert losses == pytest.approx([each["loss"] for each in events(one, "train")], rel=1e-5)
    assert apart(*[load_file(each / "gradient-0.safetensors") for each in (one, several)]) < 1e-5
    assert apart(*[load_file(each / "adapters-last" / "adapters.safetensors") for each in (one, several)]) < 1e-5


def test_a_host_whose_network_is_gone_is_missed_and_what_was_done_is_saved(
    namespaces: list[list[str]], model: Path, tmp_path: Path
) -> None:
    ports = free_ports(2)
    (tmp_path / "hosts.json").write_text(json.dumps([[f"10.77.0.{n + 1}:{port}"] for n, port in enumerate(ports)]))
    command = [*WORKER, str(tmp_path / "run"), str(model), "long"]
    started = [
        subprocess.Popen(
            [*namespaces[rank], *command], cwd=tmp_path, text=True, stderr=subprocess.PIPE,
            env=environment(MLX_HOSTFILE=str(tmp_path / "hosts.json"), MLX_RANK=str(rank), FINETUNE_DATAFLOW_RANK_SECONDS="3"),
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        history = tmp_path / "run" / "long" / "metrics.jsonl"
        while not (history.is_file() and '"train"' in history.read_text()):
            assert started[0].poll() is None
        subprocess.run([*namespaces[1], "ip", "link", "set", f"v{os.getpid()}b", "down"], check=True)
        said = [each.communicate(timeout=PATIENCE)[1] for each in started]
    finally:
        for each in started:
            each.kill()
    assert [each.returncode for each in started] == [2, 2], said
    assert "Rank 1 of 2 was lost: nothing was heard of it for 3 s. Everything up to update " in said[0]
    assert [*(tmp_path / "run" / "long" / "checkpoints").glob("batch-*")]
