"""Collaborative filtering on the graph of users and items: models, evaluation, training.

The backbones of the LLMInit paper (arXiv 2503.01814). All have one table E of embeddings, a row a
user and a row an item. LightGCN (arXiv 2002.02126) averages it over the layers of a propagation:

    z = 1/(L+1) * sum_{l=0..L} A_hat^l E,    A_hat = D^-1/2 A D^-1/2,    score(u, i) = z_u . z_i

    lightgcn  BPR loss
    bpr       matrix factorisation: no layers, z = E (arXiv 1205.2618)
    sgl       BPR and InfoNCE between two views of the graph (arXiv 2010.10783)
    sgcl      a supervised contrastive loss, no negatives (section 2 of the paper)

From a start, plain arrays users0 (U, K) and items0 (I, K), to recommendations:

    model, curve = train('lightgcn', observed, valid, users0, items0, rng)
    users, items = model.embeddings()
    recall, ndcg = evaluate(users, items, test, seen=observed + valid)
    picked, scores = recommend(users, items, seen=observed + valid)

Read adjacency, Propagate, LightGCN, evaluate and train: they are the whole of it, if z_at is read
as rows of z and all_reduce as its arguments. The rest is SGL, SGCL, what makes a CPU fast
(propagation at some rows) and what several processes need (torchrun).

Not here: texts (embed.py), choosing dimensions (llminit.py), reading and splitting (data.py).
Shapes: U users, I items, K dimensions, L layers, B pairs of a batch, R rows asked for, M rows that
come of a product, P pairs of user and item, C of them at a time, W processes. Matrices of
interactions are csr (U, I) of ones. Beside other busy programs set OMP_WAIT_POLICY=passive before
torch is imported, as llminit.py does: waiting threads then sleep. Needs numpy, scipy, torch. MIT
licence, from LLMInit's reference implementation.
"""
import atexit
import contextlib
import datetime
import functools
import hashlib
import io
import os
import time
import warnings

import numpy as np
import scipy.sparse as sp
import torch
import torch.distributed as dist
import torch.nn.functional as F

# ---- the graph ---------------------------------------------------------------------------------


def adjacency(observed):
    """A_hat = D^-1/2 A D^-1/2, users first: csr (U, I) -> csr (U+I, U+I) float32.

    LightGCN eq. (8). A node without interactions has an empty row. ValueError for stored zeros.
    """
    observed = sp.csr_matrix(observed)
    if not observed.data.all():
        raise ValueError('observed stores zeros: call observed.eliminate_zeros()')

    degree_u = np.diff(observed.indptr)                                       # (U,)
    degree_i = np.bincount(observed.indices)               # up to the last item that occurs
    data = np.repeat(degree_u, degree_u) ** -.5 * degree_i[observed.indices] ** -.5
    upper = sp.csr_matrix((data, observed.indices, observed.indptr), observed.shape, np.float32)
    return sp.bmat([[None, upper], [upper.T, None]], 'csr')


def on_device(graph, device):
    """A csr graph in the form that the device multiplies: itself on a CPU, else a CSR tensor."""
    if torch.device(device).type == 'cpu':
        return graph
    with warnings.catch_warnings(action='ignore'):         # torch calls its CSR layout a beta
        parts = map(torch.from_numpy, (graph.indptr, graph.indices, graph.data))
        return torch.sparse_csr_tensor(*parts, graph.shape).to(device)


def spmm(block, x):
    """Sparse times dense: x (R, K) -> (M, K).

    block is csr or a sparse tensor (M, R), for block @ x; or csc (R, M), for block.T @ x. On a CPU
    embedding_bag, which sums weighted rows, takes half the time of torch's and scipy's products
    [ours: measured, 2 cores].
    """
    if isinstance(block, torch.Tensor):
        return block @ x
    indptr, indices, data = map(torch.from_numpy, (block.indptr, block.indices, block.data))
    return F.embedding_bag(indices, x, indptr, mode='sum', per_sample_weights=data,
                           include_last_offset=True)


class Propagate(torch.autograd.Function):
    """z = 1/(L+1) sum_l A_hat^l E of all nodes: table (U+I, K) -> (U+I, K).

    graphs: A_hat of each layer. Each is its own transpose, so the backward pass is the same sum
    with the graphs in reverse order.
    """

    @staticmethod
    def forward(ctx, table, graphs):
        ctx.graphs = graphs
        layer = table.detach()         # for a leaf embedding_bag would prepare a backward pass
        total = layer.clone()
        for graph in graphs:
            layer = spmm(graph, layer)
            total += layer
        return total.div_(len(graphs) + 1)

    @staticmethod
    def backward(ctx, grad):
        share = grad / (len(ctx.graphs) + 1)
        grad = share
        for graph in reversed(ctx.graphs):                 # Horner's rule
            grad = spmm(graph, grad).add_(share)
        return grad, None


# ---- the models --------------------------------------------------------------------------------


class LightGCN(torch.nn.Module):
    """LightGCN with exact gradients.

    graph: csr (U+I, U+I) from adjacency(); users0 (U, K) and items0 (I, K): where the table starts.
    In all methods users, positives, negatives are int64 tensors (B,), and nodes (R,) are numbers of
    rows of the table, users first.
    """

    reg = 1e-5                         # [authors' code]
    summed = False                     # is loss() a sum over the batch, or a mean?

    def __init__(self, graph, users0, items0, n_layers=2, device='cpu'):   # L = 2 [authors' code]
        super().__init__()
        mine = own_columns(users0.shape[1])                # all, but under torchrun
        start = np.concatenate([users0[:, mine], items0[:, mine]])
        start = np.ascontiguousarray(start, np.float32)    # a Fortran order would stay one
        self.n_users = len(users0)
        self.K = users0.shape[1]
        self.graphs = [on_device(graph, device)] * n_layers
        self.table = torch.nn.Parameter(torch.from_numpy(start).to(device))             # (U+I, K)

    def new_epoch(self, rng):
        """Called before each epoch: SGL draws its views here."""

    def z_of_all(self, graphs):
        """z of all nodes -> (U+I, K)."""
        return Propagate.apply(self.table, graphs)

    def z_at(self, nodes, graphs):
        """z and E at nodes (R,), repeats allowed -> (R, K), (R, K)."""
        on_cpu = self.table.is_cpu and all(map(sp.issparse, graphs))
        if on_cpu and len(nodes) < 2 * len(self.table):    # else all of z is less work
            return PropagateAt.apply(self.table, nodes, receptive_field(graphs, nodes.numpy()))

        # not z[nodes]: its backward pass adds in an order that two threads change from run to run
        z = self.z_of_all(graphs)
        return z.index_select(0, nodes), self.table.index_select(0, nodes)

    @torch.no_grad()
    def embeddings(self):
        """z of all users (U, K) and of all items (I, K); under torchrun all K columns."""
        z = all_gather(self.z_of_all(self.graphs), self.K)
        return z[:self.n_users], z[self.n_users:]

    def bpr(self, users, positives, negatives):
        """-log sigmoid(z_u.z_i - z_u.z_j) of each pair (B,), and reg/B * (|E_u| + |E_i| + |E_j|).

        The norms are Frobenius norms over the batch's rows of E, not squared [authors' code]. The
        gradient of a norm at zero is taken as zero.
        """
        nodes = torch.cat([users, positives + self.n_users, negatives + self.n_users])
        z, start = self.z_at(nodes, self.graphs)                                        # (3B, K)
        z_u, z_i, z_j = z.chunk(3)                                                      # (B, K)
        positive, negative, *squares = all_reduce(
            (z_u * z_i).sum(1), (z_u * z_j).sum(1),                                     # (B,)
            *((rows * rows).sum(1).sum() for rows in start.chunk(3)))                   # scalars

        norms = sum(square.clamp_min(1e-30).sqrt() for square in squares)
        return F.softplus(negative - positive), self.reg / len(users) * norms

    def loss(self, users, positives, negatives):
        """BPR, mean over the batch, and the regulariser -> scalar."""
        pairs, penalty = self.bpr(users, positives, negatives)
        return pairs.mean() + penalty


class BPR(LightGCN):
    """Matrix factorisation: z = E."""

    def __init__(self, graph, users0, items0, device='cpu'):
        super().__init__(graph, users0, items0, 0, device)


class InfoNCE(torch.autograd.Function):
    """sum_b -w_b log( exp(q_b.k_p(b)/tau) / sum_m exp(q_b.k_m/tau) ), SGL eq. (10) -> scalar.

    q (B, K) and k (M, K) are the rows of queries and keys, divided by their lengths; positive (B,)
    int64 is the key that each query should find, weight w (B,). All keys compete, the positive
    among them. The gradient is computed in the forward pass, some queries at a time: at most 2^21
    numbers of the (B, M) matrix exist at once, and they stay in the cache [ours: 2.4 to 3 times as
    fast as cross_entropy and autograd].
    """

    @staticmethod
    def forward(ctx, queries, keys, positive, weight, tau):
        squares = all_reduce(*((x * x).sum(1, keepdim=True) for x in (queries, keys)))
        # of at least 1e-4, which bounds the gradient of a zero row: (B, 1), (M, 1)
        q_length, k_length = (square.clamp_min(1e-8).sqrt() for square in squares)
        q = queries / q_length
        k = keys / k_length
        weight = weight[:, None]

        loss = 0.
        grad_q = torch.empty_like(q)
        grad_k = torch.zeros_like(k)
        step = max(1, 2 ** 21 // len(k))
        buffer = q.new_empty(min(step, len(q)), len(k))
        for start in range(0, len(q), step):
            part = slice(start, start + step)
            logits = torch.mm(q[part] / tau, k.T, out=buffer[:len(q[part])])               # (C, M)
            logits = all_reduce(logits)[0]
            of_positive = logits.gather(1, positive[part, None])                           # (C, 1)
            # subtracted before exp, which could overflow; exp(-2 / tau) > 0 for tau > .025
            top = 1 / tau if tau > .025 else logits.amax(1, keepdim=True)
            mass = logits.sub_(top).exp_()
            total = mass.sum(1, keepdim=True)                                              # (C, 1)
            loss += (weight[part] * (total.log() + top - of_positive)).sum()
            torch.mm(mass, k, out=grad_q[part]).mul_(weight[part] / total)
            grad_k.addmm_(mass.T, q[part] * (weight[part] / total))

        grad_q.sub_(weight * k[positive])
        grad_k.index_add_(0, positive, weight * q, alpha=-1)

        # from the gradient of x / |x| to that of x
        for x, grad, length in ((q, grad_q, q_length), (k, grad_k, k_length)):
            along = all_reduce((x * grad).sum(1, keepdim=True))[0]
            grad.addcmul_(x, along, value=-1).div_(length * tau)
        ctx.save_for_backward(grad_q, grad_k)
        return loss

    @staticmethod
    def backward(ctx, grad):
        grad_q, grad_k = ctx.saved_tensors
        return grad * grad_q, grad * grad_k, None, None, None


class SGL(LightGCN):
    """LightGCN and a contrast of two views of the graph, drawn anew every epoch.

    views: 'edge' drops a share of the edges; 'node' a share of the users and of the items, with all
    their edges; 'walk' is like 'edge', but drawn for each layer. A view is normalised by its own
    degrees. new_epoch(rng) must come before the first loss().
    """

    drop = .1                          # [authors' code]
    contrast_weight = .05              # of InfoNCE [authors' code]
    summed = True

    def __init__(self, graph, users0, items0, n_layers=2, device='cpu', views='edge', tau=.2):
        super().__init__(graph, users0, items0, n_layers, device)
        if views not in ('edge', 'node', 'walk'):
            raise ValueError(f'views {views!r}: expected edge, node or walk')
        self.observed = graph[:self.n_users, self.n_users:]    # where the edges are
        self.kind = views
        self.tau = tau                                     # .2 [authors' code]

    def view(self, rng):
        """A_hat (U+I, U+I) of the interactions that are not dropped."""
        users, items = self.observed.nonzero()
        if self.kind == 'node':
            kept = np.ones(len(users), bool)
            for nodes, count in zip((users, items), self.observed.shape):
                kept &= ~np.isin(nodes, rng.permutation(count)[:int(count * self.drop)])
        else:
            kept = rng.permutation(len(users)) < int(len(users) * (1 - self.drop))
        ones = np.ones(kept.sum(), bool)
        left = sp.csr_matrix((ones, (users[kept], items[kept])), self.observed.shape)
        return on_device(adjacency(left), self.table.device)

    def new_epoch(self, rng):
        """Draw the two views, each as the graphs of its layers."""
        if self.kind == 'walk':
            self.views = [[self.view(rng) for _ in self.graphs] for _ in range(2)]
        else:
            self.views = [[self.view(rng)] * len(self.graphs) for _ in range(2)]

    def loss(self, users, positives, negatives):
        """BPR and InfoNCE, both summed over the batch -> scalar.

        The positive of a node is itself in the other view; ALL users (items) of that view compete.
        Nodes that are in the batch several times are computed once, with a weight.
        """
        pairs, penalty = self.bpr(users, positives, negatives)
        users, user_repeats = users.unique(return_counts=True)
        items, item_repeats = positives.unique(return_counts=True)

        # queries from the first view, at the batch's nodes; keys from the second, all nodes.
        # split, not slices: each slice would make a gradient of full size
        first = self.z_at(torch.cat([users, items + self.n_users]), self.views[0])[0]
        second = self.z_of_all(self.views[1])                                           # (U+I, K)
        query_u, query_i = first.split([len(users), len(items)])
        key_u, key_i = second.split([self.n_users, len(second) - self.n_users])
        contrast = (InfoNCE.apply(query_u, key_u, users, user_repeats, self.tau)
                    + InfoNCE.apply(query_i, key_i, items, item_repeats, self.tau))
        return pairs.sum() + penalty + self.contrast_weight * contrast


class SGCL(LightGCN):
    """LightGCN's propagation and one supervised contrastive loss: no negatives, no regulariser."""

    summed = True

    def __init__(self, graph, users0, items0, n_layers=2, device='cpu', tau=.2):
        super().__init__(graph, users0, items0, n_layers, device)
        self.tau = tau                                     # .2 [authors' code]

    def loss(self, users, positives, negatives=None):
        """- sum_b log( exp(u_b.i_b/tau) / (sum_b' exp(u_b.u_b'/tau) + sum_b' exp(i_b.i_b'/tau)) ).

        Cosines, summed over the batch; the terms of b with itself are included [authors' code].
        """
        z = self.z_at(torch.cat([users, positives + self.n_users]), self.graphs)[0]
        u, i = z.chunk(2)                                                               # (B, K)
        uu, ii, ui = all_reduce(u @ u.T, i @ i.T, (u * i).sum(1))         # (B, B), (B, B), (B,)

        # the diagonals are the squared lengths: divide by them to get cosines
        u_length = uu.diagonal().clamp_min(1e-8).sqrt()                                 # (B,)
        i_length = ii.diagonal().clamp_min(1e-8).sqrt()
        uu = uu / u_length / u_length[:, None]
        ii = ii / i_length / i_length[:, None]
        ui = ui / u_length / i_length
        return ((torch.cat([uu, ii], 1) / self.tau).logsumexp(1) - ui / self.tau).sum()


MODELS = {'lightgcn': LightGCN, 'sgl': SGL, 'sgcl': SGCL, 'bpr': BPR}


# ---- propagation at some rows ------------------------------------------------------------------
# A batch needs z at its own rows only. On a CPU the products are restricted to the rows that these
# depend on: the same result for a third of the work at batch 256. Skip it at a first reading.


def receptive_field(graphs, nodes):
    """The rows of each layer that z at `nodes` (R,) depends on; repeated nodes are allowed.

    Go backwards: the last layer is needed at the nodes, the layer below there and at their
    neighbours, and so on. graphs: A_hat of each layer, csr (U+I, U+I). Returns a list of (at,
    block), first layer first. block, csr (M_l, M_{l-1}), is A_hat with the rows that layer l needs
    and the columns that layer l-1 has (M_0 = U+I, the whole table); at (R,) says which of the M_l
    rows each node is. Two users with an item each, users first; user 0 with two layers:

    >>> A_hat = adjacency(sp.csr_matrix([[1, 0], [0, 1]]))
    >>> [block.shape for at, block in receptive_field([A_hat, A_hat], np.array([0]))]
    [(2, 4), (1, 2)]
    """
    field = []
    needed = nodes
    for graph in reversed(graphs):
        there = np.zeros(graph.shape[0], bool)
        there[needed] = True
        rows = np.flatnonzero(there)
        place = np.empty(len(there), np.int32)             # node -> its row of the block
        place[rows] = np.arange(len(rows), dtype=np.int32)

        if field:                                          # the layer above has these columns
            above = field[-1][1]
            above.indices = place[above.indices]
            above.resize(above.shape[0], len(rows))

        block = graph[rows]                                # (M_l, U+I); the next turn cuts it
        field.append((torch.from_numpy(place[nodes]), block))
        needed = np.concatenate([rows, block.indices])
    return field[::-1]


class PropagateAt(torch.autograd.Function):
    """z, as Propagate has it, and E itself, at rows (R,) only: table (U+I, K) -> two (R, K).

    field: receptive_field(...) of the rows; the backward pass needs nothing else.
    """

    @staticmethod
    def forward(ctx, table, rows, field):
        ctx.rows = rows
        ctx.field = field
        ctx.size = len(table)
        layer = table.detach()
        start = layer.index_select(0, rows)                                             # (R, K)
        total = start.clone()
        for at, block in field:
            layer = spmm(block, layer)                                                  # (M_l, K)
            total += layer.index_select(0, at)
        return total.div_(len(field) + 1), start

    @staticmethod
    def backward(ctx, grad_z, grad_start):                                    # (R, K), (R, K)
        share = grad_z / (len(ctx.field) + 1)
        height = ctx.field[-1][1].shape[0] if ctx.field else ctx.size
        grad = share.new_zeros(height, share.shape[1])                                  # (M_L, K)
        for at, block in reversed(ctx.field):
            grad = spmm(block.tocsc(), grad.index_add_(0, at, share))                # (M_{l-1}, K)
        return grad.index_add_(0, ctx.rows, share + grad_start), None, None


# ---- evaluation --------------------------------------------------------------------------------


def as_csr(name, matrix, users, items):
    """matrix as csr (U, I); None stays None. ValueError if it has another shape."""
    if matrix is None:
        return None
    if matrix.shape != (len(users), len(items)):
        raise ValueError(f'{name} has the shape {matrix.shape}; expected a row for each of '
                         f'{len(users)} users and a column for each of {len(items)} items')
    return sp.csr_matrix(matrix)


def hide(scores, seen):
    """Set the scores (C, I) of the items in each row of seen, csr (C, I), to -inf, in place."""
    rows = np.repeat(np.arange(seen.shape[0]), np.diff(seen.indptr))
    scores[rows, seen.indices] = -torch.inf


def ranks_in(scores, target, seen=None):
    """Ranks, from 0, of one target a row: scores (C, I), overwritten, target (C,) -> (C,) int64.

    All items compete except those in the row of seen (csr (C, I) or None), the target itself
    always. An equal score, or one that is not a number, counts as above the target: neither ever
    helps the model.
    """
    row = np.arange(len(target))
    of_target = scores[row, target]                                                     # (C,)
    if seen is not None:
        hide(scores, seen)
        scores[row, target] = of_target
    below = scores.lt_(of_target[:, None]).sum(1, dtype=torch.float32)   # exact to 2^24 items
    return scores.shape[1] - 1 - below.cpu().numpy().astype(np.int64)


@torch.no_grad()
def out_of_reach(users, items, pair_user, pair_item, need):
    """Which targets certainly have `need` (P,) items or more above them -> bool (P,).

    A target is compared with the eighth of the items that have the longest vectors, which fill most
    first places, and only scores count that are higher by more than rounding in full precision can
    explain (not TF32 on a GPU).
    """
    lengths = torch.linalg.vector_norm(items, dim=1)                                    # (I,)
    longest = items[lengths.topk(len(items) // 8).indices].T                            # (K, I/8)
    K = items.shape[1]
    rounding = torch.linalg.vector_norm(users, dim=1) * lengths.max() * K               # (U,)
    rounding *= torch.finfo(users.dtype).eps

    out = np.empty(len(need), bool)
    step = max(1, 2 ** 20 // max(longest.shape[1], K))
    for start in range(0, len(need), step):
        part = slice(start, start + step)
        u = users[pair_user[part]]                                                      # (C, K)
        bar = (u * items[pair_item[part]]).sum(1) + rounding[pair_user[part]]           # (C,)
        higher = torch.mm(u, longest).gt_(bar[:, None]).sum(1, dtype=torch.float32)     # (C,)
        out[part] = higher.cpu().numpy() >= need[part]
    return out


@torch.no_grad()
def target_ranks(users, items, target, seen=None, k=None):
    """How many items rank above each target: (U, K), (I, K), csr (U, I) with P pairs -> (P,).

    See ranks_in. A target's score is read from the matrix of scores with which it is compared, so
    ties are exact. With k, a rank of k or more may be returned as I: most targets are out of reach
    after a look at a part of the items [ours: a validation takes a fifth of the time].
    """
    pair_user, pair_item = target.nonzero()
    ranks = np.full(len(pair_user), len(items))
    left = np.arange(len(pair_user))
    if k is not None:
        need = np.full(len(left), k)
        if seen is not None:                               # up to so many of those are hidden
            need += np.diff(seen.indptr)[pair_user]
        left = left[~out_of_reach(users, items, pair_user, pair_item, need)]

    step = max(1, 2 ** 20 // len(items))                   # [ours: 4 MiB of scores, in the cache]
    buffer = items.new_empty(min(step, len(left)), len(items))
    for part in np.split(left, range(step, len(left), step)):
        user = pair_user[part]
        scores = torch.mm(users[user], items.T, out=buffer[:len(user)])                 # (C, I)
        hidden = None if seen is None else seen[user]
        ranks[part] = ranks_in(scores, pair_item[part], hidden)
    return ranks


def evaluate(users, items, target, seen=None, k=10):
    """Full ranking -> Recall@k and NDCG@k, each (n,) float64 over the users that have a target.

    users (U, K), items (I, K): tensors; target and seen: csr (U, I). Items in `seen` are not
    ranked. With one target a user (leave-one-out) Recall@k is the hit rate, and NDCG@k is
    1 / log2(2 + rank), ranks from 0, or 0 from rank k on. ValueError for a matrix of another shape.
    """
    target = as_csr('target', target, users, items)
    seen = as_csr('seen', seen, users, items)
    ranks = target_ranks(users, items, target, seen, k)                                 # (P,)
    _, user, n_targets = np.unique(target.nonzero()[0], return_inverse=True, return_counts=True)

    gains = np.where(ranks < k, 1 / np.log2(2 + ranks), 0)                              # (P,)
    ideal = np.cumsum(1 / np.log2(2 + np.arange(k)))       # of 1, 2, ..., k targets: all on top
    recall = np.bincount(user, ranks < k) / n_targets                                   # (n,)
    ndcg = np.bincount(user, gains) / ideal[np.minimum(n_targets, k) - 1]
    return recall, ndcg


@torch.no_grad()
def recommend(users, items, seen=None, n=10):
    """The n best items of each user, all if there are fewer: (U, K), (I, K) tensors, csr (U, I) ->
    (U, n) int64, (U, n) float32 scores.

    Items in `seen` are not recommended. A row with fewer than n items left ends in item -1. Equal
    scores are in no particular order.
    """
    seen = as_csr('seen', seen, users, items)
    n = min(n, len(items))
    picked = np.empty((len(users), n), np.int64)
    scores = np.empty((len(users), n), np.float32)
    step = max(1, 2 ** 22 // len(items))
    for start in range(0, len(users), step):
        rows = slice(start, start + step)
        score = (users[rows] @ items.T).float()                                         # (C, I)
        if seen is not None:
            hide(score, seen[rows])
        best = score.topk(n)                                                            # (C, n)
        scores[rows] = best.values.cpu().numpy()
        picked[rows] = np.where(scores[rows] == -np.inf, -1, best.indices.cpu().numpy())
    return picked, scores


# ---- training ----------------------------------------------------------------------------------


def sample_negatives(observed, users, rng):
    """One uniform item for each of users (B,) that the user does not have in observed (csr (U, I)).

    No rejection: draws r and takes the r-th item that the user does NOT have. With the user's items
    sorted, p_0 < p_1 < ..., p_k - k others are below p_k, so the answer is r + |{k: p_k - k <= r}|:
    one binary search over all rows at once. A user with items 1 and 2 of five has p_k - k = 1, 1,
    so that r = 0, 1, 2 makes 0, 3, 4:

    >>> observed = sp.csr_matrix([[0, 1, 1, 0, 0]])
    >>> {*sample_negatives(observed, np.zeros(99, int), np.random.default_rng(0)).tolist()}
    {0, 3, 4}

    Not for users who have every item, nor for a csr whose indices are not sorted.
    """
    n_items = observed.shape[1]
    degree = np.diff(observed.indptr)                                                   # (U,)
    row = np.repeat(np.arange(len(degree)), degree)                                     # (P,)
    others = observed.indices - (np.arange(observed.nnz) - observed.indptr[row])        # p_k - k
    r = rng.integers(0, n_items - degree[users])                                        # (B,)

    width = np.int64(n_items + 1)                          # the keys ascend over the whole matrix
    below = np.searchsorted(row * width + others, users * width + r, side='right')
    return r + below - observed.indptr[users]


def sample_triples(observed, rng):
    """All training pairs once, in random order, each with a negative: csr (U, I) -> (3, P) int64.

    Pairs of a user who has every item have no negative and are left out. ValueError if all are.
    """
    users, items = observed.nonzero()
    can = np.diff(observed.indptr)[users] < observed.shape[1]
    if not can.any():
        raise ValueError('no user has an item and lacks another: there is nothing to rank')
    order = rng.permutation(np.flatnonzero(can))
    users = users[order].astype(np.int64)
    negatives = sample_negatives(observed, users, rng)
    return torch.from_numpy(np.stack([users, items[order], negatives]))


def train(name, observed, valid, users0, items0, rng, *, mask_seen=True, epochs=300, batch=256,
          lr=1e-3, patience=10, device='cpu', log=functools.partial(print, flush=True), **settings):
    """Train a model -> the model at its best epoch by validation NDCG@10, curve.

    name: a key of MODELS; observed, valid: csr (U, I); users0 (U, K), items0 (I, K): the start;
    rng: numpy Generator, or a seed; lr: of Adam; patience: epochs without a better validation
    before it stops; settings: arguments of the model. The defaults are the [authors' code]'s, but
    for mask_seen, which ranks no training items in validation. log: called with a line an epoch.

    curve: a dict for each epoch with epoch, loss (mean of a pair), recall, ndcg, seconds, and best:
    was it the best so far? Only users with validation items are ranked, so valid may hold a sample
    of them; without any the last epoch is the best. No epochs: the start itself, an empty curve.
    ValueError if training diverges.
    """
    if name not in MODELS:
        raise ValueError(f'model {name!r}: expected one of {", ".join(MODELS)}')
    observed = as_csr('observed', observed, users0, items0).sorted_indices()    # for negatives
    valid = as_csr('valid', valid, users0, items0)
    rng = np.random.default_rng(rng)
    check_alike((name, mask_seen, epochs, batch, lr, patience, settings, rng.bit_generator.state),
                (observed.indptr, observed.indices, valid.indptr, valid.indices, users0, items0),
                device)
    model = MODELS[name](adjacency(observed), users0, items0, device=device, **settings)
    adam = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    seen = observed if mask_seen else None

    curve = []
    best = -1.
    best_epoch = 0
    kept = model.state_dict()
    for epoch in range(1, epochs + 1):
        started = time.perf_counter()

        # one pass over the training pairs
        model.new_epoch(rng)
        triples = sample_triples(observed, rng).to(model.table.device)                  # (3, P)
        total = 0.
        for users, positives, negatives in triples.split(batch, dim=1):                 # (B,) each
            adam.zero_grad()
            loss = model.loss(users, positives, negatives)
            loss.backward()
            adam.step()
            total += loss.detach() * (1 if model.summed else len(users))
        mean_loss = float(total) / triples.shape[1]
        if not np.isfinite(mean_loss):
            raise ValueError(f'training diverged in epoch {epoch}, the loss is {mean_loss}: choose '
                             'a lower learning rate')

        # validation: the best epoch's tables are kept
        recall = ndcg = np.nan
        if valid.nnz:
            recall, ndcg = (metric.mean() for metric in evaluate(*model.embeddings(), valid, seen))
        if not ndcg <= best:                               # also of NaN: without validation
            best = ndcg
            best_epoch = epoch
            kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}

        seconds = time.perf_counter() - started
        curve.append(dict(epoch=epoch, loss=mean_loss, recall=recall, ndcg=ndcg, seconds=seconds,
                          best=best_epoch == epoch))
        log(f'epoch {epoch:3d}  loss {mean_loss:.4f}  valid Recall@10 {recall:.4f}  '
            f'NDCG@10 {ndcg:.4f}  best {best:.4f} (epoch {best_epoch})  {seconds:.2f} s')
        if epoch - best_epoch >= patience:
            break

    model.load_state_dict(kept)
    return model, curve


# ---- several processes -------------------------------------------------------------------------
# Under torchrun each of W processes holds K/W columns of E and of Adam's state, and the whole
# graph. Propagation acts on each column by itself and sends nothing; sums over K go through
# all_reduce, and z is gathered once an epoch for evaluation. Without join() all of this is idle,
# whatever process group a program around it has made.

WORLD = [0, 1]                         # rank of this process, W; join() sets them


def join(device='auto'):
    """Join the processes that torchrun started -> rank, device. Alone the rank is 0.

    device: 'cpu', 'cuda' (a GPU for each process), or 'auto' for CUDA if there is any. A collective
    waits a minute for the slowest process. ValueError if there is no such device, OSError if the
    processes do not find each other.
    """
    n_gpus = torch.cuda.device_count()
    local = int(os.environ.get('LOCAL_RANK') or 0)
    if device == 'auto':
        device = 'cuda' if n_gpus else 'cpu'
    if device == 'cuda' and local >= n_gpus:
        raise ValueError(f'device cuda: {n_gpus} GPUs here, and this is process {local}')

    W = int(os.environ.get('WORLD_SIZE') or 1)
    if W > 1 and not dist.is_initialized():
        rank = int(os.environ.get('RANK') or 0)
        if rank >= W:
            raise ValueError(f'RANK is {rank}: expected less than WORLD_SIZE, {W}')
        if device == 'cuda':
            torch.cuda.set_device(local)
        communicate(dist.init_process_group, 'nccl' if device == 'cuda' else 'gloo',
                    timeout=datetime.timedelta(minutes=1))
        # otherwise gloo's threads abort most processes at their end [measured: in 12 of 15 runs]
        atexit.register(dist.destroy_process_group)
    if W > 1:
        WORLD[:] = dist.get_rank(), dist.get_world_size()
    return WORLD[0], device


def communicate(collective, *args, **more):
    """Run a collective; OSError if another process has ended or does not come in time."""
    try:
        collective(*args, **more)
    except (RuntimeError, ValueError) as error:            # torch.distributed's errors are these
        raise OSError('another process has ended or is too late, or the port is taken: '
                      f'{error}') from error


@contextlib.contextmanager
def in_turn():
    """Run the block first in one process of each machine, then without stderr in the others, which
    find on the disk what the first one downloaded or encoded. They wait up to an hour."""
    if WORLD[1] == 1:
        yield
        return

    group = dist.new_group(backend='gloo', timeout=datetime.timedelta(hours=1))
    if int(os.environ.get('LOCAL_RANK') or 0) == 0:
        yield
        communicate(dist.barrier, group)
    else:
        communicate(dist.barrier, group)
        with contextlib.redirect_stderr(io.StringIO()):
            yield


def check_alike(settings, arrays, device):
    """ValueError if another process has other settings or other arrays, by one number of each."""
    if WORLD[1] == 1:
        return
    digest = hashlib.sha256(repr(settings).encode())
    for array in arrays:
        digest.update(np.ascontiguousarray(array))
    number = int(digest.hexdigest()[:12], 16)              # exact in float64
    ends = torch.tensor([number, -number], dtype=torch.float64, device=device)
    communicate(dist.all_reduce, ends, dist.ReduceOp.MAX)
    if ends[0] != -ends[1]:
        raise ValueError('the processes have different settings, data or seeds: start all alike')


def own_columns(K, rank=None):
    """The slice of K dimensions that this process, or another rank, holds."""
    mine, W = WORLD
    if W > K:
        raise ValueError(f'{K} dimensions cannot be split over {W} processes: start at most {K}')
    rank = mine if rank is None else rank
    return slice(K * rank // W, K * (rank + 1) // W)


def all_reduce(*parts):
    """Sums over the columns of this process -> sums over all K: tensors of any shapes, in one
    message. Alone the tensors themselves.

    The message is hidden from autograd. That is right: the sum depends on each process's part with
    slope 1, and all processes have the same loss, so the gradient of a part is that of the sum.
    """
    if WORLD[1] == 1:
        return parts
    flat = torch.cat([part.flatten() for part in parts])
    communicate(dist.all_reduce, flat.detach())
    sums = flat.split([part.numel() for part in parts])
    return [whole.view(part.shape) for whole, part in zip(sums, parts)]


def all_gather(x, K):
    """All K columns of a table of which each process holds its own: (n, K/W) -> (n, K)."""
    if WORLD[1] == 1:
        return x
    whole = x.new_empty(K, len(x))             # transposed: what each rank sends is contiguous
    whole[own_columns(K)] = x.T
    for rank in range(WORLD[1]):
        communicate(dist.broadcast, whole[own_columns(K, rank)], rank)
    return whole.T.contiguous()
