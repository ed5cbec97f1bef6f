"""Tokenizers and models: the bench's small Llama, a pretrained model with LoRA, and sampling from either."""

import contextlib
import hashlib
from copy import deepcopy

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LogitsProcessor,
    PreTrainedTokenizerFast,
)
from transformers.cache_utils import DynamicCache, DynamicLayer, LinearAttentionCacheLayerMixin

from cdpo_utils.logprobs import BATCH_TOKENS, MULTIPLE, NO_LOGITS, pad, token_batches

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|> {{ message['content'] }} "
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
SPECIAL = ["<|pad|>", "<|end|>", "<|unk|>", "<|user|>", "<|assistant|>"]
BLOCK = 256  # tokens of a vocabulary that are summed first, in `InverseTransform`
LARGE = 4096  # tokens of a vocabulary from which one random number a token of it is too many


def word_tokenizer(texts):
    """One token per word of `texts`, sorted, behind the special tokens; with a chat template. For the bench."""
    words = sorted({word for text in texts for word in text.split()})
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(SPECIAL + words)}, unk_token="<|unk|>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<|pad|>", eos_token="<|end|>", unk_token="<|unk|>",
        chat_template=CHAT_TEMPLATE, padding_side="left", clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _small_config(tokenizer, width, layers, **more):
    """Plain attention: on sequences of a dozen tokens it is faster than the fused kernel."""
    return LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=8, head_dim=max(8, width // 8), initializer_range=width**-0.5,
        max_position_embeddings=128, tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, attn_implementation="eager", **more,
    )  # fmt: skip


def small_llama(tokenizer, seed, width=64, layers=1):
    """A Llama with random weights, 45 thousand parameters by default.

    The usual initial spread of 0.02 is meant for widths of thousands; at width 64 training then starts on a plateau.
    """
    torch.manual_seed(seed)
    return LlamaForCausalLM(_small_config(tokenizer, width, layers))


def encode_prompts(tokenizer, prompts):
    """Token ids of each prompt as a user turn, up to and including the assistant's opening."""
    chats = [[{"role": "user", "content": p}] for p in prompts]
    return tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=True)["input_ids"]


def encode_answers(tokenizer, answers):
    """Token ids of each answer with the end-of-turn token behind it."""
    return [ids + [tokenizer.eos_token_id] for ids in tokenizer(list(answers), add_special_tokens=False)["input_ids"]]


def small_scorer(tokenizer, seed, width=64, layers=1):
    """A Llama of the same size with a scalar head, for rewards and costs."""
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(_small_config(tokenizer, width, layers, num_labels=1))


@torch.no_grad()
def sample(model, tokenizer, prompt_ids, n, seed, max_new_tokens, temperature=1.0, batch_rows=4096):
    """`n` sampled answers per prompt: texts and token ids (end of turn included), each a list of P lists of n.

    Plain sampling: no top-k, no top-p. Rows are left-padded and batched by prompt length; a prompt is read once for its
    `n` answers. The random stream depends on `seed` alone.
    """
    was_training = model.training
    model.eval()
    torch.manual_seed(seed)
    order = np.argsort([len(p) for p in prompt_ids], kind="stable")
    texts, ids = [[] for _ in prompt_ids], [[] for _ in prompt_ids]
    per_batch, at_once = max(1, batch_rows // n), min(n, batch_rows)
    plainly = dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0, repetition_penalty=1.0)
    if model.config.vocab_size >= LARGE:
        plainly = dict(do_sample=False, repetition_penalty=1.0, logits_processor=[InverseTransform(temperature)])
    for start in range(0, len(order), per_batch):
        rows = order[start : start + per_batch]
        prompts, mask = (t.to(model.device) for t in pad([prompt_ids[i] for i in rows], tokenizer.pad_token_id))
        for k in range(0, n, at_once):  # more than one part only where `n` alone is more than `batch_rows`
            m = min(at_once, n - k)
            out = model.generate(
                prompts.repeat_interleave(m, 0), attention_mask=mask.repeat_interleave(m, 0),
                past_key_values=_read(model, prompts[:, :-1], mask[:, :-1], m, max_new_tokens),
                max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
                use_cache=True, **plainly,  # trainers switch the cache off in the model's config
            )[:, prompts.shape[1] :]  # fmt: skip
            answers = [_until(row, tokenizer.eos_token_id) for row in out.tolist()]
            decoded = [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]
            for j, i in enumerate(rows):
                ids[i] += answers[j * m : (j + 1) * m]
                texts[i] += decoded[j * m : (j + 1) * m]
    model.train(was_training)
    return texts, ids


class InverseTransform(LogitsProcessor):
    """Sampling by one uniform number a row: the first token whose cumulative probability exceeds it, made the only
    possible one. `generate` itself draws a number for every token of the vocabulary, a quarter of its time."""

    def __init__(self, temperature=1.0):
        self.temperature = temperature

    def __call__(self, input_ids, scores):
        (rows, size), block = scores.shape, min(BLOCK, scores.shape[1])
        weights = scores.new_zeros(rows, -(-size // block) * block)
        torch.sub(scores, scores.amax(-1, keepdim=True), out=weights[:, :size])
        weights[:, :size].div_(self.temperature).exp_()
        # in two stages, the block and the token in it: half the time of a cumulative sum over the whole vocabulary
        weights = weights.view(rows, -1, block)
        upto = weights.sum(-1, dtype=torch.float64).cumsum(-1)
        drawn = torch.rand(rows, 1, dtype=torch.float64, device=scores.device) * upto[:, -1:]
        which = torch.searchsorted(upto, drawn, right=True).clamp(max=upto.shape[1] - 1)
        drawn -= torch.nn.functional.pad(upto, (1, 0)).gather(1, which)
        inside = weights.gather(1, which[..., None].expand(-1, -1, block))[:, 0].double().cumsum(-1)
        token = which * block + torch.searchsorted(inside, drawn, right=True).clamp(max=block - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, token.clamp(max=size - 1), 0.0)


class RoomyLayer(DynamicLayer):
    """A cache layer with room for `more` tokens, written in place, where `DynamicLayer` copies all there is."""

    def __init__(self, layer, more):
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.room = [torch.cat([x, x.new_empty(*x.shape[:2], more, x.shape[3])], 2) for x in (layer.keys, layer.values)]
        self._show(layer.keys.shape[2])

    def _show(self, length):
        self.keys, self.values = (x[:, :, :length] for x in self.room)

    def update(self, key_states, value_states, *args, **kwargs):
        start, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        for room, new in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, start:end] = new
        self._show(end)
        return self.keys, self.values


def _read(model, ids, mask, n, more):
    """The key-value cache of left-padded prompts, each `n` times in a row, with room for `more` tokens; None, so that
    `generate` reads them itself, where a layer keeps another state than keys and values, which transformers cannot
    repeat."""
    layers = DynamicCache(config=model.config).layers
    if not ids.shape[1] or any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers):
        return None
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=NO_LOGITS)
    cache = out.past_key_values
    cache.batch_repeat_interleave(n)
    cache.layers = [RoomyLayer(layer, more) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _until(ids, end):
    """Ids up to and including the first `end`; all of them where there is none."""
    return ids[: ids.index(end) + 1] if end in ids else ids


@contextlib.contextmanager
def as_reference(model):
    """The reference inside `model`: the base without adapters for a PeftModel, else the model itself.

    Raises RuntimeError where an adapter is still in it, or is not back afterwards.
    """
    if not isinstance(model, PeftModel):
        yield model
        return
    with model.disable_adapter():
        require_adapters(model, on=False)
        yield model
    require_adapters(model, on=True)


def require_adapters(model, on):
    """Raise RuntimeError unless each of the adapted layers is as it should be: a reference that kept its adapter would
    give numbers, only wrong ones."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
    for name, layer in layers.items():
        if layer.disable_adapters == on or layer.merged or list(layer.active_adapters) != ["default"]:
            state = f"disabled {layer.disable_adapters}, merged {layer.merged}, active {layer.active_adapters}"
            raise RuntimeError(f"{name}: {state}; expected the adapter default, {'on' if on else 'off'}")


def clean_copy(model):
    """An independent model with equal weights. Not `deepcopy`: TRL replaces `forward` on the instances it trains, and a
    deep copy would carry that function along, still bound to the original's weights."""
    copy = type(model)(deepcopy(model.config))  # trainers change the configuration too
    copy.load_state_dict(model.state_dict())
    return copy.to(model.device, model.dtype)


def snapshot(model):
    """A copy of the trainable weights, by name; whole ones of a model that FSDP has sharded, where all ranks call."""
    trainable = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).clone() for name, p in trainable.items()}


def digest(weights):
    """Of tensors by name, so that a cached adapter never meets another base, nor cached answers another adapter."""
    state = hashlib.sha256()
    for name, tensor in weights.items():
        state.update(name.encode())
        state.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return state.hexdigest()[:16]


@torch.no_grad()
def restore(model, weights):
    """Put back a `snapshot`. Raises KeyError if it belongs to another model."""
    parameters = dict(model.named_parameters())
    for name, value in weights.items():
        p = parameters[name]
        if isinstance(p, DTensor):  # each rank takes its part of the same whole
            value = distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)
        p.copy_(value)


@torch.no_grad()
def reset_adapter(model, seed):
    """Make a LoRA policy equal to its base again: B = 0, A drawn anew, by `seed` whatever was drawn before."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for module in model.modules():
            if hasattr(module, "reset_lora_parameters"):
                module.reset_lora_parameters("default", True)


@torch.no_grad()
def score(model, tokenizer, prompts, answers, batch_tokens=BATCH_TOKENS, known=None):
    """Scalar-head scores of (prompt, answer) texts, float64 numpy (n,). Each distinct row is run once, and not at all
    where the dict `known` holds its score; new scores are added to it."""
    known = {} if known is None else known
    rows = [row for row in dict.fromkeys(zip(prompts, answers, strict=True)) if row not in known]
    if rows:
        _score_rows(model, tokenizer, rows, batch_tokens, known)
    return np.array([known[row] for row in zip(prompts, answers, strict=True)])


def _score_rows(model, tokenizer, rows, batch_tokens, known):
    was_training = model.training
    model.eval()
    unique = [list(dict.fromkeys(texts)) for texts in zip(*rows, strict=True)]
    prompt_ids = dict(zip(unique[0], encode_prompts(tokenizer, unique[0]), strict=True))
    answer_ids = dict(zip(unique[1], encode_answers(tokenizer, unique[1]), strict=True))
    ids = [prompt_ids[p] + answer_ids[a] for p, a in rows]
    order, pad_id = sorted(range(len(ids)), key=lambda i: len(ids[i])), tokenizer.pad_token_id
    for batch in token_batches(order, [len(x) for x in ids], batch_tokens):
        padded, mask = (t.to(model.device) for t in pad([ids[i] for i in batch], pad_id, "right", MULTIPLE))
        out = model(input_ids=padded, attention_mask=mask, use_cache=False).logits.squeeze(-1).double().cpu().numpy()
        known.update(zip((rows[i] for i in batch), out, strict=True))
    model.train(was_training)
