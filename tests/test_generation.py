from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from finetune_dataflow.engine.chat import load_encoder
from finetune_dataflow.engine.generation import greedy_replies
from finetune_dataflow.engine.models import load_model
from finetune_dataflow.engine.settings import GenerationSettings
from tests.tiny_model import chatml_ids

PROMPTS = [chatml_ids(question) for question in ("Hi", "A much longer question than that?", "Why", "Tell me", "x")]


def one_by_one(model_directory: Path, prompt: list[int], stops: frozenset[int], most: int) -> tuple[int, ...]:
    """Greedy decoding without a cache: the whole sequence again for each token."""
    model, ids = load_model(model_directory), list(prompt)
    for _ in range(most):
        chosen = int(np.argmax(np.array(model(mx.array([ids]))[0, -1])))
        if chosen in stops:
            break
        ids.append(chosen)
    return tuple(ids[len(prompt) :])


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batched_replies_equal_one_by_one_greedy_decoding(tiny_model: Path, batch_size: int) -> None:
    encoder = load_encoder(tiny_model)
    replies = greedy_replies(tiny_model, None, PROMPTS, encoder, GenerationSettings(6, batch_size))
    expected = [one_by_one(tiny_model, prompt, encoder.stop_ids, 6) for prompt in PROMPTS]
    assert [reply.token_ids for reply in replies] == expected
    assert len(set(expected)) > 1


def test_a_reply_that_hits_the_limit_says_that_it_did_not_end(tiny_model: Path) -> None:
    encoder = load_encoder(tiny_model)
    replies = greedy_replies(tiny_model, None, PROMPTS, encoder, GenerationSettings(1, 4))
    assert all(len(reply.token_ids) <= 1 for reply in replies)
    assert [reply.ended for reply in replies] == [len(reply.token_ids) == 0 for reply in replies]
