"""The time and memory of the search for near-duplicates: `python benchmarks/near_duplicates.py [ROWS ...]`.

Each size runs in a process of its own: a tenth of the rows is compared with as many others, and the rest with both, as in a
split of 80 / 10 / 10. One row in a hundred is another one with a letter changed.
"""

from __future__ import annotations

import multiprocessing
import random
import resource
import string
import sys
import time

from finetune_dataflow.engine.near_duplicates import leaking_rows, near_rows

SIZES = (10_000, 100_000)
TEMPLATE = "table: {} columns: {}. question: {}"


def wikisql_like(count: int, seed: int) -> list[str]:
    """Texts of about 150 characters; ten of them name the same table, so many pairs have much in common."""
    draw = random.Random(seed)
    words = ["".join(draw.choices(string.ascii_lowercase, k=draw.randint(3, 9))) for _ in range(5000)]
    tables = [(draw.choice(words), ", ".join(draw.choices(words, k=8))) for _ in range(max(1, count // 10))]
    texts = [TEMPLATE.format(*draw.choice(tables), " ".join(draw.choices(words, k=10))) for _ in range(count)]
    for copy in range(0, count, 100):
        original = texts[draw.randrange(count)]
        texts[copy] = original[:-1] + "z"
    return texts


def measure(count: int) -> None:
    """Print a line for `count` rows split in three, and one for all of them against a tenth of as many."""
    texts = wikisql_like(count, seed=0)
    rows = list(enumerate(texts))
    ends = int(count * 0.8), int(count * 0.9)
    before = _peak_megabytes()
    start = time.perf_counter()
    dropped = leaking_rows(rows[: ends[0]], rows[ends[0] : ends[1]], rows[ends[1] :])
    seconds = time.perf_counter() - start
    memory = f"{_peak_megabytes():6,.0f} MB peak ({before:,.0f} before)"
    print(f"{count:>9,} rows split  {seconds:7.1f} s  {memory}  {len(dropped):,} dropped")
    against = texts[: count // 10]
    start = time.perf_counter()
    found = near_rows(texts, against)
    seconds = time.perf_counter() - start
    print(f"{count:>9,} x {len(against):,}  {seconds:7.1f} s  {_peak_megabytes():6,.0f} MB peak  {len(found):,} near", flush=True)


def _peak_megabytes() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def main() -> None:
    """Measure the sizes named on the command line, or the usual ones."""
    for count in [int(each) for each in sys.argv[1:]] or SIZES:
        process = multiprocessing.get_context("spawn").Process(target=measure, args=(count,))
        process.start()
        process.join()


if __name__ == "__main__":
    main()
