"""
Runs a frozen encoder over prepared data, once, so that training need not run it at every step:

    python data/encode.py config/NAME.py [--key=value ...]                                     the keys of train.py
    python train.py config/NAME.py --stored_latents=True --encoder_dropout=False [--key=value ...]

writes a folder latents_ENCODER_LENGTH_MxD beside train.bin (the second command says so if it is missing or made of something else):
    train.bin, val.bin   (chunks, M, D) in bfloat16: for every chunk of block_size tokens, side by side, the encoder's states, pooled to M and
                         cut to D coordinates; scaling to length 1 comes later, so Co-LADD and Di-LADD share them
    meta.json            the encoder's name and weights, the tokens (checksums) and the shape; what has no meta.json is not whole

There is one latent per chunk: with encoder_dropout it would depend on each step's mask, and stored ones cannot.
"""
import json, os, shutil, sys
from types import SimpleNamespace
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..'))

import torch
from tqdm import tqdm

from lib.checkpoint import build, pick_device
from lib.configurator import UserError, configure, run
from lib.prepare import all_or_none
from lib.tokens import Tokens, latents_of
from train import check, defaults

def main(argv):
    config = configure(defaults, argv)
    c = SimpleNamespace(**config)
    check(c, 1)
    if c.method != 'ladd' or not c.encoder:
        raise UserError('latents are stored for --method=ladd with a frozen encoder: --encoder=NAME')
    device = pick_device(c.device)
    splits = {split: Tokens(c.dataset, split, c.block_size) for split in ('train', 'val')}
    with torch.device('meta'):  # for its checks and its encoder; no weight is needed
        method = build({**config, 'vocab_size': splits['train'].vocab_size, 'stored_latents': False})
    folder, meta = latents_of(splits['train'], c.encoder, c.num_latents, c.latent_dim)
    meta['encoder_weights'] = method.check_data(splits['train'], device)
    bins = {os.path.join(folder, split + '.bin'): tokens for split, tokens in splits.items()}
    latent = c.num_latents * c.latent_dim * 2  # bytes
    if describes(folder, meta) and all(os.path.exists(path) and os.path.getsize(path) == len(tokens) * latent for path, tokens in bins.items()):
        print(f'{folder} is there already')
        return

    total = sum(map(len, splits.values()))
    size, free = total * latent, shutil.disk_usage(splits['train'].folder).free
    if size > free:
        raise UserError(f'{folder} needs {size / 1e9:,.1f} GB, and the disk has {free / 1e9:,.1f} GB left')
    batch, about = c.micro_batch or min(c.batch_size, 64), os.path.join(folder, 'meta.json')
    with all_or_none([*bins, about]):
        with tqdm(total=total, unit='chunk', disable=None) as bar, torch.autocast(device.type, torch.bfloat16, enabled=c.dtype == 'bfloat16'):
            for path, tokens in bins.items():
                with open(path + '.tmp', 'wb') as f:
                    for i in range(0, len(tokens), batch):
                        x = tokens.rows(range(i, min(i + batch, len(tokens)))).to(device)
                        f.write(method.encoder(x).to(torch.bfloat16).contiguous().cpu().view(torch.uint16).numpy())
                        bar.update(len(x))
        with open(about + '.tmp', 'w', encoding='utf-8') as f:
            json.dump(meta, f, indent=1)
    print(f'{folder}: {total:,} chunks, {size / 1e9:,.2f} GB')

def describes(folder, meta):
    """Whether the meta.json in folder says just that."""
    try:
        with open(os.path.join(folder, 'meta.json'), encoding='utf-8') as f:
            return json.load(f) == meta
    except (OSError, ValueError):
        return False

if __name__ == '__main__':
    run(main)
