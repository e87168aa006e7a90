"""examples/tutorial.ipynb: every cell runs, in a short form."""
import json
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHORTER = {'TRAINING_STEPS = 400': 'TRAINING_STEPS = 2', 'SAMPLES = 1024': 'SAMPLES = 64',
           'steps = [1, 2, 4, 8, 16]': 'steps = [1, 2]', '--eval_seqs=512': '--eval_seqs=4',
           "'--out_dir=out/notebook_mdlm'": "f'--out_dir={OUT}'", "'out/notebook_mdlm'": 'OUT',
           "'--init_from=scratch'": "'--init_from=scratch', '--batch_size=4'"}


def test_every_cell_runs(tmp_path, monkeypatch, capsys):
    with open(os.path.join(ROOT, 'examples', 'tutorial.ipynb'), encoding='utf-8') as f:
        notebook = json.load(f)
    cells = [''.join(cell['source']) for cell in notebook['cells'] if cell['cell_type'] == 'code']
    assert len(cells) >= 6 and all(not cell.get('outputs') for cell in notebook['cells'])
    code = '\n'.join(cells)
    for long, short in SHORTER.items():
        assert long in code, long
        code = code.replace(long, short)
    monkeypatch.chdir(os.path.join(ROOT, 'examples'))
    monkeypatch.setattr(sys, 'path', sys.path[:])
    import matplotlib
    matplotlib.use('agg')
    import sawtooth
    monkeypatch.setattr(sawtooth, 'report', lambda method: None)  # tests/test_sawtooth.py has it
    import train
    monkeypatch.setattr(train, 'report', lambda method: None)
    exec(code, {'OUT': str(tmp_path / 'run')})
    out = capsys.readouterr().out
    assert 'a bound of ' in out and 'distance after 8 steps' in out
    import matplotlib.pyplot as plt
    plt.close('all')
