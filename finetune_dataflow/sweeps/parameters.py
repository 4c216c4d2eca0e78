"""The parameters of a sweep file: what stands below `parameters`, read and checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune_dataflow.cli.yaml_config import shown
from finetune_dataflow.errors import nearest
from finetune_dataflow.sweeps import distributions
from finetune_dataflow.sweeps.distributions import DISTRIBUTIONS, USUAL, Number, Parameter, bounds, quantized

LARGEST = 1e300  # of a number
KEYS = ("distribution", "max", "min", "mu", "parameters", "probabilities", "q", "sigma", "value", "values")
EXAMPLE = "expected names with values, as learning_rate: {min: 1e-5, max: 1e-3}."
WITHIN = "names within it stand below parameters, as {parameters: {rank: {values: [4, 8]}}}."
# What other tools call inputs of ours, where the spelling alone does not lead there.
OTHER_NAMES = {
    "alpha": " Search lora_parameters.scale, which is alpha / rank.",
    "lr": " Did you mean 'learning_rate'?",
    "rank": " Did you mean 'lora_rank'?",
}


@dataclass
class Findings:
    """What is wrong in a file, and what is worth telling where nothing is: a line each, which begins with the file."""

    path: str
    problems: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def problem(self, text: str) -> None:
        """Add a problem."""
        self.problems.append(f"{self.path}: {text}")

    def notice(self, text: str) -> None:
        """Add a notice."""
        self.notices.append(f"{self.path}: {text}")

    def check_keys(self, found: Iterable[str], place: str, known: Sequence[str], hints: Mapping[str, str]) -> None:
        """A problem for each key that is not known, with its hint or the nearest one that is."""
        for key in found:
            if key not in known:
                self.problem(f"{place}{key}: {hints.get(key) or unknown('key', key, known)}")

    def number(self, found: Any, place: str) -> Number | None:
        """A number; None for anything else, which is a problem."""
        number = plain_number(found)
        if number is None:
            self.problem(f"{place}={shown(found)}: expected a number.")
        return number

    def whole(self, found: Any, place: str) -> int | None:
        """A whole number, 1 or more; None where nothing is found, and for anything else, which is a problem."""
        number = plain_number(found)
        if isinstance(number, int) and number >= 1:
            return number
        if found is not None:
            self.problem(f"{place}={shown(found)}: expected a whole number, 1 or more.")
        return None


@dataclass
class ParameterReader:
    """Reads parameters. names: the input that a spelling means, None where there is none; known: the spellings that there are.

    method: of the sweep, None where that is a problem. seen: where each input was found.
    """

    names: Callable[[str], str | None]
    known: Sequence[str]
    method: str | None
    told: Findings
    seen: dict[str, str] = field(default_factory=dict)

    def read(self, found: Any, place: str = "parameters", prefix: str = "") -> list[Parameter]:
        """All parameters of a mapping, and of mappings within it, in W&B's order: by name. Those with problems are left out."""
        if not isinstance(found, dict) or not found:
            empty = "missing" if found is None and place == "parameters" else "empty"
            self.told.problem(f"{place}={shown(found)}: {EXAMPLE}" if found else f"{place} is {empty}: {EXAMPLE}")
            return []
        read: list[Parameter] = []
        for key in sorted(found):
            body, here = found[key], f"{place}.{key}"
            if not isinstance(body, dict) or "parameters" not in body:
                read += filter(None, [self._one(body, here, f"{prefix}{key}")])
                continue
            beside = [each for each in body if each != "parameters"]
            if beside:
                self.told.problem(f"{here}: {listed(beside)} cannot stand beside parameters.")
            read += self.read(body["parameters"], f"{here}.parameters", f"{prefix}{key}.")
        return read

    def _one(self, body: Any, place: str, spelling: str) -> Parameter | None:
        name, before = self._name(place, spelling), len(self.told.problems)
        distribution = self._distribution(body, place)
        if distribution is None:
            return None
        self._check_keys(distribution, body, place)
        numbers = {key: self.told.number(body[key], f"{place}.{key}") for key in ("min", "max", *USUAL) if key in body}
        values, probabilities = self._values(body, place), self._probabilities(body, place)
        if len(self.told.problems) > before:
            return None
        usual = {key: value for key, value in USUAL.items() if key in DISTRIBUTIONS[distribution][1]}
        ends = numbers.pop("min", None), numbers.pop("max", None)
        parameter = Parameter(name or spelling, distribution, values, probabilities, *ends, **{**usual, **numbers})
        self._check_range(parameter, place)
        return parameter if name is not None else None

    def _name(self, place: str, spelling: str) -> str | None:
        name = self.names(spelling)
        if name is None:
            hint = OTHER_NAMES.get(spelling) or nearest(spelling, self.known)
            self.told.problem(f"{place}: {spelling!r} is no input.{hint} `run.py inputs` lists all.")
        elif name in self.seen:
            self.told.problem(f"{self.seen[name]} and {place} are the same input, {name}. Give one of them.")
        else:
            self.seen[name] = place
        return name

    def _distribution(self, body: Any, place: str) -> str | None:
        """The distribution that is named, or that W&B infers; None where that is a problem."""
        if not isinstance(body, dict):
            meant = f"value: {shown(body)}" if isinstance(body, bool | int | float | str) else f"values: {shown(body or [4, 8])}"
            self.told.problem(f"{place}={shown(body)}: expected a mapping, as {{{meant}}}.")
            return None
        if any(key not in KEYS for key in body):
            hints = {key: WITHIN for key, value in body.items() if isinstance(value, dict)}
            self.told.check_keys(body, f"{place}.", KEYS, hints)
            return None
        named = body.get("distribution")
        if named is None:
            return self._inferred(body, place)
        if not isinstance(named, str) or named not in DISTRIBUTIONS:
            self.told.problem(f"{place}.distribution={shown(named)}: {unknown('distribution', str(named), [*DISTRIBUTIONS])}")
            return None
        return "categorical_w_probabilities" if named == "categorical" and "probabilities" in body else named

    def _inferred(self, body: Mapping[str, Any], place: str) -> str | None:
        if "value" in body:
            return "constant"
        if "values" in body:
            return "categorical_w_probabilities" if "probabilities" in body else "categorical"
        for key, such in {"mu": "normal", "sigma": "normal", "q": "q_uniform"}.items():
            if key in body:
                self.told.problem(f"{place}.{key} needs a distribution, such as {such}.")
                return None
        if not body.keys() & {"min", "max"}:
            self.told.problem(f"{place}: expected value, values, or min and max; found {listed(body) or 'nothing'}.")
            return None
        whole = all(isinstance(plain_number(body[key]), int) for key in ("min", "max") if key in body)
        return "int_uniform" if whole else "uniform"

    def _check_keys(self, distribution: str, body: Mapping[str, Any], place: str) -> None:
        """Whether the keys are those of the distribution."""
        needed, optional = DISTRIBUTIONS[distribution]
        takes = f"the distribution is {distribution}, which takes {listed((*needed, *optional))}"
        for key in body:
            if key not in (*needed, *optional, "distribution"):
                self.told.problem(f"{place}.{key}={shown(body[key])}: {takes}.")
        for key in needed:
            if key not in body:
                self.told.problem(f"{place}.{key} is missing: {takes}.")

    def _values(self, body: Mapping[str, Any], place: str) -> tuple[Any, ...] | None:
        if "value" in body:
            return (body["value"],)
        if "values" not in body:
            return None
        values = body["values"]
        if not isinstance(values, list) or not values:
            self.told.problem(f"{place}.values={shown(values)}: expected a list with at least one value, as [4, 8].")
            return None
        seen: set[str] = set()
        for value in values:
            # Equal numbers are one value, whatever their type; true is none.
            identity = repr(int(value) if isinstance(value, float) and value.is_integer() else value)
            if identity in seen:
                self.told.problem(f"{place}.values: {shown(value)} stands there twice.")
            seen.add(identity)
        return tuple(values)

    def _probabilities(self, body: Mapping[str, Any], place: str) -> tuple[float, ...] | None:
        if "probabilities" not in body:
            return None
        found, values = body["probabilities"], body.get("values")
        numbers = [plain_number(each) for each in found] if isinstance(found, list) else []
        given = [float(each) for each in numbers if each is not None and each >= 0]
        if len(given) < len(numbers) or not numbers:
            self.told.problem(f"{place}.probabilities={shown(found)}: expected a list of numbers, 0 or more.")
        elif isinstance(values, list) and len(values) != len(given):
            self.told.problem(f"{place}.probabilities: expected {len(values)}, one for each of values; found {len(given)}.")
        elif not math.isclose(sum(given), 1, abs_tol=1e-6):
            self.told.problem(f"{place}.probabilities: their sum is {sum(given):g}, expected 1.")
        return tuple(given)

    def _check_range(self, parameter: Parameter, place: str) -> None:
        """Report a distribution that no grid has or that contradicts itself; tell of a range that may not be meant."""
        if self.method == "grid" and parameter.distribution not in distributions.OF_GRIDS:
            self.told.problem(
                f"{place}: the distribution is {parameter.distribution}; a grid takes value, values, whole numbers from min to "
                "max, or distribution: q_uniform."
            )
        problem = distributions.contradiction(parameter)
        if problem is not None:
            self.told.problem(f"{place}{problem}")
        elif parameter.minimum is not None:
            low, high = bounds(parameter)
            kind, q = parameter.distribution, parameter.q
            if kind in distributions.EXPONENTS:
                self.told.notice(
                    f"{place}: {kind} takes exponents of e, so its values are between {low:.4g} and {high:.4g}. Where min and "
                    f"max are values, write {kind}_values."
                )
            if q is not None and (quantized(low, q) < low or quantized(high, q) > high):
                reach = f"from {quantized(low, q)} to {quantized(high, q)}, beyond {low:.4g} to {high:.4g}"
                self.told.notice(f"{place}: rounded to multiples of q={q}, its values go {reach}.")


def plain_number(found: Any) -> Number | None:
    """A number, from text that is one, too; None for anything else, and for one that is not finite or out of all proportion."""
    if isinstance(found, str):
        try:
            found = int(found) if found.strip().lstrip("+-").isdecimal() else float(found)
        except ValueError:
            return None
    if isinstance(found, bool) or not isinstance(found, int | float) or not abs(found) <= LARGEST:
        return None
    return found


def unknown(what: str, name: str, known: Sequence[str]) -> str:
    """That a name is unknown, with the nearest that is not, or all where none is near."""
    return f"unknown {what}.{nearest(name, known) or f' Expected one of {listed(known)}.'}"


def listed(names: Iterable[str]) -> str:
    """Names as a sentence has them: "a", "a and b", "a, b and c"."""
    *first, last = [*names] or [""]
    return f"{', '.join(first)} and {last}" if first else last
