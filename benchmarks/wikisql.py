"""Rows like WikiSQL's as prompts and completions, drawn from a seed or read from a real copy of the set.

A generated row has 98 tokens under the embedded model's chat template, 28 of them learned, on average.
`python benchmarks/wikisql.py ROWS` prints rows as JSON lines.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

SUBJECTS = (
    "Player", "Country", "Position", "School", "Team", "Season", "Title", "Director", "Writer", "Date", "Score", "Result",
    "Opponent", "Venue", "Record", "Driver", "Party", "District", "Artist", "Album", "Label", "Region", "Capital", "Network",
)  # fmt: skip
AMOUNTS = (
    "Year", "Attendance", "Points", "Goals", "Rank", "Laps", "Grid", "Population", "Area", "Height", "Weight", "Price",
    "Wins", "Losses", "Rounds", "Seats", "Votes", "Episodes", "Viewers", "Gross",
)  # fmt: skip
VALUES = (
    "Canada", "France", "Michigan", "Toronto", "Guard", "Forward", "Ferrari", "Williams", "Democratic", "Republican",
    "Chelsea", "Arsenal", "Liverpool", "January", "March", "August", "Nashville", "Memphis", "Portland", "Denver", "Seattle",
    "Wisconsin", "Ohio", "Texas", "Florida", "Oregon", "Virginia", "Lakers", "Bulls", "Celtics", "Rockets", "Hawks",
)  # fmt: skip
QUESTIONS = (
    "What is the {0} when the {1} is {3}{2}?",
    "Which {0} has {3} as {1}{2}?",
    "Name the {0} of {1} {3}{2}",
)
SEPARATOR = "\nA: "  # in a real copy's texts, between the prompt and the completion


def rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """`count` rows with `prompt` and `completion`, the same for the same seed; a larger count begins with the same rows."""
    draw = random.Random(seed)
    return [_row(draw) for _ in range(count)]


def read(path: Path, count: int) -> list[dict[str, str]]:
    """The first `count` rows of a JSONL file: either `prompt` and `completion`, or one `text` with "A: " before the query.

    Raises ValueError for a file with fewer rows, or with a row that is neither.
    """
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()][:count]
    if len(lines) < count:
        raise ValueError(f"{path} has {len(lines)} rows. Expected at least {count}.")
    return [_parted(json.loads(line), f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    """Write rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _row(draw: random.Random) -> dict[str, str]:
    amount, subjects = draw.choice(AMOUNTS), draw.sample(SUBJECTS, draw.choice((2, 2, 2, 3, 4, 6)))
    columns = draw.sample([amount, *subjects], len(subjects) + 1)
    wanted, known = draw.sample(subjects, 2)
    value = " ".join(draw.sample(VALUES, draw.choice((2, 3, 4, 6))))
    least, table = draw.randint(1, 999), f"{draw.choice((1, 2))}-{draw.randint(100, 999)}"
    limited = draw.random() < 0.9
    asked = draw.choice(QUESTIONS).format(wanted, known, f" and {amount} over {least}" if limited else "", value)
    query = f"SELECT {wanted} FROM {table} WHERE {known} = '{value}'" + (f" AND {amount} > {least}" if limited else "")
    return {"prompt": f"table: {table}\ncolumns: {', '.join(columns)}\nQ: {asked}", "completion": query}


def _parted(row: dict[str, str], place: str) -> dict[str, str]:
    if {"prompt", "completion"} <= row.keys():
        return {"prompt": row["prompt"], "completion": row["completion"]}
    prompt, separator, completion = row.get("text", "").partition(SEPARATOR)
    if not separator:
        raise ValueError(f"{place} has {', '.join(row)}. Expected prompt and completion, or a text with {SEPARATOR!r} in it.")
    return {"prompt": prompt, "completion": completion}


def main() -> None:
    """Print rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", metavar="ROWS", type=int)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    for row in rows(chosen.count, chosen.seed):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
