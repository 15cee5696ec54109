"""What training may do to its white noise: functions of the noise (B, C, H, W) and of the draw it came from.

They draw what more they need from the same `draw` under purposes of their own, so none of them moves another draw.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from components.config import TrainingConfig


class Drawing(Protocol):
    """The random numbers of one batch: a `Draw`, or one whose times are fixed."""

    def normal(self, shape: Sequence[int], purpose: str = "noise", /) -> Tensor: ...
    def uniform(self, size: int, purpose: str = "time", /) -> Tensor: ...


Noising = Callable[[Tensor, Drawing], Tensor]  # noise (B, C, H, W), draw -> noise (B, C, H, W)


def white(noise: Tensor, draw: Drawing) -> Tensor:
    """The noise as it was drawn."""
    return noise


def offset(noise: Tensor, draw: Drawing, *, strength: float) -> Tensor:
    """noise + strength * N(0, 1) per sample and channel, the same everywhere in a picture: its brightness is learnt.

    The variance is 1 + strength^2, as in every trainer that has it.
    Source: N. Guttenberg, "Diffusion with Offset Noise", crosslabs.org/blog, 2023.
    """
    return noise + strength * draw.normal((*noise.shape[:2], 1, 1), "noise_offset")


def pyramid(noise: Tensor, draw: Drawing, *, iterations: int, discount: float) -> Tensor:
    """Multi-resolution noise: noise at 1/2, 1/4, ... of the size is stretched to full size and added times discount^i.

    Every level is stretched linearly and has variance 1 at every pixel, and so has the sum: the SNR of the path stays.
    It ends after `iterations` levels, or when a side is one pixel long.
    Raises: ValueError if iterations < 1 or discount is not positive.
    Source: J. Whitaker, "Multi-Resolution Noise for Diffusion Model Training", wandb.ai/johnowhitaker, 2023.
    """
    if iterations < 1 or discount <= 0:
        raise ValueError(f"iterations is {iterations} and discount {discount}, expected at least 1 and above 0")
    height, width = noise.shape[2:]
    total, variance = noise, 1.0
    for i in range(1, iterations + 1):
        h, w = max(1, height >> i), max(1, width >> i)
        level = draw.normal((*noise.shape[:2], h, w), f"multires_noise/{i}")
        total = total + discount**i * (_stretch(h, height) @ level @ _stretch(w, width).mT)
        variance += discount ** (2 * i)
        if 1 in (h, w):
            break
    return total / variance**0.5


def _stretch(short: int, long: int) -> Tensor:
    """(long, short) linear interpolation with rows of norm 1, so that white noise keeps its variance."""
    rows = functional.interpolate(torch.eye(short)[None], size=long, mode="linear")[0].mT
    return functional.normalize(rows, dim=1)


def perturbed(noise: Tensor, draw: Drawing, *, gamma: float) -> Tensor:
    """noise + gamma * N(0, 1), for the model's input alone: the target keeps the noise without it.

    Source: Ning et al. 2023, arXiv:2301.11706.
    """
    return noise + gamma * draw.normal(noise.shape, "input_perturbation")


NOISES: dict[str, Callable[[TrainingConfig], Noising]] = {  # the training key that switches it on -> what it does
    "noise_offset": lambda training: partial(offset, strength=training.noise_offset),
    "multires_noise_iterations": lambda training: partial(
        pyramid, iterations=training.multires_noise_iterations, discount=training.multires_noise_discount
    ),
}
INPUT_NOISES: dict[str, Callable[[TrainingConfig], Noising]] = {  # the same, for what the model sees alone
    "ip_noise_gamma": lambda training: partial(perturbed, gamma=training.ip_noise_gamma),
}


def chosen(table: dict[str, Callable[[TrainingConfig], Noising]], training: TrainingConfig) -> Noising:
    """The entry of `table` whose key the recipe switches on, else white noise; the recipe allows one at a time."""
    return next((build(training) for key, build in table.items() if getattr(training, key)), white)
