"""The small autoencoder of the embedded base: architecture, augmentation, loss, folding of latent statistics."""

from dataclasses import dataclass

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor
from torch.nn import functional as F

from components.diffusion.draws import Draw

GRADIENT_WEIGHT = 0.5  # of the image-gradient term; sharpens edges, which L1 alone blurs
KL_WEIGHT = 1e-4  # nats per pixel; keeps latents compact without costing reconstruction
PYRAMID_LEVELS = 3


@dataclass(frozen=True, slots=True)
class PixelBatch:
    """Images as the autoencoder sees them: (B, 3, H, W) float32 in [-1, 1]."""

    sample_ids: tuple[str, ...]
    pixels: Tensor

    def __getitem__(self, rows: slice) -> "PixelBatch":
        return PixelBatch(self.sample_ids[rows], self.pixels[rows])


def new_autoencoder(channels: tuple[int, ...] = (16, 32, 64, 128), latent_channels: int = 8) -> AutoencoderKL:
    """An untrained AutoencoderKL that makes 64x64 px into (8, 8, 8) latents; without attention, so any size works."""
    return AutoencoderKL(
        block_out_channels=channels,  # pyright: ignore[reportArgumentType]
        down_block_types=("DownEncoderBlock2D",) * len(channels),  # pyright: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * len(channels),  # pyright: ignore[reportArgumentType]
        latent_channels=latent_channels,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=64,
        scaling_factor=1.0,
    )


def posterior_of(model: AutoencoderKL, pixels: Tensor) -> DiagonalGaussianDistribution:
    """The Gaussian over latents that the encoder sees in (B, 3, H, W) in [-1, 1]."""
    return model.encode(pixels).latent_dist  # pyright: ignore[reportAttributeAccessIssue]


def decode(model: AutoencoderKL, latents: Tensor) -> Tensor:
    """Pixels of latents (B, C, h, w), not clamped."""
    return model.decode(latents).sample  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]


def augment(pixels: Tensor, draw: Draw) -> Tensor:
    """Drawings in other colours, sizes and places, and as white silhouettes on coloured rounded squares.

    Half of the samples stay as they are up to a flip: the autoencoder must serve these, and learn edges and flat
    colours from the rest. pixels: (B, 3, H, W) in [-1, 1] on white. Same shape back.
    """
    kind, *u = (draw.uniform(len(pixels), f"augment-{i}").to(pixels).view(-1, 1, 1, 1) for i in range(10))
    flipped = torch.where(u[0] < 0.5, pixels.flip(-1), pixels)
    moved = _move(flipped, zoom=0.6 + 0.8 * u[1], shift=torch.cat([u[2], u[3]], dim=1).flatten(1) * 0.4 - 0.2)
    color = torch.cat([u[4], u[5], u[6]], dim=1) * 2 - 1  # (B, 3, 1, 1)
    recolored = torch.where(u[7] < 0.5, moved.roll(1, dims=1), moved.roll(2, dims=1))
    recolored = torch.where(u[8] < 0.25, -recolored, recolored)
    ink = ((1 - moved.amin(dim=1, keepdim=True)) * 2).clamp(0, 1)  # (B, 1, H, W), 0 on white paper
    tile = _rounded_square(pixels.shape[-1]).to(pixels)
    silhouette = ink * tile + (1 - ink) * (tile * color + (1 - tile))
    augmented = torch.where(kind < 0.65, moved, torch.where(kind < 0.8, recolored, silhouette))
    return torch.where(kind < 0.5, flipped, augmented)


def reconstruction_loss(model: AutoencoderKL, batch: PixelBatch, draw: Draw) -> Tensor:
    """L1 and image-gradient L1 over a pyramid, plus a light KL term; scalar."""
    pixels = augment(batch.pixels, draw)
    posterior = posterior_of(model, pixels)
    latents = posterior.mean + posterior.std * draw.normal(posterior.mean.shape, "posterior").to(posterior.mean)
    reconstruction = decode(model, latents)
    kl = posterior.kl().mean() / pixels[0, 0].numel()
    return pyramid_loss(reconstruction, pixels) + KL_WEIGHT * kl


def pyramid_loss(image: Tensor, target: Tensor) -> Tensor:
    """Mean over PYRAMID_LEVELS halvings of L1 + GRADIENT_WEIGHT * L1 of horizontal and vertical differences; scalar."""
    total = torch.zeros((), device=image.device)
    for _ in range(PYRAMID_LEVELS):
        error = image - target
        dx, dy = error.diff(dim=-1), error.diff(dim=-2)
        total = total + error.abs().mean() + GRADIENT_WEIGHT * (dx.abs().mean() + dy.abs().mean())
        image, target = F.avg_pool2d(image, 2), F.avg_pool2d(target, 2)
    return total / PYRAMID_LEVELS


@torch.no_grad()
def psnr(model: AutoencoderKL, pixels: Tensor, batch_size: int = 64) -> float:
    """Mean over images of the peak signal-to-noise ratio of their reconstruction from the latent mean, in dB.

    pixels: (N, 3, H, W) in [-1, 1].
    """
    values = []
    for chunk in pixels.to(model.device).split(batch_size):
        reconstruction = decode(model, posterior_of(model, chunk).mean).clamp(-1, 1)
        mse = (reconstruction - chunk).square().mean(dim=(1, 2, 3)) / 4  # on a range of [0, 1]
        values.append(-10 * mse.clamp_min(1e-10).log10())
    return torch.cat(values).mean().item()


@torch.no_grad()
def fold_latent_statistics(model: AutoencoderKL, pixels: Tensor, batch_size: int = 64) -> None:
    """Rescale the 1x1 convolutions around the latents, in place, so that the latents of `pixels` have mean 0, std 1.

    The stock pipeline knows one `scaling_factor` and no per-channel mean; afterwards neither is needed.
    """
    chunks = pixels.to(model.device).split(batch_size)
    means = torch.cat([posterior_of(model, chunk).mean for chunk in chunks])
    mean, std = means.mean(dim=(0, 2, 3)), means.std(dim=(0, 2, 3))  # (C,)
    channels = len(mean)
    quant, post_quant = model.quant_conv, model.post_quant_conv
    assert quant is not None and quant.bias is not None and post_quant is not None and post_quant.bias is not None
    quant.weight[:channels] /= std.view(-1, 1, 1, 1)
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    quant.bias[channels:] -= 2 * std.log()
    post_quant.bias.add_((post_quant.weight.flatten(1) * mean).sum(dim=1))
    post_quant.weight.mul_(std.view(1, -1, 1, 1))


def _move(pixels: Tensor, zoom: Tensor, shift: Tensor) -> Tensor:
    theta = torch.zeros(len(pixels), 2, 3).to(pixels)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / zoom.flatten()
    theta[:, :, 2] = shift
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels - 1, grid, align_corners=False) + 1  # outside the picture is white


def _rounded_square(size: int) -> Tensor:
    """(1, 1, size, size) coverage in [0, 1] of a square with round corners that leaves a thin margin."""
    x = torch.linspace(-1, 1, size).abs()
    half, radius = 0.94, 0.35
    d = (x - (half - radius)).clamp_min(0)
    distance = (d[:, None].square() + d[None, :].square()).sqrt() - radius
    return (0.5 - distance * size / 2).clamp(0, 1)[None, None]
