"""The keys of routers and experts → MoeConfig, and which layers have experts."""

from dataclasses import replace

from model.config import LayerConfig, MoeConfig
from model.families.config_keys.keys import Keys
from model.ops.specs import ExpertGroups, RouterSpec


def top_k(keys: Keys, experts: int) -> int:
    """Experts of each token. Raises CheckpointError if there are fewer."""
    count = keys.integer("num_experts_per_tok")
    if count > experts:
        raise keys.fail(f"num_experts_per_tok {count} is more than the {experts} experts")
    return count


def softmax_moe(keys: Keys, experts: int, size: int, normalize: bool) -> MoeConfig:
    """Experts without biases whose router weights are a softmax over all experts."""
    return MoeConfig(
        num_experts=experts,
        intermediate_size=size,
        router=RouterSpec(top_k(keys, experts), softmax_after_top_k=False, normalize=normalize),
        biases=False,
    )


def deepseek_moe(keys: Keys) -> MoeConfig:
    """Experts in groups beside shared ones, whose router weights are sigmoids (DeepSeek-V3).

    A group's score is the sum of its two highest (DeepSeek-V3, 2.1.2 and its code).
    """
    experts, size = keys.integer("n_routed_experts"), keys.integer("moe_intermediate_size")
    count = top_k(keys, experts)
    return MoeConfig(
        num_experts=experts,
        intermediate_size=size,
        router=RouterSpec(
            count,
            softmax_after_top_k=False,
            normalize=keys.boolean("norm_topk_prob"),
            sigmoid=True,
            has_correction=True,
            groups=expert_groups(keys, experts, count, 2),
            scale=keys.number("routed_scaling_factor"),
        ),
        biases=False,
        shared_size=size * keys.integer("n_shared_experts", minimum=0),
    )


def expert_groups(keys: Keys, experts: int, top_k: int, best: int) -> ExpertGroups | None:
    """The groups of `n_group` and `topk_group`; None if they do not limit the choice.

    Raises CheckpointError for groups that are unequal or too small.
    """
    count, chosen = keys.integer("n_group", 1), keys.integer("topk_group", 1)
    if experts % count:
        raise keys.fail(f"{experts} experts cannot be divided into {count} equal groups (n_group)")
    if chosen >= count:
        return None
    if experts // count < best or chosen * (experts // count) < top_k:
        raise keys.fail(
            f"{chosen} of {count} groups (topk_group, n_group) of {experts // count} experts are "
            f"too small to choose {top_k} from"
        )
    return ExpertGroups(count, chosen, best)


def after_first_dense(keys: Keys, layers: tuple[LayerConfig, ...]) -> tuple[LayerConfig, ...]:
    """The layers, of which all but the first `first_k_dense_replace` have experts."""
    first = keys.integer("first_k_dense_replace", minimum=0)
    return tuple(replace(layer, sparse=i >= first) for i, layer in enumerate(layers))


def by_sparse_step(keys: Keys, layers: tuple[LayerConfig, ...]) -> tuple[LayerConfig, ...]:
    """The layers, of which every `decoder_sparse_step`th but `mlp_only_layers` have experts."""
    step, dense = keys.integer("decoder_sparse_step"), keys.get("mlp_only_layers", [])
    if not isinstance(dense, list) or not all(isinstance(layer, int) for layer in dense):
        raise keys.fail(f"'mlp_only_layers' must be a list of layers, not {dense!r}")
    dense_layers = set(dense)  # a list may be as long as a file allows
    return tuple(
        replace(layer, sparse=i not in dense_layers and (i + 1) % step == 0)
        for i, layer in enumerate(layers)
    )
