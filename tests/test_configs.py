"""Every file of config/: it parses, it builds, the paper's sizes are the paper's, and the ones for text train."""
import glob
import json
import os
from types import SimpleNamespace

import pytest
import torch

import train
from checkpoint import build, method_fields
from configurator import configure
from data import common, tokens

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CONFIGS = sorted(os.path.basename(path)[:-3] for path in glob.glob(os.path.join(ROOT, 'config', '*.py')))
VOCAB = {'sawtooth': 2, 'shakespeare_char': 65, 'text': 50257, 'lm1b': 151669, 'openwebtext': 151669}


def read(name, *args):
    return configure(train.defaults, [os.path.join(ROOT, 'config', name + '.py'), *args], method_fields)


def make(name, **more):
    """A method on the meta device: shapes without memory."""
    config = read(name)
    config['block_size'] = config['block_size'] or 128  # sawtooth's own
    with torch.device('meta'):
        return build({**config, 'vocab_size': VOCAB[config['dataset']], **more})


def parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize('name', CONFIGS)
def test_it_parses_and_builds(name):
    config = read(name)
    assert config['out_dir'] == os.path.join('out', name)
    train.check(SimpleNamespace(**config), 1)
    if config['dataset'] in VOCAB and config['method'] in ('mdlm', 'ladd', 'ar'):
        assert parameters(make(name)) > 0


@pytest.mark.parametrize('name', ['lm1b_mdlm', 'lm1b_ar', 'owt_mdlm'])
def test_the_settings_of_the_paper(name):
    c = SimpleNamespace(**read(name))
    assert (c.learning_rate, c.beta1, c.beta2, c.weight_decay, c.warmup_iters, c.decay_lr) == (3e-4, 0.9, 0.999, 0.03, 2500, 'constant')
    assert (c.grad_clip, c.dtype, c.ema, c.seed, c.dropout, c.batch_size) == (1.0, 'bfloat16', 0.9999, 42, 0.1, 512)
    assert (c.hidden, c.num_layers, c.num_heads, c.cond_dim) == (1024, 13, 16, 256)
    assert (c.block_size, c.max_iters) == ((512, 500_000) if c.dataset == 'openwebtext' else (128, 300_000))
    assert getattr(c, 'weighting', 'constant') == 'constant'
    method = make(name)
    assert round(parameters(method.dit.blocks) / 1e6) == 184 and f'{parameters(method.dit) / 1e6:.1f}' == '184.8'
    assert method.embed.weight.shape == (151670, 1024) and method.head.weight.shape == (151669, 1024)
    assert f'{method.flops(c.block_size) / 1e9:.2f}' == {128: '21.37', 512: '90.73'}[c.block_size]  # LADD table 12


@pytest.mark.parametrize('L, M, gflops', [(128, 128, '22.95'), (128, 32, '14.06'), (512, 64, '55.04'), (512, 16, '49.98')])
def test_mm_dit_of_the_paper(L, M, gflops):
    """LADD table 12 and its 184M parameters: 12 layers of width 768, two modalities."""
    with torch.device('meta'):
        method = build(dict(method='ladd', vocab_size=151669, block_size=L, num_latents=M, hidden=768, num_layers=12, num_heads=12, cond_dim=128))
    assert round(parameters(method.dit.blocks) / 1e6) == 184 and f'{parameters(method.dit) / 1e6:.1f}' == '184.7'
    assert f'{method.flops(L) / 1e9:.2f}' == gflops


@pytest.mark.parametrize('data', ['shakespeare_char', 'text', 'lm1b'])
def test_ar_and_mdlm_are_comparable(data):
    """Equal networks, tokens and optimizers: but for the method, its weighting and its name nothing differs."""
    mdlm, ar = read(f'{data}_mdlm'), read(f'{data}_ar')
    assert {k: v for k, v in mdlm.items() if k in ar and k not in ('method', 'out_dir')} == {k: v for k, v in ar.items() if k not in ('method', 'out_dir')}
    assert parameters(make(f'{data}_mdlm')) == parameters(make(f'{data}_ar'))


@pytest.mark.parametrize('name', ['shakespeare_char_mdlm', 'shakespeare_char_ar', 'text_mdlm', 'text_ar', 'lm1b_mdlm', 'lm1b_ar', 'owt_mdlm'])
def test_it_trains(name, tmp_path, monkeypatch):
    for module in (common, tokens):
        monkeypatch.setattr(module, 'DATA', str(tmp_path))
    common.write('tiny', {'train': lambda: iter([('to be or not to be ' * 40, True)])}, 'char', tail=0.5)
    train.main([os.path.join(ROOT, 'config', name + '.py'), '--dataset=tiny', f'--out_dir={tmp_path}/out', '--device=cpu', '--compile=False', '--block_size=16',
                '--hidden=16', '--num_layers=1', '--num_heads=2', '--cond_dim=8', '--batch_size=4', '--max_iters=2', '--log_interval=1', '--eval_seqs=4'])
    with open(tmp_path / 'out' / 'log.jsonl') as f:
        records = [json.loads(line) for line in f]
    assert [r['step'] for r in records] == [1, 2, 2] and 0 < records[-1]['val_loss'] < 10
