"""The promotion gate: one written rule that turns intervals into promote, hold or reject, and says why.

Every bound is that of the two-sided 95 % interval which is also shown. The primary metric compares the candidate with
the champion (with the base when there is none), guards compare it with the base. A gain is a difference turned so that
above 0 is better.

promote   everything passes: the primary's gain has its lower bound above `delta`, each guard's gain above -margin, and
          the copy rate's upper bound is within its limit
reject    something is shown to be bad: the primary's gain below 0, a guard's below -margin, or the copy rate above its
          limit, each by the bound on the other side
hold      anything else, and always when prompts are too few or an image failed
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from scipy import stats

from components.config import PromotionConfig
from components.errors import BadInput, IncomparableRuns
from components.evaluation.intervals import Interval

Better = Literal["higher", "lower"]
Decision = Literal["promote", "hold", "reject"]

MIN_REFERENCES = 50      # below, KID and coverage are shown but never decide
DISTRIBUTION_METRICS = frozenset({"kid", "cmmd", "coverage", "density"})
STYLE_GAIN = "style"     # decides in place of a distribution metric when references are too few
POWER = 0.8              # of the test that `prompts_needed` plans


@dataclass(frozen=True, slots=True)
class Guard:
    """A quality that may not be lost: the gain over the base must be shown to be above -margin."""

    metric: str
    margin: float        # in the unit of the metric's difference


@dataclass(frozen=True, slots=True)
class GateRules:
    """What decides, declared before the evaluation."""

    primary: str
    delta: float = 0.0
    guards: tuple[Guard, ...] = ()
    copy_limit: float = 0.05
    min_prompts: int = 30


@dataclass(frozen=True, slots=True)
class Comparison:
    """One metric of the candidate and of the model it is held against, over the same prompts and seeds."""

    metric: str
    candidate: float
    reference: float
    difference: Interval     # candidate - reference, or candidate / reference - 1 where a margin is a share
    better: Better
    against: str = "base"    # or "champion"

    @property
    def gain(self) -> Interval:
        """The difference turned so that above 0 is better."""
        return self.difference if self.better == "higher" else self.difference.mirrored()


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that the gate looks at."""

    fingerprints: Mapping[str, str]          # model -> fingerprint of its evaluation; all must be equal
    prompts: int                             # distinct prompts that every model was drawn for
    references: int                          # held-out reference images
    primary: Mapping[str, Comparison]        # by metric, against the champion, or the base when there is none
    guards: Mapping[str, Comparison]         # by metric, against the base
    copies: Interval                         # share of images more like a training image than unseen ones are
    failed_images: int = 0
    leaked_pairs: int = 0                    # near duplicates across training and held-out images


@dataclass(frozen=True, slots=True)
class Reason:
    code: str                                # stable, such as "primary_unclear"; sentences may change
    outcome: Literal["pass", "hold", "reject"]
    sentence: str


@dataclass(frozen=True, slots=True)
class Verdict:
    decision: Decision
    primary: str                             # the metric that decided
    reasons: tuple[Reason, ...]              # every check, passed ones too
    prompts_needed: int | None = None         # to show the gain seen with 80 % power; None: not a gain


def gate_rules(config: PromotionConfig) -> GateRules:
    """The recipe's rule. Guards compare "prompt_match" (share of prompts) and "variety" (ratio to the base, less 1)."""
    return GateRules(
        primary=config.primary, delta=config.min_gain, copy_limit=config.max_copy_rate, min_prompts=config.min_prompts,
        guards=(Guard("prompt_match", config.prompt_match_margin), Guard("variety", 1 - config.variety_ratio)),
    )


def decide(rules: GateRules, evidence: Evidence) -> Verdict:
    """Promote, hold or reject, with every bound that was looked at.

    Raises: IncomparableRuns when the models were not evaluated alike; BadInput when training images leaked.
    """
    _refuse_incomparable(evidence)
    name = primary_metric(rules, evidence.references)
    comparison = evidence.primary.get(name)
    checks = [
        _check_prompts(rules, evidence), _check_failures(evidence), _check_primary(rules, evidence, name, comparison),
        *(_check_guard(guard, evidence.guards.get(guard.metric)) for guard in rules.guards),
        _check_copies(rules, evidence.copies),
    ]
    outcomes = {check.outcome for check in checks}
    insufficient = any(check.code.startswith("insufficient") for check in checks)
    decision: Decision = "promote"
    if insufficient or "hold" in outcomes:
        decision = "hold"
    if not insufficient and "reject" in outcomes:
        decision = "reject"
    needed = prompts_needed(comparison.gain, rules.delta) if comparison else None
    return Verdict(decision, name, tuple(checks), needed)


def primary_metric(rules: GateRules, references: int) -> str:
    """The declared primary, or the style gain when that is a distribution metric and references are too few for it."""
    too_few = rules.primary in DISTRIBUTION_METRICS and references < MIN_REFERENCES
    return STYLE_GAIN if too_few else rules.primary


def prompts_needed(gain: Interval, delta: float = 0.0) -> int | None:
    """Prompts that would show the gain seen, with 80 % power at the two-sided 5 % level; None when there is no gain.

    ((1.96 + 0.84) / d)^2 with d the gain above `delta` in standard deviations of one prompt, read off the interval.
    """
    error = (gain.high - gain.low) / 2 / float(stats.norm.ppf(0.975))
    effect = gain.value - delta
    if effect <= 0 or not math.isfinite(error):
        return None
    return max(1, prompts_for_effect(effect / (error * math.sqrt(gain.clusters)))) if error > 0 else 1


def prompts_for_effect(d: float) -> int:
    """Prompts for a true effect of `d` standard deviations per prompt: 197 for 0.2, 88 for 0.3, 32 for 0.5."""
    return math.ceil(((stats.norm.ppf(0.975) + stats.norm.ppf(POWER)) / d) ** 2)


def _refuse_incomparable(evidence: Evidence) -> None:
    if len(set(evidence.fingerprints.values())) > 1:
        found = ", ".join(f"{model} {fingerprint[:12]}" for model, fingerprint in evidence.fingerprints.items())
        raise IncomparableRuns(f"evaluations differ ({found}); give every model the same prompts, seeds and settings")
    if evidence.leaked_pairs:
        raise BadInput(f"{evidence.leaked_pairs} near-duplicate pairs across training and held-out images; split again")


def _check_prompts(rules: GateRules, evidence: Evidence) -> Reason:
    if evidence.prompts < rules.min_prompts:
        return Reason("insufficient_prompts", "hold",
                      f"Insufficient: {evidence.prompts} prompts, a decision takes {rules.min_prompts}.")
    return Reason("prompts", "pass", f"{evidence.prompts} prompts, at least {rules.min_prompts} asked for.")


def _check_failures(evidence: Evidence) -> Reason:
    if evidence.failed_images:
        return Reason("insufficient_images", "hold",
                      f"Insufficient: {evidence.failed_images} images failed; draw them again before deciding.")
    return Reason("images", "pass", "Every image was drawn and scored.")


def _check_primary(rules: GateRules, evidence: Evidence, name: str, comparison: Comparison | None) -> Reason:
    if comparison is None:
        return Reason("insufficient_primary", "hold", f"Insufficient: no comparison of {name}, which decides.")
    gain, versus = comparison.gain, comparison.against
    said = f"{name} gain over the {versus} {_shown(gain)}"
    if name != rules.primary:
        said += f" ({evidence.references} references are too few for {rules.primary}, which takes {MIN_REFERENCES})"
    if gain.low > rules.delta:
        return Reason("primary_better", "pass", f"{said}: better by more than {rules.delta:.4g}.")
    if gain.high < 0:
        return Reason("primary_worse", "reject", f"{said}: shown to be worse.")
    needed = prompts_needed(gain, rules.delta)
    advice = f" About {needed} prompts would show a gain of this size." if needed and needed > gain.clusters else ""
    return Reason("primary_unclear", "hold", f"{said}: not shown to be above {rules.delta:.4g}.{advice}")


def _check_guard(guard: Guard, comparison: Comparison | None) -> Reason:
    name = guard.metric
    if comparison is None:
        return Reason(f"insufficient_{name}", "hold", f"Insufficient: no comparison of {name} with the base.")
    gain = comparison.gain
    said = f"{name} against the {comparison.against} {_shown(gain)}"
    if gain.low > -guard.margin:
        return Reason(f"{name}_kept", "pass", f"{said}: no loss above {guard.margin:.4g}.")
    if gain.high < -guard.margin:
        return Reason(f"{name}_lost", "reject", f"{said}: shown to lose more than {guard.margin:.4g}.")
    return Reason(f"{name}_unclear", "hold", f"{said}: a loss above {guard.margin:.4g} is not ruled out.")


def _check_copies(rules: GateRules, copies: Interval) -> Reason:
    said = f"Copy rate {copies.value:.1%} of {copies.n} images, 95 % interval {copies.low:.1%} to {copies.high:.1%}"
    if copies.high <= rules.copy_limit:
        return Reason("copies_within_limit", "pass", f"{said}: at most {rules.copy_limit:.1%}.")
    if copies.low > rules.copy_limit:
        return Reason("copies_above_limit", "reject", f"{said}: shown to be above {rules.copy_limit:.1%}.")
    return Reason("copies_unclear", "hold", f"{said}: a rate above {rules.copy_limit:.1%} is not ruled out.")


def _shown(gain: Interval) -> str:
    return f"{gain.value:+.4g} [{gain.low:+.4g}, {gain.high:+.4g}]"
