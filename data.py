"""Interactions and item texts: download, read, filter, split.

    interactions, texts, titles, users, items, low = load('beauty')  # or 'ml-100k', or a folder
    train, valid, test = split(interactions, np.random.default_rng(0))
    train = thin(train, .5, rng)                                     # a colder start

The data of LLMInit (arXiv 2503.01814): keep ratings >= 4, drop interactions of items without
metadata, count a repeated pair once, then 5-core; leave one out per user, in random order.

Datasets
    beauty, toys, tools, office    Amazon 2014, zips of RecBole atomic files; if they cannot be
                                   had, the raw files of 2014, which add a column description
    ml-100k                        MovieLens-100k, out of the recbole wheel, through pip
    a folder of your own           one file with the columns user_id and item_id (rating and
                                   timestamp if you have them), one with item_id and text
Files are looked for as <folder>/amazon-beauty/amazon-beauty.inter and .item and fetched only
when missing. Your own may be atomic files, CSV or TSV, plain or gz; delimiter, header, column
order and encoding mark are found. In comma and semicolon files quotes hold delimiters and line
ends; in the others quotes around a cell are taken off, but in an atomic file, where a quote is a
letter. Bytes that are not UTF-8 are read as Windows-1252. Ids are strings: '007' is not '7'.

Decisions the paper leaves open
    users   in order of first appearance in the interaction file
    items   in the order of the item file, those with interactions left; repeated rows: the first
    a row without a rating is a positive, like every row of a file without that column
    a comma in a rating is the decimal comma: '4,5' is 4.5, and '1,234' is no thousand
    an item without text stays, with the text ''; it is counted on stderr
    a row with too many or too few fields, without an id or with a rating that is no number is
    dropped and counted
    a first row that names no user and no item but holds a number is data: the columns are then
    user_id, item_id, rating, timestamp, or item_id, title and the rest

Does not: order by time, keep ratings as weights, guess columns by content, clean up HTML.

U users, I items, E interactions. Needs numpy, scipy and requests. MIT licence, from LLMInit's
reference implementation.
"""
import ast
import codecs
import contextlib
import csv
import gzip
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from collections import defaultdict

import numpy as np
import requests
import scipy.sparse as sp

AMAZON_URL = ('https://recbole.s3-accelerate.amazonaws.com/ProcessedDatasets/'
              'Amazon_ratings/')                                      # [authors' code]
FOLDERS = {'beauty': 'amazon-beauty', 'toys': 'amazon-toys-games',    # [ours: RecBole's names]
           'tools': 'amazon-tools-home-improvement', 'office': 'amazon-office-products',
           'ml-100k': 'ml-100k'}
ZIPS = {'beauty': 'Amazon_Beauty.zip', 'toys': 'Amazon_Toys_and_Games.zip',
        'tools': 'Amazon_Tools_and_Home_Improvement.zip',
        'office': 'Amazon_Office_Products.zip'}                       # [authors' code]
RAW_URL = 'http://snap.stanford.edu/data/amazon/productGraph/categoryFiles/'
RAW_REVIEW = 'user_id:token\titem_id:token\trating:float\ttimestamp:float\n'
RAW_ITEM = ('item_id:token\ttitle:token_seq\tbrand:token_seq\tcategories:token_seq\t'
            'description:token_seq\n')
ML_100K_WHEEL = 'recbole==1.2.1'       # [ours: real data for who reaches nothing but PyPI]
ML_100K_SHA256 = {'.inter': '4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff',
                  '.item': '51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532'}
SUFFIXES = ('.inter', '.item')
SIZES = {'beauty': (10553, 6086, 94148), 'toys': (11268, 7309, 95420),
         'tools': (9245, 6198, 73250), 'office': (3260, 1583, 36544),  # [paper], less the padding
         'ml-100k': (938, 1008, 54413)}                                # row; [ours: measured]
MIN_RATING, CORE = 4.0, 5              # [paper]
AMAZON_TEXT = ['title', 'brand', 'categories']     # [ours: what the authors' source holds]
MAX_UNPACKED = 2 << 30                 # bytes [ours: 20 times a set of 2 million rows]
MAX_LINE = 1 << 20                     # bytes of a raw record [ours: no honest record is longer]
MAX_CELL = 1 << 24                     # letters [ours: the csv module's 2 ** 17 are less than that]
CHUNK = 256                            # rows [ours: measured; more of them leave the CPU cache]
ALIASES = {'user_id': ('reviewer_id', 'customer_id', 'user'),         # [ours: what public sets
           'item_id': ('parent_asin', 'asin', 'movie_id', 'product_id', 'book_id', 'business_id',
                       'article_id', 'item'),                         # call them]
           'rating': ('overall', 'stars', 'score'),
           'title': ('movie_title', 'book_title', 'product_name', 'name')}
NO_NUMBER = {'', 'na', 'n/a', 'null', 'none'}      # [ours: what tools write for a missing one]
NO_TEXT = {'nan', 'null', 'none'}                  # [ours: likewise; NA may be a brand]
# open_text's surrogates as letters of Windows-1252, which leaves five bytes free: those are control
# characters as in Latin-1, so that no two bytes become one letter
WINDOWS = {0xdc00 + byte: chr(byte) if byte in b'\x81\x8d\x8f\x90\x9d' else
           bytes([byte]).decode('cp1252') for byte in range(128, 256)}


def note(text, kind='note'):
    """One line on stderr, where it does not mix with results."""
    print(f'{kind}: {text}', file=sys.stderr)


def listed(names, most=8):
    """'a, b, c and 4 more', for messages."""
    names = [repr(str(name))[1:-1][:40] for name in names]      # one line, whatever the bytes
    more = f' and {len(names) - most} more' if len(names) > most else ''
    return (', '.join(names[:most]) or 'nothing') + more


def receive(url, file, size, timeout):
    """One request for what file still lacks of url; a requests.ConnectionError is worth another."""
    at = file.seek(0, os.SEEK_END)
    headers = {'Accept-Encoding': 'identity'} | ({'Range': f'bytes={at}-'} if at else {})
    with requests.get(url, stream=True, timeout=timeout, headers=headers) as answer:
        code, piece = answer.status_code, answer.headers.get('Content-Range', '')
        goes_on = code == 206 and piece.startswith(f'bytes {at}-')
        if code in (200, 206, 416) and not goes_on:
            at = file.truncate(0)                # Range is not known here, or leads nowhere
        if code in (206, 408, 416, 429) and not goes_on or code >= 500:
            raise requests.ConnectionError(f'{code} {answer.reason}', response=answer)
        answer.raise_for_status()
        due = at + int(answer.headers.get('Content-Length', 0))
        for block in answer.iter_content(1 << 16):
            at += file.write(block)
            if sys.stderr.isatty():
                print(f'\r{url}: {at >> 20} of {due >> 20} MB', end='', file=sys.stderr)
            if size and at > size:               # an answer without end must not fill the disk
                return
    if at < due:
        raise requests.ConnectionError(f'{at} bytes came, {due} were announced')


def download(url, path, sha256=None, size=None, *, tries=4, pause=.5, timeout=(10, 60)):
    """Fetches url to path: streamed into a .part, verified, renamed; or OSError and no file.

    Broken connections, 429 and 5xx are tried again until `tries` in a row brought nothing new,
    after `pause` seconds doubled each time or what Retry-After asks, a minute at most; a server
    that knows Range sends only the rest. Each call has a .part of its own: two at once neither
    mix nor wait. After a failure it stays only where a sha256 will judge it, as
    path.<sha256>.part; the next call takes it over by a rename, which only one can win.
    timeout: seconds to connect, and between two pieces.
    """
    part, kept = f'{path}.{os.urandom(4).hex()}.part', sha256 and f'{path}.{sha256[:16]}.part'
    failed = furthest = 0
    try:
        with contextlib.suppress(OSError):
            os.rename(kept or '', part)
        with open(part, 'a+b') as file:
            while True:
                try:
                    receive(url, file, size, timeout)
                    break
                except (requests.ConnectionError, requests.Timeout,
                        requests.exceptions.ChunkedEncodingError) as error:
                    at = file.seek(0, os.SEEK_END)
                    failed, furthest = (1, at) if at > furthest else (failed + 1, furthest)
                    if failed == tries:
                        raise
                    asked = getattr(error.response, 'headers', {}).get('Retry-After', '')
                    wait = int(asked) if asked.isdecimal() else pause * 2 ** (failed - 1)
                    time.sleep(min(wait, 60))
            kept = None                          # all of it came: right, or of no use
            if size and file.tell() != size:
                raise OSError(f'{file.tell()} bytes came, {size} were expected')
            file.seek(0)
            found = hashlib.file_digest(file, 'sha256').hexdigest()
            if sha256 and found != sha256:
                raise OSError(f'SHA-256 is {found}, expected {sha256}')
        os.replace(part, path)
    except (OSError, ValueError) as error:       # requests' own errors are OSErrors
        raise OSError(f'{url}: {" ".join(str(error).split())}') from None
    finally:
        if sys.stderr.isatty():
            print(file=sys.stderr)
        with contextlib.suppress(OSError):
            if kept and os.path.getsize(part):
                os.replace(part, kept)
            else:
                os.remove(part)


@contextlib.contextmanager
def scratch_folder(folder):
    """A temporary folder inside folder, so that a rename out of it is atomic; always removed."""
    try:
        os.makedirs(folder, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix='.part-', dir=folder)
    except OSError as error:
        raise OSError(f'cannot write into {folder} ({error.strerror}); '
                      'name another folder with --data') from None
    with scratch as path:
        yield path


def unpack(archive, suffix, path):
    """Streams the one member of a zip whose name ends in suffix to path.

    The member's own path is never used, so nothing can land elsewhere; its size is bounded;
    its CRC is checked by zipfile. ValueError if the zip is damaged or holds something else.
    """
    name = os.path.basename(archive)
    try:
        with zipfile.ZipFile(archive) as box:
            found = [member for member in box.infolist() if member.filename.endswith(suffix)
                     and not os.path.basename(member.filename).startswith('.')]
            if len(found) != 1:
                raise ValueError(f'{name}: expected one *{suffix} in it, found '
                                 f'{len(found)} among {listed(box.namelist())}')
            # only deflate is unpacked in bounded pieces by zipfile
            if found[0].file_size > MAX_UNPACKED or found[0].compress_type not in (0, 8):
                raise ValueError(f'{name}: refused, *{suffix} in it would unpack to '
                                 f'{found[0].file_size:,} bytes (zip method '
                                 f'{found[0].compress_type})')
            with box.open(found[0]) as source, open(path, 'wb') as file:
                shutil.copyfileobj(source, file, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise ValueError(f'{name}: not a sound zip ({error})') from None


def from_zip(dataset, scratch, paths):
    """An Amazon set out of RecBole's zip."""
    archive = os.path.join(scratch, ZIPS[dataset])
    download(AMAZON_URL + ZIPS[dataset], archive)
    for path, suffix in zip(paths, SUFFIXES):
        unpack(archive, suffix, path)


def convert(source, path, header, parse, row):
    """Streams a gz file of one record a line into an atomic file; ValueError if it is damaged.

    parse: a line to its record; row: the record to its cells, or None to leave it out. A line
    that either cannot take is skipped and counted.
    """
    name, bad = os.path.basename(source), 0
    try:
        with gzip.open(source) as lines, open(path, 'w', encoding='utf-8', errors='replace') \
                as file, warnings.catch_warnings():
            warnings.simplefilter('ignore')      # odd escapes in a literal
            file.write(header)
            while line := lines.readline(MAX_LINE):
                try:
                    cells = row(parse(line.decode()))
                except (ValueError, SyntaxError, TypeError, KeyError, AttributeError,
                        MemoryError, RecursionError):      # nested too deep
                    bad += 1
                    continue
                if cells:
                    cells = (' '.join(str(cell).split()) for cell in cells)
                    file.write('\t'.join(cells) + '\n')
                if lines.tell() > MAX_UNPACKED:
                    raise ValueError(f'{name}: refused, unpacks to over {MAX_UNPACKED:,} bytes')
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f'{name}: not a sound gz file ({error})') from None
    if bad:
        note(f'{name}: {bad} malformed lines skipped')


def from_raw(dataset, scratch, paths):
    """An Amazon set out of the raw files of 2014, whose items have a description as well.

    Reviews are JSON, items Python literals, which are read and never run. The reviews are the
    5-core of all ratings, and that holds the 5-core of the high ones. Only reviewed items stay.
    """
    name, reviewed = ZIPS[dataset][len('Amazon_'):-len('.zip')], set()
    sources = [os.path.join(scratch, f'{kind}.json.gz')
               for kind in (f'reviews_{name}_5', f'meta_{name}')]
    for source in sources:
        download(RAW_URL + os.path.basename(source), source)

    def review(record):
        cells = (record['reviewerID'], record['asin'], float(record['overall']),
                 record['unixReviewTime'])
        reviewed.add(record['asin'])
        return cells

    def literal(line):
        asin = re.search("'asin': '(.*?)'", line)      # spares most of them the slow way
        return ast.literal_eval(line) if not asin or asin[1] in reviewed else {'asin': None}

    def item(record):
        if record['asin'] in reviewed:
            names = [name for path in record.get('categories') or [] for name in path]
            return (record['asin'], record.get('title') or '', record.get('brand') or '',
                    ', '.join(dict.fromkeys(names)), record.get('description') or '')
    convert(sources[0], paths[0], RAW_REVIEW, json.loads, review)
    convert(sources[1], paths[1], RAW_ITEM, literal, item)
    if not reviewed:
        raise ValueError(f'{os.path.basename(sources[0])}: no reviews in it')


def from_wheel(dataset, scratch, paths):
    """ml-100k out of a wheel that pip downloads, installing nothing."""
    command = [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps',
               '--disable-pip-version-check', '--only-binary=:all:', '--dest', scratch,
               ML_100K_WHEEL]
    ran = subprocess.run(command, capture_output=True, text=True, errors='replace')
    wheels = [name for name in os.listdir(scratch) if name.endswith('.whl')]
    if ran.returncode or not wheels:
        said = (ran.stderr.strip() or 'no wheel came').splitlines()[-1]
        raise OSError(f'pip download {ML_100K_WHEEL} failed: {said}')
    for path, suffix in zip(paths, SUFFIXES):
        unpack(os.path.join(scratch, wheels[0]), os.path.basename(path), path)
        with open(path, 'rb') as file:
            found = hashlib.file_digest(file, 'sha256').hexdigest()
        if found != ML_100K_SHA256[suffix]:
            raise ValueError(f'{dataset}{suffix} in {ML_100K_WHEEL}: SHA-256 is {found}, '
                             f'expected {ML_100K_SHA256[suffix]}')


def fetch(dataset, scratch):
    """Brings a dataset's two files into scratch from the first source that can; their paths."""
    paths = [os.path.join(scratch, FOLDERS[dataset] + suffix) for suffix in SUFFIXES]
    errors = []
    for source in (from_wheel,) if dataset == 'ml-100k' else (from_zip, from_raw):
        try:
            source(dataset, scratch, paths)
            if errors:
                note(f'{dataset}: from the second source, because {errors[0]}')
            return paths
        except (ValueError, OSError) as error:
            errors.append(str(error))
    raise OSError(f'{dataset}: no source has it: {"; ".join(errors)}')


def dataset_files(dataset, folder):
    """Paths of a dataset's .inter and .item file, fetched if one is missing: both or neither."""
    home = os.path.join(folder, FOLDERS[dataset])
    paths = [os.path.join(home, FOLDERS[dataset] + suffix) for suffix in SUFFIXES]
    if not all(map(os.path.isfile, paths)):
        with scratch_folder(folder) as scratch:
            try:
                fresh = fetch(dataset, scratch)
                os.makedirs(home, exist_ok=True)
                for source, path in zip(fresh, paths):
                    os.replace(source, path)
            except (ValueError, OSError) as error:
                raise OSError(f'{error}; place {paths[0]} and .item beside it by hand') from None
    return paths


def open_text(path):
    """A text file, plain or gz, UTF-8 or by its mark UTF-16; bytes that are not UTF-8 become lone
    surrogates, which WINDOWS translates."""
    with open(path, 'rb') as file:
        opener = gzip.open if file.read(2) == b'\x1f\x8b' else open
    with opener(path, 'rb') as file:
        wide = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    encoding, errors = ('utf-16', 'replace') if wide else ('utf-8-sig', 'surrogateescape')
    return opener(path, 'rt', encoding=encoding, errors=errors, newline='')


def unquote(cell):
    """A cell without quotes around it, as pandas and R write them into TSV."""
    found = re.fullmatch('"((?:[^"]|"")*)"', cell)
    return found[1].replace('""', '"') if found else cell


def read_rows(path):
    """Yields the header, then the rows, as lists of strings; blank lines are skipped.

    The delimiter is the one that each of the first lines holds most of, of equals the header: a
    title's commas are not in every line. Errors: ValueError naming the line.
    """
    line = 0
    try:
        with open_text(path) as file:
            header = next((text for text in file if text.strip()), '')
            more = list(itertools.islice(file, 4))
            first = [header, *filter(str.strip, more)]
            delimiter = max('\t,;|', key=lambda sign: (min(line.count(sign) for line in first),
                                                       header.count(sign)))
            quotes, atomic = delimiter in ',;', re.search(':(token|float)', header)
            csv.field_size_limit(MAX_CELL)
            # strict: else a quote never closed would swallow the rows behind it unseen
            reader = csv.reader(itertools.chain([header], more, file), delimiter=delimiter,
                                quoting=csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE,
                                skipinitialspace=quotes, strict=True)
            for row in reader:
                if row:
                    bare = quotes or atomic or '"' not in ''.join(row)
                    yield row if bare else list(map(unquote, row))
                line = reader.line_num
    except csv.Error as error:
        raise ValueError(f'{path}, line {line + 1}: {error}; quotes must be closed, and a quote '
                         'inside quotes doubled') from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f'{path}: damaged gz file ({error})') from None


def to_number(text):
    """A float; NaN where the number is missing, -inf where it is none."""
    if text.strip().lower() in NO_NUMBER:
        return np.nan
    try:
        return float(text.replace(',', '.'))
    except ValueError:
        return -np.inf


def plain(name):
    """A column's name as it is compared: 'userId', 'User ID' and 'user_id' are one."""
    return re.sub(r'[\W_]', '', name.lower())


def find_column(columns, name):
    """Index of a column, by its name or else by one of its ALIASES; -1 if there is none."""
    exact = [column for column, _ in columns]
    if name in exact:
        return exact.index(name)
    found = [plain(column) for column in exact]
    wanted = map(plain, (name, *ALIASES.get(name, ())))
    return next((found.index(one) for one in wanted if one in found), -1)


def position_names(rows):
    """Names for the columns of a file without header, by its first rows: user, item, rating, of
    which no item holds a blank and the rating is a number or missing, or else item, title. None
    where the first may be a header: it holds no number."""
    numbers = [[to_number(cell) for cell in row] for row in rows]      # NaN: missing, -inf: none
    size = len(rows[0])
    if size < 2 or not np.isfinite(numbers[0]).any():
        return None
    due = slice(2, 3) if size > 2 else slice(2)            # columns that hold numbers
    pairs = all(len(row) == size and ' ' not in row[1].strip() and -np.inf not in some[due]
                for row, some in zip(rows, numbers))
    if pairs and size <= 4:
        return ['user_id', 'item_id', 'rating', 'timestamp'][:size]
    return ['item_id', 'title', *(f'column_{n}' for n in range(3, size + 1))]


def read_table(path, tell=True):
    """[(name, type)] of the columns, type '' where none is given, and the rows below the header.
    tell: say so where there is none."""
    rows = read_rows(path)
    first = next(rows, None)
    if first is None:
        raise ValueError(f'{path}: empty; expected a header line and rows')
    kinds = r'(.*?)(?::(token|token_seq|float|float_seq))?'
    columns = [re.fullmatch(kinds, cell.translate(WINDOWS).strip(), re.S).groups('')
               for cell in first]
    if find_column(columns, 'user_id') < 0 and find_column(columns, 'item_id') < 0:
        more = list(itertools.islice(rows, 4))
        if names := position_names([first, *more]):
            if tell:
                note(f'{path}: no header, so its columns are {listed(names)}')
            return [(name, '') for name in names], itertools.chain([first], more, rows)
        rows = itertools.chain(more, rows)
    return columns, rows


def need_column(columns, name, path):
    found = find_column(columns, name)
    if found < 0:
        raise ValueError(f'{path}: no column {name}; found {listed(c for c, _ in columns)}')
    return found


def read_columns(rows, width, picked, path):
    """Codes (E,) and distinct strings of each picked column, in order of first appearance.

    Rows of another width than the header's are dropped and counted. What is not UTF-8 becomes
    Windows-1252, and is counted, so that two strings may be the same. No Python code runs per cell:
    a defaultdict whose default is its own length numbers new strings in C.
    """
    tables = [defaultdict() for _ in picked]
    for table in tables:
        table.default_factory = table.__len__
    codes, ragged = [[np.empty(0, np.int32)] for _ in picked], 0
    while chunk := list(itertools.islice(rows, CHUNK)):
        whole = [row for row in chunk if len(row) == width]
        ragged += len(chunk) - len(whole)
        cells = list(zip(*whole)) or [()] * width
        for column, table, out in zip(picked, tables, codes):
            out.append(np.fromiter(map(table.__getitem__, cells[column]), np.int32, len(whole)))
    if not tables[0]:
        raise ValueError(f'{path}: no rows with the {width} fields of the header, {ragged} others')
    if ragged:
        note(f'{path}: {ragged} rows dropped, they have not the {width} fields of the header')
    strings = [[string if string.isascii() else string.translate(WINDOWS) for string in table]
               for table in tables]
    if bad := sum(a != b for one in zip(strings, tables) for a, b in zip(*one)):
        note(f'{path}: {bad} ids or texts hold bytes that are not UTF-8, read as Windows-1252')
    return [np.concatenate(out) for out in codes], strings


def without_blanks(codes, ids):
    """Codes (E,) and distinct ids, blanks around the ids gone: with them some may be the same."""
    bare = [name.strip() for name in ids]
    place = {name: n for n, name in enumerate(dict.fromkeys(bare))}
    if len(place) == len(ids):
        return codes, bare
    return np.array([place[name] for name in bare], np.int32)[codes], list(place)


def read_interactions(path, min_rating, tell=True):
    """Rows: user and item codes (E,), whether positive (E,), the users' and items' ids, the number
    of rows in the file. tell: say so where no rating tells positives from others."""
    columns, rows = read_table(path)
    picked = [need_column(columns, name, path) for name in ('user_id', 'item_id')]
    rating = find_column(columns, 'rating')
    picked += [rating] if rating >= 0 else []
    codes, strings = read_columns(rows, len(columns), picked, path)
    codes[:2], strings[:2] = zip(*map(without_blanks, codes, strings[:2]))
    whole = positive = np.ones(len(codes[0]), bool)
    for code, ids in zip(codes, strings[:2]):
        whole = whole & np.array([name != '' for name in ids])[code]
    if rating >= 0:
        ratings = np.array([to_number(text) for text in strings[2]])[codes[2]]
        whole &= ratings != -np.inf
        positive = ~(ratings < min_rating)                 # a missing one, NaN, is positive
        if missing := np.isnan(ratings[whole]).sum():
            note(f'{path}: {missing} rows without a rating count as positive')
    elif tell:
        note(f'{path}: no rating among {listed(name for name, _ in columns)}, so that every row '
             'counts as positive')
    if not whole.all():
        note(f'{path}: {(~whole).sum()} rows dropped: no id, or a rating that is no number')
    return (codes[0][whole], codes[1][whole], positive[whole], strings[0], strings[1],
            len(whole))


def is_text(kind, cells):
    """Whether a column is text: by its type, else if not every cell is a number or missing."""
    if kind:
        return kind.startswith('token')
    return any(to_number(cell) == -np.inf for cell in cells)


def pick_text(columns, cells, text_columns, path):
    """Indices of the text columns: those asked for by name, else the title, even if it is 1984,
    and every other but the id and numbers."""
    if text_columns is None:
        item_id, title = (find_column(columns, name) for name in ('item_id', 'title'))
        return [c for c, (_, kind) in enumerate(columns)
                if c != item_id and (c == title or is_text(kind, cells[c]))]
    return [need_column(columns, name, path) for name in text_columns]


def read_items(path, text_columns=None):
    """The distinct items' ids, texts and titles, in the order of the file."""
    columns, rows = read_table(path)
    item_id = need_column(columns, 'item_id', path)
    codes, strings = read_columns(rows, len(columns), range(len(columns)), path)
    codes[item_id], strings[item_id] = without_blanks(codes[item_id], strings[item_id])
    picked = pick_text(columns, strings, text_columns, path)
    if not picked:
        raise ValueError(f'{path}: no text column beside item_id; found '
                         f'{listed(name for name, _ in columns)}')
    named = find_column(columns, 'title')
    title = named if named >= 0 else picked[0]

    # codes count up in order of first appearance, so these are the rows and ids in file order
    rows = np.unique(codes[item_id], return_index=True)[1]
    if repeated := len(codes[item_id]) - len(rows):
        note(f'{path}: {repeated} rows repeat an item_id; the first of each counts')

    def joined(chosen):
        cells = ([strings[c][code] for code in codes[c][rows]] for c in chosen)
        return [' '.join(' '.join(part for part in parts if part.lower() not in NO_TEXT).split())
                for parts in zip(*cells)]
    return strings[item_id], joined(picked), joined([title])


def pick_file(paths, usual, expected):
    """The one path, or the one among several that has a usual name."""
    if len(paths) > 1:
        paths = [path for path in paths if re.search(usual, os.path.basename(path).lower())]
    if len(paths) != 1:
        raise ValueError(expected)
    return paths[0]


def own_files(folder):
    """The interaction and the item file of a user's folder, told apart by their columns."""
    seen = {}
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        kinds = r'[^.].*\.(inter|item|csv|tsv|txt)(\.gz)?'
        if re.fullmatch(kinds, name, re.IGNORECASE) and os.path.isfile(path):
            try:
                seen[path], _ = read_table(path, tell=False)
            except ValueError as error:
                seen[path] = [(str(error).removeprefix(f'{path}: '), '')]
    users = [path for path, columns in seen.items() if find_column(columns, 'user_id') >= 0]
    items = [path for path, columns in seen.items() if find_column(columns, 'item_id') >= 0]
    found = '; '.join(f'{os.path.basename(path)} ({listed(name for name, _ in columns)})'
                      for path, columns in seen.items()) or listed(sorted(os.listdir(folder)))
    kinds = (f'as .inter, .item, .csv, .tsv or .txt, plain or gz; found {found}; where a header is '
             'missing, its names are guessed')
    texts = [path for path in items if path not in users]
    titled = [path for path in texts if find_column(seen[path], 'title') >= 0]
    return (pick_file([path for path in users if path in items],
                      r'^(interactions|ratings|inter)\.|\.inter(\.gz)?$',
                      f'{folder}: expected one file with columns user_id and item_id, {kinds}'),
            pick_file(titled or texts, r'^(items?|movies|books|products)\.|\.item(\.gz)?$',
                      f'{folder}: expected one file with item_id and text, no user_id, {kinds}'))


def k_core(users, items, core):
    """Positions (E',) of the pairs that stay when users and items with fewer than `core` pairs
    go, again and again until nothing goes. users, items (E,): codes from 0, no pair twice."""
    kept = np.arange(len(users))
    while True:
        u, i = users[kept], items[kept]
        good = (np.bincount(u)[u] >= core) & (np.bincount(i)[i] >= core)
        if good.all():
            return kept
        kept = kept[good]


def renumber(codes):
    """codes (E,) without gaps, order kept, and the old code of each new one."""
    used = np.bincount(codes) > 0
    return (np.cumsum(used) - 1)[codes], np.flatnonzero(used)


def restricted(users, items, old_users, old_items):
    """csr (U, I) float32 of the pairs (E,) whose user and item renumber() kept."""
    def new(codes, old):
        place = np.full(1 + max(codes.max(initial=0), old.max()), -1)
        place[old] = np.arange(len(old))
        return place[codes]
    users, items = new(users, old_users), new(items, old_items)
    both = (users >= 0) & (items >= 0)
    return sp.csr_matrix((np.ones(both.sum(), np.float32), (users[both], items[both])),
                         (len(old_users), len(old_items)))


def check_sizes(dataset, found):
    if found != SIZES[dataset]:
        note('{}: {:,} users, {:,} items, {:,} interactions after filtering; the table says '
             '{:,}, {:,}, {:,}'.format(dataset, *found, *SIZES[dataset]), 'warning')


def load(dataset, folder='data', *, min_rating=MIN_RATING, core=CORE, text_columns=None):
    """A dataset, downloaded if missing, filtered.

    dataset: beauty, toys, tools, office, ml-100k (in or into folder), or a folder of your own.
    min_rating: lower ones go. core: users and items with fewer interactions go; 0 or 1: none.
    text_columns: names of the item file's columns to join to a text; None takes title, brand
    and categories of the Amazon sets, every text column of other data.
    Returns interactions (csr U x I, float32 ones), texts [I], titles [I], the ids of users [U] and
    items [I] as strings, and low (csr U x I): what these users rated lower, which no model sees,
    but nobody should be recommended. ValueError or OSError, one line each.
    """
    if dataset not in FOLDERS and not os.path.isdir(dataset):
        raise ValueError(f'{dataset}: neither a folder nor one of {listed(FOLDERS)}')
    own = dataset not in FOLDERS
    inter, item = own_files(dataset) if own else dataset_files(dataset, folder)
    if dataset in ZIPS and text_columns is None:
        text_columns = AMAZON_TEXT
    users, items, positive, user_ids, item_ids, n_rows = read_interactions(inter, min_rating, own)
    ids, texts, titles = read_items(item, text_columns)
    place = {name: n for n, name in enumerate(ids)}
    items = np.array([place.get(name, -1) for name in item_ids])[items]
    there = items >= 0
    if there.size and not there.any():
        raise ValueError(f'{inter}: none of its items is in {item}; the ids here are such as '
                         f'{listed(item_ids[:3])}, there {listed(ids[:3])}')
    known, low = there & positive, there & ~positive
    pairs = np.sort(users[known] * np.int64(len(texts)) + items[known])
    pairs = pairs[np.diff(pairs, prepend=-1) > 0]     # np.unique, by hashing, is 50 times slower
    kept = pairs[k_core(*np.divmod(pairs, len(texts)), core)]
    told = (f'{n_rows:,} rows: {positive.sum():,} positive, {known.sum():,} of them with items of '
            f'the item file, {len(pairs):,} distinct, {len(kept):,} in the {core}-core')
    if not len(kept):
        raise ValueError(f'{inter}: nothing left of {told}; lower min_rating or core')
    rows, old_users = renumber(kept // len(texts))
    columns, old_items = renumber(kept % len(texts))
    interactions = sp.csr_matrix((np.ones(len(kept), np.float32), (rows, columns)))  # U x I
    lower = restricted(users[low], items[low], old_users, old_items)                 # U x I
    if own and len(kept) < n_rows:
        note(f'{dataset}: {told}')
    if not own and (min_rating, core) == (MIN_RATING, CORE):
        check_sizes(dataset, (*interactions.shape, interactions.nnz))
    few = np.diff(interactions.indptr) < 3
    if few.any():
        note(f'{few.sum()} users with fewer than 3 interactions: with 2 they train and test, with '
             '1 they only train')
    texts = [texts[row] for row in old_items]
    if blank := texts.count(''):
        note(f'{blank} items without text')
    return (interactions, texts, [titles[row] for row in old_items],
            [user_ids[code] for code in old_users], [ids[row] for row in old_items], lower)


def split(interactions, rng):
    """Leave-one-out in random order: train, valid, test, each csr U x I.

    Of a user's interactions one drawn at random tests and another validates; a user with two
    has no validation item, a user with one only trains. rng: numpy Generator.
    """
    start, count = interactions.indptr[:-1], np.diff(interactions.indptr)       # (U,)
    test = rng.integers(0, np.maximum(count, 1))
    valid = rng.integers(0, np.maximum(count - 1, 1))
    valid += valid >= test                        # uniform over the others
    part = np.zeros(interactions.nnz, np.int8)    # 0 train, 1 valid, 2 test
    part[(start + test)[count >= 2]] = 2
    part[(start + valid)[count >= 3]] = 1
    users = np.repeat(np.arange(len(count)), count)
    return [sp.csr_matrix((interactions.data[part == p], (users[part == p],
                           interactions.indices[part == p])), shape=interactions.shape)
            for p in range(3)]


def thin(train, share, rng):
    """train (csr U x I) without `share` (0..1) of each user's interactions, drawn at random.

    A count that is not whole is rounded up or down by a draw, so that all users together lose
    `share`; at least one interaction of each stays. What goes is as if it had never been seen: it
    may be drawn as a negative, and it is ranked. share 0 draws nothing.
    """
    if not share:
        return train
    count = np.diff(train.indptr)                                               # (U,)
    going = np.minimum((share * count + rng.random(len(count))).astype(int), count - 1)
    users = np.repeat(np.arange(len(count)), count)
    order = np.lexsort((rng.random(train.nnz), users))       # each row's interactions, shuffled
    stays = order[np.arange(train.nnz) - train.indptr[users] >= going[users]]
    users, items = users[stays], train.indices[stays]
    return sp.csr_matrix((np.ones(len(stays), np.float32), (users, items)), train.shape)
