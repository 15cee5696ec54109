"""ai-toolkit: a job (YAML) whose process trains a LoRA.

Two things to know: for transformers alpha is not used there, the scale is always 1, whatever the file says; and what
the file leaves out is rank 4, alpha 1, a rate of 1e-6, 1000 steps, captions never dropped.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.errors import BadInput
from components.importers.settings import (
    AUGMENTS,
    OWN_WAY,
    Imported,
    Line,
    Section,
    apply,
    known,
    number,
    recipe_name,
    set_optimizer,
    set_resolution,
    set_scale,
    set_schedule,
    shown,
    taken,
    whole,
)

TRAINER = "ai-toolkit"
PROCESS_KEYS = known("ai_toolkit", "process")
NETWORK_KEYS = known("ai_toolkit", "network")
TRAIN_KEYS = known("ai_toolkit", "train")
MODEL_KEYS = known("ai_toolkit", "model")
DATASET_KEYS = known("ai_toolkit", "dataset")
CACHES = "Safelight always caches, by content"
REASONS = {
    **dict.fromkeys(["training_folder", "device", "sample", "logging", "performance_log_every", "sqlite_db_path",
                     "sdp", "xformers", "attention_backend", "disable_sampling", "skip_first_sample",
                     "force_first_sample", "low_vram", "quantize", "quantize_te", "qtype", "qtype_te"], OWN_WAY),
    **dict.fromkeys(["flip_x", "flip_y", "augments", "augmentations", "random_scale", "random_crop"], AUGMENTS),
    **dict.fromkeys(["cache_latents", "cache_latents_to_disk", "cache_text_embeddings", "unload_text_encoder"], CACHES),
    **dict.fromkeys(["train_unet"], "as it always is"),
    **dict.fromkeys(["noise_scheduler", "is_flux", "is_xl", "is_v2", "is_v3", "arch", "dtype"],
                    "the base says so itself"),
    "type": "as it always is",
    "buckets": "buckets follow the base and the resolution; `safelight plan` lists them",
    "transformer_only": "as it always is",
}
CONVOLUTIONAL = ("sd1", "sd15", "sd2", "sdxl", "ssd", "vega")  # arch of models whose alpha counts; others: scale 1
UNET_FLAGS = ("is_xl", "is_v2", "is_ssd", "is_vega")
TRANSFORMER_FLAGS = ("is_flux", "is_v3", "is_lumina2", "is_pixart", "is_pixart_sigma", "is_auraflow")
TIMES = {"sigmoid": "logit_normal", "linear": "uniform"}
PRECISIONS = {"bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16", "float16": "fp16", "fp32": "no", "float32": "no"}


def recognises(body: Any, suffix: str) -> bool:
    """A YAML (or JSON) file with a job and its configuration."""
    return suffix in (".yaml", ".yml", ".json") and isinstance(body, dict) and isinstance(
        body.get("config"), dict) and isinstance(body["config"].get("process"), list)


def translate(body: Mapping[str, Any], path: Path) -> Imported:
    """The recipe of the job's first process."""
    config, processes = body["config"], body["config"]["process"]
    if not processes or not isinstance(processes[0], dict):
        raise BadInput("config.process is empty, expected one that trains a LoRA")
    imported = Imported(recipe_name(config.get("name"), path.stem))
    if len(processes) > 1:
        imported.note("config.process", f"the first of {len(processes)} processes is taken")
    process = Section(processes[0], "")
    sections = {name: Section(_object(process.get(name), name), name) for name in ("network", "train", "model", "save")}
    _network(sections["network"], sections["train"], sections["model"], imported)
    _training(sections["train"], sections["model"], imported)
    apply({"save_every": taken("training", "checkpointing_steps", int)}, imported, sections["save"])
    trigger = process.get("trigger_word")
    for i, values in enumerate(process.get("datasets") or []):
        dataset = Section(_object(values, f"datasets.{i}"), f"datasets.{i}")
        _dataset(dataset, trigger, imported)
        dataset.rest(imported, DATASET_KEYS, REASONS, TRAINER)
    apply({"training_seed": taken("training", "seed", int)}, imported, process)
    if not any(source.get("is_reg") for source in imported.sources):
        imported.training.pop("prior_loss_weight", None)
    for name, settings in (("network", NETWORK_KEYS), ("train", TRAIN_KEYS), ("model", MODEL_KEYS)):
        sections[name].rest(imported, settings, REASONS, TRAINER)
    process.rest(imported, PROCESS_KEYS, REASONS, TRAINER)
    return imported


def _network(network: Section, train: Section, model: Section, imported: Imported) -> None:
    kind = str(network.get("type", "lora")).lower()
    if kind not in ("lora", "dora", "lokr"):
        raise BadInput(f"network.type is {kind!r}, expected lora, dora or lokr")
    if kind != "lora":
        imported.set("network.type", "training", "adapter", kind)
    key = "rank" if network.get("rank") is not None else "linear"
    rank = whole(network, key, 4)
    network.asked.add("linear")
    alpha = number(network, "linear_alpha", number(network, "alpha", 1.0)) or float(rank)
    why = "" if network.states("linear_alpha") or network.states("alpha") else "ai-toolkit's default"
    if _is_transformer(model):
        alpha, why = float(rank), "ai-toolkit does not use alpha for transformers, its scale is 1"
    rate = number(train, "unet_lr") or number(train, "lr", 1e-6) or 0.0
    set_scale(imported, (f"network.{key}", "network.linear_alpha", "train.lr"), rank, alpha, rate, why)
    if network.get("conv"):
        imported.set("network.conv", "training", "targets", "all", "with the rank of the linear layers")
        network.asked.add("conv_alpha")
    if (dropout := number(network, "dropout")) and kind in ("lora", "dora"):
        imported.set("network.dropout", "training", "lora_dropout", dropout)
    if adapter := network.get("pretrained_lora_path"):
        imported.set("network.pretrained_lora_path", "training", "init_adapter", str(adapter),
                     "kind, rank and alpha are the file's")
        for name in ("adapter", "rank", "lora_alpha", "targets"):
            imported.training.pop(name, None)


def _is_transformer(model: Section) -> bool:
    arch = str(model.get("arch") or "").lower()
    if arch:
        return arch not in CONVOLUTIONAL
    return any(model.get(name) for name in TRANSFORMER_FLAGS) and not any(model.get(name) for name in UNET_FLAGS)


def _training(train: Section, model: Section, imported: Imported) -> None:
    apply({"name_or_path": taken("base", "model", str),
           "is_v_pred": taken("training", "prediction_type", lambda _: "v_prediction")}, imported, model)
    imported.set("train.steps", "training", "max_train_steps", whole(train, "steps", 1000))
    imported.set("train.batch_size", "training", "train_batch_size", whole(train, "batch_size", 1))
    accumulation = max(whole(train, "gradient_accumulation_steps", 1), whole(train, "gradient_accumulation", 1))
    imported.set("train.gradient_accumulation_steps", "training", "gradient_accumulation_steps", accumulation)
    found = set_optimizer(imported, "train.optimizer", train.get("optimizer", "adamw"))
    _optimizer(Section(_object(train.get("optimizer_params"), "train.optimizer_params"), "train.optimizer_params"),
               found, imported)
    set_schedule(imported, "train.lr_scheduler", train.get("lr_scheduler", "constant"))
    imported.set("train.max_grad_norm", "training", "max_grad_norm", number(train, "max_grad_norm", 1.0))
    apply({
        "min_snr_gamma": taken("training", "snr_gamma", float), "snr_gamma": taken("training", "snr_gamma", float),
        "noise_offset": taken("training", "noise_offset", float),
        "reg_weight": taken("training", "prior_loss_weight", float),
    }, imported, train)
    rate = number(train, "text_encoder_lr")
    if train.get("train_text_encoder") and imported.training.get("adapter", "lora") in ("lora", "dora"):
        imported.set("train.train_text_encoder", "training", "train_text_encoder", True)
        if rate and rate != imported.training["learning_rate"]:
            imported.set("train.text_encoder_lr", "training", "text_encoder_lr", rate)
    checkpointing = bool(train.get("gradient_checkpointing", True))
    imported.set("train.gradient_checkpointing", "training", "gradient_checkpointing", checkpointing)
    precision = PRECISIONS.get(str(train.get("dtype", "fp32")).lower(), "auto")
    imported.set("train.dtype", "training", "mixed_precision", precision)
    ema = Section(_object(train.get("ema_config"), "train.ema_config"), "train.ema_config")
    if ema.get("use_ema"):
        imported.set("train.ema_config.ema_decay", "training", "ema_decay", number(ema, "ema_decay", 0.999))
    if _is_transformer(model):
        times = str(train.get("timestep_type", "sigmoid"))
        if times in TIMES:
            imported.set("train.timestep_type", "training", "timestep_sampling", TIMES[times])
        else:
            imported.ignore("train.timestep_type", f"Safelight has no {times}; times are uniform")
    imported.set("caption_dropout_rate", "training", "caption_dropout_rate", 0.0, "its default")


def _optimizer(parameters: Section, found: str | None, imported: Imported) -> None:
    apply({"weight_decay": taken("training", "weight_decay", float)}, imported, parameters)
    betas = parameters.get("betas")
    if isinstance(betas, list) and len(betas) == 2 and found in ("adamw", "adamw8bit", "prodigy", "adamwschedulefree"):
        imported.set("train.optimizer_params.betas", "training", "adam_beta1", float(betas[0]))
        imported.set("train.optimizer_params.betas", "training", "adam_beta2", float(betas[1]))
    for name in parameters.values.keys() - parameters.asked:
        imported.ignore(f"train.optimizer_params.{name}", "Safelight's optimizers have fewer settings")


def _dataset(dataset: Section, trigger: Any, imported: Imported) -> None:
    folder = dataset.get("folder_path") or dataset.get("dataset_path")
    if not folder:
        imported.ignore(dataset.key("folder_path"), "the data set names no folder")
        return
    source: dict[str, Any] = {"path": str(folder), "layout": "folder", "caption_lines": "whole"}
    extension = "." + str(dataset.get("caption_ext", ".txt")).lstrip(".")
    if extension in (".txt", ".caption", ".json"):
        source["caption_extension"] = extension
    if (repeats := whole(dataset, "num_repeats", 1)) > 1:
        source["repeats"] = repeats
    if dataset.get("is_reg"):
        source["is_reg"] = True
    if words := dataset.get("default_caption"):
        source["class_tokens"] = str(words)
    if word := dataset.get("trigger_word") or trigger:
        if source.get("is_reg"):
            imported.ignore(dataset.key("trigger_word"), "captions of the class are left without it, as there")
        else:
            source["trigger"] = str(word)
    _masks(dataset, source, imported)
    imported.sources.append(source)
    said = ", ".join(f"{name} = {shown(value)}" for name, value in source.items())
    imported.lines.append(Line(dataset.key("folder_path"), "mapped", f"data.sources: {said}"))
    if "resolution" not in imported.training:
        set_resolution(imported, dataset.key("resolution"), dataset.get("resolution", 512), pair=False)
    dataset.asked.add("resolution")
    apply({"caption_dropout_rate": taken("training", "caption_dropout_rate", float)}, imported, dataset)
    if dataset.get("shuffle_tokens"):
        imported.set(dataset.key("shuffle_tokens"), "training", "shuffle_caption", True)
        apply({"keep_tokens": taken("training", "keep_tokens", int),
               "token_dropout_rate": taken("training", "caption_tag_dropout_rate", float)}, imported, dataset)


def _masks(dataset: Section, source: dict[str, Any], imported: Imported) -> None:
    key = "mask_path" if dataset.get("mask_path") else "alpha_mask" if dataset.get("alpha_mask") else None
    if key is None:
        return
    source["masks"] = "alpha" if key == "alpha_mask" else str(dataset.get("mask_path"))
    imported.set(dataset.key(key), "training", "masked_loss", True)
    if floor := number(dataset, "mask_min_value"):
        imported.set(dataset.key("mask_min_value"), "training", "unmasked_weight", floor)
    if dataset.get("invert_mask"):
        imported.ignore(dataset.key("invert_mask"), "white counts, black does not: invert the masks' files")


def _object(value: Any, key: str) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise BadInput(f"{key} is no section, expected one with its settings")
    return value or {}
