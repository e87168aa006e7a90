"""
Every number of the papers' tables, from a checkpoint of any method.

    python eval.py --out_dir=out/NAME --metrics=val_ppl                   on the validation texts
    python eval.py --out_dir=out/NAME --data=zeroshot/ptb                 on any prepared set, or a text file
    python eval.py --out_dir=out/NAME --metrics=gen_ppl,diversity --steps=1,2,4,8,16,32       on samples
    python eval.py --out_dir=out/NAME --metrics=gen_ppl --strategy=seq --latent_steps=2,8,32  of LADD
    python eval.py --out_dir=out/NAME --metrics=reconstruction,smoothness --teacher=out/AR    of LDLM
    python eval.py out/A out/B --steps=1,2,4,8,16,32,64 --teacher=out/AR  a frontier: quality against cost

Each result is one JSON object, on standard output and at the end of out/NAME/eval.jsonl, with all that is
needed to repeat it. What the numbers are:

val_ppl      exp(nats per token), over all tokens of a chunk, EOS included. Exact for AR, otherwise an upper
             bound: the ELBO, at times stratified over all texts and drawn anew in each of --nll_draws rounds,
             so the batch size does not matter. Of LADD token_ppl is the token channel alone, the papers'
             "data Val PPL". It bounds nothing, because the latent that it is given was read off the text.
             Codes (Di-LADD) have a likelihood, too, latent_nll, and val_ppl is the bound of both channels.
             _se is the standard error for fresh texts and fresh noise; noise alone makes less of it.
gen_ppl      exp(nats per token) of the samples under a causal language model, the teacher. Samples are whole:
             nothing is cut at EOS. A teacher with another tokenizer reads the text, with its EOS in place of
             our EOS and BOS, in windows of its context. A Hugging Face teacher has nothing to predict a
             window's first token from, so that is not scored; our AR scores it.
entropy      entropy_position: of the tokens that samples have at one position, averaged over positions (LADD's
             definition; at most log of the number of samples).
             entropy_sample: of the tokens within a sample, averaged over samples (MDLM's and LDLM's). Both in
             nats and of our ids. LADD's values, 4.4 at L = 128 and 5.3 at L = 512, look like the second.
diversity    product over n = 2, 3, 4 of distinct n-grams / n-grams, pooled over all samples; it falls with
             their number
mauve        against as many validation texts (package mauve-text, features of GPT-2 Large)
swd          of sawtooth samples to fresh data, see sawtooth.py
throughput   samples per second after a warm-up, at --batch_size, and divided by gen_ppl. If the machine has
             other work, compare cpu_seconds_per_sample, of all threads of this process.
reconstruction  of LDLM: the share of the validation texts' tokens that survive encoding and decoding
smoothness   of LDLM, its figure 3: Gen PPL along the straight line between the latents of two random texts,
             pooled over --num_samples pairs at each of 11 points (gen_ppl_path). Ours: these two numbers, and
             `smoothness`, the worst Gen PPL on the way over the mean of both ends.

Every result on samples has entropies, time and GFLOPs. Gen PPL without them says little: a model that repeats
one sentence has the best Gen PPL of all.

A frontier samples every run with all its strategies at every number of steps, has one teacher score all, and
prints and draws what lib/plot.py explains. What is in eval.jsonl already, of the same weights, teacher,
options and device (seconds are compared), is not measured again: an interrupted sweep goes on where it
stopped, and a seed added later (out/A_seed1) costs only itself. --results=FILE.jsonl keeps what was drawn, and
FILE.jsonl in place of a folder stands for runs that are gone. For other samplers and temperatures measure with
--out_dir, and draw with `python -m lib.plot frontier`.
"""
import itertools
import math
import os
import shlex
import sys
import time
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from tqdm import tqdm

from lib import plot
from lib.checkpoint import fingerprint, is_run
from lib.configurator import UserError, configure, defaults_of, key, nearest, numbers, run
from lib.device import device_name, pick_device
from lib.files import append, json_line, whole
from lib.noise import Noise
from lib.teacher import Teacher, hub_teacher, translation
from methods import attach_encoder, open_run
from sample import Machine, Shared, generate, open_model, open_tokenizer, read_arguments, sampling_options
from sawtooth import swd
from train import open_data

OF_TEXTS = ('val_ppl', 'reconstruction', 'smoothness')
OF_SAMPLES = ('gen_ppl', 'entropy', 'diversity', 'mauve', 'swd', 'throughput')
COLUMNS = ('data', 'strategy', 'steps', 'latent_steps', 'val_ppl', 'token_ppl', 'reconstruction', 'smoothness',
           'gen_ppl', 'entropy_position', 'entropy_sample', 'diversity', 'mauve', 'swd', 'samples_per_s', 'gflops')
ENDLESS = 20480  # texts of sawtooth, whose stream has no end


@dataclass
class Config(Shared):
    metrics: str = 'val_ppl'       # which, with commas
    data: str = ''                 # of texts: a prepared set or a UTF-8 file; empty: the run's validation texts
    val_seqs: int = key(0, at_least=0)   # how many of them; 0: all
    nll_draws: int = key(1, at_least=1)  # times and masks per text
    steps: str = '32'              # of samples: denoiser calls for the tokens, with commas
    latent_steps: str = '8'        # of --strategy=seq: denoiser calls for the latent, with commas
    num_samples: int = key(64, at_least=1)
    teacher: str = 'gpt2-large'    # a causal model of the Hugging Face hub, its folder, or out/NAME of our AR
    plot: bool = False             # draw out/NAME/frontier.png from all of eval.jsonl


@dataclass
class Sweep(plot.FrontierConfig, Machine):
    steps: str = '1,2,4,8,16,32,64'  # denoiser calls for the tokens
    strategies: str = 'joint,seq'  # of these, those that a method has
    latent_steps: str = '8'        # of seq: denoiser calls for the latent; each number makes a curve
    num_samples: int = key(64, at_least=1)
    teacher: str = 'gpt2-large'
    results: str = ''              # FILE.jsonl


# ------------------------------------------------------------------------------------------------------------
# texts: rows(row numbers (b,)) -> ids (b, L), and how many there are

def open_texts(name, config, tok, device):
    """-> rows, n of a text file, or of the validation texts of a prepared set ('': the one of the training)."""
    name, L = name or config['dataset'], config['block_size']
    if os.path.isfile(name):
        x = read_texts(name, tok, L)
        return lambda idx: x[idx].to(device), len(x)
    data = open_data(name, 'val', L)
    if (data.tokenizer, data.wrap) != (tok.spec, tok.wrap):
        raise UserError(f'{name} was not prepared as the training data of this model was; prepare it with '
                        f'--tokenizer=DATA, the folder of the training data, and --wrap={tok.wrap}, or give a '
                        'text file')
    return lambda idx: data.rows(idx)[0].to(device), len(data) if tok.spec else ENDLESS


def read_texts(path, tok, L):
    """A UTF-8 text file as ids (n, L)."""
    try:
        with open(path, encoding='utf-8', newline='') as f:
            ids = torch.tensor(tok.encode(f.read()))
    except UnicodeDecodeError as e:
        raise UserError(f'{path} is not UTF-8 ({e.reason})') from e
    body = L - 2 * tok.wrap
    if len(ids) < body:
        raise UserError(f'{path} has {len(ids):,} tokens, and one text of this model is {body:,}')
    x = ids[:len(ids) // body * body].view(-1, body)
    if tok.wrap:
        x = torch.cat((torch.full_like(x[:, :1], tok.bos_id), x, torch.full_like(x[:, :1], tok.eos_id)), dim=1)
    return x


def attach(method, config, tok, device):
    """Hands in the frozen encoder that a method reads texts with. UserError if it is not that of its training."""
    data = SimpleNamespace(tokenizer=tok.spec, vocab_size=config['vocab_size'], block_size=config['block_size'])
    weights = attach_encoder(method, data, device)
    if config.get('encoder_weights') not in (None, weights):
        raise UserError(f'{method.encoder_name} has other weights than the encoder that this model was trained '
                        'with; put those back, or train it anew')


@torch.no_grad()
def likelihood(method, rows, n, batch_size, seed=0, draws=1, strategy='joint'):
    """Method.nll_parts, means over the first n texts, in nats per token -> {'val_nll', 'val_nll_se', 'val_ppl'}.

    Of LADD also token_nll, ..., and of its codes latent_nll and latent_nll_se.
    """
    nats = {}
    for draw in range(draws):
        batches = torch.arange(n).split(batch_size)
        for idx in tqdm(batches, desc=f'likelihood {draw + 1}/{draws}', disable=None, leave=False):
            x = rows(idx)
            noise = Noise(seed, draw, idx.to(x.device), n)
            for name, part in method.nll_parts(x, noise, strategy).items():
                nats.setdefault(name, torch.zeros(n, dtype=torch.float64))
                nats[name][idx] += part.double().cpu() / (draws * x.shape[1])
    if method.likelihood == 'bound' and 'val' not in nats:
        nats['val'] = sum(nats.values())  # of both channels
    result = {}
    for name, v in nats.items():
        nll = v.mean().item()
        result |= {f'{name}_nll': nll, f'{name}_nll_se': v.std().item() / n**0.5}
        if name != 'latent':
            result[f'{name}_ppl'] = math.exp(nll) if nll < 700 else math.inf
    return result


@torch.no_grad()
def reconstruction(method, rows, n, batch_size):
    """Share of the tokens of the first n texts that encoder and decoder give back."""
    texts = map(rows, torch.arange(n).split(batch_size))
    right = [(method.reconstruct(x) == x).double().mean(dim=1).cpu() for x in texts]
    return torch.cat(right).mean().item()


@torch.no_grad()
def interpolations(method, rows, n, pairs, batch_size, seed, weights):
    """Random pairs of the first n texts, no text in two of them, decoded at points between their latents.

    -> ids (len(weights), pairs, L)
    """
    ends = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:2 * pairs].view(2, pairs)
    return torch.cat([method.interpolate(x_a := rows(a), rows(b), weights.to(x_a.device)).cpu()
                      for a, b in ends.split(batch_size, dim=1)], dim=1)


def text_results(c, metrics, method, rows, n, teacher, autocast):
    """A result for each metric of texts."""
    if 'val_ppl' in metrics:
        strategy = c.strategy or next(iter(method.strategies))
        with autocast:
            values = likelihood(method, rows, n, c.batch_size, c.seed, c.nll_draws, strategy)
        if 'val_ppl' in values:
            values['val_ppl_is'] = 'exact' if method.likelihood == 'exact' else 'an upper bound'
        if 'token_ppl' in values:
            values |= {'token_ppl_is': 'the token channel, given the latent of the text itself: no bound',
                       'strategy': strategy}
        yield {'metric': 'likelihood', **values, 'num_texts': n, 'nll_draws': c.nll_draws}
    if 'reconstruction' in metrics:
        with autocast:
            share = reconstruction(method, rows, n, c.batch_size)
        yield {'metric': 'reconstruction', 'reconstruction': share, 'num_texts': n}
    if 'smoothness' in metrics:
        pairs = min(c.num_samples, n // 2)
        with autocast:
            points = interpolations(method, rows, n, pairs, c.batch_size, c.seed, torch.linspace(0, 1, 11))
        path = [teacher.gen_ppl(x)[0] for x in points]
        yield {'metric': 'smoothness', 'smoothness': max(path) / ((path[0] + path[-1]) / 2),
               'points': [i / 10 for i in range(11)], 'gen_ppl_path': path,
               'entropy_sample_path': [entropies(x)['entropy_sample'] for x in points],
               'num_pairs': pairs, 'num_texts': n, **teacher.record}


# ------------------------------------------------------------------------------------------------------------
# samples x (N, L)

def entropy(ids):
    """Of the empirical distribution of ids (n,), in nats."""
    p = ids.unique(return_counts=True)[1].double() / len(ids)
    return -(p * p.log()).sum().item()


def entropies(x):
    return {'entropy_position': sum(map(entropy, x.T)) / x.shape[1],
            'entropy_sample': sum(map(entropy, x)) / len(x)}


def diversity(x):
    product = 1.0
    for n in (2, 3, 4):
        grams = x.unfold(1, n, 1).flatten(0, 1)  # (N (L - n + 1), n)
        product *= len(grams.unique(dim=0)) / len(grams)
    return product


def mauve_score(x, references, tok, device, seed):
    import mauve
    texts, references = ([tok.decode(ids) for ids in part.tolist()] for part in (x, references))
    return mauve.compute_mauve(p_text=references, q_text=texts, featurize_model_name='gpt2-large',
                               max_text_length=1024, seed=seed, device_id=0 if device.type == 'cuda' else -1,
                               verbose=False).mauve


def all_options(c, method):
    """Every option of method.sample, for each of --latent_steps. UserError for what it does not have."""
    return [sampling_options(SimpleNamespace(**{**vars(c), 'latent_steps': n}), method)
            for n in numbers('latent_steps', c.latent_steps)]


def sample_results(c, metrics, method, L, variants, score, autocast):
    """A result for each of the variants (options of method.sample) and --steps: samples are drawn once for all metrics.

    score: x (N, L) -> dict of metrics
    """
    def draw(n, steps, options):
        try:
            with autocast:
                return generate(method, n, steps, c.batch_size, c.seed, **options)
        except ValueError as e:
            raise UserError(e) from e

    steps_list = numbers('steps', c.steps)
    for options in variants:
        draw(min(c.num_samples, c.batch_size), min(steps_list[0], 2), options)  # warm-up
        for calls, steps in {method.denoiser_calls(steps, **options): steps for steps in steps_list}.items():
            clock, cpu_clock = time.perf_counter(), time.process_time()
            x = draw(c.num_samples, steps, options)
            seconds, cpu_seconds = time.perf_counter() - clock, time.process_time() - cpu_clock
            result = {'metric': 'samples', 'steps': calls, 'num_samples': c.num_samples, **options, **score(x),
                      'gflops': method.sampling_flops(L, steps, **options) / 1e9,
                      'seconds_per_sample': seconds / c.num_samples,
                      'cpu_seconds_per_sample': cpu_seconds / c.num_samples,
                      'samples_per_s': c.num_samples / seconds}
            if 'gen_ppl' in result:
                result['samples_per_s_per_gen_ppl'] = result['samples_per_s'] / result['gen_ppl']
            yield result | {'eos': 'kept: a sample is a chunk of documents joined by EOS'}
