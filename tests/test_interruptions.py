"""Two programs at once, pipes that close, signals, data that changes: no work is lost by them."""
import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import TINY_RUN, go, log, losses, open_toy

import train
from lib import checkpoint
from lib.configurator import UserError
from lib.files import whole
from lib.lock import claim
from lib.signals import Unbreakable
from lib.tokens import Tokens

ROOT = os.path.dirname(os.path.abspath(train.__file__))
SCRIPT = f"""
import sys
sys.path[:0] = [{ROOT!r}, {os.path.join(ROOT, 'tests')!r}]
import helpers, train
from lib.configurator import run
train.open_data = helpers.open_toy
run(train.main)
"""


@pytest.fixture(autouse=True)
def toy(monkeypatch, tmp_path):
    monkeypatch.setattr(train, 'open_data', open_toy)
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'script.py').write_text(SCRIPT)


def start(*args, shell='', **options):
    """A training in a process of its own; shell: what follows the command."""
    command = ' '.join([sys.executable, '-u', 'script.py', *TINY_RUN, *args])
    return subprocess.Popen(f'exec {command}' if not shell else f'{command} {shell}', shell=True,
                            env={**os.environ, 'OMP_NUM_THREADS': '1'}, **options)


def wait_for_log(name, process):
    while not os.path.exists(f'{name}/log.jsonl') or not losses(name):
        assert process.poll() is None, 'it has ended before its first step'
        time.sleep(0.05)


# ------------------------------------------------------------------------------------------------------------
# two at once

def test_a_folder_takes_one_training():
    """The second one is refused and changes nothing; the lock dies with its process, even a killed one."""
    first = start('--out_dir=a', '--max_iters=100000', stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for_log('a', first)
        before = os.path.getsize('a/log.jsonl')
        with pytest.raises(UserError, match='another process trains in a'):
            go('a', '--max_iters=3', '--init_from=scratch')
        assert os.path.getsize('a/log.jsonl') >= before
    finally:
        first.kill()
        first.wait()
    assert go('a', '--max_iters=3')[-1][0] == 3
    assert sorted(os.listdir('a')) == ['ckpt.pt', 'log.jsonl']


def test_a_file_has_one_writer():
    with open('f', 'w') as f:
        f.write('old')
    with whole('f') as temp:
        with open(temp, 'w') as f:
            f.write('new')
        with pytest.raises(UserError, match='another process is writing f'), whole('f'):
            raise AssertionError('two writers')
        assert os.path.exists(temp)  # the second one has left the first one's alone
    assert open('f').read() == 'new' and not os.path.exists(temp)


def test_what_a_killed_writer_left_is_no_part_of_the_next_file():
    with open('f.tmp', 'w') as f:
        f.write('half of something')
    with whole('f'):
        pass
    assert open('f').read() == ''


# ------------------------------------------------------------------------------------------------------------
# starting over

def test_starting_over_keeps_a_checkpoint_at_every_moment(monkeypatch):
    """The old one until everything is checked; from then on the new run's, so that no restart mixes them."""
    go('a', '--max_iters=4')
    old = open('a/ckpt.pt', 'rb').read(), open('a/log.jsonl', 'rb').read()
    monkeypatch.setitem(sys.modules, 'wandb', None)  # as if it were not installed
    with pytest.raises(UserError, match='wandb'):
        go('a', '--max_iters=4', '--init_from=scratch', '--wandb=True', '--seed=1')
    assert (open('a/ckpt.pt', 'rb').read(), open('a/log.jsonl', 'rb').read()) == old

    def dies(self, *args):
        raise MemoryError
    monkeypatch.setattr(train.Trainer, 'step', dies)
    with pytest.raises(MemoryError):
        go('a', '--max_iters=4', '--init_from=scratch', '--seed=1')
    now = checkpoint.load('a/ckpt.pt')
    assert (now['step'], now['config']['seed'], log('a')) == (0, 1, [])


# ------------------------------------------------------------------------------------------------------------
# the way out

@pytest.mark.parametrize('shell', ['2>&1 | head -n 1', '> /dev/full 2>&1', '>&- 2>&-', '2>&- | cat'])
def test_nobody_reads_but_the_work_is_done(shell):
    process = start('--out_dir=a', '--max_iters=30', '--eval_interval=10', shell=shell,
                    stderr=subprocess.PIPE)
    _, err = process.communicate(timeout=120)
    assert checkpoint.load('a/ckpt.pt')['step'] == 30 and losses('a')[-1][0] == 30
    assert b'Traceback' not in err and b'Exception' not in err


@pytest.mark.parametrize('s', [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves(s):
    """SIGHUP, too: a terminal that is closed, a connection that breaks."""
    process = start('--out_dir=a', '--max_iters=100000', stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_log('a', process)
    process.send_signal(s)
    assert process.wait(timeout=60) == 128 + s
    assert checkpoint.load('a/ckpt.pt')['step'] == losses('a')[-1][0]


def test_nohup_ignores_the_end_of_the_terminal():
    process = start('--out_dir=a', '--max_iters=300', stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                    preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    wait_for_log('a', process)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=120) == 0 and losses('a')[-1][0] == 300


def test_an_unbreakable_stream_has_no_opinion():
    with open('/dev/full', 'w') as full:
        stream = Unbreakable(full)
        assert stream.write('lost') == 4
        stream.flush()
        stream.write('also')
        stream.flush()
    assert Unbreakable(None).write('x') == 1


# ------------------------------------------------------------------------------------------------------------
# data

def prepare(text, *args):
    with open('text.txt', 'w') as f:
        f.write(text)
    subprocess.run([sys.executable, os.path.join(ROOT, 'data/text/prepare.py'), '--input', 'text.txt',
                    '--tokenizer=char', f'--name={NAME}', '--split=file', *args], check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


NAME = f'test_interruptions_{os.getpid()}'


def test_data_that_was_prepared_anew_is_noticed(monkeypatch):
    """Another split of the same text: what was trained on would be validated on."""
    monkeypatch.setattr(train, 'open_data', Tokens)
    folder = os.path.join(ROOT, 'data', NAME)
    run = [f'--dataset={NAME}', '--block_size=16', '--eval_seqs=4']
    try:
        prepare('abcd' * 500)
        go('a', *run, '--max_iters=2')
        assert go('a', f'--dataset={NAME}/', *run[1:], '--max_iters=4')[-1][0] == 4  # a/ is a
        prepare('abcd' * 500, '--val_fraction=0.5')
        with pytest.raises(UserError, match='data_sha256'):
            go('a', *run, '--max_iters=6')
        assert losses('a')[-1][0] == 4
    finally:
        for file in os.listdir(folder):
            os.remove(os.path.join(folder, file))
        os.rmdir(folder)


def test_lock_of_a_folder_is_released():
    claim('a')()
    claim('a')()
    assert os.listdir('a') == []


def test_a_clock_that_stands_still(monkeypatch):
    """Windows' clock is coarse: two steps may have the same time."""
    monkeypatch.setattr(time, 'time', lambda: 1.0)
    assert len(go('a', '--max_iters=2')) == 2
