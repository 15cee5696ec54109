"""The one exception tree. A message says what was found, what was expected and what to do, on one line."""


class SafelightError(Exception):
    """Anything Safelight raises on purpose; `exit_code` is what the command line ends with."""

    exit_code = 1


class BadInput(SafelightError):
    """The user's recipe, folder, file or flag cannot be used as it is."""

    exit_code = 2


class RecipeError(BadInput):
    """A recipe is missing, is not TOML, or holds an unknown key or an impossible value."""


class BaseModelError(BadInput):
    """The base model's folder or id is no pipeline this version can train."""


class IncomparableRuns(BadInput):
    """Two evaluations differ in prompts, seeds, sampler or references, so no verdict may rest on both."""


class DamagedArtifact(SafelightError):
    """A stored object's bytes are gone or are not the bytes its name promises."""


class LatentCacheMismatch(DamagedArtifact):
    """Cached latents do not have the shape or the members that the training asks for."""


class TrainingDiverged(SafelightError):
    """The loss, a gradient or a latent is not finite."""


class OutOfMemory(SafelightError):
    """Not even one sample at a time fits into the device's memory."""


class StorageFull(SafelightError):
    """A write failed for lack of space; nothing half-written is left behind."""


class StageFailed(SafelightError):
    """A stage ended without a result; the message carries the cause."""


class ServiceUnavailable(SafelightError):
    """A server (Prefect, MLflow, dashboard, database) does not answer where it should."""


class Stopped(SafelightError):
    """The run was asked to stop (SIGINT or SIGTERM) and has saved what it had."""

    exit_code = 143
