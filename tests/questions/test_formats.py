"""One row of each published layout as a question; options, answers and boxes as people write them."""

from __future__ import annotations

import base64
import json
import string
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ergo_rl.episodes.config import QuestionsConfig
from ergo_rl.episodes.types import Box, Question
from ergo_rl.questions.conventions import BoxCorners, BoxUnit, Conventions, Survey, Told, split_options
from ergo_rl.questions.dataset import DatasetError, QuestionStream, write_questions
from ergo_rl.questions.formats import FORMATS, ConvertedRow, convert_row, see_row
from ergo_rl.questions.image_store import ImageStore
from ergo_rl.questions.rows import BadCell
from tests.questions.test_dataset import png

PNG = png(100, 50)
BASE64 = base64.b64encode(PNG).decode()
FILES = {"a.png": PNG, "cub/a.png": PNG}
STORE = ImageStore(((Path("folder"), FILES.get),))


def whole_column(cells: dict[str, Any], name: str = "any", store: ImageStore = STORE, **told: Any) -> ConvertedRow:
    """Convert a row as if it were the whole data set."""
    dataset = FORMATS[name]
    survey = Survey(Told(**told), Conventions(corners=dataset.corners, boxes=dataset.unit))
    with suppress(BadCell):
        see_row(cells, dataset, store, survey)
    return convert_row(cells, dataset, store, 3, "file", survey.decide())


def made(cells: dict[str, Any], name: str = "any", **told: Any) -> Question:
    return whole_column(cells, name, **told).question


def plain(**cells: Any) -> dict[str, Any]:
    return {"image": "a.png", "question": "What?", "answer": "ring", **cells}


def test_vstar_row_is_converted_with_its_sidecar() -> None:
    beside = {"direct_attributes/sa_1.jpg": PNG, "direct_attributes/sa_1.json": json.dumps(
        {"target_object": ["glove"], "bbox": [[10, 20, 30, 5]], "question": "x", "options": []}).encode()}  # fmt: skip
    row = {
        "image": "direct_attributes/sa_1.jpg", "category": "direct_attributes", "label": "A", "question_id": "0",
        "text": "What is the material of the glove?\n(A) rubber\n(B) cotton\n(C) kevlar\n(D) leather\n"
        "Answer with the option's letter from the given choices directly.",
    }  # fmt: skip
    found = whole_column(row, "vstar", ImageStore(((Path("v"), beside.get),))).question
    assert found == Question(
        "0", PNG, "What is the material of the glove?", "A", ("rubber", "cotton", "kevlar", "leather"),
        (Box(10, 20, 40, 25),), "direct_attributes",
    )  # fmt: skip
    del beside["direct_attributes/sa_1.json"]
    assert whole_column(row, "vstar", ImageStore(((Path("v"), beside.get),))).question.boxes == ()


def test_hrbench_row_is_converted() -> None:
    row = {"index": "12", "image": BASE64, "question": "Which?", "A": "red", "B": "1", "C": "None", "D": "blue",
           "answer": "D", "category": "single", "cycle_category": "2"}  # fmt: skip
    found = made(row, "hrbench")
    assert found == Question("12", PNG, "Which?", "D", ("red", "1", "None", "blue"), (), "single")
    assert made({**row, "answer": "B", "D": ""}, "hrbench").options == ("red", "1", "None")
    assert made({**row, "answer": "B", "D": "None"}, "hrbench").options == ("red", "1"), "no option is there twice"


def test_mme_realworld_rows_of_both_forms_are_converted() -> None:
    published = {"Question_id": "perception/x/0", "Image": "a.png", "Text": "How many?", "Ground truth": "(B)",
                 "Question Type": "Multiple Choice", "Answer choices": ["(A) 1", "(B) 2", "(E) cannot be seen"],
                 "Category": "count", "Subtask": "Monitoring", "Task": "Perception"}  # fmt: skip
    found = made(published, "mme-realworld")
    assert (found.id, found.answer, found.source) == ("perception/x/0", "B", "Monitoring")
    assert found.options == ("1", "2", "cannot be seen")
    assert made({**published, "Ground truth": "E"}, "mme-realworld").answer == "C", "the third of three"
    table = {"index": "1", "bytes": BASE64, "question": "How many?", "answer": "B", "category": "c",
             "multi-choice options": "[\"(A) 1\", \"(B) 2\"]"}  # fmt: skip
    assert made(table, "mme-realworld") == Question("1", PNG, "How many?", "B", ("1", "2"), (), "c")


def test_viscot_rows_of_both_forms_are_converted() -> None:
    row = {"question": "What bird?", "answer": "a wren", "image": "a.png", "width": 100, "height": 50,
           "bboxs": [[10, 5, 20.5, 9]], "dataset": "cub", "split": "train"}  # fmt: skip
    found = made(row, "viscot")
    assert found == Question("file-3", PNG, "What bird?", "a wren", (), (Box(10, 5, 21, 9),), "cub")
    talk = {
        "question_id": 5, "dataset": "cub", "image": ["cub/a.png", "cub/a.png###[10, 5, 21, 9]"],
        "conversations": [
            {"from": "human", "value": "<image>\nWhat bird? Please provide the bounding box coordinate of the region "
             "that can help you answer the question better."},
            {"from": "gpt", "value": "[0.1, 0.1, 0.21, 0.18]"},
            {"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a wren"},
        ],
    }  # fmt: skip
    assert made(talk, "viscot") == Question("5", PNG, "What bird?", "a wren", (), (Box(10, 5, 21, 9),), "cub")


def test_treevgr_row_is_converted() -> None:
    targets = [{"name": "dog", "bbox": [0, 0, 10, 10]}, {"bbox_2d": [1, 1, 2, 2]}]
    row = {"problem": "<image>Left of what?", "answer": "(b)", "images": [{"bytes": PNG, "path": None}], "A": "cat",
           "B": "dog", "target_instances": targets}  # fmt: skip
    found = made(row, "treevgr")
    assert (found.text, found.answer, found.options) == ("Left of what?", "B", ("cat", "dog"))
    assert found.boxes == (Box(0, 0, 10, 10), Box(1, 1, 2, 2))
    assert made({**row, "target_instances": json.dumps(targets)}, "treevgr").boxes == found.boxes


words = st.text(st.characters(categories=("Ll", "Lu", "Nd")), min_size=1, max_size=12)


@given(
    stem=words, options=st.lists(words, min_size=2, max_size=8), style=st.sampled_from(["({}) {}", "{}. {}", "{}) {}"])
)
def test_split_options_takes_options_out_of_a_text(stem: str, options: list[str], style: str) -> None:
    lines = [style.format(letter, option) for letter, option in zip(string.ascii_uppercase, options, strict=False)]
    asked = f"{stem}?"
    for tail in ("", "\nAnswer with the option's letter from the given choices directly.", "\nSelect the best option."):
        assert split_options("\n".join([asked, *lines]) + tail) == (asked, options)


@given(st.text(max_size=80))
def test_split_options_splits_or_leaves_any_text(text: str) -> None:
    stem, options = split_options(text)
    assert len(options) != 1 and (options or stem == text.strip())


@pytest.mark.parametrize("text", ["What is A. Smith's hat?", "Is it\n(B) b\n(A) a", "One?\n(A) only"])
def test_split_options_leaves_other_lists_alone(text: str) -> None:
    assert split_options(text) == (text, [])


@pytest.mark.parametrize(
    ("answer", "letter"),
    [("B", "B"), ("(b)", "B"), ("b.", "B"), ("blue", "B"), ("BLUE", "B"), ("(B) blue", "B"), ("C. red", "A")],
)
def test_answers_become_letters(answer: str, letter: str) -> None:
    assert made(plain(options=["red", "blue"], answer=answer)).answer == letter


@pytest.mark.parametrize(
    ("boxes", "corners", "unit", "found"),
    [
        ([[10, 5, 20, 9]], BoxCorners.XYXY, BoxUnit.PIXELS, Box(10, 5, 20, 9)),
        ([10.4, 5.6, 20.4, 9.1], BoxCorners.XYXY, BoxUnit.PIXELS, Box(10, 5, 21, 10)),
        ("[[10, 5, 10, 4]]", BoxCorners.XYWH, BoxUnit.PIXELS, Box(10, 5, 20, 9)),
        ({"bbox": [0.1, 0.5, 0.2, 1.0]}, BoxCorners.XYXY, BoxUnit.SHARES, Box(10, 25, 20, 50)),
        ([[100, 500, 200, 1000]], BoxCorners.XYXY, BoxUnit.THOUSANDTHS, Box(10, 25, 20, 50)),
    ],
)
def test_boxes_of_every_style_and_unit_are_read(boxes: Any, corners: BoxCorners, unit: BoxUnit, found: Box) -> None:
    assert made(plain(boxes=boxes), corners=corners, boxes=unit).boxes == (found,)


def test_box_that_leaves_its_image_is_cut_and_counted() -> None:
    converted = whole_column(plain(boxes=[[-5, 0, 10, 60], [0, 0, 100.3, 50]]))
    assert converted.question.boxes == (Box(0, 0, 10, 50), Box(0, 0, 100, 50)) and converted.clipped == 1


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"image": None}, "image: is missing"),
        ({"image": "b.png"}, "image: is not there: no 'b.png' in folder"),
        ({"image": "../a.png"}, "image: the path leaves its folder: '../a.png'"),
        ({"image": ["a.png", "cub/a.png"]}, "image: are several, a question has one: 2"),
        ({"image": b"no image"}, "image: does not decode"),
        ({"image": "data:image/png;base64,!!!"}, "image: is no base64"),
        ({"image": "/9j/AAAA"}, "image: does not decode"),
        ({"question": " "}, "text: is empty"),
        ({"question": None}, "text: is missing"),
        ({"question": "<image>"}, "text: is empty"),
        ({"question": "a <|image_pad|>"}, r"text: contains the special token <\|image_pad\|>"),
        ({"answer": None}, "answer: is missing"),
        ({"answer": float("nan")}, "answer: is missing"),
        ({"options": ["red", "blue"], "answer": "C"}, "answer: is none of the options: 'C' of the 2"),
        ({"options": ["red", "red"], "answer": "red"}, "answer: is none of the options: 'red'"),
        ({"options": ["red"], "answer": "A"}, "options: should be 2 to 26 or none: there are 1"),
        ({"options": "red, blue", "answer": "A"}, "options: is no list of options: 'red, blue'"),
        ({"options": ["red", None], "answer": "A"}, "options: is missing"),
        ({"boxes": [[0, 0, 5]]}, "boxes: should be four finite numbers"),
        ({"boxes": [[0, 0, 0, 5]]}, r"boxes: is empty or outside of the image: \[0, 0, 0, 5\] in 100 x 50"),
        ({"boxes": [[200, 0, 300, 5]]}, "boxes: .* outside"),
        ({"boxes": "x"}, "boxes: is no list of boxes"),
        ({"boxes": 7}, "boxes: should be a list"),
    ],
)  # fmt: skip
def test_bad_row_names_its_column_and_says_why(cells: dict[str, Any], message: str) -> None:
    with pytest.raises(BadCell, match=message):
        made(plain(**cells))


anything = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=30) | st.binary(max_size=20)
    | st.sampled_from(["a.png", BASE64, "A", "[[0,0,9,9]]", "Q\n(A) x\n(B) y"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["bbox", "bytes", "value"]), inner),
    max_leaves=6,
)  # fmt: skip
columns = sorted(
    {name for dataset in FORMATS.values() for names in dataset.columns.values() for name in names} | {"A", "B"}
)


@given(
    cells=st.dictionaries(st.sampled_from([*columns, "conversations"]), anything, max_size=12),
    name=st.sampled_from(sorted(FORMATS)),
)
def test_any_row_is_a_question_or_a_bad_cell(
    tmp_path_factory: pytest.TempPathFactory, cells: dict[str, Any], name: str
) -> None:
    row = {"image": PNG, "text": "Which?", "question": "Which?", "answer": "B", "label": "B", **cells}
    try:
        question = made(row, name)
    except (BadCell, DatasetError):
        return
    path = tmp_path_factory.getbasetemp() / "one.parquet"
    write_questions(path, iter([question]))
    assert next(QuestionStream(QuestionsConfig([str(path)], on_bad_row="error"))) == question  # type: ignore[arg-type]


def test_renamed_columns_are_read() -> None:
    dataset = FORMATS["any"].renamed({"text": "frage", "answer": "antwort"})
    row = {"image": "a.png", "frage": "Was?", "antwort": 7, "question": "What?"}
    found = convert_row(row, dataset, STORE, 1, "f", Conventions()).question
    assert (found.text, found.answer) == ("Was?", "7")
    with pytest.raises(ValueError, match="colour: a question has no such field, it has id, image"):
        dataset.renamed({"colour": "x"})
