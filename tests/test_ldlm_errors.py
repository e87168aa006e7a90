"""examples/ldlm_errors.py, with the exact denoiser of texts that are coins."""
import math
from types import SimpleNamespace

import pytest
import torch
from helpers import fails, generator, make

from examples import ldlm_errors
from examples.ldlm_errors import TIMES, denoised_from, report
from ldlm import alpha_sigma


class Coins:
    """A latent of -1 or 1 for each token; E[z_0 | z_t] = tanh(alpha z_t / sigma^2)."""
    config = SimpleNamespace(tangent=3.0)

    def latents_of(self, x):
        return 2.0 * x[..., None] - 1

    def tokens(self, z):
        return (z[..., 0] > 0).long()

    def denoise(self, z_t, t, z_self):
        alpha, sigma = alpha_sigma(t.double().flatten()[0])
        return torch.tanh(alpha / sigma**2 * z_t).float()


X = torch.randint(2, (64, 256), generator=generator())


@pytest.mark.parametrize('t', TIMES[1:-1])
def test_errors_of_the_exact_denoiser(t):
    """Its squared error is E[1 - tanh^2], that of the best straight line sigma^2, since the variance is 1."""
    _, (first, second, alone) = denoised_from(Coins(), Coins().latents_of(X), t, 8, generator(1))
    alpha, sigma = (level.item() for level in alpha_sigma(torch.tensor(t, dtype=torch.float64)))
    eps = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    density = torch.exp(-eps**2 / 2) / math.sqrt(2 * math.pi) * (eps[1] - eps[0])
    errors = (torch.tanh(alpha / sigma**2 * (alpha + sigma * eps)) - 1).square()
    mean = (errors * density).sum()
    spread = ((errors.square() * density).sum() - mean**2).sqrt() / X.numel()**0.5
    assert abs(first - mean) < 5 * spread + 1e-3 * mean and first == second
    assert alone == pytest.approx(sigma**2, rel=0.01)  # the variance of 16,384 coins is not quite 1


def test_more_noise_leaves_less_of_the_text():
    """At t = 0 all of it, from t = 1 on no more than chance; the entropy is that of coins throughout."""
    teacher = SimpleNamespace(gen_ppl=lambda x: (2.0, x.numel()))
    rows = report(Coins(), X, teacher, 16)
    assert [row[0] for row in rows] == ['the texts', *(f't = {t}' for t in TIMES)]
    kept = [float(row[3]) for row in rows]
    assert kept[:2] == [1, 1] and kept[1:] == sorted(kept[1:], reverse=True)
    assert abs(kept[-1] - 0.5) < 5 * 0.5 / X.numel()**0.5
    assert all(abs(float(row[2]) - math.log(2)) < 0.01 for row in rows)


def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys):
    assert 'who scores them?' in fails(ldlm_errors, monkeypatch, capsys, keys=ldlm_errors.Config)
    make('mdlm', str(tmp_path))
    assert 'is no LDLM with a denoiser' in fails(
        ldlm_errors, monkeypatch, capsys, str(tmp_path), '--teacher=out/AR', keys=ldlm_errors.Config)
