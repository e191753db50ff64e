"""What can go wrong, by whose doing.

::

    DistalError                  exit 1: our fault, or the machine's
    ├── UserError                exit 2: the user's mistake; one line with the remedy
    │   ├── ConfigError          a key or a value of the configuration
    │   ├── SourceError          the source of a pool
    │   ├── PoolError            a packed pool that is missing, unfinished or does not fit
    │   ├── RunConflict          a run directory made from other inputs
    │   │   └── Unfit            an actor of another kind than the others
    │   ├── ModelError           a model or weights that do not fit the pool
    │   ├── UnknownFormat        a file written by another version of distal
    │   ├── Diverged             a loss or a logit that is not finite
    │   └── DiskFull             no space left; committed files stay valid
    ├── BlockFailed              a block of the pool failed again and again
    ├── TrainingFailed           the ranks died again and again without finishing an epoch
    ├── Superseded               another driver has taken over; this one must not write any more
    └── Damage                   exit 4: stored bytes have changed

Errors cross Ray processes, so each takes one message and survives pickling.
"""

from __future__ import annotations


class DistalError(Exception):
    """Base of every error that distal raises on purpose."""

    exit_code = 1


class UserError(DistalError, ValueError):
    """A mistake of the user; the message has the key, the value, the allowed values and the remedy."""

    exit_code = 2


class ConfigError(UserError):
    """A key or a value of the configuration is wrong."""


class SourceError(UserError):
    """A pool cannot be built from this source."""


class PoolError(UserError):
    """A packed pool is missing, unfinished, or does not fit the run."""


class RunConflict(UserError):
    """The run directory was made from other inputs than those given now."""


class Unfit(RunConflict):
    """An actor's predictions could differ from those of the others."""


class ModelError(UserError):
    """The model or its weights do not fit the pool."""


class UnknownFormat(UserError):
    """A file has a format version that this version of distal does not read."""


class Diverged(UserError):
    """Training or prediction gave a value that is not finite."""


class DiskFull(UserError):
    """No space is left on the device; everything committed before stays valid."""


class BlockFailed(DistalError):
    """A block of the pool could not be scored within the allowed number of retries."""


class TrainingFailed(DistalError):
    """The training ranks died repeatedly without finishing an epoch."""


class Superseded(DistalError):
    """Another driver has taken over the run, or the file, that this process was writing."""


class Damage(DistalError):
    """Stored bytes have changed, or are missing."""

    exit_code = 4


def one_line(error: BaseException) -> str:
    """The message of an error on one line; its class without one."""
    return " ".join(str(error).split()) or type(error).__name__


def shown(value: object, most: int = 60) -> str:
    """A value from an untrusted file for one line of a terminal: at most `most` characters, all printable."""
    text = value if isinstance(value, str) else repr(value)
    text = text if len(text) <= most else f"{text[: most - 3]}..."
    return text if text.isprintable() else ascii(text)[1:-1]
