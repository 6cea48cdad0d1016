"""Lazy tensors: stand-ins for tensors that have not been read yet.

A `LazyTensor` takes the place of a tensor in a state dict. nn.Module.load_state_dict compares shapes, and copies the
lazy tensor into the parameter. `NotedCopies` records that copy as an `Assignment` instead of making it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import methodcaller
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map_only
from typing_extensions import override

from rankload._load.module.regions import Region
from rankload.adapt import to_dtype

if TYPE_CHECKING:
    from rankload._load.module.file_tensor import FileTensor


@dataclass(frozen=True, slots=True, eq=False)
class Assignment:
    """One step of a load.

    Attributes:
        target: parameter or buffer of a module.
        saved: tensor to load into the target.
        is_replaced: whether the saved tensor replaces the target, as with ``load_state_dict(assign=True)``.
    """

    target: torch.Tensor
    saved: LazyTensor
    is_replaced: bool = False


class LazyTensor:
    """A stand-in for a tensor of a checkpoint, which torch's own code copies.

    Any other operation maps the tensor and works on the tensor itself: torch's hooks that convert old checkpoints
    compute. If an operation changes the tensor in place, the module gets the changed tensor.

    Not an ABC: isinstance() is slow for ABCs, and is called for every value of a module.

    Attributes:
        shape: sizes.
        dtype: saved dtype.
        is_meta: True, so that load_state_dict does not warn about meta parameters; they are replaced later.
        is_plain: False if the saved tensor has another class, or attributes.
    """

    is_meta = True
    is_plain = True

    def __init__(self, shape: torch.Size, dtype: torch.dtype, assignments: list[Assignment]) -> None:
        self.shape, self.dtype, self._assignments = shape, dtype, assignments
        self._made: torch.Tensor | None = None

    @property
    def in_file(self) -> FileTensor | None:
        """The tensor in a file that the elements come from; None for a tensor in memory."""
        return None

    @property
    def position(self) -> tuple[str, int]:
        """File name and offset in bytes, to sort by; tensors in memory sort first."""
        return "", 0

    @property
    def is_here(self) -> bool:
        """Whether this process can read the elements; they may still be on their way from another rank."""
        return True

    def view(self) -> torch.Tensor:
        """Return the tensor on the CPU, as a view of the mapped file if possible. Do not write to the result.

        Raises:
            LoadError: the elements are not here.
        """
        raise NotImplementedError

    def tensor(self) -> torch.Tensor:
        """Return the tensor for any use, even writes. From now on it replaces the elements of the file.

        Raises:
            LoadError: the elements are not here.
        """
        if self._made is None:
            self._made = self.view()
        return self._made

    def exact(self) -> torch.Tensor:
        """Return what torch.load returns for the tensor, always as the same object. Parameters stay parameters.

        Raises:
            LoadError: the elements are not here.
        """
        raise NotImplementedError

    def reader(self, destination: torch.Tensor, region: Region) -> Callable[[], int]:
        """Return a function that fills a tensor on any device with a region, and returns the bytes that it read.

        Pick the copy strategy here: deciding between reads evicts it from the CPU cache.
        """

        def read() -> int:
            if region.element_count == 0:
                return 0
            part = self.view()
            if region.shape != tuple(self.shape):  # sparse tensors cannot be narrowed, but are always loaded whole
                for dimension, (start, size) in enumerate(zip(region.offset, region.shape, strict=True)):
                    part = part.narrow(dimension, start, size)
            destination.copy_(part)
            return region.element_count * self.dtype.itemsize

        return read

    # Methods of torch.Tensor that need no elements

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def device(self) -> torch.device:
        """Device of the tensor."""
        return torch.device("cpu")

    def dim(self) -> int:
        """Return the number of dimensions."""
        return len(self.shape)

    def size(self, dim: int | None = None) -> torch.Size | int:
        """Return the shape, or the size of one dimension."""
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        """Return the number of elements."""
        return self.shape.numel()

    def is_floating_point(self) -> bool:
        """Return whether the dtype is a floating-point one."""
        return self.dtype.is_floating_point

    def to(self, *arguments: Any, **keywords: Any) -> Any:
        """Convert like ``torch.Tensor.to``. A conversion to another dtype alone stays lazy."""
        if len(arguments) == 1 and isinstance(arguments[0], torch.dtype) and not keywords:
            return ConvertedTensor(self, arguments[0])
        return self.tensor().to(*arguments, **keywords)

    def __deepcopy__(self, memo: Any) -> LazyTensor:
        return self  # a copy would add its assignments to a copied list, which nobody reads

    def __getitem__(self, index: Any) -> LazyTensor:
        return MemoryTensor(self.tensor()[index], self._assignments)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        """Call a function with real tensors in the place of lazy ones."""
        arguments, keywords = tree_map_only(LazyTensor, methodcaller("tensor"), (arguments, keywords or {}))
        return function(*arguments, **keywords)


def _operator(name: str) -> Callable[..., Any]:
    return lambda self, *others: getattr(self.tensor(), name)(*others)


# Python looks operators up in the class, where `__getattr__` does not apply.
for _name in (
    *(f"__{name}__" for name in ("neg", "abs", "invert", "eq", "ne", "lt", "le", "gt", "ge", "mod")),
    *(
        f"__{name}__"
        for name in ("len", "iter", "bool", "int", "float", "index", "contains", "setitem", "array", "format")
    ),
    *(
        f"__{side}{name}__"
        for side in ("", "r")
        for name in ("add", "sub", "mul", "truediv", "floordiv", "pow", "matmul")
    ),
    *(f"__{side}{name}__" for side in ("", "r") for name in ("and", "or", "xor")),
):
    setattr(LazyTensor, _name, _operator(_name))


class MemoryTensor(LazyTensor):
    """A lazy tensor in memory, made by an adapter or torch.load."""

    def __init__(self, tensor: torch.Tensor, assignments: list[Assignment]) -> None:
        super().__init__(tensor.shape, tensor.dtype, assignments)
        self._tensor, self._exact = tensor.detach(), tensor

    @property
    @override
    def device(self) -> torch.device:
        return self._tensor.device

    @override
    def view(self) -> torch.Tensor:
        return self._tensor

    @override
    def exact(self) -> torch.Tensor:
        return self._exact


class ConvertedTensor(LazyTensor):
    """A lazy tensor with another dtype than the saved one; it is converted when it is read."""

    def __init__(self, saved: LazyTensor, dtype: torch.dtype) -> None:
        super().__init__(saved.shape, dtype, saved._assignments)
        self._saved = saved
        self.is_plain = saved.is_plain

    @property
    def original(self) -> LazyTensor:
        """The lazy tensor with the saved dtype."""
        return self._saved.original if isinstance(self._saved, ConvertedTensor) else self._saved

    @override
    def exact(self) -> torch.Tensor:
        converted: dict[str, torch.Tensor] = to_dtype(self.dtype)({"": self._saved.exact()})
        return converted[""]

    @property
    @override
    def in_file(self) -> FileTensor | None:
        return self._saved.in_file if self._made is None else None

    @property
    @override
    def position(self) -> tuple[str, int]:
        return self._saved.position if self._made is None else super().position

    @property
    @override
    def is_here(self) -> bool:
        return self._made is not None or self._saved.is_here

    @override
    def view(self) -> torch.Tensor:
        """Return the converted tensor, as a copy."""
        return self._saved.view().to(self.dtype) if self._made is None else self._made

    @override
    def reader(self, destination: torch.Tensor, region: Region) -> Callable[[], int]:
        """Return the function that fills a tensor; it converts on the way if the destination has the new dtype."""
        if self._made is not None:
            return super().reader(destination, region)
        if destination.dtype == self.dtype:
            return self._saved.reader(destination, region)

        def read() -> int:
            part = torch.empty(region.shape, dtype=self.dtype, device="cpu")
            bytes_read = self._saved.reader(part, region)()
            destination.copy_(part)
            return bytes_read

        return read
