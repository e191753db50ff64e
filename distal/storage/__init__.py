"""How files are written: each is complete or absent.

Local and shared file systems are supported: a write goes to a temporary file beside its target and is moved there with
`os.replace`. Nothing is appended to or changed in place. Every record carries a format version and its own hash, so a
changed byte is noticed.

Two kinds of files are written elsewhere: arrays, by Zarr, whose `LocalStore` replaces a file in the same way
(artifacts/arrays.py), and the event log, which is appended to and which no decision reads (artifacts/runs.py).

The promise covers killed processes, and with `durable: true` in the configuration a power loss as well: then every
file is fsynced before it is committed.
"""

from distal.storage.files import (
    DURABLE,
    be_durable,
    create_bytes,
    disk_errors,
    file_sha256,
    flush,
    is_durable,
    is_relative,
    link,
    local_path,
    make_folder,
    read_bytes,
    read_regular,
    require_writable,
    sha256,
    write_bytes,
)
from distal.storage.folders import (
    create_folder,
    files_below,
    names_in,
    remove_tree,
    sweep,
    temporary_folder,
)
from distal.storage.numbered import (
    Numbered,
)
from distal.storage.parquet import (
    check_parquet,
    open_parquet,
    parquet_errors,
    parquet_writer,
    read_table,
    table_bytes,
    write_table,
)
from distal.storage.sealed import (
    FORMAT,
    check_sealed,
    create_json,
    create_yaml,
    read_json,
    read_sealed,
    read_yaml,
    require_format,
    write_json,
    write_sealed,
    write_yaml,
)

__all__ = [
    "DURABLE",
    "FORMAT",
    "Numbered",
    "be_durable",
    "check_parquet",
    "check_sealed",
    "create_bytes",
    "create_folder",
    "create_json",
    "create_yaml",
    "disk_errors",
    "file_sha256",
    "files_below",
    "flush",
    "is_durable",
    "is_relative",
    "link",
    "local_path",
    "make_folder",
    "names_in",
    "open_parquet",
    "parquet_errors",
    "parquet_writer",
    "read_bytes",
    "read_json",
    "read_regular",
    "read_sealed",
    "read_table",
    "read_yaml",
    "remove_tree",
    "require_format",
    "require_writable",
    "sha256",
    "sweep",
    "table_bytes",
    "temporary_folder",
    "write_bytes",
    "write_json",
    "write_sealed",
    "write_table",
    "write_yaml",
]
