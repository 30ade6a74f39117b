"""Read a compiled program's text: its kernels, its copies, and where it waits for the host.

A compiled program is a schedule. Each instruction of its entry computation, and of the bodies of
its loops, is one launch, except for those that only name a part of memory:

    ENTRY %main (p: bf16[8,64]) -> bf16[8,64] {
      %p = bf16[8,64]{1,0} parameter(0)                                         no launch
      %f = bf16[8,64]{1,0} fusion(%p), kind=kLoop, calls=%fused_multiply        one launch
      %w = (s32[], bf16[8,64]{1,0}) while(%t), condition=%c, body=%b, ...       its body, n times
    }
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

LARGE = 2**20
"""Bytes from which a result counts as large: no hidden state of a few tokens has as many."""

_INSTRUCTION = re.compile(r"(?:ROOT )?%?(\S+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)")
"""Name, shape, opcode and the rest of "%name = shape opcode(operands), attributes"."""

_COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(")

_NOT_LAUNCHED = {
    "after-all",
    "bitcast",
    "constant",
    "get-tuple-element",
    "optimization-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
}
"""Instructions that do nothing at run time. Ends of asynchronous pairs (`-done`) join them."""

_MOVES = {
    "bitcast",
    "broadcast",
    "concatenate",
    "constant",
    "convert",
    "copy",
    "dynamic-slice",
    "pad",
    "parameter",
    "reshape",
    "reverse",
    "slice",
    "transpose",
    "tuple",
}
"""Instructions that compute nothing."""

_HOST = re.compile(r"infeed|outfeed|send|recv|host|callback|conditional", re.IGNORECASE)
"""Opcodes and custom calls that wait for the host, or on a GPU may."""

_BYTES = {"pred": 1, "s4": 1, "u4": 1, "bf16": 2, "f16": 2, "token": 0}


@dataclass(frozen=True)
class Instruction:
    """A line of a computation.

    Attributes:
        shape: As printed: "bf16[8,64]{1,0}", or several in parentheses.
        opcode: "fusion", "while", "custom-call", ...
        rest: Everything after the opcode's opening parenthesis.
    """

    name: str
    shape: str
    opcode: str
    rest: str

    def attribute(self, name: str) -> str | None:
        """Return an attribute's value, or None: `calls` of a fusion, `body` of a loop."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return found[1] if found else None

    @property
    def bytes(self) -> int:
        """Bytes of the result, all parts of a tuple together."""
        return sum(map(_bytes, re.findall(r"(\w+)\[([\d,]*)\]", self.shape)))


@dataclass(frozen=True)
class Kernel:
    """A launch.

    Attributes:
        name: XLA's name, which says what was fused: "loop_transpose_fusion.3".
        shape: The result's, as XLA prints it, without layouts.
        bytes: The result's size.
        times: How often an execution of the program launches it.
    """

    name: str
    shape: str
    bytes: int
    times: int

    @property
    def dimensions(self) -> tuple[int, ...]:
        """The result's dimensions, of the first array if it has several."""
        found = re.search(r"\[([\d,]*)\]", self.shape)
        return _dimensions(found[1]) if found else ()


@dataclass(frozen=True)
class CompiledText:
    """A compiled program.

    Attributes:
        computations: Instructions by the computation's name.
        entry: The name of the computation that runs.

    Examples:
        >>> text = CompiledText.read('''
        ... %double (p: f32[2]) -> f32[2] {
        ...   %p = f32[2]{0} parameter(0)
        ...   ROOT %sum = f32[2]{0} add(%p, %p)
        ... }
        ... ENTRY %main (x: f32[2]) -> f32[2] {
        ...   %x = f32[2]{0} parameter(0)
        ...   ROOT %f = f32[2]{0} fusion(%x), kind=kLoop, calls=%double
        ... }
        ... ''')
        >>> [kernel.name for kernel in text.kernels]
        ['f']
    """

    computations: Mapping[str, Sequence[Instruction]]
    entry: str

    @classmethod
    def read(cls, text: str) -> "CompiledText":
        """Parse what `jax.stages.Compiled.as_text()` returns.

        Raises:
            ValueError: The text has no entry computation.
        """
        computations: dict[str, list[Instruction]] = {}
        entry, own = None, None
        for line in text.splitlines():
            if line.endswith("{") and (found := _COMPUTATION.match(line)):
                own = computations.setdefault(found["name"], [])
                entry = found["name"] if found["entry"] else entry
            elif line.startswith("}"):
                own = None
            elif own is not None and (parts := _INSTRUCTION.match(line.strip())):
                own.append(Instruction(*parts.groups()))
        if entry is None:
            raise ValueError("a compiled program without an entry computation")
        return cls(computations, entry)

    @cached_property
    def kernels(self) -> tuple[Kernel, ...]:
        """All launches, those of loops `times` their trip count (once where it is unknown)."""
        found = []
        for line, times in self._launched(self.entry, 1):
            shape = re.sub(r"\{[^}]*\}", "", line.shape)
            found.append(Kernel(line.name, shape, line.bytes, times))
        return tuple(found)

    @property
    def launches(self) -> int:
        """How many kernels an execution launches."""
        return sum(kernel.times for kernel in self.kernels)

    @property
    def looped(self) -> int:
        """How many kernels one iteration of the longest loop launches; 0 without a loop."""
        bodies = [self._body(line) for line, _ in self._loops(self.entry, 1)]
        return max((len(list(self._launched(body, 1))) for body in bodies), default=0)

    @property
    def copies(self) -> tuple[Kernel, ...]:
        """Kernels with a large result that only move data: copies of weights or caches."""
        return tuple(k for k in self._large if self._only_moves(k.name))

    @property
    def spilled(self) -> tuple[Kernel, ...]:
        """Kernels that compute a large result of floats: splits of a product among them.

        A matrix-sized one is a product of which only the multiplications were fused, so that a
        second kernel has to read them all again to sum them. Logits and scores of many tokens
        belong here, too.
        """
        return tuple(k for k in self._large if not self._only_moves(k.name))

    @property
    def host_waits(self) -> tuple[str, ...]:
        """Instructions for which a device waits for the host, or may."""
        waits = []
        for line, _ in self._launched(self.entry, 1):
            target = re.search(r'custom_call_target="([^"]*)"', line.rest)
            if _HOST.search(line.opcode) or (target and _HOST.search(target[1])):
                waits.append(f"{line.opcode} {line.name}")
        for line, _ in self._loops(self.entry, 1):
            if _trips(line) is None:
                waits.append(f"while {line.name} without a known number of iterations")
        return tuple(waits)

    @property
    def _large(self) -> Iterator[Kernel]:
        return (k for k in self.kernels if k.bytes >= LARGE and not self._in_place(k.name))

    @cached_property
    def _by_name(self) -> dict[str, Instruction]:
        return {line.name: line for lines in self.computations.values() for line in lines}

    def _fused(self, name: str) -> Sequence[Instruction]:
        """Return what a kernel consists of: the instructions of its fusion, or itself."""
        line = self._by_name[name]
        called = line.attribute("calls") if line.opcode.startswith("fusion") else None
        return self.computations[called] if called else (line,)

    def _only_moves(self, name: str) -> bool:
        return all(line.opcode in _MOVES for line in self._fused(name))

    def _in_place(self, name: str) -> bool:
        """Whether a kernel writes a few entries into an array that is there already."""
        return any(line.opcode in ("dynamic-update-slice", "scatter") for line in self._fused(name))

    def _launched(self, computation: str, times: int) -> Iterator[tuple[Instruction, int]]:
        for line in self.computations[computation]:
            if line.opcode not in {"while", *_NOT_LAUNCHED} and not line.opcode.endswith("-done"):
                yield line, times
        for line, number in self._loops(computation, times):
            yield from self._launched(self._body(line), number * (_trips(line) or 1))

    def _loops(self, computation: str, times: int) -> Iterator[tuple[Instruction, int]]:
        for line in self.computations[computation]:
            if line.opcode == "while":
                yield line, times

    def _body(self, loop: Instruction) -> str:
        body = loop.attribute("body")
        assert body is not None, "a while loop has a body"
        return body


def _trips(loop: Instruction) -> int | None:
    found = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
    return int(found[1]) if found else None


def _bytes(array: tuple[str, str]) -> int:
    """Return the bytes of ("bf16", "8,64")."""
    kind, sizes = array
    # "f32" has 32 bits, "f8e4m3fn" has 8; the others are in the table.
    width = _BYTES.get(kind)
    if width is None:
        width = int(re.sub(r"^\D+(\d+).*", r"\1", kind)) // 8
    return width * prod(_dimensions(sizes))


def _dimensions(text: str) -> tuple[int, ...]:
    """Read "8,64"."""
    return tuple(int(size) for size in text.split(",") if size)
