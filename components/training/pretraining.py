"""Pre-training of the embedded base model, stage by stage: `python -m components.training.pretraining --help`.

    vae       autoencoder on all drawings                           -> OUT/vae
    unet      text encoder and denoiser on the concrete concepts    -> OUT/unet
    assemble  a diffusers pipeline from the averaged weights        -> OUT/pipeline
    evaluate  figures and pictures for the model card               -> OUT/evaluation

Every stage resumes from its newest complete checkpoint.
"""

import argparse
import json
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads steal the cores that others need

import torch
from diffusers import AutoencoderKL
from pydantic import BaseModel, Field
from torch import nn

from components.diffusion.draws import Draws
from components.training.autoencoder import (
    PixelBatch,
    fold_latent_statistics,
    new_autoencoder,
    psnr,
    reconstruction_loss,
)
from components.training.checkpoints import newest_checkpoint, optimizer_tensors, restore_optimizer, save_checkpoint
from components.training.loop import StepReport, fit
from components.training.optimizers import Muon
from components.training.order import batches_from
from components.training.pictures import Pictures, hash_fraction, read_pictures, to_unit
from components.training.schedules import learning_rate_at

log = logging.getLogger(__name__)


class PretrainConfig(BaseModel, frozen=True, extra="forbid"):
    """Sizes and schedules of the embedded base."""

    seed: int = Field(0, description="Seed of weights, order, noise and augmentation.")
    held_out: float = Field(0.04, ge=0, lt=1, description="Share of emoji kept from the autoencoder's training.")
    vae_steps: int = Field(1300, ge=1, description="Optimizer steps of the autoencoder.")
    vae_batch_size: int = Field(16, ge=1)
    vae_learning_rate: float = Field(4e-3, gt=0, description="Peak rate; Muon for kernels, AdamW for the rest.")
    warmup_steps: int = Field(30, ge=0)
    checkpointing_steps: int = Field(100, ge=1)


class Journal:
    """Appends one JSON line per event; a resumed run goes on in the same file."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path

    def __call__(self, **event: float) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"cpu_s": round(time.process_time(), 1), **event}) + "\n")


def train_autoencoder(
    pictures: Pictures, out: Path, config: PretrainConfig, should_stop: Callable[[], bool] = lambda: False
) -> AutoencoderKL:
    """Train on all pictures but the held-out ones; when done, write `out/model` with normalised latents."""
    held_out = [hash_fraction(row.group) < config.held_out for row in pictures.rows]
    train, test = pictures.where(not h for h in held_out), pictures.where(held_out)
    test_pixels = to_unit(test.pixels)
    torch.manual_seed(config.seed)
    model = new_autoencoder()
    parameters = dict(model.named_parameters())
    optimizer = _muon(parameters, config.vae_learning_rate, exclude=("conv_in", "conv_out.weight", "quant"))
    journal, start_step = Journal(out / "journal.jsonl"), 0
    if checkpoint := newest_checkpoint(out):
        model.load_state_dict(checkpoint.tensors["model"])
        restore_optimizer(optimizer, checkpoint.tensors["optimizer"])
        start_step = checkpoint.step

    def batches() -> Iterator[PixelBatch]:
        for index in batches_from(start_step, train.sample_ids, config.vae_batch_size, seed=config.seed):
            yield PixelBatch(tuple(train.sample_ids[i] for i in index), to_unit(train.pixels[index]))

    def on_step(report: StepReport) -> None:
        if report.step % 10 == 0:
            journal(step=report.step, loss=report.loss, grad_norm=report.grad_norm, lr=report.learning_rate)

    def on_checkpoint(steps: int) -> None:
        journal(step=steps, psnr=psnr(model, test_pixels))
        save_checkpoint(out, steps, {"model": model.state_dict(), "optimizer": optimizer_tensors(optimizer)}, {})

    lr_at = learning_rate_at(
        "cosine", config.vae_learning_rate, max_train_steps=config.vae_steps, warmup_steps=config.warmup_steps
    )
    steps = fit(
        list(model.parameters()), batches(), lambda batch, draw: reconstruction_loss(model, batch, draw), optimizer,
        lr_at, draws=Draws(config.seed), start_step=start_step, max_train_steps=config.vae_steps, on_step=on_step,
        on_checkpoint=on_checkpoint, checkpointing_steps=config.checkpointing_steps, should_stop=should_stop,
    )  # fmt: skip
    if steps == config.vae_steps:
        fold_latent_statistics(model, to_unit(train.where(row.concrete for row in train.rows).pixels))
        model.save_pretrained(out / "model")
    return model


def _muon(parameters: dict[str, nn.Parameter], learning_rate: float, exclude: tuple[str, ...]) -> Muon:
    """Muon on kernels and matrices, AdamW on vectors and on names that contain one of `exclude`."""
    matrices = {n for n, p in parameters.items() if p.ndim > 1 and not any(part in n for part in exclude)}
    return Muon(
        [p for n, p in parameters.items() if n in matrices],
        [p for n, p in parameters.items() if n not in matrices],
        learning_rate,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="image folder written by components.demo.emoji")
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints and results")
    parser.add_argument("--stage", choices=("vae", "unet", "assemble", "evaluate"), default=None)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(arguments.threads)
    stopped = False

    def stop(*_) -> None:
        nonlocal stopped
        stopped = True

    signal.signal(signal.SIGTERM, stop)
    config = PretrainConfig()
    pictures = read_pictures(arguments.data)
    if arguments.stage in (None, "vae"):
        train_autoencoder(pictures, arguments.out / "vae", config, lambda: stopped)


if __name__ == "__main__":
    main()
