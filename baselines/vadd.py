"""
VADD: masked diffusion in which every step draws a latent first (Xie et al., 2025, arXiv:2505.17384).

    forward      MDLM's: each token becomes [mask] with probability 1 - alpha_t
    denoiser     MDLM's, but it is told z ~ N(0, I) where others are told the time: p_theta(x_l | x_t, z)
    recognition  r(z | x_0, x_t) = N(mu, sigma^2): a DiT that sees x_0 and where x_t is masked; for training
    loss         E_t  -alpha'_t / (1 - alpha_t)  [sum over masked l of -log p_theta(x_l | x_t, z)
                                                  + lambda KL(r || N(0, I))],  z ~ r;  lambda rises to 1
    sampler      MDLM's, with a new z for every text and step; fixed_z keeps the first one
    bound        of the chain of T steps that the sampler is: if a step makes x_s of x_t at the places S,
                 T E[sum over S of -log p_theta(x_l | x_t, z) + KL(r(z | x_s, x_t) || N(0, I))]

MDLM draws the tokens of one step independently. Here they share z, which is drawn before them: one step can
write any law. But then the loss is no bound on the likelihood. For revealing S, a small random share rho of
the masked places, it counts rho times the nats of all of them, which is right for a product and too little
for a mixture: for a fair coin and its copy the exact network has a loss of log(2) / 2, half of the entropy.
So `nll` is the bound instead. It is ours, valid for any recognition, and tight for the exact one. Training by
the loss is fine: at every t it is the bound of writing all that is masked at once.

Ours, too: each position has a vector of its own, since z is the same for all, and RoPE tells only distances:
where all tokens are masked, positions would be alike. The recognition is a mean over masked positions.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn

import mdlm
from lib.configurator import MOST_STEPS, key
from mdlm import DRAW, MDLM, SAMPLERS, reveal_tokens, times_from
from model import DiT


@dataclass
class Config(mdlm.Config):
    z_dim: int = key(32, at_least=1)
    encoder_layers: int = key(6, at_least=1)  # of the recognition; the paper's has as many as the denoiser
    kl_warmup: int = key(0, at_least=0)       # steps in which lambda rises to 1
    # ours: the share of texts that are fully masked, where z matters most
    p_start: float = key(0.0, at_least=0, at_most=1)
    bound_steps: int = key(1, at_least=1, at_most=MOST_STEPS)  # T of nll


class VADD(MDLM):
    name, Config = 'VADD', Config
    samplers = SAMPLERS | {'fixed_z': DRAW}

    def __init__(self, config):
        c = config
        super().__init__(c)
        # z in place of the time
        self.dit.time[0] = nn.Sequential(nn.Linear(c.z_dim, c.cond_dim), nn.SiLU(),
                                         nn.Linear(c.cond_dim, c.cond_dim), nn.SiLU())
        self.places = nn.Parameter(0.02 * torch.randn(c.block_size, c.hidden))
        self.recognition = DiT(c.hidden, c.encoder_layers, c.num_heads, c.cond_dim, c.block_size,
                               dropout=c.dropout)
        self.mark = nn.Parameter(0.02 * torch.randn(c.hidden))
        self.posterior = nn.Linear(c.hidden, 2 * c.z_dim)  # mu, log sigma
        nn.init.zeros_(self.posterior.weight)  # at first r is the prior
        nn.init.zeros_(self.posterior.bias)
        self.register_buffer('kl_weight', torch.ones(()), persistent=False)

    def begin_step(self, step, noise, draw_rows):
        warmup = self.config.kl_warmup
        self.kl_weight.fill_(min(1.0, step / warmup) if warmup else 1.0)

    def recognise(self, x_s, revealed, noise):
        """r(z | x_s, x_t), where x_t is x_s (b, L) with the revealed positions masked again.

        -> z drawn from it (b, z_dim), and its KL from N(0, I) in nats (b,); 0 where nothing is revealed
        """
        h = self.recognition(self.embed(x_s) + self.places + revealed[..., None] * self.mark)
        count = revealed.sum(dim=1, keepdim=True)
        h = (h * revealed[..., None]).sum(dim=1) / count.clamp(min=1)                  # (b, d)
        mu, log_sigma = self.posterior(h).float().chunk(2, dim=-1)                     # (b, z_dim)
        z = mu + log_sigma.exp() * noise.normal('z', self.config.z_dim)
        kl = ((mu**2 + (2 * log_sigma).exp() - 1) / 2 - log_sigma).sum(dim=1)
        return z, kl * (count[:, 0] > 0)

    def states(self, x_t, z):
        return self.dit(self.embed(x_t) + self.places, t=[z])                          # (b, L, d)

    def forward(self, x, noise):
        """Training loss per token of x (b, L) int64, and logs."""
        p_start, t = self.config.p_start, noise.times('t_x', shuffled=False)
        if p_start:
            t = torch.where(noise.uniform('start') < p_start, 1.0, t)
        t = times_from(1e-4, t)
        x_t, mask = self.corrupt(x, t, noise)
        z, kl = self.recognise(x, mask, noise)
        token_loss, overflow = self.token_loss(self.states(x_t, z), x, mask, t, stratified=not p_start)
        loss = token_loss + self.kl_weight * (self.loss_weight(t) * kl).sum() / x.numel()
        return loss, {'loss': loss.detach(), 'kl': kl.detach().mean(), 'overflow': overflow}

    def nll_parts(self, x, noise, strategy='joint', z_0=None):
        """The bound, estimated at one of its T steps: nats (b,)."""
        self.sampling_options(strategy)  # ValueError for an unknown one
        T = self.config.bound_steps
        step = (T * noise.times('t_x')).ceil()
        x_t, masked = self.corrupt(x, step / T, noise)
        # the same draws, so this mask is a part of the other one; the last step reveals everything
        _, hidden = self.corrupt(x, (step - 1) / T, noise)
        hidden &= (step > 1)[:, None]
        revealed = masked & ~hidden
        z, kl = self.recognise(x.masked_fill(hidden, self.mask_id), revealed, noise)
        return {'val': T * (self.masked_nll(self.states(x_t, z), x, revealed) + kl)}

    def denoise(self, x_t, where, z):
        """MDLM's, given z (n, z_dim)."""
        active = where.any(dim=1)
        return self.head(self.states(x_t[active], z[active])[where[active]])

    def fill_in(self, x, steps, sampler, generator=None, **options):
        def draw_z():
            return torch.randn(len(x), self.config.z_dim, device=x.device, generator=generator)
        fixed = draw_z() if sampler == 'fixed_z' else None

        def denoise(x_t, where):
            return self.denoise(x_t, where, draw_z() if fixed is None else fixed)
        return reveal_tokens(denoise, x, self.mask_id, steps, self.config.schedule, sampler, **options,
                             generator=generator)

    def backbones(self):
        return [self.dit, self.recognition]

    def training_flops(self, L):
        return super().training_flops(L) + 6 * self.recognition.flops(L)
