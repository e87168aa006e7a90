"""
SSMD: self-speculative masked diffusion (Campbell et al., 2025, arXiv:2510.03929).

    forward     MDLM's; and sigma, an order of the positions: first the visible ones, then the masked ones
    draft       MDLM's denoiser: from the first i tokens of sigma a DiT makes states h, and the head makes
                p_i(x_d) of them, for all later places d at once and independent of one another
    target      one causal block along sigma, on top of h: q_i(x_d | all tokens before d), all in one pass
    loss        E_t  -alpha'_t / (1 - alpha_t)  sum over masked d of  -log p_i(x_d) - log q_i(x_d)
    sampler     draw all masked tokens from p_i. Along sigma keep each of them with probability
                min(1, q_i / p_i); in place of the first one that is refused draw from (q_i - p_i)+, and
                stop: what follows was judged behind another token. Go on from there, with a larger i
    law         F_i = prod_{d > i} min(p_i, q_i)(x_d)
                      + sum_{d > i} prod_{i < k < d} min(p_i, q_i)(x_k) (q_i - p_i)+(x_d) F_d
                with F_L = 1; the sampler writes x along sigma with probability F_0
    bound       -log p(x) <= E sum_d -log q_i(x_d) over walks along sigma: from i the walk passes d with
                probability min(1, p_i / q_i)(x_d), else d is the last place before a new i

So a call of the DiT yields as many tokens as draft and target agree on: all of them if q = p. Verified again
and again, one draft gets the law of the targets, a little autoregressive model on top of h; but if every
draft is new, the law is F and no product of targets, because q depends on i.

The probability that the sampler writes x and stops where a walk does is the walk's own times its product of
q_i. So F_0 is the mean of that product over walks, and the bound is Jensen's inequality. It takes as many
calls as a sample, where F takes L, and it is -log p(x) itself if the networks are exact.

Ours are the bound, the [mask] that the first place reads, and the window: with `steps` calls, each of them
fills an equal part, and its draft is verified until it has. (The paper's is a cosine.) So are the angles of
RoPE: a query has those of the place that it predicts, a key those of the place that it reads. With half of
each in both, as we understand the paper, they do not tell how far apart the two are (see RESULTS.md).

Read in this order: verify, speculate, class SSMD.
"""
import itertools

import torch
import torch.nn as nn

from lib.configurator import key
from mdlm import DRAW, MDLM, times_from, token_probs
from model import Block, head_logits, head_nll

# ------------------------------------------------------------------------------------------------------------
# samplers: pure functions. Here y (n, L) and h (n, L, d) are along the order, and x in the order of the text
#
#   backbone(x_t) -> h (n, L, d), of x_t
#   causal(y, h, order, a, cache) -> states (n, L - a, d) along the order, from place a on
#   probs(states (R, d)) -> pairs of a slice of the rows and their probabilities (rows, V), fp64

AHEAD = 16  # places that one pass of the causal block verifies, when many passes are made


def along(h, order):
    """States (n, L, d) of positions -> the same along order (n, L)."""
    return h.gather(1, order[..., None].expand_as(h))


def masked_after(y, i, order, mask_id):
    """The text x_t in which the first i (n,) tokens along the order are visible."""
    rank = torch.arange(y.shape[1], device=y.device)
    return torch.empty_like(y).scatter_(1, order, y.masked_fill(rank >= i[:, None], mask_id))


def with_probability(probs, states, tokens=None, generator=None):
    """tokens (R,), drawn if there are none, and their probabilities, (R,)."""
    found = []
    for rows, p in probs(states):
        ids = torch.multinomial(p, 1, generator=generator) if tokens is None else tokens[rows, None]
        found.append((ids, p.gather(1, ids)))
    return [torch.cat(parts)[:, 0] for parts in zip(*found)]


def draw_residual(probs, h, g, generator=None):
    """From (q - p)+, for draft and target states (R, d)."""
    parts = []
    for (_, p), (_, q) in zip(probs(h), probs(g)):
        residual = (q - p).clamp(min=0) + 1e-30 * q  # not nothing where rounding makes p = q
        parts.append(torch.multinomial(residual, 1, generator=generator)[:, 0])
    return torch.cat(parts)


def verify(y, h, i, end, order, causal, probs, a, cache, generator=None):
    """Drafts the places i ... end - 1, and one pass of the causal block -> y, how far it is filled (n,).

    a, cache: no i is less than a, and the places before it are in the cache
    """
    rank, y = torch.arange(y.shape[1], device=y.device), y.clone()
    unfilled = (rank >= i[:, None]) & (rank < end[:, None])
    y[unfilled], p = with_probability(probs, h[unfilled], generator=generator)
    g = causal(y, h, order, a, cache)
    _, q = with_probability(probs, g[unfilled[:, a:]], y[unfilled])
    refused = torch.zeros_like(unfilled)
    refused[unfilled] = torch.rand(p.shape, dtype=p.dtype, device=p.device, generator=generator) >= q / p
    stopped, first = refused.any(dim=1), refused.int().argmax(dim=1)
    rows, places = stopped.nonzero()[:, 0], first[stopped]
    if stopped.any():
        y[rows, places] = draw_residual(probs, h[rows, places], g[rows, places - a], generator)
    return y, torch.where(stopped, first + 1, end)


def fill(y, h, i, end, order, causal, probs, ahead, passes, generator=None):
    """Drafts and verifies the places i ... end - 1, in parts of `ahead` places, with at most `passes` passes
    for each part -> y, how far it is filled (n,).
    """
    cache, known = [], 0
    for a in range(int(i.min()), int(end.max()), ahead):
        if a:
            causal(y[:, :a], h[:, :a], order[:, :a], known, cache)  # takes these places into the cache
        known, part, stop = a, slice(a + ahead), end.clamp(max=a + ahead)
        for _ in range(passes):
            if not len(live := (i < stop).nonzero()[:, 0]):
                break
            y[live, part], i[live] = verify(y[live, part], h[live, part], i[live], stop[live],
                                            order[live, part], causal, probs, a,
                                            [past[live] for past in cache], generator)
    return y, i


def speculate(backbone, causal, probs, x, order, mask_id, steps=None, verifications=1, generator=None,
              callback=None, ahead=AHEAD):
    """Fills the [mask]s of x (n, L), which come last in order (n, L), with `verifications` passes of the
    causal block on every call of the backbone.

    steps: calls, each of which fills an equal part with as many passes as it takes. A pass sees only `ahead`
    places, since what comes after the first refusal is computed in vain. None: as many calls as it takes
    """
    L, y = x.shape[1], x.gather(1, order)
    start = (y != mask_id).sum(dim=1)
    i = start.clone()  # how many are visible
    ahead, passes = (ahead, ahead) if steps else (L, verifications)
    for call in range(steps) if steps else itertools.count():
        end = L - (L - start) * (steps - 1 - call) // steps if steps else torch.full_like(start, L)
        live = (i < end).nonzero()[:, 0]
        if len(live):
            h = along(backbone(masked_after(y[live], i[live], order[live], mask_id)), order[live])
            y[live], i[live] = fill(y[live], h, i[live], end[live], order[live], causal, probs, ahead, passes,
                                    generator)
        if callback:
            callback(call, masked_after(y, i, order, mask_id), None)
        if (i == L).all():
            return masked_after(y, i, order, mask_id)


# ------------------------------------------------------------------------------------------------------------
# the method

class SSMD(MDLM):
    """An MDLM, whose denoiser makes the draft, with one block more."""
    name = 'SSMD'
    # windowed: `steps` calls | speculative: as many as it takes
    samplers = {'windowed': DRAW, 'speculative': DRAW | {'verifications': key(1, at_least=1)}}

    def __init__(self, config):
        super().__init__(config)
        c = self.config
        self.mix = nn.Linear(3 * c.hidden, c.hidden)
        self.block = Block(c.hidden, c.num_heads, c.cond_dim, 1, c.dropout, causal=True)
        nn.init.zeros_(self.block.modalities[0].ada.weight)
        nn.init.zeros_(self.block.modalities[0].ada.bias)

    def causal(self, y, h, order, a=0, cache=None):
        """The target's states: (b, L), (b, L, d), (b, L) -> (b, L - a, d), all along the order.

        A place reads the token before it, the states there and its own. The first one has [mask] before it,
        at its own place. In attention a query stands where its token will be, and a key where it was read:
        so RoPE tells how far apart the two are. cache: keys and values of the first `a` places; it grows.
        """
        here = torch.arange(a, y.shape[1], device=y.device)
        before = (here - 1).clamp(min=0)
        token = self.embed(y[:, before].masked_fill(here == 0, self.mask_id))
        e = self.mix(torch.cat((token, h[:, before], h[:, here]), dim=-1))
        places = torch.stack((order[:, here], order[:, before]))                       # of queries, of keys
        cos, sin = (table[places][:, :, None] for table in (self.dit.cos, self.dit.sin))  # (2, b, 1, L, ..)
        return h[:, here] + self.block([e], [self.dit.time[0](e.new_zeros(1))], cos, sin, cache)[0]

    def backbone(self, x_t):
        return self.dit(self.embed(x_t))

    def forward(self, x, noise):
        """Training loss per token of x (b, L) int64, and logs."""
        t = times_from(1e-4, noise.times('t_x', shuffled=False))
        h, mask = self.noised_states(x, t, noise)
        order = (noise.uniform('order', x.shape[1]) + mask).argsort(dim=1)
        y, mask, h = x.gather(1, order), mask.gather(1, order), along(h, order)
        draft, overflow = self.token_loss(h, y, mask, t)
        target, _ = self.token_loss(self.causal(y, h, order), y, mask, t)
        loss = draft + target
        return loss, {'loss': loss.detach(), 'draft': draft.detach(), 'target': target.detach(),
                      'overflow': overflow}

    def nll_parts(self, x, noise, strategy='joint', z_0=None):
        """The bound of the speculative sampler with one verification, one walk along one order: nats (b,)."""
        self.sampling_options(strategy)  # ValueError for an unknown one
        L, rank = x.shape[1], torch.arange(x.shape[1], device=x.device)
        order, u = (noise.uniform(name, L) for name in ('order', 'walk'))
        order = order.argsort(dim=1)
        y, i, nats = x.gather(1, order), torch.zeros_like(x[:, 0]), torch.zeros(x.shape, device=x.device)
        while len(live := (i < L).nonzero()[:, 0]):
            h = along(self.backbone(masked_after(y[live], i[live], order[live], self.mask_id)), order[live])
            left = rank >= i[live, None]
            p, q = nats[live], nats[live]                                              # -log p, -log q
            p[left] = head_nll(self.head, h[left], y[live][left])
            q[left] = head_nll(self.head, self.causal(y[live], h, order[live])[left], y[live][left])
            stop = left & (u[live] >= (q - p).exp())
            i[live] = torch.where(stop.any(dim=1), stop.int().argmax(dim=1) + 1, L)
            nats[live] = q  # those after the stop will be replaced
        return {'val': nats.sum(dim=1)}

    def fill_in(self, x, steps, sampler, temperature, top_p, verifications=1, generator=None, callback=None):
        """MDLM's; callback(call, x, None) sees every call of the backbone."""
        if sampler == 'speculative':  # as many calls as it takes
            steps = None
        elif steps < 1:
            raise ValueError(f'steps must be at least 1, not {steps}')
        order = torch.rand(x.shape, device=x.device, generator=generator)
        order = (order + (x == self.mask_id)).argsort(dim=1)

        def probs(states):
            for rows, logits in head_logits(self.head, states):
                yield rows, token_probs(logits, temperature, top_p)
        return speculate(self.backbone, self.causal, probs, x, order, self.mask_id, steps, verifications,
                         generator, callback)

    def backbones(self):
        return [self.dit, self.block]

    def causal_flops(self, L):
        return self.flops(L) / self.config.num_layers + 3 * L * self.config.hidden**2

    def denoiser_calls(self, steps, sampler='', **options):
        return None if sampler == 'speculative' else steps

    def sampling_flops(self, L, steps, sampler='', **options):
        """At most: every pass of the causal block fills one place or more, and every call makes one.

        Windowed, a pass sees AHEAD places, and every call takes all places into the cache at most once.
        """
        calls, passes = (L, L) if sampler == 'speculative' else (steps, min(AHEAD, L) + steps)
        return calls * self.flops(L) + passes * self.causal_flops(L)

    def training_flops(self, L):
        """The head sees L / 2 positions twice."""
        c = self.config
        return 6 * (self.flops(L) + self.causal_flops(L) + L * c.hidden * c.vocab_size)
