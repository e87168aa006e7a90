"""
Every number of the papers' tables, from a checkpoint of any method.

    python eval.py --out_dir=out/NAME --metrics=val_ppl               on the validation texts
    python eval.py --out_dir=out/NAME --data=zeroshot/ptb             on any prepared set, or a text file
    python eval.py --out_dir=out/NAME --metrics=gen_ppl,diversity --steps=1,2,4,8,16,32       on samples
    python eval.py --out_dir=out/NAME --metrics=gen_ppl --strategy=seq --latent_steps=2,8,32  of LADD
    python eval.py --out_dir=out/NAME --metrics=gen_ppl --strategy=seq --latent=none          its control
    python eval.py --out_dir=out/NAME --metrics=reconstruction,smoothness --teacher=out/AR    of LDLM
    python eval.py out/A out/B --steps=1,2,4,8,16,32,64 --teacher=out/AR     quality against cost: a frontier

Each result is one JSON object, on standard output and at the end of out/NAME/eval.jsonl, with all that is
needed to repeat it. What the numbers are:

val_ppl      exp(nats per token), over all tokens of a chunk, EOS included. Exact for AR, otherwise an upper
             bound: the ELBO, at times stratified over all texts and drawn anew in each of --nll_draws
             rounds, so the batch size does not matter. LADD: token_ppl is the token channel alone, as in
             the papers ("data Val PPL"). It bounds nothing, because the latent it is given was read off the
             text. With what the latent costs (latent_nll), val_ppl is a bound, see LADD.nll_parts. _se is
             the standard error over fresh texts and fresh noise.
gen_ppl      exp(nats per token) of the samples under a causal language model, the teacher. Samples are whole:
             nothing is cut at EOS. A teacher with another tokenizer reads the text, with its own EOS for our
             EOS and BOS, in windows of its context. A Hugging Face teacher has nothing to predict a window's
             first token from, so that token is not scored; our AR scores it.
entropy      in nats, of our ids. _position: of the tokens that the samples have at one position, averaged
             over positions (LADD's definition; at most log of the number of samples). _sample: of the tokens
             within one sample, averaged over samples (MDLM, LDLM). LADD's published values, 4.4 at L = 128
             and 5.3 at L = 512, look like _sample, whatever its text says: compare them with that.
diversity    product over n = 2, 3, 4 of distinct n-grams / n-grams, pooled over all samples; it falls with
             the number of samples
mauve        against as many validation texts (package mauve-text, GPT-2 Large features)
recited      share of the samples' 12-grams (of tokens) that occur in the training text: whether the model has
             learnt by heart. Compare it with recited_data, the same share of as many validation texts. Of a
             large training text, the first 10^8 tokens are searched.
swd          of sawtooth samples to fresh data, see sawtooth.py
throughput   samples per second after a warm-up, at --batch_size, and divided by gen_ppl. On a machine with
             other work, compare cpu_seconds_per_sample, which counts all threads of this process.
reconstruction  LDLM: share of the validation texts' tokens that survive encoding and decoding
smoothness   LDLM figure 3: Gen PPL along the straight line between the latents of two random texts, pooled
             over --num_samples pairs at each of 11 points (gen_ppl_path). Ours: the numbers of pairs and
             points, and `smoothness`, the worst Gen PPL on the way over the mean of the two ends.

Every result on samples has entropies, time and GFLOPs, because Gen PPL alone says little: a model that
repeats one sentence has the best Gen PPL of all.

Three controls say what a latent is worth:
--latent=none      tokens of the same network without its latent (LADD's sequential strategy)
--latent=data      tokens given the latents of validation texts, so without the error of the latents that the
                   model makes (of LDLM, the reconstruction)
--latent=shuffled  the same latents, but at each of the M places in another random order of the texts (LADD's
                   sequential strategy): what is left when each place is likely, and no two fit together
Neither the encoder's time nor its GFLOPs count. In a frontier, --latent=generated,none,data,shuffled draws
them beside the samples.

A frontier samples every run with all its strategies at every number of steps, scores all of them with one
teacher, and prints and draws what lib/plot.py explains; --recited adds that metric. What eval.jsonl already
holds, of the same weights, teacher, options and device, is not measured again: an interrupted sweep continues
where it stopped, and a seed that is added later, out/A_seed1, costs only itself. FILE.jsonl in place of a
folder stands for runs that are gone; --results=FILE.jsonl writes such a file. Other samplers and
temperatures: measure them with --out_dir, and draw with `python -m lib.plot frontier`.
"""
import itertools
import math
import os
import shlex
import sys
import time
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from tqdm import tqdm

from lib import plot
from lib.checkpoint import fingerprint, is_run
from lib.configurator import UserError, configure, defaults_of, key, nearest, numbers, read_flags, run
from lib.device import device_name, pick_device
from lib.files import append, json_line, whole
from lib.method import OF_TEXTS
from lib.noise import Noise
from lib.teacher import Teacher, hub_teacher, translation
from methods import open_run
from sample import (
    LATENTS,
    Machine,
    Shared,
    attach,
    generate,
    latents_of_texts,
    open_model,
    open_set,
    open_texts,
    open_tokenizer,
    read_arguments,
    sampling_options,
)
from sawtooth import swd

TEXT_METRICS = {'val_ppl', 'reconstruction', 'smoothness'}
SAMPLE_METRICS = {'gen_ppl', 'entropy', 'diversity', 'recited', 'mauve', 'swd', 'throughput'}
COLUMNS = ('data', 'strategy', 'latent', 'steps', 'latent_steps', 'val_ppl', 'token_ppl', 'reconstruction',
           'smoothness', 'gen_ppl', 'entropy_position', 'entropy_sample', 'diversity', 'recited',
           'recited_data', 'mauve', 'swd', 'samples_per_s', 'gflops')  # of the printed table


@dataclass
class Config(Shared):
    metrics: str = 'val_ppl'       # which, with commas
    data: str = ''                 # texts: a prepared set or a UTF-8 file; empty: the run's validation texts
    val_seqs: int = key(0, at_least=0)  # how many; 0: all, and of sawtooth, which has no end, 20,480
    nll_draws: int = key(1, at_least=1)  # times and masks per text
    steps: str = '32'              # of samples: denoiser calls for the tokens, with commas
    latent_steps: str = '8'        # of --strategy=seq: denoiser calls for the latent, with commas
    num_samples: int = key(64, at_least=1)
    teacher: str = 'gpt2-large'    # a causal model of the Hugging Face hub, its folder, or out/NAME of our AR
    plot: bool = False             # draw out/NAME/frontier.png from all of eval.jsonl


@dataclass
class Sweep(plot.FrontierConfig, Machine):
    steps: str = '1,2,4,8,16,32,64'
    strategies: str = 'joint,seq'  # of these, those that a method has
    latent: str = 'generated'      # generated, none, data, shuffled: of these, those that a strategy has
    latent_steps: str = '8'        # each number makes a curve
    num_samples: int = key(64, at_least=1)
    recited: bool = False          # measure that, too, for which the training texts have to be there
    teacher: str = 'gpt2-large'
    results: str = ''              # FILE.jsonl: keep there what is drawn


# ------------------------------------------------------------------------------------------------------------
# texts

@torch.no_grad()
def likelihood(method, rows, n, batch_size, seed=0, draws=1, strategy='joint'):
    """Nats per token of the first n texts -> val_nll, the mean, val_nll_se, its standard error, and val_ppl.

    A method with two channels has token_nll, ... and latent_nll, ..., too.
    """
    nats = {}
    for draw in range(draws):
        batches = torch.arange(n).split(batch_size)
        for idx in tqdm(batches, desc=f'likelihood {draw + 1}/{draws}', disable=None, leave=False):
            x = rows(idx)
            parts = method.nll_parts(x, Noise(seed, draw, idx.to(x.device), n), strategy)
            for name, part in parts.items():
                of_texts = nats.setdefault(name, torch.zeros(n, dtype=torch.float64))
                of_texts[idx] += part.double().cpu() / (draws * x.shape[1])
    nats.setdefault('val', sum(nats.values()))
    result = {}
    for name, v in nats.items():
        nll = v.mean().item()
        result |= {f'{name}_nll': nll, f'{name}_nll_se': v.std().item() / n**0.5}
        if name != 'latent':
            result[f'{name}_ppl'] = math.exp(nll) if nll < 700 else math.inf
    return result


def smoothness(method, rows, n, pairs, batch_size, seed, teacher):
    """Gen PPL between the latents of random pairs of the first n texts; no text is in two pairs."""
    ends = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:2 * pairs].view(2, pairs)
    weights, parts = torch.linspace(0, 1, 11), []
    for a, b in ends.split(batch_size, dim=1):
        x_a, x_b = rows(a), rows(b)
        parts.append(method.interpolate(x_a, x_b, weights.to(x_a.device)).cpu())
    points = torch.cat(parts, dim=1)                                                   # (11, pairs, L)
    path = [teacher.gen_ppl(x)[0] for x in points]
    return {'smoothness': max(path) / ((path[0] + path[-1]) / 2), 'points': [i / 10 for i in range(11)],
            'gen_ppl_path': path, 'entropy_sample_path': [entropies(x)['entropy_sample'] for x in points],
            'num_pairs': pairs, **teacher.record}


def text_results(c, o):
    """A result for each metric of texts.  c, o: see prepare."""
    about = {'data': c.data or o.config['dataset'], 'num_texts': o.n}
    if 'val_ppl' in o.metrics:
        strategy = c.strategy or next(iter(o.method.strategies))
        values = likelihood(o.method, o.rows, o.n, c.batch_size, c.seed, c.nll_draws, strategy)
        values['val_ppl_is'] = {'exact': 'exact', 'bound': 'an upper bound'}[o.method.likelihood]
        if 'token_ppl' in values:
            values |= {'token_ppl_is': 'the token channel, given the latent of the text itself: no bound',
                       'strategy': strategy}
        yield {'metric': 'likelihood', **about, **values, 'nll_draws': c.nll_draws}
    if 'reconstruction' in o.metrics:
        texts = map(o.rows, torch.arange(o.n).split(c.batch_size))
        survive = torch.cat([(o.method.reconstruct(x) == x).double().mean(dim=1).cpu() for x in texts])
        yield {'metric': 'reconstruction', **about, 'reconstruction': survive.mean().item()}
    if 'smoothness' in o.metrics:
        pairs = min(c.num_samples, o.n // 2)
        values = smoothness(o.method, o.rows, o.n, pairs, c.batch_size, c.seed, o.teacher)
        yield {'metric': 'smoothness', **about, **values}


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
    """nan if a sample is too short for n-grams."""
    if x.shape[1] < 4:
        return math.nan
    product = 1.0
    for n in (2, 3, 4):
        grams = x.unfold(1, n, 1).flatten(0, 1)  # (N (L - n + 1), n)
        product *= len(grams.unique(dim=0)) / len(grams)
    return product


RECITED = 12  # tokens


def hashes(ids):
    """A number for each n-gram of ids (..., L) -> (..., L - n + 1); different ones hardly ever share it."""
    weights = np.random.default_rng(0).integers(2**64, size=RECITED, dtype=np.uint64)
    return sliding_window_view(ids.astype(np.uint64), RECITED, axis=-1) @ weights  # modulo 2^64


def recited(x, training_ids, wrap=False, chunk=10**6):
    """Share of the n-grams of texts x (N, L) that occur in training_ids (T,), which no `wrap` has cut."""
    grams = hashes(x[:, wrap:x.shape[1] - wrap].numpy())
    found = np.zeros(grams.shape, bool)
    for first in range(0, len(training_ids) - RECITED + 1, chunk):
        known = np.sort(hashes(training_ids[first:first + chunk + RECITED - 1]))
        found |= known.take(np.searchsorted(known, grams), mode='clip') == grams
    return found.mean().item()


def mauve_score(x, references, tok, device, seed):
    import mauve
    gpu = torch.cuda.current_device() if device.type == 'cuda' else -1
    texts, references = ([tok.decode(ids) for ids in part.tolist()] for part in (x, references))
    with torch.autocast(device.type, enabled=False):
        return mauve.compute_mauve(
            p_text=references, q_text=texts, featurize_model_name='gpt2-large', max_text_length=1024,
            seed=seed, device_id=gpu, verbose=False).mauve


def scores(x, c, o):
    """The metrics of samples."""
    result = {}
    if 'gen_ppl' in o.metrics:
        result['gen_ppl'], result['teacher_tokens'] = o.teacher.gen_ppl(x)
        result |= o.teacher.record
    result |= entropies(x)
    if 'diversity' in o.metrics:
        result['diversity'] = diversity(x)
    if o.metrics & {'recited', 'mauve'}:
        references = o.rows(torch.arange(min(c.num_samples, o.n))).cpu()
    if 'recited' in o.metrics:
        result |= {name: recited(texts, o.training_ids, o.tok.wrap)
                   for name, texts in (('recited', x), ('recited_data', references))}
    if 'mauve' in o.metrics:
        result['mauve'] = mauve_score(x, references, o.tok, o.device, c.seed)
    if 'swd' in o.metrics:
        result['swd'] = swd(x)
    return result


def steps_by_calls(method, steps, options):
    """{calls of the denoiser: steps}, to draw nothing twice; {None: steps} if steps has no effect."""
    return {method.denoiser_calls(n, **options): n for n in steps}


def sample_results(c, o):
    """A result for each choice of options and --steps. Samples are drawn once for all metrics."""
    def draw(n, steps, options):
        z_0 = o.z_0[:n] if c.latent in OF_TEXTS else None
        try:
            return generate(o.method, n, steps, c.batch_size, c.seed, z_0=z_0, **options)
        except ValueError as e:  # of a method that does not take so many steps, say
            raise UserError(e) from e

    for options in o.choices:
        draw(min(c.num_samples, c.batch_size), min(o.steps[0], 2), options)  # warm-up
        for calls, steps in steps_by_calls(o.method, o.steps, options).items():
            clock, cpu_clock = time.perf_counter(), time.process_time()
            x = draw(c.num_samples, steps, options)
            seconds = (time.perf_counter() - clock) / c.num_samples
            cpu_seconds = (time.process_time() - cpu_clock) / c.num_samples
            flops = o.method.sampling_flops(o.config['block_size'], steps, **options)
            result = {'metric': 'samples', 'steps': calls, 'num_samples': c.num_samples, **options,
                      **scores(x, c, o), 'gflops': flops / 1e9, 'seconds_per_sample': seconds,
                      'cpu_seconds_per_sample': cpu_seconds, 'samples_per_s': 1 / seconds}
            if c.latent in OF_TEXTS:
                result['data'] = c.data or o.config['dataset']
            if 'gen_ppl' in result:
                result['samples_per_s_per_gen_ppl'] = 1 / seconds / result['gen_ppl']
            yield {**result, 'eos': 'kept: a sample is a chunk of documents joined by EOS'}


# ------------------------------------------------------------------------------------------------------------
# one run

def open_teacher(name, tok, device):
    """-> a Teacher of samples in ids of tok. UserError if it cannot read them or has no exact likelihood."""
    if not is_run(name):
        if tok.spec is None:
            raise UserError('sawtooth has no text: its teacher is a sawtooth AR, --teacher=out/NAME')
        return hub_teacher(name, tok, device)
    method, config = open_run(name, device)
    if method.likelihood != 'exact':
        raise UserError(f'the teacher {name} is {method.name}, which has no exact likelihood; it has to be '
                        'AR, or a causal model of the Hugging Face hub')
    theirs = open_tokenizer(config)
    if (theirs.spec is None) != (tok.spec is None):
        raise UserError(f'{name} was trained on {config["dataset"]}, which has nothing in common with these '
                        'samples')
    translate = translation(tok, theirs) if theirs.spec != tok.spec else lambda ids: ids
    return Teacher(name, method, method.nll, translate, config['block_size'], unscored=0)


def check_metrics(metrics, method, tok):
    """UserError for a metric that does not exist, or has no meaning for this method and its data."""
    no_space = not method.has_latent_space and f'{method.name} has no latent space'
    reasons = {'val_ppl': not method.likelihood and f'{method.name} has no likelihood',
               'reconstruction': no_space, 'smoothness': no_space,
               'swd': tok.spec and 'swd is a metric of sawtooth',
               **{metric: not tok.spec and f'{metric} is a metric of text, which sawtooth is not'
                  for metric in ('recited', 'mauve')}}
    for metric in sorted(metrics):
        if metric not in TEXT_METRICS | SAMPLE_METRICS:
            raise UserError(f'no metric {metric!r}: {nearest(metric, TEXT_METRICS | SAMPLE_METRICS)}')
        if reasons.get(metric):
            raise UserError(f'{reasons[metric]}: leave {metric} out')
    if 'mauve' in metrics:
        try:
            import mauve  # noqa: F401
        except ImportError as e:
            raise UserError('mauve needs `pip install mauve-text`') from e


def choices(c, method):
    """Every option of method.sample, for each of --latent_steps."""
    return [sampling_options(SimpleNamespace(**{**vars(c), 'latent_steps': n}), method)
            for n in numbers('latent_steps', c.latent_steps)]


def prepare(argv):
    """-> the keys c, and o, what they open: all that can be wrong, before anything is computed or written."""
    c = read_arguments(Config, argv)
    o = SimpleNamespace(metrics=set(c.metrics.split(',')), steps=numbers('steps', c.steps))
    o.device = pick_device(c.device)
    o.method, o.config = open_model(c, o.device)
    o.tok = open_tokenizer(o.config)
    check_metrics(o.metrics, o.method, o.tok)
    if c.plot and not c.out_dir:
        raise UserError('--plot draws from out/NAME/eval.jsonl: it goes with --out_dir')
    if o.metrics & {'val_ppl', *SAMPLE_METRICS}:  # the others do without a sampler, which may be untrained
        o.choices = choices(c, o.method)
    wants_latents = c.latent in OF_TEXTS and o.metrics & SAMPLE_METRICS
    if o.metrics & {*TEXT_METRICS, 'recited', 'mauve'} or wants_latents:
        o.rows, n = open_texts(c.data, o.config, o.tok, o.device)
        o.n = min(n, c.val_seqs or n)
        if 'smoothness' in o.metrics and o.n < 2:
            raise UserError('smoothness wants two texts at least, and there is one')
    if 'recited' in o.metrics:
        if o.config['block_size'] - 2 * o.tok.wrap < RECITED:
            raise UserError(f'recited wants texts of {RECITED} tokens at least: leave it out')
        o.training_ids = open_set(o.config['dataset'], 'train', o.config, o.tok).ids[:10**8]
    if o.method.encoder_name and (o.metrics & TEXT_METRICS or wants_latents):
        attach(o.method, o.config, o.tok, o.device, c.encoder)
    elif c.encoder:
        raise UserError('--encoder has no effect: these metrics of this run need no frozen encoder')
    if o.metrics & {'gen_ppl', 'smoothness'}:
        o.teacher = open_teacher(c.teacher, o.tok, o.device)
    if wants_latents:
        o.z_0 = latents_of_texts(o.method, o.rows, o.n, c.num_samples, c)
    return c, o


def provenance(c, method, config, device):
    """What a result depends on besides its options."""
    return {'step': config['step'], 'weights': fingerprint(method), 'device': device_name(device),
            **{k: getattr(c, k) for k in ('seed', 'batch_size', 'dtype', 'compile')}}


def evaluate(argv):
    """--out_dir=out/NAME: prints its results, and adds them to its eval.jsonl -> the results."""
    c, o = prepare(argv)
    path = os.path.join(c.out_dir, 'eval.jsonl') if c.out_dir else os.devnull
    try:
        append(path)
    except UserError as e:  # of somebody else's run, say
        print(f'{e}: results are printed, but not kept', file=sys.stderr)
        path = os.devnull
    common = {'model': c.out_dir or c.init_from, **{k: o.config[k] for k in ('method', 'dataset')},
              'data_sha256': o.config.get('data_sha256'),
              'L': o.config['block_size'], **provenance(c, o.method, o.config, o.device),
              'torch': torch.__version__, 'command': shlex.join(['python', 'eval.py', *argv])}
    results = []
    with torch.no_grad(), torch.autocast(o.device.type, torch.bfloat16, enabled=c.dtype == 'bfloat16'):
        of_texts = text_results(c, o) if o.metrics & TEXT_METRICS else ()
        of_samples = sample_results(c, o) if o.metrics & SAMPLE_METRICS else ()
        for result in itertools.chain(of_texts, of_samples):
            results.append({**result, **common})
            append(path, results[-1])  # first: what it is printed to may be gone
            print(json_line(results[-1]), end='', flush=True)

    columns = [k for k in COLUMNS if any(r.get(k) is not None for r in results)]
    rows = [[r['metric'], *(plot.written(r.get(k)) for k in columns)] for r in results]
    plot.print_table('metric', columns, rows, sys.stderr)
    if c.plot:
        plot.frontier(plot.measured([c.out_dir]), plot.beside(c.out_dir, 'frontier'), sys.stderr)
    return results


# ------------------------------------------------------------------------------------------------------------
# the frontier of several runs

PASSED_ON = 'num_samples', 'teacher', 'seed', 'batch_size', 'device', 'dtype', 'compile'


def offers(method, c):
    """(strategy, latent) for those of c.strategies and c.latent that a method has."""
    for strategy in [s for s in method.strategies if s in c.strategies.split(',')]:
        rule = method.strategies[strategy].get('latent')
        for latent in rule.metadata['choices'] if rule else ['generated']:
            if latent in c.latent.split(','):
                yield strategy, latent


def planned(folder, method, config, c, device):
    """For each curve of a run: (arguments without --steps, settings of its results, {calls: steps}).

    UserError if the run has none of the strategies.
    """
    found = []
    for strategy, latent in offers(method, c):
        takes_latent_steps = 'latent_steps' in method.strategies[strategy] and latent == 'generated'
        for n in numbers('latent_steps', c.latent_steps) if takes_latent_steps else ['']:
            argv = [f'--out_dir={folder}', '--metrics=gen_ppl,diversity' + ',recited' * c.recited,
                    f'--strategy={strategy}', f'--latent={latent}',
                    *[f'--latent_steps={n}'] * takes_latent_steps,
                    *(f'--{k}={getattr(c, k)}' for k in PASSED_ON)]
            options, = choices(read_arguments(Config, argv), method)
            settings = {**provenance(c, method, config, device), 'num_samples': c.num_samples, **options}
            if latent in OF_TEXTS:
                settings['data'] = config['dataset']
            found.append((argv, settings, steps_by_calls(method, numbers('steps', c.steps), options)))
    if not found:
        raise UserError(f'{folder} has none of the strategies {c.strategies} with latent={c.latent}; '
                        f'it has: {", ".join(method.strategies)}')
    return found


def sweep(argv):
    """out/A out/B ...: measures what is missing, prints the tables, draws the figure."""
    names, flags = [a for a in argv if not a.startswith('-')], [a for a in argv if a.startswith('-')]
    for k in read_flags(flags).keys() & defaults_of(Config).keys() - defaults_of(Sweep).keys():
        raise UserError(f'--{k} is for one run: --out_dir={names[0]}')
    c = SimpleNamespace(**configure(Sweep, flags))
    if not set(c.latent.split(',')) <= set(LATENTS):
        raise UserError(f'--latent={c.latent}: of {", ".join(LATENTS)} one or several, with commas')
    drawing, device = plot.frontier_options(c), pick_device(c.device)
    folders = [os.path.normpath(name) for name in names if not name.endswith('.jsonl')]
    path = c.save or plot.beside((folders or names)[0], 'frontier')
    plot.check_ending(path)
    if c.results and not c.results.endswith('.jsonl'):
        raise UserError(f'--results={c.results}: the name ends with .jsonl')
    if c.results not in names and os.path.exists(c.results):
        raise UserError(f'{c.results} holds results: name it among the runs, too, or give another file')
    plans, teacher = [], {}
    for folder in folders:
        method, config = open_run(folder, device)
        teacher = teacher or open_teacher(c.teacher, open_tokenizer(config), device).record
        plans += [(folder, *plan) for plan in planned(folder, method, config, c, device)]

    def known(folder, settings, calls, new=()):
        wanted = {**settings, **teacher, 'steps': calls}
        return [r for r in [*new, *plot.gen_ppls(folder)]
                if wanted.items() <= r.items() and (not c.recited or 'recited' in r)][-1:]
    results = plot.measured([name for name in names if name.endswith('.jsonl')])
    for folder, argv, settings, budgets in plans:
        missing = [str(steps) for calls, steps in budgets.items() if not known(folder, settings, calls)]
        new = evaluate([*argv, '--steps=' + ','.join(missing)]) if missing else []
        results += [r for calls in budgets for r in known(folder, settings, calls, new)]

    if c.results:
        with whole(c.results) as temp, open(temp, 'w') as f:
            f.writelines(dict.fromkeys(map(json_line, results)))  # once, if a run and its file are named
    plot.frontier(results, path, sys.stdout, **drawing)
    print(path)


def is_sweep(argv):
    """Whether runs are named without a key. (A config file or checkpoint: read_arguments will refuse it.)"""
    return any(not a.startswith('-') and not a.endswith(('.py', '.pt')) for a in argv)


def main(argv):
    if is_sweep(argv):
        sweep(argv)
    else:
        evaluate(argv)


if __name__ == '__main__':
    run(main, Sweep if is_sweep(sys.argv[1:]) else Config)
