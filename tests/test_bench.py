import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import make, spy

import bench
import mdlm
import model
import train
from lib import distributed
from lib.configurator import UserError
from lib.plan import Job, table
from methods import build

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = ['--hidden=16', '--num_layers=1', '--num_heads=2', '--cond_dim=8', '--batch_size=4', '--iters=2',
        '--device=cpu', '--steps=4']
RANDOM = ['--vocab_size=50', '--block_size=16']


def go(*args):
    """bench.py in processes of its own."""
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    command = [sys.executable, os.path.join(ROOT, 'bench.py'), *TINY, *args]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)


def measure(capsys, *args, variant='eager'):
    """One variant in this process -> its dict. (Not the full head: that is there for every later test.)"""
    bench.main([*TINY, f'--variant={variant}', *args])
    return json.loads(capsys.readouterr().out)


LDLM = ['--method=ldlm', '--token_encoder=scratch', '--reconstruction=ce', '--latent_dim=16',
        '--latent_layers=1', '--decoder_layers=1']
DI_LADD = ['--method=ladd', '--latent=discrete', '--latent_schedule=linear', '--num_latents=4',
           '--latent_dim=4', '--codebook_size=7', '--encoder=out/never_opened', '--stored_latents=True',
           '--stage1_iters=0']
BLOCK = 12 * 16**2 + 2 * 32 * 16  # multiply-adds of a block of width 16, per token of 32
MULTIPLY_ADDS = {
    'mdlm': (['--method=mdlm'], BLOCK + 0.5 * 16 * 100),
    'ar': (['--method=ar'], BLOCK + 16 * 100),
    'di_ladd': (DI_LADD, (12 * 36 * 16**2 + 2 * 36**2 * 16) / 32 + 0.5 * 16 * 100),
    # denoiser, and a third of it for self-conditioning; encoder and decoder, which read keys of twice the
    # places through two more projections; token decoder; head
    'ldlm': (LDLM, BLOCK * 4 / 3 + 2 * (14 * 16**2 + 4 * 32 * 16) + (16 * 16**2 + 2 * 32 * 16) + 16 * 100)}


@pytest.mark.parametrize('name', MULTIPLY_ADDS)
def test_it_prints_what_it_promises(name):
    args, multiply_adds = MULTIPLY_ADDS[name]
    done = go(*args, '--vocab_size=100', '--block_size=32', '--num_samples=1')
    assert done.returncode == 0, done.stderr
    lines, method = done.stdout.splitlines(), args[0].partition('=')[2]
    assert lines[0] == f'{method}, 1 layers of width 16, L = 32, V = 100, batch 4, bfloat16'
    assert lines[1].startswith(f'{6 * multiply_adds / 1e9:.3g} training GFLOPs per token; '
                               'peak assumed for MFU: cpu (1 threads)')
    assert lines[2].split() == ['eager', 'full', 'head', 'ratio']
    rows = {re.split(r'\s{2,}', line.strip())[0]: line.split() for line in lines[3:]}
    assert list(rows)[0] == 'training, tokens/s' and len(rows) == (6 if method == 'ladd' else 5)
    for key, cells in rows.items():  # the straightforward sampler is MDLM's
        assert cells[-1].endswith('x') == ('sampling' not in key or method == 'mdlm')


@pytest.mark.parametrize('name', ['flm', 'duo', 'duo_distilled', 'candi', 'vadd', 'cadd', 'ssmd'])
def test_every_method_has_its_numbers(name, capsys):
    result = measure(capsys, *RANDOM, f'--method={name}', '--num_samples=1', '--steps=2')
    assert result.keys() == {'gradient_memory', 'memory', 'tokens_per_s', 'sampling joint 2'}
    assert all(v > 0 for v in result.values())


def test_a_variant_is_a_dict_of_numbers():
    result = json.loads(go(*RANDOM, '--variant=eager', '--steps=1,3').stdout)
    assert result.keys() == {'gradient_memory', 'memory', 'tokens_per_s', 'sampling joint 1',
                             'sampling joint 3'}
    assert all(v > 0 for v in result.values())
    assert 1e8 < result['gradient_memory'] <= result['memory'] < 1e10


def test_the_step_is_that_of_train(monkeypatch, capsys):
    """Two steps without AdamW's state and averaged weights, one with them, then those that are timed."""
    steps, step = [], train.Trainer.step

    def recording(self, number, batch, draw_rows):
        params, state = list(self.method.parameters()), self.optimizers[0].state
        numbers = step(self, number, batch, draw_rows)[1]
        averages = [e for e in self.ema if all(e is not p for p in params)]
        steps.append((number, len(averages), len(state), len(params), bool(numbers['loss'].isfinite())))
        return numbers, {}
    monkeypatch.setattr(train.Trainer, 'step', recording)
    measure(capsys, *RANDOM, '--num_samples=0', '--micro_batch=2')
    assert [s[0] for s in steps] == [0, 1, 2, 3, 4] and all(s[4] for s in steps)
    assert [s[1:3] for s in steps[:2]] == [(0, 0)] * 2
    assert [s[1:3] for s in steps[2:]] == [(steps[0][3], steps[0][3])] * 3


def test_steps_with_commas(monkeypatch, capsys):
    """A row for each; the full head is timed once, since its steps all cost the same."""
    full = json.loads(go(*RANDOM, '--steps=2,6', '--variant=full').stdout)  # it changes its process for good
    assert full['sampling joint 6'] == pytest.approx(3 * full['sampling joint 2'])
    monkeypatch.setattr(bench, 'in_its_own_process', lambda argv, variant: full)
    monkeypatch.setattr(bench, 'peak_flops', lambda device, dtype: (1e12, 'not measured'))
    bench.main([*TINY, *RANDOM, '--steps=2,6'])
    assert [line[:34] for line in capsys.readouterr().out.splitlines()[-2:]] == [
        'sampling 2 steps, s/sequence      ', 'sampling 6 steps, s/sequence      ']


def test_two_processes_share_a_batch_and_exchange_gradients(monkeypatch, capsys):
    """In a group whose only member believes that there are two."""
    monkeypatch.setattr(dist, 'all_reduce', dist.all_reduce)  # restored after the test
    seen, step, reduced = [], train.Trainer.step, spy(dist, 'all_reduce')

    def recording(self, number, batch, draw_rows):
        before = len(reduced)
        result = step(self, number, batch, draw_rows)
        seen.append((len(batch[0]), len(reduced) > before))
        return result
    monkeypatch.setattr(train.Trainer, 'step', recording)
    for module in (bench, train, distributed):
        monkeypatch.setattr(module, 'rank_and_world', lambda: (0, 2))
    monkeypatch.setattr(bench, 'connect', lambda device: dist.init_process_group(
        'gloo', store=dist.HashStore(), rank=0, world_size=1))
    try:
        measure(capsys, *RANDOM, '--num_samples=0')
    finally:
        dist.destroy_process_group()
    assert seen == [(2, True)] * 5


@pytest.mark.slow
def test_torchrun():
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
                os.path.join(ROOT, 'bench.py'), *TINY, *RANDOM]
    r = subprocess.run(torchrun, capture_output=True, text=True, timeout=600)
    lines = r.stdout.splitlines()
    assert r.returncode == 0 and lines[0].endswith('batch 4, bfloat16, 2 processes'), r.stderr
    assert len(lines) == 8 and lines[3].startswith('training, tokens/s')


def test_the_first_column_is_compiled_if_the_config_says_so(monkeypatch, capsys):
    """And a variant that fails, for want of memory, is a dash."""
    fast, slow = ({'tokens_per_s': v, 'gradient_memory': 1e9, 'memory': 2e9, 'sampling joint 4': 1.0}
                  for v in (300.0, 100.0))
    results = {'compiled': fast, 'eager': slow, 'full': {}}
    monkeypatch.setattr(bench, 'in_its_own_process', lambda argv, variant: results[variant])
    monkeypatch.setattr(bench, 'peak_flops', lambda device, dtype: (1e12, 'not measured'))
    bench.main([*TINY, *RANDOM, '--compile=True'])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ['compiled', 'eager', 'full', 'head', 'ratio']
    assert lines[3].split() == ['training,', 'tokens/s', '300', '100', '-', '3x']
    monkeypatch.setattr(bench, 'in_its_own_process', lambda argv, variant: {})
    with pytest.raises(UserError, match='failed for the reason above'):
        bench.main([*TINY, *RANDOM])


def test_it_compiles_what_train_compiles(monkeypatch, capsys):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda self: compiled.append(type(self).__name__))
    for variant in ('eager', 'compiled'):
        measure(capsys, *RANDOM, '--compile=True', '--num_samples=0', variant=variant)
    assert compiled == ['DiT']


@pytest.mark.parametrize('args', [
    ['--method=ladd', '--latent=discrete', '--latent_schedule=linear', '--num_latents=2', '--latent_dim=4',
     '--codebook_size=3', '--stage1_iters=9', '--encoder=out/ar'],
    ['--method=ldlm', '--token_encoder=out/ar', '--layer=-1', '--latent_dim=16', '--latent_layers=1',
     '--decoder_layers=1']], ids=['di_ladd', 'ldlm'])
def test_a_frozen_encoder_runs_without_data(args, tmp_path, monkeypatch, capsys):
    """Random tokens have no tokenizer that could differ from the encoder's."""
    monkeypatch.chdir(tmp_path)
    make('ar', 'out/ar')
    result = measure(capsys, *args, '--vocab_size=9', '--block_size=12', '--num_samples=0')
    assert result['tokens_per_s'] > 0


def test_the_size_of_a_data_set_is_its_own(capsys):
    result = measure(capsys, '--dataset=sawtooth', '--num_samples=0', '--iters=1')
    assert result['tokens_per_s'] > 0


def test_a_clock_that_stands_still(monkeypatch, capsys):
    monkeypatch.setattr(bench.time, 'perf_counter', lambda: 1.0)
    assert measure(capsys, *RANDOM, '--num_samples=1')['tokens_per_s'] > 0
    assert bench.peak_flops(torch.device('cpu'), torch.float32)[0] > 0


def test_where_memory_is_not_known(monkeypatch, capsys):
    """Windows has no module `resource`: the lines about memory are left out."""
    monkeypatch.setitem(sys.modules, 'resource', None)
    result = measure(capsys, *RANDOM, '--num_samples=0')
    assert result['memory'] is None and result['gradient_memory'] is None
    monkeypatch.setattr(bench, 'in_its_own_process', lambda argv, variant: result)
    monkeypatch.setattr(bench, 'peak_flops', lambda device, dtype: (1e12, 'not measured'))
    bench.main([*TINY, *RANDOM])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[3:]] == ['training,', 'training,']


# a head of 2^20 multiply-adds, a trunk of 10 values that cost 12 * 4 + 2 * 8 = 64 each
JOB = Job(batch=64, micro=2, length=8, width=4, vocab=100, params=1e9, first=1e8, trunk=640, head=2**20,
          encoder=1000)


def test_the_plan_of_a_job_counted_by_hand():
    flops = 64 * (6 * (640 + 2**20) + 1000)
    assert JOB.flops() == flops
    assert JOB.compute(8, 1e12, 0.5) == pytest.approx(flops / 8 / 0.5e12)
    assert JOB.exchanged(1) == 0 and JOB.exchanged(2) == 4e9  # each sends half of its 4 GB, twice
    assert JOB.exposed(2, 3.0, 1e9) == pytest.approx(2.0)  # 4 s, 2 s of them hidden
    assert JOB.exposed(2, 9.0, 1e9) == pytest.approx(0.4)  # the first layer is a tenth of the weights
    assert JOB.state() == 22e9 and JOB.head_bytes() == 10 * 2**28 + 800
    assert JOB.activations() == 10 * 54 and JOB.activations(checkpointing=True) == 10 * 4
    on_a_cpu = dataclasses.replace(JOB, cpu_heads=3)
    assert on_a_cpu.head_bytes() == 2 * 2**25 + 8 * 2**21 + 800
    assert on_a_cpu.activations() == 10 * (54 + 2 * 8 * 3 / 4)  # three scores in bf16 for each of 8 places
    assert JOB.memory(8) == 22e9 + JOB.head_bytes() + 2 * 540
    assert JOB.largest_micro(1e9) == 0
    assert JOB.largest_micro((22e9 + JOB.head_bytes() + 540 * 3.5) / 0.9) == 3
    rows = dict(table(JOB, 1e15, 80e9, 3.125e9, 0.4, None, counts=(1, 2, 3)))
    assert rows['GPUs'] == [1, 2]  # three do not divide the batch
    assert rows['exchanging them, ms'] == [0, pytest.approx(4e9 / 3.125e9 * 1000)]
    assert rows['largest micro_batch in 80 GB'] == [JOB.largest_micro(80e9)] * 2
    assert not any('micro' in row for row, _ in table(JOB, 1e15, 0, 3.125e9, 0.4, None))
    assert rows['GPU-hours'][1] == 2 * rows['hours per million steps, no overlap'][1]


def test_the_plan_of_a_config():
    config, _ = bench.prepare([f'{ROOT}/config/owt_mdlm.py', '--vocab_size=100', '--device=cpu'])
    job = bench.job_of(config)
    assert job.trunk == pytest.approx(13 * (12 * 512 * 1024**2 + 2 * 512**2 * 1024), rel=1e-3)
    assert job.head == pytest.approx(256 * 1024 * 100, rel=0.02) and job.first == 101 * 1024
    assert job.encoder == 0 and job.cpu_heads == 0
    config, _ = bench.prepare([f'{ROOT}/config/owt_mdlm.py', '--vocab_size=100', '--plan', '--gpu=cpu'])
    assert bench.job_of(config).cpu_heads == 16
    config, _ = bench.prepare([f'{ROOT}/config/owt.py', '--vocab_size=100', '--device=cpu'])
    assert bench.job_of(config).encoder == 2 * 440e6 * 512


def test_an_encoder_of_unknown_size_is_named(capsys):
    config, _ = bench.prepare([f'{ROOT}/config/owt.py', '--vocab_size=100', '--encoder=out/mine'])
    assert bench.job_of(config).encoder == 0
    assert 'without the forward passes of out/mine' in capsys.readouterr().out


@pytest.mark.parametrize('fused', [True, False])
def test_a_layer_keeps_what_the_plan_says(fused, monkeypatch):
    """Bytes saved for backward by a third layer, without its weights' copies in bf16.

    No dropout, whose masks (1 d each) are larger on a CPU; but a CPU copies the output of attention (2 d), if
    that is fused.
    """
    if fused:
        monkeypatch.setattr(model, 'attend', lambda q, k, v, causal: F.scaled_dot_product_attention(q, k, v))

    def saved(num_layers, B=8, L=128, d=64):
        torch.manual_seed(0)
        dit = model.DiT(d, num_layers, 2, 8, L)
        weights = {p.untyped_storage().data_ptr() for p in dit.parameters()}
        found = {}

        def pack(t):
            if t.untyped_storage().data_ptr() not in weights:
                found[t.untyped_storage().data_ptr()] = t.untyped_storage()  # kept, so that no address recurs
            return t
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast('cpu'):
            dit(torch.randn(B, L, d, requires_grad=True))
        matrices = sum(p.numel() for p in dit.parameters() if p.dim() > 1)
        return (sum(s.nbytes() for s in found.values()) - 2 * matrices) / (B * L * d)
    expected = 54 - 2 + 2 if fused else 54 - 2 + 2 * 128 * 2 / 64
    assert saved(3) - saved(2) == pytest.approx(expected, rel=0.03)


def test_the_plan_is_printed(monkeypatch, capsys):
    args = [f'{ROOT}/config/owt.py', '--vocab_size=1000', '--plan', '--device=cpu']
    bench.main(args)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ['GPUs', '1', '2', '8', '16', '64'] and '1,760' in lines[-1]
    measured, = (line for line in lines if line.startswith('feed measured'))
    assert float(measured.split()[-1].replace(',', '')) > 1000
    monkeypatch.setattr(bench, 'peak_flops', lambda device, dtype: (989e8, 'an H100 10,000 times as slow'))
    monkeypatch.setattr(bench, 'measure_feed', lambda L, dtype: None)
    with pytest.raises(UserError, match='--gpu=cpu and --network=gloo go together'):
        bench.main([*args, '--gpu=cpu'])
    bench.main([*args, '--gpu=cpu', '--network=gloo'])
    slow = capsys.readouterr().out.splitlines()
    assert slow[0].endswith('; cpu, gloo: 2.1 GB/s each way') and not any('1,760' in line for line in slow)
    fast, slow = (float(rows[3].split()[-5].replace(',', '')) for rows in (lines, slow))
    assert slow == pytest.approx(1e4 * fast, rel=2e-3)


def test_mistakes():
    for args, message in [
            (['--vocab_size=100'], 'need a block_size'),
            (['--dataset=nowhere'], '--vocab_size=50257 for random tokens'),
            (['--method=ldlm', *RANDOM, '--stage=autoencoder'], 'counted for stage=joint'),
            ([*RANDOM, '--iters=0'], 'iters must be at least 1, not 0'),
            ([*RANDOM, '--variant=fast'], 'variant is one of'),
            ([*RANDOM, '--steps=1,0'], '--steps wants numbers of at least 1'),
            ([*RANDOM, '--gpu=H100x', '--plan'], 'gpu is one of'),
            ([*RANDOM, '--gpu=A100'], 'gpu=A100 has no effect with plan=False'),
            (['--method=ldlm', *RANDOM, '--stage=autoencoder', '--plan'], 'counted for stage=joint'),
            ([*RANDOM, '--micro_batch=3'], 'micro_batch=3 does not divide')]:
        with pytest.raises(UserError, match=message):
            bench.main([*TINY, *args])


def test_reference_sampler_has_the_law_of_ours():
    """Marginal of the tokens after all steps, for a network that ignores its input but for the position."""
    torch.manual_seed(0)
    method = build(dict(method='mdlm', vocab_size=3, block_size=4, hidden=8, num_layers=1, num_heads=1,
                        cond_dim=4)).eval()
    torch.nn.init.normal_(method.head.bias)
    torch.nn.init.zeros_(method.head.weight)
    p = method.head.bias.softmax(dim=0)
    alphas = mdlm.alpha(mdlm.time_grid(4))
    x = bench.full_sample(method, torch.full((5000, 4), 3), alphas, 4)
    for sample in (x, method.sample(5000, 4)):
        counts = torch.bincount(sample.flatten(), minlength=4)
        assert counts[3] == 0 and ((counts[:3] - 20000 * p) ** 2 / (20000 * p)).sum() < 20
    x = bench.full_sample(method, torch.full((5000, 4), 3), alphas, 1)
    assert (x == 3).float().mean().item() == pytest.approx(0.75, abs=0.02)
