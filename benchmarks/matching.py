"""Matchers on the same hand-labelled rows: false positives (wrong answers judged right) and false negatives.

Ours beside math-verify and lmms-eval where they are installed, VLMEvalKit where a checkout of it is named, and the
matcher of an older commit of this repository::

    python -m benchmarks.matching --old 2783f66 --vlmevalkit ../VLMEvalKit
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import logging
import re
import string
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ergo_rl.episodes.types import Question
from ergo_rl.rewards.matching import matches

CASES = Path(__file__).parent.parent / "tests" / "rewards" / "matching_cases.jsonl"
Matcher = Callable[[str, Question], bool]


def old_matcher(commit: str) -> Matcher:
    """Return ``matches`` of ``rewards/matching.py`` as a commit has it."""
    source = subprocess.run(
        ["git", "show", f"{commit}:rewards/matching.py"], capture_output=True, text=True, check=True
    )
    module = types.ModuleType("old_matching")
    exec(compile(source.stdout, "matching.py", "exec"), module.__dict__)
    return module.__dict__["matches"]


def math_verify_matcher() -> Matcher:
    """Return math-verify with its own settings for letters, TeX and expressions."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, StringExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    both = [LatexExtractionConfig(), ExprExtractionConfig()]

    def judge(reply: str, question: Question) -> bool:
        letters = tuple(string.ascii_uppercase[: len(question.options)])
        targets = [StringExtractionConfig(strings=letters)] if letters else both
        return verify(parse(question.answer, targets), parse(reply, targets))

    return judge


def function_of(path: Path, name: str) -> Callable[..., Any]:
    """Return one function of a file whose module cannot be imported without all that it imports."""
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    scope: dict[str, Any] = {"re": re}
    exec(compile(tree, str(path), "exec"), scope)
    return scope[name]


def lmms_eval_matcher(task: str, name: str) -> Matcher:
    """Return a task's own letter extraction."""
    spec = importlib.util.find_spec("lmms_eval")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("lmms_eval")
    extract = function_of(Path(spec.submodule_search_locations[0]) / "tasks" / task / "utils.py", name)
    return lambda reply, question: extract(reply) == question.answer


def vlmevalkit_matcher(folder: Path) -> Matcher:
    """Return VLMEvalKit's exact matching (the step before it asks a judge)."""
    module = types.ModuleType("matching_util")
    source = (folder / "vlmeval" / "utils" / "matching_util.py").read_text()
    exec(
        source.replace("from vlmeval.smp.log import get_logger", "from logging import getLogger as get_logger"),
        module.__dict__,
    )

    def judge(reply: str, question: Question) -> bool:
        choices = dict(zip(string.ascii_uppercase, question.options, strict=False))
        return module.__dict__["can_infer"](reply, choices) == question.answer

    return judge


def count(judge: Matcher, rows: list[dict[str, Any]]) -> tuple[int, int, int]:
    """Return (false positives, false negatives, rows on which it raised, which count as not matched)."""
    wrong = lost = raised = 0
    for row in rows:
        try:
            said = judge(row["reply"], Question("q", b"", "?", row["truth"], tuple(row["options"])))
        except Exception:
            said, raised = False, raised + 1
        wrong += said and not row["right"]
        lost += row["right"] and not said
    return wrong, lost, raised


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", metavar="COMMIT", help="also the matcher of this commit")
    parser.add_argument("--vlmevalkit", type=Path, metavar="FOLDER", help="a checkout of VLMEvalKit")
    args = parser.parse_args(argv)
    rows = [json.loads(line) for line in CASES.read_text().splitlines()]
    lettered = [row for row in rows if row["options"]]
    free = [row for row in rows if not row["options"]]
    numbers = [row for row in free if re.search(r"[0-9]", row["truth"])]
    makers: dict[str, tuple[Callable[[], Matcher], bool]] = {
        "ours": (lambda: matches, True),
        "math-verify": (math_verify_matcher, True),
        "lmms-eval, vstar_bench": (lambda: lmms_eval_matcher("vstar_bench", "extract_answer_letter"), False),
        "lmms-eval, mme_realworld": (lambda: lmms_eval_matcher("mme_realworld", "extract_characters_regex"), False),
    }
    if args.old:
        makers[f"ours at {args.old}"] = (lambda: old_matcher(args.old), True)
    if args.vlmevalkit:
        makers["VLMEvalKit, can_infer"] = (lambda: vlmevalkit_matcher(args.vlmevalkit), False)
    print("| matcher | with options: false positives | false negatives | numbers: false positives | false negatives |")
    print("|---|---|---|---|---|")
    for name, (make, free_too) in makers.items():
        try:
            judge = make()
        except ImportError as error:
            print(f"{name}: not installed ({error})", file=sys.stderr)
            continue
        cells = [name]
        for part, has in ((lettered, True), (numbers, free_too)):
            wrong, lost, raised = count(judge, part) if has else (0, 0, 0)
            right = sum(row["right"] for row in part)
            cells += [f"{wrong} of {len(part) - right}", f"{lost} of {right}"] if has else ["", ""]
            if raised:
                print(f"{name} raised on {raised} rows", file=sys.stderr)
        print("| " + " | ".join(cells) + " |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
