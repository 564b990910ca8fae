"""Gluon kernels run as plain Python: the functions behind `gluon.jit` with stand-ins for what they call.

Partitions of a program are threads of which one runs at a time. Whoever reaches a barrier, a copy or a matrix product
hands over, and a seeded generator picks who goes on: a partition, a copy on its way or a product that was begun. Copies
and products read and write when they are picked, not when they are issued, and a buffer holds NaN from when a copy into
it is issued, so what a program must wait for and does not shows in its result; most of it raises `HazardError`.
"""

from __future__ import annotations

import inspect
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from triton import JITFunction
from triton.language import constexpr

INT32, INT64, UINT32 = torch.int32, torch.int64, torch.uint32
ITEMSIZE = 2  # bytes of an element, as kernels for half precision count copies, whatever the dtype of a test


class HazardError(Exception):
    """A buffer is overwritten before it was read, or read before it was written."""


class DeadlockError(Exception):
    """Nobody can go on."""


@dataclass
class Barrier:
    """An mbarrier: a phase ends with `count` arrivals and all bytes that were expected."""

    name: str
    count: int = 0
    arrived: int = 0
    expected: int = 0
    ended: int = 0  # phases

    def arrive(self) -> None:
        self.arrived += 1
        self.settle()

    def settle(self) -> None:
        if self.arrived > self.count:
            raise HazardError(f"{self.name}: {self.arrived} arrivals of {self.count}")
        if self.arrived == self.count and self.expected == 0:
            self.arrived, self.ended = 0, self.ended + 1

    def has_ended(self, parity: int) -> bool:
        """Whether the phase of this parity is over: the one that runs has the other."""
        return self.ended % 2 != parity


@dataclass
class Slot:
    """A buffer of shared memory: its numbers, copies into it on their way, and products that will read it."""

    name: str
    data: Tensor
    copies: int = 0
    readers: int = 0


@dataclass
class Shared:
    """A view of a slot, or of a ring of slots or barriers."""

    slots: list
    view: Callable[[Tensor], Tensor] = lambda data: data

    def index(self, i) -> Shared:
        return Shared([self.slots[int(i)]], self.view)

    @property
    def slot(self):
        (slot,) = self.slots
        return slot

    def reshape(self, shape) -> Shared:
        return Shared(self.slots, lambda data: self.view(data).reshape([int(n) for n in shape]))

    def permute(self, order) -> Shared:
        return Shared(self.slots, lambda data: self.view(data).permute(order))


@dataclass(frozen=True)
class Pointer:
    """Elements of a tensor's storage."""

    storage: Tensor
    place: Any

    @property
    def dtype(self):
        return SimpleNamespace(element_ty=self.storage.dtype)

    def __add__(self, other) -> Pointer:
        return Pointer(self.storage, self.place + other)


@dataclass
class Descriptor:
    """A box of tensors in memory; what lies outside of the lengths reads as zero."""

    pointer: Pointer
    lengths: list[int]
    strides: list[int]
    box: list[int]

    def read(self, origin) -> Tensor:
        found = torch.zeros(self.box, dtype=self.pointer.storage.dtype)
        first = [int(n) for n in origin]
        counts = [min(b, n - i) for b, n, i in zip(self.box, self.lengths, first, strict=True)]
        if all(i >= 0 for i in first) and all(n > 0 for n in counts):
            place = int(self.pointer.place) + sum(i * s for i, s in zip(first, self.strides, strict=True))
            found[tuple(map(slice, counts))] = torch.as_strided(self.pointer.storage, counts, self.strides, place)
        return found


@dataclass
class Product:
    """A matrix product that was begun."""

    compute: Callable[[], Tensor]
    reads: list[Slot]
    number: int  # of the partition
    value: Tensor | None = None


@dataclass
class Partition:
    """Warps with a function of their own."""

    name: str
    waits: Callable[[], bool] = lambda: True
    reason: str = ""
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    products: list[Product] = field(default_factory=list)
    begun: int = 0
    events: list[tuple] = field(default_factory=list)
    thread: threading.Thread | None = None
    over: bool = False


class Stopped(BaseException):
    """Ends the thread of a partition whose program has failed."""


class Program:
    """One program: its shared memory, copies on their way, and its partitions."""

    def __init__(self, number: int, random: Random):
        self.number, self.random = number, random
        self.copies: list[Callable[[], None]] = []
        self.partitions: list[Partition] = []
        self.running: Partition | None = None
        self.back = threading.Semaphore(0)
        self.error: BaseException | None = None
        self.allocated = 0
        self.counts: dict[str, int] = {}  # of arrivals in a phase, by barrier

    def pause(self, event: tuple, until: Callable[[], bool] = lambda: True) -> None:
        """Note what the partition that runs does next, and hand over until it may."""
        me = self.running
        if me is None:  # before the partitions begin
            return
        me.events.append(event)
        me.waits, me.reason = until, str(event)
        self.back.release()
        me.turn.acquire()
        if self.error is not None:
            raise Stopped

    def specialise(self, functions, warps, registers) -> None:
        """Run partitions to their end, in an order of the program's generator."""
        assert len(functions) == len(warps) + 1 == len(registers) + 1

        def work(me: Partition, function, arguments) -> None:
            me.turn.acquire()
            try:
                if self.error is None:
                    function(*arguments)
            except Stopped:
                pass
            except BaseException as error:  # of any kind: it ends the program
                self.error = self.error or error
            me.over = True
            self.back.release()

        for number, (function, arguments) in enumerate(functions):
            me = Partition(f"{function.__name__} {number}")
            me.thread = threading.Thread(target=work, args=(me, function, arguments), daemon=True)
            me.thread.start()
            self.partitions.append(me)
        while not all(me.over for me in self.partitions):
            self._step()
        if self.error is not None:
            raise self.error
        left = [product for me in self.partitions for product in me.products]
        if left or self.copies:
            raise HazardError(f"{len(left)} products and {len(self.copies)} copies are left at the end")

    def _step(self) -> None:
        """Let one partition, copy or product go on; after an error all partitions, to their end."""
        waiting = [me for me in self.partitions if not me.over]
        ready = [me for me in waiting if self.error is not None or me.waits()]
        begun = [me for me in self.partitions if me.products] if self.error is None else []
        choices: list[Any] = [*ready, *(("product", me) for me in begun), *self.copies]
        if not choices:
            stuck = "; ".join(f"{me.name} waits for {me.reason}" for me in waiting)
            self.error = DeadlockError(stuck)
            return
        chosen = self.random.choice(choices)
        if isinstance(chosen, Partition):
            self.running = chosen
            chosen.turn.release()
            self.back.acquire()
            self.running = None
        elif isinstance(chosen, tuple):
            finish(chosen[1])
        else:
            self.copies.remove(chosen)
            chosen()


def finish(partition: Partition) -> None:
    """Do the oldest product that a partition has begun."""
    product = partition.products.pop(0)
    product.value = product.compute()
    for slot in product.reads:
        slot.readers -= 1


class Language:
    """`gl`, and `tl` in functions that both kinds of kernels call."""

    int1, int32, int64, uint32, float32 = torch.bool, INT32, INT64, UINT32, torch.float32
    float16, bfloat16 = torch.float16, torch.bfloat16

    def __init__(self, program: Program):
        self._program = program
        for layout in ("BlockedLayout", "SliceLayout", "DotOperandLayout"):
            setattr(self, layout, lambda *a, **k: None)
        for layout in ("NVMMADistributedLayout", "NVMMASharedLayout"):
            setattr(self, layout, lambda **k: None)

    static_range = staticmethod(range)
    convert_layout = staticmethod(lambda x, layout: x)
    exp2, log2 = staticmethod(torch.exp2), staticmethod(torch.log2)

    def program_id(self, axis):
        return torch.tensor(self._program.number, dtype=INT32)

    def arange(self, first, last, layout=None):
        return torch.arange(first, last, dtype=INT32)

    def full(self, shape, value, dtype, layout):
        return torch.full([int(n) for n in shape], value, dtype=dtype)

    def zeros(self, shape, dtype, layout):
        return self.full(shape, 0, dtype, layout)

    def cast(self, x, dtype):
        x = torch.as_tensor(x)
        return x.to(INT64) & 0xFFFFFFFF if dtype == UINT32 else x.to(dtype)

    def cdiv(self, a, b):
        return (a + b - 1) // b

    def where(self, condition, a, b):
        return torch.where(torch.as_tensor(condition), a, b)

    def maximum(self, a, b):
        return torch.maximum(*self._alike(a, b))

    def minimum(self, a, b):
        return torch.minimum(*self._alike(a, b))

    def _alike(self, a, b):
        like = a if isinstance(a, Tensor) else b
        dtype = like.dtype if isinstance(like, Tensor) else INT32
        return torch.as_tensor(a, dtype=dtype), torch.as_tensor(b, dtype=dtype)

    def max(self, x, axis):
        return x.amax(axis)

    def sum(self, x, axis):
        return x.sum(axis)

    def load(self, pointer: Pointer):
        return pointer.storage[int(pointer.place)]

    def store(self, pointer: Pointer, value: Tensor, mask: Tensor):
        place, value, mask = torch.broadcast_tensors(pointer.place, value, mask)
        pointer.storage[place[mask].long()] = value[mask].to(pointer.storage.dtype)

    def allocate_shared_memory(self, dtype, shape, layout):
        program, shape = self._program, [int(n) for n in shape]
        program.allocated += 1
        name, ring = f"buffer {program.allocated}", shape[0] if len(shape) > 1 else 1
        if dtype == INT64:
            return Shared([Barrier(f"{name}[{i}]") for i in range(ring)])
        empty = torch.full(shape[1:], float("nan"), dtype=dtype)
        return Shared([Slot(f"{name}[{i}]", empty.clone()) for i in range(ring)])

    def warp_specialize(self, functions, warps, registers):
        self._program.specialise(functions, warps, registers)


class Barriers:
    """`mbarrier`."""

    def __init__(self, program: Program):
        self._program, self.MBarrierLayout = program, lambda: None

    def init(self, barrier: Shared, count: int):
        barrier.slot.count = self._program.counts[barrier.slot.name] = int(count)

    def wait(self, barrier: Shared, phase, pred=True):
        if bool(pred):
            found, parity = barrier.slot, int(phase)
            self._program.pause(("wait", found.name, parity), lambda: found.has_ended(parity))

    def expect(self, barrier: Shared, size: int):
        self._program.pause(("expect", barrier.slot.name, int(size)))
        barrier.slot.expected += int(size)
        barrier.slot.arrive()

    def arrive(self, barrier: Shared):
        self._program.pause(("arrive", barrier.slot.name))
        barrier.slot.arrive()


class Copies:
    """`tma`."""

    def __init__(self, program: Program):
        self._program = program

    def make_tensor_descriptor(self, pointer, lengths, strides, box, layout):
        return Descriptor(pointer, *([int(n) for n in x] for x in (lengths, strides, box)))

    def async_copy_global_to_shared(self, descriptor: Descriptor, origin, barrier: Shared, buffer: Shared):
        origin, slot, signal = tuple(int(n) for n in origin), buffer.slot, barrier.slot
        self._program.pause(("copy", slot.name, signal.name, origin, slot.data.numel() * ITEMSIZE))
        if slot.readers or slot.copies:
            raise HazardError(f"{slot.name} is overwritten while it is in use")
        slot.data.fill_(float("nan"))
        slot.copies += 1

        def arrive() -> None:
            slot.data.copy_(descriptor.read(origin))
            slot.copies -= 1
            signal.expected -= slot.data.numel() * ITEMSIZE
            signal.settle()

        self._program.copies.append(arrive)


def products(program: Program) -> dict[str, Callable]:
    """`warpgroup_mma` and `warpgroup_mma_wait`."""

    def begin(a, b: Shared, acc: Tensor, *, use_acc: bool = True, is_async: bool = False) -> Product:
        reads = [x.slot for x in (a, b) if isinstance(x, Shared)]
        program.pause(("product", *(slot.name for slot in reads)))
        for slot in reads:
            if slot.copies:
                raise HazardError(f"{slot.name} is read before its copy has arrived")
            slot.readers += 1
        acc = acc.clone()

        def compute() -> Tensor:
            left, right = (x.view(x.slot.data) if isinstance(x, Shared) else x for x in (a, b))
            found = left.float() @ right.float()
            return acc + found if use_acc else found

        me = program.running
        assert is_async and me is not None
        me.products.append(Product(compute, reads, me.begun))
        me.begun += 1
        return me.products[-1]

    def wait(outstanding: int, deps: list):
        me = program.running
        assert me is not None
        program.pause(("done", int(outstanding)), lambda: len(me.products) <= outstanding)
        program.pause(("use", *(x.number for x in deps if isinstance(x, Product))))
        found = []
        for x in deps:
            if isinstance(x, Product) and x.value is None:
                raise HazardError("a product is read before it is done")
            found.append(x.value if isinstance(x, Product) else x)
        return found[0] if len(found) == 1 else tuple(found)

    return {"warpgroup_mma": begin, "warpgroup_mma_wait": wait, "fence_async_shared": lambda: None}


class Plain:
    """The functions of kernels as plain ones that call the stand-ins of a program.

    Args:
        program: whose memory and partitions they use.
        constants: other values for constants of kernels by name, such as fewer rows of a consumer.
        edits: by name of a function, texts of its source to replace: mutations of which a test must fail.
    """

    def __init__(self, program: Program, constants: Mapping[str, int], edits: Mapping[str, tuple[str, str]]):
        self.constants, self.edits = constants, edits
        self.namespaces: dict[int, dict] = {}
        language = Language(program)
        self.modules = {
            "triton.language": language,
            "triton.experimental.gluon.language": language,
            "triton.experimental.gluon.language.nvidia.hopper.mbarrier": Barriers(program),
            "triton.experimental.gluon.language.nvidia.hopper.tma": Copies(program),
        }
        self.functions = products(program)

    def function(self, of_kernel: JITFunction) -> FunctionType:
        """The plain function behind a kernel's, among stand-ins."""
        fn = of_kernel.fn
        names = self.namespace(fn.__globals__)
        if fn.__name__ not in self.edits:
            return FunctionType(fn.__code__, names, fn.__name__, fn.__defaults__)
        old, new = self.edits[fn.__name__]
        source = textwrap.dedent(inspect.getsource(fn))
        source = source[source.index("def ") :]
        assert old in source, f"{fn.__name__} has no {old!r}"
        local: dict = {}
        exec("from __future__ import annotations\n" + source.replace(old, new), names, local)
        return local[fn.__name__]

    def namespace(self, original: dict) -> dict:
        """Globals with stand-ins in place of kernels' functions, modules and constants."""
        if id(original) in self.namespaces:
            return self.namespaces[id(original)]
        names = self.namespaces[id(original)] = dict(original)
        for name, x in original.items():
            if isinstance(x, JITFunction):
                names[name] = self.function(x)
            elif isinstance(x, constexpr):
                names[name] = self.constants.get(name, x.value)
            elif isinstance(x, ModuleType):
                names[name] = self.modules.get(x.__name__, x)
        names.update({name: f for name, f in self.functions.items() if name in original})
        return names


def as_arguments(values: tuple) -> Iterator[Any]:
    """Arguments of a launch as a program sees them."""
    for x in values:
        if isinstance(x, Tensor):
            whole = torch.as_strided(x, (x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
            yield Pointer(whole, x.storage_offset())
        elif isinstance(x, tuple):
            yield tuple(as_arguments(x))
        else:
            yield torch.tensor(x, dtype=INT32) if isinstance(x, int) else x


@dataclass
class Run:
    """What launches inside `running` did.

    Attributes:
        programs: in order of their launches, without those that had nothing to do.
    """

    kernel: JITFunction
    random: Random
    constants: Mapping[str, int]
    edits: Mapping[str, tuple[str, str]]
    programs: list[Program] = field(default_factory=list)

    def __getitem__(self, grid: tuple[int]) -> Callable:
        def run(*arguments, num_warps: int, **fixed) -> None:
            assert num_warps == 4
            for number in range(grid[0]):
                program = Program(number, self.random)
                kernel = Plain(program, self.constants, self.edits).function(self.kernel)
                kernel(*as_arguments(arguments), **fixed)
                if program.partitions:
                    self.programs.append(program)

        return run


@contextmanager
def running(
    launch: Any,
    seed: int,
    *,
    constants: Mapping[str, int] | None = None,
    edits: Mapping[str, tuple[str, str]] | None = None,
) -> Iterator[Run]:
    """Inside the block the `forward_kernel` that a module launches runs on CPU tensors, in an order of `seed`.

    Args:
        launch: the module.
        constants, edits: of `Plain`.
    """
    kernel = launch.forward_kernel
    run = Run(kernel, Random(seed), constants or {}, edits or {})
    launch.forward_kernel = run
    try:
        yield run
    finally:
        launch.forward_kernel = kernel
