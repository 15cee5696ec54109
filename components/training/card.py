"""The model card of an adapter: README.md in the format of the Hugging Face hub, written from the catalog alone."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from components.catalog.models import (
    Adapter,
    Evaluation,
    Generation,
    ModelVersion,
    Run,
    Snapshot,
    SnapshotItem,
    StageResultRow,
    StageRun,
)
from components.config import BaseModelConfig, TrainingConfig
from components.curation.manifest import read_manifest
from components.errors import BadInput, BaseModelError
from components.families import FAMILIES
from components.families.bases import HUB_ID, find_base, resolve_base
from components.latents.keys import sizing_of
from components.layouts.names import ARCHITECTURES
from components.layouts.tokens import Token, encoder_keys
from components.stages import Bench
from components.storage import atomic_write
from components.training.trained_data import data_metadata

IMAGES = 8
LICENCE_FILE = "LICENSE.md"  # the hub links to a file of this name, or to an address
MODELSPEC_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}
METRICS = {  # name in the evaluation -> words for people
    "kid": "KID to held-out pictures",
    "prompt_match": "prompts matched",
    "style": "style similarity",
    "variety": "variety",
    "colour_match": "asked colour right",
    "nearest_training": "similarity to the nearest training picture",
    "copy_rate": "near copies of training pictures",
    "validation_ratio": "validation loss against the base",
}


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an adapter comes from, as far as the catalog knows; nothing in here is a local path."""

    adapter_sha256: str
    name: str
    step: int
    base: str  # a hub id, a folder's own name, or "embedded"
    hub_base: bool
    base_sha256: str | None
    pipeline: str  # the base's class, "StableDiffusionPipeline" where the base is gone
    architecture: str  # as modelspec.architecture has it, without "/lora"
    base_version: str | None  # kohya's ss_base_model_version
    resolution: int | None
    training: dict[str, Any]
    evaluation: dict[str, Any]
    run_uid: str
    mlflow_run_id: str | None
    git_commit: str | None
    created_at: str
    snapshot: str | None
    snapshot_digest: str | None
    train_images: int | None
    rejected: int | None
    licences: dict[str, int]
    sources: dict[str, int]
    metrics: dict[str, Any]
    verdict: dict[str, Any]
    version: int | None
    base_revision: str | None  # the commit of a hub base
    prediction: str | None  # what the base predicts in ModelSpec's words, which has none for velocities
    zero_terminal_snr: bool | None
    started_at: float  # Unix time, of the run
    finished_at: float  # and of the checkpoint
    data: dict[str, Any]  # header keys, see trained_data
    curation: dict[str, Any]
    rejects: dict[str, int]  # by check
    seconds: float | None  # that the training took, since it was last resumed
    hardware: str | None

    @property
    def title(self) -> str:
        return self.name if self.version is None else f"{self.name} v{self.version}"

    @property
    def description(self) -> str:
        data = f" on {self.train_images} pictures of {self.snapshot}" if self.snapshot else ""
        return f"A LoRA for {self.base}, trained with Safelight for {self.step} steps{data}."

    @property
    def licence_line(self) -> str | None:
        return ", ".join(f"{licence} ({count})" for licence, count in self.licences.items()) or None


def origin_of(bench: Bench, adapter_sha256: str, run_uid: str | None = None) -> Origin:
    """What the catalog knows of an adapter: of the given run, else of the newest that trained or reused it.

    Raises BadInput for an adapter that no run made.
    """
    with bench.catalog.read() as session:
        adapter = session.get(Adapter, adapter_sha256)
        run = _run_of(session, adapter, run_uid)
        if adapter is None or run is None:
            raise BadInput(f"adapter {adapter_sha256[:12]}: no run of this workspace made it; "
                           "`safelight runs` lists them")
        snapshot = session.get(Snapshot, run.snapshot_id) if run.snapshot_id else None
        evaluation = session.scalars(select(Evaluation).where(Evaluation.adapter_sha256 == adapter_sha256)
                                     .order_by(Evaluation.created_at.desc())).first()
        version = session.scalar(select(func.max(ModelVersion.version)).where(
            ModelVersion.adapter_sha256 == adapter_sha256, ModelVersion.name == run.name))
        base = run.recipe.get("base", {})
        return Origin(
            adapter_sha256=adapter_sha256, name=run.name, step=adapter.step, base=_base_name(base),
            hub_base=bool(HUB_ID.match(base.get("model", ""))), **_base_facts(base),
            training=_without_folders(run.recipe.get("training", {})), evaluation=run.recipe.get("evaluation", {}),
            run_uid=run.run_uid, mlflow_run_id=run.mlflow_run_id, git_commit=run.git_commit,
            created_at=adapter.created_at.strftime("%Y-%m-%dT%H:%M:%SZ"),
            snapshot=f"{snapshot.dataset}@v{snapshot.version}" if snapshot else None,
            snapshot_digest=snapshot.digest if snapshot else None,
            train_images=_count(session, snapshot), rejected=snapshot.rejected if snapshot else None,
            licences=_counts(session, snapshot, SnapshotItem.licence),
            sources=_counts(session, snapshot, SnapshotItem.source),
            metrics=evaluation.metrics if evaluation else {}, verdict=evaluation.verdict if evaluation else {},
            version=version, started_at=run.created_at.timestamp(), finished_at=adapter.created_at.timestamp(),
            data=_data(bench, run, snapshot, adapter.step), curation=run.recipe.get("curation", {}),
            rejects=snapshot.profile.get("rejects", {}) if snapshot else {}, **_training_facts(bench, adapter))


def _without_folders(training: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with the name alone of the one that is a path."""
    start = training.get("init_adapter")
    return {**training, "init_adapter": PurePath(start).name if start else None}


def _data(bench: Bench, run: Run, snapshot: Snapshot | None, steps: int) -> dict[str, Any]:
    """Empty where the snapshot's manifest or the base is gone."""
    if snapshot is None or not bench.store.path(snapshot.digest).exists():
        return {}
    training = TrainingConfig.model_validate(run.recipe.get("training", {}))
    try:
        path, pipeline = find_base(BaseModelConfig.model_validate(run.recipe.get("base", {})))
    except BaseModelError:
        return {}
    geometry = FAMILIES[pipeline].geometry(path)
    rows = read_manifest(bench.store, snapshot.digest)
    return data_metadata(rows, snapshot.dataset, training, sizing_of(geometry, training), steps)


def _training_facts(bench: Bench, adapter: Adapter) -> dict[str, Any]:
    with bench.catalog.read() as session:
        result = session.get(StageResultRow, adapter.stage_key)
    if result is None or not bench.store.path(result.manifest_sha256).exists():
        return {"seconds": None, "hardware": None}
    facts = json.loads(bench.store.read(result.manifest_sha256))["facts"]
    return {"seconds": result.seconds, "hardware": facts.get("device")}


def _run_of(session: Session, adapter: Adapter | None, run_uid: str | None) -> Run | None:
    if adapter is None:
        return None
    if run_uid is not None:
        return session.get(Run, run_uid)
    return session.scalars(select(Run).join(StageRun, StageRun.run_uid == Run.run_uid)
                           .where(StageRun.key == adapter.stage_key).order_by(Run.run_uid.desc())).first()


def _base_name(base: Mapping[str, Any]) -> str:
    model = base.get("model", "embedded")
    return model if HUB_ID.match(model) else PurePath(model).name


def _base_facts(base: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of Origin that the base's folder tells; without it, as much as is true of most bases."""
    try:
        found = resolve_base(BaseModelConfig.model_validate(base))
    except BaseModelError:
        return {"base_sha256": None, "pipeline": "StableDiffusionPipeline", "architecture": "stable-diffusion-v1",
                "base_version": "sd_v1", "resolution": None, "base_revision": base.get("revision"), "prediction": None,
                "zero_terminal_snr": None}
    name, version = found.architecture.modelspec(found.path), ARCHITECTURES[found.family].base_version
    if name.startswith("stable-diffusion-v2"):
        version = "sd_v2_v" if name.endswith("-v") else "sd_v2"
    if found.name == "embedded":
        name, version = "safelight-embedded", None
    scheduler = found.architecture.scheduler_config(found.path)
    betas = "beta_schedule" in scheduler and not scheduler.get("use_flow_sigmas")
    return {"base_sha256": found.digest, "pipeline": found.family, "architecture": name, "base_version": version,
            "resolution": found.architecture.geometry(found.path).resolution, "base_revision": found.revision,
            "prediction": MODELSPEC_PREDICTIONS.get(scheduler.get("prediction_type", "epsilon")) if betas else None,
            "zero_terminal_snr": bool(scheduler.get("rescale_betas_zero_snr")) if betas else None}


def _count(session: Session, snapshot: Snapshot | None) -> int | None:
    return None if snapshot is None else session.scalar(select(func.count()).select_from(SnapshotItem).where(
        SnapshotItem.snapshot_id == snapshot.id, SnapshotItem.kept, SnapshotItem.split == "train"))


def _counts(session: Session, snapshot: Snapshot | None, column: Any) -> dict[str, int]:
    if snapshot is None:
        return {}
    rows = session.execute(
        select(column, func.count()).where(SnapshotItem.snapshot_id == snapshot.id, SnapshotItem.kept)
        .group_by(column).order_by(func.count().desc(), column))
    return {PurePath(value).name if value else "not stated": count for value, count in rows}


def card_images(bench: Bench, adapter_sha256: str, folder: Path) -> list[tuple[str, str]]:
    """Copy a few generations of the adapter beside the card; returns (path in the folder, prompt) of each."""
    with bench.catalog.read() as session:
        rows = session.execute(
            select(Generation.image_sha256, Generation.prompt).where(
                Generation.adapter_sha256 == adapter_sha256, Generation.role == "candidate")
            .order_by(Generation.evaluation_key.desc(), Generation.prompt_index, Generation.seed)
            .limit(4 * IMAGES)).all()
    prompts: dict[str, str] = {}
    for sha256, prompt in rows:
        prompts.setdefault(prompt, sha256)
    images = []
    for number, (prompt, sha256) in enumerate(list(prompts.items())[:IMAGES]):
        name = f"images/{number}.png"
        with atomic_write(folder / name) as file:
            file.write(bench.store.read(sha256))
        images.append((name, prompt))
    return images


def write_card(path: Path, origin: Origin, images: Sequence[tuple[str, str]], files: Mapping[str, str],
               tokens: Sequence[Token] = ()) -> None:
    """Write the card and, beside it, the licence that it links to; `files` maps a layout to its file name.

    What is not known is left out, never a placeholder.
    """
    parts = [_front_matter(origin, images, tokens), f"# {_text(origin.title)}", _introduction(origin),
             _usage(origin, files, tokens), _evaluation(origin), _data_section(origin), _training(origin),
             _limits(origin)]
    with atomic_write(path) as file:
        file.write(("\n\n".join(part for part in parts if part) + "\n").encode())
    with atomic_write(path.with_name(LICENCE_FILE)) as file:
        file.write(f"# {_text(origin.title)}\n\n{_licence(origin)}\n".encode())


def _front_matter(origin: Origin, images: Sequence[tuple[str, str]], tokens: Sequence[Token]) -> str:
    lines = ["---", "license: other", "license_name: as-training-data-and-base", f"license_link: {LICENCE_FILE}"]
    if origin.hub_base:
        lines += [f"base_model: {origin.base}", "base_model_relation: adapter"]
    template = "sd-lora" if ARCHITECTURES[origin.pipeline].denoiser == "unet" else "diffusion-lora"
    lines += ["library_name: diffusers", "pipeline_tag: text-to-image",
              f"tags: [text-to-image, diffusers, lora, 'template:{template}']"]
    if tokens:
        lines.append(f"instance_prompt: {json.dumps(' '.join(token.name for token in tokens))}")
    if images:
        lines.append("widget:")
        lines += [line for name, prompt in images for line in (f"  - text: {json.dumps(prompt)}",
                                                               f"    output: {{url: {name}}}")]
    return "\n".join([*lines, "---"])


def _introduction(origin: Origin) -> str:
    return f"<Gallery />\n\n{_text(origin.description)}"


def _usage(origin: Origin, files: Mapping[str, str], tokens: Sequence[Token]) -> str:
    lines = ["## Use"]
    lines += [f"\nThe adapter learnt a word of its own, `{token.name}`: prompts have to use it." for token in tokens]
    if "diffusers" in files:
        base = origin.base if origin.hub_base else f"<folder of {origin.base}>"
        lines += ["", "```python", "import torch", "from diffusers import DiffusionPipeline", "",
                  f'pipeline = DiffusionPipeline.from_pretrained("{base}", dtype=torch.float32)',
                  f'pipeline.load_lora_weights(".", weight_name="{files["diffusers"]}")',
                  *(line for place, token in enumerate(tokens)
                    for line in _loading(token, files[f"embeddings-{place + 1}" if place else "embeddings"], origin)),
                  "```"]
    if "kohya" in files:
        readers = ARCHITECTURES[origin.pipeline].readers["kohya"]
        lines += ["", f"For {readers} put `{files['kohya']}` into the folder of LoRA models; weight 1 is what was "
                      "evaluated." + (" Diffusers does not read that file: it carries the word." if tokens else "")]
    if "comfyui" in files:
        lines += ["", f"For ComfyUI put `{files['comfyui']}` into `models/loras`."]
    if tokens and {"kohya", "comfyui"} & set(files):
        lines += ["", "ComfyUI knows the word as `embedding:NAME` when the same file lies in `models/embeddings` too."]
    return "\n".join(lines)


def _loading(token: Token, file: str, origin: Origin) -> Iterator[str]:
    """The lines of Python that put a learned word into a stock pipeline."""
    if len(token.vectors) == 1:
        yield f'pipeline.load_textual_inversion(".", weight_name="{file}")'
        return
    yield f'vectors = safetensors.torch.load_file("{file}")'
    for part, key in encoder_keys(origin.pipeline).items():
        tokenizer = part.replace("text_encoder", "tokenizer")
        yield (f'pipeline.load_textual_inversion(vectors["{key}"], token="{token.name}", '
               f"text_encoder=pipeline.{part}, tokenizer=pipeline.{tokenizer})")


def _evaluation(origin: Origin) -> str:
    rows = [(name, metric) for name, metric in origin.metrics.items() if isinstance(metric, dict)]
    if not rows:
        return ""
    settings = origin.evaluation
    lines = ["## Evaluation", "",
             "Difference: this adapter minus what it is compared with, with its 95 % interval.", "",
             "| measure | better | base | champion | this adapter | difference | n |", "|---|---|---|---|---|---|---|"]
    for name, metric in rows:
        difference = metric.get("difference") or {}
        value, low, high = (_number(difference.get(part)) for part in ("value", "low", "high"))
        base, champion, candidate = (_number(metric.get(role)) for role in ("base", "champion", "candidate"))
        lines.append(f"| {METRICS.get(name, name)} | {metric.get('better', '')} | {base} | {champion} | {candidate} | "
                     f"{value} [{low}, {high}] | {metric.get('n')} |")
    lines += ["", f"Held-out prompts, {settings.get('num_inference_steps')} steps, guidance "
                  f"{settings.get('guidance_scale')}, first seed {settings.get('seed')}."]
    if decision := origin.verdict.get("decision"):
        reasons = [reason["sentence"] for reason in origin.verdict.get("reasons", ()) if reason.get("sentence")]
        lines += ["", f"Verdict of the gate: **{decision}**.", *(f"- {_text(sentence)}" for sentence in reasons)]
    return "\n".join(lines)


def _data_section(origin: Origin) -> str:
    if origin.snapshot is None:
        return ""
    lines = ["## Data", "", f"Snapshot `{origin.snapshot}`, manifest sha256 `{origin.snapshot_digest}`: "
                            f"{origin.train_images} training pictures, {origin.rejected} files rejected by curation."]
    for title, counts in (("licence", origin.licences), ("source", origin.sources)):
        if title == "licence" or set(counts) != {"not stated"}:
            lines += ["", f"| {title} | pictures |", "|---|---|",
                      *(f"| {_text(name)} | {count} |" for name, count in counts.items())]
    if origin.rejects:
        lines += ["", "Rejected by check: " + ", ".join(f"{check} {n}" for check, n in origin.rejects.items()) + "."]
    if curation := origin.curation:
        lines += ["", f"Held out: a share of {curation.get('test_fraction')} of the components that duplicates and "
                      "groups join, where the data names no split; none is on both sides.",
                  "", "| curation | value |", "|---|---|",
                  *(f"| `{name}` | {value} |" for name, value in curation.items() if value is not None)]
    return "\n".join(lines)


def _training(origin: Origin) -> str:
    facts = {"adapter sha256": origin.adapter_sha256, "base weights sha256": origin.base_sha256,
             "base revision": origin.base_revision, "run": origin.run_uid,
             "MLflow run": origin.mlflow_run_id, "code": origin.git_commit, "trained on": origin.hardware,
             "seconds": origin.seconds and round(origin.seconds, 1)}
    lines = ["## Training", "", "| setting | value |", "|---|---|"]
    lines += [f"| `{name}` | {value} |" for name, value in origin.training.items() if value is not None]
    return "\n".join([*lines, "", *[f"- {name}: `{value}`" for name, value in facts.items() if value]])


def _limits(origin: Origin) -> str:
    return (f"## Licence and limits\n\n{_licence(origin)}\n\nRepeating the run on the same machine, PyTorch build and "
            "thread count gives the same bytes on a CPU; on a GPU it gives the same data order and noise, and losses "
            "within tolerance.")


def _licence(origin: Origin) -> str:
    pictures = f" ({_text(origin.licence_line)})" if origin.licence_line else ""
    return (f"The adapter is derived from the pictures it was trained on{pictures} and from the weights of "
            f"`{origin.base}`: the licences of both apply.")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _text(words: str) -> str:
    """Words from a file or a person as plain text in a Markdown table: no markup, no line ends."""
    return "".join("\\" + letter if letter in "\\`*_{}[]<>#|!" else letter for letter in " ".join(words.split()))
