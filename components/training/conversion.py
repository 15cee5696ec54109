"""An adapter into another layout, rank or form: `safelight export` for files, folders and what is made of a model."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from components.errors import BadInput
from components.families.bases import BaseModel
from components.layouts.layers import Layer
from components.layouts.names import Layout
from components.layouts.reading import import_adapter
from components.layouts.skeleton import Skeleton, skeleton_of
from components.layouts.surgery import extract, merge, resize
from components.layouts.tokens import Token
from components.layouts.writing import diffusers_tensors, require_layout, stored_tensors
from components.storage import atomic_write
from components.tensors import to_safetensors
from components.training.adapters import METADATA_KEY
from components.training.export import EVERY_RUN, file_name, tensors_in, written_embeddings

KEPT = ("ss_", "sshs_", "modelspec.", "safelight.")  # of a source's header: what says where it comes from
STALE = ("ss_network_dim", "ss_network_alpha", "sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256",
         "modelspec.implementation")  # and what is no longer true of another file  # fmt: skip


@dataclass(frozen=True, slots=True)
class Converted:
    """What was written; `error` is the Frobenius norm of what a lower rank lost over that of the whole."""

    files: Mapping[str, Path]  # by layout, or "pipeline"
    error: float = 0.0
    skipped: dict[Layout, str] = field(default_factory=dict)


def convert(
    source: Path,
    base: BaseModel,
    destination: Path,
    layouts: Sequence[Layout] | None = None,
    *,
    rank: int | None = None,
    merged: bool = False,
    name: str | None = None,
) -> Converted:
    """Write what `source` adds to `base` into a folder: in other layouts, of at most `rank`, or merged into the base.

    `source` is an adapter file of any layout, or a fine-tuned pipeline's folder, from which a LoRA of `rank` is
    extracted. Without `layouts` those of EVERY_RUN that can hold it; `name` is their files', by default the source's.
    Raises BadInput.
    """
    skeleton = skeleton_of(base)
    tokens: Sequence[Token] = ()
    if source.is_dir():
        layers, header, error = _extracted(source, base, skeleton, rank)
    else:
        (layers, tokens), header, error = import_adapter(source, skeleton), _origin(source), 0.0
        if rank is not None:
            fitted = resize(layers, rank)
            layers, error = fitted.layers, fitted.error
    if merged:
        return Converted({"pipeline": merge(base, layers, destination, tokens)}, error)
    if rank is not None:
        header |= {"safelight.rank": str(rank), "safelight.frobenius_error": f"{error:.6g}"}
    return _written(layers, tokens, skeleton, destination, name or source.stem, layouts, header, error)


def _extracted(
    source: Path, base: BaseModel, skeleton: Skeleton, rank: int | None
) -> tuple[list[Layer], dict[str, str], float]:
    from components.config import BaseModelConfig
    from components.families.bases import resolve_base

    if rank is None:
        raise BadInput(f"{source}: is a folder; say with --rank which rank of its difference to the base to extract")
    tuned = resolve_base(BaseModelConfig(model=str(source.resolve())))
    if tuned.family != base.family:
        raise BadInput(f"{source}: is a {tuned.family}, the base a {base.family}; give the base it was tuned from")
    fitted = extract(skeleton, skeleton_of(tuned), rank)
    return fitted.layers, {"safelight.base_model_sha256": base.digest}, fitted.error


def _origin(source: Path) -> dict[str, str]:
    from components.layouts.files import read_metadata

    metadata = read_metadata(source)
    return {key: value for key, value in metadata.items() if key.startswith(KEPT) and key not in STALE}


def _written(
    layers: Sequence[Layer],
    tokens: Sequence[Token],
    skeleton: Skeleton,
    destination: Path,
    name: str,
    layouts: Sequence[Layout] | None,
    header: Mapping[str, str],
    error: float,
) -> Converted:
    dims = [layer.rank or 1 for layer in layers]
    alphas = [layer.scale * dim for layer, dim in zip(layers, dims, strict=True)]
    facts = {"format": "pt", "ss_network_dim": str(max(dims)), "ss_network_alpha": str(max(alphas))}
    files: dict[str, Path] = {}
    skipped: dict[Layout, str] = {}
    for layout in layouts or EVERY_RUN:
        try:
            require_layout(layout, skeleton)
            settings = {}
            if layout == "diffusers":
                diffusers_tensors(layers)  # refuses what the stock loader would
                body, peft = stored_tensors(layers, skeleton)
                settings = {METADATA_KEY: json.dumps(peft, sort_keys=True)}
            else:
                body = tensors_in(layout, layers, skeleton, tokens)
        except BadInput as refusal:
            if layouts is not None:
                raise
            skipped[layout] = str(refusal)
            continue
        files[layout] = destination / file_name(name, layout, files)
        with atomic_write(files[layout]) as file:
            file.write(to_safetensors(body, {**header, **facts, **settings}))
    if not files:
        raise BadInput("; ".join(skipped.values()))
    files |= written_embeddings(tokens, skeleton.pipeline, destination) if "diffusers" in files else {}
    return Converted(files, error, skipped)
