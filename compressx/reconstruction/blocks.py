"""What follows a layer in a traced program: its bias, the factors of its normalisation, the shortcut it is added to.

    layer -> (+ bias) -> normalisation by known numbers -> + shortcut

Whatever the layer is then compared by is an affine map of its output, so an error of the shortcut can be corrected by
the layer: it is divided by the factors on the way.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from compressx.capture.uses import Uses
from compressx.trace import Program

_MOVES = ("broadcast_in_dim", "reshape", "squeeze", "convert_element_type", "copy", "stop_gradient")


class Tail(NamedTuple):
    """What follows one layer.

    Attributes:
      values: those that an affine map with known numbers makes of the layer's output, itself first.
      gains: values that multiply it on the way, and whether they divide instead.
      bias: the leaf that is added to the layer's output before anything else, or None.
      shortcut: the value that depends on the inputs and is added in the end, or None.
      added: the operation that adds it, or -1.
    """

    values: tuple[int, ...]
    gains: tuple[tuple[int, bool], ...]
    bias: int | None
    shortcut: int | None
    added: int


def leaf_behind(program: Program, value: int, makers: Mapping[int, int]) -> int | None:
    """The leaf that a value shows unchanged, up to its shape and type, or None."""
    while value >= len(program.paths):
        op = program.ops[makers[value]] if value in makers else None
        if op is None or op.primitive.name not in _MOVES:
            return None
        value = op.inputs[0]
    return value


def makers_of(program: Program) -> dict[int, int]:
    """value -> the operation that makes it."""
    return {v: number for number, op in enumerate(program.ops) for v in op.outputs}


def tail_of(program: Program, data: frozenset[int], number: int) -> Tail:
    """What follows the product that is operation `number`."""
    readers, makers = program.readers(), makers_of(program)
    value = program.ops[number].outputs[0]
    shape = program.shapes[value]
    values, gains, bias = [value], list[tuple[int, bool]](), None
    while len(readers.get(value, ())) == 1:
        reader, operand = readers[value][0]
        if reader < 0:
            break
        op = program.ops[reader]
        name = op.primitive.name
        if program.shapes[op.outputs[0]] != shape:
            break
        if name in ("add", "sub", "mul", "div"):
            other = op.inputs[1 - operand]
            if name == "add" and other in data:
                if program.shapes[other] == shape:
                    return Tail(tuple(values), tuple(gains), bias, other, reader)
                break
            if other in data or (name in ("sub", "div") and operand == 1):
                break
            if name in ("mul", "div"):
                gains.append((other, name == "div"))
            elif name == "add" and bias is None and not gains and len(values) == 1:
                bias = leaf_behind(program, other, makers)
        elif name not in ("convert_element_type", "copy"):
            break
        value = op.outputs[0]
        values.append(value)
    return Tail(tuple(values), tuple(gains), bias, None, -1)


def shortcuts(program: Program, found: Uses, leaves: Sequence[int]) -> dict[int, Tail]:
    """The tails of the leaves that one product of the program itself reads; of two that meet in one sum one corrects.

    That is the one with more inputs (of a block with a convolution in its shortcut its last large convolution), which
    then comes after the other.
    """
    tails = {}
    for leaf in leaves:
        scopes = found.scopes(leaf)
        if len(scopes) == 1 and len(scopes[0]) == 1:
            tails[leaf] = tail_of(program, found.data, scopes[0][0])
    best: dict[int, int] = {}
    for leaf, tail in tails.items():
        other = best.get(tail.added)
        if tail.added >= 0 and (other is None or found.views[leaf].rows > found.views[other].rows):
            best[tail.added] = leaf
    return {
        leaf: tail if best.get(tail.added) == leaf else tail._replace(shortcut=None) for leaf, tail in tails.items()
    }


def in_order(program: Program, found: Uses, tails: Mapping[int, Tail]) -> Program:
    """The program in an order of operations in which every shortcut is known before the layer that corrects it."""
    makers = makers_of(program)
    before: dict[int, list[int]] = {}
    for leaf, tail in tails.items():
        if tail.shortcut is not None:
            before.setdefault(found.scopes(leaf)[0][0], []).append(tail.shortcut)
    order: list[int] = []
    done: set[int] = set()
    for first in range(len(program.ops)):
        waiting = [first]
        while waiting:
            number = waiting[-1]
            needs = (*program.ops[number].inputs, *before.get(number, ()))
            more = [makers[v] for v in needs if v in makers and makers[v] not in done]
            if number in done or not more:
                waiting.pop()
                if number not in done:
                    done.add(number)
                    order.append(number)
            else:
                waiting.extend(reversed(more))
    return program._replace(ops=tuple(program.ops[number] for number in order))
