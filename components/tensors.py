"""Safetensors bytes that depend on nothing but their content: the library's own writer orders metadata at random."""

import json
from collections.abc import Mapping

import torch
from safetensors.torch import save
from torch import Tensor, nn


def to_safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Serialise with the metadata's keys sorted, so that equal content has equal bytes.

    Format: 8 bytes little-endian header length, JSON header, data (github.com/huggingface/safetensors, README).
    """
    plain = save({name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)})
    length = int.from_bytes(plain[:8], "little")
    header = json.loads(plain[8 : 8 + length])
    header.pop("__metadata__", None)
    body = {"__metadata__": {key: metadata[key] for key in sorted(metadata)}} if metadata else {}
    encoded = json.dumps(body | dict(sorted(header.items())), separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)  # the data starts 8-byte aligned
    return len(encoded).to_bytes(8, "little") + encoded + plain[8 + length :]


def default_device() -> str:
    """Where torch work runs: the first CUDA device, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name(device: str) -> str:
    """What `device` is, for people: the GPU's own name, or the CPU with the threads that torch uses."""
    return torch.cuda.get_device_name(device) if device != "cpu" else f"CPU, {torch.get_num_threads()} threads"


def lay_channels_last(model: nn.Module) -> None:
    """Frozen kernels of 2-D convolutions in the order that tensor cores and vector units read; activations follow."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and not module.weight.requires_grad:
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
