"""Prior preservation (Ruiz et al. 2022, DreamBooth, arXiv:2208.12242, section 3.3): what the base makes of a class.

The base draws pictures of the class once; they are kept by content like every gallery and latent, and trained on
beside the data, so that the adapter does not forget the class for the subject. As in kohya's trainers there are as
many of them in an epoch as training samples, each loss times `prior_loss_weight`. Pictures of sources with `is_reg`,
which someone has chosen, take part in the same way, with or without drawn ones.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from components.config import EvaluationConfig, TrainingConfig
from components.curation.manifest import SampleRow
from components.curation.pixels import decode, rgb_digest
from components.evaluation.generation import Picture, Request, Settings, draw_gallery
from components.families.bases import BaseModel
from components.latents.buckets import Sizing
from components.latents.caching import cache_latents
from components.latents.wording import Wording
from components.stages import Bench


def class_rows(bench: Bench, base: BaseModel, training: TrainingConfig, sizing: Sizing) -> list[SampleRow]:
    """The class's pictures as samples whose latents and caption are in the cache; empty without a class prompt.

    Their seeds count from 0: asking for more later draws only what is missing of whole micro-batches.
    """
    prompt, count = training.class_prompt, training.num_class_images
    if prompt is None:
        return []
    settings = Settings.of(EvaluationConfig(), sizing.resolution)
    settings = replace(settings, batch_size=min(settings.batch_size, count))
    requests = [Request(0, prompt, None, seed) for seed in range(count)]
    pictures = draw_gallery(bench, base, None, requests, settings, run_uid=None, on_progress=lambda drawn: None)
    rows = [_row(bench, picture, prompt) for picture in pictures]
    cache_latents(bench, rows, base, sizing, lambda done, total: None, wording=Wording.of(training))
    return rows


def spread_over(rows: Sequence[SampleRow], count: int) -> list[SampleRow]:
    """`count` rows, each as often as any other or once more; none where there are none."""
    return [rows[i % len(rows)] for i in range(count)] if rows else []


def _row(bench: Bench, picture: Picture, prompt: str) -> SampleRow:
    image = decode(bench.store.read(picture.sha256))
    return SampleRow(
        sha256=picture.sha256,
        rgb_digest=rgb_digest(image),
        file_name=f"class-{picture.request.seed}.png",
        text=prompt,
        group=None,
        component=hashlib.sha256(prompt.encode()).hexdigest()[:16],
        split="train",
        width=image.width,
        height=image.height,
        licence=None,
        author=None,
        source=None,
        repeats=1,
    )
