"""How a family names the tensors of its checkpoints.

Linears are described by the parts of the decoder that they contain, in order of their rows:

    attention: q, k, v, o        dense MLP and experts: gate, up, down
    latent attention: q_down and q, or direct_q; kv_down; kv (for each head its keys' rows, then its
    values'); o

so that ("self_attn.qkv_proj", ("q", "k", "v")) is one tensor with the rows of three parts. In
families with output gates q and gate alternate in one tensor, head by head.
"""

from collections.abc import Callable
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
    # Norms of families whose layers have a dense MLP beside the experts: before the router and the
    # experts, after the dense MLP and after the experts. Those of the whole are as without experts.
    router_norm: str = "router.scale"
    norm: str = "pre_feedforward_layernorm_2.weight"
    mlp_post_norm: str = "post_feedforward_layernorm_1.weight"
    post_norm: str = "post_feedforward_layernorm_2.weight"


@dataclass(frozen=True)
class PerLayerNames:
    """Of families whose layers read embeddings of their own; the last three are of each layer."""

    embedding: str = "model.embed_tokens_per_layer.weight"
    projection: str = "model.per_layer_model_projection"
    norm: str = "model.per_layer_projection_norm.weight"
    gate: str = "per_layer_input_gate"
    down: str = "per_layer_projection"
    post_norm: str = "post_per_layer_input_norm.weight"

    def moved(self, move: Callable[[str], str]) -> "PerLayerNames":
        """These names, with those that are not of each layer changed."""
        return replace(
            self,
            embedding=move(self.embedding),
            projection=move(self.projection),
            norm=move(self.norm),
        )


@dataclass(frozen=True)
class DeltaRuleNames:
    """A recurrent layer: queries, keys, values, the output's gate z, and b and a of the gates."""

    linears: tuple[LinearName, ...] = (
        ("linear_attn.in_proj_qkv", ("q", "k", "v")),
        ("linear_attn.in_proj_z", ("z",)),
        ("linear_attn.in_proj_b", ("b",)),
        ("linear_attn.in_proj_a", ("a",)),
        ("linear_attn.out_proj", ("out",)),
    )
    interleaved: bool = False  # the parts of a tensor alternate, by key head
    conv: str = "linear_attn.conv1d.weight"
    decay_log: str = "linear_attn.A_log"
    bias: str = "linear_attn.dt_bias"
    norm: str = "linear_attn.norm.weight"


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
    delta_rule: DeltaRuleNames = field(default_factory=DeltaRuleNames)
    mlp: tuple[LinearName, ...] = (
        ("mlp.gate_proj", ("gate",)),
        ("mlp.up_proj", ("up",)),
        ("mlp.down_proj", ("down",)),
    )
    experts: ExpertNames = field(default_factory=ExpertNames)
    per_layer: "PerLayerNames" = field(default_factory=lambda: PerLayerNames())
    layer_scalar: str = "layer_scalar"

    def under(self, prefix: str) -> "TensorNames":
        """These names after a prefix."""
        return replace(
            self,
            embedding=prefix + self.embedding,
            final_norm=prefix + self.final_norm,
            head=prefix + self.head,
            layer=prefix + self.layer,
            per_layer=self.per_layer.moved(lambda name: prefix + name),
        )

    def within(self, part: str) -> "TensorNames":
        """The names of a decoder that is the part "model.PART" of a larger model."""
        whole, inner = "model.", f"model.{part}."
        return replace(
            self,
            embedding=self.embedding.replace(whole, inner, 1),
            final_norm=self.final_norm.replace(whole, inner, 1),
            layer=self.layer.replace(whole, inner, 1),
            per_layer=self.per_layer.moved(lambda name: name.replace(whole, inner, 1)),
        )


def names_by(names: TensorNames, others: TensorNames, layers: int) -> dict[str, str]:
    """The names of weights by their names in another form of checkpoint, where they differ."""
    found = {names.embedding: others.embedding, names.head: others.head}
    by_parts = {parts: stem for stem, parts in (*others.attention, *others.mlp)}
    for stem, parts in (*names.attention, *names.mlp):
        for layer in range(layers if parts in by_parts else 0):
            old, new = names.layer.format(layer=layer), others.layer.format(layer=layer)
            found[f"{old}{stem}.weight"] = f"{new}{by_parts[parts]}.weight"
    for layer in range(layers):
        old, new = names.layer.format(layer=layer), others.layer.format(layer=layer)
        for router in (names.experts.router, "mlp.gate"):  # transformers' own since version 5
            found[f"{old}{router}.weight"] = f"{new}{others.experts.router}.weight"
    return {old: new for old, new in found.items() if old != new}
