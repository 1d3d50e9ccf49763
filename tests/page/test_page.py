"""The page in a real browser: every control, what arrives while it is written, and what goes wrong."""

from __future__ import annotations

import base64
import io
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from driving import ROOT, Server, Watched, start, until
from PIL import Image

import blip2

EXAMPLE = ROOT / "blip2" / "serve" / "page" / "examples" / "triangle-and-square.jpg"
WIDE, NARROW = {"width": 1280, "height": 860}, {"width": 375, "height": 700}


def caption(page: Any) -> str:
    """The caption, once it is there."""
    page.wait_for_selector("#caption .word")
    return " ".join(page.locator("#caption .word").all_inner_texts())


def captions(picture: Path) -> list[blip2.Caption]:
    """The captions that the page shows, from Python."""
    return blip2.load(device="cpu").caption(picture, num_return_sequences=4)


def choose(page: Any) -> str:
    page.click('[data-example="triangle-and-square.jpg"]')
    return caption(page)


def answer(page: Any, question: str) -> str:
    """Ask, and the answer once it is complete."""
    turns = page.locator(".turn").count()
    page.fill("#ask-text", question)
    page.press("#ask-text", "Enter")
    last = page.locator(".turn").nth(turns)
    last.locator(".tools").wait_for()
    return str(last.locator(".answer").inner_text())


def give(page: Any, event: str, content: bytes, name: str = "mine.jpg", kind: str = "image/jpeg") -> None:
    """Drop or paste a file, as the browser would."""
    page.evaluate(
        """([event, base64, name, type]) => {
            const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
            const data = new DataTransfer();
            data.items.add(new File([bytes], name, {type}));
            const made = event === "drop"
                ? new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true})
                : new ClipboardEvent("paste", {clipboardData: data, bubbles: true, cancelable: true});
            document.body.dispatchEvent(made);
        }""",
        [event, base64.b64encode(content).decode(), name, kind],
    )


def test_an_example_is_captioned_with_alternatives(watched: Watched) -> None:
    page = watched.page
    until(page, "document.getElementById('model').textContent === 'default'")
    text = choose(page)
    assert "triangle" in text
    others = page.locator("#alternatives li")
    assert others.count() == 4
    shown = page.locator(".alternative").all_inner_texts()
    shares = [float(share.split()[0]) for share in page.locator(".share").all_inner_texts()]
    expected = {str(c): 100 * math.exp(sum(c.token_logprobs)) for c in captions(EXAMPLE)}
    assert shares == pytest.approx([expected[text] for text in shown], rel=0.1)
    assert shares == sorted(shares, reverse=True) and sum(shares) <= 100
    other = page.locator(".alternative").nth(2)
    other.click()
    assert caption(page) == other.inner_text()
    assert other.get_attribute("aria-current") == "true"
    page.click("#caption-copy")
    until(page, "document.getElementById('status').textContent === 'Copied.'")
    assert page.evaluate("navigator.clipboard.readText()") == other.inner_text()
    page.click("#caption-again")
    until(page, f"document.getElementById('caption').innerText.trim() === {text!r}")


@pytest.mark.parametrize("way", ["choose", "drop", "paste"])
def test_a_picture_comes_in(watched: Watched, way: str) -> None:
    page = watched.page
    if way == "choose":
        page.set_input_files("#file", EXAMPLE)
    else:
        give(page, way, EXAMPLE.read_bytes())
    assert "triangle" in caption(page)
    until(page, "document.getElementById('picture').naturalWidth === 384")
    page.click("#another")
    assert page.is_visible("#drop") and page.is_hidden("#words")
    assert page.evaluate("document.activeElement.id") == "file"


def test_a_new_picture_replaces_the_old_one_with_its_conversation(watched: Watched) -> None:
    page = watched.page
    first = choose(page)
    answer(page, "is there a square?")
    give(page, "paste", (ROOT / "examples" / "rose.jpg").read_bytes())
    until(page, f"document.getElementById('caption').innerText.trim() !== {first!r}")
    assert "triangle" not in caption(page)
    assert page.locator(".turn").count() == 0


def test_asking_copying_and_again(watched: Watched) -> None:
    page = watched.page
    choose(page)
    answers = [answer(page, "is there a triangle?"), answer(page, "is there a bus?")]
    assert set(answers) <= {"yes", "no"}
    assert page.locator(".question").all_inner_texts() == ["is there a triangle?", "is there a bus?"]
    page.locator(".turn").nth(1).get_by_role("button", name="Copy").click()
    until(page, f"navigator.clipboard.readText().then((text) => text === '{answers[1]}')")
    with page.expect_request("**/v1/chat/completions") as request:
        page.locator(".retry").click()
    messages = request.value.post_data_json["messages"]
    # a question asked again is not sent twice
    assert [m["role"] for m in messages] == ["user", "assistant", "user"]
    assert messages[1]["content"] == answers[0]
    page.locator(".turn").nth(1).locator(".tools").wait_for()
    assert page.locator(".answer").all_inner_texts() == answers


def test_ideas_ask(watched: Watched) -> None:
    page = watched.page
    choose(page)
    page.locator("#ideas button").first.click()
    page.wait_for_selector(".turn .tools")
    assert page.locator(".question").inner_text() == "what is in the picture?"
    assert page.is_hidden("#ideas")


def test_an_answer_grows_and_can_be_stopped(watched: Watched, server: Server) -> None:
    page = watched.page
    choose(page)
    server.slow(0.4)
    page.evaluate(
        """() => {
            window.grown = [];
            new MutationObserver(() => {
                const text = document.querySelector(".answer")?.textContent;
                if (text && text !== window.grown.at(-1)) window.grown.push(text);
            }).observe(document.getElementById("talk"), {childList: true, subtree: true, characterData: true});
        }"""
    )
    page.fill("#ask-text", "where is the triangle?")
    page.click("#ask-send")
    page.wait_for_selector(".tools")
    grown = page.evaluate("window.grown")
    assert grown[0] == "Thinking …" and len(grown) >= 3, grown
    assert all(later.startswith(earlier) for earlier, later in pairwise(grown[1:])), grown
    page.fill("#ask-text", "where is the triangle?")
    page.click("#ask-send")
    until(page, "document.querySelectorAll('.answer:not(.waiting)').length === 2")
    page.click("#ask-stop")
    second = page.locator(".turn").nth(1)
    second.locator(".tools").wait_for()
    assert second.locator(".why").inner_text() == "Stopped."
    stopped = second.locator(".answer").inner_text()
    assert page.is_visible("#ask-send") and page.is_hidden("#ask-stop")
    server.slow(0)
    second.locator(".retry").click()
    until(page, "document.querySelector('.why') === null && document.querySelectorAll('.tools').length === 2")
    whole = page.locator(".answer").nth(1).inner_text()
    assert whole.startswith(stopped) and len(whole) > len(stopped) > 0


def heat_peak(page: Any) -> tuple[float, float]:
    """The brightest point of the heat, as shares of the picture's width and height."""
    x, y = page.evaluate(
        """() => {
            const canvas = document.getElementById("heat");
            const {data, width, height} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
            let best = 0;
            for (let i = 0; i < data.length; i += 4) if (data[i + 3] > data[best + 3]) best = i;
            return [(best / 4) % width / width, Math.floor(best / 4 / width) / height];
        }"""
    )
    return x, y


def test_where_it_looked(watched: Watched) -> None:
    page = watched.page
    choose(page)
    page.locator("#caption .word", has_text="triangle").first.click()
    page.wait_for_selector("#heat:not([hidden])")
    assert page.inner_text("#where-text") == "Where “triangle” comes from"
    x, y = heat_peak(page)
    assert x < 0.5 < y  # the triangle is below on the left
    drawn, picture = page.locator("#heat").bounding_box(), page.locator("#picture").bounding_box()
    assert drawn == pytest.approx(picture, abs=1)
    page.click("#raw summary")
    before = page.evaluate("document.getElementById('heat').toDataURL()")
    page.locator("#layer").fill("3")
    page.locator("#head").fill("2")
    page.locator("#query").fill("7")
    assert [page.inner_text(f"#{name}-now") for name in ("layer", "head", "query")] == ["3", "2", "7"]
    page.click("#raw-show")
    until(page, "document.getElementById('where-text').textContent.startsWith('What query 7')")
    assert page.evaluate("document.getElementById('heat').toDataURL()") != before
    page.click("#plain")
    assert page.is_hidden("#heat") and page.locator('.word[aria-pressed="true"]').count() == 0
    answer(page, "what is in the picture?")
    page.locator(".answer .word").first.click()
    page.wait_for_selector("#heat:not([hidden])")
    page.locator(".answer .word").first.click()  # the same word again
    assert page.is_hidden("#heat")
    first = page.inner_text(".answer")
    answer(page, "is there a square?")
    with page.expect_request("**/explain") as request:
        page.locator(".turn").nth(1).locator(".word").first.click()
    assert request.value.post_data_json["turns"] == [{"question": "what is in the picture?", "answer": first}]
    page.wait_for_selector("#heat:not([hidden])")


def test_settings_are_followed(watched: Watched) -> None:
    page = watched.page
    choose(page)
    page.evaluate(
        """() => {
            window.sent = [];
            const real = window.fetch;
            window.fetch = (path, options) => {
                const {body} = options;
                window.sent.push(body instanceof FormData ? Object.fromEntries(body) : JSON.parse(body));
                return real(path, options);
            };
        }"""
    )

    def sent(count: int) -> Any:
        until(page, f"window.sent.length === {count}")
        return page.evaluate("window.sent.at(-1)")

    page.click("#settings summary")
    page.locator("#beams").fill("2")
    assert page.inner_text("#beams-now") == "2"
    form = sent(1)
    assert (form["num_beams"], form["num_return_sequences"], form["max_new_tokens"]) == ("2", "2", "30")
    page.check('input[value="sample"]')
    assert page.is_visible("#temperature") and page.is_hidden("#beams")
    page.locator("#temperature").fill("0.3")
    form = sent(3)
    assert (form["temperature"], form["do_sample"]) == ("0.3", "true") and "num_beams" not in form
    page.locator("#length").fill("5")
    assert sent(4)["max_new_tokens"] == "5"
    caption(page)
    answer(page, "is there a triangle?")
    assert (sent(5)["temperature"], sent(5)["max_tokens"]) == (0.3, 5)


def test_the_code_it_shows_does_the_same(watched: Watched, tmp_path: Path) -> None:
    page = watched.page
    text = choose(page)
    page.click("#code summary")
    (tmp_path / EXAMPLE.name).write_bytes(EXAMPLE.read_bytes())
    page.click("#code-copy")
    until(page, "document.getElementById('status').textContent === 'Copied.'")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == page.inner_text("#code-text") and copied.startswith("curl ")
    done = subprocess.run(["sh", "-c", copied], cwd=tmp_path, capture_output=True, text=True)
    if done.returncode != 127:  # no curl here
        assert text in done.stdout, done.stderr
    answer(page, 'is it the fox\'s "triangle"?')
    page.click("#code-python")
    code = page.inner_text("#code-text")
    if pytest.importorskip("requests"):
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_a_corrupt_picture_is_reported_in_words_and_the_next_one_works(watched: Watched) -> None:
    page = watched.page
    give(page, "drop", EXAMPLE.read_bytes()[:3000], "broken.jpg")
    page.wait_for_selector("#trouble:not([hidden])")
    assert "truncated" in page.inner_text("#trouble-text")
    assert page.inner_text("#waiting") == ""
    watched.expect("status of 400")
    give(page, "drop", b"no picture at all", "notes.png", "image/png")
    page.wait_for_selector("#unshown:not([hidden])")
    until(page, "document.getElementById('trouble-text').textContent.includes('no image')")
    assert "b'" not in page.inner_text("#trouble-text")
    watched.expect("status of 400")
    give(page, "drop", EXAMPLE.read_bytes())
    assert "triangle" in caption(page) and page.is_hidden("#trouble") and page.is_hidden("#unshown")


def test_what_a_model_or_a_file_says_stays_text(watched: Watched) -> None:
    page = watched.page
    evil = "<img src=x onerror=alert(1)>"
    give(page, "drop", EXAMPLE.read_bytes(), f"{evil}'.jpg")
    caption(page)
    answer(page, evil)
    assert page.locator(".question").inner_text() == evil
    page.click("#code summary")
    assert evil in page.inner_text("#code-text")
    assert page.locator("#talk img, #code img").count() == 0


def test_keys_alone_are_enough(watched: Watched) -> None:
    page = watched.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "file"
    for _ in range(2):
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # the second example
    assert "triangle" in caption(page)
    page.locator("#caption .word").nth(1).focus()
    page.keyboard.press("Space")
    page.wait_for_selector("#heat:not([hidden])")
    assert "most from" in page.inner_text("#status")


def contrast_and_rules(page: Any) -> list[str]:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    violations = axe.Axe().run(page).response["violations"]
    return [f"{rule['id']}: {[node['html'][:120] for node in rule['nodes']]}" for rule in violations]


def test_a_caption_that_may_be_wrong_has_a_line_under_it(watched: Watched) -> None:
    page = watched.page
    advice = "this looks unlike what the model knows; try another"

    def doubtful(route: Any) -> None:
        response = route.fetch()
        route.fulfill(response=response, json=response.json() | {"warnings": [advice]})

    page.route("**/caption", doubtful)
    choose(page)
    until(page, "!document.getElementById('caption-warning').hidden")
    assert page.locator("#caption-warning").inner_text() == f"It may well be wrong: {advice}."
    assert page.locator("#status").inner_text().endswith(f"{advice}.")
    assert contrast_and_rules(page) == []
    page.unroute("**/caption")
    page.click("#caption-again")
    until(page, "document.getElementById('caption-warning').hidden")
    caption(page)
    assert page.is_hidden("#caption-warning")


@pytest.mark.parametrize(
    "watched",
    [
        {"color_scheme": "light", "viewport": WIDE},
        {"color_scheme": "dark", "viewport": WIDE},
        {"color_scheme": "light", "viewport": NARROW},
        {"color_scheme": "dark", "viewport": NARROW},
    ],
    indirect=True,
    ids=["light", "dark", "light-narrow", "dark-narrow"],
)
def test_accessible_in_every_state_and_nothing_sticks_out(watched: Watched) -> None:
    page = watched.page
    until(page, "document.getElementById('model').textContent")
    assert contrast_and_rules(page) == []
    choose(page)
    answer(page, "is there a triangle?")
    page.locator("#caption .word").nth(1).click()
    page.wait_for_selector("#heat:not([hidden])")
    for name in ("raw", "settings", "code"):
        page.click(f"#{name} summary")
    page.locator("#trouble").evaluate(
        "(box) => { box.hidden = false; box.firstElementChild.textContent = 'It broke.'; }"
    )
    assert contrast_and_rules(page) == []
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    corner = Image.open(io.BytesIO(page.screenshot())).convert("L").getpixel((3, 3))
    dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    assert isinstance(corner, int) and (corner < 128) == dark


def test_a_key_is_requested_and_kept_in_memory_alone(watched: Watched) -> None:
    page = watched.page
    refusal = {"error": {"message": "an API key is needed", "type": "authentication_error"}}
    seen: list[str | None] = []

    def door(route: Any) -> None:
        seen.append(route.request.headers.get("authorization"))
        if seen[-1] == "Bearer open sesame":
            route.continue_()
        else:
            route.fulfill(status=401, json=refusal)

    page.route("**/caption", door)
    page.click('[data-example="triangle-and-square.jpg"]')
    page.wait_for_selector("#key-dialog[open]")
    assert contrast_and_rules(page) == []
    page.fill("#key", "open sesame")
    page.click('#key-dialog button[value="yes"]')
    assert "triangle" in caption(page) and seen == [None, "Bearer open sesame"]
    assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
    assert "$BLIP2_API_KEY" in page.evaluate("document.getElementById('code-text').textContent")
    assert "sesame" not in page.content()
    page.reload()
    page.click('[data-example="triangle-and-square.jpg"]')
    page.wait_for_selector("#key-dialog[open]")  # forgotten
    page.click('#key-dialog button[value="no"]')
    page.wait_for_selector("#trouble:not([hidden])")
    assert "none was given" in page.inner_text("#trouble-text")
    watched.expect("status of 401")


def test_a_full_server_is_reported_in_words(watched: Watched) -> None:
    page = watched.page
    busy = {"error": {"message": "too many requests at once", "type": "overloaded_error"}}
    page.route(
        "**/caption",
        lambda route: route.fulfill(status=503, json=busy, headers={"retry-after": "7"}),
        times=1,
    )
    page.click('[data-example="triangle-and-square.jpg"]')
    page.wait_for_selector("#trouble:not([hidden])")
    assert page.inner_text("#trouble-text").startswith("The server is busy; try again in 7 s")
    watched.expect("status of 503")
    page.click("#trouble-retry")
    assert "triangle" in caption(page)


def test_the_server_going_away_in_mid_answer(watched: Watched, browser: Any, tmp_path: Path) -> None:
    """On a server of its own, which does not survive it."""
    server = start(tmp_path)
    page = watched.page
    page.goto("about:blank")
    context = browser.new_context()
    page = context.new_page()
    page.goto(server.address)
    choose(page)
    server.slow(0.5)
    page.fill("#ask-text", "what is in the picture?")
    page.click("#ask-send")
    page.wait_for_selector(".answer:not(.waiting)")
    server.process.kill()
    server.process.wait()
    page.wait_for_selector(".why")
    assert page.inner_text(".why") == "The server went away in the middle of the answer."
    assert page.inner_text(".answer") != ""  # what had come is kept
    page.click(".retry")
    until(page, "document.querySelector('.why')?.textContent.startsWith('The server cannot be reached')")
    page.click("#caption-again")
    page.wait_for_selector("#trouble:not([hidden])")
    assert page.inner_text("#trouble-text") == "The server cannot be reached. It may have been stopped."
    context.close()
