"""kohya's sd-scripts: a training configuration (TOML, flat or in sections), a dataset configuration, or the first
naming the second.

Defaults that are not written down count as well, as far as they change the result: rank 4, alpha 1, rate 2e-6,
captions never dropped. Within a dataset configuration the lower level wins; its folders' names mean nothing.
"""

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.errors import BadInput
from components.importers.settings import (
    AUGMENTS,
    Imported,
    Line,
    Section,
    apply,
    known,
    number,
    pictures_in,
    recipe_name,
    set_optimizer,
    set_resolution,
    set_scale,
    set_schedule,
    set_warmup,
    shown,
    steps_of,
    taken,
    whole,
)

TRAINER = "kohya's trainers"
TRAINING_KEYS = {"network_module", "pretrained_model_name_or_path", "learning_rate", "unet_lr", "max_train_steps",
                 "max_train_epochs", "optimizer_type", "network_dim", "dataset_config", "train_data_dir"}
DATASET_KEYS = known("kohya", "dataset")
SUBSET_KEYS = known("kohya", "subset")
ARGUMENTS = DATASET_KEYS | SUBSET_KEYS | known("kohya", "arguments")
WRITES = "Safelight decides what it writes, and where"
REASONS = {
    **dict.fromkeys(["flip_aug", "color_aug", "random_crop", "face_crop_aug_range"], AUGMENTS),
    **dict.fromkeys(["output_dir", "logging_dir", "log_with", "save_model_as", "save_precision", "save_state",
                     "save_every_n_epochs", "save_last_n_steps", "save_last_n_epochs", "sample_prompts",
                     "sample_every_n_steps", "sample_every_n_epochs", "sample_sampler", "no_metadata"], WRITES),
    **dict.fromkeys(["cache_latents", "cache_latents_to_disk", "cache_text_encoder_outputs", "cache_info",
                     "cache_text_encoder_outputs_to_disk", "vae_batch_size", "skip_cache_check"],
                    "Safelight always caches, by content"),
    **dict.fromkeys(["enable_bucket", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps"],
                    "buckets follow the base and the resolution; `safelight plan` lists them"),
    **dict.fromkeys(["xformers", "sdpa", "mem_eff_attn", "lowram", "highvram", "full_fp16", "full_bf16",
                     "no_half_vae", "max_data_loader_n_workers", "persistent_data_loader_workers"],
                    "how it runs is chosen by Safelight"),
    **dict.fromkeys(["clip_skip", "max_token_length", "v2", "vae", "clip_l", "clip_g", "t5xxl", "ae"],
                    "the base says so itself"),
    "guidance_scale": "in training FLUX.1 dev is told 1, whatever was said there",
    **dict.fromkeys(["huggingface_token", "wandb_api_key"], "a secret; it stays where it is"),
    "validation_seed": "curation.split_salt seeds the split",
    "loss_type": "the loss is the squared error",
    "zero_terminal_snr": "the base's scheduler says so",
}
SAMPLINGS = {"sigmoid": "logit_normal", "shift": "logit_normal", "flux_shift": "logit_normal", "uniform": "uniform"}
SCHEMES = {"logit_normal": "logit_normal", "mode": "mode"} | dict.fromkeys(
    ["cosmap", "sigma_sqrt", "uniform", "none"], "uniform")  # weighting_scheme -> how times are drawn


def recognises(body: Any, suffix: str) -> bool:
    """A TOML file with a dataset's levels or the training's keys."""
    if suffix != ".toml" or not isinstance(body, dict):
        return False
    return "datasets" in body or bool(TRAINING_KEYS & _flat(body).keys())


def translate(body: Mapping[str, Any], path: Path) -> Imported:
    """The recipe of a training or of a dataset configuration."""
    training = Section({} if "datasets" in body else _flat(body), "")
    imported = Imported(recipe_name(training.get("output_name"), path.stem))
    dataset = body if "datasets" in body else _dataset_beside(training, path.parent, imported)
    if dataset is not None:
        _datasets(dataset, training, imported)
    else:
        _folders(training, imported)
    if TRAINING_KEYS & training.values.keys():
        _training(training, imported, path.parent)
    training.rest(imported, ARGUMENTS, REASONS, TRAINER)
    return imported


def _flat(body: Mapping[str, Any]) -> dict[str, Any]:
    """Sections of a training configuration only group its keys."""
    flat: dict[str, Any] = {}
    for key, value in body.items():
        flat |= value if isinstance(value, dict) else {key: value}
    return flat


# data ---------------------------------------------------------------------------------------------------------------


def _dataset_beside(training: Section, folder: Path, imported: Imported) -> dict[str, Any] | None:
    named = training.get("dataset_config")
    if not named:
        return None
    path = folder / Path(str(named)).expanduser()
    try:
        body = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise BadInput(f"dataset_config: {path} is no TOML file that can be read; correct the path") from None
    imported.note("dataset_config", f"read from {path}")
    return body


def _folders(training: Section, imported: Imported) -> None:
    """train_data_dir and reg_data_dir, whose folders' names are repeats and class tokens."""
    for key, is_reg in (("train_data_dir", False), ("reg_data_dir", True)):
        if folder := training.get(key):
            source = {"path": str(folder), "layout": "kohya"} | ({"is_reg": True} if is_reg else {})
            _add_source(source, training, training.key(key), imported, is_reg=is_reg)
    if training.get("in_json"):
        imported.ignore("in_json", "copy the file into the pictures' folder as meta.json")


def _datasets(body: Mapping[str, Any], training: Section, imported: Imported) -> None:
    general = Section(_table(body.get("general", {})), "general", training)
    for i, values in enumerate(body["datasets"]):
        dataset = Section(_table(values), f"datasets.{i}", general, training)
        for j, inner in enumerate(_table(values).get("subsets", [])):
            subset = Section(_table(inner), f"datasets.{i}.subsets.{j}", dataset, general, training)
            _subset(subset, imported)
            subset.rest(imported, SUBSET_KEYS, REASONS, TRAINER)
        _dataset(dataset, imported)
        dataset.asked.add("subsets")
        dataset.rest(imported, DATASET_KEYS | SUBSET_KEYS, REASONS, TRAINER)
    general.rest(imported, DATASET_KEYS | SUBSET_KEYS, REASONS, TRAINER)
    for key in body.keys() - {"general", "datasets"}:
        imported.lines.append(Line(key, "unknown", f"no section of a dataset configuration of {TRAINER}"))


def _dataset(dataset: Section, imported: Imported) -> None:
    if dataset.states("resolution"):
        set_resolution(imported, dataset.key("resolution"), dataset.get("resolution"), pair=True)
    _no_upscale(imported, dataset)
    if dataset.states("batch_size"):
        imported.set(dataset.key("batch_size"), "training", "train_batch_size", whole(dataset, "batch_size", 1))
    if share := number(dataset, "validation_split"):
        imported.set(dataset.key("validation_split"), "curation", "test_fraction", share)


def _subset(subset: Section, imported: Imported) -> None:
    folder = subset.get("image_dir")
    if subset.get("metadata_file"):
        imported.ignore(subset.key("metadata_file"), "copy the file into the pictures' folder as meta.json")
    if not folder:
        imported.ignore(subset.key("image_dir"), "the subset names no folder")
        return
    source: dict[str, Any] = {"path": str(folder), "layout": "folder"}
    if (repeats := whole(subset, "num_repeats", 1)) > 1:
        source["repeats"] = repeats
    if subset.get("is_reg"):
        source["is_reg"] = True
    if tokens := subset.get("class_tokens"):
        source["class_tokens"] = str(tokens)
    if masks := subset.get("conditioning_data_dir"):
        source["masks"] = str(masks)
    elif subset.get("alpha_mask"):
        source["masks"] = "alpha"
    if "masks" in source:
        imported.set(subset.key("alpha_mask" if source["masks"] == "alpha" else "conditioning_data_dir"),
                     "training", "masked_loss", True)
    _add_source(source, subset, subset.key("image_dir"), imported, is_reg=bool(source.get("is_reg")))


def _add_source(source: dict[str, Any], section: Section, key: str, imported: Imported, *, is_reg: bool) -> None:
    """The source with its captions' settings; those that Safelight has once for all sources go to the training."""
    if section.get("enable_wildcard"):
        source["caption_lines"] = "variants"
    for name in ("caption_prefix", "caption_suffix"):
        if words := section.get(name):
            source[name] = str(words)
    stated = section.states("caption_extension")
    extension = str(section.get("caption_extension", ".caption"))
    if stated and extension in (".txt", ".caption", ".json"):
        source["caption_extension"] = extension
    imported.sources.append(source)
    said = ", ".join(f"{name} = {shown(value)}" for name, value in source.items())
    imported.lines.append(Line(key, "mapped", f"data.sources: {said}"))
    if not stated:
        imported.note(key, "caption_extension is not set: kohya's trainers would use .caption files alone and"
                      " silently pass over .txt; Safelight reads .txt, .caption and .json")
    if not is_reg:
        _captions(section, imported)


def _captions(section: Section, imported: Imported) -> None:
    rate, before = number(section, "caption_dropout_rate", 0.0), imported.training.get("caption_dropout_rate")
    if before not in (None, rate):
        imported.note(section.key("caption_dropout_rate"), f"{before} elsewhere; Safelight has one for all sources")
    imported.set(section.key("caption_dropout_rate"), "training", "caption_dropout_rate", rate)
    if section.get("shuffle_caption"):
        imported.set(section.key("shuffle_caption"), "training", "shuffle_caption", True)
        apply({
            "keep_tokens": taken("training", "keep_tokens", int),
            "caption_tag_dropout_rate": taken("training", "caption_tag_dropout_rate", float),
            "caption_separator": taken("training", "caption_separator", str),
        }, imported, section)


# training -----------------------------------------------------------------------------------------------------------


def _training(section: Section, imported: Imported, folder: Path) -> None:
    _network(section, imported)
    apply({
        "pretrained_model_name_or_path": _base, "resolution": _resolution,
        "noise_offset": taken("training", "noise_offset", float),
        "multires_noise_iterations": taken("training", "multires_noise_iterations", int),
        "multires_noise_discount": taken("training", "multires_noise_discount", float),
        "ip_noise_gamma": taken("training", "ip_noise_gamma", float),
        "min_snr_gamma": taken("training", "snr_gamma", float),
        "debiased_estimation_loss": taken("training", "loss_weighting", lambda _: "debiased"),
        "v_parameterization": taken("training", "prediction_type", lambda _: "v_prediction"),
        "scale_weight_norms": taken("training", "scale_weight_norms", float),
        "masked_loss": taken("training", "masked_loss"),
        "prior_loss_weight": taken("training", "prior_loss_weight", float),
        "gradient_checkpointing": taken("training", "gradient_checkpointing"),
        "save_every_n_steps": taken("training", "checkpointing_steps", int), "seed": taken("training", "seed", int),
    }, imported, section)
    if "bucket_no_upscale" not in imported.training:
        _no_upscale(imported, section)
    if not imported.training.get("multires_noise_iterations"):
        imported.training.pop("multires_noise_discount", None)
    if not any(source.get("is_reg") for source in imported.sources):
        imported.training.pop("prior_loss_weight", None)
    precision = str(section.get("mixed_precision", "no"))
    imported.set("mixed_precision", "training", "mixed_precision", precision if precision in ("fp16", "bf16") else "no")
    if "train_batch_size" not in imported.training:
        imported.set("train_batch_size", "training", "train_batch_size", whole(section, "train_batch_size", 1))
    imported.set("gradient_accumulation_steps", "training", "gradient_accumulation_steps",
                 whole(section, "gradient_accumulation_steps", 1))
    if norm := number(section, "max_grad_norm", 1.0):
        imported.set("max_grad_norm", "training", "max_grad_norm", norm)
    else:
        imported.ignore("max_grad_norm", "0 means no limit there; Safelight keeps its own, which is 1")
    _optimizer(section, imported)
    _steps(section, imported, folder)
    set_schedule(imported, "lr_scheduler", section.get("lr_scheduler", "constant"))
    set_warmup(imported, "lr_warmup_steps", number(section, "lr_warmup_steps", 0.0) or 0.0)
    _timesteps(section, imported)


def _base(imported: Imported, section: Section, key: str) -> None:
    model = str(section.get(key))
    single = re.search(r"\.(safetensors|ckpt)$", model) is not None
    why = "a single file: convert it to a folder in diffusers layout" if single else ""
    imported.set(key, "base", "model", model, why)


def _resolution(imported: Imported, section: Section, key: str) -> None:
    if "resolution" not in imported.training:
        set_resolution(imported, section.key(key), section.get(key), pair=True)


def _no_upscale(imported: Imported, section: Section) -> None:
    """Where it is not written pictures are enlarged there, here they are not: nobody asked for it."""
    key = "bucket_no_upscale"
    if section.states(key):
        imported.set(section.key(key), "training", key, bool(section.get(key)))


def _network(section: Section, imported: Imported) -> None:
    arguments = _arguments(section, "network_args", imported)
    kind = _kind(section, arguments)
    rank = whole(section, "network_dim", 4)
    general = number(section, "learning_rate", 2e-6)
    rate = float(number(section, "unet_lr") or general or 0.0)
    rate_key = "unet_lr" if section.get("unet_lr") else "learning_rate"
    if rate_key == "unet_lr" and section.states("learning_rate"):
        imported.ignore("learning_rate", "unet_lr counts")
    alpha = number(section, "network_alpha", 1.0) or float(rank)  # 0 means rank there
    if weights := section.get("network_weights"):
        imported.set("network_weights", "training", "init_adapter", str(weights), "rank and alpha are the file's")
        imported.set(rate_key, "training", "learning_rate", rate)
    else:
        if kind != "lora":
            imported.set("network_module", "training", "adapter", kind)
        why = "" if section.states("network_alpha") else "kohya's default"
        set_scale(imported, ("network_dim", "network_alpha", rate_key), rank, alpha, rate, why)
        if kind == "oft":
            imported.training.pop("lora_alpha")
        if conv := arguments.pop("conv_dim", None):
            why = "" if conv == str(rank) else f"with rank {rank} instead of {conv}"
            imported.set("network_args.conv_dim", "training", "targets", "all", why)
    _network_arguments(arguments, kind, imported)
    _text_encoders(section, kind, rate, imported)
    if dropout := number(section, "network_dropout"):
        if kind in ("lora", "dora"):
            imported.set("network_dropout", "training", "lora_dropout", dropout,
                         "on the adapter's input, there between its factors")
        else:
            imported.ignore("network_dropout", f"{kind} has none")


def _text_encoders(section: Section, kind: str, rate: float, imported: Imported) -> None:
    """kohya's trainers train them as well, at the general rate, unless something says no."""
    unet_only = section.get("network_train_unet_only") or section.values.get("cache_text_encoder_outputs")
    stated = section.get("text_encoder_lr")
    first = stated[0] if isinstance(stated, list) and stated else stated
    general = float(number(section, "learning_rate", rate) or 0.0)
    own = float(first) if isinstance(first, int | float | str) and first != "" else general
    if unet_only or own == 0.0:
        return
    if kind not in ("lora", "dora"):
        imported.ignore("text_encoder_lr", f"with {kind} text encoders are not trained")
        return
    key = "text_encoder_lr" if stated is not None else "network_train_unet_only"
    imported.set(key, "training", "train_text_encoder", True, "as it is there unless network_train_unet_only is set")
    if own != rate:
        imported.set("text_encoder_lr", "training", "text_encoder_lr", own)


def _kind(section: Section, arguments: dict[str, str]) -> str:
    """The adapter that network_module and its arguments name, in Safelight's words."""
    module = str(section.get("network_module", "networks.lora"))
    kind = arguments.pop("algo", "oft" if "oft" in module else "lora").lower()
    kind = "lora" if kind == "locon" else kind
    if kind == "lora" and arguments.pop("dora_wd", "").lower() == "true":
        kind = "dora"
    if kind not in ("lora", "dora", "loha", "lokr", "oft"):
        raise BadInput(f"network_module: {module} trains {kind}, expected lora, dora, loha, lokr or oft")
    return kind


def _network_arguments(arguments: dict[str, str], kind: str, imported: Imported) -> None:
    for name in ("loraplus_unet_lr_ratio", "loraplus_lr_ratio"):
        if name in arguments and kind in ("lora", "dora"):
            imported.set(f"network_args.{name}", "training", "loraplus_lr_ratio", float(arguments.pop(name)))
    for name in arguments:
        imported.ignore(f"network_args.{name}")


def _optimizer(section: Section, imported: Imported) -> None:
    named = section.get("optimizer_type") or ("AdamW8bit" if section.get("use_8bit_adam") else "AdamW")
    found = set_optimizer(imported, "optimizer_type", named)
    arguments = _arguments(section, "optimizer_args", imported)
    if "weight_decay" in arguments:
        imported.set("optimizer_args.weight_decay", "training", "weight_decay", float(arguments.pop("weight_decay")))
    if "betas" in arguments and found in ("adamw", "adamw8bit", "prodigy", "adamwschedulefree"):
        betas = re.findall(r"[0-9.]+", arguments.pop("betas"))
        for name, value in zip(("adam_beta1", "adam_beta2"), betas, strict=False):
            imported.set("optimizer_args.betas", "training", name, float(value))
    for name in arguments:
        imported.ignore(f"optimizer_args.{name}")


def _arguments(section: Section, key: str, imported: Imported) -> dict[str, str]:
    """name=value of a list of such words."""
    given = section.get(key) or []
    pairs = [str(word).partition("=") for word in (given if isinstance(given, list) else [given])]
    for name, found, _ in pairs:
        if not found:
            imported.lines.append(Line(key, "unknown", f"{name!r} is no name=value"))
    return {name.strip(): value.strip() for name, found, value in pairs if found}


def _steps(section: Section, imported: Imported, folder: Path) -> None:
    if epochs := whole(section, "max_train_epochs", 0):
        per_step = imported.training["train_batch_size"] * imported.training["gradient_accumulation_steps"]
        steps_of(imported, "max_train_epochs", epochs, pictures_in(imported.sources, folder), per_step)
    else:
        imported.set("max_train_steps", "training", "max_train_steps", whole(section, "max_train_steps", 1600),
                     "optimizer steps, here as there")


def _timesteps(section: Section, imported: Imported) -> None:
    sampling, scheme = str(section.get("timestep_sampling", "")), str(section.get("weighting_scheme", ""))
    if sampling in SAMPLINGS:
        imported.set("timestep_sampling", "training", "timestep_sampling", SAMPLINGS[sampling])
        if (scale := number(section, "sigmoid_scale", 1.0)) and SAMPLINGS[sampling] == "logit_normal":
            imported.training["logit_std"] = scale
    elif scheme in SCHEMES:
        imported.set("weighting_scheme", "training", "timestep_sampling", SCHEMES[scheme])
        if scheme == "logit_normal":
            apply({"logit_mean": taken("training", "logit_mean", float),
                   "logit_std": taken("training", "logit_std", float)}, imported, section)
        elif scheme == "mode":
            apply({"mode_scale": taken("training", "mode_scale", float)}, imported, section)
        elif scheme in ("cosmap", "sigma_sqrt"):
            imported.set("weighting_scheme", "training", "loss_weighting", scheme)
    if sampling == "flux_shift":
        imported.set("timestep_sampling", "training", "use_dynamic_shifting", True)
    elif sampling == "shift" or scheme:
        for key in ("discrete_flow_shift", "training_shift"):
            if shift := number(section, key):
                imported.set(key, "training", "discrete_flow_shift", shift)


def _table(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadInput("a dataset configuration's levels are tables, expected [general], [[datasets]] and"
                       " [[datasets.subsets]]")
    return value
