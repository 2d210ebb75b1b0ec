"""Shared by all tests: one Ray for the whole run, the order of the layers, and a file with the time of each."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.system.background import Background

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("RAY_ADDRESS", None)  # a cluster of the user's is not ours to fill with tests
# An example may take any time: hypothesis' limit of 200 ms fails on a machine that is busy with something else.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")
ROOT = Path(__file__).parent.parent
TIMES = ROOT / "build" / "test-times.json"
LAYERS = ("unit", "ray", "engines", "processes")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[object]:
    """A Ray of its own on this machine, shared by every test that needs one."""
    from ergo_rl.cluster.config import ClusterConfig
    from ergo_rl.cluster.placement import Cluster

    # Declared, not there: which of them each role of a recipe gets is up to Ray, which need not see them for it.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_OVERRIDE_RESOURCES", '{"GPU": 8}')
        with Cluster.connect(ClusterConfig(object_store_gib=1.0, wait_s=60)) as cluster:
            patch.undo()
            yield cluster


# --- order and time of the layers -------------------------------------------------------------------------------------


def layer_of(item: pytest.Item) -> str:
    """``unit`` (this process), ``ray`` (actors of the shared Ray), ``engines`` (the shared engines, which then end) or
    ``processes`` (the commands as a user calls them)."""
    fixtures = getattr(item, "fixturenames", ())
    if item.get_closest_marker("system"):
        return "engines" if "everything" in fixtures or "ray_cluster" in fixtures else "processes"
    return "ray" if "ray_cluster" in fixtures else "unit"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Quick tests first, so that a failure shows early; inside a layer the order stays, but for the ends of stories in
    the background, which are waited for last."""
    items.sort(key=lambda item: (LAYERS.index(layer_of(item)), "background" in getattr(item, "fixturenames", ())))
    for item in items:
        item.user_properties.append(("layer", layer_of(item)))
        if mark := item.get_closest_marker("hostile"):
            item.user_properties.append(("hostile", mark.args[0]))


class HostileInput:
    """Counts what tests marked ``hostile`` tried, and what of it held: one by a test, or as many as it gives
    ``record_property("tried", ...)``; one that fails holds nothing unless it gives ``"held"``, too."""

    def __init__(self) -> None:
        self.tried: dict[str, int] = defaultdict(int)
        self.held: dict[str, int] = defaultdict(int)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        found: dict[str, Any] = dict(report.user_properties)
        if (kind := found.get("hostile")) is None or report.skipped or (report.when != "call" and report.passed):
            return
        tried = found.get("tried", 1)
        self.tried[kind] += tried
        self.held[kind] += found.get("held", tried) if report.passed or "held" in found else 0

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for kind, tried in self.tried.items():
            terminalreporter.write_line(f"hostile {kind}: tried {tried}, held {self.held[kind]}")


class LayerTimes:
    """Adds up seconds and tests by layer and by file, fixtures included, and writes ``build/test-times.json``."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.seconds: dict[str, float] = defaultdict(float)
        self.tests: dict[str, int] = defaultdict(int)
        self.files: dict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        layer = str(dict(report.user_properties).get("layer", "unit"))
        self.seconds[layer] += report.duration
        self.tests[layer] += report.when == "call"
        self.files[report.location[0]] += report.duration

    def pytest_sessionfinish(self) -> None:
        layers = {name: {"tests": self.tests[name], "seconds": round(self.seconds[name], 1)} for name in self.seconds}
        slowest = sorted(self.files.items(), key=lambda entry: -entry[1])
        TIMES.parent.mkdir(exist_ok=True)
        times = {
            "seconds": round(time.monotonic() - self.started, 1),
            "cores": os.cpu_count(),
            "layers": layers,
            "files": {name: round(seconds, 1) for name, seconds in slowest},
        }
        TIMES.write_text(json.dumps(times, indent=1) + "\n")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        shown = ", ".join(f"{name} {self.tests[name]} in {self.seconds[name]:.0f} s" for name in self.seconds)
        terminalreporter.write_line(f"layers: {shown} ({TIMES.relative_to(ROOT)})")


@pytest.fixture(scope="session")
def background(request: pytest.FixtureRequest) -> Background:
    """The stories that began with the session."""
    return request.config.stash[_BACKGROUND]


_BACKGROUND = pytest.StashKey[Background]()


def pytest_collection_finish(session: pytest.Session) -> None:
    if not session.config.option.collectonly:
        folder = Path(tempfile.mkdtemp(prefix="ergo-rl-stories-"))
        session.config.stash[_BACKGROUND] = Background(folder, session.items)


def pytest_unconfigure(config: pytest.Config) -> None:
    if _BACKGROUND in config.stash:
        config.stash[_BACKGROUND].close()


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(LayerTimes())
    config.pluginmanager.register(HostileInput())
