"""Models: generate, export, pretrain, and the study of samplers."""

import json
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from components.errors import BadInput
from flows.commands.opening import (
    SCHEMA,
    AsJson,
    DataFolder,
    Overrides,
    RecipePath,
    open_bench,
    open_reporter,
    read_recipe,
    require_inputs,
    serve,
)


class Layout(StrEnum):
    DIFFUSERS = "diffusers"
    KOHYA = "kohya"
    COMFYUI = "comfyui"


def generate(
    *,
    prompt: Annotated[list[str], typer.Option(help="What to draw. May be repeated.")],
    model: Annotated[str | None, typer.Option(help="A registered model: NAME, NAME@ALIAS or NAME/VERSION.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="An adapter file instead.")] = None,
    base: Annotated[str, typer.Option(help="The base model, for --adapter and for none of both.")] = "embedded",
    seed: Annotated[int, typer.Option(min=0, help="First seed.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="Pictures for each prompt, with consecutive seeds.")] = 1,
    num_inference_steps: Annotated[int | None, typer.Option("--steps", min=1, help="Sampler steps.")] = None,
    guidance_scale: Annotated[float | None, typer.Option("--guidance", min=1, help="Classifier-free guidance.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the PNG files.")] = Path("generated"),
    as_json: AsJson = False,
) -> None:
    """Draw pictures with a registered model, an adapter file or the base alone."""
    with open_reporter(as_json) as reporter:
        from flows import drawing

        bench = open_bench()
        wanted = drawing.Wanted(tuple(prompt), seed, count, num_inference_steps, guidance_scale)
        files = drawing.draw(bench, wanted, model=model, adapter=adapter, base=base, out=out, on_event=reporter.event)
        reporter.finish(
            {"schema": SCHEMA, "status": "completed", "files": [str(file) for file in files]},
            lambda: reporter.say("\n".join(map(str, files))),
        )


def export(
    what: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|FILE|FOLDER",
            help="NAME, NAME@ALIAS or NAME/VERSION; an adapter file; or a fine-tuned pipeline to extract a LoRA from.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    layout: Annotated[
        list[Layout] | None, typer.Option(help="May be repeated; default: diffusers and kohya, where they exist.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Of a file or folder; default: the embedded base.")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Of the LoRA at most; the best of that rank.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Write the base with the adapter in its weights.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write an adapter as files that other programs load, in another rank, or merged into its base."""
    with open_reporter(as_json) as reporter:
        from flows import exporting

        layouts = [chosen.value for chosen in layout] if layout else None
        document = exporting.export(open_bench(), what, out, layouts, base=base, rank=rank, merge=merge)
        lines = [*document["files"].values(), *document["skipped"].values()]
        lines += [document["card"]] if "card" in document else []
        if document.get("frobenius_error", 0.0) >= 0.00005:  # less would read as 0.00 %
            lines.append(f"lost by the lower rank: {document['frobenius_error']:.2%} of the update's Frobenius norm")
        reporter.finish({"schema": SCHEMA, "status": "completed"} | document, lambda: reporter.say("\n".join(lines)))


def pretrain(
    *,
    node_modules: Annotated[Path, typer.Option(help="Where npm installed the packages of emoji drawings.")],
    out: Annotated[Path | None, typer.Option(help="Checkpoints and results; default: in the workspace.")] = None,
    start: Annotated[Path | None, typer.Option(help="Go on from this pipeline's weights.")] = None,
    autoencoder: Annotated[Path | None, typer.Option(help="Take this pipeline's instead of training one.")] = None,
    objective: Annotated[str | None, typer.Option(help="ddpm, v, edm or flow; default: as the settings say.")] = None,
    config: Annotated[Path | None, typer.Option(help="JSON file with the fields of PretrainConfig to change.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="Of torch, on the CPU.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Train a small base model from scratch on emoji drawings; the same command goes on where it was stopped."""
    with open_reporter(as_json) as reporter:
        from components.training.pretraining_config import read_config

        for name, folder in (("--node-modules", node_modules), ("--start", start), ("--autoencoder", autoencoder)):
            if folder is not None and not folder.is_dir():
                raise BadInput(f"{name} {folder}: no such folder; components/base/README.md says what belongs there")
        settings = read_config(config, **({"objective": objective} if objective else {}))
        if start is not None:
            from components.training.formulations import require_objective

            require_objective(start, settings)
        bench = open_bench()
        serve(bench, reporter)
        from flows.pretrain import pretrain as pretrain_flow

        target = (out or bench.workspace.home / "pretrain").resolve()
        target.mkdir(parents=True, exist_ok=True)
        document = pretrain_flow(
            node_modules.resolve(),
            target,
            start and start.resolve(),
            autoencoder and autoencoder.resolve(),
            device=device,
            threads=threads,
            config=settings,
        )
        reporter.finish(
            {"schema": SCHEMA, "status": "completed"} | document,
            lambda: reporter.say(f"{document['pipeline']}\n{json.dumps(document['figures'], indent=2)}"),
        )


def samplers(
    recipe: RecipePath,
    *,
    data: DataFolder = None,
    overrides: Overrides = None,
    base: Annotated[
        list[str] | None, typer.Option(metavar="NAME=MODEL", help="Compare these bases; default: the recipe's.")
    ] = None,
    sampler: Annotated[list[str] | None, typer.Option(help="Only these; default: all that suit a base.")] = None,
    steps: Annotated[str, typer.Option(help="Numbers of steps.")] = "2,5,10,20,50",
    guidance: Annotated[str, typer.Option(help="Guidance scales, drawn with the base's own sampler.")] = "1,2,4,8",
    out: Annotated[Path, typer.Option(help="Where the figure goes.")] = Path("samplers.png"),
    as_json: AsJson = False,
) -> None:
    """KID and prompt match of every sampler at every number of steps, and what guidance buys, as one figure."""
    with open_reporter(as_json) as reporter:
        from components.config import BaseModelConfig
        from components.storage import atomic_write

        settings = read_recipe(recipe, overrides, data)
        bases = {name: BaseModelConfig.model_validate({"model": model}) for name, model in map(_named, base or ())}
        plan = {"steps": _numbers("--steps", steps, int), "guidance": _numbers("--guidance", guidance, float)}
        plan |= {"samplers": sampler} if sampler else {}
        require_inputs(settings)
        serve(open_bench(), reporter)
        from flows import study

        document = study.study_recipe(settings, bases or {"base": settings.base}, plan, reporter.event)
        with atomic_write(out) as file:
            file.write(Path(document["figure"]).read_bytes())
        reporter.finish(
            {"schema": SCHEMA, "status": "completed"} | document | {"figure": str(out)},
            lambda: study.show(reporter, document, out),
        )


def _named(option: str) -> tuple[str, str]:
    name, found, model = option.partition("=")
    if not (found and name and model):
        raise BadInput(f"--base {option!r}: expected NAME=MODEL, for example flow=out/pipeline")
    return name, model


def _numbers(option: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
    try:
        numbers = [kind(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise BadInput(f"{option} {text!r}: expected numbers of at least 1 with commas between, for example 5,10,20")
    return numbers
