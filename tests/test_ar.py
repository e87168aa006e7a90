import itertools

import pytest
import torch

from lib import checkpoint
from baselines.ar import AR, Config
from mdlm import draw_tokens
from lib.noise import Noise


def make(vocab_size=5, block_size=8, seed=0, dropout=0.0):
    """A small AR whose every weight matters: the zeros that training starts from would hide mistakes."""
    torch.manual_seed(seed)
    method = AR(Config(vocab_size=vocab_size, block_size=block_size, hidden=16, num_layers=2, num_heads=2, cond_dim=8, dropout=dropout))
    with torch.no_grad():
        for p in method.parameters():
            p.normal_(std=0.3)
    return method.eval()


def logits(method, x):
    """x (b, l) -> (b, l, V): row l belongs to x_l and has seen the tokens before it."""
    return method.head(method.dit(method.embed(method.shifted(x)))).detach()


def test_probabilities_of_all_texts_sum_to_one():
    method = make(vocab_size=3, block_size=4)
    texts = torch.tensor(list(itertools.product(range(3), repeat=4)))
    nats = method.nll(texts)
    assert nats.shape == (81,) and nats.std() > 0.1
    torch.testing.assert_close((-nats.double()).exp().sum(), torch.tensor(1.0, dtype=torch.float64), atol=1e-5, rtol=0)
    parts = logits(method, texts).log_softmax(dim=-1).gather(2, texts[..., None])[..., 0]
    torch.testing.assert_close(method.token_nll(texts), -parts)


def test_shorter_texts_are_scored_as_beginnings():
    method, x = make(), torch.randint(5, (3, 8), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(method.token_nll(x[:, :5]), method.token_nll(x)[:, :5])


def test_no_position_sees_itself_or_what_follows():
    method, x = make(), torch.zeros(1, 8, dtype=torch.int64)
    before = logits(method, x)
    for i in range(8):
        changed = x.clone()
        changed[0, i] = 1
        differs = (logits(method, changed) != before).any(dim=-1)[0]
        assert not differs[:i + 1].any() and differs[i + 1:].all()


def test_loss_is_the_mean_nll_and_has_its_gradient():
    method, x = make(), torch.randint(5, (4, 8), generator=torch.Generator().manual_seed(1))
    loss, logs = method(x, Noise(0, 0, torch.arange(4), 4))
    assert loss.item() == pytest.approx(method.nll(x).mean().item() / 8, rel=1e-5) and logs['loss'] == loss
    loss.backward()
    gradients = [p.grad.clone() for p in method.parameters() if p.grad is not None]
    assert len(gradients) == len(list(method.parameters()))
    method.zero_grad()
    h = method.dit(method.embed(method.shifted(x)))
    torch.nn.functional.cross_entropy(method.head(h).flatten(0, 1), x.flatten()).backward()
    for p, g in zip(method.parameters(), gradients):
        torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-6)


def sample_without_cache(method, n, generator, x=None, **kwargs):
    x = torch.full((n, 8), method.mask_id) if x is None else x.clone()
    open_places = x == method.mask_id
    for i in range(8):
        if open_places[:, i].any():  # the whole text anew for every token; what stands to the right cannot matter
            drawn = draw_tokens(logits(method, x.where(x != method.mask_id, 0))[:, i], generator=generator, **kwargs)
            x[:, i] = torch.where(open_places[:, i], drawn, x[:, i])
    return x


@pytest.mark.parametrize('kwargs', [{}, {'temperature': 0.5}, {'top_p': 0.7}, {'temperature': 0}])
def test_the_cache_changes_nothing(kwargs):
    method, seen = make(), []
    x = method.sample(64, generator=torch.Generator().manual_seed(2), callback=lambda i, x: seen.append((i, x.clone())), **kwargs)
    assert torch.equal(x, sample_without_cache(method, 64, torch.Generator().manual_seed(2), **kwargs))
    assert x.shape == (64, 8) and x.min() >= 0 and x.max() < 5
    assert [i for i, _ in seen] == list(range(8)) and torch.equal(seen[-1][1], x) and (seen[3][1][:, 4:] == method.mask_id).all()


def test_samples_follow_the_model():
    method = make(vocab_size=3, block_size=3)
    texts = torch.tensor(list(itertools.product(range(3), repeat=3)))
    p = (-method.nll(texts)).exp()
    x = method.sample(20000, generator=torch.Generator().manual_seed(3))
    counts = torch.bincount((x * torch.tensor([9, 3, 1])).sum(dim=1), minlength=27)
    chi2 = ((counts - 20000 * p) ** 2 / (20000 * p)).sum()
    assert chi2 < 26 + 5 * 52**0.5


def test_prompts():
    method, start = make(), torch.tensor([[1, 2, 3], [4, 0, 1]])
    x = method.sample(2, x=start, generator=torch.Generator().manual_seed(4))
    padded = torch.cat((start, torch.full((2, 5), method.mask_id)), dim=1)
    assert torch.equal(x[:, :3], start)
    assert torch.equal(x, method.sample(2, x=padded, generator=torch.Generator().manual_seed(4)))
    assert torch.equal(x, sample_without_cache(method, 2, torch.Generator().manual_seed(4), padded))
    ragged = padded.clone()
    ragged[0, 1:] = method.mask_id
    x = method.sample(2, x=ragged, generator=torch.Generator().manual_seed(5))
    assert x[0, 0] == 1 and torch.equal(x[1, :3], start[1]) and (x < 5).all()
    full = torch.ones(2, 8, dtype=torch.int64)
    assert torch.equal(method.sample(2, x=full), full)
    padded[0, 0] = method.mask_id
    with pytest.raises(ValueError, match='left to right'):
        method.sample(2, x=padded)


def test_as_many_parameters_as_mdlm():
    shape = dict(vocab_size=5, block_size=8, hidden=16, num_layers=2, num_heads=2, cond_dim=8)
    ar, mdlm = (checkpoint.build({'method': name, **shape}) for name in ('ar', 'mdlm'))
    assert {k: v.shape for k, v in ar.named_parameters()} == {k: v.shape for k, v in mdlm.named_parameters()}
    assert ar.flops(8) == mdlm.flops(8)
