"""LLMRank: a chat model orders the 20 best items of a trained recommender. No training of its own.

    OPENAI_BASE_URL=http://127.0.0.1:8080/v1 python experiments/llmrank.py --chat-model NAME \
        --dataset office --users 200 --results experiments/llm.jsonl
    python experiments/report.py table experiments/llm.jsonl --against cf --show cost \
        --only model=llmrank

Hou et al. 2023, arXiv 2305.08845; nothing is copied from the authors' code. One call for each
user and shuffle: the titles of the user's training items and, shuffled, of the first 20 items by
the base model (LightGCN with --strategy var, or as the flags of run.py say; seen items masked as in
--seen). The items that the answer names come first, then the others in the order of the question;
with --shuffles B the ranks of B shuffles are averaged. All other items keep their places behind, so
Recall@20 cannot change. Which item is the true one plays no part in any question.

Four rows over the same users, by strategy:
cf       the order of the base model
random   the order of the (first) question: what an answer gets that repeats it
answers  the order of the chat model
ceiling  the true item first if it is among the 20: the ceiling, Recall@20 of the base model

--users n: n users drawn by the seed. Rows of other users are not compared with these by report.py,
because the split that they are tested on is another.
"""
import sys

import chat
import numpy as np
import run
import scipy.sparse as sp
from run import llminit, models

STRATEGIES = 'cf', 'random', 'answers', 'ceiling'
CANDIDATES = 20              # [LLMRank's code]
TOKENS = 15 * CANDIDATES     # of an answer at most [ours: a number on a line has 3]


def question(history, titles):
    """The question about candidates with these titles; history: what chat.history_of gives."""
    return (f'{history}\n\nCandidates:\n{chat.listed(titles)}\n\nOrder these {len(titles)} '
            'candidates by how likely the person chooses each of them next, the most likely first. '
            'Write the number of one candidate on each line.')


def shuffles(users, n_candidates, seed, count):
    """(n, count, C) places: a permutation for each of users (n,) and each shuffle, which depends
    on the user and the seed only."""
    return np.array([[np.random.default_rng([seed, user, b]).permutation(n_candidates)
                      for b in range(count)] for user in users])


def ordered(given, found):
    """The order after an answer: given (C,) places in the order of the question, found: what
    chat.named gives -> (C,) places, those named first."""
    rest = [n for n in range(len(given)) if n not in found]
    return given[np.array(found + rest, int)]


def ask(args, base, users, candidates, given):
    """(n, C) places by the mean rank of the answers, of equal ones the base model's order; and what
    a row says of the answers. candidates (n, C) items; given (n, B, C)."""
    loaded, train = base['loaded'], base['parts'][0]
    titles, order = chat.names(loaded), loaded[0] if args.split == 'last' else None
    questions = []
    for user, items, perms in zip(users, candidates, given):
        history = chat.history_of(user, train, order, titles)
        questions += [(question(history, [titles[i] for i in items[perm]]), TOKENS)
                      for perm in perms]
    answers, cost = chat.ask(questions, args.chat, args.cache)
    ranks, count = np.zeros(candidates.shape), dict.fromkeys(
        ('whole', 'half', 'nonsense', 'repeated', 'ascending'), 0)
    for n, answer in enumerate(answers):
        row, perm = n // given.shape[1], given[n // given.shape[1], n % given.shape[1]]
        found = chat.named(answer, [titles[i] for i in candidates[row][perm]])
        after = ordered(perm, found)
        ranks[row, after] += np.arange(len(perm))
        count['repeated'] += bool(found) and bool((after == perm).all())
        count['ascending'] += len(found) > 1 and found == sorted(found)
        count['whole' if len(found) == len(perm) else 'half' if found else 'nonsense'] += 1
    print(f'chat: of {len(answers):,} answers {count["whole"]} name every candidate, '
          f'{count["half"]} some, {count["nonsense"]} none; {count["repeated"]} '
          f'({count["repeated"] / len(answers):.0%}) repeat the order that they were given, '
          f'{count["ascending"]} go down the list with gaps or without; {cost["refused"]} refused, '
          f'{cost["retries"]} asked again', file=sys.stderr)
    return np.argsort(ranks, axis=1, kind='stable'), {**cost, 'answers': count}


def score(order, target, ranks):
    """Recall@10 and NDCG@10, (n,) each: order (n, C) items, which come first; target (n,), and its
    rank by the base model, (n,), where it is not among them."""
    hit = order == target[:, None]
    ranks = np.where(hit.any(1), hit.argmax(1), np.maximum(ranks, order.shape[1]))
    return (ranks < 10).astype(float), np.where(ranks < 10, 1 / np.log2(2. + ranks), 0)


def run_one(args, known, log, fit):
    """A row in the table and a row in the results file, as run.run() gives."""
    base = chat.based(args, known, log, fit)
    train, valid, test = base['parts']
    seen = train + valid if args.seen == 'mask' else sp.csr_matrix(train.shape)
    users = chat.sample(test.nonzero()[0], args.asked, args.seed)
    target = test[users].indices                                                    # (n,)
    test = sp.csr_matrix((np.ones(len(users), np.float32), (users, target)), test.shape)
    ranks = models.target_ranks(base['users'], base['items'], test, seen)           # (n,)
    n_best = min(CANDIDATES, train.shape[1] - np.diff(seen[users].indptr).max())
    best, _ = models.recommend(base['users'][users], base['items'], seen[users], n_best)
    given = shuffles(users, n_best, args.seed, args.shuffles)                       # (n, B, C)
    cost = {'calls': 0, 'tokens': 0, 'seconds': 0.}
    places = np.tile(np.arange(n_best), (len(users), 1))
    if args.strategy == 'random':
        places = given[:, 0]
    elif args.strategy == 'answers':
        places, cost = ask(args, base, users, best, given)
    elif args.strategy == 'ceiling':
        places = np.argsort(best != target[:, None], axis=1, kind='stable')
    scores = score(np.take_along_axis(best, places, 1), target, ranks)
    seconds = base['seconds'] + cost.pop('seconds')        # those of the calls, also of cached ones
    model = {**base['model'], **cost}
    return (llminit.result_row(args, model['K'], scores, base['curve'], seconds, args.flags),
            run.result(args, scores, base['curve'], model, seconds, train, test, base['device']))


def parse(argv):
    """The command line -> the arguments of each run, as run.parse gives, and --results."""
    p = llminit.Parser(prog='llmrank.py', allow_abbrev=False, description=__doc__.split('\n')[0],
                       epilog='Other flags: python experiments/run.py --help')
    p.add_argument('--chat-model', required=True, metavar='NAME')
    p.add_argument('--users', type=llminit.number(int, 1), help='a sample; default: all')
    p.add_argument('--shuffles', default=1, type=llminit.number(int, 1), help='calls for each user')
    own, rest = p.parse_known_args(argv)
    cells, path = run.parse(rest)
    training = {'chat': own.chat_model, 'endpoint': chat.endpoint.server()[0], 'users': own.users,
                'shuffles': own.shuffles}
    return [llminit.argparse.Namespace(**{
        **vars(cell), 'base': cell, 'model': 'llmrank', 'strategy': strategy,
        'chat': own.chat_model, 'asked': own.users, 'shuffles': own.shuffles,
        'training': {**cell.training, 'base': f'{cell.model} {cell.strategy}', **training},
        'flags': list(argv)}) for cell in cells for strategy in STRATEGIES], path


if __name__ == '__main__':
    sys.exit(run.command(sys.argv[1:], parse, run=run_one))
