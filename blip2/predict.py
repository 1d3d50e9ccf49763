"""What people do with a model: captions, answers, conversation, matching, embeddings. The one road from image to text.

`load` gives a `Predictor`. Its methods take whatever `images.load_image` takes, or an `EncodedImage`.
One image gives one result, a list of images a list in the same order, computed in batches.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Literal, TypeVar, Unpack, overload

import torch
from torch import Tensor

from blip2.explain import Explained, Explanation, explain
from blip2.generation.decoding import generate, stream
from blip2.generation.options import GenerateKwargs, GenerationOptions, make_options
from blip2.generation.ranking import answer_logprobs
from blip2.images import MAX_PIXELS, ImageSource, ProcessedImage, check_max_pixels, process, to_pixels
from blip2.inputs import BATCH_SIZE, Many, as_list, in_batches, is_many, open_image, unnest
from blip2.loading import LoadedModel, device_of, load_components
from blip2.matching import Matcher
from blip2.modeling.blip2 import Blip2, Blip2Matcher
from blip2.modeling.config import MODES, Mode
from blip2.modeling.kv_cache import PromptCache, concat_prompt_caches
from blip2.registry import DEFAULT, DEFAULT_FOLDER, DEFAULT_MATCHER_FOLDER, default_model
from blip2.results import Answer, Caption, EncodedImage, Match, Ranked, detokenize_stream
from blip2.text import CAPTION_PROMPT, chat_prompt, check_text, is_blank, question_prompt

Image = ImageSource | ProcessedImage | EncodedImage
Texts = str | Many[str]
Text = TypeVar("Text", Caption, Answer)


class AskKwargs(GenerateKwargs, total=False):
    """Keywords of `ask` without `stream=True`."""

    stream: Literal[False]
    batch_size: int


class CaptionKwargs(AskKwargs, total=False):
    """Keywords of `caption` without `stream=True`."""

    prompt: str


# --- loading -------------------------------------------------------------------------------------------------------


def load(
    name: str | Path | None = None,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    matcher: str | Path | None = None,
    vision: str | Path | None = None,
    language: str | Path | None = None,
    quantize: Mode | None = None,
    max_pixels: int | None = None,
) -> Predictor:
    """Load a model.

    Args:
        name: a name or alias from `blip2 models`, another name on the Hugging Face Hub, or a folder in its layout.
            None or "default": the small model that ships with the package, with its matcher.
        device: "cpu", "cuda", "mps"; "auto" takes a GPU where there is one.
        dtype: "fp32", "bf16" or "fp16". None: fp32 up to a billion parameters, bf16 above (see
            `registry.default_dtype`), whatever the file holds.
        revision: branch, tag or commit of a model on the Hub.
        matcher: the stage-1 model for `match` and `embed`, as `name`; loaded when first used.
        vision, language: the image encoder and the language model, for a checkpoint without them, as LAVIS's.
        quantize: "int8" or "int4": the bits of a stored weight, a quarter or an eighth of fp32's memory; what is
            computed between them is fp32. See docs/performance.md for what it gains and what it changes.
        max_pixels: images with more are refused before they are decoded, JPEGs are decoded at reduced scale.
            None: 89 million, which is a third of a GiB; 178,956,970 at most.

    Raises:
        ValueError: no such model, damaged or unfitting files, or a device this machine does not have.
    """
    for option, value in (("name", name), ("matcher", matcher), ("vision", vision), ("language", language)):
        if value == "":  # of a variable that was never set; it would be the current folder
            raise ValueError(f"{option} is empty; name a model or a folder")
    torch_device = device_of(device)
    max_pixels = MAX_PIXELS if max_pixels is None else check_max_pixels(max_pixels)
    shown = DEFAULT if name is None else str(name)
    if name is None or name == DEFAULT:
        default_model()  # raises where this installation has none
        if revision is not None:
            raise ValueError(
                f"revision={revision!r} is for models on the Hugging Face Hub; the default model has none"
            )
        name, matcher = DEFAULT_FOLDER, matcher or DEFAULT_MATCHER_FOLDER
    if quantize is not None and quantize not in MODES:
        raise ValueError(f"quantize is {quantize!r}; choose one of {', '.join(MODES)}")
    loaded = load_components(name, torch_device, dtype, revision, vision, language, quantize)
    load_matcher = None
    if matcher is not None:
        if isinstance(loaded.model, Blip2Matcher):
            raise ValueError(f"{name} is a matcher itself; give matcher= with a model that writes")
        load_matcher = partial(load_components, matcher, torch_device, dtype, None, quantize=quantize)
    return Predictor(shown, loaded, load_matcher, torch_device, max_pixels=max_pixels)


# --- the predictor -------------------------------------------------------------------------------------------------


class NoMatcherError(ValueError):
    """A model that writes was loaded without one that matches."""


class Predictor:
    """A model ready for use, as `blip2.load` gives it.

    `caption` and `ask` take the same keywords, `Chat.send` the options and `stream`:
        **options: how the text is decoded, by the names of `blip2.GenerationOptions` (its help lists them). Beam search
            follows five beams unless `temperature`, `top_k`, `top_p` or `do_sample` asks for sampling, at
            temperature 0 and while streaming.
        num_return_sequences: so many texts for each image, best first, as a list, also where it is 1.
        stream: for one image, an iterator over pieces of the text as they are written; together they are the text.
        batch_size: images computed at a time: speed and memory, never the result.

    An option that does not exist raises TypeError, options that contradict each other ValueError; an image that cannot
    be read raises ImageError from every method that takes images, and the message names it.
    """

    def __init__(
        self,
        name: str,
        loaded: LoadedModel,
        load_matcher: Callable[[], LoadedModel] | None,
        device: torch.device,
        *,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        """`loaded` writes, or is a matcher itself; `load_matcher` is called when a matcher is first needed."""
        self.name, self.device, self.max_pixels = name, device, max_pixels
        self._loaded, self._load_matcher = loaded, load_matcher

    def __repr__(self) -> str:
        return f"<blip2.Predictor {self.name!r} on {self.device}, {self._loaded.precision}>"

    @property
    def generator(self) -> LoadedModel:
        """The model that writes. Raises ValueError where only a matcher was loaded."""
        if isinstance(self._loaded.model, Blip2Matcher):
            raise ValueError("this model only matches; load one that writes, such as 'opt-2.7b'")
        return self._loaded

    @property
    def model(self) -> Blip2:
        """The generating model itself; packed for the CPU in bf16: `quantization.apply.unpack` it before training."""
        model = self.generator.model
        assert isinstance(model, Blip2)
        return model

    def digest(self, *, matcher: bool = False) -> str:
        """What tells the weights, as they were loaded, from all others; `matcher`: those of the matcher."""
        return (self._loaded_matcher if matcher else self._loaded).digest

    @cached_property
    def matcher(self) -> Matcher:
        """The stage-1 model, loaded when first used. Raises ValueError where there is none."""
        loaded = self._loaded_matcher
        assert isinstance(loaded.model, Blip2Matcher)
        processors = loaded.image_processor, loaded.tokenizer
        return Matcher(loaded.model, *processors, self.device, max_pixels=self.max_pixels)

    @cached_property
    def _loaded_matcher(self) -> LoadedModel:
        loaded = self._loaded
        if isinstance(loaded.model, Blip2):
            if self._load_matcher is None:
                raise NoMatcherError("this model has no matcher; name one: blip2.load(..., matcher='itm')")
            loaded = self._load_matcher()
        if not isinstance(loaded.model, Blip2Matcher):
            raise ValueError("the model given as matcher= writes text; matchers are 'itm' and 'itm-coco'")
        return loaded

    # --- writing ---

    @overload
    def encode(self, images: Image, *, batch_size: int = ...) -> EncodedImage: ...
    @overload
    def encode(self, images: Many[Image], *, batch_size: int = ...) -> list[EncodedImage]: ...
    @torch.inference_mode()
    def encode(
        self, images: Image | Many[Image], *, batch_size: int = BATCH_SIZE
    ) -> EncodedImage | list[EncodedImage]:
        """Read images once: one gives an `EncodedImage`, a list a list of them."""
        encoded: list[EncodedImage] = []
        for start, batch in in_batches(as_list(images), batch_size):
            prefix, _, sizes = self._read(batch, start)
            cache = self.model.prefill_prefix(prefix)
            for i, size in enumerate(sizes):
                row = torch.tensor([i], device=prefix.device)
                own_cache = None if cache is None else cache.batch_select_indices(row)
                encoded.append(EncodedImage(prefix[i : i + 1], own_cache, size))
        return encoded if is_many(images) else encoded[0]

    @overload
    def caption(
        self, images: Image, *, num_return_sequences: None = None, **options: Unpack[CaptionKwargs]
    ) -> Caption: ...
    @overload
    def caption(
        self, images: Image, *, num_return_sequences: int, **options: Unpack[CaptionKwargs]
    ) -> list[Caption]: ...
    @overload
    def caption(
        self, images: Many[Image], *, num_return_sequences: None = None, **options: Unpack[CaptionKwargs]
    ) -> list[Caption]: ...
    @overload
    def caption(
        self, images: Many[Image], *, num_return_sequences: int, **options: Unpack[CaptionKwargs]
    ) -> list[list[Caption]]: ...
    @overload
    def caption(
        self, images: Image, *, prompt: str = ..., stream: Literal[True], **options: Unpack[GenerateKwargs]
    ) -> Iterator[str]: ...
    def caption(
        self,
        images: Image | Many[Image],
        *,
        prompt: str = CAPTION_PROMPT,
        num_return_sequences: int | None = None,
        stream: bool = False,
        batch_size: int = BATCH_SIZE,
        **options: Unpack[GenerateKwargs],
    ) -> Caption | list[Caption] | list[list[Caption]] | Iterator[str]:
        """Describe images.

        Args:
            prompt: what the caption continues; it is not part of the caption. The default is that of the published
                captioning results; "" lets the model begin by itself.
            others: see the class.

        Returns:
            One image: a `Caption`. A list: a list of them, in order. See `num_return_sequences` and `stream`.
        """
        chosen = make_options("caption", stream=stream, num_return_sequences=num_return_sequences, **options)
        if stream:
            return self._stream(images, [prompt], chosen)
        listed = as_list(images)
        texts = self._write(Caption, listed, [prompt] * len(listed), chosen, batch_size)
        return unnest(texts, is_many(images), num_return_sequences is not None)

    @overload
    def ask(
        self, images: Image, question: str, *, num_return_sequences: None = None, **options: Unpack[AskKwargs]
    ) -> Answer: ...
    @overload
    def ask(
        self, images: Image, question: str, *, num_return_sequences: int, **options: Unpack[AskKwargs]
    ) -> list[Answer]: ...
    @overload
    def ask(
        self,
        images: Many[Image],
        question: Texts,
        *,
        num_return_sequences: None = None,
        **options: Unpack[AskKwargs],
    ) -> list[Answer]: ...
    @overload
    def ask(
        self, images: Many[Image], question: Texts, *, num_return_sequences: int, **options: Unpack[AskKwargs]
    ) -> list[list[Answer]]: ...
    @overload
    def ask(
        self, images: Image, question: str, *, stream: Literal[True], **options: Unpack[GenerateKwargs]
    ) -> Iterator[str]: ...
    def ask(
        self,
        images: Image | Many[Image],
        question: Texts,
        *,
        num_return_sequences: int | None = None,
        stream: bool = False,
        batch_size: int = BATCH_SIZE,
        **options: Unpack[GenerateKwargs],
    ) -> Answer | list[Answer] | list[list[Answer]] | Iterator[str]:
        """Answer a question about an image.

        Args:
            question: one for all images, or with a list of images a list of as many questions.
            others: see the class. The length penalty is -1 as in the published results: short answers.

        Returns:
            One image: an `Answer`. A list: a list of them, in order. See `num_return_sequences` and `stream`.

        Raises:
            ValueError: not as many questions as images, or an empty one.
        """
        chosen = make_options("answer", stream=stream, num_return_sequences=num_return_sequences, **options)
        listed = as_list(images)
        prompts = self._question_prompts(question, len(listed))
        if stream:
            return self._stream(images, prompts, chosen)
        texts = self._write(Answer, listed, prompts, chosen, batch_size)
        return unnest(texts, is_many(images), num_return_sequences is not None)

    @overload
    def rank(
        self, images: Image, question: str, answers: Many[str], *, batch_size: int = ...
    ) -> list[Ranked]: ...
    @overload
    def rank(
        self, images: Many[Image], question: Texts, answers: Many[str], *, batch_size: int = ...
    ) -> list[list[Ranked]]: ...
    @torch.inference_mode()
    def rank(
        self,
        images: Image | Many[Image],
        question: Texts,
        answers: Many[str],
        *,
        batch_size: int = BATCH_SIZE,
    ) -> list[Ranked] | list[list[Ranked]]:
        """Order answers to a question by how likely the model is to give them.

        Image and question are read once for all answers, each of which is then read after them.

        Args:
            question: one for all images, or with a list of images a list of as many questions.
            answers: what may be answered; the same one twice counts once.

        Returns:
            One image: a list of `Ranked`, the likeliest first. A list: a list of such lists.

        Raises:
            ValueError: no answers, an empty answer or question, or not as many questions as images.
        """
        offered = [] if isinstance(answers, str) else list(answers)
        if not offered or any(not isinstance(answer, str) or is_blank(answer) for answer in offered):
            raise ValueError("answers to rank: give a list of one or more texts, none of them empty")
        offered = list(dict.fromkeys(answer.strip() for answer in offered))
        ids = [self.generator.tokenizer.encode(" " + answer, frame=False) for answer in offered]
        listed = as_list(images)
        prompts = self._question_prompts(question, len(listed))
        ranked: list[list[Ranked]] = []
        for start, batch in in_batches(list(zip(listed, prompts, strict=True)), batch_size):
            prefix, cache, _ = self._read([image for image, _ in batch], start)
            prompt_ids, mask = self._prompt_ids([prompt for _, prompt in batch])
            # [B, N]
            logprobs = answer_logprobs(self.model, prefix, prompt_ids, mask, ids, prompt_cache=cache)
            for row, shares in zip(logprobs.tolist(), logprobs.softmax(-1).tolist(), strict=True):
                ranked.append(sorted(map(Ranked, offered, shares, row), key=lambda item: -item.logprob))
        return ranked if is_many(images) else ranked[0]

    def chat(self, image: Image) -> Chat:
        """Begin a conversation about an image, which is read once."""
        if is_many(image):
            raise ValueError("a conversation is about one image; begin one for each")
        return Chat(self, self.encode(image))

    def explain(
        self,
        image: ImageSource,
        *,
        text: str | None = None,
        question: str | None = None,
        answer: str | None = None,
        turns: Sequence[tuple[str, str]] | None = None,
    ) -> Explanation:
        """Where in the image each word of a caption or an answer comes from; see `blip2.explain`.

        Args:
            text: the caption to explain; None: the model's own.
            question: explain the answer to it in place of a caption.
            answer: the answer to explain; None: the model's own.
            turns: the (question, answer) pairs of a conversation before the question, as `Chat.turns`.

        Raises:
            ValueError: arguments that contradict each other, an empty text, or a quantized model.
        """
        if text is not None and question is not None:
            raise ValueError("text= is a caption; give the answer to a question as answer=")
        if question is None and (answer is not None or turns is not None):
            raise ValueError("answer= needs the question it answers, turns= the one that came next")
        if isinstance(image, EncodedImage) or is_many(image):
            raise ValueError("explain takes one image itself: encoded, it no longer shows where things were")
        picture = open_image(image, 0, self.max_pixels)
        (processed,) = process([picture], self.generator.image_processor)
        if question is None:
            prompt, written = CAPTION_PROMPT, self.caption(processed) if text is None else text
        else:
            prompt = self.asking_prompt(question, turns, answer)
            if answer is None:
                answer = self._write(Answer, [processed], [prompt], make_options("answer"), 1)[0][0]
            written = answer
        slices = self.explain_in_slices(processed.pixels[None], prompt, written)
        try:
            while True:
                next(slices)
        except StopIteration as end:
            explained: Explained = end.value
            return Explanation(explained.text, explained.words, explained.attention, picture)

    def explain_in_slices(self, pixels: Tensor, prompt: str, text: str) -> Generator[None, None, Explained]:
        """Why `text` follows `prompt` for pixels [1, 3, S, S]: yields between passes."""
        if self.generator.precision in MODES:
            raise ValueError("quantized weights pass no gradient on; load the model without quantize=")
        return explain(self.model, self.generator.tokenizer, pixels, prompt, text)

    def _read(
        self, images: Sequence[Image], start: int = 0
    ) -> tuple[Tensor, PromptCache | None, list[tuple[int, int]]]:
        """The prefix [B, Q, W] of images; their prompt cache where all of them have one; their sizes.

        start: the index of the first one in what the user passed, for messages.
        """
        width = self.model.config.language.width
        if any(isinstance(image, EncodedImage) and image.prefix.shape[-1] != width for image in images):
            raise ValueError("an encoded image comes from another model; encode it with this one")
        opened = [
            image if isinstance(image, ProcessedImage) else open_image(image, start + i, self.max_pixels)
            for i, image in enumerate(images)
            if not isinstance(image, EncodedImage)
        ]
        fresh: Iterator[EncodedImage] = iter(())
        if opened:
            pixels = to_pixels(opened, self.generator.image_processor)
            prefixes = self.model.embed_image(pixels.to(self.device)).split(1)
            fresh = (EncodedImage(prefix, None, image.size) for prefix, image in zip(prefixes, opened))
        encoded = [image if isinstance(image, EncodedImage) else next(fresh) for image in images]
        caches = [image.prompt_cache for image in encoded if image.prompt_cache is not None]
        cache = concat_prompt_caches(caches) if len(caches) == len(encoded) else None
        return torch.cat([image.prefix for image in encoded]), cache, [image.size for image in encoded]

    @torch.inference_mode()
    def _write(
        self,
        kind: type[Text],
        images: Sequence[Image],
        prompts: Sequence[str],
        options: GenerationOptions,
        batch_size: int,
    ) -> list[list[Text]]:
        """`num_return_sequences` texts for each image, which has a prompt of its own."""
        results: list[list[Text]] = []
        count, tokenizer = options.num_return_sequences, self.generator.tokenizer
        for start, batch in in_batches(list(zip(images, prompts, strict=True)), batch_size):
            prefix, cache, _ = self._read([image for image, _ in batch], start)
            ids, mask = self._prompt_ids([prompt for _, prompt in batch])
            output = generate(self.model, prefix, ids, mask, options, prompt_cache=cache)
            texts = [
                kind(tokenizer.decode(row[:-1] if ended else row).strip(), score, row, logprobs)
                for row, score, logprobs, ended in zip(
                    output.ids, output.scores, output.token_logprobs, output.finished, strict=True
                )
            ]
            self.generator.judge(texts)
            results += [texts[i : i + count] for i in range(0, len(texts), count)]
        return results

    def _stream(
        self, image: Image | Many[Image], prompts: Sequence[str], options: GenerationOptions
    ) -> Iterator[str]:
        """One text in pieces. What can be wrong is found here, before the first piece."""
        if is_many(image):
            raise ValueError("stream=True writes one text about one image; leave it out for several")
        with torch.inference_mode():
            prefix, cache, _ = self._read(as_list(image))
        ids, mask = self._prompt_ids(prompts)
        tokens = (step[0] for step in stream(self.model, prefix, ids, mask, options, prompt_cache=cache))
        end_ids = options.end_ids(self.model.config.language.eos_token_ids)
        return detokenize_stream(
            self.generator.tokenizer.decode, (i for i in tokens if i is not None and i not in end_ids)
        )

    def _prompt_ids(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask of prompts, int64 [B, T], padded on the left."""
        ids, mask = self.generator.tokenizer.encode_batch(prompts)
        return ids.to(self.device), mask.to(self.device)

    def _question_prompts(self, question: Texts, images: int) -> list[str]:
        questions: list[str] = as_list(question) * (1 if is_many(question) else images)
        if len(questions) != images:
            raise ValueError(f"{len(questions)} questions for {images} images; give one, or one for each")
        return [self.question_prompt(text) for text in _check_texts(questions, "question")]

    def question_prompt(self, question: str) -> str:
        """The prompt that `ask` gives this model for a question. Raises TextError where it is empty."""
        return question_prompt(check_text(question), short=self.model.config.language.is_encoder_decoder)

    def asking_prompt(
        self, question: str, turns: Sequence[tuple[str, str]] | None, answer: str | None = None
    ) -> str:
        """The prompt before an answer: to a question alone (turns is None), or to one in a conversation."""
        new = max(30, 1 + len(self.generator.tokenizer.encode(answer or "")))
        return self.question_prompt(question) if turns is None else self.chat_prompt(turns, question, new)

    def chat_prompt(self, turns: Sequence[tuple[str, str]], question: str, max_new_tokens: int) -> str:
        """The prompt of a conversation's next answer: of the (question, answer) turns so far the latest that fit.

        Raises TextError where the question is empty.
        """
        check_text(question)
        room = self.model.prompt_room(max_new_tokens)
        while turns and len(self.generator.tokenizer.encode(chat_prompt(turns, question))) > room:
            turns = turns[1:]
        return chat_prompt(turns, question)

    # --- matching: see `matching.Matcher` ---

    @overload
    def match(self, images: ImageSource, texts: str, *, batch_size: int = ...) -> Match: ...
    @overload
    def match(self, images: ImageSource, texts: Many[str], *, batch_size: int = ...) -> list[Match]: ...
    @overload
    def match(self, images: Many[ImageSource], texts: str, *, batch_size: int = ...) -> list[Match]: ...
    @overload
    def match(
        self, images: Many[ImageSource], texts: Many[str], *, batch_size: int = ...
    ) -> list[list[Match]]: ...
    def match(
        self, images: ImageSource | Many[ImageSource], texts: Texts, *, batch_size: int = BATCH_SIZE
    ) -> Match | list[Match] | list[list[Match]]:
        """How well texts fit images, every text with every image.

        Returns:
            One image and one text: a `Match`. One of them a list: a list. Both: for each image a list over the texts.
        """
        table = self.matcher.match(as_list(images), _check_texts(texts), batch_size=batch_size)
        return unnest(table, is_many(images), is_many(texts))

    def embed(self, images: ImageSource | Many[ImageSource], *, batch_size: int = BATCH_SIZE) -> Tensor:
        """Image embeddings for search, float32: [Q, E] for one image, [B, Q, E] for a list; each query of length 1.

        An image's similarity to a text is the greatest product of one of its queries with the text's embedding.
        """
        embeddings = self.matcher.embed(as_list(images), batch_size=batch_size)
        return embeddings if is_many(images) else embeddings[0]

    def embed_text(self, texts: Texts) -> Tensor:
        """Text embeddings for search, float32, of length 1: [E] for one text, [B, E] for a list."""
        embeddings = self.matcher.embed_text(_check_texts(texts))
        return embeddings if is_many(texts) else embeddings[0]


def _check_texts(texts: Texts, what: str = "text") -> list[str]:
    """One or many -> a list of texts, none of them empty. Raises TextError, which numbers them."""
    several = len(as_list(texts)) > 1
    return [
        check_text(text, f"{what} number {i}" if several else what)
        for i, text in enumerate(as_list(texts), 1)
    ]


class Chat:
    """A conversation about one image. The model reads each question after all turns before it."""

    def __init__(self, predictor: Predictor, image: EncodedImage) -> None:
        self._predictor, self.image = predictor, image
        self._turns: list[tuple[str, str]] = []

    @property
    def turns(self) -> tuple[tuple[str, str], ...]:
        """The conversation so far: (question, answer) pairs."""
        return tuple(self._turns)

    @overload
    def send(
        self, text: str, *, stream: Literal[False] = False, **options: Unpack[GenerateKwargs]
    ) -> Answer: ...
    @overload
    def send(
        self, text: str, *, stream: Literal[True], **options: Unpack[GenerateKwargs]
    ) -> Iterator[str]: ...
    def send(
        self, text: str, *, stream: bool = False, **options: Unpack[GenerateKwargs]
    ) -> Answer | Iterator[str]:
        """Ask the next question; options as `Predictor.ask`.

        Where the conversation has become longer than the language model can read, it reads the latest turns that fit.

        Returns:
            An `Answer`; with `stream` an iterator over its pieces, and the turn counts once the last one was taken.
        """
        chosen = make_options("answer", stream=stream, **options)
        if chosen.num_return_sequences > 1:
            raise ValueError("a conversation goes on with one answer: leave out num_return_sequences")
        prompt = self._predictor.chat_prompt(self._turns, text, chosen.max_new_tokens)
        if stream:
            return self._record(text, self._predictor._stream(self.image, [prompt], chosen))
        answer = self._predictor._write(Answer, [self.image], [prompt], chosen, 1)[0][0]
        self._turns.append((text, answer))
        return answer

    def _record(self, text: str, pieces: Iterator[str]) -> Iterator[str]:
        answer = ""
        for piece in pieces:
            answer += piece
            yield piece
        self._turns.append((text, answer))
