"""LLMInit: start a recommender's embedding tables from a language model's item vectors.

arXiv 2503.01814. A frozen language model encodes the text of each item once (N numbers an item).
K of the N dimensions are kept, the same K for every item, and the item table of a small
collaborative filtering model starts from them; each user starts from the pool of the items in the
user's training history. Then everything trains as usual. At run time no language model is needed.

The method is select_dims (section 3.1) and pool_users (section 3.2, eq. (1)); joint is our own
alternative to select_dims. main() is the whole path from data to result, a line a stage:

    data.load -> embed.encode -> data.split -> select_dims -> pool_users -> models.train
              -> models.evaluate -> one table row

    python llminit.py --dataset beauty --strategy var

The functions need numpy and scipy only, and this file works alone; main() needs data.py, embed.py
and models.py beside it. MIT licence.
Shapes: U users, I items, N encoder width, K kept dimensions.
"""
import argparse
import contextlib
import hashlib
import json
import os
import shlex
import signal
import sys
import tempfile
import time
from pathlib import Path


def printable(text):
    """text on one line, with escapes for what a terminal would act on."""
    return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in ' '.join(text.split()))


def complain(text):
    """Print one line on stderr: under torchrun in the first process of each machine."""
    if os.environ.get('LOCAL_RANK', '0') in ('', '0'):
        print(f'llminit: {printable(text)[:1000]}', file=sys.stderr)


def stop(number, frame):
    """End the program after Ctrl-C or SIGTERM: in one line, and temporary folders go."""
    complain('stopped')
    sys.exit(128 + number)


if __name__ == '__main__':             # before numpy, whose import takes a while
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)

import numpy as np                     # noqa: E402
import scipy.sparse as sp              # noqa: E402
import scipy.sparse.linalg             # noqa: E402, F401

# ---- the method --------------------------------------------------------------------------------

SELECTIONS = 'rand', 'uni', 'var', 'noise', 'pca', 'full'  # strategies of select_dims
POOLS = {'mean': -1., 'sqrt': -.5, 'sum': 0.}              # power of |N_u| in eq. (1)


def as_matrix(name, rows):
    """rows, which may be a torch tensor, as a matrix of numpy. ValueError unless it is finite."""
    try:
        rows = np.asarray(rows)
        finite = np.isfinite(rows)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f'{name}: expected a matrix of numbers; {error}') from None
    if rows.ndim != 2:
        raise ValueError(f'{name}: expected a matrix, found the shape {rows.shape}')
    if bad := (~finite).any(axis=1).sum():
        raise ValueError(f'{name}: {bad} of {len(rows)} rows hold NaN or infinity')
    return rows.astype(rows.dtype.newbyteorder('='), copy=False)


def as_history(train, items):
    """train as csr (U, I). ValueError if it stores zeros or has other items."""
    train = sp.csr_matrix(train)
    if train.shape[1] != len(items):
        raise ValueError(f'train has {train.shape[1]} items for {len(items)} item vectors')
    if not train.data.all():
        raise ValueError('train stores zeros: call train.eliminate_zeros()')
    return train


def principal(vectors, K, whiten=0.):
    """The K principal components of centred vectors: (I, N) -> (I, K), widest first.

    Component k is divided by its standard deviation to the power `whiten` (0: PCA, 1: all equally
    wide), then everything by one number, so that the Frobenius norm stays that of PCA.
    """
    centred = vectors - vectors.mean(axis=0, dtype=np.float64)                      # (I, N)
    variance, axes = np.linalg.eigh(centred.T @ centred / len(centred))             # (N,), (N, N)
    std = np.sqrt(np.maximum(variance[::-1][:K], 0))                                # (K,)
    axes = axes[:, ::-1][:, :K]                                                     # (N, K)
    if not std[-1] > 1e-6 * std[0]:
        raise ValueError(f'the vectors span fewer than K = {K} dimensions: choose a smaller K')

    # the sign of an eigenvector is arbitrary: its largest entry becomes positive
    axes *= np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(K)])
    weight = std ** -whiten * np.linalg.norm(std) / np.linalg.norm(std ** (1 - whiten))
    return (centred @ axes * weight).astype(np.result_type(vectors, np.float32))


def select_dims(vectors, K, strategy='var', rng=None, *, whiten=0., popular=1., degree=None):
    """Reduce item vectors to K dimensions: (I, N) -> (I, K). Section 3.1 of the paper.

    'uni'    dimensions k floor(N/K), k = 0..K-1; for K > N/2 the first K
    'rand'   K distinct dimensions drawn from rng (the authors' code draws with replacement)
    'var'    the K dimensions of highest variance over all items; popular=.2 counts only that share
             of the items, those with the highest `degree` (I,), as the authors' code does
    Beyond the paper [ours] (and see joint() below):
    'pca'    K principal components, see principal(), which `whiten` is for
    'full'   all N dimensions, whatever K is
    'noise'  no text: normal numbers of the vectors' root mean square, as a control: a gain with it
             comes from scale and pooling

    Three of ten dimensions, evenly spaced and of highest variance:

    >>> select_dims([[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]], 3, 'uni').tolist()
    [[0, 3, 6]]
    >>> select_dims([[1, 5, 0, 0], [1, -5, 2, 9]], 2, 'var').tolist()
    [[5, 0], [-5, 9]]

    ValueError for vectors that are not finite, and for K > N except with 'full' and 'noise'.
    """
    vectors = as_matrix('vectors', vectors)
    N = vectors.shape[1]
    if strategy not in SELECTIONS:
        raise ValueError(f'strategy {strategy!r}: expected one of {", ".join(SELECTIONS)}')
    if strategy in ('rand', 'noise') and rng is None:
        raise ValueError(f'{strategy} needs rng, a numpy Generator or a seed')
    if strategy == 'var' and popular < 1 and np.size(degree) != len(vectors):
        raise ValueError('popular < 1 needs degree, the number of users of each item')
    if not 1 <= K <= N and strategy not in ('full', 'noise'):
        raise ValueError(f'cannot keep {K} of {N} dimensions: choose K from 1 to {N}')

    if strategy == 'full':
        return vectors.copy()
    if strategy == 'pca':
        return principal(vectors, K, whiten)
    if strategy == 'noise':
        scale = np.sqrt(np.square(vectors, dtype=np.float64).mean())
        rng = np.random.default_rng(rng)
        return rng.normal(0, scale, (len(vectors), K)).astype(np.result_type(vectors, np.float32))

    if strategy == 'uni':
        kept = np.arange(K) * (N // K)
    elif strategy == 'rand':
        kept = np.sort(np.random.default_rng(rng).choice(N, K, replace=False))
    else:
        counted = slice(None)
        if popular < 1:
            order = np.argsort(-np.asarray(degree, float).ravel(), kind='stable')
            counted = order[:max(2, round(popular * len(vectors)))]
        variance = vectors[counted].var(axis=0, dtype=np.float64)        # (N,)
        kept = np.sort(np.argsort(-variance, kind='stable')[:K])         # of equals the first
    return vectors.take(kept, axis=1)                                    # (I, K)


def pool_users(train, items0, pool='mean'):
    """Start each user from the items of the training history: csr (U, I), (I, K) -> (U, K).

    Section 3.2, eq. (1): u = sum_{i in N_u} v_i / |N_u| ('mean', as in the authors' code; the
    divisor is illegible in our copy), or over sqrt|N_u| ('sqrt'), or undivided ('sum').
    A user without training items starts at zero. A user of two items, and one of none:

    >>> pool_users([[1, 1], [0, 0]], [[2., 0.], [4., 1.]]).tolist()
    [[3.0, 0.5], [0.0, 0.0]]

    ValueError if train stores zeros.
    """
    if pool not in POOLS:
        raise ValueError(f'pool {pool!r}: expected one of {", ".join(POOLS)}')
    items0 = as_matrix('items0', items0)
    train = as_history(train, items0)
    size = np.diff(train.indptr)                                     # (U,) |N_u|
    weight = (np.repeat(size, size) ** POOLS[pool]).astype(np.result_type(items0, np.float32))
    history = sp.csr_matrix((weight, train.indices, train.indptr), train.shape)
    return history @ items0                                          # eq. (1), (U, K)


def joint(vectors, train, K, text_weight=10., ridge=30.):
    """The K strongest directions of interactions and text: (I, N), csr (U, I) -> (I, K). [ours]

    X is train, F the vectors at length 1. D, the diagonal of |N_i| + text_weight + ridge with N_i
    the users of item i, makes items comparable: M = D^-1/2 (X'X + text_weight F F' + ridge Id)
    D^-1/2 says how alike two items are by users and by text. Of M's K largest eigenvalues mu and
    their eigenvectors V, column k of the result is V_k sqrt(1 - 1/mu_k), zero for mu_k <= 1. The
    result times its transpose keeps the K largest terms of Id - M^-1 = sum_k V_k (1 - 1/mu_k) V_k',
    which is EASE (arXiv 1905.03375), but for EASE's division by a diagonal, with the dimensions of
    the text as further users. No (I, I) matrix is made. The two weights were chosen on office.
    """
    vectors = as_matrix('vectors', vectors)
    vectors = vectors.astype(np.result_type(vectors, np.float32), copy=False)
    train = as_history(train, vectors)
    if not 0 < K < len(vectors):
        raise ValueError(f'cannot make {K} directions of {len(vectors)} items: choose a smaller K')

    degree = np.bincount(train.indices, minlength=len(vectors))                      # (I,) |N_i|
    scale = (degree + text_weight + ridge) ** -.5                                    # (I,) D^-1/2
    length = np.linalg.norm(vectors, axis=1)
    length[length == 0] = 1                                # an item without words stays zero
    DF = vectors * (text_weight ** .5 * scale / length)[:, None]     # (I, N) D^-1/2 F, weighted
    XD = sp.csr_matrix((scale[train.indices], train.indices, train.indptr), train.shape)

    def times_M(v):
        return XD.T @ (XD @ v) + DF @ (DF.T @ v) + ridge * scale ** 2 * v
    M = sp.linalg.LinearOperator((len(DF), len(DF)), dtype=float, matvec=times_M)
    mu, V = sp.linalg.eigsh(M, K, v0=np.ones(len(DF)), tol=1e-4)                     # ascending
    V *= np.sign(V[np.abs(V).argmax(axis=0), np.arange(K)]) * np.sqrt(1 - 1 / np.maximum(mu, 1))
    return V[:, ::-1].astype(vectors.dtype, order='C')                               # (I, K)


def xavier(rng, rows, K):
    """The random start of the baselines [authors' code]: uniform on +-sqrt(6 / (rows + K))."""
    return (rng.uniform(-1, 1, (rows, K)) * np.sqrt(6 / (rows + K))).astype(np.float32)


# ---- one run -----------------------------------------------------------------------------------


def main(argv=None):
    """One run from data to result row, a line a stage. Under torchrun every process does all of it,
    and models.py gives each a share of the K dimensions; the first prints and saves."""
    args = parse(argv)
    started = time.time()
    # waiting threads sleep: beside other programs that is 2 to 3 times as fast [measured]; torch
    # reads it when it is imported
    os.environ.setdefault('OMP_WAIT_POLICY', 'passive')
    import data
    import embed
    import models
    rank, device = models.join(args.device)
    say = tell if rank == 0 else lambda line: None
    if args.save is not None and rank == 0:
        check_folder(args.save)                    # what cannot be saved shows now
        data.sweep(Path(args.save), '.part-*')     # what a killed run left there

    with models.in_turn():                         # the first process downloads and encodes
        # interactions and low, those rated low: csr (U, I); texts, titles, item_ids: [I]
        interactions, texts, titles, user_ids, item_ids, low = data.load(
            args.dataset, args.data, min_rating=args.min_rating, core=args.core,
            columns=dict(args.columns), text_columns=args.text_columns,
            timestamps=args.split == 'last')
        if args.strategy != 'none':
            vectors = embed.encode(texts, args.encoder, ids=item_ids, cache=args.cache,
                                   device=device)                            # (I, N)

    rng = np.random.default_rng(args.seed)
    train, valid, test = data.split(interactions, rng, args.split == 'last')  # csr (U, I) each
    train = data.thin(train, args.cold, rng)
    say(f'{printable(args.dataset)}: {len(user_ids):,} users, {len(item_ids):,} items, '
        f'{interactions.nnz:,} interactions: {train.nnz:,} train, {valid.nnz:,} valid, '
        f'{test.nnz:,} test')

    if args.strategy == 'none':
        users0, items0 = (xavier(rng, n, args.dim) for n in train.shape)     # (U, K), (I, K)
    else:
        if args.strategy == 'joint':
            items0 = joint(vectors, train, args.dim)                         # (I, K)
        else:
            items0 = select_dims(vectors, args.dim, args.strategy, rng, whiten=args.whiten,
                                 popular=args.popular, degree=train.getnnz(axis=0))
        users0 = pool_users(train, items0, args.pool)                        # (U, K)

    model, curve = models.train(args.model, train, valid, users0, items0, rng, device=device,
                                log=say, **train_arguments(args))
    users, items = model.embeddings()                                        # (U, K), (I, K)
    seen = train + valid if args.seen == 'mask' else None
    metrics = models.evaluate(users, items, test, seen)    # (n,) twice: the users with a test item

    row = result_row(args, items.shape[1], metrics, curve, time.time() - started,
                     sys.argv[1:] if argv is None else argv)
    if args.save is not None and rank == 0:        # before the row: a printed run is a saved one
        recommended = models.recommend(users, items, interactions + low, args.top)  # (U, top) twice
        run = {'settings': vars(args), 'metrics': row, 'users': user_ids, 'items': item_ids}
        save(args.save, users.cpu().numpy(), items.cpu().numpy(), run, recommended, titles)
    say(lines_of(row))


def tell(line):
    """Print a line at once; nothing more if nobody reads on, as behind `| head -3`."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def train_arguments(args):
    """Arguments of models.train that the command line sets."""
    own = {'sgl': dict(views=args.views, tau=args.tau), 'sgcl': dict(tau=args.tau)}
    return dict(mask_seen=args.seen == 'mask', epochs=args.epochs, batch=args.batch, lr=args.lr,
                patience=args.patience, **own.get(args.model, {}))


def result_row(args, K, metrics, curve, seconds, flags):
    """{column: value} of the table row of a run. metrics: Recall@10 and NDCG@10 of the users."""
    best = [0] + [epoch['epoch'] for epoch in curve if epoch['best']]        # 0: not trained
    return {'dataset': args.dataset, 'model': args.model, 'strategy': args.strategy,
            'Recall@10': f'{metrics[0].mean():.4f}',
            'NDCG@10': f'{metrics[1].mean():.4f}', 'K': K, 'seed': args.seed,
            'best epoch': best[-1], 'seconds': round(seconds), 'command': shlex.join(flags) or '-'}


def lines_of(row, head=True):
    """The lines of a Markdown table of one row."""
    cells = [row.keys(), ['---'] * len(row), row.values()]
    lines = [' | '.join(printable(str(cell)) for cell in line) for line in cells]
    return '\n'.join(f'| {line} |' for line in lines[0 if head else 2:])


# ---- a saved run -------------------------------------------------------------------------------

SAVED = 'users.npy', 'items.npy', 'recommendations.tsv', 'run.json'      # run.json is renamed last


def check_folder(folder):
    """Make the folder to save to. ValueError or OSError unless it is new, empty or holds a run."""
    os.makedirs(folder, exist_ok=True)
    there = {name: os.path.join(folder, name) for name in sorted(os.listdir(folder))}
    run = None
    with contextlib.suppress(KeyError, ValueError, RecursionError):    # no file, or not JSON
        with open(there['run.json'], encoding='utf8') as file:
            run = json.load(file)
    ours = isinstance(run, dict) and 'settings' in run
    if not ours and (others := [name for name in there if name[0] != '.']):
        raise ValueError(f'{folder} holds other files, such as {others[0]}, and no run: choose '
                         'another --save')
    os.rmdir(tempfile.mkdtemp(prefix='.part-', dir=folder))


def save(folder, users, items, run, recommended, titles):
    """Write users.npy (U, K), items.npy (I, K), recommendations.tsv and run.json, each one whole.

    run: dict with the ids of users and items in the order of their rows; the SHA-256 of both .npy
    files is added, so that files of two runs are told apart. recommended: items (U, n) and scores
    (U, n) from models.recommend; titles [I]. A score is the dot product of two rows.
    """
    def cell(value):
        return ''.join(c if c.isprintable() else ' ' for c in str(value))

    with tempfile.TemporaryDirectory(prefix='.part-', dir=folder) as part:
        np.save(os.path.join(part, 'users.npy'), users)
        np.save(os.path.join(part, 'items.npy'), items)
        with open(os.path.join(part, 'recommendations.tsv'), 'w', encoding='utf8') as file:
            file.write('user_id\trank\titem_id\tscore\ttitle\n')
            for user, row, scores in zip(run['users'], *recommended):
                for rank, (i, score) in enumerate(zip(row[row >= 0], scores), 1):
                    cells = user, rank, run['items'][i], f'{score:.6g}', titles[i]
                    file.write('\t'.join(map(cell, cells)) + '\n')

        hashes = {}
        for name in ('users.npy', 'items.npy'):
            with open(os.path.join(part, name), 'rb') as file:
                hashes[name] = hashlib.file_digest(file, 'sha256').hexdigest()
        with open(os.path.join(part, 'run.json'), 'w', encoding='utf8') as file:
            json.dump({**run, 'sha256': hashes}, file, indent=1)
        for name in SAVED:
            os.replace(os.path.join(part, name), os.path.join(folder, name))


# ---- the command line --------------------------------------------------------------------------

MODELS = ['lightgcn', 'sgl', 'sgcl', 'bpr']

# Training: batch, learning rate of Adam, epochs without a better validation NDCG@10.
# [paper], [authors' code], [ours] say where a number comes from.
PAPER = dict(batch=256, lr=1e-3, patience=10)              # [authors' code]
OURS = {None: dict(batch=2048, lr=3e-3, patience=20),      # [ours: as good as PAPER in less time]
        # [ours: of 192 runs on Amazon sets 189 end as with 10; MovieLens wants --patience 20]
        'sgl': dict(batch=2048, lr=3e-3, patience=7),
        'sgcl': dict(PAPER, patience=7)}   # its batch is its negatives, so its size stays


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message):
        complain(f'error: {message}')
        self.exit(2)


def number(kind, low, high=np.inf):
    """An argparse type: an int or a float from low to high."""
    def read(text):
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        span = f'from {low:g} up' if high == np.inf else f'from {low:g} to {high:g}'
        raise argparse.ArgumentTypeError(f'{text} is no {"whole " * (kind is int)}number {span}')
    return read


def pair(text):
    """An argparse type: 'user_id=visitorid' -> ('user_id', 'visitorid')."""
    name, _, theirs = text.partition('=')
    if name not in ('user_id', 'item_id', 'rating', 'timestamp', 'title') or not theirs:
        raise argparse.ArgumentTypeError(f'{text}: expected NAME=THEIRS, such as user_id=visitorid;'
                                         ' NAME is user_id, item_id, rating, timestamp or title')
    return name, theirs


def place(text):
    """An argparse type: a path, ~ expanded."""
    path = os.path.expanduser(text)
    if path.startswith('~'):
        raise argparse.ArgumentTypeError(f'{text}: no home folder here; write the whole path')
    return path


def parser():
    """The parser of the command line."""
    p = Parser(prog='llminit.py', allow_abbrev=False, description=__doc__.split('\n')[0])
    group = p

    def add(flag, help, **how):
        group.add_argument(flag, help=help + ' (%(default)s)' * bool(how.get('default')), **how)

    group = p.add_argument_group('data')
    add('--dataset', 'beauty, toys, tools, office, ml-100k, or your folder', default='ml-100k',
        type=place)
    add('--data', 'datasets are here or are fetched to here', default='data', type=place)
    add('--min-rating', 'lower ratings are dropped', default=4., type=number(float, -1e9, 1e9))
    add('--core', 'interactions that users and items must have', default=5, type=number(int, 0))
    add('--columns', 'your names of user_id, item_id, rating, timestamp or title', nargs='+',
        metavar='NAME=THEIRS', default=[], type=pair)
    add('--text-columns', 'columns of the item file that make the text', metavar='A,B',
        type=lambda text: text.split(','))
    add('--split', 'leave one out: drawn [paper], or the newest by timestamp', default='random',
        choices=('random', 'last'))
    add('--cold', 'share of the training interactions that each user loses', metavar='SHARE',
        default=0., type=number(float, 0, 1))

    group = p.add_argument_group('start')
    add('--strategy', 'which dimensions; none: a random start; joint: text and interactions',
        default='var', choices=('none', *SELECTIONS, 'joint'))
    add('--encoder', 'mpnet, tfidf, or an .npz file of vectors', default='mpnet', type=place)
    add('--dim', 'K, the dimensions kept (128)', type=number(int, 1))
    add('--whiten', 'pca: 1 makes all equally wide', default=0., type=number(float, 0, 1))
    add('--popular', "var: over this share of the items; authors' code .2", default=1.,
        type=number(float, 0, 1))
    add('--pool', 'how the items of a user make the user', default='mean', choices=POOLS)

    group = p.add_argument_group('training')
    add('--model', 'which model is trained', default='lightgcn', choices=MODELS)
    add('--preset', 'sets --batch, --lr and --patience', default='ours', choices=('ours', 'paper'))
    add('--batch', 'interactions a step', type=number(int, 1))
    add('--lr', "Adam's learning rate", type=number(float, 1e-9, 100))
    add('--patience', 'epochs without a better validation', type=number(int, 1))
    add('--epochs', 'at most; 0: the start alone is evaluated', default=300, type=number(int, 0))
    add('--seen', 'keep: seen items are ranked [paper]', default='mask', choices=('mask', 'keep'))
    add('--tau', 'sgl, sgcl: temperature', default=.2, type=number(float, 1e-3, 100))
    add('--views', 'sgl: what is dropped', default='edge', choices=('edge', 'node', 'walk'))

    group = p.add_argument_group('run')
    add('--seed', 'of split, start and training (0)', default=0, type=number(int, 0))
    add('--device', 'where it runs', default='auto', choices=('auto', 'cpu', 'cuda'))
    add('--cache', 'for weights and vectors', default='~/.cache/llminit')
    add('--save', 'write tables, ids, metrics and recommendations there', metavar='DIR', type=place)
    add('--top', 'recommendations for each user', default=10, type=number(int, 1))
    return p


def parse(argv=None):
    """The command line -> args; the model decides what --preset means."""
    p = parser()
    args = p.parse_args(argv)
    if args.strategy == 'full' and args.dim:
        p.error('--strategy full keeps all dimensions: leave out --dim')
    preset = PAPER if args.preset == 'paper' else OURS.get(args.model, OURS[None])
    for name, value in dict(preset, dim=128).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def command(argv=None):
    """The command line -> exit code: 2 and one line on stderr for bad input."""
    try:
        main(argv)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and 'memory' not in str(error):     # torch's MemoryError
            raise
        complain(f'error: {error}' if str(error) else 'error: not enough memory')
        return 2
    return 0


if __name__ == '__main__':
    sys.stdout.reconfigure(errors='backslashreplace')      # letters that a terminal lacks
    sys.exit(command())
