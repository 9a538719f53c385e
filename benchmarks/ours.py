"""minivit as a contender."""
from __future__ import annotations

from functools import cached_property

import numpy as np

from minivit import Predictor, Tensor, Trainer, create_model
from minivit.functional import cross_entropy

from .limits import product_rates
from .worker import Problem


class Contender:
    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.model = create_model(problem.family, **problem.config)
        self.model.load_state_dict(problem.weights)

    @cached_property
    def trainer(self) -> Trainer:
        return Trainer(self.model, **self.problem.adamw)

    @cached_property
    def predictor(self) -> Predictor:
        return Predictor(self.model)

    def train(self) -> float:
        return self.trainer.step(self.problem.images, self.problem.labels)

    def infer(self) -> np.ndarray:
        return self.predictor(self.problem.images)

    def weights(self) -> dict[str, np.ndarray]:
        return self.model.state_dict()

    def product_rates(self, tiny: bool) -> dict[str, float]:
        return product_rates(tiny)

    def flops(self) -> tuple[int, int]:
        """(a training step's, inference's) floating-point operations: what the ops on the tape say of themselves (`Op.cost`)."""
        loss = cross_entropy(self.model.train()(Tensor(self.problem.images)), self.problem.labels)
        forward = backward = 0
        seen, waiting = set(), [loss.node]
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            waiting += [t.node for t in node.inputs if isinstance(t, Tensor)]
            if node.op:
                cost = node.op.cost(*(None if t is None else t.shape for t in node.inputs), *node.constants)
                forward, backward = forward + cost.forward, backward + cost.backward
        return forward + backward, forward
