"""Names of models: a local folder, or a name of the hub that ``@`` may pin to a revision, ``org/name@revision``."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def split_revision(model: str) -> tuple[str, str | None]:
    """Return the name and the branch, tag or commit of the hub; None where none is named.

    A folder that exists is a folder, whatever its name has in it."""
    name, _, revision = model.partition("@")
    return (name, revision) if name and revision and not Path(model).exists() else (model, None)


def pretrained(model: str) -> dict[str, Any]:
    """Return the arguments of transformers' ``from_pretrained``."""
    name, revision = split_revision(model)
    return {"pretrained_model_name_or_path": name} | ({"revision": revision} if revision else {})


def engine_arguments(model: str) -> dict[str, Any]:
    """Return vLLM's engine arguments: the weights and what goes with them are of one revision."""
    name, revision = split_revision(model)
    return {"model": name, "revision": revision, "tokenizer_revision": revision}
