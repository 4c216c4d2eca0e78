from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.utils import linear_to_lora_layers

from finetune_dataflow.engine.fit_settings import OPTIMIZERS, OptimizerSettings
from finetune_dataflow.engine.models import load_model
from finetune_dataflow.engine.optimizers import FitOptimizer, clipped, fit_optimizer, global_norm
from finetune_dataflow.errors import UserError

RATES = (0.01, 0.02, 0.005)
Arrays = dict[str, np.ndarray]
Formula = Callable[[np.ndarray, np.ndarray, dict[str, Any], float, int], np.ndarray]


class Pair(nn.Module):
    """A weight [3, 4] and a bias [3]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = mx.zeros((3, 4)), mx.zeros((3,))
        settle(self)


class Experts(nn.Module):
    """LoRA's second matrix for two experts."""

    def __init__(self) -> None:
        super().__init__()
        self.lora_b = mx.zeros((2, 5, 3))
        settle(self)


class Adapted(nn.Module):
    """One parameter of every kind that an adapter or a full fine-tune trains."""

    def __init__(self) -> None:
        super().__init__()
        self.lora_a, self.lora_b, self.m = mx.zeros((4, 2)), mx.zeros((2, 5)), mx.zeros((5,))
        self.experts = Experts()
        self.embed = nn.Embedding(6, 4)
        self.convolution = nn.Conv1d(2, 3, 2)
        self.lm_head = nn.Linear(4, 6, bias=False)
        settle(self)


def numbers(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def leaves(tree: Any) -> dict[str, mx.array]:
    return dict(tree_flatten(tree))


def values(model: nn.Module) -> Arrays:
    return {name: np.array(each) for name, each in leaves(model.trainable_parameters()).items()}


def gradient_of(model: nn.Module, number: int) -> dict[str, Any]:
    """A gradient in the form of the model's trainable parameters, another for every number."""
    seeds = count(1000 * number)
    return tree_map(lambda each: mx.array(numbers(each.shape, next(seeds))), model.trainable_parameters())


def settle(model: nn.Module) -> None:
    """The same parameters every time, none of them zero."""
    model.update(gradient_of(model, 99))


def updated(model: nn.Module, optimizer: FitOptimizer, first: int = 0, rates: tuple[float, ...] = RATES) -> Arrays:
    """The model's parameters after an update at each rate, by the gradients from number `first` on."""
    for number, rate in enumerate(rates, first):
        optimizer.update(model, gradient_of(model, number), rate)
        mx.eval(model.trainable_parameters(), optimizer.arrays())
    return values(model)


def by_formula(model: nn.Module, formula: Formula) -> Arrays:
    found, states = values(model), {name: dict[str, Any]() for name in values(model)}
    for number, rate in enumerate(RATES):
        gradient = leaves(gradient_of(model, number))
        found = {name: formula(found[name], np.array(gradient[name]), states[name], rate, number + 1) for name in found}
    return found


def by_hand(model: nn.Module, optimizer: optimizers.Optimizer, factor: float = 1.0) -> Arrays:
    """The same updates by mlx's own class."""
    for number, rate in enumerate(RATES):
        optimizer.learning_rate = rate * factor
        optimizer.update(model, gradient_of(model, number))
        mx.eval(model.parameters(), optimizer.state)
    return values(model)


def adam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, correct: bool = False, decay: float = 0.0) -> Formula:
    def formula(w: np.ndarray, g: np.ndarray, state: dict[str, Any], rate: float, step: int) -> np.ndarray:
        m = state["m"] = b1 * state.get("m", 0) + (1 - b1) * g
        v = state["v"] = b2 * state.get("v", 0) + (1 - b2) * g**2
        if correct:
            m, v = m / (1 - b1**step), v / (1 - b2**step)
        return w - rate * (m / (np.sqrt(v) + eps) + decay * w)

    return formula


def sgd(momentum: float = 0.0, decay: float = 0.0, dampening: float = 0.0, nesterov: bool = False) -> Formula:
    def formula(w: np.ndarray, g: np.ndarray, state: dict[str, Any], rate: float, step: int) -> np.ndarray:
        g = g + decay * w
        v = state["v"] = momentum * state.get("v", 0) + (1 - dampening) * g
        return w - rate * (g + momentum * v if nesterov else v)

    return formula


def lion(b1: float = 0.9, b2: float = 0.99, decay: float = 0.0) -> Formula:
    def formula(w: np.ndarray, g: np.ndarray, state: dict[str, Any], rate: float, step: int) -> np.ndarray:
        m = state.get("m", 0)
        state["m"] = b2 * m + (1 - b2) * g
        return w - rate * (np.sign(b1 * m + (1 - b1) * g) + decay * w)

    return formula


@pytest.mark.parametrize(
    ("name", "decay", "arguments", "formula"),
    [
        ("adam", None, {}, adam()),
        ("adam", None, {"betas": [0.8, 0.95], "eps": 1e-3, "bias_correction": True}, adam(0.8, 0.95, 1e-3, True)),
        ("adamw", None, {}, adam(decay=0.01)),
        ("adamw", 0.0, {}, adam()),
        ("adamw", 0.5, {"betas": (0.8, 0.95), "bias_correction": True}, adam(0.8, 0.95, correct=True, decay=0.5)),
        ("adamw", None, {"weight_decay": 0.3, "eps": "1e-2"}, adam(eps=1e-2, decay=0.3)),
        ("sgd", None, {}, sgd()),
        ("sgd", 0.5, {"momentum": 0.9, "dampening": 0.2}, sgd(0.9, 0.5, 0.2)),
        ("sgd", None, {"momentum": 0.9, "nesterov": True}, sgd(0.9, nesterov=True)),
        ("lion", None, {}, lion()),
        ("lion", 0.5, {"betas": [0.8, 0.95]}, lion(0.8, 0.95, 0.5)),
    ],
)
def test_three_updates_follow_the_published_formula(
    name: str, decay: float | None, arguments: dict[str, Any], formula: Formula
) -> None:
    settings = OptimizerSettings(optimizer=name, weight_decay=decay, optimizer_config={name: arguments, "muon": {}})
    found, expected = updated(Pair(), fit_optimizer(settings)), by_formula(Pair(), formula)
    for each in ("weight", "bias"):
        np.testing.assert_allclose(found[each], expected[each], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "theirs"),
    [
        ({}, {"relative_step": False, "scale_parameter": False}),
        ({"scale_parameter": True, "decay_rate": -0.5}, {"relative_step": False, "scale_parameter": True, "decay_rate": -0.5}),
        ({"beta_1": 0.9, "weight_decay": 0.3},
         {"relative_step": False, "scale_parameter": False, "beta_1": 0.9, "weight_decay": 0.3}),
        ({"relative_step": True, "warmup_init": True}, {"warmup_init": True}),
    ],
)  # fmt: skip
def test_adafactor_is_mlx_s_at_the_rate_it_is_given(given: dict[str, Any], theirs: dict[str, Any]) -> None:
    settings = OptimizerSettings(optimizer="adafactor", optimizer_config={"adafactor": given})
    expected = by_hand(Pair(), optimizers.Adafactor(learning_rate=0.0, **theirs))
    found = updated(Pair(), fit_optimizer(settings))
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_adafactor_moves_a_new_lora_b_by_the_learning_rate_although_it_is_zero() -> None:
    model = nn.Module()
    model.lora_b = mx.zeros((8, 64))
    found = updated(model, fit_optimizer(OptimizerSettings(optimizer="adafactor")), rates=(0.01,))["lora_b"]
    assert 0.005 < np.sqrt(np.square(found).mean()) < 0.0101


def test_adafactor_with_relative_step_ignores_the_learning_rate() -> None:
    settings = OptimizerSettings(optimizer="adafactor", optimizer_config={"adafactor": {"relative_step": True}})
    slow, fast = (updated(Pair(), fit_optimizer(settings), rates=(rate,)) for rate in (1e-9, 1.0))
    assert np.array_equal(slow["weight"], fast["weight"]) and not np.array_equal(slow["weight"], values(Pair())["weight"])


@pytest.mark.parametrize("decay", [None, 0.3])
def test_muon_updates_a_matrix_as_mlx_s_own_does(decay: float | None) -> None:
    theirs = optimizers.Muon(learning_rate=0.0) if decay is None else optimizers.Muon(learning_rate=0.0, weight_decay=decay)
    expected = by_hand(Pair(), theirs)["weight"]
    found = updated(Pair(), fit_optimizer(OptimizerSettings(optimizer="muon", weight_decay=decay)))
    assert np.array_equal(found["weight"], expected)


def test_muon_updates_each_expert_s_matrix_by_itself() -> None:
    found = updated(Experts(), fit_optimizer(OptimizerSettings(optimizer="muon")))["lora_b"]
    for expert in range(2):
        muon, alone = optimizers.Muon(learning_rate=0.0), {"w": Experts().lora_b[expert]}
        for number, rate in enumerate(RATES):
            muon.learning_rate = rate
            alone = muon.apply_gradients({"w": gradient_of(Experts(), number)["lora_b"][expert]}, alone)
        np.testing.assert_allclose(found[expert], np.array(alone["w"]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "columns"),
    [("m", 5), ("embed.weight", 4), ("lm_head.weight", 4), ("convolution.weight", 2), ("convolution.bias", 3)],
)
def test_beside_muon_adamw_updates_what_is_no_matrix_at_a_rate_of_its_size(name: str, columns: int) -> None:
    found = updated(Adapted(), fit_optimizer(OptimizerSettings(optimizer="muon", weight_decay=0.2)))[name]
    adamw = optimizers.AdamW(learning_rate=0.0, weight_decay=0.2, bias_correction=True)
    expected = by_hand(Adapted(), adamw, columns**-0.5)[name]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor", "muon", "lion"])
def test_weight_decay_makes_weights_smaller_where_the_gradient_is_zero(name: str) -> None:
    sizes = []
    for decay in (0.0, 0.5):
        model, optimizer = Pair(), fit_optimizer(OptimizerSettings(optimizer=name, weight_decay=decay))
        optimizer.update(model, tree_map(mx.zeros_like, model.trainable_parameters()), 0.1)
        sizes.append({each: float(np.linalg.norm(found)) for each, found in values(model).items()})
    start = {each: float(np.linalg.norm(found)) for each, found in values(Pair()).items()}
    assert sizes[0] == start
    assert all(sizes[1][each] < start[each] - 1e-3 for each in start)


@pytest.mark.parametrize(
    ("name", "factory"),
    [("adamw", optimizers.AdamW), ("sgd", optimizers.SGD), ("lion", optimizers.Lion), ("muon", optimizers.Muon)],
)
def test_with_lora_plus_lora_b_alone_gets_the_rate_times_the_ratio(
    name: str, factory: Callable[..., optimizers.Optimizer]
) -> None:
    found = updated(Adapted(), fit_optimizer(OptimizerSettings(optimizer=name, loraplus_lr_ratio=16.0)))
    slow, fast = nn.Module(), nn.Module()
    slow_optimizer, fast_optimizer = factory(learning_rate=0.0), factory(learning_rate=0.0)
    slow.lora_a, fast.lora_b = Adapted().lora_a, Adapted().lora_b
    for number, (rate, higher) in enumerate(((0.01, 0.16), (0.02, 0.32), (0.005, 0.08))):
        gradient = gradient_of(Adapted(), number)
        slow_optimizer.learning_rate, fast_optimizer.learning_rate = rate, higher
        slow_optimizer.update(slow, {"lora_a": gradient["lora_a"]})
        fast_optimizer.update(fast, {"lora_b": gradient["lora_b"]})
    assert np.array_equal(found["lora_a"], np.array(slow.lora_a))
    assert np.array_equal(found["lora_b"], np.array(fast.lora_b))


@pytest.mark.parametrize("ratio", [1.0, 16.0])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [*((name, {}) for name in OPTIMIZERS), ("sgd", {"momentum": 0.9}), ("adafactor", {"beta_1": 0.9}),
     ("adamw", {"bias_correction": True})],
)  # fmt: skip
def test_a_restored_optimiser_goes_on_bit_for_bit(name: str, arguments: dict[str, Any], ratio: float, tmp_path: Path) -> None:
    settings = OptimizerSettings(optimizer=name, optimizer_config={name: arguments}, loraplus_lr_ratio=ratio)
    through = updated(Adapted(), fit_optimizer(settings), rates=(*RATES, *RATES))
    model, optimizer = Adapted(), fit_optimizer(settings)
    updated(model, optimizer)
    mx.save_safetensors(str(tmp_path / "state.safetensors"), optimizer.arrays())
    saved = mx.load(str(tmp_path / "state.safetensors"))
    assert isinstance(saved, dict) and saved["step"].dtype == mx.uint64 and saved["step"].item() == 3
    again = fit_optimizer(settings)
    again.restore(model, saved)
    found = updated(model, again, first=3)
    assert {*found} == {*through} and all(np.array_equal(found[each], through[each]) for each in through)
    forgetful = updated(restarted(settings), fit_optimizer(settings), first=3)
    assert (name, arguments) == ("sgd", {}) or not np.array_equal(forgetful["lora_a"], through["lora_a"])


def restarted(settings: OptimizerSettings) -> nn.Module:
    """The model after three updates, its optimiser lost."""
    model = Adapted()
    updated(model, fit_optimizer(settings))
    return model


def test_a_model_whose_last_block_alone_is_adapted_is_updated_and_restored(tiny_model: Path) -> None:
    def adapted() -> nn.Module:
        model = load_model(tiny_model)
        model.freeze()
        linear_to_lora_layers(model, 1, {"rank": 2, "scale": 1.0, "dropout": 0.0}, use_dora=True)
        settle(model)
        return model

    settings = OptimizerSettings(optimizer="muon", loraplus_lr_ratio=4.0)
    through = updated(adapted(), fit_optimizer(settings), rates=(*RATES, *RATES))
    first, optimizer = adapted(), fit_optimizer(settings)
    frozen = np.array(first.model.layers[0].self_attn.q_proj.weight)
    updated(first, optimizer)
    again = fit_optimizer(settings)
    again.restore(first, optimizer.arrays())
    found = updated(first, again, first=3)
    assert "model.layers.1.self_attn.q_proj.m" in found and not any(".0." in name for name in found)
    assert all(np.array_equal(found[name], through[name]) for name in through)
    assert np.array_equal(np.array(first.model.layers[0].self_attn.q_proj.weight), frozen)
    assert not any(np.array_equal(found[name], start) for name, start in values(adapted()).items())


def test_a_state_before_the_first_update_is_its_step_alone_and_can_be_restored() -> None:
    saved = fit_optimizer(OptimizerSettings()).arrays()
    assert {name: each.item() for name, each in saved.items()} == {"step": 0}
    optimizer = fit_optimizer(OptimizerSettings())
    optimizer.restore(Pair(), saved)
    assert np.array_equal(updated(Pair(), optimizer)["weight"], updated(Pair(), fit_optimizer(OptimizerSettings()))["weight"])


def test_a_state_that_does_not_fit_is_refused_with_everything_wrong_and_nothing_is_taken() -> None:
    optimizer = fit_optimizer(OptimizerSettings())
    updated(Pair(), optimizer)
    state = {**optimizer.arrays(), "weight.m": mx.zeros((4, 3)), "weight.v": mx.zeros((3, 4), mx.float16), "other.m": mx.zeros(1)}
    del state["bias.v"]
    with pytest.raises(ValueError) as error:
        optimizer.restore(Pair(), state)
    assert not isinstance(error.value, UserError)
    assert str(error.value).splitlines()[1:] == [
        "bias.v is missing.",
        "other.m is not part of it.",
        "weight.m is float32 [4, 3], expected float32 [3, 4].",
        "weight.v is float16 [3, 4], expected float32 [3, 4].",
    ]
    assert optimizer.arrays()["step"].item() == 3
    with pytest.raises(ValueError, match=r"step is missing"):
        optimizer.restore(Pair(), {})


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_parameters_keep_their_type_and_stay_finite_where_the_gradient_is_zero(name: str, dtype: mx.Dtype) -> None:
    model, optimizer = Pair(), fit_optimizer(OptimizerSettings(optimizer=name))
    model.set_dtype(dtype)
    optimizer.update(model, tree_map(mx.zeros_like, model.trainable_parameters()), 0.01)
    parameters = leaves(model.trainable_parameters())
    assert {each.dtype for each in parameters.values()} == {dtype}
    assert all(mx.isfinite(each).all().item() for each in parameters.values())
    assert {each.dtype for part, each in optimizer.arrays().items() if part != "step"} == {mx.float32}


def test_the_global_norm_is_over_all_leaves_and_in_float32() -> None:
    norm = global_norm({"a": [mx.array([3.0]), {"b": mx.array([[4.0]])}], "c": mx.array([12.0])})
    assert norm.item() == 13.0 and norm.dtype == mx.float32 and norm.shape == ()
    # 300 squared is beyond float16.
    assert global_norm({"a": mx.array([300.0, 400.0], mx.float16)}).item() == 500.0
    assert global_norm({}).item() == 0.0


def test_clipping_scales_a_gradient_down_to_the_largest_norm() -> None:
    gradient = {"a": mx.array([3.0]), "b": [mx.array([4.0], mx.bfloat16)]}
    found = clipped(gradient, global_norm(gradient), 2.5)
    assert found["a"].tolist() == [1.5] and found["b"][0].tolist() == [2.0]
    assert found["a"].dtype == mx.float32 and found["b"][0].dtype == mx.bfloat16


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("share", [None, 1.0, 1.5, 1e30])
def test_a_gradient_within_the_largest_norm_keeps_every_bit(dtype: mx.Dtype, share: float | None) -> None:
    gradient = {"a": mx.array(numbers((50,), 1)).astype(dtype), "b": mx.array([0.0, -0.0, 1e-7], dtype)}
    norm = global_norm(gradient)
    found = clipped(gradient, norm, None if share is None else float(np.array(norm)) * share)
    for name, each in gradient.items():
        assert found[name].dtype == dtype
        assert np.array_equal(np.array(found[name].view(mx.uint8)), np.array(each.view(mx.uint8)))


def test_a_gradient_of_zeros_stays_zeros() -> None:
    gradient = {"a": mx.zeros(3)}
    assert clipped(gradient, global_norm(gradient), 1.0)["a"].tolist() == [0.0, 0.0, 0.0]


def problems(name: str, entry: Any = None, **others: Any) -> list[str]:
    """What is said of the settings, a line each."""
    given = {"optimizer_config": {name: entry}} | others
    with pytest.raises(UserError) as error:
        fit_optimizer(OptimizerSettings(optimizer=name, **given))
    return str(error.value).splitlines()


@pytest.mark.parametrize(
    ("name", "argument", "value", "expected"),
    [
        ("adam", "betas", [0.9, 1.0], "two numbers from 0 to below 1"),
        ("adamw", "betas", [-0.1, 0.9], "two numbers from 0 to below 1"),
        ("adamw", "betas", [0.9], "two numbers from 0 to below 1"),
        ("lion", "betas", 0.9, "two numbers from 0 to below 1"),
        ("lion", "betas", [True, 0.9], "two numbers from 0 to below 1"),
        ("adamw", "eps", -1e-8, "a number, 0 or more"),
        ("adamw", "eps", float("nan"), "a number, 0 or more"),
        ("adamw", "eps", 10**400, "a number, 0 or more"),
        ("adamw", "eps", "small", "a number, 0 or more"),
        ("adamw", "bias_correction", 1, "true or false"),
        ("adamw", "weight_decay", -0.1, "a number, 0 or more"),
        ("sgd", "momentum", 1.0, "a number from 0 to below 1"),
        ("sgd", "dampening", None, "a number from 0 to below 1"),
        ("sgd", "nesterov", "yes", "true or false"),
        ("adafactor", "eps", 1e-30, "two numbers above 0"),
        ("adafactor", "eps", [0.0, 1e-3], "two numbers above 0"),
        ("adafactor", "clip_threshold", 0, "a number above 0"),
        ("adafactor", "decay_rate", 0.8, "a number below 0"),
        ("adafactor", "beta_1", 1.5, "a number from 0 to below 1, or nothing"),
        ("adafactor", "relative_step", "true", "true or false"),
        ("muon", "momentum", [0.9], "a number from 0 to below 1"),
        ("muon", "ns_steps", 0, "a whole number, 1 or more"),
        ("muon", "ns_steps", 2.5, "a whole number, 1 or more"),
    ],
)
def test_an_argument_out_of_range_is_named_with_what_was_found_and_is_expected(
    name: str, argument: str, value: Any, expected: str
) -> None:
    said = problems(name, {argument: value})
    assert said == [f"optimizer_config.{name}.{argument}={value!r} is out of range. Expected {expected}."]


def test_an_unknown_argument_or_optimiser_is_named_with_the_nearest() -> None:
    assert problems("adamw", {"beta": [0.9, 0.9]}) == [
        "optimizer_config.adamw.beta: adamw has no argument 'beta'. Did you mean 'betas'? "
        "Expected one of betas, eps, bias_correction, weight_decay."
    ]
    assert problems("adamw", optimizer_config={"adafactr": {}}) == [
        "optimizer_config.adafactr: there is no optimiser 'adafactr'. Did you mean 'adafactor'? "
        "Expected one of adam, adamw, sgd, adafactor, muon, lion."
    ]


def test_arguments_outside_of_their_optimiser_are_told_where_they_belong() -> None:
    assert problems("adamw", optimizer_config={"betas": [0.9, 0.9]}) == [
        "optimizer_config.betas is an argument of adamw. Expected it under the optimiser: optimizer_config.adamw.betas."
    ]
    assert problems("adamw", 0.1) == ["optimizer_config.adamw=0.1 is out of range. Expected a mapping of arguments to values."]
    assert problems("adamw", optimizer_config=[1]) == [
        "optimizer_config=[1] is out of range. Expected a mapping, as in {adamw: {...}}."
    ]


def test_the_learning_rate_is_refused_in_the_configuration() -> None:
    assert problems("adamw", {"learning_rate": 0.1}) == [
        "optimizer_config.adamw.learning_rate=0.1 is refused: the rate has an option of its own. Use learning_rate."
    ]


def test_a_weight_decay_said_twice_or_of_adam_is_refused() -> None:
    assert problems("sgd", {"weight_decay": 0.1}, weight_decay=0.2) == [
        "weight_decay=0.2 and optimizer_config.sgd.weight_decay=0.1 say the same thing twice. Give one of them."
    ]
    assert problems("adam", weight_decay=0.2) == [
        "weight_decay=0.2: adam has no weight decay. Use optimizer='adamw', or leave it out."
    ]
    assert problems("adam", {"weight_decay": 0.2}) == [
        "optimizer_config.adam.weight_decay=0.2: adam has no weight decay. Use optimizer='adamw', or leave it out."
    ]


def test_arguments_that_contradict_each_other_are_refused() -> None:
    nesterov = "optimizer_config.sgd.nesterov=True: Nesterov's momentum needs a momentum above 0 and no dampening."
    assert problems("sgd", {"nesterov": True}) == [nesterov]
    assert problems("sgd", {"nesterov": True, "momentum": 0.9, "dampening": 0.1}) == [nesterov]
    assert problems("adafactor", {"warmup_init": True}) == [
        "optimizer_config.adafactor.warmup_init=True has no effect without relative_step. Give both, or warmup_proportion."
    ]
    assert problems("adafactor", {"relative_step": True}, loraplus_lr_ratio=16.0) == [
        "optimizer_config.adafactor.relative_step=True ignores every learning rate, and with it loraplus_lr_ratio=16.0. "
        "Give one of them."
    ]


def test_all_problems_are_told_at_once() -> None:
    config = {"adamw": {"betas": 1, "epsilon": 2, "weight_decay": 0.1}, "adamz": {}, "sgd": {"momentum": "ignored"}}
    said = problems("adamw", optimizer_config=config, weight_decay=0.2)
    assert [line.split()[0] for line in said] == [
        "optimizer_config.adamz:", "optimizer_config.adamw.betas=1", "optimizer_config.adamw.epsilon:", "weight_decay=0.2",
    ]  # fmt: skip


def test_mlx_lm_s_empty_defaults_are_accepted() -> None:
    config: dict[str, Any] = {"adam": {}, "adamw": None, "muon": {}, "sgd": {}, "adafactor": {}}
    expected = by_hand(Pair(), optimizers.AdamW(learning_rate=0.0))
    found = updated(Pair(), fit_optimizer(OptimizerSettings(optimizer_config=config)))
    assert np.array_equal(found["weight"], expected["weight"]) and np.array_equal(found["bias"], expected["bias"])
