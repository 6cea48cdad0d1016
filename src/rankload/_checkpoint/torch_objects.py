"""What the pickles of torch.save build: tensors become entries, plain containers stay, all else is `Unbuilt`.

The functions are those that torch itself pickles calls to: torch/_utils.py, torch/_tensor.py, torch/storage.py. Their
arguments come from the file, and are believed nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from rankload._checkpoint.entry import ITEM_BYTES, StorageEntry, TensorEntry, checked
from rankload._checkpoint.pickle_values import Builder, GlobalName, NotUnderstoodError, Unbuilt, checked_key

#: torch's names of dtypes, by the name of the storage class that a persistent id tells.
STORAGE_DTYPES: Mapping[str, str] = MappingProxyType(
    {
        "UntypedStorage": "uint8",
        "ByteStorage": "uint8",
        "CharStorage": "int8",
        "BoolStorage": "bool",
        "ShortStorage": "int16",
        "IntStorage": "int32",
        "LongStorage": "int64",
        "HalfStorage": "float16",
        "BFloat16Storage": "bfloat16",
        "FloatStorage": "float32",
        "DoubleStorage": "float64",
        "ComplexFloatStorage": "complex64",
        "ComplexDoubleStorage": "complex128",
        "QUInt8Storage": "quint8",
        "QInt8Storage": "qint8",
        "QInt32Storage": "qint32",
        "QUInt4x2Storage": "quint4x2",
        "QUInt2x4Storage": "quint2x4",
    }
)


#: torch's own limit.
_MOST_DIMENSIONS = 64

#: A short pickle can ask for a copy of one long text a million times.
_LONGEST_COPY = 64


def storage_type_of(value: Any) -> str:
    """Return the dtype that a storage class stands for.

    Raises:
        NotUnderstoodError: it is none that is known.
    """
    name = value.name if isinstance(value, GlobalName) else None
    if name is None or name not in STORAGE_DTYPES:
        raise NotUnderstoodError(f"a storage of the type {value}")
    return STORAGE_DTYPES[name]


def _tensor(arguments: tuple[Any, ...], dtype: str | None = None) -> TensorEntry:
    storage, offset, shape, stride, *rest = arguments
    if not isinstance(storage, StorageEntry):
        raise NotUnderstoodError("a tensor without a storage")
    dtype = dtype or storage.dtype
    if not (type(shape) is tuple and type(stride) is tuple and len(shape) == len(stride) <= _MOST_DIMENSIONS):
        raise NotUnderstoodError("a tensor of unusual dimensions")
    if not all(type(size) is int and size >= 0 for size in (offset, *shape, *stride)):
        raise NotUnderstoodError("a tensor of unusual sizes")
    requires_grad = bool(rest and rest[0] is True)
    entry = TensorEntry("", dtype, shape, stride, storage, offset * ITEM_BYTES[dtype], requires_grad)
    return checked(entry)


def _tensor_of_dtype(arguments: tuple[Any, ...]) -> TensorEntry:
    dtype = arguments[6]
    if not isinstance(dtype, GlobalName) or dtype.name not in ITEM_BYTES:
        raise NotUnderstoodError(f"a tensor of the dtype {dtype}")
    return _tensor(arguments, dtype.name)


def _parameter(arguments: tuple[Any, ...]) -> Any:
    data, requires_grad, *_ = arguments
    if not isinstance(data, TensorEntry):  # a quantised one
        return Unbuilt(GlobalName("torch.nn.parameter", "Parameter"), arguments)
    return replace(data, requires_grad=requires_grad is True, is_parameter=True)


def _subclass(arguments: tuple[Any, ...]) -> Any:
    """A tensor of a class of its own: its data are what a plain one's are."""
    function, kind, inner, _ = arguments
    builder = BUILDERS.get(function) if isinstance(function, GlobalName) and function != _SUBCLASS else None
    if builder is None or type(inner) is not tuple:
        return Unbuilt(kind if isinstance(kind, GlobalName) else None, arguments)
    return builder(inner)


def _dict(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    if arguments and isinstance(arguments[0], dict):
        found: dict[Any, Any] = arguments[0]
        return found
    pairs = arguments[0] if arguments and type(arguments[0]) is list else []
    found = {checked_key(key): value for key, value in pairs}
    pairs.clear()  # or a short pickle could have it copied a million times
    return found


def _ordered_dict(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    found = _dict(arguments)
    # One that is made of another dict stays that one: see `_dict`.
    return found if arguments and found is arguments[0] else OrderedDict(found)


def _size(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    (sizes,) = arguments
    if type(sizes) not in (list, tuple) or len(sizes) > _MOST_DIMENSIONS:
        raise NotUnderstoodError("a size of unusual dimensions")
    return tuple(sizes)


def _device(arguments: tuple[Any, ...]) -> Any:
    kind, *index = arguments
    if type(kind) is not str or len(kind) > _LONGEST_COPY or not all(type(number) is int for number in index[:1]):
        raise NotUnderstoodError("a device of another kind")
    return f"{kind}:{index[0]}" if index else kind


def _encoded(arguments: tuple[Any, ...]) -> Any:
    """Bytes, as pickle protocol 2 writes them: text in latin1."""
    text, encoding = arguments
    if type(text) is not str or encoding not in ("latin1", "utf-8") or len(text) > _LONGEST_COPY:
        return Unbuilt(GlobalName("_codecs", "encode"), arguments)
    return text.encode(encoding, errors="replace")


def _no_bytes(arguments: tuple[Any, ...]) -> Any:
    return Unbuilt(GlobalName("builtins", "bytes"), arguments) if arguments else b""


_SUBCLASS = GlobalName("torch._tensor", "_rebuild_from_type_v2")

#: What may be called, and what is done instead.
BUILDERS: Mapping[GlobalName, Builder] = MappingProxyType(
    {
        GlobalName("torch._utils", "_rebuild_tensor"): _tensor,
        GlobalName("torch._utils", "_rebuild_tensor_v2"): _tensor,
        GlobalName("torch._utils", "_rebuild_tensor_v3"): _tensor_of_dtype,
        GlobalName("torch._utils", "_rebuild_parameter"): _parameter,
        GlobalName("torch._utils", "_rebuild_parameter_with_state"): _parameter,
        _SUBCLASS: _subclass,
        GlobalName("torch", "Size"): _size,
        GlobalName("torch", "device"): _device,
        GlobalName("collections", "OrderedDict"): _ordered_dict,
        GlobalName("collections", "defaultdict"): lambda arguments: _dict(arguments[1:]),
        GlobalName("collections", "Counter"): _dict,
        GlobalName("_codecs", "encode"): _encoded,
        GlobalName("__builtin__", "bytes"): _no_bytes,
    }
)
