"""
Duo's distillation (Discrete Consistency Distillation; Sahoo et al., 2025, arXiv:2506.10892): a student learns
to say at time t what its teacher, a trained Duo, says at s < t on the same path.

    path        x_t = argmax(m_t e_x + eps), the same normals eps at all times: as t falls, a token changes at
                most once, and to x. From t to s it does with probability (alpha_s - alpha_t) / (1 - alpha_t)
    loss        E_t  sum over l of  KL(p_theta(x_l | x_t) | p_teacher(x_l | x_s)),  s = t - gap
    rounds      every round_iters steps the teacher becomes a copy of the student, and the gap doubles

The loss is least at exp E[log p_teacher(x_l | x_s) | x_t], normalised. Much of x_s is the noise of x_t, which
the teacher takes for text: so the noise that a sample starts from becomes what its tokens share. The released
code draws all V normals, and its teacher has dropout.
"""
from dataclasses import dataclass, replace
from functools import partial

import torch

from baselines import flm
from baselines.duo import Duo, gamma_range
from lib.configurator import key
from lib.method import frozen
from model import head_loss


def kl_(head_q, logits, h_q):
    """KL(p | q) in nats, fp32 (r,), and in place of the logits (r, V) of p its gradient. q: head_q of h_q."""
    log_p, log_q = (y.float().log_softmax(dim=-1) for y in (logits, head_q(h_q)))
    p, log_ratio = log_p.exp(), log_p - log_q
    kl = (p * log_ratio).sum(dim=1)
    logits.copy_(p * (log_ratio - kl[:, None]))
    return kl


@dataclass
class Config(flm.Config):
    round_iters: int = key(10000, at_least=1)
    first_gap: float = key(1 / 512, above=0, at_most=1)  # t - s in the first round


class DistilledDuo(Duo):
    name, Config = 'distilled Duo', Config
    untrained_part = 'a student begins as its teacher, a trained Duo: --init_from=out/NAME'

    def __init__(self, config):
        super().__init__(config)
        self.gamma = gamma_range(config.vocab_size, (0.9987, 0.0062))
        self.teacher = frozen(Duo(replace(config, dropout=0.0)))
        self.register_buffer('gap', torch.zeros(()), persistent=False)

    def reusable(self, weights, old, new):
        shape = 'hidden', 'num_layers', 'num_heads', 'cond_dim'
        if old.get('method') not in ('duo', 'duo_distilled') or any(old.get(k) != new[k] for k in shape):
            raise ValueError(f'a student begins as its teacher, a Duo of the same {", ".join(shape)}')
        return weights

    def begin_step(self, step, noise, draw_rows):
        rounds, steps = divmod(step, self.config.round_iters)
        self.gap.fill_(min(1.0, self.config.first_gap * 2.0 ** min(rounds, 64)))
        if steps == 0:
            self.teacher.load_state_dict({k: v for k, v in self.state_dict().items() if k[:8] != 'teacher.'})
            return f'round {rounds + 1} begins'

    def forward(self, x, noise):
        """Training loss per token of x (b, L) int64, and logs."""
        teacher, t = self.teacher, (noise.times('t') + self.gap).clamp(max=1)
        gammas = (self.gamma[0] + time * (self.gamma[1] - self.gamma[0]) for time in (t, t - self.gap))
        a_t, a_s = (flm.identified(torch.exp(-g / 2), self.config.vocab_size)[0].float() for g in gammas)
        x_t = self.corrupt(x, 1 - a_t, noise)
        appears = noise.uniform('appears', x.shape[1]) < ((a_s - a_t) / (1 - a_t))[:, None]
        h_s = teacher.states(teacher.embed(torch.where(appears, x, x_t)), 1 - a_s)
        loss = head_loss(partial(kl_, teacher.head), self.head, self.states(self.embed(x_t), 1 - a_t), h_s)
        return loss, {'loss': loss.detach()}

    def training_flops(self, L):
        return super().training_flops(L) * 4 / 3  # and the teacher's forward pass
