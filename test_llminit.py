"""Tests of llminit: python -m pytest. No network but loopback; what needs real data or weights skips where they
are absent, and says so."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch

import data
import embed
import llminit
import models

HERE = Path(__file__).resolve().parent

# ---- llminit.py: selection and pooling -------------------------------------------------------

def test_uni_takes_every_floor_n_over_k():
    vectors = np.arange(3 * 10, dtype=np.float32).reshape(3, 10)
    assert (llminit.select_dims(vectors, 4, 'uni')[0] == [0, 2, 4, 6]).all()


def test_rand_draws_distinct_dimensions_and_is_its_seeds():
    vectors = np.tile(np.arange(50, dtype=np.float32), (2, 1))
    kept = [llminit.select_dims(vectors, 40, 'rand', np.random.default_rng(s))[0] for s in (1, 1, 2)]
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
    z, start = model.at(nodes)
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
            rank = sum(not scores[j] < scores[i] for j in range(len(items)) if j not in out and j != i)
            gains += rank < k and 1 / np.log2(2 + rank)
            recall.append((u, rank < k))
        ndcg.append(gains / sum(1 / np.log2(2 + r) for r in range(min(k, len(wanted)))))
    recall = [np.mean([hit for v, hit in recall if v == u]) for u in dict.fromkeys(u for u, _ in recall)]
    return np.array(recall), np.array(ndcg)


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
    assert first > 2 * score(1)[0] * .5 and first > .35                # chance: about .1
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
    options = ['--dataset', own, '--encoder', 'tfidf', '--dim', 16, '--epochs', 3, '--cache', tmp_path]
    command = [sys.executable, HERE / 'llminit.py', *options]
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ''
    cells = done.stdout.splitlines()[-1].split(' | ')
    assert cells[0] == f'| {own}' and cells[1:3] == ['lightgcn', 'var']
    assert llminit.command(list(map(str, options))) == 0
    again = capsys.readouterr().out.splitlines()[-1].split(' | ')
    assert cells[:-1] == again[:-1]                                    # all but the seconds


def test_with_seen_keep_the_papers_figure_stands_beside():
    args = llminit.parse(['--dataset', 'office', '--seen', 'keep', '--strategy', 'var'])
    row = llminit.result_row(args, (np.ones(2), np.zeros(2)), [{'epoch': 1, 'ndcg': .1}], 640, 1.)
    assert row.splitlines()[0].endswith('| paper |') and row.endswith('| .0816/.0414 |')
    assert row.splitlines()[-1].startswith('| office | lightgcn | var | 1.0000 | 0.0000 | ')


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


@pytest.mark.parametrize('file', ['data.py', 'embed.py', 'llminit.py', 'models.py'])
def test_each_file_imports_alone_in_an_empty_folder_and_does_nothing(tmp_path, file):
    shutil.copy(HERE / file, tmp_path)
    code = f'import {file[:-3]}'
    done = subprocess.run([sys.executable, '-B', '-I', '-c', f'import sys; sys.path.insert(0, "."); {code}', '--x'],
                          cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')
    assert [p.name for p in tmp_path.iterdir()] == [file]
