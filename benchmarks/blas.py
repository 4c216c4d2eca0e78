"""MLX's and NumPy's float32 matrix products in one process, with the fast BLAS in front of MLX and without it.

`python benchmarks/blas.py` prints a table and, last, the same numbers as one line of JSON. The two libraries take
turns, and each number is the median over several turns (the ratio too), so a noisy machine slows both alike. The goal
is a ratio, MLX's rate over NumPy's, of 0.8 or more. The control, MLX as shipped, needs a process of its own: a BLAS
cannot be taken out again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from finetune_dataflow.engine import cpu_runtime

# Rows x inner x columns. The last three are SmolLM2-135M's: a feed-forward layer in and out, and an attention layer.
SHAPES = [(1024, 1024, 1024), (2048, 2048, 2048), (640, 576, 1536), (640, 1536, 576), (640, 576, 576)]
CONTROL_SHAPES = [(512, 512, 512), (640, 576, 1536)]
SECONDS_PER_TURN = 0.05
# An idle OpenBLAS thread spins for about 0.1 s before it sleeps, and would slow the other library's turn.
SECONDS_BETWEEN_TURNS = 0.12


def measure(shapes: list[tuple[int, int, int]], turns: int) -> list[dict[str, float | str]]:
    """MLX's and NumPy's GFLOP/s for each shape, and their ratio: the median over turns taken alternately."""
    import mlx.core as mx  # after the BLAS
    import numpy as np

    mx.set_default_device(mx.Device(mx.cpu))
    draw = np.random.default_rng(0)
    results: list[dict[str, float | str]] = []
    for rows, inner, columns in shapes:
        left = draw.standard_normal((rows, inner), dtype=np.float32)
        right = draw.standard_normal((inner, columns), dtype=np.float32)
        pair = mx.array(left), mx.array(right)

        def mlx_product(pair: tuple[mx.array, mx.array] = pair) -> None:
            mx.eval(pair[0] @ pair[1])

        def numpy_product(left: np.ndarray = left, right: np.ndarray = right) -> None:
            left @ right

        operations = 2e-9 * rows * inner * columns
        mlx_seconds, numpy_seconds = [], []
        for _ in range(turns):
            mlx_seconds.append(_seconds(mlx_product))
            numpy_seconds.append(_seconds(numpy_product))
        ratios = [theirs / ours for theirs, ours in zip(numpy_seconds, mlx_seconds, strict=True)]
        results.append(
            {
                "shape": f"{rows}x{inner}x{columns}",
                "mlx": round(operations / statistics.median(mlx_seconds), 1),
                "numpy": round(operations / statistics.median(numpy_seconds), 1),
                "ratio": round(statistics.median(ratios), 3),
            }
        )
    return results


def _seconds(product: Callable[[], None]) -> float:
    """Seconds for one product, over as many as fill a turn; the first, which wakes the thread pool, does not count."""
    time.sleep(SECONDS_BETWEEN_TURNS)
    product()
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < SECONDS_PER_TURN:
        product()
        count += 1
    return (time.perf_counter() - started) / count


def main() -> None:
    """Measure with the runtime here and without it in a second process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--control", action="store_true", help="print one line of JSON for this process, and no more")
    if parser.parse_args().control:
        print(json.dumps(measure(CONTROL_SHAPES, turns=3)))
        return
    started = time.perf_counter()
    report = cpu_runtime.load_fast_blas()
    fast = measure(SHAPES, turns=9)
    environment = os.environ | {"FINETUNE_DATAFLOW_BLAS": "off"}
    command = [sys.executable, __file__, "--control"]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    shipped = json.loads(output.splitlines()[-1])
    for title, results in ((f"with {report.name} ({report.reason})", fast), ("as shipped", shipped)):
        print(f"{title}\n  {'shape':16} {'MLX':>8} {'NumPy':>8} GFLOP/s   MLX/NumPy")
        for row in results:
            print(f"  {row['shape']:16} {row['mlx']:8.1f} {row['numpy']:8.1f} {'':10} {row['ratio']:7.3f}")
    lowest = min(row["ratio"] for row in fast)
    print(f"lowest ratio {lowest}, in {time.perf_counter() - started:.0f} s")
    print(json.dumps({"blas": report.name, "threads": report.threads, "lowest": lowest, "fast": fast, "off": shipped}))


if __name__ == "__main__":
    main()
