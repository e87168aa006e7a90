"""baselines/ar.py against enumeration of all texts, and against sampling without a cache."""
import itertools

import pytest
import torch
from helpers import generator, whole

from baselines.ar import AR, Config
from mdlm import draw_tokens
from methods import build


def tiny(vocab_size=5, block_size=8):
    """A small AR whose every weight matters: the zeros that training starts from would hide mistakes."""
    torch.manual_seed(0)
    method = AR(Config(vocab_size=vocab_size, block_size=block_size, hidden=16, num_layers=2, num_heads=2,
                       cond_dim=8))
    with torch.no_grad():
        for p in method.parameters():
            p.normal_(std=0.3)
    return method.eval()


def texts(n, seed=0):
    return torch.randint(5, (n, 8), generator=generator(seed))


def logits(method, x):
    """x (b, l) -> (b, l, V): row l belongs to x_l and has seen the tokens before it."""
    return method.head(method.dit(method.embed(method.shifted(x)))).detach()


def test_probabilities_of_all_texts_sum_to_one():
    method = tiny(vocab_size=3, block_size=4)
    all_texts = torch.tensor(list(itertools.product(range(3), repeat=4)))
    nats = method.nll(all_texts)
    assert nats.shape == (81,) and nats.std() > 0.1
    one = torch.tensor(1.0, dtype=torch.float64)
    torch.testing.assert_close((-nats.double()).exp().sum(), one, atol=1e-5, rtol=0)
    parts = logits(method, all_texts).log_softmax(dim=-1).gather(2, all_texts[..., None])[..., 0]
    torch.testing.assert_close(method.token_nll(all_texts), -parts)


def test_nll_is_exact_whatever_the_noise():
    method, x = tiny(), texts(4)
    assert torch.equal(method.nll(x), method.nll(x, whole(4, step=3)))
    torch.testing.assert_close(method.nll(x, draws=3), method.nll(x))


def test_shorter_texts_are_scored_as_beginnings():
    method, x = tiny(), texts(3)
    torch.testing.assert_close(method.token_nll(x[:, :5]), method.token_nll(x)[:, :5])


def test_no_position_sees_itself_or_what_follows():
    method, x = tiny(), torch.zeros(1, 8, dtype=torch.int64)
    before = logits(method, x)
    for i in range(8):
        changed = x.clone()
        changed[0, i] = 1
        differs = (logits(method, changed) != before).any(dim=-1)[0]
        assert not differs[:i + 1].any() and differs[i + 1:].all()


def test_loss_is_the_mean_nll_and_has_its_gradient():
    method, x = tiny(), texts(4, seed=1)
    loss, logs = method(x, whole(4))
    assert loss.item() == pytest.approx(method.nll(x).mean().item() / 8, rel=1e-5) and logs['loss'] == loss
    loss.backward()
    gradients = [p.grad.clone() for p in method.parameters() if p.grad is not None]
    assert len(gradients) == len(list(method.parameters()))
    method.zero_grad()
    h = method.dit(method.embed(method.shifted(x)))
    torch.nn.functional.cross_entropy(method.head(h).flatten(0, 1), x.flatten()).backward()
    for p, g in zip(method.parameters(), gradients):
        torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-6)


def sample_without_cache(method, n, generator, x=None, **options):
    """The whole text anew for every token; what stands to the right cannot matter."""
    x = torch.full((n, 8), method.mask_id) if x is None else x.clone()
    open_places = x == method.mask_id
    for i in range(8):
        if open_places[:, i].any():
            text = x.where(x != method.mask_id, 0)
            drawn = draw_tokens(logits(method, text)[:, i], generator=generator, **options)
            x[:, i] = torch.where(open_places[:, i], drawn, x[:, i])
    return x


@pytest.mark.parametrize('options', [{}, {'temperature': 0.5}, {'top_p': 0.7}, {'temperature': 0}])
def test_the_cache_changes_nothing(options):
    method, seen = tiny(), []
    x = method.sample(64, generator=generator(2), **options,
                      callback=lambda i, x, z: seen.append((i, x.clone())))
    assert torch.equal(x, sample_without_cache(method, 64, generator(2), **options))
    assert x.shape == (64, 8) and x.min() >= 0 and x.max() < 5
    assert [i for i, _ in seen] == list(range(8)) and torch.equal(seen[-1][1], x)
    assert (seen[3][1][:, 4:] == method.mask_id).all()


def test_samples_follow_the_model():
    method = tiny(vocab_size=3, block_size=3)
    all_texts = torch.tensor(list(itertools.product(range(3), repeat=3)))
    p = (-method.nll(all_texts)).exp()
    x = method.sample(20000, generator=generator(3))
    counts = torch.bincount((x * torch.tensor([9, 3, 1])).sum(dim=1), minlength=27)
    chi2 = ((counts - 20000 * p) ** 2 / (20000 * p)).sum()
    assert chi2 < 26 + 5 * 52**0.5


def test_prompts():
    method, start = tiny(), torch.tensor([[1, 2, 3], [4, 0, 1]])
    x = method.sample(2, x=start, generator=generator(4))
    padded = torch.cat((start, torch.full((2, 5), method.mask_id)), dim=1)
    assert torch.equal(x[:, :3], start)
    assert torch.equal(x, method.sample(2, x=padded, generator=generator(4)))
    assert torch.equal(x, sample_without_cache(method, 2, generator(4), padded))
    ragged = padded.clone()
    ragged[0, 1:] = method.mask_id
    x = method.sample(2, x=ragged, generator=generator(5))
    assert x[0, 0] == 1 and torch.equal(x[1, :3], start[1]) and (x < 5).all()
    full = torch.ones(2, 8, dtype=torch.int64)
    assert torch.equal(method.sample(2, x=full), full)
    padded[0, 0] = method.mask_id
    with pytest.raises(ValueError, match='left to right'):
        method.sample(2, x=padded)


def test_as_many_parameters_as_mdlm():
    shape = dict(vocab_size=5, block_size=8, hidden=16, num_layers=2, num_heads=2, cond_dim=8)
    ar, mdlm = (build({'method': name, **shape}) for name in ('ar', 'mdlm'))
    shapes = [{k: v.shape for k, v in method.named_parameters()} for method in (ar, mdlm)]
    assert shapes[0] == shapes[1]
    assert ar.flops(8) == mdlm.flops(8)
