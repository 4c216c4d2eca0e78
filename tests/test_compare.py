"""`run.py compare`: what is printed of hand-written and of real runs, what stands on the page, and what is refused."""

import itertools
import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from finetune_dataflow.cli import main
from finetune_dataflow.cli.compare import HELP, compare
from finetune_dataflow.engine.run_comparison import compared, differing, holm, read_run, read_runs, unique_names
from finetune_dataflow.errors import UserError

TWELVE = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
HIGHER = [0.3, 0.5, 0.4, 0.7, 0.6, 0.6, 0.3, 0.2, 0.6, 0.5, 0.8, 0.9]
VERDICT = "The tuned model is better than the base model: its ROUGE-L is 0.200 higher on 12 rows it never saw."


def write_run(
    directory: Path,
    rouge_l: Sequence[float] | None = TWELVE,
    *,
    settings: dict[str, Any] | None = None,
    metrics: dict[str, Any] | None = None,
    lineage: dict[str, Any] | None = None,
    history: Sequence[dict[str, Any]] = (),
    texts: str = "question",
    used: Sequence[str] = ("aaaa",),
) -> Path:
    """A run directory with these ROUGE-L by row, unfinished where they are None."""
    (directory / "adapters").mkdir(parents=True)
    hold_out = f"tokens of {texts}"
    made = {
        "names": {"data_path": "support.json", "model_id": "tiny"},
        "settings": {"learning_rate": 1e-4, "epochs": 2.0, "system_prompt": "", **(settings or {})},
        "fingerprints": {"base_model": "b" * 64},
        "dataset": "d" * 64,
        "evaluation": {"max_tokens": 8, "hold_out_set": hold_out},
        "versions": {"mlx": "0.32.4"},
        **(lineage or {}),
    }
    (directory / "lineage.json").write_text(json.dumps(made))
    (directory / "config.yaml").write_text("data_path: support.json\n")
    (directory / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in history))
    (directory / "adapters" / "used_inputs.txt").write_text("\n".join(used))
    (directory / "hold_out_inputs.txt").write_text("0000\n1111\n")
    if rouge_l is not None:
        mean = statistics.fmean(rouge_l)
        scores = {
            "base": {"rougeL": 0.1, "loss": 2.0, "perplexity": 7.389},
            "finetuned": {"rougeL": mean, "loss": 1.5, "perplexity": 4.482},
            "intervals": {"rougeL": {"base": {"mean": 0.1, "low": 0.05, "high": 0.15},
                                     "finetuned": {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}}},
            "verdict": VERDICT, "hold_out_rows": len(rouge_l), **(metrics or {}),
        }  # fmt: skip
        (directory / "metrics.json").write_text(json.dumps(scores))
        rows = [{"row": n, "input": f"{texts} {n}", "reference": "yes", "finetuned_rougeL": x} for n, x in enumerate(rouge_l)]
        (directory / "predictions.jsonl").write_text("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in rows))
    return directory


def losses(*values: float, ended: bool = False) -> list[dict[str, Any]]:
    """The events of a fit that validated before the first update and after every tenth."""
    events: list[dict[str, Any]] = []
    for place, value in enumerate(values):
        events += [{"event": "train", "step": 10 * place, "loss": value + 0.5}] if place else []
        events.append({"event": "validation", "step": 10 * place, "loss": value})
    return [*events, {"event": "end"}] if ended else events


def printed(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert compare([str(each) for each in words]) == 0
    return capsys.readouterr().out


def flat(text: str) -> str:
    """A text without its line breaks."""
    return " ".join(text.split())


def refused(*words: object) -> str:
    with pytest.raises(UserError) as caught:
        compare([str(each) for each in words])
    return str(caught.value)


def contents(directory: Path) -> dict[str, tuple[bytes, int]]:
    return {str(each): (each.read_bytes(), each.stat().st_mtime_ns) for each in directory.rglob("*") if each.is_file()}


def test_two_runs_on_the_same_rows_print_this(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write_run(tmp_path / "one", history=losses(3.0, 2.0, 2.5, ended=True))
    two = write_run(tmp_path / "two", HIGHER, settings={"learning_rate": 2e-4, "data_path": "other.json"}, history=losses(3, 1))
    assert printed(capsys, one, two) == (
        """\
Runs:
  1  one: 12 hold-out rows; the fit ended after 20 updates, validation loss
     3.000 -> 2.000 (least, after update 10).
     The tuned model is better than the base model: its ROUGE-L is 0.200 higher
     on 12 rows it never saw.
  2  two: 12 hold-out rows; so far 10 updates, validation loss 3.000 -> 1.000
     (least, after update 10).
     The tuned model is better than the base model: its ROUGE-L is 0.200 higher
     on 12 rows it never saw.

Settings that differ (5 are equal):
               1 one         2 two
data_path      support.json  other.json
learning_rate  0.0001        0.0002

No fingerprints or versions differ (4 are equal).

Tuned models, on their hold-out rows (95 % interval):
             1 one                   2 two
ROUGE-L      0.350 (0.250 to 0.450)  0.533 (0.433 to 0.633)
loss (nats)  1.500                   1.500
perplexity   4.482                   4.482

Base models:
             1 one                   2 two
ROUGE-L      0.100 (0.050 to 0.150)  0.100 (0.050 to 0.150)
loss (nats)  2.000                   2.000
perplexity   7.389                   7.389

Comparison:
  Runs 1 and 2 were scored on the same 12 hold-out rows.

  two is better than one: its ROUGE-L is 0.183 higher on 12 rows that neither
  saw in its fit (95 % interval +0.108 to +0.259, p = 0.002; better on 10, equal
  on 2, worse on 0).
"""
    )


def test_a_pair_has_the_mean_difference_and_the_p_value_of_every_exchange_of_rows(tmp_path: Path) -> None:
    [pair] = compared(read_runs([write_run(tmp_path / "one"), write_run(tmp_path / "two", HIGHER)])).pairs
    gains = [high - low for low, high in zip(TWELVE, HIGHER, strict=True)]
    swapped = [sum(s * g for s, g in zip(signs, gains, strict=True)) for signs in itertools.product((1, -1), repeat=12)]
    assert pair.difference.mean == pytest.approx(statistics.fmean(gains))
    assert pair.p_value == pytest.approx(sum(abs(each) >= sum(gains) - 1e-9 for each in swapped) / 4096)
    # At least as wide as Student's interval with 11 degrees of freedom.
    assert pair.difference.high - pair.difference.mean >= 2.20098 * statistics.stdev(gains) / 12**0.5 * (1 - 1e-6)


def test_rows_are_paired_by_their_texts_whatever_their_order_and_numbers(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two", HIGHER)
    straight = compared(read_runs([one, two])).pairs[0].difference
    rows = [json.loads(line) for line in (two / "predictions.jsonl").read_text().splitlines()]
    shuffled = [{**each, "row": 100 - each["row"]} for each in rows[::-1]]
    (two / "predictions.jsonl").write_text("".join(json.dumps(each) + "\n" for each in shuffled))
    [pair] = compared(read_runs([one, two])).pairs
    assert pair.difference == straight and (pair.outcomes.wins, pair.outcomes.ties, pair.outcomes.losses) == (10, 2, 0)


def test_a_line_separator_in_a_text_ends_no_line(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, texts="a\u2028b\x85c") for name in ("one", "two")]
    [pair] = compared(read_runs(runs)).pairs
    assert pair.rows == 12


def test_a_worse_run_and_one_that_is_not_clearly_different_are_called_so(tmp_path: Path) -> None:
    higher, lower = write_run(tmp_path / "higher", HIGHER), write_run(tmp_path / "lower")
    mixed = write_run(tmp_path / "mixed", [each + (0.02 if place % 2 else -0.01) for place, each in enumerate(TWELVE)])
    assert (
        compared(read_runs([higher, lower]))
        .pairs[0]
        .sentence.startswith("lower is worse than higher: its ROUGE-L is 0.183 lower")
    )
    unclear = compared(read_runs([lower, mixed])).pairs[0]
    assert unclear.tone == "unclear" and unclear.sentence.startswith("There is no clear difference between mixed and lower: its")
    assert unclear.sentence.endswith(f"would be clear on about {unclear.rows_needed:,} rows.")


@pytest.mark.parametrize(
    ("p_values", "corrected"),
    [
        ([], []),
        ([0.03], [0.03]),
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),
        ([0.04, 0.001, 0.02, 0.015], [0.045, 0.004, 0.045, 0.045]),
        ([0.5, 0.6], [1.0, 1.0]),
        ([0.02, 0.02], [0.04, 0.04]),
    ],
)
def test_p_values_are_corrected_as_holm_does_by_hand(p_values: list[float], corrected: list[float]) -> None:
    assert holm(p_values) == pytest.approx(corrected)


def test_of_several_comparisons_one_is_clear_only_where_its_corrected_p_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Six rows gain alike: 2 of their 64 exchanges reach as much, so p = 0.03125.
    gains = [0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0, 0, 0, 0, 0, 0]
    some = [low + gain for low, gain in zip(TWELVE, gains, strict=True)]
    runs = [write_run(tmp_path / "zero"), write_run(tmp_path / "some", some), write_run(tmp_path / "none")]
    by_itself = compared(read_runs(runs[:2])).pairs[0]
    assert (by_itself.p_value, by_itself.tone) == (0.03125, "better")
    one, other = compared(read_runs(runs)).pairs
    assert (one.corrected_p, one.tone, other.corrected_p, other.tone) == (0.0625, "unclear", 1.0, "unclear")
    told = flat(printed(capsys, *runs))
    assert "There is no clear difference between some and zero once 2 comparisons are allowed for: its ROUGE-L" in told
    assert "p = 0.031, corrected p = 0.062;" in told and told.endswith(
        "2 comparisons were made, and each may seem clear by chance: their p-values are corrected by Holm's method (1979), and "
        "a difference counts as clear only where the corrected one is below 0.05, too."
    )


def test_runs_on_other_rows_get_no_paired_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other", HIGHER, texts="riddle")
    lines = (other / "predictions.jsonl").read_text().splitlines()
    (other / "predictions.jsonl").write_text("\n".join([(one / "predictions.jsonl").read_text().splitlines()[0], *lines[1:]]))
    told = flat(printed(capsys, one, other).split("Comparison:\n")[1])
    assert told == ("The scores of run 2 must not be compared with those of run 1: of 12 hold-out rows, 1 is among the 12 there.")


def test_runs_that_only_share_rows_with_each_other_are_told_to_stand_first(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", texts="x"), write_run(tmp_path / "c", texts="x")]
    assert compared(read_runs(runs)).on_rows == [
        "Runs 2 and 3 were scored on the same 12 hold-out rows.",
        "The scores of runs 2 and 3 must not be compared with those of run 1: of 12 hold-out rows, 0 are among the 12 there.",
        "To compare runs 2 and 3, name one of them first.",
    ]


def test_rows_that_differ_under_one_fingerprint_are_called_changed(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two")
    changed = (two / "predictions.jsonl").read_text().replace('"yes"', '"no"', 1)
    (two / "predictions.jsonl").write_text(changed)
    found = compared(read_runs([one, two]))
    assert not found.pairs and found.on_rows[-1] == (
        "By their fingerprints these rows are the same, so predictions.jsonl was changed in one of them."
    )


def test_other_tokens_and_other_decoding_on_the_same_rows_are_told(tmp_path: Path) -> None:
    two = write_run(tmp_path / "two", lineage={"evaluation": {"max_tokens": 16, "hold_out_set": "other tokens"}})
    found = compared(read_runs([write_run(tmp_path / "one"), two]))
    assert len(found.pairs) == 1 and found.on_rows[1:] == [
        "As tokens these rows are not the same (by prompt, template or tokenizer): compare the scores of replies, not losses.",
        "Their replies were not generated alike (max_tokens differ): differences in score include that.",
    ]


def test_texts_without_prompts_are_not_compared_by_replies(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, settings={"train_type": "self-supervised"}) for name in ("a", "b")]
    found = compared(read_runs(runs))
    assert not found.pairs and found.on_rows[-1].endswith("there are no replies to compare: compare the losses.")


def test_rows_that_a_fit_used_and_too_few_rows_allow_no_verdict(tmp_path: Path) -> None:
    one, saw = write_run(tmp_path / "one"), write_run(tmp_path / "saw", HIGHER, used=["1111", "aaaa"])
    [pair] = compared(read_runs([one, saw])).pairs
    assert pair.tone == "none" and pair.sentence.startswith(
        "No verdict on unseen rows, saw against one: its ROUGE-L is 0.183 higher on 12 rows of which the fit of saw used 1 ("
    )
    few = [write_run(tmp_path / "few", TWELVE[:9]), write_run(tmp_path / "also", HIGHER[:9])]
    [pair] = compared(read_runs(few)).pairs
    assert pair.sentence == "No verdict on also against few: 9 rows are too few to tell; at least 10 are needed."


def test_an_adapter_that_does_not_say_what_it_learned_is_told(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two", HIGHER)
    (two / "adapters" / "used_inputs.txt").unlink()
    assert "on 12 rows (which rows two learned is not known) (95 %" in compared(read_runs([one, two])).pairs[0].sentence


def test_an_unfinished_run_says_where_it_is_and_a_half_written_line_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done, running = write_run(tmp_path / "done"), write_run(tmp_path / "running", None, history=losses(3.0, 2.0, 2.5))
    with (running / "metrics.jsonl").open("a") as log:
        log.write('{"event": "train", "st')
    told = flat(printed(capsys, running, done, "--out", tmp_path / "c.html"))
    assert "1 running: not finished; so far 20 updates, validation loss 3.000 -> 2.000 (least, after update 10)." in told
    assert "Only run 2 is finished: there are no scores to compare." in told and "running is" not in told
    assert "1 running" not in told.split("Tuned models")[1]
    new = write_run(tmp_path / "new", None)
    told = flat(printed(capsys, new, running))
    assert "1 new: not finished; no update was recorded." in told and "No run is finished" in told and "Tuned" not in told


def test_what_an_older_run_did_not_record_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = write_run(tmp_path / "old", metrics={"intervals": None, "hold_out_rows": None}), write_run(tmp_path / "new")
    lineage = json.loads((old / "lineage.json").read_text())
    for name in ("evaluation", "versions", "dataset"):
        del lineage[name]
    (old / "lineage.json").write_text(json.dumps(lineage))
    (old / "config.yaml").unlink()
    told = printed(capsys, old, new)
    assert "No settings differ (6 are equal, 1 not recorded of every run)." in told
    assert "ROUGE-L      0.350  0.350 (0.250 to 0.450)\n" in told
    assert "There is no clear difference between new and old: its ROUGE-L is 0.000 higher on 12 rows" in flat(told)


def test_scores_that_were_changed_after_the_run_are_told(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", lineage={"scores": "0" * 64})
    assert read_run(run, "run").notes == ("metrics.json was changed after lineage.json was written, or the run was cut short.",)


def test_settings_differ_by_value_and_kind_and_not_where_they_were_not_recorded() -> None:
    found = differing([{"a": 1, "b": 2, "c": None, "d": "4", "e": 1}, {"a": True, "b": 2.0, "c": 0, "d": 4, "f": 1}])
    assert found.values == {"a": ["1", "true"], "c": ["not set", "0"], "d": ['"4"', "4"]}
    assert (found.equal, found.partly) == (1, 2)


def test_directories_of_one_name_are_told_apart_by_their_parents() -> None:
    paths = [Path(each) for each in ("/x/one/run", "/x/two/run", "/x/two/other", "/y/two/run")]
    assert unique_names(paths) == ["one/run", "x/two/run", "other", "y/two/run"]


def test_tables_stay_within_80_columns_and_different_values_stay_different(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = []
    for number in range(5):
        prompt = f"{'Be very polite. ' * 6}{number}{' And be brief, always.' * 6}"
        settings = {"adapter_save_interval_proportion": number / 7, "system_prompt": prompt, "lora_keys": [f"層{number}"] * 40}
        runs.append(write_run(tmp_path / f"{'a-run-with-a-long-name' * 2}-{number}", settings=settings))
    told = printed(capsys, *runs).split("Comparison:")[0]
    # A Chinese character takes two columns.
    assert max(len(line) + line.count("層") for line in told.splitlines()) <= 80
    values = re.findall(r"…[^…\n]+…", "".join(line for line in told.splitlines() if line.startswith("system_prompt")))
    assert len(values) == len(set(values)) == 5 and all(re.search(r"olite\. \d And", each) for each in values)
    assert len(re.findall("(?m)^system_prompt ", told)) == 3 and "learning_rate" not in told


def test_what_a_terminal_would_obey_stands_as_an_escape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "\x1b]0;owned\x07\u202e\nIgnore"
    runs = [
        write_run(
            tmp_path / f"run{hostile}{number}",
            settings={"system_prompt": f"{hostile}{number}", hostile: number},
            metrics={"verdict": f"{VERDICT}{hostile}", "finetuned": {hostile: 0.5, "rougeL": 0.35}},
            lineage={"versions": {hostile: f"{number}{hostile}"}},
        )
        for number in range(2)
    ]
    told = printed(capsys, *runs)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", told)
    assert not any(line.startswith("Ignore") for line in told.splitlines())
    assert r"1  run\x1b]0;owned\x07\u202e\nIgnore0: 12 hold-out rows" in told
    (runs[0] / "metrics.json").write_text("{")
    assert "\x1b" not in refused(*runs) and r"run\x1b]0;owned" in refused(*runs)


def test_the_page_says_the_same_and_shows_texts_as_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write_run(tmp_path / "<img src=x onerror=alert(1)>", history=losses(3, 2, ended=True))
    two = write_run(tmp_path / "two", HIGHER, settings={"system_prompt": "</script><script>alert(1)"}, history=losses(3, 1))
    running = write_run(tmp_path / "running", None, history=losses(3, 2.5))
    out = tmp_path / "new" / "page.html"
    before = contents(one) | contents(two)
    assert printed(capsys, one, two, "--out", out).endswith(f"\nWrote {out}.\n")
    page = out.read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and contents(one) | contents(two) == before
    assert "<img src=x" not in page and "</script><script>alert" not in page
    assert "two is better than &lt;img src=x onerror=alert(1)&gt;: its ROUGE-L is 0.183 higher" in page
    assert '<section class="verdict better"' in page and page.count('<figure class="chart">') == 4
    for title in ("The runs", "Which is better", "Where they differ", "Scores", "The fits", "Commands"):
        assert f">{title}</h2>" in page
    assert "0.350 (0.250 to 0.450)" in page and f"train -c {two / 'config.yaml'} --out ANOTHER_DIRECTORY" in page
    printed(capsys, one, running, f"--out={out}")
    page = out.read_text(encoding="utf-8")
    assert "2 running: not finished; so far 10 updates" in page and page.count("is better than") == 1
    printed(capsys, running, write_run(tmp_path / "new-run", None), "--out", out)
    assert out.read_text(encoding="utf-8").count('<figure class="chart">') == 1


def test_no_page_is_written_unless_it_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runs = write_run(tmp_path / "one"), write_run(tmp_path / "two")
    before = contents(tmp_path)
    assert "Wrote" not in printed(capsys, "--", *runs) and contents(tmp_path) == before


def test_help_is_printed_on_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "nothing", "--help") == HELP and "run.py compare RUN RUN ... [--out FILE.html]" in HELP


def test_runs_that_are_none_are_refused_with_what_was_expected(tmp_path: Path) -> None:
    run, there = write_run(tmp_path / "runs" / "run"), tmp_path / "runs"
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "run"
    link.symlink_to(run)
    expected = "Expected: compare RUN RUN ... [--out FILE.html]"
    assert refused() == f"compare takes two runs or more, and found none. {expected}"
    assert refused(run) == f"compare takes two runs or more, and found one. {expected}"
    assert refused(run, link) == f"{link} is named twice. Name each run once."
    assert refused(run, tmp_path / "no") == f"There is no directory {tmp_path / 'no'}. Expected the directory of a run."
    assert refused(run, run / "config.yaml") == f"{run / 'config.yaml'} is a file. Expected the directory of a run."
    needed = "there is no lineage.json in it, which every run begins with. Expected lineage.json, and metrics.json and"
    needed += " predictions.jsonl of a finished run."
    assert refused(run, tmp_path) == f"{tmp_path} is not the directory of a run: {needed}"
    assert refused(run, there) == f"{there} is not the directory of a run: {needed} There are runs in it: {run}."
    assert refused(run, run / "adapters") == f"{run / 'adapters'} is not the directory of a run: {needed} Did you mean {run}?"
    assert refused(run, "--outt=x") == f"Unknown option '--outt=x'. Did you mean '--out'? {expected}"


def test_pages_that_cannot_be_are_refused_before_anything_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two")
    inside = one / "adapters" / "c.html"
    assert refused(one, two, "--out", tmp_path) == f"--out {str(tmp_path)!r} is a directory. Expected the name of an HTML file."
    assert refused(one, two, "--out", "c.txt") == "--out 'c.txt' is no HTML file. Expected a name that ends in .html."
    assert refused(one, two, "--out=a.html", "--out=b.html") == "--out is given 2 times. Expected one file."
    assert refused(one, two, "--out", inside) == (
        f"--out {str(inside)!r} is in the run {one}, which compare leaves as it is. Name a file elsewhere."
    )
    assert refused(one, two, "--out").startswith("--out '' is ")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("metrics.json", "{", "is damaged: Expecting property name"),
        ("metrics.json", "[1]", "is damaged: it holds [1]. Expected a JSON object."),
        ("metrics.json", "[" * 100_000, "is damaged: "),
        ("metrics.json", b"\xff", "is damaged: byte 0 is not UTF-8."),
        ("metrics.json", '{"loss": 1}', "is damaged: 'base' is nothing. Expected an object of scores."),
        ("metrics.json", '{"base": {"loss": "x"}}', "is damaged: 'loss' of 'base' is \"x\". Expected a number."),
        ("metrics.json", '{"base": {}, "finetuned": {"a": NaN}}', "'a' of 'finetuned' is NaN. Expected a number."),
        ("metrics.json", '{"base": {}, "finetuned": {}}', "is damaged: 'verdict' is nothing. Expected a sentence."),
        ("lineage.json", '{"names": 3}', "is damaged: 'names' is 3. Expected an object."),
        ("predictions.jsonl", "{}\n", 'line 1 has {}. Expected input, reference, row and finetuned_rougeL.'),
        ("predictions.jsonl", '{"input', "is damaged: line 1 is no JSON"),
        ("predictions.jsonl", "", "has 0 rows, but metrics.json tells of 12: one of them is damaged."),
        ("metrics.jsonl", '{"event": "train", "step": "x", "loss": 1}\n', "is damaged: line 1 has"),
        ("metrics.jsonl", "x\n{}\n", "is damaged: line 1 is no JSON"),
        ("config.yaml", "a: [", "is damaged: while parsing"),
    ],
)  # fmt: skip
def test_damaged_files_are_named_with_what_is_wrong(tmp_path: Path, name: str, text: str | bytes, told: str) -> None:
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two")
    (two / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    message = refused(one, two)
    assert message.startswith(f"{two / name} ") and told in message


def test_a_loss_that_is_not_finite_is_left_out_of_the_curve(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", None, history=losses(3.0, float("nan"), 2.0))
    assert read_run(run, "run").progress == "so far 20 updates, validation loss 3.000 -> 2.000 (least, after update 20)"


def test_two_real_runs_are_compared_on_their_rows(
    rows: list[dict[str, str]], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "rows.json"
    data.write_text(json.dumps([{**each, "reply": "yes"} for each in rows]))
    common = ["--no-cache", "--data", str(data), "--input-text-key", "question", "--output-text-key", "reply"]
    common += ["--model-id", str(tiny_model), "--num-layers", "2", "--max-tokens", "4", "--iters", "40", "--train-size", "0.5"]
    runs = [tmp_path / "runs" / name for name in ("wild", "calm")]
    for run, rate in zip(runs, ("1e-2", "1e-4"), strict=True):
        assert main([*common, "--learning-rate", rate, "--out", str(run)]) == 0
    capsys.readouterr()
    before = contents(tmp_path / "runs")
    told = printed(capsys, *runs, "--out", tmp_path / "c.html")
    found = [[json.loads(line) for line in (run / "predictions.jsonl").read_text().split("\n")[:-1]] for run in runs]
    assert len(found[0]) >= 10 and [each["row"] for each in found[0]] == [each["row"] for each in found[1]]
    assert f"Runs 1 and 2 were scored on the same {len(found[0])} hold-out rows.\n" in told
    assert re.search(r"learning_rate +0\.01 +0\.0001\n\nFingerprints", told)  # the only one
    assert re.search(r"Fingerprints .*\n +1 wild +2 calm\nadapter +[0-9a-f]{12}  [0-9a-f]{12}\n\n", told)
    gain = statistics.fmean(b["finetuned_rougeL"] - a["finetuned_rougeL"] for a, b in zip(*found, strict=True))
    assert gain > 0.5 and f"calm is better than wild: its ROUGE-L is {gain:.3f} higher on {len(found[0])} rows that" in flat(told)
    first, second = (json.loads((run / "metrics.json").read_text())["finetuned"]["loss"] for run in runs)
    assert re.search(rf"loss \(nats\) +{first:.3f} \(.*\) +{second:.3f} \(", told)
    assert contents(tmp_path / "runs") == before and "was changed" not in told
