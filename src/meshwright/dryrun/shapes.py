"""Fake tensors for millions of operations: torch's FakeTensorMode, with a short way for what it has answered before.

In: operations on fake tensors, and watchers that are told of them. Out: the fake tensors that FakeTensorMode gives. The
first call of an operation on arguments of some shapes, strides and types is torch's own; its outputs are kept as a
recipe (fresh, a view of an argument, or an argument itself) by which later ones are made. That is what FakeTensorMode's
own cache does, at a tenth of the time: no dataclasses, no stack of modes, no answer in Python where a tuple will do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor

from meshwright.dryrun.watch import Watcher, is_collective, tell_made

DEVICE_OF = torch.ops.prim.device.default
NUMBER_OF = torch.ops.aten._local_scalar_dense.default
INDEX = torch.ops.aten.index.Tensor
LIFTS = (torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default)
UNKEPT_TAGS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view)
MASKS = (torch.bool, torch.uint8)
"""Indices whose values decide how long the result is."""
PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
"""Arguments that are their own key."""

FRESH, VIEW, ARGUMENT = range(3)
Recipe = tuple[Any, ...]
"""(FRESH, device, dtype, shape, stride), (VIEW, device, dtype, shape, stride, offset, which argument) or (ARGUMENT,
which argument); arguments are the tensors among them, in order."""

Kept = tuple[type, tuple[Recipe, ...]]
"""(tuple, list, or Tensor for a single one; how to make each)"""


class _NoKeyError(Exception):
    """These arguments are not remembered."""


class ShapeMode(FakeTensorMode):
    """FakeTensorMode on a CPU. Numbers that the program asks of a tensor (loss, token count, norm) are 1: fake tensors
    have none, and no collective of a step depends on them."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self._watchers: tuple[Watcher, ...] = ()
        self._kept: dict[Any, Kept | None] = {}
        self._keeps: dict[Any, bool] = {}
        self._inside = 0  # of operations that torch makes of others: those are none of the program's
        self._attributes: dict[torch.device, dict[str, Any]] = {}

    @contextmanager
    def watched_by(self, watchers: Sequence[Watcher]) -> Iterator[None]:
        before, self._watchers = self._watchers, tuple(watchers)
        try:
            yield
        finally:
            self._watchers = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE_OF and type(args[0]) is FakeTensor:
            return args[0].fake_device
        if func is NUMBER_OF and type(args[0]) is FakeTensor:
            return 1.0 if args[0].dtype.is_floating_point else 1
        if func.namespace == "profiler":  # marks of FSDP2 in a timeline, without tensors
            return func(*args, **(kwargs or {}))
        if self._inside:
            return self._answer(func, types, args, kwargs or {})
        watchers = self._watchers
        if watchers and is_collective(func):
            for watcher in watchers:
                watcher.issued(func, args)
        if any(t is not FakeTensor and issubclass(t, DTensor) for t in types):
            result = self._of_dtensors(func, args, kwargs or {})
        else:
            result = self._answer(func, types, args, kwargs or {})
        if watchers:
            tell_made(watchers, result)
        return result

    def _of_dtensors(self, func: Any, args: Any, kwargs: Any) -> Any:
        """DTensors make of it operations on their local tensors, and some to find out shapes."""
        self._inside += 1
        try:
            with self:
                return func(*args, **kwargs)
        finally:
            self._inside -= 1

    def _answer(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        keeps = self._keeps.get(func)
        if keeps is None:
            keeps = self._keeps[func] = _is_kept(func)
        if not keeps:
            return self._torch(func, types, args, kwargs)
        tensors: list[FakeTensor] = []
        try:
            key = (func, _key(args, tensors), *[(k, _key(v, tensors)) for k, v in kwargs.items()])
            if func is INDEX and any(t.dtype in MASKS for t in tensors):
                raise _NoKeyError
        except _NoKeyError:
            return self._torch(func, types, args, kwargs)
        if key in self._kept:
            kept = self._kept[key]
            if kept is not None and not any(t.untyped_storage().nbytes() == 0 for t in tensors):
                return self._again(kept, tensors)
            return self._torch(func, types, args, kwargs)
        result = self._torch(func, types, args, kwargs)
        if result is not NotImplemented:
            self._kept[key] = self._recipes(result, tensors)
        return result

    def _again(self, kept: Kept, tensors: list[FakeTensor]) -> Any:
        kind, recipes = kept
        if kind is Tensor:
            return self._made(recipes[0], tensors)
        return kind([self._made(recipe, tensors) for recipe in recipes])

    def _torch(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        self._inside += 1
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self._inside -= 1

    def _recipes(self, result: Any, tensors: list[FakeTensor]) -> Kept | None:
        """How to make this result again; None where that is not known."""
        single = isinstance(result, Tensor)
        if not single and type(result) not in (tuple, list):
            return None
        outputs = (result,) if single else tuple(result)
        storages = {t.untyped_storage()._cdata: i for i, t in reversed(list(enumerate(tensors)))}
        fresh: list[int] = []
        recipes: list[Recipe] = []
        for output in outputs:
            if type(output) is not FakeTensor or output.constant is not None:
                return None
            recipe = _recipe(output, tensors, storages)
            if recipe is None:
                return None
            if recipe[0] != ARGUMENT:  # what torch's constructor sets, equal for all of one mode and device
                self._attributes.setdefault(output.fake_device, dict(output.__dict__))
            if recipe[0] == FRESH:
                fresh.append(output.untyped_storage()._cdata)
            recipes.append(recipe)
        if len(set(fresh)) < len(fresh) or not recipes:  # outputs that share a storage
            return None
        return (Tensor if single else type(result)), tuple(recipes)

    def _made(self, recipe: Recipe, tensors: list[FakeTensor]) -> FakeTensor:
        if recipe[0] == ARGUMENT:
            return tensors[recipe[1]]
        device, dtype, shape, stride = recipe[1:5]
        if recipe[0] == FRESH:
            meta = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        else:
            meta = torch.empty((0,), dtype=dtype, device="meta")
            meta.set_(tensors[recipe[6]].untyped_storage(), recipe[5], shape, stride)
        fake = Tensor._make_subclass(FakeTensor, meta, False, dispatch_device=True, device_for_backend_keys=device)
        torch._C._set_throw_on_mutable_data_ptr(fake)
        vars(fake).update(self._attributes[device])
        return fake


def _recipe(output: FakeTensor, tensors: list[FakeTensor], storages: dict[int, int]) -> Recipe | None:
    """How one output comes from the arguments. `storages`: which argument has a storage first."""
    for index, tensor in enumerate(tensors):
        if tensor is output:
            return ARGUMENT, index
    storage = output.untyped_storage()
    made = output.fake_device, output.dtype, tuple(output.shape), output.stride()
    if output.is_conj() or output.is_neg():
        return None
    if storage._cdata in storages:
        return VIEW, *made, output.storage_offset(), storages[storage._cdata]
    same = torch.empty_strided(made[2], made[3], dtype=made[1], device="meta")
    if output.storage_offset() or same.untyped_storage().nbytes() != storage.nbytes():
        return None
    return FRESH, *made


def _is_kept(func: Any) -> bool:
    """Whether outputs depend on the arguments' shapes alone, and arguments keep theirs."""
    if not isinstance(func, torch._ops.OpOverload) or func.namespace != "aten" or func in LIFTS:
        return False
    if func.name().startswith(("aten::set_", "aten::resize")):
        return False
    return func is INDEX or not any(tag in func.tags for tag in UNKEPT_TAGS)


def _key(value: Any, tensors: list[FakeTensor]) -> Any:
    kind = type(value)
    if kind is FakeTensor:
        if value.constant is not None:
            raise _NoKeyError
        tensors.append(value)
        return value.shape, value.stride(), value.storage_offset(), value.dtype, value.fake_device
    if kind is tuple or kind is list or kind is torch.Size:
        return kind, *[_key(part, tensors) for part in value]
    if kind in PLAIN:
        return kind, value
    raise _NoKeyError
