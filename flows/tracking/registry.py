"""MLflow's model registry: the versions of a name, and where its aliases point."""

from typing import TYPE_CHECKING

from components.catalog.models import ModelVersion
from components.errors import BadInput
from components.stages import Bench
from components.workspace import Workspace
from flows.tracking.server import ADAPTER_TAG, RUN_TAG, connect, reaching, require_server

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion as MlflowVersion


def aliases(workspace: Workspace, name: str, *, url: str | None = None) -> dict[str, int]:
    """Where `champion`, `challenger` and `previous` point; empty for a name that was never registered."""
    address = require_server(workspace, url)
    with reaching(address):
        return find_aliases(connect(address), name)


def registered(workspace: Workspace, name: str, version: int, *, url: str | None = None) -> bool:
    """Whether there is such a version."""
    address = require_server(workspace, url)
    with reaching(address):
        return any(int(found.version) == version for found in find_versions(connect(address), name))


def set_champion(workspace: Workspace, name: str, version: int, *, url: str | None = None) -> int | None:
    """Point champion at a version; the champion so far becomes previous and is returned.

    `previous` is written first, so a run that dies between the writes is mended by doing it again.
    """
    address = require_server(workspace, url)
    if not registered(workspace, name, version, url=address):
        raise BadInput(f"model {name!r} has no version {version}; `safelight runs` lists what was registered")
    with reaching(address):
        client = connect(address)
        before = find_aliases(client, name)
        champion = before.get("champion")
        if champion is not None and champion != version:
            client.set_registered_model_alias(name, "previous", str(champion))
        client.set_registered_model_alias(name, "champion", str(version))
        if before.get("challenger") == version:
            client.delete_registered_model_alias(name, "challenger")
    return champion if champion != version else before.get("previous")


def mirror_versions(bench: Bench, name: str, *, url: str | None = None) -> dict[str, int]:
    """Copy a model's versions and aliases from the registry into the catalog; returns the aliases."""
    address = require_server(bench.workspace, url)
    with reaching(address):
        client = connect(address)
        held, versions = find_aliases(client, name), find_versions(client, name)
    with bench.catalog.write() as session:
        for found in versions:
            if RUN_TAG in found.tags:
                number = int(found.version)
                row = session.get(ModelVersion, (name, number)) or ModelVersion(name=name, version=number)
                row.run_uid, row.adapter_sha256 = found.tags[RUN_TAG], found.tags.get(ADAPTER_TAG, "")
                row.evaluation_key = found.tags.get("safelight.evaluation_key", "")
                row.mlflow_uri = f"models:/{name}/{number}"
                row.aliases = sorted(alias for alias, target in held.items() if target == number)
                session.add(row)
    return held


def find_versions(client: "MlflowClient", name: str) -> "list[MlflowVersion]":
    from mlflow.exceptions import MlflowException

    try:
        return list(client.search_model_versions(f"name = '{name}'", max_results=1000))
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return []
        raise


def find_aliases(client: "MlflowClient", name: str) -> dict[str, int]:
    from mlflow.exceptions import MlflowException

    try:
        return {alias: int(number) for alias, number in client.get_registered_model(name).aliases.items()}
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return {}
        raise
