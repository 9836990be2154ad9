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
import functools
import json
import os
import shlex
import sys
import tempfile
import time

import numpy as np
import scipy.sparse as sp
import scipy.sparse.linalg

SELECTIONS = 'rand', 'uni', 'var', 'noise', 'pca', 'full'  # strategies of select_dims
POOLS = {'mean': -1., 'sqrt': -.5, 'sum': 0.}              # power of |N_u| in eq. (1)


def principal(vectors, K, whiten=0.):
    """The K principal components of centred vectors: (I, N) -> (I, K), widest first.

    Component k is divided by its standard deviation to the power `whiten` (0: PCA, 1: all equally
    wide), then everything by one number, so that the Frobenius norm stays that of PCA.
    """
    centred = vectors - vectors.mean(axis=0, dtype=np.float64)                      # (I, N)
    variance, axes = np.linalg.eigh(centred.T @ centred / len(centred))             # (N,), (N, N)
    std, axes = np.sqrt(np.maximum(variance[::-1][:K], 0)), axes[:, ::-1][:, :K]    # (K,), (N, K)
    if not std[-1] > 1e-6 * std[0]:
        raise ValueError(f'the vectors span fewer than K = {K} dimensions: choose a smaller K')
    axes *= np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(K)])     # eigenvectors have no sign
    weight = std ** -whiten * np.linalg.norm(std) / np.linalg.norm(std ** (1 - whiten))
    return (centred @ axes * weight).astype(np.result_type(vectors, np.float32))


def select_dims(vectors, K, strategy='var', rng=None, *, whiten=0., popular=1., degree=None):
    """Reduce item vectors to K dimensions: (I, N) -> (I, K). Section 3.1 of the paper.

    'uni'    dimensions k floor(N/K), k = 0..K-1
    'rand'   K distinct dimensions drawn from rng (the authors' code draws with replacement)
    'var'    the K dimensions of highest variance over all items; popular=.2 counts only that share
             of the items, those with the highest `degree` (I,), as the authors' code does
    Beyond the paper [ours]:
    'pca'    K principal components, see principal(), which `whiten` is for
    'full'   all N dimensions, whatever K is
    'noise'  no text: normal numbers of the vectors' root mean square, as a control: a gain with it
             comes from scale and pooling

    The first three and 'full' copy values. ValueError for vectors that are not finite, and for
    K > N except with 'full' and 'noise'.
    """
    vectors = np.asarray(vectors)                  # of a torch tensor too
    I, N = vectors.shape
    if strategy not in SELECTIONS:
        raise ValueError(f'strategy {strategy!r}: expected one of {", ".join(SELECTIONS)}')
    if strategy in ('rand', 'noise') and rng is None or popular < 1 and degree is None:
        raise ValueError('rand and noise need rng, a numpy Generator; popular < 1 needs degree')
    if not 1 <= K <= N and strategy not in ('full', 'noise'):
        raise ValueError(f'cannot keep {K} of {N} dimensions: choose K from 1 to {N}')
    if bad := (~np.isfinite(vectors)).any(axis=1).sum():
        raise ValueError(f'{bad} of {I} item vectors hold NaN or infinity')
    if strategy == 'full':
        return vectors.copy()
    if strategy == 'pca':
        return principal(vectors, K, whiten)
    if strategy == 'noise':
        scale = np.sqrt(np.square(vectors, dtype=np.float64).mean())
        return rng.normal(0, scale, (I, K)).astype(np.result_type(vectors, np.float32))
    if strategy == 'uni':
        kept = np.arange(K) * (N // K)
    elif strategy == 'rand':
        kept = np.sort(rng.choice(N, K, replace=False))
    else:
        counted = slice(None)
        if popular < 1:
            order = np.argsort(-np.asarray(degree, float).ravel(), kind='stable')
            counted = order[:max(2, round(popular * I))]
        variance = vectors[counted].var(axis=0, dtype=np.float64)        # (N,)
        kept = np.sort(np.argsort(-variance, kind='stable')[:K])         # of equals the first
    return vectors[:, kept]                                              # (I, K)


def pool_users(train, items0, pool='mean'):
    """Start each user from the items of the training history: csr (U, I), (I, K) -> (U, K).

    Section 3.2, eq. (1): u = sum_{i in N_u} v_i / |N_u| ('mean', as in the authors' code; the
    divisor in the scanned paper cannot be read), or over sqrt|N_u| ('sqrt'), or undivided ('sum').
    A user without training items starts at zero. ValueError if train stores zeros.
    """
    if pool not in POOLS:
        raise ValueError(f'pool {pool!r}: expected one of {", ".join(POOLS)}')
    if not train.data.all():
        raise ValueError('train stores zeros: call train.eliminate_zeros()')
    size = np.diff(train.indptr)                                     # (U,) |N_u|
    weight = (np.repeat(size, size) ** POOLS[pool]).astype(np.result_type(items0, np.float32))
    history = sp.csr_matrix((weight, train.indices, train.indptr), train.shape)
    return history @ items0                                          # eq. (1), (U, K)


def joint(vectors, train, K, text=10., ridge=30.):
    """The K strongest directions of interactions and text: (I, N), csr (U, I) -> (I, K). [ours]

    M = D^-1/2 (X'X + text F F' + ridge Id) D^-1/2: X is train, F the vectors at length 1, D the
    diagonal matrix of |N_i| + text + ridge, N_i the users of item i. With M = V diag(mu) V', mu
    descending, J is the first K columns of V times sqrt(1 - 1/mu), zero for mu <= 1. So J J' keeps
    the K largest eigenvalues of Id - M^-1, which is close to the item-item matrix of EASE (arXiv
    1905.03375) with the dimensions of the text as further users. No (I, I) matrix is made.
    """
    vectors = vectors.astype(np.result_type(vectors, np.float32), copy=False)
    degree = np.bincount(train.indices, minlength=len(vectors))                      # (I,) |N_i|
    weight = (degree + text + ridge) ** -.5                                          # (I,) D^-1/2
    sizes = np.linalg.norm(vectors, axis=1)
    F = vectors * (text ** .5 * weight / np.where(sizes > 0, sizes, 1))[:, None]     # (I, N)
    X = sp.csr_matrix((weight[train.indices], train.indices, train.indptr), train.shape)
    M = sp.linalg.LinearOperator((len(F),) * 2, dtype=float, matvec=lambda v: (
        X.T @ (X @ v) + F @ (F.T @ v) + ridge * weight ** 2 * v))
    if not 0 < K < len(F):
        raise ValueError(f'cannot make {K} directions of {len(F)} items: choose a smaller K')
    mu, V = sp.linalg.eigsh(M, K, v0=np.ones(len(F)), tol=1e-4)                      # ascending
    V *= np.sign(V[np.abs(V).argmax(axis=0), np.arange(K)]) * np.sqrt(1 - 1 / np.maximum(mu, 1))
    return V[:, ::-1].astype(vectors.dtype)                                          # (I, K)


def xavier(rng, rows, K):
    """The random start of the baselines [authors' code]: uniform on +-sqrt(6 / (rows + K))."""
    return (rng.uniform(-1, 1, (rows, K)) * np.sqrt(6 / (rows + K))).astype(np.float32)


# Training: batch, learning rate of Adam, epochs without a better validation NDCG@10.
# [paper], [authors' code], [ours] say where a number comes from.
PAPER = dict(batch=256, lr=1e-3, patience=10)              # [authors' code]
OURS = {None: dict(batch=2048, lr=3e-3, patience=20),      # [ours: as good as PAPER in less time]
        'sgl': dict(batch=2048, lr=3e-3, patience=7),      # [ours: 189 of 192 runs end as with 10]
        'sgcl': dict(PAPER, patience=7)}   # its batch is its negatives, so its size stays


def training(args):
    """Arguments of models.train that the command line sets."""
    own = {'sgl': dict(views=args.views, tau=args.tau), 'sgcl': dict(tau=args.tau),
           'morec': dict(dim=args.dim)}
    return dict(mask_seen=args.seen == 'mask', epochs=args.epochs, batch=args.batch, lr=args.lr,
                patience=args.patience, **own.get(args.model, {}))


def result_row(args, K, metrics, curve, seconds, flags):
    """{column: value} of the table row of a run. metrics: Recall@10 and NDCG@10 of the users."""
    best = [epoch['epoch'] for epoch in curve if epoch['best']][-1]      # whose tables are kept
    return {'dataset': args.dataset, 'model': args.model, 'strategy': args.strategy,
            'Recall@10': f'{metrics[0].mean():.4f}',
            'NDCG@10': f'{metrics[1].mean():.4f}', 'K': K, 'seed': args.seed, 'best epoch': best,
            'seconds': round(seconds), 'command': shlex.join(flags) or '-'}


def lines_of(row, head=True):
    """The lines of a Markdown table of one row."""
    cells = (row.keys(), ['---'] * len(row), row.values())[0 if head else 2:]
    return '\n'.join(f'| {" | ".join(map(str, line))} |' for line in cells)


SAVED = 'users.npy', 'items.npy', 'run.json', 'recommendations.tsv'


def check_folder(folder):
    """Make the folder to save to. OSError or ValueError if a run cannot be put there."""
    os.makedirs(folder, exist_ok=True)
    if others := [name for name in os.listdir(folder) if name not in SAVED and name[0] != '.']:
        raise ValueError(f'{folder} holds other files, such as {others[0]}: choose another --save')
    os.rmdir(tempfile.mkdtemp(prefix='.part-', dir=folder))


def save(folder, users, items, run, recommended, titles):
    """Write users.npy (U, K), items.npy (I, K), run.json, recommendations.tsv, each one whole.

    run: dict with the ids of users and items in the order of their rows; recommended: items (U, n)
    and scores (U, n) from models.recommend; titles [I]. A score is the dot product of two rows.
    """
    blanks = str.maketrans('\t\r\n', '   ')
    with tempfile.TemporaryDirectory(prefix='.part-', dir=folder) as part:
        np.save(os.path.join(part, 'users.npy'), users)
        np.save(os.path.join(part, 'items.npy'), items)
        with open(os.path.join(part, 'run.json'), 'w', encoding='utf8') as file:
            json.dump(run, file, indent=1)
        with open(os.path.join(part, 'recommendations.tsv'), 'w', encoding='utf8') as file:
            file.write('user_id\trank\titem_id\tscore\ttitle\n')
            for user, row, scores in zip(run['users'], *recommended):
                for rank, (i, score) in enumerate(zip(row[row >= 0], scores), 1):
                    cells = user, rank, run['items'][i], f'{score:.6g}', titles[i]
                    file.write('\t'.join(str(cell).translate(blanks) for cell in cells) + '\n')
        for name in SAVED:
            os.replace(os.path.join(part, name), os.path.join(folder, name))


def complain(text):
    """Print one line on stderr. Under torchrun ranks other than 0 wait five seconds first, so that
    rank 0 prints the error and torchrun stops the rest; a rank still alive then prints it too."""
    if os.environ.get('RANK', '0') not in ('', '0'):
        time.sleep(5)
    print(f'llminit: error: {" ".join(text.split())[:1000]}', file=sys.stderr)


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message):
        complain(message)
        self.exit(2)


def number(kind, low, high=np.inf):
    """An argparse type: an int or a float from low to high."""
    def number(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f'{text} is not a number from {low:g} to {high:g}')
        return value
    return number


def pair(text):
    """An argparse type: 'user_id=visitorid' -> ('visitorid', 'user_id')."""
    ours, theirs = text.split('=', 1)
    if ours not in ('user_id', 'item_id', 'rating', 'timestamp', 'title'):
        raise argparse.ArgumentTypeError(f'{ours} is none of user_id, item_id, rating, timestamp, '
                                         'title')
    return theirs, ours


def parser():
    """The parser of the command line."""
    p = Parser(prog='llminit.py', allow_abbrev=False, description=__doc__.split('\n')[0])

    def add(flag, help, **how):
        p.add_argument(flag, help=help + ' (%(default)s)' * ('default' in how), **how)
    add('--dataset', 'beauty, toys, tools, office, ml-100k, or your folder', default='ml-100k')
    add('--min-rating', 'lower ratings are dropped', default=4., type=number(float, -1e9, 1e9))
    add('--core', 'interactions that users and items must have', default=5, type=number(int, 0))
    add('--columns', 'what user_id, item_id, rating, timestamp or title is called in your files',
        metavar='NAME=THEIRS', nargs='+', type=pair)
    add('--text-columns', 'columns of the item file that make the text', metavar='A,B',
        type=lambda text: text.split(','))
    add('--split', 'random leave-one-out [paper], or the last by timestamp', default='random',
        choices=('random', 'last'))
    add('--strategy', 'which dimensions; none: a random start; joint: ours', default='var',
        choices=('none', *SELECTIONS, 'joint'))
    add('--model', 'what is trained; morec takes all N dimensions', default='lightgcn',
        choices=('lightgcn', 'sgl', 'sgcl', 'morec', 'bpr'))
    add('--encoder', 'mpnet, tfidf, openai:MODEL, the folder of an MPNet, or a file of vectors',
        default='mpnet')
    add('--dim', 'K, the dimensions kept (128)', type=number(int, 1))
    add('--whiten', 'pca: 1 makes all equally wide', default=0., type=number(float, 0, 1))
    add('--popular', "var: over this share of the items; authors' code .2", default=1.,
        type=number(float, 0, 1))
    add('--pool', 'how the items of a user make the user', default='mean', choices=POOLS)
    add('--views', 'sgl: what is dropped', default='edge', choices=('edge', 'node', 'walk'))
    add('--tau', 'sgl, sgcl: temperature', default=.2, type=number(float, 1e-3, 100))
    add('--seen', 'keep: seen items are ranked [paper]', default='mask', choices=('mask', 'keep'))
    add('--preset', 'sets --batch, --lr and --patience', default='ours', choices=('ours', 'paper'))
    add('--batch', 'interactions a step', type=number(int, 1))
    add('--lr', "Adam's learning rate", type=number(float, 1e-9, 100))
    add('--patience', 'epochs without a better validation', type=number(int, 1))
    add('--epochs', 'at most', default=300, type=number(int, 1))
    add('--seed', 'of split, start and training', default=0, type=number(int, 0))
    add('--device', 'where it runs', default='auto', choices=('auto', 'cpu', 'cuda'))
    add('--data', 'datasets are here or are fetched to here', default='data', metavar='DIR')
    add('--cache', 'for weights and vectors', default='~/.cache/llminit', metavar='DIR')
    add('--save', 'write vectors, ids, metrics and recommendations there', metavar='DIR')
    add('--top', 'recommendations for each user', default=10, type=number(int, 1))
    return p


def parse(argv=None):
    """The command line -> args, with the numbers of --preset filled in."""
    p = parser()
    args = p.parse_args(argv)
    if args.strategy == 'full' and args.model != 'morec' and args.dim:
        p.error('--strategy full keeps all dimensions: leave out --dim')
    preset = PAPER if args.preset == 'paper' else OURS.get(args.model, OURS[None])
    args = p.parse_args(argv, argparse.Namespace(dim=128, **preset))     # the flags win
    if args.model == 'morec' and args.strategy not in ('none', 'noise'):
        args.strategy = 'full'                     # it learns a projection of all N dimensions
    return args


def main(argv=None):
    """One run from data to result row, a line a stage. Under torchrun every process does all of it,
    and models.py gives each a share of the K dimensions; the first prints and saves."""
    args, started = parse(argv), time.time()
    import data
    import embed
    import models
    rank, device = models.join(args.device)
    say = functools.partial(print, flush=True) if rank == 0 else lambda line: None
    if args.save is not None and rank == 0:
        check_folder(args.save)                    # what cannot be written shows now

    with models.in_turn():                         # the first process downloads and encodes
        # interactions and low, those rated low: csr (U, I); texts, titles, item_ids: [I]
        interactions, texts, titles, user_ids, item_ids, low = data.load(
            args.dataset, args.data, min_rating=args.min_rating, core=args.core,
            columns=dict(args.columns or ()), text_columns=args.text_columns,
            timestamps=args.split == 'last')
        if args.strategy != 'none':
            vectors = embed.encode(texts, args.encoder, ids=item_ids, cache=args.cache,
                                   device=device)                            # (I, N)
    rng = np.random.default_rng(args.seed)
    train, valid, test = data.split(interactions, rng, args.split == 'last')  # csr (U, I) each
    say(f'{args.dataset}: {len(user_ids):,} users, {len(item_ids):,} items, {interactions.nnz:,} '
        f'interactions: {train.nnz:,} train, {valid.nnz:,} valid, {test.nnz:,} test')

    if args.strategy == 'none':
        users0, items0 = (xavier(rng, n, args.dim) for n in train.shape)     # (U, K), (I, K)
    else:
        items0 = joint(vectors, train, args.dim) if args.strategy == 'joint' else select_dims(
            vectors, args.dim, args.strategy, rng, whiten=args.whiten, popular=args.popular,
            degree=train.getnnz(axis=0))                                     # (I, K)
        users0 = pool_users(train, items0, args.pool)                        # (U, K)
    model, curve = models.train(args.model, train, valid, users0, items0, rng, device=device,
                                log=say, **training(args))
    users, items = model.embeddings()                                        # (U, K), (I, K)
    seen = train + valid if args.seen == 'mask' else None
    metrics = models.evaluate(users, items, test, seen)    # (n,) twice: the users with a test item
    row = result_row(args, items.shape[1], metrics, curve, time.time() - started,
                     sys.argv[1:] if argv is None else argv)
    say(lines_of(row))
    if args.save and rank == 0:
        recommended = models.recommend(users, items, interactions + low, args.top)  # (U, top) twice
        run = {'settings': vars(args), 'metrics': row, 'users': user_ids, 'items': item_ids}
        save(args.save, users.cpu().numpy(), items.cpu().numpy(), run, recommended, titles)


def command(argv=None):
    """The command line -> exit code: 2 and one line on stderr for bad input, 130 after Ctrl-C."""
    try:
        main(argv)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and 'memory' not in str(error):     # torch's MemoryError
            raise
        complain(str(error) or 'not enough memory')
        return 2
    except KeyboardInterrupt:
        print('llminit: stopped', file=sys.stderr)
        return 130
    return 0


if __name__ == '__main__':
    sys.exit(command())
