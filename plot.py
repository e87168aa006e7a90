"""
Figures from what train.py and eval.py have written.

    python plot.py log out/A out/B ...               losses against steps                          -> out/A/log.png
    python plot.py frontier out/A out/B ...          Gen PPL at equal cost, a table and a figure   -> out/A/frontier.png
    python plot.py frontier out/A --save=FIGURE.png

The frontier asks what a given amount of computing buys: Gen PPL is interpolated linearly between the measured budgets, and is n/a
outside of them. Below it stands the entropy, because Gen PPL alone can be had by repeating oneself.
"""
import json
import os
import sys

import matplotlib
matplotlib.use('Agg')  # files, no windows
import matplotlib.pyplot as plt
import numpy as np

from configurator import UserError, configure, run


def read(folder, name):
    """The JSON objects in out/NAME/log.jsonl or eval.jsonl, in order; [] if there is no such file. A torn last line is left out."""
    path = os.path.join(folder, name)
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
            ax.plot(*zip(*train), color=f'C{i}', alpha=0.3, linewidth=0.7)
        if val:
            ax.plot(*zip(*val), color=f'C{i}', marker='.', label=f'{folder}, validation')
            print(f'{folder}: validation {val[-1][1]:.4f} nats per token at step {val[-1][0]:,}, best {min(v for _, v in val):.4f}', file=out)
        else:
            ax.plot([], [], color=f'C{i}', alpha=0.3, label=folder)
    ax.set(xlabel='step', ylabel='loss (nats per token)')
    ax.legend()
    save(figure, path)


# ----------------------------------------------------------------------------------------------------------------------------------
# Gen PPL against cost

SETTINGS = ('model', 'step', 'strategy', 'latent_steps', 'sampler', 'eta', 'temperature', 'top_p', 'seed', 'num_samples', 'batch_size', 'dtype',
            'device', 'teacher', 'gen_ppl_rule', 'eos')


def curves(folders):
    """{label: its results at all budgets, by rising cost}. Only results of equal settings make a curve; of two at one budget the later counts."""
    groups = {}
    for folder in folders:
        found = [r for r in read(folder, 'eval.jsonl') if r.get('gen_ppl') is not None]
        if not found:
            raise UserError(f'{folder} holds no Gen PPL yet: python eval.py --out_dir={folder} --metrics=gen_ppl --steps=1,2,4,8,16,32')
        for r in found:
            groups.setdefault((folder, *(r.get(k) for k in SETTINGS[1:])), {})[r['gflops']] = r
    differ = [i for i in range(len(SETTINGS)) if len({key[i] for key in groups}) > 1 or i == 0]  # a label says what tells a curve from the others
    return {', '.join(f'{SETTINGS[i]} {key[i]}' if i else str(key[0]) for i in differ if key[i] is not None): [by_cost[g] for g in sorted(by_cost)]
            for key, by_cost in groups.items()}


def at_budget(results, gflops):
    """Gen PPL by linear interpolation between measured budgets; nan outside. results: by rising cost."""
    return float(np.interp(gflops, [r['gflops'] for r in results], [r['gen_ppl'] for r in results], left=np.nan, right=np.nan))


def frontier(folders, path, out):
    """Prints Gen PPL at every measured budget, one column per curve, and draws Gen PPL and entropies against GFLOPs and seconds."""
    by_label = curves(folders)
    for i, label in enumerate(by_label):
        print(f'[{i + 1}] {label}', file=out)
    print('GFLOPs'.rjust(10), *(f'[{i + 1}]'.rjust(10) for i in range(len(by_label))), file=out)
    for budget in sorted({r['gflops'] for results in by_label.values() for r in results}):
        row = [at_budget(results, budget) for results in by_label.values()]
        print(f'{budget:.4g}'.rjust(10), *(('n/a' if np.isnan(v) else f'{v:.2f}').rjust(10) for v in row), file=out)

    figure, axes = plt.subplots(2, 2, figsize=(10, 6), sharex='col', sharey='row', height_ratios=(3, 2))
    for column, (key, unit) in enumerate([('gflops', 'GFLOPs per sample'), ('seconds_per_sample', 'seconds per sample')]):
        top, bottom = axes[:, column]
        for i, (label, results) in enumerate(by_label.items()):
            cost = [r[key] for r in results]
            top.plot(cost, [r['gen_ppl'] for r in results], marker='.', color=f'C{i}', label=label)
            for kind, style in (('entropy_sample', '-'), ('entropy_position', ':')):
                bottom.plot(cost, [r[kind] for r in results], style, marker='.', color=f'C{i}', label=kind.replace('_', ' per ') if i == 0 else None)
        top.set(xscale='log', yscale='log', ylabel='Gen PPL' if column == 0 else None)
        bottom.set(xscale='log', xlabel=unit, ylabel='entropy (nats)' if column == 0 else None)
    axes[0, 0].legend(fontsize='small')
    axes[1, 0].legend(fontsize='small')
    save(figure, path)


FIGURES = {'log': log, 'frontier': frontier}


def main(argv):
    kind, *folders = [a for a in argv if not a.startswith('-')] or ['']
    c = configure({'save': ''}, [a for a in argv if a.startswith('-')])
    if kind not in FIGURES or not folders:
        raise UserError('plot.py log out/NAME ... or plot.py frontier out/NAME ...')
    path = c['save'] or os.path.join(folders[0], kind + '.png')
    FIGURES[kind](folders, path, sys.stdout)
    print(path)


if __name__ == '__main__':
    run(main)
