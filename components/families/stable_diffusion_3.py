"""Stable Diffusion 3 and 3.5: two CLIP text encoders and T5, which a base may go without, and a joint transformer."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.families.family import Family, Geometry, has_part, read_config
from components.families.joint_attention import ATTENTION, BLOCKS, EVERYTHING, FEED_FORWARD
from components.families.text import ClipPromptEncoder, ClipPrompts, TextModel

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from components.families.family import Tensors

T5 = ("text_encoder_3", "tokenizer_3")
T5_TOKENS = 256  # max_sequence_length of the stock pipeline
TARGETS = {
    "attention": ATTENTION,
    "attention-mlp": ATTENTION + FEED_FORWARD,
    "all-linear": BLOCKS,
    "all": EVERYTHING,
}


class TwoClipsAndT5(ClipPrompts):
    """`prompt_embeds` (B, L + T, D): CLIP's penultimate states padded to T5's width, then T5's; both pooled ones."""

    def __init__(self, *clips: TextModel, t5_tokens: int):
        super().__init__(*clips)
        self._t5_tokens = t5_tokens

    def condition(self, prompts: Sequence[str], others: "Tensors") -> "Tensors":
        import torch

        t5 = others["prompt_embeds"][:, -self._t5_tokens :]
        length = self.clips[0].tokenizer.model_max_length
        clips = [clip(prompts, length, output_hidden_states=True) for clip in self.clips]
        states = torch.cat([clip.hidden_states[-2] for clip in clips], dim=-1)
        padded = torch.nn.functional.pad(states, (0, t5.shape[-1] - states.shape[-1]))
        pooled = torch.cat([clip.text_embeds for clip in clips], dim=-1)
        return {"prompt_embeds": torch.cat([padded, t5], dim=-2), "pooled_prompt_embeds": pooled}


class StableDiffusion3(Family):
    """The rectified-flow transformer of Esser et al. 2024, arXiv:2403.03206, medium and large."""

    name = "stable-diffusion-3"
    pipeline = "StableDiffusion3Pipeline"
    denoiser = "SD3Transformer2DModel"
    parts = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "scheduler")
    optional_parts = T5
    prompt_parts = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", *T5)
    clip_parts = ("text_encoder", "text_encoder_2")
    targets = TARGETS

    def geometry(self, base: Path) -> Geometry:
        vae, transformer = read_config(base, "vae"), read_config(base, "transformer")
        downscale = 2 ** (len(vae["block_out_channels"]) - 1)
        patch = transformer["patch_size"]
        resolution = transformer["sample_size"] * downscale
        return Geometry.of(resolution, downscale * patch, downscale, vae["latent_channels"], patch)

    def modelspec(self, base: Path) -> str:
        transformer = read_config(base, "transformer")
        if not transformer.get("qk_norm"):
            return "stable-diffusion-3-medium"  # 3.5 normalises queries and keys, 3.0 does not
        size = "medium" if transformer.get("dual_attention_layers") else "large"
        return f"stable-diffusion-3.5-{size}"

    def prompt_settings(self, base: Path) -> dict[str, Any]:
        width = read_config(base, "transformer")["joint_attention_dim"]
        return {"max_sequence_length": T5_TOKENS, "width": width}

    def load_prompt_encoder(self, base: Path, device: str) -> ClipPromptEncoder:
        """Without T5 its places are zeros, as the stock pipeline has them."""
        import torch

        dtype, settings = self.dtype(device), self.prompt_settings(base)
        tokens, width = settings["max_sequence_length"], settings["width"]
        with_t5 = has_part(read_config(base, ".", "model_index.json"), "text_encoder_3")
        t5 = TextModel(base, 3, "T5Tokenizer", "T5EncoderModel", device, dtype) if with_t5 else None

        def states(prompts: Sequence[str]) -> "Tensors":
            if t5 is None:
                return {"prompt_embeds": torch.zeros(len(prompts), tokens, width, dtype=dtype, device=device)}
            return {"prompt_embeds": t5(prompts, tokens)[0]}

        return ClipPromptEncoder(self.load_clip_prompts(base, device, dtype), states)

    def load_clip_prompts(self, base: Path, device: str, dtype: "torch.dtype") -> ClipPrompts:
        first, second = (
            TextModel(base, place, "CLIPTokenizer", "CLIPTextModelWithProjection", device, dtype) for place in (1, 2)
        )
        return TwoClipsAndT5(first, second, t5_tokens=T5_TOKENS)

    def denoise(self, denoiser: "nn.Module", x_t: "Tensor", timestep: "Tensor", cond: "Tensors") -> "Tensor":
        """x_t (B, C, h, w), timestep (B,), cond as above, batched -> velocity (B, C, h, w)."""
        return denoiser(
            hidden_states=x_t,
            timestep=timestep,
            encoder_hidden_states=cond["prompt_embeds"],
            pooled_projections=cond["pooled_prompt_embeds"],
            return_dict=False,
        )[0]
