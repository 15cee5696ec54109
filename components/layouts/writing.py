"""From layers to the tensors of a file in one of the layouts."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from components.errors import BadInput
from components.layouts.layers import KINDS, Kind, Layer, fuse, row_norms, rows, spelled_out, swap_halves
from components.layouts.names import Layout, Shapes, Table
from components.layouts.skeleton import Skeleton, encoder_module

Tensors = dict[str, Tensor]
MAGNITUDE_OF_TEXT = "lora_magnitude_vector.weight"  # as the loader of transformers has it, which knows no other name
PREFIXES: dict[Kind, str] = {"loha": "hada_", "lokr": "lokr_"}  # of the factors in LyCORIS' names


def require_layout(layout: Layout, skeleton: Skeleton) -> None:
    """Raises BadInput, naming the reason, where a layout does not exist for the base's architecture."""
    found = skeleton.architecture
    if layout in found.missing:
        raise BadInput(
            f"the {layout} layout does not exist for {found.title}: {found.missing[layout]}; "
            "export the diffusers layout"
        )


def diffusers_tensors(layers: Sequence[Layer]) -> Tensors:
    """What `load_lora_weights` reads, under one kind of name: it takes the first key's kind for that of all of them.

    Raises BadInput for a kind that the loader refuses.
    """
    tensors: Tensors = {}
    old = {layer.part for layer in layers} == {"unet"} and not any(_is_dora(layer) for layer in layers)
    down, up = ("lora.down", "lora.up") if old else ("lora_A", "lora_B")
    for layer in layers:
        if layer.kind != "lora":
            raise BadInput(
                f"diffusers' load_lora_weights reads no {KINDS[layer.kind]}; export the kohya layout, or "
                "merge the adapter into the base"
            )
        name = stored_name(layer)
        tensors[f"{name}.{down}.weight"] = layer.weights["down"]
        tensors[f"{name}.{up}.weight"] = layer.weights["up"]
        if layer.magnitude is not None:
            shaped = rows(layer.magnitude, layer.weights["up"])  # PEFT: (out,) of a linear layer, (1, out, 1, 1)
            leaf = MAGNITUDE_OF_TEXT if _of_text(layer.part) else "lora_magnitude_vector"
            tensors[f"{name}.{leaf}"] = shaped.transpose(0, 1) if shaped.dim() == 4 else shaped.flatten()
    return tensors


def stored_name(layer: Layer) -> str:
    """A layer's name in the diffusers layout; of a CLIP text encoder with the `text_model` that loaders may drop."""
    return f"{layer.part}.{encoder_module(layer.path)}" if _of_text(layer.part) else layer.name


def _of_text(part: str) -> bool:
    return part.startswith("text_encoder")


def kohya_tensors(layers: Sequence[Layer], skeleton: Skeleton) -> Tensors:
    """kohya's and LyCORIS' names; `alpha` is what makes alpha / r the layer's scale, rsLoRA's root included.

    Raises BadInput where the layout has no place for a layer.
    """
    require_layout("kohya", skeleton)
    tensors: Tensors = {}
    for name, layer in _regrouped(layers, skeleton, skeleton.architecture.kohya):
        if layer.part == skeleton.architecture.denoiser:
            module = f"lora_unet_{name.replace('.', '_')}"
        else:
            module = skeleton.kohya_module(layer.part, name)
        _enter(tensors, module, layer, ("lora_down.weight", "lora_up.weight"))
    return tensors


def comfyui_tensors(layers: Sequence[Layer], skeleton: Skeleton) -> Tensors:
    """ComfyUI's generic names: `diffusion_model.<original module>`, `text_encoders.<encoder>.<module>`.

    A Kronecker product does not fit into a fused matrix; ComfyUI takes it for a slice of one under `lycoris_` and
    diffusers' path. Its DoRA divides by the row norms of the base's weight instead of the sum's, so the lengths are
    written for that division, which needs the base's weights. Raises BadInput where there is no place for a layer.
    """
    require_layout("comfyui", skeleton)
    found = skeleton.architecture
    tensors: Tensors = {}
    kronecker = [layer for layer in layers if layer.kind == "lokr" and layer.part == found.denoiser]
    for layer in kronecker:
        _enter(tensors, f"lycoris_{layer.path.replace('.', '_')}", layer, ())
    others = [_dora_for_comfyui(layer, skeleton) for layer in layers if layer not in kronecker]
    for name, layer in _regrouped(others, skeleton, found.originals):
        if layer.part == found.denoiser:
            module = f"diffusion_model.{name}"
        else:
            module = skeleton.comfyui_module(layer.part, name)
        _enter(tensors, module, layer, ("lora_A.weight", "lora_B.weight"))
    return tensors


def _dora_for_comfyui(layer: Layer, skeleton: Skeleton) -> Layer:
    if layer.magnitude is None:
        return layer
    weight = skeleton.weight(layer.part, skeleton.own_path(layer.part, layer.path)).float()
    summed = weight + layer.delta().float().reshape(weight.shape)
    return replace(layer, magnitude=layer.magnitude.float() * row_norms(weight) / row_norms(summed))


def _regrouped(
    layers: Sequence[Layer], skeleton: Skeleton, originals: Callable[[Shapes], Table]
) -> list[tuple[str, Layer]]:
    """(name of the original module, its update): fused where the original stacks layers. Text encoders keep theirs."""
    part = skeleton.architecture.denoiser
    table = originals(skeleton.shapes[part])
    trained = {layer.path: layer for layer in layers if layer.part == part}
    regrouped = [(layer.path, layer) for layer in layers if layer.part != part]
    placed: set[str] = set()
    for name, held in table.items():
        members = [trained.get(path) for path in held.paths]
        present = [member for member in members if member is not None]
        if not present:
            continue
        heights = [skeleton.shapes[part][path][0] for path in held.paths]
        layer = present[0] if len(held.paths) == 1 else fuse(members, heights, name)
        regrouped.append((name, swap_halves(layer) if held.swapped else layer))
        placed |= {member.path for member in present}
    if homeless := sorted(set(trained) - placed):
        raise BadInput(
            f"{homeless[0]} has no name outside diffusers ({skeleton.architecture.title}); export the "
            "diffusers layout, or leave that layer out of training.targets"
        )
    return sorted(regrouped, key=lambda entry: (entry[1].part, entry[0]))


def _enter(tensors: Tensors, module: str, layer: Layer, lora: Sequence[str]) -> None:
    if any(key.startswith(f"{module}.") for key in tensors):
        raise BadInput(f"two layers would be called {module} in this layout; export the diffusers layout")
    weights, scale = dict(layer.weights), layer.scale
    if layer.rank is None:  # readers give two full factors no alpha
        weights["w1"], scale = weights["w1"] * scale, 1.0
    for name, tensor in weights.items():
        leaf = lora[("down", "up").index(name)] if layer.kind == "lora" else f"{PREFIXES[layer.kind]}{name}"
        tensors[f"{module}.{leaf}"] = tensor
    if layer.magnitude is not None:
        tensors[f"{module}.dora_scale"] = rows(layer.magnitude, layer.weights["down"]).contiguous()
    if layer.rank is not None:
        tensors[f"{module}.alpha"] = torch.tensor(scale * layer.rank, dtype=torch.float32)


# as adapters are stored -------------------------------------------------------------------------------------------


def stored_tensors(layers: Sequence[Layer], skeleton: Skeleton) -> tuple[Tensors, dict[str, Any]]:
    """An imported adapter as a trained one is stored: PEFT's names, and the settings that give it its scales.

    Factors of LoRA, DoRA and LoHa stay as they are: rank and alpha go into the settings, by layer where they differ.
    What PEFT cannot hold so is spelled out as a LoRA of full width: LoKr, whose factors follow from settings that
    foreign files do not name, and kinds mixed within a part.
    """
    tensors: Tensors = {}
    settings: dict[str, Any] = {}
    for part in dict.fromkeys(layer.part for layer in layers):
        members = [layer for layer in layers if layer.part == part]
        kinds = {(layer.kind, _is_dora(layer)) for layer in members}
        if len(kinds) > 1 or not kinds <= {("lora", False), ("lora", True), ("loha", False)}:
            members = [spelled_out(layer, skeleton.weight(part, layer.path)) for layer in members]
        paths = {layer.path: layer.path.removeprefix("text_model.") for layer in members}  # what every CLIP ends with
        alphas = {paths[layer.path]: layer.scale * (layer.rank or 1) for layer in members}
        ranks = {paths[layer.path]: layer.rank or 1 for layer in members}
        start = "" if _of_text(part) else "^"
        rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
        plain = members[0].kind == "lora"
        peft = {
            "peft_type": "LORA" if plain else "LOHA",
            "r": rank,
            "lora_alpha" if plain else "alpha": alpha,
            "target_modules": sorted(ranks),
            "rank_pattern": {f"{start}{path}": value for path, value in ranks.items() if value != rank},
            "alpha_pattern": {f"{start}{path}": value for path, value in alphas.items() if value != alpha},
        }
        if plain:
            peft["use_dora"] = _is_dora(members[0])
            tensors |= {
                key.replace(".lora.down.", ".lora_A.").replace(".lora.up.", ".lora_B."): tensor
                for key, tensor in diffusers_tensors(members).items()
            }
        else:
            peft["use_effective_conv2d"] = any("t1" in layer.weights for layer in members)
            tensors |= {f"{stored_name(layer)}.hada_{k}": v for layer in members for k, v in layer.weights.items()}
        settings |= {f"{part}.{name}": value for name, value in peft.items()}
    return tensors, settings


def _is_dora(layer: Layer) -> bool:
    return layer.magnitude is not None
