"""The plan of the house, read from its source: who imports whom, how long a function is, and that no script
knows which method it holds."""
import ast
import graphlib
from pathlib import Path

import pytest

import ladd
from methods import METHODS

ROOT = Path(__file__).resolve().parents[1]
TESTS = [path.stem for path in Path(__file__).parent.glob('*.py')]


def is_ours(path):
    top = path.parts[0]
    return top not in ('tests', 'out', 'venv', 'build') and not top.startswith('.')


SOURCES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding='utf-8')
           for path in sorted(ROOT.rglob('*.py')) if is_ours(path.relative_to(ROOT))}


def test_all_rooms_are_read():
    assert {'train.py', 'lib/files.py', 'baselines/ar.py', 'data/encode.py', 'data/text/prepare.py',
            'config/owt.py'} <= SOURCES.keys()


# ------------------------------------------------------------------------------------------------------------
# imports: an arrow points downwards

FLOORS = [['lib'], ['model'], ['mdlm'], ['ladd', 'ldlm', 'baselines'], ['methods'], ['sawtooth'],
          ['train', 'sample'], ['eval', 'bench'], ['data', 'config', 'examples'], ['tests', *TESTS]]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
DATA_MAY_IMPORT = {'lib', 'methods', 'train', 'data'}  # preparing text needs no backbone and no sampler


def module_of(path):
    return path.removesuffix('.py').removesuffix('/__init__').replace('/', '.')


def imports(source, known):
    """The project's modules that a file imports anywhere, also within functions, out of `known` names."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'line {node.lineno}: a relative import'
            names = [f'{node.module}.{alias.name}' for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split('.')
            prefixes = ['.'.join(parts[:n]) for n in range(len(parts), 0, -1)]
            ours = next((prefix for prefix in prefixes if prefix in known), None)
            if ours or parts[0] in FLOOR:
                found.add(ours or parts[0])
    return found


def arrows(sources):
    """{module: the project's modules that it imports}."""
    modules = {module_of(path): source for path, source in sources.items()}
    return {name: imports(source, modules) for name, source in modules.items()}


def upward(graph):
    """The arrows 'A -> B' that do not point downwards, or that data/ is not allowed."""
    for name, targets in graph.items():
        room = name.split('.')[0]
        for target in sorted(targets):
            other = target.split('.')[0]
            if FLOOR[other] > FLOOR[room] or room == 'data' and other not in DATA_MAY_IMPORT:
                yield f'{name} -> {target}'


def circles(graph):
    """One circle of arrows, or []."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as e:
        return e.args[1]
    return []


def test_every_file_has_a_floor():
    assert {name.split('.')[0] for name in arrows(SOURCES)} <= FLOOR.keys()


def test_no_arrow_points_upwards_or_in_a_circle():
    graph = arrows(SOURCES)
    assert {'methods', 'sawtooth', 'lib.log'} <= graph['train']  # arrows are found at all
    assert list(upward(graph)) == [] and circles(graph) == []
    assert {target.split('.')[0] for name, targets in graph.items() if name.startswith('lib.')
            for target in targets} == {'lib'}


@pytest.mark.parametrize('path, line', [
    ('lib/files.py', 'import mdlm'), ('lib/files.py', 'from train import Config'),
    ('lib/files.py', 'def f():\n    from baselines import ar'), ('mdlm.py', 'from methods import build'),
    ('ldlm.py', 'import baselines.ar, sample'), ('sawtooth.py', 'import train'),
    ('train.py', 'class A:\n    def f(self):\n        import eval as e'),
    ('sample.py', 'from data.lm1b import prepare'), ('data/text/prepare.py', 'import sample'),
    ('model.py', 'from helpers import make'), ('model.py', 'import tests.helpers')])
def test_an_upward_arrow_is_seen(path, line):
    assert len(list(upward(arrows({**SOURCES, path: line})))) == 1


def test_a_circle_is_seen():
    hidden = 'def f():\n    import lib.checkpoint'
    assert 'lib.files' in circles(arrows({**SOURCES, 'lib/files.py': hidden}))
    assert circles(arrows({**SOURCES, 'ladd.py': 'import ldlm', 'ldlm.py': 'from ladd import LADD'}))


# ------------------------------------------------------------------------------------------------------------
# size

def long_functions(source, most=70):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if node.end_lineno - node.lineno + 1 > most:
                yield node.name


def test_functions_fit_a_screen():
    assert [(path, name) for path, source in SOURCES.items() for name in long_functions(source)] == []
    body = '    pass\n'
    assert list(long_functions('def f():\n' + 69 * body)) == []
    assert list(long_functions('class A:\n  def f(self):\n' + 70 * body)) == ['f']


def test_few_files_at_the_top():
    assert len([path for path in SOURCES if '/' not in path]) <= 10


# ------------------------------------------------------------------------------------------------------------
# no probing: what a method has, lib/method.py says

FOREIGN = {  # objects of Python or of transformers, whose attributes are not ours to promise
    ('lib/configurator.py', "getattr(e, 'strerror', None)"): 'an OSError has it, a ValueError does not',
    ('lib/configurator.py', "getattr(e, 'lineno', 1)"): 'a SyntaxError has it, a RecursionError does not',
    ('lib/encoders.py', "getattr(model.config, 'max_position_embeddings', None)"): 'some have no limit',
}


def probes(source):
    """Calls of hasattr and of getattr with a default, and every way to the module inspect or to a module by
    its name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ('hasattr', '__import__') or called == 'getattr' and len(node.args) > 2:
                yield ast.unparse(node)
        elif isinstance(node, ast.Import):
            names = {alias.name.split('.')[0] for alias in node.names}
            if names & {'inspect', 'importlib'}:
                yield ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and node.module.split('.')[0] in ('inspect', 'importlib'):
            yield ast.unparse(node)


def test_nobody_asks_an_object_what_it_is():
    found = {(path, probe) for path, source in SOURCES.items() for probe in probes(source)}
    assert found - FOREIGN.keys() == set()
    assert FOREIGN.keys() - found == set()  # an exception that nobody needs any more


@pytest.mark.parametrize('line', [
    "hasattr(method, 'nll')", "x = getattr(c, 'hidden', 1) >= 1", 'import inspect', "__import__('ladd')",
    'from inspect import signature', 'def f():\n    import importlib.util',
    'from importlib import import_module'])
def test_a_probe_is_seen(line):
    assert len(list(probes(line))) == 1


def test_getattr_of_a_name_is_no_probe():
    assert list(probes("getattr(torch, c.dtype)\nmethod.inspect(x)")) == []


# ------------------------------------------------------------------------------------------------------------
# scripts and lib know no method by name

NAMES = {*METHODS, *(Method.__name__ for Method in METHODS.values()), ladd.Vectors.name, ladd.Codes.name}
MODULES = {Method.__module__ for Method in METHODS.values()}
SCRIPTS = ['train.py', 'sample.py', 'eval.py', 'bench.py']
SCRIPTS += [path for path in SOURCES if path.startswith('lib/')]
KNOWN = {
    # a default has to be some method
    ('train.py', "method: str = 'mdlm'"),
    # it measures what economical loss and sampler are worth, and so contains the straightforward ones; the
    # only straightforward sampler is MDLM's
    ('bench.py', 'import mdlm'),
    ('bench.py', "if c.variant == 'full' and method.name == 'MDLM':"),
}
CONVERTS = {'lib/hub.py': {'mdlm'}}  # published weights are of MDLM: the file's only job


def named_methods(source):
    """(name, line without its comment) wherever a string is a method's name, or its module is imported."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in NAMES:
            yield node.value, lines[node.lineno - 1].split('  #')[0].strip()
        elif isinstance(node, (ast.Import, ast.ImportFrom)) and imports(ast.unparse(node), MODULES) & MODULES:
            yield 'import', ast.unparse(node)


def test_scripts_name_no_method():
    found = {(path, name, line) for path in SCRIPTS for name, line in named_methods(SOURCES[path])}
    unknown = {(path, line) for path, name, line in found if name not in CONVERTS.get(path, ())}
    assert unknown - KNOWN == set()
    assert KNOWN - unknown == set()  # an exception that nobody needs any more


@pytest.mark.parametrize('line', [
    "if method == 'ladd': pass", "if c.method != 'mdlm': pass", "x = method.name in ('Co-LADD', 'other')",
    "METHODS['ar']", 'from ladd import LADD', 'def f():\n    import baselines.ar', 'from baselines import ar',
    "match c.method:\n    case 'ldlm':\n        pass", "f(type(method).__name__ == 'LDLM')"])
def test_a_named_method_is_seen(line):
    assert len(list(named_methods(line))) == 1


def test_words_that_contain_a_name_are_none():
    assert list(named_methods("import model\nx = 'ladder'\n'''Trains mdlm, ladd and others.'''\n")) == []
