"""ldlm.py against closed forms for Gaussian latents; what each part of the recipe does to which gradient.

Statistical bounds are 4.5 standard errors (two-sided chance of failure 7e-6 each, and the seeds are fixed).
"""
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    TINY_RUN,
    Toy,
    at_step,
    chi_square,
    close,
    generator,
    go,
    log,
    open_toy,
    same,
    scrambled,
    spy,
    weights,
    whole,
)
from torch._dynamo.utils import counters

import ldlm
import methods
import train
from ldlm import LDLM, AdaptiveTimes, Config, alpha_sigma, beta, ddim, euler_maruyama, warmup
from lib import checkpoint
from lib.configurator import UserError, configure, defaults_of, idle
from lib.noise import Noise

V, L, D = 11, 6, 16
SMALL = dict(vocab_size=V, block_size=L, hidden=16, num_layers=1, num_heads=2, cond_dim=8, latent_dim=D,
             latent_layers=1, decoder_layers=1, adaptive_bins=8)
FINITE = torch.tensor(True)


class Encoder:
    """A frozen encoder. Its states depend on place and layer; no two features have one mean and variance."""
    width, num_layers, model = D, 3, torch.nn.Linear(1, 1)

    def __init__(self):
        self.layers = []

    def __call__(self, x, blank=None, layer=-1, summary=True):
        self.layers.append(layer)
        e = torch.randn(V, D, generator=generator(5 + layer))[x]
        h = e + e.cumsum(dim=1) / (1 + torch.arange(x.shape[1]))[:, None]
        return h * (1 + torch.arange(D)) + torch.arange(D) ** 2, None


@pytest.fixture(autouse=True)
def few_states(monkeypatch):
    monkeypatch.setattr(ldlm, 'STATE_TOKENS', 600)


def texts(n, seed=0):
    return torch.randint(V, (n, L), generator=generator(seed))


def draw_rows(n):
    return (texts(n),)


def build(**keys):
    """A small LDLM as built, with its encoder. SMALL counts where it has an effect beside the given keys."""
    values = {**SMALL, **keys}
    unused = idle(Config, {**defaults_of(Config), **values}).keys() - keys.keys()
    return attached(Config(**{k: v for k, v in values.items() if k not in unused}))


def of_old_run(**keys):
    """As from a checkpoint of the first edition, which may hold keys without effect."""
    return attached(Config.stored({**SMALL, **keys}))


def attached(config):
    model = LDLM(config)
    if model.encoder_name:
        model.attach(Encoder())
    return model


def begun(model, gamma=1.0):
    """Its weights leave the initialisation, and the statistics of its encoder are gathered."""
    scrambled(model)
    model.begin_step(0, whole(16), draw_rows)
    model.gamma.fill_(gamma)
    return model


def make(gamma=1.0, **keys):
    return begun(build(**keys), gamma)


def gradients(model):
    model.zero_grad()
    model(texts(16), whole(16))[0].backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def part(grads, name):
    return {k: g for k, g in grads.items() if k.startswith(name + '.')}


def moved(grads):
    """Which modules have a gradient."""
    return {k.split('.')[0] for k, g in grads.items() if g is not None and g.any()}


DENOISER = {'dit', 'z_in', 'z_out'}
AUTOENCODER = {'encoder', 'decoder', 'token_decoder', 'head'}
SCRATCH = dict(token_encoder='scratch', reconstruction='ce')


# ------------------------------------------------------------------------------------------------------------
# the schedule

def test_the_schedule_is_the_tangent():
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    alpha, sigma = alpha_sigma(t, 3.0)
    torch.testing.assert_close(alpha, 1 / (1 + 9 * torch.tan(math.pi * t / 2) ** 2).sqrt())
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t))
    assert alpha[0] == 1 and sigma[0] == 0 and abs(alpha[-1]) < 1e-15
    t = torch.linspace(0, 1, 101)  # in fp32 too
    assert all(level.isfinite().all() for level in (*alpha_sigma(t), beta(t)))


def test_beta_is_the_rate_of_the_schedule():
    t = torch.linspace(0.001, 0.95, 500, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(alpha_sigma(t, 3.0)[0].log().sum(), t)
    torch.testing.assert_close(beta(t.detach(), 3.0), -2 * slope)
    assert float(beta(torch.tensor(1.0))) == pytest.approx(float(beta(torch.tensor(0.95))), rel=1e-5)


# ------------------------------------------------------------------------------------------------------------
# samplers: for z_0 ~ N(mu, C) the exact denoiser is linear, so is every sampler, and its law is a recursion
# of mean and covariance

MU, C = torch.tensor([1.0, -0.5]).double(), torch.tensor([[1.5, 0.8], [0.8, 0.6]]).double()
EYE = torch.eye(2).double()


def levels(t, d):
    alpha = 1 / math.sqrt(1 + d * d * math.tan(math.pi * t / 2) ** 2) if t < 1 else 0.0
    return alpha, math.sqrt(1 - alpha * alpha)


def gain(alpha, sigma):
    """E[z_0 | z_t] = mu + gain (z_t - alpha mu)."""
    return alpha * C @ torch.linalg.inv(alpha**2 * C + sigma**2 * EYE)


def exact(z, t, z_self, d=3.0):
    """The exact denoiser."""
    alpha, sigma = levels(float(t), d)
    return MU + (z - alpha * MU) @ gain(alpha, sigma)  # symmetric


def euler_maruyama_law(steps, d=3.0, start=1.0):
    """Mean and covariance of what euler_maruyama returns first, when it starts from z_t at t = start."""
    alpha, sigma = levels(start, d)
    m, S = alpha * MU, alpha**2 * C + sigma**2 * EYE
    for i in range(steps):
        dt = (start - 0.05) / steps
        t = start - dt * i
        alpha, sigma = levels(t, d)
        tan = math.tan(math.pi * min(t, 0.95) / 2)
        rate = math.pi * d * d * tan * (1 + tan * tan) / (1 + d * d * tan * tan) * dt
        G = gain(alpha, sigma)
        A = (1 + rate / 2 - rate / sigma**2) * EYE + rate * alpha / sigma**2 * G
        b = rate * alpha / sigma**2 * (MU - alpha * G @ MU)
        m, S = A @ m + b, A @ S @ A.T
        last = m, S
        S = S + rate * EYE
    return last


def ddim_law(steps, d=3.0):
    m, A = torch.zeros(2).double(), EYE
    for i in range(steps):
        (alpha, sigma), (alpha_s, sigma_s) = levels(1 - i / steps, d), levels(1 - (i + 1) / steps, d)
        G = gain(alpha, sigma)
        step = (alpha_s - sigma_s * alpha / sigma) * G + sigma_s / sigma * EYE
        m = step @ m + (alpha_s - sigma_s * alpha / sigma) * (MU - alpha * G @ MU)
        A = step @ A
    return m, A @ A.T


@pytest.mark.parametrize('d', [1.0, 3.0])
@pytest.mark.parametrize('steps', [1, 4, 9])
def test_ddim_has_its_closed_form(steps, d):
    """The images of 0 and of the two basis vectors give the affine map."""
    start = torch.cat((torch.zeros(1, 2), torch.eye(2))).double()[:, None]
    z = ddim(lambda z, t, z_self: exact(z, t, z_self, d), start, steps, d)[:, 0]
    A = (z[1:] - z[0]).T
    m, S = ddim_law(steps, d)
    torch.testing.assert_close(z[0], m, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(A @ A.T, S, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('steps, start', [(1, 1.0), (3, 1.0), (20, 1.0), (3, 0.4)])
def test_euler_maruyama_has_its_closed_form(steps, start):
    n, (alpha, sigma) = 50000, levels(start, 3.0)
    z_0, eps = torch.randn(2, n, 1, 2, dtype=torch.float64, generator=generator())
    z = alpha * (MU + z_0 @ torch.linalg.cholesky(C).T) + sigma * eps
    found = euler_maruyama(exact, z, steps, generator=generator(1), start=start)
    mean, z_hat = (part[:, 0] for part in found)
    m, S = euler_maruyama_law(steps, start=start)
    assert ((mean.mean(0) - m).abs() < 4.5 * (S.diagonal() / n).sqrt()).all()
    spread = ((S.diagonal()[:, None] * S.diagonal() + S**2) / n).sqrt()  # of a sample covariance's entries
    assert ((torch.cov(mean.T) - S).abs() < 4.5 * spread).all()
    assert z_hat.shape == mean.shape


def test_both_converge():
    """DDIM to the data; Euler-Maruyama to the marginal at t = .05, where its grid ends.

    Errors fall with the number of steps.
    """
    alpha, sigma = levels(0.05, 3.0)
    at_the_end = alpha * MU, alpha**2 * C + sigma**2 * EYE
    for law, (m, S) in ((ddim_law, (MU, C)), (euler_maruyama_law, at_the_end)):
        errors = []
        for steps in (16, 64, 256, 1024):
            mean, cov = law(steps)
            errors.append(max(float((mean - m).abs().max()), float((cov - S).abs().max())))
        assert all(b < a / 2 for a, b in zip(errors, errors[1:])) and errors[-1] < 0.01, errors


def test_the_estimate_is_carried_along():
    """Zeros at first, then the estimate of the step before; N steps are N calls; the callback sees each."""
    for sampler, ends in ((euler_maruyama, 0.05), (ddim, 0.0)):
        calls, seen = [], []

        def denoise(z, t, z_self, calls=calls):
            calls.append((float(t), z_self))
            return torch.full_like(z, len(calls))

        def callback(i, z_hat, seen=seen):
            seen.append((i, float(z_hat.mean())))
        sampler(denoise, torch.randn(3, L, D), 4, callback=callback)
        assert [float(z_self.mean()) for _, z_self in calls] == [0, 1, 2, 3]
        assert [t for t, _ in calls] == pytest.approx([1 - i * (1 - ends) / 4 for i in range(4)])
        assert seen == [(0, 1), (1, 2), (2, 3), (3, 4)]


def test_sampling_by_name():
    """Without the token encoder. The head runs once per text."""
    model = scrambled(build()).eval()
    model.token_encoder = None
    decoded, calls = spy(model, 'tokens'), spy(model, 'denoise')
    for sampler in LDLM.samplers:
        a, b = (model.sample(3, 4, sampler=sampler, generator=generator()) for _ in range(2))
        assert a.shape == (3, L) and a.dtype == torch.int64 and 0 <= a.min() and a.max() < V
        assert torch.equal(a, b)
    assert len(decoded) == 6 and len(calls) == 24
    (last_estimate,), (mean,) = decoded[0][0], decoded[2][0]
    assert torch.equal(last_estimate, calls[3][1]) and torch.equal(calls[3][1], calls[11][1])
    assert not torch.equal(mean, last_estimate)
    shown = []
    x = model.sample(3, 4, callback=lambda *step: shown.append(step), generator=generator())
    assert [i for i, _, _ in shown] == [0, 1, 2, 3] and torch.equal(shown[-1][1], x)
    assert all(torch.equal(model.tokens(z), x) for _, x, z in shown)


def test_there_is_no_likelihood_and_no_prompt():
    assert LDLM.likelihood is None and not LDLM.takes_prompt
    with pytest.raises(ValueError, match='LDLM has no option x'):
        build().sample(2, 4, x=texts(2))


def test_validation():
    """Numbers of its own: of each text, without the decoder's noise, at uniform times."""
    model, x, noise = make().eval(), texts(16), whole(16)
    found = model.validation(x, noise)
    h = model.states(x)
    z = model.encode(h)
    assert list(found) == list(model.validated) == ['diff_loss', 'state_loss', 'accuracy']
    torch.testing.assert_close(found['state_loss'], (model.decode(z) - h).square().mean(dim=(1, 2)))
    assert torch.equal(found['accuracy'], (model.reconstruct(x) == x).float().mean(dim=1))
    # a denoiser that returns zeros, for a latent of ones: an error of 1 in every text
    model.encode, model.denoise = torch.ones_like, lambda z_t, t, z_self: torch.zeros_like(z_t)
    assert torch.equal(model.validation(x, noise)['diff_loss'], torch.ones(16))
    assert make(stage='autoencoder').validated == ('state_loss', 'accuracy')


# ------------------------------------------------------------------------------------------------------------
# the warmup of the encoder's gradient

def test_gamma_is_a_stretched_sigmoid():
    def S(x):
        return 1 / (1 + math.exp(-10 * (x - 0.8)))
    assert warmup(0, 1000) == 0 and warmup(1000, 1000) == 1 and warmup(5000, 1000) == 1 and warmup(0, 0) == 1
    assert warmup(800, 1000) == pytest.approx((0.5 - S(0)) / (S(1) - S(0)))
    values = [warmup(s, 1000) for s in range(1001)]
    assert all(a < b for a, b in zip(values, values[1:]))
    model = make(encoder_warmup=1000)
    for step in (0, 800, 1000):
        model.begin_step(step, whole(16), draw_rows)
        assert float(model.gamma) == pytest.approx(warmup(step, 1000))


@pytest.mark.parametrize('gamma', [0.0, 0.3, 1.0])
def test_gamma_multiplies_what_reaches_the_encoder_and_nothing_else(gamma):
    """Loss and denoiser gradient are the same bits.

    The gradient at z, through input and target alike, is gamma times as large.
    """
    def diffusion(gamma):
        model = make(gamma=gamma)
        z = torch.randn(16, L, D, generator=generator()).requires_grad_()
        loss = model.diffusion_loss(z, whole(16))
        loss.backward()
        return loss, z.grad, [p.grad for name in DENOISER for p in getattr(model, name).parameters()]
    loss, at_z, at_denoiser = diffusion(gamma)
    full_loss, full_at_z, full_at_denoiser = diffusion(1.0)
    assert torch.equal(loss, full_loss)
    assert all(torch.equal(a, b) for a, b in zip(at_denoiser, full_at_denoiser))
    assert all(g.any() for g in at_denoiser)
    torch.testing.assert_close(at_z, gamma * full_at_z, rtol=1e-5, atol=1e-9)
    assert full_at_z.abs().min() > 0


def test_gamma_in_the_whole_loss():
    """Encoder gradient = reconstruction + gamma diffusion; latent decoder and denoiser do not know gamma."""
    none, some, full = (gradients(make(gamma=gamma)) for gamma in (0.0, 0.3, 1.0))
    for key in none:
        if key.startswith('encoder'):
            expected = none[key] + 0.3 * (full[key] - none[key])
            atol = 1e-4 * float(full[key].abs().max())
            torch.testing.assert_close(some[key], expected, rtol=1e-3, atol=atol)
            assert not torch.equal(none[key], full[key])
        else:
            assert torch.equal(some[key], full[key]), key


# ------------------------------------------------------------------------------------------------------------
# adaptive times

def curve(t):
    """A loss that rises slowly, then fast: slopes from .3 to 2.1, mean 1.1."""
    return 0.2 + 0.3 * t + 0.6 * t**2 + 0.2 * t**3


def test_the_loss_becomes_linear_in_the_warped_time():
    times = AdaptiveTimes(20, 0.999, 0.1)
    for step in range(40):
        t = times.draw(whole(2000, step=step))
        times.track(t, curve(t))
        times.learn(FINITE)
        if step == 19:
            times.refresh()
    times.refresh()
    edges = torch.linspace(0, 1, 21)
    rise = curve(edges).diff() / (curve(torch.tensor(1.0)) - curve(torch.tensor(0.0)))
    # the curvature within the outermost bins is not seen
    torch.testing.assert_close(times.p, rise, rtol=0.15, atol=0)
    quantile = torch.cat((torch.zeros(1), times.p.cumsum(0)))  # F(t) at the edges
    line = curve(edges[0]) + quantile * (curve(edges[-1]) - curve(edges[0]))
    torch.testing.assert_close(curve(edges), line, rtol=0.01, atol=0)
    # and so the loss of equal shares of the draws rises by equal steps
    t = times.draw(whole(50000)).sort().values
    steps = torch.stack([curve(q).mean() for q in t.chunk(5)]).diff()
    torch.testing.assert_close(steps, steps.mean().expand(4), rtol=0.05, atol=0)
    u = torch.stack([curve(q).mean() for q in torch.linspace(0, 1, 50000).chunk(5)]).diff()
    assert u.max() > 2 * u.min()  # which uniform times do not do


def test_draws_follow_p():
    """In the right proportions over the bins, and uniform within each.

    They are stratified: as near to p as one batch can be.
    """
    times = AdaptiveTimes(5, 0.999, 0.1)
    times.p.copy_(torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2]))
    t = torch.stack([times.draw(whole(64, step=step)) for step in range(300)])
    assert 0 <= t.min() and t.max() <= 1
    counts = torch.stack([(row * 5).long().clamp(max=4).bincount(minlength=5) for row in t])
    assert ((counts - 64 * times.p).abs() <= 2).all()
    one_row = (t[:, 0] * 5).long().bincount(minlength=5)  # over the steps its draws are independent
    assert chi_square(one_row, times.p) < 4.5
    within = (t.flatten() * 5) % 1
    assert chi_square((within * 10).long().clamp(max=9).bincount(minlength=10), torch.ones(10)) < 4.5


def test_bins_hold_running_means():
    """What has been tracked counts from the end of the step on."""
    times = AdaptiveTimes(4, 0.5, 0.1)
    times.track(torch.tensor([0.0, 0.2, 1.0]), torch.tensor([2.0, 10.0, 3.0]))
    assert not times.sums.any()
    times.learn(FINITE)
    assert torch.equal(times.sums, torch.tensor([[12.0, 0, 0, 3], [2, 0, 0, 1]]))
    times.forget()
    times.track(torch.tensor([0.9]), torch.tensor([6.0]))
    times.learn(FINITE)
    assert torch.equal(times.sums[:, 3], torch.tensor([1.5 + 6, 1.5]))  # the past has half its weight
    parts, all_at_once = AdaptiveTimes(4, 0.5, 0.1), AdaptiveTimes(4, 0.5, 0.1)
    t, losses = torch.rand(12, generator=generator()), torch.rand(12, generator=generator(1))
    for i in range(0, 12, 3):
        parts.track(t[i:i + 3], losses[i:i + 3])
    parts.learn(FINITE)
    all_at_once.track(t, losses)
    all_at_once.learn(FINITE)
    torch.testing.assert_close(parts.sums, all_at_once.sums)


def test_every_bin_is_visited_and_nothing_is_guessed():
    times = AdaptiveTimes(4, 1.0, 0.1)
    times.track(torch.tensor([0.1, 0.6]), torch.tensor([1.0, 2.0]))
    times.learn(FINITE)
    times.refresh()
    assert torch.equal(times.p, torch.full((4,), 0.25))  # two bins have not been seen
    # means 1, 1, 4, 3; so at the edges 1, 1, 2.5, 3.5, 2.5; so rises 0, 1.5, 1, -1
    times.sums.copy_(torch.tensor([[1.0, 1, 8, 3], [1, 1, 2, 1]]))
    times.forget()  # nothing, with a memory of 1
    times.refresh()
    # at least a tenth of 2.5 / 4
    torch.testing.assert_close(times.p, torch.tensor([0.0625, 1.5, 1, 0.0625]) / 2.625)
    torch.testing.assert_close(times.by_quarter(), torch.tensor([1.0, 1, 4, 3]))
    times.track(torch.tensor([0.1]), torch.tensor([4.0]))  # of this step: the log shows it already
    torch.testing.assert_close(times.by_quarter(), torch.tensor([2.5, 1, 4, 3]))
    times.sums.fill_(1.0)
    times.refresh()
    torch.testing.assert_close(times.p, torch.full((4,), 0.25))  # a flat loss


def test_begin_step_forgets_once_and_refreshes_in_its_time():
    """However many micro-batches come between."""
    model = make(adaptive_every=5, adaptive_memory=0.9)
    refreshed = spy(model.times, 'refresh')
    for step in range(11):
        before, noise = model.times.sums.clone(), whole(16, step=step)
        model.begin_step(step, noise, draw_rows)
        torch.testing.assert_close(model.times.sums, 0.9 * before)
        for i in range(0, 16, 4):
            model(texts(16)[i:i + 4], noise[i:i + 4])
        model.end_step(FINITE, noise)
        seen = float(0.9 * before[1].sum()) + 16
        assert float(model.times.sums[1].sum()) == pytest.approx(seen, rel=1e-5)
    assert len(refreshed) == 2
    fixed = make(adaptive_t=False)
    refreshed, calls = spy(fixed.times, 'refresh'), spy(fixed, 'denoise')
    fixed.begin_step(fixed.config.adaptive_every, whole(16), draw_rows)
    fixed(texts(16), whole(16))
    assert not refreshed and torch.equal(calls[0][0][1], whole(16).times('t'))


# ------------------------------------------------------------------------------------------------------------
# what reaches what

def test_the_tokens_have_no_say_in_the_latent_space():
    """Bit for bit: with and without the token loss the same gradient for encoder, decoder and denoiser."""
    with_tokens, without = gradients(make()), gradients(make(token_loss=False))
    assert moved(with_tokens) == AUTOENCODER | DENOISER
    assert moved(without) == {'encoder', 'decoder'} | DENOISER
    assert all(g is None for name in ('token_decoder', 'head') for g in part(without, name).values())
    assert all(torch.equal(with_tokens[k], without[k]) for k in with_tokens if without[k] is not None)


def test_unless_they_are_the_reconstruction():
    mse, ce, both = (gradients(make(gamma=0.0, reconstruction=kind)) for kind in ('mse', 'ce', 'both'))
    for name in ('encoder', 'decoder'):
        for key in part(mse, name):
            atol = 1e-4 * float(both[key].abs().max())
            torch.testing.assert_close(both[key], mse[key] + ce[key], rtol=1e-3, atol=atol)
            assert ce[key].any()
    for name in ('token_decoder', 'head', *DENOISER):
        assert all(torch.equal(mse[k], both[k]) and torch.equal(mse[k], ce[k]) for k in part(mse, name))


def test_the_loss_is_the_sum_of_its_parts():
    """And each part is what the paper's equation says."""
    model, x, noise = make(), texts(16), whole(16)
    loss, logs = model(x, noise)
    parts = logs['diff_loss'] + logs['state_loss'] + logs['token_loss']
    torch.testing.assert_close(loss.detach(), parts)
    with torch.no_grad():
        h = model.states(x)
        z = model.encode(h)
        h_hat = model.decoder(z + 3 * noise.normal('decoder', L, D))
        torch.testing.assert_close(logs['state_loss'], ((h_hat - h) ** 2).mean())
        logits = model.head(model.token_decoder(h_hat))
        expected = F.cross_entropy(logits.flatten(0, 1), x.flatten())
        torch.testing.assert_close(logs['token_loss'], expected)
        right = (logits.argmax(-1) == x).flatten()[::2].float().mean()
        assert float(logs['accuracy']) == pytest.approx(float(right))
        torch.testing.assert_close(logs['latent_norm'], (z**2).sum(-1).sqrt().mean())
        variances = torch.stack([z[..., i].var() for i in range(D)])
        torch.testing.assert_close(logs['latent_var'], variances.mean())
    assert all(v.isfinite() and not v.requires_grad for v in logs.values())
    assert float(logs['time_bins']) == pytest.approx(8)


def inputs_of(module):
    """What a module is called with from now on."""
    inputs = []
    module.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    return inputs


def test_noise_at_the_decoder_in_training_and_never_else():
    model, x = make(), texts(16)
    inputs = inputs_of(model.decoder)
    z = model.encode(model.states(x)).detach()
    noises = []
    for step in range(50):
        model(x, whole(16, step=step))
        noises.append(inputs.pop() - z)
    noises = torch.stack(noises).flatten()
    assert abs(noises.std() - 3) < 4.5 * 3 / (2 * len(noises)) ** 0.5 and close(noises, 0)
    model.reconstruct(x)
    assert torch.equal(inputs.pop(), z)
    quiet = make(sigma_dec=0.0)
    inputs = inputs_of(quiet.decoder)
    quiet(x, whole(16))
    assert torch.equal(inputs.pop(), quiet.encode(quiet.states(x)).detach())


def test_self_conditioning_is_one_pass_more_without_gradient():
    model = make(adaptive_t=False)
    grads_on = []
    model.dit.register_forward_pre_hook(lambda *args: grads_on.append(torch.is_grad_enabled()))
    calls, share = spy(model, 'denoise'), []
    for step in range(100):
        model(texts(16), whole(16, step=step))
        (first, estimate), (second, _) = calls
        assert grads_on == [False, True] and not estimate.requires_grad and not first[2].any()
        assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
        used = second[2].flatten(1).any(dim=1)
        assert torch.equal(second[2], estimate * used[:, None, None])
        share.append(used.float())
        calls.clear(), grads_on.clear()
    assert close(torch.cat(share), 0.5)
    never = make(self_conditioning=0.0)
    calls = spy(never, 'denoise')
    never(texts(16), whole(16))
    assert len(calls) == 1 and not calls[0][0][2].any()


def test_the_extra_pass_does_not_cost_the_denoiser_its_gradient():
    """Autocast caches low-precision weights.

    Those cached in the pass without gradient must not serve the one with.
    """
    model = make()
    model.zero_grad()
    with torch.autocast('cpu', torch.bfloat16):
        loss, _ = model(texts(16), whole(16))
    loss.backward()
    low = {name: p.grad for name, p in model.named_parameters()}
    assert all(g is not None and g.any() for g in low.values())
    full = gradients(model)
    for name in ('dit.blocks.0.modalities.0.qkv.weight', 'z_in.weight', 'z_out.weight'):
        assert F.cosine_similarity(low[name].flatten(), full[name].flatten(), dim=0) > 0.98


# ------------------------------------------------------------------------------------------------------------
# the states

def test_statistics_are_per_feature_and_in_the_checkpoint():
    model, asked = build(), []

    def draw(n):
        asked.append(n)
        return (texts(n),)
    model.begin_step(0, whole(16), draw)
    assert asked == [100]  # 600 tokens
    h = model.states(texts(100)).flatten(0, 1)
    torch.testing.assert_close(h.mean(dim=0), torch.zeros(D), rtol=0, atol=1e-4)
    torch.testing.assert_close(h.var(dim=0, unbiased=False), torch.ones(D), rtol=1e-4, atol=0)
    other = build()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.states(texts(4)), model.states(texts(4)))
    other.begin_step(0, whole(16), None)  # they came along: no rows are drawn again
    assert torch.equal(other.states(texts(4)), model.states(texts(4)))
    assert not any('frozen' in k or 'token_encoder' in k for k in model.state_dict())


def test_the_layer_is_asked_for():
    for layer in (-1, 0, -3):
        model = make(layer=layer)
        model.states(texts(2))
        assert set(model.token_encoder.layers) == {layer}


def test_trained_embeddings():
    model = make(**SCRATCH)
    assert model.encoder_name == ''
    assert model.embed.weight.shape == (V, D)
    assert torch.equal(model.states(texts(2)), model.embed(texts(2)))
    assert 'embed' in moved(gradients(model))
    direct = make(**SCRATCH, latent_encoder='none')  # Diffusion-LM: the embeddings are the latents
    assert torch.equal(direct.encode(direct.states(texts(2))), direct.embed(texts(2)))
    assert moved(gradients(direct)) == {'embed', 'token_decoder', 'head'} | DENOISER


def test_reconstruction_and_interpolation():
    """Of a model that has learned to read its latents: between two texts lie both, at the ends."""
    torch.manual_seed(0)
    model = build(latent_encoder='none', decoder_layers=0, sigma_dec=0.0, stage='autoencoder')
    model.begin_step(0, whole(16), draw_rows)
    optimizer = torch.optim.Adam(model.head.parameters(), lr=0.03)
    for step in range(150):
        optimizer.zero_grad()
        loss, logs = model(texts(16, seed=step), whole(16))
        loss.backward()
        optimizer.step()
    x, y = texts(8, seed=1000), texts(8, seed=1001)
    share = (model.reconstruct(x) == x).float().mean()
    assert share > 0.9
    path = model.interpolate(x, y, [0.0, 0.5, 1.0])
    assert path.shape == (3, 8, L)
    assert torch.equal(path[0], model.reconstruct(x)) and torch.equal(path[2], model.reconstruct(y))


# ------------------------------------------------------------------------------------------------------------
# keys

def test_perceiver_is_its_plain_definition():
    """One block in loops: queries from the latents, keys and values from latents and context.

    Each place has an angle of its own.
    """
    torch.manual_seed(0)
    block = scrambled(ldlm.Block(8, 2, context=True, swiglu=False))
    x, context = torch.randn(1, 3, 8), torch.randn(1, 3, 8)
    cos, sin = ldlm.rope_table(3, 4)

    def rms(v, weight):
        return v / (v.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    def turn(v, l):
        a, b = v[:2], v[2:]
        return torch.cat((a * cos[l] - b * sin[l], b * cos[l] + a * sin[l]))
    W_q, W_k, W_v = block.qkv.weight.chunk(3)
    W_k_context, W_v_context = block.kv_context.weight.chunk(2)
    nx, nc = rms(x[0], block.norm1.weight), rms(context[0], block.norm_context.weight)
    keys = [(W_k, nx[j], j) for j in range(3)] + [(W_k_context, nc[j], j) for j in range(3)]
    values = [W_v @ nx[j] for j in range(3)] + [W_v_context @ nc[j] for j in range(3)]
    out = []
    for l in range(3):
        heads = []
        for head in (slice(0, 4), slice(4, 8)):
            q = turn(rms((W_q @ nx[l])[head], block.norm_q.weight), l)
            ks = [turn(rms((W @ n)[head], block.norm_k.weight), j) for W, n, j in keys]
            weights = torch.stack([q @ k / 2 for k in ks]).softmax(0)
            heads.append(sum(w * v[head] for w, v in zip(weights, values)))
        out.append(x[0, l] + block.out.weight @ torch.cat(heads))
    y = torch.stack(out)
    n = F.layer_norm(y, (8,), block.norm2.weight, block.norm2.bias)
    y = y + F.linear(F.gelu(F.linear(n, block.up.weight, block.up.bias)), block.down.weight, block.down.bias)
    torch.testing.assert_close(block(x, cos, sin, context)[0], y)


def test_latent_encoders():
    perceiver, attention, none = (make(latent_encoder=kind) for kind in ('perceiver', 'attention', 'none'))
    h = perceiver.states(texts(4))
    assert perceiver.encoder[0].queries.shape == (L, D) and attention.encoder[0].queries is None
    assert torch.equal(none.encode(h), h)
    assert not list(none.encoder.parameters()) and not list(none.decoder.parameters())
    assert 'state_loss' not in none(texts(16), whole(16))[1]
    assert moved(gradients(none)) == {'token_decoder', 'head'} | DENOISER
    assert moved(gradients(attention)) == AUTOENCODER | DENOISER
    for model in (perceiver, attention):  # every latent has seen every state
        h = model.states(texts(1)).requires_grad_()
        (g,) = torch.autograd.grad(model.encode(h)[0, 0].sum(), h)
        assert g.abs().sum(-1).min() > 0


def test_token_decoders():
    layers = [sum(p.numel() for p in make(decoder_layers=n).token_decoder.parameters()) for n in (0, 1, 2)]
    assert layers[0] == 0 and layers[2] - D == 2 * (layers[1] - D)
    short = make(decode_from='latents')
    inputs = []
    short.token_decoder.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    z = short.encode(short.states(texts(16)))
    short.tokens(z)
    assert inputs.pop() is z
    short(texts(16), whole(16))
    source = inputs.pop()
    torch.testing.assert_close(source, (z + 3 * whole(16).normal('decoder', L, D)).detach())
    assert not source.requires_grad


@pytest.mark.parametrize('stage, trained, losses', [
    ('joint', AUTOENCODER | DENOISER, {'diff_loss', 'state_loss', 'token_loss'}),
    ('autoencoder', AUTOENCODER, {'state_loss', 'token_loss'}),
    ('diffusion', DENOISER, {'diff_loss'}),
    ('decoder', {'token_decoder', 'head'}, {'token_loss'})])
def test_stages(stage, trained, losses):
    """What is trained, and that the rest has no gradient at all (so that no optimizer moves it)."""
    model = make(stage=stage)
    grads = gradients(model)
    assert moved(grads) == trained
    assert all(g is None for k, g in grads.items() if k.split('.')[0] not in trained)
    logs = model(texts(16), whole(16))[1]
    assert {k for k in logs if k.endswith('_loss')} == losses
    if stage == 'decoder':
        with pytest.raises(ValueError, match='token_loss=False has no effect'):
            build(stage=stage, decode_from='latents', token_loss=False)
        short = begun(of_old_run(stage=stage, decode_from='latents', token_loss=False))
        inputs = spy(short.decoder, 'forward')
        assert moved(gradients(short)) == trained and not inputs


@pytest.mark.parametrize('stage, share', [
    ('joint', 0.4), ('autoencoder', 0.4), ('diffusion', 0), ('decoder', 0)])
def test_masked_states_are_the_encoders_alone(stage, share):
    """A share of the places is hidden from the encoder; the target is whole.

    Nothing is hidden where the encoder is frozen, and the key is refused there.
    """
    if share:
        model = make(mask_states=0.4, stage=stage)
    else:
        with pytest.raises(ValueError, match='mask_states=0.4 has no effect'):
            build(mask_states=0.4, stage=stage)
        model = begun(of_old_run(mask_states=0.4, stage=stage))
    calls, hidden = spy(model, 'encode'), []
    for step in range(30):
        model(texts(16), whole(16, step=step))
        (h,), _ = calls.pop()
        hidden.append((h == 0).all(dim=-1).float().flatten())
        shown = hidden[-1].view(16, L) == 0
        assert torch.equal(h[shown], model.states(texts(16))[shown])
    assert close(torch.cat(hidden), share) if share else not torch.cat(hidden).any()


@pytest.mark.parametrize('wrong, words', [
    (dict(latent_encoder='lstm'), 'latent_encoder is one of .* not'), (dict(stage='all'), 'stage is one of'),
    (dict(decode_from='z'), 'decode_from is one of'), (dict(reconstruction='kl'), 'reconstruction is one of'),
    (dict(token_encoder='scratch'), 'reconstruction=ce'), (dict(latent_dim=20), 'heads of width 8'),
    (dict(reconstruction='ce', token_loss=False), 'token_loss=True'),
    (dict(reconstruction='both', decode_from='latents'), 'decode_from=states'),
    (dict(stage='autoencoder', latent_encoder='none', token_loss=False), 'trains nothing'),
    (dict(latent_layers=0), 'latent_layers must be at least 1')])
def test_choices_that_make_no_sense(wrong, words):
    with pytest.raises(ValueError, match=words):
        build(**wrong)


def test_the_encoder_has_to_fit():
    with pytest.raises(ValueError, match='--latent_dim=16, not 24'):
        build(latent_dim=24)
    for layer in (-5, 4):
        with pytest.raises(ValueError, match=f'has 3 layers: .* not {layer}'):
            build(layer=layer)
    for layer in (-4, 3):
        assert build(layer=layer).token_encoder.num_layers == 3


def test_an_encoder_is_opened_checked_and_attached(monkeypatch):
    """It has to read the data, but need no summary; it comes with the fingerprint of its weights."""
    asked = []
    monkeypatch.setattr(methods, 'open_encoder', lambda name, device: Encoder())
    monkeypatch.setattr(methods, 'check_tokenizer', lambda *args: asked.append(args[1:]))
    model = build(token_encoder='out/some_ar')
    model.token_encoder = None
    assert model.encoder_name == 'out/some_ar'
    assert methods.attach_encoder(model, 'data', 'cpu') == checkpoint.fingerprint(Encoder.model)
    assert asked == [('data', False)] and isinstance(model.token_encoder, Encoder)
    assert methods.attach_encoder(model, None, 'cpu') and len(asked) == 1  # random ids are no text
    with pytest.raises(UserError, match='--latent_dim=16, not 24'):
        methods.attach_encoder(LDLM(Config(**{**SMALL, 'latent_dim': 24})), 'data', 'cpu')


@pytest.mark.parametrize('kind', ['scratch', 'frozen'])
def test_a_compiled_step_is_the_same_and_is_compiled_once(kind):
    """One graph; a frozen encoder, whose code is not ours, runs between what comes before and after it."""
    config = dict(encoder_warmup=10, adaptive_every=2, **(SCRATCH if kind == 'scratch' else {}))
    plain, model = make(**config), make(**config)
    torch._dynamo.reset()
    counters.clear()
    model.compile(backend='eager', fullgraph=kind == 'scratch')
    for step in (1, 2, 3):
        for m in (plain, model):
            m.begin_step(step, None, None)
        a, b = (m(texts(16), whole(16, step=step))[0] for m in (plain, model))
        torch.testing.assert_close(a, b)
        for m in (plain, model):
            m.end_step(FINITE, None)
        torch.testing.assert_close(plain.times.sums, model.times.sums)
        assert counters['stats']['unique_graphs'] == (1 if kind == 'scratch' else 2)
    breaks = list(counters['graph_break'])
    assert len(breaks) == (kind == 'frozen') and all('LDLM.raw_states' in b for b in breaks)


# ------------------------------------------------------------------------------------------------------------
# sizes and configs

ROOT = os.path.dirname(train.__file__)


def read(name, *args):
    return configure(train.Config, [os.path.join(ROOT, 'config', name + '.py'), *args], methods.METHODS)


def on_meta(config, V):
    with torch.device('meta'):
        return methods.build({**config, 'vocab_size': V})


def millions(*modules):
    return round(sum(p.numel() for m in modules for p in m.parameters()) / 1e6, 1)


def test_sizes_of_the_paper():
    """Appendix C: about 50M each, 132M, 66M, and 38M for a linear head."""
    m = on_meta(read('lm1b_ldlm'), 50257)
    assert set(m.backbones()) == {m.encoder[0], m.decoder[0], m.token_decoder[0], m.dit}
    sizes = millions(m.encoder), millions(m.decoder), millions(m.z_in, m.dit, m.z_out)
    assert sizes == (50.3, 50.3, 131.2)
    assert (millions(m.token_decoder, m.head), millions(m.head)) == (67.0, 38.6)
    assert millions(on_meta(read('owt_ldlm'), 50257).encoder) == 51.0
    assert millions(on_meta(read('lm1b_ldlm', '--latent_encoder=attention'), 50257).encoder) == 43.1
    assert m.flops(128) == 12 * (12 * 128 * 768**2 + 2 * 128**2 * 768)
    # decoding: six Perceiver blocks of 3 + 2 + 1 + 8 matrices that attend to 2 L places, and three of
    # 3 + 1 + 12 that attend to L
    decoding = (6 * (14 * 128 * 768**2 + 4 * 128**2 * 768) + 3 * (16 * 128 * 768**2 + 2 * 128**2 * 768))
    assert m.sampling_flops(128, 0) == decoding
    assert m.sampling_flops(128, 32) == 32 * m.flops(128) + decoding


def test_settings_of_the_paper():
    for name, L, gamma in (('lm1b_ldlm', 128, 10_000), ('owt_ldlm', 1024, 50_000)):
        c = SimpleNamespace(**read(name))
        assert (c.block_size, c.encoder_warmup, c.max_iters) == (L, gamma, 1_000_000)
        assert (c.batch_size, c.warmup_iters, c.learning_rate, c.decay_lr) == (512, 5000, 2e-4, 'constant')
        assert (c.beta1, c.beta2, c.weight_decay, c.grad_clip, c.ema) == (0.9, 0.98, 0.01, 1.0, 0.9999)
        assert (c.token_encoder, c.layer, c.reconstruction) == ('gpt2', -3, 'mse')
        assert (c.adaptive_t, c.sigma_dec, c.self_conditioning) == (True, 3.0, 0.5)


@pytest.mark.parametrize('data, V', [('shakespeare_char', 65), ('text', 30522)])
def test_the_denoiser_is_as_large_as_that_of_mdlm(data, V):
    ours, theirs = read(f'{data}_ldlm'), read(f'{data}_mdlm')
    assert millions(on_meta(ours, V).dit) == millions(on_meta(theirs, V).dit)
    assert all(ours[k] == theirs[k] for k in ('dataset', 'block_size', 'batch_size'))


def test_every_override_in_the_headers_is_a_setting():
    """Each line of --key=value in a config's text builds (given the file it belongs to)."""
    lines = 0
    for name in ('shakespeare_char_ldlm', 'owt_ldlm'):
        with open(os.path.join(ROOT, 'config', name + '.py')) as f:
            header = f.read().split('"""')[1]
        for line in header.splitlines():
            args = [word.rstrip(',') for word in line.split() if word.startswith('--')]
            if args and '.py' not in line:
                on_meta(read(name, *args), 65)
                lines += 1
    assert lines > 20


# ------------------------------------------------------------------------------------------------------------
# in the training loop

LOOP = ['--method=ldlm', '--latent_dim=16', '--latent_layers=1', '--decoder_layers=1', '--layer=-1']
JOINT = [*LOOP, '--encoder_warmup=20', '--adaptive_every=6', '--adaptive_bins=4']


@pytest.fixture
def trained_encoder(monkeypatch, tmp_path):
    """An AR checkpoint of ours as token encoder, on the toy data."""
    monkeypatch.setattr(train, 'open_data', open_toy)
    monkeypatch.chdir(tmp_path)
    go('ar', '--method=ar', '--max_iters=1')
    return f'--token_encoder={tmp_path}/ar'


class Killed(Exception):
    pass


def killed():
    raise Killed


def test_kill_and_resume_continue_exactly(monkeypatch, trained_encoder):
    args = [*JOINT, trained_encoder, '--max_iters=22', '--eval_interval=10']
    uninterrupted = go('whole', *args)
    with monkeypatch.context() as m:
        at_step(m, LDLM, 15, killed)
        with pytest.raises(Killed):
            go('parts', *args)
    assert checkpoint.load('parts/ckpt.pt')['step'] == 10
    assert go('parts', *args) == uninterrupted
    a, b = weights('parts'), weights('whole')
    assert same(a, b) and {'times.p', 'times.sums', 'state_mean', 'state_std'} <= a.keys()
    assert not torch.equal(a['times.p'], torch.full((4,), 0.25)) and a['state_std'].all()
    logged = ('gamma', 'diff_t0', 'diff_t75', 'time_bins', 'accuracy', 'latent_var')
    assert not any(r.get(k) is None for r in log('whole') if 'loss' in r for k in logged)
    method, _ = methods.open_run('whole', torch.device('cpu'))
    assert method.sample(2, 3).shape == (2, 16)
    methods.attach_encoder(method, Toy(), torch.device('cpu'))
    x, = Toy().rows(torch.arange(20))
    validated = {r['step']: r for r in log('whole') if 'val_diff_loss' in r and 'val_state_loss' in r}
    accuracy = (method.reconstruct(x) == x).float().mean()
    assert list(validated) == [10, 20, 22] and validated[22]['val_accuracy'] == pytest.approx(accuracy)


def test_one_phase_after_another(trained_encoder):
    """autoencoder -> diffusion -> decoder: each begins with what the last one left, and does not move it."""
    args = [*LOOP, trained_encoder, '--max_iters=2', '--ema=0']
    go('out/first', *args, '--stage=autoencoder')
    go('out/second', *args, '--stage=diffusion', '--init_from=out/first')
    go('out/third', *args, '--stage=decoder', '--decode_from=latents', '--decoder_layers=2',
       '--init_from=out/second')
    first, second, third = (checkpoint.load(f'out/{name}/ckpt.pt')['model']
                            for name in ('first', 'second', 'third'))
    changed = {k.split('.')[0] for k in first if not torch.equal(first[k], second[k])}
    assert changed == DENOISER | {'times'}
    changed = {k.split('.')[0] for k in second if not torch.equal(second[k], third[k])}
    assert changed == {'token_decoder', 'head', 'times'}  # times: the running means fade


def test_states_of_another_encoder(trained_encoder):
    """Their statistics are gathered anew.

    A run goes on only with the weights that it began with, also under the same name.
    """
    args = [*JOINT, trained_encoder, '--max_iters=1']
    go('out/first', *args)
    go('out/same', *args, '--init_from=out/first')
    go('out/deeper', *args, '--init_from=out/first', '--layer=-2')
    first, same_layer, deeper = (checkpoint.load(f'out/{name}/ckpt.pt')['model']['state_std']
                                 for name in ('first', 'same', 'deeper'))
    assert torch.equal(first, same_layer) and deeper.all() and not torch.equal(first, deeper)
    go('ar', '--method=ar', '--max_iters=2', '--ema=0')
    with pytest.raises(UserError, match='not encoder_weights='):
        go('out/first', *args)
    go('out/later', *args, '--init_from=out/first')
    assert not torch.equal(first, checkpoint.load('out/later/ckpt.pt')['model']['state_std'])


SCRIPT = f"""
import os, sys, torch
torch.set_num_threads(1)
sys.path[:0] = {[ROOT, os.path.dirname(os.path.abspath(__file__))]!r}
import helpers, ldlm, train
from lib.configurator import run
train.open_data = helpers.open_toy
begin_step, states = ldlm.LDLM.begin_step, []
def recording(self, *args):
    begin_step(self, *args)
    states.append({{k: v.clone() for k, v in self.named_buffers()}})
    torch.save(states, f'states{{os.environ["RANK"]}}.pt')
ldlm.LDLM.begin_step, ldlm.STATE_TOKENS = recording, 600
run(train.main)
"""


def test_two_processes_keep_one_state(trained_encoder, tmp_path):
    """Every process has the same times at every step, and they are those of a single process."""
    args = [*TINY_RUN, *JOINT, trained_encoder, '--max_iters=8', '--eval_interval=8']
    train.main([*args, '--out_dir=one'])
    (tmp_path / 'script.py').write_text(SCRIPT)
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
                '--monitor-interval=0.1', 'script.py']
    r = subprocess.run([*torchrun, *args, '--out_dir=two', '--micro_batch=2'], capture_output=True, text=True,
                       env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert r.returncode == 0, r.stderr
    states = [torch.load(f'states{rank}.pt') for rank in range(2)]
    assert len(states[0]) == 8 and all(same(a, b) for a, b in zip(*states))
    a, b = weights('one'), weights('two')
    assert not [k for k in a if not torch.allclose(a[k], b[k], rtol=1e-3, atol=1e-3)]
    assert (a['times.sums'] != 0).all()
    one, two = ([r['val_diff_loss'] for r in log(name) if 'val_diff_loss' in r] for name in ('one', 'two'))
    assert len(one) == 1 and one == pytest.approx(two, rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['lm1b_ldlm', 'owt_ldlm'])
def test_the_real_size(name, monkeypatch, tmp_path):
    """Two steps with a GPT-2 of random weights; a GPU is not needed, 16 GB of memory are."""
    transformers = pytest.importorskip('transformers')
    gpt2 = transformers.GPT2Model(transformers.GPT2Config()).eval()

    def encoder(x, blank=None, layer=-1, summary=True):
        return gpt2(x, output_hidden_states=True).hidden_states[layer], None
    encoder.width, encoder.num_layers, encoder.model = 768, 12, gpt2

    class Data(Toy):
        vocab_size, block_size = 50257, read(name)['block_size']

        def batch(self, seed, step, rows):
            return (Noise(seed, step, rows, 1).uniform('toy', self.block_size) * self.vocab_size).long(),
    monkeypatch.setattr(train, 'open_data', lambda *args: Data())
    monkeypatch.setattr(methods, 'open_encoder', lambda *args: encoder)
    monkeypatch.setattr(methods, 'check_tokenizer', lambda *args: None)
    monkeypatch.setattr(ldlm, 'STATE_TOKENS', 2048)
    train.main([os.path.join(ROOT, 'config', name + '.py'), f'--out_dir={tmp_path}/out', '--batch_size=2',
                '--max_iters=2', '--log_interval=1', '--compile=False'])
    records = log(f'{tmp_path}/out')
    assert [r['step'] for r in records] == [1, 2] and all(math.isfinite(r['loss']) for r in records)
