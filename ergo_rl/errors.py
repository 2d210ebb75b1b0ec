"""Every error that this project raises for its users derives from ErgoError."""

from __future__ import annotations


class ErgoError(Exception):
    """Base of all errors whose message alone should tell the user what to do."""

    exit_status = 1
    """Of a command that it ends."""


def explain(error: BaseException) -> str:
    """The message and the notes added to it, on one line. Notes of several lines are Ray's tracebacks: left out."""
    notes = [note for note in getattr(error, "__notes__", []) if "\n" not in note]
    return "; ".join([str(error) or type(error).__name__, *notes])


_SHOWN = 200
"""Characters of a message that are shown of an error that somebody else raised."""


def first_line(error: BaseException) -> str:
    """Return the type of an error that another library raised and the first line of its message, in short."""
    message = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {message[:_SHOWN]}".removesuffix(": ")
