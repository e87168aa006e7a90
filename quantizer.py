"""
The vector quantizer of Di-LADD: LADD appendix C.2.

Each latent, a unit vector, becomes the code nearest to it. The codes are learned without gradients: a code is the running mean of the vectors
that chose it. So they start where the vectors are (k-means), and a code that hardly anybody chooses starts again elsewhere.
As VectorQuantize of vector-quantize-pytorch with use_cosine_sim, the library that the paper names. The official code's values: decay .95,
commitment .1, dead-code threshold 2, k-means initialisation with 10 iterations.
"""
import functools

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F


def everyone(rows):
    """The rows of all W processes, side by side: (b, ...) -> (b, W, ...)."""
    if not dist.is_initialized():
        return rows[:, None]
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.stack(parts, dim=1)


def in_fp32(method):
    """Autocast stays out: code choice and running averages deserve better than bf16."""
    @functools.wraps(method)
    def inner(self, e, *args, **kwargs):
        with torch.autocast(e.device.type, enabled=False):
            return method(self, e.float(), *args, **kwargs)
    return inner


class Quantizer(nn.Module):
    """Cosine-similarity codebook, updated by exponential averages; its state lives in buffers."""
    at_once = 4096  # vectors that meet all the codes at a time: k-means sees 131,000 vectors for 8,191 codes

    def __init__(self, size, dim, decay=0.95, commitment=0.1, dead_below=2.0):
        super().__init__()
        self.decay, self.commitment, self.dead_below = decay, commitment, dead_below
        self.register_buffer('codebook', F.normalize(torch.randn(size, dim), dim=-1))  # unit vectors
        self.register_buffer('counts', torch.full((size,), dead_below))  # running mean of the vectors per batch that chose each code
        self.register_buffer('sums', self.codebook * dead_below)  # running mean of their sum
        self.waiting = []  # (vectors, codes) of the micro-batches of this step so far

    @in_fp32
    def nearest(self, e):
        """Unit vectors e (..., D) -> code indices (...), LADD eq. (73)."""
        parts = e.flatten(0, -2).split(self.at_once)
        return torch.cat([(part @ self.codebook.T).argmax(dim=-1) for part in parts]).view(e.shape[:-1])

    def tally(self, e, codes):
        """How many of the vectors e (N, D) chose each code, and their sum: codes (N,) -> (K,), (K, D).

        By products with 0 and 1, not by index_add_: its order of summation on a GPU is anybody's, and processes would drift apart.
        """
        counts, sums = 0, 0
        for part, chosen in zip(e.split(self.at_once), codes.split(self.at_once)):
            chosen = F.one_hot(chosen, len(self.codebook)).to(e.dtype)
            counts, sums = counts + chosen.sum(dim=0), sums + chosen.T @ part
        return counts, sums

    def forward(self, e, noise=None):
        """Unit vectors e (b, M, D) -> quantised with a straight-through gradient, codes (b, M), commitment loss, LADD eq. (74).

        With noise given (stage 1 of training) the codebook moves after its codes were read, once per step: with the last micro-batch.
        """
        codes = self.nearest(e)
        quantised = self.codebook[codes]
        loss = self.commitment * F.mse_loss(e, quantised)
        straight = e + (quantised - e).detach()
        if noise is not None:
            self.waiting.append((everyone(e.detach()), everyone(codes)))
            if sum(codes[..., 0].numel() for _, codes in self.waiting) == noise.total:
                e_all, codes_all = (torch.stack(parts, dim=1) for parts in zip(*self.waiting))  # (b, micro-batches, W, M, ...)
                self.update(e_all.flatten(0, 3), codes_all.flatten(), noise)  # in the order of the global batch
                self.waiting = []
        return straight, codes, loss

    @torch.no_grad()
    @in_fp32
    def update(self, e, codes, noise):
        """e (N, D), codes (N,): the whole global batch, so every process makes the same move."""
        counts, sums = self.tally(e, codes)
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        # a code that hardly anybody chooses restarts at a random vector of the batch
        dead = self.counts < self.dead_below
        fresh = e[noise.permutation('revive', max(len(e), len(dead)))[:len(dead)] % len(e)]
        self.counts[:] = torch.where(dead, self.dead_below, self.counts)
        self.sums[:] = torch.where(dead[:, None], self.dead_below * fresh, self.sums)
        self.codebook[:] = F.normalize(self.sums, dim=-1)

    @torch.no_grad()
    @in_fp32
    def kmeans(self, e, batch_vectors, noise, iterations=10):
        """Starts the codebook by spherical k-means on e (N, D); batch_vectors: vectors in a training batch, the unit of `counts`."""
        K = len(self.codebook)
        self.codebook[:] = e[noise.permutation('k-means', max(len(e), K))[:K] % len(e)]
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
