"""Documents as MLflow takes them: flat names and short texts."""

from collections.abc import Iterator, Mapping
from typing import Any


def as_text(value: Any, characters: int) -> str:
    """A value as MLflow may show it: cut to so many characters."""
    text = str(value)
    return text if len(text) <= characters else text[: characters - 1] + "…"


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """A nested document as dotted names: {"training": {"rank": 4}} gives ("training.rank", 4), lists count from 0."""
    if isinstance(value, list | tuple):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping):
        yield prefix, value
        return
    for key, item in value.items():
        yield from flatten(item, f"{prefix}.{key}" if prefix else str(key))


def evaluation_series(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """An evaluation's metrics as `name/candidate`, `name/base`, `name/difference`, `name/difference/low`..."""
    series: dict[str, float | None] = {}
    for name, metric in metrics.items():
        series |= {f"{name}/{role}": metric.get(role) for role in ("candidate", "base", "champion")}
        difference = metric.get("difference") or {}
        series[f"{name}/difference"] = difference.get("value")
        series |= {f"{name}/difference/{bound}": difference.get(bound) for bound in ("low", "high")}
    return {name: value for name, value in series.items() if value is not None}
