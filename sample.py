"""
Samples from a checkpoint of any method, with or without a prompt.

    python sample.py --out_dir=out/NAME --num_samples=16 --steps=32
    python sample.py --out_dir=out/NAME --show --start="ROMEO: [MASK:40] Juliet!"      fills the gap, then goes on after "Juliet!"
    python sample.py --out_dir=out/NAME --save=samples.npy                             int array (num_samples, L); .jsonl: ids and text

A sample is what the method was trained on: a chunk of L tokens from documents joined by EOS. So what follows an EOS is the beginning
of another document; nothing is cut off, neither here nor in the metrics of eval.py.
"""
import inspect
import itertools
import json
import math
import os
import re
import shutil
import sys
import time
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import torch

from lib.checkpoint import backbones, compile_in_place, is_run, load_method, pick_device
from lib.configurator import UserError, configure, run
from lib.tokens import DATA, Char, load_tokenizer, read_meta

shared = dict(  # with eval.py
    out_dir='',                # a run of train.py ...
    init_from='',              # ... or HUB_ID, published weights
    strategy='',               # joint | seq; empty: the method's first
    latent_steps=8,            # of --strategy=seq: denoiser calls for the latent
    sampler='',                # ancestral | first_hitting (as many calls as tokens, whatever steps says) | remdm
    eta=1.0,                   # of --sampler=remdm: how much is masked again
    temperature=1.0,
    top_p=1.0,
    seed=0,
    batch_size=32,
    device='auto',             # auto | cpu | cuda | mps
    dtype='float32',           # of the matrix products: float32 | bfloat16; draws are in fp64
    compile=False,             # torch.compile the networks: for many samples, since it takes a minute
)
defaults = dict(
    num_samples=16,
    steps=32,                  # denoiser calls for the tokens
    start='',                  # prompt; [MASK:n] stands for n tokens to fill in, [MASK] for one
    show=False,                # draw the denoising of the first sample of each batch
    save='',                   # FILE.npy | FILE.jsonl
    **shared)


def read_arguments(defaults, argv):
    """configure -> namespace; UserError if a run is named by its config file, its checkpoint, as --init_from or without a key."""
    for arg in argv:
        key, _, name = arg.rpartition('=')
        folder = re.sub(r'^config/(.*)\.py$', r'out/\1', name).removesuffix('/ckpt.pt')
        if key == '--out_dir' and folder != name or key in ('', '--init_from') and is_run(folder):
            raise UserError(f'{arg}: a run is named by its folder, --out_dir={folder}')
    return SimpleNamespace(**configure(defaults, argv))


def open_model(c, device):
    """--out_dir or --init_from -> (method on device, its config with `step`, None for published weights)."""
    if bool(c.out_dir) == bool(c.init_from):
        raise UserError('name one model: --out_dir=out/NAME (a run of train.py) or --init_from=HUB_ID (published weights)')
    if c.init_from:
        from lib.hub import load_hub
        method, config = load_hub(c.init_from, device)
        config['step'] = None
    else:
        method, checkpoint = load_method(c.out_dir, device)
        config = {**checkpoint['config'], 'step': checkpoint['step']}
    if c.compile:
        compile_in_place(backbones(method), device)
    return method, config


def open_tokenizer(config):
    """The tokenizer of a model's training data; wrap says whether its texts are BOS ... EOS. Sawtooth's two tokens become a picture."""
    if config.get('dataset') == 'sawtooth':
        tok = Char('▁█', eos=False)
        tok.wrap = False
        return tok
    if 'tokenizer' not in config:
        folder = os.path.join(DATA, config['dataset'])
        config = read_meta(folder if os.path.isdir(folder) else config['dataset'])
    tok = load_tokenizer(config)
    tok.wrap = config['wrap']
    return tok


def sampling_options(c, method):
    """Flags -> keyword arguments of method.sample, all of them, so that a record of them repeats the samples. UserError for what is not there."""
    for good, message in [
            (c.num_samples >= 1 and c.batch_size >= 1 and c.latent_steps >= 1, 'num_samples, batch_size and latent_steps must be at least 1'),
            (c.temperature >= 0, f'temperature must not be negative, as {c.temperature} is'),
            (0 < c.top_p <= 1, f'top_p must be in (0, 1], not {c.top_p}'),
            (0 <= c.eta <= 1, f'eta must be in [0, 1], not {c.eta}'),
            (c.dtype in ('bfloat16', 'float32'), f'dtype is bfloat16 or float32, not {c.dtype!r}')]:
        if not good:
            raise UserError(message)
    name, takes, options = type(method).__name__, inspect.signature(method.sample).parameters, {}
    for key, known in (('strategy', method.strategies), ('sampler', method.samplers)):
        value = getattr(c, key) or known[0]
        if value not in known:
            raise UserError(f'{name} has no {key} {value!r}; it has: {", ".join(known)}')
        if key in takes:
            options[key] = value
    if options.get('strategy') == 'joint' and options.get('sampler') == 'first_hitting':
        raise UserError('first_hitting reveals one token per call, which gives the latent no steps: use it with --strategy=seq')
    for key, used, where in [('latent_steps', options.get('strategy') == 'seq', 'with --strategy=seq'),
                             ('eta', options.get('sampler') == 'remdm', 'with --sampler=remdm'),
                             ('temperature', 'temperature' in takes, f'not with {name}'), ('top_p', 'top_p' in takes, f'not with {name}')]:
        if used:
            options[key] = getattr(c, key)
        elif getattr(c, key) != shared[key]:
            raise UserError(f'--{key} works {where}')
    return options


def read_prompt(start, tok, L, method):
    """'...[MASK:40]...' -> ids (L,) in which [mask] marks what is to be filled in."""
    if 'x' not in inspect.signature(method.sample).parameters:
        raise UserError(f'{type(method).__name__} takes no prompt')
    parts = re.split(r'\[MASK(?::(\d+))?\]', start)  # text, n or None, text, n or None, ..., text
    ids = [tok.bos_id] if tok.wrap else []
    for text, n in zip(parts[::2], parts[1::2] + ['0']):
        n = int(n or 1) if len(n or '') < 20 else L + 1
        ids += tok.encode(text) + [method.mask_id] * min(n, L + 1)
    if len(ids) > L:
        raise UserError(f'the prompt has more than the {L:,} tokens that the model can hold')
    if len(ids) == L and method.mask_id not in ids:
        raise UserError(f'the prompt has all {L:,} tokens that the model can hold: there is nothing left to write')
    return torch.tensor(ids + [method.mask_id] * (L - len(ids)))


def generate(method, n, steps, batch_size, seed, prompt=None, **options):
    """-> (n, L) ids on the CPU, a function of the seed and of how n falls into batches. options: see method.sample; prompt: (L,) ids."""
    device = next(method.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    batches = []
    for first in range(0, n, batch_size):
        b = min(batch_size, n - first)
        if prompt is not None:
            options['x'] = prompt.to(device).repeat(b, 1)
        batches.append(method.sample(b, steps, generator=generator, **options).cpu())
    return torch.cat(batches)


# ----------------------------------------------------------------------------------------------------------------------------------
# the denoising, live: [mask] is a dim block, a token just revealed is green

def styled(x, before, decode, mask_id):
    """Ids x (L,) and those of the step before -> [(ANSI style, character)]."""
    def style(l):
        return '\033[2m' if x[l] == mask_id else '\033[1;32m' if x[l] != before[l] else ''
    chars = []
    for s, run_of in itertools.groupby(range(len(x)), key=style):  # decoded in runs: a character may be more than one token
        ids = [x[l] for l in run_of]
        chars += [(s, char) for char in ('░' * len(ids) if ids[0] == mask_id else decode(ids))]
    return chars


def fit_screen(chars, columns, lines):
    """As much as a terminal of that size can hold."""
    column, line = 0, 1
    for i, (_, char) in enumerate(chars):
        if char == '\n' or column == columns:
            column, line = 0, line + 1
            if line > lines:
                return chars[:i]
        column += char != '\n'
    return chars


def show(decode, mask_id, out):
    """A callback for the samplers: redraws in place on a terminal; elsewhere prints after 1, 2, 4, 8, ... steps."""
    before, last = [], math.inf

    def callback(i, x):
        nonlocal before, last
        x = x[0].tolist()
        if i <= last:  # another batch begins
            before = [mask_id] * len(x)
        chars = styled(x, before, decode, mask_id)
        if out.isatty():
            size = shutil.get_terminal_size()
            drawn = fit_screen(chars, size.columns, size.lines - 2)
            runs = (style + ''.join(char for _, char in group) + '\033[0m' for style, group in itertools.groupby(drawn, key=lambda pair: pair[0]))
            out.write('\033[H\033[J' + ''.join(runs) + f'\n\033[2mstep {i + 1}\033[0m\n')
            out.flush()
            time.sleep(0.05)  # for the eye
        elif (i + 1) & i == 0:
            out.write(f'--- step {i + 1}\n' + ''.join(char for _, char in chars) + '\n')
        before, last = x, i
    return callback


# ----------------------------------------------------------------------------------------------------------------------------------

@contextmanager
def whole_file(path):
    """A file to write in binary that gets its name when the block ends well, and leaves nothing otherwise."""
    try:
        f = open(path + '.tmp', 'wb')
    except OSError as e:
        raise UserError(f'cannot write {path} ({e.strerror})') from e
    try:
        with f:
            yield f
        os.replace(path + '.tmp', path)
    except OSError as e:
        raise UserError(f'cannot write {path} ({e.strerror})') from e
    finally:
        if os.path.exists(path + '.tmp'):
            os.remove(path + '.tmp')


def main(argv):
    c = read_arguments(defaults, argv)
    if c.steps < 1:
        raise UserError(f'steps must be at least 1, not {c.steps}')
    if c.save and not c.save.endswith(('.npy', '.jsonl')):
        raise UserError(f'--save={c.save}: the name ends with .npy (ids) or .jsonl (ids and text)')
    if '--start=' in argv:
        raise UserError('--start is empty: give a prompt, or leave it out')
    device = pick_device(c.device)
    method, config = open_model(c, device)
    options = sampling_options(c, method)
    tok = open_tokenizer(config)
    prompt = read_prompt(c.start, tok, config['block_size'], method) if c.start else None
    if c.show:
        options['callback'] = show(tok.decode, getattr(method, 'mask_id', None), sys.stdout)

    with whole_file(c.save) if c.save else nullcontext() as f:
        with torch.autocast(device.type, torch.bfloat16, enabled=c.dtype == 'bfloat16'):
            try:
                x = generate(method, c.num_samples, c.steps, c.batch_size, c.seed, prompt, **options)
            except ValueError as e:
                if prompt is None:
                    raise
                raise UserError(e) from e  # a gap in the middle is not for AR
        texts = [tok.decode(ids) for ids in x.tolist()]
        if c.save.endswith('.npy'):
            np.save(f, x.numpy())
        elif c.save:
            f.writelines((json.dumps({'ids': ids, 'text': text}, ensure_ascii=False) + '\n').encode() for ids, text in zip(x.tolist(), texts))
    for i, text in enumerate(texts):
        print(f'--- sample {i + 1}\n{text}')
    if c.save:
        print(f'--- wrote {len(texts):,} texts to {c.save}')


if __name__ == '__main__':
    run(main)
