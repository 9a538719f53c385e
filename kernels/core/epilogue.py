"""What may follow a product, in one pass over its elements: the flags that `gemm` takes on either device.

They act in the order of this list; v is the product's element (i, j).
"""

BIAS_COLUMN = 1  # v += bias[j]
BIAS_ROW = 2  # v += bias[i]
GELU = 4  # v = gelu(v)
GELU_GRADIENT = 8  # v *= gelu'(pre[i, j]), and extra[i, j] = gelu(pre[i, j])
TANH = 16  # the tanh form of both
RESIDUAL = 32  # v += extra[i, j]
CONVERT = 64  # CPU: C is not of the accumulator's type
PADDED = 128  # CPU, no epilogue: rows of A go on with zeros, up to whole cells and steps
KEEP = 256  # CPU: before GELU, pre[i, j] = v
