import os
import sys

import pytest
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
torch.set_num_threads(1)  # the tests' tensors are tiny: threads only get in each other's way


def pytest_addoption(parser):
    parser.addoption('--slow', action='store_true', help='also true sizes: minutes and gigabytes')


def pytest_collection_modifyitems(config, items):
    for item in items:
        if 'slow' in item.keywords and not config.getoption('--slow'):
            item.add_marker(pytest.mark.skip(reason='slow: run it with --slow'))
