"""Train a cascade on the handwritten digits, calibrate it, and compare what budgets cost.

python examples/cascade_with_budgets.py [EPOCHS]
"""

import sys

import numpy as np

import minivit

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 20

model = minivit.train(model="dvt_nano_8", data="digits", epochs=epochs).model
digits = minivit.load_data("digits")
order = np.random.default_rng(0).permutation(len(digits.test_labels))
held_out, unseen = order[:180], order[180:]  # to calibrate on, to test on

budgets = [0.25, 0.5, 1.0]  # shares of the multiply-adds of all exits together
calibration = minivit.calibrate(model, digits.test_images[held_out], digits.test_labels[held_out], budgets=budgets, unit="share")
for budget in calibration.budgets:
    answer = model.predict(digits.test_images[unseen], budget=budget)
    accuracy = (answer.labels == digits.test_labels[unseen]).mean()
    shares = np.bincount(answer.exits, minlength=model.num_exits) / len(unseen)
    print(
        f"budget {budget:.2f}: accuracy {100 * accuracy:.1f} %, {answer.macs.mean() / 1e6:.2f} M multiply-adds per image, "
        f"exits {', '.join(f'{100 * share:.0f} %' for share in shares)}"
    )
