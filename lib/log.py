"""
What a training run reports while it runs: log.jsonl, the progress bar, and Weights & Biases.
"""
import math
import os
import sys
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from tqdm import tqdm

from lib.checkpoint import cut_log, save
from lib.configurator import UserError
from lib.device import device_name
from lib.distributed import summed
from lib.files import append, read_lines
from lib.lock import claim
from lib.tokens import first_line


class Log:
    """Rank 0 writes; the other processes only take part in sums.

    trainer: a Trainer of train.py;  start, tokens: how many steps and tokens the run has behind it
    """

    def __init__(self, config, trainer, start, tokens):
        self.c, self.trainer = SimpleNamespace(**config), trainer
        self.path, self.first = os.path.join(self.c.out_dir, 'log.jsonl'), trainer.rank == 0
        self.release = claim(self.c.out_dir) if self.first else None
        if self.first:
            try:
                self.begin(config, start)
            except BaseException:
                self.release()
                raise
        self.bar = tqdm(total=self.c.max_iters, initial=start, disable=not self.first, unit='step',
                        mininterval=0.5 if sys.stderr.isatty() else 30, dynamic_ncols=True)
        self.clock, self.tokens = time.time(), tokens
        self.doing = 'compiling, once' if self.c.compile else ''
        self.closed = threading.Event()
        if self.first:
            threading.Thread(target=self.keep_moving, daemon=True).start()

    def keep_moving(self):
        """While no step ends, redraws the bar, so that its clock moves, and says what takes so long."""
        while not self.closed.wait(self.bar.mininterval):
            waiting = time.time() - self.bar.last_print_t > 2 * self.bar.mininterval
            self.bar.set_description(self.doing if waiting else '', refresh=waiting)

    @contextmanager
    def saying(self, what):
        """Within, the bar says what the run does instead of a step."""
        self.doing = what
        yield
        self.doing = ''

    def begin(self, config, start):
        """Opens what the run writes to, and prints its sizes. UserError if something cannot be opened."""
        self.wandb = self.join_wandb(config) if self.c.wandb else None
        if self.c.init_from == 'scratch':  # from here on the folder is the new run's, whenever it may die
            save(os.path.join(self.c.out_dir, 'ckpt.pt'), self.trainer.checkpoint(config, 0, 0))
        cut_log(self.path, start)
        self.introduce(start)

    def join_wandb(self, config):
        """Weights & Biases; after a resume the same run goes on."""
        try:
            import wandb
            return wandb.init(project='nanoladd', name=os.path.basename(self.c.out_dir), dir=self.c.out_dir,
                              id=config['wandb_id'], resume='allow', config=config)
        except ImportError as e:
            raise UserError('wandb=True needs the package: pip install wandb') from e
        except Exception as e:  # it fails in as many ways as a network does
            raise UserError(f'wandb=True fails ({first_line(e)}); is there a login? `wandb login`') from e

    def introduce(self, start):
        """Prints the sizes of the run, and where it continues."""
        c, method = self.c, self.trainer.method
        weights = sum(p.numel() for p in method.parameters()) / 1e6
        backbone = sum(p.numel() for m in method.backbones() for p in m.parameters()) / 1e6
        print(f'{c.method} on {c.dataset}: {weights:.2f}M parameters, {backbone:.2f}M in transformers; '
              f'{method.flops(c.block_size) / 1e9:.3g} GFLOPs per denoiser call; '
              f'{c.batch_size * c.block_size:,} tokens per step; '
              f'{self.trainer.world} x {device_name(self.trainer.device)}, {c.dtype}', flush=True)
        if start:
            more = '; a larger --max_iters continues it' if start >= c.max_iters else ''
            print(f'{c.out_dir} is at step {start:,} of {c.max_iters:,}{more}', flush=True)

    def record(self, numbers):
        """numbers: {name: number}, with `step` among them."""
        if self.first:
            append(self.path, numbers)
            if self.wandb:
                self.wandb.log(numbers, step=numbers['step'])

    def step(self, done, tokens, lr, logs, numbers):
        """Records a step; exits if 3 steps in a row were not finite.

        logs, numbers: {name: scalar on the device}, of this process and of the run. Reading them is the
        only place where the host waits for the device.
        """
        means = summed(torch.stack([v.float() for v in logs.values()])) / self.trainer.world
        logs = dict(zip(logs, means.tolist()))
        numbers = dict(zip(numbers, torch.stack([v.float() for v in numbers.values()]).tolist()))
        if numbers.pop('worst') >= 3:
            sys.exit(f'error: loss or gradient was not finite in 3 steps in a row, up to step {done}; '
                     f'{self.c.out_dir} keeps its last checkpoint; try a lower --learning_rate'
                     if self.first else 1)
        speed = (tokens - self.tokens) / max(time.time() - self.clock, 1e-9)  # a clock may be coarse
        self.record({'step': done, **logs, **numbers, 'lr': lr,
                     'tokens_per_s': round(speed), 'tokens': tokens})
        self.bar.set_postfix(loss=f'{numbers["loss"]:.4f}', tokens_per_s=f'{speed:,.0f}', refresh=False)
        self.loss = numbers['loss']
        self.restart_clock(tokens)

    def validation(self, done, means):
        """means: {name: number per sequence} of Trainer.evaluate, with the averaged weights."""
        if 'nats' in means:
            loss = means['nats'] / self.c.block_size
            means = {'loss': loss, 'ppl': math.exp(min(loss, 700))}
            said = f'{loss:.4f} nats per token, perplexity {means["ppl"]:.2f}'
        else:
            said = ', '.join(f'{name} {value:.4f}' for name, value in means.items())
        self.record({'step': done, **{f'val_{name}': value for name, value in means.items()}})
        if self.first:
            self.bar.write(f'step {done:,}: loss {self.loss:.4f}, validation {said}')

    def lacks_validation(self, step):
        """Whether log.jsonl, which rank 0 reads, has the loss of that step, but no validation after it."""
        records = [r for r in read_lines(self.path) if r.get('step') == step] if self.first else []
        self.loss = next((r['loss'] for r in records if r.get('loss') is not None), math.nan)
        return bool(records) and not any(name.startswith('val_') for r in records for name in r)

    def close(self):
        self.closed.set()
        self.bar.close()
        if self.first:
            self.release()

    def restart_clock(self, tokens):
        """Starts to measure the speed anew, so that validation and saving do not count."""
        self.clock, self.tokens = time.time(), tokens
