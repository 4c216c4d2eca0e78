"""The fit's options at the command line: what runs, what is refused and how it is said."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import yaml

from finetune_dataflow.cli import main
from finetune_dataflow.cli.train import reply_lines
from finetune_dataflow.engine.replies import PromptReply, StreamedToken
from tests.architectures import write_architecture
from tests.fit_values import adapter_digest, history

REPOSITORY = Path(__file__).parent.parent

MLX_LM = """
model: {model}
train: true
fine_tune_type: lora
optimizer: adamw
optimizer_config: {{adamw: {{betas: [0.9, 0.98], eps: 1e-6, weight_decay: 0.02, bias_correction: true}}}}
data: {data}
seed: 0
num_layers: 2
batch_size: 4
iters: 20
val_batches: 25
learning_rate: 1e-3
steps_per_report: 10
steps_per_eval: 5
resume_adapter_file: null
adapter_path: {out}/adapters-of-mlx-lm
save_every: 10
test: false
test_batches: 100
max_seq_length: 128
grad_checkpoint: true
grad_accumulation_steps: 2
clear_cache_threshold: 1GB
mask_prompt: true
report_to: null
project_name: null
trust_remote_code: false
lora_parameters:
  keys: [self_attn.q_proj, self_attn.v_proj]
  rank: 8
  scale: 20.0
  dropout: 0.0
lr_schedule:
  name: cosine_decay
  warmup: 2
  warmup_init: 1e-7
  arguments: [1e-3, 10, 1e-7]
input_text_key: question
output_text_key: reply
max_tokens: 4
"""
TUNING_FORK = """
model: {model}
data: {data}
train: true
num_layers: 2
epochs: 2
iters: -1
batch_size: 8
learning_rate: 1e-3
learning_schedule: {{type: cosine_w_warmup, start_lr: 1e-8, warmup_proportion: 0.2, min_lr: 1e-6, cycle_length: -1}}
reporting_interval_proportion: 0.5
validation_interval_proportion: 0.5
validations_per_train_item: 0.1
adapter_save_interval_proportion: 0.5
lora_parameters: {{rank: 4, alpha: 16, dropout: 0.0, scale: 10.0}}
prompt: What is amber?
colorize: true
num_tokens: 4
input_text_key: question
output_text_key: reply
"""


@pytest.fixture
def words(inputs: dict[str, Any]) -> list[str]:
    """A short run that works."""
    values = {**inputs, "epochs": 1.0, "max_tokens": 4}
    return ["train", *(word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value)))]


def said(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What a command that must end with exit code 2 says, a problem a line."""
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error[error.index("Error: ") + len("Error: ") :].splitlines()


def written(text: str, path: Path, **values: object) -> Path:
    path.write_text(text.format(**values))
    return path


def test_a_yaml_of_mlx_lms_format_runs_as_it_is(tiny_model: Path, data_file: Path, tmp_path: Path) -> None:
    config = written(MLX_LM, tmp_path / "lora_config.yaml", model=tiny_model, data=data_file, out=tmp_path)
    assert main(["train", "-c", str(config), "--out", str(tmp_path / "run")]) == 0
    made = json.loads((tmp_path / "run" / "adapters" / "adapter_config.json").read_text())
    assert made["lora_parameters"] == {
        "rank": 8, "scale": 20.0, "dropout": 0.0, "keys": ["self_attn.q_proj", "self_attn.v_proj"]
    }  # fmt: skip
    assert [each["step"] for each in history(tmp_path / "run", "validation")] == [0, 5, 10]
    rates = [each["learning_rate"] for each in history(tmp_path / "run", "train")]
    assert rates == pytest.approx([1e-3 * 0.5 * (1 + np.cos(np.pi * 6 / 10)) + 1e-7 * 0.5 * (1 - np.cos(np.pi * 6 / 10))])
    assert adapter_digest(tmp_path / "run") == adapter_digest(tmp_path, "adapters-of-mlx-lm")


def test_a_yaml_of_mlx_tuning_forks_format_runs_as_it_is(
    tiny_model: Path, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = written(TUNING_FORK, tmp_path / "fork.yaml", model=tiny_model, data=data_file)
    assert main(["train", "-c", str(config), "--out", str(tmp_path / "run")]) == 0
    train = history(tmp_path / "run", "train")
    updates = train[-1]["step"] // 2  # of an epoch
    assert [each["step"] for each in train] == [*range(round(updates / 2), 2 * updates, round(updates / 2)), 2 * updates]
    assert train[-1]["learning_rate"] == pytest.approx(1e-6)  # min_lr after the cycle of one epoch
    assert "> What is amber?" in capsys.readouterr().out


def test_the_resolved_configuration_of_a_run_is_that_run(
    tiny_model: Path, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = written(MLX_LM, tmp_path / "lora_config.yaml", model=tiny_model, data=data_file, out=tmp_path)
    assert main(["train", "-c", str(config), "--out", str(tmp_path / "run")]) == 0
    assert main(["train", "-c", str(tmp_path / "run" / "config.yaml"), "--out", str(tmp_path / "run")]) == 0
    assert f"{tmp_path / 'run'} holds this run, finished." in capsys.readouterr().out


def test_several_configurations_train_one_after_another_each_from_the_adapter_before(
    tiny_model: Path, data_file: Path, tmp_path: Path
) -> None:
    config = written(TUNING_FORK, tmp_path / "fork.yaml", model=tiny_model, data=data_file)
    second = tmp_path / "second.yaml"
    second.write_text(config.read_text().replace("epochs: 2", "epochs: 1"))
    assert main(["train", "-c", str(config), "-c", str(second), "--out", str(tmp_path / "both")]) == 0
    first, then = (history(tmp_path / "both" / name, "validation") for name in ("1", "2"))
    assert then[0]["loss"] == min(each["loss"] for each in first)
    assert yaml.safe_load((tmp_path / "both" / "2" / "config.yaml").read_text())["resume_adapter_file"].endswith(
        "both/1/adapters/adapters.safetensors"
    )


def test_every_value_out_of_range_is_said_at_once(words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    wrong = {
        "lora_rank": 0, "lora_scale": -1, "lora_dropout": 1, "fine_tune_type": "lorra", "optimizer": "adaam", "weight_decay": -1,
        "loraplus_lr_ratio": 0, "max_grad_norm": 0, "grad_accumulation_steps": 0, "steps_per_report": 0, "steps_per_eval": -5,
        "val_batches": 0, "save_every": 0, "keep_checkpoints": 0, "early_stopping_patience": 0, "best_metric": "bleu",
        "best_metric_rows": 0, "quantize_bits": 3, "quantize_group_size": 7, "train_size": 2,
    }  # fmt: skip
    lines = said([*words, *(word for name, value in wrong.items() for word in (f"--{name}", str(value)))], capsys)
    assert {line.partition("=")[0] for line in lines} == {*wrong}
    assert "optimizer='adaam' is unknown. Did you mean 'adam'?" in "\n".join(lines)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--iters", "5"], "epochs=1.0 and iters=5 say the same thing. Give one of epochs, iters."),
        (["--lr-schedule", "{name: cosine_decay, arguments: [1e-2, 1000]}"], "decays over 1000 updates; the fit makes 12"),
        (["--lr-schedule", "{name: cosine_decay, arguments: [1e-2, 3]}"], "decays over 3 updates; the fit makes 12"),
        (["--lr-schedule", "{name: cosine, arguments: [1e-2, -1]}"], "cosine"),
        (["--learning-schedule", "{type: cosine, cycle_length: 5, min_lr: 0}"], "5"),
        (["--set", "num_layers=9"], "num_layers=9 is out of range. Expected at most 2, the model's layers, or -1."),
        (["--lora-keys", "self_attn.q_prj"], "Did you mean 'self_attn.q_proj'?"),
        (["--optimizer", "adam", "--weight-decay", "0.1"], "adamw"),
        (["--optimizer-config", "{adamw: {beta: 3}}"], "Did you mean 'betas'?"),
        (["--resume-adapter-file", "nowhere.safetensors"], "there is no file nowhere.safetensors"),
    ],
)
def test_what_cannot_be_is_refused(words: list[str], more: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    if more[0] == "--set":
        del words[words.index("--num-layers") : words.index("--num-layers") + 2]
    assert expected in "\n".join(said([*words, *more], capsys))


def test_dora_on_experts_is_refused_at_the_command_line(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experts = write_architecture(tmp_path / "mixtral", "mixtral", layers=2)
    words[words.index("--model-id") + 1] = str(experts)
    assert "dora' is not possible on the experts" in said([*words, "--fine-tune-type", "dora"], capsys)[0]


def test_weights_of_another_model_or_cut_short_are_refused(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 0
    adapter = tmp_path / "run" / "adapters"
    words[words.index("--output-dir") + 1] = str(tmp_path / "second")
    words[words.index("--model-id") + 1] = str(write_architecture(tmp_path / "other", "llama", layers=2))
    assert "was made for another model" in said([*words, "--resume-adapter-file", str(adapter)], capsys)[-1]
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((adapter / "adapters.safetensors").read_bytes()[:-9])
    assert "cannot be read as weights" in said([*words, "--resume-adapter-file", str(cut)], capsys)[-1]


def test_an_unfinished_run_is_not_taken_over_by_another(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint of a run with other settings is left alone, and what differs is named."""
    assert main([*words, "--save-every", "2"]) == 0
    for name in ("metrics.json", "metrics.jsonl"):
        (tmp_path / "run" / name).unlink()
    lines = said([*words, "--lora-rank", "2", "--max-grad-norm", "1"], capsys)
    assert "holds another run: lora_rank is 8 there and 2 here; max_grad_norm is not set there and 1.0 here" in lines[0]
    assert main([*words, "--save-every", "3"]) == 0  # what is written down, and when, does not count
    assert history(tmp_path / "run", "resume")


def test_a_full_disk_ends_the_run_and_leaves_the_checkpoint_before(tmp_path: Path, data_file: Path) -> None:
    """The limit on the size of files is the kernel's, so the write really fails; optimizer.safetensors meets it first."""
    model = write_architecture(tmp_path / "model", "llama", layers=2)
    arguments = [
        "train", "--data", str(data_file), "--model", str(model), "--out", str(tmp_path / "run"), "--save-every", "1",
        "--input-text-key", "question", "--output-text-key", "reply", "--num-layers", "2", "--max-tokens", "4",
    ]  # fmt: skip
    limited = (
        "import resource, signal, sys; from finetune_dataflow.cli import main\n"
        "from finetune_dataflow.engine import checkpoints, training\n"
        "save = training.save_checkpoint\n"
        "def full_after_three(directory, checkpoint, keep):\n"
        "    if checkpoint.step == 4:\n"
        "        signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))\n"
        "    return save(directory, checkpoint, keep)\n"
        "training.save_checkpoint = full_after_three\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", limited, *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr, ended.stderr
    assert "File too large" in ended.stderr and "checkpoint" in ended.stderr
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["batch-00000002", "batch-00000003"]
    assert main(arguments) == 0
    assert [each["step"] for each in history(tmp_path / "run", "resume")] == [3]


def test_npz_weights_are_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "adapters.npz", weight=np.arange(6, dtype=np.float32).reshape(2, 3))
    target = tmp_path / "adapters.safetensors"
    assert main(["convert", str(tmp_path / "adapters.npz"), str(target)]) == 0
    found = mx.load(str(target))
    assert isinstance(found, dict) and found["weight"].tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    capsys.readouterr()
    assert "expected a .npz file" in said(["convert", str(target), str(target)], capsys)[0]
    assert "takes two files" in said(["convert"], capsys)[0]


def test_a_full_fine_tune_leaves_a_complete_model_that_needs_no_adapter(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words[words.index("--num-layers") + 1], words[words.index("--learning-rate") + 1] = "-1", "1e-3"
    assert main([*words, "--fine-tune-type", "full"]) == 0
    model = tmp_path / "run" / "model"
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= {
        each.name for each in model.iterdir()
    }
    first = json.loads((tmp_path / "run" / "metrics.json").read_text())
    words[words.index("--model-id") + 1], words[words.index("--output-dir") + 1] = str(model), str(tmp_path / "again")
    assert main(words) == 0
    second = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert second["base"]["loss"] == pytest.approx(first["finetuned"]["loss"], rel=1e-5)


def test_replies_are_coloured_on_a_terminal_only_and_never_move_it() -> None:
    tokens = (StreamedToken(1, "a\x1b[2J", 0.9), StreamedToken(2, "b", 0.01))
    assert reply_lines(PromptReply("\x1b[H?", tokens, colorize=True), in_color=False) == [r"> \x1b[H?", r"a\x1b[2Jb"]
    assert reply_lines(PromptReply("?", tokens), in_color=True) == ["> ?", r"a\x1b[2Jb"]
    painted = reply_lines(PromptReply("?", tokens, colorize=True), in_color=True)
    assert len(painted) == 3 and "\x1b[38;5;" in painted[1] and "\x1b[2J" not in painted[1]


def test_a_directory_of_the_users_is_never_taken_for_a_runs_own(
    words: list[str], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A base model in a directory `model` beside the run's files would be replaced by the tuned one."""
    place = tmp_path / "project"
    shutil.copytree(tiny_model, place / "model")
    words[words.index("--model-id") + 1], words[words.index("--output-dir") + 1] = str(place / "model"), str(place)
    before = {path.name: path.read_bytes() for path in (place / "model").iterdir()}
    assert "has model, but no lineage.json" in said([*words, "--fine-tune-type", "full"], capsys)[-1]
    assert {path.name: path.read_bytes() for path in (place / "model").iterdir()} == before


def test_what_an_earlier_fit_saw_is_not_called_unseen(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another seed deals the rows otherwise: the second fit's hold-out is among what the first was trained on."""
    assert main([*words, "--random-state", "1"]) == 0
    words[words.index("--output-dir") + 1] = str(tmp_path / "second")
    capsys.readouterr()
    assert main([*words, "--random-state", "2", "--resume-adapter-file", str(tmp_path / "run" / "adapters")]) == 0
    assert "rows it never saw" not in capsys.readouterr().out
    used = [set((tmp_path / run / "adapters" / "used_inputs.txt").read_text().split()) for run in ("run", "second")]
    assert used[0] < used[1]


def test_a_finished_run_still_does_what_is_asked_for_besides(words: list[str], tmp_path: Path) -> None:
    assert main(words) == 0
    assert main([*words, "--save-adapter-to", str(tmp_path / "copy")]) == 0
    assert (tmp_path / "copy" / "adapters.safetensors").is_file()


def test_an_adapter_is_not_written_over_another_runs(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 0
    before = adapter_digest(tmp_path / "run")
    words[words.index("--output-dir") + 1] = str(tmp_path / "second")
    adapter = str(tmp_path / "run" / "adapters")
    assert "it belongs to the run beside it" in said([*words, "--save-adapter-to", adapter], capsys)[-1]
    shutil.copytree(adapter, tmp_path / "alone")
    again = ["--save-adapter-to", str(tmp_path / "alone"), "--resume-adapter-file", str(tmp_path / "alone")]
    assert "the fit starts from the weights in it" in said([*words, *again], capsys)[-1]
    assert adapter_digest(tmp_path / "run") == before


def test_a_chain_that_cannot_go_through_is_refused_before_the_first_fit(
    tiny_model: Path, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = written(TUNING_FORK, tmp_path / "a.yaml", model=tiny_model, data=data_file)
    other = tmp_path / "b.yaml"
    for old, new, expected in (
        ("rank: 4", "rank: 8", "lora_rank is 4 there and 8 here"),
        ("epochs: 2", "epochs: 2\nfine_tune_type: full", "fine_tune_type is 'lora' there and 'full' here"),
        ("epochs: 2", "epochs: 2\nquantize_bits: 4\nquantize_group_size: 32", "fingerprint of base_model"),
        ("epochs: 2", "epochs: 2\nresume_adapter_file: x.npz", "names resume_adapter_file"),
        ("epochs: 2", "epochs: 2\nlora_keys: [nothing]", "lora_keys names 'nothing'"),
    ):
        other.write_text(config.read_text().replace(old, new))
        assert expected in "\n".join(said(["train", "-c", str(config), "-c", str(other), "--out", str(tmp_path / "run")], capsys))
        assert not (tmp_path / "run").exists()


def test_plan_refuses_what_the_fit_would(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words[0] = "plan"
    assert "Did you mean 'self_attn.q_proj'?" in said([*words, "--lora-keys", "self_attn.q_prj"], capsys)[-1]
    assert "Did you mean 'betas'?" in said([*words, "--optimizer-config", "{adamw: {beta: 1}}"], capsys)[-1]
    assert main(words) == 0
    assert "method: lora, 8,192 of 26,880 parameters" in capsys.readouterr().out
