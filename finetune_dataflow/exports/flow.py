"""The nodes of an export, on top of the dataflow's own under start="presaved": from an adapter to files that were read back."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from finetune_dataflow import engine
from finetune_dataflow.caching import computed_anew
from finetune_dataflow.embedded_model import EMBEDDED_MODEL_ID
from finetune_dataflow.engine.chat import Conversation
from finetune_dataflow.engine.settings import GenerationSettings, PromptSettings
from finetune_dataflow.engine.tokens import TokenColumns
from finetune_dataflow.errors import UserError
from finetune_dataflow.exports import building, card, gate, hub, readers, rows
from finetune_dataflow.exports.card import Lineage
from finetune_dataflow.exports.gate import Gate, Scores
from finetune_dataflow.exports.rows import GateRow
from finetune_dataflow.exports.settings import ExportSettings, GateSettings, export_kind, slug

MANIFEST = "export.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Export:
    """A finished export: its directory, the gate's scores, and what is to be said of it, a line each."""

    directory: Path
    gate: Gate
    lines: tuple[str, ...]
    pushed: tuple[str, ...] = ()


@computed_anew
def gate_settings(
    gate_rows: int = 20,
    max_kl: float = 0.02,
    min_top1: float = 0.95,
    max_rouge_loss: float = 0.05,
    check_with: str = "",
    force: bool = False,
) -> GateSettings:
    """What an export must reach beside the adapter-loaded model.

    Inputs:
        gate_rows: How many hold-out rows the export is scored on, spread over all of them.
        max_kl: The most that its next-token distributions may diverge, in nats, in the mean over the supervised places.
        min_top1: The least share of these places with the same most probable token.
        max_rouge_loss: By how much the mean ROUGE-L of its greedy replies may be lower.
        check_with: A Python that has torch and transformers, peft or xllamacpp, to read the export by these, too; empty for
            the one that runs this.
        force: Whether an export that does not reach this is written all the same.
    """
    return GateSettings(gate_rows, max_kl, min_top1, max_rouge_loss, check_with, force)


@computed_anew
def export_settings(
    gate_settings: GateSettings,
    to: str = "",
    export_path: str = "",
    gguf_type: str = "f16",
    quantized: str = "dequantize",
    min_kept: float = 0.8,
    ollama_name: str = "",
    ollama_base: str = "",
    base_name: str = "",
    hub_id: str = "",
    hub_kind: str = "",
    private: bool = False,
    dry_run: bool = False,
    license: str = "",
    intended_use: str = "",
) -> ExportSettings:
    """What is exported, and where to.

    Inputs:
        to: What is written: fused, peft, gguf, gguf-lora, ollama, or hub.
        export_path: The directory of the export: absent, empty, or an earlier export.
        gguf_type: The type of a GGUF file's matrices: f16 or q8_0.
        quantized: What becomes of a quantised base model when it is fused: dequantize or requantize.
        min_kept: The least share of the learned change that each fused weight must keep.
        ollama_name: The model's name in Ollama; empty for the directory's.
        ollama_base: A model in Ollama that the adapter is put on, instead of a fused one.
        base_name: The base model's repository, as PEFT is to load it; empty for the one that is known.
        hub_id: The repository to push to, as owner/name.
        hub_kind: What is pushed: fused (default), peft, gguf or gguf-lora.
        private: Whether a repository that is made for it is private.
        dry_run: Whether it is only told what would be pushed.
        license: The licence's identifier for the model card; empty for the base model's, where its directory says it.
        intended_use: What the model is for, in a sentence or two for its card.

    Raises UserError, a line for each value that is not right.
    """
    made: list[str] = []
    engine.settings.all_of(
        lambda: made.append(export_kind(to, hub_kind, hub_id)),
        lambda: engine.settings.require_choice("gguf_type", gguf_type, ("f16", "q8_0")),
        lambda: engine.settings.require_choice("quantized", quantized, ("dequantize", "requantize")),
        lambda: engine.settings.require("min_kept", min_kept, 0 <= min_kept <= 1, "a share from 0 to 1"),
        lambda: engine.settings.require("out", export_path, bool(export_path), "the directory of the export"),
        lambda: card.check_licence(license),
    )
    out = engine.files.user_path(export_path).absolute()
    name = ollama_name or slug(out.resolve().name).lower()
    if to == "ollama":
        engine.ollama.check_name(name, "ollama_name")
        if ollama_base:
            engine.ollama.check_name(ollama_base, "ollama_base")
    return ExportSettings(
        made[0], out, gate_settings, gguf_type, quantized, min_kept, name, ollama_base if to == "ollama" else "",
        hub_id, private, dry_run, base_name, license, intended_use,
    )  # fmt: skip


def gate_rows_used(
    hold_out_tokens: TokenColumns,
    hold_out_conversations: Sequence[Conversation],
    hold_out_rows: pd.DataFrame,
    gate_settings: GateSettings,
) -> list[GateRow]:
    """The hold-out rows that the export is scored on."""
    return rows.gate_rows(hold_out_tokens, hold_out_conversations, hold_out_rows, gate_settings.rows)


@computed_anew
def export_lineage(
    base_model_name: str,
    base_model_path: Path,
    base_model_fingerprint: str,
    evaluated_adapter: Path,
    dataset_fingerprint: str,
    export_settings: ExportSettings,
) -> Lineage:
    """What the export is made of, and what the adapter's run says of it."""
    run, metrics = card.run_files(evaluated_adapter)
    fingerprints = {
        "base model": base_model_fingerprint,
        "adapter": engine.adapters.adapter_fingerprint(evaluated_adapter),
        "data": dataset_fingerprint,
    }
    licence = card.licence(export_settings.licence, base_model_path, base_model_name == EMBEDDED_MODEL_ID)
    local = engine.files.user_path(base_model_name)  # of this machine alone
    name = export_settings.base_name or (local.name if local.exists() else base_model_name)
    return Lineage(name, fingerprints, run, metrics, licence, bool(export_settings.licence))


@computed_anew
def export(
    export_settings: ExportSettings,
    base_model_path: Path,
    evaluated_adapter: Path,
    chat_template: str,
    prompt_settings: PromptSettings,
    hold_out_conversations: Sequence[Conversation],
    gate_rows_used: list[GateRow],
    generation_settings: GenerationSettings,
    export_lineage: Lineage,
) -> Export:
    """The export: written, read back, scored beside the adapter-loaded model, described, and put in place, or not at all.

    Raises UserError for what cannot be exported, before any work; and where the gate is not reached and `force` is not given.
    """
    settings = export_settings
    check_out(settings.out, evaluated_adapter, base_model_path)
    if settings.gate.check_with:
        readers.installed(settings.gate.check_with)
    source = building.tuned(base_model_path, evaluated_adapter, chat_template, prompt_settings, hold_out_conversations)
    building.check(settings, source)
    if settings.hub_id:
        hub.check_base(settings.kind, settings.base_name, building.base_name(source))
    with _made(settings.out) as (directory, scratch):
        built = building.build(settings, source, directory, scratch)
        found = _scored(settings, source, built, gate_rows_used, generation_settings, scratch)
        if found.failures and not settings.gate.force:
            refused = "\n".join(f"  {each}" for each in found.failures)
            table = "\n".join(found.lines())
            raise UserError(
                f"The export does not do what the adapter-loaded model does, so it was not written:\n{refused}\n\n{table}\n\n"
                "Another kind or type may keep more; --force true writes it all the same."
            )
        _describe(settings, directory, export_lineage, found, built)
        if settings.hub_id:  # what the fit has seen, as hashes, is of use on this machine alone
            (directory / engine.adapters.USED_INPUTS).unlink(missing_ok=True)
    pushed = hub.push(settings.out, settings.hub_id, settings.private, settings.dry_run) if settings.hub_id else []
    return Export(settings.out, found, built.lines, tuple(pushed))


def export_table(export: Export) -> pd.DataFrame:
    """The gate's table, a row for each tool that read the export."""
    return pd.DataFrame([each.__dict__ for each in export.gate.scores])


def _scored(
    settings: ExportSettings,
    source: building.Tuned,
    built: building.Built,
    used: list[GateRow],
    generation: GenerationSettings,
    scratch: Path,
) -> Gate:
    """The export by every tool that is at hand."""
    reference = gate.Reference(readers.MlxReader(source.base, source.adapter), used, source.encoder, generation)
    outside, notes = readers.outside_readers(settings.gate.check_with, built.outside, scratch)
    if not reference.prompted:  # nothing to generate: who tells no distributions either has nothing to say
        notes += [f"not read by {each.tool}: the rows have no prompts" for each in outside if each.tool == "llama.cpp"]
        outside = [each for each in outside if each.tool != "llama.cpp"]
    scores: list[Scores] = []
    unread: list[str] = []
    every: list[readers.Reader] = [readers.MlxReader(built.base, built.adapter), *outside]
    for reader in every:
        logger.info("%s reads the export.", reader.name)
        try:
            scores.append(reference.scores(reader))
        except UserError as error:
            if not isinstance(reader, readers.OutsideReader):
                raise
            unread.append(str(error))
    failures = [*(failure for each in scores for failure in each.failures(settings.gate)), *unread]
    failures += [*_prompt_failures(source, built, used), *_end_failures(source, built, settings.made)]
    return Gate(tuple(scores), tuple(failures), tuple(notes))


def _prompt_failures(source: building.Tuned, built: building.Built, used: list[GateRow]) -> list[str]:
    """Rows whose prompt the export's own tokenizer and chat template write otherwise than the training did."""
    if built.tokenizer is None or not any(row.prompt for row in used):
        return []
    encoder = engine.chat.load_encoder(built.tokenizer)
    whole = [row for row in used if row.whole and row.conversation.prompt]
    other = [row.row for row in whole if tuple(encoder.prompt_ids(row.conversation.prompt, row.conversation.tools)) != row.prompt]
    if not other:
        return []
    return [f"its tokenizer and chat template write the prompt of row {other[0]} otherwise than training did ({len(other)} rows)"]


def _end_failures(source: building.Tuned, built: building.Built, made: str) -> list[str]:
    """Whether generation with a whole model ends at the token that training ended replies with."""
    ends = building.ends_of(built, made)
    wanted = source.encoder.end_of_turn_ids[-1]
    if ends is None or wanted in ends:
        return []
    return [f"generation would not end at the token {wanted}, with which training ended every reply, but at {sorted(ends)}"]


def _describe(settings: ExportSettings, directory: Path, lineage: Lineage, found: Gate, built: building.Built) -> None:
    """The model card, and the same for machines."""
    name = "MODEL_CARD.md" if settings.kind == "ollama" else "README.md"
    (directory / name).write_text(card.model_card(settings, lineage, found, built), encoding="utf-8")
    values: dict[str, Any] = {
        "kind": settings.kind, "base_model": lineage.base_name, "fingerprints": lineage.fingerprints, "gate": found.values,
        "survival": built.survival, "licence": lineage.licence, "verdict": lineage.metrics.get("verdict"),
        "files": sorted(each.name for each in directory.iterdir()),
    }  # fmt: skip
    engine.files.write_json(directory / MANIFEST, values)


def check_out(out: Path, *sources: Path) -> None:
    """Raise UserError where `out` is no place for an export: a file, a directory with other things in it, or one of `sources`."""
    if not out.name or out.name == ".." or out.is_mount():
        raise UserError(f"--out {str(out)!r} cannot be made or replaced. Name a directory of its own.")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {str(out)!r} is a file. Name a directory.")
    for each in sources:
        if each.resolve().is_relative_to(out.resolve()):
            raise UserError(f"--out {str(out)!r} holds {each}, of which the export is made. Name another directory.")
    with engine.files.writing(out):
        found = {each.name for each in out.iterdir()} if out.is_dir() else set()
    others = sorted(found - _written(out / MANIFEST)) if found else []
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise UserError(
            f"--out {str(out)!r} is not empty and holds no export alone: {', '.join(others[:3])}{more}. Name another directory."
        )


def _written(manifest: Path) -> set[str]:
    """The names that an earlier export says it wrote; none where it is no export's manifest."""
    try:
        said = json.loads(manifest.read_text(encoding="utf-8"))
        return {manifest.name, *map(str, said["files"])} if {"kind", "gate"} <= said.keys() else set()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()


@contextmanager
def _made(out: Path) -> Iterator[tuple[Path, Path]]:
    """Where the export is written, and a scratch directory; the first takes its place when the block ends well."""
    with engine.files.writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    made, earlier = place / "made" / out.name, place / "earlier"
    try:
        with engine.files.writing(out):
            made.parent.mkdir()
            (place / "scratch").mkdir()
            yield made, place / "scratch"
            engine.files.flush_tree(made)
            if out.is_dir():
                out.rename(earlier)
            made.rename(out)
    finally:
        if earlier.is_dir() and not out.exists():
            earlier.rename(out)
        shutil.rmtree(place, ignore_errors=True)
