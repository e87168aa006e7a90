"""
What a method is: everything that train.py, sample.py, eval.py and bench.py ask of one.

The defaults are the answers of a method with one denoiser, `dit`, and one way to sample, so no script has to
probe for attributes or signatures, and none knows a method by name. A subclass takes a dataclass Config and
has

    forward(x, noise, [z_0])               training loss of x (b, L) int64, a scalar, and logs, a dict of scalars;
                                           z_0 (b, M, D): stored latents, where it trains on such
    nll_parts(x, noise, strategy, z_0)     one estimate of nll, by parts: {name: nats per sequence (b,)}
    sample(n, steps, strategy, sampler, generator=, callback=, **options)
                                           -> ids (n, L) after `steps` denoiser calls for the tokens;
                                           ValueError for an unknown strategy, sampler, option or value
    training_flops(L)                      useful FLOPs of a training step per sequence, head included: see bench.py
"""
import torch
import torch.nn as nn

from lib.configurator import complaint
from lib.noise import Noise


class Method(nn.Module):
    likelihood = None             # what nll is: 'exact' | 'bound' | 'token channel', which is no bound | None
    strategies = {'joint': {}}    # name -> the options of `sample` that it brings, {name: key(default, rule)}
    samplers = {'ancestral': {}}  # likewise
    takes_prompt = False          # whether `sample` takes x (n, L), a text whose open places hold mask_id
    mask_id = None
    has_latent_space = False      # whether it has reconstruct(x) and interpolate(x_a, x_b, weights)
    encoder_name = ''             # the frozen encoder that it reads texts with: hub id, folder or out/NAME
    wants_summary = False         # whether it needs the encoder's summary of a text, besides its tokens' states
    stored_latents = {}           # num_latents and latent_dim, if it trains on what data/encode.py has stored
    untrained_part = ''           # why it cannot start from scratch: another run must have trained a part of it

    @property
    def name(self):
        return type(self).__name__

    def attach(self, encoder):
        """Takes the frozen encoder, which becomes no part of the module. ValueError if it does not fit."""

    def reusable(self, weights, old, new):
        """Of another run's weights that have the right names and shapes, those that mean the same here.

        old, new: the flat configs of that run and of this one.
        """
        return weights

    def begin_step(self, step, noise, draw_rows):
        """Before a training step; may return what begins here, for whoever prints it.

        draw_rows(n) -> (ids (n, L), and stored latents where there are any): more training rows than a
        batch has.
        """

    def end_step(self, finite, noise):
        """After a step: moves what moves without gradients, if the step was finite (a bool tensor)."""

    @torch.no_grad()
    def nll(self, x, noise=None, draws=1, z_0=None):
        """What `likelihood` says of x (b, L), in nats per sequence (b,): the mean of `draws` estimates.

        noise: times and masks; without it they are the same at every call.
        """
        noise = noise or Noise(0, 0, torch.arange(len(x), device=x.device), len(x))
        return sum(sum(self.nll_parts(x, noise.draw(i), z_0=z_0).values()) for i in range(draws)) / draws

    def sampling_options(self, strategy='', sampler='', **given):
        """Every option of `sample`, complete and checked, for a strategy and a sampler ('': the first one).

        ValueError for a name or a value that it does not have.
        """
        choice, rules = {}, {}
        for kind, name, table in (('strategy', strategy, self.strategies), ('sampler', sampler, self.samplers)):
            choice[kind] = name or next(iter(table))
            if choice[kind] not in table:
                raise ValueError(f'{self.name} has no {kind} {name!r}; it has: {", ".join(table)}')
            rules |= table[choice[kind]]
        for name, value in given.items():
            if name not in rules:
                with_these = ', '.join(f'{kind}={name}' for kind, name in choice.items())
                raise ValueError(f'{self.name} has no option {name} with {with_these}')
            if sentence := complaint(name, rules[name].metadata, value):
                raise ValueError(sentence)
        return choice | {name: rule.default for name, rule in rules.items()} | given

    def backbones(self):
        """The networks between embeddings and heads."""
        return [self.dit]

    def flops(self, L):
        """Forward FLOPs of one denoiser call as the papers count: one per fused multiply-add, no head."""
        return self.dit.flops(L)

    def denoiser_calls(self, steps, **options):
        """How many calls `sample` makes for the tokens; None where `steps` has no say."""
        return steps

    def sampling_flops(self, L, steps, **options):
        """FLOPs of a sample, as if every call ran on the whole sequence; heads are left out."""
        return self.denoiser_calls(steps, **options) * self.flops(L)
