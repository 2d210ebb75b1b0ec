"""What ``benchmarks.gpu_check`` makes of its figures: for each part whether they are good, and one line in words."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Found = Mapping[str, Any]
"""Section -> figures, as a job noted them (``benchmarks.gpu_parts``)."""
Judged = tuple[bool, str]
LEAST, MOST = 0.5, 1.1
"""Measured memory over planned: above the second a plan promises what does not fit, below the first it says little."""


def judge_models(found: Found, gpu: bool) -> Judged:
    one = found["models"]
    said = f"{one['parameters'] / 1e6:,.1f} M random parameters, {one['bytes'] / 1e9:.3f} GB on disk"
    return True, f"{said} in {one['seconds']:.1f} s"


def judge_panels(found: Found, gpu: bool) -> Judged:
    one = found["panels"]
    line = (
        f"{one['steps']} of {one['wanted']} steps of ergo-rl train in {one['dtype']}; attention: {one['attention']}; "
        f"weights by {one['weights']}, {one['undelivered']} times through the object store instead; vLLM and learner "
        f"differ by {one['mismatch_mean']:.1e} nats at most (limit {one['tolerance']:.0e})"
    )
    good = one["steps"] == one["wanted"] and one["mismatch_mean"] <= one["tolerance"] and not one["undelivered"]
    return good, line


def judge_learner(found: Found, gpu: bool) -> Judged:
    """All that is used of the device: torch's share, the context, what libraries took."""
    one = found["learner"]
    peak, seconds = one["peak_gib"], statistics.median(one["seconds"])
    learns = _finite(one["grad_norm"])
    line = f"{one['steps']} updates, {one['micro_batches']} passes each, {seconds:.1f} s; "
    line += "" if learns else f"gradients of norm {one['grad_norm']}; "
    if not gpu:
        return learns, f"{line}{peak['host']:.2f} GiB of main memory"
    ratio = peak["device"] / one["planned_gib"]
    line += f"{peak['device']:.1f} GiB, {ratio:.2f} of the plan's {one['planned_gib']:.1f}"
    return learns and LEAST <= ratio <= MOST, line


def _finite(norms: Sequence[float]) -> bool:
    """Gradients that are neither nothing, nor infinite, nor NaN."""
    return all(0 < norm < math.inf for norm in norms)


def judge_colocated(found: Found, gpu: bool) -> Judged:
    one = found["colocated"]
    steps, peak = one["steps"], one["peak_gib"]
    times = [statistics.median(step[name] for step in steps) for name in ("rollout_s", "learn_s")]
    line = f"{len(steps)} steps, rollouts {times[0]:.1f} s, update {times[1]:.1f} s; "
    learns = _finite([step["grad_norm"] for step in steps])
    line += "" if learns else f"gradients of norm {[step['grad_norm'] for step in steps]}; "
    if not gpu:
        return learns, f"{line}learner {peak['host']:.2f} GiB of main memory"
    planned = sum(one["planned_gib"][role] for role in ("rollout", "learner"))
    ratio = peak["device"] / planned
    line += (
        f"the GPU holds {peak['device']:.1f} GiB, {ratio:.2f} of the plan's {planned:.1f} (learner without its CUDA "
        f"context: {peak['reserved']:.1f} of {one['planned_gib']['learner']:.1f})"
    )
    return learns and LEAST <= ratio <= MOST, line


def judge_mismatch(found: Found, gpu: bool) -> Judged:
    one = found["mismatch"]
    limit = one["tolerance"]
    line = f"{one['dtype']}: {max(one['means']):.1e} nats on average after the worst of {len(one['means'])} publishes"
    close = all(mean <= limit for mean in one["means"])  # which NaN is not
    return close, f"{line}, {max(one['most']):.1e} at most (limit of the mean {limit:.0e})"


def judge_publish(found: Found, gpu: bool) -> Judged:
    one = found["publish"]
    gather, load = ([each[name] for each in one["publications"]] for name in ("gather_s", "load_s"))
    seconds = statistics.median(a + b for a, b in zip(gather, load, strict=True))
    line = (
        f"object store: {one['bytes'] / 1e9:.3f} GB in {seconds:.2f} s (learner stands still for "
        f"{statistics.median(gather):.2f} s): {one['bytes'] / seconds / 1e9:.2f} GB/s"
    )
    return True, line


def judge_latency(found: Found, gpu: bool) -> Judged:
    """Replies must be whole, for the ways to have done the same work; only on a GPU must two stages be quicker."""
    one = found["latency"]
    ways, reply = one["ways"], one["reply"]
    middle = {name: statistics.median(way["seconds"]) for name, way in ways.items()}
    whole = len(ways["two_stage_small"]["visual_tokens"]) == 2
    whole &= all(way["last_reply_tokens"] == reply for way in ways.values())
    speedup = middle["direct_large"] / middle["two_stage_small"]
    line = (
        f"two stages at {one['small']} visual tokens {middle['two_stage_small']:.2f} s "
        f"({' + '.join(map(str, ways['two_stage_small']['visual_tokens']))}), direct {middle['direct_small']:.2f} s, "
        f"direct at {one['large']:,} {middle['direct_large']:.2f} s: {speedup:.2f} times; {reply} tokens a reply"
    )
    return whole and (speedup > 1 or not gpu), line if whole else f"not two views, or replies cut short; {line}"
