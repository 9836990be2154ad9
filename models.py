"""Collaborative filtering on the user-item graph: models, evaluation, training.

The backbones of the LLMInit paper (arXiv 2503.01814). LightGCN (arXiv 2002.02126) averages one
table E of embeddings over the layers of its propagation on the graph of interactions:

    z = 1/(L+1) * sum_{l=0..L} A_hat^l E,    A_hat = D^-1/2 A D^-1/2,    score(u, i) = z_u . z_i

    LightGCN  BPR loss
    BPR       matrix factorisation, z = E (arXiv 1205.2618)
    SGL       BPR + InfoNCE of two views of the graph (arXiv 2010.10783)
    SGCL      supervised contrastive loss, no negatives (section 2 [authors' code])
    MoRec     z = W v of frozen text vectors v (arXiv 2303.13835, as in the paper's Table 3)

users0 and items0, where E starts, are plain arrays. The path of a run:

    adjacency -> Model(graph, users0, items0) -> new_epoch(rng) -> loss(users, positives, negatives)
    train -> model.embeddings() -> evaluate, recommend

Propagation is linear and A_hat is symmetric, so the backward pass is the same product. A batch
needs z at its own rows only, so on a CPU the products are restricted to its receptive field: the
exact result for a fraction of the work.

Under torchrun each of W processes holds K/W columns of E and of Adam's state, and the whole graph.
Propagation acts on each column by itself and sends nothing; sums over K go through together(), and
z is gathered once an epoch for evaluation.

Not here: texts (embed.py), choosing dimensions (llminit.py), reading and splitting (data.py).
Shapes: U users, I items, K dimensions, N text dimensions, B batch, L layers, R rows asked for,
P pairs of user and item, C of them at a time; a csr matrix holds each pair once, no zeros. Needs
numpy, scipy, torch. MIT licence, from LLMInit's reference implementation.
"""
import atexit
import contextlib
import datetime
import functools
import hashlib
import io
import os
import sys
import time
import warnings

import numpy as np
import scipy.sparse as sp
import torch
import torch.distributed as dist
import torch.nn.functional as F


def ranks():
    """(rank, W) under torchrun: the number of this process and how many there are. Alone (0, 1)."""
    there = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if there else (0, 1)


def join(device='auto'):
    """Join the processes that torchrun started -> rank, device. Alone the rank is 0.

    device: 'cpu', 'cuda' (a GPU for each process), or 'auto' for CUDA if there is any. A collective
    waits a minute for the slowest process. ValueError if there is no such device.
    """
    n_gpus, local = torch.cuda.device_count(), int(os.environ.get('LOCAL_RANK') or 0)
    device = ('cuda' if n_gpus else 'cpu') if device == 'auto' else device
    if device == 'cuda' and local >= n_gpus:
        raise ValueError(f'device cuda: {n_gpus} GPUs here, and this is process {local}')
    if int(os.environ.get('WORLD_SIZE') or 1) > 1 and not dist.is_initialized():
        if device == 'cuda':
            torch.cuda.set_device(local)
        dist.init_process_group('nccl' if device == 'cuda' else 'gloo',
                                timeout=datetime.timedelta(minutes=1))
        # otherwise gloo's threads abort most processes at their end [measured: in 12 of 15 runs]
        atexit.register(dist.destroy_process_group)
    return ranks()[0], device


def send(collective, *args):
    """Run a collective; OSError if another process has ended or does not come in time."""
    try:
        collective(*args)
    except RuntimeError as error:
        raise OSError(f'another process has ended or is too late: {error}') from None


@contextlib.contextmanager
def in_turn():
    """Run the block first in one process of each machine, then silently in the others, which find
    on the disk what the first one downloaded or encoded. They wait up to an hour."""
    group = ranks()[1] > 1 and dist.new_group(backend='gloo', timeout=datetime.timedelta(hours=1))
    first = not (group and int(os.environ.get('LOCAL_RANK') or 0))
    if not first:
        send(dist.barrier, group)
    with contextlib.redirect_stderr(sys.stderr if first else io.StringIO()):
        yield
    if group and first:
        send(dist.barrier, group)


def check_alike(settings, arrays, device):
    """ValueError if another process has other settings or other arrays, by one number of each."""
    if ranks()[1] == 1:
        return
    digest = hashlib.sha256(repr(settings).encode())
    for array in arrays:
        digest.update(np.ascontiguousarray(array))
    number = int(digest.hexdigest()[:12], 16)              # exact in float64
    ends = torch.tensor([number, -number], dtype=torch.float64, device=device)
    send(dist.all_reduce, ends, dist.ReduceOp.MAX)
    if ends[0] != -ends[1]:
        raise ValueError('the processes have different settings, data or seeds: start all alike')


def columns(K, rank=None):
    """The slice of K dimensions that this process, or another rank, holds."""
    mine, W = ranks()
    if W > K:
        raise ValueError(f'{K} dimensions cannot be split over {W} processes: start at most {K}')
    rank = mine if rank is None else rank
    return slice(K * rank // W, K * (rank + 1) // W)


def together(*parts):
    """Sums over the columns of this process -> sums over all K: tensors of any shapes, in one
    message. Alone the tensors themselves.

    Each process computes the same loss from the sums, so the gradient of its own part is that of
    the sum: nothing is sent backward, and autograd is not told of the sum over processes.
    """
    if ranks()[1] == 1:
        return parts
    flat = torch.cat([part.flatten() for part in parts])
    send(dist.all_reduce, flat.detach())
    return [whole.view(part.shape) for whole, part
            in zip(flat.split([part.numel() for part in parts]), parts)]


def gathered(x, K):
    """All K columns of a table of which each process holds its own: (n, K/W) -> (n, K)."""
    if ranks()[1] == 1:
        return x
    whole = x.new_empty(K, len(x))             # transposed: what each rank sends is contiguous
    whole[columns(K)] = x.T
    for rank in range(ranks()[1]):
        send(dist.broadcast, whole[columns(K, rank)], rank)
    return whole.T.contiguous()


def adjacency(observed):
    """A_hat = D^-1/2 A D^-1/2, users first: csr (U, I) -> csr (U+I, U+I) float32.

    LightGCN eq. (8). A node without interactions has an empty row. ValueError for stored zeros.
    """
    if not observed.data.all():
        raise ValueError('observed stores zeros: call observed.eliminate_zeros()')
    of_user, items = np.diff(observed.indptr), observed.indices               # (U,), (pairs,)
    data = np.repeat(of_user, of_user) ** -.5 * np.bincount(items)[items] ** -.5
    upper = sp.csr_matrix((data, observed.indices, observed.indptr), observed.shape, np.float32)
    return sp.bmat([[None, upper], [upper.T, None]], 'csr')


def receptive_field(graphs, nodes):
    """The rows of each layer that z at `nodes` (R,) depends on; repeated nodes are allowed.

    graphs: A_hat of each layer, csr (U+I, U+I). Returns [(at, block)], first layer first: block,
    csr (M_l, M_{l-1}), has the rows of A_hat that layer l needs, its columns are the rows of layer
    l-1 (M_0 = U+I, the whole table), and at (R,) is the index of each node among the M_l.
    """
    field, needed = [], nodes
    for graph in reversed(graphs):
        there = np.zeros(graph.shape[0], bool)
        there[needed] = True
        rows, index = np.flatnonzero(there), np.empty(len(there), np.int32)    # node -> its row
        index[rows] = np.arange(len(rows), dtype=np.int32)
        if field:                                          # the layer above reads these rows
            above = field[-1][1]
            above.indices = index[above.indices]
            above.resize(above.shape[0], len(rows))
        block = graph[rows]                                                             # (M_l, U+I)
        field.append((torch.from_numpy(index[nodes]), block))
        needed = np.concatenate([rows, block.indices])
    return field[::-1]


def spmm(block, x):
    """Products of rows: x (R, K) -> (M, K). block: csr or sparse tensor (M, R), for block @ x, or
    csc (R, M), for block.T @ x.

    On a CPU embedding_bag computes the weighted sums of rows in half the time of torch's and
    scipy's CSR products or less [ours: measured, 2 cores].
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
        x = table.detach()             # for a leaf embedding_bag would prepare a backward pass
        total = x if graphs else x.clone()
        for layer, graph in enumerate(graphs):
            x = spmm(graph, x)
            total = total.add_(x) if layer else total + x      # the table itself stays as it is
        return total.div_(len(graphs) + 1)

    @staticmethod
    def backward(ctx, grad):
        share = grad / (len(ctx.graphs) + 1)
        grad = share
        for graph in reversed(ctx.graphs):
            grad = spmm(graph, grad).add_(share)
        return grad, None


class PropagateAt(torch.autograd.Function):
    """z as above, and E itself, at rows (R,) only: table (U+I, K) -> two (R, K).

    field: receptive_field(...) of the rows; the backward pass needs nothing else.
    """

    @staticmethod
    def forward(ctx, table, rows, field):
        ctx.rows, ctx.field, ctx.size = rows, field, len(table)
        x = table.detach()
        start = x.index_select(0, rows)                                                 # (R, K)
        total = start.clone()
        for at, block in field:
            x = spmm(block, x)                                                          # (M_l, K)
            total += x.index_select(0, at)             # twice as fast as x[at] [ours: measured]
        return total.div_(len(field) + 1), start

    @staticmethod
    def backward(ctx, grad_z, grad_start):                                    # (R, K), (R, K)
        share = grad_z / (len(ctx.field) + 1)
        height = ctx.field[-1][1].shape[0] if ctx.field else ctx.size
        grad = share.new_zeros(height, share.shape[1])                                  # (M_L, K)
        for at, block in reversed(ctx.field):
            grad = spmm(block.tocsc(), grad.index_add_(0, at, share))                # (M_{l-1}, K)
        return grad.index_add_(0, ctx.rows, share + grad_start), None, None


def on_device(graph, device):
    """A csr graph in the form that the device multiplies: itself on a CPU, else a CSR tensor."""
    if torch.device(device).type == 'cpu':
        return graph
    with warnings.catch_warnings(action='ignore'):         # torch calls its CSR layout a beta
        parts = map(torch.from_numpy, (graph.indptr, graph.indices, graph.data))
        return torch.sparse_csr_tensor(*parts, graph.shape).to(device)


class InfoNCE(torch.autograd.Function):
    """sum_b -w_b log( exp(q_b.k_own(b)/tau) / sum_m exp(q_b.k_m/tau) ), SGL eq. (10) -> scalar.

    q (B, K) and k (M, K) are the rows of queries and keys, divided by their lengths; own (B,)
    int64 is each query's positive, weight w (B,). All keys compete, the positive among them. The
    gradient is computed in the forward pass, some queries at a time: at most 2^21 numbers of the
    (B, M) matrix exist at once, and they stay in the cache.
    """

    @staticmethod
    def forward(ctx, queries, keys, own, weight, tau):
        squares = together(*((x * x).sum(1, keepdim=True) for x in (queries, keys)))
        # of at least 1e-4, which bounds the gradient of a zero row: (B, 1), (M, 1)
        lengths = [square.clamp_min(1e-8).sqrt() for square in squares]
        q, k, weight = queries / lengths[0], keys / lengths[1], weight[:, None]
        grad_q, grad_k, loss = torch.empty_like(q), torch.zeros_like(k), 0.
        step = max(1, 2 ** 21 // len(k))
        buffer = q.new_empty(min(step, len(q)), len(k))
        for start in range(0, len(q), step):
            part = slice(start, start + step)
            some, w = q[part], weight[part]                                             # (C, K)
            logits, = together(torch.mm(some / tau, k.T, out=buffer[:len(some)]))       # (C, M)
            positive = logits.gather(1, own[part, None])
            top = 1 / tau if tau > .025 else logits.amax(1, keepdim=True)    # exp(-2 / tau) > 0
            mass = logits.sub_(top).exp_()
            total = mass.sum(1, keepdim=True)                                           # (C, 1)
            loss += (w * (total.log() + top - positive)).sum()
            torch.mm(mass, k, out=grad_q[part]).mul_(w / total)
            grad_k.addmm_(mass.T, some * (w / total))
        grad_q.sub_(weight * k[own])
        grad_k.index_add_(0, own, weight * q, alpha=-1)
        for x, g, size in ((q, grad_q, lengths[0]), (k, grad_k, lengths[1])):
            along, = together((x * g).sum(1, keepdim=True))
            g.addcmul_(x, along, value=-1).div_(size * tau)                            # of x / |x|
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
    by_columns = True                                      # each process holds columns() of E

    def __init__(self, graph, users0, items0, n_layers=2, device='cpu'):   # L = 2 [authors' code]
        super().__init__()
        mine = columns(users0.shape[1]) if self.by_columns else slice(None)
        start = np.concatenate([users0[:, mine], items0[:, mine]]).astype(np.float32)
        self.n_users, self.K = users0.shape
        self.graphs = [on_device(graph, device)] * n_layers
        self.table = torch.nn.Parameter(torch.from_numpy(start).to(device))             # (U+I, K)

    def new_epoch(self, rng):
        """Draw what each epoch draws anew: nothing here."""

    def everywhere(self, graphs):
        """z and E of all nodes -> (U+I, K), (U+I, K)."""
        return Propagate.apply(self.table, graphs), self.table

    def at(self, nodes, graphs):
        """z and E of nodes (R,), users first, repeats allowed -> (R, K), (R, K).

        z of all nodes is computed where that is less work than finding the receptive field: on a
        GPU, and on a CPU for twice as many rows as there are nodes, or more.
        """
        on_cpu = self.table.is_cpu and all(map(sp.issparse, graphs))
        if on_cpu and len(nodes) < 2 * len(self.table):
            return PropagateAt.apply(self.table, nodes, receptive_field(graphs, nodes.numpy()))
        z, start = self.everywhere(graphs)
        return z[nodes], start[nodes]

    @torch.no_grad()
    def embeddings(self):
        """z of all users (U, K) and of all items (I, K); under torchrun all K columns."""
        z = gathered(self.everywhere(self.graphs)[0], self.K)
        return z[:self.n_users], z[self.n_users:]

    def ranking(self, users, positives, negatives):
        """-log sigmoid(z_u.z_i - z_u.z_j) of each pair (B,), and reg/B * (|E_u| + |E_i| + |E_j|).

        The norms are Frobenius norms over the batch's rows of E, not squared [authors' code]. The
        gradient of a norm at zero is taken as zero.
        """
        nodes = torch.cat([users, positives + self.n_users, negatives + self.n_users])
        z, start = self.at(nodes, self.graphs)
        zu, zi, zj = z.chunk(3)                                                         # (B, K)
        positive, negative, *squares = together(
            (zu * zi).sum(1), (zu * zj).sum(1),
            *((part * part).sum(1).sum() for part in start.chunk(3)))
        norms = sum(square.clamp_min(1e-30).sqrt() for square in squares)
        return F.softplus(negative - positive), self.reg / len(users) * norms

    def loss(self, users, positives, negatives):
        """BPR, mean over the batch, and the regulariser -> scalar."""
        pairs, penalty = self.ranking(users, positives, negatives)
        return pairs.mean() + penalty


BPR = functools.partial(LightGCN, n_layers=0)              # matrix factorisation


class SGL(LightGCN):
    """LightGCN and a contrast of two views of the graph, drawn anew every epoch.

    views: 'edge' drops a share of the edges, 'node' of the users and of the items with all their
    edges, 'walk' of the edges for each layer anew. A view is normalised by its own degrees.
    """

    drop, weight = .1, .05                                 # [authors' code]

    def __init__(self, graph, users0, items0, n_layers=2, device='cpu', views='edge', tau=.2):
        super().__init__(graph, users0, items0, n_layers, device)
        if views not in ('edge', 'node', 'walk'):
            raise ValueError(f'views {views!r}: expected edge, node or walk')
        self.observed, self.kind = graph[:len(users0), len(users0):], views
        self.tau = tau                                     # .2 [authors' code]

    def view(self, rng):
        """A_hat (U+I, U+I) of the interactions that are not dropped."""
        rows, items = self.observed.nonzero()
        if self.kind == 'node':
            kept = np.ones(len(rows), bool)
            for nodes, count in zip((rows, items), self.observed.shape):
                kept &= ~np.isin(nodes, rng.permutation(count)[:int(count * self.drop)])
        else:
            kept = rng.permutation(len(rows)) < int(len(rows) * (1 - self.drop))
        left = sp.csr_matrix((kept[kept], (rows[kept], items[kept])), self.observed.shape)
        return on_device(adjacency(left), self.table.device)

    def new_epoch(self, rng):
        self.views = [[self.view(rng) for _ in self.graphs] if self.kind == 'walk' else
                      [self.view(rng)] * len(self.graphs) for _ in range(2)]

    def loss(self, users, positives, negatives):
        """BPR and InfoNCE, both summed over the batch -> scalar.

        The positive of a node is itself in the other view; ALL users (items) of that view compete.
        Nodes that are in the batch several times are computed once, with a weight.
        """
        pairs, penalty = self.ranking(users, positives, negatives)
        (users, times), (items, often) = (x.unique(return_counts=True) for x in (users, positives))
        first, _ = self.at(torch.cat([users, items + self.n_users]), self.views[0])
        second, _ = self.everywhere(self.views[1])                                      # (U+I, K)
        (u, i), (all_u, all_i) = first.split([len(users), len(items)]), second.split(
            [self.n_users, len(second) - self.n_users])        # slices would have two gradients
        contrast = (InfoNCE.apply(u, all_u, users, times, self.tau)
                    + InfoNCE.apply(i, all_i, items, often, self.tau))
        return pairs.sum() + penalty + self.weight * contrast


class SGCL(LightGCN):
    """LightGCN propagation under one supervised contrastive loss; no negatives, no regulariser."""

    def __init__(self, graph, users0, items0, n_layers=2, device='cpu', tau=.2):
        super().__init__(graph, users0, items0, n_layers, device)
        self.tau = tau                                     # .2 [authors' code]

    def loss(self, users, positives, negatives=None):
        """- sum_b log( exp(u_b.i_b/tau) / (sum_b' exp(u_b.u_b'/tau) + sum_b' exp(i_b.i_b'/tau)) ).

        Cosines, summed over the batch; the terms of b with itself are included [authors' code].
        """
        z, _ = self.at(torch.cat([users, positives + self.n_users]), self.graphs)
        u, i = z.chunk(2)                                                               # (B, K)
        uu, ii, ui = together(u @ u.T, i @ i.T, (u * i).sum(1))
        u, i = (products.diagonal().clamp_min(1e-8).sqrt() for products in (uu, ii))    # lengths
        cosines = torch.cat([uu / u / u[:, None], ii / i / i[:, None]], 1)              # (B, 2B)
        return ((cosines / self.tau).logsumexp(1) - ui / u / i / self.tau).sum()


class MoRec(LightGCN):
    """Frozen text vectors behind one trainable projection: users0 (U, N), items0 (I, N) -> K.

    If users0 are means of item vectors, their projections are the means of the projected items.
    Trained with BPR. The projection starts Xavier-uniform [authors' code for tables], from rng.
    """

    by_columns = False                 # but of the projection each process holds its columns

    def __init__(self, graph, users0, items0, device='cpu', dim=128, rng=None):
        super().__init__(graph, users0, items0, 0, device)
        self.table.requires_grad_(False)                                                # (U+I, N)
        N, self.K = users0.shape[1], dim
        draw = (rng or np.random.default_rng(0)).uniform(-1, 1, (N, dim)) * (6 / (N + dim)) ** .5
        draw = np.ascontiguousarray(draw[:, columns(dim)], np.float32)                  # (N, K/W)
        self.projection = torch.nn.Parameter(torch.from_numpy(draw).to(device))

    def everywhere(self, graphs):
        return self.at(slice(None), graphs)                                             # (U+I, K)

    def at(self, nodes, graphs):
        z = self.table[nodes] @ self.projection                                         # (R, K)
        return z, z


MODELS = {'lightgcn': LightGCN, 'sgl': SGL, 'sgcl': SGCL, 'morec': MoRec, 'bpr': BPR}


@torch.no_grad()
def outranked(users, items, pair_user, pair_item, need):
    """Which targets certainly have `need` (P,) items or more above them -> bool (P,).

    Counts only the eighth of the items with the longest vectors, which fill most first places, and
    only scores that are higher by more than two dot products can differ by rounding.
    """
    sizes, K = torch.linalg.vector_norm(items, dim=1), items.shape[1]                   # (I,)
    head = items[sizes.topk(len(items) // 8).indices].T                                 # (K, I/8)
    rounding = torch.linalg.vector_norm(users, dim=1) * sizes.max() * K                 # (U,)
    rounding *= torch.finfo(users.dtype).eps
    out, step = np.empty(len(need), bool), max(1, 2 ** 20 // max(head.shape[1], K))
    for start in range(0, len(need), step):
        part = slice(start, start + step)
        u, i = users[pair_user[part]], items[pair_item[part]]                           # (C, K)
        bar = (u * i).sum(1) + rounding[pair_user[part]]                                # (C,)
        higher = torch.mm(u, head).gt_(bar[:, None]).sum(1, dtype=torch.float32)        # (C,)
        out[part] = higher.cpu().numpy() >= need[part]
    return out


def ranks_in(scores, target, seen=None):
    """Ranks, from 0, of one target a row: scores (C, I), overwritten, target (C,) -> (C,) int64.
    seen: csr (C, I) or None; it and equal scores count as in target_ranks()."""
    row = np.arange(len(target))
    own = scores[row, target]                                                           # (C,)
    if seen is not None:
        scores[np.repeat(row, np.diff(seen.indptr)), seen.indices] = -torch.inf
        scores[row, target] = own
    below = scores.lt_(own[:, None]).sum(1, dtype=torch.float32)     # in place; exact to 2^24 items
    return scores.shape[1] - 1 - below.cpu().numpy().astype(np.int64)


@torch.no_grad()
def target_ranks(users, items, target, seen=None, k=None):
    """How many items rank above each target: (U, K), (I, K), csr (U, I) with P pairs -> (P,).

    All items compete except those in the user's row of `seen` (csr (U, I) or None), the target
    itself always. An equal score, or one that is not a number, counts as above: neither ever helps
    the model. A target's score is read from the matrix that it is compared with, so ties are exact.
    With k, a rank of k or more may be returned as I: a part of the items decides most targets.
    """
    pair_user, pair_item = target.nonzero()
    ranks, left = np.full(len(pair_user), len(items)), np.arange(len(pair_user))
    if k is not None:
        need = np.full(len(left), k)
        if seen is not None:
            need += np.diff(seen.indptr)[pair_user]        # those above may all be seen items
        left = left[~outranked(users, items, pair_user, pair_item, need)]
    step = max(1, 2 ** 20 // len(items))                   # [ours: 4 MiB of scores, in the cache]
    buffer = items.new_empty(min(step, len(left)), len(items))
    for part in np.split(left, range(step, len(left), step)):
        u = pair_user[part]
        scores = torch.mm(users[u], items.T, out=buffer[:len(u)])                       # (C, I)
        ranks[part] = ranks_in(scores, pair_item[part], None if seen is None else seen[u])
    return ranks


def evaluate(users, items, target, seen=None, k=10):
    """Full ranking -> Recall@k and NDCG@k, each (n,) float64 over the users that have a target.

    users (U, K), items (I, K): tensors; target and seen: csr (U, I). Items in `seen` are not
    ranked. With one target a user (leave-one-out) Recall@k is the hit rate, and NDCG@k is
    1 / log2(2 + rank), ranks from 0, or 0 from rank k on.
    """
    user, ranks = target.nonzero()[0], target_ranks(users, items, target, seen, k)      # (P,)
    _, user, n = np.unique(user, return_inverse=True, return_counts=True)         # (P,), (n,)
    gains = np.bincount(user, np.where(ranks < k, 1 / np.log2(2 + ranks), 0))           # (n,)
    ideal = np.cumsum(1 / np.log2(2 + np.arange(k)))                                    # (k,)
    return np.bincount(user, ranks < k) / n, gains / ideal[np.minimum(n, k) - 1]


@torch.no_grad()
def recommend(users, items, seen, n=10):
    """The n best items of each user, all if there are fewer: (U, K), (I, K) tensors, csr (U, I) ->
    (U, n) int64, (U, n) float32.

    Items in `seen` are not recommended. A row with fewer than n items left ends in item -1. Equal
    scores are in no particular order.
    """
    n, step = min(n, len(items)), max(1, 2 ** 22 // len(items))
    picked, scores = np.empty((len(users), n), np.int64), np.empty((len(users), n), np.float32)
    for start in range(0, len(users), step):
        rows = slice(start, start + step)
        known, score = seen[rows], (users[rows] @ items.T).float()                      # (C, I)
        score[np.repeat(np.arange(len(score)), np.diff(known.indptr)), known.indices] = -torch.inf
        best, item = (part.cpu().numpy() for part in score.topk(n))
        scores[rows], picked[rows] = best, np.where(best == -np.inf, -1, item)
    return picked, scores


def sample_negatives(observed, users, rng):
    """One uniform item for each of users (B,) that the user does not have in observed (csr (U, I)).

    No rejection: draws r and takes the r-th item that the user does NOT have. With the user's items
    sorted, p_0 < p_1 < ..., p_k - k others are below p_k, so the answer is r + |{k: p_k - k <= r}|:
    one binary search over all rows at once. Not for users who have every item, nor for a csr whose
    indices are not sorted.
    """
    n_items, degree = observed.shape[1], np.diff(observed.indptr)
    row = np.repeat(np.arange(len(degree)), degree)
    others = observed.indices - (np.arange(observed.nnz) - observed.indptr[row])        # p_k - k
    r = rng.integers(0, n_items - degree[users])                                        # (B,)
    width = np.int64(n_items + 1)                          # the keys ascend over the whole matrix
    below = np.searchsorted(row * width + others, users * width + r, side='right')
    return r + below - observed.indptr[users]


def train_epoch(model, step, observed, batch, rng):
    """All training pairs once, in random order, each with one negative -> the batches' mean loss.

    step: (3, B) int64 of users, positives, negatives -> the loss, after one update.
    """
    model.new_epoch(rng)
    pairs = np.array(observed.nonzero(), np.int64)                                      # (2, P)
    can = np.diff(observed.indptr)[pairs[0]] < observed.shape[1]       # is there any negative?
    if not can.any():
        raise ValueError('no user has an item and lacks another: there is nothing to rank')
    users, positives = pairs[:, rng.permutation(np.flatnonzero(can))]                   # (P,)
    triples = np.stack([users, positives, sample_negatives(observed, users, rng)])      # (3, P)
    triples, total = torch.from_numpy(triples).to(model.table.device), 0.
    for part in triples.split(batch, dim=1):                                            # (3, B)
        total += step(part) * part.shape[1]
    return float(total) / len(users)


def optimiser(model, lr):
    """Adam -> step((3, B)) -> loss."""
    # a block of 31 MB, freed at once: glibc then keeps up to 62 MB of what is freed, and a step of
    # SGL has no page faults instead of 4,000 [measured: 52 ms against 61, beauty, 2 cores]
    torch.empty(31 << 18)
    adam = torch.optim.Adam(model.parameters(), lr=lr, fused=True)

    def step(part):
        adam.zero_grad()
        loss = model.loss(*part)
        loss.backward()
        adam.step()
        return loss.detach()
    return step


def on_busy_cores(step, batch):
    """step((3, B)) -> loss, with one thread where that is faster than with all of torch's.

    Beside another busy program threads wait for each other at the end of every operation: a step
    takes 2 to 30 times as long [measured]. The first three steps, on one thread, are the time to
    beat. If a step on all takes 4 times that, or the median of five 1.2 times, the next hundred
    steps, and what the caller does between them, use one. If K is a multiple of 64, figures do not
    depend on the threads [measured: MKL, 1 to 16] except in the short last batch, which therefore
    always uses one; for other K train() uses all threads.
    """
    threads, alone, ratios, left = torch.get_num_threads(), [], [], 3

    def timed(part):
        nonlocal left
        one = left > 0 or part.shape[1] < batch
        torch.set_num_threads(1 if one else threads)
        start = time.perf_counter()
        loss = step(part)
        seconds = time.perf_counter() - start
        left = max(0, left - 1)
        if len(alone) < 3:
            alone.append(seconds)
        elif not one:
            ratios.append(seconds / sorted(alone)[1])
            far = ratios[-1] > 4
            if far or len(ratios) == 5:
                left = 100 if far or np.median(ratios) > 1.2 else 0
                ratios.clear()
        torch.set_num_threads(1 if left else threads)
        return loss
    return timed


def early_stopping(model, epoch, valid, seen, epochs, patience, log):
    """Call epoch() -> loss and rank valid by model.embeddings(), until `patience` epochs in a row
    gave no better NDCG@10. Leaves the model as it was at its best epoch -> curve, see train()."""
    best, best_epoch, kept, curve = -1., 0, model.state_dict(), []
    for number in range(1, epochs + 1):
        start, loss = time.perf_counter(), epoch()
        if not np.isfinite(loss):
            raise ValueError(f'training diverged in epoch {number}, the loss is {loss}: choose a '
                             'lower learning rate')
        recall, ndcg = (np.mean(x) if valid.nnz else np.nan
                        for x in evaluate(*model.embeddings(), valid, seen))
        if not ndcg <= best:
            best, best_epoch = ndcg, number
            kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        seconds = time.perf_counter() - start
        curve.append(dict(epoch=number, loss=loss, recall=recall, ndcg=ndcg, seconds=seconds,
                          best=best_epoch == number))
        log(f'epoch {number:3d}  loss {loss:8.4f}  valid Recall@10 {recall:.4f}  '
            f'NDCG@10 {ndcg:.4f}  best {best:.4f} at {best_epoch:3d}  {seconds:6.2f} s')
        if number - best_epoch >= patience:
            break
    model.load_state_dict(kept)
    return curve


def train(name, observed, valid, users0, items0, rng, *, mask_seen=True, epochs=300, batch=256,
          lr=1e-3, patience=10, device='cpu', log=functools.partial(print, flush=True),
          **settings):
    """Train a model -> the model at its best epoch by validation NDCG@10, curve.

    name: a key of MODELS; observed, valid: csr (U, I); users0 (U, K), items0 (I, K): the start;
    rng: numpy Generator; lr: of Adam; patience: epochs without a better validation before it stops;
    settings: arguments of the model; the defaults are the [authors' code]'s, but for mask_seen,
    which ranks no training items in validation. log: called with a line for each epoch. curve: a
    dict for each epoch with epoch, loss, recall, ndcg, seconds, and best: was it the best so far?
    Only users with validation items are ranked, so valid may hold a sample of them; without any the
    last epoch is the best. ValueError if training diverges.
    """
    if name not in MODELS:
        raise ValueError(f'model {name!r}: expected one of {", ".join(MODELS)}')
    if (len(users0), len(items0)) != observed.shape:
        raise ValueError(f'{len(users0)} users and {len(items0)} items, but observed has '
                         f'{observed.shape[0]} and {observed.shape[1]}')
    check_alike((name, mask_seen, epochs, batch, lr, patience, settings, rng.bit_generator.state),
                (observed.indptr, observed.indices, valid.indptr, valid.indices, users0, items0),
                device)
    observed = observed.sorted_indices()                   # sample_negatives needs it
    if name == 'morec':
        settings['rng'] = rng
    model = MODELS[name](adjacency(observed), users0, items0, device=device, **settings)
    step, threads = optimiser(model, lr), torch.get_num_threads()
    if all(p.shape[1] % 64 == 0 for p in model.parameters()):
        step = on_busy_cores(step, batch)
    try:
        curve = early_stopping(model, lambda: train_epoch(model, step, observed, batch, rng), valid,
                               observed if mask_seen else None, epochs, patience, log)
    finally:
        torch.set_num_threads(threads)
    return model, curve
