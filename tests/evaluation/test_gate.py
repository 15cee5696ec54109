"""The gate promotes what is shown to be better, rejects what is shown to be bad and holds everything else."""

from dataclasses import replace

import numpy as np
import pytest

from components.config import PromotionConfig
from components.errors import BadInput, IncomparableRuns
from components.evaluation.gate import (
    Comparison,
    Evidence,
    GateRules,
    Guard,
    Verdict,
    decide,
    gate_rules,
    primary_metric,
    prompts_for_effect,
    prompts_needed,
)
from components.evaluation.intervals import Interval, mean_interval, paired_difference_interval, rate_interval

RULES = GateRules(primary="kid", guards=(Guard("prompt_match", 0.05), Guard("variety", 0.2)))


def scores(prompts: int, gain: float = 0.0) -> np.ndarray:
    """One score per prompt whose mean is exactly `gain` and whose standard deviation is exactly 1."""
    x = np.random.default_rng(0).normal(size=prompts)
    return gain + (x - x.mean()) / x.std(ddof=1)


def compare(metric: str, candidate: np.ndarray, held: np.ndarray, *, better="higher", against="base") -> Comparison:
    difference = paired_difference_interval(candidate, held, list(range(len(candidate))))
    return Comparison(metric, float(candidate.mean()), float(held.mean()), difference, better, against)


def steady(metric: str, value: float, prompts: int = 100, half: float = 0.01) -> Comparison:
    return Comparison(metric, value, 0, Interval(value, value - half, value + half, prompts, prompts), "higher")


def evidence(*primary: Comparison, prompts: int = 100, **changes) -> Evidence:
    usual = Evidence(
        fingerprints={"base": "f1", "champion": "f1", "candidate": "f1"}, prompts=prompts, references=60,
        primary={comparison.metric: comparison for comparison in primary}, copies=rate_interval(0, 100),
        guards={"prompt_match": steady("prompt_match", 0.0), "variety": steady("variety", 0.0)},
    )
    return replace(usual, **changes)


def better_kid(prompts: int = 100) -> Comparison:
    return compare("kid", -scores(prompts, 0.5), np.zeros(prompts), better="lower", against="champion")


def codes(verdict: Verdict, outcome: str) -> list[str]:
    return [reason.code for reason in verdict.reasons if reason.outcome == outcome]


# The primary metric

def test_a_candidate_equal_to_the_champion_is_held_with_an_interval_of_zero():
    x = scores(100)
    primary = compare("kid", x, x, better="lower", against="champion")
    assert (primary.gain.low, primary.gain.high) == (0, 0)
    verdict = decide(RULES, evidence(primary))
    assert verdict.decision == "hold" and codes(verdict, "hold") == ["primary_unclear"]
    assert verdict.prompts_needed is None


def test_a_gain_of_three_tenths_of_a_deviation_on_200_prompts_is_promoted():
    primary = compare("kid", -scores(200, 0.3), np.zeros(200), better="lower", against="champion")
    verdict = decide(RULES, evidence(primary, prompts=200))
    assert verdict.decision == "promote" and codes(verdict, "pass") == [
        "prompts", "images", "primary_better", "prompt_match_kept", "variety_kept", "copies_within_limit"]
    assert verdict.prompts_needed == pytest.approx(88, abs=6)


def test_two_prompts_are_insufficient_whatever_they_show():
    for gain in (-50, 50):
        primary = compare("kid", -scores(2, gain), np.zeros(2), better="lower")
        verdict = decide(RULES, evidence(primary, prompts=2))
        assert verdict.decision == "hold" and "insufficient_prompts" in codes(verdict, "hold")


def test_swapping_candidate_and_champion_mirrors_the_bounds_and_turns_promote_into_reject():
    a, b = scores(100, 0.5), np.zeros(100)
    forth, back = compare("style", a, b), compare("style", b, a)
    assert (back.gain.low, back.gain.high) == pytest.approx((-forth.gain.high, -forth.gain.low))
    rules = replace(RULES, primary="style")
    assert (decide(rules, evidence(forth)).decision, decide(rules, evidence(back)).decision) == ("promote", "reject")


def test_lower_is_better_for_kid():
    worse = compare("kid", scores(100, 0.5), np.zeros(100), better="lower")
    verdict = decide(RULES, evidence(worse))
    assert verdict.decision == "reject" and codes(verdict, "reject") == ["primary_worse"]
    assert worse.gain.high < 0 < worse.difference.low


def test_the_lower_bound_must_exceed_the_declared_gain():
    primary = better_kid()
    assert decide(replace(RULES, delta=primary.gain.low - 0.01), evidence(primary)).decision == "promote"
    held = decide(replace(RULES, delta=primary.gain.low), evidence(primary))
    assert held.decision == "hold" and held.prompts_needed is not None and held.prompts_needed > 100


# Guards and copying

@pytest.mark.parametrize(("low", "high", "decision"), [
    (-0.04, 0.1, "promote"), (-0.06, 0.1, "hold"), (-0.05, 0.1, "hold"), (-0.2, -0.06, "reject"), (-0.2, -0.05, "hold"),
])
def test_a_guard_must_be_shown_not_to_lose_more_than_its_margin(low: float, high: float, decision: str):
    guard = Comparison("prompt_match", 0.5, 0.5, Interval((low + high) / 2, low, high, 100, 100), "higher")
    verdict = decide(RULES, evidence(better_kid(), guards={"prompt_match": guard, "variety": steady("variety", 0)}))
    assert verdict.decision == decision


def test_a_guard_that_was_not_measured_holds():
    verdict = decide(RULES, evidence(better_kid(), guards={"variety": steady("variety", 0)}))
    assert verdict.decision == "hold" and codes(verdict, "hold") == ["insufficient_prompt_match"]


@pytest.mark.parametrize(("copies", "n", "decision"), [
    (0, 100, "promote"), (1, 100, "hold"), (0, 50, "hold"), (14, 100, "reject"),
])
def test_the_copy_rate_is_judged_by_its_exact_bounds(copies: int, n: int, decision: str):
    assert decide(RULES, evidence(better_kid(), copies=rate_interval(copies, n))).decision == decision


def test_something_bad_rejects_even_when_something_else_is_unclear():
    verdict = decide(RULES, evidence(compare("kid", scores(100), scores(100)), copies=rate_interval(50, 100)))
    assert verdict.decision == "reject"
    assert (codes(verdict, "reject"), codes(verdict, "hold")) == (["copies_above_limit"], ["primary_unclear"])


# Validity

def test_another_fingerprint_is_refused_by_name():
    with pytest.raises(IncomparableRuns, match="base f1, candidate f2"):
        decide(RULES, evidence(better_kid(), fingerprints={"base": "f1", "candidate": "f2"}))


def test_a_leak_is_refused():
    with pytest.raises(BadInput, match="3 near-duplicate pairs"):
        decide(RULES, evidence(better_kid(), leaked_pairs=3))


def test_failed_images_hold_even_a_bad_candidate():
    verdict = decide(RULES, evidence(better_kid(), failed_images=1, copies=rate_interval(90, 100)))
    assert verdict.decision == "hold" and codes(verdict, "hold") == ["insufficient_images"]


def test_below_fifty_references_kid_is_shown_but_the_style_gain_decides():
    assert [primary_metric(RULES, n) for n in (49, 50)] == ["style", "kid"]
    worse_kid = compare("kid", scores(100, 1), np.zeros(100), better="lower")
    style = compare("style", scores(100, 0.5), np.zeros(100))
    verdict = decide(RULES, evidence(worse_kid, style, references=49))
    assert (verdict.decision, verdict.primary) == ("promote", "style")
    assert decide(RULES, evidence(worse_kid, references=49)).decision == "hold"   # no style gain was measured
    assert decide(RULES, evidence(worse_kid, references=50)).decision == "reject"


# Words and numbers

def test_a_reason_is_a_sentence_with_the_value_the_bound_and_the_limit():
    verdict = decide(RULES, evidence(better_kid(), copies=rate_interval(14, 100)))
    said = {reason.code: reason.sentence for reason in verdict.reasons}
    assert said["copies_above_limit"] == ("Copy rate 14.0% of 100 images, 95 % interval 7.9% to 22.4%: "
                                          "shown to be above 5.0%.")
    assert said["primary_better"].startswith("kid gain over the champion +0.5 [+0.")
    assert all(reason.sentence.endswith(".") for reason in verdict.reasons)


def test_prompts_for_an_effect_follow_the_power_formula():
    assert [prompts_for_effect(d) for d in (0.2, 0.3, 0.5)] == [197, 88, 32]
    assert prompts_for_effect(0.28) > 100 >= prompts_for_effect(0.281)


def test_prompts_needed_reads_the_effect_off_an_interval():
    gain = mean_interval(scores(400, 0.2), list(range(400)))
    assert prompts_needed(gain) == pytest.approx(197, rel=0.06)
    assert prompts_needed(gain, delta=0.3) is None
    assert prompts_needed(Interval(0.1, -float("inf"), float("inf"), 1, 1)) is None


def test_the_recipe_fills_the_rules():
    rules = gate_rules(PromotionConfig(variety_ratio=0.75, max_copy_rate=0.1, primary="style"))
    assert rules == GateRules("style", 0.0, (Guard("prompt_match", 0.05), Guard("variety", 0.25)), 0.1, 30)
