"""
LDLM: latent diffusion trained jointly with its latent space
(How to Train Your Latent Diffusion Language Model Jointly With the Latent Space, Meshchaninov et al., 2026,
arXiv:2605.07933).

    h = token encoder(x)      frozen and pretrained, each feature scaled to mean 0 and variance 1
    z = E(h)                  one latent per token
    h_hat = D(z + sigma_dec eps),  logits = token decoder(stop_grad(h_hat));  without the noise when sampling
    z_t = alpha_t z + sigma_t eps,  z_hat = denoiser(z_t, t, earlier z_hat)
    loss = |z_hat - z|^2 + |h_hat - h|^2 - log p(x | h_hat)                             LDLM eq. (1) - (4)

The loss is a mean over tokens, and the squares are means over coordinates, too. Minimised as it stands, it
lets the encoder shrink the latents until they are trivial to denoise. The paper's recipe against that and for
better samples has four parts, each with its own key (RESULTS.md takes away one at a time):
    reconstruction='mse'   the states h, not the tokens, are what the encoder has to keep, so latents of
                           similar states may be similar
    encoder_warmup         the encoder feels the denoiser's loss times gamma, which rises from 0 to 1; the
                           denoiser itself learns at full strength from the start
    adaptive_t             times are drawn so that the loss rises evenly over them
    sigma_dec              noise in the decoder's input: only large and smooth latents can be read through it
Sampling runs the denoiser from noise to z_0 and decodes once. There is no likelihood.
The text of the paper that we worked from had lost its formulas. Where a value comes from is marked [paper],
[second-hand], [family] (other code by the same authors), [checked] (derived, and confirmed by a number that
survives) or [choice] (ours). Read in this order: schedule, samplers, adaptive times, transformer, class LDLM.
"""
import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from lib.configurator import Keys, Not, key
from lib.distributed import summed
from lib.method import Method, with_latent
from mdlm import time_grid, wide
from model import DiT, attend, head_cross_entropy, rope_table, rotate, rows_at_once

# ------------------------------------------------------------------------------------------------------------
# the tangent schedule [paper; its formula: family]: sigma_t / alpha_t = d tan(pi t / 2), variance preserving,
# from no noise at t = 0 to nothing but noise at t = 1

def alpha_sigma(t, d=3.0):
    """Signal and noise level of z_t, alpha^2 + sigma^2 = 1; any tensor t in [0, 1] -> two of its shape."""
    a, s = torch.cos(t * math.pi / 2), d * torch.sin(t * math.pi / 2)
    return a / torch.hypot(a, s), s / torch.hypot(a, s)


def beta(t, d=3.0):
    """-2 d log alpha_t / dt, the rate of the SDE dz = -beta/2 z dt + sqrt(beta) dW.

    It is infinite at t = 1, so t stops at .95 [family].
    """
    tan = torch.tan(t.clamp(max=0.95) * math.pi / 2)
    return math.pi * d**2 * tan * (1 + tan**2) / (1 + d**2 * tan**2)


# ------------------------------------------------------------------------------------------------------------
# samplers: pure functions over `denoise(z_t, t, z_self) -> z_0 hat`, all latents (n, L, D), t a scalar, one
# call per step. z_self is the estimate of the step before, at first zeros (self-conditioning, Chen et al.,
# 2023, arXiv:2208.04202). callback(i, z_0 hat) sees every step.

T_END = 0.05  # where Euler-Maruyama stops [family]


def euler_maruyama(denoise, z, steps, d=3.0, generator=None, callback=None, start=1.0):
    """The reverse SDE on a uniform grid from t = start to .05 -> mean of the last step, last z_0 hat.

    The mean is what the authors' other code decodes, a latent that still has the noise of t = .05. The paper
    says "a clean latent prediction". With few steps beta dt is large and overshoots: on the way z has up to
    2.4 times the variance of z_t with 16 steps, 6.7 times with 8 (exact, for Gaussian latents of variance 1).
    With so few, ddim is worth a try.
    """
    times, z_hat = T_END + (start - T_END) * time_grid(steps, z.device), torch.zeros_like(z)
    for i, (t, s) in enumerate(zip(times[:-1], times[1:])):
        z_hat = denoise(z, t, z_hat)
        (alpha, sigma), rate = alpha_sigma(t, d), beta(t, d) * (t - s)
        score = (alpha * z_hat - z) / sigma**2
        mean = z + rate * (z / 2 + score)
        z = mean + rate.sqrt() * torch.randn(z.shape, dtype=z.dtype, device=z.device, generator=generator)
        if callback:
            callback(i, z_hat)
    return mean, z_hat


def ddim(denoise, z, steps, d=3.0, callback=None):
    """DDIM with eta = 0 on a uniform grid from t = 1 to 0 -> z_0: the step to 0 returns the last z_0 hat."""
    times, z_hat = time_grid(steps, z.device), torch.zeros_like(z)
    for i, (t, s) in enumerate(zip(times[:-1], times[1:])):
        z_hat = denoise(z, t, z_hat)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(t, d), alpha_sigma(s, d)
        z = alpha_s * z_hat + sigma_s * (z - alpha_t * z_hat) / sigma_t
        if callback:
            callback(i, z_hat)
    return z


# ------------------------------------------------------------------------------------------------------------
# adaptive times: LDLM section 5.3, after Dieleman et al., 2022, arXiv:2211.15089. With a density of t
# proportional to the slope of the loss, the loss is linear in the quantile of t

class AdaptiveTimes(nn.Module):
    """Times from bins of equal width, with probability p_i ~ the rise of the loss over bin i, LDLM eq. (5).

    Each bin has a running mean of its losses, kept as two sums that forget at the same rate, so a bin that is
    seldom visited needs no initial value. The loss at an edge is the mean of its two bins' [choice; the
    paper has running means at the edges and does not say how a loss gets there]. Splitting each loss
    between the two nearest edges would bias every edge towards the side with more draws.
    """

    def __init__(self, bins, memory, floor):
        super().__init__()
        self.bins, self.memory, self.floor = bins, memory, floor
        self.register_buffer('p', torch.full((bins,), 1 / bins))
        self.register_buffer('sums', torch.zeros(2, bins))  # of losses, of how many
        self.register_buffer('now', torch.zeros(2, bins), persistent=False)  # sums, and this step's on top

    def draw(self, noise):
        """t (b,): bin i with probability p_i, then uniform in it; one stratified u gives both."""
        u, cdf = noise.times('t'), self.p.cumsum(dim=0)
        i = torch.searchsorted(cdf, u).clamp(max=self.bins - 1)  # the sum may round to less than 1
        return ((i + 1 + (u - cdf[i]) / self.p[i]) / self.bins).clamp(0, 1)

    @torch.no_grad()
    def track(self, t, losses):
        """Records the losses (b,) at times t of a micro-batch."""
        bins = (t * self.bins).long().clamp(max=self.bins - 1)
        new = torch.stack((losses, torch.ones_like(losses)))
        self.now += torch.zeros_like(self.sums).index_add_(1, bins, new)

    def forget(self):
        self.sums *= self.memory
        self.now.copy_(self.sums)

    def learn(self, finite):
        """Once per step, from all processes, so that their sums stay equal."""
        if dist.is_initialized():
            self.now.copy_(self.sums + summed(self.now - self.sums))
        self.sums.copy_(torch.where(finite, self.now, self.sums))
        self.now.copy_(self.sums)

    def refresh(self):
        """New probabilities, once every bin has been seen."""
        loss, count = self.sums
        mean = loss / count
        ends = 1.5 * mean[[0, -1]] - 0.5 * mean[[1, -2]]  # continued to t = 0 and t = 1 as straight lines
        rise = torch.cat((ends[:1], (mean[:-1] + mean[1:]) / 2, ends[1:])).diff()
        # a bin without rise is still visited, or its loss would never be seen to rise again
        # [choice; second-hand: 1e-6, which starves bins]
        rise = rise.clamp(min=self.floor * rise.clamp(min=0).mean() + 1e-12)
        self.p.copy_(torch.where((count > 0).all(), rise / rise.sum(), self.p))  # decided on the device

    def by_quarter(self):
        """Running mean of the loss in each quarter of [0, 1], (4,); 0 where nothing was seen."""
        quarters = [part.sum(dim=1) for part in self.now.tensor_split(4, dim=1)]
        loss, count = torch.stack(quarters, dim=1)
        return loss / count.clamp(min=1e-12)


# ------------------------------------------------------------------------------------------------------------
# the transformer of encoder and decoders

class Block(nn.Module):
    """Attention and MLP without time. With a context it is a Perceiver Resampler's block (Alayrac et al.,
    2022, arXiv:2204.14198).

    Queries come from x, keys and values from x and from the context, each by projections of their own;
    queries and keys are normalised [family].
    """

    def __init__(self, d, num_heads, context, swiglu):
        super().__init__()
        self.num_heads, self.swiglu = num_heads, swiglu
        self.norm1, self.norm2 = nn.RMSNorm(d, eps=1e-6), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.norm_q, self.norm_k = (nn.RMSNorm(d // num_heads, eps=1e-6) for _ in range(2))
        if context:
            self.norm_context, self.kv_context = nn.RMSNorm(d, eps=1e-6), nn.Linear(d, 2 * d, bias=False)
        # SwiGLU with 12 d^2 weights gives the token decoder the paper's 66M [choice]; GELU would give it 60M
        self.up = nn.Linear(d, (8 if swiglu else 4) * d, bias=not swiglu)
        self.down = nn.Linear(4 * d, d, bias=not swiglu)

    def forward(self, x, cos, sin, context=None):
        """x, context (b, L, d) -> like x.

        RoPE [choice]: place l of x and place l of the context are the same place.
        """
        def heads(y):
            return y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (b, H, L, d / H)
        q, k, v = (heads(y) for y in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        q, k = (rotate(norm(y.float()), cos, sin) for norm, y in ((self.norm_q, q), (self.norm_k, k)))
        if context is not None:
            kv = self.kv_context(self.norm_context(context))
            k_context, v_context = (heads(y) for y in kv.chunk(2, dim=-1))
            k = torch.cat((k, rotate(self.norm_k(k_context.float()), cos, sin)), dim=2)
            v = torch.cat((v, v_context), dim=2)
        y = attend(q.to(v.dtype), k.to(v.dtype), v, causal=False)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        y = self.up(self.norm2(x))
        if not self.swiglu:
            return x + self.down(F.gelu(y))
        gate, y = y.chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * y)


class Transformer(nn.Module):
    """(b, L, d) -> (b, L, d). perceiver: L learned vectors read the input in every block."""

    def __init__(self, d, num_layers, num_heads, L, perceiver=False, swiglu=False):
        super().__init__()
        self.queries = nn.Parameter(0.02 * torch.randn(L, d)) if perceiver else None
        self.blocks = nn.ModuleList(Block(d, num_heads, perceiver, swiglu) for _ in range(num_layers))
        cos, sin = rope_table(L, d // num_heads)
        self.register_buffer('cos', cos, persistent=False)
        self.register_buffer('sin', sin, persistent=False)

    def forward(self, context):
        x = context if self.queries is None else self.queries.expand_as(context)
        for block in self.blocks:
            x = block(x, self.cos, self.sin, None if self.queries is None else context)
        return x

    def flops(self, L):
        """Forward FLOPs, counted as DiT's; a perceiver's attention is to 2 L places."""
        weights = sum(p.numel() for p in self.blocks.parameters() if p.dim() > 1)
        places = L if self.queries is None else 2 * L
        return L * weights + len(self.blocks) * 2 * L * places * self.blocks[0].out.out_features


# ------------------------------------------------------------------------------------------------------------
# the method

STATE_TOKENS = 2**16  # how many give the states' mean and variance [choice; paper: the whole data set]
TRAINS_DENOISER, TRAINS_AUTOENCODER = ('joint', 'diffusion'), ('joint', 'autoencoder')
ADAPTIVE = {'adaptive_t': True, 'stage': TRAINS_DENOISER}


@dataclass
class Config(Keys):
    vocab_size: int = 0  # from the data
    block_size: int = key(0, at_least=0)  # L: tokens, and latents
    # the denoiser, a DiT [paper]; cond_dim fits its 132M parameters [checked]
    hidden: int = key(768, at_least=1)
    num_layers: int = key(12, at_least=1)
    num_heads: int = key(12, at_least=1, meaning=True)
    cond_dim: int = key(768, at_least=1)
    dropout: float = key(0.0, at_least=0, below=1, only={'stage': TRAINS_DENOISER})
    # share of texts for which the denoiser sees its own first estimate [second-hand; our text lacks it]
    self_conditioning: float = key(0.5, at_least=0, at_most=1, only={'stage': TRAINS_DENOISER})
    tangent: float = key(3.0, above=0, meaning=True, only={'stage': Not(['autoencoder'])})  # d [second-hand]
    # the autoencoder; its heads are as wide as the denoiser's
    # a hub id, a folder, or out/NAME of our AR | scratch: trained embeddings
    token_encoder: str = key('gpt2', meaning=True)
    # which of its hidden states: -1 the output, -3 the paper's third to last, 0 its embeddings
    layer: int = key(-3, meaning=True, only={'token_encoder': Not(['scratch'])})
    latent_dim: int = key(768, at_least=1)  # D: width of z and of h, which the token encoder decides
    latent_encoder: str = key('perceiver', choices=('perceiver', 'attention', 'none'))  # none: z = h
    latent_layers: int = key(6, at_least=1, only={'latent_encoder': Not(['none'])})  # of both halves
    decoder_layers: int = key(3, at_least=0)  # of the token decoder under its vocabulary head
    # what the token decoder reads: states h_hat | latents, without the latent decoder (appendix B.2)
    decode_from: str = key('states', choices=('states', 'latents'), meaning=True,
                           only={'latent_encoder': Not(['none'])})
    # the recipe; with ce the token loss reaches decoder and encoder
    reconstruction: str = key('mse', choices=('mse', 'ce', 'both'),
                              only=[{'stage': TRAINS_AUTOENCODER, 'latent_encoder': Not(['none'])},
                                    {'stage': TRAINS_AUTOENCODER, 'token_encoder': 'scratch'}])
    # steps in which gamma rises to 1, as many as in the paper's ablations [paper]; 0: no warmup. Only where
    # latents are trained
    encoder_warmup: int = key(10000, at_least=0, only=[{'stage': 'joint', 'latent_encoder': Not(['none'])},
                                                       {'stage': 'joint', 'token_encoder': 'scratch'}])
    adaptive_t: bool = key(True, only={'stage': TRAINS_DENOISER})
    sigma_dec: float = key(3.0, at_least=0, only={'stage': Not(['diffusion'])})  # [second-hand]
    adaptive_bins: int = key(100, at_least=2, only=ADAPTIVE)  # this and the next two [second-hand]
    adaptive_memory: float = key(0.999, at_least=0, at_most=1, only=ADAPTIVE)  # per step
    adaptive_every: int = key(5000, at_least=1, only=ADAPTIVE)  # steps between new probabilities
    adaptive_floor: float = key(0.1, at_least=0, only=ADAPTIVE)  # least rise of a bin, over the mean [choice]
    # what is trained: joint: everything | autoencoder: latent encoder and decoder, token decoder | diffusion:
    # the denoiser | decoder: the token decoder; --init_from=out/OTHER brings what is frozen
    stage: str = key('joint', choices=('joint', 'autoencoder', 'diffusion', 'decoder'), meaning=True)
    token_loss: bool = key(True, only={'stage': TRAINS_AUTOENCODER})  # False: left for stage=decoder
    # share of places whose h the encoder does not see in training (the smoothing of COSMOS) [choice]
    mask_states: float = key(0.0, at_least=0, at_most=1, only={'stage': TRAINS_AUTOENCODER})


class LDLM(Method):
    name, Config = 'LDLM', Config
    # what is decoded: a generated latent | z_0, the latents of texts, which gives their reconstruction
    strategies = {'joint': {'latent': key('generated', choices=('generated', 'data'))}}
    samplers = {'euler_maruyama': {}, 'euler_maruyama_mean': {}, 'ddim': {}}
    has_latent_space = True

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        refuse(c)
        D, L, head_dim = c.latent_dim, c.block_size, c.hidden // c.num_heads
        heads = D // head_dim
        if c.token_encoder == 'scratch':
            self.embed = nn.Embedding(c.vocab_size, D)
        else:
            self.encoder_name = c.token_encoder
        self.register_buffer('state_mean', torch.zeros(D))
        self.register_buffer('state_std', torch.zeros(D))  # 0: not gathered yet

        def autoencoder_half():
            if c.latent_encoder == 'none':
                return nn.Identity()
            perceiver = c.latent_encoder == 'perceiver'
            return nn.Sequential(Transformer(D, c.latent_layers, heads, L, perceiver), nn.Linear(D, D))
        self.encoder, self.decoder = autoencoder_half(), autoencoder_half()
        self.token_decoder = nn.Identity()
        if c.decoder_layers:
            transformer = Transformer(D, c.decoder_layers, heads, L, swiglu=True)
            self.token_decoder = nn.Sequential(transformer, nn.RMSNorm(D, eps=1e-6))
        self.head = nn.Linear(D, c.vocab_size)

        self.z_in = nn.Linear(2 * D, c.hidden)  # of z_t and the earlier estimate, side by side
        self.dit = DiT(c.hidden, c.num_layers, c.num_heads, c.cond_dim, L, dropout=c.dropout)
        self.z_out = nn.Linear(c.hidden, D)
        self.times = AdaptiveTimes(c.adaptive_bins, c.adaptive_memory, c.adaptive_floor)
        # begin_step sets it; a tensor, since a compiled step would be recompiled for each new number
        self.register_buffer('gamma', torch.ones(()), persistent=False)
        for layer in (self.head, self.z_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    # --- the frozen token encoder ---

    def attach(self, encoder):
        """The token encoder does not become a part of this module, and is in no checkpoint."""
        c = self.config
        if encoder.width != c.latent_dim:
            raise ValueError(f'{c.token_encoder} has hidden states of width {encoder.width}: '
                             f'--latent_dim={encoder.width}, not {c.latent_dim}')
        if not -encoder.num_layers - 1 <= c.layer <= encoder.num_layers:
            raise ValueError(f'{c.token_encoder} has {encoder.num_layers} layers: --layer=0 (its embeddings) '
                             f'to {encoder.num_layers}, or from the last one down -1 to '
                             f'{-encoder.num_layers - 1}, not {c.layer}')
        self.token_encoder = encoder

    def reusable(self, weights, old, new):
        """Mean and variance of other states are gathered anew."""
        if any(old.get(k, new.get(k)) != new.get(k) for k in ('token_encoder', 'encoder_weights', 'layer')):
            return {k: v for k, v in weights.items() if k not in ('state_mean', 'state_std')}
        return weights

    # --- text -> h -> z -> h_hat -> text ---

    @torch.compiler.disable
    @torch.no_grad()
    def raw_states(self, x):
        """What the frozen token encoder makes of x (b, L): (b, L, D) fp32."""
        return self.token_encoder(x, layer=self.config.layer, summary=False)[0].float()

    def states(self, x):
        """h (b, L, D) of x (b, L): each feature of mean 0 and variance 1 over the data [paper]."""
        if self.config.token_encoder == 'scratch':
            return self.embed(x)
        return (self.raw_states(x) - self.state_mean) / self.state_std

    def encode(self, h):
        """h -> z, both (b, L, D), fp32. Latents are not normalised: their size is the encoder's to choose."""
        return self.encoder(h).float()

    def decode(self, z):
        """z, noisy or clean -> h_hat, both (b, L, D), fp32."""
        return self.decoder(z).float()

    @torch.no_grad()
    def tokens(self, z):
        """Clean latents (b, L, D) -> ids (b, L), the likeliest at each place."""
        h = self.token_decoder(self.decode(z) if self.config.decode_from == 'states' else z)
        chunks = h.flatten(0, 1).split(rows_at_once(self.config.vocab_size, z.device))
        return torch.cat([self.head(chunk).argmax(dim=-1) for chunk in chunks]).view(z.shape[:2])

    def latents_of(self, x):
        """x (b, L) -> clean latents (b, L, D)."""
        return self.encode(self.states(x))

    @torch.no_grad()
    def reconstruct(self, x):
        """Text -> latents -> text without noise: (b, L) ids."""
        return self.tokens(self.latents_of(x))

    @torch.no_grad()
    def interpolate(self, x_a, x_b, weights):
        """Decodes (1 - w) z_a + w z_b for each w: two texts (b, L) -> ids (len(weights), b, L).

        LDLM figure 3 (left).
        """
        z_a, z_b = self.latents_of(x_a), self.latents_of(x_b)
        return torch.stack([self.tokens((1 - w) * z_a + w * z_b) for w in weights])

    # --- training ---

    @torch.no_grad()
    def begin_step(self, step, noise, draw_rows):
        """gamma and times for this step; before the first, the states' statistics, unless already there."""
        c = self.config
        self.gamma.fill_(warmup(step, c.encoder_warmup))
        self.times.forget()
        if c.adaptive_t and step and step % c.adaptive_every == 0:
            self.times.refresh()
        if step == 0 and c.token_encoder != 'scratch' and not self.state_std.any():
            self.gather_statistics(draw_rows(math.ceil(STATE_TOKENS / c.block_size))[0])

    def gather_statistics(self, x):
        """Mean and standard deviation of each feature over texts x (n, L), the same ones on every process."""
        total = torch.zeros(3, self.config.latent_dim, dtype=wide(x.device), device=x.device)
        for part in x.split(16):
            h = self.raw_states(part).flatten(0, 1).to(total.dtype)
            total += torch.stack((h.sum(dim=0), h.square().sum(dim=0), torch.full_like(h[0], len(h))))
        mean, square = total[:2] / total[2]
        self.state_mean.copy_(mean)
        self.state_std.copy_((square - mean**2).clamp(min=1e-12).sqrt())

    def end_step(self, finite, noise):
        self.times.learn(finite)

    def forward(self, x, noise):
        """Training loss of x (b, L) int64, LDLM eq. (4), and logs."""
        c, losses, logs = self.config, {}, {'gamma': self.gamma}
        trains_autoencoder = c.stage in TRAINS_AUTOENCODER
        with torch.set_grad_enabled(trains_autoencoder):
            h, seen = self.states(x), 1.0                                              # (b, L, D)
            if trains_autoencoder and c.mask_states:
                seen = noise.uniform('mask_states', x.shape[1])[..., None] >= c.mask_states
            z = self.encode(h * seen)                                                  # (b, L, D)
        if c.stage in TRAINS_DENOISER:
            losses['diff_loss'] = self.diffusion_loss(z, noise)
            logs['time_bins'] = perplexity(self.times.p)  # how many are in use
            logs |= zip(('diff_t0', 'diff_t25', 'diff_t50', 'diff_t75'), self.times.by_quarter())
        if c.stage != 'diffusion':
            decoded, logs['accuracy'] = self.decoder_losses(x, h, z, noise)
            losses |= decoded
        loss = sum(losses.values())
        logs |= {**losses, 'loss': loss}
        logs['latent_norm'], logs['latent_var'] = z.norm(dim=-1).mean(), z.flatten(0, 1).var(dim=0).mean()
        return loss, {k: v.detach() for k, v in logs.items() if v is not None}

    def diffusion_loss(self, z, noise):
        """LDLM eq. (1) for clean latents z (b, L, D) -> scalar.

        What flows back into z is gamma times the gradient: appendix A.2, eq. (28), in a form that leaves the
        value exactly z. So z is input *and* target.
        """
        c = self.config
        z = z.detach() + self.gamma * (z - z.detach())
        t = self.times.draw(noise) if c.adaptive_t else noise.times('t')               # (b,)
        losses = self.denoising_errors(z, t, noise)
        self.times.track(t, losses.detach())
        return losses.mean()

    def denoising_errors(self, z, t, noise):
        """|z_hat - z|^2 per coordinate, from z (b, L, D) noised at times t (b,) -> (b,)."""
        c = self.config
        alpha, sigma = (level[:, None, None] for level in alpha_sigma(t, c.tangent))
        z_t = alpha * z + sigma * noise.normal('eps', *z.shape[1:])
        z_self = torch.zeros_like(z)
        if c.self_conditioning:
            with torch.no_grad():
                shown = noise.uniform('self') < c.self_conditioning
                z_self = self.denoise(z_t, t, z_self) * shown[:, None, None]
        return (self.denoise(z_t, t, z_self) - z).square().mean(dim=(1, 2))            # (b,)

    def denoise(self, z_t, t, z_self):
        """z_0 hat (b, L, D) from z_t and an earlier estimate (or zeros) at times t (b,)."""
        h = self.z_in(torch.cat((z_t, z_self), dim=-1))
        return self.z_out(self.dit(h, t=[t])).float()

    def decoder_losses(self, x, h, z, noise):
        """LDLM eq. (2), (3) of x (b, L), h and z (b, L, D) -> {name: scalar}, accuracy or None."""
        c, losses, accuracy = self.config, {}, None
        trains_autoencoder = c.stage in TRAINS_AUTOENCODER
        source = z + c.sigma_dec * noise.normal('decoder', *z.shape[1:])
        with torch.set_grad_enabled(trains_autoencoder):
            h_hat = self.decode(source) if trains_autoencoder or c.decode_from == 'states' else None
        if trains_autoencoder and c.reconstruction != 'ce' and c.latent_encoder != 'none':
            losses['state_loss'] = F.mse_loss(h_hat, h)                                # eq. (2)
        if c.token_loss or c.stage == 'decoder':
            if c.decode_from == 'states':
                source = h_hat
            if c.reconstruction == 'mse' or c.stage == 'decoder':
                source = source.detach()  # the tokens have no say in what a latent is, eq. (3)
            losses['token_loss'], accuracy = self.token_loss(source, x)
        return losses, accuracy

    def token_loss(self, source, x):
        """Cross-entropy per token of x (b, L) given h_hat or z (b, L, D), LDLM eq. (3).

        And the accuracy at 64 places of the batch.
        """
        h, ids = self.token_decoder(source).flatten(0, 1), x.flatten()
        some = torch.arange(0, len(ids), len(ids) // 64 + 1, device=x.device)  # + 1: not only first places
        with torch.no_grad():
            accuracy = (self.head(h[some]).argmax(dim=-1) == ids[some]).float().mean()
        weights = torch.full_like(ids, 1 / len(ids), dtype=torch.float32)
        return head_cross_entropy(self.head, h, ids, weights), accuracy

    @property
    def validated(self):
        c = self.config
        return (('diff_loss',) * (c.stage in TRAINS_DENOISER) + ('state_loss',) * (c.decode_from == 'states')
                + ('accuracy',))

    @torch.no_grad()
    def validation(self, x, noise, z_0=None):
        """Without the noise in the decoder's input: x (b, L) -> {name: (b,)}.

        diff_loss at uniform times, state_loss |h_hat - h|^2, accuracy: the share of tokens that come back.
        """
        h = self.states(x)
        z = self.encode(h)
        found = {'diff_loss': self.denoising_errors(z, noise.times('t'), noise),
                 'state_loss': (self.decode(z) - h).square().mean(dim=(1, 2)),
                 'accuracy': (self.tokens(z) == x).float().mean(dim=1)}
        return {name: found[name] for name in self.validated}

    # --- sampling ---

    def sampling_options(self, strategy='', sampler='', **given):
        options = super().sampling_options(strategy, sampler, **given)
        if options['latent'] == 'data':
            if sampler:
                raise ValueError('latent=data is decoded as it is, without a sampler: leave sampler out')
            del options['sampler']
        elif self.config.stage == 'autoencoder':
            raise ValueError('stage=autoencoder trains no denoiser to sample with; train one: '
                             '--stage=diffusion --init_from=out/THAT')
        return options

    @torch.no_grad()
    def sample(self, n, steps, strategy='', sampler='', z_0=None, generator=None, callback=None, **options):
        """-> ids (n, L) after `steps` calls of the denoiser; decoder and head run once, at the end.

        z_0: clean latents to decode, as latents_of returns them, without any call.
        euler_maruyama decodes the last z_0 hat [choice], euler_maruyama_mean the mean at t = .05 [family],
        and ddim ends at z_0 hat by itself. callback(step, x, z_0 hat) gets every estimate, decoded.
        """
        options = self.sampling_options(strategy, sampler, **with_latent(z_0, options))
        if z_0 is not None:
            return self.tokens(z_0)
        c, sampler = self.config, options['sampler']
        z = torch.randn(n, c.block_size, c.latent_dim, device=self.head.weight.device, generator=generator)

        def denoise(z_t, t, z_self):
            return self.denoise(z_t, t.float().expand(n), z_self)

        def decoded(i, z_hat):
            callback(i, self.tokens(z_hat), z_hat)
        if sampler == 'ddim':
            return self.tokens(ddim(denoise, z, steps, c.tangent, callback and decoded))
        mean, z_hat = euler_maruyama(denoise, z, steps, c.tangent, generator, callback and decoded)
        return self.tokens(mean if sampler == 'euler_maruyama_mean' else z_hat)

    # --- costs ---

    def transformers(self):
        """Of encoder, decoder and token decoder."""
        halves = (self.encoder, self.decoder, self.token_decoder)
        return [m for half in halves for m in half.modules() if isinstance(m, Transformer)]

    def backbones(self):
        return [*self.transformers(), self.dit]

    def denoiser_calls(self, steps, latent='generated', **options):
        return None if latent == 'data' else steps

    def sampling_flops(self, L, steps, **options):
        """The calls, if any, and decoding once."""
        decoders = [self.token_decoder] + [self.decoder] * (self.config.decode_from == 'states')
        decoding = sum(m.flops(L) for half in decoders for m in half.modules() if isinstance(m, Transformer))
        return (self.denoiser_calls(steps, **options) or 0) * self.flops(L) + decoding

    def training_flops(self, L):
        """Denoiser, autoencoder and head, and the forward pass of self-conditioning."""
        c = self.config
        if c.stage != 'joint':
            raise ValueError('the FLOPs of LDLM are counted for stage=joint')
        autoencoder = sum(m.flops(L) for m in self.transformers())
        head, estimate = L * c.latent_dim * c.vocab_size, self.flops(L) * (c.self_conditioning > 0)
        return 6 * (self.flops(L) + autoencoder + head) + 2 * estimate


def refuse(c):
    """ValueError for values that do not go together."""
    head_dim = c.hidden // c.num_heads
    if c.latent_dim % head_dim:
        raise ValueError(f'latent_dim={c.latent_dim} does not divide into heads of width {head_dim}, that of '
                         'the denoiser (hidden / num_heads)')
    if c.token_encoder == 'scratch' and c.reconstruction != 'ce' and c.stage in TRAINS_AUTOENCODER:
        raise ValueError('trained embeddings are no target for a squared error: token_encoder=scratch needs '
                         'reconstruction=ce')
    if c.reconstruction != 'mse' and (not c.token_loss or c.decode_from == 'latents'):
        raise ValueError(f'reconstruction={c.reconstruction} is a token loss through the latent decoder: '
                         'token_loss=True, decode_from=states')
    if c.stage == 'autoencoder' and c.latent_encoder == 'none' and not c.token_loss:
        raise ValueError('stage=autoencoder with latent_encoder=none and token_loss=False trains nothing')


def warmup(step, length, midpoint=0.8, steepness=10.0):
    """gamma(s), a sigmoid stretched to rise from 0 to 1 in `length` steps.

    LDLM eq. (29), (30) [second-hand].
    """
    def S(x):
        return 1 / (1 + math.exp(-steepness * (x - midpoint)))
    return (S(step / length) - S(0)) / (S(1) - S(0)) if step < length else 1.0


def perplexity(p):
    """exp(entropy) of probabilities p (n,)."""
    return torch.exp(-torch.special.xlogy(p, p).sum())
