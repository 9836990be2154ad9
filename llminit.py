"""LLMInit: start a recommender's embedding tables from a language model's item vectors.

arXiv 2503.01814. The texts of the items go once through a frozen language model (N numbers an
item). K of the N dimensions are kept, the same K for every item, and start the item table of a
small collaborative filtering model; each user starts from the pool of the items in the user's
history. Then everything trains as usual. Nothing of the language model remains at run time.

The method is `select_dims` (section 3.1) and `pool_users` (section 3.2, eq. (1)). `main()` is the
whole path, a line a stage:

    data.load -> data.split -> embed.encode -> select_dims -> pool_users -> models.train
              -> models.evaluate -> one table row

    python llminit.py --dataset beauty --strategy var

The two functions need numpy and scipy only, and this file works alone; main() wants data.py,
embed.py and models.py beside it. MIT licence.
Shapes: U users, I items, N encoder width, K kept dimensions.
"""
import argparse
import base64
import functools
import hashlib
import itertools
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import time
import tokenize
import traceback
import zlib

import numpy as np
import scipy.sparse as sp

STRATEGIES = ('none', 'rand', 'uni', 'var', 'noise', 'pca', 'proj', 'prefix', 'full')
MODELS = ('lightgcn', 'sgl', 'sgcl', 'morec', 'bpr')
POOLS = ('mean', 'sqrt', 'sum')
DATASETS = ('beauty', 'toys', 'tools', 'office', 'ml-100k')          # all else is a folder
TABLES = ('users.npy', 'items.npy')                                  # of a saved run
# what a saved run keeps of the command line: all that its figures depend on
KEPT = {'dataset', 'min_rating', 'core', 'text_columns', 'strategy', 'model', 'encoder', 'dim',
        'cold', 'whiten', 'popular', 'pool', 'anchor', 'views', 'tau', 'seen', 'preset', 'batch',
        'lr', 'patience', 'epochs', 'seed'}
LISTS = ('dataset', 'encoder', 'dim', 'cold', 'model', 'strategy')   # a, b, c: a cell for each
# flags that only some cells use: elsewhere they stay as they are by default, so that cells which
# would come out alike are one cell
USED_BY = {'whiten': ('strategy', ('pca',)), 'popular': ('strategy', ('var',)),
           'encoder': ('strategy', STRATEGIES[1:]), 'pool': ('strategy', STRATEGIES[1:]),
           'views': ('model', ('sgl',)), 'tau': ('model', ('sgl', 'sgcl'))}
ACTIVITY = (0, 1, 2, 3, 5, 9, 17)    # [ours] users are scored apart by training interactions, from
PRESETS = ('ours', 'paper')
# batch, Adam's learning rate, epochs without a better validation before training stops
PAPER_TRAINING = dict(batch=256, lr=1e-3, patience=10)               # [authors' code]
OUR_TRAINING = dict(batch=2048, lr=3e-3, patience=20)                # [ours: as good, sooner]
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
    ('beauty', 'morec'): '.0857/.0397', ('toys', 'morec'): '.0793/.0362',            # Table 3
}
THE_PAPERS = dict(dim=128, cold=0, encoder='mpnet', pool='mean', core=5, min_rating=4., anchor=0.,
                  text_columns=None)   # settings of these figures; it does not name its training's


def principal(vectors, K, whiten=0.):
    """The K principal components of centred vectors: (I, N) -> (I, K), widest first.

    Component k is divided by its standard deviation to the power `whiten` (0: PCA, 1: all equally
    wide), then everything by one number, so that the norm of the whole stays that of PCA.
    """
    centred = vectors - vectors.mean(axis=0, dtype=np.float64)                      # (I, N)
    width, axes = np.linalg.eigh(centred.T @ centred / len(centred))                # (N,), (N, N)
    width, axes = np.sqrt(np.maximum(width[::-1][:K], 0)), axes[:, ::-1][:, :K]     # (K,), (N, K)
    if not (0 <= whiten <= 1 and width[-1] > 1e-6 * width[0]):
        raise ValueError(f'--whiten {whiten} is not in 0..1' if not 0 <= whiten <= 1 else
                         f'the vectors span fewer than {K} dimensions: lower --dim')
    axes *= np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(K)])     # eigenvectors have no sign
    scaled = width ** (1 - whiten)
    weight = width ** -whiten * np.linalg.norm(width) / np.linalg.norm(scaled)
    return (centred @ axes * weight).astype(vectors.dtype)


def select_dims(vectors, K, strategy='var', rng=None, *, whiten=0., popular=1., degree=None):
    """Make K of the N dimensions of item vectors: (I, N) -> (I, K). Section 3.1 of the paper.

    'uni'     every floor(N/K)-th dimension, I = {k floor(N/K)}
    'rand'    K distinct dimensions drawn from `rng` (the authors' code draws with replacement)
    'var'     the K dimensions of highest variance over the items; or, as in the authors' code with
              popular=.2, over the share `popular` of the items with the highest `degree` (I,)
    Beyond the paper [ours]:
    'pca'     K principal components, see principal(); `whiten` is its argument
    'proj'    a Gaussian random projection, scaled as a selection of K dimensions is
    'prefix'  the first K, which some encoders are trained for
    'full'    all N dimensions
    'noise'   no text: normal numbers of the vectors' root mean square; what is left of a gain with
              it comes from scale and pooling

    The selections keep values as they are. ValueError for K > N, for vectors that are not finite.
    """
    I, N = vectors.shape
    if not 1 <= K <= N and strategy not in ('full', 'noise', 'proj'):
        raise ValueError(f'cannot keep {K} of {N} dimensions: choose --dim between 1 and {N}')
    if not np.isfinite(vectors).all():
        bad = (~np.isfinite(vectors)).any(axis=1).sum()
        raise ValueError(f'{bad} of {I} item vectors hold NaN or infinity')
    if strategy == 'pca':
        return principal(vectors, K, whiten)
    if strategy == 'proj':
        return (vectors @ rng.normal(0, N ** -.5, (N, K))).astype(vectors.dtype)
    if strategy == 'noise':
        scale = np.sqrt(np.square(vectors, dtype=np.float64).mean())
        return rng.normal(0, scale, (I, K)).astype(vectors.dtype)
    if strategy == 'rand':
        kept = np.sort(rng.choice(N, K, replace=False))
    elif strategy == 'var':
        some = slice(None) if degree is None else np.argsort(-degree, kind='stable')
        some = some if degree is None else some[:max(2, round(popular * I))]
        variance = vectors[some].var(axis=0, dtype=np.float64)           # (N,)
        kept = np.sort(np.argsort(-variance, kind='stable')[:K])         # of equals the first
    else:
        kept = {'uni': np.arange(K) * (N // K), 'prefix': np.arange(K),
                'full': np.arange(N)}[strategy]
    return vectors[:, kept]                                              # (I, K)


def pool_users(train, items0, pool='mean'):
    """Start each user from the items of the training history: csr (U, I), (I, K) -> (U, K).

    Section 3.2, eq. (1): u = sum_{i in N_u} v_i / |N_u| ('mean' [authors' code]; the scan of the
    paper is unreadable here), or over sqrt|N_u| ('sqrt'), or undivided ('sum'). A user without
    training items starts at zero.
    """
    size = np.diff(train.indptr)                                     # (U,) |N_u|
    power = {'mean': -1., 'sqrt': -.5, 'sum': 0.}[pool]
    weight = np.repeat(np.maximum(size, 1) ** power, size).astype(items0.dtype)
    history = sp.csr_matrix((weight, train.indices, train.indptr), train.shape)
    return history @ items0                                          # eq. (1), (U, K)


def xavier(rng, rows, K, columns=slice(None)):
    """The baselines' random start [authors' code], uniform on +-sqrt(6 / (rows + K)): (rows, K), or
    those columns of it, drawn some rows at a time."""
    bound, step = np.sqrt(6 / (rows + K)), 2 ** 16
    parts = [(rng.uniform(-1, 1, (min(step, rows - n), K))[:, columns] * bound).astype(np.float32)
             for n in range(0, rows, step)]
    return np.concatenate(parts)


def settings_of(args):
    """{flag: value} of all that a run's figures depend on."""
    settings = {name: getattr(args, name) for name in sorted(KEPT)}
    if args.dataset not in DATASETS:
        settings['dataset'] = os.path.abspath(args.dataset)
    if os.path.exists(args.encoder) and args.encoder not in ('mpnet', 'tfidf'):
        settings['encoder'] = os.path.abspath(args.encoder)
    if args.encoder.startswith('openai:'):                 # elsewhere MODEL may be another
        url = os.environ.get('OPENAI_BASE_URL', '').strip() or 'https://api.openai.com/v1'
        settings['endpoint'] = url.rstrip('/')
    return settings


def training_settings(args):
    """Arguments of models.train that the command line sets: the preset's and those given."""
    # the other examples of a batch are SGCL's negatives: more of them are another loss
    ours = args.preset == 'ours' and args.model != 'sgcl'
    preset = OUR_TRAINING if ours else PAPER_TRAINING
    if args.model == 'sgl':            # no plateau: 28 of 29 runs kept the same epoch as with 20
        preset = preset | {'patience': PAPER_TRAINING['patience']}
    settings = {name: value if getattr(args, name) is None else getattr(args, name)
                for name, value in preset.items()}
    settings |= {name: getattr(args, name) for name in ('seen', 'epochs', 'anchor')}
    own = {'sgl': ('views', 'tau'), 'sgcl': ('tau',), 'morec': ('dim',)}.get(args.model, ())
    return settings | {name: getattr(args, name) for name in own}


def whole_settings(args):
    """What a run must share with a row of a results file to be that row's: also the presets."""
    return settings_of(args), training_settings(args)


def digest(*matrices):
    """Hex digest of csr matrices: which split a run was trained and tested on."""
    parts = (np.asarray(a, np.int64).tobytes() for m in matrices for a in (m.indptr, m.indices))
    return hashlib.sha256(b''.join(parts)).hexdigest()


def sizes(dataset, pairs, train, valid, test, agree):
    """One line on the data of a run, csr (U, I) each; ValueError where nothing can be tested, or
    where agree() finds that other processes have other data."""
    U, I = pairs.shape
    if not test.nnz:
        raise ValueError('no user has two interactions, so there is nothing to test with')
    agree(lambda: digest(train, valid, test))
    return (f'{dataset}: {U:,} users, {I:,} items, {pairs.nnz:,} interactions: {train.nnz:,} train,'
            f' {valid.nnz:,} valid, {test.nnz:,} test')


def best_epoch(curve):
    """The entry of models.train's curve whose tables were kept."""
    return [epoch for epoch in curve if epoch['best']][-1]


def means(scores):
    """{name: mean over users} of Recall@10 and NDCG@10, (n,) each."""
    return dict(zip(('Recall@10', 'NDCG@10'), (float(score.mean()) for score in scores)))


def papers(args):
    """'Recall@10/NDCG@10' of a run in the paper's Table 1 or 3, '-' if it has none."""
    there = all(getattr(args, name) == value for name, value in THE_PAPERS.items())
    figures = PAPER.get((args.dataset, args.model), '').split() if there else []
    which = ('full',) if args.model == 'morec' else STRATEGIES
    return dict(zip(which, figures)).get(args.strategy, '-')


def run_facts(args, scores, split, facts, names):
    """What run.json holds: settings, scores, the split's digest, the ids in the order of rows."""
    return {'settings': settings_of(args), 'scores': means(scores), **facts,
            'split': digest(*split), 'users': names[0], 'items': names[1]}


def read_run(folder):
    """The run.json of a saved run; ValueError or OSError with one line if it is not one."""
    with open(os.path.join(folder, 'run.json'), encoding='utf8') as file:
        try:
            run = json.load(file)
            kinds = {'settings': dict, 'users': list, 'items': list}
            if (not all(isinstance(run[name], kind) for name, kind in kinds.items())
                    or set(run['settings']) - {'endpoint'} != KEPT):
                raise ValueError('other settings than this version has')
            return run | {'best epoch': int(run['best epoch']), 'K': int(run['K']),
                          'parameters': int(run['parameters']), 'split': str(run['split'])}
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError,
                RecursionError) as error:
            raise ValueError(f'{folder}/run.json is not of a saved run ({error!r})') from None


def load_run(folder, split, names):
    """users (U, K), items (I, K), facts of a saved run, only for the split it was saved with."""
    run = read_run(folder)
    if (run['users'], run['items'], run['split']) != (*names, digest(*split)):
        raise ValueError(f"{folder} was saved for {len(run['users'])} users and {len(run['items'])}"
                         f' items; the data hold {len(names[0])} and {len(names[1])}, or other '
                         'interactions: train anew')
    tables = []
    for name, ids in zip(TABLES, names):
        try:
            with open(os.path.join(folder, name), 'rb') as file:
                tables.append(np.lib.format.read_array(file, allow_pickle=False))
        except (ValueError, EOFError, tokenize.TokenError):        # numpy advises to unpickle
            raise ValueError(f'{folder}/{name} is damaged: not a plain .npy') from None
        found, due = (tables[-1].dtype, tables[-1].shape), (np.float32, (len(ids), run['K']))
        if found != due or not np.isfinite(tables[-1]).all():
            raise ValueError(f'{folder}/{name} holds {found[0]} of shape {found[1]}; expected '
                             f'finite float32 of shape {due[1]}')
    return *tables, {name: run[name] for name in ('best epoch', 'K', 'parameters')}


def check_folder(folder):
    """OSError or ValueError now, not after the training, where a run could not be saved."""
    if os.path.exists(folder):
        ours = '|'.join([*map(re.escape, (*TABLES, 'run.json')),
                         r'recommendations\.tsv((\.\d+)?\.part)?'])
        if not all(re.fullmatch(ours, name) for name in os.listdir(folder)):
            raise ValueError(f'{folder} holds other files than a saved run: choose another --save')
    parent = os.path.dirname(os.path.realpath(folder))
    if os.path.ismount(folder):
        raise ValueError(f'{folder} is a mount point, which no rename replaces: save inside of it')
    try:
        os.makedirs(parent, exist_ok=True)
        os.rmdir(tempfile.mkdtemp(prefix='.part-', dir=parent))
    except OSError as error:
        raise OSError(f'cannot save to {folder}: {error.strerror}') from None


def write_recommendations(folder, recommended, names, titles):
    """recommendations.tsv: a line for each user and rank, best first; written beside, renamed."""
    path = os.path.join(folder, 'recommendations.tsv')
    part = f'{path}.{os.getpid()}.part'              # its own, where two --load write here at once
    blanks = str.maketrans('\t\r\n', '   ')
    try:
        with open(part, 'w', encoding='utf8') as file:
            file.write('user_id\trank\titem_id\tscore\ttitle\n')
            for user, row, scores in zip(names[0], *recommended):
                for rank, (i, score) in enumerate(zip(row[row >= 0], scores), 1):
                    cells = user, rank, names[1][i], f'{score:.6g}', titles[i]
                    file.write('\t'.join(str(cell).translate(blanks) for cell in cells) + '\n')
        os.replace(part, path)
    finally:
        if os.path.exists(part):                     # as on a full disk
            os.remove(part)


def save_run(folder, run, tables, recommended, titles):
    """Write a run: users.npy (U, K), items.npy (I, K), run.json (settings, scores, the ids in the
    order of the rows), recommendations.tsv. All of it stands in `folder`, or what stood before;
    killed between the two renames, both stand in a .part-* beside it."""
    folder = os.path.realpath(folder)                      # of a link what it leads to
    part = tempfile.mkdtemp(prefix='.part-', dir=os.path.dirname(folder))
    new, old = os.path.join(part, 'new'), os.path.join(part, 'old')
    try:
        os.mkdir(new)
        for name, table in zip(TABLES, tables):
            np.save(os.path.join(new, name), table)
        with open(os.path.join(new, 'run.json'), 'w', encoding='utf8') as file:
            json.dump(run, file, indent=1)
        names = run['users'], run['items']
        write_recommendations(new, recommended, names, titles)
        if os.path.exists(folder):
            os.rename(folder, old)
        try:
            os.rename(new, folder)
        except OSError:
            if os.path.exists(old):
                os.rename(old, folder)
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def keep(args, scores, split, facts, names, tables, recommended, titles, rank):
    """The files of --save, or the recommendations of --load again, by the first process alone."""
    if args.save and not rank:
        save_run(args.save, run_facts(args, scores, split, facts, names), tables, recommended,
                 titles)
    elif not rank:
        write_recommendations(args.load, recommended, names, titles)


def pack(ndcg):
    """NDCG@10 of users with one target each, (n,), as text: a byte a user, the target's rank from
    0, 10 for none of the first ten; deflated, base64. experiments/report.py reads it."""
    ranks = np.where(ndcg > 0, np.rint(2 ** (1 / np.maximum(ndcg, .1))) - 2, 10)
    return base64.b64encode(zlib.compress(ranks.astype(np.uint8).tobytes(), 9)).decode()


def result(args, scores, facts, train, test, curve, device):
    """What the results file keeps of a finished run: a dict for one JSON line. Users are also
    scored apart, by their training interactions."""
    best = best_epoch(curve)
    degree = train.getnnz(axis=1)[test.getnnz(axis=1) > 0]                          # (n,)
    group = np.searchsorted(ACTIVITY, degree, side='right') - 1
    apart = {str(ACTIVITY[g]): {'users': int((group == g).sum()),
                                **means([score[group == g] for score in scores])}
             for g in np.unique(group)}
    return {'settings': settings_of(args), 'training': training_settings(args),
            'test': means(scores), 'valid': {'Recall@10': best['recall'], 'NDCG@10': best['ndcg']},
            **facts, 'by training interactions, from': apart,
            'spectrum': best['spectrum'], 'ranks': pack(scores[1]),
            'paper': papers(args), 'test split': digest(test),
            'curve': [[round(epoch[name], 5) for name in ('loss', 'ndcg', 'seconds')]
                      for epoch in curve],
            'versions': {'python': platform.python_version(), 'numpy': np.__version__,
                         'torch': sys.modules['torch'].__version__, 'machine': platform.machine(),
                         'device': device}}


def read_results(path):
    """The dicts of a results file, [] if there is none, and the number of damaged lines in it."""
    found, damaged = [], 0
    if os.path.exists(path):
        with open(path, encoding='utf8', errors='replace') as file:
            for line in filter(str.strip, file):
                try:
                    row = json.loads(line)
                    if not isinstance(row['settings'], dict) or not row['seconds'] >= 0:
                        raise ValueError
                    found.append(row)
                except (ValueError, KeyError, TypeError):
                    damaged += 1
    return found, damaged


def append(path, row):
    """Add a line to a results file in one write, after whatever a killed run left there."""
    with open(path, 'a+b') as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        start = b'\n' if file.read(1) not in (b'', b'\n') else b''
        file.write(start + json.dumps(row).encode() + b'\n')


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but for flags that have none."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def after_the_first():
    """Of several processes let the first say what is wrong: it ends the others, so that W of them
    print one line. Returns the rank; who waits in vain says it after all."""
    rank = int(os.environ.get('RANK', 0))
    time.sleep(5 * bool(rank))
    return rank


class OneLineParser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message):
        after_the_first()
        self.exit(2, f'llminit: error: {message}\n')


def whole(least):
    """An argparse type: a whole number of at least `least`."""
    def number(text):
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f'{text} is not a whole number of at least {least}')
        return int(text)
    return number


def between(low, high):
    """An argparse type: a number in low..high."""
    def number(text):
        try:
            value = float(text)
        except ValueError:
            value = np.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f'{text} is not a number from {low:g} to {high:g}')
        return value
    return number


def listed(kind):
    """An argparse type: values of `kind`, a type or the allowed words, with commas between."""
    def values(text):
        parts = [text] if os.path.exists(text) else [part.strip() for part in text.split(',')]
        wrong = [part for part in parts if not callable(kind) and part not in kind]
        if wrong:
            raise argparse.ArgumentTypeError(f'invalid choice: {wrong[0]!r} (choose from '
                                             f'{", ".join(kind)})')
        return [kind(part) if callable(kind) else part for part in parts]
    return values


def trimmed(text):
    """An argparse type: names with commas between, blanks around them gone."""
    return ','.join(name.strip() for name in text.split(','))


def grid(args, usual):
    """The cells of a command line, [args of one run]: all combinations of its lists and seeds,
    seeds outermost, so that a grid cut short holds whole tables. usual: args without any flag."""
    cells = {}
    for seed, *values in itertools.product(range(args.seed, args.seed + args.seeds),
                                           *(getattr(args, name) for name in LISTS)):
        cell = argparse.Namespace(**{**vars(args), **dict(zip(LISTS, values)), 'seed': seed})
        if cell.model == 'morec' and cell.strategy not in ('none', 'noise'):
            cell.strategy = 'full'                         # its projection is its selection
        elif cell.strategy == 'full':
            cell.dim = usual['dim']                        # all there are
        for name, (where, users) in USED_BY.items():
            if getattr(cell, where) not in users:
                setattr(cell, name, usual[name])
        cells[json.dumps(settings_of(cell))] = cell
    return list(cells.values())


def unused(args, cells, usual):
    """Names of flags that were given and that no cell uses."""
    return [name for name in USED_BY if getattr(args, name) not in (usual[name], [usual[name]])
            and all(getattr(cell, name) == usual[name] for cell in cells)]


def parser():
    """The parser of the command line."""
    p = OneLineParser(prog='llminit.py', allow_abbrev=False, description=__doc__.split('\n')[0],
                      formatter_class=Help, epilog='Flags with [,] take several values with commas '
                      'between: every combination is run, and kept in --results.')
    add = p.add_argument
    add('--dataset', default='ml-100k', type=listed(str), help='beauty, toys, tools, office, '
        'ml-100k, or your folder [,]')
    add('--min-rating', default=4., type=between(-1e9, 1e9), help='lower ratings are no positives')
    add('--core', default=5, type=whole(0), help='interactions that each user and item must have')
    add('--text-columns', metavar='A,B', type=trimmed,
        help='columns of the item file that make the text')
    add('--strategy', default='var', type=listed(STRATEGIES),
        help=f'{", ".join(STRATEGIES)}: which dimensions; none: no text [,]')
    add('--model', default='lightgcn', type=listed(MODELS),
        help=f'{", ".join(MODELS)}; morec takes all N dimensions [,]')
    add('--encoder', default='mpnet', type=listed(str), help='mpnet, tfidf, openai:MODEL, an MPNet '
        'folder, a .npy or .npz file [,]')
    add('--dim', default='128', type=listed(whole(1)), help='K, the dimensions kept [,]')
    add('--cold', default='0', type=listed(between(0, 1)), help='share of the training '
        'interactions of each user to remove; one stays [,]')
    add('--whiten', default=0., type=between(0, 1), help='pca: 0 keeps its widths, 1 evens them')
    add('--popular', default=1., type=between(0, 1),
        help="var: over this share of the items; authors' code .2")
    add('--pool', default='mean', choices=POOLS, help='how the items of a user make the user')
    add('--anchor', default=0., type=between(0, 1000), help='pull towards the start, in training')
    add('--views', default='edge', choices=('edge', 'node', 'walk'), help='sgl: what is dropped')
    add('--tau', default=.2, type=between(1e-3, 100), help='sgl, sgcl: temperature of the contrast')
    add('--seen', default='mask', choices=('mask', 'keep'), help='keep: as in the paper, seen '
        'items stay in the ranking')
    add('--preset', default='ours', choices=PRESETS, help='of --batch, --lr and --patience')
    add('--batch', type=whole(1), help='interactions a step')
    add('--lr', type=between(1e-9, 100), help="Adam's learning rate")
    add('--patience', type=whole(1), help='epochs without a better validation')
    add('--epochs', default=300, type=whole(1), help='at most so many')
    add('--seed', default=0, type=whole(0), help='of split, start and training')
    add('--seeds', default=1, type=whole(1), help='how many seeds to run, from --seed on')
    add('--results', metavar='FILE', help='JSON lines: a finished run is added, one that is there '
        'not run again; of several runs results.jsonl')
    add('--device', default='auto', choices=('auto', 'cpu', 'cuda', 'mps'), help='where it runs')
    add('--data', default='data', metavar='DIR', help='datasets lie here or are fetched to here')
    add('--cache', default='~/.cache/llminit', metavar='DIR', help='weights and vectors')
    add('--save', metavar='DIR', help='write vectors, ids, scores and recommendations to there')
    add('--load', metavar='DIR', help='a saved run: score, recommend again, no training')
    add('--top', default=10, type=whole(1), help='recommendations for each user')
    return p


def parse(argv=None):
    """The command line -> its cells, [args], which never leave this file: one, or a grid."""
    p = parser()
    argv = sys.argv[1:] if argv is None else argv
    args, usual = p.parse_args(argv), vars(p.parse_args([]))
    for name in ('save', 'load', 'results'):
        if getattr(args, name) == '':                  # as of a variable that is not set
            p.error(f'--{name}: expected a path, not nothing')
    if args.load:
        said = {word.partition('=')[0] for word in argv}
        given = [name for name in sorted({*KEPT, 'seeds', 'results'} - {'dataset'})
                 if f'--{name.replace("_", "-")}' in said]
        if given:
            p.error(f'a saved run has its own settings: leave out {", ".join(given)}')
        kept = [f'--{name.replace("_", "-")}={value}' for name, value
                in read_run(args.load)['settings'].items() if name in KEPT and value is not None]
        args = p.parse_args([*kept, *argv])
    usual |= {name: usual[name][0] for name in LISTS}
    cells = grid(args, usual)
    for name in unused(args, cells, usual):
        if os.environ.get('RANK', '0') == '0':
            print(f'note: no run here uses --{name}', file=sys.stderr)
    for cell in cells:                 # a word of a list that is wrong shows before the others run
        if cell.dataset not in DATASETS and not os.path.isdir(cell.dataset):
            p.error(f'{cell.dataset}: neither a folder nor one of {", ".join(DATASETS)}')
        if not (args.load or re.fullmatch('mpnet|tfidf|openai:.+', cell.encoder)
                or os.path.exists(os.path.expanduser(cell.encoder))):
            p.error(f'{cell.encoder}: no such file or folder, nor mpnet, tfidf or openai:MODEL')
    if len(cells) > 1 and (args.save or args.load):
        p.error('several runs go to --results; --save and --load are for one')
    if len(cells) > 1 and not args.results:
        for cell in cells:
            cell.results = 'results.jsonl'
    return cells


def result_row(args, scores, facts, header=True):
    """A Markdown table of one row; with --seen keep the paper's figure stands beside ours."""
    usual = vars(parse([])[0])
    told = ('encoder', 'cold', 'whiten', 'popular', 'pool', 'anchor', 'views', 'tau', 'batch', 'lr',
            'patience', 'epochs', 'core', 'min_rating', 'text_columns')
    other = ' '.join(f'{name}={value}' for name, value in vars(args).items()
                     if name in told and value != usual[name])
    cells = {'dataset': args.dataset, 'model': args.model, 'strategy': args.strategy,
             'Recall@10': f'{scores[0].mean():.4f}', 'NDCG@10': f'{scores[1].mean():.4f}',
             'seen': args.seen, 'preset': args.preset, 'K': facts['K'], 'other': other or '-',
             'seed': args.seed, 'best epoch': facts['best epoch'],
             'parameters': facts['parameters'], 'seconds': round(facts['seconds'])}
    if args.seen == 'keep':
        cells['paper'] = papers(args)
    lines = (cells.keys(), ['---'] * len(cells), cells.values())[0 if header else 2:]
    return '\n'.join(f'| {" | ".join(map(str, line))} |' for line in lines)


def say(line):
    """Print at once, also into a pipe; on a terminal in place of the live line."""
    terminal = sys.stdout.isatty() and sys.stderr.isatty()
    print('\r\x1b[K' * terminal + line, flush=True)


def time_left(cells, rows):
    """'about 12 min left' for cells, by the seconds of rows with the same data and model."""
    same = {}
    for row in rows:
        for key in ((row['settings'].get('dataset'), row['settings'].get('model')), None):
            same.setdefault(key, []).append(row['seconds'])
    if not rows:
        return 'time left unknown'
    left = sum(np.mean(same.get((settings_of(cell)['dataset'], cell.model), same[None]))
               for cell in cells)
    return f'about {left:.0f} s left' if left < 120 else f'about {left / 60:.0f} min left'


def called(args):
    """A cell of a grid in a few words."""
    return (f'{args.dataset} {args.model} {args.strategy} {args.encoder} K={args.dim} '
            f'cold={args.cold:g} seed {args.seed}')


def live(n, of, left, which, line):
    """What models.train says of an epoch, on one line of a terminal that stays; see pending()."""
    epoch = re.match(r'epoch +(\d+) .*best (\S+) at +(\d+)', line)
    if epoch and sys.stderr.isatty():
        best = 'epoch {}, best {} at {}'.format(*epoch.groups())
        width = shutil.get_terminal_size().columns - 1
        print('\r' + f'{n}/{of} {best}; {left}; {which}'[:width], end='\x1b[K', file=sys.stderr,
              flush=True)


def unfinished(cells, path):
    """The cells that the results file at path (None: there is none) does not hold, what it holds,
    and the number of its damaged lines."""
    rows, damaged = read_results(path) if path else ([], 0)
    done = [(row['settings'], row.get('training')) for row in rows]
    return [cell for cell in cells if whole_settings(cell) not in done], rows, damaged


def pending(cells, agree):
    """Yields (args, log) of the cells that their results file does not hold yet; of several
    processes the first says which: agree(text, done), see models.agree.

    log: what models.train says an epoch's line to. A single run says all its lines; of a grid a
    terminal shows one live line, a pipe a line a run.
    """
    if cells[0].save:
        check_folder(cells[0].save)
    path = cells[0].results
    if path:                           # what cannot be written shows now, not after the training
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        with open(path, 'a+b') as file:
            file.seek(0)
            if file.read(1) not in (b'', b'{', b'\n'):
                raise ValueError(f'{path} is no results file: choose another --results')
    for n, args in enumerate(cells):
        left, rows, damaged = unfinished(cells[n:], path)
        if damaged and not n:
            print(f'note: {path}: {damaged} damaged lines are left out', file=sys.stderr)
        done = args not in left and not args.save
        if agree(lambda: json.dumps(whole_settings(args)), done):
            if len(cells) == 1:
                print(f'note: this run is in {path}', file=sys.stderr)
            continue
        if len(cells) == 1:
            yield args, say
            continue
        at = len(cells) - len(left) + 1, len(cells), time_left(left, rows)
        if not sys.stderr.isatty():
            print('run {} of {}, {}: {}'.format(*at, called(args)), file=sys.stderr)
        yield args, functools.partial(live, *at, called(args))
    if len(cells) > 1:
        there = len(cells) - len(unfinished(cells, path)[0])
        print('\r\x1b[K' * sys.stderr.isatty() + f'{there} runs are in {path}', file=sys.stderr)


def complain(text, file):
    """What ends the program, on a terminal in place of the live line."""
    print('\r\x1b[K' * file.isatty() + f'llminit: {text}', file=file)


def run_all(cells, agree, run):
    """run(args, log, header) for each pending cell; header: does the table of rows begin here? A
    cell that cannot run, as with a K too large, is named, and the others still run; ValueError
    behind them all. Where there is one cell, or several processes, its own error ends it."""
    header, failed = True, 0
    for args, log in pending(cells, agree):
        try:
            run(args, log, header)
            header = False
        except ValueError as error:
            if len(cells) == 1 or 'RANK' in os.environ:
                raise
            failed += 1
            complain(f'error: {" ".join(str(error).split())} ({called(args)})', sys.stderr)
    if failed:
        raise ValueError(f'{failed} of {len(cells)} runs failed')


def be_quiet(rank):
    """All processes but the first print nothing, or what ends them."""
    if not rank:
        return
    sys.stdout = sys.stderr = open(os.devnull, 'w')
    sys.excepthook = lambda *error: traceback.print_exception(*error, file=sys.__stderr__)


def once(function):
    """function with a memory: the cells of a grid share data and vectors."""
    known = {}

    def remembering(*args, **kwargs):
        key = tuple(tuple(value) if isinstance(value, list) else value
                    for value in (*args, *itertools.chain(*sorted(kwargs.items()))))
        if key not in known:
            known[key] = function(*args, **kwargs)
        return known[key]
    return remembering


def main(argv=None):
    """Each run from data to result row, a line a stage. Under torchrun every process does all of it
    with its columns of the tables; the first prints and saves."""
    cells = parse(argv)
    import torch
    import data
    import embed
    import models
    load, encode = once(data.load), once(embed.encode)
    rank, device = models.join(cells[0].device)
    be_quiet(rank)

    def run(args, log, header):
        started, rng = time.time(), np.random.default_rng(args.seed)
        pairs, texts, titles, *names, low = load(                            # csr (U, I), I texts
            args.dataset, args.data, min_rating=args.min_rating, core=args.core,
            text_columns=args.text_columns and args.text_columns.split(','))
        train, valid, test = split = data.split(pairs, rng)                  # csr (U, I) each
        train = data.thin(train, args.cold, rng)                             # csr (U, I)
        (U, I), K = train.shape, args.dim
        log(sizes(args.dataset, pairs, train, valid, test, models.agree))
        if args.load:
            *tables, facts = load_run(args.load, split, names)               # trained before
            here = models.columns(facts['K'])
            users, items = (torch.from_numpy(table[:, here]).to(device) for table in tables)
        else:
            if args.strategy == 'none':                                      # without any text
                here = models.start_columns(args.model, K)
                users0, items0 = xavier(rng, U, K, here), xavier(rng, I, K, here)
            else:
                vectors = encode(texts, args.encoder, ids=names[1], cache=args.cache, device=device)
                whole = select_dims(vectors, K, args.strategy, rng, whiten=args.whiten,
                                    popular=args.popular, degree=train.getnnz(axis=0))  # (I, K)
                K = whole.shape[1]                                           # all N with full
                items0 = whole[:, models.start_columns(args.model, K)]
                users0 = pool_users(train, items0, args.pool)                # (U, K)
            users, items, curve = models.train(args.model, train, valid, users0, items0, rng,
                                               device=device, log=log, **training_settings(args))
            facts = {'best epoch': best_epoch(curve)['epoch'], 'K': models.width(items),
                     'parameters': (U + I) * K}
        scores = models.evaluate(users, items, test, train + valid if args.seen == 'mask' else None)
        facts['seconds'] = time.time() - started
        say(result_row(args, scores, facts, header))
        if args.results and not rank:
            append(args.results, result(args, scores, facts, train, test, curve, device))
        if args.save or args.load:
            tables = [models.gathered(table).cpu().numpy() for table in (users, items)]
            best = models.recommend(users, items, pairs + low, args.top)     # (U, top) twice
            keep(args, scores, split, facts, names, tables, best, titles, rank)

    run_all(cells, models.agree, run)
    models.leave()


def command(argv=None):
    """The command line -> exit code: 2 and one line on stderr for bad input, 130 after Ctrl-C."""
    try:
        main(argv)
    except (ValueError, OSError, MemoryError) as error:
        text = ' '.join(str(error).split()) or 'not enough memory'
        complain(f'error: {text}', sys.__stderr__ if after_the_first() else sys.stderr)
        return 2
    except KeyboardInterrupt:
        complain('stopped', sys.stderr)
        return 130
    return 0


if __name__ == '__main__':
    sys.exit(command())
