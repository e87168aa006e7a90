"""
LADD: masked diffusion with a latent channel
(Latent-Augmented Discrete Diffusion Models, Shariatian et al., 2025, arXiv:2510.18114).

An encoder gives each text x_0 a latent z_0. Tokens and latents are noised independently: x_t as in MDLM, and
    Co-LADD   Gaussian noise:  z_t = abar_t z_0 + sqrt(1 - abar_t^2) eps                        LADD eq. (20)
    Di-LADD   masking: z_0 is quantised first, and each code becomes [mask] with probability 1 - alpha_t
and one MM-DiT sees both and predicts both:
    loss = lambda_x * token loss + lambda_z * latent loss                                       LADD eq. (14)

Two ways to sample: *joint* moves both channels at every step; *sequential* makes the latent first, while all
tokens are masked, and then the tokens given the clean latent. Two stages of training: first encoder,
quantizer and token denoiser (lambda_z = 0), so that the latent learns to be useful; then encoder and
codebook are frozen and everything else learns the full objective. A pretrained encoder is frozen from the
start: Co-LADD then begins with the second stage, Di-LADD with the first, for its quantizer. (An optional
third stage, our experiment, trains a separate latent denoiser alone.) Read in this order: latent schedules,
samplers, the two channels, class LADD, encoders, quantizer.
"""
import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

import mdlm
from lib.configurator import MOST_STEPS, Not, key
from lib.distributed import gathered
from lib.encoders import pool
from lib.method import OF_TEXTS, with_latent
from mdlm import alpha, choose, draw_tokens, elbo_weight, pairs, reveal_tokens, time_grid, times_from
from model import DiT

# ------------------------------------------------------------------------------------------------------------
# schedules of the Gaussian channel: LADD table 7, wrapped: .0001 <= abar^2 <= .9999

def abar(t, schedule='vp_sqrt'):
    """Signal level of z_t; any tensor t in [0, 1] -> the same shape."""
    if schedule == 'vp_linear':
        square = 1 - t
    elif schedule == 'vp_cosine':
        square = torch.cos((t + 0.008) / 1.008 * torch.pi / 2) ** 2
    else:  # vp_sqrt
        square = (1 - t).sqrt()
    return ((1 - 2e-4) * square + 1e-4).sqrt()


def log_snr(t, schedule='vp_sqrt'):
    """log of signal over noise, abar^2 / (1 - abar^2), which falls with t."""
    return torch.logit(abar(t, schedule) ** 2)


def time_at(snr, schedule='vp_sqrt'):
    """The inverse of log_snr."""
    square = ((torch.sigmoid(snr) - 1e-4) / (1 - 2e-4)).clamp(0, 1)
    if schedule == 'vp_linear':
        return 1 - square
    if schedule == 'vp_cosine':
        return 1.008 * torch.acos(square.sqrt()) * 2 / torch.pi - 0.008
    return 1 - square**2


# ------------------------------------------------------------------------------------------------------------
# samplers: pure functions over
#     denoise(x_t, z_t, t, where) -> token logits (where.sum(), V), latent prediction
# and over the channel's own move `latent_step(z_t, prediction, t, s) -> z_s`, one of the next two

def ddim_step(z_t, z0_hat, t, s, schedule='vp_sqrt'):
    """DDIM with eta = 0, LADD eq. (40): z_t, z0_hat (n, M, D) -> z_s; the step to s = 0 returns z0_hat."""
    if s == 0:
        return z0_hat
    a_t, a_s = abar(t, schedule), abar(s, schedule)
    eps_hat = (z_t - a_t * z0_hat) / (1 - a_t**2).sqrt()
    return a_s * z0_hat + (1 - a_s**2).sqrt() * eps_hat


def code_step(z_t, logits, t, s, schedule='linear', generator=None):
    """A step of masked diffusion over codes z_t (n, M), of which the last, K, is [mask]; logits (n, M, K)."""
    reveal, _ = choose(z_t, alpha(t, schedule), alpha(s, schedule), logits.shape[-1], generator=generator)
    z_s = z_t.clone()
    if reveal.any():
        z_s[reveal] = draw_tokens(logits[reveal], generator=generator)
    return z_s


def joint(denoise, x, z, steps, alphas, latent_step, mask_id, draw=draw_tokens, eta=0.0, generator=None,
          callback=None):
    """Both channels from t = 1 to 0; each of the steps sees (x_t, z_t): LADD eq. (Joint), (65), (66)."""
    given = x != mask_id
    x, times = x.clone(), time_grid(steps, x.device)
    for i, (t, s, (alpha_t, alpha_s)) in enumerate(zip(times[:-1], times[1:], pairs(alphas))):
        reveal, remask = choose(x, alpha_t, alpha_s, mask_id, eta, given, generator)
        logits, prediction = denoise(x, z, t, reveal)
        z = latent_step(z, prediction, t, s)
        if reveal.any():
            x[reveal] = draw(logits, generator=generator)
        x[remask] = mask_id
        if callback:
            callback(i, x, z)
    return x


def latent_chain(predict, z, steps, latent_step, callback=None):
    """The latent channel alone, from t = 1 to 0: predict(z_t, t). The first half of LADD eq. (Seq.).

    callback(i, z) sees every step; i = -steps ... -1, since the tokens' steps are 0, 1, ...
    """
    times = time_grid(steps, z.device)
    for i, (t, s) in enumerate(zip(times[:-1], times[1:])):
        z = latent_step(z, predict(z, t), t, s)
        if callback:
            callback(i - steps, z)
    return z


# ------------------------------------------------------------------------------------------------------------
# keys

CO, DI = {'latent': 'continuous'}, {'latent': 'discrete'}
FROZEN, STAGE1 = {'encoder': Not([''])}, {'stage1_iters': Not([0])}


@dataclass
class Config(mdlm.Config):
    # of the tokens; not geometric: with alpha_0 < 1 the bound would need a reconstruction term, too
    schedule: str = key('linear', choices=('linear', 'polynomial'))
    latent: str = key('continuous', choices=('continuous', 'discrete'))  # Co-LADD | Di-LADD
    num_latents: int = key(1, at_least=1, meaning=True)  # M
    latent_dim: int = key(32, at_least=1)  # D
    latent_schedule: str = key('vp_sqrt', meaning=True)  # see Vectors.schedules and Codes.schedules
    unit_norm: bool = key(True, only=CO, meaning=True)  # scale each latent to latent_length, LADD eq. (75)
    codebook_size: int = key(511, at_least=1, only=DI)  # K; the paper's 512 counts the mask
    vq_decay: float = key(0.95, at_least=0, at_most=1, only=DI | STAGE1)  # per step; higher for small batches
    dead_below: float = key(2.0, above=0, only=DI)  # a code chosen less often than this per batch restarts
    # '' for a learned encoder, or the name of a frozen one: hub id, folder, or out/NAME of our AR
    encoder: str = key('', meaning=True)
    stored_latents: bool = key(False, only=FROZEN)  # read its output from the files of data/encode.py
    encoder_layers: int = key(2, at_least=1, only={'encoder': ''})
    encoder_dropout: bool = False  # hide masked tokens from the encoder, too, at a rate of U[0, .9] per text
    # blocks of a latent denoiser for sequential sampling, as the paper's Co-LADD has one; 0: the MM-DiT does
    # it, with all tokens masked
    latent_layers: int = key(0, at_least=0)
    # t_z = t_x, as in joint sampling | independent: drawn on its own, which sequential sampling needs
    times: str = key('same', choices=('same', 'independent'))
    p_drop: float = key(0.0, at_least=0, at_most=1, only=CO)  # probability that a text loses its latent
    lambda_x: float = key(1.0, at_least=0)  # weights of the token loss
    lambda_z: float = key(1.0, at_least=0)  # and of the latent loss
    stage1_iters: int = key(0, at_least=0)  # steps in which a learned encoder and the codebook train
    # share of the text that the encoder does not see in stage 1; the official text8 configs have .1 to .6
    stage1_blank: float = key(0.0, at_least=0, at_most=1, only=STAGE1 | {'stored_latents': False})

    # The rest is ours, and off by default. config/sawtooth_di_ladd.py, sawtooth_co_ladd.py and
    # shakespeare_char_di_ladd_learned.py say why
    # where RoPE places latents: behind the text, or each in the middle of one of M equal pieces of the text
    latents: str = key('behind', choices=('behind', 'spread'), meaning=True)
    # sqrt(D) gives each coordinate variance 1, like the noise
    latent_length: float = key(1.0, above=0, only=CO | {'unit_norm': True}, meaning=True)
    stage1_t_min: float = key(0.0, at_least=0, at_most=1, only=STAGE1)  # stage 1 has t_x ~ U[stage1_t_min, 1]
    stage1_clean: bool = key(False, only=STAGE1)                        # and t_z = 0
    vq_start: int = key(0, at_least=0, only=DI | STAGE1)  # step of k-means; until then nothing is quantised
    # in stage 2, the shares of texts with t_x = 1, with t_z = 0, and with t_z = 1
    p_start: float = key(0.0, at_least=0, at_most=1)
    p_clean: float = key(0.0, at_least=0, at_most=1)
    p_noise: float = key(0.0, at_least=0, at_most=1)
    # stage 3 trains the latent denoiser alone from this step on; 0: there is none
    stage3_start: int = key(0, at_least=0, only={'latent_layers': Not([0])})


# ------------------------------------------------------------------------------------------------------------
# the latent channel: what diffuses beside the tokens. Its state z is vectors (b, M, D) or codes (b, M); the
# network sees vectors (b, M, D) of it and predicts (b, M, outputs)

class Noised(NamedTuple):
    """A training batch of latents after noising."""
    z_t: torch.Tensor     # (b, M, D), what the network sees
    target: torch.Tensor  # what it is to predict: z_0 (b, M, D), or codes (b, M)
    scored: torch.Tensor  # where that counts: (b,), or (b, M)
    vq_loss: torch.Tensor | float = 0.0  # of stage 1
    logs: dict = {}


class Vectors:
    """Co-LADD: Gaussian diffusion of z (b, M, D)."""
    name, schedules = 'Co-LADD', ('vp_linear', 'vp_cosine', 'vp_sqrt')
    has_codebook = False  # which stage 1 trains even if the encoder is frozen
    mask_id = None
    # in the bound, the latent keeps the noise of this time. Any time gives a bound: a cleaner latent says
    # hardly more about the tokens, but at an SNR of thousands every small error of z0_hat costs nats (our
    # choice)
    t_end = 0.1

    def __init__(self, config):
        self.config, self.outputs = config, config.latent_dim

    def parts(self):
        """What LADD has to train and store for this channel: {name: module or weight}."""
        return {}

    def normalised(self, e):
        """The encoder's output (b, M, D) -> of one length each, LADD eq. (75), unless unit_norm is off."""
        return self.config.latent_length * F.normalize(e, dim=-1) if self.config.unit_norm else e

    def state(self, e):
        return e

    def seen(self, z):
        return z

    def time(self, t):
        """What the network is told of t: t itself, since a vector does not show how noisy it is."""
        return t

    def corrupt(self, z_0, t, noise):
        """q(z_t | z_0), LADD eq. (20); t (b,)."""
        a = abar(t, self.config.latent_schedule)[:, None, None]
        return a * z_0 + (1 - a**2).sqrt() * noise.normal('eps', *z_0.shape[1:])

    def noised(self, e, t, noise, learning):
        """Some texts lose their latent, as in the official code: z_t = 0, and no latent loss.

        The paper noises the null latent, LADD eq. (76), and keeps the loss.
        """
        kept = noise.uniform('drop') >= self.config.p_drop
        z_t = self.corrupt(e, t, noise)
        return Noised(z_t.masked_fill(~kept[:, None, None], 0), e, kept)

    def loss(self, prediction, noised, t):
        """Squared error of z0_hat, LADD eq. (13)."""
        return ((prediction - noised.target).square().mean(dim=(1, 2)) * noised.scored).mean()

    def bound_times(self, u):
        """Uniform u (b,) -> times t_end to 1 of `bound`, uniform in log SNR."""
        first, last = self.log_snrs(u)
        return time_at(last + (first - last) * u, self.config.latent_schedule)

    def log_snrs(self, like):
        """At t_end and at 1."""
        return log_snr(like.new_tensor([self.t_end, 1.0]), self.config.latent_schedule)

    def bound(self, prediction, z_0, z_t, t):
        """The latent's part of the negative ELBO at one of the bound_times, nats (b,): the integral of
        1/2 |dSNR/dt| |z_0 - z0_hat|^2 dt = 1/2 SNR |z_0 - z0_hat|^2 d log SNR, and the KL of z_1 to N(0, 1).
        """
        first, last = self.log_snrs(t)
        snr = log_snr(t, self.config.latent_schedule).exp()
        error = (prediction.float() - z_0).square().sum(dim=(1, 2))
        a2 = torch.sigmoid(last)  # abar^2 at t = 1
        prior = (a2 * (z_0.square() - 1) - torch.log1p(-a2)).sum(dim=(1, 2)) / 2
        return (first - last) * snr * error / 2 + prior

    def nothing(self, n, device):
        """A latent that was dropped."""
        return torch.zeros(n, self.config.num_latents, self.config.latent_dim, device=device)

    def prior(self, n, device, generator=None):
        c = self.config
        return torch.randn(n, c.num_latents, c.latent_dim, device=device, generator=generator)

    def step(self, z_t, prediction, t, s, generator=None):
        return ddim_step(z_t, prediction, t, s, self.config.latent_schedule)

    def begin_step(self, *args):
        """Nothing here moves without gradients."""

    end_step = begin_step


class Codes:
    """Di-LADD: masked diffusion of codes z (b, M), where K = codebook_size stands for [mask]."""
    # not geometric: with alpha_0 < 1 the bound of the codes would need a reconstruction term, too
    name, schedules = 'Di-LADD', ('linear', 'polynomial')
    has_codebook, t_end = True, 0.0

    def __init__(self, config):
        self.config, self.outputs, self.mask_id = config, config.codebook_size, config.codebook_size
        self.quantising = True  # begin_step sets it while training

    def parts(self):
        c = self.config
        self.quantizer = Quantizer(c.codebook_size, c.latent_dim, c.vq_decay, dead_below=c.dead_below)
        self.z_mask = nn.Parameter(torch.randn(c.latent_dim) * c.latent_dim**-0.5)  # about as long as a code
        return {'quantizer': self.quantizer, 'z_mask': self.z_mask}

    def normalised(self, e):
        return F.normalize(e, dim=-1)

    def state(self, e):
        return self.quantizer.nearest(e)

    def seen(self, z):
        """Codes (b, M) -> the codebook's vectors and the mask's, (b, M, D)."""
        return torch.cat((self.quantizer.codebook, self.z_mask[None]))[z]

    def time(self, t):
        """Nothing of t: the [mask]s already show how noisy the codes are."""
        return None

    def corrupt(self, z_0, t, noise):
        """q(z_t | z_0), LADD eq. (43); t (b,)."""
        mask = noise.uniform('z_mask', z_0.shape[1]) < 1 - alpha(t, self.config.latent_schedule)[:, None]
        return z_0.masked_fill(mask, self.config.codebook_size)

    def noised(self, e, t, noise, learning):
        """learning: the codebook records the vectors, and moves at the end of the step."""
        if not self.quantising:  # early in stage 1, where the latent loss is not asked for
            return Noised(e, e, torch.ones_like(t))
        z_0, codes, vq_loss = self.quantizer(e, learning)  # z_0: vectors with a straight-through gradient
        masked = self.corrupt(codes, t, noise) == self.config.codebook_size
        logs = {'code_perplexity': self.quantizer.perplexity(), 'code_usage': self.quantizer.usage()}
        return Noised(torch.where(masked[..., None], self.z_mask, z_0), codes, masked, vq_loss, logs)

    def loss(self, prediction, noised, t):
        """Cross-entropy of the masked codes, LADD eq. (13), weighted as that of the tokens is."""
        weight = torch.ones_like(t)
        if self.config.weighting == 'elbo':
            weight = elbo_weight(t.clamp(min=1e-4), self.config.latent_schedule)
        return (self.nats(prediction, noised.target) * noised.scored * weight[:, None]).mean()

    def nats(self, prediction, codes):
        """-log p(code), (b, M)."""
        nats = F.cross_entropy(prediction.flatten(0, 1).float(), codes.flatten(), reduction='none')
        return nats.view(codes.shape)

    def bound_times(self, u):
        return u

    def bound(self, prediction, z_0, z_t, t):
        """The codes' part of the negative ELBO at one time, nats (b,)."""
        nats = self.nats(prediction, z_0) * (z_t == self.config.codebook_size)
        return elbo_weight(t, self.config.latent_schedule) * nats.sum(dim=1)

    def nothing(self, n, device):
        return torch.full((n, self.config.num_latents), self.config.codebook_size, device=device)

    def prior(self, n, device, generator=None):
        return self.nothing(n, device)

    def step(self, z_t, prediction, t, s, generator=None):
        return code_step(z_t, prediction, t, s, self.config.latent_schedule, generator)

    def begin_step(self, step, stage, encoded_rows, noise):
        """k-means starts the codebook at step vq_start. encoded_rows(n) -> latents of n texts, (n, M, D)."""
        c = self.config
        self.quantising = step >= c.vq_start
        if stage == 1 and step == c.vq_start:
            e = encoded_rows(max(1, 16 * c.codebook_size // c.num_latents))  # 16 vectors for every code
            self.quantizer.kmeans(e.flatten(0, 1), noise.total * c.num_latents, noise)
            return 'k-means has made the codebook; latents are quantised from here on'

    def end_step(self, finite, noise):
        self.quantizer.learn(finite, noise)


# ------------------------------------------------------------------------------------------------------------
# the method

class LADD(mdlm.MDLM):
    Config = Config
    likelihood, wants_summary = 'bound', True
    strategies = {'joint': {}, 'seq': {
        'latent_steps': key(8, at_least=1, at_most=MOST_STEPS),
        # what the tokens are given: a generated latent | no latent: codes masked, vectors 0 as by p_drop (a
        # network without p_drop has never met that) | z_0, the latents of texts
        'latent': key('generated', choices=('generated', 'none', *OF_TEXTS))}}

    def __init__(self, config):
        c = config
        super().__init__(c, latents_at(c))
        self.channel = {'continuous': Vectors, 'discrete': Codes}[c.latent](c)
        refuse(c, self.channel)
        self.stage = 2  # begin_step sets it while training
        self.encoder = FrozenEncoder(c) if c.encoder else Encoder(c)
        self.z_in = nn.Linear(c.latent_dim, c.hidden)
        self.z_head = nn.Linear(c.hidden, self.channel.outputs)
        for name, part in self.channel.parts().items():
            setattr(self, name, part)
        if c.latent_layers:
            self.latent_in = nn.Linear(c.latent_dim, c.hidden)
            # for M = 1 attention is a linear map, and this DiT is the paper's "small MLP" with AdaLN
            self.latent_dit = DiT(c.hidden, c.latent_layers, c.num_heads, c.cond_dim, c.num_latents,
                                  dropout=c.dropout)
            self.latent_head = nn.Linear(c.hidden, self.channel.outputs)
        # what the scripts ask
        self.name, self.encoder_name = self.channel.name, c.encoder
        self.latent_mask_id = self.channel.mask_id
        self.lr_restarts = (c.stage3_start,) if c.stage3_start and c.latent_layers else ()
        if c.stored_latents:
            self.stored_latents = {'num_latents': c.num_latents, 'latent_dim': c.latent_dim}
        if not c.stage1_iters and (not c.encoder or self.channel.has_codebook):
            self.untrained_part = 'stage 2 freezes encoder and codebook: train them first, ' \
                                  '--stage1_iters=N, or bring them along, --init_from=out/OTHER'

    def attach(self, encoder):
        self.encoder.attach(encoder)

    # --- the denoisers ---

    def encode(self, x, blank=None, stored=None):
        """x (b, L) -> latents before any quantizer, (b, M, D) fp32. stored: the encoder's output, if kept."""
        return self.channel.normalised(self.encoder(x, blank).float() if stored is None else stored)

    def latents_of(self, x, stored=None):
        """x (b, L) -> clean latents, vectors (b, M, D) or codes (b, M). stored: see encode."""
        return self.channel.state(self.encode(x, stored=stored))

    def hidden_states(self, x_t, z_t, t_z):
        """Tokens (b, L), vectors z_t (b, M, D), t_z (b,) -> (b, L, d), (b, M, d).

        Only the latents' own stream is told t_z: our choice, the official code tells both.
        """
        return self.dit(self.embed(x_t), self.z_in(z_t), t=[None, self.channel.time(t_z)])

    def joint_denoise(self, x_t, z_t, t, where):
        """For `joint`, whose channels have one time t -> token logits (where.sum(), V), latent prediction."""
        h_x, h_z = self.hidden_states(x_t, self.channel.seen(z_t), t.float().expand(len(x_t)))
        return self.head(h_x[where]), self.z_head(h_z)

    def predict_latent(self, z_t, t_z, x_t):
        """The first half of the sequential strategy: from vectors z_t alone, since x_t is all [mask]."""
        if not self.config.latent_layers:
            return self.z_head(self.hidden_states(x_t, z_t, t_z)[1])
        return self.latent_head(self.latent_dit(self.latent_in(z_t), t=[self.channel.time(t_z)]))

    # --- training ---

    @torch.no_grad()
    def begin_step(self, step, noise, draw_rows):
        """Sets the stage."""
        c = self.config
        self.stage = 1 if step < c.stage1_iters else 2 + any(step >= s for s in self.lr_restarts)
        self.encoder.train(self.stage == 1)

        def encoded_rows(n):
            self.encoder.eval()
            parts = zip(*(part.split(256) for part in draw_rows(n)))
            e = torch.cat([self.encode(x, None, *z_0) for x, *z_0 in parts])
            self.encoder.train()
            return e
        news = self.channel.begin_step(step, self.stage, encoded_rows, noise)
        if 0 < step == c.stage1_iters:
            news = 'stage 2 begins: encoder and codebook, if any, are frozen, and the latent loss joins'
        if 0 < step == c.stage3_start:
            news = 'stage 3 begins: all but the latent denoiser is frozen'
        return news

    def end_step(self, finite, noise):
        self.channel.end_step(finite, noise)

    def draw_times(self, noise):
        """t_x, t_z (b,) of a training batch."""
        c, stage1 = self.config, self.stage == 1
        t_x = noise.times('t_x', shuffled=False)
        if stage1:
            t_x = times_from(c.stage1_t_min, t_x)
        elif c.p_start:
            t_x = torch.where(noise.uniform('start') < c.p_start, 1.0, t_x)
        t_x = times_from(1e-4, t_x)
        t_z = noise.times('t_z') if c.times == 'independent' else t_x
        if stage1:
            return t_x, torch.zeros_like(t_z) if c.stage1_clean else t_z
        u = noise.uniform('extremes')
        return t_x, torch.where(u < c.p_clean, 0.0, torch.where(u > 1 - c.p_noise, 1.0, t_z))

    def forward(self, x, noise, z_0=None):
        """Training loss of x (b, L) int64, LADD eq. (14), and logs.

        z_0: stored latents (b, M, D), instead of encoding x.
        """
        c, stage1 = self.config, self.stage == 1
        if self.stage == 3:
            return self.prior_loss(x, noise, z_0)
        t_x, t_z = self.draw_times(noise)
        x_t, mask = self.corrupt(x, t_x, noise)                                        # (b, L), (b, L)
        blank = None
        if c.encoder_dropout:
            p_r = 0.9 * noise.uniform('p_r')
            blank = mask & (noise.uniform('blank', x.shape[1]) < p_r[:, None])
        if stage1 and c.stage1_blank:
            hidden = noise.uniform('stage1_blank', x.shape[1]) < c.stage1_blank
            blank = hidden if blank is None else hidden | blank
        with torch.set_grad_enabled(stage1):  # stage 2: encoder and codebook are frozen
            e = self.encode(x, blank, z_0)                                             # (b, M, D)
        latents = self.channel.noised(e, t_z, noise, learning=stage1)
        h_x, h_z = self.hidden_states(x_t, latents.z_t, t_z)                           # (b, L, d), (b, M, d)

        evenly_spaced = not (c.stage1_t_min if stage1 else c.p_start)
        token_loss, overflow = self.token_loss(h_x, x, mask, t_x, evenly_spaced)
        logs = {**latents.logs, 'token_loss': token_loss, 'overflow': overflow}
        loss = c.lambda_x * token_loss
        if stage1:
            loss = loss + latents.vq_loss
        else:
            predictions = {'latent_loss': self.z_head(h_z)}
            if c.latent_layers:
                predictions['seq_latent_loss'] = self.predict_latent(latents.z_t, t_z, None)
            for name, prediction in predictions.items():
                logs[name] = self.channel.loss(prediction, latents, t_z)
                loss = loss + c.lambda_z * logs[name]
        return loss, {k: v.detach() for k, v in (logs | {'loss': loss}).items()}

    def prior_loss(self, x, noise, z_0=None):
        """The loss of stage 3: the latent denoiser's alone."""
        t = noise.times('t_z')
        with torch.no_grad():
            latents = self.channel.noised(self.encode(x, None, z_0), t, noise, learning=False)
        loss = self.channel.loss(self.predict_latent(latents.z_t, t, None), latents, t)
        return loss, {'loss': loss.detach(), 'seq_latent_loss': loss.detach()}

    # --- likelihood ---

    @torch.no_grad()
    def nll_parts(self, x, noise, strategy='joint', z_0=None, tokens_only=False):
        """Tokens and latent of the negative ELBO of a strategy, one time each, nats per sequence (b,).

        joint: both channels at the same time t; seq: tokens given the clean latent, latent given nothing.
        The token part alone is the papers' "data" likelihood, the *token channel*. It is no bound on
        -log p(x): the latent that the tokens are given was read off x. tokens_only spares the passes for the
        latent. ValueError for an unknown strategy.
        """
        joint = self.sampling_options(strategy)['strategy'] == 'joint'
        z_0, t = self.latents_of(x, z_0), noise.times('t_x')
        x_t, mask = self.corrupt(x, t, noise)

        def noised(t):
            return self.channel.seen(self.channel.corrupt(z_0, t, noise))

        def token_nats(z, t_z):
            h_x, _ = self.hidden_states(x_t, z, t_z)
            return elbo_weight(t, self.config.schedule) * self.masked_nll(h_x, x, mask)
        t_z = t if joint else torch.zeros_like(t)
        parts = {'token': token_nats(noised(t) if joint else self.channel.seen(z_0), t_z)}
        if tokens_only:
            return parts

        s = self.channel.bound_times(t)
        if joint:
            x_s, _ = self.corrupt(x, s, noise)
            prediction = self.z_head(self.hidden_states(x_s, noised(s), s)[1])
        else:
            prediction = self.predict_latent(noised(s), s, torch.full_like(x, self.mask_id))
        parts['latent'] = self.channel.bound(prediction, z_0, self.channel.corrupt(z_0, s, noise), s)
        if self.channel.t_end:  # what the tokens lose by the noise that the latent keeps
            t_z = t_z.clamp(min=self.channel.t_end)
            parts['latent'] += token_nats(noised(t_z), t_z) - parts['token']
        return parts

    # --- sampling ---

    def sampling_options(self, strategy='', sampler='', **given):
        options = super().sampling_options(strategy, sampler, **given)
        if options['strategy'] == 'joint' and options['sampler'] == 'first_hitting':
            raise ValueError('first_hitting reveals one token per call, which gives a joint latent no steps: '
                             'use it with strategy=seq')
        if options.get('latent', 'generated') != 'generated':
            if 'latent_steps' in given:
                raise ValueError(f'latent={options["latent"]} takes no latent_steps: leave them out')
            del options['latent_steps']
        return options

    @torch.no_grad()
    def sample(self, n, steps, strategy='', sampler='', x=None, z_0=None, generator=None, callback=None,
               **options):
        """-> ids (n, L). joint: `steps` calls. seq: `latent_steps` for the latent, `steps` for the tokens.

        x: as MDLM's. z_0: clean latents, as latents_of returns them, in place of the first half of seq.
        options: temperature, top_p, eta of remdm, latent_steps and latent of seq. callback(step, x, z) sees
        every step, those of a latent before tokens as steps -latent_steps ... -1; z: vectors (n, M, D), codes
        (n, M), or None with latent=none.
        """
        options = self.sampling_options(strategy, sampler, **with_latent(z_0, options))
        x = self.all_masked(n) if x is None else x
        if options.pop('strategy') == 'seq':
            return self.sample_sequentially(x, z_0, steps, **options, generator=generator, callback=callback)
        return self.sample_jointly(x, steps, **options, generator=generator, callback=callback)

    def sample_jointly(self, x, steps, sampler, temperature, top_p, eta=0.0, generator=None, callback=None):
        """LADD eq. (Joint)."""
        z_1 = self.channel.prior(len(x), x.device, generator)
        step = functools.partial(self.channel.step, generator=generator)
        draw = functools.partial(draw_tokens, temperature=temperature, top_p=top_p)
        alphas = alpha(time_grid(steps, x.device), self.config.schedule)
        return joint(self.joint_denoise, x, z_1, steps, alphas, step, self.mask_id, draw, eta, generator,
                     callback)

    def sample_sequentially(self, x, z_0, steps, latent, latent_steps=0, generator=None, callback=None,
                            **options):
        """LADD eq. (Seq.)."""
        def predict(z_t, t):
            nothing = torch.full_like(x, self.mask_id)
            return self.predict_latent(self.channel.seen(z_t), t.float().expand(len(x)), nothing)

        def denoise(x_t, where):
            active = where.any(dim=1)
            t_z = torch.zeros(int(active.sum()), device=x.device)
            if latent == 'none':  # in training, a text that loses its latent still has a time, that of x_t
                masked = (x_t[active] == self.mask_id).float().mean(dim=1)
                t_z = masked if self.config.schedule == 'linear' else masked.sqrt()
            h_x, _ = self.hidden_states(x_t[active], self.channel.seen(z_0[active]), t_z)
            return self.head(h_x[where[active]])

        def latent_moved(i, z):
            callback(i, x, z)

        def tokens_revealed(i, x, _):
            callback(i, x, None if latent == 'none' else z_0)

        if latent == 'none':
            z_0 = self.channel.nothing(len(x), x.device)
        elif latent == 'generated':
            z_1 = self.channel.prior(len(x), x.device, generator)
            step = functools.partial(self.channel.step, generator=generator)
            z_0 = latent_chain(predict, z_1, latent_steps, step, callback and latent_moved)
        return reveal_tokens(denoise, x, self.mask_id, steps, self.config.schedule, **options,
                             generator=generator, callback=callback and tokens_revealed)

    # --- costs ---

    def backbones(self):
        latent_dit = [self.latent_dit] if self.config.latent_layers else []
        return [self.dit, *self.encoder.backbones(), *latent_dit]

    def flops(self, L):
        """Of one MM-DiT call, by the paper's formula over L + M positions."""
        return self.dit.flops(L + self.config.num_latents)

    def sampling_flops(self, L, steps, **options):
        c, options = self.config, self.sampling_options(**options)
        latent_steps = options.get('latent_steps', 0)  # of seq with generated latents
        once = self.latent_dit.flops(c.num_latents) if c.latent_layers else self.flops(L)
        return super().sampling_flops(L, steps, **options) + latent_steps * once


def refuse(c, channel):
    """ValueError for values that do not go together."""
    if c.latent_schedule not in channel.schedules:
        raise ValueError(f'latent_schedule is one of {", ".join(channel.schedules)} for {channel.name}, '
                         f'not {c.latent_schedule!r}')
    if c.encoder and c.num_latents > c.block_size:
        raise ValueError(f'a frozen encoder has a state for each of the {c.block_size} tokens, too few for '
                         f'num_latents={c.num_latents}')
    if c.encoder and c.stage1_iters and not channel.has_codebook:
        raise ValueError(f'stage 1 would train a frozen encoder; Co-LADD with encoder={c.encoder} wants '
                         'stage1_iters=0')
    if c.stored_latents and c.encoder_dropout:
        raise ValueError('encoder_dropout blanks what the mask of each step hides, which stored latents '
                         'cannot: stored_latents=True wants encoder_dropout=False')
    if channel.has_codebook and c.vq_start and c.vq_start >= c.stage1_iters:
        raise ValueError(f'the codebook starts within stage 1: vq_start={c.vq_start} must be less than '
                         f'stage1_iters={c.stage1_iters}')
    if 0 < c.stage3_start <= c.stage1_iters:
        raise ValueError(f'stage 3 comes after the others: stage3_start={c.stage3_start} must be more than '
                         f'stage1_iters={c.stage1_iters}')


# ------------------------------------------------------------------------------------------------------------
# encoders: LADD appendix D

def latents_at(c):
    """Positions of the latents, (M,), among tokens at 0, 1, ..., L - 1."""
    if c.latents == 'behind':
        return torch.arange(c.block_size, c.block_size + c.num_latents)
    return (torch.arange(c.num_latents) + 0.5) * c.block_size / c.num_latents - 0.5


class Encoder(nn.Module):
    """Learned: a DiT over the tokens and M query positions; its outputs at these are the latent.

    Our choice: in the paper and the official code, a learned encoder reads the rightmost M token positions.
    """

    def __init__(self, c):
        super().__init__()
        self.num_latents = c.num_latents
        self.embed = nn.Embedding(c.vocab_size, c.hidden)
        # latents that are spread differ by their place alone
        self.queries = nn.Parameter(torch.randn(1 if c.latents == 'spread' else c.num_latents, c.hidden))
        positions = torch.cat((torch.arange(c.block_size), latents_at(c)))
        self.dit = DiT(c.hidden, c.encoder_layers, c.num_heads, c.cond_dim, positions, dropout=c.dropout)
        self.out = nn.Linear(c.hidden, c.latent_dim)

    def forward(self, x, blank=None):
        """x (b, L); blank: bool (b, L), positions whose embedding is zeroed -> (b, M, D)."""
        e = self.embed(x)
        if blank is not None:
            e = e.masked_fill(blank[..., None], 0)
        queries = self.queries.expand(len(x), self.num_latents, -1)
        h = self.dit(torch.cat((e, queries), dim=1))                                   # (b, L + M, d)
        return self.out(h[:, x.shape[1]:])

    def backbones(self):
        return [self.dit]


class FrozenEncoder(nn.Module):
    """Pretrained: its states, pooled to M and cut to their first D coordinates. M = L is CCDD-like.

    A module without weights: the encoder is attached when there is text to encode, and is no submodule.
    So no checkpoint holds it, no optimizer or .train() reaches it, and sampling does without it.
    """

    def __init__(self, c):
        super().__init__()
        self.num_latents, self.latent_dim = c.num_latents, c.latent_dim

    def attach(self, encoder):
        if self.latent_dim > encoder.width:
            raise ValueError(f'latent_dim={self.latent_dim} coordinates are more than the encoder\'s '
                             f'{encoder.width}')
        self.pretrained = encoder

    @torch.compiler.disable
    @torch.no_grad()
    def forward(self, x, blank=None):
        """As Encoder's."""
        states, summary = self.pretrained(x, blank)
        D = self.latent_dim
        return pool(states[..., :D].float(), summary[..., :D].float(), self.num_latents)

    def backbones(self):
        return []


# ------------------------------------------------------------------------------------------------------------
# the vector quantizer of Di-LADD: LADD appendix C.2

def in_fp32(method):
    """Keeps autocast out: choosing codes and averaging them need more precision than bf16."""
    @functools.wraps(method)
    def inner(self, e, *args, **kwargs):
        with torch.autocast(e.device.type, enabled=False):
            return method(self, e.float(), *args, **kwargs)
    return inner


class Quantizer(nn.Module):
    """A cosine-similarity codebook. Each latent, a unit vector, becomes the code nearest to it.

    Codes are learned without gradients: a code is the running mean of the vectors that chose it. So codes
    start where vectors are (k-means), and one that hardly any vector chooses starts again elsewhere. This
    is VectorQuantize with use_cosine_sim of vector-quantize-pytorch, the library that the paper names; the
    official code has decay .95, commitment .1, a dead-code threshold of 2, and k-means of 10 iterations.
    """
    at_once = 4096  # vectors compared with all codes at a time: k-means sees 131,000 vectors for 8,191 codes

    def __init__(self, size, dim, decay=0.95, commitment=0.1, dead_below=2.0):
        super().__init__()
        self.decay, self.commitment, self.dead_below = decay, commitment, dead_below
        self.register_buffer('codebook', F.normalize(torch.randn(size, dim), dim=-1))  # unit vectors
        # running means of how many vectors of a batch chose each code, and of their sum
        self.register_buffer('counts', torch.full((size,), dead_below))
        self.register_buffer('sums', self.codebook * dead_below)
        # (vectors, codes) of this step's micro-batches, each of which gets a graph of its own when compiled
        self.met = []

    @in_fp32
    def nearest(self, e):
        """Unit vectors e (..., D) -> code indices (...), LADD eq. (73)."""
        parts = e.flatten(0, -2).split(self.at_once)
        return torch.cat([(part @ self.codebook.T).argmax(dim=-1) for part in parts]).view(e.shape[:-1])

    def forward(self, e, learning=False):
        """Unit vectors e (b, M, D) -> quantised (straight-through), codes (b, M), commitment loss: eq. (74).

        learning: `learn` will move the codebook by these vectors.
        """
        codes = self.nearest(e)
        quantised = self.codebook[codes]
        loss = self.commitment * F.mse_loss(e, quantised)
        if learning:
            self.met.append((e.detach(), codes))
        return e + (quantised - e).detach(), codes, loss

    @torch.no_grad()
    def learn(self, finite, noise):
        """Once per step, by the vectors of the whole global batch: so every process makes the same move."""
        if self.met:
            # micro-batches, then processes, interleave in the batch's order: (b, micro, W, ...)
            e, codes = (torch.stack(parts, dim=1) for parts in zip(*self.met))
            e, codes = (gathered(part.flatten(0, 1)) for part in (e, codes))
            self.update(e.flatten(0, 2), codes.flatten(), finite, noise)
            self.met = []

    def tally(self, e, codes):
        """How many of the vectors e (N, D) chose each code, and their sum: codes (N,) -> (K,), (K, D).

        By products with 0 and 1, since index_add_ is nondeterministic on a GPU: codebooks would diverge.
        """
        counts, sums = 0, 0
        for part, chosen in zip(e.split(self.at_once), codes.split(self.at_once)):
            chosen = F.one_hot(chosen, len(self.codebook)).to(e.dtype)
            counts, sums = counts + chosen.sum(dim=0), sums + chosen.T @ part
        return counts, sums

    def some_of(self, e, noise, name):
        """For each code one of the vectors e (N, D), none twice if there are enough: (K, D)."""
        K = len(self.codebook)
        return e[noise.permutation(name, max(len(e), K))[:K] % len(e)]

    @in_fp32
    def update(self, e, codes, finite, noise):
        """Moves the codebook by e (N, D) and their codes (N,), unless the step was not finite."""
        new_counts, new_sums = self.tally(e, codes)
        counts = self.counts.lerp(new_counts, 1 - self.decay)
        sums = self.sums.lerp(new_sums, 1 - self.decay)
        # a code that hardly any vector chooses restarts at a random vector of the batch
        dead = counts < self.dead_below
        fresh = self.some_of(e, noise, 'revive')
        counts = torch.where(dead, self.dead_below, counts)
        sums = torch.where(dead[:, None], self.dead_below * fresh, sums)
        codebook = F.normalize(sums, dim=-1)
        for buffer, new in ((self.counts, counts), (self.sums, sums), (self.codebook, codebook)):
            buffer.copy_(torch.where(finite, new, buffer))

    @torch.no_grad()
    @in_fp32
    def kmeans(self, e, batch_vectors, noise, iterations=10):
        """Starts the codebook by spherical k-means on e (N, D).

        batch_vectors: how many vectors a training batch has, the unit of `counts`.
        """
        self.codebook[:] = self.some_of(e, noise, 'k-means')
        for _ in range(iterations):
            counts, sums = self.tally(e, self.nearest(e))
            self.codebook[:] = torch.where(counts[:, None] > 0, F.normalize(sums, dim=-1), self.codebook)
        self.counts[:] = counts * (batch_vectors / len(e))
        self.sums[:] = sums * (batch_vectors / len(e))

    def perplexity(self):
        """exp(entropy of the running code usage): how many codes are really in use."""
        p = self.counts / self.counts.sum()
        return torch.exp(-torch.special.xlogy(p, p).sum())

    def usage(self):
        """Share of the codes whose running count is above the dead-code threshold."""
        return (self.counts > self.dead_below).float().mean()
