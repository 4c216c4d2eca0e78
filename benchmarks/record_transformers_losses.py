"""Records the losses that Hugging Face transformers has on fixed tokens, for tests/test_transformers_losses.py.

`python -m benchmarks.record_transformers_losses` in the repository's root, in an environment of its own that has the project
with its development tools and, beside it, torch for the CPU: `pip install torch==2.13.0`. It writes
tests/recorded/transformers_losses.json in half a minute. The tests need neither torch nor this script.

Each model is a tiny one of two layers. Its weights have the names of transformers' own checkpoints, and NumPy draws them, so
the tests draw the same. transformers runs in float32 with eager attention, one row at a time and without padding. Its `.loss`
is the mean over the labels that are not -100, after a shift by one: the label at place n belongs to the logits at n - 1, and
the first one to none. What is recorded is that mean times the number of those labels. The script checks the sum against the
cross-entropy of the logits in float64.
"""

from __future__ import annotations

import json
import platform
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch  # type: ignore[import-not-found]  # the project does not depend on it
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from finetune_dataflow.engine.files import write_text
from finetune_dataflow.engine.tokens import IGNORED
from tests.architectures import ARCHITECTURES, VOCABULARY, write_architecture
from tests.recorded_losses import RECORDING, digest, draw_weights, write_model

LAYERS = 2
SEED = 20
PACKAGES = ("torch", "transformers", "numpy", "safetensors")
# Rows as spans of tokens, learned or not.
SPANS = (
    ((12, False), (7, True)),  # a prompt and its reply
    ((40, False), (1, True)),  # one token is learned
    ((5, False), (4, True), (6, False), (3, True), (2, False), (9, True)),  # replies between prompts
    ((23, True),),  # all is learned, but no logits predict its first token
    ((1, False), (1, True)),  # the shortest row that has a loss
    ((61, False), (30, True)),  # longer than any window
)
# Where a configuration of tests/architectures.py means two things to the two libraries: what is put in (None: taken out).
CHANGED: dict[str, dict[str, Any]] = {
    "mistral": {"layer_types": None, "sliding_window": None},
    "ministral3": {"layer_types": None, "sliding_window": None},
    "gemma": {"hidden_act": "gelu_python"},
}
REASONS = {
    "mistral": "Without a window: transformers slides every layer by sliding_window, mlx-lm only those that layer_types names, "
    "so the two differ on rows longer than the window of a checkpoint that has one.",
    "ministral3": "Without a window, for the same reason as mistral.",
    "gemma": "With transformers' exact GELU (gelu_python), which mlx-lm always takes. For Gemma's own checkpoints transformers "
    "takes the approximation by tanh, also where their configuration says gelu, so the losses here would differ by about 1e-4.",
    "gpt2": "Under the names of the published checkpoints: mlx-lm does not read the prefix `transformer.` that transformers "
    "writes.",
}
LEFT_OUT = {"openelm": "transformers has no such architecture of its own."}

Row = dict[str, list[int]]


def draw_rows() -> list[Row]:
    """The rows of SPANS: input_ids over the whole vocabulary, and labels, -100 where a token is not learned."""
    generator = np.random.default_rng(SEED)
    rows = []
    for spans in SPANS:
        learned = np.concatenate([np.full(length, each) for length, each in spans])
        ids = generator.integers(0, VOCABULARY, len(learned))
        rows.append({"input_ids": ids.tolist(), "labels": np.where(learned, ids, IGNORED).tolist()})
    return rows


def record(name: str, rows: list[Row]) -> dict[str, Any]:
    """What the test needs of one model: config, shapes of the weights, their digest, and the loss of every row in nats."""
    with tempfile.TemporaryDirectory() as scratch:
        config = _config(Path(scratch) / "config", name)
        empty = write_model(Path(scratch) / "empty", config, {})
        shapes = _shapes(empty, Path(scratch) / "shapes")
        if name == "gpt2":
            shapes = {key.removeprefix("transformer."): shape for key, shape in shapes.items()}
        weights = draw_weights(shapes, SEED)
        model = _load(write_model(Path(scratch) / "model", config, weights))
    losses = [_summed_loss(model, row) for row in rows]
    return {"config": config, "seed": SEED, "shapes": shapes, "weights_sha256": digest(weights), "losses": losses}


def supervised(row: Row) -> int:
    """The labels that logits predict: all that are not -100 but the first one."""
    return sum(label != IGNORED for label in row["labels"][1:])


def _config(directory: Path, name: str) -> dict[str, Any]:
    config = json.loads((write_architecture(directory, name, layers=LAYERS) / "config.json").read_text())
    config |= CHANGED.get(name, {})
    if config.get("layer_types", ()) is None:
        del config["layer_types"]
    return config


def _shapes(model: Path, scratch: Path) -> dict[str, list[int]]:
    """The names and shapes of the weights as transformers writes them: what is tied is written once."""
    made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    made.save_pretrained(scratch)
    with safe_open(scratch / "model.safetensors", "np") as weights:
        return {name: list(weights.get_slice(name).get_shape()) for name in sorted(weights.keys())}


def _load(directory: Path) -> Any:
    """The model in float32; RuntimeError where a weight was not read or was made up."""
    model, found = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    if any(found.values()):
        raise RuntimeError(f"transformers did not read {directory} as it is: {found}")
    return model.eval()


def _summed_loss(model: Any, row: Row) -> float:
    """The model's loss on a row, in nats, summed over its supervised labels; RuntimeError where its logits say otherwise."""
    ids, labels = (torch.tensor([row[key]]) for key in ("input_ids", "labels"))
    with torch.no_grad():
        output = model(input_ids=ids, labels=labels, use_cache=False)
    loss = output.loss.item() * supervised(row)
    scores = output.logits[0, :-1].double().log_softmax(-1).numpy()
    expected = -sum(scores[place, label] for place, label in enumerate(row["labels"][1:]) if label != IGNORED)
    if abs(loss - expected) > 1e-6 * expected:
        raise RuntimeError(f"transformers' loss is {loss}, but its logits make it {expected}")
    return loss


def _text(recording: dict[str, Any]) -> str:
    """The recording as JSON, broken into lines where a person looks for them."""
    made = {key: value for key, value in recording.items() if key not in ("rows", "models")}
    head = json.dumps(made, indent=2).removesuffix("\n}")
    rows = ",\n".join(f"    {json.dumps(row)}" for row in recording["rows"])
    models = ",\n".join(f"    {json.dumps(name)}: {_model_text(each)}" for name, each in recording["models"].items())
    return f'{head},\n  "rows": [\n{rows}\n  ],\n  "models": {{\n{models}\n  }}\n}}\n'


def _model_text(model: dict[str, Any]) -> str:
    lines = ",\n".join(f"      {json.dumps(key)}: {json.dumps(value)}" for key, value in model.items())
    return f"{{\n{lines}\n    }}"


def main() -> None:
    """Record every architecture of tests/architectures.py that transformers has, too."""
    rows = draw_rows()
    models = {}
    for name in ARCHITECTURES:
        if name not in LEFT_OUT:
            models[name] = record(name, rows)
            print(f"{name}: {sum(models[name]['losses']) / sum(map(supervised, rows)):.4f} nats a token")
    recording = {
        "made_by": "python -m benchmarks.record_transformers_losses",
        "made_on": datetime.now(UTC).date().isoformat(),
        "made_with": {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
        "machine": f"{platform.system()} {platform.machine()}, CPU, float32, eager attention, row by row without padding",
        "losses_are": "nats, summed over the supervised labels after the shift by one; row by row in the order of rows",
        "notes": REASONS,
        "left_out": LEFT_OUT,
        "supervised_tokens": [supervised(row) for row in rows],
        "rows": rows,
        "models": models,
    }
    print(f"Written: {write_text(RECORDING, _text(recording))}")


if __name__ == "__main__":
    main()
