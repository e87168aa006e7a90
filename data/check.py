"""
Reads prepared sets, and the latents stored beside them, from end to end: is every byte as it was written?

    python data/check.py NAME...                 NAME: as in --dataset, a folder of data/ or any other

train.py compares the checksums of files up to 64 MB by itself, and of larger ones the sizes only.
"""
import glob
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for lib/
from lib.configurator import UserError, run
from lib.files import sha256_of
from lib.tokens import folder_of, read_meta


def checksums(folder):
    """{path: the sha256 that it should have}."""
    meta = read_meta(folder)
    sums = {os.path.join(folder, split + '.bin'): meta[split].get('sha256')
            for split in ('train', 'val') if split in meta}
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), 'latents_*', 'meta.json'))):
        with open(path, encoding='utf-8') as f:
            stored = json.load(f).get('sha256', {})
        sums |= {os.path.join(os.path.dirname(path), split + '.bin'): stored.get(split)
                 for split in ('train', 'val')}
    return sums


def main(argv):
    if not argv or argv[0].startswith('-'):
        raise UserError('which data? python data/check.py NAME...')
    damaged = []
    for name in argv:
        for path, wanted in checksums(folder_of(name)).items():
            whole = wanted and os.path.isfile(path) and sha256_of(path) == wanted
            print(f'{path}: {"whole" if whole else "DAMAGED" if wanted else "written without a checksum"}')
            damaged += [path] if wanted and not whole else []
    if damaged:
        raise UserError(f'not as they were written: {", ".join(damaged)}; prepare them again')


if __name__ == '__main__':
    run(main)
