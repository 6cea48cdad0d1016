"""Builders for the pickles of torch.save: tensors become entries, plain containers stay, all else is `Unbuilt`.

They stand for the functions that torch pickles calls to: torch/_utils.py, torch/_tensor.py, torch/storage.py. Their
arguments come from the file, so every argument is checked.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from rankload._formats.broken import BrokenFileError
from rankload._formats.entry import ITEM_BYTES, MAX_DIMENSIONS, StorageEntry, TensorEntry, checked
from rankload._formats.pickle_values import Builder, GlobalName, NotUnderstoodError, Unbuilt, checked_key, display_name

#: torch's names of dtypes, by the name of the storage class in a persistent id.
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

#: Dtypes whose tensors torch saves by `_rebuild_qtensor`, with a scale.
QUANTIZED_DTYPES = frozenset({"quint8", "qint8", "qint32", "quint4x2", "quint2x4"})

#: Modules in which storage classes are, or were in older torch releases.
_STORAGE_MODULES = frozenset({"torch", "torch.storage", "torch.cuda"})

#: Longest string that is encoded: a short pickle can request a copy of one long string a million times.
_MAX_COPY_LENGTH = 64


def storage_type_of(value: Any) -> str:
    """Return the dtype of a storage class.

    Raises:
        NotUnderstoodError: the storage class is unknown.
    """
    is_known = isinstance(value, GlobalName) and value.module in _STORAGE_MODULES and value.name in STORAGE_DTYPES
    if not is_known:
        raise NotUnderstoodError(f"a storage of the type {display_name(value)}")
    return STORAGE_DTYPES[value.name]


def _tensor(arguments: tuple[Any, ...], dtype: str | None = None) -> Any:
    storage, offset, shape, stride, *rest = arguments
    requires_grad, *others = rest or [False]
    if any(others):  # hooks, or the flag of a view that conjugates or negates the saved elements
        return Unbuilt(GlobalName("torch._utils", "_rebuild_tensor_v2"), arguments)
    if not isinstance(storage, StorageEntry):
        raise NotUnderstoodError("a tensor without a storage")
    dtype = dtype or storage.dtype
    if dtype in QUANTIZED_DTYPES:  # torch would make a tensor that fails with an internal error at its first use
        raise BrokenFileError("damaged checkpoint (a quantized tensor without its scale)")
    if not (type(shape) is tuple and type(stride) is tuple and len(shape) == len(stride) <= MAX_DIMENSIONS):
        raise NotUnderstoodError("a tensor of unusual dimensions")
    if set(map(type, (offset, *shape, *stride))) != {int}:
        raise NotUnderstoodError("a tensor of unusual sizes")
    entry = TensorEntry("", dtype, shape, stride, storage, offset * ITEM_BYTES[dtype], requires_grad is True)
    if 0 in shape and entry.storage_offset > storage.length:  # torch loads such a tensor: it has no elements
        raise NotUnderstoodError("an empty tensor beyond its storage")
    return checked(entry)


def _tensor_of_dtype(arguments: tuple[Any, ...]) -> Any:
    dtype = arguments[6]
    if not isinstance(dtype, GlobalName) or dtype.module != "torch" or dtype.name not in ITEM_BYTES:
        raise NotUnderstoodError(f"a tensor of the dtype {display_name(dtype)}")
    return _tensor((*arguments[:6], *arguments[7:]), dtype.name)


def _parameter(arguments: tuple[Any, ...]) -> Any:
    data, requires_grad, *_ = arguments
    if not isinstance(data, TensorEntry):  # a quantised tensor
        return Unbuilt(GlobalName("torch.nn.parameter", "Parameter"), arguments)
    return replace(data, requires_grad=requires_grad is True, is_parameter=True)


def _parameter_with_more(arguments: tuple[Any, ...]) -> Any:
    """Build a parameter that has hooks or attributes."""
    found = _parameter(arguments)
    is_plain = not any(arguments[2:])
    return replace(found, is_plain=is_plain) if isinstance(found, TensorEntry) else found


def _subclass(arguments: tuple[Any, ...]) -> Any:
    """Build a tensor of a subclass, with the data of the plain tensor inside."""
    function, kind, inner, _ = arguments
    builder = BUILDERS.get(function) if isinstance(function, GlobalName) else None
    if builder is _subclass or (builder is not None and type(inner) is not tuple):  # torch would call it unchecked
        raise BrokenFileError(f"damaged checkpoint (a tensor of a subclass that is made by {function})")
    if builder is None:
        return Unbuilt(kind if isinstance(kind, GlobalName) else None, arguments)
    found = builder(inner)
    return replace(found, is_plain=False) if isinstance(found, TensorEntry) else found


def _ordered_dict(arguments: tuple[Any, ...]) -> Any:
    """Build an OrderedDict from a list of pairs, as Python 2 pickled it."""
    if arguments and type(arguments[0]) is not list:
        return Unbuilt(GlobalName("collections", "OrderedDict"), arguments)
    pairs = arguments[0] if arguments else []
    found: OrderedDict[Any, Any] = OrderedDict()
    for key, value in pairs:
        found[checked_key(key, found)] = value
    return found


def _counter(arguments: tuple[Any, ...]) -> Any:
    if not arguments or type(arguments[0]) is not dict or len(arguments) > 1:
        return Unbuilt(GlobalName("collections", "Counter"), arguments)
    found: Counter[Any] = Counter()
    dict.update(found, arguments[0])
    return found


def _default_dict(arguments: tuple[Any, ...]) -> Any:
    factory = _FACTORIES.get(arguments[0]) if arguments and isinstance(arguments[0], GlobalName) else None
    if len(arguments) > 1 or (arguments and factory is None):
        return Unbuilt(GlobalName("collections", "defaultdict"), arguments)
    return defaultdict(factory)


#: Usual factories of defaultdicts, under both names of the module: Python 2's, which torch.save writes, and Python 3's.
_FACTORIES: Mapping[GlobalName, Callable[[], Any]] = MappingProxyType(
    {
        GlobalName(module, kind.__name__): kind
        for module in ("__builtin__", "builtins")
        for kind in (list, dict, set, tuple, int, float, str, bool)
    }
    | {GlobalName("collections", "OrderedDict"): OrderedDict}
)


def _encoded(arguments: tuple[Any, ...]) -> Any:
    """Build bytes from a string in latin1, as pickle protocol 2 writes them."""
    text, encoding = arguments
    if type(text) is not str or encoding not in ("latin1", "utf-8") or len(text) > _MAX_COPY_LENGTH:
        return Unbuilt(GlobalName("_codecs", "encode"), arguments)
    return text.encode(encoding, errors="replace")


def _byte_array(arguments: tuple[Any, ...]) -> Any:
    if any(type(argument) is int for argument in arguments[:1]):  # no writer does so: a few bytes request gigabytes
        raise BrokenFileError("damaged checkpoint (a bytearray with a size, but no content)")
    return Unbuilt(GlobalName("builtins", "bytearray"), arguments)


def _without_content(function: GlobalName) -> Builder:
    """Return a builder that refuses a tensor or storage if the pickle gives only a size, as numbers or as a tensor.

    torch writes no such calls, but weights_only allows them. The result would hold old contents of this process's
    memory. Lists in a list are refused, too: a few kilobytes can hold one list a thousand times on every level.
    """

    def build(arguments: tuple[Any, ...]) -> Any:
        if any(isinstance(argument, (int, tuple, TensorEntry)) for argument in arguments[:1]):
            raise BrokenFileError(f"damaged checkpoint (a {function} with a size, but no content)")
        numbers = arguments[0] if arguments and type(arguments[0]) is list else []
        if not all(isinstance(number, (int, float)) for number in numbers):
            raise BrokenFileError(f"damaged checkpoint (a {function} of a list that holds more than numbers)")
        return Unbuilt(function, arguments)

    return build


def _no_bytes(arguments: tuple[Any, ...]) -> Any:
    return Unbuilt(GlobalName("builtins", "bytes"), arguments) if arguments else b""


def _new_ordered_dict(arguments: tuple[Any, ...]) -> Any:
    return Unbuilt(GlobalName("collections", "OrderedDict"), arguments) if arguments else OrderedDict()


def _plain_parameter(arguments: tuple[Any, ...]) -> Any:
    has_hooks = any(arguments[2:])
    return Unbuilt(GlobalName("torch._utils", "_rebuild_parameter"), arguments) if has_hooks else _parameter(arguments)


#: Builders by the function that they replace. Their results are exactly those of torch.load.
EXACT_BUILDERS: Mapping[GlobalName, Builder] = MappingProxyType(
    {
        GlobalName("torch._utils", "_rebuild_tensor_v2"): _tensor,
        GlobalName("torch._utils", "_rebuild_tensor_v3"): _tensor_of_dtype,
        GlobalName("torch._utils", "_rebuild_parameter"): _plain_parameter,
        GlobalName("collections", "OrderedDict"): _new_ordered_dict,
    }
)

_SUBCLASS = GlobalName("torch._tensor", "_rebuild_from_type_v2")

_TENSOR_KINDS = ("", *(name.removesuffix("Storage") for name in STORAGE_DTYPES if name != "UntypedStorage"))
_CONSTRUCTORS = (
    *(GlobalName(module, f"{kind}Tensor") for module in ("torch", "torch.cuda") for kind in _TENSOR_KINDS),
    *(GlobalName(module, name) for module in sorted(_STORAGE_MODULES) for name in (*STORAGE_DTYPES, "TypedStorage")),
)

#: More builders. Tensors of other classes become entries with ``is_plain=False``.
BUILDERS: Mapping[GlobalName, Builder] = MappingProxyType(
    {
        **EXACT_BUILDERS,
        **{name: _without_content(name) for name in _CONSTRUCTORS},
        GlobalName("torch._utils", "_rebuild_tensor"): _tensor,
        GlobalName("torch._utils", "_rebuild_parameter"): _parameter_with_more,
        GlobalName("torch._utils", "_rebuild_parameter_with_state"): _parameter_with_more,
        _SUBCLASS: _subclass,
        GlobalName("collections", "OrderedDict"): _ordered_dict,
        GlobalName("collections", "defaultdict"): _default_dict,
        GlobalName("collections", "Counter"): _counter,
        GlobalName("_codecs", "encode"): _encoded,
        GlobalName("__builtin__", "bytes"): _no_bytes,
        GlobalName("__builtin__", "bytearray"): _byte_array,
        GlobalName("builtins", "bytearray"): _byte_array,
    }
)
