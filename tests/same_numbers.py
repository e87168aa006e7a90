"""
Proof that a change moved no number: every config at toy size, by two checkouts, bit for bit.

    python tests/same_numbers.py record FOLDER [--checkout=PATH] [CONFIG ...]
        keeps in FOLDER what a checkout computes now
    python tests/same_numbers.py compare FOLDER [--checkout=PATH] [CONFIG ...]
        the same again by another checkout; exit code 1 if anything differs

A CONFIG is the name of a file of config/ without .py, by default every one; a checkout is by default the one
that this file is in. Of each config: 20 steps of training (both stages, k-means, new adaptive times), 5 more
from a copy of the checkpoint, 128 samples of each strategy. `compare` trains anew, but resumes and samples
from recorded checkpoints: so it also tests that the checkout reads what another edition wrote.

All it knows of a checkout is the command line of train.py, sample.py and data/text/prepare.py, log.jsonl, and
config/. Compare on the machine that recorded, with the same torch. FOLDER cannot be moved: the checkpoints
name data and encoder by their paths in it.
"""
import argparse
import ast
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

# one thread: with more, the order of sums would be anybody's
ENV = {**os.environ, 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1', 'PYTHONDONTWRITEBYTECODE': '1'}
STEPS, MORE, SAMPLES = 20, 5, 128
ENCODER = 'text_ar'  # LADD and LDLM read the states of its run
SIZES = dict(block_size=32, hidden=32, num_layers=3, num_heads=2, cond_dim=8, encoder_layers=1, num_latents=4,
             latent_dim=8, codebook_size=7, latent_layers=1, decoder_layers=1, stage1_iters=10, vq_start=5)


# ------------------------------------------------------------------------------------------------------------
# what is run

def toy(checkout, folder, name):
    """A config -> arguments of train.py, {strategy: those of sample.py}. No key that has no say in it."""
    lines = ast.parse((checkout / 'config' / f'{name}.py').read_text(encoding='utf-8')).body
    config = {a.targets[0].id: ast.literal_eval(a.value) for a in lines if isinstance(a, ast.Assign)}
    method, data = config['method'], config['dataset']
    keys = {k: min(config[k], small) for k, small in SIZES.items() if k in config}
    keys.update((k, folder / ENCODER) for k in ('encoder', 'token_encoder') if k in config)
    # 20 steps have to move the weights, and their average with them
    keys.update(device='cpu', compile=False, batch_size=8, learning_rate=0.01, warmup_iters=4, ema=0.9,
                log_interval=1, eval_interval=10)
    if data == 'sawtooth':
        keys.update(checkpoint_interval=STEPS)  # just one checkpoint, for `train` to wait for
    else:
        keys.update(dataset=folder / 'data')
    if data == 'text':
        keys.update(dtype='float32')  # all others have bfloat16
    if data in ('lm1b', 'openwebtext'):
        keys.update(micro_batch=4)
    if data == 'openwebtext' and 'num_latents' in config:
        keys.update(num_latents=SIZES['block_size'])  # one for each token
    if method == 'ldlm':  # as wide as the encoder
        keys.update(latent_dim=SIZES['hidden'], adaptive_bins=4, adaptive_every=6, encoder_warmup=30)
    else:
        keys.update(eval_seqs=16)
    sample = ['--device=cpu', '--seed=0', f'--num_samples={SAMPLES}', f'--batch_size={SAMPLES}']
    sample += ['--steps=4'] * (method != 'ar')
    strategies = {'joint': sample}
    if method == 'ladd':
        strategies = {'joint': [*sample, '--strategy=joint'],
                      'seq': [*sample, '--strategy=seq', '--latent_steps=4']}
    return [f'config/{name}.py', *(f'--{k}={v}' for k, v in keys.items())], strategies


def run(checkout, script, *args, enough=lambda: False):
    """A script, until it ends or has done enough. RuntimeError with its last line if it fails."""
    with tempfile.TemporaryFile('w+') as output:
        process = subprocess.Popen([sys.executable, script, *args], cwd=checkout, env=ENV, stdout=output,
                                   stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                if enough():
                    return
                time.sleep(0.05)
        finally:
            process.kill()
            process.wait()
        output.seek(0)
        if process.returncode:
            raise RuntimeError(f'{script}: {(output.read().strip().splitlines() or ["not a word"])[-1]}')


def train(checkout, args, out_dir, steps):
    """From what out_dir holds to step `steps` -> the records of these steps, without their speed.

    Sawtooth ends with a report on 4,096 texts, which takes longer than all else: we do not wait for it.
    """
    def saved():
        return path.stat().st_mtime_ns if path.exists() else 0
    path = out_dir / 'ckpt.pt'
    before, reports = saved(), 'sawtooth' in args[0]
    run(checkout, 'train.py', *args, f'--out_dir={out_dir}', f'--max_iters={steps}',
        enough=lambda: reports and saved() != before)
    records = [json.loads(line) for line in (out_dir / 'log.jsonl').read_text().splitlines()]
    return [{k: v for k, v in r.items() if k != 'tokens_per_s'} for r in records
            if r['step'] > (STEPS if before else 0)]


def shake(run_dir):
    """Makes run_dir/shaken, its checkpoint with noise on all averaged weights.

    After 20 steps tokens hardly depend on the latents: a sampler with a mistake might draw the same ones.
    """
    import torch
    checkpoint, g = torch.load(run_dir / 'ckpt.pt', weights_only=True), torch.Generator().manual_seed(0)
    for weight in checkpoint['ema'].values():
        weight += 0.3 * torch.randn(weight.shape, generator=g)
    (run_dir / 'shaken').mkdir()
    torch.save(checkpoint, run_dir / 'shaken' / 'ckpt.pt')


def measure(checkout, args, strategies, out_dir, run_dir):
    """Trains in out_dir; resumes a copy of run_dir, and samples from it. -> {part: its records or samples}"""
    trained = train(checkout, args, out_dir, STEPS)
    if not (run_dir / 'shaken').exists():
        shake(run_dir)
    with tempfile.TemporaryDirectory() as copy:
        for file in ('ckpt.pt', 'log.jsonl'):
            shutil.copy(run_dir / file, copy)
        resumed = train(checkout, args, Path(copy), STEPS + MORE)
        parts = {'losses': [r for r in trained if 'loss' in r],
                 'validation': [r for r in trained + resumed if 'val_loss' in r],
                 'resumed': [r for r in resumed if 'loss' in r]}
        for strategy, options in strategies.items():
            file = f'{copy}/{strategy}.npy'
            run(checkout, 'sample.py', f'--out_dir={run_dir / "shaken"}', *options, f'--save={file}')
            parts[f'samples {strategy}'] = np.load(file).tolist()
    return parts


def prepare(checkout, folder):
    """Invents folder/text.txt, always the same; makes folder/data of it, by way of data/ of the checkout."""
    folder.mkdir(parents=True, exist_ok=True)
    r, text, made = random.Random(0), folder / 'text.txt', checkout / 'data' / f'same_numbers_{os.getpid()}'
    words = [''.join(r.choices('abcdefghijklmnopqrstuvwxyz', k=r.randint(2, 9))) for _ in range(500)]
    texts = [''.join(r.choice(words) + r.choice(' ,.;:-?') for _ in range(r.randint(20, 200)))
             for _ in range(500)]  # no character is frequent, or a toy would learn that and nothing else
    text.write_text('\n\n\n'.join(texts))
    try:
        run(checkout, 'data/text/prepare.py', '--input', text, '--tokenizer=char', f'--name={made.name}',
            '--workers=1')
        shutil.copytree(made, folder / 'data')
    finally:
        shutil.rmtree(made, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------------
# what is compared

def check(parts):
    """A comparison that cannot fail is no proof: numbers are finite, no two are alike, and samples differ."""
    records = parts['losses'] + parts['resumed']
    assert [r['step'] for r in records] == list(range(1, STEPS + MORE + 1)), 'steps are missing'
    for numbers in ([r['loss'] for r in records], [r['val_loss'] for r in parts['validation']]):
        assert all(isinstance(x, float) and math.isfinite(x) for x in numbers), 'a loss is not finite'
        assert len(set(numbers)) == len(numbers), 'two losses are alike'
    for samples in [rows for part, rows in parts.items() if part.startswith('samples')]:
        assert len(samples) == SAMPLES, 'samples are missing'
        assert len(set(map(tuple, samples))) > SAMPLES / 8, 'the samples are alike'


def difference(old, new):
    """The first one between two records or two samples, in words; '' if there is none."""
    if isinstance(old, list):
        at = [i for i, (a, b) in enumerate(zip(old, new)) if a != b]
        return '' if old == new else f'token {at[0]}' if at else 'another length'
    return next((f'{k} was {old[k]!r}, is {new.get(k)!r}' for k in old
                 if old[k] != new.get(k) and computed(k)), '')


def computed(key):
    """Whether a logged number must stay; the others are statistics that may be taken at another moment."""
    return key.endswith('loss') or key in ('step', 'lr', 'grad_norm', 'val_ppl')


def report(old, new):
    """Two results of `measure` -> a line, and whether they are the same."""
    counts, first = [], ''
    for part, rows in old.items():
        found = [difference(a, b) for a, b in zip(rows, new[part])]
        found += ['one is too many or missing'] * abs(len(rows) - len(new[part]))
        counts.append(f'{part} {found.count("")}/{len(rows)}')
        first = first or next((f'{part}, number {i + 1}: {text}' for i, text in enumerate(found) if text), '')
    moved = {k for r, s in zip(old['losses'], new['losses']) for k in r if r[k] != s.get(k)}
    moved = {k for k in moved if not computed(k)}
    note = f'  (logged otherwise: {", ".join(sorted(moved))})' if moved else ''
    line = '  '.join(counts).replace('  samples seq', ' seq')
    return line + (f'  DIFFERENT: {first}' if first else '  same') + note, not first


def record(checkout, folder, name):
    args, strategies = toy(checkout, folder, name)
    run_dir = folder / name
    shutil.rmtree(run_dir, ignore_errors=True)
    parts = measure(checkout, args, strategies, run_dir, run_dir)
    check(parts)
    (run_dir / 'numbers.json').write_text(json.dumps([args, strategies, parts]))
    return f'loss {parts["losses"][0]["loss"]:.4f} to {parts["losses"][-1]["loss"]:.4f}  recorded', True


def compare(checkout, folder, name):
    args, strategies, parts = json.loads((folder / name / 'numbers.json').read_text())
    check(parts)
    with tempfile.TemporaryDirectory() as out_dir:
        return report(parts, measure(checkout, args, strategies, Path(out_dir), folder / name))


def compare_data(checkout, folder, name):
    with tempfile.TemporaryDirectory() as again:
        prepare(checkout, Path(again))
        same = [(folder / name / file).read_bytes() == (Path(again) / name / file).read_bytes()
                for file in ('train.bin', 'val.bin')]
    return f'files {sum(same)}/2  ' + ('same' if all(same) else 'DIFFERENT'), all(same)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('what', choices=['record', 'compare'])
    parser.add_argument('folder')
    parser.add_argument('names', nargs='*', metavar='CONFIG')
    parser.add_argument('--checkout', default=Path(__file__).parents[1])
    a = parser.parse_intermixed_args()
    folder, checkout = Path(a.folder).resolve(), Path(a.checkout).resolve()
    configs = sorted(path.stem for path in checkout.glob('config/*.py'))
    there = sorted(path.parent.name for path in folder.glob('*/numbers.json'))
    if a.what == 'record':
        if not (folder / 'data').exists():
            prepare(checkout, folder)
        names = a.names or configs
        names = [ENCODER] * (ENCODER in names or ENCODER not in there) + [n for n in names if n != ENCODER]
        tasks = [(record, name) for name in names]
    else:
        print(''.join(f'{name:24s} has not been recorded\n' for name in configs if name not in there), end='')
        tasks = [(compare_data, 'data')] + [(compare, name) for name in a.names or there]
    good = len(tasks) > 1 or a.what == 'record'
    for task, name in tasks:
        clock = time.time()
        try:
            line, same = task(checkout, folder, name)
        except (OSError, RuntimeError, AssertionError) as e:
            line, same = f'{"FAILED" if a.what == "record" else "DIFFERENT"}: {e}', False
        print(f'{name:24s} {line}  ({time.time() - clock:.0f} s)', flush=True)
        good = good and same
    sys.exit(not good)


if __name__ == '__main__':
    main()
