"""How far it goes: seconds, memory and bytes sent, measured.

    python experiments/scale.py rows --n 10000000
    python experiments/scale.py graph --users 2000000 --items 1000000 --interactions 50000000
    torchrun --nproc-per-node=2 experiments/scale.py graph --users 400000 --items 200000 \
        --interactions 5000000 --dim 256 --batch 500000
    torchrun --nproc-per-node=2 experiments/scale.py step --data DIR
    python experiments/scale.py stages --data DIR --dataset beauty
    python experiments/scale.py limits --data DIR --dataset beauty
    python experiments/scale.py joint --users 200000 --items 100000 --interactions 1000000

rows    writes a CSV of n ratings with a Zipf tail, reads, filters and splits it
graph   builds A_hat of a synthetic graph, then trains one epoch of LightGCN on it, alone or with
        torchrun; --build-only
step    per process of torchrun: peak memory, parameters, and bytes of the messages (all-reduce,
        broadcast) of one training step and one validation of LightGCN, SGL and SGCL on a dataset
stages  runs llminit.py with var, MPNet's weights in the cache and no vectors: seconds and peak
        memory by stage
limits  how near the two largest stages are to what the machine can do: a step of LightGCN beside
        the time that its bytes take at the speed of a copy, and the share of an encoding that is
        matrix products
joint   the start of that strategy, of a synthetic graph and random vectors of 768 numbers: CPU
        seconds and memory

Peak memory is the process's ru_maxrss, everything included. Not a test: it asserts nothing.
"""
import argparse
import gc
import re
import resource
import sys
import tempfile
import time
import timeit
from pathlib import Path

import numpy as np
import scipy.sparse as sp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def peak():
    """GiB that this process has needed at most, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20


def draw(rng, n, n_users, n_items):
    """n pairs: users uniform, items by a Zipf tail of exponent .8, both int32 (n,)."""
    users = rng.integers(0, n_users, n, dtype=np.int32)
    mass = np.cumsum(np.arange(1, n_items + 1) ** -.8)
    items = np.searchsorted(mass, rng.random(n) * mass[-1]).astype(np.int32)
    return users, items


def rows(args):
    """A CSV of args.n ratings -> load and split."""
    import data
    rng, step = np.random.default_rng(0), 10 ** 6
    n_items = max(100, args.n // 100)
    with tempfile.TemporaryDirectory() as folder:
        with open(Path(folder, 'items.csv'), 'w') as file:
            file.write('item_id,title\n' + ''.join(f'i{i},"Item {i}"\n' for i in range(n_items)))
        with open(Path(folder, 'ratings.csv'), 'w') as file:
            file.write('user_id,item_id,rating\n')
            for n in range(0, args.n, step):
                pairs = zip(*draw(rng, min(step, args.n - n), args.n // 20, n_items))
                file.writelines(f'u{u},i{i},{3 + (u + i) % 3}\n' for u, i in pairs)
        start = time.perf_counter()
        pairs = data.load(folder)[0]
        data.split(pairs, rng)
        print(f'{args.n:,} rows -> {pairs.shape[0]:,} users, {pairs.shape[1]:,} items, '
              f'{pairs.nnz:,} interactions: {time.perf_counter() - start:.1f} s, {peak():.2f} GiB')


def synthetic(args, rng):
    """csr (U, I) float32 of about args.interactions distinct pairs."""
    pairs = draw(rng, args.interactions, args.users, args.items)
    ones = np.ones(args.interactions, np.float32)
    observed = sp.csr_matrix((ones, pairs), (args.users, args.items))      # sums repeated pairs
    observed.data[:] = 1
    return observed


def graph(args):
    """A_hat of a synthetic graph, and an epoch of LightGCN."""
    import models
    import torch
    rank, device = models.join()
    say = print if rank == 0 else lambda *args, **kwargs: None
    rng, start = np.random.default_rng(0), time.perf_counter()
    observed = synthetic(args, rng)
    drawn, before = time.perf_counter(), peak()
    a_hat = models.adjacency(observed)
    say(f'{args.users:,} users, {args.items:,} items, {observed.nnz:,} interactions drawn in '
        f'{drawn - start:.1f} s, {before:.2f} GiB; A_hat in {time.perf_counter() - drawn:.1f} s, '
        f'peak {peak():.2f} GiB', flush=True)
    if args.build_only:
        return
    draws = torch.Generator().manual_seed(0)
    start = [torch.empty(n, args.dim).uniform_(-.01, .01, generator=draws).numpy()
             for n in observed.shape]
    del a_hat
    began = time.perf_counter()
    none = sp.csr_matrix(observed.shape)                   # no validation
    _, curve = models.train('lightgcn', observed, none, *start, rng, epochs=1, batch=args.batch,
                            device=device, log=lambda line: None)
    loss = curve[0]['loss']
    say(f'LightGCN, K = {args.dim}, {models.WORLD[1]} processes, batch {args.batch:,}: one epoch '
        f'in {time.perf_counter() - began:.0f} s, loss {loss:.4f}, peak {peak():.2f} GiB')


def optimiser(model):
    """A step of models.train: (3, B) int64 -> loss, after one update by Adam."""
    import torch
    adam = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)

    def step(part):
        adam.zero_grad()
        loss = model.loss(*part)
        loss.backward()
        adam.step()
        return loss.detach()
    return step


def step(args):
    """A row for each model: what this W costs each process, in memory and in bytes."""
    import data
    import llminit
    import models
    import torch
    import torch.distributed as dist
    rank, device = models.join()
    sent, reduce, broadcast = [], dist.all_reduce, dist.broadcast
    dist.all_reduce = lambda x, *more: sent.append(x.numel() * x.element_size()) or reduce(x, *more)
    dist.broadcast = lambda x, r: sent.append(x.numel() * x.element_size()) or broadcast(x, r)
    W = models.WORLD[1]
    rng = np.random.default_rng(0)
    train, valid, _ = data.split(data.load(args.dataset, args.data)[0], rng)
    start = [llminit.xavier(rng, n, args.dim) for n in train.shape]
    if rank == 0:
        print('| model | W | parameters a process | bytes a step | bytes a validation | '
              'ms a step | peak GiB |\n' + '| --- ' * 7 + '|')
    some = rng.choice(train.nnz, args.batch, replace=False)
    users, items = (x[some].astype(np.int64) for x in train.nonzero())
    batch = np.stack([users, items, models.sample_negatives(train, users, rng)])
    for name in ('lightgcn', 'sgl', 'sgcl'):
        model = models.MODELS[name](models.adjacency(train), *start, device=device)
        model.new_epoch(rng)
        run, part = optimiser(model), torch.from_numpy(batch)
        ms = median_ms(lambda: [sent.clear(), run(part.to(device))], 7)
        a_step = sum(sent)
        sent.clear()
        models.evaluate(*model.embeddings(), valid, train)
        if rank == 0:
            print(f'| {name} | {W} | {model.table.numel():,} | {a_step:,} | {sum(sent):,} | '
                  f'{ms:.1f} | {peak():.2f} |', flush=True)


def joint(args):
    """Seconds and memory of llminit.joint."""
    import llminit
    rng = np.random.default_rng(0)
    observed = synthetic(args, rng)
    vectors = rng.standard_normal((args.items, 768), np.float32)
    began, before = time.process_time(), peak()
    llminit.joint(vectors, observed, args.dim)
    print(f'{args.items:,} items, {observed.nnz:,} interactions, K = {args.dim}: '
          f'{time.process_time() - began:.0f} CPU s, peak {peak():.2f} GiB, before {before:.2f}')


def median_ms(work, times=50):
    """Median milliseconds of work(), after five calls that are not counted. The garbage collector,
    which timeit turns off, is on, as in a run."""
    return 1e3 * np.median(timeit.repeat(work, gc.enable, number=1, repeat=times + 5)[5:])


def limits(args):
    """A line for the step of LightGCN, one for its Adam, and one for the encoder."""
    import data
    import embed
    import llminit
    import models
    import torch
    rng = np.random.default_rng(0)
    loaded = data.load(args.dataset, args.data)
    train, _, _ = data.split(loaded[0], rng)
    start = [llminit.xavier(rng, n, args.dim) for n in train.shape]
    model = models.LightGCN(models.adjacency(train), *start)
    some = rng.choice(train.nnz, args.batch)
    users, items = (x[some].astype(np.int64) for x in train.nonzero())
    part = torch.from_numpy(np.stack([users, items, models.sample_negatives(train, users, rng)]))
    step, big = optimiser(model), torch.ones(2 ** 26)                   # 256 MiB
    target = big.clone()
    per_ms = 2 * 2 ** 28 / median_ms(lambda: target.copy_(big), 10)      # read and written
    whole = median_ms(lambda: step(part))
    adam = torch.optim.Adam([model.table], fused=True)
    model.table.grad = torch.ones_like(model.table)
    nodes = torch.cat([part[0], *(part[1:] + model.n_users)]).numpy()
    gathers = 4 * args.dim * sum(block.nnz for _, block in
                                 models.receptive_field(model.graphs, nodes))
    # Adam reads four tables and writes three; before it the gradient is cleared and filled
    table, adam_ms = 4 * model.table.numel(), median_ms(adam.step)
    for name, ms, n in (('step', whole, 9 * table + 2 * gathers), ('its Adam', adam_ms, 7 * table)):
        print(f'{name}: {ms:.2f} ms; its {n / 2 ** 20:.0f} MiB take {n / per_ms:.2f} ms at the '
              f'speed of a copy, {per_ms / 1e6:.1f} GB/s')
    folder = Path('~/.cache/llminit/all-mpnet-base-v2').expanduser()
    texts, dtype = loaded[1][:200], embed.fast_dtype('cpu')
    with torch.profiler.profile() as profile:
        embed.run_mpnet(texts, folder, 'cpu', dtype)
    spent = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    product = sum(t for name, t in spent.items() if re.search(r'mm$|attention|linear', name))
    print(f'mpnet in {dtype}: {product / sum(spent.values()):.0%} of {len(texts)} texts is matrix '
          f'products; most of the rest: ' + ', '.join(
              f'{name} {t / sum(spent.values()):.0%}' for name, t in sorted(
                  spent.items(), key=lambda pair: -pair[1])[:8]))


def stages(args):
    """A row for each stage of llminit.main(), and the peak of memory so far at its end."""
    began = time.perf_counter()
    import data
    import embed
    import llminit
    import models
    spent = {'import': [time.perf_counter() - began, peak()]}

    def measured(name, work):
        def stage(*args, **more):
            start = time.perf_counter()
            out = work(*args, **more)
            seconds = spent.get(name, [0])[0] + time.perf_counter() - start
            spent[name] = [seconds, peak()]
            return out
        return stage
    for module, *names in ((data, 'load', 'split'), (llminit, 'select_dims', 'pool_users'),
                           (embed, 'encode'), (models, 'train', 'evaluate')):
        for name in names:
            setattr(module, name, measured(name, getattr(module, name)))
    with tempfile.TemporaryDirectory() as cache:
        Path(cache, 'all-mpnet-base-v2').symlink_to(
            Path('~/.cache/llminit/all-mpnet-base-v2').expanduser())
        measured('all', llminit.main)(['--data', args.data, '--dataset', args.dataset,
                                       '--cache', cache])
    spent['all'][0] += spent['import'][0]
    spent['train'][0] -= spent['evaluate'][0]              # all but one are within training
    print('| stage | s | peak GiB |\n| --- | --- | --- |')
    for name, (seconds, memory) in spent.items():
        print(f'| {name} | {seconds:.2f} | {memory:.2f} |')


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('what', choices=('rows', 'graph', 'step', 'stages', 'limits', 'joint'))
    p.add_argument('--n', type=int, default=10 ** 7, help='rows')
    p.add_argument('--users', type=int, default=2 * 10 ** 6)
    p.add_argument('--items', type=int, default=10 ** 6)
    p.add_argument('--interactions', type=int, default=5 * 10 ** 7)
    p.add_argument('--build-only', action='store_true')
    p.add_argument('--dim', type=int, help='K; 64 for graph, 128 for step')
    p.add_argument('--batch', type=int, help='2^21 for graph, 256 for step')
    p.add_argument('--data', default='data', help='where the datasets lie')
    p.add_argument('--dataset', default='beauty')
    args = p.parse_args()
    args.dim = args.dim or (64 if args.what == 'graph' else 128)
    args.batch = args.batch or (2 ** 21 if args.what == 'graph' else 256)
    {'rows': rows, 'graph': graph, 'step': step, 'stages': stages, 'limits': limits,
     'joint': joint}[args.what](args)


if __name__ == '__main__':
    main()
