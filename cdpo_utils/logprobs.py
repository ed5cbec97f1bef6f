"""Log-probabilities of answers: **summed** over the answer's tokens, its end-of-turn token included, prompt excluded.

`response_logps` is the general way, one sequence per answer. `enumerate_logps` scores a whole finite set of answers per
prompt; answers share their prefixes in a trie, so that each prefix is run once. Both return natural logarithms.
"""

import itertools

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from cdpo_utils import ranks
from cdpo_utils.trunk import known_below

MULTIPLE = 8  # of a length: whole registers, so that the bench's 14 tokens take less time as 16
BATCH_TOKENS = 4096  # run at once: what a layer of a small model makes of them stays in a core's cache
MAX_LOGITS = 2**27  # numbers held at once, half a GiB in float32
NO_LOGITS = torch.empty(0, dtype=torch.long)  # positions whose logits a model is to return: those of none
HEAD_ROWS = 256  # tokens whose logits over a large vocabulary are held at once
PLAIN_HEADS = {"llama", "mistral", "qwen2", "qwen3"}  # architectures whose logits are hidden @ weight.T, nothing more


def pad(sequences, value, side="left", multiple=1):
    """Stack lists of ids into (n, longest, rounded up to a `multiple`); returns ids and attention mask."""
    lengths = np.array([len(seq) for seq in sequences])
    width = -(-lengths.max() // multiple) * multiple
    place = np.arange(width)[None]
    mask = place >= (width - lengths)[:, None] if side == "left" else place < lengths[:, None]
    ids = np.full(mask.shape, value)
    ids[mask] = np.fromiter(itertools.chain.from_iterable(sequences), int, lengths.sum())
    return torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))


def token_batches(order, lengths, batch_tokens):
    """Cut `order` (indices, shortest sequence first) into batches of at most `batch_tokens` tokens after padding to a
    `MULTIPLE`; one sequence at least."""
    width = [-(-length // MULTIPLE) * MULTIPLE for length in lengths]
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and width[order[stop]] * (stop + 1 - start) <= batch_tokens:
            stop += 1
        yield order[start:stop]
        start = stop


@torch.no_grad()
def response_logps(model, prompt_ids, response_ids, pad_id=0, batch_tokens=BATCH_TOKENS):
    """Sum of log pi(token | before) over each response, float32 numpy (n,). Lists of token ids, one per sequence.

    Sequences are batched by length, at most `batch_tokens` tokens at once, so little is padded; fewer for a large
    vocabulary, whose logits fill the memory first. The model is put in eval mode and returned to the mode it had:
    dropout would perturb a frozen reference.
    """
    was_training = model.training
    model.eval()
    weight = frozen_head(model)
    if weight is None:
        batch_tokens = min(batch_tokens, MAX_LOGITS // model.config.vocab_size)
    lengths = [len(p) + len(r) for p, r in zip(prompt_ids, response_ids, strict=True)]
    order = np.argsort(lengths, kind="stable")
    out = np.empty(len(lengths), np.float32)
    for rows in token_batches(order, lengths, batch_tokens):
        ids, mask = pad([prompt_ids[i] + response_ids[i] for i in rows], pad_id, "right", MULTIPLE)
        starts = torch.tensor([len(prompt_ids[i]) for i in rows])
        is_response = mask * (torch.arange(mask.shape[1]) >= starts[:, None])
        ids, is_response = ids.to(model.device), is_response.to(model.device)
        with known_below(model, ids, mask):  # no answer can see the padding behind it
            if weight is None:
                logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
                logps = token_logps(logits.float(), ids[:, 1:]) * is_response[:, 1:]  # bf16's sums would be off by nats
            else:
                _, logps = marked_logps(model, weight, ids, is_response[:, 1:].bool(), use_cache=False)
        out[rows] = logps.sum(1).cpu().numpy()
    model.train(was_training)
    return out


def frozen_head(model):
    """The weight (vocabulary, width) of an output head that takes no gradient, where it is a matrix and nothing more
    and the vocabulary is too large to keep logits lightly; else None. Gathered, where FSDP has sharded it."""
    if model.config.model_type not in PLAIN_HEADS or model.config.vocab_size <= model.config.hidden_size:
        return None
    weight = model.get_output_embeddings().weight
    if weight.requires_grad and torch.is_grad_enabled():
        return None
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def marked_logps(model, weight, ids, marked, **inputs):
    """The model's output and log pi of each token where `marked` (n, length - 1) says so, zero elsewhere, float32.

    marked[:, t] speaks of token t + 1. The head `weight`, from `frozen_head`, is run on marked tokens only.
    """
    out = model(input_ids=ids, output_hidden_states=True, logits_to_keep=NO_LOGITS, **inputs)
    hidden = out.hidden_states[-1][:, :-1][marked]
    logps = TargetLogps.apply(hidden, weight, ids[:, 1:][marked])
    return out, torch.zeros(marked.shape, device=ids.device).masked_scatter(marked, logps)


class TargetLogps(torch.autograd.Function):
    """log softmax(hidden @ weight.T)[targets]: (n, width), (vocabulary, width), (n,) -> (n,), in float32.

    Logits are never kept: the slope in `hidden`, weight[target] - softmax @ weight, is `width` numbers a token, so it
    is written down while they are there. `weight` gets no gradient.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        logps = torch.empty(len(hidden), device=hidden.device)
        slope = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # Memory for one part's logits, filled again and again: new pages for each part took as long as a product.
        low = hidden.new_empty(min(HEAD_ROWS, len(hidden)), len(weight))
        high = low if low.dtype == torch.float32 else torch.empty_like(low, dtype=torch.float32)
        for start in range(0, len(hidden), HEAD_ROWS):
            rows = slice(start, min(start + HEAD_ROWS, len(hidden)))
            logits, rounded = high[: rows.stop - start], low[: rows.stop - start]
            torch.mm(hidden[rows], weight.T, out=rounded)
            logits.copy_(rounded)
            chosen, largest = logits.gather(-1, targets[rows, None]), logits.amax(-1, keepdim=True)
            total = logits.sub_(largest).exp_().sum(-1, keepdim=True)
            logps[rows] = (chosen - largest - total.log()).squeeze(-1)
            if slope is not None:
                rounded.copy_(logits.div_(total))
                slope[rows] = weight[targets[rows]] - rounded @ weight
        ctx.save_for_backward(slope)
        return logps

    @staticmethod
    def backward(ctx, grad):
        (slope,) = ctx.saved_tensors
        return grad[:, None].to(slope.dtype) * slope, None, None


def cached_logps(model, prompt_ids, answer_ids, cache, **settings):
    """`response_logps`, float64 (n,); each distinct (prompt, answer) is run once and kept in the dict `cache`.

    Several processes share the work, see `ranks`. `settings` go to `response_logps`.
    """
    keys = [(tuple(p), tuple(a)) for p, a in zip(prompt_ids, answer_ids, strict=True)]
    new = list(dict.fromkeys(key for key in keys if key not in cache))
    if new:
        mine = ranks.share(new)
        prompts, answers = ([list(ids) for ids in column] for column in (zip(*mine, strict=True) if mine else ((), ())))
        logps = response_logps(model, prompts, answers, **settings).tolist() if mine else []
        cache.update(ranks.merge(dict(zip(mine, logps, strict=True))))
    return np.array([cache[key] for key in keys])


def token_logps(logits, ids):
    """log softmax(logits)[ids] without storing the whole log-softmax: (batch, length)."""
    return logits.gather(-1, ids[..., None]).squeeze(-1) - torch.logsumexp(logits, -1)


def build_trie(answers):
    """Merge token sequences by common prefix. Returns token (N,), parent (N,), depth (N,) and the paths (A, longest).

    Node -1 stands for the end of the prompt. A path lists the nodes of one answer, padded with N.
    """
    node_of, token, parent, depth, paths = {}, [], [], [], []
    for answer in answers:
        here, path = -1, []
        for t in answer:
            if (here, t) not in node_of:
                node_of[here, t] = len(token)
                token.append(t)
                parent.append(here)
                depth.append(len(path))
            here = node_of[here, t]
            path.append(here)
        paths.append(path)
    width = max(map(len, paths))
    padded = np.array([path + [len(token)] * (width - len(path)) for path in paths])
    return np.array(token), np.array(parent), np.array(depth), padded


@torch.no_grad()
def enumerate_logps(model, prompt_ids, answer_ids, chunk=48, batch_tokens=BATCH_TOKENS):
    """log pi(answer | prompt) for every prompt and every answer of one shared set, float64 numpy (P, A).

    Answers are sorted and cut into chunks; each chunk is one trie, see `trie_logps`. Last tokens (end of turn) are
    scored but need not be run. Prompts are left-padded. Equality with `response_logps` is tested.
    """
    was_training = model.training
    model.eval()
    out = np.empty((len(prompt_ids), len(answer_ids)))
    order = sorted(range(len(answer_ids)), key=lambda j: answer_ids[j])
    for first in range(0, len(order), chunk):
        columns = order[first : first + chunk]
        trie = build_trie([answer_ids[j] for j in columns])
        per_batch = max(1, batch_tokens // (len(trie[0]) + max(map(len, prompt_ids))))
        for start in range(0, len(prompt_ids), per_batch):
            batch = prompt_ids[start : start + per_batch]
            out[start : start + len(batch), columns] = trie_logps(model, batch, trie).cpu().numpy()
    model.train(was_training)
    return out


def trie_logps(model, prompt_ids, trie):
    """log pi(answer | prompt), a float64 tensor (P, A) with its gradient, for the answers of one `build_trie`.

    The trie is laid out as one sequence behind the prompt, with a mask that shows a node its prompt and its ancestors.
    """
    token, parent, depth, paths = trie
    inner = np.isin(np.arange(len(token)), parent)  # leaves are scored, not run
    slot = np.cumsum(inner) - 1
    n = int(inner.sum())
    sees = np.eye(n, dtype=bool)
    for node in np.flatnonzero(inner):  # parents come before children
        if parent[node] >= 0:
            sees[slot[node]] |= sees[slot[parent[node]]]
    ids, mask = pad(prompt_ids, 0, side="left")
    b, p = ids.shape
    ids = torch.cat([ids, torch.tensor(token[inner]).expand(b, n)], 1)
    lengths = mask.sum(1, keepdim=True)
    positions = torch.cat([(mask.cumsum(1) - 1).clamp(min=0), lengths + torch.tensor(depth[inner])], 1)
    allowed = torch.zeros(b, 1, p + n, p + n, dtype=torch.bool)
    allowed[:, 0, :p, :p] = torch.ones(p, p, dtype=torch.bool).tril() & mask[:, None].bool()
    allowed[:, 0, p:, :p] = mask[:, None].bool()
    allowed[:, 0, p:, p:] = torch.tensor(sees)
    allowed |= torch.eye(p + n, dtype=torch.bool)  # a padding position sees itself, so that no softmax is empty
    bias = torch.zeros(allowed.shape, dtype=model.dtype).masked_fill(~allowed, torch.finfo(model.dtype).min)
    ids, positions, bias = (t.to(model.device) for t in (ids, positions, bias))
    logits = model(input_ids=ids, attention_mask=bias, position_ids=positions, use_cache=False).logits[:, p - 1 :]
    before = torch.tensor(np.where(parent >= 0, slot[parent] + 1, 0), device=logits.device)  # 0 is the prompt's end
    normaliser = torch.logsumexp(logits, -1)
    chosen = logits[:, before, torch.tensor(token, device=logits.device)] - normaliser[:, before]
    logps = torch.cat([chosen.double(), chosen.new_zeros(b, 1, dtype=torch.float64)], 1)
    return logps[:, torch.tensor(paths, device=logps.device)].sum(-1)
