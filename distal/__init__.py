"""distal: find the few thousand images worth labelling in a pool of millions.

One loop, in the words of docs/glossary.md::

    pool -> score -> assignments -> reduce -> scores -> select -> label -> ledger -> train -> checkpoints -> (score)

While a classifier trains on the images labelled so far, the class of every unlabelled image of the
pool is predicted at every checkpoint. An image whose predicted class keeps changing has a high
label dispersion: the network is unsure of it, whatever its softmax says. The most dispersed images
are labelled next.

Imports point down one ladder of packages: cli > compare > driver, report > stages (score, reduce,
acquire, labels, train) > artifacts, pool, model, cluster > config > vocabulary (the flat modules).
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from distal.artifacts.assignments import Assignments
    from distal.artifacts.runs import Run
    from distal.artifacts.scores import Scores
    from distal.artifacts.selection import Selection
    from distal.compare.strategies import compare
    from distal.config import CompareConfig, Config, ScoreConfig, load
    from distal.driver.reanalyse import reduce_run as reduce
    from distal.driver.reanalyse import select_run as select
    from distal.driver.run import run
    from distal.driver.score_folder import score_directory as score
    from distal.model.spec import ModelSpec
    from distal.pool import Pool
    from distal.pool.build import build
    from distal.report.plan import plan
    from distal.report.status import status
    from distal.report.verify import verify
    from distal.train.command import publish_checkpoint, resume_checkpoints

# Names are imported when they are first used: `import distal` costs nothing.
_HOMES = {
    "Assignments": "distal.artifacts.assignments:Assignments",
    "CompareConfig": "distal.config:CompareConfig",
    "Config": "distal.config:Config",
    "ModelSpec": "distal.model.spec:ModelSpec",
    "Pool": "distal.pool:Pool",
    "Run": "distal.artifacts.runs:Run",
    "ScoreConfig": "distal.config:ScoreConfig",
    "Scores": "distal.artifacts.scores:Scores",
    "Selection": "distal.artifacts.selection:Selection",
    "build": "distal.pool.build:build",
    "compare": "distal.compare.strategies:compare",
    "load": "distal.config:load",
    "plan": "distal.report.plan:plan",
    "publish_checkpoint": "distal.train.command:publish_checkpoint",
    "reduce": "distal.driver.reanalyse:reduce_run",
    "resume_checkpoints": "distal.train.command:resume_checkpoints",
    "run": "distal.driver.run:run",
    "score": "distal.driver.score_folder:score_directory",
    "select": "distal.driver.reanalyse:select_run",
    "status": "distal.report.status:status",
    "verify": "distal.report.verify:verify",
}
_PACKAGES = ("compare", "reduce", "score")  # each is a package and, called, the command of its name

__all__ = [
    "Assignments",
    "CompareConfig",
    "Config",
    "ModelSpec",
    "Pool",
    "Run",
    "ScoreConfig",
    "Scores",
    "Selection",
    "build",
    "compare",
    "load",
    "plan",
    "publish_checkpoint",
    "reduce",
    "resume_checkpoints",
    "run",
    "score",
    "select",
    "status",
    "verify",
]


class CallablePackage(ModuleType):
    """A package that runs the command of its name: `distal.score(config)`.

    Importing a submodule binds its package as an attribute of `distal`, so the package would
    replace a plain function `distal.score` as soon as it is called.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _command(self)(*args, **kwargs)

    @property
    def __signature__(self) -> Any:
        from inspect import signature

        return signature(_command(self))


def _command(package: ModuleType) -> Any:
    return _imported(package.__name__.removeprefix("distal."))


def _imported(name: str) -> Any:
    module, attribute = _HOMES[name].split(":")
    return getattr(importlib.import_module(module), attribute)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'distal' has no attribute {name!r}")
    return importlib.import_module(f"distal.{name}") if name in _PACKAGES else _imported(name)
