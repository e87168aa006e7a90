"""
The pictures of README.md and TUTORIAL.md. Each command draws one again, in its place.

    python -m examples.figures wave                              a bias, and texts drawn from it
    python -m examples.figures noise                             tokens and latent, joint and sequential
    python -m examples.figures posterior                         what visible tokens tell about the shift
    python -m examples.figures barrier                           texts of exact denoisers in few steps
    python -m examples.figures neighbours [out/A out/B ...]      SWD of exact and trained samplers
    python -m examples.figures latents [out/A out/B ...]         learned codes on text, and their controls
    python -m examples.figures collapse [out/A out/B ...]        LDLM's latents with and without warmup
    python -m examples.figures denoising out/sawtooth_co_ladd    joint beside sequential sampling, moving
    options: --save=FILE, and of denoising --steps=4 --latent_steps=16
"""
import os
import re
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from ladd import abar
from lib.checkpoint import is_run
from lib.configurator import Keys, UserError, configure, key, run
from lib.files import append, read_lines
from lib.plot import ASSETS, check_ending, curve, literally, log_scale, plt, save
from mdlm import alpha
from methods import open_run
from sawtooth import PERIOD, Exact, L, Sawtooth, bias, exact_draw, grouped, pictures, swd

TOKENS = ListedColormap(['#eaf2fb', '#08306b', '#e6c88f'])  # of 0, 1 and 2 = [mask]


@dataclass
class Config(Keys):
    save: str = ''                 # the picture; empty: its place in assets/


@dataclass
class DenoisingConfig(Config):
    steps: int = key(4, at_least=1)          # that reveal tokens
    latent_steps: int = key(16, at_least=1)  # before them, of sequential sampling


def draw_tokens(ax, x, **options):
    """Tokens (rows, columns) as an image -> the image."""
    ax.set(yticks=[])
    return ax.imshow(x.numpy(), cmap=TOKENS, vmin=0, vmax=2, aspect='auto', interpolation='nearest',
                     **options)


def explain_tokens(chart, kinds=3, **options):
    """A legend for TOKENS."""
    patches = [Patch(facecolor=TOKENS(i), edgecolor='grey', label=name)
               for i, name in enumerate(('0', '1', '[mask]')[:kinds])]
    chart.legend(handles=patches, ncols=kinds, frameon=False, **options)


# ------------------------------------------------------------------------------------------------------------
# chapters 1 to 4

def wave(path):
    """The bias for one shift, and eight texts drawn from it."""
    p = bias(torch.tensor(0.1))
    texts = (torch.rand(8, L, generator=torch.Generator().manual_seed(0)) < p).long()
    chart, (top, bottom) = plt.subplots(2, 1, figsize=(7, 2.8), sharex=True, height_ratios=(3, 2))
    top.plot(p, color='C3')
    top.set(ylabel='p(token is 1)')
    draw_tokens(bottom, texts)
    bottom.set(xlabel='place in the text', ylabel='8 texts')
    explain_tokens(chart, 2, loc='upper right')
    save(chart, path)


def posterior(path):
    """p(shift | visible tokens) of the exact denoiser, as one text is uncovered."""
    exact, w, generator = Exact(), 0.2, torch.Generator().manual_seed(1)
    x = (torch.rand(L, generator=generator) < bias(torch.tensor(w))).long()
    order = torch.randperm(L, generator=generator)
    shifts = (torch.arange(len(exact.p)) + 0.5) / len(exact.p)  # in periods
    chart, ax = plt.subplots(figsize=(6, 3.2))
    counts = (0, 1, 4, 16, 64, 128)
    for i, n in enumerate(counts):
        x_t = torch.full((1, L), 2)
        x_t[0, order[:n]] = x[order[:n]]
        density = exact.log_likelihood(x_t)[0].softmax(dim=0) * len(shifts)
        ax.plot(shifts, density, color=plt.cm.viridis_r((i + 1) / len(counts)), label=f'{n}')
    ax.axvline(w / PERIOD, color='grey', ls='--', lw=1, label='the true shift')
    ax.set(xlabel='shift, in periods', ylabel='probability density', ylim=0)
    ax.legend(title='visible tokens', fontsize='small')
    save(chart, path)


def barrier(path):
    """Texts of the exact denoiser in few token steps: MDLM, and with the shift as the latent."""
    panels = {'data': Sawtooth('fresh').texts(128)}
    for name, kind, steps in (('exact MDLM', 'MDLM', (1, 2, 8)), ('exact joint', 'joint', (2,)),
                              ('exact sequential', 'seq', (1,))):
        panels |= {f'{name}, {n} step{"s" * (n > 1)}': exact_draw(kind, 128, n) for n in steps}
    pictures(panels, path)


NEIGHBOURS = (  # {exact sampler: label}
    {'MDLM': 'MDLM', 'joint': 'LADD, joint', 'CADD': 'CADD', 'Duo': 'Duo', 'distilled Duo': 'Duo, distilled',
     'FLM': 'FLM', 'CANDI': 'CANDI'},
    {'seq': 'LADD, sequential, and its latent\'s calls', 'VADD': 'VADD, a new z in every step',
     'VADD, fixed z': 'VADD, one z for all steps', 'SSMD': 'SSMD, and passes of its causal block',
     'DCD': 'DCD: two calls, and 128 of an AR, in every step'})
CALLS = 1, 2, 4, 8, 16, 32


def exact_values(n, path):
    """{sampler: {steps: SWD of n texts}}. What the file has not yet is computed and added to it."""
    found = {kind: {} for labels in NEIGHBOURS for kind in labels}
    del found['distilled Duo']  # there is no exact one
    for r in read_lines(path):
        if r['name'] == 'exact' and r['n'] == n:
            found[r['strategy']][r['steps']] = r['swd']
    for kind, values in found.items():
        for T in CALLS[:-1] if kind == 'DCD' else CALLS:
            if T not in values:
                values[T] = swd(exact_draw(kind, n, T))
                append(path, dict(name='exact', strategy=kind, steps=T, n=n, swd=values[T]))
        print(kind, ' '.join(f'{T}: {value:.4f}' for T, value in values.items()), flush=True)
    return found


def neighbours(path, *names, n=20480):
    """SWD of exact and trained samplers against calls: where the tokens of one step get what they share.

    names: runs, or files of their results
    """
    chart, axes = plt.subplots(1, 2, figsize=(9, 4.5), sharey=True)
    kept = os.path.join(ASSETS, 'neighbours.jsonl')
    files = [os.path.join(name, 'sawtooth.jsonl') if is_run(name) else name for name in names]
    records = [r for file in files or (kept, os.path.join(ASSETS, 'sawtooth.jsonl')) for r in read_lines(file)
               if r['name'] != 'exact' and 'swd' in r and r['n'] == n]
    exact = exact_values(n, kept)
    for ax, labels in zip(axes, NEIGHBOURS):
        for color, (kind, label) in enumerate(labels.items()):
            cost = 2 if kind == 'DCD' else 1  # of a step, in calls
            name, strategy = ('Co-LADD', kind) if kind in ('joint', 'seq') else (kind, 'joint')
            trained = grouped([r for r in records if (r['name'], r['strategy']) == (name, strategy)],
                              'swd', 'steps')
            lines = (('--', exact.get(kind, {}), None),
                     ('o-', {T: np.mean(v) for (T,), v in sorted(trained.items())}, label))
            for style, values, shown in lines:
                ax.plot([cost * T for T in values], values.values(), style, lw=1, ms=3, color=f'C{color}',
                        label=shown)
        ax.axhline(swd(Sawtooth('fresh').texts(n)), color='grey', lw=1, label='data against data')
        ax.plot([], [], 'k--', lw=1, label='dashed: exact')
        ax.set_xscale('log', base=2)
        ax.xaxis.set_major_formatter('{x:.0f}')
        log_scale(ax.yaxis)
        ax.set(xlabel='calls of the denoiser')
        ax.legend(fontsize='x-small')
    axes[0].set(ylabel='sliced Wasserstein distance', title='nothing shared, or beside the tokens')
    axes[1].set(title='shared before the tokens, or between them')
    save(chart, path)


LATENTS = {  # (run, what its tokens are given, steps of the latent): label
    ('mdlm_192', None, None): 'MDLM, as large',
    ('mdlm', None, None): 'MDLM, as wide',
    ('mdlm_as_long', None, None): 'MDLM, as wide, trained for as many seconds',
    ('di_ladd', 'none', None): 'Di-LADD without its codes',
    ('di_ladd', 'shuffled', None): 'Di-LADD, codes of real texts, shuffled among them',
    ('di_ladd', None, 8): 'Di-LADD, sequential: 8 steps for its codes first',
    ('di_ladd', 'data', None): 'Di-LADD, codes of real texts',
    ('mdlm_pieces', None, None): 'MDLM on 512 byte pairs'}


def latents(path, *names):
    """Tiny Shakespeare, Gen PPL against cost: learned codes, their controls and MDLM, means over seeds.

    names: runs of examples/latents_on_text.sh; without them, from kept results.
    """
    paths = [os.path.join(name, 'eval.jsonl') for name in names]
    records = [r for p in paths or [os.path.join(ASSETS, 'shakespeare_char_latents.jsonl')]
               for r in read_lines(p, ('gen_ppl', 'gflops'), ('model',))]
    chart, ax = plt.subplots(figsize=(8, 4))
    for i, ((name, latent, latent_steps), label) in enumerate(LATENTS.items()):
        of_this = {(r['model'], r['gflops']): r for r in records  # of two results the later counts
                   if 'gflops' in r and r.get('strategy') != 'joint'
                   and re.sub(r'_seed\d+$', '', os.path.basename(r['model'])) == name
                   and (latent, latent_steps) == (r.get('latent'), r.get('latent_steps'))}
        if values := grouped(of_this.values(), 'gen_ppl', 'gflops'):
            costs = sorted(values)
            curve(ax, [cost for cost, in costs], [values[cost] for cost in costs], color=f'C{i}', label=label,
                  lw=2.5 if latent_steps else 1, ls='--' if latent else '-', marker='o', ms=3)
    if not ax.containers:
        raise UserError('no run has results to draw: examples/latents_on_text.sh measures them')
    ax.set(xlabel='GFLOPs per text, those for codes included', ylabel='Gen PPL under an AR')
    ax.set_xscale('log')
    ax.xaxis.set_major_formatter('{x:g}')
    log_scale(ax.yaxis)
    ax.legend(fontsize='x-small')
    save(chart, path)


def noise(path):
    """A text and its latent on the way from noise, in both strategies; the noise that is left."""
    columns, D, generator = 48, 16, torch.Generator().manual_seed(0)
    x = Sawtooth().texts(1)[0]
    place, (z_0, eps) = torch.rand(L, generator=generator), torch.randn(2, D, generator=generator)
    z_0 = z_0.sort().values  # so that one sees when it is reached
    done = (torch.arange(columns) + 0.5) / columns
    times = {'joint': (1 - done, 1 - done),
             'sequential': ((2 - 2 * done).clamp(max=1), (1 - 2 * done).clamp(min=0))}
    chart, axes = plt.subplots(3, 2, figsize=(7, 4.6), sharex=True, sharey='row', height_ratios=(4, 2, 2))
    for (tokens, latent, lines), (strategy, (t_x, t_z)) in zip(axes.T, times.items()):
        x_t = torch.where(place[:, None] < alpha(t_x), x[:, None], 2)
        a = abar(t_z)
        draw_tokens(tokens, x_t, extent=(0, 1, 0, 1))
        z_t = a * z_0[:, None] + (1 - a**2).sqrt() * eps[:, None]
        latent.imshow(z_t.numpy(), cmap='PuOr', vmin=-2.5, vmax=2.5, aspect='auto', interpolation='nearest',
                      extent=(0, 1, 0, 1))
        lines.plot(done, 1 - alpha(t_x), color='#b8893a', label='tokens: share masked')
        lines.plot(done, 1 - a**2, color='C4', ls='--', label='latent: share of noise in its variance')
        tokens.set(title=strategy)
        lines.set(xlabel='share of the sampling that is done')
    axes[0, 0].set_ylabel(f'{L} tokens')
    axes[1, 0].set(yticks=[], ylabel=f'a latent\'s {D}\ncoordinates')
    axes[2, 0].set_ylabel('noise')
    chart.legend(*axes[2, 0].get_legend_handles_labels(), loc='lower center', ncols=2, frameon=False,
                 bbox_to_anchor=(0.5, -0.06))
    explain_tokens(chart, loc='upper center', bbox_to_anchor=(0.5, 1.02))
    save(chart, path)


# ------------------------------------------------------------------------------------------------------------
# chapter 5

def collapse(path, *names):
    """Variance of the latents and accuracy of the decoder in training, of runs or of a FILE.jsonl of them."""
    curves, names = {}, names or [os.path.join(ASSETS, 'collapse.jsonl')]
    for name in names:
        path_of_log = name if name.endswith('.jsonl') else os.path.join(name, 'log.jsonl')
        for r in read_lines(path_of_log, ('step', 'latent_var', 'accuracy'), ('run',)):
            point = r.get('step'), r.get('latent_var'), r.get('accuracy')
            if None not in point:
                curves.setdefault(r.get('run') or name, []).append(point)
    if not curves:
        raise UserError(f'{" and ".join(names)}: no log of an LDLM, with latent_var and accuracy')
    chart, (top, bottom) = plt.subplots(2, 1, figsize=(5, 3.1), sharex=True)
    for label, points in curves.items():
        steps, variances, accuracies = zip(*points)
        top.plot(steps, variances, label=literally(label))
        bottom.plot(steps, accuracies, lw=1)
    top.set(ylabel='latent variance', yscale='log')
    bottom.set(xlabel='step', ylabel='accuracy', ylim=(0, 1))
    chart.legend(*top.get_legend_handles_labels(), loc='upper center', ncols=len(curves), frameon=False,
                 fontsize='small')
    save(chart, path)


# ------------------------------------------------------------------------------------------------------------
# the animation of the README

@torch.no_grad()
def frames(method, strategy, n, steps, **options):
    """n texts after each step of sampling: [(x (n, L), z (n, M D), how far it is)], and their shifts (n,).

    Sorted by shift, the likeliest of each finished text.
    """
    seen, latent_steps = [], options.get('latent_steps', 0)
    generator = torch.Generator().manual_seed(0)

    def callback(i, x, z):
        done = f'token step {max(i + 1, 0)} of {steps}'
        if latent_steps:
            done = f'latent step {min(i + 1, 0) + latent_steps} of {latent_steps}, {done}'
        seen.append((x.clone(), method.channel.seen(z).flatten(1), done))
    x = method.sample(n, steps, strategy, generator=generator, callback=callback, **options)
    exact = Exact()
    shift = exact.log_likelihood(x).argmax(dim=1)
    order = shift.argsort()
    return [(x_t[order], z[order], done) for x_t, z, done in seen], shift[order] / len(exact.p)


@torch.no_grad()
def plane(method, n=1024):
    """The plane in which latents of data differ most -> z (n, M D) to places in it (n, 2); those of data."""
    clean = method.channel.seen(method.channel.state(method.encode(Sawtooth('val').texts(n)))).flatten(1)
    mean = clean.mean(dim=0)
    axes = torch.linalg.svd(clean - mean, full_matrices=False)[2][:2].T

    def project(z):
        return (z - mean) @ axes
    return project, project(clean)


def denoising(path, out_dir, steps, latent_steps, n=96):
    """Joint sampling beside sequential sampling of LADD: texts above, latents below."""
    method, config = open_run(out_dir, 'cpu')
    if config['dataset'] != 'sawtooth' or 'seq' not in method.strategies:
        raise UserError(f'{out_dir} is {config["method"]} on {config["dataset"]}; this animation is of '
                        'ladd on sawtooth')
    project, data = plane(method)
    runs = {'joint': frames(method, 'joint', n, steps),
            'sequential': frames(method, 'seq', n, steps, latent_steps=latent_steps)}
    chart, axes = plt.subplots(2, 2, figsize=(7, 6))
    chart.subplots_adjust(left=0.04, right=0.99, bottom=0.02, top=0.95, wspace=0.04, hspace=0.04)
    reach, moving = 1.3 * max(data.abs().max().item(), 2.0), []
    for (top, bottom), (strategy, (states, shift)) in zip(axes.T, runs.items()):
        bottom.scatter(*data.T, s=2, color='0.85')
        bottom.set(xlim=(-reach, reach), ylim=(-reach, reach), xticks=[], yticks=[])
        points = bottom.scatter(*torch.zeros(2, n), s=9, c=shift, cmap='hsv', vmin=0, vmax=1)
        top.set(xticks=[])
        moving.append((top, draw_tokens(top, torch.full((n, L), 2)), points, strategy, states))
    axes[0, 0].set_ylabel('texts, one per row')
    axes[1, 0].set_ylabel('their latents')
    total = steps + latent_steps

    def draw(frame):
        for ax, image, points, strategy, states in moving:
            x, z, done = states[max(0, -(-min(frame, total) * len(states) // total) - 1)]
            image.set_data(x.numpy())
            points.set_offsets(project(z).numpy())
            ax.set_title(f'{strategy}: {done}', fontsize='small')
    try:
        FuncAnimation(chart, draw, frames=range(1, total + 11)).save(path, PillowWriter(fps=4), dpi=90)
    except OSError as e:
        raise UserError(f'cannot write {path} ({e.strerror})') from e
    plt.close(chart)


# ------------------------------------------------------------------------------------------------------------

def main(argv):
    kind, *names = [a for a in argv if not a.startswith('-')] or ['']
    drawings = {draw.__name__: draw
                for draw in (wave, noise, posterior, barrier, latents, neighbours, collapse, denoising)}
    moving = kind == 'denoising'
    takes_runs = kind in ('neighbours', 'latents', 'collapse')
    if kind not in drawings or (len(names) != 1 if moving else names and not takes_runs):
        raise UserError('python -m examples.figures wave | noise | posterior | barrier | '
                        'denoising out/NAME | neighbours [out/A ...] | latents [out/A ...] | '
                        'collapse [out/A ...]')
    c = configure(DenoisingConfig if moving else Config, [a for a in argv if a.startswith('-')])
    path = c.pop('save') or os.path.join(ASSETS, kind + ('.gif' if moving else '.png'))
    if not moving:
        check_ending(path)
    elif not path.endswith('.gif'):
        raise UserError(f'--save={path}: the name of an animation ends with .gif')
    drawings[kind](path, *names, **c)
    print(path)


if __name__ == '__main__':
    run(main, DenoisingConfig)
