"""How the small model's parts learn before they are trained together.

BLIP-2's Q-Former starts from BERT and learns from 129 million images which query should look where; its language model
is pre-trained on text from the web. Here every query has something to say (slots.py): the language model first learns
to read prefixes made of the facts themselves (`SlotLanguage`, no images), then image encoder and queries learn to write
such prefixes (`QueryPretrain`); fine-tuning trains every part on texts and keeps that objective (`QueryFinetune`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2.modeling.blip2 import Blip2
from blip2.modeling.opt import Opt
from blip2.modeling.qformer import QFormer, QFormerLayer
from blip2.train.loop import Task
from blip2.train.losses import matmul_fp32
from blip2.train.tasks import Finetune, Stage2, layerwise_groups, train_only
from default_model import losses
from default_model.recipe import PARTS
from default_model.slots import EMPTY, OBJECT, PHOTOGRAPH, SlotPrefix, centres, slot_words

Batch = Mapping[str, Tensor]
READ_SCALE = 8.0  # of the product of a slot's words and a noun's, of length about one, in the names' loss
# of each of 256 values of a prefix while the language model learns to read, beside words of length one
SLOT_NOISE = 0.05
MISNAMED = 0.08  # of the language model's slots get another slot's words mixed in


class SlotLanguage(Stage2):
    """A language model that learns to read what the queries are to say; no image is involved.

    Trains the language model and the slots' own vectors. Batch: texts as `Stage2` takes them, and slots.
    """

    def __init__(self, model: Blip2, slots: SlotPrefix, *, muon_scale: float | None = None) -> None:
        super().__init__(model, muon_scale=muon_scale)
        train_only(model, [model.language])
        self.slots = slots
        self.module = nn.ModuleDict({"model": model, "slots": slots})

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        return layerwise_groups(self.module, weight_decay, muon_scale=self.muon_scale)

    def losses(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        prefix = self.slots(embeddings(self.model), batch)  # [B, Q, W]
        shape, device = prefix.shape, prefix.device
        other = torch.randperm(shape[1], generator=generator, device=generator.device).to(device)
        misnamed = torch.rand(shape[:2], generator=generator, device=generator.device).to(device) < MISNAMED
        prefix = torch.where(misnamed.unsqueeze(-1), 0.7 * prefix + 0.3 * prefix[:, other], prefix)
        noise = torch.randn(shape, generator=generator, device=generator.device).to(device)
        return {"loss": self.prefix_loss(prefix + SLOT_NOISE * noise, batch)}


def embeddings(model: Blip2) -> Tensor:
    """The language model's word embeddings, [V, W]."""
    assert isinstance(model.language, Opt)
    return model.language.embed_tokens.weight


class CellReaders(nn.Module):
    """Heads that read the image encoder's features of each cell while it is trained: what is there, and where it is."""

    def __init__(self, width: int, words: int) -> None:
        """`width`: of the features; `words`: of the language model's embeddings."""
        super().__init__()
        self.names, self.place = nn.Linear(width, words), nn.Linear(width, 2)

    def losses(self, features: Tensor, nouns: Tensor, batch: Batch) -> dict[str, Tensor]:
        """features [B, 64, W], nouns [N, W_words]; batch: cell_nouns and cell_places."""
        known = batch["cell_nouns"] >= 0
        if not known.any():
            zero = features.sum() * 0
            return {"cell": zero, "where": zero}
        read = self.names(features[known])
        cell = F.cross_entropy(read_logits(read, nouns), batch["cell_nouns"][known])
        where = losses.place_loss(self.place(features[known]).sigmoid(), batch["cell_places"][known])
        return {"cell": cell, "where": where}


def read_logits(slots: Tensor, words: Tensor) -> Tensor:
    """How well words [N, W] fit slots [K, W]: [K, N], in float32."""
    return READ_SCALE * matmul_fp32(slots.float(), words.float().mT)


class SlotLosses(nn.Module):
    """How far the queries' prefix is from what the slots are to say.

    nouns: the words of all nouns, as tokens with weights [N, T].
    """

    nouns_ids: Tensor
    nouns_weights: Tensor

    def __init__(self, slots: SlotPrefix, nouns_ids: Tensor, nouns_weights: Tensor) -> None:
        super().__init__()
        self.slots = slots
        self.register_buffer("nouns_ids", nouns_ids, persistent=False)
        self.register_buffer("nouns_weights", nouns_weights, persistent=False)

    def nouns(self, words: Tensor) -> Tensor:
        """[N, W], from the language model's embeddings."""
        return torch.einsum("ntw,nt->nw", words[self.nouns_ids], self.nouns_weights)

    def losses(self, prefix: Tensor, words: Tensor, batch: Batch) -> dict[str, Tensor]:
        """prefix [B, Q, W]; words: the language model's embeddings, whose gradient is not taken."""
        words = words.detach()
        target = self.slots(words, batch).detach().float()  # [B, Q, W]
        kinds = batch["slot_kinds"]
        error = (prefix.float() - target).square().sum(-1)  # [B, Q]
        weight = torch.where(kinds == EMPTY, 0.25, 1.0) * batch["slots_known"]
        slot = (error * weight).sum() / weight.sum()
        nouns = self.nouns(words)
        named = (kinds == OBJECT) | (kinds == PHOTOGRAPH)
        aim = read_logits(slot_words(words, batch)[named], nouns).softmax(-1)
        logits = read_logits(prefix[named], nouns)
        name = (-(aim * logits.log_softmax(-1)).sum(-1) + (aim * aim.clamp(min=1e-9).log()).sum(-1)).mean()
        return {"slot": slot, "name": name}


class QueryModel(nn.Module):
    """The generating model, the heads that read its image features, and what its queries are to say."""

    def __init__(self, model: Blip2, readers: CellReaders, slots: SlotLosses) -> None:
        super().__init__()
        self.model, self.readers, self.slots = model, readers, slots

    def losses(self, features: Tensor, prefix: Tensor, batch: Batch) -> dict[str, Tensor]:
        """features: the image encoder's [B, 65, W]; prefix: the projected queries."""
        words = embeddings(self.model)
        nouns = self.slots.nouns(words.detach())
        return self.slots.losses(prefix, words, batch) | self.readers.losses(features[:, 1:], nouns, batch)


WEIGHTS = {"slot": 0.3, "name": 1.5, "cell": 1.0, "where": 0.5}


class QueryPretrain(Task):
    """Image encoder, Q-Former and projection, from what each query and each cell is to say.

    Batch: pixels [B, 3, S, S], slots, cell_nouns and cell_places.
    """

    def __init__(self, both: QueryModel, *, muon_scale: float | None = None) -> None:
        self.module = self.both = both
        self.muon_scale = muon_scale
        model = both.model
        train_only(both, [model.vision, model.qformer, model.projection, both.readers])

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        return layerwise_groups(self.module, weight_decay, muon_scale=self.muon_scale)

    def losses(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        model = self.both.model
        features = model.vision(batch["pixels"])
        parts = self.both.losses(features, model.project(model.qformer(features)), batch)
        return {"loss": torch.stack([WEIGHTS[name] * part for name, part in parts.items()]).sum(), **parts}


class QueryFinetune(Finetune):
    """Fine-tuning of every part, the language model included, with the queries' own losses added.

    Texts alone teach a query little about its part: most of a caption follows from its earlier words.

    Batch: as `Stage2`'s and `QueryPretrain`'s together.
    """

    def __init__(
        self,
        both: QueryModel,
        *,
        read_weight: float = 0.3,
        language_muon_scale: float | None = None,
        vision_layer_decay: float = 1.0,
        muon_scale: float | None = None,
    ) -> None:
        """`read_weight`: of the queries' losses. `language_muon_scale`: `muon_scale` of the language model."""
        super().__init__(
            both.model, vision_layer_decay=vision_layer_decay, train_language=True, muon_scale=muon_scale
        )
        self.module = self.both = both
        both.slots.requires_grad_(False)
        self.read_weight, self.language_muon_scale = read_weight, language_muon_scale

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        model, language = self.model, self.model.language
        language.requires_grad_(False)
        groups = layerwise_groups(model, weight_decay, self.vision_layer_decay, self.muon_scale)
        language.requires_grad_(True)
        groups += layerwise_groups(language, weight_decay, muon_scale=self.language_muon_scale)
        return [*groups, *layerwise_groups(self.both.readers, 0.0)]

    def losses(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        model = self.model
        features = model.vision(batch["pixels"])
        prefix = model.project(model.qformer(features))
        text = self.prefix_loss(prefix, batch)
        parts = self.both.losses(features, prefix, batch)
        read = torch.stack([WEIGHTS[name] * part for name, part in parts.items()]).sum()
        return {"loss": text + self.read_weight * read, "text": text, **parts}


POSITION_SIGMA = 0.1  # of a query's attention around the middle of its part, as a share of the image's side
VALUE_GAIN = 2.0  # of the attended patches in a query, beside 1 of the query's own embedding
OBJECTNESS_LOGIT = 4.0  # by how much a patch that shows an object outscores one that does not, in nats


def init_query_attention(
    qformer: QFormer, features: Tensor, middles: Tensor, shown: Tensor, seed: int
) -> None:
    """Let every query attend to the patches of the object whose middle is in its part of the image. In place.

    In the first layer, the cross-attention's score of a patch is that of a Gaussian around the middle of the query's
    part, at the middle of the patch's object as its features predict it; values are passed on unchanged. The keys are
    fitted, by ridge regression, to image features with known places: -|c - p|^2 is linear in p and |p|^2, and the
    remaining |c|^2 is the same for all patches.

    Args:
        qformer: after `init_weights`; Q a square number, as wide as the image features, heads of four or more.
        features: [K, W], of patches from many images.
        middles: [K, 2], the middle of each patch's object, or of the patch itself if it shows none.
        shown: bool [K], whether the patch shows an object.
        seed: of the queries themselves, which are orthogonal to one another.

    Raises:
        ValueError: a Q-Former of another shape.
    """
    config, count = qformer.config, qformer.query_tokens.shape[1]
    width, heads = config.hidden_size, config.num_attention_heads
    side, size = math.isqrt(PARTS), width // heads
    if width != config.encoder_hidden_size or size < 4 or count > width:
        raise ValueError(
            f"{count} queries {width} wide in {heads} heads cannot be aimed at image features "
            f"{config.encoder_hidden_size} wide: at most as many as they are wide, widths equal, a head four or wider"
        )
    squares = middles.square().sum(1, keepdim=True)
    weight, bias = _ridge(features, torch.cat([middles, squares, shown.float()[:, None]], dim=1))  # to [K, 4]
    precision = 1 / (2 * POSITION_SIGMA**2)
    shared = torch.tensor([[-precision, OBJECTNESS_LOGIT]]).expand(PARTS, -1)
    codes = torch.zeros(count, 4)  # those beyond the parts attend everywhere
    codes[:PARTS] = torch.cat([2 * precision * centres(side), shared], dim=1)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.linalg.qr(torch.randn(width, count, generator=generator))[0].mT * math.sqrt(width)
    first = qformer.layers[0]
    assert isinstance(first, QFormerLayer) and first.crossattention is not None
    cross = first.crossattention
    with torch.no_grad():
        qformer.query_tokens[0] = tokens
        inputs = first.attention.output.LayerNorm(qformer.layernorm(qformer.query_tokens[0]))  # [Q, W]
        query = torch.linalg.lstsq(inputs, codes * math.sqrt(size)).solution.mT  # [4, W]
        for head in range(heads):
            rows = slice(head * size, head * size + 4)
            cross.attention.query.weight[rows] = query
            cross.attention.key.weight[rows] = weight
            cross.attention.key.bias[rows] = bias
        cross.attention.value.weight.copy_(torch.eye(width))
        cross.output.dense.weight.copy_(VALUE_GAIN * torch.eye(width))


def init_word_embeddings(language: Opt, names: Tensor, bags: Sequence[Sequence[int]], seed: int) -> None:
    """Give the words of names embeddings that add up to the names' vectors. In place, after `init_weights`.

    So a name is the same vector in every letter case and number, before any training.

    Args:
        names: [C, E], one vector of length one for each bag, E at most the language model's width.
        bags: the tokens of each name's form.
        seed: of the directions that the vectors take in the embeddings' space.
    """
    width = language.config.hidden_size
    tokens = torch.zeros(len(bags), language.config.vocab_size)  # how often each name has each token
    for row, found in zip(tokens, bags, strict=True):
        row += torch.bincount(torch.tensor(found), minlength=len(row))
    # The shortest embeddings that (nearly) add up to the names.
    used = tokens.any(0)
    some = tokens[:, used]
    gram = some.mT @ some + 0.05 * torch.eye(some.shape[1])
    words = torch.linalg.solve(gram, some.mT @ names)  # [V', E]
    noise = torch.randn(width, width, generator=torch.Generator().manual_seed(seed))
    directions = torch.linalg.qr(noise)[0][:, : names.shape[1]]  # [W, E]
    with torch.no_grad():
        language.embed_tokens.weight[used] += words @ directions.mT


def _ridge(x: Tensor, y: Tensor, penalty: float = 1e-2) -> tuple[Tensor, Tensor]:
    """Weight [M, W] and bias [M] that map x [K, W] to y [K, M], by ridge regression."""
    mean, target = x.mean(0), y.mean(0)
    gram = (x - mean).mT @ (x - mean) / len(x)
    gram += penalty * gram.diagonal().mean() * torch.eye(len(gram))
    weight = torch.linalg.solve(gram, (x - mean).mT @ (y - target) / len(x)).mT
    return weight, target - weight @ mean
