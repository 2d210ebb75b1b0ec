"""Every error that this project raises for its users derives from ErgoError."""

from __future__ import annotations


class ErgoError(Exception):
    """Base of all errors whose message alone should tell the user what to do."""
