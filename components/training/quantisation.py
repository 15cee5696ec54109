"""The frozen base in 8 or 4 bits a weight, while an adapter trains in float32 (QLoRA, Dettmers et al. 2023,
arXiv:2305.14314).

A layer keeps codes and scales, and decodes its weights for each product, forwards and backwards. Autograd then keeps
the codes; a weight that is decoded outside of it would be kept as it is, until every layer has been decoded at once.
Nothing here is particular to a device, and what is decoded is the same on all of them up to rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from components.training.blocks import blocks_of

INT8_LARGEST = 127
FP8 = torch.float8_e4m3fn
FP8_LARGEST = torch.finfo(FP8).max  # 448
NO_ZERO = 1e-30  # stands for the largest weight of a row without any
NF4_BLOCK = 64  # weights that share a scale
NF4_LEVELS = (  # quantiles of a standard normal, scaled to [-1, 1]: QLoRA, appendix E
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
Codes = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Precision:
    """How a weight (out, in) float32 becomes tensors, and how these become the weight again, in any dtype."""

    encode: Callable[[Tensor], Codes]
    decode: Callable[[Codes, tuple[int, int], torch.dtype], Tensor]


def _largest(weight: Tensor) -> Tensor:
    """Of each row, (rows, 1)."""
    return weight.abs().amax(dim=1, keepdim=True).clamp_min(NO_ZERO)


def _to_int8(weight: Tensor) -> Codes:
    scale = _largest(weight) / INT8_LARGEST
    return (weight / scale).round().to(torch.int8), scale


def _from_int8(codes: Codes, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return codes[0].to(dtype) * codes[1].to(dtype)


def _to_fp8(weight: Tensor) -> Codes:
    """Kept as bytes, so that a module that is moved to another dtype does not take them along."""
    scale = _largest(weight) / FP8_LARGEST
    return (weight / scale).to(FP8).view(torch.uint8), scale


def _from_fp8(codes: Codes, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return codes[0].view(FP8).to(dtype) * codes[1].to(dtype)


def _to_nf4(weight: Tensor) -> Codes:
    """Two codes in a byte, the first in its upper half, as bitsandbytes has them; the pairs of levels go along."""
    levels = torch.tensor(NF4_LEVELS, device=weight.device)
    flat = weight.flatten()
    blocks = functional.pad(flat, (0, -len(flat) % NF4_BLOCK)).view(-1, NF4_BLOCK)
    scale = _largest(blocks)
    nearest = torch.bucketize(blocks / scale, (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8)
    upper, lower = nearest.view(-1, 2).unbind(1)
    return upper << 4 | lower, scale, torch.cartesian_prod(levels, levels)


def _from_nf4(codes: Codes, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    packed, scale, pairs = codes
    blocks = functional.embedding(packed.int(), pairs.to(dtype)).view(-1, NF4_BLOCK) * scale.to(dtype)
    return blocks.flatten()[: shape[0] * shape[1]].view(shape)


PRECISIONS: dict[str, Precision] = {  # training.base_precision -> how it is done
    "fp8": Precision(_to_fp8, _from_fp8),
    "int8": Precision(_to_int8, _from_int8),
    "nf4": Precision(_to_nf4, _from_nf4),
}


class _Product(torch.autograd.Function):
    """x W^T + b, of which only the gradient of x is ever asked for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, name: str, shape: tuple[int, int], *codes: Tensor) -> Tensor:
        ctx.save_for_backward(*codes)
        ctx.name, ctx.shape = name, shape
        return functional.linear(x, PRECISIONS[name].decode(codes, shape, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        codes = ctx.saved_tensors  # once: what is computed again for a checkpoint is handed out only once
        weight = PRECISIONS[ctx.name].decode(codes, ctx.shape, grads[0].dtype)
        return grads[0] @ weight, None, None, None, *(None for _ in codes)


class QuantisedLinear(nn.Linear):
    """A frozen linear layer whose weight is kept in a few bits.

    `weight` is decoded when it is asked for, as DoRA does: a copy, so what is written into it is lost.
    """

    def __init__(self, layer: nn.Linear, precision: str, device: str):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.precision = layer.in_features, layer.out_features, precision
        self.bias, self._dtype = layer.bias, layer.weight.dtype
        for place, tensor in enumerate(PRECISIONS[precision].encode(layer.weight.detach().to(device).float())):
            self.register_buffer(f"codes_{place}", tensor)

    @property
    def _codes(self) -> Codes:
        return tuple(self._buffers.values())  # type: ignore[arg-type]

    @property
    def _shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return PRECISIONS[self.precision].decode(self._codes, self._shape, self._dtype)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if not x.requires_grad:  # nothing to keep for a backward pass
            return functional.linear(x, PRECISIONS[self.precision].decode(self._codes, self._shape, x.dtype), bias)
        return _Product.apply(x, bias, self.precision, self._shape, *self._codes)  # type: ignore[no-any-return]


def quantise(denoiser: nn.Module, precision: str, device: str) -> None:
    """Keep the frozen linear layers of `denoiser`'s blocks on `device` in `precision`, one after the other.

    What an adapter was made from before this, PiSSA's residual too, is what is quantised, and its own layers are not.
    Layers outside of the blocks, a few percent, and convolutions stay as they are.
    """
    for block in list(blocks_of(denoiser)):
        for parent in list(block.modules()):
            for name, layer in list(parent.named_children()):
                if type(layer) is nn.Linear and not layer.weight.requires_grad:
                    setattr(parent, name, QuantisedLinear(layer, precision, device))
    denoiser.to(device)
