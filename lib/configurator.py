"""
Hyper-parameters: defaults from a dataclass of keys, overridden by a config file, then by --key=value.

nanoGPT's "poor man's configurator" with three differences: a config file is read, not run, so it may
hold only comments and assignments of numbers, strings, True and False; each key's rule stands beside its
default; and a mistake ends with one line that says what would have been right.
"""
import ast
import dataclasses
import difflib
import glob
import operator
import os
import sys
import time

from lib.signals import text_streams


class UserError(Exception):
    """A mistake by the user: the message is one line that says what is wrong and what would be right."""


def nearest(name, known):
    """'did you mean X?' for a likely typing mistake, 'known: ' and the whole list otherwise."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return f'did you mean {close[0]}?' if close else f'known: {", ".join(sorted(known))}'


# ----------------------------------------------------------------------------
# keys and their rules

class Not(tuple):
    """In `only`: any value but these."""


def key(default, *, at_least=None, above=None, below=None, at_most=None,
        choices=None, only=None, meaning=False, prose=False):
    """A field of a dataclass of keys, with the rule for its values.

    default: a bool, int, float or string, whose type is the key's: 1.0, not 1, for a float
    at_least, above, below, at_most: bounds of a number;  choices: the strings that are allowed
    only: {other key: a value, a tuple of values, or Not([values])}: the settings in which this key has an
          effect; or a list of such dicts, any of which is enough. Elsewhere only the default is accepted.
    meaning: whether a change gives trained weights another meaning, even if their shapes stay the same
    prose: whether the string is for the model to read; any other may be a path, in which ~ is your home
    """
    rule = dict(at_least=at_least, above=above, below=below, at_most=at_most, choices=choices)
    return dataclasses.field(default=default, metadata={**rule, 'only': only, 'meaning': meaning,
                                                        'prose': prose})


BOUNDS = {'at_least': ('at least', operator.ge), 'above': ('greater than', operator.gt),
          'below': ('less than', operator.lt), 'at_most': ('at most', operator.le)}


def complaint(name, rule, value):
    """A sentence about a value that breaks its rule (the metadata of a field), or ''."""
    if rule.get('choices') and value not in rule['choices']:
        return f'{name} is one of {", ".join(rule["choices"])}, not {value!r}'
    for bound, (words, holds) in BOUNDS.items():
        if rule.get(bound) is not None and not holds(value, rule[bound]):
            return f'{name} must be {words} {rule[bound]}, not {value}'
    return ''


def obstacle(case, values):
    """The first 'key=value' that a case of `only` does not allow, or ''."""
    for name, wanted in case.items():
        wanted = wanted if isinstance(wanted, tuple) else (wanted,)
        if (values[name] in wanted) == isinstance(wanted, Not):
            return f'{name}={values[name]!r}'
    return ''


def complaints(Keys, values):
    """A sentence about each value that breaks its rule; `values` may lack keys and hold others."""
    found = (complaint(f.name, f.metadata, values[f.name])
             for f in dataclasses.fields(Keys) if f.name in values)
    return list(filter(None, found))


def idle(Keys, values):
    """{key: sentence} for the keys that differ from their defaults but have no effect, given the others."""
    found = {}
    for field in dataclasses.fields(Keys):
        cases = field.metadata.get('only') or {}
        obstacles = [obstacle(case, values) for case in (cases if isinstance(cases, list) else [cases])]
        if all(obstacles) and values[field.name] != field.default:
            name, value = field.name, values[field.name]
            found[name] = f'{name}={value} has no effect with {obstacles[0]}: leave it out'
    return found


def defaults_of(Keys):
    return {f.name: f.default for f in dataclasses.fields(Keys)}


def method_keys(Method):
    """A method's keys that a user can set, with their defaults; vocab_size comes from the data."""
    return {name: default for name, default in defaults_of(Method.Config).items() if name != 'vocab_size'}


@dataclasses.dataclass
class Keys:
    """The base class of a dataclass of keys. ValueError for a value that breaks its rule or has no effect."""

    def __post_init__(self):
        if found := [*complaints(type(self), vars(self)), *idle(type(self), vars(self)).values()]:
            raise ValueError(found[0])

    @classmethod
    def stored(cls, values):
        """The keys of a checkpoint, which are in `values` among others; those missing have their defaults.

        Keys without effect are accepted here, because the first edition accepted them in training.
        ValueError for a value that breaks its rule, UserError for one of another type.
        """
        keys, defaults = cls.__new__(cls), defaults_of(cls)
        vars(keys).update((k, fit(k, values.get(k, default), default)) for k, default in defaults.items())
        if found := complaints(cls, vars(keys)):
            raise ValueError(found[0])
        return keys


# ----------------------------------------------------------------------------
# values: literals of the default's type, nothing that could run code

def literal(node):
    """The number, string or bool that a syntax tree stands for; ValueError if it is anything else."""
    value = ast.literal_eval(node)
    if not isinstance(value, (bool, int, float, str)):
        raise ValueError('neither a number nor a string, True or False')
    return value


def fit(name, value, default):
    """value, with the type of default: 1e4 may be an integer, 3 a float. UserError if it has another type."""
    kind = type(default)
    numeric = type(value) in (int, float) and kind in (int, float)
    if numeric and abs(value) <= sys.float_info.max:  # False for nan
        if kind is float:
            return float(value)
        if value == int(value) and abs(value) < 2**63:
            return int(value)
    elif type(value) is kind and kind in (bool, str):
        if '\0' in str(value):  # in a name of a file it is a ValueError, wherever that is opened
            raise UserError(f'{name} holds the character \\0, which no text and no name of a file has')
        return value
    wants = {bool: 'True or False', int: 'an integer', float: 'a number', str: 'a string'}[kind]
    raise UserError(f'{name} wants {wants} (default {default!r}), not {value!r}')


MOST_STEPS = 1_000_000  # of a sampler; no text has so many tokens


def numbers(name, text):
    """'1,2,4' -> [1, 2, 4]: steps of a sampler."""
    try:
        steps = [int(s) for s in text.split(',')]
    except ValueError:
        steps = [0]
    if not all(1 <= n <= MOST_STEPS for n in steps):
        raise UserError(f'--{name} wants numbers of at least 1 and at most {MOST_STEPS}, '
                        f'as in --{name}=1,2,4; not {text!r}')
    return steps


# ----------------------------------------------------------------------------
# where values come from

def read_file(path):
    """A config file -> {key: value}."""
    try:
        with open(path, encoding='utf-8-sig') as f:  # an editor may have put a BOM before the text
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
        target = node.targets[0] if isinstance(node, ast.Assign) and len(node.targets) == 1 else None
        if not isinstance(target, ast.Name):
            raise UserError(f'{where}: a config holds assignments such as  batch_size = 32  and nothing else')
        try:
            values[target.id] = literal(node.value)
        except (ValueError, TypeError, RecursionError, MemoryError) as e:
            raise UserError(f'{where}: {target.id} wants a literal such as 32, 3e-4, True or "text"') from e
    return values


def read_flags(argv):
    """['--key=value', '--key'] -> {key: text, or None where there is no '='}."""
    for arg in argv:
        if not arg.startswith('--'):
            raise UserError(f'{arg}: overrides are written --key=value')
    flags = [arg[2:].partition('=') for arg in argv]
    return {name: text if equals else None for name, equals, text in flags}


def read_value(name, text, default):
    """The value in --key=value, with the type of default. Strings need no quotes; --key alone means True."""
    if text is None:
        if not isinstance(default, bool):
            raise UserError(f'--{name} wants a value: --{name}={default}')
        return True
    if not isinstance(default, str):
        try:
            text = literal(ast.parse(text, mode='eval').body)
        except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
            pass  # it stays a string, and `fit` says what is wanted
    return fit(name, text, default)


def configure(Keys, argv, methods=None):
    """All keys of a script, with the values that config file and command line give them -> one flat dict.

    argv: at most one config file, and --key=value, or --key for a bool. A value has its default's type.
    methods: {name: class with a Config}. If given, the key `method` names one, whose keys are added.

    A config file NAME.py sets out_dir = out/NAME unless out_dir is given. UserError for any mistake.
    """
    try:
        ''.join(argv).encode()
    except UnicodeEncodeError:
        locale = sys.getfilesystemencoding()
        hint = f', because Python takes this locale for {locale}: set PYTHONUTF8=1' * (locale != 'utf-8')
        raise UserError('an argument is not UTF-8' + hint) from None
    files = [a for a in argv if not a.startswith('-')]
    if len(files) > 1:
        raise UserError(f'at most one config file, and overrides as --key=value: {" ".join(files)}')
    given, flags = read_file(files[0]) if files else {}, read_flags([a for a in argv if a.startswith('-')])
    groups, known = [Keys], defaults_of(Keys)
    if methods:
        method = given.get('method', known['method'])
        if 'method' in flags:
            method = read_value('method', flags['method'], known['method'])
        if method not in methods:
            raise UserError(f'there is no method {method}: {nearest(str(method), methods)}')
        groups.append(methods[method].Config)
        # if both have a key, the script's default counts
        known = {**known, **method_keys(methods[method]), **known}
    for k in (*given, *flags):
        if k not in known:
            owners = ' and '.join(m for m in methods or () if k in method_keys(methods[m]))
            hint = f'it is a key of {owners}, and method={method}' if owners else nearest(k, known)
            raise UserError(f'unknown key {k}: {hint}')
    if files and 'out_dir' in known:
        given.setdefault('out_dir', os.path.join('out', os.path.splitext(os.path.basename(files[0]))[0]))
    from_file = {**known, **{k: fit(k, v, known[k]) for k, v in given.items()}}
    config = {**from_file, **{k: read_value(k, text, known[k]) for k, text in flags.items()}}
    prose = {f.name for group in groups for f in dataclasses.fields(group) if f.metadata.get('prose')}
    config = {k: os.path.expanduser(v) if isinstance(v, str) and k not in prose else v
              for k, v in config.items()}
    for group in groups:
        if found := complaints(group, config):
            raise UserError(found[0])
        idle_in_file = idle(group, from_file)
        for k, sentence in idle(group, config).items():
            if k in flags or k in idle_in_file:
                raise UserError(sentence)
            config[k] = known[k]  # the command line left the setting that the file meant this key for
    return config


# ----------------------------------------------------------------------------
# how a script ends

def run(main, Keys=None, methods=None):
    """Runs main(argv) of a script. A UserError becomes one line and exit code 2, and so does what the machine
    refuses: memory, or a write behind which there is a full disk.

    Ctrl-C or a closed pipe ends it quietly. If Keys are given (and methods, as for `configure`), --help
    prints the script's docstring and all keys.
    """
    with text_streams():
        try:
            if Keys and {'-h', '--help'} & set(sys.argv[1:]):
                named = [a for a in sys.argv[1:] if not a.startswith('-') or a.startswith('--method=')]
                keys = configure(Keys, named if methods else [], methods)
                print(sys.modules['__main__'].__doc__.strip(), '\n\nkeys and defaults:',
                      *(f'  --{k}={v}' for k, v in keys.items()), sep='\n')
            else:
                main(sys.argv[1:])
            sys.stdout.flush()
        except UserError as e:
            end(e)
        except KeyboardInterrupt:
            sys.exit(130)
        except BrokenPipeError:  # as in `python sample.py | head`
            sys.exit(130)
        except OSError as e:
            end(f'cannot read or write: {e}')
        except (MemoryError, RuntimeError, TypeError) as e:
            if not is_out_of_memory(e):
                raise
            keys = [f'--{k}' for k in SAVES_MEMORY if Keys and k in defaults_of(Keys)]
            end('out of memory' + f'; less of it is needed with a smaller {", ".join(keys)}' * bool(keys))


SAVES_MEMORY = 'micro_batch', 'batch_size', 'block_size', 'num_samples', 'steps'


def is_out_of_memory(e):
    """Whether this is how Python, or torch on some device, says that memory is used up."""
    said = f'{type(e).__name__} {e}'.lower()
    return any(words in said for words in ('memoryerror', 'out of memory', 'defaultcpuallocator',
                                           'storage size calculation overflowed',
                                           'overflow when unpacking long'))  # a size of 2^63


def end(message):
    """Says what was wrong, in one line, and exits with code 2."""
    if os.environ.get('LOCAL_RANK', '0') != '0':
        time.sleep(3)  # under torchrun a node's first process speaks for all, and its exit ends this one
    print('error:', ' '.join(str(message).split()), file=sys.stderr)
    sys.exit(2)
