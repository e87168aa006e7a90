"""
Devices: finding one by name, naming it in print, and compiling for it.
"""
import os
import shutil

import torch

from lib.configurator import UserError
from lib.distributed import local_rank, rank_and_world


def pick_device(name):
    """'auto' | 'cpu' | 'cuda' | 'cuda:1' | 'mps' -> torch.device.

    'cuda' is the first GPU; under torchrun each process takes its own. The GPU chosen becomes torch's current
    device. UserError if there is none.
    """
    gpus = [f'cuda:{i}' for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    there = ['cpu', *['cuda'] * bool(gpus), *gpus, *['mps'] * torch.backends.mps.is_available()]
    name = name if name != 'auto' else 'cuda' if gpus else 'cpu'
    if name not in there:
        raise UserError(f'there is no device {name!r} on this machine; it has: {", ".join(there)}')
    rank, world = rank_and_world()
    if name in gpus and world > 1:
        raise UserError(f'--device={name} is one GPU for {world} processes; --device=cuda gives each its own')
    if gpus and name != 'cpu':
        mine = f'cuda:{local_rank()}' if name == 'cuda' else name
        if mine not in gpus:
            raise UserError(f'there is no {mine} for process {rank}, only {", ".join(gpus)}: start fewer')
        torch.cuda.set_device(mine)
        name = 'cuda'
    return torch.device(name)


def device_name(device):
    """'NVIDIA H100 80GB HBM3', or 'cpu (8 threads)'."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name()
    return f'{device.type} ({torch.get_num_threads()} threads)'


def compile_in_place(modules, device, required=True):
    """torch.compile without a wrapper module, so that names in the state dict stay as they are.

    If the device is a CPU and no C++ compiler is installed: UserError, or unless it is required, a line that
    says so and no compiling.
    """
    compilers = os.environ.get('CXX', 'g++'), 'g++', 'clang++', 'cl'
    if device.type == 'cpu' and not any(map(shutil.which, compilers)):
        if not required:
            print('no C++ compiler (g++ or clang++) is installed: this run does without compile=True, and is '
                  'slower')
            return
        raise UserError('compile=True needs a C++ compiler (g++ or clang++) on a CPU; install one, '
                        'or do without: --compile=False')
    for module in modules:
        module.compile()
