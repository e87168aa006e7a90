"""examples/figures.py. tests/test_docs.py runs each of its commands, since they are in the documents."""
import json
import os

import pytest
import torch
from helpers import fails, make
from PIL import Image

from examples import figures
from lib.configurator import UserError
from sawtooth import L, Sawtooth

TINY = dict(dataset='sawtooth', vocab_size=2, block_size=L)


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize('name', ['co', 'di'])
def test_frames_of_both_strategies(name):
    """A state after every step, in one order of the texts: that of their shifts at the end."""
    method = make(name, **TINY)
    states, shift = figures.frames(method, 'joint', 8, 3)
    assert [done for *_, done in states] == [f'token step {i} of 3' for i in (1, 2, 3)]
    assert all(z.shape == (8, 8) for _, z, _ in states) and (shift.diff() >= 0).all() and shift.max() < 1
    for (x, _, _), (later, _, _) in zip(states, states[1:]):
        assert torch.equal(later[x < 2], x[x < 2])  # a row stays the same text
    states, _ = figures.frames(method, 'seq', 8, 2, latent_steps=3)
    assert [(x == 2).all().item() for x, _, _ in states] == [True] * 3 + [False] * 2
    assert [done for *_, done in states][2:4] == ['latent step 3 of 3, token step 0 of 2',
                                                  'latent step 3 of 3, token step 1 of 2']


def test_the_plane_holds_what_differs():
    method = make('co', **TINY)
    project, data = figures.plane(method, 64)
    z = method.encode(Sawtooth('val').texts(64)).flatten(1)
    total = (z - z.mean(dim=0)).square().sum()
    assert torch.equal(project(z), data) and 0.5 * total < data.square().sum() < total * 1.0001


def test_the_animation_moves(capsys):
    make('di', 'out/x', **TINY)
    figures.main(['denoising', 'out/x', '--steps=1', '--latent_steps=2', '--save=x.gif'])
    assert capsys.readouterr().out == 'x.gif\n'
    with Image.open('x.gif') as picture:
        assert picture.n_frames >= 3 and os.path.getsize('x.gif') < 600_000


def test_collapse_of_runs_and_of_kept_logs(monkeypatch):
    os.makedirs('out/a')
    for path, runs in ('out/a/log.jsonl', [{}]), ('kept.jsonl', [{'run': 'b'}, {'run': 'c'}]):
        with open(path, 'w') as f:
            f.writelines(json.dumps({'step': i, 'latent_var': 0.1, 'accuracy': 0.5, **run}) + '\n'
                         for i in (1, 2) for run in runs)
    labels, save = [], figures.save
    monkeypatch.setattr(figures, 'save', lambda chart, path: (
        labels.extend(chart.axes[0].get_legend_handles_labels()[1]), save(chart, path)))
    figures.main(['collapse', 'out/a', 'kept.jsonl', '--save=x.png'])
    assert labels == ['out/a', 'b', 'c'] and os.path.getsize('x.png') > 1000


@pytest.mark.parametrize('argv, match', [
    ([], 'wave | noise'), (['waves'], 'wave | noise'), (['wave', 'out/x'], 'wave | noise'),
    (['denoising'], 'denoising out/NAME'), (['denoising', 'out/none'], 'out/none'),
    (['denoising', 'out/m'], 'of ladd on sawtooth'), (['wave', '--steps=3'], 'steps'),
    (['collapse', 'out/m'], 'no log of an LDLM'), (['denoising', 'out/x', '--steps=0'], 'at least 1'),
    (['wave', '--save=x.doc'], 'ends with .png'), (['denoising', 'out/x', '--save=x.png'], 'ends with .gif'),
    (['denoising', 'out/x', '--steps=1', '--latent_steps=1', '--save=no/where.gif'], 'cannot write')])
def test_mistakes(argv, match, monkeypatch, capsys):
    make('mdlm', 'out/m', **TINY)
    make('co', 'out/x', **TINY)
    assert match in fails(figures, monkeypatch, capsys, *argv)


def test_neighbours_are_drawn_from_what_is_kept(tmp_path, monkeypatch, capsys):
    """Exact values are computed once; trained ones are means over runs, in the colour of the exact ones."""
    monkeypatch.setattr(figures, 'ASSETS', str(tmp_path))
    monkeypatch.setattr(figures, 'CALLS', (1, 2))
    drawn, charts = [], []
    monkeypatch.setattr(figures, 'exact_draw', lambda *case: drawn.append(case) or torch.zeros(case[1], L))
    monkeypatch.setattr(figures, 'save', lambda chart, path: charts.append(chart))
    make('mdlm', 'out/a', **TINY)
    for path, swds in ('out/a/sawtooth.jsonl', (0.2, 0.1)), ('b.jsonl', (0.4, 0.3)):
        with open(path, 'w') as f:
            f.writelines(json.dumps(dict(name='FLM', strategy='joint', steps=T, n=8, swd=v)) + '\n'
                         for T, v in zip((2, 1), swds))
    figures.neighbours('x.png', 'out/a', 'b.jsonl', n=8)
    assert len(drawn) == len(set(drawn)) == 11 * 2 - 1  # DCD's step is two calls
    figures.neighbours('x.png', 'out/a', 'b.jsonl', n=8)
    assert len(drawn) == 21
    said = capsys.readouterr().out
    assert said[:len(said) // 2] == said[len(said) // 2:]
    line, = [line for line in charts[1].axes[0].lines if line.get_label() == 'FLM']
    assert list(line.get_xdata()) == [1, 2] and list(line.get_ydata()) == pytest.approx([0.2, 0.3])
    assert [other.get_linestyle() for other in charts[1].axes[0].lines
            if other.get_color() == line.get_color()] == ['--', '-']


def test_every_curve_of_learned_codes_has_kept_results(monkeypatch):
    charts = []
    monkeypatch.setattr(figures, 'save', lambda chart, path: charts.append(chart))
    figures.latents('x.png')
    lines = [container[0] for container in charts[0].axes[0].containers]
    assert len(lines) == len(figures.LATENTS)
    for line in lines:
        cost, gen_ppl = line.get_data()
        assert len(cost) >= 4 and (cost[1:] > cost[:-1]).all() and gen_ppl[0] > gen_ppl[-1]


def test_curves_of_learned_codes_are_means_over_seeds(tmp_path, monkeypatch):
    charts, row = [], dict(gflops=1.0)
    monkeypatch.setattr(figures, 'save', lambda chart, path: charts.append(chart))
    for name, gen_ppl in (('mdlm', 10), ('mdlm_seed1', 30), ('mdlm_192', 5)):
        path = tmp_path / name
        path.mkdir()
        (path / 'eval.jsonl').write_text(json.dumps({**row, 'gen_ppl': gen_ppl, 'model': str(path)}) + '\n')
    figures.latents('x.png', *map(str, tmp_path.iterdir()))
    found = {line.get_label(): line[0].get_ydata() for line in charts[0].axes[0].containers}
    assert found == {'MDLM, as wide': [20], 'MDLM, as large': [5]}
    with pytest.raises(UserError, match='no run has results'):
        figures.latents('x.png', str(tmp_path))
