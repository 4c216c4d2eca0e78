"""The engine on a GPU beside its peers: `python benchmarks/gpu.py [--peers PYTHON] [--rounds 3] [--seconds 10] [--out FILE]`.

This environment needs MLX for its GPU (`mlx[cuda]`, or a Mac). Each thing is measured in a process of its own:
1. which fast ways prove themselves on the architectures of tests/architectures.py, in bfloat16 and in float32;
2. on SmolLM2-135M and a randomly initialised llama of 1.2B parameters: how far loss and gradient of the fast path and of the
   plain path in bfloat16 are from each other and from float32 (the fast path is compared whatever the proof says of it);
3. an epoch's steps with and without `mx.compile`;
4. tokens a second and peak memory of LoRA in bfloat16, rank 8, last 16 layers, 8 rows like WikiSQL's: the real fit, mlx_lm's
   own trainer (in this environment, so on the same MLX) and a plain loop of torch and PEFT, in windows, one engine at a time.
   PYTHON is that of an environment with torch for the GPU, transformers and peft; without it torch is left out.

Rates are true tokens a second, padding left out. A peak is a window's, by the library's own count of what it has allocated
(resident memory for torch without CUDA); ours keeps the frozen layers' weights, which a fit lets go of. MLX and torch may take
TF32 for products of float32; what 2 calls float32 never does. The file is written after every part, each window in it.
--quick tries all of this on a tiny model, on a CPU, too (there rates are of float32, and memory is resident).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from importlib import metadata
from itertools import count, groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import bench
from arithmetic import spread

sys.path.insert(0, str(bench.ROOT))
sys.path.insert(0, str(bench.WORKERS))
import protocol

OURS, MLX_LM, TORCH, REFERENCE = bench.OURS, "mlx_lm", "torch_peft", "reference"
if TORCH not in sys.argv:  # that part runs where there is neither this project nor MLX
    import ours  # isort: skip  # its BLAS must stand before MLX

    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optimizers
    import mlx_lm_worker
    import numpy as np
    from mlx.utils import tree_flatten, tree_map_with_path
    from mlx_lm.models import llama

    from finetune_dataflow.embedded_model import embedded_model_directory
    from finetune_dataflow.engine.batch_layout import batch_layout
    from finetune_dataflow.engine.batches import batch, epoch_order, widths
    from finetune_dataflow.engine.fit_settings import MethodSettings
    from finetune_dataflow.engine.frozen_states import StateStore
    from finetune_dataflow.engine.losses import PLAIN, LossPath
    from finetune_dataflow.engine.methods import make_trainable
    from finetune_dataflow.engine.models import load_model
    from finetune_dataflow.engine.packing import packed
    from finetune_dataflow.engine.prefix_states import PrefixStates
    from finetune_dataflow.engine.proof import NAMES, Sample, proven_path
    from finetune_dataflow.engine.tokens import EncodedRow, TokenColumns, token_columns
    from tests.architectures import ARCHITECTURES, write_architecture
LLAMA_1B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
    "tie_word_embeddings": True, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "max_position_embeddings": 8192, "attention_bias": False, "mlp_bias": False, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 2,
}  # fmt: skip
TINY = LLAMA_1B | {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "vocab_size": 49152,
}  # fmt: skip
LORA_B = 0.002  # its spread where gradients are compared: while it is zero, lora_a has none
Settings = dict[str, Any]


class Part(bench.Worker):
    """A part of this script in a process of its own."""

    def __init__(self, name: str, python: Path, settings: Path) -> None:
        """Start it; what it prints goes to a log beside the settings."""
        self.name, self._log = name, settings.with_name(f"{settings.stem}-{name}.log")
        environment = bench._environment(OURS) | ({"MLX_ENABLE_TF32": "0"} if name == REFERENCE else {})
        command = [str(python), __file__, "--worker", name, "--settings", str(settings)]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )


class Rounds(bench.Bench):
    """Windows of every engine that starts, on one model."""

    phases: tuple[str, ...] = tuple(bench.PHASES)

    def worker(self, name: str, mode: str = "windows") -> bench.Worker:
        """A new process of an engine."""
        return Part(name, self._pythons[name], self._settings)

    def interleaved(self) -> None:
        """The rounds, with all engines loaded and one at a time working. What does not start is left out, with its log."""
        with ExitStack() as stack:
            workers: dict[str, bench.Worker] = {}
            for name in self._pythons:
                worker = stack.enter_context(self.worker(name))
                try:
                    self.engines[name] = self._begun(worker)
                    workers[name] = worker
                except RuntimeError as error:
                    self.engines[name] = {"error": str(error)}
                    self.progress.say(f"{name} is left out: {last_line(error)}")
            for worker in workers.values():
                for phase in self.phases:
                    worker.ask(f"window {self.plan.seconds / 2} {phase}")  # to warm up
            for number in range(1, self.plan.rounds + 1):
                for phase in self.phases:
                    for name in bench._turned(list(workers), number):
                        found = self._watched(workers, name, f"window {self.plan.seconds} {phase}")
                        self.windows.append({"engine": name, "round": number, **found})
                self.progress.say(f"round {number} of {self.plan.rounds}")

    def rates(self) -> dict[str, Any]:
        """By phase and engine: tokens a second, the greatest peak, and ours over the engine's within each round."""
        found: dict[str, Any] = {phase: {} for phase in self.phases}
        for phase, engines in found.items():
            mine = [bench.rate(each) for each in self.of(OURS, phase)]
            for name in {each["engine"]: None for each in self.windows if each["phase"] == phase}:
                rates = [bench.rate(each) for each in self.of(name, phase)]
                engines[name] = {"tokens_per_second": spread(rates)}
                engines[name]["peak_bytes"] = max(each["peak_bytes"] for each in self.of(name, phase))
                if mine and name != OURS:
                    engines[name]["ours_over_it"] = spread([one / other for one, other in zip(mine, rates, strict=False)])
        return found


def last_line(error: object) -> str:
    """The last line of a message: of a process that died, what it died of."""
    return (str(error).strip().splitlines() or [repr(error)])[-1]


def write_model(directory: Path, config: Settings, weights: list[tuple[str, mx.array]], shard_bytes: int = 10**9) -> Path:
    """Write a Hugging Face directory: config.json, the weights in shards, SmolLM2's tokenizer."""
    directory.mkdir()
    starts, size = {}, 0
    for name, each in weights:
        starts[name], size = size, size + each.nbytes
    shards = [dict(group) for _, group in groupby(weights, lambda each: starts[each[0]] // shard_bytes)]
    files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        mx.save_safetensors(str(directory / file), shard, {"format": "pt"})
    places = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    dtype = str(weights[0][1].dtype).rpartition(".")[2]
    (directory / "config.json").write_text(json.dumps({**config, "torch_dtype": dtype}))
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(embedded_model_directory() / file, directory)
    return directory


def random_llama(config: Settings, dtype: mx.Dtype) -> list[tuple[str, mx.array]]:
    """The weights of a llama as MLX initialises them; each is computed when it is written."""
    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    model.set_dtype(dtype)
    return flat(model.parameters())


def models(directory: Path, quick: bool, dtype: mx.Dtype) -> Iterator[tuple[str, Path, int]]:
    """Name and directory of each model, and how many of its last layers are tuned."""
    if quick:
        yield "tiny llama", write_model(directory / "tiny", TINY, random_llama(TINY, dtype), 10**6), 2
        return
    embedded, tuned = embedded_model_directory(), int(bench.LEARNING["layers"])
    config = json.loads((embedded / "config.json").read_text())
    weights = [(name, each.astype(dtype)) for name, each in flat(mx.load(str(embedded / "model.safetensors")))]
    smollm2 = write_model(directory / "smollm2", config, weights)
    del weights  # on a GPU they would stay there
    yield "SmolLM2-135M", smollm2, tuned
    yield "llama of 1.2B, random", write_model(directory / "llama-1b", LLAMA_1B, random_llama(LLAMA_1B, dtype)), tuned


def flat(tree: Any) -> list[tuple[str, mx.array]]:
    """The arrays of a tree by name."""
    return cast("list[tuple[str, mx.array]]", tree_flatten(tree))


def samples(columns: TokenColumns, batch_size: int, seed: int) -> list[Sample]:
    """Four rows each of the first epoch's first and last batch, plain and packed, as the fit takes them for its proof."""
    order, ladder, found = epoch_order(columns, batch_size, seed, 0), widths(columns.lengths), []
    for rows in (order[0][:4], order[-1][:4]):
        widest = int(columns.lengths[rows].max()) - 1
        found.append(Sample(batch(columns, rows, len(rows), ladder), packed(columns, rows, 2 * widest, lines=2)))
    return found


def proofs(answers: protocol.Answers, settings: Settings) -> None:
    """For each line "architecture dtype": what is proven on it, and why the rest is left out."""
    draw = np.random.default_rng(2)
    rows = [(draw.integers(1, 250, 4 + n).tolist(), draw.integers(1, 250, 3 + 2 * (n % 3)).tolist()) for n in range(8)]
    columns = token_columns([EncodedRow(number, *each) for number, each in enumerate(rows)])
    with tempfile.TemporaryDirectory() as folder:
        for line in sys.stdin:
            name, dtype = line.split()
            model = load_model(write_architecture(Path(folder, name, dtype), name))
            model.set_dtype(getattr(mx, dtype))
            make_trainable(model, MethodSettings(num_layers=1))
            states = StateStore(Path(folder, "states"), {"base": line}, 10**9).states(model, columns, 4)
            path = proven_path(model, samples(columns, 4, 0), states)
            taken = {each: bool(getattr(path, each)) for each in NAMES}
            answers.give(architecture=name, dtype=dtype, **taken, reason=path.reason)


def loaded(settings: Settings, dtype: mx.Dtype) -> tuple[nn.Module, TokenColumns, PrefixStates | None, LossPath]:
    """The model with LoRA on it, the training rows, the states of its frozen layers, and the path with everything fast."""
    model = load_model(Path(settings["model"]))
    model.set_dtype(dtype)
    make_trainable(model, ours.fit_settings(settings).method)
    columns, _ = ours.columns(settings)
    store = StateStore(Path(settings["states"]), {"base": settings["model"], "dtype": str(dtype)}, ours.STATES_BYTES)
    states = store.states(model, columns, settings["batch_size"])
    return model, columns, states, LossPath(gathered=True, prefix=states.layers if states else 0, packing=True)


def computed(model: nn.Module, path: LossPath, given: Any) -> dict[str, mx.array]:
    """The loss, under "loss", and the gradient by parameter."""
    loss, gradient = nn.value_and_grad(model, path.mean_loss)(model, given)
    mx.eval(loss, gradient)
    return {"loss": loss, **dict(flat(gradient))}


def move(model: nn.Module) -> None:
    """Give every lora_b values, the same ones in every process."""

    def value(name: str, each: mx.array) -> mx.array:
        key = mx.random.key(zlib.crc32(name.encode()))
        return LORA_B * mx.random.normal(each.shape, key=key) if name.endswith("lora_b") else each

    model.update(tree_map_with_path(value, model.trainable_parameters()))


def apart(one: dict[str, mx.array], other: dict[str, mx.array]) -> dict[str, float]:
    """The differences of loss and gradient, relative to the other's loss and to its gradient's norm."""
    names = other.keys() - {"loss"}
    squares = [sum(float(each.square().sum()) for each in every) for every in
               ((one[name] - other[name] for name in names), (other[name] for name in names))]  # fmt: skip
    losses = float(one["loss"]), float(other["loss"])
    return {"loss": abs(losses[0] - losses[1]) / abs(losses[1]), "gradient": (squares[0] / squares[1]) ** 0.5}


def reference(answers: protocol.Answers, settings: Settings) -> None:
    """Loss and gradient of the plain path in float32, without TF32, into a file."""
    model, columns, _, _ = loaded(settings, mx.float32)
    move(model)
    every = samples(columns, settings["batch_size"], settings["seed"])
    found = [computed(model, PLAIN, each.plain) for each in every]
    mx.save_safetensors(settings[REFERENCE], {f"{n}/{name}": each for n, of in enumerate(found) for name, each in of.items()})
    answers.give(done=True)


def gradients(answers: protocol.Answers, settings: Settings) -> None:
    """What the proof finds in bfloat16; then, whatever it found, how far everything fast, plain and float32 are apart."""
    model, columns, states, fast = loaded(settings, mx.bfloat16)
    every, found = samples(columns, settings["batch_size"], settings["seed"]), []
    reason = proven_path(model, every, states).reason
    kept = cast("dict[str, mx.array]", mx.load(settings[REFERENCE]))
    move(model)
    for number, sample in enumerate(every):
        assert sample.packed is not None
        ahead = computed(model, fast, states.given(sample.packed) if states else sample.packed)
        plain = computed(model, PLAIN, sample.plain)
        exact = {name.partition("/")[2]: each for name, each in kept.items() if name.startswith(f"{number}/")}
        found.append({"fast_from_plain": apart(ahead, plain), "plain_from_float32": apart(plain, exact),
                      "fast_from_float32": apart(ahead, exact)})  # fmt: skip
    answers.give(reason=reason, samples=found)


def compiled(answers: protocol.Answers, settings: Settings) -> None:
    """Seconds of each pass over a later epoch's steps (loss, gradient, AdamW), with and without mx.compile."""
    model, columns, states, path = loaded(settings, getattr(mx, settings["dtype"]))
    model.train()
    layout, batches = batch_layout(model, columns, packing=True), list[dict[str, mx.array]]()
    for rows in epoch_order(columns, settings["batch_size"], settings["seed"], 0):
        made = layout.made(columns, rows, settings["batch_size"])
        arrays = {name: mx.array(getattr(made, name)) for name in ("inputs", "positions", "labels", "supervised")}
        if made.segments is not None:
            arrays["segments"] = mx.array(made.segments)
        if states is not None:
            arrays["states"] = states.gather(made)
        batches.append(arrays)
    optimizer, traces = optimizers.AdamW(settings["learning_rate"]), 0
    optimizer.init(model.trainable_parameters())

    def step(arrays: dict[str, mx.array]) -> mx.array:
        nonlocal traces
        traces += 1
        given: Any = SimpleNamespace(**{"segments": None, "states": None, **arrays})
        loss, gradient = nn.value_and_grad(model, path.mean_loss)(model, given)
        optimizer.update(model, gradient)
        return cast("mx.array", loss)

    state = [model.state, optimizer.state]
    ways: dict[str, Callable[..., mx.array]] = {"without": step, "with": mx.compile(step, inputs=state, outputs=state)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(settings["rounds"] + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            for arrays in batches:
                mx.eval(way(arrays), state)
            seconds[name].append(time.perf_counter() - started)
    shapes = {tuple((name, *each.shape) for name, each in arrays.items()) for arrays in batches}
    traces -= len(batches) * len(seconds["without"])  # there every step is a trace
    answers.give(steps=len(batches), shapes=len(shapes), traces=traces, seconds=seconds)


def windows(answers: protocol.Answers, settings: Settings) -> None:
    """Ours or mlx_lm under the conductor's windows, on a GPU with MLX's own count of memory."""
    if settings["gpu"]:
        protocol.peak_bytes, protocol.reset_peak = mx.get_peak_memory, mx.reset_peak_memory
    if settings["worker"] == OURS:
        ours.windows(answers, settings)
    else:
        mlx_lm_worker.windows(answers, settings, str(mx.default_device()))


def torch_windows(answers: protocol.Answers, settings: Settings) -> None:
    """Torch and PEFT in a plain loop under the conductor's windows. SystemExit where MLX has a GPU and torch has none."""
    import torch  # type: ignore[import-not-found,unused-ignore]
    from peft import LoraConfig, get_peft_model  # type: ignore[import-not-found,unused-ignore]
    from transformers import AutoModelForCausalLM

    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "mps" if torch.backends.mps.is_available() else "cpu"
    if settings["gpu"] and device == "cpu":
        raise SystemExit(f"torch {torch.__version__} finds no GPU")
    if cuda:
        protocol.peak_bytes, protocol.reset_peak = torch.cuda.max_memory_allocated, torch.cuda.reset_peak_memory_stats
    torch.manual_seed(settings["seed"])
    torch.set_float32_matmul_precision("high")  # TF32, which MLX takes by itself
    whole: Any = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=getattr(torch, settings["dtype"]))
    whole.to(device)
    blocks = whole.config.num_hidden_layers
    linear = {name.rpartition(".")[2] for name, part in whole.model.layers.named_modules() if isinstance(part, torch.nn.Linear)}
    adapter = LoraConfig(
        r=settings["rank"], lora_alpha=settings["scale"] * settings["rank"], lora_dropout=0.0, target_modules=sorted(linear),
        layers_to_transform=list(range(blocks - settings["layers"], blocks)), task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(whole, adapter).train()
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, settings["learning_rate"], weight_decay=settings["weight_decay"], fused=cuda)
    about = {"blas": torch.cuda.get_device_name() if cuda else device, "cuda": torch.version.cuda,
             "versions": protocol.versions("torch", "peft", "transformers")}  # fmt: skip
    found = protocol.Windows(answers, about, {})
    ordered = sorted(protocol.json_rows(settings["train_tokens"]), key=lambda row: len(row["input_ids"]))
    cut = [ordered[n : n + settings["batch_size"]] for n in range(0, len(ordered), settings["batch_size"])]
    for rows in (each for epoch in count() for each in random.Random(epoch).sample(cut, len(cut))):
        lengths = [len(row["input_ids"]) for row in rows]
        given = {
            name: torch.tensor([row[name] + [fill] * (max(lengths) - len(row[name])) for row in rows], device=device)
            for name, fill in (("input_ids", 0), ("labels", -100))
        }
        mask = (torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]).long()
        if cuda:
            torch.cuda.synchronize()
        found.step(lengths, [sum(each != -100 for each in row["labels"]) for row in rows])
        loss = model(**given, attention_mask=mask).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.loss = loss.item()


def architectures(settings: Path, names: tuple[str, ...], progress: bench.Progress) -> list[dict[str, Any]]:
    """What is proven on each; where the process dies of one, its last words, and the next has a new process."""
    found, left = list[dict[str, Any]](), [(name, dtype) for name in names for dtype in ("bfloat16", "float32")]
    while left:
        try:
            with Part("proofs", Path(sys.executable), settings) as part:
                while left:
                    found.append(part.ask(" ".join(left[0])))
                    progress.say(row_of(found[-1]))
                    del left[0]
        except (RuntimeError, OSError) as error:
            found.append({"architecture": left[0][0], "dtype": left[0][1], "error": str(error)})
            progress.say(row_of(found[-1]))
            del left[0]
    return found


def row_of(found: dict[str, Any]) -> str:
    """A line of the table of architectures."""
    named = f"{found['architecture']:14} {found['dtype']:9}"
    if "error" in found:
        return f"{named} FAILED: {last_line(found['error'])}"
    titles = {"gathered": "head", "prefix": "states", "packing": "packing"}
    marks = " ".join(f"{title} {'yes' if found[way] else 'no':3}" for way, title in titles.items())
    return f"{named} {marks}  {'; '.join(each for each in found['reason'].split('; ') if each.startswith('without '))}".rstrip()


def once(name: str, settings: Path) -> dict[str, Any]:
    """The one answer of a part, or its last words."""
    try:
        with Part(name, Path(sys.executable), settings) as part:
            return part.answer()
    except RuntimeError as error:
        return {"error": str(error)}


def of_model(settings: Path, plan: bench.Plan, peers: Path | None, progress: bench.Progress) -> dict[str, Any]:
    """Everything that is found on one model."""
    exact = once(REFERENCE, settings)
    found: dict[str, Any] = {"correctness": exact if "error" in exact else once("gradients", settings)}
    found |= {"compile": once("compile", settings), "settings": json.loads(settings.read_text())}
    pythons = dict.fromkeys((OURS, MLX_LM), Path(sys.executable)) | ({} if peers is None else {TORCH: peers})
    rounds = Rounds(plan, pythons, settings, progress)
    if found["settings"]["layers"] == found["settings"]["config"]["num_hidden_layers"]:
        rounds.phases = ("first",)  # nothing is frozen: every epoch is like the first
    try:
        rounds.interleaved()
    except (RuntimeError, OSError) as error:
        found["broken_off"] = str(error)
    return {**found, "rates": rounds.rates(), "engines": rounds.engines, "windows": rounds.windows,
            "idle_share_of_a_core": round(rounds.idle_share, 4)}  # fmt: skip


def told(name: str, found: dict[str, Any]) -> Iterator[str]:
    """A model's result for people."""
    of = found["correctness"]
    yield f"{name}: {of.get('reason') or 'the comparison failed: ' + last_line(of['error'])}"
    for number, sample in enumerate(of.get("samples", ()), start=1):
        pairs = (f"{pair.replace('_', ' ')} {each['loss']:.1e}, {each['gradient']:.1e}" for pair, each in sample.items())
        yield f"  batch {number}, loss and gradient: {'; '.join(pairs)}"
    of = found["compile"]
    if "error" in of:
        yield f"  mx.compile failed: {last_line(of['error'])}"
    else:
        without, compiled = (spread(each[1:])["median"] / of["steps"] for each in of["seconds"].values())
        yield f"  mx.compile: {without:.4f} s a step without, {compiled:.4f} with; {of['traces']} traces of {of['shapes']} shapes"
    for phase, engines in found["rates"].items():
        for engine, each in engines.items():
            speed, peak = each["tokens_per_second"], each["peak_bytes"] / 2**30
            ratio = f", ours {each['ours_over_it']['median']:.2f} times" if "ours_over_it" in each else ""
            low_high = f"{speed['low']:,.0f} to {speed['high']:,.0f}"
            yield f"  {phase:5} {engine:10} {speed['median']:10,.0f} tokens/s ({low_high}), {peak:6.2f} GiB{ratio}"
    for engine, each in found["engines"].items():
        if "error" in each:
            yield f"  {engine} left out: {last_line(each['error'])}"
    if "broken_off" in found:
        yield f"  broken off: {last_line(found['broken_off'])}"


def measure(chosen: argparse.Namespace, gpu: bool, out: Path) -> None:
    """All parts, written after each model, told at the end."""
    rounds, seconds = chosen.rounds or (1 if chosen.quick else 3), chosen.seconds or (1.0 if chosen.quick else 10.0)
    plan = replace(bench.QUICK if chosen.quick else bench.WHOLE, rounds=rounds, seconds=seconds)
    dtype, progress = "bfloat16" if gpu else "float32", bench.Progress()
    installed = {each.name: each.version for each in metadata.distributions() if (each.name or "").startswith("mlx")}
    machine = {"mlx": str(mx.default_device()), **mx.device_info(), **bench.machine()}
    if tool := shutil.which("nvidia-smi"):
        command = [tool, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        machine["nvidia-smi"] = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    found: dict[str, Any] = {"date": datetime.date.today().isoformat(), "quick": chosen.quick, "device": machine,
                             "MLX_ENABLE_TF32": os.environ.get("MLX_ENABLE_TF32"), "versions": installed,
                             "models": {}}  # fmt: skip
    trial = ", A TRIAL: its numbers say nothing" if chosen.quick else ""
    progress.say(f"{machine['mlx']} ({machine.get('device_name')}), rates in {dtype}, {installed}{trial}")
    with tempfile.TemporaryDirectory() as folder:
        path = bench.prepared(Path(folder), plan, None)
        shared = json.loads(path.read_text()) | {"dtype": dtype, "gpu": gpu, "rounds": rounds}
        found["architectures"] = architectures(path, ("llama", "gpt2", "mamba2") if chosen.quick else ARCHITECTURES, progress)
        tokens, rows = Path(folder, "tokens.jsonl"), protocol.json_rows(f"{shared['data']}/train.jsonl")
        tokens.write_text("".join(json.dumps(each) + "\n" for each in bench._encoded(Path(shared["model"]), rows)))
        for name, model, layers in models(Path(folder), chosen.quick, getattr(mx, dtype)):
            out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            progress.say(name)
            mx.clear_cache()
            settings = Path(folder, f"{model.name}.json")
            settings.write_text(json.dumps({
                **shared, "model": str(model), "config": json.loads((model / "config.json").read_text()), "layers": layers,
                "train_tokens": str(tokens), "states": f"{model}-states", REFERENCE: f"{model}-reference.safetensors",
            }))  # fmt: skip
            found["models"][name] = of_model(settings, plan, chosen.peers, progress)
            print("\n".join(told(name, found["models"][name])), flush=True)
            out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"Written: {out}")


def main() -> None:
    """Measure, tell and write; or be one of the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, metavar="PYTHON", help="the Python of an environment with torch for the GPU")
    parser.add_argument("--rounds", type=int, help="rounds of windows (3)")
    parser.add_argument("--seconds", type=float, help="of a window (10)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the file that is written (benchmarks/results/gpu-DATE.json)")
    parser.add_argument("--quick", action="store_true", help="a trial on a tiny model, on a CPU, too")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--settings", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        parts = {"proofs": proofs, REFERENCE: reference, "gradients": gradients, "compile": compiled, TORCH: torch_windows}
        parts |= {OURS: windows, MLX_LM: windows}
        parts[chosen.worker](protocol.Answers(), json.loads(chosen.settings.read_text()) | {"worker": chosen.worker})
        return
    if chosen.peers is not None and not chosen.peers.exists():
        parser.error(f"--peers={chosen.peers}: there is no such Python.")
    gpu = mx.default_device() != mx.Device(mx.cpu)
    if not gpu and not chosen.quick:
        parser.error("MLX has no GPU here: pip install 'mlx[cuda]', or take a Mac. --quick tries this script on a CPU.")
    name = f"gpu-{datetime.date.today().isoformat()}{'-quick' if chosen.quick else ''}.json"
    out = chosen.out or bench.HERE / "results" / name
    out.parent.mkdir(parents=True, exist_ok=True)
    measure(chosen, gpu, out)


if __name__ == "__main__":
    main()
