"""Where a sweep looks next: the combinations of a grid in turn, draws from W&B's distributions, or a Bayesian search.

Trials are known by their numbers in the study. What trial n draws follows from the seed, from n and, in a Bayesian search,
from the trials before it: not from the process that asks. A trial that was killed keeps its number and its parameters, so a
sweep that was interrupted goes on as if it had not been. Optuna keeps an index, a number or a quantile of each parameter;
the value that is meant is in the trial's user attribute PARAMETERS.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from finetune_dataflow.engine.files import fingerprint
from finetune_dataflow.errors import UserError
from finetune_dataflow.sweeps.distributions import Number, Parameter, bounds, quantized
from finetune_dataflow.sweeps.sweep_file import Goal, SweepFile

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

    Space = dict[str, BaseDistribution]

PARAMETERS = "parameters"
EDGE = 1e-12  # how near to 0 and to 1 a quantile comes
MOST_ESTIMATED, MOST_DRAWS = 10, 100  # draws of a Bayesian search for parameters that no other trial has
# Trials at random before a Bayesian search. Of 3, 5 and 10, tried on functions of one to four parameters with a budget of 8
# to 40 trials, 3 and 5 came nearer to the minimum where there is one, and 5 and 10 where there are two.
STARTING_TRIALS = 5


def sampler(sweep: SweepFile, seed: int) -> optuna.samplers.BaseSampler:
    """The sampler of a study for this sweep.

    grid: trial n has the combination n, the last parameter changing first. random: trial n has its own draw. bayes: a tree-
    structured Parzen estimator (Bergstra et al. 2011) over all parameters at once, in which a trial that still runs counts as a
    bad one; after STARTING_TRIALS at random, and with another draw where a trial has these parameters already. It is not the
    Gaussian process of W&B: Optuna's would need torch and SciPy.

    Raises UserError where Optuna is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise UserError("Sweeps need Optuna: pip install 'finetune-dataflow[sweep]'.") from error

    class Draws(optuna.samplers.BaseSampler):
        def infer_relative_search_space(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> Space:
            return {name: each for name, each in _space(sweep).items() if not each.single()}

        def sample_relative(self, study: optuna.Study, trial: optuna.trial.FrozenTrial, search_space: Space) -> dict[str, Any]:
            if sweep.method == "grid":
                return _combination(sweep, trial.number, search_space)
            if sweep.method == "random":
                return {name: self._random(study, trial, name, each) for name, each in search_space.items()}
            return self._bayes(study, trial, search_space)

        def sample_independent(
            self, study: optuna.Study, trial: optuna.trial.FrozenTrial, param_name: str, param_distribution: BaseDistribution
        ) -> Any:
            return self._random(study, trial, param_name, param_distribution)

        def _random(
            self, study: optuna.Study, trial: optuna.trial.FrozenTrial, name: str, each: BaseDistribution, attempt: int = 0
        ) -> Any:
            plain = optuna.samplers.RandomSampler(seed=_seed(seed, trial.number, name, attempt))
            return plain.sample_independent(study, trial, name, each)

        def _bayes(self, study: optuna.Study, trial: optuna.trial.FrozenTrial, space: Space) -> dict[str, Any]:
            trials = study.get_trials(deepcopy=False)
            tried = [each.user_attrs.get(PARAMETERS) for each in trials if each.number != trial.number]
            for attempt in range(MOST_DRAWS):
                drawn = self._estimated(study, trial, space, attempt) if attempt < MOST_ESTIMATED else {}
                drawn = drawn or {name: self._random(study, trial, name, each, attempt) for name, each in space.items()}
                if _values(sweep, drawn) not in tried:
                    break
            return drawn

        def _estimated(self, study: optuna.Study, trial: optuna.trial.FrozenTrial, space: Space, attempt: int) -> dict[str, Any]:
            """What the estimator draws; nothing while the trials at random are not done."""
            estimator = optuna.samplers.TPESampler(
                seed=_seed(seed, trial.number, "", attempt),
                n_startup_trials=STARTING_TRIALS,
                multivariate=True,
                constant_liar=True,
            )
            return estimator.sample_relative(study, trial, space)

    return Draws()


def suggest(trial: optuna.Trial, sweep: SweepFile) -> dict[str, Any]:
    """The value of every parameter of a trial, by the name of its input; the same again for a trial that has them already.

    Whole numbers are int, other numbers float, listed values as they stand in the file. Raises ValueError for a trial beyond
    the last combination of a grid.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    count = combinations(sweep)
    if count is not None and trial.number >= count:
        raise ValueError(f"trial {trial.number} of a grid with {count} combinations")
    drawn: dict[str, Any] = {}
    for name, each in _space(sweep).items():
        if isinstance(each, CategoricalDistribution):
            drawn[name] = trial.suggest_categorical(name, each.choices)
        elif isinstance(each, IntDistribution):
            drawn[name] = trial.suggest_int(name, each.low, each.high)
        elif isinstance(each, FloatDistribution):
            drawn[name] = trial.suggest_float(name, each.low, each.high, log=each.log)
    values = _values(sweep, drawn)
    trial.set_user_attr(PARAMETERS, values)
    return values


def combinations(sweep: SweepFile) -> int | None:
    """How many trials a grid has; None for the methods that have no end."""
    return math.prod(map(_count, sweep.parameters)) if sweep.method == "grid" else None


def goal_direction(sweep: SweepFile) -> Goal:
    """The direction of the study: minimize or maximize."""
    return sweep.metric.goal


def extremes(parameter: Parameter) -> list[Any]:
    """Values to try a parameter out with: all that are listed; else the least and the largest; else the one in the middle."""
    if parameter.values is not None:
        return [*parameter.values]
    if parameter.minimum is None:
        return [_value(parameter, 0.5)]
    return [_value(parameter, each) for each in bounds(parameter)]


def _space(sweep: SweepFile) -> Space:
    """What Optuna draws for each parameter: an index of its values, a number before it is quantized, or a quantile."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    space: Space = {}
    for each in sweep.parameters:
        if each.distribution == "categorical":
            space[each.name] = CategoricalDistribution(tuple(range(_count(each))))
        elif each.distribution == "int_uniform" or (sweep.method == "grid" and each.q is not None):
            space[each.name] = IntDistribution(*_steps(each))
        elif each.minimum is not None:
            space[each.name] = FloatDistribution(*bounds(each), log="log" in each.distribution)
        elif each.distribution != "constant":
            space[each.name] = FloatDistribution(EDGE, 1 - EDGE)
    return space


def _values(sweep: SweepFile, drawn: Mapping[str, Any]) -> dict[str, Any]:
    """The values that are meant by what was drawn. What has one value alone need not be drawn."""
    grid = sweep.method == "grid"
    return {
        each.name: _value(each, drawn.get(each.name, 0) * (each.q if grid and each.q is not None else 1))
        for each in sweep.parameters
    }


def _value(parameter: Parameter, drawn: float) -> Any:
    """A parameter's value at an index, at a number before it is quantized, or at a quantile."""
    if parameter.probabilities is not None:
        summed = [*accumulate(parameter.probabilities)]
        drawn = bisect_right(summed, drawn * summed[-1])
    if parameter.values is not None:
        return parameter.values[int(drawn)]
    if parameter.distribution == "int_uniform":
        return int(drawn)
    number = float(drawn)
    if parameter.mu is not None and parameter.sigma is not None:
        number = NormalDist(parameter.mu, parameter.sigma).inv_cdf(drawn)
        number = math.exp(number) if "log" in parameter.distribution else number
    return number if parameter.q is None else quantized(number, parameter.q)


def _combination(sweep: SweepFile, number: int, space: Space) -> dict[str, Any]:
    """What trial `number` of a grid draws: the digits of its number, each to the base of its parameter's count."""
    drawn, rest = {}, number
    for each in reversed(sweep.parameters):
        rest, place = divmod(rest, _count(each))
        if each.name in space:
            drawn[each.name] = place if each.values is not None else _steps(each)[0] + place
    return drawn


def _count(parameter: Parameter) -> int:
    """How many values a parameter of a grid has."""
    if parameter.values is not None:
        return len(parameter.values)
    first, last = _steps(parameter)
    return last - first + 1


def _steps(parameter: Parameter) -> tuple[int, int]:
    """The first and the last value of a parameter with steps, counted in steps from 0."""
    low, high = bounds(parameter)
    step: Number = 1 if parameter.q is None else parameter.q
    return (int(low), int(high)) if step == 1 and isinstance(low, int) else (round(low / step), round(high / step))


def _seed(*parts: object) -> int:
    return int(fingerprint([*parts])[:8], 16)
