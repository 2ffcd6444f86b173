"""``nn.MultiheadAttention`` on fused attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.tensors import accumulation_dtype
from ..core.transforms import autocast_enabled
from . import functional, mha_checks, nested, shortcut
from .mha_checks import Layer
from .projections import extra_columns, project, project_in
from .rotary import BASE, alibi_slopes, rotary_tables, rotate, tables_at

torch.fx.wrap("_attend")

Window = int | tuple[int, int]


class MultiheadAttention(nn.MultiheadAttention):
    r"""A drop-in for :class:`torch.nn.MultiheadAttention`: same constructor, ``state_dict`` and results.

    Masks, dropout and virtual columns are applied inside the kernel, and averaged weights are made from the
    log-sum-exp, without a ``[B, num_heads, L, S]`` tensor. Training and inference take the same way.

    Args:
        embed_dim: E, features of the query and the output.
        num_heads: H, a divisor of E.
        dropout: probability of dropping a weight, in training.
        bias: whether the projections add one.
        add_bias_kv: whether there is a learned key and value that every query may attend to.
        add_zero_attn: whether there is a key and a value of zeros, likewise.
        kdim: features of the key; None for E.
        vdim: features of the value; None for E.
        batch_first: whether batched inputs are ``[B, L, E]``, not ``[L, B, E]``.
        device: of the parameters.
        dtype: of the parameters.
        num_kv_heads: G, a divisor of H: each H/G neighbouring heads of the query share one of key and value
            (Ainslie et al., 2023). ``in_proj_weight`` has E + 2·G·E/H rows then. None for H.
        window: how far a query sees: j from ``i - left`` to ``i + right``; one number for both sides, -1 for
            no limit.
        softcap: c of ``c * tanh(score / c)``; None for scores as they are.
        rotary: turn queries and keys by their positions (Su et al., 2021; see
            :func:`fusednn.functional.rotary_embedding`); a number is the base, True stands for 10000.
        alibi: subtract ``slope * |i - j|`` from the scores (Press et al., 2022).

    Shapes:
        query ``[L, B, E]``, key ``[S, B, kdim]``, value ``[S, B, vdim]``; B first with `batch_first`; none
        for unbatched ones. ``key_padding_mask`` ``[B, S]`` or ``[S]``; ``attn_mask`` ``[L, S]`` or
        ``[B*H, L, S]``.
        Returns the output, of the query's shape, and weights ``[B, L, S]`` or ``[B, H, L, S]`` after dropout
        (without B if unbatched; S counts the columns of `add_bias_kv` and `add_zero_attn`), or None.
        The output is contiguous.
        A nested query, key and value (strided or jagged, B first, no masks) give a nested output of the same
        layout, and weights padded with zeros.

    Dtypes:
        float32, float64; bfloat16 and float16 with scores, softmax and sums in float32. Under autocast the
        weights that are returned have the dtype of torch's: float32, on the CPU autocast's.

    Raises:
        ValueError: an option of the constructor has no such value.
        AssertionError: a rank, a number of features or a padding mask does not fit.
        RuntimeError: another size, dtype or device does not fit, or `is_causal` comes without `attn_mask`.
            These are torch's types of error; the text names the argument.

    What differs from torch, by intent:
        * A query that has nothing to attend to gets weights 0 and gradients 0, and the projection of zeros
          for output, where torch returns NaN or, in some modes, an average. NaN at masked places reaches no
          output and no input's gradient; the gradients of the projections are sums over all positions.
        * The columns of `add_bias_kv` and `add_zero_attn` are seen by all queries, also where an `is_causal`
          hint is taken; torch hides them then, but only where `need_weights` is False.
        * `is_causal` without `attn_mask` raises in inference, too, where torch's fast path ignores it.
        * Nested inputs may be jagged, cross-attend, train and be of an odd number of heads.
    """

    # Not on instances that leave them alone, so that these have torch's attributes and no other.
    num_kv_heads: int | None = None
    window: Window | None = None
    softcap: float | None = None
    rotary: bool | float = False
    alibi: bool = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        num_kv_heads: int | None = None,
        window: Window | None = None,
        softcap: float | None = None,
        rotary: bool | float = False,
        alibi: bool = False,
    ) -> None:
        torchs: Any = (dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype)
        super().__init__(embed_dim, num_heads, *torchs)
        mha_checks.check_options(self.head_dim, num_heads, num_kv_heads, window, softcap, rotary)
        shared = None if num_kv_heads == num_heads else num_kv_heads
        options = {
            "num_kv_heads": shared,
            "window": window,
            "softcap": softcap,
            "rotary": rotary,
            "alibi": alibi,
        }
        given = {name: value for name, value in options.items() if value is not None and value is not False}
        for name, value in given.items():
            setattr(self, name, value)
        if shared is not None:
            self._share_heads(shared * self.head_dim)
        if given:
            # What torch's containers ask before they compute a layer's attention themselves, without options.
            self._qkv_same_embed_dim = False

    def _reset_parameters(self) -> None:
        known = self._qkv_same_embed_dim
        self._qkv_same_embed_dim = self.in_proj_weight is not None
        super()._reset_parameters()
        self._qkv_same_embed_dim = known

    def _share_heads(self, rows: int) -> None:
        """Make the parameters of key and value anew, with `rows` instead of E."""
        like = self.out_proj.weight

        def empty(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(size, device=like.device, dtype=like.dtype))

        if self.in_proj_weight is not None:
            self.in_proj_weight = empty(self.embed_dim + 2 * rows, self.embed_dim)
        else:
            self.k_proj_weight, self.v_proj_weight = empty(rows, self.kdim), empty(rows, self.vdim)
        if self.in_proj_bias is not None:
            self.in_proj_bias = empty(self.embed_dim + 2 * rows)
        if self.bias_k is not None:
            self.bias_k, self.bias_v = empty(1, 1, rows), empty(1, 1, rows)
        self._reset_parameters()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output and, if needed, the attention weights.

        Args:
            query: what attends.
            key: what is compared with it.
            value: what is averaged.
            key_padding_mask: bool, True: ignored; or floating, added to the scores.
            need_weights: whether to return weights.
            attn_mask: likewise, of each query, for all samples and heads or for each.
            average_attn_weights: whether the weights are averaged over heads.
            is_causal: a hint that `attn_mask` is causal; where there is no other mask and no weights are
                needed, the mask is not read then.
        """
        kind = ("mean" if average_attn_weights else "heads") if need_weights else "none"
        if attn_mask is None and not is_causal and shortcut.applies(query, key, value):
            found = shortcut.attend(self, query, key_padding_mask, kind)
            if found is not None:
                return found
        return _attend(self._layer(), query, key, value, key_padding_mask, attn_mask, is_causal, kind)

    def _layer(self) -> Layer:
        packed = self.in_proj_weight
        separate = () if packed is not None else (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        return Layer(
            self.embed_dim,
            self.kdim,
            self.vdim,
            self.num_heads,
            self.num_kv_heads or self.num_heads,
            self.batch_first,
            separate or (packed,),
            self.in_proj_bias,
            (self.out_proj.weight, self.out_proj.bias),
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
            self.dropout if self.training else 0.0,
            self.window,
            self.softcap,
            BASE if self.rotary is True else float(self.rotary),
            self.alibi,
        )

    def extra_repr(self) -> str:
        """Name the options that torch's layer has not."""
        names = ("num_kv_heads", "window", "softcap", "rotary", "alibi")
        return ", ".join(f"{name}={vars(self)[name]!r}" for name in names if name in vars(self))


def _attend(
    layer: Layer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    kind: str,
) -> tuple[Tensor, Tensor | None]:
    """What ``MultiheadAttention`` does; one node for torch.fx, which can't follow the checks."""
    if query.is_nested or key.is_nested or value.is_nested:
        masked = key_padding_mask is not None or attn_mask is not None
        mha_checks.check_nested(layer, (query, key, value), masked, is_causal)
        return _attend_nested(layer, query, key, value, kind)
    mha_checks.check_call(layer, query, key, value, key_padding_mask, attn_mask, is_causal)
    batched = query.dim() == 3
    q, k, v = project_in(layer, query, key, value)
    if not batched:  # [L, H, D]
        q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    batch_first = layer.batch_first or not batched
    # [B, H, L, D], [B, G, S, D]: views, with the strides of the products
    q, k, v = (t.transpose(1, 2) if batch_first else t.permute(1, 2, 0, 3) for t in (q, k, v))
    causal = is_causal and key_padding_mask is None and kind == "none"
    output, weights = _fused(layer, q, k, v, None if causal else attn_mask, key_padding_mask, causal, kind)
    # Its memory is [B, L, H, D]. A linear map of rows that are not contiguous would copy them too, and add
    # its bias in another pass.
    output = output.transpose(1, 2) if batch_first else output.permute(2, 0, 1, 3).contiguous()
    output = project(output.flatten(2), *layer.out_proj)
    if not batched:
        output = output.squeeze(0)
        weights = None if weights is None else weights.squeeze(0)
    return output, weights


def _fused(
    layer: Layer,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    causal: bool,
    kind: str,
) -> tuple[Tensor, Tensor | None]:
    """Return attention's output [B, H, L, D] and weights for heads [B, H, L, D]."""
    if layer.rotary_base:
        length = max(q.shape[2], k.shape[2])
        cos, sin = rotary_tables(q, length, layer.rotary_base)
        q, k = (rotate(t, cos[: t.shape[2]], sin[: t.shape[2]]) for t in (q, k))
    mask, key_mask = mha_checks.masks_of(attn_mask, key_padding_mask, q)
    # On the CPU torch's own op serves inference alone: a layer keeps the bits of its training.
    wanted = ("output",) if kind == "none" and q.device.type == "cuda" else ()
    output, _, weights = functional.attend(
        mha_checks.NAME,
        q,
        k,
        v,
        mask,
        key_mask,
        *extra_columns(layer, k),
        weights=kind,
        wanted=wanted,
        is_causal=causal,
        **_numbers(layer, q),
    )
    if kind == "none":
        return output, None
    if weights.device.type != "cpu" and autocast_enabled(weights.device):
        weights = weights.float()  # as torch's softmax there
    return output, weights


def _numbers(layer: Layer, q: Tensor) -> dict[str, Any]:
    return {
        "dropout_p": layer.dropout_p,
        "window": layer.window,
        "softcap": layer.softcap,
        "alibi_slopes": alibi_slopes(layer.num_heads, q.device) if layer.alibi else None,
    }


def _attend_nested(
    layer: Layer, query: Tensor, key: Tensor, value: Tensor, kind: str
) -> tuple[Tensor, Tensor | None]:
    """Attend within each sequence of nested tensors."""
    queries = nested.pack(query, "query")
    keys = queries if key is query else nested.pack(key, "key")
    values = keys if value is key else nested.pack(value, "value")
    nested.check_same_sequences(keys, values)
    mha_checks.check_features(layer, queries.values, keys.values, values.values)
    q, k, v = project_in(layer, queries.values, keys.values, values.values)  # [T, H, D]
    if kind == "none":
        output, weights = _attend_packed(layer, (queries, keys), (q, k, v)), None
    else:
        output, weights = _attend_padded(layer, (queries, keys), (q, k, v), kind)
    return nested.unpack(project(output.flatten(1), *layer.out_proj), query), weights


def _attend_packed(
    layer: Layer, packed: tuple[nested.Packed, nested.Packed], heads: tuple[Tensor, ...]
) -> Tensor:
    queries, keys = packed
    q, k, v = heads
    if layer.rotary_base:
        q, k = (_rotate_packed(t, p, layer.rotary_base) for t, p in ((q, queries), (k, keys)))
    output, _, _ = functional.attend(
        mha_checks.NAME,
        *(t.transpose(0, 1)[None] for t in (q, k, v)),
        bounds=(queries.cu_seqlens, keys.cu_seqlens),
        longest=(queries.max_seqlen, keys.max_seqlen),
        **_numbers(layer, q),
    )
    return output[0].transpose(0, 1)


def _rotate_packed(x: Tensor, packed: nested.Packed, base: float) -> Tensor:
    wide = accumulation_dtype(x.dtype)
    cos, sin = tables_at(packed.positions(), x.shape[-1] // 2, base, wide)
    return rotate(x, cos.unsqueeze(1), sin.unsqueeze(1))


def _attend_padded(
    layer: Layer, packed: tuple[nested.Packed, nested.Packed], heads: tuple[Tensor, ...], kind: str
) -> tuple[Tensor, Tensor]:
    """Attend in a padded batch, for its weights."""
    queries, keys = packed
    q, k, v = (p.pad(t).transpose(1, 2) for p, t in zip((queries, keys, keys), heads))
    output, weights = _fused(layer, q, k, v, None, keys.padding(), False, kind)
    assert weights is not None
    padding = queries.padding().unsqueeze(-1)  # [N, L, 1]
    weights = weights.masked_fill(padding if kind == "mean" else padding.unsqueeze(1), 0.0)
    return queries.unpad(output.transpose(1, 2)), weights
