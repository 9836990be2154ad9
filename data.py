"""Interactions and item texts: download, read, filter, split.

    interactions, texts, titles, users, items, low = load('beauty')  # or 'ml-100k', or a folder
    train, valid, test = split(interactions, np.random.default_rng(0))

The data of LLMInit (arXiv 2503.01814): keep ratings >= 4, drop interactions of items without
metadata, count a repeated pair once, then 5-core; leave one out per user, in random order.

beauty, toys, tools and office are Amazon sets of 2014, zips of RecBole atomic files; ml-100k is
MovieLens-100k, from the recbole wheel. They are looked for as <folder>/amazon-beauty/
amazon-beauty.inter and .item and fetched only if missing. A folder of your own has one file with
the columns user_id and item_id (rating, timestamp), and one with item_id and texts: CSV, TSV or
atomic files, UTF-8, plain or gz, with a header, which decides the delimiter (tab , ; or |).

    user_id, userId and 'User ID' are one name; `columns` names others. Ids are strings
    missing is what pandas.read_csv takes as missing, and \\N; a missing timestamp is the oldest
    a row without an id, with too few or many cells, or with a rating that is no number goes
    a row without a rating is a positive, like every row of a file without ratings
    ratings that are all 0 or 1, or False or True, are labels: 1 is a positive
    a comma in a rating is a decimal comma; a pair that was rated high and low is a positive
    quotes hold delimiters and line ends, but in an atomic file a quote is a letter
    text is every column of the item file in its order, but for ids and for those whose type is
    float or, without a type, whose cells are mostly numbers or addresses
    the title is the column title, or name, or one that ends so, or the first text
    users are numbered by first appearance, items by the item file; of repeated items the first
    counts. Without an item file the texts are empty; a single file with a title is both
What is dropped is counted on stderr. Not here: ratings as weights, cleaning of HTML.

U users, I items, E interactions. Needs numpy, scipy and requests. MIT licence, from LLMInit's
reference implementation.
"""
import contextlib
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

import numpy as np
import requests
import scipy.sparse as sp
from requests.adapters import HTTPAdapter, Retry

URL = 'https://recbole.s3-accelerate.amazonaws.com/ProcessedDatasets/Amazon_ratings/'
ZIPS = {'beauty': 'Amazon_Beauty.zip', 'toys': 'Amazon_Toys_and_Games.zip',     # [authors' code]
        'tools': 'Amazon_Tools_and_Home_Improvement.zip', 'office': 'Amazon_Office_Products.zip'}
FOLDERS = {'beauty': 'amazon-beauty', 'toys': 'amazon-toys-games',    # [ours: RecBole's names]
           'tools': 'amazon-tools-home-improvement', 'office': 'amazon-office-products',
           'ml-100k': 'ml-100k'}
ML_100K = 'recbole==1.2.1'             # [ours: real data for who reaches nothing but PyPI]
SHA256 = {'ml-100k.inter': '4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff',
          'ml-100k.item': '51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532'}
SIZES = {'beauty': (10553, 6086, 94148), 'toys': (11268, 7309, 95420),
         'tools': (9245, 6198, 73250), 'office': (3260, 1583, 36544),  # [paper], less the padding
         'ml-100k': (938, 1008, 54413)}                                # row; [ours: measured]
AMAZON_TEXT = ['title', 'brand', 'categories']     # [ours: what the authors' source holds]
MAX_UNPACKED = 2 << 30                 # bytes [ours: 20 times a set of 2 million rows]
MAX_CELL = 1 << 24                     # letters [ours: the csv module's 2^17 are too few]
CHUNK = 256                            # rows at a time [ours: measured; more leave the CPU cache]
NAMES = {name.replace('_', ''): name for name in     # by plain(): what columns are called here
         ('user_id', 'item_id', 'rating', 'label', 'timestamp', 'title')}
MISSING = {'', '#N/A', '#N/A N/A', '#NA', '-1.#IND', '-1.#QNAN', '-NaN', '-nan', '1.#IND',
           '1.#QNAN', '<NA>', 'N/A', 'NA', 'NULL', 'NaN', 'None', 'n/a', 'nan', 'null', '\\N'}


def note(text, kind='note'):
    """One line on stderr, where it does not mix with results."""
    print(f'{kind}: {text}', file=sys.stderr)


def printable(text):
    """Text on one line, whatever is in it."""
    return text if text.isprintable() else ascii(text)[1:-1]


def some(names, most=8):
    """'a, b, c and 4 more', for messages."""
    names = [printable(str(name))[:100] for name in names]
    more = f' and {len(names) - most} more' if len(names) > most else ''
    return (', '.join(names[:most]) or 'nothing') + more


def counted(lost):
    """', 3 repeated, 2 without an id' of {why: how many}."""
    return ''.join(f', {n:,} {why}' for why, n in lost.items() if n)


class Patience(Retry):
    """Ask again after broken connections, 429 and 5xx; wait a minute at most."""

    def get_retry_after(self, response):
        return min(super().get_retry_after(response) or 0, 60)


def download(url, path, sha256=None, size=None):
    """Fetch url to path: streamed to a temporary name, checked, renamed. OSError and no file else.

    A body that breaks off is continued with Range, four times at most.
    """
    part = f'{path}.{os.urandom(4).hex()}.part'
    again = HTTPAdapter(max_retries=Patience(4, backoff_factor=.5,
                                             status_forcelist=(408, 429, 500, 502, 503, 504)))
    try:
        with requests.Session() as session, open(part, 'w+b') as file:
            session.mount('http://', again)
            session.mount('https://', again)
            for left in range(4, -1, -1):
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
            came = file.tell()
            file.seek(0)
            found = hashlib.file_digest(file, 'sha256').hexdigest()
        if came != (size or came) or found != (sha256 or found):
            raise OSError(f'{came} bytes with SHA-256 {found}; expected {size} with {sha256}')
        os.replace(part, path)
    except (OSError, ValueError) as error:                 # requests' errors are OSErrors
        raise OSError(f'{url}: {" ".join(str(error).split())}') from None
    finally:
        with contextlib.suppress(OSError):
            os.remove(part)


def unpack(archive, suffix, path):
    """Copy the one member of a zip whose name ends in suffix to path. ValueError if there is none.

    The member's own path is not used, so nothing can be written elsewhere; its size is bounded, and
    zipfile checks its CRC.
    """
    try:
        with zipfile.ZipFile(archive) as box:
            found = [member for member in box.infolist() if member.filename.endswith(suffix)
                     and not os.path.basename(member.filename).startswith('.')]
            told = [(m.filename, m.file_size, m.compress_type) for m in found]
            # zipfile unpacks only methods 0 and 8 in bounded pieces
            if len(found) != 1 or told[0][1] > MAX_UNPACKED or told[0][2] not in (0, 8):
                raise ValueError(f'expected one *{suffix} of at most {MAX_UNPACKED:,} bytes, found '
                                 f'{told}')
            with box.open(found[0]) as source, open(path, 'wb') as file:
                shutil.copyfileobj(source, file, 1 << 20)
    except (ValueError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise ValueError(f'{os.path.basename(archive)} is not a zip as expected: {error}') from None


def fetch(dataset, names, scratch):
    """Bring the two files of a dataset into a scratch folder."""
    if dataset in ZIPS:
        archive, suffixes = os.path.join(scratch, ZIPS[dataset]), ('.inter', '.item')
        download(URL + ZIPS[dataset], archive)
    else:
        ran = subprocess.run(
            [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--dest', scratch,
             '--disable-pip-version-check', '--only-binary=:all:', ML_100K], text=True,
            capture_output=True, errors='replace')
        if ran.returncode:
            raise OSError(f'pip download {ML_100K}: {ran.stderr.strip().rpartition(chr(10))[2]}')
        archive, suffixes = next(os.scandir(scratch)).path, names
    for suffix, name in zip(suffixes, names):
        path = os.path.join(scratch, name)
        unpack(archive, suffix, path)
        with open(path, 'rb') as file:
            found = hashlib.file_digest(file, 'sha256').hexdigest()
        if found != SHA256.get(name, found):
            raise ValueError(f'{name}: SHA-256 is {found}, expected {SHA256[name]}')


def dataset_files(dataset, folder):
    """Paths of a dataset's .inter and .item file, fetched if missing; what is there stays."""
    home = os.path.join(folder, FOLDERS[dataset])
    names = [FOLDERS[dataset] + suffix for suffix in ('.inter', '.item')]
    paths = [os.path.join(home, name) for name in names]
    if not all(map(os.path.isfile, paths)):
        try:
            os.makedirs(folder, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix='.part-', dir=folder) as scratch:
                fetch(dataset, names, scratch)
                os.makedirs(home, exist_ok=True)
                for name, path in zip(names, paths):
                    if not os.path.isfile(path):
                        os.replace(os.path.join(scratch, name), path)
        except (ValueError, OSError) as error:
            raise OSError(f'{dataset}: {error}; place {" and ".join(names)} in {home} by hand '
                          '(experiments/amazon2014.py makes them from the raw files)') from None
    return paths


def plain(name):
    """A column's name without case, blanks and signs: 'userId', 'User ID' and 'user_id' are one."""
    return re.sub(r'[\W_]', '', name.lower())


def header(cells, columns):
    """[(name, type)] of columns; the type may be ''. `columns`, then NAMES, rename a column unless
    the new name is there. ValueError if two are called the same."""
    kinds = '(.*?)(?::(token|token_seq|float|float_seq))?'
    found = [re.fullmatch(kinds, cell.strip(), re.DOTALL).groups('') for cell in cells]
    for renamed in (lambda name: columns.get(name), lambda name: NAMES.get(plain(name))):
        there = {name for name, _ in found}
        found = [(name if renamed(name) in there else renamed(name) or name, kind)
                 for name, kind in found]
    names = [name for name, _ in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f'several columns are {twice}: {some(cells)}')
    return found


def good_rows(reader, first, dropped):
    """Yield the rows of a csv reader that have as many cells as `first`, the header, and are not it
    again; add the numbers of the other lines to dropped."""
    line = reader.line_num
    while True:
        try:
            for row in reader:
                if len(row) == len(first) and row != first:
                    yield row
                elif row:
                    dropped.append(reader.line_num)
                line = reader.line_num
            return
        except csv.Error as error:
            if reader.line_num > line + 1:                 # lines would be lost with it
                raise ValueError(f'the quote in line {line + 1} does not end before line '
                                 f'{reader.line_num} ({error}); inside quotes double it') from None
            dropped.append(reader.line_num)
            line = reader.line_num


def read_rows(path, columns, dropped):
    """Yield the header() of a file, then its rows, all as wide; see good_rows(). ValueError if the
    file is damaged or not UTF-8, or if a quote never ends."""
    first = ''
    try:
        with open(path, 'rb') as file:
            opener = gzip.open if file.read(2) == b'\x1f\x8b' else open
        with opener(path, 'rt', encoding='utf-8-sig', newline='') as file:
            first = next(filter(str.strip, file), '')
            if first.startswith(('#', 'sep=')):
                raise ValueError(f'the first line must be the header: delete {first!r}')
            atomic = re.search(':(token|float)', first)    # a quote is a letter there
            csv.field_size_limit(MAX_CELL)
            reader = csv.reader(itertools.chain([first], file), skipinitialspace=not atomic,
                                delimiter=max('\t,;|', key=first.count), strict=True,
                                quoting=csv.QUOTE_NONE if atomic else csv.QUOTE_MINIMAL)
            cells = next(reader, [])
            yield header(cells, columns)
            yield from good_rows(reader, cells, dropped)
    except UnicodeDecodeError as error:
        raise ValueError(f'{path}: not UTF-8 at {error.object[error.start:][:8]}; save it as UTF-8:'
                         ' pandas.read_csv(PATH, encoding=...).to_csv(PATH, index=False)') from None
    except (ValueError, csv.Error, EOFError, zlib.error, gzip.BadGzipFile) as error:
        where = f' in the file that begins {first[:60]!r}' if isinstance(error, csv.Error) else ''
        raise ValueError(f'{path}: {printable(str(error))}{where}') from None


def read_table(path, columns, needed, more=None):
    """{name: (codes (E,), distinct strings by first appearance)} of the needed columns and those of
    `more` that are there, None for all; {name: type} of all; and the lines that were dropped.

    No Python code runs for a cell: a defaultdict whose default is its own length numbers new
    strings in C.
    """
    dropped = []
    rows = read_rows(path, columns, dropped)
    kinds = dict(names := next(rows))
    if not set(needed) <= set(kinds):
        raise ValueError(f'{path}: expected the columns {some(needed)}, found {some(kinds)}')
    picked = [n for n, (name, _) in enumerate(names) if more is None or name in (*needed, *more)]
    tables, codes = [defaultdict() for _ in picked], [[np.empty(0, np.int32)] for _ in picked]
    for table in tables:
        table.default_factory = table.__len__
    while chunk := list(itertools.islice(rows, CHUNK)):
        cells = list(zip(*chunk))
        for n, table, out in zip(picked, tables, codes):
            out.append(np.fromiter(map(table.__getitem__, cells[n]), np.int32, len(chunk)))
    if not tables[0]:
        raise ValueError(f'{path}: no rows with the {len(names)} cells of the header, but '
                         f"{len(dropped)} others: R's row names, or a sign at each line's end?")
    return ({names[n][0]: (np.concatenate(out), list(table))
             for n, table, out in zip(picked, tables, codes)}, kinds, dropped)


def clean_ids(codes, ids, path):
    """Codes (E,) and distinct ids without blanks around them; a missing id has code -1."""
    bare = [name.strip() for name in ids]
    place = {name: n for n, name in enumerate(dict.fromkeys(bare))}
    for name in place:
        if not name.isprintable() and re.search('[\0-\37]', name):
            raise ValueError(f'{path}: the id {name[:60]!r} holds a sign that no id has: is a quote'
                             ' not closed, or the file not UTF-8?')
        if re.fullmatch(r'\d([.,]\d+)?[Ee]\+?\d+', name):
            note(f'{path}: an id is {name}, as spreadsheets round long numbers: different ids may '
                 'have become one', 'warning')
            break
    new = np.array([-1 if name in MISSING else place[name] for name in bare], np.int32)
    return new[codes], list(place)


def to_number(text):
    """A float; NaN if it is missing, -inf if it is no number."""
    text = {'true': '1', 'false': '0'}.get(text.strip().lower(), text.strip())
    with contextlib.suppress(ValueError):
        return np.nan if text in MISSING else float(text.replace(',', '.'))
    return -np.inf


def read_interactions(path, min_rating, columns, timestamps):
    """Of the rows with ids: user and item codes (E,), positive or not (E,), times (E,) or None; the
    users' and the items' ids; and {why: how many} of the rows that are no interactions."""
    needed = 'user_id', 'item_id', *('timestamp',) * timestamps
    table, _, dropped = read_table(path, columns, needed, ('rating', 'label'))
    users, user_ids = clean_ids(*table['user_id'], path)
    items, item_ids = clean_ids(*table['item_id'], path)
    numbers = {name: np.array([to_number(text) for text in table[name][1]])
               for name in table.keys() - {'user_id', 'item_id'}}
    good = (users >= 0) & (items >= 0)
    lost = {f'unlike the header (line {some(dropped, 3)})': len(dropped),
            'without an id': (~good).sum()}
    positive, times = np.ones(len(users), bool), None
    if name := next((name for name in ('rating', 'label') if name in numbers), None):
        ratings = numbers[name][table[name][0]]
        lost['with a rating that is no number'] = (good & (ratings == -np.inf)).sum()
        good &= ratings != -np.inf
        label = set(ratings[good & ~np.isnan(ratings)]) <= {0., 1.}
        positive = ~(ratings < (1 if label else min_rating))     # NaN, a missing one, is positive
        lost['labelled 0' if label else f'rated below {min_rating:g}'] = (good & ~positive).sum()
    if timestamps:
        (codes, texts), times = table['timestamp'], numbers['timestamp']
        if (times == -np.inf).any():
            try:
                dates = ['NaT' if text.strip() in MISSING else text.strip().rstrip('Z')
                         for text in texts]
                times = np.array(dates, 'datetime64[ms]').astype(float)
            except ValueError as error:
                raise ValueError(f'{path}: timestamps are numbers or ISO dates: {error}') from None
        times = np.nan_to_num(times, nan=-np.inf)[codes][good]           # a missing one is oldest
    return users[good], items[good], positive[good], times, user_ids, item_ids, lost


def is_text(kind, strings):
    """Whether a column is text, by its type, or if at least half of its cells are, which are not
    missing: no numbers, nor addresses, words with :// in them."""
    cells = [text for text in strings if text.strip() not in MISSING]
    texts = [text for text in cells if (kind or to_number(text) == -np.inf)
             and not all('://' in word for word in text.split())]
    return kind[:5] in ('token', '') and 2 * len(texts) >= max(len(cells), 1)


def read_items(path, text_columns, columns):
    """The distinct items' ids, texts and titles in the order of the file, and the text columns."""
    table, kinds, dropped = read_table(path, columns, ['item_id'])
    codes, ids = clean_ids(*table.pop('item_id'), path)
    both = {*NAMES.values()} - {'title'} if 'user_id' in kinds else ()     # not of the items
    table = {name: column for name, column in table.items() if name not in both}
    taken = [name for name in table if name == 'title' or is_text(kinds[name], table[name][1])]
    if text_columns is not None:
        same = [[name for name in table if name == asked] or
                [name for name in table if plain(name) == plain(asked)] for asked in text_columns]
        if wrong := [asked for asked, names in zip(text_columns, same) if len(names) != 1]:
            raise ValueError(f'{path}: no column {wrong[0]}; found {some(table)}')
        taken = [names[0] for names in same]
    title = ([name for end in ('title', 'name') for name in table if plain(name) == end]
             + [name for end in ('title', 'name') for name in table if plain(name).endswith(end)]
             + taken)[:1]
    numbers, rows = np.unique(codes, return_index=True)    # by first appearance; -1: no id
    numbers, rows = numbers[numbers >= 0], rows[numbers >= 0]
    lost = {f'unlike the header (line {some(dropped, 3)})': len(dropped), 'without an item_id':
            (codes < 0).sum(), 'of an item_id that is above': (codes >= 0).sum() - len(rows)}
    if not both and any(lost.values()):
        note(f'{path}: {len(rows):,} items stay{counted(lost)}')

    def joined(names):
        cells = [[strings[code] for code in codes[rows]]
                 for codes, strings in map(table.get, names)]
        return [' '.join(' '.join(cell for cell in row if cell.strip() not in MISSING).split())
                for row in zip(*cells)] if names else [''] * len(rows)
    return [ids[n] for n in numbers], joined(taken), joined(title), taken


def own_files(folder, columns):
    """The interaction file of a user's folder, and the item file, or None. The columns decide."""
    headers, others = {}, []
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if re.search(r'\.(csv|tsv|txt|inter|item)(\.gz)?$', name, re.IGNORECASE):
            try:
                headers[path] = [column for column, _ in next(read_rows(path, columns, []))]
            except ValueError as error:                    # a .txt may be anything
                if not name.lower().endswith('.txt'):
                    raise
                others.append(str(error).removeprefix(os.path.join(folder, '')))
        elif not name.startswith('.'):
            others.append(name)
    pairs = [path for path, names in headers.items() if {'user_id', 'item_id'} <= {*names}]
    items = [path for path, names in headers.items() if 'item_id' in names and path not in pairs]
    wrong = [path for path, names in headers.items() if not {'user_id', 'item_id'} & {*names}
             and not path.lower().endswith('.txt')]
    idle = {*columns}.intersection(*headers.values()) | {
        name for name in columns.values() if not any(name in names for names in headers.values())}
    if len(pairs) != 1 or len(items) > 1 or wrong or idle:
        found = '; '.join(f'{os.path.basename(path)} (columns {some(names)})'
                          for path, names in headers.items())
        raise ValueError(
            f'{folder}: expected one file with user_id and item_id, and one or none with item_id '
            'and no user_id, as .csv, .tsv, .txt, .inter or .item, plain or .gz; found '
            f'{found or "none"}; not read: {some(others)}. ' +
            ('Of several keep one or join them; the split is drawn here'
             if len(pairs) > 1 or len(items) > 1 else
             'Name columns as in --columns user_id=visitorid item_id=itemid; move others away'))
    left = [os.path.basename(path) for path in headers if path not in pairs + items] + others
    if left:
        note(f'{folder}: not read: {some(left)}')
    both = pairs if 'title' in headers[pairs[0]] else []               # one table of both
    return pairs[0], (items + both + [None])[0]


def to_csr(users, items, times, shape):
    """csr of the distinct pairs (E,): ones; or with times (E,) their order, the newest of equal
    pairs, from 1, equal times in the order of the rows."""
    pair = users * np.int64(shape[1]) + items
    pair = pair if times is None else pair[np.argsort(times, kind='stable')]
    order = np.argsort(pair, kind='stable')
    newest = order[np.diff(pair[order], append=-1) != 0]
    values = np.ones(len(newest), np.float32) if times is None else newest + 1.
    return sp.csr_matrix((values, np.divmod(pair[newest], shape[1])), shape)


def k_core(pairs, core):
    """Rows and columns of csr (U, I) that are left if users and items with fewer than `core`
    entries, and those without any, go, again and again until nothing goes."""
    users, items = map(np.arange, pairs.shape)
    while True:
        u, i = (pairs.getnnz(axis=axis) >= max(core, 1) for axis in (1, 0))
        if u.all() and i.all():
            return users, items
        pairs, users, items = pairs[u][:, i], users[u], items[i]


def load(dataset, folder='data', *, min_rating=4., core=5, columns=None, text_columns=None,
         timestamps=False):
    """A dataset, downloaded if missing, filtered.

    dataset: beauty, toys, tools, office, ml-100k (in or into folder), or a folder of your own.
    min_rating: lower ratings are no positives [paper: 4]. core: users and items with fewer
    interactions go [paper: 5]; 0 or 1: none. columns: {name in your files: 'user_id', 'item_id',
    'rating', 'timestamp' or 'title'}. text_columns: names of the columns that make the text; None:
    title, brand and categories of the Amazon sets, else as above.
    Returns interactions (csr U x I, float32 ones; with timestamps their order in time, from 1),
    texts [I], titles [I], ids of users [U] and items [I], and low (csr U x I): what these users
    rated lower, which nobody should be recommended. ValueError or OSError, one line each.
    """
    own, columns = dataset not in FOLDERS, columns or {}
    if own and not os.path.isdir(dataset):
        raise ValueError(f'{dataset}: neither a folder nor one of {some(FOLDERS)}')
    inter, item = own_files(dataset, columns) if own else dataset_files(dataset, folder)
    if dataset in ZIPS and text_columns is None:
        text_columns = AMAZON_TEXT
    users, items, positive, times, user_ids, item_ids, lost = read_interactions(
        inter, min_rating, columns, timestamps)
    if text_columns and not item:
        raise ValueError(f'{dataset}: no file of items to take {some(text_columns)} from')
    ids, texts, titles, taken = (read_items(item, text_columns, columns) if item else (
        [name for name in item_ids if name not in MISSING], [''] * len(item_ids),
        [''] * len(item_ids), []))
    place = {name: n for n, name in enumerate(ids)}
    items = np.array([place.get(name, -1) for name in item_ids])[items]
    there, shape = items >= 0, (len(user_ids), len(ids))
    if there.size and not there.any():
        raise ValueError(f'{inter}: none of its items is in {item}; the ids here are such as '
                         f'{some(item_ids, 3)}, there {some(ids, 3)}')
    known, low = there & positive, there & ~positive
    pairs = to_csr(users[known], items[known], times if times is None else times[known], shape)
    rows, kept = k_core(pairs, core)
    interactions = pairs[rows][:, kept]                                  # U x I
    lower = to_csr(users[low], items[low], None, shape)[rows][:, kept]   # U x I
    lost |= {'of items that the item file lacks': (positive & ~there).sum(),
             'repeated': known.sum() - pairs.nnz,
             f'outside the {core}-core': pairs.nnz - interactions.nnz}
    n_rows = sum(lost.values()) + interactions.nnz
    told = f'{n_rows:,} rows: {interactions.nnz:,} interactions stay{counted(lost)}'
    if not interactions.nnz:
        raise ValueError(f'{inter}: {told}; lower min_rating or core, or mend the file')
    texts = [texts[n] for n in kept]
    if own:
        blank, gone = texts.count(''), len(ids) - len(kept)
        note(f'{dataset}: {told}')
        note(f'{dataset}: texts from {some(taken)}' + f'; {blank} items without text' * (blank > 0)
             + f'; {gone} of {len(ids)} items have no interactions left: not ranked, not '
             'recommended' * (gone > 0))
    found = *interactions.shape, interactions.nnz
    if not own and (min_rating, core) == (4, 5) and found != SIZES[dataset]:
        note(f'{dataset}: {found} users, items and interactions after filtering; expected '
             f'{SIZES[dataset]}', 'warning')
    return (interactions, texts, [titles[n] for n in kept], [user_ids[n] for n in rows],
            [ids[n] for n in kept], lower)


def split(interactions, rng, last=False):
    """Leave-one-out: train, valid, test, each csr U x I of ones.

    Of a user's interactions one drawn at random tests and another validates [paper]; with `last`
    the newest tests and the one before validates, by the values that load() gives with timestamps.
    A user with two has no validation item, a user with one only trains. rng: numpy Generator.
    ValueError if no user has two.
    """
    start, count = interactions.indptr[:-1], np.diff(interactions.indptr)       # (U,)
    users, order = np.repeat(np.arange(len(count)), count), np.arange(interactions.nnz)
    if not (count >= 2).any():
        raise ValueError('no user has two interactions, so there is nothing to test with')
    if last:
        order = np.lexsort((interactions.data, users))
        test, valid = count - 1, count - 2
    else:
        test = rng.integers(0, np.maximum(count, 1))
        valid = rng.integers(0, np.maximum(count - 1, 1))
        valid += valid >= test                    # uniform over the others
    part = np.zeros(interactions.nnz, np.int8)    # 0 train, 1 valid, 2 test
    part[order[(start + test)[count >= 2]]] = 2
    part[order[(start + valid)[count >= 3]]] = 1
    ones = np.ones(interactions.nnz, np.float32)
    return [sp.csr_matrix((ones[part == p], (users[part == p], interactions.indices[part == p])),
                          interactions.shape) for p in range(3)]
