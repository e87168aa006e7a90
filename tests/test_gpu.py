"""What a GPU would make the host wait for, or refuse, on a machine without one.

Tensors of the device `meta` have shapes but no values. A step that asks for a value (`.item()`, `if tensor:`,
x[mask], a number of rows that depends on the data) fails there, and so does one that mixes them with tensors
forgotten on the CPU. Nothing here is `cpu`, so the branches are those of a GPU.
"""
import contextlib
import json
import os
import subprocess
import sys

import pytest
import torch

from lib import prepare
from lib.noise import Noise
from methods import build

V, B, L = 50, 8, 16
BASE = dict(vocab_size=V, block_size=L, hidden=16, num_layers=1, num_heads=2, cond_dim=8)
LADD = dict(method='ladd', num_latents=2, latent_dim=4, encoder_layers=1, stage1_iters=2)
METHODS = {
    'mdlm': dict(method='mdlm', dropout=0.1),
    **{name: dict(method=name) for name in ('ar', 'flm', 'candi', 'ssmd')},
    'duo': dict(method='duo', curriculum_iters=3),
    'duo_distilled': dict(method='duo_distilled', round_iters=3),
    'vadd': dict(method='vadd', encoder_layers=1, kl_warmup=4),
    'cadd': dict(method='cadd'),
    'geometric': dict(method='mdlm', schedule='geometric'),
    'co_ladd': dict(LADD, p_drop=0.1, encoder_dropout=True, p_start=0.1, latent_layers=1),
    'di_ladd': dict(LADD, latent='discrete', latent_schedule='linear', codebook_size=5, times='independent',
                    stage1_iters=4, vq_start=1),
    'ldlm': dict(method='ldlm', token_encoder='scratch', reconstruction='ce', latent_dim=16, latent_layers=1,
                 decoder_layers=1, adaptive_bins=4, adaptive_every=2, mask_states=0.1),
}


def step(method, i, accumulate=2):
    """What train.py does in a step, but for AdamW."""
    def draw_rows(n):
        return (torch.zeros(n, L, dtype=torch.int64, device='meta'),)
    noise = Noise(0, i, torch.arange(B, device='meta'), B)
    method.begin_step(i, noise, draw_rows)
    x, = draw_rows(B)
    for k in range(accumulate):
        loss, logs = method(x[k::accumulate], noise[k::accumulate])
        (loss / accumulate).backward()
    norm = torch.nn.utils.clip_grad_norm_(method.parameters(), 1.0)
    method.zero_grad(set_to_none=True)
    method.end_step(torch.isfinite(loss.detach() + norm), noise)
    return [loss, norm, *logs.values()]


@pytest.mark.parametrize('name', METHODS)
def test_no_step_asks_the_host(name, monkeypatch):
    """Six steps, with a stage's or the codebook's beginning and new times among them."""
    monkeypatch.setattr(torch, 'autocast', lambda *args, **kwargs: contextlib.nullcontext())  # meta has none
    with torch.device('meta'):
        method = build({**BASE, **METHODS[name]}).train()
    for i in range(6):
        assert {v.device.type for v in step(method, i)} == {'meta'}


@pytest.mark.parametrize('spoilt', ['value', 'shape', 'place'])
def test_it_would_be_seen(spoilt, monkeypatch):
    with torch.device('meta'):
        method = build({**BASE, 'method': 'mdlm'})
    corrupt = method.corrupt

    def wrapped(x, t, noise):
        x_t, mask = corrupt(x, t, noise)
        if spoilt == 'value' and mask.any():
            return x_t, mask
        return (x_t[mask] if spoilt == 'shape' else x_t + torch.zeros(L, dtype=torch.int64)), mask
    monkeypatch.setattr(method, 'corrupt', wrapped)
    with pytest.raises((RuntimeError, NotImplementedError), match='meta'):
        step(method, 0)


@pytest.mark.slow
def test_the_commands_for_the_first_gpu_are_rehearsed(tmp_path, monkeypatch):
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

    def python(script, *args):
        subprocess.run([sys.executable, os.path.join(root, script), *args], cwd=tmp_path, check=True)
    monkeypatch.setattr(prepare, 'DATA', str(tmp_path))
    prepare.write('toy', {'train': lambda: iter([('To be, or not to be. ' * 400, True)])}, 'char', tail=0.5)
    for command, parts in (('check', 5), ('neighbours', 6), ('bench', 3), ('train', 5)):
        python('tests/first_gpu.py', command, '--rehearse', f'--dataset={tmp_path}/toy')
        kept = json.loads((tmp_path / f'out/first_gpu/{command}.json').read_text())['parts']
        assert len(kept) == parts and all(kept.values()) and 'failed' not in json.dumps(kept)
        for numbers in kept.values() if command in ('check', 'neighbours') else ():
            assert numbers['largest relative difference of losses'] < 0.02  # bf16 has 8 bits
