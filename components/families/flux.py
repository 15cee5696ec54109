"""FLUX.1, dev and schnell: CLIP's pooled embedding and T5's states, latents packed two by two into tokens."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.families.family import MULTISTEP, Family, Geometry, read_config
from components.families.joint_attention import ATTENTION, BLOCKS, EVERYTHING, FEED_FORWARD
from components.families.text import ClipPromptEncoder, ClipPrompts, TextModel

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from components.families.family import Tensors

SAMPLE_SIZE = 128  # latent cells on a side, as the stock pipeline has it: no config says it
PATCH = 2
T5_TOKENS = {True: 512, False: 256}  # of dev, whose guidance is distilled into it, and of schnell
TRAINING_GUIDANCE = 1.0  # 3.5 is for sampling; trained with it, an adapter learns to undo what was distilled
TIME_UNITS = 1000  # the transformer multiplies by these itself
SINGLE_FEED_FORWARD = ("proj_mlp", r"single_transformer_blocks\.\d+\.proj_out")
TARGETS = {
    "attention": ATTENTION,
    "attention-mlp": ATTENTION + FEED_FORWARD + SINGLE_FEED_FORWARD,
    "all-linear": BLOCKS,
    "all": EVERYTHING,
}


class PooledClip(ClipPrompts):
    """`prompt_embeds` (B, T, D), the states of T5, and `pooled_prompt_embeds` (B, P) of CLIP."""

    def condition(self, prompts: Sequence[str], others: "Tensors") -> "Tensors":
        return {
            "prompt_embeds": others["prompt_embeds"],
            "pooled_prompt_embeds": self.clips[0](prompts).pooler_output,
        }


class Flux(Family):
    """Black Forest Labs 2024. Dev is told a guidance, and sees 1.0 in training; schnell is distilled to few steps."""

    name = "flux-1"
    pipeline = "FluxPipeline"
    denoiser = "FluxTransformer2DModel"
    parts = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "scheduler")
    prompt_parts = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    clip_parts = ("text_encoder",)
    targets = TARGETS

    def geometry(self, base: Path) -> Geometry:
        vae = read_config(base, "vae")
        downscale = 2 ** (len(vae["block_out_channels"]) - 1)
        return Geometry.of(SAMPLE_SIZE * downscale, downscale * PATCH, downscale, vae["latent_channels"], PATCH)

    def modelspec(self, base: Path) -> str:
        return "flux-1-dev" if _guided(base) else "flux-1-schnell"

    def prompt_settings(self, base: Path) -> dict[str, Any]:
        return {"max_sequence_length": T5_TOKENS[_guided(base)]}

    def load_prompt_encoder(self, base: Path, device: str) -> ClipPromptEncoder:
        dtype, tokens = self.dtype(device), T5_TOKENS[_guided(base)]
        t5 = TextModel(base, 2, "T5Tokenizer", "T5EncoderModel", device, dtype)
        return ClipPromptEncoder(
            self.load_clip_prompts(base, device, dtype), lambda prompts: {"prompt_embeds": t5(prompts, tokens)[0]}
        )

    def load_clip_prompts(self, base: Path, device: str, dtype: "torch.dtype") -> ClipPrompts:
        return PooledClip(TextModel(base, 1, "CLIPTokenizer", "CLIPTextModel", device, dtype))

    def denoise(self, denoiser: "nn.Module", x_t: "Tensor", timestep: "Tensor", cond: "Tensors") -> "Tensor":
        """x_t (B, C, h, w), timestep (B,) in [0, 1000], cond as above, batched -> velocity (B, C, h, w)."""
        import torch

        embeds, height, width = cond["prompt_embeds"], *x_t.shape[-2:]
        config: Any = denoiser.config
        tokens = denoiser(
            hidden_states=packed(x_t),
            timestep=timestep / TIME_UNITS,
            guidance=x_t.new_full((len(x_t),), TRAINING_GUIDANCE) if config.guidance_embeds else None,
            pooled_projections=cond["pooled_prompt_embeds"],
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3, device=x_t.device),
            img_ids=image_ids(height // PATCH, width // PATCH, x_t.device),
            return_dict=False,
        )[0]
        return unpacked(tokens, height, width)

    def generation_options(self, pipeline: Any, guidance_scale: float, batch_size: int) -> dict[str, Any]:
        """Guidance is told, not made of two passes; schnell knows none, and reads shorter texts."""
        tokens = T5_TOKENS[bool(pipeline.transformer.config.guidance_embeds)]
        return {"guidance_scale": guidance_scale, "max_sequence_length": tokens}


    def unfit_samplers(self, scheduler: Mapping[str, Any]) -> tuple[str, ...]:
        """The stock pipeline hands over a shift by resolution, which some classes take only where it is asked for."""
        return ("flow_heun",) if scheduler.get("use_dynamic_shifting") else (*MULTISTEP, "flow_heun")


def _guided(base: Path) -> bool:
    return bool(read_config(base, "transformer").get("guidance_embeds"))


def packed(latents: "Tensor") -> "Tensor":
    """(B, C, h, w) -> (B, h/2 * w/2, C * 4): a token is a square of two by two cells, row by row."""
    batch, channels, height, width = latents.shape
    squares = latents.view(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * PATCH * PATCH)


def unpacked(tokens: "Tensor", height: int, width: int) -> "Tensor":
    """(B, h/2 * w/2, C * 4) -> (B, C, h, w), for h and w of the latents."""
    batch, _, features = tokens.shape
    squares = tokens.view(batch, height // PATCH, width // PATCH, features // PATCH**2, PATCH, PATCH)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(batch, features // PATCH**2, height, width)


def image_ids(rows: int, columns: int, device: "torch.device") -> "torch.Tensor":
    """(rows * columns, 3): 0, row and column of every token. Made on the device, a CUDA graph copies nothing to it."""
    import torch

    lines = torch.arange(rows, device=device), torch.arange(columns, device=device)
    row, column = torch.meshgrid(*lines, indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).view(-1, 3).float()
