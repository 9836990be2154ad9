"""Tests of llminit: python -m pytest. No network but loopback; what needs real data or weights
skips where they are absent, and says so."""
import concurrent.futures
import contextlib
import gzip
import hashlib
import http.server
import importlib.util
import inspect
import io
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings, strategies as st
from scipy.special import erf

import data
import embed
import llminit
import models

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent / 'shared' / 'data'
torch.set_num_threads(1)         # tiny products: threads only wait for each other
for leaf in (data, embed):
    leaf.download.__kwdefaults__['pause'] = .01      # seconds; nobody waits for a test's server


# ---- llminit.py: selection and pooling -------------------------------------------------------

def test_uni_takes_every_floor_n_over_k():
    vectors = np.arange(3 * 10, dtype=np.float32).reshape(3, 10)
    assert (llminit.select_dims(vectors, 4, 'uni')[0] == [0, 2, 4, 6]).all()


def test_rand_draws_distinct_dimensions_and_is_its_seeds():
    vectors = np.tile(np.arange(50, dtype=np.float32), (2, 1))
    kept = [llminit.select_dims(vectors, 40, 'rand', np.random.default_rng(seed))[0]
            for seed in (1, 1, 2)]
    assert len(set(kept[0])) == 40 and (kept[0] == kept[1]).all() and (kept[0] != kept[2]).any()


def test_var_keeps_the_widest_dimensions_the_same_for_every_item():
    rng = np.random.default_rng(0)
    scale = 1.5 ** rng.permutation(20)
    vectors = (rng.standard_normal((500, 20)) * scale + 100 / scale).astype(np.float32)
    kept = llminit.select_dims(vectors, 5, 'var')
    assert (kept == vectors[:, np.sort(np.argsort(scale)[-5:])]).all()


@pytest.mark.parametrize('K, message', [(11, 'cannot keep 11 of 10'), (0, 'cannot keep 0 of 10')])
def test_a_k_that_does_not_fit_is_an_error(K, message):
    with pytest.raises(ValueError, match=message):
        llminit.select_dims(np.ones((3, 10), np.float32), K, 'uni')


def test_nan_in_vectors_is_an_error_that_counts():
    vectors = np.ones((3, 10), np.float32)
    vectors[1, 4] = np.nan
    with pytest.raises(ValueError, match='1 of 3 item vectors'):
        llminit.select_dims(vectors, 2, 'uni')


@pytest.mark.parametrize('pool, power', [('mean', 1), ('sqrt', .5), ('sum', 0)])
def test_pool_users_is_eq_1(pool, power):
    rng = np.random.default_rng(0)
    train = random_graph(7, 9, .4)                                     # the last user has nothing
    items0 = rng.standard_normal((9, 4)).astype(np.float32)
    users0 = llminit.pool_users(train, items0, pool)
    for u, found in enumerate(users0):
        history = [items0[i] for i in range(9) if train[u, i]]
        expected = sum(history, np.zeros(4)) / max(len(history), 1) ** power
        np.testing.assert_allclose(found, expected, atol=1e-6)
    assert users0.dtype == np.float32


# ---- models.py: propagation, losses, evaluation, training ------------------------------------

def random_graph(n_users=30, n_items=20, density=.15, seed=0):
    """A csr (U, I) of ones in which the last user and the last item have no interaction."""
    rng = np.random.default_rng(seed)
    dense = rng.random((n_users, n_items)) < density
    dense[-1] = dense[:, -1] = False
    return sp.csr_matrix(dense.astype(np.float32))


def dense_propagation(observed, n_layers):
    """P (U+I, U+I) float64 with z = P E, by the textbook formula."""
    A = sp.block_array([[None, observed], [observed.T, None]]).toarray().astype(np.float64)
    degree = A.sum(1)
    scale = np.divide(1, np.sqrt(degree), where=degree > 0, out=np.zeros(len(degree)))
    A_hat = scale[:, None] * A * scale
    return sum(np.linalg.matrix_power(A_hat, l) for l in range(n_layers + 1)) / (n_layers + 1)


def lightgcn(observed, K=5, n_layers=2, seed=0, kind='lightgcn'):
    rng = np.random.default_rng(seed)
    tables = [rng.standard_normal((n, K)).astype(np.float32) for n in observed.shape]
    return models.MODELS[kind](models.adjacency(observed), *tables, n_layers=n_layers)


@pytest.mark.parametrize('n_layers', [0, 1, 2, 3])
def test_propagation_and_its_gradient_are_the_dense_formula(n_layers):
    observed = random_graph()
    model, P = lightgcn(observed, n_layers=n_layers), dense_propagation(observed, n_layers)
    E = model.table.detach().double().numpy()
    np.testing.assert_allclose(np.concatenate(model.embeddings()), P @ E, atol=1e-6)
    nodes = torch.tensor([3, 45, 3, 29, 49, 0])                        # repeats, isolated ones
    z, start = model.at(nodes, model.graphs)
    np.testing.assert_allclose(z.detach(), (P @ E)[nodes], atol=1e-6)
    np.testing.assert_allclose(start.detach(), E[nodes], atol=0)
    weight = torch.randn(2, *z.shape, generator=torch.Generator().manual_seed(0))
    (weight[0] * z + weight[1] * start).sum().backward()
    expected = np.zeros_like(E)
    for n, node in enumerate(nodes):
        expected += np.outer(P[node], weight[0, n])
        expected[node] += weight[1, n].numpy()
    np.testing.assert_allclose(model.table.grad, expected, atol=1e-5)


def test_adjacency_is_symmetric_and_leaves_isolated_nodes_empty():
    graph = models.adjacency(random_graph())
    assert abs(graph - graph.T).max() == 0
    assert graph.has_sorted_indices and graph.dtype == np.float32
    assert not graph[29].nnz and not graph[49].nnz


def test_the_loss_is_a_naive_loop():
    observed = random_graph()
    model, P = lightgcn(observed), dense_propagation(observed, 2)
    E = model.table.detach().double().numpy()
    z, triples = P @ E, [(0, 3, 7), (4, 4, 4), (0, 3, 9), (29, 0, 19)]
    total, norms = 0, np.zeros(3)
    for u, i, j in triples:
        difference = z[u] @ z[30 + i] - z[u] @ z[30 + j]
        total -= np.log(1 / (1 + np.exp(-difference)))
        norms += [np.square(E[node]).sum() for node in (u, 30 + i, 30 + j)]
    expected = total / 4 + model.reg * np.sqrt(norms).sum() / 4
    found = model.loss(*torch.tensor(triples).T)
    np.testing.assert_allclose(found.item(), expected, rtol=1e-6)


def slow_evaluate(users, items, target, seen, k=10):
    """Recall@k and NDCG@k by sorting every user's items; of equal scores the target comes last."""
    recall, ndcg = [], []
    for u in np.unique(target.nonzero()[0]):
        wanted, out = target[u].indices, seen[u].indices if seen is not None else []
        scores, gains = items @ users[u], 0
        for i in wanted:
            rank = sum(not scores[j] < scores[i] for j in range(len(items))
                       if j not in out and j != i)
            gains += rank < k and 1 / np.log2(2 + rank)
            recall.append((u, rank < k))
        ndcg.append(gains / sum(1 / np.log2(2 + r) for r in range(min(k, len(wanted)))))
    users = dict.fromkeys(u for u, _ in recall)
    return np.array([np.mean([hit for v, hit in recall if v == u]) for u in users]), np.array(ndcg)


@pytest.mark.parametrize('masked', [True, False])
@pytest.mark.parametrize('n_targets', [1, 4])
def test_evaluate_is_a_python_loop(masked, n_targets):
    rng = np.random.default_rng(n_targets)
    users, items = (rng.integers(-2, 3, (n, 3)).astype(np.float32) for n in (40, 25))    # many ties
    target, seen = np.zeros((40, 25)), rng.random((40, 25)) < .2
    for u in range(35):                                                # five users have no target
        target[u, rng.choice(25, n_targets, replace=False)] = 1
    seen = sp.csr_matrix((seen & ~target.astype(bool)).astype(np.float32)) if masked else None
    target = sp.csr_matrix(target)
    found = models.evaluate(torch.from_numpy(users), torch.from_numpy(items), target, seen)
    for one, other in zip(found, slow_evaluate(users, items, target, seen)):
        np.testing.assert_allclose(one, other)
    assert len(found[0]) == 35


@pytest.mark.parametrize('value', [0., .1, float('nan'), float('inf')])
@pytest.mark.parametrize('shape', [(50, 40, 8), (300, 4001, 128)])
def test_equal_or_broken_scores_never_score(value, shape):
    n_users, n_items, K = shape
    target = sp.csr_matrix((np.ones(n_users), (range(n_users), np.arange(n_users) % n_items)),
                           (n_users, n_items))
    users, items = torch.full((n_users, K), value), torch.full((n_items, K), value)
    recall, ndcg = models.evaluate(users, items, target)
    assert recall.max() == ndcg.max() == 0


def test_negatives_are_uniform_over_what_the_user_has_not():
    observed = random_graph(6, 8, .5)
    users = np.repeat(np.arange(6), 4000)
    drawn = models.sample_negatives(observed, users, np.random.default_rng(0))
    for u in range(6):
        others = np.setdiff1d(np.arange(8), observed[u].indices)
        counts = np.bincount(drawn[users == u], minlength=8)
        assert set(np.flatnonzero(counts)) == set(others)
        assert abs(counts[others] / 4000 - 1 / len(others)).max() < .04        # five sigma


def planted(n_users=120, n_items=60, n_groups=4, per_user=12, seed=0):
    """Users and items of n_groups tastes, a tenth of the interactions at random: csr (U, I)."""
    rng = np.random.default_rng(seed)
    own = np.arange(n_users)[:, None] % n_groups == np.arange(n_items) % n_groups
    score = rng.random((n_users, n_items)) + 2 * own * (rng.random((n_users, n_items)) < .9)
    dense = score >= np.sort(score)[:, [-per_user]]
    return sp.csr_matrix(dense.astype(np.float32))


def test_training_finds_planted_tastes_and_repeats_itself():
    train, valid, test = data.split(planted(), np.random.default_rng(0))

    def score(n_epochs):
        rng = np.random.default_rng(1)
        start = [llminit.xavier(rng, n, 16) for n in train.shape]
        users, items, curve = models.train('lightgcn', train, valid, *start, rng, lr=.01,
                                           epochs=n_epochs, log=lambda line: None)
        return models.evaluate(users, items, test, train + valid)[1].mean(), curve
    (first, curve), (again, _) = score(30), score(30)
    assert first == again
    assert first > score(1)[0] and first > .35                         # chance: about .1
    assert curve[-1]['loss'] < curve[0]['loss']


def test_the_best_epoch_is_kept_and_patience_ends_training():
    train, valid, _ = data.split(planted(), np.random.default_rng(0))
    rng = np.random.default_rng(1)
    start = [llminit.xavier(rng, n, 16) for n in train.shape]
    users, items, curve = models.train('lightgcn', train, valid, *start, rng, lr=.05, patience=3,
                                       log=lambda line: None)
    ndcg = [epoch['ndcg'] for epoch in curve]
    assert len(curve) < 300 and np.argmax(ndcg) == len(curve) - 4
    assert models.evaluate(users, items, valid, train)[1].mean() == max(ndcg)


def test_users_who_have_every_item_are_left_out_of_the_batches():
    observed = sp.csr_matrix(np.array([[1, 1, 1], [1, 0, 0]], np.float32))
    users, items, curve = models.train('lightgcn', observed, sp.csr_matrix((2, 3)), np.ones((2, 2)),
                                       np.ones((3, 2)), np.random.default_rng(0), epochs=2,
                                       log=lambda line: None)
    assert np.isfinite(curve[-1]['loss']) and len(curve) == 2


# ---- the command line ------------------------------------------------------------------------

def free_port():
    """A TCP port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def edit_run(folder, name, value):
    """One entry of a saved run's run.json is another."""
    run = json.loads((folder / 'run.json').read_text()) | {name: value}
    (folder / 'run.json').write_text(json.dumps(run))


def write_planted(folder, extra_item_columns=''):
    """A folder of the user's own, with titles that tell the tastes."""
    pairs = planted()
    words = ['red apple fruit', 'blue steel tool', 'soft wool yarn', 'loud brass horn']
    folder.mkdir(exist_ok=True)
    lines = [f'u{u},i{i},5' for u, i in zip(*pairs.nonzero())]
    (folder / 'interactions.csv').write_text('\n'.join(['user_id,item_id,rating', *lines]) + '\n')
    lines = [f'i{i},{words[i % 4]} number {i}' for i in range(60)]
    (folder / 'items.csv').write_text('\n'.join(['item_id,title', *lines]) + '\n')
    return folder


def test_the_command_prints_the_same_row_twice(tmp_path, capsys):
    own = write_planted(tmp_path / 'own')
    options = ['--dataset', own, '--encoder', 'tfidf', '--dim', 16, '--epochs', 3]
    command = [sys.executable, HERE / 'llminit.py', *options]
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ''
    cells = done.stdout.splitlines()[-1].split(' | ')
    assert cells[0] == f'| {own}' and cells[1:3] == ['lightgcn', 'var']
    assert llminit.command(list(map(str, options))) == 0
    again = capsys.readouterr().out.splitlines()[-1].split(' | ')
    assert cells[:-1] == again[:-1]                                    # all but the seconds


def test_with_seen_keep_the_papers_figure_stands_beside():
    facts = {'K': 128, 'best epoch': 1, 'parameters': 640, 'seconds': 1}
    for dataset, model, strategy, expected in [
            ('office', 'lightgcn', 'var', '.0816/.0414'), ('tools', 'sgl', 'none', '.0580/.0284'),
            ('beauty', 'morec', 'var', '.0857/.0397'), ('beauty', 'morec', 'none', '-'),
            ('beauty', 'sgcl', 'pca', '-')]:
        args, = llminit.parse(['--dataset', dataset, '--seen', 'keep', '--strategy', strategy,
                               '--model', model])
        row = llminit.result_row(args, (np.ones(2), np.zeros(2)), facts)
        assert row.splitlines()[0].endswith('| paper |') and row.endswith(f'| {expected} |')
        assert row.splitlines()[-1].startswith(f'| {dataset} | {model} | {args.strategy} | 1.0000 ')


def test_the_flags_of_training_arrive_and_test_hides_training_and_validation(tmp_path, monkeypatch):
    args, = llminit.parse(['--seen', 'keep', '--anchor', '2', '--lr', '.5', '--model', 'sgl'])
    settings = llminit.training_settings(args)
    assert settings == dict(seen='keep', anchor=2., lr=.5, batch=2048, patience=10, epochs=300,
                            views='edge', tau=.2)
    assert llminit.training_settings(llminit.parse(['--preset', 'paper'])[0])['batch'] == 256
    calls, evaluate = [], models.evaluate

    def spy(users, items, target, seen=None, k=10):
        calls.append((target.nnz, None if seen is None else seen.nnz))
        return evaluate(users, items, target, seen, k)
    monkeypatch.setattr(models, 'evaluate', spy)
    own = write_planted(tmp_path / 'own')
    given = ['--dataset', str(own), '--strategy', 'none', '--dim', '4', '--epochs', '1']
    for seen in ('mask', 'keep'):
        assert llminit.command([*given, '--seen', seen]) == 0
    n_users, n_pairs = 120, planted().nnz
    assert calls == [(n_users, n_pairs - 2 * n_users), (n_users, n_pairs - n_users),
                     (n_users, None), (n_users, None)]


@pytest.mark.parametrize('options, message', [
    (['--dim', 4000], 'cannot keep 4000 of'),
    (['--dim', 0], 'whole number'),
    (['--encoder', 'nothing.npy'], 'no such file'),
    (['--encoder', 'word2vec'], 'word2vec'),
    (['--dataset', 'nowhere'], 'nowhere'),
    (['--strategy', 'best'], 'invalid choice'),
    (['--colour', 'red'], 'unrecognized'),
    (['--dataset', 'ml-100k', '--data', os.devnull], 'cannot'),
    (['--cache', os.devnull, '--encoder', 'mpnet'], 'cache'),
])
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, options, message):
    own = write_planted(tmp_path / 'own')
    before = sorted(tmp_path.rglob('*'))
    given = ['--dataset', own, '--encoder', 'tfidf', '--epochs', 1, '--cache', tmp_path / 'cache']
    try:
        code = llminit.command(list(map(str, given + options)))
    except SystemExit as stop:                                         # argparse leaves this way
        code = stop.code
    err = capsys.readouterr().err
    assert code == 2 and message in err and len(err.splitlines()) == 1
    assert sorted(tmp_path.rglob('*')) == before                       # nothing half-written


def test_recommend_is_a_sorted_list_of_unseen_items():
    rng = np.random.default_rng(0)
    users, items = (torch.from_numpy(rng.standard_normal((n, 4))) for n in (30, 12))
    seen = rng.random((30, 12)) < .3
    seen[7] = True
    seen[8, 1:] = True
    picked, scores = models.recommend(users, items, sp.csr_matrix(seen.astype(np.float32)), 5)
    for u in range(30):
        all_scores = np.where(seen[u], -np.inf, items.numpy() @ users[u].numpy())
        best = np.argsort(-all_scores)[:min(5, (~seen[u]).sum())]
        assert picked[u].tolist() == best.tolist() + [-1] * (5 - len(best))
        np.testing.assert_allclose(scores[u][:len(best)], all_scores[best], rtol=1e-6)


def test_a_saved_run_scores_and_recommends_again_without_training(tmp_path, capsys):
    own, saved = write_planted(tmp_path / 'own'), tmp_path / 'saved'
    options = ['--dataset', own, '--encoder', 'tfidf', '--dim', 16, '--epochs', 3, '--top', 3]
    assert llminit.command(list(map(str, [*options, '--save', saved]))) == 0
    first = capsys.readouterr().out.splitlines()
    files = {path.name: path.read_bytes() for path in saved.iterdir()}
    assert set(files) == {'users.npy', 'items.npy', 'run.json', 'recommendations.tsv'}
    run = json.loads(files['run.json'])
    users, items = (np.load(saved / name) for name in llminit.TABLES)
    assert len(run['users']) == len(users) == 120 and len(run['items']) == len(items) == 60
    lines = [line.split('\t') for line in files['recommendations.tsv'].decode().splitlines()]
    assert lines[0] == ['user_id', 'rank', 'item_id', 'score', 'title'] and len(lines) == 361
    users_of, items_of = planted().nonzero()
    known = set(zip(np.array(run['users'])[users_of], np.array(run['items'])[items_of]))
    for user, _, item, score, title in lines[1:]:
        assert (user, item) not in known and title.endswith(f'number {item[1:]}')
        expected = users[run['users'].index(user)] @ items[run['items'].index(item)]
        assert abs(float(score) - expected) < 1e-4
    (saved / 'notes.txt').write_text('mine')                           # is left alone
    assert llminit.command(['--load', str(saved), '--top', '3']) == 0
    again = capsys.readouterr().out.splitlines()
    assert len(again) == 4 and again[-1].split(' | ')[1:-1] == first[-1].split(' | ')[1:-1]
    (saved / 'notes.txt').unlink()
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == files
    assert sorted(path.name for path in tmp_path.iterdir()) == ['own', 'saved']
    assert llminit.command(list(map(str, [*options, '--save', saved, '--seed', 1]))) == 0
    assert (saved / 'users.npy').read_bytes() != files['users.npy']    # replaced by a later run


def test_a_saved_run_needs_its_vectors_no_more_and_no_path_is_empty(tmp_path, capsys):
    own, saved, vectors = write_planted(tmp_path / 'own'), tmp_path / 'saved', tmp_path / 'v.npy'
    np.save(vectors, np.random.default_rng(0).normal(size=(60, 8)))
    given = ['--dataset', own, '--encoder', vectors, '--dim', 4, '--epochs', 1, '--save', saved]
    assert llminit.command(list(map(str, given))) == 0
    vectors.unlink()
    assert llminit.command(['--load', str(saved)]) == 0
    for flag in ('--save', '--load', '--results'):
        with pytest.raises(SystemExit):
            llminit.command([flag, ''])
        assert f'{flag}: expected a path' in capsys.readouterr().err


def test_what_a_user_rated_low_is_not_recommended(tmp_path, capsys):
    own, saved = write_planted(tmp_path / 'own'), tmp_path / 'saved'
    item = f'i{planted()[0].toarray().argmin()}'                       # one that u0 has not
    given = ['--dataset', own, '--strategy', 'none', '--dim', 4, '--epochs', 1, '--top', 60]

    def told():
        assert llminit.command(list(map(str, [*given, '--save', saved]))) == 0
        rows = (saved / 'recommendations.tsv').read_text().splitlines()
        return {(user, item) for user, _, item, *_ in (row.split('\t') for row in rows[1:])}
    before = told()
    with open(own / 'interactions.csv', 'a') as file:
        file.write(f'u0,{item},1\n')
    assert before - told() == {('u0', item)}


def test_a_saved_run_refuses_other_settings_and_changed_data(tmp_path, capsys):
    own, saved = write_planted(tmp_path / 'own'), str(tmp_path / 'saved')
    given = ['--dataset', str(own), '--strategy', 'none', '--dim', '4', '--epochs', '1']
    assert llminit.command([*given, '--save', saved]) == 0
    for flag in (['--seed', '1'], ['--dim', '8'], ['--core', '1'], ['--seen', 'keep'],
                 ['--seen=mask'], ['--strategy', 'var']):              # defaults, too
        with pytest.raises(SystemExit) as stop:
            llminit.command(['--load', saved, *flag])
        name = flag[0][2:].partition('=')[0]
        assert stop.value.code == 2 and f'leave out {name}' in capsys.readouterr().err
    with open(own / 'interactions.csv', 'a') as file:
        file.writelines(f'u{u},i{(u + 1) % 60},5\n' for u in range(0, 120, 7))
    assert llminit.command(['--load', saved]) == 2
    assert 'train anew' in capsys.readouterr().err


@pytest.mark.parametrize('damage, message', [
    (lambda saved: (saved / 'run.json').unlink(), 'run.json'),
    (lambda saved: (saved / 'run.json').write_text('{"settings": {"device": "x"}}'), 'run.json'),
    (lambda saved: (saved / 'run.json').write_text('[]'), 'run.json'),
    (lambda saved: (saved / 'run.json').write_text(
        (saved / 'run.json').read_text().replace('"mask"', '"both"')), 'invalid choice'),
    (lambda saved: np.save(saved / 'items.npy', np.full((60, 4), np.nan, np.float32)),
     'expected finite float32 of shape (60, 4)'),
    (lambda saved: np.save(saved / 'users.npy', np.zeros((120, 4), 'U3')), 'expected finite'),
    (lambda saved: np.save(saved / 'users.npy', np.zeros((120, 5), np.float32)), '(120, 4)'),
    (lambda saved: np.save(saved / 'users.npy', np.array([{}])), 'users.npy is damaged'),
    (lambda saved: (saved / 'users.npy').write_bytes(b'no'), 'users.npy is damaged'),
    (lambda saved: (saved / 'users.npy').write_bytes(b''), 'users.npy is damaged'),
    (lambda saved: (saved / 'users.npy').write_bytes(b'PK\3\4'), 'users.npy is damaged'),
    (lambda saved: (saved / 'users.npy').write_bytes(b'\x93NUMPY\1\0\x10\0{abc            '),
     'users.npy is damaged'),
    (lambda saved: (saved.parent / 'own' / 'items.csv').write_text('item_id,title\ni1,a\ni2,b\n'),
     'nothing left'),
    (lambda saved: edit_run(saved, 'best epoch', math.inf), 'is not of a saved run'),
    (lambda saved: edit_run(saved, 'settings', [1]), 'is not of a saved run'),
    (lambda saved: (saved / 'run.json').write_text('[' * 100_000), 'is not of a saved run'),
])
def test_a_damaged_or_foreign_run_is_one_line(tmp_path, capsys, damage, message):
    own, saved = write_planted(tmp_path / 'own'), tmp_path / 'saved'
    options = ['--dataset', own, '--strategy', 'none', '--dim', 4, '--epochs', 1, '--save', saved]
    assert llminit.command(list(map(str, options))) == 0
    damage(saved)
    capsys.readouterr()
    try:
        assert llminit.command(['--load', str(saved)]) == 2
    except SystemExit as stop:                                         # argparse leaves this way
        assert stop.code == 2
    err = capsys.readouterr().err.splitlines()
    assert message in err[-1] and err[-1].startswith('llminit: error: ')
    assert sum(line.startswith('llminit:') for line in err) == 1


def test_a_folder_that_is_no_run_is_never_replaced(tmp_path, capsys):
    own = write_planted(tmp_path / 'own')
    given = ['--dataset', str(own), '--strategy', 'none', '--save']
    for place in (str(own), os.devnull + '/x', '/'):
        assert llminit.command(given + [place]) == 2
    assert all(line.startswith('llminit: error: ') for line in capsys.readouterr().err.splitlines())
    assert sorted(path.name for path in own.iterdir()) == ['interactions.csv', 'items.csv']


def test_a_run_is_saved_here_through_a_link_and_moves_with_its_data(tmp_path, capsys, monkeypatch):
    own, real, link = write_planted(tmp_path / 'own'), tmp_path / 'real', tmp_path / 'link'
    given = ['--dataset', str(own), '--strategy', 'none', '--dim', '4', '--epochs', '1', '--save']
    real.mkdir()
    link.symlink_to(real)
    (real / 'recommendations.tsv.9.part').write_text('of a killed run')
    assert llminit.command([*given, str(link)]) == 0
    assert link.is_symlink() and set(os.listdir(real)) >= {'run.json', *llminit.TABLES}
    monkeypatch.chdir(real)
    assert llminit.command([*given, '.', '--seed', '1']) == 0
    assert json.loads((real / 'run.json').read_text())['settings']['seed'] == 1
    own.rename(tmp_path / 'moved')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):                                    # the folder is gone
        llminit.command(['--load', str(real)])
    assert llminit.command(['--load', str(real), '--dataset', str(tmp_path / 'moved')]) == 0


@pytest.mark.parametrize('file', ['data.py', 'embed.py', 'llminit.py', 'models.py'])
def test_each_file_imports_alone_in_an_empty_folder_and_does_nothing(tmp_path, file):
    shutil.copy(HERE / file, tmp_path)
    code = f'import sys; sys.path.insert(0, "."); import {file[:-3]}'
    done = subprocess.run([sys.executable, '-B', '-I', '-c', code, '--no-such-flag'], cwd=tmp_path,
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')
    assert [p.name for p in tmp_path.iterdir()] == [file]


def softmax_loss(logits, own):
    """- sum_b log( exp(logits[b, own]) / sum_m exp(logits[b, m]) ) by the formula, float64."""
    return -sum(np.log(np.exp(row[o]) / np.exp(row).sum()) for row, o in zip(logits, own))


def unit_rows(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


TRIPLES = [(0, 3, 7), (4, 4, 4), (0, 3, 9), (28, 0, 18), (7, 7, 1)]


def naive_loss(model, P, triples=TRIPLES):
    """The loss of section 2, term by term in float64; P: (U+I, U+I) of the graph and the views."""
    E, (u, i, j), n = model.table.detach().double().numpy(), np.array(triples).T, model.n_users
    z = P[0] @ E
    pairs = [np.log(1 + np.exp(z[a] @ z[n + c] - z[a] @ z[n + b])) for a, b, c in triples]
    norms = sum(np.linalg.norm(E[rows]) for rows in (u, n + i, n + j))
    penalty = 1e-5 * norms / len(triples)
    if isinstance(model, models.SGL):
        one, two = P[1] @ E, P[2] @ E
        users = softmax_loss(unit_rows(one[u]) @ unit_rows(two[:n]).T / .2, u)
        items = softmax_loss(unit_rows(one[n + i]) @ unit_rows(two[n:]).T / .2, i)
        return sum(pairs) + penalty + .05 * (users + items)
    if isinstance(model, models.SGCL):
        a, b = unit_rows(z[u]), unit_rows(z[n + i])
        below = np.exp(a @ a.T / .2).sum(1) + np.exp(b @ b.T / .2).sum(1)
        return -np.log(np.exp((a * b).sum(1) / .2) / below).sum()
    return np.mean(pairs) + penalty


def dense_views(model):
    """P of the graph and of both views, from the graphs that the model holds, layer by layer."""
    out = []
    for graphs in (model.graphs, *getattr(model, 'views', ())):
        layers = [np.eye(len(model.table))]
        for graph in graphs:
            layers.append(graph.toarray().astype(np.float64) @ layers[-1])
        out.append(sum(layers) / len(layers))
    return out


def with_settings(observed, name, **settings):
    rng = np.random.default_rng(3)
    tables = [rng.standard_normal((n, 5)).astype(np.float32) for n in observed.shape]
    model = models.MODELS[name](models.adjacency(observed), *tables, **settings)
    model.new_epoch(rng)
    return model


@pytest.mark.parametrize('name, settings', [
    ('lightgcn', {}), ('bpr', {}), ('sgcl', {}), ('sgl', {}), ('sgl', {'views': 'node'}),
    ('sgl', {'views': 'walk'}), ('sgl', {'views': 'walk', 'n_layers': 3})])
def test_each_loss_is_the_naive_formula_and_its_gradient_the_difference(name, settings):
    model = with_settings(random_graph(density=.3), name, **settings)
    P, triples = dense_views(model), torch.tensor(TRIPLES).T
    loss = model.loss(*triples)
    np.testing.assert_allclose(loss.item(), naive_loss(model, P), rtol=1e-5)
    loss.backward()
    rng, table = np.random.default_rng(0), model.table
    for _ in range(3):                                                 # along random directions
        step = torch.from_numpy(rng.standard_normal(table.shape).astype(np.float32))
        slope, eps = float((table.grad * step).sum()), 2 ** -10
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                table += sign * eps * step
                ends.append(naive_loss(model, P))
                table -= sign * eps * step
        np.testing.assert_allclose(slope, (ends[0] - ends[1]) / (2 * eps), rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize('layout', ['csr', 'coo'])
def test_off_the_cpu_the_graph_is_a_sparse_tensor_and_the_result_the_same(layout):
    observed, triples = random_graph(density=.3), torch.tensor(TRIPLES).T
    here, there = with_settings(observed, 'sgl'), with_settings(observed, 'sgl')
    sparse = [[models.sparse_tensor(graph, layout) for graph in graphs]
              for graphs in (there.graphs, *there.views)]
    there.graphs, there.views = sparse[0], sparse[1:]
    for model in (here, there):
        model.loss(*triples).backward()
    np.testing.assert_allclose(here.table.grad, there.table.grad, atol=1e-6)
    np.testing.assert_allclose(here.embeddings()[1], there.embeddings()[1], atol=1e-6)


@pytest.mark.parametrize('views', ['edge', 'node', 'walk'])
def test_views_drop_what_they_say_and_are_drawn_anew(views):
    observed = random_graph(200, 150, .1)
    tables = np.ones((200, 2)), np.ones((150, 2))
    model = models.SGL(models.adjacency(observed), *tables, views=views)
    rng, drawn = np.random.default_rng(0), []
    for _ in range(2):
        model.new_epoch(rng)
        drawn += [graph for graphs in model.views for graph in graphs]
    for graph in drawn:
        kept = (graph[:200, 200:] != 0).astype(np.float32)
        assert not (kept > observed).nnz
        np.testing.assert_allclose((graph - models.adjacency(kept.tocsr())).data, 0, atol=1e-7)
        if views == 'node':
            lost = [(np.diff(side.indptr) == 0) for side in (kept.tocsr(), kept.tocsc())]
            lost = [l[np.diff(side.indptr) > 0].sum() for l, side in
                    zip(lost, (observed, observed.tocsc()))]
            assert lost[0] in range(19, 23) and lost[1] in range(14, 19)
        else:
            assert kept.nnz == int(observed.nnz * .9)
    distinct = {graph.data.tobytes() + graph.indices.tobytes() for graph in drawn}
    assert len(distinct) == (8 if views == 'walk' else 4)


def test_morec_is_a_projection_of_frozen_text():
    rng, observed = np.random.default_rng(0), planted()
    items0 = rng.standard_normal((60, 30)).astype(np.float32)
    users0 = llminit.pool_users(observed, items0)
    model = models.MoRec(models.adjacency(observed), users0, items0, dim=7, rng=rng)
    users, items = model.embeddings()
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    assert users.shape == (120, 7) and trained == [30 * 7]
    np.testing.assert_allclose(users, llminit.pool_users(observed, items.numpy()), atol=1e-5)


def test_pca_is_the_svd_and_whitening_evens_it():
    rng = np.random.default_rng(0)
    vectors = (rng.standard_normal((80, 12)) * 1.3 ** np.arange(12) + 2).astype(np.float32)
    U, S, _ = np.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
    for whiten in (0, .5, 1):
        found = llminit.select_dims(vectors, 5, 'pca', whiten=whiten)
        expected = U[:, :5] * S[:5] ** (1 - whiten)
        expected *= np.linalg.norm(S[:5]) / np.linalg.norm(S[:5] ** (1 - whiten))
        np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-4)
    assert np.ptp(llminit.select_dims(vectors, 5, 'pca', whiten=1).std(0)) < 1e-5
    with pytest.raises(ValueError, match='fewer than 5'):
        llminit.select_dims(vectors[:4], 5, 'pca')


def test_the_other_strategies_are_what_they_say():
    rng = np.random.default_rng(0)
    vectors = (rng.standard_normal((900, 300)) + 1).astype(np.float32)

    def pick(name, **more):
        return llminit.select_dims(vectors, 100, name, np.random.default_rng(1), **more)
    assert (pick('prefix') == vectors[:, :100]).all() and (pick('full') == vectors).all()
    assert pick('noise').shape == (900, 100)
    assert abs(np.square(pick('noise')).mean() - np.square(vectors).mean()) < .05
    lengths = np.square(pick('proj')).sum(1) / np.square(vectors).sum(1)
    assert abs(lengths.mean() - 100 / 300) < .03                       # as K of N dimensions have
    tastes = np.repeat(rng.standard_normal((9, 300)), 100, axis=0)
    vectors = (tastes + rng.standard_normal((900, 300)) / 2).astype(np.float32)
    near = np.corrcoef((pick('proj') @ pick('proj').T).ravel(), (vectors @ vectors.T).ravel())[0, 1]
    assert near > .8                                                   # it keeps who is near whom
    degree = np.arange(900) % 7
    vectors[degree == 6, 5] *= 50                                      # wide for popular items only
    vectors[degree == 0, 6] *= 80
    kept = pick('var', popular=.1, degree=degree)
    assert (kept == vectors[:, [5]]).all(0).any() and not (kept == vectors[:, [6]]).all(0).any()


def test_the_anchor_pulls_towards_the_start():
    train, valid, _ = data.split(planted(), np.random.default_rng(0))
    moved = []
    for anchor in (0, 50):
        rng = np.random.default_rng(1)
        start = [llminit.xavier(rng, n, 16) for n in train.shape]
        users, _, _ = models.train('bpr', train, valid, *start, rng, anchor=anchor, epochs=3,
                                   lr=.01, log=lambda line: None)
        moved.append(np.linalg.norm(users.numpy() - start[0]))
    assert moved[1] < .7 * moved[0]


def test_info_nce_is_stable_and_a_zero_row_has_a_bounded_gradient():
    queries = torch.tensor([[1., 0], [0, 2]], requires_grad=True)
    keys = torch.tensor([[0., 1], [-1, 0], [0, 0]], requires_grad=True)
    for tau in (1., .2, .001):
        loss = models.InfoNCE.apply(queries, keys, torch.tensor([1, 0]), torch.ones(2), tau)
        logits = np.array([[0, -1, 0], [1, 0, 0]]) / tau
        expected = np.logaddexp.reduce(logits, axis=1).sum() - (-1 + 1) / tau
        np.testing.assert_allclose(loss.item(), expected, rtol=1e-5, atol=1e-6)
        grads = torch.autograd.grad(loss, (queries, keys))
        assert all(g.isfinite().all() and g.abs().max() < 1e4 / tau + 1 for g in grads)


@pytest.mark.parametrize('n_keys, atol', [(7, 1e-5), (900_000, 2e-3)])  # the latter in three pieces
def test_info_nce_with_weights_is_the_naive_sum(n_keys, atol):
    draw = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(n, 3, generator=draw, requires_grad=True) for n in (5, n_keys))
    own, weight = torch.tensor([3, 0, 6, 6, 1]), torch.tensor([1, 3, 1, 2, 1])
    loss = models.InfoNCE.apply(queries, keys, own, weight, .2)
    found = torch.autograd.grad(loss, (queries, keys))
    q, k = (torch.nn.functional.normalize(x.double()) for x in (queries, keys))
    logits = q @ k.T / .2
    naive = (weight * (logits.logsumexp(1) - logits.gather(1, own[:, None])[:, 0])).sum()
    np.testing.assert_allclose(loss.item(), naive.item(), rtol=1e-5)
    for one, other in zip(found, torch.autograd.grad(naive, (queries, keys))):
        np.testing.assert_allclose(one, other, atol=atol)


def test_ranks_beyond_k_are_not_counted_out_and_those_below_are_exact():
    rng = np.random.default_rng(0)
    users, items = (rng.standard_normal((n, 6)).astype(np.float32) for n in (400, 300))
    items[:150] *= np.linspace(.1, 3, 150)[:, None].astype(np.float32)
    items[150:] = items[:150]                                          # every score is there twice
    users, items = torch.from_numpy(users), torch.from_numpy(items)
    target = sp.csr_matrix((np.ones(400), (np.arange(400), rng.integers(0, 300, 400))), (400, 300))
    for seen in (None, random_graph(400, 300, .05)):
        exact = models.target_ranks(users, items, target, seen)
        short = models.target_ranks(users, items, target, seen, 10)
        assert ((short == exact) | (exact >= 10) & (short == 300)).all()
        assert (short == 300).sum() > 50 and (short < 10).any()


def test_morec_starts_from_the_seed():
    train, valid, _ = data.split(planted(), np.random.default_rng(0))
    text = [np.random.default_rng(0).random((n, 9)) for n in train.shape]
    first, again, other = (models.train('morec', train, valid, *text, np.random.default_rng(seed),
                                        epochs=1, dim=4, lr=1e-6, log=lambda line: None)[1]
                           for seed in (0, 0, 1))
    assert (first == again).all() and not torch.allclose(first, other, atol=.01)


def test_where_nothing_can_be_ranked_or_tested_it_is_said(tmp_path, capsys):
    (tmp_path / 'ratings.csv').write_text('user_id,item_id\nu1,a\nu2,a\nu3,a\n')
    (tmp_path / 'items.csv').write_text('item_id,title\na,tea\nb,cup\n')
    assert llminit.command(['--dataset', str(tmp_path), '--core', '1', '--strategy', 'none']) == 2
    assert 'nothing to test with' in capsys.readouterr().err
    with pytest.raises(ValueError, match='nothing to rank'):
        models.train('bpr', sp.csr_matrix(np.ones((2, 3))), sp.csr_matrix((2, 3)), np.ones((2, 2)),
                     np.ones((3, 2)), np.random.default_rng(0), log=lambda line: None)


def test_evaluate_takes_parameters_and_doubles_and_negatives_unsorted_rows():
    users, items = torch.randn(6, 3, dtype=torch.float64), torch.randn(9, 3, dtype=torch.float64)
    target = sp.csr_matrix(np.eye(6, 9))
    recall, _ = models.evaluate(torch.nn.Parameter(users), torch.nn.Parameter(items), target)
    assert len(recall) == 6
    unsorted = sp.csr_matrix((np.ones(3), [4, 0, 2], [0, 3]), (1, 6))
    valid = sp.csr_matrix((1, 6))
    models.train('bpr', unsorted, valid, np.ones((1, 2)), np.ones((6, 2)),
                 np.random.default_rng(0), epochs=1, log=lambda line: None)
    assert unsorted.indices.tolist() == [4, 0, 2]               # the caller's stays as it was


@pytest.mark.parametrize('model', llminit.MODELS)
@pytest.mark.parametrize('strategy', llminit.STRATEGIES)
def test_each_model_runs_with_each_strategy(tmp_path, capsys, model, strategy):
    own = write_planted(tmp_path / 'own')
    options = ['--dataset', own, '--encoder', 'tfidf', '--dim', 16, '--epochs', 4,
               '--model', model, '--strategy', strategy, '--batch', 128, '--lr', .01]
    assert llminit.command(list(map(str, options))) == 0
    cells = capsys.readouterr().out.splitlines()[-1].split(' | ')
    text = strategy not in ('none', 'noise')
    shown = 'full' if model == 'morec' and text else strategy
    assert cells[1:3] == [model, shown]
    if shown in ('var', 'pca', 'proj', 'full'):                        # which cannot miss the text
        assert float(cells[4]) > .3                                    # chance: about .1


# ---- several processes ------------------------------------------------------------------------

def torchrun(W, *args, timeout=120):
    """A script under torchrun with W processes -> the finished process."""
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone',
               f'--nproc-per-node={W}', *args]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=timeout,
                          env={**os.environ, 'OMP_NUM_THREADS': '1'})


STEPS = '''
import json, sys
import numpy as np, torch
sys.path.insert(0, sys.argv[1])
import models, test_llminit
rank, _ = models.join('cpu')
observed, losses = test_llminit.random_graph(60, 50, .2), {}
for name in models.MODELS:
    for views in ('edge', 'walk') if name == 'sgl' else ('edge',):
        rng = np.random.default_rng(0)
        start = [rng.standard_normal((n, 10)).astype(np.float32) for n in observed.shape]
        start = [table[:, models.start_columns(name, 10)] for table in start]
        own = {'morec': {'dim': 9, 'rng': rng}, 'sgl': {'views': views}}.get(name, {})
        model = models.MODELS[name](models.adjacency(observed), *start, **own)
        step = models.optimiser(model, .01, .5)
        model.new_epoch(rng)
        triples = torch.from_numpy(rng.integers(0, 40, (20, 3, 33)))
        losses[name + views] = [float(step(batch)) for batch in triples]
        tables = [models.gathered(table).tolist() for table in model.embeddings()]
        losses[name + views + 'spectrum'] = list(models.spectrum(model.table.detach()).values())
        losses[name + views + 'tables'] = tables
if rank == 0:
    print(json.dumps(losses))
models.leave()
'''


def test_20_steps_of_every_model_agree_for_1_2_and_4_processes(tmp_path):
    (tmp_path / 'steps.py').write_text(STEPS)
    alone = subprocess.run([sys.executable, tmp_path / 'steps.py', HERE], capture_output=True)
    expected = json.loads(alone.stdout)
    assert len(expected) == 18 and all(np.isfinite(x).all() for x in expected['sgledge'])
    for W in (2, 4):                                                   # 10 and 9 columns: uneven
        done = torchrun(W, tmp_path / 'steps.py', HERE)
        found = json.loads(done.stdout)
        for name, values in expected.items():
            values, others = (np.concatenate([np.ravel(part) for part in some])
                              if name.endswith('tables') else np.array(some)
                              for some in (values, found[name]))
            # Adam's first steps have the sign of the gradient alone: a table may be off by more
            tolerance = dict(rtol=1e-3, atol=1e-4) if name.endswith('tables') else dict(rtol=1e-5)
            np.testing.assert_allclose(others, values, err_msg=f'{W} {name}', **tolerance)


@pytest.mark.parametrize('model', ['sgl', 'morec'])
def test_torchrun_prints_and_saves_what_one_process_does(tmp_path, capsys, model):
    own, vectors = write_planted(tmp_path / 'own'), tmp_path / 'v.npy'
    np.save(vectors, np.random.default_rng(0).standard_normal((60, 20)))
    options = ['--dataset', own, '--dim', 10, '--epochs', 3, '--encoder', vectors, '--model', model]
    assert llminit.command(list(map(str, [*options, '--save', tmp_path / 'one']))) == 0
    expected = capsys.readouterr().out.splitlines()
    done = torchrun(3, HERE / 'llminit.py', *options, '--save', tmp_path / 'three')
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(expected)                                 # the first one prints
    assert lines[-1].rsplit('|', 2)[0] == expected[-1].rsplit('|', 2)[0]       # all but seconds
    for name in llminit.TABLES:
        one, three = (np.load(tmp_path / run / name) for run in ('one', 'three'))
        assert one.shape == three.shape and np.abs(one - three).max() < .05 * np.abs(one).max()
    done = torchrun(2, HERE / 'llminit.py', '--load', tmp_path / 'three')
    assert done.stdout.splitlines()[-1].rsplit('|', 2)[0] == lines[-1].rsplit('|', 2)[0]


ENCODE = '''
import sys
sys.path.insert(0, sys.argv[1])
import embed, models, test_llminit
rank, _ = models.join('cpu')
asked = []
run = embed.run_mpnet
embed.run_mpnet = lambda texts, *args: asked.append(len(texts)) or run(texts, *args)
for _ in range(2):                                                     # the second is a hit
    vectors = embed.encode(test_llminit.TEXTS, sys.argv[2], cache=sys.argv[3], dtype='float32')
sys.stdout.write(f'{rank} {asked} {abs(vectors).sum()}\\n')             # in one piece
models.leave()
'''


def test_processes_that_would_train_different_runs_stop(tmp_path):
    own, port = write_planted(tmp_path / 'own'), free_port()
    some = [subprocess.Popen(list(map(str, [
        sys.executable, HERE / 'llminit.py', '--dataset', own, '--strategy', 'none', '--dim', 4,
        '--epochs', 2, '--seed', rank])), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'WORLD_SIZE': '2', 'RANK': str(rank),
             'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port)}) for rank in range(2)]
    for process in some:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 2 and 'different settings' in err and '| none |' not in out


def test_processes_share_the_texts_to_encode(tmp_path):
    tiny_mpnet(tmp_path / 'mpnet')
    (tmp_path / 'encode.py').write_text(ENCODE)
    done = torchrun(2, tmp_path / 'encode.py', HERE, tmp_path / 'mpnet', tmp_path / 'c2')
    lines = sorted(done.stdout.splitlines())
    n = len(set(TEXTS))
    shares = [f'0 [{(n + 1) // 2}', f'1 [{n // 2}']
    assert [line.split(']')[0] for line in lines] == shares, done.stderr
    alone = embed.encode(TEXTS, str(tmp_path / 'mpnet'), cache=tmp_path / 'c1', dtype='float32')
    both = embed.encode(TEXTS, str(tmp_path / 'mpnet'), cache=tmp_path / 'c2', dtype='float32')
    np.testing.assert_allclose(both, alone, atol=1e-6)
    assert len(list((tmp_path / 'c2' / 'vectors').iterdir())) == 1


def test_more_processes_than_dimensions_and_other_errors_are_one_line(tmp_path):
    own = write_planted(tmp_path / 'own')
    for flags, message in ((['--dim', 2, '--strategy', 'none'], 'start at most 2'),
                           (['--dim', 4000], 'cannot keep 4000'), (['--dim', 'x'], 'whole number')):
        done = torchrun(3, HERE / 'llminit.py', '--dataset', own, '--encoder', 'tfidf', *flags)
        said = [line for line in done.stderr.splitlines() if 'llminit: error' in line]
        assert done.returncode and len(said) == 1 and message in said[0], done.stderr


def test_when_a_process_dies_the_others_stop_and_say_so(tmp_path):
    own, port = write_planted(tmp_path / 'own'), free_port()
    command = [sys.executable, HERE / 'llminit.py', '--dataset', own, '--strategy', 'none',
               '--epochs', 100_000, '--patience', 100_000]
    common = {**os.environ, 'OMP_NUM_THREADS': '1', 'WORLD_SIZE': '3', 'MASTER_PORT': str(port),
              'MASTER_ADDR': '127.0.0.1'}
    # without torchrun, which would stop them itself: as if on three machines
    some = [subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True,
                             stderr=subprocess.PIPE, env={**common, 'RANK': str(rank)})
            for rank in range(3)]
    while not some[0].stdout.readline().startswith('epoch   3'):
        assert some[0].poll() is None
    some[1].kill()
    killed = time.monotonic()
    for process in (some[0], some[2]):
        _, err = process.communicate(timeout=60)
        assert process.returncode == 2 and time.monotonic() - killed < 60
        assert err.splitlines()[-1].startswith('llminit: error: another process is gone'), err


# ---- grids, the results file, the report ------------------------------------------------------

def report(*args):
    """Lines that experiments/report.py prints, and its exit code and error."""
    command = [sys.executable, HERE / 'experiments' / 'report.py', *args]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    return done.stdout.splitlines(), done.returncode, done.stderr


GRID = ['--encoder', 'tfidf', '--dim', '8,16', '--epochs', '2', '--model', 'bpr,morec',
        '--strategy', 'none,rand,var', '--seeds', '2']


def test_a_grid_runs_every_cell_once_and_goes_on_where_it_was_cut(tmp_path, capsys, monkeypatch):
    own, results = write_planted(tmp_path / 'own'), tmp_path / 'r.jsonl'
    options = ['--dataset', str(own), *GRID, '--results', str(results)]
    trained, loaded, train, load = [], [], models.train, data.load

    def stop_after_five(*args, **kwargs):
        trained.append(args[0])
        if len(trained) == 6:
            raise KeyboardInterrupt
        return train(*args, **kwargs)
    monkeypatch.setattr(models, 'train', stop_after_five)
    monkeypatch.setattr(data, 'load', lambda *a, **k: loaded.append(a) or load(*a, **k))
    assert llminit.command(options) == 130
    first = results.read_bytes()
    assert first.count(b'\n') == 5 and len(loaded) == 1
    results.write_bytes(first[:-40])                                   # cut off in its last line
    capsys.readouterr()
    assert llminit.command(options) == 0
    out, err = capsys.readouterr()
    # a seed: bpr 3 strategies x 2 dims; morec: rand and var are both 'full', so 2 x 2
    assert len(trained) == 6 + 20 - 4
    assert err.count('1 damaged lines') == 1 and '20 runs are in' in err
    assert out.count('| dataset |') == 1 and out.count('\n') == 2 + 16    # one header
    rows, damaged = llminit.read_results(results)
    assert damaged == 1 and len(rows) == len({json.dumps(row['settings']) for row in rows}) == 20
    assert [row['settings']['seed'] for row in rows] == [0] * 10 + [1] * 10
    assert llminit.command(options) == 0 and len(trained) == 22        # all are there
    for row in rows:
        assert len(row['curve']) == 2 and row['test'].keys() == row['valid'].keys()
        apart = row['by training interactions, from'].values()
        assert sum(part['users'] for part in apart) == 120
        whole = sum(part['users'] * part['NDCG@10'] for part in apart) / 120
        assert abs(whole - row['test']['NDCG@10']) < 1e-9


def test_a_cell_of_a_grid_is_the_run_by_itself(tmp_path, capsys):
    own = write_planted(tmp_path / 'own')
    base = ['--dataset', str(own), '--encoder', 'tfidf', '--epochs', '2', '--batch', '64']
    results = str(tmp_path / 'r.jsonl')
    many = [*base, '--dim', '8,16', '--cold', '0,.5', '--strategy', 'none,var', '--seeds', '2']
    assert llminit.command([*many, '--results', results]) == 0
    out = capsys.readouterr().out.splitlines()[2:]
    assert len(out) == 16
    for dim, cold, strategy, seed in (('16', '.5', 'var', '1'), ('8', '0', 'none', '0')):
        assert llminit.command([*base, '--dim', dim, '--cold', cold, '--strategy', strategy,
                                '--seed', seed]) == 0
        alone = capsys.readouterr().out.splitlines()[-1]
        assert alone.rsplit('|', 2)[0] in [line.rsplit('|', 2)[0] for line in out]    # but seconds


def test_of_flags_that_no_run_uses_it_is_told_and_saving_is_for_one_run(tmp_path, capsys):
    cells = llminit.parse(['--strategy', 'none,var', '--whiten', '.5', '--pool', 'sqrt'])
    assert [cell.pool for cell in cells] == ['mean', 'sqrt'] and cells[1].whiten == 0
    assert capsys.readouterr().err == 'note: no run here uses --whiten\n'
    with pytest.raises(SystemExit) as stop:
        llminit.parse(['--seeds', '2', '--save', str(tmp_path / 'run')])
    assert stop.value.code == 2 and 'for one' in capsys.readouterr().err
    for wrong in (['--strategy', 'var,best'], ['--dim', '8,x'], ['--cold', '.5,2'],
                  ['--model', ''], ['--seeds', '0'], ['--dataset', 'beauty,ofice'],
                  ['--encoder', 'tfidf,tfdf'], ['--encoder', 'openai:']):
        with pytest.raises(SystemExit) as stop:
            llminit.parse(wrong)
        assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


@given(st.integers(0, 2 ** 32), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_thin_removes_a_share_and_leaves_everyone_one(seed, share):
    train = random_graph(40, 30, .3, seed)
    left = data.thin(train, share, np.random.default_rng(seed))
    had, has = np.diff(train.indptr), np.diff(left.indptr)
    assert left.shape == train.shape and left.dtype == np.float32 and (left.data == 1).all()
    assert not (left > train).nnz                                      # only what was there
    assert (has >= np.minimum(had, 1)).all() and (has <= had).all()
    assert (np.abs(had - has - share * had) < 1)[had > 1].all() or share > .9
    again = data.thin(train, share, np.random.default_rng(seed))
    assert (left != again).nnz == 0


def test_what_cannot_be_written_shows_before_the_training(tmp_path, capsys, monkeypatch):
    own = write_planted(tmp_path / 'own')
    monkeypatch.setattr(models, 'train', None)                         # is not reached
    given = ['--dataset', str(own), '--strategy', 'none', '--dim', '4']
    assert llminit.command([*given, '--results', os.devnull + '/r.jsonl']) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_run_that_is_in_the_file_is_told_and_run_again_to_be_saved(tmp_path, capsys):
    own, saved = write_planted(tmp_path / 'own, in'), tmp_path / 'saved'   # a comma in a path
    given = ['--dataset', str(own), '--strategy', 'none', '--dim', '4', '--epochs', '1',
             '--results', str(tmp_path / 'new' / 'r.jsonl')]
    assert llminit.command(given) == 0 and capsys.readouterr().out
    assert llminit.command(given) == 0
    out, err = capsys.readouterr()
    assert not out and 'this run is in' in err
    assert llminit.command([*given, '--save', str(saved)]) == 0 and (saved / 'run.json').exists()
    assert llminit.DATASETS == tuple(data.FOLDERS)


def test_a_file_of_something_else_is_no_results_file(tmp_path, capsys):
    own, notes = write_planted(tmp_path / 'own'), tmp_path / 'notes.csv'
    notes.write_text('user,note\nann,"[1"\n')
    given = ['--dataset', str(own), '--strategy', 'none', '--results', str(notes)]
    assert llminit.command(given) == 2 and 'is no results file' in capsys.readouterr().err
    assert notes.read_text() == 'user,note\nann,"[1"\n'


def test_a_row_of_another_training_is_another_run(tmp_path, capsys, monkeypatch):
    own, results = write_planted(tmp_path / 'own'), tmp_path / 'r.jsonl'
    given = ['--dataset', str(own), '--strategy', 'none', '--epochs', '1',
             '--results', str(results)]
    for patience, rows in ((20, 1), (20, 1), (7, 2)):                  # the preset itself changes
        monkeypatch.setitem(llminit.OUR_TRAINING, 'patience', patience)
        assert llminit.command(given) == 0 and len(llminit.read_results(results)[0]) == rows


def test_another_endpoint_is_another_run(tmp_path, capsys, monkeypatch):
    own, results = write_planted(tmp_path / 'own'), str(tmp_path / 'r.jsonl')
    monkeypatch.setattr(embed, 'encode', lambda texts, *args, **kwargs: np.eye(
        len(texts), 32, dtype=np.float32) + len(os.environ['OPENAI_BASE_URL']))
    for url, told in (('http://a/v1', 0), ('http://a/v1/', 1), ('http://bc/v1', 0)):
        monkeypatch.setenv('OPENAI_BASE_URL', url)
        assert llminit.command(['--dataset', str(own), '--encoder', 'openai:m', '--epochs', '1',
                                '--dim', '8', '--results', results]) == 0
        assert ('this run is in' in capsys.readouterr().err) == told
    rows, _ = llminit.read_results(results)
    urls = [row['settings']['endpoint'] for row in rows]
    assert urls == ['http://a/v1', 'http://bc/v1']
    assert llminit.command(['--dataset', str(own), '--encoder', 'openai:m', '--epochs', '1',
                            '--dim', '8', '--save', str(tmp_path / 'run')]) == 0
    assert llminit.command(['--load', str(tmp_path / 'run')]) == 0


def test_on_a_terminal_a_grid_has_one_live_line_that_an_error_replaces(tmp_path):
    pty = pytest.importorskip('pty')
    own = write_planted(tmp_path / 'own')
    command = [sys.executable, HERE / 'llminit.py', '--dataset', own, '--encoder', 'tfidf', '--dim',
               '8,5000', '--epochs', '2', '--results', tmp_path / 'r.jsonl']
    ours, theirs = pty.openpty()
    done = subprocess.Popen(list(map(str, command)), stdout=theirs, stderr=theirs,
                            env={**os.environ, 'COLUMNS': '80'})
    os.close(theirs)
    out = b''
    with contextlib.suppress(OSError):                                 # the end of a terminal
        while part := os.read(ours, 4096):
            out += part
    assert done.wait() == 2
    lines = [line.rpartition('\r')[2] for line in out.decode().replace('\r\n', '\n').split('\n')]
    live = [part for part in out.decode().split('\r') if part.startswith('1/2 epoch 2, best 0.')]
    assert live and len(live[0].removesuffix('\x1b[K')) < 80
    assert '; time left unknown; ' in live[0] and str(own)[:9] in live[0]
    assert any(line.startswith('\x1b[Kllminit: error: cannot keep 5000') for line in lines)
    assert '\x1b[Kllminit: error: 1 of 2 runs failed' in out.decode()


def test_a_cell_that_cannot_run_does_not_stop_the_others(tmp_path, capsys):
    own, results = write_planted(tmp_path / 'own'), tmp_path / 'r.jsonl'
    given = ['--dataset', own, '--encoder', 'tfidf', '--dim', '999,4,8', '--epochs', 1,
             '--results', results]
    assert llminit.command(list(map(str, given))) == 2
    said = capsys.readouterr()
    assert [line[:3] for line in said.out.splitlines()] == ['| d', '| -'] + ['| /'] * 2
    told = [line for line in said.err.splitlines() if not line.startswith('run ')]
    assert told[0].startswith('llminit: error: cannot keep 999') and 'K=999' in told[0]
    assert told[1:] == [f'2 runs are in {results}', 'llminit: error: 1 of 3 runs failed']


def test_equal_rows_have_p_1_and_other_users_none(tmp_path):
    ndcg = np.where(np.arange(300) % 7 == 0, 1., 0)
    other = np.where(np.arange(300) % 3 == 0, 1., 0)
    runs = [fake_run('none', 0, ndcg), fake_run('uni', 0, ndcg), fake_run('var', 0, other),
            fake_run('rand', 0, ndcg[:200])]
    (tmp_path / 'r.jsonl').write_text('\n'.join(map(json.dumps, runs)))
    lines, code, _ = report('table', tmp_path / 'r.jsonl')
    cells = [line.split('|') for line in lines if '| 1 |' in line]
    p = {cell[1].strip(): cell[5].strip() for cell in cells}
    assert code == 0 and p['uni'] == '1' and p['rand'] == '' and 0 < float(p['var']) < 1e-3


def test_thin_draws_evenly_and_loses_the_share_of_the_whole():
    train = sp.csr_matrix(np.ones((4000, 5), np.float32))
    left = data.thin(train, .5, np.random.default_rng(0))
    assert abs(left.nnz / train.nnz - .5) < .01
    assert np.ptp(left.getnnz(axis=0)) < 250                           # 2,000 each, sigma 32


def test_the_spectrum_of_a_table():
    flat = models.spectrum(torch.eye(6))
    assert abs(flat['abundance'] - 6) < 1e-6 and abs(flat['effective rank'] - 6) < 1e-6
    table = np.random.default_rng(0).standard_normal((50, 6)) * [8, 4, 2, 1, .5, .1]
    s = np.linalg.svd(table, compute_uv=False)
    found, p = models.spectrum(torch.from_numpy(table)), s / s.sum()
    assert abs(found['abundance'] - s.sum() / s[0]) < 1e-6
    assert abs(found['effective rank'] - np.exp(-(p * np.log(p)).sum())) < 1e-6


def fake_run(strategy, seed, ndcg, dataset='office', **more):
    """A row of a results file whose users have the given NDCG@10."""
    given = {'dataset': dataset, 'strategy': strategy, 'seed': seed, 'model': 'sgcl', 'dim': 8,
             'cold': 0., 'seen': 'keep', 'preset': 'paper', 'encoder': 'mpnet', **more}
    scores = {'Recall@10': float(np.mean(ndcg > 0)), 'NDCG@10': float(np.mean(ndcg))}
    part = {'abundance': 2., 'effective rank': 3.}
    return {'settings': given, 'K': given['dim'], 'test': scores, 'valid': scores,
            'best epoch': 2, 'parameters': 9, 'seconds': 3., 'paper': '.1/.2',
            'ranks': llminit.pack(ndcg), 'curve': [[1., .1, 1.], [.9, .2, 1.]],
            'spectrum': {'users': part, 'items': part},
            'by training interactions, from': {'3': {'users': 5, **scores},
                                               '5': {'users': 4, **scores}}}


def fake_results(path):
    """A results file of three strategies, two seeds; returns {strategy: ndcg (2, n)}."""
    rng, runs = np.random.default_rng(0), {}
    for strategy, chance in (('var', .35), ('none', .1), ('rand', .3)):      # in no order
        rank = rng.integers(0, 10, (2, 900))
        runs[strategy] = np.where(rng.random((2, 900)) < chance, 1 / np.log2(2. + rank), 0)
    path.write_text(''.join(json.dumps(fake_run(strategy, seed, ndcg[seed])) + '\n'
                            for strategy, ndcg in runs.items() for seed in (0, 1)))
    return runs


def test_the_report_is_mean_deviation_gain_and_holms_p(tmp_path):
    runs = fake_results(tmp_path / 'r.jsonl')
    lines, code, _ = report('table', tmp_path / 'r.jsonl', '--show', 'cost', 'valid', 'spectrum',
                            'activity')
    assert code == 0 and '2 comparisons' in lines[0]
    at = next(n for n, line in enumerate(lines) if line.startswith('| strategy'))
    head = [cell.strip() for cell in lines[at].strip('|').split('|')]
    rows = [dict(zip(head, (cell.strip() for cell in line.strip('|').split('|'))))
            for line in lines[at + 2:]]
    assert [row['strategy'] for row in rows] == ['none', 'rand', 'var']
    from scipy import stats                # p of the smaller one is doubled, of the other not
    p = {name: stats.ttest_rel(runs[name].mean(0), runs['none'].mean(0)).pvalue
         for name in ('rand', 'var')}
    small, large = sorted(p, key=p.get)
    expected = {small: 2 * p[small], large: max(2 * p[small], p[large])}
    for row in rows:
        ndcg = runs[row['strategy']].mean(1)
        assert row['NDCG@10'] == f'{ndcg.mean():.4f} +- {ndcg.std(ddof=1):.4f}'
        assert row['paper'] == '.1/.2' and row['seeds'] == '2' and row['from 5']
        if row['strategy'] != 'none':
            assert row['p'] == f'{expected[row["strategy"]]:.1g}'
            assert row['gain'] == f'{ndcg.mean() / runs["none"].mean() - 1:+.1%}'
    assert 'over rand' in report('table', tmp_path / 'r.jsonl', '--against', 'rand')[0][0]


def test_the_report_leaves_damage_out_and_says_what_is_wrong(tmp_path):
    fake_results(tmp_path / 'r.jsonl')
    good = (tmp_path / 'r.jsonl').read_text()
    broken = json.loads(good.splitlines()[0])
    broken['ranks'] = llminit.pack(np.zeros(900))                      # not those of its score
    (tmp_path / 'r.jsonl').write_text(f'{{"cut\n[]\n{json.dumps(broken)}\n{good[:-9]}')
    lines, code, err = report('table', tmp_path / 'r.jsonl')
    assert code == 0 and err.count('left out') == 4 and any('| var |' in line for line in lines)
    (tmp_path / 'other.jsonl').write_text(json.dumps({'settings': {}, **{
        name: value for name, value in json.loads(good.splitlines()[0]).items()
        if name != 'settings'}}))
    for args in (['table', tmp_path / 'nothing'], ['table', tmp_path / 'r.jsonl', '--only', 'x=1'],
                 ['table', '--only', 'model=sgl', tmp_path / 'r.jsonl'],
                 ['table', tmp_path / 'other.jsonl'], ['plot', tmp_path / 'r.jsonl'],
                 ['table', tmp_path / 'r.jsonl', '--against', 'typo']):
        lines, code, err = report(*args)
        assert code == 1 and not lines and err.splitlines()[-1].startswith('report: ')
    assert (tmp_path / 'r.jsonl').read_text().endswith(good[:-9])      # no figure over the results
    lines, code, _ = report('table', '--only', 'cold=0', 'strategy=var,none', tmp_path / 'r.jsonl')
    assert code == 0 and sum(line.startswith('| ') for line in lines) == 2 + 2


def test_the_report_leaves_out_a_run_that_lacks_a_number(tmp_path):
    ndcg, runs = np.where(np.arange(30) % 7 == 0, 1., 0), []
    for n, (part, name) in enumerate([
            ('test', 'Recall@10'), ('valid', 'NDCG@10'), ('spectrum', 'users'), ('', 'spectrum'),
            ('', 'curve'), ('', 'seconds'), ('settings', 'seed'), ('settings', 'dataset')] * 2):
        runs.append(fake_run('uni', n, ndcg))
        (runs[n][part] if part else runs[n])[name] = None if n < 8 else {'x': 1}
    lines = map(json.dumps, [fake_run('none', 0, ndcg), *runs, fake_run('var', 0, ndcg)])
    (tmp_path / 'r.jsonl').write_bytes('\n'.join(lines).encode() + b'\n\xff\n')
    for args in (['table', '--show', 'cost', 'valid', 'spectrum', 'activity'], ['time']):
        lines, code, err = report(args[0], tmp_path / 'r.jsonl', *args[1:])
        assert code == 0 and err.count('left out') == 17 and 'Traceback' not in err
        assert not any('uni' in line for line in lines)


def test_runs_with_other_training_or_seeds_are_told_apart(tmp_path):
    ndcg = np.where(np.arange(30) % 7 == 0, 1., 0)
    runs = [fake_run(strategy, seed, np.roll(ndcg, seed)) | {'training': {'batch': 256}}
            for strategy, seed in (('none', 0), ('none', 1), ('var', 0))]
    (tmp_path / 'r.jsonl').write_text('\n'.join(map(json.dumps, runs)))
    lines, _, _ = report('table', tmp_path / 'r.jsonl')
    assert lines[0].endswith('where the seeds differ over those that both rows have')
    runs[1]['training'] = {'batch': 7}
    (tmp_path / 'r.jsonl').write_text('\n'.join(map(json.dumps, runs)))
    lines, _, _ = report('table', tmp_path / 'r.jsonl')
    assert any(line.startswith('| none batch=7 ') for line in lines)
    lines, _, _ = report('table', tmp_path / 'r.jsonl', '--only', 'batch=256', '--only', 'seed=0')
    assert len([line for line in lines if line.startswith('| ')]) == 4


def test_an_endpoint_stands_there_where_an_encoder_has_several(tmp_path):
    ndcg = np.where(np.arange(300) % 7 == 0, 1., 0)
    runs = [fake_run('none', 0, ndcg), fake_run('var', 0, ndcg, encoder='openai:m', endpoint='a')]
    other = fake_run('var', 0, ndcg, encoder='openai:m', endpoint='b')
    for more, told in ([], False), ([other], True):
        (tmp_path / 'r.jsonl').write_text('\n'.join(map(json.dumps, runs + more)))
        lines = report('table', tmp_path / 'r.jsonl')[0]
        assert any('endpoint' in line for line in lines) == told
        assert sum('| 1 |' in line for line in lines) == 2 + told      # with their p of 1


def test_the_minutes_of_runs_are_added_up(tmp_path):
    fake_results(tmp_path / 'r.jsonl')                                 # six runs of three seconds
    lines, code, _ = report('time', tmp_path / 'r.jsonl')
    assert code == 0 and lines[-1] == '| all |  |  |  | 6 | 0 |'
    assert lines[2] == '| office | sgcl | keep | paper | 6 | 0 |'


def test_a_full_table_stands_by_its_own_size(tmp_path):
    ndcg = np.where(np.arange(300) % 7 == 0, 1., 0)
    runs = [fake_run('none', 0, ndcg, dim=24), fake_run('none', 0, ndcg[::-1], dim=8),
            fake_run('full', 0, ndcg, dim=8) | {'K': 24}]
    (tmp_path / 'r.jsonl').write_text('\n'.join(map(json.dumps, runs)))
    rows = [line.split(' | ') for line in report('table', tmp_path / 'r.jsonl')[0]]
    assert next(row for row in rows if 'full' in row)[:6:5] == ['| 24', '1']


@pytest.mark.parametrize('x', ['dim', 'cold', 'users', 'epoch'])
def test_the_figures_are_drawn_or_matplotlib_is_asked_for(tmp_path, x):
    runs = [fake_run(strategy, 0, np.full(9, 1.), dim=dim, cold=cold, dataset=dataset)
            for dataset in ('office', 'beauty') for strategy in ('none', 'var')
            for dim in ((8, 16) if x == 'dim' else (8,))
            for cold in ((0., .5) if x == 'cold' else (0.,))]
    (tmp_path / 'r.jsonl').write_text('\n'.join(map(json.dumps, runs)))
    lines, code, err = report('plot', tmp_path / 'f.png', tmp_path / 'r.jsonl', '--x', x)
    if importlib.util.find_spec('matplotlib'):
        assert code == 0 and (tmp_path / 'f.png').read_bytes().startswith(b'\x89PNG')
    else:
        assert code == 1 and err == 'report: the figures need matplotlib: pip install matplotlib\n'


# ---- data.py ---------------------------------------------------------------------------------

INTER = 'user_id:token\titem_id:token\trating:float\ttimestamp:float\n'
ITEM = 'item_id:token\ttitle:token_seq\tbrand:token_seq\n'
pairs = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 9)), max_size=120, unique=True)


@pytest.fixture
def folder(tmp_path):
    """folder(name=text or bytes, ...) writes files ('__' stands for '.'), returns their folder."""
    def write(**files):
        own = tmp_path / 'own'
        own.mkdir(exist_ok=True)
        for name, text in files.items():
            text = text.encode() if isinstance(text, str) else text
            (own / name.replace('__', '.')).write_bytes(text)
        return str(own)
    return write


def edges(loaded):
    """{(user id, item id)} of what load returned."""
    matrix, _, _, users, items, _ = loaded
    assert matrix.has_sorted_indices and matrix.dtype == np.float32 and (matrix.data == 1).all()
    return {(users[u], items[i]) for u, i in zip(*matrix.nonzero())}


def fails(message, dataset, *args, **kwargs):
    with pytest.raises((ValueError, OSError)) as caught:
        data.load(dataset, *args, **kwargs)
    text = str(caught.value)
    assert message in text, text
    assert '\n' not in text and '\r' not in text
    return text


# -- k-core and split --------------------------------------------------------------------------

def naive_core(edges, core):
    while True:
        users, items = [u for u, _ in edges], [i for _, i in edges]
        kept = [(u, i) for u, i in edges if users.count(u) >= core and items.count(i) >= core]
        if kept == edges:
            return kept
        edges = kept


@settings(max_examples=150, deadline=None)
@given(pairs, st.integers(0, 5))
def test_k_core_agrees_with_a_naive_loop(edges, core):
    users, items = (np.array([edge[side] for edge in edges], int) for side in (0, 1))
    kept = data.k_core(users, items, core)
    assert [edges[k] for k in kept] == naive_core(edges, core)


@settings(max_examples=150, deadline=None)
@given(pairs, st.integers(0, 2**32))
def test_split_leaves_one_out(edges, seed):
    matrix = sp.csr_matrix((np.ones(len(edges), np.float32),
                            ([u for u, _ in edges], [i for _, i in edges])), shape=(13, 10))
    train, valid, test = data.split(matrix, np.random.default_rng(seed))
    count = np.diff(matrix.indptr)
    assert ((train + valid + test) != matrix).nnz == 0         # disjoint, and nothing lost
    assert train.shape == valid.shape == test.shape == matrix.shape
    assert (np.diff(test.indptr) == (count >= 2)).all()
    assert (np.diff(valid.indptr) == (count >= 3)).all()
    again = data.split(matrix, np.random.default_rng(seed))
    assert all((a != b).nnz == 0 for a, b in zip((train, valid, test), again))


def test_split_is_uniform_over_a_users_items():
    matrix = sp.csr_matrix(np.ones((20000, 4), np.float32))
    train, valid, test = data.split(matrix, np.random.default_rng(0))
    chosen = np.zeros((4, 4))
    np.add.at(chosen, (test.indices, valid.indices), 1)
    assert (chosen.diagonal() == 0).all()
    assert abs(chosen[~np.eye(4, dtype=bool)] - 20000 / 12).max() < 200    # 5 sigma


# -- filters, order ----------------------------------------------------------------------------

def test_filters_on_a_hand_made_example(folder, capsys):
    """Written out: d is unknown, (u2, b, 3) is low, (u1, a) stands twice, u4 has one item left.
    In the 2-core stay u3 {b, a}, u1 {a, b}; c falls with u4."""
    own = folder(x__inter=INTER + 'u3\tb\t5\t1\nu1\ta\t4\t1\nu1\ta\t5\t2\n' +
                 'u1\tb\t4\t3\nu3\ta\t4\t1\n'
                 'u2\ta\t5\t1\nu2\tb\t3\t1\nu4\tc\t5\t1\nu4\td\t5\t1\n',
                 x__item=ITEM + 'c\tSea\tC\na\tApple "A"\tAcme\nz\tNever\tZ\nb\tBall\t\n')
    loaded = data.load(own, core=2)
    matrix, texts, titles, users, items, low = loaded
    assert users == ['u3', 'u1']                       # first appearance
    assert items == ['a', 'b']                         # order of the item file
    assert matrix.toarray().tolist() == [[1, 1], [1, 1]] and low.toarray().tolist() == [[0, 0]] * 2
    assert texts == ['Apple "A" Acme', 'Ball'] and titles == ['Apple "A"', 'Ball']
    said = capsys.readouterr()
    assert said.out == '' and said.err == (
        f'note: {own}: 9 rows: 8 positive, 7 of them with items of the item file, 6 distinct, '
        '4 in the 2-core\n'
        'note: 2 users with fewer than 3 interactions: with 2 they train and test, with 1 they '
        'only train\n')
    assert data.load(own, core=1)[4] == data.load(own, core=0)[4] == ['c', 'a', 'b']
    *_, users, items, low = data.load(own, core=1)
    assert [(users[u], items[i]) for u, i in zip(*low.nonzero())] == [('u2', 'b')]
    assert edges(data.load(own, core=1, min_rating=5)) == {('u3', 'b'), ('u1', 'a'), ('u2', 'a'),
                                                           ('u4', 'c')}


def test_ids_stay_strings(folder):
    own = folder(i__csv='user_id,item_id\n007,1\n7,1\n7,01\n', items__csv='item_id,t\n1,a\n01,b\n')
    assert edges(data.load(own, core=1)) == {('007', '1'), ('7', '1'), ('7', '01')}


def test_ratings_missing_comma_and_broken(folder, capsys):
    own = folder(i__csv='user_id;item_id;rating\na;1;4,5\nb;1;\nc;1;NaN\nd;1;good\ne;1;3\n;1;5\n',
                 items__csv='item_id;t\n1;x\n')
    assert edges(data.load(own, core=1)) == {('a', '1'), ('b', '1'), ('c', '1')}
    said = capsys.readouterr().err
    assert '2 rows without a rating count as positive' in said and '2 rows dropped: no id' in said


def test_items_without_text_and_repeated_items(folder, capsys):
    own = folder(i__csv='user_id,item_id\na,1\na,2\n',
                 items__csv='item_id,t,u\n2,,\n1,one,\n1,two,\n')
    assert data.load(own, core=1)[1] == ['', 'one']
    said = capsys.readouterr().err
    assert 'note: 1 items without text' in said and '1 rows repeat an item_id' in said


def test_text_columns(folder):
    own = folder(i__csv='user_id,item_id\na,1\n', items__csv='item_id,price,info,name,year:token\n'
                 '1,9.5,big  and\tred,Ball,1999\n')
    _, texts, titles, *_ = data.load(own, core=1)
    assert texts == ['big and red Ball 1999'] and titles == ['Ball']     # price: numbers only
    assert data.load(own, core=1, text_columns=['name', 'price'])[1] == ['Ball 9.5']
    fails('no column colour; found item_id, price', own, core=1, text_columns=['name', 'colour'])


def test_what_the_settings_can_do_wrong_is_said(folder):
    own = folder(i__csv='user_id,item_id,rating\na,1,5\nb,1,4\n',
                 items__csv='item_id,Title\n1,x\n')
    fails('nothing left of 2 rows: 0 positive', own, core=1, min_rating=6)
    fails('0 in the 3-core; lower min_rating or core', own, core=3)
    fails('no column colour; found item_id, Title', own, text_columns=['colour'])
    assert data.load(own, core=1, text_columns=['title'])[1] == ['x']
    fails('no text column', own, text_columns=[])
    assert edges(data.load(own, core=1, min_rating=5)) == {('a', '1')}
    assert edges(data.load(own, core=1, min_rating=-np.inf)) == {('a', '1'), ('b', '1')}


def test_other_scripts(folder):
    text = 'Größe \u200b中文 \u0928\u092e\u0938 \u05e9\u05dc\u05d5\u05dd 🧴'
    own = folder(i__csv='user_id,item_id\nпользователь,三\n',
                 items__csv=f'item_id,t\n三,{text}\n')
    loaded = data.load(own, core=1)
    assert loaded[1] == [text] and edges(loaded) == {('пользователь', '三')}


# -- the reader --------------------------------------------------------------------------------

ROWS = [('u 1', 'é', '5'), ('u2', '二', '4'), ('u2', 'é', '1')]


@pytest.mark.parametrize('delimiter', ['\t', ',', ';', '|'])
@pytest.mark.parametrize('end', ['\n', '\r\n', '\r'])
@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16'])
@pytest.mark.parametrize('packed', [False, True])
def test_delimiters_line_ends_marks_and_gz(folder, delimiter, end, encoding, packed):
    def file(*rows):
        text = end.join([delimiter.join(row) for row in rows] + ['']).encode(encoding)
        return gzip.compress(text) if packed else text
    own = folder(**{'x__csv' + '__gz' * packed: file(('userId', 'ITEM_ID', 'rating'), *ROWS),
                    'y__tsv' + '__gz' * packed:
                    file(('item id', 'title'), ('é', 'é"s'), ('二', '三'))})
    loaded = data.load(own, core=1)
    assert edges(loaded) == {('u 1', 'é'), ('u2', '二')}
    assert loaded[1] == ['é"s', '三']


@pytest.mark.parametrize('ratings, items, told', [
    ('userId,movieId,rating,timestamp\n1,10,4.0,9\n2,11,5,9\n', 'movieId,title\n10,Tea\n11,Cup\n',
     []),
    ('"User","Item"\n1,10\n2,11\n', '"asin","Product Name"\n10,Tea\n11,Cup\n', []),
    ('1\t10\t4\t881250949\n2\t11\t5\t881250949\n', '10|Tea|hot\n11|Cup|\n',
     ['user_id, item_id, rating, timestamp', 'item_id, title, column_3']),
    ('1;10\n2;11\n', '10;Tea\n11;Cup\n', ['user_id, item_id', 'item_id, title']),
    ('1,10,,9645\n2,11,5,\n', '11\tCup\t1996\n10\tTea, green, 100 bags\t1995\n',
     ['user_id, item_id, rating, timestamp', 'item_id, title, column_3'])])
def test_other_names_and_no_header(folder, capsys, ratings, items, told):
    own = folder(a__csv=ratings, b__txt=items)
    loaded = data.load(own, core=1)
    assert edges(loaded) == {('1', '10'), ('2', '11')}
    titles = [title.split(',')[0] for title in loaded[2]]
    assert sorted(zip(loaded[4], titles)) == [('10', 'Tea'), ('11', 'Cup')]
    notes = [line for line in capsys.readouterr().err.splitlines() if 'no header' in line]
    assert [line.partition('columns are ')[2] for line in notes] == told


def test_public_sets_as_they_are_unpacked(folder):
    own = folder(README__txt='MovieLens\n\nmany words, and signs: 1,2\n',
                 links__csv='movieId,imdbId\n10,7\n',
                 tags__csv='userId,movieId,tag,timestamp\n1,10,nice,9\n',
                 RATINGS__CSV='userId,movieId,rating,timestamp\n1,10,4.0,9\n',
                 movies__csv='movieId,title,genres\n10,"Tea, The (1995)",Drama|Film\n')
    assert edges(data.load(own, core=1)) == {('1', '10')}
    shutil.rmtree(own)                       # Amazon of 2023: the meta file knows parent_asin alone
    own = folder(a__csv='rating,asin,parent_asin,user_id\n5.0,X,P,u\n5.0,P,Q,u\n5.0,P,P,v\n',
                 meta__csv='parent_asin,title,price\nP,Tea,None\nQ,nan,3\n')
    loaded = data.load(own, core=1)
    assert edges(loaded) == {('u', 'P'), ('u', 'Q'), ('v', 'P')} and loaded[1] == ['Tea', '']


def test_columns_in_other_scripts_and_an_item_that_is_a_name(folder):
    own = folder(a__csv='product_id,user,rating\n1,u,5\n',
                 b__csv='product_id,item,説明,タイトル\n1,cup,green,Tea\n')
    loaded = data.load(own, core=1, text_columns=['タイトル'])
    assert edges(loaded) == {('u', '1')} and loaded[1] == ['Tea']
    assert data.load(own, core=1)[1] == ['cup green Tea']


def test_blanks_around_ids_are_none_of_theirs(folder):
    own = folder(a__tsv='user_id\titem_id\trating\nu \t1\t5\n u\t 2\t5\n \t1\t5\nv\t1 \t5 \n',
                 b__tsv='item_id\ttitle\n 1\tTea\n2\tCup\n1 \tTea again\n')
    loaded = data.load(own, core=1)
    assert edges(loaded) == {('u', '1'), ('u', '2'), ('v', '1')} and loaded[2] == ['Tea', 'Cup']


def test_a_name_wins_over_its_aliases_and_a_header_over_numbers(folder):
    own = folder(a__csv='user,user_id,item,item_id,2020\nx,u,y,1,5\n', b__csv='item_id,3\n1,Tea\n')
    assert edges(data.load(own, core=1)) == {('u', '1')}
    own = folder(a__csv='customer,sku\nu,1\n')             # may be a header: nothing is guessed
    fails('found a.csv (customer, sku); b.csv (item_id, 3)', own)


def test_quotes_are_known_to_csv_only(folder):
    own = folder(x__csv='"user_id","item_id"\n"a,b","1"\n',
                 y__csv='item_id, title\n1, "a ""b"",\nc"\n')
    loaded = data.load(own, core=1)
    assert loaded[1] == ['a "b", c'] and loaded[3] == ['a,b']
    own = folder(x__csv='user_id\titem_id\n"a\t1\n', y__csv='item_id\ttitle\n1\t"a ""b\n')
    loaded = data.load(own, core=1)
    assert loaded[1] == ['"a ""b'] and loaded[3] == ['"a']


def test_quotes_around_cells_are_taken_off_but_in_atomic_files(folder):
    own = folder(x__tsv='"user_id"\t"item_id"\n"a"\t"1"\n',           # as R and pandas write them
                 y__tsv='item_id\ttitle\n1\t"19"" tube"\n2\t"Tea" for "two"\n')
    loaded = data.load(own, core=1)
    assert edges(loaded) == {('a', '1')} and loaded[1] == ['19" tube']
    own = folder(x__inter=INTER + '"a"\t1\t5\t0\n', x__item=ITEM + '1\t"Tea"\t\n')
    loaded = data.load(own, core=1)
    assert edges(loaded) == {('"a"', '1')} and loaded[1] == ['"Tea"']


def test_long_cells_and_titles_that_are_numbers_or_missing(folder, capsys):
    own = folder(x__csv='user_id,item_id\na,1\na,2\n',
                 y__csv=f'item_id,title,year,plot\n1,1984,1949,"{"long, " * 30_000}"\n2,,,\n')
    _, texts, titles, *_ = data.load(own, core=1)
    assert texts[0].startswith('1984 long, long') and len(texts[0]) > 2 ** 17 and not texts[1]
    own = folder(x__csv='user_id,item_id\na,1\n', y__csv='item_id,title\n1,\n')
    assert data.load(own, core=1)[1] == [''] and '1 items without text' in capsys.readouterr().err


def test_windows_letters_are_read_and_keep_ids_apart(folder, capsys):
    own = folder(x__csv='user_id,item_id\nann\xe9,th\xe8\nann\xe8,th\xe9\n'.encode('cp1252'),
                 y__csv='item_id,Pr\xe9nom\nth\xe9,Th\xe9\nth\xe8,\x80 5\n'.encode('latin1'))
    loaded = data.load(own, core=1, text_columns=['Pr\xe9nom'])
    assert edges(loaded) == {('ann\xe9', 'th\xe8'), ('ann\xe8', 'th\xe9')}
    assert loaded[1] == ['Th\xe9', '\u20ac 5']
    assert '4 ids or texts hold bytes that are not UTF-8, read as W' in capsys.readouterr().err
    own = folder(x__csv=b'user_id,item_id\n\x81,1\n\x8d,2\n', y__csv='item_id,t\n1,a\n2,b\n')
    assert len(data.load(own, core=1)[3]) == 2             # letters that Windows-1252 has not


def test_ragged_rows_and_bad_bytes_are_counted(folder, capsys):
    own = folder(x__inter=INTER.encode() + b'a\t1\t5\t0\n\nb\t1\nc\t1\t5\t0\t0\nd\xff\t1\t5\t0',
                 x__item=ITEM + '1\ta\x00b\tc\n')
    loaded = data.load(own, core=1)
    assert edges(loaded) == {('a', '1'), ('d\xff', '1')}
    said = capsys.readouterr().err
    assert '2 rows dropped' in said and '1 ids or texts hold bytes that are not UTF-8' in said


cell = st.text(st.characters(blacklist_categories=['Cs'], blacklist_characters='\0'), max_size=6)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(cell, cell), min_size=1, max_size=8), st.sampled_from(',;'))
def test_csv_reads_back_what_csv_writes(tmp_path_factory, rows, delimiter):
    import csv
    path = tmp_path_factory.getbasetemp() / 'round.csv'
    with open(path, 'w', newline='', encoding='utf-8') as file:
        csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_ALL).writerows([('a', 'b'), *rows])
    assert list(data.read_rows(path)) == [['a', 'b'], *map(list, rows)]


good_lines = st.sampled_from([b'user_id,item_id,rating\n', b'item_id\ttitle\n', b'a,b,5\n', b'"',
                              b'1\tx\n', b'\r', b'\n', b',', b'\xff\xfe', b'\x1f\x8b\x08'])


@settings(max_examples=200, deadline=None)
@given(st.lists(good_lines | st.binary(max_size=12)), st.lists(good_lines | st.binary(max_size=12)),
       st.booleans())
def test_any_bytes_give_data_or_one_line(tmp_path_factory, inter, item, packed):
    own = tmp_path_factory.getbasetemp() / 'fuzz'
    own.mkdir(exist_ok=True)
    for name, parts in (('interactions.csv', inter), ('items.tsv', item)):
        body = b''.join(parts)
        (own / name).write_bytes(gzip.compress(body)[:-4] if packed else body)
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            data.load(str(own), core=1)
        except (ValueError, OSError) as error:
            assert '\n' not in str(error)


def test_a_short_fuzz_run():
    ran = subprocess.run([sys.executable, 'experiments/fuzz.py', '--files', '200'], cwd=HERE,
                         capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0 and ran.stdout.startswith('fuzz: 200 files from seed 0: '), ran


# -- errors ------------------------------------------------------------------------------------

IDS = 'user_id,item_id\na,1\n'
TEXT = 'item_id,title\n1,x\n'


@pytest.mark.parametrize('message, files', [
    ('found nothing', {}),
    ('found a.csv (empty; expected a header', {'a__csv': '', 'b__csv': TEXT}),
    ('expected one file with columns user_id and item_id', {'a__csv': 'movieId,stars\n1,2\n'}),
    ('found a.csv (movieId, stars)', {'a__csv': 'movieId,stars\n1,2\n'}),
    ('found a.csv (user_id, item_id); b.csv (user_id',
     {'a__csv': IDS, 'b__csv': IDS, 'i__csv': TEXT}),
    ('item_id and text', {'a__csv': IDS}),
    ('item_id and text', {'a__csv': IDS, 'b__csv': TEXT, 'c__csv': TEXT}),
    ('no text column', {'a__csv': IDS, 'b__csv': 'item_id,price\n1,2\n'}),
    ('no rows', {'a__csv': 'user_id,item_id\n', 'b__csv': TEXT}),
    ('no rows', {'a__csv': IDS, 'b__csv': 'item_id,title\n'}),
    ('a.csv: none of its items is in',
     {'a__csv': IDS, 'b__csv': 'item_id,t\n2,x\n'}),
    ('a.csv, line 2: ', {'a__csv': 'user_id,item_id\n"a,1\nb,1\n', 'b__csv': TEXT}),
    ('larger than field limit', {'a__csv': IDS, 'b__csv': TEXT + '2,' + 'x' * (data.MAX_CELL + 1)}),
    ('damaged gz', {'a__csv__gz': gzip.compress(IDS.encode() * 9)[:-9], 'b__csv': TEXT}),
])
def test_errors_are_one_line(folder, message, files):
    fails(message, folder(**files), core=1)


def test_a_usual_name_wins_over_ambiguity(folder):
    own = folder(ratings__csv=IDS, tags__csv=IDS, items__csv=TEXT, more__csv=TEXT, notes__txt='"hi')
    assert edges(data.load(own, core=1)) == {('a', '1')}


def test_unknown_name_and_unwritable_place(tmp_path):
    fails('nosuch: neither a folder nor one of beauty', 'nosuch')
    (tmp_path / 'file').write_text('')
    fails('cannot write into', 'toys', str(tmp_path / 'file'))


# -- downloads ---------------------------------------------------------------------------------

@pytest.fixture
def server(tmp_path, monkeypatch):
    """server.files[name] = bytes (or (claimed length, bytes)), served on loopback.

    server.acts[name] = what it does to one request after the other before it behaves: a status,
    'cut' or 'hang' in the middle, 'whole' and 'wrong' for one that knows no Range or answers it
    with other bytes. server.asked: [(name, Range or None)]."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name, asked = self.path.lstrip('/'), self.headers.get('Range')
            web.asked.append((name, asked))
            act, body = next(web.acts.get(name, iter(())), None), web.files.get(name)
            length, body = body if isinstance(body, tuple) else (len(body or b''), body)
            start = int(asked[6:-1]) if asked and act != 'whole' else 0
            status = 404 if body is None else 416 if start >= length > 0 else 206 if start else 200
            self.send_response(act if isinstance(act, int) else status)
            if isinstance(act, int):
                self.send_header('Retry-After', '0' if act == 429 else 'Mon, 1 Jan 2035')
                start, length, body = 0, 3, b'no\n'
            if start:
                self.send_header('Content-Range', f'bytes {start + (act == "wrong")}-/{length}')
            self.send_header('Content-Length', str(max(length - start, 0)))
            self.end_headers()
            body = (body or b'')[start:]
            self.wfile.write(body[:len(body) // 2] if act in ('cut', 'hang') else body)
            if act == 'hang':
                web.over.wait(5)

        def log_message(self, *args):
            pass
    web = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    web.files, web.acts, web.asked, web.over = {}, {}, [], threading.Event()
    web.url = f'http://127.0.0.1:{web.server_port}/'
    thread = threading.Thread(target=web.serve_forever, kwargs={'poll_interval': .01})
    thread.start()
    monkeypatch.setattr(data, 'AMAZON_URL', web.url)
    monkeypatch.setattr(data, 'RAW_URL', web.url)
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    yield web
    web.over.set()
    web.shutdown()
    thread.join()
    web.server_close()


def zipped(method=zipfile.ZIP_DEFLATED, **members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w', method) as box:
        for name, text in members.items():
            box.writestr(name, text)
    return buffer.getvalue()


def complete(user='u', prefix='Amazon_Toys/Amazon_Toys'):
    rows = ''.join(f'{user}{u}\ti{i}\t5\t0\n' for u in range(5) for i in range(5))
    items = ''.join(f'i{i}\tT{i}\tB{i}\tC\n' for i in range(5))
    return {prefix + '.inter': INTER + rows, '__MACOSX/._x.inter': 'x', prefix + '.item':
            'item_id:token\ttitle:token_seq\tbrand:token\tcategories:token_seq\n' + items}


def test_a_zip_is_fetched_once_unpacked_and_checked(server, tmp_path, capsys):
    server.files['Amazon_Toys_and_Games.zip'] = zipped(**complete())
    matrix, texts, *_ = data.load('toys', str(tmp_path / 'new' / 'data'))
    assert matrix.shape == (5, 5) and texts[0] == 'T0 B0 C'
    assert capsys.readouterr().err == ('warning: toys: 5 users, 5 items, 25 interactions after '
                                       'filtering; the table says 11,268, 7,309, 95,420\n')
    server.files.clear()                                       # the second time it is there
    data.load('toys', str(tmp_path / 'new' / 'data'), core=2)
    assert capsys.readouterr().err == ''                       # sizes are of the default filter
    left = sorted(str(path.relative_to(tmp_path / 'new' / 'data'))
                  for path in (tmp_path / 'new' / 'data').rglob('*'))
    assert left == ['amazon-toys-games', 'amazon-toys-games/amazon-toys-games.inter',
                    'amazon-toys-games/amazon-toys-games.item']


GOOD = zipped(**complete())
FLIPPED = bytearray(zipped(zipfile.ZIP_STORED, **complete()))
FLIPPED[200] ^= 1


@pytest.mark.parametrize('message, body', [
    ('404', None),
    ('not a sound zip', GOOD[:-40]),
    ('not a sound zip', bytes(FLIPPED)),
    ('not a sound zip', b'<html>moved</html>'),
    ('', (len(GOOD), GOOD[:-40])),                             # the connection breaks
    ('expected one *.inter in it, found 0', zipped(**{'x.item': ITEM})),
    ('expected one *.inter in it, found 2', zipped(**(complete(prefix='b') | complete()))),
    ('refused', zipped(zipfile.ZIP_LZMA, **complete())),
])
def test_a_bad_zip_leaves_nothing(server, tmp_path, message, body):
    if body is not None:
        server.files['Amazon_Toys_and_Games.zip'] = body
    text = fails(message, 'toys', str(tmp_path))
    assert 'place' in text and 'amazon-toys-games.inter' in text
    assert list(tmp_path.iterdir()) == []


def test_a_path_outside_lands_inside(server, tmp_path):
    server.files['Amazon_Toys_and_Games.zip'] = zipped(**complete(prefix='../../../evil'))
    data.load('toys', str(tmp_path / 'data'))
    assert [path.name for path in tmp_path.iterdir()] == ['data']
    assert not list(tmp_path.parent.glob('evil*'))


def test_a_bomb_is_refused(server, tmp_path, monkeypatch):
    monkeypatch.setattr(data, 'MAX_UNPACKED', 1000)
    members = complete() | {'Amazon_Toys/Amazon_Toys.inter': '0' * 1001}
    server.files['Amazon_Toys_and_Games.zip'] = zipped(**members)
    fails('refused, *.inter in it would unpack to 1,001 bytes', 'toys', str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_download_checks_what_came(server, tmp_path):
    server.files['f'] = b'abc'
    path, right = tmp_path / 'f', hashlib.sha256(b'abc').hexdigest()
    data.download(server.url + 'f', str(path), right, 3)
    assert path.read_bytes() == b'abc'
    for wrong in ({'sha256': '0' * 64}, {'size': 4}):
        with pytest.raises(OSError, match='expected'):
            data.download(server.url + 'f', str(tmp_path / 'g'), **wrong)
    with pytest.raises(OSError, match='no/such'):
        data.download(server.url + 'f', str(tmp_path / 'no/such'))
    assert [file.name for file in tmp_path.iterdir()] == ['f']


BIG = np.random.default_rng(0).bytes(400_000)
HALF = len(BIG) // 2


@pytest.mark.parametrize('acts, ranges', [
    (['cut'], 1), (['cut', 'cut', 503, 'cut'], 4), ([500, 502], 0), ([429], 0), ([416], 0),
    (['cut', 'whole'], 1), (['cut', 'wrong'], 1), (['cut', 416], 1), (['hang'], 1),
    (['cut', 429, 500, 'cut', 500, 500, 'cut'], 7)])
def test_download_goes_on_after(server, tmp_path, acts, ranges):
    server.files['f'], server.acts['f'] = BIG, iter(acts)
    data.download(server.url + 'f', str(tmp_path / 'f'), timeout=(5, .3 if 'hang' in acts else 5))
    assert (tmp_path / 'f').read_bytes() == BIG and len(list(tmp_path.iterdir())) == 1
    if 'hang' not in acts:                   # a starved machine may time out once more
        assert len(server.asked) == len(acts) + ('whole' not in acts)
        assert sum(asked is not None for _, asked in server.asked) == ranges


@pytest.mark.parametrize('acts', [[500] * 9, ['cut', 'whole'] * 9, ['hang'] * 9, [404], [403]])
def test_download_gives_up_and_leaves_nothing(server, tmp_path, acts):
    server.files['f'] = (len(BIG), BIG[:HALF]) if acts[0] == 'cut' else BIG
    server.acts['f'] = iter(acts)
    with pytest.raises(OSError, match=server.url + 'f: ') as caught:
        data.download(server.url + 'f', str(tmp_path / 'f'), timeout=(1, .05), tries=3)
    assert not list(tmp_path.iterdir()) and '\n' not in str(caught.value)
    assert len(server.asked) <= (1 if acts[0] in (404, 403) else 9)


def test_a_part_is_kept_where_a_hash_will_judge_it(server, tmp_path):
    path, right = str(tmp_path / 'f'), hashlib.sha256(BIG).hexdigest()
    server.files['f'], server.acts['f'] = BIG, iter(['cut', 500, 500, 500])
    with pytest.raises(OSError, match='500'):
        data.download(server.url + 'f', path, right, tries=3)
    part, = tmp_path.iterdir()
    assert part.name == f'f.{right[:16]}.part' and 0 < part.stat().st_size <= HALF
    size = part.stat().st_size
    data.download(server.url + 'f', path, right, len(BIG))
    assert server.asked[-1] == ('f', f'bytes={size}-')
    assert list(tmp_path.iterdir()) == [tmp_path / 'f']
    part.write_bytes(b'other bytes' + BIG[11:HALF])             # damaged meanwhile
    with pytest.raises(OSError, match='SHA-256'):
        data.download(server.url + 'f', path, right)
    assert list(tmp_path.iterdir()) == [tmp_path / 'f']         # and the next call starts afresh


def test_an_endless_answer_is_stopped(server, tmp_path):
    server.files['f'] = bytes(1 << 20)
    with pytest.raises(OSError, match='bytes came, 70000 were expected'):
        data.download(server.url + 'f', str(tmp_path / 'f'), size=70_000)
    assert not list(tmp_path.iterdir())


def test_two_downloads_at_once_do_not_mix(server, tmp_path):
    path, right = str(tmp_path / 'f'), hashlib.sha256(BIG).hexdigest()
    server.files['f'], server.acts['f'] = BIG, iter(['cut'] * 6)
    (tmp_path / f'f.{right[:16]}.part').write_bytes(BIG[:1000])
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: data.download(server.url + 'f', path, right), range(8)))
    assert Path(path).read_bytes() == BIG and len(list(tmp_path.iterdir())) == 1


def test_two_processes_fetch_one_set(server, tmp_path):
    server.files['Amazon_Toys_and_Games.zip'] = zipped(**complete())
    program = ('import data, sys; data.AMAZON_URL = data.RAW_URL = sys.argv[1]; '
               'print(data.load("toys", sys.argv[2])[0].nnz)')
    runs = [subprocess.Popen([sys.executable, '-c', program, server.url, str(tmp_path)], cwd=HERE,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    assert [run.communicate(timeout=60)[0] for run in runs] == [b'25\n', b'25\n']
    assert [path.name for path in tmp_path.iterdir()] == ['amazon-toys-games']


@pytest.mark.parametrize('name', ['receive', 'download'])
def test_the_two_copies_are_equal(name):
    assert inspect.getsource(getattr(data, name)) == inspect.getsource(getattr(embed, name))


def test_the_ranks_of_two_leaves_are_equal():
    assert inspect.getsource(models.ranks) == inspect.getsource(embed.ranks)


def raw_files(reviews, items):
    return {'reviews_Toys_and_Games_5.json.gz': gzip.compress(b'\n'.join(reviews)),
            'meta_Toys_and_Games.json.gz': gzip.compress(b'\n'.join(items) + b'\n')}


def raw_review(user, item, rating=5.0):
    return json.dumps({'reviewerID': user, 'asin': item, 'reviewText': 'so\nso', 'overall': rating,
                       'unixReviewTime': 1390000000}).encode()


REVIEWS = [raw_review(f'u{u}', f'i{i}') for u in range(5) for i in range(5)]
ITEMS = [repr({'asin': f'i{i}', 'title': "Ball's\t\n" + chr(233), 'brand': None, 'price': 6.99,
               'description': f'A "{i}" ball', 'related': {'also_bought': ['x']},
               'categories': [['Toys', 'Balls & Co'], ['Toys', 'Red']]}).encode()
         for i in (3, 1, 0, 2, 4)]


def test_the_raw_files_are_the_second_source(server, tmp_path, capsys):
    evil = tmp_path / 'evil'
    items = [f'__import__("os").system("touch {evil}")'.encode(),
             f"{{'asin': 'i0', 'title': open({str(evil)!r}, 'w')}}".encode(), b"{'asin': 'i7'}",
             b"{'asin': 'i8', 'title': 'never reviewed'}", *ITEMS, b'[1]', b'\xff', b'(' * 9999,
             b'-' * 9999 + b'1', b"{'asin': ['i1']}", b"{'asin': 'i1', 'categories': 3}",
             b"{'title': 0}"]
    server.files |= raw_files([b'{"reviewerID": "u9", "asin": "i7"}', b'{', b'[' * 99999, *REVIEWS,
                               raw_review('u0', 'i9'), raw_review('u1', 'i0', 'good')], items)
    matrix, texts, titles, users, ids, _ = data.load('toys', str(tmp_path / 'd'))
    assert not evil.exists() and matrix.shape == (5, 5) and ids == ['i3', 'i1', 'i0', 'i2', 'i4']
    assert texts[0] == "Ball's \xe9 Toys, Balls & Co, Red" and users == [f'u{u}' for u in range(5)]
    said = capsys.readouterr().err
    assert 'reviews_Toys_and_Games_5.json.gz: 4 malformed lines skipped' in said
    assert 'meta_Toys_and_Games.json.gz: 9 malformed lines skipped' in said
    assert 'from the second source, because http' in said and said.count('\n') == 4
    assert data.load('toys', str(tmp_path / 'd'), text_columns=['description'])[1][0][2] == '"'
    assert [path.name for path in (tmp_path / 'd').iterdir()] == ['amazon-toys-games']


@pytest.mark.parametrize('message, change', [
    ('no reviews in it', lambda files: raw_files([b'<html>'], ITEMS)),
    ('not a sound gz', lambda files: {name: body[:-9] for name, body in files.items()}),
    ('not a sound gz', lambda files: dict.fromkeys(files, b'<html>moved</html>')),
    ('refused, unpacks to over', lambda files: raw_files(REVIEWS * 100, ITEMS)),
    ('404', lambda files: dict(list(files.items())[:1])),
])
def test_all_sources_fail_in_one_line(server, tmp_path, monkeypatch, message, change):
    monkeypatch.setattr(data, 'MAX_UNPACKED', 9999)
    server.files |= change(raw_files(REVIEWS, ITEMS))
    text = fails(message, 'toys', str(tmp_path))
    assert 'toys: no source has it: ' + server.url + 'Amazon_Toys_and_Games.zip: 404' in text
    assert text.endswith('amazon-toys-games.inter and .item beside it by hand')
    assert list(tmp_path.iterdir()) == []


def test_an_overlong_raw_line_is_not_held(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, 'MAX_LINE', 200)
    server.files |= raw_files(REVIEWS, [b"{'asin': '" + b'x' * 500 + b"'}", *ITEMS[:-1], ITEMS[-1]])
    assert data.load('toys', str(tmp_path), core=1)[0].shape == (5, 5)
    assert 'meta_Toys_and_Games.json.gz: 3 malformed' in capsys.readouterr().err


def test_ml_100k_comes_through_pip(tmp_path, monkeypatch):
    """pip itself is replaced by a wheel with wrong bytes: the SHA-256 has to notice."""
    def pip(command, **_):
        assert '--no-deps' in command
        folder = command[command.index('--dest') + 1]
        wheel = zipped(**{'r/ml-100k/ml-100k.inter': INTER, 'r/ml-100k/ml-100k.item': ITEM})
        Path(folder, 'recbole-1.2.1-py3-none-any.whl').write_bytes(wheel)
        return subprocess.CompletedProcess(command, 0, '', '')
    monkeypatch.setattr(data.subprocess, 'run', pip)
    fails('SHA-256', 'ml-100k', str(tmp_path))
    monkeypatch.setattr(data.subprocess, 'run', lambda command, **_: subprocess.CompletedProcess(
        command, 1, '', 'WARNING: x\nERROR: No matching distribution found\n'))
    fails('failed: ERROR: No matching distribution', 'ml-100k', str(tmp_path))
    assert list(tmp_path.iterdir()) == []


# -- the whole file ----------------------------------------------------------------------------

@pytest.mark.parametrize('dataset', ['beauty', 'office'])
def test_sizes_of_the_real_sets(dataset, capsys):
    if not (SHARED / data.FOLDERS[dataset]).is_dir():
        pytest.skip(f'{SHARED / data.FOLDERS[dataset]} is not there')
    matrix, texts, titles, users, items, low = data.load(dataset, str(SHARED))
    assert (*matrix.shape, matrix.nnz) == data.SIZES[dataset]
    assert matrix.shape == (len(users), len(items)) and len(texts) == len(titles) == len(items)
    assert low.shape == matrix.shape and not low.multiply(matrix).nnz      # no pair twice in these
    assert len(set(users)) == len(users) and len(set(items)) == len(items) and all(texts)
    assert capsys.readouterr().err == ''


# ---- embed.py --------------------------------------------------------------------------------

WEIGHTS = Path('~/.cache/llminit/all-mpnet-base-v2').expanduser()
SPECIALS = ['<s>', '<pad>', '</s>', '<unk>', '[UNK]', '<mask>']
VOCAB = SPECIALS + ('a b c red green tea un ##a ##able ##ably ##break ##s ! , $ - \u4e2d \u6587 '
                    'creme \u03c3 ##\u03c3 \u03b1 ##\u03b1 x ##x').split()


def names(text, max_tokens=384):
    """The tokens of a text by name, without the two ends."""
    ids = embed.Tokenizer(VOCAB)(text, max_tokens)
    assert ids[0] == 0 and ids[-1] == 2
    return [VOCAB[n] for n in ids[1:-1]]


@pytest.mark.parametrize('text, expected', [
    ('', []), (' \n\t\r\u3000\u2028', []), ('Red,GREEN tea!', ['red', ',', 'green', 'tea', '!']),
    ('unbreakable unbreakably', ['un', '##break', '##able', 'un', '##break', '##ably']),
    ('Cr\u00e8me cre\u0300me \u0301', ['creme', 'creme']),      # accents, composed or not
    ('re\x00d gre\u200ben\ufffd t\x07ea', ['red', 'green', 'tea']),        # control characters
    ('a\u4e2d\u6587b', ['a', '\u4e2d', '\u6587', 'b']), ('red-tea$', ['red', '-', 'tea', '$']),
    ('\u0391\u03a3', ['\u03b1', '##\u03c3']),                     # no final sigma
    ('x' * 100, ['x'] + ['##x'] * 99), ('x' * 101, ['[UNK]']), ('redz a', ['[UNK]', 'a']),
    ('\ud800a', ['a']),                                     # a lone surrogate is dropped
    ('a</s>b<s>', ['a', '</s>', 'b', '<s>']), ('[UNK]<mask> <pad>', ['[UNK]', '<mask>', '<pad>']),
    ('<unk><UNK><\u00dcNK>', ['<unk>'] * 3), ('<S>', ['[UNK]'] * 3), ('</s', ['[UNK]'] * 3),
])
def test_tokenizer(text, expected):
    assert names(text) == expected


def test_tokenizer_truncates():
    assert names('a ' * 600, 384) == ['a'] * 382
    assert names('a b c', 4) == ['a', 'b']


def test_tokenizer_needs_its_specials():
    with pytest.raises(ValueError, match="lacks .*UNK"):
        embed.Tokenizer(['<s>', '</s>', 'a'])


def write_safetensors(path, tensors):
    """The format, written a second time: header length, JSON header, raw tensors."""
    header, blob = {'__metadata__': {'format': 'pt'}}, b''
    for name, array in tensors.items():
        raw = array.tobytes()
        kind = {'float32': 'F32', 'int64': 'I64', 'float16': 'F16'}[array.dtype.name]
        header[name] = {'dtype': kind, 'shape': list(array.shape),
                        'data_offsets': [len(blob), len(blob) + len(raw)]}
        blob += raw
    head = json.dumps(header).encode()
    Path(path).write_bytes(len(head).to_bytes(8, 'little') + head + blob)


def test_safetensors(tmp_path):
    tensors = {'a': np.arange(6, dtype=np.float32).reshape(2, 3), 'b': np.arange(3),
               'empty': np.zeros((0, 4), np.float32), 'half': np.ones(3, np.float16)}
    write_safetensors(tmp_path / 'm', tensors)
    found = embed.read_safetensors(tmp_path / 'm')
    assert list(found) == list(tensors)
    for name, array in tensors.items():
        assert found[name].shape == array.shape and (found[name].numpy() == array).all()


def damaged(entry):
    head = json.dumps({'a': entry}).encode()
    return len(head).to_bytes(8, 'little') + head + bytes(24)


@pytest.mark.parametrize('data', [
    b'', b'\x02', b'\xff' * 8, b'\x02' + bytes(7) + b'{}'[:1], b'\x02' + bytes(7) + b'[]',
    b'\x03' + bytes(7) + b'{"a', b'\x04' + bytes(7) + b'\xff\xfe{}',
    (40000).to_bytes(8, 'little') + b'[' * 40000,
    damaged({'dtype': 'F32', 'shape': [6], 'data_offsets': [0, 20]}),
    damaged({'dtype': 'F32', 'shape': [7], 'data_offsets': [0, 28]}),
    damaged({'dtype': 'F32', 'shape': [-6], 'data_offsets': [24, 0]}),
    damaged({'dtype': 'F32', 'shape': [6.0], 'data_offsets': [0, 24]}),
    damaged({'dtype': 'F32', 'shape': [10 ** 30], 'data_offsets': [0, 4 * 10 ** 30]}),
    damaged({'dtype': 'F32', 'shape': 6, 'data_offsets': [0, 24]}),
    damaged({'dtype': 'F32', 'shape': [6], 'data_offsets': [0]}),
    damaged({'dtype': 'F32', 'shape': [6], 'data_offsets': None}),
    damaged({'dtype': 'Q4', 'shape': [6], 'data_offsets': [0, 24]}), damaged({}), damaged(None)])
def test_safetensors_damaged(tmp_path, data):
    (tmp_path / 'm').write_bytes(data)
    with pytest.raises(ValueError, match='not a whole safetensors file') as error:
        embed.read_safetensors(tmp_path / 'm')
    assert '\n' not in str(error.value)


def tiny_mpnet(folder, seed=0, width=24, heads=3, inner=40, layers=2, positions=70):
    """A random MPNet in folder, larger weights than real ones so that every part shows."""
    rng, folder = np.random.default_rng(seed), Path(folder)
    shapes = {'embeddings.word_embeddings.weight': (len(VOCAB), width),
              'embeddings.position_embeddings.weight': (positions, width),
              'embeddings.LayerNorm.weight': (width,), 'embeddings.LayerNorm.bias': (width,),
              'encoder.relative_attention_bias.weight': (32, heads)}
    for n in range(layers):
        for part in ('attention.attn.q', 'attention.attn.k', 'attention.attn.v',
                     'attention.attn.o', 'intermediate.dense', 'output.dense'):
            size = {'intermediate.dense': (inner, width), 'output.dense': (width, inner)}
            size = size.get(part, (width, width))
            shapes[f'encoder.layer.{n}.{part}.weight'] = size
            shapes[f'encoder.layer.{n}.{part}.bias'] = size[:1]
        for part in ('attention', 'output'):
            shapes[f'encoder.layer.{n}.{part}.LayerNorm.weight'] = (width,)
            shapes[f'encoder.layer.{n}.{part}.LayerNorm.bias'] = (width,)
    weights = {name: rng.normal(0, .5, shape).astype(np.float32) for name, shape in shapes.items()}
    extra = {'embeddings.position_ids': np.arange(positions)[None],
             'pooler.dense.weight': np.ones((width, width), np.float32)}
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / 'model.safetensors', {**weights, **extra})
    (folder / 'vocab.txt').write_text('\n'.join(VOCAB) + '\n', encoding='utf8')
    config = dict(vocab_size=len(VOCAB), hidden_size=width, num_hidden_layers=layers,
                  num_attention_heads=heads, intermediate_size=inner,
                  max_position_embeddings=positions)
    (folder / 'config.json').write_text(json.dumps(config))
    return {name: w.astype(np.float64) for name, w in weights.items()}


def bucket(distance):
    """Bucket of key minus query, with a loop in place of a logarithm."""
    n, out = abs(distance), abs(distance)
    if n >= 8:
        out = max(b for b in range(8) if n >= 8 * 16 ** (b / 8) - 1e-9) + 8
    return out + 16 * (distance > 0)


def dense_mpnet(w, ids, pad_to=0):
    """One text through MPNet in float64, padded and masked as the original does it."""
    heads, mask = w['encoder.relative_attention_bias.weight'].shape[1], [1] * len(ids)
    mask, ids = np.array(mask + [0] * pad_to), list(ids) + [1] * pad_to
    places, count = [], 1
    for token in ids:
        count += token != 1
        places.append(count if token != 1 else 1)

    def norm(x, name):
        x = x - x.mean(1, keepdims=True)
        x = x / np.sqrt((x * x).mean(1, keepdims=True) + 1e-5)
        return x * w[name + '.LayerNorm.weight'] + w[name + '.LayerNorm.bias']

    def dense(x, name):
        return x @ w[name + '.weight'].T + w[name + '.bias']
    table = w['encoder.relative_attention_bias.weight']
    bias = np.array([[table[bucket(k - q)] for k in range(len(ids))] for q in range(len(ids))])
    x = norm(w['embeddings.word_embeddings.weight'][ids] +
             w['embeddings.position_embeddings.weight'][places], 'embeddings')
    for n in range(2):
        name, mixed = f'encoder.layer.{n}', []
        q, k, v = (dense(x, f'{name}.attention.attn.{part}') for part in 'qkv')
        size = q.shape[1] // heads
        for h in range(heads):
            cut = slice(h * size, (h + 1) * size)
            score = q[:, cut] @ k[:, cut].T / math.sqrt(size) + bias[:, :, h]
            score = np.where(mask, np.exp(score - score.max(1, keepdims=True)), 0)
            mixed.append(score / score.sum(1, keepdims=True) @ v[:, cut])
        x = norm(x + dense(np.hstack(mixed), f'{name}.attention.attn.o'), f'{name}.attention')
        inner = dense(x, f'{name}.intermediate.dense')
        inner = inner * (1 + erf(inner / math.sqrt(2))) / 2
        x = norm(x + dense(inner, f'{name}.output.dense'), f'{name}.output')
    vector = (x * mask[:, None]).sum(0) / mask.sum()
    return vector / np.linalg.norm(vector)


TEXTS = ['red tea', '', 'a b c, green tea!', 'tea red', 'x' * 60, 'unbreakable a', 'red tea',
         'a<pad>b <pad>c red', 'a ' * 300, '\u4e2d\u6587 </s> b', 'c']


def test_position_buckets():
    found = embed.position_buckets(300, 32).numpy()
    assert all(found[q, k] == bucket(k - q) for q in (0, 150, 299) for k in range(300))


def test_mpnet_against_float64(tmp_path):
    weights = tiny_mpnet(tmp_path / 'tiny')
    found = embed.encode(TEXTS, str(tmp_path / 'tiny'), cache=tmp_path, dtype='float32')
    assert found.dtype == np.float32 and found.shape == (len(TEXTS), 24)
    tokenizer = embed.Tokenizer(VOCAB)
    for n, text in enumerate(TEXTS):
        ids = tokenizer(text, 68)                    # 70 positions, the first two are not used
        for pad in (0, 5):
            assert np.abs(found[n] - dense_mpnet(weights, ids, pad)).max() < 2e-6, text


def test_mpnet_order_and_batches(tmp_path, monkeypatch):
    tiny_mpnet(tmp_path / 'tiny')
    whole = embed.encode(TEXTS, str(tmp_path / 'tiny'), cache=tmp_path / '1', dtype='float32')
    back = embed.encode(TEXTS[::-1], str(tmp_path / 'tiny'), cache=tmp_path / '1', dtype='float32')
    assert np.abs(whole - back[::-1]).max() < 1e-6
    monkeypatch.setattr(embed, 'CPU_TOKENS', 1)      # every text alone
    alone = embed.encode(TEXTS, str(tmp_path / 'tiny'), cache=tmp_path / '2', dtype='float32')
    assert np.abs(whole - alone).max() < 1e-6 and (whole[0] == whole[6]).all()
    half = embed.encode(TEXTS, str(tmp_path / 'tiny'), cache=tmp_path / '1', dtype='bfloat16')
    assert (half * whole).sum(1).min() > .995 and len(list(tmp_path.glob('1/vectors/*'))) == 3


def test_the_first_layers_are_float32_whatever_the_others_are(tmp_path):
    tiny_mpnet(tmp_path / 'tiny', layers=6)
    _, model, _ = embed.load_mpnet(tmp_path / 'tiny')
    ids = [torch.tensor([[0, 5, 6, 7, 2], [0, 7, 7, 5, 2]]), torch.tensor([[0, 6, 2]])]
    out = {name: [] for name, module in model.named_modules()
           if isinstance(module, torch.nn.Linear)}
    for name in out:
        model.get_submodule(name).register_forward_hook(
            lambda module, args, result, name=name: out[name].append(result))
    with torch.inference_mode():
        model(ids)
        with torch.autocast('cpu', torch.bfloat16):
            model(ids)
    for name, (exact, fast) in out.items():
        first = int(name.split('.')[2]) < embed.EXACT_LAYERS
        assert exact.dtype == torch.float32 and len(out) == 6 * 6
        assert fast.dtype == (torch.float32 if first else torch.bfloat16)
        assert torch.equal(exact, fast) == first


def test_batches():
    rows = embed.batches([5, 9, 2, 7, 2], 10)
    assert rows == [[1], [3], [0, 2, 4]] and embed.batches([50], 10) == [[0]]


def test_vector_cache(tmp_path, monkeypatch):
    tiny, cache = str(tmp_path / 'tiny'), tmp_path / 'cache'
    tiny_mpnet(tiny)
    first = embed.encode(TEXTS, tiny, cache=cache)
    file, = (cache / 'vectors').iterdir()
    run, calls = embed.run_mpnet, []
    monkeypatch.setattr(embed, 'run_mpnet', lambda *a: calls.append(a) or run(*a))
    assert (embed.encode(TEXTS, tiny, cache=cache) == first).all() and not calls       # a hit
    good = file.read_bytes()
    flipped = bytearray(good)
    flipped[-33] ^= 1                                # another number, as finite as the right one
    bad_row = io.BytesIO()
    np.save(bad_row, np.full((10, 24), np.nan, np.float32))
    pickled = io.BytesIO()
    np.save(pickled, np.array([{}], object))
    for damage in (b'', good[:50], good[:-1], b'x' * len(good), bad_row.getvalue(),
                   pickled.getvalue(), flipped):
        file.write_bytes(damage)
        assert (embed.encode(TEXTS, tiny, cache=cache) == first).all()
        assert calls.pop() and not calls and file.read_bytes() == good
    embed.encode(TEXTS + ['more'], tiny, cache=cache)
    embed.encode(TEXTS[::-1], tiny, cache=cache)
    other = {'float32': 'bfloat16', 'bfloat16': 'float32'}[embed.fast_dtype('cpu')]
    embed.encode(TEXTS, tiny, cache=cache, dtype=other)
    with monkeypatch.context() as patch:
        patch.setattr(embed, 'VERSION', 0)
        embed.encode(TEXTS, tiny, cache=cache)
    tiny_mpnet(tiny, seed=1)                         # other weights under the same name
    assert not np.allclose(embed.encode(TEXTS, tiny, cache=cache), first)
    assert len(calls) == 5 and len(list((cache / 'vectors').iterdir())) == 6


def test_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    tiny_mpnet(tmp_path / 'tiny')

    def stop(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(embed, 'run_mpnet', stop)
    with pytest.raises(KeyboardInterrupt):
        embed.encode(TEXTS, str(tmp_path / 'tiny'), cache=tmp_path)
    assert not list((tmp_path / 'vectors').iterdir())


def one_line(kind, match, *args, **named):
    with pytest.raises(kind, match=match) as error:
        embed.encode(*args, **named)
    assert '\n' not in str(error.value)


def test_encode_errors(tmp_path):
    one_line(ValueError, 'expected mpnet, tfidf, openai', ['a'], 'bert', cache=tmp_path)
    one_line(ValueError, 'no texts', [], 'tfidf')
    one_line(ValueError, 'text 1 is a float', ['a', math.nan], 'tfidf')
    one_line(ValueError, 'no text has a word', ['', '...'], 'tfidf')
    one_line(ValueError, "dtype 'int8'", ['a'], cache=tmp_path, dtype='int8')
    one_line(FileNotFoundError, 'expected vocab.txt', ['a'], str(tmp_path), cache=tmp_path)
    (tmp_path / 'file').write_text('')
    tiny_mpnet(tmp_path / 'tiny')
    one_line(OSError, 'cannot write the cache', ['a'], str(tmp_path / 'tiny'),
             cache=tmp_path / 'file')


@pytest.mark.parametrize('name, text, match', [
    ('config.json', '{"hidden_size": 16', 'damaged'), ('config.json', '[]', 'damaged'),
    ('config.json', '{"hidden_size": "x"}', 'damaged'), ('vocab.txt', 'a\nb', 'lacks'),
    ('config.json', '{"hidden_size": 24, "num_attention_heads": 5}', 'fit'),
    ('config.json', '{"num_attention_heads": 0}', 'damaged'),
    ('config.json', '{"layer_norm_eps": "1e-5"}', 'damaged'),
    ('config.json', '[' * 100_000, 'damaged'),
    ('sentence_bert_config.json', '{"max_seq_length": -Infinity}', 'damaged'),
    ('config.json', '{"hidden_size": 24, "num_attention_heads": 3}', 'of these sizes'),
    ('vocab.txt', '\n'.join(SPECIALS + ['a'] * 40000), 'fit'),
    ('sentence_bert_config.json', '{"max_seq_length": "x"}', 'damaged'),
    ('sentence_bert_config.json', '{"max_seq_length": -5}', '-5 tokens a text'),
    ('sentence_bert_config.json', '{"max_seq_length": NaN}', 'damaged'),
    ('1_Pooling/config.json', '[]', 'damaged'),
    ('1_Pooling/config.json', '{"pooling_mode_cls_token": true}', 'cls_token.*expected mean'),
    ('1_Pooling/config.json', '{"pooling_mode": "max"}', 'pooling max, .*expected mean'),
    ('1_Pooling/config.json', '{"pooling_mode": ["mean", "max"]}', 'expected mean'),
    ('2_Dense/config.json', '{}', "then .'2_Dense'.; expected")])
def test_damaged_checkpoint(tmp_path, name, text, match):
    tiny_mpnet(tmp_path / 'tiny')
    embed.encode(['a'], str(tmp_path / 'tiny'), cache=tmp_path)     # a cache does not hide it
    (tmp_path / 'tiny' / name).parent.mkdir(exist_ok=True)
    (tmp_path / 'tiny' / name).write_text(text)
    one_line(ValueError, match, ['a'], str(tmp_path / 'tiny'), cache=tmp_path)


def test_a_folder_as_the_hub_has_it(tmp_path):
    tiny_mpnet(tmp_path / 'tiny')
    first = embed.encode(TEXTS, str(tmp_path / 'tiny'), cache=tmp_path)
    for pooling in ({'pooling_mode': 'mean'}, {'pooling_mode': ['mean']},
                    {'pooling_mode_cls_token': False, 'pooling_mode_mean_tokens': True}):
        for name, config in (('1_Pooling', pooling), ('2_Normalize', {})):
            (tmp_path / 'tiny' / name).mkdir(exist_ok=True)
            (tmp_path / 'tiny' / name / 'config.json').write_text(json.dumps(config))
        assert (embed.encode(TEXTS, str(tmp_path / 'tiny'), cache=tmp_path) == first).all()
    (tmp_path / 'tiny' / 'sentence_bert_config.json').write_text('{"max_seq_length": 5}')
    short = embed.encode(TEXTS, str(tmp_path / 'tiny'), cache=tmp_path)      # no old cache is used
    cut = embed.encode(['a b c', 'a a a'], str(tmp_path / 'tiny'), cache=tmp_path)
    assert np.allclose(short[[2, 8]], cut, atol=1e-6) and np.allclose(short[[0, 1]], first[[0, 1]])


def test_tfidf():
    rng = np.random.default_rng(0)
    words = [f'w{n}' for n in range(60)]
    texts = [' '.join(rng.choice(words[20 * (n % 3):20 * (n % 3) + 20], 8)) for n in range(90)]
    found = embed.encode(texts + ['', '!'], 'tfidf')
    assert found.shape == (92, 60) and found.dtype == np.float32 and not found[90:].any()
    assert np.allclose(np.linalg.norm(found[:90], axis=1), 1, atol=1e-6)
    assert (found == embed.encode(texts + ['', '!'], 'tfidf')).all()
    likeness = found[:90] @ found[:90].T
    group = np.arange(90) % 3
    assert likeness[group[:, None] == group].mean() > .3
    assert np.abs(likeness[group[:, None] != group]).max() < 1e-6      # they share no word
    # full rank: the SVD turns the TF-IDF rows, so that their cosines stay
    table = embed.word_counts(texts).toarray()
    weight = np.where(table > 0, 1 + np.log(np.maximum(table, 1)), 0)
    weight *= 1 + np.log(93 / (1 + (table > 0).sum(0)))
    weight /= np.linalg.norm(weight, axis=1, keepdims=True)
    assert np.abs(weight @ weight.T - embed.tfidf(texts + ['', ''])[:90] @
                  embed.tfidf(texts + ['', ''])[:90].T).max() < 1e-5
    assert embed.encode(['red tea', 'green tea'], 'tfidf').shape == (2, 2)


def test_tfidf_truncated():
    rng = np.random.default_rng(1)
    words = np.array([f'w{n}' for n in range(300)])
    texts = [' '.join(words[(rng.pareto(1, 30) * 5).astype(int) % 300]) for _ in range(200)]
    found = embed.tfidf(texts, 20)
    full = embed.tfidf(texts, 200)
    assert found.shape == (200, 20)
    exact = full[:, :20] / np.linalg.norm(full[:, :20], axis=1, keepdims=True)
    assert np.abs((found * exact).sum(1)).min() > .999


KEY = 'sk-Quite/Secret+1'


class Endpoint(http.server.BaseHTTPRequestHandler):
    """/v1/embeddings that counts what is asked and answers by the next entry of its script."""

    def do_POST(self):
        web, body = self.server, self.rfile.read(int(self.headers['Content-Length']))
        asked = json.loads(body)['input']
        web.asked.append(asked)
        web.headers.append(self.headers)
        fault = web.script.pop(0) if web.script else {}
        if fault.get('hang'):
            web.over.wait(9)
        rows = [{'index': n, 'embedding': fake_vector(text)} for n, text in enumerate(asked)]
        rows = fault.get('rows', lambda rows: rows[::-1])(rows)          # out of order, as allowed
        body = fault.get('body', json.dumps({'data': rows})).encode()
        self.send_response(fault.get('status', 200))
        self.send_header('Content-Length', str(len(body) + fault.get('more', 0)))
        for name, value in fault.get('headers', {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def fake_vector(text):
    return [len(text), sum(text.encode()) / 7, 1]


@pytest.fixture
def endpoint(monkeypatch):
    httpd = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Endpoint)
    httpd.script, httpd.asked, httpd.headers, httpd.waits = [], [], [], []
    httpd.over = threading.Event()
    threading.Thread(target=httpd.serve_forever, args=(.01,), daemon=True).start()
    monkeypatch.setenv('OPENAI_BASE_URL', f'http://127.0.0.1:{httpd.server_port}/v1/')
    monkeypatch.setenv('OPENAI_API_KEY', KEY)
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    monkeypatch.setattr(embed, 'OPENAI_TEXTS', 3)
    monkeypatch.setattr(embed.time, 'sleep', httpd.waits.append)
    yield httpd
    httpd.over.set()
    httpd.shutdown()
    httpd.server_close()


WORDS = ['red', '', 'green', 'a tea', 'red', '\u4e2d\u6587', 'b\ud800', 'tea', 'c']


def through(endpoint, cache, words=WORDS, model='m'):
    """What encode makes of words, checked against the vectors that the server makes up."""
    found = embed.encode(words, f'openai:{model}', cache=cache)
    clean = [text.replace('\ud800', '?') or ' ' for text in words]
    assert found.dtype == np.float32
    assert (found == np.array([fake_vector(text) for text in clean], np.float32)).all()
    return [len(texts) for texts in endpoint.asked]


def no_key(cache, *said):
    """The key stands in no file of the cache, and in nothing that was said."""
    kept = [path.read_bytes() + str(path).encode() for path in cache.rglob('*') if path.is_file()]
    for text in [*said, *(text.decode('latin1') for text in kept)]:
        assert KEY not in text and KEY.replace('/', '\\/') not in text


def test_endpoint(endpoint, tmp_path, capsys, monkeypatch):
    assert through(endpoint, tmp_path) == [3, 3, 2]                 # equal texts are paid once
    assert sorted(sum(endpoint.asked, [])) == sorted({' ', 'b?', *WORDS} - {'', 'b\ud800'})
    assert {h['Authorization'] for h in endpoint.headers} == {f'Bearer {KEY}'}
    whole, = (tmp_path / 'vectors').rglob('*.npy')                  # and no batch beside it
    assert len(np.load(whole)) == 8
    monkeypatch.delenv('OPENAI_API_KEY')                            # the key names no cache
    (tmp_path / 'netrc').write_text('machine 127.0.0.1 login me password mine')
    monkeypatch.setenv('NETRC', str(tmp_path / 'netrc'))            # which is not looked into
    assert len(through(endpoint, tmp_path)) == 3                    # a hit asks nothing
    assert through(endpoint, tmp_path, model='n')[3:] == [3, 3, 2]
    assert through(endpoint, tmp_path, WORDS[::-1])[6:] == [3, 3, 2]
    monkeypatch.setattr(embed, 'VERSION', 0)
    assert through(endpoint, tmp_path)[9:] == [3, 3, 2]
    assert endpoint.headers[-1]['Authorization'] is None and capsys.readouterr().err == ''
    embed.encode(['x' * 8001, '\u4e2d' * 8000], 'openai:m', cache=tmp_path)
    assert [len(text) for text in endpoint.asked[-1]] == [8000, 2666]
    assert capsys.readouterr().err == 'note: 2 texts cut to 8,000 bytes\n'
    no_key(tmp_path)


BUSY = {'status': 429, 'headers': {'Retry-After': '7'}, 'body': 'slow down'}


@pytest.mark.parametrize('script, waits', [
    ([BUSY], [7]), ([{'status': 500}, {'status': 503}], [1, 2]),
    ([{'status': 429, 'headers': {'Retry-After': 'Wed, 21 Oct 2015 07:28:00 GMT'}}], [1]),
    ([{'more': 20}], [1]),                                          # the connection breaks
    ([{'body': '{"data": [{"ind'}], [1]), ([{'body': '[]'}], [1]), ([{'body': '[' * 9999}], [1]),
    ([{'hang': True}], [1]), ([{'rows': lambda rows: rows[:2]}], [1]),
    ([{'rows': lambda rows: rows[:1] * 3}], [1]), ([{'rows': lambda rows: rows + rows[:1]}], [1]),
    ([{'rows': lambda rows: [row | {'embedding': [1] * row['index']} for row in rows]}], [1])])
def test_endpoint_that_recovers(endpoint, tmp_path, monkeypatch, script, waits):
    monkeypatch.setattr(embed, 'TIMEOUT', .5 if 'hang' in script[0] else 9)
    endpoint.script += script
    assert through(endpoint, tmp_path) == [3] * len(script) + [3, 3, 2] and endpoint.waits == waits


def test_retry_after():
    later = formatdate(time.time() + 100, usegmt=True)
    assert 95 < embed.asked_pause(later) <= 100 and embed.asked_pause('0') == 0
    assert {embed.asked_pause(text) for text in ('', 'soon', '-1', 'nan', '\xb2')} == {0}


@pytest.mark.parametrize('script, match, n_asked', [
    ([{'status': 401, 'body': f'{{"message": "no\nkey {KEY}"}}'}], '401 .*no key [*]', 1),
    ([{'status': 401, 'body': json.dumps(KEY).replace('/', '\\/')}], '401 "[*]', 1),
    ([{'status': 307, 'headers': {'Location': 'http://localhost:1/'}}], ': 307', 1),
    ([BUSY] * 9, 'embeddings: 429 slow down', 3),
    ([{'body': f'<html>out of {KEY.replace("/", "%2F")}</html>'}] * 3, 'not 3 .*<html>out of ..[*]',
     3),
    ([{'status': 429, 'headers': {'Retry-After': '9000'}}], 'asks to wait 9000 s', 1),
    ([{}, {'rows': lambda rows: [row | {'embedding': [1, 2]} for row in rows]}],
     'with 2 numbers, before with 3', 2),
    ([{'rows': lambda rows: [row | {'embedding': [1, 2, math.nan]} for row in rows]}], 'NaN', 1),
    ([{'rows': lambda rows: [row | {'embedding': [1, 2, 1e39]} for row in rows]}], 'NaN or inf', 1)
])
def test_endpoint_that_fails(endpoint, tmp_path, monkeypatch, script, match, n_asked):
    monkeypatch.setattr(embed, 'ATTEMPTS', 3)
    endpoint.script += script
    with pytest.raises((OSError, ValueError), match=match) as error:
        embed.encode(WORDS, 'openai:m', cache=tmp_path)
    assert '\n' not in str(error.value) and len(endpoint.asked) == n_asked
    no_key(tmp_path, str(error.value))
    endpoint.script.clear()                          # good answers are kept, the bad is not
    assert through(endpoint, tmp_path)[n_asked:] == [3, 3, 2][n_asked == 2:]


def test_interrupted_endpoint_resumes(endpoint, tmp_path, monkeypatch):
    def stop(_):
        raise KeyboardInterrupt
    endpoint.script += [{}, {}, BUSY]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(embed.time, 'sleep', stop)
        embed.encode(WORDS, 'openai:m', cache=tmp_path)
    first, _ = sorted((tmp_path / 'vectors' / 'batches').iterdir())
    damaged = bytearray(first.read_bytes())
    damaged[-40] ^= 1                                # one bit of the last number
    first.write_bytes(damaged)
    assert sorted(through(endpoint, tmp_path)[3:]) == [2, 3]
    assert not list((tmp_path / 'vectors' / 'batches').iterdir())


def test_several_runs_at_once(endpoint, tmp_path):
    with ThreadPoolExecutor() as pool:
        runs = [pool.submit(through, endpoint, tmp_path) for _ in range(4)]
    assert all(run.result() for run in runs)
    whole, = [path for path in (tmp_path / 'vectors').rglob('*') if path.is_file()]
    assert len(np.load(whole)) == 8


def test_endpoint_settings(monkeypatch, tmp_path):
    for url in ('ftp://host/v1', 'http://', 'http://user:pass@host/v1', 'host:80/v1',
                'http://h/?q'):
        monkeypatch.setenv('OPENAI_BASE_URL', url)
        one_line(ValueError, '^OPENAI_BASE_URL: expected', ['a'], 'openai:m', cache=tmp_path)
    for url in ('http://h:99999/v1', 'http://[::1/v1', 'http://.h/v1'):     # and at once
        monkeypatch.setenv('OPENAI_BASE_URL', url)
        one_line((OSError, ValueError), '.', ['a'], 'openai:m', cache=tmp_path)
    one_line(ValueError, 'expected openai:MODEL', ['a'], 'openai:', cache=tmp_path)
    monkeypatch.setenv('OPENAI_API_KEY', 'two\nlines')
    one_line(ValueError, '^OPENAI_API_KEY: expected ASCII without blanks$', ['a'], 'openai:m')


def test_npy(tmp_path):
    path, texts = str(tmp_path / 'v.npy'), ['a', 'b', 'c']
    vectors = np.arange(6.).reshape(3, 2)
    np.save(path, vectors)
    assert (embed.encode(texts, path) == vectors).all()
    assert embed.encode(texts, path).dtype == np.float32
    one_line(ValueError, '3 rows for 2 items.*npz', texts[:2], path)
    one_line(FileNotFoundError, 'no such file', texts, str(tmp_path / 'w.npy'))
    for wrong in (np.arange(3.), np.array([[{}]] * 3), np.array([['a']] * 3), np.zeros((3, 0))):
        np.save(path, wrong)
        one_line(ValueError, 'v.npy: (vectors are|not a plain)', texts, path)
    for large in (np.inf, 1e300):                    # more than float32 holds: without a warning
        vectors[1:, 0] = np.nan, large
        np.save(path, vectors)
        with warnings.catch_warnings(action='error'):
            one_line(ValueError, '2 of 3 vectors hold NaN or infinity, first in row 1', texts, path)
    for damage in (b'', b'nonsense', b'\x93NUMPY\x01\x00v\x00{'):
        Path(path).write_bytes(damage)
        one_line(ValueError, 'not a plain .npy', texts, path)


def test_npz(tmp_path):
    path, texts = str(tmp_path / 'v.npz'), ['a', 'b', 'c']
    vectors = np.arange(8.).reshape(4, 2)
    for ids in (['7', '8', '9', '10'], [7, 8, 9, 10], [b'7', b'8', b'9', b'10']):
        np.savez(path, ids=np.array(ids), vectors=vectors)
        assert (embed.encode(texts, path, ids=['10', '7', '9']) == vectors[[3, 0, 2]]).all()
    one_line(ValueError, "2 of 3 items have no vector, such as 11, 12", texts, path,
             ids=['11', '7', '12'])
    one_line(ValueError, 'no item ids were given', texts, path)
    np.savez(path, ids=['7', '8', '7', '7'], vectors=vectors)
    one_line(ValueError, "2 ids stand there more than once, such as '7'", texts, path, ids=texts)
    np.savez(path, ids=['7', '8'], vectors=vectors)
    one_line(ValueError, 'expected one id a row', texts, path, ids=texts)
    np.savez(path, vectors=vectors)
    one_line(ValueError, 'not a plain', texts, path, ids=texts)
    np.savez(path, ids=np.array(['7', None], object), vectors=vectors)
    one_line(ValueError, 'not a plain', texts, path, ids=texts)
    data = Path(path).read_bytes()
    encrypted, unknown, packed = bytearray(data), bytearray(data), io.BytesIO()
    at = data.index(b'PK\1\2')                                         # the central directory
    encrypted[at + 8], unknown[at + 10] = 1, 77
    with zipfile.ZipFile(packed, 'w', zipfile.ZIP_LZMA) as file:
        file.writestr('vectors.npy', bytes(4000))
    lzma, squeezed = bytearray(packed.getvalue()), io.BytesIO()
    np.savez_compressed(squeezed, ids=np.arange(4), vectors=np.random.rand(4, 2))
    deflated = bytearray(squeezed.getvalue())
    for body in lzma, deflated:
        body[60:90] = b'\xff' * 30
    for damage in (b'', b'nonsense', data[:len(data) // 2], encrypted, unknown, lzma, deflated):
        Path(path).write_bytes(damage)
        one_line(ValueError, 'not a plain', texts, path, ids=texts)


BODY = bytes(range(256)) * 40


class Faulty(http.server.BaseHTTPRequestHandler):
    """Answers /whole well, /half with half of what it announces, anything else with 404."""

    def do_GET(self):
        self.send_response(404 if self.path == '/none' else 200)
        self.send_header('Content-Length', str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY[:len(BODY) // 2] if self.path == '/half' else BODY)

    def log_message(self, *_):
        pass


@pytest.fixture
def faulty_server():
    httpd = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Faulty)
    threading.Thread(target=httpd.serve_forever, args=(.01,), daemon=True).start()
    yield f'http://127.0.0.1:{httpd.server_port}'
    httpd.shutdown()
    httpd.server_close()


def test_download(tmp_path, faulty_server):
    path, sha256 = str(tmp_path / 'file'), hashlib.sha256(BODY).hexdigest()
    for url, named in (('/half', {}), ('/none', {}), ('/whole', {'sha256': '0' * 64}),
                       ('/whole', {'size': 7})):
        with pytest.raises((OSError, ValueError)) as error:
            embed.download(faulty_server + url, path, **named)
        assert '\n' not in str(error.value) and not list(tmp_path.iterdir())
    embed.download(faulty_server + '/whole', path, sha256, len(BODY))
    assert Path(path).read_bytes() == BODY and len(list(tmp_path.iterdir())) == 1


def test_every_source_fails(tmp_path, faulty_server, monkeypatch):
    """Damaged local file, a hub with other bytes, a pip that is not there: one line has it all."""
    monkeypatch.setattr(embed, 'HUB', faulty_server)
    monkeypatch.setattr(sys, 'executable', '/bin/false')
    (tmp_path / embed.NAME).mkdir()
    (tmp_path / embed.NAME / 'vocab.txt').write_text('damaged')
    with pytest.raises(OSError) as error:
        embed.encode(['a'], cache=tmp_path)
    for part in ('SHA-256', 'Hugging Face hub: ', 'PyPI: ', 'by hand'):
        assert part in str(error.value)
    assert '\n' not in str(error.value)
    assert {p.name for p in tmp_path.rglob('*')} == {embed.NAME, 'vocab.txt', 'vectors'}


def pypi(tmp_path, monkeypatch, contents, part_bytes=1000, method=zipfile.ZIP_DEFLATED):
    """A pip that finds five wheels, whose parts make a zip of contents; the folder for them."""
    whole, name = io.BytesIO(), embed.NAME
    with zipfile.ZipFile(whole, 'w') as archive:
        for file, body in contents.items():
            archive.writestr(f'{name}/{file}', body)
    whole, step = whole.getvalue(), -(-len(whole.getvalue()) // 5)
    for n in range(1, 6):
        wheel = tmp_path / f"{name.replace('-', '_')}_pypi_part_{n:03}-0.0.1-py3-none-any.whl"
        with zipfile.ZipFile(wheel, 'w', method) as archive:
            archive.writestr(f'{name}-pypi-part_{n:03}/input/{name}.zip.{n:03}',
                             whole[step * (n - 1):step * n])
    (tmp_path / 'pip').write_text('#!/bin/sh\nwhile [ "$1" != --dest ]; do shift; done\n'
                                  f'cp {tmp_path}/*.whl "$2"\n')
    (tmp_path / 'pip').chmod(0o755)
    monkeypatch.setattr(sys, 'executable', str(tmp_path / 'pip'))
    monkeypatch.setattr(embed, 'from_hub', lambda folder: embed.verify(folder / 'none'))
    monkeypatch.setattr(embed, 'PART_BYTES', part_bytes)
    monkeypatch.setattr(embed, 'FILES', {file: (hashlib.sha256(body).hexdigest(), len(body))
                                         for file, body in MODEL.items()})
    return tmp_path / 'folder'


MODEL = {'vocab.txt': b'a' * 900, 'model.safetensors': b'b' * 700}


def test_pypi(tmp_path, monkeypatch):
    folder = pypi(tmp_path, monkeypatch, MODEL | {'README.md': b'r', '../../evil': b'e'})
    (folder / 'pypi-old.part').mkdir(parents=True)   # a run that was killed, and one at work
    (folder / 'pypi-old.part' / 'wheel').write_text('w')
    os.utime(folder / 'pypi-old.part', (0, 0))
    (folder / 'pypi-new.part').mkdir()
    embed.fetch_mpnet(folder)
    assert {p.name for p in folder.iterdir()} == {*MODEL, 'pypi-new.part'}
    assert all((folder / name).read_bytes() == body for name, body in MODEL.items())


@pytest.mark.parametrize('contents, named, match', [
    (MODEL | {'vocab.txt': b'a' * 901}, {}, 'vocab.txt: refused, 901 bytes .*expected 900'),
    (MODEL | {'vocab.txt': b'A' * 900}, {}, 'vocab.txt: SHA-256 is not'),
    (MODEL, {'part_bytes': 100}, '001: refused, .* expected 100 '),
    (MODEL, {'method': zipfile.ZIP_LZMA}, 'method 14'), ({'vocab.txt': b''}, {}, 'no item')])
def test_bad_wheels(tmp_path, monkeypatch, contents, named, match):
    folder = pypi(tmp_path, monkeypatch, contents, **named)
    with pytest.raises(OSError, match=f'PyPI: .*{match}.*by hand'):
        embed.fetch_mpnet(folder)
    assert not list(folder.iterdir())


# Text, token ids, first eight components: sentence-transformers 6.2.0, float32, normalised.
GOLDEN = [
    ('WAWO 15 Color Professionl Makeup Eyeshadow Camouflage Facial Concealer Neutral P'
     'alette. COKA. Beauty, Makeup, Face, Concealers & Neutralizers',
     [0, 11337, 12159, 2325, 3613, 9522, 2144, 5793, 2163, 16106, 5008, 21360, 13272, 19823,
      2125, 8703, 27400, 1016, 2526, 2916, 1016, 5057, 1014, 5793, 1014, 2231, 1014, 19823,
      2549, 1008, 8703, 17633, 2019, 2],
     [0.042036, 0.0326241, 0.021137, -0.0343958, -0.0198064, 0.027867, 0.081691, 0.0570235]),
    ('AT&amp;T TR1909WH Dect 6.0 1-Handset Trimline Landline Telephone with Caller ID.'
     ' AT&amp;T. Office & School Supplies, Tape, Adhesives & Fasteners, Clips, Clamps '
     '& Rings, Clips',
     [0, 2016, 1008, 23717, 1029, 1060, 19821, 16151, 2696, 2687, 2864, 2236, 11707, 2106,
      1024, 1016, 1018, 1019, 1015, 2402, 3392, 12245, 4183, 2459, 4183, 7030, 2011, 20591,
      8913, 1016, 2016, 1008, 23717, 1029, 1060, 1016, 2440, 1008, 2086, 6071, 1014, 6827,
      1014, 4752, 21583, 2019, 1008, 3439, 24458, 2019, 1014, 15285, 1014, 18860, 25171, 1008,
      7639, 1014, 15285, 2],
     [0.0146217, -0.0279917, 0.0161583, -0.0453435, -0.002167, 0.024027, 0.0218823, 0.0271824]),
    ('',
     [0, 2],
     [-0.0125034, 0.0614387, -0.0067345, 0.0252378, 0.0147579, 0.0331775, -0.0170982, -0.0052546]),
    ('\n\t \r',
     [0, 2],
     [-0.0125034, 0.0614387, -0.0067345, 0.0252378, 0.0147579, 0.0331775, -0.0170982, -0.0052546]),
    ('\U0001f600\U0001f603 nice \U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 family',
     [0, 104, 3839, 104, 2159, 2],
     [-0.0680934, 0.0194508, -0.0313246, 0.0401848, 0.0443119, 0.0181785, -0.0253142, -0.0022264]),
    ('\u4e2d\u6587\u5b57\u7b26\u6d4b\u8bd5',
     [0, 1750, 1865, 104, 104, 104, 104, 2],
     [0.0486595, -0.0261086, 0.0122908, 0.0278711, 0.0350826, 0.0263743, -0.0455256, 0.0401049]),
    ('e\u0301cole a\u0308b \u0301alone',
     [0, 12435, 11117, 2898, 2],
     [0.009105, 0.0267472, 0.0234217, 0.0416711, -0.0190135, -0.0321977, 0.0659933, -0.0346592]),
    ('a\x00b\x07c\x7fd\x85e\ufffdf',
     [0, 5929, 3211, 2550, 2],
     [0.0105823, -0.0365582, 0.0052969, -0.042894, -0.0241992, 0.0109861, -0.0157333, 0.0414103]),
    ('x' * 150,
     [0, 104, 2],
     [-0.0104481, 0.0462962, 0.0075116, 0.0224715, 0.0321831, 0.0329378, -0.0560652, 0.0433447]),
    ('foo</s>bar',
     [0, 29383, 2, 3351, 2],
     [0.0289567, 0.0517217, 0.0174238, -0.0783198, -0.029371, 0.0319051, -0.0234664, -0.0091528]),
    ('a<mask>b  <mask>  c',
     [0, 1041, 30526, 1042, 30526, 1043, 2],
     [0.0579114, -0.0277578, -0.012493, -0.0206987, -0.0302286, 0.0059473, 0.0166675, -0.0215348]),
    ('<u\u0301nk> <\xdcNK>',
     [0, 3, 3, 2],
     [0.0025613, 0.0749696, 0.0057538, 0.0280301, -0.0071225, -0.003681, -0.0608543, 0.0247137]),
    ('<pad>x<pad> y',
     [0, 1, 1064, 1, 1065, 2],
     [-0.0087029, 0.0341448, 0.0106878, -0.0045875, -0.0218708, 0.0048575, 0.0223957, 0.0174323]),
    ('\u0391\u03a3 \u03a3\u0391\u03a3 \u039f\u0394\u039f\u03a3',
     [0, 1159, 29737, 1177, 14612, 29737, 1173, 29726, 29734, 29737, 2],
     [-0.0215243, -0.0344295, -0.0029059, -0.0142181, 0.0065527, -0.0092185, -0.0245249,
      0.0241357]),
    ('$100 + 5% = a^b`c|d~e',
     [0, 1006, 2535, 1013, 1023, 1007, 1031, 1041, 1038, 1042, 1040, 1043, 1068, 1044, 1070,
      1045, 2],
     [0.0093882, 0.0120768, -0.0300139, 0.0162505, -0.0210616, 0.0152813, -0.0502817, -0.0399376]),
    ('\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e',
     [0, 1331, 29871, 29878, 29863, 1329, 29867, 29881, 29872, 29880, 2],
     [0.0276774, 0.0484716, -0.0177069, 0.0365224, -0.0506397, 0.0040996, -0.0856586, 0.0436064]),
]
LONG = [0.0326021, -0.0316455, 0.0382969, 0.0535799,
        -0.0333109, -0.0110481, -0.0221956, 0.0350202]          # of 'word ' * 600


@pytest.mark.skipif(not (WEIGHTS / 'model.safetensors').is_file(),
                    reason=f'the weights of all-mpnet-base-v2 are not in {WEIGHTS}')
def test_real_weights(tmp_path):
    tokenizer, _, _ = embed.load_mpnet(WEIGHTS)
    assert [tokenizer(text) for text, _, _ in GOLDEN] == [ids for _, ids, _ in GOLDEN]
    assert len(tokenizer('word ' * 600)) == 384
    found = embed.encode([text for text, _, _ in GOLDEN] + ['word ' * 600], str(WEIGHTS),
                         cache=tmp_path, dtype='float32')
    expected = np.array([vector for _, _, vector in GOLDEN] + [LONG])
    assert np.abs(found[:, :8] - expected).max() < 1e-5
    fast = embed.encode([text for text, _, _ in GOLDEN], str(WEIGHTS), cache=tmp_path,
                        dtype='bfloat16')
    assert (fast * found[:-1]).sum(1).min() >= .9999

# ---- golden values: recorded from the code before its rewrite, what may not move ---------------

def sha(*parts):
    """First 12 hex digits of a SHA-256: of arrays with their types and shapes, or of JSON."""
    found = hashlib.sha256()
    for part in parts:
        array = isinstance(part, np.ndarray)
        found.update(f'{part.dtype.str}{part.shape}'.encode() + part.tobytes() if array else
                     json.dumps(part).encode())
    return found.hexdigest()[:12]


def sha_of_rows(*matrices):
    """sha of rows and columns of csr matrices, whatever their index types."""
    return sha(*(a.astype(np.int64) for m in matrices for a in (m.indptr, m.indices)))


WORDLIST = 'red green tea cup of fine bone china steel kettle for the cold winter'.split()
TITLES = [' '.join(WORDLIST[(n * n + 3 * k) % 14] for k in range(2 + n % 5)) for n in range(20)]
GOLDEN_SPLITS = {           # seeds 0 to 4
    'planted': ['3066c1602a7a', '614d3fa444b8', '49c01c3ca52f', '6ca91c7ca27f', '2ebfec05f79f'],
    'office': ['ef414df52bd9', 'ad5cf1f6be95', '8e1755c05006', '9cc1d1e5a646', '9c1397ac38a9'],
    'beauty': ['b81de24f5d2a', 'eb3487262e39', '155e1f7048ff', '070d0f0a09cc', '9e2e2875a86e']}


def golden_folder(folder):
    """A user's folder: low ratings, unknown items and repeated pairs come before the good rows."""
    rows = [f'u{i * i % 97 % 40}\ti{i * 7 % 23}\t{1 + i * 5 % 6}\t{i}' for i in range(900)]
    items = [f'i{n}\t {TITLES[n % 20]}  \t{n % 3 or ""}\t{"None" if n % 4 else "Acme"}'
             for n in (*range(22, 2, -1), 5, 7)]
    head = 'user_id:token\titem_id:token\trating:float\ttimestamp:float'
    (folder / 'x.inter').write_text('\n'.join([head, *rows]) + '\n')
    head = 'item_id:token\ttitle:token_seq\tprice:float\tbrand:token'
    (folder / 'x.item').write_text('\n'.join([head, *items]) + '\n')
    return folder


def golden_vectors():
    """Item vectors (30, 24) float32."""
    n = np.arange(30 * 24, dtype=np.float64).reshape(30, 24)
    return (np.sin(n * n / 7) * (1 + np.arange(24) % 5)).astype(np.float32)


class TestGolden:
    """A figure of the READMEs stands on each of these."""

    @pytest.mark.parametrize('dataset, seed', [(name, seed) for name in GOLDEN_SPLITS
                                               for seed in range(5)])
    def test_splits(self, dataset, seed):
        if dataset != 'planted' and not (SHARED / data.FOLDERS[dataset]).is_dir():
            pytest.skip(f'{SHARED / data.FOLDERS[dataset]} is not there')
        pairs = planted() if dataset == 'planted' else data.load(dataset, str(SHARED))[0]
        parts = data.split(pairs, np.random.default_rng(seed))
        assert sha_of_rows(*parts) == GOLDEN_SPLITS[dataset][seed]

    def test_numbers_texts_and_low_ratings_of_a_folder(self, tmp_path):
        pairs, *names, low = data.load(str(golden_folder(tmp_path)), core=3)
        assert pairs.shape == (31, 20) and pairs.nnz == 298 and low.nnz == 296
        assert [sha_of_rows(pairs, low), *map(sha, names)] == [
            'cdb16e1d0424', '957be9ff2058', '76dc52a708ec', '2c2b2fa7cec6', 'aa9103e13012']

    @pytest.mark.parametrize('strategy, popular, expected', [
        ('uni', 1, '307f06b3d636'), ('rand', 1, 'de105f0758b4'), ('full', 1, 'a2727ec2d7c3'),
        ('var', 1, '2923a538f11d'), ('var', .2, 'aee704da9442')])
    def test_selections(self, strategy, popular, expected):
        more = {'popular': popular, 'degree': np.arange(30) * 11 % 13}
        found = llminit.select_dims(golden_vectors(), 8, strategy, np.random.default_rng(3), **more)
        assert sha(np.ascontiguousarray(found)) == expected

    @pytest.mark.parametrize('strategy, whiten, expected', [
        ('pca', 0, [-0.07898412, -5.14005, -4.314143, -2.024365, 2.786091, 0.4935932, -1.772089,
                    0.768344]),
        ('pca', .5, [-0.06968874, -4.715653, -4.172566, -2.120819, 2.936057, 0.5288379, -1.988201,
                     0.9298593]),
        ('noise', 0, [-0.7007462, -1.039066, 1.113004, -1.610943, -2.137043, 1.105219, 5.656437,
                      -0.5652312])])
    def test_projections(self, strategy, whiten, expected):
        found = llminit.select_dims(golden_vectors(), 8, strategy, np.random.default_rng(3),
                                    whiten=whiten)
        np.testing.assert_allclose(found[17], expected, atol=3e-6)

    @pytest.mark.parametrize('pool, expected', [
        ('mean', [-0.2360197, 0.1798038, -0.1202291, -0.3377323]),
        ('sqrt', [-0.6244493, 0.4757161, -0.3180962, -0.8935555]),
        ('sum', [-1.652138, 1.258626, -0.8416035, -2.364126])])
    def test_pooled_users(self, pool, expected):
        users0 = llminit.pool_users(random_graph(40, 30, .2), golden_vectors()[:, :4], pool)
        np.testing.assert_allclose(users0[21], expected, atol=1e-6)
        assert not users0[39].any()

    def test_random_start(self):
        found = llminit.xavier(np.random.default_rng(5), 70_000, 3)
        assert sha(found) == 'a841c84bd247'

    @pytest.mark.parametrize('strategy, model, state', [
        ('none', 'lightgcn', 646395709), ('none', 'sgcl', 646395709),
        ('rand', 'lightgcn', 801373465), ('uni', 'lightgcn', 462881391),
        ('var', 'lightgcn', 462881391), ('pca', 'lightgcn', 462881391),
        ('var', 'morec', 462881391), ('noise', 'lightgcn', 513701512)])
    def test_the_generator_as_training_receives_it(self, tmp_path, monkeypatch, strategy, model,
                                                   state):
        def stop(name, observed, valid, users0, items0, rng, **settings):
            raise ValueError(f'at {rng.bit_generator.state["state"]["state"] % 10 ** 9}')
        monkeypatch.setattr(models, 'train', stop)
        given = ['--dataset', str(golden_folder(tmp_path)), '--core', '3', '--encoder', 'tfidf',
                 '--dim', '6', '--seed', '4', '--strategy', strategy, '--model', model]
        with pytest.raises(ValueError, match=f'at {state}$'):
            llminit.main(given)

    @pytest.mark.parametrize('name, expected', [
        ('lightgcn', [0.68869924, 0.68693212]), ('bpr', [0.69441488, 0.69096425]),
        ('sgl', [191.03085, 189.50831]), ('sgcl', [1652.995, 1604.3495]),
        ('morec', [0.69786463, 0.70078603])])
    def test_losses_of_two_epochs(self, name, expected):
        train, valid, _ = data.split(planted(), np.random.default_rng(0))
        rng = np.random.default_rng(1)
        start = [llminit.xavier(rng, n, 16) for n in train.shape]
        *_, curve = models.train(name, train, valid, *start, rng, epochs=2, log=lambda line: None)
        np.testing.assert_allclose([epoch['loss'] for epoch in curve], expected, rtol=1e-5)

    def test_tfidf(self):
        found = embed.encode(TITLES, 'tfidf')
        assert found.shape == (20, 14)
        np.testing.assert_allclose(found[[0, 19], :5], [
            [0.372153, 0.517568, -0.0903844, -0.32861, -0.0507934],
            [0.640194, 0.60033, 0.246317, -0.252106, -0.251128]], atol=1e-5)

    def test_tokens_and_a_toy_mpnet(self, tmp_path):
        tiny_mpnet(tmp_path / 'tiny')
        tokenizer = embed.Tokenizer(VOCAB)
        assert sha([tokenizer(text) for text in TEXTS]) == '05675cf818d4'
        found = embed.encode(TEXTS, str(tmp_path / 'tiny'), cache=tmp_path)
        np.testing.assert_allclose(found[[0, 7, 8], :4], [
            [0.1236728, -0.04979077, 0.08403431, 0.2003817],
            [0.1124547, -0.04108788, 0.08905905, 0.192076],
            [0.1327625, -0.06708517, 0.1133394, 0.1721176]], atol=2e-6)
