"""
Tables and figures of what train.py and eval.py have written.

    python -m lib.plot log out/A out/B ...           losses against steps           -> out/A/log.png
    python -m lib.plot frontier out/A out/B ...      Gen PPL against cost           -> out/A/frontier.png
    python -m lib.plot smoothness out/A out/B ...    Gen PPL between two texts      -> out/A/smoothness.png
    options: --save=FIGURE.png, and of the frontier --gflops=50,100,200 --time=cpu --paper=lm1b

The frontier asks what a given amount of computing buys. Gen PPL is interpolated linearly between measured
costs, and is n/a outside of them. Entropy stands beside it, because repeating oneself lowers Gen PPL, too.
Runs that differ only in their seed (out/A, out/A_seed1, ...) are one curve: mean and standard deviation in
the tables, mean and range in the figure. Seconds are points, one for each measurement. FILE.jsonl in place
of a folder is a copy of results, for runs that are gone. `python eval.py out/A out/B ...` measures first what
is missing.
"""
import json
import os
import re
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from lib.configurator import Keys, UserError, configure, key, run
from lib.files import is_number, read_lines, whole

plt.switch_backend('Agg')  # files, no windows
SECONDS = {'wall': 'seconds_per_sample', 'cpu': 'cpu_seconds_per_sample'}


@dataclass
class Config(Keys):
    save: str = ''                 # the figure; empty: log.png, ... in the first folder


@dataclass
class FrontierConfig(Config):
    gflops: str = ''               # costs in the tables; empty: the measured ones of the longest curve
    time: str = key('wall', choices=tuple(SECONDS))  # of the figure; cpu if the machine had other work
    paper: str = ''                # lm1b | owt: the LADD paper's curves beside ours, in grey


# ------------------------------------------------------------------------------------------------------------
# for every table and figure

def written(value, deviation=np.nan):
    """A cell of a table: a number to four digits, with its standard deviation if any; a text; or None."""
    if value is None or isinstance(value, str):
        return value or ''
    if np.isnan(value):
        return 'n/a'
    spread = f'±{deviation:.2g}' if deviation > 1e-9 * value else ''
    return (f'{value:.4g}' if value < 1e4 else f'{value:.0f}') + spread


def print_table(title, columns, rows, out):
    """columns: headings.  rows: lists of a name and a cell for each column.  All of them are strings."""
    cells = [[title, *columns], *rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for name, *row in cells:
        print(name.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row, widths[1:])), sep='  ', file=out)
    print(file=out)


def curve(ax, x, values, **style):
    """A line through the mean over runs, with bars from the least to the greatest; values: a list per x."""
    means = np.array([mean_and_deviation(v)[0] for v in values])
    ends = np.array([(min(v), max(v)) if v else (np.nan, np.nan) for v in values]).T
    several = any(len(v) > 1 for v in values)
    ax.errorbar(x, means, abs(ends - means) if several else None, capsize=2, **style)


def mean_and_deviation(values):
    """nan for the mean of none, and for the standard deviation of one."""
    return np.mean(values) if values else np.nan, np.std(values, ddof=1) if len(values) > 1 else np.nan


def log_scale(axis):
    """With plain numbers at 1, 2 and 5 of each decade."""
    axis.axes.set(**{f'{axis.axis_name}scale': 'log'})
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter('{x:g}')
    axis.set_minor_formatter(NullFormatter())


def literally(name):
    """The name of a run, written so that matplotlib draws all of it.

    \\uXXXX stands for what the font does not have; a $ begins no mathematics; and a space comes before a _,
    which would keep the line out of the legend.
    """
    font = get_font(findfont(FontProperties()))
    name = ''.join(c if font.get_char_index(ord(c)) else ascii(c)[1:-1] for c in name)
    return ' ' * name.startswith('_') + name.replace('$', r'\$')


def check_ending(path):
    """UserError unless a figure can have that name."""
    if file_type(path) not in FigureCanvasBase.get_supported_filetypes():
        raise UserError(f'--save={path}: the name of a figure ends with .png, .pdf or .svg')


def file_type(path):
    return os.path.splitext(path)[1][1:].lower()


def save(figure, path):
    with whole(path) as temp:
        figure.savefig(temp, format=file_type(path), dpi=150, bbox_inches='tight')
    plt.close(figure)


def beside(name, kind):
    """Where a figure goes by default: into a run's folder, or beside a FILE.jsonl."""
    return os.path.join(os.path.dirname(name) if name.endswith('.jsonl') else name, kind + '.png')


# ------------------------------------------------------------------------------------------------------------
# losses

def log(folders, path, out):
    """Training objective above, validation below: not one axis, since the objective may be any multiple."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(6, 6), sharex=True)
    for i, folder in enumerate(folders):
        records = read_lines(os.path.join(folder, 'log.jsonl'),
                             ('step', 'loss', 'val_loss', 'tokens', 'tokens_per_s'))
        train, val = ([(r['step'], r[name]) for r in records if None not in (r.get(name), r.get('step'))]
                      for name in ('loss', 'val_loss'))
        if not train + val:
            raise UserError(f'{folder} holds no log.jsonl with losses; train.py writes it')
        name = literally(folder)
        if train:
            top.plot(*zip(*train), color=f'C{i}', lw=0.7, label=name)
        if val:
            bottom.plot(*zip(*val), color=f'C{i}', marker='.', label=name)
            (step, loss), best = val[-1], min(loss for _, loss in val)
            print(f'{folder}: validation {loss:.4f} nats per token at step {step:,}, best {best:.4f}; '
                  f'{training_seconds(records):,.0f} seconds of training', file=out)
    top.set(ylabel='training objective')
    bottom.set(xlabel='step', ylabel='validation (nats per token)')
    for ax in (top, bottom):
        if ax.lines:
            ax.legend(fontsize='small')
    save(figure, path)


def training_seconds(records):
    """Of all steps, compiling included and validation not, in however many sittings."""
    seconds = tokens = 0
    for r in records:
        if r.get('tokens') and r.get('tokens_per_s'):
            seconds, tokens = seconds + (r['tokens'] - tokens) / r['tokens_per_s'], r['tokens']
    return seconds


# ------------------------------------------------------------------------------------------------------------
# the frontier: what was measured

TEXTS = ('model', 'strategy', 'latent', 'sampler', 'dtype', 'device', 'teacher', 'teacher_weights',
         'gen_ppl_rule', 'eos')
SETTINGS = ('step', 'strategy', 'latent', 'latent_steps', 'sampler', 'eta', 'temperature', 'top_p',
            'num_samples', 'batch_size', 'dtype', 'compile', 'device', 'teacher', 'teacher_weights',
            'gen_ppl_rule', 'eos')
FIRST_SAMPLERS = {'ancestral', 'euler_maruyama'}  # a method's default goes without saying


def gen_ppls(name):
    """The results in a folder's eval.jsonl, or in a FILE.jsonl, that have a Gen PPL."""
    path, model = name, {}
    if not name.endswith('.jsonl'):  # it may have been renamed since
        path, model = os.path.join(name, 'eval.jsonl'), {'model': os.path.normpath(name)}
    # older results do not mention `compile`
    results = [{'compile': False, **r, **model} for r in read_lines(path, NUMBERS, TEXTS)
               if r.get('gen_ppl') is not None]
    if any(r.get(k) is None for r in results for k in ('model', 'gflops')):
        raise UserError(f'{path} holds a Gen PPL without model or GFLOPs, which is no result of eval.py')
    return results


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


def setting(r, name):
    """A setting of a result. How many threads a CPU had is none: only seconds depend on it."""
    value = r.get(name)
    return re.sub(r' \(\d+ threads\)$', '', value) if name == 'device' and value else value


def curves(results):
    """{label: its runs, each a list of results by rising cost}. Only results of equal settings make a curve.

    Runs of one curve differ in the seed of training (the folder's _seed1, _seed2, ...) or of sampling. Of two
    results at one cost the later counts.
    """
    groups = {}
    for r in results:
        group = re.sub(r'_seed\d+$', '', r['model']), tuple(setting(r, name) for name in SETTINGS)
        groups.setdefault(group, {}).setdefault((r['model'], r.get('seed')), {})[r['gflops']] = r

    def shown(i):
        """Whether labels mention setting i."""
        found = {settings[i] for _, settings in groups} - {None}
        if found <= FIRST_SAMPLERS:
            return False
        if len({(model, settings[i]) for model, settings in groups}) > len({model for model, _ in groups}):
            return True  # it tells the curves of one model apart
        return len(found) > 1 and SETTINGS[i] != 'step'
    in_label, labelled = [i for i in range(len(SETTINGS)) if shown(i)], {}
    for (model, settings), runs in groups.items():
        words = [f'{SETTINGS[i]} {settings[i]}' for i in in_label if settings[i] is not None]
        label = ', '.join([model, *words]) + (f' ({len(runs)} seeds)' if len(runs) > 1 else '')
        labelled[label] = [[by_cost[g] for g in sorted(by_cost)] for by_cost in runs.values()]
    return labelled


def values_at(runs, axis, x, name):
    """What the results of each run call `name`, at x, for the runs that were measured there -> list.

    GFLOPs between two measured ones count as measured: values are interpolated linearly.
    """
    found = []
    for results in runs:
        points = {r[axis]: r[name] for r in results if r.get(axis) is not None and r.get(name) is not None}
        if axis == 'gflops' and points and min(points) <= x <= max(points):
            found.append(float(np.interp(x, list(points), list(points.values()))))
        elif x in points:
            found.append(points[x])
    return found


# ------------------------------------------------------------------------------------------------------------
# the frontier: tables and figure

TABLES = (('gflops', 'gen_ppl'),                                          # LADD tables 2, 5
          ('gflops', 'entropy_sample'), ('gflops', 'entropy_position'),   # LADD tables 11, 13
          ('gflops', 'diversity'), ('gflops', 'recited'), ('gflops', 'recited_data'), ('steps', 'gen_ppl'),
          ('steps', 'gflops'), ('steps', 'samples_per_s_per_gen_ppl'),    # LADD tables 12, 9
          ('steps', 'seconds_per_sample'), ('steps', 'cpu_seconds_per_sample'))
NUMBERS = {*(name for table in TABLES for name in table), *SETTINGS, 'seed'}.difference(TEXTS)
ASSETS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'assets')


def frontier_options(c):
    """FrontierConfig -> keyword arguments of frontier. UserError for what is not there."""
    with open(os.path.join(ASSETS, 'paper_ladd.json'), encoding='utf-8') as f:
        papers = json.load(f)
    source = papers.pop('source')
    if c.paper and c.paper not in papers:
        raise UserError(f'--paper={c.paper}: the tables that survive are {" and ".join(papers)}')
    try:
        costs = [float(g) for g in c.gflops.split(',')] if c.gflops else None
        if costs and not all(0 < g < np.inf for g in costs):
            raise ValueError
    except ValueError as e:
        raise UserError(f'--gflops wants numbers, as in --gflops=50,100,200; not {c.gflops!r}') from e
    paper = {'source': source, **papers[c.paper]} if c.paper else None
    return {'paper': paper, 'costs': costs, 'seconds': SECONDS[c.time]}


def frontier(results, path, out, paper=None, costs=None, seconds='seconds_per_sample'):
    """Prints what LADD's tables print, and draws Gen PPL and entropies against GFLOPs and seconds.

    A curve is a row and a line. costs: GFLOPs in the tables;  seconds: of the figure, see SECONDS.
    """
    labelled = curves(results)
    costs_of = {label: sorted({r['gflops'] for run in runs for r in run}) for label, runs in labelled.items()}
    for i, label in enumerate(labelled):
        print(f'[{i + 1}] {label}', file=out)
    print(file=out)
    columns = {'gflops': costs or max(costs_of.values(), key=len),
               'steps': sorted({r['steps'] for r in results if r.get('steps')})}
    for axis, name in TABLES:
        rows = [[values_at(runs, axis, x, name) for x in columns[axis]] for runs in labelled.values()]
        if any(values for row in rows for values in row):
            cells = [[f'[{i + 1}]', *(written(*mean_and_deviation(values)) for values in row)]
                     for i, row in enumerate(rows)]
            print_table(f'{name} at {axis}', map(written, columns[axis]), cells, out)

    figure, axes = draw_frontier(labelled, costs_of, seconds)
    if paper:
        add_paper(paper, axes[:, 0], out)
    axes[0, 1].legend(*axes[0, 0].get_legend_handles_labels(), fontsize='x-small', loc='upper left',
                      bbox_to_anchor=(1, 1))  # outside, where it covers nothing
    save(figure, path)


def draw_frontier(labelled, costs_of, seconds):
    """Lines against GFLOPs; against seconds, which depend on the machine's other work, points."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), sharex='col', sharey='row', height_ratios=(3, 2))
    for i, (label, runs) in enumerate(labelled.items()):
        for name, (left, right), marker, dashes in (('gen_ppl', axes[0], '.', '-'),
                                                    ('entropy_sample', axes[1], '.', '-'),
                                                    ('entropy_position', axes[1], 'x', ':')):
            values = [values_at(runs, 'gflops', g, name) for g in costs_of[label]]
            curve(left, costs_of[label], values, fmt=marker + dashes, ms=5, color=f'C{i}',
                  label=literally(label))
            timed = [(r[seconds], r[name]) for run in runs for r in run
                     if r.get(seconds) is not None and r.get(name) is not None]
            right.plot(*np.reshape(timed, (-1, 2)).T, marker, ms=5, color=f'C{i}')
    axes[0, 0].set(ylabel='Gen PPL')
    axes[1, 0].set(ylabel='entropy (nats)', xlabel='GFLOPs per sample')
    axes[1, 1].set(xlabel=seconds.replace('_', ' '))
    for ax in axes.flat:
        log_scale(ax.xaxis)
    log_scale(axes[0, 0].yaxis)
    kinds = [Line2D([], [], color='0.3', marker=marker, ls=dashes, label=name)
             for name, marker, dashes in (('within a sample', '.', '-'), ('of a position', 'x', ':'))]
    axes[1, 1].legend(handles=kinds, fontsize='x-small', loc='upper left', bbox_to_anchor=(1, 1))
    return figure, axes


def add_paper(paper, axes, out):
    """Against GFLOPs only: its seconds are another machine's. Its teacher may be another than ours."""
    print(f'the paper, tables {paper["tables"]}: {paper["source"]}', file=out)
    if paper['also']:
        print(paper['also'], file=out)
    for ax, name in zip(axes, ('gen_ppl', 'entropy')):
        cells = [[label, *('n/a' if v is None else f'{v:g}' for v in row[name])]
                 for label, row in paper['rows'].items()]
        print_table(f'{name} at gflops, the paper', map(written, paper['gflops']), cells, out)
        for marker, (label, row) in zip('x+1234*', paper['rows'].items()):
            y = [np.nan if v is None else v for v in row[name]]
            ax.plot(paper['gflops'], y, '--', marker=marker, lw=0.7, markersize=5, color='0.6',
                    label=f'the paper: {label}' if name == 'gen_ppl' else '')


# ------------------------------------------------------------------------------------------------------------
# Gen PPL on the way from one text to another: LDLM figure 3

def is_numbers(values):
    return isinstance(values, list) and all(map(is_number, values))


def smoothness(folders, path, out):
    figure, ax = plt.subplots(figsize=(5, 3.5))
    for folder in folders:
        path_of_results = os.path.join(folder, 'eval.jsonl')
        found = [r for r in read_lines(path_of_results, ['smoothness']) if r.get('gen_ppl_path')]
        if not found:
            raise UserError(f'{folder} holds no smoothness yet: '
                            f'python eval.py --out_dir={folder} --metrics=smoothness')
        points, values = found[-1].get('points'), found[-1]['gen_ppl_path']
        if not (is_numbers(points) and is_numbers(values) and len(points) == len(values)):
            raise UserError(f'{path_of_results} holds a smoothness that is no result of eval.py')
        ax.plot(np.array(points, float), np.array(values, float), marker='.', label=literally(folder))
        print(f'{folder}: {float(np.array(found[-1].get("smoothness"), float)):.3f}', file=out)
    ax.set(xlabel='weight of the second latent', ylabel='Gen PPL')
    log_scale(ax.yaxis)
    ax.legend()
    save(figure, path)


def main(argv):
    kind, *names = [a for a in argv if not a.startswith('-')] or ['']
    if kind not in ('log', 'frontier', 'smoothness') or not names:
        raise UserError('python -m lib.plot log|frontier|smoothness out/NAME ...')
    flags, Keys = [a for a in argv if a.startswith('-')], FrontierConfig if kind == 'frontier' else Config
    c = SimpleNamespace(**configure(Keys, flags))
    path = c.save or beside(names[0], kind)
    check_ending(path)
    if kind == 'frontier':
        frontier(measured(names), path, sys.stdout, **frontier_options(c))
    else:
        {'log': log, 'smoothness': smoothness}[kind](names, path, sys.stdout)
    print(path)


if __name__ == '__main__':
    run(main, FrontierConfig)
