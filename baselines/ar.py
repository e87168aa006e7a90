"""
AR: the left-to-right language model that the tables compare with.

    p(x) = prod_l p_theta(x_l | x_0 ... x_{l-1})

Same blocks, embedding and head as MDLM, number for number; only the attention is causal. The input is the text moved one place to
the right behind a learned start vector, so that all L tokens are scored, the first one too: -log p(x) is exact, and it is the
quantity that MDLM bounds.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn

from mdlm import draw_tokens
from model import DiT, head_cross_entropy, head_nll


@dataclass
class Config:
    vocab_size: int = 0  # from the data; id vocab_size is the start in the input, and an open place in a prompt
    block_size: int = 0  # L
    hidden: int = 384
    num_layers: int = 6
    num_heads: int = 6
    cond_dim: int = 128  # AdaLN stays, fed a constant, so that MDLM has no parameter more
    dropout: float = 0.0


class AR(nn.Module):
    strategies, samplers = ('joint',), ('ancestral',)

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.mask_id = c.vocab_size
        self.embed = nn.Embedding(c.vocab_size + 1, c.hidden)
        self.dit = DiT(c.hidden, c.num_layers, c.num_heads, c.cond_dim, 1 + c.block_size, dropout=c.dropout, causal=True)
        self.head = nn.Linear(c.hidden, c.vocab_size)
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def shifted(self, x):
        """The input that predicts x (b, l): start, x_0 ... x_{l-2}."""
        return torch.cat((x.new_full((len(x), 1), self.mask_id), x[:, :-1]), dim=1)

    def forward(self, x, noise):
        """Training loss per token of x (b, L) int64, and logs. There is no noise: the argument is the other methods'."""
        h = self.dit(self.embed(self.shifted(x)))
        weights = torch.full((x.numel(),), 1 / x.numel(), device=x.device)
        loss = head_cross_entropy(self.head, h.flatten(0, 1), x.flatten(), weights)
        return loss, {'loss': loss.detach()}

    @torch.no_grad()
    def token_nll(self, x):
        """x (b, l <= L) -> -log p(x_l | x_<l) in nats, (b, l)."""
        h = self.dit(self.embed(self.shifted(x)))
        return head_nll(self.head, h.flatten(0, 1), x.flatten()).view(x.shape)

    def nll(self, x, noise=None):
        """Exactly -log p(x): x (b, L) -> nats per sequence (b,)."""
        return self.token_nll(x).sum(dim=1)

    @torch.no_grad()
    def states(self, x, blank=None, layer=-1):
        """As an encoder: x (b, l <= L) -> hidden states (b, l, d), each with its own token read.

        blank: bool (b, l), tokens whose embedding is zeroed;  layer: -1 the output, -2 before the last block, and so on down to the embedding.
        """
        e = self.embed(torch.cat((x.new_full((len(x), 1), self.mask_id), x), dim=1))
        if blank is not None:
            e[:, 1:] = e[:, 1:].masked_fill(blank[..., None], 0)
        blocks = range(self.config.num_layers + 1)[layer]
        return self.dit(e, depth=blocks if blocks < self.config.num_layers else None)[:, 1:]

    @torch.no_grad()
    def sample(self, n, steps=None, temperature=1.0, top_p=1.0, x=None, generator=None, callback=None):
        """-> (n, L) ids, token by token: `steps` has no say. Keys and values are kept, so each position is computed once.

        x: (n, P) tokens to begin with, P <= L, where mask_id marks open places; ValueError if a token follows an open place of its row.
        callback(position, x) sees every step.
        """
        c, weight = self.config, self.head.weight
        x_0 = torch.full((n, 1 + c.block_size), self.mask_id, device=weight.device)  # the start, then the text
        if x is not None:
            x_0[:, 1:1 + x.shape[1]] = x
        given = x_0[:, 1:] != self.mask_id
        if (given[:, 1:] & ~given[:, :-1]).any():
            raise ValueError('AR writes from left to right: it continues a text, but fills no gap in one')
        nothing = weight.new_empty(n, c.num_heads, 0, c.hidden // c.num_heads)
        caches, past = [[nothing, nothing] for _ in range(c.num_layers)], 0
        for i in range(int(given.sum(dim=1).min()), c.block_size):
            h = self.dit(self.embed(x_0[:, past:i + 1]), caches=caches)  # the prompt at once, then one position at a time
            past = i + 1
            drawn = draw_tokens(self.head(h[:, -1]), temperature, top_p, generator)
            x_0[:, i + 1] = torch.where(given[:, i], x_0[:, i + 1], drawn)
            if callback:
                callback(i, x_0[:, 1:])
        return x_0[:, 1:]

    def flops(self, L):
        """Forward FLOPs of a pass over L positions by the paper's formula (one per FMA, no head); with the cache, of a whole sample."""
        return self.dit.flops(L)
