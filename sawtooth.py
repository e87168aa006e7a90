"""
Sawtooth: a toy language of which everything is known (LADD section 5.1, appendix E.1).

A text is L = 128 coin flips whose bias is a triangle wave, k = 2 periods long, shifted by one random number w per text:
    s_l = k ((l / L + w) mod 1) mod 1,     p(x_l = 1 | w) = m + (1 - 2m)(1 - |2 s_l - 1|),     w ~ U[0, 1)     LADD eq. (78), (79)
Given w the tokens are independent; without it each is a fair coin. So all there is to learn is the shift, and a good latent is w.
A mixture over one number can be integrated: the exact p(x_l | visible tokens) is here as a denoiser that fits the samplers.

    python sawtooth.py out/sawtooth_*      the paper's Table 1 and Figure 2 from those checkpoints
"""
import functools
import json
import pathlib
import sys

import numpy as np
import torch

from noise import Noise

L, K, M = 128, 2, 0.01  # tokens, periods, smallest probability
PERIOD = 1 / K  # shifts that differ by this are the same text distribution


def bias(w):
    """p(x_l = 1 | w): w (...,) -> (..., L)."""
    s = K * ((torch.arange(L, device=w.device) / L + w[..., None]) % 1) % 1
    return M + (1 - 2 * M) * (1 - (2 * s - 1).abs())


class Sawtooth:
    """The data: an infinite stream, a function of seed, step and row; `rows` are the validation texts."""
    vocab_size, block_size = 2, L

    def __init__(self, split='train'):
        self.split = split

    def batch(self, seed, step, rows):
        """rows int64 (b,) -> texts (b, L) int64."""
        noise = Noise(seed, step, rows, None)
        return (noise.uniform('tokens ' + self.split, L) < bias(noise.uniform('shift ' + self.split))).long()

    def rows(self, idx):
        return self.batch(0, 0, idx)

    def __len__(self):
        return 2**31

    def report(self, method):
        """What train.py prints at the end: token loss and SWD beside the exact values."""
        print_table(measure(method, steps=(1, 2, 4, 8)))


# ----------------------------------------------------------------------------------------------------------------------------------
# exact answers

class Exact:
    """The Bayes-optimal denoiser: a posterior over `points` shifts in one period, given the visible tokens."""

    def __init__(self, points=512, device='cpu'):
        self.p = bias((torch.arange(points, device=device) + 0.5) / points * PERIOD)  # (P, L)
        self.log_ratio, self.log_p0 = (self.p / (1 - self.p)).log().T, (1 - self.p).log().T  # (L, P)

    def log_likelihood(self, x):
        """log p(visible tokens | shift): x (n, L) with 0, 1 or 2 = [mask] -> (n, P)."""
        return (x == 1).float() @ self.log_ratio + (x != 2).float() @ self.log_p0

    def denoise(self, x_t, where):
        """A drop-in for the networks': logits (where.sum(), 2)."""
        p1 = (self.log_likelihood(x_t).softmax(dim=1) @ self.p)[where]
        return torch.stack((1 - p1, p1), dim=1).log()

    def joint_denoise(self, x_t, z_t, t, where):
        """The same with the shift as the one code, z_t (n, 1) in 0 ... P-1, or P for [mask]: token logits and code logits (n, 1, P)."""
        posterior = self.log_likelihood(x_t)
        known = z_t[:, 0] < len(self.p)
        p1 = torch.where(known[:, None], self.p[z_t[:, 0] % len(self.p)], posterior.softmax(dim=1) @ self.p)[where]
        return torch.stack((1 - p1, p1), dim=1).log(), posterior[:, None]

    def nll(self, x):
        """-log p(x), nats (n,): the least ELBO that any MDLM can have. On average 0.5303 L."""
        return np.log(len(self.p)) - self.log_likelihood(x).logsumexp(dim=1)

    def oracle(self):
        """H(x | w) / L, nats per token: 0.5096."""
        return float(-(torch.special.xlogy(self.p, self.p) + torch.special.xlogy(1 - self.p, 1 - self.p)).mean())


# ----------------------------------------------------------------------------------------------------------------------------------
# the distance: LADD eq. (85) to (88)

@functools.lru_cache(maxsize=4)
def reference(draw, n, directions):
    """Sorted projections (directions, n) of the draw-th reference sample, fp32."""
    x = Sawtooth(f'reference {draw}').rows(torch.arange(n))
    return project(x, directions)


def project(x, directions):
    theta = torch.randn(directions, L, generator=torch.Generator().manual_seed(0))
    theta = theta / theta.norm(dim=1, keepdim=True)
    return torch.from_numpy(np.sort((theta @ x.float().T).numpy(), axis=1))


def swd(x, draws=3, directions=1000):
    """Sliced Wasserstein distance of order 1 of x (n, L), raw {0, 1} vectors, to fresh data of the same size; mean over `draws`."""
    px = project(x, directions)
    return float(np.mean([(px - reference(d, len(x), directions)).abs().mean() for d in range(draws)]))
