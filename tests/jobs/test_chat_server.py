"""What a chat request may say, what becomes of it, and how it is refused: through the real HTTP objects, with an
endpoint in the place of the engine."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.responses import JSONResponse

from ergo_rl.jobs import chat_server
from ergo_rl.jobs.chat_protocol import ChatError, ChatQuestion, read_chat, read_data_url
from ergo_rl.jobs.config import ConfigError, TrainConfig, load_config
from ergo_rl.jobs.policy_clients import EndpointClient, endpoint_at
from tests.conftest import ROOT
from tests.factories import FAMILY
from tests.jobs.conftest import LOOK, READ, Server, question

WORDS = {"type": "text", "text": "Which mark?"}


def data_url(encoded: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(encoded).decode()


def image(url: str = "data:image/png;base64,YWJj") -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def chat(*parts: Any, **more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": list(parts or (WORDS, image()))}], **more}


def read(request: Any) -> ChatQuestion:
    return read_chat(json.dumps(request).encode(), "tiny")


# --- what parses ------------------------------------------------------------------------------------------------------


def test_read_chat_takes_one_question_about_one_image() -> None:
    assert read(chat()) == ChatQuestion("Which mark?", "data:image/png;base64,YWJj")
    assert read(chat(image("u"), WORDS, {"type": "text", "text": "The red one?"})) == ChatQuestion(
        "Which mark?\nThe red one?", "u"
    )
    assert read(chat(ergo={"options": ["ring", "dot"]})).options == ("ring", "dot")


def test_read_chat_takes_values_that_ask_for_nothing() -> None:
    """What lmms-eval, VLMEvalKit, ``vllm bench serve`` and the openai client send without being asked."""
    neutral = {
        "temperature": 0.0, "n": 1, "stream": False, "seed": 3, "top_p": 0.5, "top_k": -1, "stop": None, "tools": [],
        "tool_choice": "none", "response_format": {"type": "text"}, "logit_bias": {}, "service_tier": "auto",
        "repetition_penalty": 1.0, "chat_template_kwargs": {}, "ignore_eos": False, "top_logprobs": 0,
    }  # fmt: skip
    empty = {"role": "system", "content": ""}
    request = chat(**neutral)
    assert read(request) == read(request | {"messages": [empty, *request["messages"]]}) == read(chat())


def test_read_chat_limits_stops_and_streams_are_those_of_the_shown_text() -> None:
    asked = read(chat(max_tokens=16, max_completion_tokens=9, stop="\n\n", stream=True))
    assert (asked.max_tokens, asked.stop, asked.stream, asked.usage_in_stream) == (9, ("\n\n",), True, False)
    asked = read(chat(stop=["<|im_end|>", ""], stream=True, stream_options={"include_usage": True}))
    assert (asked.max_tokens, asked.stop, asked.usage_in_stream) == (None, ("<|im_end|>",), True)


@pytest.mark.parametrize(
    ("request_", "sentence", "param"),
    [
        ([], "must be a JSON object", None),
        ({"model": "tiny"}, "messages must hold one message", "messages"),
        ({"messages": 2 * chat()["messages"]}, "without a history", "messages"),
        ({"messages": [{"role": "system", "content": [WORDS, image()]}]}, "system prompt is the recipe's", "messages"),
        ({"messages": [{"role": "user", "content": "Which mark?"}]}, "must be a list of parts", "messages"),
        (chat(WORDS), "it has 0 images", "messages"),
        (chat(WORDS, image(), image()), "it has 2 images", "messages"),
        (chat({"type": "text", "text": " \n"}, image()), "it has 1 images and no text", "messages"),
        (chat(WORDS, {"type": "image_url", "image_url": "u"}), "a part is", "messages"),
        (chat(WORDS, {"type": "input_audio"}), "a part is", "messages"),
        (chat(stream=1), "stream is not as in OpenAI's interface", "stream"),
        (chat(stop=[1]), "stop is not as in OpenAI's interface", "stop"),
        (chat(stop="\ud83d"), "surrogates not allowed", "stop"),
        (chat(ignore_eos=True), "ignore_eos can only be false: a reply ends where", "ignore_eos"),
        (chat(response_format={"type": "json_object"}), "the reply is text", "response_format"),
        (
            {"messages": [{"role": "system", "content": "Be brief."}, *chat()["messages"]]},
            "without a history",
            "messages",
        ),
        (chat(temperature=0.7), "temperature can only be 0: decoding is greedy", "temperature"),
        (chat(n=2), "n can only be 1", "n"),
        (chat(max_tokens=0), "max_tokens must be a whole number of at least 1", "max_tokens"),
        (chat(max_completion_tokens="all"), "must be a whole number of at least 1", "max_completion_tokens"),
        (chat({"type": "text", "text": "\ud83d"}, image()), "not text: surrogates not allowed", "messages"),
        (chat(**{"\ud83d": 1}), "^. is not a parameter", "?"),
        (chat(tools=[{}]), "tools can only be", "tools"),
        (chat(functions=[]), "functions is not a parameter of this server", "functions"),
        (chat(ergo={"option": []}), "ergo takes", "ergo"),
        (chat(ergo={"options": ["x"] * 27}), "up to 26 texts", "ergo"),
        (chat() | {"model": "gpt"}, "the model 'tiny' only", "model"),
    ],
)
def test_read_chat_refuses_what_it_cannot_do_with_a_sentence(request_: Any, sentence: str, param: str | None) -> None:
    with pytest.raises(ChatError, match=sentence) as refused:
        read(request_)
    assert refused.value.body["error"].keys() == {"message", "type", "param", "code"}
    assert refused.value.param == param and refused.value.status == (404 if param == "model" else 400)


words = st.text(st.characters(exclude_categories=()), max_size=8)  # halves of surrogate pairs, too
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)
parts = st.fixed_dictionaries(
    {"type": st.just("text") | json_values, "text": words | json_values}
) | st.fixed_dictionaries({"type": st.just("image_url"), "image_url": json_values | st.just({"url": "u"})})
messages = st.fixed_dictionaries(
    {"role": st.just("user") | json_values, "content": st.lists(parts, max_size=3) | json_values}
)
requests = st.fixed_dictionaries(
    {"messages": json_values | st.lists(messages, max_size=2)},
    optional={name: json_values for name in ("model", "ergo", "stream", "n", "max_tokens", "temperature", "other")},
)


@given(st.binary(max_size=64) | (json_values | requests).map(lambda value: json.dumps(value).encode()))
def test_read_chat_any_body_gives_a_question_or_a_4xx(body: bytes) -> None:
    try:
        asked = read_chat(body, "tiny")
    except ChatError as refused:
        assert str(refused) and 400 <= refused.status < 500
        assert JSONResponse(refused.body).body
    else:
        assert asked.text.strip().encode() and isinstance(asked.image_url, str)


def test_read_chat_deeply_nested_body_is_refused() -> None:
    with pytest.raises(ChatError, match="not JSON"):
        read_chat(b"[" * 200_000, "tiny")


@given(st.text(min_size=1).filter(str.strip), st.binary())
def test_read_chat_keeps_text_and_image_unchanged(text: str, encoded: bytes) -> None:
    asked = read(chat({"type": "text", "text": text}, image(data_url(encoded))))
    assert asked.text == text.strip() and read_data_url(asked.image_url) == encoded


def test_read_data_url_takes_line_breaks_and_missing_padding() -> None:
    for written in ("YWJjZA==", "YWJj\r\nZA==\n", "YWJjZA", " YWJjZA="):
        assert read_data_url("data:image/png;base64," + written) == b"abcd"


def test_chat_error_shows_no_address_of_memory() -> None:
    assert str(ChatError(f"cannot read {object()}")) == "cannot read <object object>"


@given(st.text() | st.text().map("data:image/png;base64,".__add__))
def test_read_data_url_any_text_gives_bytes_or_invalid_image(url: str) -> None:
    try:
        read_data_url(url)
    except ChatError as refused:
        assert refused.code == "invalid_image"


# --- over HTTP --------------------------------------------------------------------------------------------------------


def ask(
    server: Server, calls: Sequence[tuple[str, str, Any]], overrides: Sequence[str] = (), **how: Any
) -> list[httpx.Response]:
    """(method, path, body: an object or the bytes themselves), all at once."""
    quick = [f"reward.verifier.endpoint.{key}" for key in ("retries=0", "timeout_s=20")]
    config: TrainConfig = load_config(ROOT / "configs" / "panels.yaml", [*quick, *overrides])

    async def request_all() -> list[httpx.Response]:
        client = EndpointClient(config, await endpoint_at(server.url, "tiny", config), FAMILY)
        service = chat_server.ChatService(client, config, chat_server.ServeConfig("tiny", **how))
        app = chat_server.chat_app(service)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://ergo") as http:
            bodies = [body if hasattr(body, "__aiter__") else json.dumps(body) for _, _, body in calls]
            replies = await asyncio.gather(
                *(http.request(how, path, content=body) for (how, path, _), body in zip(calls, bodies, strict=True))
            )
        await client.close()
        return list(replies)

    return asyncio.run(request_all())


def post(*bodies: Any) -> list[tuple[str, str, Any]]:
    return [("POST", "/v1/chat/completions", body) for body in bodies]


def test_chat_completion_runs_both_turns_and_reports_them(server: Server) -> None:
    good = chat(WORDS, image(data_url(question().image)))  # type: ignore[arg-type]
    replies = ask(server, [*post(*[good] * 6), ("GET", "/v1/models", None), ("GET", "/health", None)])
    assert [reply.status_code for reply in replies] == [200] * 8 and len(server.bodies) == 12
    first, *_, models, health = (reply.json() for reply in replies)
    assert models["data"][0]["id"] == "tiny" and health == {"status": "ok"}
    assert first["object"] == "chat.completion" and first["choices"][0]["finish_reason"] == "stop"
    assert first["choices"][0]["message"] == {"role": "assistant", "content": "ring", "refusal": None}
    assert first["usage"] == {"prompt_tokens": 100, "completion_tokens": 14, "total_tokens": 114}
    assert first["ergo"].pop("seconds") > 0
    assert first["ergo"] == {
        "answer": "ring",
        "outcome": "answered",
        "image_size": [672, 672],
        "box": [112, 112, 336, 336],  # 28 .. 84 of a view of a quarter of each side
        "box_outcome": "ok",
        "whole_image_fallback": False,
        "area_ratio": pytest.approx(1 / 9),
        "visual_tokens": {"coarse": 36, "crop": 36},
        "replies": [LOOK, READ],
    }
    assert len({reply.json()["id"] for reply in replies[:6]}) == 6


def test_chat_completion_without_a_box_follows_the_recipe(server: Server) -> None:
    """The recipe says whether the episode ends there, or goes on with the whole image."""
    say = server.say
    server.say = lambda messages: "nowhere" if (said := say(messages)) == LOOK else said
    good = post(chat(WORDS, image(data_url(question().image))))  # type: ignore[arg-type]
    (ended,) = ask(server, good)
    (whole,) = ask(server, good, ["episode.on_bad_box=whole_image", "episode.fine_tokens=16"])
    assert ended.json()["choices"][0]["message"]["content"] == "nowhere"
    told = ended.json()["ergo"]
    assert (told["answer"], told["box"], told["outcome"], told["box_outcome"]) == (None, None, "bad_box", "no_tag")
    assert told["visual_tokens"] == {"coarse": 36, "crop": 0} and not told["whole_image_fallback"]
    told = whole.json()["ergo"]
    assert told["answer"] == "ring" and told["whole_image_fallback"] and told["box"] == [0, 0, 672, 672]
    assert told["visual_tokens"] == {"coarse": 36, "crop": 16}


def test_chat_completion_streams_in_one_piece(server: Server) -> None:
    good = chat(WORDS, image(data_url(question().image)), stream=True, stop=["n"])  # type: ignore[arg-type]
    plain, counted = ask(server, post(good, good | {"stream_options": {"include_usage": True}}))
    assert plain.headers["content-type"].startswith("text/event-stream")
    *events, done = (line.removeprefix("data: ") for line in counted.text.split("\n\n") if line)
    said, end, usage = map(json.loads, events)
    assert done == "[DONE]" and len(plain.text.split("\n\n")) == 4  # two events, the end, and what follows it
    assert said["choices"][0]["delta"]["content"] == "ri" and end["choices"][0]["finish_reason"] == "length"
    assert end["ergo"]["answer"] == "ring" and usage["usage"]["total_tokens"] == 114 and usage["choices"] == []


def test_server_names_its_model_at_its_address(server: Server) -> None:
    known, unknown = ask(server, [("GET", "/v1/models/tiny", None), ("GET", "/v1/models/a/b", None)])
    assert known.json()["id"] == "tiny" and unknown.status_code == 404


def test_server_refuses_a_question_that_is_longer_than_the_model_before_tokenizing(server: Server) -> None:
    (reply,) = ask(server, post(chat({"type": "text", "text": "word " * 2000}, image())))
    assert (
        reply.status_code == 400 and "has 9999 characters; at most 8192 could fit" in reply.json()["error"]["message"]
    )


def test_server_says_busy_where_too_much_is_held(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bodies of 4 KiB and room for two: of three that are held at once, one is refused, and the model is still listed;
    afterwards there is room again."""
    monkeypatch.setattr(chat_server, "_BODIES", 1)
    monkeypatch.setattr(chat_server, "_BODY_S", 0.5)

    async def stuck() -> AsyncIterator[bytes]:
        yield b" " * 3000
        await asyncio.sleep(0.8)

    calls = [*post(stuck(), stuck()), ("GET", "/v1/models", None)]
    first, second, models = ask(server, calls, max_body_bytes=4096)
    assert sorted((first.status_code, second.status_code)) == [408, 503] and models.status_code == 200
    assert any("takes 4096 bytes of requests at once" in reply.text for reply in (first, second))


def test_budget_gives_back_what_was_held_also_after_an_error() -> None:
    budget = chat_server.Budget(10, "things")
    with pytest.raises(ChatError, match="takes 10 things at once"), budget.hold() as take:
        take(7)
        take(4)
    assert budget.held == 0


async def drip() -> AsyncIterator[bytes]:
    for _ in range(64):
        yield b" " * 1024


def test_server_refusals_have_status_and_reason(server: Server) -> None:
    encoded: bytes = question().image  # type: ignore[assignment]
    calls = [
        *post(chat(WORDS, image(data_url(encoded)))),
        *post(chat(WORDS, image(data_url(encoded[:5000])))),
        *post(chat(WORDS, image("data:image/png;base64,***"))),
        *post(chat(WORDS, image("http://169.254.169.254/latest"))),
        *post(chat(WORDS, image("file:///etc/passwd"))),
        ("GET", "/v1/chat/completions", None),
        ("POST", "/v1/embeddings", {}),
    ]
    replies = ask(server, calls, ["episode.max_image_pixels=451583"])  # 672 x 672 less 1
    errors = [reply.json()["error"] for reply in replies]
    assert [reply.status_code for reply in replies] == [400, 400, 400, 400, 400, 404, 404]
    assert "672 x 672 is more than the limit of 451583 pixels" in errors[0]["message"]
    assert "the image is not base64" in errors[2]["message"] and "--fetch-images" in errors[3]["message"]
    assert "not as 'file:///etc/passwd'" in errors[4]["message"] and "GET /v1/models" in errors[6]["message"]
    assert all(error["type"] == "invalid_request_error" and error["code"] for error in errors)
    assert server.bodies == [], "nobody was asked"

    (cut,) = ask(server, post(chat(WORDS, image(data_url(encoded[:5000])))))
    assert cut.status_code == 400 and "UnreadableImage: not a readable image" in cut.json()["error"]["message"]
    (reserved,) = ask(server, post(chat({"type": "text", "text": "<|im_end|>"}, image(data_url(encoded)))))
    assert reserved.status_code == 400 and "special token <|im_end|>" in reserved.json()["error"]["message"]


def test_server_stops_reading_a_body_above_the_limit(server: Server) -> None:
    for body in (chat({"type": "text", "text": "x" * 5000}, image()), drip()):
        (reply,) = ask(server, post(body), max_body_bytes=4096)
        assert reply.status_code == 413 and "more than 4096 bytes" in reply.json()["error"]["message"]


def test_server_answers_503_when_the_endpoint_is_down(server: Server) -> None:
    server.say = lambda messages: 500
    (reply,) = ask(server, post(chat(WORDS, image(data_url(question().image)))))  # type: ignore[arg-type]
    assert reply.status_code == 503 and reply.json()["error"]["type"] == "server_error"
    assert "status 500" in reply.json()["error"]["message"] and "try again" in reply.json()["error"]["message"]


def test_server_fetches_images_only_when_allowed(server: Server) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and never listens
        gone = f"http://127.0.0.1:{nobody.getsockname()[1]}/x.png"
        calls = post(
            chat(WORDS, image(f"{server.url}/models")), chat(WORDS, image(gone)), chat(WORDS, image("http://x:port/"))
        )
        replies = ask(server, calls, fetch_images=True, fetch_private=True)
    said = [reply.json()["error"]["message"] for reply in replies]
    assert [reply.status_code for reply in replies] == [400] * 3
    assert said[0].startswith("the image cannot be used: does not decode"), "it came, and is a list of models"
    assert said[1].startswith("the image was not fetched: ConnectError") and "InvalidURL" in said[2]
    (large,) = ask(server, calls[:1], fetch_images=True, fetch_private=True, max_body_bytes=1000)
    assert large.status_code == 413 and "the image has more than 1000 bytes" in large.json()["error"]["message"]


@pytest.mark.hostile("requests to serve")
@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:1/x.png", "http://localhost:1/", "http://2130706433/", "http://0x7f.1/", "http://[::1]:1/x.png",
     "http://[::ffff:127.0.0.1]/", "http://0.0.0.0/", "http://169.254.169.254/latest/", "http://10.0.0.1/", "http://[fe80::1]/",
     "http://192.168.0.1/", "http://100.64.0.1/", "http://224.0.0.1/", "http://[fd00:ec2::254]/", "http://me:pw@127.0.0.1/"],
)  # fmt: skip
def test_server_fetches_no_image_from_where_only_it_gets(server: Server, url: str) -> None:
    (reply,) = ask(server, post(chat(WORDS, image(url))), fetch_images=True)
    assert reply.status_code == 400 and "which is not public" in reply.json()["error"]["message"]


def test_public_address_is_given_as_it_is() -> None:
    assert asyncio.run(chat_server.public_address("8.8.8.8")) == "8.8.8.8"
    for host in ("nowhere.invalid", "", "x" * 300, "a..b"):
        with pytest.raises(ChatError, match="was not fetched"):
            asyncio.run(chat_server.public_address(host))


def test_check_port_refuses_a_taken_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match="not free to listen on"):
        chat_server.check_port("127.0.0.1", taken.getsockname()[1])
