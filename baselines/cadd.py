"""
CADD: masked diffusion with a noisy hint at every masked position (Zheng et al., 2025, arXiv:2510.01329).

    forward     MDLM's, and beside every token its embedding w(x_l) becomes the hint
                z_l = sqrt(alpha_t) w(x_l) + sqrt(1 - alpha_t) eps,  eps ~ N(0, I)
    denoiser    MDLM's, but it sees the time, and the hints where tokens are masked: p_theta(x_l | x_t, z_t)
    loss        E_t  -alpha'_t / (1 - alpha_t)  sum over masked l of -log p_theta(x_l | x_t, z_t)
    sampler     MDLM's for the tokens; from t to s the other hints move by the posterior q(z_s | z_t, w_hat),
                where w_hat is the mean of w under p (soft) or w of the likeliest token (hard)
    bound       E_t  -alpha'_t / (1 - alpha_t)  sum over masked l of
                [-log p_theta(x_l | x_t, z_t) + |w(x_l) - w_hat|^2 / (2 (1 - alpha_t))]

The loss alone is no bound: the hints were read off the text, and what they cost is missing. For a fair coin
it would be .336 nats instead of log 2. The second term is that cost, half of |d SNR / dt| |w - w_hat|^2 with
SNR = alpha / (1 - alpha); together they make the exact network's bound the entropy. `nll` is both, down to
t = T_MIN, where one more step reveals the rest.

The hints move beside the tokens, not before them. So the first step, for which they are pure noise, draws its
tokens independently, like MDLM's; after it the hints speak for what those tokens were, right or wrong. Even
with exact networks, few steps are worse than MDLM's.

Ours: hints have a few dimensions of their own, and w is standardised over the vocabulary. Hints as wide as
the network's embeddings, or free to grow, would give the tokens away at once.
"""
import functools
from dataclasses import dataclass

import torch
import torch.nn as nn

import mdlm
from lib.configurator import key
from mdlm import DRAW, MDLM, alpha, choose, draw_tokens, elbo_weight, pairs, time_grid, times_from
from model import head_logits

T_MIN = 1e-3  # of the bound's integral, whose weight goes as 1 / t^2


def move(z, w_hat, alpha_t, alpha_s, eps):
    """q(z_s | z_t = z, w = w_hat): z, w_hat, eps (..., D), alpha_t < alpha_s < 1 two numbers -> z_s."""
    a = alpha_t / alpha_s
    mean = alpha_s**0.5 * (1 - a) * w_hat + a**0.5 * (1 - alpha_s) * z
    return (mean + ((1 - alpha_s) * (1 - a) * (1 - alpha_t)) ** 0.5 * eps) / (1 - alpha_t)


def hinted(denoise, x, z, alphas, mask_id, generator=None, callback=None):
    """mdlm.ancestral with hints z (n, L, D): denoise(x, z, alpha) -> tokens (n, L), w_hat (n, L, D)."""
    for i, (alpha_t, alpha_s) in enumerate(pairs(alphas)):
        reveal, _ = choose(x, alpha_t, alpha_s, mask_id, generator=generator)
        tokens, w_hat = denoise(x, z, alpha_t)
        x = torch.where(reveal, tokens, x)
        if alpha_s < 1:
            eps = torch.randn(z.shape, device=z.device, generator=generator)
            z = move(z, w_hat, float(alpha_t), float(alpha_s), eps)
        if callback:
            callback(i, x, None)
    return x


@dataclass
class Config(mdlm.Config):
    hint_dim: int = key(16, at_least=1)  # D


class CADD(MDLM):
    name, Config = 'CADD', Config
    samplers = {'ancestral': DRAW | {'hint': key('soft', choices=('soft', 'hard'))}}

    def __init__(self, config):
        c = config
        super().__init__(c)
        self.words = nn.Embedding(c.vocab_size, c.hint_dim)
        self.hint_in = nn.Linear(c.hint_dim, c.hidden, bias=False)

    def w(self):
        """What the hints are of: (V, D), each coordinate with mean 0 and variance 1 over the vocabulary."""
        w = self.words.weight
        return (w - w.mean(dim=0)) / w.std(dim=0, correction=0)

    def states(self, x_t, z, masked_share):
        """x_t (b, L), hints z (b, L, D), 1 - alpha_t (b,), which is the network's time -> (b, L, d)."""
        hints = self.hint_in(z) * (x_t == self.mask_id)[..., None]
        return self.dit(self.embed(x_t) + hints, t=[masked_share])

    def noised_states(self, x, t, noise, name='eps'):
        """As MDLM's. name: of the hints' noise."""
        x_t, mask = self.corrupt(x, t, noise)
        a, w = alpha(t, self.config.schedule), self.w()[x]                             # (b,), (b, L, D)
        z = a[:, None, None].sqrt() * w + (1 - a[:, None, None]).sqrt() * noise.normal(name, *w.shape[1:])
        return self.states(x_t, z, 1 - a), mask

    def w_hat(self, logits, hint='soft'):
        """(R, V) -> what is expected of w, (R, D)."""
        if hint == 'hard':
            return self.w()[logits.argmax(dim=-1)]
        with torch.autocast(logits.device.type, enabled=False):
            return logits.softmax(dim=-1) @ self.w()

    def nll_parts(self, x, noise, strategy='joint', z_0=None):
        """The bound, its integral estimated at one time: nats (b,)."""
        self.sampling_options(strategy)  # ValueError for an unknown one
        t = times_from(T_MIN, noise.times('t_x'))
        h, mask = self.noised_states(x, t, noise)
        error = torch.zeros(x.shape, device=x.device)
        w_hat = torch.cat([self.w_hat(logits) for _, logits in head_logits(self.head, h[mask])])
        error[mask] = (self.w()[x[mask]] - w_hat).square().sum(dim=-1)
        masked_share = 1 - alpha(t, self.config.schedule)
        nats = self.masked_nll(h, x, mask) + error.sum(dim=1) / (2 * masked_share)
        at_end, mask = self.noised_states(x, torch.full_like(t, T_MIN), noise, 'eps at the end')
        return {'val': (1 - T_MIN) * elbo_weight(t, self.config.schedule) * nats
                + self.masked_nll(at_end, x, mask)}

    def denoise(self, x_t, z, alpha_t, hint, draw, generator=None):
        """-> a token drawn for every masked position of x_t (n, L), and w_hat (n, L, D)."""
        mask, found = x_t == self.mask_id, []
        h = self.states(x_t, z, z.new_full((1,), 1 - alpha_t))
        for _, logits in head_logits(self.head, h[mask]):
            found.append((draw(logits, generator=generator), self.w_hat(logits, hint)))
        tokens, w_hat = (torch.cat(parts) for parts in zip(*found))
        return x_t.masked_scatter(mask, tokens), torch.zeros_like(z).masked_scatter(mask[..., None], w_hat)

    def fill_in(self, x, steps, sampler, hint, generator=None, callback=None, **options):
        draw = functools.partial(draw_tokens, **options)

        def denoise(x_t, z, alpha_t):
            return self.denoise(x_t, z, float(alpha_t), hint, draw, generator)
        z = torch.randn(*x.shape, self.config.hint_dim, device=x.device, generator=generator)
        alphas = alpha(time_grid(steps, x.device), self.config.schedule)
        return hinted(denoise, x, z, alphas, self.mask_id, generator, callback)
