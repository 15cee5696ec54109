"""Adapter files for other programs, with a header and a card that say where they come from."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from components.catalog.models import Run
from components.config import BaseModelConfig
from components.errors import BadInput, BaseModelError
from components.families.bases import resolve_base
from components.layouts.files import read_adapter
from components.layouts.layers import KINDS, Layer
from components.layouts.names import Layout
from components.layouts.reading import stored_layers
from components.layouts.skeleton import Skeleton, skeleton_of
from components.layouts.tokens import Token, bundled, embedding_file, unbundled
from components.layouts.writing import comfyui_tensors, diffusers_tensors, kohya_tensors
from components.stages import Bench
from components.storage import atomic_write
from components.tensors import to_safetensors
from components.training.card import Origin, card_images, origin_of, write_card

EVERY_RUN: tuple[Layout, ...] = ("diffusers", "kohya")  # what is written where nothing else is asked for
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
BATCH = ("train_batch_size", "gradient_accumulation_steps", "num_processes")  # what one optimizer step sees
KOHYA_MODULES = {"StableDiffusion3Pipeline": "networks.lora_sd3", "FluxPipeline": "networks.lora_flux"}
IMPLEMENTATIONS: dict[Layout, str] = {
    "diffusers": "diffusers",
    "kohya": "https://github.com/kohya-ss/sd-scripts",
    "comfyui": "https://github.com/comfyanonymous/ComfyUI",
}


@dataclass(frozen=True, slots=True)
class Export:
    """What `export_adapter` wrote, and why it did not write a layout."""

    folder: Path
    files: dict[str, Path]  # by layout; of learned tokens "embeddings"
    card: Path
    skipped: dict[Layout, str]


def export_adapter(
    bench: Bench,
    adapter_sha256: str,
    destination: Path,
    layouts: Sequence[Layout] | None = None,
    *,
    run_uid: str | None = None,
) -> Export:
    """Write an adapter of the store with its card into a folder, ready for diffusers, WebUI and ComfyUI.

    The diffusers file holds the stored numbers unchanged; every file names data, base, run and code in its header, and
    no local path. Without `layouts` those of EVERY_RUN that can hold the adapter are written. Raises BadInput for a
    layout that was asked for and cannot hold it, DamagedArtifact when its bytes are gone.
    """
    bench.store.read(adapter_sha256)  # verified before anything is published
    everything, stored = read_adapter(bench.store.path(adapter_sha256))
    origin = origin_of(bench, adapter_sha256, run_uid)
    tensors, tokens = unbundled(everything, origin.pipeline, "the adapter")
    files: dict[str, Path] = {}
    skipped: dict[Layout, str] = {}
    for layout in layouts or EVERY_RUN:
        try:
            layers = stored_layers(tensors, stored)
            skeleton = None if layout == "diffusers" else _skeleton(bench, origin.run_uid, layout)
            body = tensors_in(layout, layers, skeleton, tokens)
        except BadInput as error:
            if layouts is not None:
                raise
            skipped[layout] = str(error)
            continue
        kept = {key: stored[key] for key in ("format", "lora_adapter_metadata") if key in stored}
        header = (kept if layout == "diffusers" else {}) | file_metadata(origin, layers, body, layout, tokens)
        files[layout] = destination / file_name(origin.name, layout, files)
        with atomic_write(files[layout]) as file:
            file.write(to_safetensors(body, header))
    files |= written_embeddings(tokens, origin.pipeline, destination) if "diffusers" in files else {}
    card = destination / "README.md"
    images = card_images(bench, adapter_sha256, destination)
    write_card(card, origin, images, {layout: path.name for layout, path in files.items()}, tokens)
    return Export(destination, files, card, skipped)


def tensors_in(
    layout: Layout, layers: Sequence[Layer], skeleton: Skeleton | None, tokens: Sequence[Token] = ()
) -> dict[str, Tensor]:
    """An adapter's tensors in a layout; all but diffusers' need the base's layers, and take tokens. Raises BadInput.

    Diffusers reads tokens from files of their own, which `written_embeddings` writes.
    """
    if layout == "diffusers":
        return diffusers_tensors(layers)
    assert skeleton is not None
    body = kohya_tensors(layers, skeleton) if layout == "kohya" else comfyui_tensors(layers, skeleton)
    return body | bundled(tokens, skeleton.pipeline)


def written_embeddings(tokens: Sequence[Token], pipeline: str, destination: Path) -> dict[str, Path]:
    """Write a file for each learned token, for `load_textual_inversion` and folders of embeddings."""
    files = {}
    for place, token in enumerate(tokens):
        number = f"-{place + 1}" if place else ""
        files[f"embeddings{number}"] = path = destination / f"learned_embeds{number}.safetensors"
        with atomic_write(path) as file:
            file.write(embedding_file(token, pipeline))
    return files


def file_name(name: str, layout: Layout, written: Mapping[str, Path]) -> str:
    """diffusers has a name of its own; of the others the first is called like the model."""
    if layout == "diffusers":
        return DIFFUSERS_FILE
    return f"{name}-{layout}.safetensors" if set(written) - {"diffusers"} else f"{name}.safetensors"


def _skeleton(bench: Bench, run_uid: str, layout: Layout) -> Skeleton:
    with bench.catalog.read() as session:
        run = session.get(Run, run_uid)
    try:
        return skeleton_of(resolve_base(BaseModelConfig.model_validate(run.recipe.get("base", {}) if run else {})))
    except BaseModelError as error:
        raise BadInput(f"the {layout} layout names layers as the base does, which is not here: {error}") from None


def file_metadata(
    origin: Origin,
    layers: Sequence[Layer],
    tensors: Mapping[str, Tensor],
    layout: Layout,
    tokens: Sequence[Token] = (),
) -> dict[str, str]:
    """Header strings: `ss_*` as kohya's trainer writes them, `modelspec.*` (ModelSpec 1.0.1), our own `safelight.*`."""
    training = origin.training
    digest = _data_digest(tensors)
    dims = [layer.rank or 1 for layer in layers]
    alphas = [layer.scale * rank for layer, rank in zip(layers, dims, strict=True)]
    kind, asked = layers[0].kind, training.get("resolution", "auto")
    side = origin.resolution if asked == "auto" else max(asked) if isinstance(asked, list | tuple) else asked
    text_rate = training.get("text_encoder_lr") or training.get("learning_rate")
    values: dict[str, Any] = {
        "ss_output_name": origin.name,
        "ss_v2": origin.architecture.startswith("stable-diffusion-v2"),
        "ss_base_model_version": origin.base_version,
        "ss_network_module": "lycoris.kohya" if kind != "lora" else KOHYA_MODULES.get(origin.pipeline, "networks.lora"),
        "ss_network_dim": max(dims),
        "ss_network_alpha": max(alphas),
        "ss_network_dropout": training.get("lora_dropout"),
        "ss_network_args": _network_args(layers, max(dims), max(alphas)),
        "ss_sd_model_name": origin.base,
        "ss_num_train_images": origin.train_images,
        "ss_training_started_at": origin.started_at,
        "ss_training_finished_at": origin.finished_at,
        "ss_learning_rate": training.get("learning_rate"),
        "ss_unet_lr": training.get("learning_rate"),
        "ss_text_encoder_lr": text_rate if training.get("train_text_encoder") else None,
        "ss_optimizer": training.get("optimizer"),
        "ss_lr_scheduler": training.get("lr_scheduler"),
        "ss_lr_warmup_steps": training.get("lr_warmup_steps"),
        "ss_max_train_steps": training.get("max_train_steps"),
        "ss_steps": origin.step,
        "ss_total_batch_size": math.prod(training.get(factor, 1) for factor in BATCH),
        "ss_gradient_accumulation_steps": training.get("gradient_accumulation_steps"),
        "ss_max_grad_norm": training.get("max_grad_norm"),
        "ss_mixed_precision": training.get("mixed_precision"),
        "ss_resolution": f"({side}, {side})" if side else None,
        "ss_gradient_checkpointing": training.get("gradient_checkpointing"),
        "ss_caption_dropout_rate": training.get("caption_dropout_rate"),
        "ss_caption_tag_dropout_rate": training.get("caption_tag_dropout_rate"),
        "ss_shuffle_caption": training.get("shuffle_caption"),
        "ss_keep_tokens": training.get("keep_tokens"),
        "ss_prior_loss_weight": training.get("prior_loss_weight"),
        "ss_scale_weight_norms": training.get("scale_weight_norms"),
        "ss_loss_type": "l2",
        "ss_debiased_estimation": training.get("loss_weighting") == "debiased",
        "ss_zero_terminal_snr": origin.zero_terminal_snr,
        "ss_min_snr_gamma": training.get("snr_gamma"),
        "ss_noise_offset": training.get("noise_offset"),
        "ss_multires_noise_iterations": training.get("multires_noise_iterations"),
        "ss_multires_noise_discount": training.get("multires_noise_discount"),
        "ss_ip_noise_gamma": training.get("ip_noise_gamma"),
        "ss_seed": training.get("seed"),
        "ss_session_id": origin.run_uid,
        **origin.data,
        "sshs_model_hash": digest,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{origin.architecture}/lora",
        "modelspec.implementation": IMPLEMENTATIONS[layout],
        "modelspec.title": origin.title,
        "modelspec.description": origin.description,
        "modelspec.resolution": f"{side}x{side}" if side else None,
        "modelspec.prediction_type": origin.prediction,
        "modelspec.usage_hint": "Use it at weight 1.",
        "modelspec.date": origin.created_at,
        "modelspec.hash_sha256": f"0x{digest}",
        "modelspec.license": origin.licence_line,
        "modelspec.trigger_phrase": ", ".join(token.name for token in tokens) or None,
        "safelight.adapter_sha256": origin.adapter_sha256,
        "safelight.run_uid": origin.run_uid,
        "safelight.dataset_manifest_sha256": origin.snapshot_digest,
        "safelight.mlflow_run_id": origin.mlflow_run_id,
        "safelight.git_commit": origin.git_commit,
        "safelight.base_model": origin.base,
        "safelight.base_model_revision": origin.base_revision,
        "safelight.base_model_sha256": origin.base_sha256,
    }
    return {key: str(value) for key, value in values.items() if value is not None}


def _network_args(layers: Sequence[Layer], dim: int, alpha: float) -> str | None:
    """What kohya's trainer would have been told: the algorithm where it is not LoRA, convolutions, DoRA."""
    arguments = {} if layers[0].kind == "lora" else {"algo": KINDS[layers[0].kind].lower()}
    if any(
        layer.kind == "lora" and layer.weights["down"].shape[-1] > 1 and layer.weights["down"].dim() == 4
        for layer in layers
    ):
        arguments |= {"conv_dim": str(dim), "conv_alpha": str(alpha)}
    if any(layer.magnitude is not None for layer in layers):
        arguments |= {"dora_wd": "True", "wd_on_output": "True"}
    return json.dumps(arguments) if arguments else None


def _data_digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over a safetensors file's bytes behind the header: the same with and without metadata."""
    data = to_safetensors(tensors)
    return hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
