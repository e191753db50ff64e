"""The conductor of `distal compare`: strategies x seeds, each a run of its own, and what they come to.

::

    RUN/
      seeds/<seed>/first/          the first cycle, trained and scored once with all that any strategy looks at
      seeds/<seed>/<strategy>/     a run; its first cycle is linked from there
      results.parquet  results.csv  comparison.json  report.md  curves.png  curves.svg  classes.png

All strategies of a seed start from the same labelled set, the same weights and the same order of images: what differs
is what they selected. Storage is the only truth here too: the same call continues where it stopped.
"""

from __future__ import annotations

import os
import platform
import shutil
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from distal import __version__, cluster
from distal.artifacts.assignments import begun_path, record_path
from distal.artifacts.cycles import Cycle
from distal.artifacts.runs import CycleSummary, Run
from distal.compare.results import report
from distal.config import FIRST, CompareConfig, Config, SelectSection
from distal.config.needs import recorded, scored_epochs
from distal.driver import run as driver
from distal.driver.run import RunResult
from distal.errors import ConfigError
from distal.pool import Pool
from distal.progress import Display, Silent
from distal.records import JsonObject
from distal.storage import be_durable, write_yaml


def compare(config: CompareConfig, display: Display | None = None) -> JsonObject:
    """Run every strategy with every seed, as far as that is not done, and compare what came of it.

    Returns:
        What `report` returns, with `"state": "complete"` and `run`.

    Raises:
        UserError: the configuration, the pool and what is in the folder do not fit together.
        DistalError: a stage failed; what was committed stays, and the same call continues.
    """
    config = config.absolute()
    display = display or Silent()
    if config.eval.test is None:
        raise ConfigError("eval.test: null: strategies are compared on test images; give some")
    folder = Path(config.run)
    runs: dict[tuple[int, str], RunResult] = {}
    be_durable(config.durable)  # before the connection, which tells actors and ranks
    with ExitStack() as stack:
        stack.enter_context(cluster.connect(config.ray.address))
        for seed in config.seeds:
            for name in config.compare.strategies:
                display.say(f"seed {seed}, {name}")
                runs[seed, name] = _run(config, folder / "seeds" / str(seed), seed, name, display)
    pool = Pool.open(Path(config.pool.path))
    selections = {}
    rows = []
    for (seed, name), result in runs.items():
        run = Run.open(result.run)
        for summary in result.cycles:
            cycle = run.cycle(summary.cycle)
            rows.append(_row(config, seed, name, cycle, summary))
            selections[seed, name, cycle.index] = _selected(pool, cycle)
    told = report(
        pa.Table.from_pylist(rows),
        selections,
        out=folder,
        references=config.compare.references,
        metric=config.compare.metric,
        level=config.compare.level,
        conditions=_conditions(config, pool),
        classes=pool.classes or (),
    )
    return {"state": "complete", "run": config.run, **told}


def strategy_config(config: CompareConfig, name: str, seed: int, folder: Path) -> Config:
    """The configuration of a run by one strategy, which scores and records nothing that it does not need."""
    select = config.compare.strategies[name]
    return _single(config, seed, folder, select, recorded(select), "needed")


def first_config(config: CompareConfig, seed: int, folder: Path) -> Config:
    """The configuration of the first cycle, which has what any of the strategies needs."""
    each = [strategy_config(config, name, seed, folder) for name in config.compare.strategies]
    names = dict.fromkeys(name for one in each for name in one.score.record)
    neediest = max(each, key=lambda one: len(scored_epochs(one)))
    whole = len(scored_epochs(neediest)) == len(config.train.checkpoint_epochs)
    select = neediest.select.model_copy(update={"subpool": None})  # of a part not every strategy could select
    return _single(config, seed, folder, select, tuple(names), "all" if whole else "needed", cycles=1)


def _single(
    config: CompareConfig,
    seed: int,
    folder: Path,
    select: SelectSection,
    record: tuple[str, ...],
    checkpoints: str,
    cycles: int | None = None,
) -> Config:
    tree = config.model_dump(by_alias=True)
    del tree["compare"]
    tree |= {"run": str(folder), "seed": seed, "select": select.model_dump(by_alias=True)}
    tree["score"] |= {"record": record, "checkpoints": checkpoints}
    tree["loop"]["cycles"] = cycles or config.loop.cycles
    return Config.model_validate(tree)


def _run(config: CompareConfig, folder: Path, seed: int, name: str, display: Display) -> RunResult:
    """One run to its end: its first cycle from what is shared, then the others."""
    shared, own = folder / FIRST, folder / name
    wanted = strategy_config(config, name, seed, own)
    if Run(own).identity is None:
        first = first_config(config, seed, shared)
        driver.run(first, display)
        _fork(Run.open(shared), own, wanted)
    cycle = Run.open(own).cycle(0)
    if cycle.marker("select") is None:
        assert isinstance(cycle.config, Config)
        driver.run(cycle.config.with_values({"run": str(own), "loop.cycles": 1}), display)
    result = driver.run(wanted, display)
    assert isinstance(result, RunResult)  # the labels are those of the pool
    return result


def _fork(shared: Run, dest: Path, wanted: Config) -> None:
    """Begin a run with the first cycle of another one, by links: files are never changed, only replaced.

    `run.yaml` comes last: a folder without it was cut off, and is begun again.
    """
    shutil.rmtree(dest, ignore_errors=True)
    source = shared.cycle(0)
    begun = source.config
    assert isinstance(begun, Config)
    select = wanted.select
    stages, arrays = ["train", "test"], [source.held_out("test"), source.held_out("val")]
    if select.subpool is None:  # of a part of the pool other samples are scored
        stages.append("score")
        arrays.append(source.assignments)
    beside = [of(path) for of in (record_path, begun_path) for path in arrays]
    paths = [shared.initial, source.folder / "train", source.checkpoints, *arrays, *beside]
    paths += [source.folder / f"{stage}.json" for stage in stages]
    for path in paths:
        _link(path, dest / path.relative_to(shared.path))
    values = {f"select.{key}": value for key, value in select.model_dump(by_alias=True).items()}
    Run(dest).cycle(0).begin(begun.with_values({"run": str(dest), "loop.cycles": wanted.loop.cycles, **values}))
    assert shared.identity is not None
    write_yaml(dest / "run.yaml", vars(shared.identity))


def _link(source: Path, dest: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, dest, copy_function=os.link)
    elif source.exists():
        dest.parent.mkdir(parents=True, exist_ok=True)
        os.link(source, dest)


def _row(config: CompareConfig, seed: int, name: str, cycle: Cycle, summary: CycleSummary) -> JsonObject:
    """The figures of a cycle. The first one is shared: it counts the images that this strategy needs."""
    took = summary.seconds
    scored = cycle.marker("score")
    assert scored is not None
    assert summary.test is not None
    needed = len(scored_epochs(strategy_config(config, name, seed, Path(config.run))))
    images = needed * scored.outputs.n_eligible
    # Scoring goes on beside training; without anything to score it only waits for it.
    stages = [max(took["train"], took["score"]) if images else took["train"]]
    stages += [took.get(stage, 0.0) for stage in ("test", "reduce", "select", "label")]
    return {
        "seed": seed,
        "strategy": name,
        "cycle": cycle.index,
        "n_labeled": summary.n_paid,
        **{metric: summary.test[metric] for metric in config.eval.metrics},
        "seconds": float(sum(stages)),
        "images_scored": images,
    }


def _selected(pool: Pool, cycle: Cycle) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    indices = cycle.chosen().indices
    labels = pool.take_samples(indices, ["label"])["label"].fill_null(-1).to_numpy().astype(np.int64)
    return indices, labels


def _conditions(config: CompareConfig, pool: Pool) -> JsonObject:
    initial, loop, train = config.loop.initial, config.loop, config.train
    balanced = config.loop.balance and isinstance(initial, int)
    return {
        "initial_set": "class-balanced" if balanced else "from a file" if isinstance(initial, str) else "random",
        "pool": f"{pool.n_readable:,} images from {pool.source}, content {pool.content_sha256[:12]}",
        "limit": config.pool.limit,
        "test": config.eval.test,
        "model": config.model.name,
        "labels": f"{initial} at first, {loop.budget} per cycle, {loop.cycles} cycles",
        "training": f"{train.epochs} epochs, batch {train.batch_size}, lr {train.lr:g} ({train.schedule}), "
        f"augment {train.augment}, {train.init}",
        "checkpoints": len(train.checkpoint_epochs),
        "strategies": {name: _changed(select) for name, select in config.compare.strategies.items()},
        "versions": f"distal {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
    }


def _changed(select: SelectSection) -> str:
    """The keys of a strategy that are not the default."""
    return ", ".join(f"{key}={value}" for key, value in select.model_dump(by_alias=True, exclude_defaults=True).items())
