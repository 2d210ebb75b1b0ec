"""Shared by all tests: one Ray for the whole run, questions, and where things lie."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[object]:
    """A Ray of its own on this machine, shared by every test that needs one."""
    from ergo_rl.cluster.config import ClusterConfig
    from ergo_rl.cluster.placement import Cluster

    with Cluster.connect(ClusterConfig(object_store_gib=1.0, wait_s=60)) as cluster:
        yield cluster
