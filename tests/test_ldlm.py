"""ldlm.py against the truth: closed forms for Gaussian latents, what each part of the recipe does to which gradient, what each key switches.

Statistical bounds are 4.5 standard errors (two-sided chance of failure 7e-6 each, and the seeds are fixed).
"""
import inspect
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

from lib import checkpoint
from lib import configurator
from lib import encoders
import ldlm
import test_train
import train
from lib.configurator import UserError, configure
from ldlm import LDLM, AdaptiveTimes, Config, alpha_sigma, beta, ddim, euler_maruyama, warmup
from lib.noise import Noise
from test_ladd import spy
from test_mdlm import close, generator, scrambled, whole
from test_noise import chi_square

V, L, D = 11, 6, 16


class Encoder:
    """A frozen encoder whose states have a different mean and variance in every feature and depend on the place and on the layer."""
    width, num_layers, model = D, 3, torch.nn.Linear(1, 1)

    def __init__(self):
        self.layers = []

    def __call__(self, x, blank=None, layer=-1, summary=True):
        self.layers.append(layer)
        e = torch.randn(V, D, generator=generator(5 + layer))[x]
        h = e + e.cumsum(dim=1) / (1 + torch.arange(x.shape[1]))[:, None]
        return h * (1 + torch.arange(D)) + torch.arange(D) ** 2, None


@pytest.fixture(autouse=True)
def encoder(monkeypatch):
    encoder = Encoder()
    monkeypatch.setattr(ldlm, 'open_encoder', lambda name, device: encoder)
    monkeypatch.setattr(ldlm, 'STATE_TOKENS', 600)
    return encoder


def texts(n, seed=0):
    return torch.randint(V, (n, L), generator=generator(seed))


def draw_rows(n):
    return (texts(n),)


def build(**kwargs):
    defaults = dict(vocab_size=V, block_size=L, hidden=16, num_layers=1, num_heads=2, cond_dim=8, latent_dim=D, latent_layers=1, decoder_layers=1,
                    adaptive_bins=8)
    return LDLM(Config(**{**defaults, **kwargs}))


def make(seed=0, gamma=1.0, **kwargs):
    """A small LDLM whose weights have left the initialisation, with the statistics of its encoder."""
    model = scrambled(build(**kwargs), seed)
    model.begin_step(0, draw_rows, whole(16))
    model.gamma.fill_(gamma)
    return model


def gradients(model, x=None, noise=None):
    model.zero_grad()
    model(texts(16) if x is None else x, noise or whole(16))[0].backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def part(grads, name):
    return {k: g for k, g in grads.items() if k.startswith(name + '.')}


def moved(grads):
    """Which modules have a gradient."""
    return {k.split('.')[0] for k, g in grads.items() if g is not None and g.any()}


DENOISER = {'dit', 'z_in', 'z_out'}


# --- schedule ---------------------------------------------------------------------------------------------------------------------

def test_the_schedule_is_the_tangent():
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    alpha, sigma = alpha_sigma(t, 3.0)
    torch.testing.assert_close(alpha, 1 / (1 + 9 * torch.tan(math.pi * t / 2) ** 2).sqrt())
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t))
    assert alpha[0] == 1 and sigma[0] == 0 and abs(alpha[-1]) < 1e-15
    low = [level(torch.linspace(0, 1, 101)) for level in (lambda t: alpha_sigma(t)[0], lambda t: alpha_sigma(t)[1], beta)]
    assert all(level.isfinite().all() for level in low)  # in fp32 too


def test_beta_is_the_rate_of_the_schedule():
    t = torch.linspace(0.001, 0.95, 500, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(alpha_sigma(t, 3.0)[0].log().sum(), t)
    torch.testing.assert_close(beta(t.detach(), 3.0), -2 * slope)
    assert float(beta(torch.tensor(1.0))) == pytest.approx(float(beta(torch.tensor(0.95))), rel=1e-5)


# --- samplers: for z_0 ~ N(mu, C) the best denoiser is linear, so is every sampler, and its law is a recursion of mean and covariance ----

MU, C = torch.tensor([1.0, -0.5]).double(), torch.tensor([[1.5, 0.8], [0.8, 0.6]]).double()
EYE = torch.eye(2).double()


def levels(t, d):
    alpha = 1 / math.sqrt(1 + d * d * math.tan(math.pi * t / 2) ** 2) if t < 1 else 0.0
    return alpha, math.sqrt(1 - alpha * alpha)


def gain(alpha, sigma):
    """E[z_0 | z_t] = mu + gain (z_t - alpha mu)."""
    return alpha * C @ torch.linalg.inv(alpha**2 * C + sigma**2 * EYE)


def best(z, t, z_self, d=3.0):
    alpha, sigma = levels(float(t), d)
    return MU + (z - alpha * MU) @ gain(alpha, sigma)  # symmetric


def euler_maruyama_law(steps, d=3.0):
    """Mean and covariance of what euler_maruyama returns first."""
    m, S = torch.zeros(2).double(), EYE
    for i in range(steps):
        t, dt = 1 - 0.95 * i / steps, 0.95 / steps
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
        m, A = step @ m + (alpha_s - sigma_s * alpha / sigma) * (MU - alpha * G @ MU), step @ A
    return m, A @ A.T


@pytest.mark.parametrize('d', [1.0, 3.0])
@pytest.mark.parametrize('steps', [1, 4, 9])
def test_ddim_has_its_closed_form(steps, d):
    """Exactly: the images of 0 and of the two basis vectors give the affine map."""
    z = ddim(lambda z, t, z_self: best(z, t, z_self, d), torch.cat((torch.zeros(1, 2), torch.eye(2))).double()[:, None], steps, d)[:, 0]
    A = (z[1:] - z[0]).T
    m, S = ddim_law(steps, d)
    torch.testing.assert_close(z[0], m, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(A @ A.T, S, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('steps', [1, 3, 20])
def test_euler_maruyama_has_its_closed_form(steps):
    n = 50000
    z = torch.randn(n, 1, 2, generator=generator()).double()
    mean, z_hat = (part[:, 0] for part in euler_maruyama(best, z, steps, generator=generator(1)))
    m, S = euler_maruyama_law(steps)
    assert ((mean.mean(0) - m).abs() < 4.5 * (S.diagonal() / n).sqrt()).all()
    spread = ((S.diagonal()[:, None] * S.diagonal() + S**2) / n).sqrt()  # of the entries of a sample covariance
    assert ((torch.cov(mean.T) - S).abs() < 4.5 * spread).all()
    assert z_hat.shape == mean.shape


def test_both_converge():
    """DDIM to the data; Euler-Maruyama to the marginal at t = .05, where its grid ends. Errors fall with the number of steps."""
    alpha, sigma = levels(0.05, 3.0)
    for law, m, S in ((ddim_law, MU, C), (euler_maruyama_law, alpha * MU, alpha**2 * C + sigma**2 * EYE)):
        errors = []
        for steps in (16, 64, 256, 1024):
            mean, cov = law(steps)
            errors.append(max(float((mean - m).abs().max()), float((cov - S).abs().max())))
        assert all(b < a / 2 for a, b in zip(errors, errors[1:])) and errors[-1] < 0.01, errors


def test_the_estimate_is_carried_along():
    """Zeros at first, then the estimate of the step before; N steps are N calls; the callback sees each estimate."""
    for sampler, ends in ((euler_maruyama, 0.05), (ddim, 0.0)):
        calls, seen = [], []

        def denoise(z, t, z_self):
            calls.append((float(t), z_self))
            return torch.full_like(z, len(calls))
        sampler(denoise, torch.randn(3, L, D), 4, callback=lambda i, z_hat: seen.append((i, float(z_hat.mean()))))
        assert [float(z_self.mean()) for _, z_self in calls] == [0, 1, 2, 3]
        assert [t for t, _ in calls] == pytest.approx([1 - i * (1 - ends) / 4 for i in range(4)])
        assert seen == [(0, 1), (1, 2), (2, 3), (3, 4)]


def test_sampling_by_name(monkeypatch):
    monkeypatch.setattr(ldlm, 'open_encoder', None)  # generation does without the token encoder
    model = scrambled(build()).eval()
    decoded, calls = spy(model, 'tokens'), spy(model, 'denoise')
    for sampler in LDLM.samplers:
        a, b = (model.sample(3, 4, sampler=sampler, generator=generator()) for _ in range(2))
        assert a.shape == (3, L) and a.dtype == torch.int64 and 0 <= a.min() and a.max() < V and torch.equal(a, b)
    assert len(decoded) == 6 and len(calls) == 24  # the head runs once per text
    (last_estimate,), (mean,) = decoded[0][0], decoded[2][0]
    assert torch.equal(last_estimate, calls[3][1]) and torch.equal(calls[3][1], calls[11][1]) and not torch.equal(mean, last_estimate)
    shown = []
    x = model.sample(3, 4, callback=lambda i, x: shown.append((i, x)), generator=generator())
    assert [i for i, _ in shown] == [0, 1, 2, 3] and torch.equal(shown[-1][1], x)


def test_there_is_no_likelihood_and_no_prompt():
    assert not hasattr(LDLM, 'nll') and 'x' not in inspect.signature(LDLM.sample).parameters


# --- the warmup of the encoder's gradient ---------------------------------------------------------------------------------------------

def test_gamma_is_a_stretched_sigmoid():
    S = lambda x: 1 / (1 + math.exp(-10 * (x - 0.8)))
    assert warmup(0, 1000) == 0 and warmup(1000, 1000) == 1 and warmup(5000, 1000) == 1 and warmup(0, 0) == 1
    assert warmup(800, 1000) == pytest.approx((0.5 - S(0)) / (S(1) - S(0)))
    values = [warmup(s, 1000) for s in range(1001)]
    assert all(a < b for a, b in zip(values, values[1:]))
    model = make(encoder_warmup=1000)
    for step in (0, 800, 1000):
        model.begin_step(step, draw_rows, whole(16))
        assert float(model.gamma) == pytest.approx(warmup(step, 1000))


@pytest.mark.parametrize('gamma', [0.0, 0.3, 1.0])
def test_gamma_multiplies_what_reaches_the_encoder_and_nothing_else(gamma):
    """Loss and denoiser gradient are the same bits; the gradient at z, through input and target alike, is gamma times as large."""
    def diffusion(gamma):
        model = make(gamma=gamma)
        z = torch.randn(16, L, D, generator=generator()).requires_grad_()
        loss = model.diffusion_loss(z, whole(16))
        loss.backward()
        return loss, z.grad, [p.grad for name in DENOISER for p in getattr(model, name).parameters()]
    loss, at_z, at_denoiser = diffusion(gamma)
    full_loss, full_at_z, full_at_denoiser = diffusion(1.0)
    assert torch.equal(loss, full_loss) and all(torch.equal(a, b) for a, b in zip(at_denoiser, full_at_denoiser))
    assert all(g.any() for g in at_denoiser)
    torch.testing.assert_close(at_z, gamma * full_at_z, rtol=1e-5, atol=1e-9)
    assert full_at_z.abs().min() > 0


def test_gamma_in_the_whole_loss():
    """Encoder gradient = reconstruction + gamma diffusion; the latent decoder's and the denoiser's do not know gamma."""
    none, some, full = (gradients(make(gamma=gamma)) for gamma in (0.0, 0.3, 1.0))
    for key in none:
        if key.startswith('encoder'):
            torch.testing.assert_close(some[key], none[key] + 0.3 * (full[key] - none[key]), rtol=1e-3, atol=1e-4 * float(full[key].abs().max()))
            assert not torch.equal(none[key], full[key])
        else:
            assert torch.equal(some[key], full[key]), key


# --- adaptive times -------------------------------------------------------------------------------------------------------------------

def curve(t):
    """A loss that rises slowly, then fast: slopes from .3 to 2.1, mean 1.1."""
    return 0.2 + 0.3 * t + 0.6 * t**2 + 0.2 * t**3


def test_the_loss_becomes_linear_in_the_warped_time():
    times = AdaptiveTimes(20, 0.999, 0.1)
    for step in range(40):
        t = times.draw(whole(2000, step=step))
        times.track(t, curve(t))
        if step == 19:
            times.refresh()
    times.refresh()
    edges = torch.linspace(0, 1, 21)
    rise = curve(edges).diff() / (curve(torch.tensor(1.0)) - curve(torch.tensor(0.0)))
    torch.testing.assert_close(times.p, rise, rtol=0.15, atol=0)  # the curvature within the outermost bins is not seen
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
    """In the right proportions over the bins, uniform within each, and stratified: as near to p as one batch can be."""
    times = AdaptiveTimes(5, 0.999, 0.1)
    times.p.copy_(torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2]))
    t = torch.stack([times.draw(whole(64, step=step)) for step in range(300)])
    assert 0 <= t.min() and t.max() <= 1
    counts = torch.stack([(row * 5).long().clamp(max=4).bincount(minlength=5) for row in t])
    assert ((counts - 64 * times.p).abs() <= 2).all()
    assert chi_square((t[:, 0] * 5).long().bincount(minlength=5), times.p) < 4.5  # one row over the steps: independent draws
    within = (t.flatten() * 5) % 1
    assert chi_square((within * 10).long().clamp(max=9).bincount(minlength=10), torch.ones(10)) < 4.5


def test_bins_hold_running_means():
    times = AdaptiveTimes(4, 0.5, 0.1)
    times.track(torch.tensor([0.0, 0.2, 1.0]), torch.tensor([2.0, 10.0, 3.0]))
    assert torch.equal(times.sums, torch.tensor([[12.0, 0, 0, 3], [2, 0, 0, 1]]))
    times.forget()
    times.track(torch.tensor([0.9]), torch.tensor([6.0]))
    assert torch.equal(times.sums[:, 3], torch.tensor([1.5 + 6, 1.5]))  # half as much weight for what was before
    parts = AdaptiveTimes(4, 0.5, 0.1)
    t, losses = torch.rand(12, generator=generator()), torch.rand(12, generator=generator(1))
    for i in range(0, 12, 3):
        parts.track(t[i:i + 3], losses[i:i + 3])
    all_at_once = AdaptiveTimes(4, 0.5, 0.1)
    all_at_once.track(t, losses)
    torch.testing.assert_close(parts.sums, all_at_once.sums)


def test_every_bin_is_visited_and_nothing_is_guessed():
    times = AdaptiveTimes(4, 0.999, 0.1)
    times.track(torch.tensor([0.1, 0.6]), torch.tensor([1.0, 2.0]))
    times.refresh()
    assert torch.equal(times.p, torch.full((4,), 0.25))  # two bins have not been seen
    times.sums.copy_(torch.tensor([[1.0, 1, 8, 3], [1, 1, 2, 1]]))  # means 1, 1, 4, 3; edges 1, 1, 2.5, 3.5, 2.5; rises 0, 1.5, 1, -1
    times.refresh()
    torch.testing.assert_close(times.p, torch.tensor([0.0625, 1.5, 1, 0.0625]) / 2.625)  # at least a tenth of 2.5 / 4
    torch.testing.assert_close(times.by_quarter(), torch.tensor([1.0, 1, 4, 3]))
    times.sums.fill_(1.0)
    times.refresh()
    torch.testing.assert_close(times.p, torch.full((4,), 0.25))  # a flat loss


def test_begin_step_forgets_once_and_refreshes_in_its_time():
    """However many micro-batches come between."""
    model = make(adaptive_every=5, adaptive_memory=0.9)
    refreshed = spy(model.times, 'refresh')
    for step in range(11):
        before = model.times.sums.clone()
        model.begin_step(step, draw_rows, whole(16))
        torch.testing.assert_close(model.times.sums, 0.9 * before)
        noise = whole(16, step=step)
        for i in range(0, 16, 4):
            model(texts(16)[i:i + 4], noise[i:i + 4])
        assert float(model.times.sums[1].sum()) == pytest.approx(float(0.9 * before[1].sum()) + 16, rel=1e-5)
    assert len(refreshed) == 2
    fixed = make(adaptive_t=False, adaptive_every=1)
    refreshed, calls = spy(fixed.times, 'refresh'), spy(fixed, 'denoise')
    fixed.begin_step(3, draw_rows, whole(16))
    fixed(texts(16), whole(16))
    assert not refreshed and torch.equal(calls[0][0][1], whole(16).times('t'))


# --- what reaches what ------------------------------------------------------------------------------------------------------------------

def test_the_tokens_have_no_say_in_the_latent_space():
    """Bit for bit: with and without the token loss the same gradient for encoder, latent decoder and denoiser."""
    with_tokens, without = gradients(make()), gradients(make(token_loss=False))
    assert moved(with_tokens) == {'encoder', 'decoder', 'token_decoder', 'head'} | DENOISER
    assert moved(without) == {'encoder', 'decoder'} | DENOISER
    assert all(g is None for name in ('token_decoder', 'head') for g in part(without, name).values())
    assert all(torch.equal(with_tokens[k], without[k]) for k in with_tokens if without[k] is not None)


def test_unless_they_are_the_reconstruction():
    mse, ce, both = (gradients(make(gamma=0.0, reconstruction=kind)) for kind in ('mse', 'ce', 'both'))
    for name in ('encoder', 'decoder'):
        for key in part(mse, name):
            torch.testing.assert_close(both[key], mse[key] + ce[key], rtol=1e-3, atol=1e-4 * float(both[key].abs().max()))
            assert ce[key].any()
    for name in ('token_decoder', 'head', *DENOISER):
        assert all(torch.equal(mse[k], both[k]) and torch.equal(mse[k], ce[k]) for k in part(mse, name))


def test_the_loss_is_the_sum_of_its_parts():
    """And each part is what the paper's equation says."""
    model, x, noise = make(), texts(16), whole(16)
    loss, logs = model(x, noise)
    torch.testing.assert_close(loss.detach(), logs['diff_loss'] + logs['state_loss'] + logs['token_loss'])
    with torch.no_grad():
        h = model.states(x)
        z = model.encode(h)
        h_hat = model.decoder(z + 3 * noise.normal('decoder', L, D))
        torch.testing.assert_close(logs['state_loss'], ((h_hat - h) ** 2).mean())
        logits = model.head(model.token_decoder(h_hat))
        torch.testing.assert_close(logs['token_loss'], F.cross_entropy(logits.flatten(0, 1), x.flatten()))
        assert float(logs['accuracy']) == pytest.approx(float((logits.argmax(-1).flatten()[::2] == x.flatten()[::2]).float().mean()))
        torch.testing.assert_close(logs['latent_norm'], (z**2).sum(-1).sqrt().mean())
        torch.testing.assert_close(logs['latent_var'], torch.stack([z[..., i].var() for i in range(D)]).mean())
    assert all(v.isfinite() and not v.requires_grad for v in logs.values())
    assert float(logs['time_bins']) == pytest.approx(8)


def test_noise_at_the_decoder_in_training_and_never_else():
    model, x = make(), texts(16)
    inputs = []
    model.decoder.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
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
    quiet.decoder.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
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
    """Autocast caches low-precision weights; those cached in the pass without gradient must not serve the one with."""
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


# --- the states -------------------------------------------------------------------------------------------------------------------------

def test_statistics_are_per_feature_and_in_the_checkpoint():
    model = build()
    asked = []
    model.begin_step(0, lambda n: asked.append(n) or (texts(n),), whole(16))
    assert asked == [100]  # 600 tokens
    h = model.states(texts(100)).flatten(0, 1)
    torch.testing.assert_close(h.mean(dim=0), torch.zeros(D), rtol=0, atol=1e-4)
    torch.testing.assert_close(h.var(dim=0, unbiased=False), torch.ones(D), rtol=1e-4, atol=0)
    other = build()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.states(texts(4)), model.states(texts(4)))
    other.begin_step(0, None, whole(16))  # they came along: nothing is asked again
    assert torch.equal(other.states(texts(4)), model.states(texts(4)))
    assert not any('frozen' in k or 'token_encoder' in k for k in model.state_dict())


def test_the_layer_is_asked_for(encoder):
    for layer in (-1, 0, -3):
        make(layer=layer).states(texts(2))
        assert set(encoder.layers) == {layer}
        encoder.layers.clear()


def test_trained_embeddings(monkeypatch):
    monkeypatch.setattr(ldlm, 'open_encoder', None)
    model = make(token_encoder='scratch', reconstruction='ce')
    assert model.embed.weight.shape == (V, D) and torch.equal(model.states(texts(2)), model.embed(texts(2)))
    assert 'embed' in moved(gradients(model))
    direct = make(token_encoder='scratch', reconstruction='ce', latent_encoder='none')  # Diffusion-LM: the embeddings are the latents
    assert torch.equal(direct.encode(direct.states(texts(2))), direct.embed(texts(2)))
    assert moved(gradients(direct)) == {'embed', 'token_decoder', 'head'} | DENOISER


def test_reconstruction_and_interpolation():
    """Of a model that has learned to read its latents: between two texts lie both, at the ends."""
    torch.manual_seed(0)
    model = build(latent_encoder='none', decoder_layers=0, sigma_dec=0.0, stage='autoencoder')
    model.begin_step(0, draw_rows, whole(16))
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
    assert path.shape == (3, 8, L) and torch.equal(path[0], model.reconstruct(x)) and torch.equal(path[2], model.reconstruct(y))


# --- keys -------------------------------------------------------------------------------------------------------------------------------

def test_perceiver_is_its_plain_definition():
    """One block in loops: queries from the latents, keys and values from latents and context, each place at its own angle."""
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
    out = []
    for l in range(3):
        heads = []
        for head in (slice(0, 4), slice(4, 8)):
            q = turn(rms((W_q @ nx[l])[head], block.norm_q.weight), l)
            ks = [turn(rms((W @ n[j])[head], block.norm_k.weight), j) for W, n in ((W_k, nx), (W_k_context, nc)) for j in range(3)]
            vs = [(W @ n[j])[head] for W, n in ((W_v, nx), (W_v_context, nc)) for j in range(3)]
            weights = torch.stack([q @ k / 2 for k in ks]).softmax(0)
            heads.append(sum(w * v for w, v in zip(weights, vs)))
        out.append(x[0, l] + block.out.weight @ torch.cat(heads))
    y = torch.stack(out)
    n = F.layer_norm(y, (8,), block.norm2.weight, block.norm2.bias)
    y = y + F.linear(F.gelu(F.linear(n, block.up.weight, block.up.bias)), block.down.weight, block.down.bias)
    torch.testing.assert_close(block(x, cos, sin, context)[0], y)


def test_latent_encoders():
    perceiver, attention, none = (make(latent_encoder=kind) for kind in ('perceiver', 'attention', 'none'))
    h = perceiver.states(texts(4))
    assert perceiver.encoder[0].queries.shape == (L, D) and attention.encoder[0].queries is None
    assert torch.equal(none.encode(h), h) and not list(none.encoder.parameters()) and not list(none.decoder.parameters())
    assert 'state_loss' not in none(texts(16), whole(16))[1] and moved(gradients(none)) == {'token_decoder', 'head'} | DENOISER
    assert moved(gradients(attention)) == {'encoder', 'decoder', 'token_decoder', 'head'} | DENOISER
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
    ('joint', {'encoder', 'decoder', 'token_decoder', 'head'} | DENOISER, {'diff_loss', 'state_loss', 'token_loss'}),
    ('autoencoder', {'encoder', 'decoder', 'token_decoder', 'head'}, {'state_loss', 'token_loss'}),
    ('diffusion', DENOISER, {'diff_loss'}), ('decoder', {'token_decoder', 'head'}, {'token_loss'})])
def test_stages(stage, trained, losses):
    """What is trained, and that the rest has no gradient at all (so that no optimizer moves it)."""
    model = make(stage=stage)
    grads = gradients(model)
    assert moved(grads) == trained
    assert all(g is None for k, g in grads.items() if k.split('.')[0] not in trained)
    logs = model(texts(16), whole(16))[1]
    assert {k for k in logs if k.endswith('_loss')} == losses
    if stage == 'decoder':
        short = make(stage=stage, decode_from='latents', token_loss=False)  # the loss of this stage is not to be switched off
        inputs = spy(short.decoder, 'forward')
        assert moved(gradients(short)) == trained and not inputs


def test_masked_states_are_the_encoders_alone():
    """A share of the places is hidden from the encoder; the target is whole; nothing is hidden where the encoder is frozen."""
    for stage, share in (('joint', 0.4), ('autoencoder', 0.4), ('diffusion', 0), ('decoder', 0)):
        model = make(mask_states=0.4, stage=stage)
        calls, hidden = spy(model, 'encode'), []
        for step in range(30):
            model(texts(16), whole(16, step=step))
            (h,), _ = calls.pop()
            hidden.append((h == 0).all(dim=-1).float().flatten())
            assert torch.equal(h[hidden[-1].view(16, L) == 0], model.states(texts(16))[hidden[-1].view(16, L) == 0])
        assert close(torch.cat(hidden), share) if share else not torch.cat(hidden).any()


@pytest.mark.parametrize('wrong, words', [
    (dict(latent_encoder='lstm'), 'latent_encoder is one of .* not'), (dict(stage='all'), 'stage is one of'), (dict(decode_from='z'), 'decode_from is one of'),
    (dict(reconstruction='kl'), 'reconstruction is one of'), (dict(token_encoder='scratch'), 'reconstruction=ce'), (dict(latent_dim=20), 'heads of width 8'),
    (dict(reconstruction='ce', token_loss=False), 'token_loss=True'), (dict(reconstruction='both', decode_from='latents'), 'decode_from=states'),
    (dict(stage='autoencoder', latent_encoder='none', token_loss=False), 'nothing to train'), (dict(latent_layers=0), 'latent_encoder=none')])
def test_choices_that_make_no_sense(wrong, words):
    with pytest.raises(ValueError, match=words):
        build(**wrong)


def test_check_data(monkeypatch):
    asked = []
    monkeypatch.setattr(ldlm, 'check_tokenizer', lambda encoder, data, summary: asked.append(data))
    build().check_data('data', 'cpu')
    assert asked == ['data']
    with pytest.raises(UserError, match='--latent_dim=16, not 24'):
        build(latent_dim=24).check_data('data', 'cpu')
    for layer in (-5, 4):
        with pytest.raises(UserError, match=f'has 3 layers: .* not {layer}'):
            build(layer=layer).check_data('data', 'cpu')
    assert build(layer=-4).check_data('data', 'cpu') == build(layer=3).check_data('data', 'cpu') == checkpoint.fingerprint(Encoder.model)
    assert build(token_encoder='scratch', reconstruction='ce').check_data('anything', 'cpu') is None
    assert asked == ['data'] * 6


@pytest.mark.parametrize('kind', ['scratch', 'frozen'])
def test_a_compiled_step_is_the_same_and_is_compiled_once(kind):
    """One graph; a frozen encoder, somebody else's code, runs between the two of what comes before and after it."""
    config = dict(encoder_warmup=10, adaptive_every=2, **(dict(token_encoder='scratch', reconstruction='ce') if kind == 'scratch' else {}))
    plain, model = make(**config), make(**config)
    torch._dynamo.reset()
    counters.clear()
    model.compile(backend='eager', fullgraph=kind == 'scratch')
    for step in (1, 2, 3):
        for m in (plain, model):
            m.begin_step(step, None, None)
        a, b = (m(texts(16), whole(16, step=step))[0] for m in (plain, model))
        torch.testing.assert_close(a, b)
        assert counters['stats']['unique_graphs'] == (1 if kind == 'scratch' else 2)
    breaks = list(counters['graph_break'])
    assert len(breaks) == (kind == 'frozen') and all('LDLM.raw_states' in b for b in breaks)


# --- sizes and configs --------------------------------------------------------------------------------------------------------------------

ROOT = os.path.dirname(train.__file__)


def read(name, *args):
    return configure(train.defaults, [os.path.join(ROOT, 'config', name + '.py'), *args])


def on_meta(config, V):
    with torch.device('meta'):
        return checkpoint.build({**config, 'vocab_size': V})


def millions(*modules):
    return round(sum(p.numel() for m in modules for p in m.parameters()) / 1e6, 1)


def test_sizes_of_the_paper():
    """Appendix C: about 50M each, 132M, 66M, and 38M for a linear head."""
    m = on_meta(read('lm1b_ldlm'), 50257)
    assert set(checkpoint.backbones(m)) == {m.encoder[0], m.decoder[0], m.token_decoder[0], m.dit}
    assert (millions(m.encoder), millions(m.decoder), millions(m.z_in, m.dit, m.z_out)) == (50.3, 50.3, 131.2)
    assert (millions(m.token_decoder, m.head), millions(m.head)) == (67.0, 38.6)
    assert millions(on_meta(read('owt_ldlm'), 50257).encoder) == 51.0
    assert millions(on_meta(read('lm1b_ldlm', '--latent_encoder=attention'), 50257).encoder) == 43.1
    assert m.flops(128) == 12 * (12 * 128 * 768**2 + 2 * 128**2 * 768)
    # six Perceiver blocks of 3 + 2 + 1 + 8 matrices that attend to 2 L places, and three of 3 + 1 + 12 that attend to L
    assert m.flops_once(128) == 6 * (14 * 128 * 768**2 + 4 * 128**2 * 768) + 3 * (16 * 128 * 768**2 + 2 * 128**2 * 768)


def test_settings_of_the_paper():
    for name, L, gamma in (('lm1b_ldlm', 128, 10_000), ('owt_ldlm', 1024, 50_000)):
        c = SimpleNamespace(**read(name))
        assert (c.block_size, c.encoder_warmup, c.max_iters, c.batch_size, c.warmup_iters) == (L, gamma, 1_000_000, 512, 5000)
        assert (c.learning_rate, c.beta1, c.beta2, c.weight_decay, c.grad_clip, c.ema, c.decay_lr) == (2e-4, 0.9, 0.98, 0.01, 1.0, 0.9999, 'constant')
        assert (c.token_encoder, c.layer, c.reconstruction, c.adaptive_t, c.sigma_dec, c.self_conditioning) == ('gpt2', -3, 'mse', True, 3.0, 0.5)


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
            args = [word for word in line.split(',  then  ')[0].split() if word.startswith('--')]
            if args and '.py' not in line:
                on_meta(read(name, *args), 65)
                lines += 1
    assert lines > 20


# --- in the training loop -------------------------------------------------------------------------------------------------------------------

TINY = ['--method=ldlm', '--latent_dim=16', '--latent_layers=1', '--decoder_layers=1', '--encoder_warmup=20', '--adaptive_every=6', '--adaptive_bins=4', '--layer=-1']


@pytest.fixture
def trained_encoder(monkeypatch, tmp_path):
    """An AR checkpoint of ours as token encoder, on the toy data of test_train.py."""
    monkeypatch.setattr(train, 'open_data', test_train.open_toy)
    monkeypatch.setattr(ldlm, 'open_encoder', encoders.open_encoder)
    monkeypatch.chdir(tmp_path)
    test_train.go('ar', '--method=ar', '--max_iters=1')
    return f'--token_encoder={tmp_path}/ar'


def test_kill_and_resume_continue_exactly(monkeypatch, trained_encoder):
    args = [*TINY, trained_encoder, '--max_iters=22', '--eval_interval=10']
    uninterrupted = test_train.go('whole', *args)
    with monkeypatch.context() as m:
        test_train.raise_at(m, LDLM, 15, test_train.killed)
        with pytest.raises(test_train.Killed):
            test_train.go('parts', *args)
    assert checkpoint.load('parts/ckpt.pt')['step'] == 10
    assert test_train.go('parts', *args) == uninterrupted
    a, b = test_train.weights('parts'), test_train.weights('whole')
    assert test_train.same(a, b) and {'times.p', 'times.sums', 'state_mean', 'state_std'} <= a.keys()
    assert not torch.equal(a['times.p'], torch.full((4,), 0.25)) and a['state_std'].all()
    assert not any(r.get(k) is None for r in test_train.log('whole') for k in ('gamma', 'diff_t0', 'diff_t75', 'time_bins', 'accuracy', 'latent_var'))
    method, _ = checkpoint.load_method('whole', 'cpu')
    assert method.sample(2, 3).shape == (2, 16) and method.reconstruct(test_train.Toy().rows(torch.arange(3))).shape == (3, 16)


def test_one_phase_after_another(trained_encoder):
    """autoencoder -> diffusion -> decoder: each begins with what the one before left, and leaves it as it was."""
    args = [*TINY, trained_encoder, '--max_iters=2', '--ema=0']
    test_train.go('out/first', *args, '--stage=autoencoder')
    test_train.go('out/second', *args, '--stage=diffusion', '--init_from=out/first')
    test_train.go('out/third', *args, '--stage=decoder', '--decode_from=latents', '--decoder_layers=2', '--init_from=out/second')
    first, second, third = (checkpoint.load(f'out/{name}/ckpt.pt')['model'] for name in ('first', 'second', 'third'))
    changed = {k.split('.')[0] for k in first if not torch.equal(first[k], second[k])}
    assert changed == DENOISER | {'times'}
    changed = {k.split('.')[0] for k in second if not torch.equal(second[k], third[k])}
    assert changed == {'token_decoder', 'head', 'times'}  # times: the running means fade


def test_states_of_another_encoder(trained_encoder, tmp_path):
    """Their statistics are gathered anew, and a run goes on only with the weights that it began with, also under the same name."""
    args = [*TINY, trained_encoder, '--max_iters=1']
    test_train.go('out/first', *args)
    test_train.go('out/same', *args, '--init_from=out/first')
    test_train.go('out/deeper', *args, '--init_from=out/first', '--layer=-2')
    first, same, deeper = (checkpoint.load(f'out/{name}/ckpt.pt')['model']['state_std'] for name in ('first', 'same', 'deeper'))
    assert torch.equal(first, same) and deeper.all() and not torch.equal(first, deeper)
    test_train.go('ar', '--method=ar', '--max_iters=2', '--ema=0')
    encoders.opened.cache_clear()
    with pytest.raises(UserError, match='not encoder_weights='):
        test_train.go('out/first', *args)
    test_train.go('out/later', *args, '--init_from=out/first')
    assert not torch.equal(first, checkpoint.load('out/later/ckpt.pt')['model']['state_std'])


def test_two_processes_keep_one_state(trained_encoder, tmp_path):
    """Every process has the same times at every step, and they are those of a single process."""
    args = [*test_train.TINY, *TINY, trained_encoder, '--max_iters=8', '--eval_interval=8']
    train.main([*args, '--out_dir=one'])
    (tmp_path / 'script.py').write_text(test_train.SCRIPT.replace('configurator.run', """
import os, ldlm
begin_step, states = ldlm.LDLM.begin_step, []
def recording(self, *args):
    begin_step(self, *args)
    states.append({k: v.clone() for k, v in self.named_buffers()})
    torch.save(states, f'states{os.environ["RANK"]}.pt')
ldlm.LDLM.begin_step, ldlm.STATE_TOKENS = recording, 600
configurator.run"""))
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '--monitor-interval=0.1', 'script.py']
    r = subprocess.run([*torchrun, *args, '--out_dir=two', '--micro_batch=2'], capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert r.returncode == 0, r.stderr
    states = [torch.load(f'states{rank}.pt') for rank in range(2)]
    assert len(states[0]) == 8 and all(test_train.same(a, b) for a, b in zip(*states))
    a, b = test_train.weights('one'), test_train.weights('two')
    assert not [(k, float((a[k] - b[k]).abs().max())) for k in a if not torch.allclose(a[k], b[k], rtol=1e-3, atol=1e-3)]
    assert (a['times.sums'] != 0).all()


@pytest.mark.slow
@pytest.mark.parametrize('name', ['lm1b_ldlm', 'owt_ldlm'])
def test_true_size(name, monkeypatch, tmp_path):
    """Two steps with a GPT-2 of random weights; a GPU is not needed, 16 GB of memory are."""
    transformers = pytest.importorskip('transformers')
    gpt2 = transformers.GPT2Model(transformers.GPT2Config()).eval()

    def encoder(x, blank=None, layer=-1, summary=True):
        return gpt2(x, output_hidden_states=True).hidden_states[layer], None
    encoder.width, encoder.num_layers, encoder.model = 768, 12, gpt2

    class Data(test_train.Toy):
        vocab_size, block_size = 50257, read(name)['block_size']

        def batch(self, seed, step, rows):
            return (Noise(seed, step, rows, 1).uniform('toy', self.block_size) * self.vocab_size).long()
    monkeypatch.setattr(train, 'open_data', lambda *args: Data())
    monkeypatch.setattr(ldlm, 'open_encoder', lambda *args: encoder)
    monkeypatch.setattr(ldlm, 'check_tokenizer', lambda *args, **kwargs: None)
    monkeypatch.setattr(ldlm, 'STATE_TOKENS', 2048)
    train.main([os.path.join(ROOT, 'config', name + '.py'), f'--out_dir={tmp_path}/out', '--batch_size=2', '--max_iters=2', '--log_interval=1', '--compile=False'])
    records = test_train.log(f'{tmp_path}/out')
    assert [r['step'] for r in records] == [1, 2] and all(math.isfinite(r['loss']) for r in records)
