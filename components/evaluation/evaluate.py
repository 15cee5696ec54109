"""The evaluate stage: a paired gallery of base, champion and candidate, metrics with intervals, and the verdict."""

import io
import json
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load
from sqlalchemy import select

from components.catalog.database import Catalog
from components.catalog.models import Evaluation, Generation
from components.config import EvaluationConfig, PromotionConfig
from components.curation.manifest import SampleRow
from components.evaluation import intervals, metrics
from components.evaluation.embedders import Embedder, load_embedder
from components.evaluation.feature_cache import EmbeddedSamples, features_of_gallery, open_drawn
from components.evaluation.gate import Comparison, Evidence, decide, gate_rules
from components.evaluation.generation import Picture, Request, Settings, draw_gallery
from components.evaluation.intervals import Interval
from components.evaluation.palette import asked_colour, background, nearest_colour
from components.evaluation.prompts import gallery_requests, turn_of
from components.evaluation.sheet import contact_sheet
from components.families.bases import BaseModel
from components.stages import Bench, Product, canonical_json
from components.storage import ObjectRef

MATCH_RANK = 5  # a prompt is matched when the right concept is among this many nearest references
Features = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Contender:
    """A model in the gallery: "base", "champion" or "candidate"; the base has no adapter and step 0."""

    role: str
    adapter_sha256: str | None
    step: int


@dataclass(frozen=True, slots=True)
class Scores:
    """Per-picture values of one contender over the main gallery (n pictures), and its variety by prompt."""

    features: Features  # (n, d)
    rank: NDArray[np.int64]  # (n,) of the right concept among the references, 1 is best
    style: NDArray[np.float64]  # (n,) CSLS-corrected cosine to the references
    nearest: NDArray[np.float64]  # (n,) cosine to the nearest training picture
    nearest_row: NDArray[np.int64]  # (n,) which one
    colour: NDArray[np.float64]  # (n,) 1 right, 0 wrong, nan where the prompt asks for none
    variety: dict[Hashable, float]  # prompt -> mean 1 - cos between its seeds


def evaluate(
    bench: Bench,
    key: str,
    rows: Sequence[SampleRow],
    base: BaseModel,
    contenders: Sequence[Contender],
    config: EvaluationConfig,
    promotion: PromotionConfig,
    resolution: int,
    validation: ObjectRef | None,
    *,
    final_step: int,
    snapshot_digest: str,
    run_uid: str,
    on_progress: Callable[[int, int], None],
) -> Product:
    """Draw, embed, score and judge. `contenders` holds the base first and the candidate last.

    Outputs: "gallery" (JSON lines), "report" (JSON), "sheet" (PNG). Rows: one Evaluation, one Generation per picture.
    """
    requests = gallery_requests([row for row in rows if row.split == "test"], config)
    settings = Settings.of(config, resolution)
    total, done = len(requests) * len(contenders), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        on_progress(min(done, total), total)

    galleries = {
        c.role: draw_gallery(bench, base, c.adapter_sha256, requests, settings, run_uid=run_uid, on_progress=advance)
        for c in contenders
    }
    embedder = load_embedder(config.embedder)
    references = EmbeddedSamples(bench, embedder, [row for row in rows if row.split == "test"], base, resolution)
    training = EmbeddedSamples(bench, embedder, [row for row in rows if row.split == "train"], base, resolution)
    main = [i for i, request in enumerate(requests) if turn_of(request, config) < config.seeds_per_prompt]
    scores = {
        role: _score(bench, embedder, pictures, main, config, references, training)
        for role, pictures in galleries.items()
    }
    fingerprint = evaluation_fingerprint(base, settings, requests, embedder, snapshot_digest)
    document, evidence = _compare(scores, [requests[i] for i in main], config, references, training, fingerprint)
    if validation is not None:
        document["validation_ratio"] = _validation_ratio(bench, validation, final_step)
    verdict = asdict(decide(gate_rules(promotion), evidence))
    _record(
        bench.catalog,
        key,
        run_uid,
        fingerprint,
        contenders,
        galleries,
        scores,
        main,
        training.rows,
        snapshot_digest,
        document,
        verdict,
    )
    lines = [{"role": role, **asdict(picture)} for role, pictures in galleries.items() for picture in pictures]
    gallery = bench.store.put("".join(json.dumps(line, sort_keys=True) + "\n" for line in lines).encode())
    report = {"metrics": document, "gate": verdict, "fingerprint": fingerprint, "settings": asdict(settings)}
    sheet = contact_sheet(bench.store, galleries, [requests[i] for i in main], main, references.rows)
    return Product(
        {"gallery": gallery, "report": bench.store.put(canonical_json(report)), "sheet": bench.store.put(_png(sheet))},
        report,
        items=len(lines),
    )


def evaluation_fingerprint(
    base: BaseModel, settings: Settings, requests: Sequence[Request], embedder: Embedder, snapshot_digest: str
) -> str:
    """Equal fingerprints mean that two evaluations may be compared."""
    import hashlib

    body = {
        "base": base.digest,
        "settings": asdict(settings),
        "requests": [asdict(request) for request in requests],
        "embedder": [embedder.name, embedder.revision],
        "snapshot": snapshot_digest,
    }
    return hashlib.sha256(canonical_json(body)).hexdigest()[:32]


def _score(
    bench: Bench,
    embedder: Embedder,
    pictures: Sequence[Picture],
    main: Sequence[int],
    config: EvaluationConfig,
    references: EmbeddedSamples,
    training: EmbeddedSamples,
) -> Scores:
    everything = features_of_gallery(bench, embedder, pictures)
    features = everything[list(main)]
    concepts = [pictures[i].request.concept for i in main]
    rank = metrics.retrieval_rank(features, references.features, concepts, references.concepts)
    nearest, nearest_row = metrics.nearest(features, training.features)
    repeated = [i for i, p in enumerate(pictures) if p.request.prompt_index < config.variety_prompts]
    by_prompt = (
        metrics.prompt_diversity(everything[repeated], [pictures[i].request.prompt_index for i in repeated])
        if repeated
        else {}
    )
    palette = {word: _rgb(value) for word, value in config.palette.items()}
    colour = np.array(
        [_colour_right(open_drawn(bench, pictures[i]), pictures[i].request.prompt, palette) for i in main]
    )
    return Scores(
        features, rank, metrics.style_similarity(features, references.features), nearest, nearest_row, colour, by_prompt
    )


def _rgb(value: str) -> tuple[int, int, int]:
    return int(value[1:3], 16), int(value[3:5], 16), int(value[5:7], 16)


def _colour_right(image: Image.Image, prompt: str, palette: dict[str, tuple[int, int, int]]) -> float:
    asked = asked_colour(prompt, palette)
    if asked is None:
        return float("nan")
    return float(nearest_colour(background(image), palette) == asked)


def _compare(
    scores: dict[str, Scores],
    requests: Sequence[Request],
    config: EvaluationConfig,
    references: EmbeddedSamples,
    training: EmbeddedSamples,
    fingerprint: str,
) -> tuple[dict[str, Any], Evidence]:
    """The metrics document of the run card, and what the gate looks at."""
    clusters = [request.concept for request in requests]
    rival = "champion" if "champion" in scores else "base"
    document: dict[str, Any] = {}
    primary: dict[str, Comparison] = {}
    guards: dict[str, Comparison] = {}

    def enter(name: str, better: Any, values: dict[str, Interval], difference: Callable[[str], Interval]) -> None:
        against = difference(rival)
        document[name] = {
            "candidate": values["candidate"].value,
            "base": values["base"].value,
            "champion": values["champion"].value if "champion" in values else None,
            "candidate_interval": _bounds(values["candidate"]),
            "base_interval": _bounds(values["base"]),
            "difference": {"value": against.value, **_bounds(against)},
            "against": rival,
            "n": against.n,
            "clusters": against.clusters,
            "better": better,
        }
        primary[name] = Comparison(name, values["candidate"].value, values[rival].value, against, better, rival)
        guards[name] = Comparison(
            name, values["candidate"].value, values["base"].value, difference("base"), better, "base"
        )

    def enter_mean(name: str, better: Any, of: Callable[[Scores], Any], labels: Sequence[Hashable]) -> None:
        enter(
            name,
            better,
            {role: intervals.mean_interval(of(score), labels) for role, score in scores.items()},
            lambda other: intervals.paired_difference_interval(of(scores["candidate"]), of(scores[other]), labels),
        )

    blocks = {
        role: intervals.kid_blocks(score.features, references.features, clusters) for role, score in scores.items()
    }
    enter(
        "kid",
        "lower",
        {role: intervals.kid_interval(block) for role, block in blocks.items()},
        lambda other: intervals.kid_difference_interval(blocks["candidate"], blocks[other]),
    )
    enter_mean("prompt_match", "higher", lambda score: (score.rank <= MATCH_RANK).astype(float), clusters)
    enter_mean("style", "higher", lambda score: score.style, clusters)
    enter_mean("nearest_training", "lower", lambda score: score.nearest, clusters)
    prompts = sorted(scores["base"].variety)  # type: ignore[type-var]
    if prompts:
        enter_mean("variety", "higher", lambda score: [score.variety[prompt] for prompt in prompts], prompts)
        share = intervals.ratio_interval(
            [scores["candidate"].variety[p] for p in prompts], [scores["base"].variety[p] for p in prompts], prompts
        )
        guards["variety"] = Comparison(
            "variety",
            document["variety"]["candidate"],
            document["variety"]["base"],
            _shifted(share, -1.0),
            "higher",
            "base",
        )
    asked = ~np.isnan(scores["base"].colour)
    if asked.any():
        labels = [cluster for cluster, one in zip(clusters, asked, strict=True) if one]
        enter_mean("colour_match", "higher", lambda score: score.colour[asked], labels)
    limit = metrics.copy_threshold(training.features, references.features)
    hits = int((scores["candidate"].nearest > limit).sum())
    copies = intervals.rate_interval(hits, len(requests), clusters=len(set(clusters)))
    document["copy_rate"] = {
        "candidate": copies.value,
        "base": float((scores["base"].nearest > limit).mean()),
        "champion": None,
        "candidate_interval": _bounds(copies),
        "threshold": float(limit),
        "difference": {"value": copies.value, **_bounds(copies)},
        "against": "none",
        "n": copies.n,
        "clusters": copies.clusters,
        "better": "lower",
    }
    evidence = Evidence(
        fingerprints=dict.fromkeys(scores, fingerprint),
        prompts=len({r.prompt_index for r in requests}),
        references=len(references.rows),
        primary=primary,
        guards=guards,
        copies=copies,
    )
    return document, evidence


def _bounds(interval: Interval) -> dict[str, float | None]:
    """JSON has no infinity: an end that too few clusters leave open is None."""
    return {
        name: value if np.isfinite(value) else None
        for name, value in (("low", float(interval.low)), ("high", float(interval.high)))
    }


def _shifted(interval: Interval, by: float) -> Interval:
    return Interval(interval.value + by, interval.low + by, interval.high + by, interval.n, interval.clusters)


def _validation_ratio(bench: Bench, validation: ObjectRef, final_step: int) -> dict[str, Any]:
    data = bench.store.read(validation.sha256)
    tensors = load(data)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    groups = [group for _, group in json.loads(header["__metadata__"]["rows"])]
    ratio = intervals.log_ratio_interval(tensors[str(final_step)].numpy(), tensors["base"].numpy(), groups)
    return {
        "candidate": ratio.value,
        "base": 1.0,
        "champion": None,
        "candidate_interval": _bounds(ratio),
        "difference": {"value": ratio.value - 1, **_bounds(_shifted(ratio, -1.0))},
        "against": "base",
        "n": ratio.n,
        "clusters": ratio.clusters,
        "better": "lower",
    }


def _record(
    catalog: Catalog,
    key: str,
    run_uid: str,
    fingerprint: str,
    contenders: Sequence[Contender],
    galleries: dict[str, list[Picture]],
    scores: dict[str, Scores],
    main: Sequence[int],
    training_rows: Sequence[SampleRow],
    snapshot_digest: str,
    document: dict[str, Any],
    verdict: dict[str, Any],
) -> None:
    """Write the evaluation and its pictures in one transaction; pictures that are there keep their id and reviews."""
    by_role = {contender.role: contender for contender in contenders}
    champion = by_role["champion"].adapter_sha256 if "champion" in by_role else None
    place = {gallery_index: position for position, gallery_index in enumerate(main)}
    with catalog.write() as session:
        session.merge(
            Evaluation(
                key=key,
                run_uid=run_uid,
                fingerprint=fingerprint,
                snapshot_digest=snapshot_digest,
                adapter_sha256=by_role["candidate"].adapter_sha256 or "",
                champion_sha256=champion,
                metrics=document,
                verdict=verdict,
            )
        )
        session.flush()
        known = {
            (g.role, g.step, g.prompt_index, g.seed): g
            for g in session.scalars(select(Generation).where(Generation.evaluation_key == key))
        }
        for role, pictures in galleries.items():
            contender, score = by_role[role], scores[role]
            for index, picture in enumerate(pictures):
                request = picture.request
                row = known.get((role, contender.step, request.prompt_index, request.seed)) or Generation(
                    evaluation_key=key,
                    role=role,
                    step=contender.step,
                    prompt_index=request.prompt_index,
                    seed=request.seed,
                )
                row.prompt, row.group, row.adapter_sha256 = request.prompt, request.group, contender.adapter_sha256
                row.batch_index, row.batch_row, row.image_sha256 = (
                    picture.batch_index,
                    picture.batch_row,
                    picture.sha256,
                )
                row.metrics = _picture_metrics(score, place.get(index), training_rows)
                session.add(row)


def _picture_metrics(score: Scores, position: int | None, training_rows: Sequence[SampleRow]) -> dict[str, Any]:
    if position is None:  # a further seed of a variety prompt: drawn for variety alone
        return {}
    found = {
        "prompt_rank": int(score.rank[position]),
        "style": float(score.style[position]),
        "similarity": float(score.nearest[position]),
        "nearest": training_rows[int(score.nearest_row[position])].sha256,
    }
    if not np.isnan(score.colour[position]):
        found["colour_right"] = bool(score.colour[position])
    return found


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
