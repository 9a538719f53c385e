"""From images to answers: predictor, classifier, evaluation, thresholds of cascades, and the data of a run."""
