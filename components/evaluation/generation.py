"""Drawing galleries with the stock pipeline, so that what is shown is what anyone who loads the model gets.

The bits of a picture depend on the shape of the batch it is made in, not on its neighbours: every micro-batch is full,
padded with its last request, and the batch's size and the thread count belong to the gallery's fingerprint.
"""

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL.PngImagePlugin import PngInfo

from components.config import EvaluationConfig
from components.diffusion.samplers import sampler_from_scheduler
from components.families import FAMILIES
from components.families.bases import BaseModel
from components.families.placement import place_pipeline, release_memory
from components.stages import Bench, Product, ensure, stage_key
from components.storage import Store
from components.tensors import default_device
from components.training.adapters import load_adapter


@dataclass(frozen=True, slots=True)
class Request:
    """One picture to draw."""

    prompt_index: int
    prompt: str
    group: str | None  # the held-out concept that the prompt asks for
    seed: int

    @property
    def concept(self) -> str:
        """What pictures are grouped by: the concept, else the prompt itself."""
        return self.group or self.prompt


@dataclass(frozen=True, slots=True)
class Settings:
    """How pictures are drawn; with the base, the adapter and the requests it fixes every bit on one machine."""

    num_inference_steps: int
    guidance_scale: float
    scheduler: str
    side: int  # pixels
    batch_size: int
    threads: int

    @classmethod
    def of(cls, config: EvaluationConfig, side: int) -> "Settings":
        return cls(
            config.num_inference_steps,
            config.guidance_scale,
            config.scheduler,
            side,
            config.batch_size,
            torch.get_num_threads(),
        )


@dataclass(frozen=True, slots=True)
class Picture:
    """A drawn request: where in which micro-batch it was made, and the sha256 of its PNG in the store."""

    request: Request
    batch_index: int
    batch_row: int
    sha256: str


def draw_gallery(
    bench: Bench,
    base: BaseModel,
    adapter_sha256: str | None,
    requests: Sequence[Request],
    settings: Settings,
    *,
    run_uid: str | None,
    on_progress: Callable[[int], None],
) -> list[Picture]:
    """Draw the requests with the base alone or with an adapter; micro-batches that were drawn before are reused."""
    pictures: list[Picture] = []
    pipeline: Any = None

    def draw(batch: Sequence[Request]) -> Product:
        nonlocal pipeline
        pipeline = pipeline or open_pipeline(bench.store, base, adapter_sha256, settings.scheduler)
        images = draw_batch(pipeline, batch, settings)
        refs = [
            bench.store.put(_png(image, request, settings, base, adapter_sha256))
            for image, request in zip(images, batch, strict=True)
        ]
        return Product({str(row): ref for row, ref in enumerate(refs)}, items=len(refs))

    for index, start in enumerate(range(0, len(requests), settings.batch_size)):
        batch = requests[start : start + settings.batch_size]
        key = stage_key(
            "generate",
            inputs={"base": base.digest, "adapter": adapter_sha256 or ""},
            config={"settings": asdict(settings), "requests": [asdict(request) for request in batch]},
        )
        result = ensure(bench, "generate", key, lambda batch=batch: draw(batch), run_uid=run_uid)
        pictures += [
            Picture(request, index, row, result.product.outputs[str(row)].sha256) for row, request in enumerate(batch)
        ]
        on_progress(len(batch))
    return pictures


def open_pipeline(store: Store, base: BaseModel, adapter_sha256: str | None, scheduler: str) -> Any:
    """The stock pipeline of a base, in its family's precision, with an adapter of the store loaded the stock way.

    Raises: BaseModelError when `scheduler` names a sampler that is not for the base or its stock pipeline.
    """
    family, device = base.architecture, default_device()
    release_memory()  # of the pipeline before
    pipeline = family.load_pipeline(base.path, "cpu", family.dtype(device))
    if scheduler != "auto":
        config = pipeline.scheduler.config
        pipeline.scheduler = sampler_from_scheduler(scheduler, config, unfit=family.unfit_samplers(config))
    if adapter_sha256 is not None:
        load_adapter(pipeline, store.read(adapter_sha256), base.architecture, base.path)
    return place_pipeline(pipeline, family.denoiser_part, device)


def draw_batch(pipeline: Any, requests: Sequence[Request], settings: Settings) -> list[Any]:
    """PIL images of at most one micro-batch of requests, each from its own seed."""
    padded = list(requests) + [requests[-1]] * (settings.batch_size - len(requests))
    family = FAMILIES[type(pipeline).__name__]
    images = pipeline(
        prompt=[request.prompt for request in padded],
        generator=[torch.Generator("cpu").manual_seed(request.seed) for request in padded],
        num_inference_steps=settings.num_inference_steps,
        height=settings.side,
        width=settings.side,
        **family.generation_options(pipeline, settings.guidance_scale, len(padded)),
    ).images
    return images[: len(requests)]


def _png(image: Any, request: Request, settings: Settings, base: BaseModel, adapter_sha256: str | None) -> bytes:
    """The picture with its provenance: the text chunk that web interfaces read, and ours as JSON."""
    text = PngInfo()
    text.add_text(
        "parameters",
        f"{request.prompt}\nSteps: {settings.num_inference_steps}, Sampler: {settings.scheduler}, "
        f"CFG scale: {settings.guidance_scale}, Seed: {request.seed}, "
        f"Size: {settings.side}x{settings.side}",
    )
    text.add_text(
        "safelight",
        json.dumps(
            {"request": asdict(request), "settings": asdict(settings), "base": base.digest, "adapter": adapter_sha256},
            sort_keys=True,
        ),
    )
    text.add_itxt("XML:com.adobe.xmp", DIGITAL_SOURCE)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=text)
    return buffer.getvalue()


DIGITAL_SOURCE = (  # IPTC DigitalSourceType: made by a trained model
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" Iptc4xmpExt:DigitalSourceType='
    '"http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"/></rdf:RDF></x:xmpmeta>'
)
