"""The learning rate of every update: by our own schedule, mlx-lm's lr_schedule or mlx-tuning-fork's learning_schedule."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from finetune_dataflow.engine.fit_settings import OptimizerSettings
from finetune_dataflow.errors import UserError, nearest

Rate = Callable[[int], float]

# The arguments of mlx-lm's schedules, in their order. Only the last of cosine_decay may be left out.
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "cosine_decay": ("init", "decay_steps", "end"),
    "linear_schedule": ("init", "end", "steps"),
    "exponential_decay": ("init", "decay_rate"),
    "step_decay": ("init", "decay_rate", "step_size"),
}
# The keys that mlx-tuning-fork's schedules have besides their type.
KEYS: dict[str, tuple[str, ...]] = {
    "cosine": ("max_lr", "min_lr", "cycle_length"),
    "cosine_w_warmup": ("start_lr", "warmup_proportion", "length", "max_lr", "min_lr", "cycle_length"),
    "constant": ("max_lr",),
}
EXAMPLES = {
    "lr_schedule": "{name: cosine_decay, arguments: [1e-5, -1, 1e-7], warmup: 10}",
    "learning_schedule": "{type: cosine_w_warmup, warmup_proportion: 0.1, max_lr: 1e-4, cycle_length: -1}",
}

_Expected = tuple[Callable[[float], bool], str]
_ABOVE_ZERO: _Expected = (lambda value: value > 0, "a rate above 0")
_FROM_ZERO: _Expected = (lambda value: value >= 0, "a rate, 0 or more")
_COUNT: _Expected = (lambda value: value >= 0 and value % 1 == 0, "a number of updates, 0 or more")
_STEP: _Expected = (lambda value: value >= 1 and value % 1 == 0, "a number of updates, 1 or more")
_LENGTH: _Expected = (lambda value: value == -1 or (value >= 1 and value % 1 == 0), "a number of updates, 1 or more, or -1")
# What every number of a schedule must be: the test, and the words for it.
NUMBERS: dict[str, _Expected] = {
    "init": _ABOVE_ZERO,
    "end": _FROM_ZERO,
    "decay_rate": (lambda value: 0 < value <= 1, "a factor above 0, at most 1"),
    "decay_steps": _LENGTH,
    "steps": _LENGTH,
    "step_size": _STEP,
    "warmup": _COUNT,
    "warmup_init": _FROM_ZERO,
    "start_lr": _FROM_ZERO,
    "min_lr": _FROM_ZERO,
    "max_lr": _ABOVE_ZERO,
    "warmup_proportion": (lambda value: 0 <= value <= 1, "a share of one epoch's updates, from 0 to 1"),
    "length": _COUNT,
    "cycle_length": _LENGTH,
}


def rate_of_update(settings: OptimizerSettings, updates: int, updates_per_epoch: int) -> Rate:
    """The learning rate as a function of the update's index, from 0, in a fit of so many updates.

    By default it rises in a line, never from zero, over round(warmup_proportion * updates) updates, and falls to zero in half
    a cosine. lr_schedule means what it means to mlx-lm; -1 for its number of steps is the fit less the warm-up.
    learning_schedule means what it means to mlx-tuning-fork: its proportion, rounded, and -1 refer to one epoch's updates.

    Raises UserError with every fault of the schedule, one a line: keys, values, lengths that are not those of the fit, and a
    learning_rate or warmup_proportion beside it that would have no effect.
    """
    return _schedule(settings, updates, updates_per_epoch).rate


def schedule_text(settings: OptimizerSettings, updates: int, updates_per_epoch: int) -> str:
    """The schedule in a short line, such as "cosine, 7 updates of warm-up to 0.0002, then to 0"; raises as rate_of_update."""
    return _schedule(settings, updates, updates_per_epoch).text


@dataclass(frozen=True)
class _Schedule:
    rate: Rate
    text: str


def _schedule(settings: OptimizerSettings, updates: int, updates_per_epoch: int) -> _Schedule:
    if settings.lr_schedule is not None and settings.learning_schedule is not None:
        raise UserError("lr_schedule and learning_schedule are both given. Give one of them.")
    if settings.lr_schedule is not None:
        return _of_mlx_lm(settings, updates)
    if settings.learning_schedule is not None:
        return _of_mlx_tuning_fork(settings, updates, updates_per_epoch)
    return _default(settings, updates)


def _default(settings: OptimizerSettings, updates: int) -> _Schedule:
    highest, warmup = settings.learning_rate, round(settings.warmup_proportion * updates)
    rate = _joined(lambda update: highest * (update + 1) / (warmup + 1), _cosine(highest, max(updates - warmup, 1)), warmup)
    return _Schedule(rate, _text("cosine", warmup, highest, "to 0"))


def _of_mlx_lm(settings: OptimizerSettings, updates: int) -> _Schedule:
    given = _Given("lr_schedule", settings.lr_schedule)
    given.check_keys(("name", "arguments", "warmup", "warmup_init"))
    name = given.word("name", ARGUMENTS)
    values = _arguments(given, name)
    warmup, warmup_init = given.number("warmup", 0), given.number("warmup_init", 0)
    given.check_warmup("warmup", warmup, updates)
    length = "decay_steps" if "decay_steps" in values else "steps"
    if length in values:
        _check_decay(given, values[length], warmup, updates)
    given.check_beside(settings, _highest(values, warmup_init if warmup else 0), "warmup")
    given.end()
    if values.get(length) == -1:
        values[length] = updates - warmup
    rate, then = _decay(name, values)
    if warmup:
        # The decay starts an update late: mlx-lm's warm-up ends at init and its decay begins there again.
        rate = _joined(_line(warmup_init, values["init"], warmup), rate, int(warmup) + 1)
    return _Schedule(rate, _text(name, warmup, values["init"], then))


def _highest(values: Mapping[str, float], warmup_init: float) -> float:
    """The highest rate of mlx-lm's schedule, NaN where not all are known."""
    rates = [values.get("init", math.nan), values.get("end", 0.0), warmup_init]
    return max(rates) if all(map(math.isfinite, rates)) else math.nan


def _arguments(given: _Given, name: str) -> dict[str, float]:
    """The arguments of mlx-lm's schedule by name; empty where they cannot be told apart."""
    names = ARGUMENTS.get(name, ())
    if "arguments" not in given.values:
        given.problem(f"the key 'arguments' is missing. Expected a list{_listed(names)}.")
        return {}
    found = given.values["arguments"]
    if not isinstance(found, list | tuple):
        given.problem(f"arguments is {_said(found)}. Expected a list{_listed(names)}.")
        return {}
    if not names:
        return {}
    fewest = 2 if name == "cosine_decay" else len(names)
    if not fewest <= len(found) <= len(names):
        expected = f"{fewest} or {len(names)}" if fewest < len(names) else f"{len(names)}"
        given.problem(f"{name} takes {expected} arguments{_listed(names)}, and {len(found)} are given: {_said(found)}.")
        return {}
    return {key: given.checked(key, value) for key, value in zip(names, found, strict=False)}


def _check_decay(given: _Given, steps: float, warmup: float, updates: int) -> None:
    """An explicit number of steps must end where the fit does, with or without the warm-up and mlx-lm's update between."""
    if steps == -1 or math.isnan(steps + warmup) or steps in (updates, updates - warmup, updates - warmup - 1):
        return
    after = f" after a warm-up of {warmup:.15g}" if warmup else ""
    left = updates - warmup if warmup < updates else updates
    given.problems.append(
        f"lr_schedule decays over {steps:.15g} updates{after}; the fit makes {updates}. "
        f"Write {left:.15g} in place of {steps:.15g}, or -1 for the rest of the fit."
    )


def _decay(name: str, values: Mapping[str, float]) -> tuple[Rate, str]:
    """One of mlx-lm's schedules from its arguments, and where it leads in words."""
    init = values["init"]
    if name == "cosine_decay":
        steps, end = values["decay_steps"], values.get("end", 0.0)
        return _cosine(init, steps, end), f"to {end:g} over {_updates(steps)}"
    if name == "linear_schedule":
        return _line(init, values["end"], values["steps"]), f"to {values['end']:g} over {_updates(values['steps'])}"
    factor = values["decay_rate"]
    if name == "exponential_decay":
        return lambda update: init * factor**update, f"times {factor:g} every update"
    size = int(values["step_size"])
    return lambda update: init * factor ** (update // size), f"times {factor:g} every {_updates(size)}"


def _of_mlx_tuning_fork(settings: OptimizerSettings, updates: int, updates_per_epoch: int) -> _Schedule:
    given = _Given("learning_schedule", settings.learning_schedule)
    kind = given.word("type", KEYS)
    _check_keys_of(given, kind)
    lowest, highest = given.number("min_lr", 0), given.number("max_lr", float(settings.learning_rate))
    start, cycle = given.number("start_lr", 0), given.number("cycle_length", -1)
    for key, value in (("min_lr", lowest), ("start_lr", start)):
        if value > highest:
            named = "max_lr" if "max_lr" in given.values else "learning_rate"
            given.problem(f"{key}={value!r} is above {named}={highest!r}.")
    warmup = _warmup(given, kind, updates, updates_per_epoch)
    _check_cycle(given, cycle, warmup, updates, updates_per_epoch)
    given.check_beside(settings, highest, "warmup_proportion" if kind == "cosine_w_warmup" else "")
    given.end()
    if kind == "constant":
        return _Schedule(lambda update: highest, f"constant, {highest:g}")
    steps = updates_per_epoch if cycle == -1 else cycle
    rate = _cosine(highest, steps, lowest)
    if warmup:
        rate = _joined(_line(start, highest, warmup), rate, int(warmup))
    return _Schedule(rate, _text("cosine", warmup, highest, f"to {lowest:g} over {_updates(steps)}"))


def _check_keys_of(given: _Given, kind: str) -> None:
    """Every key must be known, and one that this type reads; one that it does not is taken away."""
    known = sorted({key for keys in KEYS.values() for key in keys}, key=KEYS["cosine_w_warmup"].index)
    given.check_keys(("type", *known))
    unread = [key for key in given.values if key in known and key not in KEYS.get(kind, known)]
    if unread:
        given.problem(f"{', '.join(unread)} has no effect with the type {kind!r}, which reads {', '.join(KEYS[kind])}.")
    for key in unread:
        del given.values[key]


def _warmup(given: _Given, kind: str, updates: int, updates_per_epoch: int) -> float:
    """The updates of mlx-tuning-fork's warm-up, 0 for the types that have none, NaN where they are not known."""
    proportion, length = given.number("warmup_proportion", 0), given.number("length", 0)
    if kind != "cosine_w_warmup":
        return 0 if kind else math.nan
    named = [key for key in ("warmup_proportion", "length") if key in given.values]
    if not named:
        given.problem("the warm-up's length is missing. Expected warmup_proportion, a share of one epoch, or length, in updates.")
        return math.nan
    if len(named) > 1:
        given.problem("warmup_proportion and length say the same thing twice. Give one of them.")
        return math.nan
    in_epoch = math.nan if math.isnan(proportion) else round(proportion * updates_per_epoch)
    warmup = length if named == ["length"] else in_epoch
    given.check_warmup(named[0], warmup, updates)
    return warmup


def _check_cycle(given: _Given, cycle: float, warmup: float, updates: int, updates_per_epoch: int) -> None:
    """An explicit cycle must be as long as an epoch or the fit, with or without the warm-up."""
    allowed = (updates_per_epoch, updates, updates_per_epoch - warmup, updates - warmup)
    if cycle == -1 or math.isnan(cycle + warmup) or cycle in allowed:
        return
    after = f" after a warm-up of {warmup:.15g}" if warmup else ""
    lengths = " or ".join(map(str, dict.fromkeys((updates_per_epoch, updates))))
    given.problems.append(
        f"learning_schedule decays over a cycle_length of {cycle:.15g} updates{after}; an epoch has {updates_per_epoch} and the "
        f"fit makes {updates}. Write {lengths} in place of {cycle:.15g}, or -1 for one epoch."
    )


class _Given:
    """A schedule as its user wrote it, key by key, and in `problems` everything that is wrong with it. null is: not given."""

    def __init__(self, option: str, given: object) -> None:
        if not isinstance(given, Mapping):
            raise UserError(f"{option}={_said(given)}: expected keys with values, such as {EXAMPLES[option]}.")
        self.option, self.keys = option, list(given)
        self.values = {key: value for key, value in given.items() if value is not None}
        self.problems: list[str] = []

    def problem(self, said: str) -> None:
        self.problems.append(f"{self.option}: {said}")

    def end(self) -> None:
        """Raise UserError with all that is wrong."""
        if self.problems:
            raise UserError("\n".join(self.problems))

    def check_keys(self, known: Collection[str]) -> None:
        for key in self.keys:
            if key not in known:
                self.problem(f"the key {_said(key)} is unknown.{_nearest(key, known)} Expected {', '.join(known)}.")

    def word(self, key: str, choices: Collection[str]) -> str:
        """One of `choices`, or nothing where another word or none is given."""
        expected = f"Expected one of {', '.join(choices)}."
        found = self.values.get(key)
        if isinstance(found, str) and found in choices:
            return found
        if found is None:
            self.problem(f"the key {key!r} is missing. {expected}")
        else:
            self.problem(f"{key} is {_said(found)}.{_nearest(found, choices)} {expected}")
        return ""

    def number(self, key: str, default: float) -> float:
        """The number under `key`, `default` where there is none, NaN where it is wrong."""
        return self.checked(key, self.values[key]) if key in self.values else default

    def checked(self, name: str, value: object) -> float:
        """`value` where it is a number that `name` may have, else NaN."""
        allowed, expected = NUMBERS[name]
        number = _number(value)
        if allowed(number):
            return number
        self.problem(f"{name} is {_said(value)}. Expected {expected}.")
        return math.nan

    def check_warmup(self, key: str, warmup: float, updates: int) -> None:
        if warmup and warmup >= updates:
            self.problem(
                f"{key} gives a warm-up of {_updates(warmup)}, not shorter than the fit, which makes {updates}. Lower {key}."
            )

    def check_beside(self, settings: OptimizerSettings, highest: float, warmup_key: str) -> None:
        """What is set beside the schedule and has no effect must be its default, or the schedule's highest rate."""
        rate, warmup = settings.learning_rate, settings.warmup_proportion
        if not math.isnan(highest) and rate not in (OptimizerSettings.learning_rate, highest):
            self.problems.append(
                f"learning_rate={rate!r} has no effect beside {self.option}, whose highest rate is {highest!r}. Leave "
                "learning_rate out, or write the same rate in both."
            )
        if warmup != OptimizerSettings.warmup_proportion:
            instead = f" Its own key {warmup_key} sets the warm-up." if warmup_key else ""
            self.problems.append(
                f"warmup_proportion={warmup!r} has no effect beside {self.option}. Leave it out of the settings.{instead}"
            )


def _number(value: object) -> float:
    """A finite number, as YAML may give it, as a float; NaN for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        number = float(value)
    except OverflowError:
        return math.nan
    return number if math.isfinite(number) else math.nan


def _said(value: object) -> str:
    """The value as Python writes it, shortened."""
    try:
        return reprlib.repr(value)
    except ValueError:
        return "a number of thousands of digits"


def _nearest(found: object, choices: Collection[str]) -> str:
    return nearest(found, choices) if isinstance(found, str) else ""


def _cosine(init: float, steps: float, end: float = 0.0) -> Rate:
    """Half a cosine from `init` at 0 to `end` at `steps`, and `end` from there on."""
    return lambda update: end + (init - end) * 0.5 * (1 + math.cos(math.pi * (min(update, steps) / steps)))


def _line(init: float, end: float, steps: float) -> Rate:
    """A straight line from `init` at 0 to `end` at `steps`, and `end` from there on."""
    return lambda update: init + (end - init) * (min(update, steps) / steps)


def _joined(first: Rate, then: Rate, boundary: int) -> Rate:
    """`first` before the update `boundary`; from there `then`, which counts from 0 again."""
    return lambda update: first(update) if update < boundary else then(update - boundary)


def _text(name: str, warmup: float, highest: float, then: str) -> str:
    return f"{name}, {_updates(warmup)} of warm-up to {highest:g}, then {then}" if warmup else f"{name}, from {highest:g} {then}"


def _updates(count: float) -> str:
    return f"{count:.15g} update{'' if count == 1 else 's'}"


def _listed(names: Collection[str]) -> str:
    return f", [{', '.join(names)}]" if names else ""
