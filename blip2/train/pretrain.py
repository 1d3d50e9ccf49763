"""Training the parts BLIP-2 starts from, where no pre-trained ones are at hand.

The image encoder learns from captions (CLIP's loss) and from the places of named things (`losses.region_loss`), the
language model from text; `initialise` gives untrained modules their first weights, `qformer_from_matcher` hands stage
1's result to stage 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2.layers import FeedForward, attend, merge_heads
from blip2.model import Blip2, Blip2Matcher
from blip2.opt import Opt
from blip2.qformer import Layer
from blip2.train import losses
from blip2.train.loop import Task
from blip2.vision import ImageEncoder

Batch = Mapping[str, Tensor]


class TextBlock(nn.Module):
    """One pre-norm transformer block over text, bidirectional."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = FeedForward(width, 4 * width, "gelu")

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x: [B, T, W]; mask: bool [B, 1, 1, T]."""
        query, key, value = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.projection(merge_heads(attend(query, key, value, mask)))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class TextTower(nn.Module):
    """A small text encoder, the counterpart of the image encoder in contrastive pre-training."""

    def __init__(
        self, vocabulary: int, width: int, layers: int, heads: int, positions: int, embedding: int
    ) -> None:
        """`positions`: the longest text in tokens; `embedding`: width of what it gives."""
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(positions, width)
        self.layers = nn.ModuleList(TextBlock(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, embedding, bias=False)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids int64 and mask [B, T] -> [B, E], the mean over the text's positions, not normalised."""
        x = self.words(ids) + self.positions.weight[: ids.shape[1]]
        seen = mask.bool()
        for layer in self.layers:
            x = layer(x, seen[:, None, None, :])
        weight = mask.to(x.dtype).unsqueeze(-1)
        mean = (self.norm(x) * weight).sum(1) / weight.sum(1).clamp(min=1)
        out: Tensor = self.projection(mean)
        return out


class ImageTextEncoders(nn.Module):
    """Image encoder and text encoder that meet in one space, E wide."""

    def __init__(self, vision: ImageEncoder, text: TextTower) -> None:
        super().__init__()
        width, shared = vision.config.hidden_size, text.projection.out_features
        self.vision, self.text = vision, text
        self.image_projection = nn.Linear(width, shared, bias=False)
        self.patch_projection = nn.Linear(width, shared, bias=False)
        first = math.log(1 / 0.07)  # where CLIP starts
        self.image_scale = nn.Parameter(torch.tensor(first))
        self.patch_scale = nn.Parameter(torch.tensor(first))


class ContrastivePretrain(Task):
    """Image encoder from captions and from places: CLIP's loss on whole images, `region_loss` on patches.

    Batch: pixels [B, 3, S, S]; ids int64 and mask [B, T], a caption each; phrase_ids int64 and phrase_mask [P, T], the
    different phrases that name things in these images; regions int64 [B, N - 1], which phrase each patch (row by row)
    shows, -1 for none; optionally text_ids int64 [B], equal where captions say the same, and keep int64 [B, K], the
    patches to encode, the others being left out to train faster.
    """

    def __init__(self, encoders: ImageTextEncoders, *, region_weight: float = 1.0) -> None:
        self.module = self.encoders = encoders
        self.region_weight = region_weight

    def losses(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        both = self.encoders
        keep, regions = batch.get("keep"), batch["regions"]
        features = both.vision(batch["pixels"], keep=keep)  # [B, N or K + 1, W], the class position first
        if keep is not None:
            regions = regions.gather(1, keep)
        image = both.image_projection(features[:, 0])  # [B, E]
        patches = both.patch_projection(features[:, 1:])  # [B, N - 1, E]
        clip = losses.clip_loss(
            image, both.text(batch["ids"], batch["mask"]), both.image_scale, batch.get("text_ids")
        )
        phrases = both.text(batch["phrase_ids"], batch["phrase_mask"])  # [P, E]
        region = losses.region_loss(patches, phrases, regions, both.patch_scale)
        return {"loss": clip + self.region_weight * region, "clip": clip, "region": region}


class LanguagePretrain(Task):
    """The language model on text alone.

    Batch: input_ids int64 [B, T]; optionally attention_mask [B, T] (absent: rows packed full) and labels int64 [B, T],
    -100 = no target (absent: every token that is no padding).
    """

    def __init__(self, language: Opt) -> None:
        self.module = self.language = language

    def losses(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        labels = batch.get("labels")
        if labels is None:
            labels = ids if mask is None else ids.masked_fill(mask == 0, losses.IGNORED)
        hidden = self.language(self.language.embed(ids), mask)[:, :-1]  # [B, T - 1, W]
        targets = labels[:, 1:]
        wanted = targets != losses.IGNORED
        logits = self.language.head(hidden[wanted])  # [K, V]: only where something is to be predicted
        return {"loss": F.cross_entropy(logits.float(), targets[wanted])}


def initialise(module: nn.Module, seed: int, *, std: float = 0.02) -> None:
    """First weights, in place: truncated normal for weights, zero for biases, one for norms; scalars stay as they are.

    The Q-Former's feed-forward for queries begins as a copy of the one for text, where there is one.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in module.modules():
            for name, parameter in part.named_parameters(recurse=False):
                if isinstance(part, nn.LayerNorm):
                    parameter.fill_(float(name == "weight"))
                elif "bias" in name:
                    parameter.zero_()
                elif parameter.ndim >= 2:
                    nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std, generator=generator)
        for part in module.modules():
            if isinstance(part, Layer) and hasattr(part, "intermediate"):
                part.intermediate_query.load_state_dict(part.intermediate.state_dict())
                part.output_query.load_state_dict(part.output.state_dict())


# Parts of stage 1's Q-Former that stage 2 has no use for: its text branch.
_TEXT_BRANCH = (
    ".intermediate.",
    ".output.dense.",
    ".output.LayerNorm.",
    "word_embeddings.",
    "position_embeddings.",
)


def qformer_from_matcher(matcher: Blip2Matcher, model: Blip2) -> None:
    """Copy stage 1's image encoder, queries and Q-Former into the stage-2 model; its text branch stays behind.

    Raises:
        ValueError: the two are of different sizes.
    """
    for part in ("vision", "qformer"):
        source, target = getattr(matcher, part).state_dict(), getattr(model, part).state_dict()
        spare = [name for name in source.keys() - target.keys() if not _is_text(name)]
        wrong = sorted(n for n in target if n not in source or source[n].shape != target[n].shape) + sorted(
            spare
        )
        if wrong:
            raise ValueError(
                f"the stage-1 model's {part} does not fit the stage-2 model's: {', '.join(wrong[:4])} "
                f"({len(wrong)} tensors in all) differ; build both from the same config"
            )
        getattr(model, part).load_state_dict({name: source[name] for name in target})


def _is_text(name: str) -> bool:
    in_attention = ".attention." in name or ".crossattention." in name
    return not in_attention and any(mark in f".{name}" for mark in _TEXT_BRANCH)
