"""Pre-training for the queries of a small Q-Former and for the language model that reads them.

BLIP-2's Q-Former starts from BERT and learns from 129 million images which query should look where; its language model
is pre-trained on text from the web. Small models with thousands of images get this from their initial weights and from
images whose objects and places are known: a query attends to its part of the image (`init_query_attention`) and learns
to name the object whose middle is there (`QueryPretrain`); the vectors by which queries are read become the language
model's word embeddings (`init_word_embeddings`), and it learns to write about images (`LanguagePretrain`); fine-tuning
keeps the queries' objective (`QueryFinetune`).
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
from blip2.train.tasks import Finetune, Stage2, layerwise_groups, train_only
from default_model import losses
from default_model.pretrain import ImageTextEncoders

Batch = Mapping[str, Tensor]


class QueryReaders(nn.Module):
    """Heads that read queries: the name of what each shows, where that is, and whether there is anything."""

    def __init__(self, encoders: ImageTextEncoders) -> None:
        """`encoders`: as wide as the queries; its heads for patches go on to read queries."""
        super().__init__()
        self.text, self.projection, self.place = encoders.text, encoders.patch_projection, encoders.place
        self.scale = encoders.patch_scale
        self.shown = nn.Linear(encoders.place.in_features, 1)

    def phrases(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Phrases, int64 ids and mask [P, T] -> the vector that identifies each, of length one: [P, E]."""
        return F.normalize(self.text(ids, mask).float(), dim=-1)

    def losses(self, queries: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The losses of queries [B, Q, W]; see `QueryPretrain` for the batch."""
        parts, places = batch["parts"], batch["places"]
        full, known = parts >= 0, parts != UNKNOWN
        phrases = self.phrases(batch["phrase_ids"], batch["phrase_mask"])
        names = F.normalize(self.projection(queries[full]).float(), dim=-1)  # [K, E]
        scale = self.scale.clamp(max=losses.MAX_LOGIT_SCALE).exp()
        name = F.cross_entropy(names @ phrases.mT * scale, parts[full])
        shown = F.binary_cross_entropy_with_logits(
            self.shown(queries[known]).squeeze(-1).float(), full[known].float()
        )
        place = losses.place_loss(self.place(queries)[full], places[full])
        return {"name": name, "shown": shown, "place": place}


class ReadModel(nn.Module):
    """A generating model and the heads that read its queries while it is trained."""

    def __init__(self, model: Blip2, readers: QueryReaders) -> None:
        super().__init__()
        self.model, self.readers = model, readers


class QueryPretrain(Task):
    """Queries from places: the object whose middle is in a query's part of the image, and where that is.

    Trains the Q-Former and the readers.

    Batch: pixels [B, 3, S, S]; phrase_ids int64 and phrase_mask [P, T], all phrases that name objects; parts int64
    [B, Q], the phrase of the object in each query's part, -1 for none, `UNKNOWN` without labels; places [B, Q, 2], its
    middle, column and row as shares of the image's side.
    """

    def __init__(self, both: ReadModel, *, muon_scale: float | None = None) -> None:
        self.module = self.both = both
        self.muon_scale = muon_scale
        train_only(both, [both.model.qformer, both.readers])

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        return layerwise_groups(self.module, weight_decay, muon_scale=self.muon_scale)

    def losses(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        with torch.no_grad():
            features = self.both.model.vision(batch["pixels"])
        parts = self.both.readers.losses(self.both.model.qformer(features), batch)
        return {"loss": torch.stack(list(parts.values())).sum(), **parts}


class LanguagePretrain(Stage2):
    """A language model that learns to write from frozen queries: its text is about images from the first step on.

    Trains the language model and the projection; image encoder and Q-Former are frozen. Batch: as `Stage2`'s.
    """

    def __init__(self, model: Blip2, *, muon_scale: float | None = None) -> None:
        super().__init__(model, muon_scale=muon_scale)
        train_only(model, [model.projection, model.language])


class QueryFinetune(Finetune):
    """Fine-tuning of every part, the language model included, with the queries' own losses added.

    Texts alone teach a query little about its part: most of a caption follows from its earlier words.

    Batch: as `Stage2`'s and `QueryPretrain`'s together.
    """

    def __init__(
        self,
        both: ReadModel,
        *,
        read_weight: float = 0.3,
        language_muon_scale: float | None = None,
        vision_layer_decay: float = 1.0,
        muon_scale: float | None = None,
    ) -> None:
        """`read_weight`: of the readers' losses. `language_muon_scale`: `muon_scale` of the language model."""
        super().__init__(
            both.model, vision_layer_decay=vision_layer_decay, train_language=True, muon_scale=muon_scale
        )
        self.module, self.readers = both, both.readers
        self.read_weight, self.language_muon_scale = read_weight, language_muon_scale

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        model, language = self.model, self.model.language
        language.requires_grad_(False)
        groups = layerwise_groups(model, weight_decay, self.vision_layer_decay, self.muon_scale)
        language.requires_grad_(True)
        groups += layerwise_groups(language, weight_decay, muon_scale=self.language_muon_scale)
        return [*groups, *layerwise_groups(self.readers, 0.0)]

    def losses(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        queries = self.model.qformer(self.model.vision(batch["pixels"]))
        text = self.text_loss(queries, batch)
        parts = self.readers.losses(queries, batch)
        loss = text + self.read_weight * torch.stack(list(parts.values())).sum()
        return {"loss": loss, "text": text, **parts}


UNKNOWN = -2  # in a batch's parts: an image without labels of objects and places

POSITION_SIGMA = 0.1  # of a query's attention around the middle of its part, as a share of the image's side
VALUE_GAIN = 2.0  # of the attended patches in a query, beside 1 of the query's own embedding
OBJECTNESS_LOGIT = 4.0  # by how much a patch that shows an object outscores one that does not, in nats


def assign_parts(middles: Tensor, queries: int) -> Tensor:
    """The query for each object of one image: int64 [K], all different.

    Parts are the cells of a square grid, row by row. An object belongs to the part its middle is in, or to the nearest
    that is still free.

    Args:
        middles: [K, 2], column and row as shares of the image's side; K <= queries.
        queries: the number of parts, a square number.
    """
    side = math.isqrt(queries)
    distance = torch.cdist(middles.float(), _centres(side))  # [K, Q]
    inside = ((middles * side).long().clamp(0, side - 1) * torch.tensor([1, side])).sum(1)
    distance[torch.arange(len(middles)), inside] = 0.0
    taken: list[int] = []
    for row in distance:
        row[taken] = math.inf
        taken.append(int(row.argmin()))
    return torch.tensor(taken, dtype=torch.int64)


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
    side, size = math.isqrt(count), width // heads
    if side * side != count or width != config.encoder_hidden_size or size < 4 or count > width:
        raise ValueError(
            f"{count} queries {width} wide in {heads} heads cannot be aimed at image features "
            f"{config.encoder_hidden_size} wide: the number must be square and at most the width, "
            "the widths equal, a head four or wider"
        )
    squares = middles.square().sum(1, keepdim=True)
    weight, bias = _ridge(features, torch.cat([middles, squares, shown.float()[:, None]], dim=1))  # to [K, 4]
    precision = 1 / (2 * POSITION_SIGMA**2)
    shared = torch.tensor([[-precision, OBJECTNESS_LOGIT]]).expand(count, -1)
    codes = torch.cat([2 * precision * _centres(side), shared], dim=1)  # [Q, 4]
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


def init_word_embeddings(
    model: Blip2,
    readers: QueryReaders,
    queries: Tensor,
    full: Tensor,
    names: Tensor,
    bags: Sequence[list[int]],
) -> None:
    """Initialize word embeddings and projection so that a projected query is near the words of what it shows. In place.

    A name's tokens get embeddings that add up to the vector that identifies it for the readers; the projection keeps
    that space. So before any training the word nearest to a projected query names what it shows, and the head, which
    shares the embeddings, can write it. No linear map could take queries to random word embeddings: there are more
    names than dimensions.

    Args:
        model: after `init_weights`; its language model an OPT, at least three wider than the readers' space.
        queries: [K, W], of many images.
        full: bool [K], whether each shows an object.
        names: [C, E], the readers' vectors of C names.
        bags: the tokens of each name.
    """
    language = model.language
    assert isinstance(language, Opt)
    width, space = language.config.hidden_size, names.shape[1]
    names = names - names.mean(0)
    names = names / names.norm(dim=1).mean()
    tokens = torch.zeros(len(bags), language.config.vocab_size)  # how often each name has each token
    for row, bag in zip(tokens, bags, strict=True):
        row += torch.bincount(torch.tensor(bag), minlength=len(row))
    # The shortest embeddings that (nearly) add up to the names.
    words = tokens.mT @ torch.linalg.solve(tokens @ tokens.mT + 0.1 * torch.eye(len(bags)), names)  # [V, E]
    noise = torch.randn(width, width, generator=torch.Generator().manual_seed(WORD_SEED))
    directions = torch.linalg.qr(noise)[0]  # [W, W]
    with torch.no_grad():
        language.embed_tokens.weight += words @ directions[:, :space].mT
        # Names in the readers' space, places and objectness in directions of their own.
        reading = torch.cat([readers.projection.weight, readers.place.weight, readers.shown.weight])
        read = queries @ reading.mT  # [K, E + 3]
        middle = torch.cat([read[full, :space].mean(0), read[:, space:].mean(0)])
        length = (read[full, :space] - middle[:space]).norm(dim=1).mean()
        gain = torch.cat([(NAME_GAIN / length).expand(space), OTHER_GAIN / read[:, space:].std(0)])
        model.projection.weight.copy_(directions[:, : space + 3] @ (gain[:, None] * reading))
        model.projection.bias.copy_(directions[:, : space + 3] @ (-gain * middle))


WORD_SEED = 7
NAME_GAIN, OTHER_GAIN = 1.5, 0.7  # lengths of a projected query's parts; words have length 1


def _centres(side: int) -> Tensor:
    """The middles of a square grid's cells, row by row: [side * side, 2], column and row in 0..1."""
    steps = (torch.arange(side) + 0.5) / side
    return torch.cartesian_prod(steps, steps).flip(1)


def _ridge(x: Tensor, y: Tensor, penalty: float = 1e-2) -> tuple[Tensor, Tensor]:
    """Weight [M, W] and bias [M] that map x [K, W] to y [K, M], by ridge regression."""
    mean, target = x.mean(0), y.mean(0)
    gram = (x - mean).mT @ (x - mean) / len(x)
    gram += penalty * gram.diagonal().mean() * torch.eye(len(gram))
    weight = torch.linalg.solve(gram, (x - mean).mT @ (y - target) / len(x)).mT
    return weight, target - weight @ mean
