"""Errors meant for people: what, where, the bound, and what to do next."""


class TriptychError(Exception):
    """Base of every error that a user can act on."""


class ConfigError(TriptychError):
    """The configuration cannot run. Lists every problem, each with the override that fixes it."""


class DataError(TriptychError):
    """A sample, media file or dataset folder is not what it should be. Names file, line or key."""


class StorageError(TriptychError):
    """Files cannot be reached, though nothing is known to be wrong with them. Names the file."""


class CheckpointError(TriptychError):
    """A checkpoint is missing, damaged, or of another model. Names the folder and the tensors."""


class TrainingError(TriptychError):
    """Training cannot go on. Names step and rank."""


class CrashLoopError(TrainingError):
    """Start after start got no further. Names the step, and the batch or host that is suspected."""
