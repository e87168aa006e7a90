"""
Quality against cost, for any runs: samples and scores checkpoints, prints LADD's tables 2, 5, 9, 11 and 13, and draws the figure.

    python frontier.py out/A out/B out/B_seed1 --steps=1,2,4,8,16,32,64 --num_samples=64 --teacher=out/AR      -> out/A/frontier.png
    python frontier.py out/A out/B --strategies=seq --latent_steps=2,8,32       other curves of the same runs
    python frontier.py out/A out/B --results=assets/NAME.jsonl                  also keeps what was drawn in one file
    python frontier.py assets/NAME.jsonl out/A_seed2                            which stands for runs that are gone

Every run is sampled with all strategies that it has, at every number of steps, and scored by one teacher. Each result is one of eval.py
and goes to out/NAME/eval.jsonl at once. What is there already, of the same weights, teacher, options and device (seconds are compared),
is not measured again: an interrupted sweep goes on where it stopped, and a seed that is added later costs only itself.
Other samplers and temperatures: measure them with eval.py, and draw with plot.py.
"""
import json
import os
import sys
from types import SimpleNamespace

import eval
from lib import plot
from lib.checkpoint import device_name, fingerprint, pick_device
from lib.configurator import UserError, configure, numbers, run
from sample import open_model, open_tokenizer, shared, whole_file

measuring = dict(  # as in eval.py
    num_samples=64,
    teacher='gpt2-large',
    **{key: shared[key] for key in ('seed', 'batch_size', 'device', 'dtype', 'compile')})
defaults = dict(
    steps='1,2,4,8,16,32,64',  # denoiser calls for the tokens
    strategies='joint,seq',    # of these, those that a method has
    latent_steps='8',          # of seq: denoiser calls for the latent; several make several curves
    gflops='',                 # budgets of the tables; empty: the measured ones of the longest curve
    time='wall',               # wall | cpu: the seconds of the figure; cpu if the machine was busy with something else
    paper='',                  # lm1b | owt: the paper's curves beside ours, in grey
    save='',                   # the figure; empty: frontier.png in the first folder
    results='',                # FILE.jsonl
    **measuring)


def main(argv):
    names = [a for a in argv if not a.startswith('-')]
    c = SimpleNamespace(**configure(defaults, [a for a in argv if a.startswith('-')]))
    folders = [os.path.normpath(name) for name in names if not name.endswith('.jsonl')]
    if not names:
        raise UserError('which runs? python frontier.py out/A out/B --teacher=out/AR')
    drawing = plot.frontier_options(c.paper, c.gflops, c.time)
    steps_list, asked, device = numbers('steps', c.steps), c.strategies.split(','), pick_device(c.device)
    if c.results and not c.results.endswith('.jsonl'):
        raise UserError(f'--results={c.results}: the name ends with .jsonl')
    if c.results not in names and os.path.exists(c.results):
        raise UserError(f'{c.results} holds results: name it among the runs, too, or give another file')

    # which results are wanted, and the eval.py command that makes them
    wanted = []
    for folder in folders:
        method, config = open_model(SimpleNamespace(out_dir=folder, init_from='', compile=False), device)
        strategies = [s for s in method.strategies if s in asked]
        if not strategies:
            raise UserError(f'{folder} has none of the strategies {c.strategies}; it has: {", ".join(method.strategies)}')
        if folder == folders[0]:
            teacher = eval.open_teacher(c.teacher, config, open_tokenizer(config), device)[1]
        same = {'step': config['step'], 'weights': fingerprint(method), 'num_samples': c.num_samples, 'seed': c.seed, 'batch_size': c.batch_size,
                'dtype': c.dtype, 'compile': c.compile, 'device': device_name(device), **teacher}
        for strategy in strategies:
            flags = {'strategy': strategy, **({'latent_steps': c.latent_steps} if strategy == 'seq' else {})}
            for options in eval.variants(SimpleNamespace(**{**eval.defaults, **vars(c), 'latent_steps': '8', **flags}), method):
                command = [f'--out_dir={folder}', '--metrics=gen_ppl,diversity', f'--strategy={strategy}',
                           *(['--latent_steps=' + str(options['latent_steps'])] if strategy == 'seq' else []),
                           *(f'--{key}={getattr(c, key)}' for key in measuring)]
                budgets = {eval.denoiser_calls(method, config['block_size'], steps, options): steps for steps in steps_list}
                wanted.append((folder, command, budgets, {**same, **options}))

    def known(folder, settings):
        return [r for r in plot.gen_ppls(folder) if settings.items() <= r.items()][-1:]

    results = plot.measured([name for name in names if name.endswith('.jsonl')])
    for folder, command, budgets, settings in wanted:
        missing = [steps for calls, steps in budgets.items() if not known(folder, {**settings, 'steps': calls})]
        if missing:
            eval.main([*command, '--steps=' + ','.join(map(str, missing))])
        results += [r for calls in budgets for r in known(folder, {**settings, 'steps': calls})]

    if c.results:
        with whole_file(c.results) as f:
            f.writelines(dict.fromkeys((json.dumps(r) + '\n').encode() for r in results))  # of what came from there and from a run, once
    path = c.save or os.path.join(folders[0] if folders else os.path.dirname(names[0]), 'frontier.png')
    plot.frontier(results, path, sys.stdout, **drawing)
    print(path)


if __name__ == '__main__':
    run(main)
