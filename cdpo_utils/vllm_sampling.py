"""Answers drawn by vLLM in the place of `policies.sample`: faster on a GPU, the same distribution, other draws.

For a LoRA policy on a base that was loaded from a folder or the hub. One engine is kept for each base; the adapter, as
it is at each call, is written to a folder named by what is in it, and the engine is asked for that one.
https://docs.vllm.ai/en/latest/features/lora/

Tried with vLLM 0.32 for processors (tests/test_vllm_sampling.py draws with it where it is installed), on no GPU.
"""

import functools
import hashlib
import importlib.util
import itertools
import tempfile
from pathlib import Path

import numpy as np
from peft import get_model_status

from cdpo_utils.data import DataError

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # for which vLLM makes room
MEMORY = 0.3  # of the device, for the engine: weights once more, and keys and values; training has the rest
NUMBERS = itertools.count(1)


def require():
    """Raise DataError, in one line, where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise DataError("vllm: the package is not installed; see README, or leave the field out")


def sample(model, tokenizer, prompt_ids, n, seed, max_new_tokens, temperature=1.0, batch_rows=None):
    """As `policies.sample`: `n` answers per prompt, texts and token ids (end of turn included), P lists of n each.

    model: a PeftModel; where its adapters are disabled the base answers. `batch_rows` is vLLM's own concern. Every
    prompt has a random stream of its own, by `seed`: with one for all of them their answers would depend on each other.

    Raises DataError where vLLM is not installed, ValueError for a base that is in no folder.
    """
    require()
    from vllm import SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest

    config = model.active_peft_config
    if not config.base_model_name_or_path:
        raise ValueError("vLLM: the base of the policy was not loaded from a folder or the hub")
    rank = next(room for room in RANKS if room >= config.r)
    engine = _engine(config.base_model_name_or_path, str(model.dtype).removeprefix("torch."), rank)
    adapter = None
    if get_model_status(model).enabled:
        folder = saved(model)
        adapter = LoRARequest(folder.name, _number(folder.name), str(folder))
    plainly = dict(temperature=temperature, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)
    ends = dict(max_tokens=max_new_tokens, stop_token_ids=[tokenizer.eos_token_id], detokenize=False)
    streams = np.random.SeedSequence(seed).generate_state(len(prompt_ids), np.uint64) >> 2  # answer j has seed + j
    drawn = engine.generate(
        [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompt_ids],
        [SamplingParams(n=n, seed=int(stream), **plainly, **ends) for stream in streams],
        lora_request=adapter, use_tqdm=False,
    )  # fmt: skip
    ids = [[list(answer.token_ids) for answer in request.outputs] for request in drawn]
    texts = [[text.strip() for text in tokenizer.batch_decode(row, skip_special_tokens=True)] for row in ids]
    return texts, ids


@functools.cache
def _engine(base, dtype, rank):
    from vllm import LLM

    return LLM(
        model=base, dtype=dtype, skip_tokenizer_init=True, trust_remote_code=False, enable_lora=True,
        max_lora_rank=rank, max_model_len=-1, gpu_memory_utilization=MEMORY,
        generation_config="vllm",  # not the folder's: it would end answers at other tokens, too
    )  # fmt: skip


@functools.cache
def _folders():
    return tempfile.TemporaryDirectory(prefix="adapters-")  # gone with the process


def saved(model):
    """The folder of the active adapter as it is now, named by a digest of its files."""
    with tempfile.TemporaryDirectory(dir=_folders().name) as fresh:
        name = model.active_adapter
        model.save_pretrained(fresh, selected_adapters=[name], save_embedding_layers=False)
        written = Path(fresh) if name == "default" else Path(fresh) / name
        digest = hashlib.sha256()
        for file in sorted(written.glob("adapter_*")):
            digest.update(file.read_bytes())
        folder = Path(_folders().name) / digest.hexdigest()
        if not folder.exists():
            written.rename(folder)
            written.mkdir()  # for `with` to take away
    return folder


@functools.cache
def _number(digest):
    """vLLM knows an adapter by number and does not look at its folder again: no two contents may share one."""
    return next(NUMBERS)
