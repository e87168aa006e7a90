"""lib/hub.py: the official network, written here anew, computes the same function as our DiT.

Written without a look at model.py, from the official code alone.
"""
import json
import math
import os

import helpers
import pytest
import torch
from helpers import TINY_METHODS, fails, generator, go, weights

import sample
import train
from lib import hub, prepare, tokens
from lib.configurator import UserError
from methods import open_published, open_run

V, D, LAYERS, HEADS, COND, L = 11, 24, 3, 3, 10, 9  # V counts [mask]
CONFIG = dict(model_type='mdlm', vocab_size=V, model_length=L, hidden_dim=D, cond_dim=COND, n_blocks=LAYERS,
              n_heads=HEADS, dropout=0.1, time_conditioning=False)


def official_shapes():
    shapes = {'vocab_embed.embedding': (V, D), 'rotary_emb.inv_freq': (D // HEADS // 2,),
              'sigma_map.mlp.0.weight': (COND, 256), 'sigma_map.mlp.0.bias': (COND,),
              'sigma_map.mlp.2.weight': (COND, COND), 'sigma_map.mlp.2.bias': (COND,),
              'output_layer.norm_final.weight': (D,),
              'output_layer.linear.weight': (V, D), 'output_layer.linear.bias': (V,),
              'output_layer.adaLN_modulation.weight': (2 * D, COND),
              'output_layer.adaLN_modulation.bias': (2 * D,)}
    for n in range(LAYERS):
        shapes.update({f'blocks.{n}.{name}': shape for name, shape in {
            'norm1.weight': (D,), 'norm2.weight': (D,),
            'attn_qkv.weight': (3 * D, D), 'attn_out.weight': (D, D),
            'mlp.0.weight': (4 * D, D), 'mlp.0.bias': (4 * D,),
            'mlp.2.weight': (D, 4 * D), 'mlp.2.bias': (D,),
            'adaLN_modulation.weight': (6 * D, COND), 'adaLN_modulation.bias': (6 * D,)}.items()})
    return shapes


def official_weights():
    g = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=g) * 0.3 + ('norm' in name)
            for name, shape in official_shapes().items()}


def official_log_probs(w, x):
    """x (b, l) -> log p (b, l, V - 1): DDiT at sigma = 0, then SUBS at masked positions."""
    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w[name]

    freqs = torch.exp(-math.log(10000) * torch.arange(128) / 128)
    t_freq = torch.cat((torch.cos(0 * freqs), torch.sin(0 * freqs)))
    c = w['sigma_map.mlp.0.weight'] @ t_freq + w['sigma_map.mlp.0.bias']
    c = w['sigma_map.mlp.2.weight'] @ (c * torch.sigmoid(c)) + w['sigma_map.mlp.2.bias']
    c = c * torch.sigmoid(c)

    head_dim, length = D // HEADS, x.shape[1]
    angle = torch.arange(length)[:, None] / 10000 ** (torch.arange(0, head_dim, 2) / head_dim)
    cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)  # (l, head_dim)

    def rotary(q):  # (b, l, head_dim)
        half = head_dim // 2
        return q * cos + torch.cat((-q[..., half:], q[..., :half]), dim=-1) * sin

    h = w['vocab_embed.embedding'][x]
    for n in range(LAYERS):
        def p(name, n=n):
            return w[f'blocks.{n}.{name}']
        adaLN = p('adaLN_modulation.weight') @ c + p('adaLN_modulation.bias')
        shift1, scale1, gate1, shift2, scale2, gate2 = adaLN.split(D)
        qkv = (norm(h, f'blocks.{n}.norm1.weight') * (1 + scale1) + shift1) @ p('attn_qkv.weight').T
        heads = []
        for i in range(HEADS):  # the 3 D features are (three, head, head_dim)
            q, k, v = (qkv[..., j * D + i * head_dim:j * D + (i + 1) * head_dim] for j in range(3))
            heads.append((rotary(q) @ rotary(k).mT / head_dim**0.5).softmax(-1) @ v)
        h = h + gate1 * (torch.cat(heads, dim=-1) @ p('attn_out.weight').T)
        y = norm(h, f'blocks.{n}.norm2.weight') * (1 + scale2) + shift2
        y = y @ p('mlp.0.weight').T + p('mlp.0.bias')
        y = 0.5 * y * (1 + torch.tanh((2 / math.pi) ** 0.5 * (y + 0.044715 * y**3)))
        h = h + gate2 * (y @ p('mlp.2.weight').T + p('mlp.2.bias'))
    adaLN = w['output_layer.adaLN_modulation.weight'] @ c + w['output_layer.adaLN_modulation.bias']
    shift, scale = adaLN.split(D)
    h = norm(h, 'output_layer.norm_final.weight') * (1 + scale) + shift
    logits = h @ w['output_layer.linear.weight'].T + w['output_layer.linear.bias']
    logits[..., V - 1] = -math.inf
    return (logits - logits.logsumexp(-1, keepdim=True))[..., :-1]


def write(folder, weights=None, prefix='backbone.', file='model.safetensors', **changes):
    with open(folder / 'config.json', 'w') as f:
        json.dump({**CONFIG, **changes}, f)
    weights = {prefix + name: w for name, w in (weights or official_weights()).items()}
    if file.endswith('.bin'):
        torch.save(weights, folder / file)
    else:
        pytest.importorskip('safetensors.torch').save_file(weights, folder / file)
    return str(folder)


@pytest.mark.parametrize('file, prefix', [('model.safetensors', 'backbone.'), ('pytorch_model.bin', '')])
def test_same_function(tmp_path, file, prefix):
    method, config = open_published(write(tmp_path, file=file, prefix=prefix), 'cpu')
    x = torch.randint(V, (4, L), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = method.denoise(x, torch.ones_like(x, dtype=torch.bool)).view(4, L, V - 1)
    theirs = official_log_probs(official_weights(), x)
    assert theirs.std() > 0.5
    torch.testing.assert_close(logits.log_softmax(-1), theirs, atol=1e-4, rtol=1e-4)
    assert not method.training and method.mask_id == V - 1
    assert config == dict(method='mdlm', dataset='openwebtext', tokenizer={'kind': 'gpt2'}, wrap=True,
                          vocab_size=V - 1, block_size=L, hidden=D, num_layers=LAYERS, num_heads=HEADS,
                          cond_dim=COND, dropout=0.1, step=None)
    assert method.sample(2, steps=3).max() < V - 1


def test_every_official_weight_matters(tmp_path):
    """A weight that the mapping ignored would go unnoticed if it did not change the official function."""
    x = torch.randint(V, (2, L), generator=torch.Generator().manual_seed(1))
    everywhere = torch.ones_like(x, dtype=torch.bool)
    before = open_published(write(tmp_path), 'cpu')[0].denoise(x, everywhere)
    for name, w in official_weights().items():
        if name == 'rotary_emb.inv_freq':
            continue
        changed = open_published(write(tmp_path, official_weights() | {name: w * 1.5}), 'cpu')[0]
        assert not torch.equal(changed.denoise(x, everywhere), before), name


def test_what_is_not_an_mdlm_is_refused(tmp_path, monkeypatch):
    """With one line, to whoever opens it and by training."""
    for module in (prepare, tokens):
        monkeypatch.setattr(module, 'DATA', str(tmp_path / 'data'))
    prepare.write('ten', {'train': lambda: iter([('abcdefghij' * 40, True)])}, 'char', tail=0.5)
    folder, weights = tmp_path / 'hub', official_weights()
    folder.mkdir()
    lacking = {k: v for k, v in weights.items() if k != 'blocks.1.norm2.weight'}
    for what, *words in [
            (dict(weights=lacking), 'not an MDLM', 'blocks.1.norm2.weight'),
            (dict(weights=weights | {'y_embed.weight': torch.ones(1)}), 'not an MDLM', 'y_embed.weight'),
            (dict(time_conditioning=True), 'not an MDLM', 'time_conditioning True'),
            (dict(model_type='udlm'), 'not an MDLM', 'udlm'),
            (dict(hidden_dim=48), 'do not fit its config.json'),
            (dict(cond_dim=12), 'do not fit its config.json'),
            (dict(hidden_dim='x'), 'hidden wants an integer'),
            (dict(hidden_dim=-24), 'hidden must be at least 1')]:
        write(folder, **what)
        for open_it in (lambda: open_published(str(folder), 'cpu'), lambda: train.main([
                f'--init_from={folder}', '--dataset=ten', f'--out_dir={tmp_path}/out', '--device=cpu'])):
            with pytest.raises(UserError) as e:
                open_it()
            assert '\n' not in str(e.value) and all(word in str(e.value) for word in words), str(e.value)
    with pytest.raises(UserError, match='published weights are for mdlm, not for ar'):
        hub.load_published(str(folder), 'ar')
    os.remove(folder / 'model.safetensors')
    with pytest.raises(UserError, match='holds config.json'):
        open_published(str(folder), 'cpu')


def test_offline_is_one_line(monkeypatch, tmp_path):
    pytest.importorskip('huggingface_hub')
    import huggingface_hub.constants
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path))
    monkeypatch.setattr(hub, 'cache_only_if_offline', lambda: None)
    for name in ('kuleshov-group/mdlm-owt', 'no such/name at all'):
        with pytest.raises(UserError, match='cannot fetch .* needs a network, or a folder with '
                                            'config.json and model.safetensors') as e:
            open_published(name, 'cpu')
        assert '\n' not in str(e.value)


def test_training_goes_on_from_published_weights(tmp_path, monkeypatch, capsys):
    """Their weights and shape at step 0 (a rate of 0 shows them), our checkpoint afterwards.

    Another vocabulary is refused.
    """
    for module in (prepare, tokens):
        monkeypatch.setattr(module, 'DATA', str(tmp_path))
    for name, text in ('ten', 'abcdefghij'), ('two', 'ab'):
        prepare.write(name, {'train': lambda text=text: iter([(text * 40, True)])}, 'char', tail=0.5)
    folder = write(tmp_path)

    def go(dataset, iters):
        train.main([f'--init_from={folder}', f'--dataset={dataset}', f'--out_dir={tmp_path}/out',
                    '--device=cpu', '--batch_size=2', '--eval_seqs=2', f'--max_iters={iters}',
                    '--learning_rate=0'])
    with pytest.raises(UserError, match='has 10 tokens and two has 2'):
        go('two', 1)
    go('ten', 1)
    ours, config = open_run(f'{tmp_path}/out', 'cpu')
    theirs = open_published(folder, 'cpu')[0].state_dict()
    assert all(torch.equal(w, ours.state_dict()[name]) for name, w in theirs.items())
    assert config['hidden'] == D and config['block_size'] == L
    (tmp_path / 'config.json').unlink()  # they are not needed any more
    go('ten', 2)
    assert 'is at step 1 of 2' in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------
# runs of our own

@pytest.mark.parametrize('name', TINY_METHODS)
def test_a_run_comes_back_from_a_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    method = helpers.make(name, 'out/a')
    sample.main(['--out_dir=out/a', '--save_hub=share', '--device=cpu'])
    assert sorted(os.listdir('share')) == ['config.json', 'model.safetensors']
    (again, config), (_, before) = open_published('share', 'cpu'), open_run('out/a', 'cpu')
    assert helpers.same(again.state_dict(), method.state_dict()) and config == {**before, **config}
    assert vars(again.config) == vars(method.config) and config['step'] == 7
    x = [m.sample(2, 2, generator=generator()) for m in (method, again)]
    assert torch.equal(*x) and sample.open_tokenizer(config).decode(x[0][0]) is not None


def test_training_starts_from_a_shared_run(tmp_path, monkeypatch, capsys):
    """With its averaged weights, as from out/OTHER; another tokenizer and half a folder are refused."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, 'open_data', helpers.open_toy)
    go('out/a', '--max_iters=2')
    share = ['--out_dir=out/a', '--device=cpu', '--save_hub=out/shared']
    sample.main(share)
    averaged = {k.removeprefix('ema.'): w for k, w in weights('out/a').items() if k.startswith('ema.')}
    go('out/b', '--init_from=out/shared', '--learning_rate=0', '--max_iters=1')
    assert all(torch.equal(w, weights('out/b')[k]) for k, w in averaged.items())
    assert 'tensors begin as out/shared left them' in capsys.readouterr().out
    for argv, words in ((['--out_dir=out/shared'], '--init_from=out/shared'),
                        ([*share[:2], '--save_hub=out/b'], 'holds a run of train.py')):
        assert words in fails(sample, monkeypatch, capsys, *argv)
    with open('out/shared/config.json', 'r+') as f:
        config = json.load(f)
        f.seek(0)
        f.truncate()
        json.dump({k: v for k, v in config.items() if k != 'dataset'}, f)
    assert 'config.json is not whole' in fails(sample, monkeypatch, capsys, '--init_from=out/shared')
    assert 'config.json is not whole' in fails(train, monkeypatch, capsys, *helpers.TINY_RUN,
                                               '--init_from=out/shared', '--out_dir=out/c')
