"""The sweep of learning rates."""
import json
import os
import re

import pytest
from helpers import fails

import train
from examples import sweep
from lib.configurator import configure
from methods import METHODS


def test_all_that_is_counted_in_steps_shrinks_and_nothing_else():
    config = configure(train.Config, ['config/shakespeare_char_di_ladd_learned.py'], METHODS)
    assert set(sweep.shrunk(config, 0.1)) == {
        '--max_iters=550', '--warmup_iters=10', '--stage1_iters=100', '--vq_start=40', '--stage3_start=250',
        '--eval_interval=550'}
    config = configure(train.Config, ['config/sawtooth_vadd.py'], METHODS)
    assert '--kl_warmup=1' in sweep.shrunk(config, 1e-6)  # 0 would be another method


def test_a_rate_is_trained_once_and_its_line_repeats_it(tmp_path, monkeypatch, capsys):
    (tmp_path / 'config').symlink_to(os.path.abspath('config'))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, 'report', lambda method: None)
    size = [f'--{k}={v}' for k, v in dict(hidden=8, num_layers=1, num_heads=1, cond_dim=8, batch_size=2,
                                          eval_seqs=2, max_iters=20, dtype='float32').items()]
    argv = ['config/sawtooth_ssmd.py', *size, '--part=0.1']
    sweep.main([*argv, '--rates=1e-3'])
    line, = map(json.loads, open('out/sweeps.jsonl'))
    record = [json.loads(text) for text in open('out/sweep/sawtooth_ssmd_muon_0.001/log.jsonl')][-1]
    assert (line['val_loss'], record['step']) == (record['val_loss'], 2)
    assert line['command'].startswith('python train.py config/sawtooth_ssmd.py --hidden=8')
    assert '--learning_rate=0.001' in line['command']
    sweep.main([*argv[:-1], '--part=0.15', '--rates=1e-3'])  # from the beginning, too
    with open('out/sweep/sawtooth_ssmd_muon_0.001/log.jsonl') as f:
        assert {json.loads(text)['step'] for text in f} == {3}
    trained = []
    monkeypatch.setattr(train, 'main', trained.append)
    monkeypatch.setattr(sweep, 'last_validation', lambda out_dir: {'val_loss': 7.0})
    sweep.main([*argv, '--rates=1e-3,2e-3'])
    assert [flag for argv in trained for flag in argv if 'rate' in flag] == ['--learning_rate=0.002']
    assert re.search(rf'0.001 +{line["val_loss"]:.4f}.*\n0.002 +7.0000', capsys.readouterr().out)


@pytest.mark.parametrize('argv, match', [
    (['config/sawtooth_mdlm.py', '--rates=fast'], 'wants numbers'),
    (['config/sawtooth_mdlm.py', '--rates=-1'], 'at least 0'),
    (['config/sawtooth_mdlm.py', '--part=2'], 'at most 1'), (['config/sawtooth_mdml.py'], 'did you mean')])
def test_mistakes(argv, match, monkeypatch, capsys):
    assert match in fails(sweep, monkeypatch, capsys, *argv)
