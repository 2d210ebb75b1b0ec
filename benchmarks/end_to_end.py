"""Time per optimiser step and trajectories per second, against TRL's GRPOTrainer on the same work.

    python -m benchmarks.end_to_end                    # the tiny policy; ten minutes on two cores
    python -m benchmarks.end_to_end --size larger      # 70 M parameters, replies of widely varying length

The same randomly initialised policy, questions (panels), group size, reply limit, learning rate, and the same rule for
the reward (how often a reply has an "e"). One turn on both sides: a random policy names no box, so our episodes end
after turn 1. TRL generates with transformers (its way without a GPU for vLLM) and has all cores; ours is the real crew,
an engine, a learner with as many threads as there are cores (they take turns), and a judge, in Ray actors. Replies end
by chance, at the same rate on both sides.

Both stay up and take turns, block by block; the first step of each block is left out. Targets: at least TRL's speed
with the tiny policy, at least twice with the larger one. ``--python`` names the interpreter of another environment for
TRL (packages trl, datasets, torchvision); by default it is this one (``make setup-dev`` installs it).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from benchmarks.reporting import parser_of, report, spread

TARGETS = {"tiny": 1.0, "larger": 2.0}
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {},
    "larger": {"hidden": 768, "layers": 8, "heads": 12, "intermediate": 3072},
}
STEP = {"tiny": (8, 8, 128), "larger": (2, 4, 512)}
"""Questions, trajectories of each and the longest reply, by default: what two cores do in seconds."""
TOKENIZER = "models/panels-policy"


def reward_of(reply: str) -> float:
    """The share of "e" among the letters of a reply: a rule that every reply has a value of."""
    letters = [letter for letter in reply.lower() if letter.isalpha()]
    return letters.count("e") / max(1, len(letters))


# --- TRL, in a process of its own -------------------------------------------------------------------------------------


def be_trl(settings: dict[str, Any]) -> None:
    """Trains for ever; at each line on stdin goes on for a block, and says the seconds of its steps."""
    import torch

    from ergo_rl.cluster.compat import repair_torchvision

    repair_torchvision()
    torch.set_num_threads(os.cpu_count() or 1)
    from datasets import Dataset
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from ergo_rl.episodes import images
    from ergo_rl.episodes.families import family_of
    from ergo_rl.examples.panels.scenes import PanelsConfig, Split, question

    talk, sys.stdout = sys.stdout, sys.stderr
    family = family_of(settings["model"])

    def rows() -> Any:
        for index in range(settings["questions"]):
            asked = question(PanelsConfig(), 0, Split.TRAIN, index)
            pixels = images.decode(asked.image)
            view = images.view(pixels, images.full_box(pixels), family, settings["visual_tokens"])
            yield {"prompt": [{"role": "user", "content": asked.text}], "image": Image.fromarray(view.pixels)}

    lengths: list[int] = []

    def judge(completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        lengths.extend(map(len, completion_ids))
        return [reward_of(one[0]["content"]) for one in completions]

    class Blocks(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.started = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not self.seconds:
                sys.stdin.readline()
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self.started)
            if len(self.seconds) == settings["steps"]:
                print(json.dumps({"seconds": self.seconds, "lengths": lengths}), file=talk, flush=True)
                self.seconds.clear()
                lengths.clear()

    batch = settings["groups"] * settings["group_size"]
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, per_device_train_batch_size=batch, num_generations=settings["group_size"],
            max_completion_length=settings["reply"], max_steps=10**6, learning_rate=1e-4, beta=0.0, use_cpu=True,
            bf16=False, gradient_checkpointing=False, report_to=[], save_strategy="no", logging_steps=10**6,
            disable_tqdm=True, seed=0, loss_type="dapo",
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=AutoModelForImageTextToText.from_pretrained(settings["model"], dtype=torch.float32),
            processing_class=AutoProcessor.from_pretrained(settings["model"]),
            reward_funcs=judge,
            args=config,
            train_dataset=Dataset.from_list(list(rows())),
            callbacks=[Blocks()],
        )
        trainer.train()


class Trl:
    """The other side of ``be_trl``."""

    def __init__(self, python: str, settings: dict[str, Any], log: Path) -> None:
        command = [python, "-m", "benchmarks.end_to_end", "--be-trl", json.dumps(settings)]
        self._log = log.open("wb")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(os.cpu_count()), "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip

    def block(self) -> dict[str, list[float]]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        if not (line := self._process.stdout.readline()):
            said = Path(self._log.name).read_text(errors="replace")[-3000:]
            raise SystemExit(f"TRL ended with {self._process.wait()}:\n{said}")
        found: dict[str, list[float]] = json.loads(line)
        return found

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()


# --- ours -------------------------------------------------------------------------------------------------------------


class Judge:
    """The rule as a reward worker. Made a Ray actor."""

    async def start(self) -> None:
        return None

    async def score(self, _: Any, trajectories: Sequence[Any]) -> Any:
        from ergo_rl.episodes.types import Score

        return tuple(Score(reward_of(one.turns[0].text), {"rule": 0.0}) for one in trajectories)


class Ours:
    """Engine, judge and learner, and the training loop's step without its records."""

    def __init__(self, settings: dict[str, Any], staleness: int) -> None:
        self._settings, self._staleness = settings, staleness

    async def start(self, cluster: Any) -> None:
        from ergo_rl.actors.config import RolloutConfig, SamplingConfig
        from ergo_rl.actors.rollout_pool import RolloutPool
        from ergo_rl.cluster.config import EngineConfig
        from ergo_rl.cluster.weight_sync import WeightChannel
        from ergo_rl.cluster.worker_pool import Faults, WorkerPool
        from ergo_rl.episodes.config import EpisodeConfig
        from ergo_rl.examples.panels.scenes import PROMPTS
        from ergo_rl.jobs.advantage_estimator import AdvantageEstimator
        from ergo_rl.learners.config import LearnerConfig, OptimizerConfig
        from ergo_rl.learners.learner_group import LearnerGroup
        from ergo_rl.rewards.config import RewardConfig
        from ergo_rl.rewards.pool import RewardPool

        how = self._settings
        rollout = RolloutConfig(
            engine=EngineConfig(
                model=how["model"], dtype="float32", max_model_len=1024, extra={"block_size": 32},
                max_num_seqs=how["groups"] * how["group_size"],
                threads=how["engine_threads"],
            ),
            sampling=SamplingConfig(coarse_max_tokens=how["reply"], fine_max_tokens=4),
            group_size=how["group_size"],
        )  # fmt: skip
        visual = how["visual_tokens"]
        episode = EpisodeConfig(coarse_tokens=visual, fine_tokens=visual, prompts=PROMPTS)
        self._rollouts = RolloutPool.launch(cluster, rollout, episode)
        judge = ray.remote(Judge).options(num_cpus=0)
        self._rewards = RewardPool(WorkerPool(lambda _: judge.remote(), 1, Faults(), "judges"), RewardConfig())
        learner = LearnerConfig(model=how["model"], threads=how["threads"], optimizer=OptimizerConfig(lr=1e-4))
        self._learners = await LearnerGroup.launch(cluster, learner)
        await asyncio.gather(self._rollouts.ready(900), self._rewards.ready(900))
        self._weights = WeightChannel(self._learners, self._rollouts)
        self._credit, self._version = AdvantageEstimator(learner, {}), 0

    async def block(self) -> dict[str, list[float]]:
        from ergo_rl.episodes.config import OnBadRow
        from ergo_rl.jobs.rollout_scheduler import RolloutScheduler

        await self._weights.publish(self._version)
        questions: Any = Panels(self._settings["questions"])
        flow = RolloutScheduler(questions, self._rollouts, self._rewards, self._version, OnBadRow.SKIP)
        groups, lengths = self._settings["groups"], list[float]()
        seconds: dict[str, list[float]] = {"seconds": [], "rollout": [], "learn": [], "publish": []}
        async with flow:
            for _ in range(self._settings["steps"]):
                times = [time.perf_counter()]
                flow.keep_ahead(groups * (1 + self._staleness))
                taken = await flow.take(groups, self._version - self._staleness, lambda _: True, 0)
                times.append(time.perf_counter())
                await self._learners.update(self._credit.batch(taken))
                times.append(time.perf_counter())
                self._version += 1
                await self._weights.publish(self._version, wait=self._staleness == 0)
                times.append(time.perf_counter())
                for name, begin, end in zip(seconds, (0, 0, 1, 2), (3, 1, 2, 3), strict=True):
                    seconds[name].append(times[end] - times[begin])
                lengths += [sum(facts.reply_tokens) for group in taken for facts in group.result.summaries]
        await self._weights.settled()
        return seconds | {"lengths": lengths}


class Panels:
    """The first so many questions of the panels, again and again."""

    def __init__(self, count: int) -> None:
        from ergo_rl.examples.panels.scenes import PanelsConfig, Split, question
        from ergo_rl.questions.dataset import Cursor

        self._all = [question(PanelsConfig(), 0, Split.TRAIN, index) for index in range(count)]
        self._given, self.cursor = 0, Cursor()
        self.skipped: Any = type("Skipped", (), {"total": staticmethod(lambda: 0)})

    def restore(self, cursor: Any) -> None:
        self.cursor = cursor

    def __next__(self) -> Any:
        self._given += 1
        return self._all[(self._given - 1) % len(self._all)]


# --- both -------------------------------------------------------------------------------------------------------------


def figures(blocks: dict[str, list[dict[str, list[float]]]], trajectories: int) -> dict[str, Any]:
    """blocks: by way, seconds of each step and lengths of all replies; the first step of each block is left out."""
    found: dict[str, Any] = {}
    for way, measured in blocks.items():
        steps = [second for block in measured for second in block["seconds"][1:]]
        lengths = [length for block in measured for length in block["lengths"]]
        phases = {name for name in measured[0] if name not in ("seconds", "lengths")}
        found[way] = {
            "step_s": spread(steps),
            "trajectories_per_s": trajectories / spread(steps)["median"],
            "reply_tokens": spread(lengths) | {"mean": sum(lengths) / len(lengths)},
            "phases_s": {
                name: spread([one for block in measured for one in block[name][1:]])["median"]
                for name in sorted(phases)
            },
        }
    return found | {"speedup": found["trl"]["step_s"]["median"] / found["ours"]["step_s"]["median"]}


def verdict(found: dict[str, Any], size: str) -> tuple[bool, str]:
    line = (
        f"{size} policy: {found['speedup']:.2f} times TRL's GRPOTrainer (target {TARGETS[size]}): a step takes "
        f"{found['ours']['step_s']['median']:.2f} s against {found['trl']['step_s']['median']:.2f} s, replies of "
        f"{found['ours']['reply_tokens']['mean']:.0f} and {found['trl']['reply_tokens']['mean']:.0f} tokens on average"
    )
    return found["speedup"] >= TARGETS[size], line


def make_policy(size: str, folder: Path) -> Path:
    from transformers import AutoTokenizer

    from ergo_rl.examples.panels.tiny_model import TinyConfig, make_model, make_processor, save_folder

    tokenizer: Any = AutoTokenizer.from_pretrained(TOKENIZER)
    save_folder(make_model(tokenizer, TinyConfig(**SHAPES[size]), seed=0), make_processor(tokenizer), folder / size)  # type: ignore[arg-type]
    return folder / size


async def measure(cluster: Any, settings: dict[str, Any], arguments: argparse.Namespace, folder: Path) -> Any:
    ours, trl = Ours(settings, arguments.staleness), Trl(arguments.python, settings, folder / "trl.log")
    try:
        await ours.start(cluster)
        blocks: dict[str, list[Any]] = {"ours": [], "trl": []}
        for block in range(arguments.blocks + 1):
            measured = {"ours": await ours.block(), "trl": await asyncio.to_thread(trl.block)}
            for way, one in measured.items() if block else ():  # the first one warms up
                blocks[way].append(one)
    finally:
        trl.close()
    return figures(blocks, settings["groups"] * settings["group_size"])


def main() -> int:
    if sys.argv[1:2] == ["--be-trl"]:
        be_trl(json.loads(sys.argv[2]))
        return 0
    parser = parser_of(__doc__, "end_to_end")
    parser.add_argument("--size", choices=list(SHAPES), default="tiny", help="of the policy; default tiny")
    parser.add_argument("--groups", type=int, help="questions of a step; default 8 (tiny), 2 (larger)")
    parser.add_argument("--group-size", type=int, help="trajectories of a question; default 8 (tiny), 4 (larger)")
    parser.add_argument("--reply", type=int, help="longest reply, tokens; default 128 (tiny), 512 (larger)")
    parser.add_argument("--visual-tokens", type=int, default=36, help="of the coarse view; default 36")
    parser.add_argument("--staleness", type=int, default=0, help="of ours; TRL's is 0; default 0")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of our learner; default %(default)s")
    parser.add_argument(
        "--engine-threads",
        type=int,
        help="of our engine; default 1 (tiny: two wait for each other), all (larger)",
    )
    parser.add_argument("--steps", type=int, default=4, help="of a block, the first of which is left out; default 4")
    parser.add_argument("--blocks", type=int, default=3, help="of each way, after one that warms up; default 3")
    parser.add_argument("--python", default=sys.executable, help="interpreter that has TRL; default this one")
    arguments = parser.parse_args()
    groups, group_size, reply = STEP[arguments.size]
    arguments.groups, arguments.group_size = arguments.groups or groups, arguments.group_size or group_size
    arguments.reply = arguments.reply or reply
    arguments.engine_threads = arguments.engine_threads or {"tiny": 1}.get(arguments.size, os.cpu_count())
    from ergo_rl.cluster.config import ClusterConfig
    from ergo_rl.cluster.placement import Cluster

    with tempfile.TemporaryDirectory() as place, Cluster.connect(ClusterConfig(object_store_gib=1.0)) as cluster:
        folder = Path(place)
        settings = {
            "model": str(make_policy(arguments.size, folder)), "groups": arguments.groups, "questions": 256,
            "group_size": arguments.group_size, "visual_tokens": arguments.visual_tokens, "steps": arguments.steps,
            "threads": arguments.threads, "engine_threads": arguments.engine_threads, "reply": arguments.reply,
        }  # fmt: skip
        found = asyncio.run(measure(cluster, settings, arguments, folder))
    good, line = verdict(found, arguments.size)
    return report(arguments, found, good, line)


if __name__ == "__main__":
    raise SystemExit(main())
