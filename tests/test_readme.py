"""README.md holds what it says: every command runs (long ones cut short), every quoted line is in its file, every path (of RESULTS.md, too) and config exists.

The commands run in the order of the README, in a copy of the tree, since most need what an earlier one has made: in one process, by
this file as a script, except for torchrun. What shortens them is below, and a command for which nothing is said here fails.
"""
import contextlib
import glob
import importlib
import inspect
import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import traceback

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
def read(name):
    with open(os.path.join(ROOT, name), encoding='utf-8') as f:
        return f.read()


README, RESULTS = read('README.md'), read('RESULTS.md')

COMMAND = re.compile(r'^ {4,}((?:python|torchrun) .*)$', re.MULTILINE)
BLOCKS = re.findall(r'^```python\n(.*?)^```$', README, re.MULTILINE | re.DOTALL)
EXAMPLE = next(block for block in BLOCKS if 'class MaskGIT' in block)  # the reader's own file, maskgit.py
LINE = next(block for block in BLOCKS if block.startswith('METHODS'))  # and its line in configurator.py
SKIPPED = {'python -m pytest': 'runs this test',
           'python sample.py --init_from=kuleshov-group/mdlm-owt': 'downloads weights; tests/test_hub.py loads such weights from a folder'}

# ----------------------------------------------------------------------------------------------------------------------------------
# cutting short

TEXT = '\n\n\n'.join('ROMEO: Juliet, to be or not to be\n' * 12 for _ in range(12))  # documents
MODELS = 'sentence-transformers/all-MiniLM-L6-v2', 'Qwen/Qwen3-Embedding-0.6B'  # hub ids; a tiny random BERT takes their place
L, WIDTH = 64, 16  # the longest prompt of the README has 54 characters
TINY = [f'--hidden={WIDTH}', '--num_layers=2', '--num_heads=2', '--cond_dim=8', '--batch_size=4', '--eval_seqs=4', '--log_interval=1', '--compile=False', '--device=cpu']
TINY_OF = {'mdlm': [], 'ar': [], 'maskgit': [],
           'ladd': ['--num_latents=4', '--latent_dim=8', '--codebook_size=7'],
           'ldlm': [f'--latent_dim={WIDTH}', '--latent_layers=1', '--decoder_layers=1', '--adaptive_bins=4', '--adaptive_every=1']}


def fewer(argv, key, most):
    """--key=value with a smaller value; numbers with commas, each."""
    return [f'--{key}=' + ','.join(dict.fromkeys(str(min(int(v), most)) for v in a.partition('=')[2].split(','))) if a.startswith(f'--{key}=') else a
            for a in argv]


def shorten_train(argv, script='train', more=2):
    """Arguments of train.py (or of a script with its keys) -> a tiny network, `more` further steps, no download."""
    from lib import checkpoint
    from lib.configurator import configure
    c = configure(importlib.import_module(script).defaults, argv)  # the command as it stands: its keys are known
    path = os.path.join(c['out_dir'], 'ckpt.pt')
    done = checkpoint.load(path)['step'] if os.path.exists(path) else 0
    argv = [*argv, *TINY, *TINY_OF[c['method']], f'--max_iters={done + more}', '--micro_batch=2']
    if c['dataset'] != 'sawtooth':
        argv.append(f'--block_size={L}')
    if c['method'] == 'ladd' and c['latent'] == 'discrete':
        argv += ['--stage1_iters=1', '--vq_start=0']
    elif c['method'] == 'ladd' and c['stage1_iters']:
        argv.append('--stage1_iters=1')
    return [*argv, *(f'--{key}={os.path.abspath("model")}' for key in ('encoder', 'token_encoder') if c.get(key) in (*MODELS, 'gpt2'))]


def shorten(script, argv):
    """Arguments of a README's command -> arguments with which it takes a moment. LookupError: nobody has said how."""
    if script == 'train.py':
        return shorten_train(argv)
    if script == 'data/encode.py':
        return [a for a in shorten_train(argv) if not a.startswith('--micro_batch')]
    if script.endswith('/prepare.py'):
        argv = [f'--tokenizer={os.path.abspath("model")}' if a.partition('=')[2] in MODELS else a for a in argv]
        argv = ['--tokenizer=char' if a == '--tokenizer=gpt2' else a for a in argv]  # GPT-2's merges are a download
        argv = [os.path.abspath('text.txt') if a.rstrip('.') == 'FILE' else a for a in argv]
        return [*argv, '--workers=1', *(['--input', os.path.abspath('text.txt')] if '--input' not in argv else []),
                *(['--val_documents=2'] if 'openwebtext' in script else [])]
    if script == 'sample.py':
        return [*fewer(fewer(argv, 'steps', 3), 'latent_steps', 2), '--num_samples=1', '--device=cpu']
    if script in ('eval.py', 'frontier.py'):
        return [*fewer(fewer(argv, 'steps', 2), 'latent_steps', 2), '--num_samples=2', '--device=cpu', *(['--val_seqs=4'] if script == 'eval.py' else [])]
    if script == 'sawtooth.py':
        return [*(name for a in argv for name in sorted(glob.glob(a)) or [a]), '--num_samples=32', '--steps=1,2']
    if script == 'plot.py':
        return argv
    if script == 'bench.py':
        return [*shorten_train(argv, 'bench'), '--vocab_size=8', f'--block_size={L}', '--iters=1', '--steps=2', '--num_samples=1']
    raise LookupError(f'tests/test_readme.py does not know how to shorten {script}')


def launch(argv):
    """torchrun, on this machine: two processes of a launcher, or two launchers (nodes) of one process each."""
    two = '--nnodes=2' in argv
    with socket.socket() as s:
        s.bind(('localhost', 0))
        port = s.getsockname()[1]
    at = argv.index('train.py')
    flags = [f'--nproc_per_node={1 if two else 2}' if a.startswith('--nproc_per_node') else
             f'--rdzv_endpoint=localhost:{port}' if a.startswith('--rdzv_endpoint') else a for a in argv[:at]]
    command = [sys.executable, '-m', 'torch.distributed.run', *flags, '--monitor-interval=0.1', 'train.py', *shorten_train(argv[at + 1:]),
               '--encoder=', '--stage1_iters=1']  # a learned encoder: four processes need not import transformers
    if two:
        command[3:3] = ['--local-addr=localhost']
    nodes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(1 + two)]
    outputs = [node.communicate(timeout=300)[0] for node in nodes]
    if any(node.returncode for node in nodes):
        raise RuntimeError('\n'.join(outputs)[-3000:])
    if '2 x cpu' not in ''.join(outputs):
        raise RuntimeError('the processes did not find each other:\n' + '\n'.join(outputs)[-3000:])


# ----------------------------------------------------------------------------------------------------------------------------------
# the commands, in a copy

def make_model(folder):
    """A tiny random BERT of width WIDTH with a tokenizer of words, in the format of the hub."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    words = ['[UNK]', '[CLS]', '[SEP]', *dict.fromkeys(TEXT.split())]
    tok = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token='[UNK]'))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok.post_processor = processors.TemplateProcessing(single='[CLS] $A [SEP]', special_tokens=[('[CLS]', 1), ('[SEP]', 2)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=tok, unk_token='[UNK]', cls_token='[CLS]', sep_token='[SEP]').save_pretrained(folder)
    transformers.BertModel(transformers.BertConfig(vocab_size=len(words), hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24,
                                                   max_position_embeddings=80)).save_pretrained(folder)


def with_few_texts(function):
    """The same function with its argument n at most 64."""
    def inner(*args, **kwargs):
        bound = inspect.signature(function).bind(*args, **kwargs)
        bound.apply_defaults()
        bound.arguments['n'] = min(bound.arguments['n'], 64)
        return function(*bound.args, **bound.kwargs)
    return inner


def measure_here(argv, variant):
    """What bench.py measures in a process of its own; nothing for the full head, which replaces functions for good."""
    import bench
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        if variant == 'eager':
            bench.main([*argv, '--variant=eager'])
    return json.loads(out.getvalue() or '{}')


def run_all(copy):
    """Prints one JSON line per command: {command, short, error}."""
    import torch
    torch.set_num_threads(1)
    os.chdir(copy)
    sys.path[0] = copy
    make_model('model')
    import sawtooth  # its report at the end of training is fixed at 4,096 texts
    for name in ('token_losses', 'draw', 'exact_draw', 'exact_records', 'bayes_gap'):
        setattr(sawtooth, name, with_few_texts(getattr(sawtooth, name)))
    import bench
    bench.peak_flops = lambda device, dtype: (1e12, 'not measured')
    bench.in_its_own_process = measure_here  # tests/test_bench.py starts the processes

    for line in COMMAND.findall(README):
        argv, out, error, clock = shlex.split(line, comments=True), io.StringIO(), None, time.perf_counter()
        if any(' '.join(argv).startswith(start) for start in SKIPPED):
            continue
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                if argv[0] == 'torchrun':
                    launch(argv[1:])
                else:
                    short = shorten(argv[1], argv[2:])
                    importlib.import_module(argv[1][:-3].replace('/', '.')).main(short)
                    if argv[1] == 'sample.py' and '--- sample 1\n' not in out.getvalue():
                        error = 'no sample: ' + out.getvalue()
        except BaseException:
            error = out.getvalue()[-500:] + traceback.format_exc()
        print(json.dumps({'command': line, 'error': error, 'seconds': time.perf_counter() - clock}), flush=True)


def test_every_command_runs(tmp_path):
    copy = tmp_path / 'nanoladd'
    for path in [*glob.glob('*.py', root_dir=ROOT), *glob.glob('config/*.py', root_dir=ROOT), *glob.glob('data/**/*.py', root_dir=ROOT, recursive=True),
                 'assets/paper_ladd.json']:
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(os.path.join(ROOT, path), copy / path)
    (copy / 'text.txt').write_text(TEXT)
    (copy / 'maskgit.py').write_text(EXAMPLE)
    source = (copy / 'configurator.py').read_text()
    old = next(line for line in source.splitlines(True) if line.startswith('METHODS = '))
    assert LINE.replace(", 'maskgit': 'MaskGIT'", '') == old  # just one name more
    (copy / 'configurator.py').write_text(source.replace(old, LINE))

    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1', 'PYTHONDONTWRITEBYTECODE': '1'}
    r = subprocess.run([sys.executable, os.path.abspath(__file__), str(copy)], capture_output=True, text=True, env=env)
    assert r.returncode == 0, r.stderr[-3000:]
    print(r.stdout)  # what took how long, for pytest -s
    results = [json.loads(line) for line in r.stdout.splitlines() if line.startswith('{"command"')]
    assert not [x for x in results if x['error']], '\n\n'.join(f'{x["command"]}\n{x["error"]}' for x in results if x['error'])
    skipped = [line for line in COMMAND.findall(README) if any(line.startswith(start) for start in SKIPPED)]
    assert len(results) + len(skipped) == len(COMMAND.findall(README)) and len(skipped) == len(SKIPPED)

    # paths that README and RESULTS name: there from the beginning, or made by its commands
    for name in ('README.md', 'RESULTS.md'):
        shutil.copy(os.path.join(ROOT, name), copy)
    for path in mentioned_paths():
        assert any(glob.glob(path, root_dir=folder) for folder in (ROOT, copy)), f'{path} is mentioned, and not there'


def mentioned_paths():
    """Everything that looks like a relative path in README and RESULTS, except for names that stand for others (NAME, OTHER ...) and seeds that one may add."""
    words = re.findall(r'(?<![\w./-])(?:[\w-]+/)*[\w-]+\.(?:py|md|png|jsonl|json|txt)\b|(?<![\w./-])(?:data|config|assets|tests|out)/[\w./*-]*', README + RESULTS)
    return sorted({w.rstrip('.') for w in words if not re.search('[A-Z]{4}|_seed1', w) or w in ('README.md', 'RESULTS.md')})


# ----------------------------------------------------------------------------------------------------------------------------------
# what can be read off

def test_configs():
    named, there = set(re.findall(r'config/\w+\.py', README)) - {'config/NAME.py'}, set(glob.glob('config/*.py', root_dir=ROOT))
    assert named == there


def test_quoted_code_is_in_its_file():
    """A comment in the first lines of a block, or of a part of it, names the file; the lines stand there as they are, in this order."""
    for block in BLOCKS:
        if block in (EXAMPLE, LINE):
            continue
        source = None
        for line in block.splitlines():
            if line.startswith('#'):
                name = re.search(r'(\w+\.py)', line)
                if name:
                    with open(os.path.join(ROOT, name[1]), encoding='utf-8') as f:
                        source = iter([part.partition('  #')[0].strip() for part in f])
            elif line.strip():
                assert line.strip() in source, f'{line.strip()!r} is not in {name} (any more), or comes earlier'


def test_the_example_is_short():
    assert len(EXAMPLE.splitlines()) <= 60


def test_keys_exist():
    """--key anywhere in README or RESULTS is a key of some script."""
    sys.path.insert(0, ROOT)
    from lib.configurator import METHODS, method_fields
    modules = [importlib.import_module(name) for name in ('train', 'sample', 'eval', 'bench', 'frontier', 'sawtooth')]
    known = {key for module in modules for key in module.defaults} | {key for name in METHODS for key in method_fields(name)}
    prepare = {'input', 'tokenizer', 'name', 'split', 'set'}
    torchrun = {'standalone', 'nnodes', 'nproc_per_node', 'max-restarts', 'rdzv_backend', 'rdzv_endpoint'}
    assert set(re.findall(r'--([a-z][\w-]*)', README + RESULTS)) - known - prepare - torchrun == {'key', 'slow', 'help'}


def test_what_a_fresh_install_looks_for():
    """.ci/run installs and tests by these two lines."""
    assert README.count('\n    pip install -r requirements.txt\n') == README.count('\n    python -m pytest\n') == 1


if __name__ == '__main__':
    run_all(sys.argv[1])
