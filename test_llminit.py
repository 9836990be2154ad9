"""Tests of llminit: python -m pytest. No network but loopback; what needs real data or weights
skips if they are absent, and says so. In the order of the modules."""
import contextlib
import doctest
import gzip
import hashlib
import http.server
import inspect
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings, strategies as st
from scipy.special import erf, softmax

os.environ.setdefault('OMP_WAIT_POLICY', 'passive')      # as main() does; read with torch's import
import torch  # noqa: E402

import data
import embed
import llminit
import models

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent / 'shared' / 'data'
WEIGHTS = Path('~/.cache/llminit/all-mpnet-base-v2').expanduser()
NAMES = 'lightgcn', 'sgl', 'sgcl', 'bpr'      # not models.MODELS, to which run.py adds
torch.set_num_threads(1)         # tiny products: threads only wait for each other


# ---- made-up data and a made-up server --------------------------------------------------------

def random_graph(n_users=30, n_items=20, density=.15, seed=0):
    """A csr (U, I) of ones in which the last user and the last item have no interaction."""
    dense = np.random.default_rng(seed).random((n_users, n_items)) < density
    dense[-1] = dense[:, -1] = False
    return sp.csr_matrix(dense.astype(np.float32))


def planted(n_users=120, n_items=60, n_groups=4, per_user=12, seed=0):
    """Users and items of n_groups tastes, a tenth of the interactions at random: csr (U, I)."""
    rng = np.random.default_rng(seed)
    own = np.arange(n_users)[:, None] % n_groups == np.arange(n_items) % n_groups
    score = rng.random((n_users, n_items)) + 2 * own * (rng.random((n_users, n_items)) < .9)
    dense = score >= np.sort(score)[:, [-per_user]]
    return sp.csr_matrix(dense.astype(np.float32))


def write_files(folder, *files):
    """Files {name: text or bytes}, in the notation of CASES -> the folder's path."""
    folder.mkdir(exist_ok=True)
    for name, text in (item for some in files for item in some.items()):
        if isinstance(text, str):
            text = text.replace('@', 'user_id,item_id').replace(' / ', '\n').replace('⇥', '\t')
            text = text.encode()
        (folder / name).write_bytes(text)
    return str(folder)


def write_planted(folder):
    """planted() as a user's folder, with titles that show the tastes."""
    words = ['red apple fruit', 'blue steel tool', 'soft wool yarn', 'loud brass horn']
    pairs = [f'u{u},i{i},5\n' for u, i in zip(*planted().nonzero())]
    items = [f'i{i},{words[i % 4]} number {i}\n' for i in range(60)]
    write_files(folder, {'interactions.csv': '@,rating\n' + ''.join(pairs),
                         'items.csv': 'item_id,title\n' + ''.join(items)})
    return folder


@pytest.fixture
def own(tmp_path):
    return write_planted(tmp_path / 'own')


def main_on(folder, *flags):
    """llminit.command on a folder, with a quick encoder -> exit code."""
    return llminit.command(list(map(str, ['--dataset', folder, '--encoder', 'tfidf', '--dim', 8,
                                          '--epochs', 2, *flags])))


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves pages; the next act of its script comes first."""

    def asked(self):
        """What is asked for besides the path: here nothing."""

    def page(self, name, asked, act):
        """The body of an answer, or None."""
        return self.server.pages.get(name)

    def do_GET(self):
        web, name, asked = self.server, self.path.lstrip('/'), self.asked()
        web.asked.append((name, asked, self.headers))
        act = web.script.pop(0) if web.script else {}
        body = self.page(name, asked, act)
        body = act['body'].encode() if 'body' in act else body
        self.send_response(act.get('status', 404 if body is None else 200))
        for header, value in act.get('headers', {}).items():
            self.send_header(header, value)
        body = body or b'no\n'
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body[:len(body) // 2] if 'cut' in act else body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server on loopback with pages {path: bytes}, a script of acts, asked [(path, what
    besides, headers)] and waits, the seconds that its clients would have slept."""
    web = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    web.pages, web.script, web.asked, web.waits = {}, [], [], []
    web.url = f'http://127.0.0.1:{web.server_port}/'
    threading.Thread(target=web.serve_forever, kwargs={'poll_interval': .01}).start()
    monkeypatch.setattr(data, 'URL', web.url)
    monkeypatch.setattr(embed, 'HUB', web.url.rstrip('/'))
    monkeypatch.setattr('urllib3.util.retry.time.sleep', web.waits.append)
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    yield web                    # pytest goes on here, whether the test failed or not
    web.shutdown()
    web.server_close()


def finished(*command, cwd=HERE, **more):
    """A process that has ended, or was killed after two minutes: (exit code, stdout, stderr). more:
    its environment besides ours."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True,
                          text=True, timeout=120,
                          env={**os.environ, 'OMP_NUM_THREADS': '1', **more})
    return done.returncode, done.stdout, done.stderr


def fails(match, call, *args, **named):
    """call(*args, **named) fails with this message, in one line -> the message."""
    with pytest.raises((ValueError, OSError), match=match) as caught:
        call(*args, **named)
    said = str(caught.value)
    assert '\n' not in said and '\r' not in said
    return said


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

GOLDEN_FILE = 'vectors/all-mpnet-base-v2-9d29b948f186ed680c66d6ddd37e3f47.npy'     # float32, cpu


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

    @pytest.mark.parametrize('dataset', ['beauty', 'office', 'toys'])
    def test_sizes_and_splits_of_the_real_sets(self, dataset, capsys):
        if not (SHARED / data.FOLDERS[dataset]).is_dir():
            pytest.skip(f'{SHARED / data.FOLDERS[dataset]} is not there')
        matrix, texts, titles, users, items, low = data.load(dataset, str(SHARED))
        assert (*matrix.shape, matrix.nnz) == data.SIZES[dataset]
        assert matrix.shape == low.shape == (len({*users}), len({*items})) and all(texts)
        assert len(texts) == len(titles) == len(items) and capsys.readouterr().err == ''
        for seed, expected in enumerate(GOLDEN_SPLITS.get(dataset, [])):
            assert sha_of_rows(*data.split(matrix, np.random.default_rng(seed))) == expected

    def test_splits(self):
        assert [sha_of_rows(*data.split(planted(), np.random.default_rng(seed)))
                for seed in range(5)] == GOLDEN_SPLITS['planted']

    def test_numbers_texts_and_low_ratings_of_a_folder(self, tmp_path):
        pairs, *names, low = data.load(str(golden_folder(tmp_path)), core=3,
                                       text_columns=['title', 'brand'])
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
        ('noise', 'lightgcn', 513701512)])
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
        ('sgl', [0.78192799, 0.77571669]), ('sgcl', [6.7553562, 6.5508094])])
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

    def test_tokens_and_a_toy_mpnet(self, tmp_path, tiny):
        tokenizer = embed.Tokenizer(VOCAB)
        assert sha([tokenizer(text) for text in TEXTS]) == '05675cf818d4'
        found = embed.encode(TEXTS, cache=tmp_path)
        np.testing.assert_allclose(found[[0, 7, 8], :4], [
            [0.1236728, -0.04979077, 0.08403431, 0.2003817],
            [0.1124547, -0.04108788, 0.08905905, 0.192076],
            [0.1327625, -0.06708517, 0.1133394, 0.1721176]], atol=2e-6)

    def test_vectors_lie_in_the_cache_where_they_always_did(self, tmp_path, monkeypatch):
        monkeypatch.setattr(embed, 'fast_dtype', lambda device: 'float32')
        monkeypatch.setattr(embed, 'fetch_mpnet', lambda folder: None)
        monkeypatch.setattr(embed, 'run_mpnet', lambda texts, *_: np.ones((len(texts), 3)))
        embed.encode(TITLES, cache=tmp_path)
        file, = tmp_path.rglob('*.npy')
        assert str(file.relative_to(tmp_path)) == GOLDEN_FILE


# ---- llminit.py -------------------------------------------------------------------------------

class TestSelection:
    """TestGolden has exact figures of every strategy, but not of joint."""

    def test_uni_skips_as_many_dimensions_each_time(self):
        kept = llminit.select_dims(np.eye(10), 4, 'uni')               # 10 is no multiple of 4
        assert (kept == np.eye(10)[:, [0, 2, 4, 6]]).all()

    def test_joint_is_the_root_of_a_closed_form_over_interactions_and_text(self):
        rng, train = np.random.default_rng(0), random_graph(60, 30, .2)
        vectors = rng.standard_normal((30, 7)).astype(np.float32)
        vectors[3] = 0                                                 # an item without words
        found = llminit.joint(vectors, train, 9)
        sizes = np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
        X, F = train.toarray().astype(float), vectors.astype(float) / sizes
        D = X.sum(0) + 40
        M = (X.T @ X + 10 * F @ F.T + 30 * np.eye(30)) / np.sqrt(np.outer(D, D))
        w, V = np.linalg.eigh(np.eye(30) - np.linalg.inv(M))
        best = V[:, -9:] * np.maximum(w[-9:], 0) @ V[:, -9:].T         # of rank 9, no sign
        assert (w[-9:] > 0).sum() > 3
        np.testing.assert_allclose(found @ found.T, best, atol=1e-4)
        assert found.dtype == llminit.pool_users(train, found).dtype == np.float32
        train.data[:] = 5                                              # ratings count as ones
        assert (found == llminit.joint(vectors, train, 9)).all()

    @pytest.mark.parametrize('K, strategy, popular, value, message', [
        (0, 'var', 1, 0, 'cannot keep 0 of 10'), (3, 'rand', 1, 0, 'rand needs rng'),
        (3, 'none', 1, 0, "strategy 'none': expected one of rand"),
        (3, 'var', .5, 0, 'popular < 1 needs degree'), (4, 'pca', 1, 0, 'fewer than K = 4'),
        (2, 'uni', 1, np.nan, 'vectors: 1 of 4 rows hold NaN')])
    def test_errors(self, K, strategy, popular, value, message):
        vectors = np.eye(4, 10, dtype=np.float32)
        vectors[1, 4] = value
        fails(message, llminit.select_dims, vectors, K, strategy, popular=popular)

    def test_pool_users_refuses_stored_zeros_and_unknown_pools(self):
        train = random_graph(7, 9, .4)
        fails("pool 'max': expected one of mean, sqrt, sum", llminit.pool_users, train, 0, 'max')
        fails('9 items for 8 item vectors', llminit.pool_users, train, np.ones((8, 2)))
        train.data[3] = 0                                              # as X.data >= 4 makes them
        fails('eliminate_zeros', llminit.pool_users, train, np.ones((9, 2)))
        fails('eliminate_zeros', models.adjacency, train)

    @pytest.mark.parametrize('form', [sp.csc_matrix, sp.coo_array, sp.csr_matrix.toarray])
    def test_other_matrices_mean_the_same(self, form):
        train, vectors = random_graph(12, 12, .3), np.eye(12, 20, 3) + 1

        def made(x):
            yield from (llminit.pool_users(x, vectors), llminit.joint(vectors, x, 3))
            yield from (models.adjacency(x), *models.evaluate(torch.eye(12), torch.eye(12), x, x))
            yield from (*data.split(x, 0), data.thin(x, .5, 0), data.k_core(x, 2)[2])
        for one, other in zip(made(train), made(form(train)), strict=True):
            assert one.shape == other.shape and (one != other).sum() == 0

    def test_other_arrays_are_read_right_or_named(self):
        train, rows = random_graph(5, 4, .5), (np.arange(24.).reshape(4, 6) * 37 % 101).astype('f4')

        def made(array):
            return (*(llminit.select_dims(array, 2, name, 0) for name in ('var', 'pca', 'noise')),
                    llminit.pool_users(train, array), llminit.joint(array, train, 2))
        for array in (torch.from_numpy(rows), rows.astype('>f4'), rows.tolist(),
                      np.asfortranarray(rows), rows.astype('u1'), rows.astype('f2')):
            for found, expected in zip(made(array), made(rows)):
                np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)
                assert found.flags.c_contiguous and found.dtype.isnative
        for array in (torch.ones(4, 6, dtype=torch.bfloat16), torch.ones(4, 6, requires_grad=True),
                      rows.astype(object), np.ones(4), np.ones((4, 6, 2)), np.ones((4, 6), 'U1')):
            for call in ((llminit.select_dims, array, 2), (llminit.joint, array, train, 2)):
                assert fails('^vectors', *call)
            fails('^items0', llminit.pool_users, train, array)
        one, other = (llminit.select_dims(rows, 2, 'rand', rng)
                      for rng in (7, np.random.default_rng(7)))
        assert (one == other).all()                                    # a seed is a generator
        assert not np.shares_memory(llminit.select_dims(rows, 6, 'full'), rows)


def rows_of(out):
    """The cells of the table rows in what a run printed, without seconds and command."""
    return [line.split(' | ')[:8] for line in out.splitlines() if line[0] == '|']


class TestCommandLine:
    def test_it_prints_a_header_the_epochs_and_the_same_row_twice(self, own, capsys):
        first, second = ((main_on(own), capsys.readouterr())[1] for _ in range(2))
        assert all(line.startswith('note: ') for line in first.err.splitlines())
        header, *epochs = first.out.splitlines()[:3]
        assert header == (f'{own}: 120 users, 60 items, 1,440 interactions: 1,200 train, '
                          '120 valid, 120 test')
        assert [line[:9] for line in epochs] == ['epoch   1', 'epoch   2']
        assert rows_of(first.out) == rows_of(second.out) and len(first.out.splitlines()) == 6
        assert rows_of(first.out)[2][:3] == [f'| {own}', 'lightgcn', 'var']

    @pytest.mark.parametrize('model, strategy', [
        *((model, 'var') for model in NAMES),
        *(('lightgcn', strategy) for strategy in ('none', *llminit.SELECTIONS, 'joint'))])
    def test_each_model_and_each_strategy_runs(self, own, capsys, model, strategy):
        flags = ['--dim', '16'] if strategy != 'full' else []
        assert llminit.command(['--dataset', str(own), '--encoder', 'tfidf', '--epochs', '4',
                                '--model', model, '--strategy', strategy, '--batch', '128',
                                '--lr', '.01', *flags]) == 0
        cells = rows_of(capsys.readouterr().out)[-1]
        assert cells[1:3] == [model, strategy]
        if strategy in ('var', 'pca', 'full'):                         # these cannot miss the text
            assert float(cells[4]) > .3                                # chance: about .1

    @pytest.mark.parametrize('flags, expected', [
        ('--seen keep --lr .5 --model sgl --views walk', dict(
            mask_seen=False, lr=.5, batch=2048, patience=7, epochs=300, views='walk', tau=.2)),
        ('--preset paper', {'batch': 256, 'mask_seen': True}), ('--model sgcl', {'batch': 256}),
        ('--batch 7', {'batch': 7})])
    def test_the_flags_of_training_arrive(self, flags, expected):
        found = llminit.train_arguments(llminit.parse(flags.split()))
        assert found == found | expected

    def test_the_test_hides_what_was_seen_unless_it_is_kept(self, own, monkeypatch):
        calls, evaluate = [], models.evaluate

        def spy(users, items, target, seen=None, k=10):
            calls.append(None if seen is None else seen.nnz)
            assert seen is None or not target.multiply(seen).nnz       # not what was learnt from
            return evaluate(users, items, target, seen, k)
        monkeypatch.setattr(models, 'evaluate', spy)
        for seen in ('mask', 'keep'):
            assert main_on(own, '--epochs', 1, '--seen', seen) == 0
        assert calls == [1440 - 240, 1440 - 120, None, None]

    @pytest.mark.parametrize('flags, message', [
        ('--dim 4000', 'cannot keep 4000 of'), ('--dim 0', '0 is no whole number from 1 up'),
        ('--dim x', 'x is no whole number from 1 up'), ('--whiten nan', 'no number from 0 to 1'),
        ('--columns foo', 'foo: expected NAME=THEIRS, such as'),
        ('--dataset nowhere', 'nowhere: neither a folder'), ('--strategy best', 'invalid choice'),
        ('--strategy full', 'leave out --dim'), ('--colour=r\ned', 'arguments: --colour=r ed'),
        ('--dataset ml-100k --data /dev/null', 'ml-100k: '), ('--core 99', 'lower min_rating or'),
        ('--cache /dev/null --encoder mpnet', 'cache')])
    def test_bad_input_is_one_line_and_exit_code_2(self, own, tmp_path, capsys, flags, message):
        before = sorted(tmp_path.rglob('*'))
        try:
            code = main_on(own, *flags.split(' '))
        except SystemExit as stop:                                     # argparse leaves this way
            code = stop.code
        err = [line for line in capsys.readouterr().err.splitlines() if line[:6] != 'note: ']
        assert code == 2 and len(err) == 1 and message in err[0], err
        assert err[0].startswith('llminit: error: ')
        assert sorted(tmp_path.rglob('*')) == before                   # nothing half-written


START = """
import runpy, signal, sys
sys.argv[0] = 'llminit.py'
set_signal = signal.signal
def said(number, handler):
    set_signal(number, handler)
    if number == signal.SIGTERM:
        print('signals are set', flush=True)
signal.signal = said
sys.path.insert(0, '.')
runpy.run_path('llminit.py', run_name='__main__')
"""


class TestSave:
    def test_a_run_is_saved_and_nothing_known_is_recommended(self, own, tmp_path):
        saved = tmp_path / 'new' / 'saved'
        low = f'i{planted()[0].toarray().argmin()}'                    # one that u0 rates low
        with open(own / 'interactions.csv', 'a') as file:
            file.write(f'u0,{low},1\n')
        assert main_on(own, '--save', saved, '--top', 60) == 0
        run = json.loads((saved / 'run.json').read_text())
        users, items = (np.load(saved / name) for name in ('users.npy', 'items.npy'))
        assert users.shape == (120, 8) and items.shape == (60, 8) and users.dtype == np.float32
        assert run['settings']['dim'] == 8 and run['metrics']['model'] == 'lightgcn'
        head, *lines = (line.split('\t') for line in
                        (saved / 'recommendations.tsv').read_text().splitlines())
        assert head == ['user_id', 'rank', 'item_id', 'score', 'title']
        known = {(run['users'][u], run['items'][i]) for u, i in zip(*planted().nonzero())}
        told = {(user, item) for user, _, item, *_ in lines}
        assert len(told) == 120 * 60 - 1440 - 1 and not told & {*known, ('u0', low)}
        for user, _, item, score, title in lines[::97]:
            expected = users[run['users'].index(user)] @ items[run['items'].index(item)]
            assert abs(float(score) - expected) < 1e-4 and title.endswith(f'number {item[1:]}')
        for name in ('.part-old', '.part-new'):                        # of runs that were killed
            (saved / name).mkdir()
        os.utime(saved / '.part-old', (0, 0))
        assert main_on(own, '--save', saved, '--seed', 1) == 0
        assert (np.load(saved / 'users.npy') != users).any()
        assert {path.name for path in saved.iterdir()} == {*llminit.SAVED, '.part-new'}
        told = json.loads((saved / 'run.json').read_text())['sha256']
        assert told == {name: hashlib.sha256((saved / name).read_bytes()).hexdigest()
                        for name in ('users.npy', 'items.npy')}
        assert llminit.SAVED[-1] == 'run.json'                         # the last to be renamed

    @pytest.mark.parametrize('run', [None, '', '["settings"]', '{"metrics": 1}', '[' * 10 ** 5])
    def test_a_folder_of_something_else_is_not_touched(self, own, capsys, monkeypatch, run):
        monkeypatch.setattr(models, 'train', None)                     # is not reached
        if run is not None:
            (own / 'run.json').write_text(run)
        before = {path.name: path.read_bytes() for path in own.iterdir()}
        for place in (own, '/dev/null/x', '/dev/null', '', own / 'items.csv'):
            assert main_on(own, '--save', place) == 2
            assert len(capsys.readouterr().err.splitlines()) == 1
        assert {path.name: path.read_bytes() for path in own.iterdir()} == before

    def test_a_reader_that_ends_and_letters_that_are_lacking_lose_no_run(self, own, tmp_path):
        folder, saved = own.rename(own.parent / 'größe'), tmp_path / 'ö'
        program = f'{sys.executable} llminit.py --strategy none --dim 4 --epochs 3'
        done = subprocess.run(
            f'PYTHONIOENCODING=ascii {program} --dataset {folder} --save {saved} | head -1; '
            'echo ${PIPESTATUS[0]}', shell=True, executable='/bin/bash', cwd=HERE,
            capture_output=True, text=True, timeout=120)
        header, code = done.stdout.splitlines()
        assert r'gr\xf6\xdfe: 120 users' in header and code == '0' and 'rror' not in done.stderr
        assert (saved / 'run.json').is_file()

    @pytest.mark.parametrize('sign, code, seconds', [
        (signal.SIGINT, 130, 0), (signal.SIGTERM, 143, 1)])            # importing, training
    def test_a_stopped_run_ends_in_one_line_and_leaves_nothing(self, own, tmp_path, sign, code,
                                                               seconds):
        process = subprocess.Popen(
            [sys.executable, '-c', START, '--dataset', own, '--strategy', 'none', '--epochs',
             '99999', '--patience', '99999', '--save', tmp_path / 's'], cwd=HERE, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        process.stdout.readline()                                      # it is about to import numpy
        time.sleep(seconds)
        process.send_signal(sign)
        out, err = process.communicate(timeout=60)
        err = [line for line in err.splitlines() if line[:5] != 'note:']
        assert process.returncode == code and err == ['llminit: stopped']
        assert not [path for path in tmp_path.rglob('*') if path.name.startswith('.part')]

    def test_a_failed_save_leaves_the_old_run(self, tmp_path):
        saved, table, scores = tmp_path / 'saved', np.ones((1, 2)), (np.array([[0]]), [[.5]])
        llminit.check_folder(saved)
        run = {'users': ['u'], 'items': ['i']}
        llminit.save(saved, table, table, run, scores, ['a\tb'])
        assert (saved / 'recommendations.tsv').read_text().splitlines()[1] == 'u\t1\ti\t0.5\ta b'
        with pytest.raises(TypeError):
            llminit.save(saved, 2 * table, table, run | {'x': {1}}, scores, ['t'])
        assert (np.load(saved / 'users.npy') == 1).all() and len(list(saved.iterdir())) == 4


# ---- models.py --------------------------------------------------------------------------------

def textbook_adjacency(observed):
    """A_hat (U+I, U+I) in float64, by the textbook formula."""
    A = sp.block_array([[None, observed], [observed.T, None]]).toarray().astype(np.float64)
    scale = 1 / np.sqrt(np.maximum(A.sum(1), 1))             # rows without edges are zero anyway
    return sp.csr_matrix(scale[:, None] * A * scale)


def make(name, observed, K=5, **more):
    """A model with a random start, its views drawn."""
    rng = np.random.default_rng(3)
    start = [rng.standard_normal((n, K)).astype(np.float32) for n in observed.shape]
    model = models.MODELS[name](models.adjacency(observed), *start, **more)
    model.new_epoch(rng)
    return model


TRIPLES = torch.tensor([(0, 3, 7), (4, 4, 4), (0, 3, 9), (28, 0, 18), (7, 7, 1), (29, 19, 2)])


def naive_loss(model, E, P, triples, reg):
    """The loss of section 2, term by term in float64; P: (U+I, U+I) of the graph and the views."""
    (u, i, j), n, unit = triples.T, model.n_users, torch.nn.functional.normalize
    z = P[0] @ E
    pairs = torch.log(1 + torch.exp((z[u] * z[n + j]).sum(1) - (z[u] * z[n + i]).sum(1)))
    penalty = reg * sum(E[rows].norm() for rows in (u, n + i, n + j)) / len(u)
    if isinstance(model, models.SGL):
        one, two, F = unit(P[1] @ E), unit(P[2] @ E), torch.nn.functional
        users = F.cross_entropy(one[u] @ two[:n].T / .2, u, reduction='sum')
        items = F.cross_entropy(one[n + i] @ two[n:].T / .2, i, reduction='sum')
        return pairs.sum() + penalty + .05 * (users + items)
    if isinstance(model, models.SGCL):
        a, b = unit(z[u]), unit(z[n + i])
        below = torch.exp(a @ a.T / .2).sum(1) + torch.exp(b @ b.T / .2).sum(1)
        return -torch.log(torch.exp((a * b).sum(1) / .2) / below).sum()
    return pairs.mean() + penalty


class TestModels:
    @pytest.mark.parametrize('name, more', [
        ('lightgcn', {}), ('lightgcn', {'n_layers': 3}), ('bpr', {}), ('sgcl', {}), ('sgl', {}),
        ('sgl', {'views': 'node'}), ('sgl', {'views': 'walk', 'n_layers': 3})])
    @pytest.mark.parametrize('form', ['few rows', 'many rows', 'sparse tensors'])
    def test_each_and_its_gradient_are_the_naive_formula(self, name, more, form, monkeypatch):
        observed = random_graph(density=.3)
        model = make(name, observed, **more)
        P, textbook = [], [textbook_adjacency(observed)] * len(model.graphs)
        for graphs in (textbook, *getattr(model, 'views', ())):
            layers = [np.eye(50)]
            for graph in graphs:
                layers.append(graph.toarray() @ layers[-1])
            P.append(torch.from_numpy(sum(layers) / len(layers)))
        if form == 'sparse tensors':                                   # as a GPU has them
            monkeypatch.setattr(torch.Tensor, 'to', lambda tensor, device: tensor)
            for graphs in (model.graphs, *getattr(model, 'views', ())):
                graphs[:] = [models.on_device(graph, 'cuda') for graph in graphs]
        triples = TRIPLES.repeat(10 if form == 'many rows' else 1, 1)  # 180 or 18 of 50 nodes
        model.reg *= 1e4                                               # or it would hardly be seen
        loss = model.loss(*triples.T)
        E = model.table.detach().double().requires_grad_()
        expected = naive_loss(model, E, P, triples, reg=.1)
        np.testing.assert_allclose(loss.item(), expected.item(), rtol=1e-5)
        loss.backward()
        expected.backward()
        np.testing.assert_allclose(model.table.grad, E.grad, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(np.concatenate(model.embeddings()), P[0] @ E.detach(), atol=1e-6)

    @pytest.mark.parametrize('views', ['edge', 'node', 'walk'])
    def test_views_drop_their_share_and_are_drawn_anew(self, views):
        observed = random_graph(200, 150, .1)
        model, rng, drawn = make('sgl', observed, views=views), np.random.default_rng(0), []
        for _ in range(2):
            model.new_epoch(rng)
            drawn += [graph for graphs in model.views for graph in graphs]
        for graph in drawn:
            kept = (graph[:200, 200:] != 0).astype(np.float32).tocsr()
            assert not (kept > observed).nnz
            np.testing.assert_allclose((graph - models.adjacency(kept)).data, 0, atol=1e-7)
            users, items = (((observed - kept).getnnz(axis) > 0) & (kept.getnnz(axis) == 0)
                            for axis in (1, 0))
            if views == 'node':                                        # 199 and 149 are in use
                assert users.sum() in (19, 20) and items.sum() in (14, 15)
            else:
                assert kept.nnz == int(observed.nnz * .9)
        distinct = {graph.data.tobytes() + graph.indices.tobytes() for graph in drawn}
        assert len(distinct) == (8 if views == 'walk' else 4)

    @pytest.mark.parametrize('n_keys, atol', [(7, 1e-5), (500_000, 2e-3)])     # in two pieces
    def test_info_nce_with_weights_is_the_naive_sum(self, n_keys, atol):
        torch.manual_seed(0)
        queries, keys = (torch.randn(n, 3, requires_grad=True) for n in (5, n_keys))
        own, weight = torch.tensor([3, 0, 6, 6, 1]), torch.tensor([1, 3, 1, 2, 1])
        loss = models.InfoNCE.apply(queries, keys, own, weight, .2)
        found = torch.autograd.grad(loss, (queries, keys))
        q, k = (torch.nn.functional.normalize(x.double()) for x in (queries, keys))
        logits = q @ k.T / .2
        naive = (weight * (logits.logsumexp(1) - logits.gather(1, own[:, None])[:, 0])).sum()
        np.testing.assert_allclose(loss.item(), naive.item(), rtol=1e-5)
        for one, other in zip(found, torch.autograd.grad(naive, (queries, keys))):
            np.testing.assert_allclose(one, other, atol=atol)

    @pytest.mark.parametrize('tau', [.2, .001])
    def test_info_nce_is_stable_and_a_zero_row_has_a_bounded_gradient(self, tau):
        queries = torch.tensor([[1., 0], [0, 2]], requires_grad=True)
        keys = torch.tensor([[0., 1], [-1, 0], [0, 0]], requires_grad=True)
        loss = models.InfoNCE.apply(queries, keys, torch.tensor([1, 0]), torch.ones(2), tau)
        logits = np.array([[0, -1, 0], [1, 0, 0]]) / tau
        expected = np.logaddexp.reduce(logits, axis=1).sum() - (-1 + 1) / tau
        np.testing.assert_allclose(loss.item(), expected, rtol=1e-5, atol=1e-6)
        grads = torch.autograd.grad(loss, (queries, keys))
        assert all(g.isfinite().all() and g.abs().max() < 1e4 / tau + 1 for g in grads)

    @pytest.mark.parametrize('name', NAMES)
    def test_rows_of_zeros_train(self, name):
        train, valid, _ = data.split(planted(), np.random.default_rng(0))
        start = [np.tile([[0.], [1.]], (n // 2, 8)) for n in train.shape]    # every second row
        some = sp.csr_matrix(train.toarray() * (np.arange(120)[:, None] < 8))    # 80 steps
        model, _ = models.train(name, some, valid, *start, np.random.default_rng(0), epochs=1,
                                batch=1)
        assert all(table.isfinite().all() for table in model.embeddings())


def slow_evaluate(users, items, target, seen, k=10):
    """Recall@k and NDCG@k by comparing every two items; of equal scores the target comes last."""
    recall, ndcg = [], []
    for u in np.unique(target.nonzero()[0]):
        scores, out = items @ users[u], seen[u].indices if seen is not None else []
        ranks = [sum(not scores[j] < scores[i] for j in range(len(items))
                     if j == i or j not in out) - 1 for i in target[u].indices]
        recall.append(np.mean([rank < k for rank in ranks]))
        gains = sum(1 / np.log2(2 + rank) for rank in ranks if rank < k)
        ndcg.append(gains / sum(1 / np.log2(2 + rank) for rank in range(min(k, len(ranks)))))
    return recall, ndcg


class TestEvaluation:
    @pytest.mark.parametrize('seen', ['none', 'apart', 'with targets'])
    @pytest.mark.parametrize('n_targets', [1, 4, 12])
    def test_evaluate_is_a_python_loop(self, seen, n_targets):
        rng = np.random.default_rng(n_targets)
        users, items = (rng.integers(-2, 3, (n, 3)).astype(np.float32) for n in (40, 25))    # ties
        target, known = np.zeros((40, 25), bool), rng.random((40, 25)) < .2
        for u in range(35):                                            # five users have no target
            target[u, rng.choice(25, n_targets, replace=False)] = True
        known = None if seen == 'none' else sp.csr_matrix(
            (known & ~target if seen == 'apart' else known | target).astype(np.float32))
        target = sp.csr_matrix(target.astype(np.float32))
        for dtype in (torch.float32, torch.bfloat16):                  # small integers: both exact
            tables = (torch.from_numpy(table).to(dtype) for table in (users, items))
            found = models.evaluate(*tables, target, known)
            for one, other in zip(found, slow_evaluate(users, items, target, known)):
                np.testing.assert_allclose(one, other)
            assert len(found[0]) == 35

    @pytest.mark.parametrize('value', [0., .1, float('nan'), float('inf')])
    @pytest.mark.parametrize('n_users, n_items, K', [(50, 40, 8), (300, 4001, 128)])
    def test_equal_or_broken_scores_never_score(self, value, n_users, n_items, K):
        target = sp.eye(n_items, format='csr')[np.arange(n_users) % n_items]
        users, items = torch.full((n_users, K), value), torch.full((n_items, K), value)
        recall, ndcg = models.evaluate(torch.nn.Parameter(users.double()), items.double(), target)
        assert recall.max() == ndcg.max() == 0

    def test_ranks_below_k_are_exact(self):
        rng = np.random.default_rng(0)
        users, items = (torch.from_numpy(rng.standard_normal((n, 6))).float() for n in (4000, 300))
        items[:150] *= torch.linspace(.1, 3, 150)[:, None]
        items[150:] = items[:150]                                      # every score is there twice
        target = sp.eye(300, format='csr')[rng.integers(0, 300, 4000)]
        longest = sp.csr_matrix(np.tile(np.arange(300) % 150 > 139, (4000, 1)))
        for seen in (None, random_graph(4000, 300, .05), longest):
            exact = models.target_ranks(users, items, target, seen)
            short = models.target_ranks(users, items, target, seen, 10)
            assert ((short == exact) | (exact >= 10) & (short == 300)).all()
            assert (short == 300).sum() > 50 and (short < 10).any()

    def test_recommend_is_a_sorted_list_of_unseen_items(self):
        rng = np.random.default_rng(0)
        users, items = (torch.from_numpy(rng.standard_normal((n, 4))) for n in (30, 12))
        seen = rng.random((30, 12)) < .3
        seen[7] = seen[8, 1:] = True
        picked, scores = models.recommend(users, items, sp.csr_matrix(seen.astype(np.float32)), 5)
        for u in range(30):
            all_scores = np.where(seen[u], -np.inf, items.numpy() @ users[u].numpy())
            best = np.argsort(-all_scores)[:min(5, (~seen[u]).sum())]
            assert picked[u].tolist() == best.tolist() + [-1] * (5 - len(best))
            np.testing.assert_allclose(scores[u][:len(best)], all_scores[best], rtol=1e-6)

    def test_bfloat16_counts_every_item(self):
        items = torch.tensor([1.] + [0] * 4000 + [2] * 999)[:, None].bfloat16()
        user, target = torch.ones(1, 1).bfloat16(), sp.csr_matrix(([1], ([0], [0])), (1, 5000))
        assert models.target_ranks(user, items, target) == 999
        picked, scores = models.recommend(user, items, target, 999)
        assert picked.min() == 4001 and (scores == 2).all()


class TestTraining:
    def test_the_best_epoch_is_kept_and_patience_ends_training(self):
        train, valid, _ = data.split(planted(), np.random.default_rng(0))
        rng = np.random.default_rng(1)
        start = [llminit.xavier(rng, n, 16) for n in train.shape]
        model, curve = models.train('lightgcn', train, valid, *start, rng, lr=.05, patience=3)
        ndcg = [epoch['ndcg'] for epoch in curve]
        assert 3 < len(curve) < 300 and np.argmax(ndcg) == len(curve) - 4
        assert models.evaluate(*model.embeddings(), valid, train)[1].mean() == max(ndcg)

    def test_negatives_are_uniform_over_what_the_user_does_not_have(self):
        observed, users = random_graph(6, 8, .5), np.repeat(np.arange(6), 4000)
        drawn = models.sample_negatives(observed, users, np.random.default_rng(0))
        for u in range(6):
            others = np.setdiff1d(np.arange(8), observed[u].indices)
            counts = np.bincount(drawn[users == u], minlength=8)
            assert set(np.flatnonzero(counts)) == set(others)
            assert abs(counts[others] / 4000 - 1 / len(others)).max() < .04    # five sigma

    def test_edges_of_the_data(self):
        ones, rng = np.ones, np.random.default_rng(0)
        observed = sp.csr_matrix(np.array([[1, 1, 1], [1, 0, 0]], np.float32))
        none = sp.csr_matrix((2, 3))
        start = ones((2, 2)), ones((3, 2)), rng
        _, curve = models.train('lightgcn', observed, none, *start, epochs=2)
        assert np.isfinite(curve[-1]['loss']) and len(curve) == 2      # user 0 has every item
        assert curve[-1]['best']                                       # for want of validation
        for n in (2, 3):                                               # of 2 users and 3 items
            table = ones((n, 2))
            fails('observed has the shape', models.train, 'bpr', observed, none, table, table, rng)
        fails('nothing to rank', models.train, 'bpr', sp.csr_matrix(ones((2, 3))), none, *start)
        fails("'gcn': expected one of lightgcn", models.train, 'gcn', observed, none, *start)
        fails("'nodes': expected edge", models.train, 'sgl', observed, none, *start, views='nodes')
        model, curve = models.train('bpr', observed, none, *map(np.asfortranarray, start[:2]), rng,
                                    epochs=0)
        assert model.table.is_contiguous()
        assert curve == [] and (model.embeddings()[0] == 1).all()      # the start itself
        fails('valid has the shape .3, 2.', models.train, 'bpr', observed, none.T, *start)
        fails('target has the shape', models.evaluate, *model.embeddings(), observed.T)
        fails('seen has the shape', models.recommend, *model.embeddings(), observed.T)
        fails('diverged in epoch 2', models.train, 'bpr', observed, none, *start, lr=1e30)
        unsorted = sp.csr_matrix((ones(2), [2, 0], [0, 2, 2]), (2, 3))
        items0 = np.array([[0.], [1], [0]])
        _, curve = models.train('bpr', unsorted, none, ones((2, 1)), items0, rng, epochs=1)
        assert abs(curve[0]['loss'] - np.log(1 + np.e)) < 1e-3         # item 1 is the one negative
        assert unsorted.indices.tolist() == [2, 0]                     # the caller's is unchanged


SEEDED = '''
import hashlib, sys
import llminit, models, test_llminit
observed = test_llminit.planted(1100, 1050, per_user=8)
for name in ('lightgcn', 'sgl', 'sgcl'):
    rng = llminit.np.random.default_rng(0)
    start = [llminit.xavier(rng, n, 128) for n in observed.shape]
    models.torch.set_num_threads(2)
    model, _ = models.train(name, observed, observed, *start, rng, epochs=1, batch=2048,
                            log=lambda line: None)
    print(name, hashlib.sha256(model.table.detach().numpy()).hexdigest())
'''


class TestRepeats:
    def test_one_seed_gives_one_table_with_two_threads_quiet_or_busy(self):
        """Of sizes at which MKL splits sums by threads, and at which indexing adds with atomics:
        inner dimensions over 1,000, three times more rows in a batch than nodes."""
        quiet = finished('-c', SEEDED, OMP_NUM_THREADS='2')
        busy = subprocess.Popen([sys.executable, '-c', 'while True: pass'])
        try:
            beside = finished('-c', SEEDED, OMP_NUM_THREADS='2')
        finally:
            busy.kill()
            busy.wait()
        assert quiet == beside and quiet[1].count('\n') == 3, (quiet, beside)


def joined(W, function, *args):
    """function(*args) in each of W processes that models.join() will join -> their results, what
    they printed. They are forked, so they need not import torch again."""
    context = multiprocessing.get_context('fork')
    with socket.create_server(('127.0.0.1', 0)) as probe:
        port = probe.getsockname()[1]

    def child(rank):
        os.environ |= {'WORLD_SIZE': str(W), 'RANK': str(rank), 'LOCAL_RANK': str(rank),
                       'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port)}
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            result = function(*args)
        got[rank] = result, out.getvalue()
        torch.distributed.destroy_process_group()              # as at the end of a program
    processes = [context.Process(target=child, args=(rank,)) for rank in range(W)]
    with context.Manager() as manager:
        got = manager.dict({rank: (None, '') for rank in range(W)})    # of a process that is killed
        try:
            for process in processes:
                process.start()
            for process in processes:
                process.join(120)
            return zip(*got.values())
        finally:
            for process in processes:
                process.kill()


def steps(observed):
    """(losses of 20 steps, the table after them) of every model."""
    models.join('cpu')
    out, triples = [], np.random.default_rng(0).integers(0, 40, (20, 3, 33))
    for name, more in [('sgl', {'views': 'walk'}), *((name, {}) for name in NAMES)]:
        model = make(name, observed, 10, **more)
        adam = torch.optim.Adam(model.parameters(), lr=.01)
        losses = []
        for batch in torch.from_numpy(triples):
            adam.zero_grad()
            loss = model.loss(*batch)
            loss.backward()
            adam.step()
            losses.append(loss.item())
        out.append((losses, np.concatenate(model.embeddings())))
    return out


class TestProcesses:
    def test_20_steps_of_every_model_agree_for_1_2_and_4_processes(self):
        observed = random_graph(60, 50, .2)
        expected = steps(observed)
        for W in (2, 4):                                               # 10 columns: uneven
            results, _ = joined(W, steps, observed)
            for found in results:                                      # z is gathered in each
                for (losses, table), (losses_1, table_1) in zip(found, expected, strict=True):
                    np.testing.assert_allclose(losses, losses_1, rtol=1e-5)
                    # Adam's first steps have the sign of the gradient alone: it may be off by more
                    np.testing.assert_allclose(table, table_1, rtol=1e-3, atol=1e-4)

    def test_a_program_that_calls_main_prints_and_saves_what_one_process_does(
            self, own, tmp_path, tiny, calls, capsys):
        for W in ('one', 'three'):
            shutil.copytree(tiny, tmp_path / f'cache {W}' / embed.NAME)

        def run(W):
            calls.clear()
            flags = list(map(str, [
                '--dataset', own, '--encoder', 'tfidf', '--dim', 10, '--epochs', 2, '--model',
                'sgl', '--save', tmp_path / W, '--cache', tmp_path / f'cache {W}']))
            llminit.main(flags)
            llminit.main([*flags, '--encoder', 'mpnet', '--model', 'sgcl', '--cold', '.5'])
            return len(sum(calls, []))                                 # texts that it encoded
        one, alone = run('one'), capsys.readouterr().out
        encoded, (out, *silent) = joined(3, run, 'three')
        assert encoded == (one, 0, 0)                                  # the first alone encodes
        assert rows_of(out) == rows_of(alone) and len(rows_of(out)) == 6 and silent == ['', '']
        for name in ('users.npy', 'items.npy'):
            one, three = (np.load(tmp_path / W / name) for W in ('one', 'three'))
            assert one.shape == three.shape and np.abs(one - three).max() < .05 * np.abs(one).max()

    @pytest.mark.parametrize('flag, message', [
        ('--seed', 'different settings'), ('--dim', 'split over 2 processes: start at most 1')])
    def test_an_error_stops_all_and_the_first_says_it(self, own, flag, message):
        def run():
            value = os.environ['RANK'] if flag == '--seed' else 1
            return main_on(own, '--strategy', 'none', flag, value)
        codes, outs = joined(2, run)
        assert codes == (2, 2) and '|' not in ''.join(outs)
        assert outs[0].count('error: ') == 1 and message in outs[0] and outs[1] == ''

    def test_under_torchrun_a_run_prints_once(self, own):
        code, out, err = finished('-m', 'torch.distributed.run', '--standalone',
                                  '--nproc-per-node=2', 'llminit.py', '--dataset', own,
                                  '--strategy', 'none', '--epochs', 1, '--dim', 4)
        assert code == 0 and 'llminit: error' not in err and out.count('| none |') == 1, err

    def test_when_a_process_dies_the_others_end_within_a_minute(self, own, monkeypatch):
        def log(line):
            if line.startswith('epoch   3') and os.environ['RANK'] == '1':
                os.kill(os.getpid(), 9)
        train, start = models.train, time.monotonic()
        monkeypatch.setattr(models, 'train',
                            lambda *args, **more: train(*args, **more | {'log': log}))
        codes, outs = joined(3, main_on, own, '--epochs', 10 ** 5, '--patience', 10 ** 5)
        assert codes == (2, None, 2) and time.monotonic() - start < 60
        assert 'error: another process has ended' in outs[0] and outs[2] == ''

    @pytest.mark.parametrize('rank, match', [('3', 'RANK is 3: expected less than'),
                                             ('0', 'or the port is taken: .*MASTER')])
    def test_processes_started_by_hand_are_told_in_a_line(self, own, monkeypatch, capsys, rank,
                                                          match):
        monkeypatch.setenv('WORLD_SIZE', '2')
        monkeypatch.setenv('RANK', rank)
        assert main_on(own, '--strategy', 'none') == 2
        err = capsys.readouterr().err.splitlines()
        assert len(err) == 1 and re.search(match, err[0])

    @pytest.mark.parametrize('variables', [
        {'RANK': '', 'LOCAL_RANK': '', 'WORLD_SIZE': ''}, {'LOCAL_RANK': '1'}])
    def test_alone_variables_of_torchrun_mean_nothing(self, own, monkeypatch, capsys, variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert main_on(own) == 0 and 'note: ' in capsys.readouterr().err
        assert main_on(own.parent) == 2 and len(capsys.readouterr().err.splitlines()) < 5


# ---- data.py ----------------------------------------------------------------------------------

I = {'items.csv': 'item_id,title / 1,tea / 2,cup'}
# Kind; file r.csv, or files; file i.csv, or files (@ is user_id,item_id, ' / ' ends a line, ⇥ is a
# tab); 'pairs | titles | words of the notes', or 'error: words' of the one line; options
CASES = [
    # what is read
    ('items without interactions', '@ / a,1 / a,2', 'item_id,title / 1,tea / 2,cup / 3,tea cup',
     'a1 a2 | tea, cup | 1 of 3 items have no interactions left'),
    ('rows of unknown items', '@ / a,1 / a,9 / b,9', I,
     'a1 | tea | 2 of items that the item file lacks'),
    ('missing texts', '@ / a,1 / a,2 / a,3', r'item_id,title / 1,\N / 2,cup / 3,',
     'a1 a2 a3 | , cup,  | 2 items without text'),
    ('quoted cells',
     {'r.tsv': 'user_id⇥item_id / a⇥1', 'i.tsv': 'item_id⇥title / 1⇥"tea⇥""green"" / new"'}, {},
     'a1 | tea "green" new | 1 rows'),
    ('quotes in atomic files',
     {'x.inter': 'user_id:token⇥item_id:token / "a"⇥1', 'x.item':
      'item_id:token⇥title:token_seq / 1⇥19" "tea'}, {}, '"a"1 | 19" "tea |'),
    ('a pair rated high and low', '@,rating / a,1,5 / a,1,1 / a,1,5', I,
     'a1 | tea | 3 rows: 1 .*, 1 rated below 4, 1 repeated'),
    ('an item that is there twice', '@ / a,1', 'item_id,title / 1,tea / 1, tea', 'a1 | tea |'),
    ('ids are strings', '@ / 007,1 / 7,1 / 7,01', 'item_id,title / 1,a / 01,b',
     '0071 701 71 | a, b |'),
    ('blanks around cells', '@ / a , 1 /  a,2', 'item_id, title /  1 , "tea cup" / 2,cup',
     'a1 a2 | tea cup, cup |'),
    ('empty lines', '@ /  / a,1 /  / a,2 / ', I, 'a1 a2 | tea, cup | 2 rows'),
    ('interactions alone', '@ / a,1 / b,2', {},
     'a1 b2 | ,  | no column rating .*every row is a pos.*texts from nothing, 2 items without'),
    ('items with ids alone', '@ / a,1', 'item_id / 1 / 2', 'a1 |  | texts from nothing'),
    ('other names', 'visitorid,itemid,score / a,1,5 / b,1,2', 'itemid,name / 1,tea',
     'a1 | tea | 1 rated below', {'columns': {'user_id': 'visitorid', 'item_id': 'itemid',
                                              'rating': 'score', 'title': 'name'}}),
    ('other files beside', {'r.csv': '@ / a,1', 'x.json': '{}', 'v.npz': 'PK', '._r.csv': b'\xff'},
     I, 'a1 | tea | own: not read: x.json$'),

    # which file, which column
    ('two files of ratings', {'ratings.csv': '@ / a,1', 'ratings_2024.csv': '@ / b,1'}, I,
     'error: ratings.csv .*ratings_2024.csv .*keep one, or join them: the split'),
    ('two files of items', {'r.csv': '@ / a,1', 'j.csv': 'item_id,title / 1,pot'}, I,
     'error: items.csv with item_id, title; j.csv with item_id, title; .*keep one'),
    ('a file that fits nowhere', {'r.csv': '@ / a,1', 'u.csv': 'user_id,age / a,9'}, I,
     'error: u.csv with user_id, age.*Move other files away'),
    ('endings that are not read', {'r.json.gz': '{}', 'a.xlsx': '?', 'u.data': '1'}, {},
     'error: as .csv, .*found none; not read: a.xlsx, r.json.gz, u.data'),
    ('a column without a name', 'user_id,item_id, / a,1,', I,
     "error: header that names each column, each once; found '' in user_id.*pandas: index=F"),
    ('a column that is there twice', 'user_id,item_id,user_id / a,1,b', I,
     "error: names each column, each once; found 'user_id' in user_id, item_id, user_id"),
    ('misspelt names', '@,score / a,1,5', I,
     'error: columns says rating=scroe, but there are item_id, score, title, user_id',
     {'columns': {'rating': 'scroe'}}),
    ('a name that is taken', '@ / a,1', 'item_id,title,original_title / 1,x,y',
     'error: i.csv, line 1: columns says title=original_title, but a column title is there too',
     {'columns': {'title': 'original_title'}}),
    ('no title', '@ / a,1', 'item_id,name,year / 1,tea,1999',
     'error: no column title among item_id, name, year; .*--text-columns'),
    ('text columns and no items', '@ / a,1', {}, 'error: no item file beside it to take plot',
     {'text_columns': ['plot']}),
    ('no timestamps', '@ / a,1', {}, 'error: no column timestamp among', {'timestamps': True}),

    # rows
    ('an id that is missing', '@ / a,1 / a,2 / NA,2', I,
     "error: line 4: an id is missing, here 'NA'; .*row: NA, 2"),
    ('an item without an id', '@ / a,1', 'item_id,title / 1,tea / ,cup',
     'error: i.csv, line 3: an id is missing'),
    ('ids that a spreadsheet rounded', '@ / 5.31442E+17,1', I,
     r'error: r.csv, line 2: the id 5.31442E\+17 is a number that a spreadsheet'),
    ('no id in common', '@ / a,1.0 / a,2.0', I,
     'error: none of its items is in .*such as 1.0, 2.0, there 1, 2'),
    *((f'a rating {cell}', f'user_id;item_id;rating / a;1;5 / a;2;{cell}', I,
       f"error: line 3: the rating '{cell}' is no number .*convert it or drop .* The row: a, 2, ")
      for cell in ('4,5', 'inf', '1_0')),
    ('dates', '@,timestamp / a,1,05/31/2014', {}, 'error: line 2: the timestamp .05/31/2014. is'),
    ('joined with a mark', '@ / a,1 / \ufeff@ / a,2', I, 'error: line 3: a second header'),
    ("R's row names", '@ / "1","a","1"', I,
     "error: r.csv, line 2: 3 cells, but 2 in the header; .* R's row names. The row: 1, a, 1"),
    ('quotes in quotes', '@ / a,1', r'item_id,title / 1,tea / 2,"the \"green\" tea"',
     "error: i.csv, line 3: .*; close each quote, and double the quotes"),
    ('quotes around lines', {'r.tsv': 'user_id⇥item_id / a⇥1 / "b⇥1 / c"⇥1'}, I,
     r'error: line 3: an id holds a line end .*is a quote not closed\?. The row: b.t1.nc, 1'),
    ('another text for an item', '@ / a,1', 'item_id,title / 1,tea / 2,cup / 1,pot',
     'error: i.csv, line 4: this item_id was there before, with another text; keep one'),

    # whole files
    ('one broken byte', b'user_id,item_id\n' + b'a,1\n' * 9999 + b'\xff,1\n', I,
     r"error: line 10001: not UTF-8 at b.*encoding_errors='replace'"),
    ('an empty file', '', I, 'error: r.csv with nothing'),
    ('a header alone', '@', I, 'error: no rows below the header'),
    ('a cut gz', {'r.csv.gz': gzip.compress(b'user_id,item_id\n' + b'a,1\n' * 99)[:-9]}, I,
     'error: r.csv.gz, line 101: .*end-of-stream'),
    ('too high a bar', '@,rating / a,1,5 / b,1,2', I, 'error: 2 rows: 0 interactions stay, 1 rated '
     'below 4, .*1 outside the 3-core; lower min_rating or core', {'core': 3}),
]


def edges(loaded):
    """{(user id, item id)} of what load returned."""
    matrix, _, _, users, items, _ = loaded
    assert matrix.has_sorted_indices
    return {(users[u], items[i]) for u, i in zip(*matrix.nonzero())}


class TestOwnData:
    @pytest.mark.parametrize('case', CASES, ids=[kind for kind, *_ in CASES])
    def test_cases(self, tmp_path, capsys, case):
        _, rows, items, expected, *options = case
        rows = rows if isinstance(rows, dict) else {'r.csv': rows}
        own = write_files(tmp_path / 'own', rows,
                          items if isinstance(items, dict) else {'i.csv': items})
        options = {'core': 1, **(options[0] if options else {})}
        if expected.startswith('error: '):
            fails(expected.removeprefix('error: '), data.load, own, **options)
            return
        loaded = data.load(own, **options)
        pairs, titles, *words = [part.strip() for part in expected.split('|')]
        assert sorted(user + item for user, item in edges(loaded)) == pairs.split()
        assert loaded[2] == [title.strip() for title in titles.split(',')] or titles in loaded[2]
        err = capsys.readouterr().err
        assert all(re.search(word, err, re.M) for word in words), err
        line = next(line for line in err.splitlines() if ' rows: ' in line)
        told, *others = re.findall(r'(\d+) (?:rows|int|rated|of items|rep|ou)', line.split(';')[0])
        n_rows = sum(bool(row.strip()) for row in [*rows.values()][0].split(' / ')[1:])
        assert int(told) == sum(map(int, others)) == n_rows            # none is lost in silence

    @pytest.mark.parametrize('delimiter, end, encoding, packed', [
        ('\t', '\n', 'utf-8', True), (',', '\r\n', 'utf-8-sig', False),
        (';', '\r', 'utf-8', False)])
    def test_delimiters_line_ends_marks_and_gz(self, tmp_path, delimiter, end, encoding, packed):
        def file(text):
            raw = text.replace('~', delimiter).replace(' / ', end).encode(encoding)
            return gzip.compress(raw) if packed else raw
        own = write_files(tmp_path / 'own', {
            'X.CSV' + '.gz' * packed: file('user_id~item_id~rating / u 1~é~5 / u2~二~4 / u2~é~1 / '),
            'y.tsv' + '.gz' * packed: file('item_id~title / é~é"s / 二~三 / ')})
        loaded = data.load(own, core=1)
        assert edges(loaded) == {('u 1', 'é'), ('u2', '二')} and loaded[1] == ['é"s', '三']

    def test_filters_by_hand(self, tmp_path):
        """d is unknown, (u2, b) is low, (u1, a) is there twice, u4 has one item left. In the 2-core
        are u3 {b, a} and u1 {a, b}; c goes with u4."""
        own = write_files(tmp_path / 'own', {
            'r.csv': '@,rating / u3,b,5 / u1,a,4 / u1,a,5 / u1,b,4 / u3,a,4 / u2,a,5 / u2,b,3 / '
                     'u4,c,5 / u4,d,5',
            'i.csv': 'item_id,title,brand / c,Sea,C / a,Apple,Acme / z,Z,Z / b,Ball,'})
        matrix, texts, titles, users, items, low = data.load(own, core=2)
        assert users == ['u3', 'u1'] and items == ['a', 'b']    # first appearance; the item file
        assert matrix.toarray().tolist() == [[1, 1], [1, 1]] and matrix.dtype == np.float32
        assert texts == titles == ['Apple', 'Ball'] and low.nnz == 0
        both = data.load(own, core=2, text_columns=['title', 'brand'])
        assert both[1] == ['Apple Acme', 'Ball'] and both[2] == titles
        assert data.load(own, core=1)[4] == data.load(own, core=0)[4] == ['c', 'a', 'b']
        *_, users, items, low = data.load(own, core=1)
        assert [(users[u], items[i]) for u, i in zip(*low.nonzero())] == [('u2', 'b')]
        assert edges(data.load(own, core=1, min_rating=5)) == {
            ('u3', 'b'), ('u1', 'a'), ('u2', 'a'), ('u4', 'c')}

    def test_a_wide_header_takes_no_second_and_csv_keeps_its_limit(self, tmp_path):
        wide = ','.join(f'c{n}' for n in range(100_000))
        own = write_files(tmp_path / 'own', I, {'r.csv': f'@,{wide} / a,1' + ',' * 100_000})
        limit, start = data.csv.field_size_limit(), time.process_time()
        assert edges(data.load(own, core=1)) == {('a', '1')}
        assert data.csv.field_size_limit() == limit and time.process_time() - start < 1
        write_files(tmp_path / 'own', {'r.csv': f'@,{wide},c7 / a,1'})
        fails("found 'c7' in user_id, item_id, c0, ", data.load, own)

    def test_homes_and_names_that_are_none(self, tmp_path, monkeypatch, capsys):
        write_files(tmp_path / 'own', I, {'r.csv': '@ / a,1'})
        monkeypatch.setenv('HOME', str(tmp_path))
        monkeypatch.chdir(tmp_path)
        assert edges(data.load('~/own', core=1)) == {('a', '1')}
        fails('own/r.csv: neither a folder nor one of beauty, toys', data.load, 'own/r.csv')
        fails(r'sh.x1bop: neither a folder', data.load, 'sh\x1bop')
        Path('toys').mkdir()
        monkeypatch.setattr(data, 'fetch', lambda *_: Path('none.zip'))
        fails('toys: .* by hand', data.load, 'toys', '~/d')
        assert (tmp_path / 'd').is_dir() and './toys' in capsys.readouterr().err

    def test_damaged_files_give_data_or_one_line(self):
        code, out, err = finished('experiments/fuzz.py', '--files', 200)
        assert code == 0 and out.startswith('fuzz: 200 files from seed 0: '), err


def matrix_of(pairs, shape=(13, 10)):
    return sp.csr_matrix((np.ones(len(pairs), np.float32), tuple(zip(*pairs)) or ([], [])), shape)


pairs_of = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 9)), max_size=120, unique=True)


class TestSplit:
    @settings(max_examples=150, deadline=None)
    @given(pairs_of, st.integers(0, 5))
    def test_k_core_is_a_naive_loop(self, pairs, core):
        rows, columns, _ = data.k_core(matrix_of(pairs).tocsc(), core)
        for _ in range(13 + 10):                           # more rounds than can change it
            users, items = [u for u, _ in pairs], [i for _, i in pairs]
            pairs = [(u, i) for u, i in pairs if users.count(u) >= core and items.count(i) >= core]
        assert {*rows} == {u for u, _ in pairs} and {*columns} == {i for _, i in pairs}

    @settings(max_examples=150, deadline=None)
    @given(pairs_of, st.integers(0, 2 ** 32), st.booleans())
    def test_it_leaves_one_out(self, pairs, seed, last):
        matrix = matrix_of(pairs)
        matrix.data = 1 + np.random.default_rng(seed).permutation(matrix.nnz) / 1.
        count = np.diff(matrix.indptr)
        if not (count >= 2).any():
            fails('nothing to test with', data.split, matrix, np.random.default_rng(seed), last)
            return
        fails('no order in time', data.split, matrix > 0, 0, True)
        train, valid, test = data.split(matrix, np.random.default_rng(seed), last)
        for one, other in zip(data.split(matrix > 0, np.random.default_rng(seed)), data.split(
                matrix, np.random.default_rng(seed))):
            assert (one != other).nnz == 0                             # true or 1, the same
        whole = train + valid + test
        assert (whole.data == 1).all() and ((whole > 0) != (matrix > 0)).nnz == 0     # nothing lost
        assert (np.diff(test.indptr) == (count >= 2)).all()
        assert (np.diff(valid.indptr) == (count >= 3)).all()
        for u in range(13 * last):
            order = matrix[u].indices[np.argsort(matrix[u].data)]
            assert test[u].indices.tolist() == order[-1:].tolist() * int(count[u] >= 2)
            assert valid[u].indices.tolist() == order[-2:-1].tolist() * int(count[u] >= 3)

    def test_order_in_a_row_does_not_matter_but_what_is_stored_does(self):
        matrix = planted()
        backwards = matrix[:, ::-1].copy()
        backwards.indices = 59 - backwards.indices         # each row from the last item on
        backwards.has_sorted_indices = False
        one, other = (data.split(x, np.random.default_rng(0)) for x in (matrix, backwards))
        assert sha_of_rows(*one) == sha_of_rows(*other)
        zero, twice = matrix.copy(), matrix.copy()
        zero.data[7] = 0
        twice.indices[1] = twice.indices[0]
        for wrong in (zero, sp.csr_matrix((twice.data, twice.indices, twice.indptr), (120, 60))):
            for call in (data.split, lambda x, rng: data.thin(x, .5, rng), data.k_core):
                fails('interactions: a pair is stored twice, or as zero', call, wrong,
                      np.random.default_rng(0))

    def test_a_seed_is_a_generator_and_a_share_is_no_percentage(self):
        for call in (data.split, lambda pairs, rng: [data.thin(pairs, .5, rng)]):
            one, other = call(planted(), 3), call(planted(), np.random.default_rng(3))
            assert sha_of_rows(*one) == sha_of_rows(*other)
        fails('share: expected .*found 50', data.thin, planted(), 50, 0)

    def test_timestamps_order_the_items_of_a_user(self, tmp_path, capsys):
        rows = 'a,2,7 / a,1,7 / b,1,9 / b,2,-1.5 / c,2,1 / c,1,2e3 / c,2,3'     # ties by the file
        own = write_files(tmp_path / 'own', I, {'r.csv': '@,timestamp / ' + rows})
        matrix, _, _, users, items, _ = data.load(own, core=1, timestamps=True)
        found = {user: ''.join(items[i] for i in row.indices[np.argsort(row.data)])
                 for user, row in zip(users, matrix)}
        assert found == {'a': '21', 'b': '21', 'c': '21'}
        assert 'of 3 users 1 have equal times' in capsys.readouterr().err

    @pytest.mark.parametrize('times, tied', [
        ('1 2 3 4', 0), ('1 1 3 4', 0), ('1 3 3 4', 1), ('1 3 4 4', 1), ('4 4 4 4', 1), ('5 5', 1),
        ('5 6', 0), ('5', 0)])
    def test_ties_are_counted_if_they_decide(self, times, tied):
        times = np.array(times.split(), float)
        users, items = np.zeros(len(times), int), np.arange(len(times))
        one = data.to_csr(users, items, (2, 5), ordered=True)
        assert data.count_ties(one, times) == tied
        assert data.count_ties(sp.vstack([one, one]).tocsr(), times) == 2 * tied

    @given(st.integers(0, 2 ** 32), st.floats(0, 1))
    @settings(max_examples=60, deadline=None)
    def test_thin_removes_a_share_and_leaves_everyone_one(self, seed, share):
        train = random_graph(40, 30, .3, seed)
        left, again = (data.thin(train, share, np.random.default_rng(seed)) for _ in range(2))
        had, has = np.diff(train.indptr), np.diff(left.indptr)
        assert left.shape == train.shape and left.dtype == np.float32 and (left.data == 1).all()
        assert not (left > train).nnz and (left != again).nnz == 0
        assert (has >= np.minimum(had, 1)).all() and (has <= had).all()
        assert (np.abs(had - has - share * had) < 1)[had > 1].all() or share > .9

    def test_thin_draws_evenly_and_as_it_always_did(self):
        left = data.thin(np.ones((4000, 5)), .5, np.random.default_rng(0))
        assert abs(left.nnz / 20000 - .5) < .01
        assert np.ptp(left.getnnz(axis=0)) < 250                       # 2,000 each, sigma 32
        parts = (np.asarray(a, np.int64).tobytes() for a in (left.indptr, left.indices))
        assert hashlib.sha256(b''.join(parts)).hexdigest()[:12] == '512ac2e871c1'


INTER = 'user_id:token\titem_id:token\trating:float\ttimestamp:float\n'
ITEM = 'item_id:token\ttitle:token_seq\tbrand:token\tcategories:token_seq\n'


def zipped(members, method=zipfile.ZIP_DEFLATED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w', method) as box:
        for name, text in members.items():
            box.writestr(name, text)
    return buffer.getvalue()


def complete(prefix='Amazon_Toys/Amazon_Toys'):
    rows = ''.join(f'u{u}\ti{i}\t5\t0\n' for u in range(5) for i in range(5))
    items = ''.join(f'i{i}\tT{i}\tB{i}\tC\n' for i in range(5))
    return {prefix + '.inter': INTER + rows, '__MACOSX/._x.inter': 'x',
            prefix + '.item': ITEM + items}


BIG = np.random.default_rng(0).bytes(400_000)


class TestDownloads:
    def test_a_zip_is_fetched_once_and_a_file_placed_by_hand_stays(self, server, tmp_path, capsys):
        server.pages['Amazon_Toys_and_Games.zip'] = zipped(complete('../../evil'))
        folder = tmp_path / 'new' / 'data'
        fails(r'toys: \(5, 5, 25\) users, .* expected \(11268, 7309, 95420\); delete .*games.inter '
              r'and .*games.item, so that', data.load, 'toys', str(folder))
        matrix, texts, *_ = data.load('toys', str(folder), core=2)     # other filter, other sizes
        assert matrix.shape == (5, 5) and texts[0] == 'T0 B0 C'
        assert capsys.readouterr().err == '' and len(server.asked) == 1
        inter, item = sorted(path for path in tmp_path.rglob('*.*'))
        assert (inter.name, item.name) == ('amazon-toys-games.inter', 'amazon-toys-games.item')
        item.unlink()
        inter.write_text(inter.read_text() + 'u9\ti1\t5\t0\n')
        assert len(data.load('toys', str(folder), core=1)[3]) == 6

    @pytest.mark.parametrize('message, body', [
        ('404', None), ('is not a zip', zipped(complete())[:-40]),
        ('Bad CRC-32', zipped(complete(), zipfile.ZIP_STORED).replace(b'T3', b'T4')),
        (r'found \[\]', zipped({'x.item': ITEM})),
        (r'one \*.inter .* found \[.*b.inter', zipped(complete('b') | complete())),
        (r'expected one \*.inter', zipped(complete(), zipfile.ZIP_LZMA)),
        ('of at most 1,000 bytes', zipped({'x.inter': '0' * 1001, 'x.item': ITEM})),
        ('more than 1,000 bytes', b'PK' * 501)])
    def test_a_bad_zip_leaves_nothing(self, server, tmp_path, monkeypatch, message, body):
        monkeypatch.setattr(data, 'MAX_BYTES', 1000)
        server.pages |= {'Amazon_Toys_and_Games.zip': body} if body else {}
        fails(message + '.*; place amazon-toys-games.inter and .* by hand', data.load, 'toys',
              str(tmp_path))
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize('script, waits', [
        ([{'cut': 1}], []), ([{'status': 503}, {'status': 429}], [2]),
        ([{'status': 429, 'headers': {'Retry-After': '7'}}], [7]),
        ([{'status': 429, 'headers': {'Retry-After': '9000'}}], [60])])
    def test_it_asks_again_after(self, server, tmp_path, script, waits):
        server.pages['f'], server.script, n_asked = BIG, [*script], len(script) + 1
        data.download(server.url + 'f', str(tmp_path / 'f'), most=len(BIG))
        assert (tmp_path / 'f').read_bytes() == BIG and len(list(tmp_path.iterdir())) == 1
        if waits == [60] and not hasattr(data.Retry, 'DEFAULT_RETRY_AFTER_MAX'):
            waits = [9000]                                       # older ones obey the server
        assert len(server.asked) == n_asked and server.waits == waits

    @pytest.mark.parametrize('script, n_asked, more, message', [
        ([{'status': 500}] * 9, 3, {}, '500'), ([{'cut': 1}] * 9, 2, {}, '200000 bytes read'),
        ([{'status': 404}], 1, {}, '404'), ([], 1, {'sha256': '0' * 64}, 'expected 00'),
        ([], 1, {'most': 9}, 'more than 9 bytes')])
    def test_it_gives_up_and_leaves_nothing(self, server, tmp_path, script, n_asked, more, message):
        server.pages['f'], server.script, url = BIG, script, server.url + 'f'
        fails(f'{url}: .*{message}', data.download, url, str(tmp_path / 'f'), **more)
        assert not list(tmp_path.iterdir()) and len(server.asked) == n_asked

    def test_an_address_that_does_not_resolve_fails_at_once(self, tmp_path, monkeypatch):
        def unknown(*_, **__):
            raise socket.gaierror(-2, 'Name or service not known')
        monkeypatch.setattr(socket, 'getaddrinfo', unknown)
        monkeypatch.setattr('urllib3.util.retry.time.sleep', None)     # is not reached
        fails(r'http://h.invalid/f: .*Name or service not known', data.download,
              'http://h.invalid/f', tmp_path / 'f')

    def test_two_at_once_do_not_mix(self, server, tmp_path):
        server.pages['f'], server.script = BIG, [{'cut': 1}]
        call = server.url + 'f', str(tmp_path / 'f'), hashlib.sha256(BIG).hexdigest()
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: data.download(*call), range(8)))
        assert (tmp_path / 'f').read_bytes() == BIG and len(list(tmp_path.iterdir())) == 1

    @pytest.mark.parametrize('code, err, message', [
        (0, '', 'SHA-256'), (1, 'x\nERROR: No matching distribution\n', 'ERROR: No matching')])
    def test_ml_100k_comes_through_pip(self, tmp_path, monkeypatch, code, err, message):
        """pip is replaced by one that fails, or brings a wheel with wrong bytes."""
        def pip(command, **_):
            Path(command[command.index('--dest') + 1], 'recbole-1-py3.whl').write_bytes(b'wrong')
            return subprocess.CompletedProcess(command, code, '', err)
        monkeypatch.setattr(data.subprocess, 'run', pip)
        assert 'amazon' not in fails(message, data.load, 'ml-100k', str(tmp_path))
        assert list(tmp_path.iterdir()) == []


# ---- embed.py ---------------------------------------------------------------------------------

SPECIALS = ['<s>', '<pad>', '</s>', '<unk>', '[UNK]', '<mask>']
VOCAB = SPECIALS + ('a b c red green tea un ##a ##able ##ably ##break ##s ! , $ - \u4e2d \u6587 '
                    'creme \u03c3 ##\u03c3 \u03b1 ##\u03b1 x ##x').split()


class TestTokenizer:
    @pytest.mark.parametrize('text, expected', [
        ('', []), ('Red,GREEN\ttea!\nred\ra', ['red', ',', 'green', 'tea', '!', 'red', 'a']),
        ('unbreakable unbreakably', ['un', '##break', '##able', 'un', '##break', '##ably']),
        ('Cr\u00e8me cre\u0300me \u0301', ['creme', 'creme']),      # accents, composed or not
        ('re\x00d gre\u200ben\ufffd t\x07ea', ['red', 'green', 'tea']),        # control characters
        ('a\u4e2d\u6587b', ['a', '\u4e2d', '\u6587', 'b']), ('red\u3000$', ['red', '$']),
        ('\u0391\u03a3', ['\u03b1', '##\u03c3']),                     # no final sigma
        ('x' * 100, ['x'] + ['##x'] * 99), ('x' * 101, ['[UNK]']), ('redz a', ['[UNK]', 'a']),
        ('\ud800a', ['a']),                                     # a lone surrogate is dropped
        ('a</s>b<s>[UNK]<mask> <pad>', ['a', '</s>', 'b', '<s>', '[UNK]', '<mask>', '<pad>']),
        ('<unk><UNK><\u00dcNK>', ['<unk>'] * 3), ('<S>', ['[UNK]'] * 3), ('</s', ['[UNK]'] * 3)])
    def test_it(self, text, expected):
        assert [VOCAB[n] for n in embed.Tokenizer(VOCAB)(text)] == ['<s>', *expected, '</s>']


def write_safetensors(path, tensors):
    """The format, written a second time: header length, JSON header, raw tensors."""
    header, blob = {'__metadata__': {'format': 'pt'}}, b''
    for name, array in tensors.items():
        begin, blob = len(blob), blob + array.tobytes()
        kind = f'{array.dtype.kind.upper()}{8 * array.itemsize}'                 # such as F32
        header[name] = {'dtype': kind, 'shape': array.shape, 'data_offsets': [begin, len(blob)]}
    Path(path).write_bytes(headed(json.dumps(header).encode()) + blob)


def headed(header):
    """A header behind its length."""
    return len(header).to_bytes(8, 'little') + header


WHOLE = {'dtype': 'F32', 'shape': [6], 'data_offsets': [0, 24]}      # an entry of a header


class TestSafetensors:
    @pytest.mark.parametrize('content', [
        b'', b'\xff' * 8, headed(b'{"a'), headed(b'7'), headed(b'[' * 40000), headed(b'{"a": {}}'),
        headed(b'{}') + bytes(1), headed(json.dumps({'a\n\x1b': WHOLE}).encode()) + bytes(23),
        *(headed(json.dumps({'a': WHOLE | damage}).encode()) + bytes(24) for damage in (
            {'data_offsets': [0, 20]}, {'shape': [7], 'data_offsets': [0, 28]}, {'shape': [6.0]},
            {'shape': [5], 'data_offsets': [4, 24]}, {'dtype': 'Q4'}, {'data_offsets': None},
            {'shape': [10 ** 30], 'data_offsets': [0, 4 * 10 ** 30]})),
        headed(json.dumps({'a': WHOLE, 'b': WHOLE}).encode()) + bytes(24)])          # they overlap
    def test_damaged(self, tmp_path, content):
        (tmp_path / 'm').write_bytes(content)
        said = fails('not a whole safetensors file', embed.read_safetensors, tmp_path / 'm')
        assert said.isprintable() and len(said) < 999

    def test_the_order_of_the_header_does_not_matter(self, tmp_path):
        header = {'b': WHOLE | {'shape': [2, 3], 'data_offsets': [24, 48]}, 'a': WHOLE}
        numbers = np.arange(12, dtype=np.float32)
        (tmp_path / 'm').write_bytes(headed(json.dumps(header).encode()) + numbers.tobytes())
        found = embed.read_safetensors(tmp_path / 'm')
        assert found['a'].tolist() == [0, 1, 2, 3, 4, 5]
        assert found['b'].tolist() == [[6, 7, 8], [9, 10, 11]]


def tiny_mpnet(folder, seed=0, layers=2):
    """A random MPNet in folder, larger weights than real ones so that every part shows."""
    rng, width, heads, inner, positions = np.random.default_rng(seed), 24, 3, 40, 70
    shapes = {'embeddings.word_embeddings.weight': (len(VOCAB), width),
              'embeddings.position_embeddings.weight': (positions, width),
              'embeddings.LayerNorm.weight': (width,), 'embeddings.LayerNorm.bias': (width,),
              'encoder.relative_attention_bias.weight': (32, heads)}
    for n in range(layers):
        sizes = {f'attention.attn.{part}': (width, width) for part in 'qkvo'} | {
            'intermediate.dense': (inner, width), 'output.dense': (width, inner),
            'attention.LayerNorm': (width,), 'output.LayerNorm': (width,)}
        for part, size in sizes.items():
            shapes[f'encoder.layer.{n}.{part}.weight'] = size
            shapes[f'encoder.layer.{n}.{part}.bias'] = size[:1]
    weights = {name: rng.normal(0, .5, shape).astype(np.float32) for name, shape in shapes.items()}
    extra = {'embeddings.position_ids': np.arange(positions)[None],
             'pooler.dense.weight': np.ones((width, width), np.float32)}
    folder.mkdir(exist_ok=True)
    write_safetensors(folder / 'model.safetensors', {**weights, **extra})
    (folder / 'vocab.txt').write_text('\n'.join(VOCAB) + '\n', encoding='utf8')
    return {name: w.astype(np.float64) for name, w in weights.items()}


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The folder of a random MPNet with 68 places, the pinned one in the cache tmp_path."""
    folder = tmp_path / embed.NAME
    tiny_mpnet(folder)
    monkeypatch.setattr(embed, 'MAX_TOKENS', 68)     # 70 positions, the first two are not used
    monkeypatch.setattr(embed, 'FILES', {
        name: (hashlib.sha256((folder / name).read_bytes()).hexdigest(), 0)
        for name in embed.FILES})
    return folder


def bucket(distance):
    """Bucket of key minus query, with a loop in place of a logarithm."""
    n = abs(distance)
    far = 8 + sum(n >= 8 * 16 ** (b / 8) - 1e-9 for b in range(1, 8))
    return (n if n < 8 else far) + 16 * (distance > 0)


def dense_mpnet(w, ids, pad_to=0):
    """One text through MPNet in float64, padded and masked as the original does it."""
    mask, ids = np.array([1] * len(ids) + [0] * pad_to), list(ids) + [1] * pad_to
    places = [2 + sum(other != 1 for other in ids[:n]) if token != 1 else 1
              for n, token in enumerate(ids)]                # 2 + how many tokens are before it

    def norm(x, name):
        x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
        return x * w[name + '.LayerNorm.weight'] + w[name + '.LayerNorm.bias']

    def dense(x, name):
        return x @ w[name + '.weight'].T + w[name + '.bias']
    table, T = w['encoder.relative_attention_bias.weight'], len(ids)
    bias = np.array([[table[bucket(k - q)] for k in range(T)] for q in range(T)])       # (T, T, H)
    x = norm(w['embeddings.word_embeddings.weight'][ids] +
             w['embeddings.position_embeddings.weight'][places], 'embeddings')
    for n in range(2):
        name = f'encoder.layer.{n}'
        q, k, v = (dense(x, f'{name}.attention.attn.{part}').reshape(T, table.shape[1], -1)
                   for part in 'qkv')                                                   # (T, H, D)
        score = np.einsum('qhd,khd->qkh', q, k) / math.sqrt(q.shape[2]) + bias
        share = softmax(np.where(mask[:, None], score, -np.inf), axis=1)                # of keys
        mixed = np.einsum('qkh,khd->qhd', share, v).reshape(T, -1)
        x = norm(x + dense(mixed, f'{name}.attention.attn.o'), f'{name}.attention')
        inner = dense(x, f'{name}.intermediate.dense')
        inner = inner * (1 + erf(inner / math.sqrt(2))) / 2
        x = norm(x + dense(inner, f'{name}.output.dense'), f'{name}.output')
    vector = (x * mask[:, None]).sum(0) / mask.sum()
    return vector / np.linalg.norm(vector)


TEXTS = ['red tea', '', 'a b c, green tea!', 'tea red', 'x' * 60, 'unbreakable a', 'red tea',
         'a<pad>b <pad>c red', 'a ' * 300, '\u4e2d\u6587 </s> b', 'c']
# Text, sha of its token ids, first four components: sentence-transformers 6.2.0, float32.
REAL = [
    ('WAWO 15 Color Professionl Makeup Eyeshadow Camouflage Facial Concealer Neutral Palette. '
     'COKA. Beauty, Makeup, Face, Concealers & Neutralizers',
     '1368adc83524', [0.042036, 0.0326241, 0.021137, -0.0343958]),
    ('', '63cbaf561c18', [-0.0125034, 0.0614387, -0.0067345, 0.0252378]),
    ('😀😃 nice 👩\u200d👩\u200d👧\u200d👦 family', '0553c03c48b3',
     [-0.0680934, 0.0194508, -0.0313246, 0.0401848]),
    ('中文字符测试', '764c48e0a466', [0.0486595, -0.0261086, 0.0122908, 0.0278711]),
    ('e\u0301cole a\u0308b \u0301alone', '3e90a2eec94f',
     [0.009105, 0.0267472, 0.0234217, 0.0416711]),
    ('a\x00b\x07c\x7fd\x85e\ufffdf', '6df729877d9f', [0.0105823, -0.0365582, 0.0052969, -0.042894]),
    ('x' * 150, 'c1d4f87dc9d6', [-0.0104481, 0.0462962, 0.0075116, 0.0224715]),
    ('<u\u0301nk> <\xdcNK>', '011a248d4633', [0.0025613, 0.0749696, 0.0057538, 0.0280301]),
    ('<pad>x<pad> y', '93991bb3ce27', [-0.0087029, 0.0341448, 0.0106878, -0.0045875]),
    ('ΑΣ ΣΑΣ ΟΔΟΣ', '6ab237cf2210', [-0.0215243, -0.0344295, -0.0029059, -0.0142181]),
    ('word ' * 600, 'c139d01d7e8a', [.0326021, -.0316455, .0382969, .0535799]),            # 602 ids
]


class TestMPNet:
    def test_position_buckets(self):
        found = embed.position_buckets(300, 32).numpy()
        assert all(found[q, k] == bucket(k - q) for q in (0, 150, 299) for k in range(300))

    def test_it_is_the_formula_in_float64(self, tiny, capsys):
        weights = tiny_mpnet(tiny)
        found = embed.run_mpnet(TEXTS, tiny)
        assert capsys.readouterr().err == 'note: 1 of 11 texts cut to 68 tokens\n'
        assert found.dtype == np.float32 and found.shape == (len(TEXTS), 24)
        tokenizer = embed.Tokenizer(VOCAB)
        for n, text in enumerate(TEXTS):
            ids = tokenizer(text)
            ids = ids if len(ids) <= 68 else ids[:67] + [2]
            for pad in (0, 5):
                assert np.abs(found[n] - dense_mpnet(weights, ids, pad)).max() < 2e-6, text

    @given(st.lists(st.integers(1, 9), max_size=30), st.integers(1, 30))
    def test_a_batch_has_one_length_and_the_longest_come_first(self, lengths, budget):
        found = embed.batches(lengths, budget)
        assert sorted(sum(found, [])) == [*range(len(lengths))]
        of = [{lengths[n] for n in rows} for rows in found]
        assert all(len(one) == 1 for one in of) and of == sorted(of, key=max, reverse=True)
        assert all(len(rows) == 1 or len(rows) * max(one) <= budget for rows, one in zip(found, of))

    def test_the_first_layers_are_float32_whatever_the_others_are(self, tmp_path):
        tiny_mpnet(tmp_path / 'tiny', layers=6)
        _, model = embed.load_mpnet(tmp_path / 'tiny')
        ids = torch.tensor([[0, 5, 6, 7, 2], [0, 7, 7, 5, 2]])
        out = []                                     # of each layer
        for layer in model.encoder.layer:
            layer.register_forward_hook(lambda layer, args, result: out.append(result))
        with torch.inference_mode():
            model(ids)
            with torch.autocast('cpu', torch.bfloat16):
                model(ids)
        assert list(map(torch.equal, out[:6], out[6:])) == [True] * 4 + [False] * 2

    def test_damaged_weights_are_never_loaded(self, tiny, tmp_path, monkeypatch):
        monkeypatch.setattr(embed, 'HUB', 'http://127.0.0.1:1')
        monkeypatch.setattr(sys, 'executable', 'false')
        for name in embed.FILES:
            whole = (tiny / name).read_bytes()
            for damage in (whole[:-1], whole + b'\n', whole.replace(b'e', b'f', 1)):
                (tiny / name).write_bytes(damage)
                fails(f'{name}: SHA-256 is not .*hub: .*refused.*; PyPI: .*by hand', embed.encode,
                      ['a'], cache=tmp_path)
            (tiny / name).write_bytes(whole)
        assert embed.encode(['a'], cache=tmp_path).shape == (1, 24)

    def test_texts_of_unknown_words_are_counted(self, tiny, capsys):
        texts = ['tea \u0e01', 'tea red \u0e01', '\u0e01\x1b[31m' + 'q' * 99, '', 'red q zz']
        embed.run_mpnet(texts, tiny)
        assert capsys.readouterr().err == ('note: half or more of the words of 3 of 5 texts are '
                                           'unknown to MPNet, first of "tea \u0e01"\n')
        embed.run_mpnet(texts[2:3], tiny)
        assert capsys.readouterr().err.endswith('"\u0e01\\x1b[31m' + 'q' * 54 + '"\n')

    @pytest.mark.parametrize('has, expected', [
        ({}, 'float32'), ({'avx512_bf16': True}, 'bfloat16'), ({'amx_bf16': True}, 'bfloat16'),
        (None, 'float32')])
    def test_bfloat16_is_for_hardware_that_has_it(self, monkeypatch, has, expected):
        monkeypatch.delattr(torch.cpu, 'get_capabilities', raising=False)     # torch 2.6
        if has is not None:
            monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: has, raising=False)
        assert embed.fast_dtype('cpu') == expected and embed.fast_dtype('meta') == 'float32'

    @pytest.mark.skipif(not (WEIGHTS / 'model.safetensors').is_file(),
                        reason=f'the weights of all-mpnet-base-v2 are not in {WEIGHTS}')
    def test_real_weights(self):
        tokenizer, _ = embed.load_mpnet(WEIGHTS)
        texts, ids, expected = zip(*REAL)
        assert [sha(tokenizer(text)) for text in texts] == [*ids]
        exact = embed.run_mpnet(texts, WEIGHTS)
        assert np.abs(exact[:, :4] - expected).max() < 1e-5
        fast = embed.run_mpnet(texts, WEIGHTS, 'cpu', 'bfloat16')
        assert (fast * exact).sum(1).min() >= .9999


@pytest.fixture
def calls(monkeypatch):
    """The texts of each call of run_mpnet."""
    run, calls = embed.run_mpnet, []
    monkeypatch.setattr(embed, 'run_mpnet',
                        lambda texts, *more: calls.append(texts) or run(texts, *more))
    return calls


class TestCache:
    def test_it_is_used_and_a_damaged_file_is_not(self, tiny, tmp_path, calls):
        first = embed.encode(TEXTS, cache=tmp_path)
        file, = (tmp_path / 'vectors').iterdir()
        assert (embed.encode(TEXTS, cache=tmp_path) == first).all() and len(calls) == 1
        good = file.read_bytes()
        flipped = bytearray(good)
        flipped[-33] ^= 1                            # another number, as finite as the right one
        for damage in (b'', good[:50], good[:-1], b'x' * len(good), flipped):
            calls.clear()
            file.write_bytes(damage)
            assert (embed.encode(TEXTS, cache=tmp_path) == first).all()
            assert len(calls) == 1 and file.read_bytes() == good

    def test_it_is_named_by_all_that_changes_vectors(self, tiny, tmp_path, monkeypatch, calls):
        embed.encode(TEXTS, cache=tmp_path)
        embed.encode(TEXTS + ['more'], cache=tmp_path)
        embed.encode(TEXTS[::-1], cache=tmp_path)
        for texts in (['ab', 'c'], ['a', 'bc']):
            embed.encode(texts, cache=tmp_path)
        other = {'float32': 'bfloat16', 'bfloat16': 'float32'}[embed.fast_dtype('cpu')]
        for name, value in (('VERSION', 0), ('fast_dtype', lambda device: other),
                            ('MAX_TOKENS', 67), ('EPSILON', .1)):
            with monkeypatch.context() as patch:
                patch.setattr(embed, name, value)
                embed.encode(TEXTS, cache=tmp_path)
        assert len(calls) == len(list((tmp_path / 'vectors').iterdir())) == 9

    def test_an_interrupted_run_leaves_nothing(self, tiny, tmp_path, monkeypatch):
        def stop(*_):
            raise KeyboardInterrupt
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(embed, 'run_mpnet', stop)
            embed.encode(TEXTS, cache=tmp_path)
        assert sorted(tmp_path.rglob('*')) == sorted(
            [tiny, tmp_path / 'vectors', *(tiny / name for name in embed.FILES)])

    @pytest.mark.parametrize('change, match', [
        ({'encoder': 'bert'}, 'encoder bert: expected mpnet, tfidf, or an .npz'),
        ({'encoder': 'a\x1b\n'}, r'encoder a\\x1b: expected'), ({'encoder': None}, '^encoder: '),
        ({'texts': ['', ' ']}, 'no item has a text'),
        ({'texts': 'tea pot'}, '^texts: one str; expected a list of strings$'),
        ({'texts': ['a', math.nan]}, '^texts: 1 is a float; expected a string$'),
        ({'encoder': 'v.npz', 'ids': None}, '^ids: one NoneType; expected a list of strings'),
        ({'encoder': 'v.npz', 'ids': ['7', '8']}, '2 ids for 1 texts'),
        ({'device': 'abacus'}, '^device: .*abacus'), ({'device': torch.ones(2)}, '^device: '),
        ({'texts': ['!', '.'], 'encoder': 'tfidf'}, 'no text has a word'),
        ({}, 'cannot write the cache'), ({'cache': None}, '^cache: '),
        ({'cache': '~no-such-user/x'}, '^cache: .*home')])
    def test_errors_of_encode(self, tmp_path, monkeypatch, change, match):
        monkeypatch.chdir(tmp_path)
        Path('file').write_text('')
        fails(match, embed.encode, **{'texts': ['a'], 'cache': 'file', **change})
        assert [path.name for path in tmp_path.iterdir()] == ['file']

    def test_homes_are_expanded(self, tiny, tmp_path, monkeypatch):
        monkeypatch.setenv('HOME', str(tmp_path))
        embed.encode(['a'], cache='~')
        np.savez(tmp_path / 'v.npz', ids=['7'], vectors=[[1.]])
        assert embed.encode(['a'], '~/v.npz', ids=['7']) == [[1]]
        assert len(list((tmp_path / 'vectors').iterdir())) == 1


class TestTfidf:
    def test_groups_and_cosines(self):
        rng = np.random.default_rng(0)
        words = [f'w{n}' for n in range(60)]
        texts = [' '.join(rng.choice(words[20 * (n % 3):20 * (n % 3) + 20], 8)) for n in range(90)]
        found = embed.encode([*map(str.upper, texts), '', '!'], 'tfidf')   # small and large: one
        assert found.shape == (92, 60) and found.dtype == np.float32 and not found[90:].any()
        # full rank: the SVD turns the TF-IDF rows, so their cosines stay
        table = np.array([[text.split().count(word) for word in words] for text in texts])
        weight = np.where(table > 0, 1 + np.log(np.maximum(table, 1)), 0)
        weight *= 1 + np.log(93 / (1 + (table > 0).sum(0)))
        weight /= np.linalg.norm(weight, axis=1, keepdims=True)
        assert np.abs(weight @ weight.T - found[:90] @ found[:90].T).max() < 1e-5

    def test_truncated(self):
        rng = np.random.default_rng(1)
        words = np.array([f'w{n}' for n in range(300)])
        texts = [' '.join(words[(rng.pareto(1, 30) * 5).astype(int) % 300]) for _ in range(200)]
        found, full = embed.tfidf(texts, 20), embed.tfidf(texts, 200)
        exact = full[:, :20] / np.linalg.norm(full[:, :20], axis=1, keepdims=True)
        assert found.shape == (200, 20) and np.abs((found * exact).sum(1)).min() > .999


VECTORS = np.arange(1., 9).reshape(4, 2)


class TestFiles:
    def encode(self, path, content):
        """encode() from a file of arrays or bytes, for the items 10, 7 and 9."""
        if isinstance(content, dict):
            np.savez(path, **{name: np.asarray(value) for name, value in content.items()})
        else:
            path.write_bytes(content)
        return embed.encode(['a', 'b', 'c'], str(path), ids=['10', '7', '9'])

    @pytest.mark.parametrize('change', [
        {}, {'ids': np.array([7, 8, 9, 10], '>i2'), 'more': [1]},
        {'vectors': np.asfortranarray(VECTORS).astype('>f2')}, {'vectors': VECTORS.astype('>i4')}])
    def test_vectors_are_read(self, tmp_path, change):
        found = self.encode(tmp_path / 'v.npz', dict(ids=['7', '8', '9', '10'],
                                                     vectors=VECTORS) | change)
        assert (found == VECTORS[[3, 0, 2]]).all() and found.dtype == np.dtype('=f4')

    @pytest.mark.parametrize('content, match', [
        (dict(ids=['7', '9', '10'], vectors=[[1, 2], [np.nan, 1], [1, np.inf]]),
         '2 of 3 vectors hold NaN or infinity, first in row 0'),
        (dict(ids=['7', '9', '10'], vectors=[[1, 2], [1e300, 1], [1, 1]]), '1 of 3 vectors hold'),
        (dict(ids=['7', '9', '10'], vectors=np.zeros((3, 2))), 'all vectors are zero'),
        (dict(ids=['7', '8', '9'], vectors=VECTORS[:3]), 'lacks 1 of 3 .* 10; it holds 7, 8, 9$'),
        (dict(ids=['7', '8', '7', '9'], vectors=VECTORS), r'ids of <U1 .*\(4,\), 3 of them'),
        (dict(ids=['7', '8'], vectors=VECTORS), r'2 of them different, and .*shape \(4, 2\)'),
        (dict(ids=[7., 8, 9, 10], vectors=VECTORS), r'float64 .*numpy.savez\(PATH, ids=ids.astype'),
        (dict(ids=['7', '9', '10'], vectors=np.arange(3.)), r'float64 and shape \(3,\); expected'),
        (dict(ids=['7', '9', '10'], vectors=[['a']] * 3), 'vectors of <U1'),
        (dict(ids=['7', '9', '10'], vectors=np.zeros((3, 0))), r'shape \(3, 0\)'),
        (dict(emb=VECTORS, item=[1]), 'the arrays emb, item; expected what numpy.savez'),
        (dict(ids=np.array(['7', None], object), vectors=VECTORS), r'Object.*ids.astype\(str\)'),
        (b'', 'holds no arrays; expected'), (b'PK\3\4', 'no arrays')])
    def test_other_files_are_refused(self, tmp_path, content, match):
        assert fails(match, self.encode, tmp_path / 'v.npz', content).isprintable()

    def test_damaged_files(self, tmp_path):
        path = tmp_path / 'v.npz'
        np.savez(path, ids=['7'], vectors=VECTORS[:1])
        good = path.read_bytes()
        encrypted, unknown, at = bytearray(good), bytearray(good), good.index(b'PK\1\2')
        encrypted[at + 8], unknown[at + 10] = 1, 77
        text = zipped({'ids.npy': 'no array', 'vectors.npy': 'none'})
        head = "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000000, 768)}"
        raw = b'\x93NUMPY\x01\x00' + len(head).to_bytes(2, 'little') + head.encode()
        huge = zipped({'ids.npy': raw, 'vectors.npy': raw})
        for damage in (good[:len(good) // 2], encrypted, unknown, text, huge):
            fails('v.npz holds .*expected what numpy', self.encode, path, damage)
        fails('no such file; expected what numpy', embed.encode, ['a'], 'x\n.npz', ids=['7'])


MODEL = {'vocab.txt': b'a' * 900, 'model.safetensors': b'b' * 700}


class TestWeights:
    @pytest.fixture
    def folder(self, server, tmp_path, monkeypatch):
        monkeypatch.setattr(embed, 'FILES', {name: (hashlib.sha256(body).hexdigest(), len(body))
                                             for name, body in MODEL.items()})
        return tmp_path / 'folder'

    def pip(self, tmp_path, monkeypatch, contents):
        """A pip that finds five wheels, whose parts make a zip of contents."""
        name = embed.NAME
        whole = b'junk' * 9 if contents is None else zipped(
            {f'{name}/{file}': body for file, body in contents.items()})
        step = -(-len(whole) // 5)
        for n in range(1, 6):
            wheel = tmp_path / f"{name.replace('-', '_')}_pypi_part_{n:03}-0.0.1-py3-none-any.whl"
            wheel.write_bytes(zipped({f'{name}-pypi-part_{n:03}/input/{name}.zip.{n:03}':
                                      whole[step * (n - 1):step * n]}))
        (tmp_path / 'pip').write_text('#!/bin/sh\nwhile [ "$1" != --dest ]; do shift; done\n'
                                      f'cp {tmp_path}/*.whl "$2"\n')
        (tmp_path / 'pip').chmod(0o755)
        monkeypatch.setattr(sys, 'executable', str(tmp_path / 'pip'))

    def test_the_hub_comes_first_then_pypi_and_neither_if_they_are_there(self, server, folder,
                                                                         tmp_path, monkeypatch):
        self.pip(tmp_path, monkeypatch, MODEL | {'README.md': b'r', '../../evil': b'e'})
        server.pages['vocab.txt'] = b'A' * 900       # the hub has another file of that size
        embed.fetch_mpnet(folder)
        assert {path.name for path in folder.iterdir()} == {*MODEL} and len(server.asked) == 1
        server.pages |= MODEL
        (folder / 'vocab.txt').write_text('config.json')
        for _ in range(2):
            embed.fetch_mpnet(folder)
            assert [name for name, _, _ in server.asked] == ['vocab.txt', *MODEL]
            assert all((folder / name).read_bytes() == body for name, body in MODEL.items())

    @pytest.mark.parametrize('contents, match', [
        (MODEL | {'vocab.txt': b'A' * 900}, 'vocab.txt: SHA-256 is not'),
        ({'vocab.txt': b''}, 'no item'), (None, 'not a zip')])
    def test_if_every_source_fails_one_line_has_all(self, folder, monkeypatch, contents, match):
        self.pip(folder.parent, monkeypatch, contents)
        folder.mkdir()
        (folder / 'vocab.txt').write_text('config.json')
        fails(f'SHA-256.*hub: .*404.*PyPI: .*{match}.*by hand', embed.fetch_mpnet, folder)
        assert [path.name for path in folder.iterdir()] == ['vocab.txt']


# ---- the files --------------------------------------------------------------------------------

README = (HERE / 'README.md').read_text(encoding='utf8')


def blocks(kind):
    """The fenced blocks of the README of one kind, such as python."""
    return re.findall(rf'^```{kind}\n(.*?)^```$', README, re.MULTILINE | re.DOTALL)


class TestReadme:
    @pytest.fixture
    def quick(self, own, monkeypatch):
        """data.load and embed.encode with made-up data and without the network."""
        load, encode = data.load, embed.encode
        monkeypatch.setattr(data, 'load', lambda dataset: load(str(own)))
        monkeypatch.setattr(embed, 'encode', lambda texts: np.tile(encode(texts, 'tfidf'), 8))

    def test_its_lines_fit_a_screen(self):
        assert [line for line in README.splitlines() if len(line) > 100 and line[0] != '|'] == []

    def test_the_program_runs_as_it_stands_and_a_new_user_is_recommended_to(self, quick, capsys):
        program, own_model, new_user, *_ = blocks('python')
        names = {'torch': torch}
        exec(program, names)
        out = capsys.readouterr().out.splitlines()
        found = re.fullmatch(r'Recall@10 (\S+), NDCG@10 (\S+)', out[-1])
        assert float(found[1]) > .3                                    # chance: about .2
        trained = {name: names[name] for name in ('model', 'train', 'titles')}
        items0 = names['items0'].copy()

        # the tables of other models, which are stood in for by ones of the same shape
        class Model:
            def __init__(self, n_nodes, K, num_layers):
                self.embedding = torch.nn.Embedding(n_nodes, K)
                self.user_embedding = torch.nn.Embedding(121, K)
                self.item_embedding = torch.nn.Embedding(61, K)

            def token2id(self, field, token):
                return int(token[1:]) + 1

        class torch_geometric:
            class nn:
                LightGCN = Model
        names |= {'torch_geometric': torch_geometric, 'dataset': Model(1, 1, 1)}
        exec(own_model, names)
        model, table = names['model'], names['table']
        assert (model.embedding.weight[120:].detach().numpy() == items0).all()
        places = [int(item[1:]) + 1 for item in names['items']]
        assert (model.item_embedding.weight[places].detach().numpy() == items0).all()
        with torch.no_grad():
            for weight in table.weight, model.embedding.weight:
                assert weight.requires_grad
                weight += 1                                            # as training does
        assert (names['items0'] == items0).all()

        names |= trained
        exec(new_user, names)
        picked = names['picked']
        assert picked.shape == (3, 5)
        assert names['titles'][picked[0, 0]] in capsys.readouterr().out
        assert not {*picked[0]} & {*names['train'][0].indices}

    def test_a_saved_run_is_read_and_vectors_are_written_as_it_says(self, own, tmp_path,
                                                                    monkeypatch):
        *_, saved, others = blocks('python')
        monkeypatch.chdir(tmp_path)
        users = tmp_path / 'own' / 'interactions.csv'
        users.write_text(users.read_text().replace('u7,', 'ann,'))
        assert main_on(own, '--save', 'run') == 0
        names = {'json': json, 'np': np}
        exec(saved, names)
        assert names['scores'].shape == (60,)
        rows = Path('run/recommendations.tsv').read_text().splitlines()
        best = next(row.split('\t') for row in rows if row.startswith('ann\t1\t'))
        i = names['run']['items'].index(best[2])
        assert abs(names['scores'][i] - float(best[3])) < 1e-5

        class SentenceTransformer:
            def __init__(self, name):
                assert isinstance(name, str)

            def encode(self, texts):
                return np.ones((len(texts), 3), np.float32)
        lines = others[others.index('vectors ='):]
        exec(lines, {'np': np, 'SentenceTransformer': SentenceTransformer, 'texts': ['a', 'b'],
                     'ids': ['1', '2']})
        assert embed.encode(['b'], 'vectors.npz', ids=['2']).tolist() == [[1, 1, 1]]


# in one process, as torch takes seconds: each module is forgotten before the next one
ALONE = """
import sys
for name in sys.argv[1:-1]:
    sys.path.insert(0, name)
    __import__(name)
    del sys.path[0], sys.modules[name]
"""


class TestModules:
    def test_what_a_killed_run_left_goes_after_a_day_and_nothing_else(self, server, tmp_path,
                                                                     monkeypatch):
        names = 'old.part', 'new.part'
        ours = {tmp_path / 'vectors': names, tmp_path / embed.NAME: names,
                tmp_path: ('.part-old', '.part-new')}
        for folder, (name, new) in ours.items():
            folder.mkdir(exist_ok=True)
            (folder / new).mkdir()
            for old in (name, 'notes.partial', 'spare.part.txt'):
                (folder / old).mkdir()
                os.utime(folder / old, (0, 0))
        monkeypatch.setattr(sys, 'executable', 'no-python')
        fails('no source', embed.fetch_mpnet, tmp_path / embed.NAME)
        embed.cached(['a'], tmp_path, 'm', (), lambda texts: np.ones(1))
        fails('by hand', data.load, 'toys', str(tmp_path))
        for folder, (_, new) in ours.items():
            left = {path.name for path in folder.iterdir() if path.suffix != '.npy'}
            assert left - {'vectors', embed.NAME} == {new, 'notes.partial', 'spare.part.txt'}

    def test_each_imports_alone_in_an_empty_folder_and_does_nothing(self, tmp_path):
        names = ['data', 'embed', 'llminit', 'models']
        for name in names:
            (tmp_path / name).mkdir()
            shutil.copy(HERE / f'{name}.py', tmp_path / name)
        code, out, err = finished('-B', '-I', '-c', ALONE, *names, '--no-such-flag', cwd=tmp_path)
        assert (code, out, err) == (0, '', '')
        assert {path.name for path in tmp_path.rglob('*.*')} == {f'{name}.py' for name in names}

    @pytest.mark.parametrize('module', [data, embed, llminit, models])
    def test_doctests(self, module):
        found = doctest.testmod(module)
        assert found.attempted > 0 and found.failed == 0

    def test_the_two_copies_are_equal(self):
        for name in ('sweep', 'write_blocks', 'download'):
            assert inspect.getsource(getattr(data, name)) == inspect.getsource(getattr(embed, name))
