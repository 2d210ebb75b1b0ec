"""``ergo-rl train``: the loop, on one screen."""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from ergo_rl.actors.rollout_pool import RolloutPool
from ergo_rl.actors.rollout_worker import stable_seed
from ergo_rl.actors.trajectory_store import Group
from ergo_rl.cluster.placement import Cluster
from ergo_rl.cluster.pool import together
from ergo_rl.cluster.weights import WeightChannel
from ergo_rl.episodes.questions import QuestionStream
from ergo_rl.episodes.types import Question
from ergo_rl.jobs.autoscale import scaling
from ergo_rl.jobs.commands import EXPECTED, add_recipe, explain, launch_players, recipe_of
from ergo_rl.jobs.config import TrainConfig, load_config
from ergo_rl.jobs.credit import Crediting, shuffled
from ergo_rl.jobs.flow import Flow, flowing
from ergo_rl.jobs.gamma import with_known_gamma
from ergo_rl.jobs.measuring.evaluate import heldout
from ergo_rl.jobs.measuring.evaluation import evaluate
from ergo_rl.jobs.metrics import reward_metrics, rollout_metrics, staleness_metrics
from ergo_rl.jobs.outage import rescored, unscored_share
from ergo_rl.jobs.prepare import prepare_embedded
from ergo_rl.jobs.proof import Proof
from ergo_rl.jobs.run import Run
from ergo_rl.jobs.saving.recovery import Keeper, Revival
from ergo_rl.jobs.scale import scalable
from ergo_rl.jobs.stopping import Stop, Stopped
from ergo_rl.jobs.view import View
from ergo_rl.learners.learner_group import LearnerFailed, LearnerGroup
from ergo_rl.rewards.reward_pool import RewardPool
from ergo_rl.rewards.tce import weights_of


@dataclass(frozen=True, slots=True)
class Crew:
    """The three roles, started."""

    rollouts: RolloutPool
    rewards: RewardPool
    learners: LearnerGroup


async def train(config: TrainConfig) -> Path:
    """Run the whole training, or what is left of it; returns the run's folder.

    Raises Stopped where it was asked to end; what goes wrong otherwise is in ``jobs.commands.EXPECTED``."""
    config = with_known_gamma(config)
    questions, probes, held = QuestionStream(config.questions), QuestionStream(config.questions), heldout(config)
    first = next(probes)  # what is wrong with the data is said before anything starts
    with Run.open(config) as run, Cluster.connect(config.cluster) as cluster, Stop.on_signals(run.view) as stop:
        crew, revive = await stop.unless(launch(cluster, config, run.view)), Revival(config.recovery)
        async with scalable(run, crew.rollouts, crew.rewards):
            while True:
                try:
                    await live(config, run, crew, questions, chain([first], probes), held, stop)
                    break
                except LearnerFailed as error:
                    learners = await stop.unless(revive(error, cluster, config, run))
                    crew = replace(crew, learners=learners)
        await crew.learners.export(run.folder / "policy")
        run.ended(done=True, why="all steps are done")
        run.view.say(run.summary())
        return run.folder


async def live(
    config: TrainConfig,
    run: Run,
    crew: Crew,
    questions: QuestionStream,
    probes: Iterable[Question],
    held: Sequence[Question],
    stop: Stop,
) -> None:
    """From the last checkpoint to the last step, with one set of learners."""
    rollouts, rewards, learners = crew.rollouts, crew.rewards, crew.learners
    transport = config.weights.for_roles(config.learner.resources, config.rollout.resources)
    weights = WeightChannel(learners, rollouts, transport)
    credit = Crediting(config.learner, weights_of(config.reward), config.stale_weight)
    state = await run.restore(learners, rows=len(questions))
    bad_rows, keep_stale = config.questions.on_bad_row, config.stale_weight > 0
    flow = Flow(questions, rollouts, rewards, config.seed, bad_rows, state.flow, keep_stale)
    keeper = Keeper(run, learners, state)

    def wanted(group: Group) -> bool:  # of one that was not judged nothing is known yet
        return credit.teaches(group) or unscored_share([group]) > config.reward.unscored_tolerance

    await weights.publish(version=state.step)
    proof = await Proof.prepare(rollouts, learners, probes, config.weight_check)
    await proof.measure(version=state.step)
    async with flowing(flow), keeper.kept(), scaling(rollouts, run.view) as scaler:
        if run.evaluation_due(state.step):
            run.log_evaluation(state.step, await evaluate(held, rollouts, rewards, config.evaluation))
        for step in range(state.step, config.total_steps):
            with run.step(step) as report:
                flow.keep_ahead(config.groups_per_step * (1 + config.max_staleness))
                with report.timed("rollout"):
                    oldest = step - config.max_staleness
                    groups = await stop.unless(flow.take(config.groups_per_step, oldest, wanted, config.spare_groups))
                    groups = await stop.unless(rescored(groups, rewards, config.reward, run.view))
                report.add(rollout_metrics(groups, config.metrics) | reward_metrics(groups) | flow.metrics())
                report.add(staleness_metrics(groups, step))
                if config.shuffle_rewards:
                    groups = shuffled(groups, random.Random(stable_seed(config.seed, "shuffle", step)))
                batch = credit.batch(groups, oldest)
                with report.timed("learn"):
                    await rollouts.sleep()
                    report.add(await learners.update(batch))
                keeper.reached(step + 1, flow, groups)
                with report.timed("publish"):
                    last = step + 1 == config.total_steps
                    await weights.publish(version=step + 1, wait=last or config.max_staleness == 0)
                if config.weight_check.due(step + 1, config.total_steps):
                    await weights.settled()
                    with report.timed("proof"):
                        report.add(await proof.measure(version=step + 1))
            if scaler is not None:
                scaler.saw(report.metrics)
            if run.due_samples(step):
                run.write_samples(step, groups[0], await groups[0].trajectories, batch[0].advantages)
            if run.evaluation_due(step + 1):
                run.log_evaluation(step + 1, await evaluate(held, rollouts, rewards, config.evaluation))
            if config.checkpoint.due(step + 1, config.total_steps):
                await keeper.save()
            stop.check()


async def launch(cluster: Cluster, config: TrainConfig, view: View) -> Crew:
    """All three roles at once; the slowest decides when training can begin."""
    with view.waiting("starting rollout workers, reward workers and learners (engines take 20 to 60 s on a CPU)"):
        rollouts, rewards = launch_players(cluster, config)
        learners = await LearnerGroup.launch(cluster, config.learner)
        await together(rollouts.ready(config.start_deadline_s), rewards.ready(config.start_deadline_s))
    return Crew(rollouts, rewards, learners)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="ergo-rl train",
        description="Train a policy with ERGO: rollouts, rewards, updates, weights back into the engines. A run that "
        "was stopped or killed goes on from its last checkpoint when the same command is given again (resume=never "
        "begins a new one, resume=PATH begins one from another run's checkpoint). Ctrl-C and SIGTERM save first; "
        "Ctrl-C twice quits at once.",
        epilog="example: ergo-rl train configs/panels.yaml total_steps=50 learner.optimizer.lr=1e-4",
    )
    add_recipe(parser)
    recipe, overrides = recipe_of(parser.parse_intermixed_args(argv))
    try:
        config = load_config(recipe, overrides)
        prepare_embedded(config.embedded)
        folder = asyncio.run(train(config))
    except Stopped as stopped:
        print(f"ergo-rl train: {explain(stopped)}; the same command goes on", file=sys.stderr)
        return 128 + stopped.number
    except EXPECTED as error:
        print(f"ergo-rl train: {type(error).__name__}: {explain(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ergo-rl train: stopped by hand before anything could be saved", file=sys.stderr)
        return 130
    print(
        f"Done. {folder}/ holds metrics.jsonl, samples/ and policy/; curves: tensorboard --logdir {folder}/tensorboard"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
