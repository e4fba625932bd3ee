"""Sums along a binary tree, whose bits do not depend on who adds up which part of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar


class _Term(Protocol):
    def __add__(self, other: Any, /) -> Any: ...


T = TypeVar("T", bound=_Term)


def tree_sum(terms: Sequence[T]) -> T:
    """The sum of ``terms``, of which there is one at least: of neighbours first, then of neighbours among these sums.

    If 2^n terms are dealt out in equal runs, and each run is added up on its own, then the tree sum of those sums has
    the same bits as that of all terms.
    """
    level = list(terms)
    while len(level) > 1:
        pairs: list[T] = [left + right for left, right in zip(level[::2], level[1::2], strict=False)]
        level = [*pairs, *level[2 * len(pairs) :]]
    return level[0]
