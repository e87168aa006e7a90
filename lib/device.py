"""
Devices: finding one by name, naming it in print, and compiling for it.
"""
import os
import shutil

import torch

from lib.configurator import UserError


def pick_device(name):
    """'auto' | 'cpu' | 'cuda' | 'mps' -> torch.device; under torchrun each process takes its own GPU."""
    name = name if name != 'auto' else 'cuda' if torch.cuda.is_available() else 'cpu'
    there = {'cpu': True, 'cuda': torch.cuda.is_available(), 'mps': torch.backends.mps.is_available()}
    if not there.get(name):
        found = ', '.join(k for k, v in there.items() if v)
        raise UserError(f'there is no device {name!r} on this machine; it has: {found}')
    if name == 'cuda':
        torch.cuda.set_device(int(os.environ.get('LOCAL_RANK', 0)))
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
