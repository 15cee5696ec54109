"""Captioning a recipe's pictures: what is known is not asked again, one bad picture costs no other its caption.

A caption is known by the picture's bytes, the captioner, its revision and what it was asked. Every batch is committed
as it is done, so that a kill costs no more than the batch at work. Sources are only read.
"""

import hashlib
import time
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image

from components.captioning.captioner import (
    CaptionContext,
    Captioner,
    CaptionResult,
    Generation,
    captioner_class,
)
from components.captioning.weights import Weights, is_offline
from components.catalog import captions as stored
from components.catalog.captions import CaptionVersion
from components.config import CaptionsConfig, DataConfig
from components.curation.captions import filled
from components.curation.choosing import filled_in, lacks_caption, places_of
from components.curation.items import Item
from components.curation.memory import hash_files
from components.curation.pixels import UnreadableImage, read_image
from components.curation.scanning import ScannedFile, scan
from components.curation.sources import read_picture, worded
from components.errors import OutOfMemory, SafelightError, Stopped
from components.stages import Bench, canonical_json

EXAMPLES = 8  # captions that a report shows
NO_ROOM = ("can't allocate memory", "failed to allocate memory", "bad allocation")  # of torch and ONNX Runtime, on CPUs

Event = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Extent:
    """Which pictures a captioner is shown."""

    everything: bool = False  # also those that have a caption
    overwrite: bool = False  # also what this captioner has captioned before; its words become another version
    dry_run: int | None = None  # so many, spread over the set, of which nothing is kept


@dataclass(frozen=True, slots=True)
class Subject:
    """A picture to caption, what is asked of it, and what the answer will be known by."""

    file: ScannedFile
    context: CaptionContext
    prompt_hash: str

    @property
    def sha256(self) -> str:
        return str(self.file.sha256)


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one picture."""

    subject: Subject
    result: CaptionResult


@dataclass(slots=True)
class Report:
    """What a captioner did, as it goes on."""

    captioner: str
    source: str
    revision: str
    wanted: int
    known: int = 0  # of these, captioned by an earlier run
    captioned: int = 0
    seconds: float = 0.0
    failed: list[dict[str, str]] = field(default_factory=list)
    examples: list[dict[str, Any]] = field(default_factory=list)


def caption_pictures(
    bench: Bench,
    data: DataConfig,
    captions: CaptionsConfig,
    spec: str,
    *,
    dataset: str,
    extent: Extent,
    on_event: Event,
    should_stop: Callable[[], bool] = lambda: False,
) -> Report:
    """Let the captioner NAME=SOURCE caption the pictures of a recipe that nobody has captioned.

    Raises BadInput for a captioner or source that cannot be used, OutOfMemory when not even one picture fits, Stopped
    when asked to stop; what is committed stays.
    """
    captioner, source = _captioner(bench, spec, captions)
    found = scan(
        bench,
        data,
        captioned=False,
        on_progress=lambda step, done, total: on_event(
            {"event": "progress", "stage": step, "done": done, "total": total}
        ),
    )
    subjects = _subjects(found.files, data, captions, captioner, stored.edits(bench.catalog, dataset).keys(), extent)
    report = Report(captioner.name, source, captioner.revision, len(subjects))
    if not extent.overwrite:
        known = stored.captioned_by(bench.catalog, {one.sha256 for one in subjects}, captioner.name, captioner.revision)
        subjects = [one for one in subjects if (one.sha256, one.prompt_hash) not in known]
        report.known = report.wanted - len(subjects)
    if extent.dry_run is not None:
        subjects = subjects[:: max(1, len(subjects) // extent.dry_run)][: extent.dry_run]
    if not subjects:
        return report
    started = time.monotonic()
    asker = _loaded(captioner, min(captions.batch_size, captioner.max_batch), on_event)
    for answers in asker.all_of(subjects, should_stop):
        versions = [_version(answer, captioner, source) for answer in answers if answer.result.error is None]
        if extent.dry_run is None:
            versions = stored.store(bench.catalog, versions)
        _note(report, answers, versions, data, captions)
        on_event(
            {
                "event": "progress",
                "done": report.known + report.captioned + len(report.failed),
                "total": report.known + len(subjects),
            }
        )
    report.seconds = time.monotonic() - started
    return report


# what is asked ------------------------------------------------------------------------------------------------------


def _captioner(bench: Bench, spec: str, captions: CaptionsConfig) -> tuple[Captioner, str]:
    name, _, source = spec.partition("=")
    make = captioner_class(name)
    weights = Weights.at(source, lambda paths: hash_files(bench.catalog, paths), getattr(make, "renamed", None))
    return make(weights, Generation(captions.max_new_tokens, captions.num_beams)), source


def _subjects(
    files: Sequence[ScannedFile],
    data: DataConfig,
    captions: CaptionsConfig,
    captioner: Captioner,
    edited: Container[str],
    extent: Extent,
) -> list[Subject]:
    """The pictures to caption, each content once, in the order of their names."""
    template = captions.prompts.get(captioner.name, captioner.default_prompt)
    subjects: dict[tuple[str, str], Subject] = {}
    for file in files:
        item = file.item
        usable = item.problem is None or item.problem.check == "caption"
        if file.sha256 is None or not usable:
            continue
        if not extent.everything and (not lacks_caption(item) or file.sha256 in edited):
            continue
        context = _context(item, data, template)
        asked = canonical_json([context.prompt, captioner.settings])
        subject = Subject(file, context, hashlib.sha256(asked).hexdigest())
        subjects.setdefault((subject.sha256, subject.prompt_hash), subject)
    return list(subjects.values())


def _context(item: Item, data: DataConfig, template: str) -> CaptionContext:
    caption = "" if lacks_caption(item) else item.caption
    places = places_of(item, data.sources[item.origin]) | {"caption": caption}
    return CaptionContext(item.file_name, filled(template, places), caption, places["trigger"], places["class"])


# asking -------------------------------------------------------------------------------------------------------------


def _loaded(captioner: Captioner, batch_size: int, on_event: Event) -> "_Asker":
    import torch

    from components.tensors import default_device

    device = default_device()
    if captioner.needs_gpu and device == "cpu":
        on_event({"event": "log", "message": f"{captioner.name} takes long without a GPU"})
    captioner.load(device, torch.float32 if device == "cpu" else torch.bfloat16, is_offline())
    return _Asker(captioner, min(batch_size, captioner.max_batch), on_event)


class _Asker:
    """Asks in batches: halves of one that does not fit, one by one where a batch fails."""

    def __init__(self, captioner: Captioner, batch_size: int, on_event: Event):
        self._captioner, self._size, self._on_event = captioner, batch_size, on_event
        self._any_fitted = False

    def all_of(self, subjects: Sequence[Subject], should_stop: Callable[[], bool]) -> Iterator[list[Answer]]:
        """The answers, a list for each batch."""
        start = 0
        while start < len(subjects):
            if should_stop():
                raise Stopped("stopped by SIGTERM; the same command goes on from the last caption")
            batch = subjects[start : start + self._size]
            start += len(batch)
            yield self._answers(batch)

    def _answers(self, batch: Sequence[Subject]) -> list[Answer]:
        failed, images = [], []
        for subject in batch:
            try:
                images.append((subject, _picture(subject)))
            except (OSError, UnreadableImage) as error:
                failed.append(Answer(subject, CaptionResult(error=str(error))))
        return [*failed, *self._asked(images)]

    def _asked(self, images: Sequence[tuple[Subject, Image.Image]]) -> list[Answer]:
        """The answers of pictures that go through together, as far as that works."""
        if not images:
            return []
        try:
            results = self._captioner.caption([image for _, image in images], [one.context for one, _ in images])
            self._any_fitted = True
            return [Answer(one, _checked(result)) for (one, _), result in zip(images, results, strict=True)]
        except SafelightError:
            raise
        except Exception as error:
            lacks_room = _is_out_of_memory(error)
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if len(images) == 1:
            if lacks_room and not self._any_fitted:
                raise OutOfMemory(
                    f"captioner {self._captioner.name}: out of memory with one picture; choose a smaller"
                    " model, or free memory"
                )
            return [Answer(images[0][0], CaptionResult(error=reason))]
        if lacks_room:
            _free_memory()
            half = (len(images) + 1) // 2
            if half < self._size:
                self._size = half
                self._on_event(
                    {"event": "log", "message": f"out of memory with {len(images)} pictures: it goes on with {half}"}
                )
            return [*self._asked(images[:half]), *self._asked(images[half:])]
        return [answer for image in images for answer in self._asked([image])]


def _picture(subject: Subject) -> Image.Image:
    """Upright RGB, as training sees it. Raises OSError or UnreadableImage."""
    data = read_picture(subject.file.item)
    if hashlib.sha256(data).hexdigest() != subject.sha256:
        raise OSError("it changed while it was being read; run the same command again")
    return read_image(data).image


def _checked(result: CaptionResult) -> CaptionResult:
    """A caption without a word is none."""
    text = " ".join(result.text.replace("\0", "").split())
    if result.error is None and not text and not result.tags:
        return CaptionResult(error="the captioner said nothing")
    return replace(result, text=text)


def _is_out_of_memory(error: Exception) -> bool:
    import torch

    said = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in said for words in NO_ROOM)


def _free_memory() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# writing down -------------------------------------------------------------------------------------------------------


def _version(answer: Answer, captioner: Captioner, source: str) -> CaptionVersion:
    subject = answer.subject
    return CaptionVersion(
        subject.sha256,
        stored.ANY_DATASET,
        captioner.name,
        captioner.kind,
        answer.result.text,
        answer.result.tags,
        source,
        captioner.revision,
        subject.context.prompt,
        subject.prompt_hash,
    )


def _note(
    report: Report,
    answers: Sequence[Answer],
    versions: Sequence[CaptionVersion],
    data: DataConfig,
    captions: CaptionsConfig,
) -> None:
    report.failed += [
        {"file_name": answer.subject.file.item.file_name, "error": answer.result.error}
        for answer in answers
        if answer.result.error is not None
    ]
    report.captioned += len(versions)
    answered = [answer for answer in answers if answer.result.error is None]
    for answer, version in list(zip(answered, versions, strict=True))[: EXAMPLES - len(report.examples)]:
        report.examples.append(_example(answer.subject.file.item, version, data, captions))


def _example(item: Item, version: CaptionVersion, data: DataConfig, captions: CaptionsConfig) -> dict[str, Any]:
    """What the captioner said of a picture, and the caption that the recipe makes of that."""
    source = data.sources[item.origin]
    policy = captions.policy if captions.policy != "none" else ("tags" if version.kind == "tags" else "prose")
    shown = captions.model_copy(update={"policy": policy, "captioners": ()})
    texts, _ = filled_in([version], item, shown, source)
    return {
        "file_name": item.file_name,
        "said": version.text,
        "tags": [list(tag) for tag in version.tags],
        "caption": worded(texts[0], source) if texts else "",
    }
