"""Qwen-Image: one frame of a video autoencoder, Qwen2.5-VL's states of a text of any length, joint attention."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.families.autoencoders import GaussianLatents, OneFrameEncoder
from components.families.family import MULTISTEP, Geometry, read_config
from components.families.flux import packed, unpacked
from components.families.joint_attention import ATTENTION, BLOCKS, EVERYTHING
from components.families.language_model import LanguageModelFamily, default_of, texts_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from components.families.family import Tensors

SAMPLE_SIZE = 128  # latent cells on a side, as the stock pipeline has it: no config says it
PATCH = 2
TIME_UNITS = 1000  # the transformer multiplies by these itself
FEED_FORWARD = tuple(rf"{stream}_mlp\.net\.{layer}" for stream in ("img", "txt") for layer in (r"0\.proj", "2"))
TARGETS = {
    "attention": ATTENTION,
    "attention-mlp": ATTENTION + FEED_FORWARD,
    "all-linear": BLOCKS,
    "all": EVERYTHING,
}


class QwenImage(LanguageModelFamily):
    """Wu et al. 2025, arXiv:2508.02324."""

    name = "qwen-image"
    pipeline = "QwenImagePipeline"
    denoiser = "QwenImageTransformer2DModel"
    text_encoder = "Qwen2_5_VLForConditionalGeneration"
    targets = TARGETS

    def geometry(self, base: Path) -> Geometry:
        vae = read_config(base, "vae")
        downscale = 2 ** len(vae["temperal_downsample"])
        return Geometry.of(SAMPLE_SIZE * downscale, downscale * PATCH, downscale, vae["z_dim"], PATCH)

    def modelspec(self, base: Path) -> str:
        return "Qwen-Image"

    def load_pixel_encoder(self, base: Path, device: str) -> OneFrameEncoder:
        return OneFrameEncoder(base, device, "AutoencoderKLQwenImage")

    def scaled_latents(self, base: Path) -> GaussianLatents:
        vae = read_config(base, "vae")
        return GaussianLatents(tuple(vae["latents_mean"]), tuple(1 / std for std in vae["latents_std"]))

    def prompt_condition(self, stock: Any, prompts: Sequence[str]) -> "Tensors":
        """`prompt_embeds` (B, L, D) and their mask, each prompt read by itself: padding to the limit costs more."""
        tokens = default_of(stock, "max_sequence_length")  # another number than encode_prompt's own default
        return texts_of([stock.encode_prompt([prompt], max_sequence_length=tokens)[0][0] for prompt in prompts])

    def denoise(self, denoiser: "nn.Module", x_t: "Tensor", timestep: "Tensor", cond: "Tensors") -> "Tensor":
        """x_t (B, C, h, w), timestep (B,) in [0, 1000], cond as above, batched -> velocity (B, C, h, w)."""
        mask, height, width = cond["prompt_embeds_mask"], *x_t.shape[-2:]
        tokens = denoiser(
            hidden_states=packed(x_t),
            timestep=timestep / TIME_UNITS,
            encoder_hidden_states=cond["prompt_embeds"],
            encoder_hidden_states_mask=None if mask.all() else mask.long(),
            img_shapes=[[(1, height // PATCH, width // PATCH)]] * len(x_t),
            return_dict=False,
        )[0]
        return unpacked(tokens, height, width)

    def target_modules(self, denoiser: "nn.Module", preset: str) -> list[str]:
        """Without the layers of the last block that only the text would go through, which is thrown away there."""
        blocks: Any = denoiser.transformer_blocks
        unread = re.compile(rf"transformer_blocks\.{len(blocks) - 1}\.(?:attn\.(?:add_q_proj|to_add_out)|txt_mlp\..*)")
        return [name for name in super().target_modules(denoiser, preset) if not unread.fullmatch(name)]

    def generation_options(self, pipeline: Any, guidance_scale: float, batch_size: int) -> dict[str, Any]:
        """Guidance needs a prompt to lead away from, one for every picture."""
        negative = {"negative_prompt": [""] * batch_size} if guidance_scale > 1 else {}
        return {"true_cfg_scale": guidance_scale} | negative

    def unfit_samplers(self, scheduler: Mapping[str, Any]) -> tuple[str, ...]:
        return (*MULTISTEP, "flow_heun")
