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
import sys
import time

import numpy as np
import scipy.sparse as sp

STRATEGIES = ('none', 'rand', 'uni', 'var')
MODELS = ('lightgcn',)
POOLS = ('mean', 'sqrt', 'sum')
# Table 1 [paper]: Recall@10/NDCG@10 of none, rand, uni, var, with seen items left in the ranking.
PAPER = {
    ('beauty', 'lightgcn'): '.0910/.0432 .0960/.0467 .1006/.0469 .1019/.0485',
    ('toys', 'lightgcn'): '.0775/.0360 .0805/.0387 .0806/.0388 .0808/.0389',
    ('tools', 'lightgcn'): '.0574/.0283 .0612/.0313 .0633/.0319 .0633/.0317',
    ('office', 'lightgcn'): '.0745/.0365 .0773/.0387 .0791/.0395 .0816/.0414',
}


def select_dims(vectors, K, strategy='var', rng=None):
    """Keep K of the N dimensions, the same for every item: (I, N) -> (I, K). Section 3.1.

    'uni':  every floor(N/K)-th dimension, I = {k floor(N/K)}.
    'rand': K distinct dimensions drawn from `rng`, a numpy Generator.
    'var':  the K dimensions of highest variance over the items.
    Values stay as they are, neither centred nor scaled. The authors' code draws 'rand' with
    replacement and takes the variance of 'var' over the most popular fifth of the items.
    ValueError for K > N, for vectors that are not finite, for an unknown strategy.
    """
    N = vectors.shape[1]
    if not 1 <= K <= N:
        raise ValueError(f'cannot keep {K} of {N} dimensions: choose --dim between 1 and {N}')
    if not np.isfinite(vectors).all():
        bad = (~np.isfinite(vectors)).any(axis=1).sum()
        raise ValueError(f'{bad} of {len(vectors)} item vectors hold NaN or infinity')
    if strategy == 'uni':
        kept = np.arange(K) * (N // K)
    elif strategy == 'rand':
        kept = np.sort(rng.choice(N, K, replace=False))
    elif strategy == 'var':
        variance = vectors.var(axis=0, dtype=np.float64)             # (N,)
        kept = np.sort(np.argsort(-variance, kind='stable')[:K])     # of equals the first
    else:
        raise ValueError(f"unknown strategy '{strategy}': choose from {', '.join(STRATEGIES)}")
    return vectors[:, kept]                                          # (I, K)


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


def result_row(args, scores, curve, n_parameters, seconds):
    """A Markdown table of one row; with --seen keep the paper's figure stands beside ours."""
    best = max(curve, key=lambda epoch: epoch['ndcg'])['epoch']
    cells = {'dataset': args.dataset, 'model': args.model, 'strategy': args.strategy,
             'Recall@10': f'{scores[0].mean():.4f}', 'NDCG@10': f'{scores[1].mean():.4f}',
             'seen': args.seen, 'K': args.dim, 'seed': args.seed, 'best epoch': best,
             'parameters': n_parameters, 'seconds': round(seconds)}
    if args.seen == 'keep' and (args.dataset, args.model) in PAPER:
        figures = PAPER[args.dataset, args.model].split()
        cells['paper'] = figures[STRATEGIES.index(args.strategy)]
    lines = cells.keys(), ['---'] * len(cells), cells.values()
    return '\n'.join(f'| {" | ".join(map(str, line))} |' for line in lines)


class OneLineParser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message):
        self.exit(2, f'llminit: error: {message}\n')


def at_least(least):
    """An argparse type: a whole number of at least `least`."""
    def number(text):
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f'{text} is not a whole number of at least {least}')
        return int(text)
    return number


def parse(argv=None):
    """The command line -> args, which never leave this file."""
    p = OneLineParser(prog='llminit.py', allow_abbrev=False, description=__doc__.split('\n')[0],
                      formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument('--dataset', default='ml-100k',
                   help='beauty, toys, tools, office, ml-100k, or a folder of your own')
    p.add_argument('--strategy', default='var', choices=STRATEGIES,
                   help='dimensions to keep; none is the random start, without text')
    p.add_argument('--model', default='lightgcn', choices=MODELS, help='the backbone')
    p.add_argument('--encoder', default='mpnet',
                   help='mpnet, tfidf, a folder with an MPNet, or vectors in a .npy or .npz file')
    p.add_argument('--dim', default=128, type=at_least(1), help='K, the dimensions kept')
    p.add_argument('--pool', default='mean', choices=POOLS, help='of items to a user')
    p.add_argument('--seen', default='mask', choices=('mask', 'keep'),
                   help="leave seen items out of the ranking, or in as the paper's tables do")
    p.add_argument('--seed', default=0, type=at_least(0), help='of split, start and training')
    p.add_argument('--epochs', default=300, type=at_least(1), help='at most so many')
    p.add_argument('--device', default='auto', choices=('auto', 'cpu', 'cuda', 'mps'))
    p.add_argument('--data', default='data', metavar='DIR', help='datasets are in or come to here')
    p.add_argument('--cache', default='~/.cache/llminit', metavar='DIR', help='weights, vectors')
    return p.parse_args(argv)


def main(argv=None):
    """One run from data to result row, a line a stage."""
    args, started = parse(argv), time.time()
    import data
    import embed
    import models
    rng, device = np.random.default_rng(args.seed), models.pick_device(args.device)
    pairs, texts, _, _, ids = data.load(args.dataset, args.data)             # csr (U, I), I texts
    train, valid, test = data.split(pairs, rng)                              # csr (U, I) each
    (U, I), K = train.shape, args.dim
    print(f'{args.dataset}: {U:,} users, {I:,} items, {pairs.nnz:,} interactions: {train.nnz:,} '
          f'train, {valid.nnz:,} valid, {test.nnz:,} test', flush=True)
    if args.strategy == 'none':
        users0, items0 = xavier(rng, U, K), xavier(rng, I, K)                # without any text
    else:
        vectors = embed.encode(texts, args.encoder, ids=ids, cache=args.cache, device=device)
        items0 = select_dims(vectors, K, args.strategy, rng)                 # (I, N) -> (I, K)
        users0 = pool_users(train, items0, args.pool)                        # (U, K)
    users, items, curve = models.train(args.model, train, valid, users0, items0, rng,
                                       seen=args.seen, epochs=args.epochs)   # (U, K), (I, K)
    scores = models.evaluate(users, items, test, train + valid if args.seen == 'mask' else None)
    print(result_row(args, scores, curve, users.numel() + items.numel(), time.time() - started))


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
