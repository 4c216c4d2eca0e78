import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from finetune_dataflow.engine import generation
from finetune_dataflow.engine.chat import load_encoder
from finetune_dataflow.engine.generation import Reply, greedy_replies, replies_of, shared_beginning
from finetune_dataflow.engine.models import load_model
from finetune_dataflow.engine.settings import GenerationSettings
from finetune_dataflow.errors import UserError
from tests.architectures import ARCHITECTURES, write_architecture
from tests.tiny_model import chatml_ids

PROMPTS = [chatml_ids(question) for question in ("Hi", "A much longer question than that?", "Why", "Tell me", "x")]
TIE = 1e-4  # two best logits this near may change places by rounding
DRAW = np.random.default_rng(7)
OWN = [DRAW.integers(0, 256, length).tolist() for length in (3, 40, 1, 18, 7)]
BEGINNING = DRAW.integers(0, 256, 20).tolist()
SHARING = [BEGINNING + own for own in OWN]


class Stops:
    """An encoder, as far as generation looks at one."""

    def __init__(self, *ids: int) -> None:
        self.stop_ids = frozenset(ids)


def answered(
    model: nn.Module, prompts: Sequence[Sequence[int]], stops: Stops, most: int, batch_size: int = 32
) -> list[tuple[tuple[int, ...], bool]]:
    replies = replies_of(model, prompts, stops, GenerationSettings(most, batch_size), "replies")  # type: ignore[arg-type]
    return [(reply.token_ids, reply.ended) for reply in replies]


def plain(model: nn.Module, prompt: Sequence[int], stops: Stops, most: int) -> tuple[tuple[int, ...], bool, list[float]]:
    """One by one, without a cache: tokens, whether a stop came, and how far the best logit was ahead at each step."""
    ids, gaps = list(prompt), []
    for _ in range(most):
        logits = np.array(model(mx.array([ids]))[0, -1], np.float64)
        second, first = np.sort(logits)[-2:]
        gaps.append(float(first - second))
        if int(logits.argmax()) in stops.stop_ids:
            return tuple(ids[len(prompt) :]), True, gaps
        ids.append(int(logits.argmax()))
    return tuple(ids[len(prompt) :]), False, gaps


def ties(model: nn.Module, prompts: Sequence[Sequence[int]], stops: Stops, most: int, batch_size: int = 32) -> int:
    """The replies that differ from plain decoding, all from a tie on; an assertion fails for any other difference."""
    count = 0
    for prompt, (tokens, ended) in zip(prompts, answered(model, prompts, stops, most, batch_size), strict=True):
        expected, stopped, gaps = plain(model, prompt, stops, most)
        if (tokens, ended) == (expected, stopped):
            continue
        pairs = enumerate(zip(tokens, expected, strict=False))
        place = next((place for place, (mine, other) in pairs if mine != other), min(len(tokens), len(expected)))
        assert gaps[place] < TIE, f"prompt of {len(prompt)}: {tokens} instead of {expected}, no tie at token {place}"
        count += 1
    return count


@contextmanager
def seen_shapes(model: nn.Module) -> Iterator[list[tuple[int, ...]]]:
    """The shapes [rows, width] of all that the model is given within the block."""
    shapes, original = [], type(model)

    def call(self: nn.Module, inputs: mx.array, *args: Any, **kwargs: Any) -> Any:
        shapes.append(tuple(inputs.shape))
        return original.__call__(self, inputs, *args, **kwargs)

    model.__class__ = type(original.__name__, (original,), {"__call__": call})
    try:
        yield shapes
    finally:
        model.__class__ = original


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """A random llama whose replies are not one token again and again."""
    return load_model(write_architecture(tmp_path_factory.mktemp("models") / "llama", "llama_untied"))


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batched_replies_equal_one_by_one_greedy_decoding(tiny_model: Path, batch_size: int) -> None:
    encoder = load_encoder(tiny_model)
    replies = greedy_replies(tiny_model, None, PROMPTS, encoder, GenerationSettings(6, batch_size))
    loaded, stops = load_model(tiny_model), Stops(*encoder.stop_ids)
    expected = [plain(loaded, prompt, stops, 6)[0] for prompt in PROMPTS]
    assert [reply.token_ids for reply in replies] == expected
    assert len(set(expected)) > 1


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_replies_of_every_architecture_equal_decoding_without_a_cache(name: str, tmp_path: Path) -> None:
    loaded, stops = load_model(write_architecture(tmp_path / name, name)), Stops(*range(0, 30))
    # Of prompts with a shared beginning, and of such that have none; two at a time, so that places are filled again.
    assert ties(loaded, SHARING, stops, 5) + ties(loaded, OWN, stops, 5, batch_size=2) <= 1


@pytest.mark.parametrize("batch_size", [1, 2, 5, 32])
@pytest.mark.parametrize("growth", [2, 64])
def test_many_prompts_of_different_lengths_share_places_one_after_another(
    model: nn.Module, batch_size: int, growth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "GROWTH", growth)
    draw = np.random.default_rng(batch_size)
    prompts = [draw.integers(0, 256, int(length)).tolist() for length in draw.integers(1, 50, 14)]
    stops = Stops(*range(0, 256, 5))
    lengths = {len(tokens) for tokens, _ in answered(model, prompts, stops, 12, batch_size)}
    assert len(lengths) > 3  # rows end at different times
    assert ties(model, prompts, stops, 12, batch_size) == 0


@pytest.mark.parametrize("places", [1, 8, 50])
def test_prompts_longer_than_one_pass_are_read_in_pieces(model: nn.Module, places: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "PREFILL_PLACES", places)
    with seen_shapes(model) as shapes:
        assert len(answered(model, SHARING, Stops(), 4)) == 5
    assert max(rows * width for rows, width in shapes if width > 1) <= places if places > 1 else max(shapes)[1] == 1
    assert ties(model, SHARING, Stops(), 4) + ties(model, OWN, Stops(), 4) == 0


def test_what_all_prompts_begin_with_is_computed_once(model: nn.Module) -> None:
    prompts = [[*BEGINNING, token, *OWN[3][:4]] for token in (1, 2, 3)]
    with seen_shapes(model) as shapes:
        answered(model, prompts, Stops(), 3)
    # The beginning; each prompt's own tokens but the last; the three steps.
    assert shapes == [(1, 20), (3, 4), (3, 1), (3, 1), (3, 1)]


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ([], 0),
        ([BEGINNING], 0),
        ([[*BEGINNING, 1], [*BEGINNING, 2]], 20),
        ([[*BEGINNING, 1], [*BEGINNING, 1]], 20),
        ([BEGINNING, [*BEGINNING, 2]], 19),
        ([[*BEGINNING[:16], 300], [*BEGINNING[:16], 301, 302], BEGINNING], 16),
        ([[*BEGINNING[:15], 300], [*BEGINNING[:15], 301]], 0),
        ([BEGINNING, BEGINNING, [7]], 0),
    ],
)
def test_the_shared_beginning_leaves_every_prompt_a_token(prompts: list[list[int]], expected: int) -> None:
    assert shared_beginning(prompts) == expected


def test_a_reply_that_hits_the_limit_says_that_it_did_not_end(tiny_model: Path) -> None:
    encoder = load_encoder(tiny_model)
    replies = greedy_replies(tiny_model, None, PROMPTS, encoder, GenerationSettings(1, 4))
    assert all(len(reply.token_ids) <= 1 for reply in replies)
    assert [reply.ended for reply in replies] == [len(reply.token_ids) == 0 for reply in replies]


@pytest.mark.parametrize("most", [1, 4])
def test_without_stop_tokens_every_reply_has_max_tokens_and_no_step_is_made_beyond_them(model: nn.Module, most: int) -> None:
    with seen_shapes(model) as shapes:
        replies = answered(model, OWN, Stops(), most)
    assert [(len(tokens), ended) for tokens, ended in replies] == [(most, False)] * 5
    assert [shape for shape in shapes if shape[1] == 1] == [(5, 1)] * most


def test_a_stop_token_at_once_gives_an_empty_reply(model: nn.Module) -> None:
    assert answered(model, OWN, Stops(*range(320)), 9) == [((), True)] * 5


def test_a_stop_token_as_the_last_token_allowed_ends_the_reply(model: nn.Module) -> None:
    tokens = plain(model, OWN[0], Stops(), 5)[0]
    last = next(place for place in range(1, 5) if tokens[place] not in tokens[:place])
    assert answered(model, [OWN[0]], Stops(tokens[last]), last + 1) == [(tokens[:last], True)]


def test_ended_rows_leave_the_batch(model: nn.Module) -> None:
    stops = Stops(*range(0, 256, 5))
    expected = sorted(len(plain(model, prompt, stops, 12)[0]) for prompt in OWN)
    with seen_shapes(model) as shapes:
        answered(model, OWN, stops, 12)
    rows = [shape[0] for shape in shapes if shape[1] == 1]
    assert rows == sorted(rows, reverse=True)
    assert expected[0] < expected[-1] < 13 and rows[-1] < rows[0] == 5


def test_a_batch_is_never_larger_than_its_size_and_one_row_ending_makes_room_for_the_next(model: nn.Module) -> None:
    stops = Stops(*range(0, 256, 5))
    with seen_shapes(model) as shapes:
        replies = answered(model, OWN, stops, 12, batch_size=2)
    assert max(rows for rows, _ in shapes) == 2
    # Groups of two that wait for each other would take as many steps as the longest reply of each group.
    steps = sum(width == 1 for _, width in shapes)
    assert steps < 3 * (max(len(tokens) for tokens, _ in replies) + 1)


def test_no_prompts_have_no_replies(model: nn.Module, tmp_path: Path) -> None:
    assert answered(model, [], Stops(), 5) == []
    assert answered(load_model(write_architecture(tmp_path / "mamba2", "mamba2")), [], Stops(), 5) == []


@pytest.mark.parametrize("prompt", [*OWN, *SHARING])
def test_one_prompt_alone_gets_its_reply(model: nn.Module, prompt: list[int]) -> None:
    assert ties(model, [prompt], Stops(3), 6) == 0


@pytest.mark.parametrize("prompt", [OWN[2], OWN[0], SHARING[1]])
def test_identical_prompts_get_identical_replies(model: nn.Module, prompt: list[int]) -> None:
    replies = answered(model, [prompt] * 6, Stops(), 6, batch_size=4)
    assert replies == [replies[0]] * 6
    assert ties(model, [prompt] * 6, Stops(), 6, batch_size=4) == 0


def test_prompts_may_be_numpy_arrays_and_replies_come_in_their_order(model: nn.Module) -> None:
    arrays = [np.array(prompt, np.int32) for prompt in OWN]
    replies = replies_of(model, arrays, Stops(), GenerationSettings(3, 2), "replies")  # type: ignore[arg-type]
    assert replies == [Reply(plain(model, prompt, Stops(), 3)[0], False) for prompt in OWN]
    assert all(type(token) is int for reply in replies for token in reply.token_ids)


def test_a_prompt_without_tokens_is_named(model: nn.Module) -> None:
    with pytest.raises(UserError, match=r"Prompt 2 of 3 has no tokens\. Expected at least one"):
        answered(model, [[1], [], [2]], Stops(), 3)


@pytest.mark.parametrize(("name", "cache"), [("mamba2", "ArraysCache"), ("mistral", None), ("llama", None)])
def test_the_log_says_when_another_generator_serves(
    name: str, cache: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = load_model(write_architecture(tmp_path / name, name))
    with caplog.at_level(logging.INFO):
        answered(loaded, OWN, Stops(), 2)
    told = [record.getMessage() for record in caplog.records if "batch generator" in record.getMessage()]
    assert told == (
        [f"replies: this model's layers keep a {cache}; its replies come from mlx-lm's batch generator."] * bool(cache)
    )
