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
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time

import numpy as np
import scipy.sparse as sp

STRATEGIES = ('none', 'rand', 'uni', 'var', 'noise', 'pca', 'proj', 'prefix', 'full')
MODELS = ('lightgcn', 'sgl', 'sgcl', 'morec', 'bpr')
POOLS = ('mean', 'sqrt', 'sum')
TABLES = ('users.npy', 'items.npy')                                  # of a saved run
# what a saved run keeps of the command line: all that its figures depend on
KEPT = {'dataset', 'min_rating', 'core', 'text_columns', 'strategy', 'model', 'encoder', 'dim',
        'whiten', 'popular', 'pool', 'anchor', 'views', 'tau', 'seen', 'preset', 'batch', 'lr',
        'patience', 'epochs', 'seed'}
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


def xavier(rng, rows, K):
    """The baselines' random start [authors' code], uniform on +-sqrt(6 / (rows + K)): (rows, K)."""
    return (rng.uniform(-1, 1, (rows, K)) * np.sqrt(6 / (rows + K))).astype(np.float32)


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but for flags that have none."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class OneLineParser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message):
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


def digest(*matrices):
    """Hex digest of csr matrices: which split a run was trained and tested on."""
    parts = (np.asarray(a, np.int64).tobytes() for m in matrices for a in (m.indptr, m.indices))
    return hashlib.sha256(b''.join(parts)).hexdigest()


def run_facts(args, scores, split, facts, names):
    """What run.json holds: settings, scores, the split's digest, the ids in the order of rows."""
    settings = {name: getattr(args, name) for name in sorted(KEPT)}
    if os.path.isdir(args.dataset):
        settings['dataset'] = os.path.abspath(args.dataset)
    recall, ndcg = (float(score.mean()) for score in scores)
    return {'settings': settings, 'scores': {'Recall@10': recall, 'NDCG@10': ndcg}, **facts,
            'split': digest(*split), 'users': names[0], 'items': names[1]}


def read_run(folder):
    """The run.json of a saved run; ValueError or OSError with one line if it is not one."""
    with open(os.path.join(folder, 'run.json'), encoding='utf8') as file:
        try:
            run = json.load(file)
            if set(run['settings']) != KEPT or not (isinstance(run['users'], list)
                                                    and isinstance(run['items'], list)):
                raise ValueError('other settings than this version has')
            return run | {'best epoch': int(run['best epoch']), 'K': int(run['K']),
                          'parameters': int(run['parameters']), 'split': str(run['split'])}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f'{folder}/run.json is not of a saved run ({error!r})') from None


def load_run(folder, split, names):
    """users (U, K), items (I, K), facts of a saved run, only for the split it was saved with."""
    run = read_run(folder)
    if (run['users'], run['items'], run['split']) != (*names, digest(*split)):
        raise ValueError(f"{folder} was saved for {len(run['users'])} users and {len(run['items'])}"
                         f' items; the data hold {len(names[0])} and {len(names[1])}, or other '
                         'interactions: train anew')
    tables = [np.load(os.path.join(folder, name), allow_pickle=False) for name in TABLES]
    for table, ids in zip(tables, names):
        if table.ndim != 2 or len(table) != len(ids) or not np.isfinite(table).all():
            raise ValueError(f'{folder}: a table of shape {table.shape} for {len(ids)} ids')
    return *tables, {name: run[name] for name in ('best epoch', 'K', 'parameters')}


def check_folder(folder):
    """OSError or ValueError now, not after the training, where a run could not be saved."""
    if os.path.exists(folder):
        others = set(os.listdir(folder)) - {*TABLES, 'run.json', 'recommendations.tsv'}
        if others:
            raise ValueError(f'{folder} holds other files than a saved run: choose another --save')
    parent = os.path.dirname(os.path.abspath(folder))
    try:
        os.makedirs(parent, exist_ok=True)
        os.rmdir(tempfile.mkdtemp(prefix='.part-', dir=parent))
    except OSError as error:
        raise OSError(f'cannot save to {folder}: {error.strerror}') from None


def write_recommendations(path, recommended, names, titles):
    """A line for each user and rank, best first; written beside and renamed."""
    blanks = str.maketrans('\t\r\n', '   ')
    with open(path + '.part', 'w', encoding='utf8') as file:
        file.write('user_id\trank\titem_id\tscore\ttitle\n')
        for user, row, scores in zip(names[0], *recommended):
            for rank, (i, score) in enumerate(zip(row[row >= 0], scores), 1):
                cells = user, rank, names[1][i], f'{score:.6g}', titles[i]
                file.write('\t'.join(str(cell).translate(blanks) for cell in cells) + '\n')
    os.replace(path + '.part', path)


def save_run(folder, run, tables, recommended, titles):
    """Write a run: users.npy (U, K), items.npy (I, K), run.json (settings, scores, the ids in the
    order of the rows), recommendations.tsv. All of it stands in `folder`, or what stood before."""
    part = tempfile.mkdtemp(prefix='.part-', dir=os.path.dirname(os.path.abspath(folder)))
    new, old = os.path.join(part, 'new'), os.path.join(part, 'old')
    try:
        os.mkdir(new)
        for name, table in zip(TABLES, tables):
            np.save(os.path.join(new, name), table)
        with open(os.path.join(new, 'run.json'), 'w', encoding='utf8') as file:
            json.dump(run, file, indent=1)
        names = run['users'], run['items']
        write_recommendations(os.path.join(new, 'recommendations.tsv'), recommended, names, titles)
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


def parse(argv=None):
    """The command line -> args, which never leave this file."""
    p = OneLineParser(prog='llminit.py', allow_abbrev=False, description=__doc__.split('\n')[0],
                      formatter_class=Help)
    add = p.add_argument
    add('--dataset', default='ml-100k', help='beauty, toys, tools, office, ml-100k, or your folder')
    add('--min-rating', default=4., type=between(-1e9, 1e9), help='lower ratings are no positives')
    add('--core', default=5, type=whole(0), help='interactions that each user and item must have')
    add('--text-columns', metavar='A,B', help='columns of the item file that make the text')
    add('--strategy', default='var', choices=STRATEGIES, help='which dimensions; none: no text')
    add('--model', default='lightgcn', choices=MODELS, help='morec takes all N dimensions')
    add('--encoder', default='mpnet', help='mpnet, tfidf, openai:MODEL, an MPNet '
        'folder, a .npy or .npz file')
    add('--dim', default=128, type=whole(1), help='K, the dimensions kept')
    add('--whiten', default=0., type=between(0, 1), help='pca: 0 keeps its widths, 1 evens them')
    add('--popular', default=1., type=between(0, 1), help='var: over this share of items; paper .2')
    add('--pool', default='mean', choices=POOLS, help='of items to a user')
    add('--anchor', default=0., type=between(0, 1000), help='pull towards the start, in training')
    add('--views', default='edge', choices=('edge', 'node', 'walk'), help='sgl: what is dropped')
    add('--tau', default=.2, type=between(1e-3, 100), help='sgl, sgcl: temperature of the contrast')
    add('--seen', default='mask', choices=('mask', 'keep'), help='keep: as in the paper, seen '
        'items stay in the ranking')
    add('--preset', default='ours', choices=PRESETS, help='of the next three')
    add('--batch', type=whole(1), help='interactions a step')
    add('--lr', type=between(1e-9, 100), help="Adam's learning rate")
    add('--patience', type=whole(1), help='epochs without a better validation')
    add('--epochs', default=300, type=whole(1), help='at most so many')
    add('--seed', default=0, type=whole(0), help='of split, start and training')
    add('--device', default='auto', choices=('auto', 'cpu', 'cuda', 'mps'), help='where it runs')
    add('--data', default='data', metavar='DIR', help='datasets lie here or are fetched to here')
    add('--cache', default='~/.cache/llminit', metavar='DIR', help='weights and vectors')
    add('--save', metavar='DIR', help='write vectors, ids, scores and recommendations to there')
    add('--load', metavar='DIR', help='a saved run: score, recommend again, no training')
    add('--top', default=10, type=whole(1), help='recommendations for each user')
    args = p.parse_args(argv)
    if args.load:
        usual = vars(p.parse_args([]))
        given = [name for name in sorted(KEPT) if getattr(args, name) != usual[name]]
        if given:
            p.error(f'a saved run has its own settings: leave out {", ".join(given)}')
        kept = [f'--{name.replace("_", "-")}={value}' for name, value
                in read_run(args.load)['settings'].items() if value is not None]
        args = p.parse_args(kept + list(sys.argv[1:] if argv is None else argv))
    if args.model == 'morec' and args.strategy not in ('none', 'noise'):
        args.strategy = 'full'                             # its projection is its selection
    return args


def result_row(args, scores, facts, seconds):
    """A Markdown table of one row; with --seen keep the paper's figure stands beside ours."""
    usual = vars(parse([]))
    told = ('encoder', 'whiten', 'popular', 'pool', 'anchor', 'views', 'tau', 'batch', 'lr',
            'patience', 'epochs', 'core', 'min_rating', 'text_columns')
    other = ' '.join(f'{name}={value}' for name, value in vars(args).items()
                     if name in told and value != usual[name])
    cells = {'dataset': args.dataset, 'model': args.model, 'strategy': args.strategy,
             'Recall@10': f'{scores[0].mean():.4f}', 'NDCG@10': f'{scores[1].mean():.4f}',
             'seen': args.seen, 'preset': args.preset, 'K': facts['K'], 'other': other or '-',
             'seed': args.seed, 'best epoch': facts['best epoch'],
             'parameters': facts['parameters'], 'seconds': round(seconds)}
    if args.seen == 'keep' and (args.dataset, args.model) in PAPER:
        which = ('full',) if args.model == 'morec' else STRATEGIES
        figures = dict(zip(which, PAPER[args.dataset, args.model].split()))
        cells['paper'] = figures.get(args.strategy, '-')
    lines = cells.keys(), ['---'] * len(cells), cells.values()
    return '\n'.join(f'| {" | ".join(map(str, line))} |' for line in lines)


def training_settings(args):
    """Arguments of models.train that the command line sets: the preset's and those given."""
    # the other examples of a batch are SGCL's negatives: more of them are another loss
    ours = args.preset == 'ours' and args.model != 'sgcl'
    preset = OUR_TRAINING if ours else PAPER_TRAINING
    settings = {name: value if getattr(args, name) is None else getattr(args, name)
                for name, value in preset.items()}
    settings |= {name: getattr(args, name) for name in ('seen', 'epochs', 'anchor')}
    own = {'sgl': ('views', 'tau'), 'sgcl': ('tau',), 'morec': ('dim',)}.get(args.model, ())
    return settings | {name: getattr(args, name) for name in own}


def main(argv=None):
    """One run from data to result row, a line a stage."""
    args, started = parse(argv), time.time()
    import torch
    import data
    import embed
    import models
    rng, device = np.random.default_rng(args.seed), models.pick_device(args.device)
    if args.save:
        check_folder(args.save)
    pairs, texts, titles, *names = data.load(                                # csr (U, I), I texts
        args.dataset, args.data, min_rating=args.min_rating, core=args.core,
        text_columns=args.text_columns and args.text_columns.split(','))
    train, valid, test = split = data.split(pairs, rng)                      # csr (U, I) each
    (U, I), K = train.shape, args.dim
    print(f'{args.dataset}: {U:,} users, {I:,} items, {pairs.nnz:,} interactions: {train.nnz:,} '
          f'train, {valid.nnz:,} valid, {test.nnz:,} test', flush=True)
    if not test.nnz:
        raise ValueError('no user has two interactions, so there is nothing to test with')
    if args.load:
        *tables, facts = load_run(args.load, split, names)                   # trained before
        users, items = (torch.from_numpy(table).to(device) for table in tables)
    else:
        if args.strategy == 'none':
            users0, items0 = xavier(rng, U, K), xavier(rng, I, K)            # without any text
        else:
            vectors = embed.encode(texts, args.encoder, ids=names[1], cache=args.cache,
                                   device=device)                            # (I, N)
            items0 = select_dims(vectors, K, args.strategy, rng, whiten=args.whiten,
                                 popular=args.popular, degree=train.getnnz(axis=0))  # (I, K)
            users0 = pool_users(train, items0, args.pool)                    # (U, K)
        users, items, curve = models.train(args.model, train, valid, users0, items0, rng,
                                           device=device, **training_settings(args))
        facts = {'best epoch': [epoch['epoch'] for epoch in curve if epoch['best']][-1],
                 'K': items.shape[1], 'parameters': users0.size + items0.size}
    scores = models.evaluate(users, items, test, train + valid if args.seen == 'mask' else None)
    if args.save or args.load:
        best = models.recommend(users, items, pairs, args.top)               # (U, top) twice
    if args.save:
        save_run(args.save, run_facts(args, scores, split, facts, names),
                 (users.cpu(), items.cpu()), best, titles)
    elif args.load:
        write_recommendations(os.path.join(args.load, 'recommendations.tsv'), best, names, titles)
    print(result_row(args, scores, facts, time.time() - started))


def command(argv=None):
    """The command line -> exit code: 2 and one line on stderr for bad input, 130 after Ctrl-C."""
    try:
        main(argv)
    except (ValueError, OSError) as error:
        print('llminit: error:', ' '.join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('llminit: stopped', file=sys.stderr)
        return 130
    return 0


if __name__ == '__main__':
    sys.exit(command())
