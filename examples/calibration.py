"""
Joint LADD on sawtooth: is its token denoiser calibrated, and does it sample better where it is not?

    python -m examples.calibration out/A out/B ...    runs of LADD; a number is the exact Co-LADD whose latent
                                                      is the shift, as a point on a circle of that radius

For each of them: what the token predictions say and what they cost, by the latent's time; whether the tokens
of the first step follow what the network has read into pure noise; and the SWD of joint sampling and of what
it might be instead. RESULTS.md has what came out ("joint sampling that reads its own noise").
"""
import functools
import math
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from ladd import Vectors, abar, joint
from lib.configurator import Keys, UserError, configure, key, run
from lib.noise import Noise
from lib.plot import print_table
from mdlm import alpha, choose, draw_tokens, pairs, time_grid
from methods import open_run
from sawtooth import Exact, L, Sawtooth, swd

MASK = 2
TIMES = 1, 0.9999, 0.999, 0.99, 0.9, 0.5, 0  # of the latent, while all tokens are masked


@dataclass
class Config(Keys):
    num_samples: int = key(4096, at_least=1)  # for each SWD; calibration is of 1,024 at most


class Circle(Exact):
    """Exact Co-LADD with the shift as the latent: a point (1, 2) on a circle."""

    def __init__(self, radius):
        super().__init__()
        angle = 2 * math.pi * (torch.arange(len(self.p)) + 0.5) / len(self.p)
        self.z = radius * torch.stack((angle.cos(), angle.sin()), dim=1)  # (P, 2)
        self.channel = Vectors(SimpleNamespace(num_latents=1, latent_dim=2, latent_schedule='vp_sqrt'))

    def latents_of(self, x):
        """Drawn from p(shift | x)."""
        posterior, generator = self.log_likelihood(x).softmax(dim=1), torch.Generator().manual_seed(0)
        return self.z[torch.multinomial(posterior, 1, generator=generator)]

    def joint_denoise(self, x_t, z_t, t, where):
        a = abar(t).float()
        log_p = self.log_likelihood(x_t) + a / (1 - a**2) * (z_t[:, 0].float() @ self.z.T)
        posterior = log_p.softmax(dim=1)
        p1 = (posterior @ self.p)[where]
        return torch.stack((1 - p1, p1), dim=1).log(), (posterior @ self.z)[:, None]


# ------------------------------------------------------------------------------------------------------------
# joint sampling, and what it might be instead

def both_at_once(denoise, x, z, steps, latent_step, generator=None):
    """Joint sampling: one call in each step."""
    return joint(denoise, x, z, steps, alpha(time_grid(steps)), latent_step, MASK, generator=generator)


def latent_first(denoise, x, z, steps, latent_step, generator=None, clean=False):
    """The latent moves before the tokens are drawn, and they are given z_s: two calls in each step.

    clean: they are given z0_hat instead.
    """
    times, x = time_grid(steps), x.clone()
    for t, s, (alpha_t, alpha_s) in zip(times[:-1], times[1:], pairs(alpha(times))):
        reveal, _ = choose(x, alpha_t, alpha_s, MASK, generator=generator)
        _, prediction = denoise(x, z, t, reveal)
        z_s = latent_step(z, prediction, t, s)
        given = (latent_step(z, prediction, t, times[-1]), times[-1]) if clean else (z_s, s)
        logits, _ = denoise(x, *given, reveal)
        x[reveal], z = draw_tokens(logits, generator=generator), z_s
    return x


def coins_first(denoise, x, z, steps, latent_step, generator=None):
    """Joint sampling with the exact answer at t = 1 for the tokens: fair coins."""
    def calibrated(x_t, z_t, t, where):
        logits, prediction = denoise(x_t, z_t, t, where)
        return logits if t < 1 else torch.zeros_like(logits), prediction
    return both_at_once(calibrated, x, z, steps, latent_step, generator)


# {name: (sampler, its steps)}
ORDERS = {'joint': (both_at_once, (1, 2, 4, 8)),
          'joint, but fair coins at t = 1': (coins_first, (2, 4)),
          'latent first': (latent_first, (1, 2)),
          'latent first, tokens given z0_hat': (functools.partial(latent_first, clean=True), (2,))}


# ------------------------------------------------------------------------------------------------------------
# what is measured

def predicted(model, x, z, t):
    """p(x_l = 1 | x_t, z_t) for all l at one time: (n, L)."""
    logits, _ = model.joint_denoise(x, z, torch.tensor(float(t)), torch.ones_like(x, dtype=torch.bool))
    return logits.float().softmax(dim=1)[:, 1].view(x.shape)


def calibration(model, n):
    """For each of TIMES: entropy of the predictions, -log p of the texts, nats per token, |p - 1/2|, and the
    same of the mean over texts: above 0 if the predictions favour some shifts."""
    x, noise, found = Sawtooth('calibration').texts(n), Noise(0, 0, torch.arange(n), n), []
    nothing, z_0 = torch.full_like(x, MASK), model.latents_of(x)
    for t in TIMES:
        p = predicted(model, nothing, model.channel.corrupt(z_0, torch.full((n,), float(t)), noise), t)
        entropy = -(torch.special.xlogy(p, p) + torch.special.xlogy(1 - p, 1 - p)).mean()
        nll = -torch.where(x == 1, p, 1 - p).log().mean()
        waves = (p - 0.5).abs().mean(), (p.mean(dim=0) - 0.5).abs().mean()
        found.append([v.item() for v in (entropy, nll, *waves)])
    return found


def shift(p):
    """The likeliest shift of texts or predictions (n, L), as an angle (n,)."""
    exact = Exact()
    likelihood = p.double() @ exact.log_ratio.double() + exact.log_p0.sum(dim=0)  # autocast spares doubles
    return likelihood.argmax(dim=1) * (2 * math.pi / len(exact.p))


def sample(model, sampler, n, steps, batch=64):
    """n texts, (n, L), from a random start z_1 each: (n, ...)."""
    generator, texts, starts = torch.Generator().manual_seed(0), [], []
    step = functools.partial(model.channel.step, generator=generator)
    for i in range(0, n, batch):
        x = torch.full((min(batch, n - i), L), MASK)
        starts.append(model.channel.prior(len(x), 'cpu', generator))
        texts.append(sampler(model.joint_denoise, x, starts[-1], steps, step, generator=generator))
    return torch.cat(texts), torch.cat(starts)


def agreement(model, n):
    """Of the shift that the first step reads into noise with that of the tokens it draws: the mean cosine."""
    x, z_1 = sample(model, both_at_once, n, 1)
    return (shift(x) - shift(predicted(model, torch.full_like(x, MASK), z_1, 1))).cos().mean().item()


@torch.no_grad()
def report(name, model, n):
    def cells(values):
        return ['-' if v is None else f'{v:.4f}' for v in values]
    few = min(n, 1024)
    names = 'entropy of the token predictions', 'their -log p of the text', 'mean |p - 1/2|', '|mean p - 1/2|'
    rows = [[row, *cells(values)] for row, values in zip(names, zip(*calibration(model, few)))]
    print_table(name, [f't_z = {t}' for t in TIMES], rows, sys.stdout)
    print(f'agreement of predicted and drawn shift in one step: {agreement(model, few):.2f}')
    z_0 = model.channel.seen(model.latents_of(Sawtooth('calibration').texts(few)))
    length = z_0.norm(dim=-1)
    print(f'length of the latents: {length.mean():.2f} ± {length.std():.2f}\n', flush=True)
    calls, rows = (1, 2, 4, 8), []
    for order, (sampler, steps) in ORDERS.items():
        found = {T * (1 + order.startswith('latent')): swd(sample(model, sampler, n, T)[0]) for T in steps}
        rows.append([order, *cells(found.get(c) for c in calls)])
    print_table(f'SWD from {n:,} samples; calls of the denoiser', [*map(str, calls)], rows, sys.stdout)


def main(argv):
    c = configure(Config, [a for a in argv if a.startswith('-')])
    names = [a for a in argv if not a.startswith('-')]
    if not names:
        raise UserError('which runs? python -m examples.calibration out/A out/B ...')
    for name in names:
        if name.isdigit():
            report(f'exact, radius {name}', Circle(float(name)), c['num_samples'])
            continue
        method, config = open_run(name, 'cpu')
        if config['dataset'] != 'sawtooth' or 'seq' not in method.strategies:
            raise UserError(f'{name} is {config["method"]} on {config["dataset"]}; this is about ladd on '
                            'sawtooth')
        with torch.autocast('cpu', torch.bfloat16, enabled=config['dtype'] == 'bfloat16'):
            report(name, method, c['num_samples'])


if __name__ == '__main__':
    run(main, Config)
