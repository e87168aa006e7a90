"""mdlm.py against closed forms, enumeration of all texts and states, and the exact laws of its samplers.

Statistical bounds are 4.5 standard errors (two-sided chance of failure 7e-6 each, and the seeds are fixed).
"""
import itertools
import math

import pytest
import torch
from helpers import chi_square, close, generator, scrambled, whole

from lib.noise import Noise
from mdlm import (
    MDLM,
    Config,
    alpha,
    ancestral,
    choose,
    draw_tokens,
    elbo_weight,
    first_hitting,
    masked_rows,
    time_grid,
)

SCHEDULES = 'linear', 'polynomial', 'geometric'
CLOSED_FORMS = {
    'linear': lambda t: 1 - t,
    'polynomial': lambda t: 1 - t * t,
    'geometric': lambda t: math.exp(-(1e-3 ** (1 - t)) * 20**t),
}


def tiny(V=5, L=16, **keys):
    return MDLM(Config(vocab_size=V, block_size=L, hidden=16, num_layers=1, num_heads=2, cond_dim=8, **keys))


def texts(n):
    return torch.randint(5, (n, 16), generator=generator())


def is_share(count, n, p, slack=0.0):
    """A count is Binomial(n, p)."""
    return abs(float(count) - n * p) < 4.5 * abs(n * p * (1 - p)) ** 0.5 + slack


# ------------------------------------------------------------------------------------------------------------
# schedules

@pytest.mark.parametrize('schedule', SCHEDULES)
def test_schedules_are_their_closed_forms(schedule):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    expected = torch.tensor([CLOSED_FORMS[schedule](float(x)) for x in t], dtype=torch.float64)
    torch.testing.assert_close(alpha(t, schedule), expected)
    assert (alpha(t, schedule).diff() < 0).all()


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_elbo_weight_is_minus_alpha_prime_over_one_minus_alpha(schedule):
    t = torch.linspace(0.001, 1, 500, dtype=torch.float64, requires_grad=True)
    a = alpha(t, schedule)
    (slope,) = torch.autograd.grad(a.sum(), t)
    expected = (-slope / (1 - a)).detach()
    torch.testing.assert_close(elbo_weight(t.detach(), schedule), expected, rtol=1e-5, atol=0)


def test_unknown_choices_are_refused():
    with pytest.raises(ValueError, match='schedule.*cosine'):
        tiny(schedule='cosine')
    with pytest.raises(ValueError, match='weighting.*flat'):
        tiny(weighting='flat')


def test_time_grid_runs_from_one_to_zero_in_double_precision():
    assert time_grid(4).tolist() == [1, 0.75, 0.5, 0.25, 0] and time_grid(4).dtype == torch.float64
    for steps in (0, -3):
        with pytest.raises(ValueError, match=f'at least 1, not {steps}'):
            time_grid(steps)


# ------------------------------------------------------------------------------------------------------------
# SUBS

def test_subs():
    """The denoiser gives distributions over the V words, without [mask], at the masked positions only."""
    model = scrambled(tiny(V=5))
    x_t = torch.randint(6, (8, 16), generator=generator())
    logits = model.denoise(x_t, x_t == 5)
    assert logits.shape == ((x_t == 5).sum(), 5) and logits.isfinite().all()
    torch.testing.assert_close(logits.float().softmax(-1).sum(-1), torch.ones(len(logits)))


def test_denoise_answers_row_by_row():
    """Skipping sequences in which nothing is asked does not mix up the others."""
    model = scrambled(tiny())
    x_t = torch.randint(6, (6, 16), generator=generator())
    where = (x_t == 5) & (torch.arange(6) % 3 != 1)[:, None]
    full = model.head(model.dit(model.embed(x_t)))
    torch.testing.assert_close(model.denoise(x_t, where), full[where])


@pytest.mark.parametrize('sampler', MDLM.samplers)
def test_samples_hold_words_and_keep_what_was_given(sampler):
    model = scrambled(tiny())
    x = torch.randint(6, (64, 16), generator=generator())
    y = model.sample(64, 7, sampler=sampler, x=x.clone(), generator=generator())
    assert y.min() >= 0 and y.max() < 5
    assert torch.equal(y[x != 5], x[x != 5])
    assert (y[x == 5].bincount(minlength=5) > 0).all()
    assert model.sample(3, 7, sampler=sampler).shape == (3, 16)


def test_a_seed_repeats_its_samples():
    model = scrambled(tiny())
    a, b, c = (model.sample(8, 4, generator=generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


# ------------------------------------------------------------------------------------------------------------
# the loss

@pytest.mark.parametrize('schedule', SCHEDULES)
def test_corruption_masks_at_rate_one_minus_alpha(schedule):
    model, x = tiny(schedule=schedule), texts(2000)
    for t in (0.1, 0.5, 0.95):
        x_t, mask = model.corrupt(x, torch.full((2000,), t), whole(2000))
        assert torch.equal(x_t == 5, mask) and torch.equal(x_t[~mask], x[~mask])
        assert is_share(mask.sum(), mask.numel(), 1 - CLOSED_FORMS[schedule](t))


@pytest.mark.parametrize('schedule, weighting', [(s, w) for s in SCHEDULES for w in ('elbo', 'constant')])
def test_loss_of_a_uniform_model_given_the_masks(schedule, weighting):
    """weight(t) * masked count * log V / L, averaged over the batch.

    So no masked position is lost, and none counts twice.
    """
    model, x = tiny(schedule=schedule, weighting=weighting), texts(64)
    for step in range(10):
        noise = whole(64, step=step)
        loss, logs = model(x, noise)
        t = (1e-4 + (1 - 1e-4) * noise.times('t_x', shuffled=False)).double()
        count = model.corrupt(x, t.float(), noise)[1].sum(dim=1)
        weight = elbo_weight(t, schedule) if weighting == 'elbo' else 1.0
        expected = float((weight * count).mean()) * math.log(5) / 16
        assert loss.item() == pytest.approx(expected, rel=1e-4)
        assert logs['overflow'] == 0 and logs['loss'] == loss


@pytest.mark.parametrize('schedule, weighting, expected', [
    ('linear', 'elbo', 1.0), ('polynomial', 'elbo', 1.0),
    ('geometric', 'elbo', 0.999),  # the reconstruction term has the rest
    ('linear', 'constant', 1 / 2), ('polynomial', 'constant', 1 / 3)])
def test_loss_of_a_uniform_model_is_log_V(schedule, weighting, expected):
    """With the ELBO's weights; with constant weights it is log V times the mean masked share."""
    model, x = tiny(schedule=schedule, weighting=weighting), texts(1024)
    with torch.no_grad():
        losses = torch.stack([model(x, whole(1024, step=step))[0] for step in range(120)])
    # t >= 1e-4 shifts the constant weight's mean by half of that
    assert close(losses / math.log(5), expected + 5e-5)
    assert losses.std() / 120**0.5 < 0.005  # the bound above is sharp enough to mean something


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_nll_of_a_uniform_model_is_L_log_V(schedule):
    model, x = tiny(schedule=schedule), texts(4096)
    nats = torch.cat([model.nll(x, whole(4096, step=step)) for step in range(10)])
    assert nats.shape == (40960,) and close(nats, 16 * math.log(5))


def test_only_the_geometric_schedule_has_a_reconstruction_term():
    """It starts at alpha_0 = .999: on average (1 - alpha_0) L log V nats of a uniform model."""
    x = texts(4096)
    for schedule in ('linear', 'polynomial'):
        assert tiny(schedule=schedule).reconstruction(x, whole(4096)) == 0
    model = tiny(schedule='geometric')
    with torch.no_grad():
        nats = torch.cat([model.reconstruction(x, whole(4096, step=step)) for step in range(10)])
    assert close(nats, (1 - CLOSED_FORMS['geometric'](0)) * 16 * math.log(5)) and nats.mean() > 0.02
    noise, t = whole(4096), whole(4096).times('t_x')
    mask = model.corrupt(x, t, noise)[1]
    diffusion = elbo_weight(t, 'geometric') * model.masked_nll(torch.zeros(4096, 16, 16), x, mask)
    torch.testing.assert_close(model.nll(x, noise), diffusion + model.reconstruction(x, noise))


def test_loss_and_nll_agree():
    """Training loss and validation bound are one quantity: nats per token against nats per sequence."""
    model, x = scrambled(tiny()), texts(512)
    with torch.no_grad():
        losses = torch.stack([model(x, whole(512, step=step))[0] for step in range(40)])
    nats = torch.stack([model.nll(x, whole(512, step=step + 100)).mean() / 16 for step in range(40)])
    assert abs(losses.mean() - nats.mean()) < 4.5 * ((losses.var() + nats.var()) / 40) ** 0.5


def test_gradient_reaches_masked_positions_only():
    model, x = scrambled(tiny()), texts(8)
    h = torch.randn(8, 16, 16, requires_grad=True)
    t = torch.rand(8, generator=generator())
    mask = torch.rand(8, 16, generator=generator()) < 0.5
    loss, _ = model.token_loss(h, x, mask, t, stratified=False)
    loss.backward()
    assert torch.equal(h.grad.abs().sum(dim=-1) > 0, mask)


@pytest.mark.parametrize('b, total, L', [(16, 16, 16), (8, 32, 16), (4, 4, 64), (1, 64, 32)])
def test_masked_rows_never_overflow(b, total, L):
    """2000 stratified draws: the fixed number of slots takes every masked position, each once."""
    for step in range(2000 // 4):
        noise = Noise(0, step, torch.arange(0, total, total // b), total)
        mask = noise.uniform('mask', L) < noise.times('t_x', shuffled=False)[:, None]
        rows, used, overflow = masked_rows(mask)
        assert overflow == 0
        assert torch.equal(rows[used].sort()[0], mask.flatten().nonzero()[:, 0])
        assert len(rows.unique()) == len(rows)


def test_masked_rows_save_work_and_count_overflow():
    full = torch.ones(64, 128, dtype=torch.bool)
    rows, used, overflow = masked_rows(full)
    assert len(rows) < 0.6 * full.numel() and used.all() and overflow == full.numel() - len(rows)
    rows, used, overflow = masked_rows(full, stratified=False)
    assert len(rows) == full.numel() and overflow == 0


# ------------------------------------------------------------------------------------------------------------
# one draw

LOGITS = torch.tensor([2.0, -1.0, 0.5, 1.5, -2.0, 0.0])


@pytest.mark.parametrize('temperature', [1.0, 0.5, 2.0])
def test_draw_tokens_has_its_law(temperature):
    draws = draw_tokens(LOGITS.expand(40000, 6), temperature, generator=generator())
    weights = torch.tensor([math.exp(x / temperature) for x in LOGITS.tolist()])
    assert chi_square(draws.bincount(minlength=6), weights) < 4.5


def test_temperature_zero_is_the_mode():
    logits = torch.randn(50, 6, generator=generator())
    assert torch.equal(draw_tokens(logits, temperature=0), logits.argmax(dim=1))


@pytest.mark.parametrize('top_p', [0.05, 0.5, 0.8, 0.95])
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p):
    probs = LOGITS.double().softmax(dim=0).tolist()
    nucleus, mass = [], 0.0
    for token in sorted(range(6), key=lambda i: -probs[i]):
        if mass < top_p:
            nucleus.append(token)
            mass += probs[token]
    draws = draw_tokens(LOGITS.expand(20000, 6), top_p=top_p, generator=generator())
    counts = draws.bincount(minlength=6)
    assert sorted(counts.nonzero()[:, 0].tolist()) == sorted(nucleus)
    if len(nucleus) > 1:
        assert chi_square(counts[nucleus], torch.tensor([probs[i] for i in nucleus])) < 4.5


def test_draws_from_bf16_logits_are_made_in_high_precision():
    """A sum of 1000 small probabilities in bf16 would never reach top_p."""
    logits = (0.1 * torch.randn(500, 1000, generator=generator())).bfloat16()
    low, high = (draw_tokens(lg, top_p=0.8, generator=generator(1)) for lg in (logits, logits.double()))
    assert torch.equal(low, high)


# ------------------------------------------------------------------------------------------------------------
# the Gumbel trap: 50k words in 10 classes of 5000, each class .6 times as likely as the one before

CLASSES, SIZE = 10, 5000
CLASS_PROBS = torch.softmax(-0.5 * torch.arange(CLASSES, dtype=torch.float64), dim=0)
WORD_LOGITS = (CLASS_PROBS / SIZE).log().float().repeat_interleave(SIZE)
ENTROPY = float(-(CLASS_PROBS * (CLASS_PROBS / SIZE).log()).sum())
SURPRISE_STD = float((CLASS_PROBS * ((CLASS_PROBS / SIZE).log() + ENTROPY) ** 2).sum()) ** 0.5


def test_large_vocabulary_keeps_rate_and_entropy():
    """256 steps, 2000 positions, 50k fp32 logits: reveals per step and classes of words have their law."""
    mask_id, counts = CLASSES * SIZE, []
    x = ancestral(lambda x_t, where: WORD_LOGITS.expand(int(where.sum()), -1),
                  torch.full((20, 100), mask_id), alpha(time_grid(256)), mask_id, generator=generator(),
                  callback=lambda i, x, z: counts.append((x != mask_id).sum()))
    p = 64 / 256
    assert abs(counts[63] - 2000 * p) < 4.5 * (2000 * p * (1 - p)) ** 0.5
    surprise = -WORD_LOGITS.double()[x.flatten()]
    assert abs(surprise.mean() - ENTROPY) < 4.5 * SURPRISE_STD / 2000**0.5
    assert chi_square((x.flatten() // SIZE).bincount(minlength=CLASSES), CLASS_PROBS) < 4.5


def test_fp32_gumbel_over_the_vocabulary_would_fail_these_bounds():
    """One fp32 Gumbel draw over V + 1 outcomes reveals too rarely, and the rare words least of all.

    The largest of n fp32 uniforms is the largest of n real ones rounded down to a multiple of 2^-24, so it
    can be drawn directly.
    """
    n, reveal = 400_000, 1 / 256
    u32 = torch.rand(1000, generator=generator())
    assert torch.equal(u32 * 2**24, (u32 * 2**24).floor())
    u = torch.rand(n, CLASSES + 1, dtype=torch.float64, generator=generator())
    u[:, :CLASSES] **= 1 / SIZE
    u = ((u * 2**24).floor() / 2**24).float()
    probs = torch.cat((reveal * CLASS_PROBS / SIZE, torch.tensor([1 - reveal]).double()))
    log_p = probs.log().float()
    winner = (log_p - torch.log(-torch.log(u))).argmax(dim=1)
    words = winner[winner < CLASSES]
    assert len(words) < n * reveal - 4.5 * (n * reveal) ** 0.5
    surprise = -(CLASS_PROBS / SIZE).log()[words]
    assert surprise.mean() < ENTROPY - 4.5 * SURPRISE_STD / len(words) ** 0.5


# ------------------------------------------------------------------------------------------------------------
# the reverse process

def constant_denoiser(V=4):
    probs = torch.arange(1.0, V + 1) / sum(range(1, V + 1))
    return probs, lambda x_t, where: probs.log().expand(int(where.sum()), V)


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_ancestral_reveals_at_its_rate(schedule):
    """The masked count after a step is Binomial(positions, 1 - alpha_s); words have the denoiser's law."""
    probs, denoise = constant_denoiser()
    steps, masked = 8, []
    alphas = alpha(time_grid(steps), schedule)
    x = ancestral(denoise, torch.full((2000, 16), 4), alphas, 4, generator=generator(),
                  callback=lambda i, x, z: masked.append(int((x == 4).sum())))
    for i, count in enumerate(masked[:-1]):
        assert is_share(count, 32000, 1 - CLOSED_FORMS[schedule](1 - (i + 1) / steps), slack=1)
    assert len(masked) == steps and masked[-1] == 0
    assert chi_square(x.flatten().bincount(minlength=4), probs) < 4.5


def table_of(joint):
    """p(x) over V^L sequences -> p(x_l | visible tokens) for every partial sequence: (V + 1, ..., L, V)."""
    L, V = joint.dim(), len(joint)
    table = torch.zeros(*[V + 1] * L, L, V, dtype=torch.float64)
    for state in itertools.product(range(V + 1), repeat=L):
        agrees = torch.ones_like(joint)
        for l, token in enumerate(state):
            if token < V:
                keep = torch.zeros(V, dtype=torch.float64)
                keep[token] = 1
                agrees = agrees * keep.view([V if i == l else 1 for i in range(L)])
        posterior = joint * agrees
        for l in range(L):
            table[state][l] = posterior.sum(dim=[i for i in range(L) if i != l]) / posterior.sum()
    return table


def lookup(table):
    """The exact denoiser of that joint distribution."""
    return lambda x_t, where: table[tuple(x_t.T)][where].log()


JOINT = torch.rand(2, 2, 2, dtype=torch.float64, generator=generator(3)) ** 2 + 0.02
JOINT = JOINT / JOINT.sum()
STATES = list(itertools.product(range(3), repeat=3))  # of x_t: 2 is [mask]


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_reverse_step_has_the_exact_marginals(schedule):
    """Each position of x_s has the marginals of q(x_s | x_t), for every x_t over 2 words and 3 positions.

    q(x_s | x_t) is found by enumeration.
    """
    t, s = (0.7, 0.4) if schedule != 'geometric' else (0.85, 0.6)
    a_t, a_s = CLOSED_FORMS[schedule](t), CLOSED_FORMS[schedule](s)

    def q(later, earlier, keep):
        """q(later | earlier) of the forward process, which keeps each word with probability `keep`."""
        p = 1.0
        for new, old in zip(later, earlier):
            if old == 2:
                p *= 1.0 if new == 2 else 0.0
            else:
                p *= keep if new == old else 1 - keep if new == 2 else 0.0
        return p
    all_texts = list(itertools.product(range(2), repeat=3))
    q_s = {x_s: sum(float(JOINT[x]) * q(x_s, x, a_s) for x in all_texts) for x_s in STATES}
    n = 20000
    x_t = torch.tensor(STATES).repeat_interleave(n, dim=0)
    after_one = []
    ancestral(lookup(table_of(JOINT)), x_t, torch.tensor([a_t, a_s, 1.0]).double(), 2, generator=generator(),
              callback=lambda i, x, z: after_one.append(x.clone()))
    drawn = after_one[0].view(len(STATES), n, 3)
    for i, state in enumerate(STATES):
        posterior = {x_s: q_s[x_s] * q(state, x_s, a_t / a_s) for x_s in STATES}
        for l in range(3):
            for v in range(3):
                p = sum(w for x_s, w in posterior.items() if x_s[l] == v) / sum(posterior.values())
                assert is_share((drawn[i, :, l] == v).sum(), n, p, slack=1e-6)


def step_kernel(table, a_t, a_s):
    """One reverse step over the 27 states, by enumeration: (27, 27)."""
    stay = (1 - a_s) / (1 - a_t)
    kernel = torch.zeros(27, 27, dtype=torch.float64)
    for i, x_t in enumerate(STATES):
        for j, x_s in enumerate(STATES):
            p = 1.0
            for l in range(3):
                if x_t[l] < 2:
                    p *= float(x_s[l] == x_t[l])
                else:
                    p *= stay if x_s[l] == 2 else (1 - stay) * float(table[x_t][l, x_s[l]])
            kernel[i, j] = p
    return kernel


WORDS = [i for i, state in enumerate(STATES) if 2 not in state]


def sequence_counts(x):
    return (x @ torch.tensor([4, 2, 1])).bincount(minlength=8)


@pytest.mark.parametrize('steps', [1, 2, 5])
def test_ancestral_in_few_steps_has_the_law_of_its_kernels(steps):
    """Which differs from p(x): positions revealed together are drawn independently of each other."""
    table, p = table_of(JOINT), torch.eye(27, dtype=torch.float64)[-1]
    for a_t, a_s in itertools.pairwise(torch.linspace(0, 1, steps + 1).tolist()):
        p = p @ step_kernel(table, a_t, a_s)
    start = torch.full((40000, 3), 2)
    x = ancestral(lookup(table), start, alpha(time_grid(steps)), 2, generator=generator())
    assert chi_square(sequence_counts(x), p[WORDS]) < 4.5
    assert steps > 2 or chi_square(sequence_counts(x), JOINT.flatten()) > 4.5


def test_first_hitting_is_exact():
    """Its law is p(x) itself, in L calls; so is that of ancestral in the limit of many steps."""
    denoise, calls = lookup(table_of(JOINT)), []

    def counting(x_t, where):
        calls.append(where.sum(dim=1))
        return denoise(x_t, where)
    x = first_hitting(counting, torch.full((40000, 3), 2), 2, generator=generator())
    assert chi_square(sequence_counts(x), JOINT.flatten()) < 4.5
    assert len(calls) == 3 and all((c == 1).all() for c in calls)
    x = ancestral(denoise, torch.full((10000, 3), 2), alpha(time_grid(1000)), 2, generator=generator())
    assert chi_square(sequence_counts(x), JOINT.flatten()) < 4.5


def test_first_hitting_fills_a_prompt_by_its_conditional():
    """Rows with different numbers of [mask]s take as many calls as the emptiest row has."""
    prompts = torch.tensor([[2, 1, 2], [0, 2, 1], [1, 0, 1]]).repeat_interleave(10000, dim=0)
    denoise, calls = lookup(table_of(JOINT)), []

    def counting(x_t, where):
        calls.append(1)
        return denoise(x_t, where)
    x = first_hitting(counting, prompts, 2, generator=generator())
    assert len(calls) == 2 and torch.equal(x[prompts != 2], prompts[prompts != 2])
    pairs = x[:10000, 0] * 2 + x[:10000, 2]
    assert chi_square(pairs.bincount(minlength=4), JOINT[:, 1].flatten()) < 4.5
    assert chi_square(x[10000:20000, 1].bincount(minlength=2), JOINT[0, :, 1]) < 4.5


# ------------------------------------------------------------------------------------------------------------
# ReMDM

def test_remdm_with_eta_zero_is_ancestral():
    model = scrambled(tiny())
    a = model.sample(32, 9, generator=generator())
    b = model.sample(32, 9, sampler='remdm', eta=0.0, generator=generator())
    c = model.sample(32, 9, sampler='remdm', eta=1.0, generator=generator())
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize('eta', [0.3, 1.0])
@pytest.mark.parametrize('schedule', SCHEDULES)
def test_remdm_keeps_the_marginals(schedule, eta):
    """Words are masked again; still the masked share after every step is 1 - alpha_s, and 0 at the end."""
    probs, denoise = constant_denoiser()
    steps, states = 10, []
    x = ancestral(denoise, torch.full((2000, 16), 4), alpha(time_grid(steps), schedule), 4, eta=eta,
                  generator=generator(), callback=lambda i, x, z: states.append(x.clone()))
    for i, state in enumerate(states[:-1]):
        p = 1 - CLOSED_FORMS[schedule](1 - (i + 1) / steps)
        assert is_share((state == 4).sum(), 32000, p, slack=1)
        words = state[state != 4]
        assert len(words) < 100 or chi_square(words.bincount(minlength=4), probs) < 4.5
    assert (x != 4).all()
    assert any(((a != 4) & (b == 4)).any() for a, b in itertools.pairwise(states))


def test_remdm_never_masks_what_was_given():
    _, denoise = constant_denoiser()
    x, states = torch.randint(5, (500, 16), generator=generator()), []
    ancestral(denoise, x, alpha(time_grid(10)), 4, eta=1.0, generator=generator(),
              callback=lambda i, y, z: states.append(y.clone()))
    assert all(torch.equal(y[x != 4], x[x != 4]) for y in states)


@pytest.mark.parametrize('eta', [0.0, 0.5, 1.0])
def test_choose_has_remdm_rates(eta):
    """For words sigma = eta min(1, (1 - alpha_s) / alpha_t).

    For [mask]s (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t).
    """
    a_t, a_s, n = torch.tensor(0.7).double(), torch.tensor(0.8).double(), 100_000
    x = torch.tensor([0, 1]).repeat(n, 1)  # 1 is [mask]
    reveal, remask = choose(x, a_t, a_s, 1, eta, torch.zeros_like(x, dtype=torch.bool), generator())
    sigma = eta * min(1, 0.2 / 0.7)
    rate = (0.8 - (1 - sigma) * 0.7) / 0.3
    assert not reveal[:, 0].any() and not remask[:, 1].any()
    assert is_share(remask[:, 0].sum(), n, sigma, slack=1e-6)
    assert is_share(reveal[:, 1].sum(), n, rate, slack=1e-6)


# ------------------------------------------------------------------------------------------------------------
# the bound

def model_table(model, V, L):
    """log p_theta of every position given every partial sequence, from the network itself: (..., L, V)."""
    states = torch.tensor(list(itertools.product(range(V + 1), repeat=L)))
    with torch.no_grad():
        logits = model.denoise(states, torch.ones_like(states, dtype=torch.bool))
    return logits.double().log_softmax(dim=-1).view(*[V + 1] * L, L, V)


def log_p_along(table, x, order):
    """log p of x, its positions revealed one by one in that order."""
    state, total = [len(table) - 1] * len(x), 0.0
    for l in order:
        total += float(table[tuple(state)][l, x[l]])
        state[l] = x[l]
    return total


def nats_of(model, x):
    """Many estimates of the bound of one text x of 3 tokens."""
    same = torch.tensor([x]).expand(8192, 3)
    return torch.cat([model.nll(same, whole(8192, step=step)) for step in range(20)])


def test_nll_is_the_average_over_orders():
    """By enumeration: E[nll] = -E_order sum log p(x_i | earlier).

    And so it is at least -log p(x) = -log E_order prod p.
    """
    model = scrambled(tiny(V=2, L=3), seed=4).eval()
    table = model_table(model, 2, 3)
    for x in [(0, 0, 1), (1, 0, 1), (1, 1, 1)]:
        paths = [log_p_along(table, x, order) for order in itertools.permutations(range(3))]
        average = -sum(paths) / 6
        assert close(nats_of(model, x), average)
        assert average >= -math.log(sum(math.exp(path) for path in paths) / 6)
        assert max(paths) - min(paths) > 0.05  # the orders do differ


@pytest.mark.parametrize('schedule', ['polynomial', 'geometric'])
def test_nll_does_not_depend_on_the_schedule(schedule):
    model = scrambled(tiny(V=2, L=3, schedule=schedule), seed=4).eval()
    table, x = model_table(model, 2, 3), (1, 0, 1)
    average = -sum(log_p_along(table, x, order) for order in itertools.permutations(range(3))) / 6
    assert close(nats_of(model, x), average)


def test_nll_is_finite_at_every_time_that_can_be_drawn():
    """Also in the batches whose strata touch t = 0 or 1."""
    model, x = tiny(V=2, L=1), torch.zeros(2**16, 1, dtype=torch.int64)
    model.masked_nll = lambda h, x, mask: mask.sum(dim=1).float()
    model.embed, model.dit = torch.nn.Identity(), torch.nn.Identity()
    for step in range(60):
        assert model.nll(x, whole(2**16, step=step)).isfinite().all()


def test_nll_is_the_mean_of_its_draws():
    """Draw i has the noise of step i; without noise every call has the same."""
    model, x, noise = scrambled(tiny()), texts(8), whole(8, seed=3, step=5)
    draws = [model.nll(x, whole(8, seed=3, step=5 + i)) for i in range(3)]
    torch.testing.assert_close(model.nll(x, noise, draws=3), torch.stack(draws).mean(dim=0))
    assert not torch.equal(draws[0], draws[1])
    assert torch.equal(model.nll(x), model.nll(x)) and torch.equal(model.nll(x), model.nll(x, whole(8)))
    assert not model.nll(x).requires_grad


def test_flops_count_the_backbone():
    model = tiny()
    assert model.flops(16) == 1 * (12 * 16 * 16**2 + 2 * 16**2 * 16)
