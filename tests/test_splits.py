from dataclasses import replace

import pandas as pd
import pytest

from finetune_dataflow.engine.settings import SplitSettings
from finetune_dataflow.engine.splitting import leaking_rows, normalised, position, sides
from finetune_dataflow.errors import UserError

SETTINGS = SplitSettings(random_state=42, train_size=0.8, validation_size=0.1)


def questions(count: int, **columns: object) -> pd.DataFrame:
    return pd.DataFrame({"row": range(1, count + 1), "input_text": [f"question {n}" for n in range(count)], **columns})


def test_a_rows_side_does_not_move_when_rows_are_appended() -> None:
    assert sides(questions(500), SETTINGS)[:300].tolist() == sides(questions(300), SETTINGS).tolist()


def test_a_rows_side_does_not_depend_on_its_place() -> None:
    dealt = sides(questions(300), SETTINGS)
    assert sides(questions(300)[::-1], SETTINGS)[::-1].tolist() == dealt.tolist()


def test_the_same_input_in_other_letters_and_spaces_stays_on_one_side() -> None:
    assert normalised("  What\tIS   ﬁne? ") == "what is fine?"
    assert position("What is LoRA?", 42) == position("what  is lora? ", 42)


def test_the_position_of_a_text_is_fixed_for_ever() -> None:
    """A changed hash would move rows between sets, and old adapters would have seen today's hold-out."""
    assert position("What is LoRA?", 42) == pytest.approx(0.7165490028551198, abs=1e-12)


def test_sizes_are_near_their_shares() -> None:
    counts = sides(questions(10_000), SETTINGS).value_counts(normalize=True)
    assert counts["train"] == pytest.approx(0.8, abs=0.02)
    assert counts["validation"] == pytest.approx(0.1, abs=0.015)
    assert counts["hold_out"] == pytest.approx(0.1, abs=0.015)


def test_a_larger_training_share_only_adds_rows_to_the_training_set() -> None:
    small, large = (sides(questions(300), SplitSettings(42, share, 0.1)) for share in (0.6, 0.8))
    assert (large[small == "train"] == "train").all()


def test_another_seed_deals_otherwise() -> None:
    assert sides(questions(300), SETTINGS).tolist() != sides(questions(300), SplitSettings(43, 0.8, 0.1)).tolist()


def test_an_empty_set_is_an_error_that_says_how_many_rows_are_needed() -> None:
    with pytest.raises(UserError, match=r"3 rows \(3 different inputs\) leave .* empty .* 55 rows"):
        sides(questions(3), SETTINGS)


def test_a_group_stays_on_one_side() -> None:
    grouped = questions(400, group=[f"customer {n % 40}" for n in range(400)])
    dealt = sides(grouped, SETTINGS)
    assert (dealt.groupby(grouped["group"]).nunique() == 1).all() and dealt.nunique() == 3


def test_a_row_without_a_group_goes_by_its_own_input() -> None:
    assert sides(questions(300, group=None), SETTINGS).tolist() == sides(questions(300), SETTINGS).tolist()


def test_given_sides_are_kept() -> None:
    given = ["train"] * 200 + ["validation"] * 50 + ["hold_out"] * 50
    assert sides(questions(300, side=given), SETTINGS).tolist() == given


def test_a_missing_hold_out_is_carved_from_the_training_rows_by_the_same_rule_and_said(caplog: pytest.LogCaptureFixture) -> None:
    given = pd.Series(["train"] * 250 + ["validation"] * 50)
    with caplog.at_level("INFO"):
        dealt = sides(questions(300, side=given), SETTINGS)
    plain = sides(questions(300), SETTINGS)
    assert (dealt[250:] == "validation").all()
    assert ((dealt[:250] == "hold_out") == (plain[:250] == "hold_out")).all() and (dealt == "hold_out").any()
    assert "The data gives no hold-out set" in caplog.text


def test_a_training_row_near_a_hold_out_row_is_dropped_with_its_reason() -> None:
    text = "how many epochs should a model be trained for on four hundred rows of support questions and replies"
    near = pd.DataFrame({"row": [1, 2, 3], "input_text": [text + "?", text, "something else entirely"]})
    dropped = leaking_rows(near, pd.Series(["train", "hold_out", "validation"]), SETTINGS)
    assert [(each.row, each.reason) for each in dropped] == [(1, "near_hold_out")]
    assert leaking_rows(near, pd.Series(["train", "hold_out", "validation"]), replace(SETTINGS, near_duplicates="keep")) == []
