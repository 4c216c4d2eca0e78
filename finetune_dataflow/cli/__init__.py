"""The commands: `finetune-dataflow …`, or `python run.py …` in a checkout."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from finetune_dataflow.errors import UserError, nearest

USAGE = """\
Fine-tune a language model on your own questions and answers, and be told whether it helped.

usage: run.py [COMMAND] [options]

commands:
  train      the main job (also without a command): fit, evaluate base and tuned model, give the verdict
             (as ranks of one fit, on one machine or several: mlx.launch -n 2 -- .venv/bin/python run.py train ...)
  evaluate   evaluate an adapter that was saved before: --adapter DIR
  plan       everything before the fit: what was read, the split, the data's quality, what is learned
             (--probe: try a few updates, and say what memory and time the fit will take)
  prompt     one prompt to the base or a tuned model, or a conversation: -p TEXT, -a ADAPTER or --run DIR, --compare
             (prompt --help: its own options)
  compare    finished or unfinished runs side by side: RUN RUN ... [--out FILE.html]
  export     a tuned model for other tools, read back and scored: --adapter DIR --to KIND --out DIR
             (export --help: the kinds, its own options)
  sweep      a search for good settings by a Weights & Biases sweep file, without an account: FILE.yaml --out DIR
             (sweep --help: its own options)
  ui         the Hamilton UI on this machine alone, for the runs of `train --track` (ui --help: its own options)
  prepare    write the prepared data for another trainer: --to mlx|hf|parquet --out DIR (docs/prepare.md)
  inputs     every input with its type, default and meaning (--markdown: as a table)
  convert    weights of mlx-tuning-fork or old mlx-lm as safetensors: ADAPTERS.npz ADAPTERS.safetensors
  graph      draw the dataflow as an SVG: --start base|presaved --out FILE

options of train, evaluate, plan and prepare:
  --data FILE                  the data: JSON, CSV, Parquet, a directory, a URL (default: the example, where none is named)
  --input-text-key KEY         the key of the text that the model is given
  --output-text-key KEY        the key of the text that it learns to reply
  --NAME VALUE                 any input, as `run.py inputs` lists them; --set NAME=VALUE is the same
  -c, --config FILE            inputs from a YAML file, mlx-lm's and mlx-tuning-fork's keys included; options beside it win;
                               several -c are trained one after another, each from the adapter before it
  --start base|presaved        fit, then evaluate (default), or evaluate the adapter in --adapter-path
  --out DIR                    the directory of the run (default: runs/<data file>-<fingerprint>)
  --module FILE                a Python file whose functions are added to the graph or take the place of its nodes
  --no-cache                   compute everything, whatever earlier runs left in the user's cache directory, and keep no replies
  --track                      record the run in the Hamilton UI that `run.py ui` starts (--track-url, --track-project: another);
                               no text of the data is sent, unless --track-data is said
  --allow-code                 let a YAML replace nodes by functions that it names
  -h, --help                   this text
"""

COMMANDS = ("train", "evaluate", "plan", "prompt", "compare", "export", "sweep", "ui", "prepare", "inputs", "convert", "graph")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, or 2 for a mistake of the user's, which is told without a traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _quiet_libraries()
    try:
        return _run(arguments)
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `run.py inputs | head`
        sys.stderr.close()
        return 0
    except KeyboardInterrupt as stopped:
        print(str(stopped) or "Stopped.", file=sys.stderr)
        return 130


def _run(arguments: list[str]) -> int:
    if arguments[:1] == ["prompt"]:  # these have a help of their own
        from finetune_dataflow.cli.prompt import prompt

        return prompt(arguments[1:])
    if arguments[:1] == ["compare"]:
        from finetune_dataflow.cli.compare import compare

        return compare(arguments[1:])
    if arguments[:1] == ["export"]:
        from finetune_dataflow.cli.export import export

        return export(arguments[1:])
    if arguments[:1] == ["sweep"]:
        from finetune_dataflow.cli.sweep import sweep

        return sweep(arguments[1:])
    if arguments[:1] == ["ui"]:
        from finetune_dataflow.cli.ui import ui

        return ui(arguments[1:])
    if "-h" in arguments or "--help" in arguments or arguments[:1] == ["help"]:
        print(USAGE, end="")
        return 0
    command = arguments.pop(0) if arguments and not arguments[0].startswith("-") else "train"
    if command not in COMMANDS:
        raise UserError(f"Unknown command {command!r}.{nearest(command, COMMANDS)} The commands are {', '.join(COMMANDS)}.")
    # Imported here, so that --help answers without loading the dataflow.
    if command == "inputs":
        from finetune_dataflow.cli.inputs import print_inputs

        return print_inputs(arguments)
    if command == "convert":
        from finetune_dataflow.cli.convert import convert

        return convert(arguments)
    if command == "graph":
        from finetune_dataflow.cli.graph import draw

        return draw(arguments)
    if command == "prepare":
        from finetune_dataflow.cli.prepare import prepare

        return prepare(arguments)
    from finetune_dataflow.cli.train import plan, train

    if command == "plan":
        return plan(arguments)
    return train(arguments, "presaved" if command == "evaluate" else None)


def _quiet_libraries() -> None:
    """Show our own log lines only; other libraries keep theirs for the debugger. Must run before they are imported."""
    os.environ.setdefault("HAMILTON_AUTOLOAD_EXTENSIONS", "0")  # a second of imports that nothing here uses
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("finetune_dataflow").setLevel(logging.INFO)
    # A failing node is told by our own message, or by Python's traceback; Hamilton's banner would bury both.
    logging.getLogger("hamilton").setLevel(logging.CRITICAL + 1)
