"""Captioners behind one protocol: upright RGB pictures in, prose or tags out, and a revision that pins the weights.

A new one is a file with a class and a line in CAPTIONERS; packages of others register theirs under the entry-point
group `safelight.captioners`, a class that is called with (Weights, Generation).
"""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Literal, Protocol

from components.captioning.weights import Weights
from components.catalog.captions import Tag
from components.errors import BadInput

if TYPE_CHECKING:
    import torch
    from PIL import Image

GROUP = "safelight.captioners"


@dataclass(frozen=True, slots=True)
class CaptionContext:
    """What is known of a picture before it is captioned, and what the captioner is asked of it."""

    file_name: str
    prompt: str = ""  # the recipe's, its places filled
    caption: str = ""  # one that there is already
    trigger: str = ""
    subject_class: str = ""


@dataclass(frozen=True, slots=True)
class CaptionResult:
    """Prose, or tags with score and category, the likeliest first; or why there is neither."""

    text: str = ""
    tags: tuple[Tag, ...] = ()
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """How a captioner that writes token by token does it: a search without chance."""

    max_new_tokens: int
    num_beams: int


class Captioner(Protocol):
    """Writes captions. `name`, `revision` and prompt are what a caption is known by; weights come with `load`."""

    @property
    def name(self) -> str: ...
    @property
    def revision(self) -> str: ...
    @property
    def kind(self) -> Literal["prose", "tags", "both"]: ...
    @property
    def max_batch(self) -> int: ...
    @property
    def needs_gpu(self) -> bool:
        """Whether it is too slow to be of use without one."""
        ...

    @property
    def default_prompt(self) -> str:
        """What it is asked when the recipe does not say."""
        ...

    @property
    def settings(self) -> str:
        """Whatever else its words depend on, as text."""
        ...

    def load(self, device: str, dtype: "torch.dtype", offline: bool) -> None:
        """Raises BadInput, one line, for weights that cannot be loaded."""
        ...

    def caption(self, images: "Sequence[Image.Image]", contexts: Sequence[CaptionContext]) -> list[CaptionResult]:
        """One result for each picture, in order."""
        ...


Make = Callable[[Weights, Generation], Captioner]
CAPTIONERS = {  # name -> module:class, imported when it is asked for
    "blip": "components.captioning.blip:Blip",
    "florence2": "components.captioning.florence:Florence2",
    "wd": "components.captioning.tagger:WdTagger",
    "vlm": "components.captioning.vision_language:VisionLanguageModel",
}


def captioner_class(name: str) -> Make:
    """The class of a captioner, built in or a plug-in's. Raises BadInput, naming those there are."""
    if name in CAPTIONERS:
        module, _, member = CAPTIONERS[name].partition(":")
        return getattr(import_module(module), member)
    plugins = {found.name: found for found in entry_points(group=GROUP)}
    if name in plugins:
        try:
            return plugins[name].load()
        except (ImportError, AttributeError) as error:
            raise BadInput(f"captioner {name!r}: its package cannot be loaded: {error}; install it again") from None
    near = difflib.get_close_matches(name, [*CAPTIONERS, *plugins], n=1, cutoff=0.5)
    there = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join([*CAPTIONERS, *plugins])}"
    raise BadInput(f"no captioner is called {name!r}; {there}")
