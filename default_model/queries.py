"""A start for the queries of a small Q-Former and for the language model that reads them.

BLIP-2's Q-Former starts from BERT and learns from 129 million images which query should look where; its language model
knows the world's words. Small ones that have seen thousands get this from their first weights and from images whose
things and places are known: a query looks at its part of the image (`stand`) and learns to say what has its middle
there (`QueryPretrain`); the vectors by which it is read become the language model's word embeddings (`speak`), and that
learns to write about images (`LanguagePretrain`); in fine-tuning the queries are still held to it (`QueryFinetune`).
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
from blip2.train import losses
from blip2.train.loop import Task
from blip2.train.tasks import Finetune, Stage2, layerwise_groups, train_only
from default_model.pretrain import ImageTextEncoders

Batch = Mapping[str, Tensor]


class QueryReaders(nn.Module):
    """What reads queries: what each shows by name, where that is, and whether there is anything."""

    def __init__(self, encoders: ImageTextEncoders) -> None:
        """`encoders`: as wide as the queries; what has learned to read their patches goes on to read queries."""
        super().__init__()
        self.text, self.projection, self.place = encoders.text, encoders.patch_projection, encoders.place
        self.scale = encoders.patch_scale
        self.shown = nn.Linear(encoders.place.in_features, 1)

    def phrases(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Phrases, int64 ids and mask [P, T] -> the vector by which each is read, of length one: [P, E]."""
        return F.normalize(self.text(ids, mask).float(), dim=-1)

    def losses(self, queries: Tensor, batch: Batch) -> dict[str, Tensor]:
        """What is still wrong with queries [B, Q, W]; see `QueryPretrain` for the batch."""
        parts, places = batch["parts"], batch["places"]
        full, known = parts >= 0, parts != UNKNOWN
        phrases = self.phrases(batch["phrase_ids"], batch["phrase_mask"])
        said = F.normalize(self.projection(queries[full]).float(), dim=-1)  # [K, E]
        scale = self.scale.clamp(max=losses.MAX_LOGIT_SCALE).exp()
        name = F.cross_entropy(said @ phrases.mT * scale, parts[full])
        shown = F.binary_cross_entropy_with_logits(
            self.shown(queries[known]).squeeze(-1).float(), full[known].float()
        )
        place = losses.place_loss(self.place(queries)[full], places[full])
        return {"name": name, "shown": shown, "place": place}


class ReadModel(nn.Module):
    """A generating model and what reads its queries while it is trained."""

    def __init__(self, model: Blip2, readers: QueryReaders) -> None:
        super().__init__()
        self.model, self.readers = model, readers


class QueryPretrain(Task):
    """Queries from places: what has its middle in the part of the image a query answers for, and where that is.

    Trains the Q-Former and the readers.

    Batch: pixels [B, 3, S, S]; phrase_ids int64 and phrase_mask [P, T], all phrases that name things; parts int64
    [B, Q], the phrase of what each query answers for, -1 for nothing, `UNKNOWN` where nobody knows; places [B, Q, 2],
    its middle, column and row as shares of the image's side.
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
        wrong = self.both.readers.losses(self.both.model.qformer(features), batch)
        return {"loss": torch.stack(list(wrong.values())).sum(), **wrong}


class LanguagePretrain(Stage2):
    """A language model that learns to write from what queries hold: its text is about images from the first step on.

    Trains the language model and the projection; image encoder and Q-Former are frozen. Batch: as `Stage2`'s.
    """

    def __init__(self, model: Blip2, *, muon_scale: float | None = None) -> None:
        super().__init__(model, muon_scale=muon_scale)
        train_only(model, [model.projection, model.language])


class QueryFinetune(Finetune):
    """Fine-tuning of every part, the language model too, in which queries go on saying what is in their part.

    Texts tell a query little about its part: most of a caption follows from what has been written already.

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
        """`read_weight`: of what the readers find wrong. `language_muon_scale`: `muon_scale` of the language model."""
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
        wrong = self.readers.losses(queries, batch)
        loss = text + self.read_weight * torch.stack(list(wrong.values())).sum()
        return {"loss": loss, "text": text, **wrong}


UNKNOWN = -2  # in a batch's parts: an image of which nobody knows where its things are


REACH = 0.1  # of a query around the middle of its part: a standard deviation, as a share of the image's side
LOUD = 2.0  # how much of what it has seen a query holds, beside one of what it is
EAGER = 4.0  # what a patch that shows a thing has over one that does not, in nats


def parts_of(middles: Tensor, queries: int) -> Tensor:
    """Which query answers for each of one image's things: int64 [K], all different.

    Parts are the cells of a square grid, row by row. A thing belongs to the part its middle is in, or to the nearest
    that is still free.

    Args:
        middles: [K, 2], column and row as shares of the image's side; K <= queries.
        queries: how many parts, a square number.
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


def stand(qformer: QFormer, features: Tensor, middles: Tensor, shown: Tensor, seed: int) -> None:
    """Let every query look at the patches of what has its middle in its part of the image. In place.

    In the first layer, the cross-attention's score of a patch is that of a Gaussian around the middle of the query's
    part, at the place where the patch says that the middle of what it shows is; what is read is handed on unchanged.
    The keys are fitted, by ridge regression, to image features whose places are known: -|c - p|^2 is linear in p and
    |p|^2, and the |c|^2 that is left is the same for all patches.

    Args:
        qformer: after `initialise`; Q a square number, as wide as the image features, heads of four or more.
        features: [K, W], of patches from many images.
        middles: [K, 2], the middle of what each patch shows, or of the patch where that is nothing.
        shown: bool [K], whether the patch shows a thing.
        seed: of the queries themselves, which are orthogonal to one another.

    Raises:
        ValueError: a Q-Former of another shape.
    """
    config, count = qformer.config, qformer.query_tokens.shape[1]
    width, heads = config.hidden_size, config.num_attention_heads
    side, size = math.isqrt(count), width // heads
    if side * side != count or width != config.encoder_hidden_size or size < 4 or count > width:
        raise ValueError(
            f"{count} queries {width} wide in {heads} heads cannot stand over image features "
            f"{config.encoder_hidden_size} wide: the number must be square and at most the width, "
            "the widths equal, a head four or wider"
        )
    wanted = torch.cat(
        [middles, middles.square().sum(1, keepdim=True), shown.float()[:, None]], dim=1
    )  # [K, 4]
    weight, bias = _ridge(features, wanted)
    sharp = 1 / (2 * REACH**2)
    codes = torch.cat(
        [2 * sharp * _centres(side), torch.tensor([[-sharp, EAGER]]).expand(count, -1)], dim=1
    )  # [Q, 4]
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.linalg.qr(torch.randn(width, count, generator=generator))[0].mT * math.sqrt(width)
    first = qformer.layers[0]
    assert isinstance(first, QFormerLayer) and first.crossattention is not None
    read = first.crossattention
    with torch.no_grad():
        qformer.query_tokens[0] = tokens
        seen = first.attention.output.LayerNorm(qformer.layernorm(qformer.query_tokens[0]))  # [Q, W]
        query = torch.linalg.lstsq(seen, codes * math.sqrt(size)).solution.mT  # [4, W]
        for head in range(heads):
            rows = slice(head * size, head * size + 4)
            read.attention.query.weight[rows] = query
            read.attention.key.weight[rows] = weight
            read.attention.key.bias[rows] = bias
        read.attention.value.weight.copy_(torch.eye(width))
        read.output.dense.weight.copy_(LOUD * torch.eye(width))


def speak(
    model: Blip2,
    readers: QueryReaders,
    queries: Tensor,
    full: Tensor,
    names: Tensor,
    bags: Sequence[list[int]],
) -> None:
    """Let the projected queries say in the language model's words what they say to their readers. In place.

    A name's tokens get embeddings that add up to the vector by which the readers know it; the projection keeps that
    space as it is. So the word nearest to a projected query names what it shows before anything has been trained, and
    the head, which shares the embeddings, can write it. No linear map takes queries to words drawn by chance: there are
    more names than dimensions.

    Args:
        model: after `initialise`, its language model an OPT at least three wider than the readers' space.
        queries: [K, W], of many images.
        full: bool [K], whether each shows a thing.
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
    # The shortest embeddings that add up to the names, nearly.
    words = tokens.mT @ torch.linalg.solve(tokens @ tokens.mT + 0.1 * torch.eye(len(bags)), names)  # [V, E]
    drawn = torch.randn(width, width, generator=torch.Generator().manual_seed(SPOKEN_SEED))
    directions = torch.linalg.qr(drawn)[0]  # [W, W]
    with torch.no_grad():
        language.embed_tokens.weight += words @ directions[:, :space].mT
        # Names from what is read of them, places and whether there is a thing in directions of their own.
        reading = torch.cat([readers.projection.weight, readers.place.weight, readers.shown.weight])
        read = queries @ reading.mT  # [K, E + 3]
        middle = torch.cat([read[full, :space].mean(0), read[:, space:].mean(0)])
        length = (read[full, :space] - middle[:space]).norm(dim=1).mean()
        loud = torch.cat([(NAMES_LOUD / length).expand(space), OTHERS_LOUD / read[:, space:].std(0)])
        model.projection.weight.copy_(directions[:, : space + 3] @ (loud[:, None] * reading))
        model.projection.bias.copy_(directions[:, : space + 3] @ (-loud * middle))


SPOKEN_SEED = 7
NAMES_LOUD, OTHERS_LOUD = 1.5, 0.7  # lengths of what a projected query says, beside words of one


def _centres(side: int) -> Tensor:
    """The middles of a square grid's cells, row by row: [side * side, 2], column and row in 0..1."""
    steps = (torch.arange(side) + 0.5) / side
    return torch.cartesian_prod(steps, steps).flip(1)


def _ridge(x: Tensor, y: Tensor, penalty: float = 1e-2) -> tuple[Tensor, Tensor]:
    """Weight [M, W] and bias [M] that give y [K, M] from x [K, W], by ridge regression."""
    mean, target = x.mean(0), y.mean(0)
    gram = (x - mean).mT @ (x - mean) / len(x)
    gram += penalty * gram.diagonal().mean() * torch.eye(len(gram))
    weight = torch.linalg.solve(gram, (x - mean).mT @ (y - target) / len(x)).mT
    return weight, target - weight @ mean
