"""From an adapter file in any layout to its layers under diffusers' names, checked against the base they are for."""

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor

from components.errors import BadInput
from components.layouts.files import read_adapter
from components.layouts.layers import Kind, Layer, row_norms, split, swap_halves
from components.layouts.names import Layout, Original
from components.layouts.skeleton import Skeleton
from components.layouts.tokens import Token, require_widths, unbundled

PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
DIFFUSERS_MODULE = re.compile(rf"^(?P<part>{'|'.join(PARTS)})\.(?P<path>[A-Za-z0-9_.-]+)$")
OLD_PROCESSOR = re.compile(r"\.processor\.to_(q|k|v|out)_lora\.(down|up)\.weight$")  # diffusers before PEFT
LEAVES: dict[str, str] = {  # the end of a key -> the factor it holds
    **{f"{name}.weight": "down" for name in ("lora_down", "lora_A", "lora.down", "lora_linear_layer.down")},
    **{f"{name}.weight": "up" for name in ("lora_up", "lora_B", "lora.up", "lora_linear_layer.up")},
    **dict.fromkeys(("dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.weight"), "magnitude"),
    **{f"hada_{name}": name for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{name}": name for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    "alpha": "alpha",
}
KIND_OF_PREFIX: dict[str, Kind] = {"hada": "loha", "lokr": "lokr"}
WHOLE: dict[Kind, set[frozenset[str]]] = {  # the factors that make a layer
    "lora": {frozenset({"down", "up"})},
    "loha": {frozenset({"w1_a", "w1_b", "w2_a", "w2_b", *cores}) for cores in ((), ("t1", "t2"))},
    "lokr": {
        frozenset({*one, *two})
        for one in (("w1",), ("w1_a", "w1_b"))
        for two in (("w2",), ("w2_a", "w2_b"), ("w2_a", "w2_b", "t2"))
    },
}
Factors = dict[str, Tensor]
KEY = re.compile(rf"^(?P<module>.+?)\.(?P<leaf>{'|'.join(map(re.escape, sorted(LEAVES, key=len, reverse=True)))})$")
MARKS: tuple[tuple[str, str], ...] = (  # what betrays an architecture, tried in order
    (r"joint_blocks", "Stable Diffusion 3 / 3.5"),
    (r"double_stream_modulation|to_qkv_mlp_proj|ff(_context)?\.linear_in", "FLUX.2"),
    (r"double_blocks|single_blocks|single_transformer_blocks", "FLUX.1"),
    (r"img_mlp|txt_mlp", "Qwen-Image"),
    (r"layers[._]\d+[._](attention|feed_forward)|noise_refiner", "Z-Image"),
    (r"lora_te2_|text_encoder_2\.|add_embedding|label_emb", "Stable Diffusion XL"),
    (r"transformer_blocks[._]1[._]attn[12][._]", "Stable Diffusion XL"),
    (r"transformer_blocks[._]\d+[._]attn[._]add_", "Stable Diffusion 3 / 3.5"),
    (r"^(transformer\.|lora_transformer_).*attn[12][._]", "Sana"),
    (r"lora_unet_input_blocks|lora_unet_output_blocks", "Stable Diffusion XL"),
    (r"(down|up|mid)_blocks?[._]|input_blocks|output_blocks|lora_te_", "Stable Diffusion 1.x / 2.x"),
)


def import_adapter(path: Path, skeleton: Skeleton) -> tuple[list[Layer], tuple[Token, ...]]:
    """The layers and learned tokens of an adapter file of any layout, for the base of `skeleton`. Raises BadInput."""
    tensors, metadata = read_adapter(path)
    rest, tokens = unbundled(tensors, skeleton.pipeline, str(path))
    require_widths(tokens, skeleton, str(path))
    return layers_of(rest, metadata, skeleton, str(path)), tokens


def layers_of(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], skeleton: Skeleton, origin: str
) -> list[Layer]:
    """Every tensor must belong to a layer of the base and fit its shape. Raises BadInput, one line, for what does not.

    `origin` names the file in messages. ComfyUI's files with DoRA need the base's weights (see `writing`).
    """
    layout = layout_of(tensors, origin)
    if layout == "diffusers":
        layers = stored_layers(tensors, metadata, origin)
    else:
        layers = _foreign_layers(tensors, layout, skeleton, origin)
    checked = [_fitting(layer, skeleton, tensors, origin) for layer in layers]
    if layout == "comfyui":
        checked = [_dora_of_comfyui(layer, skeleton) for layer in checked]
    return sorted(checked, key=lambda layer: layer.name)


def layout_of(keys: Iterable[str], origin: str) -> Layout:
    """The layout by the first words of the keys. Raises BadInput when a key has none of them, or they are mixed."""
    found: dict[Layout, str] = {}
    for key in keys:
        first = key.split(".")[0]
        if first.startswith(("lora_unet_", "lora_te")):
            found.setdefault("kohya", key)
        elif first in ("diffusion_model", "text_encoders") or first.startswith("lycoris_"):
            found.setdefault("comfyui", key)
        elif first in PARTS:
            found.setdefault("diffusers", key)
        else:
            raise BadInput(
                f"{origin}: {key[:80]!r} is no LoRA weight of a known layout; adapters in the diffusers, "
                "kohya or ComfyUI layout are read"
            )
    if len(found) != 1:
        mixed = ", ".join(f"{key[:60]!r} ({layout})" for layout, key in found.items())
        raise BadInput(f"{origin}: keys of several layouts, {mixed}; export the adapter again in one of them")
    return next(iter(found))


def architecture_of(keys: Iterable[str]) -> str | None:
    """The title of the architecture that an adapter's keys look like, for messages."""
    text = "\n".join(keys)
    return next((title for mark, title in MARKS if re.search(mark, text, re.MULTILINE)), None)


# the diffusers layout, which is also how adapters are stored ------------------------------------------------------


def stored_layers(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], origin: str = "adapter") -> list[Layer]:
    """The layers of an adapter in the diffusers layout under PEFT's or diffusers' older names.

    The scale is what PEFT makes of `lora_adapter_metadata`: alpha / r, with rsLoRA alpha / sqrt(r); without it 1, as
    stock loaders have it. Raises BadInput for half a layer or a kind of adapter that no layout holds (OFT).
    """
    settings = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    renamed = {OLD_PROCESSOR.sub(_new_processor_key, key): tensor for key, tensor in tensors.items()}
    layers = []
    for module, (kind, factors) in sorted(_grouped(renamed, origin).items()):
        match = DIFFUSERS_MODULE.match(module)
        if match is None:
            raise BadInput(f"{origin}: {module[:80]!r} names no part of a pipeline; expected one of {', '.join(PARTS)}")
        alpha, lengths = factors.pop("alpha", None), factors.pop("magnitude", None)
        layer = Layer(match["part"], match["path"], kind, factors, 1.0, None if lengths is None else lengths.flatten())
        scale = _peft_scale(layer, settings) if alpha is None else alpha.item() / (layer.rank or alpha.item())
        layers.append(replace(layer, scale=scale))
    return layers


def _new_processor_key(match: re.Match[str]) -> str:
    return f".to_{match[1]}{'.0' if match[1] == 'out' else ''}.lora.{match[2]}.weight"


def _peft_scale(layer: Layer, settings: Mapping[str, Any]) -> float:
    def setting(name: str) -> Any:
        return settings.get(f"{layer.part}.{name}")

    name = "lora_alpha" if layer.kind == "lora" else "alpha"
    if setting(name) is None:
        return 1.0
    alphas, ranks = setting("alpha_pattern") or {}, setting("rank_pattern") or {}
    alpha = alphas.get(get_pattern_key(list(alphas), layer.path), setting(name))
    rank = layer.rank or 1
    if layer.kind == "lokr":  # two full factors have none, but PEFT divides by the one that was asked for
        rank = ranks.get(get_pattern_key(list(ranks), layer.path), setting("r"))
    return alpha / (math.sqrt(rank) if setting("use_rslora") else rank)


# the other layouts ------------------------------------------------------------------------------------------------


def _foreign_layers(tensors: Mapping[str, Tensor], layout: Layout, skeleton: Skeleton, origin: str) -> list[Layer]:
    places = _places(skeleton, layout)
    layers = []
    for module, (kind, factors) in _grouped(tensors, origin).items():
        if module not in places:
            raise BadInput(_not_of_this_base(module, tensors, skeleton, origin))
        part, held = places[module]
        alpha, lengths = factors.pop("alpha", None), factors.pop("magnitude", None)
        shapes = [skeleton.shapes[part][path] for path in held.paths]
        whole = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        if lengths is not None and lengths.shape[0] != whole[0]:
            raise BadInput(
                f"{origin}: {module} has DoRA lengths of shape {tuple(lengths.shape)}, expected one for each "
                f"of {whole[0]} outputs; lengths of the inputs cannot be held, merge it elsewhere first"
            )
        layer = Layer(part, module, kind, factors, 1.0, None if lengths is None else lengths.flatten())
        if alpha is not None and layer.rank is not None:
            layer = replace(layer, scale=alpha.item() / layer.rank)
        _require_fit(layer, whole, tensors, skeleton, origin)
        if held.swapped:
            layer = swap_halves(layer)
        if len(shapes) > 1:
            layers += split(layer, held.paths, [shape[0] for shape in shapes])
        else:
            layers.append(replace(layer, path=held.paths[0]))
    return layers


def _places(skeleton: Skeleton, layout: Layout) -> dict[str, tuple[str, Original]]:
    """What a module is called in a layout -> the part it belongs to, and the layers it holds."""
    found = skeleton.architecture
    shapes = skeleton.shapes[found.denoiser]
    same = {path: Original((path,)) for path in shapes}
    places: dict[str, tuple[str, Original]] = {}

    def enter(prefix: str, names: Mapping[str, Original], *, flat: bool) -> None:
        for name, held in names.items():
            places.setdefault(prefix + (name.replace(".", "_") if flat else name), (found.denoiser, held))

    if layout == "kohya":
        enter("lora_unet_", found.kohya(shapes), flat=True)
        if found.denoiser == "unet":  # some trainers keep diffusers' names for SDXL too, and loaders read them
            enter("lora_unet_", same, flat=True)
    else:
        enter("diffusion_model.", found.originals(shapes), flat=False)
        enter("diffusion_model.", same, flat=False)
        enter("lycoris_", same, flat=True)
    name = skeleton.kohya_module if layout == "kohya" else skeleton.comfyui_module
    for part in found.encoders:
        for path in skeleton.shapes.get(part, {}):
            places[name(part, path)] = (part, Original((path,)))
    return places


def _grouped(tensors: Mapping[str, Tensor], origin: str) -> dict[str, tuple[Kind, Factors]]:
    """module -> (kind, factors). Raises BadInput for factors that make no layer."""
    groups: dict[str, Factors] = defaultdict(dict)
    kinds: dict[str, set[Kind]] = defaultdict(set)
    for key, tensor in tensors.items():
        match = KEY.match(key)
        if match is None:
            hint = "OFT has no file layout, use the registered model" if "oft_" in key else "no other kind can be read"
            raise BadInput(f"{origin}: {key[:80]!r} is no weight of a LoRA, DoRA, LoHa or LoKr; {hint}")
        factor = LEAVES[match["leaf"]]
        groups[match["module"]][factor] = tensor
        if factor not in ("alpha", "magnitude"):
            kinds[match["module"]].add(KIND_OF_PREFIX.get(match["leaf"].partition("_")[0], "lora"))
    for module, factors in groups.items():
        names = frozenset(factors) - {"magnitude", "alpha"}
        whole = any(names in WHOLE[kind] for kind in kinds[module]) and len(kinds[module]) == 1
        if not whole or ("down" in factors and factors["down"].shape[0] != factors["up"].shape[1]):
            found = ", ".join(f"{name} {tuple(factors[name].shape)}" for name in sorted(names)) or "no factor"
            raise BadInput(f"{origin}: {module} has {found}, which do not belong together; export the adapter again")
    return {module: (next(iter(kinds[module])), factors) for module, factors in groups.items()}


# checks against the base ------------------------------------------------------------------------------------------


def _fitting(layer: Layer, skeleton: Skeleton, keys: Iterable[str], origin: str) -> Layer:
    """The layer under the base's own path and in its shape. Raises BadInput when the base has no such layer."""
    shapes, path = skeleton.shapes.get(layer.part, {}), skeleton.own_path(layer.part, layer.path)
    if path not in shapes:
        raise BadInput(_not_of_this_base(layer.name, keys, skeleton, origin))
    _require_fit(layer, shapes[path], keys, skeleton, origin)
    weights = dict(layer.weights)
    if layer.kind == "lora":  # a 1x1 convolution and a linear layer hold the same numbers
        weights["down"] = weights["down"].reshape(-1, *shapes[path][1:])
        weights["up"] = weights["up"].reshape(shapes[path][0], -1, *[1] * (len(shapes[path]) - 2))
    return replace(layer, path=path, weights=weights)


def _fits(layer: Layer, shape: tuple[int, ...]) -> bool:
    """Whether the factors multiply to a weight of this shape, up to the 1x1 of a convolution."""
    w, out, rest = layer.weights, shape[0], math.prod(shape[1:])
    if layer.magnitude is not None and len(layer.magnitude) != out:
        return False
    if layer.kind == "lora":
        rank = layer.rank or 0
        return w["down"].numel() == rank * rest and w["up"].numel() == w["up"].shape[0] * rank == out * rank
    try:
        with torch.no_grad():
            delta = replace(layer, scale=1.0, weights={k: v.to("meta") for k, v in w.items()}).delta()
    except RuntimeError:
        return False
    return delta.shape[0] == out and delta.numel() == out * rest


def _require_fit(layer: Layer, shape: tuple[int, ...], keys: Iterable[str], skeleton: Skeleton, origin: str) -> None:
    if _fits(layer, shape):
        return
    found = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in layer.weights.items())
    raise BadInput(
        f"{origin}: {layer.path} has {found}, which do not make {shape}, its shape in {skeleton.name} "
        f"({skeleton.architecture.title}); {_advice(keys, skeleton)}"
    )


def _not_of_this_base(module: str, keys: Iterable[str], skeleton: Skeleton, origin: str) -> str:
    return (
        f"{origin}: {module[:120]} is no layer of {skeleton.name} ({skeleton.architecture.title}); "
        f"{_advice(keys, skeleton)}"
    )


def _advice(keys: Iterable[str], skeleton: Skeleton) -> str:
    guess = architecture_of(keys)
    if guess is not None and guess != skeleton.architecture.title:
        return f"the file looks like an adapter for {guess}, use it with such a base"
    return "it was made for another base of this kind, choose that one"


def _dora_of_comfyui(layer: Layer, skeleton: Skeleton) -> Layer:
    """ComfyUI divides the lengths by the base's row norms, where DoRA divides by those of the sum."""
    if layer.magnitude is None:
        return layer
    weight = skeleton.weight(layer.part, layer.path).float()
    summed = weight + layer.delta().float().reshape(weight.shape)
    return replace(layer, magnitude=layer.magnitude.float() * row_norms(summed) / row_norms(weight))
