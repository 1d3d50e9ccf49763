"""The formats of checkpoints, a file for each, and which of their layouts a file has."""

from collections.abc import Mapping

from blip2.checkpoint.formats.lavis import LAVIS
from blip2.checkpoint.formats.paddle import PADDLEMIX, PADDLENLP
from blip2.checkpoint.layouts import HUGGING_FACE, Layout


def detect_layout(shapes: Mapping[str, tuple[int, ...]]) -> Layout:
    """The layout of a file, from the names and shapes of its tensors.

    Where names do not show it, a linear layer does: its bias is as long as its weight's first side in torch, and as the
    second in Paddle.
    """
    for layout in (PADDLEMIX, LAVIS, PADDLENLP):  # PaddleMIX first: many of its names begin as LAVIS's
        if any(name.startswith(layout.marks) for name in shapes):
            return layout
    for name, shape in shapes.items():
        if len(shape) == 2 and name.endswith(".weight") and shape[0] != shape[1]:
            bias = shapes.get(name.removesuffix("weight") + "bias")
            if bias is not None:
                return PADDLENLP if bias == shape[1:] else HUGGING_FACE
    return HUGGING_FACE
