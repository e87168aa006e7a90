"""ladd.py against closed forms, plain loops, enumeration, and what each stage may and may not move.

Statistical bounds are 4.5 standard errors (two-sided chance of failure 7e-6 each, and the seeds are fixed).
"""
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import chi_square, close, generator, scrambled, spy, whole

from ladd import (
    LADD,
    Config,
    Quantizer,
    abar,
    code_step,
    ddim_step,
    joint,
    latent_chain,
    latents_at,
    log_snr,
    time_at,
)
from mdlm import alpha, reveal_tokens

SCHEDULES = 'vp_linear', 'vp_cosine', 'vp_sqrt'
LATENTS = 'continuous', 'discrete'
V, L = 4, 6
TINY = dict(vocab_size=V, block_size=L, hidden=16, num_layers=1, num_heads=2, cond_dim=8, num_latents=2,
            latent_dim=4)
FINITE = torch.tensor(True)


def make(latent='continuous', seed=0, **keys):
    """A small LADD whose weights have left the initialisation; quantizer as built."""
    own = dict(codebook_size=5, latent_schedule='linear') if latent == 'discrete' else {}
    own |= {} if 'encoder' in keys else dict(encoder_layers=1)
    return scrambled(LADD(Config(**{**TINY, 'latent': latent, **own, **keys})), seed)


def texts(n, seed=0):
    return torch.randint(V, (n, L), generator=generator(seed))


def draw_rows(n):
    return (texts(n),)


# ------------------------------------------------------------------------------------------------------------
# the Gaussian channel

@pytest.mark.parametrize('schedule, square', [
    ('vp_linear', lambda t: 1 - t), ('vp_cosine', lambda t: math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2),
    ('vp_sqrt', lambda t: math.sqrt(1 - t))])
def test_abar_is_its_wrapped_closed_form(schedule, square):
    for t in (0.0, 0.1, 0.5, 0.9, 1.0):
        level = float(abar(torch.tensor(t, dtype=torch.float64), schedule))
        assert level == pytest.approx(math.sqrt((1 - 2e-4) * square(t) + 1e-4), rel=1e-9)
    assert float(abar(torch.tensor(1.0), schedule)) == pytest.approx(0.01, rel=1e-4)
    assert (abar(torch.linspace(0, 1, 100), schedule).diff() < 0).all()


@pytest.mark.parametrize('wrong', [
    dict(latent_schedule='linear'), dict(latent='discrete', latent_schedule='vp_sqrt'), dict(latent='both'),
    dict(times='equal')])
def test_unknown_latent_choices_are_refused(wrong):
    with pytest.raises(ValueError, match=f'{[*wrong][-1]} is one of .* not {[*wrong.values()][-1]!r}'):
        make(**wrong)


@pytest.mark.parametrize('schedule', SCHEDULES)
@pytest.mark.parametrize('grid', [[1, 0], [1, 0.5, 0], [1, 0.9, 0.89, 0.2, 1e-3, 0], [0.6, 0.3, 0]])
def test_ddim_with_the_exact_latent_lands_on_it(schedule, grid):
    """On the way it keeps its noise: z_s = abar_s z_0 + sqrt(1 - abar_s^2) eps with the eps of the start."""
    torch.manual_seed(0)
    z_0, eps = torch.randn(3, 2, 4).double(), torch.randn(3, 2, 4).double()
    grid = torch.tensor(grid).double()
    noised = [abar(t, schedule) * z_0 + (1 - abar(t, schedule) ** 2).sqrt() * eps for t in grid]
    z = noised[0]
    for t, s, expected in zip(grid[:-1], grid[1:], noised[1:]):
        z = ddim_step(z, z_0, t, s, schedule)
        torch.testing.assert_close(z, expected if s > 0 else z_0, rtol=0, atol=1e-10)


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_ddim_for_gaussian_data(schedule):
    """For z_0 ~ N(0, v) the exact denoiser is linear, and so is the sampler.

    Its limit maps N(0, 1) to N(0, v).
    """
    v, z_1 = 0.3, torch.tensor([[1.0], [-2.0]]).double()

    def level(t):
        return float(abar(torch.tensor(t, dtype=torch.float64), schedule))

    def slope(a):  # E[z_0 | z_t] = slope z_t
        return a * v / (a * a * v + 1 - a * a)

    def sample(steps):
        return latent_chain(lambda z, t: slope(level(float(t))) * z, z_1, steps,
                            lambda z, p, t, s: ddim_step(z, p, t, s, schedule))
    factor = 1.0
    for i in range(7):
        a_t, a_s = level(1 - i / 7), level(1 - (i + 1) / 7)
        kept = math.sqrt((1 - a_s**2) / (1 - a_t**2)) * (1 - a_t * slope(a_t))
        factor *= slope(a_t) if i == 6 else a_s * slope(a_t) + kept
    torch.testing.assert_close(sample(7), factor * z_1, rtol=1e-9, atol=0)
    torch.testing.assert_close(sample(3000), math.sqrt(v) * z_1, rtol=0.02, atol=0)


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_latent_noise_has_its_law(schedule):
    """z_t - abar_t z_0 is Gaussian of variance 1 - abar_t^2, abar^2 + variance = 1."""
    model = make(latent_schedule=schedule)
    z_0 = torch.ones(20000, 2, 4)
    for t in (0.05, 0.5, 0.95):
        a = float(abar(torch.tensor(t), schedule))
        noise = model.channel.corrupt(z_0, torch.full((20000,), t), whole(20000)) - a * z_0
        n, var = noise.numel(), 1 - a * a
        assert abs(noise.mean()) < 4.5 * (var / n) ** 0.5
        assert abs(noise.var() - var) < 4.5 * var * (2 / n) ** 0.5


# ------------------------------------------------------------------------------------------------------------
# the code channel

@pytest.mark.parametrize('schedule', ['linear', 'polynomial'])
def test_code_step_has_its_law(schedule):
    """From [mask], revealed at rate (alpha_s - alpha_t) / (1 - alpha_t) with the denoiser's law.

    Codes never change; the last step reveals all.
    """
    n, logits = 20000, torch.tensor([0.0, 1.0, 2.0])
    z_t = torch.tensor([3, 1]).repeat(n, 1)
    t, s = torch.tensor(0.8).double(), torch.tensor(0.5).double()
    a_t, a_s = float(alpha(t, schedule)), float(alpha(s, schedule))
    z_s = code_step(z_t, logits.expand(n, 2, 3), t, s, schedule, generator())
    p = (a_s - a_t) / (1 - a_t)
    assert (z_s[:, 1] == 1).all()
    assert abs((z_s[:, 0] != 3).sum() - n * p) < 4.5 * (n * p * (1 - p)) ** 0.5
    z_0 = code_step(z_s, logits.expand(n, 2, 3), s, torch.tensor(0.0).double(), schedule, generator(1))
    assert torch.equal(z_0[z_s != 3], z_s[z_s != 3])
    assert chi_square(z_0[:, 0].bincount(minlength=3), logits.exp()) < 4.5


def test_codes_are_masked_at_rate_one_minus_alpha():
    model, codes = make('discrete'), torch.randint(5, (10000, 2), generator=generator())
    z_t = model.channel.corrupt(codes, torch.full((10000,), 0.3), whole(10000))
    assert torch.equal(z_t[z_t != 5], codes[z_t != 5])
    assert abs((z_t == 5).sum() - 20000 * 0.3) < 4.5 * (20000 * 0.21) ** 0.5


def test_vectors_of_codes_and_of_the_mask():
    channel = make('discrete').channel
    codebook = channel.quantizer.codebook
    expected = torch.stack((torch.stack((codebook[0], channel.z_mask)), codebook[[4, 2]]))
    torch.testing.assert_close(channel.seen(torch.tensor([[0, 5], [4, 2]])), expected)


def test_a_channel_noises_a_training_batch():
    """What Vectors and Codes give forward: the network's input, the target, and where it counts."""
    t, e = torch.rand(64, generator=generator()), unit(64, 2, 4)
    vectors = make().channel
    noised = vectors.noised(e, t, whole(64), learning=False)
    assert torch.equal(noised.z_t, vectors.corrupt(e, t, whole(64))) and torch.equal(noised.target, e)
    assert noised.scored.all() and noised.vq_loss == 0
    codes = make('discrete').channel
    noised = codes.noised(e, t, whole(64), learning=False)
    masked = codes.corrupt(noised.target, t, whole(64))
    assert torch.equal(noised.target, codes.quantizer.nearest(e)) and torch.equal(noised.scored, masked == 5)
    torch.testing.assert_close(noised.z_t, codes.seen(masked))
    assert codes.quantizer.met == [] and noised.vq_loss > 0


# ------------------------------------------------------------------------------------------------------------
# the quantizer

def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=generator(seed)), dim=-1)


class PlainQuantizer:
    """The same in loops over single vectors, double precision."""

    def __init__(self, q):
        self.codebook = [c.double() for c in q.codebook.clone()]
        self.counts, self.sums = [2.0] * len(self.codebook), [2.0 * c for c in self.codebook]

    def __call__(self, e, noise):
        """The outputs, and after them the update."""
        K = len(self.codebook)
        vectors = [v.double() for v in e.flatten(0, 1)]
        codes = [max(range(K), key=lambda k: float(v @ self.codebook[k])) for v in vectors]
        quantised = [self.codebook[k] for k in codes]
        errors = [float(((v - q) ** 2).mean()) for v, q in zip(vectors, quantised)]
        replacement = noise.permutation('revive', max(len(vectors), K)).tolist()
        for k in range(K):
            mine = [v for v, code in zip(vectors, codes) if code == k]
            self.counts[k] = 0.95 * self.counts[k] + 0.05 * len(mine)
            self.sums[k] = 0.95 * self.sums[k] + 0.05 * sum(mine, torch.zeros(e.shape[-1]).double())
            if self.counts[k] < 2:
                self.counts[k], self.sums[k] = 2.0, 2.0 * vectors[replacement[k] % len(vectors)]
        self.codebook = [s / s.norm() for s in self.sums]
        return quantised, codes, 0.1 * sum(errors) / len(errors)


@pytest.mark.parametrize('size, b', [(6, 16), (12, 3)],
                         ids=['more vectors than codes', 'more codes than vectors'])
def test_quantizer_is_its_plain_definition(size, b):
    """Codes, outputs, loss and all state over 30 updates, in which codes live and die."""
    torch.manual_seed(0)
    q = Quantizer(size, 4)
    plain, revived = PlainQuantizer(q), 0
    for step in range(30):
        noise, around = whole(b, step=step), torch.tensor([1.0, 0.5, 0, 0])
        e = F.normalize(torch.randn(b, 2, 4, generator=generator(step)) + around, dim=-1)
        straight, codes, loss = q(e, learning=True)
        q.learn(FINITE, noise)
        expected, expected_codes, expected_loss = plain(e, noise)
        assert codes.shape == (b, 2) and codes.flatten().tolist() == expected_codes
        torch.testing.assert_close(straight.flatten(0, 1).double(), torch.stack(expected), rtol=0, atol=1e-5)
        assert float(loss) == pytest.approx(expected_loss, rel=1e-4)
        expected = dict(counts=torch.tensor(plain.counts).double(), sums=torch.stack(plain.sums),
                        codebook=torch.stack(plain.codebook))
        for name, buffer in q.named_buffers():
            torch.testing.assert_close(buffer.double(), expected[name], rtol=1e-4, atol=1e-5)
        revived += plain.counts.count(2.0)
    assert 0 < revived < 30 * size


def test_micro_batches_move_the_codebook_once():
    """In three parts or at once: the same codes, and the same codebook at the end of the step, not before."""
    e = unit(6, 4, 4)
    at_once, q, noise = Quantizer(16, 4), Quantizer(16, 4), whole(6)
    q.load_state_dict(at_once.state_dict())
    before, codes = q.codebook.clone(), at_once(e, learning=True)[1]
    at_once.learn(FINITE, noise)
    for i in (0, 1, 2):
        assert torch.equal(q(e[i::3], learning=True)[1], codes[i::3])
        assert torch.equal(q.codebook, before)
    q.learn(FINITE, noise)
    assert torch.equal(q.codebook, at_once.codebook) and not torch.equal(q.codebook, before) and q.met == []


def test_codebook_rests_unless_it_learns():
    """Also at the end of a step in which it has met nothing."""
    q = Quantizer(6, 4)
    before = {k: v.clone() for k, v in q.state_dict().items()}
    q(unit(16, 2, 4))
    q.learn(FINITE, whole(16))
    assert all(torch.equal(v, before[k]) for k, v in q.state_dict().items())


def test_straight_through_gradient_is_the_identity():
    """What flows into the quantised vector flows into e unchanged.

    The commitment loss adds 2 * .1 (e - codebook) / numel.
    """
    torch.manual_seed(0)
    q, e, g = Quantizer(6, 4), unit(3, 2, 4).requires_grad_(), torch.randn(3, 2, 4)
    straight, codes, loss = q(e)
    torch.testing.assert_close(straight, q.codebook[codes])
    torch.testing.assert_close(torch.autograd.grad((straight * g).sum(), e, retain_graph=True)[0], g)
    expected = 0.2 * (e - q.codebook[codes]).detach() / e.numel()
    torch.testing.assert_close(torch.autograd.grad(loss, e)[0], expected)


def test_codebook_survives_a_dead_code_storm():
    """Identical inputs for 100 steps kill every code but one; varied ones bring the codebook back."""
    torch.manual_seed(0)
    q, one = Quantizer(16, 4), unit(1, 1, 4)

    def step(e, number):
        q(e, learning=True)
        q.learn(FINITE, whole(64, step=number))
    for number in range(100):
        step(one.expand(64, 1, 4), number)
    assert (q.codebook @ one[0, 0] > 0.999).all()
    for number in range(100, 300):
        step(unit(64, 1, 4, seed=number), number)
    assert all(v.isfinite().all() for v in q.state_dict().values())
    torch.testing.assert_close(q.codebook.norm(dim=1), torch.ones(16))
    assert q.perplexity() > 12 and len(q.nearest(unit(1000, 4, seed=9)).unique()) > 12


def test_many_vectors_at_a_time_or_few():
    """How many vectors are compared at a time changes no code, and sums only in their last bits."""
    def fit(at_once):
        torch.manual_seed(0)
        q = Quantizer(16, 4)
        q.at_once = at_once
        q.kmeans(unit(500, 4), 100, whole(50))
        straight, codes, _ = q(unit(30, 2, 4, seed=1), learning=True)
        q.learn(FINITE, whole(30))
        return q, straight, codes
    (many, straight, codes), (few, straight_few, codes_few) = fit(4096), fit(7)
    assert torch.equal(codes, codes_few) and codes.shape == (30, 2)
    torch.testing.assert_close(straight, straight_few)
    for a, b in zip(many.state_dict().values(), few.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_usage_is_the_share_of_codes_above_the_threshold():
    q = Quantizer(8, 4)
    assert float(q.usage()) == 0
    q.counts[:3] = 2.5
    assert float(q.usage()) == 3 / 8


def test_perplexity_counts_the_codes_in_use():
    q = Quantizer(8, 4)
    q.counts[:] = torch.tensor([3.0, 3, 3, 3, 0, 0, 0, 0])
    assert float(q.perplexity()) == pytest.approx(4)
    q.counts[:] = torch.tensor([1.0, 3, 0, 0, 0, 0, 0, 0])
    expected = math.exp(0.25 * math.log(4) + 0.75 * math.log(4 / 3))
    assert float(q.perplexity()) == pytest.approx(expected)


def test_kmeans_improves_and_repeats():
    """Every round brings vectors nearer to their codes, and the same noise gives the same codebook."""
    e = unit(500, 4)

    def fit(iterations):
        q = Quantizer(16, 4)
        q.kmeans(e, 100, whole(50), iterations)
        return q
    cosine = [float((e * q.codebook[q.nearest(e)]).sum(-1).mean()) for q in map(fit, (1, 2, 5, 10, 20))]
    assert all(b >= a - 1e-6 for a, b in itertools.pairwise(cosine)) and cosine[3] > cosine[0] + 0.005
    twice = zip(fit(10).state_dict().values(), fit(10).state_dict().values())
    assert all(torch.equal(a, b) for a, b in twice)
    q = fit(10)
    torch.testing.assert_close(q.counts.sum(), torch.tensor(100.0))  # in units of a training batch
    torch.testing.assert_close(q.sums.sum(0), e.sum(0) * 100 / 500)
    torch.testing.assert_close(q.codebook[q.counts > 0], F.normalize(q.sums[q.counts > 0], dim=-1))


# ------------------------------------------------------------------------------------------------------------
# the two times

def times_of(model, steps, b=16):
    """t_x and t_z of `steps` training steps, as the two corruptions saw them: (steps, b) each."""
    token_calls, latent_calls = spy(model, 'corrupt'), spy(model.channel, 'corrupt')
    with torch.no_grad():
        for step in range(steps):
            model(texts(b), whole(b, step=step))
    return (torch.stack([args[1] for args, _ in calls]) for calls in (token_calls, latent_calls))


@pytest.mark.parametrize('latent', LATENTS)
def test_independent_times_are_independent(latent):
    """For each row over the steps, and for the rows within a step: correlation, 8 x 8 table of pairs."""
    t_x, t_z = times_of(make(latent, times='independent'), 400)
    for row in range(16):
        correlation = torch.corrcoef(torch.stack((t_x[:, row], t_z[:, row])))[0, 1]
        assert abs(correlation) < 4.5 / 400**0.5
    pairs = ((t_x * 8).long() * 8 + (t_z * 8).long()).flatten().clamp(max=63)
    assert chi_square(pairs.bincount(minlength=64), torch.ones(64)) < 4.5
    assert ((t_x - t_z) % 1).std(dim=1).min() > 0.05


@pytest.mark.parametrize('latent', LATENTS)
def test_same_times_are_the_same(latent):
    t_x, t_z = times_of(make(latent, times='same'), 20)
    assert torch.equal(t_x, t_z) and t_x.std() > 0.2


def test_stage_one_has_times_of_its_own():
    model = make(stage1_iters=10, stage1_t_min=0.8, stage1_clean=True)
    model.begin_step(0, whole(16), draw_rows)
    t_x, t_z = times_of(model, 50)
    assert t_x.min() > 0.8 and t_x.max() <= 1 and abs(t_x.mean() - 0.9) < 4.5 * (0.04 / 12 / 800) ** 0.5
    assert (t_z == 0).all()


def test_p_start_masks_everything_in_its_share():
    model = make(p_start=0.25)
    calls = spy(model, 'corrupt')
    with torch.no_grad():
        logs = [model(texts(64), whole(64, step=step))[1] for step in range(50)]
    t, masked = torch.cat([args[1] for args, _ in calls]), torch.cat([mask for _, (_, mask) in calls])
    assert abs((t == 1).sum() - 800) < 4.5 * 600**0.5
    assert masked[t == 1].all() and sum(int(log['overflow']) for log in logs) == 0


def test_shares_of_clean_latents_and_of_noise():
    """They are disjoint, in stage 2 only, and leave the tokens' times alone."""
    plain = make(stage1_iters=10)
    model = make(stage1_iters=10, p_clean=0.5, p_noise=0.25)
    for m in plain, model:
        m.begin_step(0, whole(16), draw_rows)
    assert all(torch.equal(*pair) for pair in zip(times_of(model, 5), times_of(plain, 5)))
    for m in plain, model:
        m.begin_step(10, whole(16), draw_rows)
    t_x, t_z = times_of(model, 100)
    assert torch.equal(t_x, next(times_of(plain, 100)))
    for share, there in ((0.5, t_z == 0), (0.25, t_z == 1)):
        assert abs(there.sum() - 1600 * share) < 4.5 * (1600 * share * (1 - share))**0.5
    for t, masked in ((0.0, 0), (1.0, 12)):  # what these times mean for codes
        z = make('discrete').channel.corrupt(torch.zeros(6, 2).long(), torch.full((6,), t), whole(6))
        assert (z == 5).sum() == masked


# ------------------------------------------------------------------------------------------------------------
# where latents stand

def test_spread_latents_stand_in_the_middle_of_their_pieces():
    for M, places in ((2, [1, 4]), (3, [0.5, 2.5, 4.5]), (6, [0, 1, 2, 3, 4, 5])):  # of L = 6 tokens
        assert latents_at(Config(**{**TINY, 'num_latents': M, 'latents': 'spread'})).tolist() == places
    assert latents_at(Config(**TINY)).tolist() == [6, 7]


def test_spread_latents_differ_by_their_place_alone():
    """A text that is turned around gives its latents in turned order, once positions are turned, too."""
    model = make(latents='spread').double()
    x = texts(8)
    z = model.encoder(x)
    assert (z[:, 0] - z[:, 1]).abs().min(dim=1).values.max() > 0
    with torch.no_grad():
        rope = model.encoder.dit
        rope.cos, rope.sin = rope.cos.clone(), -rope.sin  # RoPE of positions -p, the same as of 5 - p
    torch.testing.assert_close(model.encoder(x.flip(1)), z.flip(1))


# ------------------------------------------------------------------------------------------------------------
# the three stages

@pytest.mark.parametrize('latent', LATENTS)
def test_stage_one_teaches_the_encoder_by_the_tokens_alone(latent):
    """No latent loss; gradients reach the encoder through the latent; the codebook moves."""
    model = make(latent, stage1_iters=10, num_layers=2)
    discrete = latent == 'discrete'
    model.begin_step(1, whole(16), draw_rows)
    codebook = model.channel.quantizer.codebook.clone() if discrete else None
    loss, logs = model(texts(16), whole(16))
    assert 'latent_loss' not in logs
    assert discrete == ((loss - logs['token_loss']).item() > 0)  # the commitment loss
    loss.backward()
    model.end_step(FINITE, whole(16))
    named = model.encoder.named_parameters()
    taught = [p for name, p in named if 'time' not in name and 'ada' not in name]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in taught)
    assert model.z_head.weight.grad is None or not model.z_head.weight.grad.any()
    if discrete:
        assert not torch.equal(codebook, model.channel.quantizer.codebook)


def test_stage_one_gradient_reaches_the_encoder_through_the_straight_through_estimator():
    """Without the commitment loss too."""
    model = make('discrete', stage1_iters=10, stage1_clean=True)
    model.channel.quantizer.commitment = 0.0
    model.begin_step(1, whole(16), draw_rows)
    model(texts(16), whole(16))[0].backward()
    assert model.encoder.out.weight.grad.abs().sum() > 0


@pytest.mark.parametrize('latent', LATENTS)
def test_stage_two_leaves_encoder_and_codebook_bit_identical(latent):
    """Also under AdamW with weight decay and with momentum left from stage 1; everything else moves."""
    model = make(latent, stage1_iters=3, latent_layers=1, dropout=0.1, encoder_dropout=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)

    def train(steps):
        for step in steps:
            noise = whole(16, step=step)
            model.begin_step(step, noise, draw_rows)
            loss, logs = model(texts(16), noise)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            model.end_step(FINITE, noise)
        return {k: v.clone() for k, v in model.state_dict().items()}, logs
    begun = {k: v.clone() for k, v in model.state_dict().items()}
    before, _ = train(range(3))
    assert any((p.grad != 0).any() for p in model.encoder.parameters())
    after, logs = train(range(3, 8))
    for key in before:
        frozen = key.startswith(('encoder.', 'quantizer.'))
        assert torch.equal(before[key], after[key]) == frozen, key
        if key.startswith('quantizer.'):
            assert not torch.equal(begun[key], before[key]), key
    assert all(p.grad is None for p in model.encoder.parameters())
    assert {'latent_loss', 'seq_latent_loss'} < set(logs)


@pytest.mark.parametrize('latent', LATENTS)
def test_stage_three_trains_the_latent_denoiser_alone(latent):
    """On clean targets of all times, with the loss that stage 2 gives it; no other weight has a gradient."""
    model = make(latent, stage1_iters=1, stage3_start=3, latent_layers=1, p_clean=0.5)
    assert model.lr_restarts == (3,)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(3, 8):
        noise = whole(16, step=step)
        news = model.begin_step(step, noise, draw_rows)
        assert (news is not None) == (step == 3)
        loss, logs = model(texts(16), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.end_step(FINITE, noise)
    for key, value in model.state_dict().items():
        if 'freqs' not in key:
            assert torch.equal(before[key], value) != key.startswith('latent_'), key
    assert all((p.grad is not None) == k.startswith('latent_') for k, p in model.named_parameters())

    with torch.no_grad():
        model.config.p_clean, model.config.times = 0.0, 'independent'
        stage3 = model(texts(16), noise)[1]['loss']
        model.stage = 2
        assert torch.equal(model(texts(16), noise)[1]['seq_latent_loss'], stage3)


def test_stage_three_comes_last():
    with pytest.raises(ValueError, match='stage3_start=3 must be more than stage1_iters=3'):
        make(stage1_iters=3, stage3_start=3, latent_layers=1)


def test_begin_step_switches_by_itself():
    model = make('discrete', stage1_iters=4, vq_start=2)
    calls = spy(model.channel.quantizer, 'kmeans')
    seen, news = [], []
    for step in range(6):
        news.append(model.begin_step(step, whole(16), draw_rows))
        seen.append((model.stage, model.channel.quantising, model.encoder.training, len(calls)))
    assert seen == [(1, False, True, 0), (1, False, True, 0), (1, True, True, 1), (1, True, True, 1),
                    (2, True, False, 1), (2, True, False, 1)]
    assert [bool(text) for text in news] == [False, False, True, False, True, False]
    vectors, per_batch, _ = calls[0][0]
    assert vectors.shape == (80, 4) and per_batch == 32  # 16 for each of 5 codes; 16 texts of 2 latents


def test_latents_pass_unquantised_before_k_means():
    """And the codebook neither moves nor takes note of them."""
    model = make('discrete', stage1_iters=4, vq_start=2)
    model.begin_step(0, whole(16), draw_rows)
    inputs, encoded = spy(model, 'hidden_states'), spy(model, 'encode')
    loss, logs = model(texts(16), whole(16))
    assert torch.equal(inputs[0][0][1], encoded[0][1]) and torch.equal(loss.detach(), logs['token_loss'])
    assert model.channel.quantizer.met == []


def test_the_codebook_may_start_from_stored_latents():
    """k-means takes what comes with the rows, and asks no encoder: none is attached."""
    stored = torch.randn(40, 2, 4, generator=generator())
    model = make('discrete', encoder='frozen', stored_latents=True, stage1_iters=4)
    calls = spy(model.channel.quantizer, 'kmeans')
    model.begin_step(0, whole(16), lambda n: (texts(n), stored[:n]))
    torch.testing.assert_close(calls[0][0][0], F.normalize(stored, dim=-1).flatten(0, 1))
    loss, _ = model(texts(16), whole(16), stored[:16])
    loss.backward()
    assert model.z_in.weight.grad.abs().sum() > 0


def test_loss_is_the_weighted_sum_of_its_parts():
    for latent, latent_layers in itertools.product(LATENTS, (0, 1)):
        model = make(latent, latent_layers=latent_layers, lambda_x=0.7, lambda_z=0.3)
        loss, logs = model(texts(16), whole(16))
        latent_losses = logs['latent_loss'] + logs.get('seq_latent_loss', 0)
        torch.testing.assert_close(loss.detach(), 0.7 * logs['token_loss'] + 0.3 * latent_losses)
        assert ('seq_latent_loss' in logs) == bool(latent_layers)


# ------------------------------------------------------------------------------------------------------------
# dropping information

@pytest.mark.parametrize('encoder', ['', 'frozen'])
def test_p_drop_blanks_exactly_those_sequences(encoder):
    """z_t = 0 and no latent loss for the dropped ones, z_t as ever and the full loss for the others.

    Of stored latents or encoded ones.
    """
    model = make(p_drop=0.4, latent_layers=1, **dict(encoder=encoder) if encoder else {})
    inputs, encoded = spy(model, 'hidden_states'), spy(model, 'encode')
    noised, predictions = spy(model.channel, 'corrupt'), []

    def keep(module, args, out):
        out.retain_grad()
        predictions.append(out)
    for head in (model.z_head, model.latent_head):
        head.register_forward_hook(keep)
    stored = torch.randn(200, 2, 4, generator=generator()) if encoder else None
    loss, logs = model(texts(200), whole(200), stored)
    loss.backward()
    drop = whole(200).uniform('drop') < 0.4
    assert 50 < drop.sum() < 110
    z_t, z_0 = inputs[0][0][1], encoded[0][1]
    assert torch.equal(z_t[~drop], noised[0][1][~drop])
    assert torch.equal((z_t == 0).all(dim=(1, 2)), drop)
    assert torch.equal((z_t == 0).any(dim=2).any(dim=1), drop)
    for prediction, name in zip(predictions, ('latent_loss', 'seq_latent_loss'), strict=True):
        assert torch.equal(prediction.grad.abs().sum(dim=(1, 2)) == 0, drop)
        mse = ((prediction - z_0) ** 2).mean(dim=(1, 2))
        torch.testing.assert_close(logs[name], mse[~drop].sum().detach() / 200)


def test_encoder_dropout_blanks_masked_positions_only():
    """At a rate p_r ~ U[0, .9] of its own for each sequence.

    On average .45 of the masked positions, and E[p_r^2] = .27 of the pairs.
    """
    model = make(encoder_dropout=True)
    tokens, encoder = spy(model, 'corrupt'), spy(model.encoder, 'forward')
    with torch.no_grad():
        for step in range(20):
            model(texts(500), whole(500, step=step))
    mask, blank = torch.cat([m for _, (_, m) in tokens]), torch.cat([args[1] for args, _ in encoder])
    assert not (blank & ~mask).any()
    n, k = mask.sum(1).double(), blank.sum(1).double()
    assert close((k / n)[n > 0], 0.45)
    assert close((k * (k - 1) / (n * (n - 1)))[n > 1], 0.27)


@pytest.mark.parametrize('encoder_dropout', [False, True])
def test_stage_1_blanks_a_share_of_the_text_masked_or_not(encoder_dropout):
    model = make(stage1_iters=1, stage1_blank=0.3, encoder_dropout=encoder_dropout)
    tokens, encoder = spy(model, 'corrupt'), spy(model.encoder, 'forward')
    for step in 0, 1:
        model.begin_step(step, whole(2000), None)
        model(texts(2000), whole(2000))
    mask, (blank, in_stage_2) = tokens[0][1][1], (args[1] for args, _ in encoder)
    for where, expected in (~mask, 0.3), (mask, 1 - 0.7 * (1 - 0.45 * encoder_dropout)):
        share = (blank & where).sum(dim=1) / where.sum(dim=1)
        assert close(share[where.any(dim=1)], expected)
    assert not (in_stage_2 & ~tokens[1][1][1]).any() if encoder_dropout else in_stage_2 is None


def test_encoder_does_not_see_blanked_positions():
    model, x = make().eval(), texts(4)
    blank = torch.zeros(4, L, dtype=torch.bool)
    blank[:, 2] = True
    other = x.clone()
    other[:, 2] = (x[:, 2] + 1) % V
    assert torch.equal(model.encode(x, blank), model.encode(other, blank))
    assert not torch.equal(model.encode(x), model.encode(other))


def test_latents_have_unit_norm_on_demand():
    x = texts(8)
    torch.testing.assert_close(make().encode(x).norm(dim=-1), torch.ones(8, 2))
    torch.testing.assert_close(make(latent_length=2.0).encode(x), 2 * make().encode(x))
    assert (make(unit_norm=False).encode(x).norm(dim=-1) - 1).abs().min() > 1e-3


def test_codes_are_cosines_whatever_a_config_says_of_lengths():
    """Keys without effect are refused; a run of the first edition may have them."""
    for wrong in (dict(unit_norm=False), dict(latent_length=2.0), dict(p_drop=0.1)):
        with pytest.raises(ValueError, match=f'{[*wrong][0]}=.* has no effect with latent='):
            make('discrete', **wrong)
    old = Config.stored({**TINY, 'latent': 'discrete', 'latent_schedule': 'linear', 'unit_norm': False,
                         'latent_length': 2.0})
    torch.testing.assert_close(scrambled(LADD(old)).encode(texts(8)).norm(dim=-1), torch.ones(8, 2))


def test_runs_of_the_first_edition_may_hold_keys_of_the_other_channel():
    """Where they had no effect."""
    old = dict(latent='continuous', vq_start=2, codebook_size=7, vq_decay=0.5, dead_below=1.0)
    model, same = (scrambled(LADD(Config.stored({**TINY, **keys}))) for keys in (old, {}))
    assert model.name == 'Co-LADD' and torch.equal(model.encode(texts(8)), same.encode(texts(8)))


# ------------------------------------------------------------------------------------------------------------
# samplers

STRATEGIES = [(latent, strategy, layers) for latent in LATENTS
              for strategy, layers in (('joint', 0), ('seq', 0), ('seq', 1))]


@pytest.mark.parametrize('latent, strategy, layers', STRATEGIES)
@pytest.mark.parametrize('sampler', ['ancestral', 'remdm'])
def test_samples_hold_words_and_keep_what_was_given(latent, strategy, layers, sampler):
    model = make(latent, latent_layers=layers).eval()
    options = {'latent_steps': 3} if strategy == 'seq' else {}
    x = torch.randint(V + 1, (64, L), generator=generator())
    y, again = (model.sample(64, 5, strategy, sampler, x=x.clone(), generator=generator(), **options)
                for _ in range(2))
    assert y.min() >= 0 and y.max() < V and torch.equal(y[x != V], x[x != V])
    assert torch.equal(y, again)
    assert model.sample(3, 2, strategy).shape == (3, L)


@pytest.mark.parametrize('latent', LATENTS)
def test_joint_calls(latent):
    """N steps are N calls, at t = 1 ... 1/N.

    The first sees pure noise, every later one the z_t and x_t that the last step left.
    """
    model = make(latent).eval()
    calls, moves, states = spy(model, 'hidden_states'), spy(model.channel, 'step'), []
    embedded = spy(model.embed, 'forward')
    model.sample(8, 4, 'joint', generator=generator(), callback=lambda i, x, z: states.append(x.clone()))
    assert len(calls) == 4
    for i, ((_, z_t, t_z), _) in enumerate(calls):
        torch.testing.assert_close(t_z, torch.full((8,), 1 - i / 4))
        if i > 0:
            assert torch.equal(z_t, model.channel.seen(moves[i - 1][1]))
            assert torch.equal(embedded[i][1], model.embed.weight[states[i - 1]])  # x_t itself moves on
        elif latent == 'discrete':
            assert (moves[0][0][0] == 5).all()
        else:
            assert abs(z_t.std() - 1) < 4.5 / (2 * z_t.numel()) ** 0.5
    assert all((x == V).any() for x in states[:-1]) and (states[-1] < V).all()


def test_first_hitting_is_for_the_sequential_strategy():
    model = make().eval()
    assert model.sample(8, 3, 'seq', sampler='first_hitting', generator=generator()).max() < V
    with pytest.raises(ValueError, match='first_hitting'):
        model.sample(8, 3, 'joint', sampler='first_hitting')


def test_joint_with_one_step_sees_pure_noise():
    """All tokens are drawn from p(. | all masked, z_1): those of a single step do not see its new latent."""
    def denoise(x_t, z_t, t, where):
        assert (x_t == 2).all() and (z_t == 7).all() and t == 1 and where.all()
        return torch.zeros(int(where.sum()), 2), 'prediction'
    moves = []
    joint(denoise, torch.full((4, 3), 2), torch.full((4, 1), 7), 1, torch.tensor([0.0, 1.0]),
          lambda *args: moves.append(args), 2)
    assert len(moves) == 1 and moves[0][1:] == ('prediction', 1, 0)


def test_joint_draws_tokens_before_it_uses_the_new_latent():
    """Eq. (65), (66): both channels of a step condition on (x_t, z_t), neither on the other's x_s, z_s."""
    seen = []

    def denoise(x_t, z_t, t, where):
        seen.append(int(z_t[0, 0]))
        logits = F.one_hot(z_t[:, 0] % 2, 2).float().log()[:, None]
        return logits.expand(-1, x_t.shape[1], -1)[where], None
    x = joint(denoise, torch.full((50, 3), 2), torch.zeros(50, 1).long(), 1, torch.tensor([0.0, 1.0]),
              lambda z, p, t, s: z + 1, 2, generator=generator())
    assert seen == [0] and (x == 0).all()


@pytest.mark.parametrize('latent, layers', [*itertools.product(LATENTS, (0, 1))])
def test_sequential_makes_the_latent_from_masked_tokens_first(latent, layers):
    """latent_steps calls with all tokens masked (even the given ones), then `steps` calls given the latent.

    It is finished by then, and its time is 0.
    """
    model = make(latent, latent_layers=layers).eval()
    latent_calls, calls, moves = (spy(model, 'predict_latent'), spy(model, 'hidden_states'),
                                  spy(model.channel, 'step'))
    x = texts(32)
    x[:, 3:] = V
    model.sample(32, 4, 'seq', latent_steps=5, x=x, generator=generator())
    assert len(latent_calls) == 5 and len(moves) == 5
    assert all((args[2] == V).all() for args, _ in latent_calls)
    times = torch.stack([args[1][0] for args, _ in latent_calls])
    torch.testing.assert_close(times, torch.tensor([1, 0.8, 0.6, 0.4, 0.2]))
    assert latent == 'continuous' or (moves[-1][1] < 5).all()
    token_calls = calls[0 if layers else 5:]
    assert 1 <= len(token_calls) <= 4 and all((args[2] == 0).all() for args, _ in token_calls)


@pytest.mark.parametrize('latent', LATENTS)
def test_sequential_tokens_keep_their_own_latent(latent):
    """Sequences in which nothing appears are skipped; the others keep their own finished latent."""
    model = make(latent).eval()
    moves, calls, states = spy(model.channel, 'step'), spy(model, 'hidden_states'), []
    model.sample(40, 12, 'seq', latent_steps=2, generator=generator(),
                 callback=lambda i, x, z: states.append(x.clone()))
    z_0 = model.channel.seen(moves[-1][1])
    token_calls, previous, skipped = iter(calls[2:]), torch.full((40, L), V), False
    for state in states:
        active = (state != previous).any(dim=1)
        if active.any():
            x_t, z_t, _ = next(token_calls)[0]
            assert torch.equal(x_t, previous[active]) and torch.equal(z_t, z_0[active])
            skipped |= not active.all()
        previous = state
    assert skipped and next(token_calls, None) is None


@pytest.mark.parametrize('latent', LATENTS)
def test_a_clean_latent_takes_the_place_of_the_first_half(latent):
    model = make(latent).eval()
    z_0 = model.channel.state(model.encode(texts(8))).detach()
    latent_calls, calls = spy(model, 'predict_latent'), spy(model, 'hidden_states')
    model.sample(8, 3, 'seq', z_0=z_0, sampler='first_hitting', generator=generator())
    assert latent_calls == [] and len(calls) == L
    assert all(torch.equal(args[1], model.channel.seen(z_0)) for args, _ in calls)
    for wrong, match in (dict(strategy='joint', z_0=z_0), 'strategy=seq'), \
                        (dict(strategy='seq', z_0=z_0, latent='none'), 'go together'), \
                        (dict(strategy='seq', latent='data'), 'go together'), \
                        (dict(strategy='seq', latent='shuffled'), 'go together'), \
                        (dict(strategy='seq', latent='none', latent_steps=8), 'takes no latent_steps'):
        with pytest.raises(ValueError, match=match):
            model.sample(8, 3, **wrong)


@pytest.mark.parametrize('sampler', ['ancestral', 'first_hitting'])
@pytest.mark.parametrize('schedule', ['linear', 'polynomial'])
@pytest.mark.parametrize('latent', LATENTS)
def test_without_its_latent_a_network_samples_as_mdlm(latent, schedule, sampler):
    """Of the network whose latent is the mask's vectors, or zeros at the time that the masked tokens show."""
    model = make(latent, schedule=schedule).eval()

    def denoise(x_t, where):
        n = len(x_t)
        z = torch.zeros(n, 2, 4) if latent == 'continuous' else model.z_mask.expand(n, 2, 4)
        t = (x_t == V).double().mean(dim=1) ** (1 if schedule == 'linear' else 0.5)
        return model.head(model.hidden_states(x_t, z, t.float())[0][where])
    with torch.no_grad():
        x = reveal_tokens(denoise, model.all_masked(32), V, 4, schedule, sampler, 1.0, 1.0,
                          generator=generator())
    assert torch.equal(model.sample(32, 4, 'seq', sampler, latent='none', generator=generator()), x)
    assert model.sampling_flops(L, 4, strategy='seq', latent='none') == 4 * model.flops(L)


# ------------------------------------------------------------------------------------------------------------
# likelihoods

@pytest.mark.parametrize('latent', LATENTS)
def test_nll_sees_the_right_latent(latent):
    """seq: the clean latent at time 0; joint: the latent noised to the tokens' own time."""
    model, x, noise = make(latent).eval(), texts(32), whole(32)
    channel = model.channel
    z_0 = model.encode(x)
    if latent == 'discrete':
        z_0 = channel.quantizer.nearest(z_0)
    t = noise.times('t_x')
    expected = {'seq': (z_0, torch.zeros(32)), 'joint': (channel.corrupt(z_0, t, noise), t)}
    for strategy, (z, t_z) in expected.items():
        calls = spy(model, 'hidden_states')
        model.nll_parts(x, noise, strategy)
        seen = calls[0][0]
        assert torch.equal(seen[0], model.corrupt(x, t, noise)[0])
        assert torch.equal(seen[1], channel.seen(z)) and torch.equal(seen[2], t_z)
        model.__dict__.pop('hidden_states')


@pytest.mark.parametrize('strategy', ['joint', 'seq'])
@pytest.mark.parametrize('layers', [0, 1])
def test_nll_of_a_uniform_model(strategy, layers):
    """L log V nats for the tokens and M log K for the codes."""
    model, x = make('discrete', latent_layers=layers).eval(), texts(4096)
    for head in [model.head, model.z_head] + ([model.latent_head] if layers else []):
        torch.nn.init.zeros_(head.weight), torch.nn.init.zeros_(head.bias)
    parts = [model.nll_parts(x, whole(4096, step=step), strategy) for step in range(5)]
    assert close(torch.cat([part['token'] for part in parts]), L * math.log(V))
    assert close(torch.cat([part['latent'] for part in parts]), 2 * math.log(5))


def test_nll_adds_the_channels():
    x = texts(16)
    di, co = make('discrete').eval(), make().eval()
    for model in (di, co):
        parts = model.nll_parts(x, whole(16))
        assert model.likelihood == 'bound' and set(parts) == {'token', 'latent'}
        torch.testing.assert_close(model.nll(x, whole(16)), parts['token'] + parts['latent'])


@pytest.mark.parametrize('latent', LATENTS)
@pytest.mark.parametrize('strategy', ['joint', 'seq'])
def test_nll_of_the_tokens_only_takes_one_pass(latent, strategy):
    model, x = make(latent, latent_layers=1).eval(), texts(16)
    expected = model.nll_parts(x, whole(16), strategy)['token']
    calls = [spy(model, name) for name in ('hidden_states', 'predict_latent')]
    parts = model.nll_parts(x, whole(16), strategy, tokens_only=True)
    assert set(parts) == {'token'} and torch.equal(parts['token'], expected)
    assert [len(c) for c in calls] == [1, 0]


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_times_by_log_snr(schedule):
    t = torch.linspace(0.001, 0.999, 99, dtype=torch.float64)
    square = abar(t, schedule) ** 2
    torch.testing.assert_close(log_snr(t, schedule).exp(), square / (1 - square))
    torch.testing.assert_close(time_at(log_snr(t, schedule), schedule), t)


PAIRS, P = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]), torch.tensor([0.4, 0.15, 0.05, 0.4])
ENCODERS = {'injective': [[1.0, 0], [-0.5, 1], [0.3, -1], [-1, -1]], 'constant': [[0.7, 0.2]] * 4,
            'of the first token': [[1.0, 1], [1, 1], [-1, 0], [-1, 0]],
            'loud': [[9.0, 0], [-9, 9], [0, -9], [9, 9]]}


def exact_co(z_of, schedule='vp_sqrt'):
    """Co-LADD on two coins whose networks are the posteriors. z_of: a latent for each of the PAIRS."""
    model = LADD(Config(**{**TINY, 'vocab_size': 2, 'block_size': 2, 'hidden': 2, 'num_heads': 1,
                           'num_latents': 1, 'latent_dim': 2}, unit_norm=False, latent_schedule=schedule))
    z_of = torch.tensor(z_of)

    def hidden_states(x_t, z_t, t):
        fits = ((x_t[:, None] == 2) | (x_t[:, None] == PAIRS)).all(dim=2)              # (b, 4)
        a = abar(t, schedule)[:, None]
        distance = (z_t - a[..., None] * z_of).square().sum(dim=2)                     # (b, 4)
        p = (fits.log() + P.log() - distance / (2 * (1 - a**2))).softmax(dim=1)
        of_tokens = (p @ F.one_hot(PAIRS).float().flatten(1)).view(-1, 2, 2)
        return of_tokens.clamp(min=1e-30).log(), (p @ z_of)[:, None]
    model.encode = lambda x, blank=None, stored=None: z_of[2 * x[:, 0] + x[:, 1], None]
    model.hidden_states, model.z_head = hidden_states, torch.nn.Identity()
    torch.nn.init.eye_(model.head.weight)
    return model


@pytest.mark.parametrize('strategy', ['joint', 'seq'])
@pytest.mark.parametrize('encoder', ENCODERS)
@pytest.mark.parametrize('schedule, t_end', [*zip(SCHEDULES, (0.1, 0, 0.6))])
def test_the_bound_of_exact_networks_is_the_entropy(strategy, encoder, schedule, t_end):
    """Whatever the latent says, and wherever its path ends; the token channel alone is less."""
    model = exact_co(ENCODERS[encoder], schedule)
    model.channel.t_end = t_end
    entropy, n = -float((P * P.log()).sum()), 20000
    x = PAIRS[torch.multinomial(P, n, replacement=True, generator=generator())]
    parts = model.nll_parts(x, whole(n), strategy)
    nats = parts['token'] + parts['latent']
    assert close(nats, entropy)
    assert encoder == 'constant' or parts['token'].mean() < entropy - 0.1


@pytest.mark.parametrize('latent', LATENTS)
def test_nll_of_stored_latents_asks_no_encoder(latent):
    model, x = make(latent).eval(), texts(16)
    with torch.no_grad():
        stored = model.encoder(x)
    expected = model.nll(x, whole(16))
    model.encoder = None
    torch.testing.assert_close(model.nll(x, whole(16), z_0=stored), expected)


def test_joint_nll_of_codes_is_the_average_over_orders():
    """Two tokens and a code, revealed in any of six orders: E[nll] = -E_order sum log p(next | earlier).

    So it bounds -log p(x, z).
    """
    small = dict(vocab_size=2, block_size=2, num_latents=1, codebook_size=3)
    model = make('discrete', seed=2, **small).eval()
    x = torch.tensor([[0, 1]])
    with torch.no_grad():
        z = model.channel.quantizer.nearest(model.encode(x))
        revealed = x[0].tolist() + [int(z)]

        def log_p(position, known):
            state = [revealed[i] if i in known else (2, 2, 3)[i] for i in range(3)]
            z_t = model.channel.seen(torch.tensor([[state[2]]]))
            h_x, h_z = model.hidden_states(torch.tensor([state[:2]]), z_t, torch.zeros(1))
            logits = model.z_head(h_z)[0, 0] if position == 2 else model.head(h_x)[0, position]
            return float(logits.double().log_softmax(-1)[revealed[position]])
        paths = [sum(log_p(p, order[:i]) for i, p in enumerate(order))
                 for order in itertools.permutations(range(3))]
    nats = torch.cat([model.nll(x.expand(8192, 2), whole(8192, step=step)) for step in range(15)])
    assert close(nats, -sum(paths) / 6)
    assert max(paths) - min(paths) > 0.05


def test_training_losses_agree_with_the_likelihoods():
    """In stage 2, with ELBO weights and equal times, L * token loss + M * latent loss is the joint nll."""
    model = make('discrete').eval()
    with torch.no_grad():
        logs = [model(texts(512), whole(512, step=step))[1] for step in range(40)]
    losses = torch.stack([L * log['token_loss'] + 2 * log['latent_loss'] for log in logs])
    nats = torch.stack([model.nll(texts(512), whole(512, step=step + 100)).mean() for step in range(40)])
    assert abs(losses.mean() - nats.mean()) < 4.5 * ((losses.var() + nats.var()) / 40) ** 0.5


def test_flops_count_both_modalities():
    assert make().flops(L) == 12 * (L + 2) * 16**2 + 2 * (L + 2) ** 2 * 16
