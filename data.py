"""Interactions and item texts: download, read, filter, split.

    interactions, texts, titles, users, items, low = load('beauty')    # or 'ml-100k', or a folder
    train, valid, test = split(interactions, np.random.default_rng(0))

The data of LLMInit (arXiv 2503.01814, section 4.1): keep ratings >= 4, drop interactions of items
without metadata, count a repeated pair once, then 5-core; leave one out per user, at random.
beauty, toys, tools and office are Amazon sets of 2014, zips of RecBole's atomic files; ml-100k is
MovieLens-100k, from the recbole wheel. What is missing is downloaded. A folder of your own has two
files, or the first alone; rating and timestamp may be left out:

    user_id,item_id,rating,timestamp        item_id,title
    ann,tea,5,1389312000                    tea,"Green tea, 100 bags"
    ann,saw,2,1389398400                    saw,Saw for wood

Files are UTF-8, named .csv, .tsv, .inter or .item, plain or .gz. The delimiter is the most frequent
tab, comma or semicolon of the header. Quotes are those of CSV, but letters in atomic files (with
user_id:token). Ids are strings; blanks around a cell and empty lines do not count. Any other row
that is not as it should be is an error with its line: none is dropped, and no cell is converted.

U users, I items, E rows. Needs numpy, scipy, requests, and pip for ml-100k. MIT licence, from
LLMInit's reference implementation.
"""
import contextlib
import csv
import functools
import gzip
import hashlib
import itertools
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import requests
import scipy.sparse as sp
from requests.adapters import HTTPAdapter, Retry

URL = 'https://recbole.s3-accelerate.amazonaws.com/ProcessedDatasets/Amazon_ratings/'
ZIPS = {'beauty': 'Amazon_Beauty.zip', 'toys': 'Amazon_Toys_and_Games.zip',     # [authors' code]
        'tools': 'Amazon_Tools_and_Home_Improvement.zip', 'office': 'Amazon_Office_Products.zip'}
WHEEL = 'recbole==1.2.1'               # has ml-100k [ours: real data for who reaches only PyPI]
WHEEL_SHA256 = '9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407'
FOLDERS = {'beauty': 'amazon-beauty', 'toys': 'amazon-toys-games',    # [ours: RecBole's names]
           'tools': 'amazon-tools-home-improvement', 'office': 'amazon-office-products',
           'ml-100k': 'ml-100k'}
SIZES = {'beauty': (10553, 6086, 94148), 'toys': (11268, 7309, 95420),
         'tools': (9245, 6198, 73250), 'office': (3260, 1583, 36544),  # [paper], less the padding
         'ml-100k': (938, 1008, 54413)}                                # row; [ours: measured]
TEXTS = {**dict.fromkeys(ZIPS, ('title', 'brand', 'categories')),      # the columns that make the
         'ml-100k': ('movie_title', 'release_year', 'class')}          # text [authors' code; ours]
MAX_BYTES = 2 << 30                    # of a zip and of a file in it [ours: 20 times such a set]
MISSING = {'', '#N/A N/A', '\\N', *'#N/A #NA -1.#IND -1.#QNAN -NaN -nan 1.#IND 1.#QNAN <NA> N/A NA '
           'NULL NaN None n/a nan null'.split()}      # what pandas takes as missing; databases' \N


# ---- reading files -----------------------------------------------------------------------------

def shown(*values, most=300):
    """Values from outside, commas between them, on one line that a terminal shows."""
    text = ', '.join(map(str, values)) if values else 'nothing'
    text = text if text.isprintable() else repr(text)[1:-1]
    return text[:most] + '...' * (len(text) > most)


def header(cells, atomic, columns):
    """{name: place} of the columns that a first line names; the renamed have both names."""
    names = [cell.strip() for cell in cells]
    if atomic:                                             # user_id:token -> user_id
        names = [name.partition(':')[0] for name in names]
    place = {name: n for n, name in enumerate(names)}

    for n, name in enumerate(names):
        if not name or place[name] != n:
            raise ValueError('the first line must be a header that names each column, each once; '
                             f"found '{shown(name)}' in {shown(*names)} (with pandas: index=False)")
    for ours, theirs in columns.items():
        if theirs in place and place.setdefault(ours, place[theirs]) != place[theirs]:
            raise ValueError(f'columns says {ours}={shown(theirs)}, but a column {ours} is there '
                             'too; delete or rename one of the two')
    return place


@contextlib.contextmanager
def open_table(path, columns):
    """with open_table(path, columns) as (place, rows): the header() and the rows, lists of cells.

    A ValueError in the block, or what cannot be read, becomes one that names file, line and row.
    """
    opener = gzip.open if path.name.lower().endswith('.gz') else open
    line = 1                                               # where the row at hand begins
    row = []

    def rows():
        nonlocal line, row
        line = reader.line_num + 1
        for row in reader:
            if row and (row == names or row[0].startswith('\ufeff')):
                raise ValueError('a second header, as of joined files; delete this line')
            if row and len(row) != len(names):
                raise ValueError(f'{len(row)} cells, but {len(names)} in the header; quote cells '
                                 'that hold the delimiter, double quotes inside quotes, and leave '
                                 "out R's row names")
            if row:
                yield row
            line = reader.line_num + 1

    try:
        with opener(path, 'rt', encoding='utf-8-sig', newline='') as file:
            first = file.readline()
            atomic = ':token' in first                     # RecBole's: a quote is a letter there
            reader = csv.reader(itertools.chain([first], file), strict=True,
                                delimiter=max('\t,;', key=first.count), skipinitialspace=not atomic,
                                quoting=csv.QUOTE_NONE if atomic else csv.QUOTE_MINIMAL)
            names = next(reader, [])
            yield header(names, atomic, columns), rows()
            return

    # what is wrong in the file or in the block: why, and below where
    except UnicodeDecodeError as error:
        line += error.object[:error.start].count(b'\n')
        why = (f'not UTF-8 at {error.object[error.start:][:8]}; save it as UTF-8, or mend single '
               "letters with pandas.read_csv(PATH, encoding_errors='replace')")
    except csv.Error as error:
        why = f'{error}; close each quote, and double the quotes inside quotes'
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        why = f'{error}; fetch it again'
    except ValueError as error:
        why = f'{error}. The row: {shown(*row, most=120)}' if row else error
    raise ValueError(f'{shown(path)}, line {line}: {why}') from None


def to_id(cell):
    """The id in a cell, without blanks around it. ValueError if there is none."""
    cell = cell.strip()
    if cell in MISSING:
        raise ValueError(f"an id is missing, here '{cell}'; drop such rows (pandas: dropna)")
    if min(cell) < ' ':
        raise ValueError('an id holds a line end or a control character; is a quote not closed?')
    if re.fullmatch(r'\d([.,]\d+)?[Ee]\+\d+', cell):
        raise ValueError(f'the id {cell} is a number that a spreadsheet has rounded, and different '
                         'ids may have become one; export the column as text')
    return cell


def to_number(cell, name):
    """The finite number in a cell of the column `name`. ValueError if there is none."""
    with contextlib.suppress(ValueError):
        number = float(cell.replace('_', '?'))             # Python reads 1_000
        if math.isfinite(number):
            return number
    raise ValueError(f"the {name} '{shown(cell, most=40)}' is no number such as 4.5 or 1389312000; "
                     'convert it or drop the row')


def read_interactions(path, columns, timestamps):
    """The rows (E,) of an interaction file: user, item, rating (infinite without such a column) and
    time; the ids of users; those of items. Both are numbered by first appearance."""
    users = {}                                             # {id: number}
    items = {}
    ids = functools.cache(to_id)                           # most come often
    fields = [('user', 'i4'), ('item', 'i4'), ('rating', 'f8'), ('time', 'f8')]

    with open_table(path, columns) as (place, rows):
        needed = ['user_id', 'item_id'] + ['timestamp'] * timestamps
        if lacking := [name for name in needed if name not in place]:
            raise ValueError(f'no column {shown(*lacking)} among {shown(*place)}')

        user, item, rating, at = map(place.get, ('user_id', 'item_id', 'rating', 'timestamp'))
        table = np.fromiter((
            (users.setdefault(ids(row[user]), len(users)),
             items.setdefault(ids(row[item]), len(items)),
             math.inf if rating is None else to_number(row[rating], 'rating'),
             0 if at is None else to_number(row[at], 'timestamp')) for row in rows), fields)
        if not len(table):
            raise ValueError('no rows below the header')
    return table, list(users), list(items)


def read_items(path, columns, text_columns, usual):
    """The ids, texts and titles of an item file, in its order, and the columns that make the text:
    `usual` if text_columns is None. The first of `usual` is the title."""
    def joined(row, names):
        cells = [row[place[name]].strip() for name in names]
        return ' '.join(' '.join(cell for cell in cells if cell not in MISSING).split())

    items = {}                                             # {id: (text, title)}
    with open_table(path, columns) as (place, rows):
        taken = usual if text_columns is None else text_columns
        if text_columns is None and {*place.values()} == {place.get('item_id')}:    # ids alone
            taken = ()
        if lacking := [name for name in ('item_id', *taken) if name not in place]:
            raise ValueError(f'no column {shown(*lacking)} among {shown(*place)}; name those that '
                             'make the text with text_columns, or --text-columns A,B')

        title = usual[:1] if usual[0] in place else taken[:1]
        for row in rows:
            found = joined(row, taken), joined(row, title)
            if items.setdefault(to_id(row[place['item_id']]), found) != found:
                raise ValueError('this item_id was there before, with another text; keep one')

    texts = [text for text, _ in items.values()]
    titles = [title for _, title in items.values()]
    return list(items), texts, titles, taken


def own_files(folder, columns):
    """The interaction file, and the item file or None, of a folder, found by their columns."""
    if not folder.is_dir():
        raise ValueError(f'{shown(folder)}: neither a folder nor one of {shown(*FOLDERS)}')
    files = sorted(path for path in folder.iterdir() if path.name[0] != '.')
    tables = [path for path in files if path.is_file()
              and re.search(r'\.(csv|tsv|inter|item)(\.gz)?$', path.name, re.I)]
    others = [path.name for path in files if path not in tables
              and path.suffix != '.npz']                   # vectors beside the data
    headers = {}                                           # {path: {name: place}}
    for path in tables:
        with open_table(path, columns) as (place, _):
            headers[path] = place

    pairs = [path for path, names in headers.items() if {'user_id', 'item_id'} <= {*names}]
    items = [path for path, names in headers.items() if 'item_id' in names and path not in pairs]
    if len(pairs) != 1 or len(items) > 1 or len(pairs + items) < len(headers):
        found = [f'{shown(path.name)} with {shown(*names)}' for path, names in headers.items()]
        raise ValueError(
            f'{shown(folder)}: expected one file with the columns user_id and item_id, and at most '
            'one other, with item_id, as .csv, .tsv, .inter or .item, plain or .gz; found '
            f'{"; ".join(found)[:1500] or "none"}; not read: {shown(*others)}. The first line must '
            'be a header, with tabs, commas or semicolons; --columns user_id=visitorid renames. Of '
            'several keep one, or join them: the split is drawn here. Move other files away')

    known = {name for names in headers.values() for name in names}
    if idle := [f'{ours}={theirs}' for ours, theirs in columns.items() if theirs not in known]:
        raise ValueError(f'{shown(folder)}: columns says {shown(*idle)}, but there are '
                         f'{shown(*sorted(known))}')
    if others:
        print(f'note: {shown(folder)}: not read: {shown(*others)}', file=sys.stderr)
    return pairs[0], items[0] if items else None


def read_files(inter, item, usual, columns, text_columns, timestamps):
    """Rows (E,) of read_interactions(), by time if asked, with items numbered by the item file, -1
    if it lacks them; user ids; item ids, texts and titles; the columns that make the text."""
    rows, user_ids, rated = read_interactions(inter, columns, timestamps)
    if timestamps:
        rows = rows[np.argsort(rows['time'], kind='stable')]
    if item is None and text_columns:
        raise ValueError(f'{shown(inter)} has no item file beside it to take '
                         f'{shown(*text_columns)} from')
    if item is None:
        empty = [''] * len(rated)
        return rows, user_ids, rated, empty, empty, ()

    ids, texts, titles, taken = read_items(item, columns, text_columns, usual)
    place = {name: n for n, name in enumerate(ids)}
    rows['item'] = np.array([place.get(name, -1) for name in rated])[rows['item']]
    if (rows['item'] < 0).all():
        raise ValueError(f'{shown(inter)}: none of its items is in {shown(item)}; the ids here are '
                         f'such as {shown(*rated[:3])}, there {shown(*ids[:3])}')
    return rows, user_ids, ids, texts, titles, taken


# ---- known sets --------------------------------------------------------------------------------

def write_blocks(session, url, part, most):
    """Write the body of url to part, live on a terminal -> its SHA-256. OSError beyond `most`."""
    answer = session.get(url, stream=True, timeout=(10, 60),
                         headers={'Accept-Encoding': 'identity'})
    answer.raise_for_status()
    digest = hashlib.sha256()
    with open(part, 'wb') as file:
        for block in answer.iter_content(1 << 16):
            if file.tell() + len(block) > most:            # an endless body must not fill the disk
                raise OSError(f'more than {most:,} bytes')
            file.write(block)
            digest.update(block)
            if sys.stderr.isatty():
                print(f'{file.tell() >> 20:5} MB of {url}', end='\r', file=sys.stderr)
    return digest.hexdigest()


def download(url, path, sha256=None, most=2 << 30):
    """Fetch url to path: streamed under a temporary name, checked if sha256 is given, then renamed.

    A busy server is asked up to three times, and a body that breaks off once more from its start.
    OSError in one line, and no file, if it does not come whole or has over `most` bytes.
    """
    part = Path(f'{path}.{os.urandom(4).hex()}.part')
    busy = Retry(2, connect=0, backoff_factor=1, status_forcelist=(429, 500, 502, 503, 504))
    busy.retry_after_max = 60                              # seconds; older urllib3 obey the server

    try:
        with requests.Session() as session:
            session.adapters = {'http': HTTPAdapter(max_retries=busy)}            # and https
            try:
                found = write_blocks(session, url, part, most)
            except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError):
                found = write_blocks(session, url, part, most)
        if sha256 not in (None, found):
            raise OSError(f'SHA-256 is {found}, expected {sha256}')
        part.replace(path)
    except (OSError, ValueError) as error:                 # requests' errors are OSErrors
        reason = str(error).rpartition('Caused by ')[2]    # the end of urllib3's long sentence
        reason = ' '.join(reason.split()).encode('unicode_escape').decode()
        raise OSError(f'{url}: {reason}') from None
    finally:
        part.unlink(missing_ok=True)


def sweep(folder, names):
    """Remove what a killed run left under temporary names, such as .part-*, after a day."""
    for path in folder.glob(names):
        with contextlib.suppress(OSError):                 # another process may sweep too
            if path.stat().st_mtime < time.time() - 86_400:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def fetch(dataset, scratch):
    """Download the zip of a dataset, or the wheel that has it, into a scratch folder: its path."""
    if dataset in ZIPS:
        archive = Path(scratch, ZIPS[dataset])
        download(URL + ZIPS[dataset], archive, most=MAX_BYTES)
        return archive

    ran = subprocess.run([sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--dest',
                          scratch, '--disable-pip-version-check', '--only-binary=:all:', WHEEL],
                         env={**os.environ, 'TMPDIR': scratch},        # what a killed pip leaves
                         capture_output=True, text=True, errors='replace')
    if ran.returncode:
        raise OSError(f'pip download {WHEEL}: {ran.stderr.strip().rpartition(chr(10))[2]}')
    archive = next(Path(scratch).glob('*.whl'))
    if (found := hashlib.sha256(archive.read_bytes()).hexdigest()) != WHEEL_SHA256:
        raise OSError(f'{archive.name}: SHA-256 is {found}, expected {WHEEL_SHA256}')
    return archive


def unpack(archive, path):
    """Copy the one member of a zip that has path's suffix to path, wherever its own path leads."""
    with zipfile.ZipFile(archive) as box:
        found = [member for member in box.infolist() if member.filename.endswith(path.suffix)
                 and not Path(member.filename).name.startswith('.')]                 # macOS's
        # zipfile unpacks only methods 0 and 8 in bounded pieces, and never more than file_size
        if (len(found) != 1 or found[0].file_size > MAX_BYTES
                or found[0].compress_type not in (0, 8)):
            raise ValueError(f'{archive.name}: expected one *{path.suffix} of at most '
                             f'{MAX_BYTES:,} bytes, found {found}')
        with box.open(found[0]) as source, open(path, 'wb') as file:
            shutil.copyfileobj(source, file)               # zipfile checks the CRC


def dataset_files(dataset, folder):
    """Paths of a dataset's .inter and .item file, fetched if missing; what is there stays."""
    if os.path.isdir(dataset):
        print(f'note: {dataset} is the known set; the folder is ./{dataset}', file=sys.stderr)
    sweep(folder, '.part-*')
    name = FOLDERS[dataset]
    home = folder / name
    paths = [home / f'{name}.inter', home / f'{name}.item']
    missing = [path for path in paths if not path.is_file()]
    if not missing:
        return paths

    # all are unpacked before the first is moved to its place
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix='.part-', dir=folder) as scratch:
            archive = fetch(dataset, scratch)
            for path in missing:
                unpack(archive, Path(scratch, path.name))
            home.mkdir(exist_ok=True)
            for path in missing:
                Path(scratch, path.name).replace(path)
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raw = ' (experiments/amazon2014.py makes them from the raw files)' * (dataset in ZIPS)
        raise OSError(f'{dataset}: {shown(error, most=1000)}; place {name}.inter and {name}.item '
                      f'in {shown(home)} by hand{raw}') from None
    return paths


# ---- filters -----------------------------------------------------------------------------------

def to_csr(users, items, shape, ordered=False):
    """csr of the distinct pairs (E,): ones; or, if ordered, the number of a pair's last row."""
    pair = users * np.int64(shape[1]) + items
    pairs, back = np.unique(pair[::-1], return_index=True)
    values = float(len(pair)) - back if ordered else np.ones(len(pairs), np.float32)
    return sp.csr_matrix((values, np.divmod(pairs, shape[1])), shape)


def pairs_of(matrix):
    """A sparse or dense matrix (U, I) as csr with sorted rows. ValueError if a pair is stored twice
    or as zero, as it may or may not be an interaction then."""
    pairs = sp.csr_matrix(matrix).sorted_indices()
    if not (pairs.has_canonical_format and pairs.data.all()):
        raise ValueError('interactions: a pair is stored twice, or as zero; sum_duplicates() and '
                         'eliminate_zeros() of scipy.sparse mend that')
    return pairs


def k_core(interactions, core):
    """Drop users and items with fewer than `core` interactions, or none, until nothing goes:
    (U, I) -> the users and the items that stay, and the csr of these.

    User 2 has one interaction; without it item 2 has one too:
    >>> k_core(sp.csr_matrix([[1, 1, 0], [1, 1, 1], [0, 0, 1]]), 2)[:2]
    (array([0, 1]), array([0, 1]))
    """
    pairs = pairs_of(interactions)
    users, items = map(np.arange, pairs.shape)
    while True:
        u = pairs.getnnz(axis=1) >= max(core, 1)           # (U,)
        i = pairs.getnnz(axis=0) >= max(core, 1)           # (I,)
        if u.all() and i.all():
            return users, items, pairs
        users = users[u]
        items = items[i]
        pairs = pairs[u][:, i]


def count_ties(interactions, times):
    """How many users' test or validation item, by time, only the file's order decides.

    interactions: csr (U, I) whose values number the rows in time, from 1; times (E,) of the rows.
    """
    tied = 0
    for row in np.split(interactions.data, interactions.indptr[1:-1]):
        newest = times[np.sort(row)[-3:].astype(int) - 1]
        tied += not np.diff(newest).all()
    return tied


# ---- load, split, thin -------------------------------------------------------------------------

def load(dataset, folder='data', *, min_rating=4., core=5, columns=None, text_columns=None,
         timestamps=False):
    """Read a dataset, downloaded if missing, and filter it. ValueError or OSError in one line.

    dataset       beauty, toys, tools, office, ml-100k (in or into folder), or a folder of your own
    min_rating    lower ratings are no positives [paper: 4]; without a column rating all rows are
    core          users and items with fewer interactions are dropped [paper: 5]; 0 or 1: no filter
    columns       {'user_id': 'visitorid'}: what user_id, item_id, rating, timestamp or title is
                  called in your files
    text_columns  names of the columns that make the text. None: title (of the Amazon sets also
                  brand and categories, of ml-100k title, year and genres)
    timestamps    number the interactions by the column timestamp, for split(last=True)

    Returns interactions (csr U x I, float32 ones; with timestamps their order in time, from 1: of
    equal times the file's order decides, and of a repeated pair the last row), texts [I], titles
    [I], ids of users [U] and items [I], and low (csr U x I): what these users rated lower, which
    should not be recommended to them. Users are numbered by first appearance, items by the item
    file. What is not returned is counted on stderr.
    """
    # the files, and what they hold
    own = dataset not in FOLDERS
    columns = columns or {}
    known = ('user_id', 'item_id', 'rating', 'timestamp', 'title') if own else ()
    if not {*columns} <= {*known}:
        raise ValueError(f'{shown(dataset)}: columns may rename {shown(*known)} here, found '
                         f'{shown(*columns)}')
    if own:
        inter, item = own_files(Path(os.path.expanduser(dataset)), columns)
    else:
        inter, item = dataset_files(dataset, Path(os.path.expanduser(folder)))
    rows, user_ids, ids, texts, titles, taken = read_files(
        inter, item, TEXTS.get(dataset, ('title',)), columns, text_columns, timestamps)

    # positives, their core, and what the users of the core rated lower
    shape = len(user_ids), len(ids)
    there = rows['item'] >= 0                                                   # (E,)
    high = rows['rating'] >= min_rating                                         # (E,)
    positive = rows[there & high]
    lower = rows[there & ~high]
    pairs = to_csr(positive['user'], positive['item'], shape, ordered=timestamps)
    kept_users, kept_items, interactions = k_core(pairs, core)                  # U x I
    low = to_csr(lower['user'], lower['item'], shape)[kept_users][:, kept_items]
    user_ids = [user_ids[n] for n in kept_users]
    ids, texts, titles = ([column[n] for n in kept_items] for column in (ids, texts, titles))

    # where each row went
    told = (f'{len(rows):,} rows: {interactions.nnz:,} interactions stay, {(~high).sum():,} rated '
            f'below {min_rating:g}, {len(positive) - pairs.nnz:,} repeated, '
            f'{(high & ~there).sum():,} of items that the item file lacks, '
            f'{pairs.nnz - interactions.nnz:,} outside the {core}-core')
    if not interactions.nnz:
        raise ValueError(f'{shown(inter)}: {told}; lower min_rating or core')
    if own:
        if np.isinf(rows['rating']).all():
            told += '; no column rating (columns can name one): every row is a positive'
        print(f'note: {shown(dataset)}: {told}; texts from {shown(*taken)}, {texts.count("")} '
              f'items without text; {shape[1] - len(ids):,} of {shape[1]:,} items have no '
              'interactions left: not ranked, not recommended', file=sys.stderr)
    if timestamps and (ties := count_ties(interactions, positive['time'])):
        print(f'note: {shown(dataset)}: of {len(user_ids):,} users {ties:,} have equal times among '
              'their newest interactions: there the order of the file decides', file=sys.stderr)

    found = *interactions.shape, interactions.nnz
    if (min_rating, core) == (4, 5) and found != SIZES.get(dataset, found):
        raise ValueError(f'{dataset}: {found} users, items and interactions after filtering, '
                         f'expected {SIZES[dataset]}; delete {shown(inter)} and {shown(item)}, so '
                         'that they are fetched anew')
    return interactions, texts, titles, user_ids, ids, low


def split(interactions, rng, last=False):
    """Leave-one-out: csr (U, I), each pair once -> train, valid, test, each csr (U, I) of ones.

    Of a user's interactions one drawn with rng tests and another validates [paper]; with `last` the
    newest tests and the one before validates, by the values that load() gives with timestamps. A
    user with two has no validation item, with one only trains. ValueError if no user has two.
    """
    pairs = pairs_of(interactions)
    start = pairs.indptr[:-1]                                                   # (U,)
    count = np.diff(pairs.indptr)                                               # (U,)
    users = np.repeat(np.arange(len(count)), count)                             # (E,)
    if not (count >= 2).any():
        raise ValueError('no user has two interactions, so there is nothing to test with')

    # which of its user's interactions, from 0, tests and which validates; (U,) each
    if last:
        if (pairs.data == 1).all():
            raise ValueError('the interactions have no order in time: load(timestamps=True)')
        order = np.lexsort((pairs.data, users))            # each user's, oldest first
        test = count - 1
        valid = count - 2
    else:
        rng = np.random.default_rng(rng)                   # a generator stays itself
        order = np.arange(pairs.nnz)
        test = rng.integers(0, np.maximum(count, 1))
        valid = rng.integers(0, np.maximum(count - 1, 1))
        valid += valid >= test                             # uniform over the others

    part = np.ones(pairs.nnz, np.int8)                     # train
    part[order[(start + valid)[count >= 3]]] = 2
    part[order[(start + test)[count >= 2]]] = 3
    return [to_csr(users[part == n], pairs.indices[part == n], pairs.shape) for n in (1, 2, 3)]


def thin(train, share, rng):
    """train (csr U x I) without `share` (0 to 1) of each user's interactions, drawn at random: the
    cold start of the paper's section 4.4 and Figure 3, where it is half.

    A number that is not whole is rounded up or down by a draw, so that all users together lose
    `share`; each keeps at least one. share 0 draws nothing.
    """
    pairs = pairs_of(train)
    if not 0 <= share <= 1:
        raise ValueError(f'share: expected a number from 0 to 1, found {shown(share)}')
    if not share:
        return pairs

    rng = np.random.default_rng(rng)
    count = np.diff(pairs.indptr)                                               # (U,)
    going = (share * count + rng.random(len(count))).astype(int)
    going = np.minimum(going, count - 1)                                        # (U,)

    # each user's interactions in random order; the first `going` of them go
    users = np.repeat(np.arange(len(count)), count)                             # (E,)
    order = np.lexsort((rng.random(pairs.nnz), users))
    place = np.arange(pairs.nnz) - pairs.indptr[users]                          # (E,), from 0
    stays = order[place >= going[users]]
    return to_csr(users[stays], pairs.indices[stays], pairs.shape)
