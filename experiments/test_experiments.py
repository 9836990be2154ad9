"""Tests of the experiments: grids, results files, reports, figures, conversion."""
import contextlib
import gzip
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings, strategies as st
from scipy import stats

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import amazon2014  # noqa: E402
import data  # noqa: E402
import embed  # noqa: E402
import llminit  # noqa: E402
import models  # noqa: E402
import peers  # noqa: E402
import report  # noqa: E402
import run  # noqa: E402
from test_llminit import main_on, random_graph, started, write_planted  # noqa: E402

GRID = ['--encoder', 'tfidf', '--dim', '8,16', '--epochs', '2', '--model', 'bpr,morec',
        '--strategy', 'none,rand,var', '--seeds', '2']


def grid(folder, results, *flags):
    """run.command on a folder, with a quick encoder -> exit code."""
    return run.command(list(map(str, ['--dataset', folder, '--encoder', 'tfidf', '--dim', 8,
                                      '--epochs', 2, '--results', results, *flags])))


@pytest.fixture
def own(tmp_path):
    return write_planted(tmp_path / 'own, mine')                       # a comma in a path


class TestRun:
    def test_a_grid_runs_every_cell_once_and_goes_on_where_it_was_killed(
            self, own, tmp_path, capsys, monkeypatch):
        results = tmp_path / 'new' / 'r.jsonl'
        trained, loaded, train, load = [], [], models.train, data.load

        def stop_after_five(*args, **kwargs):
            trained.append(args[0])
            if len(trained) == 6:
                raise KeyboardInterrupt
            return train(*args, **kwargs)
        monkeypatch.setattr(models, 'train', stop_after_five)
        monkeypatch.setattr(data, 'load', lambda *a, **k: loaded.append(a) or load(*a, **k))
        assert grid(own, results, *GRID) == 130
        first = results.read_bytes()
        assert first.count(b'\n') == 5 and len(loaded) == 1
        results.write_bytes(first[:-40])                               # cut off in its last line
        capsys.readouterr()
        assert grid(own, results, *GRID) == 0
        out, err = capsys.readouterr()
        # a seed: bpr 3 strategies x 2 dims; morec: rand and var are both 'full', so 2 x 2
        assert len(trained) == 6 + 20 - 4
        assert err.count('1 damaged lines') == 1 and '20 of 20 runs are in' in err
        assert out.count('| dataset |') == 1 and out.count('\n') == 2 + 16     # one header
        rows, damaged = run.read_results(results)
        assert damaged == 1
        assert len({run.identity(row['settings'], row['training']) for row in rows}) == 20
        assert [row['settings']['seed'] for row in rows] == [0] * 10 + [1] * 10
        assert grid(own, results, *GRID) == 0 and len(trained) == 22   # all are there
        for row in rows:
            assert len(row['curve']) == 2 and row['test'].keys() == row['valid'].keys()
            apart = row['by training interactions, from'].values()
            whole = sum(part['users'] * part['NDCG@10'] for part in apart) / 120
            assert abs(whole - row['test']['NDCG@10']) < 1e-9
            assert abs(report.users_ndcg(row).mean() - whole) < 1e-9

    def test_a_cell_prints_the_row_of_llminit(self, own, tmp_path, capsys):
        assert grid(own, tmp_path / 'r.jsonl', '--dim', '8,16', '--strategy', 'none,var', '--seeds',
                    2, '--model', 'lightgcn,morec') == 0
        out = [line.split(' | ')[:8] for line in capsys.readouterr().out.splitlines()[2:]]
        assert len(out) == 16
        for flags in (['--dim', 16, '--seed', 1], ['--strategy', 'none'], ['--model', 'morec']):
            assert main_on(own, *flags) == 0
            assert capsys.readouterr().out.splitlines()[-1].split(' | ')[:8] in out

    def test_runs_that_train_alike_are_one(self, own, tmp_path, capsys, monkeypatch):
        results, rows = tmp_path / 'r.jsonl', 0
        for flags, new in (([], 1), (['--batch', 2048, '--lr', '.003', '--patience', 20], 0),
                           (['--preset', 'paper'], 1), (['--model', 'sgcl'], 1),
                           (['--model', 'sgcl', '--preset', 'paper'], 0), (['--whiten', .5], 0),
                           (['--strategy', 'none', '--encoder', 'mpnet'], 1),
                           (['--strategy', 'none', '--pool', 'sqrt'], 0), (['--cold', '.5'], 1),
                           (['--patience', 7], 1), (['--tau', .5], 0)):
            assert grid(own, results, *flags) == 0
            rows += new
            assert len(run.read_results(results)[0]) == rows, flags
        monkeypatch.setitem(llminit.OURS[None], 'patience', 9)         # the preset itself changes
        assert grid(own, results) == 0 and len(run.read_results(results)[0]) == rows + 1

    def test_another_endpoint_is_another_run(self, own, tmp_path, monkeypatch):
        monkeypatch.setattr(embed, 'encode', lambda texts, *args, **kwargs: np.eye(
            len(texts), 32, dtype=np.float32))
        for url, count in (('http://a/v1', 1), ('http://a/v1/', 1), ('http://bc/v1', 2)):
            monkeypatch.setenv('OPENAI_BASE_URL', url)
            assert grid(own, tmp_path / 'r.jsonl', '--encoder', 'openai:m') == 0
            rows, _ = run.read_results(tmp_path / 'r.jsonl')
            assert len(rows) == count and rows[-1]['settings']['endpoint'] == url.rstrip('/')

    def test_a_cell_that_fails_is_named_and_the_others_run(self, own, tmp_path, capsys):
        results = tmp_path / 'r.jsonl'
        assert grid(own, results, '--dim', '999,4,8', '--epochs', 1) == 2
        out, err = capsys.readouterr()
        assert [line[:3] for line in out.splitlines()] == ['| d', '| -'] + ['| /'] * 2
        told = [line for line in err.splitlines() if line[:4] not in ('run ', 'note')]
        assert told[0].startswith('run.py: error: cannot keep 999') and 'K=999' in told[0]
        assert told[1:] == [f'2 of 3 runs are in {results}']

    def test_what_is_wrong_shows_before_any_run(self, own, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(data, 'load', None)                        # is not reached
        notes = tmp_path / 'notes.csv'
        notes.write_text('user,note\nann,"[1"\n')
        assert grid(own, notes) == 2 and 'is no results file' in capsys.readouterr().err
        assert notes.read_text() == 'user,note\nann,"[1"\n'
        assert grid(own, '/dev/null/r.jsonl') == 2
        for flags in (['--strategy', 'var,best'], ['--dim', '8,x'], ['--cold', '.5,2'],
                      ['--model', ''], ['--seeds', '0'], ['--save', tmp_path / 's'], ['--lr', 'x']):
            capsys.readouterr()
            with pytest.raises(SystemExit) as stop:
                grid(own, tmp_path / 'r.jsonl', *flags)
            assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
        assert not (tmp_path / 'r.jsonl').exists()                     # no empty file

    def test_on_a_terminal_a_grid_has_one_live_line_that_an_error_replaces(self, own, tmp_path):
        pty = pytest.importorskip('pty')
        ours, theirs = pty.openpty()
        command = [sys.executable, HERE / 'run.py', '--dataset', own, '--encoder', 'tfidf', '--dim',
                   '8,5000', '--epochs', '2', '--results', tmp_path / 'r.jsonl']
        done = subprocess.Popen(list(map(str, command)), stdout=theirs, stderr=theirs,
                                env={**os.environ, 'COLUMNS': '90', 'OMP_NUM_THREADS': '1'})
        try:
            os.close(theirs)
            out = b''
            with contextlib.suppress(OSError):                         # the end of a terminal
                while part := os.read(ours, 4096):
                    out += part
            assert done.wait(60) == 2
        finally:
            done.kill()
        live = [part for part in out.decode().split('\r') if '1 of 2, time left unknown, ' in part]
        assert live and all(len(part.removesuffix('\x1b[K')) < 90 for part in live)
        assert 'epoch 2, best' in out.decode() or str(own)[:9] in live[0]
        assert '\x1b[Krun.py: error: cannot keep 5000' in out.decode()

    @given(st.integers(0, 2 ** 32), st.floats(0, 1))
    @settings(max_examples=60, deadline=None)
    def test_thin_removes_a_share_and_leaves_everyone_one(self, seed, share):
        train = random_graph(40, 30, .3, seed)
        left, again = (run.thin(train, share, np.random.default_rng(seed)) for _ in range(2))
        had, has = np.diff(train.indptr), np.diff(left.indptr)
        assert left.shape == train.shape and left.dtype == np.float32 and (left.data == 1).all()
        assert not (left > train).nnz and (left != again).nnz == 0
        assert (has >= np.minimum(had, 1)).all() and (has <= had).all()
        assert (np.abs(had - has - share * had) < 1)[had > 1].all() or share > .9

    def test_thin_draws_evenly_and_as_it_always_did(self):
        left = run.thin(sp.csr_matrix(np.ones((4000, 5), np.float32)), .5, np.random.default_rng(0))
        assert abs(left.nnz / 20000 - .5) < .01
        assert np.ptp(left.getnnz(axis=0)) < 250                       # 2,000 each, sigma 32
        assert run.digest(left)[:12] == '512ac2e871c1'

    def test_the_spectrum_of_a_table(self):
        flat = run.spectrum(torch.eye(6))
        assert abs(flat['abundance'] - 6) < 1e-6 and abs(flat['effective rank'] - 6) < 1e-6
        table = np.random.default_rng(0).standard_normal((50, 6)) * [8, 4, 2, 1, .5, .1]
        s = np.linalg.svd(table, compute_uv=False)
        found, p = run.spectrum(torch.from_numpy(table)), s / s.sum()
        assert abs(found['abundance'] - s.sum() / s[0]) < 1e-6
        assert abs(found['effective rank'] - np.exp(-(p * np.log(p)).sum())) < 1e-6


def fake_run(strategy, seed, ndcg, dataset='office', training={}, **more):
    """A row of a results file whose users have the given NDCG@10."""
    one = {'dataset': dataset, 'strategy': strategy, 'seed': seed, 'model': 'sgcl', 'dim': 8,
           'cold': 0., 'seen': 'keep', 'preset': 'paper', 'encoder': 'mpnet', 'pool': 'mean',
           'core': 5, 'min_rating': 4., 'text_columns': None, **more}
    scores = {'Recall@10': float(np.mean(ndcg > 0)), 'NDCG@10': float(np.mean(ndcg))}
    part = {'abundance': 2., 'effective rank': 3.}
    return {'settings': one, 'training': training, 'K': one['dim'], 'test': scores, 'valid': scores,
            'best epoch': 2, 'parameters': 9, 'seconds': 3., 'ranks': run.pack(ndcg),
            'curve': [[1., .1, 1.], [.9, .2, 1.]], 'spectrum': {'users': part, 'items': part},
            'by training interactions, from': {'3': {'users': 5, **scores},
                                               '5': {'users': 4, **scores}}}


NDCG = np.where(np.arange(300) % 7 == 0, 1., 0)


@pytest.fixture
def tell(tmp_path, monkeypatch, capsys):
    """tell(runs or lines, *args) -> lines that report.py prints of them, exit code, stderr."""
    monkeypatch.chdir(tmp_path)

    def tell(runs, *args):
        Path('r.jsonl').write_text('\n'.join(row if isinstance(row, str) else json.dumps(row)
                                             for row in runs))
        capsys.readouterr()
        try:
            report.main(list(map(str, args)))
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
            print(stop.code, file=sys.stderr)
        out, err = capsys.readouterr()
        return out.splitlines(), code, err
    return tell


def rows_of(lines):
    """The rows of the first Markdown table as dicts."""
    at = next(n for n, line in enumerate(lines) if set(line) <= set('| -') and line)
    cells = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]
    return [dict(zip(cells[at - 1], row)) for row in cells[at + 1:] if len(row) > 1]


class TestReport:
    def test_a_row_is_mean_deviation_gain_and_holms_p(self, tell):
        rng, ndcg = np.random.default_rng(0), {}
        for strategy, chance in (('var', .35), ('none', .1), ('rand', .3)):    # in no order
            ndcg[strategy] = np.where(rng.random((2, 900)) < chance, 1 / np.log2(
                2. + rng.integers(0, 10, (2, 900))), 0)
        runs = [fake_run(name, seed, ndcg[name][seed], dim=128) for name in ndcg for seed in (0, 1)]
        lines, code, _ = tell(runs, 'table', 'r.jsonl', '--show', 'cost', 'valid', 'spectrum',
                              'activity')
        rows = rows_of(lines)
        assert code == 0 and '2 comparisons' in lines[0]
        assert [row['strategy'] for row in rows] == ['none', 'rand', 'var']
        p = {name: stats.ttest_rel(ndcg[name].mean(0), ndcg['none'].mean(0)).pvalue
             for name in ('rand', 'var')}
        small, large = sorted(p, key=p.get)            # p of the smaller one is doubled
        expected = {small: 2 * p[small], large: max(2 * p[small], p[large])}
        for row, paper in zip(rows, ('.0647/.0298', '.0770/.0365', '.0776/.0366')):
            found = ndcg[row['strategy']].mean(1)
            assert row['NDCG@10'] == f'{found.mean():.4f} +- {found.std(ddof=1):.4f}'
            assert row['paper'] == paper and row['seeds'] == '2' and row['from 5']
            if row['strategy'] != 'none':
                assert row['p'] == f'{expected[row["strategy"]]:.1g}'
                assert row['gain'] == f'{found.mean() / ndcg["none"].mean() - 1:+.1%}'
        assert 'over rand' in tell(runs, 'table', 'r.jsonl', '--against', 'rand')[0][0]
        lines, code, _ = tell(runs, 'time', 'r.jsonl')
        assert code == 0 and lines[2:] == ['| office | sgcl | keep | paper | 6 | 0 |',
                                           '| all |  |  |  | 6 | 0 |']

    def test_damage_is_left_out_and_errors_are_one_line(self, tell):
        good = [fake_run('none', 0, NDCG), fake_run('var', 0, NDCG, cold=.5)]
        wrong = {**good[0], 'ranks': run.pack(0 * NDCG)}               # not those of its score
        lines, code, err = tell(['{"cut', '[]', wrong, *good], 'table', 'r.jsonl')
        assert code == 0 and err.count('left out') == 3 and any('| var ' in line for line in lines)
        for args in (['table', 'nothing'], ['table', 'r.jsonl', '--only', 'x=1'],
                     ['table', '--only', 'model=sgl', 'r.jsonl'], ['plot', 'r.jsonl'],
                     ['table', 'r.jsonl', '--against', 'typo']):
            lines, code, err = tell(good, *args)
            assert code == 1 and not lines and err.splitlines()[-1].startswith('report: ')
        lines, _, _ = tell(good, 'table', '--only', 'cold=0', 'strategy=var,none', 'r.jsonl')
        assert len(rows_of(lines)) == 1

    @pytest.mark.parametrize('value', [None, {'x': 1}])
    def test_a_run_that_lacks_a_number_is_left_out(self, tell, value):
        parts = [('test', 'Recall@10'), ('valid', 'NDCG@10'), ('spectrum', 'users'),
                 ('', 'spectrum'), ('', 'curve'), ('', 'seconds'), ('settings', 'seed'),
                 ('settings', 'dataset')]
        runs = [fake_run('uni', n, NDCG) for n in range(len(parts))]
        for row, (part, name) in zip(runs, parts):
            (row[part] if part else row)[name] = value
        for args in (['table', 'r.jsonl', '--show', 'cost', 'valid'], ['time', 'r.jsonl']):
            lines, code, err = tell([fake_run('none', 0, NDCG), *runs, fake_run('var', 0, NDCG)],
                                    *args)
            assert code == 0 and err.count('left out') == 8 and 'uni' not in str(lines)

    def test_other_training_other_seeds_other_users(self, tell):
        runs = [fake_run(strategy, seed, np.roll(NDCG, seed), training={'batch': 256})
                for strategy, seed in (('none', 0), ('none', 1), ('var', 0))]
        assert tell(runs, 'table', 'r.jsonl')[0][0].endswith('over those that both rows have')
        runs[1]['training'] = {'batch': 7}
        assert 'none batch=7' in str(tell(runs, 'table', 'r.jsonl')[0])
        lines, _, _ = tell(runs, 'table', 'r.jsonl', '--only', 'batch=256', '--only', 'seed=0')
        assert len(rows_of(lines)) == 2
        other = np.where(np.arange(300) % 3 == 0, 1., 0)
        lines, _, _ = tell([fake_run('none', 0, NDCG), fake_run('uni', 0, NDCG),
                            fake_run('var', 0, other), fake_run('rand', 0, NDCG[:200])],
                           'table', 'r.jsonl')
        p = {row['strategy']: row['p'] for row in rows_of(lines)}
        assert p['uni'] == '1' and p['rand'] == '' and 0 < float(p['var']) < 1e-3

    def test_an_endpoint_is_shown_if_an_encoder_has_several(self, tell):
        runs = [fake_run('none', 0, NDCG)] + [
            fake_run('var', 0, NDCG, encoder='openai:m', endpoint=url) for url in ('a', 'b')]
        for some, told in (runs[:2], False), (runs, True):
            lines, _, _ = tell(some, 'table', 'r.jsonl')
            assert ('endpoint' in str(lines)) == told and len(rows_of(lines)) == len(some)

    def test_a_full_table_is_compared_with_its_own_size(self, tell):
        lines, _, _ = tell([fake_run('none', 0, NDCG, dim=24), fake_run('none', 0, NDCG[::-1]),
                            fake_run('full', 0, NDCG) | {'K': 24}], 'table', 'r.jsonl')
        row = next(row for row in rows_of(lines) if row['strategy'] == 'full')
        assert row['dim'] == '24' and row['p'] == '1'

    @pytest.mark.parametrize('x', ['dim', 'cold', 'users', 'epoch'])
    def test_the_figures_are_drawn(self, tell, x):
        runs = [fake_run(strategy, 0, np.full(9, 1.), dim=dim, cold=cold, dataset=dataset)
                for dataset in ('office', 'beauty') for strategy in ('none', 'var')
                for dim in ((8, 16) if x == 'dim' else (8,))
                for cold in ((0., .5) if x == 'cold' else (0.,))]
        _, code, err = tell(runs, 'plot', 'f.png', 'r.jsonl', '--x', x)
        assert code == 0 and Path('f.png').read_bytes().startswith(b'\x89PNG'), err

    @pytest.mark.parametrize('readme', ['README.md', 'experiments/README.md'])
    def test_every_table_in_the_readmes_is_what_its_command_prints(self, readme, capsys,
                                                                   monkeypatch):
        monkeypatch.chdir(HERE.parent)
        text = Path(readme).read_text()
        commands = list(re.finditer(r'^    python experiments/report\.py ((?:table|time) '
                                    r'(?:.*\\\n +)*.*)$', text, re.MULTILINE))
        for command in commands:
            words = shlex.split(command[1].replace('\\\n', ''))
            files = [name for word in words for name in sorted(HERE.parent.glob(word))
                     if word.endswith('.jsonl')]
            report.main([word for word in words if not word.endswith('.jsonl')][:1]
                        + [str(name.relative_to(HERE.parent)) for name in files]
                        + [word for word in words if not word.endswith('.jsonl')][1:])
            printed = capsys.readouterr().out.strip()
            assert printed in text[command.end():][:len(printed) + 400], command[1]


def raw_review(user, item, rating=5.0):
    return json.dumps({'reviewerID': user, 'asin': item, 'reviewText': 'so\nso', 'overall': rating,
                       'unixReviewTime': 1390000000}).encode()


class TestAmazon2014:
    reviews = [raw_review(f'u{u}', f'i{i}') for u in range(5) for i in range(5)]
    items = [repr({'asin': f'i{i}', 'title': "Ball's\t\n" + chr(233), 'brand': None, 'price': 6.99,
                   'description': f'A "{i}" ball', 'related': {'also_bought': ['x']},
                   'categories': [['Toys', 'Balls & Co'], ['Toys', 'Red']]}).encode()
             for i in (3, 1, 0, 2, 4)]

    def test_raw_files_become_atomic_files_and_nothing_in_them_runs(self, tmp_path, capsys,
                                                                    monkeypatch):
        evil, folder = tmp_path / 'evil', tmp_path / 'd' / 'amazon-toys-games'
        items = [f'__import__("os").system("touch {evil}")'.encode(),
                 f"{{'asin': 'i0', 'title': open({str(evil)!r}, 'w')}}".encode(), b"{'asin': 'i7'}",
                 b"{'asin': 'i8', 'title': 'never reviewed'}", *self.items, b'[1]', b'\xff',
                 b'(' * 9999, b'-' * 9999 + b'1', b"{'asin': ['i1']}", b"{'title': 0}",
                 b"{'asin': 'i1', 'categories': 3}", b"{'asin': '" + b'x' * 999 + b"'}"]
        reviews = [b'{"reviewerID": "u9", "asin": "i7"}', b'{', b'[' * 99999, *self.reviews,
                   raw_review('u0', 'i9'), raw_review('u1', 'i0', 'good')]
        monkeypatch.setattr(amazon2014, 'MAX_LINE', 10 ** 5)
        for name, lines in (('r.gz', reviews), ('m.gz', items)):
            (tmp_path / name).write_bytes(gzip.compress(b'\n'.join(lines) + b'\n'))
        amazon2014.main([str(tmp_path / 'r.gz'), str(tmp_path / 'm.gz'), str(folder)])
        said = capsys.readouterr().err
        assert 'r.gz: 4 malformed' in said and 'm.gz: 9 malformed' in said and not evil.exists()
        matrix, texts, _, users, ids, _ = data.load('toys', str(tmp_path / 'd'))
        assert matrix.shape == (5, 5) and ids == ['i3', 'i1', 'i0', 'i2', 'i4']
        assert texts[0] == "Ball's \xe9 Toys, Balls & Co, Red" and users[0] == 'u0'
        assert data.load('toys', str(tmp_path / 'd'), text_columns=['description'])[1][0][2] == '"'

    def test_a_damaged_file_is_one_line(self, tmp_path):
        (tmp_path / 'r.gz').write_bytes(gzip.compress(b'{}' * 99)[:-9])
        for name in ('r.gz', 'none.gz'):
            with pytest.raises(SystemExit, match='^amazon2014: .+$'):
                amazon2014.main([str(tmp_path / name), str(tmp_path / 'm.gz'), str(tmp_path / 'd')])
        assert not list((tmp_path / 'd').glob('*.inter'))


def without(target, X, ridge, pull=0, C=None):
    """Regression of each column on the others, one at a time: what EASE and L3AE solve at once."""
    B = np.zeros((X.shape[1],) * 2)
    for j in range(len(B)):
        rest = np.arange(len(B)) != j
        left, right = X[:, rest], X[:, rest].T @ target[:, j]
        right = right if C is None else right + pull * C[rest, j]
        B[rest, j] = np.linalg.solve(left.T @ left + ridge * np.eye(len(B) - 1), right)
    return B


class TestPeers:
    def test_closed_forms_are_regressions_on_the_other_items(self):
        rng = np.random.default_rng(0)
        train, vectors = random_graph(40, 12, .3), rng.normal(size=(12, 5)).astype(np.float32)
        X, F = train.toarray().astype(float), vectors / np.linalg.norm(vectors, axis=1)[:, None]
        for name, count, values in (('ease', 5, (50,)), ('ease', 5, (400,)),
                                    ('l3ae', 32, (100, 3, .99)), ('l3ae', 32, (50, 10, .9))):
            ridge, r, share = (*values, None, None)[:3]
            C = None if r is None else without(F.T, F.T, r)
            expected, seen = without(X, X, ridge, *((share * ridge, C) if r else ())), []

            def score(B):                                  # the search finds what it is to find
                seen.append(-np.abs(B.numpy() - expected).max())
                return seen[-1]
            best, settings, B = peers.closed_form(name, train, vectors, score)
            assert tuple(settings.values()) == values and len(seen) == count
            np.testing.assert_allclose(B, expected, atol=2e-6)

    def test_alpharec_is_its_formula_with_gradients(self):
        rng, train = np.random.default_rng(0), random_graph(9, 12, .3)
        vectors = rng.normal(size=(12, 6)).astype(np.float32)
        model = peers.AlphaRec(train, vectors, K=4)
        F = vectors / np.linalg.norm(vectors, axis=1)[:, None]
        start = torch.from_numpy(np.concatenate([llminit.pool_users(train, F), F]))
        A = torch.from_numpy(models.adjacency(train).toarray())
        z0 = model.mlp(start)
        z = (z0 + A @ z0 + A @ A @ z0) / 3
        z = z / z.norm(dim=1, keepdim=True)
        users, positives = torch.tensor([0, 3]), torch.tensor([1, 5])
        negatives = torch.tensor([[2, 3, 3], [0, 1, 11]])
        each = []
        for u, i, others in zip(users, positives, negatives):
            scores = torch.stack([z[u] @ z[9 + j] for j in (i, *others)]) / .15
            each.append(-scores.log_softmax(0)[0])
        expected, loss = sum(each) / 2, model.loss(users, positives, negatives)
        assert abs(loss - expected).item() < 1e-6
        weights = list(model.mlp.parameters())
        for a, b in zip(torch.autograd.grad(loss, weights), torch.autograd.grad(expected, weights)):
            assert torch.allclose(a, b, atol=1e-6)

    @pytest.mark.parametrize('masked', [True, False])
    def test_scores_of_a_closed_form_are_those_of_evaluate(self, masked):
        train, target = random_graph(30, 20, .3), sp.csr_matrix(np.eye(30, 20, dtype=np.float32))
        B = torch.randn(20, 20, generator=torch.Generator().manual_seed(0))
        seen = train if masked else None
        users = torch.from_numpy(train.toarray())
        _, ndcg = models.evaluate(users, B.T.contiguous(), target, seen)
        assert abs(peers.closed_ndcg(train, B, target, seen) - ndcg.mean()) < 1e-12

    def test_a_grid_of_peers_is_kept_and_tabled_beside_ours(self, own, tmp_path, capsys,
                                                            monkeypatch):
        for name, value in (('epochs', 2), ('batch', 64)):
            monkeypatch.setitem(peers.GRIDS['alpharec'], name, value)
        results, flags = tmp_path / 'r.jsonl', ['--dataset', str(own), '--encoder', 'tfidf',
                                                '--seeds', '2', '--cold', '.2']
        assert grid(own, results, *flags[2:], '--strategy', 'none') == 0
        for _ in range(2):
            assert run.command([*flags, '--results', str(results)], peers.parse, peers.fit) == 0
        rows, _ = run.read_results(results)
        assert [row['settings']['model'] for row in rows] == ['lightgcn'] * 2 + [
            'ease', 'l3ae', 'alpharec'] * 2
        assert rows[2]['chosen']['lambda'] in peers.LAMBDAS
        assert rows[4]['chosen']['lr'] in peers.RATES
        capsys.readouterr()
        report.main(['table', str(results), '--show', 'cost'])
        out = capsys.readouterr().out
        assert all(f'| {name} |' in out for name in ('lightgcn', 'ease', 'l3ae', 'alpharec'))
        assert rows[3]['parameters'] == rows[2]['parameters'] == 60 ** 2
        with pytest.raises(SystemExit):
            peers.parse(['--model', 'svd'])
        report.main(['table', str(results), '--show', 'spectrum'])
        with pytest.raises(SystemExit, match='no K'):
            report.main(['plot', str(tmp_path / 'a.png'), str(results), '--x', 'dim'])
