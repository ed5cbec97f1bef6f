"""The layers below the first adapter, run once per text.

They are frozen and the same in the reference, in every policy and in the scorers around one base, so what they make of
a text never changes: `Trunk` keeps it, and a call on texts that are known begins above them. Where adapters are on the
upper half of the layers, that is half of every forward pass, in training and in scoring. Sampling, which has a cache of
its own, is left as it is.
"""

import contextlib

import torch

from cdpo_utils.logprobs import MULTIPLE, pad, token_batches


class Trunk:
    """Hidden states of texts behind the first `depth` layers of `base`, a causal LM: kept, at most `limit` bytes.

    `attach` lets a model around the same weights use them. `batch_tokens`: run at once where they are not known yet.
    """

    def __init__(self, base, depth, batch_tokens, limit=2**30):
        self.base, self.depth, self.batch_tokens, self.limit = base, depth, batch_tokens, limit
        self.known, self.held = {}, 0  # text -> hidden states (length, width), and their bytes
        self.given, self.running, self.whole = None, False, {}

    def attach(self, model):
        """Let calls of `model`, whose lower layers have the weights of `base`, begin above them: calls without a cache
        on texts that are padded on the right or not at all. A model that trains its lower layers must not be attached.
        """
        decoder = model.get_decoder()
        decoder.register_forward_pre_hook(self._lift, with_kwargs=True)
        decoder.register_forward_hook(self._lower, always_call=True)

    def _lift(self, decoder, args, inputs):
        inputs = inputs | dict(zip(("input_ids",), args, strict=False))
        if self.running or inputs.get("use_cache") is not False or inputs.get("input_ids") is None:
            return None
        hidden = self.given
        if hidden is None:
            if inputs.get("position_ids") is not None:
                return None  # ids that follow each other otherwise than in a text
            hidden = self(inputs["input_ids"])
        self.whole[id(decoder)] = decoder.layers
        decoder.layers = decoder.layers[self.depth :]
        return (), inputs | {"input_ids": None, "inputs_embeds": hidden}

    def _lower(self, decoder, *_):
        decoder.layers = self.whole.pop(id(decoder), decoder.layers)

    @torch.no_grad()
    def __call__(self, ids):
        """Hidden states (n, length, width) of ids (n, length), of padding on the right zeros."""
        rows = [tuple(row) for row in map(self._text, ids.tolist())]
        found = {row: self.known[row] for row in rows if row in self.known}
        missing = list(dict.fromkeys(row for row in rows if row not in found))
        order = sorted(range(len(missing)), key=lambda i: len(missing[i]))
        for batch in token_batches(order, [len(row) for row in missing], self.batch_tokens):
            padded, _ = pad([missing[i] for i in batch], self.base.config.pad_token_id, "right", MULTIPLE)
            for i, hidden in zip(batch, self._run(padded.to(ids.device)), strict=True):
                found[missing[i]] = self._keep(missing[i], hidden[: len(missing[i])].clone())
        out = next(iter(found.values())).new_zeros(*ids.shape, self.base.config.hidden_size)
        for hidden, row in zip(out, rows, strict=True):
            hidden[: len(row)] = found[row]
        return out

    @contextlib.contextmanager
    def giving(self, hidden):
        """In this context calls take `hidden` (n, length, width) as it is, whatever their ids and positions."""
        self.given = hidden
        try:
            yield
        finally:
            self.given = None

    def _text(self, row):
        """A row of ids without the padding on its right; where the end of turn pads, too, one of them is the text's."""
        pad_id, end = self.base.config.pad_token_id, len(row)
        while end > 1 and row[end - 1] == pad_id:
            end -= 1
        return row[: end + (pad_id == self.base.config.eos_token_id)]

    def _run(self, ids):
        decoder = self.base.get_decoder()
        whole, norm, was_training = decoder.layers, decoder.norm, decoder.training
        decoder.layers, decoder.norm, self.running = whole[: self.depth], torch.nn.Identity(), True
        decoder.eval()
        try:
            return decoder(input_ids=ids, use_cache=False).last_hidden_state
        finally:
            decoder.layers, decoder.norm, self.running = whole, norm, False
            decoder.train(was_training)

    def _keep(self, row, hidden):
        self.known[row], self.held = hidden, self.held + hidden.nbytes
        while self.held > self.limit:  # the oldest goes first
            self.held -= self.known.pop(next(iter(self.known))).nbytes
        return hidden
