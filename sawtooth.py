"""
Sawtooth: a toy language of which everything is known (LADD section 5.1, appendix E.1).

A text is L = 128 coin flips whose bias is a triangle wave, k = 2 periods long, shifted by a random w:
    s_l = k ((l / L + w) mod 1) mod 1,    p(x_l = 1 | w) = m + (1 - 2m)(1 - |2 s_l - 1|),    w ~ U[0, 1)
                                                                                          LADD eq. (78), (79)
Given w the tokens are independent; without it each is a fair coin. So the shift is all there is to learn,
and a good latent is w. A mixture over one number can be integrated: the exact p(x_l | visible tokens) is
here, as a denoiser that fits the samplers.

    python sawtooth.py out/sawtooth_*     the paper's Table 1 and Figure 2 for those runs; a .jsonl among
                                          them adds kept results
"""
import functools
import itertools
import json
import os
import re
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

from baselines.exact import EXACT_SAMPLERS
from ladd import code_step, joint
from lib.checkpoint import fingerprint
from lib.configurator import Keys, UserError, configure, key, numbers, run
from lib.device import compile_in_place, pick_device
from lib.files import append, read_lines
from lib.noise import Noise
from mdlm import alpha, ancestral, time_grid
from methods import open_run

L, K, M = 128, 2, 0.01  # tokens, periods, smallest probability
PERIOD = 1 / K  # shifts that differ by this are the same text distribution


def bias(w):
    """p(x_l = 1 | w): w (...,) -> (..., L)."""
    s = K * ((torch.arange(L, device=w.device) / L + w[..., None]) % 1) % 1
    return M + (1 - 2 * M) * (1 - (2 * s - 1).abs())


class Sawtooth:
    """The data: an infinite stream, a function of seed, step and row; `rows` are the validation texts."""
    vocab_size, block_size, tokenizer, wrap = 2, L, None, False

    def __init__(self, split='train'):
        self.split = split

    def batch(self, seed, step, rows):
        """rows int64 (b,) -> a batch of texts, (ids (b, L) int64,)."""
        noise = Noise(seed, step, rows, None)
        p = bias(noise.uniform('shift ' + self.split))
        return (noise.uniform('tokens ' + self.split, L) < p).long(),

    def rows(self, idx):
        return self.batch(0, 0, idx)

    def texts(self, n):
        """The first n validation texts, (n, L)."""
        return self.rows(torch.arange(n))[0]

    def __len__(self):
        return 2**31


# ------------------------------------------------------------------------------------------------------------
# exact answers

class Exact:
    """The exact denoiser: a posterior over `points` shifts of one period, given the visible tokens."""

    def __init__(self, points=512, device='cpu'):
        self.p = bias((torch.arange(points, device=device) + 0.5) / points * PERIOD)  # (P, L)
        self.log_ratio, self.log_p0 = (self.p / (1 - self.p)).log().T, (1 - self.p).log().T  # (L, P)

    def log_likelihood(self, x):
        """log p(visible tokens | shift): x (n, L) with 0, 1 or 2 = [mask] -> (n, P)."""
        return (x == 1).float() @ self.log_ratio + (x != 2).float() @ self.log_p0

    def predict(self, b, leave_one_out=False):
        """p(x_l = 1 | evidence) of any kind: b (n, L) -> (n, L); leave_one_out: without the evidence at l.

        b_l in [-1, 1] is what position l says by itself, p(x_l = 1 | it) - p(x_l = 0 | it) for a fair coin:
        0 for [mask], +-1 for a visible token, +-alpha for one that is kept with probability alpha and else
        drawn anew, tanh(r / 2) for a log-likelihood ratio r. With a_l = 2 p_l - 1 the likelihood of a shift
        is prod_l (1 + a_l b_l), up to a constant.
        """
        a, means = 2 * self.p - 1, []
        for part in b.split(max(1, 2**18 // a.numel())):
            likelihood = 1 + a * part[:, None]                                         # (n, P, L)
            posterior = likelihood.log().sum(dim=2).softmax(dim=1)
            slope = (posterior[:, None] @ (a / likelihood))[:, 0]  # of log p(evidence), linear in every b_l
            mean = slope / (1 - part * slope)              # E[a_l | the evidence elsewhere]
            means.append(mean if leave_one_out else (mean + part) / (1 + mean * part))
        return (1 + torch.cat(means)) / 2

    def denoise(self, x_t, where):
        """A drop-in for MDLM's network, logits (where.sum(), 2): `predict` by matrix products."""
        p1 = (self.log_likelihood(x_t).softmax(dim=1) @ self.p)[where]
        return torch.stack((1 - p1, p1), dim=1).log()

    def after(self, x, order, a=0):
        """p(x_d = 1 | the tokens before d that are visible), for d >= a: x, and order, its places, (n, L)."""
        parts = []
        for y, places in zip(x.split(256), order.split(256)):
            x_t = torch.full((len(y), L), 2).scatter_(1, places[:, :a], y[:, :a])
            y, places = y[:, a:], places[:, a:]
            log_p = (y == 1)[..., None] * self.log_ratio[places] + (y != 2)[..., None] * self.log_p0[places]
            before = self.log_likelihood(x_t)[:, None] + log_p.cumsum(dim=1) - log_p
            posterior = before.softmax(dim=2)                                          # (n, L - a, P)
            parts.append((posterior * self.p.T[places]).sum(dim=2))
        return torch.cat(parts)

    def joint_denoise(self, x_t, z_t, t, where):
        """The same with the shift as the one code: z_t (n, 1) in 0 ... P-1, or P for [mask].

        -> token logits (where.sum(), 2), code logits (n, 1, P)
        """
        posterior = self.log_likelihood(x_t)
        known = z_t[:, 0] < len(self.p)
        p1 = torch.where(known[:, None], self.p[z_t[:, 0] % len(self.p)], posterior.softmax(dim=1) @ self.p)
        p1 = p1[where]
        return torch.stack((1 - p1, p1), dim=1).log(), posterior[:, None]

    def nll(self, x):
        """-log p(x), nats (n,): the least ELBO that any MDLM can have. On average 0.5303 L."""
        return np.log(len(self.p)) - self.log_likelihood(x).logsumexp(dim=1)

    def oracle(self):
        """H(x | w) / L, nats per token: 0.5096."""
        p, q = self.p, 1 - self.p
        return float(-(torch.special.xlogy(p, p) + torch.special.xlogy(q, q)).mean())


# ------------------------------------------------------------------------------------------------------------
# the distance: LADD eq. (85) to (88)

@functools.lru_cache(maxsize=4)
def reference(draw, n, directions):
    """Sorted projections (directions, n) of the draw-th reference sample, fp32."""
    return project(Sawtooth(f'reference {draw}').texts(n), directions)


def project(x, directions):
    theta = torch.randn(directions, L, generator=torch.Generator().manual_seed(0))
    theta = theta / theta.norm(dim=1, keepdim=True)
    with torch.autocast('cpu', enabled=False):
        return torch.from_numpy(np.sort((theta @ x.float().T).numpy(), axis=1))


def distances(x, draws, directions=1000):
    """Sliced Wasserstein distances, of order 1, of x (n, L), raw {0, 1} vectors, to `draws` fresh sets."""
    px = project(x, directions)
    return [(px - reference(d, len(x), directions)).abs().mean().item() for d in range(draws)]


def swd(x, draws=3, directions=1000):
    """The mean of the distances, a float."""
    return float(np.mean(distances(x, draws, directions)))


# ------------------------------------------------------------------------------------------------------------
# what is measured of a trained method, and of the exact denoisers through the same samplers

PAPER = {'oracle': 0.5075, 'MDLM': 0.5301, 'Di-LADD joint': 0.5055, 'Di-LADD seq': 0.5067,
         'Co-LADD joint': 0.4109, 'Co-LADD seq': 0.2558}
LATENT_STEPS = {'Co-LADD': 32, 'Di-LADD': 1}  # of sequential sampling; a single code needs one
LADD_EXACT = ['joint', 'joint ahead', 'seq']
BASELINES = ('FLM', 'Duo', 'CANDI', 'VADD', 'CADD', 'SSMD')
NO_LATENT = ('MDLM', *BASELINES, 'distilled Duo')


def draw(method, n, steps, strategy='joint', seed=0, batch=256):
    """n texts (n, L) from a trained method."""
    generator = torch.Generator(next(method.parameters()).device).manual_seed(seed)
    options = {'latent_steps': LATENT_STEPS[method.name]} if strategy == 'seq' else {}
    return torch.cat([method.sample(min(batch, n - i), steps, strategy, generator=generator, **options).cpu()
                      for i in range(0, n, batch)])


@torch.no_grad()
def token_losses(method, n, batch=256):
    """Table 1: token loss in nats per token over n fresh texts -> a record for each strategy.

    LADD's is given the latent noised at t_z = t_x (joint), and given the clean one (seq).
    """
    device = next(method.parameters()).device
    x, rows = Sawtooth('table 1').texts(n).to(device), torch.arange(n, device=device)
    noise, records = Noise(0, 0, rows, n), []
    options = {} if method.name in NO_LATENT else {'tokens_only': True}
    for strategy in method.strategies:
        parts = [method.nll_parts(x[i:i + batch], noise[i:i + batch], strategy, **options)
                 for i in range(0, n, batch)]
        losses = torch.cat([p['token'] if 'token' in p else p['val'] for p in parts]) / L
        error = (losses.std() / n**0.5).item()
        records.append(dict(strategy=strategy, n=n, token_loss=losses.mean().item(), error=error))
    return records


@torch.no_grad()
def gap_to_exact(method, n=2048):
    """KL from the exact denoiser to MDLM's, nats per masked token, half of the tokens visible -> records.

    On data, and on fair coin flips. Likelihood training asks for the first only; the second is what a
    sampler of two steps shows the network, because its first step sees nothing.
    """
    device, exact = next(method.parameters()).device, Exact()
    noise, records = Noise(0, 0, torch.arange(n), n), []
    coins = (noise.uniform('coins', L) < 0.5).long()
    for kind, x in ('data', Sawtooth('gap').texts(n)), ('coins', coins):
        x_t = torch.where(noise.uniform('visible', L) < 0.5, x, 2)
        with torch.autocast('cpu', enabled=False):  # exact values are not to be rounded
            p = exact.denoise(x_t, x_t == 2).log_softmax(dim=-1)
        logits = torch.cat([method.denoise(part, part == 2) for part in x_t.to(device).split(128)])
        q = logits.cpu().float().log_softmax(dim=-1)
        wave = {name: (v.exp()[:, 1] - 0.5).abs().mean().item() for name, v in (('network', q), ('bayes', p))}
        records.append(dict(visible=kind, n=n, kl=(p.exp() * (p - q)).sum(dim=-1).mean().item(), **wave))
    return records


def exact_draw(kind, n, steps, seed=0, batch=1024):
    """n texts (n, L) from exact denoisers. ValueError for an unknown kind.

    kind: 'MDLM'; with the shift as the latent 'joint', 'joint ahead' (its alpha is 1 - t^2) or 'seq'; or one
    of EXACT_SAMPLERS in baselines/exact.py.
    """
    g = torch.Generator().manual_seed(seed)
    if kind in EXACT_SAMPLERS:
        return EXACT_SAMPLERS[kind](Exact(64), n, steps, g)
    if kind not in ('MDLM', *LADD_EXACT):
        raise ValueError(f'no exact {kind}; there are: {"; ".join(("MDLM", *LADD_EXACT, *EXACT_SAMPLERS))}')
    exact, alphas = Exact(), alpha(time_grid(steps))
    P, texts, schedule = len(exact.p), [], 'polynomial' if kind == 'joint ahead' else 'linear'

    def latent_step(z, prediction, t, s):
        return code_step(z, prediction, t, s, schedule, g)
    for i in range(0, n, batch):
        x = torch.full((min(batch, n - i), L), 2)
        if kind == 'MDLM':
            texts.append(ancestral(exact.denoise, x, alphas, 2, generator=g))
            continue
        # seq: the shift is drawn first, uniformly; then the sampler has nothing left to do for the latent
        z = torch.randint(P, (len(x), 1), generator=g) if kind == 'seq' else torch.full((len(x), 1), P)
        texts.append(joint(exact.joint_denoise, x, z, steps, alphas, latent_step, 2, generator=g))
    return torch.cat(texts)


def exact_records(n, steps, names):
    """Those of MDLM, and of the other methods among the names."""
    d = distances(Sawtooth('fresh').texts(n), 3)
    floor = [dict(name='data', n=n, swd=float(np.mean(d)), error=float(np.std(d, ddof=1)))]
    of_ladd = LADD_EXACT if any(name in LATENT_STEPS for name in names) else []
    kinds = ['MDLM', *of_ladd, *(b for b in BASELINES if b in names)]
    return floor + [dict(name='exact', strategy=kind, steps=T, n=n, swd=swd(exact_draw(kind, n, T)))
                    for kind in kinds for T in steps]


# ------------------------------------------------------------------------------------------------------------
# tables and pictures

def distinguish_folders(records):
    """Where runs of a method differ in more than the seed (out/A, out/A_seed1), the folder joins the name."""
    def folder(r):
        return re.sub(r'_seed\d+$', '', r['out_dir'])
    names = [name for name, _ in {(r['name'], folder(r)) for r in records}]
    return [dict(r, name=f'{r["name"]} ({folder(r)})') if names.count(r['name']) > 1 else r for r in records]


def grouped(records, value, *keys):
    """{the keys of a record: [value of each run]}, in the order of the records that have that value."""
    found = {}
    for r in records:
        if value in r:
            found.setdefault(tuple(r.get(k) for k in keys), []).append(r[value])
    return found


def curves(records):
    """{curve: {steps: [SWD of each run]}}, steps rising."""
    found = {}
    with_steps = sorted((r for r in records if 'steps' in r), key=lambda r: r['steps'])
    for (name, strategy, steps), values in grouped(with_steps, 'swd', 'name', 'strategy', 'steps').items():
        curve = name if name.split(' (')[0] in NO_LATENT else f'{name} {strategy}'
        found.setdefault(curve, {})[steps] = values
    return found


def print_tables(records):
    from lib.plot import print_table  # here, because it brings matplotlib along

    def cells(*values):
        return [v if isinstance(v, str) else '-' if v is None else f'{v:.4f}' for v in values]
    rows = [['oracle: the shift is known', *cells(None, Exact().oracle(), PAPER['oracle'])]]
    for (name, strategy), losses in grouped(records, 'token_loss', 'name', 'strategy').items():
        method, given = name.split(' (')[0], 'clean latent' if strategy == 'seq' else 'latent at t_z = t_x'
        if method in NO_LATENT:
            rows.append([name, *cells(np.mean(losses), 0.5303, PAPER.get(method))])
        else:
            rows.append([f'{name}, {given}', *cells(np.mean(losses), None, PAPER[f'{method} {strategy}'])])
    error = np.mean([r['error'] for r in records if 'token_loss' in r] or 0)
    print_table(f'token loss, nats per token, ± {error:.4f} for the texts (LADD table 1)',
                ['ours', 'exact', 'paper'], rows, sys.stdout)
    gaps = [grouped(records, k, 'name', 'visible') for k in ('kl', 'network', 'bayes')]
    if gaps[0]:
        rows = [[f'{name}, {"of a text" if kind == "data" else "fair coins"}',
                 *cells(*(np.mean(gap[name, kind]) for gap in gaps))] for name, kind in gaps[0]]
        print_table('against the exact denoiser, half of the tokens visible',
                    ['KL', 'mean |p - 1/2|: network', 'exact'], rows, sys.stdout)
    table, floor = curves(records), [r for r in records if r['name'] == 'data']
    steps = sorted({T for curve in table.values() for T in curve})
    rows = [['data against data', *cells(*[np.mean([r['swd'] for r in floor])] * len(steps)), '']]
    for name, curve in sorted(table.items(), key=lambda item: item[0].startswith('exact')):
        runs = dict.fromkeys(str(len(curve[T])) for T in steps if T in curve)
        means = [np.mean(curve[T]) if T in curve else None for T in steps]
        rows.append([name, *cells(*means), ', '.join(runs)])
    title = f'SWD from {floor[0]["n"]:,} samples, ± {floor[0]["error"]:.4f} for the draw; token steps'
    print_table(title, [*map(str, steps), 'runs'], rows, sys.stdout)


def figure(records, path):
    """LADD figure 2: SWD against token steps.

    Lines: trained, mean and range over seeds; dashes: exact; grey: the floor.
    """
    from lib.plot import curve, literally, log_scale, plt, save
    colors = {'MDLM': 'C0', 'Di-LADD joint': 'C1', 'Di-LADD seq': 'C2', 'Co-LADD joint': 'C3',
              'Co-LADD seq': 'C4', 'exact MDLM': 'C0', 'exact joint': 'C1', 'exact seq': 'C2',
              'exact joint ahead': 'C7', 'FLM': 'C5', 'exact FLM': 'C5', 'Duo': 'C6', 'exact Duo': 'C6',
              'CANDI': 'C7', 'exact CANDI': 'C7', 'VADD': 'C8', 'exact VADD': 'C8', 'CADD': 'C9',
              'exact CADD': 'C9', 'SSMD': 'k', 'exact SSMD': 'k', 'distilled Duo': 'y'}
    chart = plt.figure(figsize=(7, 4.2))
    for name, values in curves(records).items():
        exact, runs = name.startswith('exact'), sorted({len(v) for v in values.values()})
        style = dict(ls='--', lw=1, alpha=0.7) if exact else dict(marker='o', ms=3)
        label = name if exact else f'{name} ({" or ".join(map(str, runs))} seed{"s" * (runs[-1] > 1)})'
        curve(plt.gca(), list(values), list(values.values()), color=colors.get(name),
              label=literally(label), **style)
    floor = np.mean([r['swd'] for r in records if r['name'] == 'data'])
    plt.axhline(floor, color='grey', lw=1, label='data against data')
    plt.xscale('log', base=2)
    plt.gca().xaxis.set_major_formatter('{x:.0f}')
    log_scale(plt.gca().yaxis)
    plt.xlabel('token steps')
    plt.ylabel('sliced Wasserstein distance')
    plt.legend(fontsize=7, ncol=2)
    save(chart, path)


def pictures(panels, path):
    """Samples as images, a text in each row, sorted by likeliest shift: coherent texts show diagonal waves.

    panels: {title: (n, L)}.
    """
    from lib.plot import plt, save
    exact, columns = Exact(), -(-len(panels) // 2)
    chart, axes = plt.subplots(2, columns, figsize=(2.4 * columns, 4.6), squeeze=False)
    for ax in axes.flat:
        ax.axis('off')
    for ax, (title, x) in zip(axes.flat, panels.items()):
        x = x[exact.log_likelihood(x).argmax(dim=1).argsort()]
        ax.imshow(x.numpy(), cmap='Blues', aspect='auto', interpolation='nearest')
        ax.set_title(title, fontsize=8)
    save(chart, path)


def report(method):
    """What train.py prints at the end: token loss and SWD beside the exact values, from few samples."""
    if method.name not in (*NO_LATENT, *LATENT_STEPS):
        return
    n, steps = 4096, (1, 2)
    records = [dict(r, name=method.name) for r in token_losses(method, n // 4)]
    jobs = [(strategy, T) for strategy in method.strategies for T in steps]
    with tqdm(total=sum(T for _, T in jobs), desc=f'sampling {n:,} texts each', unit='step') as bar:
        for strategy, T in jobs:
            x = draw(method, n, T, strategy)
            records.append(dict(name=method.name, strategy=strategy, steps=T, n=n, swd=swd(x)))
            bar.update(T)
    print_tables(records + exact_records(n, steps, [method.name]))


# ------------------------------------------------------------------------------------------------------------
# python sawtooth.py out/sawtooth_*

@dataclass
class Config(Keys):
    num_samples: int = key(20480, at_least=1)
    steps: str = '1,2,4,8,16,32'  # token steps
    device: str = 'cpu'
    compile: bool = False         # torch.compile the networks: half the time, once it is done
    save: str = 'out/sawtooth'    # -> out/sawtooth.png, out/sawtooth_samples.png


# the kinds of results: what each holds besides whose it is
RESULTS = ({'token_loss', 'error', 'strategy'}, {'swd', 'strategy', 'steps'},
           {'kl', 'visible', 'network', 'bayes'})


def read_results(path, n):
    """The results from n samples, and gaps to the exact denoiser, in a .jsonl file.

    UserError if it holds anything else.
    """
    texts = ['name', 'out_dir', 'weights', 'strategy', 'visible']
    records = read_lines(path, {'n'}.union(*RESULTS).difference(texts), texts)
    drawn = [*itertools.product(NO_LATENT, ('joint',)), *itertools.product(LATENT_STEPS, ('joint', 'seq'))]
    for i, r in enumerate(records):
        there = {k for k, v in r.items() if v is not None}
        complete = there >= {'out_dir', 'weights', 'n'} and any(there >= kind for kind in RESULTS)
        if not complete or (r.get('name'), r.get('strategy', 'joint')) not in drawn:
            raise UserError(f'{path}, line {i + 1} is no result of sawtooth.py')
    return [r for r in records if r['n'] == n or 'kl' in r]


def measure(out_dir, c, steps, panels):
    """The records of a run.

    They are kept in out_dir, since sampling takes long. Samples for the picture are added to panels.
    """
    n, device = c.num_samples, pick_device(c.device)
    method, config = open_run(out_dir, device)
    if config['dataset'] != 'sawtooth' or method.name not in (*NO_LATENT, *LATENT_STEPS):
        raise UserError(f'{out_dir} is {config["method"]} on {config["dataset"]}; the tables are of '
                        f'{", ".join((*NO_LATENT, *LATENT_STEPS))} on sawtooth')
    if c.compile:
        compile_in_place(method.backbones(), device)
    out_dir = os.path.normpath(out_dir)
    path = os.path.join(out_dir, 'sawtooth.jsonl')
    common = dict(name=method.name, step=config['step'], seed=config['seed'], weights=fingerprint(method))
    records = [dict(r, out_dir=out_dir) for r in read_results(path, n)
               if r['weights'] == common['weights']]  # it may be renamed

    def keep(*new):
        for r in new:
            records.append({**common, 'out_dir': out_dir, **r})
            append(path, records[-1])  # first: what it is printed to may be gone
            print(json.dumps(records[-1]), flush=True)
    with torch.autocast(device.type, torch.bfloat16, enabled=config['dtype'] == 'bfloat16'):
        if not any('token_loss' in r for r in records):
            keep(*token_losses(method, n))
        if method.name == 'MDLM' and not any('kl' in r for r in records):
            keep(*gap_to_exact(method))
        for strategy in method.strategies:
            for T in steps if strategy == 'joint' else [T for T in steps if T <= 8]:  # seq is flat
                if not any(r.get('steps') == T and r['strategy'] == strategy for r in records):
                    keep(dict(strategy=strategy, steps=T, n=n, swd=swd(draw(method, n, T, strategy))))
            for T in (1, 2):
                name = method.name if len(method.strategies) == 1 else f'{method.name} {strategy}'
                title = f'{name}, {T} step{"s" * (T > 1)}'
                if title not in panels:
                    panels[title] = draw(method, 128, T, strategy)
    return records


def main(argv):
    c = SimpleNamespace(**configure(Config, [a for a in argv if a.startswith('-')]))
    names = [a for a in argv if not a.startswith('-') and not a.endswith('.png')]  # pictures are ours
    if not names:
        raise UserError('which runs? python sawtooth.py out/sawtooth_* --num_samples=20480')
    steps, n = numbers('steps', c.steps), c.num_samples
    os.makedirs(os.path.dirname(c.save) or '.', exist_ok=True)
    records, panels = [], {}
    for name in names:
        if not name.endswith('.jsonl'):
            records += measure(name, c, steps, panels)
        elif os.path.exists(name):  # results of runs whose checkpoints are gone
            records += read_results(name, n)
        else:
            raise UserError(f'there is no file {name}')
    # a run may be among the .jsonl, too
    unique = {(r['weights'], r.get('strategy'), r.get('steps'), r.get('visible')): r for r in records}
    records = distinguish_folders(list(unique.values()))
    names = {r['name'].split(' (')[0] for r in records}
    records += exact_records(n, sorted({r['steps'] for r in records if 'steps' in r}), names)
    print_tables(records)
    panels = {'data': Sawtooth('fresh').texts(128), 'exact MDLM, 1 step': exact_draw('MDLM', 128, 1)} | panels
    figure(records, c.save + '.png')
    pictures(panels, c.save + '_samples.png')
    print(f'wrote {c.save}.png and {c.save}_samples.png')


if __name__ == '__main__':
    run(main, Config)
