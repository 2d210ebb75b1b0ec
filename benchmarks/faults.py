"""Play what a machine and its surroundings do to a real training, all in one run; is it the same run in the end?

    python -m benchmarks.faults                      # about ten minutes on two quiet cores; Linux
    python -m benchmarks.faults --kinds "process group" --steps 8

Trains the panels recipe twice, small (two questions of four trajectories a step, synchronous, a checkpoint behind each
step): once undisturbed, once through all of ``KINDS``. The run's folder is a small file system of its own in a mount
namespace of its own, which a ballast file fills; its copies go to an S3 server (moto) on this machine, whose port is
closed for two minutes. Losses, gradient norms, rewards, questions and weights of both runs are then compared, bit for
bit, and the copies are looked for at the URL. Prints a table, a line, and JSON (``--out``).

*noticed* is from the fault to what the run says about it; *goes on* to the first step finished after it, by the same
process or the next one.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.chaos import DRIVERS_FAMILY_S, workplace
from benchmarks.lives import GROUPS, Life, LifeFailed, descendants, living, send, small_run
from benchmarks.reporting import parser_of, report
from benchmarks.resume import compare

DISK_MIB = 400
FULL_SAVES = 3
STEPS_BETWEEN = 3
"""Steps from one fault to the next, so that each comes at a run that goes well."""
INSIDE = "ERGO_RL_FAULTS_INSIDE"
"""Set in the process that has a mount namespace of its own."""


@dataclass(frozen=True)
class Fault:
    """noticed_s, goes_on_s: see above; lasted_s: until the fault was over; steps_meanwhile: finished while it lasted;
    steps_again: finished steps that had to be made again; status: with which the process ended, None: it went on;
    said: what the run said first."""

    kind: str
    after_step: int
    noticed_s: float
    goes_on_s: float
    lasted_s: float
    steps_meanwhile: int
    steps_again: int
    status: int | None = None
    said: str = ""


class ObjectStore:
    """An S3 server on this machine that keeps what it holds while its port is closed."""

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app

        self._app, self._port = DomainDispatcherApplication(create_backend_app), 0
        self.start()
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._port}", "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1", "no_proxy": "127.0.0.1",
        }  # fmt: skip

    def start(self) -> None:
        from werkzeug.serving import WSGIRequestHandler, make_server

        class OneRequest(WSGIRequestHandler):
            protocol_version = "HTTP/1.0"  # no connection outlives its answer, and so the server

            def log_request(self, *_: object) -> None:
                pass

        self._server = make_server("127.0.0.1", self._port, self._app, threaded=True, request_handler=OneRequest)
        self._port = self._server.port
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Connections are refused from now on."""
        self._server.shutdown()
        self._thread.join()


class Faults:
    """One training through all faults. disk: the folder of the small file system."""

    def __init__(self, folder: Path, disk: Path, store: ObjectStore | None, options: Any) -> None:
        self.folder, self.disk, self.store, self.patience_s = folder, disk, store, options.patience_s
        self.steps, self.outage_s = options.steps, options.outage_s
        self.url = "s3://ergo/copies" if store is not None else None
        self.overrides = small_run(
            folder, self.steps, self.steps * GROUPS, runs_dir=disk, **{
                **COMMON, "checkpoint.url": self.url or "null", "learner.hang_timeout_s": options.hang_timeout_s,
                "recovery.learner_restarts": 10, "recovery.backoff_s": 0.5,
            },
        )  # fmt: skip
        self.played: list[Fault] = []
        self.orphans: list[str] = []

    def go(self, kinds: list[str]) -> int:
        """Exit status of the last life."""
        with ExitStack() as stack:
            self._stack, self.life = stack, self._born(stack)
            for kind in kinds:
                self._wait_for_steps(STEPS_BETWEEN)
                played = KINDS[kind](self, kind)
                self.played.append(played)
                print(line_of(played), played.said[:80], file=sys.stderr, flush=True)
            return self.life.end(self.patience_s + self.outage_s)

    def _born(self, stack: ExitStack) -> Life:
        return stack.enter_context(living(self.overrides, self.folder / "output.log"))

    # --- the faults ---------------------------------------------------------------------------------------------------

    def stopped_learner(self, kind: str) -> Fault:
        pid, since, last, told = self.life.of_kind("ray::LearnerRank"), time.time(), self._last(), self._told()
        self.life.send(pid, signal.SIGSTOP)
        return self._noticed(kind, since, last, told, "starting the learner again")

    def full_disk(self, kind: str) -> Fault:
        """Full until three saves have failed, of which nothing must be left."""
        ballast, since, last, told = self.disk / "ballast", time.time(), self._last(), self._told()

        def failed() -> int:
            fill(ballast)  # what a failed save or a removed checkpoint gives back, too
            return self._new(told).count("NOT SAVED")

        self.life.wait_for("a save that fails", lambda: failed() >= 1, self.patience_s, pause_s=0.02)
        noticed_s = time.time() - since
        self.life.wait_for(f"{FULL_SAVES} failed saves", lambda: failed() >= FULL_SAVES, self.patience_s, pause_s=0.02)
        over = time.time()
        ballast.unlink()
        self._wait_for_saved(over)
        return self._over(kind, since, last, noticed_s, over, first_with(self._new(told), "NOT SAVED"))

    def store_away(self, kind: str) -> Fault:
        assert self.store is not None
        since, last, told = time.time(), self._last(), self._told()
        self.store.stop()
        self.life.wait_for("word of the storage", lambda: "cannot be written" in self._new(told), self.patience_s)
        noticed_s = time.time() - since
        time.sleep(max(0.0, since + self.outage_s - time.time()))
        over = time.time()
        self.store.start()
        self.life.wait_for("the storage's answer", lambda: "answers again" in self._new(told), self.patience_s)
        return self._over(kind, since, last, noticed_s, over, first_with(self._new(told), "cannot be written"))

    def process_group(self, kind: str) -> Fault:
        return self._told_to_stop(kind, lambda: os.killpg(self.life.process.pid, signal.SIGTERM))

    def control_group(self, kind: str) -> Fault:
        """As systemd ends a unit: every process of the run, Ray's and the engines' too, gets SIGTERM."""
        family = [self.life.process.pid, *(pid for pid, _ in descendants(self.life.process.pid))]
        return self._told_to_stop(kind, lambda: [send(pid, signal.SIGTERM) for pid in family])

    # --- what they share ----------------------------------------------------------------------------------------------

    def _told_to_stop(self, kind: str, signal_all: Callable[[], object]) -> Fault:
        """Told to stop; the next life must go on with exactly the next step."""
        told, family = self._told(), descendants(self.life.process.pid)
        since = time.time()
        signal_all()
        deadline = since + self.patience_s
        while "stopping:" not in self._new(told) and self.life.process.poll() is None and time.time() < deadline:
            time.sleep(0.02)
        noticed_s = time.time() - since
        status = self.life.end(self.patience_s)
        over, last = time.time(), self._last()
        deadline = over + DRIVERS_FAMILY_S
        while (left := still_alive(family)) and time.time() < deadline:
            time.sleep(0.1)
        self.orphans += left
        self.life = self._born(self._stack)
        self.life.wait_for("the next step", lambda: self._first_after(over) is not None, self.patience_s)
        played = self._over(kind, since, last, noticed_s, over, first_with(self._new(told), "stopping:"), over)
        return replace(played, status=status)

    def _noticed(self, kind: str, since: float, last: int, told: int, word: str) -> Fault:
        self.life.wait_for(f"{word!r}", lambda: word in self._new(told), self.patience_s)
        noticed = time.time()
        self.life.wait_for("the next step", lambda: self._first_after(noticed) is not None, self.patience_s)
        return self._over(kind, since, last, noticed - since, noticed, first_with(self._new(told), word))

    def _over(
        self, kind: str, since: float, last: int, noticed_s: float, over: float, said: str, begin: float = 0.0
    ) -> Fault:
        """The figures, once a step was finished behind it, or the run has no more to make. over: end of the fault;
        begin: from when steps count as later than ``last``, where that is not ``since``."""

        def news() -> bool:
            return any(one["step"] > last and one["time"] > (begin or since) for one in self.life.steps())

        self.life.wait_for("a new step", lambda: news() or last + 1 == self.steps, self.patience_s)
        later = [step for step in self.life.steps() if step["time"] > (begin or since)]
        again = max(0, last + 1 - min((step["step"] for step in later), default=last + 1))
        goes_on_s = min((step["time"] for step in later if step["step"] > last), default=over) - since
        meanwhile = sum(step["time"] <= over for step in later)
        return Fault(kind, last, noticed_s, goes_on_s, over - since, meanwhile, again, said=said)

    def _wait_for_steps(self, count: int) -> None:
        """As many more as that, or until there are no more."""
        due = min(self._last() + count, self.steps - 2)
        self.life.wait_for(f"step {due}", lambda: self._last() >= due, self.patience_s)

    def _wait_for_saved(self, since: float) -> None:
        latest = self.life.run / "checkpoints" / "LATEST"
        self.life.wait_for("a save", lambda: latest.exists() and latest.stat().st_mtime > since, self.patience_s)

    def _first_after(self, since: float) -> int | None:
        return next((step["step"] for step in self.life.steps() if step["time"] > since), None)

    def _last(self) -> int:
        return max((step["step"] for step in self.life.steps()), default=-1)

    def _told(self) -> int:
        return self.life.log.stat().st_size if self.life.log.exists() else 0

    def _new(self, told: int) -> str:
        """What the run has said since, on one line: messages are broken where they are long."""
        return " ".join(self.life.log.read_bytes()[told:].decode(errors="replace").split())

    def lost_copies(self) -> list[str]:
        """Checkpoints of the run's folder that are not whole at the URL."""
        if self.url is None:
            return []
        from ergo_rl.jobs.remote_store import RemoteStore

        here = {path.name for path in (self.disk / "run" / "checkpoints").glob("step-*")}
        return sorted({max(here)} - set(RemoteStore(f"{self.url}/run").names()))


ALL = "SIGTERM to every process"
"""Ray ends with the run, so that the next life goes on from the last checkpoint."""
AWAY = "object store away"
KINDS: dict[str, Callable[[Faults, str], Fault]] = {
    "the only learner rank stopped (SIGSTOP)": Faults.stopped_learner,
    "disk full for 3 saves": Faults.full_disk,
    "SIGTERM to the process group": Faults.process_group,
    ALL: Faults.control_group,
    AWAY: Faults.store_away,
}
COMMON = {"checkpoint.every": 1, "start_deadline_s": 1800}


def fill(ballast: Path) -> None:
    """Write until the file system has no byte left."""
    with ballast.open("ab", buffering=0) as file:
        for size in (1 << 20, 4096):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue


def first_with(text: str, word: str) -> str:
    """The text from a little before ``word``."""
    return text[max(0, text.find(word) - 40) :][:200]


def still_alive(family: list[tuple[int, str]]) -> list[str]:
    from benchmarks.lives import still

    return [command for _, command in still(family)]


def line_of(one: Fault) -> str:
    seconds = "".join(f"{value:11.1f}" for value in (one.noticed_s, one.goes_on_s, one.lasted_s))
    status = "-" if one.status is None else one.status
    return f"{one.kind:42s}{seconds}{one.steps_meanwhile:11d}{one.steps_again:11d}{status:>11}"


def table(faults: list[Fault]) -> Iterator[str]:
    names = ("noticed s", "goes on s", "lasted s", "meanwhile", "again", "status")
    yield f"{'fault':42s}" + "".join(f"{name:>11s}" for name in names)
    yield from map(line_of, faults)


def verdict(
    found: dict[str, Any], faults: list[Fault], planned: int, lost_copies: list[str], orphans: list[str]
) -> tuple[bool, str]:
    wrong = [f"{name} {value}" for name, value in list(found.items())[2:] if value]
    wrong += [f"{planned - len(faults)} faults were not played"] if len(faults) < planned else []
    saved = [one for one in faults if one.status is not None and one.kind != ALL]
    wrong += [f"{one.kind} ended with {one.status}" for one in saved if one.status != 128 + signal.SIGTERM]
    wrong += [f"{one.kind}: {one.steps_again} steps again" for one in saved if one.steps_again]
    wrong += [f"{', '.join(lost_copies)} not at the URL"] if lost_copies else []
    wrong += [f"{len(orphans)} processes outlived their run"] if orphans else []
    facts = f"{len(faults)} faults, {found.get('steps', 0)} steps"
    return (
        not wrong,
        f"{'NOTHING LOST, THE SAME TO THE LAST BIT' if not wrong else 'NOT SO: ' + ', '.join(wrong)}: {facts}",
    )


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of ``DISK_MIB`` that nobody outside of this process' namespace sees, and that ends with it."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "none", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def into_own_namespace() -> None:
    """Start this command again where mounts are its own; returns in the process that has that."""
    if os.environ.get(INSIDE):
        return
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    if not shutil.which("unshare"):
        sys.exit("benchmarks.faults needs Linux and util-linux' unshare")
    os.environ[INSIDE] = "1"
    command = ["unshare", *user, "--mount", "--propagation", "private", sys.executable, "-m", "benchmarks.faults"]
    os.execvp("unshare", [*command, *sys.argv[1:]])


def undisturbed(folder: Path, steps: int, patience_s: float) -> Path:
    """The folder of the run."""
    with living(small_run(folder, steps, steps * GROUPS, **COMMON), folder / "output.log") as life:
        if life.end(2 * patience_s):
            life.fail("the undisturbed run failed")
    return life.run


def main() -> int:
    parser = parser_of(__doc__, "faults")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--steps", type=int, default=100, help="of either run (default: %(default)s)")
    parser.add_argument("--outage-s", type=float, default=120, help="that the store is away (default: %(default)s)")
    parser.add_argument(
        "--hang-timeout-s", type=float, default=20, help="learner.hang_timeout_s (default: %(default)s)"
    )
    parser.add_argument("--patience-s", type=float, default=900, help="for each wait (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="a new folder for the runs, kept (default: one that is removed)")
    options = parser.parse_args()
    if AWAY in options.kinds and not (find_spec("s3fs") and find_spec("moto")):
        parser.error(f"{AWAY!r} needs an S3 server: pip install s3fs 'moto[server]', or name other --kinds")
    if options.steps < (STEPS_BETWEEN + 2) * len(options.kinds):
        parser.error(f"give at least {STEPS_BETWEEN + 2} steps for each fault")
    into_own_namespace()
    store = None
    if AWAY in options.kinds:
        store = ObjectStore()
        os.environ |= store.environment
        import fsspec

        fsspec.filesystem("s3").mkdir("ergo")
    started, found, failure, lost_copies = time.monotonic(), dict[str, Any](), "", list[str]()
    with workplace(options.folder) as folder, small_disk(folder / "disk") as disk:
        (folder / "whole").mkdir(), (folder / "hurt").mkdir()
        trial = Faults(folder / "hurt", disk, store, options)
        try:
            whole = undisturbed(folder / "whole", options.steps, options.patience_s)
            print(f"undisturbed: {options.steps} steps", file=sys.stderr, flush=True)
            if status := trial.go(options.kinds):
                failure = f"the last life ended with {status}: {(folder / 'hurt' / 'output.log').read_text()[-2000:]}"
            else:
                found, lost_copies = compare(whole, disk / "run"), trial.lost_copies()
        except LifeFailed as error:
            failure = str(error)
    good, line = verdict(found, trial.played, len(options.kinds), lost_copies, trial.orphans)
    figures = {
        "minutes": (time.monotonic() - started) / 60, **found, "copies_lost": lost_copies, "orphans": trial.orphans,
        "failure": failure, "faults": [asdict(one) for one in trial.played],
    }  # fmt: skip
    print(*table(trial.played), sep="\n", file=sys.stderr)
    return report(options, figures, good and not failure, failure or line)


if __name__ == "__main__":
    raise SystemExit(main())
