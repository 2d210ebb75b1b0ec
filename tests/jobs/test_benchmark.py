"""The grid of a benchmark: records, figures, reports, and the whole of it from Python, on a real HTTP server."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ergo_rl.episodes.types import Question
from ergo_rl.jobs.benchmark import evaluate
from ergo_rl.jobs.benchmark_grid import Mode, Record, as_markdown, figures, pareto, run_grid, summarise, write_report
from ergo_rl.jobs.config import ConfigError, TrainConfig
from ergo_rl.jobs.evaluation import HeldOut
from ergo_rl.jobs.policy_clients import EndpointClient, endpoint_at
from ergo_rl.questions.dataset import DatasetError, write_questions
from tests.factories import FAMILY
from tests.jobs.conftest import Server, question


def run(server: Server, config: TrainConfig, questions: list[Question], out: Path, **settings: Any) -> list[Record]:
    write_questions(out / "held.parquet", iter(questions))
    evaluation = replace(config.evaluation, paths=[str(out / "held.parquet")], questions=0)
    return run_rows(server, HeldOut(replace(config, evaluation=evaluation)), config, out, **settings)[0]


def run_rows(
    server: Server, rows: HeldOut, config: TrainConfig, out: Path, **settings: Any
) -> tuple[list[Record], int]:
    async def run_all() -> tuple[list[Record], int]:
        client = EndpointClient(config, await endpoint_at(server.url, "", config), FAMILY)
        try:
            modes = [Mode.DIRECT, Mode.TWO_STAGE, Mode.ORACLE]
            return await run_grid(rows, client, config, modes, [16, 36], out, settings, lambda done, wanted: None)
        finally:
            await client.close()

    return asyncio.run(run_all())


def test_grid_counts_failures_as_wrong_and_continues_where_it_stopped(
    server: Server, config: TrainConfig, tmp_path: Path
) -> None:
    """Three questions, one of them without a box and one whose picture is cut off: 2 budgets x 3 modes x 3 records."""
    cut = question().image[:5000]  # type: ignore[index]
    questions = [question("a", "near"), question("b", "far", boxes=False), question("c", "far", cut)]
    records = run(server, config, questions, tmp_path, policy="tiny")
    assert len(records) == 18 and len(server.bodies) == 2 * (2 * 1 + 2 * 2 + 1 * 2), "what cannot be read is not asked"
    found = {(one["mode"], one["budget"], one["category"]): one for one in summarise(records)}
    two = found["two-stage", 36, "all"]
    assert (two["questions"], two["failures"], two["accuracy"], two["calls"]) == (3, 1, 2 / 3, 2)
    assert (two["coarse_tokens"], two["crop_tokens"], two["visual_tokens"]) == (36, 36, 72)
    assert two["coverage"] == 1.0 and two["bad_box_rate"] == 0 and two["area_ratio"] == pytest.approx(1 / 9)
    direct = found["direct", 16, "all"]
    assert direct["accuracy"] == 0 and direct["calls"] == 1 and "coverage" not in direct, "it only looked"
    assert found["two-stage", 36, "near"]["accuracy"] == 1 and found["two-stage", 36, "far"]["accuracy"] == 0.5
    oracle = found["oracle", 16, "all"]
    assert (oracle["questions"], oracle["failures"], oracle["accuracy"]) == (3, 2, 1 / 3)
    failures = [record.failure.partition(":")[0] for record in records if record.failure]
    assert sorted(failures) == ["DatasetError"] * 2 + ["UnreadableImage"] * 6

    lines = (tmp_path / "records.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "records.jsonl").write_text("".join(lines[:-2]) + lines[-2][:40])  # stopped in the middle of a line
    server.bodies.clear()
    again = run(server, config, questions, tmp_path, policy="tiny")
    assert [replace(one, seconds=0) for one in again] == [replace(one, seconds=0) for one in records]
    assert len(server.bodies) <= 4, "two records were missing"
    with pytest.raises(ConfigError, match="holds an evaluation with another policy; name another folder"):
        run(server, config, questions, tmp_path, policy="another")


def test_grid_asks_again_where_a_picture_is_another_one(server: Server, config: TrainConfig, tmp_path: Path) -> None:
    """Two rows that name their pictures by path; one is replaced. 3 modes x 2 budgets."""
    rows = []
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(question().image)  # type: ignore[arg-type]
        rows.append(replace(question(name), image=f"{name}.png".encode()))
    write_questions(tmp_path / "bytes.parquet", iter(rows))
    table = pq.read_table(tmp_path / "bytes.parquet")
    names = pa.array(["a.png", "b.png"])

    def ask() -> int:
        server.bodies.clear()
        pq.write_table(table.set_column(1, "image", names), tmp_path / "held.parquet")
        evaluation = replace(config.evaluation, paths=[str(tmp_path / "held.parquet")], questions=0)
        return run_rows(server, HeldOut(replace(config, evaluation=evaluation)), config, tmp_path)[1]

    assert ask() == 0 and len(server.bodies) == 2 * 2 * (1 + 2 + 2)
    assert ask() == 12 and not server.bodies, "all are those of the call before"
    Image.new("RGB", (672, 672)).save(tmp_path / "b.png")
    assert ask() == 6, "those of the other row"


def test_grid_drops_lines_that_are_no_record(server: Server, config: TrainConfig, tmp_path: Path) -> None:
    run(server, config, [question()], tmp_path)
    lines = (tmp_path / "records.jsonl").read_text().splitlines()
    (tmp_path / "records.jsonl").write_text(
        "\n".join(["7", "{}", *lines[:-1], lines[-1].replace('"mode"', '"mood"')]) + "\n"
    )
    server.bodies.clear()
    assert len(run(server, config, [question()], tmp_path)) == 6 and len(server.bodies) == 2, (
        "one record was made again"
    )


def test_grid_asks_again_after_a_transient_failure(server: Server, config: TrainConfig, tmp_path: Path) -> None:
    say, server.say = server.say, lambda messages: 503
    assert all("503" in record.failure for record in run(server, config, [question()], tmp_path))
    server.say = say
    assert not any(record.failure for record in run(server, config, [question()], tmp_path))


def record(correct: bool, seconds: float = 1.0, failure: str = "", **changes: Any) -> Record:
    made = Record(
        "q", "", Mode.TWO_STAGE, 36, correct, "ring", "answered", "ok", 0.25, True, (36, 20), 2, seconds, (), failure
    )
    return replace(made, **changes)


def test_figures_computed_by_hand() -> None:
    some = [record(n < 15, seconds=n / 10) for n in range(20)]
    found = figures([*some, record(False, failure="gone", seconds=0.0)])
    assert found["accuracy"] == 15 / 21 and found["failures"] == 1 and found["visual_tokens"] == 56
    assert found["seconds_median"] == pytest.approx(0.95) and found["seconds_p95"] == 1.8
    assert (found["accuracy_low"], found["accuracy_high"]) == pytest.approx((0.5004, 0.8619), abs=1e-3)
    bad = record(False, box_outcome="no_tag", area_ratio=None, covered=False, visual_tokens=(36, 0), calls=1)
    assert figures([record(True), bad])["bad_box_rate"] == 0.5 and figures([record(True), bad])["coverage"] == 0.5
    assert "calls" not in figures([record(False, failure="gone")])


def test_pareto_front_keeps_cheaper_or_better_points() -> None:
    assert pareto([(3, 0.5), (1, 0.2), (2, 0.6), (2, 0.4), (4, 0.6)]) == [(1, 0.2), (2, 0.6)]
    assert pareto([]) == []


def test_report_writes_json_table_and_plot(tmp_path: Path) -> None:
    told = {"policy": "tiny", "in_flight": 8}
    records = [record(True), record(False, question="a|b", failure="UnreadableImage: <no>\npicture", mode=Mode.ORACLE)]
    figures_file, table, plot = write_report(tmp_path, told, records)
    read = json.loads(figures_file.read_text())
    assert [one["mode"] for one in read["figures"]] == ["two-stage", "oracle"] and len(read["failures"]) == 1
    text = table.read_text()
    row = (
        "| two-stage | 36 | all | 1 | 100.0% (20.7% to 100.0%) | 36 + 20 = 56 | 1.00 s, 1.00 s | 2.00 | 25.0% | 0.0% |"
    )
    assert f"{row} 100.0% | 0 |" in text and "- a\\|b, oracle, 36: UnreadableImage: &lt;no> picture" in text
    assert text == as_markdown(told, read["figures"], read["failures"])
    with Image.open(plot) as drawn:
        assert drawn.width > 500


async def in_a_notebook(config: TrainConfig, **options: Any) -> Any:
    """A call from a cell: the event loop of the kernel is running."""
    return evaluate(config, **options)


def test_evaluate_from_python_with_and_without_a_running_event_loop(
    server: Server, config: TrainConfig, tmp_path: Path
) -> None:
    """Two questions at one budget: direct wrong (1 call each), two-stage right (2 calls each)."""
    write_questions(tmp_path / "held.parquet", [question("a"), question("b")])
    evaluation = replace(config.evaluation, paths=[str(tmp_path / "held.parquet")])
    config = replace(config, evaluation=evaluation, embedded=replace(config.embedded, panels=None))
    options: dict[str, Any] = {"budgets": [16], "url": server.url}
    result = evaluate(config, **options, out=tmp_path / "script")
    assert [(line["mode"], line["accuracy"], line["calls"]) for line in result.figures] == [
        ("direct", 0, 1), ("two-stage", 1, 2),
    ]  # fmt: skip
    assert len(server.bodies) == 2 * (1 + 2) and all(path.is_file() for path in result.files)
    again = asyncio.run(in_a_notebook(config, **options, out=tmp_path / "script"))
    assert again.records == result.records and len(server.bodies) == 6, "what is recorded is not asked again"
    one = asyncio.run(in_a_notebook(config, **options, modes=["direct"], questions=1, out=tmp_path / "one"))
    assert [record.question for record in one.records] == ["a"]
    with pytest.raises(DatasetError, match=r"evaluation\.paths is empty"):
        evaluate(replace(config, evaluation=replace(evaluation, paths=[])))


def test_evaluate_has_each_row_once_in_every_mode(server: Server, config: TrainConfig, tmp_path: Path) -> None:
    """A good row, a bad one, one without boxes, and a second file that counts from the same id."""
    bad = replace(question("b"), image=b"no picture")
    write_questions(tmp_path / "4k.parquet", iter([question("0"), bad, question("c", boxes=False)]))
    write_questions(tmp_path / "8k.parquet", iter([question("0")]))
    paths = [str(tmp_path / name) for name in ("4k.parquet", "8k.parquet")]
    evaluation = replace(config.evaluation, paths=paths, questions=0)
    config = replace(config, evaluation=evaluation, embedded=replace(config.embedded, panels=None))
    result = evaluate(config, budgets=[16], modes=["two-stage", "oracle"], url=server.url, out=tmp_path / "out")
    names = ["1/4k.parquet/0: 0", "b", "c", "2/8k.parquet/0: 0"]
    assert [record.question for record in result.records] == names * 2
    assert [line["questions"] for line in result.figures] == [4, 4]
    assert [(line["accuracy"], line["failures"]) for line in result.figures] == [(0.75, 1), (0.5, 2)]
    assert "column 'image'" in result.records[1].failure and "has no boxes" in result.records[6].failure
    assert len(server.bodies) == 2 * (3 + 2)


def test_evaluate_refuses_answers_to_other_questions_behind_the_same_name(
    server: Server, config: TrainConfig, tmp_path: Path
) -> None:
    held = tmp_path / "held.parquet"
    evaluation = replace(config.evaluation, paths=[str(held)], questions=0)
    config = replace(config, evaluation=evaluation, embedded=replace(config.embedded, panels=None))
    how: dict[str, Any] = {"budgets": [16], "modes": ["direct"], "url": server.url, "out": tmp_path / "out"}
    write_questions(held, iter([question("a")]))
    evaluate(config, **how)
    write_questions(held, iter([replace(question("a"), answer="dot")]))
    with pytest.raises(ConfigError, match="holds an evaluation with another content of the questions"):
        evaluate(config, **how)
