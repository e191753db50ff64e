"""What a pool can be built from: `open_source` picks the kind of source by its location.

A source lists its samples first and gives encoded images on demand. The driver opens it once; every build task is sent
only the part that it packs.
"""

from __future__ import annotations

from pathlib import Path

from distal.config import BUILTIN, TORCHVISION
from distal.errors import SourceError
from distal.pool.decode import FORMATS
from distal.pool.folder_source import FolderSource, find_files
from distal.pool.parquet_source import Columns, ParquetSource
from distal.pool.rows import Source, is_utf8, readable
from distal.pool.torchvision_source import TorchvisionSource

_BUILTIN_FOLDER = Path(__file__).parent / "builtin"
_BUILTINS = {
    "builtin:fashion-mnist-12k": "fashion-mnist-10k-train.parquet",
    "builtin:fashion-mnist-12k/test": "fashion-mnist-2k-test.parquet",
}


def open_source(location: str, columns: Columns | None = None, *, follow_symlinks: bool = False) -> Source:
    """Open `builtin:...`, `torchvision:...`, a Parquet file, a folder of Parquet files, or a folder of images.

    Args:
        follow_symlinks: follow links that lead out of the folder as well.

    Raises:
        SourceError: nothing there, not a known kind, or contents that contradict themselves.
    """
    columns = columns or Columns()
    if not is_utf8(location):
        raise SourceError(f"{readable(location)}: its name is not UTF-8; rename it")
    if location.startswith(BUILTIN):
        return ParquetSource.of([_builtin(location)], columns)
    if location.startswith(TORCHVISION):
        return TorchvisionSource.open(location)
    path = Path(location)
    if path.is_file():
        return ParquetSource.of([path], columns)
    if not path.is_dir():
        names = "; ".join([*_BUILTINS, f"{TORCHVISION}CIFAR10"])
        raise SourceError(f"{location}: no such source; give a Parquet file, a folder or {names}")
    found = find_files(path, {".parquet", *FORMATS}, follow_symlinks)
    tables = sorted(Path(path, name) for name in found if name.lower().endswith(".parquet"))
    return ParquetSource.of(tables, columns) if tables else FolderSource.of(path, found)


def _builtin(name: str) -> Path:
    try:
        return _BUILTIN_FOLDER / _BUILTINS[name]
    except KeyError:
        raise SourceError(f"{name}: unknown built-in source; known: {', '.join(_BUILTINS)}") from None
