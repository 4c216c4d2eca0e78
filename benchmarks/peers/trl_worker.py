"""TRL's SFTTrainer with PEFT on PyTorch's CPU build under the conductor's windows: the real trainer, paused between steps.

The loss is on completions alone and in float32; rows are grouped by length, which pads less than the default order, and
gradient checkpointing, which the trainer has on by itself and which costs time, is off.
"""

from __future__ import annotations

import os
import tempfile
import time
from typing import Any

from protocol import Answers, Windows, arguments, json_rows, peak_bytes, versions

os.environ["HF_HUB_OFFLINE"] = "1"


def trainer(settings: dict[str, Any], directory: str, windows: Windows | None) -> Any:
    """The trainer over the rows: without windows for one epoch, with them without end."""
    import torch  # type: ignore[import-not-found,unused-ignore]
    from datasets import Dataset
    from peft import LoraConfig  # type: ignore[import-not-found,unused-ignore]
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer  # type: ignore[import-not-found,unused-ignore]

    class Paced(SFTTrainer):  # type: ignore[misc,unused-ignore]
        def training_step(self, model: Any, inputs: dict[str, Any], *others: Any, **named: Any) -> Any:
            if windows is None:
                return super().training_step(model, inputs, *others, **named)
            windows.step(inputs["attention_mask"].sum(1).tolist(), (inputs["labels"] != -100).sum(1).tolist())
            loss = super().training_step(model, inputs, *others, **named)
            windows.loss = float(loss)
            return loss

    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    blocks = model.config.num_hidden_layers
    names = {name.rpartition(".")[2] for name, part in model.model.layers.named_modules() if isinstance(part, torch.nn.Linear)}
    adapter = LoraConfig(
        r=settings["rank"],
        lora_alpha=settings["scale"] * settings["rank"],
        lora_dropout=0.0,
        target_modules=sorted(names),
        layers_to_transform=list(range(blocks - settings["layers"], blocks)),
        task_type="CAUSAL_LM",
    )
    updates = -(-settings["rows"] // settings["batch_size"])
    length = (
        {"num_train_epochs": 1, "lr_scheduler_type": "cosine", "warmup_steps": int(settings["warmup"] * updates)}
        if windows is None
        else {"max_steps": 10**9, "lr_scheduler_type": "constant"}
    )
    config = SFTConfig(
        output_dir=directory,
        per_device_train_batch_size=settings["batch_size"],
        learning_rate=settings["learning_rate"],
        weight_decay=settings["weight_decay"],
        completion_only_loss=True,
        train_sampling_strategy="group_by_length",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        seed=settings["seed"],
        **length,
    )
    rows = [
        {"prompt": [{"role": "user", "content": row["prompt"]}],
         "completion": [{"role": "assistant", "content": row["completion"]}]}
        for row in json_rows(f"{settings['data']}/train.jsonl")
    ]  # fmt: skip
    return Paced(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(settings["model"]),
        peft_config=adapter,
    )


def mean_loss(model: Any, rows: list[dict[str, Any]]) -> float:
    """The mean loss over all supervised tokens of the rows, in nats, a row at a time."""
    import torch

    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            labels = torch.tensor(row["labels"][1:])
            learned = labels != -100
            logits = model(input_ids=torch.tensor([row["input_ids"][:-1]])).logits[0, learned]
            total += float(torch.nn.functional.cross_entropy(logits, labels[learned], reduction="sum"))
            count += int(learned.sum())
    return total / count


def main() -> None:
    """Serve the conductor."""
    chosen, settings = arguments(__doc__ or "")
    answers = Answers()
    import torch

    torch.set_num_threads(settings["threads"])
    about = {"blas": f"PyTorch's own on {torch.get_num_threads()} threads"}
    with tempfile.TemporaryDirectory() as directory:
        os.environ["HF_DATASETS_CACHE"] = directory
        if chosen.mode == "windows":
            about_it = {**about, "versions": versions("torch", "trl", "peft", "transformers", "accelerate")}
            trainer(settings, directory, Windows(answers, about_it, {})).train()
            return
        fitted = trainer(settings, directory, None)
        started = time.perf_counter()
        fitted.train()
        seconds, peak = time.perf_counter() - started, peak_bytes()
        loss = mean_loss(fitted.model, json_rows(settings["validation"]))
        answers.give(loss=loss, updates=fitted.state.global_step, seconds=seconds, peak_bytes=peak)


if __name__ == "__main__":
    main()
