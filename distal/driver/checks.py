"""The pools of a run, opened or packed, and whether everything fits together."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from distal import cluster
from distal.acquire.strategy import strategy
from distal.artifacts.assignments import dtype_for
from distal.artifacts.runs import Run
from distal.cluster import Slots
from distal.config import NAMED, Config, Root, check_unchanged
from distal.driver.context import begun_config
from distal.errors import ConfigError, Damage, DiskFull, PoolError, RunConflict, UnknownFormat, UserError
from distal.model.spec import ModelSpec
from distal.pool import Pool
from distal.pool.build import build
from distal.pool.images import MANIFEST, OK, parts
from distal.pool.sample_files import listed, read_text
from distal.progress import Display, counter
from distal.records import STRIPE_SAMPLES, Block, JsonObject, split_blocks
from distal.storage import read_json, write_json
from distal.train.command import check_command


def open_pool(config: Root, connect: Callable[[], None], display: Display) -> Pool:
    """The pool, packed first when it does not exist yet.

    Args:
        connect: connects to Ray, which packing needs.
    """
    return _open(Path(config.pool.path), config.pool.source, "pool.source", "pool.source=null", connect, display)


def open_held_out(config: Config, connect: Callable[[], None], display: Display) -> dict[str, Pool]:
    """The pools to evaluate on, `test` and `val`, as far as they are configured; packed first if need be."""
    given = {"test": config.eval.test, "val": config.eval.val}
    pools = {}
    for name, place in given.items():
        if place is None:
            continue
        if not place.startswith(NAMED) and (Path(place) / MANIFEST).exists():
            pools[name] = Pool.open(place)
        else:
            beside = Path(f"{config.pool.path}-{name}")
            pools[name] = _open(beside, place, f"eval.{name}", f"eval.{name}={beside}", connect, display)
    return pools


def _open(
    folder: Path, source: str | None, key: str, unchanged: str, connect: Callable[[], None], display: Display
) -> Pool:
    if source is None or (folder / MANIFEST).exists():
        pool = Pool.open(folder)
        if source not in (None, pool.source):
            raise PoolError(
                f"{key}: {folder} was packed from {pool.source}, not from {source}; remove it to pack it again, or use "
                f"it as it is with {unchanged}"
            )
    else:
        connect()
        display.say(f"packing {source} into {folder}")
        pool = build(
            source,
            folder,
            on_progress=counter(display.progress, "packing"),
        )
    if pool.n_unreadable:
        display.say(
            f"{folder}: {pool.n_unreadable} of {pool.n_samples} images are unreadable and left out; "
            "`distal pool info` names some, samples.parquet all"
        )
    return pool


def named_classes(config: Config) -> tuple[str, ...] | None:
    """The classes that the configuration names, itself or in a file; None when it leaves them to the pool."""
    given = config.pool.classes
    if isinstance(given, str):
        names = [line.strip() for line in read_text(Path(given), "pool.classes").splitlines()]
        return tuple(name for name in names if name)
    return given


def with_classes(config: Config, pool: Pool) -> Pool:
    """The pool with the classes that the configuration names.

    Raises:
        PoolError: neither pool nor configuration has classes.
        ConfigError: they contradict each other, or name a class twice, white space around it aside.
    """
    given = named_classes(config)
    own = pool.classes or ()
    if given is None and not own:
        raise PoolError(f"{pool.path}: has no labels, so its classes are not known; name them: pool.classes=[..]")
    classes = own if given is None else given
    if len(set(classes)) < len(classes):
        twice = next(name for name in classes if classes.count(name) > 1)
        raise ConfigError(f"pool.classes: {twice!r} is named twice")
    like: dict[str, str] = {}
    for name in classes:
        if like.setdefault(name.strip(), name) != name:
            raise ConfigError(
                f"pool.classes: {like[name.strip()]!r} and {name!r} differ in surrounding white space only; annotators "
                "cannot tell them apart: rename one"
            )
    if classes[: len(own)] != own:
        raise ConfigError(
            f"pool.classes: must begin with those of the pool, in its order: {', '.join(own)}; others may follow"
        )
    return replace(pool, classes=classes, class_counts=(*pool.class_counts, *[0] * (len(classes) - len(own))))


def check(config: Config, pool: Pool, held_out: Mapping[str, Pool]) -> None:
    """Refuse at once what would fail later; `pool` comes from `with_classes`. Raises UserError."""
    assert pool.classes is not None
    if config.label.oracle == "pool":
        _check_labels(pool)
    elif len(pool.classes) < 2:
        raise ConfigError(f"pool.classes: one class only ({pool.classes[0]}); at least two are needed to classify")
    elif not all(name.strip() for name in pool.classes):
        raise ConfigError("pool.classes: a class has an empty name, which annotators cannot give; name it")
    if config.train.command is not None:
        check_command(config.train.command)
    dtype_for(len(pool.classes))
    check_groups(config, pool)
    strategy(config.select)
    if config.select.from_ is not None:
        listed(pool, Path(config.select.from_))
    n_usable = pool.n_readable if config.pool.limit is None else min(config.pool.limit, pool.n_readable)
    if isinstance(config.loop.initial, int) and n_usable < config.loop.initial + 1:
        raise UserError(
            f"loop.initial: {config.loop.initial} labelled samples and at least one to select need "
            f"{config.loop.initial + 1} readable images, the pool has {n_usable}; lower it"
        )
    for name, other in held_out.items():
        _check_held_out(f"eval.{name}", other, pool, pool.classes)
    ModelSpec.of(config.model, pool).check()


def check_groups(config: Root, pool: Pool) -> None:
    """Refuse a cap on groups that cannot be kept."""
    most = config.select.max_per_group
    if most is None:
        return
    if not pool.has_groups:
        raise ConfigError(
            f"select.max_per_group: {most}, and the images of {pool.path} have no group_id; pack them with one "
            "(`distal pool build --group-column`), or set it to null"
        )
    if config.score.eliminate == "exact":
        raise ConfigError(
            f"select.max_per_group: {most}: a cap may choose samples that score.eliminate: exact has left out; set "
            "score.eliminate=none"
        )


def _check_labels(pool: Pool) -> None:
    """Every image needs a label when labels of the pool are the oracle."""
    if pool.n_labeled < pool.n_readable:
        raise PoolError(
            f"{pool.path}: {pool.n_readable - pool.n_labeled} of {pool.n_readable} readable images have no label; "
            "label.oracle: pool needs a label for every image; with label.oracle=files people label"
        )
    present = [name for name, count in zip(pool.classes or (), pool.class_counts, strict=True) if count]
    if len(present) < 2:
        raise PoolError(f"{pool.path}: one class only ({present[0]}); at least two are needed to classify")


def _check_held_out(key: str, other: Pool, pool: Pool, classes: tuple[str, ...]) -> None:
    if other.image_shape != pool.image_shape:
        raise PoolError(
            f"{key}: its images have shape {other.image_shape}, those of the pool {pool.image_shape}; pack both "
            "with the same --size and --channels (`distal pool build`)"
        )
    unknown = sorted(set(other.classes or ()) - set(classes))
    if unknown:
        raise PoolError(f"{key}: class {unknown[0]!r} is not in the pool, which has {', '.join(classes)}")
    if not other.n_labeled:
        raise PoolError(f"{key}: {other.path} has no labels; set {key}=null to go without")
    shared = _shared_groups(other, pool)
    if shared:
        raise PoolError(
            f"{key}: {len(shared)} of its groups are in the pool as well, such as {', '.join(shared[:3])}; images "
            "of one group are alike, and the accuracy would be too good: pack a set of other groups, or set "
            f"{key}=null"
        )


def check_overlap(config: Config, pool: Pool, held_out: Mapping[str, Pool], display: Display) -> None:
    """Refuse images to evaluate on whose pixels are in the pool too, or warn.

    Ray tasks read the pool once, each with a hash for every image of `held_out`. The result is kept in the folder of
    the images to evaluate on, for all runs on the same images. Ray must be running.

    Raises:
        PoolError: there are some, and `eval.allow_overlap` is not set.
    """
    for name, overlap in _find_overlaps(pool, held_out, display).items():
        if not overlap["n_shared"]:
            continue
        text = (
            f"eval.{name}: {overlap['n_shared']} of its {held_out[name].n_readable} images are in the pool as well, "
            f"pixel by pixel, such as {overlap['here']}, which is {overlap['there']} there"
        )
        if not config.eval.allow_overlap:
            raise PoolError(
                f"{text}; what is measured on them would be too good: take them out of one of the two, or go on with "
                "--allow-overlap (eval.allow_overlap=true)"
            )
        display.say(f"warning: {text}")


def _find_overlaps(pool: Pool, held_out: Mapping[str, Pool], display: Display) -> dict[str, JsonObject]:
    """For each set, how many of its images are in the pool too, and the names of the first one in both."""
    overlaps: dict[str, JsonObject] = {}
    hashes = {}
    for name, other in held_out.items():
        if other.image_shape != pool.image_shape:
            display.say(f"eval.{name}: images of another shape than those of the pool; none is looked for there")
        elif (kept := _kept_overlap(pool, other)) is not None:
            overlaps[name] = kept
        else:
            hashes[name] = _all_hashes(other)
    for name, found in _find_hashes(pool, hashes, display).items():
        overlaps[name] = _overlap(pool, held_out[name], found)
        with suppress(OSError, DiskFull):  # where nothing can be written, the next run looks again
            write_json(_overlap_path(pool, held_out[name]), overlaps[name])
    return {name: overlaps[name] for name in held_out if name in overlaps}


def _overlap_path(pool: Pool, other: Pool) -> Path:
    return other.path / "overlaps" / f"{pool.content_sha256}.json"


def _kept_overlap(pool: Pool, other: Pool) -> JsonObject | None:
    """The result of an earlier run, if it is about these images."""
    try:
        kept = read_json(_overlap_path(pool, other), required=("held_out", "n_shared"))
    except (FileNotFoundError, Damage, UnknownFormat):  # found anew
        return None
    return kept if kept["held_out"] == other.content_sha256 else None


def _overlap(pool: Pool, other: Pool, found: NDArray[np.int64]) -> JsonObject:
    """The record that is written and reported.

    Args:
        found: (n, 2): `sample_index` in `other`, and of the first equal image in the pool, in the order of `other`.
    """
    here, there = map(int, found[0]) if len(found) else (None, None)
    return {
        "held_out": other.content_sha256,
        "n_shared": len(found),
        "here": None if here is None else _sample_id(other, here),
        "there": None if there is None else _sample_id(pool, there),
    }


def _find_hashes(
    pool: Pool, hashes: Mapping[str, tuple[NDArray[np.int64], NDArray[np.bytes_]]], display: Display
) -> dict[str, NDArray[np.int64]]:
    """For each set, (n, 2): its images that the pool has too, and the first place of each in the pool."""
    if not hashes:
        return {}
    wanted = np.unique(np.concatenate([each for _, each in hashes.values()]))
    first = np.full(len(wanted), pool.n_samples)
    n_done, show = 0, counter(display.progress, "looking for images to evaluate on")
    for n_samples, places, indices in cluster.in_tasks(partial(_find_in_part, pool, wanted), parts(pool.n_samples)):
        np.minimum.at(first, places, indices)
        n_done += n_samples
        show(n_done, pool.n_samples)
    found = {}
    for name, (here, each) in hashes.items():
        there = first[np.searchsorted(wanted, each)]
        found[name] = np.stack([here, there], axis=1)[there < pool.n_samples]
    return found


def _find_in_part(
    pool: Pool, wanted: NDArray[np.bytes_], part: Block
) -> tuple[int, NDArray[np.int64], NDArray[np.int64]]:
    """Places in `wanted`, which is sorted, of the images of a part that are there, and their `sample_index`."""
    indices, hashes = _pixel_hashes(pool, part)
    places = np.minimum(np.searchsorted(wanted, hashes), len(wanted) - 1)
    equal = wanted[places] == hashes
    return len(part), places[equal], indices[equal]


def _all_hashes(pool: Pool) -> tuple[NDArray[np.int64], NDArray[np.bytes_]]:
    """Of all readable images, in the order of `sample_index`."""
    found = sorted(cluster.in_tasks(partial(_pixel_hashes, pool), parts(pool.n_samples)), key=_first_index)
    return np.concatenate([indices for indices, _ in found]), np.concatenate([hashes for _, hashes in found])


def _first_index(found: tuple[NDArray[np.int64], NDArray[np.bytes_]]) -> int:
    return int(found[0][0]) if len(found[0]) else -1


def _pixel_hashes(pool: Pool, part: Block) -> tuple[NDArray[np.int64], NDArray[np.bytes_]]:
    """The readable images of a part: `sample_index`, (n,), and a 128-bit hash of the pixels, (n,) of 16 bytes."""
    (status,) = pool.columns(part.start, part.stop, "status")
    indices = part.start + np.flatnonzero(status == OK)
    hashes: list[bytes] = []
    for start in range(part.start, part.stop, pool.chunk_size):
        stop = min(start + pool.chunk_size, part.stop)
        images = np.ascontiguousarray(pool.read(start, stop).transpose(0, 2, 3, 1)).reshape(stop - start, -1)
        some = indices[(indices >= start) & (indices < stop)] - start
        hashes += [hashlib.blake2b(images[i], digest_size=16).digest() for i in some]
    return indices, np.array(hashes, "S16")


def _sample_id(pool: Pool, index: int) -> str:
    sample_id: str = pool.take_samples([index], ["sample_id"])["sample_id"][0].as_py()
    return sample_id


def _shared_groups(other: Pool, pool: Pool) -> list[str]:
    """The `group_id`s that both pools have, sorted."""
    if not (other.has_groups and pool.has_groups):
        return []
    wanted = pc.drop_null(pc.unique(other.samples(0, other.n_samples, ["group_id"])["group_id"]))
    found: set[str] = set()
    for stripe in split_blocks(pool.n_samples, STRIPE_SAMPLES):
        groups = pool.samples(stripe.start, stripe.stop, ["group_id"])["group_id"]
        found |= set(groups.filter(pc.is_in(groups, value_set=wanted)).to_pylist())
    return sorted(found)


def check_begun(directory: Run, config: Config, pool: Pool, held_out: Mapping[str, Pool]) -> None:
    """Refuse what a run that has begun cannot take; `config` has the recorded values.

    Raises:
        RunConflict: it is another run, or a cycle that has not selected yet would change.
    """
    if directory.identity is None:
        return
    directory.check(identity_keys(config, pool, held_out))
    begun = directory.begun_cycles()
    if not begun:
        return
    last = begun_config(begun[-1])
    if not begun[-1].is_complete("select"):
        check_unchanged(last, config, begun[-1].index)
    before, now = last.pool.classes, pool.classes
    assert before is not None
    assert now is not None
    if now[: len(before)] != tuple(before):  # an index means the same class for ever
        raise RunConflict(
            f"pool.classes: cycle {begun[-1].index} was begun with {', '.join(before)}; keep them in "
            "this order, and append new ones"
        )


def check_slots(config: Config, slots: Slots) -> None:
    """Refuse ranks that would wait for ever: no slot is ever added to a cluster of our own."""
    workers = config.train.workers
    threads = 1 if config.train.threads == "auto" else config.train.threads  # more only where they fit
    needed = slots.training(workers, threads)
    if cluster.is_own(config.ray.address) and needed > slots.scoring:
        unit = "GPUs" if slots.device == "cuda" else "CPU slots"
        raise ConfigError(
            f"train.workers: {workers} ranks of {threads} threads need {needed} {unit}, this machine "
            f"has {slots.scoring}; lower train.workers or train.threads, or use a larger machine if the "
            "cycle has begun"
        )


def identity_keys(config: Config, pool: Pool, held_out: Mapping[str, Pool]) -> JsonObject:
    """What must stay the same for as long as a run exists; `config` is resolved."""
    contents = {name: pool.content_sha256 for name, pool in held_out.items()}
    return {
        **config.identity_keys(),
        **content_key(pool),
        "test content (eval.test)": contents.get("test"),
        "validation content (eval.val)": contents.get("val"),
    }


def content_key(pool: Pool) -> JsonObject:
    """The content of a pool, which must stay the same wherever the pool lies."""
    return {"pool content (pool.path)": pool.content_sha256}
