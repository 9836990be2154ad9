"""Texts per second of our MPNet and of sentence-transformers' defaults, side by side in one run.

    python experiments/encoders.py --data DIR --folder MPNET --peer PEER/bin/python

Same weights, same texts: --texts of a dataset's item texts, evenly spaced. MPNET is the whole
folder sentence-transformers/all-mpnet-base-v2 of the hub, since the peer reads its modules.json.
The peer has an environment of its own, as sentence-transformers brings much along:

    python -m venv PEER
    PEER/bin/pip install torch==2.13.0 sentence-transformers==6.2.0

With --endpoint MODEL the texts also go to the server of OPENAI_BASE_URL, as endpoint.py sends
them. infinity-emb serves the same folder on loopback, again from its own environment:

    python -m venv SERVER
    SERVER/bin/pip install "infinity-emb[server,torch]==0.0.78" torch==2.13.0 "transformers<4.49" \
        "optimum<2" "typer<0.16" "click<8.2"
    SERVER/bin/infinity_emb v2 --model-id MPNET --served-model-name mpnet --engine torch \
        --device cpu --no-bettertransformer --url-prefix /v1 --port 7997
    OPENAI_BASE_URL=http://127.0.0.1:7997/v1 python experiments/encoders.py ... --endpoint mpnet

Ours and theirs take turns, `--rounds` times, each in a process of its own with the same threads.
Theirs is timed without loading the model, ours with it. What is printed are medians over the
rounds, by the clock and by CPU seconds (which other programs disturb less), the ratio of both to
the peer, and of all texts the least cosine and the largest difference of a number to the peer's
float32, or to ours where there is no peer. bfloat16 is run where the CPU multiplies it fast (AMX,
AVX512-BF16), elsewhere with --dtype bfloat16: slow there, with the same rounding. Not a test: it
asserts nothing.
"""
import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from bench import ROOT, measure

sys.path.insert(0, str(ROOT))
PEER = '''
import json, sys, time
import numpy as np, torch
from sentence_transformers import SentenceTransformer
texts, out, folder, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
model = SentenceTransformer(folder, device='cpu')
texts = json.load(open(texts))
wall, cpu = time.perf_counter(), time.process_time()
vectors = model.encode(texts, normalize_embeddings=True, show_progress_bar=False)
print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu]))
np.save(out, vectors)
'''


def ours(texts, out, folder, threads, dtype):
    """Encodes once, in dtype or by openai:MODEL; prints the seconds by the clock and of CPU."""
    import embed
    import endpoint
    import torch
    torch.set_num_threads(threads)
    texts = json.loads(Path(texts).read_text())
    wall, cpu = time.perf_counter(), time.process_time()
    if dtype.startswith('openai:'):
        with tempfile.TemporaryDirectory() as answers:
            vectors = endpoint.embeddings(texts, dtype.removeprefix('openai:'), Path(answers))
    else:
        vectors = embed.run_mpnet(texts, folder, 'cpu', dtype)
    print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu]))
    np.save(out, vectors)


def table(runs, vectors, n_texts):
    """A Markdown row for each encoder, beside the peer if there is one, else beside float32."""
    middle = {name: [statistics.median(column) for column in zip(*rounds)]
              for name, rounds in runs.items()}
    beside = 'peer' if 'peer' in runs else 'float32'
    oracle = vectors[beside]
    print(f'| encoder | texts/s | CPU s | speed to {beside} | by CPU s | least cosine | '
          'largest difference |')
    print('| --- ' * 7 + '|')
    for name, (wall, cpu) in middle.items():
        print(f'| {name} | {n_texts / wall:.1f} | {cpu:.1f} | {middle[beside][0] / wall:.2f} | '
              f'{middle[beside][1] / cpu:.2f} | {(vectors[name] * oracle).sum(1).min():.6f} | '
              f'{np.abs(vectors[name] - oracle).max():.1g} |')


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--data', default='data', help='where the datasets lie')
    p.add_argument('--dataset', default='beauty')
    p.add_argument('--folder', required=True, help='all-mpnet-base-v2, all files of the hub')
    p.add_argument('--texts', type=int, default=400, help='how many, evenly spaced')
    p.add_argument('--rounds', type=int, default=3)
    p.add_argument('--threads', type=int, default=2)
    p.add_argument('--dtype', choices=('bfloat16',), help='also where it is slow')
    p.add_argument('--peer', help='python of an environment with sentence-transformers')
    p.add_argument('--endpoint', metavar='MODEL', help='also by the server of OPENAI_BASE_URL')
    p.add_argument('--only', nargs=3, help=argparse.SUPPRESS)    # one round of ours, here
    args = p.parse_args()
    if args.only:
        texts, out, dtype = args.only
        return ours(texts, out, args.folder, args.threads, dtype)
    import data
    import embed
    texts = data.load(args.dataset, args.data)[1]
    texts = [texts[n] for n in np.linspace(0, len(texts) - 1, args.texts).astype(int)]
    runs = {}
    with tempfile.TemporaryDirectory() as scratch:
        file, out = Path(scratch, 'texts.json'), {}
        file.write_text(json.dumps(texts))
        names = ['peer'] * bool(args.peer) + ['float32', args.dtype or embed.fast_dtype('cpu')]
        names += [f'openai:{args.endpoint}'] * bool(args.endpoint)
        for _ in range(args.rounds):
            for name in dict.fromkeys(names):
                out[name] = Path(scratch, f'{names.index(name)}.npy')
                command = ((args.peer, '-c', PEER, file, out[name], args.folder, args.threads)
                           if name == 'peer' else
                           (sys.executable, __file__, *sys.argv[1:], '--only', file, out[name],
                            name))
                runs.setdefault(name, []).append(measure(command))
        table(runs, {name: np.load(path) for name, path in out.items()}, len(texts))


if __name__ == '__main__':
    main()
