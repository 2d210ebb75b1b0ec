"""``ergo-rl scale``: change the number of workers of a run while it runs."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
from collections.abc import Sequence
from pathlib import Path

import ray

from ergo_rl.cluster.compat import bind_ray_localhost, join_with_token
from ergo_rl.jobs.cli import command
from ergo_rl.jobs.run_control import WorkerCounts, ask, find_cluster, where_it_runs


@command("scale", also=(RuntimeError,))
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="ergo-rl scale",
        description="Change the number of workers of a run while it runs, from any machine of its cluster. Returns "
        "when new workers are ready, or removed ones have finished what they held.",
        epilog="example: ergo-rl scale runs/panels --rollout-workers 2",
    )
    parser.add_argument("run", help="the run's folder or its name")
    parser.add_argument("--rollout-workers", type=int, metavar="N")
    parser.add_argument("--reward-workers", type=int, metavar="N")
    parser.add_argument("--address", help="the cluster (host:port; default: what the run's folder says, or auto)")
    parser.add_argument("--namespace", default="ergo-rl", help="cluster.namespace of the run (default: %(default)s)")
    options = parser.parse_args(argv)
    sizes = WorkerCounts(options.rollout_workers, options.reward_workers)
    if sizes == WorkerCounts() or any(wanted is not None and wanted < 1 for wanted in (sizes.rollout, sizes.reward)):
        parser.error("give --rollout-workers or --reward-workers, at least 1")
    folder = next((path for path in (Path(options.run), Path("runs") / options.run) if path.is_dir()), None)
    known = where_it_runs(folder) if folder and not options.address else {}
    address = find_cluster(options.address or known.get("address", "auto"))
    if address.startswith("127.0.0.1:"):
        bind_ray_localhost()
    if known.get("token"):
        join_with_token()
    try:
        # Ray joins in C++, where Python's own handler would wait for up to a minute.
        usual = signal.signal(signal.SIGINT, signal.SIG_DFL)
        ray.init(
            address=address,
            namespace=known.get("namespace", options.namespace),
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
        signal.signal(signal.SIGINT, usual)
        print(asyncio.run(ask(folder.resolve().name if folder else options.run, sizes)))
    finally:
        ray.shutdown()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
