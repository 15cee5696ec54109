"""The stages in one process, without servers: what tests of caching, training and evaluation stand on."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.config import BaseModelConfig, Recipe, load_recipe
from components.curation.manifest import SampleRow, read_manifest
from components.curation.snapshots import curate, curate_key
from components.families.bases import BaseModel, resolve_base
from components.latents.caching import cache_latents
from components.latents.keys import training_size, training_sizing
from components.latents.wording import Wording
from components.stages import Bench, Product, ensure
from components.training.finetune import fine_tune
from components.training.processes import ALONE, Processes
from components.workspace import Workspace
from tests.pictures import write_pictures, write_recipe
from tests.tiny import tiny_stable_diffusion


@dataclass(frozen=True, slots=True)
class Chain:
    """A workspace with a tiny base and sixty pictures, and the stages as functions of a recipe."""

    bench: Bench
    recipe_path: Path
    pictures: Path
    base_path: Path

    @classmethod
    def build(cls, folder: Path) -> "Chain":
        bench = Bench.open(Workspace(folder / "home"))
        bench.catalog.migrate()
        base = tiny_stable_diffusion(folder / "base")
        pictures = write_pictures(folder / "pictures")
        return cls(bench, write_recipe(folder / "recipe.toml", pictures, base), pictures, base)

    def recipe(self, *overrides: str) -> Recipe:
        return load_recipe(self.recipe_path, overrides=overrides)

    def base(self) -> BaseModel:
        return resolve_base(BaseModelConfig(model=str(self.base_path)))

    def snapshot(self, recipe: Recipe) -> str:
        """The digest of the recipe's snapshot."""
        size = training_size(self.base(), recipe.training)
        key, scanned = curate_key(self.bench, recipe.data, recipe.curation, dataset=recipe.name, training_size=size)
        result = ensure(
            self.bench,
            "curate",
            key,
            lambda: curate(
                self.bench,
                recipe.data,
                recipe.curation,
                dataset=recipe.name,
                training_size=size,
                scanned=scanned,
                key=key,
            ),
        )
        return result.product.facts["digest"]

    def curate(self, recipe: Recipe) -> list[SampleRow]:
        return read_manifest(self.bench.store, self.snapshot(recipe))

    def cache(self, recipe: Recipe) -> Product:
        """Always asks the caching stage itself, so that its counts of encodes can be looked at."""
        return cache_latents(
            self.bench,
            self.curate(recipe),
            self.base(),
            training_sizing(self.base(), recipe.training),
            ignore,
            wording=Wording.of(recipe.training),
        )

    def fine_tune(
        self,
        recipe: Recipe,
        *,
        work: str = "work",
        stop_after: int | None = None,
        events: list[dict[str, Any]] | None = None,
        should_stop: Callable[[], bool] | None = None,
        processes: Processes = ALONE,
    ) -> Product:
        """Train; asked to stop once `stop_after` steps have been reported, or when `should_stop()`."""
        seen: list[dict[str, Any]] = events if events is not None else []
        rows = self.curate(recipe)

        def enough() -> bool:
            return stop_after is not None and sum("loss" in event for event in seen) >= stop_after

        return fine_tune(
            self.bench,
            rows,
            self.base(),
            recipe.training,
            self.bench.workspace.home / work,
            on_event=seen.append,
            should_stop=should_stop or enough,
            processes=processes,
        )


def ignore(done: int, total: int) -> None:
    """Nobody looks at this progress."""
