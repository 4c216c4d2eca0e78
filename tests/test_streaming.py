from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_map_with_path
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_sampler
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from finetune_dataflow.engine.chat import ChatEncoder, load_encoder
from finetune_dataflow.engine.generation import replies_of
from finetune_dataflow.engine.models import load_model
from finetune_dataflow.engine.settings import GenerationSettings
from finetune_dataflow.engine.streaming import SamplingSettings, StreamedToken, stream
from finetune_dataflow.errors import UserError
from tests.tiny_model import CHATML, IM_END, byte_tokenizer, chatml_ids

PROMPTS = [chatml_ids(question) for question in ("Hi", "A much longer question than that?", "Why", "Tell me", "x")]
PROMPT = PROMPTS[0]
WARM = SamplingSettings(max_tokens=12, temperature=0.9, top_p=0.95, min_p=0.01, top_k=100, random_state=11)


class Scripted(nn.Module):
    """A model that says the given tokens after a prompt of one token, then the end of the turn."""

    def __init__(self, script: Sequence[int], size: int = 259, stop: int = IM_END) -> None:
        super().__init__()
        self.layers: list[nn.Module] = []
        self.size, self.rest = size, [*script, stop]

    def __call__(self, inputs: mx.array, cache: object = None) -> mx.array:
        said = self.rest.pop(0) if len(self.rest) > 1 else self.rest[0]
        return 50.0 * (mx.arange(self.size) == said).astype(mx.float32)[None, None]


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> nn.Module:
    """The tiny model with its blocks turned up: as it is, it says one thing over and over."""
    lively = load_model(tiny_model)
    lively.update(tree_map_with_path(lambda name, each: each * (6 if "proj" in name else 1), lively.parameters()))
    return lively


@pytest.fixture(scope="module")
def encoder(tiny_model: Path) -> ChatEncoder:
    return load_encoder(tiny_model)


def ids(tokens: Sequence[StreamedToken]) -> list[int]:
    return [each.token_id for each in tokens]


def plain_logits(model: nn.Module, tokens: Sequence[int]) -> np.ndarray:
    """The logits after the last of the tokens, in one forward pass without a cache."""
    return np.array(model(mx.array([list(tokens)]))[0, -1], np.float64)


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max())
    return shifted / shifted.sum()


def penalised_by_hand(model: nn.Module, prompt: Sequence[int], penalty: float, window: int, most: int) -> list[int]:
    """Greedy decoding without a cache, the logits of the last `window` tokens divided, or multiplied where negative."""
    tokens = list(prompt)
    for _ in range(most):
        logits = plain_logits(model, tokens)
        for seen in set(tokens[-window:]):
            logits[seen] = logits[seen] * penalty if logits[seen] < 0 else logits[seen] / penalty
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


def test_a_greedy_stream_is_the_reply_of_the_evaluation(model: nn.Module, encoder: ChatEncoder) -> None:
    replies = replies_of(model, PROMPTS, encoder, GenerationSettings(12, 3), "replies")
    for prompt, reply in zip(PROMPTS, replies, strict=True):
        streamed = list(stream(model, encoder, prompt, SamplingSettings(max_tokens=12)))
        assert tuple(ids(streamed)) == reply.token_ids
        assert "".join(each.text for each in streamed) == encoder.decode(reply.token_ids)
    assert len({reply.token_ids for reply in replies}) == 5 and all(len(set(reply.token_ids)) > 2 for reply in replies)


def test_the_stop_token_ends_the_stream_and_is_not_part_of_it(encoder: ChatEncoder) -> None:
    streamed = list(stream(Scripted([*b"Yes", IM_END, *b"more"]), encoder, [1], SamplingSettings()))
    assert ids(streamed) == [*b"Yes"] and [each.text for each in streamed] == ["Y", "e", "s"]
    assert list(stream(Scripted([]), encoder, [1], SamplingSettings())) == []


def test_the_stream_ends_after_max_tokens(encoder: ChatEncoder) -> None:
    streamed = list(stream(Scripted([*b"Yes"]), encoder, [1], SamplingSettings(max_tokens=2)))
    assert ids(streamed) == [*b"Ye"]


def test_a_token_is_given_out_before_the_model_ends(encoder: ChatEncoder) -> None:
    model = Scripted([*b"Yes, and so on"])
    first = next(stream(model, encoder, [1], SamplingSettings()))
    assert first.text == "Y" and len(model.rest) == 13  # the loop is one token ahead, of 14 and the stop token


@pytest.mark.parametrize(
    "chosen", [SamplingSettings(max_tokens=12), SamplingSettings(max_tokens=12, repetition_penalty=3.0), WARM]
)
def test_probabilities_are_the_softmax_of_a_plain_forward_pass(
    model: nn.Module, encoder: ChatEncoder, chosen: SamplingSettings
) -> None:
    """The model's own, whatever penalty, temperature and filters made of them."""
    streamed = list(stream(model, encoder, PROMPT, chosen))
    answer = ids(streamed)
    expected = [softmax(plain_logits(model, [*PROMPT, *answer[:place]]))[token] for place, token in enumerate(answer)]
    np.testing.assert_allclose([each.probability for each in streamed], expected, rtol=1e-5)
    assert len(streamed) == 12 and all(0 <= each.probability <= 1 for each in streamed)


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others(model: nn.Module, encoder: ChatEncoder) -> None:
    answers = []
    for seed in (7, 7, 8):
        chosen = SamplingSettings(max_tokens=16, temperature=1.0, random_state=seed)
        answers.append(ids(list(stream(model, encoder, PROMPT, chosen))))
    assert answers[0] == answers[1] != answers[2]


def test_a_seed_gives_the_tokens_that_mlx_lm_gives_for_it(model: nn.Module, encoder: ChatEncoder) -> None:
    streamed = ids(list(stream(model, encoder, PROMPT, WARM)))
    mx.random.seed(11)
    sampler = make_sampler(temp=0.9, top_p=0.95, min_p=0.01, top_k=100)
    expected = [token for token, _ in generate_step(mx.array(PROMPT), model, max_tokens=12, sampler=sampler)]
    assert IM_END not in expected and streamed == expected


def test_what_is_drawn_between_two_tokens_neither_changes_the_answer_nor_is_changed(
    model: nn.Module, encoder: ChatEncoder
) -> None:
    undisturbed = ids(list(stream(model, encoder, PROMPT, WARM)))
    mx.random.seed(3)
    expected = [mx.random.uniform().item() for _ in range(len(undisturbed))]
    mx.random.seed(3)
    answer, drawn = [], []
    for each in stream(model, encoder, PROMPT, WARM):
        answer.append(each.token_id)
        drawn.append(mx.random.uniform().item())
    assert answer == undisturbed and drawn == expected


def test_an_abandoned_stream_leaves_the_random_state_and_the_default_stream(model: nn.Module, encoder: ChatEncoder) -> None:
    mx.random.seed(3)
    expected = mx.random.uniform().item()
    mx.random.seed(3)
    before = mx.default_stream(mx.default_device())
    tokens = stream(model, encoder, PROMPT, WARM)
    next(tokens)
    assert mx.default_stream(mx.default_device()) == before
    del tokens
    assert mx.random.uniform().item() == expected and mx.default_stream(mx.default_device()) == before


@pytest.mark.parametrize("window", [4, 5, 20])
def test_the_repetition_penalty_is_applied_over_the_context_size(model: nn.Module, encoder: ChatEncoder, window: int) -> None:
    chosen = SamplingSettings(max_tokens=12, repetition_penalty=1.7, repetition_context_size=window)
    streamed = ids(list(stream(model, encoder, PROMPTS[1], chosen)))
    assert streamed == penalised_by_hand(model, PROMPTS[1], 1.7, window, 12)


def test_the_repetition_penalty_and_its_context_size_make_a_difference(model: nn.Module, encoder: ChatEncoder) -> None:
    answers = []
    for penalty, window in ((None, 20), (1.0, 20), (1.7, 4), (1.7, 5), (1.7, 20)):
        chosen = SamplingSettings(12, repetition_penalty=penalty, repetition_context_size=window)
        answers.append(tuple(ids(list(stream(model, encoder, PROMPTS[1], chosen)))))
    assert answers[0] == answers[1] == answers[2] and len(set(answers)) == 3
    assert answers[0].index(175) == 2 and answers[0][7] == 175  # five tokens back: a context of four does not see it


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-6}, {"temperature": 0.001}])
def test_a_filter_that_keeps_one_token_is_greedy(model: nn.Module, encoder: ChatEncoder, narrow: dict[str, float]) -> None:
    greedy = ids(list(stream(model, encoder, PROMPT, SamplingSettings(max_tokens=8))))
    values: dict[str, float] = {"max_tokens": 8, "temperature": 2.0, **narrow}
    assert ids(list(stream(model, encoder, PROMPT, SamplingSettings(**values)))) == greedy  # type: ignore[arg-type]


@pytest.mark.parametrize(("off", "most"), [({}, 259), ({"top_k": 3}, 3), ({"min_p": 1.0, "min_tokens_to_keep": 5}, 5)])
def test_filters_keep_the_most_probable_tokens(model: nn.Module, encoder: ChatEncoder, off: dict[str, float], most: int) -> None:
    ranks = []
    for seed in range(4):
        values: dict[str, float] = {"max_tokens": 10, "temperature": 5.0, "random_state": seed, **off}
        answer = ids(list(stream(model, encoder, PROMPT, SamplingSettings(**values))))  # type: ignore[arg-type]
        for place, token in enumerate(answer):
            logits = plain_logits(model, [*PROMPT, *answer[:place]])
            ranks.append(int((logits > logits[token]).sum()))
    assert 0 < max(ranks) < most
    assert max(ranks) > 5 or most <= 5


def test_a_character_of_several_bytes_comes_with_its_last(encoder: ChatEncoder) -> None:
    streamed = list(stream(Scripted([*"aé🙂z".encode()]), encoder, [1], SamplingSettings()))
    assert [each.text for each in streamed] == ["a", "", "é", "", "", "", "🙂", "z"]
    assert [each.probability for each in streamed] == pytest.approx([1.0] * 8)


def test_half_a_character_at_the_end_is_given_out_with_the_last_token(encoder: ChatEncoder) -> None:
    for most in (3, 100):  # ended by the limit and by the stop token
        streamed = list(stream(Scripted([*"a🙂".encode()[:3]]), encoder, [1], SamplingSettings(max_tokens=most)))
        assert [each.text for each in streamed] == ["a", "", "\ufffd"] and ids(streamed) == [97, 0xF0, 0x9F]


def test_control_tokens_that_do_not_end_the_answer_are_shown(encoder: ChatEncoder) -> None:
    streamed = list(stream(Scripted([257, *b"a"]), encoder, [1], SamplingSettings()))
    assert [each.text for each in streamed] == ["<|im_start|>", "a"]


def with_byte_fallback() -> Tokenizer:
    """Llama 2's kind: words with ▁ for the space before them, and 256 tokens for bytes from id 10 on."""
    words = ["<unk>", "<|im_end|>", "▁", "a", "n", "t", "'", "é", "▁do", "."]
    vocabulary = {piece: number for number, piece in enumerate([*words, *(f"<0x{byte:02X}>" for byte in range(256))])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def with_a_space_before_words() -> Tokenizer:
    """T5's kind: whole pieces, ▁ for the space before them."""
    pieces = ["<unk>", "<|im_end|>", "▁", "a", "n", "t", "'", "s", "▁do", ".", "▁n", "▁'", "ve", ",", "▁.", "▁,", "\n"]
    tokenizer = Tokenizer(models.Unigram([(piece, -float(number)) for number, piece in enumerate(pieces)], 0, False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def encoder_of(tokenizer: Tokenizer, clean: bool = False) -> ChatEncoder:
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    return ChatEncoder(
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token="<|im_end|>", clean_up_tokenization_spaces=clean, chat_template=CHATML
        )
    )


TOKENIZERS: dict[str, Callable[[], ChatEncoder]] = {
    "bytes": lambda: encoder_of(byte_tokenizer()),
    "byte fallback": lambda: encoder_of(with_byte_fallback()),
    "space before words": lambda: encoder_of(with_a_space_before_words()),
    "spaces cleaned up": lambda: encoder_of(with_a_space_before_words(), clean=True),
}
ENCODERS = {name: make() for name, make in TOKENIZERS.items()}
NO_STOP = 300  # outside of every script


def texts_of(encoder: ChatEncoder, script: Sequence[int], most: int = 1000) -> list[str]:
    (stop,) = encoder.stop_ids
    return [each.text for each in stream(Scripted(script, NO_STOP, stop), encoder, [1], SamplingSettings(max_tokens=most))]


@pytest.mark.parametrize("name", ENCODERS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_texts_joined_are_the_answer_decoded_as_a_whole(name: str, data: st.DataObject) -> None:
    """Any tokens, sense or not; few ids, so that what can go wrong between neighbours comes up often."""
    choices = {
        "bytes": [*b"a \n", *"é🙂".encode(), 0xFF],
        "byte fallback": [2, 3, 7, 8, *(10 + byte for byte in (*b"a\n", *"é🙂".encode(), 0xFF))],
    }
    script = data.draw(st.lists(st.sampled_from(choices.get(name, list(range(2, 17)))), max_size=12))
    encoder = ENCODERS[name]
    assert "".join(texts_of(encoder, script)) == encoder.decode(script)
    for most in range(1, len(script)):
        assert "".join(texts_of(encoder, script, most)) == encoder.decode(script[:most])


def test_characters_of_single_bytes_wait_until_no_byte_can_spoil_them() -> None:
    """A decoder with byte fallback gives up all bytes in a row, the good ones too, where one of them fits nowhere."""
    encoder = ENCODERS["byte fallback"]
    good = [10 + byte for byte in "é".encode()]
    assert encoder.decode([3, *good, 10 + 0xFF]) == "a\ufffd\ufffd\ufffd"
    assert texts_of(encoder, [3, *good, 3]) == ["a", "", "", "éa"]
    assert texts_of(encoder, [3, *good, 10 + 0xFF]) == ["a", "", "", "\ufffd\ufffd\ufffd"]
    assert texts_of(encoder, [3, *good]) == ["a", "", "é"]


def test_a_space_that_a_following_token_removes_is_never_given_out() -> None:
    do, n, apostrophe, t = 8, 10, 6, 5
    assert texts_of(ENCODERS["space before words"], [do, n, apostrophe, t]) == ["do", " n", "'", "t"]
    assert texts_of(ENCODERS["spaces cleaned up"], [do, n, apostrophe, t]) == ["do", "", "", "n't"]
    assert texts_of(ENCODERS["spaces cleaned up"], [do, n, 3, 3]) == ["do", "", " na", "a"]
    assert texts_of(ENCODERS["spaces cleaned up"], [3, 2, 16, 3]) == ["a", "", " \n", "a"]
    assert texts_of(ENCODERS["spaces cleaned up"], [3, 11, 2, 9]) == ["a", "", "", " '."]  # though " ' " alone becomes "'"


def test_settings_name_every_value_out_of_range_at_once() -> None:
    with pytest.raises(UserError) as raised:
        SamplingSettings(0, -1.0, 1.5, -0.1, 0, -1, 0.0, 0, -1)
    lines = str(raised.value).split("\n")
    assert [line.partition("=")[0] for line in lines] == [
        "max_tokens", "temperature", "top_p", "min_p", "min_tokens_to_keep", "top_k", "repetition_penalty",
        "repetition_context_size", "random_state",
    ]  # fmt: skip
    assert lines[2] == "top_p=1.5 is out of range. Expected a share from 0 to 1."


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": float("nan")}, {"temperature": float("inf")}, {"temperature": 1e-9}, {"repetition_penalty": float("inf")}],
)
def test_settings_refuse_numbers_that_cannot_be_computed_with(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        SamplingSettings(**wrong)  # type: ignore[arg-type]


def test_settings_take_the_ends_of_their_ranges() -> None:
    SamplingSettings(1, 0.0, 0.0, 0.0, 1, 0, 1e-3, 1, 0)
    SamplingSettings(1, 0.001, 1.0, 1.0, 99, 99, 99.0, 99, 2**32 - 1)


@pytest.mark.parametrize("wrong", [{"top_k": 259}, {"min_tokens_to_keep": 260, "min_p": 0.5}])
def test_more_tokens_than_the_model_knows_cannot_be_kept(model: nn.Module, encoder: ChatEncoder, wrong: dict[str, float]) -> None:
    chosen = SamplingSettings(temperature=1.0, **wrong)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=rf"{next(iter(wrong))}=\d+ is out of range.*259 tokens"):
        next(stream(model, encoder, PROMPT, chosen))


def test_a_prompt_without_tokens_is_a_users_mistake(model: nn.Module, encoder: ChatEncoder) -> None:
    with pytest.raises(UserError, match="no tokens"):
        next(stream(model, encoder, [], SamplingSettings()))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_damaged_weights_are_named_instead_of_printed(tiny_model: Path, encoder: ChatEncoder, temperature: float) -> None:
    damaged = load_model(tiny_model)
    damaged.update({"model": {"norm": {"weight": mx.full((32,), float("nan"))}}})
    with pytest.raises(UserError, match="not finite"):
        next(stream(damaged, encoder, PROMPT, SamplingSettings(temperature=temperature)))
