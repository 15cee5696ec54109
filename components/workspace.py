"""Where a workspace keeps its things on disk, and the environment variables that point a team elsewhere."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from platformdirs import user_data_path

from components.errors import BadInput
from components.shards import ENGINES, Crew


@dataclass(frozen=True, slots=True)
class Workspace:
    """The folder behind `SAFELIGHT_HOME` and the addresses of the services that belong to it."""

    home: Path

    @classmethod
    def from_environment(cls) -> "Workspace":
        """`SAFELIGHT_HOME`, or the platform's user-data folder. The folder need not exist yet."""
        home = os.environ.get("SAFELIGHT_HOME")
        return cls(Path(home).expanduser().resolve() if home else user_data_path("safelight", appauthor=False))

    @property
    def objects(self) -> Path:
        return self.home / "objects"

    @property
    def locks(self) -> Path:
        return self.home / "locks"

    @property
    def exports(self) -> Path:
        return self.home / "exports"

    @property
    def bases(self) -> Path:
        """Bases whose vocabulary has the tokens of a registered adapter."""
        return self.home / "bases"

    @property
    def pieces(self) -> Path:
        """What was encoded and is not yet in a shard."""
        return self.home / "pieces"

    @property
    def logs(self) -> Path:
        return self.home / "logs"

    @property
    def thumbs(self) -> Path:
        return self.home / "thumbs"

    @property
    def prefect_home(self) -> Path:
        return self.home / "prefect"

    @property
    def mlflow_artifacts(self) -> Path:
        return self.home / "mlflow-artifacts"

    @property
    def services_file(self) -> Path:
        """Remembered ports and process ids of what `safelight up` started."""
        return self.home / "services.json"

    def run_dir(self, run_uid: str) -> Path:
        """One execution's folder: journal, log, checkpoints in the making, run card."""
        return self.home / "runs" / run_uid

    def work_dir(self, key: str) -> Path:
        """Checkpoints of a stage result in the making; found again by whichever run asks for the same key."""
        return self.home / "work" / key

    @property
    def catalog_url(self) -> str:
        return os.environ.get("SAFELIGHT_CATALOG_URL") or f"sqlite:///{self.home / 'catalog.db'}"

    @property
    def mlflow_database(self) -> str:
        return f"sqlite:///{self.home / 'mlflow.db'}"

    @property
    def crew(self) -> Crew:
        """Who does work that comes in shards: `SAFELIGHT_ENGINE`, `SAFELIGHT_PROCESSES` and Ray's own `RAY_ADDRESS`.

        Raises: BadInput for an engine that there is not, and for a number of processes that is none.
        """
        engine = os.environ.get("SAFELIGHT_ENGINE") or "local"
        if engine not in ENGINES:
            raise BadInput(f"SAFELIGHT_ENGINE is {engine!r}: expected {' or '.join(ENGINES)}")
        processes = _processes("SAFELIGHT_PROCESSES", len(os.sched_getaffinity(0)))
        return Crew(engine, processes, os.environ.get("RAY_ADDRESS") or None)

    def encoding_crew(self, gpus: int) -> Crew:
        """Who encodes: of this machine one process to each of its GPUs, or `SAFELIGHT_ENCODERS`; else Ray's.

        Raises: what `crew` does.
        """
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        crew = replace(self.crew, gpus=tuple(visible.split(",")) if gpus else ())
        if crew.engine == "local":
            return replace(crew, processes=_processes("SAFELIGHT_ENCODERS", max(1, gpus)))
        return crew

    def create(self) -> "Workspace":
        """Make the folders that exist in every workspace."""
        for folder in (
            self.objects,
            self.locks,
            self.exports,
            self.logs,
            self.thumbs,
            self.prefect_home,
            self.mlflow_artifacts,
            self.home / "runs",
        ):
            folder.mkdir(parents=True, exist_ok=True)
        return self


def _processes(variable: str, usual: int) -> int:
    count = os.environ.get(variable) or str(usual)
    if not count.isdecimal() or int(count) < 1:
        raise BadInput(f"{variable} is {count!r}: expected a number of processes, 1 or more")
    return int(count)


def pieces_lock(workspace: Workspace, folder: Path) -> Path:
    """The lock of whoever takes pieces out of `folder`."""
    return workspace.locks / f"pieces-{folder.name}.lock"
