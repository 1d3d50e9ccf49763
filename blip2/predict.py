"""What people do with a model: captions, answers, conversation, matching, embeddings. The one road from image to text.

`load` gives a `Predictor`. Its methods take whatever `images.load_image` takes, or an `EncodedImage`.
One image gives one result, a list of images a list in the same order, computed in batches.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from blip2.explain import Explained, Explanation, explain
from blip2.generation.decoding import generate, stream
from blip2.generation.options import GenerationOptions
from blip2.generation.ranking import answer_logprobs
from blip2.images import ImageSource, to_pixels
from blip2.inputs import BATCH_SIZE, as_list, in_batches, is_many, open_image
from blip2.loading import LoadedModel, device_of, load_components
from blip2.matching import Matcher
from blip2.modeling.blip2 import Blip2, Blip2Matcher
from blip2.modeling.config import MODES, Mode, T5Config
from blip2.modeling.kv_cache import PromptCache, concat_prompt_caches
from blip2.registry import DEFAULT, DEFAULT_FOLDER, DEFAULT_MATCHER_FOLDER, default_model
from blip2.results import Answer, Caption, EncodedImage, Ranked, detokenize_stream
from blip2.text import CAPTION_PROMPT, chat_prompt, question_prompt

Picture = ImageSource | EncodedImage
Text = TypeVar("Text", Caption, Answer)

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
) -> Predictor:
    """Load a model.

    Args:
        name: a name or alias from `blip2 models`, another name on the Hugging Face Hub, or a folder in its layout.
            None or "default": the small model that ships with the package, with its matcher.
        device: "cpu", "cuda", "mps"; "auto" takes a GPU where there is one.
        dtype: "fp32", "bf16" or "fp16". None: fp32 up to a billion parameters, bf16 above (see
            `models.default_dtype`), whatever the file holds.
        revision: branch, tag or commit of a model on the Hub.
        matcher: the stage-1 model for `match` and `embed`, as `name`; read when first used.
        vision, language: the image encoder and the language model, for a checkpoint without them, as LAVIS's.
        quantize: "int8" or "int4": hold the weights in so many bits, a quarter or an eighth of fp32's memory; what is
            computed between them is fp32. See docs/performance.md for what it gains and what it changes.

    Raises:
        ValueError: no such model, damaged or unfitting files, or a device this machine does not have.
    """
    place = device_of(device)
    if name is None or name == DEFAULT:
        default_model()  # says so where this installation holds none
        if revision is not None:
            raise ValueError(
                f"revision={revision!r} is for models on the Hugging Face Hub; the default model has none"
            )
        name, matcher = DEFAULT_FOLDER, matcher or DEFAULT_MATCHER_FOLDER
    if quantize is not None and quantize not in MODES:
        raise ValueError(f"quantize is {quantize!r}; choose one of {', '.join(MODES)}")
    part = load_components(name, place, dtype, revision, vision, language, quantize)
    if isinstance(part.model, Blip2Matcher):
        if matcher is not None:
            raise ValueError(f"{name} is a matcher itself; pass matcher= with a model that writes")
        return Predictor(None, lambda: part, place)
    return Predictor(
        part,
        None if matcher is None else lambda: load_components(matcher, place, dtype, None, quantize=quantize),
        place,
    )


# --- the predictor -------------------------------------------------------------------------------------------------


class Predictor:
    """A model ready for use, as `blip2.load` gives it.

    The decoding options are the same everywhere:
        num_beams: how many texts beam search follows. None: 5, or 1 where sampling or streaming needs it.
        max_new_tokens, min_new_tokens: limits of the text's length; image and prompt do not count.
        length_penalty: scores are divided by length ** length_penalty, so below 0 short texts win.
        early_stopping: False, True (stop at `num_beams` finished texts) or "never" (search as if all could grow).
        repetition_penalty: above 1 makes what has been said less likely.
        no_repeat_ngram_size: no run of so many tokens comes twice; 0 is off.
        num_return_sequences: so many texts for each image, best first; above 1 each image's result is a list.
        do_sample: draw the text by chance, shaped by temperature, top_k (0: off), top_p (1: off) and seed.
        stream: for one image, an iterator over pieces of the text as they are written; together they are the text.
        batch_size: images computed at a time: speed and memory, never the result.
    """

    def __init__(
        self,
        generator: LoadedModel | None,
        load_matcher: Callable[[], LoadedModel] | None,
        device: torch.device,
    ) -> None:
        """`load_matcher` is called when the matcher is first needed."""
        self._generator, self._load_matcher = generator, load_matcher
        self.device = device

    @property
    def generator(self) -> LoadedModel:
        """The model that writes. Raises ValueError where only a matcher was loaded."""
        if self._generator is None:
            raise ValueError(
                "this model only matches images and texts; load one that writes, such as 'opt-2.7b'"
            )
        return self._generator

    @property
    def model(self) -> Blip2:
        """The generating model itself. In bf16 on a CPU its linear layers' weights are parameters after `.train()`."""
        assert isinstance(self.generator.model, Blip2)
        return self.generator.model

    @cached_property
    def matcher(self) -> Matcher:
        """The stage-1 model, read when first used. Raises ValueError where there is none."""
        if self._load_matcher is None:
            raise ValueError(
                "this model was loaded without a matcher; name one: blip2.load(..., matcher='itm')"
            )
        part = self._load_matcher()
        if not isinstance(part.model, Blip2Matcher):
            raise ValueError("the model given as matcher= writes text; matchers are 'itm' and 'itm-coco'")
        return Matcher(part.model, part.image_processor, part.tokenizer, self.device)

    # --- writing ---

    @torch.inference_mode()
    def encode(self, images: Picture | Sequence[Picture], *, batch_size: int = BATCH_SIZE) -> Any:
        """Read images once: one gives an `EncodedImage`, a list a list of them.

        Raises:
            ImageError: an image that cannot be read; the message names it.
        """
        many = is_many(images)
        encoded: list[EncodedImage] = []
        for start, batch in in_batches(as_list(images), batch_size):
            prefix, _, sizes = self._read(batch, start)
            encoded += self._encoded(prefix, sizes)
        return encoded if many else encoded[0]

    def _encoded(self, prefix: Tensor, sizes: Sequence[tuple[int, int]]) -> list[EncodedImage]:
        """What there is to keep of images whose prefix is [B, Q, W]."""
        context = self.model.prefill_prefix(prefix)
        encoded = []
        for i, size in enumerate(sizes):
            row = torch.tensor([i], device=prefix.device)
            encoded.append(
                EncodedImage(
                    prefix[i : i + 1], None if context is None else context.batch_select_indices(row), size
                )
            )
        return encoded

    def caption(
        self,
        images: Picture | Sequence[Picture],
        *,
        prompt: str = CAPTION_PROMPT,
        num_beams: int | None = None,
        max_new_tokens: int = 30,
        min_new_tokens: int = 0,
        length_penalty: float = 1.0,
        early_stopping: bool | Literal["never"] = False,
        repetition_penalty: float = 1.0,
        no_repeat_ngram_size: int = 0,
        num_return_sequences: int = 1,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        stream: bool = False,
        batch_size: int = BATCH_SIZE,
    ) -> Any:
        """Say what is in images.

        Args:
            prompt: what the caption goes on from; it is not part of the caption. The default is that of the published
                captioning results; "" leaves the model to begin by itself.
            others: see the class.

        Returns:
            One image: a `Caption`. A list: a list of them, in order. See `num_return_sequences` and `stream`.

        Raises:
            ImageError: an image that cannot be read; the message names it.
            ValueError: options that contradict each other.
        """
        options = GenerationOptions(
            num_beams=_beams(num_beams, do_sample or stream),
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            repetition_penalty=repetition_penalty,
            no_repeat_ngram_size=no_repeat_ngram_size,
            num_return_sequences=num_return_sequences,
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
        )
        if stream:
            return self._stream(images, prompt, options)
        listed = as_list(images)
        texts = self._write(Caption, listed, [prompt] * len(listed), options, batch_size)
        return texts if is_many(images) else texts[0]

    def ask(
        self,
        images: Picture | Sequence[Picture],
        question: str | Sequence[str],
        *,
        num_beams: int | None = None,
        max_new_tokens: int = 30,
        min_new_tokens: int = 0,
        length_penalty: float = -1.0,
        early_stopping: bool | Literal["never"] = False,
        repetition_penalty: float = 1.0,
        no_repeat_ngram_size: int = 0,
        num_return_sequences: int = 1,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        stream: bool = False,
        batch_size: int = BATCH_SIZE,
    ) -> Any:
        """Answer a question about an image.

        Args:
            question: one for all images, or with a list of images a list of as many questions.
            length_penalty: -1 as in the published results: short answers.
            others: see the class.

        Returns:
            One image: an `Answer`. A list: a list of them, in order. See `num_return_sequences` and `stream`.

        Raises:
            ImageError: an image that cannot be read; the message names it.
            ValueError: as many questions as images are needed, or options that contradict each other.
        """
        options = GenerationOptions(
            num_beams=_beams(num_beams, do_sample or stream),
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            repetition_penalty=repetition_penalty,
            no_repeat_ngram_size=no_repeat_ngram_size,
            num_return_sequences=num_return_sequences,
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
        )
        listed = as_list(images)
        questions = _questions(question, len(listed))
        if stream:
            return self._stream(images, self.question_prompt(questions[0]), options)
        prompts = [self.question_prompt(each) for each in questions]
        texts = self._write(Answer, listed, prompts, options, batch_size)
        return texts if is_many(images) else texts[0]

    @torch.inference_mode()
    def rank(
        self,
        images: Picture | Sequence[Picture],
        question: str | Sequence[str],
        answers: Sequence[str],
        *,
        batch_size: int = BATCH_SIZE,
    ) -> Any:
        """Order answers to a question by how likely the model is to give them.

        Image and question are read once for all answers, each of which is then read after them.

        Args:
            question: one for all images, or with a list of images a list of as many questions.
            answers: what may be answered; the same one twice counts once.

        Returns:
            One image: a list of `Ranked`, the likeliest first. A list: a list of such lists.

        Raises:
            ImageError: an image that cannot be read; the message names it.
            ValueError: no answers or an empty one, or not as many questions as images.
        """
        offered = list(dict.fromkeys(answer.strip() for answer in answers))
        if not offered or "" in offered:
            raise ValueError("answers to rank: give one or more, none of them empty")
        ids = [self.generator.tokenizer.encode(" " + answer, frame=False) for answer in offered]
        listed = as_list(images)
        prompts = [self.question_prompt(each) for each in _questions(question, len(listed))]
        ranked: list[list[Ranked]] = []
        for start, batch in in_batches(list(zip(listed, prompts, strict=True)), batch_size):
            prefix, context, _ = self._read([picture for picture, _ in batch], start)
            asked, mask = (
                part.to(self.device) for part in self.generator.tokenizer.encode_batch([p for _, p in batch])
            )
            logprobs = answer_logprobs(self.model, prefix, asked, mask, ids, prompt_cache=context)  # [B, N]
            for row, shares in zip(logprobs.tolist(), logprobs.softmax(-1).tolist(), strict=True):
                ranked.append(sorted(map(Ranked, offered, shares, row), key=lambda each: -each.logprob))
        return ranked if is_many(images) else ranked[0]

    def chat(self, image: Picture) -> Chat:
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
            turns: the question was asked in a conversation, after these (question, answer) pairs, as `Chat.turns`.

        Raises:
            ImageError: an image that cannot be read.
            ValueError: arguments that contradict each other, an empty text, or a model with rounded weights.
        """
        if text is not None and question is not None:
            raise ValueError("text= is a caption; give the answer to a question as answer=")
        if question is None and (answer is not None or turns is not None):
            raise ValueError("answer= needs the question it answers, turns= the one that came next")
        if isinstance(image, EncodedImage) or is_many(image):
            raise ValueError(
                "explain takes one image itself: what was encoded shows no more where things were"
            )
        picture = open_image(image, 0)
        if question is None:
            prompt, given = CAPTION_PROMPT, self.caption(picture) if text is None else text
        else:
            prompt = self.asking_prompt(question, turns, answer)
            options = GenerationOptions(num_beams=5, length_penalty=-1.0)
            given = self._write(Answer, [picture], [prompt], options, 1)[0] if answer is None else answer
        slices = self.explain_in_slices(to_pixels([picture], self.generator.image_processor), prompt, given)
        try:
            while True:
                next(slices)
        except StopIteration as end:
            found: Explained = end.value
            return Explanation(found.text, found.words, found.attention, picture)

    def explain_in_slices(self, pixels: Tensor, prompt: str, text: str) -> Generator[None, None, Explained]:
        """Why `text` follows `prompt` for pixels [1, 3, S, S]: stops wherever the model may do something else."""
        return explain(self.model, self.generator.tokenizer, pixels, prompt, text)

    def _read(
        self, pictures: Sequence[Picture], start: int = 0
    ) -> tuple[Tensor, PromptCache | None, list[tuple[int, int]]]:
        """The prefix [B, Q, W] of pictures; where all of them are encoded their context too; their sizes.

        start: the place of the first one in what the user gave, for messages.
        """
        encoded = [picture for picture in pictures if isinstance(picture, EncodedImage)]
        width = self.model.config.language.width
        if any(picture.prefix.shape[-1] != width for picture in encoded):
            raise ValueError("an encoded image comes from another model; encode it with this one")
        if len(encoded) == len(pictures):
            prefix = torch.cat([picture.prefix for picture in encoded])
            return prefix, _join(encoded), [picture.size for picture in encoded]
        opened = {
            i: open_image(picture, start + i)
            for i, picture in enumerate(pictures)
            if not isinstance(picture, EncodedImage)
        }
        pixels = to_pixels(list(opened.values()), self.generator.image_processor)
        fresh = iter(self.model.embed_image(pixels.to(self.device)).split(1))
        rows = [picture.prefix if isinstance(picture, EncodedImage) else next(fresh) for picture in pictures]
        sizes = [
            picture.size if isinstance(picture, EncodedImage) else opened[i].size
            for i, picture in enumerate(pictures)
        ]
        return torch.cat(rows), None, sizes

    @torch.inference_mode()
    def _write(
        self,
        kind: type[Text],
        pictures: Sequence[Picture],
        prompts: Sequence[str],
        options: GenerationOptions,
        batch_size: int,
    ) -> list[Any]:
        """Texts for pictures with a prompt each; a list of texts each with num_return_sequences > 1."""
        results: list[Any] = []
        each = options.num_return_sequences
        for start, batch in in_batches(list(zip(pictures, prompts, strict=True)), batch_size):
            prefix, context, _ = self._read([picture for picture, _ in batch], start)
            ids, mask = self.generator.tokenizer.encode_batch([prompt for _, prompt in batch])
            made = generate(
                self.model, prefix, ids.to(self.device), mask.to(self.device), options, prompt_cache=context
            )
            texts = [
                kind(self._decode(row[:-1] if ended else row).strip(), score, row, logprobs)
                for row, score, logprobs, ended in zip(
                    made.ids, made.scores, made.token_logprobs, made.finished, strict=True
                )
            ]
            results += texts if each == 1 else [texts[i : i + each] for i in range(0, len(texts), each)]
        return results

    def _stream(self, image: Any, prompt: str, options: GenerationOptions) -> Iterator[str]:
        """One text in pieces. What can be wrong is found here, before the first piece."""
        if is_many(image) or options.num_return_sequences > 1:
            raise ValueError("stream=True writes one text about one image; leave it out for several")
        if options.num_beams > 1:
            raise ValueError(
                f"stream=True needs num_beams=1, got num_beams={options.num_beams}: beams know their text at the end"
            )
        with torch.inference_mode():
            prefix, context, _ = self._read([image])
        ids, mask = self.generator.tokenizer.encode_batch([prompt])
        steps = stream(
            self.model, prefix, ids.to(self.device), mask.to(self.device), options, prompt_cache=context
        )
        ends = self.model.config.language.eos_token_id
        end_ids = {ends} if isinstance(ends, int) else {*ends}
        written = (step[0] for step in steps)
        return detokenize_stream(self._decode, (i for i in written if i is not None and i not in end_ids))

    def question_prompt(self, question: str) -> str:
        """The prompt that `ask` gives this model for a question."""
        return question_prompt(question, short=isinstance(self.model.config.language, T5Config))

    def asking_prompt(
        self, question: str, turns: Sequence[tuple[str, str]] | None, answer: str | None = None
    ) -> str:
        """The prompt before an answer: to a question alone (turns is None), or to one in a conversation."""
        new = max(30, 1 + len(self.generator.tokenizer.encode(answer or "")))
        return self.question_prompt(question) if turns is None else self.chat_prompt(turns, question, new)

    def chat_prompt(self, turns: Sequence[tuple[str, str]], question: str, max_new_tokens: int) -> str:
        """The prompt of a conversation's next answer: of the (question, answer) turns so far the latest that fit."""
        room = self.model.prompt_room(max_new_tokens)
        while turns and len(self.generator.tokenizer.encode(chat_prompt(turns, question))) > room:
            turns = turns[1:]
        return chat_prompt(turns, question)

    def _decode(self, ids: Iterable[int]) -> str:
        return self.generator.tokenizer.decode(ids)

    # --- matching: see `matching.Matcher` ---

    def match(
        self,
        images: ImageSource | Sequence[ImageSource],
        texts: str | Sequence[str],
        *,
        batch_size: int = BATCH_SIZE,
    ) -> Any:
        """How well texts fit images, every text with every image.

        Returns:
            One image and one text: a `Match`. One of them a list: a list. Both: for each image a list over the texts.
        """
        return self.matcher.match(images, texts, batch_size=batch_size)

    def embed(self, images: ImageSource | Sequence[ImageSource], *, batch_size: int = BATCH_SIZE) -> Tensor:
        """Image embeddings for search, float32: [Q, E] for one image, [B, Q, E] for a list; each query of length 1."""
        return self.matcher.embed(images, batch_size=batch_size)

    def embed_text(self, texts: str | Sequence[str]) -> Tensor:
        """Text embeddings for search, float32, of length 1: [E] for one text, [B, E] for a list."""
        return self.matcher.embed_text(texts)


class Chat:
    """A conversation about one image. Each question is read after all that was said before it."""

    def __init__(self, predictor: Predictor, image: EncodedImage) -> None:
        self._predictor, self.image = predictor, image
        self._turns: list[tuple[str, str]] = []

    @property
    def turns(self) -> tuple[tuple[str, str], ...]:
        """What was said: (question, answer) pairs."""
        return tuple(self._turns)

    def send(
        self,
        text: str,
        *,
        num_beams: int | None = None,
        max_new_tokens: int = 30,
        min_new_tokens: int = 0,
        length_penalty: float = -1.0,
        early_stopping: bool | Literal["never"] = False,
        repetition_penalty: float = 1.0,
        no_repeat_ngram_size: int = 0,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        stream: bool = False,
    ) -> Any:
        """Ask the next question; options as `Predictor.ask`.

        Where the conversation has become longer than the language model can read, it reads the latest turns that fit.

        Returns:
            An `Answer`; with `stream` an iterator over its pieces, and the turn counts once the last one was taken.
        """
        options = GenerationOptions(
            num_beams=_beams(num_beams, do_sample or stream),
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            repetition_penalty=repetition_penalty,
            no_repeat_ngram_size=no_repeat_ngram_size,
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
        )
        prompt = self._prompt(text, max_new_tokens)
        if stream:
            return self._record(text, self._predictor._stream(self.image, prompt, options))
        answer = self._predictor._write(Answer, [self.image], [prompt], options, 1)[0]
        self._turns.append((text, answer))
        return answer

    def _record(self, text: str, pieces: Iterator[str]) -> Iterator[str]:
        said = []
        for piece in pieces:
            said.append(piece)
            yield piece
        self._turns.append((text, "".join(said)))

    def _prompt(self, text: str, max_new_tokens: int) -> str:
        return self._predictor.chat_prompt(self._turns, text, max_new_tokens)


# --- small parts ---------------------------------------------------------------------------------------------------


def _beams(num_beams: int | None, one_by_one: bool) -> int:
    if num_beams is not None:
        return num_beams
    return 1 if one_by_one else 5


def _questions(question: str | Sequence[str], images: int) -> list[Any]:
    questions: list[Any] = list(question) if is_many(question) else [question] * images
    if len(questions) != images:
        raise ValueError(f"{len(questions)} questions for {images} images; give one, or one for each image")
    return questions


def _join(pictures: Sequence[EncodedImage]) -> PromptCache | None:
    """The contexts of encoded images as the context of all of them; None where the language model keeps none."""
    contexts = [picture.context for picture in pictures if picture.context is not None]
    return concat_prompt_caches(contexts) if contexts else None
