"""What is exported, where to, and what the gate asks of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from finetune_dataflow.engine.settings import all_of, require, require_choice
from finetune_dataflow.errors import UserError

KINDS = ("fused", "peft", "gguf", "gguf-lora", "ollama", "hub")
HUB_KINDS = ("fused", "peft", "gguf", "gguf-lora")  # what a repository on the hub may hold
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


@dataclass(frozen=True)
class GateSettings:
    """What an export must reach on K hold-out rows beside the adapter-loaded model.

    max_kl: the mean KL divergence of the next-token distributions, in nats. min_top1: the share of supervised positions with
    the same most probable token. max_rouge_loss: by how much the mean ROUGE-L of the greedy replies may be lower.
    check_with: a Python that has other tools to read the export by; empty for this one.
    """

    rows: int
    max_kl: float
    min_top1: float
    max_rouge_loss: float
    check_with: str
    force: bool

    def __post_init__(self) -> None:
        """Raise UserError naming every value out of range."""
        all_of(
            lambda: require("gate_rows", self.rows, self.rows >= 1, "a whole number, 1 or more"),
            lambda: require("max_kl", self.max_kl, self.max_kl >= 0, "a number of nats, 0 or more"),
            lambda: require("min_top1", self.min_top1, 0 <= self.min_top1 <= 1, "a share from 0 to 1"),
            lambda: require("max_rouge_loss", self.max_rouge_loss, 0 <= self.max_rouge_loss <= 1, "a share from 0 to 1"),
        )


@dataclass(frozen=True)
class ExportSettings:
    """One export. `kind` is what is written, `hub_id` the repository that it is pushed to; empty for none."""

    kind: str
    out: Path
    gate: GateSettings
    gguf_type: str
    quantized: str
    min_kept: float
    ollama_name: str
    ollama_base: str
    hub_id: str
    private: bool
    dry_run: bool
    base_name: str
    licence: str
    intended_use: str

    @property
    def made(self) -> str:
        """What is made by the way: a model for Ollama is a GGUF file first."""
        if self.kind == "ollama":
            return "gguf-lora" if self.ollama_base else "gguf"
        return self.kind


def export_kind(to: str, hub_kind: str, hub_id: str) -> str:
    """What is written for `--to`. Raises UserError for an unknown kind, and for a repository that is missing or misplaced."""
    if not to:
        raise UserError(f"--to is missing. Expected one of {', '.join(KINDS)}.")
    require_choice("--to", to, KINDS)
    if to != "hub":
        if hub_id or hub_kind:
            raise UserError(f"--hub-id and --hub-kind are for --to hub, found --to {to}.")
        return to
    require_choice("--hub-kind", hub_kind or "fused", HUB_KINDS)
    if not _REPOSITORY.fullmatch(hub_id) or len(hub_id) > 96 or re.search(r"--|\.\.|[-.]$|[-.]/|\.git$", hub_id):
        raise UserError(f"--hub-id={hub_id!r}: expected the repository to push to, as owner/name.")
    return hub_kind or "fused"


def slug(name: str) -> str:
    """A name as it may stand in file names and commands: letters, digits, '-', '_' and '.'."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "model"
