"""Datasets: versions of a collection, what was kept, what was rejected and why."""

from collections.abc import Sequence

import streamlit as st
from markupsafe import Markup

from components.catalog import datasets
from components.catalog.database import Catalog
from components.catalog.datasets import ItemRow, SnapshotRow
from components.catalog.differences import KINDS, Difference, compare, told
from components.curation.editing import edit_caption
from components.errors import BadInput
from dashboard.desk import address, open_desk, reviewer, version_name, whole
from dashboard.gallery import show_items
from dashboard.markup import ago, check_name, draw, facts, link, notice, plural, section, table, title

ANY = "any"
NOTHING = "nothing"
STATISTICS = "caption_statistics"  # of a snapshot's profile; components/curation/caption_statistics.py notes them
COMMONEST = 8  # words and tags that are shown
FIRST = 5  # changes of a kind that are shown; `safelight diff` has them all
PILES = ("kept", "rejected")
LEAD = "Immutable versions of your collections. Sources are only read, never moved or changed."


def show() -> None:
    desk = open_desk()
    found = {
        version_name(snapshot.dataset, snapshot.version): snapshot for snapshot in datasets.list_snapshots(desk.catalog)
    }
    if not found:
        draw(
            title("Datasets", LEAD),
            notice(
                "quiet",
                "No dataset yet.",
                "Point a recipe at a folder of pictures with captions: a .txt beside each "
                "picture, or one metadata.jsonl.",
                "safelight init",
                "safelight curate recipe.toml",
            ),
        )
        return
    draw(title("Datasets", LEAD))
    with st.container(horizontal=True, vertical_alignment="top", key="dataset-tools"):
        chosen = st.selectbox(
            "version", tuple(found), key="snapshot", bind="query-params", width=280, on_change=_to_start
        )
        snapshot = found[chosen]
        pile = st.segmented_control(
            "files", PILES, default="kept", required=True, key="pile", bind="query-params", on_change=_to_start
        )
        decision = "reject" if pile == "rejected" else "flag"
        counts = {
            count.check: count.files
            for count in datasets.verdict_counts(desk.catalog, snapshot.id)
            if count.decision == decision
        }
        check = ANY
        if counts:
            check = st.selectbox(
                "reason" if pile == "rejected" else "flags",
                (ANY, *counts),
                key=f"check-{pile}",
                width=240,
                on_change=_to_start,
                format_func=lambda c: "all" if c == ANY else f"{check_name(c)} · {counts[c]:,}".replace(",", " "),
            )
        other = st.selectbox(
            "compare with",
            (NOTHING, *(name for name in found if name != chosen)),
            key="against",
            bind="query-params",
            width=280,
        )
    draw(_facts(snapshot), _captions(snapshot))
    if other in found:
        draw(_changes(compare(desk.catalog, found[other], snapshot)))
    after = whole(st.query_params.get("after"), -1)
    page = datasets.items_page(
        desk.catalog, snapshot.id, kept=pile == "kept", check=None if check == ANY else check, after=after
    )
    if page.items:
        verdicts = datasets.verdicts_of(desk.catalog, snapshot.id, [item.ordinal for item in page.items])
        show_items(desk, page.items, verdicts, key=f"items-{snapshot.id}-{pile}")
        _edit(desk.catalog, snapshot, page.items)
    else:
        draw(
            notice(
                "quiet",
                "Nothing was rejected." if pile == "rejected" else "No file matches.",
                "Every file of this version passed." if pile == "rejected" else "Choose another flag or version.",
            )
        )
    same = {"snapshot": chosen, "pile": pile}
    pages = [link("← first page", address("datasets", **same))] if after >= 0 else []
    pages += [link("next page →", address("datasets", after=page.after, **same))] if page.after is not None else []
    draw(Markup('<nav class="sl-pages">{}</nav>').format(Markup(" ").join(pages)))


def _to_start() -> None:
    st.query_params.pop("after", None)


def _changes(difference: Difference) -> Markup:
    """How many files changed in which way since the other version, and the first of each."""
    by_kind = {kind: difference.of_kind(kind) for kind in KINDS}
    before, after = difference.before, difference.after
    heading = section(
        "What changed",
        f"from {version_name(before.dataset, before.version)} to {version_name(after.dataset, after.version)}",
    )
    if not difference.changes:
        return heading + notice("quiet", "Nothing.", "Both versions hold the same files, captions and verdicts.")
    words = [(kind, told(kind, change), change) for kind, changes in by_kind.items() for change in changes[:FIRST]]
    rows = [(kind, change.file_name, said.before, said.after, said.why) for kind, said, change in words]
    counts = facts([(kind, plural(len(changes), "file")) for kind, changes in by_kind.items() if changes])
    return heading + counts + table(("change", "file", "before", "now", "why"), rows)


def _captions(snapshot: SnapshotRow) -> Markup:
    """How long the captions are for the training tokenizer, what falls off the longest, and what they say most."""
    said = snapshot.profile.get(STATISTICS)
    if not isinstance(said, dict):
        return Markup()
    pairs = [
        ("captions", f"{said['captions']}, {said['distinct']} distinct"),
        ("shared by several", f"{said['identical_share']:.0%}"),
    ]
    for reader in said["tokenizers"]:
        limit = f", {reader['truncated']} of them cut at {reader['limit']}" if reader["limit"] else ""
        length = f"median {reader['median']:g}, 95 % up to {reader['p95']:g}, longest {reader['longest']}{limit}"
        pairs.append((f"tokens ({reader['tokenizer']})", length))
    pairs += [(f"trigger {word}", f"in {count} of {said['captions']}") for word, count in said["triggers"].items()]
    pairs += [
        (f"commonest {name}", ", ".join(f"{one} {count}" for one, count in said[name][:COMMONEST]))
        for name in ("tags", "words")
        if said[name]
    ]
    if set(said["written_by"]) != {"sources"}:
        pairs.append(("written by", ", ".join(f"{by} {count}" for by, count in said["written_by"].items())))
    worst = [
        (reader["tokenizer"], one["file_name"], str(one["tokens"]), one["lost"])
        for reader in said["tokenizers"]
        for one in reader["worst"]
    ]
    cut = table(("tokenizer", "file", "tokens", "what falls off"), worst) if worst else Markup()
    return section("Captions", f"as {said['base']} reads them") + facts(pairs) + cut


def _edit(catalog: Catalog, snapshot: SnapshotRow, items: Sequence[ItemRow]) -> None:
    """A box in which a picture's caption is written anew; it counts from the next curation on."""
    named = {item.file_name: item.caption for item in items if item.sha256}
    if not named:
        return
    with st.expander("Write a caption"):
        file_name = st.selectbox("file", tuple(named), key="captioned-file")
        with st.form("caption", border=False, clear_on_submit=True):
            text = st.text_area("caption", value=named[file_name], key=f"caption-of-{snapshot.id}-{file_name}")
            kept = st.form_submit_button("Keep it")
        if kept:
            try:
                edit_caption(catalog, snapshot.dataset, file_name, text, by=reviewer())
            except BadInput as error:
                draw(notice("bad", "Not kept.", str(error)))
            else:
                draw(notice("quiet", "Kept.", f"{file_name} has it in the next version of {snapshot.dataset}."))


def _facts(snapshot: SnapshotRow) -> Markup:
    pairs: list[tuple[str, str | Markup]] = [
        ("frozen", ago(snapshot.created_at)),
        ("kept", plural(snapshot.kept, "file")),
        ("rejected", plural(snapshot.rejected, "file")),
    ]
    for name in ("splits", "licences"):
        counts = snapshot.profile.get(name)
        if isinstance(counts, dict):
            pairs.append(
                (
                    name,
                    ", ".join(
                        f"{key or 'unknown'} {count:,}".replace(",", " ") for key, count in list(counts.items())[:4]
                    ),
                )
            )
    return facts([*pairs, ("digest", Markup("<code>{}</code>").format(snapshot.digest[:12]))])
