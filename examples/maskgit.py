"""MaskGIT (Chang et al., 2022, arXiv:2202.04200): MDLM, but a step reveals what it is surest of."""
import functools
import math
from dataclasses import dataclass

import torch

import mdlm
from lib.configurator import key


@dataclass
class Config(mdlm.Config):  # the keys of train.py: MDLM's, and one more
    choice_noise: float = key(4.5, at_least=0)  # Gumbel noise in "surest", fading with the steps; 0: none


def confident(denoise, x, steps, mask_id, choice_noise, draw, generator=None, callback=None):
    """Fills the [mask]s of x (n, L) in `steps` calls; after step i of T a share cos(pi/2 i/T) is left."""
    x, total = x.clone(), (x == mask_id).sum(dim=1)
    for i in range(steps):
        masked, fade = x == mask_id, choice_noise * (1 - (i + 1) / steps)
        if masked.any():
            logits = denoise(x, masked)  # (R, V), of all R masked positions
            tokens = draw(logits, generator=generator)
            log_p = logits.to(mdlm.wide(x.device)).log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0]
            gumbel = -torch.empty_like(log_p).exponential_(generator=generator).log()
            score = log_p.new_full(x.shape, -math.inf).masked_scatter(masked, log_p + fade * gumbel)
            left = (total * math.cos(math.pi / 2 * (i + 1) / steps)).long()
            rank = score.argsort(dim=1, descending=True).argsort(dim=1)
            reveal = rank < (masked.sum(dim=1) - left)[:, None]
            x = torch.where(reveal, x.masked_scatter(masked, tokens), x)
        if callback:
            callback(i, x, None)
    return x


class MaskGIT(mdlm.MDLM):
    name, Config = 'MaskGIT', Config
    samplers = {'confident': mdlm.DRAW, **mdlm.SAMPLERS}

    def fill_in(self, x, steps, sampler, generator=None, callback=None, **options):
        if sampler != 'confident':
            return super().fill_in(x, steps, sampler=sampler, generator=generator, callback=callback,
                                   **options)
        draw, noise = functools.partial(mdlm.draw_tokens, **options), self.config.choice_noise
        return confident(self.denoise, x, steps, self.mask_id, noise, draw, generator, callback)
