"""
Published MDLM weights, e.g. kuleshov-group/mdlm-owt, as an MDLM of ours.

The official network (`models/dit.py` of kuleshov-group/mdlm) and ours compute the same function; three
things differ on paper:
    LayerNorm   theirs has a gain w in front of AdaLN. It folds into the scale: w (1 + scale) = 1 + scale' for scale' = w scale + w - 1
    head        theirs has a row for [mask], the last one, whose probability SUBS sets to zero. We drop it
    time        theirs is fed sigma, set to 0 by `time_conditioning: false`. Ours is fed the same constant
"""
import json
import os

import torch

from lib.configurator import UserError
from lib.tokens import cache_only_if_offline, first_line

FILES = 'model.safetensors', 'pytorch_model.bin'


def fetch(hub_id):
    """-> config dict, state dict; from a folder, or from the hub and its cache."""
    if os.path.isdir(hub_id):
        there = [f for f in ('config.json', *FILES) if os.path.exists(os.path.join(hub_id, f))]
        if there[:1] != ['config.json'] or len(there) == 1:
            raise UserError(f'{hub_id} wants config.json and {" or ".join(FILES)}, and holds {" and ".join(there) or "neither"}')
        config, weights = (os.path.join(hub_id, f) for f in there[:2])
    else:
        cache_only_if_offline()
        try:
            from huggingface_hub import hf_hub_download
            config, weights = (hf_hub_download(hub_id, f) for f in ('config.json', FILES[0]))
        except ImportError as e:
            raise UserError(f'{e}: pip install huggingface_hub safetensors') from e
        except (OSError, ValueError) as e:  # its own errors are among them: no network, no such repository, no valid name
            raise UserError(f'cannot fetch {hub_id} from the hub ({type(e).__name__}: {first_line(e)}); it needs a network, '
                            f'or a folder with config.json and {FILES[0]}') from e
    try:
        with open(config, encoding='utf-8') as f:
            config = json.load(f)
        if weights.endswith('.bin'):
            return config, torch.load(weights, map_location='cpu', weights_only=True)
        from safetensors.torch import load_file
        return config, load_file(weights)
    except Exception as e:  # whatever a damaged file makes the readers stumble over
        raise UserError(f'cannot read {weights} and its config.json ({type(e).__name__}: {first_line(e)}); are they whole?') from e


def convert(state, num_layers):
    """Official names and shapes -> the state dict of our MDLM. KeyError where a weight is missing."""
    theirs = {name.removeprefix('backbone.'): w.float() for name, w in state.items() if not name.endswith('rotary_emb.inv_freq')}
    ours = {'embed.weight': theirs.pop('vocab_embed.embedding')}
    for kind in 'weight', 'bias':
        ours[f'head.{kind}'] = theirs.pop(f'output_layer.linear.{kind}')[:-1]
        for i in 0, 2:
            ours[f'dit.time.0.mlp.{i}.{kind}'] = theirs.pop(f'sigma_map.mlp.{i}.{kind}')

    def fold(source, target, **norms):
        """norms: LayerNorm -> which of the chunks (shift, scale, gate, shift, ...) is its scale."""
        weight, bias = theirs.pop(f'{source}.adaLN_modulation.weight'), theirs.pop(f'{source}.adaLN_modulation.bias')
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
        for name, official in [('qkv', 'attn_qkv'), ('out', 'attn_out'), ('mlp.0', 'mlp.0'), ('mlp.2', 'mlp.2')]:
            for kind in ('weight', 'bias') if 'mlp' in name else ('weight',):
                ours[f'{block}.{name}.{kind}'] = theirs.pop(f'blocks.{n}.{official}.{kind}')
    if theirs:
        raise KeyError(next(iter(theirs)))
    return ours


def load_published(name, method='mdlm'):
    """name: owner/name of the hub, or a folder -> the flat config of an MDLM, its state dict.

    The tokenizer is GPT-2's, texts are BOS ... EOS. UserError if it cannot be fetched, is not an MDLM in
    the official layout, or another method is wanted.
    """
    if method != 'mdlm':
        raise UserError(f'{name} holds no run of ours, and published weights are of mdlm, not of {method}')
    c, state = fetch(name)
    try:
        if c.get('model_type', 'mdlm') != 'mdlm' or c['time_conditioning']:
            raise KeyError(f'model_type {c.get("model_type")}, time_conditioning {c["time_conditioning"]}')
        config = dict(method='mdlm', dataset='openwebtext', tokenizer={'kind': 'gpt2'}, wrap=True,
                      vocab_size=c['vocab_size'] - 1, block_size=c['model_length'], hidden=c['hidden_dim'],
                      num_layers=c['n_blocks'], num_heads=c['n_heads'], cond_dim=c['cond_dim'], dropout=c['dropout'])
        return config, convert(state, config['num_layers'])
    except (KeyError, RuntimeError, AttributeError, TypeError) as e:
        raise UserError(f'{name} is not an MDLM without time conditioning in the layout of kuleshov-group/mdlm-owt '
                        f'({first_line(e)})') from e
