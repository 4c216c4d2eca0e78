"""Where a sweep looks next, with Optuna over memory and over SQLite; and when it stops a trial early."""

import math
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from finetune_dataflow.errors import UserError
from finetune_dataflow.sweeps.distributions import Parameter
from finetune_dataflow.sweeps.early_stop import brackets, stop
from finetune_dataflow.sweeps.search import combinations, extremes, goal_direction, sampler, suggest
from finetune_dataflow.sweeps.sweep_file import EarlyTermination, Goal, Metric, SweepFile

optuna.logging.set_verbosity(optuna.logging.ERROR)

RANK = Parameter("lora_rank", "categorical", values=(4, 8, 16))
OPTIMIZER = Parameter("optimizer", "categorical", values=("adam", "sgd"))
RATE = Parameter("learning_rate", "log_uniform_values", minimum=1e-5, maximum=1e-3)
DRAWS = 600
HYPERBAND = EarlyTermination("hyperband", min_iter=3)


def sweep_of(method: str, *parameters: Parameter, goal: Goal = "minimize") -> SweepFile:
    return SweepFile(Path("sweep.yaml"), method, Metric("validation_loss", goal), parameters)


def study_of(sweep: SweepFile, seed: int = 42, file: Path | None = None) -> optuna.Study:
    """A study as another process would open it: with a sampler of its own."""
    return optuna.create_study(
        storage=None if file is None else f"sqlite:///{file}",
        sampler=sampler(sweep, seed),
        direction=goal_direction(sweep),
        study_name="sweep",
        load_if_exists=True,
    )


def drawn(study: optuna.Study, sweep: SweepFile, count: int, score: Callable[[dict[str, Any]], float] | None = None) -> list[Any]:
    """The parameters of so many more trials, each ended with its score."""
    found = []
    for _ in range(count):
        trial = study.ask()
        found.append(suggest(trial, sweep))
        study.tell(trial, 0.0 if score is None else score(found[-1]))
    return found


def test_a_grid_has_every_combination_once_with_the_last_parameter_changing_first() -> None:
    sweep = sweep_of("grid", OPTIMIZER, RANK)
    assert combinations(sweep) == 6
    study = study_of(sweep)
    assert [tuple(each.values()) for each in drawn(study, sweep, 6)] == [
        ("adam", 4), ("adam", 8), ("adam", 16), ("sgd", 4), ("sgd", 8), ("sgd", 16),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="trial 6 of a grid with 6 combinations"):
        drawn(study, sweep, 1)


def test_a_grid_counts_out_whole_numbers_and_steps_and_keeps_constants() -> None:
    sweep = sweep_of(
        "grid",
        Parameter("epochs", "int_uniform", minimum=2, maximum=3),
        Parameter("lora_dropout", "q_uniform", minimum=0, maximum=0.3, q=0.1),
        Parameter("seed", "constant", values=(7,)),
        Parameter("warmup", "q_uniform", minimum=10, maximum=20, q=10),
    )
    assert combinations(sweep) == 16
    found = drawn(study_of(sweep), sweep, 16)
    assert [tuple(each.values()) for each in found[:5]] == [
        (2, 0.0, 7, 10), (2, 0.0, 7, 20), (2, 0.1, 7, 10), (2, 0.1, 7, 20), (2, 0.2, 7, 10),
    ]  # fmt: skip
    assert list(found[15].values()) == [3, 0.3, 7, 20]
    assert [type(each) for each in found[0].values()] == [int, float, int, int]


def test_a_grid_of_constants_has_one_trial() -> None:
    sweep = sweep_of("grid", Parameter("seed", "constant", values=(7,)))
    study = study_of(sweep)
    assert (combinations(sweep), drawn(study, sweep, 1)) == (1, [{"seed": 7}])
    with pytest.raises(ValueError, match="trial 1 of a grid with 1 combinations"):
        drawn(study, sweep, 1)


def test_a_grid_too_large_to_be_listed_gives_its_combinations_all_the_same() -> None:
    sweep = sweep_of("grid", *(Parameter(name, "int_uniform", minimum=0, maximum=10**9 - 1) for name in "abc"))
    assert combinations(sweep) == 10**27
    assert drawn(study_of(sweep), sweep, 2) == [{"a": 0, "b": 0, "c": 0}, {"a": 0, "b": 0, "c": 1}]


@pytest.mark.parametrize("method", ["random", "bayes"])
def test_only_a_grid_has_an_end(method: str) -> None:
    assert combinations(sweep_of(method, OPTIMIZER)) is None


def test_listed_values_keep_their_type() -> None:
    values = (1, 1.5, True, "one", None, [1, 2], {"name": "cosine_decay", "arguments": [1e-5, 10]})
    sweep = sweep_of("grid", Parameter("lr_schedule", "categorical", values=values))
    found = [each["lr_schedule"] for each in drawn(study_of(sweep), sweep, 7)]
    assert found == [*values]
    assert [type(each) for each in found] == [int, float, bool, str, type(None), list, dict]


def revived(study: optuna.Study) -> list[optuna.Trial]:
    """The trials that the study believes to be running, as a process that goes on with it takes them up."""
    return [optuna.Trial(study, each._trial_id) for each in study.get_trials(states=(TrialState.RUNNING,))]


def test_a_grid_that_was_killed_does_the_trial_again_and_no_combination_twice(tmp_path: Path) -> None:
    sweep, file = sweep_of("grid", OPTIMIZER, RANK), tmp_path / "study.db"
    first = study_of(sweep, file=file)
    done = drawn(first, sweep, 2)
    killed = suggest(first.ask(), sweep)  # and never told
    second = study_of(sweep, file=file)
    (trial,) = revived(second)
    assert (trial.number, suggest(trial, sweep), killed) == (2, killed, {"optimizer": "adam", "lora_rank": 16})
    second.tell(trial, 1.0)
    assert [*done, killed, *drawn(second, sweep, 3)] == drawn(study_of(sweep), sweep, 6)
    assert len(second.trials) == 6


def test_a_trial_that_was_killed_before_it_had_parameters_gets_those_of_its_number(tmp_path: Path) -> None:
    sweep, file = sweep_of("random", RATE, RANK), tmp_path / "study.db"
    study_of(sweep, file=file).ask()
    (trial,) = revived(study_of(sweep, file=file))
    assert [suggest(trial, sweep)] == drawn(study_of(sweep), sweep, 1)


def test_a_trial_that_was_killed_between_two_of_its_parameters_gets_the_same(tmp_path: Path) -> None:
    sweep, file = sweep_of("bayes", RANK, RATE), tmp_path / "study.db"
    study_of(sweep, file=file).ask().suggest_categorical("lora_rank", (0, 1, 2))
    (trial,) = revived(study_of(sweep, file=file))
    assert [suggest(trial, sweep)] == drawn(study_of(sweep), sweep, 1)


KILLED = """\
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.test_sweep_search import drawn, study_of, suggest, sweep_of, OPTIMIZER, RANK
sweep = sweep_of("grid", OPTIMIZER, RANK)
study = study_of(sweep, file=Path({file!r}))
drawn(study, sweep, 1)
suggest(study.ask(), sweep)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_study_of_a_killed_process_goes_on(tmp_path: Path) -> None:
    sweep, file = sweep_of("grid", OPTIMIZER, RANK), tmp_path / "study.db"
    script = KILLED.format(root=str(Path(__file__).parent.parent), file=str(file))
    ended = subprocess.run([sys.executable, "-c", script], env={**os.environ, "OPENBLAS_NUM_THREADS": "1"}, check=False)
    assert ended.returncode == -signal.SIGKILL
    study = study_of(sweep, file=file)
    (trial,) = revived(study)
    assert (trial.number, suggest(trial, sweep)) == (1, {"optimizer": "adam", "lora_rank": 8})
    study.tell(trial, 1.0)
    assert drawn(study, sweep, 4)[-1] == {"optimizer": "sgd", "lora_rank": 16}


def test_parameters_are_kept_with_the_trial_and_given_again() -> None:
    sweep = sweep_of("random", RATE, RANK)
    study = study_of(sweep)
    trial = study.ask()
    values = suggest(trial, sweep)
    assert suggest(trial, sweep) == values
    assert study.trials[0].user_attrs["parameters"] == values


@pytest.mark.parametrize("method", ["random", "bayes"])
def test_an_interrupted_search_draws_what_an_uninterrupted_one_does(method: str, tmp_path: Path) -> None:
    def score(values: dict[str, Any]) -> float:
        return abs(math.log(values["learning_rate"] / 1e-4)) + values["lora_rank"] / 16

    sweep, file = sweep_of(method, OPTIMIZER, RANK, RATE), tmp_path / "study.db"
    expected = drawn(study_of(sweep), sweep, 12, score)
    found = [each for count in (4, 8) for each in drawn(study_of(sweep, file=file), sweep, count, score)]
    assert found == expected
    assert drawn(study_of(sweep, seed=43), sweep, 12, score) != expected


def test_what_a_random_trial_draws_does_not_depend_on_the_results_or_the_other_parameters() -> None:
    alone, both = sweep_of("random", RATE), sweep_of("random", RANK, RATE)
    rates = [each["learning_rate"] for each in drawn(study_of(alone), alone, 5)]
    assert [each["learning_rate"] for each in drawn(study_of(both), both, 5, lambda values: values["lora_rank"])] == rates
    assert len(set(rates)) == 5


CONTINUOUS: dict[str, tuple[Parameter, Callable[[float], float]]] = {
    "uniform": (Parameter("uniform", "uniform", minimum=-1, maximum=3), lambda x: (x + 1) / 4),
    "log_uniform": (Parameter("log_uniform", "log_uniform", minimum=-9, maximum=-5), lambda x: (math.log(x) + 9) / 4),
    "log_uniform_values": (
        Parameter("log_uniform_values", "log_uniform_values", minimum=0.01, maximum=100),
        lambda x: math.log10(x / 0.01) / 4,
    ),
    "inv_log_uniform": (
        Parameter("inv_log_uniform", "inv_log_uniform", minimum=5, maximum=9),
        lambda x: 1 - (math.log(1 / x) - 5) / 4,
    ),
    "inv_log_uniform_values": (
        Parameter("inv_log_uniform_values", "inv_log_uniform_values", minimum=0.01, maximum=100),
        lambda x: 1 - (math.log(1 / x) - math.log(1 / 100)) / (math.log(1 / 0.01) - math.log(1 / 100)),
    ),
    "normal": (Parameter("normal", "normal", mu=2, sigma=3), lambda x: 0.5 * (1 + math.erf((x - 2) / 3 / math.sqrt(2)))),
    "log_normal": (
        Parameter("log_normal", "log_normal", mu=-7, sigma=0.5),
        lambda x: 0.5 * (1 + math.erf((math.log(x) + 7) / 0.5 / math.sqrt(2))),
    ),
}
STEPPED: dict[str, tuple[Parameter, Callable[[float], float], list[float]]] = {
    "int_uniform": (Parameter("int_uniform", "int_uniform", minimum=1, maximum=4), lambda x: (x - 0.5) / 4, [1, 2, 3, 4]),
    "q_uniform": (Parameter("q_uniform", "q_uniform", minimum=0, maximum=4, q=2), lambda x: x / 4, [0, 2, 4]),
    "q_log_uniform": (
        Parameter("q_log_uniform", "q_log_uniform", minimum=0, maximum=math.log(4), q=1),
        lambda x: math.log(x) / math.log(4),
        [1, 2, 3, 4],
    ),
    "q_log_uniform_values": (
        Parameter("q_log_uniform_values", "q_log_uniform_values", minimum=8, maximum=32, q=8),
        lambda x: math.log(x / 8) / math.log(4),
        [8, 16, 24, 32],
    ),
    "q_normal": (
        Parameter("q_normal", "q_normal", mu=0.5, sigma=0.4, q=0.5),
        lambda x: 0.5 * (1 + math.erf((x - 0.5) / 0.4 / math.sqrt(2))),
        [-0.5, 0.0, 0.5, 1.0, 1.5],
    ),
    "q_log_normal": (
        Parameter("q_log_normal", "q_log_normal", mu=1, sigma=0.25, q=1),
        lambda x: 0.5 * (1 + math.erf((math.log(x) - 1) / 0.25 / math.sqrt(2))),
        [2, 3, 4],
    ),
}


@pytest.fixture(scope="module")
def random_draws() -> dict[str, list[Any]]:
    """The values of every distribution in so many trials of a random search, by its name."""
    choices = Parameter("choices", "categorical", values=("a", "b", "c"))
    weighted = Parameter("weighted", "categorical_w_probabilities", values=("a", "b", "c"), probabilities=(0.2, 0.0, 0.8))
    parameters = [each[0] for each in CONTINUOUS.values()] + [each[0] for each in STEPPED.values()] + [choices, weighted]
    sweep = sweep_of("random", *parameters)
    found = drawn(study_of(sweep), sweep, DRAWS)
    return {each.name: [values[each.name] for values in found] for each in parameters}


@pytest.mark.parametrize("name", CONTINUOUS)
def test_draws_follow_the_distribution_function(name: str, random_draws: dict[str, list[float]]) -> None:
    function = CONTINUOUS[name][1]
    ranks = sorted(map(function, random_draws[name]))
    assert ranks[0] >= 0 and ranks[-1] <= 1
    apart = max(abs(each - (place + 0.5) / DRAWS) for place, each in enumerate(ranks))
    assert apart < 1.63 / math.sqrt(DRAWS)  # Kolmogorov and Smirnov's bound at 1 %
    assert {type(each) for each in random_draws[name]} == {float}


@pytest.mark.parametrize("name", STEPPED)
def test_draws_with_steps_have_the_shares_of_what_is_rounded_to_them(name: str, random_draws: dict[str, list[float]]) -> None:
    parameter, function, values = STEPPED[name]
    counted = Counter(random_draws[name])
    half = (parameter.q or 1) / 2
    for value in values:
        low, high = (min(max(function(max(end, 1e-9)), 0), 1) for end in (value - half, value + half))
        if name in ("q_normal",):
            low, high = function(value - half), function(value + half)
        share = high - low
        assert abs(counted[value] / DRAWS - share) < 4 * math.sqrt(share * (1 - share) / DRAWS), (value, share)
    assert {type(each) for each in counted} == {float if isinstance(parameter.q, float) else int}
    assert all(each / (parameter.q or 1) == round(each / (parameter.q or 1)) for each in counted)


def test_choices_are_equally_probable_and_weighted_ones_as_probable_as_is_said(random_draws: dict[str, list[str]]) -> None:
    equal, weighted = Counter(random_draws["choices"]), Counter(random_draws["weighted"])
    assert all(abs(equal[each] / DRAWS - 1 / 3) < 4 * math.sqrt(2 / 9 / DRAWS) for each in "abc")
    assert abs(weighted["a"] / DRAWS - 0.2) < 4 * math.sqrt(0.16 / DRAWS)
    assert weighted["b"] == 0


def test_draws_of_two_parameters_are_independent(random_draws: dict[str, list[float]]) -> None:
    one, two = ([function(each) - 0.5 for each in random_draws[name]] for name, (_, function) in [*CONTINUOUS.items()][:2])
    correlation = 12 * sum(a * b for a, b in zip(one, two, strict=True)) / DRAWS
    assert abs(correlation) < 4 / math.sqrt(DRAWS)


def test_a_bayesian_search_starts_with_five_trials_that_no_result_changes() -> None:
    sweep = sweep_of("bayes", RATE, RANK)
    found = [drawn(study_of(sweep), sweep, 6, lambda values, sign=sign: sign * values["learning_rate"]) for sign in (1, -1)]  # type: ignore[misc]
    assert found[0][:5] == found[1][:5]
    assert found[0][5] != found[1][5]


@pytest.mark.parametrize("goal", ["minimize", "maximize"])
def test_a_bayesian_search_comes_nearer_than_a_random_one(goal: Goal) -> None:
    sign = 1 if goal == "minimize" else -1
    normal = Parameter("lora_scale", "log_normal", mu=2, sigma=1)

    def miss(values: dict[str, Any]) -> float:
        return (math.log10(values["learning_rate"] / 2e-4)) ** 2 + (math.log(values["lora_scale"]) - 3) ** 2 / 10

    def best(method: str, seed: int) -> float:
        sweep = sweep_of(method, RATE, normal, goal=goal)
        return min(map(miss, drawn(study_of(sweep, seed), sweep, 25, lambda values: sign * miss(values))))

    bayes, random = ([best(method, seed) for seed in range(6)] for method in ("bayes", "random"))
    assert math.prod(bayes) < math.prod(random) / 10


def test_a_bayesian_search_tries_all_combinations_before_it_repeats_one() -> None:
    sweep = sweep_of("bayes", OPTIMIZER, RANK)
    found = drawn(study_of(sweep), sweep, 6, lambda values: values["lora_rank"])
    assert len({tuple(each.values()) for each in found}) == 6
    assert len(drawn(study_of(sweep), sweep, 8)) == 8


def test_parallel_trials_of_a_bayesian_search_are_different() -> None:
    sweep = sweep_of("bayes", RANK, Parameter("epochs", "int_uniform", minimum=1, maximum=4))
    study = study_of(sweep)
    drawn(study, sweep, 6, lambda values: values["lora_rank"] * values["epochs"])
    running = [suggest(study.ask(), sweep) for _ in range(4)]
    assert len({tuple(each.values()) for each in running}) == 4


def test_extremes_are_the_listed_values_or_the_ends_or_the_middle() -> None:
    assert extremes(RANK) == [4, 8, 16]
    assert extremes(Parameter("x", "constant", values=(None,))) == [None]
    assert extremes(Parameter("x", "categorical_w_probabilities", values=(1, 2), probabilities=(0.5, 0.5))) == [1, 2]
    assert extremes(Parameter("x", "int_uniform", minimum=1, maximum=4)) == [1, 4]
    assert extremes(Parameter("x", "uniform", minimum=1, maximum=4)) == [1.0, 4.0]
    assert extremes(Parameter("x", "q_uniform", minimum=1, maximum=6, q=4)) == [0, 8]
    assert [round(each, 6) for each in extremes(Parameter("x", "log_uniform", minimum=-2, maximum=0))] == [0.135335, 1.0]
    assert extremes(Parameter("x", "normal", mu=2, sigma=3)) == [2.0]
    assert extremes(Parameter("x", "q_log_normal", mu=1, sigma=3, q=1)) == [3]


def test_without_optuna_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"Sweeps need Optuna: pip install 'finetune-dataflow\[sweep\]'\."):
        sampler(sweep_of("grid", RANK), 42)


def test_reading_a_sweep_does_not_load_optuna() -> None:
    script = (
        "import sys, finetune_dataflow.sweeps.sweep_file, finetune_dataflow.sweeps.search, finetune_dataflow.sweeps.early_stop\n"
        "print([each for each in ('optuna', 'wandb', 'mlx.core') if each in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ended.stdout == "[]\n"


@pytest.mark.parametrize(
    ("early", "expected"),
    [
        (EarlyTermination("hyperband", min_iter=3), [3, 9, 27, 81, 243]),
        (EarlyTermination("hyperband", max_iter=27, s=2), [3, 9]),
        (EarlyTermination("hyperband", max_iter=27, s=9), [1, 3, 9]),
        (EarlyTermination("hyperband", min_iter=1, eta=2.0), [1, 2, 4, 8, 16, 32, 64, 128, 256]),
        (EarlyTermination("hyperband", max_iter=10, s=3, eta=2.0), [1, 2, 5]),
        (EarlyTermination("hyperband", min_iter=2, eta=1.5), [2, 3, 4, 6, 10, 15, 22, 34, 51, 76, 115, 172, 259, 389]),
    ],
)
def test_the_brackets_are_those_of_wandb(early: EarlyTermination, expected: list[int]) -> None:
    assert brackets(early) == expected
    assert brackets(early, 9) == [each for each in expected if each <= 9]


def losses(*last: float) -> list[list[float]]:
    """Trials with three reports, of which the last is given."""
    return [[9.0, 8.0, each] for each in last]


@pytest.mark.parametrize(
    ("history", "others", "goal", "goes_on"),
    [
        ([9.0, 8.0], losses(1.0, 2.0, 3.0), "minimize", True),  # no bracket is reached
        ([9.0, 8.0, 5.0], [], "minimize", True),  # alone
        ([9.0, 8.0, 5.0], losses(4.0), "minimize", False),  # rank int(2 / 3) = 0: the best of two goes on
        ([9.0, 8.0, 4.0], losses(4.0), "minimize", True),  # as good as the best
        ([9.0, 8.0, 5.0], losses(4.0, 6.0), "minimize", True),  # rank int(3 / 3) = 1: two of three
        ([9.0, 8.0, 7.0], losses(4.0, 6.0), "minimize", False),
        ([9.0, 8.0, 5.0], losses(1.0, 2.0, 3.0, 6.0, 7.0), "minimize", False),  # rank int(6 / 3) = 2: three of six
        ([9.0, 8.0, 3.0], losses(1.0, 2.0, 4.0, 6.0, 7.0), "minimize", True),
        ([9.0, 8.0, 5.0], [[1.0, 1.0]], "minimize", True),  # the other has not come so far
        ([0.1, 0.2, 0.3], [[0.1, 0.2, 0.4]], "maximize", False),
        ([0.1, 0.2, 0.4], [[0.1, 0.2, 0.3]], "maximize", True),
        ([9.0, 8.0, math.nan], losses(9.5), "minimize", True),  # its best value so far was good enough
        ([9.0, 8.0, 5.0], [[9.0, 8.0, math.nan]], "minimize", True),
        ([math.nan, math.nan, math.nan], losses(9.5), "minimize", False),
        ([9.0, 8.0, 5.0, 3.5], losses(4.0), "minimize", True),  # after the bracket it has become good enough
        ([9.0, 8.0, 5.0, 4.5], losses(4.0), "minimize", False),
    ],
)
def test_a_trial_goes_on_where_it_is_among_the_best_third_at_its_bracket(
    history: Sequence[float], others: Sequence[Sequence[float]], goal: Goal, goes_on: bool
) -> None:
    assert (stop(history, others, goal, HYPERBAND) is None) is goes_on


def test_a_strict_stop_looks_at_the_value_at_the_bracket_and_not_at_the_best_before() -> None:
    strict = EarlyTermination("hyperband", min_iter=3, strict=True)
    history = [3.0, 8.0, 5.0]
    assert stop(history, losses(4.0), "minimize", HYPERBAND) is None
    assert stop(history, losses(4.0), "minimize", strict) == (
        "its value 5 is not among the best 1/3 of 2 trials at report 3 of the metric: those have 4 or less"
    )


def test_the_last_bracket_that_was_reached_counts() -> None:
    eighth = [5.0] * 9
    assert stop(eighth, [[9.0] * 8 + [4.0], [9.0, 9.0, 1.0]], "minimize", HYPERBAND) == (
        "its best value 5 is not among the best 1/3 of 2 trials at report 9 of the metric: those have 4 or less"
    )


def test_the_reason_names_what_would_have_been_good_enough() -> None:
    assert stop([0.1, 0.2, 0.3], [[0.1, 0.2, 0.4]], "maximize", HYPERBAND) == (
        "its best value 0.3 is not among the best 1/3 of 2 trials at report 3 of the metric: those have 0.4 or more"
    )
