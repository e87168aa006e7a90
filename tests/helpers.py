"""What several test files use: tiny methods and runs, toy data, laws, full disks."""
import contextlib
import json
import math
import os
import resource
import sys

import pytest
import torch

import train
from lib import checkpoint
from lib.configurator import run
from lib.noise import Noise
from methods import build

# ------------------------------------------------------------------------------------------------------------
# laws


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def whole(total, seed=0, step=0):
    """The noise of a whole batch."""
    return Noise(seed, step, torch.arange(total), total)


def close(values, expected):
    """The mean of independent values (n,) is what is expected."""
    values = values.double()
    return abs(float(values.mean()) - expected) < 4.5 * float(values.std()) / len(values) ** 0.5


def chi_square(counts, probs):
    """How many standard deviations the chi-square of counts lies above its mean under probs.

    By the approximation of Wilson and Hilferty.
    """
    counts, probs = counts.double().flatten(), probs.double().flatten()
    expected = probs / probs.sum() * counts.sum()
    assert expected.min() > 5, 'too few draws for a chi-square'
    df = len(counts) - 1
    ratio = float(((counts - expected) ** 2 / expected).sum()) / df
    return (ratio ** (1 / 3) - (1 - 2 / (9 * df))) / math.sqrt(2 / (9 * df))


# ------------------------------------------------------------------------------------------------------------
# methods

def scrambled(model, seed=0):
    """Leaves the initialisation: AdaLN gates open, the head no longer uniform."""
    torch.manual_seed(seed)
    for p in model.parameters():
        p.data = torch.randn_like(p) * (0.3 if p.dim() == 1 else p.shape[1] ** -0.5)
    return model


def spy(obj, name):
    """Replaces a method by itself, keeping each call's arguments and result: a list of (args, result)."""
    calls, method = [], getattr(obj, name)

    def recording(*args, **kwargs):
        calls.append((args, method(*args, **kwargs)))
        return calls[-1][1]
    setattr(obj, name, recording)
    return calls


L, CHARS = 12, '\n abcdefg'
TINY = dict(block_size=L, vocab_size=len(CHARS) + 1, hidden=16, num_layers=1, num_heads=2, cond_dim=8,
            dataset='toy', wrap=False, tokenizer={'kind': 'char', 'chars': CHARS, 'eos': True})
TINY_METHODS = {
    'mdlm': {}, 'ar': {}, 'flm': {}, 'duo': {}, 'duo_distilled': {}, 'candi': {}, 'ssmd': {},
    'cadd': dict(hint_dim=3), 'vadd': dict(z_dim=3, encoder_layers=1),
    'co': dict(method='ladd', num_latents=2, latent_dim=4, latent_layers=1),
    'di': dict(method='ladd', latent='discrete', latent_schedule='linear', num_latents=2, latent_dim=4,
               codebook_size=5),
    'ldlm': dict(token_encoder='scratch', reconstruction='ce', latent_dim=16, latent_layers=1,
                 decoder_layers=1, adaptive_bins=4)}


def make(name, folder=None, **changes):
    """A tiny method with random weights, and its checkpoint if it is given a folder."""
    config = {**TINY, 'method': name, **TINY_METHODS[name], **changes}
    torch.manual_seed(0)
    method = build(config).eval()
    for p in method.parameters():
        torch.nn.init.normal_(p, std=0.3)
    if folder:
        os.makedirs(folder, exist_ok=True)
        checkpoint.save(os.path.join(folder, 'ckpt.pt'),
                        {'config': config, 'model': method.state_dict(), 'ema': {}, 'step': 7})
    return method


# ------------------------------------------------------------------------------------------------------------
# runs of train.py on toy data

class Toy:
    """16 tokens of 4, each the one before it plus 0 or 1."""
    vocab_size, block_size, tokenizer, wrap = 4, 16, None, False

    def batch(self, seed, step, rows):
        flips = Noise(seed, step, rows, 1).uniform('toy', 16) * 2
        return flips.long().cumsum(dim=1) % 4,

    def rows(self, idx):
        return self.batch(1234, 0, idx)

    def __len__(self):
        return 50


def open_toy(name, split, block_size):
    return Toy()


TINY_RUN = ['--hidden=16', '--num_layers=1', '--num_heads=2', '--cond_dim=8', '--dtype=float32',
            '--batch_size=8', '--learning_rate=3e-3', '--log_interval=1', '--eval_seqs=20', '--dataset=toy',
            '--device=cpu']


def log(name):
    with open(f'{name}/log.jsonl') as f:
        return [json.loads(line) for line in f]


def losses(name):
    return [(r['step'], r['loss'], r['grad_norm']) for r in log(name) if 'loss' in r]


def go(name, *args):
    """train.py on the toy data (monkeypatch train.open_data to open_toy) -> losses."""
    train.main([*TINY_RUN, f'--out_dir={name}', *args])
    return losses(name)


def weights(name):
    c = checkpoint.load(f'{name}/ckpt.pt')
    return {**c['model'], **{'ema.' + k: v for k, v in c['ema'].items()}}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ------------------------------------------------------------------------------------------------------------
# files and mistakes

@contextlib.contextmanager
def disk_full(size):
    """Every file of this process ends at `size` bytes, if need be within a write, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def files(folder='.'):
    """{path: bytes} of all files in a folder."""
    return {path: open(path, 'rb').read() for path in paths(folder)}


def paths(folder):
    return [os.path.join(d, f) for d, _, fs in os.walk(folder) for f in fs]


ODD = [None, True, -1, 0, 3, 2**40, 10**30, 1.5, float('nan'), '', 'x', 'gpt3', '../..', '/', '\0', 'é\ud800',
       'char', 'huggingface', 'y' * 5000, [], [1], ['char'], {}, {'kind': 'char'},
       {'kind': 'huggingface', 'name': '../../x'}, {'kind': 'char', 'chars': 'ab', 'eos': False}]


def mutated(value, rng):
    """A copy with something odd at a random place of its tree."""
    if isinstance(value, torch.Tensor):
        return rng.choice([value[..., :0], value.flatten(), value[None], torch.zeros(3), *ODD])
    if not (isinstance(value, dict) and value) or rng.random() < 0.2:
        return rng.choice(ODD)
    value, key = dict(value), rng.choice(list(value))
    action = rng.random()
    if action < 0.15:
        del value[key]
    elif action < 0.25:
        value[rng.choice(list(value))] = value[key]
    else:
        value[key] = mutated(value[key], rng)
    return value


def fails(script, monkeypatch, capsys, *argv, keys=None):
    """The one line that a mistake ends with; exit code 2, nothing on stdout, no file made or changed."""
    def state():
        return {path: os.stat(path).st_mtime_ns for path in paths('.')}
    before = state()
    monkeypatch.setattr(sys, 'argv', [script.__name__ + '.py', *argv])
    with pytest.raises(SystemExit) as e:
        run(script.main, keys)
    out, err = capsys.readouterr()
    assert e.value.code == 2 and out == '' and err.startswith('error: ') and err.count('\n') == 1
    assert state() == before
    return err


# ------------------------------------------------------------------------------------------------------------
# every method on the toy data, and what may interrupt it

TWO_STAGES = ['--method=ladd', '--latent=discrete', '--latent_schedule=linear', '--codebook_size=4',
              '--latent_dim=4', '--num_latents=2', '--encoder_layers=1', '--vq_start=5', '--stage1_iters=20']
# every part of the state that is more than weights has its turn: k-means, the moving codebook, both stages,
# new times
TOY_METHODS = {
    'mdlm': [], 'ar': ['--method=ar'], 'flm': ['--method=flm'],
    'duo': ['--method=duo', '--curriculum_iters=3'],
    'duo_distilled': ['--method=duo_distilled', '--round_iters=3', '--first_gap=.25', '--init_from=out/duo'],
    'vadd': ['--method=vadd', '--encoder_layers=1', '--kl_warmup=4'],
    'cadd': ['--method=cadd', '--hint_dim=4'],
    'ssmd': ['--method=ssmd'],
    'candi': ['--method=candi'],
    'co_ladd': ['--method=ladd', '--latent_dim=4', '--num_latents=2', '--encoder_layers=1',
                '--times=independent', '--stage1_iters=3'],
    'di_ladd': [*TWO_STAGES, '--vq_start=2', '--stage1_iters=6'],
    'ldlm': ['--method=ldlm', '--token_encoder=scratch', '--reconstruction=ce', '--latent_dim=16',
             '--latent_layers=1', '--decoder_layers=1', '--adaptive_bins=4', '--adaptive_every=3',
             '--encoder_warmup=6'],
}


def toy_teacher():
    """What TOY_METHODS's distilled Duo begins with: out/duo."""
    make('duo', 'out/duo', vocab_size=Toy.vocab_size, block_size=Toy.block_size, tokenizer=Toy.tokenizer)


def at_step(monkeypatch, Method, step, action):
    """Calls action() at the beginning of a training step's forward pass."""
    forward = Method.forward

    def wrapped(self, x, noise):
        if noise.step == step and self.training:
            action()
        return forward(self, x, noise)
    monkeypatch.setattr(Method, 'forward', wrapped)
