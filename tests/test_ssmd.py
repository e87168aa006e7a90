"""baselines/ssmd.py against the law of its sampler, by enumeration of all texts.

Statistical bounds are 4.5 standard errors, and the seeds are fixed.
"""
import itertools

import pytest
import torch
from helpers import chi_square, close, generator, make, spy, whole

from baselines.ssmd import AHEAD, SSMD, along, masked_after, speculate
from sawtooth import Exact, exact_draw

V, L = 3, 3
TEXTS = torch.tensor(list(itertools.product(range(V), repeat=L)))
ORDERS = [torch.tensor(order) for order in itertools.permutations(range(L))]


def tiny():
    """Draft and target are far from each other, and from what they are with other tokens visible."""
    method = make('ssmd', vocab_size=V, block_size=L)
    with torch.no_grad():
        method.head.weight.mul_(0.5)
    return method


def index(x):
    return (x * V ** torch.arange(L).flip(0)).sum(dim=1)


def networks(method, order):
    """p_i and q_i at the tokens of all texts along an order, fp64 (texts, i, d); 1 at the visible tokens."""
    order = order.expand(len(TEXTS), L)
    y, p, q = TEXTS.gather(1, order), [], []
    for i in range(L):
        h = along(method.backbone(masked_after(y, torch.full((len(y),), i), order, V)), order)
        for states, found in ((h, p), (method.causal(y, h, order), q)):
            probs = method.head(states).double().softmax(dim=-1).gather(2, y[..., None])[..., 0]
            found.append(probs.where(torch.arange(L) >= i, 1))
    return torch.stack(p, dim=1).detach(), torch.stack(q, dim=1).detach()


def law(p, q):
    """F_0 of the header, (texts,)."""
    both, residual = torch.minimum(p, q), (q - p).clamp(min=0)
    F = [None] * L + [torch.ones(len(p)).double()]
    for i in reversed(range(L)):
        F[i] = both[:, i].prod(dim=1)
        for d in range(i, L):
            F[i] = F[i] + both[:, i, i:d].prod(dim=1) * residual[:, i, d] * F[d + 1]
    return F[0]


# ------------------------------------------------------------------------------------------------------------
# the law

def test_the_law_sums_to_one_and_is_no_product_of_targets():
    method = tiny()
    for order in ORDERS:
        p, q = networks(method, order)
        F = law(p, q)
        assert float(F.sum()) == pytest.approx(1, abs=1e-6)
        for targets in (q[:, 0].prod(dim=1), q.diagonal(dim1=1, dim2=2).prod(dim=1)):
            assert float(targets.sum()) == pytest.approx(1, abs=1e-6)
            assert float((F - targets).abs().sum()) / 2 > 0.02


def draws(method, order, n=20_000, **options):
    """How often the sampler draws each text along an order, and the calls of the backbone for each draw."""
    calls, order = spy(method, 'backbone'), order.expand(n, L)

    def probs(states):
        yield slice(None), method.head(states).double().softmax(dim=-1)
    with torch.no_grad():
        x = speculate(method.backbone, method.causal, probs, torch.full((n, L), V), order, V,
                      generator=generator(), **options)
    return index(x).bincount(minlength=V**L), sum(len(args[0]) for args, _ in calls) / n


@pytest.mark.parametrize('order', [ORDERS[0], ORDERS[3]], ids=str)
def test_samples_follow_the_law(order):
    counts, calls = draws(tiny(), order)
    p, q = networks(tiny(), order)
    assert chi_square(counts, law(p, q)) < 4.5
    assert 1.2 < calls < 3


def test_one_draft_verified_until_done_has_the_law_of_the_targets():
    """Then the tokens are those of a little autoregressive model, with one call or several, and however many
    places a pass sees."""
    _, q = networks(tiny(), ORDERS[3])
    by_steps = {1: q[:, 0].prod(dim=1), 3: q.diagonal(dim1=1, dim2=2).prod(dim=1),
                2: q[:, 0, :2].prod(dim=1) * q[:, 2, 2]}  # two places, then the last one
    for options, expected in ((dict(steps=1), 1), (dict(steps=1, ahead=1), 1), (dict(steps=1, ahead=2), 1),
                              (dict(steps=2), 2), (dict(steps=3), 3), (dict(verifications=L), 1)):
        counts, calls = draws(tiny(), ORDERS[3], **options)
        assert chi_square(counts, by_steps[expected]) < 4.5 and calls == expected


def test_the_bound_is_of_the_law():
    """exp(-nats), mean over orders and walks, is p(x): so nats are on average no less than -log p(x)."""
    method, n = tiny(), 20_000
    p = torch.stack([law(*networks(method, order)) for order in ORDERS]).mean(dim=0)
    for text in (0, 5, 22):
        nats = method.nll_parts(TEXTS[text].expand(n, L), whole(n))['val'].detach().double()
        assert close((-nats).exp(), float(p[text])) and nats.mean() > -p[text].log()


# ------------------------------------------------------------------------------------------------------------
# exact networks

class Toy:
    """A law of all texts, and its exact draft and target, as log-probabilities (n, L, V)."""
    head, p = torch.nn.Identity(), torch.randn(V**L, generator=generator(3)).mul(1.5).double().softmax(dim=0)

    def given(self, x):
        """log p(x_l | visible tokens of x (n, L)) at every place."""
        fits = ((x[:, None] == TEXTS) | (x[:, None] == V)).all(dim=2) * self.p                  # (n, texts)
        sums = torch.stack([fits @ (TEXTS == v).double() for v in range(V)], dim=2)
        return (sums / sums.sum(dim=2, keepdim=True)).log()

    backbone = given

    def causal(self, y, h, order, a=0, cache=None):
        rows = []
        for d in range(a, y.shape[1]):
            x_t = torch.full((len(y), L), V).scatter_(1, order[:, :d], y[:, :d])
            rows.append(self.given(x_t)[torch.arange(len(y)), order[:, d]])
        return torch.stack(rows, dim=1)


def test_exact_networks_have_the_law_of_the_data():
    """Whatever the order; and every walk of the bound gives -log p(x) itself."""
    toy, method = Toy(), tiny()
    for order in ORDERS:
        torch.testing.assert_close(law(*networks(toy, order)), toy.p, rtol=0, atol=1e-15)
    counts, calls = draws(toy, ORDERS[4])
    assert chi_square(counts, toy.p) < 4.5 and 1.1 < calls < 3
    method.backbone, method.causal = lambda x: toy.given(x).float(), toy.causal
    method.head = torch.nn.Identity()
    method.head.out_features = V
    torch.testing.assert_close(method.nll(TEXTS).double(), -toy.p.log(), rtol=0, atol=1e-5)


def test_a_target_that_is_the_draft_needs_one_call():
    method = tiny()
    method.causal = lambda y, h, order, a, cache: h[:, a:]
    assert draws(method, ORDERS[1], n=500)[1] == 1


def test_exact_networks_on_sawtooth(monkeypatch):
    """5.22 calls for each text on average, and texts that are as probable as the data: .5303 nats per token,
    where those of exact MDLM in 8 calls have .56."""
    monkeypatch.setattr(Exact, 'denoise', Exact.denoise)  # restored after the test
    n, calls = 1024, spy(Exact, 'denoise')
    x = exact_draw('SSMD, speculative', n, None)
    assert abs(sum(len(args[1]) for args, _ in calls) / n - 5.22) < 4.5 * 1.5 / n**0.5
    assert close(Exact().nll(x) / 128, 0.5303)


def test_one_draft_on_sawtooth(monkeypatch):
    """36.0 passes of the causal block for each text on average, and seven that only fill the cache."""
    monkeypatch.setattr(Exact, 'after', Exact.after)  # restored after the test
    n, passes = 256, spy(Exact, 'after')
    exact_draw('SSMD', n, 1)
    only_fill = 128 // AHEAD - 1
    assert abs(sum(len(args[1]) for args, _ in passes) / n - only_fill - 36.0) < 4.5 * 6 / n**0.5


# ------------------------------------------------------------------------------------------------------------
# the network

def test_the_causal_block_is_causal_along_the_order():
    """A token changes the states of what comes after it in the order, and not its own."""
    method, order = make('ssmd'), torch.rand(4, 12, generator=generator()).argsort(dim=1)
    y, h = torch.randint(9, (4, 12), generator=generator()), torch.randn(4, 12, 16, generator=generator())
    before = method.causal(y, h, order)
    for d in range(12):
        changed = y.clone()
        changed[:, d] = (y[:, d] + 1) % 9
        differs = (method.causal(changed, h, order) != before).any(dim=2)
        assert not differs[:, :d + 1].any() and differs[:, d + 1:].all()


def test_the_cache_of_the_causal_block_changes_nothing():
    """The first place alone, then three, and the rest at once."""
    method, order = make('ssmd'), torch.rand(4, 12, generator=generator()).argsort(dim=1)
    y, h = torch.randint(9, (4, 12), generator=generator()), torch.randn(4, 12, 16, generator=generator())
    states, cache = [], []
    for a, b in ((0, 1), (1, 4), (4, 12)):
        states.append(method.causal(y[:, :b], h[:, :b], order[:, :b], a, cache))
    torch.testing.assert_close(torch.cat(states, dim=1), method.causal(y, h, order), rtol=0, atol=1e-5)


def test_the_distance_of_what_is_read_matters():
    """From the place that is predicted: a place of its own for the last one changes its states and no others,
    and places that are all moved change none."""
    method, g = make('ssmd', block_size=20), generator()
    h, order = torch.randn(1, 12, 16, generator=g), torch.randperm(12, generator=g)[None]
    y = torch.randint(9, (1, 12), generator=g)
    states, elsewhere = method.causal(y, h, order), order.clone()
    elsewhere[:, -1] = 15
    differs = (method.causal(y, h, elsewhere) - states).abs().amax(dim=2)[0] > 1e-5
    assert differs.tolist() == [False] * 11 + [True]
    torch.testing.assert_close(method.causal(y, h, order + 7), states, rtol=0, atol=1e-5)


@pytest.mark.parametrize('weighting', ['elbo', 'constant'])
def test_the_loss_is_that_of_both_predictions(weighting):
    """By hand: the draft's is MDLM's; the target reads clean tokens, and the states of the noisy text."""
    method, b = make('ssmd', weighting=weighting), 8
    x, noise = torch.randint(9, (b, 12), generator=generator()), whole(b)
    loss, logs = method(x, noise)
    assert logs['draft'] == pytest.approx(super(SSMD, method).forward(x, noise)[0].item(), rel=1e-5)
    t = 1e-4 + (1 - 1e-4) * noise.times('t_x', shuffled=False)
    x_t, mask = method.corrupt(x, t, noise)
    order = (noise.uniform('order', 12) + 2 * mask).argsort(dim=1)
    assert (mask.gather(1, order).int().diff(dim=1) >= 0).all()
    h = along(method.backbone(x_t), order)
    log_q = method.head(method.causal(x.gather(1, order), h, order)).log_softmax(dim=-1)
    log_q = log_q.gather(2, x.gather(1, order)[..., None])[..., 0] * mask.gather(1, order)
    weight = 1 / t if weighting == 'elbo' else torch.ones(b)
    target = -(weight[:, None] * log_q).sum() / x.numel()
    assert logs['target'] == pytest.approx(target.item(), rel=1e-5)
    assert loss.item() == pytest.approx(float(logs['draft'] + logs['target']))


# ------------------------------------------------------------------------------------------------------------
# sampling

@pytest.mark.parametrize('sampler', SSMD.samplers)
def test_prompts_stay_and_every_gap_is_filled(sampler):
    """Rows with different numbers of gaps, and one without any."""
    method = make('ssmd')
    x = torch.randint(9, (6, 12), generator=generator())
    start = x.masked_fill(torch.arange(12) < 3 * torch.arange(5).repeat(2)[:6, None], method.mask_id)
    for steps in (1, 3, 40):
        filled = method.sample(6, steps, sampler=sampler, x=start, generator=generator())
        assert torch.equal(filled[start < 10], x[start < 10]) and filled.max() < 10
    assert torch.equal(method.sample(6, 2, sampler=sampler, x=x), x)


def test_windows_are_equal_parts():
    """Each call of the backbone fills one, however many passes of the block it takes."""
    method, seen = make('ssmd'), []
    calls, passes = spy(method, 'backbone'), spy(method, 'causal')
    method.sample(4, 5, generator=generator(), callback=lambda i, x, z: seen.append(x != method.mask_id))
    assert torch.stack(seen).sum(dim=2).tolist() == [[n] * 4 for n in (3, 5, 8, 10, 12)]
    taken_in = 4  # the calls after the first take what is filled into the cache
    assert len(calls) == 5 < len(passes) - taken_in <= 12


def test_a_pass_of_the_causal_block_sees_few_places():
    """What comes after the first refusal is computed in vain, and what is filled is in the cache."""
    method = make('ssmd', block_size=40)
    passes = spy(method, 'causal')
    method.sample(4, 1, generator=generator())
    assert max(y.shape[1] - a for (y, h, order, a, cache), _ in passes) == AHEAD < 40 - AHEAD


def test_likeliest_tokens():
    """Without temperature the target's likeliest token stays, or replaces the draft's."""
    method = make('ssmd')
    x = method.sample(3, 1, temperature=0, generator=generator())
    order = torch.rand(3, 12, generator=generator()).argsort(dim=1)  # the first that it draws
    y, h = x.gather(1, order), along(method.backbone(method.all_masked(3)), order)
    assert torch.equal(method.head(method.causal(y, h, order)).argmax(dim=-1), y)
