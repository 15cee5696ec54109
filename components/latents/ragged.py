"""Texts of different lengths in one tensor: `<name>_mask` (B, L) bool says what of `<name>` (B, L, ...) is text.

The text comes first in every row, so a row is cut and widened at its end; places that are no text are zero.
Tensors without a mask pass through unchanged.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

Tensors = dict[str, Tensor]


def shortened(tensors: Mapping[str, Tensor]) -> Tensors:
    """The batch, cut to its longest text."""
    cut = dict(tensors)
    for name in _masked(tensors):
        mask = tensors[f"{name}_mask"]
        longest = max(1, int(mask.sum(1).max()))
        if mask[:, longest:].any() or not torch.equal(mask.sort(1, descending=True).values, mask):
            raise ValueError(f"{name}_mask: the text does not come first in every row")
        spread = mask.view(*mask.shape, *[1] * (tensors[name].dim() - 2))
        cut[f"{name}_mask"] = mask[:, :longest].contiguous()
        cut[name] = torch.where(spread, tensors[name], 0)[:, :longest].contiguous()
    return cut


def stacked(rows: Sequence[Mapping[str, Tensor]]) -> Tensors:
    """Rows, each (...) or (L, ...), as one batch (B, ...) that is as long as its longest text."""
    ragged = set(_masked(rows[0]))
    ragged |= {f"{name}_mask" for name in ragged}
    batch = {}
    for name in rows[0]:
        tensors = [row[name] for row in rows]
        if name in ragged:
            longest = max(len(tensor) for tensor in tensors)
            tensors = [_widened(tensor, 0, longest) for tensor in tensors]
        batch[name] = torch.stack(tensors)
    return shortened(batch)


def replaced(tensors: Mapping[str, Tensor], where: Tensor, other: Mapping[str, Tensor]) -> Tensors:
    """The batch with the rows `where` (B,) bool taken from `other` (1, ...), for the tensors that `other` has."""
    ragged = set(_masked(other))
    ragged |= {f"{name}_mask" for name in ragged}
    batch = dict(tensors)
    for name in other:
        theirs, ours = other[name], tensors[name]
        if name in ragged:
            longest = max(ours.shape[1], theirs.shape[1])
            theirs, ours = _widened(theirs, 1, longest), _widened(ours, 1, longest)
        batch[name] = torch.where(where.view(-1, *[1] * (ours.dim() - 1)), theirs, ours)
    return shortened(batch)


def row_shape(tensors: Mapping[str, Tensor]) -> tuple[tuple[int, ...], ...]:
    """The shapes of one row by the order of names, without the length of what is as long as its text."""
    ragged = set(_masked(tensors))
    ragged |= {f"{name}_mask" for name in ragged}
    return tuple(tuple(tensors[name].shape[2 if name in ragged else 1 :]) for name in sorted(tensors))


def _masked(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    return (name for name in tensors if f"{name}_mask" in tensors)


def _widened(tensor: Tensor, dim: int, length: int) -> Tensor:
    return functional.pad(tensor, [0, 0] * (tensor.dim() - 1 - dim) + [0, length - tensor.shape[dim]])
