"""Requests as they come: with null for what is not set, empty, damaged, in other encodings, far too large, as HEAD."""

from __future__ import annotations

import base64
import json
import math
import re
import time
from collections.abc import Iterator
from typing import Any, Required, get_args, get_origin

import httpx2
import pytest
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import (
    ChatCompletionAssistantMessageParam,
    ChatCompletionContentPartImageParam,
    ChatCompletionContentPartTextParam,
    ChatCompletionDeveloperMessageParam,
    ChatCompletionStreamOptionsParam,
    ChatCompletionSystemMessageParam,
    ChatCompletionUserMessageParam,
)
from openai.types.chat import (
    completion_create_params as chat_create_params,
)
from openai.types.chat.chat_completion_content_part_image_param import ImageURL
from pydantic import ValidationError
from serving import Running, data_url
from typing_extensions import get_type_hints

from blip2.matching import Matcher
from blip2.results import Match
from blip2.serve import native_api, schemas
from blip2.serve.batching_engine import EngineError
from blip2.serve.errors import as_api_error, excerpt
from blip2.serve.streaming import finite_logprob, json_text

CLIENT = {  # what the client sends to OpenAI's routes; those that are served must be here
    "/v1/chat/completions": chat_create_params,
    "/v1/completions": completion_create_params,
    "/v1/embeddings": embedding_create_params,
}
SCHEMAS = {"/v1/chat/completions": schemas.ChatRequest, "/v1/completions": schemas.CompletionRequest}
BLANK = [
    "", " ", "\t\r\n", "\u00a0\u2003", "\u3000", "\u200b", "\u200d\u2060", "\ufeff", "\u00ad", "\u2028", "\u202e\u202c",
    "\x00", "\x1b\x07", "\x85", "\u2800", "\u3164", "\u115f\uffa0", "\ufe0f", "\u0301", "\U000e0041",
]  # fmt: skip
# Python's own ways to write and to name things, which tell no client anything.
PYTHON = re.compile(
    r"\bb['\"]|\\[xun]|\bNone\b|\bTrue\b|\bFalse\b|<class|instance of|dictionary|\btuple\b|codec|Traceback|"
    r"0x[0-9a-f]{6}|\w+Error\b|\.py\b"
)


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[httpx2.Client]:
    with server.client() as connected:
        yield connected


def post(client: httpx2.Client, path: str, body: Any) -> tuple[int, dict[str, Any]]:
    answer = client.post(path, json=body)
    return answer.status_code, answer.json()


def message(client: httpx2.Client, path: str, body: Any, status: int = 400) -> str:
    """What a refused request's client is told, in words."""
    got, answer = post(client, path, body)
    assert got == status, answer
    text = str(answer["error"]["message"])
    assert not PYTHON.search(text) and text.isprintable(), text
    return text


def chat(*messages: Any, **fields: Any) -> dict[str, Any]:
    return {"model": "default", "messages": [*messages], "max_tokens": 2, **fields}


def user(image: bytes, *texts: str) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": data_url(image)}}]
    return {"role": "user", "content": parts + [{"type": "text", "text": text} for text in texts]}


# --- null -----------------------------------------------------------------------------------------------------------


def parameters(path: str) -> dict[str, bool]:
    """The parameters that the installed client sends to a route, and whether they may be left open."""
    names: dict[str, bool] = {}
    for kind in ("CompletionCreateParamsNonStreaming", "CompletionCreateParamsStreaming"):
        for name, hint in get_type_hints(getattr(CLIENT[path], kind), include_extras=True).items():
            needed = get_origin(hint) is Required and type(None) not in get_args(get_args(hint)[0])
            names[name] = names.get(name, False) or not needed
    return names


def test_every_route_of_openai_is_looked_at(client: httpx2.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    served = {path for path, methods in paths.items() if path.startswith("/v1/") and "post" in methods}
    assert served == SCHEMAS.keys() <= CLIENT.keys()


@pytest.mark.parametrize("path", SCHEMAS)
def test_null_is_let_pass_for_every_parameter_of_the_client(
    client: httpx2.Client, images: list[bytes], path: str
) -> None:
    is_chat = path.endswith("chat/completions")
    needed: dict[str, Any] = chat(user(images[0], "what is it?"))
    if not is_chat:
        needed = {"model": "default", "prompt": "a photo of", "image": data_url(images[0]), "max_tokens": 2}
    names = [name for name, open_ in parameters(path).items() if open_]
    assert len(names) >= 16 and {name for name in parameters(path) if name not in names} <= {
        "model",
        "messages",
    }
    for name in names:
        SCHEMAS[path].model_validate_json(json.dumps(needed | {name: None}), strict=True)
    plain = client.post(path, json=needed).json()["choices"]
    nulls = dict.fromkeys({*names} - {"max_tokens", "prompt"})
    assert client.post(path, json=needed | nulls).json()["choices"] == plain
    if not is_chat:
        assert client.post(path, json=needed | {"prompt": None}).status_code == 200
        assert client.post(path, json=needed | {"image": None}).json()["error"]["code"] == "image_required"


def test_null_is_let_pass_within_messages(client: httpx2.Client, images: list[bytes]) -> None:
    """For every field of the client's messages and parts that may be left out, one at a time and all at once."""

    def nulls(kind: Any) -> dict[str, None]:
        hints = get_type_hints(kind, include_extras=True)
        return {name: None for name, hint in hints.items() if get_origin(hint) is not Required}

    url = {"url": data_url(images[0])} | nulls(ImageURL)
    parts = [
        {"type": "image_url", "image_url": url} | nulls(ChatCompletionContentPartImageParam),
        {"type": "text", "text": "what is it?"} | nulls(ChatCompletionContentPartTextParam),
    ]
    messages = [
        {"role": "system", "content": "a"} | nulls(ChatCompletionSystemMessageParam),
        {"role": "developer", "content": "a"} | nulls(ChatCompletionDeveloperMessageParam),
        {"role": "user", "content": parts} | nulls(ChatCompletionUserMessageParam),
        {"role": "assistant"} | nulls(ChatCompletionAssistantMessageParam),
        {"role": "user", "content": "is it red?"},
    ]
    assert {"name", "refusal", "tool_calls", "function_call", "audio", "content"} <= messages[3].keys()
    assert "detail" in url
    status, answer = post(client, "/v1/chat/completions", chat(*messages, stream_options=None))
    assert status == 200, answer
    options = nulls(ChatCompletionStreamOptionsParam)
    body = chat(*messages, stream=True, stream_options=options)
    streamed = client.post("/v1/chat/completions", json=body).text
    assert streamed.endswith("data: [DONE]\n\n") and '"usage"' not in streamed


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("audio", {"voice": "alloy", "format": "mp3"}),
        ("functions", []),
        ("function_call", "auto"),
        ("moderation", {}),
        ("prediction", {"type": "content", "content": "a"}),
        ("prompt_cache_options", {}),
        ("prompt_cache_retention", "24h"),
        ("reasoning_effort", "none"),
        ("verbosity", "medium"),
        ("web_search_options", {}),
        ("store", True),
        ("logit_bias", {"5": 1}),
        ("modalities", ["text", "audio"]),
        ("suffix", "."),
        ("best_of", 2),
        ("echo", True),
    ],
)
def test_a_parameter_that_is_not_followed_is_named(
    client: httpx2.Client, images: list[bytes], name: str, value: Any
) -> None:
    path, body = "/v1/chat/completions", chat(user(images[0]))
    if name not in parameters(path):
        path, body = "/v1/completions", {"model": "default", "prompt": "a", "image": data_url(images[0])}
    status, answer = post(client, path, body | {name: value})
    assert status == 400 and answer["error"]["param"].startswith(name)
    assert message(client, path, body | {name: value}).startswith(name)


# --- empty ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blank", BLANK, ids=ascii)
def test_an_empty_question_is_refused_at_every_door(
    client: httpx2.Client, images: list[bytes], blank: str
) -> None:
    image, turn = data_url(images[0]), {"question": "a", "answer": "b"}
    doors: list[tuple[str, dict[str, Any]]] = [
        ("/ask", {"image": image, "question": blank}),
        ("/match", {"image": image, "texts": ["a rose", blank]}),
        ("/embed", {"texts": [blank]}),
        ("/explain", {"image": image, "text": blank}),
        ("/explain", {"image": image, "question": blank}),
        ("/explain", {"image": image, "question": "a", "turns": [turn | {"question": blank}]}),
        ("/v1/chat/completions", chat(user(images[0], blank))),
        ("/v1/chat/completions", chat(user(images[0], blank, blank))),
        ("/v1/chat/completions", chat(user(images[0], "a"), {"role": "user", "content": blank})),
    ]
    for path, body in doors:
        assert "empty" in (text := message(client, path, body)) or "words" in text
    assert client.post("/ask", files={"image": images[0]}, data={"question": blank}).status_code == 400


def test_an_image_without_any_text_is_captioned(client: httpx2.Client, images: list[bytes]) -> None:
    for messages in ([user(images[0])], [user(images[0], "a?"), user(images[1])]):
        assert post(client, "/v1/chat/completions", chat(*messages))[0] == 200
    for content in (None, []):
        empty = chat(user(images[0]), {"role": "user", "content": content})
        assert "neither text nor image" in message(client, "/v1/chat/completions", empty)
    for visible in ("?", "0", "é", "何", "🐈", "\u200bwhy"):
        assert post(client, "/v1/chat/completions", chat(user(images[0], visible)))[0] == 200


# --- images as base64 -----------------------------------------------------------------------------------------------


def lines(text: str, width: int, end: str) -> str:
    return "".join(text[i : i + width] + end for i in range(0, len(text), width))


@pytest.mark.parametrize(
    "media_type", ["image/jpeg", "IMAGE/JPEG", "", "text/plain", "image/x;charset=utf-8"]
)
def test_base64_in_every_sound_form(client: httpx2.Client, images: list[bytes], media_type: str) -> None:
    text = base64.b64encode(images[0] + bytes(4 - len(images[0]) % 3)).decode()  # with padding
    assert text.endswith("=")
    for data in (
        text,
        text.rstrip("="),
        lines(text, 76, "\r\n"),
        lines(text, 64, "\n"),
        lines(text, 1000, "\n"),
    ):
        for scheme in ("data:{};base64,", "DATA:{};BASE64,", "data:{}; base64,"):
            url = scheme.format(media_type) + data
            assert post(client, "/embed", {"images": [url]})[0] == 200, url[:60]


@pytest.mark.parametrize("odd", [*" \\t\\x0b\\x00-_=.\\u00a0Ａé", "\\r", "\\r\\r", "%2B", "\\\\n"], ids=ascii)
def test_base64_with_anything_else_in_it_is_damaged(
    client: httpx2.Client, images: list[bytes], odd: str
) -> None:
    text = base64.b64encode(images[0]).decode()
    for damaged in (text[:100] + odd + text[100:], text[:76] + odd + " \n" + text[76:], odd + text):
        body = {"image": "data:image/jpeg;base64," + damaged}
        assert "damaged" in message(client, "/caption", body)


def test_base64_of_no_such_length_is_damaged(client: httpx2.Client, images: list[bytes]) -> None:
    text = base64.b64encode(images[0]).decode().rstrip("=")
    text = text[: len(text) // 4 * 4]
    for end in ("A", "A===", "AB=", "=", "====", "AB==AB==", "AB== ", "AB==\n="):
        assert "damaged" in message(client, "/caption", {"image": "data:image/jpeg;base64," + text + end})
    for url in (
        "data:image/jpeg," + text,
        "data:base64," + text,
        "data:;base64",
        "data:,",
        " data:;base64," + text,
    ):
        assert "data:" in message(client, "/caption", {"image": url})


# --- what a client is told -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        *(
            b"hello\n",
            b"<svg xmlns=",
            b'it\'s "x"',
            b"\x89HDF\r\n\x1a\n",
            b"\xef\xbb\xbfabc",
            b"\n\n\n\n\n\n\n\n\n",
        ),
        *(
            "größer".encode(),
            b"\x00\x00\x00\x18ftypheic",
            b"\xff\xd8\xff",
            b"\x89PNG\r\n\x1a\n",
            b"GIF89a",
            b"P6 b'x'",
        ),
    ],
)
def test_a_file_that_is_no_image_is_refused_in_words(client: httpx2.Client, content: bytes) -> None:
    for path, fields in (("/caption", {}), ("/match", {"texts": ["a"]}), ("/explain", {"text": "a"})):
        assert "image" in message(client, path, {"image": data_url(content), **fields})
    assert "image" in message(client, "/embed", {"images": [data_url(content)]})


def test_no_message_speaks_python(client: httpx2.Client, images: list[bytes]) -> None:
    good = {"image": data_url(images[0]), "question": "a"}
    path = "/v1/chat/completions"
    bodies: list[tuple[str, Any, int]] = [
        *(("/ask", body, 400) for body in ([], "a", 1, True, {"image": None}, {"image": []})),
        *(("/ask", good | {"stream": value}, 400) for value in ("yes", 1, [True], {})),
        *(("/ask", good | {"num_beams": value}, 400) for value in ("5", 1.5, True, [1], {}, -1, 10**30)),
        *(("/ask", good | {"early_stopping": value}, 400) for value in ("True", 1, [], {})),
        *(
            ("/ask", good | options, 400)
            for options in (
                {"do_sample": False, "top_p": 0.5},
                {"do_sample": True, "num_beams": 2},
                {"stream": True, "num_beams": 2},
                {"num_return_sequences": 8},
            )
        ),
        *(("/ask", good | {"question": value}, 400) for value in (1, True, ["a"], {"a": "b"}, None)),
        *(("/ask", good | {name: 1}, 400) for name in ("\x1b[31m", "a\nb", "é" * 500, "\u202e")),
        *(("/explain", good | {"turns": value}, 400) for value in ("a", {}, [1], [{}], [None], [["a", "b"]])),
        *(
            (path, chat(value), 400)
            for value in (1, "a", None, [], {"role": "tool"}, {"role": "user", "content": 1})
        ),
        *(
            (path, chat({"role": "user", "content": [value]}), 400)
            for value in (1, "a", None, {}, {"type": "file"})
        ),
        *(
            (path, chat(user(images[0]), **{name: True}), 400)
            for name in ("store", "stop", "tools", "user", "n")
        ),
        *(
            (path, chat(user(images[0])) | {"model": value}, 404)
            for value in ("gpt\x00", "a\u202ec", "x" * 10**6, "")
        ),
        (path, chat(user(images[0]), response_format={"type": "json_object"}), 400),
        (path, chat(user(images[0]), stream_options={"include_usage": "x"}), 400),
    ]
    for at, body, status in bodies:
        assert len(message(client, at, body, status)) < 1000, (at, body)


def test_an_excerpt_is_short_and_printable() -> None:
    assert excerpt("default") == '"default"'
    assert excerpt("a\nb\x1b[0m\u202e\ud800") == '"a\ufffdb\ufffd[0m\ufffd\ufffd"'
    assert len(excerpt("x" * 10**6)) < 100
    assert "Unicode" not in str(as_api_error(UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates")))


# --- forms and JSON ---------------------------------------------------------------------------------------------------


CHARSETS = ["", "utf-8", '"UTF-8"', "latin-1", "utf-16", "punycode", "unicode_escape", "zlib", "no"]


@pytest.mark.parametrize("charset", CHARSETS)
@pytest.mark.parametrize("question", ["größer?".encode(), b"gr\xf6\xdfer?", "größer?".encode("utf-16")])
def test_a_form_is_utf_8(client: httpx2.Client, images: list[bytes], charset: str, question: bytes) -> None:
    fields = ((b'"question"', question), (b'"image"; filename="\xe9.jpg"', images[0]))
    parts = (b"--x\r\ncontent-disposition: form-data; name=%s\r\n\r\n%s\r\n" % field for field in fields)
    kind = "multipart/form-data; boundary=x" + (f"; charset={charset}" if charset else "")
    answer = client.post("/ask", content=b"".join(parts) + b"--x--\r\n", headers={"content-type": kind})
    if question == "größer?".encode() and charset.lower().strip('"') in ("", "utf-8"):
        expected = {"image": data_url(images[0]), "question": "größer?"}
        assert answer.json()["answers"] == post(client, "/ask", expected)[1]["answers"]
    else:
        assert answer.status_code == 400 and "UTF-8" in answer.json()["error"]["message"]


@pytest.mark.parametrize("kept", [-1, -3, -4, -5, -7, -60, 0], ids=str)
def test_a_form_that_was_cut_loses_no_part_in_silence(
    client: httpx2.Client, images: list[bytes], kept: int
) -> None:
    fields = ((b'"image"; filename="a"', images[0]), (b'"prompt"', b"the " * 20))
    parts = (b"--x\r\ncontent-disposition: form-data; name=%s\r\n\r\n%s\r\n" % field for field in fields)
    form = b"".join(parts) + b"--x--\r\n"
    answer = client.post(
        "/caption", content=form[:kept], headers={"content-type": "multipart/form-data; boundary=x"}
    )
    whole = kept == -1  # a line end after the last boundary is not needed
    assert answer.status_code == (200 if whole else 400)
    assert whole or "cut" in answer.json()["error"]["message"]


def test_an_image_in_a_form_without_a_file_name(client: httpx2.Client) -> None:
    form = (
        b'--x\r\ncontent-disposition: form-data; name="image"\r\n\r\n' + b"\xff" * 50_000 + b"\r\n--x--\r\n"
    )
    answer = client.post("/embed", content=form, headers={"content-type": "multipart/form-data; boundary=x"})
    assert answer.status_code == 400 and "images=@" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "coding"), [("/ask", "gzip"), ("/embed", "BR"), ("/v1/completions", "x, y")]
)
def test_a_compressed_body_is_refused_as_such(client: httpx2.Client, path: str, coding: str) -> None:
    headers = {"content-type": "application/json", "content-encoding": coding}
    answer = client.post(path, content=b"\x1f\x8b\x08", headers=headers)
    assert answer.status_code == 415 and "compressed" in answer.json()["error"]["message"]


def test_json_may_begin_with_a_byte_order_mark(client: httpx2.Client, images: list[bytes]) -> None:
    body = json.dumps({"image": data_url(images[0]), "question": "größer?"})
    kind = {"content-type": "application/json"}
    assert client.post("/ask", content="\ufeff".encode() + body.encode(), headers=kind).status_code == 200
    assert client.post("/ask", content=body.encode("utf-16"), headers=kind).status_code == 400


@pytest.mark.parametrize("value", ["1", "[]", "{}", '""', "null", '{"a":1}'])
def test_json_of_very_many_values_is_refused_at_once(client: httpx2.Client, value: str) -> None:
    many = ",".join([value] * 1_000_000)
    pairs = ",".join(f'"{i}":{value}' for i in range(300_000))
    bodies = (
        ("/match", f'{{"image":"a","texts":[{many}]}}'),
        ("/v1/chat/completions", f'{{"model":"default","messages":[{many}]}}'),
        ("/ask", f"{{{pairs}}}"),
        ("/caption", "[" * 5_000_000),
    )
    kind = {"content-type": "application/json"}
    for path, body in bodies:
        began = time.monotonic()
        answer = client.post(path, content=body, headers=kind)
        assert answer.status_code == 400 and "values" in answer.json()["error"]["message"]
        assert time.monotonic() - began < 2


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_the_probability_of_a_text_is_that_of_all_its_tokens(
    client: httpx2.Client, images: list[bytes]
) -> None:
    for image in images:
        body = {"image": data_url(image), "num_return_sequences": 4}
        captions = post(client, "/caption", body)[1]["captions"]
        for caption in captions:
            shown = sum(token["logprob"] for token in caption["tokens"])  # without the end
            assert caption["logprob"] <= shown + 1e-6 and caption["logprob"] == pytest.approx(
                caption["score"] * (len(caption["tokens"]) + 1), abs=1e-3
            )
        assert sum(math.exp(caption["logprob"]) for caption in captions) <= 1


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_no_answer_holds_a_number_that_is_not_finite(
    client: httpx2.Client, images: list[bytes], monkeypatch: pytest.MonkeyPatch, number: float
) -> None:
    for content in (number, [1.0, number], {"a": {"b": [number]}}):
        with pytest.raises(EngineError, match="not finite"):
            json_text(content)
    body = {"image": data_url(images[0]), "texts": ["a rose"]}
    monkeypatch.setattr(Matcher, "compare", lambda *_: [[Match(number, 0.5)]])
    assert "not finite" in message(client, "/match", body, 500)
    monkeypatch.setattr(native_api, "finite_logprob", lambda _: number)
    assert "not finite" in message(client, "/caption", {"image": body["image"]}, 500)
    streamed = client.post("/caption", json={"image": body["image"], "stream": True}).text
    assert "not finite" in json.loads(streamed.strip().split("data: ")[-1])["error"]["message"]
    assert "NaN" not in streamed and "Infinity" not in streamed


def test_a_probability_of_0_has_a_logarithm_in_json() -> None:
    assert [finite_logprob(value) for value in (-1.5, 0.0, -math.inf, -1e300)] == [
        -1.5,
        0.0,
        -9999.0,
        -9999.0,
    ]
    assert math.isnan(finite_logprob(math.nan))


# --- HEAD -------------------------------------------------------------------------------------------------------------


def test_head_is_get_without_the_body(client: httpx2.Client) -> None:
    paths = [
        path for path, methods in client.get("/openapi.json").json()["paths"].items() if "get" in methods
    ]
    pages = ["/", "/openapi.json", "/page/main.js", "/page/icon.svg", "/page/examples/avocados.jpg"]
    pages += ["/v1/models/no", "/page/no", "/no", "/caption", "/page"]
    for path in [path.replace("{model}", "default") for path in paths] + pages:
        get, head = client.get(path), client.head(path)
        assert head.status_code == get.status_code and head.content == b"", path
        changing = {"date", "x-request-id"} | ({"content-length"} if path == "/metrics" else set())
        same = [{k: v for k, v in answer.headers.items() if k not in changing} for answer in (get, head)]
        assert same[0] == same[1] and "content-length" in head.headers, path
        assert client.get("/health").status_code == 200  # the connection goes on
    assert 'route="/v1/models"' in client.get("/metrics").text
    etag = client.get("/page/icon.svg").headers["etag"]
    for ask in (client.get, client.head):
        assert ask("/page/icon.svg", headers={"if-none-match": etag}).status_code == 304


def test_a_schema_takes_null_alone_where_nothing_is_followed() -> None:
    with pytest.raises(ValidationError, match="there is no such field here"):
        schemas.ChatRequest.model_validate_json('{"model": "a", "messages": [], "audio": 0}')
