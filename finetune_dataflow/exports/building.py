"""From base model and adapter to the files of an export, and how each is read back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any, cast

from finetune_dataflow.engine import ollama
from finetune_dataflow.engine.adapters import check_adapter
from finetune_dataflow.engine.chat import ChatEncoder, Conversation, load_encoder
from finetune_dataflow.engine.control_strings import Message
from finetune_dataflow.engine.fused import Quantized, fuse, stop_ids
from finetune_dataflow.engine.gguf import convert_gguf
from finetune_dataflow.engine.gguf_reading import ends_said, read_lora, read_model, says_bos
from finetune_dataflow.engine.gguf_tokenizer import adds_bos, gguf_tokenizer
from finetune_dataflow.engine.gguf_writer import GgufModel, Kind, check_architecture, write_gguf, write_lora_gguf
from finetune_dataflow.engine.go_template import GoTemplate, prove, translate
from finetune_dataflow.engine.peft_layout import in_mlx_layout, write_peft
from finetune_dataflow.engine.peft_writing import base_name_of
from finetune_dataflow.engine.settings import PromptSettings
from finetune_dataflow.errors import UserError
from finetune_dataflow.exports.settings import ExportSettings, slug

# Of these architectures, without a scaled rotary embedding, transformers' GGUF loader computes what the file says
# (docs/fused-and-gguf.md).
IN_TRANSFORMERS = ("llama", "mistral", "qwen2", "gemma3_text", "phi3")


@dataclass(frozen=True)
class Tuned:
    """What is exported: base model and adapter (mlx-lm's layout), and how training wrote a conversation.

    chat_template: empty for the tokenizer's own. conversations: those of the hold-out.
    """

    base: Path
    adapter: Path
    chat_template: str
    prompts: PromptSettings
    conversations: Sequence[Conversation]

    @property
    def encoder(self) -> ChatEncoder:
        """The encoder of training."""
        return load_encoder(self.base, self.chat_template)

    @property
    def system(self) -> str:
        """The system text of every conversation; empty where they have none, or not all the same."""
        return system_text(self.conversations)


@dataclass(frozen=True)
class Built:
    """An export as it was written: how mlx-lm reads it back, how other tools do, and what is to be said of it.

    base, adapter: what mlx-lm loads; tokenizer: the directory that has the export's tokenizer and chat template, None where
    it has none. file: the GGUF file. outside: (tool, what it reads). survival: of each changed weight, where weights were merged.
    """

    base: Path
    adapter: Path | None
    tokenizer: Path | None
    outside: tuple[tuple[str, dict[str, str]], ...]
    lines: tuple[str, ...] = ()
    survival: dict[str, Any] = field(default_factory=dict)
    use: str = ""
    file: Path | None = None


def tuned(base: Path, adapter: Path, chat_template: str, prompts: PromptSettings, conversations: Sequence[Conversation]) -> Tuned:
    """What is exported, the adapter brought into mlx-lm's layout."""
    return Tuned(base, in_mlx_layout(adapter, base), chat_template, prompts, conversations)


def check(settings: ExportSettings, source: Tuned) -> GoTemplate | None:
    """Raise UserError for what cannot be exported, before any weight is computed; the Go template where one is asked for."""
    method = check_adapter(source.adapter).get("fine_tune_type", "lora")
    if settings.made == "gguf-lora" and method != "lora":
        raise UserError(
            f"--to {settings.kind}: an adapter of fine_tune_type={method!r} has no GGUF of its own. Fuse it: --to gguf."
        )
    if settings.made == "gguf-lora" and _quantized(source.base):
        raise UserError(f"The base model in {source.base} is quantised by another scheme than GGUF's. Export with --to gguf.")
    if settings.made.startswith("gguf"):
        check_architecture(source.base)
    if settings.made.startswith("gguf") and not _quantized(source.base):
        model = GgufModel(source.base)
        model.tensors("f16")
        if settings.made == "gguf":
            gguf_tokenizer(source.base, model.rows)
    if settings.kind == "ollama":
        return go_template(source, source.encoder, adds_bos(source.base))
    return None


def build(settings: ExportSettings, source: Tuned, out: Path, scratch: Path) -> Built:
    """Write the export into the new directory `out`. What is only there to make or read it stands in `scratch`."""
    made = {"fused": _fused, "peft": _peft, "gguf": _gguf, "gguf-lora": _lora_gguf}[settings.made](settings, source, out, scratch)
    return _ollama(settings, source, made, out) if settings.kind == "ollama" else made


def go_template(source: Tuned, encoder: ChatEncoder, adds_bos: bool) -> GoTemplate:
    """The chat template for Ollama, proven on the hold-out's conversations; what was proven is the last of its notes.

    adds_bos: whether the GGUF file that Ollama reads says that a beginning of sequence is put before a text.
    """
    tokenizer = encoder.tokenizer
    prompts = [cast(Sequence[Message], each.prompt) for each in source.conversations]
    translated = translate(
        str(tokenizer.chat_template),
        tokenizer.special_tokens_map,
        adds_bos=adds_bos,
        control_strings=encoder.control_strings,
        today=date.today(),
        default_system="" if ollama.fits_modelfile(source.system) else source.system,
    )
    proof = prove(translated, encoder.rendered, [[dict(message) for message in each] for each in prompts])
    return replace(translated, notes=(*translated.notes, proof.sentence))


def ends_of(built: Built, made: str) -> frozenset[int] | None:
    """The tokens at which an export itself says that generation ends; None where it is an adapter, which says nothing of it."""
    if made == "fused":
        return stop_ids(built.base)
    return ends_said(built.file) if built.file is not None and made == "gguf" else None


def base_name(source: Tuned) -> str:
    """What an adapter in PEFT's layout names as its base model: a repository where one is known, else a directory."""
    return base_name_of(source.base, check_adapter(source.adapter))


def system_text(conversations: Sequence[Conversation]) -> str:
    """The text of the system message that every conversation begins with; empty where they do not, or with different ones."""
    found = {
        str(each.prompt[0]["content"]) if each.prompt and each.prompt[0]["role"] == "system" else "" for each in conversations
    }
    return found.pop() if len(found) == 1 else ""


def _fused(settings: ExportSettings, source: Tuned, out: Path, scratch: Path) -> Built:
    template = source.chat_template
    kept = cast(Quantized, settings.quantized)
    report = fuse(
        source.base, source.adapter, out,
        quantized=kept, threshold=settings.min_kept, force=settings.gate.force, chat_template=template,
    )  # fmt: skip
    judged = report.judged
    survival = {
        "asked": report.threshold,
        "least": judged[0].share if judged else 1.0,
        "weights": {
            each.name: {"change": each.relative_change, "kept": each.share, "stored_as": each.stored_as} for each in report.layers
        },
    }
    outside = (("transformers", {"model": str(out)}),) if "transformers" in report.loads_in else ()
    use = f"```sh\nmlx_lm.generate --model {out.name} --prompt 'Hello'\n```\n\nIt loads in {' and '.join(report.loads_in)}."
    return Built(out, None, out, outside, tuple(report.lines()[1:]), survival, use)


def _peft(settings: ExportSettings, source: Tuned, out: Path, scratch: Path) -> Built:
    write_peft(source.adapter, source.base, out, base_name=settings.base_name)
    if source.chat_template:
        (out / "chat_template.jinja").write_text(source.chat_template, encoding="utf-8")
    config = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))
    outside = () if _quantized(source.base) else (("peft", {"model": str(source.base), "adapter": str(out)}),)
    use = (
        "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f"base = AutoModelForCausalLM.from_pretrained({config['base_model_name_or_path']!r})\n"
        f"model = PeftModel.from_pretrained(base, {out.name!r})\n```"
    )
    lines = [f"base model for PEFT: {config['base_model_name_or_path']}"]
    if not outside:
        lines.append("not read by PEFT, which puts the adapter on the model before it was quantised: close to this, not the same")
    return Built(source.base, in_mlx_layout(out, source.base), None, outside, tuple(lines), {}, use)


def _gguf(settings: ExportSettings, source: Tuned, out: Path, scratch: Path) -> Built:
    fused = scratch / "fused"
    merged = _fused(replace(settings, quantized="dequantize"), source, fused, scratch)
    out.mkdir(parents=True, exist_ok=True)
    file = write_gguf(fused, out / f"{slug(out.name)}-{settings.gguf_type}.gguf", cast(Kind, settings.gguf_type))
    read = _read_back(file, fused, scratch / "read")
    outside = [("llama.cpp", {"model": str(file)})]
    if _model_type(fused) in IN_TRANSFORMERS and GgufModel(fused).rope["rope_type"] == "none":
        outside.append(("transformers", {"model": str(file)}))
    use = f"```sh\nllama-server -m {file.name} --jinja\n```"
    return Built(
        read, None, read, tuple(outside), (f"{file.name}: {settings.gguf_type}", *merged.lines), merged.survival, use, file
    )


def _read_back(file: Path, fused: Path, out: Path) -> Path:
    """A GGUF file as a model directory: of the file alone where that is possible, else beside the fused model's settings."""
    model = GgufModel(fused)
    plain = model.architecture.name == "llama" and model.rope["rope_type"] == "none"
    if plain and gguf_tokenizer(fused, model.rows).pre in ("gpt-2", "smollm"):
        return convert_gguf(file, out)
    return read_model(file, fused, out)


def _lora_gguf(settings: ExportSettings, source: Tuned, out: Path, scratch: Path) -> Built:
    out.mkdir(parents=True, exist_ok=True)
    file = write_lora_gguf(source.adapter, source.base, out / f"{slug(out.name)}-lora.gguf")
    read = read_lora(file, source.base, source.adapter, scratch / "read")
    use = f"```sh\nllama-server -m BASE.gguf --lora {file.name} --jinja\n```\n\nBASE.gguf is the base model as GGUF."
    return Built(source.base, read, None, (), (f"{file.name}: an adapter, float32",), {}, use)


def _ollama(settings: ExportSettings, source: Tuned, made: Built, out: Path) -> Built:
    """The directory for Ollama around the GGUF file that was made; the file becomes a part of it."""
    encoder = load_encoder(made.tokenizer) if made.tokenizer else source.encoder
    (file,) = out.glob("*.gguf")
    template = go_template(source, encoder, adds_bos(source.base) if made.tokenizer is None else says_bos(file))
    aside = file.rename(out.with_name(f"{out.name}-{file.name}"))
    out.rmdir()
    adapter = bool(settings.ollama_base)
    system = source.system if ollama.fits_modelfile(source.system) else ""
    ollama.write_ollama(
        out,
        gguf=None if adapter else aside,
        base_name=settings.ollama_base or None,
        adapter_gguf=aside if adapter else None,
        template=template,
        system=system,
        parameters={"temperature": 0, "repeat_penalty": 1.0},
        name=settings.ollama_name,
        license_text="",
        notes=_prompt_notes(source),
    )
    aside.unlink()
    stored = out / (ollama.ADAPTER if adapter else ollama.MODEL)
    outside = tuple((tool, {"model": str(stored)}) for tool, _ in made.outside)
    use = f"```sh\nollama create {settings.ollama_name} -f Modelfile\nollama run {settings.ollama_name}\n```"
    lines = (*made.lines, template.notes[-1], f"ollama create {settings.ollama_name} -f Modelfile")
    return replace(made, outside=outside, lines=lines, use=use, file=stored)


def _prompt_notes(source: Tuned) -> list[str]:
    """What training put around a question that no Modelfile can."""
    chosen = source.prompts
    notes = []
    if chosen.input_template or chosen.context_template or chosen.loom_file:
        notes.append(
            "Training wrote each question into a template of its own (input_template or a word loom): write yours so, too."
        )
    if chosen.few_shot_file:
        notes.append(f"Training put examples of {Path(chosen.few_shot_file).name} before each question, which are not in here.")
    return notes


def _model_type(directory: Path) -> str:
    return str(json.loads((directory / "config.json").read_text(encoding="utf-8")).get("model_type"))


def _quantized(directory: Path) -> bool:
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return "quantization" in config or "quantization_config" in config
