"""The blocks that a denoiser repeats: nearly all of its weights and of its work."""

from collections.abc import Iterator
from typing import Any

from torch import nn

CONVOLUTIONAL = "ResnetBlock2D"  # a U-Net's other half, which diffusers does not count among its repeated blocks


def blocks_of(denoiser: Any) -> Iterator[nn.Module]:
    """By the classes that diffusers names for the model, else the members of its lists; none lies in another."""
    named = getattr(denoiser, "_repeated_blocks", None)
    lists = [child for child in denoiser.children() if isinstance(child, nn.ModuleList)]
    classes = {*named, CONVOLUTIONAL} if named else {type(block).__name__ for children in lists for block in children}
    yield from (module for module in denoiser.modules() if type(module).__name__ in classes)
