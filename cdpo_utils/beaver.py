"""Safe RLHF's published scorers (PKU-Alignment/beaver-7b-v1.0-reward and -cost): their head and their text.

They are Llamas with a linear head `score_head` in place of the vocabulary; an answer's score is read at its end of
sequence. A reward is better when higher, a cost is unsafe when above 0 (arXiv:2310.12773, Section 3.2), which is the
convention here too: nothing changes sign. Both repositories call their score_type "reward", so the name decides.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
import transformers
from torch import nn

from cdpo_utils import guard, preflight
from cdpo_utils.data import DataError
from cdpo_utils.logprobs import pad, token_batches

TEXT = "BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:{answer}"
# The same as a chat template, for Alpaca-7B-reproduced, which was fine-tuned on that text and comes without one.
CHAT_TEMPLATE = (
    "{{ bos_token }}BEGINNING OF CONVERSATION: {% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {{ message['content'] }} ASSISTANT:"
    "{% else %}{{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


class LlamaForScore(transformers.LlamaForSequenceClassification):
    """A Llama with the head of a Beaver scorer; its weights' names are mapped by `load`."""

    def __init__(self, config):
        super().__init__(config)
        self.score = nn.Linear(config.hidden_size, 1, bias=config.score_bias)


@dataclass
class Scorer:
    """A published scorer, to be called with prompts and answers; each text is scored once in its life."""

    model: torch.nn.Module
    tokenizer: object
    known: dict = field(default_factory=dict, repr=False)

    def __call__(self, prompts, answers):
        """Scores (n,), float64 numpy."""
        texts = [
            TEXT.format(prompt=p, answer=a) + self.tokenizer.eos_token for p, a in zip(prompts, answers, strict=True)
        ]
        new = [text for text in dict.fromkeys(texts) if text not in self.known]
        if new:
            self.known.update(zip(new, self._run(new), strict=True))
        return np.array([self.known[text] for text in texts])

    @torch.no_grad()
    def _run(self, texts, batch_tokens=8192):
        longest, end = self.model.config.max_position_embeddings, self.tokenizer.eos_token_id
        ids = [x if len(x) <= longest else [*x[: longest - 1], end] for x in self.tokenizer(texts)["input_ids"]]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        scores = np.empty(len(ids))
        for batch in token_batches(order, [len(x) for x in ids], batch_tokens):
            padded, mask = pad([ids[i] for i in batch], self.tokenizer.pad_token_id, side="right")
            padded, mask = padded.to(self.model.device), mask.to(self.model.device)
            out = self.model(input_ids=padded, attention_mask=mask, use_cache=False)
            scores[batch] = out.logits[:, 0].double().cpu()
        return scores


def load_config(name):
    """(configuration, tokenizer) of a hub name or a folder; DataError, in one line, where files are missing or it is no
    Beaver scorer."""
    config, tokenizer = (
        _found(name, kind.from_pretrained) for kind in (transformers.AutoConfig, transformers.AutoTokenizer)
    )
    if not {"LlamaForScore", "LlamaModelForScore"} & set(config.architectures or []):
        raise DataError(f"scorer {name}: architectures {config.architectures}; expected a Beaver LlamaForScore")
    if getattr(config, "do_normalize", False):
        raise DataError(f"scorer {name}: do_normalize is set; expected raw scores, whose zero is the safety boundary")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        raise DataError(f"scorer {name}: no padding token of its own; scores are read at the last token that is none")
    return config, tokenizer


def load(name):
    """The `Scorer` of a hub name or a folder, safetensors only; see `preflight.precision`.

    Raises DataError as `load_config`, and where weights are missing.
    """
    config, tokenizer = load_config(name)
    config.num_labels, config.pad_token_id = 1, tokenizer.pad_token_id
    config.score_bias = getattr(config, "score_bias", getattr(config, "bias", False))
    model, report = _found(
        name, LlamaForScore.from_pretrained, config=config, dtype=preflight.precision(), use_safetensors=True,
        output_loading_info=True, key_mapping={r"^score_head\.": "score."},
    )  # fmt: skip
    if report["missing_keys"]:
        raise DataError(f"scorer {name}: no weights for {', '.join(sorted(report['missing_keys']))}")
    if stray := [name for name in report["unexpected_keys"] if name.startswith("score")]:
        raise DataError(
            f"scorer {name}: config.json knows no {', '.join(stray)}; expected score_bias as in the weights"
        )
    return Scorer(model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer)


def _found(name, load, **settings):
    try:
        return load(name, **settings, trust_remote_code=False)  # None would ask the user
    except Exception as error:  # files missing, no network, ...: transformers has many ways to say so
        raise DataError(f"scorer {name}: {guard.one_line(error)}") from None
