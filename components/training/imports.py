"""Adapter files of other programs, and our own: as contenders of an evaluation, and as the start of a training."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load
from torch import nn

from components.config import TrainingConfig
from components.errors import BadInput
from components.families.bases import BaseModel
from components.layouts.files import read_adapter
from components.layouts.layers import KINDS
from components.layouts.reading import layers_of, layout_of
from components.layouts.skeleton import skeleton_of
from components.layouts.tokens import bundled, require_widths, unbundled
from components.layouts.writing import stored_tensors
from components.tensors import to_safetensors
from components.training.adapters import (
    METADATA_KEY,
    STOCK_TYPE,
    attach_adapter,
    header_of,
    settings_of,
    text_parts_of,
    tokens_of,
)


def imported_adapter(path: Path, base: BaseModel) -> tuple[bytes, dict[str, Any]]:
    """A file of any layout as the adapter that this platform stores, and what it is: layout, kinds, layers, ranks.

    A file that carries PEFT's own settings, as ours do, keeps its bytes. The same file always gives the same bytes.
    Raises BadInput, one line, for what is no adapter or none for this base.
    """
    everything, metadata = read_adapter(path)
    tensors, tokens = unbundled(everything, base.family, str(path))
    layout = layout_of(tensors, str(path))
    if layout == "diffusers" and METADATA_KEY in metadata and any(".oft_" in key for key in tensors):
        return path.read_bytes(), {"layout": layout, "kinds": {"OFT": len(tensors)}, "ranks": {}}
    skeleton, family = skeleton_of(base), base.architecture
    require_widths(tokens, skeleton, str(path))
    layers = layers_of(tensors, metadata, skeleton, str(path))
    unread = next((layer for layer in layers if layer.part not in (family.denoiser_part, *family.clip_parts)), None)
    if unread is not None:
        raise BadInput(f"{path}: holds {unread.name}, which {family.pipeline} does not load; take {unread.part} out")
    ranks = Counter(layer.rank for layer in layers if layer.rank is not None)
    kinds = Counter("DoRA" if layer.magnitude is not None else KINDS[layer.kind] for layer in layers)
    facts = {"layout": layout, "kinds": dict(kinds), "ranks": {str(rank): count for rank, count in ranks.items()}}
    if layout == "diffusers" and METADATA_KEY in metadata:
        return path.read_bytes(), facts
    made, settings = stored_tensors(layers, skeleton)
    header = {"format": "pt", METADATA_KEY: json.dumps(settings, sort_keys=True), "safelight.imported_from": layout}
    return to_safetensors(made | bundled(tokens, base.family), header), facts


def continue_adapter(
    denoiser: Any, base: BaseModel, training: TrainingConfig
) -> tuple[list[tuple[str, nn.Parameter]], dict[str, Any]]:
    """Freeze `denoiser` and give it the adapter of `training.init_adapter` to go on from.

    Returns the parameters that train, by name, and its rank and alpha. Raises BadInput for a file that does not fit,
    and for one whose training would lose something: a text side that the recipe does not train, factors that exist only
    multiplied out. Text encoders and tokens are the business of `texts`.
    """
    path = Path(training.init_adapter or "")
    data, facts = imported_adapter(path, base)
    part = base.architecture.denoiser_part
    if training.max_train_steps > 0:
        _require_text_side(path, data, base, training)
    if facts["layout"] != "diffusers" and ("LoKr" in facts["kinds"] or len(facts["kinds"]) > 1):
        found = " and ".join(sorted(facts["kinds"]))
        raise BadInput(f"{path}: {found} of another program can be evaluated, not trained on; start from a LoRA")
    denoiser.requires_grad_(False)
    attach_adapter(denoiser, base.architecture, with_dropout(data, training.lora_dropout))
    settings = settings_of(data)
    parameters = [(name, parameter) for name, parameter in denoiser.named_parameters() if parameter.requires_grad]
    alpha = settings.get(f"{part}.lora_alpha", settings.get(f"{part}.alpha"))
    return parameters, {"rank": settings.get(f"{part}.r"), "lora_alpha": alpha, "init_adapter": facts}


def _require_text_side(path: Path, data: bytes, base: BaseModel, training: TrainingConfig) -> None:
    parts, tokens = text_parts_of(data, base.architecture), tokens_of(data, base.architecture)
    if parts and not training.train_text_encoder:
        raise BadInput(
            f"{path}: holds layers of the {parts[0]}, which training without it would lose; set "
            "training.train_text_encoder = true, or take them out"
        )
    if training.train_text_encoder and not parts:
        raise BadInput(f"{path}: holds no layers of text encoders to go on from; leave training.train_text_encoder out")
    names = [token.name for token in tokens]
    if names not in ([], [training.placeholder_token]):
        raise BadInput(
            f"{path}: brings the token {', '.join(names)}, and training.placeholder_token is "
            f"{training.placeholder_token!r}; set it to the one token of the file"
        )


def with_dropout(data: bytes, rate: float) -> bytes:
    """An adapter file of ours with another dropout in its settings, where its kind knows any."""
    settings = settings_of(data)
    kinds = [key.removesuffix("peft_type") for key, kind in settings.items() if key.endswith("peft_type")]
    changed = {f"{part}lora_dropout": rate for part in kinds if settings[f"{part}peft_type"] == STOCK_TYPE}
    if not rate or not changed:
        return data
    header = header_of(data) | {METADATA_KEY: json.dumps(settings | changed, sort_keys=True)}
    return to_safetensors(load(data), header)


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
