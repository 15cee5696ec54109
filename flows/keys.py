"""The stage keys of a retraining, from its recipe and what earlier stages gave: what runs and what `plan` foretells."""

from pathlib import Path

from components.catalog.models import ModelVersion
from components.config import SIZE_SETTINGS, TEXT_SETTINGS, Recipe
from components.curation.scanning import Scan
from components.families.bases import BaseModel, resolve_base
from components.latents.keys import cache_key, training_size, training_sizing
from components.latents.wording import Wording
from components.stages import Bench, Product, committed, stage_key
from components.storage import sha256_of


def fine_tune_key(recipe: Recipe, base: BaseModel, snapshot: str) -> str:
    """An adapter to go on from counts by its bytes, not by its path; settings of text encoders where they train, those
    of sizes by the cache's key."""
    sizing, initial = training_sizing(base, recipe.training), recipe.training.init_adapter
    unused = () if recipe.training.train_text_encoder or recipe.training.placeholder_token else TEXT_SETTINGS
    return stage_key(
        "fine-tune",
        inputs={"cache": cache_key(snapshot, base, sizing, Wording.of(recipe.training)), "base": base.digest}
        | ({"init_adapter": sha256_of(Path(initial))} if initial else {}),
        config=recipe.training.model_dump(mode="json", exclude={"init_adapter", *SIZE_SETTINGS, *unused}),
    )


def evaluate_key(
    recipe: Recipe, base: BaseModel, snapshot: str, *, adapter_sha256: str, champion_sha256: str | None
) -> str:
    return stage_key(
        "evaluate",
        inputs={
            "snapshot": snapshot,
            "base": base.digest,
            "fine-tune": fine_tune_key(recipe, base, snapshot),
            "adapter": adapter_sha256,
            "champion": champion_sha256 or "",
        },
        config={
            "evaluation": recipe.evaluation.model_dump(mode="json"),
            "promotion": recipe.promotion.model_dump(mode="json", exclude={"policy"}),
        },
    )


def register_key(recipe: Recipe, *, adapter_sha256: str, evaluation: str) -> str:
    return stage_key(
        "register", inputs={"adapter": adapter_sha256, "evaluation": evaluation}, config={"name": recipe.name}
    )


def champion_of(bench: Bench, aliases: dict[str, int], name: str, candidate_sha256: str) -> ModelVersion | None:
    """The champion that a candidate has to beat: none when there is none, or when it is the candidate itself."""
    if "champion" not in aliases:
        return None
    with bench.catalog.read() as session:
        version = session.get(ModelVersion, (name, aliases["champion"]))
    return version if version is not None and version.adapter_sha256 != candidate_sha256 else None


def stage_keys(bench: Bench, recipe: Recipe, scanned: Scan) -> list[tuple[str, str | None]]:
    """(stage, key) in order, as far as keys can be known without running: None from where an earlier stage must run.

    `scanned` is what the recipe's sources hold now, with the captions that count. Writes nothing.
    """
    from components.curation.snapshots import curate_key

    base = resolve_base(recipe.base)
    curate, _ = curate_key(
        bench,
        recipe.data,
        recipe.curation,
        dataset=recipe.name,
        training_size=training_size(base, recipe.training),
        captions=recipe.captions,
        scanned=scanned,
    )
    keys: dict[str, str | None] = {
        "curate": curate,
        "cache": None,
        "fine-tune": None,
        "evaluate": None,
        "register": None,
    }
    if snapshot := committed_snapshot(bench, recipe, curate):
        digest = snapshot.facts["digest"]
        sizing = training_sizing(base, recipe.training)
        keys["cache"] = cache_key(digest, base, sizing, Wording.of(recipe.training))
        keys["fine-tune"] = fine_tune_key(recipe, base, digest)
        if adapter := committed(bench, keys["fine-tune"]):
            sha256 = adapter.facts["sha256"]
            champion = champion_of(bench, mirrored_aliases(bench, recipe.name), recipe.name, sha256)
            keys["evaluate"] = evaluate_key(
                recipe,
                base,
                digest,
                adapter_sha256=sha256,
                champion_sha256=champion.adapter_sha256 if champion else None,
            )
            keys["register"] = register_key(recipe, adapter_sha256=sha256, evaluation=keys["evaluate"])
    return list(keys.items())


def committed_snapshot(bench: Bench, recipe: Recipe, key: str) -> Product | None:
    """The snapshot that a curation would reuse, or None."""
    from components.curation.snapshots import sides_stand

    product = committed(bench, key)
    return product if product and sides_stand(bench, recipe.curation, recipe.name, product) else None


def mirrored_aliases(bench: Bench, name: str) -> dict[str, int]:
    """The registry's aliases as the catalog last saw them."""
    from sqlalchemy import select

    with bench.catalog.read() as session:
        versions = session.scalars(select(ModelVersion).where(ModelVersion.name == name)).all()
    return {alias: version.version for version in versions for alias in version.aliases}
