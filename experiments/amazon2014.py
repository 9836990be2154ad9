"""The raw Amazon files of 2014 to the atomic files that data.py reads.

    python experiments/amazon2014.py reviews_Beauty_5.json.gz meta_Beauty.json.gz data/amazon-beauty

The files are McAuley's, http://snap.stanford.edu/data/amazon/productGraph/categoryFiles/, with X
one of Beauty, Toys_and_Games, Tools_and_Home_Improvement, Office_Products. The reviews are the
5-core of all ratings, which contains the 5-core of the high ones. Reviews are JSON, one a line;
items are Python literals, which are parsed and never run. Only reviewed items are written, with a
column description that RecBole's files do not have. Lines that cannot be read, or that lack an
id, a rating or a time, are counted and left out: data.py refuses a file with such rows.
"""
import argparse
import ast
import gzip
import json
import math
import os
import re
import sys
import warnings
import zlib
from pathlib import Path

MAX_LINE = 1 << 20                     # bytes: no honest record is longer
REVIEW = 'user_id:token\titem_id:token\trating:float\ttimestamp:float'
ITEM = ('item_id:token\ttitle:token_seq\tbrand:token_seq\tcategories:token_seq\t'
        'description:token_seq')


def convert(source, path, header, row):
    """Write row(line) of each line of a gz file as cells of an atomic file; None leaves it out."""
    bad = 0
    with gzip.open(source) as lines, open(f'{path}.part', 'w', encoding='utf8') as file:
        file.write(header + '\n')
        while line := lines.readline(MAX_LINE):
            try:
                cells = row(line.decode())
            except (ValueError, SyntaxError, TypeError, KeyError, AttributeError, MemoryError,
                    RecursionError):                           # nested too deep
                bad += 1
                continue
            if cells:
                cells = (' '.join(str(cell).split()) for cell in cells)
                file.write('\t'.join(cells).encode(errors='replace').decode() + '\n')
    os.replace(f'{path}.part', path)
    if bad:
        print(f'note: {source}: {bad} malformed lines skipped', file=sys.stderr)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('reviews', help='reviews_X_5.json.gz')
    p.add_argument('items', help='meta_X.json.gz')
    p.add_argument('folder', type=Path, help='data/amazon-beauty, -toys-games, '
                   '-tools-home-improvement or -office-products')
    args = p.parse_args(argv)
    reviewed, written = set(), set()

    def review(line):
        record = json.loads(line)
        user, asin = record['reviewerID'].strip(), record['asin'].strip()
        rating, seconds = float(record['overall']), record['unixReviewTime']
        if not (user and asin and math.isfinite(rating) and math.isfinite(seconds)):
            raise ValueError('no id or no number')
        reviewed.add(asin)
        return user, asin, rating, seconds

    def item(line):
        asin = re.search("'asin': '(.*?)'", line)
        if asin and asin[1] not in reviewed:                   # spares most of them the slow way
            return None
        record = ast.literal_eval(line)
        if record['asin'] in reviewed:
            names = [name for path in record.get('categories') or [] for name in path]
            if record['asin'] in written:                      # of a repeated item the first counts
                return None
            written.add(record['asin'])
            return (record['asin'], record.get('title') or '', record.get('brand') or '',
                    ', '.join(dict.fromkeys(names)), record.get('description') or '')
    try:
        args.folder.mkdir(parents=True, exist_ok=True)
        warnings.simplefilter('ignore')                        # odd escapes in a literal
        for source, suffix, header, row in ((args.reviews, '.inter', REVIEW, review),
                                            (args.items, '.item', ITEM, item)):
            convert(source, args.folder / (args.folder.resolve().name + suffix), header, row)
    except (OSError, EOFError, zlib.error) as error:
        sys.exit(f'amazon2014: {error}')


if __name__ == '__main__':
    main()
