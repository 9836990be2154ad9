"""LLMRec: a chat model's answers about users and items become training pairs and side features.

    OPENAI_BASE_URL=http://127.0.0.1:8080/v1 python experiments/llmrec.py --chat-model NAME \
        --dataset office --results experiments/llm.jsonl
    python experiments/llmrec.py --parts none --dataset office --results experiments/llm.jsonl
    python experiments/report.py table experiments/llm.jsonl --against text --show cost \
        --only model=llmrec

Wei et al. 2024, arXiv 2311.00423; nothing is copied from the authors' code. Up to 2 U + I calls:

pairs       a user: history and the first 10 items by a base model (LightGCN with --strategy var,
            or as the flags of run.py say) -> the most and the least liked, a training pair
profiles    a user: history -> age group, gender, liked and disliked categories, budget; one text
attributes  an item: text -> brand, category, use, audience; four texts

--parts names those to use, none asks nothing. --users n: only n users and n items, drawn by the
seed, are asked about; the others have no pair, and zeros for features. --encoder encodes the
answers, and the items' own texts, which are always used. The images of the original are left out.

    table E (U+I, K); R_u, R_i: means over a user's items, an item's users
    z = 1/3 (E + A E + A^2 E),  A E = [R_u E_items; R_i E_users]
    side of item features F:  v = R_u (F W), [v; R_i v];  of profiles P:  v = R_i (P W), [R_u v; v]
    output = z + .02 text + 2.8 profile + .005 of each attribute, each side's rows of length 1
    loss = BPR(output) + .012 sum over attributes BPR(profile, attribute) + 1e-4 BPR(text)
           + 1e-5 / (2 B) |rows of the output in the batch|^2

A BPR takes B users with an item and a negative each, and, behind them, the LLM's pairs of a tenth
of these users. --prune drops 71 % of its losses: easy keeps the smallest, as the paper's noise
pruning says, hard the largest [authors' code]. --regulariser inverse divides by each |rows|^2
instead of multiplying [authors' code]. Validation says when to stop; the authors' code asks the
test set. Trains on the CPU.
"""
import copy
import functools
import sys

import chat
import numpy as np
import run
import scipy.sparse as sp
import torch
from run import embed, early_stopping, llminit, models
from torch.nn import functional as F

PARTS = 'pairs', 'profiles', 'attributes'
PROFILE = 'age group', 'gender', 'liked categories', 'disliked categories', 'budget'
ATTRIBUTES = 'brand', 'category', 'use', 'audience'
CANDIDATES, K, LAYERS, TENTH, KEPT = 10, 64, 2, .1, .29                    # [authors' code]
RATES = {'text': .02, 'profile': 2.8, **dict.fromkeys(ATTRIBUTES, .005)}   # [authors' code]
HOW = {'batch': 1024, 'epochs': 1000, 'patience': 20}               # [authors' code; patience ours]


def in_form(names):
    """How an answer with these fields should look."""
    lines = '\n'.join(f'{name}: ...' for name in names)
    return f'Answer with these {len(names)} lines, a few words in each place of the dots:\n{lines}'


def questions(history, candidates, texts):
    """{part: [(question, most tokens of its answer)]}: history and candidates: lines about each
    user, (n,) and () or (n,), texts of items (m,)."""
    return {
        'pairs': [(f'{past}\n\nCandidates:\n{lines}\n\nWrite on the first line the number of the '
                   'candidate that the person likes most, on the second line the number of the one '
                   'that the person likes least.', 60) for past, lines in zip(history, candidates)],
        'profiles': [(f'{past}\n\nDescribe the person. {in_form(PROFILE)}', 120)
                     for past in history],
        'attributes': [(f'A catalogue describes an item so:\n{chat.quoted(text, 400)}\n\n'
                        f'Describe the item. {in_form(ATTRIBUTES)}', 100) for text in texts]}


def vectors_of(texts, rows, n, args):
    """(n, N) vectors of texts in the given rows, zeros in the others and for ''; or None if all
    are ''."""
    some = [(row, text) for row, text in zip(rows, texts) if text]
    if not some:
        return None
    places, texts = zip(*some)
    found = embed.encode(texts, args.encoder, cache=args.cache, device=models.join(
        args.device)[1])
    vectors = np.zeros((n, found.shape[1]), np.float32)
    vectors[list(places)] = found
    return vectors


def asked(args, loaded, train, base):
    """What the answers give: side features {name: (U or I, N)}, the pairs (U, 2) of items, -1 for
    none, and what a row says of the answers. loaded: of data.load; base: of chat.based, for
    pairs."""
    users, items = (chat.sample(np.arange(n), args.asked, args.seed) for n in train.shape)
    texts, titles, order = loaded[1], chat.names(loaded), loaded[0]
    order, best = order if args.split == 'last' else None, ()
    if base:
        best, _ = models.recommend(base['users'][users], base['items'], train[users], CANDIDATES)
        best = [row[row >= 0] for row in best]
    asking = questions([chat.history_of(user, train, order, titles) for user in users],
                       [chat.listed([titles[i] for i in row]) for row in best],
                       [texts[i] or titles[i] for i in items])
    asking = {part: some for part, some in asking.items() if part in args.parts}
    answers, cost = chat.ask([one for some in asking.values() for one in some], args.chat,
                             args.cache)
    count = {part: dict.fromkeys(('whole', 'half', 'nonsense'), 0) for part in asking}
    sides, pairs, left = {}, np.full((train.shape[0], 2), -1), iter(answers)

    def note(part, found, whole):
        count[part]['whole' if found == whole else 'half' if found else 'nonsense'] += 1
    for user, row, _ in zip(users, best, asking.get('pairs', ())):
        found = chat.named(next(left), [titles[i] for i in row])
        note('pairs', min(len(found), 2), 2)
        if len(found) > 1:
            pairs[user] = row[found[0]], row[found[-1]]
    for part, names, rows, n in (('profiles', PROFILE, users, train.shape[0]),
                                 ('attributes', ATTRIBUTES, items, train.shape[1])):
        found = [chat.fields(next(left), names) for _ in asking.get(part, ())]
        for one in found:
            note(part, sum(map(bool, one.values())), len(names))
        texts = {name: [one[name] for one in found] for name in names}
        if part == 'profiles':
            texts = {'profile': ['; '.join(f'{name}: {said}' for name, said in one.items() if said)
                                 for one in found]}
        sides |= {name: vectors_of(some, rows, n, args) for name, some in texts.items()}
    print(f'chat: answers {count}; {cost["refused"]} refused, {cost["retries"]} asked again',
          file=sys.stderr)
    return ({name: side for name, side in sides.items() if side is not None}, pairs,
            {**cost, 'answers': count})


class Mean(torch.autograd.Function):
    """block @ x, csr (M, N) and (N, K), with the gradient of x."""

    @staticmethod
    def forward(ctx, x, block):
        ctx.block = block
        return models.spmm(block, x.detach())

    @staticmethod
    def backward(ctx, grad):
        return models.spmm(ctx.block.tocsc(), grad.contiguous()), None


def row_mean(matrix):
    """csr (M, N) with rows that sum to 1; empty rows stay."""
    size = np.maximum(np.diff(matrix.indptr), 1).astype(np.float32)
    return sp.csr_matrix(sp.diags(1 / size) @ matrix, dtype=np.float32)


class LLMRec(torch.nn.Module):
    """train csr (U, I); sides {name of RATES: (I, N), of 'profile' (U, N)}; rng: of the start."""

    def __init__(self, train, sides, rng, prune='none', regulariser='square'):
        super().__init__()
        self.n_users, self.prune, self.regulariser = train.shape[0], prune, regulariser
        self.to_user, self.to_item = row_mean(train), row_mean(train.T.tocsr())
        self.graph = sp.bmat([[None, self.to_user], [self.to_item, None]], 'csr')
        self.table = torch.nn.Parameter(torch.from_numpy(np.concatenate(
            [llminit.xavier(rng, n, K) for n in train.shape])))
        self.maps = torch.nn.ParameterDict({
            name: torch.from_numpy(llminit.xavier(rng, side.shape[1], K))
            for name, side in sides.items()})
        # rows of zeros change nothing: without them a sample costs little
        rows = {name: np.flatnonzero(side.any(1)) for name, side in sides.items()}
        self.features = {name: torch.from_numpy(side[rows[name]]) for name, side in sides.items()}
        self.first = {name: (self.to_item if name == 'profile' else self.to_user)[:, some]
                      for name, some in rows.items()}

    def forward(self):
        """Outputs (U+I, K), and the sides {name: (U+I, K)}, of length 1 or zero."""
        x = total = self.table
        for _ in range(LAYERS):
            x = Mean.apply(x, self.graph)
            total = total + x
        output, sides = total / (LAYERS + 1), {}
        for name, features in self.features.items():
            across = Mean.apply(features @ self.maps[name], self.first[name])
            back = Mean.apply(across, self.to_user if name == 'profile' else self.to_item)
            both = (back, across) if name == 'profile' else (across, back)
            sides[name] = F.normalize(torch.cat(both))
            output = output + RATES[name] * sides[name]
        return output, sides

    @torch.no_grad()
    def embeddings(self):
        """Users (U, K) and items (I, K)."""
        output, _ = self()
        return output.split([self.n_users, len(output) - self.n_users])

    def loss(self, users, positives, negatives, B):
        """Of the rows (B + pairs,) of a batch, the pairs of the LLM behind -> scalar."""
        output, sides = self()
        i, j = positives + self.n_users, negatives + self.n_users

        def bpr(left, right):
            losses = F.softplus((left[users] * (right[j] - right[i])).sum(1))
            if self.prune == 'none':
                return losses.mean()
            kept = max(1, int(KEPT * len(losses)))
            return losses.topk(kept, largest=self.prune == 'hard').values.mean()
        loss = bpr(output, output) + 1e-4 * bpr(sides['text'], sides['text'])
        for name in ATTRIBUTES:
            if name in sides and 'profile' in sides:
                loss = loss + .012 * bpr(sides['profile'], sides[name])
        squares = torch.stack([output[rows].square().sum() / 2 for rows in (users, i, j)])
        squares = 1 / squares if self.regulariser == 'inverse' else squares
        return loss + 1e-5 / B * squares.sum()


def batches(train, pairs, size, rng):
    """Yields an epoch's users, positives and negatives, (3, B + pairs), the LLM's pairs of a tenth
    of the users behind, and B, size or less."""
    degree = np.diff(train.indptr)
    active = np.flatnonzero((degree > 0) & (degree < train.shape[1]))
    for _ in range(-(-train.nnz // size)):
        users = rng.choice(active, min(size, len(active)), replace=False)
        positives = train.indices[train.indptr[users] + rng.integers(0, degree[users])]
        negatives = models.sample_negatives(train, users, rng)
        more = rng.permutation(users)[:int(TENTH * len(users))]
        more = more[pairs[more, 0] >= 0]
        triple = np.stack([users, positives, negatives]), np.stack([more, *pairs[more].T])
        yield torch.from_numpy(np.concatenate(triple, 1).astype(np.int64)), len(users)


def fit_llmrec(args, train, valid, vectors, rng, device, log, sides={}, pairs=None):
    """Users (U, K), items (I, K) of the best epoch on validation, curve, {'K', 'parameters'}."""
    train, seen = train.sorted_indices(), train if args.seen == 'mask' else None
    pairs = np.full((train.shape[0], 2), -1) if pairs is None else pairs
    how = args.training
    model = LLMRec(train, {'text': vectors, **sides}, rng, how['prune'], how['regulariser'])
    adam = torch.optim.AdamW(model.parameters(), lr=how['lr'])

    def epoch():
        total = []
        for triple, B in batches(train, pairs, how['batch'], rng):
            adam.zero_grad()
            loss = model.loss(*triple, B)
            loss.backward()
            adam.step()
            total.append(loss.item())
        return np.mean(total)
    curve = early_stopping(model, epoch, valid, seen, how['epochs'], how['patience'], log)
    return *model.embeddings(), curve, {'K': K, 'parameters': sum(p.numel() for p in
                                                                  model.parameters())}


def run_one(args, known, log, fit):
    """A row in the table and a row in the results file, as run.run() gives."""
    sides, pairs, cost, seconds = {}, None, {'calls': 0, 'tokens': 0, 'seconds': 0.}, 0.
    if args.parts:
        base = chat.based(args, known, log, fit) if 'pairs' in args.parts else None
        loaded, (train, _, _), _ = run.prepare(args, known, np.random.default_rng(args.seed),
                                               models.join(args.device)[1])
        sides, pairs, cost = asked(args, loaded, train, base)
        seconds = cost['seconds'] + (base['seconds'] if base else 0)     # of cached calls too
    told, row = run.run(args, known, log, functools.partial(fit_llmrec, sides=sides, pairs=pairs))
    row['seconds'] += seconds
    told['seconds'] = round(row['seconds'])
    return told, {**row, **cost, 'seconds': row['seconds']}


def parse(argv):
    """The command line -> the arguments of each run, as run.parse gives, and --results."""
    p = llminit.Parser(prog='llmrec.py', allow_abbrev=False, description=__doc__.split('\n')[0],
                       epilog='Other flags: python experiments/run.py --help')
    p.add_argument('--chat-model', metavar='NAME')
    p.add_argument('--users', type=llminit.number(int, 1), help='a sample, and of items as many')
    p.add_argument('--parts', default=','.join(PARTS), metavar='A,B', help='or none')
    p.add_argument('--prune', default='none', choices=('none', 'easy', 'hard'))
    p.add_argument('--regulariser', default='square', choices=('square', 'inverse'))
    p.add_argument('--rate', default=1e-3, type=llminit.number(float, 1e-9, 1),
                   help="AdamW's; 1e-4 in the authors' code")
    own, rest = p.parse_known_args(argv)
    parts = [] if own.parts == 'none' else own.parts.split(',')
    if not {*parts} <= {*PARTS}:
        p.error(f'--parts {own.parts}: expected some of {",".join(PARTS)}, or none')
    if parts and not own.chat_model:
        p.error('--chat-model is needed, but for --parts none')
    parts = [part for part in PARTS if part in parts]
    cells, path = run.parse(rest)
    for cell in cells:
        if cell.strategy == 'none' or cell.encoder.endswith('.npz'):
            p.error('--strategy none and files of vectors encode no answers')
        base = copy.copy(cell)
        training = {**HOW, 'lr': own.rate, 'mask_seen': cell.seen == 'mask', 'prune': own.prune,
                    'regulariser': own.regulariser}
        if parts:
            training |= {'chat': own.chat_model, 'endpoint': chat.endpoint.server()[0],
                         'users': own.users}
        if 'pairs' in parts:
            training['base'] = f'{cell.model} {cell.strategy} K={cell.dim} {cell.training}'
        vars(cell).update(base=base, model='llmrec', strategy='+'.join(['text', *parts]), dim=K,
                          epochs=HOW['epochs'], device='cpu',
                          chat=own.chat_model, asked=own.users, parts=parts, training=training,
                          flags=list(argv))
    return cells, path


if __name__ == '__main__':
    sys.exit(run.command(sys.argv[1:], parse, run=run_one))
