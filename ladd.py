"""
LADD: masked diffusion with a latent channel (Latent-Augmented Discrete Diffusion Models).

An encoder gives each text x_0 a latent z_0; tokens and latents are noised independently, x_t as in MDLM and z_t by
    Co-LADD   Gaussian noise:  z_t = abar_t z_0 + sqrt(1 - abar_t^2) eps                                 LADD eq. (20)
    Di-LADD   masking of codes: z_0 is quantised first, and each code becomes [mask] with probability 1 - alpha_t
and one MM-DiT sees both and predicts both:  loss = lambda_x * token loss + lambda_z * latent loss      LADD eq. (14)

Two ways to sample: *joint* moves both channels at every step; *sequential* makes the latent first, all tokens still masked, and
then the tokens given the clean latent. Two stages of training: first encoder, quantizer and token denoiser (lambda_z = 0), so that
the latent learns to be useful; then encoder and codebook are frozen and everything else learns the full objective.
A pretrained encoder is frozen from the start: Co-LADD then begins with the second stage, Di-LADD with the first, for its quantizer.
Read in this order: latent schedules, samplers, encoders, class LADD; the codes of Di-LADD are in quantizer.py.
"""
import functools
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

import mdlm
from lib.checkpoint import fingerprint
from lib.configurator import UserError
from lib.encoders import check_tokenizer, open_encoder, pool
from mdlm import alpha, choose, draw_tokens, elbo_weight, pairs, time_grid
from model import DiT
from quantizer import Quantizer

# ----------------------------------------------------------------------------------------------------------------------------------
# schedules of the Gaussian channel: LADD table 7, wrapped so that neither end is exact: .0001 <= abar^2 <= .9999

VP_SCHEDULES = ('vp_linear', 'vp_cosine', 'vp_sqrt')


def abar(t, schedule='vp_sqrt'):
    """Signal level of z_t; any tensor t in [0, 1] -> the same shape."""
    if schedule == 'vp_linear':
        square = 1 - t
    elif schedule == 'vp_cosine':
        square = torch.cos((t + 0.008) / 1.008 * torch.pi / 2) ** 2
    else:  # vp_sqrt
        square = (1 - t).sqrt()
    return ((1 - 2e-4) * square + 1e-4).sqrt()


# ----------------------------------------------------------------------------------------------------------------------------------
# samplers: pure functions over
#     denoise(x_t, z_t, t, where) -> token logits (where.sum(), V), latent prediction (z_0 hat (n, M, D), or code logits (n, M, K))
# and over the latent channel's own move `latent_step(z_t, prediction, t, s) -> z_s`, one of the two that follow

def ddim_step(z_t, z0_hat, t, s, schedule='vp_sqrt'):
    """DDIM with eta = 0, LADD eq. (40); the step to s = 0 returns the prediction."""
    if s == 0:
        return z0_hat
    a_t, a_s = abar(t, schedule), abar(s, schedule)
    eps_hat = (z_t - a_t * z0_hat) / (1 - a_t**2).sqrt()
    return a_s * z0_hat + (1 - a_s**2).sqrt() * eps_hat


def code_step(z_t, logits, t, s, schedule='linear', generator=None):
    """A step of masked diffusion over code indices z_t (n, M), the last index K being [mask]; logits (n, M, K)."""
    reveal, _ = choose(z_t, alpha(t, schedule), alpha(s, schedule), logits.shape[-1], generator=generator)
    z_s = z_t.clone()
    if reveal.any():
        z_s[reveal] = draw_tokens(logits[reveal], generator=generator)
    return z_s


def joint(denoise, x, z, steps, alphas, latent_step, mask_id, draw=draw_tokens, eta=0.0, generator=None, callback=None):
    """Both channels from t = 1 to 0 in `steps` calls, each seeing (x_t, z_t): LADD eq. (Joint), (65), (66)."""
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
            callback(i, x)
    return x


def latent_chain(predict, z, steps, latent_step):
    """The latent channel alone, from t = 1 to 0: predict(z_t, t) -> latent prediction. The first half of LADD eq. (Seq.)."""
    times = time_grid(steps, z.device)
    for t, s in zip(times[:-1], times[1:]):
        z = latent_step(z, predict(z, t), t, s)
    return z


# ----------------------------------------------------------------------------------------------------------------------------------
# the method

@dataclass
class Config(mdlm.Config):
    latent: str = 'continuous'  # continuous: Co-LADD | discrete: Di-LADD
    num_latents: int = 1  # M
    latent_dim: int = 32  # D
    latent_schedule: str = 'vp_sqrt'  # vp_linear | vp_cosine | vp_sqrt; of codes: linear | polynomial
    codebook_size: int = 511  # usable codes (the paper's 512 counts the mask)
    vq_decay: float = 0.95  # per step; slower for small batches, which touch few codes
    dead_below: float = 2.0  # a code chosen less often than this per batch starts anew
    encoder: str = ''  # '': learned | hub id, folder or out/NAME of an AR checkpoint: pretrained and frozen, see encoders.py
    stored_latents: bool = False  # train on what the frozen encoder said once and data/encode.py stored
    encoder_layers: int = 2  # of the learned encoder, a DiT of the same width
    unit_norm: bool = True  # scale each continuous latent to latent_length, LADD eq. (75)
    latent_length: float = 1.0  # the paper's; sqrt(D) gives each coordinate variance 1, like the noise (our experiment)
    latent_layers: int = 0  # > 0: a latent denoiser of its own for sequential sampling; 0: the MM-DiT with all tokens masked
    lambda_x: float = 1.0
    lambda_z: float = 1.0
    times: str = 'same'  # t_z = t_x | independent
    p_drop: float = 0.0  # latent dropout per sequence (Co-LADD)
    encoder_dropout: bool = False  # p_r ~ U[0, .9] per sequence: blank masked positions in the encoder's input
    p_start: float = 0.0  # share of sequences trained with all tokens masked, where sequential sampling starts (our choice)
    stage1_iters: int = 0  # steps of stage 1
    stage1_t_min: float = 0.0  # its token times are U[stage1_t_min, 1] (our choice, like the next two; why: config/sawtooth_di_ladd.py)
    stage1_clean: bool = False  # its latents are not noised
    vq_start: int = 0  # step at which k-means starts the codebook; before it the latents pass unquantised, and validation means nothing


class Encoder(nn.Module):
    """Learned: a DiT over the tokens and M extra positions, whose last M outputs are the latent (LADD appendix D)."""

    def __init__(self, c):
        super().__init__()
        self.embed = nn.Embedding(c.vocab_size, c.hidden)
        self.queries = nn.Parameter(torch.randn(c.num_latents, c.hidden))
        self.dit = DiT(c.hidden, c.encoder_layers, c.num_heads, c.cond_dim, c.block_size + c.num_latents, dropout=c.dropout)
        self.out = nn.Linear(c.hidden, c.latent_dim)

    def forward(self, x, blank=None):
        """x (b, L); blank: bool (b, L), positions whose embedding is zeroed -> (b, M, D)."""
        e = self.embed(x)
        if blank is not None:
            e = e.masked_fill(blank[..., None], 0)
        h = self.dit(torch.cat((e, self.queries.expand(len(x), -1, -1)), dim=1))
        return self.out(h[:, x.shape[1]:])


class FrozenEncoder(nn.Module):
    """Pretrained: its states, pooled to M and cut to their first D coordinates (LADD appendix D). M = L is the setting of CCDD.

    A module without weights: the encoder is opened by name when there is something to encode. So no checkpoint holds it, no optimizer
    or .train() reaches it, and sampling does without it.
    """

    def __init__(self, c):
        super().__init__()
        self.name, self.num_latents, self.latent_dim = c.encoder, c.num_latents, c.latent_dim

    @torch.compiler.disable
    @torch.no_grad()
    def forward(self, x, blank=None):
        """As Encoder's."""
        states, summary = open_encoder(self.name, x.device)(x, blank)
        return pool(states[..., :self.latent_dim].float(), summary[..., :self.latent_dim].float(), self.num_latents)


class LADD(mdlm.MDLM):
    strategies = ('joint', 'seq')

    def __init__(self, config):
        c = config
        super().__init__(c, c.num_latents)
        mdlm.one_of('latent', c.latent, ('continuous', 'discrete'))
        self.discrete = c.latent == 'discrete'
        self.no_bound = '' if self.discrete else ' (of the tokens given the latent of the text itself, no bound)'  # what nll is, for who prints it
        masking = ('linear', 'polynomial')  # not geometric: alpha_0 < 1 would owe both channels a reconstruction term
        mdlm.one_of('schedule', c.schedule, masking)
        mdlm.one_of('latent_schedule', c.latent_schedule, masking if self.discrete else VP_SCHEDULES)
        mdlm.one_of('times', c.times, ('same', 'independent'))
        if c.encoder and c.num_latents > c.block_size:
            raise ValueError(f'a frozen encoder has a state for each of the {c.block_size} tokens, which makes no num_latents={c.num_latents}')
        if c.encoder and c.stage1_iters and not self.discrete:
            raise ValueError(f'stage 1 would train a frozen encoder; Co-LADD with encoder={c.encoder} wants stage1_iters=0')
        if c.stored_latents and not c.encoder:
            raise ValueError('stored_latents=True wants a frozen encoder: encoder=NAME')
        if c.stored_latents and c.encoder_dropout:
            raise ValueError('encoder_dropout blanks what the tokens\' mask hides, at every step anew: stored_latents=True wants encoder_dropout=False')
        if self.discrete and c.vq_start and c.vq_start >= c.stage1_iters:
            raise ValueError(f'the codebook starts within stage 1: vq_start={c.vq_start} must be less than stage1_iters={c.stage1_iters}')
        self.stage, self.quantising = 2, True  # begin_step sets them while training
        self.encoder = FrozenEncoder(c) if c.encoder else Encoder(c)
        self.z_in = nn.Linear(c.latent_dim, c.hidden)
        self.z_head = nn.Linear(c.hidden, c.codebook_size if self.discrete else c.latent_dim)
        if self.discrete:
            self.quantizer = Quantizer(c.codebook_size, c.latent_dim, c.vq_decay, dead_below=c.dead_below)
            self.z_mask = nn.Parameter(torch.randn(c.latent_dim) * c.latent_dim**-0.5)  # learnable, of a code's length
        if c.latent_layers:
            self.latent_in = nn.Linear(c.latent_dim, c.hidden)
            # for M = 1 attention is a linear map, and this DiT is the paper's "small MLP" with AdaLN
            self.latent_dit = DiT(c.hidden, c.latent_layers, c.num_heads, c.cond_dim, c.num_latents, dropout=c.dropout)
            self.latent_head = nn.Linear(c.hidden, c.codebook_size if self.discrete else c.latent_dim)

    # --- the latent channel -------------------------------------------------------------------------------------------------------

    def check_data(self, data, device):
        """-> fingerprint of the frozen encoder, or None. UserError unless it can read this data source. Stored latents were checked when made."""
        c = self.config
        if not c.encoder or c.stored_latents:
            return None
        encoder = open_encoder(c.encoder, device)
        check_tokenizer(encoder, data)
        if c.latent_dim > encoder.width:
            raise UserError(f'latent_dim={c.latent_dim} coordinates are more than the {encoder.width} of {c.encoder}')
        return fingerprint(encoder.model)

    def encode(self, x, blank=None, stored=None):
        """x (b, L) -> continuous latents before any quantizer, (b, M, D) fp32. stored: what the frozen encoder once said of x, (b, M, D)."""
        z = self.encoder(x, blank).float() if stored is None else stored
        if self.discrete:
            return F.normalize(z, dim=-1)
        return self.config.latent_length * F.normalize(z, dim=-1) if self.config.unit_norm else z

    def corrupt_latent(self, z_0, t, noise):
        """q(z_t | z_0): vectors (b, M, D), or codes (b, M) that turn into [mask] = K; t (b,)."""
        if not self.discrete:
            a = abar(t, self.config.latent_schedule)[:, None, None]
            return a * z_0 + (1 - a**2).sqrt() * noise.normal('eps', *z_0.shape[1:])
        mask = noise.uniform('z_mask', z_0.shape[1]) < 1 - alpha(t, self.config.latent_schedule)[:, None]
        return z_0.masked_fill(mask, self.config.codebook_size)

    def vectors(self, codes):
        """Codes (b, M) with K for [mask] -> what the denoiser sees, (b, M, D)."""
        return torch.cat((self.quantizer.codebook, self.z_mask[None]))[codes]

    def latent_step(self, z_t, prediction, t, s, generator=None):
        if self.discrete:
            return code_step(z_t, prediction, t, s, self.config.latent_schedule, generator)
        return ddim_step(z_t, prediction, t, s, self.config.latent_schedule)

    def latent_prior(self, n, generator=None):
        """z_1: (n, M) masks, or (n, M, D) Gaussian."""
        c, device = self.config, self.head.weight.device
        if self.discrete:
            return torch.full((n, c.num_latents), c.codebook_size, device=device)
        return torch.randn(n, c.num_latents, c.latent_dim, device=device, generator=generator)

    # --- the denoisers --------------------------------------------------------------------------------------------------------------

    def hidden_states(self, x_t, z_t, t_z):
        """Vectors z_t (b, M, D), t_z (b,) -> (b, L, d), (b, M, d). Gaussian latents need their time

        (only their own stream sees it: our choice, the official code tells both); [mask]s show theirs.
        """
        return self.dit(self.embed(x_t), self.z_in(z_t), t=[None, None if self.discrete else t_z])

    def predict_latent(self, z_t, t_z, x_t):
        """The sequential strategy's first half: from vectors z_t alone (x_t is all [mask])."""
        if not self.config.latent_layers:
            return self.z_head(self.hidden_states(x_t, z_t, t_z)[1])
        return self.latent_head(self.latent_dit(self.latent_in(z_t), t=None if self.discrete else [t_z]))

    # --- training -------------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def begin_step(self, step, draw_rows, noise):
        """Sets the stage from the step, and starts the codebook when its time has come. -> what begins here, for who prints it, or None.

        draw_rows(n) -> n training texts (n, L), and their stored latents if there are any.
        """
        c = self.config
        self.stage, self.quantising = 1 if step < c.stage1_iters else 2, step >= c.vq_start
        self.encoder.train(self.stage == 1)
        if self.discrete and step == c.vq_start and self.stage == 1:
            n = max(1, 16 * c.codebook_size // c.num_latents)  # 16 vectors for every code
            self.encoder.eval()
            e = torch.cat([self.encode(x, None, *z_0) for x, *z_0 in zip(*(part.split(256) for part in draw_rows(n)))])
            self.encoder.train()
            self.quantizer.kmeans(e.flatten(0, 1), noise.total * c.num_latents, noise)
            return 'k-means has made the codebook, latents are quantised from here on'
        if 0 < step == c.stage1_iters:
            return f'stage 2 begins: encoder{" and codebook" * self.discrete} frozen, the latent loss joins'

    def forward(self, x, noise, z_0=None):
        """Training loss of x (b, L) int64, LADD eq. (14), and logs. z_0: stored latents (b, M, D), instead of encoding x."""
        c, stage1 = self.config, self.stage == 1
        t_x = noise.times('t_x', in_order=True)
        if stage1:
            t_x = c.stage1_t_min + (1 - c.stage1_t_min) * t_x
        elif c.p_start:
            t_x = torch.where(noise.uniform('start') < c.p_start, 1.0, t_x)
        t_x = 1e-4 + (1 - 1e-4) * t_x
        t_z = noise.times('t_z') if c.times == 'independent' else t_x
        if stage1 and c.stage1_clean:
            t_z = torch.zeros_like(t_x)
        x_t, mask = self.corrupt(x, t_x, noise)

        blank = None
        if c.encoder_dropout:
            p_r = 0.9 * noise.uniform('p_r')
            blank = mask & (noise.uniform('blank', x.shape[1]) < p_r[:, None])
        with torch.set_grad_enabled(stage1):  # stage 2: encoder and codebook are frozen
            z_0 = self.encode(x, blank, z_0)
        logs, vq_loss = {}, 0.0
        if self.discrete and self.quantising:
            z_0, codes, vq_loss = self.quantizer(z_0, noise if stage1 else None)
            z_code = self.corrupt_latent(codes, t_z, noise)
            z_masked = z_code == c.codebook_size
            z_t = torch.where(z_masked[..., None], self.z_mask, z_0)  # z_0: code vectors with the straight-through gradient
            logs.update(code_perplexity=self.quantizer.perplexity(), code_usage=self.quantizer.usage())
        elif self.discrete:
            z_t = z_0
        else:
            drop = noise.uniform('drop') < c.p_drop  # as in the official code: z_0 = z_t = 0 and no latent loss (the paper noises the zeros and keeps the loss)
            z_t = self.corrupt_latent(z_0, t_z, noise).masked_fill(drop[:, None, None], 0)

        h_x, h_z = self.hidden_states(x_t, z_t, t_z)
        token_loss, overflow = self.token_loss(h_x, x, mask, t_x, uniform=not (stage1 and c.stage1_t_min or c.p_start))
        loss = c.lambda_x * token_loss
        if stage1:
            loss = loss + vq_loss
        else:
            def latent_loss(prediction):  # LADD eq. (13)
                if not self.discrete:
                    return ((prediction - z_0).square().mean(dim=(1, 2)) * ~drop).mean()
                weight = elbo_weight(t_z.clamp(min=1e-4), c.latent_schedule) if c.weighting == 'elbo' else torch.ones_like(t_z)
                return (F.cross_entropy(prediction.flatten(0, 1).float(), codes.flatten(), reduction='none').view(codes.shape)
                        * z_masked * weight[:, None]).mean()
            logs['latent_loss'] = latent_loss(self.z_head(h_z))
            loss = loss + c.lambda_z * logs['latent_loss']
            if c.latent_layers:
                logs['seq_latent_loss'] = latent_loss(self.predict_latent(z_t, t_z, None))
                loss = loss + c.lambda_z * logs['seq_latent_loss']
        logs.update(loss=loss, token_loss=token_loss, overflow=overflow)
        return loss, {k: v.detach() for k, v in logs.items()}

    # --- likelihoods ----------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def channel_nll(self, x, noise, strategy='joint', z_0=None):
        """Token and latent part of the ELBO of one strategy, one time each, nats per sequence: (b,), (b,) for codes or None.

        joint: both channels at the same time t; seq: tokens given the clean latent, latent given nothing.
        The token part alone is the papers' "data" likelihood. It is no bound on -log p(x): the latent it is given was read off x.
        """
        c = self.config
        z_0 = self.encode(x, stored=z_0)
        if self.discrete:
            z_0 = self.quantizer.nearest(z_0)
        t = noise.times('t_x')
        x_t, mask = self.corrupt(x, t, noise)
        z_t = self.corrupt_latent(z_0, t, noise) if strategy == 'joint' else z_0
        h_x, h_z = self.hidden_states(x_t, self.vectors(z_t) if self.discrete else z_t, t if strategy == 'joint' else torch.zeros_like(t))
        tokens = elbo_weight(t, c.schedule) * self.masked_nll(h_x, x, mask)
        if not self.discrete:
            return tokens, None
        if strategy == 'seq':
            z_t = self.corrupt_latent(z_0, t, noise)
            logits = self.predict_latent(self.vectors(z_t), t, torch.full_like(x, self.mask_id))
        else:
            logits = self.z_head(h_z)
        nats = F.cross_entropy(logits.float().flatten(0, 1), z_0.flatten(), reduction='none').view(z_0.shape)
        return tokens, elbo_weight(t, c.latent_schedule) * (nats * (z_t == c.codebook_size)).sum(dim=1)

    def nll(self, x, noise, z_0=None):
        """Di-LADD: token + code ELBO of the joint strategy, an upper bound on -log p(x). Co-LADD: the token channel only, no bound."""
        tokens, latent = self.channel_nll(x, noise, z_0=z_0)
        return tokens if latent is None else tokens + latent

    # --- sampling -------------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(self, n, steps, strategy='joint', latent_steps=8, sampler='ancestral', eta=1.0, temperature=1.0, top_p=1.0,
               x=None, z_0=None, generator=None, callback=None):
        """-> (n, L) ids. joint: `steps` calls. seq: `latent_steps` calls for the latent, then `steps` for the tokens.

        z_0: a clean latent to write from, vectors (n, M, D) or codes (n, M), in place of seq's first half.
        """
        c, device = self.config, self.head.weight.device
        if strategy == 'joint' and sampler == 'first_hitting':
            raise ValueError('first_hitting is for the sequential strategy: joint latents move on a grid')
        if strategy == 'joint' and z_0 is not None:
            raise ValueError('a clean latent is for the sequential strategy: joint makes its own on the way')
        if x is None:
            x = torch.full((n, c.block_size), self.mask_id, device=device)
        z = self.latent_prior(n, generator)
        see = self.vectors if self.discrete else (lambda z: z)

        def latent_step(z_t, prediction, t, s):
            return self.latent_step(z_t, prediction, t, s, generator)

        def times(t):
            return t.float().expand(n)

        if strategy == 'seq':
            if z_0 is None:
                def predict(z, t):
                    return self.predict_latent(see(z), times(t), torch.full_like(x, self.mask_id))
                z_0 = latent_chain(predict, z, latent_steps, latent_step)

            def denoise(x_t, where):
                active = where.any(dim=1)
                h, _ = self.hidden_states(x_t[active], see(z_0[active]), x_t.new_zeros(int(active.sum()), dtype=torch.float32))
                return self.head(h[where[active]])
            return mdlm.run_sampler(denoise, x, self.mask_id, steps, c.schedule, sampler, eta, temperature, top_p, generator, callback)

        def denoise(x_t, z_t, t, where):
            h_x, h_z = self.hidden_states(x_t, see(z_t), times(t))
            return self.head(h_x[where]), self.z_head(h_z)

        draw = functools.partial(draw_tokens, temperature=temperature, top_p=top_p)
        alphas = alpha(time_grid(steps, device), c.schedule)
        return joint(denoise, x, z, steps, alphas, latent_step, self.mask_id, draw, eta if sampler == 'remdm' else 0.0, generator, callback)

    def flops(self, L):
        """Of one MM-DiT call, by the paper's formula over L + M positions."""
        return self.dit.flops(L + self.config.num_latents)
