"""baselines/duo_distilled.py against Gaussian paths, autograd, and enumeration of all texts.

Statistical bounds are 4.5 standard errors, and the seeds are fixed.
"""
import itertools
import os

import pytest
import torch
from helpers import close, generator, go, make, open_toy, spy, toy_teacher, weights, whole

import train
from baselines.duo import gamma_range
from baselines.duo_distilled import kl_
from baselines.flm import identified, mean_at
from lib.configurator import UserError


def test_the_range_is_the_published_one():
    """gamma from -4 to -1 for gpt2's words."""
    torch.testing.assert_close(make('duo_distilled').gamma, gamma_range(10, (0.9987, 0.0062)))
    published = gamma_range(50257, (0.9987, 0.0062))
    torch.testing.assert_close(published, torch.tensor([-4.0, -1.0]), rtol=0, atol=0.02)


@pytest.mark.parametrize('V', [2, 7])
def test_a_path_of_normals(V):
    """The argmax changes to x only, as often as the header says."""
    n, alphas = 100_000, torch.tensor([0.3, 0.6])
    eps, hot = torch.randn(n, V, generator=generator()), torch.eye(V)[0]
    x_t, x_s = ((m * hot + eps).argmax(dim=1) for m in mean_at(alphas, V))
    assert ((x_s == 0) | (x_s == x_t)).all()
    assert close((x_t == 0).double(), 0.3 + 0.7 / V) and close((x_s == 0).double(), 0.6 + 0.4 / V)
    assert close((x_s == 0)[x_t != 0].double(), 0.3 / 0.7)


def ends(method, a_s, a_t):
    """Every text is at t = 1 and s = 0, which have these alphas."""
    method.gamma = -2 * mean_at(torch.tensor([a_s, a_t]), method.config.vocab_size).log().float()
    method.gap.fill_(1)


def test_what_teacher_and_student_see():
    method, x = make('duo_distilled').train(), torch.randint(10, (4000, 12), generator=generator())
    ends(method, 0.6, 0.3)
    seen, seen_by_teacher = spy(method.embed, 'forward'), spy(method.teacher.embed, 'forward')
    method(x, whole(4000))
    x_t, x_s = seen[0][0][0], seen_by_teacher[0][0][0]
    assert close((x_t == x).double().flatten(), 0.3 + 0.7 / 10)
    assert ((x_s == x) | (x_s == x_t)).all() and (x_s == x)[x_t == x].all()
    assert close((x_s == x)[x_t != x].double(), 0.3 / 0.7)


def test_times():
    """Those of the student are from the gap to 1, the teacher's from 0; the networks are told 1 - alpha."""
    method, x = make('duo_distilled').train(), torch.zeros(8, 12).long()
    told, told_to_teacher = spy(method, 'states'), spy(method.teacher, 'states')
    for gap in (0.2, 0.5):
        method.gap.fill_(gap)
        method(x, whole(8))
        t = (whole(8).times('t') + gap).clamp(max=1)
        assert (t == 1).any()
        for time, (_, b), in ((t, told[-1][0]), (t - gap, told_to_teacher[-1][0])):
            m = torch.exp(-torch.lerp(*method.gamma, time) / 2)
            torch.testing.assert_close(1 - b, identified(m, 10)[0].float())


def test_the_divergence_and_its_gradient(monkeypatch):
    monkeypatch.setattr(torch.Tensor, 'float', lambda self: self)  # in double precision
    g = generator()
    logits, h = torch.randn(20, 5, generator=g).double(), torch.randn(20, 3, generator=g).double()
    head = torch.nn.Linear(3, 5).double()
    p, q = torch.distributions.Categorical(logits=logits.requires_grad_()), \
        torch.distributions.Categorical(logits=head(h))
    expected = torch.distributions.kl_divergence(p, q)
    slope, = torch.autograd.grad(expected.sum(), logits)
    changed = logits.detach().clone()
    torch.testing.assert_close(kl_(head, changed, h), expected)
    torch.testing.assert_close(changed, slope)


def test_the_loss_is_least_at_the_mean_of_logarithms():
    """For any teacher, on all texts of two tokens out of three: the loss is its mean over texts and paths by
    enumeration, whose gradient is zero there."""
    V, n, (a_s, a_t) = 3, 2**16, (0.7, 0.4)
    texts, g = torch.tensor(list(itertools.product(range(V), repeat=2))), generator()
    law = torch.randn(9, generator=g).double().softmax(dim=0)
    log_q, other = torch.randn(2, 9, 2, V, generator=g).double().log_softmax(dim=-1)
    channel = a_t * torch.eye(V).double() + (1 - a_t) / V
    # p(x, x_t, which of the two tokens change), and x_s: 9 x 9 x 4
    changes, jump = torch.tensor(list(itertools.product((False, True), repeat=2))), (a_s - a_t) / (1 - a_t)
    p = law[:, None] * channel[texts[:, None], texts].prod(dim=-1)
    p = p[..., None] * torch.where(changes, jump, 1 - jump).prod(dim=1)
    x_s = torch.where(changes, texts[:, None, None], texts[None, :, None])
    log_q_s = log_q[x_s @ torch.tensor([V, 1])]                                        # (9, 9, 4, 2, V)

    def nats(log_p):
        return (log_p.exp() * (log_p - log_q_s.transpose(1, 2))).sum(dim=-1).mean(dim=-1).transpose(1, 2)
    mean = (p[..., None, None] * log_q_s).sum(dim=(0, 2)) / p.sum(dim=(0, 2))[:, None, None]
    best = mean.clone().requires_grad_()
    (p * nats(best.log_softmax(dim=-1))).sum().backward()
    assert best.grad.abs().max() < 1e-12

    method = make('duo_distilled', vocab_size=V, block_size=2)
    ends(method, a_s, a_t)
    for part, table in ((method, None), (method.teacher, log_q)):
        part.embed, part.head = torch.nn.Identity(), torch.nn.Linear(V, V)
        part.head.weight.data, part.head.bias.data = torch.eye(V), torch.zeros(V)
        part.states = lambda z, b, table=table: table[z @ torch.tensor([V, 1])].flatten(0, 1).float()
    x = texts[torch.multinomial(law, n, replacement=True, generator=g)]
    for log_p in (mean.log_softmax(dim=-1), other):
        method.states = lambda z, b: log_p[z @ torch.tensor([V, 1])].flatten(0, 1).float()  # noqa: B023
        values = nats(log_p)
        expected = (p * values).sum()
        error = ((p * values**2).sum() - expected**2).sqrt() / n**0.5
        assert abs(method(x, whole(n))[0] - expected) < 4.5 * error < 0.05 * expected


def test_rounds():
    """The gap doubles up to 1, and then the teacher becomes the student."""
    method = make('duo_distilled', round_iters=2, first_gap=0.3).train()
    for step, gap, begins in ((0, 0.3, True), (1, 0.3, False), (2, 0.6, True), (3, 0.6, False), (4, 1, True),
                              (10**6, 1, True)):
        method.head.bias.data += 1
        news, state = method.begin_step(step, None, None), method.state_dict()
        assert float(method.gap) == pytest.approx(gap) and bool(news) == begins
        copied = [torch.equal(w, state['teacher.' + name]) for name, w in method.named_parameters()]
        assert all(copied) == begins


def test_the_teacher_is_no_part_of_the_method_that_is_trained_or_sampled():
    method, duo = make('duo_distilled', dropout=0.5).train(), make('duo')
    assert {*dict(method.named_parameters())} == {*dict(duo.named_parameters())}
    method.begin_step(0, None, None)
    e, b = torch.randn(2, 12, 16), torch.ones(2) / 2
    assert torch.equal(method.teacher.states(e, b), method.teacher.states(e, b))  # without dropout
    assert not torch.equal(method.states(e, b), method.states(e, b))
    before = [w.clone() for w in method.teacher.state_dict().values()]
    method.head.weight.data += 1
    assert all(map(torch.equal, before, method.teacher.state_dict().values()))
    method.eval().load_state_dict(duo.state_dict(), strict=False)
    assert torch.equal(*(m.sample(4, 3, generator=generator()) for m in (method, duo)))
    assert torch.equal(*(m.nll(torch.zeros(4, 12).long()) for m in (method, duo)))


def test_without_a_gap_there_is_nothing_to_learn():
    method = make('duo_distilled')
    method.begin_step(0, None, None)
    method.gap.zero_()
    loss, _ = method(torch.zeros(4, 12).long(), whole(4))
    loss.backward()
    assert abs(loss) < 1e-6 and all(w.grad.abs().max() < 1e-6 for w in method.parameters())


@pytest.fixture
def toy(monkeypatch, tmp_path):
    monkeypatch.setattr(train, 'open_data', open_toy)
    monkeypatch.chdir(tmp_path)


def test_it_begins_as_the_run_that_it_is_given(toy, capsys):
    toy_teacher()
    go('a', '--method=duo_distilled', '--init_from=out/duo', '--max_iters=1', '--learning_rate=0')
    out = capsys.readouterr().out
    assert 'tensors begin as out/duo left them; new: teacher.' in out and 'step 0: round 1 begins' in out
    old, new = weights('out/duo'), weights('a')
    for name, w in old.items():
        assert torch.equal(new[name], w) and torch.equal(new['teacher.' + name], w)


@pytest.mark.parametrize('args, words', [
    ([], 'a student begins as its teacher, a trained Duo: --init_from=out/NAME'),
    (['--init_from=out/mdlm'], 'out/mdlm does not fit: a student begins as its teacher, a Duo of the same'),
    (['--init_from=out/duo', '--num_heads=4'], 'a Duo of the same hidden, num_layers, num_heads, cond_dim'),
    (['--init_from=out/duo', '--num_layers=2'], 'a Duo of the same hidden, num_layers, num_heads, cond_dim')])
def test_it_begins_as_nothing_else(toy, args, words):
    toy_teacher()
    make('mdlm', 'out/mdlm', vocab_size=4, block_size=16, tokenizer=None)
    with pytest.raises(UserError) as e:
        go('a', '--method=duo_distilled', '--max_iters=1', *args)
    assert words in str(e.value) and not os.path.exists('a')
