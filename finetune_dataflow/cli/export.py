"""`run.py export`: a tuned model for other tools, read back and scored before it is put in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finetune_dataflow.errors import UserError, nearest

HELP = """\
Write a tuned model for other tools. Each export is read back, scored on hold-out rows beside the adapter-loaded model, and put
in place with a model card only where nothing of what was learned is lost.

usage: run.py export --adapter DIR --to KIND --out DIR [options]

  --adapter DIR            the adapter, in mlx-lm's layout or PEFT's; --run DIR for a run's
  --to KIND                fused      a whole model in safetensors, for mlx-lm and transformers
                           peft       an adapter in PEFT's layout
                           gguf       a whole model as a GGUF file, for llama.cpp and what is built on it
                           gguf-lora  the adapter as a GGUF file (LoRA only)
                           ollama     a directory with a Modelfile, for `ollama create`
                           hub        pushed to the Hugging Face hub, where a token is at hand
  --out DIR                the export's directory: absent, empty, or an earlier export, which is replaced

hold-out rows, for the gate (default: those of the run that the adapter lies in):
  --run DIR, -c FILE       the run, or a YAML file of its inputs
  --data FILE, --NAME VALUE, --set NAME=VALUE, --module FILE
                           any input that shapes rows, prompts and replies, as in evaluate

the gate (docs/exports.md):
  --gate-rows N            on how many rows (default: 20)
  --max-kl NATS            the most that next-token distributions may diverge, in the mean (default: 0.02)
  --min-top1 SHARE         the least share of places with the same most probable token (default: 0.95)
  --max-rouge-loss SHARE   by how much the ROUGE-L of the replies may be lower (default: 0.05)
  --check-with PYTHON      a Python with torch and transformers, peft or xllamacpp: the export is read by these, too
  --force                  write an export that does not reach this

kinds:
  --gguf-type f16|q8_0     the type of the matrices (default: f16)
  --quantized HOW          a quantised base model is fused: dequantize (default), or requantize (touched layers at 8 bits)
  --min-kept SHARE         the least share of the learned change that each fused weight must keep (default: 0.8)
  --base-name OWNER/NAME   the base model's repository, as PEFT is to load it
  --ollama-name NAME       the model's name in Ollama (default: the directory's)
  --ollama-base NAME       put the adapter on this model of Ollama's, instead of fusing it
  --hub-id OWNER/NAME      the repository to push to; --hub-kind fused|peft|gguf|gguf-lora, --private, --dry-run
  --license ID             for the model card (default: the base model's); --intended-use TEXT
  -h, --help               this text
"""
FLAGS = ("force", "dry_run", "private", "allow_code")


def export(arguments: Sequence[str]) -> int:
    """Export an adapter. Returns 0; raises UserError for a mistake of the user's, and where the gate is not reached."""
    if {"-h", "--help"} & {*arguments}:
        print(HELP, end="")
        return 0
    dr, inputs = _asked_for(arguments)
    from finetune_dataflow.exports import flow

    settings = dr.execute(["export_settings"], inputs=inputs)["export_settings"]
    flow.check_out(settings.out)
    found = dr.execute(["export"], inputs=inputs)["export"]
    print(f"{inputs['adapter_path']} -> {found.directory} ({settings.kind})")
    print(*(f"  {each}" for each in found.lines), sep="\n")
    print(f"\nOn {found.gate.scores[0].rows} hold-out rows, beside the adapter-loaded model:")
    print(*found.gate.lines(), sep="\n")
    print(*found.gate.notes, sep="\n")
    if found.gate.failures:
        print("\nWritten, although it does not reach the gate:", *(f"  {each}" for each in found.gate.failures), sep="\n")
    card = "MODEL_CARD.md" if settings.kind == "ollama" else "README.md"
    print(f"\nThe model card is {found.directory / card}; the same for machines is {found.directory / flow.MANIFEST}.")
    if found.pushed:
        print("", *found.pushed, sep="\n")
    return 0


def _asked_for(arguments: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """The driver with the nodes of an export, and its inputs. Raises one UserError with a line for every problem."""
    # Imported here, so that --help answers without loading the dataflow.
    from finetune_dataflow.cli.modules import own_modules
    from finetune_dataflow.cli.options import build_driver, graph_inputs
    from finetune_dataflow.cli.prompt_options import file_of, read, values_of_file
    from finetune_dataflow.exports import flow

    line = read(arguments, FLAGS, "The adapter is given with --adapter, what is written with --to, where to with --out.")
    if "output_dir" in line.given:
        line.given["export_path"] = line.given.pop("output_dir")
    _take_run(line)
    label, file = file_of(line)
    dr = build_driver("presaved", [*own_modules(line.modules, None, line.allow_code), flow])
    known = {**graph_inputs(build_driver("base")), **graph_inputs(dr)}
    upstream = dr.what_is_upstream_of("export")
    owners = {each.name: known[each.name] for each in upstream if each.is_external_input and each.name in known}
    problems: list[str] = []
    values = values_of_file(file, label, owners, known.keys(), problems, from_line_alone=())
    values |= _values_of_line(line.given, owners, problems)
    problems += (
        [] if "adapter_path" in values else ["--adapter is missing. Expected an adapter's directory, or --run for a run's."]
    )
    if "data_path" not in values:
        problems.append("The gate needs hold-out rows. Name the run with --run, or its data with --data and what shaped it.")
    if problems:
        raise UserError("\n".join(problems))
    return dr, _with_base(values)


def _with_base(values: dict[str, Any]) -> dict[str, Any]:
    """The inputs with the base model that the adapter names, where none is given."""
    from finetune_dataflow.engine.adapters import check_adapter
    from finetune_dataflow.engine.files import user_path

    made_for = check_adapter(user_path(values["adapter_path"])).get("model")
    return {**({"model_id": made_for} if isinstance(made_for, str) and made_for else {}), **values}


def _take_run(line: Any) -> None:
    """Where an adapter lies in a run, and nothing else is named, the run's file of inputs is meant."""
    from finetune_dataflow.engine.files import user_path

    adapter = line.given.get("adapter_path")
    if adapter and "run" not in line.given and line.config is None:
        path = user_path(adapter).resolve().parent / "config.yaml"
        if path.is_file():
            line.config = str(path)


def _values_of_line(given: dict[str, str], owners: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """The values on the command line, with their types."""
    from finetune_dataflow.cli.options import ALIASES, coerced

    values: dict[str, Any] = {}
    for name, word in given.items():
        if name == "run":
            continue
        option = f"--{name.replace('_', '-')}"
        try:
            if name not in owners:
                close = nearest(name, [*owners, *ALIASES, "config", "run", "module", "out"])
                raise UserError(f"Unknown option {option!r}.{close} `run.py export --help` lists all.")
            values[name] = coerced(owners[name], word)
        except UserError as error:
            problems.append(str(error))
    return values
