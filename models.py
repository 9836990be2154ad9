"""Collaborative filtering on the user-item graph: models, training, evaluation.

The backbones of the LLMInit paper (arXiv 2503.01814). LightGCN (arXiv 2002.02126) smooths one
embedding table E over the graph of interactions, and the others share its propagation:

    z = 1/(L+1) * sum_{l=0..L} A_hat^l E,    A_hat = D^-1/2 A D^-1/2,    score(u, i) = z_u . z_i

    BPR       no graph, z = E                  matrix factorisation (arXiv 1205.2618)
    LightGCN  BPR loss
    SGL       BPR + InfoNCE of two views       self-supervised contrast (arXiv 2010.10783)
    SGCL      supervised contrast, no negatives (section 2 [authors' code])
    MoRec     z = W v of frozen text vectors v (arXiv 2303.13835, as the paper's Table 3 uses it)

Where E starts is the caller's business: users0 and items0 are plain arrays.

    adjacency -> Model(graph, users0, items0) -> loss(users, positives, negatives)
    sample_negatives, evaluate -> train                         what is done with a model

Propagation is linear and A_hat symmetric: the backward pass is the same product and nothing is
kept for it. A batch needs z at its own rows only, so on a CPU the products run on the receptive
field of the batch: the exact result from a fraction of the work.

Under torchrun each of W processes holds K/W columns of what is trained and a copy of the graph.
Propagation acts on each column by itself, so it sends nothing; sums over K are completed by
together(), through which all of them go. See join() and columns().

Not here: texts (embed.py), choosing dimensions (llminit.py), reading and splitting (data.py).
Shapes: U users, I items, K dimensions, N text dimensions, B batch, L layers, R rows asked for,
P pairs.
Needs numpy, scipy, torch. MIT licence, from LLMInit's reference implementation.
"""
import contextlib
import ctypes
import datetime
import hashlib
import os
import sys
import time
import warnings

import numpy as np
import scipy.sparse as sp
import torch
import torch.distributed as dist
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
    ends = left.indptr[1:].astype(np.int64) + right.nnz        # csr_matrix makes int32 what fits
    indptr = np.concatenate([right.indptr, ends])
    indices = np.concatenate([right.indices + n_users, left.indices])
    return sp.csr_matrix((np.concatenate([right.data, left.data]), indices, indptr),
                         (n_users + n_items,) * 2)


def among(size, nodes):
    """Distinct nodes in order (M,), and where among them each of all `size` nodes is (size,), which
    means nothing for the others."""
    there = np.zeros(size, bool)
    there[nodes] = True
    found, position = np.flatnonzero(there), np.empty(size, np.int32)
    position[found] = np.arange(len(found), dtype=np.int32)
    return found, position


def receptive_field(graphs, nodes):
    """What layers 1..L must compute so that all of them are known at `nodes` (R,), repeats allowed.

    graphs: A_hat of each layer, L csr (U+I, U+I). Returns [(at, block)], first layer first: block
    csr (M_l, M_{l-1}) holds the rows of A_hat that layer l is needed at, its columns count the rows
    of layer l-1 (M_0 = U+I, the whole table), and `at` (R,) says where `nodes` are among the M_l.
    """
    field, size = [], graphs[0].shape[0] if graphs else 0
    needed, position = among(size, nodes) if graphs else (None, None)
    for layer, graph in reversed(list(enumerate(graphs))):
        block = graph[needed]                                                           # (M_l, U+I)
        field.append((torch.from_numpy(position[nodes]), block))
        if layer:
            needed, position = among(size, np.concatenate([needed, block.indices]))
            block.indices = position[block.indices]
            block.resize(block.shape[0], len(needed))
    return field[::-1]


def spmm(block, x):
    """block @ x (N, K) -> (M, K). block: scipy csr (M, N), scipy csc (N, M) taken transposed, or
    a sparse torch tensor (M, N).

    On a CPU a weighted sum of rows is what embedding_bag computes, in half the time or less of
    torch's and scipy's CSR products [ours: measured, 2 cores].
    """
    if isinstance(block, torch.Tensor):
        return block @ x
    indptr, indices, data = map(torch.from_numpy, (block.indptr, block.indices, block.data))
    return F.embedding_bag(indices, x, indptr, mode='sum', per_sample_weights=data,
                           include_last_offset=True)


class Propagate(torch.autograd.Function):
    """z = 1/(L+1) sum_l A_hat^l E of all nodes: table (U+I, K) -> (U+I, K). graphs: A_hat of each
    layer. A_hat is its own transpose, so backward is Horner's rule for the same sum."""

    @staticmethod
    def forward(ctx, table, graphs):
        ctx.graphs = graphs
        x = table.detach()             # as a leaf it would make embedding_bag prepare a backward
        total = x if graphs else x.clone()
        for layer, graph in enumerate(graphs):
            x = spmm(graph, x)
            total = total.add_(x) if layer else total + x          # in place but for the table
        return total.div_(len(graphs) + 1)

    @staticmethod
    def backward(ctx, grad):
        share = grad / (len(ctx.graphs) + 1)
        grad = share
        for graph in reversed(ctx.graphs):
            grad = spmm(graph, grad).add_(share)
        return grad, None


class PropagateAt(torch.autograd.Function):
    """z as above, and E itself, at rows (R,) alone: table (U+I, K) -> two (R, K).

    field: receptive_field(...) of the rows; all that is kept for the backward pass.
    """

    @staticmethod
    def forward(ctx, table, rows, field):
        ctx.rows, ctx.field, ctx.size = rows, field, len(table)
        ctx.set_materialize_grads(False)               # an output that nobody used costs nothing
        x = table.detach()
        start = x.index_select(0, rows)                                                 # (R, K)
        total = start.clone()
        for at, block in field:
            x = spmm(block, x)                                                          # (M_l, K)
            total += x.index_select(0, at)                           # twice as fast as x[at]
        return total.div_(len(field) + 1), start

    @staticmethod
    def backward(ctx, grad_z, grad_start):                                    # (R, K), (R, K)
        if grad_z is None:
            grad_z = torch.zeros_like(grad_start)
        share = grad_z / (len(ctx.field) + 1)
        grad = None                                        # of layer l
        for at, block in reversed(ctx.field):
            grad = share.new_zeros(block.shape[0], share.shape[1]) if grad is None else grad
            grad = spmm(block.tocsc(), grad.index_add_(0, at, share))                # (M_{l-1}, K)
        last = share if grad_start is None else share + grad_start
        if not ctx.field:
            grad = last.new_zeros(ctx.size, last.shape[1])
        return grad.index_add_(0, ctx.rows, last), None, None


def sparse_tensor(graph, layout):
    """A csr graph as a sparse torch tensor, layout 'csr' or 'coo'."""
    if layout == 'coo':
        graph = graph.tocoo()
        where = torch.from_numpy(np.stack([graph.row, graph.col]))
        return torch.sparse_coo_tensor(where, graph.data, graph.shape, is_coalesced=True)
    with warnings.catch_warnings():                        # torch calls its CSR layout a beta
        warnings.simplefilter('ignore')
        parts = map(torch.from_numpy, (graph.indptr, graph.indices, graph.data))
        return torch.sparse_csr_tensor(*parts, graph.shape)


def on_device(graph, device):
    """A csr graph as the device multiplies it: itself on the CPU; MPS has no CSR products."""
    if device == 'cpu':
        return graph
    return sparse_tensor(graph, 'coo' if device == 'mps' else 'csr').to(device)


def ranks():
    """(rank, W): which of how many processes of torchrun this is; (0, 1) alone."""
    there = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if there else (0, 1)


def columns(K):
    """The slice of K dimensions that this process holds; ValueError where there is none for it."""
    rank, W = ranks()
    if W > K:
        raise ValueError(f'{K} dimensions cannot be split over {W} processes: start at most {K}')
    return slice(K * rank // W, K * (rank + 1) // W)


def start_columns(name, K):
    """The slice of a start's K columns that a model of this name takes in this process."""
    return slice(None) if name == 'morec' else columns(K)


class AllReduce(torch.autograd.Function):
    """x summed over all processes. Each of them goes on to the same loss of the sum, so the
    gradient of its own x is the gradient of the sum, as it is: nothing is sent backward."""

    @staticmethod
    def forward(ctx, x):
        x = x.detach().clone()
        try:
            dist.all_reduce(x)
        except RuntimeError as error:
            raise OSError(f'another process is gone or a minute late ({error})') from None
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad


def together(*parts):
    """Sums over the columns of this process -> sums over all K: tensors of any shapes, in one
    message. Alone, the tensors as they are."""
    if ranks()[1] == 1:
        return parts
    flat = AllReduce.apply(torch.cat([part.flatten() for part in parts]))
    return [whole.view(part.shape) for whole, part
            in zip(flat.split([part.numel() for part in parts]), parts)]


def agree(text, done=False):
    """The first process's `done`; ValueError unless text() is the same in all processes, so that
    none of them trains something else than the others. Alone, text() is not asked for."""
    if ranks()[1] == 1:
        return done
    number = int(hashlib.sha256(text().encode()).hexdigest()[:12], 16)
    held = torch.tensor([number, -number, int(done and ranks()[0] == 0)], dtype=torch.float64,
                        device='cuda' if dist.get_backend() == 'nccl' else 'cpu')
    dist.all_reduce(held, dist.ReduceOp.MAX)
    if held[0] != -held[1]:
        raise ValueError('the processes have different settings, data or seeds; start all alike')
    return bool(held[2])


def width(x):
    """K of a table of which this process holds some columns (n, K/W)."""
    return int(together(torch.tensor(float(x.shape[1]), device=x.device))[0])


def gathered(x):
    """All K columns of a table of which each process holds its own: (n, K/W) -> (n, K)."""
    if ranks()[1] == 1:
        return x
    K = width(x)
    whole = x.new_zeros(len(x), K)
    whole[:, columns(K)] = x
    return together(whole)[0]


def dot(a, b):
    """Row-wise dot products: (B, K), (B, K) -> (B,)."""
    return together((a * b).sum(1))[0]


def length(x):
    """Lengths of rows, (B, K) -> (B, 1), at least 1e-4, which bounds the gradient of a zero row."""
    return dot(x, x).clamp_min(1e-8).sqrt()[:, None]


def bpr(positive, negative):
    """Bayesian personalised ranking of each pair, -log sigmoid(positive - negative): (B,)."""
    return F.softplus(negative - positive)


def counted(nodes):
    """Distinct nodes (D,) and how often each stands in nodes (B,): a loss need be computed but once
    for each. Off the CPU all of them, once each, so that shapes stay as they are."""
    return nodes.unique(return_counts=True) if nodes.is_cpu else (nodes, torch.ones_like(nodes))


class InfoNCE(torch.autograd.Function):
    """sum_b -w_b log( exp(q_b.k_own(b)/tau) / sum_m exp(q_b.k_m/tau) ), SGL eq. (10) -> scalar.

    q (B, K) and k (M, K) are the rows of queries and keys at length 1, own (B,) int64, weight w
    (B,); all keys compete, the positive among them. The gradient is computed on the way, a few
    queries at a time: of a (B, M) matrix there are never more than 2^21 numbers.
    """

    @staticmethod
    def forward(ctx, queries, keys, own, weight, tau):
        lengths = [length(x) for x in (queries, keys)]
        q, k, weight = queries / lengths[0], keys / lengths[1], weight[:, None]
        grad_q, grad_k, loss = torch.empty_like(q), torch.zeros_like(k), 0.
        step = max(1, 2 ** 21 // len(k))
        buffer = q.new_empty(min(step, len(q)), len(k))
        for start in range(0, len(q), step):
            part = slice(start, start + step)
            some, w = q[part], weight[part]                                             # (C, K)
            logits, = together(torch.mm(some / tau, k.T, out=buffer[:len(some)]))       # (C, M)
            positive = logits.gather(1, own[part, None])
            safe = tau > .025          # then exp((-1 - 1)/tau) is no zero in float32
            top = 1 / tau if safe else logits.amax(1, keepdim=True)
            mass = logits.sub_(top).exp_()
            total = mass.sum(1, keepdim=True)                                           # (C, 1)
            loss += (w * (total.log() + top - positive)).sum()
            torch.mm(mass, k, out=grad_q[part]).mul_(w / total)
            grad_k.addmm_(mass.T, some * (w / total))
        grad_q.sub_(weight * k[own])
        grad_k.index_add_(0, own, weight * q, alpha=-1)
        for x, g, size in ((q, grad_q, lengths[0]), (k, grad_k, lengths[1])):
            g.addcmul_(x, dot(x, g)[:, None], value=-1).div_(size * tau)               # of x / |x|
        ctx.save_for_backward(grad_q, grad_k)
        return loss

    @staticmethod
    def backward(ctx, grad):
        grad_q, grad_k = ctx.saved_tensors
        return grad * grad_q, grad * grad_k, None, None, None


class LightGCN(torch.nn.Module):
    """LightGCN with exact gradients. graph: csr (U+I, U+I) from adjacency(); users0 (U, K) and
    items0 (I, K): where the table starts. users, positives, negatives: int64 tensors (B,)."""

    reg = 1e-5                                             # [authors' code]

    def __init__(self, graph, users0, items0, n_layers=2, device='cpu'):   # L = 2 [authors' code]
        super().__init__()
        start = np.concatenate([users0, items0]).astype(np.float32)    # one table: one gradient
        self.n_users, self.graphs = len(users0), [on_device(graph, device)] * n_layers
        self.table = torch.nn.Parameter(torch.from_numpy(start).to(device))             # (U+I, K)

    def new_epoch(self, rng):
        """What is drawn anew for each epoch: nothing here."""

    def everywhere(self, graphs):
        """z and E of all nodes -> (U+I, K), (U+I, K)."""
        return Propagate.apply(self.table, graphs), self.table

    def at(self, nodes, graphs):
        """z and E of nodes (n,), users first, repeats allowed -> (n, K), (n, K).

        Off the CPU all nodes are computed: static shapes are worth more there than less work. So
        they are where the batch asks for more rows than that [ours: twice as many].
        """
        few = self.table.is_cpu and len(nodes) < 2 * len(self.table)
        if few and not any(isinstance(graph, torch.Tensor) for graph in graphs):
            return PropagateAt.apply(self.table, nodes, receptive_field(graphs, nodes.numpy()))
        z, start = self.everywhere(graphs)
        return z[nodes], start[nodes]

    def trained(self):
        """What training moves, as two tables: E of users (U, K), of items (I, K)."""
        return self.table[:self.n_users], self.table[self.n_users:]

    @torch.no_grad()
    def embeddings(self):
        """z of all -> users (U, K), items (I, K)."""
        z, _ = self.everywhere(self.graphs)
        return z[:self.n_users], z[self.n_users:]

    def ranking(self, users, positives, negatives):
        """BPR of each pair (B,), and reg/B * (|E_u| + |E_i| + |E_j|).

        The norms are Frobenius norms over the batch's rows of E, not squared [authors' code].
        """
        nodes = torch.cat([users, positives + self.n_users, negatives + self.n_users])
        z, start = self.at(nodes, self.graphs)
        zu, zi, zj = z.chunk(3)                                                         # (B, K)
        positive, negative, *squares = together(
            (zu * zi).sum(1), (zu * zj).sum(1),
            *((part * part).sum(1).sum() for part in start.chunk(3)))
        norms = sum(square.sqrt() for square in squares)
        return bpr(positive, negative), self.reg / len(users) * norms

    def loss(self, users, positives, negatives):
        """BPR, mean over the batch, and the regulariser -> scalar."""
        pairs, penalty = self.ranking(users, positives, negatives)
        return pairs.mean() + penalty


class BPR(LightGCN):
    """Matrix factorisation: LightGCN without layers."""

    def __init__(self, graph, users0, items0, n_layers=0, device='cpu'):
        super().__init__(graph, users0, items0, 0, device)


class SGL(LightGCN):
    """LightGCN with self-supervised contrast of two views of the graph, drawn anew every epoch.

    views: 'edge' drops a share of the edges, 'node' of the users and of the items with all their
    edges, 'walk' of the edges for each layer anew. A view is normalised by its own degrees.
    """

    drop, weight = .1, .05                                 # [authors' code]

    def __init__(self, graph, users0, items0, n_layers=2, device='cpu', views='edge', tau=.2):
        super().__init__(graph, users0, items0, n_layers, device)
        self.observed, self.kind, self.device = graph[:len(users0), len(users0):], views, device
        self.tau = tau                                     # [authors' code]

    def view(self, rng):
        """A_hat (U+I, U+I) of the interactions that a draw leaves."""
        observed = self.observed
        rows, columns = observed.nonzero()
        if self.kind == 'node':
            kept = np.ones(len(rows), bool)
            for nodes, count in zip((rows, columns), observed.shape):
                kept &= ~np.isin(nodes, rng.permutation(count)[:int(count * self.drop)])
        else:
            kept = rng.permutation(len(rows)) < int(len(rows) * (1 - self.drop))
        indptr = np.append(0, np.cumsum(kept))[observed.indptr].astype(np.int32)
        left = np.ones(indptr[-1], np.float32), columns[kept], indptr
        return on_device(adjacency(sp.csr_matrix(left, observed.shape)), self.device)

    def new_epoch(self, rng):
        layers = len(self.graphs)
        self.views = [[self.view(rng) for _ in range(layers)] if self.kind == 'walk' else
                      [self.view(rng)] * layers for _ in range(2)]

    def loss(self, users, positives, negatives):
        """BPR and InfoNCE, both summed over the batch -> scalar.

        The positive of a node is itself in the other view; ALL users (items) of that view compete.
        """
        pairs, penalty = self.ranking(users, positives, negatives)
        (users, times), (items, often) = counted(users), counted(positives)
        first, _ = self.at(torch.cat([users, items + self.n_users]), self.views[0])
        second, _ = self.everywhere(self.views[1])                                      # (U+I, K)
        contrast = (
            InfoNCE.apply(first[:len(users)], second[:self.n_users], users, times, self.tau)
            + InfoNCE.apply(first[len(users):], second[self.n_users:], items, often, self.tau))
        return pairs.sum() + penalty + self.weight * contrast


class SGCL(LightGCN):
    """LightGCN propagation under one supervised contrastive loss; no negatives, no regulariser."""

    def __init__(self, graph, users0, items0, n_layers=2, device='cpu', tau=.2):
        super().__init__(graph, users0, items0, n_layers, device)
        self.tau = tau                                     # [authors' code]

    def loss(self, users, positives, negatives=None):
        """- sum_b log( exp(u_b.i_b/tau) / (sum_b' exp(u_b.u_b'/tau) + sum_b' exp(i_b.i_b'/tau)) ).

        Cosines, summed over the batch; the terms of b with itself stay in [authors' code].
        """
        z, _ = self.at(torch.cat([users, positives + self.n_users]), self.graphs)
        u, i = z.chunk(2)                                                               # (B, K)
        uu, ii, ui = together(u @ u.T, i @ i.T, (u * i).sum(1))
        u, i = (products.diagonal().clamp_min(1e-8).sqrt() for products in (uu, ii))    # lengths
        cosines = torch.cat([uu / u / u[:, None], ii / i / i[:, None]], 1)              # (B, 2B)
        return ((cosines / self.tau).logsumexp(1) - ui / u / i / self.tau).sum()


class MoRec(LightGCN):
    """Frozen text vectors behind one trainable projection: users0 (U, N), items0 (I, N) -> K.

    Where users0 are means of item vectors, their projection is the mean of the projected items.
    Trained with BPR. The projection starts Xavier-uniform [authors' code for tables], from rng.
    """

    def __init__(self, graph, users0, items0, n_layers=0, device='cpu', dim=128, rng=None):
        super().__init__(graph, users0, items0, 0, device)
        self.table.requires_grad_(False)                                                # (U+I, N)
        N = users0.shape[1]
        draw = (rng or np.random.default_rng(0)).uniform(-1, 1, (N, dim)) * (6 / (N + dim)) ** .5
        draw = np.ascontiguousarray(draw[:, columns(dim)], np.float32)                  # (N, K/W)
        self.projection = torch.nn.Parameter(torch.from_numpy(draw).to(device))

    def trained(self):
        return self.embeddings()

    def everywhere(self, graphs):
        z = self.table @ self.projection                                                # (U+I, K)
        return z, z

    def at(self, nodes, graphs):
        z = self.table[nodes] @ self.projection                                         # (n, K)
        return z, z


MODELS = {'lightgcn': LightGCN, 'sgl': SGL, 'sgcl': SGCL, 'morec': MoRec, 'bpr': BPR}


@torch.no_grad()
def outranked(users, items, pair_user, pair_item, need):
    """Whether surely need (P,) items or more score above each target: (U, K), (I, K) -> bool (P,).

    Counts among the eighth of the items with the longest vectors, which fill most first places,
    and only scores that are higher by more than two dot products can be rounded.
    """
    sizes, K = length(items), width(items)
    head = items[sizes[:, 0].topk(len(items) // 8).indices].T                           # (K, I/8)
    rounding = length(users) * sizes.max() * (K * 2. ** -23)                            # (U, 1)
    out, step = np.empty(len(need), bool), max(1, 2 ** 20 // max(head.shape[1], K))
    for start in range(0, len(need), step):
        part = slice(start, start + step)
        u, i = users[pair_user[part]], items[pair_item[part]]                           # (C, K)
        bar = dot(u, i)[:, None] + rounding[pair_user[part]]                            # (C, 1)
        scores, = together(torch.mm(u, head))                                           # (C, I/8)
        out[part] = scores.gt_(bar).sum(1).cpu().numpy() >= need[part]
    return out


@torch.no_grad()
def target_ranks(users, items, target, seen=None, k=None):
    """How many items rank above each target: (U, K), (I, K), csr (U, I) with P pairs -> (P,).

    All items compete but those in the user's row of `seen` (csr (U, I) or None). An equal score
    counts as above, and so does one that is not a number: neither ever helps the model. A
    target's own score is read from the matrix that it is compared with, so ties are exact. With
    k, ranks of k or more may come out as I: most targets are then done after a part of the items.
    """
    pair_user, pair_item = target.nonzero()
    ranks, left = np.full(len(pair_user), len(items)), np.arange(len(pair_user))
    if k is not None:
        need = np.full(len(left), k)
        if seen is not None:
            need += np.diff(seen.indptr)[pair_user]        # those of the head may all be seen
        left = left[~outranked(users, items, pair_user, pair_item, need)]
    step = max(1, 2 ** 20 // len(items))                   # [ours: 4 MiB of scores, in the cache]
    buffer = items.new_empty(min(step, len(left)), len(items))
    for part in np.split(left, range(step, len(left), step)):
        u, i = pair_user[part], pair_item[part]
        scores, = together(torch.mm(users[u], items.T, out=buffer[:len(u)]))            # (C, I)
        own = scores[np.arange(len(u)), i][:, None]                                     # (C, 1)
        above = len(items) - 1                             # less those below, less those seen
        if seen is not None:
            taken = seen[u]                                                             # (C, I)
            row = np.repeat(np.arange(len(u)), np.diff(taken.indptr))
            where = [torch.from_numpy(x).to(items.device) for x in (row, taken.indices)]
            higher = (~(scores[where[0], where[1]] < own[where[0], 0])).cpu().numpy()
            above = above - np.bincount(row[higher & (taken.indices != i[row])], minlength=len(u))
        below = scores.lt_(own).sum(1)                     # in place, 0. or 1.: exact to 2^24 items
        ranks[part] = above - below.cpu().numpy().astype(np.int64)
    return ranks


def evaluate(users, items, target, seen=None, k=10):
    """Full ranking -> Recall@k and NDCG@k, each (n,) float64 over the users that have a target.

    users (U, K), items (I, K): tensors; target and seen: csr (U, I). Items in `seen` are not
    ranked. With one target a user (leave-one-out) Recall@k is the hit rate, and NDCG@k is
    1 / log2(2 + rank) with ranks from 0, or 0 from rank k on.
    """
    user, ranks = target.nonzero()[0], target_ranks(users, items, target, seen, k)      # (P,)
    n = np.bincount(user, minlength=target.shape[0])                                    # (U,)
    hits = np.bincount(user[ranks < k], minlength=len(n))
    gains = np.where(ranks < k, 1 / np.log2(2 + ranks), 0)
    ideal = np.append(0, np.cumsum(1 / np.log2(2 + np.arange(k))))                      # (k+1,)
    has = n > 0
    ndcg = np.bincount(user, gains, minlength=len(n))[has] / ideal[np.minimum(n[has], k)]
    return hits[has] / n[has], ndcg


@torch.no_grad()
def recommend(users, items, seen, n=10):
    """The n best items of each user: (U, K), (I, K) tensors, csr (U, I) -> (U, n) int64, (U, n).

    Items in `seen` are not recommended. Where fewer than n are left a row ends in item -1. Equal
    scores come in no particular order.
    """
    n, step = min(n, len(items)), max(1, 2 ** 22 // len(items))
    picked, scores = np.empty((len(users), n), np.int64), np.empty((len(users), n), np.float32)
    for start in range(0, len(users), step):
        rows = slice(start, start + step)
        known = seen[rows]
        score, = together(users[rows] @ items.T)                                        # (C, I)
        score[np.repeat(np.arange(len(score)), np.diff(known.indptr)), known.indices] = -torch.inf
        best, item = (part.cpu().numpy() for part in score.topk(n))
        scores[rows], picked[rows] = best, np.where(best == -np.inf, -1, item)
    return picked, scores


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


def join(name='auto'):
    """Join the W processes that torchrun started, one device each -> rank, device; alone rank 0.

    gloo on CPUs, nccl on CUDA. Collectives wait a minute for the slowest, so that none waits for
    the dead; gloo raises then, nccl ends the process. ValueError where there are fewer devices than
    processes here.
    """
    device = pick_device(name)
    W, local = int(os.environ.get('WORLD_SIZE', 1)), int(os.environ.get('LOCAL_RANK', 0))
    if W > 1 and not dist.is_initialized():
        if device == 'mps' or device == 'cuda' and local >= torch.cuda.device_count():
            raise ValueError(f'process {local} of this machine has no {device} device of its own')
        if device == 'cuda':
            torch.cuda.set_device(local)
        dist.init_process_group('nccl' if device == 'cuda' else 'gloo',
                                timeout=datetime.timedelta(seconds=60))
    return ranks()[0], device


def leave():
    """The last call of a program: one of several processes ends here, at once. In an orderly end
    gloo's threads aborted a process now and then, on busy cores, and torchrun took that for a
    failure."""
    if ranks()[1] > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def captured(step, part):
    """step(part) recorded as one CUDA graph: every later call is a copy and a single launch.

    The step's tensors must keep their shapes and addresses; a recording does not run the step.
    """
    static, graph = part.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(static)

    def replay(part):
        static.copy_(part)
        graph.replay()
        return loss
    return replay


def train_epoch(model, step, observed, batch, rng):
    """All training pairs once, in random order, each with one negative -> the batches' mean loss.

    step: (3, B) int64 of users, positives, negatives -> the loss, after one update. On CUDA the
    first three steps run as they are, on a stream of their own as recording wants it; then the
    step is recorded and replayed, but for the last batch, which has another shape.
    """
    model.new_epoch(rng)
    users, positives = (a.astype(np.int64) for a in observed.nonzero())
    can = np.diff(observed.indptr)[users] < observed.shape[1]          # is there any negative?
    if not can.any():
        raise ValueError('no user lacks any item: there is nothing to rank')
    order = rng.permutation(np.flatnonzero(can))
    users, positives = users[order], positives[order]
    triples = np.stack([users, positives, sample_negatives(observed, users, rng)])      # (3, E)
    device, run, total = model.table.device, step, 0.
    alone = ranks()[1] == 1                                # messages are not recorded
    stream = torch.cuda.Stream() if device.type == 'cuda' and alone else None
    for n, part in enumerate(torch.from_numpy(triples).to(device).split(batch, dim=1)):  # (3, B)
        whole = part.shape[1] == batch
        if stream and n == 3 and whole:
            torch.cuda.current_stream().wait_stream(stream)
            run = captured(step, part)
        if stream and n < 3:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                loss = step(part)
            torch.cuda.current_stream().wait_stream(stream)
        else:
            loss = run(part) if whole else step(part)
        total += loss.detach() * part.shape[1]
    return float(total) / len(order)


def optimiser(model, lr, anchor):
    """-> step((3, B)) -> loss: gradient, Adam, and, for anchor > 0, the pull towards the start.

    The pull is E <- E + lr * anchor * (E0 - E) after each step, a prior centred on the text [ours].
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.Adam(weights, lr=lr, fused=True, capturable=weights[0].is_cuda)
    starts = [p.detach().clone() for p in weights] if anchor else []

    def step(part):
        adam.zero_grad()
        loss = model.loss(part[0], part[1], part[2])
        loss.backward()
        adam.step()
        for weight, start in zip(weights, starts):
            weight.data.lerp_(start, lr * anchor)
        return loss.detach()
    return step


@torch.no_grad()
def spectrum(table):
    """How many of its dimensions a table (n, K) uses, by its singular values s -> dict of floats.

    'abundance'        information abundance, sum(s) / max(s) (arXiv 2310.04400)
    'effective rank'   exp of the entropy of s / sum(s) (Roy and Vetterli 2007)
    """
    gram = 0.
    for rows in table.split(2 ** 16):                      # never the whole table in one process
        rows = gathered(rows).cpu().double()                                            # (n, K)
        gram = gram + rows.T @ rows                                                     # (K, K)
    s = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()                                 # (K,)
    entropy = torch.special.entr(s / s.sum()).sum()
    return {'abundance': float(s.sum() / s.max()), 'effective rank': float(entropy.exp())}


def keep_pages():
    """Have glibc keep what is freed, up to 1 GiB, for this process; elsewhere nothing happens.

    It would give a large tensor's memory back to the system, to be mapped and zeroed anew in the
    next step: 5 to 20 % of a step of SGL [ours: measured].
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2 ** 30)                               # M_TRIM_THRESHOLD
        mallopt(-3, 2 ** 25)                               # M_MMAP_THRESHOLD


def say(line):
    """Print at once, also into a pipe."""
    print(line, flush=True)


def train(name, observed, valid, users0, items0, rng, *, seen='mask', epochs=300, batch=256,
          lr=1e-3, patience=10, anchor=0., device='cpu', log=say, **settings):
    """Train a model -> users (U, K), items (I, K) of its best epoch by validation NDCG@10, curve.

    name: key of MODELS; observed, valid: csr (U, I); users0 (U, K), items0 (I, K): the start; rng:
    numpy Generator; settings: of the model. seen='mask' ranks no training items in validation,
    'keep' leaves them in [authors' code]. epochs 300, batch 256, Adam lr 1e-3, patience 10
    [authors' code]; anchor: see optimiser(). curve: a dict for each epoch, 'best' where it is the
    best so far, 'spectrum' of the tables where it is the best of all. Without validation pairs the
    last epoch is. ValueError if training diverges. Under torchrun users0, items0, users and items
    are this process's start_columns() and columns().
    """
    keep_pages()
    observed = observed.sorted_indices()                   # sample_negatives needs it
    if name == 'morec':
        settings['rng'] = rng
    model = MODELS[name](adjacency(observed), users0, items0, device=device, **settings)
    step, hidden = optimiser(model, lr, anchor), observed if seen == 'mask' else None
    best, best_epoch, curve = -1., 0, []
    for epoch in range(1, epochs + 1):
        start = time.perf_counter()
        loss = train_epoch(model, step, observed, batch, rng)
        if not np.isfinite(loss):
            raise ValueError(f'training diverged in epoch {epoch}: the loss is {loss}')
        users, items = model.embeddings()
        recall, ndcg = (np.mean(x) if valid.nnz else np.nan
                        for x in evaluate(users, items, valid, hidden))
        better = not ndcg <= best
        if better:
            best, best_epoch, kept = ndcg, epoch, (users, items)
            tables = [table.detach().clone() for table in model.trained()]
        seconds = time.perf_counter() - start
        curve.append(dict(epoch=epoch, loss=loss, recall=recall, ndcg=ndcg, seconds=seconds,
                          best=better))
        log(f'epoch {epoch:3d}  loss {loss:8.4f}  valid Recall@10 {recall:.4f}  NDCG@10 {ndcg:.4f}'
            f'  best {best:.4f} at {best_epoch:3d}  {seconds:6.2f} s')
        if epoch - best_epoch >= patience:
            break
    curve[best_epoch - 1]['spectrum'] = dict(zip(('users', 'items'), map(spectrum, tables)))
    return *kept, curve
