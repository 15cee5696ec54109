"""Small pieces of HTML. Every value goes through `Markup.format`, which escapes it; templates are constants."""

import math
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from urllib.parse import urlsplit

import streamlit as st
from markupsafe import Markup

from components.catalog.models import now
from components.catalog.overview import Gate, Metric

STYLE = Path(__file__).with_name("style.css")
DECISIONS = {"promote": ("good", "promote"), "hold": ("wait", "hold"), "reject": ("bad", "reject")}
STATUSES = {"running": "live", "completed": "good", "failed": "bad", "crashed": "bad", "stopped": "wait"}
METRIC_NAMES = {
    "kid": "KID",
    "cmmd": "CMMD",
    "fid": "FID",
    "frechet_distance": "Fréchet distance",
    "prompt_match": "Prompt match",
    "clip_score": "CLIP score",
    "copy_rate": "Copy rate",
    "variety": "Variety",
    "style_similarity": "Style similarity",
    "style": "Style",
    "colour_match": "Colour match",
    "nearest_training": "Nearest training picture",
    "loss": "Training loss",
    "retrieval": "Retrieval",
    "validation_ratio": "Validation loss, base = 1",
    "coverage": "Coverage",
    "density": "Density",
    "precision": "Precision",
    "recall": "Recall",
    "vendi": "Vendi score",
}
NOT_MEASURED = Markup('<span class="sl-none">not measured</span>')


def draw(*parts: Markup) -> None:
    """Put pieces on the page as one element."""
    st.html(Markup("").join(parts))


def stylesheet() -> None:
    st.html(STYLE)


def title(text: str, under: str | Markup = "", aside: str | Markup = "") -> Markup:
    return Markup('<header class="sl-title"><h1>{}</h1><p>{}</p>{}</header>').format(text, under, aside)


def section(text: str, note: str | Markup = "") -> Markup:
    return Markup('<h2 class="sl-section">{}<small>{}</small></h2>').format(text, note)


def notice(tone: str, heading: str, body: str | Markup, *commands: str) -> Markup:
    """A written state. `commands` are shown as lines to type."""
    lines = Markup("").join(Markup("<code>{}</code>").format(command) for command in commands if command)
    return Markup('<div class="sl-notice sl-{}" role="status"><div><strong>{}</strong><p>{}</p></div>{}</div>').format(
        tone, heading, body, Markup('<div class="sl-commands">{}</div>').format(lines) if lines else ""
    )


def chip(text: str, tone: str = "quiet") -> Markup:
    return Markup('<span class="sl-chip sl-{}">{}</span>').format(tone, text)


def gate_chip(gate: Gate | str) -> Markup:
    decision = gate if isinstance(gate, str) else gate.decision
    tone, word = DECISIONS.get(decision, ("quiet", decision or "no verdict"))
    return chip(word, tone)


def status_chip(status: str) -> Markup:
    return chip(status, STATUSES.get(status, "quiet"))


def link(text: str | Markup, href: str) -> Markup:
    """A link inside the dashboard."""
    return Markup('<a href="{}">{}</a>').format(href, text)


def outside(text: str, url: str) -> Markup:
    """A link to another server, opened beside this page; anything but http(s) stays text."""
    if urlsplit(url).scheme not in ("http", "https"):
        return Markup("{}").format(text)
    return Markup('<a href="{}" target="_blank">{} ↗</a>').format(url, text)


def pictures(urls: Iterable[tuple[str, str]], kind: str = "strip") -> Markup:
    """(address, what it shows) as a strip of small pictures."""
    loading = ("eager", "sync") if kind == "preview" else ("lazy", "async")  # previews are redrawn every two seconds
    images = Markup("").join(
        Markup('<img src="{}" alt="{}" title="{}" loading="{}" decoding="{}" width="256" height="256">').format(
            url, alt, alt, *loading
        )
        for url, alt in urls
    )
    return Markup('<div class="sl-{}">{}</div>').format(kind, images) if images else Markup("")


def table(heads: Iterable[str | Markup], rows: Iterable[Iterable[str | Markup]], kind: str = "") -> Markup:
    """A table; every cell carries its column's name for narrow screens."""
    heads = list(heads)
    body = Markup("").join(
        Markup("<tr>{}</tr>").format(
            Markup("").join(
                Markup('<td data-head="{}"><div>{}</div></td>').format(head, cell)
                for head, cell in zip(heads, row, strict=True)
            )
        )
        for row in rows
    )
    head = Markup("").join(Markup('<th scope="col">{}</th>').format(text) for text in heads)
    return Markup(
        '<div class="sl-scroll"><table class="sl-table {}"><thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>'
    ).format(kind, head, body)


def facts(pairs: Iterable[tuple[str, str | Markup]]) -> Markup:
    """Names with values, side by side."""
    body = Markup("").join(Markup("<div><dt>{}</dt><dd>{}</dd></div>").format(name, value) for name, value in pairs)
    return Markup('<dl class="sl-facts">{}</dl>').format(body)


def bar(done: int | None, total: int | None) -> Markup:
    """A progress bar; without a known total it only says that something happens."""
    if not total:
        return Markup('<div class="sl-bar sl-unknown" role="progressbar" aria-label="progress unknown"><i></i></div>')
    share = max(0.0, min(1.0, (done or 0) / total))
    return Markup(
        '<div class="sl-bar" role="progressbar" aria-label="progress" aria-valuemin="0" aria-valuemax="100" '
        'aria-valuenow="{:.0f}"><i style="width:{:.1f}%"></i></div>'
    ).format(100 * share, 100 * share)


def metric_table(metrics: Iterable[Metric]) -> Markup:
    """Base, champion and candidate side by side, with the interval of the difference."""
    return table(
        ("metric", "base", "champion", "candidate", "difference and 95 % interval", "pictures"),
        (
            (
                Markup("<b>{}</b> <small>{}</small>").format(metric_name(m.name), _better(m)),
                number(m.base),
                number(m.champion),
                Markup("<b>{}</b>").format(number(m.candidate)),
                _difference(m),
                str(m.n) if m.n is not None else NOT_MEASURED,
            )
            for m in metrics
        ),
        "sl-numbers",
    )


def metric_name(name: str) -> str:
    return METRIC_NAMES.get(name, name.replace("_", " ").capitalize())


def check_name(check: str) -> str:
    return check.replace("_", " ").replace("-", " ")


def reasons(gate: Gate) -> Markup:
    """The gate's sentences, each with its outcome as a word."""
    tones = {"pass": "good", "hold": "wait", "reject": "bad"}
    body = Markup("").join(
        Markup("<li>{}<span>{}</span></li>").format(
            chip(r.outcome or "note", tones.get(r.outcome, "quiet")), r.sentence
        )
        for r in gate.reasons
    )
    return Markup('<ul class="sl-reasons">{}</ul>').format(body) if body else Markup("")


def number(value: float | None) -> str | Markup:
    """Three to four significant digits; None is said in words."""
    if value is None or math.isnan(value):
        return NOT_MEASURED
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value and abs(value) < 0.001:
        return f"{value:.1e}".replace("-", "−")
    return (f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) >= 1 else f"{value:.3f}").replace(
        "-", "−"
    )


def duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def size(count: int) -> str:
    """Bytes in words."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} B"


def ago(then: datetime) -> Markup:
    """How long ago, with the exact UTC time as a tooltip."""
    seconds = (now() - then).total_seconds()
    words = next(
        (
            f"{round(seconds / unit)} {name} ago"
            for limit, unit, name in ((3600, 60, "min"), (86400, 3600, "h"), (14 * 86400, 86400, "days"))
            if 60 <= seconds < limit
        ),
        None,
    )
    words = words or ("just now" if seconds < 60 else f"{then:%d %b %Y}")
    return Markup('<time title="{}">{}</time>').format(f"{then:%Y-%m-%d %H:%M} UTC", words.replace("1 days", "1 day"))


def plural(count: int, one: str, many: str | None = None) -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}".replace(",", " ")


def _better(metric: Metric) -> str:
    return {"lower": "lower is better", "higher": "higher is better"}.get(metric.better, "")


def _difference(metric: Metric) -> str | Markup:
    if metric.difference is None:
        return NOT_MEASURED
    low, high = (
        float("-inf") if metric.low is None else metric.low,
        float("inf") if metric.high is None else metric.high,
    )
    bounds = Markup("<small>[{}, {}]</small>").format(number(low), number(high))
    if not metric.against:
        return Markup("{} {}").format(number(metric.difference), bounds)
    gain, loss = (high < 0, low > 0) if metric.better == "lower" else (low > 0, high < 0)
    tone, word = ("good", "better") if gain else ("bad", "worse") if loss else ("quiet", "undecided")
    return Markup("{}{} {} {}").format(
        "+" if metric.difference > 0 else "",
        number(metric.difference),
        bounds,
        chip(f"{word} than {metric.against}" if word != "undecided" else word, tone),
    )
