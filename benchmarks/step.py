"""A training step with and without what the CPU runtime adds: `python benchmarks/step.py [--rounds N]`.

The embedded model, LoRA on the last 16 layers, 8 rows of 96 random tokens, 30 learned; loss and gradient, no update. The ways
alternate within a round; seconds are medians over the rounds, memory is MLX's peak above what stays.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from finetune_dataflow import engine  # isort: skip  # its BLAS must stand before MLX

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from finetune_dataflow.embedded_model import embedded_model_directory
from finetune_dataflow.engine.batches import Batch, in_parts, of_lines
from finetune_dataflow.engine.crew import Crew, gradient_of_parts
from finetune_dataflow.engine.exponentials import as_powers
from finetune_dataflow.engine.fit_settings import MethodSettings
from finetune_dataflow.engine.losses import LossPath
from finetune_dataflow.engine.methods import make_trainable

ROWS, WIDTH, LEARNED = 8, 96, 30
WAYS = {  # exponentials as powers of two, threads with rows of their own, parts that all rows are computed in
    "MLX's exponentials, one thread of rows": (False, 1, 1),
    "MLX's exponentials, two threads of rows": (False, 2, 2),
    "powers of two, one thread of rows": (True, 1, 1),
    "powers of two, two threads of rows": (True, 2, 2),
    "powers of two, two threads, four parts": (True, 2, 4),
}


def rows() -> Batch:
    """A batch of random tokens, the last of each row learned."""
    draw = np.random.default_rng(0)
    inputs = draw.integers(10, 40_000, (ROWS, WIDTH)).astype(np.int32)
    targets = np.full((ROWS, WIDTH), -100, np.int32)
    targets[:, -LEARNED:] = draw.integers(10, 40_000, (ROWS, LEARNED))
    return of_lines(range(ROWS), inputs, targets, [(line, 0) for line in range(ROWS)])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    model = engine.models.load_model(embedded_model_directory())
    make_trainable(model, MethodSettings(num_layers=16))
    model.train()
    whole, path = rows(), LossPath(gathered=True)

    def computed(view: nn.Module, part: Batch) -> tuple[float, dict[str, Any]]:
        loss, gradient = nn.value_and_grad(view, path.mean_loss)(view, part)
        mx.eval(loss, gradient)
        return float(loss), gradient

    def work(view: nn.Module, parts: Sequence[Batch]) -> None:
        gradient_of_parts(parts, partial(computed, view), whole.supervised)

    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    memory: dict[str, float] = {}
    for number in range(rounds + 1):  # the first warms up
        for name, (powers, threads, parts) in WAYS.items():
            with as_powers(powers), Crew(model, threads) as crew:
                mx.clear_cache()
                stays = mx.get_active_memory()
                mx.reset_peak_memory()
                started = time.perf_counter()
                crew.in_turn(work, in_parts(whole, parts))
                if number:
                    seconds[name].append(time.perf_counter() - started)
                memory[name] = (mx.get_peak_memory() - stays) / 2**20
    for name, taken in seconds.items():
        print(f"{name:42} {statistics.median(taken):5.2f} s ({min(taken):.2f} to {max(taken):.2f})  {memory[name]:5.0f} MiB")


if __name__ == "__main__":
    main()
