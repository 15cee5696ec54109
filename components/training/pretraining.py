"""Pre-training of the embedded base model, stage by stage: `python -m components.training.pretraining --help`.

    vae       autoencoder on all drawings                           -> OUT/vae
    unet      text encoder and denoiser on the concrete concepts    -> OUT/unet
    assemble  a diffusers pipeline from the averaged weights        -> OUT/pipeline
    evaluate  figures and pictures for the model card               -> OUT/evaluation

Every stage resumes from its newest complete checkpoint.
"""

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, get_args

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads steal the cores that others need

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from components.diffusion.draws import Draw, Draws
from components.errors import BadInput, DamagedArtifact, SafelightError
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
from components.training.checkpoints import (
    Checkpoint,
    newest_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)
from components.training.denoiser import (
    CaptionedLatents,
    TextToLatents,
    denoising_loss,
    encode,
    fixed_noise_loss,
    new_text_encoder,
    new_unet,
    probe_of,
)
from components.training.ema import ExponentialAverage
from components.training.formulations import FORMULATIONS, require_objective
from components.training.loop import StepReport, fit
from components.training.optimizers import muon_for
from components.training.order import batches_from
from components.training.pictures import TINTS, Pictures, hash_fraction, in_color, read_pictures, tinted, to_unit
from components.training.pretraining_config import Journal, PretrainConfig, read_config
from components.training.schedules import learning_rate_at

Stage = Literal["vae", "unet", "assemble", "evaluate"]
STAGES: tuple[Stage, ...] = get_args(Stage)
SHAPING = (  # settings that decide what the weights are; others may change while training goes on
    *("objective", "vocab_size", "max_prompt_tokens", "text_size", "text_layers"),
    *("unet_channels", "unet_layers_per_block"),
)
DIRECTIONAL = frozenset(  # words of drawings that mean something else when mirrored
    ("left", "right", "arrow", "arrows", "button", "check", "question", "note", "book", "page")
)


def train_autoencoder(
    pictures: Pictures,
    out: Path,
    config: PretrainConfig,
    *,
    device: str = "cpu",
    should_stop: Callable[[], bool] = lambda: False,
) -> AutoencoderKL:
    """Train on all pictures but the held-out ones; when done, write `out/model` with normalised latents."""
    held_out = [hash_fraction(row.group) < config.held_out for row in pictures.rows]
    train, test = pictures.where(not h for h in held_out), pictures.where(held_out)
    test_pixels = to_unit(test.pixels)
    torch.manual_seed(config.seed)
    model = new_autoencoder().to(device)  # pyright: ignore[reportArgumentType]
    parameters = dict(model.named_parameters())
    optimizer = muon_for(parameters, config.vae_learning_rate, exclude=("conv_in", "conv_out.weight", "quant"))
    journal, start_step = Journal(out / "journal.jsonl"), 0
    if checkpoint := newest_checkpoint(out):
        model.load_state_dict(checkpoint.tensors["model"])
        restore_optimizer(optimizer, checkpoint.tensors["optimizer"])
        start_step = checkpoint.step

    def batches() -> Iterator[PixelBatch]:
        for index in batches_from(start_step, train.sample_ids, config.vae_batch_size, seed=config.seed):
            yield PixelBatch(tuple(train.sample_ids[i] for i in index), to_unit(train.pixels[index]).to(device))

    def on_step(report: StepReport) -> None:
        if report.step % 10 == 0:
            journal(step=report.step, loss=report.loss, grad_norm=report.grad_norm, lr=report.learning_rate)

    def on_checkpoint(steps: int) -> None:
        journal(step=steps, **({"psnr": psnr(model, test_pixels)} if test.rows else {}))
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
    *,
    start: Path | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> TextToLatents:
    """Train text encoder and U-Net on the concrete pictures' latents; checkpoints in `out` hold the averages too.

    It runs on the device of `vae`. Without a checkpoint in `out` it begins with the weights of the pipeline folder
    `start`, or with fresh ones. The journal gets the training loss and, at checkpoints, the fixed-noise loss of the
    averaged weights on trained pictures and on held-out ones (one style of an emoji whose other styles are trained on).
    Raises: BadInput when the checkpoint in `out` is of a model of other sizes or another objective.
    """
    checkpoint = _checkpoint_to_go_on_from(out, config)
    concrete = pictures.where(row.concrete for row in pictures.rows)
    held_out = [hash_fraction(row.file_name) < config.held_out_styles for row in concrete.rows]
    train, test = concrete.where(not h for h in held_out), concrete.where(held_out)
    latents = encode(vae, to_unit(train.pixels))
    mirrored = encode(vae, to_unit(train.pixels.flip(-1)))
    colors = TINTS if config.tinted_share else ()
    in_colors = [encode(vae, to_unit(tinted(train.pixels, color))) for color in colors]
    torch.manual_seed(config.seed)
    model = _new_denoiser(concrete, out, config, start).to(vae.device)
    parameters = dict(model.named_parameters())
    optimizer = muon_for(parameters, config.unet_learning_rate, exclude=("embedding", "conv_in", "conv_out"))
    ema = ExponentialAverage(parameters.items(), config.ema_decay)
    journal, start_step = Journal(out / "journal.jsonl"), 0
    if checkpoint:
        model.load_state_dict(checkpoint.tensors["model"])
        restore_optimizer(optimizer, checkpoint.tensors["optimizer"])
        ema.load(checkpoint.tensors["ema"])
        start_step = checkpoint.step
    objective = FORMULATIONS[config.objective].objective(config)
    draws = Draws(config.seed)

    def batches() -> Iterator[CaptionedLatents]:
        order = batches_from(start_step, train.sample_ids, config.unet_batch_size, seed=config.seed)
        for step, index in enumerate(order, start_step):
            sample_ids, rows = tuple(train.sample_ids[i] for i in index), [train.rows[i] for i in index]
            draw = draws(step, sample_ids)
            flip = draw.uniform(len(index), "flip") < config.flip_share
            flip &= torch.tensor([DIRECTIONAL.isdisjoint(row.name.split()) for row in rows])
            chosen = torch.where(flip.view(-1, 1, 1, 1).to(latents.device), mirrored[index], latents[index])
            for i, u in enumerate(draw.uniform(len(index), "tint").tolist()):
                if u < config.tinted_share:
                    which = int(u / config.tinted_share * len(TINTS))
                    recolored = in_color(rows[i], list(TINTS)[which])
                    if recolored is not rows[i]:
                        rows[i], chosen[i] = recolored, in_colors[which][index[i]]
            yield CaptionedLatents(sample_ids, tuple(rows), chosen)

    def loss(batch: CaptionedLatents, draw: Draw) -> Tensor:
        return denoising_loss(model, objective, batch, draw, caption_dropout=config.caption_dropout)

    probes = {"train": probe_of(train, latents)}
    if test.rows:
        probes["held_out"] = probe_of(test, encode(vae, to_unit(test.pixels)))

    def on_step(report: StepReport) -> None:
        if report.step % 10 == 0:
            journal(step=report.step, loss=report.loss, grad_norm=report.grad_norm, lr=report.learning_rate)

    def on_checkpoint(steps: int) -> None:
        with ema.applied():
            losses = {f"{name}_loss": fixed_noise_loss(model, objective, *probe) for name, probe in probes.items()}
        journal(step=steps, **losses)
        tensors = {"model": model.state_dict(), "optimizer": optimizer_tensors(optimizer), "ema": ema.tensors}
        save_checkpoint(out, steps, tensors, {"config": config.model_dump(mode="json")})

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
    model = _new_denoiser(concrete, out, config, start=None)
    model.load_state_dict(checkpoint.tensors["model"] | checkpoint.tensors["ema"])
    return model.eval()


def run_stage(
    stage: Stage,
    data: Path,
    out: Path,
    config: PretrainConfig,
    *,
    device: str = "cpu",
    start: Path | None = None,
    autoencoder: Path | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Run one stage on the image folder `data`; results and checkpoints go under `out`.

    The autoencoder is that of the pipeline folder `autoencoder` or `start`, else the one trained here; the denoiser
    begins with the weights of `start`, else with fresh ones.
    """
    pictures = read_pictures(data)
    concrete = pictures.where(row.concrete for row in pictures.rows)
    if stage == "vae":
        train_autoencoder(pictures, out / "vae", config, device=device, should_stop=should_stop)
        return
    shipped = autoencoder or start
    vae = AutoencoderKL.from_pretrained(shipped / "vae" if shipped else out / "vae/model")
    if stage == "unet":
        vae.to(device)  # pyright: ignore[reportArgumentType]
        train_denoiser(pictures, vae, out / "unet", config, start=start, should_stop=should_stop)
    elif stage == "assemble":
        averaged = averaged_denoiser(concrete, out / "unet", config)
        assemble_pipeline(averaged, vae, out / "pipeline", FORMULATIONS[config.objective].scheduler)
        write_concepts(concrete.rows, out / "concepts.json")
    else:
        held_out = pictures.where(hash_fraction(row.group) < config.held_out for row in pictures.rows)
        figures = evaluate_base(out / "pipeline", concrete, held_out, ImageNetEmbedder(), out / "evaluation")
        journals = {stage: out / stage / "journal.jsonl" for stage in ("vae", "unet")}
        draw_curves({k: path for k, path in journals.items() if path.is_file()}, out / "evaluation/curves.png")
        print(json.dumps(figures), flush=True)


def _checkpoint_to_go_on_from(out: Path, config: PretrainConfig) -> Checkpoint | None:
    checkpoint = newest_checkpoint(out)
    if checkpoint is None:
        return None
    before, now = checkpoint.facts["config"], config.model_dump(mode="json")
    changed = [f"{name} {before[name]} (asked for: {now[name]})" for name in SHAPING if before[name] != now[name]]
    if changed:
        raise BadInput(
            f"{out}: its checkpoint has {', '.join(changed)}; choose another --out, or the settings it was begun with"
        )
    return checkpoint


def _new_denoiser(concrete: Pictures, out: Path, config: PretrainConfig, start: Path | None) -> TextToLatents:
    tokenizer_dir = out / "tokenizer"
    if start:
        tokenizer = CLIPTokenizer.from_pretrained(start / "tokenizer")
        tokenizer.save_pretrained(tokenizer_dir)
        return TextToLatents(
            tokenizer,
            CLIPTextModel.from_pretrained(start / "text_encoder"),
            UNet2DConditionModel.from_pretrained(start / "unet"),
        )
    if tokenizer_dir.is_dir():
        tokenizer = CLIPTokenizer.from_pretrained(tokenizer_dir)
    else:
        tokenizer = train_tokenizer(
            all_captions(concrete.rows),
            tokenizer_dir,
            vocab_size=config.vocab_size,
            max_length=config.max_prompt_tokens,
        )
    text_encoder = new_text_encoder(tokenizer, config.text_size, config.text_layers)
    unet = new_unet(
        config.unet_channels, config.unet_layers_per_block, config.text_size, latent_channels=8, sample_size=8
    )
    return TextToLatents(tokenizer, text_encoder, unet)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="image folder written by components.demo.emoji")
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints and results")
    parser.add_argument("--stage", choices=STAGES, help="one stage; without it all of them")
    parser.add_argument("--start", type=Path, help="pipeline folder to go on from instead of fresh weights")
    parser.add_argument("--autoencoder", type=Path, help="pipeline folder to take the autoencoder from")
    parser.add_argument("--config", type=Path, help="JSON file with fields of PretrainConfig that differ")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    config = read_config(arguments.config)
    if arguments.start:
        require_objective(arguments.start, config)
    missing = STAGES[1:] if arguments.start or arguments.autoencoder else STAGES
    stages: tuple[Stage, ...] = (arguments.stage,) if arguments.stage else missing
    for stage in stages:
        try:
            run_stage(
                stage, arguments.data, arguments.out, config,
                device=arguments.device, start=arguments.start, autoencoder=arguments.autoencoder,
                should_stop=stopped.is_set,
            )  # fmt: skip
        except SafelightError as error:
            sys.exit(f"error: {error}")
        if stopped.is_set():
            sys.exit(143)


if __name__ == "__main__":
    main()
