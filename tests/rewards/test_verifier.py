"""The verifier behind a URL, over real HTTP, and the worker that scores with it."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ergo_rl.episodes.families import Qwen25VL
from ergo_rl.episodes.types import Box, BoxOutcome, Outcome, Question, Score, Trajectory, Unscored, Verdict, View
from ergo_rl.rewards.config import Backend, EndpointConfig, RewardConfig, VerifierConfig
from ergo_rl.rewards.endpoint import NoVerdict, VerifierUnavailable
from ergo_rl.rewards.pool import RewardWorker
from ergo_rl.rewards.verifier import EndpointVerifier, resize_view, strip_for_verifier, verdict
from tests.rewards.builders import GOOD_BOX, QUESTION, SCENE, ended_early, played, view
from tests.rewards.conftest import Endpoint, fails, says


def configured(url: str, **changes: Any) -> RewardConfig:
    endpoint = EndpointConfig(
        **{"url": url, "model": "verifier", "retries": 2, "backoff_s": 0.01, "timeout_s": 5.0, **changes}
    )
    return RewardConfig(verifier=VerifierConfig(backend=Backend.ENDPOINT, endpoint=endpoint, max_tokens=32))


def ask(url: str, crop: View | None = None, **changes: Any) -> str:
    async def run() -> str:
        verifier = EndpointVerifier(configured(url, **changes).verifier)
        try:
            return await verifier.answer(strip_for_verifier(QUESTION), crop or view(GOOD_BOX))
        finally:
            await verifier.close()

    return asyncio.run(run())


def score(url: str, *trajectories: Trajectory, **changes: Any) -> tuple[Verdict, ...]:
    async def all_of_them() -> tuple[Verdict, ...]:
        worker = RewardWorker(configured(url, **changes))
        await worker.start()
        return await worker.score(QUESTION, trajectories)

    return asyncio.run(all_of_them())


def images_in(body: dict[str, Any]) -> list[np.ndarray]:
    images = []
    for message in body["messages"]:
        for part in message["content"] if isinstance(message["content"], list) else []:
            if part["type"] == "image_url":
                kind, _, data = part["image_url"]["url"].partition(",")
                assert kind == "data:image/png;base64"
                images.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))))
    return images


def test_answer_returns_the_reply_unchanged(endpoint: Endpoint) -> None:
    endpoint.answer = lambda body: says("hm <answer>B</answer>")
    assert ask(endpoint.url) == "hm <answer>B</answer>"
    assert ask(endpoint.url + "/") == "hm <answer>B</answer>"
    assert set(endpoint.paths) == {"/v1/chat/completions"}


def test_request_holds_the_crop_and_the_question_and_nothing_else(endpoint: Endpoint) -> None:
    crop = View(GOOD_BOX, np.random.default_rng(0).integers(0, 256, (84, 112, 3), np.uint8))
    ask(endpoint.url, crop)
    (body,) = endpoint.bodies
    (image,) = images_in(body)
    assert image.shape == (84, 112, 3) and (image == crop.pixels).all()  # pixel by pixel: nothing was lost on the way
    system, user = body["messages"]
    assert (system["role"], user["role"]) == ("system", "user")
    words = "".join(part["text"] for part in user["content"] if part["type"] == "text")
    assert words.startswith("Which mark is on the red panel?\nA. cross\nB. ring\nC. bar\nD. dot\n")
    assert "{" not in words and "<|" not in words
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("verifier", 0.0, 32)


def test_strip_for_verifier_removes_answer_original_and_boxes() -> None:
    knowing = Question("q", b"the original", "Which?", "the truth", ("a", "b"), (Box(0, 0, 1, 1),), "source")
    assert strip_for_verifier(knowing) == Question("q", b"", "Which?", "", ("a", "b"), (), "source")


def test_request_lacks_the_ground_truth(endpoint: Endpoint) -> None:
    async def run() -> None:
        worker = RewardWorker(configured(endpoint.url))
        await worker.start()
        await worker.score(Question("q", b"the original", "How many?", "forty-two"), (played(),))

    asyncio.run(run())
    assert "How many?" in json.dumps(endpoint.bodies[-1])
    assert "forty-two" not in json.dumps(endpoint.bodies[-1])


@pytest.mark.parametrize("status", [500, 502, 503, 408, 409, 425, 429])
def test_transient_status_is_retried(endpoint: Endpoint, status: int) -> None:
    endpoint.script = [fails(status), fails(status)]
    assert ask(endpoint.url) == "<answer>B</answer>"
    assert len(endpoint.bodies) == 3


def test_back_off_doubles_and_heeds_retry_after_up_to_the_limit(endpoint: Endpoint) -> None:
    endpoint.script = [fails(500), fails(500)]
    started = time.monotonic()
    ask(endpoint.url, backoff_s=0.1)
    assert 0.3 <= time.monotonic() - started < 20  # 0.1 + 0.2
    endpoint.script = [fails(429, Retry_After="60")]
    started = time.monotonic()
    ask(endpoint.url, max_backoff_s=0.4)
    assert 0.4 <= time.monotonic() - started < 20  # as long as the config allows
    endpoint.script = [fails(503, Retry_After="3600")]
    started = time.monotonic()
    ask(endpoint.url, max_backoff_s=0.2)
    assert 0.2 <= time.monotonic() - started < 20  # retried all the same


def test_transient_status_raises_when_attempts_are_used_up(endpoint: Endpoint) -> None:
    endpoint.answer = lambda body: fails(500)
    with pytest.raises(VerifierUnavailable, match="status 500, 3 attempts"):
        ask(endpoint.url)
    assert len(endpoint.bodies) == 3


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_other_status_is_raised_at_once_with_its_body(endpoint: Endpoint, status: int) -> None:
    endpoint.answer = lambda body: fails(status)
    with pytest.raises(VerifierUnavailable, match=f"status {status}: .*error"):
        ask(endpoint.url)
    assert len(endpoint.bodies) == 1


@pytest.mark.parametrize(
    "reply", [(200, b"no json", {}), (200, b"{}", {}), (200, b"[]", {}), (200, b'{"choices": []}', {}), says(None)]
)
def test_reply_that_is_no_completion_is_quoted(endpoint: Endpoint, reply: Any) -> None:
    endpoint.answer = lambda body: reply
    with pytest.raises(VerifierUnavailable, match=r"not a chat completion|without text"):
        ask(endpoint.url)


def test_slow_endpoint_times_out(endpoint: Endpoint) -> None:
    def slow(body: dict[str, Any]) -> Any:
        time.sleep(0.5)
        return says("B")

    endpoint.answer = slow
    with pytest.raises(VerifierUnavailable, match="ReadTimeout, 1 attempts"):
        ask(endpoint.url, timeout_s=0.1, retries=0)


def dead_url() -> str:
    """Nobody listens on a port that was just given back."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/v1"


def test_dead_port_is_retried_then_unavailable() -> None:
    with pytest.raises(VerifierUnavailable, match=r"ConnectError.* 3 attempts"):
        ask(dead_url())


def test_requests_in_flight_stay_within_concurrency(endpoint: Endpoint) -> None:
    def answer(body: dict[str, Any]) -> Any:
        time.sleep(0.05)
        return says("B")

    endpoint.answer = answer

    async def many() -> None:
        verifier = EndpointVerifier(configured(endpoint.url, concurrency=3).verifier)
        await asyncio.gather(*(verifier.answer(QUESTION, view(GOOD_BOX)) for _ in range(12)))

    asyncio.run(many())
    assert len(endpoint.bodies) == 12 and endpoint.most_in_flight == 3


def test_key_comes_from_the_named_variable_only(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "not this one")
    ask(endpoint.url)
    assert "Authorization" not in endpoint.headers[-1]
    monkeypatch.setenv("VERIFIER_KEY", "s3cret")
    ask(endpoint.url, api_key_env="VERIFIER_KEY")
    assert endpoint.headers[-1]["Authorization"] == "Bearer s3cret"
    monkeypatch.delenv("VERIFIER_KEY")
    with pytest.raises(ValueError, match="api_key_env names VERIFIER_KEY, which is not set"):
        ask(endpoint.url, api_key_env="VERIFIER_KEY")


def test_request_says_nothing_of_an_openai_account(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_ADMIN_KEY"):
        monkeypatch.setenv(variable, "another account's")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    ask(endpoint.url)
    assert "another account's" not in endpoint.headers[-1].values()


def test_redirect_is_not_followed(endpoint: Endpoint) -> None:
    endpoint.answer = lambda body: (307, b"", {"Location": f"{endpoint.url}/elsewhere"})
    with pytest.raises(VerifierUnavailable, match="status 307"):
        ask(endpoint.url)
    assert endpoint.paths == ["/v1/chat/completions"]


def test_message_hides_the_key_when_the_endpoint_repeats_it(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VERIFIER_KEY", "s3cret")
    endpoint.answer = lambda body: (401, b'{"error": "the key s3cret is not known"}', {})
    with pytest.raises(VerifierUnavailable, match=r"status 401: .*the key \*\*\* is not known") as caught:
        ask(endpoint.url, api_key_env="VERIFIER_KEY")
    assert "s3cret" not in str(caught.value)


def test_endpoint_without_url_or_model_is_refused() -> None:
    with pytest.raises(ValueError, match="needs url and model"):
        EndpointVerifier(configured("").verifier)


# --- the worker --------------------------------------------------------------------------------------------------


def test_worker_scores_a_group_with_every_term(endpoint: Endpoint) -> None:
    verdicts = score(
        endpoint.url,
        played(),
        played(box=SCENE, sample=1),
        ended_early("left", Outcome.BAD_BOX),
        played(box=SCENE, box_outcome=BoxOutcome.NO_TAG, look="left"),
    )
    assert [verdict.total for verdict in verdicts if isinstance(verdict, Score)] == [3.5, 3.0, 0.0, 1.0]
    assert len(endpoint.bodies) == 3  # the probe, and one for each of two regions


def test_worker_asks_once_for_equal_crops(endpoint: Endpoint) -> None:
    boxes = [Box(0, 0, 10, 10), Box(0, 0, 20, 20)]
    answers = {int(view(box).pixels[0, 0, 0]): letter for box, letter in zip(boxes, "BC", strict=True)}
    endpoint.answer = lambda body: says(answers.get(int(images_in(body)[0][0, 0, 0]), "?"))
    verdicts = score(endpoint.url, *(played(box=boxes[sample % 2], sample=sample) for sample in range(8)))
    assert [verdict.parts["region"] for verdict in verdicts if isinstance(verdict, Score)] == [1, 0] * 4
    assert len(endpoint.bodies) == 1 + 2


def test_worker_returns_unscored_when_the_endpoint_fails_later(endpoint: Endpoint) -> None:
    endpoint.script = [says("grey"), *[fails(500)] * 3]
    lost = ended_early("left", Outcome.BAD_BOX)
    first, second, third = score(endpoint.url, played(), lost, played(sample=2))
    reason = f"region: {endpoint.url}/chat/completions: status 500, 3 attempts"
    assert first == third == Unscored(reason)
    assert isinstance(second, Score) and second.total == 0  # needed no verifier


def test_worker_start_raises_when_the_verifier_cannot_answer(endpoint: Endpoint) -> None:
    endpoint.answer = lambda body: fails(404)
    with pytest.raises(VerifierUnavailable, match="status 404"):
        score(endpoint.url, played())
    with pytest.raises(VerifierUnavailable, match="ConnectError"):
        score(dead_url(), played())


def test_worker_raises_other_errors(endpoint: Endpoint) -> None:
    with pytest.raises(ValueError, match="'nonsense' is not a valid BoxOutcome"):
        score(endpoint.url, played(box_outcome="nonsense"))  # type: ignore[arg-type]


# --- no verdict --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "finished", "answer"),
    [
        ("B", True, "B"),
        ("<think>A? No, B.</think>\n\nB", True, "B"),
        ("It could be A, but it is B.</think>\n\nB", True, "B"),
        ("<think>one</think> A <think>two</think> B", True, "B"),
        ("hm <answer>B</answer> ", True, "hm <answer>B</answer> "),
        ("<thinking>A?</thinking>B", True, "B"),
        ("\u25c1think\u25b7A?\u25c1/think\u25b7B", True, "B"),
        ("I cannot tell the colour from this crop.", True, "I cannot tell the colour from this crop."),
        ("He can't help laughing.", True, "He can't help laughing."),
    ],
)
def test_verdict_is_what_stands_behind_the_thoughts(text: str, finished: bool, answer: str) -> None:
    assert verdict(text, finished, 32) == answer


@pytest.mark.parametrize(
    ("text", "finished", "kind"),
    [
        ("Let me look at the picture. In the upper left", False, "cut"),
        ("<answer>B</answer> and", False, "cut"),
        ("", False, "cut"),
        ("", True, "empty"),
        (" \n", True, "empty"),
        ("<think>It is B.", True, "thoughts"),
        ("<think>It is B.</think>\n", True, "thoughts"),
        ("<think>It is B.</think> A <think>or", True, "thoughts"),
        ("<Thinking>It is B.", True, "thoughts"),
        ("<reasoning>It is B.</reasoning>", True, "thoughts"),
        ("I'm sorry, but I can't assist with that.", True, "filtered"),
        ("I am unable to help you with this request.", True, "filtered"),
        ("<think>hm</think> I cannot comply.", True, "filtered"),
        ("抱歉,我无法协助。", True, "filtered"),
    ],
)
def test_reply_without_an_answer_is_no_verdict(text: str, finished: bool, kind: str) -> None:
    with pytest.raises(NoVerdict) as caught:
        verdict(text, finished, 32)
    assert caught.value.kind == kind


def finishes(text: Any, reason: str | None, **message: Any) -> Any:
    said = {"role": "assistant", "content": text, **message}
    return 200, json.dumps({"choices": [{"message": said, "finish_reason": reason}]}).encode(), {}


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (finishes("<answer>B</answer> because", "length"), "cut"),
        (finishes(None, "length"), "cut"),
        (finishes("", "stop"), "empty"),
        (finishes("", "content_filter"), "filtered"),
        (finishes(None, "stop", refusal="I cannot look at people"), "filtered"),
        (finishes(None, "stop", reasoning_content="It is B."), "empty"),
        (finishes("<think>It is B.", "stop"), "thoughts"),
        (finishes("The mark is a", "abort"), "cut"),
        (finishes("The mark is a", "MAX_TOKENS"), "cut"),
        (finishes("I'm sorry, I can't help with that.", "stop"), "filtered"),
        (finishes("", "SAFETY"), "filtered"),
        (finishes(None, "tool_calls", tool_calls=[{"function": {"name": "zoom", "arguments": "{}"}}]), "empty"),
        (finishes([{"type": "refusal", "refusal": "I cannot look at people"}], "stop"), "filtered"),
        (finishes([{"type": "thinking", "thinking": "It is B."}], "stop"), "empty"),
        (finishes([], "stop"), "empty"),
        (fails(400), "refused"),
        (fails(500), "unavailable"),
    ],
)
def test_trajectory_without_a_verdict_is_unscored_and_never_zero(endpoint: Endpoint, reply: Any, kind: str) -> None:
    endpoint.script = [says("grey")]
    endpoint.answer = lambda body: reply
    (found,) = score(endpoint.url, played(), retries=0)
    assert isinstance(found, Unscored) and found.kind == kind and found.may_pass == (kind == "unavailable")


@pytest.mark.parametrize("reason", ["stop", None, "eos", "end_turn"])
@pytest.mark.parametrize("content", ["B", [{"type": "thinking", "thinking": "A?"}, {"type": "text", "text": "B"}]])
def test_reply_that_came_to_its_end_is_scored(endpoint: Endpoint, content: Any, reason: str | None) -> None:
    endpoint.script = [says("grey"), finishes(content, reason)]
    (found,) = score(endpoint.url, played(), retries=0)
    assert isinstance(found, Score) and found.parts["region"] == 1


def test_worker_starts_with_a_verifier_whose_first_reply_is_cut(endpoint: Endpoint) -> None:
    endpoint.script = [finishes("The picture shows", "length")]
    (found,) = score(endpoint.url, played())
    assert isinstance(found, Score)


# --- crops of the verifier's own budget --------------------------------------------------------------------------


def test_verifier_sees_the_original_pixels_at_its_own_budget(endpoint: Endpoint) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    asked = replace(QUESTION, image=file.getvalue())
    config = configured(endpoint.url)
    box = Box(100, 100, 324, 324)  # 8 x 8 visual tokens of Qwen2.5-VL; the policy's copy has 2 x 2

    async def run(fine_tokens: int, question: Question) -> Verdict:
        worker = RewardWorker(replace(config, verifier=replace(config.verifier, fine_tokens=fine_tokens)))
        await worker.start()
        return (await worker.score(question, (played(box=box),)))[0]

    assert isinstance(asyncio.run(run(0, asked)), Score) and images_in(endpoint.bodies[-1])[0].shape == (56, 56, 3)
    assert isinstance(asyncio.run(run(64, asked)), Score)
    assert (images_in(endpoint.bodies[-1])[0] == pixels[100:324, 100:324]).all()
    unreadable = asyncio.run(run(64, replace(asked, image=b"no image")))
    assert isinstance(unreadable, Unscored) and "cannot be cut from the original" in unreadable.reason


# --- crops for another family ------------------------------------------------------------------------------------


def test_resize_view_returns_a_fitting_view_itself() -> None:
    crop = view(GOOD_BOX, 168)
    assert resize_view(crop, Qwen25VL(), 16384) is crop


def test_resize_view_fits_the_budget_and_the_other_familys_patches() -> None:
    crop = view(GOOD_BOX, 168)
    smaller = resize_view(crop, Qwen25VL(), 16)
    assert (smaller.width, smaller.height, smaller.box) == (112, 112, GOOD_BOX)

    class Patch16(Qwen25VL):
        patch_size = 16

    other = resize_view(crop, Patch16(), 16384)
    assert (other.width, other.height) == (160, 160)  # 168 / 32 = 5.25
    assert resize_view(other, Patch16(), 16384) is other
