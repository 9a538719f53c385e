"""The list of ops. Works on plain arrays and knows no Tensor."""

from .adamw import adamw, begin_update, sgd
from .arithmetic import add, divide, multiply, subtract
from .attention import attention
from .augment import augment
from .gelu import gelu
from .joining import concatenation, splitting
from .layernorm import add_layernorm, layernorm
from .linear import linear
from .loss import cross_entropy, soft_cross_entropy
from .matmul import matmul
from .mixing import channel_mixing, token_mixing
from .op import Op
from .random import drop_path, dropout
from .resample import resample
from .shaping import broadcast, permute, reduce_sum, slicing
from .softmax import softmax
from .token_layernorm import token_layernorm
from .unfold import unfold

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        matmul,
        linear,
        attention,
        channel_mixing,
        token_mixing,
        layernorm,
        add_layernorm,
        token_layernorm,
        unfold,
        resample,
        add,
        subtract,
        multiply,
        divide,
        gelu,
        softmax,
        reduce_sum,
        broadcast,
        permute,
        slicing,
        *map(concatenation, (2, 3)),
        *map(splitting, (2, 3)),
        dropout,
        drop_path,
        cross_entropy,
        soft_cross_entropy,
        begin_update,
        adamw,
        sgd,
        augment,
    )
}
