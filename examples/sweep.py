"""
How much a method has been tuned, as a number: one config at several learning rates, each for a tenth
of its steps.

    python -m examples.sweep config/shakespeare_char_mdlm.py
    python -m examples.sweep config/shakespeare_char_mdlm.py --optimizer=adamw --rates=1e-3,2e-3,4e-3,8e-3

Everything that is counted in steps, such as a warmup or the start of a stage, shrinks with max_iters. Flags
other than those below go to train.py. Each run's last validation is one line of out/sweeps.jsonl, with what
repeats it; a rate whose line is there is not trained again. The lowest wins: its rate is for the whole run.
"""
import os
import re
import shlex
import shutil
import sys
import time
from dataclasses import dataclass

import torch

import train
from lib.configurator import Keys, UserError, configure, key, run
from lib.device import device_name, pick_device
from lib.files import append, read_lines
from lib.plot import print_table
from methods import METHODS


@dataclass
class Config(Keys):
    rates: str = '1e-3,2e-3,4e-3'
    part: float = key(0.1, above=0, at_most=1)  # of max_iters and of all other numbers of steps
    results: str = 'out/sweeps.jsonl'


STEPS = re.compile(r'.*_(iters|start|warmup)')  # the keys that count steps


def shrunk(config, part):
    """The flags of a shorter run: all that is counted in steps, and one validation, at the end."""
    steps = {k: max(1, round(v * part)) for k, v in config.items()
             if STEPS.fullmatch(k) and isinstance(v, int) and v}
    return [f'--{k}={v}' for k, v in {**steps, 'eval_interval': steps['max_iters']}.items()]


def last_validation(out_dir):
    """{name: number}"""
    records = read_lines(os.path.join(out_dir, 'log.jsonl'))
    return [{k: v for k, v in r.items() if k.startswith('val_')} for r in records if 'loss' not in r][-1]


def main(argv):
    own = tuple(f'--{k}=' for k in vars(Config()))
    c = Config(**configure(Config, [a for a in argv if a.startswith(own)]))
    rest = [a for a in argv if not a.startswith(own)]
    config = configure(train.Config, rest, METHODS)
    try:
        rates = [float(r) for r in c.rates.split(',')]
    except ValueError:
        raise UserError(f'--rates wants numbers, as in --rates=1e-3,2e-3; not {c.rates!r}') from None
    done = {r['command']: r for r in read_lines(c.results)}
    rows = []
    for rate in rates:
        name = f'{os.path.basename(config["out_dir"])}_{config["optimizer"]}_{rate:g}'
        out_dir = os.path.join('out', 'sweep', name)
        argv = [*rest, *shrunk(config, c.part), f'--learning_rate={rate:g}', f'--out_dir={out_dir}']
        command = shlex.join(['python', 'train.py', *argv])
        if command not in done:
            shutil.rmtree(out_dir, ignore_errors=True)  # of another sweep, or stopped: train.py would go on
            start = time.time()
            train.main(argv)
            done[command] = {
                'method': config['method'], 'optimizer': config['optimizer'], 'learning_rate': rate,
                **last_validation(out_dir), 'seed': config['seed'],
                'seconds': round(time.time() - start), 'torch': torch.__version__,
                'device': device_name(pick_device(config['device'])), 'command': command}
            append(c.results, done[command])
        rows.append([f'{rate:g}', *(f'{v:.4f}' for k, v in done[command].items() if k.startswith('val_'))])
    columns = [k for k in done[command] if k.startswith('val_')]
    print_table(f'{config["method"]}, {config["optimizer"]}: learning rate', columns, rows, sys.stdout)


if __name__ == '__main__':
    run(main, Config)
