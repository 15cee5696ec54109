"""Figures and pictures of the embedded base for its model card: reconstruction, a grid, retrieval, curves."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from numpy.typing import NDArray
from PIL import Image

from components.training.autoencoder import psnr
from components.training.order import epoch_order
from components.training.pictures import Pictures, to_unit

Embed = Callable[[Sequence[Image.Image]], NDArray[np.float32]]
GRID_CONCEPTS = ("rocket", "cat", "apple", "car", "house", "crown", "tulip", "umbrella", "guitar", "lock")
STYLES = ("noto", "twemoji", "fluent")
STEPS, GUIDANCE = 25, 4.0
BATCH = 20


def generate(pipeline: StableDiffusionPipeline, prompts: Sequence[str], seed: int = 0) -> list[Image.Image]:
    """One picture per prompt with the settings the card states; picture i has its own generator, seeded seed + i."""
    images: list[Image.Image] = []
    for start in range(0, len(prompts), BATCH):
        chunk = list(prompts[start : start + BATCH])
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(chunk))]
        output = pipeline(chunk, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generators)
        images += output.images  # pyright: ignore[reportAttributeAccessIssue]
    return images


def concept_grid(pipeline: StableDiffusionPipeline, concepts: Sequence[str] = GRID_CONCEPTS) -> Image.Image:
    """One column per concept, one row per style, no words: for naming by somebody who has not seen the prompts."""
    images = generate(pipeline, [f"{concept}, {style} style" for style in STYLES for concept in concepts])
    return tile(images, columns=len(concepts), scale=2)


def tile(images: Sequence[Image.Image], columns: int, scale: int = 1, gap: int = 4) -> Image.Image:
    """Pictures of one size in rows on white."""
    width, height = (side * scale for side in images[0].size)
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, image in enumerate(images):
        place = (i % columns * (width + gap), i // columns * (height + gap))
        sheet.paste(image.resize((width, height), Image.Resampling.LANCZOS), place)
    return sheet


def retrieval(
    queries: NDArray, query_names: Sequence[str], references: NDArray, reference_names: Sequence[str], k: int = 5
) -> float:
    """Share of queries whose concept is among the k nearest concepts; a concept is as near as its nearest reference.

    queries (n, d) and references (m, d) are features, compared by cosine.
    """
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries.astype(np.float64), references)]
    similarity = unit[0] @ unit[1].T  # (n, m)
    names = sorted(set(reference_names))
    columns = {name: [j for j, other in enumerate(reference_names) if other == name] for name in names}
    by_concept = np.stack([similarity[:, columns[name]].max(axis=1) for name in names], axis=1)  # (n, concepts)
    nearest = np.argsort(-by_concept, axis=1)[:, :k]
    return float(np.mean([query in {names[j] for j in row} for query, row in zip(query_names, nearest, strict=True)]))


def generated_retrieval(pipeline: StableDiffusionPipeline, pictures: Pictures, embed: Embed, size: int = 200) -> dict:
    """Top-1 and top-5 retrieval of `size` generations against all real pictures, beside its ceiling.

    Prompts are name and style of `size` trained pictures. The ceiling takes the real pictures themselves as queries,
    against the other vendors' pictures alone: how well features find a concept across drawing styles. To be comparable,
    the generations are scored the same way too, against the vendors whose style was not asked for.
    """
    chosen = epoch_order(1, 0, pictures.sample_ids)[:size]
    rows = [pictures.rows[i] for i in chosen]
    references = embed([_image(pixels) for pixels in pictures.pixels])
    names, styles = [row.name for row in pictures.rows], np.array([row.style for row in pictures.rows])
    generated = embed(generate(pipeline, [f"{row.name}, {row.style} style" for row in rows]))

    def across_styles(queries: NDArray, k: int) -> float:
        scores = []
        for style in STYLES:
            asked = [i for i, row in enumerate(rows) if row.style == style]
            others = np.flatnonzero(styles != style)
            score = retrieval(queries[asked], [rows[i].name for i in asked], references[others],
                              [names[j] for j in others], k)  # fmt: skip
            scores.append(score * len(asked))
        return sum(scores) / len(rows)

    own = [row.name for row in rows]
    return {
        "generations": len(rows),
        "concepts": len(set(names)),
        "top1_all_references": retrieval(generated, own, references, names, 1),
        "top5_all_references": retrieval(generated, own, references, names, 5),
        "top5_other_vendors": across_styles(generated, 5),
        "top5_other_vendors_ceiling": across_styles(references[list(chosen)], 5),
    }


def evaluate_base(pipeline_dir: Path, pictures: Pictures, held_out: Pictures, embed: Embed, out: Path) -> dict:
    """Every figure of the model card, written to `out/figures.json` beside `grid.png`; returns the figures.

    `pictures` are the concrete ones the denoiser knows, `held_out` those that the autoencoder never saw.
    """
    out.mkdir(parents=True, exist_ok=True)
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_dir)
    pipeline.set_progress_bar_config(disable=True)
    concept_grid(pipeline).save(out / "grid.png")
    figures = {
        "reconstruction_psnr_db": round(psnr(pipeline.vae, to_unit(held_out.pixels)), 2),
        "reconstruction_images": len(held_out.rows),
        "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE,
        **generated_retrieval(pipeline, pictures, embed),
    }
    (out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures


def draw_curves(journals: dict[str, Path], path: Path) -> None:
    """Training curves as PNG: loss and PSNR of the autoencoder, loss and fixed-noise losses of the denoiser.

    `journals` maps "vae" and "unet" to their journal.jsonl.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3 * len(journals)), layout="constrained")
    for row, (stage, journal) in enumerate(journals.items()):
        events = [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()]
        keys = [key for key in ("loss", "psnr", "train_loss", "held_out_loss") if any(key in event for event in events)]
        groups = [["loss"], [key for key in keys if key != "loss"]]
        for column, group in enumerate(groups):
            axes = figure.add_subplot(len(journals), 2, 2 * row + column + 1)
            for key in group:
                points = [(event["step"], event[key]) for event in events if key in event]
                axes.plot(*zip(*points, strict=True), label=CURVE_LABELS[key], linewidth=1)
            axes.set(xlabel="step", title=f"{'autoencoder' if stage == 'vae' else 'denoiser'}")
            axes.legend()
            axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


CURVE_LABELS = {
    "loss": "training loss",
    "psnr": "held-out PSNR, dB",
    "train_loss": "fixed-noise loss, trained pictures",
    "held_out_loss": "fixed-noise loss, held-out pictures",
}


def _image(pixels: torch.Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())
