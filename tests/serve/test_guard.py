"""Who is let in, what is written down, and that hostile text stays text."""

from __future__ import annotations

import base64
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from serving import Running, data_url, running_server

import blip2
from blip2.serve.keys import Keys
from blip2.serve.run import is_loopback, run_server

KEY = "correct-horse-battery-staple"


@pytest.fixture(scope="module")
def locked(predictor: blip2.Predictor) -> Iterator[Running]:
    with running_server(predictor, keys=("another-key-altogether", KEY)) as running:
        yield running


def routes(running: Running) -> list[tuple[str, str]]:
    with running.client(authorization=f"Bearer {KEY}") as client:
        paths = client.get("/openapi.json").json()["paths"]
    operations = [
        (method.upper(), path.replace("{model}", "default")) for path in paths for method in paths[path]
    ]
    others = [
        "/",
        "/page/index.html",
        "/openapi.json",
        "/nowhere",
        "/docs",
        "//health/../v1/models",
        "/health/",
    ]
    return [*operations, *(("GET", path) for path in others)]


BYPASSES: dict[str, list[tuple[str, str]]] = {
    "nothing": [],
    "empty": [("authorization", "")],
    "scheme alone": [("authorization", "Bearer")],
    "empty password": [("authorization", "Basic Og==")],
    "beginning of the key": [("authorization", f"Bearer {KEY[:-1]}")],
    "key and more": [("authorization", f"Bearer {KEY}x")],
    "other letters": [("authorization", f"Bearer {KEY.upper()}")],
    "no scheme": [("authorization", KEY)],
    "another scheme": [("authorization", f"Digest {KEY}")],
    "another header": [("x-api-key", KEY), ("api-key", KEY)],
    "two keys": [("authorization", "Bearer wrong"), ("authorization", f"Bearer {KEY}")],
    "key as user name": [("authorization", "Basic " + base64.b64encode(f"{KEY}:".encode()).decode())],
    "damaged basic": [("authorization", "Basic @@@")],
    "a cookie": [("cookie", f"authorization=Bearer {KEY}")],
    "claimed to be local": [
        ("x-forwarded-for", "127.0.0.1"),
        ("forwarded", "for=127.0.0.1"),
        ("host", "localhost"),
    ],
    "another path": [("x-original-url", "/health"), ("x-rewrite-url", "/health")],
    "another method": [("x-http-method-override", "GET")],
}


@pytest.mark.parametrize("how", BYPASSES)
def test_no_route_but_health_opens_without_a_key(locked: Running, how: str) -> None:
    with httpx2.Client(base_url=locked.url, trust_env=False, timeout=60) as client:
        for method, path in routes(locked):
            for target in {path, f"{path}?api_key={KEY}"}:
                answer = client.request(method, locked.url + target, headers=BYPASSES[how])
                if path == "/health":
                    assert answer.status_code == 200
                else:
                    assert answer.status_code == 401, (method, target)
                    assert answer.json()["error"]["code"] == "invalid_api_key" and KEY not in answer.text


def test_a_key_opens(locked: Running, images: list[bytes]) -> None:
    basic = "Basic " + base64.b64encode(f"anyone:{KEY}".encode()).decode()
    for header in (f"Bearer {KEY}", f"bearer {KEY}", basic, "Bearer another-key-altogether"):
        with locked.client(authorization=header) as client:
            assert client.get("/v1/models").status_code == 200
    client = locked.openai(KEY)
    message = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_url(images[0])}}]}
    made = client.chat.completions.create(model="default", messages=[message])  # type: ignore[list-item]
    assert made.choices[0].message.content
    with locked.client() as browser:
        challenged = browser.get("/", headers={"accept": "text/html,*/*"})
        assert challenged.headers["www-authenticate"].startswith("Basic")


def test_key_files(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# ours\n\n  {KEY}  \n")
    assert Keys.load(file).holder([f"Bearer {KEY}"]) == "key 1"
    assert not Keys() and Keys.load(file)
    for content in ("", "# none\n", "short\n"):
        file.write_text(content)
        with pytest.raises(ValueError, match="key"):
            Keys.load(file)
    with pytest.raises(ValueError, match="cannot be read"):
        Keys.load(tmp_path / "none")


def test_other_machines_need_keys() -> None:
    assert is_loopback("127.0.0.1") and is_loopback("::1") and is_loopback("localhost")
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org", ""):
        assert not is_loopback(host)
    with pytest.raises(ValueError, match="--api-key-file"):
        run_server(lambda: blip2.load(), model="default", host="0.0.0.0")


def test_pages_of_other_sites_stay_outside(server: Running) -> None:
    with server.client() as client:
        for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example:8000", ""):
            assert client.get("/v1/models", headers={"host": host}).status_code == 403
        for host in ("localhost:1", "127.0.0.1", f"localhost:{server.port}", "[::1]:9"):
            assert client.get("/v1/models", headers={"host": host}).status_code == 200
        for headers in (
            {"origin": "https://evil.example"},
            {"origin": "null"},
            {"origin": "http://localhost:1"},
            {"sec-fetch-site": "cross-site"},
        ):
            assert client.post("/caption", headers=headers).status_code == 403
        same = {"origin": server.url, "sec-fetch-site": "same-origin"}
        assert client.post("/caption", headers=same).status_code == 415


def test_headers_protect_the_page(server: Running) -> None:
    with server.client() as client:
        for path in ("/health", "/nowhere", "/v1/models"):
            headers = client.get(path).headers
            assert "default-src 'none'" in headers["content-security-policy"]
            assert "unsafe" not in headers["content-security-policy"]
            assert headers["x-content-type-options"] == "nosniff" and "server" not in headers
        assert client.get("/docs").status_code == client.get("/redoc").status_code == 404


def test_request_ids(server: Running) -> None:
    with server.client() as client:
        assert (
            client.get("/health", headers={"x-request-id": "mine-1.2"}).headers["x-request-id"] == "mine-1.2"
        )
        for odd in ("a b", "x" * 65, '"><script>', "é".encode()):
            assert re.fullmatch(
                "[0-9a-f]{32}", client.get("/health", headers={"x-request-id": odd}).headers["x-request-id"]
            )


HOSTILE = (
    '<script>alert(1)</script>', "'; DROP TABLE images; --", "{{7*7}}${7*7}", "../../etc/passwd\\..\\",
    "%00%0d%0aSet-Cookie: a=b",
    "\u202e\u0000\x1b[31m", "</s><image>", "{\"a\": \"\\u0000\"}", "a\r\nx-evil: 1", "\U0001f480" * 50,
)  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_stays_text(
    server: Running, images: list[bytes], text: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "blip2.serve")
    with server.client() as client:
        answers = [
            client.post("/ask", json={"image": data_url(images[0]), "question": text, "max_new_tokens": 4}),
            client.post("/caption", json={"image": data_url(images[0]), "prompt": text, "max_new_tokens": 4}),
            client.post("/match", json={"image": data_url(images[0]), "texts": [text]}),
            client.post("/caption", json={"image": text}),
            client.post("/caption", json={text: 1}),
            client.get("/v1/models/" + text.encode("utf-8").hex()),
        ]
        quoted = text.replace("\\", "\\\\").replace('"', '\\"').replace("\r\n", " ").encode("utf-8")
        body = (
            b'--b\r\nContent-Disposition: form-data; name="image"; filename="' + quoted + b'"\r\n\r\n'
            + images[0] + b'\r\n--b--\r\n'
        )  # fmt: skip
        answers.append(
            client.post("/caption", content=body, headers={"content-type": "multipart/form-data; boundary=b"})
        )
    for answer in answers:
        assert answer.status_code < 500, answer.text
        assert answer.headers["content-type"] == "application/json"
        assert "set-cookie" not in answer.headers and "x-evil" not in answer.headers
    # no content in the log unless that is switched on
    assert "alert" not in caplog.text and "DROP" not in caplog.text


def test_errors_reveal_nothing_of_the_inside(
    predictor: blip2.Predictor, images: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("/secret/path at 0x7f")

    with running_server(predictor) as running, running.client() as client:
        for owner, name in ((predictor.model, "prefill"), (predictor.matcher, "compare")):
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, broken)
                path, more = ("/caption", {}) if name == "prefill" else ("/match", {"texts": ["a"]})
                answer = client.post(path, json={"image": data_url(images[0])} | more)
            assert answer.status_code == 500 and "secret" not in answer.text and "0x" not in answer.text
        assert client.post("/caption", json={"image": data_url(images[0])}).status_code == 200


def test_what_breaks_in_a_stream_is_in_the_log_under_the_requests_id(
    predictor: blip2.Predictor,
    images: list[bytes],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(predictor.model.language, "decode_step", broken)
    with running_server(predictor) as running, running.client() as client:
        for path, body in (
            ("/caption", {"image": data_url(images[0])}),
            ("/v1/completions", {"image": data_url(images[0]), "prompt": "a photo of", "model": "default"}),
        ):
            caplog.clear()
            answer = client.post(path, json=body | {"stream": True}, headers={"x-request-id": "the-one"})
            *_, last = [line for line in answer.text.split("\n\n") if line]
            assert answer.status_code == 200 and "secret" not in answer.text
            assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
            (record,) = [entry for entry in caplog.records if "the-one failed" in entry.getMessage()]
            assert record.exc_info and "/secret/path" in logging.Formatter().formatException(record.exc_info)


def test_content_is_in_the_log_where_that_is_switched_on(
    predictor: blip2.Predictor, images: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "blip2.serve")
    caption = predictor.caption(images[0], num_beams=1)
    image = data_url(images[0])
    chat = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": image}}]}]
    with running_server(predictor, log_contents=True) as running, running.client() as client:
        for path, body in (
            ("/caption", {"image": image, "num_beams": 1}),
            ("/v1/completions", {"image": image, "prompt": "a photo of", "model": "default"}),
            ("/v1/chat/completions", {"messages": chat, "model": "default"}),
        ):
            for stream in False, True:
                caplog.clear()
                assert client.post(path, json=body | {"stream": stream}).status_code == 200
                entries = [json.loads(record.getMessage()) for record in caplog.records]
                content = [entry for entry in entries if entry["event"] == "content"]
                assert len(content) == 2 and "a photo of" in str(content[0])
                assert [caption] in content[1].values()
