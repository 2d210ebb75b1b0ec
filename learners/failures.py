"""What a rank reports as a value, and the driver raises: its process stays alive, and so do the other ranks."""

from ergo_rl.errors import ErgoError


class UpdatesSkipped(ErgoError, RuntimeError):
    """Several updates in a row had a gradient that was NaN or infinite; the weights are as before the first of them."""


class SaveFailed(ErgoError, OSError):
    """Weights or state could not be written, for want of space or rights; what was half written is removed."""
