"""What a gallery is drawn from: held-out captions, the same for base, champion and candidate."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence

from components.config import EvaluationConfig
from components.curation.manifest import SampleRow
from components.errors import BadInput
from components.evaluation.generation import Request

SEEDS_APART = 1000  # seeds of neighbouring prompts are this far apart, so no two pictures share their noise


def choose_prompts(rows: Sequence[SampleRow], count: int) -> list[tuple[str, str | None]]:
    """At most `count` (caption, group) pairs of held-out samples: one of each group, then a second of each, and so on.

    The order is a hash of the caption, so a larger count only adds. Raises BadInput when nothing is held out.
    """
    by_group: dict[str, set[tuple[str, str | None]]] = defaultdict(set)
    for row in rows:
        by_group[row.group or row.text].add((row.text, row.group))
    if not by_group:
        raise BadInput("the snapshot holds nothing out; raise curation.test_fraction or name a test split in the data")
    ranked = {group: sorted(captions, key=lambda pair: _hash(pair[0])) for group, captions in by_group.items()}
    order = sorted(ranked, key=_hash)
    rounds = max(len(captions) for captions in ranked.values())
    chosen = [ranked[group][turn] for turn in range(rounds) for group in order if turn < len(ranked[group])]
    return chosen[:count]


def gallery_requests(rows: Sequence[SampleRow], config: EvaluationConfig) -> list[Request]:
    """Every picture of a gallery: each prompt with its seeds, then the variety prompts' further seeds."""
    prompts = choose_prompts(rows, config.prompts)
    seeds = range(config.seeds_per_prompt)
    more = range(config.seeds_per_prompt, max(config.variety_seeds, config.seeds_per_prompt))
    places = [(index, turn) for index in range(len(prompts)) for turn in seeds]
    places += [(index, turn) for index in range(min(config.variety_prompts, len(prompts))) for turn in more]
    return [Request(index, *prompts[index], seed=config.seed + index * SEEDS_APART + turn) for index, turn in places]


def turn_of(request: Request, config: EvaluationConfig) -> int:
    """Which of its prompt's seeds a request has, counted from 0."""
    return request.seed - config.seed - request.prompt_index * SEEDS_APART


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
