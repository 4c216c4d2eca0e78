"""A sweep file of Weights & Biases: what is read from it, what is told, and every refusal."""

import textwrap
from pathlib import Path

import pytest

from finetune_dataflow.errors import UserError
from finetune_dataflow.sweeps.distributions import Parameter, bounds, quantized
from finetune_dataflow.sweeps.sweep_file import EarlyTermination, Metric, SweepFile, read_sweep

METRICS = ("train_loss", "validation_loss", "validation_perplexity", "rouge1", "rouge2", "rougeL", "rougeLsum")
INPUTS = (
    "batch_size",
    "epochs",
    "learning_rate",
    "lora_dropout",
    "lora_keys",
    "lora_rank",
    "lora_scale",
    "model_id",
    "optimizer",
)
ALIASES = {
    "lora_parameters.rank": "lora_rank", "lora_parameters.scale": "lora_scale", "model": "model_id", "seed": "random_state",
}  # fmt: skip
NAMES = {**{name: name for name in (*INPUTS, "random_state")}, **ALIASES}
HEAD = "method: random\nmetric: {name: validation_loss}\n"
ALL_METRICS = "train_loss, validation_loss, validation_perplexity, rouge1, rouge2, rougeL and rougeLsum"


@pytest.fixture(autouse=True)
def in_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(text: str) -> SweepFile:
    Path("sweep.yaml").write_text(textwrap.dedent(text), encoding="utf-8")
    return read_sweep(Path("sweep.yaml"), NAMES.get, [*NAMES], METRICS)


def refused(text: str) -> list[str]:
    """The lines of the message, without the file's name, which begins each."""
    with pytest.raises(UserError) as caught:
        read(text)
    lines = str(caught.value).splitlines()
    assert all(line.startswith("sweep.yaml: ") for line in lines), lines
    return [line.removeprefix("sweep.yaml: ") for line in lines]


def parameter(text: str, head: str = HEAD) -> Parameter:
    """The one parameter of a file, from the line that describes it."""
    (found,) = read(f"{head}parameters:\n  {text}\n").parameters
    return found


def notices(text: str) -> list[str]:
    return [each.removeprefix("sweep.yaml: ") for each in read(text).notices]


def test_a_whole_file_of_wandb_is_read() -> None:
    sweep = read(
        """\
        program: train.py
        name: ranks
        description: which rank is enough
        project: support
        entity: us
        method: bayes
        run_cap: 20
        metric:
          name: validation_loss
          goal: minimize
          target: 1.25
        parameters:
          learning_rate:
            distribution: log_uniform_values
            min: 1e-5
            max: 1e-3
          batch_size:
            values: [2, 4, 8]
          optimizer:
            value: adamw
        early_terminate:
          type: hyperband
          min_iter: 3
          eta: 2
          strict: true
        command: ["${env}", python, "${program}", "${args}"]
        """
    )
    assert sweep == SweepFile(
        path=Path("sweep.yaml"),
        method="bayes",
        metric=Metric("validation_loss", "minimize", 1.25),
        parameters=(
            Parameter("batch_size", "categorical", values=(2, 4, 8)),
            Parameter("learning_rate", "log_uniform_values", minimum=1e-5, maximum=1e-3),
            Parameter("optimizer", "constant", values=("adamw",)),
        ),
        early_terminate=EarlyTermination("hyperband", min_iter=3, eta=2.0, strict=True),
        run_cap=20,
        name="ranks",
        description="which rank is enough",
        project="support",
        entity="us",
        notices=("sweep.yaml: command and program: not used, because every trial is a run of this command.",),
    )


def test_nested_parameters_are_named_with_dots_and_stand_in_the_order_of_their_names() -> None:
    sweep = read(
        HEAD
        + """\
parameters:
  optimizer: {values: [adam, sgd]}
  lora_parameters:
    parameters:
      scale: {values: [10.0, 20.0]}
      rank: {values: [4, 8]}
  epochs: {value: 2}
"""
    )
    assert [each.name for each in sweep.parameters] == ["epochs", "lora_rank", "lora_scale", "optimizer"]
    assert sweep.parameters[1] == Parameter("lora_rank", "categorical", values=(4, 8))


def test_a_dotted_name_and_an_alias_are_the_inputs_they_mean() -> None:
    assert parameter("lora_parameters.rank: {values: [4, 8]}").name == "lora_rank"
    assert parameter("model: {values: [one, two]}").name == "model_id"


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("{value: 4}", Parameter("epochs", "constant", values=(4,))),
        ("{value: null}", Parameter("epochs", "constant", values=(None,))),
        ("{values: [1, 1.5, true, one, null]}", Parameter("epochs", "categorical", values=(1, 1.5, True, "one", None))),
        ("{values: [[1, 2], {a: 3}]}", Parameter("epochs", "categorical", values=([1, 2], {"a": 3}))),
        ("{values: [1e-4, 2e-4]}", Parameter("epochs", "categorical", values=(0.0001, 0.0002))),
        ("{values: [1, 2], distribution: categorical}", Parameter("epochs", "categorical", values=(1, 2))),
        (
            "{values: [1, 2], probabilities: [0.25, 0.75]}",
            Parameter("epochs", "categorical_w_probabilities", values=(1, 2), probabilities=(0.25, 0.75)),
        ),
        (
            "{values: [1, 2], probabilities: [1, 0], distribution: categorical}",
            Parameter("epochs", "categorical_w_probabilities", values=(1, 2), probabilities=(1.0, 0.0)),
        ),
        ("{min: 1, max: 8}", Parameter("epochs", "int_uniform", minimum=1, maximum=8)),
        ("{min: 1, max: 8.0}", Parameter("epochs", "uniform", minimum=1, maximum=8.0)),
        ("{min: 1, max: 8, distribution: uniform}", Parameter("epochs", "uniform", minimum=1, maximum=8)),
        ("{min: 1e-5, max: 1E-3}", Parameter("epochs", "uniform", minimum=0.00001, maximum=0.001)),
        ("{min: '1e-5', max: '8'}", Parameter("epochs", "uniform", minimum=0.00001, maximum=8)),
        ("{min: '1', max: '8'}", Parameter("epochs", "int_uniform", minimum=1, maximum=8)),
        ("{distribution: q_uniform, min: 0, max: 8}", Parameter("epochs", "q_uniform", minimum=0, maximum=8, q=1)),
        ("{distribution: q_uniform, min: 0, max: 1, q: 0.25}", Parameter("epochs", "q_uniform", minimum=0, maximum=1, q=0.25)),
        ("{distribution: log_uniform, min: -9, max: -5}", Parameter("epochs", "log_uniform", minimum=-9, maximum=-5)),
        (
            "{distribution: q_log_uniform_values, min: 8, max: 64, q: 8}",
            Parameter("epochs", "q_log_uniform_values", minimum=8, maximum=64, q=8),
        ),
        ("{distribution: inv_log_uniform, min: 5, max: 9}", Parameter("epochs", "inv_log_uniform", minimum=5, maximum=9)),
        ("{distribution: normal}", Parameter("epochs", "normal", mu=0, sigma=1)),
        ("{distribution: log_normal, mu: -7, sigma: 0.5}", Parameter("epochs", "log_normal", mu=-7, sigma=0.5)),
        ("{distribution: q_normal, mu: 4}", Parameter("epochs", "q_normal", mu=4, sigma=1, q=1)),
        ("{distribution: q_log_normal, q: 0.5}", Parameter("epochs", "q_log_normal", mu=0, sigma=1, q=0.5)),
    ],
)
def test_each_way_to_write_a_parameter_gives_its_distribution(written: str, expected: Parameter) -> None:
    assert parameter(f"epochs: {written}") == expected


def test_numbers_keep_their_type_in_values() -> None:
    values = parameter("epochs: {values: [1, 2.0, 3e0, '4']}").values
    assert values is not None
    assert [type(each).__name__ for each in values] == ["int", "float", "float", "str"]


def test_the_goal_is_to_minimize_and_without_a_metric_the_validation_loss_counts() -> None:
    parameters = "parameters: {epochs: {values: [1, 2]}}"
    assert read(f"{HEAD}{parameters}").metric == Metric("validation_loss", "minimize", None)
    sweep = read(f"method: grid\n{parameters}")
    assert sweep.metric == Metric("validation_loss", "minimize", None)
    assert sweep.notices == ("sweep.yaml: metric is not given: trials are judged by validation_loss.",)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("{type: hyperband, min_iter: 3}", EarlyTermination("hyperband", min_iter=3)),
        ("{type: hyperband, max_iter: 27, s: 2}", EarlyTermination("hyperband", max_iter=27, s=2)),
        ("{type: hyperband, max_iter: 27, s: 2, eta: '1.5'}", EarlyTermination("hyperband", max_iter=27, s=2, eta=1.5)),
        ("{type: hyperband, max_iter: 27, s: 2, min_iter: 3}", EarlyTermination("hyperband", max_iter=27, s=2)),
        ("{type: hyperband, max_iter: 27, min_iter: 3}", EarlyTermination("hyperband", min_iter=3)),
        ("null", None),
    ],
)
def test_early_termination_has_one_of_its_two_schedules(written: str, expected: EarlyTermination | None) -> None:
    assert read(f"{HEAD}parameters: {{epochs: {{values: [1, 2]}}}}\nearly_terminate: {written}").early_terminate == expected


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (
            "{distribution: log_uniform, min: 1e-5, max: 1e-3}",
            "parameters.epochs: log_uniform takes exponents of e, so its values are between 1 and 1.001. Where min and max are "
            "values, write log_uniform_values.",
        ),
        (
            "{distribution: inv_log_uniform, min: 5, max: 9}",
            "parameters.epochs: inv_log_uniform takes exponents of e, so its values are between 0.0001234 and 0.006738. Where "
            "min and max are values, write inv_log_uniform_values.",
        ),
        (
            "{distribution: q_log_uniform_values, min: 1, max: 30, q: 8}",
            "parameters.epochs: rounded to multiples of q=8, its values go from 0 to 32, beyond 1 to 30.",
        ),
    ],
)
def test_a_range_that_may_not_be_meant_is_told(written: str, expected: str) -> None:
    assert notices(f"{HEAD}parameters:\n  epochs: {written}\n") == [expected]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (
            "metric: {name: train_loss, impute: best, impute_while_running: latest}",
            [
                "metric.impute: not used, because a trial that fails is left out of the search.",
                "metric.impute_while_running: not used, because a trial that fails is left out of the search.",
            ],
        ),
        (
            "metric: {name: rougeL, goal: minimize}",
            ["metric.goal=minimize: the worst rougeL wins; the best would with maximize."],
        ),
        (
            "metric: {name: train_loss, goal: maximize}",
            ["metric.goal=maximize: the worst train_loss wins; the best would with minimize."],
        ),
        ("metric: {name: rougeL, goal: maximize}", []),
        (
            "metric: {name: train_loss}\ncontroller: {type: local}",
            ["controller: not used, because every trial is a run of this command."],
        ),
        (
            "metric: {name: train_loss}\nearly_terminate: {type: hyperband, min_iter: 2, s: 3}",
            ["early_terminate.s: not used, because max_iter and s go together."],
        ),
        (
            "metric: {name: train_loss}\nearly_terminate: {type: hyperband, min_iter: 2, max_iter: 9, s: 1}",
            ["early_terminate.min_iter: not used beside max_iter and s."],
        ),
    ],
)
def test_what_is_accepted_and_has_no_use_is_told(written: str, expected: list[str]) -> None:
    assert notices(f"method: random\nparameters: {{epochs: {{values: [1, 2]}}}}\n{written}") == expected


TAKES_VALUES = "the distribution is categorical, which takes values."
TAKES_ENDS = "the distribution is int_uniform, which takes min and max."
OF_A_GRID = "a grid takes value, values, whole numbers from min to max, or distribution: q_uniform."


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("{min: 3, max: 2}", ": min=3 is not below max=2."),
        ("{min: 0.1, max: 0.01}", ": min=0.1 is not below max=0.01."),
        ("{min: 4, max: 4}", ": min and max are both 4. For one value write value: 4."),
        ("{min: fast, max: 4}", ".min='fast': expected a number."),
        ("{min: .nan, max: 4}", ".min=nan: expected a number."),
        ("{min: 1, max: .inf}", ".max=inf: expected a number."),
        ("{min: true, max: 4}", ".min=True: expected a number."),
        ("{min: 1}", f".max is missing: {TAKES_ENDS}"),
        ("{max: 1}", f".min is missing: {TAKES_ENDS}"),
        ("{values: []}", ".values=[]: expected a list with at least one value, as [4, 8]."),
        ("{values: 4}", ".values=4: expected a list with at least one value, as [4, 8]."),
        ("{values: [1, 2, 1]}", ".values: 1 stands there twice."),
        ("{values: [1, 1.0]}", ".values: 1.0 stands there twice."),
        ("{values: [1, 2], min: 0}", f".min=0: {TAKES_VALUES}"),
        ("{values: [1, 2], value: 3}", ".values=[1, 2]: the distribution is constant, which takes value."),
        ("{values: [1, 2], probabilities: [0.5, 0.4]}", ".probabilities: their sum is 0.9, expected 1."),
        ("{values: [1, 2], probabilities: [1]}", ".probabilities: expected 2, one for each of values; found 1."),
        ("{values: [1, 2], probabilities: [2, -1]}", ".probabilities=[2, -1]: expected a list of numbers, 0 or more."),
        ("{values: [1, 2], probabilities: half}", ".probabilities='half': expected a list of numbers, 0 or more."),
        ("{min: 1, max: 2, q: 1}", ".q needs a distribution, such as q_uniform."),
        ("{mu: 1}", ".mu needs a distribution, such as normal."),
        ("{distribution: constant}", ".value is missing: the distribution is constant, which takes value."),
        (
            "{distribution: normal, min: 1, sigma: 2}",
            ".min=1: the distribution is normal, which takes mu and sigma.",
        ),
        (
            "{distribution: loguniform, min: 1, max: 2}",
            ".distribution='loguniform': unknown distribution. Did you mean 'log_uniform'?",
        ),
        ("{distribution: log_uniform_values, min: 0, max: 1}", ".min=0: log_uniform_values takes numbers above 0."),
        ("{distribution: inv_log_uniform_values, min: -1, max: 1}", ".min=-1: inv_log_uniform_values takes numbers above 0."),
        (
            "{distribution: log_uniform, min: 1, max: 1000}",
            ": min=1 and max=1000 are exponents of e. Where they are values, write log_uniform_values.",
        ),
        (
            "{distribution: int_uniform, min: 0.5, max: 3}",
            ": min=0.5 and max=3: int_uniform takes whole numbers. For others write distribution: uniform.",
        ),
        ("{distribution: q_uniform, min: 1, max: 2, q: 0}", ".q=0: expected a number above 0."),
        ("{distribution: q_uniform, min: 1, max: 3, q: 100}", ".q=100: every value between min and max would be rounded to 0."),
        ("{distribution: q_uniform, min: 1, max: 3, q: 1e-300}", ".q=1e-300: too small a step for values up to 3."),
        ("{distribution: normal, sigma: 0}", ".sigma=0: expected a number above 0."),
        (
            "{distribution: log_normal, mu: 700}",
            ": mu=700 and sigma=1 are of the logarithm, and e to the 708 is too large.",
        ),
        ("{}", ": expected value, values, or min and max; found nothing."),
        ("{probabilities: [1]}", ": expected value, values, or min and max; found probabilities."),
        ("{valeus: [1, 2]}", ".valeus: unknown key. Did you mean 'values'?"),
        (
            "{rank: {values: [4, 8]}}",
            ".rank: names within it stand below parameters, as {parameters: {rank: {values: [4, 8]}}}.",
        ),
        ("4", "=4: expected a mapping, as {value: 4}."),
        ("[4, 8]", "=[4, 8]: expected a mapping, as {values: [4, 8]}."),
        ("null", "=None: expected a mapping, as {values: [4, 8]}."),
        ("{parameters: {}}", ".parameters is empty: expected names with values, as learning_rate: {min: 1e-5, max: 1e-3}."),
        ("{parameters: 4}", ".parameters=4: expected names with values, as learning_rate: {min: 1e-5, max: 1e-3}."),
    ],
)
def test_a_parameter_that_contradicts_itself_is_refused_with_its_place(written: str, expected: str) -> None:
    assert refused(f"{HEAD}parameters:\n  epochs: {written}\n") == [f"parameters.epochs{expected}"]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("lerning_rate", " Did you mean 'learning_rate'?"),
        ("lr", " Did you mean 'learning_rate'?"),
        ("rank", " Did you mean 'lora_rank'?"),
        ("dropout", " Did you mean 'lora_dropout'?"),
        ("alpha", " Search lora_parameters.scale, which is alpha / rank."),
        ("xyz", ""),
    ],
)
def test_an_unknown_parameter_is_refused_with_the_nearest_input(name: str, hint: str) -> None:
    message = f"parameters.{name}: '{name}' is no input.{hint} `run.py inputs` lists all."
    assert refused(f"{HEAD}parameters:\n  {name}: {{values: [1, 2]}}\n") == [message]


def test_two_spellings_of_one_input_are_refused() -> None:
    text = f"{HEAD}parameters:\n  lora_rank: {{values: [4]}}\n  lora_parameters: {{parameters: {{rank: {{values: [8]}}}}}}\n"
    assert refused(text) == [
        "parameters.lora_parameters.parameters.rank and parameters.lora_rank are the same input, lora_rank. Give one of them."
    ]


def test_keys_beside_nested_parameters_are_refused() -> None:
    text = f"{HEAD}parameters:\n  lora_parameters: {{parameters: {{rank: {{value: 4}}}}, min: 1, max: 2}}\n"
    assert refused(text) == ["parameters.lora_parameters: min and max cannot stand beside parameters."]


@pytest.mark.parametrize(
    ("written", "distribution"),
    [
        ("{min: 0.1, max: 0.2}", "uniform"),
        ("{distribution: log_uniform_values, min: 1, max: 2}", "log_uniform_values"),
        ("{distribution: q_log_uniform_values, min: 1, max: 8}", "q_log_uniform_values"),
        ("{distribution: normal}", "normal"),
        ("{values: [1, 2], probabilities: [0.5, 0.5]}", "categorical_w_probabilities"),
    ],
)
def test_a_grid_over_what_cannot_be_counted_out_is_refused(written: str, distribution: str) -> None:
    text = f"method: grid\nmetric: {{name: train_loss}}\nparameters:\n  epochs: {written}\n"
    assert refused(text) == [f"parameters.epochs: the distribution is {distribution}; {OF_A_GRID}"]


@pytest.mark.parametrize(
    "written", ["{value: 1}", "{values: [1, 2]}", "{min: 1, max: 3}", "{distribution: q_uniform, min: 0, max: 4}"]
)
def test_a_grid_over_what_can_be_counted_out_is_read(written: str) -> None:
    assert parameter(f"epochs: {written}", "method: grid\nmetric: {name: train_loss}\n").name == "epochs"


BODY = "parameters: {epochs: {values: [1, 2]}}\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"metric: {{name: train_loss}}\n{BODY}", "method is missing: expected grid, random or bayes."),
        (f"method: bayesian\nmetric: {{name: train_loss}}\n{BODY}",
         "method='bayesian': expected grid, random or bayes. Did you mean 'bayes'?"),
        (f"method: custom\nmetric: {{name: train_loss}}\n{BODY}", "method='custom': expected grid, random or bayes."),
        (f"method: 3\nmetric: {{name: train_loss}}\n{BODY}", "method=3: expected grid, random or bayes."),
        (f"method: bayes\n{BODY}",
         "metric is missing, and method bayes needs it: expected a mapping, as {name: validation_loss, goal: minimize}."),
        (f"method: grid\nearly_terminate: {{type: hyperband, min_iter: 1}}\n{BODY}",
         "metric is missing, and early_terminate needs it: expected a mapping, as {name: validation_loss, goal: minimize}."),
        (f"method: grid\nmetric: train_loss\n{BODY}",
         "metric='train_loss': expected a mapping, as {name: validation_loss, goal: minimize}."),
        (f"method: grid\nmetric: {{goal: minimize}}\n{BODY}", f"metric.name is missing: expected one of {ALL_METRICS}."),
        (f"method: grid\nmetric: {{name: rougeL}}\n{BODY}",
         "metric.goal is missing: W&B minimizes then, and the worst rougeL would win. Expected maximize."),
        (f"method: grid\nmetric: {{name: rougeL, goal: max}}\n{BODY}",
         "metric.goal='max': expected minimize or maximize."),
        (f"method: grid\nmetric: {{name: rougeL, goal: maximise}}\n{BODY}",
         "metric.goal='maximise': expected minimize or maximize. Did you mean 'maximize'?"),
        (f"method: grid\nmetric: {{name: train_loss, target: low}}\n{BODY}", "metric.target='low': expected a number."),
        (f"method: grid\nmetric: {{name: train_loss, gaol: minimize}}\n{BODY}", "metric.gaol: unknown key. Did you mean 'goal'?"),
        (HEAD, "parameters is missing: expected names with values, as learning_rate: {min: 1e-5, max: 1e-3}."),
        (f"{HEAD}parameters: {{}}\n",
         "parameters is empty: expected names with values, as learning_rate: {min: 1e-5, max: 1e-3}."),
        (f"{HEAD}parameters: [epochs]\n",
         "parameters=['epochs']: expected names with values, as learning_rate: {min: 1e-5, max: 1e-3}."),
        (f"{HEAD}{BODY}run_cap: 0\n", "run_cap=0: expected a whole number, 1 or more."),
        (f"{HEAD}{BODY}run_cap: many\n", "run_cap='many': expected a whole number, 1 or more."),
        (f"{HEAD}{BODY}run_cap: 2.5\n", "run_cap=2.5: expected a whole number, 1 or more."),
        (f"{HEAD}{BODY}name: [a]\n", "name=['a']: expected a text, in quotes where it looks like something else."),
        (f"{HEAD}{BODY}runcap: 3\n", "runcap: unknown key. Did you mean 'run_cap'?"),
        (f"{HEAD}{BODY}seed: 3\n", "seed: a sweep draws with the seed of its runs. Give --seed on the command line."),
        (f"{HEAD}{BODY}metrics: []\n", "metrics: several metrics need W&B's method custom. Give one, as metric."),
        (f"{HEAD}{BODY}sweep_configuration: {{}}\n",
         "sweep_configuration: what stands below it is a sweep file of its own; the other keys are a file for -c."),
    ],
)  # fmt: skip
def test_a_file_with_a_problem_is_refused_with_its_key(text: str, expected: str) -> None:
    assert refused(text) == [expected]


@pytest.mark.parametrize(
    ("found", "meant"),
    [
        ("val_loss", "validation_loss"),
        ("val/loss", "validation_loss"),
        ("valid_loss", "validation_loss"),
        ("eval_loss", "validation_loss"),
        ("loss", "validation_loss"),
        ("train/loss", "train_loss"),
        ("Perplexity", "validation_perplexity"),
        ("rougel", "rougeL"),
        ("rouge_1", "rouge1"),
    ],
)
def test_another_tools_name_of_a_metric_is_refused_with_ours(found: str, meant: str) -> None:
    text = f"method: grid\nmetric: {{name: {found}, goal: maximize}}\n{BODY}"
    assert refused(text) == [f"metric.name='{found}': expected one of {ALL_METRICS}. Did you mean '{meant}'?"]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("hyperband", "='hyperband': expected a mapping, as {type: hyperband, min_iter: 3}."),
        ("{min_iter: 3}", ".type is missing: expected hyperband."),
        ("{type: envelope, min_iter: 3}", ".type='envelope': expected hyperband."),
        ("{type: hyperband}", ": expected min_iter, or max_iter and s."),
        ("{type: hyperband, max_iter: 27}", ".s is missing: expected the number of brackets, which max_iter needs."),
        ("{type: hyperband, min_iter: 0}", ".min_iter=0: expected a whole number, 1 or more."),
        ("{type: hyperband, max_iter: 27, s: 1.5}", ".s=1.5: expected a whole number, 1 or more."),
        ("{type: hyperband, max_iter: 2, s: 1}", ".max_iter=2: with eta=3 expected 3 or more."),
        ("{type: hyperband, min_iter: 3, eta: 1}", ".eta=1: expected a number above 1."),
        ("{type: hyperband, min_iter: 3, eta: much}", ".eta='much': expected a number."),
        ("{type: hyperband, min_iter: 3, strict: 'yes'}", ".strict='yes': expected true or false."),
        ("{type: hyperband, miniter: 3, min_iter: 3}", ".miniter: unknown key. Did you mean 'min_iter'?"),
    ],
)
def test_early_termination_with_a_problem_is_refused(written: str, expected: str) -> None:
    assert refused(f"{HEAD}{BODY}early_terminate: {written}\n") == [f"early_terminate{expected}"]


def test_a_distribution_with_two_problems_is_told_both() -> None:
    text = "method: grid\nmetric: {name: train_loss}\nparameters:\n  lr: {min: 1e-3, max: 1e-5}\n"
    assert refused(text) == [
        "parameters.lr: 'lr' is no input. Did you mean 'learning_rate'? `run.py inputs` lists all.",
        f"parameters.lr: the distribution is uniform; {OF_A_GRID}",
        "parameters.lr: min=0.001 is not below max=1e-05.",
    ]


def test_all_problems_are_told_at_once() -> None:
    assert refused(
        """\
        methd: grid
        metric: {name: val_loss}
        run_cap: -1
        parameters:
          learning_rate: {min: 0.1, max: 0.01}
          lora_rnk: {values: []}
        """
    ) == [
        "methd: unknown key. Did you mean 'method'?",
        "method is missing: expected grid, random or bayes.",
        f"metric.name='val_loss': expected one of {ALL_METRICS}. Did you mean 'validation_loss'?",
        "parameters.learning_rate: min=0.1 is not below max=0.01.",
        "parameters.lora_rnk: 'lora_rnk' is no input. Did you mean 'lora_rank'? `run.py inputs` lists all.",
        "parameters.lora_rnk.values=[]: expected a list with at least one value, as [4, 8].",
        "run_cap=-1: expected a whole number, 1 or more.",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("method: grid\nmethod: random\n", "sweep.yaml, line 2, column 1: the key 'method' stands there twice, first in line 1."),
        ("method: !!python/name:os.system x\n",
         "sweep.yaml, line 1, column 9: the tag !!python/name:os.system is not allowed, only plain values."),
        ("method: [grid\n", "sweep.yaml, line 2, column 1: not YAML: expected ',' or ']', but got '<stream end>'."),
        ("- grid\n", "sweep.yaml: expected names with values, such as epochs: 2; found a list."),
        ("", "sweep.yaml is empty. Expected names with values, such as epochs: 2."),
    ],
)  # fmt: skip
def test_what_is_no_yaml_of_settings_is_refused_with_its_line(text: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        read(text)
    assert str(caught.value) == expected


def test_a_file_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match=r"gone\.yaml cannot be read: No such file or directory"):
        read_sweep(Path("gone.yaml"), NAMES.get, [*NAMES], METRICS)


def test_a_quantized_value_is_the_nearest_multiple_half_to_even() -> None:
    assert [quantized(each, 8) for each in (3.9, 4.0, 4.1, 12.0)] == [0, 0, 8, 16]
    assert [quantized(each, 0.1) for each in (0.26, 0.349, 1e6)] == [0.3, 0.3, 1000000.0]
    assert isinstance(quantized(3.2, 1), int) and isinstance(quantized(3.2, 1.0), float)


def test_the_bounds_of_exponents_are_powers_of_e() -> None:
    low, high = bounds(Parameter("x", "log_uniform", minimum=-1, maximum=2))
    assert (round(low, 6), round(high, 6)) == (0.367879, 7.389056)
    low, high = bounds(Parameter("x", "inv_log_uniform", minimum=-1, maximum=2))
    assert (round(low, 6), round(high, 6)) == (0.135335, 2.718282)
