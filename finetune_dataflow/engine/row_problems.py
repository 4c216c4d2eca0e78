"""What is wrong with rows, collected over a whole source and told once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from finetune_dataflow.engine.parsing import SHOWN
from finetune_dataflow.engine.sources import SourceRow, rows_named
from finetune_dataflow.errors import UserError, nearest


class RowError(Exception):
    """One fault of one row. Faults of the same `group` are told together, in the words of the first."""

    def __init__(self, group: str, found: str, expected: str = ".") -> None:
        """`found` comes before the rows' places in the message, `expected` after them."""
        super().__init__(found)
        self.group, self.found, self.expected = group, found, expected


@dataclass
class _Problem:
    found: str
    expected: str
    rows: list[SourceRow] = field(default_factory=list)


class RowProblems:
    """The faults found so far, by group, in the order of their first rows."""

    def __init__(self, location: str) -> None:
        """Nothing is wrong yet with the source at `location`."""
        self._location = location
        self._problems: dict[str, _Problem] = {}

    def add(self, row: SourceRow, error: RowError) -> None:
        """Note a fault of `row`."""
        self._problems.setdefault(error.group, _Problem(error.found, error.expected)).rows.append(row)

    def raise_if_any(self) -> None:
        """Raise one UserError that names the source, every kind of fault, its rows, what was found and what is expected."""
        if self._problems:
            told = [
                f"{self._location}: {each.found} in {rows_named(each.rows)}{each.expected}" for each in self._problems.values()
            ]
            more = [f"… and {len(told) - SHOWN} kinds of fault more."] if len(told) > SHOWN else []
            raise UserError("\n".join(told[:SHOWN] + more))


def missing_key(key: str, row: SourceRow, keys: Iterable[str]) -> RowError:
    """The fault of a row that has not `key`, with the keys it has and the nearest of them."""
    place = rows_named([row])
    found = sorted(keys)
    after = f". {place[0].upper()}{place[1:]} has the keys {quoted(found) or 'none'}.{nearest(key, found)}"
    return RowError(f"missing {key}", f"the key {key!r} is missing", after)


def quoted(names: Iterable[str], limit: int = 2 * SHOWN) -> str:
    """Some names in quotes, none longer than a line, at most `limit` of them."""
    listed = list(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(repr(name if len(name) <= 60 else f"{name[:60]}…") for name in listed[:limit]) + more
