"""kill -9 campaign on the fine-tuning itself: every setting is interrupted at every moment, resumed, and compared.

    python -m tests.soak.resume --folder /tmp/resume

A case is a setting and a moment: the training is ended by SIGKILL there, gone on with, asked to stop by SIGTERM one
step later, and gone on with again. It passes when everything it made (adapters, log, validation losses) and everything
in its last checkpoint (weights, average, optimizer, loss scale) has the bytes of the undisturbed run. Trainings are
forked from this process, so that torch is imported once; of two processes now one, now the other is killed. Ten
pictures in batches of four cross the ends of epochs. The tally in `tally.jsonl` is kept, and a campaign that was itself
interrupted goes on where it was.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # a forked process must not wait for threads it lacks

import torch

from components.config import BaseModelConfig, TrainingConfig
from components.errors import Stopped
from components.families.bases import resolve_base
from components.stages import Bench
from components.training import checkpoints, finetune
from components.training.adapters import add_adapter
from components.training.processes import ALONE, RENDEZVOUS, Processes, joined
from components.workspace import Workspace
from tests.chain import Chain
from tests.pictures import write_pictures, write_recipe
from tests.tiny import tiny_stable_diffusion

STEPS = 6
COMMON = {
    "max_train_steps": STEPS,
    "checkpointing_steps": 2,
    "validation_items": 2,
    "validation_times": 1,
    "preview_prompts": 0,
    "targets": "attention",
}
SETTINGS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "accumulation": {"gradient_accumulation_steps": 3, "stratified_timesteps": True},
    "dropout": {"lora_dropout": 0.2, "gradient_checkpointing": True},
    "average": {"ema_decay": 0.9},
    "fp16": {"mixed_precision": "fp16"},
    "adafactor": {"optimizer": "adafactor", "learning_rate": 0.1},
    "prodigy": {"optimizer": "prodigy", "learning_rate": 1.0},
    "schedule-free": {"optimizer": "adamwschedulefree", "lr_warmup_steps": 3},
    "lion": {"optimizer": "lion"},
    "muon": {"optimizer": "muon", "lr_scheduler": "cosine"},
    "text encoder": {"train_text_encoder": True, "text_encoder_lr": 1e-3, "caption_dropout_rate": 0.5},
    "pivotal": {"train_text_encoder": True, "placeholder_token": "sign", "num_vectors": 2, "ema_decay": 0.9},
    "two processes": {"num_processes": 2},
    "two processes, accumulation": {"num_processes": 2, "gradient_accumulation_steps": 2, "ema_decay": 0.9},
    "two processes, pivotal": {"num_processes": 2, "placeholder_token": "sign", "initializer_token": "a"},
    "two processes, prodigy": {"num_processes": 2, "optimizer": "prodigy", "learning_rate": 1.0},
}
MOMENTS = [("step", step) for step in range(1, STEPS + 1)] + [("checkpoint", step) for step in range(2, STEPS + 1, 2)]
LIMIT_S = 600  # a training that hangs ends then, by SIGALRM
STOPPED, LOST = 143, 1  # exit codes: asked to stop; another process was lost
Hook = Callable[[dict[str, Any]], None]
asked_to_stop = threading.Event()


class Hooked(list):
    """A list of events whose hook sees each of them."""

    def __init__(self, hook: Hook):
        super().__init__()
        self.hook = hook

    def append(self, event: dict[str, Any]) -> None:
        super().append(event)
        self.hook(event)


def chain_in(folder: Path) -> Chain:
    """The stages over what `main` has put there, on a connection to the catalog of this process alone."""
    return Chain(Bench.open(Workspace(folder / "home")), folder / "recipe.toml", folder / "pictures", folder / "base")


def training_of(setting: str) -> tuple[str, ...]:
    return tuple(f"training.{key}={json.dumps(value)}" for key, value in (COMMON | SETTINGS[setting]).items())


def train(folder: Path, work: str, setting: str, processes: Processes, hook: Hook) -> None:
    """One training; the first process leaves in `digest` that of all it made and of its last checkpoint."""
    saved: list[str] = []
    save = finetune.save_checkpoint
    finetune.save_checkpoint = lambda *facts: saved.append((save(*facts) / checkpoints.MANIFEST_NAME).read_text())
    chain = chain_in(folder)
    product = chain.fine_tune(
        chain.recipe(*training_of(setting)),
        work=work,
        events=Hooked(hook),
        should_stop=asked_to_stop.is_set,
        processes=processes,
    )
    if processes.first:
        made = {name: ref.sha256 for name, ref in product.outputs.items()} | {"last checkpoint": saved[-1]}
        digest = hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()
        (folder / "digest").write_text(digest)


def forked(work_of: Callable[[], None]) -> int:
    """The id of a process that does it and ends with 0, or as the constants above say."""
    if pid := os.fork():
        return pid
    signal.alarm(LIMIT_S)
    signal.signal(signal.SIGTERM, lambda *_: asked_to_stop.set())
    code = LOST
    try:
        work_of()
        code = 0
    except Stopped:
        code = STOPPED
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    os._exit(code)


def attempt(folder: Path, setting: str, interrupt: Callable[[int], Hook]) -> int:
    """Train in as many processes as the setting asks for; the exit code of the first, negative for a signal.

    `interrupt(pid of the last process)` makes the first one's hook.
    """
    count = SETTINGS[setting].get("num_processes", 1)
    (folder / RENDEZVOUS).unlink(missing_ok=True)

    def member(rank: int, hook: Hook) -> None:
        if count == 1:
            train(folder, "work", setting, ALONE, hook)
            return
        with joined(rank, count, folder) as processes:
            train(folder, "work", setting, processes, hook)

    others = [forked(lambda rank=rank: member(rank, lambda event: None)) for rank in range(1, count)]
    first = forked(lambda: member(0, interrupt(others[-1] if others else os.getpid())))
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in [first, *others]]
    return codes[0]


def killed_at(kind: str, step: int) -> Callable[[int], Hook]:
    """SIGKILL when `step` is reported, or in its checkpoint when one file of several is written; odd steps kill the
    last process, even ones the first; "none" kills nothing."""

    def interrupt(other: int) -> Hook:
        victim = other if step % 2 else os.getpid()

        def hook(event: dict[str, Any]) -> None:
            if kind == "none" or "loss" not in event or event["step"] != step:
                return
            if kind == "step":
                os.kill(victim, signal.SIGKILL)
                return
            write = checkpoints._synced_sha256

            def write_and_die(path: Path) -> str:
                write(path)
                os.kill(os.getpid(), signal.SIGKILL)
                raise AssertionError("unreachable")

            checkpoints._synced_sha256 = write_and_die

        return hook

    return interrupt


def stopped_at(step: int) -> Callable[[int], Hook]:
    """SIGTERM to the last process alone when `step` is reported: it asks the others."""

    def interrupt(other: int) -> Hook:
        def hook(event: dict[str, Any]) -> None:
            if "loss" in event and event["step"] == step:
                os.kill(other, signal.SIGTERM)

        return hook

    return interrupt


def undisturbed(_: int) -> Hook:
    return lambda event: None


def case(folder: Path, setting: str, moment: tuple[str, int]) -> dict[str, Any]:
    """Kill, go on, stop, go on; what came of it, with how each attempt ended."""
    shutil.rmtree(folder / "home" / "work", ignore_errors=True)
    (folder / "digest").unlink(missing_ok=True)
    started, ends = time.monotonic(), []
    for interrupt in (killed_at(*moment), stopped_at(moment[1] + 1), undisturbed):
        ends.append(attempt(folder, setting, interrupt))
        if ends[-1] == 0:
            break
    digest = (folder / "digest").read_text() if ends[-1] == 0 else None
    seconds = round(time.monotonic() - started, 1)
    return {"setting": setting, "moment": list(moment), "ends": ends, "digest": digest, "seconds": seconds}


def prepare(folder: Path) -> None:
    """Base, pictures, recipe, snapshot and latent cache, made in a process of their own: no connection outlives it."""
    write_recipe(folder / "recipe.toml", write_pictures(folder / "pictures", shapes=3, held_out=1), folder / "base")
    tiny_stable_diffusion(folder / "base")
    chain = chain_in(folder)
    chain.bench.catalog.migrate()
    chain.cache(chain.recipe())


def warm(folder: Path) -> None:
    """Import, once for all that is forked later, what a training imports lazily."""
    import pandas  # noqa: F401  # by reading a table
    import pyarrow.dataset  # noqa: F401

    base = resolve_base(BaseModelConfig(model=str(folder / "base")))
    add_adapter(base.architecture.load_denoiser(base.path, "cpu"), base.architecture, TrainingConfig())
    base.architecture.load_clip_prompts(base.path, "cpu", torch.float32)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--folder", type=Path, required=True)
    folder: Path = options.parse_args().folder.resolve()
    torch.set_num_threads(1)
    if not (folder / "ready").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if os.waitpid(forked(lambda: prepare(folder)), 0)[1]:
            sys.exit("the latent cache could not be made")
        (folder / "ready").touch()
    warm(folder)
    tally_path = folder / "tally.jsonl"
    tally = [json.loads(line) for line in tally_path.read_text().splitlines()] if tally_path.exists() else []
    done = {(line["setting"], *line["moment"]) for line in tally}
    for setting in SETTINGS:
        for moment in [("none", STEPS), *MOMENTS]:  # the undisturbed run first
            if (setting, *moment) not in done:
                tally.append(case(folder, setting, moment))
                with tally_path.open("a") as file:
                    file.write(json.dumps(tally[-1]) + "\n")
                print(json.dumps(tally[-1]), flush=True)
    wanted = {line["setting"]: line["digest"] for line in tally if line["moment"][0] == "none"}
    cases = [line for line in tally if line["moment"][0] != "none"]
    bad = [line for line in cases if line["digest"] is None or line["digest"] != wanted[line["setting"]]]
    unharmed = [line for line in cases if line["ends"][0] == 0]
    print(f"{len(cases)} cases, {len(bad)} with other bytes, {len(unharmed)} that nothing interrupted")
    sys.exit(1 if bad or unharmed else 0)


if __name__ == "__main__":
    main()
