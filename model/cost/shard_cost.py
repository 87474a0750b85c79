"""What the costs of all operations share, and those of embedding and head."""

from model.config import ModelConfig
from model.cost import flops
from model.cost.flops import Flops
from model.cost.workload import DTYPE_BYTES, Bytes, Op, Product, Workload
from model.formats import DENSE, WeightFormat


def product_of(form: WeightFormat, rows: float, weights: float) -> Product:
    """Return the product of rows with a weight; e4m3 is multiplied with e4m3 where inputs are."""
    kept = form.kept
    return Product(kept.name, rows, weights, is_float8=bool(getattr(kept, "inputs", "")))


class ShardCost:
    """The cost of the operations on one GPU's shard of the model, each for one layer."""

    def __init__(self, config: ModelConfig, work: Workload):
        self.config, self.work = config, work
        self.parts = work.tensor_parallel
        self.item = DTYPE_BYTES[work.dtype]
        self.heads = config.num_heads // self.parts
        self.vocab = -(-config.vocab_size // self.parts)

    def op(
        self, name: str, cost: Flops, weights: int, moved: int, launches: int, *,
        kv: int = 0, fused: tuple[int, int] = (0, 0), products: tuple[Product, ...] = (),
    ) -> Op:  # fmt: skip
        """Make an operation. weights, kv: bytes; moved: values; fused: (moved, launches)."""
        moved, launches = fused if self.work.fused else (moved, launches)
        cost_bytes = Bytes(weights, moved * self.item, kv)
        return Op(name, 1, cost, cost_bytes, launches, products)

    def matrix(self, inputs: int, outputs: int, bias: bool, form: WeightFormat = DENSE) -> int:
        """Return the bytes of the weight and bias of a linear layer."""
        return form.bytes((outputs, inputs), self.item) + (outputs * self.item if bias else 0)

    def embedding(self) -> Op:
        size, tokens = self.config.hidden_size, self.work.tokens
        rows = min(tokens, self.config.vocab_size) * size * self.item
        written = tokens * size
        cost = Flops(vector=written if self.config.embedding_scale != 1 else 0)
        own = self.config.per_layer_size * len(self.config.layers)
        products: tuple[Product, ...] = ()
        if own:  # the layers' own embedding and projection, see `model.mlp.PerLayerInputs`
            cost += flops.linear(tokens, size, own, backward=self.work.backward)
            rows += min(tokens, self.config.vocab_size) * own * self.item
            rows += self.matrix(size, own, False)
            products = (Product(DENSE.name, tokens, size * own),)
            written += 4 * tokens * own
        launches = 5 if own else 1
        return self.op(
            "embedding", cost, rows, written, launches, fused=(written, 1), products=products
        )

    def norm(self, name: str, rows: int, fused: tuple[int, int] = (0, 0)) -> Op:
        size = self.config.hidden_size
        cost = flops.rms_norm(rows, size, self.work.backward)
        return self.op(name, cost, size * self.item, 2 * rows * size, 1, fused=fused)

    def pre_norm(self, name: str, fused: tuple[int, int] = (0, 0)) -> Op:
        """Return the norm of the residual stream, or its conversion where there is no norm."""
        if self.config.pre_norms:
            return self.norm(name, self.work.tokens, fused)
        moved = 2 * self.work.tokens * self.config.hidden_size
        return self.op(name, Flops(), 0, moved, 1, fused=fused)

    def head(self) -> list[Op]:
        """Return the final norm and the unembedding of the rows that need logits."""
        hidden, rows = self.config.hidden_size, self.work.logits_rows
        moved = rows * (hidden + self.vocab)
        cost = flops.linear(rows, hidden, self.vocab, backward=self.work.backward)
        if self.config.logits_scale != 1:
            cost += Flops(vector=rows * self.vocab)
        weights = self.matrix(hidden, self.vocab, False, self.config.head_format)
        head = product_of(self.config.head_format, rows, hidden * self.vocab)
        return [
            self.norm("final_norm", rows),
            self.op(
                "lm_head",
                cost,
                weights,
                moved,
                1,
                fused=(moved, 1),
                products=(head,),
            ),
        ]

    @property
    def residual(self) -> Flops:
        """FLOPs of adding a block's output, scaled in some families, to the residual stream."""
        values = self.work.tokens * self.config.hidden_size
        return Flops(vector=values if self.config.residual_scale == 1 else 2 * values)

    @property
    def all_reduce(self) -> int:
        """Launches of the sum over all GPUs."""
        return 1 if self.parts > 1 else 0
