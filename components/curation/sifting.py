"""What is left out and why: every check's verdicts, then of pictures that are alike the best one stays."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from components.config import CurationConfig
from components.curation.checks import (
    CheckRules,
    ImageFacts,
    Verdict,
    judge,
    judge_captions,
    judge_licence,
    judge_set,
)
from components.curation.duplicates import duplicate_groups, near_duplicates
from components.curation.examining import Facts
from components.curation.judging import Subject
from components.curation.looks import Look, alike, looks_of
from components.curation.manifest import cells
from components.curation.profiles import Thresholds
from components.curation.scanning import ScannedFile
from components.curation.splits import Pair
from components.stages import Bench


@dataclass(slots=True)
class Batch:
    """The scanned files with what is known and said of each; `verdicts` grows as the checks speak."""

    files: Sequence[ScannedFile]
    facts: Sequence[Facts | None]
    verdicts: list[list[Verdict]] = field(default_factory=list)
    caption_verdict: Verdict | None = None

    def rejected(self, i: int) -> bool:
        return any(verdict.decision == "reject" for verdict in self.verdicts[i])

    @property
    def kept(self) -> list[int]:
        return [i for i in range(len(self.files)) if not self.rejected(i)]

    def image(self, i: int) -> ImageFacts:
        facts = self.facts[i]
        assert isinstance(facts, ImageFacts)
        return facts

    def subject(self, i: int) -> Subject:
        return Subject(self.image(i).rgb_digest, str(self.files[i].sha256), self.files[i].item.caption)

    def looks(self, bench: Bench, indices: Iterable[int]) -> dict[str, Look]:
        """The looks of these pictures by the digest of their pixels; those not seen before are decoded once more."""
        return looks_of(bench, {self.image(i).rgb_digest: str(self.files[i].sha256) for i in indices})

    def name(self, i: int) -> str:
        return self.files[i].item.file_name

    def judge(self, rules: CheckRules) -> None:
        """Every check on every file, then the flags that compare a file with its set."""
        said: dict[Verdict, Verdict] = {}  # what is said of many files is in memory once
        self.verdicts = [[said.setdefault(verdict, verdict) for verdict in judge_file(file, facts, rules)]
                         for file, facts in zip(self.files, self.facts, strict=True)]
        kept = self.kept
        for i, flags in zip(kept, judge_set([self.image(i) for i in kept], rules.thresholds), strict=True):
            self.verdicts[i] += flags
        self.caption_verdict = judge_captions([self.files[i].item.caption for i in kept])

    def drop_exact_duplicates(self) -> None:
        """Of files with the same pixels the best stays: most bytes, then first name."""
        alike: dict[str, list[int]] = {}
        for i in self.kept:
            alike.setdefault(self.image(i).rgb_digest, []).append(i)
        for members in alike.values():
            self._keep_best(members, "exact_duplicate", "Its pixels are those of {best}, which is kept.", None)

    def drop_near_duplicates(self, pairs: Sequence[Pair]) -> None:
        """Of files that all look alike the best stays: most pixels, then most bytes, then first name."""
        kept = self.kept
        place = {i: position for position, i in enumerate(kept)}
        inside = [(place[i], place[j]) for i, j in pairs if i in place and j in place]
        for group in duplicate_groups(len(kept), _as_pairs(inside)):
            self._keep_best([kept[position] for position in group.members], "near_duplicate",
                            "It looks like {best}, which is kept (a group of {size}).", group.component_size)

    def _keep_best(self, members: Sequence[int], check: str, says: str, component_size: int | None) -> None:
        best = min(members, key=lambda i: (self.files[i].item.is_reg, -self.image(i).width * self.image(i).height,
                                           -self.files[i].bytes, self.name(i)))
        for i in members:
            if i != best:
                bits = (self.image(i).phash ^ self.image(best).phash).bit_count()
                reason = says.format(best=self.name(best), size=component_size)
                self.verdicts[i].append(Verdict(check, float(bits), None, "reject", reason))

    def first_reject(self) -> str | None:
        for i, verdicts in enumerate(self.verdicts):
            for verdict in verdicts:
                if verdict.decision == "reject":
                    return f"{self.name(i)}: {verdict.check}: {verdict.reason}"
        return None

    def why_rejected(self) -> str:
        """Counts by the first check that rejected each file."""
        counts = Counter(next(v.check for v in verdicts if v.decision == "reject")
                         for i, verdicts in enumerate(self.verdicts) if self.rejected(i))
        return ", ".join(f"{number} {check}" for check, number in counts.most_common())

    def verdict_rows(self) -> Iterator[dict[str, Any]]:
        return ({"file_name": file.item.file_name, "sha256": file.sha256} | cells(verdict)
                for file, verdicts in zip(self.files, self.verdicts, strict=True) for verdict in verdicts)


def judge_file(file: ScannedFile, facts: Facts | None, rules: CheckRules) -> list[Verdict]:
    """Flags and rejects of one file; a problem with the file or its caption speaks before the checks."""
    verdicts = []
    if problem := file.item.problem:
        verdicts.append(Verdict(problem.check, None, None, "reject", problem.reason))
    if facts is not None:
        verdicts += [verdict for verdict in judge(facts, file.item.caption, rules, passed=False)
                     if not (problem and verdict.check.startswith("caption"))]
    if (unlicensed := judge_licence(file.item.licence, rules)) is not None:
        verdicts.append(unlicensed)
    if file.item.fallback:
        verdicts.append(Verdict("caption_fallback", None, None, "flag", "Its caption is its folder's class tokens."))
    return verdicts


def near_pairs(bench: Bench, batch: Batch, indices: Sequence[int], curation: CurationConfig,
               thresholds: Thresholds) -> list[Pair]:
    """Near duplicates by their hashes, as positions in `indices`.

    Drawings in one style share grounds and borders, hence hashes; there a pair must also agree pixel by pixel.
    """
    facts = [batch.image(i) for i in indices]
    pairs = near_duplicates(
        [f.phash for f in facts], [f.dhash for f in facts], [f.mean_colour for f in facts],
        phash_distance=curation.phash_distance, dhash_distance=curation.dhash_distance,
        colour_distance=curation.colour_distance, brightness_gain=thresholds.brightness_gain)
    found: list[Pair] = [(int(i), int(j)) for i, j in pairs]
    if thresholds.same_picture is None:
        return found
    looks = batch.looks(bench, [indices[position] for position in sorted({p for pair in found for p in pair})])
    return [(i, j) for i, j in found
            if alike(looks[facts[i].rgb_digest], looks[facts[j].rgb_digest]) >= thresholds.same_picture]


def _as_pairs(pairs: Sequence[Pair]) -> NDArray[np.int64]:
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)
