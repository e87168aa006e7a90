"""The example method of CONTRIBUTING.md: what it promises holds, and the scripts work with it."""
import itertools
import os
import re
import types

import pytest
import torch
from helpers import chi_square, generator, log, scrambled

import bench
import eval as evaluation
import sample
import train
from methods import METHODS

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@pytest.fixture
def halves(tmp_path, monkeypatch):
    """The class of the example, which is also a method of the scripts."""
    with open(os.path.join(ROOT, 'CONTRIBUTING.md'), encoding='utf-8') as f:
        code, = re.findall(r'```python\n(.*?)```', f.read(), re.DOTALL)
    module = types.ModuleType('halves')
    exec(code, vars(module))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(METHODS, 'halves', module.Halves)
    return module.Halves


def test_its_samples_have_its_likelihood(halves):
    config = halves.Config(vocab_size=2, block_size=4, hidden=8, num_layers=1, num_heads=2, cond_dim=4)
    method = scrambled(halves(config)).eval()
    p = (-method.nll(torch.tensor(list(itertools.product(range(2), repeat=4))))).exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-4)
    x = method.sample(20000, steps=7, generator=generator())
    counts = torch.bincount((x * torch.tensor([8, 4, 2, 1])).sum(dim=1), minlength=16)
    assert abs(chi_square(counts, p)) < 4.5
    with pytest.raises(ValueError, match='no strategy'):
        method.sample(1, 1, strategy='seq')


def test_the_scripts_work_with_it(halves, capsys):
    tiny = ['--hidden=16', '--num_layers=1', '--num_heads=2', '--batch_size=4', '--device=cpu']
    train.main(['--method=halves', '--out_dir=out/halves', '--max_iters=3', '--log_interval=1',
                '--eval_seqs=8', *tiny])
    assert len([r for r in log('out/halves') if 'loss' in r]) == 3
    run = ['--out_dir=out/halves', '--num_samples=8', '--device=cpu']
    sample.main(run)
    evaluation.main([*run, '--metrics=val_ppl,swd', '--val_seqs=8'])
    assert '"val_ppl_is": "exact"' in capsys.readouterr().out
    bench.main(['--method=halves', '--variant=eager', '--iters=1', '--num_samples=1', *tiny])
