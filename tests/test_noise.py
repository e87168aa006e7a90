"""lib/noise.py: every number is a function of (seed, step, global row, name), and has the law it claims.

Bounds are 4.5 standard errors of the statistic (two-sided chance of failure 7e-6, and the seeds are fixed).
"""
import math

import pytest
import torch
from helpers import chi_square

from lib.noise import Noise, seed_of


def batch(seed=0, step=0, total=2**16):
    return Noise(seed, step, torch.arange(total), total)


def test_uniform_has_its_law():
    u = batch(total=2**14).uniform('u', 64).double()
    n = u.numel()
    assert u.min() > 0 and u.max() < 1
    assert abs(u.mean() - 1 / 2) < 4.5 * (1 / 12 / n) ** 0.5
    assert abs(u.var() - 1 / 12) < 4.5 * (1 / 180 / n) ** 0.5
    assert chi_square(torch.histc(u, 1024, 0, 1), torch.ones(1024)) < 4.5
    low_bits = (u.flatten() * 2**23).long() % 256  # the hash is good down to the last bit that is kept
    assert chi_square(low_bits.bincount(minlength=256), torch.ones(256)) < 4.5


def test_normal_has_its_law():
    z = batch(total=2**14).normal('z', 64).double()
    n = z.numel()
    assert abs(z.mean()) < 4.5 / n**0.5
    assert abs((z**2).mean() - 1) < 4.5 * (2 / n) ** 0.5
    assert abs((z**3).mean()) < 4.5 * (15 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 4.5 * (96 / n) ** 0.5
    for x in (1, 2, 3, 4):  # tails
        p = math.erfc(x / 2**0.5)
        assert abs((z.abs() > x).sum() - n * p) < 4.5 * (n * p) ** 0.5 + 1


@pytest.mark.parametrize('a, b', [
    (batch().uniform('a'), batch().uniform('b')),
    (batch().uniform('mask', 4), batch().uniform('z_mask', 4)),
    (batch().uniform('t_x'), batch().uniform('t_z')),
    (batch().uniform('a'), batch().uniform('a', 1)[:, 0]),
    (batch(seed=0).uniform('a'), batch(seed=1).uniform('a')),
    (batch(step=0).uniform('a'), batch(step=1).uniform('a')),
    (batch(seed=0, step=1).uniform('a'), batch(seed=1, step=0).uniform('a')),
    (batch().uniform('a')[:-1], batch().uniform('a')[1:]),
    (batch().uniform('a', 8)[:-1], batch().uniform('a', 8)[1:]),
    (batch().uniform('a', 8)[:-1, 1:], batch().uniform('a', 8)[1:, :-1]),
    (batch().uniform('a', 8)[:, :-1], batch().uniform('a', 8)[:, 1:]),
], ids=['names', 'names, many', 'names, alike', 'shapes', 'seeds', 'steps', 'seed and step', 'rows',
        'rows, many', 'diagonal', 'columns'])
def test_draws_are_independent(a, b):
    """Pairs fill a 16 x 16 grid evenly, which is more than being uncorrelated."""
    pairs = (a * 16).long() * 16 + (b * 16).long()
    assert chi_square(pairs.flatten().bincount(minlength=256), torch.ones(256)) < 4.5


def test_one_name_is_one_draw():
    noise = batch(total=8)
    assert torch.equal(noise.uniform('a', 3), noise.uniform('a', 3))
    assert torch.equal(noise.uniform('a', 6).view(8, 2, 3), noise.uniform('a', 2, 3))


@pytest.mark.parametrize('world', [1, 2, 3, 4])
def test_processes_hold_rows_of_one_batch(world):
    """Rank r of W draws what a single process draws for the rows r, r + W, ..."""
    whole = batch(seed=5, step=7, total=12)
    for rank in range(world):
        mine = Noise(5, 7, torch.arange(rank, 12, world), 12)
        for draw in (lambda n: n.uniform('a', 2, 3), lambda n: n.normal('a', 5), lambda n: n.uniform('a'),
                     lambda n: n.times('t'), lambda n: n.times('t', shuffled=False)):
            assert torch.equal(draw(mine), draw(whole)[rank::world])
            assert torch.equal(draw(whole[rank::world]), draw(mine))
        assert torch.equal(mine.permutation('p', 9), whole.permutation('p', 9))


@pytest.mark.parametrize('total', [1, 7, 64])
def test_times_take_one_from_every_stratum(total):
    for step in range(20):
        t = batch(step=step, total=total).times('t_x')
        assert sorted((t * total).long().tolist()) == list(range(total))


def test_times_that_are_not_shuffled_are_evenly_spaced_in_every_share():
    """A process or a micro-batch, whichever its share, has the times of a batch of that size."""
    for parts in (1, 2, 8):
        for step in range(20):
            for part in range(parts):
                t = Noise(0, step, torch.arange(16)[part::parts], 16).times('t_x', shuffled=False)
                assert sorted((t * (16 // parts)).long().tolist()) == list(range(16 // parts))


@pytest.mark.parametrize('shuffled', [True, False])
def test_time_of_a_row_is_uniform(shuffled):
    steps = [batch(step=step, total=16) for step in range(2000)]
    t = torch.stack([noise.times('t_x', shuffled) for noise in steps])  # (steps, rows)
    for row in (0, 7, 15):
        assert chi_square(torch.histc(t[:, row], 20, 0, 1), torch.ones(20)) < 4.5


@pytest.mark.parametrize('shuffled', [True, False])
def test_times_of_two_channels_are_independent(shuffled):
    """One may do without shuffling. If both did, their difference would be one constant over the batch."""
    steps = [batch(step=step, total=16) for step in range(2000)]
    x = torch.stack([noise.times('t_x', shuffled) for noise in steps])
    z = torch.stack([noise.times('t_z') for noise in steps])
    assert ((x - z) % 1).std(dim=1).min() > 0.05
    for row in (0, 7, 15):
        pairs = (x[:, row] * 8).long() * 8 + (z[:, row] * 8).long()
        assert chi_square(pairs.bincount(minlength=64), torch.ones(64)) < 4.5
    # within a batch, the rank of a row in one channel says nothing about its rank in the other
    assert abs(((x - x.mean(1, True)) * (z - z.mean(1, True))).mean() * 12) < 4.5 / (2000 * 15) ** 0.5


def test_times_are_never_zero_or_one():
    """u + pi / B that rounds to 1 would wrap to t = 0, where the weight 1 / t is infinite.

    It happened in B of 2^23 batches.
    """
    for step in range(60):
        t = batch(step=step, total=2**16).times('t_x')
        assert t.min() > 0 and t.max() < 1


def test_permutation_is_uniform():
    orders = torch.stack([batch(step=step, total=1).permutation('p', 4) for step in range(4800)])
    codes = (orders * torch.tensor([64, 16, 4, 1])).sum(dim=1)
    counts = codes.unique(return_counts=True)[1]
    assert len(counts) == 24 and chi_square(counts, torch.ones(24)) < 4.5


def test_seeds_differ_in_the_32_bits_that_a_cpu_takes():
    """2,000 of 2^32 values: the chance of a single pair of equal ones is 1 in 2,000."""
    numbers = [(0, step, 0) for step in range(0, 2**16 * 1000, 2**16)]
    numbers += [(seed, 7, rank) for seed in (0, 1, 2**62, -1) for rank in range(125)]
    numbers += [(1 << bit, 0, 0) for bit in range(1, 63)]
    seeds = [seed_of(*n) for n in numbers]
    assert len({s % 2**32 for s in seeds}) == len(numbers)
    for bit in range(32):
        assert abs(sum(s >> bit & 1 for s in seeds) - len(seeds) / 2) < 4.5 * len(seeds)**0.5 / 2
