"""The optimiser of a fit, mlx's with LoRA+ and a state that can be saved, and what is done to a gradient before it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from finetune_dataflow.engine.fit_settings import OPTIMIZERS, OptimizerSettings
from finetune_dataflow.engine.heads import output_head
from finetune_dataflow.engine.settings import require
from finetune_dataflow.errors import UserError, nearest

STEP = "step"
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def fit_optimizer(settings: OptimizerSettings) -> FitOptimizer:
    """The optimiser that the settings name, new.

    `optimizer_config` has mlx-lm's form, the optimiser's arguments under its name: {"adamw": {"betas": [0.9, 0.95]}}; what
    it holds for other optimisers is not looked at. Defaults are mlx's, but for Adafactor: mlx's would choose its own step
    sizes (relative_step) and, without them, multiply the rate by each parameter's root mean square (scale_parameter),
    which is zero for a new lora_b. Here both are off, so that the schedule's rate is what it uses. With relative_step: true
    in optimizer_config it is mlx's Adafactor again, which ignores every learning rate given to it: learning_rate and its
    schedule then have no effect, and LoRA+ is refused.
    Raises one UserError with everything wrong, a line each.
    """
    return FitOptimizer(settings.optimizer, _arguments(settings), settings.loraplus_lr_ratio)


class FitOptimizer:
    """An optimiser of a model's trainable parameters whose whole state can be taken out and put back.

    LoRA+ (Hayou et al. 2024): every parameter called lora_b gets the learning rate times `loraplus_lr_ratio`.

    State and arithmetic are float32 whatever the parameters are: in bfloat16 Adam's second moment would stand still, in
    float16 its epsilon would be zero. Parameters keep their type.

    Muon is for matrices. A stack of them, [experts, rows, columns], is updated matrix by matrix, where mlx's would flatten
    it into one. Everything else (vectors such as norms, biases and DoRA's m; embeddings, the output head, convolutions) is
    updated by AdamW (betas 0.9 and 0.999, bias correction, Muon's weight decay) at the learning rate / sqrt(last
    dimension): the change per element that Muon makes in a matrix of as many columns.
    """

    def __init__(self, name: str, arguments: Mapping[str, Any], loraplus_lr_ratio: float) -> None:
        """`arguments`: of mlx's class, checked already, without the learning rate. `fit_optimizer` makes both."""
        self._name, self._arguments, self._ratio = name, dict(arguments), loraplus_lr_ratio
        self._groups: list[_Group] = []

    def update(self, model: nn.Module, gradient: dict[str, Any], learning_rate: float) -> None:
        """One update of the trainable parameters, all of which `gradient` holds; nothing is evaluated yet."""
        self._groups = self._groups or self._grouped(model)
        gradients, parameters = _leaves(gradient), _leaves(model.trainable_parameters())
        updated: dict[str, mx.array] = {}
        for group in self._groups:
            group.optimizer.learning_rate = learning_rate * group.factor
            updated |= group.optimizer.apply_gradients(
                {name: gradients[name].astype(mx.float32) for name in group.names},
                {name: parameters[name].astype(mx.float32) for name in group.names},
            )
        model.update(tree_unflatten([(name, each.astype(parameters[name].dtype)) for name, each in updated.items()]))

    def arrays(self) -> dict[str, mx.array]:
        """The state: `step` (uint64, updates done) and `<parameter>.<part>` (float32); before any update, `step` alone."""
        return _state(self._groups)

    def restore(self, model: nn.Module, arrays: Mapping[str, mx.array]) -> None:
        """Take over a state that `arrays` gave for the same settings and parameters.

        Raises ValueError naming, a line each, what is missing, too many, or of another shape or type.
        """
        groups = self._grouped(model)
        expected = _state(groups)
        if {*arrays} == {STEP} and arrays[STEP].size == 1 and arrays[STEP].item() == 0:
            arrays = expected
        problems = [f"{name} is missing." for name in expected if name not in arrays]
        problems += [f"{name} is not part of it." for name in arrays if name not in expected]
        problems += [
            f"{name} is {_described(arrays[name])}, expected {_described(each)}."
            for name, each in expected.items()
            if name in arrays and _described(arrays[name]) != _described(each)
        ]
        if problems:
            raise ValueError("The state does not fit the optimiser:\n" + "\n".join(problems))
        for group in groups:
            group.optimizer.state[STEP] = arrays[STEP]
            for name in group.names:
                parts = group.optimizer.state[name]
                parts.update({part: arrays[f"{name}.{part}"] for part in parts})
        self._groups = groups

    def _grouped(self, model: nn.Module) -> list[_Group]:
        """The trainable parameters with their optimisers, new; those of one kind and rate share one."""
        parameters = _leaves(model.trainable_parameters())
        aside = _no_matrices(model, parameters) if self._name == "muon" else set()
        names: dict[tuple[bool, float], list[str]] = {}
        for name, each in parameters.items():
            factor = self._ratio if name.rpartition(".")[2] == "lora_b" else 1.0
            if name in aside and each.ndim > 0:
                factor /= math.sqrt(each.shape[-1])
            names.setdefault((name in aside, factor), []).append(name)
        groups = [_Group(self._new(is_aside), factor, each) for (is_aside, factor), each in names.items()]
        for group in groups:
            group.optimizer.init({name: mx.zeros(parameters[name].shape) for name in group.names})
        return groups

    def _new(self, aside: bool) -> optimizers.Optimizer:
        if aside:
            decay = self._arguments.get("weight_decay", 0.01)
            return optimizers.AdamW(learning_rate=0.0, weight_decay=decay, bias_correction=True)
        return CLASSES[self._name](learning_rate=0.0, **self._arguments)


def global_norm(gradient: dict[str, Any]) -> mx.array:
    """The L2 norm over all leaves of a gradient, a float32 scalar, computed in float32.

    Summed in the order of the names, and each leaf in the order of its rows, so that the last bit does not hang on how the
    tree was put together or how a leaf lies in memory: both differ after a gradient was saved and loaded.
    """
    squares = [mx.square(mx.contiguous(each).astype(mx.float32)).sum() for _, each in sorted(_leaves(gradient).items())]
    return mx.sqrt(sum(squares, mx.array(0.0)))


def clipped(gradient: dict[str, Any], norm: mx.array, max_norm: float | None) -> dict[str, Any]:
    """The gradient, whose global norm is `norm`, scaled by min(1, max_norm / norm); as it is where max_norm is None.

    The leaves keep their types. At a norm of max_norm or less they keep every bit.
    """
    if max_norm is None:
        return gradient
    scale = mx.where(norm <= max_norm, 1.0, max_norm / norm)
    return cast(dict[str, Any], tree_map(lambda each: (each.astype(mx.float32) * scale).astype(each.dtype), gradient))


class _Muon(optimizers.Muon):
    """mlx's Muon, which in a stack of matrices [n, rows, columns] orthogonalises each by itself."""

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]) -> mx.array:
        """The updated parameter; `state` is changed."""
        if gradient.ndim < 3:
            return super().apply_single(gradient, parameter, state)
        alone = super().apply_single

        def one(gradient: mx.array, parameter: mx.array, velocity: mx.array) -> tuple[mx.array, mx.array]:
            own = {"v": velocity}
            return alone(gradient, parameter, own), own["v"]

        updated, state["v"] = mx.vmap(one)(gradient, parameter, state["v"])
        return updated


@dataclass(frozen=True)
class _Group:
    """Parameters that share an optimiser, whose learning rate is the fit's times `factor`."""

    optimizer: optimizers.Optimizer
    factor: float
    names: list[str]


def _state(groups: list[_Group]) -> dict[str, mx.array]:
    step = groups[0].optimizer.state[STEP] if groups else mx.array(0, mx.uint64)
    parts = {
        f"{name}.{part}": each
        for group in groups
        for name in group.names
        for part, each in group.optimizer.state[name].items()
    }  # fmt: skip
    return {STEP: step, **parts}


def _no_matrices(model: nn.Module, parameters: Mapping[str, mx.array]) -> set[str]:
    """The names of the parameters that Muon is not for."""
    owners, head = dict(model.named_modules()), output_head(model)
    found = set()
    for name, each in parameters.items():
        owner = owners.get(name.rpartition(".")[0])
        is_head = head is not None and owner is head[0] and isinstance(owner, nn.Linear)
        if each.ndim not in (2, 3) or isinstance(owner, (nn.Embedding, *CONVOLUTIONS)) or is_head:
            found.add(name)
    return found


def _leaves(tree: dict[str, Any]) -> dict[str, mx.array]:
    return dict(cast(list[tuple[str, mx.array]], tree_flatten(tree)))


def _described(array: mx.array) -> str:
    return f"{str(array.dtype).rpartition('.')[2]} {[*array.shape]}"


@dataclass(frozen=True)
class _Argument:
    """An argument of an optimiser: what it may be, in words, and how it is read (ValueError where it is something else)."""

    expected: str
    read: Callable[[Any], Any]


def _number(holds: Callable[[float], bool]) -> Callable[[Any], float]:
    def read(value: Any) -> float:
        # Text, too: PyYAML reads 1e-8 as text, mlx-lm's own reader as a number.
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError
        number = float(value)
        if not math.isfinite(number) or not holds(number):
            raise ValueError
        return number

    return read


def _two(read: Callable[[Any], float]) -> Callable[[Any], list[float]]:
    def read_both(value: Any) -> list[float]:
        if not isinstance(value, list | tuple) or len(value) != 2:
            raise ValueError
        return [read(each) for each in value]

    return read_both


def _optional(read: Callable[[Any], float]) -> Callable[[Any], float | None]:
    return lambda value: None if value is None else read(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError
    return value


_SHARE = _number(lambda number: 0 <= number < 1)
_POSITIVE = _number(lambda number: number > 0)
SHARE = _Argument("a number from 0 to below 1", _SHARE)
SHARES = _Argument("two numbers from 0 to below 1", _two(_SHARE))
NOT_NEGATIVE = _Argument("a number, 0 or more", _number(lambda number: number >= 0))
FLAG = _Argument("true or false", _flag)
ADAM = {"betas": SHARES, "eps": NOT_NEGATIVE, "bias_correction": FLAG}
CLASSES: dict[str, Callable[..., optimizers.Optimizer]] = {
    "adam": optimizers.Adam, "adamw": optimizers.AdamW, "sgd": optimizers.SGD, "adafactor": optimizers.Adafactor,
    "muon": _Muon, "lion": optimizers.Lion,
}  # fmt: skip
ARGUMENTS: dict[str, dict[str, _Argument]] = {
    "adam": ADAM,
    "adamw": {**ADAM, "weight_decay": NOT_NEGATIVE},
    "sgd": {"momentum": SHARE, "weight_decay": NOT_NEGATIVE, "dampening": SHARE, "nesterov": FLAG},
    "adafactor": {
        "eps": _Argument("two numbers above 0", _two(_POSITIVE)),
        "clip_threshold": _Argument("a number above 0", _POSITIVE),
        "decay_rate": _Argument("a number below 0", _number(lambda number: number < 0)),
        "beta_1": _Argument("a number from 0 to below 1, or nothing", _optional(_SHARE)),
        "weight_decay": NOT_NEGATIVE,
        "scale_parameter": FLAG,
        "relative_step": FLAG,
        "warmup_init": FLAG,
    },
    "muon": {
        "momentum": SHARE,
        "weight_decay": NOT_NEGATIVE,
        "nesterov": FLAG,
        "ns_steps": _Argument("a whole number, 1 or more", _count),
    },
    "lion": {"betas": SHARES, "weight_decay": NOT_NEGATIVE},
}


def _arguments(settings: OptimizerSettings) -> dict[str, Any]:
    """The arguments of mlx's class but for the learning rate; UserError with everything wrong."""
    problems: list[str] = []
    own = _own_entry(settings, problems)
    arguments = {}
    for argument, value in own.items():
        try:
            arguments[argument] = _read(settings.optimizer, argument, value)
        except UserError as error:
            problems.append(str(error))
    problems += _contradictions(settings, {**own, **arguments})
    if problems:
        raise UserError("\n".join(problems))
    if settings.weight_decay is not None:
        arguments["weight_decay"] = settings.weight_decay
    if settings.optimizer == "adafactor":
        relative = arguments.get("relative_step", False)
        arguments = {"relative_step": relative, "scale_parameter": relative, **arguments}
    return arguments


def _own_entry(settings: OptimizerSettings, problems: list[str]) -> Mapping[str, Any]:
    """What optimizer_config holds for the chosen optimiser, as it stands there; what is wrong with the rest is noted."""
    name, every = settings.optimizer, settings.optimizer_config
    form = f"a mapping, as in {{{name}: {{...}}}}"
    try:
        require("optimizer_config", every, isinstance(every, Mapping), form)
        own = every.get(name)
        own = {} if own is None else own
        require(f"optimizer_config.{name}", own, isinstance(own, Mapping), "a mapping of arguments to values")
    except UserError as error:
        problems.append(str(error))
        own = {}
    for other in every if isinstance(every, Mapping) else ():
        if other in ARGUMENTS[name]:
            problems.append(
                f"optimizer_config.{other} is an argument of {name}. Expected it under the optimiser: "
                f"optimizer_config.{name}.{other}."
            )
        elif other not in OPTIMIZERS:
            problems.append(
                f"optimizer_config.{other}: there is no optimiser {other!r}.{nearest(str(other), OPTIMIZERS)} "
                f"Expected one of {', '.join(OPTIMIZERS)}."
            )
    return cast(Mapping[str, Any], own)


def _read(name: str, argument: str, value: Any) -> Any:
    """The value of an argument as mlx takes it; UserError where there is no such argument or it has another form."""
    option, known = f"optimizer_config.{name}.{argument}", ARGUMENTS[name]
    if argument == "learning_rate":
        raise UserError(f"{option}={value!r} is refused: the rate has an option of its own. Use learning_rate.")
    if argument == "weight_decay" and argument not in known:
        raise UserError(_no_decay(name, f"{option}={value!r}"))
    if argument not in known:
        raise UserError(
            f"{option}: {name} has no argument {argument!r}.{nearest(str(argument), known)} Expected one of {', '.join(known)}."
        )
    try:
        return known[argument].read(value)
    except (ValueError, OverflowError) as error:
        raise UserError(f"{option}={value!r} is out of range. Expected {known[argument].expected}.") from error


def _contradictions(settings: OptimizerSettings, own: Mapping[str, Any]) -> list[str]:
    """What is wrong although each value of the optimiser's `own` entry may be right by itself."""
    name, decay = settings.optimizer, settings.weight_decay
    option, problems = f"optimizer_config.{name}", []
    if decay is not None and "weight_decay" not in ARGUMENTS[name]:
        problems.append(_no_decay(name, f"weight_decay={decay!r}"))
    elif decay is not None and "weight_decay" in own:
        problems.append(
            f"weight_decay={decay!r} and {option}.weight_decay={own['weight_decay']!r} say the same thing twice. "
            "Give one of them."
        )
    if name == "sgd" and own.get("nesterov") is True and (not own.get("momentum") or own.get("dampening")):
        problems.append(f"{option}.nesterov=True: Nesterov's momentum needs a momentum above 0 and no dampening.")
    if name == "adafactor":
        if own.get("warmup_init") is True and not own.get("relative_step"):
            problems.append(f"{option}.warmup_init=True has no effect without relative_step. Give both, or warmup_proportion.")
        if own.get("relative_step") is True and settings.loraplus_lr_ratio != 1:
            problems.append(
                f"{option}.relative_step=True ignores every learning rate, and with it "
                f"loraplus_lr_ratio={settings.loraplus_lr_ratio!r}. Give one of them."
            )
    return problems


def _no_decay(name: str, said: str) -> str:
    return f"{said}: {name} has no weight decay. Use optimizer='adamw', or leave it out."
