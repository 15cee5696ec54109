"""Learned tokens: their vectors for each text encoder, inside an adapter file and beside it.

Inside, `bundle_emb.<token>.<key>` is what A1111 and OneTrainer agreed on and what ComfyUI looks for in its folder of
embeddings: the key is `string_to_param.*` where there is one CLIP text encoder, else the encoder's name, such as
`clip_g` (stable-diffusion-webui, pull request 13568; OneTrainer's LoRA savers; comfy/sd1_clip.py). Diffusers'
`load_lora_weights` refuses a file with such keys; `load_textual_inversion` reads a file of their own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from components.errors import BadInput
from components.layouts.names import ARCHITECTURES
from components.layouts.skeleton import Skeleton
from components.tensors import to_safetensors

PREFIX = "bundle_emb."
ONLY = "string_to_param.*"  # the key where there is one text encoder to learn for


@dataclass(frozen=True, slots=True, eq=False)
class Token:
    """A word of its own and its vectors: part of the pipeline ("text_encoder", ...) -> (vectors, width)."""

    name: str
    vectors: Mapping[str, Tensor]


def encoder_keys(pipeline: str) -> dict[str, str]:
    """The text encoders of an architecture by what other programs call them: part -> "clip_l", ..., "t5xxl"."""
    return {part: encoder.comfyui.split(".")[0] for part, encoder in ARCHITECTURES[pipeline].encoders.items()}


def bundled(tokens: Sequence[Token], pipeline: str) -> dict[str, Tensor]:
    """Tokens as tensors of an adapter file."""
    keys = encoder_keys(pipeline)
    names = keys if len(keys) > 1 else dict.fromkeys(keys, ONLY)
    return {
        f"{PREFIX}{token.name}.{names[part]}": vectors for token in tokens for part, vectors in token.vectors.items()
    }


def unbundled(tensors: Mapping[str, Tensor], pipeline: str, origin: str) -> tuple[dict[str, Tensor], tuple[Token, ...]]:
    """An adapter file's tensors without its tokens, and those. Raises BadInput for keys that have no place here."""
    parts = {key: part for part, key in encoder_keys(pipeline).items()}
    found: dict[str, dict[str, Tensor]] = {}
    rest = dict(tensors)
    for key in [key for key in rest if key.startswith(PREFIX)]:
        name, _, encoder = key.removeprefix(PREFIX).partition(".")
        part = next(iter(parts.values()), None) if encoder.startswith("string_to_param.") else parts.get(encoder)
        vectors = rest.pop(key)
        if not name or part is None or vectors.dim() > 2:
            known = ", ".join(parts) or "none, it has no CLIP text encoder"
            raise BadInput(
                f"{origin}: {key[:80]!r} of shape {tuple(vectors.shape)} is no embedding for "
                f"{ARCHITECTURES[pipeline].title}, which reads {known}; use it with the base it was made for"
            )
        found.setdefault(name, {})[part] = vectors.reshape(-1, vectors.shape[-1])
    return rest, tuple(Token(name, vectors) for name, vectors in sorted(found.items()))


def require_widths(tokens: Sequence[Token], skeleton: Skeleton, origin: str) -> None:
    """Raises BadInput for vectors that are not as wide as the base's own."""
    for token in tokens:
        for part, vectors in token.vectors.items():
            shapes = skeleton.shapes.get(part, {})
            width = next((shape[1] for path, shape in shapes.items() if path.endswith("token_embedding")), None)
            if vectors.shape[1] != width:
                raise BadInput(
                    f"{origin}: the token {token.name} has vectors of {vectors.shape[1]} for {part}, whose own have "
                    f"{width or 'no place'} in {skeleton.name}; use it with the base it was made for"
                )


def embedding_file(token: Token, pipeline: str, metadata: Mapping[str, str] | None = None) -> bytes:
    """A file of its own for one token: diffusers' name and vectors, or a tensor for each of several encoders."""
    keys = encoder_keys(pipeline)
    if len(token.vectors) == 1:
        return to_safetensors({token.name: next(iter(token.vectors.values()))}, metadata)
    return to_safetensors({keys[part]: vectors for part, vectors in token.vectors.items()}, metadata)
