"""Text encoders of transformers, as the stock pipelines call them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.families.placement import placed

if TYPE_CHECKING:
    import torch

    from components.families.family import Tensors


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
        self.part, self.tokenizer_part = f"text_encoder{suffix}", f"tokenizer{suffix}"  # of the pipeline
        self.tokenizer: Any = getattr(transformers, tokenizer).from_pretrained(base, subfolder=self.tokenizer_part)
        whole: Any = getattr(transformers, model).from_pretrained(
            base, subfolder=self.part, dtype=dtype, use_safetensors=True
        )
        self.device, self.model = device, placed((whole.base_model if headless else whole).eval(), device)
        self.learned = False  # whether the tokenizer was given tokens, which may stand for several vectors each

    def __call__(self, prompts: Sequence[str], max_length: int | None = None, **options: Any) -> Any:
        """The model's output for prompts that are padded to `max_length` tokens (None: the tokenizer's) or cut there.

        Padding is attended to, as in the stock pipelines, unless the model's config asks for a mask.
        """
        tokens = self.tokenizer(
            self._spelled(prompts),
            padding="max_length",
            truncation=True,
            return_tensors="pt",
            max_length=max_length or self.tokenizer.model_max_length,
        )
        masked = getattr(self.model.config, "use_attention_mask", False)
        mask = tokens.attention_mask.to(self.device) if masked else None
        return self.model(tokens.input_ids.to(self.device), attention_mask=mask, **options)

    def _spelled(self, prompts: Sequence[str]) -> list[str]:
        """A learned token with the names of all its vectors in its place, by the stock pipelines' own function."""
        if not self.learned:
            return list(prompts)
        from diffusers.loaders.textual_inversion import TextualInversionLoaderMixin

        spelled: Any = TextualInversionLoaderMixin().maybe_convert_prompt(list(prompts), self.tokenizer)
        return spelled


class ClipPrompts(ABC):
    """The CLIP text encoders of a base, which can be trained, and how prompts become what its denoiser is told."""

    def __init__(self, *clips: TextModel):
        self.clips = clips

    @abstractmethod
    def condition(self, prompts: Sequence[str], others: "Tensors") -> "Tensors":
        """The conditioning of prompts, on the encoders' device and with gradients where torch takes them.

        `others` holds what encoders that are never trained make of the same prompts, alone or, as the cache has it,
        behind what these ones made of them before they were trained.
        """


class ClipPromptEncoder:
    """A family's `PromptEncoder`: the same function that is trained, without gradients."""

    def __init__(self, prompts: ClipPrompts, others: Callable[[Sequence[str]], "Tensors"] = lambda prompts: {}):
        self._prompts, self._others = prompts, others

    def encode(self, prompts: Sequence[str]) -> "Tensors":
        import torch

        with torch.inference_mode():
            tensors = self._prompts.condition(prompts, self._others(prompts))
            return {name: tensor.cpu() for name, tensor in tensors.items()}
