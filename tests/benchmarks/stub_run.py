"""What a training run looks like from outside, without engines: the processes with their names, records, log and
checkpoints, and the answers to their deaths. For tests of what watches and hurts a run; it proves nothing about one.

Called as ``ergo-rl train`` is. ``rollout.hang_timeout_s`` holds; ``STUB_FORGETS=1`` leaves a question out after a
death.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from pathlib import Path

from ergo_rl.cluster.compat import die_with_parent

STEP_S = 0.1
SAVE_S = 0.2
"""Long beside the 0.05 s within which a kill comes after a save has begun."""
ENGINE = ("VLLM::EngineCore", "VLLM::Worker")
ROLES = {
    "rollout": ("ray::RolloutWorker", *ENGINE),
    "reward": ("ray::RewardWorker", *ENGINE),
    "learner": ("ray::LearnerRank",),
}


def spawn(titles: tuple[str, ...]) -> list[int]:
    """A chain of processes, each the parent of the next one; they end with their parents."""
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        end_with_kernel()
        below = spawn(titles[1:]) if titles[1:] else []
        os.write(write, json.dumps(below).encode() + b"\n")
        os.execv("/bin/sleep", [titles[0], "1000"])
    os.close(write)
    with os.fdopen(read) as told:
        return [pid, *json.loads(told.readline())]


def end_with_kernel() -> None:
    import multiprocessing

    multiprocessing.process._parent_process = type("Parent", (), {"pid": os.getppid()})()  # type: ignore[attr-defined]
    die_with_parent()


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


class Stub:
    def __init__(self, settings: dict[str, str]) -> None:
        self.folder = Path(settings["runs_dir"]) / settings["name"]
        self.checkpoints = self.folder / "checkpoints"
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self.total, self.hang_timeout_s = (
            int(settings["total_steps"]),
            float(settings.get("rollout.hang_timeout_s", 900)),
        )
        logging.basicConfig(
            filename=self.folder / "run.log", format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
        )
        self.log = logging.getLogger("stub")
        self.roles = {role: spawn(titles) for role, titles in ROLES.items()}
        self.back: set[str] = set()
        self.rewind()

    def rewind(self) -> None:
        latest = self.checkpoints / "LATEST"
        self.step = int(latest.read_text().removeprefix("step-")) if latest.exists() else 0
        for name in ("metrics", "questions"):
            path = self.folder / f"{name}.jsonl"
            lines = path.read_text().splitlines(keepends=True)[: self.step] if path.exists() else []
            path.write_text("".join(lines))

    def run(self) -> None:
        while self.step < self.total:
            time.sleep(STEP_S)
            if not any([self.mended(role) for role in ROLES]):
                self.learn()

    def mended(self, role: str) -> bool:
        """Whether something was wrong with it."""
        pids, since = self.roles[role], time.monotonic()
        while any(state(pid) == "T" for pid in pids) and time.monotonic() - since < self.hang_timeout_s:
            time.sleep(0.01)
        why = "hung" if any(state(pid) == "T" for pid in pids) else "is gone"
        if why != "hung" and all(state(pid) not in "ZX" for pid in pids):
            return False
        os.kill(pids[0], signal.SIGKILL)
        os.waitpid(pids[0], 0)
        self.roles[role] = spawn(ROLES[role])
        if role == "learner":
            self.log.warning("learner rank 0 died; starting the learner again from step-%d", self.step)
            self.rewind()
        else:
            self.log.warning("%s workers: worker 0 died (it %s)", role, why)
            self.back.add(role)
        return True

    def learn(self) -> None:
        forgets = "STUB_FORGETS" in os.environ and bool(self.back)
        for role in self.back:
            self.log.warning("%s workers: worker 0 has done its first work", role)
        self.back.clear()
        numbers = [2 * self.step, 2 * self.step + 1][: 1 if forgets else 2]
        used = [{"number": number, "id": f"q{number}", "samples": 4} for number in numbers]
        same = dict.fromkeys(
            ("learner/loss", "learner/grad_norm", "reward/total", "rollout/reply_tokens"), 1 / (1 + self.step)
        )
        self.record("questions", {"step": self.step, "questions": used})
        self.record("metrics", {"step": self.step, "time": time.time(), "time/step_s": STEP_S, **same})
        self.step += 1
        aside = self.checkpoints / f".writing-step-{self.step}"
        aside.mkdir(exist_ok=True)
        time.sleep(SAVE_S)
        aside.rename(self.checkpoints / f"step-{self.step}")
        pointer = self.checkpoints / ".LATEST"
        pointer.write_text(f"step-{self.step}")
        pointer.replace(self.checkpoints / "LATEST")

    def record(self, name: str, line: object) -> None:
        with (self.folder / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def export(self) -> None:
        import numpy as np
        from safetensors.numpy import save_file

        (self.folder / "policy").mkdir(exist_ok=True)
        save_file({"w": np.ones(3, np.float32)}, self.folder / "policy" / "model.safetensors")


if __name__ == "__main__":
    stub = Stub(dict(one.partition("=")[::2] for one in sys.argv[1:] if "=" in one))
    stub.run()
    stub.export()
