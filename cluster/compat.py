"""Workarounds for third-party bugs: a section for each, with its upstream reference and when to remove it.

Nothing runs at import; a process calls what it needs before it imports the package in question.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ergo_rl.cluster.torchvision_repair import repair_torchvision

if TYPE_CHECKING:
    import torch

# --- seeded sampling on vLLM's CPU backend ----------------------------------------------------------------------------
# When a prompt is prefilled in parts, vLLM samples a token after each part, discards it, and rewinds the request's
# random generator by an offset that only CUDA generators have: on CPU the engine core dies of "CPU Generator does not
# use offset" (the same in a fork: RBLN-SW/vllm-rbln #1025). It needs a seeded request and a busy engine. Remove when
# vLLM's CPUModelRunner keeps the state of generators whose token is discarded.


def patch_cpu_seeded_sampling() -> None:
    """Make vLLM's CPU workers restore a generator's state after a discarded token. Does nothing on other platforms."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    sample, bookkeeping = CPUModelRunner._sample, CPUModelRunner._bookkeeping_sync
    if sample.__module__ == __name__:
        return

    def discarded(runner: Any) -> dict[int, torch.Generator]:
        flags = runner.discard_request_mask.np[: runner.input_batch.num_reqs]
        return {index: generator for index, generator in runner.input_batch.generators.items() if flags[index]}

    def sample_and_restore(runner: Any, *args: Any, **kwargs: Any) -> Any:
        states = [(generator, generator.get_state()) for generator in discarded(runner).values()]
        output = sample(runner, *args, **kwargs)
        for generator, state in states:
            generator.set_state(state)
        return output

    def bookkeeping_without_them(runner: Any, *args: Any, **kwargs: Any) -> Any:
        generators, hidden = runner.input_batch.generators, discarded(runner)
        for index in hidden:
            del generators[index]
        try:
            return bookkeeping(runner, *args, **kwargs)
        finally:
            generators.update(hidden)

    CPUModelRunner._sample, CPUModelRunner._bookkeeping_sync = sample_and_restore, bookkeeping_without_them


# --- images of prompts that are in the prefix cache ------------------------------------------------------------------
# vLLM 0.32 sends a worker no pixels of an image that the prefix cache covers when its request is first scheduled
# (``strip_covered_mm_data``). If the request is then preempted, for instance by new weights in mid-reply, and the
# caches are cleared, the worker has nothing to encode and the core dies ("Expected number of multimodal embeddings to
# match number of input items: 1, but got len(mm_embeddings)=0"). So pixels are always sent, which costs
# nothing where the worker lives in the core's process. A core with worker processes of its own (tensor parallel) is
# reached by the plugin's entry point only: install the project there. Remove when vLLM sends the pixels again to a
# request that is resumed.


def patch_always_send_images() -> None:
    """In an engine core, send every request to its worker with the pixels of all its images."""
    from vllm.v1.core.sched import output

    output.strip_covered_mm_data = lambda mm_features, *_, **__: mm_features


# --- a Ray that other machines cannot reach --------------------------------------------------------------------------
# On Linux ``ray.init()`` turns 127.0.0.1 into the machine's address and then listens on every interface, without a
# password; "bind to the node's address" (ray #55484, #59852) does not change that for a local start in 2.60. With its
# switch for Windows and macOS, where firewalls ask, a node's address is 127.0.0.1 and all its servers listen there.
# Remove when ``ray.init(_node_ip_address="127.0.0.1")`` does so on Linux.


def bind_ray_localhost() -> None:
    """In this process and its children, start or join Ray at 127.0.0.1."""
    from ray._private import ray_constants

    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False


# --- a Ray that a signal to the group of processes does not reach -----------------------------------------------------
# The servers that ``ray.init()`` starts stay in the driver's process group, so SIGTERM to the group (a scheduler, a
# shell that ends its jobs) ends them while the driver saves, which then waits a minute for them and aborts with a C++
# stack. They still end with the driver (PR_SET_PDEATHSIG). Remove when Ray starts them in a session of their own.


def start_ray_in_own_session() -> None:
    """In this process, start Ray's servers, and so all workers, outside of the driver's process group."""
    from ray._private import services

    usual = services.ConsolePopen
    if usual.__module__ == __name__:
        return

    class SessionPopen(usual):  # type: ignore[misc, valid-type]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options, start_new_session=True)

    services.ConsolePopen = SessionPopen  # type: ignore[misc]


# --- a driver that SIGTERM ends with status 15 ------------------------------------------------------------------------
# ``ray.init()`` sets a handler of its own for SIGTERM, ``sys.exit(15)``, and leaves it there. Remove when Ray keeps a
# handler that it finds.


@contextmanager
def keep_sigterm_handler() -> Iterator[None]:
    """Behind the block, have the handler for SIGTERM that was set before it, if any was."""
    usual = signal.getsignal(signal.SIGTERM)
    yield
    if callable(usual) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, usual)


# --- gloo and NCCL that other machines cannot reach -------------------------------------------------------------------
# gloo listens at the address that the machine's own name resolves to (/etc/hosts), and NCCL's bootstrap on the first
# interface that is not loopback, even for a group of one process or one that never leaves the machine. Remove when
# torch binds both to loopback for a store that is a file or on this machine.


def bind_collectives_localhost() -> None:
    """In this process and its children, whose process groups stay on this machine, let gloo listen on loopback (Linux).
    NCCL, too, if the whole Ray is on this machine: else weights may come from a learner on another one."""
    if not os.path.exists("/sys/class/net/lo"):
        return
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized() or ray.util.get_node_ip_address() == "127.0.0.1":
        os.environ["NCCL_SOCKET_IFNAME"] = "lo"


# --- a Ray Serve that other machines cannot reach ---------------------------------------------------------------------
# A replica of Ray Serve 2.60 opens a port for other deployments on every interface, whatever the node's address is, and
# unpickles what arrives: whoever reaches it can run code. Remove when replicas listen on their node's address.


def bind_serve_localhost() -> None:
    """In a Serve replica's constructor, open that port at 127.0.0.1 if this is the node's address."""
    import ray
    from ray.serve._private import replica

    if ray.util.get_node_ip_address() != "127.0.0.1":
        return
    add_port = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, address: add_port(server, address.replace("[::]", "127.0.0.1"))


# --- joining a Ray that another process of this machine has started ---------------------------------------------------
# Since 2.60 a Ray that ``ray.init()`` starts requires a token, kept in ~/.ray; joining it by its address ends in
# "InvalidAuthToken" after half a minute (only ``address="auto"`` looks for the token). The mode is read once, when Ray
# is imported. Remove when Ray looks for its token for an address of this machine, too.


def join_with_token() -> None:
    """In this process, join Ray with this user's token from now on, unless RAY_AUTH_MODE is set."""
    from ray._raylet import Config  # type: ignore[attr-defined]

    os.environ.setdefault("RAY_AUTH_MODE", "token")
    Config.initialize("")


# --- is there an autoscaler? -----------------------------------------------------------------------------------------
# ``request_resources`` also accepts requests in a cluster without an autoscaler, where nobody reads them, and Ray 2.60
# has no public way to ask: ray.train and ray.data look for the machines that an autoscaler may add, as this does, and
# its sdk for the switch of the newer one. The older one (v1) can be there unseen; it notices actors without a place by
# itself, and adds machines at its own pace. Remove when ``ray.autoscaler.sdk`` can tell.


def has_autoscaler() -> bool:
    """Tell whether the cluster that this process is connected to can grow."""
    from ray._private.state import state
    from ray.autoscaler.v2.utils import is_autoscaler_v2

    return state.get_max_resources_from_cluster_config() is not None or is_autoscaler_v2()


# --- an engine whose actor is killed ---------------------------------------------------------------------------------
# vLLM's engine core does not watch its parent (0.32; only worker processes do): when an actor is killed, Ray leaves its
# children alone, and the core would keep its memory forever. So the kernel ends it, even if it is stopped (SIGSTOP) and
# could not watch. The signal is sent when the *thread* that started the process ends; engines are started by threads
# that live as long as their process (``asyncio.to_thread`` keeps its own). Remove when vLLM's core ends with its front
# end.

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """In a process that vLLM spawned, on Linux, end when the parent does. Does nothing elsewhere."""
    parent = multiprocessing.parent_process()
    if parent is None or not sys.platform.startswith("linux"):
        return
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent.pid:  # it ended before the call above
        os._exit(1)


# --- vLLM's processes ------------------------------------------------------------------------------------------------


def vllm_plugin() -> None:
    """Prepare a vLLM process (front end, engine core, worker); the ``vllm.general_plugins`` entry point calls it."""
    repair_torchvision()
    die_with_parent()
    from ergo_rl.cluster import vllm_worker  # imports vLLM, so only here; its import applies the other repairs

    vllm_worker.register()
