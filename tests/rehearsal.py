"""A rehearsal of CUDA on a machine without a GPU, and a count of the host's synchronizations.

`with rehearsal():` makes `device="cuda"` usable: its tensors say that they are on cuda:0, hold their values in the CPU's
memory, and refuse to meet CPU tensors where CUDA does. What a program asks `torch.cuda` is answered as by one GPU of 80 GiB. So
device mistakes raise CUDA's errors, and results can be compared with the CPU's, number by number.

How it works:

* `CudaTensor` is a wrapper subclass. Every operator on one arrives in `run`, which checks the arguments' devices, computes
  with the values and wraps the result. Two modes catch what has no CudaTensor among its arguments yet: factories (`Factories`)
  and conversions that never reach the dispatcher (`Conversions`). Modes are thread-local: threads that start within the
  rehearsal enter them too.
* In C++ a CudaTensor is a CPU tensor, because the CPU build of torch cannot run autograd or autocast for CUDA. So operators
  that C++ calls on its own name the CPU for CUDA; `is_inner` tells them from those of Python. Autocast for "cuda" is the CPU's.
* There is one stream of random numbers for both devices, and a CUDA generator draws a CPU generator's numbers. So the same seed
  gives the same numbers as on the CPU, unlike on a GPU. Generators say on which device they are and are refused by the other.
* CUDA graphs are recorded: a capture notes the operators on CudaTensors, and `replay` computes them again in the same memory,
  with the Python values of the capture. Synchronizing while capturing is an error, as on CUDA.
* Triton and FlashAttention cannot be rehearsed: what asks whether they run gets a no.

Not rehearsed: CUDA's kernels, their rounding and order of additions; fused and foreach optimizers; streams (all work is done
when a call returns, so that a missing wait does not show); memory; several GPUs; gradients of CPU tensors without dimensions
that meet CUDA's; accelerate, bitsandbytes and vLLM.
"""

import contextlib
import copy
import os
import sys
import threading
import unittest.mock
import weakref
from collections import Counter
from pathlib import Path

import safetensors.torch
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from agents.policy import quantization
from agents.sampling import sampler, shared_prefix
from llm_env.lm import flash, scoring, sharing

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
ROOT = Path(__file__).parents[1]
PACKAGES = tuple(f"{ROOT / name}{os.sep}" for name in ("llm_env", "agents"))
TORCH = (f"{Path(torch.__file__).parent}{os.sep}", f"{Path(contextlib.__file__).parent}{os.sep}contextlib", __file__)
GIB = 1 << 30

_here = threading.local()  # of a thread: `is_inner`, the graph that it captures, whether torch.save is under way

aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default}
INDEX_PUTS = {aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
INDEXED = {aten.index.Tensor, aten._unsafe_index.Tensor, *INDEX_PUTS}
# Besides pointwise operators, these take a CPU tensor without dimensions among CUDA tensors.
SCALARS = {
    *INDEX_PUTS,
    aten.fill_.Tensor,
    aten.masked_fill.Tensor,
    aten.masked_fill_.Tensor,
    aten.where.self,
    aten.index_fill.int_Tensor,
    aten.index_fill_.int_Tensor,
    aten.searchsorted.Scalar,
}
READS = {aten._local_scalar_dense.default: "item", aten.equal.default: "equal"}  # what has no tensor to return
WAITS = {
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten._unique.default: "unique",
    aten._unique2.default: "unique",
    aten.unique_dim.default: "unique",
    aten.unique_consecutive.default: "unique",
    aten.repeat_interleave.Tensor: "repeat_interleave",
    aten.bincount.default: "bincount",
    **READS,
}
NOT_NUMPY = (
    "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first."  # torch's
)


# --- synchronizations ----------------------------------------------------------------------------------------------------


class Syncs:
    """The synchronizations of the host with the device so far.

    Attributes:
        sites: number of synchronizations by (file:line, kind): the innermost frame in llm_env or agents, and the one of another
            library that it has called.
        uploads: the same for blocking copies to the device (`.to("cuda")`, `torch.tensor(..., device="cuda")`): PyTorch waits
            there until the stream has reached the copy.
    """

    def __init__(self):
        self.sites, self.uploads = Counter(), Counter()

    @property
    def count(self):
        """How often the host has waited for a value of the device."""
        return sum(self.sites.values())

    @property
    def num_uploads(self):
        """How often the host has waited for a copy to the device."""
        return sum(self.uploads.values())

    def __sub__(self, other):
        """The difference of two counts, site by site."""
        result = Syncs()
        for name in ("sites", "uploads"):
            mine, others = getattr(self, name), getattr(other, name)
            difference = {key: mine[key] - others[key] for key in mine.keys() | others.keys()}
            setattr(result, name, Counter({key: value for key, value in difference.items() if value}))
        return result

    def table(self, per=1):
        """The sites in lines "count, kind, file:line", the largest count first; `per` divides the counts."""
        both = [*self.sites.items(), *((site, n) for site, n in self.uploads.items())]
        rows = sorted(both, key=lambda row: (row[0][1] == "upload", -row[1], row[0]))
        return "\n".join(f"{n / per:8.2f}  {kind:18} {site}" for (site, kind), n in rows)


_counting: list[Syncs] = []


@contextlib.contextmanager
def counting_syncs():
    """Count the synchronizations of the block, within a rehearsal; of all threads."""
    syncs = Syncs()
    _counting.append(syncs)
    try:
        yield syncs
    finally:
        _counting.remove(syncs)


def call_site():
    """File and line of the innermost frame in the packages, and of the one in another library that it called, if any."""
    frame, outer = sys._getframe(2), None
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(PACKAGES):
            site = f"{Path(name).relative_to(ROOT)}:{frame.f_lineno}"
            return site if outer is None else f"{site} by {outer}"
        if outer is None and not name.startswith((*TORCH, "<")):
            outer = f"{Path(name).parent.name}/{Path(name).name}:{frame.f_lineno}"
        frame = frame.f_back
    return outer or "?"


_mistakes: list[str] = []


def mistake(message, error=RuntimeError):
    """An error of CUDA, noted also for whoever catches it."""
    _mistakes.append(message)
    return error(message)


def synchronize(kind, times=1):
    """Note that the host waits for the device. It cannot while a graph is captured."""
    if not times:
        return
    if capturing() is not None:
        raise mistake(f"CUDA error: operation not permitted when stream is capturing ({kind})")
    for syncs in _counting:
        counts = syncs.uploads if kind == "upload" else syncs.sites
        counts[call_site(), kind] += times


# --- tensors -------------------------------------------------------------------------------------------------------------


class CudaTensor(torch.Tensor):
    """A tensor that says it is on cuda:0, over a CPU tensor that holds its values.

    Attributes:
        inner: the CPU tensor, without gradient.
    """

    @staticmethod
    def __new__(cls, inner, requires_grad=False):
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        tensor = torch.Tensor._make_wrapper_subclass(cls, inner.size(), **layout, device=CPU, requires_grad=requires_grad)
        tensor.inner = inner
        return tensor

    def __init__(self, *args, **kwargs):
        pass

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):
        if not isinstance(value, CudaTensor) or value.shape != self.shape or value.dtype != self.dtype:
            raise mistake("incompatible tensor type: data on cuda:0 takes data of this shape and type on cuda:0 alone")
        self.inner = value.inner

    @property
    def grad(self):
        return torch.Tensor.grad.__get__(self)

    @grad.setter
    def grad(self, value):
        if value is not None and not isinstance(value, CudaTensor):
            raise mistake("assigned grad has data located on a different device")
        torch.Tensor.grad.__set__(self, value)

    def get_device(self):
        return 0

    def untyped_storage(self):
        return self.inner.untyped_storage()

    def data_ptr(self):
        return self.inner.data_ptr()

    def tolist(self):
        synchronize("tolist")
        return self.inner.tolist()

    def numpy(self, *args, **kwargs):
        raise mistake(NOT_NUMPY, TypeError)

    def __array__(self, *args, **kwargs):
        raise mistake(NOT_NUMPY, TypeError)

    def __repr__(self, **kwargs):
        gradient = f", grad_fn=<{self.grad_fn.name()}>" if self.grad_fn is not None else ", requires_grad=True"
        return f"{repr(self.inner)[:-1]}, device='cuda:0'{gradient if self.requires_grad else ''})"

    def __format__(self, spec):
        return self.item().__format__(spec) if self.ndim == 0 else object.__format__(self, spec)

    def __deepcopy__(self, memo):
        if id(self) in memo:
            return memo[id(self)]
        if not self.is_leaf:
            raise RuntimeError("Only Tensors created explicitly by the user (graph leaves) support the deepcopy protocol")
        result = memo[id(self)] = rebuild(self.inner.clone(), self.requires_grad, isinstance(self, nn.Parameter))
        if self.grad is not None:
            result.grad = copy.deepcopy(self.grad, memo)
        return result

    def __reduce_ex__(self, protocol):
        parameter = isinstance(self, nn.Parameter)
        if not getattr(_here, "saving", False):
            return rebuild, (self.inner, self.requires_grad, parameter)
        function, arguments = self.inner.__reduce_ex__(protocol)  # the storage comes first
        arguments[0]._fake_device = CUDA  # torch.save writes it for the device
        if not parameter:
            return function, (*arguments[:4], self.requires_grad, *arguments[5:])
        return torch._utils._rebuild_parameter, (CudaTensor(self.inner), self.requires_grad, arguments[5])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def rebuild(inner, requires_grad, parameter):
    """A tensor, or a parameter, on cuda:0 with the values of a CPU tensor."""
    tensor = CudaTensor(inner)
    return nn.Parameter(tensor, requires_grad) if parameter else tensor.requires_grad_(requires_grad)


def is_cuda(device):
    return isinstance(device, int) or torch.device(device).type == "cuda"


def unwrap(x):
    return x.inner if isinstance(x, CudaTensor) else x


def mapped(function, x):
    """A function of the entries of the lists and tuples that operators take and return, without pytree's pace."""
    if isinstance(x, (list, tuple)):
        return type(x)([mapped(function, entry) for entry in x])
    return function(x)


def tensors_in(*values):
    """The tensors among values and in their lists."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(*value)


def run(func, args, kwargs):
    """Compute an operator as CUDA would, given any CudaTensor or a device: checks, value, wrapping."""
    tensors = list(tensors_in(args, *kwargs.values()))
    wrapped = [tensor for tensor in tensors if isinstance(tensor, CudaTensor)]
    device = kwargs.get("device")
    # To C++, a CudaTensor's device is the CPU.
    on_cuda = bool(wrapped) if device is None else is_cuda(device) or bool(is_inner())
    if wrapped:
        check_devices(func, args, tensors)
    count_waits(func, args, kwargs, on_cuda)
    inner_args = [mapped(unwrap, value) for value in args]
    inner_kwargs = {name: mapped(unwrap, value) for name, value in kwargs.items()}
    if device is not None:
        inner_kwargs["device"] = CPU
    if inner_kwargs.get("pin_memory"):
        inner_kwargs["pin_memory"] = False
    with torch._C.DisableTorchFunction():
        result = func(*inner_args, **inner_kwargs)
    if func in READS or not (on_cuda or func is aten.copy_.default):
        return result
    if (graph := capturing()) is not None:
        graph.record(func, inner_args, inner_kwargs, result)
    return wrap_like(func, result, wrapped, {id(tensor) for tensor in tensors})


def wrap_like(func, result, wrapped, given):
    """Wrap new tensors; an in-place operator returns its argument itself."""
    by_inner = {id(tensor.inner): tensor for tensor in wrapped}
    for tensor in wrapped:
        if tensor.shape != tensor.inner.shape:
            raise NotImplementedError(f"{func} changes the shape of a tensor in place: not rehearsed")

    def back(x):
        if not isinstance(x, torch.Tensor) or id(x) in given:
            return x
        return by_inner[id(x)] if id(x) in by_inner else CudaTensor(x)

    return mapped(back, result)


def check_devices(func, args, tensors):
    """Raise CUDA's errors if tensors of both devices meet where they must not."""
    plain = [tensor for tensor in tensors if not isinstance(tensor, CudaTensor)]
    if not plain or func in COPIES:
        return
    if func in INDEXED:
        return check_indexing(func, args)
    takes_scalars = func in SCALARS or torch.Tag.pointwise in func.tags
    writes = func._schema.is_mutable and not isinstance(args[0], CudaTensor)
    if not takes_scalars or writes or any(tensor.ndim for tensor in plain):
        shapes = [tuple(tensor.shape) for tensor in tensors]
        raise mistake(
            "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
            f"(in {func}, shapes {shapes})"
        )


def check_indexing(func, args):
    """Indices may be on the CPU; a CPU tensor takes no others. Values are on the device of what they are put into."""
    target = args[0]
    if not isinstance(target, CudaTensor) and any(isinstance(index, CudaTensor) for index in args[1]):
        raise mistake(f"indices should be either on cpu or on the same device as the indexed tensor (cpu) (in {func})")
    if func in INDEX_PUTS:
        value = args[2]
        if isinstance(value, CudaTensor) != isinstance(target, CudaTensor) and (isinstance(value, CudaTensor) or value.ndim):
            raise mistake(f"expected self and value to be on the same device (in {func})")


def count_waits(func, args, kwargs, on_cuda):
    """Count what an operator on CUDA waits for."""
    if func in WAITS:
        synchronize(WAITS[func], 0 if kwargs.get("output_size") is not None else 1)
    elif func in COPIES:
        source = args[1] if func is aten.copy_.default else args[0]
        target = isinstance(args[0], CudaTensor) if func is aten.copy_.default else on_cuda
        waits = not kwargs.get("non_blocking", False) and not (func is aten.copy_.default and any(args[2:3]))
        if waits and isinstance(source, CudaTensor) != target:
            synchronize("upload" if target else "to cpu")
    elif func in INDEXED:
        indices = [index for index in args[1] if index is not None]
        masks = sum(index.dtype in (torch.bool, torch.uint8) for index in indices)
        fills = func in INDEX_PUTS and len(indices) == 1 and args[2].numel() == 1 and not isinstance(args[2], CudaTensor)
        synchronize("mask index", 0 if fills else masks)
        synchronize("upload", sum(not isinstance(index, CudaTensor) for index in indices))
    elif func is aten.isin.Tensor_Tensor and args[1].numel() >= 10 * args[0].numel() ** 0.145:
        synchronize("isin (unique)", 1 if kwargs.get("assume_unique") else 2)  # for more entries CUDA sorts


# --- modes ---------------------------------------------------------------------------------------------------------------


class Factories(TorchDispatchMode):
    """Catches operators on CUDA, also those that make a tensor there."""

    @classmethod
    def _should_skip_dynamo(cls):  # a wrapper around every call, and nothing is compiled
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if any(issubclass(kind, CudaTensor) for kind in types):
            return run(func, args, kwargs)
        if device is not None and (is_cuda(device) or is_inner() is True):
            return run(func, args, kwargs)
        return func(*args, **kwargs)


class Conversions(TorchFunctionMode):
    """Catches what never reaches the dispatcher, or reaches it as a tensor of the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor, torch.asarray):
            return as_tensor(func, args, kwargs)
        if func is torch.Tensor.cuda:
            return moved(args[0], CUDA)
        if func is torch.Tensor.cpu:
            return moved(args[0], CPU)
        if func is torch.Tensor.to:
            return to(*args, **kwargs)
        if func in (torch.Tensor.pin_memory, torch.Tensor.record_stream):
            return args[0]
        has_cuda = any_cuda(args) or any_cuda(kwargs.values())
        device, generator = kwargs.get("device"), kwargs.get("generator")
        if generator is not None and is_cuda(generator.device) != (has_cuda if device is None else is_cuda(device)):
            has, wants = ("cuda", "cpu") if is_cuda(generator.device) else ("cpu", "cuda")
            raise mistake(f"Expected a '{wants}' device type for generator but found '{has}'")
        with inner(has_cuda and device is None and func not in FILLED):
            return func(*args, **kwargs)


FILLED = {torch.full, torch.arange, torch.linspace}  # which make a CPU tensor even from the values of CUDA ones


def is_inner():
    """Whether an operator runs in C++ for another one that is on CUDA, so that the device it names is a CudaTensor's.

    "tensors" in a backward pass that begins on the CPU: of operators that have CudaTensors alone.
    """
    return getattr(_here, "is_inner", False)


@contextlib.contextmanager
def inner(value):
    """A block with this `is_inner`."""
    before, _here.is_inner = is_inner(), value
    try:
        yield
    finally:
        _here.is_inner = before


def any_cuda(values):
    """Whether there is a CudaTensor among values, or in their lists."""
    for value in values:
        if isinstance(value, CudaTensor) or (isinstance(value, (list, tuple)) and any_cuda(value)):
            return True
    return False


def backward(run_backward):
    """The call of autograd's engine: a backward pass on CUDA makes its tensors there; its hooks see the modes."""

    def running(roots, *args, **kwargs):
        with Conversions(), inner(any_cuda(roots) or "tensors"):
            return run_backward(roots, *args, **kwargs)

    return running


def as_tensor(func, args, kwargs):
    """torch.tensor, as_tensor and asarray."""
    device = kwargs.get("device")
    others = {name: value for name, value in kwargs.items() if name != "device"}
    if args and isinstance(args[0], CudaTensor):
        tensor = moved(args[0].detach() if func is torch.tensor else args[0], device, others.get("dtype"))
        return tensor.clone() if func is torch.tensor and tensor is args[0] else tensor
    if device is None or not is_cuda(device):
        return func(*args, **kwargs)
    requires_grad = others.pop("requires_grad", False)
    return moved(func(*args, **others), CUDA).requires_grad_(requires_grad)


def to(tensor, *args, copy=False, **kwargs):
    """Tensor.to."""
    other = kwargs.pop("other", args[0] if args and isinstance(args[0], torch.Tensor) else None)
    if other is not None:
        return moved(tensor, other.device, other.dtype, copy=copy)
    device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
    return moved(tensor, device, dtype, non_blocking, copy)


def moved(tensor, device, dtype=None, non_blocking=False, copy=False):
    """The tensor on a device, as `to` gives it; gradients flow back to the device that it came from."""
    target = tensor.device if device is None else torch.device(device)
    if target.type == tensor.device.type:
        if dtype in (None, tensor.dtype):
            return tensor.clone() if copy else tensor
        return aten._to_copy(tensor, dtype=dtype)
    with inner(False):
        if tensor.requires_grad and torch.is_grad_enabled():
            return Move.apply(tensor if dtype is None else tensor.to(dtype), target, non_blocking)
        return aten._to_copy(tensor, dtype=dtype, device=target, non_blocking=non_blocking)


class Move(torch.autograd.Function):
    """A copy to the other device."""

    @staticmethod
    def forward(ctx, tensor, target, non_blocking):
        ctx.source = tensor.device
        return aten._to_copy(tensor, device=target, non_blocking=non_blocking)

    @staticmethod
    def backward(ctx, gradient):
        with inner(False):
            gradient = aten._to_copy(gradient, device=ctx.source)
        if is_cuda(ctx.source):
            _here.is_inner = True  # from here on the backward pass is on CUDA
        return gradient, None, None


# --- generators ----------------------------------------------------------------------------------------------------------


class _OfAnyKind(type(torch._C.Generator)):
    def __instancecheck__(cls, instance):
        return isinstance(instance, torch._C.Generator)


class Generator(torch._C.Generator, metaclass=_OfAnyKind):
    """A CPU generator that says on which device it is; takes the place of `torch.Generator`."""

    def __new__(cls, device="cpu"):
        generator = super().__new__(cls, device="cpu")
        generator.says = CUDA if is_cuda(device) else CPU
        return generator

    def __init__(self, *args, **kwargs):
        pass

    device = property(lambda self: self.says)


# --- graphs --------------------------------------------------------------------------------------------------------------


def capturing():
    """The graph that this thread captures; None if it captures none."""
    return getattr(_here, "graph", None)


class Graph:
    """A CUDA graph: the operators that ran while it was captured, run again on the same memory."""

    def __init__(self, *args, **kwargs):
        self.operators = []

    def record(self, func, args, kwargs, result):
        """Note an operator on CPU tensors and its result."""
        given = {tensor.untyped_storage().data_ptr() for tensor in tensors_in(args, *kwargs.values())}
        written = [tensor if tensor.untyped_storage().data_ptr() not in given else None for tensor in tensors_in(result)]
        self.operators.append((func, args, kwargs, written))

    def replay(self):
        """Run the operators again; new tensors of the capture take the new values."""
        with torch.no_grad():
            for func, args, kwargs, written in self.operators:
                for old, new in zip(written, tensors_in(func(*args, **kwargs)), strict=True):
                    if old is not None:
                        old.copy_(new)

    def reset(self):
        """Forget the operators."""
        self.operators = []


@contextlib.contextmanager
def capture(graph, pool=None, stream=None, capture_error_mode="global"):
    """Record the operators of the block in a graph.

    In global mode CUDA refuses to allocate memory in any other thread meanwhile, and the capture fails. A capture beside the
    main thread would meet its allocations now and then: it is refused here whether it does or not.
    """
    if capture_error_mode == "global" and threading.current_thread() is not threading.main_thread():
        raise mistake(
            "CUDA error: operation not permitted when stream is capturing (in another thread: a capture beside the main thread "
            'must have capture_error_mode="thread_local")'
        )
    synchronize("synchronize")
    _here.graph = graph
    try:
        yield
    finally:
        _here.graph = None


class Stream:
    """A stream or an event. All work is done at once, but the host's waits are counted."""

    device, cuda_stream = CUDA, 0

    def __init__(self, *args, **kwargs):
        pass

    def synchronize(self):
        synchronize("synchronize")

    def query(self):
        return True

    def elapsed_time(self, other):
        return 1.0

    def _ignore(self, *args, **kwargs):
        return self

    wait_stream = wait_event = record_event = record = wait = _ignore


# --- files ---------------------------------------------------------------------------------------------------------------


def save(original):
    """torch.save, which notes the device of each tensor."""

    def saving(*args, **kwargs):
        _here.saving = True
        try:
            return original(*args, **kwargs)
        finally:
            _here.saving = False

    return saving


def load(original):
    """torch.load, which gives each tensor to its device."""

    def loading(f, map_location=None, **kwargs):
        on_cuda = []  # the storages, kept so that no other takes one's address

        def locate(storage, location):
            target = map_location
            if isinstance(map_location, dict):
                target = map_location.get(location, location)
            elif callable(map_location) and not isinstance(map_location, torch.device):
                target = location if (result := map_location(storage, location)) is None else result.device
            if is_cuda(location if target is None else target):
                on_cuda.append(storage)
            return storage

        loaded = original(f, map_location=locate, **kwargs)
        addresses = {storage.data_ptr() for storage in on_cuda}

        def placed(x):
            if not isinstance(x, torch.Tensor) or x.untyped_storage().data_ptr() not in addresses:
                return x
            return rebuild(x.detach(), x.requires_grad, isinstance(x, nn.Parameter))

        return tree_map(placed, loaded)

    return loading


def safe_open(original):
    """safetensors' safe_open, for `load_file(path, device="cuda")`."""

    @contextlib.contextmanager
    def opening(filename, framework="pt", device="cpu", **kwargs):
        with original(filename, framework=framework, device="cpu", **kwargs) as file:
            yield _Placed(file) if is_cuda(device) else file

    return opening


class _Placed:
    """An open safetensors file whose tensors are on CUDA."""

    def __init__(self, file):
        self.keys, self.metadata, self._file = file.keys, file.metadata, file

    def get_tensor(self, name):
        return moved(self._file.get_tensor(name), CUDA)

    def get_tensors(self):
        return {name: self.get_tensor(name) for name in self.keys()}


# --- the rehearsal -------------------------------------------------------------------------------------------------------


def swapping(apply):
    """nn.Module._apply, which keeps the parameters' identity as CUDA does: tied weights, optimizers made before."""

    def moving(self, *args, **kwargs):
        before = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            return apply(self, *args, **kwargs)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(before)

    return moving


def autocasting(init):
    """torch.autocast.__init__ for "cuda", which is the CPU's here."""

    def initialized(self, device_type, *args, **kwargs):
        init(self, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    return initialized


def of_cpu(function):
    """A function of a device type, which answers for "cpu" where it is asked about "cuda"."""
    return lambda device="cuda", *args: function("cpu" if device == "cuda" else device, *args)


def grouped(group):
    """A grouping of tensors by device in C++, where a CudaTensor's is the CPU."""

    def grouping(*args, **kwargs):
        groups = group(*args, **kwargs)
        return {(CUDA if any_cuda(lists) else device, dtype): (lists, at) for (device, dtype), (lists, at) in groups.items()}

    return grouping


def of_values(function):
    """A function of a tensor's class and type, which sees the class that the tensor would have on CUDA."""
    return lambda tensor: function(unwrap(tensor))


def properties(*args):
    return unittest.mock.Mock(total_memory=80 * GIB, major=9, minor=0, multi_processor_count=132)


def ignore(*args, **kwargs):
    """Do nothing."""


QUESTIONS = {  # asked of torch.cuda
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "_lazy_init": ignore,
    "init": ignore,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": ignore,
    "_exchange_device": lambda index: 0,
    "_maybe_exchange_device": lambda index: 0,
    "get_device_name": lambda *args: "rehearsal",
    "get_device_capability": lambda *args: (9, 0),
    "get_device_properties": properties,
    "is_bf16_supported": lambda *args, **kwargs: True,
    "mem_get_info": lambda *args: (70 * GIB, 80 * GIB),
    "memory_allocated": lambda *args: GIB,
    "max_memory_allocated": lambda *args: GIB,
    "memory_reserved": lambda *args: GIB,
    "max_memory_reserved": lambda *args: GIB,
    "reset_peak_memory_stats": ignore,
    "empty_cache": ignore,
    "synchronize": lambda *args: synchronize("synchronize"),
    "manual_seed": ignore,  # of the one stream, by torch.manual_seed
    "manual_seed_all": ignore,
    "get_rng_state": lambda *args: torch.get_rng_state(),
    "set_rng_state": lambda state, *args: torch.set_rng_state(state),
    "Stream": Stream,
    "Event": Stream,
    "current_stream": Stream,
    "default_stream": Stream,
    "stream": lambda stream: contextlib.nullcontext(),
    "CUDAGraph": Graph,
    "graph": capture,
    "graph_pool_handle": lambda: (0, 0),
    "is_current_stream_capturing": lambda: capturing() is not None,
}


@contextlib.contextmanager
def rehearsal():
    """Make `device="cuda"` usable in the block.

    Yields:
        The messages of CUDA's errors so far, also of those that were caught, as by a trial of what a model is able to do.
    """
    is_on = True
    _mistakes.clear()

    @contextlib.contextmanager
    def modes():
        with Conversions(), Factories():
            yield

    def in_thread(bootstrap):
        def beginning(self):
            if not is_on:
                return bootstrap(self)
            with modes():
                return bootstrap(self)

        return beginning

    with contextlib.ExitStack() as stack:

        def patch(target, name, value):
            stack.enter_context(unittest.mock.patch.object(target, name, value))

        for name, answer in QUESTIONS.items():
            patch(torch.cuda, name, answer)
        for name in ("is_autocast_enabled", "get_autocast_dtype"):
            patch(torch, name, of_cpu(getattr(torch, name)))
        patch(torch._C, "_group_tensors_by_device_and_dtype", grouped(torch._C._group_tensors_by_device_and_dtype))
        patch(torch.autograd, "_engine_run_backward", backward(torch.autograd._engine_run_backward))
        patch(torch.autocast, "__init__", autocasting(torch.autocast.__init__))
        patch(torch, "Generator", Generator)
        patch(torch, "save", save(torch.save))
        patch(torch, "load", load(torch.load))
        patch(safetensors.torch, "safe_open", safe_open(safetensors.torch.safe_open))
        patch(nn.Module, "_apply", swapping(nn.Module._apply))
        patch(threading.Thread, "run", in_thread(threading.Thread.run))
        patch(quantization, "_is_of_a_quantizer", of_values(quantization._is_of_a_quantizer))
        for module in (shared_prefix, sampler, scoring, flash):
            patch(module, "runs_on", lambda *_: False)
        patch(sharing, "_ways", weakref.WeakKeyDictionary())
        stack.enter_context(modes())
        try:
            yield _mistakes
        finally:
            is_on = False
