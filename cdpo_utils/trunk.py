"""The layers below the first adapter, run once per text.

They are frozen and the same in the reference, in every policy and in the scorers around one base, so what they make of
a text never changes: `Trunk` keeps it, and a call on texts that are known begins above them. Where adapters are on the
upper half of the layers, that is half of every forward pass, in training and in scoring. Sampling, which has a cache of
its own, is left as it is.
"""

import contextlib

import torch


class Trunk:
    """Hidden states of texts behind the first `depth` layers of `base`, a causal LM of Llama's architecture.

    Each text is run alone, so that its states do not depend on what else was asked for; the first `limit` bytes are
    kept. `base` begins above them from now on and knows its trunk as `base.trunk`; `attach` lets another model around
    the same weights do so, too.

    Raises ValueError for other architectures: some scale what they are given in the place of ids, some tell layers
    apart by their place in the list.
    """

    def __init__(self, base, depth, limit=2**30):
        if base.config.model_type != "llama":
            raise ValueError(f"Trunk: architecture {base.config.model_type}; expected llama")
        self.base, self.depth, self.limit = base, depth, limit
        self.known, self.held = {}, 0  # ids of a text -> hidden states (length, width), and their bytes
        self.given, self.running = None, False
        self.attach(base)
        base.trunk = self

    def attach(self, model):
        """Let calls of `model`, whose lower layers have the weights of `base`, begin above them: calls without a cache
        or positions of their own, on texts with padding on the right, which attention_mask tells, or without. A model
        that trains its lower layers must not be attached."""
        decoder = model.get_decoder()
        decoder.__dict__["all_layers"] = decoder.layers  # past `Module.__setattr__`: they are registered already
        decoder.register_forward_pre_hook(self._lift, with_kwargs=True)
        decoder.register_forward_hook(_lower, always_call=True)

    def _lift(self, decoder, args, inputs):
        if self.running:
            return None
        decoder.layers = decoder.all_layers  # a call that was interrupted has left the upper ones only
        inputs = inputs | dict(zip(("input_ids",), args, strict=False))
        if inputs.get("use_cache") is not False or inputs.get("input_ids") is None:
            return None
        hidden, ids, mask = self.given, inputs["input_ids"], inputs.get("attention_mask")
        if hidden is None:
            padded_left = mask is not None and (mask.dim() != 2 or not mask[:, 0].all())
            if padded_left or inputs.get("position_ids") is not None:
                return None
            hidden = self(ids, mask)
        decoder.layers = decoder.all_layers[self.depth :]
        return (), inputs | {"input_ids": None, "inputs_embeds": hidden}

    @torch.no_grad()
    def __call__(self, ids, mask=None):
        """Hidden states (n, length, width) of ids (n, length); zeros where `mask`, 1 for text and 0 for the padding on
        its right, says so."""
        lengths = [ids.shape[1]] * len(ids) if mask is None else mask.sum(1).tolist()
        texts = [tuple(row[:length]) for row, length in zip(ids.tolist(), lengths, strict=True)]
        found = {text: self.known.get(text) for text in texts}
        for text in (text for text, hidden in found.items() if hidden is None):
            found[text] = hidden = self._run(torch.tensor([text], device=ids.device))[0]
            if self.held + hidden.nbytes <= self.limit:
                self.known[text], self.held = hidden, self.held + hidden.nbytes
        out = found[texts[0]].new_zeros(*ids.shape, self.base.config.hidden_size)
        for hidden, text in zip(out, texts, strict=True):
            hidden[: len(text)] = found[text]
        return out

    @contextlib.contextmanager
    def giving(self, hidden):
        """In this context calls take `hidden` (n, length, width) as it is, whatever their ids and positions."""
        self.given = hidden
        try:
            yield
        finally:
            self.given = None

    def _run(self, ids):
        decoder = self.base.get_decoder()
        norm, was_training = decoder.norm, decoder.training
        decoder.layers, decoder.norm = decoder.all_layers[: self.depth], torch.nn.Identity()
        self.running = True
        decoder.eval()
        try:
            return decoder(input_ids=ids, use_cache=False).last_hidden_state
        finally:
            self.running = False
            decoder.layers, decoder.norm = decoder.all_layers, norm
            decoder.train(was_training)


def _lower(decoder, *_):
    decoder.layers = decoder.all_layers


def known_below(model, ids, mask):
    """A context in which `model` is called on ids (n, length) with padding on the right, as `mask` says, which it need
    not be told: it begins above the layers of its trunk, where it has one."""
    trunk = getattr(model, "trunk", None)
    return contextlib.nullcontext() if trunk is None else trunk.giving(trunk(ids, mask))
