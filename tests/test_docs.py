"""The documents hold what they say.

Every command of README.md and TUTORIAL.md runs (long ones cut short), every answer in Python prints what it
says, every quoted line is in its file; every path, key and config that they or RESULTS.md name exists.

The commands run in the order of reading, in a copy of the tree, since most need what an earlier one has made:
in one process, by this file as a script, except for torchrun. What shortens them is below, and a command for
which nothing is said here fails.
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

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def read(name):
    with open(os.path.join(ROOT, name), encoding='utf-8') as f:
        return f.read()


def expanded(text):
    """config/text_{ar,mdlm}.py -> config/text_ar.py config/text_mdlm.py"""
    return re.sub(r'(config/\w*)\{([\w,]+)\}([\w.]*)',
                  lambda m: ' '.join(m[1] + middle + m[3] for middle in m[2].split(',')), text)


README, TUTORIAL, RESULTS = expanded(read('README.md')), read('TUTORIAL.md'), read('RESULTS.md')
EVERYTHING = README + TUTORIAL + RESULTS

# an indented line, perhaps continued by a backslash; `pip install ... && python ...` is its second half
COMMAND = re.compile(r'^ {4,}(?:pip install -r requirements.txt && )?((?:python|torchrun) (?:.*\\\n)*.*)$',
                     re.MULTILINE)
COMMANDS = list(dict.fromkeys(' '.join(line.replace('\\\n', ' ').split())
                              for line in COMMAND.findall(README + TUTORIAL)))
BLOCKS = re.findall(r'^ *```python\n(.*?)^ *```$', README + TUTORIAL, re.MULTILINE | re.DOTALL)
NAMED = next(block for block in BLOCKS if block.startswith('from examples.maskgit import MaskGIT\nMETHODS'))
SCRIPTS = [block for block in BLOCKS if re.match('(import|from|def) ', block) and block != NAMED]
OF_RUNS = [script for script in SCRIPTS if "'out/" in script]
ANSWERS = [script for script in SCRIPTS if script not in OF_RUNS]
QUOTES = [block for block in BLOCKS if block not in (NAMED, *SCRIPTS)]
SKIPPED = {'python -m pytest': 'runs this test',
           'python sample.py --init_from=kuleshov-group/mdlm-owt':
               'downloads weights; tests/test_hub.py loads such weights from a folder'}

# ------------------------------------------------------------------------------------------------------------
# cutting short

TEXT = '\n\n\n'.join('ROMEO: Juliet, to be or not to be\n' * 12 for _ in range(40))  # documents
# hub ids; a tiny random BERT takes their place
MODELS = 'sentence-transformers/all-MiniLM-L6-v2', 'Qwen/Qwen3-Embedding-0.6B'
L, WIDTH = 64, 16  # the longest prompt of the documents has 54 characters
TINY = dict(hidden=WIDTH, num_layers=2, num_heads=2, cond_dim=8, batch_size=4, eval_seqs=4, log_interval=1,
            compile=False, device='cpu', micro_batch=2)
TINY_OF = {'ladd': dict(num_latents=4, latent_dim=8, codebook_size=7, stage1_iters=1, vq_start=0),
           'ldlm': dict(latent_dim=WIDTH, latent_layers=1, decoder_layers=1, adaptive_bins=4,
                        adaptive_every=1)}


def fewer(argv, key, most):
    """--key=value with a smaller value; numbers with commas, each."""
    def short(arg):
        if not arg.startswith(f'--{key}='):
            return arg
        values = (str(min(int(v), most)) for v in arg.partition('=')[2].split(','))
        return f'--{key}=' + ','.join(dict.fromkeys(values))
    return [short(arg) for arg in argv]


def shorten_train(argv, script='train', more=2):
    """Arguments of train.py, or of a script with its keys -> a tiny network, `more` steps, no download."""
    from lib import checkpoint
    from lib.configurator import configure, idle
    from methods import METHODS
    c = configure(importlib.import_module(script).Config, argv, METHODS)  # as it stands, it is accepted
    path = os.path.join(c['out_dir'], 'ckpt.pt')
    done = checkpoint.load(path)['step'] if os.path.exists(path) else 0
    short = {**TINY, **TINY_OF.get(c['method'], {}), 'max_iters': done + more}
    if c['dataset'] != 'sawtooth':
        short['block_size'] = L
    if c['method'] == 'ladd' and not c['stage1_iters']:
        del short['stage1_iters']  # a frozen encoder, or what the command asks for
    short |= {key: os.path.abspath('model') for key in ('encoder', 'token_encoder')
              if c.get(key) in (*MODELS, 'gpt2')}
    no_effect = idle(METHODS[c['method']].Config, {**c, **short})
    return [*argv, *(f'--{key}={value}' for key, value in short.items() if key not in no_effect)]


def shorten(script, argv):
    """Arguments of a command -> arguments with which it takes a moment. LookupError: nobody has said how."""
    if script in ('train.py', 'data/encode.py'):
        return shorten_train(argv)
    if script.endswith('/prepare.py'):
        model, text = os.path.abspath('model'), os.path.abspath('text.txt')
        argv = [f'--tokenizer={model}' if a.partition('=')[2] in MODELS else a for a in argv]
        # GPT-2's merges are a download
        argv = ['--tokenizer=char' if a == '--tokenizer=gpt2' else a for a in argv]
        argv = [text if a.rstrip('.') == 'FILE' else a for a in argv]
        return [*argv, '--workers=1', *(['--input', text] if '--input' not in argv else []),
                *(['--val_documents=2'] if 'openwebtext' in script else [])]
    if script == 'sample.py':
        return [*fewer(fewer(argv, 'steps', 3), 'latent_steps', 2), '--num_samples=1', '--device=cpu']
    if script == 'eval.py':
        one_run = all(a.startswith('--') for a in argv)  # otherwise a sweep
        argv = fewer(fewer(argv, 'steps', 2), 'latent_steps', 2)
        return [*argv, '--num_samples=2', '--device=cpu', *(['--val_seqs=4'] if one_run else [])]
    if script == 'sawtooth.py':
        names = [name for a in argv for name in sorted(glob.glob(a)) or [a]]
        return [*names, '--num_samples=32', '--steps=1,2']
    if script == 'lib.plot':
        return argv
    if script == 'examples.figures':
        return [*argv, *['--steps=1', '--latent_steps=1'] * ('denoising' in argv)]
    if script == 'examples.calibration':
        return [*argv, '--num_samples=8']
    if script == 'examples.ldlm_errors':
        return [*argv, '--num_samples=2', '--steps=2']
    if script == 'examples.sweep':
        return [*shorten_train(argv), '--rates=1e-3']
    if script == 'bench.py':
        return [*shorten_train(argv, 'bench'), '--vocab_size=8', '--iters=1', '--steps=2', '--num_samples=1']
    raise LookupError(f'tests/test_docs.py does not know how to shorten {script}')


def launch(argv):
    """torchrun, on this machine: two processes of one launcher, or two launchers (nodes) of one each."""
    two = '--nnodes=2' in argv
    with socket.socket() as s:
        s.bind(('localhost', 0))
        port = s.getsockname()[1]
    at = argv.index('train.py')
    flags = [f'--nproc_per_node={1 if two else 2}' if a.startswith('--nproc_per_node') else
             f'--rdzv_endpoint=localhost:{port}' if a.startswith('--rdzv_endpoint') else a for a in argv[:at]]
    # a learned encoder: four processes need not import transformers
    command = [sys.executable, '-m', 'torch.distributed.run', *flags, '--monitor-interval=0.1', 'train.py',
               *shorten_train(argv[at + 1:]), '--encoder=', '--stage1_iters=1']
    if two:
        command[3:3] = ['--local-addr=localhost']
    nodes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
             for _ in range(1 + two)]
    outputs = [node.communicate(timeout=300)[0] for node in nodes]
    if any(node.returncode for node in nodes):
        raise RuntimeError('\n'.join(outputs)[-3000:])
    if '2 x cpu' not in ''.join(outputs):
        raise RuntimeError('the processes did not find each other:\n' + '\n'.join(outputs)[-3000:])


# ------------------------------------------------------------------------------------------------------------
# the commands, in a copy

def make_model(folder):
    """A tiny random BERT of width WIDTH with a tokenizer of words, in the format of the hub."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    words = ['[UNK]', '[CLS]', '[SEP]', *dict.fromkeys(TEXT.split())]
    tok = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token='[UNK]'))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok.post_processor = processors.TemplateProcessing(
        single='[CLS] $A [SEP]', special_tokens=[('[CLS]', 1), ('[SEP]', 2)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tok, unk_token='[UNK]', cls_token='[CLS]', sep_token='[SEP]').save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=80)
    transformers.BertModel(config).save_pretrained(folder)


def with_few_texts(function):
    """The same function with its argument n at most 64."""
    def inner(*args, **kwargs):
        bound = inspect.signature(function).bind(*args, **kwargs)
        bound.apply_defaults()
        bound.arguments['n'] = min(bound.arguments['n'], 64)
        return function(*bound.args, **bound.kwargs)
    return inner


def measure_here(argv, variant):
    """What bench.py measures in a process of its own.

    Nothing for the full head, which replaces functions for good.
    """
    import bench
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        if variant == 'eager':
            bench.main([*argv, '--variant=eager'])
    return json.loads(out.getvalue() or '{}')


def run_command(argv):
    """Runs a command, cut short; RuntimeError if a sample.py prints no sample."""
    if argv[0] == 'torchrun':
        return launch(argv[1:])
    script, argv = (argv[2], argv[3:]) if argv[1] == '-m' else (argv[1], argv[2:])
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        importlib.import_module(script.removesuffix('.py').replace('/', '.')).main(shorten(script, argv))
    print(out.getvalue())
    if script == 'sample.py' and '--- sample 1\n' not in out.getvalue() and '--save_hub=FOLDER' not in argv:
        raise RuntimeError('no sample')


def report(job, work, expected=None):
    """Prints a job's JSON line: {command, error, seconds}. expected: the lines that it has to print."""
    out, error, clock = io.StringIO(), None, time.perf_counter()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            work()
        if expected is not None and not alike(out.getvalue(), expected):
            error = f'printed\n{out.getvalue()}instead of\n{expected}'
    except BaseException:
        error = out.getvalue()[-500:] + traceback.format_exc()
    seconds = time.perf_counter() - clock
    print(json.dumps({'command': job, 'error': error, 'seconds': seconds}), flush=True)


def alike(printed, expected):
    """The same words, and the same numbers up to one unit of the last digit: machines round differently."""
    number = re.compile(r'\d+\.(\d+)')

    def same(a, b):
        x, y = number.fullmatch(a), number.fullmatch(b)
        near = x and y and len(x[1]) == len(y[1]) and abs(float(a) - float(b)) < 1.5 * 10.0**-len(x[1])
        return a == b or near
    printed, expected = printed.split(), expected.split()
    return len(printed) == len(expected) and all(map(same, printed, expected))


def enter(copy):
    import torch
    torch.set_num_threads(1)
    os.chdir(copy)
    sys.path[0] = copy


def run_all(copy):
    """Every command, then the scripts that need what they have made."""
    enter(copy)
    make_model('model')
    import sawtooth  # its report at the end of training is fixed at 4,096 texts
    for name in ('token_losses', 'draw', 'exact_draw', 'exact_records', 'gap_to_exact'):
        setattr(sawtooth, name, with_few_texts(getattr(sawtooth, name)))
    import bench
    bench.peak_flops = lambda device, dtype: (1e12, 'not measured')
    bench.in_its_own_process = measure_here  # tests/test_bench.py starts the processes
    for line in COMMANDS:
        if not line.startswith(tuple(SKIPPED)):
            report(line, lambda line=line: run_command(shlex.split(line, comments=True)))
    for script in OF_RUNS:
        report(script, lambda script=script: exec(script, {}))


def run_answers(copy):
    """The scripts that need no run: what their comments say, after `print(...)` or on lines of their own."""
    enter(copy)
    for script in ANSWERS:
        said = re.findall(r'^ *print\(.*\) *# (.*)$|^# (.*)$', script, re.MULTILINE)
        assert said, script
        report(script, lambda script=script: exec(script, {}), '\n'.join(a or b for a, b in said))


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    """A copy of the tree, which knows the method of examples/maskgit.py, as the tutorial shows."""
    copy = tmp_path_factory.mktemp('docs') / 'nanoladd'
    for pattern in ('*.py', 'lib/*.py', 'baselines/*.py', 'config/*.py', 'data/**/*.py', 'examples/*.py',
                    'assets/paper_ladd.json', 'assets/collapse.jsonl', 'assets/neighbours.jsonl',
                    'assets/sawtooth.jsonl', 'assets/shakespeare_char_latents.jsonl'):
        for path in glob.glob(pattern, root_dir=ROOT, recursive=True):
            (copy / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(os.path.join(ROOT, path), copy / path)
    (copy / 'text.txt').write_text(TEXT)
    source = (copy / 'methods.py').read_text()
    methods = re.search(r'^METHODS = {.*?}\n', source, re.MULTILINE | re.DOTALL)[0]
    wanted, line = NAMED.splitlines(True)
    (copy / 'methods.py').write_text(source.replace(methods, wanted + methods + line))
    return copy


def run_here(copy, what):
    """This file as a script in the copy -> its JSON lines."""
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1', 'PYTHONDONTWRITEBYTECODE': '1'}
    command = [sys.executable, os.path.abspath(__file__), what, str(copy)]
    r = subprocess.run(command, capture_output=True, text=True, env=env)
    assert r.returncode == 0, r.stderr[-3000:]
    print(r.stdout)  # what took how long, for pytest -s
    results = [json.loads(line) for line in r.stdout.splitlines() if line.startswith('{"command"')]
    failed = [f'{x["command"]}\n{x["error"]}' for x in results if x['error']]
    assert not failed, '\n\n'.join(failed)
    return results


def test_every_command_runs(copy):
    results = run_here(copy, 'commands')
    skipped = {start for line in COMMANDS for start in SKIPPED if line.startswith(start)}
    left_out = [line for line in COMMANDS if line.startswith(tuple(SKIPPED))]
    assert len(results) + len(left_out) == len(COMMANDS) + len(OF_RUNS)
    assert skipped == set(SKIPPED) and OF_RUNS

    # paths that the documents name: there from the beginning, or made by their commands
    for name in ('README.md', 'TUTORIAL.md', 'RESULTS.md', 'CONTRIBUTING.md'):
        shutil.copy(os.path.join(ROOT, name), copy)
    for path in mentioned_paths():
        there = any(glob.glob(path, root_dir=folder) for folder in (ROOT, copy))
        assert there, f'{path} is mentioned, and not there'


def mentioned_paths():
    """Everything that looks like a relative path.

    Except for names that stand for others (NAME, OTHER, A ...), and seeds that one may add.
    """
    words = re.findall(r'(?<![\w./-])(?:[\w-]+/)*[\w-]+\.(?:py|md|png|jsonl|json|txt|yml)\b'
                       r'|(?<![\w./-])(?:data|config|assets|tests|out|lib|baselines|examples)/[\w./*-]*',
                       EVERYTHING)
    documents = ('README.md', 'TUTORIAL.md', 'RESULTS.md', 'CONTRIBUTING.md')
    stands_for_others = re.compile(r'[A-Z]{4}|_seed1|out/[A-Z]+$')
    return sorted({w.rstrip('.') for w in words if w in documents or not stands_for_others.search(w)})


def test_every_answer_prints_what_it_says(copy):
    assert len(run_here(copy, 'answers')) == len(ANSWERS) > 0


# ------------------------------------------------------------------------------------------------------------
# what can be read off

def test_the_readme_is_a_page():
    """At most 230 lines of at most 110 columns."""
    lines = read('README.md').splitlines()
    assert len(lines) <= 230
    assert not [line for line in lines if len(line) > 110]


def test_configs():
    named = set(re.findall(r'config/\w+\.py', README)) - {'config/NAME.py'}
    assert named == set(glob.glob('config/*.py', root_dir=ROOT))


def lines_of(path):
    """Each line of a file as (the whole of it, what it is without its comment), without runs of spaces."""
    with open(os.path.join(ROOT, path), encoding='utf-8') as f:
        return iter([(' '.join(line.split()), line.partition('  #')[0].strip()) for line in f])


def test_quoted_code_is_in_its_file():
    """A comment says `file.py: Class.function`; the lines stand there as they are, in this order.

    `...` stands for some lines more.
    """
    for block in QUOTES:
        source = None
        for line in block.splitlines():
            if line.strip().startswith('#'):
                if place := re.search(r'([\w/]+\.py): ([\w.]+)$', line):
                    source = lines_of(place[1])
                    for name in place[2].split('.'):
                        assert any(re.match(rf'(class|def) {name}\b', code) for _, code in source), line
            elif line.strip() not in ('', '...'):
                assert source, f'where is this from?\n{block}'
                wanted = ' '.join(line.split())
                found = any(wanted == whole or line.strip() == code for whole, code in source)
                assert found, f'{line.strip()!r} is not in its file (any more), or comes earlier:\n{block}'


def test_every_chapter_of_mathematics_quotes_its_code():
    for chapter in re.split(r'^## ', TUTORIAL, flags=re.MULTILINE)[1:7]:
        assert any(block in chapter for block in QUOTES), chapter[:50]


def test_every_chapter_has_exercises_with_answers():
    for chapter in re.split(r'^## (?=\d)', TUTORIAL, flags=re.MULTILINE)[1:]:
        if chapter.startswith(('7.', '9.')):
            continue  # recipes
        exercises, _, answers = chapter.partition('<details>')
        assert '### Exercise' in exercises and answers, chapter[:50]
        wanted = set(re.findall(r'^(\d)\. ', exercises.partition('### Exercise')[2], re.MULTILINE))
        assert wanted <= set(re.findall(r'^(\d)\. ', answers, re.MULTILINE)), chapter[:50]


def test_links_lead_somewhere():
    """To chapters, to files, or to a paper with its number."""
    headings = re.findall(r'^#+ (.*)$', TUTORIAL, re.MULTILINE)
    anchors = {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}
    for target in re.findall(r'\]\(([^)]+)\)|^\[\w+\]: (.*)$', EVERYTHING, re.MULTILINE):
        target = ''.join(target)
        if target.startswith('#'):
            assert target[1:] in anchors, target
        elif target.startswith('http'):
            of_a_paper = re.fullmatch(r'https://arxiv\.org/abs/\d{4}\.\d{5}', target)
            assert of_a_paper or target == 'https://github.com/karpathy/nanoGPT', target
        else:
            assert os.path.exists(os.path.join(ROOT, target)), target


def test_the_example_is_short():
    assert len(read('examples/maskgit.py').splitlines()) <= 60


def test_keys_exist():
    """--key anywhere in the documents is a key of some script."""
    sys.path.insert(0, ROOT)
    from lib.configurator import defaults_of, method_keys
    from methods import METHODS
    named = ('train.Config', 'sample.Config', 'eval.Config', 'eval.Sweep', 'bench.Config', 'sawtooth.Config',
             'lib.plot.FrontierConfig')
    parts = [name.rpartition('.') for name in named]
    scripts = [getattr(importlib.import_module(module), Keys) for module, _, Keys in parts]
    known = {key for Keys in scripts for key in defaults_of(Keys)}
    known |= {key for Method in METHODS.values() for key in method_keys(Method)}
    prepare = {'input', 'tokenizer', 'name', 'split', 'set', 'wrap', 'out'}  # and data/text/bpe.py
    torchrun = {'standalone', 'nnodes', 'nproc_per_node', 'max-restarts', 'rdzv_backend', 'rdzv_endpoint'}
    used = set(re.findall(r'--([a-z][\w-]*)', EVERYTHING))
    assert used - known - prepare - torchrun == {'key', 'slow', 'help'}


def test_what_a_fresh_install_looks_for():
    """.ci/run installs and tests by what it finds in the README."""
    patterns = re.findall(r"grep -m1 -oE '(.*?)' README.md", read('.ci/run'))
    found = [re.search(pattern, README, re.MULTILINE)[0].strip() for pattern in patterns]
    assert found == ['pip install -r requirements.txt', 'python -m pytest']


if __name__ == '__main__':
    {'commands': run_all, 'answers': run_answers}[sys.argv[1]](sys.argv[2])
