"""What goes wrong on other people's machines: full disks, read-only folders, damaged files, and whatever
anyone may type.

Each ends with its one line (a UserError) and loses nothing. The kills are in test_train.py, single mistakes
in the test of each script.
"""
import ast
import contextlib
import glob
import json
import os
import pickle
import random
import shutil
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from helpers import (
    CHARS,
    TOY_METHODS,
    TWO_STAGES,
    at_step,
    disk_full,
    fails,
    files,
    go,
    losses,
    make,
    mutated,
    open_toy,
    same,
    weights,
)

import bench
import lib.files
import sample
import train
from lib import checkpoint, prepare
from lib.configurator import Keys, UserError, configure, defaults_of, method_keys
from lib.files import sha256_of, whole
from lib.lock import claim
from lib.signals import Unbreakable
from lib.tokens import Tokens, WithLatents, latents_folder, load_tokenizer
from mdlm import MDLM
from methods import METHODS, open_published, open_run
from sample import read_prompt

ROOT = os.path.dirname(train.__file__)


@pytest.fixture(autouse=True)
def sandbox(monkeypatch, tmp_path):
    monkeypatch.setattr(train, 'open_data', open_toy)
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.chdir(tmp_path)


def complaint(function, *args, also=()):
    """Calls it; what it may raise is a UserError with one line, or one of `also`. -> the line, or None"""
    try:
        function(*args)
    except also:
        return None
    except UserError as e:
        assert str(e).strip() and len(str(e)) < 20000
        return ' '.join(str(e).split())  # as configurator.run prints it


# ------------------------------------------------------------------------------------------------------------
# disks and folders

@contextlib.contextmanager
def read_only(*folders):
    """Nobody may write there, not even root, who gives up its rights for the time being."""
    root = os.geteuid() == 0
    os.chmod('.', 0o755)
    for folder in folders:
        os.chmod(folder, 0o555)
    if root:
        os.seteuid(65534)  # nobody
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        for folder in folders:
            os.chmod(folder, 0o755)


def test_disk_full_in_the_middle_of_a_log_line():
    args = ['--max_iters=12', '--checkpoint_interval=4', '--eval_interval=100']
    whole = go('whole', *args)
    go('a', '--max_iters=4', *args[1:])
    lines = open('whole/log.jsonl', 'rb').read().split(b'\n')
    with disk_full(len(b'\n'.join(lines[:6])) + 30):
        line = complaint(go, 'a', *args)
    assert line == 'cannot write a/log.jsonl (the disk is full)'
    assert checkpoint.load('a/ckpt.pt')['step'] == 4
    assert open('a/log.jsonl', 'rb').read().endswith(b'\n')
    assert go('a', *args) == whole and same(weights('a'), weights('whole'))


def test_disk_full_in_the_middle_of_a_checkpoint():
    args = ['--checkpoint_interval=4', '--eval_interval=100']
    whole = go('whole', '--max_iters=12', *args)
    with disk_full(20000):
        line = complaint(go, 'a', '--max_iters=12', *args)
    assert line == 'cannot write a/ckpt.pt (File too large); there is none before it'
    assert os.listdir('a') == ['log.jsonl']
    go('a', '--max_iters=4', *args)
    with disk_full(20000):
        line = complaint(go, 'a', '--max_iters=12', *args)
    assert line == 'cannot write a/ckpt.pt (File too large); the one before it is kept'
    assert sorted(os.listdir('a')) == ['ckpt.pt', 'log.jsonl']
    assert checkpoint.load('a/ckpt.pt')['step'] == 4 and len(losses('a')) == 8
    assert go('a', '--max_iters=12', *args) == whole


def test_disk_full_before_the_start():
    """Where not even the old log can be written again, it stays as it was."""
    go('a', '--max_iters=4')
    before = files('a')
    with disk_full(100):
        assert complaint(go, 'a', '--max_iters=8').startswith('cannot write a/log.jsonl')
    assert files('a') == before
    assert len(go('a', '--max_iters=8')) == 8


def test_disk_full_for_samples():
    make('mdlm', 'out/m')
    with disk_full(100):
        line = complaint(sample.main, ['--out_dir=out/m', '--device=cpu', '--steps=1', '--save=x.npy'])
    assert line.startswith('cannot write x.npy') and os.listdir('.') == ['out']


def test_no_room_for_prepared_data(monkeypatch):
    """A full disk or a read-only folder: nothing is begun, and the set that was there stays."""
    monkeypatch.setattr(prepare, 'DATA', os.getcwd())

    def write(text, name='sets/a'):
        prepare.write(name, {'train': lambda: iter([(text, True)])}, 'char', tail=0.1)
    with disk_full(100):
        line = complaint(write, 'abc' * 100)
    assert line.startswith(f'cannot write {os.getcwd()}/sets/a') and '(File too large' in line
    assert os.listdir('sets') == []
    write('abc')
    before = files()
    with disk_full(100):
        assert complaint(write, 'abc' * 100).startswith('cannot write')
    for folders, name in ((['sets', 'sets/a'], 'sets/a'), (['sets'], 'sets/b')):
        with read_only(*folders):
            line = complaint(write, 'abc' * 100, name)
        assert line.startswith(f'cannot write {os.getcwd()}/{name}') and line.endswith('(Permission denied)')
    assert files() == before


def test_read_only_folder():
    go('a', '--max_iters=2')
    make('mdlm', 'out/m')
    os.mkdir('empty')
    before = files()
    with read_only('a', 'empty'):
        for name in ('a', 'empty', 'empty/new', 'a/ckpt.pt/new'):
            line = complaint(go, name, '--max_iters=4')
            assert line.startswith(f'cannot write {name}') and 'give another --out_dir' in line
        line = complaint(sample.main, ['--out_dir=out/m', '--device=cpu', '--save=a/x.npy'])
        assert line.startswith('cannot write a/x.npy')
        with pytest.raises(UserError, match='Permission denied.*the one before it is kept'):
            checkpoint.save('a/ckpt.pt', {})
    assert files() == before
    open('a/ckpt.pt.tmp', 'w').close()  # a kill left it, then the disk was mounted read-only
    with read_only('a'), pytest.raises(UserError, match='Permission denied.*the one before it is kept'):
        checkpoint.save('a/ckpt.pt', {})
    assert len(go('a', '--max_iters=4')) == 4 and sorted(os.listdir('a')) == ['ckpt.pt', 'log.jsonl']


def test_folder_becomes_read_only_on_the_way(monkeypatch):
    args = ['--max_iters=8', '--checkpoint_interval=2']
    whole = go('whole', *args)
    with monkeypatch.context() as m, contextlib.ExitStack() as stack:
        at_step(m, MDLM, 5, lambda: stack.enter_context(read_only('a')))
        assert complaint(go, 'a', *args) == 'cannot write a/log.jsonl (Permission denied)'
    assert checkpoint.load('a/ckpt.pt')['step'] == 4
    assert go('a', *args) == whole


# ------------------------------------------------------------------------------------------------------------
# two at once

def test_one_training_per_folder():
    go('a', '--max_iters=2')
    before, release = files(), claim('a')
    line = complaint(go, 'a', '--max_iters=4')
    assert line == 'another process trains in a; stop it first, or give another --out_dir'
    release()
    assert files() == before
    open('a/lock', 'w').close()  # a kill left it
    assert len(go('a', '--max_iters=4')) == 4 and sorted(os.listdir('a')) == ['ckpt.pt', 'log.jsonl']


def test_a_run_that_cannot_begin_releases_its_folder():
    go('a', '--max_iters=2')
    with disk_full(100):
        assert complaint(go, 'a', '--max_iters=4')
    assert len(go('a', '--max_iters=4')) == 4  # in the same process


def test_one_writer_per_file():
    make('mdlm', 'out/m')
    argv = ['--out_dir=out/m', '--device=cpu', '--steps=1', '--save=x.jsonl', '--num_samples=2']
    with lib.files.whole('x.jsonl') as temp:
        line = complaint(sample.main, argv)
        assert line == 'another process is writing x.jsonl; wait for it, or stop it' and os.path.exists(temp)
    assert files('.')['./x.jsonl'] == b''
    sample.main(argv)
    assert len(open('x.jsonl').readlines()) == 2 and sorted(os.listdir('.')) == ['out', 'x.jsonl']


# ------------------------------------------------------------------------------------------------------------
# data that shrinks

def prepared(folder, n=20000):
    """A set of random characters, as prepare.py would write it."""
    os.makedirs(folder)
    ids = np.random.default_rng(0).integers(0, 9, n).astype(np.uint16)
    ids.tofile(f'{folder}/train.bin')
    ids[:400].tofile(f'{folder}/val.bin')
    meta = dict(dtype='uint16', vocab_size=10, tokenizer={'kind': 'char', 'chars': CHARS, 'eos': True},
                eos_id=9, bos_id=9, wrap=False, train=dict(tokens=n, sha256=sha256_of(f'{folder}/train.bin')),
                val=dict(tokens=400, sha256=sha256_of(f'{folder}/val.bin')))
    with open(f'{folder}/meta.json', 'w') as f:
        json.dump(meta, f)
    return meta


def test_data_that_shrinks_while_we_train(monkeypatch):
    """To read a mapped file beyond its end is SIGBUS, which would end the run without a word."""
    monkeypatch.setattr(train, 'open_data', Tokens)
    prepared('set')
    args = [f'--dataset={os.getcwd()}/set', '--block_size=16', '--max_iters=12', '--checkpoint_interval=4',
            '--eval_interval=100']
    whole = go('whole', *args)
    shutil.copy('set/train.bin', 'train.bin')
    with monkeypatch.context() as m:
        at_step(m, MDLM, 6, lambda: os.truncate('set/train.bin', 1000))
        assert 'set/train.bin; put it back' in complaint(go, 'a', *args)
    assert checkpoint.load('a/ckpt.pt')['step'] in (4, 8)  # batches are read a step ahead
    assert 'data file shrank: ' in complaint(go, 'a', *args)
    shutil.copy('train.bin', 'set/train.bin')
    assert go('a', *args) == whole


def test_latents_that_shrink():
    prepared('set')
    tokens = Tokens(f'{os.getcwd()}/set', 'val', 16)
    folder, meta = latents_folder(tokens, 'enc', 1, 4)
    os.mkdir(folder)
    np.zeros((len(tokens), 1, 4), np.uint16).tofile(f'{folder}/val.bin')
    with open(f'{folder}/meta.json', 'w') as f:
        json.dump(meta, f)
    data = WithLatents(tokens, 'enc', 1, 4)
    assert data.batch(0, 0, range(3))[1].shape == (3, 1, 4)
    os.truncate(f'{folder}/val.bin', 8)
    assert 'shrank' in complaint(data.rows, [20])


def test_prepared_anew_during_a_run():
    """What is renamed over an open file does not touch it: the run continues with its tokens."""
    prepared('set')
    tokens = Tokens(f'{os.getcwd()}/set', 'train', 16)
    before, = tokens.rows([5])
    open('new', 'w').close()
    os.replace('new', 'set/train.bin')
    assert torch.equal(tokens.rows([5])[0], before)


# ------------------------------------------------------------------------------------------------------------
# damaged and foreign files

def test_a_log_full_of_rubbish():
    whole = go('a', '--max_iters=4')
    lines = open('a/log.jsonl', 'rb').read().splitlines(keepends=True)
    rubbish = [b'[]\n', b'3\n', b'null\n', b'\xff\xfe\n', b'{"step": "3"}\n', b'{"st\n', b'\n',
               b'[' * 100000 + b'\n', b'{"step": 9}\n', b'\0' * 50 + b'\n', b'{"step": 1}']
    with open('a/log.jsonl', 'wb') as f:
        f.writelines(line for pair in zip(lines, rubbish) for line in pair)
        f.writelines(rubbish[len(lines):])
    assert go('a', '--max_iters=6')[:4] == whole
    assert open('a/log.jsonl', 'rb').read().startswith(b''.join(lines[:4]))


def test_damaged_checkpoints():
    """Cut anywhere, a byte changed anywhere: the line, or the numbers that were saved; never a traceback, and
    never another file."""
    go('a', '--max_iters=2', '--log_interval=100', '--eval_interval=100')
    good, rng = open('a/ckpt.pt', 'rb').read(), random.Random(0)
    pickled = good.index(b'data.pkl')
    os.mkdir('b')
    refused = 0
    for i in range(150):
        data = bytearray(good)
        if i % 3 == 0:
            data = data[:rng.randrange(len(data))]
        elif i % 3 == 1:  # where the names and shapes are
            data[pickled + rng.randrange(8000)] ^= 1 << rng.randrange(8)
        else:
            at = rng.randrange(len(data))
            data[at:at + rng.randrange(1, 3000)] = b'' if rng.random() < 0.5 else rng.randbytes(9)
        with open('b/ckpt.pt', 'wb') as f:
            f.write(data)
        if complaint(open_run, 'b', 'cpu'):
            refused += 1
        else:
            assert same(weights('b'), weights('a'))
        assert os.listdir('b') == ['ckpt.pt'] and sorted(os.listdir('.')) == ['a', 'b']
    assert refused > 100


@pytest.mark.parametrize('changes', [
    {'optimizer': None}, {'tokens': None}, {'config': {}}, {'config': {'method': 'os'}},
    {'config': {'method': ['mdlm']}}, {'config': [1]}, {'model': [1]}, {'model': {'x': torch.zeros(2)}},
    {'ema': 3}, {'step': None}, {'format': 1}, {'format': 3}, {'format': None}])
def test_a_checkpoint_of_somebody_else(changes):
    """Entries missing (None) or of another kind."""
    go('a', '--max_iters=2')
    saved = {**checkpoint.load('a/ckpt.pt'), **changes}
    torch.save({k: v for k, v in saved.items() if v is not None}, 'a/ckpt.pt')
    before = files()
    assert 'a' in complaint(go, 'a', '--max_iters=4')
    if not {'optimizer', 'tokens'} & changes.keys():  # what only training needs
        assert complaint(open_run, 'a', 'cpu')
    assert files() == before


@pytest.mark.parametrize('damage', [
    lambda c: c.update(optimizer=3), lambda c: c.update(tokens='many'), lambda c: c.update(step=-1),
    lambda c: c.update(model=dict.fromkeys(c['model'], 1.0)), lambda c: c['ema'].popitem(),
    lambda c: c['ema'].update({'head.weight': torch.zeros(2)}), lambda c: c['ema'].update(x=torch.zeros(2)),
    lambda c: c['optimizer'].update({'head.weight': 3}), lambda c: c['optimizer'].update(x={}),
    lambda c: c['optimizer']['head.weight'].pop('exp_avg'), lambda c: c['config'].pop('block_size'),
    lambda c: c['optimizer']['head.weight'].update(exp_avg=torch.zeros(3)),
    lambda c: c['optimizer']['head.weight'].update(step=torch.zeros(3))])
def test_a_damaged_state_of_training(damage):
    """Found before the first step, and nothing is written."""
    go('a', '--max_iters=2')
    saved = checkpoint.load('a/ckpt.pt')
    damage(saved)
    torch.save(saved, 'a/ckpt.pt')
    before = files()
    line = complaint(go, 'a', '--max_iters=4')
    assert 'a/ckpt.pt is' in line and '--init_from=scratch' in line and files() == before


def use(folder):
    """All that is done with a prepared set."""
    for split in ('train', 'val'):
        tokens = Tokens(folder, split, 16)
        tokens.batch(0, 0, range(2))
        tokens.rows([0])
        tok = load_tokenizer(tokens.tokenizer, tokens.vocab_size)
        tok.encode('abc')
        tok.decode(range(tokens.vocab_size)).encode()
        latents_folder(tokens, 'enc', 1, 4)
    read_prompt('a[MASK:2]', sample.open_tokenizer({'dataset': folder}), 16, make('mdlm'))


def test_mutated_meta():
    good, rng, refused = prepared('set', n=500), random.Random(0), 0
    for _ in range(400):
        text = json.dumps(mutated(good, rng)).encode()
        if rng.random() < 0.4:
            text = bytearray(json.dumps(good).encode())
            for _ in range(rng.randrange(1, 4)):
                byte = rng.choice([*b'{}[]":,0123456789.-eE tfn\\', rng.randrange(256)])
                text[rng.randrange(len(text))] = byte
        with open('set/meta.json', 'wb') as f:
            f.write(text)
        refused += complaint(use, f'{os.getcwd()}/set') is not None
    assert 200 < refused < 400
    assert sorted(os.listdir('set')) == ['meta.json', 'train.bin', 'val.bin'] and os.listdir('.') == ['set']


def test_meta_of_no_file():
    os.makedirs('set/meta.json')
    assert 'damaged' in complaint(Tokens, f'{os.getcwd()}/set', 'train', 16)
    assert 'damaged' in complaint(Tokens, 'x' * 5000, 'train', 16)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ('bomb',)


@pytest.mark.parametrize('change', [{}, {'hidden_dim': 'x'}, {'hidden_dim': -16}, {'n_heads': None}, [],
                                    'half'])
@pytest.mark.parametrize('content', ['half', 'text', 'list', 'numbers', 'pickle', 'safetensors'])
def test_damaged_published_weights(change, content):
    """A download that was cut short, or something else under that name."""
    config = dict(time_conditioning=False, vocab_size=10, model_length=8, hidden_dim=16, n_blocks=1,
                  n_heads=2, cond_dim=8, dropout=0.0)
    text = json.dumps(config | change if isinstance(change, dict) else change)
    os.mkdir('hub')
    with open('hub/config.json', 'w') as f:
        f.write(json.dumps(config)[:40] if change == 'half' else text)
    path = 'hub/model.safetensors' if content == 'safetensors' else 'hub/pytorch_model.bin'
    saved = {'list': [1, 2], 'numbers': {'a': 1}, 'half': {'a': torch.zeros(9)}}
    torch.save(saved.get(content), path)
    torch_file = open(path, 'rb').read()
    with open(path, 'wb') as f:
        f.write({'half': torch_file[:300], 'text': b'hello', 'pickle': pickle.dumps(Bomb(), protocol=2),
                 'safetensors': b'xx'}.get(content, torch_file))
    assert complaint(open_published, 'hub', 'cpu') and os.listdir('.') == ['hub']


# ------------------------------------------------------------------------------------------------------------
# nothing that is read can run code

UNSAFE_MODULES = {'pickle', 'marshal', 'shelve', 'dill', 'joblib', 'runpy'}
UNSAFE_CALLS = {'eval', 'exec', 'compile', '__import__', 'os.system'}


def unsafe(source):
    """Lines of a program that could run what they read."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = {a.name for a in node.names} | {getattr(node, 'module', None)}
            if UNSAFE_MODULES & names:
                yield node.lineno
        if isinstance(node, ast.Call):
            called, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            if (called in UNSAFE_CALLS or called == 'torch.load' and given.get('weights_only') != 'True'
                    or 'False' != given.get('allow_pickle', 'False')
                    or 'False' != given.get('trust_remote_code', 'False')):
                yield node.lineno


def test_no_reader_of_ours_runs_code():
    """By the source: no eval, exec or pickle; torch.load with weights_only=True."""
    sources = [path for path in glob.glob(f'{ROOT}/**/*.py', recursive=True)
               if os.path.relpath(path, ROOT).split(os.sep)[0] not in ('tests', 'out')]
    rooms = {os.path.relpath(path, ROOT).split(os.sep)[0] for path in sources}
    assert {'lib', 'baselines', 'data', 'config', 'train.py'} <= rooms
    for path in sources:
        assert not list(unsafe(open(path, encoding='utf-8').read())), path
    for line in ('import pickle', 'from joblib import load', 'eval(x)', 'torch.load(f)', 'exec(f.read())',
                 'np.load(f, allow_pickle=True)', 'f(x, trust_remote_code=True)',
                 'torch.load(f, weights_only=no)'):
        assert list(unsafe(line)) == [1], line


def test_a_tokenizer_cannot_run_code(monkeypatch):
    """transformers would ask, and a careless "y" would run it."""
    pytest.importorskip('transformers')
    os.mkdir('tok')
    with open('tok/tokenizer_config.json', 'w') as f:
        json.dump({'tokenizer_class': 'Mine', 'auto_map': {'AutoTokenizer': ['mine.Mine', None]}}, f)
    with open('tok/mine.py', 'w') as f:
        f.write('open("ran", "w")\nclass Mine: pass\n')
    monkeypatch.setattr('builtins.input', lambda *args: 'y')
    line = complaint(load_tokenizer, {'kind': 'huggingface', 'name': 'tok'})
    assert 'cannot load the tokenizer' in line and not os.path.exists('ran')


# ------------------------------------------------------------------------------------------------------------
# whatever anyone may type

BITS = ['(', ')', '[', ']', '{', '}', "'", '"', '*', '**', '+', '-', '/', '//', '%', '0', '1', '9', '60',
        '.5', '1e4', '1e300', 'e', '_', 'j', 'x', '0x', 'True', 'None', 'nan', 'inf', ' ', '\t', '\n', '\\',
        '#', '=', ',', ':', ';', '@', 'é', '\u202e', '\ud800', '\0', 'lambda:', '9**60*', '9**9**9',
        '__import__("os")', 'f"{1}"', 'not ', '~', '...']


@dataclass
class Anything(Keys):
    method: str = 'mdlm'
    whole: int = 1
    rate: float = 0.5
    flag: bool = False
    name: str = 'x'
    out_dir: str = 'out'


def garble(rng, most=8):
    return ''.join(rng.choices(BITS, k=rng.randrange(most)))


@pytest.mark.filterwarnings('ignore::SyntaxWarning')
def test_arguments_of_any_text():
    """The configurator alone: thousands of values and config files."""
    rng, refused = random.Random(0), 0
    for i in range(3000):
        key = rng.choice([*defaults_of(Anything), 'nmae', '', garble(rng)])
        argv = [rng.choice([f'--{key}={garble(rng)}', f'--{key}', garble(rng), f'{key}={garble(rng)}'])]
        if i % 3 == 0:
            with open('config.py', 'w', encoding='utf-8', errors='replace') as f:
                for _ in range(rng.randrange(1, 3)):
                    f.write(rng.choice([f'{key} = {garble(rng)}\n', f'{garble(rng)}\n',
                                        f'{key} = 32 # {garble(rng)}\n']))
            argv.insert(rng.randrange(2), 'config.py')
        refused += complaint(configure, Anything, argv, METHODS) is not None
    assert 1500 < refused < 3000
    for text in ('2**5', '*'.join(['9**60'] * 6), '*'.join(['9**60'] * 100), '1' * 400, '1' * 4000,
                 '-' + '9' * 309, '1' * 5000):
        for key in ('whole', 'rate', 'flag'):
            assert f'{key} wants' in complaint(configure, Anything, [f'--{key}={text}'], METHODS)


EVERY_PART = {  # each method that trains from scratch, with all of its parts
    'mdlm': [], 'ar': ['--method=ar'], 'di': TWO_STAGES,
    **{name: TOY_METHODS[name] for name in ('ldlm', 'flm', 'duo', 'candi', 'vadd', 'cadd', 'ssmd')},
    'co': ['--method=ladd', '--latent_layers=1', '--encoder_layers=1', '--num_latents=2', '--latent_dim=4',
           '--stage1_iters=1']}


def test_any_key_of_any_method():
    """Two steps of training with one to three keys set to something odd: it trains, or complains."""
    rng, refused = random.Random(0), 0
    odd = ['-1', '0', '1', '2', '3', '7', '-0.5', '0.5', '1.5', '1e-9', '1e9', '1e18', '', 'x', 'True',
           'linear', 'nan', '-1e300']
    # their sizes are the machine's limit, not ours
    big = {'hidden', 'num_layers', 'num_heads', 'cond_dim', 'num_latents', 'latent_dim', 'codebook_size',
           'encoder_layers', 'latent_layers', 'decoder_layers', 'adaptive_bins', 'batch_size', 'max_iters',
           'z_dim', 'hint_dim'}
    others = {'out_dir', 'init_from', 'wandb', 'compile', 'device', 'method', 'encoder', 'token_encoder'}
    for _ in range(400):
        name = rng.choice(list(EVERY_PART))
        keys = {**defaults_of(train.Config), **method_keys(METHODS['ladd' if name in ('co', 'di') else name])}
        chosen = rng.choices([k for k in keys if k not in others], k=rng.randrange(1, 4))
        small = [v for v in odd if v not in ('1e9', '1e18')]
        flags = [f'--{k}={rng.choice(small if k in big else odd)}' for k in chosen]
        args = [*EVERY_PART[name], '--max_iters=2', '--eval_seqs=4', '--init_from=scratch', *flags]
        refused += complaint(go, 'a', *args) is not None
    assert 200 < refused < 395


def test_prompts_of_any_text():
    rng, method, refused = random.Random(0), make('mdlm'), 0
    parts = ['[MASK]', '[MASK:3]', '[MASK:0]', '[MASK:-1]', '[MASK:', '[MASK:x]', '[MASK:1e3]', '[MASK:٣]',
             '[MASK:²]', '[mask]', f'[MASK:{"9" * 5000}]', f'[MASK:{10**18}]', '[[MASK]]', '[', ']', ':', 'a',
             'bc', 'Z', 'é', '\U0001f469\u200d\U0001f680', '\ud800', '\0', '<|endoftext|>', '\n', ' ']
    every_character = ''.join(sorted(set(''.join(parts)) - {'\ud800'}))
    for chars in (CHARS, every_character):
        tok = load_tokenizer({'kind': 'char', 'chars': chars, 'eos': True})
        for _ in range(1000):
            tok.wrap = rng.random() < 0.5
            prompt = ''.join(rng.choices(parts, k=rng.randrange(1, 7)))
            refused += complaint(read_prompt, prompt, tok, 12, method) is not None
    assert 500 < refused < 1900


def test_prompts_on_the_command_line():
    names = ['mdlm', 'ar', 'co', 'duo', 'candi', 'vadd', 'ssmd']
    for name in names:
        make(name, 'out/' + name)
    rng, refused = random.Random(0), 0
    parts = ['[MASK]', '[MASK:3]', f'[MASK:{"9" * 5000}]', 'a', 'bc', 'Z', '\ud800']
    for _ in range(40):
        start = ''.join(rng.choices(parts, k=rng.randrange(5)))
        argv = [f'--out_dir=out/{rng.choice(names)}', '--device=cpu', '--num_samples=2', '--steps=2']
        refused += complaint(sample.main, [*argv, f'--start={start}']) is not None
    assert 0 < refused < 40


def test_memory_that_there_is_not(monkeypatch, capsys):
    make('mdlm', 'out/m')
    line = fails(sample, monkeypatch, capsys, '--out_dir=out/m', '--device=cpu', '--num_samples=1e14',
                 '--batch_size=1e14', keys=sample.Config)
    assert line == ('error: out of memory; less of it is needed with a smaller --batch_size, --num_samples, '
                    '--steps\n')


def test_a_size_that_no_machine_counts_to(monkeypatch, capsys):
    argv = [f'--vocab_size={2**63 - 1}', '--block_size=16', '--device=cpu']
    assert fails(bench, monkeypatch, capsys, *argv) == 'error: out of memory\n'


def test_what_a_killed_writer_left_is_no_part_of_the_next_file():
    with open('f.tmp', 'w') as f:
        f.write('half of something')
    with whole('f'):
        pass
    assert open('f').read() == ''


def test_an_unbreakable_stream_raises_nothing():
    with open('/dev/full', 'w') as full:
        stream = Unbreakable(full)
        for _ in range(2):
            assert stream.write('lost') == 4
            stream.flush()
    assert Unbreakable(None).write('x') == 1


def test_a_clock_that_stands_still(monkeypatch):
    """Windows' clock is coarse: two steps may have the same time."""
    monkeypatch.setattr(time, 'time', lambda: 1.0)
    assert len(go('a', '--max_iters=2')) == 2
