"""Schedules: a file per schedule in the workspace, kept in step with Prefect deployments by one runner process.

The files are the owner, so that a wiped Prefect database loses no schedule. `python -m flows.deployments` is the runner
that `safelight up` starts: it serves the deployments, takes up new and removed files within seconds, and starts a run
when enough new pictures lie in a recipe's sources.
"""

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from sqlalchemy import select

from components.catalog.database import Catalog
from components.catalog.models import Snapshot, SnapshotItem, SourceFile
from components.config import DataSource, Recipe
from components.curation.sources import picture_files, require_folders
from components.errors import BadInput
from components.stages import Bench
from components.storage import atomic_write
from components.workspace import Workspace
from flows import services

if TYPE_CHECKING:
    from uuid import UUID

    from anyio import CancelScope
    from prefect import Flow
    from prefect.client.orchestration import PrefectClient
    from prefect.runner import Runner

POLL_S = 3.0
SCAN_EVERY_S = 10.0
SHORTEST_S = 30
SPANS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


@dataclass(frozen=True, slots=True)
class ScheduleEntry:
    """When a recipe runs by itself: by a cron line, every so often, when so many pictures are new, or several."""

    name: str
    recipe: dict[str, Any]
    recipe_path: str
    cron: str | None = None
    every_s: int | None = None
    when_new: int | None = None
    created_at: str = ""

    @classmethod
    def read(cls, path: Path) -> Self:
        body = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{name: value for name, value in body.items() if name != "schema"})

    @property
    def in_words(self) -> str:
        words = [f"cron {self.cron}"] if self.cron else []
        words += [f"every {span_in_words(self.every_s)}"] if self.every_s else []
        words += [f"when {self.when_new} pictures are new"] if self.when_new else []
        return ", ".join(words)


def schedules_dir(workspace: Workspace) -> Path:
    return workspace.home / "schedules"


def list_schedules(workspace: Workspace) -> list[ScheduleEntry]:
    """Every stored schedule by name; a file that cannot be read is left out (`safelight doctor` names it)."""
    found = []
    for path in sorted(schedules_dir(workspace).glob("*.json")):
        try:
            found.append(ScheduleEntry.read(path))
        except (OSError, ValueError, TypeError):
            continue
    return found


def store_schedule(
    workspace: Workspace,
    recipe: Recipe,
    recipe_path: Path,
    *,
    cron: str | None = None,
    every: str | None = None,
    when_new: int | None = None,
) -> ScheduleEntry:
    """Keep a schedule for `recipe`, in place of the one its name had. Raises BadInput for one that never comes due."""
    if cron is None and every is None and when_new is None:
        raise BadInput('no schedule given; add --every 6h, --cron "0 3 * * *" or --when-new 50')
    if cron is not None:
        check_cron(cron)
    if when_new is not None and when_new < 1:
        raise BadInput(f"--when-new {when_new}: expected a number of pictures, 1 or more")
    if when_new is not None:
        require_folders(recipe.data)
    entry = ScheduleEntry(
        name=recipe.name,
        recipe=recipe.model_dump(mode="json"),
        recipe_path=str(recipe_path.resolve()),
        cron=cron,
        every_s=None if every is None else parse_span(every),
        when_new=when_new,
        created_at=datetime.now(UTC).isoformat(),
    )
    schedules_dir(workspace).mkdir(parents=True, exist_ok=True)
    with atomic_write(schedules_dir(workspace) / f"{entry.name}.json") as file:
        file.write(json.dumps({"schema": 1} | asdict(entry), indent=2).encode())
    return entry


def remove_schedule(workspace: Workspace, name: str) -> None:
    """Forget a schedule; the runner then deletes its deployment. Raises BadInput when there is none of that name."""
    path = schedules_dir(workspace) / f"{name}.json"
    if not path.is_file():
        names = ", ".join(entry.name for entry in list_schedules(workspace)) or "none"
        raise BadInput(f"no schedule is called {name!r}; there are: {names}")
    path.unlink()


def parse_span(text: str, *, option: str = "--every", shortest_s: int = SHORTEST_S) -> int:
    """Seconds in "90s", "10m", "6h", "1d", "2w" or sums such as "1h30m"."""
    parts = re.findall(r"(\d+)([smhdw])", text.strip())
    if not parts or "".join(number + unit for number, unit in parts) != text.strip().replace(" ", ""):
        raise BadInput(f"{option} {text!r}: expected a span such as 30m, 6h, 1d or 1h30m")
    seconds = sum(int(number) * SPANS_S[unit] for number, unit in parts)
    if seconds < shortest_s:
        raise BadInput(f"{option} {text!r}: expected at least {span_in_words(shortest_s)}")
    return seconds


def span_in_words(seconds: int) -> str:
    """The inverse of `parse_span`: 5400 is "1h30m"."""
    words = ""
    for unit, size in reversed(SPANS_S.items()):
        count, seconds = divmod(seconds, size)
        words += f"{count}{unit}" if count else ""
    return words or "0s"


def check_cron(text: str) -> None:
    """Raises BadInput unless Prefect understands the cron line."""
    from prefect.client.schemas.schedules import CronSchedule

    try:
        CronSchedule(cron=text)
    except ValueError:
        raise BadInput(
            f'--cron {text!r}: expected five fields, for example "0 3 * * *" for 3 o\'clock every night'
        ) from None


# new pictures -----------------------------------------------------------------------------------------------------


def count_new_pictures(catalog: Catalog, dataset: str, sources: list[Mapping[str, Any]]) -> int:
    """How many picture files of the sources are new or changed since the dataset's last snapshot.

    Looks at directory entries only; no file is opened.
    """
    known, unreadable = _last_snapshot(catalog, dataset)
    return sum(
        known.get(path) != (stat.st_size, stat.st_mtime_ns, stat.st_ino) and Path(path).name not in unreadable
        for source in sources
        for path, stat in _pictures(DataSource.model_validate(source))
    )


def _last_snapshot(catalog: Catalog, dataset: str) -> tuple[dict[str, tuple[int, int, int]], set[str]]:
    """What the files of the newest snapshot looked like when they were hashed, and names of those that never were."""
    newest = select(Snapshot.id).where(Snapshot.dataset == dataset).order_by(Snapshot.version.desc()).limit(1)
    with catalog.read() as session:
        items = session.execute(
            select(SnapshotItem.sha256, SnapshotItem.file_name).where(
                SnapshotItem.snapshot_id == newest.scalar_subquery()
            )
        ).all()
        digests = {sha256 for sha256, _ in items}
        files = session.execute(
            select(SourceFile.path, SourceFile.size, SourceFile.mtime_ns, SourceFile.inode, SourceFile.sha256)
        ).all()
    known = {path: (size, mtime_ns, inode) for path, size, mtime_ns, inode, sha256 in files if sha256 in digests}
    return known, {Path(name).name for sha256, name in items if sha256 is None}


def _pictures(source: DataSource) -> Iterator[tuple[str, os.stat_result]]:
    try:
        for path in picture_files(source):
            yield str(path), path.stat()
    except (BadInput, OSError):
        return  # what went away or is closed to us holds nothing new; the run itself will say so


class Trigger:
    """Fires when a count of new pictures has reached its threshold and two looks agree, once per count."""

    def __init__(self, threshold: int):
        self.threshold = threshold
        self._last = self._fired_at = 0

    def fires(self, count: int) -> bool:
        settled = count == self._last  # else files are still being copied
        self._last = count
        if count < self.threshold:
            self._fired_at = 0
        if not settled or count < self.threshold or count == self._fired_at:
            return False
        self._fired_at = count
        return True


# the runner -------------------------------------------------------------------------------------------------------


class Deployments:
    """The schedules as deployments of one runner, and the pictures that each of them waits for."""

    def __init__(self, workspace: Workspace, flow: "Flow[..., Any]", runner: "Runner", client: "PrefectClient"):
        self.bench = Bench.open(workspace)
        self.flow = flow
        self.runner = runner
        self.client = client
        self.applied: dict[str, tuple[ScheduleEntry, UUID]] = {}
        self.triggers: dict[str, Trigger] = {}

    async def follow_files(self) -> None:
        """Apply new and changed schedules, delete deployments whose file is gone."""
        wanted = {entry.name: entry for entry in list_schedules(self.bench.workspace)}
        for name in self.applied.keys() - wanted.keys():
            await self._delete(self.applied.pop(name)[1])
            self.triggers.pop(name, None)
        for name, entry in wanted.items():
            if self.applied.get(name, (None,))[0] != entry:
                self.applied[name] = (entry, await self.runner.aadd_deployment(self._deployment(entry)))
                if entry.when_new:
                    self.triggers[name] = Trigger(entry.when_new)
                else:
                    self.triggers.pop(name, None)

    async def drop_orphans(self) -> None:
        """Delete deployments whose schedule was removed while no runner was there to see it."""
        from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterTags

        tagged = await self.client.read_deployments(
            deployment_filter=DeploymentFilter(tags=DeploymentFilterTags(all_=["safelight"]))
        )
        names = {entry.name for entry in list_schedules(self.bench.workspace)}
        for deployment in tagged:
            if deployment.name not in names:
                await self._delete(deployment.id)

    async def skip_missed(self) -> None:
        """Cancel the runs that came due while the services were down: the next due one does the same work."""
        from prefect.client.schemas.filters import (
            DeploymentFilter,
            DeploymentFilterTags,
            FlowRunFilter,
            FlowRunFilterExpectedStartTime,
            FlowRunFilterState,
            FlowRunFilterStateType,
        )
        from prefect.client.schemas.objects import StateType
        from prefect.states import Cancelled

        a_minute_ago = datetime.now(UTC) - timedelta(seconds=60)
        missed = await self.client.read_flow_runs(
            deployment_filter=DeploymentFilter(tags=DeploymentFilterTags(all_=["safelight"])),
            flow_run_filter=FlowRunFilter(
                state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])),
                expected_start_time=FlowRunFilterExpectedStartTime.model_validate({"before_": a_minute_ago}),
            ),
        )
        for run in missed:
            await self.client.set_flow_run_state(
                run.id, Cancelled(message="Came due while Safelight was down."), force=True
            )

    async def start_on_new_pictures(self) -> None:
        """Start a run of every schedule whose sources hold enough new pictures and that is not running already."""
        from anyio.to_thread import run_sync

        for name, trigger in self.triggers.items():
            entry, deployment_id = self.applied[name]
            count = await run_sync(count_new_pictures, self.bench.catalog, name, entry.recipe["data"]["sources"])
            if trigger.fires(count) and not await self._is_running(deployment_id):
                await self.client.create_flow_run_from_deployment(
                    deployment_id, tags=["new-pictures"], name=f"{name}-{count}-new-{datetime.now(UTC):%H%M%S}"
                )

    def _deployment(self, entry: ScheduleEntry) -> Any:
        from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
        from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule
        from prefect.deployments.runner import RunnerDeployment
        from prefect.types.entrypoint import EntrypointType

        due: list[Any] = [CronSchedule(cron=entry.cron)] if entry.cron else []
        due += (
            [
                IntervalSchedule(
                    interval=timedelta(seconds=entry.every_s), anchor_date=datetime.fromisoformat(entry.created_at)
                )
            ]
            if entry.every_s
            else []
        )
        return RunnerDeployment.from_flow(
            self.flow,
            name=entry.name,
            parameters={"recipe": entry.recipe},
            schedules=due,
            tags=["safelight", entry.name],
            description=f"{entry.recipe_path}, {entry.in_words}",
            entrypoint_type=EntrypointType.MODULE_PATH,
            concurrency_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW),
        )

    async def _is_running(self, deployment_id: "UUID") -> bool:
        from prefect.client.schemas.filters import (
            DeploymentFilter,
            DeploymentFilterId,
            FlowRunFilter,
            FlowRunFilterState,
            FlowRunFilterStateType,
        )
        from prefect.client.schemas.objects import StateType

        busy = await self.client.read_flow_runs(
            deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[deployment_id])),
            flow_run_filter=FlowRunFilter(
                state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.PENDING, StateType.RUNNING]))
            ),
            limit=1,
        )
        return bool(busy)

    async def _delete(self, deployment_id: "UUID") -> None:
        from prefect.exceptions import ObjectNotFound

        try:
            await self.client.delete_deployment(deployment_id)
        except ObjectNotFound:
            return  # deleted in Prefect's own page


async def serve(workspace: Workspace, flow: "Flow[..., Any]", *, log: Callable[[str], None] = print) -> None:
    """Serve the workspace's schedules until SIGTERM, which cancels the runs in progress. An outage only delays it."""
    import anyio
    from prefect.client.orchestration import get_client
    from prefect.runner import Runner

    runner = Runner(name="safelight", pause_on_shutdown=False, limit=None)
    async with get_client() as client, anyio.create_task_group() as group:
        deployments = Deployments(workspace, flow, runner, client)
        await deployments.drop_orphans()
        await deployments.skip_missed()
        await deployments.follow_files()
        group.start_soon(runner.start)
        group.start_soon(_end_on_sigterm, runner, group.cancel_scope)
        scanned = 0.0
        while True:
            services.beat_file(workspace).touch()
            try:
                await deployments.follow_files()
                if time.monotonic() - scanned > SCAN_EVERY_S:
                    await deployments.start_on_new_pictures()
                    scanned = time.monotonic()
            except Exception as error:  # a server that restarts, a database that is locked: look again
                log(f"{type(error).__name__}: {error}")
            await anyio.sleep(POLL_S)


async def _end_on_sigterm(runner: "Runner", scope: "CancelScope") -> None:
    """Cancel what runs, then end. The runner's own handler, which this replaces, leaves before it has cancelled."""
    import anyio

    while not runner.started:
        await anyio.sleep(0.1)
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            await runner.astop()
            scope.cancel()
            return


def main() -> None:
    """The runner process: services' addresses come from the environment that `safelight up` gave it."""
    workspace = Workspace.from_environment()
    services.adopt_environment(workspace, services.current(workspace))
    import anyio

    from flows.retrain import retrain

    anyio.run(serve, workspace, retrain)


if __name__ == "__main__":
    main()
