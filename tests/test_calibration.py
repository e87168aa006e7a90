"""examples/calibration.py: exact networks are found calibrated, others are not."""
import math

import torch
import torch.nn.functional as F
from helpers import fails, generator, make

from examples import calibration
from examples.calibration import MASK, TIMES, Circle, agreement, coins_first, latent_first
from sawtooth import Exact, L

TINY = dict(dataset='sawtooth', vocab_size=2, block_size=L)
N = 512
# of the mean of -log p + log(1 - p) of a token, which differs from its mean by less than log 99 / 2 for a
# triangle wave and is independent given the shift
ERROR = 5 * math.log(99) / 2 / (N * L) ** 0.5


def test_the_exact_denoiser_says_what_it_costs():
    """Whatever the latent says, and that is nothing at t = 1 and the shift at t = 0."""
    found = calibration.calibration(Circle(4), N)
    assert all(abs(entropy - nll) < ERROR for entropy, nll, *_ in found)
    (first, _, wave, _), (last, _, most, _) = found[0], found[-1]
    assert abs(first - math.log(2)) < 1e-3 and wave < 0.01
    assert abs(last - Exact().oracle()) < 1e-3 and most > 0.24
    assert agreement(Circle(1), N) < 5 / N**0.5


class Hasty(Circle):
    """Takes a start from noise for a latent that has already begun to move."""
    def joint_denoise(self, x_t, z_t, t, where):
        return super().joint_denoise(x_t, z_t, t.clamp(max=0.9), where)


def test_who_reads_noise_pays_for_it():
    found = dict(zip(TIMES, calibration.calibration(Hasty(4), N)))
    entropy, nll, wave, bias = found[1]
    assert entropy < math.log(2) - 0.1 and nll > math.log(2) + 0.1 and wave > 0.2
    assert bias < 5 * 0.5 / N**0.5  # no shift is favoured
    assert abs(found[0.5][0] - found[0.5][1]) < ERROR and agreement(Hasty(4), N) > 0.9


def moves(sampler, steps, **options):
    """Four texts, and the (z, t) of all calls, for a latent that counts steps; an odd one says 1."""
    seen = []

    def denoise(x_t, z_t, t, where):
        seen.append((int(z_t[0, 0]), float(t)))
        logits = F.one_hot(z_t[:, 0] % 2, 2).float().log()[:, None]
        return logits.expand(-1, x_t.shape[1], -1)[where], None

    def latent_step(z, prediction, t, s):
        return torch.full_like(z, 10) if s == 0 else z + 1
    x = sampler(denoise, torch.full((4, L), MASK), torch.zeros(4, 1).long(), steps, latent_step,
                generator=generator(), **options)
    return x, seen


def test_the_latent_goes_first():
    x, seen = moves(latent_first, 2)
    assert seen == [(0, 1), (1, 0.5), (1, 0.5), (10, 0)] and set(x.unique().tolist()) == {0, 1}
    x, seen = moves(latent_first, 2, clean=True)
    assert seen == [(0, 1), (10, 0), (1, 0.5), (10, 0)] and (x == 0).all()


def test_the_exact_answer_at_the_start_is_a_coin():
    x, seen = moves(coins_first, 1)
    assert seen == [(0, 1)] and abs(x.float().mean() - 0.5) < 5 * 0.5 / x.numel() ** 0.5
    x, seen = moves(coins_first, 2)
    assert seen == [(0, 1), (1, 0.5)] and x.float().mean() > 0.6  # the second half are all 1


def test_the_report(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make('co', 'out/x', dtype='float32', **TINY)
    make('di', 'out/di', dtype='float32', **TINY)
    make('mdlm', 'out/mdlm', **TINY)
    calibration.main(['out/x', 'out/di', '3', '--num_samples=8'])
    out = capsys.readouterr().out
    assert out.count('SWD from 8 samples') == 3 and 'exact, radius 3' in out
    for argv in ([], ['out/mdlm'], ['out/none']):
        fails(calibration, monkeypatch, capsys, *argv, keys=calibration.Config)
