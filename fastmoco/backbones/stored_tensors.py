"""Tensors and NumPy arrays as a pickle describes them: which values they are made of, with which shape.

The description is checked for types here, and for sizes where the values are read (`torch_files`).
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch

from fastmoco.backbones.pickles import Named, Object, Persistent

_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}  # fmt: skip
_ARRAYS = {
    "f8": torch.float64, "f4": torch.float32, "f2": torch.float16,
    "i8": torch.int64, "i4": torch.int32, "i2": torch.int16, "i1": torch.int8, "u1": torch.uint8, "b1": torch.bool,
}  # fmt: skip
_RECONSTRUCT = {"numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"}
_IN_ARGUMENT = {"_rebuild_parameter", "_rebuild_parameter_with_state"}  # the first argument is the tensor
_IN_ARGUMENT |= {"_rebuild_device_tensor_from_cpu_tensor", "_rebuild_device_tensor_from_numpy"}  # of torch_xla


class Storage(NamedTuple):
    """Values outside of a pickle: their key there, type and number, and where in them the values used begin."""

    key: str
    dtype: torch.dtype
    numel: int
    start: int = 0


class StoredTensor(NamedTuple):
    """A strided tensor whose element [i, j] is values[offset + i·stride[0] + j·stride[1]].

    values  the key of the storage that has them, or their bytes
    """

    values: str | bytes
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def place(self) -> Hashable:
        """The same for two names of one tensor."""
        return (id(self.values) if isinstance(self.values, bytes) else self.values, *self[1:])

    @property
    def nbytes(self) -> int:
        """Of the tensor itself; an expanded one has more than its storage."""
        numel = self.dtype.itemsize
        for size in self.shape:
            numel *= size
        return numel

    @property
    def end(self) -> int:
        """Number of bytes of its values that it needs to have."""
        if 0 in self.shape:
            return 0
        last = self.offset + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return (last + 1) * self.dtype.itemsize


def storage(reference: Any) -> Storage | None:
    """What a persistent reference of torch.save says; None for anything else."""
    identifier = reference.id if isinstance(reference, Persistent) else None
    if not (isinstance(identifier, tuple) and len(identifier) in (5, 6) and identifier[0] in ("storage", b"storage")):
        return None
    _, kind, key, _, numel, *views = identifier
    dtype = _STORAGES.get(kind.path.rpartition(".")[2]) if isinstance(kind, Named) else None
    if dtype is None or type(key) not in (str, int) or type(numel) is not int:
        return None
    view = views[0] if views else None  # before torch 0.4: (key, start, number of values)
    start = view[1] if isinstance(view, tuple) and len(view) == 3 and type(view[1]) is int else 0
    return Storage(str(key), dtype, numel, start)


def stored_tensor(value: Any) -> StoredTensor | None:
    """The tensor that an object of a pickle would have become; None for everything else."""
    for _ in range(4):  # a parameter of a subclass of a tensor
        if not (isinstance(value, Object) and isinstance(value.of, Named) and isinstance(value.args, tuple)):
            return None
        module, _, function = value.of.path.rpartition(".")
        if module == "torch._utils" and function in _IN_ARGUMENT and value.args:
            value = value.args[0]
        elif value.of.path == "torch._tensor._rebuild_from_type_v2" and len(value.args) == 4:
            value = Object(value.args[0], value.args[2])
        elif module == "torch._utils" and function in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3"):
            return _tensor(value.args, typed=function.endswith("3"))
        else:
            return _array(value) if value.of.path in _RECONSTRUCT else None
    return None


def _tensor(args: tuple[Any, ...], *, typed: bool) -> StoredTensor | None:
    """Of the arguments (storage, offset, shape, stride, ...), and for `typed` the dtype as the seventh."""
    source = storage(args[0]) if len(args) >= (7 if typed else 4) else None
    if source is None:
        return None
    offset, shape, stride = args[1], _sizes(args[2]), _sizes(args[3])
    dtype = source.dtype
    if typed:
        dtype = _DTYPES.get(args[6].path) if isinstance(args[6], Named) else None
    if dtype is None or shape is None or stride is None or len(shape) != len(stride):
        return None
    if type(offset) is not int or min(offset, source.start) < 0:
        return None
    return StoredTensor(source.key, dtype, offset + source.start, shape, stride)


def _sizes(value: Any) -> tuple[int, ...] | None:
    if isinstance(value, Object) and len(value.args) == 1:  # torch.Size
        value = value.args[0]
    if not isinstance(value, tuple | list) or not all(type(size) is int and size >= 0 for size in value):
        return None
    return tuple(value)


# ---- NumPy -----------------------------------------------------------------------------------------------------------


def _array(made: Object) -> StoredTensor | None:
    """Of `_reconstruct`, the state of which is (version, shape, dtype, Fortran order, bytes)."""
    if not (isinstance(made.state, tuple) and len(made.state) == 5):
        return None
    _, sizes, kind, fortran, content = made.state
    shape, dtype, values = _sizes(sizes), _array_dtype(kind), _bytes(content)
    if shape is None or dtype is None or values is None:
        return None
    stride, step = [], 1
    for size in shape if fortran else reversed(shape):
        stride.append(step)
        step *= size
    return StoredTensor(values, dtype, 0, shape, tuple(stride if fortran else reversed(stride)))


def _array_dtype(kind: Any) -> torch.dtype | None:
    """Of numpy.dtype("f4", False, True) with the state (3, "<", ...)."""
    if not (isinstance(kind, Object) and isinstance(kind.args, tuple) and kind.args):
        return None
    big_endian = isinstance(kind.state, tuple) and len(kind.state) > 1 and kind.state[1] in (">", b">")
    name = kind.args[0]
    return None if big_endian or not isinstance(name, str) else _ARRAYS.get(name)


def _bytes(content: Any) -> bytes | None:
    """Bytes, which protocol 2 stores as text and as a call of _codecs.encode, and Python 2 as text."""
    if isinstance(content, Object) and content.args and isinstance(content.args, tuple):
        content = content.args[0]
    if isinstance(content, str):
        try:
            return content.encode("latin-1")
        except UnicodeEncodeError:
            return None
    return bytes(content) if isinstance(content, bytes | bytearray) else None
