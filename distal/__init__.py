"""distal: find the few thousand images worth labelling in a pool of millions.

One loop, in the words used everywhere::

    pool -> score -> assignments -> reduce -> scores -> select -> label -> ledger -> train -> checkpoints -> (score)

While a classifier trains on what is labelled so far, the class of every unlabelled image of the pool is
predicted at every checkpoint. An image whose predicted class keeps changing has a high label dispersion:
the network is unsure of it, whatever its softmax says. The most dispersed images are labelled next.

Imports point down one ladder of packages: cli > compare > driver, report > stages (score, reduce, acquire, labels,
train) > artifacts, pool, model, cluster > config > vocabulary (the flat modules).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from distal.artifacts.assignments import Assignments
    from distal.artifacts.runs import Run
    from distal.artifacts.scores import Scores
    from distal.artifacts.selection import Selection
    from distal.config import Config, load
    from distal.driver.run import run
    from distal.model.spec import ModelSpec
    from distal.pool import Pool
    from distal.pool.build import build
    from distal.train.command import publish_checkpoint, resume_checkpoints

# Names are imported when they are first used: `import distal` costs nothing.
_HOMES = {
    "Assignments": "distal.artifacts.assignments",
    "Config": "distal.config",
    "ModelSpec": "distal.model.spec",
    "Pool": "distal.pool",
    "Run": "distal.artifacts.runs",
    "Scores": "distal.artifacts.scores",
    "Selection": "distal.artifacts.selection",
    "build": "distal.pool.build",
    "load": "distal.config",
    "publish_checkpoint": "distal.train.command",
    "resume_checkpoints": "distal.train.command",
    "run": "distal.driver.run",
}

__all__ = [
    "Assignments",
    "Config",
    "ModelSpec",
    "Pool",
    "Run",
    "Scores",
    "Selection",
    "build",
    "load",
    "publish_checkpoint",
    "resume_checkpoints",
    "run",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'distal' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
