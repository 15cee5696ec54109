"""Documents as MLflow takes them: flat names, short texts, and none of the secrets that an address may carry."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

MASK = "***"
# The end of a scheme, longer than a Windows drive; one slash is what resolving a path leaves of two.
SCHEME = r"[a-z0-9+.-]{2}:/{1,2}"
# Up to the last @ before the path. A password with slashes of its own is told from a port by not being a number.
USER = re.compile(rf"({SCHEME})(?:[^/?#\n]*@|[^/?#@:\[\n]*:(?!\d*(?:[/?#]|$))[^\n]*?@)", re.IGNORECASE)
QUERY = re.compile(rf"{SCHEME}[^?#\n]*[?#][^\n]*", re.IGNORECASE)
SECRET_KEY = r"[^=&\n]*(?:token|secret|passw|pwd|key|auth|sig|credential)[^=&\n]*"
SECRET_VALUE = re.compile(rf"([?&#;]{SECRET_KEY}=)[^&\n]*", re.IGNORECASE)


def without_secrets(value: Any) -> Any:
    """The same document; in addresses `user:password@` and the values of query keys such as `token` are masked."""
    if isinstance(value, str):
        value = USER.sub(rf"\1{MASK}@", value)
        return QUERY.sub(lambda address: SECRET_VALUE.sub(rf"\1{MASK}", address[0]), value)
    if isinstance(value, Mapping):
        return {key: without_secrets(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(item) for item in value]
    return value


def as_text(value: Any, characters: int) -> str:
    """A value as MLflow may show it: without secrets, cut to so many characters."""
    text = without_secrets(str(value))
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
