"""Users who were never trained on: their vectors pooled from the trained vectors of their items.

    python experiments/new_users.py --dataset office --model sgcl --seeds 3

A tenth of the users leave the training data. The model trains on the others; then a user who left
starts from `pool_users` of the trained items, and the test item of each is ranked. Beside it: the
same users and test items when they were trained on, and the most popular items, for which nothing
needs to be known of a user. Seen items are masked. A row is a mean over seeds.
"""
import argparse
import sys

import numpy as np
import run
import scipy.sparse as sp
import torch
from run import llminit, models

SHARE = .1                             # of the users


def without(matrix, users):
    """csr (U, I) without the interactions of users (U,), a mask."""
    return sp.csr_matrix(sp.diags((~users).astype(np.float32)) @ matrix)


def one_seed(args, known):
    """NDCG@10 of the users who left, {way: mean}."""
    rng = np.random.default_rng(args.seed)
    _, (train, valid, test), vectors = run.prepare(args, known, rng, 'cpu')
    left = np.random.default_rng([args.seed, 1]).random(train.shape[0]) < SHARE
    target = test - without(test, left)                    # the test items of those who left
    seen = train + valid
    ndcg = {}

    for way, users_of in (('trained on', lambda matrix: matrix),
                          ('pooled', lambda matrix: without(matrix, left))):
        users, items, *_ = run.fit(args, users_of(train), users_of(valid), vectors,
                                   np.random.default_rng(args.seed), 'cpu', lambda line: None)
        if way == 'pooled':
            users = torch.from_numpy(llminit.pool_users(train, items.numpy()))
        ndcg[way] = models.evaluate(users, items, target, seen)[1].mean()

    degree = torch.from_numpy(without(train, left).getnnz(axis=0)).double()[:, None]    # (I, 1)
    ones = torch.ones(len(left), 1, dtype=torch.float64)
    ndcg['popular items'] = models.evaluate(ones, degree, target, seen)[1].mean()
    return int(left.sum()), ndcg


def main(argv):
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0], allow_abbrev=False)
    p.add_argument('--seeds', type=llminit.number(int, 1, 1000), default=3)
    own, rest = p.parse_known_args(argv)
    rows, known, users = [], {}, 0
    for seed in range(own.seeds):
        args = llminit.parse([*rest, f'--seed={seed}'])
        args.training = llminit.train_arguments(args)
        n, ndcg = one_seed(args, known)
        users += n
        rows.append(ndcg)
    print(f'{args.dataset}, {args.model}, {args.strategy}: NDCG@10 of {users:,} users in '
          f'{own.seeds} seeds who left')
    for way in rows[0]:
        found = [row[way] for row in rows]
        print(f'| {way} | {np.mean(found):.4f} +- {np.std(found, ddof=len(found) > 1):.4f} |')


if __name__ == '__main__':
    main(sys.argv[1:])
