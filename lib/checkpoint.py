"""
Checkpoints: written whole or not at all, read without running code, and what of them fits a run.

A checkpoint is a dict of numbers, strings and tensors:
    format      2
    config      every key of the run, flat, with method, vocab_size and block_size
    model       the method's state dict: its weights and all that it keeps in buffers
    ema         name of a weight -> its average over the steps
    optimizer   name of a weight -> its state in the optimizer
    step, tokens
"""
import dataclasses
import json
import os
import zlib

import torch

from lib.configurator import UserError, idle
from lib.files import whole

FORMAT = 2
RENAMED = {'quantizer.': 'channel.quantizer.', 'z_mask': 'channel.z_mask'}  # since format 1


def is_run(name):
    """Whether a name means a run of ours; any other is of the Hugging Face hub, or a folder of its format."""
    return name.startswith('out/') or os.path.exists(os.path.join(name, 'ckpt.pt'))


def save(path, checkpoint):
    """All or nothing: at every moment `path` is the old checkpoint or the new one, whole."""
    kept = 'the one before it is kept' if os.path.exists(path) else 'there is none before it'
    try:
        with whole(path) as temp:
            torch.save({'format': FORMAT, **checkpoint}, temp)
    except UserError as e:
        raise UserError(f'{e}; {kept}') from e
    except RuntimeError as e:  # how torch's zip writer reports a disk that fills up
        raise UserError(f'cannot write {path} (is the disk full?); {kept}') from e


def load(path):
    """The dict in a checkpoint file, on the CPU. UserError if the file is missing, truncated or of another kind."""
    if not os.path.isfile(path):
        folder = os.path.dirname(path)
        name = os.path.basename(folder)
        known = os.path.exists(f'config/{name}.py')
        command = f'{name}.py' if known else f'NAME.py --out_dir={folder}'
        raise UserError(f'{folder} holds no checkpoint; make it with: python train.py config/{command}')
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        if checkpoint['format'] == 1:
            checkpoint = from_format_1(checkpoint)
        usable = checkpoint['format'] == FORMAT and isinstance(checkpoint['config']['method'], str) \
            and isinstance(checkpoint['step'], int) and all(isinstance(checkpoint[k], dict) for k in ('model', 'ema'))
    except Exception as e:  # whatever a foreign file makes the reader stumble over
        raise UserError(f'{path} is no checkpoint of ours, or is cut short ({type(e).__name__}); '
                        'delete it or train with --init_from=scratch') from e
    if not usable:
        raise UserError(f'{path} is a checkpoint of another version; train it anew with --init_from=scratch')
    return checkpoint


def from_format_1(old):
    """The first edition numbered the optimizer's states by weight, matrices first, and named some weights otherwise."""
    def renamed(name):
        return next((new + name[len(was):] for was, new in RENAMED.items() if name.startswith(was)), name)
    new = {**old, 'format': 2}
    for part in ('model', 'ema'):
        new[part] = {renamed(name): tensor for name, tensor in old[part].items()}
    if 'optimizer' in old:
        names = sorted(new['ema'], key=lambda name: new['ema'][name].dim() <= 1)  # sorted() keeps ties in order
        new['optimizer'] = {names[i]: state for i, state in old['optimizer'].items()}
    return new


def averaged_weights(checkpoint):
    """The state dict of a run's method with the averaged weights in place of the last ones."""
    return {**checkpoint['model'], **checkpoint['ema']}


def fingerprint(module):
    """8 hex digits of all weights: they identify what was made with them, also after more training in a folder."""
    crc = 0
    for tensor in module.state_dict().values():
        crc = zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy(), crc)
    return f'{crc:08x}'


def check_fits(checkpoint, config, method, out_dir):
    """UserError if out_dir holds a run of another kind. Changed rates, intervals and lengths of training are fine."""
    if not {'optimizer', 'tokens'} <= checkpoint.keys():
        raise UserError(f'{out_dir} holds weights only, so training cannot continue; start from them with '
                        f'--init_from={out_dir} and another --out_dir')
    old, fields = checkpoint['config'], dataclasses.fields(method.Config)
    # keys that change what the weights mean, but not their shapes; and the seed: data, times and masks depend on it
    meanings = ['method', 'dataset', 'tokenizer', 'wrap', 'vocab_size', 'block_size', 'encoder_weights', 'seed']
    if old['method'] == config['method']:
        unused = idle(method.Config, {**config, **old})  # an older run may hold keys that had no effect
        meanings += [f.name for f in fields if f.metadata.get('meaning') and f.name not in unused]
    changed = [k for k in meanings if old.get(k, config.get(k)) != config.get(k)]  # an older run may lack a key
    shapes = {k: v.shape for k, v in method.state_dict().items()}
    if not changed and shapes != {k: v.shape for k, v in checkpoint['model'].items()}:
        changed = [f.name for f in fields if old.get(f.name) != config.get(f.name)] or ['the code']
    if changed:
        was, now = (', '.join(f'{k}={str(d.get(k, "another one"))[:99]}' for k in changed) for d in (old, config))
        raise UserError(f'{out_dir} holds a run with {was}, not {now}; continue with that, start over with '
                        '--init_from=scratch, or give another --out_dir')


def begin_with(method, config, out_dir):
    """Copies what fits from the run in out_dir, its averaged weights and its buffers -> a sentence about it.

    UserError if its texts have another tokenizer, or nothing fits.
    """
    checkpoint = load(os.path.join(out_dir, 'ckpt.pt'))
    old = checkpoint['config']
    if any(old.get(k) != config.get(k) for k in ('vocab_size', 'tokenizer')):
        raise UserError(f'{out_dir} was trained with another tokenizer than that of {config["dataset"]}')
    own, theirs = method.state_dict(), averaged_weights(checkpoint)
    fits = {k: v for k, v in theirs.items() if k in own and v.shape == own[k].shape}
    fits = method.reusable(fits, old, config)
    if not fits:
        raise UserError(f'{out_dir} has no weight in common with this method')
    method.load_state_dict(fits, strict=False)
    new = ''.join(f'; new: {k}' for k in own if k not in fits)[:200]
    return f'{len(fits)} of {len(own)} tensors begin as {out_dir} left them{new}'


def cut_log(path, step):
    """Makes log.jsonl, or drops the records after `step`, which will be written again, and a torn last line."""
    try:
        with whole(path) as temp, open(temp, 'wb') as new:
            if os.path.exists(path):
                with open(path, 'rb') as old:
                    new.writelines(line for line in old if precedes(line, step))
    except UserError as e:
        raise UserError(f'{e}; give another --out_dir') from e


def precedes(line, step):
    try:
        return line.endswith(b'\n') and json.loads(line)['step'] <= step
    except (ValueError, TypeError, KeyError, RecursionError):
        return False
