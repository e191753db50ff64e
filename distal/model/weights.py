"""Weights in files: written, read without running code, located in a file, checked against a network.

A `state_dict` maps names to tensors. Whether one fits a network is decided by `check_fits` alone.
"""

from __future__ import annotations

import io
import itertools
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distal.config import FolderModel, ModelSection
from distal.errors import ModelError, one_line, shown
from distal.storage import read_regular

if TYPE_CHECKING:  # torch takes seconds to import, and reading a manifest does not need it
    from torch import Tensor, nn

    StateDict = dict[str, Tensor]

SAFETENSORS, LIGHTNING = ".safetensors", ".ckpt"
STATE_DICT = "state_dict"  # the key that Lightning and many scripts use
ANY_SIZE = 2**63 - 1
_ZIP = b"PK\x03\x04"
_DEEPEST = 16  # nested mappings in which weights are looked for


def serialize(value: Any) -> bytes:
    """Tensors and plain values as bytes; equal values give equal bytes in every process.

    Tensors are made contiguous first: their memory format is not part of their value.
    """
    import torch

    buffer = io.BytesIO()
    torch.save(_contiguous(value), buffer)
    return buffer.getvalue()


class Unreadable(Exception):
    """The bytes are no file of weights that is safe to load; the message says why, in one line."""


def deserialize(data: bytes, suffix: str = ".pt") -> Any:
    """The inverse of `serialize`, on the CPU. Only tensors and plain values are accepted, never code.

    Every untrusted file is loaded here. The result is no larger than the file, except for tensors that are repeated
    views of its bytes: check shapes before values.

    Args:
        suffix: of the file's name; `.safetensors` is another format.

    Raises:
        Unreadable: the bytes are anything else.
    """
    import torch

    try:
        if suffix == SAFETENSORS:
            from safetensors.torch import load as load_safetensors

            return load_safetensors(data)
        _check_sizes(data)
        with warnings.catch_warnings(action="ignore"):  # about kinds of tensors that `check_fits` refuses
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # untrusted bytes can make the loaders raise anything
        raise Unreadable(one_line(error)[:200]) from error


def _check_sizes(data: bytes) -> None:
    """Raise Unreadable for a zip bomb. torch stores entries uncompressed, so they cannot exceed the file."""
    if not data.startswith(_ZIP):  # torch's own test; before torch 1.6 the format was no archive
        return
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise Unreadable("a compressed archive, which torch.save does not write")
    if sum(entry.file_size for entry in entries) > len(data):
        raise Unreadable("an archive that claims to hold more bytes than it has")


def _oddity(value: object) -> str:
    """Why a value is no plain tensor (dense, in memory, every element stored); empty when it is one.

    Reads no elements, so it is quick and takes no memory, whatever shape an untrusted file claims.
    """
    import torch

    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}"
    if value.is_nested:
        return "a nested tensor"
    if value.layout != torch.strided:
        return f"a tensor of layout {str(value.layout).removeprefix('torch.')}"
    if value.device.type != "cpu":
        return f"a tensor on the device {value.device.type}"
    if value.is_quantized:
        return "a quantised tensor"
    if value.untyped_storage().nbytes() < value.numel() * value.element_size():
        return "an expanded view, which repeats its values"
    return ""


def _contiguous(value: Any) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        return value.detach().cpu().contiguous()
    if isinstance(value, dict):
        return {key: _contiguous(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_contiguous(item) for item in value]
    return value


def unsafe_classes(data: bytes, suffix: str) -> list[str]:
    """Classes in a pickle that are not plain values: loading them would run code of its writer."""
    from torch.serialization import get_unsafe_globals_in_checkpoint

    if suffix == SAFETENSORS:
        return []
    try:
        _check_sizes(data)
        return sorted(get_unsafe_globals_in_checkpoint(io.BytesIO(data)))
    except Exception:  # not even a pickle: `deserialize` says why
        return []


@dataclass(frozen=True, slots=True)
class Location:
    """Where the weights are in a file: `checkpoints.key` and `strip_prefix`; None means find it."""

    key: str | None = None
    prefix: str | None = None


ANYWHERE = Location()


def within(value: Any, key: str | None, prefix: str) -> Any:
    """The state_dict in the content of a file, below `key` and without `prefix`; see `CheckpointRef`.

    Raises:
        KeyError: nothing has that key.
    """
    if key is not None:
        value = _below(value, key)
    if prefix and isinstance(value, Mapping):
        value = {
            name.removeprefix(prefix): tensor
            for name, tensor in value.items()
            if isinstance(name, str) and name.startswith(prefix)
        }
    return value


def _below(value: Any, key: str) -> Any:
    """The value below a dotted path of keys; a single key may contain dots as well."""
    if not isinstance(value, Mapping):
        raise KeyError(key)
    if key in value:
        return value[key]
    parts = key.split(".")
    for i in range(len(parts) - 1, 0, -1):
        head = ".".join(parts[:i])
        if head in value:
            return _below(value[head], ".".join(parts[i:]))
    raise KeyError(key)


def find_weights(name: str, value: object, template: StateDict, location: Location) -> tuple[str | None, str]:
    """Find the weights in a file: key and prefix, as `CheckpointRef` has them.

    Args:
        value: the content of the file.
        template: weights of the network they are for.

    Raises:
        ModelError: `location.key` or `location.prefix` is not there, or several places would fit.
    """
    key = location.key
    if key is None and isinstance(value, Mapping) and not _holds_tensors(value):
        if STATE_DICT in value:
            key = STATE_DICT
        elif len(fitting := _fitting(value, template)) == 1:
            key = fitting[0]
        else:
            known = f"; set checkpoints.key to {_some(fitting, 'or')}" if fitting else ", and none fits model.name"
            raise ModelError(f"{name}: not a state_dict of plain tensors (it has {_first(value)}){known}")
    try:
        state = within(value, key, "")
    except KeyError:
        fitting = _fitting(value, template)
        known = f"{_some(fitting, 'or')} would fit" if fitting else "nothing in it fits model.name: set it to null"
        raise ModelError(f"checkpoints.key: {name} has no {key!r}; {known}") from None
    if not isinstance(state, Mapping):
        return key, location.prefix or ""
    if location.prefix is not None:
        if not any(str(each).startswith(location.prefix) for each in state):
            raise ModelError(
                f"checkpoints.strip_prefix: no key of {name} begins with {location.prefix!r}: {_first(state)}"
            )
        return key, location.prefix
    prefixes = _prefixes(state, template)
    if len(prefixes) > 1:
        raise ModelError(
            f"{name}: has weights for this network more than once, under {_some(prefixes, 'and')}; set "
            "checkpoints.strip_prefix to one of them"
        )
    return key, prefixes[0] if prefixes else ""


def _holds_tensors(value: Mapping[Any, object]) -> bool:
    import torch

    return bool(value) and all(isinstance(each, torch.Tensor) for each in value.values())


def _fitting(value: object, template: StateDict) -> list[str]:
    """The dotted keys below which there is a tensor for every name of the network."""
    found: list[str] = []
    fits: dict[int, bool] = {}  # by id: a mapping may be held in many places, even by itself
    waiting: list[tuple[tuple[str, ...], object]] = [((), value)]
    while waiting:
        place, inner = waiting.pop()
        if not isinstance(inner, Mapping):
            continue
        is_new = id(inner) not in fits
        if is_new:
            fits[id(inner)] = bool(place) and _holds_tensors(inner) and bool(_prefixes(inner, template))
        if fits[id(inner)]:
            found.append(".".join(place))
        elif is_new and len(place) < _DEEPEST:
            waiting += [
                ((*place, name), below) for name, below in reversed(list(inner.items())) if isinstance(name, str)
            ]
    return found


def _prefixes(state: Mapping[Any, object], template: StateDict) -> list[str]:
    """The prefixes with which every name of the network is a key; the empty one wins."""
    if all(key in state for key in template):
        return [""]
    first = next(iter(template))
    candidates = [str(key).removesuffix(first) for key in state if str(key).endswith(f".{first}")]
    return [prefix for prefix in candidates if all(prefix + key in state for key in template)]


def _first(keys: Mapping[Any, object]) -> str:
    shown = [_short(key) for key in itertools.islice(keys, 5)]
    return ", ".join(shown[:4]) + (", ..." if len(shown) > 4 else "")


def _some(names: Sequence[str], word: str) -> str:
    return f" {word} ".join(map(_short, names[:4]))


def _short(value: object) -> str:
    """A value from an untrusted file, for a message."""
    return shown(value if isinstance(value, str | int) else type(value).__name__, most=100)


def check_fits(name: str, state: object, template: StateDict, *, pretrained: bool = False) -> None:
    """Check that weights fit a network: names, shapes, dtypes, plain and, of checkpoints, finite tensors.

    Args:
        name: of the file, for messages.
        template: weights of the network.
        pretrained: whether they are `model.weights` and not one of many checkpoints: a buffer of theirs may hold
            infinities, as the mask of attention does, and advice in messages differs.

    Raises:
        ModelError: naming the first key that is missing, unexpected or wrong.
    """
    import torch

    if not isinstance(state, dict) or any(not isinstance(value, torch.Tensor) for value in state.values()):
        kinds = sorted({type(value).__name__ for value in state.values()}) if isinstance(state, dict) else []
        found = f"holds {', '.join(kinds)}" if kinds else f"is a {type(state).__name__}"
        raise ModelError(f"{name}: not a state_dict of plain tensors (it {found}); save model.state_dict() alone")
    if unnamed := [key for key in state if not isinstance(key, str)]:
        raise ModelError(
            f"{name}: not a state_dict: its keys must be names, and {_short(unnamed[0])} is a "
            f"{type(unnamed[0]).__name__}; save model.state_dict() alone"
        )
    missing = [key for key in template if key not in state]
    unexpected = [key for key in state if key not in template]
    if missing or unexpected:
        differences = [f"missing {_short(key)}" for key in missing[:1]]
        differences += [f"unexpected {_short(key)}" for key in unexpected[:1]]
        hint = _prefix_hint(missing, unexpected)
        raise ModelError(f"{name}: its keys do not fit model.name: {', '.join(differences)}{hint}")
    for key, value in template.items():
        _check_tensor(name, key, state[key], value, pretrained=pretrained)
    for key in () if pretrained else template:  # after the shapes, because this reads every element
        if not torch.isfinite(state[key]).all():
            raise ModelError(
                f"{name}: {key} has values that are not finite: training diverged; leave the file out with "
                "checkpoints.pattern, or remove it"
            )


def _check_tensor(name: str, key: str, found: Tensor, wanted: Tensor, *, pretrained: bool) -> None:
    """Check the kind, shape and dtype of one tensor, without reading its elements."""
    import torch

    if odd := _oddity(found):
        raise ModelError(f"{name}: {key} is {odd}; save model.state_dict() alone, with plain tensors")
    if found.shape != wanted.shape:
        hint = ""
        if found.shape[1:] == wanted.shape[1:] and not pretrained:
            hint = f"; set model.num_classes={found.shape[0]} if these are its classes"
        elif key.startswith("conv1."):
            hint = "; set model.stem=standard" if pretrained else "; set model.stem"
        raise ModelError(f"{name}: {key} has shape {tuple(found.shape)}, the network needs {tuple(wanted.shape)}{hint}")
    able = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
    if not wanted.is_floating_point():  # such as a count of batches, which averaging turns into a fraction
        able |= {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool}
    if found.dtype not in able and found.dtype != wanted.dtype:
        dtypes = [str(dtype).removeprefix("torch.") for dtype in (found.dtype, wanted.dtype)]
        raise ModelError(f"{name}: {key} is {dtypes[0]}, and the network needs {dtypes[1]}; save it as that")


def _prefix_hint(missing: list[str], unexpected: list[str]) -> str:
    """Advice for weights whose keys all begin with one prefix too many."""
    for key in unexpected:
        prefix = key.removesuffix(missing[0]) if missing and key.endswith(missing[0]) else ""
        if prefix and all(prefix + wanted in unexpected for wanted in missing):
            return f"; every key begins with {_short(prefix)!r}: save it without that prefix"
    return ""


def load_pretrained(net: nn.Module, config: ModelSection | FolderModel) -> None:
    """Load `model.weights` into a network, without a head that was made for other classes.

    Raises:
        ModelError: no such weights, or others than the head do not fit.
    """
    state = _pretrained(config)
    template = net.state_dict()
    head = [key for key in list(template)[-2:] if _has_other_classes(state.get(key), template[key])]
    name = f"model.weights: {config.weights}"
    check_fits(name, state, {**template, **{key: state[key] for key in head}}, pretrained=True)
    net.load_state_dict({key: value for key, value in state.items() if key not in head}, strict=False)


def _has_other_classes(found: Tensor | None, wanted: Tensor) -> bool:
    return found is not None and found.shape != wanted.shape and found.shape[1:] == wanted.shape[1:]


def _pretrained(config: ModelSection | FolderModel) -> StateDict:
    """The state_dict of a file, or of torchvision's collection."""
    assert config.weights is not None
    path = Path(config.weights)
    if path.is_absolute():
        try:
            state = deserialize(read_regular(path, ANY_SIZE))
        except FileNotFoundError:
            raise ModelError(f"model.weights: {path}: no such file") from None
        except (OSError, Unreadable) as error:
            raise ModelError(f"model.weights: {path} is not a file of plain tensors ({one_line(error)})") from error
        if not isinstance(state, dict) or any(map(_oddity, state.values())):
            raise ModelError(f"model.weights: {path} is not a state_dict; save model.state_dict() alone")
        return state

    import torchvision

    try:
        weights = torchvision.models.get_model_weights(config.name)[config.weights]
    except (KeyError, ValueError):
        raise ModelError(
            f"model.weights: torchvision has no weights {config.weights!r} for {config.name}; "
            "give one of its names, such as DEFAULT, or a path"
        ) from None
    try:
        return dict(weights.get_state_dict(progress=False))
    except OSError as error:
        raise ModelError(f"model.weights: {config.weights} cannot be downloaded ({error}); give a path") from error
