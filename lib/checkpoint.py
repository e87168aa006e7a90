"""
Checkpoints: an atomic write, a read that runs no code, and the way from out_dir to a method. And lines of .jsonl, names of weights, devices.

A checkpoint is a dict of numbers, strings and tensors:
    format      1
    config      every key of the run, flat, with method, vocab_size and block_size
    model       the method's state dict (weights, and all it keeps in buffers)
    ema         name of a weight -> its average over the steps
    optimizer   the state of AdamW
    step, tokens
"""
import contextlib
import dataclasses
import errno
import json
import math
import os
import shutil
import zlib

import torch

from lib.configurator import UserError, method_class, method_fields

FORMAT = 1


# ----------------------------------------------------------------------------------------------------------------------------------
# files: written whole or not at all

def save(path, checkpoint):
    """All or nothing: at every moment `path` is the old checkpoint or the new one, whole. UserError if it cannot be written."""
    temp = path + '.tmp'
    try:
        with open(temp, 'wb') as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temp, path)
        folder = os.open(os.path.dirname(path) or '.', os.O_RDONLY)
        os.fsync(folder)  # the new name, too, survives a power cut
        os.close(folder)
    except (OSError, RuntimeError) as e:  # a disk that fills up reaches us as a RuntimeError of torch's zip writer
        with contextlib.suppress(OSError):  # where nothing can be written nothing can be removed
            os.remove(temp)
        kept = 'the one before it is kept' if os.path.exists(path) else 'there is none before it'
        raise UserError(f'cannot write {path} ({getattr(e, "strerror", None) or "is the disk full?"}); {kept}') from e


def json_line(record):
    return json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}) + '\n'  # JSON has no NaN


def append(path, *records):
    """At the end of a .jsonl file, whole or not at all. UserError if it cannot be written, which `append(path)` finds out beforehand."""
    lines = ''.join(map(json_line, records)).encode()
    try:
        with open(path, 'ab', buffering=0) as f:
            written = f.write(lines)  # at once: a reader never sees half a line
            if written < len(lines):
                f.truncate(f.tell() - written)
                raise OSError(errno.ENOSPC, 'the disk is full')
    except OSError as e:
        raise UserError(f'cannot write {path} ({e.strerror})') from e


def cut_log(path, step):
    """Makes log.jsonl, or drops from it the records past `step`, which will be written again, and a torn last line."""
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        kept = []
        if os.path.exists(path):
            with open(path, 'rb') as f:
                for line in f:
                    try:
                        if json.loads(line)['step'] <= step and line.endswith(b'\n'):
                            kept.append(line)
                    except (ValueError, TypeError, KeyError, RecursionError):
                        continue  # torn by a crash
        with open(path + '.tmp', 'wb') as f:
            f.writelines(kept)
        os.replace(path + '.tmp', path)
    except OSError as e:
        raise UserError(f'cannot write {path} ({e.strerror}); give another --out_dir') from e


# ----------------------------------------------------------------------------------------------------------------------------------
# runs

def is_run(name):
    """Whether a name means a run of ours; any other is of the Hugging Face hub, or a folder of its format."""
    return name.startswith('out/') or os.path.exists(os.path.join(name, 'ckpt.pt'))


def load(path):
    """The dict in a checkpoint file, on the CPU. UserError if the file is missing, truncated or of another kind."""
    if not os.path.isfile(path):
        folder = os.path.dirname(path)
        name = os.path.basename(folder)
        known = os.path.exists(f'config/{name}.py')
        raise UserError(f'{folder} holds no checkpoint; make it with: python train.py config/{name if known else "NAME"}.py'
                        + ('' if known else f' --out_dir={folder}'))
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        good = checkpoint['format'] == FORMAT and isinstance(checkpoint['config']['method'], str) and isinstance(checkpoint['step'], int) \
            and all(isinstance(checkpoint[key], dict) for key in ('model', 'ema'))
    except Exception as e:  # whatever a foreign file makes the reader stumble over
        raise UserError(f'{path} is no checkpoint of ours, or is cut short ({type(e).__name__}); delete it or train with --init_from=scratch') from e
    if not good:
        raise UserError(f'{path} is a checkpoint of another version; train it anew with --init_from=scratch')
    return checkpoint


def build(config):
    """The untrained method that a flat config describes (it may hold other keys too). UserError where the method says ValueError."""
    method, Config = method_class(config['method'])
    try:
        return method(Config(**{f.name: config[f.name] for f in dataclasses.fields(Config) if f.name in config}))
    except ValueError as e:
        raise UserError(f'{config["method"]}: {e}') from e


def load_method(out_dir, device):
    """out_dir -> (method in eval mode on device, with the averaged weights; its checkpoint)."""
    path = os.path.join(out_dir, 'ckpt.pt')
    checkpoint = load(path)
    method = build(checkpoint['config'])
    try:
        method.load_state_dict({**checkpoint['model'], **checkpoint['ema']})
    except RuntimeError as e:
        raise UserError(f'{path} does not fit the method {checkpoint["config"]["method"]} of today; train it anew with --init_from=scratch') from e
    return method.to(device).eval(), checkpoint


def check_fits(checkpoint, config, method, out_dir):
    """UserError if out_dir holds a run of another shape. Changed rates, intervals and lengths of training are fine."""
    if not {'optimizer', 'tokens'} <= checkpoint.keys():
        raise UserError(f'{out_dir} holds weights only, nothing to go on with; start from them with --init_from={out_dir} and another --out_dir')
    old = checkpoint['config']
    # keys that change what the weights mean, but not their shapes; and the seed: data, times and masks are functions of it
    meanings = ('method', 'dataset', 'tokenizer', 'wrap', 'vocab_size', 'block_size', 'num_heads', 'encoder', 'token_encoder', 'encoder_weights',
                'layer', 'num_latents', 'unit_norm', 'latent_length', 'latent_schedule', 'tangent', 'stage', 'decode_from', 'seed')
    changed = [k for k in meanings if old.get(k, config.get(k)) != config.get(k)]  # an older run may not say
    shapes = {k: v.shape for k, v in method.state_dict().items()}
    if not changed and shapes != {k: v.shape for k, v in checkpoint['model'].items()}:
        changed = [k for k in method_fields(config['method']) if old.get(k) != config.get(k)] or ['the code']
    if changed:
        was, now = (', '.join(f'{k}={str(d.get(k, "another one"))[:99]}' for k in changed) for d in (old, config))
        raise UserError(f'{out_dir} holds a run with {was}, not {now}; go on with that, or start over with --init_from=scratch, or give another --out_dir')


def begin_with(method, config, out_dir):
    """Copies what fits from the run in out_dir: its averaged weights and its buffers. UserError if the texts differ or nothing fits."""
    checkpoint = load(os.path.join(out_dir, 'ckpt.pt'))
    old = checkpoint['config']
    if any(old.get(k) != config.get(k) for k in ('vocab_size', 'tokenizer')):
        raise UserError(f'{out_dir} was trained with another tokenizer than that of {config["dataset"]}')
    theirs, own = {**checkpoint['model'], **checkpoint['ema']}, method.state_dict()
    fits = {k: v for k, v in theirs.items() if k in own and v.shape == own[k].shape}
    if any(old.get(k, config.get(k)) != config.get(k) for k in ('token_encoder', 'encoder_weights', 'layer')):
        fits = {k: v for k, v in fits.items() if k not in ('state_mean', 'state_std')}  # LDLM's: of other states, so they are gathered anew
    if not fits:
        raise UserError(f'{out_dir} has no weight in common with this method')
    method.load_state_dict(fits, strict=False)
    if int(os.environ.get('RANK', 0)) == 0:
        print(f'{len(fits)} of {len(own)} tensors begin as {out_dir} left them' + ''.join(f'; new: {k}' for k in list(own) if k not in fits)[:200])


# ----------------------------------------------------------------------------------------------------------------------------------
# weights and devices

def fingerprint(module):
    """Of all weights, 8 hex digits: what was made with them names them, and a run that was trained on in the same folder has others."""
    crc = 0
    for tensor in module.state_dict().values():
        crc = zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy(), crc)
    return f'{crc:08x}'


def pick_device(name):
    """'auto' | 'cpu' | 'cuda' | 'mps' -> torch.device; under torchrun each process takes its own GPU."""
    name = name if name != 'auto' else 'cuda' if torch.cuda.is_available() else 'cpu'
    there = {'cpu': True, 'cuda': torch.cuda.is_available(), 'mps': torch.backends.mps.is_available()}
    if not there.get(name):
        raise UserError(f'device={name!r} is not there; this machine has: {", ".join(k for k, v in there.items() if v)}')
    if name == 'cuda':
        torch.cuda.set_device(int(os.environ.get('LOCAL_RANK', 0)))
    return torch.device(name)


def device_name(device):
    return torch.cuda.get_device_name() if device.type == 'cuda' else f'{device.type} ({torch.get_num_threads()} threads)'


def backbones(method):
    """Its networks between embeddings and heads."""
    return [m for m in method.modules() if hasattr(m, 'flops') and m is not method]


def compile_in_place(modules, device):
    """torch.compile; the names in the state dict stay as they are. UserError where a CPU's compiler is missing."""
    if device.type == 'cpu' and not any(shutil.which(name) for name in (os.environ.get('CXX', 'g++'), 'g++', 'clang++', 'cl')):
        raise UserError('compile=True needs a C++ compiler (g++ or clang++) on a CPU; install one, or do without: --compile=False')
    for module in modules:
        module.compile()
