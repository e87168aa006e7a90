"""
Hyper-parameters: a dataclass of keys with defaults, then a config file, then --key=value.

The poor man's configurator of nanoGPT with three differences: a config file is read, not run
(assignments of numbers, strings, True and False are all it may hold, and comments); a rule stands beside
its key; and a mistake ends with one line that says what would have been right.
"""
import ast
import dataclasses
import difflib
import glob
import operator
import os
import sys
import time


class UserError(Exception):
    """A mistake by the user: one line that says what is wrong and what would be right."""


def nearest(name, known):
    """'did you mean X?' for a likely typing mistake, otherwise the whole list."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return f'did you mean {close[0]}?' if close else f'known: {", ".join(sorted(known))}'


# ----------------------------------------------------------------------------
# keys and their rules

class Not(tuple):
    """In `only`: any value but these."""


def key(default, *, only=None, meaning=False, choices=None, **bounds):
    """A field of a dataclass of keys.

    bounds: at_least, above, below, at_most, of a number;  choices: the strings that it may be
    only: {other key: value, tuple of values, or Not((values))}: where this key has an effect; a list of such
          dicts: in any of these cases. Elsewhere another value than the default is refused.
    meaning: a change makes trained weights mean something else, though it may leave their shapes alone
    """
    return dataclasses.field(default=default, metadata={'only': only, 'meaning': meaning, 'choices': choices, **bounds})


BOUNDS = {'at_least': ('at least', operator.ge), 'above': ('greater than', operator.gt),
          'below': ('less than', operator.lt), 'at_most': ('at most', operator.le)}


def complaint(name, rule, value):
    """A sentence about a value that is out of bounds, or ''."""
    if rule.get('choices') and value not in rule['choices']:
        return f'{name} is one of {", ".join(rule["choices"])}, not {value!r}'
    for bound, (words, holds) in BOUNDS.items():
        if bound in rule and not holds(value, rule[bound]):
            return f'{name} must be {words} {rule[bound]}, not {value}'
    return ''


def obstacle(case, values):
    """The first 'key=value' in the way of a case of `only`, or ''."""
    for name, wanted in case.items():
        wanted = wanted if isinstance(wanted, tuple) else (wanted,)
        if (values[name] in wanted) == isinstance(wanted, Not):
            return f'{name}={values[name]!r}'
    return ''


def complaints(Keys, values):
    """Sentences about values that are out of bounds."""
    found = (complaint(f.name, f.metadata, values[f.name]) for f in dataclasses.fields(Keys) if f.name in values)
    return list(filter(None, found))


def idle(Keys, values):
    """{key: sentence} for the keys that have no effect beside the others and are not at their defaults."""
    found = {}
    for field in dataclasses.fields(Keys):
        cases = field.metadata.get('only') or {}
        obstacles = [obstacle(case, values) for case in (cases if isinstance(cases, list) else [cases])]
        if all(obstacles) and values[field.name] != field.default:
            found[field.name] = f'{field.name}={values[field.name]} has no effect with {obstacles[0]}: leave it out'
    return found


def defaults_of(Keys):
    return {f.name: f.default for f in dataclasses.fields(Keys)}


@dataclasses.dataclass
class Keys:
    """The base of a dataclass of keys. ValueError for a value that is out of bounds or has no effect."""

    def __post_init__(self):
        for sentence in (*complaints(type(self), vars(self)), *idle(type(self), vars(self)).values()):
            raise ValueError(sentence)

    @classmethod
    def stored(cls, values):
        """The keys of a checkpoint, among others in `values`. They may have no effect: older runs were allowed to."""
        keys = cls.__new__(cls)
        vars(keys).update((k, values.get(k, default)) for k, default in defaults_of(cls).items())
        for sentence in complaints(cls, vars(keys)):
            raise ValueError(sentence)
        return keys


# ----------------------------------------------------------------------------
# values: literals of the default's type, nothing that could run code

def literal(node):
    """The number, string or bool that a syntax tree spells; ValueError otherwise."""
    value = ast.literal_eval(node)
    if not isinstance(value, (bool, int, float, str)):
        raise ValueError('neither a number nor a string, True or False')
    return value


def fit(name, value, default):
    """value as the type of default; UserError if it is of another kind. 1e4 counts as an integer, 3 as a float."""
    kind = type(default)
    if type(value) in (int, float) and kind in (int, float) and abs(value) <= sys.float_info.max:  # not so: nan
        if kind is float:
            return float(value)
        if value == int(value) and abs(value) < 2**63:
            return int(value)
    elif type(value) is kind and kind in (bool, str):
        return value
    wants = {bool: 'True or False', int: 'an integer', float: 'a number', str: 'a string'}[kind]
    raise UserError(f'{name} wants {wants} (default {default!r}), not {value!r}')


def numbers(name, text):
    """'1,2,4' -> [1, 2, 4]."""
    try:
        steps = [int(s) for s in text.split(',')]
    except ValueError:
        steps = [0]
    if min(steps) < 1:
        raise UserError(f'--{name} wants numbers from 1 up, as in --{name}=1,2,4; not {text!r}')
    return steps


# ----------------------------------------------------------------------------
# where values come from

def read_file(path):
    """A config file -> {key: value}."""
    try:
        with open(path, encoding='utf-8') as f:
            tree = ast.parse(f.read())
    except (OSError, ValueError) as e:  # ValueError: not UTF-8, or a NUL in the name
        hint = nearest(path, glob.glob('config/*.py') or ['nothing in config/'])
        reason = getattr(e, 'strerror', None) or 'not text'
        raise UserError(f'cannot read the config file {path} ({reason}); {hint}') from e
    except (SyntaxError, RecursionError, MemoryError) as e:
        raise UserError(f'{path}, line {getattr(e, "lineno", 1)}: not Python') from e
    values = {}
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        where = f'{path}, line {node.lineno}'
        if not (isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)):
            raise UserError(f'{where}: a config holds assignments such as  batch_size = 32  and nothing else')
        name = node.targets[0].id
        try:
            values[name] = literal(node.value)
        except (ValueError, TypeError, RecursionError, MemoryError) as e:
            raise UserError(f'{where}: {name} wants a literal such as 32, 3e-4, True or "text"') from e
    return values


def read_flags(argv):
    """['--key=value', '--key'] -> {key: text, or None where there is no '='}."""
    for arg in argv:
        if not arg.startswith('--'):
            raise UserError(f'{arg}: overrides are written --key=value')
    flags = [arg[2:].partition('=') for arg in argv]
    return {name: text if equals else None for name, equals, text in flags}


def read_value(name, text, default):
    """The right-hand side of --key=value as the type of default. A string needs no quotes, and --key alone means True."""
    if text is None:
        if not isinstance(default, bool):
            raise UserError(f'--{name} wants a value: --{name}={default}')
        return True
    if not isinstance(default, str):
        try:
            text = literal(ast.parse(text, mode='eval').body)
        except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
            pass  # no number: fit says what is wanted
    return fit(name, text, default)


def configure(Keys, argv, methods=None):
    """The keys of a script, with the values of a config file and the command line -> one flat dict.

    argv: at most one config file, --key=value, --key for a bool; the type of a default is the rule
    methods: {name: class with a Config}; the key `method` names one, and the keys of its Config are known, too
    A config file NAME.py means out_dir = out/NAME unless something says otherwise.
    """
    try:
        ''.join(argv).encode()
    except UnicodeEncodeError:
        raise UserError('an argument is not UTF-8') from None
    files = [a for a in argv if not a.startswith('-')]
    if len(files) > 1:
        raise UserError(f'at most one config file, and overrides as --key=value: {" ".join(files)}')
    given, flags = read_file(files[0]) if files else {}, read_flags([a for a in argv if a.startswith('-')])
    groups, known = [Keys], defaults_of(Keys)
    if methods:
        method = flags.get('method') or given.get('method', known['method'])
        if method not in methods:
            raise UserError(f'there is no method {method}: {nearest(str(method), methods)}')
        groups.append(methods[method].Config)
        known = {**defaults_of(groups[1]), **known}
        del known['vocab_size']  # the data's, no key
    for k in (*given, *flags):
        if k not in known:
            owners = [m for m in methods or () if k in defaults_of(methods[m].Config)]
            hint = f'it is a key of {" and ".join(owners)}, and method={method}' if owners else nearest(k, known)
            raise UserError(f'unknown key {k}: {hint}')
    if files and 'out_dir' in known:
        given.setdefault('out_dir', os.path.join('out', os.path.splitext(os.path.basename(files[0]))[0]))
    from_file = {**known, **{k: fit(k, v, known[k]) for k, v in given.items()}}
    config = {**from_file, **{k: read_value(k, text, known[k]) for k, text in flags.items()}}
    for group in groups:
        for sentence in complaints(group, config):
            raise UserError(sentence)
        in_file = idle(group, from_file)
        for k, sentence in idle(group, config).items():
            if k in flags or k in in_file:
                raise UserError(sentence)
            config[k] = known[k]  # a key of the file that the command line puts out of use is no mistake
    return config


# ----------------------------------------------------------------------------
# how a script ends

def run(main, Keys=None, methods=None):
    """main(argv) of a script. A UserError becomes one line and exit code 2; Ctrl-C or a closed pipe ends quietly.

    --help prints the head of the file and the keys, if there are any.
    """
    try:
        if Keys and {'-h', '--help'} & set(sys.argv[1:]):
            named = [a for a in sys.argv[1:] if not a.startswith('-') or a.startswith('--method=')]
            keys = configure(Keys, named if methods else [], methods)
            print(sys.modules['__main__'].__doc__.strip(), '\n\nkeys and defaults:',
                  *(f'  --{k}={v}' for k, v in keys.items()), sep='\n')
            return
        main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as e:
        if os.environ.get('LOCAL_RANK', '0') != '0':
            time.sleep(3)  # under torchrun a node's first process speaks for all, and its exit ends us during this
        print('error:', ' '.join(str(e).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `python sample.py | head`: keep the interpreter from flushing again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(130)
