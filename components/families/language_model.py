"""Families whose prompts are read by a language model, inside a template that belongs to the stock pipeline.

The stock pipeline itself is asked, with nothing but its text side loaded: templates, lengths and what is dropped again
are then its own, whatever its version.
"""

import inspect
from abc import abstractmethod
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.families.family import Family
from components.families.text import TextModel

if TYPE_CHECKING:
    from torch import Tensor

    from components.families.family import Tensors


class LanguageModelFamily(Family):
    """The parts that these families have in common, and the text side of their stock pipelines."""

    parts = ("vae", "text_encoder", "tokenizer", "transformer", "scheduler")
    prompt_parts = ("text_encoder", "tokenizer")
    tokenizer: str = "Qwen2Tokenizer"  # classes of transformers
    text_encoder: str

    @abstractmethod
    def prompt_condition(self, stock: Any, prompts: Sequence[str]) -> "Tensors":
        """What the text side of the stock pipeline gives for prompts; one's bits do not depend on the others."""

    def prompt_settings(self, base: Path) -> dict[str, Any]:
        """The template is that of the diffusers at hand."""
        return {"diffusers": version("diffusers")}

    def load_prompt_encoder(self, base: Path, device: str) -> "StockPromptEncoder":
        return StockPromptEncoder(self, base, device)


class StockPromptEncoder:
    """`prompt_embeds` (B, L, D) of a stock pipeline that has a tokenizer and a text encoder only, and their mask."""

    def __init__(self, family: LanguageModelFamily, base: Path, device: str):
        import diffusers

        dtype = family.dtype(device)
        text = TextModel(base, 1, family.tokenizer, family.text_encoder, device, dtype, headless=True)
        cls: Any = getattr(diffusers, family.pipeline)
        self._stock = cls(tokenizer=text.tokenizer, text_encoder=text.model, vae=None, transformer=None, scheduler=None)
        self._family = family

    def encode(self, prompts: Sequence[str]) -> "Tensors":
        import torch

        with torch.inference_mode():
            return {name: tensor.cpu() for name, tensor in self._family.prompt_condition(self._stock, prompts).items()}


def default_of(stock: Any, argument: str) -> Any:
    """What the stock pipeline takes for an argument that its caller leaves out."""
    return inspect.signature(type(stock).__call__).parameters[argument].default


def texts_of(rows: "Sequence[Tensor]") -> "Tensors":
    """`prompt_embeds` and their mask, of texts (L, D) of different lengths."""
    import torch

    from components.latents.ragged import stacked

    return stacked(
        [{"prompt_embeds": row, "prompt_embeds_mask": row.new_ones(len(row), dtype=torch.bool)} for row in rows]
    )
