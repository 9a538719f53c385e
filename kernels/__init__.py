"""The list of ops. Works on plain arrays and knows no Tensor."""
from .layernorm import add_layernorm, layernorm
from .op import Op

OPS: dict[str, Op] = {op.name: op for op in (layernorm, add_layernorm)}
