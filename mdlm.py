"""
MDLM: masked discrete diffusion for text (Sahoo et al., 2024, arXiv:2406.07524; LADD section 2.2).

    forward     each token becomes [mask] with probability 1 - alpha_t, on its own; alpha_0 = 1, alpha_1 = 0
    denoiser    a DiT that sees x_t, not t, and gives p_theta(x_0 | x_t) at the masked positions
    loss        E_t  -alpha'_t / (1 - alpha_t)  sum over masked l of  -log p_theta(x_l | x_t)     LADD eq. (6)
    sampler     start from all [mask]; from t to s < t reveal each masked position with probability
                (alpha_s - alpha_t) / (1 - alpha_t), drawing its token from the denoiser         LADD eq. (47)

The paper's SUBS parameterisation (never predict [mask], never change a visible token) needs no code: the
head has no output for [mask], and it is asked about masked positions only. Read in this order: schedules,
samplers, class MDLM, times and rows of the loss.
"""
import functools
from dataclasses import dataclass

import torch
import torch.nn as nn

from lib.configurator import Keys, key
from lib.method import Method
from model import DiT, head_cross_entropy, head_nll

# ------------------------------------------------------------------------------------------------------------
# schedules: LADD table 7

B_MIN, B_MAX = 1e-3, 20.0  # of the geometric schedule


def alpha(t, schedule='linear'):
    """Probability that a token is still clean at time t; any tensor t in [0, 1] -> the same shape."""
    if schedule == 'linear':
        return 1 - t
    if schedule == 'polynomial':
        return 1 - t**2
    return torch.exp(-B_MIN ** (1 - t) * B_MAX**t)  # geometric: alpha_0 = .999, alpha_1 = 2e-9


def elbo_weight(t, schedule='linear'):
    """-alpha'_t / (1 - alpha_t), LADD eq. (52) in continuous time."""
    if schedule == 'linear':
        return 1 / t
    if schedule == 'polynomial':
        return 2 / t
    rate = B_MIN ** (1 - t) * B_MAX**t  # geometric
    return rate * torch.log(torch.tensor(B_MAX / B_MIN)) / torch.expm1(rate)


def time_grid(steps, device=None):
    """t = 1 ... 0 in equal steps, fp64 (steps + 1,)."""
    if steps < 1:
        raise ValueError(f'steps must be at least 1, not {steps}')
    return torch.linspace(1, 0, steps + 1, dtype=wide(device), device=device)


def wide(device):
    """The dtype of sampling: fp64, as in the LADD paper, or fp32 on Apple's GPUs, which have no fp64."""
    return torch.float32 if torch.device(device or 'cpu').type == 'mps' else torch.float64


# ------------------------------------------------------------------------------------------------------------
# samplers: pure functions over `denoise(x_t, where) -> logits (where.sum(), V)`; x_t int64, where bool (n, L)
#
# A position is revealed by two draws: "now?", then its token. Together they have the distribution of one draw
# over V + 1 outcomes. Unlike Gumbel noise in fp32 over 50k words, they are safe in low precision, and the
# vocabulary head runs only where a token is about to appear.

def draw_tokens(logits, temperature=1.0, top_p=1.0, generator=None):
    """One token for each row of logits (R, V) -> int64 (R,).

    temperature 0 takes the likeliest token; top_p < 1 keeps the nucleus: the fewest tokens whose
    probabilities add up to at least top_p.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    return torch.multinomial(token_probs(logits, temperature, top_p), 1, generator=generator)[:, 0]


def token_probs(logits, temperature=1.0, top_p=1.0):
    """What draw_tokens draws from: logits (R, V) -> (R, V), fp64."""
    logits = logits.to(wide(logits.device))
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(1, logits.argmax(dim=-1, keepdim=True), 1)
    probs = (logits / temperature).softmax(dim=-1)
    if top_p < 1:
        sorted_probs, ids = probs.sort(dim=-1, descending=True)
        # the token that crosses top_p stays
        sorted_probs[sorted_probs.cumsum(dim=-1) - sorted_probs >= top_p] = 0
        probs = torch.zeros_like(probs).scatter_(1, ids, sorted_probs)
    return probs / probs.sum(dim=-1, keepdim=True)


def choose(x_t, alpha_t, alpha_s, mask_id, eta=0.0, given=None, generator=None):
    """The first draw of a step t -> s: which positions are revealed, and which masked again; bool, as x_t.

    eta = 0 is the reverse process itself, LADD eq. (47): nothing is masked again. eta in (0, 1] is
    ReMDM-rescale (Wang et al., 2025, arXiv:2503.00307): tokens are masked again at eta times the largest rate
    that keeps the marginals, except at the positions `given`.
    """
    masked = x_t == mask_id
    sigma = eta * min(1.0, float((1 - alpha_s) / alpha_t)) if eta else 0.0
    u = torch.rand(x_t.shape, dtype=wide(x_t.device), device=x_t.device, generator=generator)
    reveal = masked & (u < (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t))
    remask = ~masked & ~given & (u < sigma) if eta else torch.zeros_like(masked)
    return reveal, remask


def ancestral(denoise, x, alphas, mask_id, draw=draw_tokens, eta=0.0, generator=None, callback=None):
    """Reveals the [mask]s of x (n, L) along alphas, a grid from alpha_1 to alpha_0; the rest of x stays."""
    given = x != mask_id
    x = x.clone()
    for i, (alpha_t, alpha_s) in enumerate(pairs(alphas)):
        reveal, remask = choose(x, alpha_t, alpha_s, mask_id, eta, given, generator)
        if reveal.any():
            x[reveal] = draw(denoise(x, reveal), generator=generator)
        x[remask] = mask_id
        if callback:
            callback(i, x, None)
    return x


def pairs(alphas):
    """(alpha_t, alpha_s) of every step; whatever alpha_0 is, the last step leaves no [mask]."""
    return zip(alphas[:-1], torch.cat([alphas[1:-1], alphas.new_ones(1)]))


def first_hitting(denoise, x, mask_id, draw=draw_tokens, generator=None, callback=None):
    """The limit of infinitely many ancestral steps in at most L calls (Zheng et al., 2025, arXiv:2409.02908).

    One position at a time, in random order. Exact because the denoiser does not see the time: only the order
    of the reveals matters, and every order is equally likely.
    """
    masked = x == mask_id
    order = torch.rand(x.shape, device=x.device, generator=generator).masked_fill(~masked, 2).argsort(dim=1)
    x = x.clone()
    for i in range(int(masked.sum(dim=1).max())):
        where = torch.zeros_like(masked).scatter_(1, order[:, i:i + 1], True) & masked
        x[where] = draw(denoise(x, where), generator=generator)
        if callback:
            callback(i, x, None)
    return x


DRAW = {'temperature': key(1.0, at_least=0), 'top_p': key(1.0, above=0, at_most=1)}
SAMPLERS = {'ancestral': DRAW,
            'first_hitting': DRAW,                                     # one call per token, whatever steps is
            'remdm': DRAW | {'eta': key(1.0, at_least=0, at_most=1)}}  # ancestral, but masks some again


def reveal_tokens(denoise, x, mask_id, steps, schedule, sampler, temperature, top_p, eta=0.0, generator=None,
                  callback=None):
    """The [mask]s of x (n, L) revealed by the sampler of that name."""
    draw = functools.partial(draw_tokens, temperature=temperature, top_p=top_p)
    if sampler == 'first_hitting':
        return first_hitting(denoise, x, mask_id, draw, generator, callback)
    alphas = alpha(time_grid(steps, x.device), schedule)
    return ancestral(denoise, x, alphas, mask_id, draw, eta, generator, callback)


# ------------------------------------------------------------------------------------------------------------
# the method

@dataclass
class Config(Keys):
    vocab_size: int = 0  # from the data; id vocab_size is [mask]
    block_size: int = key(0, at_least=0)  # L
    hidden: int = key(384, at_least=1)
    num_layers: int = key(6, at_least=1)
    num_heads: int = key(6, at_least=1, meaning=True)
    cond_dim: int = key(128, at_least=1)
    dropout: float = key(0.0, at_least=0, below=1)
    schedule: str = key('linear', choices=('linear', 'polynomial', 'geometric'))
    # elbo: -alpha'/(1-alpha) | constant: 1, the LADD paper's choice on text, for MDLM, too
    weighting: str = key('elbo', choices=('elbo', 'constant'))


class MDLM(Method):
    name, Config, likelihood = 'MDLM', Config, 'bound'
    samplers, takes_prompt = SAMPLERS, True

    def __init__(self, config, latents_at=None):
        """latents_at: positions (M,) of a second modality; LADD is this class with one."""
        super().__init__()
        c = self.config = config
        self.mask_id = c.vocab_size
        self.embed = nn.Embedding(c.vocab_size + 1, c.hidden)
        positions, modalities = torch.arange(c.block_size), 1
        if latents_at is not None:
            positions, modalities = torch.cat((positions, latents_at)), 2
        self.dit = DiT(c.hidden, c.num_layers, c.num_heads, c.cond_dim, positions, modalities, c.dropout)
        self.head = nn.Linear(c.hidden, c.vocab_size)
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def corrupt(self, x, t, noise):
        """q(x_t | x_0), LADD eq. (43): x (b, L), t (b,) -> x_t with [mask]s, and where they are (b, L)."""
        mask = noise.uniform('mask', x.shape[1]) < 1 - alpha(t, self.config.schedule)[:, None]
        return x.masked_fill(mask, self.mask_id), mask

    def noised_states(self, x, t, noise):
        """x (b, L), t (b,) -> states (b, L, d) of x_t, and where it has [mask]s (b, L)."""
        x_t, mask = self.corrupt(x, t, noise)
        return self.dit(self.embed(x_t)), mask

    def forward(self, x, noise):
        """Training loss per token of x (b, L) int64, and logs."""
        # t >= 1e-4, as in the official code of LADD, keeps the weight 1/t finite
        t = times_from(1e-4, noise.times('t_x', shuffled=False))
        h, mask = self.noised_states(x, t, noise)                                      # (b, L, d), (b, L)
        loss, overflow = self.token_loss(h, x, mask, t)
        return loss, {'loss': loss.detach(), 'overflow': overflow}

    def loss_weight(self, t):
        """t (b,) -> (b,)"""
        c = self.config
        return elbo_weight(t, c.schedule) if c.weighting == 'elbo' else torch.ones_like(t)

    def token_loss(self, h, x, mask, t, stratified=True):
        """The weighted cross-entropy at the masked positions, per token: LADD eq. (6), (12).

        h (b, L, d), x and mask (b, L), t (b,) -> scalar, and how many masked positions found no slot (see
        masked_rows).
        """
        rows, used, overflow = masked_rows(mask, stratified)                           # (R,), (R,)
        weight = self.loss_weight(t).repeat_interleave(x.shape[1])
        weights = weight[rows] * used / x.numel()                                      # (R,)
        return head_cross_entropy(self.head, h.flatten(0, 1)[rows], x.flatten()[rows], weights), overflow

    def nll_parts(self, x, noise, strategy='joint', z_0=None):
        """One unbiased estimate of the negative ELBO at one time, >= -log p(x) on average: nats (b,)."""
        self.sampling_options(strategy)  # ValueError for an unknown one
        t = noise.times('t_x')
        h, mask = self.noised_states(x, t, noise)
        nats = elbo_weight(t, self.config.schedule) * self.masked_nll(h, x, mask)
        return {'val': nats + self.reconstruction(x, noise)}

    def masked_nll(self, h, x, mask):
        """Sum over the masked positions of -log p(x_l | x_t): h (b, L, d) -> nats (b,)."""
        nats = torch.zeros(x.shape, device=x.device)
        nats[mask] = head_nll(self.head, h[mask], x[mask])
        return nats.sum(dim=1)

    def reconstruction(self, x, noise):
        """E[-log p(x_0 | x_t)] at t = 0, LADD eq. (53): zero unless alpha_0 < 1 (geometric schedule)."""
        if self.config.schedule != 'geometric':
            return 0.0
        h, mask = self.noised_states(x, torch.zeros(len(x), device=x.device), noise)
        return self.masked_nll(h, x, mask)

    def denoise(self, x_t, where):
        """Logits (where.sum(), V) at the positions `where`; sequences that have none of them are skipped."""
        active = where.any(dim=1)
        return self.head(self.dit(self.embed(x_t[active]))[where[active]])

    def all_masked(self, n):
        return torch.full((n, self.config.block_size), self.mask_id, device=self.head.weight.device)

    @torch.no_grad()
    def sample(self, n, steps, strategy='', sampler='', x=None, generator=None, callback=None, **options):
        """-> ids (n, L). x: (n, L) to start from, in which [mask]s are filled in (default: all masked).

        options: temperature, top_p, and eta of remdm. callback(step, x, None) sees every step.
        """
        options = self.sampling_options(strategy, sampler, **options)
        del options['strategy']
        x = self.all_masked(n) if x is None else x
        return self.fill_in(x, steps, **options, generator=generator, callback=callback)

    def fill_in(self, x, steps, **options):
        """`sample` from a given x (n, L), with its options. A subclass with other samplers overrides it."""
        return reveal_tokens(self.denoise, x, self.mask_id, steps, self.config.schedule, **options)

    def denoiser_calls(self, steps, sampler='', **options):
        return self.config.block_size if sampler == 'first_hitting' else steps

    def training_flops(self, L):
        """6 = two FLOPs per multiply-add, times three: forward, and backward, which costs twice as much.

        The head sees L / 2 positions, the mean for the linear schedule.
        """
        return 6 * (self.flops(L) + L / 2 * self.config.hidden * self.config.vocab_size)


# ------------------------------------------------------------------------------------------------------------
# times and rows of the loss

def times_from(t_min, t):
    """t in [0, 1] -> [t_min, 1]."""
    return t_min + (1 - t_min) * t


def masked_rows(mask, stratified=True):
    """Row numbers of the masked positions of mask (b, L), in a number of slots that is fixed beforehand.

    A fixed shape keeps the step free of host synchronisation and recompilation. For stratified times the
    number of slots is the mean count of the linear schedule (the others mask fewer), plus the most that the
    common offset of b evenly spaced times can add to it, plus 6 sigma of the coin flips. For other times
    every position has a slot.

    -> rows (R,) int64, used (R,) bool, overflow: how many masked positions found no slot
    """
    b, L = mask.shape
    capacity = min(b * L, int(b * L / 2 + L / 2 + 6 * (b * L / 6) ** 0.5) + 1) if stratified else b * L
    flat = mask.flatten()
    if mask.device.type == 'cpu' and not torch.compiler.is_compiling():
        # nothing to synchronise with: drop empty slots, but keep to a few sizes, whose kernels are cached
        capacity = min(capacity, int(flat.sum()) // 64 * 64 + 64)
    rows = flat.int().argsort(descending=True, stable=True)[:capacity]  # masked positions first
    return rows, flat[rows], (flat.sum() - capacity).clamp(min=0)
