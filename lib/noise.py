"""
Random numbers that are functions of (seed, step, global row) and of nothing else.

Data, times and masks of a training step are drawn here. A process that holds rows r, r+W, r+2W, ... of the
global batch draws exactly the numbers that a single process would have drawn for them, on any device. So k
processes with a batch of b equal one process with a batch of kb, a run may resume on another number of
processes, and the checkpoint needs no random state.
"""
import math
import zlib

import torch


def hash64(x):
    """The finaliser of splitmix64 (Steele et al., 2014), elementwise: int64 -> int64.

    Products wrap around, and the masks make the shifts logical ones.
    """
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47  # = 0xBF58476D1CE4E5B9 as a signed number
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15  # = 0x94D049BB133111EB
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def unit(bits):
    """Random bits, int64 -> U(0, 1), float32, from the upper 23 of them; never exactly 0 or 1."""
    return (((bits >> 41) & 0x7FFFFF) + 0.5) * 2.0**-23


@torch.compiler.assume_constant_result
def name_key(name):
    return zlib.crc32(name.encode())


class Noise:
    """All randomness of one training step (or of one evaluation), for the rows of the global batch that this process holds.

    seed, step: ints;  rows: int64 (b,), the global row numbers held here;  total: rows of the global batch
    over all processes. Draws are named: two draws of one name are the same numbers, draws of different
    names are independent.
    """

    def __init__(self, seed, step, rows, total):
        self.seed, self.step, self.rows, self.total = seed, step, rows, total
        # as tensors: a compiled step that saw Python numbers would be recompiled for each new step
        self.keys = rows.new_full((), seed), rows.new_full((), step)

    def _bits(self, name, rows, shape=()):
        seed, step = self.keys
        key = hash64(hash64(hash64(torch.full_like(seed, name_key(name))) + seed) + step)
        row_keys = hash64(key + hash64(rows + 1))
        if not shape:
            return row_keys
        # the golden-ratio step of splitmix64
        columns = torch.arange(1, math.prod(shape) + 1, device=rows.device) * -0x61C8864680B583EB
        return hash64(row_keys[:, None] + columns).view(len(rows), *shape)

    def uniform(self, name, *shape):
        """U(0, 1), float32 (b, *shape); never exactly 0 or 1."""
        return unit(self._bits(name, self.rows, shape))

    def normal(self, name, *shape):
        """N(0, 1), float32 (b, *shape), by inverting the distribution function (cut off at 5.3 standard deviations)."""
        return torch.special.ndtri(self.uniform(name, *shape))

    def times(self, name, shuffled=True):
        """Low-discrepancy times (Kingma et al., 2021): t_b = (u + pi(b) / B) mod 1, float32 (b,).

        There is one t in each of B equal strata, B being the size of the *global* batch. pi is a fresh
        permutation for each name; with shuffled=False there is none, and rows r, r+W, r+2W ... are a
        low-discrepancy batch of their own. At most one of two channels may do without: otherwise their times
        would differ by the same constant in the whole batch.
        """
        stratum = self.permutation(name, self.total)[self.rows] if shuffled else self.rows
        offset = unit(self._bits(name + ' offset', self.rows.new_zeros(1)))
        return ((offset + stratum / self.total) % 1).clamp(min=2.0**-24)  # at 0 the ELBO's weight is infinite

    def permutation(self, name, n):
        """A random order of 0 ... n-1, int64 (n,), the same in every process."""
        return self._bits(name + ' permutation', torch.arange(n, device=self.rows.device)).argsort()

    def __getitem__(self, keep):
        """The same numbers for some of the rows: `noise[2:5]` goes with `x[2:5]`."""
        return Noise(self.seed, self.step, self.rows[keep], self.total)

    def draw(self, i):
        """Other numbers for the same rows, for each i > 0; draw(0) is this one."""
        return Noise(self.seed, self.step + i, self.rows, self.total)
