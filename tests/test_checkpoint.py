import errno
import os
import pickle
import subprocess
import sys

import pytest
import torch

from lib import checkpoint
from lib import configurator
import mdlm
from lib.configurator import UserError
from test_bad_days import disk_full

CONFIG = dict(method='mdlm', vocab_size=3, block_size=8, hidden=16, num_layers=1, num_heads=2, cond_dim=8, dataset='toy', learning_rate=1e-3)


def make(step=1):
    torch.manual_seed(step)
    method = checkpoint.build(CONFIG)
    return {'format': 1, 'config': CONFIG, 'model': method.state_dict(), 'ema': {k: p.detach() + 1 for k, p in method.named_parameters()},
            'optimizer': {}, 'step': step, 'tokens': 8 * step}


def test_out_dir_to_method(tmp_path):
    saved = make()
    checkpoint.save(str(tmp_path / 'ckpt.pt'), saved)
    assert os.listdir(tmp_path) == ['ckpt.pt']
    method, loaded = checkpoint.load_method(str(tmp_path), 'cpu')
    assert isinstance(method, mdlm.MDLM) and not method.training and loaded['config'] == CONFIG and loaded['step'] == 1
    for name, p in method.named_parameters():  # the averaged weights
        assert torch.equal(p, saved['model'][name] + 1)


def test_keys_of_a_method():
    fields = configurator.method_fields('mdlm')
    assert 'hidden' in fields and 'vocab_size' not in fields
    with pytest.raises(UserError, match='no method mdml: did you mean mdlm'):
        configurator.method_fields('mdml')


def test_no_checkpoint_names_the_command(tmp_path):
    with pytest.raises(UserError, match='python train.py config/'):
        checkpoint.load_method(str(tmp_path / 'nothing'), 'cpu')


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


def spoil_shape(path):
    torch.save({**make(), 'model': {'x': torch.zeros(2)}}, path)


@pytest.mark.parametrize('spoil', [spoil_cut, spoil_empty, spoil_text, spoil_foreign, spoil_list, spoil_version, spoil_shape])
def test_what_is_no_checkpoint_gets_one_line(tmp_path, spoil):
    path = str(tmp_path / 'ckpt.pt')
    checkpoint.save(path, make())
    spoil(path)
    with pytest.raises(UserError, match='ckpt.pt'):
        checkpoint.load_method(str(tmp_path), 'cpu')


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ['BOMB'],)


def test_a_checkpoint_cannot_run_code(tmp_path, monkeypatch):
    monkeypatch.setenv('BOMB', str(tmp_path / 'bomb'))
    torch.save({**make(), 'optimizer': Bomb()}, tmp_path / 'a.pt')
    (tmp_path / 'b.pt').write_bytes(pickle.dumps(Bomb(), protocol=2))
    for name in 'a.pt', 'b.pt':
        with pytest.raises(UserError):
            checkpoint.load(str(tmp_path / name))
    assert not (tmp_path / 'bomb').exists()


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
        checkpoint.save(str(tmp_path / 'nowhere' / 'ckpt.pt'), make())


def test_full_disk_and_kill_inside_the_write(tmp_path):
    """The real thing in another process: writes beyond 20 kB fail; then a process that dies in the middle of a write."""
    path = str(tmp_path / 'ckpt.pt')
    checkpoint.save(path, make(1))
    setup = f'import sys; sys.path[:0] = {sys.path!r}; import os, resource, signal, torch, checkpoint, test_checkpoint, configurator; '
    limit = 'resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); '
    write = f'configurator.run(lambda argv: checkpoint.save({path!r}, test_checkpoint.make(2)))'
    r = subprocess.run([sys.executable, '-c', setup + limit + write], capture_output=True, text=True)
    assert (r.returncode, r.stderr.count('\n')) == (2, 1) and 'the one before it is kept' in r.stderr, r.stderr
    assert os.listdir(tmp_path) == ['ckpt.pt'] and checkpoint.load(path)['step'] == 1

    kill = 'os.fsync = lambda fd: (os.truncate(fd, 1000), os.kill(os.getpid(), signal.SIGKILL)); '
    assert subprocess.run([sys.executable, '-c', setup + kill + write]).returncode == -9
    assert checkpoint.load(path)['step'] == 1
    checkpoint.save(path, make(3))  # and the half-written file is in nobody's way
    assert os.listdir(tmp_path) == ['ckpt.pt'] and checkpoint.load(path)['step'] == 3


def test_lines_are_appended_whole_or_not_at_all(tmp_path):
    path = str(tmp_path / 'a.jsonl')
    checkpoint.append(path)
    assert os.path.getsize(path) == 0
    checkpoint.append(path, {'a': 1, 'b': float('nan')}, {'a': 2})
    with disk_full(40), pytest.raises(UserError, match=r'cannot write .*a.jsonl \(the disk is full\)'):
        checkpoint.append(path, {'a': 'x' * 40})
    checkpoint.append(path, {'a': 3})
    assert open(path).read() == '{"a": 1, "b": null}\n{"a": 2}\n{"a": 3}\n'
    with pytest.raises(UserError, match='cannot write .*No such file'):
        checkpoint.append(str(tmp_path / 'nowhere' / 'a.jsonl'))


def test_what_is_a_run_of_ours(tmp_path):
    folder = str(tmp_path / 'a')
    os.mkdir(folder)
    assert checkpoint.is_run('out/gone') and not checkpoint.is_run('gpt2-large') and not checkpoint.is_run('owner/out') and not checkpoint.is_run(folder)
    checkpoint.save(f'{folder}/ckpt.pt', make())
    assert checkpoint.is_run(folder)


def test_the_fingerprint_is_of_the_weights():
    a, b = (checkpoint.build(CONFIG) for _ in range(2))
    b.load_state_dict(a.state_dict())
    assert checkpoint.fingerprint(a) == checkpoint.fingerprint(b) and len(checkpoint.fingerprint(a)) == 8
    next(b.parameters()).data[0] += 1
    assert checkpoint.fingerprint(a) != checkpoint.fingerprint(b)


def test_compile_without_a_compiler(monkeypatch):
    monkeypatch.setenv('PATH', '')
    with pytest.raises(UserError, match='needs a C.. compiler .* --compile=False'):
        checkpoint.compile_in_place([torch.nn.Linear(1, 1)], torch.device('cpu'))
    checkpoint.compile_in_place([torch.nn.Linear(1, 1)], torch.device('cuda'))  # a GPU has its own
