"""What looking twice costs and brings: visual tokens, latency and accuracy of two-stage answers against direct answers
at the picture's full budget, on the same engine.

    python -m benchmarks.episode                  # one to two minutes on two cores

Held-out questions of a recipe, one at a time (the latency of a lone user), greedily, by one engine in this process; the
two ways take turns on each question; their views differ in size, so neither finds the other's in a cache. Two-stage has
``--budget`` visual tokens for each view, direct has ``--full`` for its only one. Latency is from a question's first
request to its last reply. Target: fewer visual tokens.

The panels policy was never taught to answer at once, so its direct accuracy is chance; and it is so small that replies,
not pictures, are what takes its time. ``make gpu-check`` measures latency on a model of 7B's shape.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.reporting import parser_of, report, spread
from ergo_rl.episodes.families import family_of
from ergo_rl.jobs.benchmark_grid import Mode, Record, run_one
from ergo_rl.jobs.cli import DEFAULT_RECIPE
from ergo_rl.jobs.config import TrainConfig, load_config
from ergo_rl.jobs.evaluation import HeldOut
from ergo_rl.jobs.policy_clients import EngineClient
from ergo_rl.questions.prepare import prepare_embedded


async def measure(config: TrainConfig, budgets: Mapping[Mode, int], count: int) -> dict[Mode, list[Record]]:
    """``count`` questions by each mode; the first one, in which the engine warms up, is left out.

    Raises EpisodeError where one cannot be run."""
    client = await EngineClient.start(config, family_of(config.rollout.engine.model, config.episode.family))
    found: dict[Mode, list[Record]] = {mode: [] for mode in budgets}
    try:
        for number, question in enumerate(islice(HeldOut(config), count + 1)):
            for mode in list(budgets)[:: 1 if number % 2 else -1]:
                record = await run_one(question, client, config, mode, budgets[mode])
                if number:
                    found[mode].append(record)
    finally:
        await client.close()
    return found


def figures(records: Mapping[Mode, Sequence[Record]]) -> dict[str, Any]:
    """Of each mode, and two-stage over direct."""
    found: dict[str, Any] = {}
    for mode, each in records.items():
        found[mode] = {
            "questions": len(each),
            "accuracy": statistics.mean(one.correct for one in each),
            "visual_tokens": statistics.mean(sum(one.visual_tokens) for one in each),
            "seconds": spread([one.seconds for one in each]),
        }
    two, direct = found[Mode.TWO_STAGE], found[Mode.DIRECT]
    found["two-stage/direct"] = {
        "visual_tokens": two["visual_tokens"] / direct["visual_tokens"],
        "seconds": two["seconds"]["median"] / direct["seconds"]["median"],
    }
    return found


def verdict(found: Mapping[str, Any]) -> tuple[bool, str]:
    ratio, two, direct = found["two-stage/direct"], found[Mode.TWO_STAGE], found[Mode.DIRECT]
    line = (
        f"two-stage has {ratio['visual_tokens']:.2f} of the visual tokens ({two['visual_tokens']:.0f} against "
        f"{direct['visual_tokens']:.0f}), takes {ratio['seconds']:.2f} of the time, and is right in "
        f"{two['accuracy']:.0%} of cases against {direct['accuracy']:.0%}"
    )
    return ratio["visual_tokens"] < 1, line


def main() -> int:
    parser = parser_of(__doc__, "episode")
    parser.add_argument("recipe", nargs="?", default=DEFAULT_RECIPE, help="YAML recipe (default: %(default)s)")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="values that override the recipe's")
    parser.add_argument("--model", help="folder or hub name of the policy (default: the recipe's)")
    parser.add_argument("--questions", type=int, default=64, help="default %(default)s")
    parser.add_argument("--budget", type=int, help="visual tokens of each view of two-stage; default the recipe's")
    parser.add_argument("--full", type=int, default=576, help="of direct; default %(default)s, all of a panel scene")
    arguments = parser.parse_args()
    config = load_config(Path(arguments.recipe), [*overrides(arguments), *arguments.set])
    prepare_embedded(config.embedded)
    budgets = {Mode.TWO_STAGE: arguments.budget or config.episode.coarse_tokens, Mode.DIRECT: arguments.full}
    found = figures(asyncio.run(measure(config, budgets, arguments.questions)))
    good, line = verdict(found)
    return report(arguments, found, good, line)


def overrides(arguments: argparse.Namespace) -> list[str]:
    """Room for the larger budget, enough questions, and the policy."""
    names = ("rollout.engine.model", "learner.model") if arguments.model else ()
    room = f"rollout.engine.max_model_len={2 * arguments.full + 512}"
    return [room, f"evaluation.questions={arguments.questions + 1}", *(f"{name}={arguments.model}" for name in names)]


if __name__ == "__main__":
    raise SystemExit(main())
