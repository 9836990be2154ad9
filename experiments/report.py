"""What llminit.py printed, as one table: python experiments/report.py FILE [FILE ...]

FILE holds result rows with their header lines, as they come from

    python llminit.py ... | tail -3 >> FILE

Rows that differ only in seed, epoch and time are one cell: mean +- standard deviation over the
seeds, and the gain of NDCG@10 over strategy none of the same model. Numpy only.
"""
import argparse
import sys
from collections import defaultdict

import numpy as np

VARIES = ('Recall@10', 'NDCG@10', 'seed', 'best epoch', 'seconds', 'parameters')


def read_rows(path):
    """[{column: text}] of the Markdown rows in a file; a row counts under the last header."""
    header, rows = None, []
    with open(path, encoding='utf8') as file:
        for line in file:
            cells = [cell.strip() for cell in line.strip().strip('|').split('|')]
            if cells[0] == 'dataset':
                header = cells
            elif header and len(cells) == len(header) and set(cells[0]) != {'-'}:
                rows.append(dict(zip(header, cells)))
    return rows


def spread(values):
    """'0.1234 +- 0.0012': mean and standard deviation (n - 1) over the seeds."""
    sigma = f' +- {np.std(values, ddof=1):.4f}' if len(values) > 1 else ''
    return f'{np.mean(values):.4f}{sigma}'


def table(rows):
    """Yields the lines of the table, cells in the order in which they were first printed."""
    cells = defaultdict(dict)
    for row in rows:
        key = tuple((name, text) for name, text in row.items() if name not in VARIES)
        cells[key][row['seed']] = row                          # a seed run twice counts once
    base = {}
    columns = list(dict.fromkeys(name for key in cells for name, _ in key))
    yield f'| {" | ".join(columns)} | seeds | Recall@10 | NDCG@10 | over none | seconds |'
    yield '| ' + ' | '.join(['---'] * (len(columns) + 5)) + ' |'
    for key, seeds in cells.items():
        what = dict(key)
        recall, ndcg, seconds = (np.array([float(row[name]) for row in seeds.values()])
                                 for name in ('Recall@10', 'NDCG@10', 'seconds'))
        group = tuple(text for name, text in key if name in ('dataset', 'model', 'seen', 'preset'))
        if what['strategy'] == 'none':
            base[group] = ndcg.mean()
        gain = f'{ndcg.mean() / base[group] - 1:+.1%}' if group in base else ''
        yield (f'| {" | ".join(what.get(name, "") for name in columns)} | {len(seeds)} | '
               f'{spread(recall)} | {spread(ndcg)} | {gain} | {seconds.mean():.0f} |')


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('files', nargs='+', metavar='FILE')
    args = p.parse_args()
    try:
        rows = [row for path in args.files for row in read_rows(path)]
    except OSError as error:
        sys.exit(f'report: {error}')
    if not rows:
        sys.exit(f'report: no result rows in {", ".join(args.files)}')
    print('\n'.join(table(rows)))


if __name__ == '__main__':
    main()
