"""Sampling with a key-value cache.

Shapes: B batch, T prompt tokens, V vocabulary, L layers, G key-value heads, S capacity of the cache in tokens,
K channels of a head.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .attention import Past

if TYPE_CHECKING:
    from .decoder import Decoder


class KVCache:
    """Keys and values of the tokens so far, for the key-value heads only: H / G times smaller than with a head each.

    All memory is taken at the start, so a text that fits can be finished. `length` tokens are filled, the same number
    in every row.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        kv_heads: int,
        length: int,
        head_dim: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        shape = (layers, batch, kv_heads, length, head_dim)
        self.keys_LBGSK = torch.zeros(shape, dtype=dtype, device=device)
        self.values_LBGSK = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0

    @classmethod
    def for_decoder(cls, decoder: "Decoder", batch: int, length: int) -> "KVCache":
        """A cache for `length` tokens in the type that the decoder's attention computes in right here."""
        c, weight = decoder.config, decoder.model.embed_tokens.weight
        assert c.head_dim is not None  # resolved by the config
        dtype, device = weight.dtype, weight.device
        if dtype != torch.float64 and torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        return cls(c.num_hidden_layers, batch, c.num_key_value_heads, length, c.head_dim, dtype=dtype, device=device)

    @property
    def capacity(self) -> int:
        return self.keys_LBGSK.shape[3]

    @property
    def nbytes(self) -> int:
        return self.keys_LBGSK.nbytes + self.values_LBGSK.nbytes

    def layer(self, index: int, new_tokens: int) -> Past:
        """What one layer's attention needs to add `new_tokens` tokens and to attend to all."""
        if self.length + new_tokens > self.capacity:
            raise ValueError(
                f"the cache holds {self.length} of {self.capacity} tokens; {new_tokens} more do not fit: make it longer"
            )
        return self.keys_LBGSK[index], self.values_LBGSK[index], self.length


# no_grad, not inference_mode: layers that keep tensors between calls (quantized ones do) would keep inference tensors,
# and training would fail on them after a sample was drawn in its midst.
@torch.no_grad()
def generate(
    decoder: "Decoder",
    prompt_ids_BT: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Prompts and their continuations, (B, T + at most max_new_tokens); every prompt has T tokens.

    Temperature 0 takes the likeliest token. A row that has come to `eos_id` is filled up with it, and all stop when
    the last one has. Modules in training mode are put in evaluation mode for the time being.
    """
    check_request(decoder, prompt_ids_BT, max_new_tokens, temperature, top_k, top_p)
    B, T = prompt_ids_BT.shape
    # The last token is never read again, hence one less.
    cache = KVCache.for_decoder(decoder, B, T + max_new_tokens - 1)
    training = [module for module in decoder.modules() if module.training]
    decoder.eval()
    try:
        ids_BT = ids_new_BT = prompt_ids_BT
        finished_B1 = torch.zeros(B, 1, dtype=torch.bool, device=prompt_ids_BT.device)
        for _ in range(max_new_tokens):
            logits_BV = decoder.lm_head(decoder.hidden_states(ids_new_BT, cache=cache)[:, -1])
            ids_new_BT = sample(logits_BV, temperature, top_k, top_p, generator)
            if eos_id is not None:
                ids_new_BT = ids_new_BT.masked_fill(finished_B1, eos_id)
                finished_B1 = finished_B1 | (ids_new_BT == eos_id)
            ids_BT = torch.cat((ids_BT, ids_new_BT), dim=1)
            if eos_id is not None and bool(finished_B1.all()):
                break
        return ids_BT
    finally:
        # One by one: decoder.train() would also wake those that were asleep before.
        for module in training:
            module.training = True


def sample(
    logits_BV: Tensor,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token a row, (B, 1): from the k likeliest, then from the fewest that hold `top_p` of what is left."""
    if temperature == 0:
        return logits_BV.argmax(dim=-1, keepdim=True)
    logits_BV = logits_BV.float() / temperature
    if top_k is not None and top_k < logits_BV.shape[-1]:
        least_B1 = logits_BV.topk(top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, float("-inf"))
    probabilities_BV = logits_BV.softmax(dim=-1)
    if top_p is not None and top_p < 1:
        sorted_BV, order_BV = probabilities_BV.sort(dim=-1, descending=True, stable=True)
        # A token goes when those before it already hold top_p; before the first there is nothing, so it always stays.
        surplus_BV = sorted_BV.cumsum(dim=-1) - sorted_BV >= top_p
        probabilities_BV = probabilities_BV.masked_fill(
            torch.zeros_like(surplus_BV).scatter(-1, order_BV, surplus_BV), 0.0
        )
    return torch.multinomial(probabilities_BV, 1, generator=generator)


def check_request(
    decoder: "Decoder",
    prompt_ids_BT: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    if prompt_ids_BT.ndim != 2 or 0 in prompt_ids_BT.shape:
        raise ValueError(f"prompt ids have the shape {tuple(prompt_ids_BT.shape)}; it has to be (batch, tokens), no 0")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it has to be at least 1")
    T, context = prompt_ids_BT.shape[1], decoder.config.max_position_embeddings
    if T + max_new_tokens > context:
        raise ValueError(
            f"{T} prompt tokens and {max_new_tokens} new ones exceed the context of {context}; "
            f"at most {max(0, context - T)} new tokens fit"
        )
    if not temperature >= 0:
        raise ValueError(f"temperature is {temperature}; it has to be at least 0 (0 takes the likeliest token)")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; it has to be at least 1, or left out")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it has to be above 0 and at most 1, or left out")
    largest = int(prompt_ids_BT.max())
    if int(prompt_ids_BT.min()) < 0 or largest >= decoder.config.vocab_size:
        raise ValueError(
            f"prompt ids run from {int(prompt_ids_BT.min())} to {largest}; the model knows 0 to "
            f"{decoder.config.vocab_size - 1}: is the tokenizer another model's?"
        )
