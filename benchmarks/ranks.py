"""Ranks on this machine: what a sum of gradients takes, and how equal their updates are: `python benchmarks/ranks.py`.

    --sums      bytes of a gradient, and the seconds that MLX's ring takes to sum it over loopback (medians of --rounds)
    --parity    the embedded model on the example data, LoRA as by default: first loss, gradient and last weights of 1, 2, 3 ranks

Each prints a Markdown table, as docs/scaling.md has it. Without an option both are made. Ranks share this machine's cores, so
the seconds of `--parity` say nothing about several machines.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from finetune_dataflow import engine  # isort: skip  # its BLAS must stand before MLX

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from safetensors.numpy import load_file

from finetune_dataflow.cli.options import EXAMPLE, EXAMPLE_INPUTS, build_driver
from finetune_dataflow.embedded_model import embedded_model_directory
from finetune_dataflow.engine import ranks
from finetune_dataflow.engine.fit_settings import FitSettings, LoopSettings, MethodSettings, OptimizerSettings
from finetune_dataflow.engine.methods import make_trainable, trainable
from finetune_dataflow.engine.optimizers import FitOptimizer

REPOSITORY = Path(__file__).parent.parent
GIGABIT = 1e9 / 8  # bytes a second
SEVEN = {"layers": 32, "hidden": 4096, "inner": 11008}  # Llama 2 7B; its keys and values have all heads


def lora_parameters(layers: int, hidden: int, inner: int, rank: int) -> int:
    """Parameters of LoRA on every linear layer of a llama's blocks: rank times (inputs + outputs) of each."""
    return layers * rank * (4 * (hidden + hidden) + 3 * (hidden + inner))


def gradients() -> dict[str, int]:
    """The parameters that some fits train: a gradient has as many float32."""
    found = {}
    for name, method in (("LoRA, rank 8, last 16 layers", MethodSettings()), ("full", MethodSettings("full", num_layers=-1))):
        model = engine.models.load_model(embedded_model_directory())
        make_trainable(model, method)
        found[f"SmolLM2-135M, {name}"] = sum(each.size for each in trainable(model).values())
    found["a 7B llama, LoRA, rank 8, all 32 layers"] = lora_parameters(SEVEN["layers"], SEVEN["hidden"], SEVEN["inner"], 8)
    return found


def sums(out: Path, rounds: int) -> None:
    """A rank's part of the sums: rank 0 writes the seconds of each."""
    sizes = json.loads((out / "sizes.json").read_text())
    with ranks.joined() as team:
        assert team is not None
        team.connect()
        seconds: dict[str, float] = {}
        for name, size in sizes.items():
            gradient = {str(part): mx.ones(each) for part, each in enumerate(pieces(size))}
            mx.eval(gradient)
            taken = []
            for _ in range(rounds):
                team.exchange("round", None)
                started = time.perf_counter()
                team.summed(gradient, gradient)
                taken.append(time.perf_counter() - started)
            seconds[name] = statistics.median(taken)
        if team.first:
            (out / "seconds.json").write_text(json.dumps(seconds))


def pieces(size: int) -> list[int]:
    """A gradient of so many numbers as arrays of at most four million, as a model's matrices are."""
    whole, rest = divmod(size, 4_000_000)
    return [4_000_000] * whole + ([rest] if rest else [])


def parity(out: Path) -> None:
    """A rank's part of a short fit: rank 0 keeps the first gradient, the losses and the weights."""
    inputs = {"data_path": str(REPOSITORY / EXAMPLE), **EXAMPLE_INPUTS}
    columns = build_driver("base").execute(["train_tokens", "validation_tokens"], inputs=inputs)
    settings = FitSettings(
        MethodSettings(), OptimizerSettings(learning_rate=1e-4),
        LoopSettings(iters=4, batch_size=5, grad_accumulation_steps=2, val_batches=1, steps_per_eval=2, steps_per_report=1),
    )  # fmt: skip
    update, kept = FitOptimizer.update, list[int]()

    def recording(self: FitOptimizer, model: Any, gradient: dict[str, Any], rate: float) -> None:
        if not kept:
            kept.append(1)
            mx.save_safetensors(str(out / "gradient.safetensors"), dict(cast(list[Any], tree_flatten(gradient))))
        update(self, model, gradient, rate)

    with ranks.joined() as team:
        own = out if team is None or team.first else out / f"rank-{team.rank}"
        own.mkdir(exist_ok=True)
        if own == out:
            FitOptimizer.update = recording  # type: ignore[method-assign, assignment]
        engine.training.fit(embedded_model_directory(), columns["train_tokens"], columns["validation_tokens"], settings, own, {})


def started(count: int, words: Sequence[str], directory: Path) -> None:
    """This script as so many ranks on loopback; of one, as a process alone."""
    directory.mkdir(exist_ok=True)
    hosts = [[f"127.0.0.1:{port}"] for port in free_ports(count)]
    (directory / "hosts.json").write_text(json.dumps(hosts))
    base = {name: value for name, value in os.environ.items() if not name.startswith("MLX_")}
    base |= {"PYTHONPATH": str(REPOSITORY)}
    each = [
        {**base, **({"MLX_HOSTFILE": str(directory / "hosts.json"), "MLX_RANK": str(rank)} if count > 1 else {})}
        for rank in range(count)
    ]
    command = [sys.executable, __file__, *words, "--within", str(directory)]
    processes = [subprocess.Popen(command, env=variables, stderr=subprocess.DEVNULL) for variables in each]
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit(f"a rank of {count} failed: {' '.join(command)}")


def free_ports(count: int) -> list[int]:
    """Ports below those that the system gives away, that nobody listens at."""
    found = []
    for port in range(24000, 32000):
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)):
                found.append(port)
        if len(found) == count:
            break
    return found


def print_sums(rounds: int) -> None:
    """The table of gradients: bytes, what the ring sends, seconds on loopback, and by arithmetic on a network."""
    sizes = gradients()
    seconds: dict[int, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        for count in (2, 3):
            place = Path(directory, str(count))
            place.mkdir()
            (place / "sizes.json").write_text(json.dumps(sizes))
            started(count, ["--sums", "--rounds", str(rounds)], place)
            seconds[count] = json.loads((place / "seconds.json").read_text())
    print("| Gradient | Numbers | MB (float32) | s, 2 ranks | s, 3 ranks | s at 1 Gbit/s | s at 10 Gbit/s |")
    print("|---|---|---|---|---|---|---|")
    for name, size in sizes.items():
        sent = 2 * size * 4  # of each rank, for many of them: 2 (n - 1) / n of the bytes
        wires = " | ".join(f"{sent / (GIGABIT * rate):.3f}" for rate in (1, 10))
        print(f"| {name} | {size:,} | {size * 4 / 1e6:.1f} | {seconds[2][name]:.3f} | {seconds[3][name]:.3f} | {wires} |")


def print_parity() -> None:
    """The table of equality: how far 2 and 3 ranks are from one process."""
    with tempfile.TemporaryDirectory() as directory:
        for count in (1, 2, 3):
            started(count, ["--parity"], Path(directory, str(count)))
        print("| Ranks | First loss | from that of one | First gradient | Last validation loss | Weights after 2 updates |")
        print("|---|---|---|---|---|---|")
        losses, validations = ({n: events(Path(directory, str(n)), kind) for n in (1, 2, 3)} for kind in ("train", "validation"))
        for count in (1, 2, 3):
            ours, one = Path(directory, str(count)), Path(directory, "1")
            gradient = apart(one / "gradient.safetensors", ours / "gradient.safetensors")
            weights = apart(*(each / "adapters-last" / "adapters.safetensors" for each in (one, ours)))
            first = abs(losses[count][0] / losses[1][0] - 1)
            validation = abs(validations[count][-1] / validations[1][-1] - 1)
            print(f"| {count} | {losses[count][0]:.6f} | {first:.1e} | {gradient:.1e} | {validation:.1e} | {weights:.1e} |")


def events(directory: Path, kind: str) -> list[float]:
    """The losses of one kind in a fit's log."""
    lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [each["loss"] for each in lines if each["event"] == kind]


def apart(one: Path, other: Path) -> float:
    """The distance of two files of arrays, in norms of the first."""
    ours, theirs = load_file(one), load_file(other)
    norm, distance = (
        math.sqrt(sum(float(np.square(each, dtype=np.float64).sum()) for each in arrays))
        for arrays in (ours.values(), [ours[name] - theirs[name] for name in ours])
    )
    return distance / norm


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sums", action="store_true")
    parser.add_argument("--parity", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--within", type=Path, help=argparse.SUPPRESS)  # what a rank is started with
    chosen = parser.parse_args()
    if chosen.within is not None:
        sums(chosen.within, chosen.rounds) if chosen.sums else parity(chosen.within)
        return
    if chosen.sums or not chosen.parity:
        print_sums(chosen.rounds)
    if chosen.parity or not chosen.sums:
        print_parity()


if __name__ == "__main__":
    main()
