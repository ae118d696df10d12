"""The errors a user meets: each message says what, where, both values and the fix, in one line.

Commands turn any `ErnieElasticError` into that line and exit code 2 (`stages.run_command`).
"""

from __future__ import annotations


class ErnieElasticError(Exception):
    """Base of every error that a user can cause and repair."""


class ConfigError(ErnieElasticError, ValueError):
    """A flag, preset or sub-model spec that cannot be carried out."""


class DataError(ErnieElasticError, ValueError):
    """A record, shard or media file that cannot be used; the message names the record."""


class FormatError(ErnieElasticError, ValueError):
    """A compressed or packed file whose bytes do not obey `docs/formats.md`."""


class CheckpointError(ErnieElasticError, RuntimeError):
    """A stage directory that is missing, damaged, of another stage or cannot be written."""


class TrainingError(ErnieElasticError, RuntimeError):
    """A run that cannot go on as it is, such as one whose loss is no number again and again."""
