"""A reader of Modelfiles after Ollama's own: character by character, no escapes, what is not printable dropped."""

from __future__ import annotations


def read_modelfile(text: str) -> list[tuple[str, str]]:
    """The instructions of a Modelfile, their names in lower case; a parameter's name stands in the place of `parameter`."""
    found: list[tuple[str, str]] = []
    state, name, taken = "nothing", "", ""
    for each in f"{text}\n":
        if state == "nothing":
            if each == "#":
                state = "comment"
            elif not each.isspace():
                state, taken = "name", each
        elif state == "comment":
            state = "nothing" if each in "\r\n" else state
        elif state in ("name", "parameter") and each in " \t":
            name, taken = taken.lower(), ""
            state = "parameter" if (state, name) == ("name", "parameter") else "value"
        elif state in ("name", "parameter"):
            assert each.isascii() and (each.isalpha() or (state == "parameter" and (each.isdigit() or each == "_"))), (
                taken,
                each,
            )
            taken += each
        elif each in "\r\n" and (value := _unquoted(taken.strip())) is not None:
            found.append((name, value))
            state, taken = "nothing", ""
        elif each in " \t\r\n" or each.isprintable():
            taken += each
    assert state in ("nothing", "comment"), f"the file ends within {name} {taken[:80]!r}"
    assert all(each in KNOWN for each, _ in found), found
    assert [each for each, _ in found].count("from") == 1
    return found


KNOWN = ("from", "adapter", "template", "system", "license", "stop", "temperature", "num_ctx", "num_predict", "top_p", "seed")


def _unquoted(value: str) -> str | None:
    for quotes in ('"""', '"'):
        if value.startswith(quotes):
            return value[len(quotes) : -len(quotes)] if len(value) >= 2 * len(quotes) and value.endswith(quotes) else None
    return value
