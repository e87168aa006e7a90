"""
Weights in the layout of the Hugging Face hub: model.safetensors and config.json in a folder or repository.

    save_run(folder, method, config)      writes any run so, to share it: sample.py --save_hub
    config, state = load_published(name)  reads it back, or an MDLM in the layout of kuleshov-group/mdlm-owt

The official network (`models/dit.py` of kuleshov-group/mdlm) and ours compute the same function, but
their weights differ in three places:
    LayerNorm   theirs has a gain w before AdaLN, which we fold into AdaLN's scale:
                w (1 + scale) = 1 + scale'  with  scale' = w scale + w - 1
    head        theirs has a last row for [mask], whose probability SUBS sets to zero; we drop it
    time        theirs is fed sigma, which `time_conditioning: false` sets to 0; ours is always fed 0
"""
import json
import os

import torch

from lib.configurator import UserError
from lib.files import whole
from lib.tokens import cache_only_if_offline, first_line

FILES = 'model.safetensors', 'pytorch_model.bin'
NEEDED = {'method', 'dataset', 'vocab_size', 'block_size', 'step'}  # of the config of a saved run


def save_run(folder, method, config):
    """Writes a method and what describes it of its flat config. UserError if it cannot be written."""
    if os.path.exists(os.path.join(folder, 'ckpt.pt')):
        raise UserError(f'{folder} holds a run of train.py; give --save_hub another folder')
    try:
        from safetensors.torch import save_file
    except ImportError as e:
        raise UserError(f'{e}: pip install safetensors') from e
    keys = [*NEEDED, 'tokenizer', 'wrap', 'data_sha256', 'encoder_weights', *vars(method.config)]
    config = {'model_type': 'nanoladd', **{k: config[k] for k in sorted(keys) if k in config}}
    state = {name: w.detach().cpu().clone(memory_format=torch.contiguous_format)
             for name, w in method.state_dict().items()}
    with whole(*(os.path.join(folder, name) for name in (FILES[0], 'config.json'))) as (weights, text):
        save_file(state, weights, metadata={'format': 'pt'})
        with open(text, 'w', encoding='utf-8') as f:
            json.dump(config, f, indent=1)


def is_saved_run(config):
    """Whether a config of load_published is that of save_run, rather than one of MDLM's authors."""
    return config['step'] is not None


def fetch(hub_id):
    """A folder, or a hub id -> its config dict, its state dict. UserError if they cannot be read."""
    if os.path.isdir(hub_id):
        there = [f for f in ('config.json', *FILES) if os.path.exists(os.path.join(hub_id, f))]
        if there[:1] != ['config.json'] or len(there) == 1:
            found = ' and '.join(there) or 'neither'
            raise UserError(f'{hub_id} wants config.json and {" or ".join(FILES)}, and holds {found}')
        config, weights = (os.path.join(hub_id, f) for f in there[:2])
    else:
        cache_only_if_offline()
        try:
            from huggingface_hub import hf_hub_download
            config, weights = (hf_hub_download(hub_id, f) for f in ('config.json', FILES[0]))
        except ImportError as e:
            raise UserError(f'{e}: pip install huggingface_hub safetensors') from e
        except (OSError, ValueError) as e:  # the hub's own errors are subclasses of these
            raise UserError(f'cannot fetch {hub_id} from the hub ({type(e).__name__}: {first_line(e)}); it '
                            f'needs a network, or a folder with config.json and {FILES[0]}') from e
    try:
        with open(config, encoding='utf-8') as f:
            config = dict(json.load(f))
        if weights.endswith('.bin'):
            return config, torch.load(weights, map_location='cpu', weights_only=True)
        from safetensors.torch import load_file
        return config, load_file(weights)
    except Exception as e:  # a damaged file can fail in any way
        raise UserError(f'cannot read {weights} and its config.json ({type(e).__name__}: {first_line(e)}); '
                        'are they whole?') from e


def convert(state, num_layers):
    """Official names and shapes -> the state dict of our MDLM. KeyError where a weight is missing."""
    theirs = {name.removeprefix('backbone.'): w.to(torch.float32, copy=True) for name, w in state.items()
              if not name.endswith('rotary_emb.inv_freq')}
    ours = {'embed.weight': theirs.pop('vocab_embed.embedding')}
    for kind in 'weight', 'bias':
        ours[f'head.{kind}'] = theirs.pop(f'output_layer.linear.{kind}')[:-1]
        for i in 0, 2:
            ours[f'dit.time.0.mlp.{i}.{kind}'] = theirs.pop(f'sigma_map.mlp.{i}.{kind}')

    def fold(source, target, **norms):
        """norms: a LayerNorm's name -> which of AdaLN's chunks (shift, scale, gate, ...) is its scale."""
        weight, bias = (theirs.pop(f'{source}.adaLN_modulation.{kind}') for kind in ('weight', 'bias'))
        for norm, i in norms.items():
            w = theirs.pop(f'{source}.{norm}.weight')
            rows = slice(i * len(w), (i + 1) * len(w))
            weight[rows] *= w[:, None]
            bias[rows] = w * bias[rows] + w - 1
        ours[f'{target}.weight'], ours[f'{target}.bias'] = weight, bias

    fold('output_layer', 'dit.ada.0', norm_final=1)
    for n in range(num_layers):
        block = f'dit.blocks.{n}.modalities.0'
        fold(f'blocks.{n}', f'{block}.ada', norm1=1, norm2=4)
        for name in ('qkv', 'out', 'mlp.0', 'mlp.2'):
            official = name if 'mlp' in name else f'attn_{name}'
            for kind in ('weight', 'bias') if 'mlp' in name else ('weight',):
                ours[f'{block}.{name}.{kind}'] = theirs.pop(f'blocks.{n}.{official}.{kind}')
    if theirs:
        raise KeyError(next(iter(theirs)))
    return ours


def load_published(name, method='mdlm'):
    """A hub id, or a folder -> the flat config of a method, with `step`, its state dict.

    Of a run that save_run has written, or of an official MDLM: its tokenizer is GPT-2's, a sequence is
    BOS ... EOS, and `step` is None. UserError if the weights cannot be fetched, are neither of these, or
    are an official MDLM and `method` is another one.
    """
    c, state = fetch(name)
    if c.get('model_type') == 'nanoladd':
        if not NEEDED <= c.keys() or ('tokenizer' in c) != ('wrap' in c):
            raise UserError(f'{name}/config.json is not whole; write it again with sample.py --save_hub')
        return {k: v for k, v in c.items() if k != 'model_type'}, state
    if method != 'mdlm':
        raise UserError(f'{name} holds no run of ours, and published weights are for mdlm, not for {method}')
    try:
        if c.get('model_type', 'mdlm') != 'mdlm' or c['time_conditioning']:
            raise KeyError(f'model_type {c.get("model_type")}, time_conditioning {c["time_conditioning"]}')
        config = dict(method='mdlm', dataset='openwebtext', tokenizer={'kind': 'gpt2'}, wrap=True,
                      vocab_size=c['vocab_size'] - 1, block_size=c['model_length'],
                      hidden=c['hidden_dim'], num_layers=c['n_blocks'], num_heads=c['n_heads'],
                      cond_dim=c['cond_dim'], dropout=c['dropout'], step=None)
        return config, convert(state, config['num_layers'])
    except (KeyError, RuntimeError, AttributeError, TypeError) as e:
        raise UserError(f'{name} is not an MDLM without time conditioning in the layout of '
                        f'kuleshov-group/mdlm-owt ({first_line(e)})') from e
