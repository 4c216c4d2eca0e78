import math
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.tuner.utils import build_schedule

from finetune_dataflow.engine.fit_settings import OptimizerSettings
from finetune_dataflow.engine.schedules import rate_of_update, schedule_text
from finetune_dataflow.errors import UserError


def rates(settings: OptimizerSettings, updates: int, updates_per_epoch: int) -> list[float]:
    rate = rate_of_update(settings, updates, updates_per_epoch)
    return [rate(update) for update in range(updates)]


def of_mlx_lm(updates: int, **schedule: Any) -> list[float]:
    return rates(OptimizerSettings(lr_schedule=schedule), updates, updates)


def of_fork(updates: int, updates_per_epoch: int, learning_rate: float = 2e-4, **schedule: Any) -> list[float]:
    return rates(OptimizerSettings(learning_rate=learning_rate, learning_schedule=schedule), updates, updates_per_epoch)


def problems(updates: int = 69, updates_per_epoch: int = 23, /, **settings: Any) -> list[str]:
    with pytest.raises(UserError) as raised:
        rate_of_update(OptimizerSettings(**settings), updates, updates_per_epoch)
    return str(raised.value).splitlines()


def cosine_between(highest: float, lowest: float, share: float) -> float:
    return lowest + (highest - lowest) * math.cos(math.pi * share / 2) ** 2


# The default.


def test_the_default_rises_in_a_line_that_does_not_start_at_zero_and_falls_in_half_a_cosine() -> None:
    found = rates(OptimizerSettings(learning_rate=4e-4, warmup_proportion=0.3), 10, 5)
    assert found[:4] == pytest.approx([1e-4, 2e-4, 3e-4, 4e-4])
    assert found[3:] == pytest.approx([cosine_between(4e-4, 0, n / 7) for n in range(7)])
    assert all(type(rate) is float for rate in found)


@pytest.mark.parametrize(("updates", "proportion"), [(1, 0.1), (1, 1.0), (7, 0.0), (69, 0.1), (100, 0.5), (12, 1.0)])
def test_the_default_is_bit_for_bit_what_it_always_was(updates: int, proportion: float) -> None:
    expected, warmup = [], round(proportion * updates)
    for update in range(updates):
        if update < warmup:
            expected.append(3e-5 * (update + 1) / (warmup + 1))
        else:
            expected.append(3e-5 * 0.5 * (1 + math.cos(math.pi * ((update - warmup) / max(updates - warmup, 1)))))
    assert rates(OptimizerSettings(learning_rate=3e-5, warmup_proportion=proportion), updates, 3) == expected


# mlx-lm's schedules.

MLX_LM: list[tuple[int, dict[str, Any]]] = [
    (69, {"name": "cosine_decay", "arguments": [1e-5, 69]}),
    (69, {"name": "cosine_decay", "arguments": [1e-5, 69, 1e-7], "warmup": 10}),
    (69, {"name": "cosine_decay", "arguments": [1e-5, 59, 1e-7], "warmup": 10, "warmup_init": 1e-7}),
    (69, {"name": "cosine_decay", "arguments": [1e-5, 58, 1e-7], "warmup": 10, "warmup_init": 1e-4}),
    (69, {"name": "cosine_decay", "arguments": (1e-7, 69, 1e-5), "warmup": 0, "warmup_init": 1e-9}),
    (20, {"name": "linear_schedule", "arguments": [1e-3, 1e-5, 20]}),
    (20, {"name": "linear_schedule", "arguments": [1e-5, 1e-3, 17], "warmup": 3}),
    (40, {"name": "exponential_decay", "arguments": [1e-3, 0.99], "warmup": 5}),
    (40, {"name": "exponential_decay", "arguments": [1, 1]}),
    (40, {"name": "step_decay", "arguments": [1e-3, 0.5, 7], "warmup": 2, "warmup_init": 0}),
    (40, {"name": "step_decay", "arguments": [1e-3, 0.1, 1]}),
    (2, {"name": "step_decay", "arguments": [1e-3, 0.5, 1], "warmup": 1}),
]


@pytest.mark.parametrize(("updates", "schedule"), MLX_LM)
def test_every_rate_of_an_lr_schedule_is_the_one_that_mlx_lm_uses(updates: int, schedule: dict[str, Any]) -> None:
    theirs = build_schedule(schedule)
    expected = [float(mx.array(theirs(mx.array(update, mx.uint64)))) for update in range(updates)]
    # The cosine's last rates are differences of float32 numbers near 1.
    assert of_mlx_lm(updates, **schedule) == pytest.approx(expected, rel=1e-6, abs=1.2e-7 * max(expected))


def test_the_warm_up_of_an_lr_schedule_reaches_the_highest_rate_twice_and_decays_from_there() -> None:
    found = of_mlx_lm(8, name="cosine_decay", arguments=[1e-3, 6, 2e-4], warmup=2, warmup_init=5e-4)
    decay = [cosine_between(1e-3, 2e-4, n / 6) for n in range(5)]
    assert found == pytest.approx([5e-4, 7.5e-4, 1e-3, *decay])


@pytest.mark.parametrize(
    ("name", "to_the_end", "explicit"),
    [("cosine_decay", [1e-3, -1, 1e-5], [1e-3, 17, 1e-5]), ("linear_schedule", [1e-3, 1e-5, -1.0], [1e-3, 1e-5, 17.0])],
)
def test_minus_one_is_what_the_warm_up_leaves_of_the_fit(name: str, to_the_end: list[float], explicit: list[float]) -> None:
    found = of_mlx_lm(20, name=name, arguments=to_the_end, warmup=3)
    assert found == of_mlx_lm(20, name=name, arguments=explicit, warmup=3)
    assert found != of_mlx_lm(20, name=name, arguments=to_the_end)


def test_minus_one_without_a_warm_up_is_the_whole_fit_not_an_epoch() -> None:
    settings = OptimizerSettings(lr_schedule={"name": "linear_schedule", "arguments": [1e-3, 0, -1]})
    assert rates(settings, 4, 2) == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])


def test_null_is_as_good_as_no_key() -> None:
    schedule = {"name": "exponential_decay", "arguments": [1e-3, 0.5]}
    assert of_mlx_lm(4, **schedule, warmup=None, warmup_init=None) == of_mlx_lm(4, **schedule)


def test_a_rate_that_decays_below_the_smallest_float_is_zero() -> None:
    assert of_mlx_lm(20_000, name="exponential_decay", arguments=[1e-3, 0.9])[-1] == 0


# mlx-tuning-fork's schedules.


def test_the_cosine_falls_over_one_epoch_and_stays_at_the_lowest_rate() -> None:
    found = of_fork(10, 4, type="cosine", max_lr=1e-3, min_lr=1e-4, cycle_length=-1)
    assert found[:4] == pytest.approx([cosine_between(1e-3, 1e-4, n / 4) for n in range(4)])
    assert found[4:] == [1e-4] * 6


def test_the_cosine_without_keys_falls_from_the_learning_rate_to_zero_over_one_epoch() -> None:
    assert of_fork(4, 2, 0.008, type="cosine") == pytest.approx([0.008, 0.004, 0, 0])


def test_a_cycle_may_be_as_long_as_the_fit() -> None:
    assert of_fork(4, 2, 0.008, type="cosine", cycle_length=4.0)[2] == pytest.approx(0.004)


def test_the_warm_up_is_a_share_of_one_epoch_and_the_cosine_follows_it() -> None:
    found = of_fork(20, 8, type="cosine_w_warmup", warmup_proportion=0.5, start_lr=2e-5, max_lr=1e-4, min_lr=1e-6)
    assert found[:4] == pytest.approx([2e-5, 4e-5, 6e-5, 8e-5])
    assert found[4:12] == pytest.approx([cosine_between(1e-4, 1e-6, n / 8) for n in range(8)])
    assert found[12:] == [1e-6] * 8


def test_the_warm_up_may_be_given_in_updates_and_starts_at_zero_without_start_lr() -> None:
    found = of_fork(9, 8, 1e-3, type="cosine_w_warmup", length=4, cycle_length=5)
    assert found[:5] == pytest.approx([0, 2.5e-4, 5e-4, 7.5e-4, 1e-3])
    assert found[5:] == pytest.approx([cosine_between(1e-3, 0, n / 5) for n in range(1, 5)])


def test_a_warm_up_of_less_than_half_an_update_is_none() -> None:
    assert of_fork(4, 4, 1e-3, type="cosine_w_warmup", warmup_proportion=0.1)[0] == pytest.approx(1e-3)


@pytest.mark.parametrize(("keys", "expected"), [({}, 3e-4), ({"max_lr": 3e-4}, 3e-4), ({"max_lr": None}, 3e-4)])
def test_the_constant_schedule_never_changes(keys: dict[str, Any], expected: float) -> None:
    assert of_fork(5, 2, 3e-4, type="constant", **keys) == [expected] * 5


# What is wrong with a schedule.


def test_both_schedules_at_once_are_refused() -> None:
    assert problems(lr_schedule={}, learning_schedule={}) == [
        "lr_schedule and learning_schedule are both given. Give one of them."
    ]


@pytest.mark.parametrize("found", ["cosine_decay", ["cosine_decay", 1e-5], 3, True])
@pytest.mark.parametrize("option", ["lr_schedule", "learning_schedule"])
def test_what_is_no_mapping_is_refused(option: str, found: object) -> None:
    given: dict[str, Any] = {option: found}
    (said,) = problems(**given)
    assert said.startswith(f"{option}={found!r}: expected keys with values, such as {{")


def test_all_problems_of_an_lr_schedule_are_said_at_once() -> None:
    schedule = {"name": "cosine_decai", "argument": [1], "warmup": -1, "warmup_init": True, 7: None}
    assert problems(lr_schedule=schedule, warmup_proportion=0.2) == [
        "lr_schedule: the key 'argument' is unknown. Did you mean 'arguments'? Expected name, arguments, warmup, warmup_init.",
        "lr_schedule: the key 7 is unknown. Expected name, arguments, warmup, warmup_init.",
        "lr_schedule: name is 'cosine_decai'. Did you mean 'cosine_decay'? Expected one of cosine_decay, linear_schedule, "
        "exponential_decay, step_decay.",
        "lr_schedule: the key 'arguments' is missing. Expected a list.",
        "lr_schedule: warmup is -1. Expected a number of updates, 0 or more.",
        "lr_schedule: warmup_init is True. Expected a rate, 0 or more.",
        "warmup_proportion=0.2 has no effect beside lr_schedule. Leave it out of the settings. Its own key warmup sets the "
        "warm-up.",
    ]


def test_all_problems_of_a_learning_schedule_are_said_at_once() -> None:
    schedule = {"type": "cosine_w_warmup", "max_rate": 1, "min_lr": 1e-3, "max_lr": 1e-4, "cycle_length": 1000}
    assert problems(learning_schedule=schedule, learning_rate=1e-5) == [
        "learning_schedule: the key 'max_rate' is unknown. Did you mean 'max_lr'? Expected type, start_lr, warmup_proportion, "
        "length, max_lr, min_lr, cycle_length.",
        "learning_schedule: min_lr=0.001 is above max_lr=0.0001.",
        "learning_schedule: the warm-up's length is missing. Expected warmup_proportion, a share of one epoch, or length, in "
        "updates.",
        "learning_rate=1e-05 has no effect beside learning_schedule, whose highest rate is 0.0001. Leave learning_rate out, or "
        "write the same rate in both.",
    ]


@pytest.mark.parametrize("name", ["constant", "join_schedules", "math", ["cosine_decay"], 5, True, {}])
def test_an_unknown_name_is_refused_with_the_known_ones(name: object) -> None:
    (said,) = problems(lr_schedule={"name": name, "arguments": [1e-3, 69]})
    assert said.startswith(f"lr_schedule: name is {name!r}.")
    assert said.endswith("Expected one of cosine_decay, linear_schedule, exponential_decay, step_decay.")


@pytest.mark.parametrize(("option", "key"), [("lr_schedule", "name"), ("learning_schedule", "type")])
def test_a_schedule_without_its_name_is_refused(option: str, key: str) -> None:
    given: dict[str, Any] = {option: {key: None}}
    assert problems(**given)[0].startswith(f"{option}: the key {key!r} is missing. Expected one of cosine")


def test_an_unknown_type_is_refused_with_the_nearest() -> None:
    assert problems(learning_schedule={"type": "cosine_warmup", "length": 3, "cycle_length": 66}) == [
        "learning_schedule: type is 'cosine_warmup'. Did you mean 'cosine_w_warmup'? Expected one of cosine, cosine_w_warmup, "
        "constant."
    ]


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("cosine_decay", [1e-3], "cosine_decay takes 2 or 3 arguments, [init, decay_steps, end], and 1 are given: [0.001]."),
        ("step_decay", [], "step_decay takes 3 arguments, [init, decay_rate, step_size], and 0 are given: []."),
        ("exponential_decay", [1e-3, 0.9, 3], "exponential_decay takes 2 arguments, [init, decay_rate], and 3 are given: [0.00"),
        ("linear_schedule", 1e-3, "arguments is 0.001. Expected a list, [init, end, steps]."),
        ("linear_schedule", {"init": 1}, "arguments is {'init': 1}. Expected a list, [init, end, steps]."),
        ("linear_schedule", [0, 1e-3, -1], "init is 0. Expected a rate above 0."),
        ("linear_schedule", [1e-3, -1e-9, -1], "end is -1e-09. Expected a rate, 0 or more."),
        ("linear_schedule", [1e-3, 0, 0], "steps is 0. Expected a number of updates, 1 or more, or -1."),
        ("cosine_decay", ["1e-3", 69], "init is '1e-3'. Expected a rate above 0."),
        ("cosine_decay", [math.nan, 69], "init is nan. Expected a rate above 0."),
        ("cosine_decay", [math.inf, 69], "init is inf. Expected a rate above 0."),
        ("cosine_decay", [True, 69], "init is True. Expected a rate above 0."),
        ("cosine_decay", [1e-3, 69.5], "decay_steps is 69.5. Expected a number of updates, 1 or more, or -1."),
        ("cosine_decay", [1e-3, math.inf], "decay_steps is inf. Expected a number of updates, 1 or more, or -1."),
        ("cosine_decay", [1e-3, 69, None], "end is None. Expected a rate, 0 or more."),
        ("exponential_decay", [1e-3, 1.1], "decay_rate is 1.1. Expected a factor above 0, at most 1."),
        ("exponential_decay", [1e-3, 0], "decay_rate is 0. Expected a factor above 0, at most 1."),
        ("step_decay", [1e-3, 0.5, -1], "step_size is -1. Expected a number of updates, 1 or more."),
        ("step_decay", [1e-3, 0.5, 2.5], "step_size is 2.5. Expected a number of updates, 1 or more."),
    ],
)
def test_arguments_of_a_wrong_number_or_kind_are_refused(name: str, arguments: object, said: str) -> None:
    (found,) = problems(lr_schedule={"name": name, "arguments": arguments})
    assert found.startswith(f"lr_schedule: {said}")


@pytest.mark.parametrize("huge", [10**400, 10**6000], ids=["400 digits", "6000 digits"])
def test_a_number_beyond_every_float_is_refused(huge: int) -> None:
    (said,) = problems(learning_schedule={"type": "constant", "max_lr": huge})
    assert said.startswith("learning_schedule: max_lr is ") and said.endswith(" Expected a rate above 0.")
    assert len(said) < 120


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"max_lr": 0}, "max_lr is 0. Expected a rate above 0."),
        ({"max_lr": "2e-5"}, "max_lr is '2e-5'. Expected a rate above 0."),
        ({"min_lr": -1}, "min_lr is -1. Expected a rate, 0 or more."),
        ({"start_lr": math.nan}, "start_lr is nan. Expected a rate, 0 or more."),
        ({"start_lr": False}, "start_lr is False. Expected a rate, 0 or more."),
        ({"start_lr": 1e-3}, "start_lr=0.001 is above learning_rate=0.0002."),
        ({"min_lr": 1}, "min_lr=1.0 is above learning_rate=0.0002."),
        ({"warmup_proportion": 1.5}, "warmup_proportion is 1.5. Expected a share of one epoch's updates, from 0 to 1."),
        ({"warmup_proportion": None, "length": 2.5}, "length is 2.5. Expected a number of updates, 0 or more."),
        ({"length": 2}, "warmup_proportion and length say the same thing twice. Give one of them."),
        ({"cycle_length": 0}, "cycle_length is 0. Expected a number of updates, 1 or more, or -1."),
        ({"cycle_length": [1]}, "cycle_length is [1]. Expected a number of updates, 1 or more, or -1."),
    ],
)
def test_values_of_a_learning_schedule_that_cannot_be_are_refused(keys: dict[str, Any], said: str) -> None:
    schedule = {"type": "cosine_w_warmup", "warmup_proportion": 0.1, **keys}
    assert problems(learning_schedule=schedule) == [f"learning_schedule: {said}"]


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ({"type": "cosine", "start_lr": 0}, "start_lr has no effect with the type 'cosine', which reads max_lr, min_lr, cycl"),
        ({"type": "cosine", "length": 3}, "length has no effect with the type 'cosine', which reads max_lr, min_lr, cycle_le"),
        ({"type": "constant", "min_lr": 1, "cycle_length": 9}, "min_lr, cycle_length has no effect with the type 'constant'"),
    ],
)
def test_a_key_that_the_type_does_not_read_is_refused(schedule: dict[str, Any], said: str) -> None:
    (found,) = problems(learning_schedule=schedule)
    assert found.startswith(f"learning_schedule: {said}")


@pytest.mark.parametrize("name", ["cosine_decay", "linear_schedule"])
@pytest.mark.parametrize(
    ("steps", "warmup", "said"),
    [
        (1000, 0, "decays over 1000 updates; the fit makes 69. Write 69 in place of 1000, or -1 for the rest of the fit."),
        (60, 7, "decays over 60 updates after a warm-up of 7; the fit makes 69. Write 62 in place of 60, or -1 for the rest of "
         "the fit."),
        (63, 7, "decays over 63 updates after a warm-up of 7; the fit makes 69. Write 62 in place of 63, or -1 for the rest of "
         "the fit."),
        (70, 0, "decays over 70 updates; the fit makes 69. Write 69 in place of 70, or -1 for the rest of the fit."),
    ],
)  # fmt: skip
def test_a_decay_that_does_not_end_with_the_fit_is_refused(name: str, steps: int, warmup: int, said: str) -> None:
    arguments = [1e-3, steps] if name == "cosine_decay" else [1e-3, 0, steps]
    assert problems(lr_schedule={"name": name, "arguments": arguments, "warmup": warmup}) == [f"lr_schedule {said}"]


def test_a_warm_up_and_a_decay_longer_than_the_fit_are_both_said() -> None:
    assert problems(lr_schedule={"name": "cosine_decay", "arguments": [1e-5, 1000], "warmup": 100}) == [
        "lr_schedule: warmup gives a warm-up of 100 updates, not shorter than the fit, which makes 69. Lower warmup.",
        "lr_schedule decays over 1000 updates after a warm-up of 100; the fit makes 69. Write 69 in place of 1000, or -1 for the "
        "rest of the fit.",
    ]


@pytest.mark.parametrize("warmup", [{"length": 69}, {"length": 500}])
def test_a_warm_up_as_long_as_the_fit_is_refused(warmup: dict[str, Any]) -> None:
    (said,) = problems(learning_schedule={"type": "cosine_w_warmup", **warmup})
    assert "not shorter than the fit, which makes 69" in said


def test_a_warm_up_of_a_whole_epoch_needs_a_second() -> None:
    schedule = {"type": "cosine_w_warmup", "warmup_proportion": 1, "max_lr": 1e-3}
    (said,) = problems(23, 23, learning_schedule=schedule)
    assert said.startswith("learning_schedule: warmup_proportion gives a warm-up of 23 updates, not shorter than the fit")
    assert rates(OptimizerSettings(learning_schedule=schedule), 24, 23)[23] == pytest.approx(1e-3)


@pytest.mark.parametrize("cycle", [23, 69, 20, 66])
def test_a_cycle_of_an_epoch_or_of_the_fit_with_or_without_the_warm_up_is_taken(cycle: int) -> None:
    assert len(of_fork(69, 23, type="cosine_w_warmup", length=3, cycle_length=cycle)) == 69


@pytest.mark.parametrize(("warmup", "cycle"), [(0, 20), (3, 19), (3, 26), (3, 72)])
def test_a_cycle_of_another_length_is_refused(warmup: int, cycle: int) -> None:
    after = " after a warm-up of 3" if warmup else ""
    assert problems(learning_schedule={"type": "cosine_w_warmup", "length": warmup, "cycle_length": cycle}) == [
        f"learning_schedule decays over a cycle_length of {cycle} updates{after}; an epoch has 23 and the fit makes 69. Write 23 "
        f"or 69 in place of {cycle}, or -1 for one epoch."
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {"lr_schedule": {"name": "linear_schedule", "arguments": [1e-5, 1e-3, -1]}},
        {"lr_schedule": {"name": "cosine_decay", "arguments": [1e-5, -1], "warmup": 3, "warmup_init": 1e-3}},
        {"learning_schedule": {"type": "constant", "max_lr": 1e-3}},
    ],
)
def test_a_learning_rate_beside_a_schedule_must_be_its_highest(settings: dict[str, Any]) -> None:
    (said,) = problems(learning_rate=1e-5, **settings)
    assert said.startswith("learning_rate=1e-05 has no effect beside l") and "whose highest rate is 0.001." in said
    for rate in (1e-3, 2e-4):
        assert rate_of_update(OptimizerSettings(learning_rate=rate, **settings), 69, 23)(5) > 0


def test_a_warm_up_beside_a_learning_schedule_is_refused() -> None:
    assert problems(warmup_proportion=0, learning_schedule={"type": "constant"}) == [
        "warmup_proportion=0 has no effect beside learning_schedule. Leave it out of the settings."
    ]


# In words.


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "cosine, 7 updates of warm-up to 0.0002, then to 0"),
        ({"warmup_proportion": 0.0}, "cosine, from 0.0002 to 0"),
        ({"lr_schedule": {"name": "cosine_decay", "arguments": [1e-5, -1, 1e-7], "warmup": 1}},
         "cosine_decay, 1 update of warm-up to 1e-05, then to 1e-07 over 68 updates"),
        ({"lr_schedule": {"name": "linear_schedule", "arguments": [1e-5, 0, 69]}},
         "linear_schedule, from 1e-05 to 0 over 69 updates"),
        ({"lr_schedule": {"name": "exponential_decay", "arguments": [1e-3, 0.99], "warmup": 5}},
         "exponential_decay, 5 updates of warm-up to 0.001, then times 0.99 every update"),
        ({"lr_schedule": {"name": "step_decay", "arguments": [1e-3, 0.5, 10]}},
         "step_decay, from 0.001 times 0.5 every 10 updates"),
        ({"learning_schedule": {"type": "cosine"}}, "cosine, from 0.0002 to 0 over 23 updates"),
        ({"learning_schedule": {"type": "cosine_w_warmup", "warmup_proportion": 0.1, "max_lr": 1e-4, "min_lr": 1e-6}},
         "cosine, 2 updates of warm-up to 0.0001, then to 1e-06 over 23 updates"),
        ({"learning_schedule": {"type": "constant"}}, "constant, 0.0002"),
    ],
)  # fmt: skip
def test_a_schedule_is_said_in_one_line(settings: dict[str, Any], said: str) -> None:
    assert schedule_text(OptimizerSettings(**settings), 69, 23) == said


def test_the_words_for_a_wrong_schedule_are_its_problems() -> None:
    with pytest.raises(UserError, match="name is 'cosine'"):
        schedule_text(OptimizerSettings(lr_schedule={"name": "cosine", "arguments": []}), 69, 23)
