"""
Every number of the papers' tables, from a checkpoint of any method.

    python eval.py --out_dir=out/NAME --metrics=val_ppl                                       on the validation texts
    python eval.py --out_dir=out/NAME --metrics=val_ppl --data=zeroshot/ptb                   on any prepared set, or a text file
    python eval.py --out_dir=out/NAME --metrics=gen_ppl,diversity --steps=1,2,4,8,16,32       on samples, one result per number of steps
    python eval.py --out_dir=out/NAME --metrics=gen_ppl --steps=8,32 --teacher=out/AR --plot  and a figure; of several models: frontier.py
    python eval.py --out_dir=out/NAME --metrics=gen_ppl --strategy=seq --latent_steps=2,8,32  LADD: the steps of the latent, too
    python eval.py --out_dir=out/NAME --metrics=reconstruction,smoothness --teacher=out/AR    LDLM: its latent space

Each result is one JSON object, on standard output and at the end of out/NAME/eval.jsonl, with all that is needed to repeat it.
What the numbers are:

val_ppl      exp(nats per token), over all tokens of a chunk, EOS included. The nats are exact for AR and an upper bound otherwise: the ELBO, at
             times stratified over all texts and drawn anew in each of --nll_draws rounds. So nothing depends on the batch size.
             LADD: token_ppl is the token channel alone, as in the papers ("data Val PPL"); it is no bound on anything, because the latent
             it is given was read off the text. Codes (Di-LADD) have a likelihood, too (latent_nll), and then val_ppl is the bound of both channels.
             _se is the standard error for fresh texts and fresh noise; on fixed texts the noise alone makes less.
gen_ppl      exp(nats per token) of the samples under a causal language model, the teacher. Samples are whole, nothing is cut at EOS. In the
             teacher's own tokenizer if that is another, where EOS and BOS become the teacher's EOS, and in windows of its context.
             A Hugging Face teacher has nothing to predict a window's first token from, so it is not scored; our AR scores it.
entropy      _position: of the tokens that the samples have at one position, averaged over positions (LADD's definition; at most log of the number of samples)
             _sample: of the tokens within one sample, averaged over samples (the definition of MDLM and LDLM). Nats. Both on our ids.
             LADD's published values, 4.4 at L = 128 and 5.3 at L = 512, look like _sample, whatever its text says: compare them with that.
diversity    product over n = 2, 3, 4 of distinct n-grams / n-grams, pooled over all samples; falls with the number of samples
mauve        against as many validation texts (package mauve-text, GPT-2 Large features)
swd          of sawtooth samples to fresh data, see sawtooth.py
throughput   samples per second after a warm-up, at --batch_size; and divided by gen_ppl
             cpu_seconds_per_sample, of all threads of this process, is what a machine that is busy with something else still measures fairly.
reconstruction  LDLM: share of the validation texts' tokens that survive encoding and decoding
smoothness   LDLM figure 3: Gen PPL along the straight line between the latents of two random validation texts, pooled over --num_samples pairs at
             each of 11 points (gen_ppl_path). Ours: the numbers of pairs and points, and `smoothness` itself, the worst Gen PPL on the way
             over the mean of the two ends.

Every result on samples has the entropies, the time and the GFLOPs, because gen_ppl without them says little: a model that repeats one
sentence has the best gen_ppl of all.
"""
import inspect
import itertools
import math
import os
import shlex
import sys
import time
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from tqdm import tqdm

from lib.checkpoint import append, device_name, fingerprint, is_run, json_line, load_method, pick_device
from lib.configurator import UserError, nearest, numbers, run
from lib.tokens import load_tokenizer, open_data
from lib.encoders import hub_model, open_encoder
from lib.noise import Noise
from sample import generate, open_model, open_tokenizer, read_arguments, sampling_options, shared

TEXT_METRICS = {'val_ppl': ('nll', 'likelihood'), 'reconstruction': ('reconstruct', 'autoencoder'),  # metric: what it takes of a method
                'smoothness': ('interpolate', 'latent space in which to interpolate')}
METRICS = (*TEXT_METRICS, 'gen_ppl', 'entropy', 'diversity', 'mauve', 'swd', 'throughput')
defaults = dict(
    metrics='val_ppl',         # which, with commas
    data='',                   # for metrics of texts: a prepared set, or a UTF-8 text file; empty: the validation texts of the training data
    val_seqs=0,                # texts of it; 0: all, of sawtooth's endless stream 20,480
    nll_draws=1,               # times and masks per text
    steps='32',                # for samples: denoiser calls, with commas
    num_samples=64,
    teacher='gpt2-large',      # for gen_ppl: a causal language model of the Hugging Face hub, its folder, or out/NAME of our AR
    plot=False,                # draw out/NAME/frontier.png from all of eval.jsonl
    **{**shared, 'latent_steps': '8'})  # of --strategy=seq: denoiser calls for the latent, with commas


# ----------------------------------------------------------------------------------------------------------------------------------
# likelihood

def open_texts(name, config, tok):
    """-> (rows: row numbers (b,) -> ids (b, L), how many there are) of a prepared set's validation texts, or of a text file."""
    L = config['block_size']
    if not os.path.isfile(name):
        data = open_data(name or config['dataset'], 'val', L)
        if (getattr(data, 'tokenizer', None), getattr(data, 'wrap', False)) != (tokenizer_spec(config, tok), tok.wrap):
            raise UserError(f'{name or config["dataset"]} was not prepared as the training data of this model was; prepare it with --tokenizer=DATA, '
                            f'the folder of the training data, and --wrap={tok.wrap}, or give a text file')
        return data.rows, 20480 if (name or config['dataset']) == 'sawtooth' else len(data)
    try:
        with open(name, encoding='utf-8', newline='') as f:
            ids = torch.tensor(tok.encode(f.read()))
    except UnicodeDecodeError as e:
        raise UserError(f'{name} is not UTF-8 ({e.reason})') from e
    body = L - 2 * tok.wrap
    if len(ids) < body:
        raise UserError(f'{name} has {len(ids):,} tokens, and one text of this model is {body:,}')
    x = ids[:len(ids) // body * body].view(-1, body)
    if tok.wrap:
        x = torch.cat((torch.full_like(x[:, :1], tok.bos_id), x, torch.full_like(x[:, :1], tok.eos_id)), dim=1)
    return x.__getitem__, len(x)


def tokenizer_spec(config, tok):
    """What two models have in common if their ids mean the same; None for sawtooth, which has no text."""
    return None if config.get('dataset') == 'sawtooth' else tok.spec


@torch.no_grad()
def likelihood(method, rows, n, L, batch_size, seed=0, draws=1, strategy='joint'):
    """Means over the first n texts -> {'val_ppl', 'val_nll', 'val_nll_se'}; LADD: 'token_ppl' ..., 'latent_nll' too. Nats per token."""
    device = next(method.parameters()).device
    channels = ['token', 'latent'] if hasattr(method, 'channel_nll') else ['val']
    nats = {name: torch.zeros(n, dtype=torch.float64) for name in channels}
    for draw in range(draws):
        for idx in tqdm(torch.arange(n).split(batch_size), desc=f'likelihood {draw + 1}/{draws}', disable=None, leave=False):
            x, noise = rows(idx).to(device), Noise(seed, draw, idx.to(device), n)
            parts = method.channel_nll(x, noise, strategy) if len(channels) == 2 else [method.nll(x, noise)]
            for name, part in zip(channels, parts):
                if part is None:  # a Gaussian latent
                    nats.pop(name, None)
                else:
                    nats[name][idx] += part.double().cpu() / (draws * L)
    if 'latent' in nats:
        nats['val'] = nats['token'] + nats['latent']
    result = {}
    for name, v in nats.items():
        nll = v.mean().item()
        result |= {f'{name}_nll': nll, f'{name}_nll_se': v.std().item() / n**0.5}
        if name != 'latent':
            result[f'{name}_ppl'] = math.exp(nll) if nll < 700 else math.inf
    return result


# ----------------------------------------------------------------------------------------------------------------------------------
# the latent space

@torch.no_grad()
def reconstruction(method, rows, n, batch_size):
    """Share of the tokens of the first n texts that encoder and decoder give back."""
    device, right = next(method.parameters()).device, []
    for idx in torch.arange(n).split(batch_size):
        x = rows(idx).to(device)
        right.append((method.reconstruct(x) == x).double().mean(dim=1).cpu())
    return torch.cat(right).mean().item()


@torch.no_grad()
def interpolations(method, rows, n, pairs, batch_size, seed, weights):
    """Decoded points between the latents of random pairs of the first n texts, no text in two of them -> ids (len(weights), pairs, L)."""
    device = next(method.parameters()).device
    ends = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:2 * pairs].view(2, pairs)
    return torch.cat([method.interpolate(rows(a).to(device), rows(b).to(device), weights.to(device)).cpu()
                      for a, b in ends.split(batch_size, dim=1)], dim=1)


# ----------------------------------------------------------------------------------------------------------------------------------
# metrics of samples x (N, L)

def entropy(ids):
    """Of the empirical distribution of ids (n,), in nats."""
    p = ids.unique(return_counts=True)[1].double() / len(ids)
    return -(p * p.log()).sum().item()


def entropies(x):
    return {'entropy_position': sum(map(entropy, x.T)) / x.shape[1], 'entropy_sample': sum(map(entropy, x)) / len(x)}


def diversity(x):
    product = 1.0
    for n in (2, 3, 4):
        grams = x.unfold(1, n, 1).flatten(0, 1)  # (N (L - n + 1), n)
        product *= len(grams.unique(dim=0)) / len(grams)
    return product


def mauve_score(texts, references, device, seed):
    import mauve
    return mauve.compute_mauve(p_text=references, q_text=texts, featurize_model_name='gpt2-large', max_text_length=1024, seed=seed,
                               device_id=0 if device.type == 'cuda' else -1, verbose=False).mauve


def denoiser_calls(method, L, steps, options):
    """For the tokens, when --steps says `steps`: None where it has no say and there is no denoiser (AR), L for first hitting."""
    if inspect.signature(method.sample).parameters['steps'].default is not inspect.Parameter.empty:
        return None
    return L if options.get('sampler') == 'first_hitting' else steps


def sampling_gflops(method, L, calls, options):
    """Per sample, by method.flops: every denoiser call as if it ran on the whole sequence (ours skips those in which nothing is revealed).

    calls None: one for the whole text (AR keeps keys and values, and computes each position once). Heads are left out.
    """
    flops = (1 if calls is None else calls) * method.flops(L) + (method.flops_once(L) if hasattr(method, 'flops_once') else 0)
    if options.get('strategy') == 'seq':  # the latent comes from its own network, or from the big one with all tokens masked
        c = method.config
        flops += options['latent_steps'] * (method.latent_dit.flops(c.num_latents) if c.latent_layers else method.flops(L))
    return flops / 1e9


# ----------------------------------------------------------------------------------------------------------------------------------
# the teacher

def open_teacher(name, config, tok, device):
    """-> (score: ids (N, L) -> (nats, how many tokens were scored), and what a result says about the teacher)."""
    hub = not is_run(name)
    if hub and config.get('dataset') == 'sawtooth':
        raise UserError('sawtooth has no text: its teacher is a sawtooth AR, --teacher=out/NAME')
    if hub:
        teacher = hub_model('AutoModelForCausalLM', name, device, 'teacher')
        teacher_tok = load_tokenizer({'kind': 'huggingface', 'name': name})
        same, window, context = False, min(1024, getattr(teacher.config, 'max_position_embeddings', 1024)), 1  # BLOOM has no limit

        def nll(ids):
            logits = teacher(ids).logits[:, :-1].float()
            return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction='none').sum(dim=1)
    else:
        teacher, checkpoint = load_method(name, device)
        theirs = checkpoint['config']
        if theirs['method'] != 'ar':
            raise UserError(f'the teacher {name} is {theirs["method"]}, which bounds a likelihood; it has to be ar, or a causal model of the Hugging Face hub')
        teacher_tok, window, context, nll = open_tokenizer(theirs), theirs['block_size'], 0, teacher.nll
        same = tokenizer_spec(theirs, teacher_tok) == tokenizer_spec(config, tok)
        if not same and 'sawtooth' in (config.get('dataset'), theirs.get('dataset')):
            raise UserError(f'{name} was trained on {theirs.get("dataset")}, which has nothing in common with {config.get("dataset")}')

    def recode(ids):
        """Our ids -> the teacher's; the text between EOS and BOS by its tokenizer, those two become its EOS."""
        special, out = (tok.eos_id, tok.bos_id), []
        for boundary, run_of in itertools.groupby(ids, key=lambda i: i in special):
            run_of = list(run_of)
            out += [teacher_tok.eos_id] * len(run_of) * (teacher_tok.eos_id is not None) if boundary else teacher_tok.encode(tok.decode(run_of))
        return torch.tensor(out, dtype=torch.int64)

    @torch.no_grad()
    def score(x):
        texts = x if same else map(recode, x.tolist())
        windows = sorted((w for ids in texts for w in ids.split(window) if len(w) > context), key=len)
        nats, tokens = 0.0, 0
        for length, group in itertools.groupby(windows, key=len):  # batches of one length need no padding
            for batch in torch.stack(list(group)).split(4):
                nats += nll(batch.to(device)).double().sum().item()
                tokens += len(batch) * (length - context)
        return nats, tokens
    rule = f'whole samples, in windows of {window} tokens of the teacher, ' + ('first token of each not scored' if hub else 'all tokens scored')
    return score, {'teacher': name, 'teacher_weights': fingerprint(teacher), 'teacher_dtype': 'float32', 'gen_ppl_rule': rule}


def gen_ppl(score, x):
    """-> Gen PPL of ids x (N, L), and how many tokens of the teacher were scored."""
    nats, tokens = score(x)
    return math.exp(nats / tokens) if tokens else math.nan, tokens


# ----------------------------------------------------------------------------------------------------------------------------------

def variants(c, method):
    """sampling_options for each of --latent_steps."""
    return [sampling_options(SimpleNamespace(**{**vars(c), 'latent_steps': n}), method) for n in numbers('latent_steps', c.latent_steps)]


def print_table(results, out):
    """The numbers, one line per result."""
    columns = ['metric', 'data', 'strategy', 'steps', 'latent_steps', 'val_ppl', 'token_ppl', 'reconstruction', 'smoothness', 'gen_ppl', 'entropy_position',
               'entropy_sample', 'diversity', 'mauve', 'swd', 'samples_per_s', 'gflops']
    columns = [c for c in columns if any(r.get(c) is not None for r in results)]
    cells = [columns] + [['' if r.get(c) is None else f'{r[c]:.4g}' if isinstance(r[c], float) else str(r[c]) for c in columns] for r in results]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for row in cells:
        print('  '.join(cell.rjust(w) for cell, w in zip(row, widths)), file=out)


def main(argv):
    # ------------------------------------------------------------------------
    # everything that can be wrong, before anything is computed or written
    c = read_arguments(defaults, argv)
    metrics, steps_list = c.metrics.split(','), numbers('steps', c.steps)
    for m in metrics:
        if m not in METRICS:
            raise UserError(f'no metric {m!r}: {nearest(m, METRICS)}')
    if c.nll_draws < 1 or c.val_seqs < 0:
        raise UserError('nll_draws must be at least 1, and val_seqs not negative')
    device = pick_device(c.device)
    method, config = open_model(c, device)
    all_options = variants(c, method)
    tok, L = open_tokenizer(config), config['block_size']
    for metric, (function, words) in TEXT_METRICS.items():
        if metric in metrics and not hasattr(method, function):
            raise UserError(f'{config["method"]} has no {words}: leave {metric} out')
    if {*TEXT_METRICS, 'mauve'} & set(metrics):
        rows, n = open_texts(c.data, config, tok)
        n = min(n, c.val_seqs or n)
        if n < 2 and 'smoothness' in metrics:
            raise UserError('smoothness wants two texts at least, and there is one')
    if set(TEXT_METRICS) & set(metrics) and config.get('encoder_weights'):
        name = config.get('encoder') or config['token_encoder']
        if fingerprint(open_encoder(name, device).model) != config['encoder_weights']:
            raise UserError(f'{name} has other weights than the encoder that this model was trained with; put those back, or train it anew')
    if {'gen_ppl', 'smoothness'} & set(metrics):
        score, teacher = open_teacher(c.teacher, config, tok, device)
    if 'swd' in metrics:
        if config.get('dataset') != 'sawtooth':
            raise UserError('swd is a metric of sawtooth')
        from sawtooth import swd
    if 'mauve' in metrics:
        if config.get('dataset') == 'sawtooth':
            raise UserError('mauve is a metric of text, which sawtooth is not')
        try:
            import mauve  # noqa: F401
        except ImportError as e:
            raise UserError('mauve needs `pip install mauve-text`') from e
    if c.plot:
        from lib import plot
        if not c.out_dir:
            raise UserError('--plot draws from out/NAME/eval.jsonl: it goes with --out_dir')

    if c.out_dir:
        append(os.path.join(c.out_dir, 'eval.jsonl'))
    common = {'model': c.out_dir or c.init_from, 'method': config['method'], 'step': config['step'], 'weights': fingerprint(method),
              'dataset': config.get('dataset'), 'L': L, 'seed': c.seed, 'batch_size': c.batch_size, 'dtype': c.dtype, 'compile': c.compile,
              'device': device_name(device), 'torch': torch.__version__, 'command': shlex.join(['python', 'eval.py', *argv])}
    results = []

    def report(result):
        result |= common
        print(json_line(result), end='', flush=True)
        if c.out_dir:
            append(os.path.join(c.out_dir, 'eval.jsonl'), result)
        results.append(result)

    autocast = torch.autocast(device.type, torch.bfloat16, enabled=c.dtype == 'bfloat16')

    # ------------------------------------------------------------------------
    # texts
    if 'val_ppl' in metrics:
        strategy = all_options[0].get('strategy', 'joint')
        with autocast:
            values = likelihood(method, rows, n, L, c.batch_size, c.seed, c.nll_draws, strategy)
        if 'val_ppl' in values:
            values['val_ppl_is'] = 'exact' if config['method'] == 'ar' else 'an upper bound'
        if 'token_ppl' in values:
            values |= {'token_ppl_is': 'the token channel, given the latent of the text itself: no bound', 'strategy': strategy}
        report({'metric': 'likelihood', 'data': c.data or config['dataset'], **values, 'num_texts': n, 'nll_draws': c.nll_draws})
    if 'reconstruction' in metrics:
        with autocast:
            share = reconstruction(method, rows, n, c.batch_size)
        report({'metric': 'reconstruction', 'data': c.data or config['dataset'], 'reconstruction': share, 'num_texts': n})
    if 'smoothness' in metrics:
        pairs, weights = min(c.num_samples, n // 2), torch.linspace(0, 1, 11)
        with autocast:
            points = interpolations(method, rows, n, pairs, c.batch_size, c.seed, weights)
        path = [gen_ppl(score, x)[0] for x in points]
        report({'metric': 'smoothness', 'data': c.data or config['dataset'], 'smoothness': max(path) / ((path[0] + path[-1]) / 2),
                'points': [i / 10 for i in range(11)], 'gen_ppl_path': path, 'entropy_sample_path': [entropies(x)['entropy_sample'] for x in points],
                'num_pairs': pairs, 'num_texts': n, **teacher})

    # ------------------------------------------------------------------------
    # samples are drawn once for all metrics
    for options in all_options if set(metrics) - set(TEXT_METRICS) else []:
        with autocast:
            generate(method, min(c.num_samples, c.batch_size), min(steps_list[0], 2), c.batch_size, c.seed, **options)  # warm-up
        for calls, steps in {denoiser_calls(method, L, steps, options): steps for steps in steps_list}.items():
            clock, cpu_clock = time.perf_counter(), time.process_time()
            with autocast:
                x = generate(method, c.num_samples, steps, c.batch_size, c.seed, **options)
            seconds, cpu_seconds = (time.perf_counter() - clock) / c.num_samples, (time.process_time() - cpu_clock) / c.num_samples
            result = {'metric': 'samples', 'steps': calls, 'num_samples': c.num_samples, **options}
            if 'gen_ppl' in metrics:
                ppl, tokens = gen_ppl(score, x)
                result |= {'gen_ppl': ppl, 'teacher_tokens': tokens, **teacher}
            result |= entropies(x)
            if 'diversity' in metrics:
                result['diversity'] = diversity(x)
            if 'mauve' in metrics:
                references = rows(torch.arange(min(c.num_samples, n)))
                result['mauve'] = mauve_score([tok.decode(i) for i in x.tolist()], [tok.decode(i) for i in references.tolist()], device, c.seed)
            if 'swd' in metrics:
                result['swd'] = swd(x)
            result |= {'gflops': sampling_gflops(method, L, calls, options), 'seconds_per_sample': seconds, 'cpu_seconds_per_sample': cpu_seconds,
                       'samples_per_s': 1 / seconds}
            if 'gen_ppl' in result:
                result['samples_per_s_per_gen_ppl'] = 1 / seconds / result['gen_ppl']
            report({**result, 'eos': 'kept: a sample is a chunk of documents joined by EOS'})

    print_table(results, sys.stderr)
    if c.plot:
        plot.frontier(plot.measured([c.out_dir]), os.path.join(c.out_dir, 'frontier.png'), sys.stderr)


if __name__ == '__main__':
    run(main)
