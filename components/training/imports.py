"""Adapter files of other programs, and our own: as contenders of an evaluation, and as the start of a training."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from components.config import TrainingConfig
from components.errors import BadInput
from components.families.bases import BaseModel
from components.layouts.files import read_adapter
from components.layouts.layers import KINDS
from components.layouts.reading import layers_of, layout_of
from components.layouts.skeleton import skeleton_of
from components.layouts.writing import stored_tensors
from components.tensors import to_safetensors
from components.training.adapters import METADATA_KEY, attach_adapter


def imported_adapter(path: Path, base: BaseModel) -> tuple[bytes, dict[str, Any]]:
    """A file of any layout as the adapter that this platform stores, and what it is: layout, kinds, layers, ranks.

    A file that carries PEFT's own settings, as ours do, keeps its bytes. The same file always gives the same bytes.
    Raises BadInput, one line, for what is no adapter or none for this base.
    """
    tensors, metadata = read_adapter(path)
    layout = layout_of(tensors, str(path))
    if layout == "diffusers" and METADATA_KEY in metadata and any(".oft_" in key for key in tensors):
        return path.read_bytes(), {"layout": layout, "kinds": {"OFT": len(tensors)}, "ranks": {}}
    skeleton = skeleton_of(base)
    layers = layers_of(tensors, metadata, skeleton, str(path))
    ranks = Counter(layer.rank for layer in layers if layer.rank is not None)
    kinds = Counter("DoRA" if layer.magnitude is not None else KINDS[layer.kind] for layer in layers)
    facts = {"layout": layout, "kinds": dict(kinds), "ranks": {str(rank): count for rank, count in ranks.items()}}
    if layout == "diffusers" and METADATA_KEY in metadata:
        return path.read_bytes(), facts
    made, settings = stored_tensors(layers, skeleton)
    header = {"format": "pt", METADATA_KEY: json.dumps(settings, sort_keys=True), "safelight.imported_from": layout}
    return to_safetensors(made, header), facts


def continue_adapter(
    denoiser: Any, base: BaseModel, training: TrainingConfig
) -> tuple[list[tuple[str, nn.Parameter]], dict[str, Any]]:
    """Freeze `denoiser` and give it the adapter of `training.init_adapter` to go on from.

    Returns the parameters that train, by name, and its rank and alpha. Raises BadInput for a file that does not fit,
    and for one whose training would lose something: layers of text encoders, factors that exist only multiplied out.
    """
    path = Path(training.init_adapter or "")
    data, facts = imported_adapter(path, base)
    part = base.architecture.denoiser_part
    tensors, metadata = _opened(data)
    if stranger := next((key for key in tensors if not key.startswith(f"{part}.")), None):
        raise BadInput(
            f"{path}: holds {stranger[:80]}, which training the {part} alone would lose; take the {part}'s layers out"
        )
    if facts["layout"] != "diffusers" and ("LoKr" in facts["kinds"] or len(facts["kinds"]) > 1):
        found = " and ".join(sorted(facts["kinds"]))
        raise BadInput(f"{path}: {found} of another program can be evaluated, not trained on; start from a LoRA")
    denoiser.requires_grad_(False)
    settings = json.loads(metadata.get(METADATA_KEY, "{}"))
    if training.lora_dropout and settings.get(f"{part}.peft_type") == "LORA":
        settings[f"{part}.lora_dropout"] = training.lora_dropout
        data = to_safetensors(tensors, metadata | {METADATA_KEY: json.dumps(settings, sort_keys=True)})
    attach_adapter(denoiser, base.architecture, data)
    parameters = [(name, parameter) for name, parameter in denoiser.named_parameters() if parameter.requires_grad]
    alpha = settings.get(f"{part}.lora_alpha", settings.get(f"{part}.alpha"))
    return parameters, {"rank": settings.get(f"{part}.r"), "lora_alpha": alpha, "init_adapter": facts}


def _opened(data: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    from safetensors.torch import load

    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return load(data), header.get("__metadata__", {})


@contextmanager
def without_adapter(denoiser: Any, active: bool) -> Iterator[None]:
    """The base alone, where an adapter that is not zero stands before it; nothing when `active` is false."""
    if active:
        denoiser.disable_adapters()
    try:
        yield
    finally:
        if active:
            denoiser.enable_adapters()
