import subprocess
import sys
from types import SimpleNamespace

import pytest

from lib import configurator
from lib.configurator import UserError, configure

DEFAULTS = dict(out_dir='out', method='a', rate=3e-4, steps=100, quiet=False, name='x')
FIELDS = {'a': {'hidden': 8}, 'b': {'latents': 4, 'steps': 7}}


@pytest.fixture(autouse=True)
def two_methods(monkeypatch):
    monkeypatch.setattr(configurator, 'METHODS', FIELDS)
    monkeypatch.setattr(configurator, 'method_fields', FIELDS.get)


def write(tmp_path, text, name='run.py'):
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def fails(argv, *words, defaults=DEFAULTS):
    with pytest.raises(UserError) as e:
        configure(defaults, argv)
    for word in words:
        assert word in str(e.value), str(e.value)


def test_order_defaults_file_command_line(tmp_path):
    path = write(tmp_path, '"""A run."""\nrate = 1e-3  # higher\nsteps = 2**4 * 5 - 1\nname = "y"\n')
    assert configure(DEFAULTS, []) == {**DEFAULTS, 'hidden': 8}
    c = configure(DEFAULTS, [path, '--rate=5', '--quiet'])
    assert c == dict(out_dir='out/run', method='a', rate=5.0, steps=79, quiet=True, name='y', hidden=8)
    assert type(c['rate']) is float and type(c['steps']) is int


def test_out_dir_said_is_out_dir(tmp_path):
    path = write(tmp_path, 'out_dir = "here"')
    assert configure(DEFAULTS, [path])['out_dir'] == 'here'
    assert configure(DEFAULTS, [path, '--out_dir=there'])['out_dir'] == 'there'
    assert 'out_dir' not in configure({'steps': 1}, [write(tmp_path, 'steps = 2')])


def test_method_brings_its_keys(tmp_path):
    assert configure(DEFAULTS, ['--method=b', '--latents=2'])['latents'] == 2
    assert configure(DEFAULTS, ['--latents=2', write(tmp_path, 'method = "b"')])['latents'] == 2
    assert configure(DEFAULTS, ['--method=b'])['steps'] == 100  # a key of the script and of the method: the script's
    fails(['--latents=2'], 'unknown key latents: it is a key of b, and method=a')
    fails(['--method=b', '--hidden=2'], 'unknown key hidden: it is a key of a, and method=b')


@pytest.mark.parametrize('text, value', [('1e4', 10000), ('2**10', 1024), ('-3', -3), ('7//2', 3), ('60*60/2', 1800)])
def test_integers(text, value):
    c = configure(DEFAULTS, [f'--steps={text}'])
    assert c['steps'] == value and type(c['steps']) is int


def test_strings_need_no_quotes():
    assert configure(DEFAULTS, ['--name=1984'])['name'] == '1984'
    assert configure(DEFAULTS, ['--name=a=b, "c"'])['name'] == 'a=b, "c"'
    assert configure(DEFAULTS, ['--name='])['name'] == ''


@pytest.mark.parametrize('arg', ['--steps=many', '--steps=1.5', '--steps=', '--steps=True', '--steps="3"', '--steps=1e30', '--steps=9**9**9',
                                 '--steps=1/0', '--steps=(1', '--steps=__import__("os")', '--steps=1e400', '--steps=[1]', '--steps=' + '(' * 500,
                                 '--steps=' + '-' * 20000 + '1', '--steps=1\0', '--rate=nan', '--rate=1e999', '--rate=True', '--rate=10**999', '--rate=(-1)**.5',
                                 '--quiet=1', '--quiet=yes', '--quiet=true', '--steps', '--rate'])
def test_wrong_values(arg):
    fails([arg], arg[2:].split('=')[0])


def test_unknown_keys_name_the_nearest(tmp_path):
    fails(['--step=3'], 'unknown key step', 'steps')
    fails(['--zzzz=3'], 'unknown key zzzz', 'rate')
    fails(['--unit_norm=3'], 'unknown key unit_norm: known:', defaults={**DEFAULTS, 'init_from': ''})  # half of the letters: not a likely mistake
    fails([write(tmp_path, 'nmae = "y"')], 'unknown key nmae', 'did you mean name')


def test_stray_arguments(tmp_path):
    fails(['a.py', 'b.py'], 'at most one config file')
    fails(['-x'], '--key=value')


@pytest.mark.parametrize('text', ['import os', 'steps = open("x")', 'steps = __import__("os").system("touch x")', 'steps: int = 3', 'a = b = 1', 'a, b = 1, 2',
                                  'if True: steps = 1', 'steps += 1', 'steps = [1]', 'steps = rate', 'steps = "a" * 10**9', 'steps = f"{1}"', 'steps =', '\0',
                                  'steps = 1 +' + ' 1 +' * 5000 + ' 1', 'print(1)', 'steps = 9**9**9', 'steps = 2 ** -1 / 0'])
def test_a_config_cannot_run_code(tmp_path, text):
    fails([write(tmp_path, text)])
    assert not (tmp_path / 'x').exists()


def test_missing_config_says_which_exist(tmp_path, monkeypatch):
    (tmp_path / 'config').mkdir()
    write(tmp_path / 'config', '', 'good.py')
    monkeypatch.chdir(tmp_path)
    fails(['config/god.py'], 'config/god.py', 'config/good.py')
    fails(['config'], 'config/good.py')
    fails(['a\0b'])
    (tmp_path / 'bin.py').write_bytes(b'\xff\xfe\x00')
    fails(['bin.py'])


def test_help_lists_the_keys_of_the_method(tmp_path, monkeypatch, capsys):
    path = write(tmp_path, 'method = "b"\nrate = 1.0')
    no_method = {'out_dir': '', 'steps': 3}
    for defaults, argv, known in [(no_method, ['--help', 'out/A'], no_method), (DEFAULTS, ['-h', '--hiden=8'], {**DEFAULTS, 'hidden': 8}),
                                  (DEFAULTS, ['--method=b', '--help'], {**DEFAULTS, 'method': 'b', 'latents': 4}),
                                  (DEFAULTS, [path, '--help'], {**DEFAULTS, 'method': 'b', 'rate': 1.0, 'out_dir': 'out/run', 'latents': 4})]:
        monkeypatch.setitem(sys.modules, '__main__', SimpleNamespace(__doc__='Trains.', defaults=defaults))
        monkeypatch.setattr(sys, 'argv', ['x.py', *argv])
        configurator.run(None)
        assert capsys.readouterr().out == 'Trains.\n\n\nkeys and defaults:\n' + ''.join(f'  --{k}={v}\n' for k, v in known.items())


def test_how_a_script_ends(tmp_path):
    script = write(tmp_path, 'import sys, configurator\n'
                             'def main(argv):\n'
                             '    if argv[0] == "user": raise configurator.UserError("no such\\nthing")\n'
                             '    if argv[0] == "stop": raise KeyboardInterrupt\n'
                             '    for i in range(100000): print(i)\n'
                             'configurator.run(main)\n')
    root = configurator.__file__.rsplit('/', 1)[0]

    def end(arg, tail='', **env):
        r = subprocess.run(f'{sys.executable} {script} {arg} {tail}', shell=True, capture_output=True, text=True, env={'PYTHONPATH': root, 'PATH': '/usr/bin:/bin', **env})
        return r.returncode, r.stderr
    assert end('user') == (2, 'error: no such thing\n')
    assert end('user', RANK='8', LOCAL_RANK='0') == (2, 'error: no such thing\n')  # what is missing may be so on the second node only
    other = subprocess.Popen([sys.executable, script, 'user'], stderr=subprocess.PIPE, text=True, env={'PYTHONPATH': root, 'RANK': '1', 'LOCAL_RANK': '1'})
    with pytest.raises(subprocess.TimeoutExpired):  # it leaves the line to the other, and time to say it
        other.communicate(timeout=1)
    assert other.communicate() == (None, 'error: no such thing\n') and other.returncode == 2  # but for a mistake of its own
    assert end('stop') == (130, '')
    assert end('pipe', '| head -n 1') == (0, '')
