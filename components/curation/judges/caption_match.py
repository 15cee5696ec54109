"""How well a caption fits its picture: the cosine of CLIP's features of both."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from components.config import CheckConfig
from components.curation.judges.plugins import Judge, Plugin, clip_source
from components.evaluation.model_sources import locate


def _load(check: CheckConfig, device: str) -> Judge:
    from components.evaluation.embedders import ClipEmbedder

    clip = ClipEmbedder(clip_source("caption_match", check), device)

    def judge(images: Sequence[Image.Image], captions: Sequence[str]) -> list[float]:
        pictures, texts = clip(images).astype(np.float64), clip.texts(captions).astype(np.float64)
        lengths = np.linalg.norm(pictures, axis=1) * np.linalg.norm(texts, axis=1)
        return ((pictures * texts).sum(axis=1) / np.maximum(lengths, 1e-12)).tolist()

    return judge


CAPTION_MATCH = Plugin("caption_match", "below", "Its caption fits it by {score:.2f}, below {threshold:g}.",
                       reads_caption=True, load=_load,
                       revision=lambda check: f"clip {locate(clip_source('caption_match', check))[2]}")
