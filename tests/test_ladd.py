"""ladd.py against the truth: closed forms, plain loops, enumeration, and what each stage may and may not move.

Statistical bounds are 4.5 standard errors (two-sided chance of failure 7e-6 each, and the seeds are fixed).
"""
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from ladd import LADD, Config, Quantizer, abar, code_step, ddim_step, joint, latent_chain
from mdlm import alpha
from lib.noise import Noise
from test_mdlm import close, generator, scrambled, whole
from test_noise import chi_square

SCHEDULES = 'vp_linear', 'vp_cosine', 'vp_sqrt'
V, L = 4, 6


def make(latent='continuous', seed=0, **kwargs):
    """A small LADD whose weights have left the initialisation; quantizer as built."""
    defaults = dict(vocab_size=V, block_size=L, hidden=16, num_layers=1, num_heads=2, cond_dim=8, latent=latent, num_latents=2,
                    latent_dim=4, codebook_size=5, encoder_layers=1, latent_schedule='linear' if latent == 'discrete' else 'vp_sqrt')
    return scrambled(LADD(Config(**{**defaults, **kwargs})), seed)


def texts(n, seed=0):
    return torch.randint(V, (n, L), generator=generator(seed))


def draw_rows(n):
    return (texts(n),)


def spy(obj, name):
    """Replaces a method by itself, keeping the arguments and results of every call: a list of (args, result)."""
    calls, method = [], getattr(obj, name)

    def recording(*args, **kwargs):
        calls.append((args, method(*args, **kwargs)))
        return calls[-1][1]
    setattr(obj, name, recording)
    return calls


# --- Gaussian channel -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('schedule, square', [
    ('vp_linear', lambda t: 1 - t), ('vp_cosine', lambda t: math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2), ('vp_sqrt', lambda t: math.sqrt(1 - t))])
def test_abar_is_its_wrapped_closed_form(schedule, square):
    for t in (0.0, 0.1, 0.5, 0.9, 1.0):
        expected = math.sqrt((1 - 2e-4) * square(t) + 1e-4)
        assert float(abar(torch.tensor(t, dtype=torch.float64), schedule)) == pytest.approx(expected, rel=1e-9)
    assert float(abar(torch.tensor(1.0), schedule)) == pytest.approx(0.01, rel=1e-4)
    assert (abar(torch.linspace(0, 1, 100), schedule).diff() < 0).all()


def test_unknown_latent_choices_are_refused():
    for wrong in (dict(latent_schedule='linear'), dict(latent='discrete', latent_schedule='vp_sqrt'), dict(latent='both'), dict(times='equal')):
        with pytest.raises(ValueError, match=f'{[*wrong][-1]} is one of .* not {[*wrong.values()][-1]!r}'):
            make(**wrong)


@pytest.mark.parametrize('schedule', SCHEDULES)
@pytest.mark.parametrize('grid', [[1, 0], [1, 0.5, 0], [1, 0.9, 0.89, 0.2, 1e-3, 0], [0.6, 0.3, 0]])
def test_ddim_with_the_true_latent_lands_on_it(schedule, grid):
    """And on the way it keeps its noise: z_s = abar_s z_0 + sqrt(1 - abar_s^2) eps with the eps it started from."""
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
    """For z_0 ~ N(0, v) the best denoiser is linear, so is the sampler, and its limit maps N(0, 1) to N(0, v)."""
    v, z_1 = 0.3, torch.tensor([[1.0], [-2.0]]).double()

    def level(t):
        return float(abar(torch.tensor(t, dtype=torch.float64), schedule))

    def slope(a):  # E[z_0 | z_t] = slope z_t
        return a * v / (a * a * v + 1 - a * a)

    def sample(steps):
        return latent_chain(lambda z, t: slope(level(float(t))) * z, z_1, steps, lambda z, p, t, s: ddim_step(z, p, t, s, schedule))
    factor = 1.0
    for i in range(7):
        a_t, a_s = level(1 - i / 7), level(1 - (i + 1) / 7)
        factor *= slope(a_t) if i == 6 else a_s * slope(a_t) + math.sqrt((1 - a_s**2) / (1 - a_t**2)) * (1 - a_t * slope(a_t))
    torch.testing.assert_close(sample(7), factor * z_1, rtol=1e-9, atol=0)
    torch.testing.assert_close(sample(3000), math.sqrt(v) * z_1, rtol=0.02, atol=0)


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_latent_noise_has_its_law(schedule):
    """z_t - abar_t z_0 is Gaussian of variance 1 - abar_t^2, abar^2 + variance = 1."""
    model = make(latent_schedule=schedule)
    z_0 = torch.ones(20000, 2, 4)
    for t in (0.05, 0.5, 0.95):
        a = float(abar(torch.tensor(t), schedule))
        noise = model.corrupt_latent(z_0, torch.full((20000,), t), whole(20000)) - a * z_0
        n, var = noise.numel(), 1 - a * a
        assert abs(noise.mean()) < 4.5 * (var / n) ** 0.5 and abs(noise.var() - var) < 4.5 * var * (2 / n) ** 0.5


# --- code channel -----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('schedule', ['linear', 'polynomial'])
def test_code_step_has_its_law(schedule):
    """From [mask], revealed at rate (alpha_s - alpha_t) / (1 - alpha_t) with the denoiser's law; codes never change; the last step reveals all."""
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
    z_t = model.corrupt_latent(codes, torch.full((10000,), 0.3), whole(10000))
    assert torch.equal(z_t[z_t != 5], codes[z_t != 5])
    assert abs((z_t == 5).sum() - 20000 * 0.3) < 4.5 * (20000 * 0.21) ** 0.5


def test_vectors_of_codes_and_of_the_mask():
    model = make('discrete')
    z = model.vectors(torch.tensor([[0, 5], [4, 2]]))
    torch.testing.assert_close(z, torch.stack((torch.stack((model.quantizer.codebook[0], model.z_mask)), model.quantizer.codebook[[4, 2]])))


# --- the quantizer ----------------------------------------------------------------------------------------------------------------

def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=generator(seed)), dim=-1)


class PlainQuantizer:
    """The same in loops over single vectors, double precision."""

    def __init__(self, q):
        self.codebook = [c.double() for c in q.codebook.clone()]
        self.counts, self.sums = [2.0] * len(self.codebook), [2.0 * c for c in self.codebook]

    def __call__(self, e, noise):
        vectors = [v.double() for v in e.flatten(0, 1)]
        codes = [max(range(len(self.codebook)), key=lambda k: float(v @ self.codebook[k])) for v in vectors]
        loss = 0.1 * sum(float(((v - self.codebook[k]) ** 2).mean()) for v, k in zip(vectors, codes)) / len(vectors)
        quantised = [self.codebook[k] for k in codes]
        replacement = noise.permutation('revive', max(len(vectors), len(self.codebook))).tolist()
        for k in range(len(self.codebook)):
            mine = [v for v, code in zip(vectors, codes) if code == k]
            self.counts[k] = 0.95 * self.counts[k] + 0.05 * len(mine)
            self.sums[k] = 0.95 * self.sums[k] + 0.05 * sum(mine, torch.zeros(e.shape[-1]).double())
            if self.counts[k] < 2:
                self.counts[k], self.sums[k] = 2.0, 2.0 * vectors[replacement[k] % len(vectors)]
        self.codebook = [s / s.norm() for s in self.sums]
        return quantised, codes, loss


@pytest.mark.parametrize('size, b', [(6, 16), (12, 3)], ids=['more vectors than codes', 'more codes than vectors'])
def test_quantizer_is_its_plain_definition(size, b):
    """Codes, outputs, loss and all state over 30 updates, in which codes live and die."""
    torch.manual_seed(0)
    q = Quantizer(size, 4)
    plain, revived = PlainQuantizer(q), 0
    for step in range(30):
        e = F.normalize(torch.randn(b, 2, 4, generator=generator(step)) + torch.tensor([1.0, 0.5, 0, 0]), dim=-1)
        straight, codes, loss = q(e, whole(b, step=step))
        expected, expected_codes, expected_loss = plain(e, whole(b, step=step))
        assert codes.shape == (b, 2) and codes.flatten().tolist() == expected_codes
        torch.testing.assert_close(straight.flatten(0, 1).double(), torch.stack(expected), rtol=0, atol=1e-5)
        assert float(loss) == pytest.approx(expected_loss, rel=1e-4)
        torch.testing.assert_close(q.counts.double(), torch.tensor(plain.counts).double(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(q.sums.double(), torch.stack(plain.sums), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(q.codebook.double(), torch.stack(plain.codebook), rtol=1e-4, atol=1e-5)
        revived += plain.counts.count(2.0)
    assert 0 < revived < 30 * size


def test_micro_batches_move_the_codebook_once():
    """In three parts or at once: the same codes, and the same codebook after the last part, not before."""
    e = unit(6, 4, 4)
    whole_q, q, noise = Quantizer(16, 4), Quantizer(16, 4), whole(6)
    q.load_state_dict(whole_q.state_dict())
    before, codes = q.codebook.clone(), whole_q(e, noise)[1]
    for i in (0, 1, 2):
        assert torch.equal(q.codebook, before)
        assert torch.equal(q(e[i::3], noise[i::3])[1], codes[i::3])
    assert torch.equal(q.codebook, whole_q.codebook) and not torch.equal(q.codebook, before) and q.waiting == []


def test_codebook_rests_without_noise():
    q = Quantizer(6, 4)
    before = {k: v.clone() for k, v in q.state_dict().items()}
    q(unit(16, 2, 4))
    assert all(torch.equal(v, before[k]) for k, v in q.state_dict().items())


def test_straight_through_gradient_is_the_identity():
    """What flows into the quantised vector flows into e unchanged; the commitment loss adds 2 * .1 (e - codebook) / numel."""
    torch.manual_seed(0)
    q, e, g = Quantizer(6, 4), unit(3, 2, 4).requires_grad_(), torch.randn(3, 2, 4)
    straight, codes, loss = q(e)
    torch.testing.assert_close(straight, q.codebook[codes])
    torch.testing.assert_close(torch.autograd.grad((straight * g).sum(), e, retain_graph=True)[0], g)
    torch.testing.assert_close(torch.autograd.grad(loss, e)[0], 0.2 * (e - q.codebook[codes]).detach() / e.numel())


def test_codebook_survives_a_dead_code_storm():
    """Identical inputs for 100 steps kill every code but one; varied ones bring the codebook back."""
    torch.manual_seed(0)
    q, one = Quantizer(16, 4), unit(1, 1, 4)
    for step in range(100):
        q(one.expand(64, 1, 4), whole(64, step=step))
    assert (q.codebook @ one[0, 0] > 0.999).all()
    for step in range(100, 300):
        q(unit(64, 1, 4, seed=step), whole(64, step=step))
    assert all(v.isfinite().all() for v in q.state_dict().values())
    torch.testing.assert_close(q.codebook.norm(dim=1), torch.ones(16))
    assert q.perplexity() > 12 and len(q.nearest(unit(1000, 4, seed=9)).unique()) > 12


def test_many_vectors_at_a_time_or_few():
    """The limit on what meets the codebook at once changes no code, and sums only in their last bits."""
    def fit(at_once):
        torch.manual_seed(0)
        q = Quantizer(16, 4)
        q.at_once = at_once
        q.kmeans(unit(500, 4), 100, whole(50))
        return q, *q(unit(30, 2, 4, seed=1), whole(30))[:2]
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
    assert float(q.perplexity()) == pytest.approx(math.exp(0.25 * math.log(4) + 0.75 * math.log(4 / 3)))


def test_kmeans_improves_and_repeats():
    """Every round brings vectors nearer to their codes; on separate clusters of equal size the centres are found in full."""
    e = unit(500, 4)

    def fit(iterations):
        q = Quantizer(16, 4)
        q.kmeans(e, 100, whole(50), iterations)
        return q
    cosine = [float((e * q.codebook[q.nearest(e)]).sum(-1).mean()) for q in map(fit, (1, 2, 5, 10, 20))]
    assert all(b >= a - 1e-6 for a, b in itertools.pairwise(cosine)) and cosine[3] > cosine[0] + 0.005
    assert all(torch.equal(a, b) for a, b in zip(fit(10).state_dict().values(), fit(10).state_dict().values()))
    q = fit(10)
    torch.testing.assert_close(q.counts.sum(), torch.tensor(100.0))  # in units of a training batch
    torch.testing.assert_close(q.sums.sum(0), e.sum(0) * 100 / 500)
    torch.testing.assert_close(q.codebook[q.counts > 0], F.normalize(q.sums[q.counts > 0], dim=-1))


# --- the two times ----------------------------------------------------------------------------------------------------------------

def times_of(model, steps, b=16):
    """t_x and t_z of `steps` training steps, as the two corruptions saw them: (steps, b) each."""
    token_calls, latent_calls = spy(model, 'corrupt'), spy(model, 'corrupt_latent')
    with torch.no_grad():
        for step in range(steps):
            model(texts(b), whole(b, step=step))
    return (torch.stack([args[1] for args, _ in calls]) for calls in (token_calls, latent_calls))


@pytest.mark.parametrize('latent', ['continuous', 'discrete'])
def test_independent_times_are_independent(latent):
    """For each row over the steps, and for the rows within a step: correlation and an 8 x 8 table of pairs."""
    t_x, t_z = times_of(make(latent, times='independent'), 400)
    for row in range(16):
        assert abs(torch.corrcoef(torch.stack((t_x[:, row], t_z[:, row])))[0, 1]) < 4.5 / 400**0.5
    assert chi_square(((t_x * 8).long() * 8 + (t_z * 8).long()).flatten().clamp(max=63).bincount(minlength=64), torch.ones(64)) < 4.5
    assert ((t_x - t_z) % 1).std(dim=1).min() > 0.05


@pytest.mark.parametrize('latent', ['continuous', 'discrete'])
def test_same_times_are_the_same(latent):
    t_x, t_z = times_of(make(latent, times='same'), 20)
    assert torch.equal(t_x, t_z) and t_x.std() > 0.2


def test_stage_one_has_times_of_its_own():
    model = make(stage1_iters=10, stage1_t_min=0.8, stage1_clean=True)
    model.begin_step(0, draw_rows, whole(16))
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


# --- the two stages ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('latent', ['continuous', 'discrete'])
def test_stage_one_teaches_the_encoder_by_the_tokens_alone(latent):
    """No latent loss; gradients reach the encoder through the latent; the codebook moves."""
    model = make(latent, stage1_iters=10, num_layers=2)
    model.begin_step(1, draw_rows, whole(16))
    codebook = model.quantizer.codebook.clone() if model.discrete else None
    loss, logs = model(texts(16), whole(16))
    assert 'latent_loss' not in logs
    assert model.discrete == ((loss - logs['token_loss']).item() > 0)  # the commitment loss
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for name, p in model.encoder.named_parameters() if 'time' not in name and 'ada' not in name)
    assert model.z_head.weight.grad is None or not model.z_head.weight.grad.any()
    if model.discrete:
        assert not torch.equal(codebook, model.quantizer.codebook)


def test_stage_one_gradient_reaches_the_encoder_through_the_straight_through_estimator():
    """Without the commitment loss too."""
    model = make('discrete', stage1_iters=10, stage1_clean=True)
    model.quantizer.commitment = 0.0
    model.begin_step(1, draw_rows, whole(16))
    model(texts(16), whole(16))[0].backward()
    assert model.encoder.out.weight.grad.abs().sum() > 0


@pytest.mark.parametrize('latent', ['continuous', 'discrete'])
def test_stage_two_leaves_encoder_and_codebook_bit_identical(latent):
    """Also under AdamW with weight decay and with momentum left from stage 1; everything else moves."""
    model = make(latent, stage1_iters=3, latent_layers=1, dropout=0.1, encoder_dropout=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)

    def train(steps):
        for step in steps:
            model.begin_step(step, draw_rows, whole(16, step=step))
            loss, logs = model(texts(16), whole(16, step=step))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return {k: v.clone() for k, v in model.state_dict().items()}, logs
    before, _ = train(range(3))
    assert any((p.grad != 0).any() for p in model.encoder.parameters())
    after, logs = train(range(3, 8))
    for key in before:
        if key.startswith(('encoder', 'quantizer')):
            assert torch.equal(before[key], after[key]), key
        else:
            assert not torch.equal(before[key], after[key]), key
    assert all(p.grad is None for p in model.encoder.parameters())
    assert {'latent_loss', 'seq_latent_loss'} < set(logs)


def test_begin_step_switches_by_itself():
    model = make('discrete', stage1_iters=4, vq_start=2)
    calls = spy(model.quantizer, 'kmeans')
    seen = []
    for step in range(6):
        model.begin_step(step, draw_rows, whole(16))
        seen.append((model.stage, model.quantising, model.encoder.training, len(calls)))
    assert seen == [(1, False, True, 0), (1, False, True, 0), (1, True, True, 1), (1, True, True, 1), (2, True, False, 1), (2, True, False, 1)]
    vectors, per_batch, _ = calls[0][0]
    assert vectors.shape == (80, 4) and per_batch == 32  # 16 for each of 5 codes; 16 texts of 2 latents


def test_the_codebook_may_start_from_stored_latents():
    """k-means takes what comes with the rows, and asks no encoder: there is none of that name."""
    stored = torch.randn(40, 2, 4, generator=generator())
    model = make('discrete', encoder='frozen', stored_latents=True, stage1_iters=4)
    calls = spy(model.quantizer, 'kmeans')
    model.begin_step(0, lambda n: (texts(n), stored[:n]), whole(16))
    torch.testing.assert_close(calls[0][0][0], F.normalize(stored, dim=-1).flatten(0, 1))
    loss, _ = model(texts(16), whole(16), stored[:16])
    loss.backward()
    assert model.z_in.weight.grad.abs().sum() > 0


def test_loss_is_the_weighted_sum_of_its_parts():
    for latent, latent_layers in itertools.product(('continuous', 'discrete'), (0, 1)):
        model = make(latent, latent_layers=latent_layers, lambda_x=0.7, lambda_z=0.3)
        loss, logs = model(texts(16), whole(16))
        expected = 0.7 * logs['token_loss'] + 0.3 * logs['latent_loss'] + 0.3 * logs.get('seq_latent_loss', 0)
        torch.testing.assert_close(loss.detach(), expected.detach())
        assert ('seq_latent_loss' in logs) == bool(latent_layers)


# --- dropping information ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('encoder', ['', 'frozen'])
def test_p_drop_blanks_exactly_those_sequences(encoder):
    """z_t = 0 and no latent loss for the dropped ones, z_t as ever and the full loss for the others; stored latents or encoded ones."""
    model = make(p_drop=0.4, latent_layers=1, encoder=encoder)
    inputs, encoded, noised = spy(model, 'hidden_states'), spy(model, 'encode'), spy(model, 'corrupt_latent')
    predictions = []
    for head in (model.z_head, model.latent_head):
        head.register_forward_hook(lambda m, args, out: (out.retain_grad(), predictions.append(out))[1] and None)
    loss, logs = model(texts(200), whole(200), torch.randn(200, 2, 4, generator=generator()) if encoder else None)
    loss.backward()
    drop = whole(200).uniform('drop') < 0.4
    assert 50 < drop.sum() < 110
    z_t, z_0 = inputs[0][0][1], encoded[0][1]
    assert torch.equal(z_t[~drop], noised[0][1][~drop])
    assert torch.equal((z_t == 0).all(dim=(1, 2)), drop) and torch.equal((z_t == 0).any(dim=2).any(dim=1), drop)
    for prediction, key in zip(predictions, ('latent_loss', 'seq_latent_loss')):
        assert torch.equal(prediction.grad.abs().sum(dim=(1, 2)) == 0, drop)
        mse = ((prediction - z_0) ** 2).mean(dim=(1, 2))
        torch.testing.assert_close(logs[key], mse[~drop].sum().detach() / 200)


def test_encoder_dropout_blanks_masked_positions_only():
    """At a rate p_r ~ U[0, .9] of its own for each sequence: on average .45 of the masked positions, E[p_r^2] = .27 of the pairs."""
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
    torch.testing.assert_close(make('discrete', unit_norm=False, latent_length=2.0).encode(x).norm(dim=-1), torch.ones(8, 2))  # codes are cosines
    torch.testing.assert_close(make(latent_length=2.0).encode(x), 2 * make().encode(x))
    assert (make(unit_norm=False).encode(x).norm(dim=-1) - 1).abs().min() > 1e-3


# --- samplers ---------------------------------------------------------------------------------------------------------------------

STRATEGIES = [(latent, strategy, layers) for latent in ('continuous', 'discrete') for strategy, layers in (('joint', 0), ('seq', 0), ('seq', 1))]


@pytest.mark.parametrize('latent, strategy, layers', STRATEGIES)
@pytest.mark.parametrize('sampler', ['ancestral', 'remdm'])
def test_samples_hold_words_and_keep_what_was_given(latent, strategy, layers, sampler):
    model = make(latent, latent_layers=layers).eval()
    x = torch.randint(V + 1, (64, L), generator=generator())
    y = model.sample(64, 5, strategy, latent_steps=3, sampler=sampler, x=x.clone(), generator=generator())
    assert y.min() >= 0 and y.max() < V and torch.equal(y[x != V], x[x != V])
    again = model.sample(64, 5, strategy, latent_steps=3, sampler=sampler, x=x.clone(), generator=generator())
    assert torch.equal(y, again)
    assert model.sample(3, 2, strategy, latent_steps=2).shape == (3, L)


@pytest.mark.parametrize('latent', ['continuous', 'discrete'])
def test_joint_calls(latent):
    """N steps are N calls, at t = 1 ... 1/N; the first sees pure noise, every later one the z_t and x_t that the last step left."""
    model = make(latent).eval()
    calls, moves, states = spy(model, 'hidden_states'), spy(model, 'latent_step'), []
    model.sample(8, 4, 'joint', generator=generator(), callback=lambda i, x: states.append(x.clone()))
    assert len(calls) == 4
    see = model.vectors if model.discrete else (lambda z: z)
    for i, ((x_t, z_t, t_z), _) in enumerate(calls):
        torch.testing.assert_close(t_z, torch.full((8,), 1 - i / 4))
        if i == 0:
            assert (moves[0][0][0] == 5).all() if model.discrete else abs(z_t.std() - 1) < 4.5 / (2 * z_t.numel()) ** 0.5
        else:
            assert torch.equal(z_t, see(moves[i - 1][1]))
    assert all((x == V).any() for x in states[:-1]) and (states[-1] < V).all()


def test_first_hitting_is_for_the_sequential_strategy():
    model = make().eval()
    assert model.sample(8, 3, 'seq', sampler='first_hitting', generator=generator()).max() < V
    with pytest.raises(ValueError, match='first_hitting'):
        model.sample(8, 3, 'joint', sampler='first_hitting')


def test_joint_with_one_step_sees_pure_noise():
    """Everything is drawn from p(. | all masked, z_1): the tokens of one joint step know nothing of the latent made in it."""
    def denoise(x_t, z_t, t, where):
        assert (x_t == 2).all() and (z_t == 7).all() and t == 1 and where.all()
        return torch.zeros(int(where.sum()), 2), 'prediction'
    moves = []
    joint(denoise, torch.full((4, 3), 2), torch.full((4, 1), 7), 1, torch.tensor([0.0, 1.0]), lambda *args: moves.append(args), 2)
    assert len(moves) == 1 and moves[0][1:] == ('prediction', 1, 0)


def test_joint_draws_tokens_before_it_uses_the_new_latent():
    """The mathematics of eq. (65), (66): both channels of a step condition on (x_t, z_t), neither on the other's x_s, z_s."""
    seen = []

    def denoise(x_t, z_t, t, where):
        seen.append(int(z_t[0, 0]))
        return F.one_hot(z_t[:, 0] % 2, 2).float().log()[:, None].expand(-1, x_t.shape[1], -1)[where], None
    x = joint(denoise, torch.full((50, 3), 2), torch.zeros(50, 1).long(), 1, torch.tensor([0.0, 1.0]), lambda z, p, t, s: z + 1, 2, generator=generator())
    assert seen == [0] and (x == 0).all()


@pytest.mark.parametrize('latent, layers', [('continuous', 0), ('discrete', 0), ('continuous', 1), ('discrete', 1)])
def test_sequential_makes_the_latent_from_masked_tokens_first(latent, layers):
    """latent_steps calls with all tokens masked (even the given ones), then `steps` calls with the finished latent at time 0."""
    model = make(latent, latent_layers=layers).eval()
    latent_calls, calls, moves = spy(model, 'predict_latent'), spy(model, 'hidden_states'), spy(model, 'latent_step')
    x = texts(32)
    x[:, 3:] = V
    model.sample(32, 4, 'seq', latent_steps=5, x=x, generator=generator())
    assert len(latent_calls) == 5 and len(moves) == 5
    assert all((args[2] == V).all() for args, _ in latent_calls)
    torch.testing.assert_close(torch.stack([args[1][0] for args, _ in latent_calls]), torch.tensor([1, 0.8, 0.6, 0.4, 0.2]))
    assert not model.discrete or (moves[-1][1] < 5).all()
    token_calls = calls[0 if layers else 5:]
    assert 1 <= len(token_calls) <= 4 and all((args[2] == 0).all() for args, _ in token_calls)


@pytest.mark.parametrize('latent', ['continuous', 'discrete'])
def test_sequential_tokens_keep_their_own_latent(latent):
    """Sequences in which nothing appears are skipped; the others are still paired with their own finished latent."""
    model = make(latent).eval()
    moves, calls, states = spy(model, 'latent_step'), spy(model, 'hidden_states'), []
    model.sample(40, 12, 'seq', latent_steps=2, generator=generator(), callback=lambda i, x: states.append(x.clone()))
    z_0 = model.vectors(moves[-1][1]) if model.discrete else moves[-1][1]
    token_calls, previous, skipped = iter(calls[2:]), torch.full((40, L), V), False
    for state in states:
        active = (state != previous).any(dim=1)
        if active.any():
            x_t, z_t, _ = next(token_calls)[0]
            assert torch.equal(x_t, previous[active]) and torch.equal(z_t, z_0[active])
            skipped |= not active.all()
        previous = state
    assert skipped and next(token_calls, None) is None


# --- likelihoods ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('latent', ['continuous', 'discrete'])
def test_channel_nll_sees_the_right_latent(latent):
    """seq: the clean latent at time 0; joint: the latent noised to the tokens' own time."""
    model, x, noise = make(latent).eval(), texts(32), whole(32)
    z_0 = model.encode(x)
    if model.discrete:
        z_0 = model.quantizer.nearest(z_0)
    see = model.vectors if model.discrete else (lambda z: z)
    for strategy in ('seq', 'joint'):
        calls = spy(model, 'hidden_states')
        model.channel_nll(x, noise, strategy)
        x_t, z_t, t_z = calls[0][0]
        t = noise.times('t_x')
        assert torch.equal(x_t, model.corrupt(x, t, noise)[0])
        assert torch.equal(t_z, t if strategy == 'joint' else torch.zeros(32))
        assert torch.equal(z_t, see(z_0 if strategy == 'seq' else model.corrupt_latent(z_0, t, noise)))
        model.__dict__.pop('hidden_states')


@pytest.mark.parametrize('strategy', ['joint', 'seq'])
@pytest.mark.parametrize('layers', [0, 1])
def test_nll_of_a_uniform_model(strategy, layers):
    """L log V nats for the tokens and M log K for the codes."""
    model, x = make('discrete', latent_layers=layers).eval(), texts(4096)
    for head in [model.head, model.z_head] + ([model.latent_head] if layers else []):
        torch.nn.init.zeros_(head.weight), torch.nn.init.zeros_(head.bias)
    parts = [model.channel_nll(x, whole(4096, step=step), strategy) for step in range(5)]
    assert close(torch.cat([tokens for tokens, _ in parts]), L * math.log(V))
    assert close(torch.cat([codes for _, codes in parts]), 2 * math.log(5))


def test_nll_adds_the_channels():
    x = texts(16)
    di, co = make('discrete').eval(), make().eval()
    torch.testing.assert_close(di.nll(x, whole(16)), sum(di.channel_nll(x, whole(16))))
    tokens, latent = co.channel_nll(x, whole(16))
    assert latent is None and torch.equal(co.nll(x, whole(16)), tokens)


def test_joint_nll_of_codes_is_the_average_over_orders():
    """Two tokens and a code, revealed in any of six orders: E[nll] = -E_order sum log p(next | earlier), so it bounds -log p(x, z)."""
    model = make('discrete', vocab_size=2, block_size=2, num_latents=1, codebook_size=3, seed=2).eval()
    x = torch.tensor([[0, 1]])
    with torch.no_grad():
        z = model.quantizer.nearest(model.encode(x))
        truth = x[0].tolist() + [int(z)]

        def log_p(position, known):
            state = [truth[i] if i in known else (2, 2, 3)[i] for i in range(3)]
            h_x, h_z = model.hidden_states(torch.tensor([state[:2]]), model.vectors(torch.tensor([[state[2]]])), torch.zeros(1))
            logits = model.z_head(h_z)[0, 0] if position == 2 else model.head(h_x)[0, position]
            return float(logits.double().log_softmax(-1)[truth[position]])
        paths = [sum(log_p(p, order[:i]) for i, p in enumerate(order)) for order in itertools.permutations(range(3))]
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
