"""The folder for Hamilton's contrib hub: `python publish/contrib.py OUT [--user NAME]`.

OUT/NAME/author.md and OUT/NAME/fine_tuning_mlx with what the hub asks for: __init__.py (the dataflow as one flat module),
README.md, tags.json, valid_configs.jsonl, requirements.txt and dag.png.

The dataflow cannot be called finetune_dataflow there. `dataflows.import_module` puts the module into `sys.modules` under its
folder's name, where it would stand in the place of the package that its engine comes from.
"""

from __future__ import annotations

import argparse
import json
import keyword
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from string import Template

from flat_module import flat_module
from png import png

import finetune_dataflow
from finetune_dataflow import engine
from finetune_dataflow.cli.graph import dot_source
from finetune_dataflow.errors import UserError
from finetune_dataflow.start import STARTS

NAME = "fine_tuning_mlx"
USER = "finetune_dataflow"
DISTRIBUTION = "finetune-dataflow"
TAGS = {
    "schema": "1.0",
    "use_case_tags": ["LLM", "fine-tuning", "LoRA", "MLX", "evaluation"],
    "secondary_tags": {"language": "English"},
}
_HERE = Path(__file__).parent


def build(out: Path, user: str = USER) -> Path:
    """Write the folder of `user`, anew where it is there, and return it.

    Raises UserError for a name that is no Python name, and where the flat module cannot be made.
    """
    if not user.isidentifier() or keyword.iskeyword(user):
        raise UserError(
            f"--user {user!r} is no Python name. Expected a GitHub name with underscores for hyphens, "
            "and one in front of a digit."
        )
    folder = out / user
    shutil.rmtree(folder, ignore_errors=True)
    for path, content in _files(user).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def requirement(version: str = finetune_dataflow.__version__) -> str:
    """The line of requirements.txt: this version and no other.

    Hamilton's `are_py_dependencies_satisfied` finds a package's name before the first of =, < and > only where a line has all
    three, and takes the whole line for the name otherwise; so it is not `==`.
    """
    return f"{DISTRIBUTION}>={version},<={version}"


def _files(user: str) -> dict[str, bytes]:
    """The content of every file, by its path in the user's folder."""
    texts = {
        "author.md": _filled("author.md", user),
        f"{NAME}/__init__.py": flat_module(NAME),
        f"{NAME}/README.md": _filled("README-contrib.md", user),
        f"{NAME}/tags.json": json.dumps(TAGS, indent=2) + "\n",
        f"{NAME}/valid_configs.jsonl": "".join(json.dumps({"start": start}) + "\n" for start in STARTS),
        f"{NAME}/requirements.txt": f"{requirement()}\n",
    }
    picture = png(engine.drawing.svg(dot_source("base")))
    return {**{path: text.encode("utf-8") for path, text in texts.items()}, f"{NAME}/dag.png": picture}


def _filled(template: str, user: str) -> str:
    text = (_HERE / template).read_text(encoding="utf-8")
    github = user.replace("_", "-").removeprefix("-")
    return Template(text).substitute(name=NAME, user=user, github=github, version=finetune_dataflow.__version__)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the folder and say where it is."""
    parser = argparse.ArgumentParser(description="Write the folder for Hamilton's contrib hub.")
    parser.add_argument("out", type=Path, help="the directory that the user's folder is written to")
    parser.add_argument("--user", default=USER, help="the contributor's name on GitHub, with underscores for hyphens")
    arguments = parser.parse_args(argv)
    try:
        print(f"Wrote {build(arguments.out, arguments.user)}.")
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
