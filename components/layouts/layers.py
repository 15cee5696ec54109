"""What an adapter does to a layer's weight, free of any program's names, and how layers fuse and split.

W is (out, in) or (out, in, k, k). LoRA adds scale * up @ down (Hu et al. 2021, arXiv:2106.09685); LoHa adds
scale * (w1_a @ w1_b) o (w2_a @ w2_b), o elementwise, and LoKr scale * w1 (x) w2 (Yeh et al. 2023, arXiv:2309.14859);
DoRA then gives every output row of the sum a learnt length (Liu et al. 2024, arXiv:2402.09353).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from components.errors import BadInput

Kind = Literal["lora", "loha", "lokr"]
KINDS: dict[Kind, str] = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr"}


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """One layer's update. `weights` by kind:

    - lora: down (r, in, ...), up (out, r, ...)
    - loha: w1_a, w2_a (out, r) and w1_b, w2_b (r, in); with cores t1, t2 (r, r, k, k) w1_a, w2_a are (r, out)
    - lokr: w1, or w1_a and w1_b; w2, or w2_a and w2_b, perhaps with a core t2 (r, r, k, k)
    """

    part: str  # of the pipeline: "unet", "transformer", "text_encoder", ...
    path: str  # of the module inside it
    kind: Kind
    weights: Mapping[str, Tensor]
    scale: float
    magnitude: Tensor | None = None  # (out,): DoRA

    @property
    def name(self) -> str:
        return f"{self.part}.{self.path}"

    @property
    def rank(self) -> int | None:
        """r; None for a LoKr of two full factors, which has none."""
        for name, side in (("down", 0), ("w1_b", 0), ("w2_b", 0)):
            if name in self.weights:
                return self.weights[name].shape[side]
        return None

    def delta(self) -> Tensor:
        """What is added to the weight before DoRA: (out, in, ...), in the precision of the factors."""
        w = self.weights
        if self.kind == "lora":
            product = torch.einsum("or,r...->o...", w["up"].flatten(1), w["down"])
        elif self.kind == "loha":
            product = _factor(w, "w1", "t1") * _factor(w, "w2", "t2")
        else:
            one, two = _factor(w, "w1", ""), _factor(w, "w2", "t2")
            product = torch.kron(one.reshape(*one.shape, *[1] * (two.dim() - 2)), two.contiguous())
        return self.scale * product

    def applied_to(self, weight: Tensor) -> Tensor:
        """The weight (out, in, ...) with the adapter merged into it, computed in float32."""
        merged = weight.float() + self.delta().float().reshape(weight.shape)
        if self.magnitude is None:
            return merged
        return rows(self.magnitude.float() / row_norms(merged), merged) * merged

    def update_of(self, weight: Tensor) -> Tensor:
        """What merging adds to the weight, DoRA's lengths included: (out, in, ...) float32."""
        if self.magnitude is None:
            return self.delta().float().reshape(weight.shape)
        return self.applied_to(weight) - weight.float()


def lora(layer: Layer, down: Tensor, up: Tensor, shape: Sequence[int]) -> Layer:
    """A plain LoRA of scale 1 in the place of `layer`, from down (r, in * k * k) and up (out, r)."""
    weights = {
        "down": down.reshape(-1, *shape[1:]).contiguous(),
        "up": up.reshape(shape[0], -1, *[1] * (len(shape) - 2)).contiguous(),
    }
    return Layer(layer.part, layer.path, "lora", weights, 1.0)


def spelled_out(layer: Layer, weight: Tensor) -> Layer:
    """The same update, of any kind, as a LoRA of the layer's own width: dW = I dW or dW I, so nothing is lost."""
    update = layer.update_of(weight)
    flat = update.flatten(1)
    out, width = flat.shape
    down, up = (flat, torch.eye(out)) if out <= width else (torch.eye(width), flat)
    return lora(layer, down, up, update.shape)


def _factor(weights: Mapping[str, Tensor], name: str, core: str) -> Tensor:
    """w, or a @ b, or the Tucker form with its core (r, r, k, k) between b (r, in) and a (r, out)."""
    if name in weights:
        return weights[name]
    a, b = weights[f"{name}_a"], weights[f"{name}_b"]
    return torch.einsum("ijkl,jr,ip->prkl", weights[core], b, a) if core in weights else a @ b


def row_norms(weight: Tensor) -> Tensor:
    """(out, ...) -> (out,), the Euclidean length of each output row."""
    return weight.flatten(1).norm(dim=1)


def rows(vector: Tensor, like: Tensor) -> Tensor:
    """(out,) shaped to scale the rows of `like` (out, ...)."""
    return vector.view(-1, *[1] * (like.dim() - 1))


# fused matrices ---------------------------------------------------------------------------------------------------


def fuse(parts: Sequence[Layer | None], heights: Sequence[int], path: str) -> Layer:
    """The update of a matrix that stacks others by rows: block-diagonal up, stacked down, so rank is the sum of ranks.

    `parts` in the order of the rows, None where nothing was trained; `heights`: rows of each. What cannot be held
    exactly is refused with BadInput: a Kronecker product, and DoRA on some of the rows only.
    """
    present = [part for part in parts if part is not None]
    first = present[0]
    kinds: set[Kind] = {part.kind for part in present}
    if kinds == {"lokr"} or len(kinds) > 1 or any("t1" in part.weights for part in present):
        found = " and ".join(sorted({KINDS[part.kind] for part in present}))
        raise BadInput(
            f"{first.name}: {found} of separate layers does not fit into the fused {path}; "
            "merge the adapter into the base instead"
        )
    if len({part.magnitude is None for part in parts if part is not None}) > 1 or (
        first.magnitude is not None and len(present) < len(parts)
    ):
        raise BadInput(f"{first.name}: DoRA on some rows only of the fused {path}; merge the adapter into the base")
    names = (("up", "down"),) if first.kind == "lora" else (("w1_a", "w1_b"), ("w2_a", "w2_b"))
    weights: dict[str, Tensor] = {}
    for index, (a, b) in enumerate(names):
        weights[b] = torch.cat([part.weights[b] for part in present])
        weights[a] = weights[b].new_zeros(sum(heights), weights[b].shape[0])
        row = column = 0
        for part, height in zip(parts, heights, strict=True):
            if part is not None:
                block = part.weights[a]
                ratio = part.scale / first.scale if index == 0 else 1.0  # one scale for all: the rest goes into a
                stop = column + block.shape[1]
                weights[a][row : row + height, column:stop] = block if ratio == 1 else block * ratio
                column = stop
            row += height
    magnitudes = [part.magnitude for part in present if part.magnitude is not None]
    return Layer(first.part, path, first.kind, weights, first.scale, torch.cat(magnitudes) if magnitudes else None)


def split(layer: Layer, paths: Sequence[str], heights: Sequence[int]) -> list[Layer]:
    """The reverse of `fuse`: rows of the matrix as layers of their own.

    Blocks of a block-diagonal up keep their own rank; otherwise every part shares down and takes its rows of up. A
    part whose rows use no column was not trained and is left out.
    """
    if layer.kind == "lokr":
        raise BadInput(
            f"{layer.path}: LoKr on a fused matrix does not split into {len(paths)} layers; "
            "use an adapter of another kind"
        )
    names = (("up", "down"),) if layer.kind == "lora" else (("w1_a", "w1_b"), ("w2_a", "w2_b"))
    rank, stops = layer.rank or 0, torch.tensor(heights).cumsum(0).tolist()
    used = torch.stack(
        [
            torch.stack([layer.weights[a][stop - height : stop].any(dim=0) for a, _ in names]).any(dim=0)
            for stop, height in zip(stops, heights, strict=True)
        ]
    )  # (parts, r): which columns the rows of a part use
    equal = torch.arange(rank) * len(paths) // max(rank, 1)
    blocks = torch.stack([equal == index for index in range(len(paths))])
    if rank % len(paths) == 0 and not (used & ~blocks).any():
        used = blocks  # also a column that happens to be zero stays with its block
    if layer.magnitude is not None:
        used |= ~used.any(dim=1, keepdim=True)  # its rows have learnt lengths even where they use no column
    made = []
    for path, stop, height, columns in zip(paths, stops, heights, used, strict=True):
        if columns.any():
            weights = {}
            for a, b in names:
                weights[a] = layer.weights[a][stop - height : stop][:, columns].contiguous()
                weights[b] = layer.weights[b][columns].contiguous()
            magnitude = None if layer.magnitude is None else layer.magnitude[stop - height : stop]
            made.append(Layer(layer.part, path, layer.kind, weights, layer.scale, magnitude))
    return made


def swap_halves(layer: Layer) -> Layer:
    """The update of the matrix whose two halves of rows changed places: (shift, scale) to (scale, shift) and back."""
    if layer.kind == "lokr":
        raise BadInput(
            f"{layer.name}: LoKr does not fit a layer that other programs keep in another row order; "
            "leave that layer out of training.targets"
        )
    weights = dict(layer.weights)
    for name in ("up", "w1_a", "w2_a"):
        if name in weights:
            weights[name] = torch.cat(weights[name].chunk(2)[::-1])
    magnitude = None if layer.magnitude is None else torch.cat(layer.magnitude.chunk(2)[::-1])
    return replace(layer, weights=weights, magnitude=magnitude)
