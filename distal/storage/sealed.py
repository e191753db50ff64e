"""Records and bytes that carry their own hash, so that a changed byte is noticed: JSON, YAML, sealed files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from distal.errors import Damage, UnknownFormat, one_line
from distal.hashing import digest
from distal.records import JsonObject
from distal.storage.files import create_bytes, open_to_hash, read_bytes, sha256, write_bytes

FORMAT = 3
"""Format version that every artifact carries; an unknown one is refused."""

_SEAL = "record_sha256"
# Limits of a record. The largest, of a barrier, has some bytes per block.
_MAX_JSON_BYTES, _MAX_YAML_BYTES = 2**28, 2**22


def write_json(path: Path, record: JsonObject) -> None:
    """Write a JSON record atomically, with the format version."""
    write_bytes(path, _json(record))


def create_json(path: Path, record: JsonObject) -> bool:
    """Create a JSON record unless it exists; returns whether this call created it."""
    return create_bytes(path, _json(record))


def _json(record: JsonObject) -> bytes:
    return (json.dumps(_sealed(record), indent=2) + "\n").encode()


def _sealed(record: JsonObject) -> JsonObject:
    return {"format": FORMAT, **record, _SEAL: digest(record)}


def read_json(path: Path, required: Sequence[str] = ()) -> JsonObject:
    """Read a record written by `write_json`, without its format version.

    Args:
        required: keys the record must have.

    Raises:
        FileNotFoundError: no such file.
        Damage: the file is not a JSON object, or lacks a key.
        UnknownFormat: another version of distal wrote it.
    """
    try:
        record = json.loads(read_bytes(path, _MAX_JSON_BYTES))
    except (ValueError, RecursionError) as error:
        raise Damage(f"{path}: not valid JSON ({one_line(error)[:200]})") from error
    return _checked(path, record, required)


def write_yaml(path: Path, record: JsonObject) -> None:
    """Write a YAML record atomically, with the format version."""
    write_bytes(path, _yaml(record))


def create_yaml(path: Path, record: JsonObject) -> bool:
    """Create a YAML record unless it exists; returns whether this call created it."""
    return create_bytes(path, _yaml(record))


def _yaml(record: JsonObject) -> bytes:
    import yaml

    class Plain(yaml.SafeDumper):
        def ignore_aliases(self, data: object) -> bool:  # noqa: ARG002
            return True

    text: str = yaml.dump(_sealed(record), Dumper=Plain, sort_keys=False)
    return text.encode()


def read_yaml(path: Path, required: Sequence[str] = ()) -> JsonObject:
    """Read a record written by `write_yaml`; raises like `read_json`."""
    import yaml

    class Plain(yaml.SafeLoader):
        def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
            if self.check_event(yaml.AliasEvent):  # nested aliases expand to more than any memory holds
                raise yaml.YAMLError("an alias, which no record has")
            return super().compose_node(parent, index)

    data = read_bytes(path, _MAX_YAML_BYTES)
    try:
        record = yaml.load(data, Loader=Plain)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise Damage(f"{path}: not valid YAML ({one_line(error)[:200]})") from error
    return _checked(path, record, required)


def _checked(path: Path, record: object, required: Sequence[str]) -> JsonObject:
    if not isinstance(record, dict):
        raise Damage(f"{path}: not a record (a mapping was expected)")
    found, seal = record.pop("format", None), record.pop(_SEAL, None)
    if found != FORMAT:
        raise unknown_format(path, found)
    try:
        found = digest(record)
    except (TypeError, ValueError, RecursionError) as error:  # dates, keys that are lists
        raise Damage(f"{path}: not a record ({one_line(error)[:200]})") from error
    if seal != found:
        raise Damage(f"{path}: what it says has changed since it was written; put back what was there")
    missing = [key for key in required if key not in record]
    if missing:
        raise Damage(f"{path}: {missing[0]} is missing")
    return record


def require_format(path: Path, found: object) -> None:
    """Raise UnknownFormat unless `found` is the format version read here."""
    if found != FORMAT:
        raise unknown_format(path, found)


def unknown_format(path: Path, found: object) -> UnknownFormat:
    """The error for a format version that is not read here."""
    return UnknownFormat(
        f"{path}: format {found} is unknown; this version of distal reads format {FORMAT}; use the version that wrote "
        "it, or make it anew: build a pool again, start a run in another directory"
    )


def write_sealed(path: Path, data: bytes) -> None:
    """Write a file atomically, preceded by the sha256 of its bytes."""
    write_bytes(path, sha256(data).encode() + data)


def read_sealed(path: Path) -> bytes:
    """Read a file of `write_sealed`, without the hash.

    Raises:
        FileNotFoundError: no such file.
        Damage: the bytes have changed.
    """
    sealed = read_bytes(path)
    data = sealed[64:]
    if sealed[:64] != sha256(data).encode():
        raise Damage(f"{path}: its bytes have changed")
    return data


def check_sealed(path: Path) -> None:
    """Check a file of any size, read in pieces; raises like `read_sealed` and `file_sha256`."""
    with open_to_hash(path) as file:
        seal = file.read(64)
        if seal != hashlib.file_digest(file, "sha256").hexdigest().encode():
            raise Damage(f"{path}: its bytes have changed")
