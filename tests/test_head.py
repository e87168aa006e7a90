"""The vocabulary head on masked rows only is the full computation: same loss, same gradients.

And the logits (B, L, V) never exist as a whole, and nothing is recompiled from step to step.
"""
import copy
import math
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode

import bench
import mdlm
import model
from lib.noise import Noise
from mdlm import alpha, elbo_weight, masked_rows
from methods import build

V, B, L = 50, 8, 16
BASE = dict(vocab_size=V, block_size=L, hidden=16, num_layers=1, num_heads=2, cond_dim=8)
CO_LADD = dict(method='ladd', num_latents=2, latent_dim=4)
DI_LADD = dict(CO_LADD, latent='discrete', latent_schedule='linear', codebook_size=5)
LDLM = dict(method='ldlm', token_encoder='scratch', reconstruction='ce', latent_dim=16, latent_layers=1,
            decoder_layers=1)


def make(method='mdlm', **config):
    torch.manual_seed(0)
    m = build(dict(BASE, method=method, **config))
    with torch.no_grad():
        for p in m.parameters():
            p.normal_(std=0.3)
    return m


def chunks(monkeypatch, rows, part):
    """Makes the head hold so many rows of logits at once, and so many of them in fp32."""
    monkeypatch.setattr(model, 'rows_at_once', lambda V, device, **fp32: part if fp32 else rows)


def data(step=0, b=B):
    x = torch.randint(V, (b, L), generator=torch.Generator().manual_seed(step))
    return x, Noise(0, step, torch.arange(b), b)


def full_loss(m, x, noise):
    """MDLM's loss written down as in the paper, over all positions."""
    t = 1e-4 + (1 - 1e-4) * noise.times('t_x', shuffled=False)
    x_t, mask = m.corrupt(x, t, noise)
    log_p = m.head(m.dit(m.embed(x_t))).float().log_softmax(dim=-1)
    nats = -log_p.gather(2, x[..., None])[..., 0] * mask
    weight = elbo_weight(t, m.config.schedule) if m.config.weighting == 'elbo' else torch.ones_like(t)
    return (weight * nats.sum(dim=1)).sum() / x.numel()


def gradients(m, loss):
    m.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in m.parameters()]


@pytest.mark.parametrize('rows', [None, 7, 1], ids=['one chunk', 'many chunks', 'row by row'])
@pytest.mark.parametrize('config', [{}, {'weighting': 'constant'}, {'schedule': 'geometric'}], ids=str)
def test_same_loss_and_gradients(config, rows, monkeypatch):
    if rows:
        chunks(monkeypatch, rows, max(1, rows // 2))
    m, (x, noise) = make(**config), data()
    loss, logs = m(x, noise)
    assert logs['overflow'] == 0
    full = full_loss(m, x, noise)
    torch.testing.assert_close(loss, full, rtol=1e-5, atol=0)
    for ours, theirs in zip(gradients(m, loss), gradients(m, full)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item() + 1e-9)


def test_same_in_bfloat16():
    m, (x, noise) = make(), data()
    exact = gradients(m, full_loss(m, x, noise))
    with torch.autocast('cpu', torch.bfloat16):
        loss, full = m(x, noise)[0], full_loss(m, x, noise)
    torch.testing.assert_close(loss, full, rtol=1e-3, atol=0)
    for ours, theirs, true in zip(gradients(m, loss), gradients(m, full), exact):
        error = (theirs - true).norm()  # as far from the fp32 gradient as bf16 is in any case
        assert (ours - true).norm() <= 1.5 * error + 1e-3 * true.norm() + 1e-9


def test_targets_that_are_nearly_certain_keep_their_gradient():
    """In bf16 p = .9999 is 1, and p - 1 would be 0."""
    head, h = torch.nn.Linear(1, 2, bias=True), torch.ones(1, 1)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[9.0], [0.0]]))
        head.bias.zero_()
    with torch.autocast('cpu', torch.bfloat16):
        loss = model.head_cross_entropy(head, h, torch.tensor([0]), torch.ones(1))
    loss.backward()
    exact = torch.sigmoid(torch.tensor(-9.0))
    torch.testing.assert_close(loss, F.softplus(torch.tensor(-9.0)), rtol=1e-3, atol=0)
    torch.testing.assert_close(head.weight.grad[:, 0], torch.stack((-exact, exact)), rtol=1e-2, atol=0)


def test_backward_twice_is_an_error_not_a_wrong_gradient():
    m, (x, noise) = make(), data()
    loss, _ = m(x, noise)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        loss.backward()


class Shapes(TorchDispatchMode):
    """The shapes of all tensors that come into being."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.shapes.add(tuple(t.shape))
        return out

    def largest(self):
        return max(map(math.prod, self.shapes))


@pytest.mark.parametrize('method', ['mdlm', 'ar', 'flm', 'duo', 'duo_distilled', 'candi', 'vadd', 'cadd',
                                    'ssmd'])
def test_logits_of_all_positions_never_exist(method, monkeypatch):
    chunks(monkeypatch, 10, 10)
    m = build(dict(method=method, vocab_size=2000, block_size=L, hidden=4, num_layers=1, num_heads=2,
                   cond_dim=4, hint_dim=4))
    x, noise = data()
    with Shapes() as seen:
        m(x, noise)[0].backward()
        m.nll(x, noise)
    assert seen.largest() == 10 * 2000 < B * L * 2000
    with Shapes() as seen:
        m.sample(2, steps=L)
    # about one token per call, or a chunk of all positions; 2 * L * 2000 would be all
    assert seen.largest() <= (8 if method in ('mdlm', 'ar', 'vadd') else 10) * 2000


def test_the_slots_hold_what_they_promise():
    """Their number is static, and every masked position is in one, once (none is left over here)."""
    for b, total in [(8, 8), (8, 32), (1, 1), (64, 64)]:
        sizes, static = set(), torch.compile(masked_rows, backend='eager', fullgraph=True)
        for step in range(20):
            noise = Noise(0, step, torch.arange(b) * (total // b), total)
            mask = noise.uniform('mask', L) < 1 - alpha(noise.times('t_x', shuffled=False))[:, None]
            rows, used, overflow = static(mask)
            sizes.add(len(rows))
            assert overflow == 0 and sorted(rows[used].tolist()) == mask.flatten().nonzero()[:, 0].tolist()
            assert len(rows.unique()) == len(rows)
            eager_rows, eager_used, _ = masked_rows(mask)  # a CPU drops most empty slots, in sizes of 64
            assert torch.equal(eager_rows[eager_used], rows[used])
            assert len(eager_rows) == min(len(rows), int(mask.sum()) // 64 * 64 + 64)
        assert len(sizes) == 1 and sizes.pop() <= b * L


def test_slots_are_few():
    """Evenly spaced times have nearly the mean.

    With 64 strata of 512 drawn at random .7 of all positions had to be ready.
    """
    rows, _, _ = torch.compile(masked_rows, backend='eager')(torch.zeros(64, 512, dtype=torch.bool))
    assert len(rows) < 0.53 * 64 * 512


def test_overflow_is_counted_and_not_silent(monkeypatch):
    m, (x, noise) = make(), data(b=64)
    everything = torch.ones_like(x, dtype=torch.bool)
    h = m.dit(m.embed(x))
    loss, overflow = m.token_loss(h, x, everything, torch.full((64,), 0.5))
    assert 0 < overflow == everything.sum() - len(masked_rows(everything)[0])
    _, overflow = m.token_loss(h, x, everything, torch.full((64,), 0.5), stratified=False)
    assert overflow == 0
    monkeypatch.setattr(m, 'corrupt', lambda x, t, noise: (x, everything))
    assert m(x, noise)[1]['overflow'] > 0


# ------------------------------------------------------------------------------------------------------------
# torch.compile

def compiled_steps(m, steps, backend='eager'):
    """Trains compiled and not, from the same weights -> number of graphs after each step.

    Losses and gradients must agree.
    """
    def draw_rows(n):
        return (torch.randint(V, (n, L), generator=torch.Generator().manual_seed(0)),)
    torch._dynamo.reset()
    counters.clear()
    plain, graphs = copy.deepcopy(m), []
    m.compile(fullgraph=True, backend=backend)  # fullgraph: a graph break is an error
    for step in range(steps):
        x, noise = data(step)
        results = []
        for method in (m, plain):
            method.begin_step(step, noise, draw_rows)
            loss, _ = method(x, noise)
            method.zero_grad()
            loss.backward()
            method.end_step(torch.tensor(True), noise)
            results.append((loss, [p.grad for p in method.parameters() if p.grad is not None]))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
        graphs.append(counters['stats']['unique_graphs'])
    return graphs


@pytest.mark.parametrize('config', [{}, dict(schedule='polynomial'), dict(method='ar'), dict(method='flm'),
                                    dict(method='duo'), dict(method='duo_distilled', round_iters=2),
                                    dict(method='vadd', kl_warmup=3), dict(method='cadd'),
                                    dict(method='candi'), dict(method='ssmd'),
                                    dict(CO_LADD, p_drop=0.1), DI_LADD], ids=str)
def test_one_graph_for_all_steps(config):
    backend = 'eager' if config else 'aot_eager'  # which traces the backward pass as well, and is slow
    assert compiled_steps(make(**config), 4, backend) == [1, 1, 1, 1]


def test_one_graph_when_the_logits_come_in_chunks(monkeypatch):
    chunks(monkeypatch, 20, 5)
    assert compiled_steps(make(), 3) == [1, 1, 1]


def test_one_more_graph_for_another_stage():
    m = make(**DI_LADD, stage1_iters=4, vq_start=2)
    assert compiled_steps(m, 7) == [1, 1, 2, 2, 3, 3, 3]


@pytest.mark.skipif(not any(map(shutil.which, ('g++', 'clang++'))), reason='needs a C++ compiler')
def test_compiled_logits_are_never_in_fp32(monkeypatch):
    """Softmax, loss and gradient are fused.

    What is written of a chunk of logits are its bf16 numbers and those of its gradient.
    """
    R, size = 96, 32
    chunks(monkeypatch, size, size)
    head, h = torch.nn.Linear(16, 4000), torch.randn(R, 16, requires_grad=True)

    def loss(h):
        with torch.autocast('cpu', torch.bfloat16):
            return model.head_cross_entropy(head, h, torch.arange(R), torch.ones(R))
    torch._dynamo.reset()
    result, code = run_and_get_code(torch.compile(loss, fullgraph=True), h)
    torch.testing.assert_close(result, loss(h), rtol=1e-3, atol=0)
    buffers = re.findall(rf'empty_strided_cpu\(\({size}, 4000\), \(4000, 1\), torch\.(\w+)\)', ''.join(code))
    assert buffers and set(buffers) == {'bfloat16'}


# ------------------------------------------------------------------------------------------------------------
# the other side of the benchmark

@pytest.mark.parametrize('config', [{}, dict(weighting='constant'), dict(method='ar'), dict(method='flm'),
                                    dict(method='duo'), dict(method='vadd'), dict(method='cadd'),
                                    dict(method='candi'), dict(method='ssmd', weighting='constant'),
                                    dict(CO_LADD, p_start=0.5), DI_LADD, LDLM], ids=str)
def test_the_full_head_of_the_benchmark_is_the_same_function(config, monkeypatch):
    """Of every method, and from the logits of all positions."""
    m, (x, noise) = make(**config), data()
    chunks(monkeypatch, 10, 10)
    for module, name in ((model, 'head_loss'), (mdlm, 'masked_rows')):
        monkeypatch.setattr(module, name, getattr(module, name))  # restored after the test
    losses, grads, all_logits = [], [], []
    for _ in range(2):
        m.zero_grad()
        with Shapes() as seen:
            losses.append(m(x, noise)[0])
            losses[-1].backward()
        grads.append([p.grad.clone() for p in m.parameters() if p.grad is not None])
        all_logits.append((B * L, V) in seen.shapes)
        bench.use_full_head()
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    assert all_logits == [False, True]
