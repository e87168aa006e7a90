"""
Figures from what train.py and eval.py have written.

    python plot.py log out/A out/B ...               losses against steps                          -> out/A/log.png
    python plot.py frontier out/A out/B ...          Gen PPL at equal cost, tables and a figure    -> out/A/frontier.png
    python plot.py frontier out/A out/A_seed1 FILE.jsonl --save=FIGURE.png --gflops=50,100,200 --time=cpu --paper=lm1b
    python plot.py smoothness out/A out/B ...        Gen PPL between two texts, LDLM figure 3      -> out/A/smoothness.png

The frontier asks what a given amount of computing buys: Gen PPL is interpolated linearly between the measured budgets, and is n/a
outside of them. Below it stands the entropy, because Gen PPL alone can be had by repeating oneself. Runs that differ only in their seed
(out/A, out/A_seed1, ...) are one curve: mean and standard deviation. FILE.jsonl is a copy of results, for runs that are gone.
frontier.py measures what is missing first.
"""
import json
import os
import re
import sys

import matplotlib
matplotlib.use('Agg')  # files, no windows
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter

from lib.configurator import UserError, configure, run


def read(folder, name):
    """The JSON objects in out/NAME/log.jsonl or eval.jsonl, in order; [] if there is no such file. A torn last line is left out."""
    path = folder if folder.endswith('.jsonl') else os.path.join(folder, name)
    if not os.path.exists(path):
        return []
    with open(path, encoding='utf-8', errors='replace') as f:
        lines = f.read().split('\n')
    records = []
    for line in lines[:-1]:
        try:
            records.append(json.loads(line))
        except ValueError as e:
            raise UserError(f'{path} holds a line that is no JSON: {line[:40]!r}') from e
    return records


def save(figure, path):
    try:
        figure.savefig(path, dpi=150, bbox_inches='tight')
    except (OSError, ValueError) as e:  # ValueError: no format of that name
        raise UserError(f'cannot write {path} ({getattr(e, "strerror", None) or e})') from e
    plt.close(figure)


def log_scale(axis):
    """With plain numbers at 1, 2 and 5 of each decade."""
    axis.axes.set(**{f'{axis.axis_name}scale': 'log'})
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter('{x:g}')
    axis.set_minor_formatter(NullFormatter())


# ----------------------------------------------------------------------------------------------------------------------------------
# losses

def log(folders, path, out):
    figure, ax = plt.subplots(figsize=(6, 4))
    for i, folder in enumerate(folders):
        records = read(folder, 'log.jsonl')
        train, val = ([(r['step'], r[key]) for r in records if r.get(key) is not None] for key in ('loss', 'val_loss'))
        if not train + val:
            raise UserError(f'{folder} holds no log.jsonl with losses; train.py writes it')
        if train:
            ax.plot(*zip(*train), color=f'C{i}', alpha=0.3, linewidth=0.7, label=f'{folder}, training objective')
        if val:
            ax.plot(*zip(*val), color=f'C{i}', marker='.', label=f'{folder}, validation')
            print(f'{folder}: validation {val[-1][1]:.4f} nats per token at step {val[-1][0]:,}, best {min(v for _, v in val):.4f}', file=out)
    ax.set(xlabel='step', ylabel='loss (nats per token)')
    ax.legend()
    save(figure, path)


# ----------------------------------------------------------------------------------------------------------------------------------
# Gen PPL against cost

SETTINGS = ('model', 'step', 'strategy', 'latent_steps', 'sampler', 'eta', 'temperature', 'top_p', 'num_samples', 'batch_size', 'dtype', 'compile',
            'device', 'teacher', 'teacher_weights', 'gen_ppl_rule', 'eos')
TABLES = (('gflops', 'gen_ppl'), ('gflops', 'entropy_sample'), ('gflops', 'entropy_position'), ('gflops', 'diversity'),  # LADD tables 2, 5; 11, 13
          ('steps', 'gen_ppl'), ('steps', 'gflops'), ('steps', 'samples_per_s_per_gen_ppl'),                            # LADD tables 9, 12
          ('steps', 'seconds_per_sample'), ('steps', 'cpu_seconds_per_sample'))
SECONDS = {'wall': 'seconds_per_sample', 'cpu': 'cpu_seconds_per_sample'}
PAPER = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'assets', 'paper_ladd.json')


def gen_ppls(name):
    """The results in a folder's eval.jsonl, or in a file with copies of such, that have a Gen PPL."""
    here = {} if name.endswith('.jsonl') else {'model': os.path.normpath(name)}  # the folder may have been renamed
    return [{'compile': False, **r, **here} for r in read(name, 'eval.jsonl') if r.get('gen_ppl') is not None]  # older results do not say


def measured(names):
    """gen_ppls of all of them. UserError if one has none."""
    results = []
    for name in names:
        found = gen_ppls(name)
        if not found:
            raise UserError(f'{name} holds no Gen PPL' + ('' if name.endswith('.jsonl') else
                            f' yet: python eval.py --out_dir={name} --metrics=gen_ppl --steps=1,2,4,8,16,32'))
        results += found
    return results


def curves(results):
    """{label: its runs, each a list of results by rising cost}. Only results of equal settings make a curve.

    Runs of one curve differ in the seed of training (the folder's _seed1, _seed2, ...) or of sampling. Of two results at one budget the later counts.
    """
    groups = {}
    for r in results:
        key = (re.sub(r'_seed\d+$', '', r['model']), *(r.get(k) for k in SETTINGS[1:]))
        groups.setdefault(key, {}).setdefault((r['model'], r.get('seed')), {})[r['gflops']] = r

    def differs(i):  # a label says what tells a curve from the others
        if len({(key[0], key[i]) for key in groups}) > len({key[0] for key in groups}):
            return True  # from others of the same run
        values = {key[i] for key in groups} - {None}  # that a method has no such setting does not need saying,
        return len(values) > 1 and SETTINGS[i] != 'step' and not values <= {'ancestral', 'euler_maruyama'}  # nor a run's length, a method's first sampler
    shown = [i for i in range(len(SETTINGS)) if i == 0 or differs(i)]
    by_label = {}
    for key, runs in groups.items():
        label = ', '.join(f'{SETTINGS[i]} {key[i]}' if i else key[0] for i in shown if key[i] is not None)
        by_label[label + (f' ({len(runs)} seeds)' if len(runs) > 1 else '')] = [[run[g] for g in sorted(run)] for run in runs.values()]
    return by_label


def at(run, axis, x, key):
    """One run's `key` where `axis` is x: between measured GFLOPs by linear interpolation, of steps only the measured ones; nan elsewhere."""
    points = [(r[axis], r[key]) for r in run if r.get(axis) is not None and r.get(key) is not None]
    if axis == 'steps' or not points:
        return dict(points).get(x, np.nan)
    return float(np.interp(x, *zip(*points), left=np.nan, right=np.nan))


def over_runs(runs, axis, x, key):
    """-> mean and standard deviation over the runs that were measured there; (nan, nan) if none was, and nan for the deviation of one."""
    values = [v for v in (at(run, axis, x, key) for run in runs) if not np.isnan(v)]
    return np.mean(values) if values else np.nan, np.std(values, ddof=1) if len(values) > 1 else np.nan


def written(mean, deviation=np.nan):
    if np.isnan(mean):
        return 'n/a'
    return (f'{mean:.4g}' if mean < 1e4 else f'{mean:.0f}') + (f'±{deviation:.2g}' if deviation > 1e-9 * mean else '')


def print_table(title, columns, rows, out):
    """rows: lists of a name and cells."""
    cells = [[title, *map(written, columns)], *rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for first, *rest in cells:
        print(first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(rest, widths[1:])), sep='  ', file=out)
    print(file=out)


def frontier_options(paper='', gflops='', time='wall'):
    """Flags -> keyword arguments of frontier; UserError for what is not there.

    paper: lm1b | owt, the published curves beside ours.  gflops: budgets of the tables; empty: those of the curve with the most, the first
    of such.  time: wall | cpu, the seconds of the figure; cpu is for a machine that was busy with something else.
    """
    with open(PAPER) as f:
        papers = json.load(f)
    source = papers.pop('source')
    if paper and paper not in papers:
        raise UserError(f'--paper={paper}: the tables that survive are {" and ".join(papers)}')
    if time not in SECONDS:
        raise UserError(f'--time is wall or cpu, not {time!r}')
    try:
        budgets = [float(g) for g in gflops.split(',')] if gflops else None
    except ValueError as e:
        raise UserError(f'--gflops wants numbers, as in --gflops=50,100,200; not {gflops!r}') from e
    return {'paper': {'source': source, **papers[paper]} if paper else None, 'budgets': budgets, 'seconds': SECONDS[time]}


def frontier(results, path, out, paper=None, budgets=None, seconds='seconds_per_sample'):
    """Prints what LADD's tables print, one row per curve, and draws Gen PPL and entropies against GFLOPs and seconds."""
    by_label = curves(results)
    for i, label in enumerate(by_label):
        print(f'[{i + 1}] {label}', file=out)
    print(file=out)
    per_curve = [sorted({r['gflops'] for run in runs for r in run}) for runs in by_label.values()]
    columns = {'gflops': budgets or max(per_curve, key=len), 'steps': sorted({r['steps'] for r in results if r.get('steps')})}
    for axis, key in TABLES:
        cells = [[over_runs(runs, axis, x, key) for x in columns[axis]] for runs in by_label.values()]
        if any(not np.isnan(mean) for row in cells for mean, _ in row):
            print_table(f'{key} at {axis}', columns[axis], [[f'[{i + 1}]', *(written(*c) for c in row)] for i, row in enumerate(cells)], out)

    figure, axes = plt.subplots(2, 2, figsize=(10, 6), sharex='col', sharey='row', height_ratios=(3, 2))
    for column, (axis, unit) in enumerate([('gflops', 'GFLOPs per sample'), (seconds, seconds.replace('_', ' '))]):
        top, bottom = axes[:, column]
        for i, ((label, runs), measured_at) in enumerate(zip(by_label.items(), per_curve)):
            cost = [over_runs(runs, 'gflops', g, axis)[0] for g in measured_at]
            for ax, key, style, name in ((top, 'gen_ppl', '.-', label), (bottom, 'entropy_sample', '.-', 'per sample' if i == 0 else None),
                                         (bottom, 'entropy_position', '.:', 'per position' if i == 0 else None)):
                y, spread = zip(*(over_runs(runs, 'gflops', g, key) for g in measured_at))
                ax.errorbar(cost, y, None if len(runs) == 1 else spread, fmt=style, capsize=2, color=f'C{i}', label=name)
        top.set(ylabel='Gen PPL' if column == 0 else None)
        bottom.set(xlabel=unit, ylabel='entropy (nats)' if column == 0 else None)
        for axis in (top.xaxis, top.yaxis, bottom.xaxis):
            log_scale(axis)
    if paper:  # in grey, by GFLOPs only: its seconds are another machine's, and its teacher may be another than ours
        print(f'the paper, tables {paper["tables"]}: {paper["source"]}', *([paper['also']] if paper['also'] else []), sep='\n', file=out)
        for key in ('gen_ppl', 'entropy'):
            rows = [[name, *('n/a' if v is None else f'{v:g}' for v in row[key])] for name, row in paper['rows'].items()]
            print_table(f'{key} at gflops, the paper', paper['gflops'], rows, out)
            for marker, (name, row) in zip('x+1234*', paper['rows'].items()):
                axes[int(key == 'entropy'), 0].plot(paper['gflops'], [np.nan if v is None else v for v in row[key]], '--', marker=marker, linewidth=0.7,
                                                    markersize=5, color='0.6', label=f'the paper: {name}' if key == 'gen_ppl' else None)
    for left, right in axes:  # labels outside, where they cover nothing
        right.legend(*left.get_legend_handles_labels(), fontsize='x-small', loc='upper left', bbox_to_anchor=(1, 1))
    save(figure, path)


# ----------------------------------------------------------------------------------------------------------------------------------
# Gen PPL on the way from one text to another

def smoothness(folders, path, out):
    figure, ax = plt.subplots(figsize=(5, 3.5))
    for folder in folders:
        found = [r for r in read(folder, 'eval.jsonl') if r.get('gen_ppl_path')]
        if not found:
            raise UserError(f'{folder} holds no smoothness yet: python eval.py --out_dir={folder} --metrics=smoothness')
        ax.plot(found[-1]['points'], found[-1]['gen_ppl_path'], marker='.', label=folder)
        print(f'{folder}: {found[-1]["smoothness"]:.3f}', file=out)
    ax.set(xlabel='weight of the second latent', ylabel='Gen PPL')
    log_scale(ax.yaxis)
    ax.legend()
    save(figure, path)


FIGURES = {'log': log, 'frontier': frontier, 'smoothness': smoothness}


defaults = dict(save='', paper='', gflops='', time='wall')


def main(argv):
    kind, *names = [a for a in argv if not a.startswith('-')] or ['']
    if kind not in FIGURES or not names:
        raise UserError('plot.py log out/NAME ..., plot.py frontier out/NAME ... or plot.py smoothness out/NAME ...')
    options = configure(defaults if kind == 'frontier' else {'save': ''}, [a for a in argv if a.startswith('-')])
    path = options.pop('save') or os.path.join(os.path.dirname(names[0]) if names[0].endswith('.jsonl') else names[0], kind + '.png')
    if kind == 'frontier':
        options, names = frontier_options(**options), measured(names)
    FIGURES[kind](names, path, sys.stdout, **options)
    print(path)


if __name__ == '__main__':
    run(main)
