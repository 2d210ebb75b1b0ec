"""Each published layout: three of three rows are converted, with their answers, options and boxes."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

from ergo_rl.episodes.config import OnBadRow, QuestionsConfig
from ergo_rl.questions.dataset import QuestionStream
from tests.conftest import ROOT
from tests.questions.layouts import LAYOUTS, Layout, converted, table


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.title)
def test_published_layout_is_converted_whole(layout: Layout, tmp_path: Path) -> None:
    report, out = converted(layout, tmp_path)
    assert (report.written, report.skipped) == (3, {})
    stream = QuestionStream(QuestionsConfig([str(out)], shuffle=False, on_bad_row=OnBadRow.ERROR))
    questions = list(islice(stream, 3))
    assert tuple(question.answer for question in questions) == layout.answers
    assert len({question.id for question in questions}) == 3
    for question in questions:
        assert "<image>" not in question.text and question.text.partition("\n")[0].endswith("?")
        assert len(question.boxes) == layout.boxes
        assert not layout.options or len(question.options) == layout.options
        assert not any(option.startswith(("A.", "(A)", "B.", "(B)")) for option in question.options)


def test_table_of_the_docs_is_what_is_printed() -> None:
    assert table() in (ROOT / "docs" / "data.md").read_text(), "python -m tests.questions.layouts prints it"
