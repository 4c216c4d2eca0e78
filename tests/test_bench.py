import io
import json
import sys
from pathlib import Path
from typing import Any, cast

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks" / "peers"))

import bench
import wikisql
from arithmetic import Decoder, Work, exponent, spread, step_operations
from protocol import Answers, Windows

SMALL = Decoder(hidden=4, intermediate=8, layers=3, heads=2, key_heads=1, head_size=2, vocabulary=10)
ONE_ROW = Work(positions=5, pairs=15, supervised=2)


def test_the_operations_of_a_step_are_those_counted_by_hand() -> None:
    # A layer's matrices: 16 + 8 + 8 + 16 + 32 + 32 + 32 = 144 weights, 2 * 144 * 5 = 1,440 operations; attention 4 * 4 * 15
    # = 240; adapters of rank 2: (8 + 6 + 6 + 8 + 12 + 12 + 12) * 2 = 128 weights, 1,280 operations; the head 2 * 40 * 2 = 160.
    # Forward 3 * (1,440 + 240) + 2 * 1,280 = 7,600. Backward 2 * (1,440 + 480 + 2,560) = 8,960, less what would reach below
    # the lowest tuned layer through queries, keys and values: 2 * (32 + 2 * 12) * 5 = 560. The head 2 * 160.
    assert step_operations(SMALL, ONE_ROW, tuned=2, rank=2, first_epoch=True) == 7_600 + 8_960 - 560 + 320
    # Later the one frozen layer's forward pass falls away.
    assert step_operations(SMALL, ONE_ROW, tuned=2, rank=2, first_epoch=False) == 16_320 - 1_680


def test_a_model_tuned_from_its_first_layer_costs_the_same_in_every_epoch() -> None:
    first, later = (step_operations(SMALL, ONE_ROW, tuned=3, rank=2, first_epoch=each) for each in (True, False))
    assert first == later


def test_the_sizes_of_a_decoder_are_read_from_its_config() -> None:
    config = {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152,
    }  # fmt: skip
    model = Decoder.of(config)
    assert model == Decoder(576, 1536, 30, 9, 3, 64, 49152)
    assert sum(inner * outer for inner, outer in model.matrices) == 3_538_944


def test_the_exponent_of_a_growth_is_found_whatever_its_factor() -> None:
    assert exponent([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2)
    assert exponent([10, 20, 40], [7, 7, 7]) == pytest.approx(0)


def test_a_spread_is_the_least_the_middle_and_the_greatest() -> None:
    assert spread([3.0, 1.00004, 2.0, 9.0, 2.5]) == {"median": 2.5, "low": 1.0, "high": 9.0}


def test_targets_are_met_from_above_or_from_below_and_left_out_where_nothing_was_measured() -> None:
    found = bench.judged({"trl_peft_first_epoch": 1.5, "peak_memory": 0.61, "generation_batched": 1.0})
    assert found == {
        "trl_peft_first_epoch": {"target": 1.5, "found": 1.5, "met": True},
        "peak_memory": {"target": 0.6, "found": 0.61, "met": False},
    }


def test_rows_are_the_same_for_the_same_seed_and_a_longer_draw_begins_alike() -> None:
    assert wikisql.rows(20, seed=3) == wikisql.rows(50, seed=3)[:20] != wikisql.rows(20, seed=4)
    assert wikisql.rows(1)[0] == {
        "prompt": "table: 2-645\ncolumns: Party, Country, Writer, Wins\n"
        "Q: Name the Writer of Country Portland Democratic Ferrari",
        "completion": "SELECT Writer FROM 2-645 WHERE Country = 'Portland Democratic Ferrari'",
    }


def test_the_answer_to_a_row_is_in_its_prompt_and_no_two_prompts_are_alike() -> None:
    rows = wikisql.rows(400)
    assert len({row["prompt"] for row in rows}) == 400
    for row in rows:
        table, value = row["completion"].split()[3], row["completion"].split("'")[1]
        assert row["prompt"].startswith(f"table: {table}\ncolumns: ") and value in row["prompt"].split("\nQ: ")[1]


def test_a_real_copy_is_read_from_its_texts_or_from_prompts_and_completions(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    lines: list[dict[str, Any]] = [{"text": "table: 1\nQ: Who? \nA: SELECT Who"}, {"prompt": "p", "completion": "c", "more": 1}]
    path.write_text("\n".join(json.dumps(each) for each in lines) + "\n")
    assert wikisql.read(path, 2) == [
        {"prompt": "table: 1\nQ: Who? ", "completion": "SELECT Who"},
        {"prompt": "p", "completion": "c"},
    ]
    assert wikisql.read(path, 1) == wikisql.read(path, 2)[:1]
    with pytest.raises(ValueError, match=r"has 2 rows\. Expected at least 3"):
        wikisql.read(path, 3)
    path.write_text('{"question": "Who?"}\n')
    with pytest.raises(ValueError, match="line 1 has question"):
        wikisql.read(path, 1)


class Given:
    """Answers that are kept."""

    def __init__(self) -> None:
        self.all: list[dict[str, Any]] = []

    def give(self, **values: Any) -> None:
        self.all.append(values)


def test_a_window_counts_the_steps_rows_and_tokens_between_two_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    given = Given()
    found = Windows(cast(Answers, given), {"blas": "none"}, {"rate": lambda: {"rate": 7}})
    monkeypatch.setattr(sys, "stdin", io.StringIO("rate\nsteps 2 first\nsteps 1 later\n"))
    found.step([4, 3], [2, 1])
    assert given.all == [{"ready": True, "blas": "none"}, {"rate": 7}] and found.phase == "first"
    found.step([6], [3])
    found.loss = 1.5
    found.step([2], [1])
    first = given.all[2]
    counted = {"steps": 2, "rows": 3, "tokens": 13, "supervised": 6, "positions": 10, "pairs": 6 + 3 + 15}
    assert {name: first[name] for name in counted} == counted and first["phase"] == "first" and first["loss"] == 1.5
    assert first["peak_bytes"] > 2**20 and found.phase == "later"
    with pytest.raises(SystemExit):
        found.step([2], [1])
    assert given.all[3]["tokens"] == 2 and given.all[3]["pairs"] == 1
