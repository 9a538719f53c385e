"""Inference: predictor, classifier, evaluation, calibration of cascades, and the data of a run."""
