"""
Where a run's weights come from: scratch, its own checkpoint, another run, or published ones.

Another run is one of train.py, out/OTHER, or a folder of `sample.py --save_hub` (or its hub id): what fits
is copied. Published weights of MDLM's authors decide the shape, and are copied whole.
"""
import dataclasses
import os
from types import SimpleNamespace

from lib.checkpoint import averaged_weights, fill, is_run, load
from lib.configurator import UserError, idle
from lib.distributed import rank_and_world
from lib.hub import is_saved_run, load_published

OWN = 'auto', 'scratch', 'resume'


def find_weights(config):
    """Where weights come from -> (checkpoint to continue or None, published weights or None).

    Weights of MDLM's authors bring their shape, which goes into the config.
    """
    c, path = SimpleNamespace(**config), os.path.join(config['out_dir'], 'ckpt.pt')
    if c.init_from not in OWN and '/' not in c.init_from and not os.path.isdir(c.init_from):
        raise UserError('init_from is auto, scratch, resume, out/OTHER, OWNER/NAME of the hub or a folder, '
                        f'not {c.init_from!r}')
    resuming = c.init_from == 'resume' or c.init_from != 'scratch' and os.path.exists(path)
    checkpoint, published = load(path) if resuming else None, None
    if c.init_from not in OWN and not is_run(c.init_from):
        if not checkpoint:
            published = load_published(c.init_from, c.method)
            if is_saved_run(published[0]):
                return None, published
        theirs = checkpoint['config'] if checkpoint else published[0]
        shape = ['hidden', 'num_layers', 'num_heads', 'cond_dim', 'dropout']
        shape += ['block_size'] if not c.block_size else []
        config.update({k: theirs[k] for k in shape})
    return checkpoint, published


def load_weights(method, config, checkpoint, published):
    """Gives the method the weights that find_weights found, or those of another run."""
    init_from = config['init_from']
    if checkpoint:
        check_fits(checkpoint, config, method, config['out_dir'])
        method.load_state_dict(checkpoint['model'])
    elif published and not is_saved_run(published[0]):
        if config['vocab_size'] != published[0]['vocab_size']:
            raise UserError(f'{init_from} has {published[0]["vocab_size"]:,} tokens and {config["dataset"]} '
                            f'has {config["vocab_size"]:,}; prepare the data with its tokenizer')
        fill(method, published[1], f'the weights of {init_from} do not fit its config.json')
    elif init_from not in OWN:
        news = begin_with(method, config, init_from, *(published or averaged(init_from)))
        if rank_and_world()[0] == 0:
            print(news)
    elif method.untrained_part:
        raise UserError(method.untrained_part)


def check_fits(checkpoint, config, method, out_dir):
    """UserError unless the run in out_dir can continue with this config.

    Learning rates, intervals and the length of training may change.
    """
    if not {'optimizer', 'tokens'} <= checkpoint.keys():
        raise UserError(f'{out_dir} holds weights only, so training cannot continue; start from them with '
                        f'--init_from={out_dir} and another --out_dir')
    old, fields = checkpoint['config'], dataclasses.fields(method.Config)
    old = {'optimizer': 'adamw', **old, 'dataset': os.path.normpath(old.get('dataset', config['dataset']))}
    # these change what weights mean without changing their shapes
    meanings = ['method', 'dataset', 'tokenizer', 'wrap', 'vocab_size', 'block_size', 'encoder_weights']
    meanings += ['data_sha256', 'seed', 'optimizer']  # times and masks depend on the seed, too
    if old['method'] == config['method']:
        may_differ = set(idle(method.Config, {**config, **old}))  # in runs of the first edition
        if config.get('encoder_weights') and config['encoder_weights'] == old.get('encoder_weights'):
            # it is the same encoder, wherever it lies now
            may_differ |= {f.name for f in fields if config.get(f.name) == method.encoder_name}
        meanings += [f.name for f in fields if f.metadata.get('meaning') and f.name not in may_differ]
    # an older run may lack a key
    changed = [k for k in meanings if old.get(k, config.get(k)) != config.get(k)]
    shapes = {k: v.shape for k, v in method.state_dict().items()}
    if not changed and shapes != {k: v.shape for k, v in checkpoint['model'].items()}:
        changed = [f.name for f in fields if old.get(f.name) != config.get(f.name)] or ['the code']
    if changed:
        was, now = (', '.join(f'{k}={str(values.get(k, "another one"))[:99]}' for k in changed)
                    for values in (old, config))
        raise UserError(f'{out_dir} holds a run with {was}, not {now}; continue with that, '
                        'start over with --init_from=scratch, or give another --out_dir')
    if not can_continue(checkpoint, method):
        raise UserError(f'{out_dir}/ckpt.pt is damaged: its averages or its optimizer\'s states do not fit '
                        'its weights; start over with --init_from=scratch, or give another --out_dir')


def can_continue(checkpoint, method):
    """Whether each weight has its average, and each state of the optimizer is AdamW's or Muon's."""
    shapes = {name: p.shape for name, p in method.named_parameters()}
    kinds = {'step', 'exp_avg', 'exp_avg_sq'}, {'momentum_buffer'}
    return {name: v.shape for name, v in checkpoint['ema'].items()} == shapes and all(
        name in shapes and state.keys() in kinds
        and all(v.shape == (() if k == 'step' else shapes[name]) for k, v in state.items())
        for name, state in checkpoint['optimizer'].items())


def averaged(out_dir):
    """-> the flat config of the run in out_dir, its averaged weights and buffers."""
    checkpoint = load(os.path.join(out_dir, 'ckpt.pt'))
    return checkpoint['config'], averaged_weights(checkpoint)


def begin_with(method, config, name, old, theirs):
    """Copies what fits of theirs, the state dict of the run called name -> a sentence about it.

    old: that run's flat config. UserError if it has another tokenizer, or nothing fits.
    """
    if any(old.get(k) != config.get(k) for k in ('vocab_size', 'tokenizer')):
        raise UserError(f'{name} was trained with a tokenizer other than that of {config["dataset"]}')
    own = method.state_dict()
    fits = {k: v for k, v in theirs.items() if k in own and v.shape == own[k].shape}
    try:
        fits = method.reusable(fits, old, config)
    except ValueError as e:
        raise UserError(f'{name} does not fit: {e}') from e
    if not fits:
        raise UserError(f'{name} has no weight in common with this method')
    method.load_state_dict(fits, strict=False)
    new = ''.join(f'; new: {k}' for k in own if k not in fits)[:200]
    return f'{len(fits)} of {len(own)} tensors begin as {name} left them{new}'
