"""Peak memory of the log-prob pass at a real vocabulary: forward and backward, beside the same model without logits.

    python benchmarks/logprob_memory.py            # about a minute on two cores; prints JSON, and one line in words

A random Qwen2.5-VL language model in float32, one row of text. Each way runs in a process of its own, after a small
pass in which all gradients are allocated; its figure is how far the resident set then rises (Linux: ``VmHWM``, reset
through ``/proc/self/clear_refs``). The gradient of the head's weight is no activation and is the same for every way of
making log-probs: it is taken off, and shown. Exit status 1 where the ratio is not below the limit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LIMIT = 1.2
WAYS = ("model", "head", "full")
"""The model alone; with our head at the sampled positions; with logits of every position, for comparison."""
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
"""glibc gives freed tensors back at once, so that the resident set is what is in use."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the model and of the pass, in tokens; float32 throughout."""

    vocabulary: int = 151_936
    hidden: int = 256
    layers: int = 12
    context: int = 4096
    sampled: int = 512

    @property
    def head_mib(self) -> float:
        """The head's weight, or its gradient."""
        return self.vocabulary * self.hidden * 4 / 2**20

    @property
    def logits_mib(self) -> float:
        """Logits of every position, once; a softmax and its gradient take as much again."""
        return self.vocabulary * self.context * 4 / 2**20


def summary(shape: Shape, rise: dict[str, float]) -> dict[str, Any]:
    """From how far memory rose (MiB by way) to what is printed."""
    found = {way: value - (0 if way == "model" else shape.head_mib) for way, value in rise.items()}
    return {
        "shape": asdict(shape),
        "head_weight_gradient_mib": round(shape.head_mib),
        "logits_of_every_position_mib": round(shape.logits_mib),
        **{f"{way}_mib": round(value) for way, value in found.items()},
        **{f"{way}_ratio": round(value / found["model"], 3) for way, value in found.items() if way != "model"},
        "limit": LIMIT,
    }


def memory(name: str) -> float:
    """``VmHWM`` (the highest resident set so far) or ``VmRSS`` (now), MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


def measure(way: str, shape: Shape) -> float:
    """How far one forward and backward pass raises the resident set, MiB. In a fresh process."""
    import torch

    from ergo_rl.cluster.compat import repair_torchvision
    from ergo_rl.learners.model import LogProbHead

    repair_torchvision()
    from transformers import Qwen2_5_VLTextConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

    heads = max(1, shape.hidden // 64)
    model = Qwen2_5_VLTextModel(
        Qwen2_5_VLTextConfig(
            vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=4 * shape.hidden,
            num_hidden_layers=shape.layers, num_attention_heads=heads, num_key_value_heads=heads,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]},
        )
    )  # fmt: skip
    head = LogProbHead.adopt(torch.nn.Linear(shape.hidden, shape.vocabulary, bias=False))
    for parameter in (*model.parameters(), head.weight):
        parameter.grad = torch.zeros_like(parameter)

    def run(context: int, sampled: int) -> None:
        ids = torch.randint(shape.vocabulary, (1, context))
        states = model(input_ids=ids, use_cache=False).last_hidden_state[0]
        if way == "model":
            value = states
        elif way == "head":
            value, _ = head(states[-sampled - 1 : -1], ids[0, -sampled:], 1.0, [0])
        else:
            value = torch.log_softmax(states @ head.weight.T, -1).gather(-1, ids[0, :, None])
        value.sum().backward()

    run(64, 8)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
    run(shape.context, shape.sampled)
    return memory("VmHWM") - before


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in asdict(Shape()).items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--full", action="store_true", help="also measure logits of every position (10 GiB or so)")
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    arguments = vars(parser.parse_args())
    full, one = arguments.pop("full"), arguments.pop("one")
    shape = Shape(**arguments)
    if one:
        print(measure(one, shape))
        return 0
    sizes = [word for name, value in asdict(shape).items() for word in (f"--{name}", str(value))]
    rise = {}
    for way in WAYS if full else WAYS[:2]:
        command = [sys.executable, __file__, *sizes, "--one", way]
        done = subprocess.run(command, env=os.environ | EXACT, stdout=subprocess.PIPE, text=True, check=True)
        rise[way] = float(done.stdout.split()[-1])
    found = summary(shape, rise)
    print(json.dumps(found, indent=2))
    good = found["head_ratio"] < LIMIT
    print(
        f"{'ok' if good else 'TOO MUCH'}: log-probs of {shape.sampled} of {shape.context} tokens take "
        f"{found['head_mib']} MiB, the model alone {found['model_mib']} MiB: {found['head_ratio']:.2f} times "
        f"(limit {LIMIT}); logits of every position would be {shape.logits_mib:.0f} MiB, each copy",
        file=sys.stderr,
    )
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
