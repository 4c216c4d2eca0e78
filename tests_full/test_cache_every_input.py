"""Every input of the graph is changed, one at a time: what depends on it runs again, nothing else does, the result is right."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hamilton import driver

import finetune_dataflow
from tests.cached_runs import ANEW, cached_driver, executed, results_of
from tests.tiny_model import write_tiny_model

REPOSITORY = Path(__file__).parent.parent
ROWS = [
    {"question": f"What is number {n}?", "reply": f"It is {n * 7 % 50}, of course.", "more": f"See {n}.", "who": f"{n // 2}"}
    for n in range(60)
]

# Another value for each input; "{place}" is a directory with the files named here.
CHANGES: dict[str, Any] = {
    "assistant_turns": "last",
    "batch_size": 8,
    "best_metric": "rougeL",
    "best_metric_rows": 3,
    "bleu_tokenizer": "char",
    "build_prompt": None,
    "clear_cache_threshold": 0,
    "colorize": True,
    "context_key": "more",
    "context_template": None,
    "data_path": "{place}/other.json",
    "early_stopping_patience": 1,
    "epochs": 2.0,
    "evals_per_epoch": 1,
    "few_shot_count": None,
    "few_shot_file": "{place}/shots.json",
    "fine_tune_type": "dora",
    "frozen_states_gb": 0.0,
    "generation_batch_size": 2,
    "grad_accumulation_steps": 2,
    "grad_checkpoint": True,
    "group_key": "who",
    "input_template": "Q: {{input}}",
    "input_text_key": "more",
    "iters": None,
    "keep_checkpoints": 1,
    "learning_rate": 0.02,
    "learning_schedule": {"type": "constant"},
    "long_rows": "drop",
    "loom_file": None,
    "loom_language": None,
    "loom_markers": None,
    "lora_dropout": 0.1,
    "lora_keys": ["self_attn.q_proj"],
    "lora_rank": 4,
    "lora_scale": 10.0,
    "loraplus_lr_ratio": 2.0,
    "lr_schedule": {"name": "cosine_decay", "arguments": [0.01, -1]},
    "mask_prompt": False,
    "max_grad_norm": 0.1,
    "max_seq_length": 64,
    "max_tokens": 5,
    "metrics": ["{place}/own.py:length"],
    "min_p": None,
    "model_id": "{place}/other-model",
    "near_duplicates": "keep",
    "num_layers": 1,
    "object_format": "labelled",
    "optimizer": "lion",
    "optimizer_config": {"adamw": {"eps": 1e-06}},
    "output_dir": "{place}/elsewhere",
    "output_text_key": "more",
    "prompt": "What?",
    "prompt_format": "mistral",
    "project_name": None,
    "quantize_bits": 4,
    "quantize_group_size": None,
    "random_state": 2,
    "reuse_replies": False,
    "report_to": "none",
    "response_template": "A: {{response}}",
    "resume_adapter_file": "{place}/weights.safetensors",
    "row_shape": "key_mapping",
    "save_adapter_to": "{place}/copy",
    "save_every": 2,
    "saves_per_epoch": 2,
    "steps_per_eval": 3,
    "steps_per_report": 2,
    "strict": True,
    "system_prompt": "Be brief.",
    "temperature": 0.7,
    "top_k": None,
    "top_p": None,
    "train_size": 0.7,
    "train_type": "self-supervised",
    "use_rslora": True,
    "val_batches": 1,
    "validation_size": 0.15,
    "validation_interval_proportion": 0.4,
    "validations_per_train_item": 0.1,
    "reporting_interval_proportion": 0.5,
    "adapter_save_interval_proportion": 0.5,
    "warmup_proportion": 0.3,
    "weight_decay": 0.1,
}
ONLY_AFTER_THE_FIT = ("prompt", "colorize", "save_adapter_to")  # in the same directory, which holds the fit already
# Those that mean something together with another alone.
TOGETHER: dict[str, dict[str, Any]] = {
    "few_shot_count": {"few_shot_file": "{place}/shots.json", "few_shot_count": 1},
    "context_template": {"context_key": "more", "context_template": "({{context}})"},
    "iters": {"epochs": None, "iters": 5},
    "quantize_group_size": {"quantize_bits": 4, "quantize_group_size": 32},
    "min_p": {"temperature": 0.7, "min_p": 0.2},
    "top_k": {"temperature": 0.7, "top_k": 5},
    "top_p": {"temperature": 0.7, "top_p": 0.5},
    "loom_file": {"loom_file": "{place}/loom.toml", "build_prompt": "system question"},
    "build_prompt": {"loom_file": "{place}/loom.toml", "build_prompt": "other question"},
    "loom_markers": {"loom_file": "{place}/loom.toml", "build_prompt": "marked question", "loom_markers": "mood=[kind]"},
    "loom_language": {"loom_file": "{place}/loom.toml", "build_prompt": "system question", "loom_language": "en"},
    "weight_decay": {"weight_decay": 0.1},
}
LOOM = """
lang = "en"
[system]
_ = "Be brief."
[other]
_ = "Be long."
[marked]
_ = "Be {mood}."
_m = ["mood"]
[question]
_ = "{input}"
_m = ["input"]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("every-input")
    (directory / "rows.json").write_text(json.dumps(ROWS))
    (directory / "own.py").write_text("def length(predictions, references):\n    return [len(each) for each in predictions]\n")
    (directory / "other.json").write_text(json.dumps(ROWS[5:]))
    (directory / "shots.json").write_text(json.dumps([{"input": "How?", "output": "So."}, {"input": "Why?", "output": "Thus."}]))
    (directory / "loom.toml").write_text(LOOM)
    write_tiny_model(directory / "model")
    write_tiny_model(directory / "other-model", seed=3)
    return directory


@pytest.fixture(scope="module")
def inputs(place: Path) -> dict[str, Any]:
    return {
        "data_path": str(place / "rows.json"), "input_text_key": "question", "output_text_key": "reply", "max_tokens": 4,
        "model_id": str(place / "model"), "output_dir": str(place / "run"), "num_layers": 2, "epochs": 1.0, "learning_rate": 0.01,
    }  # fmt: skip


@pytest.fixture(scope="module")
def base_cache(place: Path, inputs: dict[str, Any]) -> Path:
    results_of(cached_driver(place / "cache"), inputs)
    shutil.copy(place / "run" / "adapters" / "adapters.safetensors", place / "weights.safetensors")
    return place / "cache"


def descendants(name: str) -> set[str]:
    """Every node that depends on an input."""
    nodes = driver.Builder().with_config({"start": "base"}).with_modules(finetune_dataflow).build().graph.nodes
    found, waiting = set(), [nodes[name]]
    while waiting:
        for node in waiting.pop().depended_on_by:
            if node.name not in found:
                found.add(node.name)
                waiting.append(node)
    return found


def filled(value: Any, place: Path) -> Any:
    if isinstance(value, list):
        return [filled(each, place) for each in value]
    return value.replace("{place}", str(place)).replace("{{", "{").replace("}}", "}") if isinstance(value, str) else value


def test_every_input_is_changed_here() -> None:
    nodes = driver.Builder().with_config({"start": "base"}).with_modules(finetune_dataflow).build().graph.nodes.values()
    assert {node.name for node in nodes if node.user_defined and node.name != "start"} == {*CHANGES}


@pytest.mark.parametrize("name", CHANGES)
def test_what_depends_on_a_changed_input_runs_again_and_nothing_else(
    name: str, place: Path, inputs: dict[str, Any], base_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = shutil.copytree(base_cache, tmp_path / "cache")
    changes = {key: filled(value, place) for key, value in TOGETHER.get(name, {name: CHANGES[name]}).items()}
    changed = {key: value for key, value in {**inputs, **changes}.items() if value is not None}
    if name not in ("output_dir", *ONLY_AFTER_THE_FIT):
        changed["output_dir"] = str(tmp_path / "run")
    dr = cached_driver(cache)
    cached = results_of(dr, changed)
    ran = executed(dr) - ANEW
    allowed = set().union(*(descendants(each) for each in changes))
    assert ran <= allowed, f"ran without need: {sorted(ran - allowed)}"
    plain = {**changed, "output_dir": str(tmp_path / "plain")}
    if name == "save_adapter_to":
        plain["save_adapter_to"] = str(tmp_path / "copy")
    uncached = results_of(driver.Builder().with_config({"start": "base"}).with_modules(finetune_dataflow).build(), plain)
    assert cached == uncached
    with capsys.disabled():
        print(f"\n{name:34} {len(ran):3} nodes ran of {len(allowed - ANEW):3} that depend on it; equal to uncached", end="")


HELPERS = {
    "rouge": ({"validation_base_scores", "hold_out_tuned_scores"}, {"finished_fit", "train_tokens", "hold_out_base_replies"}),
    "paired": ({"hold_out_comparison"}, {"finished_fit", "train_tokens", "hold_out_base_scores", "hold_out_base_replies"}),
    "quality": ({"data_quality"}, {"train_tokens", "records", "hold_out_base_replies"}),
}


@pytest.mark.parametrize("helper", HELPERS)
def test_another_helper_runs_again_what_uses_it(helper: str, inputs: dict[str, Any], tmp_path: Path) -> None:
    """In a copy of the package, whose helper gets one more statement."""
    shutil.copytree(REPOSITORY / "finetune_dataflow", tmp_path / "finetune_dataflow")
    shutil.copytree(REPOSITORY / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        "import json, sys; from pathlib import Path; from tests.cached_runs import cached_driver, executed, results_of\n"
        "inputs = json.loads(sys.argv[1]); dr = cached_driver(Path('cache'))\n"
        "found = results_of(dr, inputs); print(json.dumps([found, sorted(executed(dr))]))"
    )
    given = json.dumps({**inputs, "output_dir": str(tmp_path / "run")})

    def run() -> tuple[dict[str, str], set[str]]:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        command = [sys.executable, "-c", code, given]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        found, ran = json.loads(done.stdout.splitlines()[-1])
        return found, set(ran)

    before, _ = run()
    path = tmp_path / "finetune_dataflow" / "engine" / f"{helper}.py"
    path.write_text(path.read_text() + "\n# a remark\n")
    assert not run()[1] - ANEW  # a comment is no change
    path.write_text(path.read_text() + "\nONE_MORE = 1\n")
    after, ran = run()
    again, kept = HELPERS[helper]
    assert after == before and again <= ran and not kept & (ran - ANEW)
