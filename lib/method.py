"""
What a method is: everything that train.py, sample.py, eval.py and bench.py need from one.

The defaults describe a method with one denoiser, `dit`, and one way to sample. So no script has to probe
for attributes or signatures, and none needs to know a method by name. A subclass has a dataclass Config, is
built from an instance of it, and defines

    forward(x, noise, [z_0])           training loss of x (b, L) int64, a mean per token, and its logs
                                       {name: detached scalar tensor}, at least {'loss': loss.detach()};
                                       z_0 (b, M, D): stored latents, if it trains on them
    nll_parts(x, noise=None, strategy='', z_0=None)
                                       one estimate of nll, in parts {name: nats per sequence (b,)}: 'val'
                                       is the whole; a method with two channels has 'token' and 'latent'.
                                       ValueError for an unknown strategy
    sample(n, steps, strategy='', sampler='', generator=None, callback=None, **options)
                                       -> ids (n, L) after `steps` denoiser calls for the tokens; '' is the
                                       first strategy or sampler; callback(i, x, z) after step i = 0, 1,
                                       ..., z the latent or None (negative i: steps of a latent that comes
                                       before the tokens); also x=..., if it takes a prompt, and z_0=...,
                                       if it has the option latent=data. ValueError for an unknown name,
                                       option or value: begin with self.sampling_options(...)
    latents_of(x)                      what z_0 is for texts x, if it has that option

train.py calls it under bfloat16 autocast: make logits .float() before arithmetic on probabilities. On a GPU
`forward` may be compiled as a whole, so nothing in it should ask the host (.item(), boolean indexing).
"""
import torch
import torch.nn as nn

from lib.configurator import complaint
from lib.noise import Noise


class Method(nn.Module):
    name = ''                     # as people write it; a subclass of another method needs its own
    likelihood = None             # what nll is: 'exact' | 'bound' | None
    strategies = {'joint': {}}    # name -> the options that it adds to `sample`, {name: key(default, rule)}
    samplers = {'ancestral': {}}  # likewise
    takes_prompt = False          # whether `sample` takes x (n, L), with mask_id where it is to fill in
    mask_id = None
    latent_mask_id = None         # the same of a latent that is a row of codes
    has_latent_space = False      # whether it has reconstruct(x) and interpolate(x_a, x_b, weights)
    encoder_name = ''             # the frozen encoder that it reads texts with: hub id, folder or out/NAME
    wants_summary = False         # whether it needs the encoder's summary of a text, too
    stored_latents = {}           # num_latents and latent_dim, if it trains on what data/encode.py stored
    lr_restarts = ()              # steps at which the learning rate begins again, warmup and all
    untrained_part = ''           # why it cannot train from scratch, if another run has to train a part first

    def attach(self, encoder):
        """Takes the frozen encoder, without making it a part of the module. ValueError if it does not fit."""

    def reusable(self, weights, old, new):
        """-> those of another run's weights {name: tensor} that mean the same here.

        Their names and shapes already fit.  old, new: the flat configs of that run and of this one.
        ValueError if training cannot start from that run.
        """
        return weights

    def begin_step(self, step, noise, draw_rows):
        """Called before a training step. May return a message to print, such as the start of a stage.

        draw_rows(n) -> ids (n, L) and stored latents, if any, of n training rows; n may exceed the batch.
        """

    def end_step(self, finite, noise):
        """Called after a step: updates what has no gradients, if the step was finite (a bool tensor)."""

    @torch.no_grad()
    def nll(self, x, noise=None, draws=1, z_0=None):
        """-log p(x), or what `likelihood` names instead: x (b, L) -> nats (b,), a mean over `draws`.

        noise: for times and masks; without it, they are the same in every call.
        """
        noise = noise or Noise(0, 0, torch.arange(len(x), device=x.device), len(x))
        return sum(sum(self.nll_parts(x, noise.draw(i), z_0=z_0).values()) for i in range(draws)) / draws

    @property
    def validated(self):
        """Names of what `validation` returns; a method without a likelihood may have numbers of its own."""
        return ('nats',) if self.likelihood else ()

    def validation(self, x, noise, z_0=None):
        """What train.py reports of validation texts: x (b, L) -> {name: a number for each text (b,)}."""
        return {'nats': self.nll(x, noise, z_0=z_0)}

    def sampling_options(self, strategy='', sampler='', **given):
        """-> all options of `sample`, with defaults filled in. strategy, sampler: '' is the first one.

        ValueError for an unknown name, or a value that breaks its rule.
        """
        choice, rules = {}, {}
        for kind, name, table in (('strategy', strategy, self.strategies),
                                  ('sampler', sampler, self.samplers)):
            choice[kind] = name or next(iter(table))
            if choice[kind] not in table:
                raise ValueError(f'{self.name} has no {kind} {name!r}; it has: {", ".join(table)}')
            rules |= table[choice[kind]]
        for name, value in given.items():
            if name not in rules:
                chosen = ', '.join(f'{kind}={of_kind}' for kind, of_kind in choice.items())
                fits = [f'strategy={s}' for s, options in self.strategies.items() if name in options]
                fits += [f'sampler={s}' for s, options in self.samplers.items() if name in options]
                hint = f'; it works with {" or ".join(fits)}' if fits else ''
                raise ValueError(f'{self.name} has no option {name}' + f' with {chosen}{hint}' * bool(fits))
            if sentence := complaint(name, rules[name].metadata, value):
                raise ValueError(sentence)
        return choice | {name: rule.default for name, rule in rules.items()} | given

    def backbones(self):
        """The networks between embeddings and heads."""
        return [self.dit]

    def flops(self, L):
        """Forward FLOPs of a denoiser call, counted as in the papers: one per multiply-add, no head."""
        return self.dit.flops(L)

    def training_flops(self, L):
        """Useful FLOPs of a training step per sequence, see bench.py; here all positions have logits."""
        return 6 * (self.flops(L) + L * self.config.hidden * self.config.vocab_size)

    def denoiser_calls(self, steps, **options):
        """How many denoiser calls `sample` makes for the tokens; None if `steps` has no influence on it."""
        return steps

    def sampling_flops(self, L, steps, **options):
        """FLOPs of one sample, without heads, as if every call ran on the whole sequence."""
        return self.denoiser_calls(steps, **options) * self.flops(L)


def frozen(module):
    """The module with buffers for weights: checkpoints have them, optimizers do not."""
    for part in module.modules():
        for name, weight in [*part.named_parameters(recurse=False)]:
            delattr(part, name)
            part.register_buffer(name, weight.detach())
    return module


OF_TEXTS = 'data', 'shuffled'  # values of the option `latent`: as they are, or each place from another text


def with_latent(z_0, options):
    """Options of `sample`, with latent=data where it is given z_0; ValueError for one without the other."""
    if z_0 is not None:
        options = {'latent': 'data', **options}
    if (z_0 is not None) != (options.get('latent') in OF_TEXTS):
        raise ValueError('latent=data or shuffled and z_0, what latents_of makes of texts, go together')
    return options
