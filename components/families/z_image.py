"""Z-Image: Qwen3's states of a text of any length, in one stream with FLUX.1's latents."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.families.family import MULTISTEP, Geometry, read_config
from components.families.language_model import LanguageModelFamily, texts_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from components.families.family import Tensors

RESOLUTION = 1024  # pixels, as the stock pipeline has it: no config says it
PATCH = 2
TIME_UNITS = 1000
ATTENTION = (r"attention\.to_q", r"attention\.to_k", r"attention\.to_v", r"attention\.to_out\.0")
FEED_FORWARD = (r"feed_forward\.w[123]",)
TARGETS = {
    "attention": ATTENTION,
    "attention-mlp": ATTENTION + FEED_FORWARD,
    "all-linear": (r"(?:layers|noise_refiner|context_refiner)\..*",),  # modulation too
    "all": (".*",),
}


class ZImage(LanguageModelFamily):
    """Z-Image Team 2025, arXiv:2511.22699."""

    name = "z-image"
    pipeline = "ZImagePipeline"
    denoiser = "ZImageTransformer2DModel"
    text_encoder = "Qwen3Model"
    targets = TARGETS

    def geometry(self, base: Path) -> Geometry:
        vae = read_config(base, "vae")
        downscale = 2 ** (len(vae["block_out_channels"]) - 1)
        return Geometry.of(RESOLUTION, downscale * PATCH, downscale, vae["latent_channels"], PATCH)

    def modelspec(self, base: Path) -> str:
        return "Z-Image"

    def prompt_condition(self, stock: Any, prompts: Sequence[str]) -> "Tensors":
        """`prompt_embeds` (B, L, D) and their mask: what is text of 512 tokens."""
        return texts_of(stock.encode_prompt(list(prompts), do_classifier_free_guidance=False)[0])

    def denoise(self, denoiser: "nn.Module", x_t: "Tensor", timestep: "Tensor", cond: "Tensors") -> "Tensor":
        """x_t (B, C, h, w), timestep (B,) in [0, 1000], cond as above, batched -> velocity (B, C, h, w).

        The transformer's time runs from noise to data, and so does its velocity; it takes lists of (C, 1, h, w) and
        of (L, D).
        """
        import torch

        texts = [row[mask] for row, mask in zip(cond["prompt_embeds"], cond["prompt_embeds_mask"], strict=True)]
        frames = denoiser(list(x_t.unsqueeze(2)), (TIME_UNITS - timestep) / TIME_UNITS, texts, return_dict=False)[0]
        return -torch.stack(frames).squeeze(2)

    def generation_options(self, pipeline: Any, guidance_scale: float, batch_size: int) -> dict[str, Any]:
        """The stock pipeline counts guidance from 0, which is none, instead of from 1."""
        return {"guidance_scale": guidance_scale - 1}

    def unfit_samplers(self, scheduler: Mapping[str, Any]) -> tuple[str, ...]:
        return (*MULTISTEP, "unipc", "flow_heun")
