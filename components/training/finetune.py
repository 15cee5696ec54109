"""The fine-tune stage: a LoRA on cached latents, exact to the bit however often it is stopped and resumed."""

import io
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components.config import TrainingConfig
from components.curation.manifest import SampleRow
from components.diffusion.draws import Draw, Draws
from components.diffusion.noise import INPUT_NOISES, NOISES, chosen, white
from components.diffusion.objectives import Objective, objective_from_scheduler
from components.diffusion.timesteps import DENSITIES, shift_of
from components.diffusion.weighting import weighting_of
from components.errors import BadInput, BaseModelError, DamagedArtifact, Stopped
from components.evaluation.generation import Request, Settings, draw_batch
from components.evaluation.prompts import choose_prompts
from components.families.bases import BaseModel
from components.families.placement import release_memory
from components.latents.keys import NULL_PROMPT, caption_item, training_size, training_sizing
from components.latents.ragged import Tensors, replaced
from components.latents.wording import Wording
from components.stages import Bench, Product, canonical_json
from components.storage import ObjectRef
from components.tensors import default_device, device_name, to_safetensors
from components.training.acceleration import GraphedPasses, loading_device, prepare, tensor_cores
from components.training.adapters import adapter_bytes, add_adapter, limit_norms
from components.training.checkpoints import (
    newest_checkpoint,
    optimizer_numbers,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)
from components.training.ema import ExponentialAverage
from components.training.gradients import LossScaler, Passes
from components.training.imports import continue_adapter, without_adapter
from components.training.loop import StepReport, fit
from components.training.optimizers import OPTIMIZERS, averaged
from components.training.order import batches_from
from components.training.priors import class_rows, spread_over
from components.training.processes import ALONE, Processes
from components.training.samples import CachedSamples, LatentBatch, Positions, cached_samples
from components.training.schedules import learning_rate_at
from components.training.texts import TextSide, text_side
from components.training.validation import log_mean_ratio, validation_losses

PREVIEW_STEPS = 12  # sampler steps of a preview: a look, not a measurement
PREVIEW_GUIDANCE = 4.0
Event = Callable[[dict[str, Any]], None]
PRECISIONS: dict[str, Callable[[str], torch.dtype]] = {  # training.mixed_precision -> of a device
    "auto": lambda device: torch.bfloat16 if device == "cuda" else torch.float32,
    "no": lambda _: torch.float32,
    "bf16": lambda _: torch.bfloat16,
    "fp16": lambda _: torch.float16,
}


def objective_of(base: BaseModel, training: TrainingConfig) -> Objective:
    """The objective that the base was trained with. Raises BaseModelError when the recipe asks for another."""
    scheduler = base.architecture.scheduler_config(base.path)
    try:
        return objective_from_scheduler(
            scheduler,
            prediction_type=training.prediction_type,
            to_time=DENSITIES[training.timestep_sampling](training),
            shift=shift_of(training, scheduler, base.architecture.geometry(base.path).patch),
            weighting=weighting_of(training),
            noise=chosen(NOISES, training),
            input_noise=chosen(INPUT_NOISES, training),
        )
    except BaseModelError as refusal:
        raise BaseModelError(f"{base.path / 'scheduler' / 'scheduler_config.json'}: {refusal}") from None


def fine_tune(
    bench: Bench,
    rows: Sequence[SampleRow],
    base: BaseModel,
    training: TrainingConfig,
    work_dir: Path,
    *,
    on_event: Event,
    should_stop: Callable[[], bool],
    processes: Processes = ALONE,
) -> Product:
    """Train an adapter on the train split, resuming from `work_dir`'s newest complete checkpoint.

    Of several `processes` the first makes the product and tells of it, the others only help to make the gradients.
    Outputs: "adapter", "adapter-<step>" per checkpoint, "log" (JSON lines), "validation" (losses (N, T) of base and of
    every checkpoint), "preview-<step>-<i>". Raises Stopped after SIGTERM with a checkpoint saved, TrainingDiverged when
    the loss is not finite.
    """
    repeated, given = (
        [row for row in rows if row.split == "train" and row.is_reg is is_reg for _ in range(row.repeats)]
        for is_reg in (False, True)
    )
    if training.masked_loss and not any(row.mask for row in repeated):
        raise BadInput(
            "training.masked_loss is set, but no training picture has a mask; say where they are with masks in "
            "[[data.sources]]"
        )
    wording, sizing, masked = Wording.of(training), training_sizing(base, training), training.masked_loss
    prior = spread_over(given + class_rows(bench, base, training, sizing), len(repeated))
    weights = [1.0] * len(repeated) + [training.prior_loss_weight] * len(prior) if prior else ()
    train = cached_samples(bench, repeated + prior, base, sizing, masked=masked, wording=wording, weights=weights)
    held_out_rows = [row for row in rows if row.split == "test"]
    shown = _spread(held_out_rows, training.validation_items)
    held_out = cached_samples(bench, shown, base, sizing.largest, masked=masked)
    if not train.rows:
        raise BadInput("the train split is empty; lower curation.test_fraction or add pictures")
    splits = train, held_out, held_out_rows
    release_memory()  # of what drew the class
    with tensor_cores(default_device()):
        return _FineTuning(bench, base, training, *splits, work_dir, on_event, should_stop, processes)()


def _spread(rows: Sequence[SampleRow], count: int) -> list[SampleRow]:
    """At most `count` rows, evenly over the sorted list."""
    if len(rows) <= count:
        return list(rows)
    return [rows[i * len(rows) // count] for i in range(count)]


class _FineTuning:
    """One training with its checkpoints, log, validation and previews; `__call__` runs it to the end."""

    def __init__(
        self,
        bench: Bench,
        base: BaseModel,
        training: TrainingConfig,
        train: CachedSamples,
        held_out: CachedSamples,
        held_out_rows: Sequence[SampleRow],
        work_dir: Path,
        on_event: Event,
        should_stop: Callable[[], bool],
        processes: Processes,
    ):
        self.bench, self.base, self.training = bench, base, training
        self.train, self.held_out, self.work_dir = train, held_out, work_dir
        self.on_event, self.should_stop, self.processes = on_event, should_stop, processes
        self.family, self.device = base.architecture, default_device()
        self.precision = PRECISIONS[training.mixed_precision](self.device)
        self.passes, self.scaler = Passes(), LossScaler(self.device, enabled=self.precision is torch.float16)
        self.scaled_latents = self.family.scaled_latents(base.path)
        self.objective = objective_of(base, training)
        bf16 = self.precision is torch.bfloat16 and self.device != "cpu"
        self.dtype = torch.bfloat16 if bf16 else torch.float32  # of frozen weights, which autocast would cast each time
        self.denoiser: Any = self.family.load_denoiser(base.path, loading_device(training, self.device), self.dtype)
        self.initial: dict[str, Any] = {}  # rank and alpha where a file decides them
        if training.init_adapter is None:
            self.parameters = add_adapter(self.denoiser, self.family, training)
        else:
            self.parameters, self.initial = continue_adapter(self.denoiser, base, training)
        if training.gradient_checkpointing:
            self.denoiser.enable_gradient_checkpointing()
        self.null = self.family.null_condition(base.path, train.prompts([caption_item(NULL_PROMPT).key]))
        prepare(self.denoiser, training, self.device, self.null)
        trained = [parameter for _, parameter in self.parameters]
        self.denoise = GraphedPasses(self._denoise, trained) if training.cuda_graphs else self._denoise
        self.text = text_side(base, training, self.device, self.dtype, train.texts.values())
        self.parameters += self.text.parameters if self.text else []
        self.optimizer = OPTIMIZERS[training.optimizer](self.parameters, training)
        if (limit := training.scale_weight_norms) is not None:
            self.optimizer.register_step_post_hook(lambda *_: limit_norms(self.denoiser, limit))
        if (text := self.text) is not None:
            self.optimizer.register_step_post_hook(lambda *_: text.settle())
        self.ema = ExponentialAverage(self.parameters, training.ema_decay) if training.ema_decay else None
        self.preview_prompts = choose_prompts(held_out_rows, training.preview_prompts) if held_out_rows else []
        self.log: list[dict[str, Any]] = []
        self.losses: dict[str, Tensor] = {}  # "base" and "<step>" -> (N, T)
        self.adapters: dict[int, ObjectRef] = {}
        self.previews: dict[str, ObjectRef] = {}
        self.saved = 0
        self.last_report = time.monotonic()

    def __call__(self) -> Product:
        training = self.training
        start = self.saved = self._resume()
        self.processes.require_same("checkpoint to go on from", start)
        if start == 0 and self.held_out.rows and self.processes.first:
            with without_adapter(self.denoiser, bool(self.initial)):
                self.losses["base"] = self._validate(None)
        if training.max_train_steps == 0 and self.processes.first:  # an adapter file is looked at as it is
            self._publish(0)
        self._train(True)
        done_batches = start * training.gradient_accumulation_steps * self.processes.count
        positions = batches_from(
            done_batches, self.train.ids, training.train_batch_size, seed=training.seed, buckets=self.train.buckets
        )
        done = fit(
            [parameter for _, parameter in self.parameters],
            map(self.train.at, positions),
            self._loss,
            self.optimizer,
            learning_rate_at(
                training.lr_scheduler,
                training.learning_rate,
                max_train_steps=training.max_train_steps,
                warmup_steps=training.lr_warmup_steps,
            ),
            draws=Draws(training.seed, stratified=("time",) if training.stratified_timesteps else ()),
            start_step=start,
            max_train_steps=training.max_train_steps,
            gradient_accumulation_steps=training.gradient_accumulation_steps,
            max_grad_norm=training.max_grad_norm,
            ema=self.ema,
            passes=self.passes,
            scaler=self.scaler,
            processes=self.processes,
            on_step=self._report,
            on_checkpoint=self._checkpoint,
            checkpointing_steps=training.checkpointing_steps,
            should_stop=self.should_stop,
        )
        if done < training.max_train_steps:
            raise Stopped(f"stopped after step {done} of {training.max_train_steps}; run the same command to continue")
        if not self.processes.first:
            return Product({})
        product = self._product()
        shutil.rmtree(self.work_dir, ignore_errors=True)
        return product

    # one step ---------------------------------------------------------------------------------------------------------

    def _train(self, mode: bool) -> None:
        self.denoiser.train(mode)
        if self.text:
            self.text.train(mode)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device, self.precision, enabled=self.precision is not torch.float32)

    def _denoise(self, x_t: Tensor, timestep: Tensor, cond: Tensors) -> Tensor:
        with self._autocast():
            return self.family.denoise(self.denoiser, x_t.to(self.device), timestep.to(self.device), cond).float()

    def _latents(self, batch: LatentBatch, draw: Any) -> Tensor:
        return self.scaled_latents(batch.cached, lambda shape: draw.normal(shape, "posterior")).to(self.device)

    def _condition(self, batch: LatentBatch, text: TextSide | None, dropped: Tensor | None = None) -> Tensors:
        """What the denoiser is told of a batch: as the cache has it, or as `text` reads its captions now."""
        cond = batch.cond if dropped is None else replaced(batch.cond, dropped, self.null)
        cond = {name: (c.float() if c.is_floating_point() else c).to(self.device) for name, c in cond.items()}
        if text is None:
            return cond
        with self._autocast():
            return text.condition(batch.texts, cond, dropped)

    def _loss(self, rows: Positions, draw: Draw) -> Tensor:
        """Scalar. Captions are chosen and dropped per sample, at load time, so no cache holds a draw."""
        batch = self.train.reworded(self.train.batch(rows.positions), draw)
        torch.manual_seed(draw.seed * 1_000_003 + draw.step)  # for lora_dropout, the one draw that is not ours
        dropped = draw.uniform(len(batch.sample_ids), "caption") < self.training.caption_dropout_rate
        cond, latents = self._condition(batch, self.text, dropped), self._latents(batch, draw)
        losses = self.objective.per_sample(
            self.denoise, latents, cond, draw, batch.cells(latents, self.training.unmasked_weight)
        )
        return (losses if batch.weights is None else losses * batch.weights.to(losses)).mean()

    def _report(self, report: StepReport) -> None:
        if not self.processes.first:
            return
        now = time.monotonic()
        rate = report.samples / max(now - self.last_report, 1e-9)
        self.last_report = now
        line = {
            "step": report.step + 1,
            "loss": report.loss,
            "learning_rate": report.learning_rate,
        }
        if math.isfinite(report.grad_norm):
            line["grad_norm"] = report.grad_norm
        else:  # JSON has no infinity, and a skipped step no gradient
            line["skipped_steps"] = self.scaler.skipped
        self.log.append(line)
        self.on_event({"event": "metrics", **line, "images_per_second": rate})
        self.on_event({"event": "progress", "done": report.step + 1, "total": self.training.max_train_steps})

    # checkpoints ------------------------------------------------------------------------------------------------------

    def _checkpoint(self, step: int) -> None:
        """Called after every `checkpointing_steps`, at the end (perhaps the same step once more) and when stopped."""
        if step == self.saved:
            return
        self.saved = step
        self._require_intact()
        if not self.processes.first:
            return
        if step not in self.adapters and (
            step % self.training.checkpointing_steps == 0 or step == self.training.max_train_steps
        ):
            with self.ema.applied() if self.ema else averaged(self.optimizer):
                self._publish(step)
        save_checkpoint(
            self.work_dir,
            step,
            {
                "parameters": {name: parameter.detach() for name, parameter in self.parameters},
                "optimizer": optimizer_tensors(self.optimizer),
                "losses": self.losses,
                **({"ema": self.ema.tensors} if self.ema else {}),
            },
            {
                "optimizer": optimizer_numbers(self.optimizer),
                "scaler": self.scaler.state(),
                "pass_size": self.passes.size,
                "log": self.log,
                "adapters": {str(s): [ref.sha256, ref.bytes] for s, ref in self.adapters.items()},
                "previews": {name: [ref.sha256, ref.bytes] for name, ref in self.previews.items()},
            },
        )
        self.last_report = time.monotonic()

    def _require_intact(self) -> None:
        """Asked by all processes at once: what any of them has read of damaged shards goes nowhere."""
        damage = None
        try:
            self.train.require_intact()
            self.held_out.require_intact()
        except DamagedArtifact as error:
            damage = error
        if self.processes.any(damage is not None):
            raise damage or DamagedArtifact("another process has read what was altered; run the same command again")

    def _publish(self, step: int) -> None:
        """Make a checkpoint's adapter, validation loss and previews visible outside."""
        adapted, tokens = (self.text.adapted, self.text.tokens) if self.text else ({}, ())
        ref = self.bench.store.put(adapter_bytes(self.denoiser, self.family, adapted, tokens))
        self.adapters[step] = ref
        self.on_event({"event": "checkpoint", "step": step, "sha256": ref.sha256})
        if self.held_out.rows:
            self.losses[str(step)] = self._validate(self.text)
            line = {
                "step": step,
                "validation_loss": self.losses[str(step)].mean().item(),
                "validation_ratio": log_mean_ratio(self.losses[str(step)], self.losses["base"]),
            }
            self.log.append(line)
            self.on_event({"event": "metrics", **line})
        self._preview(step)

    def _resume(self) -> int:
        checkpoint = newest_checkpoint(self.work_dir)
        if checkpoint is None:
            return 0
        with torch.no_grad():
            for name, parameter in self.parameters:
                parameter.copy_(checkpoint.tensors["parameters"][name])
        restore_optimizer(self.optimizer, checkpoint.tensors["optimizer"], checkpoint.facts["optimizer"])
        if self.ema:
            self.ema.load(checkpoint.tensors["ema"])
        self.scaler.load(checkpoint.facts["scaler"])
        self.passes.size = checkpoint.facts["pass_size"]
        self.losses, self.log = checkpoint.tensors.get("losses", {}), checkpoint.facts["log"]
        self.adapters = {int(step): ObjectRef(*ref) for step, ref in checkpoint.facts["adapters"].items()}
        self.previews = {name: ObjectRef(*ref) for name, ref in checkpoint.facts["previews"].items()}
        for ref in (*self.adapters.values(), *self.previews.values()):
            self.bench.store.keep(ref)
        self.on_event({"event": "log", "message": f"resumed from step {checkpoint.step}"})
        return checkpoint.step

    def _validate(self, text: TextSide | None) -> Tensor:
        """Losses in plain white noise, so that runs with other noise settings can be compared; without `text` prompts
        are as the base reads them."""
        self._train(False)
        objective = replace(self.objective, noise=white, input_noise=white)

        def per_sample(positions: Sequence[int], draw: Any) -> Tensor:
            batch = self.held_out.batch(positions)
            cond, latents = self._condition(batch, text), self._latents(batch, draw)
            return objective.per_sample(
                self._denoise, latents, cond, draw, batch.cells(latents, self.training.unmasked_weight)
            ).cpu()

        held_out, times = self.held_out, self.training.validation_times
        losses = validation_losses(per_sample, held_out.ids, times, held_out.buckets)
        self._train(True)
        return losses

    def _preview(self, step: int) -> None:
        if not self.preview_prompts:
            return
        self._train(False)
        parts = self.text.pipeline_parts if self.text else {}
        pipeline = self.family.load_pipeline(self.base.path, self.device, self.dtype, self.denoiser, **parts)
        settings = Settings(
            PREVIEW_STEPS,
            PREVIEW_GUIDANCE,
            "auto",
            training_size(self.base, self.training),
            len(self.preview_prompts),
            torch.get_num_threads(),
        )
        requests = [Request(i, text, group, seed=i) for i, (text, group) in enumerate(self.preview_prompts)]
        for i, image in enumerate(draw_batch(pipeline, requests, settings)):
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            ref = self.bench.store.put(buffer.getvalue())
            self.previews[f"preview-{step}-{i}"] = ref
            self.on_event({"event": "preview", "step": step, "key": f"preview/{i}", "sha256": ref.sha256})
        self._train(True)

    # result -----------------------------------------------------------------------------------------------------------

    def _product(self) -> Product:
        self.held_out.require_intact()
        put, final = self.bench.store.put, self.training.max_train_steps
        log = put("".join(json.dumps(line, sort_keys=True) + "\n" for line in self.log).encode())
        outputs = {
            "adapter": self.adapters[final],
            "log": log,
            **{f"adapter-{step}": ref for step, ref in sorted(self.adapters.items())},
            **self.previews,
        }
        facts: dict[str, Any] = {
            "final_step": final,
            "sha256": self.adapters[final].sha256,
            "rank": self.training.rank,
            "lora_alpha": self.training.lora_alpha,
            **self.initial,
            "trained_parameters": sum(parameter.numel() for _, parameter in self.parameters),
            "validation": [line for line in self.log if "validation_ratio" in line],
            "preview_prompts": [text for text, _ in self.preview_prompts],
            "device": device_name(self.device),
        }
        if self.losses:
            rows = [[row.sha256, row.group or row.text] for row in self.held_out.rows]
            outputs["validation"] = put(to_safetensors(self.losses, {"rows": canonical_json(rows).decode()}))
        return Product(outputs, facts, items=final)
