"""
FLM: a flow from noise to one-hot tokens (Lee et al., 2026, arXiv:2602.16813).

    forward     z = (1 - c) eps + c e_x, one-hot e_x, eps ~ N(0, I); c = g(t) is chosen so that the largest
                entry of z is the token itself with probability t + (1 - t) / V
    denoiser    a DiT that sees z E, E being the embedding, and t, and gives p(x_l | z) at every position
    loss        E_t  sum over all l of  -log p_theta(x_l | z),  without weights
    sampler     the flow itself, dz/dc = (p - z) / (1 - c), by Euler's rule from t = 0; at the end,
                the likeliest tokens. Nothing is random after the start.
    bound       -log p(x) <= integral of m E|e_x - p|^2 dm + E[-log p(x | z at the end)], m = c / (1 - c);
                ours, of the flow with noise in every step, not of the sampler above

The network and the sampler need z only as y = z E, and every step is linear in z. So nothing has shape
(b, L, V): noise is drawn in the d dimensions of the embedding, and p becomes its mean embedding p E, a
few rows at a time. Read in this order: identified, Times, euler, class FLM.

Where we differ from the released code: its states are (b, L, V) in fp32, 12 GiB for 64 texts of 1024 words.
Its g is a spline through 100-point quadrature, which is off by 1e-4 and negative near t = 0; ours is
quadrature to 1e-11. Its attention has a soft cap of 50, and its time embedding takes t, ours 1000 t. It has
no likelihood. The distillation to a flow map (FMLM) is not here.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn

from lib.configurator import Keys, key
from lib.method import Method
from mdlm import time_grid, wide
from model import DiT, head_cross_entropy, head_logits, head_nll

# ------------------------------------------------------------------------------------------------------------
# what can be told from noise

def identified(m, V):
    """How surely the true one of V coordinates is the largest: its mean is m, the others' 0, all variances 1.

    alpha(m) = (V P - 1) / (V - 1), P the probability of being largest: 0 if it is a guess, 1 if it is sure.
    m (...,) -> alpha and its derivative, fp64 (...,)
    """
    e = torch.linspace(-9, 9, 181, dtype=wide(m.device), device=m.device)
    others = ((V - 1) * torch.special.log_ndtr(e + m.to(e)[..., None])).exp()          # (..., 181)
    density = torch.exp(-e**2 / 2) * 0.1 / (2 * torch.pi) ** 0.5
    return (V * (others @ density) - 1) / (V - 1), V / (V - 1) * (others @ (e * density))


def mean_at(alpha, V):
    """The inverse of alpha(m), by bisection: alpha (...,) -> m, fp64 (...,)."""
    low = torch.zeros_like(alpha, dtype=wide(alpha.device))
    high = torch.full_like(low, 20.0)
    for _ in range(50):
        middle = (low + high) / 2
        below = identified(middle, V)[0] < alpha
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def interpolate(x, xs, ys):
    """Linear interpolation in a table with rising xs -> y, dy/dx. Beyond its ends, the last piece goes on."""
    i = torch.searchsorted(xs, x.contiguous()).clamp(1, len(xs) - 1)
    slope = (ys[i] - ys[i - 1]) / (xs[i] - xs[i - 1])
    return ys[i - 1] + slope * (x - xs[i - 1]), slope


class Times(nn.Module):
    """g(t), and times for the bound, in a table that ends where one token in 10,000 cannot be told."""

    def __init__(self, V, points=2001):
        super().__init__()
        m = mean_at(torch.tensor(1 - 1e-4), V)
        c = torch.linspace(0, 1, points, dtype=torch.float64) * m / (1 + m)
        m = c / (1 - c)
        t = identified(m, V)[0].clamp(min=0)
        # |e_x - p|^2 is about 1 with probability 1 - t, else 0: times of density m sqrt(1 - t) in m have the
        # least variance
        density = (1 - (t[1:] + t[:-1]) / 2).sqrt() * (m[1:].square() - m[:-1].square())
        share = torch.cat((density[:1] * 0, density.cumsum(dim=0) / density.sum()))
        for name, table in dict(c=c, m=m, t=t, share=share).items():
            self.register_buffer(name, table.float(), persistent=False)

    def signal(self, t):
        """g(t): t (...,) in [0, 1] -> c, of the same shape."""
        return interpolate(t.clamp(max=self.t[-1]), self.t, self.c)[0]

    def of_bound(self, u):
        """u ~ U(0, 1) (b,) -> t, m, and dm/du."""
        m, weight = interpolate(u, self.share, self.m)
        return interpolate(m, self.m, self.t)[0], m, weight


def embedded_noise(E, L, normal):
    """eps E for eps ~ N(0, I_V), E (V, d): Gaussian with covariance E^T E = R^T R, where E = Q R, R (d, d).

    normal(*shape) -> N(0, 1) of shape (b, *shape); -> (b, L, d), fp32
    """
    with torch.autocast(E.device.type, enabled=False):
        if len(E) < 2 * E.shape[1]:  # few words: R might be singular, and eps is small
            return normal(L, len(E)) @ E
        return normal(L, E.shape[1]) @ torch.linalg.qr(E).R


# ------------------------------------------------------------------------------------------------------------
# the sampler: a pure function over `denoise(y, t) -> p E (n, L, d), likeliest tokens (n, L)`

def euler(denoise, y, ts, cs, callback=None):
    """Follows y = z E (n, L, d) from noise along times ts and their cs = g(ts), two lists -> ids (n, L)."""
    for i, (t, c) in enumerate(zip(ts, cs)):
        mean, x = denoise(y, t)
        if i + 1 < len(cs):
            y = y + (cs[i + 1] - c) / (1 - c) * (mean - y)
        if callback:
            callback(i, x, None)
    return x


# ------------------------------------------------------------------------------------------------------------
# the method

@dataclass
class Config(Keys):
    vocab_size: int = 0  # from the data
    block_size: int = key(0, at_least=0)  # L
    hidden: int = key(384, at_least=1)
    num_layers: int = key(6, at_least=1)
    num_heads: int = key(6, at_least=1, meaning=True)
    cond_dim: int = key(128, at_least=1)
    dropout: float = key(0.0, at_least=0, below=1)


class Unmasked(Method):
    """What FLM and Duo have in common: no [mask], and a network that is told the time."""
    likelihood = 'bound'

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.embed = nn.Embedding(c.vocab_size, c.hidden)
        self.dit = DiT(c.hidden, c.num_layers, c.num_heads, c.cond_dim, c.block_size, dropout=c.dropout)
        self.head = nn.Linear(c.hidden, c.vocab_size)
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def states(self, e, t):
        """Embedded text e (b, L, d), t (b,) -> (b L, d)."""
        return self.dit(e, t=[t]).flatten(0, 1)


class FLM(Unmasked):
    name, Config = 'FLM', Config
    samplers = {'euler': {}}

    def __init__(self, config):
        super().__init__(config)
        self.times = Times(config.vocab_size)

    def corrupt(self, x, c, noise, name='noise'):
        """x (b, L), c (b,) -> y = z E (b, L, d). name: of the noise."""
        c = c[:, None, None]
        eps = embedded_noise(self.embed.weight, x.shape[1], lambda *shape: noise.normal(name, *shape))
        return (1 - c) * eps + c * self.embed(x)

    def forward(self, x, noise):
        """Training loss per token of x (b, L) int64, and logs."""
        t = noise.times('t')
        h = self.states(self.corrupt(x, self.times.signal(t), noise), t)
        loss = head_cross_entropy(self.head, h, x.flatten())
        return loss, {'loss': loss.detach()}

    def nll_parts(self, x, noise, strategy='joint', z_0=None):
        """The bound, its integral estimated at one time: nats (b,)."""
        self.sampling_options(strategy)  # ValueError for an unknown one
        t, m, weight = self.times.of_bound(noise.times('t'))
        h = self.states(self.corrupt(x, m / (1 + m), noise), t)
        nats = (m * weight)[:, None] * squared_error(self.head, h, x.flatten()).view(x.shape)
        t, c = (table[-1].expand(len(x)) for table in (self.times.t, self.times.c))
        h = self.states(self.corrupt(x, c, noise, 'noise at the end'), t)
        return {'val': (nats + head_nll(self.head, h, x.flatten()).view(x.shape)).sum(dim=1)}

    def denoise(self, y, t):
        """y (n, L, d), t a number -> p E (n, L, d), and the likeliest tokens (n, L)."""
        E, means, ids = self.embed.weight, [], []
        for _, logits in head_logits(self.head, self.states(y, y.new_full((1,), t))):
            p = logits.softmax(dim=-1)
            with torch.autocast(E.device.type, enabled=False):
                means.append(p @ E)
            ids.append(p.argmax(dim=-1))
        return torch.cat(means).view(y.shape), torch.cat(ids).view(y.shape[:2])

    @torch.no_grad()
    def sample(self, n, steps, strategy='', sampler='', generator=None, callback=None, **options):
        """-> ids (n, L). callback(step, x, None) sees the likeliest tokens of every step.

        With one step they are the most frequent token everywhere: the first noise says nothing.
        """
        self.sampling_options(strategy, sampler, **options)
        device, E, L = self.head.weight.device, self.embed.weight, self.config.block_size
        t = 1 - time_grid(steps, device)[:-1].float()
        y = embedded_noise(E, L, lambda *shape: torch.randn(n, *shape, device=device, generator=generator))
        return euler(self.denoise, y, t.tolist(), self.times.signal(t).tolist(), callback)


def squared_error(head, h, targets):
    """h (R, d), targets (R,) -> |e_x - p|^2 = 1 - 2 p_x + sum p^2, fp32 (R,)."""
    parts = []
    for rows, logits in head_logits(head, h):
        p = logits.softmax(dim=-1)
        parts.append(1 - 2 * p.gather(1, targets[rows, None])[:, 0] + p.square().sum(dim=1))
    return torch.cat(parts)
