"""
AR: the left-to-right language model that the tables compare with.

    p(x) = prod_l p_theta(x_l | x_0 ... x_{l-1})

Same blocks, embedding and head as MDLM; only the attention is causal. The input is the text moved one place
to the right behind a learned start vector, so that all L tokens are scored, the first one too: -log p(x) is
exact, and it is the quantity that MDLM bounds.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn

from lib.configurator import Keys, key
from lib.method import Method
from mdlm import DRAW, draw_tokens
from model import DiT, head_cross_entropy, head_nll


@dataclass
class Config(Keys):
    vocab_size: int = 0  # from the data; id vocab_size is the input's start, and an open place in a prompt
    block_size: int = key(0, at_least=0)  # L
    hidden: int = key(384, at_least=1)
    num_layers: int = key(6, at_least=1)
    num_heads: int = key(6, at_least=1, meaning=True)
    cond_dim: int = key(128, at_least=1)  # AdaLN stays, fed a constant, so that AR and MDLM have equally many
    dropout: float = key(0.0, at_least=0, below=1)


class AR(Method):
    name, Config, likelihood = 'AR', Config, 'exact'
    samplers, takes_prompt = {'ancestral': DRAW}, True

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.mask_id = c.vocab_size
        self.embed = nn.Embedding(c.vocab_size + 1, c.hidden)
        self.dit = DiT(c.hidden, c.num_layers, c.num_heads, c.cond_dim, 1 + c.block_size, dropout=c.dropout,
                       causal=True)
        self.head = nn.Linear(c.hidden, c.vocab_size)
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def shifted(self, x):
        """The input that predicts x (b, l): start, x_0 ... x_{l-2}."""
        return torch.cat((x.new_full((len(x), 1), self.mask_id), x[:, :-1]), dim=1)

    def forward(self, x, noise):
        """Training loss per token of x (b, L) int64, and logs. noise is what other methods need."""
        h = self.dit(self.embed(self.shifted(x)))                                      # (b, L, d)
        loss = head_cross_entropy(self.head, h.flatten(0, 1), x.flatten())
        return loss, {'loss': loss.detach()}

    @torch.no_grad()
    def token_nll(self, x):
        """x (b, l <= L) -> -log p(x_l | x_<l) in nats, (b, l)."""
        h = self.dit(self.embed(self.shifted(x)))
        return head_nll(self.head, h.flatten(0, 1), x.flatten()).view(x.shape)

    def nll_parts(self, x, noise=None, strategy='joint', z_0=None):
        """Exactly -log p(x): x (b, L) -> nats (b,)."""
        self.sampling_options(strategy)  # ValueError for an unknown one
        return {'val': self.token_nll(x).sum(dim=1)}

    @torch.no_grad()
    def states(self, x, blank=None, layer=-1):
        """As an encoder: x (b, l <= L) -> hidden states (b, l, d), each with its own token read.

        blank: bool (b, l), tokens whose embedding is zeroed
        layer: -1 the output, -2 the input of the last block, and so on down to the embedding
        """
        e = self.embed(torch.cat((x.new_full((len(x), 1), self.mask_id), x), dim=1))
        if blank is not None:
            e[:, 1:] = e[:, 1:].masked_fill(blank[..., None], 0)
        blocks = range(self.config.num_layers + 1)[layer]
        return self.dit(e, depth=blocks if blocks < self.config.num_layers else None)[:, 1:]

    @torch.no_grad()
    def sample(self, n, steps=None, strategy='', sampler='', x=None, generator=None, callback=None,
               **options):
        """-> ids (n, L), token by token: `steps` has no say. Keys and values are kept, so each position is
        computed once.

        x: (n, P) tokens to begin with, P <= L, where mask_id marks open places; ValueError if a token
        follows an open place of its row. options: temperature, top_p. callback(position, x, None) sees
        every step.
        """
        options = self.sampling_options(strategy, sampler, **options)
        text = torch.full((n, self.config.block_size), self.mask_id, device=self.head.weight.device)
        if x is not None:
            text[:, :x.shape[1]] = x
        given = text != self.mask_id
        if (given[:, 1:] & ~given[:, :-1]).any():
            raise ValueError('AR writes from left to right: it continues a text, but fills no gap in one')
        return self.left_to_right(text, lambda i, logits: draw_tokens(
            logits, options['temperature'], options['top_p'], generator), callback)

    def left_to_right(self, x, draw, callback=None):
        """x (n, L) with mask_id at open places -> (n, L); draw(i, logits (n, V)) -> tokens (n,) for place i.

        A given token to the right of an open place stays, but the model does not know it in advance.
        """
        c, given = self.config, x != self.mask_id
        x_0 = torch.cat((torch.full_like(x[:, :1], self.mask_id), x), dim=1)  # start, then the text
        caches, past = [[] for _ in range(c.num_layers)], 0
        for i in range(int(given.cumprod(dim=1).sum(dim=1).min()), c.block_size):
            # the prompt at once, then one position at a time
            h = self.dit(self.embed(x_0[:, past:i + 1]), caches=caches)
            past = i + 1
            x_0[:, i + 1] = torch.where(given[:, i], x_0[:, i + 1], draw(i, self.head(h[:, -1])))
            if callback:
                callback(i, x_0[:, 1:], None)
        return x_0[:, 1:]

    def denoiser_calls(self, steps, **options):
        return None

    def sampling_flops(self, L, steps, **options):
        """With keys and values kept, a whole text costs one pass."""
        return self.flops(L)
