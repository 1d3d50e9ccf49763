"""A start for the queries of a small Q-Former, from images whose things and places are known.

BLIP-2's Q-Former starts from BERT and learns from 129 million images which query should look where. One that has seen
thousands gets this from its first weights (`stand`) and a short pre-training (`QueryPretrain`): a query says what has
its middle in its part of the image, and where exactly. `Spelling` then has it say this in words that the language model
reads already.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2.model import Blip2
from blip2.opt import Opt
from blip2.qformer import Layer, QFormer
from blip2.train import losses
from blip2.train.loop import Task
from blip2.train.pretrain import ImageTextEncoders, bag_embeddings, say
from blip2.train.tasks import layerwise_groups, train_only

Batch = Mapping[str, Tensor]


class QueryReaders(nn.Module):
    """A Q-Former and what reads its queries, as wide as the image features: names, places, whether there is a thing."""

    def __init__(self, encoders: ImageTextEncoders, qformer: QFormer) -> None:
        """`encoders`: trained by `ContrastivePretrain`; what reads their patches goes on to read the queries."""
        super().__init__()
        self.encoders, self.qformer = encoders, qformer
        self.shown = nn.Linear(qformer.config.hidden_size, 1)


class QueryPretrain(Task):
    """Queries from places: what has its middle in the part of the image a query answers for, and where that is.

    Trains the Q-Former's query branch and the readers; the image encoder is frozen.

    Batch: pixels [B, 3, S, S] (or features [B, N, W]); phrase_ids int64 and phrase_mask [P, T], all phrases that name
    things; parts int64 [B, Q], the phrase of what each query answers for, -1 for nothing; places [B, Q, 2], its
    middle, column and row as shares of the image's side.
    """

    def __init__(self, readers: QueryReaders, *, muon_scale: float | None = None) -> None:
        self.module = self.readers = readers
        self.muon_scale = muon_scale
        readers.encoders.vision.requires_grad_(False)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        return layerwise_groups(self.module, weight_decay, muon_scale=self.muon_scale)

    def losses(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        readers, encoders = self.readers, self.readers.encoders
        with torch.no_grad():
            features = batch["features"] if "features" in batch else encoders.vision(batch["pixels"])
        queries = readers.qformer(features)  # [B, Q, W]
        full = batch["parts"] >= 0
        phrases = F.normalize(
            encoders.text(batch["phrase_ids"], batch["phrase_mask"]).float(), dim=-1
        )  # [P, E]
        said = F.normalize(encoders.patch_projection(queries[full]).float(), dim=-1)  # [K, E]
        scale = encoders.patch_scale.clamp(max=losses.MAX_LOGIT_SCALE).exp()
        name = F.cross_entropy(said @ phrases.mT * scale, batch["parts"][full])
        shown = F.binary_cross_entropy_with_logits(readers.shown(queries).squeeze(-1).float(), full.float())
        place = losses.place_loss(encoders.place(queries)[full], batch["places"][full])
        return {"loss": name + shown + place, "name": name, "shown": shown, "place": place}


class SpellingModel(nn.Module):
    """A generating model and how sharply its queries' words are told apart."""

    def __init__(self, model: Blip2) -> None:
        super().__init__()
        self.model = model
        self.log_scale = nn.Parameter(torch.zeros(()))


class Spelling(Task):
    """Queries that say what is in an image in words the language model has learned to read in their place.

    Trains the Q-Former and the projection, with `train_vision` the image encoder too; the language model is frozen.

    Batch: pixels [B, 3, P, P] (or features [B, N, W]); bags int64 [C, K], all that a query can say, each a bag of
    tokens, -1 where there are fewer than K; spelled int64 [B, Q, S], which up to S of them each query is to say
    at once.
    """

    def __init__(
        self, speller: SpellingModel, *, train_vision: bool = False, muon_scale: float | None = None
    ) -> None:
        self.module = self.speller = speller
        self.model, self.muon_scale = speller.model, muon_scale
        self.train_vision = train_vision
        trained: list[nn.Module] = [self.model.qformer, self.model.projection]
        train_only(speller, [*trained, self.model.vision] if train_vision else trained)
        speller.log_scale.requires_grad_(True)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        return layerwise_groups(self.module, weight_decay, muon_scale=self.muon_scale)

    def losses(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        model, spelled = self.model, batch["spelled"]
        assert isinstance(model.language, Opt)
        with torch.no_grad():
            words = bag_embeddings(model.language, batch["bags"]).float()  # [C, W]
        with torch.set_grad_enabled(self.train_vision and torch.is_grad_enabled()):
            features = batch["features"] if "features" in batch else model.vision(batch["pixels"])
        said = model.project(model.qformer(features)).float()  # [B, Q, W]
        whole = say(words, spelled)  # [B, Q, W]
        distance = (said - whole).square().sum(-1).mean() / words.square().sum(1).mean()
        # Each word by itself, what is said beside it taken away: [M, W], M words in all.
        told = spelled >= 0
        others = whole.unsqueeze(2) - words[spelled.clamp(min=0)]  # [B, Q, S, W]
        alone = (said.unsqueeze(2) - others)[told]
        # The likelihood of Gaussians around the words: the length is learned with the direction.
        near = 2 * alone @ words.mT - words.square().sum(1)  # [M, C]
        name = F.cross_entropy(near * self.speller.log_scale.exp(), spelled[told])
        return {"loss": name + distance, "name": name, "distance": distance}


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
    assert isinstance(first, Layer) and first.crossattention is not None
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
