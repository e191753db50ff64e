"""What a run is given: its pools, opened or packed, and whether everything fits together."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from distal.assignments import dtype_for
from distal.cluster import Slots
from distal.config import NAMED, AnyRoot, Config, Root
from distal.errors import ConfigError, PoolError, UserError
from distal.lists import listed, read_text
from distal.models import ModelSpec
from distal.monitor import Display
from distal.pool import Pool
from distal.pool.build import build
from distal.pool.images import MANIFEST, OK
from distal.records import STRIPE_SAMPLES, JsonObject, Progress, auto_block_size, split_blocks
from distal.strategies import strategy
from distal.train.command import check_command


def open_pool(config: Root, connect: Callable[[], None], display: Display) -> Pool:
    """The pool, packed first when it does not exist yet.

    Args:
        connect: connects to Ray, which packing needs.
    """
    return _open(Path(config.pool.path), config.pool.source, "pool.source", "pool.source=null", connect, display)


def open_held_out(config: Config, connect: Callable[[], None], display: Display) -> dict[str, Pool]:
    """The pools to evaluate on, `test` and `val`, as far as there are any; packed first when they do not exist yet."""
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
    folder: Path, source: str | None, key: str, as_it_is: str, connect: Callable[[], None], display: Display
) -> Pool:
    if source is None or (folder / MANIFEST).exists():
        pool = Pool.open(folder)
        if source not in (None, pool.source):
            raise PoolError(
                f"{key}: {folder} was packed from {pool.source}, not from {source}; remove it to pack it again, or use "
                f"it as it is with {as_it_is}"
            )
    else:
        connect()
        display.say(f"packing {source} into {folder}")
        pool = build(
            source,
            folder,
            on_progress=lambda done, total: display.progress(Progress(-1, "packing", images_scored=done, images=total)),
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
    """Refuse at once what would fail later; `pool` is as `with_classes` gives it. Raises UserError."""
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
    """Every image needs one when they are what answers."""
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
    """Refuse images to evaluate on whose pixels are in the pool as well, or say that there are some.

    The pool is read once, a chunk at a time; what stays in memory is a hash for each image of `held_out`.

    Raises:
        PoolError: there are some, and `eval.allow_overlap` is not set.
    """
    if not held_out:
        return
    hashes = {name: dict(_pixel_hashes(other)) for name, other in held_out.items()}
    wanted = {each for of_one in hashes.values() for each in of_one.values()}
    found: dict[bytes, int] = {}
    for index, each in _pixel_hashes(pool, display):
        if each in wanted:
            found.setdefault(each, index)
    for name, other in held_out.items():
        shared = {index: found[each] for index, each in hashes[name].items() if each in found}
        if not shared:
            continue
        here = _sample_id(other, next(iter(shared)))
        there = _sample_id(pool, next(iter(shared.values())))
        text = (
            f"eval.{name}: {len(shared)} of its {other.n_readable} images are in the pool as well, pixel by pixel, "
            f"such as {here}, which is {there} there"
        )
        if not config.eval.allow_overlap:
            raise PoolError(
                f"{text}; what is measured on them would be too good: take them out of one of the two, or go on with "
                "--allow-overlap (eval.allow_overlap=true)"
            )
        display.say(f"warning: {text}")


def _pixel_hashes(pool: Pool, display: Display | None = None) -> Iterator[tuple[int, bytes]]:
    """The `sample_index` and a 128-bit hash of the pixels of every readable image, in order."""
    for part in split_blocks(pool.n_samples, pool.chunk_size):
        images = np.ascontiguousarray(pool.read(part.start, part.stop).transpose(0, 2, 3, 1)).reshape(len(part), -1)
        (status,) = pool.columns(part.start, part.stop, "status")
        for offset in np.flatnonzero(status == OK).tolist():
            yield part.start + offset, hashlib.blake2b(images[offset], digest_size=16).digest()
        if display is not None:
            done = Progress(-1, "looking for images to evaluate on", images_scored=part.stop, images=pool.n_samples)
            display.progress(done)


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


def constants(config: Root, pool: Pool, slots: Slots) -> JsonObject:
    """What a key that says `auto`, and can change a bit of the answer, comes to; kept in `run.yaml`.

    Precision and batch size are found out later, where they will be used: see `Scorers.choose`.
    """
    auto: JsonObject = {"device": slots.device, "pool.block_size": auto_block_size(pool.n_samples)}
    if isinstance(config, Config):
        auto["train.threads"] = slots.train_threads(config.train.workers)
    given = config.leaves()
    return {key: value if given[key] == "auto" else given[key] for key, value in auto.items()}


def resolved(config: AnyRoot, constants: JsonObject) -> AnyRoot:
    """The configuration with a value in place of every `auto` that is in `constants`."""
    return config.with_values({key: constants[key] for key in config.autos() if key in constants})


def fixed(config: Config, pool: Pool, held_out: Mapping[str, Pool]) -> JsonObject:
    """What must stay the same for as long as a run exists; `config` is resolved."""
    contents = {name: pool.content_sha256 for name, pool in held_out.items()}
    return {
        **config.fixed(),
        **content(pool),
        "test content (eval.test)": contents.get("test"),
        "validation content (eval.val)": contents.get("val"),
    }


def content(pool: Pool) -> JsonObject:
    """What of a pool must stay the same, wherever it lies."""
    return {"pool content (pool.path)": pool.content_sha256}


def eligible_per_block(config: Root, pool: Pool, n_labeled: int = 0) -> int:
    """About how many samples of a block will be scored while `n_labeled` are labelled; `config` is resolved."""
    n_scored = min(config.pool.limit or pool.n_readable, pool.n_readable) - n_labeled
    return max(1, min(int(config.pool.block_size), pool.n_samples) * n_scored // pool.n_samples)
