"""The epilogue of a matrix product, applied in one pass over its elements: the flags that `gemm` takes on either device.

They are applied in the order of this list; v is element (i, j) of the product.
"""

BIAS_COLUMN = 1  # v += bias[j]
BIAS_ROW = 2  # v += bias[i]
GELU = 4  # v = gelu(v)
GELU_GRADIENT = 8  # v *= gelu'(pre[i, j]), and extra[i, j] = gelu(pre[i, j])
TANH = 16  # use the tanh approximation in both
RESIDUAL = 32  # v += extra[i, j]
CONVERT = 64  # CPU: the type of C is not that of the accumulator
PADDED = 128  # CPU, not an epilogue: rows of A are zero-padded to whole cells and steps
KEEP = 256  # CPU: pre[i, j] = v before GELU
SCALED = 512  # CPU, before all others: v *= the scales of row i and of column j, of operands in 8 bits
