"""Where the model looked: for every word of a text the parts of the picture that made it likely.

The log-probability of a word is differentiated with respect to the image features, through language model and Q-Former:
how much the word depends on what the Q-Former's cross-attention takes from each place (saliency, Simonyan et al., 2013;
what else was tried is in docs/explaining.md). By the last layer of the image encoder a feature holds what it took from
others: attention rollout (Abnar and Zuidema, 2020) tells from which patches that came, each layer weighted by how much
its attention adds to what was there (the norms, as in Kobayashi et al., 2021).

The model's own code knows nothing of this: forward hooks read what its layers take and give.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from blip2.modeling.blip2 import Blip2
from blip2.modeling.layers import split_heads
from blip2.modeling.qformer import QFormerAttention
from blip2.modeling.vision import VisionAttention
from blip2.results import GeneratedText
from blip2.text import Tokenizer, is_blank

TILE_PX = 320  # longest side of one picture in `Explanation.image`
# From nothing to most, colours whose lightness rises steadily, so that they can be told apart without seeing colour.
RAMP = ((0.0, (24, 15, 62)), (0.35, (136, 34, 106)), (0.7, (237, 105, 37)), (1.0, (252, 255, 164)))
# The temperature of what is differentiated: a word written with certainty has hardly any gradient left.
SOFT = 2.0


@dataclass(frozen=True, eq=False)
class Word:
    """A word of the text.

    heat: float32 [rows, columns] over the image encoder's patches, 0 to 1; 1 where most of the word comes from.
    logprob: natural logarithm of the word's probability, the sum over its tokens.
    """

    text: str
    heat: NDArray[np.float32]
    logprob: float


@dataclass(frozen=True, eq=False)
class Explained:
    """A text, and for each word where in the picture it comes from.

    attention: float32 [layers, heads, queries, rows, columns], the Q-Former's cross-attention as it is, of the layers
        that have one. With what goes to the class position, which has no place, each map sums to 1.
    """

    text: str
    words: tuple[Word, ...]
    attention: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Explanation(Explained):
    """The same with the picture, to be shown."""

    picture: Image.Image

    def heat_map(self, word: int) -> NDArray[np.float32]:
        """The heat of word number `word` over the picture: float32 [H, W], 0 to 1.

        The model sees every picture stretched to a square, so that its patches are spread evenly over it.
        """
        return spread(self._word(word).heat, self.picture.size)

    def image(self, word: int | None = None) -> Image.Image:
        """The picture under its heat, with the word and a legend below: one word (by its place), or all side by side.

        Raises:
            ValueError: no word of that number.
        """
        shown = self.words if word is None else (self._word(word),)
        tiles = [_tile(self.picture, one) for one in shown]
        columns = min(len(tiles), 4) or 1
        width, height = tiles[0].size if tiles else (TILE_PX, 0)
        rows = -(-len(tiles) // columns)
        sheet = Image.new("RGB", (columns * width, rows * height + _LEGEND_PX), "white")
        for i, tile in enumerate(tiles):
            sheet.paste(tile, (i % columns * width, i // columns * height))
        _draw_legend(sheet, rows * height)
        return sheet

    def _repr_png_(self) -> bytes | None:
        """What a notebook shows."""
        return self.image()._repr_png_()

    def _word(self, word: int) -> Word:
        if not 0 <= word < len(self.words):
            raise ValueError(f"word {word}: the text has words 0 to {len(self.words) - 1}")
        return self.words[word]


# --- computing it --------------------------------------------------------------------------------------------------


def explain(
    model: Blip2, tokenizer: Tokenizer, pixels: Tensor, prompt: str, text: str
) -> Generator[None, None, Explained]:
    """Explain why `text` follows `prompt` for pixels [1, 3, S, S]: in slices, between which the model is free.

    Raises:
        ValueError: no words, or more than the language model reads.
    """
    if not isinstance(text, str):
        raise ValueError(f"expected a text to explain, got {type(text).__name__}")
    tokens, prompt_ids = _tokens(model, tokenizer, text), tokenizer.encode(prompt)
    spans = split_words(tokens, tokenizer.decode)
    if not spans or is_blank(text):
        raise ValueError("there is no word to explain: the text is empty")
    room = model.prompt_room(len(tokens))
    if len(prompt_ids) > room:
        raise ValueError(f"the text is too long: question and text may have {room + len(tokens)} tokens")
    encoder, grid = model.vision, model.vision.config.grid
    with torch.no_grad(), _mixing(encoder) as mixed:
        features = encoder(pixels.to(next(model.parameters()).device))  # [1, N, W]
    yield
    attention: list[Tensor] = []
    with torch.enable_grad(), _cross_attention(model.qformer, attention):
        features = features.detach().requires_grad_()
        prefix = model.project(model.qformer(features))
        logits = _logits(model, prefix, prompt_ids, tokens)  # [T, V]
        column = torch.tensor(tokens, device=logits.device)[:, None]  # [T, 1]
        logprobs, soft = ((logits / at).log_softmax(-1).gather(1, column)[:, 0] for at in (1.0, SOFT))  # [T]
    words = []
    for word, places in spans:
        yield
        (gradient,) = torch.autograd.grad(soft[places].sum(), features, retain_graph=True)
        saliency = gradient.float().norm(dim=-1)  # [1, N]
        heat = (saliency @ mixed[0])[0, 1:].view(grid, grid)  # the class position has no place
        words.append(Word(word, _to_one(heat), logprobs[places].sum().item()))
    maps = torch.stack(attention)[:, 0, ..., 1:].unflatten(-1, (grid, grid))  # [L, H, Q, rows, columns]
    return Explained(tokenizer.decode(tokens).strip(), tuple(words), maps.cpu().numpy())


def _tokens(model: Blip2, tokenizer: Tokenizer, text: str) -> list[int]:
    """A text's ids as the language model writes them, without the end token."""
    language = model.config.language
    if isinstance(text, GeneratedText) and text.tokens:
        ids = [token for token in text.tokens if token not in language.eos_token_ids]
        # nor is an end token that the caller chose a part of the text
        return ids if tokenizer.decode(ids).strip() == text.strip() else ids[:-1]
    # a text that continues the prompt begins with a space; an encoder-decoder writes a text of its own
    stripped = text.strip() if language.is_encoder_decoder else " " + text.strip()
    return tokenizer.encode(stripped, frame=False) if text.strip() else []


def _logits(model: Blip2, prefix: Tensor, prompt: Sequence[int], tokens: Sequence[int]) -> Tensor:
    """The logits each token was chosen from, float32 [T, V]."""
    targets = torch.tensor([tokens], device=prefix.device)
    input_ids = torch.tensor([prompt], dtype=torch.int64, device=prefix.device)
    if not model.config.language.is_encoder_decoder:  # it reads the text that it continues
        input_ids = torch.cat([input_ids, targets], dim=1)
    return model.target_logits(prefix, input_ids, None, targets)[0].float()


def split_words(tokens: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[tuple[str, list[int]]]:
    """The words of a text, each with the places of its tokens; what is between spaces is a word."""
    ends = [len(decode(tokens[: i + 1])) for i in range(len(tokens))]
    words = []
    for match in re.finditer(r"\S+", decode(tokens)):
        begin, end = match.span()
        # a token that only completes a character adds no length: it counts to the character
        places = [
            i for i, stop in enumerate(ends) if stop > begin and min(ends[i - 1] if i else 0, stop - 1) < end
        ]
        if places:
            words.append((match.group(), places))
    return words


@contextmanager
def _cross_attention(qformer: nn.Module, into: list[Tensor]) -> Iterator[None]:
    """While this is open, the cross-attention's probabilities [B, H, Q, N] of every layer are added to `into`."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], _: Tensor) -> None:
        assert isinstance(module, QFormerAttention)
        with torch.no_grad():
            query = split_heads(module.attention.query(args[0]), module.heads)
            key = split_heads(module.attention.key(args[1]), module.heads)
            into.append(_probabilities(query, key))

    with ExitStack() as hooks:
        for name, module in qformer.named_modules():
            if name.endswith("crossattention"):
                hooks.enter_context(module.register_forward_hook(hook))
        yield


@contextmanager
def _mixing(encoder: nn.Module) -> Iterator[list[Tensor]]:
    """A list that the image encoder fills: [N, N], row i the shares in which the positions went into feature i."""
    mixed: list[Tensor] = []
    blocks: list[Tensor] = []  # what the block that runs has read

    def enter(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        blocks[:] = [args[0]]

    def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        assert isinstance(module, VisionAttention)
        query, key, _ = module.qkv(args[0]).unflatten(-1, (3, module.heads, -1)).permute(2, 0, 3, 1, 4)
        attention = _probabilities(query, key)[0].mean(0)  # [N, N], over heads
        added, kept = (x[0].float().norm(dim=-1, keepdim=True) for x in (out, blocks[0]))
        share = added / (added + kept).clamp(min=1e-12)  # [N, 1]
        mixing = share * attention + torch.diag_embed(1 - share[:, 0])
        mixed[:] = [mixing @ mixed[0] if mixed else mixing]

    with ExitStack() as hooks:
        for block in encoder.get_submodule("layers").children():
            hooks.enter_context(block.register_forward_pre_hook(enter))
            hooks.enter_context(block.get_submodule("self_attn").register_forward_hook(hook))
        yield mixed


def _probabilities(query: Tensor, key: Tensor) -> Tensor:
    """[B, H, T, D] and [B, H, S, D] -> float32 [B, H, T, S]."""
    out: Tensor = (query.float() @ key.float().mT * query.shape[-1] ** -0.5).softmax(-1)
    return out


def _to_one(heat: Tensor) -> NDArray[np.float32]:
    values: NDArray[np.float32] = heat.float().cpu().numpy()
    peak = float(values.max())
    return values / peak if peak > 0 else values


# --- showing it ----------------------------------------------------------------------------------------------------

_LEGEND_PX, _CAPTION_PX = 34, 30


def spread(heat: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """A grid of patches over a picture of (width, height): float32 [height, width], smooth, 0 to 1."""
    smooth = Image.fromarray(heat.astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
    clipped: NDArray[np.float32] = np.asarray(smooth, np.float32).clip(0, 1)
    return clipped


def _colours(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Values 0 to 1 of any shape -> float32 [..., 3], 0 to 255."""
    steps = [at for at, _ in RAMP]
    channels = [np.interp(values, steps, [rgb[c] for _, rgb in RAMP]) for c in range(3)]
    return np.stack(channels, axis=-1).astype(np.float32)


def _tile(picture: Image.Image, word: Word) -> Image.Image:
    """The picture in grey under the word's heat, the word below it."""
    scale = TILE_PX / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    values = spread(word.heat, size)
    grey = np.asarray(picture.resize(size).convert("L").convert("RGB"), np.float32)
    weight = 0.2 + 0.55 * values[..., None]
    mixed = grey * (1 - weight) + _colours(values) * weight
    tile = Image.new("RGB", (max(size[0], 120), size[1] + _CAPTION_PX), "white")
    tile.paste(Image.fromarray(mixed.astype(np.uint8)), (0, 0))
    shown = word.text if len(word.text) < 30 else word.text[:29] + "…"
    ImageDraw.Draw(tile).text((6, size[1] + 7), shown, fill="black", font=ImageFont.load_default(15))
    return tile


def _draw_legend(sheet: Image.Image, top: int) -> None:
    draw = ImageDraw.Draw(sheet)
    ramp = np.broadcast_to(np.linspace(0, 1, 120, dtype=np.float32), (10, 120))
    font = ImageFont.load_default(12)
    draw.text((6, top + 9), "least", fill="black", font=font)
    sheet.paste(Image.fromarray(_colours(ramp).astype(np.uint8)), (42, top + 12))
    draw.text((168, top + 9), "most of the word comes from here", fill="black", font=font)
