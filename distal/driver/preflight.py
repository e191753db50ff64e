"""Before a run on several nodes: can each of them take part?

A failure on one node, halfway, is reported at the start: a folder that is not the same everywhere, a
module or package that is missing or has another version. On a node that joins later, a scoring actor opens
all it needs before it gets any work, and is sent away when it cannot.
"""

from __future__ import annotations

import platform
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

from distal import __version__, cluster, plugins
from distal.config import Root
from distal.errors import DistalError, UserError, one_line
from distal.pool import Pool
from distal.pool.images import MANIFEST
from distal.progress import Display
from distal.storage import require_writable, write_bytes

_PACKAGES = ("torch", "ray", "zarr", "numpy")
_NEEDED = ("model.weights", "checkpoints.path")  # what is read by the nodes, beside the pools
_FIRST_NODE_S = 600.0
_WAIT_S = 120.0


@dataclass(frozen=True)
class Wanted:
    """What a node must have; picklable.

    Attributes:
        pools: as the driver sees them.
        mark: a file in the run directory.
        files: keys and their files or folders.
        functions: keys and the user's functions that they name.
    """

    pools: tuple[Pool, ...]
    mark: Path
    files: Mapping[str, str]
    functions: Mapping[str, str]


@dataclass(frozen=True)
class Found:
    """The answer of a node.

    Attributes:
        versions: of Python and of the packages; those of torch without what they were built for, because a head
            without a GPU may have another build.
        problems: a line for each thing that it lacks.
    """

    versions: dict[str, str]
    problems: tuple[str, ...] = ()


def check(config: Root, run: Path, pools: Sequence[Pool], display: Display) -> None:
    """Wait for the first node; then ask every one that may work on the run, unless that is only the driver's own.

    Args:
        run: the run directory, which exists.

    Raises:
        UserError: naming the nodes that cannot take part; the display has shown before, in a line each, what they lack.
    """
    if not cluster.is_own(config.ray.address):
        cluster.wait_for_node(config.device, _FIRST_NODE_S, display.say)
    if cluster.is_alone():
        return
    display.say("asking every node for the pool, the run directory and its versions")
    places = config.places()
    mark = run / f".preflight-{uuid.uuid4().hex}.tmp"
    wanted = Wanted(tuple(pools), mark, {key: places[key] for key in _NEEDED if key in places}, config.functions())
    write_bytes(mark, b"")
    try:
        answers = cluster.on_each_node(partial(look, wanted), _WAIT_S)
    finally:
        mark.unlink(missing_ok=True)
    lacking = verdict(versions(), answers)
    for node, line in lacking.items():
        display.say(f"{node}: {line}")
    if lacking:
        raise UserError(
            f"{len(lacking)} of {len(answers)} nodes cannot take part, for the reasons above: {', '.join(lacking)}; "
            "every node needs the same files at the same paths, and the same software; mend them, or take them out"
        )


def look(wanted: Wanted) -> Found:
    """Check this node."""
    problems = []
    for pool in wanted.pools:
        if not (pool.path / MANIFEST).exists():
            problems.append(f"pool: {pool.path} is not there")
            continue
        try:
            Pool.open(pool.path).require(pool.content_sha256).read(0, 1)
        except (DistalError, OSError) as error:
            problems.append(f"pool: {one_line(error)}")
    if not wanted.mark.exists():
        problems.append(f"run: {wanted.mark.parent} is not the folder that the driver sees")
    else:
        try:
            require_writable(wanted.mark.parent)
        except (DistalError, OSError) as error:
            problems.append(f"run: {one_line(error)}")
    problems += [f"{key}: {path} is not there" for key, path in wanted.files.items() if not Path(path).exists()]
    for key, function in wanted.functions.items():
        try:
            plugins.load(function, key)
        except DistalError as error:
            problems.append(one_line(error))
    return Found(versions(), tuple(problems))


def versions() -> dict[str, str]:
    """The versions of this process."""
    packages = {name: metadata.version(name).partition("+")[0] for name in _PACKAGES}
    return {"Python": platform.python_version(), "distal": __version__, **packages}


def verdict(here: Mapping[str, str], answers: Mapping[str, Found | Exception]) -> dict[str, str]:
    """What each node lacks, as one line; nodes that lack nothing are left out.

    Args:
        here: the versions of the driver.
        answers: the answer of each node, or why there is none.
    """
    lacking = {}
    for node, answer in answers.items():
        if isinstance(answer, Exception):
            problems = [one_line(answer)]
        else:
            others = answer.versions
            problems = [
                f"{name} {others.get(name, 'missing')}, the driver has {version}"
                for name, version in here.items()
                if others.get(name) != version
            ]
            problems += answer.problems
        if problems:
            lacking[node] = "; ".join(problems)
    return lacking
