"""Stand-ins for tensors that are not read yet; load_state_dict says where they belong.

A `LazyTensor` stands in a state dict where a tensor would be. nn.Module.load_state_dict compares its shape, and copies
it into the parameter; `NotedCopies` only notes that copy, as an `Assignment`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import methodcaller
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map_only

from rankload._load.module.regions import Region
from rankload.adapt import to_dtype

if TYPE_CHECKING:
    from rankload._load.module.file_tensor import FileTensor


@dataclass(frozen=True, slots=True, eq=False)
class Assignment:
    """One step of a load.

    Attributes:
        target: a module's parameter or buffer.
        saved: what it is to hold.
        is_replaced: the saved tensor takes its place, as with ``load_state_dict(assign=True)``.
    """

    target: torch.Tensor
    saved: LazyTensor
    is_replaced: bool = False


class LazyTensor:
    """Stands for a tensor of a checkpoint, for torch's own code, which copies it.

    Whatever else is done with it (torch's hooks that convert old checkpoints compute) is done with the tensor itself,
    which is mapped then; if it is changed in place, that is what the module gets.

    Not an ABC, which are slow to tell what is an instance: that is asked of everything that a module holds.

    Attributes:
        shape: sizes.
        dtype: as saved.
        is_meta: True, so that load_state_dict does not warn of meta parameters: they are taken care of later.
        is_plain: False for a tensor that is of another class, or has attributes, in the file.
    """

    is_meta = True
    is_plain = True

    def __init__(self, shape: torch.Size, dtype: torch.dtype, assignments: list[Assignment]) -> None:
        self.shape, self.dtype, self._assignments = shape, dtype, assignments
        self._made: torch.Tensor | None = None

    @property
    def in_file(self) -> FileTensor | None:
        """Return the tensor in a file that its elements come from; None for one in memory."""
        return None

    @property
    def position(self) -> tuple[str, int]:
        """Return where it is: file and byte; those in memory come first."""
        return "", 0

    @property
    def is_here(self) -> bool:
        """Whether this process can read it; it may be on its way from another rank."""
        return True

    def view(self) -> torch.Tensor:
        """Return all of it on the CPU: a view of the mapped file where that is possible. Not to be written to.

        Raises:
            LoadError: it is not here.
        """
        raise NotImplementedError

    def tensor(self) -> torch.Tensor:
        """Return it for whoever may do anything with it: from now on this is what it holds, and no longer the file's.

        Raises:
            LoadError: it is not here.
        """
        if self._made is None:
            self._made = self.view()
        return self._made

    def exact(self) -> torch.Tensor:
        """Return what torch.load returns for it, always the same object; parameters are parameters.

        Raises:
            LoadError: it is not here.
        """
        raise NotImplementedError

    def reader(self, destination: torch.Tensor, region: Region) -> Callable[[], int]:
        """Return what fills a tensor, of any device, with one part, and returns the bytes that were read for it.

        How it is to be done is decided now, and not between two reads, which drive all else out of the processor's
        caches.
        """

        def read() -> int:
            if region.element_count == 0:
                return 0
            part = self.view()
            if region.shape != tuple(self.shape):  # sparse tensors, which are never cut, cannot be narrowed
                for dimension, (start, size) in enumerate(zip(region.offset, region.shape, strict=True)):
                    part = part.narrow(dimension, start, size)
            destination.copy_(part)
            return region.element_count * self.dtype.itemsize

        return read

    # What can be told without reading it

    @property
    def ndim(self) -> int:
        """As a tensor's."""
        return len(self.shape)

    @property
    def device(self) -> torch.device:
        """As a tensor's."""
        return torch.device("cpu")

    def dim(self) -> int:
        """As a tensor's."""
        return len(self.shape)

    def size(self, dim: int | None = None) -> torch.Size | int:
        """As a tensor's."""
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        """As a tensor's."""
        return self.shape.numel()

    def is_floating_point(self) -> bool:
        """As a tensor's."""
        return self.dtype.is_floating_point

    def to(self, *arguments: Any, **keywords: Any) -> Any:
        """As a tensor's; to another dtype it is converted when it is read."""
        if len(arguments) == 1 and isinstance(arguments[0], torch.dtype) and not keywords:
            return ConvertedTensor(self, arguments[0])
        return self.tensor().to(*arguments, **keywords)

    def __deepcopy__(self, memo: Any) -> LazyTensor:
        return self  # a copy would note where it goes in a list that nobody reads

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
        """Call a function with the tensors themselves."""
        arguments, keywords = tree_map_only(LazyTensor, methodcaller("tensor"), (arguments, keywords or {}))
        return function(*arguments, **keywords)


def _operator(name: str) -> Callable[..., Any]:
    return lambda self, *others: getattr(self.tensor(), name)(*others)


# Python looks for operators in the class, and finds no `__getattr__` there.
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
    """One that an adapter, or torch.load, has made already."""

    def __init__(self, tensor: torch.Tensor, assignments: list[Assignment]) -> None:
        super().__init__(tensor.shape, tensor.dtype, assignments)
        self._tensor, self._exact = tensor.detach(), tensor

    @property
    def device(self) -> torch.device:
        """See `LazyTensor.device`."""
        return self._tensor.device

    def view(self) -> torch.Tensor:
        """See `LazyTensor.view`."""
        return self._tensor

    def exact(self) -> torch.Tensor:
        """See `LazyTensor.exact`."""
        return self._exact


class ConvertedTensor(LazyTensor):
    """One that has another dtype than it was saved with."""

    def __init__(self, saved: LazyTensor, dtype: torch.dtype) -> None:
        super().__init__(saved.shape, dtype, saved._assignments)
        self._saved = saved
        self.is_plain = saved.is_plain

    @property
    def original(self) -> LazyTensor:
        """The one as it was saved."""
        return self._saved.original if isinstance(self._saved, ConvertedTensor) else self._saved

    def exact(self) -> torch.Tensor:
        """See `LazyTensor.exact`."""
        converted: dict[str, torch.Tensor] = to_dtype(self.dtype)({"": self._saved.exact()})
        return converted[""]

    @property
    def in_file(self) -> FileTensor | None:
        """See `LazyTensor.in_file`."""
        return self._saved.in_file if self._made is None else None

    @property
    def position(self) -> tuple[str, int]:
        """See `LazyTensor.position`."""
        return self._saved.position if self._made is None else super().position

    @property
    def is_here(self) -> bool:
        """See `LazyTensor.is_here`."""
        return self._made is not None or self._saved.is_here

    def view(self) -> torch.Tensor:
        """See `LazyTensor.view`; a copy."""
        return self._saved.view().to(self.dtype) if self._made is None else self._made

    def reader(self, destination: torch.Tensor, region: Region) -> Callable[[], int]:
        """See `LazyTensor.reader`; without another copy, where the destination has the new dtype."""
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
