"""
Duo: uniform discrete diffusion, and the Gaussian one that it is the argmax of (Sahoo et al., 2025,
arXiv:2506.10892; the psi-sampler and the cheap curriculum: Deschenaux et al., 2026, arXiv:2602.21185).

    forward     each token stays x with probability alpha_t, else it becomes any of the V words, x included;
                alpha_t = 1 - (1 - EPS) t
    denoiser    a DiT that sees z = x_t and t; p = p_theta(x_l | z without z_l), at every position
    loss        E_t  sum over l of  -alpha' / (V alpha) sum_j (r_j - s_j + s_j log(s_j / r_j)),
                s_j = q_j / q_z with q = V alpha e_x + 1 - alpha, and r_j the same with p for e_x
    curriculum  in the first training steps the input is a mixture of embeddings, weighted by
                softmax((m e_x + eps) s / tau). The heaviest word is x_t; m makes it x as often as above
    sampler     from t to s draw q(x_s | x_t, x_0 = p), starting from uniform words; psi: with probability
                1 - kappa draw x_0 instead and noise it again, which keeps the law of x_t

That p leaves out what it sees at l is not up to us: this p has the least loss, and with it the bound is
-log p(x) itself. p(x_l | all of z) is the reverse step to alpha_s = 1. Read in this order: the loss, the
curriculum, the samplers, class Duo.

Where we differ from the released code: the bound includes the prior's share, .0030 nats per token at 50,000
words. The curriculum draws the few largest of V normals by order statistics, as their cheap one does; but
theirs sets x_t = x whenever x is among those few, ours only when x is the largest. (For k = 5, P(x_t = x) is
.55 there where .36 is right.) alpha' is a derivative, not a rounded difference. N steps are N calls: the last
one ends at alpha = 1. psi_rescale takes eta times the largest sigma, as ReMDM does; theirs, the smaller of
eta and that sigma. The greedy tail, with which they report results, is an option. The argmax of p, which
leaves out z_l, overwrites tokens that are certain: entropy and Gen PPL fall, and the samples have another
law. The distillation is in duo_distilled.py.
"""
import math
from dataclasses import dataclass

import torch

from baselines import flm
from baselines.flm import identified, mean_at
from lib.configurator import Not, key
from mdlm import DRAW, time_grid, times_from, token_probs
from model import head_logits, head_loss

EPS = 1e-3  # alpha at t = 1

# ------------------------------------------------------------------------------------------------------------
# the loss

def nelbo_(logits, x, z, b, rate):
    """The integrand of the bound in nats, fp32 (r,), and in place of the logits (r, V) its gradient.

    x, z int64 (r,);  b = 1 - alpha and rate = -alpha', fp32 (r,)
    """
    V, (x, z, b) = logits.shape[1], (y[:, None] for y in (x, z, b))
    a, same = 1 - b, x == z
    p = logits.float().softmax(dim=-1)
    u = V * a * p + b
    u_x, u_z = u.gather(1, x), u.gather(1, z)
    rho = b / (V * a + b)  # of x_t's probabilities under q: the least over the largest
    w = torch.where(same, rho, 1)
    k = torch.where(same, 0, V * a / b)
    constant = torch.where(same, (V - 1) * rho * rho.log() - V / (V * a + b), -rho.log() / rho - V / b)
    nats = V / u_z - w * (u.log().sum(dim=1, keepdim=True) - V * u_z.log()) - k * (u_x / u_z).log() + constant
    slope = (-w / u).scatter_add_(1, z, (V * w + k - V / u_z) / u_z).scatter_add_(1, x, -k / u_x)
    logits.copy_(rate[:, None] * p * (slope - (p * slope).sum(dim=1, keepdim=True)))
    return rate * (nats / (V * a))[:, 0]


def prior_nats(V):
    """KL from x_t at t = 1, where a share EPS of the tokens is still x, to uniform words; nats per token."""
    return (EPS + (1 - EPS) / V) * math.log(V * EPS + 1 - EPS) + (1 - 1 / V) * (1 - EPS) * math.log(1 - EPS)


# ------------------------------------------------------------------------------------------------------------
# the curriculum

def gamma_range(V, alphas=(0.945, 0.049)):
    """gamma at the least noise and at the most, (2,), by the alphas of the paper's two ranges."""
    return -2 * mean_at(torch.tensor(alphas), V).log().float()


def curriculum(x, t, ends, tau, top_k, noise, V):
    """The entries of softmax((m e_x + eps) s / tau) that matter, without the others: x (b, L), t (b,) ->
    ids and weights (b, L, k + 1), and alpha, alpha' (b,). ends: see gamma_range.

    ids[..., 0] is x. The others are the k largest of V - 1 normals, by their order statistics, at words drawn
    uniformly: they may coincide, which is rare where V is large.
    """
    L, k = x.shape[1], min(top_k, V - 1)
    gamma = ends[0] + t * (ends[1] - ends[0])
    m = torch.exp(-gamma / 2)
    alpha, slope = identified(m, V)
    u = noise.uniform('largest', L, k).to(m).log() / torch.arange(V - 1, V - 1 - k, -1, device=x.device)
    others = -torch.special.ndtri(-torch.expm1(u.cumsum(dim=-1)))                      # falling, (b, L, k)
    own = m[:, None, None] + noise.normal('own', L, 1)
    weights = (torch.cat((own, others), dim=-1) * gamma.sigmoid().sqrt()[:, None, None] / tau).softmax(dim=-1)
    ids = (x[..., None] + 1 + (noise.uniform('words', L, k) * (V - 1)).long()) % V
    slope = -slope * m / 2 * (ends[1] - ends[0])
    return torch.cat((x[..., None], ids), dim=-1), weights.float(), alpha.float(), slope.float()


# ------------------------------------------------------------------------------------------------------------
# samplers: pure functions over `denoise(z, alpha) -> p of z itself (n, L), a draw from p and the argmax of p`

def posterior_step(z, p_z, drawn, alpha_t, alpha_s, V, generator=None):
    """q(x_s | x_t = z, x_0 ~ p), which needs one entry of p and one draw: z, p_z, drawn (n, L) -> x_s."""
    r, total = alpha_t / alpha_s, alpha_t * p_z + (1 - alpha_t) / V
    stay = r * (alpha_s * p_z + (1 - alpha_s) / V) / total
    redraw = (1 - r) * alpha_s / V / total
    u = torch.rand(z.shape, dtype=p_z.dtype, device=z.device, generator=generator)
    x = uniform_words(z, V, generator)
    return torch.where(u < stay, z, torch.where(u < stay + redraw, drawn, x))


def psi_step(z, p_z, drawn, alpha_t, alpha_s, kappa, V, generator=None):
    """posterior_step with probability kappa; else x_0 from its posterior, noised again to alpha_s."""
    x = posterior_step(z, p_z, drawn, alpha_t, alpha_s, V, generator)
    if kappa == 1:
        return x
    x_0 = posterior_step(z, p_z, drawn, alpha_t, torch.ones_like(alpha_s), V, generator)
    again, keep = (torch.rand(z.shape, device=z.device, generator=generator) for _ in range(2))
    noised = torch.where(keep < alpha_s, x_0, uniform_words(z, V, generator))
    return torch.where(again < kappa, x, noised)


def uniform_words(z, V, generator):
    return torch.randint(V, z.shape, device=z.device, generator=generator)


def reverse(denoise, z, V, alphas, kappas, tail='ancestral', generator=None, callback=None):
    """From uniform words z (n, L) along alphas (steps + 1,), up to 1, with kappas (steps,) -> ids (n, L)."""
    for i, kappa in enumerate(kappas):
        p_z, drawn, likeliest = denoise(z, alphas[i])
        greedy = tail == 'greedy' and i + 1 == len(kappas)
        z = likeliest if greedy else psi_step(z, p_z, drawn, *alphas[i:i + 2], kappa, V, generator)
        if callback:
            callback(i, z, None)
    return z


def plan(steps, sampler, kappa=1.0, eta=1.0, device=None):
    """-> alphas fp64 (steps + 1,) from EPS to 1, and kappas, a list.

    psi_cap, psi_rescale and psi_loop are ReMDM's rules for its sigma: kappa = 1 - sigma / (1 - alpha_s).
    """
    t = time_grid(steps, device)
    if sampler == 'psi_loop':  # down to t = .1 in 45 % of the steps, there for half of them, then to 0
        t = torch.where(t > 0.55, 1 - (1 - t) * 2, torch.where(t < 0.05, 2 * t, 0.1))
    alphas, kappas = 1 - (1 - EPS) * t, []
    for a_t, a_s in zip(alphas[:-1].tolist(), alphas[1:].tolist()):
        largest = min(1.0, (1 - a_s) / a_t)  # sigma that keeps the marginals
        sigma = {'psi_cap': min(eta, largest), 'psi_rescale': eta * largest,
                 'psi_loop': eta if a_t == a_s else 0.0}.get(sampler, (1 - kappa) * (1 - a_s))
        kappas.append(1.0 if a_s == 1 else max(0.0, 1 - sigma / (1 - a_s)))
    return alphas, kappas


TAIL = {'tail': key('ancestral', choices=('ancestral', 'greedy'))}
ETA = {'eta': key(1.0, at_least=0, at_most=1)}
# published for OpenWebText and 256 steps: eta .01 (cap, loop) or .05 (rescale), top_p .9, of the loop .95
SAMPLERS = {'ancestral': DRAW | TAIL,
            'psi': DRAW | TAIL | {'kappa': key(0.95, at_least=0, at_most=1)},
            'psi_cap': DRAW | TAIL | ETA, 'psi_rescale': DRAW | TAIL | ETA, 'psi_loop': DRAW | TAIL | ETA}

# ------------------------------------------------------------------------------------------------------------
# the method

@dataclass
class Config(flm.Config):
    curriculum_iters: int = key(0, at_least=0)  # the paper's: 500,000
    tau: float = key(1e-3, above=0, only=dict(curriculum_iters=Not([0])))
    top_k: int = key(4, at_least=1, only=dict(curriculum_iters=Not([0])))  # entries besides x


class Duo(flm.Unmasked):
    """The network's time is b = 1 - alpha."""
    name, Config, samplers = 'Duo', Config, SAMPLERS

    def __init__(self, config):
        super().__init__(config)
        self.in_curriculum = False
        self.register_buffer('gamma', gamma_range(config.vocab_size), persistent=False)

    def begin_step(self, step, noise, draw_rows):
        self.in_curriculum = step < self.config.curriculum_iters

    def corrupt(self, x, b, noise):
        """q(x_t | x_0): x (b, L), b = 1 - alpha (b,) -> x_t (b, L)."""
        words = (noise.uniform('words', x.shape[1]) * self.config.vocab_size).long()
        return torch.where(noise.uniform('keep', x.shape[1]) < b[:, None], words, x)

    def forward(self, x, noise):
        """Training loss per token of x (b, L) int64, and logs."""
        c, t = self.config, noise.times('t')
        if self.in_curriculum:
            ids, weights, alpha, slope = curriculum(x, t, self.gamma, c.tau, c.top_k, noise, c.vocab_size)
            z = ids.gather(2, weights[..., :2].argmax(dim=-1, keepdim=True))[..., 0]   # the heaviest
            e = sum(w[..., None] * self.embed(i) for w, i in zip(weights.unbind(2), ids.unbind(2)))
            b, rate = 1 - alpha, -slope
        else:
            b = (1 - EPS) * times_from(1e-3, t)
            z, rate = self.corrupt(x, b, noise), torch.full_like(b, 1 - EPS)
            e = self.embed(z)
        about = x.flatten(), z.flatten(), *(y.repeat_interleave(x.shape[1]) for y in (b, rate))
        loss = head_loss(nelbo_, self.head, self.states(e, b), *about)
        return loss, {'loss': loss.detach()}

    def nll_parts(self, x, noise, strategy='joint', z_0=None):
        """The bound, its integral estimated at one time: nats (b,)."""
        self.sampling_options(strategy)  # ValueError for an unknown one
        b = (1 - EPS) * noise.times('t')
        z, V, L = self.corrupt(x, b, noise), self.config.vocab_size, x.shape[1]
        about = x.flatten(), z.flatten(), b.repeat_interleave(L), b.new_full((x.numel(),), 1 - EPS)
        nats = [nelbo_(logits, *(y[rows] for y in about))
                for rows, logits in head_logits(self.head, self.states(self.embed(z), b))]
        return {'val': torch.cat(nats).view(-1, L).sum(dim=1) + L * prior_nats(V)}

    def denoise(self, z, alpha, temperature=1.0, top_p=1.0, generator=None):
        """z (n, L), alpha a number -> p_z in fp64, a draw from p, and its argmax, each (n, L)."""
        h, found = self.states(self.embed(z), self.head.weight.new_full((1,), 1 - alpha)), []
        for rows, logits in head_logits(self.head, h):
            likeliest = logits.argmax(dim=-1, keepdim=True)
            p = token_probs(logits, temperature, top_p)
            drawn = torch.multinomial(p, 1, generator=generator)
            found.append((p.gather(1, z.flatten()[rows, None]), drawn, likeliest))
        return [torch.cat(parts).view(z.shape) for parts in zip(*found)]

    @torch.no_grad()
    def sample(self, n, steps, strategy='', sampler='', generator=None, callback=None, **options):
        """-> ids (n, L). options: temperature, top_p, tail, kappa of psi, eta of the other psi samplers."""
        o = self.sampling_options(strategy, sampler, **options)
        draw, tail = {k: o.pop(k) for k in DRAW}, o.pop('tail')
        del o['strategy']
        device, V = self.head.weight.device, self.config.vocab_size
        alphas, kappas = plan(steps, device=device, **o)
        z = torch.randint(V, (n, self.config.block_size), device=device, generator=generator)

        def denoise(z, alpha):
            return self.denoise(z, float(alpha), **draw, generator=generator)
        return reverse(denoise, z, V, alphas, kappas, tail, generator, callback)
