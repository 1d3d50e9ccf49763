"""The tasks that teach every query what to say, and the language model to read it.

BLIP-2's Q-Former learns from 129 million images, its language model from text of the web. Here each query has a slot
to say (slots.py): the language model first learns to read prefixes made of the facts themselves (`SlotLanguage`, no
images), then image encoder and queries learn to write such prefixes (`QueryPretrain`); fine-tuning trains every part on
texts and keeps that objective (`QueryFinetune`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2.modeling.blip2 import Blip2
from blip2.modeling.opt import Opt
from blip2.train.loop import Task
from blip2.train.losses import matmul_fp32
from blip2.train.tasks import Finetune, Stage2, layerwise_groups, train_only
from default_model.slots import EMPTY, OBJECT, PHOTOGRAPH, SlotPrefix, slot_words

Batch = Mapping[str, Tensor]
READ_SCALE = 8.0  # the inverse temperature of nouns: times the product of vectors of about unit length
# The standard deviation of what is added to each value of a prefix while the language model learns to read.
SLOT_NOISE = 0.05
MIXED, MIXED_SHARE = 0.08, 0.3  # the probability that a slot has this share of another slot of its picture
EMPTY_WEIGHT = 0.25  # of a slot without content, beside 1 of the others
LOSS_WEIGHTS = {"slot": 0.3, "name": 1.5, "cell": 1.0, "where": 0.5}


class SlotLanguage(Stage2):
    """The language model learns to read what the queries are to say; no image is involved.

    Trains the language model and the slots' own vectors.

    Batch: input_ids, attention_mask, labels and image_index as `Stage2` takes them, and slots as `SlotEncoder.encode`
    gives them.
    """

    def __init__(self, model: Blip2, slots: SlotPrefix, *, muon_scale: float | None = None) -> None:
        super().__init__(model, muon_scale=muon_scale)
        train_only(model, [model.language])
        self.slots = slots
        self.module = nn.ModuleDict({"model": model, "slots": slots})

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        return layerwise_groups(self.module, weight_decay, muon_scale=self.muon_scale)

    def losses(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        # What queries will say is never as clean: noise, and now and then a little of another slot.
        prefix = self.slots(embeddings(self.model), batch)  # [B, Q, W]
        shape, device = prefix.shape, prefix.device
        other = torch.randperm(shape[1], generator=generator, device=generator.device).to(device)
        mixed = torch.rand(shape[:2], generator=generator, device=generator.device).to(device) < MIXED
        mixture = (1 - MIXED_SHARE) * prefix + MIXED_SHARE * prefix[:, other]
        prefix = torch.where(mixed.unsqueeze(-1), mixture, prefix)
        noise = torch.randn(shape, generator=generator, device=generator.device).to(device)
        return {"loss": self.prefix_loss(prefix + SLOT_NOISE * noise, batch)}


def embeddings(model: Blip2) -> Tensor:
    """The language model's word embeddings, [V, W]."""
    assert isinstance(model.language, Opt)
    return model.language.embed_tokens.weight


class CellReaders(nn.Module):
    """Linear heads on the image encoder's features of a cell, for training alone: the object's noun and its middle."""

    def __init__(self, width: int, words: int) -> None:
        """`width`: of the features; `words`: the width of the language model's embeddings."""
        super().__init__()
        self.names, self.place = nn.Linear(width, words), nn.Linear(width, 2)

    def losses(self, features: Tensor, nouns: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The means over the cells that show an object: "cell", the nouns' cross-entropy; "where", see `place_loss`.

        Args:
            features: [B, C, W], without the class token's.
            nouns: [N, width of the language model].
            batch: cell_nouns int64 [B, C], negative where there is none, and cell_places [B, C, 2].
        """
        known = batch["cell_nouns"] >= 0
        if not known.any():
            zero = features.sum() * 0
            return {"cell": zero, "where": zero}
        read = self.names(features[known])
        cell = F.cross_entropy(read_logits(read, nouns), batch["cell_nouns"][known])
        where = place_loss(self.place(features[known]).sigmoid(), batch["cell_places"][known])
        return {"cell": cell, "where": where}


def place_loss(places: Tensor, target: Tensor) -> Tensor:
    """The share of the variance of places that is not explained: 1 for always the middle, 0 for the exact places.

    places, target: [..., 2], column and row as shares of the image's side. Gives a scalar in float32.
    """
    return 12 * F.mse_loss(places.float(), target)  # 1 / 12: the variance of a place drawn anywhere


def read_logits(slots: Tensor, words: Tensor) -> Tensor:
    """The logits of words [N, W] for slots [K, W]: [K, N], in float32."""
    return READ_SCALE * matmul_fp32(slots.float(), words.float().mT)


class SlotLosses(nn.Module):
    """How far the queries' prefix is from what the slots are to say; nothing in it is trained.

    nouns_ids, nouns_weights: the tokens of all nouns with their weights in a slot, [N, T].
    """

    nouns_ids: Tensor
    nouns_weights: Tensor

    def __init__(self, slots: SlotPrefix, nouns_ids: Tensor, nouns_weights: Tensor) -> None:
        super().__init__()
        self.slots = slots
        self.register_buffer("nouns_ids", nouns_ids, persistent=False)
        self.register_buffer("nouns_weights", nouns_weights, persistent=False)

    def nouns(self, words: Tensor) -> Tensor:
        """The nouns' vectors [N, W], from the language model's embeddings [V, W]."""
        return torch.einsum("ntw,nt->nw", words[self.nouns_ids], self.nouns_weights)

    def losses(self, prefix: Tensor, words: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Means over slots: "slot", the squared distance; "name", the distance of the nouns read and meant.

        "name" is the divergence of Kullback and Leibler, over the slots of objects and photographs.

        Args:
            prefix: [B, Q, W], the projected queries.
            words: [V, W], the language model's embeddings, which get no gradient.
            batch: slots as `SlotEncoder.encode` gives them; at least one is of an object or a photograph.
        """
        words = words.detach()
        target = self.slots(words, batch).detach().float()  # [B, Q, W]
        kinds = batch["slot_kinds"]
        error = (prefix.float() - target).square().sum(-1)  # [B, Q]
        weight = torch.where(kinds == EMPTY, EMPTY_WEIGHT, 1.0) * batch["slots_known"]
        slot = (error * weight).sum() / weight.sum()
        nouns = self.nouns(words)
        named = (kinds == OBJECT) | (kinds == PHOTOGRAPH)
        aim = read_logits(slot_words(words, batch)[named], nouns).softmax(-1)
        logits = read_logits(prefix[named], nouns)
        name = (-(aim * logits.log_softmax(-1)).sum(-1) + (aim * aim.clamp(min=1e-9).log()).sum(-1)).mean()
        return {"slot": slot, "name": name}


class QueryModel(nn.Module):
    """The generating model with what is needed to train its queries: the cells' heads and the slots' losses."""

    def __init__(self, model: Blip2, readers: CellReaders, slots: SlotLosses) -> None:
        super().__init__()
        self.model, self.readers, self.slots = model, readers, slots

    def losses(self, features: Tensor, prefix: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The losses of slots and cells, by name, as `LOSS_WEIGHTS` has them.

        features: the image encoder's, [B, 1 + C, W], the class token's first. prefix: [B, Q, width of the words].
        """
        words = embeddings(self.model)
        nouns = self.slots.nouns(words.detach())
        return self.slots.losses(prefix, words, batch) | self.readers.losses(features[:, 1:], nouns, batch)


def weighted(parts: Mapping[str, Tensor]) -> Tensor:
    """The sum of a `QueryModel`'s losses."""
    return torch.stack([LOSS_WEIGHTS[name] * part for name, part in parts.items()]).sum()


class QueryPretrain(Task):
    """Image encoder, Q-Former and projection learn what each query is to say and what each cell shows.

    Batch: pixels [B, 3, S, S], slots as `SlotEncoder.encode` gives them, and what `CellReaders.losses` takes.
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
        return {"loss": weighted(parts), **parts}


class QueryFinetune(Finetune):
    """Fine-tuning of every part, the language model included, with the queries' own losses added.

    Texts alone teach a query little about its part: most of a caption follows from its earlier words.

    Batch: what `Stage2` takes and what `QueryPretrain` takes.
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
        """read_weight: of the queries' losses, beside 1 of the texts'. language_muon_scale: the language model's."""
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
        return {"loss": text + self.read_weight * weighted(parts), "text": text, **parts}
