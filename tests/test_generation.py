import hashlib
import json
import logging
import math
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map
from mlx_lm.sample_utils import make_sampler

from finetune_dataflow.engine import generation
from finetune_dataflow.engine.chat import load_encoder
from finetune_dataflow.engine.generation import Reply, replies_of, shared_beginning, store_key
from finetune_dataflow.engine.models import load_model
from finetune_dataflow.engine.randomness import seeded
from finetune_dataflow.engine.reply_store import ReplyStore
from finetune_dataflow.engine.settings import GenerationSettings
from finetune_dataflow.engine.streaming import LOWEST_TEMPERATURE
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
    replies = generation.replies(tiny_model, None, PROMPTS, encoder, GenerationSettings(6, batch_size))
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
    replies = generation.replies(tiny_model, None, PROMPTS, encoder, GenerationSettings(1, 4))
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


def test_identical_prompts_are_answered_once_in_greedy_decoding(model: nn.Module) -> None:
    prompts = [OWN[0], OWN[1], OWN[0], OWN[0], OWN[1]]
    with seen_shapes(model) as shapes:
        replies = answered(model, prompts, Stops(), 2)
    assert [shape for shape in shapes if shape[1] == 1] == [(2, 1)] * 2
    assert [tokens for tokens, _ in replies] == [plain(model, prompt, Stops(), 2)[0] for prompt in prompts]


class Killed(ReplyStore):
    """A store whose process ends after so many replies."""

    after = 2

    def add(self, prompt: Sequence[int], reply: Reply, occurrence: int = 0) -> None:
        super().add(prompt, reply, occurrence)
        if len(self) == self.after:
            raise KeyboardInterrupt


@pytest.fixture
def loads(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, Path | None]]:
    """The calls for a model to be loaded, all of which are given the fixture's."""
    calls: list[tuple[Path, Path | None]] = []

    def load(base: Path, adapter: Path | None) -> nn.Module:
        calls.append((base, adapter))
        return model

    monkeypatch.setattr(generation, "load_model", load)
    return calls


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Of each progress bar: its total, what was done when it began, then each advance."""
    made: list[list[int]] = []

    class Bar:
        def __init__(self, total: int, description: str, done: int = 0) -> None:
            made.append([total, done])

        def advance(self, steps: int = 1) -> None:
            made[-1].append(steps)

        def close(self) -> None:
            pass

    monkeypatch.setattr(generation, "Bar", Bar)
    return made


BASE, ADAPTER, STOPS = Path("base"), Path("adapter"), Stops(*range(0, 256, 5))
GREEDY = GenerationSettings(6, 2)
WARM = GenerationSettings(12, 2, temperature=0.9, top_p=0.95, top_k=100, min_p=0.01, random_state=11)
TWICE = [*OWN, OWN[0], OWN[3], OWN[0]]


def kept(
    directory: Path, prompts: Sequence[Sequence[int]], settings: GenerationSettings, kind: type[ReplyStore] = ReplyStore
) -> list[Reply]:
    """The replies with a store in the directory."""
    with kind.opened(directory, store_key("b", "", STOPS, settings)) as store:  # type: ignore[arg-type]
        return generation.replies(BASE, None, prompts, STOPS, settings, store)  # type: ignore[arg-type]


def lines(directory: Path) -> list[dict[str, object]]:
    return [json.loads(line) for path in sorted(directory.iterdir()) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("settings", [GREEDY, WARM])
def test_replies_with_a_store_are_those_without_one_and_the_second_time_nothing_is_loaded(
    settings: GenerationSettings, model: nn.Module, loads: list[object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = replies_of(model, TWICE, STOPS, settings, "replies")  # type: ignore[arg-type]
    assert kept(tmp_path, TWICE, settings) == expected and len(loads) == 1
    with caplog.at_level(logging.INFO), seen_shapes(model) as shapes:
        assert kept(tmp_path, TWICE, settings) == expected
    assert (len(loads), shapes) == (1, [])
    told = [record.getMessage() for record in caplog.records if record.name == generation.__name__]
    assert told == ["base replies: 8 of 8 replies taken from an earlier run."]


def test_every_reply_is_a_line_and_identical_prompts_share_theirs(model: nn.Module, loads: list[object], tmp_path: Path) -> None:
    settings = GenerationSettings(1, 8)
    kept(tmp_path, [[5, 6], [7], [5, 6]], settings)
    hashes = [hashlib.sha256(struct.pack(f"<{len(prompt)}q", *prompt)).hexdigest() for prompt in ([5, 6], [7])]
    expected = []
    for prompt, digest in zip(([5, 6], [7]), hashes, strict=True):
        tokens, ended, _ = plain(model, prompt, STOPS, 1)
        expected.append({"prompt": digest, "token_ids": list(tokens), "ended": ended})
    assert sorted(lines(tmp_path), key=str) == sorted(expected, key=str)


@pytest.mark.parametrize("settings", [GREEDY, WARM])
@pytest.mark.parametrize("after", [1, 2, 4])
def test_a_killed_evaluation_goes_on_where_it_was(
    settings: GenerationSettings,
    after: int,
    model: nn.Module,
    loads: list[object],
    bars: list[list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = replies_of(model, TWICE, STOPS, settings, "replies")  # type: ignore[arg-type]
    monkeypatch.setattr(Killed, "after", after)
    with pytest.raises(KeyboardInterrupt):
        kept(tmp_path, TWICE, settings, Killed)
    before = lines(tmp_path)
    assert len(before) == after
    assert kept(tmp_path, TWICE, settings) == expected
    assert lines(tmp_path)[:after] == before
    assert len(lines(tmp_path)) == (5 if settings.greedy else 8)  # a line each, and no reply twice
    total, done, *advances = bars[-1]
    assert total == 8 and done >= after and done + sum(advances) == 8 and len(advances) == len(lines(tmp_path)) - after


def test_only_missing_replies_are_generated(model: nn.Module, loads: list[object], bars: list[list[int]], tmp_path: Path) -> None:
    settings = GenerationSettings(1, 8)
    kept(tmp_path, [OWN[0], OWN[1]], settings)
    with seen_shapes(model) as shapes:
        kept(tmp_path, [OWN[0], OWN[2], OWN[1], OWN[4], OWN[2]], settings)
    assert [rows for rows, width in shapes if width == 1] == [2]
    assert len(loads) == 2 and sorted(bars[-1][2:]) == [1, 2] and bars[-1][:2] == [5, 2]


def test_another_batch_size_and_for_greedy_replies_another_seed_or_filter_ask_for_the_same(
    loads: list[object], tmp_path: Path
) -> None:
    expected = kept(tmp_path, OWN, GREEDY)
    for other in (GenerationSettings(6, 5), GenerationSettings(6, 2, random_state=3, top_p=0.5, top_k=4, min_p=0.1)):
        assert kept(tmp_path, OWN, other) == expected
    assert len(loads) == 1 and len(list(tmp_path.iterdir())) == 1


def test_what_changes_replies_changes_the_key() -> None:
    def key(base: str = "b", adapter: str = "", stops: Stops = STOPS, most: int = 6, **settings: Any) -> str:
        return json.dumps(store_key(base, adapter, stops, GenerationSettings(most, 1, **settings)))  # type: ignore[arg-type]

    keys = [key(), key(base="c"), key(adapter="a"), key(stops=Stops(1)), key(most=7)]
    warm: dict[str, Any] = {"temperature": 0.5}
    keys += [key(**warm, **each) for each in ({}, {"top_p": 0.5}, {"top_k": 5}, {"min_p": 0.1}, {"random_state": 1})]
    assert len(set(keys)) == 10
    # The same numbers, whether they were written with a point or without.
    assert key(temperature=1, top_p=1, min_p=0) == key(temperature=1.0, top_p=1.0, min_p=0.0)


def test_a_tuned_model_is_loaded_with_its_adapter(loads: list[object]) -> None:
    generation.replies(BASE, ADAPTER, [[1]], STOPS, GenerationSettings(1, 1))  # type: ignore[arg-type]
    assert loads == [(BASE, ADAPTER)]


def test_a_prompt_without_tokens_is_found_before_anything_is_loaded(loads: list[object]) -> None:
    with pytest.raises(UserError, match="Prompt 2 of 2 has no tokens"):
        generation.replies(BASE, None, [[1], []], STOPS, GREEDY)  # type: ignore[arg-type]
    assert loads == []


def drawn(model: nn.Module, prompts: Sequence[Sequence[int]], **changes: Any) -> list[Reply]:
    values = {"max_tokens": 12, "generation_batch_size": 4, "temperature": 0.9, "random_state": 11, **changes}
    return replies_of(model, prompts, STOPS, GenerationSettings(**values), "replies")  # type: ignore[arg-type]


def plainly_drawn(model: nn.Module, prompt: Sequence[int], occurrence: int, most: int, temperature: float, seed: int) -> Reply:
    """One by one, without a cache, each token with the random key that is documented."""
    digest = hashlib.sha256(struct.pack(f"<{len(prompt)}q", *prompt)).hexdigest()
    tokens: list[int] = []
    for number in range(most):
        logits = model(mx.array([[*prompt, *tokens]]))[0, -1]
        words = struct.unpack("<2I", hashlib.sha256(f"{seed}:{digest}:{occurrence}:{number}".encode()).digest()[:8])
        token = int(np.array(mx.random.categorical(logits / temperature, key=mx.array(words, mx.uint32))))
        if token in STOPS.stop_ids:
            return Reply(tuple(tokens), True)
        tokens.append(token)
    return Reply(tuple(tokens), False)


@pytest.mark.parametrize("name", ["llama_untied", "mamba2"])
def test_a_drawn_reply_is_that_of_a_generator_of_its_own(name: str, tmp_path: Path) -> None:
    loaded = load_model(write_architecture(tmp_path / name, name))
    prompts = [OWN[0], OWN[3], OWN[0]]
    expected = [plainly_drawn(loaded, OWN[index], occurrence, 12, 0.9, 11) for index, occurrence in ((0, 0), (3, 0), (0, 1))]
    assert drawn(loaded, prompts, generation_batch_size=2) == expected
    assert len({reply.token_ids for reply in expected}) == 3


@pytest.mark.parametrize("name", ["llama_untied", "gemma3_text", "mamba2", "qwen3_next"])
def test_drawn_replies_depend_neither_on_the_batch_nor_on_the_order_nor_on_other_prompts(name: str, tmp_path: Path) -> None:
    loaded = load_model(write_architecture(tmp_path / name, name))
    prompts = [*OWN, *SHARING]
    filters = {"top_p": 0.95, "top_k": 60, "min_p": 0.01}
    replies = drawn(loaded, prompts, **filters)
    for size in (1, 3, 32):
        assert drawn(loaded, prompts, generation_batch_size=size, **filters) == replies
    assert drawn(loaded, prompts[::-1], **filters) == replies[::-1]
    assert [drawn(loaded, [prompt], **filters)[0] for prompt in prompts] == replies
    assert len({reply.token_ids for reply in replies}) > 5 and len({len(reply.token_ids) for reply in replies}) > 2


def test_identical_prompts_get_different_drawn_replies_and_another_seed_gives_others(model: nn.Module) -> None:
    replies = drawn(model, [OWN[0]] * 4)
    assert len({reply.token_ids for reply in replies}) == 4
    assert drawn(model, [OWN[0]] * 2) == replies[:2]
    assert drawn(model, [OWN[0]], random_state=12)[0] not in replies


def test_a_longer_limit_only_continues_a_drawn_reply(model: nn.Module) -> None:
    short, long = drawn(model, OWN, max_tokens=3), drawn(model, OWN, max_tokens=20)
    assert [reply.token_ids for reply in short] == [reply.token_ids[:3] for reply in long]


def test_one_kept_token_and_a_temperature_of_nearly_nothing_are_greedy(model: nn.Module) -> None:
    expected = [Reply(*plain(model, prompt, STOPS, 12)[:2]) for prompt in OWN]
    for filters in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": LOWEST_TEMPERATURE}):
        assert drawn(model, OWN, **filters) == expected


@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"temperature": 0.4},
        {"top_p": 0.7},
        {"top_k": 4},
        {"min_p": 0.3},
        {"temperature": 1.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1},
        {"temperature": 0.5, "top_p": 0.6, "top_k": 3},
    ],
)
def test_tokens_are_drawn_from_the_distribution_of_mlx_lms_sampler(filters: dict[str, Any]) -> None:
    count, values = 8_000, {"temperature": 1.0, **filters}
    logits = mx.array([[1.5, 0.0, 2.0, -1.0, 1.0, 0.5, -3.0, 1.9, 0.2, -0.5]])
    settings = GenerationSettings(1, 1, **values)
    sampler = generation._Sampler(settings, [generation._Request([1], "digest", 0, [0])])
    ours = np.array(sampler.draw(mx.repeat(logits, count, axis=0), ((0, number) for number in range(count))))
    theirs = make_sampler(settings.temperature, settings.top_p, settings.min_p, top_k=settings.top_k)
    scores = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    with seeded(5):
        other = np.array(theirs(mx.repeat(scores, count, axis=0)))
    shares = [np.bincount(each, minlength=10) / count for each in (ours, other)]
    assert set(ours) == set(other)
    # Four standard deviations of the difference of two shares.
    assert np.abs(shares[0] - shares[1]).max() < 4 * math.sqrt(2 * 0.25 / count)


def test_drawing_leaves_the_random_state_of_mlx_alone(model: nn.Module) -> None:
    before = np.array(mx.random.state[0]).tolist()  # type: ignore[index]  # a list, whatever its stub says
    drawn(model, OWN, top_p=0.9, top_k=50, min_p=0.01)
    assert np.array(mx.random.state[0]).tolist() == before  # type: ignore[index]


@pytest.mark.parametrize("name", ["llama_untied", "mamba2"])
def test_logits_that_are_not_finite_and_a_top_k_of_the_whole_vocabulary_are_refused(name: str, tmp_path: Path) -> None:
    loaded = load_model(write_architecture(tmp_path / name, name))
    with pytest.raises(UserError, match=r"top_k=259 is out of range\. Expected a number below the 259 tokens that this model"):
        drawn(loaded, OWN, top_k=259)
    assert len(drawn(loaded, OWN, top_k=258)) == 5
    loaded.update(tree_map(lambda weight: mx.full(weight.shape, math.nan, weight.dtype), loaded.parameters()))
    with pytest.raises(UserError, match="The model's logits are not finite"):
        drawn(loaded, OWN)


def test_every_setting_out_of_range_is_named() -> None:
    with pytest.raises(UserError) as caught:
        GenerationSettings(0, 0, temperature=-1.0, top_p=1.5, top_k=-1, min_p=math.nan, random_state=2**32)
    assert str(caught.value).splitlines() == [
        "max_tokens=0 is out of range. Expected a whole number, 1 or more.",
        "generation_batch_size=0 is out of range. Expected a whole number, 1 or more.",
        "temperature=-1.0 is out of range. Expected 0 for the most probable token, or a number from 0.001.",
        "top_p=1.5 is out of range. Expected a share from 0 to 1.",
        "top_k=-1 is out of range. Expected a number of tokens, or 0 for all.",
        "min_p=nan is out of range. Expected a share from 0 to 1.",
        "random_state=4294967296 is out of range. Expected a whole number from 0 to 4294967295.",
    ]
    for temperature in (math.nan, math.inf, LOWEST_TEMPERATURE / 2):
        with pytest.raises(UserError, match="temperature="):
            GenerationSettings(1, 1, temperature=temperature)
    assert GenerationSettings(1, 1, temperature=LOWEST_TEMPERATURE).LOWEST_TEMPERATURE == LOWEST_TEMPERATURE
