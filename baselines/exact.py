"""
The samplers of this folder with exact networks, on the coin flips of sawtooth.py: what each method can do,
apart from how well it trains.

`exact` is sawtooth.Exact: a posterior over the shift, given evidence about each token. Every method shows its
network such evidence, so Bayes' rule says what the best network would answer:

    exact.predict           p(x_l = 1 | evidence everywhere, or everywhere but at l): FLM, Duo, CANDI, CADD
    exact.log_likelihood    the posterior itself, from which VADD's z picks a shift
    exact.denoise           p(x_l = 1 | visible tokens): SSMD's draft
    exact.after             p(x_l = 1 | visible tokens before l in an order): SSMD's target, and DCD

A function draws n texts (n, L) with the generator g. Token 2 is [mask].
"""
from functools import partial

import torch

from baselines import cadd, candi, dcd, duo, flm, ssmd
from mdlm import alpha, ancestral, time_grid

R_OF_CANDI = 0.1, 0.4  # r_min and r_max in config/sawtooth_candi.py


def all_masked(exact, n):
    return torch.full((n, exact.p.shape[1]), 2)


def draw_flm(exact, n, steps, g):
    """Its states are one-hot with noise, z (n, L, 2)."""
    signal, t = flm.Times(2).signal, 1 - time_grid(steps)[:-1].float()

    def denoise(z, t):
        c = float(signal(torch.tensor(t)))
        p = exact.predict(torch.tanh(c * (z[..., 1] - z[..., 0]) / (1 - c) ** 2 / 2))
        return torch.stack((1 - p, p), dim=-1), (p > 0.5).long()
    z = torch.randn(n, exact.p.shape[1], 2, generator=g)
    return flm.euler(denoise, z, t.tolist(), signal(t).tolist())


def draw_duo(exact, n, steps, g, tail='ancestral'):
    def denoise(z, alpha):
        p = exact.predict((2.0 * z - 1) * float(alpha), leave_one_out=True).double()
        drawn = torch.rand(z.shape, generator=g) < p
        return torch.where(z == 1, p, 1 - p), drawn.long(), (p > 0.5).long()
    z = torch.randint(2, (n, exact.p.shape[1]), generator=g)
    return duo.reverse(denoise, z, 2, *duo.plan(steps, 'ancestral'), tail, g)


def draw_candi(exact, n, steps, g, sampler='drawn'):
    """Its hints are one-hot with noise, z (n, L, 2)."""
    ts = time_grid(steps)
    sigmas, _ = candi.sigma(ts, *R_OF_CANDI)

    def denoise(x, z, t):
        hint = torch.tanh((z[..., 1] - z[..., 0]) / candi.sigma(t, *R_OF_CANDI)[0].float() ** 2 / 2)
        p = exact.predict(torch.where(x == 2, hint, 2.0 * x - 1))
        drawn = (torch.rand(p.shape, generator=g) < p).long()
        p = p if sampler == 'mean' else drawn.float()
        return drawn, torch.stack((1 - p, p), dim=-1)
    x = all_masked(exact, n)
    z = sigmas[0].float() * torch.randn(*x.shape, 2, generator=g)
    return candi.hinted(denoise, x, z, ts, alpha(ts), sigmas, 2, g)


def draw_vadd(exact, n, steps, g, fixed_z=False):
    """z says which quantile of the shift's posterior the tokens follow."""
    first = torch.rand(n, 1, generator=g)

    def denoise(x_t, where):
        z = first if fixed_z else torch.rand(n, 1, generator=g)
        below = exact.log_likelihood(x_t).softmax(dim=1).cumsum(dim=1) < z
        p1 = exact.p[below.sum(dim=1).clamp(max=len(exact.p) - 1)][where]
        return torch.stack((1 - p1, p1), dim=1).log()
    return ancestral(denoise, all_masked(exact, n), alpha(time_grid(steps)), 2, generator=g)


def draw_cadd(exact, n, steps, g):
    """Its hints have one dimension, in which the two words are -1 and 1."""
    def denoise(x, z, alpha_t):
        hints = torch.tanh(float(alpha_t) ** 0.5 * z[..., 0] / (1 - float(alpha_t)))
        p = exact.predict(torch.where(x == 2, hints, 2.0 * x - 1))
        return (torch.rand(x.shape, generator=g) < p).long(), (2 * p - 1)[..., None]
    x = all_masked(exact, n)
    z = torch.randn(*x.shape, 1, generator=g)
    return cadd.hinted(denoise, x, z, alpha(time_grid(steps)), 2, g)


def draw_ssmd(exact, n, steps, g, speculative=False):
    """Its states are the probabilities themselves, (n, L, 2). speculative: as many calls as it takes."""
    def backbone(x_t):
        return exact.denoise(x_t, torch.ones_like(x_t, dtype=torch.bool)).exp().view(*x_t.shape, 2)

    def causal(y, h, order, a, cache):
        p = exact.after(y, order, a)
        return torch.stack((1 - p, p), dim=2)

    def probs(states):
        yield slice(None), states.double()
    x = all_masked(exact, n)
    order = torch.rand(x.shape, generator=g).argsort(dim=1)
    return ssmd.speculate(backbone, causal, probs, x, order, 2, None if speculative else steps, generator=g)


def draw_dcd(exact, n, steps, g, correction=1.0):
    """With correction 0, AR alone draws what a step reveals: nothing looks to the right."""
    def write(x_t):
        both = exact.log_likelihood(x_t).softmax(dim=1) @ exact.p
        left = exact.after(x_t, torch.arange(x_t.shape[1]).expand_as(x_t))
        x, log_p, odds = x_t.clone(), torch.zeros(n, len(exact.p)), correction * (both.logit() - left.logit())
        for l in range(x_t.shape[1]):
            p1 = ((log_p.softmax(dim=1) @ exact.p[:, l]).logit() + odds[:, l]).sigmoid()  # AR's, corrected
            drawn = torch.rand(n, generator=g) < p1
            x[:, l] = torch.where(x[:, l] == 2, drawn, x[:, l])
            log_p += x[:, l, None] * exact.log_ratio[l] + exact.log_p0[l]
        return x
    return dcd.reveal_some(write, all_masked(exact, n), alpha(time_grid(steps)), 2, g)


EXACT_SAMPLERS = {
    'FLM': draw_flm,
    'Duo': draw_duo, 'Duo, greedy tail': partial(draw_duo, tail='greedy'),
    'CANDI': draw_candi, 'CANDI, mean': partial(draw_candi, sampler='mean'),
    'VADD': draw_vadd, 'VADD, fixed z': partial(draw_vadd, fixed_z=True),
    'CADD': draw_cadd,
    'SSMD': draw_ssmd, 'SSMD, speculative': partial(draw_ssmd, speculative=True),
    'DCD': draw_dcd, 'DCD, AR alone': partial(draw_dcd, correction=0.0)}
