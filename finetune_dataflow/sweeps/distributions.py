"""The distributions of Weights & Biases' sweeps: what each takes, where its values lie, and what contradicts itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

Number = int | float

LARGEST_EXPONENT = 690.0  # of e, so that the power is a number
MOST_STEPS = 1e15  # of a quantized distribution, so that each is a float of its own
TAIL = 8.0  # standard deviations; no draw from a normal distribution is as far out

# The keys that a distribution needs, and those that it may have besides.
DISTRIBUTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "constant": (("value",), ()),
    "categorical": (("values",), ()),
    "categorical_w_probabilities": (("values", "probabilities"), ()),
    "int_uniform": (("min", "max"), ()),
    "uniform": (("min", "max"), ()),
    "q_uniform": (("min", "max"), ("q",)),
    "log_uniform": (("min", "max"), ()),
    "log_uniform_values": (("min", "max"), ()),
    "q_log_uniform": (("min", "max"), ("q",)),
    "q_log_uniform_values": (("min", "max"), ("q",)),
    "inv_log_uniform": (("min", "max"), ()),
    "inv_log_uniform_values": (("min", "max"), ()),
    "normal": ((), ("mu", "sigma")),
    "q_normal": ((), ("mu", "sigma", "q")),
    "log_normal": ((), ("mu", "sigma")),
    "q_log_normal": ((), ("mu", "sigma", "q")),
}
USUAL = {"mu": 0, "sigma": 1, "q": 1}
OF_GRIDS = ("constant", "categorical", "int_uniform", "q_uniform")
EXPONENTS = ("log_uniform", "q_log_uniform", "inv_log_uniform")  # their min and max are exponents of e


@dataclass(frozen=True)
class Parameter:
    """A parameter that is searched, by the name of its input.

    values: of a constant one, of a categorical one all. minimum, maximum: as they stand in the file, exponents of e where the
    distribution is one of EXPONENTS. q: the step of a quantized distribution, whose values are whole where it is.
    """

    name: str
    distribution: str
    values: tuple[Any, ...] | None = None
    probabilities: tuple[float, ...] | None = None
    minimum: Number | None = None
    maximum: Number | None = None
    mu: Number | None = None
    sigma: Number | None = None
    q: Number | None = None


def bounds(parameter: Parameter) -> tuple[Number, Number]:
    """The least and the largest value of a distribution with min and max, before it is quantized.

    log(1 / X) of an inv_log_uniform X is between min and max, so X is between exp(-max) and exp(-min).
    """
    low, high = parameter.minimum, parameter.maximum
    assert low is not None and high is not None
    if parameter.distribution not in EXPONENTS:
        return low, high
    return (math.exp(-high), math.exp(-low)) if parameter.distribution.startswith("inv_") else (math.exp(low), math.exp(high))


def quantized(value: float, q: Number) -> Number:
    """W&B's round(value / q) * q, half to even, as the float nearest to that multiple of q; whole where q is."""
    steps = round(value / q)
    return steps * q if isinstance(q, int) else float(steps * Decimal(repr(q)))


def contradiction(parameter: Parameter) -> str | None:
    """Why nothing, or one value alone, can be drawn from a distribution, to stand after the parameter's place in its file.

    None where there is no such reason.
    """
    q, mu, sigma = parameter.q, parameter.mu, parameter.sigma
    if q is not None and q <= 0:
        return f".q={q}: expected a number above 0."
    if sigma is not None and sigma <= 0:
        return f".sigma={sigma}: expected a number above 0."
    if mu is not None and sigma is not None:
        largest = abs(mu) + TAIL * sigma
        if "log" in parameter.distribution:
            if largest > LARGEST_EXPONENT:
                return f": mu={mu} and sigma={sigma} are of the logarithm, and e to the {largest:g} is too large."
            largest = math.exp(largest)
    elif parameter.minimum is not None:
        problem = _contradictory_bounds(parameter)
        if problem is not None:
            return problem
        largest = max(map(abs, bounds(parameter)))
    if q is not None and largest / q > MOST_STEPS:
        return f".q={q}: too small a step for values up to {largest:.4g}."
    if q is not None and parameter.minimum is not None and len({quantized(each, q) for each in bounds(parameter)}) == 1:
        return f".q={q}: every value between min and max would be rounded to {quantized(bounds(parameter)[0], q)}."
    return None


def _contradictory_bounds(parameter: Parameter) -> str | None:
    kind, low, high = parameter.distribution, parameter.minimum, parameter.maximum
    assert low is not None and high is not None
    if low == high:
        return f": min and max are both {low}. For one value write value: {low}."
    if low > high:
        return f": min={low} is not below max={high}."
    if kind == "int_uniform" and not (isinstance(low, int) and isinstance(high, int)):
        return f": min={low} and max={high}: int_uniform takes whole numbers. For others write distribution: uniform."
    if kind.endswith("log_uniform_values") and low <= 0:
        return f".min={low}: {kind} takes numbers above 0."
    if kind in EXPONENTS and max(-low, high) > LARGEST_EXPONENT:
        return f": min={low} and max={high} are exponents of e. Where they are values, write {kind}_values."
    return None
