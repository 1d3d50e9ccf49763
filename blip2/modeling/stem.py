"""The stem: a frozen EfficientNet-Lite that turns an image into the "image" a small image encoder reads.

Pixels [B, 3, S, S] -> maps of stride 16 ("fine") and 32 (the "head") -> 768 values for each cell of 32 px -> laid out
as a patch of 3 x 16 x 16, so that an image encoder with patches of 16 px reads a cell as a patch, by a linear map: a
hybrid ViT (Dosovitskiy et al., 2021) on EfficientNet-Lite (Tan and Le, 2019). A cell's values are, in this order:

    coarse    a linear map of the head at the cell
    fine      a linear map of the fine map at the cell's 2 x 2 positions, one after the other, row by row
    evidence  what the network's own classifier, and prototypes of other things, say of the whole image: probabilities,
              mapped linearly

Batch norms are folded into the convolutions: the stem is never trained. All widths follow from the tensors' shapes.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2.modeling.config import MAX_LAYERS, ConfigError

Shapes = Mapping[str, tuple[int, ...]]

STRIDES = (
    1,
    2,
    2,
    2,
    1,
    2,
    1,
)  # of the first block of each stage; the first convolution halves the image before
FINE_STAGE = 4  # whose map has stride 16, from 0
STRIDE = 32  # of the head: the side of a cell in the image
PATCH = 16  # the side of a cell in the folded image
CELL_VALUES = 3 * PATCH * PATCH
PROFILE_TEMPERATURE = 3.0  # of the classifier's soft answers that prototypes are compared with
PROTOTYPE_SHARE = 0.5  # of the probability
# The standard deviation of the classifier's logits up to which a picture is like those it knows.
FAMILIAR_SPREAD = 0.9
_BATCH = 4  # images computed at a time: of more the maps leave the processor's cache
# The side of the images that weights are packed for; with others they would be packed anew at each call.
_PACKED_PX = 256


class Stem(nn.Module):
    """The network, without values; `load_state_dict` fills it. For inference only: no gradient passes."""

    def __init__(self, shapes: Shapes) -> None:
        """`shapes`: of all tensors, by name.

        Raises:
            ConfigError: they are not those of a stem: missing, left over, or not fitting each other.
        """
        super().__init__()
        width, kernel = (_size(shapes, "first.weight", dim) for dim in (0, 2))
        self.first = StemConv(3, width, kernel, stride=2)
        self.blocks, starts = nn.ModuleList(), list[int]()  # the first block of each stage
        for number in range(MAX_LAYERS):
            name = f"blocks.{number}"
            if f"{name}.project.weight" not in shapes:
                break
            outputs, inputs = _size(shapes, f"{name}.project.weight", 0), width
            stride = 1
            if outputs != inputs:  # a stage begins where the width changes
                stride = STRIDES[len(starts)] if len(starts) < len(STRIDES) else 1
                starts.append(number)
            middle, kernel = (_size(shapes, f"{name}.depth.weight", dim) for dim in (0, 2))
            expands = f"{name}.expand.weight" in shapes
            self.blocks.append(StemBlock(inputs, middle, outputs, kernel, stride, expands=expands))
            width = outputs
        if len(starts) != len(STRIDES) or starts[0] != 0:
            raise ConfigError(
                f"a stem has {len(STRIDES)} stages of blocks, each of a width; got {len(starts)}"
            )
        self._fine_block = starts[FINE_STAGE + 1] - 1
        fine, head = (
            _size(shapes, f"blocks.{self._fine_block}.project.weight", 0),
            _size(shapes, "head.weight", 0),
        )
        self.head = StemConv(width, head, kernel=1)
        self.readout = StemReadout(head, fine, shapes)
        _check_shapes({name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}, shapes)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels, float32 [B, 3, S, S], S a multiple of 32 -> the folded image, float32 [B, 3, S / 2, S / 2]."""
        folded: list[Tensor] = []
        for some in pixels.split(_BATCH):
            fine, head = self.maps(some)
            # an image at a time: products of more rows are summed in another order, which int8 would carry on
            folded += [fold(self.readout(*image)) for image in zip(fine.split(1), head.split(1), strict=True)]
        return torch.cat(folded)

    @torch.no_grad()
    def maps(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The fine map, [B, F, S / 16, S / 16], and the head, [B, H, S / 32, S / 32]."""
        x = fine = self.first(pixels.contiguous(memory_format=torch.channels_last))
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number == self._fine_block:
                fine = x
        return fine, self.head(x)

    def pack(self) -> Stem:
        """Lay the weights out for this CPU, where its convolutions can clamp what they give; gives the stem itself.

        No result changes. The weights can no longer be read or moved to another device.
        """
        image_px = _PACKED_PX
        for module in self.modules() if _cpu_fuses() else ():  # in the order in which they compute
            if isinstance(module, StemConv):
                module.pack(image_px)
                image_px //= module.stride
        return self


def folded_px(image_px: int) -> int:
    """The side of the folded image. Raises ConfigError where the image does not divide into cells."""
    if image_px % STRIDE:
        raise ConfigError(f"the stem takes images whose side is a multiple of {STRIDE} px, not {image_px}")
    return image_px // STRIDE * PATCH


def fold(cells: Tensor) -> Tensor:
    """The values of each cell, [B, 768, R, R] -> [B, 3, 16 R, 16 R]: cell (i, j) becomes the patch at (i, j).

    Value n goes to channel n // 256, row (n % 256) // 16 and column n % 16 of the patch.
    """
    patches: Tensor = cells.unflatten(1, (3, PATCH, PATCH))  # [B, 3, 16, 16, R, R]
    return patches.permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3)


class StemConv(nn.Module):
    """A convolution with its batch norm folded in, and ReLU6 where `active`. Padded as TensorFlow's "same"."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1, active: bool = True
    ) -> None:
        super().__init__()
        if kernel % 2 == 0 or kernel < stride:
            raise ConfigError(
                f"a stem's convolutions of stride {stride} are an odd number of px wide, not {kernel}"
            )
        self.weight = nn.Parameter(torch.empty(outputs, inputs // groups, kernel, kernel))
        self.bias = nn.Parameter(torch.empty(outputs))
        self.kernel, self.stride, self.groups, self.active = kernel, stride, groups, active
        self._packed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, S, S] -> [B, outputs, S / stride, S / stride]."""
        if self._packed is None:
            out = F.conv2d(x, self._padded(), self.bias, self.stride, self.kernel // 2, groups=self.groups)
            return out.clamp_(0, 6) if self.active else out
        clamp: tuple[str, list[float], str] = (
            ("hardtanh", [0.0, 6.0], "") if self.active else ("none", [], "")
        )
        fused: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x, self._packed, self.bias, *self._geometry(), *clamp
        )
        return fused

    def pack(self, image_px: int) -> None:
        """Keep the weight in oneDNN's layout alone, the one for maps of so many px."""
        weight = self._padded().detach()
        inputs = [_BATCH, weight.shape[1] * self.groups, image_px, image_px]
        self._packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *self._geometry(), inputs)
        self.weight.data = weight.new_empty(0)

    def _padded(self) -> Tensor:
        """The weight, with zeros above and on the left at stride 2: there "same" pads one pixel more after than before,
        so that the map would have to be copied to be padded. [outputs, inputs / groups, K, K]."""
        return F.pad(self.weight, (1, 0, 1, 0)) if self.stride == 2 else self.weight

    def _geometry(self) -> tuple[list[int], list[int], list[int], int]:
        """Padding, strides, dilation and groups as oneDNN takes them."""
        return [self.kernel // 2] * 2, [self.stride] * 2, [1, 1], self.groups


class StemBlock(nn.Module):
    """An inverted residual block: 1 x 1 to more channels, a convolution of each channel alone, 1 x 1 to fewer."""

    def __init__(
        self, inputs: int, middle: int, outputs: int, kernel: int, stride: int, *, expands: bool
    ) -> None:
        super().__init__()
        self.expand = StemConv(inputs, middle, kernel=1) if expands else None
        self.depth = StemConv(middle, middle, kernel, stride=stride, groups=middle)
        self.project = StemConv(middle, outputs, kernel=1, active=False)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, S, S] -> [B, outputs, S / stride, S / stride]."""
        wide = x if self.expand is None else self.expand(x)
        out: Tensor = self.project(self.depth(wide))
        return out.add_(x) if self.residual else out


class StemReadout(nn.Module):
    """What is kept of the maps: 768 values a cell."""

    def __init__(self, head: int, fine: int, shapes: Shapes) -> None:
        """`head`, `fine`: the maps' channels."""
        super().__init__()
        coarse, detail = (_size(shapes, f"readout.{name}.weight", 0) for name in ("coarse", "fine"))
        self.coarse, self.fine = nn.Linear(head, coarse), nn.Linear(fine, detail)
        self.classifier = self.prototypes = self.evidence = None
        evidence = 0
        if "readout.evidence.weight" in shapes:
            evidence, learned = _size(shapes, "readout.evidence.weight", 0), 0
            classes = _size(shapes, "readout.classifier.weight", 0)
            self.classifier = nn.Linear(head, classes)
            if "readout.prototypes.weight" in shapes:
                learned = _size(shapes, "readout.prototypes.weight", 0)
                self.prototypes = nn.Linear(classes + head, learned)
            self.evidence = nn.Linear(classes + learned, evidence, bias=False)
        if (values := coarse + 4 * detail + evidence) != CELL_VALUES:
            raise ConfigError(
                f"a stem reads {CELL_VALUES} values a cell: coarse + 4 x fine + evidence; "
                f"here are {coarse} + 4 x {detail} + {evidence} = {values}"
            )

    def forward(self, fine: Tensor, head: Tensor) -> Tensor:
        """Fine map [B, F, 2 R, 2 R] and head [B, H, R, R] -> the cells' values, [B, 768, R, R]."""
        places = head.permute(0, 2, 3, 1)  # [B, R, R, H]
        details: Tensor = self.fine(fine.permute(0, 2, 3, 1))  # [B, 2 R, 2 R, D]
        squares = details.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).transpose(2, 3)  # [B, R, R, 2, 2, D]
        parts = [self.coarse(places), squares.flatten(3)]
        if self.evidence is not None:
            evidence = self.evidence(self.probabilities(places.mean((1, 2))))  # [B, E]
            parts.append(evidence[:, None, None].expand(*places.shape[:3], -1))
        return torch.cat(parts, dim=-1).permute(0, 3, 1, 2)

    def probabilities(self, head: Tensor) -> Tensor:
        """What the whole image shows: the head's mean [B, H] -> probabilities [B, K], or [B, K + P] with prototypes.

        Prototypes are of things that the classifier has no class for: its soft answers (square roots of
        probabilities), and the head, are compared with those of known pictures.

        They add up to less than one where the picture is unlike those the network knows. Its logits then are large
        for many classes at once: with their spread as well, more of the wrong names are found at the same price in
        right ones.
        """
        assert self.classifier is not None
        logits = self.classifier(head)
        probabilities: Tensor = logits.softmax(-1)
        if self.prototypes is not None:
            profile = (logits / PROFILE_TEMPERATURE).softmax(-1).sqrt()
            compared = self.prototypes(torch.cat([profile, head], dim=-1)).softmax(-1)
            parts = (1 - PROTOTYPE_SHARE) * probabilities, PROTOTYPE_SHARE * compared
            probabilities = torch.cat(parts, dim=-1)
        spread = logits.std(-1, keepdim=True)
        familiar: Tensor = (FAMILIAR_SPREAD / spread).clamp(max=1).square()
        return probabilities * familiar


def _size(shapes: Shapes, name: str, dim: int) -> int:
    """A size of a tensor that must be there."""
    shape = shapes.get(name)
    if shape is None:
        raise ConfigError(f"the stem lacks the tensor {name}")
    if len(shape) <= dim or shape[dim] < 1:
        raise ConfigError(f"the stem's tensor {name} has the shape {list(shape)}")
    return shape[dim]


def _check_shapes(expected: Shapes, shapes: Shapes) -> None:
    """Refuse tensors that are missing, left over or of another shape than the others ask for."""
    problems = [f"lacks {name}" for name in expected if name not in shapes]
    problems += [f"has no place for {ascii(name)[:100]}" for name in shapes if name not in expected]
    problems += [
        f"has {name} of the shape {list(shapes[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more of this kind" if len(problems) > 3 else ""
        raise ConfigError(f"the stem {', '.join(problems[:3])}{more}")


def _cpu_fuses() -> bool:
    """Whether torch has oneDNN's convolutions with a function after them here; tried on x86 alone."""
    return platform.machine() in ("x86_64", "AMD64") and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
