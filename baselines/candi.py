"""
CANDI: masked diffusion in which a masked token still gives a hint of itself (Pynadath et al., 2025,
arXiv:2510.22510).

    forward     as MDLM's; where x_l is masked, one still sees z_l = e_x + sigma_t eps, one-hot e_x;
                sigma_t is such that one wrong entry exceeds the right one with probability
                r(sigma) = Phi(-1 / (sigma sqrt 2)) = r_min + (r_max - r_min) t
    denoiser    a DiT that sees the tokens, the hints and t, and gives p(x_l | all of these)
    loss        MDLM's
    sampler     from t to s: z moves along its flow, z += (sigma_s / sigma_t - 1)(z - e), e the one-hot
                of a token drawn from p (as published), or p itself; then tokens are revealed as in MDLM
    bound       MDLM's + E_t  1/2 |d(1 / sigma^2) / dt|  sum over masked l of  |e_x - p|^2
                + 1 / (2 sigma_1^2) for each token, as the sampler starts from N(0, sigma_1^2); ours

MDLM's loss alone is no bound: it does not pay for the hints that the tokens are given. The network and the
sampler need z only as z E, E being the embedding with rows of length 1; as in baselines/flm.py nothing has
shape (b, L, V). Read in this order: sigma, hinted, class CANDI.

Where we differ from the released code, which has these faults: it divides a step by sigma^2 of the next time,
and tells the network the next sigma; here both belong to the time that the hints have. It reveals a token
wherever noise over V + 1 words happens to hit it, at V = 2 a third of those that should stay masked; here a
coin decides. Its sigma has a factor (d - 1) / d and stays above .2, at V = 2 wrong by factors of 1.3 to 7.6;
here it is the formula above. Its steps have length 1 / N on a grid that starts at .999; here N steps go from
1 to 0. In the paper, eq. (14), a step is linear in sigma^2; linear in sigma is better if the noise is wide.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import mdlm
from baselines.flm import embedded_noise, squared_error
from lib.configurator import key
from mdlm import DRAW, MDLM, alpha, choose, elbo_weight, pairs, time_grid, token_probs
from model import head_logits


def sigma(t, r_min, r_max):
    """t in [0, 1] (...,) -> sigma, rising, and |d(1 / sigma^2) / dt|, each (...,)."""
    q = torch.special.ndtri(r_min + (r_max - r_min) * t)                               # -1 / (sigma sqrt 2)
    density = torch.exp(-q**2 / 2) / (2 * torch.pi) ** 0.5
    return -1 / (math.sqrt(2) * q), 4 * (r_max - r_min) * q.abs() / density


def hinted(denoise, x, y, ts, alphas, sigmas, mask_id, generator=None, callback=None):
    """Reveals the [mask]s of x (n, L), of which y = z E (n, L, d) are hints.

    denoise(x, y, t) -> tokens drawn (n, L), e E (n, L, d);  ts, alphas, sigmas: (steps + 1,)
    """
    for i, (alpha_t, alpha_s) in enumerate(pairs(alphas)):
        drawn, e = denoise(x, y, ts[i])
        y = y + (sigmas[i + 1] / sigmas[i] - 1).to(y) * (y - e)
        reveal, _ = choose(x, alpha_t, alpha_s, mask_id, generator=generator)
        x = torch.where(reveal, drawn, x)
        if callback:
            callback(i, x, None)
    return x


@dataclass
class Config(mdlm.Config):
    schedule: str = key('linear', choices=('linear', 'polynomial'))
    r_min: float = key(0.05, above=0, below=0.5)  # the paper's; its shorter run has .1 and .4
    r_max: float = key(0.25, above=0, below=0.5)
    mixing: float = key(0.5, at_least=0, below=1)  # share of [mask] in what the network sees of a hint


class CANDI(MDLM):
    name, Config = 'CANDI', Config
    samplers = {'drawn': DRAW, 'mean': DRAW}  # what hints move towards: a token drawn from p, or p itself

    def __init__(self, config):
        super().__init__(config)
        if config.r_min >= config.r_max:
            raise ValueError(f'r_min={config.r_min} must be less than r_max={config.r_max}')

    def sigma(self, t):
        return sigma(t, self.config.r_min, self.config.r_max)

    def rows(self):
        """The embedding of the words, with rows of length 1, (V, d)."""
        return F.normalize(self.embed.weight[:-1], dim=-1)

    def states(self, x_t, y, t):
        """x_t (b, L) with [mask]s, y (b, L, d), t (b,) -> (b, L, d)."""
        e, mixing = F.normalize(self.embed(x_t), dim=-1), self.config.mixing
        scale = (1 + self.sigma(t)[0].square()).rsqrt()[:, None, None]
        e = torch.where((x_t == self.mask_id)[..., None], mixing * e + (1 - mixing) * scale * y, e)
        return self.dit(e, t=[t])

    def noised_states(self, x, t, noise):
        """As MDLM's."""
        (x_t, mask), E = self.corrupt(x, t, noise), self.rows()
        eps = embedded_noise(E, x.shape[1], lambda *shape: noise.normal('noise', *shape))
        y = E[x] + self.sigma(t)[0][:, None, None] * eps                               # z E, (b, L, d)
        return self.states(x_t, y, t), mask

    def nll_parts(self, x, noise, strategy='joint', z_0=None):
        """The bound, its integrals estimated at one time: nats (b,)."""
        self.sampling_options(strategy)  # ValueError for an unknown one
        t = noise.times('t_x')
        h, mask = self.noised_states(x, t, noise)
        error = torch.zeros(x.shape, device=x.device)
        error[mask] = squared_error(self.head, h[mask], x[mask])
        nats = elbo_weight(t, self.config.schedule) * self.masked_nll(h, x, mask)
        nats = nats + self.sigma(t)[1] / 2 * error.sum(dim=1)
        return {'val': nats + x.shape[1] / (2 * self.sigma(torch.ones_like(t))[0].square())}

    def denoise(self, x_t, y, t, sampler, temperature, top_p, generator=None):
        """At the [mask]s of x_t (n, L), with hints y (n, L, d): tokens drawn (n, L), and e E (n, L, d)."""
        E, masked, tokens, towards = self.rows(), x_t == self.mask_id, [], []
        h = self.states(x_t, y, y.new_full((1,), t))[masked]
        for _, logits in head_logits(self.head, h):
            p = token_probs(logits, temperature, top_p)
            tokens.append(torch.multinomial(p, 1, generator=generator)[:, 0])
            with torch.autocast(E.device.type, enabled=False):
                towards.append(E[tokens[-1]] if sampler == 'drawn' else p.to(E) @ E)
        return (x_t.masked_scatter(masked, torch.cat(tokens)),
                y.masked_scatter(masked[..., None], torch.cat(towards)))

    def fill_in(self, x, steps, generator=None, callback=None, **options):
        ts, E = time_grid(steps, x.device), self.rows()
        sigmas, _ = self.sigma(ts)

        def normal(*shape):
            return torch.randn(len(x), *shape, device=x.device, generator=generator)

        def denoise(x_t, y, t):
            return self.denoise(x_t, y, float(t), **options, generator=generator)
        y = sigmas[0].to(E) * embedded_noise(E, x.shape[1], normal)
        return hinted(denoise, x, y, ts, alpha(ts, self.config.schedule), sigmas, self.mask_id, generator,
                      callback)
