"""The API as clients use it: curl's forms, JSON, and the official openai client, unmodified."""

from __future__ import annotations

import io
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import openai
import pytest
from PIL import Image
from serving import Running, data_url

import blip2
from blip2.generation.batching import SampledSequence
from blip2.generation.options import GenerationOptions, TextKind, make_options
from blip2.imagefiles.workers import DecodedFile
from blip2.results import StreamDetokenizer, token_text
from blip2.serve.batching_engine import GenerateRequest
from blip2.serve.streaming import GrowingText


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


# --- native --------------------------------------------------------------------------------------------------------


def test_caption_and_ask_as_form_and_as_json(
    server: Running, predictor: blip2.Predictor, images: list[bytes]
) -> None:
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 12}
    expected = predictor.caption(images[0], **options)
    question = "what is it?"
    answer = predictor.ask(images[1], question)
    with server.client() as client:
        # read apart from its prompt from now on: to the last bit
        client.post("/caption", files={"image": images[0]})
        form = client.post(
            "/caption", files={"image": images[0]}, data={k: str(v) for k, v in options.items()}
        )
        written = client.post("/caption", json={"image": data_url(images[0])} | options)
        assert form.status_code == written.status_code == 200, form.text
        assert form.json() == written.json()
        reply = form.json()
        assert [entry["text"] for entry in reply["captions"]] == expected
        assert [entry["score"] for entry in reply["captions"]] == pytest.approx(
            [e.score for e in expected], abs=1e-4
        )
        assert "".join(token["text"] for token in reply["captions"][0]["tokens"]).strip() == expected[0]
        usage = reply["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert usage["completion_tokens"] == sum(len(entry.tokens) for entry in expected)

        reply = client.post("/ask", files={"image": images[1]}, data={"question": question}).json()
        assert reply["answers"][0]["text"] == answer
        sampled = {"temperature": 0.9, "seed": 4, "num_return_sequences": 3}
        drawn = client.post(
            "/ask", json={"image": data_url(images[1]), "question": question} | sampled
        ).json()
        assert [entry["text"] for entry in drawn["answers"]] == predictor.ask(
            images[1], question, do_sample=True, **sampled
        )


def test_http_takes_the_options_of_python_with_their_defaults(server: Running) -> None:
    with server.client() as client:
        schemas = client.get("/openapi.json").json()["components"]["schemas"]
    kinds: tuple[tuple[str, TextKind], ...] = (("CaptionRequest", "caption"), ("AskRequest", "answer"))
    for name, kind in kinds:
        options = asdict(make_options(kind)) | {"do_sample": None}  # left open: a temperature decides
        assert options.keys() == schemas[name]["properties"].keys() - {
            "image",
            "prompt",
            "question",
            "stream",
        }
        for option, default in options.items():
            assert schemas[name]["properties"][option]["default"] == default


def test_options_mean_what_they_mean_in_python(
    server: Running, predictor: blip2.Predictor, images: list[bytes]
) -> None:
    image, ends = server.engine.prepare_image(images[0]), predictor.caption(images[0]).tokens[2:4]
    cases: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0, "top_k": 5},
        {"early_stopping": "never", "num_beams": 3},
        {"early_stopping": True, "length_penalty": 2.0},
        {"eos_token_id": ends[0]},
        {"eos_token_id": list(ends)},
        {"max_new_tokens": None, "num_beams": None, "seed": 3, "top_p": 0.5},
    ]

    def expected(options: dict[str, Any]) -> str:
        work = GenerateRequest(image, ("a photo of",), make_options("caption", **options))
        return str(server.engine.submit(work).result.result(60)[0].text)

    with server.client() as client:
        for options in cases:
            reply = client.post("/caption", json={"image": data_url(images[0])} | options).json()
            assert reply["captions"][0]["text"] == expected(options), options
        form = client.post(
            "/caption", files={"image": images[0]}, data={"eos_token_id": list(map(str, ends))}
        )
    assert form.json()["captions"][0]["text"] == expected({"eos_token_id": ends})
    assert len({expected(options) for options in cases}) > 2


def test_native_streams(server: Running, predictor: blip2.Predictor, images: list[bytes]) -> None:
    expected = predictor.caption(images[2], num_beams=1)
    with server.client() as client:
        got = events(client.post("/caption", files={"image": images[2]}, data={"stream": "true"}).text)
    assert "".join(event["delta"] for event in got[:-1]) == expected
    assert got[-1]["captions"][0]["text"] == expected and len(got) > 2


def test_match_embed_and_explain(server: Running, predictor: blip2.Predictor, images: list[bytes]) -> None:
    texts = ["a rose", "two rabbits"]
    with server.client() as client:
        matches = client.post("/match", files={"image": images[0]}, data={"texts": texts}).json()["matches"]
        for match, fit in zip(matches, predictor.match(images[0], texts), strict=True):
            assert match["probability"] == pytest.approx(fit.probability, abs=1e-4)
            assert match["similarity"] == pytest.approx(fit.similarity, abs=1e-4)
        vectors = client.post("/embed", json={"images": [data_url(images[0])], "texts": texts}).json()
        assert vectors["images"][0][0] == pytest.approx(predictor.embed(images[0])[0].tolist(), abs=1e-4)
        assert len(vectors["texts"]) == 2
        form = client.post("/embed", files=[("images", images[0]), ("images", images[1])])
        assert len(form.json()["images"]) == 2
        raw = {"layer": "0", "head": "0", "query": "1"}
        reply = client.post("/explain", files={"image": images[0]}, data={"text": "a rose"} | raw).json()
        assert [word["text"] for word in reply["words"]] == ["a", "rose"]
        assert len(reply["words"][0]["heat"]) == len(reply["attention"]) and reply["width"] > 0
        layers = reply["attention_shape"][0]
        beyond = client.post("/explain", files={"image": images[0]}, data=raw | {"layer": str(layers)})
        assert beyond.status_code == 400 and "layers" in beyond.json()["error"]["message"]


def test_an_answer_in_a_conversation_is_explained_with_the_turns_before_it(
    server: Running, predictor: blip2.Predictor, images: list[bytes]
) -> None:
    chat = predictor.chat(images[0])
    chat.send("is there a rose?", num_beams=1)
    answer = chat.send("what color is it?", num_beams=1)
    (first, second) = chat.turns
    payload = {"image": data_url(images[0]), "question": second[0], "answer": str(answer)}
    turns = [{"question": first[0], "answer": str(first[1])}]
    with server.client() as client:
        reply = client.post("/explain", json=payload | {"turns": turns}).json()
        alone = client.post("/explain", json=payload).json()
        own = client.post("/explain", json={k: v for k, v in payload.items() if k != "answer"}).json()
        wrong = client.post("/explain", json={"image": payload["image"], "turns": turns})
        form = client.post("/explain", files={"image": images[0]}, data={"question": "a", "turns": "b"})
    logprob = sum(word["logprob"] for word in reply["words"])
    assert logprob == pytest.approx(sum(answer.token_logprobs[:-1]), abs=1e-3)
    assert logprob != pytest.approx(sum(word["logprob"] for word in alone["words"]), abs=1e-5)
    again = predictor.explain(images[0], question=second[0], answer=answer, turns=chat.turns[:1])
    assert reply["words"][0]["heat"][0] == pytest.approx(again.words[0].heat[0].tolist(), abs=1e-3)
    assert own["text"] == predictor.ask(images[0], second[0])
    assert wrong.status_code == form.status_code == 400


def test_a_stream_goes_on_while_a_large_picture_is_made_small_for_explain(
    server: Running, images: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = io.BytesIO()
    Image.new("RGB", (3000, 2000), "navy").save(file, "PNG")
    entered, opened = threading.Event(), threading.Event()
    decode = server.engine.workers.decode

    def slow(content: bytes, **options: Any) -> DecodedFile:
        if content == file.getvalue():
            entered.set()
            assert opened.wait(60)
        return decode(content, **options)

    monkeypatch.setattr(server.engine.workers, "decode", slow)
    with server.client() as client, ThreadPoolExecutor(1) as pool:
        payload = {"files": {"image": file.getvalue()}, "data": {"text": "a blue square"}}
        explaining = pool.submit(client.post, "/explain", **payload)  # type: ignore[arg-type]
        assert entered.wait(60)
        try:
            got = events(client.post("/caption", files={"image": images[2]}, data={"stream": "true"}).text)
            assert len(got) > 2 and not explaining.done()
        finally:
            opened.set()
        reply = explaining.result(60).json()
    assert (reply["width"], reply["height"]) == (3000, 2000) and len(reply["words"]) == 3


@pytest.mark.parametrize("folder", ["generator_folder", "t5_folder"])
def test_tokens_add_up_to_their_text(folder: str, request: pytest.FixtureRequest) -> None:
    tokenizer = blip2.load(request.getfixturevalue(folder), device="cpu").generator.tokenizer
    ids = tokenizer.encode("a photo of two dogs and a cat", frame=False)
    pairs = zip(ids, [None, *ids])
    assert "".join(token_text(tokenizer.decode, i, before) for i, before in pairs) == tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_beams": 0}, "num_beams"),
        ({"num_beams": 11}, "allows 10"),
        ({"max_new_tokens": 257}, "allows 256"),
        ({"num_return_sequences": 9, "do_sample": True}, "allows 8"),
        ({"nonsense": 1}, "nonsense"),
        ({"num_beams": "5"}, "num_beams"),
        ({"early_stopping": "soon"}, "early_stopping"),
        ({"eos_token_id": [-1]}, "eos_token_id"),
        ({"do_sample": False, "top_k": 3}, "do_sample"),
        ({"num_return_sequences": 2, "num_beams": 1}, "num_return_sequences"),
        ({"temperature": 0.5, "num_beams": 2}, "do_sample"),
        ({"stream": True, "num_beams": 2}, "stream"),
        ({"image": "http://example.org/a.png"}, "fetches no images"),
        ({"image": "file:///etc/passwd"}, "data: URL"),
        ({"image": "data:image/png;base64,@@@"}, "base64"),
        ({"image": "data:image/png;base64,"}, "empty"),
        ({"image": "data:image/png;base64,QUJD"}, "no image"),
        ({"prompt": "x" * 8001}, "8,001"),
        ({"prompt": "word " * 600}, "room"),
        ({"beams": 3}, "did you mean num_beams?"),
        (
            {"early_stopping": "no"},
            "early_stopping: Input should be a valid boolean, or Input should be 'never'",
        ),
        ({"eos_token_id": [*range(65)]}, "eos_token_id: List should have at most 64"),
        ({"length_penalty": 1e308}, "less than or equal to 50"),
    ],
    ids=str,
)
def test_what_is_wrong_is_reported(
    server: Running, images: list[bytes], fields: dict[str, Any], message: str
) -> None:
    with server.client() as client:
        answer = client.post("/caption", json={"image": data_url(images[0])} | fields)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"], answer.text


def test_other_wrong_requests(server: Running, images: list[bytes]) -> None:
    with server.client() as client:
        cases = [
            (client.post("/caption", content=b"x", headers={"content-type": "text/plain"}), 415),
            (client.post("/caption", content=b"{", headers={"content-type": "application/json"}), 400),
            (client.post("/caption", data={"num_beams": "1"}), 415),
            (client.post("/caption", files={"other": images[0]}), 400),
            (client.post("/caption", files=[("image", images[0]), ("image", images[0])]), 400),
            (client.post("/caption", files={"image": images[0]}, data={"num_beams": ["1", "2"]}), 400),
            (
                client.post(
                    "/caption", content=b"--x", headers={"content-type": "multipart/form-data; boundary=x"}
                ),
                400,
            ),
            (client.post("/caption", content=b"-", headers={"content-type": "multipart/form-data"}), 400),
            (
                client.post(
                    "/caption", content=b"x" * 20_000_001, headers={"content-type": "application/json"}
                ),
                413,
            ),
            (client.get("/caption"), 405),
            (client.get("/nowhere"), 404),
            (client.post("/embed", json={}), 400),
        ]
    for answer, status in cases:
        assert answer.status_code == status, answer.text
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]


class Grows(list[int]):
    """A row's ids to which the engine, on its own thread, adds the next one just after they were counted."""

    def __init__(self, now: list[int], soon: list[int]) -> None:
        super().__init__(now)
        self._soon = soon

    def __len__(self) -> int:
        length = super().__len__()
        if self._soon:
            self.append(self._soon.pop())
        return length


def test_a_token_is_not_taken_for_the_end_that_comes_after_it(predictor: blip2.Predictor) -> None:
    tokenizer = predictor.generator.tokenizer
    (word,), end = tokenizer.encode(" rose", frame=False), 2
    row = SampledSequence(
        GenerationOptions(), [], None, (end,), ids=Grows([word], [end]), logprobs=[-1.0, -2.0]
    )
    choice = GrowingText(StreamDetokenizer(tokenizer.decode), [])
    assert choice.add(row) == "rose" and choice.finish_reason is None
    assert choice.add(row) == "" and choice.finish_reason == "stop"
    assert (choice.text, choice.count, len(choice.tokens)) == ("rose", 2, 1)


# --- the openai client ---------------------------------------------------------------------------------------------


def about(image: bytes, text: str | None) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": data_url(image)}}]
    return {"role": "user", "content": parts + ([{"type": "text", "text": text}] if text else [])}


def test_openai_captions_asks_and_chats(
    server: Running, predictor: blip2.Predictor, images: list[bytes]
) -> None:
    client = server.openai()
    assert [model.id for model in client.models.list()] == ["default"]
    assert client.models.retrieve("default").id == "default"

    caption = client.chat.completions.create(model="default", messages=[about(images[0], None)])
    assert caption.choices[0].message.content == predictor.caption(images[0], num_beams=1)
    assert caption.choices[0].finish_reason == "stop" and caption.usage and caption.usage.total_tokens > 0

    chat = predictor.chat(images[1])
    first = chat.send("what is it?", num_beams=1)
    messages: Any = [about(images[1], "what is it?")]
    message = client.chat.completions.create(model="default", messages=messages).choices[0].message.content
    assert message == first
    second = chat.send("how many are there?", num_beams=1)
    messages += [
        {"role": "assistant", "content": message},
        {"role": "user", "content": "how many are there?"},
    ]
    assert (
        client.chat.completions.create(model="default", messages=messages).choices[0].message.content
        == second
    )
    messages = [{"role": "system", "content": "Be brief."}, about(images[1], "what is it?")]
    warned = client.chat.completions.create(model="default", messages=messages)
    assert warned.choices[0].message.content == first and "system" in str(warned.model_extra)
    chunks = client.chat.completions.create(model="default", messages=messages, stream=True)
    assert all("system" in str(chunk.model_extra) for chunk in chunks)


def test_openai_streams_with_usage_and_logprobs(
    server: Running, predictor: blip2.Predictor, images: list[bytes]
) -> None:
    client = server.openai()
    expected = predictor.caption(images[2], num_beams=1)
    stream = client.chat.completions.create(
        model="default",
        messages=[about(images[2], None)],  # type: ignore[list-item]
        stream=True,
        logprobs=True,
        top_logprobs=3,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == expected and len(pieces) > 3
    assert chunks[-1].usage and chunks[-1].usage.completion_tokens == len(expected.tokens)
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    noted = [
        t for c in chunks if c.choices and c.choices[0].logprobs for t in c.choices[0].logprobs.content or []
    ]
    assert [token.logprob for token in noted] == pytest.approx(expected.token_logprobs[:-1], abs=1e-3)
    assert all(len(token.top_logprobs) == 3 for token in noted)
    whole = client.chat.completions.create(
        model="default",
        messages=[about(images[2], None)],
        logprobs=True,
        top_logprobs=3,  # type: ignore[list-item]
    )
    assert whole.choices[0].logprobs and len(whole.choices[0].logprobs.content or []) == len(noted)


def test_openai_sampling_stop_and_length(
    server: Running, predictor: blip2.Predictor, images: list[bytes]
) -> None:
    client = server.openai()
    kind: Any = {"model": "default", "messages": [about(images[2], None)]}
    several = client.chat.completions.create(**kind, n=3, temperature=0.9, top_p=0.95, seed=5)
    expected = predictor.caption(
        images[2], num_return_sequences=3, do_sample=True, temperature=0.9, top_p=0.95, seed=5
    )
    assert [choice.message.content for choice in several.choices] == expected
    short = client.chat.completions.create(**kind, max_completion_tokens=2)
    assert short.choices[0].finish_reason == "length" and short.usage and short.usage.completion_tokens == 2
    assert client.chat.completions.create(**kind, max_tokens=5000).choices[0].finish_reason == "stop"
    whole = predictor.caption(images[2], num_beams=1)
    stop = whole[len(whole) // 2 :][:3]
    cut = client.chat.completions.create(**kind, stop=[stop, "never written"])
    assert (
        cut.choices[0].message.content == whole[: whole.index(stop)]
        and cut.choices[0].finish_reason == "stop"
    )
    streamed = list(client.chat.completions.create(**kind, stop=stop, stream=True, logprobs=True))
    assert "".join(c.choices[0].delta.content or "" for c in streamed) == whole[: whole.index(stop)]
    cut = client.chat.completions.create(**kind, stop=stop, logprobs=True)
    noted = [token for c in streamed if (part := c.choices[0].logprobs) for token in part.content or []]
    assert cut.choices[0].logprobs and noted == cut.choices[0].logprobs.content  # what was not shown included


def test_openai_completions(server: Running, predictor: blip2.Predictor, images: list[bytes]) -> None:
    client = server.openai()
    image = {"image": data_url(images[0])}
    expected = predictor.caption(images[0], num_beams=1, prompt="a photo of a")
    made = client.completions.create(model="default", prompt="a photo of a", logprobs=2, extra_body=image)
    assert made.choices[0].text == expected and made.choices[0].logprobs
    assert made.choices[0].logprobs.token_logprobs == pytest.approx(expected.token_logprobs[:-1], abs=1e-3)
    offsets = made.choices[0].logprobs.text_offset or []
    for offset, word in zip(offsets, made.choices[0].logprobs.tokens or [], strict=True):
        assert expected[offset:].startswith(word if offset else word.lstrip())
    pieces = client.completions.create(model="default", prompt="a photo of a", stream=True, extra_body=image)
    assert "".join(chunk.choices[0].text for chunk in pieces if chunk.choices) == expected


def test_openai_completions_of_several_prompts(
    server: Running, predictor: blip2.Predictor, images: list[bytes]
) -> None:
    """A choice for each prompt and each of its n, numbered as OpenAI does: all of the first prompt's come first."""
    client = server.openai()
    image = {"image": data_url(images[0])}
    prompts = ["a photo of", "a photo of a red", ""]
    alone = [
        client.completions.create(model="default", prompt=entry, logprobs=0, extra_body=image)
        for entry in prompts
    ]
    made = client.completions.create(model="default", prompt=prompts, logprobs=0, extra_body=image)
    assert [choice.index for choice in made.choices] == [0, 1, 2]
    for choice, one, prompt in zip(made.choices, alone, prompts, strict=True):
        assert choice.text == one.choices[0].text == predictor.caption(images[0], num_beams=1, prompt=prompt)
        assert choice.finish_reason == one.choices[0].finish_reason
        assert choice.logprobs and one.choices[0].logprobs
        assert choice.logprobs.tokens == one.choices[0].logprobs.tokens
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert getattr(made.usage, name) == sum(getattr(one.usage, name) for one in alone)

    sampled: Any = {"n": 2, "temperature": 0.9, "seed": 4, "max_tokens": 9, "extra_body": image}
    drawn = client.completions.create(model="default", prompt=prompts, **sampled)
    same: Any = {
        "do_sample": True,
        "num_return_sequences": 2,
        "temperature": 0.9,
        "seed": 4,
        "max_new_tokens": 9,
    }
    expected = [text for prompt in prompts for text in predictor.caption(images[0], prompt=prompt, **same)]
    assert [(choice.index, choice.text) for choice in drawn.choices] == list(enumerate(expected))
    streamed = [""] * 6
    for chunk in client.completions.create(model="default", prompt=prompts, stream=True, **sampled):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == expected
    stopped = client.completions.create(model="default", prompt=prompts, stop=" ", extra_body=image)
    assert [choice.text for choice in stopped.choices] == [one.choices[0].text.split(" ")[0] for one in alone]

    wrong: list[tuple[Any, str]] = [
        ([1, 2, 3], "send the prompt as text"),
        ([[1, 2], [3]], "send the prompt as text"),
        ([], "at least 1"),
        (["a photo of"] * 9, "allows 8"),
        (["a photo of", "word " * 600], "room"),
    ]
    for prompt, message in wrong:
        with pytest.raises(openai.BadRequestError, match=message):
            client.completions.create(model="default", prompt=prompt, extra_body=image)


def test_openai_errors(server: Running, images: list[bytes]) -> None:
    client = server.openai()

    def refused(kind: type[openai.APIStatusError], message: str, **changed: Any) -> None:
        call: Any = {"model": "default", "messages": [about(images[0], "what is it?")]} | changed
        with pytest.raises(kind) as refusal:
            client.chat.completions.create(**call)
        assert message in str(refusal.value) and refusal.value.request_id

    refused(openai.NotFoundError, "no model", model="gpt-5")
    refused(openai.BadRequestError, "about an image", messages=[{"role": "user", "content": "hello"}])
    refused(openai.BadRequestError, "temperature", n=2, temperature=0)
    refused(openai.BadRequestError, "tools", tools=[{"type": "function", "function": {"name": "f"}}])
    refused(openai.BadRequestError, "effort: there is no such field", reasoning_effort="low")
    refused(openai.BadRequestError, "here; did you mean max_tokens?", extra_body={"max_token": 3})
    refused(openai.BadRequestError, "response_format.type", response_format={"type": "json_object"})
    refused(openai.BadRequestError, "stop: List", stop=list("abcde"))
    for part, refusal in (
        ({"type": "input_audio"}, "content.0: Input tag"),
        ({"type": "text"}, "content.0.text: "),
    ):
        refused(openai.BadRequestError, refusal, messages=[{"role": "user", "content": [part]}])
    refused(openai.BadRequestError, "presence_penalty", presence_penalty=0.5)
    refused(openai.BadRequestError, "logprobs", top_logprobs=2)
    refused(openai.BadRequestError, "allows 8", n=9)
    two = about(images[0], "which?")
    two["content"] += about(images[1], None)["content"]
    refused(openai.BadRequestError, "one image", messages=[two])
    refused(
        openai.BadRequestError,
        "user's",
        messages=[about(images[0], "a"), {"role": "assistant", "content": "b"}],
    )
    with pytest.raises(openai.BadRequestError, match="extra_body"):
        client.completions.create(model="default", prompt="a photo of")


def test_fields_that_clients_send_by_default_are_accepted(
    server: Running, predictor: blip2.Predictor, images: list[bytes]
) -> None:
    client = server.openai()
    question: Any = [about(images[0], "what is it?")]
    expected = predictor.ask(images[0], "what is it?", num_beams=1)
    for harmless in (
        {"n": None, "stream": None, "temperature": None, "max_tokens": None, "stop": None},
        {"temperature": 0, "top_p": 1, "n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "seed": 1},
        {"temperature": 1e-300, "top_p": 1},
        {"top_p": 0},
        {"response_format": {"type": "text"}, "tools": [], "tool_choice": "none", "modalities": ["text"]},
        {"logit_bias": {}, "parallel_tool_calls": True, "service_tier": "auto", "store": False},
        {"user": "a", "safety_identifier": "b", "prompt_cache_key": "c", "metadata": {"d": "e"}},
        {"max_tokens": 10**30, "stop": []},
    ):
        made = client.chat.completions.create(model="default", messages=question, **harmless)
        assert made.choices[0].message.content == expected, harmless
    made = client.completions.create(
        model="default", prompt=["a photo of"], best_of=1, extra_body={"image": data_url(images[0])}
    )
    assert made.choices[0].text == predictor.caption(images[0], num_beams=1)


def test_images_and_questions_in_any_order(
    server: Running, predictor: blip2.Predictor, images: list[bytes]
) -> None:
    client = server.openai()

    def answer(*messages: Any) -> str | None:
        return client.chat.completions.create(model="default", messages=messages).choices[0].message.content

    first, second = about(images[0], None), about(images[1], None)
    question: Any = {"role": "user", "content": "what is it?"}
    expected = [predictor.ask(image, "what is it?", num_beams=1) for image in images[:2]]
    assert expected[0] != expected[1]
    assert answer(first, question) == answer(question, first) == expected[0]
    message: Any = {"role": "assistant", "content": expected[0]}
    assert answer(about(images[0], "what is it?"), message, second, question) == expected[1]
    lines = about(images[0], "what is it?")
    url = lines["content"][0]["image_url"]
    url["url"] = url["url"].replace("data:", "DATA:").rstrip("=")
    url["url"] = "\n".join(url["url"][i : i + 76] for i in range(0, len(url["url"]), 76))
    assert answer(lines) == expected[0]


# --- state ---------------------------------------------------------------------------------------------------------


def test_state_and_numbers(server: Running) -> None:
    with server.client() as client:
        assert client.get("/health").json() == {"status": "ok"}
        assert client.get("/ready").status_code == 200
        numbers = client.get("/metrics").text
    for name in (
        "requests_total",
        "request_seconds_bucket",
        "waiting",
        "running",
        "tokens_total",
        "image_cache_hits",
    ):
        assert f"blip2_{name}" in numbers
