"""A Dockerfile read, and its steps carried out in a directory, for machines without a container engine.

What it knows: FROM … AS, ARG, ENV, LABEL, WORKDIR, COPY (--from), RUN in shell form, USER, STOPSIGNAL, ENTRYPOINT, CMD.
Anything else raises, so that nothing is passed over in silence.

What is not as in a container: commands run on this machine's system as this process's user, and an absolute path below one of
`PLACES` is a path below the directory instead. All stages see the same directory, one after another, so that paths which one
stage writes into its files hold in the next one, as they do in a container.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PLACES = ("/build", "/cache", "/data", "/opt", "/wheels")
_BELOW_PLACES = re.compile(rf"(?<![\w./])(?=({'|'.join(PLACES)})(?!\w))")


@dataclass(frozen=True)
class Instruction:
    """One instruction: RUN, COPY, …; its flags (`--from=builder`) and the rest of its text."""

    name: str
    flags: Mapping[str, str]
    text: str

    @property
    def words(self) -> list[str]:
        """The text as words: those of a JSON list, or as a shell parts them."""
        return list(json.loads(self.text)) if self.text.startswith("[") else shlex.split(self.text)

    @property
    def pairs(self) -> dict[str, str]:
        """The text of ENV and LABEL: NAME=VALUE …"""
        return dict(word.partition("=")[::2] for word in self.words)


@dataclass
class Stage:
    """The instructions from one FROM to the next."""

    base: str
    name: str
    instructions: list[Instruction] = field(default_factory=list)

    def all(self, name: str) -> list[Instruction]:
        """The instructions of one name, in order."""
        return [each for each in self.instructions if each.name == name]

    def last(self, name: str) -> Instruction:
        """The last instruction of one name, the one that holds."""
        return self.all(name)[-1]

    @property
    def environment(self) -> dict[str, str]:
        """What ENV sets, as written."""
        return {name: value for each in self.all("ENV") for name, value in each.pairs.items()}


def read_dockerfile(path: Path) -> list[Stage]:
    """The stages of a Dockerfile."""
    stages: list[Stage] = []
    for each in _instructions(path.read_text(encoding="utf-8")):
        if each.name == "FROM":
            base, *named = each.words
            stages.append(Stage(base, named[1] if named else ""))
        elif stages:
            stages[-1].instructions.append(each)
        else:
            raise ValueError(f"{each.name} stands before the first FROM")
    return stages


def _instructions(text: str) -> Iterator[Instruction]:
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    for joined in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        name, _, rest = joined.strip().partition(" ")
        flags = {}
        while found := re.match(r"--([a-z]+)=(\S+)\s+", rest):
            flags[found[1]] = found[2]
            rest = rest[found.end() :]
        yield Instruction(name, flags, rest.strip())


class Ignored:
    """The patterns of a .dockerignore: Go's filepath.Match with `**`; a path is left out with any of its directories; the
    last pattern that matches decides.
    """

    def __init__(self, text: str) -> None:
        lines = [line.strip() for line in text.splitlines()]
        self.patterns = [
            (not line.startswith("!"), _expression(line.removeprefix("!").strip("/")))
            for line in lines
            if line and not line.startswith("#")
        ]

    def excludes(self, path: str) -> bool:
        """Whether a path, from the context's root and with slashes, stays out."""
        parts = path.split("/")
        places = ["/".join(parts[: count + 1]) for count in range(len(parts))]
        out = False
        for excluding, expression in self.patterns:
            if any(expression.fullmatch(place) for place in places):
                out = excluding
        return out


def _expression(pattern: str) -> re.Pattern[str]:
    """A pattern as a regular expression; classes of characters are not known."""
    if "[" in pattern:
        raise ValueError(f"{pattern!r}: classes of characters are not known here")
    pieces = {"**/": "(.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile("".join(pieces.get(each, re.escape(each)) for each in re.findall(r"\*\*/|\*\*|\*|\?|[^*?]+", pattern)))


class Build:
    """Carries a Dockerfile's stages out below a directory: `root` is `/`, `context` is what is copied from."""

    def __init__(self, stages: Sequence[Stage], context: Path, directory: Path) -> None:
        self.stages, self.context, self.directory = stages, context, directory
        self.root = directory / "root"
        self.ignored = Ignored((context / ".dockerignore").read_text(encoding="utf-8"))
        self.environment: dict[str, str] = {}
        self.working_directory = "/"
        self.log: list[str] = []

    def run(self) -> None:
        """Every instruction of every stage; the last stage is what stays in `root`."""
        for number, stage in enumerate(self.stages):
            self.root.mkdir(parents=True)
            self.environment, self.working_directory = {"PATH": base_path()}, "/"
            for each in stage.instructions:
                self._carry_out(each)
            if number < len(self.stages) - 1:
                self.root.rename(self._of_stage(stage.name))

    def _carry_out(self, each: Instruction) -> None:
        if each.name == "ENV":
            self.environment |= {name: self._filled(self._here(value)) for name, value in each.pairs.items()}
        elif each.name == "WORKDIR":
            self.working_directory = each.text
            self._place(".").mkdir(parents=True, exist_ok=True)
        elif each.name == "COPY":
            self._copy(each)
        elif each.name == "RUN":
            self._shell(each.text)
        elif each.name == "ARG" and "=" in each.text:
            raise ValueError("an ARG with a default is not known here")
        elif each.name not in ("ARG", "LABEL", "USER", "STOPSIGNAL", "ENTRYPOINT", "CMD"):
            raise ValueError(f"{each.name} is not known here")

    def _copy(self, each: Instruction) -> None:
        *sources, target = each.words
        stage = each.flags.get("from")
        if {*each.flags} - {"from"}:
            raise ValueError(f"COPY with {[*each.flags]} is not known here")
        into = self._place(target)
        for source in sources:
            origin = self._of_stage(stage) / source.lstrip("/") if stage else self.context / source
            if not origin.exists():
                raise FileNotFoundError(f"COPY {source}: there is no such file")
            if origin.is_dir():
                shutil.copytree(origin, into, symlinks=True, ignore=None if stage else self._left_out, dirs_exist_ok=True)
            else:
                if not stage and self.ignored.excludes(source):
                    raise FileNotFoundError(f"COPY {source}: .dockerignore keeps it out")
                whole = into / origin.name if target.endswith("/") else into
                whole.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(origin, whole)

    def _left_out(self, directory: str, names: list[str]) -> list[str]:
        places = {name: (Path(directory) / name).relative_to(self.context).as_posix() for name in names}
        return [name for name, place in places.items() if self.ignored.excludes(place)]

    def _shell(self, text: str) -> None:
        done = subprocess.run(
            ["/bin/sh", "-c", self._here(text)],
            cwd=self._place("."),
            env={**kept_of_this_machine(), **self.environment},
            capture_output=True,
            text=True,
            check=False,
        )
        self.log.append(done.stdout + done.stderr)
        if done.returncode != 0:
            raise RuntimeError(f"RUN {text}\nended with exit code {done.returncode}:\n{done.stderr[-3000:]}")

    def start(self, stage: Stage, words: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """`docker run IMAGE WORDS`: the entrypoint of the last stage with these words, with nothing but its ENV around it."""
        command = [*stage.last("ENTRYPOINT").words, *(self._here(word) for word in words)]
        path = str(self.environment["PATH"]).split(os.pathsep)[0]  # none of this machine's own commands
        environment = {**self.environment, "PATH": path, "LANG": "C.UTF-8"}
        program = shutil.which(command[0], path=path)
        assert program is not None, f"{command[0]} is not in {path}"
        return subprocess.run(
            [program, *command[1:]], cwd=self._place("."), env=environment, capture_output=True, text=True, check=False
        )

    def _of_stage(self, name: str) -> Path:
        return self.directory / f"stage-{name}"

    def _place(self, path: str) -> Path:
        """A path of the container's, below `root`."""
        return self.root / os.path.normpath(os.path.join(self.working_directory, path)).lstrip("/")

    def _here(self, text: str) -> str:
        """A text with the paths below `PLACES` put below `root`."""
        return _BELOW_PLACES.sub(lambda _: str(self.root), text)

    def _filled(self, value: str) -> str:
        return re.sub(r"\$(\w+)", lambda found: self.environment[found[1]], value)


def base_path() -> str:
    """Where the base image's commands are: here, this Python's, and the system's."""
    return os.pathsep.join([str(Path(sys.executable).parent), "/usr/local/bin", "/usr/bin", "/bin"])


def kept_of_this_machine() -> dict[str, str]:
    """What pip needs to find packages from here: its own settings, and where it looks for its configuration."""
    names = ("HOME", "TMPDIR", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")
    return {name: value for name, value in os.environ.items() if name in names or name.startswith("PIP_")}
