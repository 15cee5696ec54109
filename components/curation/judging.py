"""What models say of pictures, asked for once and then read from the catalog: rules over scores, without any model.

Models run elsewhere: a flow process never loads torch. What they have to look at is written down as an object of the
store, and `Measure` is whatever has it done; scores and features come back through the catalog.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from components.config import CheckConfig, CurationConfig
from components.curation.checks import THRESHOLDS, Verdict
from components.curation.judges.plugins import Plugin, plugins
from components.curation.measured import known_figures
from components.errors import BadInput, StageFailed
from components.stages import Bench, canonical_json

Measure = Callable[[str], object]   # does the work that the object of this digest describes


@dataclass(frozen=True, slots=True)
class Subject:
    """A picture to be looked at: the digest of its pixels, the stored bytes that hold them, and its caption."""

    rgb_digest: str
    sha256: str
    caption: str


def model_checks(curation: CurationConfig) -> dict[str, CheckConfig]:
    """The recipe's checks by models. Raises BadInput where another check is given a model or a decision."""
    for name, check in curation.judged().items():
        if name in THRESHOLDS and check != CheckConfig(threshold=check.threshold):
            raise BadInput(f"curation.checks.{name} takes a threshold only: write {name} = {check.threshold:g}")
    return {name: check for name, check in curation.judged().items() if name not in THRESHOLDS}


def revisions_of(curation: CurationConfig) -> dict[str, str]:
    """The revision of each model that checks ask, by the check's name: a snapshot depends on it."""
    checks = model_checks(curation)
    return {name: plugin.revision(checks[name]) for name, plugin in plugins(checks).items()}


def measure_name(name: str, revision: str) -> str:
    return f"{name}:{revision}"


def item_of(plugin: Plugin, rgb_digest: str, caption: str) -> str:
    """What a score is kept under besides the model: the picture, and its caption where that is read too."""
    return f"{rgb_digest}:{hashlib.sha256(caption.encode()).hexdigest()}" if plugin.reads_caption else rgb_digest


def no_models(work: str) -> None:
    """The Measure of a process without models."""
    raise StageFailed("the recipe asks for checks or features by models, which nothing here runs; hand a Measure over")


def describe_work(bench: Bench, checks: Mapping[str, CheckConfig], embedder: str | None,
                  subjects: Sequence[Subject]) -> str:
    """The digest of an object that says which pictures are to be looked at by which models."""
    captions: dict[tuple[str, str], dict[str, None]] = {}
    for subject in subjects:
        captions.setdefault((subject.rgb_digest, subject.sha256), {})[subject.caption] = None
    return bench.store.put(canonical_json({
        "checks": {name: check.model_dump(mode="json") for name, check in checks.items()}, "embedder": embedder,
        "pictures": [[*picture, list(said)] for picture, said in captions.items()]})).sha256


def judge_by_models(bench: Bench, curation: CurationConfig, subjects: Sequence[Subject],
                    measure: Measure) -> list[list[Verdict]]:
    """The verdicts of every check by a model on every subject, passed ones too; models see what is new to them."""
    checks = model_checks(curation)
    asked, verdicts = plugins(checks), [[] for _ in subjects]
    missing = {name for name, plugin in asked.items() if None in _scores(bench, plugin, checks[name], subjects)}
    if missing:
        measure(describe_work(bench, {name: checks[name] for name in checks if name in missing}, None, subjects))
    for name, plugin in asked.items():
        check, revision = checks[name], plugin.revision(checks[name])
        for i, score in enumerate(_scores(bench, plugin, check, subjects)):
            if score is None:
                raise StageFailed(f"curation.checks.{name} gave no score for {subjects[i].sha256[:12]}…; run it again")
            failed = score < check.threshold if plugin.fails == "below" else score > check.threshold
            verdicts[i].append(Verdict(name, score, check.threshold, check.decision if failed else "keep",
                                       plugin.says.format(score=score, threshold=check.threshold), revision))
    return verdicts


def _scores(bench: Bench, plugin: Plugin, check: CheckConfig, subjects: Sequence[Subject]) -> list[float | None]:
    items = [item_of(plugin, subject.rgb_digest, subject.caption) for subject in subjects]
    known = known_figures(bench.catalog, measure_name(plugin.name, plugin.revision(check)), set(items))
    return [float(known[item][0]) if item in known else None for item in items]
