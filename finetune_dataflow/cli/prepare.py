"""`run.py prepare`: the prepared data for another trainer."""

from __future__ import annotations

from collections.abc import Sequence

from finetune_dataflow.cli.options import FLAGS, build_driver, parse
from finetune_dataflow.cli.train import check_settings, data_lines
from finetune_dataflow.engine import prepared, run_directory
from finetune_dataflow.engine.settings import all_of, require_choice
from finetune_dataflow.errors import UserError

TOKENS = {name: f"{name}_tokens" for name in prepared.SETS}
CONVERSATIONS = {name: f"{name}_conversations" for name in prepared.SETS}
NODES = [
    "source_rows", "shaped_rows", "row_ledger", "data_quality", "dataset_fingerprint", "preparation_settings",
    "tokenization_settings", "base_model_path", "chat_template", *TOKENS.values(), *CONVERSATIONS.values(),
]  # fmt: skip


def prepare(arguments: Sequence[str]) -> int:
    """Prepare the data as a fit is given it, and write it: `--to mlx|hf|parquet --out DIR`, with the options of train."""
    own, others = _own_options(arguments)
    kind, out = own.get("to", ""), own.get("out", "")
    all_of(lambda: _check_kind(kind), lambda: _check_out(out))
    directory = prepared.destination(out)
    options = parse(others)
    check_settings([options])
    made = build_driver(options.start, options.modules).execute(NODES, inputs=options.inputs)
    print(*data_lines(options.inputs["data_path"], made), sep="\n")
    tokens = {name: made[node] for name, node in TOKENS.items()}
    fingerprints = {
        "dataset": made["dataset_fingerprint"],
        **{f"{name}_set": each.fingerprint() for name, each in tokens.items()},
    }
    data = prepared.PreparedSets(
        tokens,
        {name: made[node] for name, node in CONVERSATIONS.items()},
        made["base_model_path"],
        bool(made["chat_template"]),
        made["tokenization_settings"],
        run_directory.run_identity(made["preparation_settings"], fingerprints),
    )
    print()
    if prepared.is_there(directory, kind, data):
        print(f"{directory} holds this preparation already.")
    else:
        print(*prepared.write(directory, kind, data), sep="\n")
    return 0


def _check_kind(kind: str) -> None:
    if not kind:
        raise UserError(f"--to is missing. Expected one of {', '.join(map(repr, prepared.KINDS))}.")
    require_choice("--to", kind, prepared.KINDS)


def _check_out(out: str) -> None:
    if not out:
        raise UserError("--out is missing. Expected the name of a directory that is empty or absent.")


def _own_options(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The values of --to and --out by name, and every other word in its place."""
    own: dict[str, str] = {}
    others: list[str] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        name, separator, value = word.partition("=")
        takes_next = word.startswith("-") and not separator and word not in FLAGS
        if name not in {"--to", "--out"}:
            others += [word, *(words[:1] if takes_next else [])]
            del words[: int(takes_next)]
            continue
        if name[2:] in own:
            raise UserError(f"{name} is given twice.")
        if not separator and not words:
            raise UserError(f"{name} needs a value.")
        own[name[2:]] = value if separator else words.pop(0)
    return own, others
