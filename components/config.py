"""The recipe: every setting of a retraining and every default, once. TOML files, flags and variables only fill it."""

import difflib
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from components.errors import RecipeError


class Config(BaseModel):
    """Frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DataSource(Config):
    path: str = Field(
        description="A folder of pictures with captions, a .tar or .parquet, or with revision a data set of the hub;"
        " relative paths count from the recipe's folder."
    )
    layout: Literal["auto", "folder", "kohya", "mixed", "webdataset", "dataset"] = Field(
        default="auto", description="How it is laid out; auto: as its files' names say."
    )
    revision: str | None = Field(
        default=None, pattern=r"^[0-9a-f]{40}$", description="Commit of a data set of the hub, 40 hex digits."
    )
    streaming: bool = Field(
        default=False,
        description="Whether that data set is read over the network, of which pictures alone are kept; false: it is"
        " downloaded into the hub's cache.",
    )
    repeats: int = Field(default=1, ge=1, description="How often each picture comes in an epoch.")
    is_reg: bool = Field(
        default=False, description="Pictures of the class, to train on beside the data with prior_loss_weight."
    )
    licence: str | None = Field(default=None, description="SPDX id for pictures that state none themselves.")
    caption_from: Literal["files", "file_name"] = Field(
        default="files", description="Captions are in files and tables, or the pictures' names are captions."
    )
    caption_extension: Literal["any", ".txt", ".caption", ".json"] = Field(
        default="any", description="Ending of the caption files beside pictures that count."
    )
    caption_lines: Literal["first", "whole", "variants"] = Field(
        default="first", description="What of a caption file is the caption; variants: every line is one of them."
    )
    caption_column: str | None = Field(default=None, description="A table's column of captions; none: the usual ones.")
    image_column: str | None = Field(default=None, description="Its column of pictures; none: the usual ones.")
    class_tokens: str | None = Field(default=None, description="Caption of pictures that have none.")
    trigger: str | None = Field(
        default=None, description="Word in place of [trigger] in captions, or before those without it."
    )
    caption_prefix: str | None = Field(default=None, description="Words before every caption.")
    caption_suffix: str | None = Field(default=None, description="Words after every caption.")
    masks: str | None = Field(
        default=None,
        description='Where its masks are: "masklabel" (x-masklabel.png beside x.png), "alpha", or a folder of masks.',
    )

    @model_validator(mode="after")
    def _streamed_from_the_hub(self) -> "DataSource":
        if self.streaming and self.revision is None:
            raise ValueError("streaming is for a data set of the hub; name its commit as revision, or leave it out")
        return self


class DataConfig(Config):
    sources: tuple[DataSource, ...] = Field(min_length=1, description="Read in this order.")
    copy_pictures: bool = Field(
        default=True,
        description="Whether pictures are copied into the workspace, so that a snapshot can be read whatever becomes of"
        " the files; false: files are read where they are.",
    )


class CheckConfig(Config):
    threshold: float = Field(description="Score from which on a picture stands out.")
    decision: Literal["flag", "reject"] = Field(default="flag", description="What becomes of such a picture.")
    model: str | None = Field(
        default=None,
        description='Model of a check that needs one: "clip:SOURCE", a folder or owner/name@<40 hex digits>.',
    )
    head: str | None = Field(default=None, description="File of linear layers on its features, for aesthetic scores.")


class CurationConfig(Config):
    profile: Literal["auto", "photo", "illustration", "pixel_art", "icon"] = Field(
        default="auto", description="What the pictures are, which decides the thresholds; auto: as measured."
    )
    checks: dict[str, float | CheckConfig] = Field(
        default={},
        description="Checks by plug-ins that are made, and thresholds that replace those of the profile, such as"
        " nsfw = 0.5 or dark = 0.2.",
    )
    min_side: int | Literal["auto"] = Field(
        default="auto", description="Smallest side in pixels; auto: min(200, training size)."
    )
    max_aspect: float = Field(default=3.0, gt=1, description="Longest side over shortest side.")
    near_duplicates: bool = Field(default=True, description="Keep one of each group of near duplicates.")
    near_duplicate_embedder: str | None = Field(
        default=None,
        description='Features that find near duplicates as well: "imagenet", "dinov2:SOURCE" or "clip:SOURCE".',
    )
    cosine_threshold: float | Literal["auto"] = Field(
        default="auto",
        description="Cosine of near duplicates' features; auto: 0.95, in drawn sets what sets a picture's nearest"
        " neighbour apart there.",
    )
    phash_distance: int = Field(default=6, ge=0, le=64, description="pHash bits in which near duplicates may differ.")
    dhash_distance: int = Field(default=8, ge=0, le=64, description="dHash bits in which near duplicates may differ.")
    colour_distance: float = Field(
        default=12.0, ge=0, description="Mean RGB distance (0-441) up to which colours are close."
    )
    min_caption_words: int = Field(default=1, ge=0, description="Captions with fewer words are flagged.")
    strict: bool = Field(default=False, description="Stop at the first rejected file instead of recording a verdict.")
    test_fraction: float = Field(
        default=0.1, ge=0, lt=1, description="Share of components held out where the data names no split."
    )
    split_salt: str = Field(default="safelight", description="Seeds the hash that assigns components to splits.")
    licences: tuple[str, ...] | None = Field(
        default=None,
        min_length=1,
        description='SPDX ids, such as ["CC0-1.0", "CC-BY-4.0"]: pictures under another licence or none are rejected.',
    )

    def judged(self) -> dict[str, CheckConfig]:
        """`checks`, a plain number as the threshold of a flag."""
        return {name: CheckConfig(threshold=said) if isinstance(said, float | int) else said
                for name, said in self.checks.items()}

    def settings(self) -> dict[str, Any]:
        """What a snapshot depends on; a setting that came later only where it is used, so that older keys stay."""
        later = {"licences", "profile", "checks", "near_duplicate_embedder", "cosine_threshold"}
        unused = {name for name in later if getattr(self, name) == type(self).model_fields[name].default}
        return self.model_dump(mode="json", exclude=unused)


CAPTIONER = re.compile(r"[a-z0-9][a-z0-9_-]*=\S.*")  # NAME=SOURCE
HUB_MODEL = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*@[0-9a-f]{40}")


class CaptionsConfig(Config):
    """How `safelight caption` works, and what becomes of a model's captions where no person wrote one."""

    policy: Literal["none", "prose", "tags", "both"] = Field(
        default="none",
        description="What of a model's captions fills in where files and people say nothing; none: nothing does.",
    )
    captioners: tuple[str, ...] = Field(
        default=(),
        description="NAME=FOLDER or NAME=OWNER/MODEL@COMMIT: whose captions count, the first most; none: the newest.",
    )
    template: str | None = Field(
        default=None,
        description="What a filled-in caption looks like: {prose}, {tags}, {trigger}, {class}, {name} and {folder}.",
    )
    prefix: str = Field(default="", description="Words that a filled-in caption begins with.")
    strip_openings: bool = Field(default=True, description='Cut openings such as "an image of" off prose.')
    exclude: tuple[str, ...] = Field(default=(), description="Words cut out of prose, and tags that are left out.")
    variants: bool = Field(
        default=False, description="Further captioners' captions become variants of the first one's."
    )
    max_tags: int = Field(default=30, ge=1, description="Tags of a caption at most, the likeliest.")
    tag_thresholds: dict[str, float] = Field(
        default={"general": 0.35, "character": 0.85},
        description="Least score of tags by category; those of other categories are left out.",
    )
    prompts: dict[str, str] = Field(
        default={},
        description="What a captioner is asked, by its name, with {trigger}, {class}, {caption}, {name} and {folder}.",
    )
    max_new_tokens: int = Field(default=128, ge=1, description="Length that a captioner's text is cut at.")
    num_beams: int = Field(default=1, ge=1, description="Beams of its search; 1: greedy.")
    batch_size: int = Field(default=8, ge=1, description="Pictures in one pass of a captioner.")

    @field_validator("captioners")
    @classmethod
    def _name_and_source(cls, captioners: tuple[str, ...]) -> tuple[str, ...]:
        for captioner in captioners:
            if not CAPTIONER.fullmatch(captioner):
                raise ValueError(f"{captioner!r}, expected NAME=FOLDER or NAME=OWNER/MODEL@COMMIT, such as blip=models")
        return captioners

    @field_validator("template")
    @classmethod
    def _known_places(cls, template: str | None) -> str | None:
        return _require_places(template, ("prose", "tags", "trigger", "class", "name", "folder"))

    @field_validator("prompts")
    @classmethod
    def _known_places_of_prompts(cls, prompts: dict[str, str]) -> dict[str, str]:
        for prompt in prompts.values():
            _require_places(prompt, ("trigger", "class", "caption", "name", "folder"))
        return prompts


def _require_places(template: str | None, places: Sequence[str]) -> str | None:
    unknown = [place for place in re.findall(r"\{([^{}]*)\}", template or "") if place not in places]
    if unknown:
        raise ValueError(f"{{{unknown[0]}}} is unknown, expected {', '.join(f'{{{place}}}' for place in places)}")
    return template


class BaseModelConfig(Config):
    model: str = Field(default="embedded", description='"embedded", a folder in diffusers layout, or a hub id.')
    revision: str | None = Field(
        default=None, pattern=r"^[0-9a-f]{40}$", description="Commit of a hub model, 40 hex digits."
    )
    vae_precision: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="Precision of encoding pictures; bf16 is faster on a GPU, and fp32 where the latents would differ.",
    )


ADAM_LIKE = ("adamw", "adamw8bit", "prodigy", "adamwschedulefree")  # optimizers that take Adam's betas
UNAVERAGED = ("adamw", "adamw8bit", "adafactor", "prodigy", "lion", "muon")  # their parameters are the weights to use
PRODIGY_MIN_RATE = 0.1  # below this factor it learns next to nothing; its authors recommend 1
Preset = Literal["attention", "attention-mlp", "all-linear", "all"]
CropPolicy = Literal["centre", "smart", "pad"]
SIZE_SETTINGS = ("bucket_no_upscale", "crop")  # what a cache's key says of them where they make a difference
FACTORED = ("lora", "rslora", "dora")  # adapters whose update is s B A with B = 0 at the start
WITH_RANKS = (*FACTORED, "pissa", "loha", "lokr")
TAG_SETTINGS = ("caption_wordings", "caption_separator", "keep_tokens", "caption_tag_dropout_rate")
TEXT_SETTINGS = ("train_text_encoder", "text_encoder_lr", "placeholder_token", "initializer_token", "num_vectors",
                 "token_learning_rate")  # fmt: skip
BY_GROUP = ("adamw", "adamw8bit", "adamwschedulefree", "adafactor", "lion")  # a learning rate for each of its groups
FROM_THE_FILE = ("adapter", "rank", "lora_alpha", "rank_pattern", "alpha_pattern", "targets")  # of init_adapter


class TrainingConfig(Config):
    adapter: Literal["lora", "rslora", "dora", "pissa", "loha", "lokr", "oft"] = Field(
        default="lora", description="Kind of adapter."
    )
    init_adapter: str | None = Field(
        default=None,
        description="An adapter file to go on from, in diffusers', kohya's or ComfyUI's layout; kind, rank, alpha and"
        " layers are the file's.",
    )
    rank: int = Field(
        default=16, ge=1, description="LoRA rank r, the update is scaled by lora_alpha / r; of oft: the block size."
    )
    lora_alpha: float = Field(default=16.0, gt=0, description="Numerator of the scale.")
    lora_dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    rank_pattern: dict[str, PositiveInt] = Field(
        default={}, description="Ranks of some layers, by the end of their name or a regular expression for it."
    )
    alpha_pattern: dict[str, PositiveFloat] = Field(default={}, description="Their lora_alpha, in the same way.")
    targets: Preset | tuple[str, ...] = Field(
        default="attention-mlp",
        description="Layers that take an adapter, a preset (all: convolutions too) or a list of their names' ends.",
    )
    train_text_encoder: bool = Field(
        default=False,
        description="A LoRA on the CLIP text encoders too, of the same kind and rank; prompts are then encoded live.",
    )
    text_encoder_lr: float | None = Field(
        default=None, gt=0, description="Their peak learning rate; none: learning_rate."
    )
    placeholder_token: str | None = Field(
        default=None,
        min_length=1,
        description="A token of its own in the captions, such as '<icon>', whose embedding is learnt with the adapter.",
    )
    initializer_token: str | None = Field(
        default=None, min_length=1, description="The word whose embedding it starts from; none: noise."
    )
    num_vectors: int = Field(default=1, ge=1, description="Embedding vectors that it stands for.")
    token_learning_rate: float | None = Field(
        default=None, gt=0, description="Their peak learning rate; none: learning_rate."
    )
    learning_rate: float = Field(default=1e-4, gt=0, description="Peak learning rate.")
    loraplus_lr_ratio: float = Field(
        default=1.0, gt=0, description="LoRA+: factor on the learning rate of B, the factor that starts at zero."
    )
    scale_weight_norms: float | None = Field(
        default=None, gt=0, description="Largest norm of a layer's update, kept after every step; none: no limit."
    )
    ema_decay: float = Field(
        default=0.0, ge=0, lt=1, description="Publish an average of the adapter over the steps; 0.999 is usual, 0: off."
    )
    optimizer: Literal["adamw", "adamw8bit", "adafactor", "prodigy", "adamwschedulefree", "lion", "muon"] = Field(
        default="adamw", description="Optimizer; adamw8bit: on a GPU only; prodigy: with learning_rate 1.0."
    )
    weight_decay: float = Field(default=0.01, ge=0, description="Decoupled weight decay, times the learning rate.")
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="beta1 of the optimizers that build on Adam.")
    adam_beta2: float = Field(default=0.999, ge=0, lt=1, description="Their beta2.")
    lr_scheduler: Literal["constant", "cosine", "linear"] = Field(
        default="constant", description="Shape after the warm-up."
    )
    lr_warmup_steps: int = Field(default=0, ge=0, description="Steps of linear warm-up.")
    max_train_steps: int = Field(default=600, ge=0, description="Optimizer steps; 0: look at init_adapter as it is.")
    train_batch_size: int = Field(default=16, ge=1, description="Samples in one forward pass.")
    gradient_accumulation_steps: int = Field(default=1, ge=1, description="Forward passes for one optimizer step.")
    max_grad_norm: float = Field(default=1.0, gt=0, description="Gradients are scaled down to this norm.")
    resolution: PositiveInt | tuple[PositiveInt, ...] | Literal["auto"] = Field(
        default="auto",
        description="Training size in pixels; auto: the base model's own; a list: every picture at each of them.",
    )
    bucket_no_upscale: bool = Field(
        default=True, description="A picture too small for its bucket takes a smaller one instead of being enlarged."
    )
    crop: CropPolicy = Field(
        default="centre",
        description="What of a picture its bucket keeps: the centre, smart: what stands out most, pad: all of it, with"
        " padding that does not count in the loss.",
    )
    seed: int = Field(default=42, ge=0, description="Seeds weights, order, noise and times.")
    prediction_type: Literal["auto", "epsilon", "v_prediction", "sample", "flow_prediction", "edm"] = Field(
        default="auto", description="What the model predicts; auto: as the base's scheduler says."
    )
    timestep_sampling: Literal["uniform", "logit_normal", "mode", "cosmap"] = Field(
        default="uniform", description="Density of training times."
    )
    logit_mean: float = Field(
        default=0.0, description="Mean logit of logit_normal times; above 0: towards noise, where forms are."
    )
    logit_std: float = Field(default=1.0, gt=0, description="Their spread.")
    mode_scale: float = Field(
        default=1.29, ge=-1, le=1.7519, description="Of mode times; above 0: towards the middle, below: the ends."
    )
    stratified_timesteps: bool = Field(
        default=False, description="One time in each of train_batch_size equal strata, for a steadier loss."
    )
    discrete_flow_shift: float = Field(
        default=1.0, gt=0, description="Factor on the odds t / (1 - t) of flow times; above 1: towards noise."
    )
    use_dynamic_shifting: bool = Field(
        default=False, description="Shift flow times by the resolution, as the base's scheduler says (FLUX.1's mu)."
    )
    loss_weighting: Literal["none", "min_snr", "p2", "debiased", "sigma_sqrt", "cosmap", "edm"] = Field(
        default="none", description="Weight of the loss by the signal-to-noise ratio."
    )
    snr_gamma: float | None = Field(
        default=None, gt=0, description="Min-SNR-gamma loss weighting (epsilon and v); none: off."
    )
    p2_k: float = Field(default=1.0, gt=0, description="k of P2 weighting.")
    p2_gamma: float = Field(default=1.0, ge=0, description="Its gamma; 0: no weighting.")
    noise_offset: float = Field(
        default=0.0, ge=0, le=1, description="Strength of noise that is the same all over a channel; 0.05 is usual."
    )
    multires_noise_iterations: int = Field(
        default=0, ge=0, le=10, description="Levels of multi-resolution (pyramid) noise; 0: white noise."
    )
    multires_noise_discount: float = Field(default=0.3, gt=0, le=1, description="Strength over the level before.")
    ip_noise_gamma: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Input perturbation: extra noise for the model alone; 0.1 is usual.",
    )
    caption_dropout_rate: float = Field(
        default=0.1, ge=0, lt=1, description="Share of steps that see the empty prompt."
    )
    shuffle_caption: bool = Field(default=False, description="Show a caption's tags in changing order.")
    caption_wordings: int = Field(
        default=8, ge=1, description="Orders of each caption that are embedded and drawn from."
    )
    caption_separator: str = Field(default=",", min_length=1, description="What stands between tags.")
    keep_tokens: int = Field(default=0, ge=0, description="Tags at a caption's beginning that stay where they are.")
    caption_tag_dropout_rate: float = Field(
        default=0.0, ge=0, lt=1, description="Share of the other tags that an order leaves out."
    )
    masked_loss: bool = Field(default=False, description="Weight the loss by the samples' masks.")
    unmasked_weight: float = Field(
        default=0.0, ge=0, lt=1, description="Weight of what a mask leaves out; 0: it does not count."
    )
    class_prompt: str | None = Field(
        default=None,
        min_length=1,
        description="Prior preservation: what the base draws, to train on beside the data.",
    )
    num_class_images: int = Field(default=100, ge=1, description="Pictures of the class, drawn once and kept.")
    prior_loss_weight: float = Field(default=1.0, gt=0, description="Factor on their loss.")
    checkpointing_steps: int = Field(default=100, ge=1, description="Steps between checkpoints.")
    validation_times: int = Field(default=8, ge=1, description="Stratified times of the fixed-noise validation loss.")
    validation_items: int = Field(
        default=96, ge=1, description="Held-out samples that the validation loss uses at most."
    )
    preview_prompts: int = Field(default=8, ge=0, description="Fixed prompts drawn at every checkpoint.")
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = Field(
        default="auto",
        description="auto: bf16 on CUDA, none on the CPU; fp16: with a loss scale, for older GPUs.",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Compute activations again in the backward pass: less memory, a third more time."
    )
    base_precision: Literal["auto", "fp8", "int8", "nf4"] = Field(
        default="auto",
        description="Of the frozen base's linear layers; auto: as mixed_precision says; nf4: 4 bits a weight.",
    )
    compile: bool = Field(
        default=False, description="Compile the denoiser's blocks: minutes at the start, then faster steps."
    )
    cuda_graphs: bool = Field(
        default=False, description="Replay passes as CUDA graphs, one per bucket: for small models in small batches."
    )
    num_processes: int = Field(
        default=1,
        ge=1,
        description="Processes on this host, each with its own batches, and its own GPU if there are.",
    )

    @field_validator("targets", mode="before")
    @classmethod
    def _known_targets(cls, targets: Any) -> Any:
        if isinstance(targets, str) and targets not in get_args(Preset):
            near = difflib.get_close_matches(targets, get_args(Preset), n=1, cutoff=0.4)
            guess = f"did you mean {near[0]!r}" if near else f"expected one of {', '.join(get_args(Preset))}"
            raise ValueError(f"no such preset, {guess}; or give a list such as ['to_q', 'to_v']")
        if isinstance(targets, list | tuple) and not targets:
            raise ValueError("an empty list, expected at least one end of a layer's name, such as 'to_q'")
        return targets

    @field_validator("resolution")
    @classmethod
    def _largest_first(cls, resolution: Any) -> Any:
        """A list in one order, since its order means nothing; of one it is that one."""
        if not isinstance(resolution, tuple):
            return resolution
        sizes = sorted(resolution, reverse=True)
        if len(set(sizes)) < max(1, len(sizes)):
            raise ValueError(f"{list(resolution)}, expected at least one size and each once")
        return tuple(sizes) if len(sizes) > 1 else sizes[0]

    @field_validator("placeholder_token")
    @classmethod
    def _a_word_of_its_own(cls, token: str | None) -> str | None:
        """CLIP's tokenizer reads lower case, and a file's keys end the name at a full stop."""
        if token is not None and (token != token.lower() or re.search(r"[\s.]", token)):
            raise ValueError("expected one word in lower case, without full stops, such as '<icon>'")
        return token

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _patterns_are_regular_expressions(cls, pattern: dict[str, Any]) -> dict[str, Any]:
        for key in pattern:
            try:
                re.compile(key)
            except re.error as error:
                raise ValueError(f"{key!r} is no regular expression: {error}") from None
        return pattern

    @model_validator(mode="after")
    def _init_adapter_decides(self) -> Self:
        """What a file brings is not written down as well, and without one there is something to train."""
        if self.init_adapter is None and self.max_train_steps == 0:
            raise ValueError("max_train_steps is 0, but there is no init_adapter to look at, expected at least 1")
        for key in FROM_THE_FILE if self.init_adapter is not None else ():
            value = getattr(self, key)
            if value != type(self).model_fields[key].default:
                raise ValueError(f"{key} is {value!r}, but init_adapter brings its own; leave {key} out")
        return self

    @model_validator(mode="after")
    def _steps_fit(self) -> Self:
        if self.lr_warmup_steps > self.max_train_steps:
            raise ValueError(
                f"lr_warmup_steps {self.lr_warmup_steps} is more than max_train_steps {self.max_train_steps}"
            )
        return self

    @model_validator(mode="after")
    def _optimizer_settings_agree(self) -> Self:
        """Betas that nobody reads, a rate that Prodigy would multiply its own by, a schedule for the schedule-free."""
        needs = {
            "loraplus_lr_ratio": BY_GROUP,
            "ema_decay": UNAVERAGED,
            "scale_weight_norms": UNAVERAGED,
            "placeholder_token": UNAVERAGED,
            "text_encoder_lr": BY_GROUP,
            "token_learning_rate": BY_GROUP,
        }
        for key, fitting in needs.items():
            value = getattr(self, key)
            if self.optimizer not in fitting and value != type(self).model_fields[key].default:
                raise ValueError(
                    f"{key} is {value}, but optimizer is {self.optimizer!r}, expected " + " or ".join(fitting)
                )
        for key in ("adam_beta1", "adam_beta2"):
            value = getattr(self, key)
            if self.optimizer not in ADAM_LIKE and value != type(self).model_fields[key].default:
                raise ValueError(
                    f"{key} is {value}, but optimizer {self.optimizer!r} has its own; leave it out or choose "
                    + ", ".join(ADAM_LIKE)
                )
        if self.optimizer == "prodigy" and self.learning_rate < PRODIGY_MIN_RATE:
            raise ValueError(
                f"learning_rate is {self.learning_rate}, but prodigy finds the rate itself and takes this as a factor,"
                " expected 1.0"
            )
        if self.optimizer == "adamwschedulefree" and self.lr_scheduler != "constant":
            raise ValueError(
                f"lr_scheduler is {self.lr_scheduler!r}, but optimizer 'adamwschedulefree' averages where others decay,"
                " expected 'constant' (a warm-up is fine)"
            )
        return self

    @model_validator(mode="after")
    def _diffusion_settings_agree(self) -> Self:
        """What a key needs from another, so that no setting is written down and then does nothing."""
        needs = {
            "lora_alpha": ("adapter", WITH_RANKS),
            "lora_dropout": ("adapter", (*FACTORED, "pissa")),
            "rank_pattern": ("adapter", WITH_RANKS),
            "alpha_pattern": ("adapter", WITH_RANKS),
            "loraplus_lr_ratio": ("adapter", FACTORED),
            "train_text_encoder": ("adapter", FACTORED),
            "text_encoder_lr": ("train_text_encoder", (True,)),
            "scale_weight_norms": ("adapter", FACTORED[:2]),
            **dict.fromkeys(TAG_SETTINGS, ("shuffle_caption", (True,))),
            "unmasked_weight": ("masked_loss", (True,)),
            "mode_scale": ("timestep_sampling", ("mode",)),
            "snr_gamma": ("loss_weighting", ("none", "min_snr")),
            "p2_k": ("loss_weighting", ("p2",)),
            "p2_gamma": ("loss_weighting", ("p2",)),
            "multires_noise_iterations": ("noise_offset", (0.0,)),
            "multires_noise_discount": ("multires_noise_iterations", tuple(range(1, 11))),
            "use_dynamic_shifting": ("discrete_flow_shift", (1.0,)),
        }
        for key, (other, fitting) in needs.items():
            value, found = getattr(self, key), getattr(self, other)
            if value != type(self).model_fields[key].default and found not in fitting:
                expected = "at least 1" if 10 in fitting else " or ".join(map(repr, fitting))
                raise ValueError(f"{key} is {value!r}, but {other} is {found!r}, expected {expected}")
        if self.class_prompt is None and self.num_class_images != type(self).model_fields["num_class_images"].default:
            raise ValueError(
                f"num_class_images is {self.num_class_images}, but class_prompt is not set, expected a prompt"
            )
        for key in ("initializer_token", "num_vectors", "token_learning_rate"):
            if self.placeholder_token is None and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f"{key} is {getattr(self, key)!r}, but placeholder_token is not set, expected one such as '<icon>'"
                )
        if self.loss_weighting == "min_snr" and self.snr_gamma is None:
            raise ValueError("loss_weighting is 'min_snr', but snr_gamma is not set, expected a number such as 5.0")
        if self.cuda_graphs and (self.train_text_encoder or self.placeholder_token is not None):
            raise ValueError(
                "cuda_graphs is True, but the text side is trained as well, expected one of them: a graph's prompts"
                " have no gradient; use compile instead"
            )
        if self.cuda_graphs and self.gradient_checkpointing:
            raise ValueError(
                "cuda_graphs is True, but gradient_checkpointing is True as well, expected one of them: graphs are for"
                " models that leave the GPU waiting"
            )
        if self.stratified_timesteps and self.train_batch_size == 1:
            raise ValueError("stratified_timesteps is True, but train_batch_size is 1, expected at least 2")
        return self


class EvaluationConfig(Config):
    prompts: int = Field(default=100, ge=1, description="Held-out captions drawn once per seed.")
    seeds_per_prompt: int = Field(default=1, ge=1, description="Seeds for each of them.")
    variety_prompts: int = Field(
        default=20, ge=0, description="Of these, prompts that are drawn with more seeds for variety."
    )
    variety_seeds: int = Field(default=4, ge=2, description="Seeds for each variety prompt.")
    num_inference_steps: int = Field(default=25, ge=1, description="Sampler steps.")
    guidance_scale: float = Field(default=4.0, ge=1, description="Classifier-free guidance; 1: off.")
    scheduler: Literal[
        "auto",
        "ddpm",
        "ddim",
        "euler",
        "euler_ancestral",
        "heun",
        "dpmsolver++",
        "sde-dpmsolver++",
        "unipc",
        "flow_euler",
        "flow_heun",
    ] = Field(default="auto", description="Sampler; auto: the base's own.")
    embedder: str = Field(
        default="auto", description='Feature space of the metrics; auto: "imagenet", which is offline.'
    )
    seed: int = Field(default=0, ge=0, description="First seed of the gallery.")
    batch_size: int = Field(default=20, ge=1, description="Micro-batch of generation, always full: bits depend on it.")
    palette: dict[str, str] = Field(
        default={}, description='Colour words and their "#rrggbb": adds the metric colour_match.'
    )

    @field_validator("palette")
    @classmethod
    def _hex_colours(cls, palette: dict[str, str]) -> dict[str, str]:
        for word, colour in palette.items():
            if not re.fullmatch(r"#[0-9a-fA-F]{6}", colour):
                raise ValueError(f"colour {word!r} is {colour!r}, expected #rrggbb")
        return palette


class PromotionConfig(Config):
    policy: Literal["review", "auto"] = Field(
        default="review", description="auto: the gate's promotion moves the champion alias."
    )
    primary: str = Field(default="kid", description="Metric that decides; its better direction is the metric's own.")
    min_gain: float = Field(default=0.0, ge=0, description="The lower bound of the gain must exceed this.")
    prompt_match_margin: float = Field(
        default=0.05, ge=0, description="Loss of prompt match against the base that is allowed."
    )
    variety_ratio: float = Field(default=0.8, gt=0, description="Variety must stay above this share of the base's.")
    max_copy_rate: float = Field(default=0.05, gt=0, lt=1, description="Upper bound of the share of near copies.")
    min_prompts: int = Field(default=30, ge=1, description="Fewer prompts: hold, insufficient.")


class Recipe(Config):
    """The whole configuration of a retraining."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$", description="Registered model and experiment name.")
    data: DataConfig
    curation: CurationConfig = CurationConfig()
    captions: CaptionsConfig = CaptionsConfig()
    base: BaseModelConfig = BaseModelConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    promotion: PromotionConfig = PromotionConfig()

    @model_validator(mode="after")
    def _a_prior_has_pictures(self) -> Self:
        weight, drawn = self.training.prior_loss_weight, self.training.class_prompt is not None
        usual = TrainingConfig.model_fields["prior_loss_weight"].default
        if not drawn and weight != usual and not any(source.is_reg for source in self.data.sources):
            raise ValueError(
                f"training.prior_loss_weight is {weight}, but class_prompt is not set and no source has is_reg,"
                " expected one of them"
            )
        if all(source.is_reg for source in self.data.sources):
            raise ValueError("every source of data.sources has is_reg, expected at least one with the data itself")
        return self


def load_recipe(path: Path, *, overrides: Sequence[str] = (), data: Path | None = None) -> Recipe:
    """Read a recipe. `overrides` are `section.key=value` in TOML syntax; `data` replaces the recipe's sources.

    Paths in the recipe count from its own folder. Raises RecipeError, one line, naming the key and what would do.
    """
    try:
        body = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe; `safelight init` writes one to start from") from None
    except IsADirectoryError:
        raise RecipeError(f"{path}: is a folder, expected a TOML recipe; pass folders with --data") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not valid TOML: {error}; fix that place") from None
    for override in overrides:
        _apply(body, override)
    if data is not None:
        body.setdefault("data", {})["sources"] = [{"path": str(data.resolve())}]
    recipe = parse_recipe(body, origin=str(path))

    def absolute(name: str) -> str:
        return str((path.parent / Path(name).expanduser()).resolve())

    sources = tuple(
        source.model_copy(
            update={
                "path": source.path if source.revision else absolute(source.path),
                "masks": source.masks if source.masks in (None, "masklabel", "alpha") else absolute(source.masks),
            }
        )
        for source in recipe.data.sources
    )
    training = recipe.training
    if training.init_adapter is not None:
        training = training.model_copy(update={"init_adapter": absolute(training.init_adapter)})
    captioners = tuple(
        one if HUB_MODEL.fullmatch(source) else f"{name}={absolute(source)}"
        for one in recipe.captions.captioners
        for name, _, source in [one.partition("=")]
    )
    captions = recipe.captions.model_copy(update={"captioners": captioners})
    data_there = recipe.data.model_copy(update={"sources": sources})
    return recipe.model_copy(update={"data": data_there, "training": training, "captions": captions})


def looking_at(recipe: Recipe, adapter: Path) -> Recipe:
    """The recipe that evaluates an adapter file as it is, instead of training one."""
    given = recipe.training.model_dump(mode="json", exclude={*FROM_THE_FILE, *TEXT_SETTINGS, "lr_warmup_steps"})
    training = {**given, "init_adapter": str(adapter.resolve()), "max_train_steps": 0}
    return recipe.model_copy(update={"training": TrainingConfig.model_validate(training)})


def parse_recipe(body: dict[str, Any], *, origin: str) -> Recipe:
    """Validate a recipe's document. Raises RecipeError with every fault on one line."""
    try:
        return Recipe.model_validate(body)
    except ValidationError as error:
        found = error.errors()
        places = [fault["loc"] for fault in found]
        faults = "; ".join(_describe(fault) for fault in found if not _is_echo(fault["loc"], places))
        raise RecipeError(f"{origin}: {faults}") from None


def _is_echo(place: Sequence[str | int], places: Sequence[Sequence[str | int]]) -> bool:
    """Whether something inside of this place is at fault, from which a list then seems too short."""
    return any(len(other) > len(place) and other[: len(place)] == place for other in places)


def _describe(fault: Any) -> str:
    where = ".".join(str(part) for part in fault["loc"])
    if not where:  # of the recipe as a whole
        return fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(fault["loc"][-1]), _keys_at(fault["loc"][:-1]), n=1, cutoff=0.5)
        return f"unknown key {where!r}" + (f", did you mean {near[0]!r}?" if near else "; remove it")
    if fault["type"] == "missing":
        return f"{where!r} is missing; add it"
    said = fault["msg"].removeprefix("Value error, ")
    return f"{where!r}: {said}" if isinstance(fault["input"], dict) else f"{where!r} is {fault['input']!r}: {said}"


def _keys_at(location: Sequence[str | int]) -> list[str]:
    model: Any = Recipe
    for part in location:
        if isinstance(part, str):
            annotation = model.model_fields[part].annotation
            model = DataSource if part == "sources" else annotation
    return list(model.model_fields)


def _apply(body: dict[str, Any], override: str) -> None:
    key, found, value = override.partition("=")
    if not found or not key.strip():
        raise RecipeError(f"--set {override!r}: expected section.key=value, for example training.rank=32")
    *sections, leaf = key.strip().split(".")
    for section in sections:
        body = body.setdefault(section, {})
        if not isinstance(body, dict):
            raise RecipeError(f"--set {override!r}: {section!r} is a value, not a section")
    try:
        body[leaf] = tomllib.loads(f"value = {value.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        body[leaf] = value.strip()  # a bare word is a string
