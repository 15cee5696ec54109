"""The demo's own part: its pictures, written once per workspace; the rest is an ordinary retraining."""

from collections.abc import Callable
from pathlib import Path

from components.demo.icons import METADATA_NAME, pictograms, write_icons
from components.families.bases import EMBEDDED
from components.workspace import Workspace

RECIPE = Path(__file__).parent / "recipes" / "demo.toml"
WORDS_FILE = EMBEDDED / "words.txt"  # the words of the captions that the base was trained on, one a line


def write_pictures(workspace: Workspace, progress: Callable[[str], None]) -> Path:
    """The folder of icons; what is there already is left alone, so that a second demo reuses everything."""
    folder = workspace.home / "demo" / "app-icons"
    if not (folder / METADATA_NAME).exists():
        counts = write_icons(folder, known_words())
        progress(
            f"icons: {counts.train} to train on, {counts.test} of {counts.test_concepts} concepts held out, in {folder}"
        )
    return folder


def known_words() -> set[str]:
    """The words that the embedded base knows; without a list of them, every word of the pictogram table."""
    if WORDS_FILE.exists():
        return set(WORDS_FILE.read_text(encoding="utf-8").split())
    return {word for pictogram in pictograms() for word in pictogram.concept.lower().split()}
