"""One passage through a latent cache: ours, or `datasets.map` with the same VAE."""

import gc
import json
import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import diffusers
import numpy as np
import torch
import transformers
from datasets.fingerprint import Hasher
from PIL import Image
from safetensors.torch import save_file

from components.catalog.encodings import locate
from components.config import BaseModelConfig, Recipe, load_recipe
from components.curation.manifest import SampleRow, read_manifest
from components.curation.snapshots import curate, curate_key
from components.families.bases import BaseModel, resolve_base
from components.latents.buckets import Bucket, cover, fit
from components.latents.caching import Prompts, cache_latents
from components.latents.crews import Task, encode_by_crew
from components.latents.encoding import MICRO_BATCH
from components.latents.keys import (
    NULL_PROMPT,
    cache_key,
    caption_item,
    pixel_encoder_key,
    placements,
    sample_item,
    usual_sizing,
)
from components.latents.reading import ShardReader
from components.latents.wording import Wording
from components.stages import Bench, Product, ensure
from components.workspace import Workspace
from tests.benchmarks.paired import Run, cpu_seconds


class Clock:
    """CPU seconds of this process and its children, and wall seconds, of named parts."""

    def __init__(self) -> None:
        self.facts: Run = {}

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        wall, cpu = time.monotonic(), cpu_seconds()
        yield
        self.facts |= {
            f"{part}_cpu_s": round(cpu_seconds() - cpu, 3),
            f"{part}_wall_s": round(time.monotonic() - wall, 3),
        }


def ours(request: dict[str, Any]) -> Run:
    """`find` is the scan of the folder with the curation of what changed, `encode` the caching stage; captions, which
    `theirs` does not have, are embedded before it, as `captions`."""
    clock, recipe = Clock(), load_recipe(Path(request["recipe"]))
    base, size = resolve_base(recipe.base), request["size"]
    home = Workspace(Path(request["home"]))
    bench = Bench.open(home)
    bench.catalog.migrate()
    with clock.measure("find"):
        digest = snapshot_of(bench, recipe, size)
    rows = read_manifest(bench.store, digest)
    captions = [caption_item(text) for text in {NULL_PROMPT, *(row.text for row in rows)}]
    with clock.measure("captions"):
        encode_by_crew(bench, [Task(Prompts(base), [captions])])
    with clock.measure("encode"):
        rows = read_manifest(bench.store, digest)
        key = cache_key(digest, base, usual_sizing(base, size), Wording())
        if request["processes"] == 1:
            result = ensure(bench, "cache", key, lambda: cached(bench, rows, base, size))
            encoded = 0 if result.outcome == "reused" else result.product.facts["encoded_images"]
        else:
            bench.catalog.engine.dispose()
            encoded = in_processes(request["processes"], lambda: cached(Bench.open(home), rows, base, size))
    items = [sample_item(row, *placements(row, usual_sizing(base, size))) for row in rows]
    keys = [item.key for item in items]
    latents = ShardReader(bench.store, locate(bench.catalog, pixel_encoder_key(base), keys))(keys)
    save(request, {row.file_name: i for i, row in enumerate(rows)}, latents)
    return clock.facts | {"encoded": encoded}


def snapshot_of(bench: Bench, recipe: Recipe, size: int) -> str:
    key, scanned = curate_key(bench, recipe.data, recipe.curation, dataset=recipe.name, training_size=size)

    def produce() -> Product:
        return curate(
            bench, recipe.data, recipe.curation, dataset=recipe.name, training_size=size, scanned=scanned, key=key
        )

    return ensure(bench, "curate", key, produce).product.facts["digest"]


def cached(bench: Bench, rows: list[SampleRow], base: BaseModel, size: int) -> Product:
    return cache_latents(bench, rows, base, usual_sizing(base, size), lambda done, total: None)


def in_processes(count: int, work: Callable[[], Product]) -> int:
    """Pictures that forks of this process encode together."""
    readers = []
    for _ in range(count):
        reader, writer = os.pipe()
        if os.fork() == 0:
            os.write(writer, json.dumps(work().facts["encoded_images"]).encode())
            os._exit(0)
        os.close(writer)
        readers.append(reader)
    for _ in range(count):
        os.wait()
    return sum(json.loads(os.read(reader, 100)) for reader in readers)


def theirs(request: dict[str, Any]) -> Run:
    """`find` is load_dataset, `encode` the map.

    As they are fastest: bytes are decoded in the function, batches are the VAE's, arrays have a declared shape, the VAE
    is loaded only where something is encoded, and the fingerprint is given instead of pickled from the VAE.
    """
    datasets.disable_progress_bars()
    clock, base, size = Clock(), resolve_base(BaseModelConfig()), request["size"]
    log = Path(request["home"]) / "encoded.txt"
    log.unlink(missing_ok=True)
    with clock.measure("find"):
        folder: Any = datasets.load_dataset(
            "imagefolder", data_dir=request["pictures"], cache_dir=f"{request['home']}/datasets", split="train"
        )
        folder = folder.cast_column("image", datasets.Image(decode=False))
    geometry = base.architecture.geometry(base.path)
    shape = (geometry.channels, size // geometry.downscale, size // geometry.downscale)
    latent = datasets.Array3D(shape, "float16")

    def encode(batch: dict[str, Any]) -> dict[str, Any]:
        pictures = [Image.open(BytesIO(bytes_of(image))).convert("RGB") for image in batch["image"]]
        arrays = np.stack([np.asarray(fitted(picture, size), dtype=np.float32) for picture in pictures])
        pixels = torch.from_numpy(arrays).permute(0, 3, 1, 2) / 127.5 - 1.0
        with torch.inference_mode():
            posterior = autoencoder(base.path).encode(pixels).latent_dist
        tensors = {"mean": posterior.mean, "logvar": posterior.logvar}
        with log.open("a") as file:
            file.write("x" * len(pictures))
        names = [Path(image["path"]).name for image in batch["image"]]
        return {"name": names} | {name: tensor.to(torch.float16).numpy() for name, tensor in tensors.items()}

    with clock.measure("encode"):
        mapped = folder.map(
            encode,
            batched=True,
            batch_size=MICRO_BATCH,
            num_proc=request["processes"] if request["processes"] > 1 else None,
            remove_columns=folder.column_names,
            features=datasets.Features({"name": datasets.Value("string"), "mean": latent, "logvar": latent}),
            new_fingerprint=Hasher.hash([folder._fingerprint, pixel_encoder_key(base), size]),
        )
    rows = mapped.with_format("torch")
    latents = {name: rows[name][:] for name in ("mean", "logvar")}
    save(request, {name: i for i, name in enumerate(mapped["name"])}, latents)
    return clock.facts | {"encoded": len(log.read_text()) if log.exists() else 0}


def fitted(picture: Image.Image, size: int) -> Image.Image:
    return fit(picture, cover(picture.width, picture.height, Bucket(size, size)))


def bytes_of(image: dict[str, Any]) -> bytes:
    return image["bytes"] or Path(image["path"]).read_bytes()


@cache
def autoencoder(base: Path) -> Any:
    return diffusers.AutoencoderKL.from_pretrained(base, subfolder="vae", use_safetensors=True).eval()


def save(request: dict[str, Any], places: dict[str, int], latents: dict[str, torch.Tensor]) -> None:
    """For the comparison, in the order of the pictures' names."""
    order = [places[name] for name in sorted(places)]
    save_file({name: tensor[order].contiguous() for name, tensor in latents.items()}, request["latents"])


def passage(request: dict[str, Any]) -> Run:
    """In a process of its own, a fork of this one: everything is imported there, and nothing has been used."""
    assert diffusers.AutoencoderKL and transformers.CLIPTextModel and transformers.CLIPTokenizer  # imported when asked
    gc.freeze()
    told = Path(request["home"]) / "told.json"
    child = os.fork()
    if child == 0:
        try:
            run = ours(request) if request["side"] == "ours" else theirs(request)
            told.write_text(json.dumps(run), encoding="utf-8")
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status == 0, f"{request} ended with {os.waitstatus_to_exitcode(status)}"
    return json.loads(told.read_text(encoding="utf-8"))
