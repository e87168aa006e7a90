"""
Random numbers that depend on (seed, step, global row) and on nothing else.

The data, times and masks of a training step are drawn here. Of W processes, number r holds the rows r,
r + W, r + 2W, ... of the global batch, and draws exactly the numbers that a single process would draw for
them, on any device. So W processes with b rows each equal one process with Wb rows, a run may resume on a
different number of processes, and a checkpoint needs no random state.
"""
import math
import zlib

import torch


def hash64(x):
    """The finaliser of splitmix64 (Steele et al., 2014), elementwise: int64 -> int64.

    Products wrap around; the masks turn arithmetic shifts into logical ones.
    """
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47  # = 0xBF58476D1CE4E5B9 as a signed number
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15  # = 0x94D049BB133111EB
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def seed_of(*numbers):
    """One seed for a torch generator from several integers.

    Every bit of it depends on all of them, since the CPU's generator reads only 32 bits of its seed.
    """
    seed = torch.zeros((), dtype=torch.int64)
    for number in numbers:
        seed = hash64(seed + number)
    return seed.item()


def unit(bits):
    """Random bits, int64 -> U(0, 1), float32, from their upper 23; never exactly 0 or 1."""
    return (((bits >> 41) & 0x7FFFFF) + 0.5) * 2.0**-23


@torch.compiler.assume_constant_result
def name_key(name):
    return zlib.crc32(name.encode())


class Noise:
    """The randomness of one training step, or of one evaluation, for the rows that this process holds.

    seed, step: ints;  rows: int64 (b,), the rows' numbers in the global batch, which has `total` rows

    Every draw has a name: the same name gives the same numbers again, other names independent ones.
    """

    def __init__(self, seed, step, rows, total):
        self.seed, self.step, self.rows, self.total = seed, step, rows, total
        # as tensors, because a step compiled for Python numbers would be recompiled whenever they change
        self.keys = rows.new_full((), seed), rows.new_full((), step)

    def _bits(self, name, rows, shape=()):
        """Random bits, int64 (len(rows), *shape)."""
        seed, step = self.keys
        key = hash64(hash64(hash64(torch.full_like(seed, name_key(name))) + seed) + step)
        row_keys = hash64(key + hash64(rows + 1))
        if not shape:
            return row_keys
        # splitmix64 steps by the golden ratio
        columns = torch.arange(1, math.prod(shape) + 1, device=rows.device) * -0x61C8864680B583EB
        return hash64(row_keys[:, None] + columns).view(len(rows), *shape)

    def uniform(self, name, *shape):
        """U(0, 1), float32 (b, *shape); never exactly 0 or 1."""
        return unit(self._bits(name, self.rows, shape))

    def normal(self, name, *shape):
        """N(0, 1), float32 (b, *shape), by inverting its distribution function; all are within +-5.3."""
        return torch.special.ndtri(self.uniform(name, *shape))

    def times(self, name, shuffled=True):
        """Low-discrepancy times (Kingma et al., 2021): t_b = (u + pi(b) / B) mod 1, float32 (b,).

        B is the size of the *global* batch: each of B equal strata has one time. pi is a new permutation
        for each name, or the identity with shuffled=False, which makes the rows r, r+W, r+2W, ... a
        low-discrepancy batch of their own. Of two channels, at most one may be unshuffled: otherwise
        their times would differ by one constant throughout the batch.
        """
        stratum = self.permutation(name, self.total)[self.rows] if shuffled else self.rows
        offset = unit(self._bits(name + ' offset', self.rows.new_zeros(1)))
        return ((offset + stratum / self.total) % 1).clamp(min=2.0**-24)  # the ELBO's weight is infinite at 0

    def permutation(self, name, n):
        """A random order of 0 ... n-1, int64 (n,), the same in every process."""
        return self._bits(name + ' permutation', torch.arange(n, device=self.rows.device)).argsort()

    def __getitem__(self, keep):
        """The same numbers for some of the rows: `noise[2:5]` belongs to `x[2:5]`."""
        return Noise(self.seed, self.step, self.rows[keep], self.total)

    def draw(self, i):
        """New numbers for the same rows for each i > 0; draw(0) has those of this one."""
        return Noise(self.seed, self.step + i, self.rows, self.total)
