"""Text encoders of transformers, as the stock pipelines call them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.families.placement import placed

if TYPE_CHECKING:
    import torch


class TextModel:
    """A base's tokenizer and text model number `place` (1 is called "text_encoder", 2 "text_encoder_2", ...)."""

    def __init__(
        self,
        base: Path,
        place: int,
        tokenizer: str,
        model: str,
        device: str,
        dtype: "torch.dtype",
        *,
        headless: bool = False,
    ):
        """`headless` leaves away a language model's last layer, which is as wide as the vocabulary."""
        import transformers

        suffix = "" if place == 1 else f"_{place}"
        self.tokenizer: Any = getattr(transformers, tokenizer).from_pretrained(base, subfolder=f"tokenizer{suffix}")
        whole: Any = getattr(transformers, model).from_pretrained(
            base, subfolder=f"text_encoder{suffix}", dtype=dtype, use_safetensors=True
        )
        self.device, self.model = device, placed((whole.base_model if headless else whole).eval(), device)

    def __call__(self, prompts: Sequence[str], max_length: int | None = None, **options: Any) -> Any:
        """The model's output for prompts that are padded to `max_length` tokens (None: the tokenizer's) or cut there.

        Padding is attended to, as in the stock pipelines, unless the model's config asks for a mask.
        """
        import torch

        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            return_tensors="pt",
            max_length=max_length or self.tokenizer.model_max_length,
        )
        masked = getattr(self.model.config, "use_attention_mask", False)
        mask = tokens.attention_mask.to(self.device) if masked else None
        with torch.inference_mode():
            return self.model(tokens.input_ids.to(self.device), attention_mask=mask, **options)
