"""`mlx_lm.lora` under the conductor's windows: its own command's code path, `mlx_lm.lora.run`, on prompts and completions.

Its `train` takes the function that makes the batches as an argument; the one given here is its own, which pauses between
windows. With --same-blas this project's BLAS stands in front of MLX; without it MLX is as shipped.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from protocol import Answers, Windows, arguments, json_rows, peak_bytes, versions


def lora_arguments(settings: dict[str, Any], iters: int, adapter_path: Path, **others: Any) -> SimpleNamespace:
    """The arguments that the command makes of its defaults and options."""
    from mlx_lm.lora import CONFIG_DEFAULTS

    options = {
        "model": settings["model"], "data": settings["data"], "train": True, "mask_prompt": True, "optimizer": "adamw",
        "optimizer_config": {"adamw": {"weight_decay": settings["weight_decay"]}}, "num_layers": settings["layers"],
        "batch_size": settings["batch_size"], "iters": iters, "learning_rate": settings["learning_rate"],
        "lora_parameters": {"rank": settings["rank"], "dropout": 0.0, "scale": settings["scale"]},
        "adapter_path": str(adapter_path), "seed": settings["seed"],
    }  # fmt: skip
    return SimpleNamespace(**{**CONFIG_DEFAULTS, **options, **others})


def windows(answers: Answers, settings: dict[str, Any], blas: str) -> None:
    """Train for as long as windows are asked for."""
    import numpy as np
    from mlx_lm import lora
    from mlx_lm.tuner import trainer
    from mlx_lm.tuner.callbacks import TrainingCallback

    held: dict[str, Any] = {}
    about = {"blas": blas, "versions": versions("mlx", "mlx-lm")}
    handlers = {
        "generate": lambda: generated(settings, held["model"]),
        "generate_batched": lambda: generated_together(settings, held["model"]),
    }
    found = Windows(answers, about, handlers)

    class Losses(TrainingCallback):
        def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
            found.loss = float(train_info["train_loss"])

    def paused(**given: Any) -> Iterator[Any]:
        for batch, spans in trainer.iterate_batches(**given):
            starts, ends = np.array(spans).T
            found.step(ends, ends - starts)
            yield batch, spans

    def train(**given: Any) -> None:
        held["model"] = given["model"]
        trainer.train(**{**given, "training_callback": Losses(), "iterate_batches": paused})

    lora.train = train  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as directory:
        lora.run(lora_arguments(settings, 10**9, Path(directory)))


def generated(settings: dict[str, Any], model: Any) -> dict[str, Any]:
    """Greedy replies to the first prompts one after another by `stream_generate`, whose texts `mlx_lm.generate` joins."""
    from mlx_lm import stream_generate
    from mlx_lm.utils import load_tokenizer

    rows = json_rows(settings["validation"])[: settings["one_by_one"]]
    tokenizer = load_tokenizer(Path(settings["model"]))
    model.eval()
    started = time.perf_counter()
    tokens = sum(
        sum(1 for _ in stream_generate(model, tokenizer, row["input_ids"][: row["prompt_length"]], settings["max_tokens"]))
        for row in rows
    )
    seconds = time.perf_counter() - started
    model.train()
    return {"tokens": tokens, "replies": len(rows), "seconds": seconds, "peak_bytes": peak_bytes()}


def generated_together(settings: dict[str, Any], model: Any) -> dict[str, Any]:
    """Greedy replies to all prompts by mlx-lm's own `batch_generate`."""
    from mlx_lm import batch_generate
    from mlx_lm.utils import load_tokenizer

    rows = json_rows(settings["validation"])[: settings["prompts"]]
    tokenizer = load_tokenizer(Path(settings["model"]))
    model.eval()
    started = time.perf_counter()
    prompts = [row["input_ids"][: row["prompt_length"]] for row in rows]
    made = batch_generate(model, tokenizer, prompts, max_tokens=settings["max_tokens"], return_token_ids=True)
    seconds = time.perf_counter() - started
    model.train()
    tokens = sum(len(each) for each in made.token_ids or [])
    return {"tokens": tokens, "replies": len(rows), "seconds": seconds, "peak_bytes": peak_bytes()}


def final_loss(answers: Answers, settings: dict[str, Any]) -> None:
    """One epoch over the rows, then the validation loss of its last adapter."""
    from mlx_lm import load, lora

    updates = settings["rows"] // settings["batch_size"]
    warmup = int(settings["warmup"] * updates)
    schedule = {
        "name": "cosine_decay", "arguments": [settings["learning_rate"], updates - warmup], "warmup": warmup
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        started = time.perf_counter()
        lora.run(lora_arguments(settings, updates, Path(directory), lr_schedule=schedule))
        seconds, peak = time.perf_counter() - started, peak_bytes()
        model = load(settings["model"], adapter_path=directory)[0]
    loss = mean_loss(model, json_rows(settings["validation"]))
    answers.give(loss=loss, updates=updates, seconds=seconds, peak_bytes=peak)


def mean_loss(model: Any, rows: list[dict[str, Any]]) -> float:
    """The mean loss over all supervised tokens of the rows, in nats, a row at a time."""
    import mlx.core as mx
    import mlx.nn as nn
    import numpy as np

    model.eval()
    total, count = 0.0, 0
    for row in rows:
        labels = np.array(row["labels"][1:])
        learned = mx.array(np.flatnonzero(labels != -100))
        logits = model(mx.array([row["input_ids"][:-1]]))[0, learned]
        total += float(nn.losses.cross_entropy(logits, mx.array(labels)[learned], reduction="sum"))
        count += learned.size
    return total / count


def main() -> None:
    """Serve the conductor."""
    chosen, settings = arguments(__doc__ or "")
    answers, blas = Answers(), "as shipped"
    if chosen.same_blas:
        from finetune_dataflow.engine.cpu_runtime import load_fast_blas

        report = load_fast_blas()
        blas = f"{report.name} on {report.threads} threads"
    serve = partial(windows, blas=blas) if chosen.mode == "windows" else final_loss
    serve(answers, settings)


if __name__ == "__main__":
    main()
