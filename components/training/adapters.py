"""Low-rank adapters on a frozen denoiser (Hu et al. 2021, arXiv:2106.09685), through PEFT as the stock pipelines do."""

import json
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from components.config import TrainingConfig
from components.errors import BadInput
from components.families.family import Family
from components.tensors import to_safetensors

ADAPTER_NAME = "default"


def add_adapter(denoiser: Any, family: Family, training: TrainingConfig) -> list[tuple[str, nn.Parameter]]:
    """Freeze `denoiser` and give it a fresh adapter; returns the parameters that train, by name.

    The update of a layer is (lora_alpha / rank) B A x with A normal and B zero, so training starts at the base.
    Raises BadInput when the preset names no layer.
    """
    targets = family.target_modules(denoiser, training.targets)
    if not targets:
        raise BadInput(f"training.targets {training.targets!r} matches no layer of this base; choose another preset")
    torch.manual_seed(training.seed)
    denoiser.requires_grad_(False)
    denoiser.add_adapter(
        LoraConfig(
            r=training.rank,
            lora_alpha=training.lora_alpha,  # pyright: ignore[reportArgumentType]
            lora_dropout=training.lora_dropout,  # pyright: ignore[reportArgumentType]
            target_modules=targets,
            init_lora_weights="gaussian",
        ),
        adapter_name=ADAPTER_NAME,
    )
    for parameter in (parameter for parameter in denoiser.parameters() if parameter.requires_grad):
        parameter.data = parameter.data.float()  # PEFT makes an adapter in the precision of the frozen layer
    return [(name, parameter) for name, parameter in denoiser.named_parameters() if parameter.requires_grad]


def adapter_bytes(denoiser: nn.Module, family: Family) -> bytes:
    """The adapter as `pytorch_lora_weights.safetensors`: float32, with rank and alpha in `lora_adapter_metadata`."""
    tensors, metadata = family.adapter_file(denoiser, ADAPTER_NAME)
    return to_safetensors(
        tensors, {"format": "pt", "lora_adapter_metadata": json.dumps(_plain(metadata), sort_keys=True)}
    )


def _plain(value: Any) -> Any:
    """What JSON can hold of a PEFT configuration: enumerations as their values, sets as sorted lists."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(value)
    return getattr(value, "value", value)
