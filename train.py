"""
Trains any method of this folder on any data set, on one core or many GPUs.

    python train.py config/NAME.py [--key=value ...]                 -> out/NAME/ckpt.pt, out/NAME/log.jsonl
    torchrun --standalone --nproc_per_node=8 train.py config/NAME.py [--key=value ...]      the same on 8 GPUs
    python train.py config/NAME.py --help     all keys, the method's too; the Config of its file explains them

The same command again continues the run, with the numbers that it would have had without a stop, on any
number of processes: data, times and masks are functions of (seed, step, global row), see lib/noise.py.
Ctrl-C or SIGTERM saves before it stops. Read from the end: main, then what it uses.
"""
import math
import os
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.distributed as dist
from tqdm import tqdm

from lib.checkpoint import save
from lib.configurator import Keys, UserError, configure, key, run
from lib.device import compile_in_place, pick_device
from lib.distributed import GradientAverage, connect, largest, rank_and_world, summed
from lib.log import Log
from lib.noise import Noise, seed_of
from lib.signals import heed_signals, unbreakable_output
from lib.tokens import Tokens, WithLatents
from lib.weights import find_weights, load_weights
from methods import METHODS, attach_encoder, build
from sawtooth import Sawtooth, report


@dataclass
class Config(Keys):
    out_dir: str = 'out/run'       # a config file NAME.py makes it out/NAME
    init_from: str = 'auto'        # auto: continue what out_dir holds, start if it holds nothing
    #                                scratch: start over | resume: continue or fail
    #                                out/OTHER: as auto, but start from that run's averaged weights
    #                                HUB_ID or folder: as auto, but start from published weights (lib/hub.py)
    method: str = 'mdlm'           # a name in methods.py; the Config in its file has more keys
    dataset: str = 'sawtooth'      # sawtooth, or a folder of data/ that prepare.py has filled
    block_size: int = key(0, at_least=0)   # tokens per sequence; 0: sawtooth's own 128
    seed: int = 0
    # the machine
    device: str = 'auto'           # auto | cpu | cuda | mps
    dtype: str = key('bfloat16', choices=('bfloat16', 'float32'))  # of matrix products; weights stay float32
    compile: bool = False          # torch.compile; on a CPU it needs a C++ compiler and takes a minute
    batch_size: int = key(64, at_least=1)  # sequences per step, over all processes
    micro_batch: int = key(0, at_least=0)  # sequences per forward pass of a process; 0: all that it has
    optimizer: str = key('adamw', choices=('adamw', 'muon'))  # see make_optimizers
    max_iters: int = key(10000, at_least=1)
    learning_rate: float = key(3e-4, at_least=0)
    warmup_iters: int = key(0, at_least=0)  # steps of linear warmup
    decay_lr: str = key('constant', choices=('constant', 'cosine', 'linear'))  # after warmup
    min_lr: float = key(0.0, at_least=0, only={'decay_lr': ('cosine', 'linear')})  # last rate / learning_rate
    beta1: float = key(0.9, at_least=0, below=1)
    beta2: float = key(0.999, at_least=0, below=1)
    adam_eps: float = key(1e-8, at_least=0)
    weight_decay: float = key(0.0, at_least=0)  # of matrices; gains and biases have none
    grad_clip: float = key(1.0, at_least=0)     # largest norm of the gradient; 0: no clipping
    ema: float = key(0.9999, at_least=0, below=1)  # decay of the averaged weights, which are the ones used
    # what is written, and when (in steps)
    log_interval: int = key(10, at_least=1)
    eval_interval: int = key(1000, at_least=1)
    eval_seqs: int = key(512, at_least=1)  # validation sequences per evaluation
    checkpoint_interval: int = key(0, at_least=0)  # 0: at evaluations
    wandb: bool = False            # log to Weights & Biases, too


EVAL_SEED = 0xE0A1  # evaluation draws the same times and masks at every step of every run


# ------------------------------------------------------------------------------------------------------------
# a step

def learning_rate(c, step, restarts=()):
    """Linear warmup, then constant, half a cosine or a line; and the same again from each of `restarts`."""
    begin = max(s for s in (0, *restarts) if s <= step)
    end = min((s for s in (*restarts, c.max_iters) if s > step), default=c.max_iters)
    if step - begin < c.warmup_iters:
        return c.learning_rate * (step - begin + 1) / c.warmup_iters
    x = (step - begin - c.warmup_iters) / max(1, end - begin - c.warmup_iters)  # 0 ... 1
    fall = {'constant': 1.0, 'cosine': (1 + math.cos(math.pi * x)) / 2, 'linear': 1 - x}[c.decay_lr]
    return c.learning_rate * (c.min_lr + (1 - c.min_lr) * fall)


def make_optimizers(method, c):
    """AdamW for all weights, or with Muon for the matrices inside of blocks -> list of optimizers.

    Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon) moves a matrix along its averaged gradient
    with all singular values set to 1, here scaled to the size of AdamW's moves, so that both share a rate.
    Embeddings, heads, AdaLN and vectors stay with AdamW.
    """
    named = list(method.named_parameters())
    inner = [p for name, p in named if c.optimizer == 'muon' and p.dim() == 2
             and '.blocks.' in name and '.ada.' not in name]
    taken = {id(p) for p in inner}
    matrices = [p for _, p in named if p.dim() > 1 and id(p) not in taken]
    vectors = [p for _, p in named if p.dim() <= 1]
    common = dict(lr=c.learning_rate, weight_decay=c.weight_decay)
    adamw = torch.optim.AdamW([{'params': matrices}, {'params': vectors, 'weight_decay': 0.0}], **common,
                              betas=(c.beta1, c.beta2), eps=c.adam_eps, fused=True)
    return [adamw, torch.optim.Muon(inner, **common, adjust_lr_fn='match_rms_adamw')] if inner else [adamw]


class Trainer:
    """A method in training, with its optimizer and its averaged weights: all that a step changes."""

    def __init__(self, method, c, device):
        self.method, self.c, self.device = method.to(device).train(), c, device
        self.rank, self.world = rank_and_world()
        share = c.batch_size // self.world
        self.accumulate = share // (c.micro_batch or share)
        self.rows = self.rank + self.world * torch.arange(share)  # our rows of the batch, interleaved
        self.device_rows = self.rows.to(device)
        torch.set_float32_matmul_precision('high')
        self.names, self.params = zip(*method.named_parameters())
        self.average = GradientAverage(self.params)
        self.ema = [p.detach().clone() for p in self.params]
        self.optimizers = make_optimizers(method, c)
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=c.dtype == 'bfloat16')
        self.skipped, self.in_a_row, self.most_in_a_row = torch.zeros(3, device=device)  # steps not finite

    def rate(self, step):
        return learning_rate(self.c, step, self.method.lr_restarts)

    def step(self, step, batch, draw_rows):
        """One step on our share of the batch -> numbers for the log, all still on the device.

        batch: ids (share, L), and stored latents where there are any;  draw_rows: see Method.begin_step.
        """
        c, method = self.c, self.method
        x, *z_0 = (part.to(self.device, non_blocking=True) for part in batch)
        noise = Noise(c.seed, step, self.device_rows, c.batch_size)
        # dropout, too, is a function of the step
        torch.manual_seed(seed_of(c.seed, step, self.rank))
        with self.autocast:
            news = method.begin_step(step, noise, draw_rows)
        if news and self.rank == 0:
            tqdm.write(f'step {step:,}: {news}')

        # --- gradient ---------------------------------------------------------------------------------------
        loss, logs = 0.0, {}
        for i in range(self.accumulate):
            micro = slice(i, None, self.accumulate)  # evenly spaced rows have evenly spaced times
            with self.autocast:
                part, part_logs = method(x[micro], noise[micro], *(z[micro] for z in z_0))
            if i == self.accumulate - 1:
                self.average.begin()
            (part / self.accumulate).backward()
            loss = loss + part.detach().float() / self.accumulate
            logs = {k: logs.get(k, 0) + v / self.accumulate for k, v in part_logs.items()}
        loss = self.average.finish(loss)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.params, c.grad_clip or math.inf)

        # --- update: skipped if loss or gradient is not finite; AdamW's without asking the host -------
        finite = torch.isfinite(loss + grad_norm)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group['lr'] = self.rate(step)
            # fused AdamW skips the step itself, as it does for a GradScaler; Muon cannot, so the host looks
            optimizer.grad_scale, optimizer.found_inf = None, (~finite).float()
            if not isinstance(optimizer, torch.optim.Muon) or finite:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        method.end_step(finite, noise)
        with torch.no_grad():  # a lower decay early on, so that even a short run forgets its start
            torch._foreach_lerp_(self.ema, self.params, 1 - min(c.ema, (step + 1) / (step + 10)))
        self.in_a_row = (self.in_a_row + 1) * ~finite
        self.most_in_a_row = torch.maximum(self.most_in_a_row, self.in_a_row)
        self.skipped = self.skipped + ~finite
        # ----------------------------------------------------------------------------------------------------
        return logs, {'loss': loss, 'grad_norm': grad_norm, 'skipped': self.skipped,
                      'worst': self.most_in_a_row}

    @contextmanager
    def averaged(self):
        """Within, the method is in eval mode and its weights are the averaged ones."""
        def swap():
            for p, e in zip(self.params, self.ema):
                p.data, e.data = e.data, p.data
        swap()
        self.method.eval()
        try:
            with torch.compiler.set_stance('force_eager'), self.autocast:  # not worth compiling a second time
                yield
        finally:
            swap()
            self.method.train()

    @torch.no_grad()
    def evaluate(self, data, n):
        """Method.validation over the first n validation sequences -> {name: mean over the sequences}.

        The same numbers for every batch size and number of processes.
        """
        n, size = min(n, len(data)), len(self.rows) // self.accumulate
        totals = dict.fromkeys(self.method.validated, 0.0)
        with self.averaged():
            for first in range(self.rank, n, self.world * size):
                rows = torch.arange(first, min(first + self.world * size, n), self.world)
                x, *z_0 = (part.to(self.device) for part in data.rows(rows))
                noise = Noise(EVAL_SEED, 0, rows.to(self.device), n)
                for name, values in self.method.validation(x, noise, *z_0).items():
                    totals[name] += values.sum().item()
        means = summed(torch.tensor([*totals.values()], dtype=torch.float64)) / n
        return dict(zip(totals, means.tolist()))

    def checkpoint(self, config, step, tokens):
        states = {name: optimizer.state[p] for optimizer in self.optimizers
                  for name, p in zip(self.names, self.params) if p in optimizer.state}
        return {'config': config, 'model': self.method.state_dict(), 'ema': dict(zip(self.names, self.ema)),
                'optimizer': states, 'step': step, 'tokens': tokens}

    def load(self, checkpoint):
        params = dict(zip(self.names, self.params))
        for optimizer in self.optimizers:
            mine = [p for group in optimizer.param_groups for p in group['params']]
            numbers = {p: i for i, p in enumerate(mine)}
            states = {numbers[params[name]]: state for name, state in checkpoint['optimizer'].items()
                      if params[name] in numbers}
            optimizer.load_state_dict({**optimizer.state_dict(), 'state': states})
        torch._foreach_copy_(self.ema, [checkpoint['ema'][name].to(self.device) for name in self.names])


# ------------------------------------------------------------------------------------------------------------
# data

def open_data(name, split, block_size):
    """The data source that a config calls `dataset`: sawtooth is computed, all else is a prepared set."""
    return Sawtooth(split) if name == 'sawtooth' else Tokens(name, split, block_size)


def batches(data, c, rows, start, device):
    """(step, batch, draw_rows) from step `start` on; a thread reads the next batch during the step.

    draw_rows(n) -> n rows of that step's data, for a method that asks for more than a batch.
    """
    def fetch(step):
        batch = data.batch(c.seed, step, rows)
        return [part.pin_memory() for part in batch] if device.type == 'cuda' else batch

    with ThreadPoolExecutor(1) as reader:
        next_batch = reader.submit(fetch, start)
        for step in range(start, c.max_iters):
            def draw_rows(n, step=step):
                return [part.to(device) for part in data.batch(c.seed, step, torch.arange(n))]
            batch, next_batch = next_batch.result(), reader.submit(fetch, step + 1)
            yield step, batch, draw_rows


# ------------------------------------------------------------------------------------------------------------
# before the loop: whatever can be wrong is found before anything is written

def check_batch(c, world):
    """UserError unless the batch divides among processes and forward passes."""
    share = c.batch_size // world
    if c.batch_size % world:
        raise UserError(f'batch_size={c.batch_size} does not divide among {world} processes; '
                        f'{max(share, 1) * world} would')
    if share % (c.micro_batch or 1):
        raise UserError(f'micro_batch={c.micro_batch} does not divide the {share} sequences of a process; '
                        f'{math.gcd(share, c.micro_batch)} would')


def prepare(argv):
    """-> config, trainer, training and validation data, and where the run stands: (steps, tokens)."""
    config = configure(Config, argv, METHODS)
    config['dataset'] = os.path.normpath(config['dataset'])
    if config['init_from'] == 'scratch' and int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)):
        config['init_from'] = 'auto'  # a worker died, and torchrun gives the same command again: continue
    check_batch(SimpleNamespace(**config), rank_and_world()[1])
    device = pick_device(config['device'])
    checkpoint, published = find_weights(config)
    name, L = config['dataset'], config['block_size']
    train_data, val_data = open_data(name, 'train', L), open_data(name, 'val', L)
    if L not in (0, train_data.block_size):
        raise UserError(f'{name} has sequences of {train_data.block_size} tokens, not block_size={L}')
    config.update(vocab_size=train_data.vocab_size, block_size=train_data.block_size)
    if train_data.tokenizer:  # the checkpoint can then read and write text without the data
        config.update(tokenizer=train_data.tokenizer, wrap=train_data.wrap, data_sha256=train_data.sha256)

    torch.manual_seed(config['seed'])  # every process begins with the same weights
    method = build(config)
    if method.stored_latents:
        train_data, val_data = (WithLatents(data, method.encoder_name, **method.stored_latents)
                                for data in (train_data, val_data))
        config['encoder_weights'] = train_data.encoder_weights
    elif method.encoder_name:
        config['encoder_weights'] = attach_encoder(method, train_data, device)
    load_weights(method, config, checkpoint, published)
    if config['wandb']:
        config['wandb_id'] = (checkpoint or {'config': {}})['config'].get('wandb_id', uuid.uuid4().hex)

    trainer = Trainer(method, SimpleNamespace(**config), device)
    if checkpoint:
        trainer.load(checkpoint)
    if config['compile']:
        # the whole forward pass; on a CPU without the heads, whose number of rows changes from step to step
        asked = any(arg.startswith('--compile') for arg in argv)
        compile_in_place(method.backbones() if device.type == 'cpu' else [method], device, required=asked)
    progress = (checkpoint['step'], checkpoint['tokens']) if checkpoint else (0, 0)
    return config, trainer, train_data, val_data, progress


# ------------------------------------------------------------------------------------------------------------
# the run

def meet(trainer, start, out_dir):
    """Joins the processes, if there are several. UserError unless all begin at the same step."""
    if trainer.world > 1:
        connect(trainer.device)
        if largest(start) != -largest(-start):
            raise UserError(f'processes begin at steps {-largest(-start)} to {largest(start)}: {out_dir} '
                            'must be one folder that all nodes see')


def due(c, done, stopped_by, validated):
    """What follows after `done` steps -> log?, validate?, save?"""
    last = done == c.max_iters
    validate = validated and not stopped_by and (last or done % c.eval_interval == 0)
    save = stopped_by or last or done % (c.checkpoint_interval or c.eval_interval) == 0
    return validate or save or done % c.log_interval == 0, validate, save


def loop(config, trainer, train_data, val_data, done, tokens):
    """Trains until max_iters or a signal -> the number of steps done, and the signal or 0."""
    c, stopped_by = trainer.c, 0
    feed = batches(train_data, c, trainer.rows, done, trainer.device)
    log, start = Log(config, trainer, done, tokens), done

    def validate():
        with log.saying('validating'):
            means = trainer.evaluate(val_data, c.eval_seqs)
        log.validation(done, means)

    with closing(log), closing(feed), heed_signals(lambda: done > start) as received:
        if start and due(c, start, 0, trainer.method.validated)[1] and largest(log.lacks_validation(start)):
            validate()  # a signal came before it
            log.restart_clock(tokens)
        for step, batch, draw_rows in feed:
            logs, numbers = trainer.step(step, batch, draw_rows)
            done, tokens, log.doing = step + 1, tokens + c.batch_size * c.block_size, ''
            log.bar.update()
            # all processes stop after the same step; a signal from here on waits for the next one
            stopped_by = largest(max(received, default=0))
            to_log, to_validate, to_save = due(c, done, stopped_by, trainer.method.validated)
            if to_log:
                log.step(done, tokens, trainer.rate(step), logs, numbers)
            if to_validate:
                validate()
            if to_save and trainer.rank == 0:  # after this step's records: whoever resumes here misses none
                save(os.path.join(c.out_dir, 'ckpt.pt'), trainer.checkpoint(config, done, tokens))
            if to_validate or to_save:
                log.restart_clock(tokens)
            if stopped_by:
                break
    return done, stopped_by


def main(argv):
    config, trainer, train_data, val_data, (start, tokens) = prepare(argv)
    with unbreakable_output():
        meet(trainer, start, config['out_dir'])
        done, stopped_by = loop(config, trainer, train_data, val_data, start, tokens)
        if trainer.world > 1:
            dist.destroy_process_group()
        if stopped_by:
            if trainer.rank == 0:
                print(f'stopped after step {done:,}; the same command continues')
            sys.exit(128 + stopped_by)
        if trainer.rank == 0 and config['dataset'] == 'sawtooth' and done > start:
            with trainer.averaged():
                report(trainer.method)


if __name__ == '__main__':
    run(main, Config, METHODS)
