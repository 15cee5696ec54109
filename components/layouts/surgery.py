"""Adapters and weights into one another: merge into a base, extract from two checkpoints, resize.

The best approximation of a matrix by one of rank r, in the Frobenius norm, keeps its r largest singular values; its
error is the root of the sum of the squares of the others (Eckart and Young 1936).
"""

import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from components.errors import BadInput
from components.families.bases import BaseModel
from components.layouts.layers import Layer, lora
from components.layouts.skeleton import Skeleton
from components.layouts.tokens import Token
from components.layouts.vocabulary import teach
from components.storage import atomic_write
from components.tensors import to_safetensors


@dataclass(frozen=True, slots=True)
class Fitted:
    """Layers of a lower rank, and what that cost."""

    layers: list[Layer]
    errors: dict[str, float]  # layer -> |dW - dW_r| / |dW|, Frobenius
    error: float  # the same over all layers together


def resize(layers: Sequence[Layer], rank: int) -> Fitted:
    """The nearest LoRA of at most `rank` in every layer; layers that are small enough stay as they are.

    LoRA goes through the QR of its factors, LoHa and LoKr through their product. Raises BadInput for DoRA, whose
    lengths belong to the very sum that would change.
    """
    made, squares = [], {}
    for layer in layers:
        if layer.magnitude is not None:
            raise BadInput(f"{layer.name}: DoRA cannot be resized; merge it into the base and extract from that")
        if layer.kind == "lora" and (layer.rank or 0) <= rank:
            norm = layer.delta().double().norm().item()
            made.append(layer)
            squares[layer.name] = (0.0, norm * norm)
            continue
        shape = (
            layer.delta().shape
            if layer.kind != "lora"
            else (layer.weights["up"].shape[0], *layer.weights["down"].shape[1:])
        )
        u, s, vh = _svd_of_layer(layer)
        made.append(_truncated(layer, u, s, vh, rank, shape))
        squares[layer.name] = (s[rank:].square().sum().item(), s.square().sum().item())
    return _fitted(made, squares)


def extract(base: Skeleton, tuned: Skeleton, rank: int) -> Fitted:
    """The LoRA of rank `rank` nearest to what fine-tuning changed, by the SVD of tuned - base in every layer.

    Layers that did not change are left out. Raises BadInput when the two have other layers or shapes, or are equal.
    """
    made, squares = [], {}
    for part, shapes in base.shapes.items():
        other = tuned.shapes.get(part, {})
        odd = sorted(path for path in {*shapes, *other} if shapes.get(path) != other.get(path))
        if odd:
            raise BadInput(
                f"{tuned.name}: {part}.{odd[0]} is {other.get(odd[0])}, in {base.name} {shapes.get(odd[0])}; "
                "extract from two checkpoints of one architecture"
            )
        for path, shape in shapes.items():
            change = tuned.weight(part, path).double() - base.weight(part, path).double()
            if not change.any():
                continue
            u, s, vh = torch.linalg.svd(change.flatten(1), full_matrices=False)
            layer = Layer(part, path, "lora", {}, 1.0)
            made.append(_truncated(layer, u, s, vh, rank, shape))
            squares[layer.name] = (s[rank:].square().sum().item(), s.square().sum().item())
    if not made:
        raise BadInput(f"{tuned.name} and {base.name} have the same weights; give the fine-tuned one first")
    return _fitted(made, squares)


def _svd_of_layer(layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of a layer's update in float64; of a product of factors without ever forming it."""
    if layer.kind != "lora":
        return torch.linalg.svd(layer.delta().double().flatten(1), full_matrices=False)
    up, down = layer.weights["up"].double().flatten(1), layer.weights["down"].double().flatten(1)
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.T)
    u, s, vh = torch.linalg.svd(layer.scale * r_up @ r_down.T)
    return q_up @ u, s, vh @ q_down.T


def _truncated(layer: Layer, u: Tensor, s: Tensor, vh: Tensor, rank: int, shape: Sequence[int]) -> Layer:
    """Both factors take the root of the singular values, so that neither is much larger than the other."""
    root = s[:rank].sqrt()
    return lora(layer, (root[:, None] * vh[:rank]).float(), (u[:, :rank] * root).float(), shape)


def _fitted(layers: list[Layer], squares: dict[str, tuple[float, float]]) -> Fitted:
    def ratio(lost: float, whole: float) -> float:
        return math.sqrt(lost / whole) if whole else 0.0

    lost, whole = (sum(pair[i] for pair in squares.values()) for i in (0, 1))
    return Fitted(layers, {name: ratio(*pair) for name, pair in squares.items()}, ratio(lost, whole))


def merge(base: BaseModel, layers: Sequence[Layer], destination: Path, tokens: Sequence[Token] = ()) -> Path:
    """Write the base as a pipeline folder with the adapter in its weights, each in the precision it was stored in, and
    learned tokens in its vocabulary.

    Raises BadInput when the destination exists, or a merged weight is not finite in that precision.
    """
    if destination.exists():
        raise BadInput(f"{destination}: exists already; give a new folder for the merged pipeline")
    partial = destination.with_name(f".{destination.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(base.path, partial, ignore=lambda folder, names: [n for n in names if n.startswith(".")])
    for part in dict.fromkeys(layer.part for layer in layers):
        updates = {f"{layer.path}.weight": layer for layer in layers if layer.part == part}
        for file in sorted((partial / part).glob("*.safetensors")):
            _rewrite(file, updates)
    teach(partial, tokens)
    partial.rename(destination)
    return destination


def _rewrite(file: Path, updates: dict[str, Layer]) -> None:
    with safe_open(file, "pt") as stored:
        metadata = stored.metadata()
        tensors = dict(_merged(stored, updates))
    with atomic_write(file) as stream:
        stream.write(to_safetensors(tensors, metadata))


def _merged(stored: safe_open, updates: dict[str, Layer]) -> Iterator[tuple[str, Tensor]]:
    for key in sorted(stored.keys()):
        tensor = stored.get_tensor(key)
        if key in updates:
            tensor = updates[key].applied_to(tensor).to(tensor.dtype)
            if not tensor.isfinite().all():
                raise BadInput(f"{updates[key].name}: merged, it is not finite in {tensor.dtype}; use a weaker adapter")
        yield key, tensor
