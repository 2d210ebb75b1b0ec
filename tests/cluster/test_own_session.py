"""A signal to the driver's process group must not reach Ray, which the driver needs to save."""

from __future__ import annotations

import os
import sys

import pytest
from ray._private import services

from ergo_rl.cluster.compat import start_ray_in_own_session


def test_servers_of_ray_start_in_a_session_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "ConsolePopen", services.ConsolePopen)
    start_ray_in_own_session()
    patched = services.ConsolePopen
    start_ray_in_own_session()
    assert services.ConsolePopen is patched, "twice is once"
    server = services.start_ray_process([sys.executable, "-c", "input()"], "test", fate_share=True, pipe_stdin=True)
    try:
        assert os.getsid(server.process.pid) == server.process.pid != os.getsid(0)
    finally:
        server.process.kill()
        server.process.wait()
