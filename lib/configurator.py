"""
Hyper-parameters: a dict of defaults, then a config file of flat assignments, then --key=value from the command line.

The poor man's configurator of nanoGPT with two differences: a config file is read, not run (`learning_rate = 3e-3`, `max_iters = 5 * 60`
and comments are all it may hold), and a mistake ends with one line that says what would have been right.
"""
import ast
import dataclasses
import difflib
import glob
import importlib
import operator
import os
import sys
import time

METHODS = {'mdlm': 'MDLM', 'ladd': 'LADD', 'ar': 'AR', 'ldlm': 'LDLM'}  # the file is the name in small letters


class UserError(Exception):
    """A mistake by the user: one line that says what is wrong and what would be right."""


def nearest(name, known):
    """'did you mean X?' for a likely typing mistake, otherwise the whole list."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return f'did you mean {close[0]}?' if close else f'known: {", ".join(sorted(known))}'


def method_class(name):
    """-> the method's class, its Config."""
    if name not in METHODS:
        raise UserError(f'there is no method {name}: {nearest(name, METHODS)}')
    module = importlib.import_module('baselines.ar' if name == 'ar' else name)
    return getattr(module, METHODS[name]), module.Config


def method_fields(name):
    """A method's own keys with their defaults; its vocabulary is the data's and no key."""
    fields = dataclasses.fields(method_class(name)[1])
    return {f.name: f.default for f in fields if f.name != 'vocab_size'}


# ----------------------------------------------------------------------------
# values: literals and arithmetic between numbers, nothing that could run code

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow}
LARGEST = sys.float_info.max  # an integer beyond it is no number that anything here could use


def literal(node):
    """The value of a syntax tree made of True, False, strings, numbers and + - * / // % ** between numbers; ValueError otherwise."""
    if isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float, str)):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -number(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        a, b = number(node.left), number(node.right)
        if isinstance(node.op, ast.Pow) and (abs(a) > 1e6 or abs(b) > 64):
            raise ValueError('a power that large')  # 9**9**9 would not end
        value = OPERATORS[type(node.op)](a, b)
        if abs(value) > LARGEST:
            raise ValueError('a number that large')
        return value
    raise ValueError('neither a literal nor arithmetic between numbers')


def number(node):
    value = literal(node)
    if isinstance(value, (bool, str)):
        raise ValueError('arithmetic on something that is no number')
    return value


def fit(key, value, default):
    """value as the type of default; UserError if it is of another kind. 1e4 counts as an integer, 3 as a float."""
    kind = type(default)
    if type(value) in (int, float) and kind in (int, float) and abs(value) <= LARGEST:  # not so: nan
        if kind is float:
            return float(value)
        if value == int(value) and abs(value) < 2**63:
            return int(value)
    elif type(value) is kind and kind in (bool, str):
        return value
    wants = {bool: 'True or False', int: 'an integer', float: 'a number', str: 'a string'}[kind]
    raise UserError(f'{key} wants {wants} (default {default!r}), not {value!r}')


# ----------------------------------------------------------------------------
# where values come from

def read_file(path):
    """A config file -> [(key, value)]."""
    try:
        with open(path, encoding='utf-8') as f:
            tree = ast.parse(f.read())
    except (OSError, ValueError) as e:  # ValueError: not UTF-8, or a NUL in the name
        hint = nearest(path, glob.glob('config/*.py') or ['nothing in config/'])
        raise UserError(f'cannot read the config file {path} ({getattr(e, "strerror", None) or "not text"}); {hint}')
    except (SyntaxError, RecursionError, MemoryError) as e:
        raise UserError(f'{path}, line {getattr(e, "lineno", 1)}: not Python')
    pairs = []
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        if not (isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)):
            raise UserError(f'{path}, line {node.lineno}: a config holds assignments such as  batch_size = 32  and nothing else')
        try:
            pairs.append((node.targets[0].id, literal(node.value)))
        except (ValueError, ArithmeticError, TypeError, RecursionError) as e:
            raise UserError(f'{path}, line {node.lineno}: {node.targets[0].id} wants a literal such as 32, 2**10, 3e-4, True or "text" ({e})')
    return pairs


def read_text(key, text, default):
    """The right-hand side of --key=value. A string needs no quotes."""
    if isinstance(default, str):
        return text
    try:
        return literal(ast.parse(text, mode='eval').body)
    except (SyntaxError, ValueError, ArithmeticError, TypeError, RecursionError, MemoryError):
        return text  # no number: fit() says what is wanted


def numbers(key, text):
    """'1,2,4' -> [1, 2, 4]."""
    try:
        steps = [int(s) for s in text.split(',')]
    except ValueError:
        steps = [0]
    if min(steps) < 1:
        raise UserError(f'--{key} wants numbers from 1 up, as in --{key}=1,2,4; not {text!r}')
    return steps


def configure(defaults, argv):
    """Defaults, config file and command line -> one flat dict.

    defaults: key -> bool, int, float or str; their types are the rule.  argv: at most one config file, --key=value, --key for a bool.
    Where there is a key `method`, the keys of the method that it names are known, too.
    A config file NAME.py means out_dir = out/NAME unless something says otherwise.
    """
    try:
        ''.join(argv).encode()
    except UnicodeEncodeError:
        raise UserError('an argument is not UTF-8') from None
    files = [a for a in argv if not a.startswith('-')]
    if len(files) > 1:
        raise UserError(f'at most one config file, and overrides as --key=value: {" ".join(files)}')
    given = read_file(files[0]) if files else []
    if files and 'out_dir' in defaults:
        given.insert(0, ('out_dir', os.path.join('out', os.path.splitext(os.path.basename(files[0]))[0])))
    flags = [a[2:].partition('=') for a in argv if a.startswith('--')]
    for a in argv:
        if a.startswith('-') and not a.startswith('--'):
            raise UserError(f'{a}: overrides are written --key=value')

    known = dict(defaults)
    if 'method' in defaults:
        named = [v for k, v in given if k == 'method'] + [v for k, _, v in flags if k == 'method']
        method = fit('method', named[-1] if named else defaults['method'], '')
        known = {**method_fields(method), **defaults}
    config = dict(known)
    for key in [k for k, _ in given] + [k for k, _, _ in flags]:
        if key not in known:
            owners = [m for m in METHODS if key in method_fields(m)] if 'method' in defaults else []
            hint = f'it is a key of {" and ".join(owners)}, and method={method}' if owners else nearest(key, known)
            raise UserError(f'unknown key {key}: {hint}')
    for key, value in given:
        config[key] = fit(key, value, known[key])
    for key, equals, text in flags:
        if not equals and not isinstance(known[key], bool):
            raise UserError(f'--{key} wants a value: --{key}={known[key]}')
        config[key] = fit(key, read_text(key, text, known[key]) if equals else True, known[key])
    return config


# ----------------------------------------------------------------------------
# how a script ends

def run(main):
    """main(argv) of a script. A UserError becomes one line and exit code 2; Ctrl-C and a closed pipe end quietly; --help prints the file's head."""
    script = sys.modules['__main__']
    try:
        if {'-h', '--help'} & set(sys.argv[1:]) and hasattr(script, 'defaults'):
            keys = script.defaults
            if 'method' in keys:  # a config file changes them, and its method has more
                keys = keys | configure(keys, [a for a in sys.argv[1:] if a[:1] != '-' or a.startswith('--method=')])
            print(script.__doc__.strip(), '\n\nkeys and defaults:', *(f'  --{k}={v}' for k, v in keys.items()), sep='\n')
            return
        main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as e:
        if os.environ.get('LOCAL_RANK', '0') != '0':
            time.sleep(3)  # under torchrun the first process of each node says it for all, and its exit ends us here; unless it has nothing to say
        print('error:', ' '.join(str(e).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `python sample.py | head`: nobody reads any more; keep the interpreter from flushing once again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(130)
