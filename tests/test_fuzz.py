"""Random use of every command: any arguments, damaged and foreign files, signals, outputs that close.

    python -m pytest tests/test_fuzz.py      a few dozen cases
    python tests/test_fuzz.py 3000 [SEED]    so many, from a seed on; what fails is printed with its seed

Whatever happens, a command ends with exit code 0, or with one line and exit code 2; it leaves no temporary
file, and checkpoints that can be read. What it accepts, it computes as if nothing had happened: a run that
was stopped or damaged either says so, or ends with the weights of an undisturbed one.
"""
import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zlib
from unittest import mock

import torch
from matplotlib.figure import Figure

if __name__ == '__main__':
    sys.path[:0] = [os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]
from helpers import CHARS, TINY_METHODS, make, mutated, paths, weights

import bench
import eval as evaluation
import lib.prepare
import lib.tokens
import sample
import sawtooth
import train
from data import encode
from data.text import prepare
from lib import checkpoint, plot
from lib.configurator import defaults_of, method_keys, run
from methods import METHODS

HANG = 300  # seconds; every case takes less than one
BUILT = 1e9  # when all files of the world were last written

TRAIN = ['--dataset=data/set', '--block_size=12', '--hidden=16', '--num_layers=1', '--num_heads=2',
         '--cond_dim=8', '--dtype=float32', '--batch_size=4', '--learning_rate=3e-3', '--log_interval=1',
         '--eval_seqs=4', '--checkpoint_interval=2', '--eval_interval=4', '--device=cpu', '--dropout=0.1',
         '--max_iters=8']
LADD = ['--method=ladd', '--latent_dim=4', '--num_latents=2', '--latent_layers=1', '--encoder_layers=1']
FEW = ['--device=cpu', '--num_samples=2', '--batch_size=2', '--steps=2']
TEXT = ['--input', 'text.txt', '--tokenizer=char', '--workers=1']
ENCODE = ['--method=ladd', '--encoder=out/ar', '--dataset=data/set', '--block_size=12', '--num_latents=2',
          '--latent_dim=4', '--device=cpu']

# command -> main, its keys, its methods, and ways to call it
COMMANDS = {
    'train': (train.main, train.Config, METHODS, [
        [*TRAIN, '--out_dir=out/run'], [*TRAIN, '--out_dir=out/run', '--max_iters=6', '--optimizer=muon'],
        ['config.py', '--max_iters=8', '--hidden=16', '--num_layers=1', '--num_heads=2', '--eval_seqs=4'],
        [*TRAIN, '--out_dir=out/new', '--method=ar'],
        [*TRAIN, '--out_dir=out/new', *LADD, '--stage1_iters=2'],
        [*TRAIN, '--out_dir=out/new', '--init_from=out/run'],
        [*TRAIN, '--out_dir=out/run', '--init_from=scratch'],
        [*TRAIN, *ENCODE, '--stored_latents=True', '--encoder_dropout=False', '--out_dir=out/new']]),
    'sample': (sample.main, sample.Config, None, [
        *([f'--out_dir=out/{name}', *FEW] for name in ('run', *TINY_METHODS)),
        ['--out_dir=out/run', *FEW, '--save=x.jsonl', '--start=ab[MASK:2]', '--show'],
        ['--out_dir=out/co', *FEW, '--strategy=seq', '--latent_steps=2', '--save=x.npy']]),
    'eval': (evaluation.main, evaluation.Config, None, [
        *([f'--out_dir=out/{name}', *FEW, '--metrics=val_ppl,gen_ppl,diversity', '--val_seqs=3',
           '--data=text.txt', '--teacher=out/ar'] for name in TINY_METHODS if name != 'ldlm'),
        ['--out_dir=out/run', '--device=cpu', '--plot', '--metrics=entropy,val_ppl', '--steps=1,2'],
        ['--out_dir=out/ldlm', *FEW, '--metrics=reconstruction,smoothness', '--data=text.txt',
         '--teacher=out/ar']]),
    'sweep': (evaluation.main, evaluation.Sweep, None, [
        ['out/run', 'out/di', *FEW, '--teacher=out/ar'],
        ['results.jsonl', '--save=f.png', '--teacher=out/ar'],
        ['out/mdlm', 'results.jsonl', *FEW, '--results=r.jsonl', '--teacher=out/ar', '--paper=lm1b']]),
    'bench': (bench.main, bench.Config, METHODS, [
        [*TRAIN, '--variant=eager', '--num_samples=1', '--steps=2', '--iters=1'],
        [*TRAIN, '--vocab_size=10', *LADD]]),
    'sawtooth': (sawtooth.main, sawtooth.Config, None, [
        ['out/saw', '--num_samples=8', '--steps=1'],
        ['sawtooth.jsonl', '--num_samples=8', '--steps=1', '--save=f'],
        ['out/saw', 'out/saw/sawtooth.jsonl', '--num_samples=8', '--steps=1,2']]),
    'plot': (plot.main, plot.FrontierConfig, None, [
        ['log', 'out/run'], ['frontier', 'out/run', 'results.jsonl'], ['smoothness', 'out/ldlm'],
        ['frontier', 'results.jsonl', '--gflops=1', '--save=f.svg', '--paper=owt']]),
    'encode': (encode.main, train.Config, METHODS, [ENCODE]),
    'prepare': (prepare.main, None, None, [
        [*TEXT, '--name=new'], [*TEXT, '--name=set'],
        [*TEXT, '--name=new', '--split=line', '--val_fraction=0.3', '--wrap']]),
}
# values by the type of a key's default
VALUES = {int: ['-1', '0', '1', '2', '3', '7', '1.5', '-1e300'], bool: ['True', 'False', ''],
          float: ['-1', '0', '1', '2', '-0.5', '0.5', '1e-9', '-1e300', '1e300', '1e400', 'nan'],
          str: ['', 'x', '1', '1,2', '0,1', 'é', '\ud800', '\0', '~', '~/x', '/', '..', 'a' * 300, 'out/run',
                'out/ar', 'out/none', 'out/run/ckpt.pt', 'data/set', 'text.txt', 'f.png', 'x.npy', 'x.jsonl',
                '/dev/full', '/dev/null/x', 'seq', 'joint', 'entropy', 'cuda:1', 'char', '$x$', '_x']}
HUGE = ['1e4', '99999999999', '1e18', '9223372036854775807', '1' + '0' * 30]
# their size is the time that a command takes, or memory that a machine might just have
WORK = {'max_iters', 'num_layers', 'encoder_layers', 'latent_layers', 'decoder_layers', 'num_samples',
        'nll_draws', 'iters', 'val_seqs', 'eval_seqs', 'num_latents', 'adaptive_bins', 'workers',
        'codebook_size', 'batch_size'}
PREPARE = dict(input='', name='', tokenizer='', wrap=False, split='', val_fraction=0.1, workers=1)
NEVER = {'compile', 'wandb'}  # slow, or somebody else's


# ------------------------------------------------------------------------------------------------------------
# one command in this process

@contextlib.contextmanager
def sandbox(folder):
    """Within `folder`, no command leaves it, and what takes long takes none."""
    old = os.getcwd()
    os.chdir(folder)
    try:
        with contextlib.ExitStack() as stack:
            for module in lib.prepare, lib.tokens, sample:
                stack.enter_context(mock.patch.object(module, 'DATA', os.path.join(folder, 'data')))
            for owner, name, instead in (
                    (train, 'report', lambda method: None),
                    (bench, 'peak_flops', lambda *args: (1e9, 'assumed')),
                    (bench, 'in_its_own_process', lambda argv, variant: {'memory': 1}),
                    (Figure, 'savefig', lambda self, path, **kwargs: open(path, 'w').close())):
                stack.enter_context(mock.patch.object(owner, name, instead))
            stack.enter_context(mock.patch.dict(os.environ, HF_HUB_OFFLINE='1', HOME=folder))
            yield
    finally:
        os.chdir(old)


def outcome(command, argv):
    """Runs a command as its script would -> exit code; anything else that it raises is raised here."""
    main, Keys, methods, _ = COMMANDS[command]
    with mock.patch.object(sys, 'argv', [command, *argv]):
        try:
            run(main, Keys, methods)
        except SystemExit as e:
            return e.code if isinstance(e.code, int) else print(e.code, file=sys.stderr) or 1
        finally:
            plot.plt.close('all')
    return 0


def call(command, argv):
    """-> exit code, stdout, stderr, of a command that must not hang."""
    def on_alarm(*args):
        raise AssertionError('it hangs')
    old_handler = signal.signal(signal.SIGALRM, on_alarm)
    signal.alarm(HANG)
    try:
        with (tempfile.TemporaryFile('w+') as out, tempfile.TemporaryFile('w+') as err,
              contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)):
            code = outcome(command, argv)
            return code, *(stream.seek(0) or stream.read() for stream in (out, err))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old_handler)


def check(code, err, damaged=None):
    """What holds after every command."""
    lines = [line for line in err.splitlines() if line.startswith('error: ')]
    not_finite = code == 1 and 'not finite' in err
    assert 'Traceback' not in err and (not_finite or (code, len(lines)) in ((0, 0), (2, 1))), (code, err)
    left = [path for path in paths('.') if path.endswith(('.tmp', '/lock'))]
    assert not left, left
    for path in paths('out'):
        if path.endswith('ckpt.pt') and path != damaged and os.path.getmtime(path) > BUILT:
            checkpoint.load(path)


# ------------------------------------------------------------------------------------------------------------
# the world that they are used in, and what an undisturbed command makes of it

def build():
    """Fills the current folder: a text, a prepared set, runs of every method, results of every kind."""
    rng = random.Random(0)
    with open('text.txt', 'w') as f:
        f.write('\n\n\n'.join(''.join(rng.choices(CHARS, k=60)) for _ in range(30)))
    with open('config.py', 'w') as f:
        f.write('out_dir = "out/run"\n')
        for key, _, value in (arg[2:].partition('=') for arg in TRAIN):
            f.write(f'{key} = {value if value[0].isdigit() else repr(value)}\n')
    must('prepare', *TEXT, '--name=set')
    must('train', *TRAIN, '--out_dir=out/run', '--max_iters=4')
    with open('data/set/meta.json') as f:
        meta = json.load(f)
    of_set = dict(dataset='data/set', tokenizer=meta['tokenizer'], vocab_size=meta['vocab_size'], wrap=False,
                  dtype='float32', seed=0)
    for name in TINY_METHODS:
        make(name, f'out/{name}', **of_set)
    make('mdlm', 'out/saw', dataset='sawtooth', vocab_size=2, block_size=128, hidden=8, num_heads=1,
         dtype='float32', seed=0)
    must('encode', *ENCODE)
    must('sweep', 'out/run', *FEW, '--teacher=out/ar', '--results=results.jsonl')
    for argv in COMMANDS['eval'][3]:
        must('eval', *argv)
    must('sawtooth', 'out/saw', '--num_samples=8', '--steps=1,2')
    shutil.copy('out/saw/sawtooth.jsonl', 'sawtooth.jsonl')


def must(command, *argv):
    code, out, err = call(command, argv)
    assert code == 0, err
    return out


def records(folder):
    """log.jsonl without its speeds."""
    with open(f'{folder}/log.jsonl') as f:
        return [{k: v for k, v in json.loads(line).items() if k != 'tokens_per_s'} for line in f]


def sums(folder):
    """A checksum of each of a run's tensors."""
    return {name: zlib.crc32(tensor.numpy().tobytes()) for name, tensor in weights(folder).items()}


def contents(folder):
    return {os.path.relpath(path, folder): open(path, 'rb').read() for path in paths(folder)}


# ------------------------------------------------------------------------------------------------------------
# three kinds of cases, each a function of a random generator

def arguments(rng):
    """One to three arguments are odd."""
    command = rng.choice([*COMMANDS])
    _, Keys, methods, ways = COMMANDS[command]
    argv = list(rng.choice(ways))
    keys = defaults_of(Keys) if Keys else dict(PREPARE)
    for name in methods or ():
        keys |= method_keys(methods[name]) if f'--method={name}' in argv or name == 'mdlm' else {}
    for _ in range(rng.randrange(1, 4)):
        key = rng.choice([k for k in keys if k not in NEVER])
        kind = type(keys[key]) if rng.random() < 0.9 else rng.choice([*VALUES])
        value = rng.choice(VALUES[kind] + HUGE * (kind is not str and key not in WORK))
        argv.append(rng.choice([f'--{key}={value}'] * 18 + [f'--{key}', value, f'{key}={value}']))
        if rng.random() < 0.1:
            argv.pop(rng.randrange(len(argv)))
    print(command, [a[:60] for a in argv])
    code, _, err = call(command, argv)
    check(code, err)


def damage(rng):
    """A file is cut, changed, replaced, or gone."""
    command = rng.choice([*COMMANDS])
    argv = rng.choice(COMMANDS[command][3])
    words = [arg.rpartition('=')[2] for arg in argv if '/' in arg or '.' in arg]
    read = sorted(path[2:] for path in paths('.') if path[2:].startswith(tuple(words)) and '.png' not in path)
    path = rng.choice(read)
    other = rng.choice(sorted(paths('.')))
    action = rng.choice(['cut', 'flip', 'bytes', 'other', 'empty', 'gone', 'folder', 'rubbish', 'tree',
                         'tree'])
    with open(path, 'rb') as f:
        data = bytearray(f.read())
    if action == 'cut':
        data = data[:rng.randrange(len(data))]
    elif action == 'flip':
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif action == 'bytes':
        at = rng.randrange(len(data))
        data[at:at + rng.randrange(1, 3000)] = b'' if rng.random() < 0.5 else rng.randbytes(9)
    elif action == 'other':
        with open(other, 'rb') as f:
            data = f.read()
    elif action == 'rubbish':
        data = rng.choice([b'\xff\xfe', b'\0' * 999, b'[]\n', b'null\n', b'{}\n', b'\xef\xbb\xbf', b'\n',
                           b'PK\x03\x04', b'[' * 99999 + b'\n'])
    elif action == 'tree':
        data = mutated_file(path, data, rng)
    os.remove(path)
    if action == 'folder':
        os.mkdir(path)
    elif action != 'gone':
        with open(path, 'wb') as f:
            f.write(b'' if action == 'empty' else data)
    print(action, path, command, argv)
    code, _, err = call(command, argv)
    check(code, err, damaged=path)
    of_run = path in ('out/run/ckpt.pt', 'out/run/log.jsonl')
    if code == 0 and argv == COMMANDS['train'][3][0] and of_run and action != 'tree':  # which may be sound
        assert sums('out/run') == UNDISTURBED[0][1]


def mutated_file(path, data, rng):
    """A file of JSON or of torch, with something odd somewhere in its tree."""
    if path.endswith('.json'):
        return json.dumps(mutated(json.loads(data), rng)).encode()
    if path.endswith('.jsonl'):
        lines = data.decode().splitlines()
        i = rng.randrange(len(lines))
        lines[i] = json.dumps(mutated(json.loads(lines[i]), rng))
        return '\n'.join(lines).encode() + b'\n'
    if path.endswith('.pt'):
        out = io.BytesIO()
        torch.save(mutated(torch.load(io.BytesIO(data), weights_only=True), rng), out)
        return out.getvalue()
    return data


def entropies():
    with open('out/run/eval.jsonl') as f:
        return [json.loads(line).get('entropy_sample') for line in f][-3:]


# command, arguments -> what it writes, as far as it is a function of those
INTERRUPTED = [
    ('train', [*TRAIN, '--out_dir=out/run'], lambda: (records('out/run'), sums('out/run'))),
    ('train', [*TRAIN, '--out_dir=out/new'], lambda: (records('out/new'), sums('out/new'))),
    ('train', [*TRAIN, '--out_dir=out/new', *LADD, '--stage1_iters=4'],
     lambda: (records('out/new'), sums('out/new'))),
    ('sample', ['--out_dir=out/run', *FEW, '--save=x.jsonl'], lambda: open('x.jsonl').read()),
    ('prepare', [*TEXT, '--name=new'], lambda: contents('data/new')),
    ('encode', ENCODE, lambda: contents('data/set')),
    ('eval', ['--out_dir=out/run', '--device=cpu', '--metrics=entropy', '--steps=1,2,4'], entropies)]
UNDISTURBED = []  # the results of these


def signals(rng):
    """A command is signalled at a random moment, whatever its output is; then it is called again."""
    i = rng.choice([0, 0, 1, 1, 2, 3, 4, 5, 6])
    command, argv, result = INTERRUPTED[i]
    if command == 'encode':
        shutil.rmtree('data/set/latents_ar_12_2x4')
    output = rng.choice(['terminal', 'pipe', 'file', 'closed', 'full'])
    kinds = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL]
    sent = rng.choices(kinds, k=rng.randrange(3))
    delays = [rng.random() ** 2 * 0.6 for _ in sent]
    print(command, argv, output, [s.name for s in sent], delays)
    code, said = in_a_child(command, argv, output, list(zip(sent, delays)))
    assert not said, said
    # an output that is full or gone; a second signal within torch's writing of a file, which reports an error
    lost = {2} if output in ('full', 'terminal') or len(sent) > 1 else set()
    assert code in {0, 130, *(128 + s for s in sent), *(-s for s in sent)} | lost, code
    if code >= 0:
        check(0, '')
    must(command, *argv)
    assert result() == UNDISTURBED[i]
    check(0, '')


def in_a_child(command, argv, output, signals_and_delays):
    """Runs a command in a forked process, and sends it signals -> its exit code, its traceback if any."""
    ours, theirs = {'terminal': os.openpty, 'pipe': os.pipe, 'closed': lambda: (None, None),
                    'file': lambda: (None, os.open('output', os.O_CREAT | os.O_WRONLY)),
                    'full': lambda: (None, os.open('/dev/full', os.O_WRONLY))}[output]()
    read_said, write_said = os.pipe()
    child = os.fork()
    if not child:
        behave(command, argv, ours, theirs, write_said)
    os.close(write_said)
    if theirs:
        os.close(theirs)
    os.read(read_said, 1)  # now it begins
    for signum, delay in signals_and_delays:
        time.sleep(delay)
        if ours and delay < 0.2:
            os.close(ours)  # whoever has read it is gone
            ours = None
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signum)
    code = wait(child, ours)
    if ours:
        os.close(ours)
    with open(read_said) as f:
        return code, f.read()


def behave(command, argv, ours, theirs, write_said):
    """The life of a forked process: a script whose output goes to `theirs`, or is closed."""
    code = 99
    try:
        if ours:
            os.close(ours)
        for fd, name in ((1, 'stdout'), (2, 'stderr')):
            os.dup2(theirs, fd) if theirs else os.close(fd)
            setattr(sys, name, open(fd, 'w', closefd=False) if theirs else None)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.write(write_said, b'!')
        code = outcome(command, argv)
        if sys.stdout:
            sys.stdout.flush()
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        os.write(write_said, traceback.format_exc().encode())
    finally:
        os._exit(code)


def wait(child, ours):
    """-> the exit code of a process, whose output is read meanwhile."""
    if ours:
        os.set_blocking(ours, False)
    for _ in range(HANG * 100):
        with contextlib.suppress(OSError):
            while ours and os.read(ours, 1 << 16):
                pass
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    raise AssertionError('it hangs')


# ------------------------------------------------------------------------------------------------------------

KINDS = [arguments, damage, signals]


def in_worlds(folder, cases):
    """Runs cases, pairs of a kind and a seed, each in its own copy of the world -> {case: its failure}."""
    failures, world = {}, os.path.join(folder, 'world')
    os.mkdir(world)
    with sandbox(world):
        build()
    for path in paths(world):
        os.utime(path, (BUILT, BUILT))
    for command, argv, result in INTERRUPTED:
        shutil.copytree(world, folder + '/case')
        with sandbox(folder + '/case'):
            must(command, *argv)
            UNDISTURBED.append(result())
        shutil.rmtree(folder + '/case')
    for kind, seed in cases:
        case = os.path.join(folder, 'case')
        shutil.copytree(world, case)
        said = io.StringIO()
        try:
            with sandbox(case), contextlib.redirect_stdout(said):
                kind(random.Random(seed))
        except Exception:
            failures[f'{kind.__name__} {seed}'] = said.getvalue() + traceback.format_exc()
            if __name__ == '__main__':
                print(kind.__name__, seed, said.getvalue(), traceback.format_exc(), flush=True)
        shutil.rmtree(case)
        if __name__ == '__main__' and seed % 100 == 0:
            print(f'up to seed {seed}: {len(failures)} failed', flush=True)
    return failures


def test_random_use(tmp_path):
    cases = [(kind, seed) for kind, n in ((arguments, 25), (damage, 25), (signals, 5)) for seed in range(n)]
    failures = in_worlds(str(tmp_path), cases)
    assert not failures, '\n'.join(f'{case}: {text}' for case, text in failures.items())


if __name__ == '__main__':
    torch.set_num_threads(1)
    n, start = int(sys.argv[1]), int((sys.argv[2:] or ['0'])[0])
    kinds = [k for k in KINDS if k.__name__ in sys.argv[3:] or not sys.argv[3:]]
    kinds = [k for k in kinds for _ in range(1 if k is signals else 3)]
    with tempfile.TemporaryDirectory() as folder:
        failures = in_worlds(os.path.realpath(folder), [(kinds[i % len(kinds)], start + i) for i in range(n)])
    print(f'{n} cases from seed {start} on, {len(failures)} failed')
    sys.exit(bool(failures))
