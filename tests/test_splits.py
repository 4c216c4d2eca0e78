import pandas as pd
import pytest

from finetune_dataflow.engine.settings import SplitSettings
from finetune_dataflow.engine.splitting import normalised, position, sides
from finetune_dataflow.errors import UserError

SETTINGS = SplitSettings(random_state=42, train_size=0.8, validation_size=0.1)


def questions(count: int) -> pd.Series:
    return pd.Series([f"question {n}" for n in range(count)])


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
