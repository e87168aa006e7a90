"""lib/configurator.py: where values come from, which of them are refused, and how a script ends."""
import os
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from lib import configurator
from lib.configurator import Keys, Not, UserError, configure, defaults_of, key


@dataclass
class Script(Keys):
    out_dir: str = 'out'
    method: str = 'a'
    rate: float = 3e-4
    steps: int = 100
    quiet: bool = False
    name: str = 'x'


@dataclass
class A(Keys):
    vocab_size: int = 0
    hidden: int = 8


@dataclass
class B(Keys):
    vocab_size: int = 0
    latents: int = 4
    steps: int = 7


METHODS = {'a': SimpleNamespace(Config=A), 'b': SimpleNamespace(Config=B)}
DEFAULTS = dict(out_dir='out', method='a', rate=3e-4, steps=100, quiet=False, name='x')


@dataclass
class Bare(Keys):
    steps: int = 1


def write(tmp_path, text, name='run.py'):
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def fails(argv, *words, keys=Script, methods=METHODS):
    with pytest.raises(UserError) as e:
        configure(keys, argv, methods)
    assert '\n' not in str(e.value)
    for word in words:
        assert word in str(e.value), str(e.value)


# ------------------------------------------------------------------------------------------------------------
# where values come from

def test_order_defaults_file_command_line(tmp_path):
    path = write(tmp_path, '"""A run."""\nrate = 1e-3  # higher\nsteps = 79\nname = "y"\n')
    assert configure(Script, [], METHODS) == {**DEFAULTS, 'hidden': 8}
    c = configure(Script, [path, '--rate=5', '--quiet'], METHODS)
    assert c == dict(out_dir='out/run', method='a', rate=5.0, steps=79, quiet=True, name='y', hidden=8)
    assert type(c['rate']) is float and type(c['steps']) is int


def test_out_dir_said_is_out_dir(tmp_path):
    path = write(tmp_path, 'out_dir = "here"')
    assert configure(Script, [path], METHODS)['out_dir'] == 'here'
    assert configure(Script, [path, '--out_dir=there'], METHODS)['out_dir'] == 'there'
    assert configure(Bare, [write(tmp_path, 'steps = 2')]) == {'steps': 2}


def test_method_brings_its_keys(tmp_path):
    assert configure(Script, ['--method=b', '--latents=2'], METHODS)['latents'] == 2
    assert configure(Script, ['--latents=2', write(tmp_path, 'method = "b"')], METHODS)['latents'] == 2
    # a key of the script and of the method: the script's
    assert configure(Script, ['--method=b'], METHODS)['steps'] == 100
    fails(['--latents=2'], 'unknown key latents: it is a key of b, and method=a')
    fails(['--method=b', '--hidden=2'], 'unknown key hidden: it is a key of a, and method=b')


def test_a_method_that_there_is_not(tmp_path):
    fails(['--method=c'], 'there is no method c: known: a, b')
    fails(['--method='], 'there is no method : known: a, b')
    fails(['--method'], '--method wants a value: --method=a')
    fails([write(tmp_path, 'method = 3')], 'there is no method 3')


def test_the_vocabulary_is_the_datas():
    assert 'vocab_size' not in configure(Script, [], METHODS)
    fails(['--vocab_size=3'], 'unknown key vocab_size: known: hidden')


@pytest.mark.parametrize('text, value', [
    ('1e4', 10000), ('1024', 1024), ('-3', -3), ('3.0', 3), ('+1_800', 1800)])
def test_integers(text, value):
    c = configure(Script, [f'--steps={text}'], METHODS)
    assert c['steps'] == value and type(c['steps']) is int


def test_no_string_holds_the_character_0(tmp_path):
    fails(['--name=a\0b'], 'name holds the character')
    fails([write(tmp_path, r'out_dir = "out/\0"')], 'out_dir holds the character')


def test_a_leading_tilde_is_home(tmp_path, monkeypatch):
    @dataclass
    class Prompted(Script):
        start: str = key('', prose=True)

    monkeypatch.setenv('HOME', '/home/me')
    path = write(tmp_path, 'out_dir = "~/a"')
    assert configure(Prompted, [path, '--name=~/b', '--start=~/c'])['out_dir'] == '/home/me/a'
    c = configure(Prompted, [path, '--name=~/b', '--start=~/c'])
    assert (c['name'], c['start']) == ('/home/me/b', '~/c')


def test_a_config_may_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / 'run.py'
    path.write_text('steps = 3\n', encoding='utf-8-sig')
    assert configure(Script, [str(path)], METHODS)['steps'] == 3


def test_strings_need_no_quotes():
    assert configure(Script, ['--name=1984'], METHODS)['name'] == '1984'
    assert configure(Script, ['--name=a=b, "c"'], METHODS)['name'] == 'a=b, "c"'
    assert configure(Script, ['--name='], METHODS)['name'] == ''


# ------------------------------------------------------------------------------------------------------------
# what is refused

ARITHMETIC = '2**10', '7//2', '60*60/2', '2**4 * 5 - 1', '1 + 1', '9**9**9', '1/0', '-(-1)', '1 + 2j'


@pytest.mark.parametrize('text', ARITHMETIC)
def test_there_is_no_arithmetic(tmp_path, text):
    """Neither on the command line nor in a file: one line says what would be right."""
    fails([f'--steps={text}'], f'steps wants an integer (default 100), not {text!r}')
    fails([f'--rate={text}'], f'rate wants a number (default 0.0003), not {text!r}')
    path = write(tmp_path, f'name = "y"\nsteps = {text}')
    fails([path], f'{path}, line 2: steps wants a literal such as 32, 3e-4, True or "text"')


@pytest.mark.parametrize('arg', [
    '--steps=many', '--steps=1.5', '--steps=', '--steps=True', '--steps="3"', '--steps=1e30', '--steps=(1',
    '--steps=__import__("os")', '--steps=1e400', '--steps=[1]', '--steps=' + '(' * 500,
    '--steps=' + '-' * 20000 + '1', '--steps=1\0', '--steps=2j', '--steps=None', '--steps=b"1"', '--rate=nan',
    '--rate=1e999', '--rate=True', '--rate=10**999', '--rate=(-1)**.5', '--quiet=1', '--quiet=yes',
    '--quiet=true', '--steps', '--rate'])
def test_wrong_values(arg):
    fails([arg], arg[2:].split('=')[0])


def test_unknown_keys_name_the_nearest(tmp_path):
    @dataclass
    class WithInit(Script):
        init_from: str = ''

    fails(['--step=3'], 'unknown key step', 'steps')
    fails(['--zzzz=3'], 'unknown key zzzz', 'rate')
    # it shares half of its letters with init_from: not a likely mistake
    fails(['--unit_norm=3'], 'unknown key unit_norm: known:', keys=WithInit)
    fails([write(tmp_path, 'nmae = "y"')], 'unknown key nmae', 'did you mean name')


def test_stray_arguments(tmp_path):
    fails(['a.py', 'b.py'], 'at most one config file')
    fails(['-x'], '--key=value')


@pytest.mark.parametrize('text', [
    'import os', 'steps = open("x")', 'steps = __import__("os").system("touch x")', 'steps: int = 3',
    'a = b = 1', 'a, b = 1, 2', 'if True: steps = 1', 'steps += 1', 'steps = [1]', 'steps = rate',
    'steps = "a" * 10**9', 'steps = f"{1}"', 'steps =', '\0', 'steps = 1 +' + ' 1 +' * 5000 + ' 1',
    'print(1)', 'steps = 9**9**9', 'steps = 2 ** -1 / 0', 'steps = None', 'steps = 1j', 'name = b"y"',
    'steps = ' + '1' * 5000])
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


# ------------------------------------------------------------------------------------------------------------
# rules

@dataclass
class Ruled(Keys):
    count: int = key(3, at_least=1)
    length: float = key(1.0, above=0)
    decay: float = key(0.5, at_least=0, below=1)
    share: float = key(0.0, at_least=0, at_most=1)
    shape: str = key('round', choices=('round', 'square'))


OUT_OF_BOUNDS = [
    ('count', 0, 'count must be at least 1, not 0'),
    ('length', 0.0, 'length must be greater than 0, not 0.0'),
    ('decay', -0.1, 'decay must be at least 0, not -0.1'),
    ('decay', 1.0, 'decay must be less than 1, not 1.0'),
    ('share', 1.01, 'share must be at most 1, not 1.01'),
    ('shape', 'oval', "shape is one of round, square, not 'oval'")]
ON_THE_BOUNDS = dict(count=1, length=1e-300, decay=0.0, share=1.0, shape='square')


def from_file(tmp_path, Keys, **values):
    return configure(Keys, [write(tmp_path, ''.join(f'{k} = {v!r}\n' for k, v in values.items()))])


def from_flags(Keys, **values):
    return configure(Keys, [f'--{k}={v}' for k, v in values.items()])


@pytest.mark.parametrize('name, value, words', OUT_OF_BOUNDS)
def test_a_rule_holds_wherever_a_value_comes_from(tmp_path, name, value, words):
    for source, error in [(lambda **k: from_flags(Ruled, **k), UserError), (Ruled, ValueError),
                          (lambda **k: from_file(tmp_path, Ruled, **k), UserError),
                          (lambda **k: Ruled.stored(k), ValueError)]:
        with pytest.raises(error) as e:
            source(**{name: value})
        assert str(e.value) == words
    # what the command line puts right is no mistake
    path = write(tmp_path, f'{name} = {value!r}')
    assert configure(Ruled, [path, f'--{name}={ON_THE_BOUNDS[name]}'])[name] == ON_THE_BOUNDS[name]


def test_a_bound_itself_is_allowed(tmp_path):
    for keys in (from_flags(Ruled, **ON_THE_BOUNDS), from_file(tmp_path, Ruled, **ON_THE_BOUNDS),
                 vars(Ruled(**ON_THE_BOUNDS)), vars(Ruled.stored(ON_THE_BOUNDS))):
        assert keys == ON_THE_BOUNDS


def test_no_bound_holds_for_nan():
    for name in ('length', 'decay', 'share'):
        with pytest.raises(ValueError, match=f'{name} must be'):
            Ruled(**{name: float('nan')})


def test_what_is_stored():
    """Other keys are ignored, missing ones have their defaults, and a value of another type is refused."""
    keys = Ruled.stored(dict(count=5, method='x', tokenizer={'kind': 'gpt2'}))
    assert isinstance(keys, Ruled) and vars(keys) == {**defaults_of(Ruled), 'count': 5}
    for wrong in (dict(count='x'), dict(count=None), dict(shape=3), dict(decay=[0.5])):
        with pytest.raises(UserError, match=f'{[*wrong][0]} wants'):
            Ruled.stored(wrong)


def test_rules_are_spelled_as_python_demands():
    with pytest.raises(TypeError, match='at_lest'):
        key(1, at_lest=1)


@dataclass
class Settings(Keys):
    """Of which most have an effect in some settings only."""
    kind: str = key('none', choices=('none', 'vectors', 'codes'))
    layers: int = key(2, only={'kind': 'codes'})                          # one value
    width: float = key(1.0, at_least=0, only={'kind': ('vectors', 'codes')})  # any of these values
    length: int = key(0, only={'kind': Not(['none'])})                    # any value but these
    decay: float = key(0.5, only={'kind': 'codes', 'layers': Not([2])})   # two conditions
    # either of two cases
    warmup: int = key(10, only=[{'kind': 'codes'}, {'kind': 'vectors', 'length': Not([0])}])


VALUES = dict(layers=3, width=2.0, length=7, decay=0.25, warmup=20)  # none of them a default
WORKS = {  # key -> {setting: the obstacle that the message names, '' where the key has an effect}
    'layers': {'none': "kind='none'", 'vectors': "kind='vectors'", 'codes': ''},
    'width': {'none': "kind='none'", 'vectors': '', 'codes': ''},
    'length': {'none': "kind='none'", 'vectors': '', 'codes': ''},
    'decay': {'none': "kind='none'", 'vectors': "kind='vectors'", 'codes': 'layers=2'},
    'warmup': {'none': "kind='none'", 'vectors': "kind='vectors'", 'codes': ''}}
CASES = [(name, kind, obstacle) for name, by_kind in WORKS.items() for kind, obstacle in by_kind.items()]


@pytest.mark.parametrize('name, kind, obstacle', CASES)
def test_a_key_without_effect_is_refused(tmp_path, name, kind, obstacle):
    values = {'kind': kind, name: VALUES[name]}
    expected = {**defaults_of(Settings), **values}
    sources = [(lambda: from_flags(Settings, **values), UserError),
               (lambda: from_file(tmp_path, Settings, **values), UserError),
               (lambda: vars(Settings(**values)), ValueError)]
    for source, error in sources:
        if not obstacle:
            assert source() == expected
            continue
        with pytest.raises(error) as e:
            source()
        assert str(e.value) == f'{name}={VALUES[name]} has no effect with {obstacle}: leave it out'
    assert vars(Settings.stored(values)) == expected  # older runs may hold such keys
    # the default itself may always be given
    values[name] = defaults_of(Settings)[name]
    assert all(source()[name] == values[name] for source, _ in sources)


def test_every_condition_and_any_case_counts():
    assert Settings(kind='codes', layers=3, decay=0.25).decay == 0.25
    assert Settings(kind='vectors', length=1, warmup=20).warmup == 20
    for keys, obstacle in ((dict(kind='vectors', layers=2, decay=0.25), "kind='vectors'"),
                           (dict(kind='vectors', length=0, warmup=20), "kind='vectors'")):
        with pytest.raises(ValueError, match=obstacle):
            Settings(**keys)


@pytest.mark.parametrize('kind, kept', [('none', {}), ('vectors', dict(width=2.0, length=7, warmup=20))])
def test_a_key_that_the_command_line_puts_out_of_use_returns_to_its_default(tmp_path, kind, kept):
    """Silently: a config file may be used for another setting than its own."""
    path = write(tmp_path, ''.join(f'{k} = {v!r}\n' for k, v in {'kind': 'codes', **VALUES}.items()))
    assert configure(Settings, [path]) == {'kind': 'codes', **VALUES}
    assert configure(Settings, [path, f'--kind={kind}']) == {**defaults_of(Settings), 'kind': kind, **kept}


def test_a_key_without_effect_by_itself_is_refused_with_any_other_overrides(tmp_path):
    """Asked for on the command line, or by a file in which it has none; also beside keys that return."""
    def refused(argv, words):
        with pytest.raises(UserError) as e:
            configure(Settings, argv)
        assert str(e.value) == words + ': leave it out'
    path = write(tmp_path, 'kind = "codes"\nlayers = 3\ndecay = 0.25')
    refused([path, '--kind=vectors', '--decay=0.125'], "decay=0.125 has no effect with kind='vectors'")
    assert configure(Settings, [path, '--layers=2'])['decay'] == 0.5  # its condition is gone
    path = write(tmp_path, 'kind = "vectors"\nlayers = 3')
    refused([path], "layers=3 has no effect with kind='vectors'")
    refused([path, '--kind=none'], "layers=3 has no effect with kind='none'")
    assert configure(Settings, [path, '--kind=codes'])['layers'] == 3  # the command line gives it one
    assert configure(Settings, [path, '--layers=2'])['layers'] == 2


def test_a_methods_rule_may_name_a_key_of_the_script():
    @dataclass
    class Quiet(A):
        hidden: int = key(8, at_least=1, only={'quiet': True})

    methods = {'a': SimpleNamespace(Config=Quiet)}
    assert configure(Script, ['--quiet', '--hidden=9'], methods)['hidden'] == 9
    fails(['--hidden=9'], 'hidden=9 has no effect with quiet=False', methods=methods)
    fails(['--quiet', '--hidden=0'], 'hidden must be at least 1', methods=methods)


# ------------------------------------------------------------------------------------------------------------
# a script

def test_help_lists_the_keys_of_the_method(tmp_path, monkeypatch, capsys):
    @dataclass
    class NoMethod(Keys):
        out_dir: str = ''
        steps: int = 3

    path = write(tmp_path, 'method = "b"\nrate = 1.0')
    monkeypatch.setitem(sys.modules, '__main__', SimpleNamespace(__doc__='Trains.'))
    for keys, methods, argv, known in [
            (NoMethod, None, ['--help', 'out/A'], {'out_dir': '', 'steps': 3}),
            (Script, METHODS, ['-h', '--hiden=8'], {**DEFAULTS, 'hidden': 8}),
            (Script, METHODS, ['--method=b', '--help'], {**DEFAULTS, 'method': 'b', 'latents': 4}),
            (Script, METHODS, [path, '--help'],
             {**DEFAULTS, 'method': 'b', 'rate': 1.0, 'out_dir': 'out/run', 'latents': 4})]:
        monkeypatch.setattr(sys, 'argv', ['x.py', *argv])
        configurator.run(None, keys, methods)
        lines = ''.join(f'  --{k}={v}\n' for k, v in known.items())
        assert capsys.readouterr().out == 'Trains.\n\n\nkeys and defaults:\n' + lines


def test_how_a_script_ends(tmp_path):
    script = write(tmp_path, 'from lib import configurator\n'
                             'def main(argv):\n'
                             '    if argv[0] == "user": raise configurator.UserError("no such\\nthing")\n'
                             '    if argv[0] == "stop": raise KeyboardInterrupt\n'
                             '    for i in range(100000): print(i)\n'
                             'configurator.run(main)\n')
    root = os.path.dirname(os.path.dirname(configurator.__file__))

    def end(arg, tail='', **env):
        r = subprocess.run(f'{sys.executable} {script} {arg} {tail}', shell=True, capture_output=True,
                           text=True, env={'PYTHONPATH': root, 'PATH': '/usr/bin:/bin', **env})
        return r.returncode, r.stderr
    assert end('user') == (2, 'error: no such thing\n')
    # what is missing may be so on the second node only
    assert end('user', RANK='8', LOCAL_RANK='0') == (2, 'error: no such thing\n')
    other = subprocess.Popen([sys.executable, script, 'user'], stderr=subprocess.PIPE, text=True,
                             env={'PYTHONPATH': root, 'RANK': '1', 'LOCAL_RANK': '1'})
    with pytest.raises(subprocess.TimeoutExpired):  # it leaves the line to the other, and time to say it
        other.communicate(timeout=1)
    # but for a mistake of its own
    assert other.communicate() == (None, 'error: no such thing\n') and other.returncode == 2
    assert end('stop') == (130, '')
    assert end('pipe', '| head -n 1') == (0, '')


SCRIPT = """
from dataclasses import dataclass
from types import SimpleNamespace
from lib.configurator import Keys, UserError, configure, run

@dataclass
class Config(Keys):
    start: str = ''
    batch_size: int = 1

def main(argv):
    c = SimpleNamespace(**configure(Config, argv))
    if c.start == 'memory':
        bytearray(2**60)
    if c.start in ('stop', 'mistake'):
        print('begun')
        raise KeyboardInterrupt if c.start == 'stop' else UserError('such is life')
    if c.start == 'disk':
        open('nowhere/x')
    print(c.start, '\u2588')
run(main, Config)
"""


@pytest.mark.parametrize('arg, tail, env, result', [
    # files and pipes are UTF-8, whatever the locale or Windows' code page
    ('é', '| cat', dict(PYTHONIOENCODING='cp1252'), (0, 'é █\n', '')),
    ('é', '| cat', dict(PYTHONIOENCODING='ascii'), (0, 'é █\n', '')),
    ('é', '| cat', dict(LC_ALL='C'), (0, 'é █\n', '')),
    ('é', '', dict(LC_ALL='C', PYTHONUTF8='0'), (2, '', 'error: an argument is not UTF-8, because Python '
                                                 'takes this locale for ascii: set PYTHONUTF8=1\n')),
    ('x', '>&-', {}, (0, '', '')), ('x', '2>&-', {}, (0, 'x █\n', '')), ('x', '>&- 2>&-', {}, (0, '', '')),
    ('x', '<&- >&- 2>&-', {}, (0, '', '')),
    ('x', '>/dev/full', {}, (2, '', 'error: cannot read or write: [Errno 28] No space left on device\n')),
    ('stop', '>/dev/full', {}, (130, '', '')),
    ('mistake', '>/dev/full', {}, (2, '', 'error: such is life\n')),
    ('stop', '| cat', {}, (130, 'begun\n', '')), ('disk', '2>/dev/full', {}, (2, '', '')),
    ('disk', '', {}, (2, '', 'error: cannot read or write: [Errno 2] No such file or directory: '
                      "'nowhere/x'\n")),
    ('memory', '', {}, (2, '', 'error: out of memory; less of it is needed with a smaller --batch_size\n'))])
def test_what_the_machine_refuses(arg, tail, env, result, tmp_path):
    """A character set, an output that is closed or full, memory: never a traceback."""
    script = write(tmp_path, SCRIPT)
    root = os.path.dirname(os.path.dirname(configurator.__file__))
    r = subprocess.run(['bash', '-c', f'set -o pipefail; {sys.executable} {script} --start={arg} {tail}'],
                       capture_output=True, cwd=tmp_path,
                       env={'PYTHONPATH': root, 'PATH': '/usr/bin:/bin', **env})
    assert (r.returncode, r.stdout.decode(), r.stderr.decode()) == result
