"""The training loop.

::

    questions ──> RolloutScheduler ──> rollout workers ──> reward workers ──> TrajectoryStore
                   ^    starts max_staleness steps ahead,   (verifier)             │
                   │    then waits for the learner                                 │ `take` waits for a step's groups
                   │                                                               v
                   │        WeightChannel <── learner ranks <── AdvantageEstimator (skips equal groups)
                   │             │               `update` waits for all ranks
                   └─────────────┴── weights back: with max_staleness 0 the loop waits until every engine has them,
                                     else only until they are in the object store; engines take them up mid-reply

RolloutScheduler    keeps questions in flight and hands out scored groups in their order
AdvantageEstimator  turns the scores of a step into the learner's batch
LearnerGroup        one optimiser update on all ranks (``learners``)
WeightChannel       sends the weights of a version to every engine (``cluster``)
WeightCheck         compares the engines' log-probs with the learner's after a publish
CheckpointManager   notes the state after each update, saves it when due, on a signal, and before an error
LearnerRestarter    starts a failed learner again from the last checkpoint; everything else stays up
Autoscaler          adds and removes rollout workers by who waits for whom
Monitor             records metrics, alerts and evaluations; console, trackers, callbacks
GracefulShutdown    ends the run saved on a signal (command line only)
Backend             starts all that needs machines; tests bring one in memory
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from ergo_rl.actors.rollout_pool import RolloutPool
from ergo_rl.actors.rollout_worker import derive_seed
from ergo_rl.actors.trajectory_store import Group
from ergo_rl.cluster.placement import Cluster
from ergo_rl.cluster.weight_sync import WeightChannel
from ergo_rl.cluster.worker_pool import gather_or_cancel
from ergo_rl.episodes.families import ModelFamily
from ergo_rl.episodes.types import Question
from ergo_rl.jobs.advantage_estimator import AdvantageEstimator, resolve_gamma, shuffle_scores
from ergo_rl.jobs.autoscale import autoscaling
from ergo_rl.jobs.backend import Backend, RayBackend
from ergo_rl.jobs.checkpoint_manager import CheckpointManager, LearnerRestarter
from ergo_rl.jobs.config import ConfigError, TrainConfig, check
from ergo_rl.jobs.console_display import ConsoleDisplay
from ergo_rl.jobs.evaluation import HeldOut, evaluate
from ergo_rl.jobs.metrics import reward_metrics, rollout_metrics, staleness_metrics
from ergo_rl.jobs.monitor import Callback, Monitor
from ergo_rl.jobs.probe import probe
from ergo_rl.jobs.rollout_recorder import RolloutRecorder
from ergo_rl.jobs.rollout_scheduler import RolloutScheduler, retry_unscored, unscored_share
from ergo_rl.jobs.run_folder import RunFolder
from ergo_rl.jobs.run_paths import POLICY, SAMPLES
from ergo_rl.jobs.shutdown import GracefulShutdown, run_blocking
from ergo_rl.learners.learner_group import LearnerFailed, LearnerGroup
from ergo_rl.questions.dataset import QuestionStream
from ergo_rl.questions.prepare import prepare_embedded
from ergo_rl.rewards.pool import RewardPool
from ergo_rl.rewards.terms import TermSource, load_terms, named_terms, term_weights

if TYPE_CHECKING:
    from ergo_rl.learners.losses import Objective  # imports torch, which the driver does not need


@dataclass(frozen=True, slots=True)
class Workers:
    """The three roles, started."""

    rollouts: RolloutPool
    rewards: RewardPool
    learners: LearnerGroup


@dataclass(frozen=True, slots=True)
class _Session:
    """What one run has open."""

    folder: RunFolder
    monitor: Monitor
    checkpoints: CheckpointManager
    shutdown: GracefulShutdown
    recorder: RolloutRecorder
    held_out: HeldOut


class Trainer:
    """Trains a policy, or resumes the unfinished run of the same name.

    Example::

        def short_thought(question, trajectory, reply):
            return max(0.0, 1 - len(trajectory.turns[0].text.split()) / 40)

        folder = Trainer(load_config("configs/panels.yaml"), reward_terms=[short_thought]).fit()
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        reward_terms: Mapping[str, TermSource] | Iterable[TermSource] = (),
        objective: type[Objective] | str | None = None,
        family: type[ModelFamily] | str | None = None,
        callbacks: Sequence[Callback] = (),
        backend: Backend | None = None,
    ) -> None:
        """reward_terms: functions ``(question, trajectory, reply) -> float`` or ``RewardTerm`` classes, added to the
        reward with the weight that ``reward.weights`` gives their name, else 1; those of a script or notebook travel to
        the workers. objective, family: in place of the configuration's; a name, or a class in a module that the workers
        can import. callbacks: called with (step, metrics) after each step and evaluation. backend: for tests.

        Raises ConfigError."""
        try:
            self._reward_terms = named_terms(reward_terms)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        # In the run's config.yaml: such a run is not resumed without these terms.
        config = replace(config, reward=replace(config.reward, handed_over=sorted(self._reward_terms)))
        if objective is not None:
            loss = replace(config.learner.loss, objective=_importable(objective, "objective"))
            config = replace(config, learner=replace(config.learner, loss=loss))
        if family is not None:
            name = _importable(family, "family")
            config = replace(
                config, learner=replace(config.learner, family=name), episode=replace(config.episode, family=name)
            )
        if objective is not None or family is not None:
            check(config)
        try:
            load_terms(config.reward, self._reward_terms)  # refuses names that are taken
            self._reward_weights = term_weights(config.reward, self._reward_terms)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self.config, self._callbacks, self._backend = config, callbacks, backend or RayBackend()

    def fit(self, *, handle_signals: bool = False, live_display: bool = False) -> Path:
        """Train to the last step and return the folder of the run; also from a notebook whose event loop runs.

        handle_signals, live_display: for the command line. SIGTERM and Ctrl-C end the run saved, and a terminal shows
        one panel instead of a line per step."""
        return run_blocking(lambda: self.afit(handle_signals=handle_signals, live_display=live_display))

    async def afit(self, *, handle_signals: bool = False, live_display: bool = False) -> Path:
        """As ``fit``, inside an event loop.

        Raises Stopped where a signal asked for it, and otherwise errors under ErgoError, OSError and TimeoutError."""
        prepare_embedded(self.config.embedded)
        config = self.config = replace(self.config, reward=resolve_gamma(self.config.reward, self.config.questions))
        questions, probes = QuestionStream(config.questions), QuestionStream(config.questions)
        held_out = HeldOut(config)
        first_probe = next(probes)  # errors of the data are raised before anything starts
        with (
            RunFolder.open(config) as folder,
            ConsoleDisplay(config.name, config.total_steps, folder.path, live_display) as console,
            Monitor(folder.path, config.metrics, config.alerts, console, self._callbacks) as monitor,
        ):
            checkpoints = CheckpointManager(folder, monitor, config.checkpoint, self._backend)
            checkpoints.rewind(folder.checkpoint)
            with (
                self._backend.connect(config.cluster) as cluster,
                (
                    GracefulShutdown.on_signals(console) if handle_signals else nullcontext(GracefulShutdown(console))
                ) as shutdown,
            ):
                recorder = RolloutRecorder(folder.path / SAMPLES, config.samples_every)
                session = _Session(folder, monitor, checkpoints, shutdown, recorder, held_out)
                await self._train_with_restarts(session, cluster, questions, chain([first_probe], probes))
            return folder.path

    async def _train_with_restarts(
        self, session: _Session, cluster: Cluster, questions: QuestionStream, probes: Iterable[Question]
    ) -> None:
        config, backend, console, shutdown = self.config, self._backend, session.monitor.console, session.shutdown
        workers = await shutdown.run_or_stop(self._start(cluster, console))
        restarter = LearnerRestarter(config.recovery, session.checkpoints, session.monitor)

        async def start_learners_again() -> LearnerGroup:
            backend.release_learners(cluster)
            return await backend.start_learners(cluster, config.learner)

        async with backend.serve_run_control(session.folder.path, console, workers.rollouts, workers.rewards):
            while True:
                try:
                    await self._train_loop(session, workers, questions, probes)
                    break
                except LearnerFailed as error:
                    learners = await shutdown.run_or_stop(restarter.restart(error, start_learners_again))
                    workers = replace(workers, learners=learners)
        await workers.learners.export(session.folder.path / POLICY)
        await shutdown.run_or_stop(session.checkpoints.finish())
        console.say(session.monitor.summary())

    async def _start(self, cluster: Cluster, console: ConsoleDisplay) -> Workers:
        """Start all three roles side by side; the slowest decides when training can begin.

        The error of the first one that fails is raised, and the others are ended at once."""
        config = self.config
        if cluster.shortage:
            console.say(cluster.shortage)
        message = "starting rollout workers, reward workers and learners (engines take 20 to 60 s on a CPU)"
        with console.waiting(message):
            rollouts, rewards = self._backend.start_workers(cluster, config, self._reward_terms)
            try:
                learners, *_ = await gather_or_cancel(
                    self._backend.start_learners(cluster, config.learner),
                    rollouts.ready(config.start_deadline_s),
                    rewards.ready(config.start_deadline_s),
                )
            except BaseException:
                await asyncio.gather(rollouts.close(), rewards.close())
                raise
        return Workers(rollouts, rewards, learners)

    async def _train_loop(
        self, session: _Session, workers: Workers, questions: QuestionStream, probes: Iterable[Question]
    ) -> None:
        """Train from the last checkpoint to the last step with one set of learners."""
        config, monitor, checkpoints, shutdown = self.config, session.monitor, session.checkpoints, session.shutdown
        rollouts, rewards, learners = workers.rollouts, workers.rewards, workers.learners
        weights = WeightChannel(
            learners, rollouts, config.weights.for_roles(config.learner.resources, config.rollout.resources)
        )
        estimator = AdvantageEstimator(config.learner, self._reward_weights, config.stale_weight)
        state = await checkpoints.restore(learners, rows=len(questions))
        scheduler = RolloutScheduler(
            questions, rollouts, rewards, config.seed, config.questions.on_bad_row, state.scheduler,
            keep_stale=config.stale_weight > 0,
        )  # fmt: skip

        def wanted(group: Group) -> bool:  # whether an unscored group has a signal is not known yet
            return estimator.has_signal(group) or unscored_share([group]) > config.reward.unscored_tolerance

        await weights.publish(version=state.step)
        weight_check = await self._backend.prepare_weight_check(rollouts, learners, probes, config.weight_check)
        await weight_check.measure(version=state.step)
        async with scheduler, checkpoints.save_on_error(), autoscaling(rollouts, monitor.console) as autoscaler:
            await self._evaluate_if_due(session, workers, state.step)
            step = state.step
            while step < config.total_steps:
                with monitor.step(step) as report:
                    oldest = step - config.max_staleness
                    scheduler.keep_ahead(config.groups_per_step * (1 + config.max_staleness))
                    with report.timed("rollout"):
                        groups = await shutdown.run_or_stop(
                            scheduler.take(config.groups_per_step, oldest, wanted, config.spare_groups)
                        )
                        groups = await shutdown.run_or_stop(
                            retry_unscored(groups, rewards, config.reward, monitor.console)
                        )
                    report.add(rollout_metrics(groups, config.metrics) | reward_metrics(groups) | scheduler.metrics())
                    report.add(staleness_metrics(groups, step))
                    if config.shuffle_rewards:
                        groups = shuffle_scores(groups, random.Random(derive_seed(config.seed, "shuffle", step)))
                    batch = estimator.batch(groups, oldest)
                    with report.timed("learn"):  # from here on a signal waits: a half-learned step cannot be dropped
                        await rollouts.sleep()
                        report.add(await learners.update(batch))
                    done = step + (not report.metrics.get("learner/skipped"))  # a skipped update is no step
                    checkpoints.mark_step(done, scheduler, groups)
                    with report.timed("publish"):
                        last = done == config.total_steps
                        await weights.publish(version=done, wait=last or config.max_staleness == 0)
                    if config.weight_check.due(done, config.total_steps):
                        await weights.settled()
                        with report.timed("proof"):
                            report.add(await weight_check.measure(version=done))
                if autoscaler is not None:
                    autoscaler.record_step(report.metrics)
                if session.recorder.is_due(step):
                    session.recorder.record(step, groups[0], await groups[0].trajectories, batch[0].advantages)
                step = done
                await self._evaluate_if_due(session, workers, step)
                if config.checkpoint.due(step, config.total_steps):
                    await checkpoints.save()
                shutdown.raise_if_requested()

    async def _evaluate_if_due(self, session: _Session, workers: Workers, step: int) -> None:
        config, monitor, total = self.config.evaluation, session.monitor, self.config.total_steps
        if not config.due(step, total) or monitor.was_evaluated(step):
            return
        questions, tolerance = session.held_out, self.config.reward.number_tolerance
        found = await evaluate(questions, workers.rollouts, workers.rewards, config, tolerance)
        probed = None
        if config.probe_due(step, total):
            probed = await probe(questions, found, workers.rollouts, config, tolerance)
        monitor.record_evaluation(step, found, probed)


def _importable(choice: type | str, what: str) -> str:
    """Return the name by which the configuration, and so every worker, finds a class. Raises ConfigError."""
    if isinstance(choice, str):
        return choice
    if choice.__module__ == "__main__" or "<locals>" in choice.__qualname__:
        raise ConfigError(
            f"{what} {choice.__qualname__} is defined in a script, notebook or function; put it into a module that the "
            "workers can import"
        )
    return f"{choice.__module__}:{choice.__qualname__}"
