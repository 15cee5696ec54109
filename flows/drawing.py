"""`safelight generate`: pictures from a registered model, an adapter file or the base alone."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.config import BaseModelConfig, EvaluationConfig
from components.errors import BadInput
from components.families.bases import resolve_base
from components.layouts.files import read_metadata
from components.stages import Bench
from components.storage import atomic_write
from flows.children import TorchChild, threads_for
from flows.showing import find_version


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to draw; None: as the recipe's evaluation settings have it by default."""

    prompts: tuple[str, ...]
    seed: int
    count: int
    num_inference_steps: int | None
    guidance_scale: float | None


def draw(
    bench: Bench,
    wanted: Wanted,
    *,
    model: str | None,
    adapter: Path | None,
    base: str,
    out: Path,
    on_event: Callable[[dict[str, Any]], None],
) -> list[Path]:
    """Draw every prompt with `count` consecutive seeds and write PNG files that carry their settings.

    Raises BadInput for a model, adapter file or base that cannot be used, before torch is loaded.
    """
    config, adapter_sha256 = _contender(bench, model, adapter, base)
    if adapter is not None:
        read_metadata(adapter)
    threads = threads_for(resolve_base(config))
    settings = EvaluationConfig.model_validate({}).model_dump(mode="json")
    settings |= {"num_inference_steps": wanted.num_inference_steps} if wanted.num_inference_steps else {}
    settings |= {"guidance_scale": wanted.guidance_scale} if wanted.guidance_scale else {}
    requests = [
        {"prompt_index": index, "prompt": prompt, "group": None, "seed": wanted.seed + offset}
        for index, prompt in enumerate(wanted.prompts)
        for offset in range(wanted.count)
    ]
    settings["batch_size"] = min(settings["batch_size"], len(requests))
    with TorchChild(bench.workspace, bench.workspace.logs / "generate.log", threads=threads) as child:
        if adapter is not None:
            file = {"stage": "import", "base": config.model_dump(mode="json"), "path": str(adapter.resolve())}
            adapter_sha256 = child.ask(file, on_event).outputs["adapter"].sha256
        product = child.ask(
            {
                "stage": "generate",
                "base": config.model_dump(mode="json"),
                "adapter": adapter_sha256,
                "requests": requests,
                "evaluation": EvaluationConfig.model_validate(settings).model_dump(mode="json"),
            },
            on_event,
        )
    files = []
    for index, request in enumerate(requests):
        path = (
            out / f"{request['prompt_index']:03}-seed{request['seed']}.png"
        )  # ids, not prompts: any prompt is allowed
        with atomic_write(path) as file:
            file.write(bench.store.read(product.outputs[str(index)].sha256))
        files.append(path)
    return files


def _contender(bench: Bench, model: str | None, adapter: Path | None, base: str) -> tuple[BaseModelConfig, str | None]:
    if model and adapter:
        raise BadInput("--model and --adapter name two adapters; give one of them")
    if not model:
        return BaseModelConfig.model_validate({"model": base}), None
    from components.catalog.models import Run

    version = find_version(bench, model)
    with bench.catalog.read() as session:
        run = session.get(Run, version.run_uid)
    recipe = run.recipe["base"] if run is not None else {"model": base}
    return BaseModelConfig.model_validate(recipe), version.adapter_sha256
