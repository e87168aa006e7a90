"""
Runs a frozen encoder over prepared data once, so that training need not run it at every step:

    python data/encode.py config/NAME.py [--key=value ...]                                the keys of train.py
    python train.py config/NAME.py --stored_latents=True --encoder_dropout=False [--key=value ...]

It writes a folder latents_ENCODER_LENGTH_MxD beside train.bin. Training says so if the folder is missing, or
was made of something else. In it are
    train.bin, val.bin   (chunks, M, D) in bfloat16: for all chunks of block_size tokens, side by side, the
                         encoder's states, pooled to M vectors and cut to D coordinates; scaling to length 1
                         comes later, so Co-LADD and Di-LADD share them
    meta.json            the encoder's name and weights, the tokens (checksums) and the shape, checksums; it
                         is written last, so a folder without it is not whole

There is one latent per chunk. With encoder_dropout it would depend on the mask of each step, which a stored
one cannot.
"""
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # for lib/ and the methods
from lib.configurator import UserError, configure, run
from lib.device import pick_device
from lib.files import sha256_of, whole
from lib.tokens import Tokens, latents_folder
from methods import METHODS, attach_encoder, build
from train import Config


def main(argv):
    config = configure(Config, argv, METHODS)
    c = SimpleNamespace(**config)
    if c.method != 'ladd' or not c.encoder:
        raise UserError('latents are stored for --method=ladd with a frozen encoder: --encoder=NAME')
    device = pick_device(c.device)
    splits = {split: Tokens(c.dataset, split, c.block_size) for split in ('train', 'val')}
    with torch.device('meta'):  # for its checks and its encoder; no weight is needed
        method = build({**config, 'vocab_size': splits['train'].vocab_size, 'stored_latents': False})
    folder, meta = latents_folder(splits['train'], c.encoder, c.num_latents, c.latent_dim)
    meta['encoder_weights'] = attach_encoder(method, splits['train'], device)
    if is_there(folder, meta):
        print(f'{folder} is there already')
        return

    total, free = sum(map(len, splits.values())), shutil.disk_usage(splits['train'].folder).free
    size, batch = total * c.num_latents * c.latent_dim * 2, c.micro_batch or min(c.batch_size, 64)
    if size > free:
        raise UserError(f'{folder} needs {size / 1e9:,.1f} GB, and the disk has {free / 1e9:,.1f} GB left')
    with whole(*(os.path.join(folder, name) for name in ('train.bin', 'val.bin', 'meta.json'))) as temps, \
            torch.autocast(device.type, torch.bfloat16, enabled=c.dtype == 'bfloat16'):
        with tqdm(total=total, unit='chunk', disable=None) as bar:
            for temp, tokens in zip(temps, splits.values()):
                encode(method, tokens, temp, batch, device, bar)
        meta['sha256'] = {split: sha256_of(temp) for split, temp in zip(splits, temps)}
        with open(temps[-1], 'w', encoding='utf-8') as f:
            json.dump(meta, f, indent=1)
    print(f'{folder}: {total:,} chunks, {size / 1e9:,.2f} GB')


def encode(method, tokens, path, batch, device, bar):
    """Writes the latents of all chunks of `tokens`, a batch at a time."""
    with open(path, 'wb') as f:
        for i in range(0, len(tokens), batch):
            ids, = tokens.rows(range(i, min(i + batch, len(tokens))))
            z = method.encoder(ids.to(device))                                         # (b, M, D)
            f.write(z.to(torch.bfloat16).contiguous().cpu().view(torch.uint16).numpy())
            bar.update(len(ids))


def is_there(folder, meta):
    """Whether the folder holds latents of just this meta.json, whole."""
    try:
        with open(os.path.join(folder, 'meta.json'), encoding='utf-8') as f:
            stored = json.load(f)
        sums = stored.pop('sha256')
        return stored == meta and all(sha256_of(os.path.join(folder, f'{split}.bin')) == sums[split]
                                      for split in ('train', 'val'))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


if __name__ == '__main__':
    run(main, Config, METHODS)
