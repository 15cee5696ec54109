"""Sana: an autoencoder without a posterior, Gemma, which is told to enhance the prompt, and linear attention."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.families.autoencoders import DeterministicEncoder, DeterministicLatents
from components.families.family import Geometry, read_config
from components.families.language_model import LanguageModelFamily, default_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from components.families.family import Tensors

SIDE_STEP = 32  # pixels: the stock pipeline takes no other sides
ATTENTION = ("to_q", "to_k", "to_v", r"to_out\.0")
FEED_FORWARD = (r"ff\.conv_inverted", r"ff\.conv_point")  # convolutions of one pixel
EMBEDDING = (r"linear(?:_[12])?", "proj_out")  # of caption and time, and out of the latent tokens
TARGETS = {
    "attention": ATTENTION,
    "attention-mlp": ATTENTION + FEED_FORWARD,
    "all-linear": ATTENTION + FEED_FORWARD + EMBEDDING,
    "all": (r".*(?<!conv_depth)",),  # a low rank cannot be shared out among the groups of a depthwise convolution
}


class Sana(LanguageModelFamily):
    """Xie et al. 2024, arXiv:2410.10629."""

    name = "sana"
    pipeline = "SanaPipeline"
    denoiser = "SanaTransformer2DModel"
    tokenizer = "GemmaTokenizer"
    text_encoder = "Gemma2Model"
    targets = TARGETS

    def geometry(self, base: Path) -> Geometry:
        vae, transformer = read_config(base, "vae"), read_config(base, "transformer")
        downscale = 2 ** (len(vae["encoder_block_out_channels"]) - 1)
        resolution = transformer["sample_size"] * downscale
        return Geometry.of(resolution, SIDE_STEP, downscale, vae["latent_channels"], transformer["patch_size"])

    def modelspec(self, base: Path) -> str:
        return "sana-1.5" if read_config(base, "transformer").get("qk_norm") else "sana"

    def load_pixel_encoder(self, base: Path, device: str) -> DeterministicEncoder:
        return DeterministicEncoder(base, device, "AutoencoderDC")

    def scaled_latents(self, base: Path) -> DeterministicLatents:
        return DeterministicLatents(read_config(base, "vae")["scaling_factor"])

    def prompt_condition(self, stock: Any, prompts: Sequence[str]) -> "Tensors":
        """`prompt_embeds` (B, 300, D) and their mask.

        An instruction stands before every prompt, but not before the empty one, from which guidance leads away.
        """
        import torch

        empty = torch.tensor([not prompt for prompt in prompts], device=stock.device)
        embeds, mask, plain, plain_mask = stock.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=bool(empty.any()),
            complex_human_instruction=default_of(stock, "complex_human_instruction"),
        )
        if plain is not None:
            embeds = torch.where(empty.view(-1, 1, 1), plain, embeds)
            mask = torch.where(empty.view(-1, 1), plain_mask, mask)
        return {"prompt_embeds": embeds, "prompt_embeds_mask": mask.bool()}

    def denoise(self, denoiser: "nn.Module", x_t: "Tensor", timestep: "Tensor", cond: "Tensors") -> "Tensor":
        """x_t (B, C, h, w), timestep (B,), cond as above, batched -> velocity (B, C, h, w)."""
        config: Any = denoiser.config
        return denoiser(
            x_t,
            encoder_hidden_states=cond["prompt_embeds"],
            encoder_attention_mask=cond["prompt_embeds_mask"].long(),
            timestep=timestep * config.timestep_scale,
            return_dict=False,
        )[0]

    def generation_options(self, pipeline: Any, guidance_scale: float, batch_size: int) -> dict[str, Any]:
        """Of the size that is asked for, instead of the nearest in the stock pipeline's table, scaled."""
        return {"guidance_scale": guidance_scale, "use_resolution_binning": False}
