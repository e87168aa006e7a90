"""baselines/candi.py against closed forms and enumeration of all texts.

Statistical bounds are 4.5 standard errors, and the seeds are fixed.
"""
import itertools
import os

import pytest
import torch
import torch.nn.functional as F
from helpers import close, generator, make, spy, whole

import model
import train
from baselines import candi
from baselines.candi import CANDI, Config, hinted, sigma
from baselines.exact import R_OF_CANDI
from lib.configurator import configure
from mdlm import alpha, time_grid
from methods import METHODS
from sawtooth import exact_draw, swd

PUBLISHED, WIDE, NO_HINT = (0.05, 0.25), (0.01, 0.49), (0.4998, 0.4999)

# ------------------------------------------------------------------------------------------------------------
# the noise

@pytest.mark.parametrize('t', [0.0, 0.5, 1.0])
def test_r_is_how_often_one_wrong_entry_exceeds_the_right_one(t):
    """Also below sigma = .2, and whatever the number of dimensions."""
    z = sigma(torch.tensor(t), *WIDE)[0] * torch.randn(200_000, 2, generator=generator())
    assert close((z[:, 1] > 1 + z[:, 0]).double(), 0.01 + 0.48 * t)
    ends = sigma(torch.tensor([0.0, 1.0]), *PUBLISHED)[0]
    assert ends.tolist() == pytest.approx([0.4299, 1.0484], abs=1e-4)
    assert float(sigma(torch.tensor(t), 1e-7, 2e-7)[0]) < 0.14


def test_slope_is_the_derivative():
    t = torch.linspace(0.01, 0.99, 50).double()
    high, low = (sigma(t + d, *PUBLISHED)[0] ** -2 for d in (1e-6, -1e-6))
    torch.testing.assert_close(sigma(t, *PUBLISHED)[1], (low - high) / 2e-6, rtol=1e-6, atol=0)


def words_as_axes(V, L, r=PUBLISHED):
    """A method whose y is z itself: the embedding of word i is unit vector i."""
    method = CANDI(Config(V, L, V, 1, 1, 4, r_min=r[0], r_max=r[1]))
    method.embed.weight.data = 3 * F.normalize(torch.cat((torch.eye(V), torch.ones(1, V))))
    return method


def test_what_the_network_sees_in_training():
    """A coin with probability t hides a token, also of two words; its hint is e_x + sigma_t eps."""
    method, b, L = words_as_axes(2, 6), 4000, 6
    x, seen = torch.randint(2, (b, L), generator=generator()), spy(method, 'states')
    with torch.no_grad():
        method(x, whole(b))
    (x_t, y, t), _ = seen[0]
    hidden = x_t == 2
    assert close(hidden.double().mean(dim=1) - t, 0) and torch.equal(x_t[~hidden], x[~hidden])
    eps = ((y - F.one_hot(x, 2)) / sigma(t, *PUBLISHED)[0][:, None, None]).flatten()
    assert close(eps, 0) and close(eps**2, 1) and close(eps[1:] * eps[:-1], 0)


def test_without_hints_it_is_mdlm():
    """Of an embedding with rows of length 1: the same loss if only [mask] is seen of a hint, and no time."""
    method, mdlm = make('candi').train(), make('mdlm').train()
    method.dit.time[0].freqs.zero_()
    mdlm.embed.weight.data = F.normalize(mdlm.embed.weight.data, dim=-1)
    x = torch.randint(9, (16, 12), generator=generator())
    different = method(x, whole(16))[0]
    method.config.mixing = 1.0
    torch.testing.assert_close(method(x, whole(16))[0], mdlm(x, whole(16))[0])
    assert (different - mdlm(x, whole(16))[0]).abs() > 1e-3


def test_r_rises():
    with pytest.raises(ValueError, match='r_min=0.3 must be less than r_max=0.25'):
        CANDI(Config(5, 4, 8, 1, 1, 4, r_min=0.3))


# ------------------------------------------------------------------------------------------------------------
# exact denoisers

class Toy:
    """Texts of two words out of two, and the exact p(x_l | tokens and hints)."""
    V, texts, p = 2, torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]), torch.tensor([0.45, 0.1, 0.05, 0.4])

    def __init__(self, r=PUBLISHED):
        self.r, self.hot = r, F.one_hot(self.texts, self.V).float()                    # (4, 2, 2)

    def posterior(self, x_t, z, t):
        """x_t (n, 2), z (n, 2, 2), t (n,) -> p(x_l | both) (n, 2, 2)."""
        masked = (x_t == self.V)[..., None]
        evidence = torch.where(masked, z / sigma(t, *self.r)[0].float()[:, None, None] ** 2,
                               60.0 * F.one_hot(x_t, self.V + 1)[..., :-1])
        joint = self.p.log() + torch.einsum('nlv,xlv->nx', evidence, self.hot)
        return torch.einsum('nx,xlv->nlv', joint.softmax(dim=1), self.hot)

    def method(self):
        method = words_as_axes(self.V, 2, self.r)
        method.head = torch.nn.Identity()
        method.head.out_features, method.head.weight = self.V, torch.zeros(1)
        method.states = lambda x_t, y, t: self.posterior(x_t, y, t.expand(len(y))).clamp(min=1e-30).log()
        return method

    def draw(self, n):
        """-> texts (n, 2), and their log p."""
        i = torch.multinomial(self.p, n, replacement=True, generator=generator(5))
        return self.texts[i], self.p[i].log()

    def distance(self, x):
        counts = (x[:, 0] * 2 + x[:, 1]).bincount(minlength=4)
        return float((counts / len(x) - self.p).abs().sum()) / 2


@pytest.mark.parametrize('r, prior', [(PUBLISHED, 0.455), (WIDE, 0.0007), (NO_HINT, 0.0)])
def test_bound_of_the_exact_denoiser_is_the_entropy(r, prior):
    """Plus what it costs to start from N(0, sigma_1^2), where the hints of texts are a mixture."""
    toy, n, sigma_1 = Toy(r), 2**16, float(sigma(torch.tensor(1.0), *r)[0])
    assert 1 / (2 * sigma_1**2) == pytest.approx(prior, abs=5e-4)
    x, log_p = toy.draw(n)
    z = F.one_hot(x, 2) + sigma_1 * torch.randn(n, 2, 2, generator=generator())
    squares = (z[:, None] - toy.hot).square().sum(dim=(2, 3))                          # (n, 4)
    mixture = (toy.p.log() - squares / (2 * sigma_1**2)).logsumexp(dim=1)
    kl = mixture + z.square().sum(dim=(1, 2)) / (2 * sigma_1**2)
    nats = toy.method().nll(x, whole(n)) + log_p  # less the text's own: a smaller error
    assert close(nats - kl, 0) and float((nats - kl).std()) / n**0.5 < 0.02


@pytest.mark.parametrize('r, loss', [(PUBLISHED, 0.443), (NO_HINT, 1.106)])
def test_the_loss_alone_is_no_bound(r, loss, monkeypatch):
    """.443 where the entropy is 1.106, with the published noise: hints are not paid for."""
    toy, n = Toy(r), 2**14
    x, log_p = toy.draw(n)
    assert float(-log_p.mean()) == pytest.approx(1.106, abs=0.02)
    monkeypatch.setattr(candi, 'squared_error', lambda head, h, targets: torch.zeros(len(targets)))
    prior = 2 / (2 * sigma(torch.tensor(1.0), *r)[0] ** 2)
    assert close(toy.method().nll(x, whole(n)) - prior, loss)


def test_one_step_after_the_other():
    """With the truth as the denoiser: at each call hints have the noise of the time that it is told, a share
    t is masked, and no [mask] is left."""
    steps, n, L, V = 5, 2000, 8, 2
    x, ts = torch.randint(V, (n, L), generator=generator()), time_grid(steps)
    sigmas, told, e = sigma(ts, *WIDE)[0], [], F.one_hot(x, V).float()

    def denoise(x_t, y, t):
        told.append(float(t))
        assert close(((y - e) / sigma(t, *WIDE)[0]).flatten() ** 2, 1)
        hidden = x_t == V
        assert torch.equal(x_t[~hidden], x[~hidden])
        assert t == 1 and hidden.all() or close(hidden.double().flatten(), float(t))
        return x, e
    y = e + sigmas[0].float() * torch.randn(n, L, V, generator=generator())
    out = hinted(denoise, torch.full((n, L), V), y, ts, alpha(ts), sigmas, V, generator())
    assert told == pytest.approx([1, 0.8, 0.6, 0.4, 0.2]) and torch.equal(out, x)


@pytest.mark.parametrize('sampler', CANDI.samplers)
def test_the_sampler_finds_the_law_of_two_tokens(sampler):
    """As far as its start allows: N(0, sigma_1^2) is nearly right for wide noise only."""
    def distance(r, steps):
        return Toy(r).distance(Toy(r).method().sample(10_000, steps, sampler=sampler, generator=generator()))
    wide = [distance(WIDE, steps) for steps in (1, 4, 16, 32)]
    assert wide == sorted(wide, reverse=True) and wide[2] < 0.03 and wide[3] < 0.015
    assert 0.012 < distance(PUBLISHED, 64) < 0.03


def test_from_the_right_start_the_sampler_finds_the_law():
    """Also with the published noise, if hints begin as those of texts do."""
    toy, n, ts = Toy(), 20_000, time_grid(64)
    method, sigmas = toy.method(), sigma(ts, *PUBLISHED)[0]
    y = F.one_hot(toy.draw(n)[0], 2) + sigmas[0].float() * torch.randn(n, 2, 2, generator=generator())

    def denoise(x, y, t):
        return method.denoise(x, y, t, 'drawn', 1.0, 1.0, generator())
    x = hinted(denoise, torch.full((n, 2), 2), y, ts, alpha(ts), sigmas, 2, generator())
    assert toy.distance(x) < 0.01


def test_a_step_in_sigma_is_better_than_one_in_its_square(monkeypatch):
    """Which is the paper's eq. (14): 16 steps through wide noise."""
    def squares(denoise, x, y, ts, alphas, sigmas, *others):
        factors = (1 + (sigmas[1:] / sigmas[:-1]).square()) / 2
        return hinted(denoise, x, y, ts, alphas, torch.cat((torch.ones(1), factors.cumprod(dim=0))), *others)

    def distance():
        return Toy(WIDE).distance(Toy(WIDE).method().sample(10_000, 16, generator=generator()))
    assert distance() < 0.03
    monkeypatch.setattr(candi, 'hinted', squares)
    assert distance() > 0.08


def test_two_words_of_which_one_is_given():
    """The other follows its conditional law."""
    toy, n = Toy(r=WIDE), 20_000
    x = toy.method().sample(n, 16, x=torch.tensor([[1, 2]]).expand(n, 2), generator=generator())
    assert (x[:, 0] == 1).all()
    assert float(x[:, 1].float().mean()) == pytest.approx(float(toy.p[3] / (toy.p[2] + toy.p[3])), abs=0.02)


def test_hints_move_towards_what_is_drawn_or_its_mean(monkeypatch):
    """At the masked positions, however their logits are cut; the rest stays."""
    method, x, y = make('candi'), torch.randint(10, (6, 12), generator=generator()), torch.randn(6, 12, 16)
    x[:, ::2] = method.mask_id
    masked, E = x == method.mask_id, F.normalize(method.embed.weight[:-1], dim=-1)
    with torch.no_grad():
        p = method.head(method.states(x, y, torch.tensor([0.4]))).softmax(dim=-1)
        for rows, sampler in itertools.product((10**6, 5), method.samplers):
            monkeypatch.setattr(model, 'rows_at_once', lambda V, device, rows=rows: rows)
            tokens, e = method.denoise(x, y, 0.4, sampler, 1.0, 1.0, generator())
            assert torch.equal(tokens[~masked], x[~masked]) and torch.equal(e[~masked], y[~masked])
            expected = E[tokens[masked]] if sampler == 'drawn' else (p @ E)[masked]
            torch.testing.assert_close(e[masked], expected)
            likeliest, _ = method.denoise(x, y, 0.4, sampler, 0.0, 1.0, generator())
            assert torch.equal(likeliest[masked], p.argmax(dim=-1)[masked])


def test_one_step_on_sawtooth_is_better_than_mdlm():
    """Its tokens share the noise that they start from. .0495 for exact MDLM, .0059 for data, at N = 20,480;
    .0117 +- .0006 at this N."""
    assert 0.02 < swd(exact_draw('CANDI', 5120, 1), draws=1) < 0.04


def test_the_exact_curve_has_the_range_of_the_config():
    c = configure(train.Config, [os.path.join(os.path.dirname(train.__file__), 'config/sawtooth_candi.py')],
                  METHODS)
    assert (c['r_min'], c['r_max']) == R_OF_CANDI
