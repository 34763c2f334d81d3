"""Sums over products of two tensors, as ``torch.einsum`` writes them, read as products of matrices."""

from dataclasses import dataclass

__all__ = ["Side", "matrix_product"]


@dataclass(frozen=True, slots=True)
class Side:
    """One side of a matrix product: which operand it is, and whether its last two axes are turned."""

    operand: int
    turned: bool


def matrix_product(equation: str) -> tuple[Side, Side] | None:
    """Left and right side of the product of matrices that an equation is, with axes before them that all have in
    common, as attention's are: ``b h i d, b h j d -> b h i j``; None where it is another sum."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    operands = inputs.split(",")
    if not arrow or len(operands) != 2 or not all(entry.isalpha() and len(entry) > 1 for entry in (*operands, output)):
        return None
    *lead, row, column = [*output]
    summed = set(operands[0][-2:]) & set(operands[1][-2:])
    if (
        any([*entry[:-2]] != lead for entry in operands)
        or len(summed) != 1
        or len({*lead, row, column, *summed}) < (len(lead) + 3)
    ):
        return None
    (inner,) = summed
    sides = []
    for left, right in ((row, inner), (inner, column)):
        place = next((n for n, entry in enumerate(operands) if set(entry[-2:]) == {left, right}), None)
        if place is None:
            return None
        sides.append(Side(place, operands[place][-2:] == right + left))
    return sides[0], sides[1]
