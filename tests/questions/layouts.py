"""Three-row files in the layouts that hubs and trainers publish, after the descriptions of their columns.

``python -m tests.questions.layouts`` converts each and prints the table of docs/data.md.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ergo_rl.questions.conventions import Told
from ergo_rl.questions.formats import FORMATS
from ergo_rl.questions.prepare import Conversion, ConversionReport, convert_dataset

ROWS = range(3)
LETTERED = ["(A) red", "(B) blue", "(C) green", "(D) white", "(E) not there"]
ASK = " Please provide the bounding box coordinate of the region that can help you answer the question better."


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (300 + number, 200), (number, 0, 0)).save(file, "PNG")
    return file.getvalue()


def packed(number: int) -> str:
    return base64.b64encode(png(number)).decode()


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def images(folder: Path, pattern: str) -> None:
    for number in ROWS:
        put(folder / pattern.format(number), png(number))


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    return put(path, "".join(json.dumps(row) + "\n" for row in rows))


def tsv(path: Path, rows: list[dict[str, Any]]) -> Path:
    file = io.StringIO()
    table = csv.DictWriter(file, list(rows[0]), delimiter="\t")
    table.writeheader()
    table.writerows(rows)
    return put(path, file.getvalue())


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@dataclass(frozen=True)
class Layout:
    """A published layout: how its three rows are made (in a folder: rows, places of images), and what must come out."""

    title: str
    format: str
    make: Callable[[Path], tuple[list[Path], list[Path]]]
    answers: tuple[str, ...]
    options: int = 0
    boxes: int = 0
    """Of each row."""


def vstar(folder: Path) -> tuple[list[Path], list[Path]]:
    images(folder, "direct_attributes/sa_{}.jpg")
    for number in ROWS:
        beside = {"target_object": ["glove"], "bbox": [[1, 2, 30, 40]]}
        put(folder / f"direct_attributes/sa_{number}.json", json.dumps(beside))
    text = "What?\n(A) red\n(B) blue\n(C) green\n(D) white\nAnswer with the option's letter from the given choices."
    rows = [{"image": f"direct_attributes/sa_{number}.jpg", "text": text, "category": "direct_attributes",
             "label": "ABC"[number], "question_id": str(number)} for number in ROWS]  # fmt: skip
    return [jsonl(folder / "test_questions.jsonl", rows)], []


def hub_cache(folder: Path) -> tuple[list[Path], list[Path]]:
    """``snapshots/REVISION`` holds links to ``blobs``."""
    vstar(folder / "blobs" / "real")
    snapshot = folder / "snapshots" / "0123abc"
    for number, path in enumerate(sorted((folder / "blobs" / "real").rglob("*.*"))):
        blob = folder / "blobs" / f"{number:040x}"
        path.rename(blob)
        link = snapshot / path.relative_to(folder / "blobs" / "real")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    return [snapshot / "test_questions.jsonl"], []


def hrbench(folder: Path) -> tuple[list[Path], list[Path]]:
    rows = [{"index": number, "question": 'The "small" sign?', "answer": "ABC"[number], "category": "single",
             "A": "red", "B": "blue", "C": "None", "D": "white", "cycle_category": number,
             "image": "0" if number else packed(0)}
            for number in ROWS]  # fmt: skip
    return [tsv(folder / "hr_bench_4k.tsv", rows)], []


def hrbench_parquet(folder: Path) -> tuple[list[Path], list[Path]]:
    rows = [{"index": number, "question": "Which?", "answer": "ABC"[number], "category": "single", "A": "1", "B": "2",
             "C": "3", "D": "4", "image": packed(number)} for number in ROWS]  # fmt: skip
    return [parquet(folder / "data" / "hr_bench_8k-00000-of-00001.parquet", rows).parent.parent], []


def mme_json(folder: Path) -> tuple[list[Path], list[Path]]:
    rows = [{"Question_id": f"perception/{number}", "Image": f"{number}.png", "Text": "What?",
             "Ground truth": "ABE"[number], "Question Type": "Multiple Choice", "Answer choices": LETTERED,
             "Category": "c", "Subtask": "s", "Task": "t"}
            for number in ROWS]  # fmt: skip
    with zipfile.ZipFile(folder / "imgs.zip", "w") as archive:
        for number in ROWS:
            archive.writestr(f"imgs/{number}.png", png(number))
    return [put(folder / "MME_RealWorld.json", json.dumps(rows))], [folder / "imgs.zip"]


def mme_tsv(folder: Path, name: str, choices: str, columns: bool) -> tuple[list[Path], list[Path]]:
    beside = dict(zip("ABCDE", LETTERED, strict=True)) if columns else {}
    rows = [{"index": number, "image": packed(number), "question": "What?", "multi-choice options": choices, **beside,
             "answer": "ABE"[number], "category": "c", "l2-category": "s"} for number in ROWS]  # fmt: skip
    return [tsv(folder / name, rows)], []


def treebench(folder: Path) -> tuple[list[Path], list[Path]]:
    rows = [{"index": number, "image": packed(number), "question": "What?", "multi-choice options":
             "A. red\nB. blue\nC. green\nD. white", "A": "red", "B": "blue", "C": "green", "D": "white",
             "answer": "ABC"[number], "category": "c", "target_instances": "[{'bbox': [1, 2, 30, 40], 'name': 'dog'}]"}
            for number in ROWS]  # fmt: skip
    return [tsv(folder / "TreeBench.tsv", rows)], []


def treevgr(folder: Path) -> tuple[list[Path], list[Path]]:
    rows = [{"images": [{"bytes": png(number), "path": None}], "problem": "<image>Left?\nA. red\nB. blue",
             "answer": "AB"[number % 2], "target_instances": [{"bbox": [1, 2, 30, 40], "label": "l", "name": "n"}]}
            for number in ROWS]  # fmt: skip
    return [parquet(folder / "vstar30k_visdrone6k_x1y1x2y2.parquet", rows)], []


def deepeyes(folder: Path) -> tuple[list[Path], list[Path]]:
    rows = [{"data_source": "vstar", "prompt": [{"role": "system", "content": "You are a helpful assistant."},
             {"role": "user", "content": "<image>\nWhat?\nThink first."}], "images":
             [{"bytes": png(number), "path": None}], "ability": "vl_agent",
             "env_name": "visual_toolbox_v2", "reward_model": {"ground_truth": "ABC"[number],
             "style": "model"}, "extra_info": {"answer": "ABC"[number], "index": str(number), "question":
             "What?\nA. red\nB. blue\nC. green", "split": "train"}} for number in ROWS]  # fmt: skip
    return [parquet(folder / "data_0.1.2_visual_toolbox_v2.parquet", rows)], []


def verl(folder: Path) -> tuple[list[Path], list[Path]]:
    rows = [{"data_source": "geometry3k", "prompt": [{"role": "user", "content": "<image>How many?"}],
             "ability": "math", "images": [{"bytes": png(number), "path": None}], "reward_model":
             {"style": "rule", "ground_truth": str(number)}, "extra_info": {"split": "train", "index": number}}
            for number in ROWS]  # fmt: skip
    parquet(folder / "train-0.parquet", rows[:1])
    parquet(folder / "train-1.parquet", rows[1:])
    return [folder / "train-*.parquet"], []


def viscot(folder: Path) -> tuple[list[Path], list[Path]]:
    """As the archive is unpacked: a folder for each data set, in which names repeat."""
    for name in ("cub", "gqa", "v7w"):
        images(folder / "cot_image_data" / name, "{}.jpg")
    rows = [{"question": "What?", "answer": "a wren", "image": f"{number}.jpg", "width": 300 + number, "height": 200,
             "bboxs": [[1, 2, 30, 40]], "dataset": ("cub", "gqa", "visual7w")[number], "split": "train"}
            for number in ROWS]  # fmt: skip
    return [jsonl(folder / "some_cot_train.jsonl", rows)], [folder / "cot_image_data"]


def viscot_talk(folder: Path) -> tuple[list[Path], list[Path]]:
    with tarfile.open(folder / "cot_images.tar.gz", "w:gz") as archive:
        for number in ROWS:
            member = tarfile.TarInfo(f"cot_image_data/gqa/{number}.jpg")
            member.size = len(png(number))
            archive.addfile(member, io.BytesIO(png(number)))
    rows = [{"question_id": number, "dataset": "gqa", "image": [f"cot/gqa/{number}.jpg",
             f"cot/gqa/{number}.jpg###[1, 2, 30, 40]"], "conversations": [
             {"from": "human", "value": f"<image>\nWhat?{ASK}"}, {"from": "gpt", "value": "[0.1, 0.1, 0.2, 0.2]"},
             {"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a wren"}]}
            for number in ROWS]  # fmt: skip
    return [put(folder / "viscot_363k.json", json.dumps(rows))], [folder / "cot_images.tar.gz"]


def virl39k(folder: Path) -> tuple[list[Path], list[Path]]:
    images(folder, "images/{}.png")
    rows = [{"question": "<image>Which?\nA. red\nB. blue" if number < 2 else "<image>How many?",
             "answer": ("\\boxed{A}", "\\boxed{B}", "\\boxed{7}")[number], "PassRate_32BTrained": 0.5, "category": "c",
             "source": "s", "qid": f"q-{number}", "image": [f"images/{number}.png"]} for number in ROWS]  # fmt: skip
    return [parquet(folder / "39Krelease.parquet", rows)], []


def visualprobe(folder: Path) -> tuple[list[Path], list[Path]]:
    images(folder / "VisualProbe_train", "images/{}.jpg")
    rows = [
        {"image": f"VisualProbe_train/images/{number}.jpg", "question": "What?", "answer": "red"} for number in ROWS
    ]
    return [put(folder / "VisualProbe_train" / "train.json", json.dumps(rows))], []


def llava(folder: Path) -> tuple[list[Path], list[Path]]:
    images(folder, "coco/train2017/{}.jpg")
    rows = [{"id": f"00{number}", "image": f"coco/train2017/{number}.jpg", "conversations": [
             {"from": "human", "value": "What?\n<image>"}, {"from": "gpt", "value": "red"},
             {"from": "human", "value": "And?"}, {"from": "gpt", "value": "blue"}]} for number in ROWS]  # fmt: skip
    return [put(folder / "llava_v1_5_mix665k.json", json.dumps(rows))], []


def vlm_r1(folder: Path) -> tuple[list[Path], list[Path]]:
    images(folder, "Clevr/{}.png")
    rows = [{"id": number, "image": f"Clevr/{number}.png", "conversations": [{"from": "human", "value": "How many?"},
             {"from": "gpt", "value": f"<answer> {number} </answer>"}]} for number in ROWS]  # fmt: skip
    return [jsonl(folder / "clevr_cogent_trainA.jsonl", rows)], []


def sharegpt(folder: Path) -> tuple[list[Path], list[Path]]:
    images(folder, "mllm_demo_data/{}.jpg")
    rows = [{"messages": [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "red"}],
             "images": [str(folder / f"mllm_demo_data/{number}.jpg")]} for number in ROWS]  # fmt: skip
    return [put(folder / "mllm_demo.json", json.dumps(rows))], []


def ms_swift(folder: Path) -> tuple[list[Path], list[Path]]:
    images(folder, "{}.jpg")
    rows = [{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "<image>What?"},
             {"role": "assistant", "content": "red"}], "images": [f"{number}.jpg"], "objects": {"ref": ["dog"],
             "bbox": [[0.1, 0.2, 0.5, 0.6]]}} for number in ROWS]  # fmt: skip
    return [jsonl(folder / "train.jsonl", rows)], []


CHOICES = ("A", "B", "E")
LAYOUTS = [
    Layout("V\\* Bench, JSONL with a `.json` beside each image", "vstar", vstar, ("A", "B", "C"), 4, 1),
    Layout("V\\* Bench in the hub's cache (links to `blobs/`)", "vstar", hub_cache, ("A", "B", "C"), 4, 1),
    Layout("HR-Bench TSV, images shared by index", "hrbench", hrbench, ("A", "B", "C"), 4),
    Layout("HR-Bench Parquet, a folder with `data/*.parquet`", "hrbench", hrbench_parquet, ("A", "B", "C"), 4),
    Layout("MME-RealWorld JSON with an archive", "mme-realworld", mme_json, CHOICES, 5),
    Layout("MME-RealWorld TSV of VLMEvalKit (choices as text)", "mme-realworld",
           lambda folder: mme_tsv(folder, "MME-RealWorld.tsv", "The choices are listed below:\n" + "\n".join(LETTERED),
                                  True), CHOICES, 5),
    Layout("MME-RealWorld TSV (a remark, choices in A to E)", "mme-realworld",
           lambda folder: mme_tsv(folder, "MME-RealWorld-CN.tsv", "The choices are listed below", True), CHOICES, 5),
    Layout("MME-RealWorld-Lite TSV (choices as a Python list)", "mme-realworld",
           lambda folder: mme_tsv(folder, "mme_realworld_lite.tsv", repr(LETTERED), False), CHOICES, 5),
    Layout("TreeBench TSV", "treevgr", treebench, ("A", "B", "C"), 4, 1),
    Layout("TreeVGR-RL-37K Parquet", "treevgr", treevgr, ("A", "B", "A"), 2, 1),
    Layout("DeepEyes-Datasets-47k Parquet", "any", deepeyes, ("A", "B", "C"), 3),
    Layout("verl Parquet, a pattern of files", "any", verl, ("0", "1", "2")),
    Layout("Visual-CoT `*_cot_train.jsonl`, images as unpacked", "viscot", viscot, ("a wren",) * 3, 0, 1),
    Layout("Visual-CoT `viscot_363k.json` with its archive", "viscot", viscot_talk, ("a wren",) * 3, 0, 1),
    Layout("ViRL39K Parquet", "any", virl39k, ("A", "B", "7")),
    Layout("VisualProbe `train.json`", "any", visualprobe, ("red",) * 3),
    Layout("LLaVA JSON", "any", llava, ("red",) * 3),
    Layout("VLM-R1 JSONL", "any", vlm_r1, ("0", "1", "2")),
    Layout("ShareGPT JSON, absolute paths", "any", sharegpt, ("red",) * 3),
    Layout("ms-swift JSONL, boxes as shares", "any", ms_swift, ("red",) * 3, 0, 1),
]  # fmt: skip


def converted(layout: Layout, folder: Path) -> tuple[ConversionReport, Path]:
    rows, places = layout.make(folder)
    out = folder / "out" / "questions.parquet"
    return convert_dataset(Conversion(FORMATS[layout.format], tuple(rows), tuple(places), out, told=Told())), out


def table() -> str:
    lines = ["| published layout | `ergo-rl prepare` | converted | question, answer |", "|---|---|---|---|"]
    for layout in LAYOUTS:
        with tempfile.TemporaryDirectory() as folder:
            report, _ = converted(layout, Path(folder))
        found = report.sample
        places = ", ".join(
            f"{name} {found[name].rpartition('(from ')[2][:-1]}" for name in ("text", "options", "answer")
        )
        read = places.replace("columns A, B, ... or the text", "A, B, ... or in the text")
        lines.append(f"| {layout.title} | `{layout.format}` | {report.written} of 3 | {read} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
