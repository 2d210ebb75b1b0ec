"""A signal to the driver's process group must not reach Ray, which the driver needs to save."""

from __future__ import annotations

import os
import signal
import sys

import pytest
from ray._private import services

from ergo_rl.cluster.compat import keep_sigterm_handler, start_ray_in_own_session


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


@pytest.mark.parametrize(("before", "kept"), [(signal.default_int_handler, True), (signal.SIG_DFL, False)])
def test_handler_that_rays_would_replace_is_kept(before: signal.Handlers, kept: bool) -> None:
    def rays(number: int, frame: object) -> None: ...

    usual = signal.signal(signal.SIGTERM, before)
    try:
        with keep_sigterm_handler():
            signal.signal(signal.SIGTERM, rays)
        assert signal.getsignal(signal.SIGTERM) is (before if kept else rays)
    finally:
        signal.signal(signal.SIGTERM, usual)
