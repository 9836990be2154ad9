"""What one would pick instead: EASE, L3AE, AlphaRec and popularity on our splits and protocols.

    python experiments/peers.py --model ease,l3ae,alpharec --dataset office,beauty --seeds 3 \
        --results experiments/peers.jsonl

EASE        a closed form without text (Steck 2019, arXiv 1905.03375): scores X B, B of I^2 numbers
L3AE        EASE, pulled towards an EASE over the item vectors (CIKM 2025, arXiv 2508.13500)
popularity  the items with most training users, for everybody
AlphaRec    an MLP over frozen item vectors, propagated; contrastive loss (ICLR 2025, arXiv
            2407.05441)

Flags are those of run.py; --strategy, --dim, --pool, --device and what sets a training have no
effect. Settings are chosen on the validation items of each run, from the grids below, and the
seconds are those of the whole choice. B is dense, and about six such matrices exist at once: 6,086
items take 150 MB each and a minute or two in all, 50,000 items would take 10 GB each.
Nothing here is copied from the authors' code.

X: csr (U, I) of training. F: (I, N) vectors of length 1. P, C, B: (I, I).
"""
import itertools
import sys
import time

import numpy as np
import run
import scipy.sparse as sp
import torch
from run import early_stopping, llminit, models

LAMBDAS = 50, 100, 200, 400, 800       # EASE and L3AE: regulariser of the interactions
RIDGES = 1, 3, 10, 30                  # L3AE: regulariser of the text
SHARES = .9, .97, .99, .999            # L3AE: share of lambda that pulls towards the text
RATES = 5e-4, 2e-3                     # AlphaRec: learning rate; 5e-4 in the paper
GRIDS = {'popularity': {}, 'ease': {'lambda': LAMBDAS},
         'l3ae': {'lambda': LAMBDAS, 'r': RIDGES, 'share': SHARES},
         'alpharec': {'lr': RATES, 'epochs': 200, 'batch': 4096, 'patience': 20}}


def unit(vectors):
    """Rows of length 1; a row of zeros stays: (I, N) -> tensor (I, N)."""
    return torch.nn.functional.normalize(torch.from_numpy(vectors))


def inverse(gram, ridge):
    """(gram + ridge Id)^-1 of a symmetric tensor (I, I)."""
    return torch.cholesky_inverse(torch.linalg.cholesky(gram + ridge * torch.eye(len(gram))))


def ease(P):
    """B that minimises |X - X B|^2 + lambda |B|^2 with zero diagonal, P = (X'X + lambda Id)^-1."""
    return (-P / P.diagonal()).fill_diagonal_(0)


def l3ae(P, PC, pull):
    """B that minimises |X - X B|^2 + (lambda - pull) |B|^2 + pull |B - C|^2 with zero diagonal.

    PC = P C, C the EASE of the text. Without the zero diagonal B is Id - lambda P + pull P C; a
    multiplier for each column, times P, makes it zero.
    """
    return (pull * PC - P * ((1 + pull * PC.diagonal()) / P.diagonal())).fill_diagonal_(0)


def closed_form(name, train, vectors, score):
    """The best of score(B) -> its value, settings and B (I, I).

    L3AE: first lambda with r = 10, then r with that lambda, always all shares: 32 of 80.
    """
    gram = torch.from_numpy((train.T @ train).toarray())                            # (I, I)
    if name == 'ease':
        tries = (({'lambda': ridge}, ease(inverse(gram, ridge))) for ridge in LAMBDAS)
        return max(((score(B), settings, B) for settings, B in tries), key=lambda found: found[0])
    F, best = unit(vectors), ((-1.,), {'lambda': None})

    def of_shares(ridge, C, r):
        P = inverse(gram, ridge)
        PC = P @ C
        for share in SHARES:
            B = l3ae(P, PC, share * ridge)
            yield score(B), {'lambda': ridge, 'r': r, 'share': share}, B
    for r in sorted(RIDGES, key=lambda r: r != 10):        # 10 first
        C = ease(inverse(F @ F.T, r))
        for ridge in LAMBDAS if r == 10 else [best[1]['lambda']]:
            best = max(itertools.chain([best], of_shares(ridge, C, r)), key=lambda found: found[0])
    return best


class AlphaRec(torch.nn.Module):
    """Item vectors (I, N), users their means (U, N); all through one MLP, then propagated."""

    def __init__(self, train, vectors, K=64, tau=.15):
        super().__init__()
        self.items, self.n_users, self.tau, N = unit(vectors), train.shape[0], tau, vectors.shape[1]
        means = sp.diags(1 / np.maximum(train.getnnz(axis=1), 1)) @ train                # (U, I)
        self.pool = sp.vstack([means, sp.identity(len(vectors))], 'csr', np.float32)     # (U+I, I)
        self.graphs = [models.adjacency(train)] * 2
        self.mlp = torch.nn.Sequential(torch.nn.Linear(N, N // 2), torch.nn.LeakyReLU(),
                                       torch.nn.Linear(N // 2, K))

    def forward(self):
        """Users (U, K) and items (I, K), of length 1. The first layer is linear, so that of the
        means is the mean of the items': a third of the work."""
        hidden = models.spmm(self.pool, self.mlp[0](self.items))                    # (U+I, N/2)
        z = models.Propagate.apply(self.mlp[1:](hidden), self.graphs)
        return torch.nn.functional.normalize(z).split([self.n_users, len(z) - self.n_users])

    embeddings = torch.no_grad()(forward)

    def loss(self, users, positives, negatives):
        """Softmax over the positive and the negatives: (B,), (B,), (B, 256) -> mean, scalar."""
        users0, items0 = self()
        picked = torch.cat([positives[:, None], negatives], 1)                          # (B, 257)
        logits = (users0[users] @ items0.T).gather(1, picked) / self.tau
        return (logits.logsumexp(1) - logits[:, 0]).mean()


def train_alpharec(train, valid, vectors, lr, seen, rng, log):
    """-> the model at its best epoch, and its curve, as of models.train."""
    how, degree = GRIDS['alpharec'], np.diff(train.indptr)
    active = np.flatnonzero((degree > 0) & (degree < train.shape[1]))
    torch.manual_seed(int(rng.integers(2 ** 31)))
    model = AlphaRec(train, vectors)
    step = torch.optim.Adam(model.parameters(), lr=lr, fused=True)

    def epoch():
        total = 0.
        for _ in range(n_steps := -(-train.nnz // how['batch'])):     # a user, then an item
            users = rng.choice(active, how['batch'])
            place = train.indptr[users] + rng.integers(0, degree[users])
            others = models.sample_negatives(train, users.repeat(256), rng).reshape(-1, 256)
            step.zero_grad()
            loss = model.loss(*map(torch.from_numpy, (users, train.indices[place], others)))
            loss.backward()
            step.step()
            total += loss.item()
        return total / n_steps
    return model, early_stopping(model, epoch, valid, seen, how['epochs'], how['patience'], log)


def closed_scores(train, B, target, seen):
    """Mean NDCG@10 and Recall@10 of scores X B, as of models.evaluate; one target a user. X stays
    sparse."""
    user, item = target.nonzero()
    ranks = [models.ranks_in(models.spmm(train[user[part]], B), item[part],
                             None if seen is None else seen[user[part]])
             for part in np.array_split(np.arange(len(user)), 1 + len(user) // 200)]
    ranks = np.concatenate(ranks)
    return np.where(ranks < 10, 1 / np.log2(2 + ranks), 0).mean(), (ranks < 10).mean()


def fit(args, train, valid, vectors, rng, device, log):
    """The best of the grid on validation, as run.fit() gives a model. The users of a closed form
    are their interactions (U, I), its items the columns of B."""
    if not valid.nnz:
        raise ValueError('there are no validation items to choose settings by')
    started, train = time.time(), train.sorted_indices()   # sample_negatives needs it
    seen = train if args.seen == 'mask' else None
    if args.model == 'alpharec':
        found = []
        for lr in RATES:
            try:
                model, curve = train_alpharec(train, valid, vectors, lr, seen, rng, log)
            except ValueError as error:
                if lr == RATES[-1] and not found:          # none of the rates trains
                    raise
                print(f'note: learning rate {lr}: {error}', file=sys.stderr)
                continue
            top = [epoch for epoch in curve if epoch['best']][-1]
            found.append((top, lr, model))
        top, lr, model = max(found, key=lambda one: one[0]['ndcg'])
        (users, items), chosen = model.embeddings(), {'lr': lr}
        K, parameters = items.shape[1], sum(p.numel() for p in model.parameters())
    elif args.model == 'popularity':
        items = torch.from_numpy(train.getnnz(axis=0)).double()[:, None]                # (I, 1)
        users = torch.ones(train.shape[0], 1, dtype=torch.float64)
        recall, ndcg = (float(x.mean()) for x in models.evaluate(users, items, valid, seen))
        top = dict(epoch=1, loss=0., recall=recall, ndcg=ndcg, best=True)
        K, parameters, chosen = 1, len(items), {}
    else:
        def score(B):
            ndcg, recall = closed_scores(train, B, valid, seen)
            log(f'epoch   1  valid NDCG@10 {ndcg:.4f}  best {ndcg:.4f} (epoch 1)')
            return ndcg, recall
        (ndcg, recall), chosen, B = closed_form(args.model, train, vectors, score)
        users, items, K = torch.from_numpy(train.toarray()), B.T.contiguous(), 'I'
        parameters, top = items.numel(), dict(epoch=1, loss=0., recall=recall, ndcg=ndcg, best=True)
    curve = [{**top, 'seconds': time.time() - started}]
    return users, items, curve, {'K': K, 'parameters': parameters, 'chosen': chosen}


def parse(argv):
    """The command line -> the arguments of each run, as run.parse gives, and --results."""
    p = llminit.Parser(prog='peers.py', allow_abbrev=False, add_help=False)
    p.add_argument('--model', default='ease,l3ae,alpharec')
    own, rest = p.parse_known_args(argv)
    cells, path = run.parse([*rest, '--model=lightgcn'])
    out = {}
    for name in own.model.split(','):
        if name not in GRIDS:
            p.error(f'model {name!r}: expected some of {",".join(GRIDS)}')
        for cell in cells:
            args = llminit.argparse.Namespace(**vars(cell))
            args.model = name
            args.strategy = 'none' if name in ('ease', 'popularity') else 'full'
            args.dim, args.pool, args.device, args.epochs = 128, 'mean', 'cpu', 300
            args.training = {'mask_seen': args.seen == 'mask', **GRIDS[name]}
            args.flags = [flag for flag in args.flags if flag != '--model=lightgcn']
            args.flags.append(f'--model={name}')
            out[run.identity(run.settings_of(args), args.training)] = args
    return sorted(out.values(), key=lambda args: args.seed), path


if __name__ == '__main__':
    sys.exit(run.command(sys.argv[1:], parse, fit))
