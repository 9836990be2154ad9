"""Interactions and item texts: download, read, filter, split.

    interactions, texts, titles, users, items, low = load('beauty')  # or 'ml-100k', or a folder
    train, valid, test = split(interactions, np.random.default_rng(0))

The data of LLMInit (arXiv 2503.01814): keep ratings >= 4, drop interactions of items without
metadata, count a repeated pair once, then 5-core; leave one out per user, in random order.

beauty, toys, tools and office are Amazon sets of 2014, zips of RecBole atomic files; ml-100k is
MovieLens-100k, from the recbole wheel. <folder>/amazon-beauty/amazon-beauty.inter and .item are
fetched only if missing. A folder of your own has one file with the columns user_id and item_id
(rating, timestamp), and one with item_id and texts: CSV, TSV or atomic files, UTF-8, plain or gz,
with a header, which decides the delimiter (tab , ; or |).

    user_id, userId and 'User ID' are one name; `columns` names others. Ids are strings
    missing is what pandas.read_csv takes as missing, and \\N; a missing timestamp is the oldest
    a row without an id, with too few or many cells, or with a rating that is no number goes
    a row without a rating is a positive, like every row of a file without ratings
    ratings that are all 0 or 1, or False or True, are labels: 1 is a positive
    a comma in a rating is a decimal comma; a pair that was rated high and low is a positive
    quotes hold delimiters and line ends, but in an atomic file a quote is a letter
    text: the columns of the item file in order, except ids, the type float, columns that are mostly
    addresses and columns without a type that are mostly numbers
    the title is the column title, or name, or one that ends so, or the first text
    users are numbered by first appearance, items by the item file; of repeated items the first
    counts. Without an item file the texts are empty; a single file with a title is both
What is dropped of such a folder is counted on stderr. HTML stays; ratings are not weights.
U users, I items, E rows. Needs numpy, scipy, requests, and pip for ml-100k. MIT licence, from
LLMInit's reference implementation.
"""
import csv
import gzip
import hashlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections import defaultdict
from datetime import UTC, datetime
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
MAX_UNPACKED = 2 << 30                 # bytes [ours: 20 times a set of 2 million rows]
NAMES = {name.replace('_', ''): name for name in     # by plain(): what columns are called here
         ('user_id', 'item_id', 'rating', 'label', 'timestamp', 'title')}
MISSING = {'', '#N/A', '#N/A N/A', '#NA', '-1.#IND', '-1.#QNAN', '-NaN', '-nan', '1.#IND',
           '1.#QNAN', '<NA>', 'N/A', 'NA', 'NULL', 'NaN', 'None', 'n/a', 'nan', 'null', '\\N'}


def note(text, kind='note'):
    """One line on stderr, where it does not mix with results."""
    print(f'{kind}: {text}', file=sys.stderr)


def some(names, most=8):
    """'a, b, c and 4 more', for messages: on one line, whatever the names are."""
    shown = [(name if name.isprintable() else ascii(name)[1:-1])[:100] for name in map(str, names)]
    more = f' and {len(shown) - most} more' if len(shown) > most else ''
    return (', '.join(shown[:most]) if shown else 'nothing') + more


def counted(lost, mark=','):
    """', 3 repeated, 2 without an id' of {why: how many}."""
    return ''.join(f'{mark} {n:,} {why}' for why, n in lost.items() if n)


def download(url, path, sha256=None, size=None):
    """Fetch url to path: streamed to a temporary name, checked, renamed. OSError and no file else.
    A body that breaks off is continued with Range, four times at most."""
    part = Path(f'{path}.{os.urandom(4).hex()}.part')
    again = Retry(4, backoff_factor=.5, status_forcelist=(408, 429, 500, 502, 503, 504))
    again.retry_after_max = 60                             # seconds; older urllib3 obey the server
    try:
        with requests.Session() as session, open(part, 'w+b') as file:
            session.adapters = {'http': HTTPAdapter(max_retries=again)}       # and https
            for left in (4, 3, 2, 1, 0):
                at = file.tell()
                headers = {'Accept-Encoding': 'identity', 'Range': f'bytes={at}-' if at else None}
                answer = session.get(url, stream=True, timeout=(10, 60), headers=headers)
                answer.raise_for_status()
                if not answer.headers.get('Content-Range', '').startswith(f'bytes {at}-'):
                    file.truncate(file.seek(0))            # the server sends all of it again
                try:
                    for block in answer.iter_content(1 << 16):
                        file.write(block)
                        if sys.stderr.isatty():
                            print(f'{file.tell() >> 20:5} MB of {url}', end='\r', file=sys.stderr)
                        if size and file.tell() > size:    # an endless body must not fill the disk
                            break
                    break
                except requests.RequestException:
                    if not left:
                        raise
            file.seek(0)
            found, came = hashlib.file_digest(file, 'sha256').hexdigest(), file.tell()
        if size not in (None, came) or sha256 not in (None, found):
            raise OSError(f'{came} bytes with SHA-256 {found}; expected {size} with {sha256}')
        part.replace(path)
    except (OSError, ValueError) as error:                 # requests' errors are OSErrors
        raise OSError(f'{url}: {" ".join(str(error).split())}') from None
    finally:
        part.unlink(missing_ok=True)


def fetch(dataset, scratch):
    """Download the zip of a dataset, or the wheel that has it, into a scratch folder: its path."""
    if dataset in ZIPS:
        archive = Path(scratch, ZIPS[dataset])
        download(URL + ZIPS[dataset], archive)
        return archive
    ran = subprocess.run([sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--dest',
                          scratch, '--disable-pip-version-check', '--only-binary=:all:', WHEEL],
                         capture_output=True, text=True, errors='replace')
    if ran.returncode:
        raise OSError(f'pip download {WHEEL}: {ran.stderr.strip().rpartition(chr(10))[2]}')
    archive = next(Path(scratch).iterdir())
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        raise OSError(f'{archive.name}: SHA-256 is {found}, expected {WHEEL_SHA256}')
    return archive


def unpack(archive, path):
    """Copy the one member of a zip that has path's suffix to path, wherever its own path leads."""
    try:
        with zipfile.ZipFile(archive) as box:
            found = [(m.filename, m.file_size, m.compress_type) for m in box.infolist()
                     if m.filename.endswith(path.suffix)
                     and not os.path.basename(m.filename).startswith('.')]           # macOS's
            # zipfile unpacks only methods 0 and 8 in bounded pieces
            if len(found) != 1 or found[0][1] > MAX_UNPACKED or found[0][2] not in (0, 8):
                raise ValueError(f'expected one *{path.suffix} of at most {MAX_UNPACKED:,} bytes, '
                                 f'found {found}')
            with box.open(found[0][0]) as source, open(path, 'wb') as file:
                shutil.copyfileobj(source, file)                    # zipfile checks the CRC
    except (ValueError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise ValueError(f'{archive.name} is not a zip as expected: {error}') from None


def dataset_files(dataset, folder):
    """Paths of a dataset's .inter and .item file, fetched if missing; what is there stays."""
    name = FOLDERS[dataset]
    home = Path(folder, name)
    paths = [home / f'{name}.inter', home / f'{name}.item']
    if not (missing := [path for path in paths if not path.is_file()]):
        return paths
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix='.part-', dir=folder) as scratch:
            archive = fetch(dataset, scratch)
            for path in missing:
                unpack(archive, Path(scratch, path.name))
            home.mkdir(exist_ok=True)
            for path in missing:
                Path(scratch, path.name).replace(path)
    except (OSError, ValueError) as error:
        raw = ' (experiments/amazon2014.py makes them from the raw files)' * (dataset in ZIPS)
        raise OSError(f'{dataset}: {error}; place {name}.inter and {name}.item in {home} by hand'
                      + raw) from None
    return paths


def plain(name):
    """A column's name without case, blanks and signs: 'userId', 'User ID' and 'user_id' are one."""
    return re.sub(r'[\W_]', '', name.lower())


def header(cells, columns):
    """{name: (type or '', name in the file)}, renamed by columns, then NAMES, if that is free."""
    found = [re.fullmatch('(.*?)(?::(token|token_seq|float|float_seq))?', cell.strip(), re.DOTALL)
             for cell in cells]
    names = [match[1] for match in found]
    for renamed in (columns.get, lambda name: NAMES.get(plain(name))):
        there = {*names}
        names = [name if renamed(name) in there else renamed(name) or name for name in names]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError('the first line must name the columns, each once; found '
                         f'{some(twice[:1])} twice in {some(cells)}')
    return {name: (match[2] or '', match[1]) for name, match in zip(names, found)}


def read_rows(path, columns, dropped):
    """Yield the header() of a file, then its rows, all as wide; add the numbers of other lines to
    dropped. ValueError if the file is damaged or not UTF-8, or if a quote never ends."""
    try:
        with open(path, 'rb') as file:
            opener = gzip.open if file.read(2) == b'\x1f\x8b' else open
        with opener(path, 'rt', encoding='utf-8-sig', newline='') as file:
            filled = ((n, line) for n, line in enumerate(file) if line.strip())
            above, first = next(filled, (0, ''))           # blank lines above the header
            if first.startswith(('#', 'sep=')):
                raise ValueError('the first line must be the header: delete'
                                 f"{' the # or' * (first[0] == '#')} the line {first[:60]!r}")
            atomic = re.search(':(token|float)', first)    # a quote is a letter there
            csv.field_size_limit(1 << 24)                  # letters [ours: the default is too low]
            reader = csv.reader(itertools.chain([first], file), skipinitialspace=not atomic,
                                delimiter=max('\t,;|', key=first.count), strict=True,
                                quoting=csv.QUOTE_NONE if atomic else csv.QUOTE_MINIMAL)
            cells = next(reader)
            yield header(cells, columns)
            row, at = [], above + reader.line_num
            while row is not None:
                line, row = at + 1, cells                  # a row that csv refuses is dropped too
                try:
                    row = next(reader, None)
                except csv.Error:
                    pass
                at = above + reader.line_num
                if row and len(row) == len(cells) and row != cells:
                    yield row
                elif row and at > line:                    # lines would be lost with it
                    raise ValueError(f'lines {line} to {at} are one row by their quotes, but not '
                                     f'of {len(cells)} cells as the header: double quotes inside '
                                     'quotes, and quote cells that hold the delimiter')
                elif row:
                    dropped.append(at)
    except UnicodeDecodeError as error:
        raise ValueError(f'{path}: not UTF-8 at {error.object[error.start:][:8]}; save it as UTF-8:'
                         ' pandas.read_csv(PATH, dtype=str, encoding=...).to_csv(PATH, index=False)'
                         ) from None
    except csv.Error as error:
        raise ValueError(f'{path}: {some([error])} in the file that begins {first[:60]!r}'
                         ) from None
    except (ValueError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f'{path}: {error}') from None


def read_table(path, columns, needed, more=None):
    """{name: (codes (E,), strings)} of the needed columns and those of `more` that are there, None
    for all; {name: type} of all; {why: rows dropped}. Strings are numbered by first appearance, in
    C and not by Python code for each cell; they have no blanks around them, a missing one is ''."""
    dropped = []
    rows = read_rows(path, columns, dropped)
    kinds = next(rows)
    if not {*needed} <= {*kinds}:
        raise ValueError(f'{path}: expected the columns {some(needed)}, found {some(kinds)}')
    names = [name for name in kinds if more is None or name in (*needed, *more)]
    tables = {name: defaultdict(itertools.count().__next__) for name in names}
    codes = {name: [] for name in names}
    while chunk := list(itertools.islice(rows, 256)):      # [ours: more leave the CPU cache]
        cells = dict(zip(kinds, zip(*chunk)))
        for name, table in tables.items():
            numbers = map(table.__getitem__, cells[name])
            codes[name].append(np.fromiter(numbers, np.int32, len(chunk)))
    if not codes['item_id']:
        raise ValueError(f'{path}: no rows with the {len(kinds)} cells of the header, but '
                         f"{len(dropped)} others: R's row names, or a sign at each line's end?")
    strings = {name: ['' if text in MISSING else text for text in map(str.strip, table)]
               for name, table in tables.items()}
    return ({name: (np.concatenate(codes[name]), strings[name]) for name in names}, kinds,
            {f'unlike the header (line {some(dropped, 3)})': len(dropped)})


def clean_ids(codes, ids, path):
    """Codes (E,) of the distinct ids, and those; a missing id has code -1."""
    place = {name: n for n, name in enumerate(dict.fromkeys(filter(None, ids)))}
    if wrong := next((name for name in place if re.search('[\0-\37]', name)), None):
        raise ValueError(f'{path}: the id {wrong[:60]!r} holds a sign that no id has: is a quote '
                         'not closed, or the file not UTF-8?')
    pattern = r'\d([.,]\d+)?[Ee]\+?\d+'
    if rounded := next((name for name in place if re.fullmatch(pattern, name)), None):
        note(f'{path}: an id is {rounded}, as spreadsheets round long numbers: different ids may '
             'have become one', 'warning')
    return np.array([place.get(name, -1) for name in ids], np.int32)[codes], list(place)


def to_number(text):
    """A float; NaN if it is missing, -inf if it is no number."""
    text = {'true': '1', 'false': '0', '': 'nan'}.get(text.lower(), text)
    try:
        return float(text.replace(',', '.'))
    except ValueError:
        return -np.inf


def read_interactions(path, min_rating, columns, timestamps):
    """Of the rows that are interactions, by time if with timestamps: user and item codes (E,) and
    positive or not (E,); the users' and the items' ids; {why a row is no positive: how many}."""
    needed = ['user_id', 'item_id'] + ['timestamp'] * timestamps
    table, _, lost = read_table(path, columns, needed, ('rating', 'label'))
    users, user_ids = clean_ids(*table['user_id'], path)
    items, item_ids = clean_ids(*table['item_id'], path)
    rows = (users >= 0) & (items >= 0)
    lost['without an id'] = (~rows).sum()
    codes, texts = table.get('rating') or table.get('label') or (0 * users, [''])    # all missing
    ratings = np.array([to_number(text) for text in texts])[codes]
    lost['with a rating that is no number'] = (rows & (ratings == -np.inf)).sum()
    rows &= ratings != -np.inf
    label = set(ratings[rows & ~np.isnan(ratings)]) <= {0., 1.}
    positive = ~(ratings < (1 if label else min_rating))         # NaN, a missing one, is positive
    lost['labelled 0' if label else f'rated below {min_rating:g}'] = (rows & ~positive).sum()
    if timestamps:
        codes, texts = table['timestamp']
        times = np.array([to_number(text) for text in texts])
        if (times == -np.inf).any():
            try:
                dates = [datetime.fromisoformat(text or '0001-01-01') for text in texts]
            except ValueError as error:
                raise ValueError(f'{path}: timestamps are numbers or ISO dates: {some([error])}'
                                 ) from None
            times = np.array([day.replace(tzinfo=day.tzinfo or UTC).timestamp() for day in dates])
        times = np.nan_to_num(times, nan=-np.inf)[codes][rows]           # a missing one is oldest
        rows = np.flatnonzero(rows)[np.argsort(times, kind='stable')]
    return users[rows], items[rows], positive[rows], user_ids, item_ids, lost


def is_text(kind, strings):
    """Whether a column is text: its type is, or at least half of its distinct cells that are not
    missing are no numbers; and at least half are no addresses, words with :// in them."""
    cells = [text for text in strings if text]
    texts = [text for text in cells if (kind or to_number(text) == -np.inf)
             and not all('://' in word for word in text.split())]
    return not kind.startswith('float') and 2 * len(texts) >= max(len(cells), 1)


def read_items(path, text_columns, columns):
    """The distinct items' ids, texts and titles in the order of the file, and the text columns."""
    table, kinds, lost = read_table(path, columns, ['item_id'])
    codes, ids = clean_ids(*table.pop('item_id'), path)
    both = {*NAMES.values()} - {'title'} if 'user_id' in kinds else ()     # not of the items
    table = {name: column for name, column in table.items() if name not in both}
    taken = [name for name in table if name == 'title' or is_text(kinds[name][0], table[name][1])]
    if text_columns is not None:
        taken = []
        for asked in text_columns:
            same = [asked] if asked in table else [n for n in table if plain(n) == plain(asked)]
            if len(same) != 1:
                raise ValueError(f'{path}: expected a column {some([asked])}, found {some(table)}')
            taken += same
    title = [name for end in ('title', 'name', '.*title', '.*name') for name in table
             if re.fullmatch(end, plain(name))] + taken
    numbers, rows = np.unique(codes, return_index=True)    # by first appearance; -1: no id
    rows = rows[numbers >= 0]
    lost |= {'without an item_id': (codes < 0).sum(),
             'with a repeated item_id': (codes >= 0).sum() - len(rows)}
    if not both and any(lost.values()):
        note(f'{path}: {len(rows):,} items stay{counted(lost)}')

    def joined(names, row):
        cells = [strings[codes[row]] for codes, strings in map(table.get, names)]
        return ' '.join(' '.join(cells).split())
    return (ids, [joined(taken, row) for row in rows], [joined(title[:1], row) for row in rows],
            taken)


def own_files(folder, columns):
    """The interaction file, and the item file or None, of a folder, found by their columns."""
    headers, others = {}, []
    any_text = re.compile(r'\.txt(\.gz)?$', re.I).search              # a .txt may be anything
    for path in sorted(path for path in Path(folder).iterdir() if path.name[0] != '.'):
        if path.is_file() and re.search(r'\.(csv|tsv|txt|inter|item)(\.gz)?$', path.name, re.I):
            try:
                headers[path] = next(read_rows(path, columns, []))
            except ValueError as error:
                if not any_text(path.name):
                    raise
                others.append(path.name + str(error).removeprefix(str(path)))
        else:
            others.append(path.name)
    pairs = [path for path, names in headers.items() if {'user_id', 'item_id'} <= {*names}]
    items = [path for path, names in headers.items() if 'item_id' in names and path not in pairs]
    wrong = [path for path, names in headers.items()
             if not {'user_id', 'item_id'} & {*names} and not any_text(path.name)]
    idle = {*columns} - {theirs for names in headers.values() for name, (_, theirs) in names.items()
                         if columns.get(theirs) == name}
    if len(pairs) != 1 or len(items) > 1 or wrong or idle:
        found = [f'{path.name} (columns {some(names)})' for path, names in headers.items()]
        found += [f'nothing to rename from {name}' for name in sorted(idle)]
        raise ValueError(
            f'{folder}: expected one file with user_id and item_id, and one or none with item_id '
            'and no user_id, as .csv, .tsv, .txt, .inter or .item, plain or .gz; found '
            f'{"; ".join(found) or "none"}; not read: {some(others)}. If there are several, keep '
            'one or join them; the split is drawn here. Name columns as in --columns '
            'user_id=visitorid item_id=itemid; move others away')
    others += [path.name for path in headers if path not in pairs + items]
    if others:
        note(f'{folder}: not read: {some(sorted(others))}')
    if not {'rating', 'label'} & {*headers[pairs[0]]}:
        note(f'{folder}: no column rating or label: every row is a positive')
    both = pairs if 'title' in headers[pairs[0]] else []               # one table of both
    return pairs[0], (items + both + [None])[0]


def to_csr(users, items, shape, ordered=False):
    """csr of the distinct pairs (E,): ones; or, if ordered, the number of a pair's last row."""
    pair = users * np.int64(shape[1]) + items
    pairs, back = np.unique(pair[::-1], return_index=True)
    values = float(len(pair)) - back if ordered else np.ones(len(pairs), np.float32)
    return sp.csr_matrix((values, np.divmod(pairs, shape[1])), shape)


def k_core(pairs, core):
    """The users and the items of csr (U, I) that stay if those with fewer than `core` entries, or
    with none, go again and again until nothing goes; and the csr of these."""
    users, items = map(np.arange, pairs.shape)
    while True:
        u, i = (pairs.getnnz(axis=axis) >= max(core, 1) for axis in (1, 0))
        if u.all() and i.all():
            return users, items, pairs
        pairs, users, items = pairs[u][:, i], users[u], items[i]


def load(dataset, folder='data', *, min_rating=4., core=5, columns=None, text_columns=None,
         timestamps=False):
    """Read a dataset, downloaded if missing, and filter it. ValueError or OSError in one line.

    dataset: beauty, toys, tools, office, ml-100k (in or into folder), or a folder of your own.
    min_rating: lower ratings are no positives [paper: 4]. core: users and items with fewer
    interactions are dropped [paper: 5]; 0 or 1: no filter. columns: {name in your files: 'user_id',
    'item_id', 'rating', 'timestamp' or 'title'}. text_columns: names of the columns that make the
    text; None: title, brand and categories of the Amazon sets, else as above.
    Returns interactions (csr U x I, float32 ones; with timestamps their order in time, from 1),
    texts [I], titles [I], ids of users [U] and items [I], and low (csr U x I): what these users
    rated lower, which should not be recommended to them.
    """
    own, columns = dataset not in FOLDERS, columns or {}
    if own and not os.path.isdir(dataset):
        raise ValueError(f'{dataset}: neither a folder nor one of {some(FOLDERS)}')
    inter, item = own_files(dataset, columns) if own else dataset_files(dataset, folder)
    users, items, positive, user_ids, item_ids, lost = read_interactions(
        inter, min_rating, columns, timestamps)
    if dataset in ZIPS and text_columns is None:
        text_columns = ['title', 'brand', 'categories']    # [ours: what the authors' source holds]
    if item:
        ids, texts, titles, taken = read_items(item, text_columns, columns)
    elif text_columns:
        raise ValueError(f'{dataset}: no file of items to take {some(text_columns)} from')
    else:
        ids, taken = item_ids, []
        texts = titles = [''] * len(ids)
    place = {name: n for n, name in enumerate(ids)}
    items = np.array([place.get(name, -1) for name in item_ids], int)[items]
    there, shape = items >= 0, (len(user_ids), len(ids))
    if there.size and not there.any():
        raise ValueError(f'{inter}: none of its items is in {item}; the ids here are such as '
                         f'{some(item_ids, 3)}, there {some(ids, 3)}')
    known, low = there & positive, there & ~positive
    pairs = to_csr(users[known], items[known], shape, ordered=timestamps)
    rows, kept, interactions = k_core(pairs, core)                       # U x I
    lower = to_csr(users[low], items[low], shape)[rows][:, kept]         # U x I
    texts, titles, ids = ([column[n] for n in kept] for column in (texts, titles, ids))
    lost |= {'of items that the item file lacks': (positive & ~there).sum(),
             'repeated': known.sum() - pairs.nnz,
             f'outside the {core}-core': pairs.nnz - interactions.nnz}
    n_rows = sum(lost.values()) + interactions.nnz
    told = f'{n_rows:,} rows: {interactions.nnz:,} interactions stay{counted(lost)}'
    if not interactions.nnz:
        raise ValueError(f'{inter}: {told}; lower min_rating or core, or mend the file')
    if own:
        note(f'{dataset}: {told}')
        note(f'{dataset}: texts from {some(taken)}' + counted({
            'items without text': texts.count(''), f'of {shape[1]:,} items have no interactions '
            'left: not ranked, not recommended': shape[1] - len(ids)}, ';'))
    found = *interactions.shape, interactions.nnz
    if (min_rating, core) == (4, 5) and found != SIZES.get(dataset, found):
        note(f'{dataset}: {found} users, items and interactions after filtering; expected '
             f'{SIZES[dataset]}', 'warning')
    return interactions, texts, titles, [user_ids[n] for n in rows], ids, lower


def split(interactions, rng, last=False):
    """Leave-one-out: csr U x I, each pair once -> train, valid, test, each csr U x I of ones.

    Of a user's interactions one drawn with rng tests and another validates [paper]; with `last` the
    newest tests and the one before validates, by the values that load() gives with timestamps. A
    user with two has no validation item, with one only trains. ValueError if no user has two.
    """
    start, count = interactions.indptr[:-1], np.diff(interactions.indptr)       # (U,)
    if not (count >= 2).any():
        raise ValueError('no user has two interactions, so there is nothing to test with')
    order = np.arange(interactions.nnz)
    if last:
        order = np.lexsort((interactions.data, np.repeat(np.arange(len(count)), count)))
        test, valid = count - 1, count - 2
    else:
        test = rng.integers(0, np.maximum(count, 1))
        valid = rng.integers(0, np.maximum(count - 1, 1))
        valid += valid >= test                    # uniform over the others
    part = sp.csr_matrix(interactions, dtype=np.int8, copy=True)
    part.data[:] = 1                              # train
    part.data[order[(start + valid)[count >= 3]]] = 2
    part.data[order[(start + test)[count >= 2]]] = 3
    return [(part == number).astype(np.float32) for number in (1, 2, 3)]
