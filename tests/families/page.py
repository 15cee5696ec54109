"""docs/families.md, whose cells the tests that prove them hold to the code."""

from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
CAN, SAMPLERS = "What each can do", "Samplers"  # its sections with a table
CACHES, TRAINS, RESUMES, STOCK, KOHYA, COMFYUI = range(6)  # the columns of the first


def table(section: str) -> dict[str, list[str]]:
    """The rows of a section's table: the first cell without its ticks -> the others."""
    text = PAGE.read_text(encoding="utf-8").partition(f"## {section}\n")[2].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:3] == "| `"]
    return {row[0].strip("`"): row[1:] for row in rows}


def ticked(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
