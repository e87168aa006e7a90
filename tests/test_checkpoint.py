"""lib/checkpoint.py, files.py and device.py: what is written whole or not at all, and read without risk."""
import errno
import json
import math
import os
import pickle
import subprocess
import sys

import pytest
import torch
from helpers import TOY_METHODS, disk_full, go, open_toy, same, toy_teacher, weights

import train
from lib import checkpoint
from lib.configurator import UserError, configure
from lib.device import compile_in_place, pick_device
from lib.distributed import rank_and_world
from lib.files import append, read_lines, whole
from mdlm import MDLM
from methods import METHODS, build, open_run

CONFIG = dict(method='mdlm', vocab_size=3, block_size=8, hidden=16, num_layers=1, num_heads=2, cond_dim=8,
              dataset='toy', learning_rate=1e-3)


def make(step=1):
    torch.manual_seed(step)
    method = build(CONFIG)
    return {'config': CONFIG, 'model': method.state_dict(),
            'ema': {k: p.detach() + 1 for k, p in method.named_parameters()}, 'optimizer': {}, 'step': step,
            'tokens': 8 * step}


def test_out_dir_to_method(tmp_path):
    saved = make()
    checkpoint.save(str(tmp_path / 'ckpt.pt'), saved)
    assert os.listdir(tmp_path) == ['ckpt.pt'] and checkpoint.load(str(tmp_path / 'ckpt.pt'))['format'] == 2
    method, config = open_run(str(tmp_path), 'cpu')
    assert isinstance(method, MDLM) and not method.training and config == {**CONFIG, 'step': 1}
    for name, p in method.named_parameters():  # the averaged weights
        assert torch.equal(p, saved['model'][name] + 1)


def test_keys_of_a_method():
    config = configure(train.Config, [], METHODS)
    assert 'hidden' in config and 'vocab_size' not in config
    with pytest.raises(UserError, match='no method mdml: did you mean mdlm'):
        configure(train.Config, ['--method=mdml'], METHODS)
    with pytest.raises(UserError, match='no method mdml; there are: mdlm'):
        build({**CONFIG, 'method': 'mdml'})
    for wrong in (dict(hidden=0), dict(num_heads='x'), dict(dropout=None)):
        with pytest.raises(UserError, match=[*wrong][0]):
            build({**CONFIG, **wrong})


# ------------------------------------------------------------------------------------------------------------
# what is no checkpoint

def test_no_checkpoint_names_the_command(tmp_path):
    with pytest.raises(UserError, match='python train.py config/'):
        open_run(str(tmp_path / 'nothing'), 'cpu')


def spoil_cut(path):
    data = open(path, 'rb').read()
    open(path, 'wb').write(data[:len(data) // 2])


def spoil_empty(path):
    open(path, 'wb').close()


def spoil_text(path):
    open(path, 'w').write('hello')


def spoil_foreign(path):
    torch.save({'weights': torch.zeros(3)}, path)


def spoil_list(path):
    torch.save([1, 2], path)


def spoil_version(path):
    torch.save({**make(), 'format': 99}, path)


def spoil_first_format(path):
    torch.save({**make(), 'format': 1, 'optimizer': {99: {}}}, path)


def spoil_shape(path):
    torch.save({'format': 2, **make(), 'model': {'x': torch.zeros(2)}}, path)


@pytest.mark.parametrize('spoil', [spoil_cut, spoil_empty, spoil_text, spoil_foreign, spoil_list,
                                   spoil_version, spoil_first_format, spoil_shape])
def test_what_is_no_checkpoint_gets_one_line(tmp_path, spoil):
    path = str(tmp_path / 'ckpt.pt')
    checkpoint.save(path, make())
    spoil(path)
    with pytest.raises(UserError, match='ckpt.pt'):
        open_run(str(tmp_path), 'cpu')


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ['BOMB'],)


def test_a_checkpoint_cannot_run_code(tmp_path, monkeypatch):
    monkeypatch.setenv('BOMB', str(tmp_path / 'bomb'))
    torch.save({'format': 2, **make(), 'optimizer': Bomb()}, tmp_path / 'a.pt')
    (tmp_path / 'b.pt').write_bytes(pickle.dumps(Bomb(), protocol=2))
    for name in 'a.pt', 'b.pt':
        with pytest.raises(UserError):
            checkpoint.load(str(tmp_path / name))
    assert not (tmp_path / 'bomb').exists()


# ------------------------------------------------------------------------------------------------------------
# checkpoints of the first edition

def test_format_1_is_converted_on_load(tmp_path):
    """Optimizer states by number, matrices first, become states by name; all else stays."""
    shapes = {'z_mask': (4,), 'embed.weight': (5, 3), 'head.bias': (5,), 'head.weight': (5, 3),
              'dit.queries': (2, 2, 3), 'norm.weight': (3,), 'scale': ()}
    ema = {name: torch.full(shape, float(i)) for i, (name, shape) in enumerate(shapes.items())}
    buffers = {'quantizer.codebook': torch.ones(5, 4), 'quantizer.counts': torch.ones(5)}
    numbered = ['embed.weight', 'head.weight', 'dit.queries',  # more than one dimension
                'z_mask', 'head.bias', 'norm.weight', 'scale']
    states = {i: {'step': torch.tensor(7.0), 'exp_avg': ema[name] * 10} for i, name in enumerate(numbered)}
    del states[1]  # a weight that has never had a gradient has no state
    old = {'format': 1, 'config': {**CONFIG, 'method': 'ladd'}, 'model': {**ema, **buffers}, 'ema': ema,
           'optimizer': states, 'step': 7, 'tokens': 99}
    torch.save(old, tmp_path / 'ckpt.pt')

    new = checkpoint.load(str(tmp_path / 'ckpt.pt'))
    assert new.keys() == old.keys() and new['format'] == 2
    assert all(new[k] == old[k] for k in ('config', 'step', 'tokens'))
    assert same(new['model'], old['model']) and same(new['ema'], old['ema'])
    assert new['optimizer'].keys() == new['ema'].keys() - {'head.weight'}
    for name, state in new['optimizer'].items():
        assert state['step'] == 7 and torch.equal(state['exp_avg'], new['ema'][name] * 10)


def as_format_1(new):
    """What the first edition would have written in place of this checkpoint."""
    matrices, vectors = ([name for name, w in new['ema'].items() if (w.dim() > 1) == wide]
                         for wide in (True, False))
    numbers = {name: i for i, name in enumerate(matrices + vectors)}
    return {**new, 'format': 1,
            'optimizer': {numbers[name]: state for name, state in new['optimizer'].items()}}


@pytest.mark.parametrize('name', TOY_METHODS)
def test_a_run_of_the_first_edition_continues_exactly(name, tmp_path, monkeypatch):
    """Within stage 1, where the quantizer moves, and beyond."""
    monkeypatch.setattr(train, 'open_data', open_toy)
    monkeypatch.chdir(tmp_path)
    args = [*TOY_METHODS[name], '--eval_interval=100']
    toy_teacher()
    expected = go('whole', *args, '--max_iters=8')
    go('a', *args, '--max_iters=4')
    torch.save(as_format_1(checkpoint.load('a/ckpt.pt')), 'a/ckpt.pt')
    open_run('a', 'cpu')
    assert go('a', *args, '--max_iters=8') == expected and same(weights('a'), weights('whole'))


def test_keys_that_had_no_effect_do_not_stop_a_run_of_the_first_edition(tmp_path, monkeypatch):
    """It accepted them. Now training refuses them, but continues, and opens, a run that was given some."""
    monkeypatch.setattr(train, 'open_data', open_toy)
    monkeypatch.chdir(tmp_path)
    args = [*TOY_METHODS['di_ladd'], '--eval_interval=100']
    go('a', *args, '--max_iters=3')
    old = as_format_1(checkpoint.load('a/ckpt.pt'))
    old['config'].update(unit_norm=False, latent_length=3.0, p_drop=0.5)
    torch.save(old, 'a/ckpt.pt')
    assert open_run('a', 'cpu')[0].config.p_drop == 0.5
    with pytest.raises(UserError, match="p_drop=0.5 has no effect with latent='discrete'"):
        go('a', *args, '--max_iters=4', '--p_drop=0.5')
    with pytest.raises(UserError, match='holds a run with num_heads=2, not num_heads=4'):
        go('a', *args, '--max_iters=4', '--num_heads=4')  # of the same shapes, but with another meaning
    assert len(go('a', *args, '--max_iters=4')) == 4


# ------------------------------------------------------------------------------------------------------------
# written whole or not at all

def test_a_failed_write_keeps_the_old_one(tmp_path, monkeypatch):
    path = str(tmp_path / 'ckpt.pt')
    checkpoint.save(path, make(1))

    def full(*args):
        raise OSError(errno.ENOSPC, 'No space left on device')
    for module, name in (torch, 'save'), (os, 'fsync'), (os, 'replace'):
        with monkeypatch.context() as m:
            m.setattr(module, name, full)
            with pytest.raises(UserError, match='No space left on device.*is kept'):
                checkpoint.save(path, make(2))
        assert os.listdir(tmp_path) == ['ckpt.pt'] and checkpoint.load(path)['step'] == 1
    with pytest.raises(UserError, match='cannot write .*there is none before it'):
        checkpoint.save(path + '/ckpt.pt', make())  # where a folder cannot be
    checkpoint.save(str(tmp_path / 'a' / 'new' / 'ckpt.pt'), make())
    assert checkpoint.load(str(tmp_path / 'a' / 'new' / 'ckpt.pt'))['step'] == 1


def test_full_disk_and_kill_inside_the_write(tmp_path):
    """The real thing in a process of its own: a disk that ends at 20 kB; then a kill within the write."""
    path = str(tmp_path / 'ckpt.pt')
    checkpoint.save(path, make(1))
    setup = (f'import sys; sys.path[:0] = {sys.path!r}; import os, resource, signal, torch, test_checkpoint; '
             'from lib import checkpoint, configurator; ')
    limit = 'resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); '
    write = f'configurator.run(lambda argv: checkpoint.save({path!r}, test_checkpoint.make(2)))'
    r = subprocess.run([sys.executable, '-c', setup + limit + write], capture_output=True, text=True)
    assert (r.returncode, r.stderr.count('\n')) == (2, 1), r.stderr
    assert 'the one before it is kept' in r.stderr
    assert os.listdir(tmp_path) == ['ckpt.pt'] and checkpoint.load(path)['step'] == 1

    kill = 'os.fsync = lambda fd: (os.truncate(fd, 1000), os.kill(os.getpid(), signal.SIGKILL)); '
    assert subprocess.run([sys.executable, '-c', setup + kill + write]).returncode == -9
    assert checkpoint.load(path)['step'] == 1
    checkpoint.save(path, make(3))  # and the half-written file is in nobody's way
    assert os.listdir(tmp_path) == ['ckpt.pt'] and checkpoint.load(path)['step'] == 3


def test_of_several_files_the_last_one_marks_the_set(tmp_path, monkeypatch):
    """Wherever a kill falls between the renames, there is the new set, or a folder without the mark."""
    monkeypatch.chdir(tmp_path)
    names = ('a', 'b', 'mark')

    def write(text):
        with whole(*names) as temps:
            for temp in temps:
                with open(temp, 'w') as f:
                    f.write(text)

    class Killed(BaseException):
        pass
    seen, replace = set(), os.replace
    for survived in range(4):
        def dies(*args, left=[survived]):  # noqa: B006
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            replace(*args)
        write('old')
        with monkeypatch.context() as m:
            m.setattr(os, 'replace', dies)
            try:
                write('new')
            except Killed:
                assert survived < 3
        there = {name: open(name).read() for name in names if os.path.exists(name)}
        assert 'mark' not in there or len(set(there.values())) == 1
        seen.add(there.get('mark'))
        assert not [name for name in os.listdir() if name.endswith('.tmp')]
    assert seen == {None, 'new'}
    write('old')
    with pytest.raises(Killed), whole(*names) as temps:
        with open(temps[0], 'w') as f:
            f.write('half')
        raise Killed
    assert sorted(os.listdir()) == sorted(names) and {open(name).read() for name in names} == {'old'}


def test_lines_are_appended_whole_or_not_at_all(tmp_path):
    path = str(tmp_path / 'a.jsonl')
    append(path)
    assert os.path.getsize(path) == 0
    append(path, {'a': 1, 'b': float('nan')}, {'a': 2})
    with disk_full(40), pytest.raises(UserError, match=r'cannot write .*a.jsonl \(the disk is full\)'):
        append(path, {'a': 'x' * 40})
    append(path, {'a': 3})
    assert open(path).read() == '{"a": 1, "b": null}\n{"a": 2}\n{"a": 3}\n'
    with pytest.raises(UserError, match='cannot write .*No such file'):
        append(str(tmp_path / 'nowhere' / 'a.jsonl'))


def test_lines_are_read_without_a_torn_one(tmp_path):
    path = str(tmp_path / 'a.jsonl')
    assert read_lines(path) == []
    append(path, {'a': 1}, {'a': 2})
    with open(path, 'a') as f:
        f.write('{"a": 3')
    assert read_lines(path) == [{'a': 1}, {'a': 2}]
    with open(path, 'a') as f:
        f.write('\n')
    with pytest.raises(UserError, match='a.jsonl, line 3 is not a JSON object'):
        read_lines(path)


@pytest.mark.parametrize('line, words', [
    ('[1]', 'line 2 is not a JSON object'), ('null', 'not a JSON object'), ('"a"', 'not a JSON object'),
    ('[' * 100_000, 'not a JSON object'), ('{"a": "1"}', "no result of ours: a is '1'"),
    ('{"a": [1]}', 'a is'), ('{"a": 1' + '0' * 400 + '}', 'a is'), ('{"a": 1e999}', 'a is'),
    ('{"b": 1}', 'b is'), ('{"b": {}}', 'b is')])
def test_lines_of_somebody_else(line, words, tmp_path):
    path = tmp_path / 'a.jsonl'
    path.write_text('{"a": NaN, "b": null, "c": []}\n' + line + '\n')
    with pytest.raises(UserError, match=words):
        read_lines(str(path), ['a'], ['b'])
    path.write_text('{"a": NaN, "b": null, "c": []}\n')
    assert read_lines(str(path), ['a'], ['b']) == [{'a': None, 'b': None, 'c': []}]


def test_what_follows_a_torn_line_is_not_lost(tmp_path):
    path = tmp_path / 'a.jsonl'
    path.write_text('{"a": 1}\n{"a": 2')
    append(str(path))
    assert path.read_text() == '{"a": 1}\n{"a": 2'
    append(str(path), {'a': 3})
    assert path.read_text() == '{"a": 1}\n{"a": 2\n{"a": 3}\n'


def test_a_log_is_cut_to_the_checkpoint(tmp_path):
    path = str(tmp_path / 'run' / 'log.jsonl')
    checkpoint.cut_log(path, 0)
    assert open(path).read() == ''
    kept = [json.dumps({'step': step, 'loss': 1.5}) for step in (1, 2, 2)]
    with open(path, 'wb') as f:
        f.write('\n'.join([kept[0], '', '[]', '{"step": "x"}', '{"loss": 1}', 'hello', kept[1], '{"step": 3}',
                           kept[2], '{"step": 2}']).encode() + b'\xff')
    checkpoint.cut_log(path, 2)
    assert open(path).read() == ''.join(line + '\n' for line in kept)
    with disk_full(20), pytest.raises(UserError, match='cannot write .*log.jsonl .*; give another --out_dir'):
        checkpoint.cut_log(path, 2)
    assert open(path).read() == ''.join(line + '\n' for line in kept)


# ------------------------------------------------------------------------------------------------------------
# names and devices

def test_weights_that_diverged_are_not_opened(tmp_path):
    for where in ('ema', 'model'):
        spoilt = make()
        for value in spoilt[where].values():
            value.view(-1)[:1] = math.inf
        checkpoint.save(str(tmp_path / 'ckpt.pt'), spoilt)
        if where == 'ema':
            with pytest.raises(UserError, match='weights that are not finite: its training diverged'):
                open_run(str(tmp_path), 'cpu')
        else:  # the latest weights do not matter where there are averages
            open_run(str(tmp_path), 'cpu')


def test_what_is_a_run_of_ours(tmp_path):
    folder = str(tmp_path / 'a')
    os.mkdir(folder)
    assert checkpoint.is_run('out/gone')
    assert not any(map(checkpoint.is_run, ('gpt2-large', 'owner/out', folder)))
    checkpoint.save(f'{folder}/ckpt.pt', make())
    assert checkpoint.is_run(folder)


def test_the_fingerprint_is_of_the_weights():
    a, b = (build(CONFIG) for _ in range(2))
    b.load_state_dict(a.state_dict())
    assert checkpoint.fingerprint(a) == checkpoint.fingerprint(b) and len(checkpoint.fingerprint(a)) == 8
    next(b.parameters()).data[0] += 1
    assert checkpoint.fingerprint(a) != checkpoint.fingerprint(b)


def test_a_device_that_is_not_there():
    assert pick_device('cpu') == torch.device('cpu')
    with pytest.raises(UserError, match="there is no device 'tpu' on this machine; it has: cpu"):
        pick_device('tpu')
    with pytest.raises(UserError, match='no device .cuda:64'):
        pick_device('cuda:64')


def test_one_gpu_of_several(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch.cuda, 'set_device', chosen.append)
    for name in 'cuda:1', 'cuda', 'auto', 'cpu':
        assert pick_device(name).type == ('cpu' if name == 'cpu' else 'cuda')
    assert chosen == ['cuda:1', 'cuda:0', 'cuda:0']
    with pytest.raises(UserError, match="no device 'cuda:2' .*; it has: cpu, cuda, cuda:0, cuda:1"):
        pick_device('cuda:2')
    torchrun = dict(WORLD_SIZE='3', RANK='2', LOCAL_RANK='1', MASTER_ADDR='x', MASTER_PORT='1')
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    assert pick_device('cuda').type == 'cuda' and chosen[-1] == 'cuda:1'
    with pytest.raises(UserError, match='cuda:1 is one GPU for 3 processes'):
        pick_device('cuda:1')
    monkeypatch.setenv('LOCAL_RANK', '2')
    with pytest.raises(UserError, match='no cuda:2 for process 2, only cuda:0, cuda:1'):
        pick_device('cuda')


@pytest.mark.parametrize('given, words', [
    (dict(RANK=''), "RANK='' in the environment is no number"), (dict(WORLD_SIZE='two'), 'WORLD_SIZE=.two'),
    (dict(WORLD_SIZE='2'), 'WORLD_SIZE=2 and no RANK and no MASTER_ADDR'),
    (dict(WORLD_SIZE='2', RANK='2', MASTER_ADDR='x', MASTER_PORT='1'), 'WORLD_SIZE=2 and RANK=2')])
def test_half_a_torchrun(given, words, monkeypatch):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words):
        rank_and_world()


def test_a_checkpoint_is_named_by_its_folder(tmp_path):
    checkpoint.save(str(tmp_path / 'ckpt.pt'), make())
    path = str(tmp_path / 'ckpt.pt')
    assert checkpoint.is_run(path)
    with pytest.raises(UserError, match=f'named by its folder, {tmp_path}$'):
        open_run(path, 'cpu')


def test_compile_without_a_compiler(monkeypatch, capsys):
    monkeypatch.setenv('PATH', '')
    with pytest.raises(UserError, match='needs a C.. compiler .* --compile=False'):
        compile_in_place([torch.nn.Linear(1, 1)], torch.device('cpu'))
    compile_in_place([torch.nn.Linear(1, 1)], torch.device('cuda'))  # a GPU has its own
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda self: pytest.fail('compiled'))
    compile_in_place([torch.nn.Linear(1, 1)], torch.device('cpu'), required=False)
    assert 'no C++ compiler' in capsys.readouterr().out
