"""``ergo-rl train``: the loop, on one screen."""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from actors.rollout_pool import RolloutPool
from actors.rollout_worker import stable_seed
from actors.trajectory_store import TrajectoryStore
from cluster.placement import Cluster
from cluster.pool import together
from cluster.weights import WeightChannel
from episodes.questions import QuestionStream
from jobs.commands import EXPECTED, add_recipe, launch_players, recipe_of
from jobs.config import TrainConfig, load_config
from jobs.credit import Crediting, shuffled
from jobs.evaluate import heldout
from jobs.evaluation import evaluate
from jobs.flow import Flow, flowing
from jobs.gamma import with_known_gamma
from jobs.metrics import reward_metrics, rollout_metrics
from jobs.prepare import prepare_embedded
from jobs.proof import Proof
from jobs.run import Run
from jobs.view import View
from learners.learner_group import LearnerGroup
from rewards.reward_pool import RewardPool
from rewards.tce import weights_of


async def train(config: TrainConfig) -> Path:
    """Run the whole training; returns the run's folder."""
    config = with_known_gamma(config)
    questions, probes, held = QuestionStream(config.questions), QuestionStream(config.questions), heldout(config)
    first = next(probes)  # what is wrong with the data is said before anything starts
    with Run.open(config) as run, Cluster.connect(config.cluster) as cluster:
        rollouts, rewards, learners = await launch(cluster, config, run.view)
        weights = WeightChannel(source=learners, sink=rollouts)
        store = TrajectoryStore()
        credit = Crediting(config.learner, weights_of(config.reward))
        flow = Flow(questions, rollouts, rewards, store, config.seed, config.questions.on_bad_row)

        await weights.publish(version=0)
        proof = await Proof.prepare(rollouts, learners, chain([first], probes), config.proof)
        await proof.measure(version=0)
        if config.evaluation.due(0, config.total_steps):
            run.log_evaluation(0, await evaluate(held, rollouts, rewards, config.evaluation))
        async with flowing(flow):
            flow.allow(config.groups_per_step * config.max_staleness)
            for step in range(config.total_steps):
                with run.step(step) as report:
                    flow.allow(config.groups_per_step)
                    with report.timed("rollout"):
                        oldest = step - config.max_staleness
                        groups = await flow.take(config.groups_per_step, oldest, credit.teaches, config.spare_groups)
                    report.add(rollout_metrics(groups, config.metrics) | reward_metrics(groups) | flow.metrics())
                    if config.shuffle_rewards:
                        groups = shuffled(groups, random.Random(stable_seed(config.seed, "shuffle", step)))
                    with report.timed("learn"):
                        report.add(await learners.update(credit.batch(groups)))
                    with report.timed("publish"):
                        await weights.publish(version=step + 1)
                    if config.proof.due(step + 1, config.total_steps):
                        with report.timed("proof"):
                            report.add(await proof.measure(version=step + 1))
                if run.due_samples(step):
                    run.write_samples(step, groups[0], await groups[0].trajectories)
                if config.evaluation.due(step + 1, config.total_steps):
                    run.log_evaluation(step + 1, await evaluate(held, rollouts, rewards, config.evaluation))
        await learners.export(run.folder / "policy")
        run.view.say(run.summary())
        return run.folder


async def launch(cluster: Cluster, config: TrainConfig, view: View) -> tuple[RolloutPool, RewardPool, LearnerGroup]:
    """All three roles at once; the slowest decides when training can begin."""
    with view.waiting("starting rollout workers, reward workers and learners (engines take 20 to 60 s on a CPU)"):
        rollouts, rewards = launch_players(cluster, config)
        learners = await LearnerGroup.launch(cluster, config.learner)
        await together(rollouts.ready(config.start_deadline_s), rewards.ready(config.start_deadline_s))
    return rollouts, rewards, learners


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="ergo-rl train",
        description="Train a policy with ERGO: rollouts, rewards, updates, weights back into the engines.",
        epilog="example: ergo-rl train configs/panels.yaml total_steps=50 learner.optimizer.lr=1e-4",
    )
    add_recipe(parser)
    recipe, overrides = recipe_of(parser.parse_args(argv))
    try:
        config = load_config(recipe, overrides)
        prepare_embedded(config.embedded)
        folder = asyncio.run(train(config))
    except EXPECTED as error:
        print(f"ergo-rl train: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ergo-rl train: stopped by hand", file=sys.stderr)
        return 130
    print(
        f"Done. {folder}/ holds metrics.jsonl, samples/ and policy/; curves: tensorboard --logdir {folder}/tensorboard"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
