"""Adapter files from outside, opened with care: only safetensors, judged by bytes, not by name; nothing is run."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor

# what a file from outside may hold at most; a FLUX adapter of rank 128 has 1,500 tensors and 1.5 GB
MAX_HEADER_BYTES = 8 << 20
MAX_TENSORS = 20_000
MAX_SIDE = 1 << 20
MAX_FILE_BYTES = 8 << 30
PICKLES = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # torch's zip, and pickle protocols 2 to 5
FLOATS = {"F64", "F32", "F16", "BF16"}


def read_adapter(path: Path) -> "tuple[dict[str, Tensor], dict[str, str]]":
    """Tensors and metadata of an adapter file in any layout.

    Raises BadInput, one line, for anything but safetensors, for sizes no adapter has, for weights that are no
    floating-point numbers, and for values that are not finite.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    metadata = read_metadata(path)
    try:
        tensors = load(path.read_bytes())
    except SafetensorError as error:
        raise BadInput(f"{path}: not a whole safetensors file ({error}); fetch or export it again") from None
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise BadInput(f"{path}: {key} holds values that are not finite; use an earlier checkpoint")
    return tensors, metadata


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a file whose header is an adapter's; neither torch nor a tensor is loaded. Raises BadInput."""
    header = _read_header(path)
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BadInput(f"{path}: its metadata is no table of strings; export the adapter again")
    _check_header(path, header)
    return metadata


def _read_header(path: Path) -> dict[str, Any]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                found = "a pickle, which may run code when opened" if start[:2] in PICKLES else "something else"
                raise BadInput(f"{path}: expected a safetensors file, found {found}; only such adapters are read")
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; give the path of a .safetensors adapter") from None
    except IsADirectoryError:
        raise BadInput(f"{path}: is a folder; give the .safetensors file inside it") from None
    except (ValueError, RecursionError):
        raise BadInput(f"{path}: its safetensors header is not readable; fetch or export it again") from None
    if not isinstance(header, dict):
        raise BadInput(f"{path}: its safetensors header is no table; fetch or export it again")
    if size > MAX_FILE_BYTES or len(header) > MAX_TENSORS:
        raise BadInput(
            f"{path}: {size} bytes and {len(header)} tensors are more than any adapter has "
            f"({MAX_FILE_BYTES} bytes, {MAX_TENSORS} tensors); choose another file"
        )
    return header


def _check_header(path: Path, header: Mapping[str, Any]) -> None:
    if not header:
        raise BadInput(f"{path}: holds no tensor; choose another file")
    for key, entry in header.items():
        shape, kind = (entry.get("shape"), entry.get("dtype")) if isinstance(entry, dict) else (None, None)
        plausible = (
            isinstance(shape, list)
            and len(shape) <= 4
            and kind in FLOATS
            and all(isinstance(side, int) and 0 < side <= MAX_SIDE for side in shape)
        )
        if not plausible:
            raise BadInput(
                f"{path}: {key[:80]!r} has shape {str(shape)[:60]} of {str(kind)[:20]}; expected up to four "
                "sides of floating-point numbers"
            )
