from tests.episodes.conftest import tokenizer

__all__ = ["tokenizer"]
