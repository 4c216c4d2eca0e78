"""Replies to 32 prompts: ours in one batch beside `mlx_lm.generate` one by one, in tokens per second.

`python benchmarks/generation.py [--rounds N] [--max-tokens N]` answers 32 prompts of the example data set, prepared by the
dataflow, with the embedded model. Both are greedy, stop at the same tokens, have the same longest reply and the same loaded
weights, and our BLAS serves both. They alternate, and which one begins alternates, too. Printed are a table and, last, the
same numbers as one line of JSON. A reply's tokens count without its stop token. The goal is a ratio of 4.

`mlx_lm.generate` joins the texts of `mlx_lm.stream_generate`, which is called here instead, since it also gives the tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent.parent / "example-support-dataset.json"
INPUTS = {"data_path": str(DATA), "input_text_key": "question", "output_text_key": "reply"}
PROMPTS = 32
MAX_TOKENS = 100  # the default of the dataflow
GOAL = 4.0


def prepared() -> tuple[list[list[int]], Any, Any]:
    """The prompts' tokens, the loaded model and the encoder."""
    from finetune_dataflow import engine
    from finetune_dataflow.cli.options import build_driver

    made = build_driver("base").execute(["base_model_path", "chat_template", "train_tokens"], inputs=INPUTS)
    prompts = [[int(token) for token in made["train_tokens"].prompt(index)] for index in range(PROMPTS)]
    path = made["base_model_path"]
    return prompts, engine.models.load_model(path), engine.chat.load_encoder(path, made["chat_template"])


def ours(prompts: list[list[int]], model: Any, encoder: Any, max_tokens: int) -> list[tuple[int, ...]]:
    """The replies of the dataflow's generation."""
    from finetune_dataflow.engine.generation import replies_of
    from finetune_dataflow.engine.settings import GenerationSettings

    settings = GenerationSettings(max_tokens, PROMPTS)
    return [reply.token_ids for reply in replies_of(model, prompts, encoder, settings, "replies")]


def theirs(prompts: list[list[int]], model: Any, encoder: Any, max_tokens: int) -> list[tuple[int, ...]]:
    """The replies of mlx-lm, one prompt after another."""
    from mlx_lm import stream_generate
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    tokenizer = TokenizerWrapper(encoder.tokenizer, eos_token_ids=sorted(encoder.stop_ids))
    replies = []
    for prompt in prompts:
        responses = list(stream_generate(model, tokenizer, prompt, max_tokens=max_tokens))
        replies.append(tuple(int(each.token) for each in responses if int(each.token) not in encoder.stop_ids))
    return replies


def ratios(rounds: int, max_tokens: int = MAX_TOKENS) -> dict[str, Any]:
    """Tokens per second of both in every round, their ratio's median, low and high, and how many replies are equal."""
    given = prepared()
    sides = {"ours": ours, "theirs": theirs}
    for answer in sides.values():
        answer(given[0][:2], *given[1:], 2)  # the first use of everything is nobody's time
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    replies: dict[str, list[tuple[int, ...]]] = {}
    for number in range(rounds):
        for name in sorted(sides, reverse=bool(number % 2)):
            started = time.perf_counter()
            replies[name] = sides[name](*given, max_tokens)
            speeds[name].append(sum(map(len, replies[name])) / (time.perf_counter() - started))
    each = [own / other for own, other in zip(speeds["ours"], speeds["theirs"], strict=True)]
    return {
        "prompts": PROMPTS,
        "max_tokens": max_tokens,
        "tokens": sum(map(len, replies["ours"])),
        "equal_replies": sum(own == other for own, other in zip(replies["ours"], replies["theirs"], strict=True)),
        "tokens_per_second": {name: [round(speed, 1) for speed in values] for name, values in speeds.items()},
        "ratios": [round(ratio, 2) for ratio in each],
        "ratio": {"median": round(statistics.median(each), 2), "low": round(min(each), 2), "high": round(max(each), 2)},
    }


def main() -> None:
    """Print the table and the line of JSON; the exit code is 1 where the median misses the goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS, help="the longest reply")
    chosen = parser.parse_args()
    found = ratios(chosen.rounds, chosen.max_tokens)
    speeds, ratio = found["tokens_per_second"], found["ratio"]
    print(f"{'round':>5} {'ours':>10} {'one by one':>11} {'ratio':>7}   tokens per second")
    for number, line in enumerate(zip(speeds["ours"], speeds["theirs"], found["ratios"], strict=True), 1):
        print("{:>5} {:>10.1f} {:>11.1f} {:>7.2f}".format(number, *line))
    print(
        f"ratio {ratio['median']} ({ratio['low']} to {ratio['high']}); {found['tokens']:,} tokens, "
        f"{found['equal_replies']} of {PROMPTS} replies equal"
    )
    print(json.dumps(found))
    sys.exit(ratio["median"] < GOAL)


if __name__ == "__main__":
    import finetune_dataflow.engine  # noqa: F401  # before MLX: the fast BLAS is for both

    main()
