"""
DCD: discrete copula diffusion (Liu et al., 2025, arXiv:2410.01949). No training: an MDLM and an AR, which
were trained on the same texts, draw together.

    MDLM        knows p(x_l | x_t) at every masked place, from what stands to its left and right, but in one
                step it draws all of them independently
    AR          knows how tokens depend on one another, but not what stands to the right
    copula      p*(x) = p_AR(x) prod_l e^{V_l(x_l)}, with V such that the marginals are p(x_l | x_t): of all
                laws with these marginals it is the nearest to p_AR, whose odds ratios it has
    rule        a guess of V that needs no iteration. From left to right, at every masked place,
                log q(x_l) = log p_AR(x_l | x_<l) + log p(x_l | x_t) - log p(x_l | visible tokens of x_t
                left of l) + constant: what MDLM knows from the right
    sampler     MDLM's, except that a step draws the whole text by this rule, and then reveals a part of it

p(x_l | visible tokens left of l) comes from the same MDLM, by causal attention, for which it was not trained.
If all networks are exact, so is the rule, unless a visible token has two masked ones to its left: then the
second of these is drawn as if the first one changed nothing in what the right says about it. Even then the
rule is nearer to the truth than independent draws, on average over random laws (tests/test_dcd.py).

    python sample.py --out_dir=out/MDLM --copula=out/AR --steps=4 --start="ROMEO: [MASK:40] Juliet!"

Where we differ from the released code: it reveals equal chunks from left to right (`chunks`), which without a
prompt is AR alone if the networks are exact. With random reveals, our default, MDLM matters there, too.
Its chunked sampler uses undefined names once a step is longer than .1. Its AR, GPT-2, has no start of a text,
so that MDLM draws the first token alone; ours has one. A step costs two calls of MDLM and L of AR, one after
another: keys and values are kept, so that they have the FLOPs of one, but not its time.
"""
import torch

from baselines.ar import AR
from lib.configurator import key
from lib.method import Method
from mdlm import DRAW, MDLM, alpha, choose, draw_tokens, pairs, time_grid

# ------------------------------------------------------------------------------------------------------------
# samplers: pure functions over `write(x_t (n, L)) -> x (n, L)`, which fills in all [mask]s together

def reveal_some(write, x, alphas, mask_id, generator=None, callback=None):
    """mdlm.ancestral, except that the tokens of a step are drawn together."""
    for i, (alpha_t, alpha_s) in enumerate(pairs(alphas)):
        drawn = write(x)
        reveal, _ = choose(x, alpha_t, alpha_s, mask_id, generator=generator)
        x = torch.where(reveal, drawn, x)
        if callback:
            callback(i, x, None)
    return x


def reveal_chunks(write, x, steps, callback=None):
    """The released order: of `steps` equal chunks of the text, one in each step."""
    L = x.shape[1]
    for i in range(steps):
        end = L * (i + 1) // steps
        x = torch.cat((write(x)[:, :end], x[:, end:]), dim=1)
        if callback:
            callback(i, x, None)
    return x


# ------------------------------------------------------------------------------------------------------------
# the method

CORRECTION = {'correction': key(1.0, at_least=0)}  # how much of MDLM's word counts; 0: none


class DCD(Method):
    """A sampler over two trained methods, with an interface like theirs."""
    name, takes_prompt = 'DCD', True
    samplers = {'copula': DRAW | CORRECTION, 'chunks': DRAW | CORRECTION}

    def __init__(self, mdlm, ar):
        super().__init__()
        if type(mdlm) is not MDLM or type(ar) is not AR:
            raise ValueError(f'DCD is of an MDLM and an AR, not of {mdlm.name} and {ar.name}')
        self.mdlm, self.ar, self.mask_id = mdlm, ar, mdlm.mask_id

    def states(self, x_t, causal=False):
        """MDLM's: x_t (n, L) -> (n, L, d). causal: each place sees only what stands to its left."""
        blocks = self.mdlm.dit.blocks
        try:
            for block in blocks:
                block.causal = causal
            return self.mdlm.dit(self.mdlm.embed(x_t))
        finally:
            for block in blocks:
                block.causal = False

    def rule(self, x_t, correction=1.0):
        """-> a function of a place l and AR's logits (n, V) there, which gives those of q."""
        both, left = self.states(x_t), self.states(x_t, causal=True)

        def logits_of_q(l, logits):
            nc, c = (self.mdlm.head(h[:, l]).float().log_softmax(dim=-1) for h in (both, left))
            return logits.float().log_softmax(dim=-1) + correction * (nc - c)
        return logits_of_q

    @torch.no_grad()
    def sample(self, n, steps, strategy='', sampler='', x=None, generator=None, callback=None, **options):
        """-> ids (n, L). x: (n, L) to start from, in which [mask]s are filled in (default: all masked).

        options: temperature, top_p, of q, and correction. callback(step, x, None) sees every step.
        """
        o = self.sampling_options(strategy, sampler, **options)
        alphas = alpha(time_grid(steps, self.mdlm.head.weight.device), self.mdlm.config.schedule)
        x = self.mdlm.all_masked(n) if x is None else x

        def write(x_t):
            rule = self.rule(x_t, o['correction'])

            def draw(l, logits):
                return draw_tokens(rule(l, logits), o['temperature'], o['top_p'], generator)
            return self.ar.left_to_right(x_t, draw)
        if o['sampler'] == 'chunks':
            return reveal_chunks(write, x, steps, callback)
        return reveal_some(write, x, alphas, self.mask_id, generator, callback)

    def backbones(self):
        return [self.mdlm.dit, self.ar.dit]

    def flops(self, L):
        return 2 * self.mdlm.flops(L) + self.ar.flops(L)
