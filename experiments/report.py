"""Tables and figures of the runs in results files of run.py.

    python experiments/report.py table RESULTS.jsonl                       # Markdown
    python experiments/report.py table RESULTS.jsonl --against rand --show valid cost brief
    python experiments/report.py plot FILE.png RESULTS.jsonl --x dim       # or cold, users, items,
                                                                           # epoch, interactions
    python experiments/report.py front RESULTS.jsonl                       # NDCG@10 and gain alone
    python experiments/report.py time RESULTS.jsonl                        # minutes

Runs that differ in nothing but the seed are one cell: mean +- standard deviation (n - 1) over the
seeds; of parameters, epochs and spectra the mean, of seconds the median. A row has a cell for each
dataset. Settings that all rows share stand above the table, one that only some rows have beside
their strategy. There is one table for each protocol (--seen, --preset); where the runs have that
of the paper's Table 1, its figures stand beside ours.

gain is the relative gain in NDCG@10 over the row of the same settings with strategy `none` (or
--against). p is a paired t-test over the users (scipy.stats.ttest_rel): of each user the mean
NDCG@10 over the seeds that both rows have, corrected by Holm's method for all comparisons of the
table. The users are the sample, not the seeds: a p says that these models differ for users like
these. --show brief leaves out Recall@10, p and the number of seeds. --best compares each start at
the training values that its own validation chose among the runs in the files.

This file knows the results files and no other module. numpy, scipy; plot also needs matplotlib.
"""
import argparse
import base64
import itertools
import json
import sys
import zlib
from collections import Counter, defaultdict

import numpy as np
import scipy.stats

METRICS = 'Recall@10', 'NDCG@10'
PROTOCOL = 'seen', 'preset'                              # a table for each
ORDER = 'model', 'encoder', 'dim', 'cold', 'strategy'    # columns; others stand with the strategy
OF_STRATEGY = ('strategy', 'encoder', 'whiten', 'popular', 'pool', 'lr', 'chat', 'users',
               'base', 'trained')                        # may differ from what gains are over
TUNED = 'lr', 'batch', 'patience', 'tau'                 # what best() chooses
WORDS = ('lightgcn', 'sgl', 'sgcl', 'morec', 'bpr', 'ease', 'l3ae', 'alpharec', 'llmrank',
         'llmrec', 'mpnet', 'none', 'rand', 'uni', 'var', 'noise', 'pca', 'joint', 'cf', 'random',
         'text')                                         # the order of rows; other words come last
BY_ACTIVITY = 'by training interactions, from'
BY_ITEM = 'by training interactions of the item, from'
FEW = 50                                                 # users; smaller groups are not shown
# What a line of a results file must hold: {name: type or such a dict}.
NUMBER = int, float
SCORES = dict.fromkeys(METRICS, NUMBER)
RUN = {'settings': {**dict.fromkeys(('dataset', 'model', 'strategy', *PROTOCOL), str), 'seed': int},
       'training': dict, 'K': (int, str), 'test': SCORES, 'valid': SCORES, 'curve': list,
       'best epoch': int, 'parameters': int, 'seconds': NUMBER, BY_ACTIVITY: dict}
SPECTRUM = dict.fromkeys(('users', 'items'), {'abundance': NUMBER, 'effective rank': NUMBER})
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
}
OF_PAPER = dict(seen='keep', dim=128, cold=0, encoder='mpnet', pool='mean', core=5, min_rating=4.,
                text_columns=None)                       # its settings; it names no training


# ---- reading -------------------------------------------------------------------------------------

def check(part, shape):
    """ValueError, KeyError or TypeError if a dict lacks what `shape` (as RUN) says it holds."""
    for name, kind in shape.items():
        if isinstance(kind, dict):
            check(part[name], kind)
        elif not isinstance(part[name], kind):
            raise ValueError(f'{name}: {part[name]!r}')


def users_ndcg(run):
    """NDCG@10 of each user (n,), from the packed rank of the user's one target."""
    ranks = np.frombuffer(zlib.decompress(base64.b64decode(run['ranks'])), np.uint8)
    ndcg = np.where(ranks < 10, 1 / np.log2(2. + ranks), 0)
    if abs(ndcg.mean() - run['test']['NDCG@10']) > 1e-9:
        raise ValueError('the ranks do not give the NDCG@10')
    return ndcg


def read_run(line):
    """A run from its line of JSON, with the NDCG@10 of its users; its setting dim is its K, also
    where a strategy keeps all dimensions."""
    run = json.loads(line)
    check(run, RUN)
    if run.setdefault('spectrum', {}) != {}:               # the models of peers.py have none
        check(run['spectrum'], SPECTRUM)
    run['ndcg'] = users_ndcg(run)
    run['key'] = json.dumps([run['settings'], run['training']], sort_keys=True)
    run['settings']['dim'] = run['K']
    run['settings'].pop('endpoint', None)                  # where vectors were once asked for
    return run


def tell_training(runs):
    """Makes settings of what runs of one model and preset were trained with differently."""
    found = defaultdict(set)
    for run in runs:
        for name, value in run['training'].items():
            found[run['settings']['model'], run['settings']['preset'], name].add(str(value))

    for name in {name for (_, _, name), values in found.items() if len(values) > 1}:
        for run in runs:
            run['settings'][name] = run['training'].get(name)


def read(paths, every=False):
    """The runs of results files, [dict]; of runs with equal settings the last, or every one."""
    runs = {}
    for path in paths:
        with open(path, encoding='utf8', errors='replace') as file:
            for number, line in enumerate(file, 1):
                try:
                    run = read_run(line)
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError,
                        zlib.error) as error:
                    print(f'note: {path} line {number} left out ({error!r})', file=sys.stderr)
                else:
                    runs[run['key'], every and (path, number)] = run
    if not runs:
        raise ValueError(f'no runs in {", ".join(paths)}')
    tell_training(runs.values())
    return list(runs.values())


def equals(value, word):
    """Is a setting what a word of the command line says? cold=0 is 0.0."""
    try:
        return str(value) == word or float(value) == float(word)
    except (TypeError, ValueError):
        return False


def chosen(runs, only):
    """The runs whose settings have one of the given values; only: ['NAME=VALUE,VALUE']."""
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


def best(runs):
    """Of each start the runs with the training values that have the highest mean validation NDCG@10
    among those with most seeds. The values become one setting, `trained`."""
    tries = defaultdict(lambda: defaultdict(list))         # {start: {trained: [run]}}
    for run in runs:
        one = run['settings']
        for name in TUNED:
            one.pop(name, None)
        one['trained'] = ', '.join(f'{name} {run["training"][name]:g}' for name in TUNED
                                   if name in run['training']) or None
        tries[described(one, ('seed', 'trained'))][one['trained']].append(run)

    kept = []
    for found in tries.values():
        most = max(map(len, found.values()))
        kept += max((some for some in found.values() if len(some) == most),
                    key=lambda some: np.mean([run['valid']['NDCG@10'] for run in some]))
    return kept


# ---- rows and what they gain ---------------------------------------------------------------------

def place(run):
    """Where a run stands in a table: by its columns, words as in WORDS, others behind them."""
    values = [run['settings'].get(name) for name in ORDER]
    return [(WORDS.index(value) if value in WORDS else len(WORDS), value)
            if isinstance(value, str) else (0, value or 0) for value in values]


def described(settings, without):
    """Settings as a hashable value: ((name, text), ...), sorted; None is as if not there."""
    return tuple(sorted((name, str(value)) for name, value in settings.items()
                        if name not in without and value is not None))


def rows_of(runs):
    """[(settings, {dataset: {seed: run}})] in the order of a table; settings: {name: text}."""
    rows = {}
    for run in sorted(runs, key=place):
        one = run['settings']
        key = described(one, without=('dataset', 'seed'))
        cells = rows.setdefault(key, {})
        cells.setdefault(one['dataset'], {})[one['seed']] = run
    return [(dict(key), cells) for key, cells in rows.items()]


def differing(many):
    """[name] of what differs among many settings, columns first; and {name: its usual value}."""
    names = {name for one in many for name in one} - {'dataset', 'seed', *PROTOCOL}
    ordered = sorted(names, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER),
                                              name))
    counts = {name: Counter(one.get(name) for one in many) for name in ordered}
    return ([name for name in ordered if len(counts[name]) > 1],
            {name: counts[name].most_common(1)[0][0] for name in ordered})


def gain_of(runs, others):
    """The gain of {seed: run} over {seed: run}, p, and the seeds it is over: those that both have
    with the same test split. None if there are none."""
    def split(run):
        return len(run['ndcg']), run.get('test split')
    seeds = [seed for seed in sorted(runs)
             if seed in others and split(runs[seed]) == split(others[seed])]
    if not seeds:
        return None
    if len({len(runs[seed]['ndcg']) for seed in seeds}) > 1:
        raise ValueError('the number of users differs between seeds')

    mine = np.mean([runs[seed]['ndcg'] for seed in seeds], axis=0)                       # (n,)
    theirs = np.mean([others[seed]['ndcg'] for seed in seeds], axis=0)                   # (n,)
    if np.array_equal(mine, theirs):                       # where the t-test gives NaN
        return 0., 1., seeds
    gain = mine.mean() / theirs.mean() - 1 if theirs.any() else np.inf
    return gain, scipy.stats.ttest_rel(mine, theirs).pvalue, seeds


def holm(p):
    """{where: p} of all comparisons of a table, corrected: the smallest times their number, the
    next times one less, none below the one before."""
    corrected, worst = {}, 0.
    for n, where in enumerate(sorted(p, key=p.get)):
        worst = max(worst, min(1., p[where] * (len(p) - n)))
        corrected[where] = worst
    return corrected


def compare(rows, against):
    """{(number of a row, dataset): (gain, p)} over the row of strategy `against` with the same
    settings; and whether a gain is over fewer seeds than one of its rows has."""
    base = {}
    for settings, cells in rows:
        if settings['strategy'] == against:
            if base.setdefault(described(settings, OF_STRATEGY), cells) is not cells:
                raise ValueError(f'several rows are {against}: choose with --only')
    if not base and against != 'none':
        raise ValueError(f'no row is {against}')

    gains, p, fewer = {}, {}, False
    for n, (settings, cells) in enumerate(rows):
        other = base.get(described(settings, OF_STRATEGY), {})
        for dataset, runs in cells.items():
            found = gain_of(runs, other.get(dataset, {})) if cells is not other else None
            if found:
                gains[n, dataset], p[n, dataset], seeds = found
                fewer |= len(seeds) < max(len(runs), len(other[dataset]))
    corrected = holm(p)
    return {where: (gain, corrected[where]) for where, gain in gains.items()}, fewer


# ---- tables --------------------------------------------------------------------------------------

def spread(values):
    """'0.1234 +- 0.0012', of one seed without the second."""
    return f'{np.mean(values):.4f}' + (
        f' +- {np.std(values, ddof=1):.4f}' if len(values) > 1 else '')


def of_paper(run):
    """'Recall@10/NDCG@10' of a run in the paper's Table 1, '-' if it is not there."""
    one = run['settings']
    if any(one.get(name) != value for name, value in OF_PAPER.items()):
        return '-'
    found = PAPER.get((one['dataset'], one['model']), '').split()
    return dict(zip(('none', 'rand', 'uni', 'var'), found)).get(one['strategy'], '-')


def extra_columns(runs, show):
    """{column: text} of a cell's runs, [run], for each thing to show."""
    def mean(values, digits=0):
        return f'{np.mean(list(values)):,.{digits}f}'

    out = {}
    if 'valid' in show:
        out['valid NDCG@10'] = spread([run['valid']['NDCG@10'] for run in runs])
    if 'cost' in show:
        out['parameters'] = mean(run['parameters'] for run in runs)
        out['best epoch'] = mean(run['best epoch'] for run in runs)
        out['seconds'] = f'{np.median([run["seconds"] for run in runs]):,.0f}'
        if any('calls' in run for run in runs):            # only llmrank.py and llmrec.py ask
            out['users scored'] = mean(len(run['ndcg']) for run in runs)
            out['calls'] = mean(run['calls'] for run in runs)
            out['tokens'] = mean(run['tokens'] for run in runs)
    if 'spectrum' in show:
        for what in ('abundance', 'effective rank'):
            for side in runs[0]['spectrum']:
                out[f'{what} of {side}'] = mean((run['spectrum'][side][what] for run in runs), 1)
    for word, name, column in (('activity', BY_ACTIVITY, 'from'), ('items', BY_ITEM, 'item from')):
        if word in show:
            for least, score in groups_of(runs, name).items():
                out[f'{column} {least}'] = f'{score:.4f}'
    return out


def groups_of(runs, name):
    """{lower bound: mean NDCG@10 over [run]} of the groups of at least FEW users; name: of what."""
    found = defaultdict(list)
    for run in runs:
        for least, group in run.get(name, {}).items():
            if group['users'] >= FEW:
                found[int(least)].append(group['NDCG@10'])
    return {least: np.mean(found[least]) for least in sorted(found)}


def cell(runs, gain, show):
    """{column: text} of {seed: run}; gain: (gain, p) or None."""
    runs = list(runs.values())
    out = {name: spread([run['test'][name] for run in runs]) for name in METRICS}
    out['gain'] = f'{gain[0]:+.1%}' if gain else ''
    out['p'] = f'{gain[1]:.1g}' if gain else ''
    out['paper'] = of_paper(runs[0])
    out['seeds'] = str(len(runs))
    return out | extra_columns(runs, show)


def caption(rows, gains, fewer, against, show):
    """What all rows share, and what gain and p are, in a line."""
    settings = [settings for settings, _ in rows]
    differ, usual = differing(settings)
    told = [f'{name} {settings[0][name]}' for name in PROTOCOL]
    told += [f'{name} {value}' for name, value in usual.items()
             if name not in differ and value is not None]
    told += [f'{name} {usual[name]} unless said' for name in differ if name not in ORDER]
    if 'brief' in show:
        counts = {len(runs) for _, cells in rows for runs in cells.values()}
        told.append(f'seeds {" or ".join(map(str, sorted(counts)))}')
    line = ', '.join(told)
    if gains:
        line += f'; gain over {against}'
        if 'brief' not in show:
            line += f', p by paired t-test over users, Holm over {len(gains)} comparisons'
        if fewer:
            line += '; where the seeds differ over those that both rows have'
    return line


def markdown(head, rows):
    """Yields the lines of a Markdown table of [text] and [[text]]."""
    for line in (head, ['---'] * len(head), *rows):
        yield f'| {" | ".join(line)} |'


def by_number(column):
    """Where groups of users, then of items, stand among the columns: last, by number."""
    name, found, least = column.rpartition('from ')
    return (1, name, int(least)) if found else (0, '', 0)


def table(runs, against, show):
    """Yields the lines of a Markdown table of runs that share a protocol."""
    rows = rows_of(runs)
    gains, fewer = compare(rows, against)
    cells = [{dataset: cell(some, gains.get((n, dataset)), show) for dataset, some in found.items()}
             for n, (_, found) in enumerate(rows)]

    # the columns: settings that differ, then for each dataset what any cell has something for
    differ, usual = differing([settings for settings, _ in rows])
    of_settings = [name for name in ORDER if name in differ or name == 'strategy']
    texts = [pair for row in cells for one in row.values() for pair in one.items()]
    told = {column for column, text in texts if text not in ('', '-')}
    told -= {'Recall@10', 'p', 'seeds'} if 'brief' in show else set()
    ordered = sorted(dict.fromkeys(column for column, _ in texts if column in told), key=by_number)
    datasets = list(dict.fromkeys(run['settings']['dataset'] for run in runs))
    columns = [(dataset, column) for dataset in datasets for column in ordered
               if any(column in row.get(dataset, ()) for row in cells)]

    lines = []
    for (settings, _), row in zip(rows, cells):
        said = [f'{name}={settings[name]}' for name in differ if name not in ORDER
                and settings.get(name) not in (usual[name], None)]
        shown = {**settings, 'strategy': ' '.join([settings['strategy'], *said])}
        lines.append([shown.get(name, '') for name in of_settings]
                     + [row.get(dataset, {}).get(column, '') for dataset, column in columns])

    many = len(datasets) > 1
    yield caption(rows, gains, fewer, against, show)
    yield '' if many else f'\n{datasets[0]}\n'
    yield from markdown(of_settings + [f'{dataset} {column}' if many else column
                                       for dataset, column in columns], lines)


def tables(runs, against, show):
    """The tables of runs, one for each protocol, as text."""
    protocols = defaultdict(list)
    for run in runs:
        protocols[tuple(run['settings'][name] for name in PROTOCOL)].append(run)
    return '\n\n'.join('\n'.join(table(some, against, show)) for some in protocols.values())


def called(settings):
    """A run in a few words."""
    names = 'dataset', 'cold', 'model', 'strategy', 'seed'
    return ' '.join(str(settings[name]) for name in names)


def put_score(scores, key, run, part='test'):
    """scores[key] becomes the NDCG@10 of a run. ValueError if another run stands there."""
    if key in scores:
        raise ValueError(f'several runs are {called(run["settings"])}: choose with --only or '
                         '--best')
    scores[key] = run[part]['NDCG@10']


def front(runs, show):
    """Yields the lines of a Markdown table of NDCG@10 alone, and the gain over the random start of
    the same model: a row for each model and start that has all columns, a column for each dataset
    and share that was removed. show: 'valid', scores of validation; 'spread', deviations."""
    scores = defaultdict(lambda: defaultdict(dict))        # {row: {column: {seed: NDCG@10}}}
    for run in sorted(runs, key=place):
        one = run['settings']
        found = scores[one['model'], one['strategy']][one['dataset'], one['cold']]
        put_score(found, one['seed'], run, 'valid' if 'valid' in show else 'test')

    datasets = [*dict.fromkeys(run['settings']['dataset'] for run in runs)]
    columns = sorted({column for row in scores.values() for column in row},
                     key=lambda column: (datasets.index(column[0]), column[1]))
    lines = []
    for (model, strategy), row in scores.items():
        if len(row) < len(columns):
            continue
        random = scores.get((model, 'none'), {})
        cells = []
        for column in columns:
            values = [*row[column].values()]
            text = spread(values) if 'spread' in show else f'{np.mean(values):.4f}'
            if row is not random and column in random:
                gain = np.mean(values) / np.mean([*random[column].values()]) - 1
                text += f' {gain:+.0%}'
            cells.append(text)
        lines.append([model, strategy, *cells])
    yield from markdown(['model', 'start', *(dataset + f', {cold:.0%} removed' * bool(cold)
                                             for dataset, cold in columns)], lines)


def times(runs):
    """Yields the lines of a Markdown table of the minutes that runs took, and their sum."""
    minutes = defaultdict(list)
    for run in sorted(runs, key=place):
        key = tuple(run['settings'][name] for name in ('dataset', 'model', *PROTOCOL))
        minutes[key].append(run['seconds'] / 60)
    minutes['all', '', '', ''] = [run['seconds'] / 60 for run in runs]
    yield from markdown(['dataset', 'model', *PROTOCOL, 'runs', 'minutes'],
                        [[*key, str(len(some)), f'{sum(some):.0f}']
                         for key, some in minutes.items()])


# ---- figures -------------------------------------------------------------------------------------

# Okabe and Ito: told apart by colour-blind readers; markers and dashes tell them apart in grey.
COLOURS = '#000000', '#E69F00', '#0072B2', '#009E73', '#D55E00', '#CC79A7', '#56B4E9'
STYLES = [dict(color=colour, marker=marker, ls=dashes) for colour, marker, dashes
          in zip(COLOURS, 'osD^vPX', ('-', '--', '-.', ':') * 2)]
# {--x: (its label, the labels of y from top to bottom)}; a column of panels for each dataset
FIGURES = {'dim': ('K, dimensions', ('test NDCG@10', 'effective rank of the item table')),
           'cold': ('share of training interactions removed', ('test NDCG@10',)),
           'users': ('training interactions of the user', ('test NDCG@10',)),
           'items': ("training interactions of the user's test item", ('test NDCG@10',)),
           'epoch': ('epoch', ('validation NDCG@10',))}
GROUPED = {'users': BY_ACTIVITY, 'items': BY_ITEM}         # --x, whose places have equal distances

# The figure of gains: training interactions a user of the whole sets, what starts are called.
TRAINING = {'toys': 6.5, 'beauty': 6.9, 'office': 9.2, 'ml-100k': 56.}
LABELS = {'none': 'random', ('full', 'l3ae'): 'L3AE, a formula with text',
          ('none', 'ease'): 'EASE, a formula without text', 'var': 'var', 'pca': 'pca',
          'joint': 'joint'}
NAMES = {'lightgcn': 'LightGCN', 'sgcl': 'SGCL'}


def points_of(run, x, y):
    """{place on the x axis: value} of a run, for a line of FIGURES."""
    if x in GROUPED:
        return groups_of([run], GROUPED[x])
    if x == 'epoch':
        return {n: ndcg for n, (_, ndcg, _) in enumerate(run['curve'], 1)}
    value = run['test']['NDCG@10'] if y == 'test NDCG@10' else (
        run['spectrum']['items']['effective rank'])
    return {run['settings'][x]: value}


def curves(runs, x):
    """{dataset: {label: [run]}}: a line for each set of settings but x."""
    runs = sorted(runs, key=place)
    settings = [{name: str(value) for name, value in run['settings'].items() if name != x}
                for run in runs]
    differ, usual = differing(settings)
    differ += [name for name in sorted(PROTOCOL) if len({one[name] for one in settings}) > 1]

    lines = defaultdict(lambda: defaultdict(list))
    for run, one in zip(runs, settings):
        told = [str(one.get(name)) if name in ('model', 'strategy', 'encoder') else
                f'{name} {one.get(name)}' for name in differ
                if name in ORDER + PROTOCOL or one.get(name) not in (usual[name], 'None', None)]
        lines[one['dataset']][' '.join(told) or one['strategy']].append(run)
    return lines


def draw(axes, lines, styles, x, y):
    """A panel: a line for each label, the mean over its runs, of settings with deviations; of
    epochs the first run with a mark at its best."""
    values = defaultdict(lambda: defaultdict(list))        # {label: {place: [value]}}
    for label, runs in lines.items():
        for run in runs[:1] if x == 'epoch' else runs:
            for at, value in points_of(run, x, y).items():
                values[label][at].append(value)
    ticks = sorted({at for points in values.values() for at in points})
    places = dict(zip(ticks, range(len(ticks)) if x in GROUPED else ticks))

    for label, points in values.items():
        at = sorted(points)
        sigma = [np.std(points[tick], ddof=1) if len(points[tick]) > 1 else 0 for tick in at]
        axes.errorbar([places[tick] for tick in at], [np.mean(points[tick]) for tick in at],
                      sigma if x in ('dim', 'cold') else None, label=label, capsize=3,
                      markevery=[lines[label][0]['best epoch'] - 1] if x == 'epoch' else None,
                      **styles[label])

    if x in GROUPED:
        ends = [f'-{b - 1}' if b - a > 1 else '' for a, b in zip(ticks, ticks[1:])] + [' or more']
        axes.set_xticks(list(places.values()), [f'{a}{b}' for a, b in zip(ticks, ends)],
                        rotation=30, ha='right')
    if x == 'dim':
        axes.set_xscale('log', base=2)
        axes.set_xticks(ticks, ticks)
    if y.startswith('effective'):
        axes.set_yscale('log', base=2)
    axes.set_xlabel(FIGURES[x][0])
    axes.set_ylabel(y)
    axes.grid(alpha=.3)


def pyplot():
    """matplotlib.pyplot without a screen."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError('the figures need matplotlib: pip install matplotlib') from None
    matplotlib.use('Agg')
    import matplotlib.pyplot
    return matplotlib.pyplot


def plot(runs, x, path):
    """Draws the figure FIGURES[x] as a PNG."""
    if x == 'dim' and not all(run['spectrum'] for run in runs):
        raise ValueError('a closed form has no K: choose models with --only model=')
    lines, rows = curves(runs, x), FIGURES[x][1]
    styles = dict(zip(dict.fromkeys(label for some in lines.values() for label in some),
                      itertools.cycle(STYLES)))
    figure, grid = pyplot().subplots(len(rows), len(lines), squeeze=False, layout='constrained',
                                   figsize=(5.2 * len(lines), 3.9 * len(rows)))
    for column, (dataset, some) in enumerate(lines.items()):
        grid[0, column].set_title(dataset)
        for axes, y in zip(grid[:, column], rows):
            draw(axes, some, styles, x, y)
    known = {label: handle for axes in grid[0] for handle, label in
             zip(*axes.get_legend_handles_labels())}
    figure.legend(known.values(), known.keys(), fontsize=9, loc='outside upper center',
                  ncols=min(len(known), 2 * len(lines)))
    figure.savefig(path, dpi=150)


def ratios(runs):
    """{model: {label: {(interactions a user, dataset): [ratio]}}}: the NDCG@10 of each start over
    that of the random start of the same model, seed and data; of closed forms, which are no start,
    in every model."""
    scores = defaultdict(dict)                             # {(place, seed): {(model, label): NDCG}}
    for run in runs:
        one = run['settings']
        users = TRAINING[one['dataset']] * (1 - one['cold'])
        label = LABELS.get((one['strategy'], one['model']), LABELS.get(one['strategy']))
        if label:
            key = (users, one['dataset']), one['seed']
            put_score(scores[key], (one['model'], label), run)

    out = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for (where, _), found in scores.items():
        for model in ('lightgcn', 'sgcl'):
            base = found.get((model, 'random'))
            for (of, label), ndcg in found.items():
                if base and label != 'random' and of in (model, 'ease', 'l3ae'):
                    out[model][label][where].append(ndcg / base)
    return out


def plot_gains(runs, path):
    """Draws what starts and closed forms gain over the random start, by interactions a user."""
    found = ratios(runs)
    places = sorted({where for labels in found.values() for points in labels.values()
                     for where in points})
    if not places:
        raise ValueError('no run stands beside one from a random start')
    figure, grid = pyplot().subplots(1, len(found), squeeze=False, sharey=True,
                                     layout='constrained', figsize=(5.4 * len(found), 4.2))
    for axes, (model, labels) in zip(grid[0], sorted(found.items())):
        for n, (style, label) in enumerate(zip(STYLES[1:], LABELS.values())):
            points = labels.get(label, {})             # each label a little to the right
            axes.plot([places.index(where) + .14 * (n - 3) for where in points],
                      [np.mean(ratio) for ratio in points.values()], label=label, ls='',
                      marker=style['marker'], color=style['color'], ms=7, mec='black', mew=.6)
        axes.axhline(1, color='black', lw=1)
        axes.set_yscale('log', base=2)
        axes.set_yticks([.5, .7, 1, 1.4, 2, 3], ['0.5', '0.7', '1', '1.4', '2', '3'])
        axes.set_xticks(range(len(places)), [f'{users:.1f} {name}' for users, name in places],
                        rotation=60, ha='right')
        axes.set_title(NAMES[model])
        axes.grid(alpha=.3)
    grid[0, 0].set_ylabel('NDCG@10 over that of a random start')
    figure.supxlabel('training interactions a user, and the data', fontsize=10)
    handles, names = grid[0, 0].get_legend_handles_labels()
    kept = [(handle, name) for handle, name in zip(handles, names) if len(handle.get_xdata())]
    figure.legend(*zip(*kept), fontsize=9, loc='outside upper center', ncols=len(kept))
    figure.savefig(path, dpi=110)


# ---- the command line ----------------------------------------------------------------------------

def arguments(argv):
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    commands = p.add_subparsers(dest='command', required=True)
    one = commands.add_parser('table', help='Markdown')
    one.add_argument('--against', default='none', metavar='STRATEGY', help='what gains are over')
    one.add_argument('--show', nargs='+', default=[], choices=('valid', 'cost', 'spectrum',
                                                               'activity', 'items', 'brief'))
    two = commands.add_parser('plot', help='a PNG')
    two.add_argument('file', metavar='FILE.png')
    two.add_argument('--x', default='dim', choices=(*FIGURES, 'interactions'))
    three = commands.add_parser('time', help='minutes that the runs took')
    four = commands.add_parser('front', help='Markdown, NDCG@10 alone')
    four.add_argument('--show', nargs='+', default=[], choices=('valid', 'spread'))
    for sub in (one, two, three, four):
        sub.add_argument('results', nargs='*', help='default: results.jsonl')
        sub.add_argument('--only', nargs='+', action='extend', default=[], metavar='NAME=VALUE',
                         help='settings that a run must have, such as model=sgl strategy=none,var')
        sub.add_argument('--best', action='store_true', help='of each start only the runs with the '
                         f'{", ".join(TUNED)} of the best validation')
    return p.parse_args(argv)


def main(argv=None):
    args = arguments(argv)
    # a file behind --only is no condition
    files = args.results + [word for word in args.only if '=' not in word]
    only = [word for word in args.only if '=' in word]
    try:
        if args.command == 'plot' and not args.file.endswith('.png'):
            raise ValueError(f'{args.file}: expected FILE.png, then the results files')
        runs = chosen(read(files or ['results.jsonl'], every=args.command == 'time'), only)
        if args.best:
            runs = best(runs)
        if args.command == 'plot' and args.x == 'interactions':
            plot_gains(runs, args.file)
        elif args.command == 'plot':
            plot(runs, args.x, args.file)
        elif args.command == 'front':
            print('\n'.join(front(runs, args.show)))
        elif args.command == 'time':
            print('\n'.join(times(runs)))
        else:
            print(tables(runs, args.against, args.show))
    except (ValueError, OSError) as error:
        sys.exit(f'report: {error}')


if __name__ == '__main__':
    main()
