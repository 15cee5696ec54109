"""SDXL and its like: two CLIP text encoders, a pooled embedding, and the picture's size and crop told to the U-Net."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.families.family import Framing, has_part, read_config
from components.families.stable_diffusion import StableDiffusion
from components.families.text import ClipPrompts, TextModel

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from components.families.family import Tensors


class TwoClips(ClipPrompts):
    """`prompt_embeds` (B, L, D1 + D2), both encoders' penultimate states, and the second's `pooled_prompt_embeds`."""

    def condition(self, prompts: Sequence[str], others: "Tensors") -> "Tensors":
        import torch

        first, second = (clip(prompts, output_hidden_states=True) for clip in self.clips)
        states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        return {"prompt_embeds": states, "pooled_prompt_embeds": second.text_embeds}


class StableDiffusionXL(StableDiffusion):
    """The base model of Podell et al. 2023, arXiv:2307.01952; its refiner denoises the last steps only and is refused.

    A sample is trained with its own `time_ids`, so that small and cropped pictures teach no blur and no cut-off heads.
    """

    name = "stable-diffusion-xl"
    pipeline = "StableDiffusionXLPipeline"
    parts = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "scheduler")
    prompt_parts = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    clip_parts = ("text_encoder", "text_encoder_2")
    precision = "bfloat16"

    def refusal(self, index: Mapping[str, Any]) -> str:
        if index.get("requires_aesthetics_score") or not has_part(index, "text_encoder"):
            return REFINER
        return ""

    def modelspec(self, base: Path) -> str:
        return "stable-diffusion-xl-v1-base"

    def load_clip_prompts(self, base: Path, device: str, dtype: "torch.dtype") -> ClipPrompts:
        return TwoClips(
            TextModel(base, 1, "CLIPTokenizer", "CLIPTextModel", device, dtype),
            TextModel(base, 2, "CLIPTokenizer", "CLIPTextModelWithProjection", device, dtype),
        )

    def null_condition(self, base: Path, empty: "Tensors") -> "Tensors":
        """Zeros where the base was trained with them, as its index says: the stock pipeline guides away from zeros."""
        import torch

        if not read_config(base, ".", "model_index.json").get("force_zeros_for_empty_prompt", True):
            return empty
        return {name: torch.zeros_like(tensor) for name, tensor in empty.items()}

    def sample_condition(self, framing: Framing) -> "Tensors":
        """`time_ids` (6,): original height and width, top and left of the crop, height and width trained at."""
        import torch

        return {"time_ids": torch.tensor([*framing.original, *framing.crop, *framing.target], dtype=torch.float32)}

    def denoise(self, denoiser: "nn.Module", x_t: "Tensor", timestep: "Tensor", cond: "Tensors") -> "Tensor":
        """x_t (B, C, h, w), timestep (B,), cond as above, batched -> (B, C, h, w)."""
        added = {"text_embeds": cond["pooled_prompt_embeds"], "time_ids": cond["time_ids"]}
        return denoiser(
            x_t, timestep, encoder_hidden_states=cond["prompt_embeds"], added_cond_kwargs=added, return_dict=False
        )[0]


REFINER = (
    "is the SDXL refiner, which takes over a base model's last steps and is not trained on captions; "
    'use its base, base.model = "stabilityai/stable-diffusion-xl-base-1.0"'
)
