"""What `run.py plan --probe` says of a fit, beside what the fit then takes: peak memory and seconds of three configurations.

`python benchmarks/probe.py` fits the embedded model on the example data, prints a table and, last, the same numbers as one
line of JSON. Every probe and every fit has a process of its own, one after another. A fit is cut short by iters right after
the first batch of the widest shape, so that it needs all the memory that a whole one would. The goal is a ratio of the
estimated to the measured peak from 0.8 to 1.2. Seconds depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent.parent / "example-support-dataset.json"
COMMON = {"data_path": str(DATA), "input_text_key": "question", "output_text_key": "reply", "val_batches": 2}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "LoRA, 16 layers, batches of 4": {"num_layers": 16, "batch_size": 4},
    "LoRA, all layers, batches of 8, checkpointing": {"num_layers": -1, "batch_size": 8, "grad_checkpoint": True},
    "full, 2 layers, batches of 2": {"fine_tune_type": "full", "num_layers": 2, "batch_size": 2},
}
LEAST_BATCHES = 4
LOW, HIGH = 0.8, 1.2


def prepared(name: str) -> dict[str, Any]:
    """Model directory, token columns and settings of a configuration, by the dataflow, as a run makes them."""
    from finetune_dataflow import engine
    from finetune_dataflow.cli.options import build_driver
    from finetune_dataflow.engine.batches import epoch_order, widths

    outputs = ["base_model_path", "train_tokens", "validation_tokens", "fit_settings"]
    made = build_driver("base").execute(outputs, inputs={**COMMON, **CONFIGURATIONS[name]})
    settings, train = made["fit_settings"], made["train_tokens"]
    ladder = widths(train.lengths)
    order = epoch_order(train, settings.loop.batch_size, settings.random_state, 0)
    second = ladder[-2] if len(ladder) > 1 else 0
    widest = next(place for place, rows in enumerate(order) if train.lengths[rows].max() - 1 > second)
    iters = max(widest + 1, LEAST_BATCHES)
    assert engine.fit_plan.fit_plan(settings, len(train), 1).batches >= iters
    return {**made, "fit_settings": replace(settings, loop=replace(settings.loop, iters=iters))}


def estimated(name: str) -> dict[str, float]:
    """What the probe says."""
    from finetune_dataflow.engine.probe import probe

    made = prepared(name)
    started = time.perf_counter()
    found = probe(made["base_model_path"], made["train_tokens"], made["validation_tokens"], made["fit_settings"])
    assert found.measured and found.seconds is not None, found
    took = time.perf_counter() - started
    return {"batches": found.batches, "peak": found.peak_memory_bytes, "seconds": found.seconds, "probe_seconds": took}


def measured(name: str) -> dict[str, float]:
    """What the fit takes."""
    from finetune_dataflow.engine.training import fit

    made = prepared(name)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        summary = fit(
            made["base_model_path"],
            made["train_tokens"],
            made["validation_tokens"],
            made["fit_settings"],
            Path(directory),
            {},
        )
    return {"peak": summary.peak_memory_bytes, "seconds": time.perf_counter() - started}


def main() -> None:
    """Run each configuration's probe and fit, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=2, metavar=("estimated|measured", "NAME"), help="one process's part, as a line of JSON")
    one = parser.parse_args().one
    if one is not None:
        print(json.dumps({"estimated": estimated, "measured": measured}[one[0]](one[1])))
        return
    results: list[dict[str, Any]] = []
    print(f"{'':46} {'peak, MiB':>20} {'':7} {'seconds':>20}")
    print(f"{'':46} {'estimated':>10}{'measured':>10} {'ratio':>6}  {'estimated':>10}{'measured':>10}  batches, probe's seconds")
    for name in CONFIGURATIONS:
        says, takes = (_in_a_process(kind, name) for kind in ("estimated", "measured"))
        ratio = says["peak"] / takes["peak"]
        results.append({"name": name, "estimated": says, "measured": takes, "ratio": round(ratio, 3)})
        print(
            f"{name:46} {says['peak'] / 2**20:10.0f}{takes['peak'] / 2**20:10.0f} {ratio:6.3f}  "
            f"{says['seconds']:10.0f}{takes['seconds']:10.0f}  {says['batches']}, {says['probe_seconds']:.0f}",
            flush=True,
        )
    print(json.dumps(results))
    sys.exit(any(not LOW <= each["ratio"] <= HIGH for each in results))


def _in_a_process(kind: str, name: str) -> dict[str, float]:
    """What a new process finds, which no memory of an earlier one can blur."""
    command = [sys.executable, __file__, "--one", kind, name]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, float] = json.loads(output.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
