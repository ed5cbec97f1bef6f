"""Whether a model fits this machine, from its configuration alone, before any weight is read."""

import time

import psutil
import torch
import transformers

from cdpo_utils.data import DataError
from cdpo_utils.fetch import model_folder

NEED_GPU = 2e9  # parameters from which a processor would take days
KNOWN = {"alpaca": 6.7e9}  # parameters of models that are refused without asking the hub


def parameters(config):
    """Number of parameters of a causal language model, counted on tensors without memory."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return sum(p.numel() for p in model.parameters())


def memory():
    """(bytes that can be had, what has them)."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0], torch.cuda.get_device_name()
    return psutil.virtual_memory().available, f"{torch.get_num_threads()} threads"


def precision():
    """bf16 where the GPU, or without one the processor, multiplies it natively; else float32.

    Of a pretrained model's weights and activations; what is trained of it, and sums of log-probabilities, are float32.
    """
    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        known = torch.cpu.get_capabilities()
        native = any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    return torch.bfloat16 if native else torch.float32


def flops(seconds=0.2):
    """Floating-point operations a second in the matrix products that a training step is made of."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    n = 4096 if device == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=precision())
    (a @ a).sum().item()  # the first product pays for starting up
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        (a @ a).sum().item()
        done += 1
    return done * 2 * n**3 / (time.perf_counter() - started)


def check(model, where, scorers=(), tokens=0):
    """One line on memory and time of `model`, found at the hub name or folder `where`, beside published `scorers`, of
    `tokens` that are trained on.

    Raises DataError, in one line, where the weights alone exceed the memory, or a large model finds no GPU. Where no
    configuration can be read, or it is not one of plain transformers, loading will say what is wrong; this says "".
    """
    if KNOWN.get(model, 0) > NEED_GPU:
        _require_gpu(model, KNOWN[model])
    try:
        where = model_folder(model) if model_folder(model).is_dir() else where
        names = [where, *scorers]
        count, *others = (
            parameters(transformers.AutoConfig.from_pretrained(name, trust_remote_code=False))  # None would ask
            for name in names
        )
    except Exception:
        return ""
    if count > NEED_GPU:
        _require_gpu(model, count)
    held = (count + sum(others)) * precision().itemsize
    available, device = memory()
    if held > available:
        whose = f"its weights and those of {' and '.join(scorers)}" if scorers else "its weights"
        raise DataError(
            f"model {model}: {whose} take {held / 2**30:.1f} GiB; {device} can have {available / 2**30:.1f}"
        )
    # Forward 2 operations per parameter and token, back 1 where LoRA is on the upper half of the layers alone.
    token = 3 * count / flops()
    return (
        f"model {model}: {count / 1e6:.0f} million parameters, weights of {held / 2**30:.2f} GiB where "
        f"{available / 2**30:.0f} are free, {device}; {str(precision()).removeprefix('torch.')}; "
        f"about {1000 * token:.2f} ms per trained token"
        + (f", so at most {_duration(tokens * token)} of steps for one training" if tokens else "")
    )


def _duration(seconds):
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _require_gpu(model, count):
    if not torch.cuda.is_available():
        raise DataError(f"model {model}: {count / 1e9:.1f} billion parameters need a GPU; none was found")
