"""Settings of the embedded base's pre-training, and the journal that its stages write."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field, ValidationError

from components.errors import BadInput


class PretrainConfig(BaseModel, frozen=True, extra="forbid"):
    """Sizes and schedules of the embedded base."""

    seed: int = Field(default=0, description="Seed of weights, order, noise and augmentation.")
    held_out: float = Field(
        default=0.04, ge=0, lt=1, description="Share of emoji kept from the autoencoder's training."
    )
    held_out_styles: float = Field(
        default=0.03, ge=0, lt=1, description="Share of pictures kept from the denoiser's training."
    )
    vae_steps: int = Field(default=1040, ge=1, description="Optimizer steps of the autoencoder.")
    vae_batch_size: int = Field(default=16, ge=1)
    vae_learning_rate: float = Field(default=4e-3, gt=0, description="Peak rate; Muon for kernels, AdamW for the rest.")
    vocab_size: int = Field(default=2048, ge=512, description="Byte-level BPE, without the end-of-word bytes.")
    max_prompt_tokens: int = Field(default=24, ge=8)
    text_size: int = Field(default=192, description="Width of the text encoder.")
    text_layers: int = Field(default=3, ge=1)
    unet_channels: tuple[int, ...] = Field(default=(96, 192), description="Widths of the U-Net at 8x8 and 4x4.")
    unet_layers_per_block: int = Field(default=1, ge=1)
    unet_steps: int = Field(default=3500, ge=1, description="Optimizer steps of text encoder and U-Net.")
    unet_batch_size: int = Field(default=64, ge=1)
    unet_learning_rate: float = Field(default=3e-3, gt=0, description="Peak rate.")
    objective: Literal["ddpm", "v", "edm", "flow"] = Field(
        default="flow", description="What is predicted on which path; the pipeline's scheduler says so too."
    )
    time_mean: float = Field(
        default=0.6, description="Mean logit of flow's training times; positive: effort where shapes form."
    )
    caption_dropout: float = Field(default=0.1, ge=0, lt=1, description="Share of captions left empty, for guidance.")
    ema_decay: float = Field(default=0.997, gt=0, lt=1, description="Of the weights that are shipped.")
    flip_share: float = Field(
        default=0.0, ge=0, le=1, description="Share of mirrored pictures, where mirroring keeps meaning."
    )
    tinted_share: float = Field(
        default=0.3, ge=0, le=1, description="Share of pictures shown in one colour, with the colour before the name."
    )
    warmup_steps: int = Field(default=30, ge=0)
    checkpointing_steps: int = Field(default=50, ge=1)


def read_config(path: Path | None, **changes: str) -> PretrainConfig:
    """The settings, with what a JSON file and then `changes` say. Raises: BadInput when either says something else."""
    origin = str(path) if path else "settings"
    try:
        body = json.loads(path.read_bytes()) if path else {}
        return PretrainConfig.model_validate({**body, **changes})
    except ValidationError as error:
        first = error.errors()[0]
        what = ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))
    except OSError as error:
        what = error.strerror or str(error)
    except (ValueError, TypeError) as error:
        what = str(error)
    raise BadInput(f"{origin}: {what}; expected a JSON object with fields of PretrainConfig")


@dataclass(frozen=True, slots=True)
class Journal:
    """One JSON line per event, in `path` and on stdout; a resumed run goes on in the same file."""

    path: Path

    def __call__(self, **event: float) -> None:
        line = json.dumps({"cpu_s": round(time.process_time(), 1), **event})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)
