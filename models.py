"""Collaborative filtering on the user-item graph: LightGCN, its training, its evaluation.

The backbone of the LLMInit paper (arXiv 2503.01814, section 2 of its ledger in README.md):
LightGCN (arXiv 2002.02126) smooths one embedding table over the graph of interactions,

    z = 1/(L+1) * sum_{l=0..L} A_hat^l E,    A_hat = D^-1/2 A D^-1/2,    score(u, i) = z_u . z_i

Where the table E starts is the caller's business: users0 and items0 are plain arrays.

    adjacency -> LightGCN(graph, users0, items0) -> loss(users, positives, negatives)
    sample_negatives, evaluate -> train                         what is done with a model

Propagation is linear and A_hat symmetric: the backward pass is the same product and nothing is
kept for it. A batch needs z at its own rows only, so on a CPU the products run on the receptive
field of the batch: the exact result from a fraction of the work.

Not here: texts (embed.py), choosing dimensions (llminit.py), reading and splitting (data.py).
Shapes: U users, I items, K dimensions, B batch, L layers, R rows asked for, P pairs.
Needs numpy, scipy, torch. MIT licence, from LLMInit's reference implementation.
"""
import time

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F


def adjacency(observed):
    """A_hat = D^-1/2 A D^-1/2, users first: csr (U, I) -> csr (U+I, U+I) float32.

    LightGCN eq. (8). A node without interactions keeps an empty row. Built from the two halves
    as they lie in memory: no coordinates, no Python loop over edges.
    """
    n_users, n_items = observed.shape
    by_user = np.maximum(np.diff(observed.indptr), 1) ** -.5                            # (U,)
    by_item = np.maximum(np.bincount(observed.indices, minlength=n_items), 1) ** -.5    # (I,)
    data = np.repeat(by_user, np.diff(observed.indptr)) * by_item[observed.indices]
    right = sp.csr_matrix((data.astype(np.float32), observed.indices, observed.indptr),
                          observed.shape)                                               # (U, I)
    left = right.tocsc()                               # its arrays are the csr of right.T (I, U)
    indptr = np.concatenate([right.indptr, left.indptr[1:] + right.indptr[-1]])
    indices = np.concatenate([right.indices + n_users, left.indices])
    return sp.csr_matrix((np.concatenate([right.data, left.data]), indices, indptr),
                         (n_users + n_items,) * 2)


def receptive_field(graphs, rows):
    """What layers 1..L must compute so that all of them are known at `rows` (R,), sorted.

    graphs: A_hat of each layer, L csr (U+I, U+I). Returns [(at, block)], first layer first: block
    csr (M_l, M_{l-1}) holds the rows of A_hat that layer l is needed at, its columns count the rows
    of layer l-1 (M_0 = U+I, the whole table), and `at` (R,) says where `rows` are among the M_l.
    """
    field, needed = [], rows
    for layer, graph in reversed(list(enumerate(graphs))):
        block, at = graph[needed], np.searchsorted(needed, rows)
        if layer:
            below = np.zeros(graph.shape[0], bool)
            below[rows] = below[block.indices] = True
            place = np.cumsum(below, dtype=block.indices.dtype) - 1     # node -> its place below
            needed = np.flatnonzero(below)
            block = sp.csr_matrix((block.data, place[block.indices], block.indptr),
                                  (block.shape[0], len(needed)))
        field.append((torch.from_numpy(at), block))
    return field[::-1]


def spmm(block, x):
    """block @ x (N, K) -> (M, K). block: scipy csr (M, N), scipy csc (N, M) taken transposed, or
    a sparse torch tensor (M, N).

    On a CPU a weighted sum of rows is what embedding_bag computes, in half the time or less of
    torch's and scipy's CSR products [measured, README].
    """
    if isinstance(block, torch.Tensor):
        return block @ x
    indptr, indices, data = map(torch.from_numpy, (block.indptr, block.indices, block.data))
    return F.embedding_bag(indices, x, indptr, mode='sum', per_sample_weights=data,
                           include_last_offset=True)


class Propagate(torch.autograd.Function):
    """z = 1/(L+1) sum_l A_hat^l E, and E itself, at rows (R,): table (U+I, K) -> two (R, K).

    field: receptive_field(...) of the rows; or, with rows None for all rows, [(None, A_hat)] * L.
    Backward is the transposed product, layer by layer downwards; only the field is kept.
    """

    @staticmethod
    def forward(ctx, table, rows, field):
        ctx.rows, ctx.field, ctx.size = rows, field, len(table)
        start = table.clone() if rows is None else table[rows]                          # (R, K)
        total, x = start.clone(), table
        for at, block in field:
            x = spmm(block, x)                                                          # (M_l, K)
            total += x if at is None else x[at]
        return total.div_(len(field) + 1), start

    @staticmethod
    def backward(ctx, grad_z, grad_start):                                    # (R, K), (R, K)
        share = grad_z / (len(ctx.field) + 1)
        grad = share                                       # of the topmost layer
        for layer in reversed(range(len(ctx.field))):
            block = ctx.field[layer][1]
            whole = ctx.rows is None                       # then A_hat is its own transpose
            grad = spmm(block if whole else block.tocsc(), grad)                     # (M_{l-1}, K)
            if layer:
                at = ctx.field[layer - 1][0]
                grad = grad + share if whole else grad.index_add_(0, at, share)
        last = share + grad_start
        if ctx.rows is None:
            return grad + last, None, None
        if not ctx.field:
            grad = last.new_zeros(ctx.size, last.shape[1])
        return grad.index_add_(0, ctx.rows, last), None, None


def dot(a, b):
    """Row-wise dot products: (B, K), (B, K) -> (B,)."""
    return (a * b).sum(1)


def bpr(positive, negative):
    """Bayesian personalised ranking of each pair, -log sigmoid(positive - negative): (B,)."""
    return F.softplus(negative - positive)


class LightGCN(torch.nn.Module):
    """LightGCN with exact gradients. graph: csr (U+I, U+I) from adjacency(); users0 (U, K) and
    items0 (I, K): where the table starts. users, positives, negatives: int64 tensors (B,)."""

    reg = 1e-5                                             # [authors' code]

    def __init__(self, graph, users0, items0, n_layers=2):             # L = 2 [authors' code]
        super().__init__()
        start = np.concatenate([users0, items0]).astype(np.float32)    # one table: one gradient
        self.n_users, self.graphs = len(users0), [graph] * n_layers
        self.table = torch.nn.Parameter(torch.from_numpy(start))                        # (U+I, K)

    def at(self, nodes):
        """z and E of nodes (n,), users first, repeats allowed -> (n, K), (n, K)."""
        rows, place = np.unique(nodes.numpy(), return_inverse=True)                     # (R,), (n,)
        z, start = Propagate.apply(self.table, torch.from_numpy(rows),
                                   receptive_field(self.graphs, rows))                  # (R, K)
        place = torch.from_numpy(place)
        return z[place], start[place]

    @torch.no_grad()
    def embeddings(self):
        """z of all -> users (U, K), items (I, K)."""
        z, _ = Propagate.apply(self.table, None, [(None, graph) for graph in self.graphs])
        return z[:self.n_users], z[self.n_users:]

    def loss(self, users, positives, negatives):
        """BPR, mean over the batch, + reg/B * (|E_u| + |E_i| + |E_j|) -> scalar.

        The norms are Frobenius norms over the batch's rows of E, not squared [authors' code].
        """
        z, start = self.at(torch.cat([users, positives + self.n_users, negatives + self.n_users]))
        zu, zi, zj = z.chunk(3)                                                         # (B, K)
        norms = sum(part.norm() for part in start.chunk(3))
        return bpr(dot(zu, zi), dot(zu, zj)).mean() + self.reg / len(users) * norms


MODELS = {'lightgcn': LightGCN}


def target_ranks(users, items, target, seen=None):
    """How many items rank above each target: (U, K), (I, K), csr (U, I) with P pairs -> (P,).

    All items compete but those in the user's row of `seen` (csr (U, I) or None). An equal score
    counts as above, and so does one that is not a number: neither ever helps the model. A
    target's own score is read from the matrix that it is compared with, so ties are exact.
    """
    pair_user, pair_item = target.nonzero()
    out = np.empty(len(pair_user), np.int64)
    step = max(1, 2 ** 20 // len(items))                   # [ours: 4 MiB of scores, in the cache]
    buffer = torch.empty(min(step, len(out)), len(items), device=items.device)
    for start in range(0, len(out), step):
        u, i = pair_user[start:start + step], pair_item[start:start + step]
        scores = torch.mm(users[u], items.T, out=buffer[:len(u)])                       # (C, I)
        own = scores[np.arange(len(u)), i]                                              # (C,)
        above = len(items) - 1                             # less those below, less those seen
        if seen is not None:
            taken = seen[u]                                                             # (C, I)
            row = np.repeat(np.arange(len(u)), np.diff(taken.indptr))
            higher = ~(scores[row, taken.indices] < own[row]).cpu().numpy()
            above = above - np.bincount(row[higher & (taken.indices != i[row])], minlength=len(u))
        below = scores.lt_(own[:, None]).sum(1)            # in place, 0. or 1.: exact to 2^24 items
        out[start:start + step] = above - below.cpu().numpy().astype(np.int64)
    return out


def evaluate(users, items, target, seen=None, k=10):
    """Full ranking -> Recall@k and NDCG@k, each (n,) float64 over the users that have a target.

    users (U, K), items (I, K): tensors; target and seen: csr (U, I). Items in `seen` are not
    ranked. With one target a user (leave-one-out) Recall@k is the hit rate, and NDCG@k is
    1 / log2(2 + rank) with ranks from 0, or 0 from rank k on.
    """
    user, ranks = target.nonzero()[0], target_ranks(users, items, target, seen)         # (P,)
    n = np.bincount(user, minlength=target.shape[0])                                    # (U,)
    hits = np.bincount(user[ranks < k], minlength=len(n))
    gains = np.where(ranks < k, 1 / np.log2(2 + ranks), 0)
    ideal = np.append(0, np.cumsum(1 / np.log2(2 + np.arange(k))))                      # (k+1,)
    has = n > 0
    ndcg = np.bincount(user, gains, minlength=len(n))[has] / ideal[np.minimum(n[has], k)]
    return hits[has] / n[has], ndcg


def sample_negatives(observed, users, rng):
    """One uniform item for each of users (B,) that the user has not in observed (csr (U, I)).

    No rejection: draws r and takes the r-th item that the user has NOT. With the user's items
    sorted, p_0 < p_1 < ..., there are p_k - k others below p_k, so the answer is r + |{k: p_k - k
    <= r}|: one binary search over all rows at once. Users who have every item are not allowed.
    """
    n_items, degree = observed.shape[1], np.diff(observed.indptr)
    row = np.repeat(np.arange(len(degree)), degree)
    others = observed.indices - (np.arange(observed.nnz) - observed.indptr[row])        # p_k - k
    r = rng.integers(0, n_items - degree[users])                                        # (B,)
    width = np.int64(n_items + 1)                          # the keys ascend over the whole matrix
    below = np.searchsorted(row * width + others, users * width + r, side='right')
    return r + below - observed.indptr[users]


def pick_device(name='auto'):
    """'auto', 'cpu', 'cuda' or 'mps' -> the device's name; ValueError where it is not there."""
    there = {'cuda': torch.cuda.is_available(), 'mps': torch.backends.mps.is_available(),
             'cpu': True}
    if name != 'auto' and not there[name]:
        raise ValueError(f'no {name} device here; found {", ".join(d for d in there if there[d])}')
    return next(d for d in there if there[d]) if name == 'auto' else name


def train_epoch(model, optimizer, observed, batch, rng):
    """All training pairs once, in random order, each with one negative -> the mean loss."""
    users, positives = (a.astype(np.int64) for a in observed.nonzero())
    can = np.diff(observed.indptr)[users] < observed.shape[1]          # is there any negative?
    order = rng.permutation(np.flatnonzero(can))
    users, positives = users[order], positives[order]
    triples = np.stack([users, positives, sample_negatives(observed, users, rng)])      # (3, E)
    total = 0.
    for part in torch.from_numpy(triples).split(batch, dim=1):                          # (3, B)
        loss = model.loss(*part)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach() * part.shape[1]
    return float(total) / max(len(order), 1)


def train(name, observed, valid, users0, items0, rng, *, seen='mask', epochs=300, batch=256,
          lr=1e-3, patience=10, log=print):
    """Train a model -> users (U, K), items (I, K) of its best epoch by validation NDCG@10, curve.

    name: key of MODELS; observed, valid: csr (U, I); users0 (U, K), items0 (I, K): the start; rng:
    numpy Generator. seen='mask' ranks training items out of the validation, 'keep' leaves them
    in [authors' code]. epochs 300, batch 256, Adam lr 1e-3, patience 10 [authors' code]. curve: a
    dict for each epoch. Without validation pairs the last epoch counts. ValueError if it diverges.
    """
    model = MODELS[name](adjacency(observed), users0, items0)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    best, best_epoch, curve = -1., 0, []
    for epoch in range(1, epochs + 1):
        start = time.perf_counter()
        loss = train_epoch(model, optimizer, observed, batch, rng)
        if not np.isfinite(loss):
            raise ValueError(f'training diverged in epoch {epoch}: the loss is {loss}')
        users, items = model.embeddings()
        recall, ndcg = (np.mean(x) if valid.nnz else np.nan for x in
                        evaluate(users, items, valid, observed if seen == 'mask' else None))
        if not ndcg <= best:
            best, best_epoch, kept = ndcg, epoch, (users, items)
        seconds = time.perf_counter() - start
        curve.append(dict(epoch=epoch, loss=loss, recall=recall, ndcg=ndcg, seconds=seconds))
        log(f'epoch {epoch:3d}  loss {loss:8.4f}  valid Recall@10 {recall:.4f}  NDCG@10 {ndcg:.4f}'
            f'  best {best:.4f} at {best_epoch:3d}  {seconds:6.2f} s')
        if epoch - best_epoch >= patience:
            break
    return *kept, curve
