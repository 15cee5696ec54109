"""`safelight study samplers`: what steps, samplers and guidance cost and bring, on one's own data and bases."""

from pathlib import Path
from typing import Any

from prefect import flow

from components.config import BaseModelConfig, Recipe
from components.families.bases import resolve_base
from components.latents.keys import training_size
from components.stages import stage_key
from flows.console import Reporter
from flows.open_run import OnEvent
from flows.retrain import curate, on_the_gpu, opened, served


@flow(name="study-samplers", flow_run_name="{recipe.name}", persist_result=False)
def study_samplers(
    recipe: Recipe, bases: dict[str, BaseModelConfig], plan: dict[str, Any]
) -> dict[str, Any]:
    """Draw and score the held-out captions of a recipe with every base, sampler and number of steps; the document.

    Raises: BaseModelError when a sampler of the plan suits none of the bases.
    """
    with opened(recipe, None, kind="study") as run:
        snapshot = curate(run.run_uid)
        resolution = training_size(run.base, recipe.training)
        resolved = {name: resolve_base(config) for name, config in bases.items()}
        request = {
            "snapshot": snapshot,
            "bases": {name: config.model_dump(mode="json") for name, config in bases.items()},
            "plan": plan,
            "evaluation": recipe.evaluation.model_dump(mode="json"),
            "resolution": resolution,
        }
        key = stage_key(
            "study",
            inputs={"snapshot": snapshot} | {f"base:{name}": base.digest for name, base in resolved.items()},
            config={name: request[name] for name in ("plan", "evaluation", "resolution")},
        )
        product = on_the_gpu(run, "study", key, request).product
        for point in product.facts["points"]:
            name = f"{point['base']}/{point['sampler']}"
            values = {f"kid/{name}": point["kid"]["value"], f"kid/{name}/low": point["kid"]["low"]}
            values |= {f"kid/{name}/high": point["kid"]["high"], f"prompt_match/{name}": point["prompt_match"]["value"]}
            if point["sampler"] != "auto":
                run.tracker.metrics(point["evaluations"], values)
        run.tracker.artifact("samplers.png", product.outputs["figure"].sha256)
        run.tracker.document("samplers.json", product.facts)
        return {
            "run_uid": run.run_uid,
            "mlflow": run.tracker.url,
            "figure": str(run.bench.store.path(product.outputs["figure"].sha256)),
            **product.facts,
        }


def study_recipe(
    recipe: Recipe, bases: dict[str, BaseModelConfig], plan: dict[str, Any], on_event: OnEvent | None = None
) -> dict[str, Any]:
    """Run the flow in this process, with Prefect and MLflow up."""
    with served(on_event):
        return study_samplers(recipe, bases, plan)


def show(reporter: Reporter, document: dict[str, Any], figure: Path) -> None:
    """The study for a person: a line per base and sampler, KID by network evaluations."""
    counts = sorted({point["evaluations"] for point in document["points"] if point["sampler"] != "auto"})
    kid = {(p["base"], p["sampler"], p["evaluations"]): f"{p['kid']['value']:.3f}" for p in document["points"]}
    rows = []
    for line in document["arrivals"]:
        values = [kid.get((line["base"], line["sampler"], count)) for count in counts]
        rows.append([line["base"], line["sampler"], *values, line["evaluations"]])
    columns = ["base", "sampler", *map(str, counts), "arrived at"]
    reporter.table(columns, rows, title="KID by network evaluations per picture", right=columns[2:])
    reporter.say(f"{figure}   {document['mlflow']}")
