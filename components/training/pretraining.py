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
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads steal the cores that others need

import torch
from diffusers import AutoencoderKL
from pydantic import BaseModel, Field
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import CLIPTokenizer

from components.diffusion.draws import Draw, Draws
from components.diffusion.objectives import RectifiedFlow
from components.diffusion.timesteps import logit_normal, stratified
from components.errors import DamagedArtifact
from components.evaluation.embedders import ImageNetEmbedder
from components.training.assembly import assemble_pipeline, write_concepts
from components.training.autoencoder import (
    PixelBatch,
    fold_latent_statistics,
    new_autoencoder,
    psnr,
    reconstruction_loss,
)
from components.training.base_evaluation import draw_curves, evaluate_base
from components.training.captions import all_captions, train_tokenizer
from components.training.checkpoints import newest_checkpoint, optimizer_tensors, restore_optimizer, save_checkpoint
from components.training.denoiser import (
    CaptionedLatents,
    TextToLatents,
    denoising_loss,
    encode,
    new_text_encoder,
    new_unet,
)
from components.training.ema import ExponentialAverage
from components.training.loop import StepReport, fit
from components.training.optimizers import Muon
from components.training.order import batches_from, epoch_order
from components.training.pictures import Picture, Pictures, hash_fraction, read_pictures, to_unit
from components.training.schedules import learning_rate_at

log = logging.getLogger(__name__)
DIRECTIONAL = frozenset(  # words of drawings that mean something else when mirrored
    ("left", "right", "arrow", "arrows", "button", "check", "question", "note", "book", "page")
)


class PretrainConfig(BaseModel, frozen=True, extra="forbid"):
    """Sizes and schedules of the embedded base."""

    seed: int = Field(0, description="Seed of weights, order, noise and augmentation.")
    held_out: float = Field(0.04, ge=0, lt=1, description="Share of emoji kept from the autoencoder's training.")
    held_out_styles: float = Field(0.03, ge=0, lt=1, description="Share of pictures kept from the denoiser's training.")
    vae_steps: int = Field(1040, ge=1, description="Optimizer steps of the autoencoder.")
    vae_batch_size: int = Field(16, ge=1)
    vae_learning_rate: float = Field(4e-3, gt=0, description="Peak rate; Muon for kernels, AdamW for the rest.")
    vocab_size: int = Field(2048, ge=512, description="Byte-level BPE, without the end-of-word bytes.")
    max_prompt_tokens: int = Field(24, ge=8)
    text_size: int = Field(192, description="Width of the text encoder.")
    text_layers: int = Field(3, ge=1)
    unet_channels: tuple[int, ...] = Field((96, 192), description="Widths of the U-Net at 8x8 and 4x4.")
    unet_layers_per_block: int = Field(1, ge=1)
    unet_steps: int = Field(1700, ge=1, description="Optimizer steps of text encoder and U-Net.")
    unet_batch_size: int = Field(48, ge=1)
    unet_learning_rate: float = Field(4e-3, gt=0, description="Peak rate.")
    time_mean: float = Field(0.9, description="Mean logit of training times; positive: effort where shapes form.")
    caption_dropout: float = Field(0.1, ge=0, lt=1, description="Share of captions left empty, for guidance.")
    ema_decay: float = Field(0.996, gt=0, lt=1, description="Of the weights that are shipped.")
    flip_share: float = Field(0.0, ge=0, le=1, description="Share of mirrored pictures, where mirroring keeps meaning.")
    warmup_steps: int = Field(30, ge=0)
    checkpointing_steps: int = Field(50, ge=1)


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


def train_denoiser(
    pictures: Pictures,
    vae: AutoencoderKL,
    out: Path,
    config: PretrainConfig,
    should_stop: Callable[[], bool] = lambda: False,
) -> TextToLatents:
    """Train text encoder and U-Net on the concrete pictures' latents; checkpoints in `out` hold the averages too.

    The journal gets the training loss and, at checkpoints, the fixed-noise loss of the averaged weights on trained and
    on held-out pictures (one style of an emoji whose other styles are trained on).
    """
    concrete = pictures.where(row.concrete for row in pictures.rows)
    held_out = [hash_fraction(row.file_name) < config.held_out_styles for row in concrete.rows]
    train, test = concrete.where(not h for h in held_out), concrete.where(held_out)
    latents = encode(vae, to_unit(train.pixels))
    mirrored = encode(vae, to_unit(train.pixels.flip(-1)))
    torch.manual_seed(config.seed)
    model, optimizer, ema = _new_denoiser(concrete, out, config)
    journal, start_step = Journal(out / "journal.jsonl"), 0
    if checkpoint := newest_checkpoint(out):
        model.load_state_dict(checkpoint.tensors["model"])
        restore_optimizer(optimizer, checkpoint.tensors["optimizer"])
        ema.load(checkpoint.tensors["ema"])
        start_step = checkpoint.step
    objective = RectifiedFlow(to_time=partial(logit_normal, mean=config.time_mean))
    draws = Draws(config.seed)

    def batches() -> Iterator[CaptionedLatents]:
        order = batches_from(start_step, train.sample_ids, config.unet_batch_size, seed=config.seed)
        for step, index in enumerate(order, start_step):
            sample_ids, rows = tuple(train.sample_ids[i] for i in index), tuple(train.rows[i] for i in index)
            flip = draws(step, sample_ids).uniform(len(index), "flip") < config.flip_share
            flip &= torch.tensor([DIRECTIONAL.isdisjoint(row.name.split()) for row in rows])
            yield CaptionedLatents(
                sample_ids, rows, torch.where(flip.view(-1, 1, 1, 1), mirrored[index], latents[index])
            )

    def loss(batch: CaptionedLatents, draw: Draw) -> Tensor:
        return denoising_loss(model, objective, batch, draw, caption_dropout=config.caption_dropout)

    probes = {"train": _probe(train, latents), "held_out": _probe(test, encode(vae, to_unit(test.pixels)))}

    def on_step(report: StepReport) -> None:
        if report.step % 10 == 0:
            journal(step=report.step, loss=report.loss, grad_norm=report.grad_norm, lr=report.learning_rate)

    def on_checkpoint(steps: int) -> None:
        with ema.applied():
            journal(step=steps, **{f"{name}_loss": fixed_noise_loss(model, *probe) for name, probe in probes.items()})
        tensors = {"model": model.state_dict(), "optimizer": optimizer_tensors(optimizer), "ema": ema.tensors}
        save_checkpoint(out, steps, tensors, {"config": config.model_dump()})

    lr_at = learning_rate_at(
        "cosine", config.unet_learning_rate, max_train_steps=config.unet_steps, warmup_steps=config.warmup_steps
    )
    fit(
        list(model.parameters()), batches(), loss, optimizer, lr_at, draws=draws, start_step=start_step,
        max_train_steps=config.unet_steps, ema=ema, on_step=on_step, on_checkpoint=on_checkpoint,
        checkpointing_steps=config.checkpointing_steps, should_stop=should_stop,
    )  # fmt: skip
    return model


def averaged_denoiser(concrete: Pictures, out: Path, config: PretrainConfig) -> TextToLatents:
    """Text encoder and U-Net with the averaged weights of the newest checkpoint in `out`, in evaluation mode.

    Raises: DamagedArtifact when there is no complete checkpoint.
    """
    checkpoint = newest_checkpoint(out)
    if checkpoint is None:
        raise DamagedArtifact(f"{out}: no complete checkpoint; run the unet stage first")
    model, _, _ = _new_denoiser(concrete, out, config)
    model.load_state_dict(checkpoint.tensors["model"] | checkpoint.tensors["ema"])
    return model.eval()


def fixed_noise_loss(model: TextToLatents, rows: Sequence[Picture], latents: Tensor) -> float:
    """Unweighted velocity error with the same noise and evenly spread times at every call: comparable over a run."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(latents.shape, generator=generator)
    t = stratified(torch.full((len(latents),), 0.5))
    with torch.no_grad():
        prompt_embeds = model.prompt_embeds([f"{row.name}, {row.style} style" for row in rows])
        return RectifiedFlow().at(model, latents, prompt_embeds, t, noise).mean().item()


def _probe(pictures: Pictures, latents: Tensor, size: int = 128) -> tuple[list[Picture], Tensor]:
    """The first `size` pictures by hash, so that times, which are given by place, do not follow the emoji's order."""
    order = epoch_order(0, 0, pictures.sample_ids)[:size]
    return [pictures.rows[i] for i in order], latents[list(order)]


def _new_denoiser(
    concrete: Pictures, out: Path, config: PretrainConfig
) -> tuple[TextToLatents, Optimizer, ExponentialAverage]:
    tokenizer_dir = out / "tokenizer"
    if tokenizer_dir.is_dir():
        tokenizer = CLIPTokenizer.from_pretrained(tokenizer_dir)
    else:
        tokenizer = train_tokenizer(
            all_captions(concrete.rows), tokenizer_dir,
            vocab_size=config.vocab_size, max_length=config.max_prompt_tokens,
        )  # fmt: skip
    text_encoder = new_text_encoder(tokenizer, config.text_size, config.text_layers)
    unet = new_unet(
        config.unet_channels, config.unet_layers_per_block, config.text_size, latent_channels=8, sample_size=8
    )
    model = TextToLatents(tokenizer, text_encoder, unet)
    parameters = dict(model.named_parameters())
    optimizer = _muon(parameters, config.unet_learning_rate, exclude=("embedding", "conv_in", "conv_out"))
    return model, optimizer, ExponentialAverage(parameters.items(), config.ema_decay)


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
    if arguments.stage in (None, "unet"):
        vae = AutoencoderKL.from_pretrained(arguments.out / "vae/model")
        train_denoiser(pictures, vae, arguments.out / "unet", config, lambda: stopped)
    concrete = pictures.where(row.concrete for row in pictures.rows)
    if arguments.stage in (None, "assemble"):
        vae = AutoencoderKL.from_pretrained(arguments.out / "vae/model")
        model = averaged_denoiser(concrete, arguments.out / "unet", config)
        assemble_pipeline(model, vae, arguments.out / "pipeline")
        write_concepts(concrete.rows, arguments.out / "concepts.json")
    if arguments.stage in (None, "evaluate"):
        held_out = pictures.where(hash_fraction(row.group) < config.held_out for row in pictures.rows)
        out = arguments.out / "evaluation"
        figures = evaluate_base(arguments.out / "pipeline", concrete, held_out, ImageNetEmbedder(), out)
        draw_curves({stage: arguments.out / stage / "journal.jsonl" for stage in ("vae", "unet")}, out / "curves.png")
        print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
