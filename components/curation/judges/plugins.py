"""Checks by models, as plug-ins: each gives a picture one score; rules compare it with the recipe's threshold.

A package adds one as an entry point of the group `safelight.checks` whose name is the check's and whose object is a
`Plugin`. Whatever imports a model belongs into `load`, which runs in the process that has torch; everything else is
read by flows, which have not.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Literal, Protocol

from PIL import Image

from components.config import CheckConfig
from components.errors import BadInput

GROUP = "safelight.checks"
EXTRA = "pip install 'safelight[checks]'"


class Judge(Protocol):
    """A loaded model. Equal pictures (and captions) give equal scores, whatever stands beside them."""

    def __call__(self, images: Sequence[Image.Image], captions: Sequence[str]) -> Sequence[float]:
        """RGB images of any size and their captions -> one score each, in order."""
        ...


@dataclass(frozen=True, slots=True)
class Plugin:
    name: str
    fails: Literal["below", "above"]                  # on which side of the threshold a picture stands out
    says: str                                         # one sentence; filled with {score} and {threshold}
    reads_caption: bool
    revision: Callable[[CheckConfig], str]            # of weights and preparation, without loading them
    load: Callable[[CheckConfig, str], Judge]         # of the recipe's check and a device such as "cpu" or "cuda"


def plugins(checks: Mapping[str, CheckConfig]) -> dict[str, Plugin]:
    """The plug-in of each check. Raises BadInput, naming those there are, for a check that nothing provides."""
    if not checks:
        return {}  # a look through all that is installed takes longer than a scan of a small folder
    there_are = _built_in() | {point.name: point for point in entry_points(group=GROUP)}
    found: dict[str, Plugin] = {}
    for name in checks:
        if name not in there_are:
            raise BadInput(f"curation.checks.{name}: no such check; there are {', '.join(sorted(there_are))}; install"
                           f" the package that provides it as an entry point of {GROUP}, or remove the line")
        plugin = there_are[name]
        found[name] = plugin if isinstance(plugin, Plugin) else plugin.load()
    return found


def package_revision(check: str, package: str) -> str:
    """A package that carries its weights, and its version. Raises BadInput with what to install."""
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        raise BadInput(f"curation.checks.{check} needs {package}, which is not installed; {EXTRA}") from None


def clip_source(check: str, settings: CheckConfig) -> str:
    """The SOURCE of `model = "clip:SOURCE"`. Raises BadInput."""
    kind, _, source = (settings.model or "").partition(":")
    if kind != "clip" or not source:
        raise BadInput(f'curation.checks.{check}: model is {settings.model!r}; write {{ threshold = …, model ='
                       ' "clip:SOURCE" }, with a folder or owner/name@<40 hex digits> as SOURCE')
    return source


def _built_in() -> dict[str, Plugin]:
    from components.curation.judges.aesthetic import AESTHETIC
    from components.curation.judges.caption_match import CAPTION_MATCH
    from components.curation.judges.nsfw import NSFW
    from components.curation.judges.text_area import TEXT_AREA

    return {plugin.name: plugin for plugin in (NSFW, TEXT_AREA, AESTHETIC, CAPTION_MATCH)}
