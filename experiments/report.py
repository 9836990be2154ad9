"""Tables and figures of the runs in a results file of run.py.

    python experiments/report.py table RESULTS.jsonl                       # Markdown
    python experiments/report.py table RESULTS.jsonl --against rand --show valid cost brief
    python experiments/report.py plot FILE.png RESULTS.jsonl --x dim       # or cold, users, epoch
    python experiments/report.py time RESULTS.jsonl                        # minutes

Runs that differ in nothing but the seed are one row: mean +- standard deviation (n - 1) over the
seeds; of parameters, epochs and spectra the mean, of seconds the median. What all runs share stands
above the table; a setting that only some rows have stands beside their strategy. One table for each
protocol (--seen, --preset), datasets side by side as in Table 1 of the paper, whose figures stand
beside ours where the runs have its protocol.

--show brief leaves out Recall@10, p and the number of seeds.

gain is the relative gain in NDCG@10 over the row of the same settings with strategy `none` (or
--against), p a paired t-test over the users (scipy.stats.ttest_rel): of each user the mean NDCG@10
over the seeds that both rows have. Corrected by Holm's method for all comparisons of the table.
The users are the sample, not the seeds: a p says that these models differ for users like these.

This file knows the results file and nothing else. numpy and scipy; plot also asks for matplotlib.
"""
import argparse
import base64
import json
import os
import sys
import zlib
from collections import Counter, defaultdict

import numpy as np
import scipy.stats

PROTOCOL = 'seen', 'preset'
NEEDED = {*PROTOCOL, 'dataset', 'seed', 'strategy', 'model', 'training', 'K', 'test', 'valid',
          'curve', 'best epoch', 'parameters', 'seconds', 'by training interactions, from'}
APART = ('dataset', 'seed', *PROTOCOL)                   # settings that are no column
OF_STRATEGY = ('strategy', 'encoder', 'endpoint', 'whiten', 'popular', 'pool', 'lr', 'chat',
               'users', 'base')
ORDER = ('model', 'encoder', 'dim', 'cold', 'strategy')  # columns; others stand with the strategy
WORDS = ('lightgcn', 'sgl', 'sgcl', 'morec', 'bpr', 'ease', 'l3ae', 'alpharec', 'llmrank',
         'llmrec', 'mpnet', 'none', 'rand', 'uni', 'var', 'noise', 'pca', 'joint', 'cf', 'random',
         'text')
METRICS = 'Recall@10', 'NDCG@10'
# Table 1 [paper]: Recall@10/NDCG@10 of none, rand, uni, var, with seen items left in the ranking.
PAPER = {
    ('beauty', 'lightgcn'): '.0910/.0432 .0960/.0467 .1006/.0469 .1019/.0485',
    ('beauty', 'sgl'): '.1017/.0474 .1069/.0513 .1101/.0520 .1106/.0530',
    ('beauty', 'sgcl'): '.1027/.0499 .1094/.0512 .1115/.0513 .1104/.0522',
    ('toys', 'lightgcn'): '.0775/.0360 .0805/.0387 .0806/.0388 .0808/.0389',
    ('toys', 'sgl'): '.0832/.0380 .0885/.0418 .0920/.0424 .0927/.0427',
    ('toys', 'sgcl'): '.0828/.0382 .0929/.0418 .0923/.0422 .0941/.0421',
    ('tools', 'lightgcn'): '.0574/.0283 .0612/.0313 .0633/.0319 .0633/.0317',
    ('tools', 'sgl'): '.0580/.0284 .0692/.0337 .0676/.0333 .0686/.0339',
    ('tools', 'sgcl'): '.0585/.0294 .0651/.0326 .0650/.0327 .0646/.0327',
    ('office', 'lightgcn'): '.0745/.0365 .0773/.0387 .0791/.0395 .0816/.0414',
    ('office', 'sgl'): '.0669/.0297 .0810/.0426 .0773/.0350 .0794/.0421',
    ('office', 'sgcl'): '.0647/.0298 .0770/.0365 .0742/.0354 .0776/.0366',
    ('beauty', 'morec'): '.0857/.0397', ('toys', 'morec'): '.0793/.0362',          # Table 3
}
OF_PAPER = dict(dim=128, cold=0, encoder='mpnet', pool='mean', core=5, min_rating=4.,
                text_columns=None)       # settings of these figures; it names no training
# Okabe and Ito: told apart by colour-blind readers; markers and dashes tell them apart in grey
COLOURS = '#000000', '#E69F00', '#0072B2', '#009E73', '#D55E00', '#CC79A7', '#56B4E9'
MARKERS, DASHES = 'osD^vPX', ('-', '--', '-.', ':')


def check(run):
    """ValueError, KeyError or TypeError where a run lacks what a table or figure may show."""
    if missing := NEEDED - {*run, *run['settings']}:
        raise ValueError(f'no {", ".join(sorted(missing))}')
    numbers = [run['seconds'], run['parameters'], run['best epoch'], run['settings']['seed']]
    numbers += [run.get('calls', 0), run.get('tokens', 0)]
    numbers += [run[part][name] for part in ('test', 'valid') for name in METRICS]
    if run.setdefault('spectrum', {}) != {}:               # the models of peers.py have none
        numbers += [run['spectrum'][one][what] for one in ('users', 'items')
                    for what in ('abundance', 'effective rank')]
    numbers += [ndcg for _, ndcg, _ in run['curve']]
    numbers += [part['NDCG@10'] for part in run['by training interactions, from'].values()]
    sum(numbers)                                                       # TypeError for other things
    words = [run['settings'][name] for name in ('dataset', 'model', 'strategy', *PROTOCOL)]
    ''.join([*words, *run['training']])


def tell_training(runs):
    """Makes settings of what runs of one model and preset were trained with differently."""
    found = defaultdict(set)
    for run in runs:
        for name, value in run['training'].items():
            found[run['settings']['model'], run['settings']['preset'], name].add(str(value))
    for name in {name for (_, _, name), values in found.items() if len(values) > 1}:
        for run in runs:
            value = run['training'].get(name)
            run['settings'][name] = str(value) if isinstance(value, (list, dict)) else value


def read(paths, every=False):
    """The runs of results files, [dict]; of runs with equal settings the last, or every one. dim is
    the K that a run has, also where its strategy keeps all dimensions."""
    runs = {}
    for path in paths:
        with open(path, encoding='utf8', errors='replace') as file:
            for number, line in enumerate(file, 1):
                try:
                    run = json.loads(line)
                    run['ndcg'] = users_ndcg(run)
                    check(run)
                    key = json.dumps([run['settings'], run.get('training')], sort_keys=True)
                    runs[key, every and (path, number)] = run
                    run['settings']['dim'] = run['K']
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError,
                        zlib.error) as error:
                    print(f'note: {path} line {number} left out ({error!r})', file=sys.stderr)
    if not runs:
        raise ValueError(f'no runs in {", ".join(paths)}')
    settings = [run['settings'] for run in runs.values()]
    asked = {(one.get('encoder'), one.get('endpoint')) for one in settings}
    if len(asked) == len({encoder for encoder, _ in asked}):           # the encoder says it all
        for one in settings:
            one.pop('endpoint', None)
    tell_training(runs.values())
    return list(runs.values())


def users_ndcg(run):
    """NDCG@10 of each user (n,), from the packed rank of the user's one target."""
    ranks = np.frombuffer(zlib.decompress(base64.b64decode(run['ranks'])), np.uint8)
    ndcg = np.where(ranks < 10, 1 / np.log2(2. + ranks), 0)
    if abs(ndcg.mean() - run['test']['NDCG@10']) > 1e-9:
        raise ValueError('the ranks do not give the NDCG@10')
    return ndcg


def freeze(settings, without=()):
    """Settings as a key of a dict."""
    return tuple(sorted((name, value) for name, value in settings.items() if name not in without))


def papers(run):
    """'Recall@10/NDCG@10' of a run in the paper's Table 1 or 3, '-' if it is not there."""
    one = run['settings']
    found = PAPER.get((one['dataset'], one['model']), '').split()
    if any(one.get(name) != value for name, value in OF_PAPER.items()):
        return '-'
    strategies = ('full',) if one['model'] == 'morec' else ('none', 'rand', 'uni', 'var')
    return dict(zip(strategies, found)).get(one['strategy'], '-')


def place(run):
    """Where a run stands in a table: by its columns, words as in WORDS, others behind them."""
    values = [run['settings'].get(name) for name in ORDER]
    return [(WORDS.index(value) if value in WORDS else len(WORDS), value)
            if isinstance(value, str) else (0, value or 0) for value in values]


def group(runs):
    """{settings but dataset and seed: {dataset: {seed: run}}}, in the order of the columns."""
    rows = defaultdict(lambda: defaultdict(dict))
    for run in sorted(runs, key=place):
        one = run['settings']
        rows[freeze(one, ('dataset', 'seed'))][one['dataset']][one['seed']] = run
    return rows


def spread(values, digits=4):
    """'0.1234 +- 0.0012', of one seed without the second."""
    sigma = f' +- {np.std(values, ddof=1):.{digits}f}' if len(values) > 1 else ''
    return f'{np.mean(values):.{digits}f}{sigma}'


def same_users(run, other):
    """Were both runs tested with the same split?"""
    return (other is not None and len(run['ndcg']) == len(other['ndcg'])
            and run.get('test split') == other.get('test split'))


def compare(rows, against):
    """{(row, dataset): (gain, p)} over the row of strategy `against` with the same settings, p by
    Holm's method for all of them; nothing where no seed has the same test split in both. And
    whether a gain is over fewer seeds than one of its rows has."""
    base, out, fewer = {}, {}, False
    for key, datasets in rows.items():
        if dict(key)['strategy'] == against:
            if base.setdefault(freeze(dict(key), OF_STRATEGY), datasets) is not datasets:
                raise ValueError(f'several rows are {against}: choose with --only')
    if not base and against != 'none':
        raise ValueError(f'no row is {against}')
    for key, datasets in rows.items():
        other = base.get(freeze(dict(key), OF_STRATEGY), {})
        for name, runs in datasets.items():
            seeds = [seed for seed, run in sorted(runs.items()) if same_users(
                run, other.get(name, {}).get(seed))]
            if not seeds or runs is other[name]:
                continue
            if len({len(runs[seed]['ndcg']) for seed in seeds}) > 1:
                raise ValueError(f'{name}: the number of users differs between seeds')
            fewer |= len(seeds) < max(len(runs), len(other[name]))
            mine, theirs = (np.mean([some[seed]['ndcg'] for seed in seeds], axis=0)
                            for some in (runs, other[name]))
            if np.array_equal(mine, theirs):               # where the t-test gives NaN
                out[key, name] = 0., 1.
                continue
            gain = mine.mean() / theirs.mean() - 1 if theirs.any() else np.inf
            out[key, name] = gain, scipy.stats.ttest_rel(mine, theirs).pvalue
    smallest = sorted(out, key=lambda where: out[where][1])
    worst = 0.
    for n, where in enumerate(smallest):                   # Holm: the smallest times their number
        worst = max(worst, min(1., out[where][1] * (len(out) - n)))
        out[where] = out[where][0], worst
    return out, fewer


def extra_columns(runs, show):
    """{column: text} of a row's runs on one dataset, for each thing to show."""
    runs, out = list(runs.values()), {}

    def mean(get, digits=0):
        return f'{np.mean([get(run) for run in runs]):,.{digits}f}'
    if 'valid' in show:
        out['valid NDCG@10'] = spread([run['valid']['NDCG@10'] for run in runs])
    if 'cost' in show:
        out |= {'parameters': mean(lambda run: run['parameters']),
                'best epoch': mean(lambda run: run['best epoch']),
                'seconds': f'{np.median([run["seconds"] for run in runs]):,.0f}'}
        if any('calls' in run for run in runs):            # only llmrank.py and llmrec.py ask
            out |= {'users scored': mean(lambda run: len(run['ndcg'])),
                    'calls': mean(lambda run: run['calls']),
                    'tokens': mean(lambda run: run['tokens'])}
    if 'spectrum' in show:
        out |= {f'{what} of {table}': mean(lambda run: run['spectrum'][table][what], 1)
                for what in ('abundance', 'effective rank') for table in runs[0]['spectrum']}
    if 'activity' in show:
        key = 'by training interactions, from'
        for at in sorted({at for run in runs for at in run[key]}, key=int):
            some = [run[key][at] for run in runs if at in run[key]]
            out[f'from {at}'] = f'{np.mean([part["NDCG@10"] for part in some]):.4f}'
    return out


def cells_of(runs, gain, gained, paper, show):
    """{column: text} of a row on one dataset; gained: the columns of gain and p, where any has."""
    out = {name: spread([run['test'][name] for run in runs.values()]) for name in METRICS}
    out |= zip(gained, (f'{gain[0]:+.1%}', f'{gain[1]:.1g}') if gain else ('', ''))
    if paper:
        out['paper'] = papers(next(iter(runs.values())))
    return out | {'seeds': str(len(runs))} | extra_columns(runs, show)


def table(runs, against, show):
    """Yields the lines of a Markdown table of runs that share a protocol."""
    rows = group(runs)
    gains, fewer = compare(rows, against)
    names = sorted({name for key in rows for name, _ in key if name not in APART},
                   key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))
    differ = [name for name in names if len({dict(key).get(name) for key in rows}) > 1]
    columns_of = [name for name in ORDER if name in differ or name == 'strategy']
    usual = {name: Counter(dict(key).get(name) for key in rows).most_common(1)[0][0]
             for name in differ if name not in ORDER}
    first = dict(next(iter(rows)))
    shared = [f'{name} {first[name]}' for name in (*PROTOCOL, *names)
              if name not in differ and first.get(name) is not None]
    shared += [f'{name} {value} unless said' for name, value in usual.items()]
    told = f'; gain over {against}'
    if 'brief' in show:
        seeds = sorted({len(runs) for datasets in rows.values() for runs in datasets.values()})
        shared.append(f'seeds {" or ".join(map(str, seeds))}')
    else:
        told += f', p by paired t-test over users, Holm over {len(gains)} comparisons'
    if fewer:
        told += '; where the seeds differ over those that both rows have'
    yield ', '.join(shared) + told * bool(gains)
    yield ''
    datasets = list(dict.fromkeys(run['settings']['dataset'] for run in runs))
    paper = any(papers(run) != '-' for run in runs) and first['seen'] == 'keep'
    gained = ('gain', 'p') if gains else ()
    lines = [(dict(key), {name: cells_of(found[name], gains.get((key, name)), gained, paper, show)
                          for name in datasets if found.get(name)}) for key, found in rows.items()]
    columns = [(name, column) for name in datasets for column in sorted(
        dict.fromkeys(column for _, cells in lines for column in cells.get(name, ())),
        key=lambda column: int(column.removeprefix('from ')) if column[:5] == 'from ' else 0)
        if 'brief' not in show or column not in ('Recall@10', 'p', 'seeds')]
    many = len(datasets) > 1
    head = columns_of + [f'{name} {column}' if many else column for name, column in columns]
    yield f'{"" if many else datasets[0]}\n\n'.lstrip('\n') + f'| {" | ".join(head)} |'
    yield '| ' + ' | '.join(['---'] * len(head)) + ' |'
    for settings, cells in lines:
        said = ' '.join(f'{name}={settings.get(name)}' for name, value in usual.items()
                        if settings.get(name) not in (value, None))
        line = [f'{settings.get(name, "")} {said if name == "strategy" else ""}'.strip()
                for name in columns_of]
        line += [cells.get(name, {}).get(column, '') for name, column in columns]
        yield f'| {" | ".join(line)} |'


def times(runs):
    """Yields the lines of a Markdown table of the minutes that runs took, and their sum."""
    minutes = defaultdict(list)
    for run in sorted(runs, key=place):
        key = tuple(run['settings'][name] for name in ('dataset', 'model', *PROTOCOL))
        minutes[key].append(run['seconds'] / 60)
    minutes['all', '', '', ''] = [sum(part) for part in minutes.values()]
    yield f'| dataset | model | {" | ".join(PROTOCOL)} | runs | minutes |'
    yield '| --- ' * 6 + '|'
    for key, parts in minutes.items():
        count = len(runs) if key[0] == 'all' else len(parts)
        yield f'| {" | ".join(key)} | {count} | {sum(parts):.0f} |'


def curves(runs, x):
    """{(dataset, label): {x: [run]}} for a figure: a line for each set of settings but x."""
    settings = [run['settings'] for run in runs]
    names = [name for name in dict.fromkeys(name for one in settings for name in one)
             if name not in (x, 'dataset', 'seed')
             and len({str(one.get(name)) for one in settings}) > 1]
    usual = {name: Counter(str(one.get(name)) for one in settings).most_common(1)[0][0]
             for name in names}
    out = defaultdict(lambda: defaultdict(list))
    for run in runs:
        one = run['settings']
        told = [f'{one.get(name)}' if name in ('model', 'strategy', 'encoder') else
                f'{name} {one.get(name)}' for name in sorted(names, key=lambda n: n not in ORDER)
                if name in ORDER + PROTOCOL or str(one.get(name)) != usual[name]]
        out[one['dataset'], ' '.join(told) or one['strategy']][one.get(x)].append(run)
    return out


def style(n):
    """How line n looks, the same in all panels of a figure."""
    return {'color': COLOURS[n % 7], 'marker': MARKERS[n % 7], 'ls': DASHES[n % 4]}


def draw_settings(axes, lines, styles, x, y):
    """A line with error bars for each set of settings; y(run) against the setting x."""
    for label, points in lines.items():
        places = sorted(points)
        values = [[y(run) for run in points[at]] for at in places]
        axes.errorbar(places, [np.mean(v) for v in values],
                      [np.std(v, ddof=1) if len(v) > 1 else 0 for v in values], label=label,
                      capsize=3, **styles[label])
    places = sorted({at for points in lines.values() for at in points})
    if x == 'dim':
        axes.set_xscale('log', base=2)
        axes.set_xticks(places, [str(at) for at in places])
    axes.set_xlabel({'dim': 'K, dimensions', 'cold': 'share of training interactions removed'}[x])


def draw_users(axes, lines, styles):
    """NDCG@10 of users by training interactions, a line for each set of settings."""
    key = 'by training interactions, from'
    of_line = {label: [run for some in points.values() for run in some]
               for label, points in lines.items()}
    places = sorted({int(at) for runs in of_line.values() for run in runs for at in run[key]})
    for label, runs in of_line.items():
        scores = {at: [run[key][str(at)]['NDCG@10'] for run in runs if str(at) in run[key]]
                  for at in places}
        axes.plot([places.index(at) for at in places if scores[at]],
                  [np.mean(scores[at]) for at in places if scores[at]], label=label,
                  **styles[label])
    ends = [f'-{b - 1}' if b - a > 1 else '' for a, b in zip(places, places[1:])] + [' or more']
    axes.set_xticks(range(len(places)), [f'{a}{b}' for a, b in zip(places, ends)])
    axes.set_xlabel('training interactions of the user')


def draw_epochs(axes, lines, styles):
    """Validation NDCG@10 by epoch, the first seed of each set of settings; the best is marked."""
    for label, points in lines.items():
        run = next(iter(points.values()))[0]
        axes.plot(range(1, len(run['curve']) + 1), [ndcg for _, ndcg, _ in run['curve']],
                  label=label, markevery=[run['best epoch'] - 1], **styles[label])
    axes.set_xlabel('epoch')


def plot(runs, x, path):
    """Draws a PNG: a column for each dataset; for dim also the effective rank of the tables."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError('the figures need matplotlib: pip install matplotlib') from None
    matplotlib.use('Agg')
    from matplotlib import pyplot
    lines = defaultdict(dict)
    for (dataset, label), points in curves(sorted(runs, key=place), x).items():
        lines[dataset][label] = points
    styles = {label: style(n) for n, label in enumerate(dict.fromkeys(
        label for some in lines.values() for label in some))}
    ranks = x == 'dim'
    if ranks and not all(run['spectrum'] for run in runs):
        raise ValueError('a closed form has no K: choose models with --only model=')
    figure, grid = pyplot.subplots(1 + ranks, len(lines), squeeze=False, layout='constrained',
                                   figsize=(5.2 * len(lines), 3.9 * (1 + ranks)))
    for column, (dataset, some) in enumerate(lines.items()):
        axes = grid[0, column]
        if x in ('dim', 'cold'):
            draw_settings(axes, some, styles, x, lambda run: run['test']['NDCG@10'])
        else:
            {'users': draw_users, 'epoch': draw_epochs}[x](axes, some, styles)
        axes.set_ylabel('validation NDCG@10' if x == 'epoch' else 'test NDCG@10')
        axes.set_title(dataset)
        if ranks:
            draw_settings(grid[1, column], some, styles, x,
                          lambda run: run['spectrum']['items']['effective rank'])
            grid[1, column].set_ylabel('effective rank of the item table')
            grid[1, column].set_yscale('log', base=2)
    for axes in grid.flat:
        axes.grid(alpha=.3)
    known = {label: handle for axes in grid[0] for handle, label in
             zip(*axes.get_legend_handles_labels())}
    grid[0, 0].legend(known.values(), known.keys(), fontsize=8)
    figure.savefig(f'{path}.part', dpi=150, format='png')
    os.replace(f'{path}.part', path)


def arguments(argv):
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    commands = p.add_subparsers(dest='command', required=True)
    one = commands.add_parser('table', help='Markdown')
    one.add_argument('--against', default='none', metavar='STRATEGY', help='what gains are over')
    one.add_argument('--show', nargs='+', default=[], choices=('valid', 'cost', 'spectrum',
                                                               'activity', 'brief'))
    two = commands.add_parser('plot', help='a PNG')
    two.add_argument('file', metavar='FILE.png')
    two.add_argument('--x', default='dim', choices=('dim', 'cold', 'users', 'epoch'))
    three = commands.add_parser('time', help='minutes that the runs took')
    for sub in (one, two, three):
        sub.add_argument('results', nargs='*', help='default: results.jsonl')
        sub.add_argument('--only', nargs='+', action='extend', default=[], metavar='NAME=VALUE',
                         help='settings that a run must have, such as model=sgl strategy=none,var')
    return p.parse_args(argv)


def equals(value, word):
    """Is a setting what a word of the command line says? cold=0 is 0.0."""
    try:
        return str(value) == word or float(value) == float(word)
    except (TypeError, ValueError):
        return False


def chosen(runs, only):
    """The runs whose settings have one of the given values."""
    for condition in only:
        name, _, values = condition.partition('=')
        known = dict.fromkeys(setting for run in runs for setting in run['settings'])
        if name not in known:
            raise ValueError(f'{name} is no setting: {", ".join(known)}')
        runs = [run for run in runs
                if any(equals(run['settings'].get(name), word) for word in values.split(','))]
        if not runs:
            raise ValueError(f'no run with {condition}')
    return runs


def main(argv=None):
    args = arguments(argv)
    try:
        if args.command == 'plot' and not args.file.endswith('.png'):
            raise ValueError(f'{args.file}: expected FILE.png, then the results files')
        # a file behind --only is no condition
        files = args.results + [word for word in args.only if '=' not in word]
        runs = chosen(read(files or ['results.jsonl'], every=args.command == 'time'),
                      [word for word in args.only if '=' in word])
        if args.command == 'plot':
            plot(runs, args.x, args.file)
            return
        if args.command == 'time':
            print('\n'.join(times(runs)))
            return
        protocols = defaultdict(list)
        for run in runs:
            protocols[tuple(run['settings'][name] for name in PROTOCOL)].append(run)
        print('\n\n'.join('\n'.join(table(some, args.against, args.show))
                          for some in protocols.values()))
    except (ValueError, OSError) as error:
        sys.exit(f'report: {error}')


if __name__ == '__main__':
    main()
