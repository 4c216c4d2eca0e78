"""Our fit beside its peers, the same work on the same machine: `make bench`, or `python benchmarks/bench.py --peers PYTHON`.

The work: LoRA of rank 8 on all matrices of the last 16 layers of SmolLM2-135M-Instruct in float32, batches of 8 rows like
WikiSQL's, the completions learned. The peers: `mlx_lm.lora` as shipped, the same with the BLAS that we put in front of MLX,
and TRL's SFTTrainer with PEFT on PyTorch's CPU build. PYTHON is that of an environment with peers/requirements.txt.

Every engine is a process of its own that loads and prepares once and then trains in windows of 20 seconds, one engine at a
time, in an order that changes from round to round; a ratio is taken within a round, so a machine that slows down for a minute
slows both. Rates are true tokens a second, padding left out. In a window of the first epoch ours also computes the frozen
layers' states of the rows; a peer does the same in each. The file that is written holds every window.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import os
import platform
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import wikisql
from arithmetic import Decoder, Work, exponent, spread, step_operations

Name = TypeVar("Name")
HERE = Path(__file__).parent
WORKERS, ROOT = HERE / "peers", HERE.parent
OURS, SAME_BLAS, SHIPPED, TRL = "ours", "mlx_lm_same_blas", "mlx_lm_as_shipped", "trl_peft"
THEIRS = ("generate", "generate_batched")  # mlx_lm one prompt after another, and side by side
PHASES = {"first": "first_epoch", "later": "later_epochs"}
# At least so many times a peer's rate; at most so many times the limit, the peer's memory, the best peer's loss.
AT_LEAST = {
    "mlx_lm_as_shipped": 20.0, "mlx_lm_same_blas_first_epoch": 2.0, "mlx_lm_same_blas_later_epochs": 3.0,
    "trl_peft_first_epoch": 1.5, "trl_peft_later_epochs": 2.5, "generation": 4.0,
}  # fmt: skip
AT_MOST = {"arithmetic_limit": 2.0, "peak_memory": 0.6, "final_loss": 1.01, "minutes": 75.0}
LEARNING = {
    "rank": 8, "layers": 16, "scale": 20.0, "batch_size": 8, "learning_rate": 2e-4, "weight_decay": 0.01, "warmup": 0.1,
    "seed": 42, "prompts": 32, "one_by_one": 6, "max_tokens": 16, "generation_batch_size": 32,
}  # fmt: skip
PATIENCE = 1800.0  # seconds that an answer may take
PAUSE = 0.5  # seconds between two windows, in which the threads of the last go to sleep
IDLE = 0.02  # of a core: what a waiting engine may use


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    rounds: int
    seconds: float
    rows: int
    validation_rows: int
    shipped_steps: int
    growth: dict[str, Any]


WHOLE = Plan(5, 20.0, 300, 100, 2, {
    "rows": [64, 128, 256, 512], "sequence_length": [64, 128, 256, 512], "tuned_layers": [4, 8, 16, 30], "usual_length": 96
})  # fmt: skip
QUICK = Plan(2, 3.0, 48, 8, 0, {
    "rows": [8, 16], "sequence_length": [32, 64], "tuned_layers": [4, 8], "usual_length": 32
})  # fmt: skip


class Progress:
    """Lines with the minutes since the start."""

    def __init__(self) -> None:
        """Start the clock."""
        self._started = time.monotonic()

    @property
    def minutes(self) -> float:
        """Since the start."""
        return (time.monotonic() - self._started) / 60

    def say(self, text: str) -> None:
        """Print a line."""
        print(f"[{self.minutes:5.1f} min] {text}", flush=True)


class Worker:
    """An engine in a process of its own, which answers lines with JSON."""

    def __init__(self, name: str, python: Path, mode: str, settings: Path) -> None:
        """Start it; what it prints goes to a log beside the settings."""
        script = {OURS: "ours.py", TRL: "trl_worker.py"}.get(name, "mlx_lm_worker.py")
        command = [str(python), str(WORKERS / script), mode, "--settings", str(settings)]
        self.name, self._log = name, settings.with_name(f"{name}-{mode}.log")
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command + ["--same-blas"] * (name == SAME_BLAS),
                env=_environment(name), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip

    def __enter__(self) -> Worker:
        """The worker itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """End the process."""
        if kind is not None:
            self._process.kill()
        self._process.communicate()

    def ask(self, command: str) -> dict[str, Any]:
        """The answer to a command."""
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The next answer. Raises RuntimeError with the end of the log where the process ended or takes too long."""
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], PATIENCE)
        line = self._process.stdout.readline() if ready else ""
        if not line:
            self._process.kill()
            raise RuntimeError(f"{self.name} gave no answer. The end of its log:\n{self._log.read_text()[-3000:]}")
        return dict(json.loads(line))

    def processor_seconds(self) -> float:
        """The processor time that the process has used; 0 where the system does not tell."""
        status = Path(f"/proc/{self._process.pid}/stat")
        if not status.exists():
            return 0.0
        user, system = status.read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _environment(name: str) -> dict[str, str]:
    """An engine's environment variables: this checkout is on the path where its BLAS is wanted, and nowhere else."""
    found = {key: value for key, value in os.environ.items() if key not in ("FINETUNE_DATAFLOW_BLAS", "PYTHONPATH")}
    found |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
    if name in (OURS, SAME_BLAS):
        return found | {"PYTHONPATH": str(ROOT)}
    return found | {"FINETUNE_DATAFLOW_BLAS": "off"}


class Bench:
    """One run: engines, plan and what was found so far."""

    def __init__(self, plan: Plan, pythons: dict[str, Path], settings: Path, progress: Progress) -> None:
        """Nothing runs yet. pythons: each engine's Python."""
        self.plan, self._pythons, self._settings, self.progress = plan, pythons, settings, progress
        shared = json.loads(settings.read_text())
        self._model, self._tuned, self._rank = Decoder.of(shared["config"]), shared["layers"], shared["rank"]
        self.engines: dict[str, Any] = {}
        self.windows: list[dict[str, Any]] = []
        self.generation: list[dict[str, Any]] = []
        self.matrix_rates: list[dict[str, Any]] = []
        self.idle_share = 0.0

    def worker(self, name: str, mode: str = "windows") -> Worker:
        """A new process of an engine."""
        return Worker(name, self._pythons[name], mode, self._settings)

    def interleaved(self) -> None:
        """The rounds of windows, with all three engines loaded and one at a time working."""
        with ExitStack() as stack:
            workers = {}
            for name in (OURS, SAME_BLAS, TRL):
                workers[name] = stack.enter_context(self.worker(name))
                self.engines[name] = self._begun(workers[name])
            for number in range(1, self.plan.rounds + 1):
                for name, command in _turned([(OURS, "generate"), *((SAME_BLAS, each) for each in THEIRS)], number):
                    found = self._watched(workers, name, command)
                    self.generation.append({"engine": name, "way": command, "round": number, **found})
            self.progress.say(f"generation: {self.plan.rounds} rounds")
            for worker in workers.values():
                worker.ask(f"window {self.plan.seconds / 2} warm")
            for number in range(1, self.plan.rounds + 1):
                self._round(workers, number)

    def _round(self, workers: dict[str, Worker], number: int) -> None:
        for phase in PHASES:
            for name in _turned(list(workers), number):
                found = self._watched(workers, name, f"window {self.plan.seconds} {phase}")
                self.windows.append({"engine": name, "round": number, **found})
            told = ", ".join(f"{each['engine']} {rate(each):,.0f}" for each in self.windows[-len(workers) :])
            self.progress.say(f"round {number} of {self.plan.rounds}, {phase}: {told} tokens/s")
        self.matrix_rates.append({"round": number, **workers[OURS].ask("rate")})

    def shipped(self) -> None:
        """Some steps of `mlx_lm.lora` as shipped."""
        if not self.plan.shipped_steps:
            return
        with self.worker(SHIPPED) as worker:
            self.engines[SHIPPED] = self._begun(worker)
            self.progress.say(f"{SHIPPED}: {self.plan.shipped_steps} steps, minutes each")
            found = worker.ask(f"steps {self.plan.shipped_steps} first")
            self.windows.append({"engine": SHIPPED, "round": 1, **found})
            self.progress.say(f"{SHIPPED}: {rate(found):,.1f} tokens/s")

    def losses(self) -> dict[str, Any]:
        """Each engine's validation loss after one epoch."""
        found = {}
        for name in (OURS, SAME_BLAS, TRL):
            with self.worker(name, "loss") as worker:
                found[name] = worker.answer()
            self.progress.say(f"{name}: loss {found[name]['loss']:.4f} after one epoch")
        return found

    def growth(self) -> dict[str, Any]:
        """Our seconds by size, a table for each of rows, sequence length and tuned layers, with its exponent."""
        tables: dict[str, dict[str, float]] = {}
        with self.worker(OURS, "growth") as worker:
            while "done" not in (found := worker.answer()):
                tables.setdefault(found["table"], {})[str(found["size"])] = round(found["seconds"], 4)
                self.progress.say(f"{found['table'].replace('_', ' ')} {found['size']}: {found['seconds']:.2f} s")
        return {
            name: {"seconds": each, "exponent": round(exponent([*map(float, each)], [*each.values()]), 3)}
            for name, each in tables.items()
        }

    def limit(self) -> dict[str, list[float]]:
        """Our seconds in each round over those that the windows' arithmetic takes at the measured rate, by phase."""
        found: dict[str, list[float]] = {phase: [] for phase in PHASES}
        for each in self.of(OURS):
            work = Work(each["positions"], each["pairs"], each["supervised"])
            operations = step_operations(self._model, work, self._tuned, self._rank, each["phase"] == "first")
            measured = self.matrix_rates[each["round"] - 1]["operations_per_second"]
            found[each["phase"]].append(each["seconds"] / (operations / measured))
        return found

    def of(self, name: str, phase: str | None = None) -> list[dict[str, Any]]:
        """An engine's windows, in the order of the rounds."""
        return [each for each in self.windows if each["engine"] == name and phase in (None, each["phase"])]

    def ratios(self, losses: dict[str, Any]) -> dict[str, dict[str, float]]:
        """Ours over each peer's, the least, the median and the greatest of the rounds.

        The peak is that of the processes that made `losses`, from their start to the end of their epoch.
        """
        found = {}
        for peer in (SAME_BLAS, TRL):
            for phase, title in PHASES.items():
                pairs = zip(self.of(OURS, phase), self.of(peer, phase), strict=True)
                found[f"{peer}_{title}"] = spread([rate(one) / rate(other) for one, other in pairs])
        if shipped := self.of(SHIPPED):
            found[SHIPPED] = spread([rate(each) / rate(shipped[0]) for each in self.of(OURS, "first")])
        found["arithmetic_limit"] = spread(self.limit()["later"])
        replies = [rate(each) for each in self.generation if each["engine"] == OURS]
        for title, way in zip(("generation", "generation_batched"), THEIRS, strict=True):
            others = [rate(each) for each in self.generation if each["engine"] == SAME_BLAS and each["way"] == way]
            found[title] = spread([one / other for one, other in zip(replies, others, strict=True)])
        found["peak_memory"] = spread([losses[OURS]["peak_bytes"] / losses[SAME_BLAS]["peak_bytes"]])
        return found

    def _begun(self, worker: Worker) -> dict[str, Any]:
        about = worker.answer()
        self.progress.say(f"{worker.name} is ready ({about['blas']})")
        return about

    def _watched(self, workers: dict[str, Worker], name: str, command: str) -> dict[str, Any]:
        """The answer of one worker; the others must sleep meanwhile."""
        time.sleep(PAUSE)
        others = [each for each in workers.values() if each.name != name]
        before, started = sum(each.processor_seconds() for each in others), time.perf_counter()
        found = workers[name].ask(command)
        used = sum(each.processor_seconds() for each in others) - before
        self.idle_share = max(self.idle_share, used / (time.perf_counter() - started))
        return found


def rate(found: dict[str, Any]) -> float:
    """True tokens a second of a window."""
    return float(found["tokens"] / found["seconds"])


def judged(values: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Each target with what was found, and whether it is met; what was not measured is left out."""
    limits = {name: (target, 1) for name, target in AT_LEAST.items()} | {name: (target, -1) for name, target in AT_MOST.items()}
    return {
        name: {"target": target, "found": round(values[name], 3), "met": sign * values[name] >= sign * target}
        for name, (target, sign) in limits.items()
        if name in values
    }


def _turned(names: list[Name], number: int) -> list[Name]:
    place = number % len(names)
    return names[place:] + names[:place]


def prepared(directory: Path, plan: Plan, data: Path | None) -> Path:
    """Write the rows and the settings that all engines share; the settings' path."""
    from finetune_dataflow.embedded_model import embedded_model_directory

    model = embedded_model_directory()
    if data is None:
        both = wikisql.rows(plan.rows + plan.validation_rows)
        train, validation = both[: plan.rows], both[plan.rows :]
    else:
        train = wikisql.read(data / "train.jsonl", plan.rows)
        validation = wikisql.read(data / "valid.jsonl", plan.validation_rows)
    wikisql.write(directory / "data" / "train.jsonl", train)
    tokens = [*_encoded(model, validation)]
    (directory / "validation.jsonl").write_text("".join(json.dumps(each) + "\n" for each in tokens))
    settings = {
        **LEARNING, "model": str(model), "config": json.loads((model / "config.json").read_text()), "rows": len(train),
        "data": str(directory / "data"), "validation": str(directory / "validation.jsonl"), "threads": _threads(),
        "growth": plan.growth,
    }  # fmt: skip
    path = directory / "settings.json"
    path.write_text(json.dumps(settings))
    return path


def _encoded(model: Path, rows: Sequence[dict[str, str]]) -> Iterator[dict[str, Any]]:
    """The rows' token ids and labels, by which every engine's final loss is measured."""
    from finetune_dataflow.engine.chat import Conversation, encode_conversations, load_encoder

    chats = [Conversation(n, ({"role": "user", "content": row["prompt"]},), row["completion"]) for n, row in enumerate(rows)]
    columns = encode_conversations(load_encoder(model), chats, 2048, "error")
    for index in range(len(columns)):
        yield {
            "input_ids": columns.row_ids(index).tolist(), "labels": columns.row_labels(index).tolist(),
            "prompt_length": int(columns.prompt_lengths[index]),
        }  # fmt: skip


def _threads() -> int:
    """The threads that the BLAS of ours runs on: PyTorch is given as many."""
    from finetune_dataflow.engine.cpu_runtime import load_fast_blas

    return load_fast_blas().threads or os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """What this ran on."""
    described = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in described.read_text().splitlines() if line.startswith("model name")] \
        if described.exists() else []  # fmt: skip
    return {
        "processor": names[0] if names else platform.processor(), "cores": os.cpu_count(), "threads": _threads(),
        "system": f"{platform.system()} {platform.machine()}", "python": platform.python_version(),
    }  # fmt: skip


def measured(bench: Bench, unfinished: Path) -> dict[str, Any]:
    """Everything that a run finds. What was found so far lies in the file `unfinished` while a stage runs."""
    so_far: dict[str, Any] = {"machine": machine(), "windows": bench.windows, "generation": bench.generation}
    bench.interleaved()
    unfinished.write_text(json.dumps(so_far))
    losses = so_far["final_loss"] = bench.losses()
    unfinished.write_text(json.dumps(so_far))
    growth = so_far["growth"] = bench.growth()
    unfinished.write_text(json.dumps(so_far))
    bench.shipped()
    unfinished.unlink()
    ratios = bench.ratios(losses)
    final = losses[OURS]["loss"] / min(losses[name]["loss"] for name in (SAME_BLAS, TRL))
    values = {name: each["median"] for name, each in ratios.items()} | {"final_loss": final}
    return {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "ratios": ratios,
        "targets": judged(values | {"minutes": bench.progress.minutes}),
        "final_loss": losses,
        "growth": growth,
        "arithmetic_limit": {phase: spread(each) for phase, each in bench.limit().items()},
        "matrix_rates": bench.matrix_rates,
        "idle_share_of_a_core": round(bench.idle_share, 4),
        "engines": bench.engines,
        "settings": LEARNING,
        "generation": bench.generation,
        "windows": bench.windows,
    }


def with_losses(found: dict[str, Any], bench: Bench) -> dict[str, Any]:
    """An earlier run's result with final losses, and the peaks of these fits, measured again: on the rows that `--data` names."""
    losses = bench.losses()
    final = losses[OURS]["loss"] / min(losses[name]["loss"] for name in (SAME_BLAS, TRL))
    peak = losses[OURS]["peak_bytes"] / losses[SAME_BLAS]["peak_bytes"]
    plain = {f"{name}_of_made_rows": found[name] for name in ("final_loss",) if f"{name}_of_made_rows" not in found}
    targets = {**found["targets"], **judged({"final_loss": final, "peak_memory": peak})}
    ratios = {**found["ratios"], "peak_memory": spread([peak])}
    return {**found, **plain, "ratios": ratios, "final_loss": losses, "targets": targets}


def told(found: dict[str, Any]) -> Iterator[str]:
    """The result for people."""
    for name, each in found["ratios"].items():
        yield f"{name:32} {each['median']:8.3g}  ({each['low']:.3g} to {each['high']:.3g})"
    for name, each in found["growth"].items():
        sizes = ", ".join(f"{size}: {seconds:.2f} s" for size, seconds in each["seconds"].items())
        yield f"cost by {name.replace('_', ' ')}: {sizes}; exponent {each['exponent']:.2f}"
    for name, each in found["targets"].items():
        yield f"{'met   ' if each['met'] else 'MISSED'} {name}: {each['found']:.3g}, target {each['target']:g}"
    if found["idle_share_of_a_core"] > IDLE:
        yield f"A waiting engine used {found['idle_share_of_a_core']:.1%} of a core: the windows are not apart."


def commit(path: Path) -> None:
    """Commit the file alone."""
    for command in (["add", path.name], ["commit", "--quiet", "-m", f"Benchmark results of {path.stem}", "--", path.name]):
        subprocess.run(["git", "-C", str(path.parent), *command], check=True)


def main() -> None:
    """Measure, tell, write, and commit where it is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, default=ROOT / ".venv-peers/bin/python", help="the peers' Python")
    parser.add_argument("--data", type=Path, help="a directory with WikiSQL's train.jsonl and valid.jsonl; else rows are made")
    parser.add_argument("--rounds", type=int, help="rounds of windows")
    parser.add_argument("--quick", action="store_true", help="a trial: short windows, without mlx_lm as shipped")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="the directory that the results are written to")
    parser.add_argument("--losses-into", type=Path, help="measure the final losses alone, and put them into these results")
    parser.add_argument("--commit", action="store_true", help="commit the results")
    chosen = parser.parse_args()
    if not chosen.peers.exists():
        parser.error(f"--peers={chosen.peers}: there is no such Python. `make bench` makes one.")
    logging.basicConfig(level=logging.WARNING)
    plan = QUICK if chosen.quick else WHOLE
    if chosen.rounds:
        plan = Plan(**{**vars(plan), "rounds": chosen.rounds})
    pythons = dict.fromkeys((SAME_BLAS, SHIPPED, TRL), chosen.peers) | {OURS: Path(sys.executable)}
    chosen.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        settings = prepared(Path(directory), plan, chosen.data)
        bench, path = Bench(plan, pythons, settings, Progress()), chosen.losses_into
        if path is not None:
            found = with_losses(json.loads(path.read_text(encoding="utf-8")), bench)
        else:
            found = measured(bench, chosen.out / "unfinished.json")
            path = chosen.out / f"{found['date']}.json"
    print("\n".join(told(found)))
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"Written: {path}")
    if chosen.commit:
        commit(path)


if __name__ == "__main__":
    main()
