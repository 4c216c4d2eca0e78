"""`run.py train` and `run.py evaluate`: the main job, and what it prints."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from finetune_dataflow import engine
from finetune_dataflow.cli import ranks as cli_ranks
from finetune_dataflow.cli.cache import cached_driver
from finetune_dataflow.cli.graph import dot_source
from finetune_dataflow.cli.options import Options, build_driver, parse, parse_all
from finetune_dataflow.engine import ranks
from finetune_dataflow.engine.replies import PromptReply
from finetune_dataflow.engine.settings import differences
from finetune_dataflow.errors import UserError

PREPARED = [
    "source_rows", "shaped_rows", "leaking_rows", "row_ledger", "data_quality", "label_audit", "hold_out_audit",
    "train_tokens", "validation_tokens", "hold_out_tokens", "run_identity", "evaluation_identity", "base_model_path",
]  # fmt: skip
PREPARED_FIT = ["fit_settings", "fit_plan", "starting_weights", "adapter_copy_target", "trained_parameters", "used_inputs"]
RESULTS = [
    "save_best_models", "hold_out_set_predictions", "finetuned_model_on_validation_set",
    "training_and_validation_set_metrics", "config_file", "metrics_file", "run_metrics", "lineage_file",
]  # fmt: skip
REPORTED = ["reported_metrics"]


def train(arguments: Sequence[str], start: str | None = None) -> int:
    """Prepare, fit (under start="base"), evaluate, write the run directory and print the verdict.

    Where a launcher has started this as one of several ranks, all fit together, and rank 0 does the rest.
    """
    with ranks.joined() as team:
        chain = parse_all(arguments, start)
        check_settings(chain)
        if team is not None:
            return _train_together(team, chain)
        return _train_in_a_row(in_a_row(chain))


def _train_together(team: ranks.Team, chain: Sequence[Options]) -> int:
    options = cli_ranks.ready(team, chain)
    if team.first:
        print(cli_ranks.line(team))
        run_once(options)
    else:
        cli_ranks.help_fit(team, options, prepared_by(options))
    return 0


def _train_in_a_row(chain: Sequence[Options]) -> int:
    adapter: Path | None = None
    for number, options in enumerate(chain, 1):
        if adapter is not None:
            options = replace(options, inputs={**options.inputs, "resume_adapter_file": str(adapter)})
        if len(chain) > 1:
            print(f"Configuration {number} of {len(chain)}{f', from the adapter in {adapter}' if adapter else ''}:\n")
        adapter = run_once(options)[0] / engine.training.BEST
    return 0


def in_a_row(chain: Sequence[Options]) -> list[Options]:
    """Several configurations made ready to be trained one after another, each in a directory of its own.

    A flag that names weights to start from is for the first. Raises UserError, before anything is trained, where one cannot
    start from the adapter of the one before it.
    """
    if len(chain) == 1:
        return list(chain)
    ready, problems = [], []
    flagged = {each.inputs.get("resume_adapter_file") for each in chain}
    for number, options in enumerate(chain, 1):
        inputs = dict(options.inputs)
        if "output_dir" in inputs:
            inputs["output_dir"] = str(Path(inputs["output_dir"]) / str(number))
        if number > 1 and len(flagged) == 1:
            inputs.pop("resume_adapter_file", None)
        if options.start == "presaved":
            problems.append(f"Configuration {number} means start: presaved. Only fits are made in a row.")
        if number > 1 and "resume_adapter_file" in inputs:
            problems.append(f"Configuration {number} names resume_adapter_file; it starts from the adapter of the one before it.")
        ready.append(replace(options, inputs=inputs))
    made = [] if problems else [_method_of(options) for options in ready]
    for number, (before, after) in enumerate(pairwise(made), 2):
        problems += [
            f"Configuration {number} cannot start from the one before it: {each}." for each in differences(before, after)
        ]
    if problems:
        raise UserError("\n".join(problems))
    return ready


def _method_of(options: Options) -> dict[str, Any]:
    """What two fits must have in common for one to start from the other's adapter; checks the plan and the method, too."""
    wanted = ["method_settings", "base_model_fingerprint", "fit_plan", "trained_parameters"]
    made = build_driver(options.start, options.modules).execute(wanted, inputs=options.inputs)
    method = {
        name: value for name, value in asdict(made["method_settings"]).items() if name not in ("random_state", "lora_dropout")
    }
    return {**method, "fingerprint of base_model": made["base_model_fingerprint"]}


def check_settings(chain: Sequence[Options]) -> None:
    """Raise one UserError with every value out of range, of every stage and configuration, before anything is read."""
    problems = []
    for options in chain:
        dr = build_driver(options.start, options.modules)
        for name in (each for each in dr.graph.nodes if each.endswith("_settings") and each != "preparation_settings"):
            # Each stage alone: what is wrong with the split must not hide what is wrong with the fit.
            aside = {} if name == "split_settings" else {"split_settings": engine.settings.SplitSettings(0, 0.5, 0.25)}
            try:
                dr.execute([name], inputs=options.inputs, overrides=aside)
            except UserError as error:
                problems += str(error).splitlines()
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))


def run_once(options: Options) -> tuple[Path, dict[str, Any]]:
    """One run, from the data to its result on the screen; its directory, which nobody else has meanwhile, and its metrics."""
    tracker = tracker_of(options)
    dr = cached_driver(options, [] if tracker is None else [tracker])
    team = ranks.current()
    read = {} if team is None else cli_ranks.read_alike(team, dr, options)
    prepared = read | dr.execute(prepared_by(options), inputs=options.inputs, overrides=read)
    if team is not None:
        cli_ranks.agree(team, prepared)
    with engine.run_directory.held(options.inputs.get("output_dir", ""), prepared["run_identity"]) as directory:
        metrics = engine.run_directory.finished_metrics(directory, prepared["run_identity"], prepared["evaluation_identity"])
        if team is not None:
            team.announce("fit", metrics is None and engine.run_directory.finished_fit(directory) is None)
        if metrics is not None:
            print(f"{directory} holds this run, finished. Its result:\n")
            dr.execute(["save_best_models"], inputs=options.inputs, overrides=prepared)  # what is asked for besides, or is gone
        else:
            print(*data_lines(options.inputs["data_path"], prepared), sep="\n")
            wanted = [*RESULTS, *(REPORTED if options.start == "base" else []), *left_to_track(dr, tracker, options, prepared)]
            metrics = dr.execute(wanted, inputs=options.inputs, overrides=prepared | drawn(options))["run_metrics"]
        print(table(metrics))
        print(f"\n{metrics['verdict']}\n")
        print(whereabouts(directory, metrics))
        if options.inputs.get("prompt"):
            overrides = {**prepared, "evaluated_adapter": adapter_of(directory, options)}
            reply = dr.execute(["prompt_reply"], inputs=options.inputs, overrides=overrides)["prompt_reply"]
            print("\n" + "\n".join(reply_lines(reply, engine.colors.wants_color(sys.stdout))))
    return directory, metrics


def tracker_of(options: Options) -> Any:
    """What records the run in a Hamilton UI; None where that is not wanted, or, with a warning, where there is none."""
    chosen = options.tracking
    if not chosen.wanted:
        if chosen.url or chosen.project:
            raise UserError("--track-url and --track-project say where a run is recorded. Give --track, too.")
        return None
    from finetune_dataflow import tracking

    named = Path(options.inputs.get("output_dir") or options.inputs["data_path"]).name
    return tracking.hamilton_tracker(
        named, {"start": options.start}, chosen.url or tracking.URL, chosen.project or tracking.PROJECT, chosen.with_data, RESULTS
    )


def left_to_track(dr: Any, tracker: Any, options: Options, prepared: dict[str, Any]) -> list[str]:
    """The nodes that a tracked run computes besides, so that the whole graph is seen; none where nothing is tracked."""
    if tracker is None:
        return []
    from finetune_dataflow import tracking

    later = ["prompt_reply"] if options.inputs.get("prompt") else []
    return tracking.nodes_left(dr, tracker, {*prepared, *RESULTS, *REPORTED, *later})


def drawn(options: Options) -> dict[str, Any]:
    """The drawing of the graph where it holds a user's own nodes; the graph's own node draws only ours."""
    return {"dag_drawing": engine.drawing.svg(dot_source(options.start, options.modules))} if options.modules else {}


def prepared_by(options: Options) -> list[str]:
    """What is made before the fit or the evaluation: read, checked, and counted."""
    return [*PREPARED, *(PREPARED_FIT if options.start == "base" else [])]


def adapter_of(directory: Path, options: Options) -> Path:
    """The adapter of a run: the one it fitted, or the one it was given."""
    return directory / engine.training.BEST if options.start == "base" else Path(options.inputs["adapter_path"])


def reply_lines(reply: PromptReply, in_color: bool) -> list[str]:
    """A prompt and its reply, safe for a terminal; in colours, with what they mean, where wanted and possible."""
    if not (reply.colorize and in_color):
        return [f"> {engine.colors.plain_text(reply.prompt)}", engine.colors.plain_text(reply.text)]
    painted = "".join(engine.colors.colored(each.text, each.probability) for each in reply.tokens)
    return [f"> {engine.colors.plain_text(reply.prompt)}", painted, engine.colors.legend()]


def plan(arguments: Sequence[str]) -> int:
    """Everything before the fit, printed: sources and shapes, the split, the data's quality, the label audit, the steps.

    With --probe a few updates are tried, too, and what the whole fit will take is printed.
    """
    options = parse([word for word in arguments if word != "--probe"])
    probing = "--probe" in arguments
    if probing and options.start != "base":
        raise UserError("--probe tries out a fit, and under start: presaved there is none. Leave it out.")
    check_settings([options])
    prepared = build_driver(options.start, options.modules).execute(prepared_by(options), inputs=options.inputs)
    print(*data_lines(options.inputs["data_path"], prepared), sep="\n")
    print("\nLabels:")
    audit = prepared["label_audit"]
    print(*(f"  {line}" for line in [*audit.lines(), *prepared["hold_out_audit"].lines()]), sep="\n")
    print(f"\n{audit.coloured() if sys.stdout.isatty() else audit.plain()}")
    if options.start == "base":
        print(
            "\n"
            + "\n".join(engine.fit_plan.lines(prepared["fit_settings"], prepared["fit_plan"], prepared["trained_parameters"]))
        )
    if probing:
        from finetune_dataflow.engine.probe import lines, probe

        names = ("base_model_path", "train_tokens", "validation_tokens", "fit_settings", "starting_weights")
        print(*lines(probe(*(prepared[name] for name in names)), prepared["fit_settings"]), sep="\n")
    return 0


def data_lines(data_path: str, prepared: dict[str, Any]) -> list[str]:
    """What was read, what went where, and what is odd in it."""
    shaped = prepared["shaped_rows"]
    lines = [f"{data_path}: {prepared['source_rows'].kind}, rows of the shape {shaped.shape}.", *shaped.notes]
    lines.append(rows_line(prepared["row_ledger"]))
    for reason, rows in prepared["row_ledger"].query("status == 'dropped'").groupby("reason")["row"]:
        named = ", ".join(map(str, rows[:10])) + (f" and {len(rows) - 10} more" if len(rows) > 10 else "")
        lines.append(f"  dropped, {reason}: row{'s' if len(rows) > 1 else ''} {named}")
    return [*lines, *(f"  {line}" for line in prepared["data_quality"].lines())]


def rows_line(ledger: Any) -> str:
    """How many rows went where, and how many were dropped or cut."""
    used = ledger[ledger["status"] == "used"]["set"].value_counts()
    counts = ", ".join(f"{used.get(name, 0)} {name.replace('_', '-')}" for name in ("train", "validation", "hold_out"))
    dropped, cut = int((ledger["status"] == "dropped").sum()), int(ledger["truncated"].sum())
    return f"{len(ledger)} rows: {counts}, {dropped} dropped, {cut} with a shortened prompt."


def table(metrics: dict[str, Any]) -> str:
    """The hold-out's scores of base and tuned model side by side, with the difference and its interval."""
    scores = [*engine.comparison.score_lines(metrics)]
    wide = max(len(label) for label, *_ in scores) + 1
    lines = [f"{'':{wide}}{'base':>9}{'tuned':>9}   tuned - base (95 % interval)"]
    for label, base, tuned, interval in scores:
        line = f"{label:{wide}}{base:9.3f}{tuned:9.3f}"
        if interval is not None:
            line += f"   {interval['mean']:+.3f} ({interval['low']:+.3f} to {interval['high']:+.3f})"
        lines.append(line)
    return "\n".join([f"Scores on {metrics['hold_out_rows']} hold-out rows, which no choice was made on:", *lines])


def whereabouts(directory: Path, metrics: dict[str, Any]) -> str:
    """Where the results are, and what the fit took."""
    if metrics["fit"] is None:
        return f"The report is {directory / 'report.html'}; everything of this evaluation is in {directory}."
    fit = metrics["fit"]
    best = (
        f"best after update {fit['best_step']} of {fit['steps']}"
        if fit["best_step"]
        else f"no update improved the validation {fit['best_metric']}, so the adapter is the one it started from"
    )
    return (
        f"Fit: validation loss {fit['first_validation_loss']:.3f} -> {fit['best_validation_loss']:.3f} ({best}), "
        f"{fit['tokens_per_second']:.0f} tokens/s, peak memory {fit['peak_memory_bytes'] / 2**30:.1f} GiB "
        f"({fit['device']}).\nThe adapter is in {directory / 'adapters'}, the report is {directory / 'report.html'}; "
        f"everything of this run is in {directory}."
    )
