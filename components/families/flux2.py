"""FLUX.2 klein: three layers of Qwen3's states, latents cut into squares and normalised by statistics of the VAE."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.families.autoencoders import GaussianEncoder
from components.families.family import MULTISTEP, Geometry, read_config
from components.families.joint_attention import ATTENTION, BLOCKS, EVERYTHING
from components.families.language_model import LanguageModelFamily

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from components.families.family import Normal, Tensors

SAMPLE_SIZE = 128  # cells of the VAE on a side, as the stock pipeline has it: no config says it
PATCH = 2  # of those cells, on a side of what the transformer sees as one
TIME_UNITS = 1000  # the transformer multiplies by these itself
LARGE_WIDTH = 4096  # of the transformer with 9 billion parameters; that with 4 has 3072
SINGLE = (r"single_transformer_blocks\.\d+\.attn\.(?:to_qkv_mlp_proj|to_out)",)  # attention and feed-forward in one
FEED_FORWARD = (r"(?:ff|ff_context)\.linear_(?:in|out)",)
TARGETS = {
    "attention": ATTENTION + SINGLE,
    "attention-mlp": ATTENTION + SINGLE + FEED_FORWARD,
    "all-linear": BLOCKS,
    "all": EVERYTHING,
}


class PatchEncoder(GaussianEncoder):
    """AutoencoderKLFlux2: the most probable latent, in squares of two by two cells: `latent` (B, 4 C, H/2f, W/2f)."""

    def encode(self, pixels: "Tensor") -> "Tensors":
        mean = super().encode(pixels)["mean"]
        batch, channels, height, width = mean.shape
        squares = mean.view(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH).permute(0, 1, 3, 5, 2, 4)
        return {"latent": squares.reshape(batch, channels * PATCH**2, height // PATCH, width // PATCH)}


@dataclass(frozen=True, slots=True)
class NormalisedLatents:
    """(latent - mean) / std by channel: the running statistics of the VAE's batch normalisation."""

    mean: "Tensor"  # (C,)
    std: "Tensor"

    @classmethod
    def of(cls, base: Path) -> "NormalisedLatents":
        from safetensors import safe_open

        statistics: Tensors = {}
        for file in sorted((base / "vae").glob("*.safetensors")):
            with safe_open(file, "pt") as tensors:
                names = [name for name in tensors.keys() if name in ("bn.running_mean", "bn.running_var")]  # noqa: SIM118
                statistics |= {name: tensors.get_tensor(name).float() for name in names}
        epsilon = read_config(base, "vae")["batch_norm_eps"]
        return cls(statistics["bn.running_mean"], (statistics["bn.running_var"] + epsilon).sqrt())

    def __call__(self, cached: "Tensors", normal: "Normal") -> "Tensor":
        return (cached["latent"].float() - self.mean.view(-1, 1, 1)) / self.std.view(-1, 1, 1)


class Flux2Klein(LanguageModelFamily):
    """Black Forest Labs 2026, of 4 and 9 billion parameters, with and without distillation."""

    name = "flux-2-klein"
    pipeline = "Flux2KleinPipeline"
    denoiser = "Flux2Transformer2DModel"
    text_encoder = "Qwen3ForCausalLM"
    targets = TARGETS

    def geometry(self, base: Path) -> Geometry:
        vae = read_config(base, "vae")
        scale = 2 ** (len(vae["block_out_channels"]) - 1)
        downscale = scale * PATCH
        return Geometry.of(SAMPLE_SIZE * scale, downscale, downscale, vae["latent_channels"] * PATCH**2, patch=1)

    def modelspec(self, base: Path) -> str:
        transformer = read_config(base, "transformer")
        width = transformer["num_attention_heads"] * transformer["attention_head_dim"]
        return "Flux.2-klein-9b" if width >= LARGE_WIDTH else "Flux.2-klein-4b"

    def load_pixel_encoder(self, base: Path, device: str) -> PatchEncoder:
        return PatchEncoder(base, device, "AutoencoderKLFlux2")

    def scaled_latents(self, base: Path) -> NormalisedLatents:
        return NormalisedLatents.of(base)

    def prompt_condition(self, stock: Any, prompts: Sequence[str]) -> "Tensors":
        """`prompt_embeds` (B, 512, 3 D): padding is part of them, the transformer is told of no mask."""
        return {"prompt_embeds": stock.encode_prompt(list(prompts))[0]}

    def denoise(self, denoiser: "nn.Module", x_t: "Tensor", timestep: "Tensor", cond: "Tensors") -> "Tensor":
        """x_t (B, C, h, w), timestep (B,) in [0, 1000], cond as above, batched -> velocity (B, C, h, w)."""
        batch, _, height, width = x_t.shape
        embeds = cond["prompt_embeds"]
        tokens = denoiser(
            hidden_states=x_t.flatten(2).transpose(1, 2),
            timestep=timestep / TIME_UNITS,
            encoder_hidden_states=embeds,
            txt_ids=positions(1, 1, 1, embeds.shape[1], device=x_t.device).expand(batch, -1, -1),
            img_ids=positions(1, height, width, 1, device=x_t.device).expand(batch, -1, -1),
            return_dict=False,
        )[0]
        return tokens.transpose(1, 2).unflatten(2, (height, width))

    def unfit_samplers(self, scheduler: Mapping[str, Any]) -> tuple[str, ...]:
        return ("flow_heun",) if scheduler.get("use_dynamic_shifting") else (*MULTISTEP, "flow_heun")


def positions(*sizes: int, device: "torch.device") -> "Tensor":
    """(product of sizes, 4): frame, row, column and place in the text of every token."""
    import torch

    return torch.cartesian_prod(*(torch.arange(size, device=device) for size in sizes))
