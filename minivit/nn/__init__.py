"""What models are made of: modules and parameters, layers, initialisers, and the cost of a model."""
