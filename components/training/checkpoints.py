"""Checkpoints that are complete or not there: safetensors files, and a manifest with their digests written last.

A checkpoint is the folder `step-00000100`. It is built under a temporary name, synced, and renamed; its manifest comes
last. No pickle: tensors are safetensors, everything else is JSON.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from components.errors import DamagedArtifact

MANIFEST_NAME = "manifest.json"
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A verified checkpoint: `tensors[file][name]` as it was saved, and the JSON `facts` next to them."""

    path: Path
    step: int  # optimizer steps done
    tensors: dict[str, dict[str, Tensor]]
    facts: dict[str, Any]


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, Any], *, keep: int = 2
) -> Path:
    """Write checkpoint `step` into `folder` and delete all but the newest `keep`, only once the new one is complete.

    `tensors` maps a file's stem to named tensors, `facts` is JSON. Returns the checkpoint's folder.
    """
    final = folder / f"step-{step:08d}"
    partial = folder / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    digests = {}
    for stem, named in tensors.items():
        path = partial / f"{stem}.safetensors"
        save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in named.items()}, path)
        digests[path.name] = _synced_sha256(path)
    manifest = {"step": step, "sha256": digests, "facts": dict(facts)}
    (partial / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2, sort_keys=True), encoding="utf-8")
    _synced_sha256(partial / MANIFEST_NAME)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    _sync_folder(folder)
    for old in _checkpoint_folders(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint. Raises: DamagedArtifact when a file is missing or is not what the manifest says."""
    try:
        manifest = json.loads((path / MANIFEST_NAME).read_text(encoding="utf-8"))
        step, digests, facts = manifest["step"], manifest["sha256"], manifest["facts"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedArtifact(
            f"{path}: no readable {MANIFEST_NAME} ({error}); resume from an older checkpoint"
        ) from None
    tensors = {}
    for name, expected in digests.items():
        file = path / name
        if not file.is_file() or (found := _sha256(file)) != expected:
            what = f"sha256 is {found[:12]}, expected {expected[:12]}" if file.is_file() else "file is missing"
            raise DamagedArtifact(f"{file}: {what}; resume from an older checkpoint")
        tensors[file.stem] = load_file(file)
    return Checkpoint(path, step, tensors, facts)


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest complete checkpoint in `folder`; damaged ones are skipped with a warning. None when there is none."""
    for path in reversed(_checkpoint_folders(folder)):
        try:
            return load_checkpoint(path)
        except DamagedArtifact as error:
            log.warning("skipping a damaged checkpoint: %s", error)
    return None


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """The tensors of the optimizer's per-parameter state, flat: "<parameter index>.<key>"."""
    return {name: value for name, value in _states(optimizer).items() if isinstance(value, Tensor)}


def optimizer_numbers(optimizer: Optimizer) -> dict[str, Any]:
    """What the optimizer holds beside tensors, as JSON: counts in its states, and what it has moved in its groups.

    Moved means away from the optimizer's defaults: Prodigy's estimate d, schedule-free's sum of weights. Learning rates
    stay out, the loop sets them; so do hyperparameters: the caller builds the optimizer before restoring it.
    """
    return {
        "states": {name: value for name, value in _states(optimizer).items() if not isinstance(value, Tensor)},
        "groups": [
            {
                key: value
                for key, value in group.items()
                if key != "lr" and isinstance(value, bool | int | float) and value != optimizer.defaults.get(key)
            }
            for group in optimizer.param_groups
        ],
    }


def restore_optimizer(
    optimizer: Optimizer, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any] | None = None
) -> None:
    """Put back what `optimizer_tensors` and `optimizer_numbers` took, over the same parameters in the same order."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in [*tensors.items(), *(numbers["states"].items() if numbers else ())]:
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for group, moved in zip(optimizer.param_groups, numbers["groups"] if numbers else (), strict=bool(numbers)):
        group.update(moved)


def _states(optimizer: Optimizer) -> dict[str, Any]:
    state = optimizer.state_dict()["state"]
    return {f"{index}.{key}": value for index, entry in state.items() for key, value in entry.items()}


def _checkpoint_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def _synced_sha256(path: Path) -> str:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return _sha256(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
