"""
The first hour on a GPU: four commands that measure what RESULTS.md cannot say without one.

    python tests/first_gpu.py check     short trainings: compiled in bf16 on the GPU, eager in fp32 on the CPU
    python tests/first_gpu.py neighbours    the same of CADD, CANDI, Duo, FLM, SSMD and VADD
    python tests/first_gpu.py bench     speed and memory at the papers' sizes, on random tokens
    python tests/first_gpu.py train     ten times the CPU's budget on Tiny Shakespeare, which is prepared
    python tests/first_gpu.py table FILE.json ...     what they wrote, as tables for RESULTS.md

Each of the first four ends within nine minutes. It writes out/first_gpu/COMMAND.json after every part, so
one that is cut off has lost nothing. --dataset=NAME takes another set; for words, add the config files to
`train` (data prepared as they say). --rehearse makes everything tiny, on the CPU: a test does that.
"""
import json
import os
import re
import signal
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OUT = os.path.join('out', 'first_gpu')
SECONDS = 8.5 * 60  # when these are over, train.py is told to save and to stop
CONFIGS = [f'config/shakespeare_char_{name}.py' for name in ('ar', 'mdlm', 'co_ladd', 'di_ladd', 'ldlm')]
NEIGHBOURS = [f'config/shakespeare_char_{name}.py'
              for name in ('cadd', 'candi', 'duo', 'flm', 'ssmd', 'vadd')]
RANDOM = ['--vocab_size=151669', '--batch_size=32']
BENCHED = {'config/owt_mdlm.py': RANDOM,
           'config/owt.py': [*RANDOM, '--stored_latents=True', '--encoder_dropout=False'],
           'config/owt_di_ladd.py': [*RANDOM, '--stored_latents=True', '--stage1_iters=0']}
TINY = ['--hidden=16', '--num_layers=1', '--num_heads=2', '--cond_dim=8', '--batch_size=4', '--device=cpu',
        '--compile=False']
TINY_OF = {'ladd': ['--num_latents=2', '--latent_dim=4'],
           'ldlm': ['--latent_dim=16', '--latent_layers=1', '--decoder_layers=1', '--adaptive_bins=4',
                    '--layer=-1']}


def run(seconds, *argv):
    """A command of this folder -> its stdout, or None if it failed. SIGTERM when its time is over."""
    print('$ python', *argv, flush=True)
    process = subprocess.Popen([sys.executable, os.path.join(ROOT, argv[0]), *argv[1:]], text=True,
                               stdout=subprocess.PIPE)
    try:
        out, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate()
    return out if process.returncode in (0, 128 + signal.SIGTERM) else None


def read(config, name, default=None):
    """A number or word of a config file."""
    with open(os.path.join(ROOT, config), encoding='utf-8') as f:
        found = re.search(rf"^{name} = '?([^'\s]+)", f.read(), re.MULTILINE)
    return found[1] if found else default


def tiny(config):
    return [*TINY, *TINY_OF.get(read(config, 'method'), [])]


def trained(seconds, config, out_dir, *args):
    """train.py -> what its log says of the losses and the speed, or None if it failed."""
    for key in ('encoder', 'token_encoder'):  # the AR that the same command has trained
        if read(config, key) == 'out/shakespeare_char_ar':
            args = [*args, f'--{key}={OUT}/shakespeare_char_ar']
    if run(seconds, 'train.py', os.path.join(ROOT, config), f'--out_dir={out_dir}', '--init_from=scratch',
           *args) is None:
        return None
    with open(os.path.join(out_dir, 'log.jsonl'), encoding='utf-8') as f:
        records = [json.loads(line) for line in f]
    return {'steps': records[-1]['step'],
            'losses': [r['loss'] for r in records if 'loss' in r],
            'tokens_per_s': [r['tokens_per_s'] for r in records if 'tokens_per_s' in r][-1:],
            'val_loss': [r['val_loss'] for r in records if 'val_loss' in r][-1:]}


def check(config, seconds, dataset, rehearse):
    """Losses of the first steps on both devices, without dropout, which they draw differently."""
    small = tiny(config) if rehearse else []
    common = [f'--dataset={dataset}', '--dropout=0', '--max_iters=20', '--log_interval=1', '--eval_seqs=64']
    if read(config, 'stage1_iters'):
        common.append('--stage1_iters=10')  # so that both stages have their turn
    name = os.path.join(OUT, os.path.basename(config)[:-3])
    end = time.monotonic() + seconds
    here = trained(seconds / 3, config, name.replace('shakespeare', 'cpu_shakespeare'), *small, *common,
                   '--device=cpu', '--dtype=float32', '--compile=False')
    there = trained(end - time.monotonic(), config, name, *common, '--compile=True', *small)
    if not (here and there and here['steps'] == there['steps'] == 20):
        return None
    # a rounding error can give a text another code, whose loss stage 2 adds
    n = 10 if read(config, 'latent') == 'discrete' else 20
    off = max(abs(a - b) / abs(a) for a, b in zip(here['losses'][:n], there['losses'][:n], strict=True))
    return {'largest relative difference of losses': off, 'of the first': n, 'loss': there['losses'][-1]}


neighbours = check


def bench(config, seconds, dataset, rehearse):
    """bench.py's numbers of each variant; the first one, which compiles, gets most of the time."""
    small = [*tiny(config), '--steps=2', '--vocab_size=50', '--iters=1'] if rehearse else []
    numbers, end = {}, time.monotonic() + seconds
    for others, variant in ((2, 'compiled'), (1, 'eager'), (0, 'full')):
        out = run(end - time.monotonic() - 20 * others, 'bench.py', os.path.join(ROOT, config),
                  *BENCHED[config], f'--variant={variant}', *small)
        parts = json.loads(out) if out else {'failed': 'no memory or no time'}
        numbers |= {f'{variant}: {k}': v for k, v in parts.items()}
    return numbers


def train(config, seconds, dataset, rehearse):
    """Ten times the tokens of the config, in as many steps: batches are ten times as large."""
    small = [*tiny(config), '--max_iters=4', '--eval_seqs=8', '--log_interval=1'] if rehearse else []
    result = trained(seconds, config, os.path.join(OUT, os.path.basename(config)[:-3]),
                     f'--dataset={dataset}', f'--batch_size={10 * int(read(config, "batch_size"))}', *small)
    return result and {k: v[-1] if isinstance(v, list) and v else v for k, v in result.items()}


def markdown(paths):
    """Prints a row for each number of each part."""
    for path in paths:
        with open(path, encoding='utf-8') as f:
            kept = json.load(f)
        print(f'\n{kept["command"]}, {kept["machine"]}\n\n| | | |\n|---|---|---|')
        for part, numbers in kept['parts'].items():
            for label, value in (numbers or {'failed': ''}).items():
                print(f'| {part} | {label} | {value:.5g} |' if isinstance(value, float) else
                      f'| {part} | {label} | {value} |')


def main(argv):
    command, *argv = argv or ['']
    if command == 'table':
        return markdown(argv)
    parts = {'check': CONFIGS, 'neighbours': NEIGHBOURS, 'bench': list(BENCHED),
             'train': CONFIGS}.get(command)
    if not parts:
        sys.exit(__doc__)
    rehearse = '--rehearse' in argv
    dataset = next((a.partition('=')[2] for a in argv if a.startswith('--dataset=')), 'shakespeare_char')
    parts = [a for a in argv if not a.startswith('--')] or parts
    sys.path.insert(0, ROOT)
    from lib.device import device_name, pick_device
    kept = {'command': command, 'machine': device_name(pick_device('cpu' if rehearse else 'cuda')),
            'date': time.strftime('%Y-%m-%d'), 'parts': {}}
    os.makedirs(OUT, exist_ok=True)
    end = time.monotonic() + (1e6 if rehearse else SECONDS)  # a rehearsal takes the time that it needs
    for i, part in enumerate(parts):
        share = max(20, (end - time.monotonic()) / (len(parts) - i))
        kept['parts'][part] = globals()[command](part, share, dataset, rehearse)
        with open(os.path.join(OUT, command + '.json'), 'w', encoding='utf-8') as f:
            json.dump(kept, f, indent=1)
    markdown([os.path.join(OUT, command + '.json')])
    sys.exit(None in kept['parts'].values())


if __name__ == '__main__':
    main(sys.argv[1:])
