"""baselines/cadd.py against MDLM, Bayes' rule, and the entropies of a few bits with exact networks.

Statistical bounds are 4.5 standard errors, those of SWD 4 standard deviations of one draw; seeds are fixed.
"""
import math

import pytest
import torch
from helpers import close, generator, scrambled, whole

from baselines import cadd
from baselines.cadd import CADD, Config, move
from mdlm import MDLM, time_grid
from sawtooth import Exact, exact_draw, swd

TINY = dict(vocab_size=5, block_size=6, hidden=16, num_layers=1, num_heads=2, cond_dim=8)


def texts(n):
    return torch.randint(5, (n, 6), generator=generator())


# ------------------------------------------------------------------------------------------------------------
# hints

def test_without_hints_it_is_mdlm():
    """At first no position hears the time; with hints of zero, it is the same loss for the same noise."""
    method, mdlm = CADD(Config(**TINY)), MDLM(MDLM.Config(**TINY))
    torch.nn.init.normal_(method.head.weight)
    method.hint_in.weight.data.zero_()
    names = mdlm.state_dict().keys()
    mdlm.load_state_dict({k: v for k, v in method.state_dict().items() if k in names})
    loss, losses = mdlm(texts(32), whole(32))[0], [method(texts(32), whole(32))[0]]
    torch.nn.init.normal_(method.hint_in.weight)
    losses.append(method(texts(32), whole(32))[0])
    assert torch.equal(losses[0], loss) and not torch.allclose(losses[1], loss)


def test_hints_are_seen_where_tokens_are_masked_only():
    method, z, t = scrambled(CADD(Config(**TINY))), torch.randn(8, 6, 16), torch.rand(8)
    x_t = texts(8)
    x_t[:, ::2] = method.mask_id
    states = method.states(x_t, z, t)
    z[:, 1::2] = torch.randn(8, 3, 16)
    assert torch.equal(method.states(x_t, z, t), states)
    z[:, 0] += 1
    assert not torch.allclose(method.states(x_t, z, t), states)


def test_what_they_are_of_cannot_grow():
    """Standardised over the vocabulary, however large the weights are; the two words of sawtooth are +-1."""
    method = CADD(Config(**TINY))
    for scale, shift in ((1, 0), (100, 7)):
        method.words.weight.data.mul_(scale).add_(shift)
        torch.testing.assert_close(method.w().mean(dim=0), torch.zeros(16), rtol=0, atol=1e-5)
        torch.testing.assert_close(method.w().square().mean(dim=0), torch.ones(16))
    w = CADD(Config(2, 6, hint_dim=1, hidden=4, num_layers=1, num_heads=1, cond_dim=4)).w()
    torch.testing.assert_close(w.sort(dim=0).values, torch.tensor([[-1.0], [1.0]]))


@pytest.mark.parametrize('dim, low, high', [(768, 0.99, 1), (192, 0.2, 0.42), (16, 0, 0.01)])
def test_hints_of_many_dimensions_give_tokens_away(dim, low, high):
    """How often the likeliest of 5,000 words is the right one at t = .95: hence a small hint_dim."""
    torch.manual_seed(0)
    w = CADD(Config(5000, 6, hint_dim=dim, hidden=4, num_layers=1, num_heads=1, cond_dim=4)).w().detach()
    z = 0.05**0.5 * w[:400] + 0.95**0.5 * torch.randn(400, dim)
    likeliest = (0.05**0.5 * z @ w.T - 0.05 / 2 * w.square().sum(dim=1)).argmax(dim=1)
    assert low <= float((likeliest == torch.arange(400)).double().mean()) <= high


def test_a_step_keeps_the_law_of_the_hints():
    """From q(z_t | w) to q(z_s | w) if w_hat is w, in mean, variance and covariance; from pure noise, too."""
    w, normal = 0.7, torch.randn(2, 100_000, generator=generator()).double()
    for alpha_t, alpha_s in ((0.3, 0.8), (0.0, 0.25), (0.5, 0.51)):
        z_t = alpha_t**0.5 * w + (1 - alpha_t) ** 0.5 * normal[0]
        z_s = move(z_t, w, alpha_t, alpha_s, normal[1])
        assert close(z_s, alpha_s**0.5 * w)
        assert close((z_s - alpha_s**0.5 * w) ** 2, 1 - alpha_s)
        covariance = (z_s - alpha_s**0.5 * w) * (z_t - alpha_t**0.5 * w)  # forward from s to t
        assert close(covariance, (alpha_t / alpha_s) ** 0.5 * (1 - alpha_s))


def test_soft_and_hard_hints(monkeypatch):
    """w_hat is the mean of w under p, or w of the likeliest token; only where a token is masked."""
    method, z = scrambled(CADD(Config(**TINY))), torch.randn(3, 6, 16, generator=generator())
    x_t = texts(3)
    x_t[:, :4] = method.mask_id
    with torch.no_grad():
        p = method.head(method.states(x_t, z, torch.tensor([0.4])))[:, :4].softmax(dim=-1)
        for hint, expected in (('soft', p @ method.w()), ('hard', method.w()[p.argmax(dim=-1)])):
            tokens, w_hat = method.denoise(x_t, z, 0.6, hint, lambda logits, generator: logits.argmax(dim=-1))
            torch.testing.assert_close(w_hat[:, :4], expected)
            assert torch.equal(tokens[:, :4], p.argmax(dim=-1)) and torch.equal(tokens[:, 4:], x_t[:, 4:])
            assert (w_hat[:, 4:] == 0).all()


def test_the_first_step_is_blind_and_the_last_one_moves_no_hint():
    """The network meets alpha 0, 1/3, 2/3 with hints of variance about 1, and the sampler ends there."""
    seen = []

    def denoise(x, z, alpha_t):
        seen.append((float(alpha_t), float(z.std())))
        return torch.zeros_like(x), torch.zeros_like(z)
    x = cadd.hinted(denoise, torch.full((500, 6), 5), torch.randn(500, 6, 4, generator=generator()),
                    1 - time_grid(3), 5, generator())
    assert (x == 0).all() and [a for a, _ in seen] == pytest.approx([0, 1 / 3, 2 / 3])
    assert [std for _, std in seen] == pytest.approx([1, (2 / 3) ** 0.5, (1 / 3) ** 0.5], rel=0.03)


# ------------------------------------------------------------------------------------------------------------
# the bound, of exact networks

class Bits(CADD):
    """The exact CADD of texts of L equal bits, which are 1 with probability p; w is -1 or 1."""

    def __init__(self, L, p):
        super().__init__(Config(2, L, hint_dim=1, hidden=2, num_layers=1, num_heads=1, cond_dim=2))
        self.prior = math.log(p / (1 - p))
        self.words.weight.data = torch.tensor([[-1.0], [1.0]])
        torch.nn.init.eye_(self.head.weight)

    def states(self, x_t, z, masked_share):
        a = (1 - masked_share)[:, None]
        hints = 2 * a.sqrt() * z[..., 0] / (1 - a)                                     # log-likelihood ratios
        evidence = torch.where(x_t == 2, hints, 80.0 * x_t - 40).sum(dim=1) + self.prior
        logit = evidence[:, None].expand(x_t.shape)
        return torch.stack((-logit / 2, logit / 2), dim=-1)


@pytest.mark.parametrize('L, p, loss', [(1, 0.5, 0.3362), (3, 0.5, 0.3858), (1, 0.2, None)])
def test_the_loss_is_below_the_entropy_and_the_bound_is_it(L, p, loss):
    """Nats per text. The published loss of one fair bit is .3362, of three that are equal .3858."""
    n, entropy = 60_000, -p * math.log(p) - (1 - p) * math.log(1 - p)
    x = (torch.rand(n, 1, generator=generator()) < p).long().expand(n, L)
    method = Bits(L, p)
    nats = method.nll(x, whole(n)).double()
    assert close(nats, entropy) and nats.std() / n**0.5 < 0.01
    if loss:
        losses = torch.stack([L * method(x[i::30], whole(n)[torch.arange(i, n, 30)])[0].detach()
                              for i in range(30)])
        assert close(losses, loss) and losses.std() / 30**0.5 < 0.01


# ------------------------------------------------------------------------------------------------------------
# sawtooth

@pytest.mark.parametrize('steps, mean, sd', [(1, 0.0494, 0.0011), (2, 0.0395, 0.0009)])
def test_exact_cadd_is_no_better_than_exact_mdlm(steps, mean, sd):
    """MDLM's are .0495 and .0333: one step is the same, and in two the hints lead astray."""
    assert abs(swd(exact_draw('CADD', 20480, steps), draws=1) - mean) < 4 * sd


@pytest.mark.parametrize('ties, low, high', [('to one word', 0.1, 0.25), ('at random', 0.03, 0.06)])
def test_hard_hints_of_exact_ties(ties, low, high):
    """At first both words are as likely. If the argmax is then always the same, hints tell a false text."""
    exact, n, g = Exact(64), 4096, generator()

    def denoise(x, z, alpha_t):
        hints = torch.tanh(float(alpha_t) ** 0.5 * z[..., 0] / (1 - float(alpha_t)))
        p = exact.predict(torch.where(x == 2, hints, 2.0 * x - 1))
        coin = torch.rand(p.shape, generator=g) < 0.5 if ties == 'at random' else torch.tensor(False)
        likeliest = torch.where((p - 0.5).abs() < 1e-5, coin, p > 0.5)
        return (torch.rand(p.shape, generator=g) < p).long(), (2.0 * likeliest - 1)[..., None]
    x, z = torch.full((n, 128), 2), torch.randn(n, 128, 1, generator=g)
    assert low < swd(cadd.hinted(denoise, x, z, 1 - time_grid(2), 2, g), draws=1) < high
