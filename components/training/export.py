"""Adapter files for other programs: the diffusers layout, the kohya layout, and a card that says where they come from.

Layouts: `pytorch_lora_weights.safetensors` holds `unet.<path>.lora.down.weight` (r, in) and `.lora.up.weight` (out, r),
with rank and alpha in the header key `lora_adapter_metadata` (diffusers, src/diffusers/loaders/lora_base.py); kohya's
file holds `lora_unet_<path with _ for .>.lora_down.weight`, `.lora_up.weight` and `.alpha`, and applies
alpha / r * up @ down (kohya-ss/sd-scripts, networks/lora.py).
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from components.errors import BadInput
from components.stages import Bench
from components.storage import atomic_write
from components.tensors import to_safetensors
from components.training.card import Origin, card_images, origin_of, write_card

Layout = Literal["diffusers", "kohya"]
LAYOUTS: tuple[Layout, ...] = ("diffusers", "kohya")
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"

# what a file from outside may hold at most; a FLUX adapter of rank 128 has 1,500 tensors and 1.5 GB
MAX_HEADER_BYTES = 8 << 20
MAX_TENSORS = 20_000
MAX_SIDE = 1 << 20
MAX_FILE_BYTES = 8 << 30
PICKLES = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # torch's zip, and pickle protocols 2 to 5
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}

DIFFUSERS_KEY = re.compile(
    r"^(?P<part>unet|transformer)\.(?P<path>[A-Za-z0-9_.]+?)\.(?:lora\.|lora_)(?P<side>down|up|A|B)\.weight$")
KOHYA_KEY = re.compile(r"^lora_(?:unet|te|te1|te2|te3)_[A-Za-z0-9_]+\.(?:lora_down\.weight|lora_up\.weight|alpha)$")


@dataclass(frozen=True, slots=True)
class LoraLayer:
    """One layer's update, scale * up @ down: `down` (r, in, ...), `up` (out, r, ...)."""

    part: str
    path: str
    down: Tensor
    up: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass(frozen=True, slots=True)
class Export:
    """What `export_adapter` wrote."""

    folder: Path
    files: dict[str, Path]  # layout -> file
    card: Path


# reading ----------------------------------------------------------------------------------------------------------


def read_adapter(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a LoRA file in either layout, judged by its bytes, never by its name.

    Only safetensors: nothing in the file is executed. Raises BadInput, one line, for anything else, for sizes no
    adapter has, for keys that are not a LoRA's, and for values that are not finite.
    """
    header = _read_header(path)
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BadInput(f"{path}: its metadata is no table of strings; export the adapter again")
    _check_header(path, header)
    try:
        tensors = load(path.read_bytes())
    except SafetensorError as error:
        raise BadInput(f"{path}: not a whole safetensors file ({error}); fetch or export it again") from None
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise BadInput(f"{path}: {key} holds values that are not finite; use an earlier checkpoint")
    return tensors, metadata


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
        raise BadInput(f"{path}: {size} bytes and {len(header)} tensors are more than any adapter has "
                       f"({MAX_FILE_BYTES} bytes, {MAX_TENSORS} tensors); choose another file")
    return header


def _check_header(path: Path, header: Mapping[str, Any]) -> None:
    if not header:
        raise BadInput(f"{path}: holds no tensor; choose another file")
    for key, entry in header.items():
        if not DIFFUSERS_KEY.match(key) and not KOHYA_KEY.match(key):
            raise BadInput(f"{path}: {key[:80]!r} is no LoRA weight of a known layout; only LoRA files in the "
                           "diffusers or kohya layout are read")
        shape, kind = (entry.get("shape"), entry.get("dtype")) if isinstance(entry, dict) else (None, None)
        plausible = (isinstance(shape, list) and len(shape) <= 4 and kind in FLOATS
                     and all(isinstance(side, int) and 0 < side <= MAX_SIDE for side in shape))
        if not plausible:
            raise BadInput(f"{path}: {key[:80]!r} has shape {str(shape)[:60]} of {str(kind)[:20]}; expected up to four "
                           "sides of floating-point numbers")


def lora_layers(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> list[LoraLayer]:
    """The layers of an adapter in the diffusers layout, each with the scale that PEFT gives it.

    The scale is alpha / r, or alpha / sqrt(r) with rsLoRA; without `lora_adapter_metadata` it is 1, as stock loaders
    have it. Raises BadInput for half a layer or a key of another kind.
    """
    settings = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    halves: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = DIFFUSERS_KEY.match(key)
        if match is None:
            raise BadInput(f"adapter key {key!r}: expected unet.<path>.lora.down.weight or .lora.up.weight; "
                           "only plain LoRA can be exported")
        side = {"A": "down", "B": "up"}.get(match["side"], match["side"])
        halves.setdefault((match["part"], match["path"]), {})[side] = tensor
    layers = []
    for (part, path), pair in sorted(halves.items()):
        if set(pair) != {"down", "up"} or pair["down"].shape[0] != pair["up"].shape[1]:
            raise BadInput(f"adapter layer {part}.{path}: down and up do not belong together; export the adapter again")
        scale = _scale(part, path, pair["down"].shape[0], settings)
        layers.append(LoraLayer(part, path, pair["down"], pair["up"], scale))
    return layers


def _scale(part: str, path: str, rank: int, settings: Mapping[str, Any]) -> float:
    if f"{part}.lora_alpha" not in settings:
        return 1.0
    patterns = settings.get(f"{part}.alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(list(patterns), path), settings[f"{part}.lora_alpha"])
    return alpha / (math.sqrt(rank) if settings.get(f"{part}.use_rslora") else rank)


# writing ----------------------------------------------------------------------------------------------------------


def diffusers_tensors(layers: Iterable[LoraLayer]) -> dict[str, Tensor]:
    """The diffusers layout under one kind of name: a reader takes the first key's kind for that of all of them."""
    tensors: dict[str, Tensor] = {}
    for layer in layers:
        down, up = ("lora.down", "lora.up") if layer.part == "unet" else ("lora_A", "lora_B")
        tensors[f"{layer.part}.{layer.path}.{down}.weight"] = layer.down
        tensors[f"{layer.part}.{layer.path}.{up}.weight"] = layer.up
    return tensors


def kohya_tensors(layers: Iterable[LoraLayer]) -> dict[str, Tensor]:
    """The kohya layout of a U-Net's layers; `alpha` is what makes alpha / r the layer's scale.

    Raises BadInput where the layout has no place for a layer.
    """
    tensors: dict[str, Tensor] = {}
    for layer in layers:
        if layer.part != "unet":
            raise BadInput(f"the kohya layout of a {layer.part} is not known here; export the diffusers layout")
        name = f"lora_unet_{layer.path.replace('.', '_')}"
        if f"{name}.alpha" in tensors:
            raise BadInput(f"two layers would be called {name} in the kohya layout; export the diffusers layout")
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = layer.down, layer.up
        tensors[f"{name}.alpha"] = torch.tensor(layer.scale * layer.rank, dtype=torch.float32)
    return tensors


def export_adapter(bench: Bench, adapter_sha256: str, destination: Path, layouts: Sequence[Layout] = LAYOUTS, *,
                   run_uid: str | None = None) -> Export:
    """Write an adapter of the store with its card into a folder, ready for diffusers, WebUI and ComfyUI.

    The diffusers file holds the stored numbers unchanged; both files name data, base, run and code in their header, and
    no local path. Raises BadInput for a layout that cannot hold the adapter, DamagedArtifact when its bytes are gone.
    """
    bench.store.read(adapter_sha256)  # verified before anything is published
    tensors, stored = read_adapter(bench.store.path(adapter_sha256))
    layers = lora_layers(tensors, stored)
    origin = origin_of(bench, adapter_sha256, run_uid)
    files: dict[str, Path] = {}
    for layout in layouts:
        if layout == "diffusers":
            body, files[layout] = diffusers_tensors(layers), destination / DIFFUSERS_FILE
            kept = {key: stored[key] for key in ("format", "lora_adapter_metadata") if key in stored}
        else:
            body, kept, files[layout] = kohya_tensors(layers), {}, destination / f"{origin.name}.safetensors"
        with atomic_write(files[layout]) as file:
            file.write(to_safetensors(body, kept | file_metadata(origin, layers, body, layout)))
    card = destination / "README.md"
    images = card_images(bench, adapter_sha256, destination)
    write_card(card, origin, images, {layout: path.name for layout, path in files.items()})
    return Export(destination, files, card)


def file_metadata(origin: Origin, layers: Sequence[LoraLayer], tensors: Mapping[str, Tensor],
                  layout: Layout) -> dict[str, str]:
    """Header strings: `ss_*` as kohya's trainer writes them, `modelspec.*` (ModelSpec 1.0.1), our own `safelight.*`."""
    training = origin.training
    digest = _data_digest(tensors)
    scales = {layer.scale * layer.rank for layer in layers}
    dims = {layer.rank for layer in layers}
    values: dict[str, Any] = {
        "ss_output_name": origin.name,
        "ss_v2": False,
        "ss_base_model_version": "sd_v1" if origin.architecture == "stable-diffusion-v1" else None,
        "ss_network_module": "networks.lora",
        "ss_network_dim": max(dims),
        "ss_network_alpha": max(scales),
        "ss_sd_model_name": origin.base,
        "ss_num_train_images": origin.train_images,
        "ss_learning_rate": training.get("learning_rate"),
        "ss_unet_lr": training.get("learning_rate"),
        "ss_optimizer": training.get("optimizer"),
        "ss_lr_scheduler": training.get("lr_scheduler"),
        "ss_lr_warmup_steps": training.get("lr_warmup_steps"),
        "ss_max_train_steps": training.get("max_train_steps"),
        "ss_steps": origin.step,
        "ss_gradient_accumulation_steps": training.get("gradient_accumulation_steps"),
        "ss_max_grad_norm": training.get("max_grad_norm"),
        "ss_caption_dropout_rate": training.get("caption_dropout_rate"),
        "ss_min_snr_gamma": training.get("snr_gamma"),
        "ss_seed": training.get("seed"),
        "ss_session_id": origin.run_uid,
        "sshs_model_hash": digest,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{origin.architecture}/lora",
        "modelspec.implementation": "diffusers" if layout == "diffusers" else "https://github.com/kohya-ss/sd-scripts",
        "modelspec.title": origin.title,
        "modelspec.resolution": f"{origin.resolution}x{origin.resolution}" if origin.resolution else None,
        "modelspec.date": origin.created_at,
        "modelspec.hash_sha256": f"0x{digest}",
        "modelspec.license": origin.licence_line,
        "safelight.adapter_sha256": origin.adapter_sha256,
        "safelight.run_uid": origin.run_uid,
        "safelight.dataset_manifest_sha256": origin.snapshot_digest,
        "safelight.mlflow_run_id": origin.mlflow_run_id,
        "safelight.git_commit": origin.git_commit,
        "safelight.base_model": origin.base,
        "safelight.base_model_sha256": origin.base_sha256,
    }
    if any(layer.down.dim() == 4 and layer.down.shape[-1] > 1 for layer in layers):
        values["ss_network_args"] = json.dumps({"conv_dim": str(max(dims)), "conv_alpha": str(max(scales))})
    return {key: str(value) for key, value in values.items() if value is not None}


def _data_digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over a safetensors file's bytes behind the header: the same with and without metadata."""
    data = to_safetensors(tensors)
    return hashlib.sha256(data[8 + int.from_bytes(data[:8], "little"):]).hexdigest()
