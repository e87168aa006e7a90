"""
Speed and memory of a config on this machine, and what the economical vocabulary head is worth.

    python bench.py config/NAME.py [--key=value ...]                   the keys of train.py, and those below
    python bench.py config/owt_mdlm.py --vocab_size=151669             random tokens: no data set needed
    python bench.py config/owt_di_ladd.py --vocab_size=151669 --stored_latents=True --stage1_iters=0   stage 2
    python bench.py config/owt.py --vocab_size=151669 --plan --gpu=H100 --network=400g
    torchrun --standalone --nproc_per_node=2 bench.py config/NAME.py --vocab_size=50257 --block_size=1024

A training step is train.py's own, on random tokens and random stored latents; a frozen encoder runs as in
training. Everything is measured several times, each time in its own process: compiled (if the config says
so), eager, and with the full head. In this, the straightforward way, training forms the logits of all
positions, (B, L, V), and MDLM's sampler draws a token at each of them by fp64 Gumbel noise over V + 1 words.

Training FLOPs per sequence = 6 * (layers * (12 L d^2 + 2 L^2 d) + rows * d * V): two per multiply-add, and
backward costs twice forward; rows = L / 2, the positions that MDLM and LADD mask on average (others: L).
LDLM adds its autoencoder and the forward pass of self-conditioning. This is the useful work, the same number
for all variants; embeddings, AdaLN and other encoders are left out. MFU is its share of the printed peak.

--plan trains nothing: it prints what 1 to 64 GPUs should need by arithmetic (lib/plan.py), at an assumed MFU.
It measures only how fast this machine reads tokens: 64 MB of them, which are in memory, on one core; and
with --gpu=cpu the peak of this CPU.
"""
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

import mdlm
import model
import train
from lib.configurator import UserError, configure, key, numbers, run
from lib.device import compile_in_place, device_name, pick_device
from lib.distributed import connect, rank_and_world
from lib.plan import ENCODERS, GPUS, NETWORKS, Job, table
from lib.tokens import Tokens
from methods import METHODS, attach_encoder, build


@dataclass
class Config(train.Config):
    vocab_size: int = key(0, at_least=0)   # 0: that of the data set; otherwise no data set is opened
    iters: int = key(5, at_least=1)        # training steps that are timed; the median counts
    steps: str = '64'                      # of the sampler, with commas
    num_samples: int = key(2, at_least=0)  # sequences sampled at once; 0: no sampling
    # compiled | eager | full: what to measure in this process; '': one process for each, and a table of them
    variant: str = key('', choices=('', 'compiled', 'eager', 'full'))
    plan: bool = False                     # no measurement, but what 1 to 64 GPUs should need: lib/plan.py
    gpu: str = key('H100', choices=(*GPUS, 'cpu'), only={'plan': True})  # cpu: this machine's
    network: str = key('nvlink', choices=tuple(NETWORKS), only={'plan': True})  # between GPUs
    mfu: float = key(0.4, above=0, at_most=1, only={'plan': True})  # assumed


# ------------------------------------------------------------------------------------------------------------
# the straightforward way

def full_cross_entropy(replace, head, h, targets, weights=None):
    """In place of model.head_loss: the cross-entropy from all the logits at once."""
    losses = F.cross_entropy(head(h).float(), targets, reduction='none')
    return losses.mean() if weights is None else (weights * losses).sum()


def all_rows(mask, stratified=True):
    """In place of mdlm.masked_rows: all positions of mask (b, L), those that are not masked with weight 0."""
    return slice(None), mask.flatten(), mask.new_zeros((), dtype=torch.int64)


def use_full_head():
    """From here on, every method in this process has the straightforward loss.

    They all call model.head_cross_entropy, which calls head_loss; MDLM and LADD first choose rows.
    Duo and its distillation have losses of their own, which take their rows in chunks, now in a single one.
    """
    model.head_loss, mdlm.masked_rows = full_cross_entropy, all_rows
    model.rows_at_once = lambda *args, **limits: 2**62


@torch.no_grad()
def full_sample(method, x, alphas, steps):
    """The first `steps` steps along alphas, with head and noise at every position; each costs the same."""
    for alpha_t, alpha_s in list(mdlm.pairs(alphas))[:steps]:
        logits = method.head(method.dit(method.embed(x))).to(mdlm.wide(x.device))
        reveal = (alpha_s - alpha_t) / (1 - alpha_t)
        stay = (1 - reveal).expand(*x.shape, 1)  # the last outcome: [mask]
        probs = torch.cat((logits.softmax(dim=-1) * reveal, stay), dim=-1)             # (n, L, V + 1)
        drawn = (probs.log() - torch.rand_like(probs).log_().neg_().log_()).argmax(dim=-1)
        x = torch.where(x == method.mask_id, drawn, x)
    return x


# ------------------------------------------------------------------------------------------------------------
# measuring

def seconds(f, device):
    """How long f() takes; never 0, however coarse the clock."""
    if device.type != 'cpu':
        torch.accelerator.synchronize()
    start = time.perf_counter()
    f()
    if device.type != 'cpu':
        torch.accelerator.synchronize()
    return max(time.perf_counter() - start, 1e-9)


def peak_memory(device):
    """Bytes: the most that the GPU's allocator has held, or the process; None where it is not known."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def peak_flops(device, dtype):
    """-> FLOP/s, and where that number is from."""
    name = device_name(device)
    for card, (peak, _) in GPUS.items():
        if card in name and dtype == torch.bfloat16:
            return peak, f'{name}: {peak / 1e12:.0f} TFLOP/s dense bf16 by the data sheet'
    n = 8192 if device.type == 'cuda' else 2048
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    peak = 2 * n**3 / min(seconds(lambda: a @ b, device) for _ in range(5))
    return peak, f'{name}: {peak / 1e12:.3g} TFLOP/s, the best of five {n} x {n} products in {str(dtype)[6:]}'


def measure_training(method, c, device):
    """Steps of train.py on one random batch -> {'gradient_memory', 'memory', 'tokens_per_s'}.

    tokens_per_s: of all processes together
    """
    def texts(n):
        x, shape = torch.randint(c.vocab_size, (n, c.block_size), device=device), method.stored_latents
        if not shape:
            return [x]
        return [x, torch.randn(n, shape['num_latents'], shape['latent_dim'], device=device)]
    batch = texts(c.batch_size // rank_and_world()[1])

    # first without AdamW's state and the averaged weights: memory of forward and backward alone
    trainer = train.Trainer(method, c, device)
    trainer.optimizers, trainer.ema = [torch.optim.SGD(trainer.params, fused=True)], trainer.params
    for step in range(2):
        trainer.step(step, batch, texts)
    result = {'gradient_memory': peak_memory(device)}

    trainer = train.Trainer(method, c, device)
    trainer.step(2, batch, texts)
    times = [seconds(lambda i=i: trainer.step(3 + i, batch, texts), device) for i in range(c.iters)]
    tokens_per_s = c.batch_size * c.block_size / statistics.median(times)
    return result | {'memory': peak_memory(device), 'tokens_per_s': tokens_per_s}


def measure_sampling(method, c, device):
    """-> {'sampling STRATEGY STEPS': seconds per sequence}.

    Of straightforward samplers there is only MDLM's.
    """
    n, result, all_steps = c.num_samples, {}, numbers('steps', c.steps)
    if c.variant == 'full' and method.name == 'MDLM':
        alphas, part = mdlm.alpha(mdlm.time_grid(max(all_steps), device), c.schedule), min(4, *all_steps)
        time_of_part = seconds(lambda: full_sample(method, method.all_masked(n), alphas, part), device)
        return {f'sampling joint {steps}': time_of_part / n * steps / part for steps in all_steps}
    if c.variant == 'full':
        return {}
    if c.variant == 'compiled' and device.type != 'cpu':
        compile_in_place(method.backbones(), device)
    for strategy in method.strategies:
        method.sample(n, max(all_steps), strategy)  # a warm-up, since the number of texts in a call varies
        for steps in all_steps:
            time_of_all = seconds(partial(method.sample, n, steps, strategy), device)
            result[f'sampling {strategy} {steps}'] = time_of_all / n
    return result


def measure(c, config, device):
    """One variant -> dict of numbers."""
    if rank_and_world()[1] > 1:
        connect(device)
    torch.manual_seed(c.seed)
    method = build(config).to(device)
    if method.encoder_name and not method.stored_latents:
        attach_encoder(method, None, device)
    if c.variant == 'full':
        use_full_head()
    if c.variant == 'compiled':  # what train.py compiles
        compile_in_place(method.backbones() if device.type == 'cpu' else [method], device)
    result = measure_training(method, c, device)
    if c.num_samples:
        with torch.autocast(device.type, torch.bfloat16, enabled=c.dtype == 'bfloat16'):
            result |= measure_sampling(method.eval(), c, device)
    return result


def in_its_own_process(argv, variant):
    """measure() where nothing has been allocated before -> its dict; {} if it ran out of memory, say."""
    command = [sys.executable, __file__, *argv, f'--variant={variant}']
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    return {} if done.returncode else json.loads(done.stdout)


# ------------------------------------------------------------------------------------------------------------

def prepare(argv):
    """-> the flat config, with vocab_size and block_size, and the device."""
    config = configure(Config, argv, METHODS)
    train.check_batch(SimpleNamespace(**config), rank_and_world()[1])
    if config['vocab_size'] and not config['block_size']:
        raise UserError('random tokens (vocab_size) need a block_size, too')
    numbers('steps', config['steps'])  # UserError for any other text
    if not config['vocab_size']:
        try:
            data = train.open_data(config['dataset'], 'train', config['block_size'])
        except UserError as e:
            raise UserError(f'{e}; or --vocab_size=50257 for random tokens') from e
        config.update(vocab_size=data.vocab_size, block_size=data.block_size)
    return config, pick_device(config['device'])


def cell(value):
    return f'{"-":>12}' if value is None else f'{value:12,.0f}' if value >= 1000 else f'{value:12.4g}'


def print_table(results, rows):
    """A column for each variant of results {variant: dict}, a line for each row (label, key, scale)."""
    names = ('full head' if variant == 'full' else variant for variant in results)
    print(f'{"":44}' + ''.join(f'{name:>12}' for name in names) + f'{"ratio":>10}')
    for label, name, scale in rows:
        values = [result.get(name) for result in results.values()]
        values = [None if value is None else scale * value for value in values]
        there = [value for value in values if value is not None]
        if there:
            ratio = f'{there[0] / there[-1]:9.3g}x' if len(there) > 1 else ''
            print(f'{label:44}' + ''.join(map(cell, values)) + ratio)


# ------------------------------------------------------------------------------------------------------------
# the plan

OFFICIAL = 'official H100-hours per million steps on OWT: MDLM 1,296, Co-LADD-64 1,760, Di-LADD-64 1,786'


def job_of(config):
    """What a step of this config computes, as plan.Job. ValueError if its FLOPs are not counted."""
    with torch.device('meta'):
        method, headless = build(config), build({**config, 'vocab_size': 1})
    c = SimpleNamespace(**config)
    L, sizes = c.block_size, [p.numel() for p in method.parameters()]
    trunk = headless.training_flops(L) / 6
    reads = method.encoder_name and not method.stored_latents
    if reads and method.encoder_name not in ENCODERS:
        print(f'without the forward passes of {method.encoder_name}, whose size lib/plan.py does not know')
    encoder = 2 * ENCODERS.get(method.encoder_name, 0) * L if reads else 0
    return Job(c.batch_size, c.micro_batch, L, c.hidden, c.vocab_size, sum(sizes), sizes[0], trunk,
               method.training_flops(L) / 6 - trunk, encoder, c.num_heads if c.gpu == 'cpu' else 0)


def measure_feed(L, dtype, rows=64, at_least=1.0):
    """Tokens/s that a process reads from a file in memory, as in training, in `at_least` seconds."""
    with tempfile.TemporaryDirectory() as folder:
        ids = np.arange(2**26 // np.dtype(dtype).itemsize, dtype=dtype) % 1000
        ids.tofile(os.path.join(folder, 'train.bin'))
        meta = dict(train={'tokens': len(ids)}, vocab_size=1000, dtype=dtype, tokenizer={'kind': 'gpt2'},
                    wrap=False, eos_id=None, bos_id=None)
        with open(os.path.join(folder, 'meta.json'), 'w') as f:
            json.dump(meta, f)
        data, start, step = Tokens(folder, 'train', L), time.perf_counter(), 0
        while time.perf_counter() < start + at_least or not step:
            data.batch(0, step, torch.arange(rows))
            step += 1
        return step * rows * L / max(time.perf_counter() - start, 1e-9)


def print_plan(config):
    c, job = SimpleNamespace(**config), job_of(config)
    if (c.gpu == 'cpu') != (c.network == 'gloo'):
        raise UserError('--gpu=cpu and --network=gloo go together')
    feed = measure_feed(c.block_size, 'uint32' if c.vocab_size > 2**16 else 'uint16')
    print(f'{c.method}, {job.params / 1e6:,.0f}M trained parameters, L = {job.length}, V = {job.vocab:,}, '
          f'batch {job.batch}; {c.gpu}, {c.network}: {NETWORKS[c.network] / 1e9:g} GB/s each way')
    peak, memory = GPUS.get(c.gpu) or (peak_flops(torch.device('cpu'), getattr(torch, c.dtype))[0], 0)
    for label, values in table(job, peak, memory, NETWORKS[c.network], c.mfu, feed):
        print(f'{label:48}' + ''.join(map(cell, values)))
    if c.gpu != 'cpu':
        print(OFFICIAL)


def main(argv):
    config, device = prepare(argv)
    c = SimpleNamespace(**config)
    if c.plan:
        try:
            return print_plan(config)
        except ValueError as e:
            raise UserError(e) from e
    if c.variant:
        with redirect_stdout(sys.stderr):  # where a step prints its news: our output is JSON and nothing else
            result = measure(c, config, device)
        return print(json.dumps(result))

    with torch.device('meta'):
        method = build(config)
    try:
        flops = method.training_flops(c.block_size) / c.block_size  # per token
    except ValueError as e:
        raise UserError(e) from e
    (rank, world), (peak, source) = rank_and_world(), peak_flops(device, getattr(torch, c.dtype))
    if rank == 0:
        print(f'{c.method}, {c.num_layers} layers of width {c.hidden}, L = {c.block_size}, '
              f'V = {c.vocab_size:,}, batch {c.batch_size}, {c.dtype}' + f', {world} processes' * (world > 1))
        print(f'{flops / 1e9:.3g} training GFLOPs per token; peak assumed for MFU: {source}', flush=True)
    variants = [*['compiled'] * c.compile, 'eager', 'full']
    results = {variant: in_its_own_process(argv, variant) for variant in variants}
    if not any(results.values()):
        raise UserError('the measurement failed for the reason above')
    if rank == 0:
        label = 'sampling {} steps, s/sequence' + ', {}' * (len(method.strategies) > 1)
        print_table(results, [
            ('training, tokens/s', 'tokens_per_s', 1),
            ('training, MFU in %', 'tokens_per_s', 100 * flops / peak / world),
            ('peak memory in GB: forward and backward', 'gradient_memory', 1e-9),
            ('                   with AdamW and EMA', 'memory', 1e-9),
            *((label.format(steps, strategy), f'sampling {strategy} {steps}', 1)
              for strategy in method.strategies for steps in numbers('steps', c.steps)),
        ])


if __name__ == '__main__':
    run(main, Config, METHODS)
