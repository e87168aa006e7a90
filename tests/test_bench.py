import json
import os
import re
import subprocess
import sys

import pytest
import torch

import bench
import mdlm
from checkpoint import build
from configurator import UserError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = ['--hidden=16', '--num_layers=1', '--num_heads=2', '--cond_dim=8', '--batch_size=4', '--iters=2', '--device=cpu', '--steps=4']


def go(*args):
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    return subprocess.run([sys.executable, os.path.join(ROOT, 'bench.py'), *TINY, *args], capture_output=True, text=True, env=env, timeout=300)


@pytest.mark.parametrize('method', ['mdlm', 'ar'])
def test_it_prints_what_it_promises(method):
    done = go(f'--method={method}', '--vocab_size=100', '--block_size=32', '--num_samples=1')
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    flops = 6 * ((12 * 16**2 + 2 * 32 * 16) + (1 if method == 'ar' else 0.5) * 16 * 100)  # per token
    assert lines[0] == f'{method}, 1 layers of width 16, L = 32, V = 100, batch 4, bfloat16'
    assert lines[1].startswith(f'{flops / 1e9:.3g} training GFLOPs per token; peak assumed for MFU: cpu (1 threads)')
    rows = {re.split(r'\s{2,}', line.strip())[0]: line.split() for line in lines[3:]}
    assert list(rows)[0] == 'training, tokens/s' and len(rows) == 5
    assert all(cell[-1].endswith('x') for key, cell in rows.items() if 'sampling' not in key or method == 'mdlm')


def test_a_variant_is_a_dict_of_numbers():
    done = go('--vocab_size=50', '--block_size=16', '--variant=ours')
    result = json.loads(done.stdout)
    assert result.keys() == {'gradient_memory', 'memory', 'tokens_per_s', 'sampling'} and all(v > 0 for v in result.values())
    assert 1e8 < result['gradient_memory'] <= result['memory'] < 1e10


def test_it_compiles_what_train_compiles(monkeypatch, capsys):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda self: compiled.append(type(self).__name__))
    bench.main([*TINY, '--compile=True', '--vocab_size=50', '--block_size=16', '--variant=ours', '--num_samples=0'])
    assert compiled == ['DiT']


def test_mistakes():
    for args, message in [(['--vocab_size=100'], 'want a block_size'), (['--dataset=nowhere'], '--vocab_size=50257 for random tokens')]:
        with pytest.raises(UserError, match=message):
            bench.main([*TINY, *args])


def test_reference_sampler_has_the_law_of_ours():
    """Marginal of the tokens after all steps, for a network that ignores its input but for the position."""
    torch.manual_seed(0)
    method = build(dict(method='mdlm', vocab_size=3, block_size=4, hidden=8, num_layers=1, num_heads=1, cond_dim=4)).eval()
    torch.nn.init.normal_(method.head.bias)
    torch.nn.init.zeros_(method.head.weight)
    p = method.head.bias.softmax(dim=0)
    x = bench.full_sample(method, torch.full((5000, 4), 3), mdlm.alpha(mdlm.time_grid(4)), 4)
    for sample in (x, method.sample(5000, 4)):
        counts = torch.bincount(sample.flatten(), minlength=4)
        assert counts[3] == 0 and ((counts[:3] - 20000 * p) ** 2 / (20000 * p)).sum() < 20
    x = bench.full_sample(method, torch.full((5000, 4), 3), mdlm.alpha(mdlm.time_grid(4)), 1)
    assert (x == 3).float().mean().item() == pytest.approx(0.75, abs=0.02)
