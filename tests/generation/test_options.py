"""The decoding options: one list, and the rules that Python, the command line and HTTP share."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from blip2.generation.options import GenerateKwargs, GenerationOptions, TextKind, bounds_of, make_options

ROOT = Path(__file__).parent.parent.parent
NAMES = {option.name for option in fields(GenerationOptions)}


def test_keywords_have_the_names_and_types_of_the_options() -> None:
    keywords, options = get_type_hints(GenerateKwargs), get_type_hints(GenerationOptions)
    assert keywords == {name: kind for name, kind in options.items() if name != "num_return_sequences"}
    assert GenerateKwargs.__required_keys__ == frozenset()


def test_every_option_has_help_and_names_itself_in_the_class_help() -> None:
    for option in fields(GenerationOptions):
        assert option.metadata["help"]
        assert option.metadata["help"] in (GenerationOptions.__doc__ or "")
        assert bounds_of(option).keys() <= {"ge", "gt", "le", "lt"}


def test_bounds_are_those_that_are_checked() -> None:
    for option in fields(GenerationOptions):
        for bound, value in bounds_of(option).items():
            beyond = value + {"ge": -1, "gt": 0, "le": 1, "lt": 0}[bound]
            with pytest.raises(ValueError, match=option.name):
                GenerationOptions(**{option.name: beyond})


@pytest.mark.parametrize("name", ["length_penalty", "temperature", "seed"])
@pytest.mark.parametrize("value", [10**400, float("inf"), float("nan")], ids=["huge", "inf", "nan"])
def test_a_number_beyond_all_bounds_is_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        GenerationOptions(**{name: value})  # type: ignore[arg-type]


def test_importing_the_options_needs_no_torch() -> None:
    program = "import sys, blip2.generation.options, blip2.generation\nassert not {'torch', 'numpy'} & {*sys.modules}"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_end_ids() -> None:
    ends = {None: (2,), 7: (7,), (7, 8): (7, 8), (): ()}
    for given, ids in ends.items():
        assert GenerationOptions(eos_token_id=given).end_ids((2,)) == ids
    assert GenerationOptions(eos_token_id=[7, 8]) == GenerationOptions(eos_token_id=(7, 8))


# --- rules ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "penalty"), [("caption", 1.0), ("answer", -1.0)])
def test_presets(kind: TextKind, penalty: float) -> None:
    expected = GenerationOptions(num_beams=5, length_penalty=penalty)
    assert make_options(kind) == expected
    assert make_options(kind, length_penalty=0.5).length_penalty == 0.5
    assert make_options(kind, num_beams=2, max_new_tokens=7).num_beams == 2
    nothing: dict[str, Any] = dict.fromkeys(NAMES)
    assert make_options(kind, **nothing) == expected, "None is as if left out"


@pytest.mark.parametrize(
    "options", [{"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.9}, {"do_sample": True}], ids=str
)
def test_shaping_means_sampling_by_one_beam(options: dict[str, Any]) -> None:
    made = make_options("caption", **options)
    assert (made.do_sample, made.num_beams) == (True, 1)
    assert GenerationOptions(**options).do_sample is True
    with pytest.raises(ValueError, match="num_beams=1"):
        make_options("caption", num_beams=3, **options)
    assert make_options("answer", num_return_sequences=7, **options).num_return_sequences == 7


@pytest.mark.parametrize("options", [{"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.9}], ids=str)
def test_refusing_to_sample_beside_shaping_is_an_error(options: dict[str, Any]) -> None:
    for make in (GenerationOptions, lambda **keywords: make_options("caption", **keywords)):
        with pytest.raises(ValueError, match="leave out do_sample=False"):
            make(do_sample=False, **options)
    neutral = make_options("caption", do_sample=False, temperature=1.0, top_k=0, top_p=1.0)
    assert (neutral.do_sample, neutral.num_beams) == (False, 5), "these values change nothing"


@pytest.mark.parametrize(
    "others", [{}, {"do_sample": True}, {"do_sample": False}, {"top_k": 5, "top_p": 0.5}], ids=str
)
def test_temperature_0_is_greedy(others: dict[str, Any]) -> None:
    made = make_options("caption", temperature=0, **others)
    assert (made.do_sample, made.num_beams) == (False, 1)
    assert (made.temperature, made.top_k, made.top_p) == (None, None, None)
    assert GenerationOptions(temperature=0.0, **others) == GenerationOptions()


def test_streaming_follows_one_beam() -> None:
    assert make_options("caption", stream=True).num_beams == 1
    assert make_options("caption", stream=True, num_beams=1, num_return_sequences=1).num_beams == 1
    assert make_options("answer", stream=True, top_p=0.9).do_sample is True
    with pytest.raises(ValueError, match="stream=True"):
        make_options("caption", stream=True, num_beams=3)
    with pytest.raises(ValueError, match="stream=True"):
        make_options("caption", stream=True, num_return_sequences=2, do_sample=True)


def test_more_texts_than_beams() -> None:
    assert make_options("caption", num_return_sequences=5).num_beams == 5
    with pytest.raises(ValueError, match="num_return_sequences=6 is more than num_beams=5"):
        make_options("caption", num_return_sequences=6)
    with pytest.raises(ValueError, match="num_return_sequences"):
        make_options("caption", num_return_sequences=0)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("beams", "num_beams"),
        ("max_tokens", "max_new_tokens"),
        ("sample", "do_sample"),
        ("temprature", "temperature"),
    ],
)
def test_an_unknown_option_names_the_one_that_was_meant(name: str, meant: str) -> None:
    unknown: dict[str, Any] = {name: 3}
    with pytest.raises(TypeError, match=re.escape(f"no decoding option {name!r}; did you mean {meant!r}?")):
        make_options("caption", **unknown)


def test_an_option_like_no_other_gets_the_whole_list() -> None:
    unknown: dict[str, Any] = {"max_length": 3}
    with pytest.raises(TypeError, match=r"'max_length'; there are num_beams, max_new_tokens, .*, seed"):
        make_options("caption", **unknown)
