"""The page of a run: what is read from the folder, and what a browser makes of it."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from hypothesis import given, settings
from hypothesis import strategies as st
from playwright.sync_api import Browser, Page, sync_playwright

from ergo_rl.actors.rollout_worker import GroupResult, summarize
from ergo_rl.actors.trajectory_store import Group
from ergo_rl.episodes.probe import Replacement
from ergo_rl.episodes.types import Box, Question, Score, Trajectory, Unscored, Verdict
from ergo_rl.jobs import report
from ergo_rl.jobs.commands.report import main
from ergo_rl.jobs.report import NotARunFolder, read_group, read_run
from ergo_rl.jobs.rollout_recorder import record_group
from ergo_rl.jobs.run_paths import SAMPLES, step_folder
from scripts.fetch_chromium import chromium
from tests.factories import trajectory, view

HOSTILE = "</script><script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\"> Which?"


def attempts(question: str, count: int = 3) -> tuple[Trajectory, ...]:
    """Of an image of 840 x 560 pixels, seen as 3 x 2 visual tokens; the last one without a box."""
    coarse = view(3, 2, box=Box(0, 0, 840, 560))
    crops = [view(2, 2, seed, Box(100 * seed, 100, 100 * seed + 200, 300)) for seed in range(count - 1)]
    found = [trajectory(question, sample, coarse=coarse, crop=crop) for sample, crop in enumerate(crops)]
    return (*found, trajectory(question, count - 1, coarse=coarse, replies=(4,)))


def write_run(folder: Path) -> Path:
    """Thirty steps, three evaluations, groups of steps 0, 5, ..., 70: more than a page of the gallery."""
    folder.mkdir()
    (folder / "config.yaml").write_text("name: 'story <b>'\ntotal_steps: 40\n")
    steps = [
        {
            "step": n, "reward/total": 2 + n / 30, "reward/region": n / 30, "reward/format": 1.0,
            "rollout/coverage": n / 60, "rollout/area_ratio": 0.1, "learner/mismatch_mean": 1e-7 * (n + 1),
            "time/step_s": 2.0, "time/learn_s": math.nan if n == 3 else 1.0, "rollout/trajectories": 64.0,
        }
        for n in range(30)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in steps) + '{"step": 30, "rew')
    held = [{"step": n, "eval/coverage": 0.25 + n / 100, "eval/accuracy": 0.5} for n in (0, 15, 30)]
    for one in (held[0], held[2]):
        figures = {"accuracy": 0.25, "gain": one["step"] / 40, "harm": 0.0, "reliance": 0.5, "replaced": 6.0,
                   "failed": 1.0, "left_out": 1.0}  # fmt: skip
        one |= {f"eval/probe_{how}_{name}": value for how in Replacement for name, value in figures.items()}
        one |= {"eval/questions": 8.0, "eval/failed": 1.0, "eval/visual_tokens": 43.5, "eval/probe_none_gain_low": 0.4}
        one |= {"eval/probe_none_gain_high": 0.93}
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(one) + "\n" for one in held))
    for step in range(0, 75, 5):
        played = attempts(f"q{step}")
        text = HOSTILE if step == 5 else f"Which mark of step {step}?"
        question = Question(f"q{step}", b"", text, "ring", ("ring", "bar"), (Box(110, 110, 190, 190),))
        scores: list[Verdict] = [Score(3.5, {"region": 1.0, "accuracy": 1.0}), Score(1.0 + step / 100, {"region": 0.0})]
        scores.append(Unscored("the reward model timed out") if step == 10 else Score(0.0, {"region": 0.0}))
        earned = [(1.0 + step / 1000,), (0.5, -0.5), (math.nan,) if step == 10 else (-1.0 - step / 1000,)]
        result = GroupResult("q", tuple(map(summarize, played)))
        group = Group(step, question, result, tuple(scores), ray.ObjectRef.nil())
        record_group(folder / SAMPLES / step_folder(step), step, group, played, earned)
    return folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "story")


# --- what is read -----------------------------------------------------------------------------------------------------


def test_read_run_reads_figures_plots_and_groups(run_folder: Path) -> None:
    run = read_run(run_folder, most_groups=4)
    assert (run.name, run.steps, run.total_steps, run.groups_there) == ("story <b>", 30, 40, 15), (
        "the 31st line is not there yet"
    )
    assert dict(run.figures)["held-out coverage"] == "25.0% → 55.0%" and dict(run.figures)["all steps"] == "1.0 min"
    assert [group.step for group in run.groups] == [0, 25, 45, 70], "evenly, the first and the last among them"
    plots = {plot.title: plot for plot in run.plots}
    assert [curve.name for curve in plots["Reward parts"].curves] == ["region", "format"], (
        "what is not there is left out"
    )
    assert plots["Throughput"].curves[0].points[0] == (0, 32.0)
    learn = next(curve for curve in plots["Times"].curves if curve.name == "learn")
    assert len(learn.points) == 29, "not a number is no point"
    assert plots["Coverage"].curves[1].points == [(0, 0.25), (15, 0.4), (30, 0.55)] and plots["Coverage"].curves[1].dots
    probed = plots["Is the crop used?"].curves
    assert probed[0].name == "gain" and probed[0].points == [(0, 0), (30, 0.75)] and probed[0].dots


def test_read_run_has_the_last_probe_as_a_table(run_folder: Path, tmp_path: Path) -> None:
    table = read_run(run_folder, most_groups=1).probe
    assert table is not None and table.title == "8 held-out questions after 30 steps; with 95 % intervals"
    rows = {row[0]: list(row[1:]) for row in table.rows}
    assert len(table.columns) == 6 and all(len(row) == 6 for row in table.rows)
    assert rows["gain"] == ["", "75.0%", "75.0%", "75.0%", "75.0% [40.0% - 93.0%]"]
    assert rows["accuracy"] == ["50.0%", *(["25.0%"] * 4)] and rows["left out"] == ["", "1", "1", "1", "1"]
    assert rows["visual tokens a question"][0] == "43.5" and rows["looks a question"][0] == "-", "an older line"
    (tmp_path / "metrics.jsonl").write_text("")
    assert read_run(tmp_path, 1).probe is None and 'id="probe"' not in report.page(read_run(tmp_path, 1))


def test_read_group_reads_trajectories(run_folder: Path) -> None:
    group = read_group(run_folder / SAMPLES / step_folder(10))
    assert group is not None and group.size == [840, 560] and group.targets == [[110, 110, 190, 190]]
    first, second, third = group.attempts
    assert first.crop == [0, 100, 200, 300] and first.picture.startswith("data:image/png;base64,")
    assert first.area_ratio == pytest.approx(200 * 200 / (840 * 560))
    assert first.parts == {
        "region": 1.0,
        "accuracy": 1.0,
    }
    assert second.advantages == [0.5, -0.5]
    assert (third.total, third.advantages, third.crop, third.picture) == (None, [None], None, "")
    assert third.unscored == "the reward model timed out"


def test_read_group_skips_unfinished_groups_and_reads_old_ones(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run") / SAMPLES / step_folder(0)
    (folder / "group.json").unlink()
    assert read_group(folder) is None
    (folder / "view.png").unlink()
    older = read_group(folder)
    assert older is not None and older.size is None and older.view.startswith("data:image/png"), (
        "coarse.png, with boxes"
    )


DAMAGED = {
    "group.json": [b"", b"{", b"[]", b"null", b"[" * 100_000, b"\xff", b'{"question": {}}', b'{"question": 3}'],
    "trajectories.jsonl": [b"{}\n", b"[1]\n", b"\xff\n", b"{\n", b'{"crop": 3}\n', b"[" * 100_000 + b"\n"],
    "view.png": [b"", b"no image" * 9_000],
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_group_costs_itself_alone(tmp_path: Path, name: str) -> None:
    folder = write_run(tmp_path / "run")
    for content in DAMAGED[name]:
        (folder / SAMPLES / step_folder(5) / name).write_bytes(content)
        found = [group for group in read_run(folder, 3_000).groups if len(group.attempts) == 3]
        assert {group.step for group in found} >= {0, *range(10, 75, 5)}, content
        report.build(folder, tmp_path / "page.html", 20)


def test_rewards_that_are_no_numbers_are_shown_as_none(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    path = folder / SAMPLES / step_folder(5) / "trajectories.jsonl"
    path.write_text(
        path.read_text().replace('"region": 1.0', '"region": NaN').replace('"total": 3.5', '"total": 1e999')
    )
    report.build(folder, tmp_path / "page.html", 20)
    group = read_group(path.parent)
    assert group is not None and (group.attempts[0].total, group.attempts[0].parts) == (None, {"accuracy": 1.0})


@pytest.mark.parametrize(
    "content", [b"", b"{[", b"\xff\xfe", b"- 1", b"total_steps: many", b"[" * 5_000, b"x: !!python/name:a"]
)
def test_damaged_config_leaves_the_page_without_settings(tmp_path: Path, content: bytes) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "config.yaml").write_bytes(content)
    assert report.build(folder, tmp_path / "page.html", 1).total_steps == 30


def test_damaged_records_are_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(
            b"\n".join([b"", b"{", b"[3]", b"\xff", b'{"reward/total": 1}', b'{"step": "x"}', b"[" * 100_000, b""])
        )
        file.write(
            b'{"step": 31, "reward/total": Infinity, "time/step_s": "long", "learner/tokens": %s}\n' % (b"9" * 400)
        )
    (folder / "ended.json").write_bytes(b"")
    run = report.build(folder, tmp_path / "page.html", 1)
    assert run.steps == 31 and run.state == "ended; ended.json cannot be read"
    assert "metrics.jsonl, line 32 is damaged and left out" in caplog.text


def test_read_run_averages_long_curves_in_bins(tmp_path: Path) -> None:
    lines = [json.dumps({"step": n, "reward/total": float(n % 2)}) for n in range(1200)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (plot,) = [plot for plot in read_run(tmp_path, 1).plots if plot.title == "Reward"]
    assert len(plot.curves[0].points) == 600 and plot.curves[0].points[:2] == [(0.5, 0.5), (2.5, 0.5)]


def test_report_refuses_a_folder_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(NotARunFolder, match=r"is not a run's folder: it has no metrics\.jsonl"):
        read_run(tmp_path, 1)
    assert main([str(tmp_path)]) == 1 and "is not a run's folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir()), "and nothing is left behind"


@settings(max_examples=50)
@given(st.recursive(st.text() | st.floats(allow_nan=False, allow_infinity=False) | st.none(), st.lists))
def test_as_json_any_text_stays_in_the_script_element(value: Any) -> None:
    written = report.as_json({"value": value})
    assert not set(written) & set("<>&\u2028\u2029") and json.loads(written) == {"value": value}


def test_build_replaces_the_page_atomically(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "page.html"
    report.build(run_folder, out, 2)
    first = out.read_text()
    assert first.count("<script") == 2 and "http://" not in first.replace("http://www.w3.org/2000/svg", "")
    seen = []
    monkeypatch.setattr(report.os, "replace", lambda source, target: seen.append((Path(source).read_text(), target)))
    report.build(run_folder, out, 3)
    assert out.read_text() == first, "until the move nothing has changed"
    assert seen[0][0].endswith("</html>\n") and seen[0][1] == out


def test_follow_rebuilds_until_the_run_ends(tmp_path: Path) -> None:
    folder, out = write_run(tmp_path / "run"), tmp_path / "page.html"
    follower = threading.Thread(target=report.follow, args=(folder, out, 1, 0.05), daemon=True)
    follower.start()
    while not out.exists():
        assert follower.is_alive()
    assert '"renew_s":0.05' in out.read_text() and "running, or cut off" in out.read_text()
    (folder / "ended.json").write_text('{"done": true, "why": "all steps are done"}')
    follower.join(20)
    assert not follower.is_alive() and '"renew_s":0.0' in out.read_text() and "40 steps · done" in out.read_text()


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    executable, environment = chromium()
    with sync_playwright() as playwright:
        # Chromium's sandbox needs a user namespace and refuses root; the page is our own.
        yield playwright.chromium.launch(executable_path=executable, env=environment, args=["--no-sandbox"])


@pytest.fixture(scope="module")
def html(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page") / "report.html"
    assert main([str(run_folder), "--out", str(out)]) == 0
    return out


@pytest.fixture
def page(browser: Browser, html: Path) -> Iterator[Page]:
    """The page, opened from its file; what it complains of fails the test."""
    page, complaints = browser.new_page(viewport={"width": 1280, "height": 900}), list[str]()
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("requestfailed", lambda request: complaints.append(request.url))
    page.goto(html.as_uri())
    yield page
    page.close()
    assert complaints == []


def test_page_draws_every_plot_and_loads_every_image(page: Page, tmp_path: Path) -> None:
    titles = ["Reward", "Reward parts", "Coverage", "Is the crop used?", "Area", "Mismatch", "Times", "Throughput"]
    assert page.locator(".plot").count() == len(titles)
    for title, plot in zip(titles, page.locator(".plot").all(), strict=True):
        assert plot.locator("figcaption").inner_text().startswith(title)
        assert all(len(str(path.get_attribute("d"))) > 15 for path in plot.locator("path").all())
        assert plot.locator("path").count() > 0 and "NaN" not in plot.inner_html()
    assert page.locator("#probe tr").count() == 11 and "75.0% [40.0% - 93.0%]" in page.locator("#probe").inner_text()
    while page.locator("#more").is_visible():
        page.locator("#more").click()
    assert page.locator("#groups .group").count() == 15 and page.locator("#groups .attempt img").count() == 30
    loaded = page.evaluate("Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth)))")
    assert len(loaded) >= 45 and min(loaded) > 0
    boxes = page.locator("#step-0 .box")
    assert boxes.count() == 2 and boxes.first.locator(".gain").get_attribute("width") == "200"
    page.screenshot(path=tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 20_000, "not an empty page"


def test_page_shows_a_hostile_question_as_text(page: Page) -> None:
    assert page.title() == "story <b> · ergo-rl" and page.locator("h1").inner_text() == "story <b>"
    assert HOSTILE in str(page.locator("#step-5 h3").text_content())
    assert page.locator("#step-5 img[src='x']").count() == 0


@pytest.mark.parametrize(
    ("field", "value", "groups", "attempts"),
    [("from", "50", 5, 15), ("to", "9", 2, 6), ("outcome", "bad_box", 15, 15), ("low", "1.5", 15, 20),
     ("high", "0", 14, 14), ("words", "step 70", 1, 3), ("words", "no such words", 0, 0)],
)  # fmt: skip
def test_page_filters_groups_and_trajectories(page: Page, field: str, value: str, groups: int, attempts: int) -> None:
    """45 attempts: totals 3.5, 1 + step / 100 and 0 of each step; one is unscored."""
    assert page.locator("#count").inner_text() == "15 groups with 45 fitting attempts"
    control = page.locator(f"[name={field}]")
    if field == "outcome":
        control.select_option(value)
    else:
        control.fill(value)
    assert page.locator("#count").inner_text().startswith(f"{groups} groups with {attempts} fitting attempts")
    assert page.locator("#groups .group").count() == min(groups, 12)
    page.reload()  # the address keeps the filters
    assert page.locator("#count").inner_text().startswith(f"{groups} groups with {attempts} fitting attempts")
    page.get_by_role("button", name="all", exact=True).click()
    assert page.locator("#count").inner_text().startswith("15 groups with 45")


def test_page_links_winners_and_losers_to_their_groups(page: Page) -> None:
    assert "advantage +1.07" in page.locator("#winners .attempt").first.inner_text()
    assert "advantage \N{MINUS SIGN}1.07" in page.locator("#losers .attempt").first.inner_text()
    page.locator("[name=to]").fill("5")
    page.locator("#losers .attempt").first.press("Enter")
    assert page.evaluate("document.activeElement.id") == "step-70", "filters that hide it are taken back"


def test_page_works_by_keyboard(page: Page) -> None:
    for expected in ("step-0", "step-5", "step-10"):
        page.keyboard.press("j")
        assert page.evaluate("document.activeElement.id") == expected
    page.keyboard.press("k")
    assert page.evaluate("document.activeElement.id") == "step-5"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className").startswith("attempt")
    assert page.locator("#step-5 .box.lit").get_attribute("data-sample") == "0", "its box is marked"
    plot = page.locator(".plot").first
    plot.locator("svg").focus()
    for key in ("Home", "ArrowRight"):
        page.keyboard.press(key)
    assert plot.locator("figcaption").inner_text().startswith("Reward, step 1")
    assert plot.locator("output").inner_text() == "2.03"
    hide = plot.get_by_role("button")
    hide.press("Enter")
    assert hide.get_attribute("aria-pressed") == "false" and plot.locator("path").count() == 0


def test_page_on_a_phone_and_in_dark_mode(browser: Browser, html: Path) -> None:
    backs = {}
    for scheme in ("light", "dark"):
        page = browser.new_page(viewport={"width": 360, "height": 740}, color_scheme=scheme)  # type: ignore[arg-type]
        page.goto(html.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") == 360, "nothing sticks out"
        backs[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.close()
    assert backs == {"light": "rgb(251, 251, 250)", "dark": "rgb(20, 24, 27)"}
