"""model.py against an independent, slow definition of DiT and MM-DiT, and against the papers' sizes."""
import math
import re

import pytest
import torch
import torch.nn.functional as F
from helpers import scrambled

import model
from model import DiT, attend, head_cross_entropy, head_nll, rope_table, rotate


def scrambled_dit(*args, **kwargs):
    """A double-precision DiT that has left its initialisation: AdaLN and biases are not zero."""
    return scrambled(DiT(*args, **kwargs).double())


# ------------------------------------------------------------------------------------------------------------
# the definition, one sequence, one head and one position at a time

def layer_norm(x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5)


def gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x):
    return x / (1 + torch.exp(-x))


def rope(v, position):
    """One head's vector as head_dim / 2 complex numbers, each turned by position * 10000^(-2i / head_dim)."""
    half = len(v) // 2
    theta = torch.tensor([10000.0 ** (-2 * i / len(v)) for i in range(half)], dtype=torch.float64)
    turned = torch.complex(v[:half], v[half:]) * torch.polar(torch.ones_like(theta), position * theta)
    return torch.cat((turned.real, turned.imag))


def reference(net, xs, ts, heads, causal=False):
    """xs: per modality (S_i, d), ts: per modality a number -> hidden states per modality, of one sequence."""
    W = dict(net.named_parameters())
    cs = []
    for i, t in enumerate(ts):
        angles = torch.tensor([1000 * t * 10000 ** (-j / 128) for j in range(128)], dtype=torch.float64)
        waves = torch.cat((angles.cos(), angles.sin()))
        c = silu(W[f'time.{i}.mlp.0.weight'] @ waves + W[f'time.{i}.mlp.0.bias'])
        cs.append(silu(W[f'time.{i}.mlp.2.weight'] @ c + W[f'time.{i}.mlp.2.bias']))
    d, hd = xs[0].shape[1], xs[0].shape[1] // heads
    for b in range(net.num_layers):
        rows, ada = [], []
        for i, (x, c) in enumerate(zip(xs, cs)):
            p = f'blocks.{b}.modalities.{i}.'
            ada.append((W[p + 'ada.weight'] @ c + W[p + 'ada.bias']).view(6, d))
            rows += list((layer_norm(x) * (1 + ada[i][1]) + ada[i][0]) @ W[p + 'qkv.weight'].T)
        S, y = len(rows), torch.zeros(len(rows), d, dtype=torch.float64)
        for h in range(heads):
            part = slice(h * hd, (h + 1) * hd)
            q, k, v = (torch.stack([row.view(3, d)[j, part] for row in rows]) for j in range(3))
            q, k = (torch.stack([rope(vec, pos) for pos, vec in enumerate(vecs)]) for vecs in (q, k))
            for pos in range(S):
                seen = pos + 1 if causal else S
                y[pos, part] = torch.softmax(k[:seen] @ q[pos] / math.sqrt(hd), dim=0) @ v[:seen]
        out, start = [], 0
        for i, x in enumerate(xs):
            p = f'blocks.{b}.modalities.{i}.'
            x = x + ada[i][2] * (y[start:start + len(x)] @ W[p + 'out.weight'].T)
            m = (layer_norm(x) * (1 + ada[i][4]) + ada[i][3]) @ W[p + 'mlp.0.weight'].T + W[p + 'mlp.0.bias']
            out.append(x + ada[i][5] * (gelu_tanh(m) @ W[p + 'mlp.2.weight'].T + W[p + 'mlp.2.bias']))
            start += len(x)
        xs = out
    final = [(W[f'ada.{i}.weight'] @ c + W[f'ada.{i}.bias']).view(2, d) for i, c in enumerate(cs)]
    return [layer_norm(x) * (1 + f[1]) + f[0] for x, f in zip(xs, final)]


@pytest.mark.parametrize('causal', [False, True])
def test_dit_is_its_definition(causal):
    net = scrambled_dit(16, 2, 2, 8, positions=9, causal=causal)
    x, t = torch.randn(3, 7, 16, dtype=torch.float64), torch.tensor([0.1, 0.5, 1.0])
    h = net(x, t=[t])
    for b in range(3):
        (expected,) = reference(net, [x[b]], [float(t[b])], 2, causal)
        torch.testing.assert_close(h[b], expected, rtol=1e-4, atol=1e-4)  # RoPE and t are fp32


def test_mm_dit_is_its_definition():
    """Two modalities with weights and times of their own, one attention over both.

    The positions of the second modality follow those of the first.
    """
    net = scrambled_dit(16, 2, 4, 8, positions=9, modalities=2)
    x, z, t = torch.randn(2, 5, 16).double(), torch.randn(2, 3, 16).double(), torch.tensor([0.25, 0.75])
    h_x, h_z = net(x, z, t=[None, t])
    for b in range(2):
        ref_x, ref_z = reference(net, [x[b], z[b]], [0.0, float(t[b])], 4)
        torch.testing.assert_close(h_x[b], ref_x, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(h_z[b], ref_z, rtol=1e-4, atol=1e-4)


def test_one_modality_with_shared_weights_is_the_dit():
    """An MM-DiT whose modalities hold equal weights and times is the DiT over the concatenation."""
    one, two = scrambled_dit(16, 2, 2, 8, positions=8), DiT(16, 2, 2, 8, positions=8, modalities=2).double()
    weights = one.state_dict()
    shared = {k: re.sub(r'(modalities|time|ada)\.1', r'\1.0', k) for k in two.state_dict()}
    two.load_state_dict({k: weights[name] for k, name in shared.items()})
    x, t = torch.randn(2, 8, 16).double(), torch.rand(2)
    torch.testing.assert_close(torch.cat(two(x[:, :5], x[:, 5:], t=[t, t]), dim=1), one(x, t=[t]))


def test_blocks_begin_as_the_identity():
    torch.manual_seed(0)
    net = DiT(16, 3, 2, 8, positions=8, modalities=2)
    x, z = torch.randn(2, 5, 16), torch.randn(2, 3, 16)
    h_x, h_z = net(x, z, t=[torch.rand(2), torch.rand(2)])
    torch.testing.assert_close(h_x, F.layer_norm(x, (16,)))
    torch.testing.assert_close(h_z, F.layer_norm(z, (16,)))


def test_rope_sees_distances_only():
    """q at position i meets k at position j in a score that depends on i - j, and does depend on it."""
    torch.manual_seed(0)
    cos, sin = rope_table(64, 16)
    cos, sin = cos.double(), sin.double()
    q, k = (rotate(torch.randn(16).double().expand(1, 1, 64, 16), cos, sin)[0, 0] for _ in range(2))
    scores = q @ k.T
    for offset in (-20, -1, 0, 3, 31):
        diagonal = scores.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    assert scores[0].std() > 0.1


def test_order_matters_to_the_dit():
    net = scrambled_dit(16, 1, 2, 8, positions=8)
    x = torch.randn(1, 6, 16).double()
    order = torch.tensor([1, 0, 2, 3, 4, 5])
    assert (net(x[:, order]) - net(x)[:, order]).abs().max() > 1e-2


@pytest.mark.parametrize('prefill', [0, 4])
def test_caches_give_the_full_causal_pass(prefill):
    net = scrambled_dit(16, 3, 2, 8, positions=10, causal=True)
    x = torch.randn(2, 10, 16).double()
    caches = [[torch.zeros(2, 2, 0, 8).double(), torch.zeros(2, 2, 0, 8).double()] for _ in range(3)]
    h = [net(x[:, :prefill], caches=caches)] if prefill else []
    h += [net(x[:, i:i + 1], caches=caches) for i in range(prefill, 10)]
    torch.testing.assert_close(torch.cat(h, dim=1), net(x))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_the_last_queries_attend_as_among_all(dtype):
    """As with a cache: keys of earlier positions, without their queries."""
    q, k, v = torch.randn(3, 2, 2, 7, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    last = attend(q[:, :, 3:], k, v, causal=True)
    torch.testing.assert_close(last, attend(q, k, v, causal=True)[:, :, 3:])


def test_causal_positions_do_not_see_ahead():
    net = scrambled_dit(16, 2, 2, 8, positions=8, causal=True)
    x = torch.randn(1, 8, 16).double()
    later = x.clone()
    later[:, 5:] += 1
    assert torch.equal(net(x)[:, :5], net(later)[:, :5])
    assert not torch.equal(net(x)[:, 5:], net(later)[:, 5:])


# ------------------------------------------------------------------------------------------------------------
# the papers' sizes

@pytest.mark.parametrize('hidden, layers, heads, cond, modalities', [
    (1024, 13, 16, 256, 1), (768, 12, 12, 128, 2)], ids=['MDLM', 'LADD'])
def test_paper_sizes_have_184M_parameters(hidden, layers, heads, cond, modalities):
    with torch.device('meta'):
        net = DiT(hidden, layers, heads, cond, 640, modalities)
    assert round(sum(p.numel() for p in net.blocks.parameters()) / 1e6) == 184


@pytest.mark.parametrize('hidden, layers, S, gflops', [
    # LM1B: MDLM, LADD-128, LADD-32
    (1024, 13, 128, '21.37'), (768, 12, 128 + 128, '22.95'), (768, 12, 128 + 32, '14.06'),
    # OWT: MDLM, LADD-64, LADD-16
    (1024, 13, 512, '90.73'), (768, 12, 512 + 64, '55.04'), (768, 12, 512 + 16, '49.98')])
def test_flops_are_those_of_table_12(hidden, layers, S, gflops):
    with torch.device('meta'):
        net = DiT(hidden, layers, 4, 128, S, modalities=2)
    assert f'{net.flops(S) / 1e9:.2f}' == gflops


def test_attention_has_no_biases():
    net = DiT(16, 2, 2, 8, positions=8, modalities=2)
    names = [name for name, _ in net.named_parameters()]
    assert sum('qkv' in name for name in names) == sum('.out.' in name for name in names) == 4
    assert not [name for name in names if ('qkv' in name or '.out.' in name) and 'bias' in name]


# ------------------------------------------------------------------------------------------------------------
# the vocabulary head

@pytest.mark.parametrize('rows', [4, 11, 40])
def test_head_cross_entropy_is_cross_entropy(rows, monkeypatch):
    """Value and all gradients, also where chunks of logits, or parts of chunks, do not divide 11 rows."""
    monkeypatch.setattr(model, 'rows_at_once', lambda *args, cpu=0: rows // 2 + 1 if cpu else rows)
    torch.manual_seed(0)
    head, h = torch.nn.Linear(6, 7).double(), torch.randn(11, 6).double().requires_grad_()
    targets, weights = torch.randint(7, (11,)), torch.rand(11).double()
    weights[3] = 0
    leaves = [h, head.weight, head.bias]
    expected = F.cross_entropy(head(h), targets, reduction='none')
    losses = head_cross_entropy(head, h, targets, weights), (expected * weights).sum()
    torch.testing.assert_close(losses[0].double(), losses[1], rtol=1e-5, atol=1e-5)  # the sum is fp32
    for ours, theirs in zip(*(torch.autograd.grad(3 * loss, leaves) for loss in losses)):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        nats = head_nll(head, h, targets).double()
        torch.testing.assert_close(nats, expected, rtol=1e-5, atol=1e-5)
