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

from checkpoint import build, fingerprint, method_fields, pick_device
from configurator import UserError, configure, run
from data.tokens import Tokens, latents_of
from encoders import open_encoder
from train import defaults

def main(argv):
    config = configure(defaults, argv, method_fields)
    c = SimpleNamespace(**config)
    if c.method != 'ladd' or not c.encoder:
        raise UserError('latents are stored for --method=ladd with a frozen encoder: --encoder=NAME')
    device = pick_device(c.device)
    splits = {split: Tokens(c.dataset, split, c.block_size) for split in ('train', 'val')}
    with torch.device('meta'):  # for its checks and its encoder; no weight is needed
        method = build({**config, 'vocab_size': splits['train'].vocab_size, 'stored_latents': False})
    method.check_data(splits['train'], device)
    folder, meta = latents_of(splits['train'], c.encoder, c.num_latents, c.latent_dim)
    meta['encoder_weights'] = fingerprint(open_encoder(c.encoder, device).model)
    bins, total = {split: os.path.join(folder, split + '.bin') for split in splits}, sum(map(len, splits.values()))
    if describes(folder, meta) and all(os.path.exists(path) for path in bins.values()):
        print(f'{folder} is there already')
        return

    size, free = total * c.num_latents * c.latent_dim * 2, shutil.disk_usage(splits['train'].folder).free
    if size > free:
        raise UserError(f'{folder} needs {size / 1e9:,.1f} GB, and the disk has {free / 1e9:,.1f} GB left')
    os.makedirs(folder, exist_ok=True)
    batch = c.micro_batch or min(c.batch_size, 64)
    try:
        with tqdm(total=total, unit='chunk', disable=None) as bar, torch.autocast(device.type, torch.bfloat16, enabled=c.dtype == 'bfloat16'):
            for split, tokens in splits.items():
                with open(bins[split] + '.tmp', 'wb') as f:
                    for i in range(0, len(tokens), batch):
                        x = tokens.rows(range(i, min(i + batch, len(tokens)))).to(device)
                        f.write(method.encoder(x).to(torch.bfloat16).contiguous().cpu().view(torch.uint16).numpy())
                        bar.update(len(x))
        path = os.path.join(folder, 'meta.json')
        with open(path + '.tmp', 'w', encoding='utf-8') as f:
            json.dump(meta, f, indent=1)
        if os.path.exists(path):
            os.remove(path)  # from here to the last rename there is no set at all, rather than half of one
        for path in (*bins.values(), path):
            os.replace(path + '.tmp', path)
    except OSError as e:
        raise UserError(f'cannot write {folder}: {e.strerror or e}') from e
    finally:
        for path in (*bins.values(), os.path.join(folder, 'meta.json')):
            if os.path.exists(path + '.tmp'):
                os.remove(path + '.tmp')
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
