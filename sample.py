"""
Samples from a checkpoint of any method, with or without a prompt.

    python sample.py --out_dir=out/NAME --num_samples=16 --steps=32
    python sample.py --out_dir=out/NAME --show --start="ROMEO: [MASK:40] Juliet!"  fills the gap, then goes on
    python sample.py --out_dir=out/NAME --save=samples.npy    an int array (num_samples, L); .jsonl: ids, text
    python sample.py --out_dir=out/NAME --save_hub=FOLDER     the run as model.safetensors and config.json,
                                                              which --init_from=FOLDER reads

A sample is what the method was trained on: a chunk of L tokens from documents joined by EOS. So what
follows an EOS is the beginning of another document; nothing is cut off, neither here nor in the metrics of
eval.py.
"""
import itertools
import json
import math
import os
import re
import shutil
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from lib.checkpoint import is_run
from lib.configurator import MOST_STEPS, Keys, UserError, configure, defaults_of, key, run
from lib.device import compile_in_place, pick_device
from lib.files import whole
from lib.hub import save_run
from lib.method import OF_TEXTS
from lib.noise import Noise
from lib.tokens import DATA, Char, load_tokenizer, read_meta
from methods import attach_encoder, open_published, open_run, with_copula
from train import open_data

LATENTS = ('generated', 'none', *OF_TEXTS)


@dataclass
class Machine(Keys):
    """Keys of everything that draws samples."""
    seed: int = 0
    batch_size: int = key(32, at_least=1)
    device: str = 'auto'           # auto | cpu | cuda | mps
    dtype: str = key('float32', choices=('float32', 'bfloat16'))  # of the matrix products; draws are in fp64
    compile: bool = False          # torch.compile the networks: for many samples, since it takes a minute


@dataclass
class Shared(Machine):
    """Keys that eval.py has, too."""
    out_dir: str = ''              # a run of train.py ...
    init_from: str = ''            # ... or a hub id or folder of published weights
    strategy: str = ''             # joint | seq; empty: the method's first
    latent_steps: int = 8          # of --strategy=seq: denoiser calls for the latent
    # controls: none, the same network without its latent (--strategy=seq) | data, the latents of validation
    # texts (--strategy=seq; of LDLM it is their reconstruction) | shuffled, those with each place from
    # another text (--strategy=seq)
    latent: str = key('generated', choices=LATENTS)
    encoder: str = ''              # where the run's frozen encoder lies, if training found it elsewhere
    copula: str = ''               # for an MDLM: out/NAME of an AR, and both draw a step's tokens together
    sampler: str = ''              # ancestral | first_hitting (one call a token, whatever steps says) | ...
    eta: float = 1.0               # of remdm, psi_cap, psi_rescale, psi_loop: how much is noised again
    kappa: float = 0.95            # of --sampler=psi: how much is not noised again
    tail: str = 'ancestral'        # of Duo: ancestral | greedy, its last step
    hint: str = 'soft'             # of CADD: soft | hard, what its hints move towards
    correction: float = 1.0        # of --copula: how much of MDLM's word counts
    verifications: int = 1         # of --sampler=speculative: passes of the causal block for a draft
    temperature: float = 1.0
    top_p: float = 1.0


# those of Shared that method.sample may take
OPTIONS = ('latent_steps', 'latent', 'eta', 'kappa', 'tail', 'hint', 'verifications', 'correction',
           'temperature', 'top_p')


@dataclass
class Config(Shared):
    num_samples: int = key(16, at_least=1)
    steps: int = key(32, at_least=1, at_most=MOST_STEPS)  # denoiser calls for the tokens
    start: str = key('', prose=True)  # prompt; [MASK:n] stands for n tokens to fill in, [MASK] for one
    show: bool = False             # draw the denoising of the first sample of each batch
    save: str = ''                 # FILE.npy | FILE.jsonl
    save_hub: str = ''             # FOLDER: write the run there, to share it on the hub, and draw nothing


# ------------------------------------------------------------------------------------------------------------
# opening a model

def read_arguments(Keys, argv):
    """-> the keys, as a namespace.

    UserError if a run is named by its config file, its checkpoint, or without a key.
    """
    for arg in argv:
        name, _, value = arg.rpartition('=')
        folder = re.sub(r'^config/(.*)\.py$', r'out/\1', value).removesuffix('/ckpt.pt')
        if name == '--out_dir' and folder != value or name in ('', '--init_from') and is_run(folder):
            raise UserError(f'{arg}: a run is named by its folder, --out_dir={folder}')
    return SimpleNamespace(**configure(Keys, argv))


def open_model(c, device):
    """--out_dir or --init_from -> (method on device, its config with `step`, None for published weights)."""
    if bool(c.out_dir) == bool(c.init_from):
        raise UserError('name one model: --out_dir=out/NAME (a run of train.py) or --init_from=HUB_ID '
                        '(published weights)')
    method, config = open_run(c.out_dir, device) if c.out_dir else open_published(c.init_from, device)
    if c.copula:
        method, config = with_copula(method, config, c.copula, device)
    if c.compile:
        compile_in_place(method.backbones(), device)
    return method, config


def open_tokenizer(config):
    """The tokenizer of a model's training data; wrap says whether its texts are BOS ... EOS.

    The two tokens of sawtooth become a picture.
    """
    if config.get('dataset') == 'sawtooth':
        tok = Char('▁█', eos=False)
        tok.spec, tok.wrap = None, False  # it is no text
        return tok
    if 'tokenizer' not in config:
        folder = os.path.join(DATA, config['dataset'])
        config = read_meta(folder if os.path.isdir(folder) else config['dataset'])
    tok = load_tokenizer(config['tokenizer'], config['vocab_size'])
    tok.wrap = config['wrap']
    return tok


def sampling_options(c, method):
    """Flags -> every option of method.sample, so that a record of them repeats the samples.

    A strategy or sampler is left out where the method has only one, and so is latent=generated, which older
    results do not mention. UserError for what it does not have.
    """
    defaults = defaults_of(Shared)
    given = {k: getattr(c, k) for k in OPTIONS if getattr(c, k) != defaults[k]}
    try:
        options = method.sampling_options(c.strategy, c.sampler, **given)
    except ValueError as e:
        raise UserError(e) from e
    if len(method.strategies) == 1:
        del options['strategy']
    if len(method.samplers) == 1:
        options.pop('sampler', None)
    if options.get('latent') == 'generated':
        del options['latent']
    return options


def read_prompt(start, tok, L, method):
    """'...[MASK:40]...' -> ids (L,) in which [mask] marks what is to be filled in."""
    if not method.takes_prompt:
        raise UserError(f'{method.name} takes no prompt')
    parts = re.split(r'\[MASK(?::(\d+))?\]', start)  # text, n or None, text, n or None, ..., text
    ids = [tok.bos_id] if tok.wrap else []
    for text, n in zip(parts[::2], parts[1::2] + ['0']):
        n = int(n or 1) if len(n or '') < 20 else L + 1
        ids += tok.encode(text) + [method.mask_id] * min(n, L + 1)
    if len(ids) > L:
        raise UserError(f'the prompt has more than the {L:,} tokens that the model can hold')
    if len(ids) == L and method.mask_id not in ids:
        raise UserError(f'the prompt has all {L:,} tokens that the model can hold: nothing is left to write')
    return torch.tensor(ids + [method.mask_id] * (L - len(ids)))


def generate(method, n, steps, batch_size, seed, prompt=None, z_0=None, **options):
    """-> (n, L) ids on the CPU, a function of the seed and of how n falls into batches.

    options: see method.sample; prompt: (L,) ids; z_0: n clean latents, of latent=data.
    """
    device = next(method.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    batches = []
    for first in range(0, n, batch_size):
        b = min(batch_size, n - first)
        if prompt is not None:
            options['x'] = prompt.to(device).repeat(b, 1)
        if z_0 is not None:
            options['z_0'] = z_0[first:first + b]
        batches.append(method.sample(b, steps, generator=generator, **options).cpu())
    return torch.cat(batches)


# ------------------------------------------------------------------------------------------------------------
# texts: rows(row numbers (b,)) -> ids (b, L), and n, how many there are

def open_texts(name, config, tok, device):
    """-> rows, n of a text file, or of a prepared set's validation texts; '': those of the training data."""
    name = name or config['dataset']
    if os.path.isfile(name):
        x = read_texts(name, tok, config['block_size']).to(device)
        return x.__getitem__, len(x)
    data = open_set(name, 'val', config, tok)
    return lambda idx: data.rows(idx)[0].to(device), 20480 if name == 'sawtooth' else len(data)


def open_set(name, split, config, tok):
    """A data source for a model. UserError unless it was prepared as the model's training data were."""
    data = open_data(name, split, config['block_size'])
    if (data.tokenizer, data.wrap) != (tok.spec, tok.wrap):
        raise UserError(f'{name} was not prepared as the training data of this model was; prepare it with '
                        f'--tokenizer=DATA, the folder of the training data, and --wrap={tok.wrap}, or give '
                        'a text file')
    if name == config['dataset'] and data.tokenizer and config.get('data_sha256', data.sha256) != data.sha256:
        others = ', or name other texts with --data' * (split == 'val')
        raise UserError(f'{name} was prepared again after this model was trained, which may have seen its '
                        f'validation texts; prepare it as it was{others}')
    return data


def read_texts(path, tok, L):
    """A UTF-8 text file, read as prepare.py reads it, as ids (n, L)."""
    try:
        with open(path, encoding='utf-8-sig') as f:  # with any line ends and any byte order mark
            ids = torch.tensor(tok.encode(f.read()))
    except UnicodeDecodeError as e:
        raise UserError(f'{path} is not UTF-8 ({e.reason})') from e
    body = L - 2 * tok.wrap
    if len(ids) < body:
        raise UserError(f'{path} has {len(ids):,} tokens, and one text of this model is {body:,}')
    x = ids[:len(ids) // body * body].view(-1, body)
    if tok.wrap:
        x = F.pad(x, (1, 1))
        x[:, 0], x[:, -1] = tok.bos_id, tok.eos_id
    return x


def attach(method, config, tok, device, place):
    """Hands a method the frozen encoder that it reads texts with. UserError unless it is that of training.

    place: where it lies; '': where the run says
    """
    hint = '' if place else f' (if {method.encoder_name} lies elsewhere now: --encoder=FOLDER)'
    method.encoder_name = place or method.encoder_name
    try:
        weights = attach_encoder(method, SimpleNamespace(**{**config, 'tokenizer': tok.spec}), device)
    except UserError as e:
        raise UserError(f'{e}{hint}') from e
    if config.get('encoder_weights') not in (None, weights):
        raise UserError(f'{method.encoder_name} has other weights than the encoder that this model was '
                        'trained with; put those back, or train it anew')


@torch.no_grad()
def latents_of_texts(method, rows, there_are, n, c):
    """Of the first n texts, what `generate` takes as z_0. UserError if there are fewer."""
    if n > there_are:
        raise UserError(f'latent={c.latent} takes a text for each sample, and there are {there_are:,}: '
                        f'--num_samples={there_are}')
    z_0 = torch.cat([method.latents_of(rows(idx)) for idx in torch.arange(n).split(c.batch_size)])
    return shuffled(z_0, c.seed) if c.latent == 'shuffled' else z_0


def shuffled(z_0, seed):
    """Latents (n, M, ...) of n texts, the M places each in an order of its own."""
    n, M = z_0.shape[:2]
    order = Noise(seed, 0, torch.arange(n), n).uniform('shuffled', M).argsort(dim=0)   # (n, M)
    return z_0[order, torch.arange(M)]


# ------------------------------------------------------------------------------------------------------------
# the denoising, live: [mask] is a dim block, a token just revealed is green

COLUMNS = 64  # a period of sawtooth
BARS = '▁▂▃▄▅▆▇█'


def styled(x, before, decode, mask_id):
    """Ids x (L,) and those of the step before -> [(ANSI style, character)]."""
    def style(l):
        return '\033[2m' if x[l] == mask_id else '\033[1;32m' if x[l] != before[l] else ''
    chars = []
    # decoded in runs, since a character may be several tokens
    for s, run_of in itertools.groupby(range(len(x)), key=style):
        ids = [x[l] for l in run_of]
        chars += [(s, char) for char in ('░' * len(ids) if ids[0] == mask_id else decode(ids))]
    return chars


def fit_screen(chars, columns, lines):
    """The same in at most `lines` lines of at most `columns` characters."""
    fitted, column, line = [], 0, 1
    for style, char in chars:
        if char == '\n' or column == columns:
            fitted, column, line = [*fitted, ('', '\n')], 0, line + 1
            if line > lines:
                return fitted[:-1]
        if char != '\n':
            fitted.append((style, char))
            column += 1
    return fitted


def draw_latent(z, mask_id):
    """A latent in a line: vectors (M, D) as bars, relative to the longest one; codes (M,) as numbers."""
    if mask_id is not None:
        return ' '.join('░' if code == mask_id else str(code) for code in z.tolist())[:COLUMNS]
    z = z.flatten()[:COLUMNS].float()
    heights = (1 + z / z.abs().max().clamp(min=1e-12)) / 2 * (len(BARS) - 1)
    return ''.join(BARS[h] for h in heights.round().int().tolist())


def show(decode, mask_id, latent_mask_id, out):
    """A callback for samplers: redraws on a terminal, elsewhere prints after 1, 2, 4, 8, ... steps.

    mask_id, latent_mask_id: [mask] among tokens, and among the codes of a latent; None if there is none.
    """
    before, first, last = [], 0, math.inf

    def callback(i, x, z):
        nonlocal before, first, last
        x = x[0].tolist()
        if i <= last:  # another batch begins
            before, first = [mask_id] * len(x), i
        step, kind = (i + 1, 'step') if i >= 0 else (i - first + 1, 'latent step')
        latent = '' if z is None else f'latent {draw_latent(z[0], latent_mask_id)}\n'
        chars = styled(x, before, decode, mask_id)
        if out.isatty():
            size = shutil.get_terminal_size()
            # whole periods of sawtooth in a line, where there is room for one
            drawn = fit_screen(chars, size.columns // COLUMNS * COLUMNS or size.columns, size.lines - 3)
            groups = itertools.groupby(drawn, key=lambda pair: pair[0])
            runs = (style + ''.join(char for _, char in group) + '\033[0m' for style, group in groups)
            out.write('\033[H\033[J' + ''.join(runs) + f'\n\033[2m{latent}{kind} {step}\033[0m\n')
            out.flush()
            time.sleep(0.05)  # for the eye
        elif step & (step - 1) == 0:
            text = ''.join(char for _, char in fit_screen(chars, COLUMNS, math.inf))
            out.write(f'--- {kind} {step}\n{latent}{text}\n')
        before, last = x, i
    return callback


# ------------------------------------------------------------------------------------------------------------

def main(argv):
    c = read_arguments(Config, argv)
    if c.save and not c.save.endswith(('.npy', '.jsonl')):
        raise UserError(f'--save={c.save}: the name ends with .npy (ids) or .jsonl (ids and text)')
    if c.copula and c.save_hub:
        raise UserError('--copula draws samples: there are no weights of its own for --save_hub')
    if '--start=' in argv:
        raise UserError('--start is empty: give a prompt, or leave it out')
    device = pick_device(c.device)
    method, config = open_model(c, device)
    if c.save_hub:
        save_run(c.save_hub, method, config)
        print(f'wrote {c.save_hub}; --init_from={c.save_hub} reads it, here and in train.py and eval.py')
        return
    options = sampling_options(c, method)
    tok = open_tokenizer(config)
    prompt = read_prompt(c.start, tok, config['block_size'], method) if c.start else None
    if c.show:
        options['callback'] = show(tok.decode, method.mask_id, method.latent_mask_id, sys.stdout)
    z_0, of_texts = None, c.latent in OF_TEXTS
    if method.encoder_name and of_texts:
        attach(method, config, tok, device, c.encoder)
    elif c.encoder:
        raise UserError('--encoder has no effect: these samples need no frozen encoder')
    if of_texts:
        z_0 = latents_of_texts(method, *open_texts('', config, tok, device), c.num_samples, c)
    with whole(c.save) if c.save else nullcontext() as temp:
        with torch.autocast(device.type, torch.bfloat16, enabled=c.dtype == 'bfloat16'):
            try:
                x = generate(method, c.num_samples, c.steps, c.batch_size, c.seed, prompt, z_0, **options)
            except ValueError as e:  # of a prompt: AR fills no gap in the middle
                raise UserError(e) from e
        texts = [tok.decode(ids) for ids in x.tolist()]
        if c.save.endswith('.npy'):
            with open(temp, 'wb') as f:  # np.save would add .npy to a name
                np.save(f, x.numpy())
        elif c.save:
            with open(temp, 'w', encoding='utf-8') as f:
                f.writelines(json.dumps({'ids': ids, 'text': text}, ensure_ascii=False) + '\n'
                             for ids, text in zip(x.tolist(), texts))
    for i, text in enumerate(texts):
        print(f'--- sample {i + 1}\n{text}')
    if c.save:
        print(f'--- wrote {len(texts):,} texts to {c.save}')


if __name__ == '__main__':
    run(main, Config)
