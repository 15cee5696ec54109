"""What a run's journal has told so far: its curves and the pictures drawn at its checkpoints."""

from dataclasses import dataclass, field
from pathlib import Path

from flows.journal import read_entries

CURVE_POINTS = 600  # enough for any screen


@dataclass(slots=True)
class Trail:
    """`advance()` reads the lines that were added since the last time."""

    path: Path
    offset: int = 0
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)  # name -> (step, value)
    previews: dict[int, dict[str, str]] = field(default_factory=dict)  # step -> key -> sha256 of a PNG

    def advance(self) -> "Trail":
        for entry in read_entries(self.path, self.offset):
            self.offset = entry.end
            if entry.kind == "metrics":
                for name, value in entry.body["values"].items():
                    self.curves.setdefault(name, []).append((entry.body["step"], value))
            elif entry.kind == "image":
                self.previews.setdefault(entry.body["step"], {})[entry.body["key"]] = entry.body["sha256"]
        return self

    @property
    def loss(self) -> float | None:
        """The newest training loss."""
        return self.curves["loss"][-1][1] if "loss" in self.curves else None

    def newest_previews(self) -> tuple[int, list[str]]:
        """The last step at which pictures were drawn, and their digests in the order of their keys."""
        if not self.previews:
            return 0, []
        step = max(self.previews)
        return step, [sha256 for _, sha256 in sorted(self.previews[step].items())]

    def curve(self, name: str) -> list[tuple[int, float]]:
        """A curve thinned evenly to what a screen can show; the last point is always there."""
        points = self.curves[name]
        stride = -(-len(points) // CURVE_POINTS)
        return points[::-1][::stride][::-1]
