"""Which sampler, how many steps, how much guidance: galleries of one or more bases, scored and drawn as one figure.

A point's price is the number of times its sampler asks the network (with guidance each question is asked for the prompt
and for the empty prompt at once). Every micro-batch is a cached stage: a study that was stopped draws on.
"""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

import numpy as np

from components.config import EvaluationConfig
from components.curation.manifest import SampleRow
from components.diffusion.samplers import sampler_from_scheduler
from components.errors import BadInput, BaseModelError
from components.evaluation import intervals, metrics
from components.evaluation.embedders import load_embedder
from components.evaluation.evaluate import MATCH_RANK
from components.evaluation.feature_cache import EmbeddedSamples, features_of_gallery
from components.evaluation.generation import Request, Settings, draw_gallery
from components.evaluation.intervals import Interval
from components.evaluation.prompts import gallery_requests, turn_of
from components.families.bases import BaseModel
from components.stages import Bench, Product, canonical_json

SAMPLERS = tuple(name for name in get_args(EvaluationConfig.model_fields["scheduler"].annotation) if name != "auto")
CLOSE = 1.1  # a sampler has arrived where its KID is within this factor of the best that its base reaches


@dataclass(frozen=True, slots=True)
class StudyPlan:
    """What is compared: every sampler that suits a base at every number of steps, then guidance at `guidance_steps`."""

    samplers: tuple[str, ...] = SAMPLERS
    steps: tuple[int, ...] = (2, 5, 10, 20, 50)
    guidance: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)
    guidance_steps: int = 20

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "StudyPlan":
        """From JSON, which has lists."""
        given: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
        return cls(**given)


@dataclass(frozen=True, slots=True)
class Point:
    """One gallery: how it was drawn and how it scored; intervals are 95 % over concepts."""

    base: str
    sampler: str
    steps: int
    evaluations: int  # of the network, per picture
    guidance: float
    kid: Interval  # to the held-out pictures; lower is better
    prompt_match: Interval  # share whose concept is among the nearest references; higher is better
    variety: Interval | None  # mean 1 - cosine between seeds of one prompt; higher is more varied


@dataclass(frozen=True, slots=True)
class Cell:
    """A gallery that is to be drawn."""

    base: str
    sampler: str
    steps: int
    guidance: float
    in_guidance_sweep: bool


def cells(bases: Mapping[str, BaseModel], plan: StudyPlan, guidance_scale: float) -> list[Cell]:
    """Every gallery of a study, each once. Raises: BaseModelError when one of the samplers suits no base."""
    found: list[Cell] = []
    refused: dict[str, BaseModelError] = {}
    for name, base in bases.items():
        config = base.architecture.scheduler_config(base.path)
        for sampler in plan.samplers:
            try:
                sampler_from_scheduler(sampler, config, unfit=base.architecture.unfit_samplers(config))
            except BaseModelError as error:
                refused[sampler] = error
                continue
            found += [Cell(name, sampler, steps, guidance_scale, False) for steps in plan.steps]
        found += [Cell(name, "auto", plan.guidance_steps, guidance, True) for guidance in plan.guidance]
    suited = {cell.sampler for cell in found}
    if plan.samplers != SAMPLERS and (unfit := [name for name in plan.samplers if name not in suited]):
        raise refused[unfit[0]]
    return found


def study_samplers(
    bench: Bench,
    rows: Sequence[SampleRow],
    bases: Mapping[str, BaseModel],
    plan: StudyPlan,
    config: EvaluationConfig,
    resolution: int,
    *,
    run_uid: str | None,
    on_progress: Callable[[int, int], None],
) -> Product:
    """Draw and score every cell. Outputs: "points" (JSON) and "figure" (PNG); facts: the points and `arrivals`."""
    held_out = [row for row in rows if row.split == "test"]
    plain = gallery_requests(held_out, config.model_copy(update={"variety_prompts": 0}))
    varied = gallery_requests(held_out, config)
    if len({request.concept for request in plain}) < 2:
        raise BadInput("the snapshot holds fewer than 2 concepts out; raise curation.test_fraction")
    todo = cells(bases, plan, config.guidance_scale)
    total = sum(len(varied if cell.in_guidance_sweep else plain) for cell in todo)
    done, points = 0, []
    embedder = load_embedder(config.embedder)
    references = {
        name: EmbeddedSamples(bench, embedder, held_out, base, resolution) for name, base in bases.items()
    }

    def advance(count: int) -> None:
        nonlocal done
        done += count
        on_progress(min(done, total), total)

    for cell in todo:
        base, requests = bases[cell.base], varied if cell.in_guidance_sweep else plain
        settings = Settings.of(
            config.model_copy(
                update={
                    "scheduler": cell.sampler,
                    "num_inference_steps": cell.steps,
                    "guidance_scale": cell.guidance,
                }
            ),
            resolution,
        )
        drawn = draw_gallery(bench, base, None, requests, settings, run_uid=run_uid, on_progress=advance)
        features = features_of_gallery(bench, embedder, drawn)
        points.append(_score(cell, base, requests, features, references[cell.base], config))
    document = {
        "points": [_plain(point) for point in points],
        "arrivals": arrivals(points),
        "plan": json.loads(canonical_json(asdict(plan))),  # as it comes back from the store
    }
    return Product(
        {"points": bench.store.put(canonical_json(document)), "figure": bench.store.put(figure_of(points))},
        document,
        items=total,
    )


def _score(
    cell: Cell,
    base: BaseModel,
    requests: Sequence[Request],
    features: np.ndarray,
    references: EmbeddedSamples,
    config: EvaluationConfig,
) -> Point:
    main = [i for i, request in enumerate(requests) if turn_of(request, config) < config.seeds_per_prompt]
    concepts = [requests[i].concept for i in main]
    rank = metrics.retrieval_rank(features[main], references.features, concepts, references.concepts)
    blocks = intervals.kid_blocks(features[main], references.features, concepts)
    repeated = [i for i, request in enumerate(requests) if request.prompt_index < config.variety_prompts]
    variety = None
    if cell.in_guidance_sweep and repeated:
        spread = metrics.prompt_diversity(features[repeated], [requests[i].prompt_index for i in repeated])
        variety = intervals.mean_interval(list(spread.values()), list(spread))
    return Point(
        cell.base,
        cell.sampler,
        cell.steps,
        network_evaluations(base, cell.sampler, cell.steps),
        cell.guidance,
        intervals.kid_interval(blocks),
        intervals.mean_interval((rank <= MATCH_RANK).astype(float), concepts),
        variety,
    )


def _plain(point: Point) -> dict[str, Any]:
    """JSON has no infinity: a bound that too few concepts leave open is None."""
    fields = asdict(point)
    for name in ("kid", "prompt_match", "variety"):
        if fields[name] is not None:
            fields[name] = {k: v if np.isfinite(v) else None for k, v in fields[name].items()}
    return fields


def network_evaluations(base: BaseModel, sampler: str, steps: int) -> int:
    """How often a picture of `steps` steps asks the network: Heun's method asks twice in all but the last."""
    config = base.architecture.scheduler_config(base.path) | {"use_dynamic_shifting": False}  # it moves, it adds none
    scheduler = sampler_from_scheduler(sampler, config)
    scheduler.set_timesteps(steps)
    return len(scheduler.timesteps)


def arrivals(points: Sequence[Point]) -> list[dict[str, Any]]:
    """For each base and sampler the fewest evaluations whose KID is within CLOSE of the base's best; None: not yet."""
    swept = [point for point in points if point.sampler != "auto"]
    best = {name: min(p.kid.value for p in swept if p.base == name) for name in {p.base for p in swept}}
    found: dict[tuple[str, str], int | None] = {}
    for point in sorted(swept, key=lambda p: p.evaluations):
        close = point.kid.value - best[point.base] <= (CLOSE - 1) * abs(best[point.base])
        if found.get((point.base, point.sampler)) is None:
            found[point.base, point.sampler] = point.evaluations if close else None
    return [
        {"base": base, "sampler": sampler, "evaluations": count, "best_kid": best[base]}
        for (base, sampler), count in sorted(found.items())
    ]


def figure_of(points: Sequence[Point]) -> bytes:
    """PNG: for each base KID against network evaluations, a line per sampler; last, guidance: match against variety."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(point.base for point in points))
    samplers = [name for name in SAMPLERS if any(point.sampler == name for point in points)]
    figure = Figure(figsize=(3.6 * len(names) + 4.2, 4.2), layout="constrained")
    axes = figure.subplots(1, len(names) + 1, width_ratios=[1] * len(names) + [1.15])
    top = max(point.kid.value for point in points) * 1.1
    for name, panel in zip(names, axes, strict=False):
        for sampler in samplers:
            line = sorted((p for p in points if (p.base, p.sampler) == (name, sampler)), key=lambda p: p.evaluations)
            if line:
                x, color = [p.evaluations for p in line], f"C{samplers.index(sampler)}"
                panel.plot(x, [p.kid.value for p in line], "o-", color=color, label=sampler, lw=1.4, ms=4)
                panel.fill_between(x, [p.kid.low for p in line], [p.kid.high for p in line], color=color, alpha=0.12)
        ticks = sorted({point.evaluations for point in points})
        panel.set(title=name, xscale="log", ylim=(0, top), xlabel="network evaluations per picture")
        panel.set_xticks(ticks, [str(tick) if tick in (2, 5, 10, 20, 50, 100) else "" for tick in ticks])
        panel.minorticks_off()
        panel.grid(alpha=0.25)
        panel.legend(fontsize=7, frameon=False)
    axes[0].set_ylabel("KID to held-out pictures (lower is better)")
    for place, name in enumerate(names):
        line = [p for p in points if p.base == name and p.variety is not None]
        line.sort(key=lambda p: p.guidance)
        x, y = [p.variety.value for p in line if p.variety], [p.prompt_match.value for p in line]
        axes[-1].plot(x, y, "o-", color=f"C{place}", label=name, lw=1.4, ms=4)
        for point, px, py in zip(line, x, y, strict=True):
            axes[-1].annotate(f"{point.guidance:g}", (px, py), fontsize=7, xytext=(3, 3), textcoords="offset points")
    axes[-1].set(
        title="guidance scale", xlabel="variety between seeds", ylabel="prompt match: right concept among nearest 5"
    )
    axes[-1].grid(alpha=0.25)
    axes[-1].legend(fontsize=7, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
