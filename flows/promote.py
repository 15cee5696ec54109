"""Moving the champion: what the gate said and what a person decided become registry aliases and one audit row."""

from typing import Any

from prefect import flow
from sqlalchemy import select

from components.catalog.models import Evaluation, ModelVersion, Promotion
from components.errors import BadInput
from components.stages import Bench
from components.workspace import Workspace
from flows.tracking import registry

GATE = "gate"  # the name under which policy "auto" decides


def promote(
    bench: Bench, name: str, version: int | None = None, *, by: str, reason: str = "", force: bool = False
) -> dict[str, Any]:
    """Make a registered version the champion; the one before becomes `previous`. None: the challenger.

    The gate itself (`by` "gate") moves only what it would promote; a person may promote what it holds, and with
    `force` also what it rejects. Promoting the champion again changes nothing.

    Returns {"name", "version", "previous", "aliases", "decision", "reason", "changed"}.
    Raises BadInput when there is no such version or the gate stands in the way.
    """
    aliases = registry.aliases(bench.workspace, name)
    version = version or aliases.get("challenger") or aliases.get("champion")
    row, verdict = _version_and_verdict(bench, name, version)
    decision = verdict.get("decision", "none")
    if row.version == aliases.get("champion"):
        return _outcome(bench, row, aliases.get("previous"), decision, "is the champion already", changed=False)
    _require_consent(row, decision, by=by, force=force)
    previous = registry.set_champion(bench.workspace, name, row.version)
    reason = reason or f"gate: {decision}"
    with bench.catalog.write() as session:
        session.add(Promotion(name=name, version=row.version, previous_version=previous, decided_by=by, reason=reason))
    return _outcome(bench, row, previous, decision, reason, changed=True)


@flow(name="promote", flow_run_name="promote-{name}")
def promote_version(
    name: str, version: int | None = None, by: str = "", reason: str = "", force: bool = False
) -> dict[str, Any]:
    """`promote` as a run that Prefect shows and that an automation may start."""
    return promote(Bench.open(Workspace.from_environment()), name, version, by=by, reason=reason, force=force)


def _version_and_verdict(bench: Bench, name: str, version: int | None) -> tuple[ModelVersion, dict[str, Any]]:
    with bench.catalog.read() as session:
        rows = {row.version: row for row in session.scalars(select(ModelVersion).where(ModelVersion.name == name))}
        if not rows:
            names = ", ".join(sorted(set(session.scalars(select(ModelVersion.name))))) or "none"
            raise BadInput(f"no model is called {name!r}; registered models: {names}")
        row = rows.get(version or max(rows))
        if row is None:
            raise BadInput(f"{name} has no version {version}; there are: {', '.join(map(str, sorted(rows)))}")
        verdict = session.scalar(select(Evaluation.verdict).where(Evaluation.key == row.evaluation_key))
    return row, verdict or {}


def _require_consent(row: ModelVersion, decision: str, *, by: str, force: bool) -> None:
    if by == GATE and decision != "promote":
        raise BadInput(
            f"{row.name} version {row.version}: the gate says {decision!r}; policy auto promotes nothing else"
        )
    if decision == "reject" and not force:
        raise BadInput(
            f"{row.name} version {row.version}: the gate rejects it; `safelight show {row.run_uid}` says why,"
            " --force promotes it all the same"
        )


def _outcome(
    bench: Bench, row: ModelVersion, previous: int | None, decision: str, reason: str, *, changed: bool
) -> dict[str, Any]:
    aliases = registry.mirror_versions(bench, row.name)
    return {
        "name": row.name,
        "version": row.version,
        "previous": previous,
        "decision": decision,
        "reason": reason,
        "aliases": sorted(alias for alias, version in aliases.items() if version == row.version),
        "changed": changed,
    }
