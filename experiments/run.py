"""Grids of runs of llminit.py, kept in a results file.

    python experiments/run.py --dataset office,beauty --model lightgcn,sgcl --strategy none,var \
        --seeds 3 --results FILE.jsonl

--dataset, --model, --strategy, --encoder, --dim and --cold take several values with commas between,
--seeds so many seeds from --seed on: every combination is a run, seeds outermost, so that a grid
that is cut short holds whole tables. All other flags are those of llminit.py, but for --save.

A finished run is one line of JSON in --results: settings, training, scores, curve, the rank of each
user's test item, versions. What is there is not run again: a killed grid goes on where it was. Two
runs with the same settings and training are one, however their flags were written; what the data
and vector files held is not compared. A run that fails is reported and the others go on. Start two
processes on two files: on one they would do the same work. report.py reads several.

It adds a model to those of llminit.py: --model morec, see morec.py.
"""
import base64
import functools
import hashlib
import itertools
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
os.environ.setdefault('OMP_WAIT_POLICY', 'passive')       # read when torch is imported
import torch  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import embed  # noqa: E402
import llminit  # noqa: E402
import models  # noqa: E402
import morec  # noqa: E402

models.MODELS['morec'] = morec.MoRec
llminit.MODELS.append('morec')

LISTS = 'dataset', 'encoder', 'dim', 'cold', 'model', 'strategy'
SETTINGS = ('dataset', 'min_rating', 'core', 'text_columns', 'columns', 'split', 'strategy',
            'model', 'encoder', 'dim', 'cold', 'whiten', 'popular', 'pool', 'views', 'tau', 'seen',
            'epochs', 'preset', 'seed')
TEXT = *llminit.SELECTIONS, 'joint'                      # strategies that start from text
# flags that only some runs use; the others keep the default, so that runs that are alike are one
USED_BY = {'whiten': ('strategy', ('pca',)), 'popular': ('strategy', ('var',)),
           'encoder': ('strategy', TEXT), 'pool': ('strategy', TEXT),
           'views': ('model', ('sgl',)), 'tau': ('model', ('sgl', 'sgcl'))}
# [ours] lower bounds of the groups that are also scored apart: of users by their training
# interactions, and of users by those of the item that they are tested with
GROUPS = 0, 1, 2, 3, 5, 9, 17, 33, 65, 129


def spectrum(table):
    """How many of its dimensions a table (n, K) uses, by its singular values s -> dict of floats.

    'abundance'        information abundance, sum(s) / max(s) (arXiv 2310.04400)
    'effective rank'   exp of the entropy of s / sum(s) (Roy and Vetterli 2007)
    """
    table = table.cpu().double()
    s = torch.linalg.eigvalsh(table.T @ table).clamp_min(0).sqrt()                      # (K,)
    entropy = torch.special.entr(s / s.sum()).sum()
    return {'abundance': float(s.sum() / s.max()), 'effective rank': float(entropy.exp())}


def pack(ndcg):
    """NDCG@10 of users with one target each, (n,), as text: a byte a user, the target's rank from
    0, 10 for none of the first ten; deflated, base64."""
    ranks = np.where(ndcg > 0, np.rint(2 ** (1 / np.maximum(ndcg, .1))) - 2, 10)
    return base64.b64encode(zlib.compress(ranks.astype(np.uint8).tobytes(), 9)).decode()


def digest(matrix):
    """Hex digest of a csr matrix: which split a run was tested on."""
    parts = (np.asarray(a, np.int64).tobytes() for a in (matrix.indptr, matrix.indices))
    return hashlib.sha256(b''.join(parts)).hexdigest()


def means(scores):
    """{name: mean over users} of Recall@10 and NDCG@10, (n,) each."""
    return dict(zip(('Recall@10', 'NDCG@10'), (float(score.mean()) for score in scores)))


def apart(scores, count):
    """Scores of users (n,) in groups, by count (n,), interactions of each user or of the item that
    the user is tested with -> {lower bound: {'users': how many, and their means()}}."""
    group = np.searchsorted(GROUPS, count, side='right') - 1
    return {str(GROUPS[g]): {'users': int((group == g).sum()),
                             **means([score[group == g] for score in scores])}
            for g in np.unique(group)}


def settings_of(args):
    """{flag: value} of what a run's figures depend on, besides its training."""
    usual = llminit.parse([])
    settings = {name: getattr(args, name, 0.) for name in SETTINGS}
    for name, (where, users) in USED_BY.items():
        if settings[where] not in users and not hasattr(args, 'base'):
            settings[name] = getattr(usual, name)
    # rows from before there were these flags do not have them
    settings = {name: value for name, value in settings.items()
                if name not in ('columns', 'split') or value != getattr(usual, name)}
    for name in ('dataset', 'encoder'):
        if os.path.exists(settings[name]) and settings[name] not in (*data.FOLDERS, 'mpnet'):
            settings[name] = os.path.abspath(settings[name])
    return settings


def identity(settings, training):
    """What two runs that are one run share."""
    return json.dumps([{**settings, 'preset': None}, training], sort_keys=True)


def fit(args, train, valid, vectors, rng, device, log):
    """Start and train a model of models.py -> users (U, K), items (I, K), curve, and what a row
    says of the model besides: a dict."""
    if vectors is None:
        users0, items0 = (llminit.xavier(rng, n, args.dim) for n in train.shape)
    else:
        items0 = (llminit.joint(vectors, train, args.dim) if args.strategy == 'joint' else
                  llminit.select_dims(vectors, args.dim, args.strategy, rng, whiten=args.whiten,
                                      popular=args.popular, degree=train.getnnz(axis=0)))
        users0 = llminit.pool_users(train, items0, args.pool)
    training = dict(args.training)
    if args.model == 'morec':
        K = training.pop('dim')
        training['projection0'] = morec.projection(rng, items0.shape[1], K)
    model, curve = models.train(args.model, train, valid, users0, items0, rng, device=device,
                                log=log, **training)
    users, items = model.embeddings()
    if not curve:                                          # --epochs 0: the start is the best
        seen = train if args.seen == 'mask' else None
        recall, ndcg = means(models.evaluate(users, items, valid, seen)).values()
        curve = [dict(epoch=0, loss=0., recall=recall, ndcg=ndcg, seconds=0., best=True)]
    tables = model.table.detach().split([model.n_users, train.shape[1]])
    tables = (users, items) if args.model == 'morec' else tables         # its table is frozen
    return users, items, curve, {'K': model.K, 'parameters': model.table.numel(), 'spectrum': dict(
        zip(('users', 'items'), map(spectrum, tables)))}


def early_stopping(model, epoch, valid, seen, epochs, patience, log):
    """The loop of models.train for models with steps of their own: calls epoch() -> loss and ranks
    valid by model.embeddings(), until `patience` epochs in a row gave no better NDCG@10. Leaves the
    model as it was at its best epoch -> curve, see models.train."""
    best, best_epoch, kept, curve = -1., 0, model.state_dict(), []
    for number in range(1, epochs + 1):
        start = time.perf_counter()
        loss = epoch()
        if not np.isfinite(loss):
            raise ValueError(f'training diverged in epoch {number}, the loss is {loss}: choose a '
                             'lower learning rate')
        recall = ndcg = np.nan
        if valid.nnz:
            recall, ndcg = means(models.evaluate(*model.embeddings(), valid, seen)).values()
        if not ndcg <= best:                               # also of NaN: without validation
            best, best_epoch = ndcg, number
            kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        curve.append(dict(epoch=number, loss=loss, recall=recall, ndcg=ndcg,
                          seconds=time.perf_counter() - start, best=best_epoch == number))
        log(f'epoch {number:3d}  loss {loss:.4f}  valid NDCG@10 {ndcg:.4f}  best {best:.4f} '
            f'(epoch {best_epoch})')
        if number - best_epoch >= patience:
            break
    model.load_state_dict(kept)
    return curve


def result(args, scores, curve, model, seconds, train, test, device):
    """The row of a finished run in the results file: a dict. model: the last value of fit()."""
    best = [epoch for epoch in curve if epoch['best']][-1]
    user, item = test.nonzero()                            # (n,), the one target of each user
    return {'settings': settings_of(args), 'training': args.training,
            'test': means(scores), 'valid': {'Recall@10': best['recall'], 'NDCG@10': best['ndcg']},
            'best epoch': best['epoch'], 'seconds': seconds, **model,
            'by training interactions, from': apart(scores, train.getnnz(axis=1)[user]),
            'by training interactions of the item, from': apart(scores,
                                                                train.getnnz(axis=0)[item]),
            'ranks': pack(scores[1]), 'test split': digest(test),
            'curve': [[round(epoch[name], 5) for name in ('loss', 'ndcg', 'seconds')]
                      for epoch in curve],
            'versions': {'python': platform.python_version(), 'numpy': np.__version__,
                         'torch': torch.__version__, 'machine': platform.machine(),
                         'device': device}}


def read_results(path):
    """The rows of a results file, [] if there is none, and the number of damaged lines in it."""
    found, damaged = [], 0
    if os.path.exists(path):
        with open(path, encoding='utf8', errors='replace') as file:
            for line in filter(str.strip, file):
                try:
                    row = json.loads(line)
                    identity(row['settings'], row['training'])
                    float(row['seconds'])
                    found.append(row)
                except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                    damaged += 1
    return found, damaged


def append(path, row):
    """Add a line to a results file in one write, after whatever a killed run left there."""
    with open(path, 'a+b') as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        start = b'\n' if file.read(1) not in (b'', b'\n') else b''
        file.write(start + json.dumps(row).encode() + b'\n')


def check_file(path):
    """OSError or ValueError now, not after a run, if path is no place for results."""
    if not os.path.basename(path):
        raise ValueError(f'--results {path!r} names no file')
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()
    if os.path.exists(path):
        with open(path, 'r+b') as file:
            if file.read(1) not in (b'', b'{', b'\n'):
                raise ValueError(f'{path} is no results file: choose another --results')


def parse(argv):
    """The command line -> the arguments of each run, [args] as of llminit.parse, and --results.

    args.flags has the flags of this run alone, args.training the arguments of models.train.
    """
    p = llminit.Parser(prog='run.py', allow_abbrev=False, description=__doc__.split('\n')[0],
                       epilog='Other flags: python llminit.py --help')
    for name in LISTS:
        p.add_argument(f'--{name}', metavar='A,B', help='several values with commas between')
    p.add_argument('--seed', default=0, type=llminit.number(int, 0), help='the first one')
    p.add_argument('--seeds', default=1, type=llminit.number(int, 1, 1000), help='how many')
    p.add_argument('--results', default='results.jsonl', metavar='FILE', help='JSON lines')
    own, rest = p.parse_known_args(argv)
    if int(os.environ.get('WORLD_SIZE') or 1) > 1:
        p.error('several processes are for llminit.py: each would write all rows')
    cells = {}
    for seed, *values in itertools.product(range(own.seed, own.seed + own.seeds), *(
            [value] if value is None or os.path.exists(value) else value.split(',')
            for value in (getattr(own, name) for name in LISTS))):
        given = {name: value for name, value in zip(LISTS, values) if value is not None}
        flags = [f'--{name}={value.strip()}' for name, value in given.items()]
        args = llminit.parse([*flags, *rest, f'--seed={seed}'])
        if args.save:
            p.error('--save is for a single run of llminit.py')
        args.flags = [*flags, *rest, f'--seed={seed}']
        args.training = llminit.train_arguments(args)
        if args.model == 'morec':
            args.training['dim'] = args.dim
            if args.strategy not in ('none', 'noise'):
                args.strategy = 'full'                     # it projects all N dimensions
        cells[identity(settings_of(args), args.training)] = args
    return list(cells.values()), own.results


def once(known, key, compute):
    """compute() and a memory of it: the runs of a grid share data and vectors."""
    if key not in known:
        known[key] = compute()
    return known[key]


def prepare(args, known, rng, device):
    """What data.load gives; train, valid, test; item vectors (I, N) or None. known: for once()."""
    last = args.split == 'last'
    source = str([args.dataset, args.data, args.min_rating, args.core, args.columns, last,
                  args.text_columns])
    loaded = once(known, source, lambda: data.load(
        args.dataset, args.data, min_rating=args.min_rating, core=args.core,
        columns=dict(args.columns), text_columns=args.text_columns, timestamps=last))
    train, valid, test = data.split(loaded[0], rng, last)
    vectors = None if args.strategy == 'none' else once(
        known, (source, args.encoder), lambda: embed.encode(
            loaded[1], args.encoder, ids=loaded[4], cache=args.cache, device=device))
    return loaded, (data.thin(train, args.cold, rng), valid, test), vectors


def run(args, known, log, fit=fit):
    """One run from data to result, the stages of llminit.main() -> its row in the table and its row
    in the results file. known: a dict, for once()."""
    started, rng = time.time(), np.random.default_rng(args.seed)
    device = models.join(args.device)[1]
    _, (train, valid, test), vectors = prepare(args, known, rng, device)
    users, items, curve, model = fit(args, train, valid, vectors, rng, device, log)
    scores = models.evaluate(users, items, test, train + valid if args.seen == 'mask' else None)
    seconds = time.time() - started
    return (llminit.result_row(args, model['K'], scores, curve, seconds, args.flags),
            result(args, scores, curve, model, seconds, train, test, device))


def called(args):
    """A run in a few words."""
    return (f'{args.dataset} {args.model} {args.strategy} {args.encoder} K={args.dim} '
            f'cold={args.cold:g} seed {args.seed}')


def time_left(cells, rows):
    """'about 12 min left' for cells, by the seconds of rows with the same data and model."""
    same = {}
    for row in rows:
        if 0 <= row['seconds'] < 1e6:                      # others are damage
            for key in ((row['settings'].get('dataset'), row['settings'].get('model')), None):
                same.setdefault(key, []).append(float(row['seconds']))
    if not same:
        return 'time left unknown'
    left = sum(np.mean(same.get((cell.dataset, cell.model), same[None])) for cell in cells)
    return f'about {left:.0f} s left' if left < 120 else f'about {left / 60:.0f} min left'


def live(where, line):
    """Show what models.train says of an epoch on the last line of a terminal."""
    epoch = re.match(r'epoch +(\d+) .*best (\S+) \(epoch (\d+)\)', line)
    if epoch and sys.stderr.isatty():
        text = '{}: epoch {}, best {} at {}'.format(where, *epoch.groups())
        print(f'\r{text[:shutil.get_terminal_size().columns - 1]}\x1b[K', end='', file=sys.stderr)


def grid(cells, path, run):
    """Run what the results file does not hold yet -> exit code: 2 if a run failed."""
    check_file(path)
    known, failed, head, clear = {}, 0, True, '\r\x1b[K' * sys.stderr.isatty()
    if damaged := read_results(path)[1]:
        print(f'note: {path}: {damaged} damaged lines are left out', file=sys.stderr)
    for n, args in enumerate(cells):
        rows, _ = read_results(path)
        done = {identity(row['settings'], row['training']) for row in rows}
        left = [cell for cell in cells[n:]
                if identity(settings_of(cell), cell.training) not in done]
        if args not in left:
            continue
        where = f'{n + 1} of {len(cells)}, {time_left(left, rows)}, {called(args)}'
        if not sys.stderr.isatty():
            print(f'run {where}', file=sys.stderr)
        try:
            told, row = run(args, known, lambda line: live(where, line))
        except (ValueError, OSError, MemoryError) as error:
            failed += 1
            print(f'{clear}run.py: error: {" ".join(str(error).split())} ({called(args)})',
                  file=sys.stderr)
            continue
        append(path, row)
        print(clear * sys.stdout.isatty() + llminit.lines_of(told, head), flush=True)
        head = False
    print(f'{clear}{len(cells) - failed} of {len(cells)} runs are in {path} (found by their '
          'settings; what data and vector files held is not compared)', file=sys.stderr)
    return 2 if failed else 0


def command(argv=None, parse=parse, fit=fit, run=run):
    """The command line -> exit code. llmrank.py and llmrec.py have a run() of their own."""
    try:
        return grid(*parse(argv), functools.partial(run, fit=fit))
    except (ValueError, OSError) as error:
        print(f'run.py: error: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('run.py: stopped; the same command goes on', file=sys.stderr)
        return 130


if __name__ == '__main__':
    sys.exit(command())
