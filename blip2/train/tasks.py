"""What is trained in each stage, and on which losses.

Batches are dicts of tensors. With a frozen image encoder a batch may hold `features` [B, N, W], the encoder's
output for the images, in place of `pixels`: computed once, they serve every epoch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from blip2.modeling.blip2 import Blip2, Blip2Matcher
from blip2.modeling.language import IGNORE_INDEX
from blip2.train import losses
from blip2.train.loop import Task, decays

Batch = Mapping[str, Tensor]
GROUP_ROWS = 24  # texts of similar length that the language model reads together


class StageTask(Task):
    """What the stages share: the optimizer's groups, and eval mode for the parts that are frozen."""

    vision_layer_decay: float = 1.0
    muon_scale: float | None = None

    def train_mode(self) -> None:
        self.module.train()
        for part in self.module.children():
            if not any(p.requires_grad for p in part.parameters()):
                part.eval()

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        return layerwise_groups(self.module, weight_decay, self.vision_layer_decay, self.muon_scale)


class Stage1(StageTask):
    """ITC + ITM + ITG: the queries learn to extract from an image what its text says.

    Trains the Q-Former with its heads; with `train_vision` the image encoder too (retrieval fine-tuning).

    Batch: pixels [B, 3, S, S] (or features [B, N, W]); ids int64 [B, T], beginning with [CLS], padded or cut to 32;
    mask [B, T]; optionally image_ids int64 [B]: rows of the same image are positives of each other, never negatives.
    """

    def __init__(
        self,
        matcher: Blip2Matcher,
        dec_token_id: int,
        *,
        train_vision: bool = False,
        vision_layer_decay: float = 1.0,
        muon_scale: float | None = None,
    ) -> None:
        """`dec_token_id`: the text vocabulary's [DEC], which begins a text to be generated."""
        if matcher.temp is None or matcher.itg_head is None:
            raise ValueError(
                "this matcher has no head for generation (ITG); build it as Blip2Matcher(config, itg=True)"
            )
        self.module = self.matcher = matcher
        self.temp = matcher.temp
        self.dec_token_id = dec_token_id
        self.vision_layer_decay, self.muon_scale = vision_layer_decay, muon_scale
        train_only(
            matcher, [part for part in matcher.children() if train_vision or part is not matcher.vision]
        )
        self.temp.requires_grad_(True)

    def losses(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        matcher, ids, mask = self.matcher, batch["ids"], batch["mask"]
        features = _features(matcher.vision, batch)  # [B, N, W]
        image_ids = batch.get("image_ids")

        itg_ids = ids.clone()
        itg_ids[:, 0] = self.dec_token_id
        queries, itg_logits = matcher.queries_and_text_logits(features, itg_ids, mask)  # [B, Q, W], [B, T, V]
        itg = losses.itg_loss(itg_logits, itg_ids, mask)

        similarity = losses.query_similarity(
            matcher.project_queries(queries), matcher.text_embeddings(ids, mask), self.temp
        )  # [B, B]
        itc = losses.contrast(similarity, image_ids)

        weights = similarity.detach()
        other_text, other_image = losses.hard_negatives(weights, weights.mT, generator, image_ids)
        logits = matcher.itm_logits(
            torch.cat([features, features[other_image], features]),
            torch.cat([ids, ids, ids[other_text]]),
            torch.cat([mask, mask, mask[other_text]]),
        )  # [3B, 2]
        labels = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
        labels[: len(ids)] = 1
        itm = losses.itm_loss(logits, labels)
        return {"loss": itc + itm + itg, "itc": itc, "itm": itm, "itg": itg}


class Stage2(StageTask):
    """Captions through the frozen language model. Trains the Q-Former, its queries and the projection.

    Batch: pixels [B, 3, S, S] (or features [B, N, W]); input_ids, attention_mask int64 [R, T]; labels int64, -100 where
    there is no target: with OPT [R, T], on prompt and padding, with T5 [R, L], the text to write; optionally
    image_index int64 [R], the image each text is about (absent: R = B, in order), so that an image with several texts
    is encoded once.
    """

    def __init__(self, model: Blip2, *, muon_scale: float | None = None) -> None:
        self.module = self.model = model
        self.muon_scale = muon_scale
        train_only(model, [model.qformer, model.projection])

    def losses(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        queries = self.model.qformer(_features(self.model.vision, batch))
        return {"loss": self.text_loss(queries, batch)}

    def text_loss(self, queries: Tensor, batch: Batch) -> Tensor:
        """The language model's mean loss over all targets, after queries [B, Q, W]."""
        return self.prefix_loss(self.model.project(queries), batch)

    def prefix_loss(self, prefix: Tensor, batch: Batch) -> Tensor:
        """The language model's mean loss over all targets, after a prefix [B, Q, width of the language model]."""
        if (index := batch.get("image_index")) is not None:
            prefix = prefix[index]  # [R, Q, W]
        ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
        # OPT reads rows of similar length together, without their common padding.
        right_padded = bool((mask[:, 1:] <= mask[:, :-1]).all())
        total = (labels != IGNORE_INDEX).sum()
        groups = len(ids) // GROUP_ROWS
        if self.model.config.language.is_encoder_decoder or not right_padded or not total or groups < 2:
            return self.model.loss_from_prefix(prefix, ids, mask, labels)
        lengths = mask.sum(1)
        losses = []
        for rows in lengths.argsort().chunk(groups):
            end = int(lengths[rows].max())
            targets = labels[rows, :end]
            if count := (targets != IGNORE_INDEX).sum():
                loss = self.model.loss_from_prefix(prefix[rows], ids[rows, :end], mask[rows, :end], targets)
                losses.append(loss * count / total)
        return torch.stack(losses).sum()


class Finetune(Stage2):
    """Fine-tuning as for COCO captions: stage 2 with the image encoder, and on request the language model.

    vision_layer_decay: each image encoder layer learns at this fraction of the rate of the layer after it.
    """

    def __init__(
        self,
        model: Blip2,
        *,
        vision_layer_decay: float = 1.0,
        train_language: bool = False,
        muon_scale: float | None = None,
    ) -> None:
        super().__init__(model, muon_scale=muon_scale)
        self.vision_layer_decay = vision_layer_decay
        parts = [model.vision, model.qformer, model.projection, *([model.language] if train_language else [])]
        train_only(model, parts)


def layerwise_groups(
    module: nn.Module, weight_decay: float, vision_layer_decay: float = 1.0, muon_scale: float | None = None
) -> list[dict[str, Any]]:
    """Trained parameters grouped by weight decay, learning rate and optimizer.

    Block i of the image encoder's n learns at decay ** (n - i) times the rate, the embeddings before the blocks at
    decay ** (n + 1), everything after them at the full rate, as in LAVIS. With `muon_scale` the matrices of all
    blocks are trained by Muon, at that multiple of their rate.
    """
    names = [name for name, _ in module.named_parameters()]
    blocks = {name: int(name.split(".")[2]) for name in names if name.startswith("vision.layers.")}
    depth = 1 + max(blocks.values(), default=-1)
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = blocks.get(name, -1) + 1  # 0: the embeddings
        if not name.startswith("vision.") or name.startswith("vision.post_layernorm."):
            layer = depth + 1  # the full rate
        muon = muon_scale is not None and parameter.ndim == 2 and "layers." in name
        scale = vision_layer_decay ** (depth + 1 - layer) * (muon_scale or 1.0 if muon else 1.0)
        key = scale, weight_decay if decays(name, parameter) else 0.0, muon
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "lr_scale": scale, "weight_decay": decay, "muon": muon}
        for (scale, decay, muon), parameters in groups.items()
    ]


def _features(vision: nn.Module, batch: Batch) -> Tensor:
    """Image features of a batch; without a graph where the image encoder is frozen."""
    if "features" in batch:
        return batch["features"]
    trained = any(p.requires_grad for p in vision.parameters())
    with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
        features: Tensor = vision(batch["pixels"])
    return features


def train_only(module: nn.Module, parts: Iterable[nn.Module]) -> None:
    """Freeze a module except some of its parts."""
    module.requires_grad_(False)
    for part in parts:
        part.requires_grad_(True)
