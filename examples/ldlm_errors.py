"""
Where an LDLM loses: in the autoencoder, in the denoiser, and at which noise?

    python -m examples.ldlm_errors out/LDLM --teacher=out/AR

Latents of validation texts are noised to time t and denoised from there, as sampling does it, in steps of the
same width: at t = 0 that is the reconstruction, and at t = 1 samples. Of each start:
    Gen PPL, entropy   of the texts that come out, beside those of the validation texts
    tokens kept        share of the tokens that are those of the text again
    error              |z0_hat - z|^2 of the first call, as a share of the latents' variance; that of a second
                       call, given the first estimate (self-conditioning); and that of the best denoiser of
                       each coordinate alone, if it were Gaussian. What is less comes from context
"""
import sys
from dataclasses import dataclass

import torch

from eval import entropies, open_teacher
from ldlm import LDLM, T_END, alpha_sigma, euler_maruyama
from lib.configurator import Keys, UserError, configure, key, run
from lib.plot import print_table
from methods import open_run
from sample import attach, open_texts, open_tokenizer

TIMES = 0, 0.1, 0.3, 0.5, 0.7, 0.9, 1


@dataclass
class Config(Keys):
    teacher: str = ''
    num_samples: int = key(64, at_least=1)
    steps: int = key(64, at_least=1)  # from t = 1


@torch.no_grad()
def denoised_from(model, z, t, steps, generator):
    """Latents z (n, L, D), noised to t and denoised again -> (ids (n, L), the three errors above)."""
    n, d = len(z), model.config.tangent
    if t == 0:
        return model.tokens(z), [0.0, 0.0, 0.0]

    def denoise(z_t, t, z_self):
        return model.denoise(z_t, t.float().expand(n), z_self)
    alpha, sigma = alpha_sigma(torch.tensor(t, dtype=torch.float64), d)
    z_t = (alpha * z + sigma * torch.randn(z.shape, generator=generator)).float()
    variances = z.flatten(0, 1).var(dim=0)
    first = denoise(z_t, torch.tensor(t), torch.zeros_like(z))
    second = denoise(z_t, torch.tensor(t), first)
    alone = variances * sigma**2 / (alpha**2 * variances + sigma**2)
    errors = [(z_hat - z).square().mean() for z_hat in (first, second)] + [alone.mean()]
    steps = max(1, round(steps * (t - T_END) / (1 - T_END)))
    _, z_hat = euler_maruyama(denoise, z_t, steps, d, generator, start=t)
    return model.tokens(z_hat), [(error / variances.mean()).item() for error in errors]


def report(model, x, teacher, steps):
    """-> rows of the table, for x (n, L)."""
    def row(start, texts, errors):
        values = [teacher.gen_ppl(texts)[0], entropies(texts)['entropy_sample'],
                  (texts == x).double().mean().item(), *errors]
        return [start, *(f'{value:.4g}' for value in values)]
    z, generator = model.latents_of(x), torch.Generator().manual_seed(0)
    return [row('the texts', x, [0.0, 0.0, 0.0])] + [
        row(f't = {t}', *denoised_from(model, z, float(t), steps, generator)) for t in TIMES]


def main(argv):
    c = configure(Config, [a for a in argv if a.startswith('-')])
    names = [a for a in argv if not a.startswith('-')]
    if not names or not c['teacher']:
        raise UserError('which runs, and who scores them? '
                        'python -m examples.ldlm_errors out/LDLM --teacher=out/AR')
    for name in names:
        model, config = open_run(name, 'cpu')
        if not isinstance(model, LDLM) or config['stage'] == 'autoencoder':
            raise UserError(f'{name} is no LDLM with a denoiser')
        tok = open_tokenizer(config)
        if model.encoder_name:  # trained embeddings need no encoder
            attach(model, config, tok, torch.device('cpu'), '')
        rows, n = open_texts('', config, tok, 'cpu')
        x = rows(torch.arange(min(n, c['num_samples'])))
        teacher = open_teacher(c['teacher'], tok, torch.device('cpu'))
        columns = 'Gen PPL', 'entropy', 'tokens kept', 'error', 'of a second', 'each alone'
        print_table(f'{name}, {len(x)} texts', columns, report(model, x, teacher, c['steps']), sys.stdout)


if __name__ == '__main__':
    run(main, Config)
