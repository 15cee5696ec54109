"""OneTrainer: a training configuration (JSON) with its concepts inside or in the file it names, or concepts alone.

Its defaults count where the file is silent: rank 16, alpha 1, 100 epochs, a rate of 3e-6. Every line of a caption file
is a variant there.
"""

import json
from pathlib import Path
from typing import Any

from components.errors import BadInput
from components.importers.settings import (
    OWN_WAY,
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

TRAINER = "OneTrainer"
KEYS = known("one_trainer", "training")
CONCEPT_KEYS = known("one_trainer", "concept")
TEXT_KEYS = known("one_trainer", "text")
OWN = ("tensorboard", "sample", "backup", "rolling", "output", "debug", "cloud", "save", "async", "device", "fused",
       "dataloader")
REASONS = {
    **dict.fromkeys([key for key in KEYS if key.startswith(OWN)], OWN_WAY),
    **dict.fromkeys(["workspace_dir", "cache_dir", "train_device", "temp_device", "multi_gpu", "attention_mechanism"],
                    OWN_WAY),
    **dict.fromkeys([key for key in KEYS if key.startswith("text_encoder_") and "_l" not in key],
                    "trained with the first text encoder, or not at all"),
    **dict.fromkeys(["latent_caching", "clear_cache_before_training", "only_cache"],
                    "Safelight always caches, by content"),
    "secrets": "a secret; it stays where it is", "__version": "the file's own version",
    "aspect_ratio_bucketing": "buckets follow the base and the resolution; `safelight plan` lists them",
    "optimizer_defaults": "settings of optimizers that are not used", "validation": "Safelight always holds out a part",
    "vae": "the base says so itself", "model_type": "the base says so itself",
    "concept_file_name": "the concepts are in this file", "ema_update_step_interval": "the average is taken every step",
}
DISTRIBUTIONS = {"UNIFORM": "uniform", "LOGIT_NORMAL": "logit_normal", "HEAVY_TAIL": "mode", "COS_MAP": "cosmap"}
WEIGHTS = {"MIN_SNR_GAMMA": "min_snr", "P2": "p2", "DEBIASED_ESTIMATION": "debiased", "SIGMA": "sigma_sqrt"}
TARGETS = {"attn-mlp": "attention-mlp", "attn-only": "attention", "full": "all"}
PRECISIONS = {"FLOAT_32": "no", "TFLOAT_32": "no", "FLOAT_16": "fp16", "BFLOAT_16": "bf16"}


def recognises(body: Any, suffix: str) -> bool:
    """A JSON file with a training's keys, or a list of concepts."""
    if suffix != ".json":
        return False
    if isinstance(body, list):
        return bool(body) and all(isinstance(entry, dict) and "path" in entry for entry in body)
    return isinstance(body, dict) and len(body.keys() & KEYS) >= 2


def translate(body: Any, path: Path) -> Imported:
    """The recipe of a training, or of concepts alone."""
    values = {"concepts": body} if isinstance(body, list) else body
    section = Section(values, "")
    imported = Imported(recipe_name(section.get("save_filename_prefix"), path.stem))
    _concepts(section, imported, path.parent)
    if not isinstance(body, list):
        _training(section, imported, path.parent)
    section.rest(imported, KEYS, REASONS, TRAINER)
    return imported


# concepts -----------------------------------------------------------------------------------------------------------


def _concepts(section: Section, imported: Imported, folder: Path) -> None:
    concepts = section.get("concepts")
    if concepts is None:
        concepts = _concepts_beside(section, imported, folder)
    for i, values in enumerate(concepts):
        if not isinstance(values, dict):
            raise BadInput(f"concepts: entry {i} is no object, expected one with a path")
        concept = Section(values, f"concepts.{i}")
        _concept(concept, imported)
        concept.rest(imported, CONCEPT_KEYS, {}, TRAINER)


def _concepts_beside(section: Section, imported: Imported, folder: Path) -> list[Any]:
    named = Path(str(section.get("concept_file_name", "training_concepts/concepts.json")))
    for path in (folder / named, folder / named.name, folder.parent / named):
        if path.is_file():
            try:
                body = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                body = None
            if not isinstance(body, list):
                raise BadInput(f"concept_file_name: {path} holds no list of concepts; correct the file")
            imported.note("concept_file_name", f"read from {path}")
            return body
    raise BadInput(f"concept_file_name: no file {named} beside this one or above it; put the concepts' file there")


def _concept(concept: Section, imported: Imported) -> None:
    text = Section(_object(concept.get("text"), concept.key("text")), concept.key("text"))
    image = Section(_object(concept.get("image"), concept.key("image")), concept.key("image"))
    key, kind = concept.key("path"), str(concept.get("type", "STANDARD"))
    if not concept.get("enabled", True):
        imported.ignore(key, "the concept is switched off")
        return
    if kind == "VALIDATION":
        imported.ignore(key, "a validation concept; Safelight holds out a part of the data itself")
        return
    source: dict[str, Any] = {"path": str(concept.get("path", "")), "layout": "folder", "caption_lines": "variants"}
    if kind == "PRIOR_PREDICTION":
        source["is_reg"] = True
        imported.note(concept.key("type"), "the pictures are trained on as class pictures, not compared with the base's"
                      " own prediction")
    _balance(concept, source, imported)
    _prompts(text, source, imported)
    if concept.get("include_subdirectories") is False:
        imported.note(concept.key("include_subdirectories"), "Safelight reads folders inside as well")
    if (weight := number(concept, "loss_weight", 1.0)) != 1.0:
        imported.ignore(concept.key("loss_weight"), f"{weight:g}; only class pictures have a weight, prior_loss_weight")
    for name in ("name", "seed", "concept_stats", "image_variations", "text_variations"):
        concept.asked.add(name)
    changed = [name for name, value in image.values.items() if value is True]
    for name in changed:
        imported.ignore(image.key(name), "Safelight trains on pictures as they are")
    imported.sources.append(source)
    said = ", ".join(f"{name} = {shown(value)}" for name, value in source.items())
    imported.lines.append(Line(key, "mapped", f"data.sources: {said}"))


def _balance(concept: Section, source: dict[str, Any], imported: Imported) -> None:
    balancing, strategy = number(concept, "balancing", 1.0) or 1.0, concept.get("balancing_strategy", "REPEATS")
    if strategy == "SAMPLES":
        imported.ignore(concept.key("balancing"), "a number of samples per epoch; Safelight has repeats alone")
    elif balancing != 1.0:
        source["repeats"] = max(1, round(balancing))
        if source["repeats"] != balancing:
            imported.note(concept.key("balancing"), f"{balancing:g} becomes {source['repeats']}: repeats are whole")


def _prompts(text: Section, source: dict[str, Any], imported: Imported) -> None:
    prompts = text.get("prompt_source", "sample")
    if prompts == "filename":
        source["caption_from"] = "file_name"
        source.pop("caption_lines")
    elif prompts == "concept":
        imported.ignore(text.key("prompt_path"), "one text for the whole concept; write it as class_tokens")
        text.asked.add("prompt_path")
    if text.get("enable_tag_shuffling"):
        imported.set(text.key("enable_tag_shuffling"), "training", "shuffle_caption", True)
        imported.set(text.key("keep_tags_count"), "training", "keep_tokens", whole(text, "keep_tags_count", 1))
        apply({"tag_delimiter": taken("training", "caption_separator", str)}, imported, text)
        if text.get("tag_dropout_enable") and (rate := number(text, "tag_dropout_probability")):
            imported.set(text.key("tag_dropout_probability"), "training", "caption_tag_dropout_rate", rate,
                         f"mode {text.get('tag_dropout_mode', 'FULL')} there")
    text.asked.update(name for name, value in text.values.items() if name in TEXT_KEYS and not value)  # switched off
    text.rest(imported, TEXT_KEYS, {}, TRAINER)


# training -----------------------------------------------------------------------------------------------------------


def _training(section: Section, imported: Imported, folder: Path) -> None:
    method = section.get("training_method", "FINE_TUNE")
    if method != "LORA":
        raise BadInput(f"training_method is {method!r}; Safelight trains adapters, expected 'LORA'")
    _network(section, imported)
    apply({
        "base_model_name": taken("base", "model", str),
        "offset_noise_weight": taken("training", "noise_offset", float),
        "perturbation_noise_weight": _perturbation,
        "force_v_prediction": taken("training", "prediction_type", lambda _: "v_prediction"),
        "force_epsilon_prediction": taken("training", "prediction_type", lambda _: "epsilon"),
        "layer_filter_preset": _targets, "masked_training": taken("training", "masked_loss"),
    }, imported, section)
    if imported.training.get("masked_loss"):
        imported.set("unmasked_weight", "training", "unmasked_weight", number(section, "unmasked_weight", 0.1))
        for source in imported.sources:
            source["masks"] = "masklabel"
    set_resolution(imported, "resolution", str(section.get("resolution", "512")).replace("x", ","),
                   pair="x" in str(section.get("resolution", "")),
                   several="there each epoch shows a picture at one of them, here at all of them")
    imported.set("batch_size", "training", "train_batch_size", whole(section, "batch_size", 1))
    imported.set("gradient_accumulation_steps", "training", "gradient_accumulation_steps",
                 whole(section, "gradient_accumulation_steps", 1))
    encoder = Section(_object(section.values.get("text_encoder"), "text_encoder"), "text_encoder")
    imported.set(encoder.key("dropout_probability"), "training", "caption_dropout_rate",
                 number(encoder, "dropout_probability", 0.0))
    if norm := number(section, "clip_grad_norm", 1.0):
        imported.set("clip_grad_norm", "training", "max_grad_norm", norm)
    if str(section.get("ema", "OFF")) != "OFF":
        imported.set("ema_decay", "training", "ema_decay", number(section, "ema_decay", 0.999))
    section.asked.add("ema_decay")
    dtype = str(section.get("train_dtype", "FLOAT_16"))
    imported.set("train_dtype", "training", "mixed_precision", PRECISIONS.get(dtype, "auto"))
    _optimizer(section, imported)
    per_step = imported.training["train_batch_size"] * imported.training["gradient_accumulation_steps"]
    steps_of(imported, "epochs", whole(section, "epochs", 100), pictures_in(imported.sources, folder), per_step)
    set_schedule(imported, "learning_rate_scheduler", str(section.get("learning_rate_scheduler", "CONSTANT")))
    warmup = number(section, "learning_rate_warmup_steps", 200.0) or 0.0
    if warmup > 1:  # counts batches there
        warmup /= imported.training["gradient_accumulation_steps"]
    set_warmup(imported, "learning_rate_warmup_steps", warmup)
    _timesteps(section, imported)


def _network(section: Section, imported: Imported) -> None:
    kind = str(section.get("peft_type", "LORA"))
    adapter = {"LORA": "dora" if section.get("lora_decompose") else "lora", "LOHA": "loha", "LOKR": "lokr",
               "OFT_2": "oft"}.get(kind)
    if adapter is None:
        raise BadInput(f"peft_type is {kind!r}, expected LORA, LOHA, LOKR or OFT_2")
    if adapter != "lora":
        imported.set("peft_type", "training", "adapter", adapter)
    part = next((name for name in ("unet", "transformer", "prior") if isinstance(section.get(name), dict)), None)
    inner = Section(section.get(part) if part else {}, part or "unet")
    rate = number(inner, "learning_rate") or number(section, "learning_rate", 3e-6) or 0.0
    rate *= _rate_factor(section, imported)
    rank_key = {"oft": "oft_block_size", "lokr": "lokr_dim"}.get(adapter, "lora_rank")
    rank = whole(section, rank_key, 32 if adapter == "oft" else 16)
    if section.get("lora_model_name"):
        imported.set("lora_model_name", "training", "init_adapter", str(section.get("lora_model_name")),
                     "kind, rank and alpha are the file's")
        imported.training.pop("adapter", None)
        imported.set("learning_rate", "training", "learning_rate", rate)
        return
    why = "" if section.states("lora_alpha") else "OneTrainer's default"
    alpha = number(section, "lora_alpha", 1.0) or 1.0
    set_scale(imported, (rank_key, "lora_alpha", "learning_rate"), rank, alpha, rate, why)
    if adapter == "oft":
        imported.training.pop("lora_alpha")
    if adapter in ("lora", "dora"):
        _text_encoder(section, rate, imported)
    if (dropout := number(section, "dropout_probability")) and adapter in ("lora", "dora"):
        imported.set("dropout_probability", "training", "lora_dropout", dropout)


def _text_encoder(section: Section, rate: float, imported: Imported) -> None:
    """OneTrainer trains it as well unless the file says no, by default for 30 epochs."""
    encoder = Section(_object(section.get("text_encoder"), "text_encoder"), "text_encoder")
    if not encoder.get("train", True):
        return
    imported.set("text_encoder.train", "training", "train_text_encoder", True, "to the end of the training")
    own = number(encoder, "learning_rate")
    if own and own != rate:
        imported.set("text_encoder.learning_rate", "training", "text_encoder_lr", own)


def _rate_factor(section: Section, imported: Imported) -> float:
    """What OneTrainer multiplies the rate by before it trains."""
    scaler = str(section.get("learning_rate_scaler", "NONE"))
    batch, accumulation = whole(section, "batch_size", 1), whole(section, "gradient_accumulation_steps", 1)
    over = {"BATCH": batch, "ACCUMULATION": accumulation, "BOTH": batch * accumulation}.get(scaler.partition("_")[2], 1)
    factor = over**0.5 if scaler.startswith("SQRT") else float(over)
    if factor != 1.0:
        imported.note("learning_rate_scaler", f"{scaler} multiplies the rate by {factor:g}, which is done here")
    return factor


def _perturbation(imported: Imported, section: Section, key: str) -> None:
    imported.ignore(key, "noise added to the noise itself; ip_noise_gamma is another thing")


def _targets(imported: Imported, section: Section, key: str) -> None:
    preset = str(section.get(key))
    if preset in TARGETS:
        imported.set(key, "training", "targets", TARGETS[preset])
    elif words := [word.strip() for word in str(section.get("layer_filter", "")).split(",") if word.strip()]:
        imported.note(key, f"layers are chosen by {', '.join(words)}: say them as targets")


def _optimizer(section: Section, imported: Imported) -> None:
    inner = Section(_object(section.get("optimizer"), "optimizer"), "optimizer")
    found = set_optimizer(imported, "optimizer.optimizer", inner.get("optimizer", "ADAMW"))
    if (decay := number(inner, "weight_decay")) is not None:
        imported.set("optimizer.weight_decay", "training", "weight_decay", decay)
    for key, name in (("beta1", "adam_beta1"), ("beta2", "adam_beta2")):
        value = number(inner, key)
        if value is not None and found in ("adamw", "adamw8bit", "prodigy", "adamwschedulefree"):
            imported.set(f"optimizer.{key}", "training", name, value)
    others = [key for key, value in inner.values.items() if value not in (None, False) and key not in inner.asked]
    if others:
        imported.ignore("optimizer." + ", ".join(others), "Safelight's optimizers have fewer settings")


def _timesteps(section: Section, imported: Imported) -> None:
    distribution = str(section.get("timestep_distribution", "UNIFORM"))
    weight, bias = number(section, "noising_weight", 0.0) or 0.0, number(section, "noising_bias", 0.0) or 0.0
    if distribution in DISTRIBUTIONS:
        imported.set("timestep_distribution", "training", "timestep_sampling", DISTRIBUTIONS[distribution])
    else:
        imported.ignore("timestep_distribution", f"Safelight has no {distribution}; times are uniform")
    if distribution == "LOGIT_NORMAL":
        imported.set("noising_bias", "training", "logit_mean", bias)
        imported.set("noising_weight", "training", "logit_std", weight + 1.0, "1 is added to it there")
    elif distribution == "HEAVY_TAIL":
        imported.set("noising_weight", "training", "mode_scale", weight)
    shift = number(section, "timestep_shift", 1.0)
    if section.get("dynamic_timestep_shifting"):
        imported.set("dynamic_timestep_shifting", "training", "use_dynamic_shifting", True)
    elif shift and shift != 1.0:
        imported.set("timestep_shift", "training", "discrete_flow_shift", shift)
    function, strength = str(section.get("loss_weight_fn", "CONSTANT")), number(section, "loss_weight_strength", 5.0)
    if function in WEIGHTS:
        imported.set("loss_weight_fn", "training", "loss_weighting", WEIGHTS[function])
        if function == "MIN_SNR_GAMMA":
            imported.set("loss_weight_strength", "training", "snr_gamma", strength)
        elif function == "P2":
            imported.set("loss_weight_strength", "training", "p2_gamma", strength)


def _object(value: Any, key: str) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise BadInput(f"{key} is no object, expected one with its settings")
    return value or {}
