"""The demo's own part: its pictures, written once per workspace; the rest is an ordinary retraining."""

import json
from collections.abc import Callable
from pathlib import Path

from components.demo.icons import METADATA_NAME, write_icons
from components.families.bases import EMBEDDED
from components.workspace import Workspace

RECIPE = Path(__file__).parent / "recipes" / "demo.toml"
CONCEPTS = EMBEDDED.parent / "concepts.json"  # what the base was trained on, written by its pre-training


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
    """The words of the concepts that the embedded base was trained on."""
    concepts = json.loads(CONCEPTS.read_text(encoding="utf-8"))
    return {word for concept in concepts for word in concept["name"].lower().split()}
