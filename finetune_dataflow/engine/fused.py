"""An adapter merged into its base model: one complete model directory, and how much of the learned change stands in it.

The directory is the base model's with the changed weights in place: same names, same shapes, same types, so what loads the
base model loads it. Where mlx-lm names a weight otherwise than its file does, or joins several of the file's, the way back is
taken (`engine.fused_weights`). The finished directory is read back by mlx-lm, and each changed weight compared with what was
to be written.

A weight is merged in float32 and rounded once. Rounding can erase what was learned: a change below half a step of the type
leaves the weight as it was. So the change that is really stored, read back, is compared with the learned one. Its share is
the part of the learned change that lies in the stored one, cosine times norm ratio: 1 for all of it, 0 for nothing. Rounding
noise, which has no direction, leaves it at 1; erasure does not.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import mlx.core as mx
import mlx.nn as nn
import yaml
from mlx_lm.tuner.dora import DoRAEmbedding, DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear

from finetune_dataflow.engine import formats
from finetune_dataflow.engine.adapters import WEIGHTS, adapter_fingerprint, adapter_parameters, check_adapter
from finetune_dataflow.engine.chat import ChatEncoder, load_encoder
from finetune_dataflow.engine.files import fingerprint, flush_tree, write_json, write_text, writing
from finetune_dataflow.engine.fused_weights import BaseWeights, Merge, Plan, Requantized, type_name, write_weights
from finetune_dataflow.engine.gguf_tokenizer import load_tokenizer
from finetune_dataflow.engine.model_source import MODEL_FILES, check_model_directory, model_fingerprint
from finetune_dataflow.engine.models import load_model
from finetune_dataflow.engine.settings import require, require_choice
from finetune_dataflow.errors import UserError

logger = logging.getLogger(__name__)

Quantized = Literal["dequantize", "requantize"]
REPORT = "fusion.json"  # its presence says that the directory was written here, its content what it was made of
# Near the end of a fit the loss is about quadratic along what was learned, so a share s of it keeps 1 - (1 - s)^2 of the gain:
# 0.8 keeps 96 %.
THRESHOLD = 0.8
NEGLIGIBLE = 0.1  # layers that changed less than this share of the average change are reported, not judged
NOTHING = 1e-6  # a relative change below this is float32's own rounding, as of a DoRA layer that learned nothing
SHARD_BYTES = 5_000_000_000
SHOWN = 5

_OTHER_FILES = ("model.", "config.json", "conversion.json", "made_of.json", REPORT)


@dataclass(frozen=True)
class LayerSurvival:
    """What became of the learned change of one weight.

    relative_change: its norm over the base weight's. cosine: of the stored and the learned change. norm_ratio: the stored
    change's norm over the learned one's. stored_as: the type of the weight, such as "bfloat16" or "8 bits".
    """

    name: str
    relative_change: float
    cosine: float
    norm_ratio: float
    stored_as: str

    @property
    def share(self) -> float:
        """The part of the learned change that lies in the stored one."""
        return self.cosine * self.norm_ratio


@dataclass(frozen=True)
class FusedReport:
    """A fused model: its directory, and per changed weight how much of what was learned stands in it.

    weights: how they are stored, in words. chat_template: whose it is, in words. loads_in: the libraries that read it.
    """

    directory: Path
    weights: str
    chat_template: str
    loads_in: tuple[str, ...]
    threshold: float
    layers: tuple[LayerSurvival, ...]

    @property
    def judged(self) -> list[LayerSurvival]:
        """The weights whose change is not negligible beside the average one, the worst share first."""
        average = math.sqrt(sum(each.relative_change**2 for each in self.layers) / max(len(self.layers), 1))
        return sorted((each for each in self.layers if each.relative_change >= NEGLIGIBLE * average), key=lambda each: each.share)

    @property
    def below(self) -> list[LayerSurvival]:
        """The judged weights whose share is below the threshold, the worst first."""
        return [each for each in self.judged if each.share < self.threshold]

    def lines(self) -> list[str]:
        """The report in a few lines of plain text."""
        judged = self.judged
        least = f"{judged[0].share:.1%} in {judged[0].name}" if judged else "nothing was changed"
        return [
            f"{self.directory}: {len(self.layers)} weights changed, stored {self.weights}; for {' and '.join(self.loads_in)}",
            f"chat template: {self.chat_template}",
            f"learned change that is kept, at the least: {least} (asked for: {self.threshold:.0%})",
        ]


def fuse(
    base: Path,
    adapter: Path,
    out: Path,
    *,
    quantized: Quantized = "dequantize",
    threshold: float = THRESHOLD,
    force: bool = False,
    chat_template: str = "",
    shard_bytes: int = SHARD_BYTES,
) -> FusedReport:
    """Write base and adapter as one complete model directory, whole or not at all.

    quantized: what becomes of a quantised base: "dequantize" gives a model in the type of its scales, for mlx-lm and
    transformers; "requantize" keeps it quantised, the changed weights at 8 bits, for mlx-lm alone. threshold: the least share
    of the learned change that a weight must keep; `force` only warns. chat_template: takes the place of the template that the
    adapter was trained with, which is looked for in its run. shard_bytes: the most bytes of one file of weights.
    Raises UserError for an adapter of another model, for an architecture whose names cannot be given back, for `out` where it
    holds something else, for values that are not finite, and where too little of the learned change would be kept.
    """
    require_choice("quantized", quantized, ("dequantize", "requantize"))
    require("threshold", threshold, 0 <= threshold <= 1, "a share from 0 to 1")
    require("shard_bytes", shard_bytes, shard_bytes >= 1, "a number of bytes, 1 or more")
    check_model_directory(base)
    adapter_config = check_adapter(adapter)
    _check_out(out, base, adapter)
    source = BaseWeights(base)
    keeps = quantized == "requantize" and bool(source.quantized)
    merges = _merges(base, adapter, adapter_config)
    source.check(merges, keeps_layout=keeps)
    template, whose = _trained_template(base, adapter, adapter_config, chat_template)
    weights = "with the changed ones at 8 bits" if keeps else f"as {source.type_name}"
    loads_in = ("mlx-lm",) if keeps else ("mlx-lm", "transformers")
    with _made(out) as temporary:
        plan = Requantized(source, merges) if keeps else Plan(source, merges)
        write_weights(temporary, plan, shard_bytes)
        _write_other_files(temporary, base, plan.config, template)
        layers = tuple(_survival(temporary, source, merges, exact=not keeps))
        report = FusedReport(out, weights, whose, loads_in, threshold, layers)
        _judge(report, base, keeps, force)
        made_of = {"base_model": model_fingerprint(base), "adapter": adapter_fingerprint(adapter), "quantized": quantized}
        write_json(temporary / REPORT, {**made_of, **{**asdict(report), "directory": out.name}})
    return report


def _merges(base: Path, adapter: Path, config: dict[str, Any]) -> dict[str, Merge]:
    """How each changed weight is made of the base's, by mlx-lm's name. UserError where the adapter is not this model's."""
    model = load_model(base, adapter, lazy=True)
    if config.get("fine_tune_type") == "full":
        names = cast(dict[str, mx.array], mx.load(str(adapter / WEIGHTS)))
        return {name: functools.partial(_replaced, adapter / WEIGHTS, name) for name in names}
    found = {path: merge for path, module in model.named_modules() if (merge := _merge(module)) is not None}
    unknown = sorted(name for name in adapter_parameters(model) if name.rpartition(".")[0] not in found)
    if unknown:
        raise UserError(f"The adapter in {adapter} changes {unknown[0].rpartition('.')[0]}, a layer that cannot be merged here.")
    return {f"{path}.weight": merge for path, merge in found.items()}


def _replaced(path: Path, name: str, base: mx.array) -> mx.array:
    """The weight as a full fine-tune left it, read when it is wanted."""
    return cast(dict[str, mx.array], mx.load(str(path)))[name].astype(mx.float32)


def _merge(module: nn.Module) -> Merge | None:
    """How a module with an adapter changes its weight; None for any other module."""
    if not isinstance(module, LoRALinear | LoRAEmbedding | LoRASwitchLinear | DoRALinear | DoRAEmbedding):
        return None
    first, second = module.lora_a.astype(mx.float32), module.lora_b.astype(mx.float32)
    if isinstance(module, LoRASwitchLinear):
        factors = second, first
    elif isinstance(module, LoRALinear | DoRALinear):
        factors = second.T, first.T
    else:
        factors = first, second
    magnitude = module.m.astype(mx.float32) if isinstance(module, DoRALinear | DoRAEmbedding) else None
    scale = float(module.scale)

    def merged(base: mx.array) -> mx.array:
        adapted = base + scale * (factors[0] @ factors[1])
        if magnitude is None:
            return adapted
        norms = mx.linalg.norm(adapted, axis=1)
        return mx.where(norms == 0, 0, magnitude / norms)[:, None] * adapted

    return merged


def _write_other_files(directory: Path, base: Path, config: dict[str, Any], template: str) -> None:
    for path in {each for pattern in (*MODEL_FILES, "*.model") for each in base.glob(pattern)}:
        if path.suffix != ".safetensors" and not path.name.startswith(_OTHER_FILES):
            shutil.copyfile(path, directory / path.name)
    write_text(directory / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    if template:
        _put_template(directory, base, template)
    _let_end(directory)


def _let_end(directory: Path) -> None:
    """Let generation end where the chat template ends a turn, as training taught it: a base model may end texts only."""
    if not load_tokenizer(directory).chat_template:
        return
    ends = load_encoder(directory).stop_ids
    if not ends <= stop_ids(directory):
        path = directory / "generation_config.json"
        settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        write_json(path, {**settings, "eos_token_id": sorted({*ends, *stop_ids(directory)})})


def stop_ids(directory: Path) -> frozenset[int]:
    """The tokens at which a model directory says that generation ends: generation_config.json's, else config.json's."""
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
        if found is not None:
            return frozenset(found if isinstance(found, list) else [found])
    return frozenset()


def _put_template(directory: Path, base: Path, template: str) -> None:
    """Make `template` the tokenizer's own, with the same tokens as in training, and let generation end where it ends a turn."""
    encoder = load_encoder(base, template)
    messages = [{"role": "user", "content": "Hello"}]
    wanted = encoder.prompt_ids(messages)
    if ChatEncoder(encoder.tokenizer).prompt_ids(messages) != wanted:
        template = "{{ bos_token }}" + template  # in training, the tokenizer's beginning of sequence stood before it
    for name in ("chat_template.jinja", "chat_template.json"):
        (directory / name).unlink(missing_ok=True)
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    write_json(path, {**settings, "chat_template": template})
    if load_encoder(directory).prompt_ids(messages) != wanted:
        raise UserError(
            f"The chat template of the training cannot be written so that the tokenizer in {base} gives the same tokens."
        )
    path = directory / "generation_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    write_json(path, {**settings, "eos_token_id": sorted(encoder.stop_ids)})


def _trained_template(base: Path, adapter: Path, config: dict[str, Any], given: str) -> tuple[str, str]:
    """The template to put into the tokenizer (empty for its own), and in words whose it is."""
    if given:
        return given, "the one given"
    trained = (config.get("fingerprints") or {}).get("chat_template")
    if trained is None:
        return "", "the base model's (the adapter does not say which it was trained with)"
    if fingerprint(load_tokenizer(base).chat_template) == trained:
        return "", "the base model's, as in training"
    for name, template in formats.FORMATS.items():
        if fingerprint(template) == trained:
            return template, f"{name}, as in training"
    named = _prompt_format(adapter)
    if named and fingerprint(template := formats.template(named)) == trained:
        return template, f"{named}, as in training"
    logger.warning("The chat template that the adapter in %s was trained with was not found; the base model's is kept.", adapter)
    return "", "the base model's; the adapter was trained with another, which was not found"


def _prompt_format(adapter: Path) -> str:
    """The prompt_format of the run that the adapter lies in; empty where there is none, or its file is gone."""
    try:
        run = yaml.safe_load((adapter.resolve().parent / "config.yaml").read_text(encoding="utf-8"))
        named = str(run.get("prompt_format") or "")
        formats.template(named)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, UserError):
        return ""
    return named


def _survival(directory: Path, source: BaseWeights, merges: dict[str, Merge], *, exact: bool) -> Iterator[LayerSurvival]:
    """What mlx-lm reads of each changed weight, against what was learned.

    exact: what it reads must be what was to be written, but for one rounding. UserError where it is not.
    """
    fused = BaseWeights(directory)
    for name, merge in sorted(merges.items(), key=lambda each: _in_order(each[0])):
        base, kept = source.dense(name), fused.dense(name)
        tuned = merge(base)
        if exact and not mx.array_equal(kept, tuned.astype(source.dtype(name)).astype(mx.float32)):
            raise UserError(
                f"mlx-lm reads the weight {name} otherwise than it was written (architecture {source.model_type!r}), "
                "so it cannot be fused."
            )
        path = name.rpartition(".")[0]
        stored_as = f"{fused.quantized[path].bits} bits" if path in fused.quantized else type_name(fused.dtype(name))
        yield _compared(name, base, tuned - base, kept - base, stored_as)


def _in_order(name: str) -> list[tuple[int, str]]:
    """A key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _compared(name: str, base: mx.array, learned: mx.array, kept: mx.array, stored_as: str) -> LayerSurvival:
    whole, of_learned, of_kept = (_number(mx.linalg.norm(each.reshape(-1))) for each in (base, learned, kept))
    relative = of_learned / whole if whole else float(of_learned > 0)
    if relative < NOTHING:
        return LayerSurvival(name, 0.0, 1.0, 1.0, stored_as)  # nothing was learned here, so nothing is lost
    product = _number((learned * kept).sum())
    cosine = product / of_learned / of_kept if of_kept else 0.0
    return LayerSurvival(name, relative, cosine, of_kept / of_learned, stored_as)


def _number(value: mx.array) -> float:
    return cast(float, value.item())


def _judge(report: FusedReport, base: Path, keeps: bool, force: bool) -> None:
    """Refuse a model in which too little of the learned change stands, or warn where that is wanted all the same."""
    below = report.below
    if not below:
        return
    worst = "\n".join(
        f"  {each.name}: {each.share:.1%} kept as {each.stored_as} (the change is {each.relative_change:.2g} of the weight)"
        for each in below[:SHOWN]
    )
    more = f"\n  and {len(below) - SHOWN} more" if len(below) > SHOWN else ""
    way = "quantized='dequantize'" if keeps else "a base model of a wider type, such as float32"
    said = (
        f"Fused into {base}, {len(below)} of {len(report.judged)} weights would keep less than {report.threshold:.0%} of what "
        f"was learned, because rounding erases it:\n{worst}{more}\n"
    )
    if not force:
        raise UserError(f"{said}Use {way}, keep the adapter apart, or force it.")
    logger.warning("%sIt was written all the same.", said)


def _check_out(out: Path, base: Path, adapter: Path) -> None:
    if out.resolve() in {base.resolve(), adapter.resolve()}:
        raise UserError(f"out={str(out)!r} is what is fused. Name another directory.")
    if out.exists() and not out.is_dir():
        raise UserError(f"out={str(out)!r} is a file. Name a directory.")
    if out.is_dir() and any(out.iterdir()) and not (out / REPORT).is_file():
        raise UserError(f"{out} is not empty and holds no model that was fused here. Name another directory.")


@contextmanager
def _made(out: Path) -> Iterator[Path]:
    """A temporary directory beside `out` that becomes `out` when the block ends well, and goes when it does not."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with writing(out):
            temporary.mkdir(parents=True)
            yield temporary
            flush_tree(temporary)
            earlier = temporary.with_name(f"{temporary.name}.earlier")
            if out.is_dir():
                out.rename(earlier)
            try:
                temporary.rename(out)
            except BaseException:
                if earlier.is_dir():
                    earlier.rename(out)
                raise
            shutil.rmtree(earlier, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
