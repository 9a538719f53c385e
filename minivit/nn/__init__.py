"""Building blocks of models: modules and parameters, layers, initialisers, and the cost of a model."""
