"""The wheel, used from a project of the user's own that has folders and packages with the same names as ours."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from benchmarks.lives import lines_of, small_run
from tests.conftest import ROOT
from tests.system.background import Background
from tests.system.installed import build_wheel, dependencies_only, install

pytestmark = pytest.mark.system
TIMEOUT_S = 420


def run(python: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The console command, in ``folder``."""
    command = [str(python.with_name("ergo-rl")), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S)


@pytest.mark.timeout(1500)
def test_train_works_where_a_project_has_folders_of_the_same_names(background: Background) -> None:
    background.result(__name__)


def story(tmp_path: Path) -> None:
    """Two steps on a real Ray, whose workers look into the working directory first; beside the package `cluster` of the
    index, which is a development dependency for this test alone."""
    python = dependencies_only(tmp_path / "environment")
    install(python, build_wheel())
    project = tmp_path / "project"
    for package in ("actors", "cluster", "episodes", "jobs", "learners", "rewards"):
        (project / package).mkdir(parents=True)
        (project / package / "__init__.py").write_text("raise RuntimeError('the package of the user')\n")
    (project / "rewards" / "__init__.py").write_text("")
    (project / "rewards" / "config.py").write_text("class MyRewardConfig:\n    weight = 1.0\n")

    models = {role: ROOT / "models" / f"panels-{role}" for role in ("policy", "reward")}
    overrides = small_run(
        tmp_path, 2, **{
            "learner.model": models["policy"], "rollout.engine.model": models["policy"],
            "reward.verifier.engine.model": models["reward"],
        },
    )  # fmt: skip
    done = run(python, project, "train", str(ROOT / "configs" / "panels.yaml"), *overrides)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert [step["step"] for step in lines_of(tmp_path / "run" / "metrics.jsonl")] == [0, 1]

    where = "import json, cluster, ergo_rl.cluster; print(json.dumps([cluster.__file__, ergo_rl.cluster.__file__]))"
    asked = subprocess.run([str(python), "-c", where], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    theirs, ours = json.loads(asked.stdout)
    assert Path(theirs).parent.parent.name == "site-packages" and Path(theirs).parent.name == "cluster"
    assert Path(ours).is_relative_to(tmp_path / "environment"), "the wheel's, and both are there"
