"""Where weights lie while a model works: on the device, or in the CPU's memory when the device has no room for them."""

import gc
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

WEIGHTS_SHARE = 0.85  # of the free memory of a GPU; activations take the rest


def placed(model: Any, device: str) -> Any:
    """The model, on `device` if its weights fit there; else each block of them comes when it is its turn.

    What it computes is the same to the bit. Fetching takes the time that the bus takes for all weights, once a pass.
    """
    if weight_bytes(model, not_on=device) <= WEIGHTS_SHARE * free_bytes(device):
        return model.to(device)
    import torch
    from accelerate import cpu_offload

    together = [*(getattr(model, "_repeated_blocks", None) or ()), *(getattr(model, "_no_split_modules", None) or ())]
    return cpu_offload(model, torch.device(device), offload_buffers=True, preload_module_classes=together)


def place_pipeline(pipeline: Any, first: str, device: str) -> Any:
    """All of a stock pipeline on `device`, or what fits: the part `first`, which is asked most, then the others."""
    import torch

    parts: dict[str, torch.nn.Module] = {
        name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)
    }
    for name in sorted(parts, key=lambda name: (name != first, weight_bytes(parts[name]))):
        placed(parts[name], device)
    return pipeline


def weight_bytes(model: "torch.nn.Module", not_on: str = "") -> int:
    """Of parameters and buffers, shared ones once; with `not_on` of those that are elsewhere."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values()
    return sum(tensor.nbytes for tensor in tensors if not not_on or tensor.device.type != not_on.partition(":")[0])


def free_bytes(device: str) -> float:
    """What a model may still take on `device`; the CPU's memory is not counted."""
    import torch

    if not device.startswith("cuda"):
        return float("inf")
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def release_memory() -> None:
    """Give back what models have left behind that nobody refers to any more."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()
