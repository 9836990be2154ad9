"""Seconds per training epoch and per full validation, ours and RecBole's, in one run.

    python experiments/bench.py --data DIR                           # ours alone
    python experiments/bench.py --data DIR --peer PEER/bin/python    # beside RecBole
    ... --busy                                                       # with a busy third process

Same interactions (beauty after filtering), same K = 128, L = 2, batch 256, Adam. The peer is
RecBole 1.2.1, whose requirements clash with ours, so it lives in an environment of its own:

    python -m venv PEER
    PEER/bin/pip install torch==2.13.0 recbole==1.2.1 "numpy<2" "scipy<1.13" "pandas<2.3" \
        "setuptools<80"

Both are run in turns, `--rounds` times, each in a process of its own, with torch's threads and the
environment as they are; what is printed are medians over all rounds and the ratio, because one
machine is never twice the same. --busy starts a Python loop of equal priority beside them and ends
it. Not a test: it asserts nothing.
"""
import argparse
import contextlib
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import timeit
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PEER = '''
import json, logging, sys, time, warnings
warnings.filterwarnings('ignore')
import torch
load = torch.load                                  # 1.2.1 was written before weights_only
torch.load = lambda *a, **k: load(*a, **{**k, 'weights_only': False})
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model, get_trainer, init_seed
folder, name, batch, epochs = sys.argv[1:5]
config = Config(model=name, dataset='bench', config_dict=dict(
    data_path=folder, load_col={'inter': ['user_id', 'item_id']}, embedding_size=128, n_layers=2,
    train_batch_size=int(batch), eval_batch_size=2 ** 22, learning_rate=1e-3,
    reg_weight=1e-5,
    eval_args={'split': {'LS': 'valid_and_test'}, 'order': 'RO', 'mode': 'full',
               'group_by': 'user'},
    metrics=['Recall', 'NDCG'], topk=[10], valid_metric='NDCG@10', show_progress=False,
    drop_ratio=.1, ssl_tau=.2, ssl_weight=.05, type='ED', use_gpu=False, seed=0,
    reproducibility=True, checkpoint_dir=folder, state='ERROR'))
init_seed(0, True)
train, valid, _ = data_preparation(config, create_dataset(config))
model = get_model(name)(config, train._dataset)
trainer = get_trainer(config['MODEL_TYPE'], name)(config, model)
out = {'epoch': [], 'valid': []}
for epoch in range(int(epochs)):
    start = time.perf_counter()
    trainer._train_epoch(train, epoch, show_progress=False)
    out['epoch'].append(time.perf_counter() - start)
for _ in range(3):
    start = time.perf_counter()
    trainer._valid_epoch(valid, show_progress=False)
    out['valid'].append(time.perf_counter() - start)
print(json.dumps(out))
'''
PEER_NAMES = {'lightgcn': 'LightGCN', 'sgl': 'SGL', 'bpr': 'BPR'}


def ours(folder, name, batch, epochs, dataset):
    """Our seconds of each epoch and validation, with the garbage collector on, as the peer's."""
    sys.path.insert(0, str(ROOT))
    os.environ.setdefault('OMP_WAIT_POLICY', 'passive')    # as llminit.py does
    import data
    import llminit
    import models
    import numpy as np
    import scipy.sparse as sp
    rng = np.random.default_rng(0)
    train, valid, _ = data.split(data.load(dataset, folder)[0], rng)
    start = [llminit.xavier(rng, n, 128) for n in train.shape]
    none = sp.csr_matrix(train.shape)                      # no validation in the epochs
    model, curve = models.train(name, train, none, *start, rng, epochs=epochs, batch=batch,
                                log=lambda line: None)
    valid_seconds = timeit.repeat(lambda: models.evaluate(*model.embeddings(), valid, train),
                                  gc.enable, number=1, repeat=3)
    print(json.dumps({'epoch': [epoch['seconds'] for epoch in curve], 'valid': valid_seconds}))


def write_for_peer(args, folder):
    """The filtered interactions as an atomic file that RecBole need not filter again."""
    sys.path.insert(0, str(ROOT))
    import data
    users, items = data.load(args.dataset, args.data)[0].nonzero()
    (folder / 'bench').mkdir()
    with open(folder / 'bench' / 'bench.inter', 'w') as file:
        file.write('user_id:token\titem_id:token\n')
        file.writelines(f'u{u}\ti{i}\n' for u, i in zip(users, items))


def measure(command, folder=None):
    """The JSON of the last line that a process prints; RecBole writes its logs into folder."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=folder)
    if done.returncode:
        raise SystemExit(f'{command[0]} failed: {done.stderr.strip()[-400:]}')
    return json.loads(done.stdout.strip().splitlines()[-1])


@contextlib.contextmanager
def neighbour(busy):
    """A process that keeps one core busy, if asked for, ended in any case."""
    process = busy and subprocess.Popen([sys.executable, '-c', 'while True: pass'])
    try:
        yield
    finally:
        if process:
            process.kill()
            process.wait()


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--data', default='data', help='where the datasets lie')
    p.add_argument('--dataset', default='beauty')
    p.add_argument('--models', nargs='+', default=['lightgcn', 'sgl'], choices=PEER_NAMES)
    p.add_argument('--batch', type=int, default=256)
    p.add_argument('--epochs', type=int, default=3, help='in each round')
    p.add_argument('--rounds', type=int, default=2)
    p.add_argument('--busy', action='store_true', help='beside a busy process')
    p.add_argument('--peer', help='python of an environment with recbole 1.2.1')
    p.add_argument('--only', help=argparse.SUPPRESS)             # one round of ours, here
    args = p.parse_args()
    peer = args.peer and os.path.abspath(shutil.which(args.peer) or args.peer)     # from anywhere
    if args.only:
        return ours(args.data, args.only, args.batch, args.epochs, args.dataset)
    print('| model | what | ours, s | RecBole, s | RecBole / ours |')
    print('| --- | --- | --- | --- | --- |')
    with tempfile.TemporaryDirectory() as scratch, neighbour(args.busy):
        write_for_peer(args, Path(scratch))
        for name in args.models:
            mine, theirs = [], []
            for _ in range(args.rounds):
                mine.append(measure([sys.executable, __file__, *sys.argv[1:], '--only', name]))
                if peer:
                    theirs.append(measure([peer, '-c', PEER, scratch, PEER_NAMES[name],
                                           args.batch, args.epochs], scratch))
            for what in ('epoch', 'valid'):
                a, b = (statistics.median(s for run in runs for s in run[what]) if runs else None
                        for runs in (mine, theirs))
                beside = f'{b:.3f} | {b / a:.1f} |' if b else '| |'
                print(f'| {name} | {what} | {a:.3f} | {beside}', flush=True)


if __name__ == '__main__':
    main()
