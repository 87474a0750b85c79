"""How a family names the tensors of its checkpoints.

Linears are described by the parts of the decoder that they contain, in order of their rows:

    attention: q, k, v, o        dense MLP and experts: gate, up, down
    latent attention: q_down and q, or direct_q; kv_down; kv (for each head its keys' rows, then its
    values'); o

so that ("self_attn.qkv_proj", ("q", "k", "v")) is one tensor with the rows of three parts.
"""

from dataclasses import dataclass, field, replace

LinearName = tuple[str, tuple[str, ...]]
"""A name without ".weight" and ".bias", and the parts that the tensor contains."""


@dataclass(frozen=True)
class ExpertNames:
    """The experts of a layer; the defaults are those of most families."""

    router: str = "mlp.gate"
    correction: str = "mlp.gate.e_score_correction_bias"  # see RouterSpec
    shared: tuple[LinearName, ...] = (
        ("mlp.shared_experts.gate_proj", ("gate",)),
        ("mlp.shared_experts.up_proj", ("up",)),
        ("mlp.shared_experts.down_proj", ("down",)),
    )
    shared_gate: str = "mlp.shared_expert_gate"
    # A name with {expert} is one tensor for each expert. A name without it is one tensor for all
    # experts, with the suffixes below.
    linears: tuple[LinearName, ...] = (
        ("mlp.experts.{expert}.gate_proj", ("gate",)),
        ("mlp.experts.{expert}.up_proj", ("up",)),
        ("mlp.experts.{expert}.down_proj", ("down",)),
    )
    transposed: bool = False  # dense weights are stored as [experts, inputs, outputs]
    interleaved: bool = False  # rows of gate and up alternate
    weight_suffix: str = ""  # after the name of a tensor for all experts
    bias_suffix: str = "_bias"


@dataclass(frozen=True)
class TensorNames:
    """Names of all tensors; the defaults are those of Llama."""

    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    head: str = "lm_head.weight"
    layer: str = "model.layers.{layer}."  # before each of the following
    attention_norm: str = "input_layernorm.weight"
    mlp_norm: str = "post_attention_layernorm.weight"
    attention_post_norm: str = ""  # of families whose config has post_norms
    mlp_post_norm: str = ""
    q_norm: str = "self_attn.q_norm.weight"
    k_norm: str = "self_attn.k_norm.weight"
    sinks: str = "self_attn.sinks"
    query_norm: str = "self_attn.q_a_layernorm.weight"  # of latents
    latent_norm: str = "self_attn.kv_a_layernorm.weight"
    attention: tuple[LinearName, ...] = (
        ("self_attn.q_proj", ("q",)),
        ("self_attn.k_proj", ("k",)),
        ("self_attn.v_proj", ("v",)),
        ("self_attn.o_proj", ("o",)),
    )
    mlp: tuple[LinearName, ...] = (
        ("mlp.gate_proj", ("gate",)),
        ("mlp.up_proj", ("up",)),
        ("mlp.down_proj", ("down",)),
    )
    experts: ExpertNames = field(default_factory=ExpertNames)

    def under(self, prefix: str) -> "TensorNames":
        """These names after a prefix."""
        return replace(
            self,
            embedding=prefix + self.embedding,
            final_norm=prefix + self.final_norm,
            head=prefix + self.head,
            layer=prefix + self.layer,
        )

    def within(self, part: str) -> "TensorNames":
        """The names of a decoder that is the part "model.PART" of a larger model."""
        whole, inner = "model.", f"model.{part}."
        return replace(
            self,
            embedding=self.embedding.replace(whole, inner, 1),
            final_norm=self.final_norm.replace(whole, inner, 1),
            layer=self.layer.replace(whole, inner, 1),
        )


def names_by(names: TensorNames, others: TensorNames, layers: int) -> dict[str, str]:
    """The names of weights by their names in another form of checkpoint, where they differ."""
    found = {names.embedding: others.embedding, names.head: others.head}
    by_parts = {parts: stem for stem, parts in (*others.attention, *others.mlp)}
    for stem, parts in (*names.attention, *names.mlp):
        for layer in range(layers if parts in by_parts else 0):
            old, new = names.layer.format(layer=layer), others.layer.format(layer=layer)
            found[f"{old}{stem}.weight"] = f"{new}{by_parts[parts]}.weight"
    return {old: new for old, new in found.items() if old != new}
