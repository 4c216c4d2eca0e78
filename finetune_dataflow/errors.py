"""Errors that tell a user what was found, where, and what is expected."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake the user can mend: the command line prints it without a traceback and exits with code 2.

    The message names the file, row, key or option, what was found and what is expected.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """The sentence " Did you mean 'x'?" for the known name closest to `name`, or nothing where none is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""
