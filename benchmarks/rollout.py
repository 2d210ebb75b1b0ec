"""Trajectories per second of our rollout worker, against the obvious way: vLLM's ``LLM.chat`` on all turn 1, then on
all turn 2.

    python -m benchmarks.rollout                  # three to four minutes on two cores

Both play the same questions with the same model, engine settings, sampling limits and a seed of its own for each
(question, sample, turn), so that replies have the same lengths but for draws that a sum in another order tips; both
decode, crop and resize the images themselves. The ways take turns; trajectories per second are compared by the median
of the rounds' ratios. Target: 1.15.

``core_busy`` is the share of our way's time for which the engine's core, one process with one thread, was computing:
where it is near 1, nothing outside of vLLM could be quicker.

The images may be made larger (``--megapixels``: of the JPEG that both get), to see what pictures of real size cost; the
longest time for which the rollout worker's event loop stood still is measured, too.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ray

from benchmarks.reporting import cpu_seconds, parser_of, report, spread
from ergo_rl.actors.config import RolloutConfig
from ergo_rl.actors.rollout_pool import Rollout, RolloutPool
from ergo_rl.actors.rollout_worker import derive_seed
from ergo_rl.cluster.placement import Cluster
from ergo_rl.episodes import images
from ergo_rl.episodes.config import EpisodeConfig
from ergo_rl.episodes.episode import read_box
from ergo_rl.episodes.families import family_of, load_tokenizer
from ergo_rl.episodes.prompts import around_image
from ergo_rl.episodes.types import Question
from ergo_rl.examples.panels.scenes import PanelsConfig, Split, question
from ergo_rl.jobs.cli import DEFAULT_RECIPE
from ergo_rl.jobs.config import load_config

TARGET = 1.15
PAUSE_S = 1.5
"""vLLM's worker processes spin for a second behind their last message, on the cores that the other way needs next."""


class Chat:
    """What one would write first. Made a Ray actor, so that it has a process and an environment of its own."""

    def __init__(self, config: RolloutConfig, episode: EpisodeConfig, in_process: bool) -> None:
        self._config, self._episode, self._in_process = config, episode, in_process

    def start(self) -> None:
        from ergo_rl.cluster.engine import _prepare_environment

        _prepare_environment(self._config.engine)
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if self._in_process else "1"
        from ergo_rl.cluster.compat import repair_torchvision

        repair_torchvision()
        from vllm import LLM

        engine = self._config.engine
        self._llm = LLM(
            model=engine.model, dtype=engine.dtype, max_model_len=engine.max_model_len,
            max_num_seqs=engine.max_num_seqs, enforce_eager=engine.enforce_eager,
            enable_prefix_caching=engine.prefix_caching,
            limit_mm_per_prompt={"image": 2, "video": 0}, logprobs_mode="processed_logprobs", generation_config="vllm",
            worker_extension_cls="ergo_rl.cluster.vllm_worker.WorkerExtension", disable_log_stats=True,
            **engine.extra,
        )  # fmt: skip
        self._family, self._tokenizer = family_of(engine.model), load_tokenizer(engine.model)

    def play(self, questions: Sequence[Question], seed: int) -> dict[str, float]:
        """``group_size`` samples of each question: all turn 1, then all turn 2."""
        from PIL import Image

        episode, family, group = self._episode, self._family, range(self._config.group_size)
        pixels = [images.decode(one.image) for one in questions]
        coarse = [images.view(whole, images.full_box(whole), family, episode.coarse_tokens) for whole in pixels]
        pairs = [(number, sample) for number in range(len(questions)) for sample in group]
        system = [{"role": "system", "content": episode.prompts.system}] if episode.prompts.system else []

        def user(template: str, number: int, view: Any) -> dict[str, Any]:
            before, after = around_image(template, questions[number])
            image = {"type": "image_pil", "image_pil": Image.fromarray(view.pixels)}
            texts = ({"type": "text", "text": before}, image, {"type": "text", "text": after})
            return {"role": "user", "content": [part for part in texts if part.get("text") != ""]}

        talks: list[Any] = [[*system, user(episode.prompts.coarse, number, coarse[number])] for number, _ in pairs]
        first = self._llm.chat(talks, self._sampling(questions, pairs, seed, 0), use_tqdm=False)
        going, second = [], []
        for (number, sample), talk, output in zip(pairs, talks, first, strict=True):
            reply = output.outputs[0]
            box, _ = read_box(reply.text, coarse[number], family)
            if reply.finish_reason == "stop" and box is not None:
                crop = images.view(pixels[number], box, family, episode.fine_tokens)
                said = {"role": "assistant", "content": reply.text}
                second.append([*talk, said, user(episode.prompts.fine, number, crop)])
                going.append((number, sample))
        last = self._llm.chat(second, self._sampling(questions, going, seed, 1), use_tqdm=False) if second else []
        done = [*first, *last]
        return {
            "trajectories": len(pairs),
            "turns": len(done),
            "reply_tokens": sum(len(one.outputs[0].token_ids) for one in done),
            "prompt_tokens": sum(len(one.prompt_token_ids or ()) for one in done),
        }

    def _sampling(self, questions: Sequence[Question], pairs: Sequence[tuple[int, int]], seed: int, turn: int) -> Any:
        from vllm import SamplingParams

        how, banned = self._config.sampling, self._family.banned_ids(self._tokenizer)
        return [
            SamplingParams(
                max_tokens=(how.coarse_max_tokens, how.fine_max_tokens)[turn],
                temperature=how.temperature,
                seed=derive_seed(seed, questions[number].id, sample, turn),
                stop_token_ids=[self._tokenizer.convert_tokens_to_ids(self._family.turn_end)],
                logit_bias=dict.fromkeys(banned, -100.0),
                logprobs=0,
            )
            for number, sample in pairs
        ]


async def ours(rollouts: RolloutPool, questions: Sequence[Question], seed: int) -> dict[str, float]:
    """As the training loop plays them: all at once, facts awaited, trajectories by reference."""
    played = await asyncio.gather(*(rollouts.rollout(one, seed) for one in questions))
    facts = [facts for one in played if isinstance(one, Rollout) for facts in one.result.summaries]
    return {
        "trajectories": len(facts),
        "turns": sum(len(one.reply_tokens) for one in facts),
        "reply_tokens": sum(sum(one.reply_tokens) for one in facts),
        "prompt_tokens": sum(one.engine_prompt_tokens for one in facts),
    }


def watch_loop(worker: Any) -> None:
    """Run in the rollout worker: notes in ``worker.stall`` the longest time for which its event loop stood still."""

    async def watch(pause_s: float = 0.005) -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(pause_s)
            worker.stall = max(worker.stall, time.perf_counter() - before - pause_s)

    worker.stall = 0.0
    loop = worker._engine._llm.output_handler.get_loop()  # this function runs in a thread beside it
    worker.watching = asyncio.run_coroutine_threadsafe(watch(), loop)


def core_seconds(worker: Any) -> float:
    """Run in the rollout worker: CPU time so far of the thread in which its engine's core schedules and computes."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            main_thread = (process / "task" / process.name / "stat").read_text()
            name, _, rest = main_thread.partition(" (")[2].rpartition(")")
            cells = rest.split()
            if int(cells[1]) == os.getpid() and name.startswith("VLLM::Engine"):
                return (int(cells[11]) + int(cells[12])) / os.sysconf("SC_CLK_TCK")
    raise RuntimeError("the rollout worker has no engine core below it")


def enlarged(one: Question, megapixels: float) -> Question:
    """The same picture as a JPEG of so many megapixels."""
    from PIL import Image

    whole = Image.fromarray(images.decode(one.image))
    scale = (megapixels * 1e6 / (whole.width * whole.height)) ** 0.5
    buffer = io.BytesIO()
    whole.resize((round(whole.width * scale), round(whole.height * scale))).save(buffer, "JPEG", quality=90)
    return replace(one, image=buffer.getvalue())


async def measure(cluster: Cluster, config: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    rollouts = RolloutPool.launch(cluster, config.rollout, config.episode)
    chat = ray.remote(Chat).options(num_cpus=0).remote(config.rollout, config.episode, arguments.chat_in_process)
    await asyncio.gather(rollouts.ready(config.start_deadline_s), chat.start.remote())
    worker = rollouts._pool._workers[0].actor
    needed = arguments.questions * (arguments.rounds + 1)
    asked = [question(PanelsConfig(), 0, Split.TRAIN, index) for index in range(needed)]
    if arguments.megapixels:
        asked = await asyncio.to_thread(lambda: [enlarged(one, arguments.megapixels) for one in asked])
    rounds = [asked[start : start + arguments.questions] for start in range(0, needed, arguments.questions)]
    seconds: dict[str, list[float]] = {"ours": [], "chat": []}
    counts: dict[str, list[dict[str, float]]] = {"ours": [], "chat": []}
    for seed, questions in enumerate(rounds):
        if seed == 1:
            await worker.__ray_call__.remote(watch_loop)
        for way in ("ours", "chat") if seed % 2 else ("chat", "ours"):
            await asyncio.sleep(PAUSE_S)
            core = await worker.__ray_call__.remote(core_seconds)
            started, cpu = time.perf_counter(), cpu_seconds()
            playing = ours(rollouts, questions, seed) if way == "ours" else chat.play.remote(questions, seed)
            done = await playing
            if seed:  # in the first round engines warm up
                seconds[way].append(time.perf_counter() - started)
                core = await worker.__ray_call__.remote(core_seconds) - core
                counts[way].append({**done, "cpu_s": cpu_seconds() - cpu, "core_s": core})
    stall = await worker.__ray_call__.remote(lambda worker: worker.stall)
    await rollouts.close()
    ray.kill(chat)
    return figures(seconds, counts) | {"longest_loop_stall_ms": 1000 * stall}


def figures(seconds: dict[str, list[float]], counts: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """By way: seconds and counts of each round."""
    found: dict[str, Any] = {}
    for way, times in seconds.items():
        total = {name: sum(one[name] for one in counts[way]) for name in counts[way][0]}
        rates = [one["trajectories"] / time for one, time in zip(counts[way], times, strict=True)]
        found[way] = {"seconds": spread(times), "trajectories_per_s": spread(rates), **total}
    pairs = zip(seconds["ours"], seconds["chat"], counts["ours"], counts["chat"], strict=True)
    ratios = [(a["trajectories"] / mine) / (b["trajectories"] / theirs) for mine, theirs, a, b in pairs]
    return found | {
        "speedup": spread(ratios),
        "core_busy": found["ours"]["core_s"] / sum(seconds["ours"]),
        "reply_tokens_ratio": found["ours"]["reply_tokens"] / found["chat"]["reply_tokens"],
        "prompt_tokens_ratio": found["ours"]["prompt_tokens"] / found["chat"]["prompt_tokens"],
    }


def verdict(found: dict[str, Any]) -> tuple[bool, str]:
    speedup = found["speedup"]
    line = (
        f"{speedup['median']:.2f} times LLM.chat turn after turn ({speedup['min']:.2f} to {speedup['max']:.2f}; target "
        f"{TARGET}), {found['ours']['trajectories_per_s']['median']:.1f} trajectories/s; reply tokens "
        f"{found['reply_tokens_ratio']:.3f} : 1; the engine's core was busy for {100 * found['core_busy']:.0f} % of "
        f"our time; event loop stood still for "
        f"{found['longest_loop_stall_ms']:.0f} ms at most"
    )
    return speedup["median"] >= TARGET, line


def main() -> int:
    parser = parser_of(__doc__, "rollout")
    parser.add_argument("recipe", nargs="?", default=DEFAULT_RECIPE, help="YAML recipe (default: %(default)s)")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="values that override the recipe's")
    parser.add_argument("--questions", type=int, default=16, help="of a round, group_size samples each; default 16")
    parser.add_argument("--rounds", type=int, default=24, help="default 24")
    parser.add_argument("--megapixels", type=float, default=0, help="enlarge the pictures; default 0: as they are")
    parser.add_argument(
        "--chat-in-process", action="store_true",
        help="run LLM's core inside its process (VLLM_ENABLE_V1_MULTIPROCESSING=0); vLLM's default is a second one",
    )  # fmt: skip
    arguments = parser.parse_args()
    config = load_config(Path(arguments.recipe), arguments.set)
    with Cluster.connect(config.cluster) as cluster:
        found = asyncio.run(measure(cluster, config, arguments))
    good, line = verdict(found)
    return report(arguments, {"engine": asdict(config.rollout.engine), **found}, good, line)


if __name__ == "__main__":
    raise SystemExit(main())
