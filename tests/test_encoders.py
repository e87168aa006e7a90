"""lib/encoders.py, data/encode.py, and LADD on frozen encoders: tiny models of the hub, and AR runs."""
import itertools
import json
import math
import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import disk_full, files, generator, scrambled, spy, whole

import methods
import sample
import train
from data import encode
from eval import main as evaluate
from lib import prepare as preparing
from lib import tokens as token_files
from lib.checkpoint import fingerprint, save
from lib.configurator import UserError, configure
from lib.encoders import check_tokenizer, pool
from lib.teacher import hub_teacher
from lib.tokens import Tokens, WithLatents, load_tokenizer, named_tokenizer
from methods import METHODS, attach_encoder, build, open_encoder, open_run

WORDS = '[UNK] [CLS] [SEP] The quick brown fox; times! No? to be or not that is'.split()
TEXT = 'to be or not to be that is The brown fox; ' * 30
L, WIDTH = 8, 16
SMALL = dict(hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24,
             max_position_embeddings=20)
HUB = 'bert', 'qwen3', 'gpt2'


@pytest.fixture(autouse=True)
def sandbox(tmp_path, monkeypatch):
    """A folder of our own, no network, and SIGTERM's handler as it was."""
    for module in (preparing, token_files):
        monkeypatch.setattr(module, 'DATA', str(tmp_path / 'data'))
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def tokenizer(path, words, around):
    """A folder with a word tokenizer: [CLS] text [SEP] (BERT), or text [SEP] (a decoder with EOS)."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    ids = {w: i for i, w in enumerate(words)}
    tok = Tokenizer(models.WordLevel(ids, unk_token='[UNK]'))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok.post_processor = processors.TemplateProcessing(
        single=around, special_tokens=[('[CLS]', ids['[CLS]']), ('[SEP]', ids['[SEP]'])])
    PreTrainedTokenizerFast(tokenizer_object=tok, unk_token='[UNK]', eos_token='[SEP]').save_pretrained(path)


def hub(kind, words=WORDS):
    """The folder of a tiny random model with its tokenizer."""
    import transformers
    torch.manual_seed(0)
    size = dict(vocab_size=len(words), **SMALL)
    if kind == 'bert':
        model = transformers.BertModel(transformers.BertConfig(**size))
    elif kind in ('roberta', 'mpnet'):
        name = {'roberta': 'Roberta', 'mpnet': 'MPNet'}[kind]
        model = getattr(transformers, f'{name}ForMaskedLM')(getattr(transformers, f'{name}Config')(**size))
    elif kind == 't5':
        model = transformers.T5EncoderModel(transformers.T5Config(
            vocab_size=len(words), d_model=WIDTH, d_kv=8, d_ff=24, num_layers=3, num_heads=2))
    elif kind == 'bart':
        model = transformers.BartModel(transformers.BartConfig(
            vocab_size=len(words), d_model=WIDTH, max_position_embeddings=20, **{
                f'{half}_{key}': n for half in ('encoder', 'decoder') for key, n in
                (('layers', 3), ('attention_heads', 2), ('ffn_dim', 24))}))
    elif kind == 'qwen3':
        model = transformers.Qwen3Model(transformers.Qwen3Config(num_key_value_heads=1, head_dim=8, **size))
    else:
        model = transformers.GPT2Model(transformers.GPT2Config(
            vocab_size=len(words), n_embd=WIDTH, n_layer=3, n_head=2, n_positions=20))
    folder = os.path.join('hub', kind)
    model.save_pretrained(folder)
    tokenizer(folder, words, '[CLS] $A [SEP]' if kind == 'bert' else '$A [SEP]')
    return folder


def ours(out_dir='out/ar', **changes):
    """The checkpoint of a small random AR model for the data of `prepare('char')`."""
    data = Tokens('toy', 'train', L)
    config = dict(method='ar', vocab_size=data.vocab_size, block_size=L, hidden=WIDTH, num_layers=3,
                  num_heads=2, cond_dim=8, dataset='toy', tokenizer=data.tokenizer, wrap=False) | changes
    method = scrambled(build(config))
    save(f'{out_dir}/ckpt.pt', {'config': config, 'model': method.state_dict(), 'ema': {}, 'step': 7})
    return out_dir


def prepare(tok='char', name='toy', text=TEXT):
    preparing.write(name, {'train': lambda: iter([(text, True)])}, tok, tail=0.3)
    return name


def either(kind):
    """The name of an encoder of that kind, and data `toy` for it."""
    if kind == 'ours':
        prepare()
        return ours()
    prepare(hub(kind))
    return f'hub/{kind}'


def make(name, latent='continuous', seed=0, attached=True, **kwargs):
    """A small LADD on the encoder of that name."""
    data = Tokens('toy', 'train', L)
    config = dict(method='ladd', encoder=name, latent=latent, vocab_size=data.vocab_size, block_size=L,
                  hidden=16, num_layers=1, num_heads=2, cond_dim=8, num_latents=3, latent_dim=4,
                  codebook_size=5, latent_schedule='linear' if latent == 'discrete' else 'vp_sqrt')
    model = scrambled(build({**config, **kwargs}), seed)
    if attached:
        attach_encoder(model, data, 'cpu')
    return model


def some(n=6):
    return Tokens('toy', 'train', L).rows(range(n))[0]


# ------------------------------------------------------------------------------------------------------------
# encoders

@pytest.mark.parametrize('L', range(1, 13))
def test_pooling_is_its_plain_loop(L):
    states = torch.randn(2, L, 3, generator=generator()).double()
    summary = torch.randn(2, 3, generator=generator(1)).double()
    for M in range(1, L + 1):
        z = pool(states, summary, M)
        assert z.shape == (2, M, 3)
        for b in range(2):
            if M == L:
                assert torch.equal(z[b], states[b])
                continue
            at, sizes = 0, []
            for i in range(M - 1):
                size = L // (M - 1) + (i < L % (M - 1))
                total = torch.zeros(3).double()
                for l in range(at, at + size):
                    total = total + states[b, l]
                torch.testing.assert_close(z[b, i], total / size)
                at, sizes = at + size, sizes + [size]
            assert not sizes or at == L and max(sizes) - min(sizes) <= 1
            assert torch.equal(z[b, -1], summary[b])


@pytest.mark.parametrize('kind', HUB)
@pytest.mark.parametrize('layer', [-1, -2, 0, 3])
def test_hub_states_are_those_of_a_plain_call(kind, layer):
    import transformers
    encoder = open_encoder(hub(kind), 'cpu')
    x = torch.randint(3, len(WORDS), (4, L), generator=generator())
    states, summary = encoder(x, layer=layer)
    before, after = torch.full((4, 1), 1), torch.full((4, 1), 2)
    whole_text = torch.cat((before, x, after) if kind == 'bert' else (x, after), dim=1)
    plain = transformers.AutoModel.from_pretrained(f'hub/{kind}').eval()
    with torch.no_grad():
        h = plain(input_ids=whole_text, output_hidden_states=True).hidden_states[layer]
    assert states.shape == (4, L, WIDTH) and summary.shape == (4, WIDTH)
    assert encoder.width == WIDTH and encoder.num_layers == 3
    torch.testing.assert_close(states, h[:, 1:-1] if kind == 'bert' else h[:, :-1])
    torch.testing.assert_close(summary, h[:, -1])


@pytest.mark.parametrize('kind, longest', [('roberta', 17), ('mpnet', 17), ('t5', math.inf), ('bart', 19)])
def test_encoders_that_count_positions_otherwise_or_have_a_decoder(kind, longest):
    """Their states over the longest text that they read; of T5 and BART, those of the encoder."""
    import transformers
    encoder = open_encoder(hub(kind), 'cpu')
    assert encoder.max_tokens == longest and encoder.width == WIDTH and encoder.num_layers == 3
    n = min(longest, 40)
    x = torch.randint(3, len(WORDS), (2, n), generator=generator())
    states, summary = encoder(x, layer=-2)
    plain, after = transformers.AutoModel.from_pretrained(f'hub/{kind}').eval(), torch.full((2, 1), 2)
    # RoBERTa: position 0 is the row behind that of padding_idx = 1
    places = dict(position_ids=torch.arange(2, n + 3)[None]) if kind in ('roberta', 'mpnet') else {}
    with torch.no_grad():
        h = getattr(plain, 'encoder' if kind in ('t5', 'bart') else 'forward')(
            input_ids=torch.cat((x, after), dim=1), output_hidden_states=True, **places).hidden_states[-2]
    torch.testing.assert_close(states, h[:, :-1])
    torch.testing.assert_close(summary, h[:, -1])
    # what the checkpoint lacks and we do not need (a pooler, a decoder) is not a part of its identity
    assert fingerprint(encoder.model) == fingerprint(open_encoder(f'hub/{kind}', 'cpu').model)


def test_what_is_no_encoder_of_text_is_one_line():
    import transformers
    transformers.ViTModel(transformers.ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=4,
        patch_size=2)).save_pretrained('hub/vit')
    tokenizer('hub/vit', WORDS, '$A [SEP]')
    with open(f'{hub("bert")}/config.json', 'r+') as f:  # one layer more than there are weights
        text = f.read().replace('"num_hidden_layers": 3', '"num_hidden_layers": 4')
        f.seek(0)
        f.write(text)
    for name, words in (('hub/vit', 'does not give one state per token'),
                        ('hub/bert', 'lacks weights .*layer.3')):
        with pytest.raises(UserError, match=words) as e:
            open_encoder(name, 'cpu')
        assert '\n' not in str(e.value)
    prepare(folder := hub('qwen3'))
    tokenizer(folder, [*WORDS, 'more'], '$A [SEP]')
    prepare(folder)
    with pytest.raises(UserError, match=f'for {len(WORDS)} tokens, and the data has {len(WORDS) + 1}'):
        check_tokenizer(open_encoder(folder, 'cpu'), Tokens('toy', 'train', L))


def test_a_teacher_reads_from_left_to_right():
    """Not one that looks ahead or lacks its head: its Gen PPL would be that of a guess."""
    import transformers
    prepare()
    ours = load_tokenizer(Tokens('toy', 'train', L).tokenizer)
    for kind, words in (('bert', 'lacks weights that the teacher needs'), ('bart', 'lacks weights'),
                        ('roberta', 'no causal language model'), ('t5', 'cannot load the teacher')):
        with pytest.raises(UserError, match=words) as e:
            hub_teacher(hub(kind), ours, 'cpu')
        assert '\n' not in str(e.value)
    config = transformers.RobertaConfig(vocab_size=len(WORDS), is_decoder=True, **SMALL)
    transformers.RobertaForCausalLM(config).save_pretrained('hub/roberta')
    teacher = hub_teacher('hub/roberta', ours, 'cpu')
    assert teacher.window == 18 and teacher.gen_ppl(some(6).repeat(1, 9))[0] > 1


def test_our_states_are_those_of_a_second_forward_pass():
    prepare()
    encoder, x = open_encoder(ours(), 'cpu'), some()
    model = encoder.model
    assert encoder.num_layers == 3
    xs = [model.embed(torch.cat((torch.full((6, 1), model.mask_id), x), dim=1))]
    hidden, cs, dit = [xs[0]], [model.dit.time[0](torch.zeros(1))], model.dit
    with torch.no_grad():
        for block in dit.blocks:
            xs = block(xs, cs, dit.cos[:L + 1], dit.sin[:L + 1])
            hidden.append(xs[0])
        hidden[-1] = dit(hidden[0])  # the output has the last norm
    for layer in (-1, -2, -3, -4, 0, 1, 2, 3):
        states, summary = encoder(x, layer=layer)
        torch.testing.assert_close(states, hidden[layer][:, 1:])
        assert torch.equal(summary, states[:, -1])
    changed = x.clone()
    changed[:, 5] = (x[:, 5] + 1) % encoder.num_ids
    same = (encoder(changed)[0] == encoder(x)[0]).all(dim=2).all(dim=0)
    assert same.tolist() == [True] * 5 + [False] * 3  # a state has read its own token, and none after it


@pytest.mark.parametrize('kind', [*HUB, 'ours'])
def test_only_blanked_positions_are_zero_at_the_input(kind):
    """Also as LADD calls it: nothing but masked positions is ever blanked, and about .45 of those are."""
    name = either(kind)
    model = make(name, encoder_dropout=True)
    encoder = model.encoder.pretrained
    inner, seen = (encoder.model.dit if kind == 'ours' else encoder.model), []
    inner.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs.get('inputs_embeds', *args)), with_kwargs=True)
    masks = spy(model, 'corrupt')
    with torch.no_grad():
        model.encode(some(20))
        plain = seen.pop()
        for step in range(30):
            model(some(20), whole(20, step=step))
    first = 0 if kind in ('qwen3', 'gpt2') else 1
    zero = torch.stack([(e == 0).all(dim=2) for e in seen])
    other = torch.stack([(e != plain).any(dim=2) for e in seen])
    assert torch.equal(zero, other)  # what is not zero is as it was
    mask = torch.stack([m for _, (_, m) in masks])
    inside = zero[:, :, first:first + L]
    assert zero.sum() == inside.sum() and not (inside & ~mask).any()
    assert 0.35 < inside.sum() / mask.sum() < 0.55


def test_a_run_opens_its_encoder_once(monkeypatch):
    """And the method never does by itself."""
    name, opened = either('ours'), []
    monkeypatch.setattr(methods, 'open_encoder', lambda *args: opened.append(args) or open_encoder(*args))
    go('a', f'--encoder={name}', '--max_iters=3')
    assert opened == [(name, torch.device('cpu'))]


def test_what_cannot_be_opened():
    prepare()
    ours('out/other', method='mdlm')
    for name, words in (('nowhere/to-be-found', 'cannot load the encoder'), ('out/missing', 'train.py'),
                        ('out/other', 'is MDLM; it has to be AR')):
        with pytest.raises(UserError, match=words) as e:
            open_encoder(name, 'cpu')
        assert '\n' not in str(e.value)


@pytest.mark.parametrize('kind', ['qwen3', 'ours'])
def test_latents_are_pooled_cut_and_of_length_one(kind):
    name = either(kind)
    states, summary = open_encoder(name, 'cpu')(some())
    for M in (1, 3, L):
        expected = F.normalize(pool(states, summary, M)[..., :4], dim=-1)
        for latent in ('continuous', 'discrete'):
            torch.testing.assert_close(make(name, latent, num_latents=M).encode(some()), expected)
    torch.testing.assert_close(make(name, unit_norm=False).encode(some()), pool(states, summary, 3)[..., :4])


@pytest.mark.parametrize('kind', ['bert', 'ours'])
@pytest.mark.parametrize('latent', ['continuous', 'discrete'])
def test_the_encoder_is_nobodys_parameter(kind, latent):
    """No entry in the state dict, no gradient, eval mode whatever becomes of the method: in both stages."""
    name = either(kind)
    model = make(name, latent, stage1_iters=2 if latent == 'discrete' else 0, dropout=0.1,
                 encoder_dropout=latent == 'continuous')
    encoder = model.encoder.pretrained
    before = fingerprint(encoder.model)
    assert not any('encoder' in key for key in model.state_dict()) and not list(model.encoder.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(4):
        noise = whole(6, step=step)
        model.train()
        model.begin_step(step, noise, lambda n: (some(20),))
        model(some(), noise)[0].backward()
        optimizer.step()
        model.end_step(torch.tensor(True), noise)
        assert not any(m.training for m in encoder.model.modules())
    assert all(p.grad is None and not p.requires_grad for p in encoder.model.parameters())
    assert fingerprint(encoder.model) == before == attach_encoder(model, Tokens('toy', 'train', L), 'cpu')
    assert torch.equal(model.encode(some()), model.encode(some()))  # no dropout


def test_what_a_frozen_encoder_cannot_do():
    name = either('ours')
    for wrong, words in (
            (dict(stage1_iters=5), 'stage1_iters=0'), (dict(num_latents=L + 1), 'num_latents=9'),
            (dict(stored_latents=True, encoder_dropout=True), 'encoder_dropout=False'),
            (dict(latent='discrete', latent_schedule='linear', vq_start=3, stage1_iters=3), 'vq_start=3'),
            (dict(latent_dim=17), 'latent_dim=17')):
        with pytest.raises(UserError, match=words) as e:
            make(name, **wrong)
        assert '\n' not in str(e.value)
    with pytest.raises(UserError, match="stored_latents=True has no effect with encoder=''"):
        configure(train.Config, ['--method=ladd', '--stored_latents=True'], METHODS)
    make(name, 'discrete', stage1_iters=5, vq_start=3)
    # a learned one has no such limits, and stored latents need no encoder
    assert make('', latent_dim=17, attached=False).encoder_name == ''
    assert make('out/missing', stored_latents=True, attached=False).stored_latents


@pytest.mark.parametrize('latent', ['continuous', 'discrete'])
def test_a_compiled_step_is_the_same_step(latent):
    """The encoder runs outside of what is compiled; the rest is compiled around it."""
    model = make(either('ours'), latent, encoder_dropout=latent == 'continuous')
    expected, _ = model(some(), whole(6))
    expected.backward()
    grad = model.z_in.weight.grad.clone()
    model.zero_grad()
    model.compile(backend='aot_eager')
    loss, _ = model(some(), whole(6))
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(model.z_in.weight.grad, grad)


def test_sequential_writes_what_a_given_latent_says():
    """A toy like sawtooth: eight shifts of a wave. A latent names the shift; given by hand, it is obeyed."""
    shifts, n, steps = 8, 32, 300
    waves = torch.tensor([[int((l + s) % 8 < 4) for l in range(8)] for s in range(shifts)])
    names = 4 * torch.eye(shifts)[:, None]  # (8, M = 1, D = 8)
    torch.manual_seed(0)
    model = build(dict(method='ladd', encoder='never opened', vocab_size=2, block_size=8, hidden=32,
                       num_layers=1, num_heads=2, cond_dim=8, num_latents=1, latent_dim=8, unit_norm=False,
                       lambda_z=0.0, times='independent', weighting='constant', p_start=0.5))
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(steps):
        s = (whole(n, step=step).uniform('shift') * shifts).long()
        model(waves[s], whole(n, step=step), z_0=names[s])[0].backward()
        optimizer.param_groups[0]['lr'] = 1e-2 * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    s, moves, calls = torch.arange(shifts).repeat(8), spy(model.channel, 'step'), spy(model, 'hidden_states')
    x = model.sample(64, 4, 'seq', z_0=names[s], generator=generator())
    # it arrives as it was given
    assert calls and not moves and all((z_t.sum(dim=(1, 2)) == 4).all() for (_, z_t, _), _ in calls)
    assert (x == waves[s]).all(dim=1).float().mean() > 0.9
    with pytest.raises(ValueError, match='strategy=seq'):
        model.sample(64, 4, 'joint', z_0=names[s])


# ------------------------------------------------------------------------------------------------------------
# training: checkpoints, resume, stored latents

TINY = ['--method=ladd', '--dataset=toy', f'--block_size={L}', '--hidden=16', '--num_layers=1',
        '--num_heads=2', '--cond_dim=8', '--num_latents=3', '--latent_dim=4', '--dtype=float32',
        '--batch_size=4', '--learning_rate=3e-3', '--log_interval=1', '--eval_seqs=4', '--device=cpu']
CO = ['--encoder_dropout=True', '--p_drop=.15']
DI = ['--latent=discrete', '--latent_schedule=linear', '--codebook_size=5', '--times=independent',
      '--stage1_iters=3', '--dropout=.1']


def go(out_dir, *args):
    """Trains -> [(step, loss, grad_norm)], and what validation said."""
    train.main([*TINY, f'--out_dir={out_dir}', *args])
    with open(f'{out_dir}/log.jsonl') as f:
        records = [json.loads(line) for line in f]
    losses = [(r['step'], r['loss'], r['grad_norm']) for r in records if 'loss' in r]
    return losses, [r['val_loss'] for r in records if 'val_loss' in r][-1:]


@pytest.mark.parametrize('method', ['co', 'di', 'di stored'])
def test_save_and_resume_give_the_same_losses(method):
    name = either('ours')
    args = [f'--encoder={name}', *(CO if method == 'co' else DI)]
    if method == 'di stored':
        encode.main(TINY + args)
        args.append('--stored_latents=True')
    whole_run = go('a', *args, '--max_iters=6')
    go('b', *args, '--max_iters=2')
    assert go('b', *args, '--max_iters=6') == whole_run
    for changed in ('--num_latents=2', '--encoder=out/another'):
        ours('out/another', num_layers=2)
        with pytest.raises(UserError, match=f'not .*{changed[2:]}'):
            go('b', *[a for a in args if 'stored' not in a], changed, '--max_iters=7')


@pytest.mark.parametrize('stored', [False, True])
def test_an_encoder_is_known_by_its_weights(stored):
    """Under the name of one with other weights neither training nor evaluation goes on."""
    args = [f'--encoder={either("ours")}', *DI, *['--stored_latents=True'] * stored]

    def store():
        if stored:
            encode.main([*TINY, *args[:1]])
    store()
    go('out/a', *args, '--max_iters=1')
    evaluation = ['--out_dir=out/a', '--batch_size=4', '--val_seqs=4', '--device=cpu']
    evaluate(evaluation)
    ours(num_layers=2)
    store()
    with pytest.raises(UserError, match='encoder_weights='):
        go('out/a', *args, '--max_iters=2')
    with pytest.raises(UserError, match='has other weights than the encoder'):
        evaluate(evaluation)


def test_a_run_finds_encoder_and_tokenizer_on_another_machine():
    """The tokenizer is in the run, the encoder beside it or where a key says; another one is refused."""
    prepare(name := hub('bert'))
    args = [*DI, '--max_iters=1']
    go('out/a', f'--encoder={name}', *args)
    os.mkdir('there')
    shutil.move('out', 'there/out')
    shutil.move('hub', 'there/hub')
    method, config = open_run('there/out/a', 'cpu')
    assert method.encoder_name == 'there/hub/bert'
    assert sample.open_tokenizer(config).decode([*range(8, 12)]) == ' '.join(WORDS[8:12])
    evaluation = ['--out_dir=there/out/a', '--batch_size=4', '--val_seqs=4', '--device=cpu']
    evaluate(evaluation)
    shutil.move('there/hub', 'moved')
    with pytest.raises(UserError, match='if hub/bert lies elsewhere now: --encoder=FOLDER'):
        evaluate(evaluation)
    evaluate([*evaluation, '--encoder=moved/bert'])
    go('there/out/a', '--encoder=moved/bert', *args[:-1], '--max_iters=2')
    with pytest.raises(UserError, match='no effect'):
        evaluate([*evaluation, '--metrics=entropy', '--encoder=moved/bert'])
    draw = ['--out_dir=there/out/a', '--num_samples=1', '--steps=2', '--device=cpu', '--encoder=moved/bert']
    sample.main([*draw, '--strategy=seq', '--latent=data'])
    with pytest.raises(UserError, match='no effect'):
        sample.main(draw)
    with open(f'{hub("bert")}/model.safetensors', 'r+b') as f:  # the last byte is one of a weight
        f.seek(-2, 2)
        f.write(b'\1')
    with pytest.raises(UserError, match='has other weights'):
        evaluate([*evaluation, '--encoder=hub/bert'])
    with pytest.raises(UserError, match='encoder_weights='):
        go('there/out/a', '--encoder=hub/bert', *args[:-1], '--max_iters=3')


def test_a_tokenizer_in_a_folder_is_stored_whole():
    tokenizer('a', WORDS, '$A [SEP]')
    shutil.copytree('a', 'elsewhere/b')
    tokens = named_tokenizer('a')
    assert tokens.spec == named_tokenizer('elsewhere/b').spec  # wherever it lies
    old = {'kind': 'huggingface', 'name': os.path.abspath('a')}  # as runs of the first edition have it
    assert load_tokenizer(old).spec == old
    spec, ids = json.loads(json.dumps(tokens.spec)), tokens.encode('to be [SEP] or')
    shutil.rmtree('a')
    stored = load_tokenizer(spec, len(WORDS))
    assert stored.encode('to be [SEP] or') == ids and stored.decode(ids) == tokens.decode(ids)
    assert (stored.eos_id, stored.bos_id) == (tokens.eos_id, tokens.bos_id) == (2, 2) and stored.spec == spec
    with pytest.raises(UserError, match='no such folder here'):
        load_tokenizer(old)
    with pytest.raises(UserError, match='the stored one is damaged'):
        load_tokenizer({**spec, 'json': '{'})


def test_both_strategies_from_one_checkpoint_without_the_encoder():
    name = either('bert')
    go('out/di', f'--encoder={name}', *DI, '--max_iters=5')
    with open('out/di/log.jsonl') as f:
        record = json.loads(f.readline())
    assert 1 <= record['code_perplexity'] <= 5 and 0 <= record['code_usage'] <= 1
    shutil.rmtree(name)
    method, _ = open_run('out/di', 'cpu')
    for strategy, options in (('joint', {}), ('seq', {'latent_steps': 2})):
        x = method.sample(5, 3, strategy, generator=generator(), **options)
        assert x.shape == (5, L) and x.max() < method.config.vocab_size
    with pytest.raises(UserError, match='cannot load the encoder'):
        attach_encoder(method, Tokens('toy', 'train', L), 'cpu')


def test_the_run_refuses_another_tokenizer_before_it_writes():
    prepare('char')
    name = hub('bert')
    with pytest.raises(UserError, match='different tokenizers'):
        go('a', f'--encoder={name}')
    assert not os.path.exists('a')


@pytest.mark.parametrize('kind', ['qwen3', 'ours'])
@pytest.mark.parametrize('latent', ['continuous', 'discrete'])
def test_stored_latents_are_those_made_on_the_fly(kind, latent):
    name = either(kind)
    assert encode.main([*TINY, f'--encoder={name}']) is None
    model = make(name, latent).eval()
    for split in ('train', 'val'):
        tokens = Tokens('toy', split, L)
        stored = WithLatents(tokens, name, 3, 4)
        x, z_0 = stored.rows(range(len(tokens)))
        assert len(stored) == len(tokens) and torch.equal(x, *tokens.rows(range(len(tokens))))
        assert z_0.dtype == torch.float32
        assert torch.equal(z_0, model.encoder(x).to(torch.bfloat16).float())  # rounded, and nothing else
        noise = whole(len(x))
        torch.testing.assert_close(model.encode(x, stored=z_0), model.encode(x), rtol=0, atol=2**-7)
        near = dict(rtol=0.02, atol=0.02)
        if latent == 'discrete':
            e, codebook = model.encode(x), model.quantizer.codebook
            top = (e @ codebook.T).topk(2, dim=-1).values
            clear = (top[..., 0] - top[..., 1] > 0.02).all(dim=1)  # bfloat16 may decide a tie otherwise
            x, z_0, noise = x[clear], z_0[clear], noise[clear]
            nearest = model.quantizer.nearest
            assert len(x) > 3 and torch.equal(nearest(model.encode(x, stored=z_0)), nearest(model.encode(x)))
        torch.testing.assert_close(model(x, noise, z_0)[0], model(x, noise)[0], **near)
        torch.testing.assert_close(model.nll(x, noise, z_0=z_0), model.nll(x, noise), **near)


def test_batches_of_chunks_with_their_latents():
    """Any chunk, each with its own latent, a pure function of (seed, step, row)."""
    name = either('ours')
    encode.main([*TINY, f'--encoder={name}'])
    tokens = Tokens('toy', 'train', L)
    stored, everything = WithLatents(tokens, name, 3, 4), dict()
    for x, z in zip(*stored.rows(range(len(tokens)))):
        everything.setdefault(tuple(x.tolist()), []).append(z)
    x, z_0 = stored.batch(1, 2, torch.arange(100))
    assert x.shape == (100, L) and z_0.shape == (100, 3, 4)
    for ids, z in zip(x, z_0):
        assert any(torch.equal(z, other) for other in everything[tuple(ids.tolist())])
    assert len({tuple(ids.tolist()) for ids in x}) == len(everything)
    for a, b in zip(stored.batch(1, 2, torch.tensor([7, 3])), (x[[7, 3]], z_0[[7, 3]])):
        assert torch.equal(a, b)
    assert not torch.equal(stored.batch(1, 3, torch.arange(100))[0], x)
    with pytest.raises(IndexError):
        stored.rows([len(stored)])


@pytest.mark.parametrize('args', [['--encoder_dropout=False'], [*DI]], ids=['co', 'di'])
def test_training_on_stored_latents_never_opens_the_encoder(args, monkeypatch):
    """In both stages, for k-means and for validation; micro-batches take their latents along."""
    name = either('ours')
    args = [f'--encoder={name}', *args, '--max_iters=5', '--dropout=0']
    encode.main(TINY + args)
    shutil.rmtree(name)
    monkeypatch.setattr(methods, 'open_encoder', lambda *_: pytest.fail('it was opened'))
    one, val = go('a', *args, '--stored_latents=True')
    two, _ = go('b', *args, '--stored_latents=True', '--micro_batch=2')
    torch.testing.assert_close(torch.tensor(one), torch.tensor(two), rtol=1e-3, atol=1e-4)
    assert len(one) == 5 and len(val) == 1


def test_what_was_stored_of_something_else_is_refused():
    """One line, with the command that makes what is wanted, and that command works."""
    name = either('ours')
    tokens = Tokens('toy', 'train', L)

    def fails(words, *changes):
        with pytest.raises(UserError, match=words) as e:
            go('a', f'--encoder={name}', '--stored_latents=True', '--max_iters=1', *changes)
        assert '\n' not in str(e.value) and not os.path.exists('a')
        return str(e.value)
    message = fails('no stored latents')
    encode.main(message.partition('python data/encode.py ')[2].split() + ['--device=cpu', '--dtype=float32'])
    folder, meta = token_files.latents_folder(tokens, name, 3, 4)
    go('fine', f'--encoder={name}', '--stored_latents=True', '--max_iters=1')
    fails('no stored latents', '--num_latents=4'), fails('no stored latents', '--latent_dim=5')
    fails('no stored latents', '--block_size=4')

    def with_meta(text):
        with open(f'{folder}/meta.json', 'w') as f:
            f.write(text)
    for key, value in (('encoder', 'elsewhere/ar'), ('block_size', 9),
                       ('train', {'chunks': len(tokens), 'tokens_sha256': '0'})):
        with_meta(json.dumps({**meta, key: value}))
        assert 'data/encode.py' in fails(f'{key} changed')
    with_meta('{')
    assert 'data/encode.py' in fails('damaged')
    with_meta(json.dumps(meta))
    with open(f'{folder}/val.bin', 'ab') as f:
        f.write(b'x')
    assert 'data/encode.py' in fails('val.bin has')
    prepare(text=TEXT + 'to be ')  # other tokens: the folder is still there
    assert 'data/encode.py' in fails('train, val changed|train changed|val changed')


def test_encoding_is_all_or_nothing(monkeypatch, capsys):
    name = either('ours')
    args = [*TINY, f'--encoder={name}']
    folder, _ = token_files.latents_folder(Tokens('toy', 'train', L), name, 3, 4)
    rows, calls = Tokens.rows, itertools.count()

    def interrupted(self, indices):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return rows(self, indices)
    monkeypatch.setattr(Tokens, 'rows', interrupted)
    with pytest.raises(KeyboardInterrupt):
        encode.main(args)
    assert os.listdir(folder) == []
    monkeypatch.setattr(Tokens, 'rows', rows)
    encode.main(args)
    assert sorted(os.listdir(folder)) == ['meta.json', 'train.bin', 'val.bin']
    first = [open(f'{folder}/{f}', 'rb').read() for f in ('train.bin', 'val.bin')]
    before = os.stat(f'{folder}/train.bin').st_ino
    capsys.readouterr()
    encode.main(args)
    assert 'there already' in capsys.readouterr().out and os.stat(f'{folder}/train.bin').st_ino == before
    before = files(folder)
    os.truncate(f'{folder}/val.bin', 10)
    encode.main(args)
    assert files(folder) == before  # made again
    ours(hidden=32)  # another encoder under the old name
    with disk_full(20), pytest.raises(UserError, match='cannot write .*latents'):
        encode.main(args)
    assert files(folder) == before
    encode.main(args)
    assert first != [open(f'{folder}/{f}', 'rb').read() for f in ('train.bin', 'val.bin')]
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: SimpleNamespace(free=3))
    ours()
    for wrong, words in ((args, 'disk has'), ([*args, '--micro_batch=-1'], 'micro_batch must be at least 0'),
                         ([*TINY], '--encoder=NAME'),
                         ([*TINY[1:], '--method=mdlm'], 'unknown key|--method=ladd')):
        with pytest.raises(UserError, match=words):
            encode.main(wrong)


def test_only_a_summary_costs_an_eos():
    """GPT-2's tokenizer adds nothing. For LADD's summary we add EOS, so 20 places hold 19 tokens.

    LDLM reads all 20, and the first states are the same.
    """
    prepare(folder := hub('gpt2'))
    tokenizer(folder, WORDS, '$A')
    encoder = open_encoder(folder, 'cpu')
    check_tokenizer(encoder, Tokens('toy', 'train', 19))
    with pytest.raises(UserError, match='at most 19'):
        check_tokenizer(encoder, Tokens('toy', 'train', 20))
    check_tokenizer(encoder, Tokens('toy', 'train', 20), summary=False)
    x, = Tokens('toy', 'train', 20).rows([0])
    states, _ = encoder(x, summary=False)
    closed, summary = encoder(x[:, :19])
    torch.testing.assert_close(states[:, :19], closed)
    eos = torch.full((1, 1), WORDS.index('[SEP]'))
    expected = encoder.model(torch.cat((x[:, :19], eos), dim=1)).last_hidden_state[:, -1]
    torch.testing.assert_close(summary, expected)
