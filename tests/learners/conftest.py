from pathlib import Path

import pytest

from tests.factories import tiny_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2.5-VL folder."""
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny")
