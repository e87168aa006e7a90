"""
What a training step should take on GPUs that you do not have: arithmetic, no step is measured.

`python bench.py config/NAME.py --plan` prints it. Every line of the table is one function below.
"""
import math
from dataclasses import dataclass

# dense bf16 FLOP/s and bytes of memory: NVIDIA's data sheets of these cards (without sparsity)
GPUS = {'H200': (989e12, 141e9), 'H100': (989e12, 80e9), 'A100': (312e12, 80e9),
        'L40S': (362e12, 48e9), 'RTX 4090': (165e12, 24e9)}

# bytes/s in one direction through the narrowest link of the ring that connects the GPUs
NETWORKS = {'nvlink': 450e9,   # fourth generation, H100 data sheet: 900 GB/s in both directions together
            '400g': 50e9,      # one port of 400 Gb/s, Ethernet or InfiniBand NDR
            '25g': 3.125e9,    # one port of 25 Gb/s
            'gloo': 2.1e9}     # processes on CPU cores of one machine, an AMD EPYC; in processor time

# parameters without embeddings of frozen encoders, by their model cards: one forward pass reads each once
ENCODERS = {'Qwen/Qwen3-Embedding-0.6B': 440e6, 'gpt2': 85e6}


@dataclass
class Job:
    """A training step, before it is divided among GPUs."""
    batch: int            # sequences per step, over all GPUs
    micro: int            # sequences per forward pass; 0: all that a GPU has
    length: int           # L
    width: int            # d
    vocab: int            # V
    params: float         # trained ones
    first: float          # of these, in the first layer, whose gradient arrives last: the embedding
    trunk: float          # forward multiply-adds per sequence, without the head
    head: float           # those of the head
    encoder: float = 0.0  # FLOPs of a frozen encoder per sequence
    cpu_heads: int = 0    # of attention, on a CPU, which keeps their scores; 0: this is a GPU

    def flops(self):
        """Of a step. Two per multiply-add; backward costs twice forward, and a frozen encoder has none."""
        return self.batch * (6 * (self.trunk + self.head) + self.encoder)

    def compute(self, n, peak, mfu):
        """Seconds of a step on each of n GPUs."""
        return self.flops() / (n * peak * mfu)

    def exchanged(self, n):
        """Bytes that each GPU sends in a ring all_reduce of fp32 gradients."""
        return 2 * (n - 1) / n * 4 * self.params

    def exposed(self, n, seconds, speed):
        """Seconds of the exchange that are not hidden by a backward pass, two thirds of `seconds`.

        The gradient of the embedding arrives last, in one bucket of its own, with nothing left to hide it.
        """
        whole = self.exchanged(n) / speed
        return max(whole - seconds * 2 / 3, whole * self.first / self.params)

    # --- bytes on each GPU ---

    def state(self):
        """fp32 weights, two moments, their average and gradients, and the weights in bf16."""
        return (4 * 5 + 2) * self.params

    def head_bytes(self):
        """A chunk of logits, in bf16, and twice in fp32 for their softmax; a bf16 gradient of the weight."""
        logits, softmax = (2**25, 2**21) if self.cpu_heads else (2**28, 2**28)  # at a time, see model.py
        return 2 * logits + (4 + 4) * softmax + 2 * self.width * self.vocab

    def activations(self, checkpointing=False):
        """Per sequence, of what backward needs.

        A layer has 12 d^2 + 2 L d multiply-adds per token, and keeps 54 d bytes: in fp32 the stream and the
        normed stream, twice (16 d); in bf16 the inputs of QKV and MLP (4 d), qkv and the rotated qk (10 d),
        the outputs of attention, its projection and the MLP (6 d), both sides of the GELU (16 d); and the
        masks of dropout (2 d). With checkpointing it keeps its input in fp32 (4 d). A CPU keeps the scores of
        attention, too, in bf16 (2 L for each head).
        """
        values = self.trunk / (12 * self.width + 2 * self.length)  # L d, summed over the layers
        return (4 if checkpointing else 54 + 2 * self.length * self.cpu_heads / self.width) * values

    def memory(self, n):
        micro = self.micro or self.batch / n
        return self.state() + self.head_bytes() + micro * self.activations()

    def largest_micro(self, memory, checkpointing=False):
        """How many sequences fit in a forward pass, if a tenth of the memory is left for everything else."""
        room = 0.9 * memory - self.state() - self.head_bytes()
        return max(0, math.floor(room / self.activations(checkpointing)))


def table(job, peak, memory, speed, mfu, feed, counts=(1, 2, 8, 16, 64)):
    """-> lines (label, numbers, one for each of `counts` GPUs).

    peak, memory: of a GPU, in FLOP/s and bytes (0: not known);  speed: of the network, in bytes/s
    feed: tokens/s that one process can read, or None
    """
    counts = [n for n in counts if job.batch % n == 0]
    compute = [job.compute(n, peak, mfu) for n in counts]
    apart = [s + job.exchanged(n) / speed for n, s in zip(counts, compute)]
    overlapped = [s + job.exposed(n, s, speed) for n, s in zip(counts, compute)]
    tokens = job.batch * job.length
    fits = [(f'largest micro_batch in {memory / 1e9:.0f} GB', False), ('    ... with checkpointing', True)]
    return [
        ('GPUs', counts),
        ('PFLOPs per step and GPU', [job.flops() / n / 1e15 for n in counts]),
        (f'computing, ms at an MFU of {100 * mfu:.0f} %', [1e3 * s for s in compute]),
        ('gradients that a GPU sends, MB', [job.exchanged(n) / 1e6 for n in counts]),
        ('exchanging them, ms', [1e3 * job.exchanged(n) / speed for n in counts]),
        ('a step, ms: compiled as one graph', [1e3 * s for s in apart]),
        ('            exchange overlaps (eager)', [1e3 * s for s in overlapped]),
        ('memory per GPU, GB', [job.memory(n) / 1e9 for n in counts]),
        ('    weights, moments, average, gradients', [job.state() / 1e9] * len(counts)),
        ('    vocabulary head', [job.head_bytes() / 1e9] * len(counts)),
        ('    activations of a sequence', [job.activations() / 1e9] * len(counts)),
        ('    ... with checkpointing', [job.activations(True) / 1e9] * len(counts)),
        *((label, [job.largest_micro(memory, checkpointing)] * len(counts)) for label, checkpointing in fits
          if memory),
        ('feed needed, tokens/s per GPU', [tokens / n / s for n, s in zip(counts, overlapped)]),
        *([('feed measured here on one core', [feed] * len(counts))] if feed else []),
        ('hours per million steps, no overlap', [1e6 * s / 3600 for s in apart]),
        ('GPU-hours', [1e6 * s * n / 3600 for n, s in zip(counts, apart)]),
    ]
