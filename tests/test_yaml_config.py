import ast
import datetime
import importlib.util
import json
import logging
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_dataflow.cli import main, yaml_config
from finetune_dataflow.cli.options import ALIASES, RIVALS, Input, Options, coerced, parse, parse_all, type_name
from finetune_dataflow.errors import UserError

MLX_LM = """\
# Every setting of mlx-lm's fine-tuning, in the format of its lora_config.yaml.
model: mlx_model
train: true
fine_tune_type: lora
training_mode: normal
optimizer: adamw
optimizer_config:
  adam: {}
  adamw:
    betas: [0.9, 0.98]
    eps: 1e-6
    bias_correction: true
  muon: {}
  sgd: {}
  adafactor: {}
data: /path/to/data
seed: 0
num_layers: 16
batch_size: 4
iters: 1000
val_batches: 25
learning_rate: 1e-5
steps_per_report: 10
steps_per_eval: 200
resume_adapter_file: null
adapter_path: adapters
save_every: 100
test: false
test_batches: 100
max_seq_length: 2048
config: null
grad_checkpoint: false
grad_accumulation_steps: 1
clear_cache_threshold: 0
lr_schedule:
  name: cosine_decay
  warmup: 100
  warmup_init: 1e-7
  arguments: [1e-5, 1000, 1e-7]
lora_parameters:
  keys: ["self_attn.q_proj", "self_attn.v_proj"]
  rank: 8
  scale: 20.0
  dropout: 0.0
mask_prompt: false
report_to: null
project_name: null
trust_remote_code: false
"""
MLX_TUNING_FORK = """\
model: mlx_model
train: true
data: data/
num_tokens: 100
prompt: null
temp: 0.0
top_p: 1.0
lora_layers: 8
batch_size: 2
iters: -1
epochs: 3
evals_per_epoch: 4
eval_proportion_of_total: 0
saves_per_epoch: 2
reporting_interval_proportion: .01
validations_per_train_item: .5
learning_rate: 1e-5
learning_schedule:
  type: cosine_w_warmup
  min_lr: 1e-7
  cycle_length: -1
  warmup_proportion: .1
resume_adapter_file: null
adapter_path: adapters
test: true
test_batches: -1
max_seq_length: 2048
seed: 3
ignore_chat_template: false
trust_remote_code: false
lora_parameters: {rank: 8, alpha: 16, dropout: 0.0, scale: 10.0}
prompt_feature: question
completion_feature: answer
"""


def written(directory: Path, text: str, name: str = "a.yaml") -> str:
    path = directory / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def read(directory: Path, text: str, *flags: str, start: str | None = None) -> Options:
    """What one file under some flags gives; it names data, so that the example is not used."""
    return parse(["-c", written(directory, text), *flags], start)


def inputs_of(directory: Path, text: str, *flags: str) -> dict[str, Any]:
    """The inputs, without the data."""
    options = read(directory, f"{text}\ndata_path: x", *flags)
    return {name: value for name, value in options.inputs.items() if name != "data_path"}


def problems(arguments: list[str], start: str | None = None) -> list[str]:
    with pytest.raises(UserError) as raised:
        parse_all(arguments, start)
    return str(raised.value).splitlines()


def problem(directory: Path, text: str, *flags: str, start: str | None = None) -> str:
    """The one problem of a file, which must name the file."""
    path = written(directory, text)
    found = problems(["-c", path, *flags], start)
    assert len(found) == 1, found
    assert path in found[0]
    return found[0]


def test_a_file_of_mlx_lm_gives_every_input(tmp_path: Path) -> None:
    options = read(tmp_path, MLX_LM)
    assert options.start == "base"
    assert options.inputs == {
        "model_id": "mlx_model",
        "fine_tune_type": "lora",
        "optimizer": "adamw",
        "optimizer_config": {
            "adam": {}, "adamw": {"betas": [0.9, 0.98], "eps": 0.000001, "bias_correction": True},
            "muon": {}, "sgd": {}, "adafactor": {},
        },
        "data_path": "/path/to/data",
        "random_state": 0,
        "num_layers": 16,
        "batch_size": 4,
        "iters": 1000,
        "val_batches": 25,
        "learning_rate": 0.00001,
        "steps_per_report": 10,
        "steps_per_eval": 200,
        "save_adapter_to": "adapters",
        "save_every": 100,
        "max_seq_length": 2048,
        "grad_checkpoint": False,
        "grad_accumulation_steps": 1,
        "clear_cache_threshold": 0,
        "lr_schedule": {
            "name": "cosine_decay", "warmup": 100, "warmup_init": 0.0000001, "arguments": [0.00001, 1000, 0.0000001],
        },
        "lora_keys": ["self_attn.q_proj", "self_attn.v_proj"],
        "lora_rank": 8,
        "lora_scale": 20.0,
        "lora_dropout": 0.0,
        "mask_prompt": False,
    }  # fmt: skip


def mlx_lm_defaults() -> dict[str, Any]:
    """CONFIG_DEFAULTS of the installed mlx-lm, read from its source: importing it would change PyYAML's loader."""
    package = importlib.util.find_spec("mlx_lm")
    assert package is not None and package.submodule_search_locations
    tree = ast.parse((Path(package.submodule_search_locations[0]) / "lora.py").read_text(encoding="utf-8"))
    assigned = [each for each in tree.body if isinstance(each, ast.Assign) and ast.unparse(each.targets[0]) == "CONFIG_DEFAULTS"]
    defaults: dict[str, Any] = ast.literal_eval(assigned[0].value)
    return defaults


def test_the_file_above_has_every_key_of_the_installed_mlx_lm() -> None:
    assert set(mlx_lm_defaults()) <= set(yaml.safe_load(MLX_LM))


def test_mlx_lm_s_own_defaults_are_accepted_as_a_file(tmp_path: Path) -> None:
    defaults = mlx_lm_defaults()
    inputs = read(tmp_path, json.dumps(defaults | {"train": True})).inputs
    expected = {
        "model_id": defaults["model"], "data_path": defaults["data"], "random_state": defaults["seed"],
        "save_adapter_to": defaults["adapter_path"], "learning_rate": defaults["learning_rate"],
        **{f"lora_{name}": value for name, value in defaults["lora_parameters"].items()},
    }  # fmt: skip
    assert {name: inputs[name] for name in expected} == expected


def test_a_file_of_mlx_tuning_fork_gives_every_input(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = read(tmp_path, MLX_TUNING_FORK)
    assert options.start == "base"
    assert options.inputs == {
        "model_id": "mlx_model",
        "data_path": "data/",
        "max_tokens": 100,
        "temperature": 0.0,
        "top_p": 1.0,
        "num_layers": 8,
        "batch_size": 2,
        "epochs": 3.0,
        "evals_per_epoch": 4,
        "saves_per_epoch": 2,
        "reporting_interval_proportion": 0.01,
        "validations_per_train_item": 0.5,
        "learning_rate": 0.00001,
        "learning_schedule": {
            "type": "cosine_w_warmup", "min_lr": 0.0000001, "cycle_length": -1, "warmup_proportion": 0.1,
        },
        "save_adapter_to": "adapters",
        "max_seq_length": 2048,
        "random_state": 3,
        "lora_rank": 8,
        "lora_dropout": 0.0,
        "lora_scale": 10.0,
        "input_text_key": "question",
        "output_text_key": "answer",
    }  # fmt: skip
    assert [each.message for each in caplog.records] == [
        f"{tmp_path / 'a.yaml'}: lora_parameters.alpha=16 is not used: the scale is 10."
    ]


def test_every_alias_and_every_rival_is_an_input() -> None:
    from finetune_dataflow.cli.inputs import all_inputs

    assert {*ALIASES.values(), *(name for group in RIVALS for name in group)} <= {*all_inputs()}


REFUSED = {
    "config: other.yaml": "config='other.yaml' is refused. A file cannot name another. Give several, each with -c.",
    "wandb_project: mine": "wandb_project='mine' is refused. Say report_to: wandb, and project_name",
    "trust_remote_code: true": "trust_remote_code=True is refused. Code from a model's directory is never run.",
    "training_mode: dpo": "training_mode='dpo' is refused. Only supervised fine-tuning (normal) is built.",
    "hf_dataset: {path: billsum}": "hf_dataset={'path': 'billsum'} is refused. Name the dataset in data",
    "chat_feature: turns": "chat_feature='turns' is refused. Rows of conversations have their messages under the key 'messages'",
    "text_feature: body": "text_feature='body' is refused. Name the key in output_text_key",
    "lora_parameters: {alpha: 16}": "lora_parameters.alpha=16 is refused. Give lora_parameters.scale, which is alpha / rank.",
    "lora_parameters: {alpha: 16, rank: 8}": "which is alpha / rank, here 16 / 8 = 2.",
    "lora_alpha: 16": "lora_parameters.alpha=16 is refused.",
    "ignore_chat_template: true": "ignore_chat_template=True is refused. Say in prompt_format",
    "write_every: 1": "write_every=1 is refused.",
    "validation_scale: 5": "validation_scale=5 is refused. Say in val_batches",
    "adapter_file: adapters.npz": "adapter_file='adapters.npz' is refused. Name a directory in save_adapter_to",
    "eval_proportion_of_total: 0.25": "eval_proportion_of_total=0.25 is refused. Say in val_batches",
    "eos_token: <|end|>": "eos_token='<|end|>' is refused.",
    "use_dora: true": "use_dora=True is refused. Say fine_tune_type: dora.",
    "repetition_penalty: 1.1": "repetition_penalty=1.1 is refused. Only the command prompt takes it",
    "train: true\ntest: true\ntest_batches: 500": "test_batches=500 is refused. The hold-out is evaluated whole",
    "train: false": "There is nothing to do: train is false, and test is not true.",
    "train: false\ntest: false": "There is nothing to do",
    "train: maybe": "train='maybe': expected true or false",
    "test: true\ntest_batches: few": "test_batches='few': expected a whole number",
    "start: presave": "Did you mean 'presaved'?",
    "start: presaved\ntrain: true": "start: presaved and train: true contradict each other.",
    "start: base\ntrain: false\ntest: true": "start: base and train: false contradict each other.",
    "replace: soon": "replace='soon': expected {node: {method: path.to.module::function}}",
    "replace: {verdict: {method: os::getcwd}}": "Allow that with --allow-code.",
    "lora_parameters: 8": "lora_parameters=8: expected names with values",
    "lora_parameters: {rnk: 8}": "Did you mean 'lora_parameters.rank'?",
    "lora_parameters: {rank: 8}\nlora_parameters.rank: 8": "lora_parameters.rank is given twice",
    "adapter_path: a\nsave_adapter_to: b": "adapter_path and save_adapter_to are the same input",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_cannot_be_done_is_refused_with_the_reason(text: str, tmp_path: Path) -> None:
    assert REFUSED[text] in problem(tmp_path, text + "\ndata: x")


@pytest.mark.parametrize("name", [*yaml_config.REFUSED, "train", "start", "replace"])
def test_a_refused_key_that_is_null_counts_as_not_given(name: str, tmp_path: Path) -> None:
    assert inputs_of(tmp_path, f"{name}: null") == {}


@pytest.mark.parametrize(
    "text",
    ["trust_remote_code: false", "training_mode: normal", "eval_proportion_of_total: 0", "repetition_penalty: 1",
     "wandb_run: null", "iters: -1", "epochs: -1", "epochs: null", "lora_parameters: null", "lora_parameters: {rank: null}",
     "batchsize: null"],
)  # fmt: skip
def test_a_value_that_changes_nothing_is_accepted(text: str, tmp_path: Path) -> None:
    assert inputs_of(tmp_path, text) == {}


def test_a_flag_that_is_no_input_is_refused_as_in_a_file() -> None:
    assert problems(["--trust-remote-code", "true"])[0].startswith("trust_remote_code=True is refused.")
    assert parse(["--trust-remote-code", "false", "--data", "x"]).inputs == {"data_path": "x"}


def test_a_file_that_only_tests_evaluates_its_adapter(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = "train: false\ntest: true\nadapter_path: mine\ndata: x\niters: 100\nlora_parameters: {rank: 4, alpha: 3}\n"
    options = read(tmp_path, text)
    assert (options.start, options.inputs) == ("presaved", {"adapter_path": "mine", "data_path": "x"})
    assert [each.message for each in caplog.records] == [
        f'{tmp_path / "a.yaml"}: start="presaved" has no use for iters, lora_parameters.rank, lora_parameters.alpha.'
    ]


def test_a_file_of_a_fit_serves_its_evaluation(tmp_path: Path) -> None:
    options = read(tmp_path, MLX_LM, "--adapter", "other", start="presaved")
    assert options.start == "presaved"
    assert options.inputs["adapter_path"] == "other" and "learning_rate" not in options.inputs


def test_a_wrong_type_is_told_even_where_the_start_has_no_use_for_it(tmp_path: Path) -> None:
    assert "iters='many': expected a whole number" in problem(tmp_path, "start: presaved\nadapter_path: a\ndata: x\niters: many")


def test_a_flag_that_the_start_has_no_use_for_is_refused() -> None:
    found = problems(["--start", "presaved", "--adapter", "a", "--data", "x", "--iters", "100"])
    assert found == ['iters is no input under start="presaved".']


def test_without_test_the_hold_out_is_evaluated_all_the_same_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    read(tmp_path, "data: x\ntrain: true")
    assert caplog.records == []
    read(tmp_path, "data: x\ntest: false")
    assert [(each.levelno, each.message) for each in caplog.records] == [
        (
            logging.WARNING,
            f"{tmp_path / 'a.yaml'}: test is false. The hold-out is evaluated all the same, because the verdict rests on it.",
        )
    ]


@pytest.mark.parametrize("switches", ["", "train: true", "test: true", "train: true\ntest: false\ntest_batches: 9",
                                      "test: true\ntest_batches: -1", "train: true\ntest: true"])  # fmt: skip
def test_anything_but_testing_alone_starts_a_fit(switches: str, tmp_path: Path) -> None:
    assert read(tmp_path, f"data: x\n{switches}").start == "base"


def test_the_command_and_flags_choose_the_start_over_a_file(tmp_path: Path) -> None:
    fit, evaluation = "data: x\nadapter_path: a\ntrain: true", "data: x\nadapter_path: a\ntrain: false\ntest: true"
    assert read(tmp_path, fit, "--start", "presaved").start == "presaved"
    assert read(tmp_path, fit, start="presaved").start == "presaved"
    assert read(tmp_path, evaluation, "--start", "base").start == "base"
    assert read(tmp_path, evaluation, "--train", "true").start == "base"
    assert read(tmp_path, fit, "--train", "false", "--test", "true").start == "presaved"
    named = "data: x\nadapter_path: a\nstart: base"
    assert read(tmp_path, named, "--train", "false", "--test", "true").start == "presaved"
    assert "means --start presaved; found 'base'" in problem(tmp_path, "start: base", start="presaved")


def test_the_adapter_to_evaluate_is_no_flag_of_a_fit() -> None:
    assert problems(["--adapter-path", "x"])[0].startswith('adapter_path is no input under start="base"')


def test_a_default_gives_way_to_the_file_and_the_file_to_a_flag(tmp_path: Path) -> None:
    text = "data: x\nseed: 1\nbatch_size: 2\nmodel: a\n"
    assert read(tmp_path, text, "--random-state", "5", "--model-id=b", "--set", "epochs=2").inputs == {
        "data_path": "x", "random_state": 5, "batch_size": 2, "model_id": "b", "epochs": 2.0,
    }  # fmt: skip


@pytest.mark.parametrize("flags, expected", [
    (["--epochs", "2"], {"epochs": 2.0, "steps_per_eval": 5, "lr_schedule": {"name": "a"}}),
    (["--evals-per-epoch", "3"], {"iters": 100, "evals_per_epoch": 3, "lr_schedule": {"name": "a"}}),
    (["--learning-schedule", "{type: constant}"], {"iters": 100, "steps_per_eval": 5, "learning_schedule": {"type": "constant"}}),
    (["--iters", "null"], {"steps_per_eval": 5, "lr_schedule": {"name": "a"}}),
    (["--epochs", "-1"], {"iters": 100, "steps_per_eval": 5, "lr_schedule": {"name": "a"}}),
])  # fmt: skip
def test_a_flag_takes_the_place_of_the_file_s_other_spellings(flags: list[str], expected: dict[str, Any], tmp_path: Path) -> None:
    assert inputs_of(tmp_path, "iters: 100\nsteps_per_eval: 5\nlr_schedule: {name: a}", *flags) == expected


def test_a_flag_lr_schedule_takes_the_place_of_the_file_s_learning_schedule(tmp_path: Path) -> None:
    inputs = inputs_of(tmp_path, "learning_schedule: {type: constant}", "--lr-schedule", '{"name": "b", "arguments": [1e-5, 9]}')
    assert inputs == {"lr_schedule": {"name": "b", "arguments": [0.00001, 9]}}


def test_a_flag_gives_the_scale_that_a_file_s_alpha_lacks(tmp_path: Path) -> None:
    assert inputs_of(tmp_path, "lora_parameters: {alpha: 16}", "--lora-scale", "2") == {"lora_scale": 2.0}


@pytest.mark.parametrize(("text", "expected"), [
    ("seed: 1\nrandom_state: 1", "seed and random_state are the same input. Give one of them."),
    ("lora_rank: 4\nlora_parameters: {rank: 4}", "lora_rank and lora_parameters.rank are the same input."),
    ("lora_layers: 4\nnum_layers: 4", "lora_layers and num_layers are the same input."),
    ("iters: 5\nepochs: 2", "epochs=2.0 and iters=5 say the same thing. Give one of epochs, iters."),
    ("steps_per_eval: 5\nevals_per_epoch: 2\nvalidation_interval_proportion: .2",
     "steps_per_eval=5 and evals_per_epoch=2 and validation_interval_proportion=0.2 say the same thing."),
    ("lr_schedule: {name: a}\nlearning_schedule: {type: b}",
     "lr_schedule={'name': 'a'} and learning_schedule={'type': 'b'} say the same thing."),
])  # fmt: skip
def test_two_spellings_in_one_place_are_refused_naming_both(text: str, expected: str, tmp_path: Path) -> None:
    assert expected in problem(tmp_path, text)


def test_two_spellings_on_the_command_line_are_refused_naming_both() -> None:
    said = "epochs=2.0 and iters=5 say the same thing. Give one of epochs, iters."
    assert problems(["--iters", "5", "--epochs", "2"]) == [said]
    assert problems(["--seed", "5", "--seed", "5"]) == ["--seed is given twice."]


def test_all_problems_of_all_files_and_flags_are_told_at_once_and_nothing_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = written(tmp_path, "batchsize: 3\nepochs: soon\nwandb_run: mine\niters: 3\nevals_per_epoch: 1\nsteps_per_eval: 2\n")
    second = written(tmp_path, "a: 1\na: 2\n", "b.yaml")
    third = written(tmp_path, "learning_rte: 1\ntest: true\ntest_batches: 5\n", "c.yaml")
    out = tmp_path / "run"
    assert main(["-c", first, "-c", second, "-c", third, "--lora-rank", "x", "--out", str(out)]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"Error: {first}: Unknown option 'batchsize'. Did you mean 'batch_size'? `run.py inputs` lists all.",
        f"{first}: epochs='soon': expected a number.",
        f"{first}: wandb_run='mine' is refused. Say report_to: wandb, and project_name; a team is named in the environment "
        "variable WANDB_ENTITY.",
        f"{first}: steps_per_eval=2 and evals_per_epoch=1 say the same thing. "
        "Give one of steps_per_eval, evals_per_epoch, validation_interval_proportion.",
        "lora_rank='x': expected a whole number.",
        f"{second}, line 2, column 1: the key 'a' stands there twice, first in line 1.",
        f"{third}: test_batches=5 is refused. The hold-out is evaluated whole: a verdict on some of its rows would be weaker. "
        "Leave it out, or give -1.",
        f"{third}: Unknown option 'learning_rte'. Did you mean 'learning_rate'? `run.py inputs` lists all.",
    ]
    assert not out.exists()


def test_an_unknown_start_does_not_call_the_inputs_of_either_wrong(tmp_path: Path) -> None:
    assert "--start 'presave' is unknown" in problem(tmp_path, "start: presave\nadapter_path: a\niters: 5")


def test_many_files_give_their_options_in_order_each_under_the_flags(tmp_path: Path) -> None:
    first = written(tmp_path, "data: x\nseed: 1\nepochs: 2\n")
    second = written(tmp_path, "data: y\nstart: presaved\nadapter: here\nseed: 2\n", "b.yaml")
    assert parse_all(["-c", first, "--seed", "9", "--config", second]) == [
        Options("base", {"data_path": "x", "random_state": 9, "epochs": 2.0}, (), first),
        Options("presaved", {"data_path": "y", "adapter_path": "here", "random_state": 9}, (), second),
    ]


def test_a_command_that_takes_one_file_refuses_two(tmp_path: Path) -> None:
    first, second = written(tmp_path, "data: x"), written(tmp_path, "data: y", "b.yaml")
    with pytest.raises(UserError, match=rf"takes one configuration, found 2: {re.escape(first)}, {re.escape(second)}"):
        parse(["-c", first, "-c", second])


def test_each_file_replaces_its_own_nodes(tmp_path: Path) -> None:
    own = "data: x\nreplace: {verdict: {method: tests.test_yaml_config::own_verdict, kwargs: {text: mine}}}\nmood: 3\n"
    first, second = written(tmp_path, own), written(tmp_path, "data: y", "b.yaml")
    replaced, plain = parse_all(["-c", first, "-c", second, "--allow-code"])
    assert len(replaced.modules) == 1 and replaced.inputs == {"data_path": "x", "mood": 3}
    assert plain.modules == ()


def own_verdict(text: str, mood: int) -> str:
    return f"{text} {mood}"


OWN_NODE = """\
from pathlib import Path
from typing import Any, Optional


def extra(
    ratio: Optional[float] = None, names: list[str] | None = None, options: dict[str, Any] | None = None, top_p: float = 1.0,
    where: Path = Path("x"),
) -> int:
    return 1
"""


def test_the_inputs_of_an_own_module_come_from_flags_and_files_with_their_types(tmp_path: Path) -> None:
    module = tmp_path / "own.py"
    module.write_text(OWN_NODE)
    flags = ["--module", str(module), "--names", "a, b", "--ratio", "2"]
    assert inputs_of(tmp_path, "options: {x: [1, {y: 1e3}]}\nratio: 1\ntop_p: 0.9", *flags) == {
        "options": {"x": [1, {"y": 1000.0}]}, "names": ["a", "b"], "ratio": 2.0, "top_p": 0.9,
    }  # fmt: skip
    assert "where is of the type Path, which no option can give" in problem(tmp_path, "where: y", "--module", str(module))


TYPES: dict[str, tuple[Any, Any, Any]] = {
    "int": (int | None, "3", 3),
    "int null": (int | None, "null", None),
    "int none": (int | None, None, None),
    "float of an int": (float | None, 3, 3.0),
    "float of text": (float, "1e-5", 0.00001),
    "infinity": (float, "inf", math.inf),
    "bool": (bool, "True", True),
    "a list": (list[str] | None, ["a", "b"], ["a", "b"]),
    "a list with commas": (list[str], "a,b", ["a", "b"]),
    "a list of one": (list[str], "a", ["a"]),
    "a flow list": (list[str], "['a,b', c]", ["a,b", "c"]),
    "an empty list": (list[str], "[]", []),
    "a mapping": (dict[str, Any] | None, {"a": None}, {"a": None}),
    "a flow mapping": (dict[str, Any] | None, "{name: a, arguments: [1e-5, -1]}", {"name": "a", "arguments": [0.00001, -1]}),
    "JSON": (dict[str, Any], '{"a":{"b":[true,null]}}', {"a": {"b": [True, None]}}),
    "a null mapping": (dict[str, Any] | None, "null", None),
    "text that says null": (str, "null", "null"),
}


@pytest.mark.parametrize("name", TYPES)
def test_a_value_becomes_the_type_of_its_input(name: str) -> None:
    wanted, value, expected = TYPES[name]
    found = coerced(Input("name", wanted, None, "", ""), value)
    assert found == expected and type(found) is type(expected)


WRONG: dict[str, tuple[Any, list[Any]]] = {
    "a whole number": (int | None, ["x", "", "1.5", 1.5, True, [1]]),
    "a number": (float | None, ["x", False, {}, 10**400]),
    "true or false": (bool, ["yes", 1, [], "null"]),
    "text, in quotes where it looks like something else": (str, [3, 0.5, True, ["a"], {}, None]),
    "a list of texts, as a,b or [a, b]": (list[str] | None, ["a,,b", "", [1], ["a", ""], "[a", "[1]", {"a": 1}, 3]),
    "names with values, as {name: value}": (dict[str, Any] | None, ["cosine", "{a: [", "{a: 1, a: 2}", "[a]", [1], 3]),
}


@pytest.mark.parametrize("expected", WRONG)
def test_a_value_of_another_type_is_told_with_what_is_expected(expected: str) -> None:
    wanted, values = WRONG[expected]
    for value in values:
        with pytest.raises(UserError, match=re.escape(f": expected {expected}.")) as raised:
            coerced(Input("name", wanted, None, "", ""), value)
        assert str(raised.value).startswith(f"name={repr(value)[:200]}")


@pytest.mark.parametrize(("wanted", "name"), [(list[int], "list[int]"), (int | str, "int | str"), (bytes, "bytes")])
def test_an_input_of_a_type_that_cannot_be_written_is_told(wanted: Any, name: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"name is of the type {name}, which no option can give.")):
        coerced(Input("name", wanted, None, "", ""), "1")


def test_a_long_value_is_cut_in_its_message() -> None:
    with pytest.raises(UserError) as raised:
        coerced(Input("name", int, None, "", ""), "x" * 10_000)
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize(("value", "expected"), [
    ("1GB", 10**9), ("500MB", 500_000_000), ("1.5G", 1_500_000_000), ("2 m", 2_000_000), ("4096", 4096), (4096, 4096),
])  # fmt: skip
def test_the_cache_s_threshold_is_a_number_of_bytes_or_a_size(value: Any, expected: int, tmp_path: Path) -> None:
    assert inputs_of(tmp_path, f"clear_cache_threshold: {value}") == {"clear_cache_threshold": expected}


@pytest.mark.parametrize("value", ["1TB", "much", "-1GB", "1.5", "[1]"])
def test_a_size_that_is_none_is_told(value: str, tmp_path: Path) -> None:
    text = problem(tmp_path, f"clear_cache_threshold: {value}")
    assert "expected bytes, as 1000000 or 1GB" in text


def test_the_types_have_names() -> None:
    named = {int: "int", int | None: "int", float: "float", bool: "bool", str: "str", list[str] | None: "list of str",
             dict[str, Any] | None: "mapping", Path: "Path"}  # fmt: skip
    assert {wanted: type_name(wanted) for wanted in named} == named


SCALARS = {
    "1e-5": 0.00001, "1E5": 100000.0, "1.5e3": 1500.0, "-2.e+1": -20.0, ".5e1": 5.0, "+1e0": 1.0, "1_0e1": 100.0,
    "0.1": 0.1, "7": 7, "1_000": 1000, ".inf": math.inf, "true": True, "null": None, "~": None, "": None, "e5": "e5", "1e": "1e",
    "1e-": "1e-", "2024-01-02": "2024-01-02", "'1e5'": "1e5", "1.0.0": "1.0.0", "=": "=",
}  # fmt: skip


@pytest.mark.parametrize("text", SCALARS)
def test_a_value_of_a_file_is_read_as_its_writer_means_it(text: str, tmp_path: Path) -> None:
    found = yaml_config.read_config(written(tmp_path, f"a: {text}")).values["a"]
    assert found == SCALARS[text] and type(found) is type(SCALARS[text])


def test_the_loader_of_everyone_else_is_left_alone() -> None:
    assert yaml.safe_load("2024-01-02") == datetime.date(2024, 1, 2)
    patterns = [pattern for resolvers in yaml.SafeLoader.yaml_implicit_resolvers.values() for _, pattern in resolvers]
    assert yaml_config.FLOAT_WITH_EXPONENT not in patterns


@pytest.mark.parametrize("text", ["010", "1e5", "12e03", "3", "1.10", "2024-01-02"])
def test_a_text_that_looks_like_a_number_stays_as_it_is_written(text: str, tmp_path: Path) -> None:
    assert inputs_of(tmp_path, f"output_dir: {text}") == {"output_dir": text}


def test_what_pyyaml_writes_is_read_back_alike(tmp_path: Path) -> None:
    values = {
        "system_prompt": "1e5",
        "output_dir": "on",
        "group_key": "2024-01-02",
        "context_key": "",
        "input_template": "two\nlines: {input} # 3 é",
        "lora_keys": ["a"],
        "learning_rate": 1e-5,
        "lr_schedule": {"arguments": [1e-7, -1]},
    }
    assert inputs_of(tmp_path, yaml.safe_dump(values)) == values


def test_a_simple_alias_and_a_merge_are_read(tmp_path: Path) -> None:
    text = "lr_schedule: &shared {name: a, warmup: 1}\noptimizer_config:\n  adam: {<<: *shared, warmup: 2}\n"
    assert inputs_of(tmp_path, text) == {
        "lr_schedule": {"name": "a", "warmup": 1},
        "optimizer_config": {"adam": {"name": "a", "warmup": 2}},
    }


def nested(opening: str, times: int) -> str:
    return "a: " + opening * times


def bomb(item: str) -> str:
    """Nine anchors, each of nine times the one before: 9 ** 9 values from a few lines."""
    lines = ["a0: &a0 {x: 1}"]
    for level in range(1, 10):
        many = ", ".join([f"*a{level - 1}"] * 9)
        lines.append(f"a{level}: &a{level} " + item.format(many))
    return "\n".join(lines)


BAD_YAML: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "a.yaml is empty. Expected names with values, such as epochs: 2."),
    "comments": ("# nothing\n", "a.yaml is empty."),
    "a list": ("- 1", "expected names with values, such as epochs: 2; found a list."),
    "text": ("hello", "found 'hello'."),
    "a bracket": ("epochs: [1\n", "a.yaml, line 2, column 1: not YAML: expected ',' or ']'"),
    "a tab": ("a:\n\tb: 1\n", "a.yaml, line 2, column 1: not YAML: a tab; YAML allows only spaces there."),
    "two colons": ("a: b: c", "line 1, column 5: not YAML: mapping values are not allowed here."),
    "two documents": ("a: 1\n---\nb: 2\n", "line 2, column 1: not YAML: expected a single document in the stream"),
    "latin-1": (b"a: 1\nb: caf\xe9\n", "a.yaml, line 2: not UTF-8 (byte 0xe9)."),
    "UTF-16": ("a: 1".encode("utf-16"), "a.yaml, line 1: not UTF-8"),
    "a control character": ("a: 1\nb: \x01", "a.yaml, line 2: the character 0x1 is not allowed in YAML."),
    "a key twice": ("seed: 1\nepochs: 2\nseed: 1\n", "line 3, column 1: the key 'seed' stands there twice, first in line 1."),
    "an inner key twice": ("lora_parameters:\n  rank: 1\n  rank: 2\n", "line 3, column 3: the key 'rank' stands there twice"),
    "a key that is a number": ("1: 2", "line 1, column 1: '1' is no key: expected text"),
    "a key that is a truth": ("on: 2", "'on' is no key"),
    "a key that is a list": ("? [a]\n: 2", "a list or a mapping is no key"),
    "code": ("a: !!python/object/apply:os.system [id]", "the tag !!python/object/apply:os.system is not allowed"),
    "a tag": ("a: !mine 3", "line 1, column 4: the tag !mine is not allowed, only plain values."),
    "bytes": ("a: !!binary aGk=", "the tag !!binary is not allowed"),
    "no number": ("a: !!int x", "line 1, column 4: 'x' cannot be read as int."),
    "no truth": ("a: !!bool perhaps", "'perhaps' cannot be read as bool."),
    "digits": ("seed: " + "1" * 5000, "cannot be read as int."),
    "hexadecimal digits": ("seed: 0x" + "f" * 5000, "cannot be read as int."),
    "an unknown alias": ("a: *b", "not YAML: found undefined alias 'b'."),
    "an alias of itself": ("a: &a [*a]", "the alias *a stands within what it stands for."),
    "a bomb of lists": (bomb("[{}]"), "a.yaml, line 5, column 25: more than 10,000 values, counting each use of an alias."),
    "a bomb of mappings": (bomb("{{<<: [{}]}}"), "more than 10,000 values, counting each use of an alias."),
    "many values": ("".join(f"k{n}: 1\n" for n in range(60_000)), "line 5001, column 1: more than 10,000 values"),
    "deep": (nested("[", 100_000), "a.yaml is nested too deeply."),
    "deep mappings": (nested("{a: ", 5000), "a.yaml is nested too deeply."),
    "large": ("a" * 1_000_001, "a.yaml is larger than 1,000,000 bytes. Expected a file of settings."),
}


@pytest.mark.parametrize("name", BAD_YAML)
def test_a_file_that_is_none_is_told_with_its_line(name: str, tmp_path: Path) -> None:
    content, expected = BAD_YAML[name]
    path = tmp_path / "a.yaml"
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    found = problems(["-c", str(path)])
    assert len(found) == 1 and expected in found[0] and str(path) in found[0]


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    assert problems(["-c", str(tmp_path)]) == [f"The configuration {tmp_path} cannot be read: Is a directory."]
    assert problems(["-c", "/dev/zero"]) == ["/dev/zero is larger than 1,000,000 bytes. Expected a file of settings."]
    assert "cannot be read: " in problems(["-c", "a\0b"])[0]


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    assert inputs_of(tmp_path, "\ufeffseed: 3") == {"random_state": 3}
