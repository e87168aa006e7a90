"""baselines/vadd.py against closed forms, exact networks and averages over the prior.

Statistical bounds are 4.5 standard errors, those of SWD 4 standard deviations of one draw; seeds are fixed.
"""
import itertools
import math

import pytest
import torch
from helpers import close, generator, scrambled, spy, whole

from baselines.vadd import VADD, Config
from mdlm import MDLM
from sawtooth import Exact, Sawtooth, exact_draw, swd

TINY = dict(vocab_size=5, block_size=6, hidden=16, num_layers=1, num_heads=2, cond_dim=8)
OWN = dict(z_dim=3, encoder_layers=1)


def texts(n, V=5, L=6):
    return torch.randint(V, (n, L), generator=generator())


# ------------------------------------------------------------------------------------------------------------
# the loss

def test_at_first_it_is_mdlm():
    """The recognition is the prior, and no position hears z: the same loss for the same noise."""
    method, mdlm = VADD(Config(**TINY, **OWN)), MDLM(MDLM.Config(**TINY))
    torch.nn.init.normal_(method.head.weight)
    method.places.data.zero_()
    names = mdlm.state_dict().keys()
    mdlm.load_state_dict({k: v for k, v in method.state_dict().items() if k in names}, strict=False)
    loss, logs = method(texts(32), whole(32))
    assert logs['kl'] == 0 and torch.equal(loss, mdlm(texts(32), whole(32))[0]) and loss != math.log(5)


def test_the_recognition_is_gaussian():
    """Its KL by torch.distributions, its draws in mean and variance; and no KL where nothing is revealed."""
    method, n = scrambled(VADD(Config(**TINY, **OWN))), 20_000
    found = []
    method.posterior.register_forward_hook(lambda module, args, out: found.append(out[0]))
    x, revealed = texts(1).expand(n, 6), torch.tensor([True, False, True, True, False, True])
    with torch.no_grad():
        z, kl = method.recognise(x, revealed.expand(n, 6), whole(n))
        _, nothing = method.recognise(x, torch.zeros(n, 6, dtype=torch.bool), whole(n))
    mu, log_sigma = found[0].chunk(2)
    r = torch.distributions.Normal(mu, log_sigma.exp())
    expected = torch.distributions.kl_divergence(r, torch.distributions.Normal(torch.zeros(3), torch.ones(3)))
    torch.testing.assert_close(kl, expected.sum().expand(n))
    assert (nothing == 0).all()
    for i in range(3):
        assert close(z[:, i], float(mu[i]))
        assert close((z[:, i] - mu[i]) ** 2, float(r.variance[i]))


def test_the_weight_of_the_kl_rises():
    method = scrambled(VADD(Config(**TINY, **OWN, kl_warmup=4, weighting='constant')))
    losses = []
    for step in (0, 1, 2, 4, 9):
        method.begin_step(step, None, None)
        _, logs = method(texts(32), whole(32))
        losses.append(float(logs['loss']))
    token_loss = losses[0]
    expected = [token_loss + share * float(logs['kl']) / 6 for share in (0, 0.25, 0.5, 1, 1)]
    assert losses == pytest.approx(expected, rel=1e-5) and losses[1] > token_loss
    without_warmup = VADD(Config(**TINY, **OWN))
    without_warmup.begin_step(0, None, None)
    assert without_warmup.kl_weight == 1


def test_positions_differ_where_all_is_masked():
    """To RoPE and a z that is the same for all, they would be alike."""
    method = scrambled(VADD(Config(**TINY, **OWN)))
    x_t, z = method.all_masked(1), torch.randn(1, 3)
    states = method.states(x_t, z)[0]
    assert (states - states[0])[1:].norm(dim=1).min() > 0.1
    method.places.data.zero_()
    states = method.states(x_t, z)[0]
    torch.testing.assert_close(states, states[:1].expand(6, 16))


# ------------------------------------------------------------------------------------------------------------
# two coins that are always equal

class Equal(VADD):
    """The exact VADD of the texts 00 and 11: the sign of z is the token."""

    def __init__(self, **keys):
        super().__init__(Config(2, 2, hidden=2, num_layers=1, num_heads=1, cond_dim=2, z_dim=1, **keys))
        torch.nn.init.eye_(self.head.weight)

    def recognise(self, x_s, revealed, noise):
        """Half of a Gaussian, which costs log 2; nothing if the other coin shows the token."""
        token = torch.where(revealed, x_s, 0).max(dim=1, keepdim=True).values
        visible = ((x_s < 2) & ~revealed).any(dim=1)
        z = (2 * token - 1) * noise.normal('z', 1).abs()
        return z, math.log(2) * (revealed.any(dim=1) & ~visible)

    def states(self, x_t, z):
        visible = torch.where(x_t < 2, x_t, -1).max(dim=1, keepdim=True).values
        token = torch.where(visible < 0, (z > 0).long(), visible).expand(x_t.shape)
        return 60.0 * torch.nn.functional.one_hot(token, 2)


@pytest.mark.parametrize('sampler', ['ancestral', 'fixed_z', 'first_hitting', 'remdm'])
def test_one_step_writes_tokens_that_agree(sampler):
    x = Equal().sample(4000, 1, sampler=sampler, generator=generator())
    assert (x[:, 0] == x[:, 1]).all() and close(x[:, 0], 0.5)


@pytest.mark.parametrize('T', [1, 2, 4])
def test_the_loss_is_below_the_entropy_and_the_bound_is_not(T):
    """Of the exact network: log(2) / 2 and log 2, nats per text. So the loss is no likelihood."""
    n = 40_000
    x = texts(n, 2, 1).expand(n, 2)
    method = Equal(weighting='elbo', bound_steps=T)
    nats = method.nll(x, whole(n))
    assert close(nats, math.log(2)) if T > 1 else torch.allclose(nats, torch.tensor(math.log(2)))
    losses = torch.stack([2 * method(x[i::40], whole(n)[torch.arange(i, n, 40)])[0].detach()
                          for i in range(40)])
    assert close(losses, math.log(2) / 2) and losses.std() / 40**0.5 < 0.01


# ------------------------------------------------------------------------------------------------------------
# the bound of any network

@pytest.mark.parametrize('T', [1, 2])
def test_the_bound_is_above_what_the_sampler_writes(T):
    """-log p(x) of the chain of T steps, by averages over 2,000 z from the prior, for all texts."""
    method = scrambled(VADD(Config(**TINY | dict(vocab_size=2, block_size=3), **OWN, bound_steps=T))).eval()
    x, M, n = torch.tensor(list(itertools.product(range(2), repeat=3))), 2000, 500
    with torch.no_grad():
        z = torch.randn(M, 3, generator=generator())

        def law(x_t):
            """log p(all tokens | x_t, z) of every masked place: (M, 3, 2)."""
            return method.head(method.states(x_t.expand(M, 3), z)).log_softmax(dim=-1)
        laws = {x_t: law(torch.tensor(x_t)).exp() for x_t in itertools.product(range(3), repeat=3)}

        def step(x_t, x_s):
            """The probability that the places visible in x_s and not in x_t are drawn like that."""
            new = [l for l in range(3) if x_t[l] == 2 != x_s[l]]
            return float(laws[x_t][:, new, [x_s[l] for l in new]].prod(dim=1).mean())
        for text in x:
            text, p = tuple(text.tolist()), 0.0
            for shown in itertools.product((True, False), repeat=3) if T == 2 else [(False,) * 3]:
                x_s = tuple(v if s else 2 for v, s in zip(text, shown))
                p += step((2, 2, 2), x_s) * step(x_s, text) / (8 if T == 2 else 1)
            nats = method.nll(torch.tensor(text).expand(n, 3), whole(n)).double()
            assert nats.mean() + 4.5 * nats.std() / n**0.5 > -math.log(p)


# ------------------------------------------------------------------------------------------------------------
# sawtooth

class Shift(VADD):
    """The exact VADD of sawtooth: z says the shift, as a quantile of its posterior."""

    def __init__(self, **keys):
        super().__init__(Config(2, 128, hidden=2, num_layers=1, num_heads=1, cond_dim=2, **keys))
        self.exact = Exact(64)
        torch.nn.init.eye_(self.head.weight)

    def recognise(self, x_s, revealed, noise):
        """-> shift, and the KL's integrand there: with the tokens' it makes -log p(x_S | x_t) for each."""
        after, before = (self.exact.log_likelihood(x).log_softmax(dim=1)
                         for x in (x_s, x_s.masked_fill(revealed, 2)))
        below = after.exp().cumsum(dim=1) < noise.uniform('z')[:, None]
        shift = below.sum(dim=1).clamp(max=63)
        return shift, (after - before).gather(1, shift[:, None])[:, 0]

    def states(self, x_t, shift):
        p = self.exact.p[shift]
        return torch.stack((1 - p, p), dim=-1).log()


@pytest.mark.parametrize('T', [1, 2, 4, 8])
def test_the_bound_of_the_exact_network_is_the_entropy(T):
    """.5303 nats per token, on the same texts, however many steps."""
    x, n = Sawtooth().batch(0, 0, torch.arange(2048))[0], 2048
    nats = (Shift(bound_steps=T).nll(x, whole(n)) - Exact(64).nll(x)).double() / 128
    assert abs(float(nats.mean())) < 4.5 * float(nats.std()) / n**0.5 + 1e-6 < 0.02


class NoShift(Shift):
    """The exact MDLM: z says nothing."""

    def recognise(self, x_s, revealed, noise):
        return None, torch.zeros(len(x_s))

    def states(self, x_t, z):
        p = self.exact.predict(torch.where(x_t == 2, 0, 2.0 * x_t - 1))
        return torch.stack((1 - p, p), dim=-1).log()


@pytest.mark.parametrize('T, bound', [(1, 0.6931), (2, 0.6047), (4, 0.5651), (8, 0.5453)])
def test_the_bound_of_the_exact_mdlm_pays_for_its_steps(T, bound):
    x, n = Sawtooth().batch(0, 0, torch.arange(2048))[0], 2048
    nats = NoShift(bound_steps=T).nll(x, whole(n)).double() / 128
    assert abs(float(nats.mean()) - bound) < 4.5 * float(nats.std()) / n**0.5 + 1e-4 < 0.02


def test_the_loss_of_the_exact_network_is_below_the_entropy():
    """.5167 +- .0014 nats per token, by another program."""
    n, method = 8192, Shift(weighting='elbo')
    x, noise = Sawtooth().batch(0, 0, torch.arange(n))[0], whole(n)
    losses = torch.stack([method(x[i::32], noise[torch.arange(i, n, 32)])[0].detach() for i in range(32)])
    error = (float(losses.std()) ** 2 / 32 + 0.0014**2) ** 0.5
    assert abs(float(losses.mean()) - 0.5167) < 4 * error and losses.mean() < 0.525


@pytest.mark.parametrize('kind, steps, mean, sd', [
    ('VADD', 1, 0.0061, 0.0004), ('VADD', 4, 0.0061, 0.0004), ('VADD, fixed z', 4, 0.0202, 0.0011)])
def test_exact_vadd(kind, steps, mean, sd):
    """At the floor in any number of steps; not so if z stays the same, since it is then read twice."""
    assert abs(swd(exact_draw(kind, 20480, steps), draws=1) - mean) < 4 * sd


def test_every_step_has_a_new_z():
    method = scrambled(VADD(Config(**TINY, **OWN)))
    for sampler, distinct in (('ancestral', 3), ('remdm', 3), ('fixed_z', 1), ('first_hitting', 6)):
        calls = spy(method, 'denoise')
        method.sample(16, 3, sampler=sampler, generator=generator())
        z = torch.stack([args[2] for args, _ in calls])
        assert len(z) == (6 if sampler == 'first_hitting' else 3) and len(z.unique(dim=0)) == distinct
        assert len(z[0].unique(dim=0)) == 16  # one for every text
        del method.__dict__['denoise']
