"""Write a computation with tensors by hand, train it, and check its gradient against finite differences.

python examples/check_a_gradient.py
"""

import numpy as np

import minivit
from minivit import Tensor
from minivit import functional as F


def loss(x, w, v, labels):
    """Of a network with one hidden layer and a residual: x (B, C), w (C, C), v (K, C), labels (B,) -> ()."""
    hidden = F.gelu(F.linear(x, w)) + x  # (B, C)
    return F.cross_entropy(F.linear(hidden, v), labels)


rng = np.random.default_rng(0)
x, w, v = rng.standard_normal((6, 4)), rng.standard_normal((4, 4)), rng.standard_normal((3, 4))  # float64
labels = rng.integers(0, 3, 6)

minivit.gradcheck(loss, (x, w, v, labels))  # raises GradientError, naming the element, where a gradient is wrong
print("the gradients of x, w and v are right")

w, v = Tensor(w, requires_grad=True), Tensor(v, requires_grad=True)
for step in range(101):
    w.grad = v.grad = None
    value = loss(Tensor(x), w, v, labels)
    value.backward()
    for weight in (w, v):
        weight.data -= 0.5 * weight.grad.numpy()
    if step % 50 == 0:
        print(f"step {step}: loss {value.item():.4f}")
