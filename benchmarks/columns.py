"""Time and memory of preparing data: `python benchmarks/columns.py [ROWS ...] [--fit] [--near-duplicates] [--repeat N]`.

Every measurement runs in a process of its own, with a cache directory of its own. Rows are like WikiSQL's: a table's columns
and a question, answered by a query; about 93 tokens, 30 of them learned, with the embedded model's tokenizer.

The reference is the tokenizer's own `encode_batch` over the same rendered prompts and replies, timed alone: no reading, no
rendering, no labels, nothing stored. It alternates with our preparation, which counts all of that and the split.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

from finetune_dataflow import engine
from finetune_dataflow.embedded_model import embedded_model_directory

SIZES = (10_000, 100_000, 1_000_000)
ONCE = 1_000_000  # rows from which a measurement is made once
TOKENS = ("train_tokens", "validation_tokens", "hold_out_tokens")
OTHERS = ("row_ledger", "label_audit", "hold_out_audit")
UNCOUNTED = ("base_model_path",)  # finding the model has nothing to do with the rows

NOUNS = [
    "player", "country", "year", "position", "school", "team", "season", "episode", "title", "director", "writer",
    "date", "score", "result", "opponent", "location", "attendance", "record", "points", "goals", "rank", "driver",
    "constructor", "laps", "grid", "party", "district", "incumbent", "candidate", "artist", "song", "album", "label",
    "format", "region", "population", "area", "density", "capital", "language", "network", "station", "channel",
    "frequency", "owner", "class", "model", "engine", "power", "torque", "weight", "length", "height", "speed",
    "price", "winner", "venue", "city", "state", "county", "judge", "category", "award", "nominee", "film", "role",
    "character", "actor", "series", "studio", "company", "founder", "industry", "revenue", "profit", "employees",
    "headquarters", "airport", "runway", "code", "airline",
]  # fmt: skip
VALUES = [
    "Canada", "France", "Butler", "Michigan", "Toronto", "Guard", "Forward", "Ferrari", "Williams", "Democratic",
    "Republican", "Chelsea", "Arsenal", "Liverpool", "January", "March", "August", "October", "Nashville", "Memphis",
    "Portland", "Denver", "Seattle", "Wisconsin", "Ohio", "Texas", "Florida", "Oregon", "Virginia", "Lakers", "Bulls",
    "Celtics", "Rockets", "Spurs", "Hawks", "Kings", "Wolves", "Tigers", "Panthers", "Giants",
]  # fmt: skip
QUESTIONS = (
    "What is the {0} when the {1} is {3} and the {2} is more than {4}?",
    "How many {0} are listed for {3} as {1} with a {2} above {4}?",
    "Which {0} has {3} for {1} and over {4} in the column {2}?",
    "Name the {0} of those whose {1} was {3} if their {2} exceeded {4}.",
)


def write_rows(path: Path, count: int, seed: int = 0) -> None:
    """Write `count` rows as JSON lines, the same for the same seed."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as handle:
        for number in range(count):
            columns = draw.sample(NOUNS, 5)
            first, second, third = draw.sample(columns, 3)
            value, limit = f"{draw.choice(VALUES)} {draw.choice(VALUES)}", draw.randint(1, 99_999)
            asked = draw.choice(QUESTIONS).format(first, second, third, value, limit)
            question = f"Table {number}: {', '.join(columns)}\n{asked}"
            query = f"SELECT {first}, {second} FROM table WHERE {second} = '{value}' AND {third} > {limit} ORDER BY {first}"
            handle.write(json.dumps({"question": question, "query": query}) + "\n")


class _Times:
    """The seconds of every node that Hamilton runs."""

    def __init__(self) -> None:
        from hamilton.lifecycle import NodeExecutionHook

        seconds: dict[str, float] = {}

        class Clock(NodeExecutionHook):
            def run_before_node_execution(self, *, node_name: str, **_: Any) -> None:
                seconds[node_name] = time.perf_counter()

            def run_after_node_execution(self, *, node_name: str, **_: Any) -> None:
                seconds[node_name] = time.perf_counter() - seconds[node_name]

        self.seconds, self.hook = seconds, Clock()


def prepare(path: str, model: str, everything: bool = False) -> dict[str, Any]:
    """Prepare the rows by the graph; seconds by node, tokens and peak memory."""
    from hamilton import driver

    from finetune_dataflow import audit, base_model, dataset, prompts, splits, tokenization

    modules = (dataset, splits, prompts, base_model, tokenization, audit)
    times = _Times()
    engine.chat.load_encoder(Path(model))
    built = driver.Builder().with_config({"start": "base"}).with_modules(*modules).with_adapters(times.hook).build()
    inputs = {"data_path": path, "model_id": model, "input_text_key": "question", "output_text_key": "query",
              "near_duplicates": "keep"}  # fmt: skip
    before = time.process_time()
    made = built.execute([*TOKENS, *(OTHERS if everything else ())], inputs=inputs)
    processor = time.process_time() - before
    tokens = [made[name] for name in TOKENS]
    return {
        "seconds": times.seconds,
        "processor": processor,
        "tokens": sum(int(each.offsets[-1]) for each in tokens),
        "supervised": sum(each.supervised for each in tokens),
        "peak": status("VmHWM"),
    }


def reference(path: str, model: str) -> dict[str, Any]:
    """The seconds of `encode_batch` over the same texts, in pieces of 10,000 rows so that they fit into memory."""
    encoder = engine.chat.load_encoder(Path(model))
    backend = encoder.tokenizer.backend_tokenizer
    before, after = encoder.rendered([{"role": "user", "content": "\ue000"}]).split("\ue000")
    seconds, processor, rows = 0.0, 0.0, []
    with Path(path).open(encoding="utf-8") as handle:
        for line in handle:
            rows.append(json.loads(line))
            if len(rows) == 10_000:
                measured = _encoded(backend, rows, before, after)
                seconds, processor, rows = seconds + measured[0], processor + measured[1], []
    measured = _encoded(backend, rows, before, after) if rows else (0.0, 0.0)
    return {"seconds": seconds + measured[0], "processor": processor + measured[1]}


def _encoded(backend: Any, rows: list[dict[str, str]], before: str, after: str) -> tuple[float, float]:
    """Seconds and processor seconds."""
    prompts, replies = [before + row["question"] + after for row in rows], [row["query"] for row in rows]
    started, processor = time.perf_counter(), time.process_time()
    backend.encode_batch(prompts, add_special_tokens=False)
    backend.encode_batch(replies, add_special_tokens=False)
    return time.perf_counter() - started, time.process_time() - processor


def near_duplicates(path: str, model: str) -> dict[str, Any]:
    """The seconds of the search for near-duplicates among the rows, split as by default."""
    rows = engine.records.table(
        engine.shapes.records(engine.sources.read_source(path), engine.shapes.ShapeSettings("auto", "question", "query"))
    )
    settings = engine.settings.SplitSettings(42, 0.8, 0.1, "drop")
    sides = engine.splitting.sides(rows, settings)
    started = time.perf_counter()
    dropped = engine.splitting.leaking_rows(rows, sides, settings)
    return {"seconds": time.perf_counter() - started, "dropped": len(dropped), "peak": status("VmHWM")}


def tiny_llama(directory: Path, vocabulary: int) -> Path:
    """A random llama of two layers of width 32 with so many tokens: the fit's own memory is small beside that of the rows."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models import llama

    config = {
        "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 4,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": vocabulary, "rope_theta": 10000.0,
        "max_position_embeddings": 512, "tie_word_embeddings": True, "architectures": ["LlamaForCausalLM"],
    }  # fmt: skip
    directory.mkdir(parents=True)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    mx.save_safetensors(str(directory / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def fit(train: str, validation: str, started: float, steps: int = 200) -> dict[str, Any]:
    """Fit a tiny model on prepared columns; resident memory after steps, and seconds from `started` to the first."""
    import mlx.core as mx

    from finetune_dataflow.engine import training
    from finetune_dataflow.engine.fit_settings import FitSettings, LoopSettings, MethodSettings, OptimizerSettings
    from finetune_dataflow.engine.shards import opened

    found: dict[str, Any] = {"resident": {}}

    class Watch(training.Bar):
        def advance(self, steps: int = 1, figures: str = "") -> None:
            super().advance(steps, figures)
            if "first" not in found:
                found["first"] = time.time() - started
            if self._done in (20, 100, steps_in_all):
                found["resident"][self._done] = status("VmRSS")

    steps_in_all = steps
    training.Bar = Watch  # type: ignore[misc]  # its steps are the fit's
    mx.set_cache_limit(0)  # what MLX keeps of freed buffers is not the rows' memory
    columns = opened(Path(train)), opened(Path(validation))
    with tempfile.TemporaryDirectory() as directory:
        model = tiny_llama(Path(directory) / "model", vocabulary=49_152)
        loop = LoopSettings(iters=steps, batch_size=4, val_batches=25, steps_per_eval=steps)
        settings = FitSettings(MethodSettings(num_layers=2), OptimizerSettings(), loop)
        training.fit(model, *columns, settings, Path(directory) / "run", {})
    return {**found, "rows": len(columns[0])}


def fit_line(count: int, model: str, directory: Path) -> None:
    """Prepare rows twice in one cache, then print what a fit over them takes."""
    path, cache = directory / f"{count}.jsonl", directory / "cache"
    write_rows(path, count)
    alone(prepare, str(path), model, cache=str(cache))
    again = sum(alone(prepare, str(path), model, cache=str(cache))["seconds"].values())
    print(f"{count:>9,} rows  {again:.1f} s to the tokens where they are prepared", flush=True)
    kept = sorted((cache / "tokens").glob("*/input_ids.bin"), key=lambda each: -each.stat().st_size)
    fitted_line(str(kept[0].parent), str(kept[1].parent))


def fitted_line(train: str, validation: str) -> None:
    """Print what a fit over prepared columns takes."""
    found = alone(fit, train, validation, time.time())
    resident = ", ".join(f"{each:,.0f} MB after step {step}" for step, each in found["resident"].items())
    print(f"{found['rows']:>9,} training rows  first step after {found['first']:.1f} s; resident {resident}", flush=True)


def status(name: str) -> float:
    """A figure of /proc/self/status (VmRSS, VmHWM) in megabytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024 / 1e6


def alone(measure: Callable[..., dict[str, Any]], *given: Any, cache: str | None = None) -> dict[str, Any]:
    """What `measure` returns in a process of its own, whose cache directory is an empty one unless it is given."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as empty:
        answers: Queue[dict[str, Any]] = context.Queue()
        before = os.environ.get("FINETUNE_DATAFLOW_CACHE")
        os.environ["FINETUNE_DATAFLOW_CACHE"] = cache or empty
        try:
            process = context.Process(target=_answer, args=(answers, measure, given))
            process.start()
            answer = answers.get()
            process.join()
        finally:
            del os.environ["FINETUNE_DATAFLOW_CACHE"]
            if before is not None:
                os.environ["FINETUNE_DATAFLOW_CACHE"] = before
    if "error" in answer:
        raise RuntimeError(answer["error"])
    return answer


def _answer(answers: Queue[dict[str, Any]], measure: Callable[..., dict[str, Any]], given: tuple[Any, ...]) -> None:
    import traceback

    try:
        answers.put(measure(*given))
    except Exception:
        answers.put({"error": traceback.format_exc()})


def table(sizes: list[int], repeat: int, model: str, directory: Path) -> None:
    """Print the scale table."""
    for count in sizes:
        path = directory / f"{count}.jsonl"
        write_rows(path, count)
        ours, theirs = [], []
        for _ in range(1 if count >= ONCE else repeat):
            ours.append(alone(prepare, str(path), model))
            theirs.append(alone(reference, str(path), model))
        whole = alone(prepare, str(path), model, True)
        path.unlink()
        totals = [sum(value for name, value in each["seconds"].items() if name not in UNCOUNTED) for each in ours]
        seconds, reference_seconds = statistics.median(totals), statistics.median(each["seconds"] for each in theirs)
        ratio = statistics.median(other["seconds"] / own for own, other in zip(totals, theirs, strict=True))
        processor = statistics.median(other["processor"] / own["processor"] for own, other in zip(ours, theirs, strict=True))
        peak = max(each["peak"] for each in ours)
        print(
            f"{count:>9,} rows  {seconds:7.1f} s  {count / seconds:8,.0f} rows/s  encode_batch {reference_seconds:6.1f} s  "
            f"ratio {ratio:.2f} ({processor:.2f} of processor time)  "
            f"peak {peak:5,.0f} MB (with ledger and audits {whole['peak']:5,.0f} MB)  "
            f"{ours[0]['tokens'] / count:.1f} tokens a row, {ours[0]['supervised'] / count:.1f} learned"
        )
        stages = {**whole["seconds"], **ours[-1]["seconds"]}
        told = [f"{name} {value:.1f}" for name, value in stages.items() if value >= 0.05 and name not in UNCOUNTED]
        print(f"{'':9}  {', '.join(told)}", flush=True)


def near_duplicate_lines(sizes: list[int], model: str, directory: Path) -> None:
    """Print the time of the search for near-duplicates, up to the size at which it is on unasked."""
    for count in [size for size in sizes if size <= engine.splitting.MOST_SEARCHED]:
        path = directory / f"{count}.jsonl"
        write_rows(path, count)
        found = alone(near_duplicates, str(path), model)
        path.unlink()
        print(f"{count:>9,} rows  near-duplicates {found['seconds']:6.1f} s  {found['dropped']:,} dropped", flush=True)


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", metavar="ROWS", nargs="*", type=int)
    parser.add_argument("--repeat", type=int, default=3, help="times each size below a million is measured")
    parser.add_argument("--near-duplicates", action="store_true", help="time the search for near-duplicates instead")
    parser.add_argument("--fit", action="store_true", help="200 steps of a fit over the rows instead (a million by default)")
    chosen = parser.parse_args()
    model = str(embedded_model_directory())
    with tempfile.TemporaryDirectory() as directory:
        sizes = chosen.sizes or list(SIZES)
        if chosen.fit:
            for count in chosen.sizes or [ONCE]:
                fit_line(count, model, Path(directory))
        elif chosen.near_duplicates:
            near_duplicate_lines(sizes, model, Path(directory))
        else:
            table(sizes, chosen.repeat, model, Path(directory))


if __name__ == "__main__":
    main()
