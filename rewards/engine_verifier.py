"""A reward model in a vLLM engine of this job."""

from __future__ import annotations

import asyncio

from ergo_rl.cluster.engine import Engine, EngineDied, EngineImage, EngineRefused, Sampling
from ergo_rl.episodes.families import ModelFamily, Tokenizer, family_of, load_tokenizer
from ergo_rl.episodes.prompts import ReservedText, fill
from ergo_rl.episodes.types import Question, View
from ergo_rl.rewards.config import VerifierConfig
from ergo_rl.rewards.verifier import VerifierDied, VerifierUnavailable, refit


class EngineVerifier:
    """Greedy: the same crop and question get the same answer."""

    def __init__(self, engine: Engine, family: ModelFamily, tokenizer: Tokenizer, config: VerifierConfig) -> None:
        self._engine, self._family, self._tokenizer, self._config = engine, family, tokenizer, config
        self._sampling = Sampling(
            max_tokens=config.max_tokens,
            temperature=0.0,
            stop_ids=(tokenizer.convert_tokens_to_ids(family.turn_end),),
            banned_ids=family.banned_ids(tokenizer),
        )

    @classmethod
    async def start(cls, config: VerifierConfig) -> EngineVerifier:
        model = config.engine.model
        family, tokenizer = family_of(model, config.family), load_tokenizer(model)
        return cls(await Engine.start(config.engine), family, tokenizer, config)

    async def answer(self, question: Question, crop: View) -> str:
        prompts = self._config.prompts
        try:
            prompt = self._family.first_prompt(prompts.system, fill(prompts.verify, question, self._family))
            token_ids = self._tokenizer.encode(prompt, add_special_tokens=False)
            view = await asyncio.to_thread(refit, crop, self._family, self._config.max_visual_tokens)
            completion = await self._engine.generate(token_ids, [EngineImage.of(view.pixels)], self._sampling)
        except (ReservedText, EngineRefused) as error:
            raise VerifierUnavailable(f"{type(error).__name__}: {error}") from error
        except EngineDied as error:
            raise VerifierDied(f"the reward model's engine died: {error}") from error
        return completion.text

    async def close(self) -> None:
        self._engine.close()
