"""Item texts to vectors by an OpenAI-compatible embeddings endpoint, in a file for --encoder.

    OPENAI_BASE_URL=http://127.0.0.1:7997/v1 python experiments/endpoint.py --model NAME \
        --dataset beauty --to vectors.npz
    python llminit.py --dataset beauty --encoder vectors.npz

Servers are vLLM, TEI, Ollama, infinity, OpenAI and others; OPENAI_API_KEY is sent if it is set.
Give the flags of the data as to llminit.py, so that the items are the same.

Answers are kept in vectors.npz.answers until vectors.npz is written: the same command, after it was
interrupted, asks for the rest only. Then they go, as a server may change its model behind the same
name and old answers would go on in silence. vectors.npz is a file that its owner sees: make it
again when the model changes. Only a path that is free, or holds an .npz, is written to.

The key is in no message and in no file, however the server echoes it: see redacted(). chat.py asks
its questions through post(), too.
"""
import argparse
import base64
import contextlib
import os
import re
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import requests
from requests.adapters import HTTPAdapter, Retry

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import embed  # noqa: E402

REQUEST_TEXTS = 32         # of a request [ours: TEI takes 32 by default]
TEXT_BYTES = 8000          # of a text [ours: a token has a byte or more, and OpenAI takes 8,191
                           # tokens a text and 300,000 a request]
SHORTEST_KEY = 10          # characters [ours: a made-up key such as EMPTY is no secret]
# What may stand between two characters of a key: no visible ASCII, or an escape for a blank.
GAP = (r'(?:[^!-~]|\\{1,4}[nrt\n]|\\{1,4}(?:u00|x)(?:0[9ad]|20|a0)|%(?:25){0,3}(?:0[9ad]|20)'
       r'|&#(?:9|10|13|32|x9|xa|xd|x20);|&nbsp;|<br ?/?>)*')


class EndpointError(OSError):
    """What went wrong, on one line without the key. status: that of the answer, or None."""

    def __init__(self, said, status=None):
        super().__init__(said)
        self.status = status


# ---- the server and its key -------------------------------------------------------------------

def server():
    """URL and key, or '', of the server that the environment names."""
    url = (os.environ.get('OPENAI_BASE_URL') or 'https://api.openai.com/v1').strip().rstrip('/')
    key = os.environ.get('OPENAI_API_KEY', '').strip()
    if not re.fullmatch(r'https?://[^\s@?#/]+(/[^\s@?#]*)?', url):
        raise ValueError('OPENAI_BASE_URL: expected http(s)://host/path without user or query')
    if not re.fullmatch('[!-~]*', key):
        raise ValueError('OPENAI_API_KEY: expected ASCII without blanks')
    return url, key


def spellings(secret):
    """A pattern for a secret with each character as it is or escaped in JSON, a URL or HTML, and
    blanks and line ends between them."""
    def of(char):
        code = ord(char)
        plain = r'\\{0,4}' * (char in '/"\\') + re.escape(char)
        entity = {'&': '&amp;|', '<': '&lt;|', '>': '&gt;|', '"': '&quot;|'}.get(char, '')
        return (rf'(?:{plain}|\\{{1,4}}(?:u00|x){code:02x}|%(?:25){{0,3}}{code:02x}'
                rf'|{entity}&#0{{0,4}}{code};|&#x0{{0,4}}{code:x};)')
    return GAP.join(map(of, secret))                 # no two of these fit the same text: else slow


def base64s(key):
    """What base64 shows of a key, wherever in the text it begins: the letters that depend on it."""
    for before in range(3):                          # bytes before it in its group of three
        text = base64.b64encode(bytes(before) + key.encode()).decode()
        inner = text[(0, 2, 3)[before]:(before + len(key)) * 8 // 6]
        yield inner
        yield inner.replace('+', '-').replace('/', '_')


def redacted(text):
    """A text from the server with *** for the key: plain in any case, with escapes of JSON, URLs
    and HTML, in base64 or hexadecimal, and broken by blanks and line ends."""
    _, key = server()
    if len(key) < SHORTEST_KEY:
        return text
    secrets = key, key.encode().hex(), *base64s(key)
    return re.sub('|'.join(map(spellings, secrets)), '***', text, flags=re.IGNORECASE)


def shown(text, most=300):
    """A text that stems from an answer, for a message: redacted, then cut, then escaped."""
    return embed.printable(redacted(str(text)), most)


def post(path, body, field):
    """The endpoint's JSON answer to body, a dict with this field, and the number of `retries`
    after 429, 5xx and connections that broke before an answer. EndpointError with its words."""
    url, key = server()
    busy = Retry(6, connect=1, backoff_factor=1, status_forcelist=(429, 500, 502, 503, 504),
                 allowed_methods=None, raise_on_status=False)
    busy.retry_after_max = 60                        # seconds; older urllib3 obey the server
    headers = {'Authorization': f'Bearer {key}'} if key else {}
    try:
        with requests.Session() as session:
            session.mount(url, HTTPAdapter(max_retries=busy))
            session.auth = lambda request: request   # none: requests would look into .netrc
            # a redirect could carry texts and key to another host
            answer = session.post(f'{url}/{path}', json=body, timeout=(10, 120), headers=headers,
                                  allow_redirects=False)
    except (OSError, ValueError) as error:           # ValueError: a URL that is none
        raise EndpointError(f'{shown(url)}/{path}: {shown(error)}') from None

    found = None
    with contextlib.suppress(ValueError, RecursionError):      # no JSON: its words are shown
        found = answer.json()
    if answer.status_code == 200 and isinstance(found, dict) and found.get(field):
        return found | {'retries': len(answer.raw.retries.history)}
    hint = '' if url.endswith('/v1') else '; OPENAI_BASE_URL mostly ends in /v1'
    raise EndpointError(f'{shown(url)}/{path}: {answer.status_code} {shown(answer.text)}{hint}',
                        answer.status_code)


# ---- embeddings -------------------------------------------------------------------------------

def read_rows(rows, n_texts):
    """(B, N) float32 of the rows of an answer: by their index, or as they come if none has one.
    ValueError, TypeError or LookupError if they are no numbers, or zero."""
    places = [row.get('index') or 0 for row in rows]           # some servers leave out the 0
    if any(places) and sorted(places) != list(range(n_texts)):
        raise ValueError(f'indices {places}')
    vectors = [rows[n]['embedding'] for n in np.argsort(places, kind='stable')]
    if all(isinstance(vector, str) for vector in vectors):
        vectors = [np.frombuffer(base64.b64decode(vector), '<f4') for vector in vectors]

    vectors = np.array(vectors, float)
    if vectors.ndim != 2 or len(vectors) != n_texts or not vectors.any(1).all():
        raise ValueError(f'not {n_texts} lists of numbers that are not all zero')
    if not (np.abs(vectors) <= np.finfo(np.float32).max).all():
        raise ValueError('NaN or infinity')
    return vectors.astype(np.float32)


def ask(texts, model):
    """(B, N) float32 vectors of a few texts. A request that is refused is halved: it may have too
    many texts, or one that is too long."""
    try:
        rows = post('embeddings', {'model': model, 'input': texts}, 'data')['data']
    except EndpointError as error:
        if error.status not in (400, 413, 422) or len(texts) == 1:
            begin = embed.printable(texts[0], 60)
            raise EndpointError(f'{error} ({len(texts)} texts from "{begin}" on)') from None
        half = len(texts) // 2
        return np.concatenate([ask(texts[:half], model), ask(texts[half:], model)])
    try:
        return read_rows(rows, len(texts))
    except (ValueError, TypeError, AttributeError, LookupError, OverflowError) as error:
        raise ValueError(f'{shown(server()[0])} answers with {shown(error)}') from None


def embeddings(texts, model, folder):
    """(I, N) float32 vectors of texts [I] from a model of the endpoint; equal texts are asked for
    once, and each answer is kept in folder. A text is cut to TEXT_BYTES; an empty one, which many
    servers refuse, is sent as ' '."""
    raw = [text.encode('utf8', 'replace') for text in texts]
    n_cut = sum(len(text) > TEXT_BYTES for text in raw)
    if n_cut:
        print(f'note: {n_cut:,} texts cut to {TEXT_BYTES:,} bytes', file=sys.stderr)
    sent = [text[:TEXT_BYTES].decode('utf8', 'ignore') or ' ' for text in raw]
    row_of = {text: row for row, text in enumerate(dict.fromkeys(sent))}
    distinct = [*row_of]

    answers = []                                     # (B, N) each
    start = time.monotonic()
    for n in range(0, len(distinct), REQUEST_TEXTS):
        some = distinct[n:n + REQUEST_TEXTS]
        answers.append(embed.cached(some, folder, model, (server()[0], model),
                                    lambda some: ask(some, model)))
        done = n + len(some)
        embed.progress(f'{embed.printable(model)}: {done:,} of {len(distinct):,} texts',
                       done / len(distinct), start)
    if len({answer.shape[1] for answer in answers}) > 1:
        raise ValueError(f'{embed.printable(model)} answers with vectors of several lengths; if '
                         f'the model is new, remove {embed.printable(folder)}')
    return np.concatenate(answers)[[row_of[text] for text in sent]]


# ---- the file ---------------------------------------------------------------------------------

def check_target(path):
    """OSError unless path is free, or holds an .npz, and ends in .npz."""
    if path.suffix != '.npz':
        raise OSError(f'{embed.printable(path)}: expected a name that ends in .npz')
    if not os.path.lexists(path):
        return
    with contextlib.suppress(OSError, zipfile.BadZipFile), zipfile.ZipFile(path) as box:
        if path.is_file() and all(name.endswith('.npy') for name in box.namelist()):
            return
    raise OSError(f'{embed.printable(path)} holds something that is no .npz; choose another name')


def write_npz(path, ids, vectors):
    """Write ids [I] and vectors (I, N) under a temporary name, then rename."""
    part = path.with_name(f'{path.name}.{os.urandom(4).hex()}.part')
    try:
        with open(part, 'wb') as file:
            np.savez(file, ids=np.array(ids, str), vectors=vectors)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def forget(folder):
    """Remove the answers that embeddings() kept in folder, and it if nothing else is in it."""
    for path in (folder / 'vectors').glob('*.npy'):
        path.unlink()
    with contextlib.suppress(OSError):
        (folder / 'vectors').rmdir()
        folder.rmdir()


def parser():
    """The parser of the command line. The flags of the data are those of llminit.py."""
    p = argparse.ArgumentParser(prog='endpoint.py', allow_abbrev=False,
                                description=__doc__.split('\n')[0])
    p.add_argument('--model', required=True, metavar='NAME', help='as the server calls it')
    p.add_argument('--to', required=True, type=Path, metavar='VECTORS.npz')
    p.add_argument('--dataset', required=True, help='a known set, or your folder')
    p.add_argument('--data', default='data', metavar='DIR', help='where the known sets lie')
    p.add_argument('--min-rating', default=4., type=float)
    p.add_argument('--core', default=5, type=int)
    p.add_argument('--columns', default=[], nargs='+', metavar='NAME=THEIRS')
    p.add_argument('--text-columns', metavar='A,B', type=lambda text: text.split(','))
    return p


def main(argv=None):
    """From the texts of a dataset to a file of vectors."""
    args = parser().parse_args(argv)
    odd = [pair for pair in args.columns if '=' not in pair]
    if odd:
        raise ValueError(f'--columns {embed.printable(odd[0])}: expected NAME=THEIRS')
    path = embed.expanded(args.to, '--to')
    server()                                         # what is wrong shows before the long work
    check_target(path)
    path.parent.mkdir(parents=True, exist_ok=True)

    _, texts, _, _, ids, _ = data.load(
        str(embed.expanded(args.dataset, '--dataset')), str(embed.expanded(args.data, '--data')),
        min_rating=args.min_rating, core=args.core, text_columns=args.text_columns,
        columns=dict(pair.split('=', 1) for pair in args.columns))
    answers = path.with_name(f'{path.name}.answers')
    vectors = embeddings(texts, args.model, answers)
    check_target(path)                               # hours may have passed
    write_npz(path, ids, vectors)
    forget(answers)
    print(f'{embed.printable(path)}: {len(ids):,} ids, vectors of {vectors.shape[1]} numbers')


def command(argv=None):
    """main() with errors of one line -> exit code."""
    try:
        main(argv)
    except KeyboardInterrupt:
        print('\nendpoint.py: interrupted; the same command goes on', file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f'endpoint.py: error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(command())
