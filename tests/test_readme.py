"""The README keeps its word: every command it names exists with its flags, every path is there."""

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from flows.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
WORDS = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", README, flags=re.DOTALL))
BLOCKS = [line for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL) for line in block.splitlines()]
COMMANDS = sorted({text for text in [*WORDS, *BLOCKS] if text.startswith("safelight ")})
TARGETS = sorted({match for text in [*WORDS, *BLOCKS] for match in re.findall(r"^make ([a-z]+)", text)})
PATHS = sorted(
    {word for word in WORDS if re.fullmatch(r"[a-zA-Z_.]+(/[a-zA-Z_.]*)+|[A-Z]+(\.md)?|constraints\.txt", word)}
    - {"RUN"}
    | set(re.findall(r"\]\((?!https?:|#)([^)#]+)\)", README))
)
LINKS = set(re.findall(r"\]\(([^)]+)\)", README))


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_is_one_that_safelight_has(line: str):
    command, rest = typer.main.get_command(app), shlex.split(line)[1:]
    while commands := getattr(command, "commands", None):
        name, *rest = rest
        assert name in commands
        command = commands[name]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in rest if word.startswith("--")} <= known


@pytest.mark.parametrize("target", TARGETS)
def test_every_make_target_exists(target: str):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)


@pytest.mark.parametrize("path", PATHS)
def test_every_path_is_there(path: str):
    assert (ROOT / path).exists()


def test_the_landing_page_has_something_to_check():
    assert len(COMMANDS) >= 15 and len(TARGETS) >= 5 and len(PATHS) >= 10


def test_no_outside_picture_is_loaded():
    assert [link for link in LINKS if link.startswith("http")] == []
    assert "<img" not in README and "<script" not in README
