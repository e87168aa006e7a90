"""train.py: it learns and says so, continues exactly, survives bad days, and many processes equal one."""
import math
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from helpers import (
    TINY,
    TINY_RUN,
    TOY_METHODS,
    TWO_STAGES,
    Toy,
    at_step,
    go,
    log,
    losses,
    open_toy,
    same,
    toy_teacher,
    weights,
)

import ladd
import lib.log
import mdlm
import train
from lib import checkpoint, distributed
from lib.configurator import UserError, defaults_of
from lib.signals import heed_signals
from methods import METHODS, build


@pytest.fixture(autouse=True)
def toy(monkeypatch, tmp_path):
    monkeypatch.setattr(train, 'open_data', open_toy)
    monkeypatch.chdir(tmp_path)


def timeless(name):
    """The records of a log without its speeds."""
    return [{k: v for k, v in r.items() if k != 'tokens_per_s'} for r in log(name)]


# ------------------------------------------------------------------------------------------------------------
# it trains, and says so

def test_it_learns_and_reports(capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(train, 'report', lambda method: seen.append(
        (method.training, [p.clone() for p in method.parameters()])))
    log4 = 1.386
    go('a', '--max_iters=200', '--eval_interval=50', '--ema=0.9', '--learning_rate=1e-2', '--warmup_iters=10',
       '--decay_lr=cosine', '--min_lr=0.1', '--dataset=sawtooth')
    records = log('a')
    val = [r for r in records if 'val_loss' in r]
    assert [r['step'] for r in val] == [50, 100, 150, 200] and val[-1]['val_loss'] < 1.3 < log4
    rates = [r['lr'] for r in records if 'lr' in r]
    assert rates[0] == pytest.approx(1e-3) and max(rates) == 1e-2
    assert rates[-1] == pytest.approx(1e-3, rel=0.01)
    out = capsys.readouterr().out
    assert out.startswith('mdlm on sawtooth: 0.01M parameters')
    assert 'GFLOPs per denoiser call; 128 tokens per step' in out
    ckpt = checkpoint.load('a/ckpt.pt')
    assert ckpt['step'] == 200 and ckpt['tokens'] == 200 * 128
    assert ckpt['config']['vocab_size'] == 4 and ckpt['config']['block_size'] == 16
    (training, params), = seen  # the report gets the averaged weights
    assert not training and all(torch.equal(p, e) for p, e in zip(params, ckpt['ema'].values(), strict=True))
    assert sorted(os.listdir('a')) == ['ckpt.pt', 'log.jsonl']
    go('b', '--max_iters=1')  # other data has no report
    assert capsys.readouterr().out.startswith('mdlm on toy: ') and len(seen) == 1


def test_validation_does_not_depend_on_the_batch():
    torch.manual_seed(0)
    method = build(dict(method='mdlm', vocab_size=4, block_size=16, hidden=16, num_layers=1, num_heads=2,
                        cond_dim=8))
    values = []
    torch.nn.init.normal_(method.head.weight)
    for batch_size in (20, 7, 1):
        c = train.Config(batch_size=batch_size, dtype='float32')
        values.append(train.Trainer(method, c, torch.device('cpu')).evaluate(Toy(), 20)['nats'])
    assert values == pytest.approx([values[0]] * 3, rel=1e-6)


def test_muon_moves_the_matrices_of_blocks():
    """Every weight has one optimizer, and a step of Muon has the singular values that it promises.

    Newton-Schulz in bfloat16 brings them into [.5, 1.3], and they are scaled by .2 times the root of the
    longer side (Liu et al., 2025, arXiv:2502.16982), so that entries move as far as AdamW's.
    """
    args = [*TINY_RUN, '--optimizer=muon', '--learning_rate=0.1']
    _, trainer, data, _, _ = train.prepare(args)
    adamw, muon = ([p for group in o.param_groups for p in group['params']] for o in trainer.optimizers)
    names = {id(p): name for name, p in zip(trainer.names, trainer.params)}
    assert sorted(map(id, adamw + muon)) == sorted(names)
    inner = ('qkv.weight', 'out.weight', 'mlp.0.weight', 'mlp.2.weight')
    assert {names[id(p)] for p in muon} == {k for k in trainer.names if '.blocks.' in k and k.endswith(inner)}

    def move(step):
        before = [p.detach().clone() for p in muon]
        trainer.step(step, data.batch(0, step, torch.arange(8)), None)
        return [p.detach() - old for p, old in zip(muon, before)]
    for step in range(4):  # heads and AdaLN's gates have to open before the blocks have a gradient
        move(step)
    sizes = [torch.linalg.matrix_norm(m, 2) / (0.1 * 0.2 * max(m.shape)**0.5) for m in move(4)]
    assert len(sizes) == 4 and all(0.5 < s < 1.3 for s in sizes)


# ------------------------------------------------------------------------------------------------------------
# stop and continue

class Killed(Exception):
    pass


def killed():
    raise Killed


@pytest.mark.parametrize('method, at, optimizer', [('mdlm', 15, 'adamw'), ('mdlm', 15, 'muon'),
                                                    ('ladd', 15, 'adamw'), ('ladd', 25, 'muon')])
def test_kill_and_resume_give_the_same_next_losses(monkeypatch, capsys, method, at, optimizer):
    args = ['--dropout=0.1', f'--optimizer={optimizer}', '--max_iters=40', '--eval_interval=10',
            '--decay_lr=linear', *(TWO_STAGES if method == 'ladd' else [])]
    whole = go('whole', *args)
    lines = capsys.readouterr().out.replace('\r', '\n').split('\n')
    news = [line.strip()[:26] for line in lines if ' begins' in line or 'k-means' in line]
    assert news == ([] if method == 'mdlm' else ['step 5: k-means has made t', 'step 20: stage 2 begins: e'])
    with monkeypatch.context() as m:
        at_step(m, METHODS[method], at, killed)
        with pytest.raises(Killed):
            go('parts', *args)
    assert checkpoint.load('parts/ckpt.pt')['step'] == at - 5
    assert len(losses('parts')) == at  # five records past the checkpoint
    with open('parts/log.jsonl', 'a') as f:
        f.write('{"step": 3, "lo')  # and a torn line
    assert go('parts', *args) == whole
    assert same(weights('parts'), weights('whole'))
    assert timeless('parts') == timeless('whole')


@pytest.fixture
def not_nohup():
    """SIGHUP ends this process, also where pytest runs under nohup."""
    old = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, old)


@pytest.mark.parametrize('signum', [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_first(monkeypatch, not_nohup, signum):
    whole = go('whole', '--max_iters=12')
    with monkeypatch.context() as m:
        at_step(m, mdlm.MDLM, 6, lambda: os.kill(os.getpid(), signum))
        with pytest.raises(SystemExit) as e:
            go('parts', '--max_iters=12')
    assert e.value.code == 128 + signum and checkpoint.load('parts/ckpt.pt')['step'] == 7
    assert go('parts', '--max_iters=12') == whole
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_before_the_first_step_does_not_wait(monkeypatch, capfd):
    """While compiling, for instance; `run` ends such a command quietly."""
    at_step(monkeypatch, mdlm.MDLM, 0, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        go('a', '--max_iters=2')
    assert not os.path.exists('a/ckpt.pt') and log('a') == []


def test_a_long_wait_is_explained(monkeypatch, capfd):
    """The bar's clock moves while the first step compiles and while the run validates."""
    monkeypatch.setattr(train, 'compile_in_place', lambda *args, required: None)
    bar = lib.log.tqdm
    monkeypatch.setattr(lib.log, 'tqdm', lambda **keys: bar(**{**keys, 'mininterval': 0.01}))
    at_step(monkeypatch, mdlm.MDLM, 0, lambda: time.sleep(1.5))
    evaluate = train.Trainer.evaluate
    monkeypatch.setattr(train.Trainer, 'evaluate', lambda *args: [time.sleep(0.3), evaluate(*args)][1])
    go('a', '--max_iters=2', '--compile=True')
    shown = capfd.readouterr().err
    assert re.search('compiling, once:   0%.*00:01', shown) and 'validating: 100%' in shown
    assert shown.index('validating') > shown.rindex('compiling')


def test_a_second_signal_does_not_wait():
    with pytest.raises(KeyboardInterrupt), heed_signals() as received:
        os.kill(os.getpid(), signal.SIGTERM)
        assert received == [signal.SIGTERM]
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_under_nohup_a_closed_terminal_stops_nothing(not_nohup):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with heed_signals() as received:
        os.kill(os.getpid(), signal.SIGHUP)
    assert received == []


def test_a_signal_between_two_steps_waits_for_the_next(monkeypatch):
    """The decision not to save this step has been made: to stop here would lose the steps since the last
    checkpoint."""
    append = lib.log.append

    def append_and_signal(path, record):
        if record['step'] == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        append(path, record)
    monkeypatch.setattr(lib.log, 'append', append_and_signal)
    with pytest.raises(SystemExit):
        go('a', '--max_iters=12')
    assert checkpoint.load('a/ckpt.pt')['step'] == 7


def test_killed_in_an_evaluation(monkeypatch):
    """The log gets the validation that was interrupted, also the last one, which no step follows."""
    args = ['--max_iters=8', '--eval_interval=4', '--log_interval=3']
    go('whole', *args)
    evaluate, killed_at = train.Trainer.evaluate, []

    def die_once(self, *rest):
        if len(killed_at) < 2 and (not killed_at or killed_at[-1] != os.path.exists('parts/ckpt.pt')):
            killed_at.append(os.path.exists('parts/ckpt.pt'))
            raise Killed
        return evaluate(self, *rest)
    monkeypatch.setattr(train.Trainer, 'evaluate', die_once)
    for _ in range(2):
        with pytest.raises(Killed):
            go('parts', *args)
    go('parts', *args)
    assert killed_at == [False, True] and timeless('parts') == timeless('whole')
    assert [r['step'] for r in log('whole') if 'val_loss' in r] == [4, 8]


def test_scratch_and_going_further(capsys):
    first = go('a', '--max_iters=5')
    assert go('a', '--max_iters=5') == first
    assert 'at step 5 of 5; a larger --max_iters continues it' in capsys.readouterr().out
    more = go('a', '--max_iters=8', '--learning_rate=1e-4', '--beta2=0.95', '--batch_size=4')
    assert more[:5] == first and len(more) == 8 and log('a')[-1]['step'] == 8
    assert checkpoint.load('a/ckpt.pt')['tokens'] == (5 * 8 + 3 * 4) * 16
    assert go('a', '--max_iters=5', '--init_from=scratch') == first


def test_scratch_killed_before_its_first_checkpoint(monkeypatch):
    """The old run is gone at once: its checkpoint must not be continued after records of the new one."""
    go('a', '--max_iters=5', '--learning_rate=1e-4')
    whole = go('whole', '--max_iters=5')
    with monkeypatch.context() as m:
        at_step(m, mdlm.MDLM, 2, killed)
        with pytest.raises(Killed):
            go('a', '--max_iters=5', '--init_from=scratch')
    assert checkpoint.load('a/ckpt.pt')['step'] == 0 and len(losses('a')) == 2
    assert go('a', '--max_iters=5') == whole


# ------------------------------------------------------------------------------------------------------------
# bad days

def spoil(monkeypatch, Method, steps):
    """The loss of these steps is not finite."""
    forward = Method.forward

    def wrapped(self, x, noise):
        loss, logs = forward(self, x, noise)
        return loss * float('nan') if noise.step in steps else loss, logs
    monkeypatch.setattr(Method, 'forward', wrapped)


@pytest.mark.parametrize('name, optimizer', [('mdlm', 'muon'), *((name, 'adamw') for name in TOY_METHODS)])
def test_a_loss_that_is_not_finite_leaves_no_trace(monkeypatch, name, optimizer):
    toy_teacher()
    args = [*TOY_METHODS[name], '--ema=0', f'--optimizer={optimizer}']
    args += ['--adaptive_memory=1'] * (name == 'ldlm')  # its losses are forgotten in every step
    go('clean', '--max_iters=4', *args)
    spoil(monkeypatch, METHODS[checkpoint.load('clean/ckpt.pt')['config']['method']], {4})
    go('spoilt', '--max_iters=5', *args)
    assert same(weights('spoilt'), weights('clean'))
    a, b = (checkpoint.load(f'{name}/ckpt.pt')['optimizer'] for name in ('spoilt', 'clean'))
    assert a.keys() == b.keys() and all(same(a[name], b[name]) for name in b)
    assert [r['skipped'] for r in log('spoilt') if 'skipped' in r] == [0] * 4 + [1]
    assert log('spoilt')[4]['loss'] is None  # JSON has no NaN


def test_three_in_a_row_stop_the_run(monkeypatch):
    spoil(monkeypatch, mdlm.MDLM, {2, 3, 6, 12, 13, 14})  # two in a row are forgiven
    with pytest.raises(SystemExit) as e:
        go('a', '--max_iters=40', '--eval_interval=10')
    # a string as exit code: it is printed, and the code is 1
    assert 'not finite in 3 steps in a row, up to step 15' in e.value.code
    ckpt = checkpoint.load('a/ckpt.pt')
    assert ckpt['step'] == 10 and all(v.isfinite().all() for v in ckpt['model'].values())


def test_three_in_a_row_are_seen_between_two_logs(monkeypatch):
    spoil(monkeypatch, mdlm.MDLM, {2, 3, 4})
    with pytest.raises(SystemExit):
        go('a', '--max_iters=40', '--eval_interval=10', '--log_interval=10')
    assert not os.path.exists('a/ckpt.pt')


def test_buffers_stay_in_a_spoilt_step(monkeypatch):
    args = [*TWO_STAGES, '--vq_start=0', '--max_iters=6', '--ema=0']
    go('clean', *args)
    spoil(monkeypatch, ladd.LADD, {6})
    go('spoilt', *args, '--max_iters=7')
    assert same(weights('spoilt'), weights('clean'))


# ------------------------------------------------------------------------------------------------------------
# mistakes by the user: one line, nothing written

@pytest.mark.parametrize('arg, words', [
    ('--hiden=8', 'did you mean hidden'), ('--hidden=x', 'an integer'),
    ('--method=mdml', 'did you mean mdlm'), ('config/none.py', 'cannot read'),
    ('--batch_size=0', 'at least 1'), ('--micro_batch=3', '1 would'),
    ('--num_heads=3', '3 heads'), ('--num_heads=0', 'at least 1'), ('--dtype=float16', 'bfloat16, float32'),
    ('--decay_lr=step', 'cosine'), ('--device=tpu', 'cpu'), ('--init_from=resume', 'python train.py'),
    ('--init_from=best', 'auto, scratch, resume, out/OTHER'),
    ('--init_from=out/none', 'out/none holds no checkpoint'),
    ('--method=ladd', '--stage1_iters=N'),
    ('--method=ladd --encoder_layers=0', 'at least 1'), ('--method=ladd --latent_length=0', 'greater than 0'),
    ('--method=ladd --dead_below=0', 'greater than 0'), ('--method=ldlm --tangent=0', 'greater than 0'),
    ('--method=ldlm --adaptive_floor=-1', 'at least 0'),
    ('--ema=1', 'ema'), ('--dropout=1', 'dropout'), ('--learning_rate=-1', 'at least 0'),
    ('--max_iters=0', 'at least 1'), ('--compile=1', 'True or False'), ('--block_size=8', '16 tokens'),
    ('--min_lr=0.1', "no effect with decay_lr='constant'"),
])
def test_mistakes(arg, words, tmp_path):
    with pytest.raises(UserError) as e:
        go('a', *arg.split())
    assert words in str(e.value) and '\n' not in str(e.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('method, step', [('mdlm', 1), ('mdlm', 3), ('ldlm', 3)])
def test_a_signal_in_the_step_of_a_validation_only_delays_it(method, step, monkeypatch):
    """Also the last one, after which there is no step to resume with; and it is not repeated then."""
    args = [*TOY_METHODS[method], '--max_iters=4', '--eval_interval=2']
    go('whole', *args)
    with monkeypatch.context() as m:
        at_step(m, METHODS[method], step, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit):
            go('a', *args)
    assert not any(name.startswith('val_') for name in log('a')[-1])
    for _ in range(2):
        go('a', *args)
        assert timeless('a') == timeless('whole')


def test_dropout_is_another_in_every_step(monkeypatch):
    """A CPU's generator takes 32 bits of its seed, which steps 65,536 apart once shared."""
    method, drawn = build({**TINY, 'method': 'mdlm'}), []
    config = {**defaults_of(train.Config), 'batch_size': 1, 'dtype': 'float32'}
    trainer = train.Trainer(method, SimpleNamespace(**config), torch.device('cpu'))
    at_step(monkeypatch, mdlm.MDLM, 0, lambda: drawn.append(torch.rand(8)))
    at_step(monkeypatch, mdlm.MDLM, 2**16, lambda: drawn.append(torch.rand(8)))
    for step in 0, 2**16, 0:
        trainer.step(step, [torch.zeros(1, TINY['block_size'], dtype=torch.int64)], None)
    assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])


def test_batch_must_divide_among_the_processes(monkeypatch, tmp_path):
    for name, value in dict(WORLD_SIZE='3', RANK='0', MASTER_ADDR='localhost', MASTER_PORT='1').items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match='does not divide among 3 processes; 6 would'):
        go('a')
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('arg', ['--hidden=32', '--num_layers=2', '--num_heads=1', '--method=ladd',
                                 '--dataset=other', '--seed=1', '--optimizer=muon'])
def test_another_shape_is_refused_with_the_way_out(arg):
    go('a', '--max_iters=2')
    before = open('a/ckpt.pt', 'rb').read(), open('a/log.jsonl', 'rb').read()
    with pytest.raises(UserError, match='--init_from=scratch, or give another --out_dir') as e:
        go('a', '--max_iters=4', arg)
    assert arg[2:] in str(e.value)
    assert (open('a/ckpt.pt', 'rb').read(), open('a/log.jsonl', 'rb').read()) == before


def test_another_meaning_of_the_weights_is_refused(monkeypatch):
    """Shapes do not show it: as many other characters, other texts, other lengths or noise of the latents."""
    monkeypatch.setattr(Toy, 'tokenizer', {'kind': 'char', 'chars': 'abcd', 'eos': False})
    monkeypatch.setattr(Toy, 'sha256', 'one', raising=False)
    args = [*TOY_METHODS['co_ladd'], '--max_iters=1']
    go('a', *args)
    for arg in ('--unit_norm=False', '--latent_length=2', '--latent_schedule=vp_linear'):
        with pytest.raises(UserError, match=f'not {arg[2:]}'):
            go('a', *args, arg)
    with monkeypatch.context() as m:
        m.setattr(Toy, 'sha256', 'another')
        with pytest.raises(UserError, match='data_sha256=one, not data_sha256=another'):
            go('a', *args)
    monkeypatch.setattr(Toy, 'tokenizer', {'kind': 'char', 'chars': 'abdc', 'eos': False})
    with pytest.raises(UserError, match="'abcd'.* not tokenizer=.*'abdc'"):
        go('a', *args)


def test_a_run_continues_without_the_one_it_began_with(capsys):
    go('other', '--max_iters=1')
    args = [f'--init_from={os.getcwd()}/other']
    go('a', *args, '--max_iters=1')
    assert 'tensors begin as' in capsys.readouterr().out
    os.rename('other', 'gone')
    assert len(go('a', *args, '--max_iters=2')) == 2 and 'begin as' not in capsys.readouterr().out


def test_spoilt_checkpoint_and_blocked_folder():
    os.mkdir('a')
    open('a/ckpt.pt', 'w').close()
    with pytest.raises(UserError, match='--init_from=scratch'):
        go('a')
    assert os.listdir('a') == ['ckpt.pt']
    open('file', 'w').close()
    with pytest.raises(UserError, match='give another --out_dir'):
        go('file/a')


# ------------------------------------------------------------------------------------------------------------
# many processes

FOLDERS = [os.path.dirname(train.__file__), os.path.dirname(__file__)]
PREPARE = f"""
import os, sys, torch
torch.set_num_threads(1)
sys.path[:0] = {FOLDERS!r}
import helpers, train
from lib.configurator import run
train.open_data = helpers.open_toy
"""
RUN = 'run(train.main)\n'


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_accumulation_equals_one_batch(optimizer):
    args = ['--max_iters=10', f'--optimizer={optimizer}']
    one, many = go('one', *args), go('many', *args, '--micro_batch=2')
    assert torch.allclose(torch.tensor(one), torch.tensor(many), rtol=1e-4)


def test_two_processes_equal_one(tmp_path):
    """Six steps on two processes that accumulate over two micro-batches; one of them is killed on the way
    and started again; then one process continues.

    The restart has the same arguments, scratch among them, and continues all the same.
    """
    args = ['--eval_interval=2', '--ema=0.9']
    one = go('one', '--max_iters=10', *args)
    (tmp_path / 'script.py').write_text(PREPARE + """
import mdlm
forward = mdlm.MDLM.forward
def wrapped(self, x, noise):
    if noise.step == 3 and os.environ['RANK'] == '1' and not os.path.exists('killed'):
        open('killed', 'w').close()
        os.kill(os.getpid(), 9)
    return forward(self, x, noise)
mdlm.MDLM.forward = wrapped
""" + RUN)
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
                '--max-restarts=1', '--monitor-interval=0.1', 'script.py']
    r = subprocess.run([*torchrun, *TINY_RUN, *args, '--out_dir=two', '--max_iters=6', '--micro_batch=2',
                        '--init_from=scratch'], capture_output=True, text=True)
    assert r.returncode == 0 and 'two is at step 2 of 6' in r.stdout, r.stderr
    two = go('two', '--max_iters=10', *args)
    assert torch.allclose(torch.tensor(one), torch.tensor(two), rtol=1e-3)
    a, b = weights('one'), weights('two')
    assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)
    val = [[r['val_loss'] for r in log(name) if 'val_loss' in r] for name in ('one', 'two')]
    assert val[0] == pytest.approx(val[1], rel=1e-4)


FORK = PREPARE + f"""
import socket
# what torch imports at its first step, the children need not
train.main({TINY_RUN + ['--out_dir=warm', '--max_iters=1']!r})

def processes(world, args, prepare):
    # one run without torchrun, which takes longer to start than the run itself; -> exit codes
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = str(s.getsockname()[1])
    children = []
    sys.stdout.flush()
    for rank in range(world):
        children.append(os.fork())
        if not children[-1]:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
            os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
            prepare(rank)
            sys.argv[1:] = args
            code = 0
            try:
                run(train.main)
            except SystemExit as e:
                code = e.code if isinstance(e.code, int) else print(e.code, file=sys.stderr) or 1
            sys.stdout.flush()
            os._exit(code)  # the usual way out takes Python a second
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
"""


def run_script(text, timeout=300):
    with open('script.py', 'w') as f:
        f.write(text)
    return subprocess.run([sys.executable, 'script.py'], capture_output=True, text=True,
                          env={**os.environ, 'OMP_NUM_THREADS': '1'}, timeout=timeout)


@pytest.mark.parametrize('world', [2, pytest.param(8, marks=pytest.mark.slow)])
def test_gradients_of_many_processes_are_those_of_one(world):
    """Eight steps that leave the weights where they are, so that a difference is one of the gradient and not
    of earlier steps. Most of the exchange begins during the backward pass."""
    toy_teacher()
    r = run_script(FORK + f"""
import lib.distributed
from ldlm import AdaptiveTimes
lib.distributed.BUCKET = 2000  # bytes: several buckets, and weights that are larger than one
build, finish, refresh = train.build, train.GradientAverage.finish, AdaptiveTimes.refresh
steps, where = [], []

def build_random(config):  # heads begin at zero, and would let no gradient pass
    method = build(config)
    for p in method.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return method

def refresh_rounded(self):  # time embeddings multiply t by 1000 and would show the last bits of the losses
    refresh(self)
    self.p.copy_((self.p * 2**12).round() / 2**12)

def recording(self, loss):
    early = torch.tensor(len(self.sent) if self.listening else 0)  # how many exchanges have begun
    loss = finish(self, loss)
    steps.append([early, loss.detach(), *(p.grad.clone() for p in self.params if p.grad is not None)])
    torch.save(steps, where[0])
    return loss

train.build, train.GradientAverage.finish, AdaptiveTimes.refresh = build_random, recording, refresh_rounded
for name, args in {TOY_METHODS!r}.items():
    # one process, and {world} processes that accumulate over two micro-batches each
    for world, micro in ((1, 0), ({world}, 2)):
        args = [*{TINY_RUN!r}, *args, '--learning_rate=0', '--max_iters=8', f'--out_dir={{name}}{{world}}',
                '--batch_size={4 * world}', f'--micro_batch={{micro}}']
        codes = processes(world, args, lambda rank: where.append(f'{{name}}{{world}}.{{rank}}.pt'))
        assert set(codes) == {{0}}
""")
    assert r.returncode == 0, r.stderr
    for name in TOY_METHODS:
        one = torch.load(f'{name}1.0.pt')
        many, *others = (torch.load(f'{name}{world}.{rank}.pt') for rank in range(world))
        assert len(one) == len(many) == 8
        for other in others:
            assert all(torch.equal(p, q) for a, b in zip(many, other, strict=True)
                       for p, q in zip(a, b, strict=True))
        for step, ((_, *a), (early, *b)) in enumerate(zip(one, many)):
            assert len(a) == len(b) > 10 and early > 3
            scale = max(p.norm() for p in a[1:])
            assert scale > 1e-3
            off = [i for i, (p, q) in enumerate(zip(a, b)) if (p - q).norm() > 1e-5 * p.norm() + 1e-6 * scale]
            assert not off, (name, step, off)
        a, b = weights(name + '1'), weights(f'{name}{world}')
        assert a.keys() == b.keys()
        assert not [k for k in a if not torch.allclose(a[k], b[k], rtol=1e-4, atol=1e-5)]
        assert name != 'di_ladd' or (a['quantizer.counts'] != 2).any()  # 2: what they begin with


@pytest.fixture
def lone_group(monkeypatch):
    """A group of processes with this one as its only member, which believes that there are two."""
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(distributed, 'rank_and_world', lambda: (0, 2))
    yield
    dist.destroy_process_group()


def test_gradients_are_exchanged_during_the_backward_pass(lone_group, monkeypatch):
    """By the order of events: the exchange of a bucket begins while gradients of lower layers are missing.

    Of two micro-batches only the second one exchanges; a weight that takes no part never has a gradient.
    """
    events, all_reduce = [], dist.all_reduce

    def recording(bucket, async_op):
        events.append(f'reduce {len(bucket)}')
        return all_reduce(bucket, async_op=async_op)
    monkeypatch.setattr(dist, 'all_reduce', recording)
    monkeypatch.setattr(distributed, 'BUCKET', 2 * 64 * 4)  # two layers of 8 x 8 in fp32
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(5)))
    params = [*layers.parameters(), nn.Parameter(torch.ones(3))]
    for i in range(6):
        params[i].register_post_accumulate_grad_hook(lambda p, i=i: events.append(f'gradient {i}'))
    average, x = distributed.GradientAverage(params), torch.randn(3, 8)
    layers(x).sum().backward()
    assert events == [f'gradient {i}' for i in (4, 3, 2, 1, 0)]
    events.clear()
    average.begin()
    layers(x).sum().backward()
    assert average.finish(torch.tensor(3.0)) == 3
    assert events == ['gradient 4', 'gradient 3', 'reduce 128', 'gradient 2', 'gradient 1', 'reduce 128',
                      'gradient 0', 'reduce 65']  # the last one: with the loss
    assert params[5].grad is None
    averaged = [p.grad for p in params]
    layers.zero_grad()
    (2 * layers(x).sum()).backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(averaged, params) if a is not None)


def test_a_weight_that_only_the_first_micro_batch_used(lone_group):
    params = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    average = distributed.GradientAverage(params)
    params[0].sum().backward()
    average.begin()
    (3 * params[1]).sum().backward()
    average.finish(torch.zeros(()))
    assert [p.grad.tolist() for p in params] == [[1, 1], [3, 3]]
    assert params[0].grad.untyped_storage().data_ptr() == params[1].grad.untyped_storage().data_ptr()


def test_one_graph_holds_what_processes_tell_each_other():
    """What a GPU compiles, a forward pass with codebook and adaptive times, is one graph on two processes,
    too; and the numbers are the same."""
    r = run_script(FORK + f"""
import ladd, ldlm
ladd.LADD.backbones = ldlm.LDLM.backbones = lambda self: [self]  # compile all of it, as on a GPU
train.compile_in_place = lambda modules, *args, **options: modules[0].compile(fullgraph=True, backend='eager')
for name in ('di_ladd', 'ldlm'):
    for compiled in (False, True):
        args = [*{TINY_RUN!r}, *{TOY_METHODS!r}[name], '--max_iters=8', f'--out_dir={{name}}{{compiled}}',
                '--micro_batch=2', f'--compile={{compiled}}']
        assert set(processes(2, args, lambda rank: None)) == {{0}}
""")
    assert r.returncode == 0, r.stderr
    for name in ('di_ladd', 'ldlm'):
        eager, compiled = (torch.tensor(losses(f'{name}{compiled}')) for compiled in (False, True))
        assert torch.allclose(eager, compiled, rtol=1e-4), name
        a, b = weights(name + 'False'), weights(name + 'True')
        assert all(torch.allclose(a[k], b[k], rtol=1e-3, atol=1e-4) for k in a)


def test_bad_days_of_two_processes():
    """A signal to one of them stops both after the same step; so does a loss that is not finite on one; a
    full disk of rank 0 leaves nobody waiting."""
    r = run_script(FORK + f"""
import mdlm, resource, signal
forward = mdlm.MDLM.forward

def at(step, rank, action):
    def prepare(mine):
        def wrapped(self, x, noise):
            loss, logs = forward(self, x, noise)
            return (action() or 1.0) * loss if noise.step >= step and mine == rank else loss, logs
        mdlm.MDLM.forward = wrapped
    return prepare

def limit():
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))

once = [lambda: os.kill(os.getpid(), signal.SIGTERM)]
args = [*{TINY_RUN!r}, '--max_iters=20', '--eval_interval=4']
print(processes(2, [*args, '--out_dir=signal'], at(5, 1, lambda: once and once.pop()())))
print(processes(2, [*args, '--out_dir=nan'], at(5, 1, lambda: float('nan'))))
print(processes(2, [*args, '--out_dir=full'], at(5, 0, limit)))
""")
    assert r.returncode == 0, r.stderr
    codes = [line for line in r.stdout.split('\n') if line.startswith('[')]
    assert codes[:2] == ['[143, 143]', '[1, 1]'] and codes[2].startswith('[2, '), codes
    steps = [checkpoint.load(f'{name}/ckpt.pt')['step'] for name in ('signal', 'nan', 'full')]
    assert steps == [6, 4, 4]
    assert r.stderr.count('not finite in 3 steps in a row, up to step 8') == 1
    assert r.stderr.count('cannot write full/ckpt.pt') == 1


@pytest.mark.slow
def test_twenty_bad_days_of_eight_processes():
    """On nineteen of them a process is killed at a random moment, on one the disk of rank 0 is full; after
    each the number of processes is another. Some processes are slow, and one meets a NaN. The losses are
    those of one process without any of this, but for the NaN."""
    r = run_script(FORK + f"""
import mdlm, random, resource, signal, time
forward = mdlm.MDLM.forward
rng = random.Random(0)
args = [*{TINY_RUN!r}, '--max_iters=60', '--eval_interval=20', '--checkpoint_interval=1', '--ema=0.9']

def day(victim=None, fatal=0, delay=0.0, full=False, slow=None):
    def prepare(rank):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which ends the process on the spot
        seen = []
        def wrapped(self, x, noise):
            if self.training:
                seen.append(noise.step)
                if rank == victim and len(seen) == fatal:
                    if full:
                        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
                    else:
                        signal.setitimer(signal.ITIMER_REAL, delay)
                if rank == slow:
                    time.sleep(0.05)
            loss, logs = forward(self, x, noise)
            return loss * (float('nan') if noise.step == 9 and rank == 0 and self.training else 1.0), logs
        mdlm.MDLM.forward = wrapped
    return prepare

print(processes(1, [*args, '--out_dir=one'], day()))
for i in range(20):
    world = 8 if i % 2 == 0 else rng.choice((1, 2, 4))
    slow = 1 if i % 3 == 0 else None
    what = day(rng.randrange(world), rng.randint(1, 4), rng.uniform(1e-4, 0.05), slow=slow)
    print(world, processes(world, [*args, '--out_dir=many'], day(0, 2, full=True) if i == 10 else what))
print(processes(8, [*args, '--out_dir=many'], day()))
""", timeout=7200)
    assert r.returncode == 0, r.stderr
    days = [line for line in r.stdout.splitlines() if re.fullmatch(r'\d* ?\[.*\]', line)]
    print(*days, sep='\n')
    assert days[0] == '[0]' and days[-1] == str([0] * 8) and len(days) == 22
    assert sum('-14' in day for day in days) == 19  # SIGALRM
    assert '[2' in days[11]
    one, many = (torch.tensor([[math.nan if v is None else v for v in r] for r in losses(name)])
                 for name in ('one', 'many'))
    assert one.shape == (60, 3) and one[9, 1].isnan() and many[9, 1].isnan()
    assert torch.allclose(one, many, rtol=1e-3, equal_nan=True)
    a, b = weights('one'), weights('many')
    assert all(torch.allclose(a[k], b[k], atol=1e-3) for k in a)


def test_kill_at_any_moment(tmp_path):
    """kill -9 at 50 random moments, half of them within the checkpoint write if that can be arranged; the
    same command after each: always a checkpoint that loads, whole log lines, no step missing or twice."""
    args = [*TINY_RUN, '--out_dir=a', '--max_iters=100000', '--checkpoint_interval=1', '--eval_interval=7']
    (tmp_path / 'script.py').write_text(PREPARE + f"""
import random, signal, time
from lib.checkpoint import load
random.seed(0)
inside = 0

def half_written():  # when it was last written to, or None
    try:
        return os.stat('a/ckpt.pt.tmp').st_mtime_ns
    except FileNotFoundError:
        return None

for steps in (1, 2):  # what torch imports at its first step, the children need not
    before = time.perf_counter()
    train.main([*{TINY_RUN!r}, '--out_dir=warm', f'--max_iters={{steps}}'])
unit = time.perf_counter() - before  # what a start and a step take, however busy the machine is
for i in range(50):
    left = half_written()  # by an earlier kill
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        train.main({args!r})
    time.sleep(random.uniform(0.5, 4) * unit)
    deadline = time.monotonic() + 5
    while i % 2 and half_written() in (None, left) and time.monotonic() < deadline:
        os.sched_yield()
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL  # it had not failed before
    inside += half_written() not in (None, left)
    if os.path.exists('a/ckpt.pt'):
        load('a/ckpt.pt')
    if os.path.exists('a/log.jsonl'):
        assert open('a/log.jsonl', 'rb').read()[-1:] in (b'', b'\\n')
assert inside >= 5  # so many of the kills came while a checkpoint was half written
""")
    r = subprocess.run([sys.executable, 'script.py'], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    go('a', f'--max_iters={checkpoint.load("a/ckpt.pt")["step"] + 1}')
    steps = [step for step, _, _ in losses('a')]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > 20


@pytest.mark.parametrize('lost', ['a closed pipe', 'a full disk'])
def test_lost_output_does_not_end_the_run(lost, tmp_path):
    """A terminal that closes, or a pipe into a program that has ended, costs no step."""
    (tmp_path / 'script.py').write_text(PREPARE + RUN)
    reader, writer = os.pipe()
    os.close(reader)
    with open('/dev/full', 'w') if lost == 'a full disk' else open(writer, 'w') as out:
        r = subprocess.run([sys.executable, 'script.py', *TINY_RUN, '--out_dir=a', '--max_iters=12'],
                           stdout=out, stderr=out, timeout=300)
    assert r.returncode == 0 and checkpoint.load('a/ckpt.pt')['step'] == 12 and len(losses('a')) == 12


def test_the_command_itself(tmp_path):
    """Exit code and standard error as a person sees them."""
    (tmp_path / 'script.py').write_text(PREPARE + RUN)
    r = subprocess.run([sys.executable, 'script.py', '--hiden=8'], capture_output=True, text=True)
    assert r.returncode == 2 and r.stdout == ''
    assert r.stderr == 'error: unknown key hiden: did you mean hidden?\n'
    assert os.listdir(tmp_path) == ['script.py']
