"""What a sample may be called: its captions and, on request, their tags in several orders.

Every wording is embedded once, by the caching stage; which of them a step sees is drawn when the step is made. So
shuffled and dropped tags work with cached embeddings, and no cache holds a draw. Names as in kohya's trainers.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from components.config import TrainingConfig
from components.curation.manifest import SampleRow


@dataclass(frozen=True, slots=True)
class Wording:
    """How a caption's tags are varied; without `orders` captions are taken as they are written."""

    orders: int = 0  # of each caption
    separator: str = ""
    keep_tokens: int = 0  # tags at the beginning that stay where they are
    tag_dropout_rate: float = 0.0  # of the others

    @classmethod
    def of(cls, training: TrainingConfig) -> "Wording":
        if not training.shuffle_caption:
            return cls()
        return cls(
            training.caption_wordings,
            training.caption_separator,
            training.keep_tokens,
            training.caption_tag_dropout_rate,
        )

    def texts(self, row: SampleRow) -> tuple[str, ...]:
        """Every wording of a sample, each once, the first caption's first."""
        captions = (row.text, *row.variants)
        if not self.orders:
            return tuple(dict.fromkeys(captions))
        return tuple(dict.fromkeys(text for caption in captions for text in self._orders(caption)))

    def settings(self) -> dict[str, Any]:
        """What a cache depends on: nothing where captions are taken as they are."""
        return {"wording": asdict(self)} if self.orders else {}

    def _orders(self, caption: str) -> Iterator[str]:
        tags = [tag.strip() for tag in caption.split(self.separator) if tag.strip()]
        kept, loose = tags[: self.keep_tokens], tags[self.keep_tokens :]
        for k in range(self.orders):
            lots = {i: _lot(caption, k, i, "order") for i in range(len(loose))}
            order = sorted(lots, key=lambda i: (lots[i], i))
            shown = [i for i in order if _lot(caption, k, i, "dropout") >= self.tag_dropout_rate]
            left = kept + [loose[i] for i in shown]
            yield f"{self.separator} ".join(left or [loose[order[0]]]) if tags else caption


def _lot(caption: str, wording: int, tag: int, purpose: str) -> float:
    """A number in [0, 1) that depends on nothing else."""
    digest = hashlib.sha256(f"{purpose}/{wording}/{tag}/{caption}".encode()).digest()
    return int.from_bytes(digest[:8], "little") / 2**64
