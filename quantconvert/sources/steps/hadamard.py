"""Hadamard matrices of every size that models have, and fixed signs: plain integers, so that all machines agree.

A Hadamard matrix H has entries 1 and -1 and H H^T = n I. Sylvester's doubling makes those of powers of two; Paley's two
constructions (R. E. A. C. Paley, On orthogonal matrices, 1933) those of q + 1 for primes q = 3 mod 4, and of 2 (q + 1)
for primes q = 1 mod 4; products of the two all others that are used here.
"""

from __future__ import annotations

from functools import lru_cache
from math import isqrt
from typing import NamedTuple

# The largest order that Paley's constructions are asked for: its share of the work grows with the order.
MAX_PALEY = 1024

Matrix = tuple[tuple[int, ...], ...]


class Factors(NamedTuple):
    """A size as blocks * paley * power: `blocks` equal blocks on the diagonal, each a Hadamard matrix of order
    paley * power, the product of Paley's matrix of order `paley` (1: none) and Sylvester's of order `power`.
    """

    blocks: int
    paley: int
    power: int

    @property
    def order(self) -> int:
        """Rows of a block, which are mixed with each other."""
        return self.paley * self.power


@lru_cache(maxsize=256)
def factors_of(size: int) -> Factors:
    """The fewest blocks that a size allows, at worst the powers of two in it; then the smallest order of Paley's."""
    twos = (size & -size).bit_length() - 1
    odd = size >> twos
    for blocks in (b for b in range(1, odd + 1) if odd % b == 0):
        if blocks == odd:
            break
        for k in range(2, twos + 1):
            order = (odd // blocks) << k
            if order > MAX_PALEY:
                break
            if _paley_prime(order) is not None:
                return Factors(blocks, order, size // (blocks * order))
    return Factors(odd, 1, 1 << twos)


def _paley_prime(order: int) -> int | None:
    """The prime of which a matrix of that order is made; None where there is none."""
    if order % 4:
        return None
    if _is_prime(order - 1):
        return order - 1
    half = order // 2 - 1
    return half if half % 4 == 1 and _is_prime(half) else None


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, isqrt(number) + 1))


@lru_cache(maxsize=16)
def paley(order: int) -> Matrix:
    """Paley's matrix of an order for which `factors_of` names it; that of order 1 is (1)."""
    if order == 1:
        return ((1,),)
    prime = _paley_prime(order)
    assert prime is not None, order
    squares = {i * i % prime for i in range(1, prime)}
    jacobsthal = [[_symbol(i - j, prime, squares) for j in range(prime)] for i in range(prime)]
    if prime % 4 == 3:
        first = (1,) * order
        rows = [(-1, *(value + (i == j) for j, value in enumerate(row))) for i, row in enumerate(jacobsthal)]
        return (first, *rows)
    conference = [[0] + [1] * prime, *([1, *row] for row in jacobsthal)]
    size = prime + 1
    whole = [[0] * (2 * size) for _ in range(2 * size)]
    for i in range(size):
        for j in range(size):
            block = ((1, -1), (-1, -1)) if i == j else _times(conference[i][j])
            for a in range(2):
                for b in range(2):
                    whole[2 * i + a][2 * j + b] = block[a][b]
    return tuple(map(tuple, whole))


def _symbol(number: int, prime: int, squares: set[int]) -> int:
    """Legendre's symbol: 1 for squares modulo the prime, -1 for others, 0 for its multiples."""
    rest = number % prime
    return 0 if rest == 0 else 1 if rest in squares else -1


def _times(value: int) -> tuple[tuple[int, int], tuple[int, int]]:
    return ((value, value), (value, -value))


@lru_cache(maxsize=64)
def signs(size: int) -> tuple[int, ...]:
    """A sign for each of `size` places: the top bit of SplitMix64's outputs from seed 0 on, 1 where it is set.

    Without signs, what all channels share would end in a single one. The generator: G. Steele, D. Lea, C. Flood, Fast
    splittable pseudorandom number generators, 2014.
    """
    return tuple(1 if _splitmix64(i) >> 63 else -1 for i in range(size))


_MASK = (1 << 64) - 1


def _splitmix64(index: int) -> int:
    """The output with that number, counted from 0."""
    z = (index + 1) * 0x9E3779B97F4A7C15 & _MASK
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK
    return z ^ (z >> 31)
