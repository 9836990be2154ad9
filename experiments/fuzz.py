"""Loads malformed files until one brings anything but data or one line of ValueError or OSError.

    python experiments/fuzz.py --files 100000 --seed 0

Each case takes a good set of files (atomic, CSV, TSV, gz, or a zip as it would be downloaded),
damages one of them in one to six ways and loads the set with random settings.
What loads is split, and must add up; what fails must leave nothing behind. The seed of a case that
breaks this is printed: --files 1 --seed SEED shows it again.
"""
import argparse
import contextlib
import gzip
import io
import os
import shutil
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402

PAIRS = [(f'u{u}', f'i{i}', 3 + (u + i) % 3) for u in range(6) for i in range(5)]
NAMES = [f'Größe {i}, "big"' for i in range(5)]
PIECES = [b'\0', b'"', b'\n', b'\r', b'\r\n', b'\t', b',', b';', b'|', b"'", b'\\', b'{', b'[',
          b'\xff', b'\xff\xfe', b'\xfe\xff', b'\xef\xbb\xbf', b'\x1f\x8b', b'PK\x03\x04', b'\x1a',
          b'\xed\xa0\x80', '\u2028'.encode(), b'\x85', b'nan', b'1e999', b'-inf', b'1_0', b':float',
          b':token', b'user_id', b'item_id', b'rating', b'None', b'"' * 7, b'9' * 5000,
          b'x' * 140_000, b'\n' * 300, b',' * 3000]


def table(rows, delimiter, quote):
    """The rows as lines of text; a cell that holds the delimiter or a quote is quoted if asked."""
    def cell(value):
        text = str(value)
        return '"%s"' % text.replace('"', '""') if quote and set(text) & {delimiter, '"'} else text
    return ''.join(delimiter.join(map(cell, row)) + '\n' for row in rows).encode()


def good_sets():
    """{kind: {file name: bytes}}, each of them loads."""
    inter = [('user_id', 'item_id', 'rating'), *PAIRS]
    item = [('item_id', 'title', 'price'), *((f'i{i}', name, i) for i, name in enumerate(NAMES))]
    csv = {'ratings.csv': table(inter, ',', True), 'items.csv': table(item, ';', True)}
    tsv = {'ratings.tsv': table(inter, '\t', False), 'items.tsv': table(item, '\t', False)}
    one = {'all.csv': table([(*row, title) for row, title in zip(
        inter, ['title', *NAMES * 6])], ',', True)}
    typed = {'x.inter': [('user_id:token', 'item_id:token', 'rating:float'), *PAIRS],
             'x.item': [('item_id:token', 'title:token_seq', 'brand:token', 'categories:token_seq'),
                        *((f'i{i}', name, 'B', 'C, D') for i, name in enumerate(NAMES))]}
    atomic = {name: table(rows, '\t', False) for name, rows in typed.items()}
    box = io.BytesIO()
    with zipfile.ZipFile(box, 'w', zipfile.ZIP_DEFLATED) as members:
        for name, body in atomic.items():
            members.writestr('Amazon/' + name, body)
    return {'csv': csv, 'tsv': tsv, 'one': one, 'atomic': atomic,
            'gz': {name + '.gz': gzip.compress(body, mtime=0) for name, body in csv.items()},
            'zip': {'Amazon_Toys_and_Games.zip': box.getvalue()}}


def swap(body, rng):
    """Two cells of a line, or of two lines, change places."""
    cells = body.split(b'\t' if b'\t' in body else b',')
    a, b = rng.integers(0, len(cells), 2)
    cells[a], cells[b] = cells[b], cells[a]
    return (b'\t' if b'\t' in body else b',').join(cells)


def damage(body, rng):
    """The bytes with one defect."""
    at, to = sorted(rng.integers(0, len(body) + 1, 2))
    match rng.integers(0, 9):
        case 0:
            return body[:to]
        case 1:
            return body[:at] + rng.bytes(1) + body[at + 1:]
        case 2:
            return body[:at] + body[min(to, at + 20):]
        case 3:
            return body[:at] + body[at:to] + body[at:]
        case 4:
            return swap(body, rng)
        case 5:
            code = ('utf-16', 'utf-16-le', 'utf-32', 'latin-1', 'utf-8-sig')[rng.integers(5)]
            return body.decode('latin-1' if code == 'latin-1' else 'utf-8', 'replace').encode(code)
        case 6:
            return body[:at] + rng.bytes(rng.integers(1, 30)) + body[at:]
        case _:
            return body[:at] + PIECES[rng.integers(len(PIECES))] + body[at:]


def damaged(body, rng):
    """One to six defects; of a gz file half the time inside it."""
    inside = body[:2] == b'\x1f\x8b' and rng.random() < .5
    body = gzip.decompress(body) if inside else body
    for _ in range(rng.integers(1, 7)):
        body = damage(body, rng)
    return gzip.compress(body, 1) if inside else body


def load(place, kind, files, options):
    """data.load on the files, in the folder place or as if they were downloaded."""
    if kind != 'zip':
        for name, body in files.items():
            (place / name).write_bytes(body)
        return data.load(str(place), **options)

    def download(url, path, most):
        Path(path).write_bytes(files[url.rsplit('/')[-1]])
    data.download = download
    return data.load('toys', str(place), **options)


def case(seed, place, sets):
    """One damaged set; whether it loaded. AssertionError or what data.py let through."""
    rng = np.random.default_rng(seed)
    kind = list(sets)[rng.integers(len(sets))]
    files = dict(sets[kind])
    name = list(files)[rng.integers(len(files))]
    files[name] = damaged(files[name], rng)
    columns = (None, None, ['title'], ['title', 'price'])[rng.integers(4)]
    options = {'core': int(rng.integers(0, 4)), 'min_rating': float(rng.integers(0, 5)),
               'text_columns': columns, 'timestamps': rng.random() < .1}
    try:
        matrix, texts, titles, users, items, low = load(place, kind, files, options)
    except (ValueError, OSError) as error:
        assert type(error) in (ValueError, OSError), f'{type(error).__name__}: {error}'
        assert str(error).isprintable() and len(str(error)) < 3000, 'an error of several lines'
        return False
    assert matrix.shape == low.shape == (len(users), len(items))
    assert len(items) == len(texts) == len(titles)
    assert len(set(users)) == len(users) and len(set(items)) == len(items) and all(users + items)
    assert not any(set(text) & set('\n\r\t') for text in texts + titles)
    if matrix.getnnz(axis=1).max() > 1:
        assert sum(part.nnz for part in data.split(matrix, rng)) == matrix.nnz
    return True


def main():
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--files', type=int, default=100_000, help='malformed files to load')
    parser.add_argument('--seed', type=int, default=0, help='seed of the first one')
    args = parser.parse_args()
    warnings.simplefilter('error')
    sets, start, loaded = good_sets(), time.monotonic(), 0
    memory = '/dev/shm' if os.path.isdir('/dev/shm') else None
    with tempfile.TemporaryDirectory(dir=memory) as top:
        place = Path(top) / 'set'
        for seed in range(args.seed, args.seed + args.files):
            place.mkdir()
            try:
                with contextlib.redirect_stderr(io.StringIO()):
                    loaded += case(seed, place, sets)
                assert not [p for p in place.iterdir() if '.part' in p.name], 'left behind'
                assert len(os.listdir(top)) == 1, 'a file outside the folder'
            except Exception:
                traceback.print_exc()
                sys.exit(f'fuzz: seed {seed} failed')
            shutil.rmtree(place)
    print(f'fuzz: {args.files:,} files from seed {args.seed}: {loaded:,} loaded, '
          f'{args.files - loaded:,} refused in one line, {time.monotonic() - start:.0f} s')


if __name__ == '__main__':
    main()
