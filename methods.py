"""
The methods by name, and the way from a name or a folder to one.

    method, config = open_run('out/NAME', 'cpu')          a run of train.py, its averaged weights in eval mode
    x = method.sample(16, steps=32)                       ids (16, L)
    encoder = open_encoder('out/NAME', 'cpu')             a frozen encoder, of the hub or of our own
"""
import os

from baselines.ar import AR
from baselines.cadd import CADD
from baselines.candi import CANDI
from baselines.dcd import DCD
from baselines.duo import Duo
from baselines.duo_distilled import DistilledDuo
from baselines.flm import FLM
from baselines.ssmd import SSMD
from baselines.vadd import VADD
from ladd import LADD
from ldlm import LDLM
from lib.checkpoint import averaged_weights, fill, fingerprint, is_run, load
from lib.configurator import UserError
from lib.encoders import HubEncoder, RunEncoder, check_tokenizer
from lib.hub import load_published
from mdlm import MDLM

METHODS = {'mdlm': MDLM, 'ladd': LADD, 'ldlm': LDLM,
           'ar': AR, 'cadd': CADD, 'candi': CANDI, 'duo': Duo, 'duo_distilled': DistilledDuo, 'flm': FLM,
           'ssmd': SSMD, 'vadd': VADD}


def build(config):
    """The untrained method that a flat config describes, which may hold other keys too.

    UserError if it describes none.
    """
    Method = METHODS.get(config['method'])
    if not Method:
        raise UserError(f'there is no method {config["method"]}; there are: {", ".join(METHODS)}')
    try:
        return Method(Method.Config.stored(config))
    except ValueError as e:
        raise UserError(f'{config["method"]}: {e}') from e


def open_run(out_dir, device):
    """-> (the method in eval mode on device, with its averaged weights; its flat config, with `step`).

    An encoder that lay beside the run in training is looked for beside it now, wherever Python was started.
    """
    checkpoint = load(os.path.join(out_dir, 'ckpt.pt'))
    method, weights = build(checkpoint['config']), averaged_weights(checkpoint)
    fill(method, weights, f'{out_dir}/ckpt.pt does not fit today\'s {method.name}; train again with '
                          '--init_from=scratch')
    if not all(w.isfinite().all() for w in weights.values()):
        raise UserError(f'{out_dir} has weights that are not finite: its training diverged; train again with '
                        '--init_from=scratch and a lower --learning_rate')
    method.encoder_name = moved(method.encoder_name, checkpoint['config'].get('out_dir', out_dir), out_dir)
    return method.to(device).eval(), {**checkpoint['config'], 'step': checkpoint['step']}


def moved(name, old_base, new_base):
    """The new place of a folder that was moved along with another one; its old name if there is none."""
    if not name or os.path.isabs(name):
        return name
    place = os.path.normpath(os.path.join(new_base, os.path.relpath(name, old_base)))
    return place if os.path.isdir(place) else name


def open_published(name, device):
    """A hub id or folder of published weights (lib/hub.py) -> (method in eval mode on device, its config)."""
    config, state = load_published(name)
    method = build(config)
    fill(method, state, f'the weights of {name} do not fit its config.json')
    return method.to(device).eval(), config


def open_encoder(name, device):
    """name: a hub id, a folder of its format, or out/NAME of our AR -> a frozen encoder.

    UserError if there is none.
    """
    if not is_run(name):
        return HubEncoder(name, device)
    method, config = open_run(name, device)
    if method.likelihood != 'exact':  # it reads from left to right, as a language model of the hub does
        raise UserError(f'the encoder {name} is {method.name}; it has to be AR, or a model of the hub')
    return RunEncoder(method, config)


def with_copula(method, config, name, device):
    """An MDLM, its config, and out/NAME of an AR -> DCD of both, and its config.

    UserError unless they are that, and of the same kind of texts.
    """
    ar, theirs = open_run(name, device)
    for k in ('vocab_size', 'tokenizer', 'wrap', 'block_size'):
        if theirs.get(k) != config.get(k):
            raise UserError(f'--copula={name} has another {k} than the MDLM')
    try:
        return DCD(method, ar).eval(), {**config, 'method': 'dcd'}
    except ValueError as e:
        raise UserError(e) from e


def attach_encoder(method, data, device):
    """Opens the frozen encoder that a method names and gives it to the method -> its fingerprint.

    data: None for random tokens, which mean nothing to any encoder
    UserError unless it can read the data source and fits the method.
    """
    encoder = open_encoder(method.encoder_name, device)
    if data is not None:
        check_tokenizer(encoder, data, method.wants_summary)
    try:
        method.attach(encoder)
    except ValueError as e:
        raise UserError(e) from e
    return fingerprint(encoder.model)
