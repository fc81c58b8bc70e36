"""Races inside a program, found in Triton's intermediate representation (TTIR) of a kernel.

The threads of a program do not keep step with each other. Where a program loads through a pointer and later stores
through it, a thread may load what another thread has already stored, unless a barrier lets all of them arrive in
between. What happens depends on timing; the interpreter has no threads, and compute-sanitizer looks for such races in
shared memory alone.
"""

import re
from collections.abc import Iterable

_ARGUMENT = re.compile(r"(%[\w.$-]+): !tt\.(?:ptr|tensordesc)")
_VALUE = re.compile(r"%[\w.$-]+(?:#\d+)?")
_DEFINITION = re.compile(r"(%[\w.$-]+)(?::\d+)? = (.*)")
_CARRIED = re.compile(r"(%[\w.$-]+) = (%[\w.$-]+)")
_BARRIER = re.compile(r"(gpu\.barrier|ttg\.barrier all)\b")
_LOAD = re.compile(r"tt\.(load|descriptor_load|descriptor_gather)\b")
_STORE = re.compile(r"tt\.(store|atomic_\w+|descriptor_store|descriptor_scatter|descriptor_reduce)\b")


class _Operation:
    """An operation with regions, such as a loop or a condition, while its lines are read."""

    def __init__(self, place: int, line: str, loaded: set[str]) -> None:
        self.place = place
        """Number of its line"""
        definition = _DEFINITION.match(line)
        self.result = definition[1] if definition else ""
        self.is_loop = re.search(r"\bscf\.(for|while)\b", line) is not None
        _, _, arguments = line.partition("iter_args")
        self.carried = [argument for argument, _ in _CARRIED.findall(arguments)]
        """Names that the results of one step of the loop have in the next one"""
        self.loaded_before = set(loaded)
        self.loaded_at_ends: set[str] = set()
        """What is loaded at the end of one of its blocks"""


class _Reading:
    """What is known of a kernel while its lines are read.

    `loaded` has the pointer arguments that some way through the kernel has loaded through since its last barrier. Ways
    are joined where they meet. What the end of a loop hands to its beginning is known when the text is read again.
    """

    def __init__(self) -> None:
        self.loaded: set[str] = set()
        self.loaded_at_end: dict[int, set[str]] = {}
        """By the place of a loop"""
        self.origins: dict[str, set[str]] = {}
        """For each value the pointer arguments that it was computed from. A value loaded from memory has none: kernels
        load numbers, not addresses."""
        self.operations: list[_Operation] = []
        """Those that hold the current line, from outside to inside"""
        self.races: set[str] = set()

    def read(self, place: int, line: str) -> None:
        """Take in the next line."""
        is_block = line.startswith("^")
        if is_block or line.startswith("}"):
            self._end_of_block()
            assert "!tt.ptr" not in line or not is_block, f"a block takes a pointer: {line}"
            if not is_block and not line.endswith("{"):
                self._end_of_operation()
            return
        definition = _DEFINITION.match(line)
        result, right_side = (definition[1], definition[2]) if definition else ("", line)
        operands = _VALUE.findall(right_side)
        if right_side.startswith("tt.func"):
            self.origins = {argument: {argument} for argument in _ARGUMENT.findall(line)}
        elif _BARRIER.match(right_side):
            self.loaded = set()
        elif _LOAD.match(right_side):
            self.loaded |= self._origin(operands[0])
        elif _STORE.match(right_side):
            self.races |= self.loaded & self._origin(operands[0])
        elif right_side.startswith(("scf.yield", "scf.condition")):
            self._hand_over(operands)
        else:
            assert not right_side.startswith("tt.call"), f"a function is not inlined: {line}"
            # of an address and an offset, only the address is a pointer
            self.origins[result] = self._origins(operands[:1] if right_side.startswith("tt.addptr") else operands)
            for argument, value in _CARRIED.findall(right_side):
                self.origins[argument] = self._origins([value])
        if line.endswith("{"):
            self.loaded |= self.loaded_at_end.get(place, set())
            self.operations.append(_Operation(place, line, self.loaded))

    def _origin(self, pointer: str) -> set[str]:
        assert self.origins.get(pointer), f"{pointer} comes from no argument"
        return self.origins[pointer]

    def _origins(self, values: Iterable[str]) -> set[str]:
        return set().union(*(self.origins.get(value, ()) for value in values))

    def _hand_over(self, values: list[str]) -> None:
        """From the end of a region to its operation and, if it is a loop, to its next step."""
        operation = self.operations[-1]
        for number, value in enumerate(values):
            result = operation.result if len(values) == 1 else f"{operation.result}#{number}"
            self.origins[result] = self._origins([result, value])
        assert not operation.is_loop or operation.carried or not self._origins(values), "a while loop carries pointers"
        for argument, value in zip(operation.carried, values, strict=False):
            assert self._origins([value]) <= self._origins([argument]), f"{argument} points elsewhere at the next step"

    def _end_of_block(self) -> None:
        """The next block may follow on any block before it, or on what was before the operation."""
        operation = self.operations[-1]
        operation.loaded_at_ends |= self.loaded
        self.loaded = operation.loaded_before | operation.loaded_at_ends

    def _end_of_operation(self) -> None:
        operation = self.operations.pop()
        if operation.is_loop:
            self.loaded_at_end[operation.place] = operation.loaded_at_ends


def races(ttir: str) -> list[str]:
    """Names of the pointers that a program loads through and later stores through, no barrier being in between.

    This is cautious: it does not ask whether the addresses are the same, nor whether a thread loads for itself alone.
    """
    lines = [line.split(" loc(")[0] if "tt.func" not in line else line for line in ttir.splitlines()]
    lines = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    reading, before = _Reading(), None
    while before != reading.loaded_at_end:
        before, reading.loaded = dict(reading.loaded_at_end), set()
        for place, line in enumerate(lines):
            reading.read(place, line)
    return sorted(name.removeprefix("%") for name in reading.races)
