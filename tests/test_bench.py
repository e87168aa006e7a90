import json
import os
import re
import subprocess
import sys

import pytest
import torch

import bench
import mdlm
from lib.checkpoint import build
from lib.configurator import UserError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = ['--hidden=16', '--num_layers=1', '--num_heads=2', '--cond_dim=8', '--batch_size=4', '--iters=2', '--device=cpu', '--steps=4']


def go(*args):
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    return subprocess.run([sys.executable, os.path.join(ROOT, 'bench.py'), *TINY, *args], capture_output=True, text=True, env=env, timeout=300)


LDLM = ['--method=ldlm', '--token_encoder=scratch', '--reconstruction=ce', '--latent_dim=16', '--latent_layers=1', '--decoder_layers=1']
DI_LADD = ['--method=ladd', '--latent=discrete', '--latent_schedule=linear', '--num_latents=4', '--latent_dim=4', '--codebook_size=7', '--encoder=out/never_opened',
           '--stored_latents=True', '--stage1_iters=0']
BLOCK = 12 * 16**2 + 2 * 32 * 16  # multiply-adds of a block of width 16, per token of 32


@pytest.mark.parametrize('args, multiply_adds', [
    (['--method=mdlm'], BLOCK + 0.5 * 16 * 100), (['--method=ar'], BLOCK + 16 * 100), (DI_LADD, (12 * 36 * 16**2 + 2 * 36**2 * 16) / 32 + 0.5 * 16 * 100),
    # denoiser, and a third of it for self-conditioning; encoder and decoder read keys of twice the places, with two more projections; token decoder; head
    (LDLM, BLOCK * 4 / 3 + 2 * (14 * 16**2 + 4 * 32 * 16) + (16 * 16**2 + 2 * 32 * 16) + 16 * 100)], ids=['mdlm', 'ar', 'di_ladd', 'ldlm'])
def test_it_prints_what_it_promises(args, multiply_adds):
    done = go(*args, '--vocab_size=100', '--block_size=32', '--num_samples=1')
    assert done.returncode == 0, done.stderr
    lines, method = done.stdout.splitlines(), args[0].partition('=')[2]
    assert lines[0] == f'{method}, 1 layers of width 16, L = 32, V = 100, batch 4, bfloat16'
    assert lines[1].startswith(f'{6 * multiply_adds / 1e9:.3g} training GFLOPs per token; peak assumed for MFU: cpu (1 threads)')
    assert lines[2].split() == ['eager', 'full', 'head', 'ratio']
    rows = {re.split(r'\s{2,}', line.strip())[0]: line.split() for line in lines[3:]}
    assert list(rows)[0] == 'training, tokens/s' and len(rows) == (6 if method == 'ladd' else 5)
    for key, cells in rows.items():  # the straightforward sampler is MDLM's
        assert cells[-1].endswith('x') == ('sampling' not in key or method == 'mdlm')


def test_a_variant_is_a_dict_of_numbers():
    done = go('--vocab_size=50', '--block_size=16', '--variant=eager')
    result = json.loads(done.stdout)
    assert result.keys() == {'gradient_memory', 'memory', 'tokens_per_s', 'sampling joint'} and all(v > 0 for v in result.values())
    assert 1e8 < result['gradient_memory'] <= result['memory'] < 1e10


def test_the_first_column_is_compiled_if_the_config_says_so(monkeypatch, capsys):
    """And a variant that fails, for want of memory, is a dash."""
    fast, slow = ({'tokens_per_s': v, 'gradient_memory': 1e9, 'memory': 2e9, 'sampling joint': 1.0} for v in (300.0, 100.0))
    monkeypatch.setattr(bench, 'in_its_own_process', lambda argv, variant: {'compiled': fast, 'eager': slow, 'full': {}}[variant])
    monkeypatch.setattr(bench, 'peak_flops', lambda device, dtype: (1e12, 'not measured'))
    bench.main([*TINY, '--vocab_size=50', '--block_size=16', '--compile=True'])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ['compiled', 'eager', 'full', 'head', 'ratio'] and lines[3].split() == ['training,', 'tokens/s', '300', '100', '-', '3x']
    monkeypatch.setattr(bench, 'in_its_own_process', lambda argv, variant: {})
    with pytest.raises(UserError, match='failed for the reason above'):
        bench.main([*TINY, '--vocab_size=50', '--block_size=16'])


def test_it_compiles_what_train_compiles(monkeypatch, capsys):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda self: compiled.append(type(self).__name__))
    for variant in ('eager', 'compiled'):
        bench.main([*TINY, '--compile=True', '--vocab_size=50', '--block_size=16', f'--variant={variant}', '--num_samples=0'])
    assert compiled == ['DiT']


def test_mistakes():
    for args, message in [(['--vocab_size=100'], 'want a block_size'), (['--dataset=nowhere'], '--vocab_size=50257 for random tokens'),
                          (['--method=ldlm', '--stage=autoencoder'], '--stage=joint')]:
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
