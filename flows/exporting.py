"""`safelight export`: a registered model with its card, or a file or folder in another layout, rank or form."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from components.config import BaseModelConfig
from components.errors import BadInput
from components.families.bases import resolve_base
from components.stages import Bench
from flows.showing import find_version


def export(
    bench: Bench,
    what: str,
    out: Path,
    layouts: Sequence[Any] | None,
    *,
    base: str | None,
    rank: int | None,
    merge: bool,
) -> dict[str, Any]:
    """The document of the command: files by layout (or the merged "pipeline"), and what was skipped and why.

    `what` is a registered model, an adapter file, or a fine-tuned pipeline's folder. Raises BadInput.
    """
    source = Path(what).expanduser()
    if merge and layouts:
        raise BadInput("--merge writes a pipeline, --layout adapter files; give one of them")
    if source.exists():
        return _converted(source, BaseModelConfig(model=base or "embedded"), out, layouts, rank, merge)
    if base is not None:
        raise BadInput(f"--base {base}: a registered model knows its base; and there is no file {what!r}")
    version = find_version(bench, what)
    named = {"model": version.name, "version": version.version}
    if merge or rank is not None:
        from components.catalog.models import Run

        with bench.catalog.read() as session:
            run = session.get(Run, version.run_uid)
        config = BaseModelConfig.model_validate(run.recipe["base"] if run is not None else {})
        source = bench.store.path(version.adapter_sha256)
        return named | _converted(source, config, out, layouts, rank, merge, version.name)
    from components.training.export import export_adapter

    exported = export_adapter(bench, version.adapter_sha256, out, layouts, run_uid=version.run_uid)
    files = {name: str(path) for name, path in exported.files.items()}
    return named | {"files": files, "card": str(exported.card), "skipped": exported.skipped}


def _converted(
    source: Path,
    config: BaseModelConfig,
    out: Path,
    layouts: Sequence[Any] | None,
    rank: int | None,
    merge: bool,
    name: str | None = None,
) -> dict[str, Any]:
    base = resolve_base(config)
    from components.training.conversion import convert

    made = convert(source, base, out, layouts, rank=rank, merged=merge, name=name)
    files = {layout: str(path) for layout, path in made.files.items()}
    return {"files": files, "skipped": made.skipped, "frobenius_error": made.error}
