"""
Checkpoints: saving them, loading them, and their logs.

A file is written whole or not at all, and loading one never runs code. A checkpoint is a dict of
numbers, strings and tensors:
    format      2
    config      every key of the run, flat, with method, vocab_size and block_size
    model       the method's state dict: its weights and its buffers
    ema         name of a weight -> its average over the steps
    optimizer   name of a weight -> its state in the optimizer
    step        how many steps the run has made
    tokens      how many tokens it has seen
"""
import json
import os
import zipfile
import zlib

import torch

from lib.configurator import UserError
from lib.files import whole

FORMAT = 2


def is_run(name):
    """Whether a name means a run of ours; any other is a hub id, or a folder in the hub's format."""
    of_hub = os.path.exists(os.path.join(name, 'config.json'))
    is_file = os.path.basename(name) == 'ckpt.pt'  # `load` will ask for its folder
    return (name.startswith('out/') and not of_hub or is_file
            or os.path.exists(os.path.join(name, 'ckpt.pt')))


def save(path, checkpoint):
    """Writes all or nothing: at every moment `path` is the whole old checkpoint or the whole new one.

    UserError if it cannot be written.
    """
    kept = 'the one before it is kept' if os.path.exists(path) else 'there is none before it'
    try:
        with whole(path) as temp, open(temp, 'wb') as f:
            torch.save({'format': FORMAT, **checkpoint}, f)
    except UserError as e:
        raise UserError(f'{e}; {kept}') from e
    except RuntimeError as e:  # how torch's zip writer reports a disk that fills up
        raise UserError(f'cannot write {path} (is the disk full?); {kept}') from e


def load(path):
    """-> the dict in a checkpoint file, on the CPU, in today's format.

    UserError if the file is missing, truncated or not a checkpoint.
    """
    folder = os.path.dirname(path)
    if os.path.isfile(folder):
        raise UserError(f'{folder}: a run is named by its folder, {os.path.dirname(folder) or "."}')
    if not os.path.isfile(path):
        if os.path.exists(os.path.join(folder, 'config.json')):
            raise UserError(f'{folder} holds no run but weights in the hub\'s layout: --init_from={folder}')
        name = os.path.basename(folder)
        known = os.path.exists(f'config/{name}.py')
        command = f'{name}.py' if known else f'NAME.py --out_dir={folder}'
        raise UserError(f'{folder} holds no checkpoint; make it with: python train.py config/{command}')
    try:
        with zipfile.ZipFile(path) as f:
            if damaged := f.testzip():
                raise ValueError(f'{damaged} has changed since it was written')
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        if checkpoint['format'] == 1:
            checkpoint = from_format_1(checkpoint)
        usable = checkpoint['format'] == FORMAT and is_sound(checkpoint)
    except Exception as e:  # a foreign or damaged file can fail in any way
        raise UserError(f'{path} is not one of our checkpoints, or it is cut short ({type(e).__name__}); '
                        'delete it, or train with --init_from=scratch') from e
    if not usable:
        raise UserError(f'{path} is a checkpoint of another version; train again with --init_from=scratch')
    return checkpoint


def is_sound(checkpoint):
    """Whether every entry is of its kind; KeyError if one is missing that a trained model needs."""
    kinds = {'method': str, 'vocab_size': int, 'block_size': int}
    tensors = [*checkpoint['model'].items(), *checkpoint['ema'].items()]
    states = checkpoint.get('optimizer', {})
    for state in states.values():
        tensors += state.items()
    return (all(type(checkpoint['config'][k]) is kind for k, kind in kinds.items())
            and all(isinstance(name, str) and isinstance(v, torch.Tensor) for name, v in tensors)
            and all(type(n) is int and n >= 0 for n in (checkpoint['step'], checkpoint.get('tokens', 0))))


def from_format_1(old):
    """A checkpoint of the first edition -> the same in format 2.

    Format 1 numbered the optimizer's states: first those of all matrices, then those of all vectors, each
    in the order of `ema`.
    """
    new = {**old, 'format': 2}
    if 'optimizer' in old:
        names = sorted(new['ema'], key=lambda name: new['ema'][name].dim() <= 1)  # ties keep their order
        new['optimizer'] = {names[i]: state for i, state in old['optimizer'].items()}
    return new


def averaged_weights(checkpoint):
    """-> the state dict of a run's method, with the averaged weights in place of the latest ones."""
    return {**checkpoint['model'], **checkpoint['ema']}


def fill(method, weights, complaint):
    """Gives a method all its weights. UserError with the complaint if they do not fit."""
    try:
        method.load_state_dict(weights)
    except RuntimeError as e:
        raise UserError(complaint) from e


def fingerprint(module):
    """8 hex digits that identify a module's weights: another run, or more training, gives others."""
    crc = 0
    for tensor in module.state_dict().values():
        crc = zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy(), crc)
    return f'{crc:08x}'


def cut_log(path, step):
    """Creates log.jsonl, or drops a torn last line and the records after `step` from it.

    These will be written again. UserError if it cannot be written.
    """
    try:
        with whole(path) as temp, open(temp, 'wb') as new:
            if os.path.exists(path):
                with open(path, 'rb') as old:
                    new.writelines(line for line in old if belongs(line, step))
    except UserError as e:
        raise UserError(f'{e}; give another --out_dir') from e


def belongs(line, step):
    """Whether a line of log.jsonl is whole and a record of the first `step` steps."""
    try:
        return line.endswith(b'\n') and json.loads(line)['step'] <= step
    except (ValueError, TypeError, KeyError, RecursionError):
        return False
