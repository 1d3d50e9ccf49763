"""The image encoder: pixels [B, 3, S, S] -> image features [B, N, W]. EVA-CLIP's ViT, as BLIP-2 uses it, or CLIP's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2.modeling.config import VisionConfig
from blip2.modeling.layers import ACTIVATION, attend, lacks_native_bf16, merge_heads


class VisionAttention(nn.Module):
    """Multi-head self-attention with one matrix for query, key and value."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.projection = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # [B, N, 3, H, D]
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, N, D]
        out: Tensor = self.projection(merge_heads(attend(query, key, value)).to(x.dtype))
        return out


class VisionFeedForward(nn.Module):
    """Two linear layers with an activation between them: [..., width] -> [..., width]."""

    def __init__(self, width: int, inner: int, activation: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)
        self.activation = ACTIVATION[activation]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.activation(self.fc1(x)))
        return out


class VisionBlock(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = VisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VisionFeedForward(config.hidden_size, config.intermediate_size, config.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        x = x + self.mlp(self.layer_norm2(x))
        return x


class ImageEncoder(nn.Module):
    """Pixels -> image features, the class position first, after the final norm."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, width))
        self.position_embedding = nn.Parameter(torch.zeros(1, config.num_positions, width))
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch, bias=not config.pre_norm)
        self.pre_layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps) if config.pre_norm else None
        self.layers = nn.ModuleList(VisionBlock(config) for _ in range(config.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(width, eps=config.last_norm_eps or config.layer_norm_eps)

    def forward(self, pixels: Tensor, *, interpolate: bool = False, keep: Tensor | None = None) -> Tensor:
        """Encode images: -> [B, N, W] with N = (S // patch_size) ** 2 + 1, or K + 1.

        Args:
            pixels: [B, 3, S, S], normalised; S is the config's image_size unless `interpolate`.
            interpolate: take images of another size; the position embeddings are resized to fit.
            keep: int64 [B, K], the patches to encode, counted row by row; the others are left out. Training on a
                part of every image is faster (Li et al., FLIP, 2023).

        Raises:
            ValueError: pixels of another shape than the encoder's, without `interpolate`.
        """
        size = self.config.image_size
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ValueError(f"pixels have shape {tuple(pixels.shape)}, expected [B, 3, {size}, {size}]")
        if not interpolate and pixels.shape[-2:] != (size, size):
            raise ValueError(
                f"images are {pixels.shape[-1]}x{pixels.shape[-2]} px but the image encoder takes {size}x{size}; "
                "resize them, or call `vision` or `embed_image` with interpolate=True"
            )
        patches = self._patches(pixels)
        positions = self.positions(patches.shape[-2], patches.shape[-1])
        first = self.class_embedding.expand(len(pixels), -1, -1)
        x = torch.cat([first, patches.flatten(2).mT], dim=1) + positions  # [B, N, W]
        if keep is not None:
            kept = x[:, 1:].gather(1, keep.unsqueeze(-1).expand(-1, -1, x.shape[-1]))  # [B, K, W]
            x = torch.cat([x[:, :1], kept], dim=1)
        if self.pre_layernorm is not None:
            x = self.pre_layernorm(x)
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.post_layernorm(x)
        return out

    def _patches(self, pixels: Tensor) -> Tensor:
        """Pixels -> patches [B, W, h, w]."""
        weight, bias = self.patch_embedding.weight, self.patch_embedding.bias
        dtype = torch.float32 if lacks_native_bf16(weight) else weight.dtype
        bias = bias if bias is None else bias.to(dtype)
        out = F.conv2d(pixels.to(dtype), weight.to(dtype), bias, self.config.patch_size)
        return out.to(weight.dtype)

    def positions(self, rows: int, columns: int) -> Tensor:
        """Position embeddings [1, rows * columns + 1, W] for a grid of patches, bicubic from the stored square."""
        grid = self.config.grid
        if (rows, columns) == (grid, grid):
            return self.position_embedding
        first, patches = self.position_embedding[:, :1], self.position_embedding[:, 1:]
        square = patches.unflatten(1, (grid, grid)).permute(0, 3, 1, 2)  # [1, W, grid, grid]
        resized = F.interpolate(square, size=(rows, columns), mode="bicubic", align_corners=False)
        return torch.cat([first, resized.flatten(2).mT], dim=1)
